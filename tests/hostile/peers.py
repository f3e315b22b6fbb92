"""Both sides of the protocol in the middle of a round, to be told anything; afterwards they must finish a round.

The real coordinator on a ledger of paper, and the real session of one client, with the drivers' answers beside them.
"""

import hashlib
import random

from broker_server import events as e
from broker_server.config import Federation
from edge_client import events as c
from edge_client.held import NO_HASH, Held, SessionSettings
from edge_client.session import ClientSession
from edge_client.wire import messages as m
from edge_client.wire import transfer
from tests.broker_server.desk import BUNDLE, NAME, TOPICS, Desk, digest, settings, told, update
from tests.hostile.mutate import is_message

HONEST = ("a", "b", "c")
ACTIONS, BYTES = 5000, 2_000_000
"""Most that one message may make a side do: a credit or a request names at most 4,096 chunks of 64 KiB at most."""
LARGE = update(10).ljust(6000)
"""An update in six chunks."""


def federation(mode: str) -> Federation:
    """Settings of either kind, small enough that every limit is met."""
    sizes = {"cohort": 2, "over_select": 1.5} if mode == "synchronous" else {"concurrency": 3, "buffer": 2}
    return settings(
        round={"mode": mode, "deadline": 60.0, **sizes},
        transfer={"window": 2, "uploads": 1, "chunk": 1024},
        stop={"rounds": 1000},
    )


class Table:
    """A server in the middle of a round: ``a`` sends its update in chunks, others train or wait."""

    def __init__(self, mode: str = "synchronous") -> None:
        self.desk = Desk(federation(mode))
        self.desk.paper.delta_bytes = 3000
        self.desk.hello(*HONEST)
        self.task = {client: self.invited(client) for client in HONEST}
        self.blob = transfer.refer(LARGE, chunk=1024, inline=0)
        self.desk.say("a", m.Upload(*self.task["a"], self.blob))

    def invited(self, client: str) -> tuple[int, int]:
        """The task that a client was asked for last."""
        said = told(self.desk.actions, client, m.Invitation)
        return (said[-1].epoch, said[-1].task) if said else (1, 1)  # type: ignore[attr-defined]

    def topics(self) -> list[str]:
        """Everything that it listens to, and what is not for it."""
        chunks = [TOPICS.uploaded("a", self.blob.sha256, index) for index in (0, 1, 5, 6, 999_999_999)]
        others = [TOPICS.uploaded("x", self.blob.sha256, 0), TOPICS.uploaded("a", bytes(32), 0)]
        odd = ["", "fedge", f"fedge/{NAME}/up/x", f"fedge/{NAME}/up/../msg", "fedge/else/up/a/msg", TOPICS.down("a")]
        return [TOPICS.offer, *map(TOPICS.up, ("a", "b", "x")), *chunks, *others, *odd]

    def messages(self) -> dict[type, list[bytes]]:
        """Of every kind, what would be right now or close to it."""
        identity, other = self.task["a"], self.task["b"]
        restored, plan = self.desk.restored, (m.TrainPlan(), m.UpdatePlan())
        hello = (b"boot0000", BUNDLE.sha256, 0, digest(0), 10, True)
        small = transfer.refer(update(7), chunk=1024)
        invitation = m.Invitation(*identity, 1, "train", *plan, 1, 60.0, 0, 0, digest(0), self.blob, (1, 1))
        found: list[m.Message] = [
            *(m.Hello(restored.epoch, *hello), m.Goodbye(b"boot0000")),
            *(m.Upload(*identity, self.blob), m.Upload(*other, small), m.Upload(*identity, small, m.Traffic(1, 2))),
            *(m.Decline(*other, "no"), m.Missing(BUNDLE.sha256, (0, 1)), m.Credit(self.blob.sha256, (0, 1))),
            *(m.Offer(NAME, restored.epoch, BUNDLE, 1.0), invitation, m.Receipt(*identity, "late")),
            m.Release(b"", bytes(64)),
        ]
        return sorted_out(found)

    def hear(self, topic: str, payload: bytes) -> None:
        """Take a message as it comes."""
        coordinator = self.desk.coordinator
        before = coordinator.dropped
        actions = self.desk.feed(e.Received(topic, payload))
        bounded(actions)
        # What is empty clears what somebody had retained there.
        if payload and topic in (TOPICS.offer, TOPICS.up("a"), TOPICS.up("x")) and not is_message(payload):
            assert coordinator.dropped == before + 1

    def finish(self) -> None:
        """Honest clients come back and do what they are asked: the next version is made."""
        desk, version = self.desk, self.desk.paper.version
        for attempt in range(40):
            desk.hello(*HONEST, boot=b"boot%04d" % attempt)
            for client in HONEST:
                desk.upload(client, identity=self.invited(client))
            if desk.paper.version > version:
                return
            desk.wait(61.0)
        raise AssertionError(f"no version after {version}, in phase {desk.coordinator.phase}")


