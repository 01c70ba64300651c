# SPDX-License-Identifier: Apache-2.0
"""Addresses of checkpoints: no test here needs a network."""

import http.server
import os
import socket
import subprocess
import sys
import threading
import time
import types
import urllib.error
from pathlib import Path

import fsspec
import pytest

from vpt_jax.weights import remote
from vpt_jax.weights.readers import CheckpointError
from vpt_jax.weights.remote import local_path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VPT_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


@pytest.fixture
def served():
    """Files of a server on this machine: `(address, {path: bytes}, requests)`."""
    files, requests = {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            data = files.get(self.path)
            self.send_response(404 if data is None else 200)
            size = len(data or b"") + (99 if "broken" in self.path else 0)
            self.send_header("Content-Length", str(size))
            self.end_headers()
            self.wfile.write(data or b"")

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", files, requests
        server.shutdown()
        thread.join()


def test_local_paths_pass_through(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for path, expected in [
        ("a/b.npz", "a/b.npz"),
        ("/a/b.npz", "/a/b.npz"),
        ("~/b.npz", "/home/me/b.npz"),
        ("C:/b.npz", "C:/b.npz"),
        ("file:///a/b%20c.npz", "/a/b c.npz"),
        (Path("a"), "a"),
    ]:
        assert local_path(path) == Path(expected)


def test_a_file_is_downloaded_once(served, cache):
    address, files, requests = served
    files["/w/B 16.npz"] = files["/w/B%2016.npz"] = b"weights"
    url = f"{address}/w/B%2016.npz"
    path = local_path(url)
    assert path.read_bytes() == b"weights" and path.name.endswith("B_2016.npz")
    assert path.stat().st_mode & 0o777 == 0o644
    del files["/w/B%2016.npz"]
    assert local_path(url) == path and len(requests) == 1
    assert list(cache.iterdir()) == [path]


def test_another_address_is_another_file(served):
    address, files, _ = served
    files["/a/x.npz"], files["/b/x.npz"] = b"a", b"b"
    assert local_path(f"{address}/a/x.npz").read_bytes() == b"a"
    assert local_path(f"{address}/b/x.npz").read_bytes() == b"b"


def test_failed_downloads_say_what_to_do_and_leave_nothing(served, cache):
    address, files, _ = served
    files["/broken.npz"] = b"weig"
    for name, reason in [
        ("absent.npz", "404"),
        ("broken.npz", "the connection broke after 4 of 103 bytes"),
    ]:
        with pytest.raises(CheckpointError, match=reason) as error:
            local_path(f"{address}/{name}")
        assert f"or download {address}/{name} elsewhere" in str(error.value)
        assert "--config.backbone.checkpoint=PATH" in str(error.value)
        assert list(cache.iterdir()) == []


def test_without_a_network(no_network):
    browser = "https://storage.googleapis.com/vit_models/augreg/B_16.npz"
    with pytest.raises(CheckpointError, match=f"download {browser} elsewhere"):
        local_path("gs://vit_models/augreg/B_16.npz")
    with pytest.raises(CheckpointError, match="Name or service not known"):
        local_path("https://example.org/x.pth")


def test_public_buckets_need_no_package(served, monkeypatch):
    address, files, _ = served
    files["/bucket/x.npz"] = b"weights"
    monkeypatch.setattr(remote, "_public", lambda url: address + url[4:])
    assert local_path("gs://bucket/x.npz").read_bytes() == b"weights"


def test_private_buckets(tmp_path, monkeypatch):
    def denied(url, to):
        raise urllib.error.HTTPError(url, 403, "Forbidden", {}, None)

    monkeypatch.setattr(remote, "_download_public", denied)
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(
        CheckpointError, match=r"403.*is not public.*pip install fsspec"
    ):
        local_path("gs://bucket/x.npz")
    monkeypatch.setattr(
        remote, "_download_fsspec", lambda url, to: to.write_text(f"{url} by fsspec")
    )
    assert local_path("gs://bucket/x.npz").read_text() == "gs://bucket/x.npz by fsspec"
    with pytest.raises(CheckpointError, match="403"):
        local_path("https://example.org/x.npz")


def test_any_scheme_of_fsspec(cache):
    with fsspec.open("memory://folder/x.npz", "wb") as f:
        f.write(b"weights")
    path = local_path("memory://folder/x.npz")
    assert path.read_bytes() == b"weights"
    fsspec.filesystem("memory").rm("/folder/x.npz")
    assert local_path("memory://folder/x.npz") == path
    with pytest.raises(CheckpointError, match="FileNotFoundError"):
        local_path("memory://folder/absent.npz")
    with pytest.raises(CheckpointError, match="Protocol not known: nope"):
        local_path("nope://x")
    assert list(cache.iterdir()) == [path]


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for address, package in (
        ("s3://bucket/x", "fsspec"),
        ("hf://org/name/x", "huggingface_hub"),
    ):
        with pytest.raises(CheckpointError, match=f"pip install {package}"):
            local_path(address)


# --- Hugging Face ---------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for huggingface_hub that knows one file."""
    fake, fake.calls = types.ModuleType("huggingface_hub"), []
    fake.cached, fake.online = set(), True
    here = {("org/na.me", "main", "a/w.npz"), ("org/na.me", "refs/pr/1", "w.npz")}

    def hf_hub_download(repo, filename, *, revision, local_files_only=False):
        fake.calls.append("cache" if local_files_only else "download")
        key = (repo, revision, filename)
        if local_files_only and key not in fake.cached:
            raise FileNotFoundError("not cached")
        fake.cached.add(key)
        return str(tmp_path / revision / filename)

    def get_hf_file_metadata(url, *, timeout):
        fake.calls.append("ask")
        assert timeout <= 10
        if not fake.online:
            raise ConnectionError("no network")
        if not any(f"hub:{r}/{v}/{n}" == url for r, v, n in here):
            raise OSError("404 Client Error.\n\nRepository Not Found")
        return types.SimpleNamespace(etag='"1f"')  # of a small file: no SHA-256

    fake.hf_hub_download = hf_hub_download
    fake.get_hf_file_metadata = get_hf_file_metadata
    fake.hf_hub_url = lambda repo, name, *, revision: f"hub:{repo}/{revision}/{name}"
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    return fake


def test_hugging_face(hub, tmp_path):
    address = "hf://org/na.me/a/w.npz"
    assert local_path(address) == tmp_path / "main" / "a" / "w.npz"
    assert hub.calls == ["cache", "ask", "download"]
    hub.online = False
    assert local_path(address) == tmp_path / "main" / "a" / "w.npz"
    assert hub.calls[3:] == ["cache"]  # without asking
    with pytest.raises(CheckpointError, match="no network.*--config.backbone.check"):
        local_path("hf://org/na.me@refs%2Fpr%2F1/w.npz")
    hub.online = True
    path = local_path("hf://org/na.me@refs%2Fpr%2F1/w.npz")
    assert path == tmp_path / "refs/pr/1" / "w.npz"
    with pytest.raises(CheckpointError, match="Repository Not Found") as error:
        local_path("hf://org/name@v1/w.npz")
    assert "https://huggingface.co/org/name/resolve/v1/w.npz " in str(error.value)


def test_what_lies_beside_a_file_comes_along_where_it_is(hub, monkeypatch, tmp_path):
    class Absent(Exception):
        pass

    def download(repo, filename, *, revision, local_files_only=False):
        if local_files_only:
            raise FileNotFoundError("not cached")
        hub.calls.append(filename)
        if filename == "a/b.json":
            raise Absent
        return str(tmp_path / filename)

    errors = types.ModuleType("huggingface_hub.errors")
    errors.EntryNotFoundError = Absent
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    monkeypatch.setattr(hub, "hf_hub_download", download)
    path = local_path("hf://org/na.me/a/w.npz", beside=("b.json", "c.json"))
    assert path == tmp_path / "a" / "w.npz"
    assert hub.calls == ["ask", "a/b.json", "a/c.json", "a/w.npz"]


@pytest.mark.parametrize(
    "rest",
    [
        "name",
        "org/name",
        "org/name/",
        "org/name@v1",
        "org/name/../x",
        "org//x",
        "a@b/c/d",
    ],
)
def test_malformed_addresses(hub, rest):
    with pytest.raises(CheckpointError, match="expected hf://ORG/NAME/FILE or"):
        local_path(f"hf://{rest}")
    assert hub.calls == []


@pytest.mark.parametrize("offline", ["0", "1"])
def test_the_real_hub_out_of_reach(offline, tmp_path):
    code = (
        "from vpt_jax.weights.remote import local_path\n"
        "try: local_path('hf://org/name/w.npz')\n"
        "except ValueError as error: print(error)"
    )
    env = os.environ | {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": offline,
    }
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("hf://org/name/w.npz cannot be fetched (")
    assert "https://huggingface.co/org/name/resolve/main/w.npz " in done.stdout
    assert time.monotonic() - start < 30
