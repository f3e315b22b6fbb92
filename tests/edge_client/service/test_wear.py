"""What is written is counted in blocks, and bounded: a round writes its update, its residual and the model, once."""

import asyncio
import itertools

from edge_client.service.wear import Wear
from edge_client.shelf import Shelf
from edge_client.store import FileCopies, Store
from edge_client.wire import messages as m
from edge_client.wire.transfer import refer
from tests.edge_client.test_device import alive, device, federation


def test_blocks_are_counted_and_each_day_is_reported_once():
    now = [0.0]
    wear = Wear(lambda: now[0])
    wear.wrote(1)
    wear.wrote(4097)
    assert wear.total == 3 * 4096
    assert wear.day() is None
    now[0] = 86_400.0
    assert wear.day() == 3 * 4096
    assert wear.day() is None
    wear.wrote(10)
    now[0] = 2 * 86_400.0
    assert wear.day() == 4096
    assert str(wear) == "0.0 MiB written"


def test_the_store_tells_what_it_writes(tmp_path):
    written = []
    store = Store(tmp_path, durable=False, wrote=written.append)
    store.install(bytes([1] * 32), b"bundle")
    store.commit(1, 1, b"update" * 1000, b"residual", version=1, digest=bytes([2] * 32))
    store.keep(refer(bytes(3000), chunk=1024), 0, bytes(1024))
    on_disk = sum(path.stat().st_size for path in tmp_path.iterdir() if path.name != "index.msgpack")
    assert on_disk <= sum(written) < on_disk + 1000
    assert 6000 in written


def test_a_round_of_the_toy_writes_few_blocks(tmp_path, monkeypatch):
    """Index, update, residual and index again: a block each; nothing is written while a client waits."""
    wear, lines = Wear(), []
    folder = tmp_path / "state"

    async def play():
        from edge_client.device import Workshop

        workshop = Workshop()
        async with federation() as (broker, server):
            server.offer()
            made = device(broker, folder, workshop, lines)
            made.store = Store(folder, durable=False, wrote=wear.wrote)
            made.copies = FileCopies(folder, wrote=wear.wrote)
            made.shelf = Shelf(tmp_path / "model", pause=3600.0, durable=False, wrote=wear.wrote)
            async with alive(made):
                await server.said(m.Hello)
                counts = []
                for task in range(1, 5):
                    server.invite(task)
                    await server.said(m.Upload)
                    server.tell(m.Receipt(1, task, "recorded"))
                    counts.append(wear.total)
        workshop.close()
        return counts

    counts = asyncio.run(play())
    rounds = [after - before for before, after in itertools.pairwise(counts[1:])]
    assert max(rounds) <= 6 * 4096


def test_a_days_rate_is_that_of_the_last_day_and_before_it_is_over_what_was_written_so_far():
    now = [0.0]
    wear = Wear(lambda: now[0])
    wear.wrote(1)
    assert wear.rate() == 4096
    now[0] = 90_000.0
    assert wear.day() == 4096
    wear.wrote(100_000)
    assert wear.rate() == 4096
