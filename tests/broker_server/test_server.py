"""The server's driver with real devices, ledger, trainer and codec, over a broker in memory."""

import asyncio
import dataclasses
import functools
import socket
import sqlite3
from contextlib import closing
from pathlib import Path

import msgspec
import numpy as np
import pytest

from broker_server.config import Federation
from broker_server.connection import broker, server_link
from broker_server.evaluation import HeldOut
from broker_server.ledger import Ledger
from broker_server.records import Round
from broker_server.server import Outcome, Server, check_names
from broker_server.worker import Worker
from edge_client.address import Address
from edge_client.bundle import Bundle
from edge_client.data import ArraySource
from edge_client.device import Device, Workshop
from edge_client.errors import BundleError, ConfigError, LedgerError, TransportError
from edge_client.memory import MemoryBroker, MemoryLink
from edge_client.store import FileCopies, Store
from edge_client.wire import messages as m
from edge_client.wire.messages import BlobRef
from edge_client.wire.topics import Topics
from tests.toy import toy_bundle, toy_data

TOPICS = Topics("toys")


def settings(folder: Path, **sections: dict[str, object]) -> Federation:
    (folder / "toy.fedge").write_bytes(toy_bundle(hidden=8))
    np.savez(folder / "test.npz", **toy_data(200, seed=99))
    identity = {"name": "toys", "bundle": str(folder / "toy.fedge"), "state": str(folder / "state"), "seed": 3}
    base: dict[str, object] = {
        "federation": identity,
        "round": {"cohort": 3, "deadline": 30.0},
        "train": {"epochs": 2, "batch_size": 16},
        "codec": {"target": "step", "value": 2.0},
        "transfer": {"spread": 0.0},
        "evaluation": {"data": str(folder / "test.npz")},
        "stop": {"rounds": 3},
    }
    return msgspec.convert(base | sections, Federation)


def device(folder: Path, name: str, hub: MemoryBroker, workshop: Workshop, uplink: float = 0.0) -> Device:
    number = int(name.removeprefix("c"))
    source = ArraySource(toy_data(30 + 10 * number, seed=number))
    return Device(
        client=name,
        federation="toys",
        connect=lambda will: MemoryLink(hub, will=will),
        store=Store(folder / name, durable=False),
        copies=FileCopies(folder / name),
        workshop=workshop,
        open_data=lambda manifest: (source, source),
        log=lambda line: None,
        seed=number,
        uplink=uplink,
    )


