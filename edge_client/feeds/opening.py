"""Opens what ``--data`` names, also data that goes on coming: ``drop:FOLDER`` and ``ring:FOLDER``."""

import threading
from collections.abc import Callable
from pathlib import Path

from edge_client.data import ArraySource, DataSource, open_data, split
from edge_client.feeds.drop import DropFolder, Retention
from edge_client.feeds.recording import Recording
from edge_client.feeds.shards import MEMORY, Feed, ShardSource
from edge_client.manifest import Manifest


class Feeds:
    """A device's data; `open` is what a `Device` wants. ``holdout`` is the share that is evaluated on instead."""

    def __init__(
        self,
        spec: str,
        log: Callable[[str], None],
        *,
        holdout: float = 0.0,
        quiet: float = 5.0,
        retention: Retention | None = None,
        memory: int = MEMORY,
    ) -> None:
        self._spec, self._log, self._holdout = spec, log, holdout
        self._quiet, self._retention, self._memory = quiet, retention or Retention(), memory
        self._feed: Feed | None = None
        self._source: ShardSource | None = None
        self._lock = threading.Lock()
        self.opened: int | None = None
        """Samples that there were when the data was opened, where they go on coming."""

    def open(self, manifest: Manifest) -> tuple[DataSource, DataSource]:
        """What is trained on and what is evaluated on.

        Raises:
            DataError: it cannot be read or does not fit the bundle. Data that goes on coming is never refused.
        """
        kind, _, place = self._spec.partition(":")
        if kind not in ("drop", "ring") or not place:
            source = open_data(self._spec, manifest)
            if self._holdout and isinstance(source, ArraySource):
                return split(source, self._holdout, seed=0)
            return source, source
        feed: Feed
        if kind == "drop":
            feed = DropFolder(
                Path(place), manifest, self._log, quiet=self._quiet, retention=self._retention, memory=self._memory
            )
        else:
            feed = Recording(Path(place), manifest, self._log, seconds=self._retention.seconds, memory=self._memory)
        train = ShardSource(feed.shards, holdout=self._holdout)
        test = ShardSource(feed.shards, part="test", holdout=self._holdout) if self._holdout else train
        with self._lock:
            feed.refresh()
            self._feed, self._source, self.opened = feed, train, train.samples
        return train, test

    @property
    def samples(self) -> int | None:
        """Samples to train on now; None where their number does not change, or nothing is open yet."""
        return None if self._source is None else self._source.samples

    def refresh(self) -> None:
        """Look for new data; on any thread."""
        with self._lock:
            if self._feed is not None:
                self._feed.refresh()
