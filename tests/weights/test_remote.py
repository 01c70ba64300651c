# SPDX-License-Identifier: Apache-2.0
"""Addresses of checkpoints: no test here needs a network."""

import sys
import time
import urllib.error
from pathlib import Path

import fsspec
import hub_server
import huggingface_hub
import pytest

from vpt_jax.weights import remote
from vpt_jax.weights.readers import CheckpointError
from vpt_jax.weights.remote import local_path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VPT_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Hugging Face's, and of any other files by their paths."""
    with hub_server.serve(monkeypatch, tmp_path / "hub") as hub:
        yield hub


def test_local_paths_pass_through(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for path, expected in [
        ("/a/b.npz", "/a/b.npz"),
        ("~/b.npz", "/home/me/b.npz"),
        ("C:/b.npz", "C:/b.npz"),
        ("file:///a/b%20c.npz", "/a/b c.npz"),
        (Path("a"), "a"),
    ]:
        assert local_path(path) == Path(expected)


def test_a_file_is_downloaded_once(hub, cache):
    hub.files = {"w/B%2016.npz": b"weights", "v/B%2016.npz": b"others"}
    url = f"{hub.address}/w/B%2016.npz"
    path = local_path(url)
    assert path.read_bytes() == b"weights" and path.name.endswith("B_2016.npz")
    assert path.stat().st_mode & 0o777 == 0o644
    assert local_path(url) == path and len(hub.requests) == 1
    assert list(cache.iterdir()) == [path]
    # Another address is another file.
    assert local_path(f"{hub.address}/v/B%2016.npz").read_bytes() == b"others"


def test_failed_downloads_say_what_to_do_and_leave_nothing(hub, cache):
    hub.files["broken.npz"], hub.cuts = bytes(103), [4]
    for name, reason in [
        ("absent.npz", "404"),
        ("broken.npz", "the connection broke after 4 of 103 bytes"),
    ]:
        with pytest.raises(CheckpointError, match=reason) as error:
            local_path(f"{hub.address}/{name}")
        assert f"or download {hub.address}/{name} elsewhere" in str(error.value)
        assert "--config.backbone.checkpoint=PATH" in str(error.value)
        assert list(cache.iterdir()) == []


def test_without_a_network(monkeypatch):
    hub_server.unplug(monkeypatch)
    browser = "https://storage.googleapis.com/vit_models/augreg/B_16.npz"
    for address, message in [
        ("gs://vit_models/augreg/B_16.npz", f"download {browser} elsewhere"),
        ("https://example.org/x.pth", "Name or service not known"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            local_path(address)


def test_public_buckets_need_no_package_and_their_hash_is_looked_at(hub, monkeypatch):
    hub.files["bucket/x.npz"] = b"abcd"
    monkeypatch.setattr(remote, "_public", lambda url: hub.address + url[4:])
    hub.hashes = ["crc32c=AAAAAA==", "md5=AAAAAAAAAAAAAAAAAAAAAA=="]
    with pytest.raises(CheckpointError, match="its MD5 is e2fc714c4727ee9395f"):
        local_path("gs://bucket/x.npz")
    hub.hashes[1] = "md5=4vxxTEcn7pOV8yTNLn8zHw=="
    assert local_path("gs://bucket/x.npz").read_bytes() == b"abcd"


def test_private_buckets(monkeypatch):
    def denied(url, to):
        raise urllib.error.HTTPError(url, 403, "Forbidden", {}, None)

    monkeypatch.setattr(remote, "_download_public", denied)
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(CheckpointError, match=r"403.*not public.*pip install fsspec"):
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


@pytest.mark.parametrize(
    ("address", "package"),
    [("s3://bucket/x", "fsspec"), ("hf://org/name/x", "huggingface_hub")],
)
def test_a_missing_package_is_named(monkeypatch, address, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(CheckpointError, match=f"pip install {package}.*keep it as"):
        local_path(address)


# --- Hugging Face ---------------------------------------------------------------------


def test_hugging_face(hub):
    hub.files = {f"org/na.me/a/{n}": n.encode() for n in ("w.npz", "c.json")}
    path = local_path("hf://org/na.me/a/w.npz", beside=("b.json", "c.json"))
    assert path.read_bytes() == b"w.npz"
    # What lies beside it comes along, where it is.
    assert hub.downloads() == ["org/na.me/a/c.json", "org/na.me/a/w.npz"]
    hub.requests.clear()
    assert local_path("hf://org/na.me/a/w.npz") == path and hub.requests == []
    hub.files["org/na.me/resolve/refs%2Fpr%2F1/w.npz"] = b"of a revision"
    path = local_path("hf://org/na.me@refs%2Fpr%2F1/w.npz")
    assert path.read_bytes() == b"of a revision"
    with pytest.raises(CheckpointError, match="EntryNotFound") as error:
        local_path("hf://org/name@v1/w.npz")
    assert "https://huggingface.co/org/name/resolve/v1/w.npz " in str(error.value)


@pytest.mark.parametrize("rest", ["org/name/", "org/name@v1", "org/name/../x", "a@b/c"])
def test_malformed_addresses(rest):
    with pytest.raises(CheckpointError, match="expected hf://ORG/NAME/FILE or"):
        local_path(f"hf://{rest}")


@pytest.mark.parametrize("offline", [False, True])
def test_the_real_hub_out_of_reach(offline, tmp_path, monkeypatch):
    hub_server.point_at("http://127.0.0.1:9", monkeypatch)
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    start = time.monotonic()
    with pytest.raises(
        CheckpointError, match=r"^hf://org/.* cannot be fetched \("
    ) as e:
        local_path("hf://org/name/w.npz")
    assert "https://huggingface.co/org/name/resolve/main/w.npz " in str(e.value)
    assert ("Offline" in str(e.value)) == offline
    assert time.monotonic() - start < 30
