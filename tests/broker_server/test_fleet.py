"""The care for a fleet: who is told of a release again."""

import asyncio
import hashlib
import threading

from broker_server import events as e
from broker_server.fleet import FleetCare
from broker_server.inventory import Inventory
from broker_server.rollout import Rollout, Seat
from edge_client.trust.release import File, Record, seal
from edge_client.wire import messages as m

NOW = 1_800_000_000.0
WHEEL = File("fedge-0.2.0-py3-none-any.whl", m.BlobRef(hashlib.sha256(b"wheel").digest(), 5, 1024))
ROLLOUT = Rollout(
    "0.2.0",
    seal(Record(1, "toys", "0.2.0", NOW, NOW + 1e6, (WHEEL,)), lambda _: bytes(64)),
    ("100%",),
    0.1,
    1800.0,
)


def hello(software="0.1.0", progress=None):
    condition = m.Condition(platform="cp311-aarch64", progress=progress)
    return m.Hello(1, bytes(8), bytes(32), 0, bytes(32), 1, True, m.Traffic(), software, 0.0, condition)


def test_a_step_of_a_rollout_that_is_on_the_disk_was_told_although_the_server_ended_meanwhile(tmp_path):
    async def play():
        lines, said = [], []
        with Inventory.open(tmp_path) as inventory:
            number = inventory.begin(ROLLOUT, NOW)
            inventory.keep(number, ROLLOUT, {"pi": Seat(0, "taken", NOW, "trial")})
        care = FleetCare(tmp_path, lines.append, lambda: NOW, watch=0.001)
        await care.start(said.append, 65536)
        kept, going_on = threading.Event(), threading.Event()
        keep = care._inventory.keep

        def slowly(*given):
            kept.set()
            going_on.wait(20)
            keep(*given)

        care._inventory.keep = slowly
        care.seen("pi", hello("0.2.0", m.Progress("0.2.0", "healthy", "", ROLLOUT.name)))
        running = asyncio.ensure_future(care.run())
        await asyncio.to_thread(kept.wait, 20)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        going_on.set()
        before = len(said)
        await care.close()
        with Inventory.open(tmp_path) as inventory:
            assert inventory.latest()[1].state == "done"
        assert lines == ["release 0.2.0: pi runs it", "release 0.2.0: done"]
        assert len(said) == before

    asyncio.run(play())


def test_a_device_that_was_started_anew_while_it_fetched_is_told_of_the_release_again(tmp_path):
    async def play():
        said = []
        with Inventory.open(tmp_path) as inventory:
            number = inventory.begin(ROLLOUT, NOW)
            inventory.keep(number, ROLLOUT, {"pi": Seat(0, "taken", NOW, "fetching")})
        care = FleetCare(tmp_path, said.append, lambda: NOW)
        await care.start(said.append, 65536)
        try:
            told = e.Say("pi", ROLLOUT.release)
            for quiet in (
                hello(progress=m.Progress("0.2.0", "fetching", "", ROLLOUT.name)),
                hello("0.2.0", m.Progress("0.2.0", "trial", "", ROLLOUT.name)),
                hello("0.2.0"),
            ):
                care.seen("pi", quiet)
                assert told not in said
            care.seen("pi", hello())
            assert said[-1] == told
        finally:
            await care.close()

    asyncio.run(play())
