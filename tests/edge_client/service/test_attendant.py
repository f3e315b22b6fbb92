"""A device that is looked after: it hears whether it may train and on how much, and pauses in between."""

import asyncio
import contextlib

import numpy as np
import pytest

from edge_client.device import Device, Workshop
from edge_client.feeds.opening import Feeds
from edge_client.feeds.ring import Recorder
from edge_client.memory import MemoryLink
from edge_client.service.attendant import Attendant
from edge_client.service.board import Board, Readings
from edge_client.service.gate import Gate, Rules
from edge_client.service.notify import Notifier
from edge_client.service.wear import Wear
from edge_client.store import FileCopies, Store
from edge_client.wire import messages as m
from tests.edge_client.test_device import alive, federation
from tests.toy import toy_data

HOT, COOL = Readings(degrees=90.0), Readings(degrees=40.0)


@pytest.fixture
def workshop():
    made = Workshop()
    yield made
    made.close()


class Said(Notifier):
    def __init__(self):
        super().__init__({})
        self.states = []

    def tell(self, **state):
        self.states.append(state)


def attended(broker, folder, workshop, lines, spec):
    feeds = Feeds(spec, lines.append)
    device = Device(
        client="pi",
        federation="demo",
        connect=lambda will: MemoryLink(broker, will=will),
        store=Store(folder, durable=False),
        copies=FileCopies(folder),
        workshop=workshop,
        open_data=feeds.open,
        log=lines.append,
        seed=3,
    )
    gate = Gate(Rules(settle=0.0))
    return Attendant(device, feeds, gate, Board(folder / "none"), Said(), lines.append, 60.0, Wear())


@contextlib.asynccontextmanager
async def scene(tmp_path, workshop, lines, spec):
    async with federation() as (broker, server):
        server.offer()
        made = attended(broker, tmp_path / "state", workshop, lines, spec)
        async with alive(made.device):
            hello = await server.said(m.Hello)
            yield made, server, hello


async def training(made):
    async with asyncio.timeout(20):
        while not made.device.pulse.silent():  # noqa: ASYNC110
            await asyncio.sleep(0)


def test_recorded_samples_are_announced_and_trained_on(tmp_path, workshop):
    lines = []

    async def play():
        spec = f"ring:{tmp_path / 'ring'}"
        async with scene(tmp_path, workshop, lines, spec) as (made, server, hello):
            assert hello.samples == 0
            made.judge(COOL, 0.0)
            hello = await server.said(m.Hello)
            assert (hello.samples, hello.available) == (0, False)
            data = toy_data(20)
            with Recorder(tmp_path / "ring") as recorder:
                for x, y in zip(data["x"], data["y"], strict=True):
                    recorder.record({"x": x, "y": int(y)})
            made.feeds.refresh()
            made.judge(COOL, 1.0)
            hello = await server.said(m.Hello)
            assert (hello.samples, hello.available) == (20, True)
            server.invite(1)
            await server.said(m.Upload)
            assert made.notifier.states[-1]["STATUS"] == "may train, 20 samples, 40 degrees, 0.0 MiB written"

    asyncio.run(play())
    assert lines == ["pi: does not train: no samples yet", "pi: may train"]


def test_heat_pauses_a_task_and_it_goes_on_when_it_is_cool(tmp_path, workshop):
    lines = []

    async def play():
        np.savez(tmp_path / "data.npz", **toy_data(40))
        async with scene(tmp_path, workshop, lines, str(tmp_path / "data.npz")) as (made, server, hello):
            assert hello.available
            server.invite(1, plan=m.TrainPlan(epochs=10_000, batch_size=8))
            await training(made)
            made.judge(HOT, 0.0)
            assert not (await server.said(m.Hello)).available
            assert made.alive()
            made.judge(COOL, 1.0)
            assert (await server.said(m.Hello)).available

    asyncio.run(play())
    assert lines == ["pi: does not train: 90 degrees (at most 75)", "pi: may train"]


