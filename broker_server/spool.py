"""Updates on their way up, kept on the disk chunk by chunk: memory holds the chunk at hand, a crash costs none.

One file for each task and client. It is written by whoever takes messages in and read by the worker, one whole update
at a time.
"""

import copy
import re
from collections.abc import Iterable
from pathlib import Path

from broker_server.records import Task
from edge_client.errors import LedgerError, StoreError
from edge_client.partial import PartialBlob
from edge_client.wire.messages import BlobRef
from edge_client.wire.transfer import Checklist

Identity = tuple[int, int]
_NAME = re.compile(r"([0-9]+)-([0-9]+)-(.+)\.part\Z")


class Spool:
    """The updates under way in ``folder``; none has more than ``limit`` bytes.

    Raises (from every method):
        LedgerError: the disk refuses.
    """

    def __init__(self, folder: Path, *, limit: int) -> None:
        self._folder = folder
        self._limit = limit
        self._files: dict[tuple[Identity, str], PartialBlob] = {}

    def restore(self, tasks: Iterable[Task]) -> dict[str, Checklist]:
        """What came before a restart for each client's last open task; what came for others is removed."""
        found: dict[str, Checklist] = {}
        last = {client: (task.epoch, task.task) for task in tasks for client in task.cohort}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(self._folder.iterdir()):
                name = _NAME.match(path.name)
                if name is None:
                    continue
                identity, client = (int(name[1]), int(name[2])), name[3]
                if last.get(client) != identity:
                    path.unlink()
                    continue
                blob = self._file(identity, client)
                if blob.checklist is not None:
                    found[client] = copy.deepcopy(blob.checklist)  # what is asked for is ahead of what is written
        except (OSError, StoreError) as error:
            raise LedgerError(f"updates under way: {error}") from error
        return found

    def keep(self, identity: Identity, client: str, ref: BlobRef, index: int, data: bytes) -> None:
        """Add one chunk of a client's update; the first one of another update replaces it."""
        try:
            self._file(identity, client).keep(ref, index, data)
        except StoreError as error:
            raise LedgerError(f"updates under way: {error}") from error

    def take(self, identity: Identity, client: str) -> bytes:
        """A client's whole update, which stays until it is discarded.

        Raises:
            WireError: its bytes are not those that were announced.
        """
        try:
            found = self._file(identity, client).assembly()
        except StoreError as error:
            raise LedgerError(f"updates under way: {error}") from error
        assert found is not None, "an update is taken once it has come"
        return found.take()

    def discard(self, identity: Identity, client: str | None = None) -> None:
        """Remove what came of one client's update, or of all for a task."""
        gone = [key for key in list(self._files) if key[0] == identity and client in (None, key[1])]
        try:
            for key in gone:
                self._files.pop(key).discard()
        except StoreError as error:
            raise LedgerError(f"updates under way: {error}") from error

    def _file(self, identity: Identity, client: str) -> PartialBlob:
        blob = self._files.get((identity, client))
        if blob is None:
            # A topic names the client, and its grammar leaves nothing that a path could take amiss.
            path = self._folder / f"{identity[0]}-{identity[1]}-{client}.part"
            # What a power cut takes of it is sent again: no client forgets its update before the receipt.
            blob = PartialBlob(path, limit=self._limit, durable=False)
            self._files[identity, client] = blob
        return blob
