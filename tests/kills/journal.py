"""What a client writes down beside fedge, for the account after the run.

Its data is named ``tests.kills.journal:data``, which brings this module into the process of a real ``fedge join``.
It is loaded as the client's data, into the real process, and notes on a disk of its own, before the client does the
same: which update it made (and the bytes), what it was told of it, and which parameters it began a task with.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edge_client.data import ArraySource
from edge_client.store import Store
from edge_client.worker import Worker

FILE = "journal.jsonl"


def data() -> ArraySource:
    """The samples that ``FEDGE_JOURNAL_DATA`` names; from now on the process keeps a journal in ``FEDGE_JOURNAL``."""
    keep(Path(os.environ["FEDGE_JOURNAL"]))
    with np.load(os.environ["FEDGE_JOURNAL_DATA"]) as arrays:
        return ArraySource(dict(arrays))


@functools.cache
def keep(folder: Path, tell: Callable[[str], object] = lambda line: None) -> None:
    """From now on this process keeps a journal in ``folder``, and tells ``tell`` each line of it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).touch()
    _synchronise(folder)
    commit, settle, learn = Store.commit, Store.settle, Worker._learned

    def note(**facts: object) -> None:
        # One write of one line, appended: a kill leaves all of it or nothing. A power cut leaves what is synchronised.
        with open(folder / FILE, "ab", buffering=0) as file:
            file.write(json.dumps(facts).encode() + b"\n")
            os.fsync(file.fileno())
        tell(json.dumps(facts))

    def committed(self: Store, epoch: int, task: int, update: bytes, residual: bytes | None, **held: Any) -> None:
        digest = hashlib.sha256(update).hexdigest()
        temporary = folder / f"{digest}.new"
        with temporary.open("wb") as file:
            file.write(update)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / digest)
        _synchronise(folder)
        note(what="made", task=[epoch, task], sha256=digest)
        commit(self, epoch, task, update, residual, **held)

    def settled(self: Store, epoch: int, task: int, *, recorded: bool) -> None:
        note(what="told", task=[epoch, task], recorded=recorded)
        settle(self, epoch, task, recorded=recorded)

    def began(self: Worker, invitation: Any, model: Any, trainer: Any, stop: Any) -> Any:
        vector = model.parameters(trainer.bundle.initial())
        note(what="began", version=invitation.version, sha256=hashlib.sha256(vector.tobytes()).hexdigest())
        return learn(self, invitation, model, trainer, stop)

    Store.commit, Store.settle, Worker._learned = committed, settled, began  # type: ignore[method-assign]


def _synchronise(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
