"""A client that is to be replaced: it takes a release that the server announces, fetches what it lacks of it and leaves
it to the privileged part of the device (`deploy.update`), which believes the federation's signature and not the client.

What the two share is files. This side writes ``staging``: the wheels by their SHA-256, then ``release.signed``, which
wakes the other side; and ``alive``, in which a client that is on trial says that it has heard the server. The other
side writes ``base``: ``report.json`` says how far it is, and ``wheels`` keeps what was installed before.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, BinaryIO

import msgspec
from msgspec import Meta

from edge_client import events as e
from edge_client.download import Download, Pull
from edge_client.errors import ConfigError, StoreError, TrustError, WireError
from edge_client.service.board import free_disk
from edge_client.terminal import printable
from edge_client.trust.keys import write_secret
from edge_client.trust.release import File, Record, admit, claimed, fitting, unseal
from edge_client.wire import messages as m
from edge_client.wire.topics import Topics
from edge_client.wire.transfer import Assembly, Checklist

SIGNED, ALIVE, REPORT, TRUST = "release.signed", "alive", "report.json", "trust.json"
_WHEEL_LIMIT = 256 * 2**20
_UNPACKED = 4
"""How much more room what is installed takes than its wheels."""
_SPARE = 64 * 2**20
_BLOCK = 2**20

Action = e.Subscribe | e.Unsubscribe | e.Lacking | e.Log


class Report(msgspec.Struct, frozen=True):
    """What the privileged part says of the release that it took last."""

    record: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
    """SHA-256 of the record, in hexadecimal digits."""
    version: str
    stage: str
    detail: str = ""
    token: str = ""
    """What a client on trial has to say in ``alive``."""


class FileAssembly(Assembly):
    """A blob under way in a file: only one chunk of it is in memory."""

    def __init__(self, ref: m.BlobRef, path: Path) -> None:
        Checklist.__init__(self, ref, limit=_WHEEL_LIMIT)
        self._path, self._part = path, path.with_name(path.name + ".part")
        self._part.unlink(missing_ok=True)

    def add(self, index: int, data: bytes) -> bool:
        """Take one chunk; False when it is there already or does not belong to this blob."""
        if not self.mark(index, len(data)):
            return False
        with open(os.open(self._part, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600), "wb") as file:
            file.seek(index * self.ref.chunk)
            file.write(data)
        return True

    def take(self) -> bytes:
        """Give the file its name, once it is known to be what the reference names; no bytes.

        Raises:
            WireError: it is not.
        """
        with self._part.open("rb") as file:
            found = digest(file)
            if found != self.ref.sha256:
                raise WireError(f"blob has SHA-256 {found.hex()[:12]}; {self.ref.sha256.hex()[:12]} was named")
            os.fsync(file.fileno())
        os.replace(self._part, self._path)
        return b""


@dataclass
class Updater:
    """One client's side. ``verify`` says whether the federation has signed data; ``running`` is this client's version.

    Where the device has no privileged part there is nothing that could install a release, and none is taken.
    """

    staging: Path
    base: Path
    topics: Topics
    verify: Callable[[bytes, bytes], bool]
    running: str
    platform: str
    wrote: Callable[[int], None] = lambda _: None
    progress: m.Progress | None = None
    _release: m.Release | None = field(init=False, default=None)
    _latest: bytes = field(init=False, default=b"")
    """Which release was announced last."""
    _lacking: list[File] = field(init=False, default_factory=list)
    _download: Download | None = field(init=False, default=None)
    _seen: tuple[int, int] | None = field(init=False, default=None)
    _report: Report | None = field(init=False, default=None)

    @property
    def able(self) -> bool:
        """Whether the device can be updated from the server."""
        return (self.base / TRUST).exists()

    # What the server says.

    def announced(self, release: m.Release, now: float, wall: float) -> Iterator[Action]:
        """A release is announced, perhaps again; ``now`` is monotonic, ``wall`` in seconds since 1970."""
        if not self.able or release == self._release:
            return
        name = self._latest = _name(release)
        self.look(joined=False)
        if self._report is not None and bytes.fromhex(self._report.record)[:8] == name:
            return  # the privileged part has it, or had it: what became of it is said with each hello
        version = claimed(release)
        try:
            record = unseal(release, self.topics.federation, self.verify)
            if version == self.running:
                self.progress = m.Progress(version, "healthy", "runs it already", name)
                return
            admit(record, now=wall, running=self.running, newest=0.0)
            yield from self._take(release, record, now)
        except (WireError, OSError, StoreError, ConfigError) as error:
            yield from self._stop()
            yield from self._refuse(version, name, error)

    def message(self, topic: str, payload: bytes, now: float) -> Iterator[Action]:
        """Something has come on a topic; nothing is done about what is no chunk of a release."""
        download = self._download
        if download is None:
            return
        try:
            chunk = self.topics.parse_pub(topic)
            if chunk is None or chunk.sha256 != download.ref.sha256:
                return
            left, pull = download.left, download.chunk(chunk.index, payload, now)
            self.wrote(len(payload) if download.left < left else 0)
            yield from self._pull(download, pull)
            if download.complete:
                yield from self._taken(download, now)
        except (WireError, OSError, StoreError, ConfigError) as error:
            if not isinstance(error, WireError):
                release = self._release
                yield from self._stop()
                if release is not None:
                    yield from self._refuse(claimed(release), _name(release), error)

    def connected(self, now: float) -> Iterator[Action]:
        """There is a connection again, and nothing is subscribed to any more."""
        if self._download is not None:
            yield from self._pull(self._download, self._download.start(now))

    def tick(self, now: float) -> Iterator[Action]:
        """Time has passed; some ten seconds between two of these are good enough."""
        if self._download is not None:
            yield from self._pull(self._download, self._download.tick(now))

    # What the privileged part says.

    def look(self, *, joined: bool) -> None:
        """See how far the privileged part is; a client on trial that has ``joined`` says so."""
        with contextlib.suppress(OSError, msgspec.DecodeError, UnicodeDecodeError):
            path = self.base / REPORT
            status = path.stat()
            if (seen := (status.st_ino, status.st_mtime_ns)) != self._seen:
                self._report = msgspec.json.decode(path.read_bytes(), type=Report)
                self._seen = seen
        report = self._report
        if report is None or self._download is not None:
            return
        # A newer release may wait to be looked at, or have been refused before it came so far.
        if self._latest in (b"", bytes.fromhex(report.record)[:8]):
            self.progress = _shown(report) or self.progress
        if report.stage == "trial" and report.version == self.running and joined:
            self._live(report.token)

    def _live(self, token: str) -> None:
        path, said = self.staging / ALIVE, f"{self.running} {token}\n".encode()
        with contextlib.suppress(OSError):
            if path.read_bytes() == said:
                return
        # Where it cannot be written, the privileged part goes back and says why: nothing was heard.
        with contextlib.suppress(ConfigError):
            write_secret(path, said)

    # Fetching.

    def _take(self, release: m.Release, record: Record, now: float) -> Iterator[Action]:
        files = fitting(record.files, self.platform)
        yield from self._stop()
        self.staging.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._clear(files)
        self._lacking = [file for file in files if not self._has(file)]
        missing = sum(file.blob.size for file in self._lacking)
        needed = _UNPACKED * sum(file.blob.size for file in files) + missing + _SPARE
        if (free := free_disk(self.staging)) < needed:
            raise StoreError(f"{free >> 20} MiB of disk are free, and {needed >> 20} are needed")
        self._release, self.progress = release, m.Progress(record.version, "fetching", release=_name(release))
        yield e.Log(f"release {record.version}: fetching {missing / 2**20:,.1f} MiB in {len(self._lacking)} files")
        yield from self._next(now)

    def _has(self, file: File) -> bool:
        name = file.blob.sha256.hex()
        return (self.base / "wheels" / name / file.name).exists() or (self.staging / f"{name}.whl").exists()

    def _clear(self, files: list[File]) -> None:
        """Nothing stays of another release."""
        kept = {f"{file.blob.sha256.hex()}.whl" for file in files}
        for path in self.staging.iterdir():
            if path.name not in kept and path.name != ALIVE:
                path.unlink()

    def _next(self, now: float) -> Iterator[Action]:
        """Begin the next file, or leave all of them to the privileged part."""
        release, progress = self._release, self.progress
        assert release is not None and progress is not None  # noqa: PT018
        if self._lacking:
            ref = self._lacking[0].blob
            partial = FileAssembly(ref, self.staging / f"{ref.sha256.hex()}.whl")
            self._download = Download(ref, _WHEEL_LIMIT, partial=partial)
            yield from self._pull(self._download, self._download.start(now))
            return
        self._download = None
        write_secret(self.staging / SIGNED, msgspec.msgpack.encode(release))
        self.progress = m.Progress(progress.version, "staged", release=_name(release))
        yield e.Log(f"release {progress.version}: all of it is here, to be installed")

    def _taken(self, download: Download, now: float) -> Iterator[Action]:
        try:
            download.take()
        except WireError as error:
            yield from self._pull(download, download.rest(now))
            yield e.Log(f"{error}; downloading again")
            return
        yield from self._pull(download, download.stop())
        del self._lacking[0]
        yield from self._next(now)

    def _stop(self) -> Iterator[Action]:
        download, self._download, self._release = self._download, None, None
        if download is not None:
            yield from self._pull(download, download.stop())

    def _refuse(self, version: str, name: bytes, error: Exception) -> Iterator[Action]:
        waits = isinstance(error, TrustError)
        reason = printable(error.strerror or str(error) if isinstance(error, OSError) else str(error))[:500]
        if version:
            self.progress = m.Progress(version, "refused", reason, name)
        yield e.Log(f"a release is {'not believed' if waits else 'of no use here'}: {reason}")

    def _pull(self, download: Download, pull: Pull) -> Iterator[Action]:
        sha256 = download.ref.sha256
        if pull.drop:
            yield e.Unsubscribe(tuple(self.topics.published(sha256, index) for index in pull.drop))
        if pull.take:
            yield e.Subscribe(tuple(self.topics.published(sha256, index) for index in pull.take))
        if pull.ask:
            yield e.Lacking(sha256, pull.ask)


def digest(file: BinaryIO) -> bytes:
    """SHA-256 of the rest of a file."""
    found = hashlib.sha256()
    while block := file.read(_BLOCK):
        found.update(block)
    return found.digest()


def _shown(report: Report) -> m.Progress | None:
    try:
        fields = [report.version, report.stage, report.detail[:500], bytes.fromhex(report.record)[:8]]
        return msgspec.convert(fields, m.Progress, builtin_types=(bytes,))
    except (msgspec.ValidationError, ValueError):
        return None


def _name(release: m.Release) -> bytes:
    return hashlib.sha256(release.record).digest()[:8]
