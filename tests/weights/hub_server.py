# SPDX-License-Identifier: Apache-2.0
"""A server on this machine that speaks the hub's protocol, and can misbehave."""

import contextlib
import hashlib
import http.server
import re
import socket
import threading
import types


class Hub:
    """What it serves, what it was asked, and how it goes wrong."""

    def __init__(self):
        self.files = {}  # "org/name/file": bytes, of revision main
        self.requests = []  # (method, "org/name/file", Range)
        self.cuts = []  # of the next downloads, how many bytes they get before the end
        self.announced = {}  # another SHA-256 than the file's
        self.gated = set()  # "org/name/file" that need a licence
        self.hashes = []  # what a bucket says of its files
        self.address = ""

    def downloads(self):
        """Which files were sent, or begun to be."""
        return [name for method, name, _ in self.requests if method == "GET"]


def _handler(hub):
    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self, body):
            name = self.path.removeprefix("/").replace("/resolve/main/", "/", 1)
            if not name.startswith("api/"):  # the package's own questions
                hub.requests.append((self.command, name, self.headers.get("Range")))
            data = hub.files.get(name)
            if data is None or name in hub.gated:
                self.send_response(403 if data else 404)
                code = "GatedRepo" if data else "EntryNotFound"
                self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            etag = hub.announced.get(name) or hashlib.sha256(data).hexdigest()
            start = int(re.findall(r"\d+", self.headers.get("Range", "0"))[0])
            self.send_response(206 if start else 200)
            if start:
                span = f"bytes {start}-{len(data) - 1}/{len(data)}"
                self.send_header("Content-Range", span)
            for told in hub.hashes:
                self.send_header("x-goog-hash", told)
            self.send_header("X-Repo-Commit", "1" * 40)
            self.send_header("ETag", f'"{etag}"')
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            if body:
                end = hub.cuts.pop(0) if hub.cuts else len(data)
                self.wfile.write(data[start : start + end])

        def do_HEAD(self):
            self.answer(False)

        def do_GET(self):
            self.answer(True)

        def log_message(self, *args):
            pass

    return Handler


@contextlib.contextmanager
def serve(monkeypatch, cache):
    """Yields a `Hub` in the place of the real one, with `cache` as the cache."""
    from huggingface_hub import constants, file_download

    hub, no_clock = Hub(), types.SimpleNamespace(sleep=lambda seconds: None)
    monkeypatch.setattr(file_download, "time", no_clock)  # between its attempts
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        hub.address = f"http://127.0.0.1:{server.server_port}"
        point_at(hub.address, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield hub
        server.shutdown()
        thread.join()


def point_at(address, monkeypatch):
    """Makes the real package ask there."""
    from huggingface_hub import constants

    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", address)


def unplug(monkeypatch):
    """No name of a server is known any more."""

    def refuse(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
