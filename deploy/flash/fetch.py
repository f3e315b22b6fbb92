"""Downloads an image: what was broken off goes on where it was (RFC 9110, section 14), and the checksum decides."""

import hashlib
import http.client
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path

from edge_client.errors import FlashError

_CHUNK = 1 << 20
_TIMEOUT = 60.0
_FRUITLESS = 5
"""Attempts in a row that brought nothing, after which it is given up."""
_PARTIAL = 206
_UNSATISFIABLE = 416

Report = Callable[[int, int | None], None]
"""Is told of bytes that are here, and of all that are to come where that is known."""


def fetch(url: str, sha256: str, folder: Path, report: Report, *, pause: Callable[[float], None] = time.sleep) -> Path:
    """The file at a URL, in ``folder``; where it is there already, it is only checked.

    Raises:
        FlashError: it cannot be fetched (what came is kept, the next call goes on), or is not the one of the checksum.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise FlashError(f"{url}: expected http:// or https://")
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise FlashError(f"--sha256 {sha256!r}: expected the image's SHA-256, 64 hex digits; it is published beside it")
    name = re.sub(r"[^A-Za-z0-9._-]", "_", Path(urllib.parse.unquote(parts.path)).name) or "image"
    folder.mkdir(parents=True, exist_ok=True)
    # Another checksum is another file, whatever its name.
    target = folder / f"{sha256[:12]}-{name}"
    if target.exists() and _digest(target) == sha256:
        return target
    partial = target.with_name(f"{target.name}.part")
    fruitless = 0
    while True:
        before = partial.stat().st_size if partial.exists() else 0
        try:
            whole = _resume(url, partial, before, report)
            reason = "it ended before all of it had come"
        except (OSError, http.client.HTTPException) as error:
            whole, reason = False, _reason(error)
        if whole:
            break
        after = partial.stat().st_size if partial.exists() else 0
        fruitless = 0 if after > before else fruitless + 1
        if fruitless == _FRUITLESS:
            raise FlashError(
                f"{url} cannot be fetched ({reason}); {after >> 20} MiB are kept, the same command goes on from there"
            )
        pause(min(30.0, 2.0**fruitless))
    found = _digest(partial)
    if found != sha256:
        partial.unlink()
        raise FlashError(f"{url} has the SHA-256 {found}, expected {sha256}: it is another file, or was changed")
    os.replace(partial, target)
    return target


def _resume(url: str, partial: Path, before: int, report: Report) -> bool:
    """Fetch what is missing; whether all of it is here."""
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity"})  # noqa: S310 (http alone, see above)
    if before:
        request.add_header("Range", f"bytes={before}-")
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)  # noqa: S310
    except urllib.error.HTTPError as error:
        # All of it may have come, and the program have been stopped before it looked.
        there = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range") or "")
        if error.code == _UNSATISFIABLE and there is not None and int(there[1]) == before:
            return True
        if error.code == _UNSATISFIABLE:
            partial.unlink()
        raise
    with response:
        total = response.length
        goes_on = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range") or "")
        if response.status == _PARTIAL and goes_on is not None and int(goes_on[1]) == before:
            here, mode = before, "ab"
        else:
            # The server begins at the beginning.
            here, mode = 0, "wb"
        expected = None if total is None else here + total
        with partial.open(mode) as file:
            report(here, expected)
            while data := response.read(_CHUNK):
                file.write(data)
                here += len(data)
                report(here, expected)
    return expected is None or here >= expected


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"{error.code} {error.reason}"
    return str(getattr(error, "reason", "") or str(error) or type(error).__name__)