class Hall:
    """Devices around one broker, and servers that come and go."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.hub, self.workshop = folder, MemoryBroker(), Workshop(1)
        self.devices: list[Device] = []
        self.lives: list[asyncio.Future[None]] = []
        self.lines: list[str] = []

    async def __aenter__(self) -> "Hall":
        return self

    async def __aexit__(self, *exception: object) -> None:
        await asyncio.gather(*(one.close() for one in self.devices))
        await asyncio.gather(*self.lives)
        self.workshop.close()

    def join(self, *names: str, **more: object) -> None:
        for name in names:
            self.devices.append(device(self.folder / "devices", name, self.hub, self.workshop, **more))  # type: ignore[arg-type]
            self.lives.append(asyncio.ensure_future(self.devices[-1].run()))

    def server(self, config: Federation, **more: object) -> Server:
        return Server(config, self.lines.append, MemoryLink(self.hub), **more)  # type: ignore[arg-type]


def together(test):
    """Run an async test to its end, or fail after a minute."""

    @functools.wraps(test)
    def run(*arguments, **named):
        asyncio.run(asyncio.wait_for(test(*arguments, **named), 60))

    return run


def counted(config: Federation) -> dict[int, list[str]]:
    """For each round, the clients whose updates are in the ledger."""
    with Ledger.read(Path(config.federation.state) / "ledger.db") as ledger:
        last = int(ledger.get("epoch") or 0)
        return {
            number: sorted(ledger.recorded(epoch, number))
            for epoch in range(last - 8, last + 1)
            for number in range(1, 50)
            if ledger.recorded(epoch, number)
        }


@together
async def test_a_federation_from_start_to_end(tmp_path):
    config, seen = settings(tmp_path, stop={"rounds": 6}), []
    async with Hall(tmp_path) as hall:
        hall.join("c1", "c2", "c3")
        outcome = await hall.server(config, on_round=seen.append).run()
        await asyncio.gather(*(one.done.wait() for one in hall.devices))
    assert isinstance(outcome, Outcome)
    assert outcome.reason == "6 rounds are done"
    assert [result.round for result in seen] == list(range(1, 7))
    assert all(result.clients == 3 and result.samples == 40 + 50 + 60 for result in seen)
    assert seen[-1].metrics["accuracy"] > max(0.6, seen[0].metrics["accuracy"])
    assert seen[-1].metrics["train_loss"] < seen[0].metrics["train_loss"]
    assert all(result.bytes_up and result.bytes_down for result in seen[1:])
    assert counted(config) == {number: ["c1", "c2", "c3"] for number in range(1, 7)}
    for folder in ("best", "last"):
        assert (tmp_path / "state" / "models" / folder / "infer.onnx").is_file()
    assert hall.hub.matching("fedge/toys/pub/#") == [(TOPICS.offer, hall.hub.retained(TOPICS.offer))]


@together
async def test_everything_in_chunks(tmp_path):
    config = settings(tmp_path, transfer={"spread": 0.0, "inline": 0, "chunk": 1024, "window": 1, "uploads": 1})
    async with Hall(tmp_path) as hall:
        hall.join("c1", "c2", "c3")
        await hall.server(config).run()
        assert [topic for topic, _ in hall.hub.matching("fedge/toys/pub/#")] == [TOPICS.offer]
    assert len(counted(config)) == 3


@together
async def test_what_earlier_runs_left_on_the_broker_is_cleared_and_forgotten(tmp_path):
    config = settings(tmp_path, transfer={"spread": 0.0, "inline": 0, "chunk": 1024}, stop={"rounds": 3})
    async with Hall(tmp_path) as hall:
        left = TOPICS.published(bytes(32), 0)
        hall.join("c1", "c2", "c3")
        first = hall.server(config, on_start=lambda _: first.stop("at once"))
        await first.run()
        with Ledger.open(
            tmp_path / "state" / "ledger.db", federation="toys", bundle=Bundle.open(tmp_path / "toy.fedge").digest
        ) as ledger:
            ledger.retain([left])
        await hall.server(config).run()
    with Ledger.read(tmp_path / "state" / "ledger.db") as ledger:
        assert len(ledger.rounds()) == 3
        assert left not in ledger.retained()
        assert ledger.retained()  # the bundle's chunks are noted after the old ones are forgotten


@together
async def test_a_crash_before_the_evaluation_is_mended_by_the_next_start(tmp_path, monkeypatch):
    config, seen = settings(tmp_path, stop={"rounds": 2}), []

    def dies(*arguments: object, **named: object) -> None:
        raise ZeroDivisionError

    async with Hall(tmp_path) as hall:
        hall.join("c1", "c2", "c3")
        with monkeypatch.context() as patched:
            patched.setattr(HeldOut, "evaluate", dies)
            with pytest.raises(ZeroDivisionError):
                await hall.server(config).run()
        await hall.server(config, on_round=seen.append).run()
    assert [(done.round, "accuracy" in done.metrics) for done in seen] == [(1, True), (2, True)]
    assert list(counted(config).values()) == [["c1", "c2", "c3"]] * 2


@pytest.mark.parametrize("codec", ["quantized", "none"])
@together
async def test_a_stopped_server_goes_on_where_it_was(tmp_path, codec):
    config = settings(tmp_path, stop={"rounds": 4}, codec={"kind": codec})
    async with Hall(tmp_path) as hall:
        hall.join("c1", "c2", "c3")
        first = hall.server(config, on_round=lambda done: done.round == 2 and first.stop("enough for today"))
        assert (await first.run()).reason == "enough for today"
        seen: list[Round] = []
        assert (await hall.server(config, on_round=seen.append).run()).reason == "4 rounds are done"
    assert [result.round for result in seen] == [3, 4]
    with Ledger.read(tmp_path / "state" / "ledger.db") as ledger:
        assert [(done.round, done.clients) for done in ledger.rounds()] == [(n, 3) for n in range(1, 5)]
    assert list(counted(config).values()) == [["c1", "c2", "c3"]] * 4


@together
async def test_a_slow_link_and_a_client_of_its_own_rate_send_fewer_bytes(tmp_path):
    codec = {"target": "bits", "value": 6.0, "clients": {"c2": 3.0}, "upload_seconds": 2.0}
    config = settings(tmp_path, codec=codec, round={"cohort": 4, "deadline": 30.0}, stop={"rounds": 2})
    (tmp_path / "toy.fedge").write_bytes(toy_bundle(hidden=600))
    async with Hall(tmp_path) as hall:
        hall.join("c0", "c1", "c2")
        hall.join("c3", uplink=250.0)
        await hall.server(config).run()
    with closing(sqlite3.connect(tmp_path / "state" / "ledger.db")) as ledger:
        sizes = dict(ledger.execute("SELECT client, max(size) FROM updates GROUP BY client"))
    parameters = 600 * (4 + 1) + 3 * (600 + 1)
    assert max(sizes.values()) == max(sizes["c0"], sizes["c1"])
    assert sizes["c0"] == pytest.approx(parameters * 6 / 8, rel=0.1)
    assert sizes["c2"] == pytest.approx(parameters * 3 / 8, rel=0.1)
    assert 400 < sizes["c3"] <= 525


@together
async def test_over_a_cohort_of_uneven_clients_the_same_accuracy_takes_fewer_bytes(tmp_path):
    few, many = ("c0", "c1", "c2", "c3", "c4"), "c60"  # of 30 to 70 samples, and of 630

    async def run(target: str) -> tuple[dict[str, int], float]:
        folder = tmp_path / target
        folder.mkdir()
        codec, rounds = {"target": target}, {"cohort": 6, "deadline": 30.0}
        config = settings(folder, codec=codec, round=rounds, train={"batch_size": 16}, stop={"rounds": 6})
        (folder / "toy.fedge").write_bytes(toy_bundle(hidden=200))
        seen: list[Round] = []
        async with Hall(folder) as hall:
            hall.join(*few, many)
            await hall.server(config, on_round=seen.append).run()
        with closing(sqlite3.connect(folder / "state" / "ledger.db")) as ledger:
            # In the first round nothing is known of aggregates yet.
            sizes = dict(ledger.execute("SELECT client, sum(size) FROM updates WHERE task > 1 GROUP BY client"))
        return sizes, seen[-1].metrics["accuracy"]

    each, accuracy = await run("nmse")
    together_, as_accurate = await run("cohort")
    assert as_accurate > accuracy - 0.02
    assert sum(together_.values()) < 0.7 * sum(each.values())
    assert max(together_[client] for client in few) < 0.5 * together_[many]


@together
async def test_clients_evaluate(tmp_path):
    config = settings(tmp_path, evaluation={"clients": 3, "every": 1, "deadline": 20.0})
    seen = []
    async with Hall(tmp_path) as hall:
        hall.join("c1", "c2", "c3")
        await hall.server(config, on_round=seen.append).run()
    assert all(result.metrics["accuracy"] == result.metrics["client_accuracy"] for result in seen)
    assert seen[-1].metrics["client_accuracy"] > 0.4


@together
async def test_a_client_that_comes_late_is_brought_up_to_date(tmp_path):
    async with Hall(tmp_path) as hall:
        config = settings(tmp_path, round={"cohort": 4, "clients": 2, "minimum": 2}, stop={"rounds": 5})

        def joined(done):
            if done.round == 2:
                hall.join("c3", "c4")

        hall.join("c1", "c2")
        await hall.server(config, on_round=joined).run()
    rounds = list(counted(config).values())
    assert rounds[0] == ["c1", "c2"]
    assert rounds[-1] == ["c1", "c2", "c3", "c4"]


@together
async def test_rubbish_is_dropped_and_the_round_goes_on(tmp_path):
    config = settings(tmp_path)
    async with Hall(tmp_path) as hall:
        hall.join("c1", "c2")
        server, rogue = hall.server(config), MemoryLink(hall.hub)

        class Rogue:
            def connected(self) -> None:
                for topic in (TOPICS.up("c1"), TOPICS.up("x"), "fedge/toys/up/", TOPICS.down("c1"), TOPICS.offer):
                    rogue.publish(topic, b"\x93rubbish")
                rogue.publish(TOPICS.uploaded("c1", bytes(32), 3), bytes(2000))
                rogue.publish(TOPICS.up("c2"), m.encode(m.Receipt(1, 1, "recorded")))
                hall.join("c3")

            def disconnected(self, reason: str) -> None: ...

            def message(self, topic: str, payload: bytes) -> None: ...

        running = asyncio.ensure_future(server.run())
        other = asyncio.ensure_future(rogue.run(Rogue()))
        await running
        await rogue.close()
        await other
    assert list(counted(config).values()) == [["c1", "c2", "c3"]] * 3
    assert sum("dropped a message" in line for line in hall.lines) <= 1


@together
async def test_a_client_whose_training_diverges_is_refused(tmp_path):
    config = settings(tmp_path, round={"cohort": 2, "clients": 3, "minimum": 2, "deadline": 30.0})
    async with Hall(tmp_path) as hall:
        hall.join("c1", "c2")
        bad = device(tmp_path / "devices", "c9", hall.hub, hall.workshop)
        arrays = toy_data(30)
        source = ArraySource({"x": arrays["x"] * np.float32(1e37), "y": arrays["y"]})
        bad.open_data = lambda manifest: (source, source)
        hall.devices.append(bad)
        hall.lives.append(asyncio.ensure_future(bad.run()))
        await hall.server(config).run()
    assert list(counted(config).values()) == [["c1", "c2"]] * 3
    assert any("refused an update of c9" in line and "NaN" in line for line in hall.lines)


@together
async def test_a_connection_that_falls_comes_back(tmp_path):
    config = settings(tmp_path, stop={"rounds": 4})
    async with Hall(tmp_path) as hall:
        hall.join("c1", "c2", "c3")

        def dropped(done):
            loop = asyncio.get_running_loop()
            loop.call_soon((server if done.round == 1 else hall.devices[0]).link.drop)

        server = hall.server(config, on_round=dropped)
        outcome = await server.run()
    assert outcome.reason == "4 rounds are done"
    assert "dropped; trying again" in hall.lines


def _spoil(folder: Path) -> None:
    (folder / "state").mkdir()
    (folder / "state" / "ledger.db").write_bytes(b"x" * 999)


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (lambda folder: (folder / "toy.fedge").unlink(), BundleError, "make it with `fedge export`"),
        (lambda folder: (folder / "toy.fedge").write_bytes(b"PK rubbish"), BundleError, "bundle"),
        (lambda folder: (folder / "test.npz").unlink(), Exception, "test.npz"),
        (_spoil, LedgerError, "ledger.db"),
    ],
    ids=["missing", "damaged", "data", "ledger"],
)
@together
async def test_what_cannot_be_used_ends_the_run_at_once(tmp_path, damage, error, words):
    config = settings(tmp_path)
    damage(tmp_path)
    async with Hall(tmp_path) as hall:
        with pytest.raises(error, match=words):
            await hall.server(config).run()
        assert hall.hub.retained(TOPICS.offer) is None


@together
async def test_a_failure_of_the_ledger_ends_the_run_with_its_message(tmp_path, monkeypatch):
    config = settings(tmp_path)

    def full(*arguments: object) -> None:
        raise LedgerError("disk full")

    monkeypatch.setattr(Ledger, "record", full)
    async with Hall(tmp_path) as hall:
        hall.join("c1", "c2", "c3")
        with pytest.raises(LedgerError, match="disk full"):
            await hall.server(config).run()


@together
async def test_an_error_of_a_callback_ends_the_run(tmp_path):
    def shows(done):
        raise ZeroDivisionError(done.round)

    async with Hall(tmp_path) as hall:
        hall.join("c1", "c2", "c3")
        with pytest.raises(ZeroDivisionError):
            await hall.server(settings(tmp_path), on_round=shows).run()


@together
async def test_an_unreachable_broker_is_named(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        port = taken.getsockname()[1]
        config = settings(tmp_path, broker={"url": f"mqtt://127.0.0.1:{port}"})
        lines = []
        with broker(config, lines.append) as (address, _):
            link = server_link(config, address, attempts=1)
            with pytest.raises(TransportError, match=f"127.0.0.1:{port} after 1 attempts"):
                await Server(config, lines.append, link).run()
    assert lines[0] == f"broker: mqtt://127.0.0.1:{port}"
    assert str(port) in lines[1] or "refused" in lines[1]


def test_the_password_comes_from_its_file(tmp_path):
    secret = tmp_path / "password"
    section = {"url": "mqtt://broker", "username": "server", "password_file": str(secret)}
    config = settings(tmp_path, broker=section)
    with pytest.raises(ConfigError, match="password_file"), broker(config, print, insecure=True):
        pass
    secret.write_text("s3cret\n")
    with broker(config, print, insecure=True) as (address, _):
        assert address == Address("broker", 1883, False, "server", "s3cret")
        assert "s3cret" not in str(address)


@together
async def test_a_hyperparameter_that_the_bundle_has_not_got_ends_the_run_at_once(tmp_path):
    config = settings(tmp_path, train={"hypers": {"learning_rate": 0.1}})
    async with Hall(tmp_path) as hall:
        with pytest.raises(ConfigError, match=r"train\.hypers\.learning_rate is not .*known there: .*lr"):
            await hall.server(config).run()
        assert not (tmp_path / "state" / "ledger.db").exists()


@together
async def test_chunks_are_cleared_after_an_outage_and_not_forgotten_during_it(tmp_path):
    config = settings(tmp_path, transfer={"spread": 0.0, "inline": 0, "chunk": 1024})
    async with Hall(tmp_path) as hall:
        server = hall.server(config)
        life = asyncio.ensure_future(server.run())
        while not server._online:  # noqa: ASYNC110
            await asyncio.sleep(0)
        await server._queue.join()
        ref = server._coordinator.restored.bundle
        topic = TOPICS.published(ref.sha256, 0)
        assert hall.hub.retained(topic)
        server.disconnected("a test")
        await server._sweep(ref)
        assert hall.hub.retained(topic)
        server.connected()
        # The bundle is spread again on connecting, after the sweep; so the queue tells, before it is worked off.
        sweeps = [action for action in server._queue._queue if type(action).__name__ == "Sweep"]
        assert [sweep.ref for sweep in sweeps] == [ref]
        await server._queue.join()
        assert server._unswept == []
        server.stop("enough")
        await life
    assert hall.hub.retained(topic) is None


@together
async def test_a_clearing_that_may_be_lost_is_sent_again_and_not_forgotten_before(tmp_path):
    config = settings(tmp_path, transfer={"spread": 0.0, "inline": 0, "chunk": 1024})
    one, two = (BlobRef(bytes([number] * 32), 1024, 1024) for number in (1, 2))
    names = [TOPICS.published(ref.sha256, 0) for ref in (one, two)]
    async with Hall(tmp_path) as hall:
        server = hall.server(config)
        life = asyncio.ensure_future(server.run())
        while not server._online:  # noqa: ASYNC110
            await asyncio.sleep(0)
        await server._queue.join()
        await server._in_worker(lambda: server._worker.retain(names))
        await server._sweep(one)
        hall.hub.publish(names[0], b"the clearing was lost with the connection", retain=True)
        server.disconnected("a test")
        server.connected()
        assert hall.hub.retained(names[0]) is None
        with Ledger.read(tmp_path / "state" / "ledger.db") as ledger:
            assert set(names) <= set(ledger.retained())
        await server._sweep(two)
        with Ledger.read(tmp_path / "state" / "ledger.db") as ledger:
            assert set(names) & set(ledger.retained()) == {names[1]}
        server.stop("enough")
        await life


@together
async def test_a_topic_that_is_cleared_twice_in_a_row_is_not_forgotten_before_the_second_time_is_sure(tmp_path):
    config = settings(tmp_path, transfer={"spread": 0.0, "inline": 0, "chunk": 1024})
    ref = BlobRef(bytes(32), 1024, 1024)
    topic = TOPICS.published(ref.sha256, 0)
    async with Hall(tmp_path) as hall:
        server = hall.server(config)
        life = asyncio.ensure_future(server.run())
        while not server._online:  # noqa: ASYNC110
            await asyncio.sleep(0)
        await server._queue.join()
        for _ in range(2):
            await server._in_worker(lambda: server._worker.retain([topic]))
            server._retained.add(topic)
            await server._sweep(ref)
            with Ledger.read(tmp_path / "state" / "ledger.db") as ledger:
                assert topic in ledger.retained()
        server.stop("enough")
        await life


@together
async def test_a_cleared_topic_is_not_forgotten_before_the_broker_has_acknowledged_everything(tmp_path, monkeypatch):
    config = settings(tmp_path, transfer={"spread": 0.0, "inline": 0, "chunk": 1024})
    refs = [BlobRef(bytes([number] * 32), 1024, 1024) for number in range(4)]
    names = {TOPICS.published(ref.sha256, 0) for ref in refs}

    def known() -> set[str]:
        with Ledger.read(tmp_path / "state" / "ledger.db") as ledger:
            return names & set(ledger.retained())

    async with Hall(tmp_path) as hall:
        server = hall.server(config)
        life = asyncio.ensure_future(server.run())
        while not server._online:  # noqa: ASYNC110
            await asyncio.sleep(0)
        await server._queue.join()
        await server._in_worker(lambda: server._worker.retain(names))
        with monkeypatch.context() as patch:
            patch.setattr(MemoryLink, "settled", False)
            for ref in refs[:3]:
                await server._sweep(ref)
            assert known() == names
        await server._sweep(refs[3])
        assert known() == {TOPICS.published(refs[3].sha256, 0)}
        server.stop("enough")
        await life


@together
async def test_an_offer_of_a_newer_epoch_ends_the_server_and_its_chunks_stay(tmp_path):
    config = settings(tmp_path, transfer={"spread": 0.0, "inline": 0, "chunk": 1024})
    async with Hall(tmp_path) as hall:
        server = hall.server(config)
        life = asyncio.ensure_future(server.run())
        while not server._online:  # noqa: ASYNC110
            await asyncio.sleep(0)
        await server._queue.join()
        offer = m.decode(hall.hub.retained(TOPICS.offer))
        newer = m.encode(msgspec.structs.replace(offer, epoch=offer.epoch + 5))
        hall.hub.publish(TOPICS.offer, newer, retain=True)
        with pytest.raises(LedgerError, match=f"offer of epoch {offer.epoch + 5}, newer than this server's"):
            await life
        assert hall.hub.retained(TOPICS.offer) == newer
        assert hall.hub.retained(TOPICS.published(offer.bundle.sha256, 0))


@pytest.mark.parametrize("stop", [{"target": 0.9}, {"patience": 2}])
def test_a_target_that_no_evaluation_reports_is_refused_at_the_start(tmp_path, stop):
    config = settings(tmp_path, stop={"metric": "acuracy"} | stop)
    with pytest.raises(ConfigError, match=r"stop\.metric is 'acuracy', .*known there: accuracy, client_accuracy.*loss"):
        check_names(config, Bundle.from_bytes(toy_bundle(hidden=8)))
    check_names(settings(tmp_path, stop={"metric": "client_loss"} | stop), Bundle.from_bytes(toy_bundle(hidden=8)))


@together
async def test_a_server_that_ends_in_the_middle_of_an_upload_asks_the_next_time_for_the_rest(tmp_path):
    config = settings(
        tmp_path,
        transfer={"spread": 0.0, "inline": 0, "chunk": 1024, "window": 1},
        codec={"kind": "none"},
        round={"cohort": 1, "minimum": 1},
        stop={"rounds": 1},
    )
    (tmp_path / "toy.fedge").write_bytes(toy_bundle(features=100, hidden=100))
    np.savez(tmp_path / "test.npz", **toy_data(50, seed=99, features=100))
    source = ArraySource(toy_data(30, seed=1, features=100))
    sent: list[tuple[str, int]] = []

    class Watched(MemoryLink):
        def publish(self, topic, payload, *, retain=False):
            _, chunk = TOPICS.parse_up(topic)
            if chunk is not None:
                sent.append((topic, len(payload)))
                if len(sent) == 12:
                    life.cancel()
            super().publish(topic, payload, retain=retain)

    async with Hall(tmp_path) as hall:
        one = device(tmp_path / "devices", "c1", hall.hub, hall.workshop)
        one.open_data = lambda manifest: (source, source)
        one.link = Watched(hall.hub)
        one._session.settings = dataclasses.replace(one._session.settings, inline=0, chunk=1024)
        hall.devices.append(one)
        hall.lives.append(asyncio.ensure_future(one.run()))
        life = asyncio.ensure_future(hall.server(config).run())
        with pytest.raises(asyncio.CancelledError):
            await life
        assert list((tmp_path / "state" / "uploads").iterdir())
        outcome = await hall.server(config).run()
    assert "1 round" in outcome.reason
    twice = len(sent) - len(set(sent))
    assert len(set(sent)) > 30
    assert twice <= 2, f"{twice} chunks were sent twice"
    assert not list((tmp_path / "state" / "uploads").iterdir())


@pytest.mark.parametrize("codec", ["quantized", "none"])
def test_a_small_model_needs_no_blob_no_credit_and_four_messages_a_client_and_round(tmp_path, codec):
    """Counted on the wire: everything that any link publishes."""
    clients, rounds = ("c1", "c2", "c3"), 6
    said: list[tuple[str, type]] = []

    class Wire(MemoryBroker):
        def publish(self, topic: str, payload: bytes, *, retain: bool) -> None:
            said.append((topic, type(m.decode(payload))))
            super().publish(topic, payload, retain=retain)

    @together
    async def play():
        config = settings(tmp_path, codec={"kind": codec}, stop={"rounds": rounds})
        (tmp_path / "toy.fedge").write_bytes(toy_bundle(features=50, hidden=50))
        np.savez(tmp_path / "test.npz", **toy_data(50, seed=99, features=50))
        async with Hall(tmp_path) as hall:
            hall.hub = Wire()
            for name in clients:
                source = ArraySource(toy_data(40, seed=int(name[1]), features=50))
                hall.join(name)
                hall.devices[-1].open_data = lambda manifest, source=source: (source, source)
            await hall.server(config).run()

    play()
    assert Bundle.open(tmp_path / "toy.fedge").layout.size * 4 > 10_000
    assert {kind for _, kind in said} <= {m.Offer, m.Hello, m.Invitation, m.Upload, m.Receipt, m.Goodbye}
    everything = [kind for topic, kind in said if kind not in (m.Offer, m.Goodbye)]
    assert everything.count(m.Hello) == len(clients)
    assert everything.count(m.Upload) >= len(clients) * (rounds - 1)
    assert len(everything) <= 4 * len(clients) * rounds


@together
async def test_a_full_disk_ends_the_run_with_a_message_and_the_next_one_counts_everything_once(tmp_path, monkeypatch):
    config = settings(tmp_path, codec={"kind": "none"}, stop={"rounds": 2}, evaluation={"every": 0})
    (tmp_path / "toy.fedge").write_bytes(toy_bundle(hidden=800))
    told: list[m.Receipt] = []

    class Wire(MemoryBroker):
        def publish(self, topic: str, payload: bytes, *, retain: bool) -> None:
            message = m.decode(payload) if topic.endswith("/msg") else None
            if isinstance(message, m.Receipt):
                told.append(message)
            super().publish(topic, payload, retain=retain)

    perform_all, full = Worker.perform_all, False

    def filling(self, actions):
        nonlocal full
        if not full:
            full = True
            connection = self._ledger._database._connection
            (pages,) = connection.execute("PRAGMA page_count").fetchone()
            connection.execute(f"PRAGMA max_page_count = {pages + 10}")
        return perform_all(self, actions)

    monkeypatch.setattr(Worker, "perform_all", filling)
    async with Hall(tmp_path) as hall:
        hall.hub = Wire()
        hall.join("c1", "c2", "c3")
        with pytest.raises(LedgerError, match=r"ledger\.db: .*full; check the disk's free space"):
            await hall.server(config).run()
        before = len(counted(config).get(1, []))
        assert before < 3
        assert [receipt.status for receipt in told] == ["recorded"] * before
        await hall.server(config).run()
    assert counted(config) == {1: ["c1", "c2", "c3"], 2: ["c1", "c2", "c3"]}
    with Ledger.read(tmp_path / "state" / "ledger.db") as ledger:
        assert [(done.clients, done.samples) for done in ledger.rounds()] == [(3, 150), (3, 150)]