def test_what_changes_little_is_not_said_again(tmp_path, workshop):
    lines = []

    async def play():
        np.savez(tmp_path / "data.npz", **toy_data(40))
        async with scene(tmp_path, workshop, lines, str(tmp_path / "data.npz")) as (made, _, _):
            said = []
            made.device.available = lambda *state: said.append(state)
            for degrees in (90.0, 89.0, 91.0, 60.0, 61.0):
                made.judge(Readings(degrees=degrees), degrees)
            assert said == [(False, None), (True, None)]

    asyncio.run(play())
    assert len(lines) == 2


def test_a_worker_that_takes_no_step_is_left_to_the_watchdog(tmp_path, workshop):
    lines = []

    async def play():
        np.savez(tmp_path / "data.npz", **toy_data(40))
        async with scene(tmp_path, workshop, lines, str(tmp_path / "data.npz")) as (made, _, _):
            with made.device.pulse.busy():
                assert made.alive()
                made.device.pulse._last -= 100
                assert not made.alive()
                assert not made.alive()
            assert made.alive()

    asyncio.run(play())
    assert len(lines) == 1
    assert "no training step for 100 s" in lines[0]


def test_a_paused_client_ends_at_once(tmp_path, workshop):
    lines = []

    async def play():
        np.savez(tmp_path / "data.npz", **toy_data(40))
        async with scene(tmp_path, workshop, lines, str(tmp_path / "data.npz")) as (made, server, _):
            async with made.attending():
                server.invite(1, plan=m.TrainPlan(epochs=10_000, batch_size=8))
                await training(made)
                made.judge(HOT, 0.0)
                async with asyncio.timeout(10):
                    await made.device.close()
            assert "READY" in made.notifier.states[0]
            assert made.notifier.states[-1] == {"STOPPING": 1}

    asyncio.run(play())


def test_an_error_that_no_one_expected_ends_the_client(tmp_path, workshop):
    """Rather than leave it with rules that nobody looks at."""

    async def play():
        np.savez(tmp_path / "data.npz", **toy_data(40))
        async with federation() as (broker, server):
            server.offer()
            made = attended(broker, tmp_path / "state", workshop, [], str(tmp_path / "data.npz"))

            def broken():
                raise RuntimeError("out of order")

            made.board.read = broken
            async with made.attending(), asyncio.timeout(20):
                with pytest.raises(RuntimeError, match="out of order"):
                    await made.device.run()

    asyncio.run(play())


def test_the_server_hears_how_the_device_is_with_each_hello(tmp_path, workshop):
    lines = []

    async def play():
        np.savez(tmp_path / "data.npz", **toy_data(40))
        async with scene(tmp_path, workshop, lines, str(tmp_path / "data.npz")) as (made, server, hello):
            assert hello.condition.disk > 0
            assert hello.condition.platform == ""  # nobody could update it
            made.wear.wrote(10_000)
            made.judge(Readings(degrees=90.0, free=10 << 20), 0.0)
            found = (await server.said(m.Hello)).condition
            assert (found.degrees, found.memory) == (90.0, 10 << 20)
            assert found.written >= 12_288
            assert found.rests == "90 degrees (at most 75), 10 MiB of memory free (at least 48)"
            made.judge(COOL, 1.0)
            assert (await server.said(m.Hello)).condition.rests == ""

    asyncio.run(play())


class Updating:
    """As much of an updater as is looked at here."""

    able, platform, progress = True, "cp311-aarch64", None

    def __init__(self):
        self.joined = []

    def look(self, *, joined):
        self.joined.append(joined)

    def tick(self, now):
        return ()

    def connected(self, now):
        return ()

    def message(self, topic, payload, now):
        return ()


def test_how_far_a_release_is_is_said_at_once_and_only_where_it_is_news(tmp_path, workshop):
    lines = []

    async def play():
        np.savez(tmp_path / "data.npz", **toy_data(40))
        async with scene(tmp_path, workshop, lines, str(tmp_path / "data.npz")) as (made, server, _):
            made.device.updater = updating = Updating()
            made.judge(HOT, 0.0)
            assert (await server.said(m.Hello)).condition.platform == "cp311-aarch64"
            updating.progress = m.Progress("0.2.0", "staged")
            made._follow()
            hello = await server.said(m.Hello)
            assert (hello.condition.progress, hello.available) == (updating.progress, False)
            said = []
            made.device.available = lambda *state: said.append(state)
            made._follow()
            assert said == []
            assert updating.joined == [True, True]

    asyncio.run(play())
