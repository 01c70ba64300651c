# SPDX-License-Identifier: Apache-2.0
"""Checkpoints by address: a local path for `hf://`, `https://`, `gs://` and others.

A file is downloaded once, with a progress bar on a terminal, and held against the size
and the hash that its server names. The copy is then used without asking the network, so
a job starts offline and always with the same bytes; to fetch a file anew, delete the
copy or name another revision. What a download leaves unfinished is not kept.
"""

import base64
import contextlib
import errno
import hashlib
import os
import re
import shutil
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vpt_jax.files.durable import atomic_path, digest
from vpt_jax.files.messages import reason
from vpt_jax.weights.readers import CheckpointError

TIMEOUT_S = 10  # for an answer, not for the whole download
HF_FORM = "hf://ORG/NAME/FILE or hf://ORG/NAME@REVISION/FILE"

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/+(?P<rest>[^/].*)")
_HF = re.compile(r"([\w.-]+)/([\w.-]+)(?:@([^/@]+))?/([^@].*)")
_ELSEWHERE = "pass its path (--config.backbone.checkpoint=PATH)"
_FULL = (errno.ENOSPC, errno.EDQUOT)


def local_path(path: str | os.PathLike, *, beside: Sequence[str] = ()) -> Path:
    """The local file for a path or an address; downloads it if need be.

    Args:
      path: A local path (`~` is the home directory), or one of
        `hf://ORG/NAME[@REVISION]/FILE` (Hugging Face, kept in its own cache; needs
        `huggingface_hub`), `https://...`, `gs://BUCKET/FILE` (public files need
        nothing, others `gcsfs`), or any other scheme that `fsspec` knows. All but the
        first are kept under `~/.cache/vpt_jax`, or under `VPT_JAX_CACHE` if that is
        set.
      beside: Names of further files, fetched with one of `hf://` where its folder has
        them.

    Raises:
      CheckpointError: If an address is malformed, or its file cannot be had; the
        message says from where to get it by hand. Local paths are not looked at.
    """
    path = os.fspath(path)
    match = _URL.fullmatch(path)
    if match is None:
        try:
            return Path(path).expanduser()
        except RuntimeError as error:
            raise CheckpointError(
                f"got {path}, whose user has no home; expected the path of a file"
                f" ({error})."
            ) from error
    scheme, rest = match["scheme"].lower(), match["rest"]
    if scheme == "file":
        return Path(f"/{urllib.parse.unquote(rest)}")
    if scheme == "hf":
        return _hugging_face(rest, beside)
    return _cached(f"{scheme}://{rest}")


def _hugging_face(rest: str, beside: Sequence[str]) -> Path:
    match = _HF.fullmatch(rest)
    if match is None or not {"", ".", ".."}.isdisjoint(rest.split("/")):
        raise CheckpointError(f"got hf://{rest}, expected {HF_FORM}.")
    org, name, revision, filename = match.groups()
    repo, revision = f"{org}/{name}", urllib.parse.unquote(revision or "main")
    browser = f"https://huggingface.co/{repo}/resolve/{revision}/{filename}"
    # The folder's name tells which network it is.
    with _explained(f"hf://{rest}", browser, f"{name}/{filename}"):
        import huggingface_hub as hub

        try:
            found = hub.hf_hub_download(
                repo, filename, revision=revision, local_files_only=True
            )
        except Exception:  # not in the cache, whatever that is called
            # Alone, hf_hub_download would try for minutes where there is no network.
            url = hub.hf_hub_url(repo, filename, revision=revision)
            told = hub.get_hf_file_metadata(url, timeout=TIMEOUT_S)
            for name in beside:
                from huggingface_hub.errors import EntryNotFoundError

                with contextlib.suppress(EntryNotFoundError):  # it has none
                    name = str(Path(filename).parent / name)
                    hub.hf_hub_download(repo, name, revision=revision)
            found = hub.hf_hub_download(repo, filename, revision=revision)
            _check_hash(Path(found), told.etag or "")
        return Path(found)


