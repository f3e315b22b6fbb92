"""A man at the broker: he reads everything, and changes, repeats, redirects, forges and withholds what he likes."""

import random
from contextlib import suppress
from dataclasses import dataclass, field

from edge_client.errors import WireError
from edge_client.wire import messages as m
from edge_client.wire.transfer import refer
from tests.faults.broker import SimBroker


@dataclass
class TamperingBroker(SimBroker):
    """A broker that tampers with a ``share`` of the messages ``until`` a moment of virtual time."""

    share: float = 0.0
    until: float = 0.0
    _dice: random.Random = field(init=False)
    _seen: list[tuple[str, bytes]] = field(init=False, default_factory=list)
    _tasks: dict[str, tuple[int, int]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._dice = random.Random(f"{self.world.seed}/tampering")

    def route(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Hand a message on, or something else."""
        if self.share:
            self._note(topic, payload)
        if self.share and self.world.now < self.until and self._dice.random() < self.share:
            self._tamper(topic, payload, retain)
        else:
            super().route(topic, payload, retain=retain)

    def _tamper(self, topic: str, payload: bytes, retain: bool) -> None:
        dice = self._dice
        kind = dice.choice(["withhold", "change", "change", "repeat", "redirect", "forge", "forge"])
        self.world.strike(f"tampering: {kind}", "broker", topic.split("/", 2)[-1][:30])
        match kind:
            case "withhold" if not retain:
                pass
            case "change" if payload:
                at = dice.randrange(len(payload))
                changed = payload[:at] + bytes([payload[at] ^ 1 << dice.randrange(8)]) + payload[at + 1 :]
                super().route(topic, changed, retain=retain)
            case "repeat" if self._seen:
                super().route(topic, payload, retain=retain)
                for old in dice.sample(self._seen, min(3, len(self._seen))):
                    super().route(*old)
            case "redirect" if self._seen:
                super().route(topic, payload, retain=retain)
                other = dice.choice(self._seen)[0]
                if other.endswith("/msg") and topic.endswith("/msg"):
                    super().route(other, payload)
            case "forge":
                super().route(topic, payload, retain=retain)
                self._forge(topic)
            case _:
                super().route(topic, payload, retain=retain)

    def _forge(self, topic: str) -> None:
        """Say something that nobody has signed, in the name of either side."""
        dice, parts = self._dice, topic.split("/")
        federation, way = parts[1], parts[2]
        if way == "pub":
            ref = refer(b"a bundle that does harm", chunk=1024)
            offer = m.Offer(federation, 2**40, ref, 0.0)
            super().route(f"fedge/{federation}/pub/offer", m.encode(offer), retain=True)
            return
        client = parts[3]
        epoch, task = self._tasks.get(client, (1, 1))
        down: list[m.Message] = [
            m.Receipt(epoch, task, dice.choice(["recorded", "recorded", "late", "void", "refused"])),
            m.Offer(federation, epoch + 1, refer(b"harm", chunk=1024), 0.0, finished=True),
        ]
        up: list[m.Message] = [
            m.Goodbye(dice.randbytes(8)),
            m.Decline(epoch, task, "it is told to"),
            m.Hello(epoch, dice.randbytes(8), bytes(32), 3, dice.randbytes(32), 10**6, True),
            m.Upload(epoch, task, refer(dice.randbytes(50), chunk=1024)),
        ]
        message = dice.choice(down if way == "down" else up)
        super().route(f"fedge/{federation}/{way}/{client}/msg", m.encode(message))

    def _note(self, topic: str, payload: bytes) -> None:
        """Which task a client is at: he reads it, so what he forges is to the point."""
        self._seen.append((topic, payload))
        del self._seen[:-2000]
        if "/down/" in topic and topic.endswith("/msg"):
            with suppress(WireError):
                message = m.decode(payload)
                if isinstance(message, m.Invitation):
                    self._tasks[topic.split("/")[3]] = message.epoch, message.task
