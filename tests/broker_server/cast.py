"""A whole federation in one thread, without wire and clock: the server's worker and its clients', task after task."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from broker_server import events as e
from broker_server.config import Federation
from broker_server.records import Round, Task
from broker_server.training import train_plan
from broker_server.worker import Worker as Server
from edge_client.bundle import Bundle
from edge_client.data import ArraySource
from edge_client.events import Failed, Finished, Work
from edge_client.store import FileCopies, Store
from edge_client.trainer import Trainer
from edge_client.wire import messages as m
from edge_client.worker import Worker as Client

Arrays = Mapping[str, np.ndarray]


class Cast:
    """A server and clients with their data; each round is played by those whose names are given."""

    def __init__(self, folder: Path, bundle: bytes, data: Mapping[str, Arrays], **sections: dict[str, object]) -> None:
        base = {"federation": {"name": "toys", "bundle": "b", "state": str(folder / "server")}}
        self.settings = msgspec.convert(base | sections, Federation)
        self.folder, self.bytes, self.data = folder, bundle, data
        self.bundle = Bundle.from_bytes(bundle)
        self.trainer = Trainer(self.bundle)
        self.clients: dict[str, Client] = {}
        for name in data:
            self.restart_client(name)
        self.task = 0
        self.server = Server(self.settings, bundle)
        self.restored = self.server.start()

    def restart_client(self, name: str) -> None:
        """As after a power cut."""
        store = Store(self.folder / name, durable=False)
        digest = bytes.fromhex(self.bundle.digest)
        if store.held().bundle != digest:
            store.install(digest, b"bundle")
        source = ArraySource(dict(self.data[name]))
        self.clients[name] = Client(name, source, source, store, FileCopies(self.folder / name))

    def restart_server(self) -> None:
        self.server.close()
        self.server = Server(self.settings, self.bytes)
        self.restored = self.server.start()
        list(self.server.replay(self.restored))

    def open(self, names: Sequence[str]) -> None:
        self.task += 1
        self.version = self.server._publication.version
        task = Task(
            epoch=1, task=self.task, round=self.task, kind="train", version=self.version, cohort=tuple(names), plan=b"",
            opened=0.0,
        )  # fmt: skip
        self.server.perform(e.OpenTask(task))

    def train(self, name: str, **changes: object) -> Finished | Failed:
        """One client's part of the open task, up to its update."""
        held = self.clients[name].store.held().version
        delta = self.server._publication.delta(held, self.version) if held != self.version else None
        codec = self.settings.codec
        rate = m.UpdatePlan("none") if codec.kind == "none" else m.UpdatePlan("quantized", "nmse", codec.rate(name))
        plan = train_plan(self.settings, self.task, self.restored.run)
        invitation = m.Invitation(
            1, self.task, self.task, "train", plan, rate, 0, 60.0, held, self.version,
            self.server._publication.digest,
        )  # fmt: skip
        return self.clients[name].perform(
            Work(msgspec.structs.replace(invitation, **changes), delta), self.trainer, lambda: False
        )

    def record(self, name: str) -> None:
        """A client's part, to the receipt."""
        done = self.train(name)
        assert isinstance(done, Finished), done
        answer = self.server.perform(e.Record(1, self.task, name, done.update))
        assert isinstance(answer, e.Recorded), answer
        self.clients[name].store.settle(1, self.task, recorded=True)

    def close(self) -> bytes:
        """The open task is done: the digest of what it led to."""
        result = Round(
            round=self.task, version=self.task, clients=1, samples=1, seconds=0.0, bytes_up=0, bytes_down=0
        )  # fmt: skip
        answer = self.server.perform(e.Aggregate(((1, self.task),), result, frozenset(range(self.version + 1))))
        assert isinstance(answer, e.Aggregated)
        return answer.digest

    def round(self, names: Sequence[str]) -> bytes:
        self.open(names)
        for name in names:
            self.record(name)
        return self.close()

    @property
    def parameters(self) -> np.ndarray:
        """Of the newest version, ``[n] float32``."""
        return self.server._publication.parameters()