class Phone:
    """A client that downloads a delta for a task, or uploads what came of one."""

    def __init__(self, *, uploading: bool) -> None:
        known = Held(BUNDLE.sha256, 1, digest(1), samples=10)
        own = SessionSettings("a", NAME, window=2, blob_limit=100_000, keep=0, chunk=1024, inline=100)
        self.session = ClientSession(own, known, random.Random(3), b"bootboot")
        self.now, self.epoch, self.settled = 0.0, 1, {}
        self.said: list[m.Message] = []
        self.delta = random.Random(4).randbytes(5000)
        self.ref = transfer.refer(self.delta, chunk=1024, inline=0)
        self.feed(c.Connected())
        self.tell(m.Offer(NAME, 1, BUNDLE, 0.0), TOPICS.offer)
        self.tell(self.invitation(1, None if uploading else self.ref))
        self.blob = self.session._outbox._update.ref if self.session._outbox._update is not None else self.ref

    def invitation(self, task: int, delta: m.BlobRef | None) -> m.Invitation:
        """As the server would write it."""
        held, version = (1, 2) if delta is not None else (1, 1)
        plan = (m.TrainPlan(), m.UpdatePlan())
        return m.Invitation(self.epoch, task, 1, "train", *plan, 1, 60.0, held, version, digest(version), delta)

    def topics(self) -> list[str]:
        """Everything that it listens to, and what it never subscribed to."""
        chunks = [TOPICS.published(self.ref.sha256, index) for index in (0, 1, 4, 5, 999_999_999)]
        odd = ["", f"fedge/{NAME}/pub", "fedge/else/pub/offer", TOPICS.down("b"), TOPICS.published(bytes(32), 0)]
        return [TOPICS.offer, TOPICS.down("a"), *chunks, *odd]

    def messages(self) -> dict[type, list[bytes]]:
        """Of every kind, what would be right now or close to it."""
        hello = (b"boot0000", BUNDLE.sha256, 0, digest(0), 10, True)
        other = transfer.refer(b"another bundle".ljust(5000), chunk=1024, inline=0)
        void = m.Invitation(1, 2, 1, "evaluate", m.TrainPlan(), m.UpdatePlan(), 1, 60.0, 1, 1, digest(1), None, (1, 1))
        found: list[m.Message] = [
            *(
                m.Offer(NAME, 1, BUNDLE, 0.0),
                m.Offer(NAME, 2, other, 1.0),
                m.Offer(NAME, 1, BUNDLE, 0.0, finished=True),
            ),
            *(self.invitation(1, self.ref), self.invitation(2, None), void),
            *(m.Credit(self.blob.sha256, (0, 1, 2)), m.Receipt(1, 1, "recorded"), m.Receipt(1, 1, "refused", "why")),
            m.Release(b"", bytes(64)),
            *(m.Hello(1, *hello), m.Goodbye(b"boot0000"), m.Upload(1, 1, self.blob), m.Decline(1, 1, "no")),
            m.Missing(BUNDLE.sha256, (0, 1)),
        ]
        return sorted_out(found)

    def hear(self, topic: str, payload: bytes) -> None:
        """Take a message as it comes."""
        before = self.session.dropped
        self.feed(c.Received(topic, payload))
        if topic in (TOPICS.offer, TOPICS.down("a")) and not is_message(payload):
            assert self.session.dropped == before + 1

    def tell(self, message: m.Message, topic: str = TOPICS.down("a")) -> None:
        """Say something proper."""
        self.feed(c.Received(topic, m.encode(message)))

    def feed(self, event: c.Event) -> None:
        """Everything that follows from an event, the driver's answers included."""
        events = [event]
        while events:
            actions = self.session.handle(events.pop(0), self.now)
            bounded(actions)
            for action in actions:
                match action:
                    case c.Install(bundle, data):
                        assert hashlib.sha256(data).digest() == bundle
                        events.append(self.installed(bundle, data))
                    case c.Work(invitation, delta):
                        events.append(self.worked(invitation, delta))
                    case c.Settle(epoch, task, recorded):
                        self.settled[epoch, task] = recorded
                    case c.Publish(topic, payload) if topic == TOPICS.up("a"):
                        self.said.append(m.decode(payload))
        if self.session.wake is not None and self.session.wake <= self.now and not isinstance(event, c.Tick):
            self.feed(c.Tick())
        assert self.session.wake is None or self.session.wake > self.now, "a driver would spin"

    def installed(self, bundle: bytes, data: bytes) -> c.Event:
        """As a device does: only the federation's bundle can be opened."""
        return c.Installed(bundle, 10) if data == b"the bundle" else c.Rejected(bundle, "not a bundle")

    def worked(self, task: m.Invitation, delta: bytes | None) -> c.Event:
        """As a worker does: a model that is not the one named cannot be trained."""
        if task.digest == digest(task.version) and delta in (None, self.delta):
            return c.Finished(task.epoch, task.task, LARGE, task.version, task.digest)
        return c.Failed(task.epoch, task.task, "another digest", 0, NO_HASH)

    def finish(self) -> None:
        """An honest server goes on, above every epoch heard of: the client does a task and takes its receipt."""
        offer, upload = self.session._offer, self.session._outbox._update
        self.epoch = max(1, offer.epoch if offer else 1, upload.pending.epoch if upload else 1)
        self.feed(c.Disconnected())
        self.feed(c.Connected())
        self.tell(m.Offer(NAME, self.epoch, BUNDLE, 0.0), TOPICS.offer)
        number = 10**6
        for _ in range(10):
            upload = self.session._outbox._update
            if upload is not None:
                identity = upload.identity
                self.tell(m.Receipt(*identity, "recorded" if identity == (self.epoch, number) else "late"))
                if self.settled.get((self.epoch, number)):
                    assert self.session.idle
                    return
                continue
            if self.session.idle:
                number += 1
                plan = (m.TrainPlan(), m.UpdatePlan())
                self.tell(m.Invitation(self.epoch, number, 1, "train", *plan, 1, 60.0, 0, 0, digest(0)))
            self.now += 400.0
            self.feed(c.Tick())
        raise AssertionError(f"no task is done: {self.said[-5:]}")


def sorted_out(messages: list[m.Message]) -> dict[type, list[bytes]]:
    """Payloads by kind of message."""
    found: dict[type, list[bytes]] = {}
    for message in messages:
        found.setdefault(type(message), []).append(m.encode(message))
    return found


def bounded(actions: list[object]) -> None:
    """No message makes a side do much more than it says itself."""
    assert len(actions) <= ACTIONS
    published = sum(len(one.payload) for one in actions if isinstance(one, c.Publish | e.Retain))
    assert published <= BYTES
