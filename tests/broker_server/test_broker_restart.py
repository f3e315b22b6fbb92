"""mosquitto killed with SIGKILL in the middle of transfers of megabytes: they go on where they were.

A real server and a real device on real sockets, in this process, so that the broker dies at a chunk and not at a time:
once while the bundle is on its way down, once while an update is on its way up, once while a delta is.
"""

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from broker_server.config import Federation
from broker_server.ledger import Ledger
from broker_server.server import Server
from edge_client.address import Address
from edge_client.data import ArraySource
from edge_client.device import Device, Workshop
from edge_client.store import FileCopies, Store
from edge_client.transport import Handler, MqttLink
from edge_client.wire.topics import Topics
from tests.mosquitto import Mosquitto, needs_mosquitto
from tests.toy import toy_bundle, toy_data

FEATURES, HIDDEN = 250, 4000
BUNDLE = toy_bundle(features=FEATURES, hidden=HIDDEN)
CHUNK, WINDOW = 65_536, 16
TOPICS = Topics("restart")


class Line(MqttLink):
    """The device's link: each chunk that crosses it is counted, by what it is a part of."""

    def __init__(self, address: Address, will: tuple[str, bytes], crossed: Callable[[str], None]) -> None:
        super().__init__(address, "restart-pi", will, slowest=0.3)
        self._crossed = crossed

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        super().publish(topic, payload, retain=retain)
        if TOPICS.parse_up(topic)[1] is not None:
            self._crossed("update")

    async def run(self, handler: Handler) -> None:
        crossed = self._crossed

        class Counting:
            connected, disconnected = handler.connected, handler.disconnected

            def message(self, topic: str, payload: bytes) -> None:
                handler.message(topic, payload)
                if "/pub/" in topic and (chunk := TOPICS.parse_pub(topic)) is not None:
                    crossed("bundle" if chunk.sha256 == hashlib.sha256(BUNDLE).digest() else "delta")

        await super().run(Counting())


class Site:
    """Two rounds of one device; the broker dies in the middle of the transfers that are named."""

    def __init__(self, folder: Path, *, kills: tuple[str, ...], persistence: bool) -> None:
        self.folder, self.left, self.persistence = folder, list(kills), persistence
        # It saves what it holds now and then: what it knows after a kill is old.
        self.broker = Mosquitto(folder / "broker", changes=20)
        self.chunks: Counter[str] = Counter()
        self.lines: list[str] = []
        (folder / "toy.fedge").write_bytes(BUNDLE)
        sections = {
            "federation": {"name": "restart", "bundle": str(folder / "toy.fedge"), "state": str(folder / "state")},
            "broker": {"url": self.broker.url},
            "round": {"cohort": 1, "minimum": 1, "deadline": 120.0},
            "codec": {"kind": "none"},
            "transfer": {"chunk": CHUNK, "window": WINDOW, "spread": 0.0},
            "evaluation": {"every": 0},
            "stop": {"rounds": 2},
        }
        self.settings = msgspec.convert(sections, Federation)

    def crossed(self, what: str) -> None:
        """One chunk has; some of them are the broker's last."""
        self.chunks[what] += 1
        if self.left and what == self.left[0] and self.chunks[what] == len(BUNDLE) // CHUNK // 2:
            self.left.pop(0)
            self.broker.kill()
            restart = lambda: self.broker.start(persistence=self.persistence)  # noqa: E731
            asyncio.get_running_loop().call_later(0.3, restart)

    async def run(self) -> None:
        """Both rounds."""
        self.broker.start(persistence=self.persistence)
        address = Address.parse(self.broker.url)
        source = ArraySource(toy_data(20, seed=1, features=FEATURES))
        workshop = Workshop()
        device = Device(
            client="pi",
            federation="restart",
            connect=lambda will: Line(address, will, self.crossed),
            store=Store(self.folder / "pi", durable=False),
            copies=FileCopies(self.folder / "pi"),
            workshop=workshop,
            open_data=lambda manifest: (source, source),
            log=self.lines.append,
            seed=3,
        )
        life = asyncio.ensure_future(device.run())
        try:
            await Server(self.settings, self.lines.append, MqttLink(address, "restart-server", slowest=0.3)).run()
        finally:
            await device.close()
            await asyncio.gather(life, return_exceptions=True)
            workshop.close()
            self.broker.kill()

    def versions(self) -> list[tuple[int, int, bytes]]:
        """What was recorded for each task, and the bytes of what was made of it."""
        with Ledger.read(self.folder / "state" / "ledger.db") as ledger:
            results, latest = ledger.rounds(), ledger.latest()
        assert latest is not None
        return [(one.clients, one.samples, latest.state) for one in results]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The same rounds on a broker that lives."""
    site = Site(tmp_path_factory.mktemp("undisturbed"), kills=(), persistence=False)
    asyncio.run(asyncio.wait_for(site.run(), 60))
    return site


@needs_mosquitto
@pytest.mark.parametrize("persistence", [False, True], ids=["without persistence", "with persistence"])
def test_a_broker_that_is_killed_in_the_middle_of_transfers_costs_some_chunks_and_no_more(
    tmp_path, undisturbed, persistence
):
    site = Site(tmp_path, kills=("bundle", "update", "delta"), persistence=persistence)
    asyncio.run(asyncio.wait_for(site.run(), 120))
    print(dict(undisturbed.chunks), dict(site.chunks))
    assert site.left == [], site.lines
    assert sum("trying again" in line for line in site.lines) >= 6  # both ends, each time
    assert site.versions() == undisturbed.versions()
    assert [(clients, samples) for clients, samples, _ in site.versions()] == [(1, 20)] * 2
    for what, count in undisturbed.chunks.items():
        # Two updates went up. What was under way when the broker died is sent again, and no more.
        assert count >= len(BUNDLE) // CHUNK * (1 + (what == "update"))
        assert site.chunks[what] <= count + 2 * WINDOW, what
