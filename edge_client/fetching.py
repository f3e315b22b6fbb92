"""What a session pulls: at most one blob at a time, as the session's events and actions. No I/O."""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field

from edge_client import events as e
from edge_client.download import Download, Pull
from edge_client.errors import WireError
from edge_client.held import SessionSettings
from edge_client.wire import messages as m
from edge_client.wire import transfer
from edge_client.wire.topics import Chunk, Topics

Fetched = tuple[m.BlobRef, bytes]
"""A blob that is here, and what it is."""


@dataclass
class Fetching:
    """The blob on its way down; ``partial`` is what an earlier life has of one, ``say`` says things to the server."""

    settings: SessionSettings
    topics: Topics
    say: Callable[[m.Message], e.Action] = field(repr=False)
    partial: transfer.Assembly | None = None
    _download: Download | None = field(init=False, default=None)
    _kept: bool = field(init=False)
    """Whether chunks of it are on the disk."""

    def __post_init__(self) -> None:
        self._kept = self.partial is not None

    @property
    def wake(self) -> float | None:
        """When `tick` has something to do; None where nothing is on its way."""
        return None if self._download is None else self._download.wake

    def pulls(self, sha256: bytes) -> bool:
        """Whether this blob is on its way."""
        return self._download is not None and self._download.ref.sha256 == sha256

    def begin(self, ref: m.BlobRef, now: float) -> Generator[e.Action, None, Fetched | None]:
        """Pull a blob; it, where an earlier life has all of it.

        Raises:
            WireError: it is larger than is taken.
        """
        settings, (partial, self.partial) = self.settings, (self.partial, None)
        self._download = Download(ref, settings.blob_limit, settings.window, settings.patience, partial)
        if self._download.complete:
            return (yield from self._take(self._download, now))
        yield from self._pull(self._download, self._download.start(now))
        return None

    def again(self, now: float) -> Iterator[e.Action]:
        """There is a connection again, and nothing is subscribed to any more."""
        if self._download is not None:
            yield from self._pull(self._download, self._download.start(now))

    def chunk(self, chunk: Chunk, payload: bytes, now: float) -> Generator[e.Action, None, Fetched | None]:
        """A chunk has come; the blob, where it was the last one.

        Raises:
            WireError: it does not belong to the blob.
        """
        download = self._download
        if download is None or chunk.sha256 != download.ref.sha256:
            return None
        left, pull = download.left, download.chunk(chunk.index, payload, now)
        if download.left < left and download.ref.size >= self.settings.keep:
            self._kept = True
            yield e.Keep(download.ref, chunk.index, payload)
        yield from self._pull(download, pull)
        return (yield from self._take(download, now)) if download.complete else None

    def tick(self, now: float) -> Iterator[e.Action]:
        """Time has passed."""
        if self._download is not None:
            yield from self._pull(self._download, self._download.tick(now))

    def stop(self) -> Iterator[e.Action]:
        """Nothing is wanted any more."""
        download, self._download = self._download, None
        if download is not None:
            yield from self._pull(download, download.stop())
            yield from self.discard()

    def discard(self) -> Iterator[e.Action]:
        """Nothing is on its way that a later life could go on with."""
        self.partial = None
        if self._kept:
            self._kept = False
            yield e.Discard()

    def _take(self, download: Download, now: float) -> Generator[e.Action, None, Fetched | None]:
        try:
            data = download.take()
        except WireError as error:
            yield from self._pull(download, download.rest(now))
            yield from self.discard()
            assert download.wake is not None
            yield e.Log(f"{error}; downloading again in {download.wake - now:.0f} s")
            return None
        self._download = None
        return download.ref, data

    def _pull(self, download: Download, pull: Pull) -> Iterator[e.Action]:
        sha256 = download.ref.sha256
        if pull.drop:
            yield e.Unsubscribe(tuple(self.topics.published(sha256, index) for index in pull.drop))
        if pull.take:
            yield e.Subscribe(tuple(self.topics.published(sha256, index) for index in pull.take))
        if pull.ask:
            yield self.say(m.Missing(sha256, pull.ask))