def _check_hash(path: Path, etag: str) -> None:
    """Removes a download that is not what the hub announced: it does not look itself.

    Raises OSError then. Large files are announced by their SHA-256.
    """
    if not re.fullmatch("[0-9a-f]{64}", etag) or (got := digest(path)) == etag:
        return
    path.resolve().unlink()  # what the name in the cache points to
    path.unlink(missing_ok=True)
    raise OSError(
        f"its SHA-256 is {got[:12]}..., the hub announced {etag[:12]}...; the copy was"
        " removed"
    )


def _cached(url: str) -> Path:
    name = re.sub(r"[^\w.-]", "_", url.split("?")[0].rpartition("/")[2]) or "file"
    digest = hashlib.sha256(url.encode()).hexdigest()[:16]
    root = os.environ.get("VPT_JAX_CACHE") or "~/.cache/vpt_jax"
    path = Path(root).expanduser() / f"{digest}-{name}"
    if path.is_file():
        return path
    browser = _public(url) or url
    with _explained(url, browser, name), atomic_path(path) as temporary:
        _download(url, temporary)
    return path


def _public(url: str) -> str:
    """The address for a browser; empty where there is none."""
    if url.startswith("gs://"):
        rest = urllib.parse.quote(url.removeprefix("gs://"))
        return f"https://storage.googleapis.com/{rest}"
    return url if url.startswith(("https://", "http://")) else ""


def _download(url: str, to: Path) -> None:
    if not _public(url):
        return _download_fsspec(url, to)
    try:
        _download_public(_public(url), to)
    except urllib.error.HTTPError as error:
        error.close()  # it holds the connection
        if not url.startswith("gs://") or error.code not in (401, 403):
            raise
        try:
            _download_fsspec(url, to)
        except ImportError:
            raise PermissionError(
                f"{error}: it does not exist or is not public; private files need"
                " pip install fsspec gcsfs and a login with gcloud"
            ) from error


def _download_fsspec(url: str, to: Path) -> None:
    """With the user's credentials."""
    import fsspec

    files, name = fsspec.core.url_to_fs(url)
    size = files.info(name)["size"]
    files.get_file(name, str(to))
    _check_size(to, size)


def _download_public(url: str, to: Path) -> None:
    from rich import console, progress

    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer, open(to, "wb") as f:
        size = int(answer.headers.get("Content-Length") or 0)
        bar = {"description": url.rpartition("/")[2], "total": size}
        bar |= {"console": console.Console(stderr=True)}
        quiet = not sys.stderr.isatty()
        with progress.wrap_file(answer, disable=quiet, **bar) as read:
            shutil.copyfileobj(read, f, 1 << 20)
        hashes = answer.headers.get_all("x-goog-hash") or []
    _check_size(to, size or None)
    for told in hashes:  # of a bucket: crc32c=..., md5=...
        kind, _, value = told.strip().partition("=")
        if kind == "md5" and base64.b64decode(value).hex() != _md5(to):
            raise OSError(f"its MD5 is {_md5(to)}, the bucket announced another")


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _check_size(path: Path, size: Any) -> None:
    got = path.stat().st_size
    if size is not None and got != size:
        raise OSError(f"the connection broke after {got} of {size} bytes")


@contextlib.contextmanager
def _explained(address: str, browser: str, kept_as: str) -> Iterator[None]:
    """Makes every error inside a `CheckpointError` that says what to do instead."""
    by_hand = f"download {browser} elsewhere, keep it as {kept_as}, and {_ELSEWHERE}"
    try:
        yield
    except ImportError as error:
        package = "huggingface_hub" if address.startswith("hf://") else "fsspec"
        raise CheckpointError(
            f"{address} needs a package that is not there ({error}): pip install"
            f" {package}; or {by_hand}."
        ) from error
    except Exception as error:  # the hub's, the network's and the disk's have no root
        first = "Check the name and the network"
        if isinstance(error, OSError) and error.errno in _FULL:
            first = "Free some room, or name another place (HF_HOME, VPT_JAX_CACHE)"
        if type(error).__name__ == "GatedRepoError":
            page = browser.partition("/resolve/")[0]
            first = f"Its licence is yours to read and accept at {page} (then hf login)"
        raise CheckpointError(
            f"{address} cannot be fetched ({type(error).__name__}: {reason(error)})."
            f" {first}, or {by_hand}."
        ) from error
