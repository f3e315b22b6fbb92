"""A whole device: session, store, worker and trainer over a link in memory, with a server that follows a script."""

import asyncio
import builtins
import contextlib
import dataclasses
import errno
import os

import numpy as np
import pytest

from edge_client.bundle import Bundle
from edge_client.codec.update import decode_scalars, decode_update
from edge_client.codec.versions import CodedState, encode_delta
from edge_client.data import ArraySource, check
from edge_client.device import Device, Workshop
from edge_client.errors import BundleError, DataError, StoreError
from edge_client.memory import MemoryBroker, MemoryLink
from edge_client.predict import Model as Predictor
from edge_client.shelf import Shelf
from edge_client.store import FileCopies, Store
from edge_client.wire import messages as m
from edge_client.wire.topics import Topics
from edge_client.wire.transfer import Assembly, count, piece, refer
from tests.edge_client.codec.conftest import coded
from tests.toy import toy_bundle, toy_data

DATA = toy_bundle()
BUNDLE = Bundle.from_bytes(DATA)
ZERO = CodedState(BUNDLE.layout)
TOPICS = Topics("demo")


class Server:
    """What the coordinator says, by script; what clients said, to be waited for."""

    def __init__(self, broker):
        self.link = MemoryLink(broker)
        self.inbox = asyncio.Queue()
        self.chunks = asyncio.Queue()

    def connected(self):
        self.link.subscribe((TOPICS.every_up,))

    def disconnected(self, reason):
        raise AssertionError(reason)

    def message(self, topic, payload):
        client, chunk = TOPICS.parse_up(topic)
        if chunk is None:
            self.inbox.put_nowait((client, m.decode(payload)))
        else:
            self.chunks.put_nowait((chunk, payload))

    def offer(self, epoch=1, data=DATA, spread=0.0, **more):
        ref = refer(data, chunk=1024, inline=0)
        self.spread(ref, data)
        self.link.publish(TOPICS.offer, m.encode(m.Offer("demo", epoch, ref, spread, **more)), retain=True)

    def spread(self, ref, data):
        for index in range(count(ref)):
            self.link.publish(TOPICS.published(ref.sha256, index), piece(data, ref, index), retain=True)

    def tell(self, message):
        self.link.publish(TOPICS.down("pi"), m.encode(message))

    def invite(self, task, state=ZERO, version=0, held=0, delta=None, kind="train", epoch=1, plan=None):
        update = m.UpdatePlan(target="step", value=0.5)
        plan = plan or m.TrainPlan(epochs=1, batch_size=8)
        digest = state.digest()
        self.tell(m.Invitation(epoch, task, 1, kind, plan, update, 5, 60.0, held, version, digest, delta))

    async def said(self, kind):
        async with asyncio.timeout(20):
            while True:
                client, message = await self.inbox.get()
                assert client == "pi"
                if isinstance(message, kind):
                    return message


@contextlib.asynccontextmanager
async def federation():
    broker = MemoryBroker()
    server = Server(broker)
    life = asyncio.ensure_future(server.link.run(server))
    await asyncio.sleep(0)
    try:
        yield broker, server
    finally:
        await server.link.close()
        await life


def device(broker, folder, workshop, lines, arrays=None, inline=None):
    arrays = toy_data(60, seed=1) if arrays is None else arrays

    def open_data(manifest):
        check(arrays, manifest)
        source = ArraySource(arrays)
        return source, source

    made = Device(
        client="pi",
        federation="demo",
        connect=lambda will: MemoryLink(broker, will=will),
        store=Store(folder, durable=False),
        copies=FileCopies(folder),
        workshop=workshop,
        open_data=open_data,
        log=lines.append,
        seed=3,
    )
    if inline is not None:
        settings = dataclasses.replace(made._session.settings, inline=inline, chunk=1024)
        made._session.settings = settings
    return made


@contextlib.asynccontextmanager
async def alive(made):
    life = asyncio.ensure_future(made.run())
    try:
        yield life
    finally:
        await made.close()
        await asyncio.gather(life, return_exceptions=True)


@pytest.fixture
def workshop():
    made = Workshop(1)
    yield made
    made.close()


class Lines(list):
    """What a device logged; the first line can be waited for."""

    def __init__(self):
        super().__init__()
        self.first = asyncio.Event()

    def append(self, line):
        super().append(line)
        self.first.set()


@pytest.fixture
def lines():
    return Lines()


def decoded(update):
    return decode_update(update, {"delta": BUNDLE.layout})


def test_a_hello_into_silence_does_not_say_that_a_server_was_heard(tmp_path, workshop, lines):
    """By that a new release of the client proves itself."""

    async def play():
        async with federation() as (broker, server):
            made = device(broker, tmp_path, workshop, lines)
            made._session.settings = dataclasses.replace(made._session.settings, patience=0.01)
            made._session._patience = dataclasses.replace(made._session._patience, first=0.01)
            async with alive(made):
                assert (await server.said(m.Hello)).epoch == 0
                assert not made.greeted
                server.offer()
                while not (await server.said(m.Hello)).epoch:
                    pass
                assert made.greeted

    asyncio.run(play())


def test_a_device_fetches_trains_uploads_and_goes_on(tmp_path, workshop, lines):
    async def play():
        async with federation() as (broker, server):
            server.offer()
            made = device(broker, tmp_path, workshop, lines)
            async with alive(made):
                hello = await server.said(m.Hello)
                assert (hello.bundle.hex(), hello.version, hello.samples) == (BUNDLE.digest, 0, 60)
                assert hello.traffic.received > len(DATA)
                server.invite(1)
                upload = await server.said(m.Upload)
                first = decoded(upload.blob.inline)
                assert first.scalars["samples"] == 60
                assert np.abs(first.vectors["delta"]).max() > 0
                assert made.store.held().pending.update == upload.blob.inline
                server.tell(m.Receipt(1, 1, "recorded"))

                state = coded(BUNDLE.layout, 1)
                delta = encode_delta(ZERO, state)
                ref = refer(delta, chunk=1024, inline=0)
                server.spread(ref, delta)
                server.invite(2, state, version=1, held=0, delta=ref)
                upload = await server.said(m.Upload)
                assert made.store.held().pending.task == 2
                server.tell(m.Receipt(1, 2, "recorded"))
                server.invite(3, state, version=1, held=1, kind="evaluate")
                upload = await server.said(m.Upload)
                scalars = decode_scalars(upload.blob.inline)
                sums = workshop.trainer(BUNDLE).evaluate(
                    state.parameters(BUNDLE.initial()), ArraySource(toy_data(60, 1))
                )
                assert scalars["sum.loss"] == pytest.approx(sums["loss"])
                server.tell(m.Receipt(1, 3, "recorded"))
                server.offer(finished=True)
                await asyncio.wait_for(made.done.wait(), 5)
            assert isinstance(await server.said(m.Goodbye), m.Goodbye)
        assert lines == []

    asyncio.run(play())


def test_an_update_in_chunks(tmp_path, workshop, lines):
    async def play():
        async with federation() as (broker, server):
            server.offer()
            async with alive(device(broker, tmp_path, workshop, lines, inline=10)):
                await server.said(m.Hello)
                server.invite(1)
                upload = await server.said(m.Upload)
                assert upload.blob.inline is None
                assembly = Assembly(upload.blob, limit=10**6)
                server.tell(m.Credit(upload.blob.sha256, assembly.missing()))
                while not assembly.complete:
                    chunk, payload = await asyncio.wait_for(server.chunks.get(), 5)
                    assert chunk.sha256 == upload.blob.sha256
                    assert assembly.add(chunk.index, payload)
                assert decoded(assembly.take()).scalars["samples"] == 60

    asyncio.run(play())


def test_a_restart_resumes_with_the_bundle_the_copy_and_the_update(tmp_path, workshop, lines):
    async def play():
        state = coded(BUNDLE.layout, 1)
        delta = refer(encode_delta(ZERO, state), chunk=1024)
        async with federation() as (broker, server):
            server.offer()
            async with alive(device(broker, tmp_path, workshop, lines)):
                await server.said(m.Hello)
                server.invite(1, state, version=4, delta=delta)
                upload = await server.said(m.Upload)
            async with alive(device(broker, tmp_path, workshop, lines)):
                hello = await server.said(m.Hello)
                assert (hello.version, hello.digest, hello.samples) == (4, state.digest(), 60)
                assert hello.traffic.received < len(DATA)
                assert (await server.said(m.Upload)).blob == upload.blob
                server.tell(m.Receipt(1, 1, "recorded"))
            (tmp_path / f"model-{state.digest().hex()}.bin").unlink()
            async with alive(device(broker, tmp_path, workshop, lines)):
                assert (await server.said(m.Hello)).version == 0
                server.invite(2, state, version=4, delta=delta)
                await server.said(m.Upload)
            (tmp_path / f"bundle-{BUNDLE.digest}.fedge").write_bytes(DATA[:-1])
            async with alive(device(broker, tmp_path, workshop, lines)):
                assert (await server.said(m.Hello)).version == 0
        assert lines == []

    asyncio.run(play())


def test_a_lost_connection_is_made_again_and_the_server_is_told(tmp_path, workshop, lines):
    async def play():
        async with federation() as (broker, server):
            server.offer()
            made = device(broker, tmp_path, workshop, lines)
            async with alive(made):
                hello = await server.said(m.Hello)
                made.link.drop()
                assert (await server.said(m.Goodbye)).boot == hello.boot  # the last will
                assert (await server.said(m.Hello)).boot == hello.boot
                made.available(False)
                assert (await server.said(m.Hello)).available is False
                server.invite(1)
                assert (await server.said(m.Decline)).reason == "not available"
        assert lines == ["pi: dropped; trying again"]

    asyncio.run(play())


def test_a_newer_task_stops_the_one_under_way(tmp_path, workshop, lines):
    async def play():
        async with federation() as (broker, server):
            server.offer()
            async with alive(device(broker, tmp_path, workshop, lines)):
                await server.said(m.Hello)
                server.invite(1, plan=m.TrainPlan(epochs=10_000, batch_size=1))
                server.invite(2)
                assert (await server.said(m.Upload)).task == 2

    asyncio.run(play())


def test_closing_stops_the_task_under_way(tmp_path, workshop, lines, monkeypatch):
    async def play():
        async with federation() as (broker, server):
            server.offer()
            made = device(broker, tmp_path, workshop, lines)
            async with alive(made):
                await server.said(m.Hello)
                started = asyncio.Event()
                start = made._start
                monkeypatch.setattr(made, "_start", lambda job: (start(job), started.set()))
                server.invite(1, plan=m.TrainPlan(epochs=10_000, batch_size=1))
                await started.wait()
            assert made.store.held().pending is None
            await server.said(m.Goodbye)

    asyncio.run(asyncio.wait_for(play(), 20))


def test_data_that_does_not_fit_ends_the_device_with_both_shapes(tmp_path, workshop, lines):
    async def play():
        async with federation() as (broker, server):
            server.offer()
            made = device(broker, tmp_path, workshop, lines, toy_data(5, features=7))
            with pytest.raises(DataError, match=r"\[n, 4\]|4.*7|7.*4"):
                await asyncio.wait_for(made.run(), 10)
            await server.said(m.Goodbye)

    asyncio.run(play())


def test_data_for_the_next_bundle_does_not_keep_a_device_from_asking_for_it(tmp_path, workshop, lines):
    Store(tmp_path, durable=False).install(bytes.fromhex(BUNDLE.digest), DATA)

    async def play():
        async with federation() as (broker, server):
            made = device(broker, tmp_path, workshop, lines, toy_data(5, features=7))
            assert "asking for the bundle again" in lines[0]
            server.offer()
            with pytest.raises(DataError, match=r"\[n, 4\]|4.*7|7.*4"):
                await asyncio.wait_for(made.run(), 10)
            assert made.store.held().bundle.hex() == BUNDLE.digest

    asyncio.run(play())


def test_a_damaged_bundle_is_rejected_and_the_device_stays(tmp_path, workshop, lines):
    async def play():
        async with federation() as (broker, server):
            server.offer(data=DATA[:-100])
            async with alive(device(broker, tmp_path, workshop, lines)):
                await asyncio.wait_for(lines.first.wait(), 10)
                assert "cannot be used here" in lines[0]
                server.offer(epoch=2)
                await server.said(m.Hello)

    asyncio.run(play())


def test_a_failing_task_is_declined(tmp_path, workshop, lines):
    async def play():
        async with federation() as (broker, server):
            server.offer()
            async with alive(device(broker, tmp_path, workshop, lines)):
                await server.said(m.Hello)
                server.invite(1, plan=m.TrainPlan(hypers={"unknown": 1.0}))
                assert "unknown" in (await server.said(m.Decline)).reason
                server.invite(2)
                await server.said(m.Upload)

    asyncio.run(play())


def test_an_error_in_a_callback_ends_the_device_instead_of_leaving_it_silent(tmp_path, workshop, lines, monkeypatch):
    async def play():
        async with federation() as (broker, server):
            server.offer()
            made = device(broker, tmp_path, workshop, lines)
            life = asyncio.ensure_future(made.run())
            await server.said(m.Hello)
            server.invite(1)
            await server.said(m.Upload)

            def full(*_, **__):
                raise StoreError("cannot write index.msgpack: No space left on device")

            monkeypatch.setattr(made.store, "settle", full)
            server.tell(m.Receipt(1, 1, "recorded"))
            with pytest.raises(StoreError, match="No space left"):
                await asyncio.wait_for(life, 10)

    asyncio.run(play())


def test_a_workshop_opens_a_bundle_once(workshop):
    first = workshop.open(b"d", DATA)
    assert workshop.open(b"d", b"not read again") is first
    with pytest.raises(BundleError):
        workshop.open(b"e", b"not a bundle")
    assert workshop.trainer(first) is workshop.trainer(first)


def large_bundle():
    return toy_bundle(features=300, hidden=1000)


def test_a_restart_in_the_middle_of_a_download_goes_on_with_what_had_come(tmp_path, workshop, lines):
    data = large_bundle()
    ref = refer(data, chunk=65536, inline=0)

    async def scene():
        async with federation() as (broker, server):
            topics = [TOPICS.published(ref.sha256, index) for index in range(count(ref))]
            for topic, index in zip(topics[:-1], range(count(ref) - 1), strict=True):
                server.link.publish(topic, piece(data, ref, index), retain=True)
            server.link.publish(TOPICS.offer, m.encode(m.Offer("demo", 1, ref, 0.0)), retain=True)
            first = device(broker, tmp_path, workshop, lines, toy_data(60, features=300))
            came, keep = asyncio.Event(), first.store.keep

            def counted(*arguments):
                keep(*arguments)
                if first.store._download.checklist.left == 1:
                    came.set()

            first.store.keep = counted
            async with alive(first):
                await asyncio.wait_for(came.wait(), 20)
            for topic in topics[:-1]:
                server.link.publish(topic, b"", retain=True)  # now nobody could send them again
            server.link.publish(topics[-1], piece(data, ref, count(ref) - 1), retain=True)
            async with alive(device(broker, tmp_path, workshop, lines, toy_data(60, features=300))):
                hello = await server.said(m.Hello)
                assert hello.bundle == ref.sha256
        assert not (tmp_path / "download.part").exists()

    assert ref.size > 2**20
    asyncio.run(scene())


def test_a_disk_too_full_to_keep_a_download_does_not_stop_it(tmp_path, workshop, lines, monkeypatch):
    data = large_bundle()

    def full(*arguments):
        raise StoreError("download.part: No space left on device")

    monkeypatch.setattr(Store, "keep", full)

    async def scene():
        async with federation() as (broker, server):
            server.offer(data=data)
            async with alive(device(broker, tmp_path, workshop, lines, toy_data(60, features=300))):
                assert (await server.said(m.Hello)).bundle == refer(data, chunk=1024).sha256

    asyncio.run(scene())
    assert [line for line in lines if "the download goes on" in line] == lines


def full_disk(word):
    """Files of one kind cannot be written, until the returned patch is undone."""
    real = builtins.open

    def opened(path, mode="r", **more):
        if "w" in mode and word in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, mode, **more)

    patch = pytest.MonkeyPatch()
    patch.setattr("edge_client.store.open", opened, raising=False)
    return patch


def test_a_full_disk_declines_the_task_and_the_next_one_goes_well_when_there_is_space(tmp_path, workshop, lines):
    async def scene():
        async with federation() as (broker, server):
            server.offer()
            async with alive(device(broker, tmp_path, workshop, lines)):
                await server.said(m.Hello)
                patch = full_disk("update-")
                server.invite(1)
                declined = await server.said(m.Decline)
                assert "No space left on device" in declined.reason
                patch.undo()
                server.invite(2)
                assert (await server.said(m.Upload)).task == 2

    asyncio.run(scene())


def test_a_disk_too_full_for_a_receipt_ends_the_device_and_the_receipt_is_asked_for_again(tmp_path, workshop, lines):
    async def scene():
        async with federation() as (broker, server):
            server.offer()
            async with alive(device(broker, tmp_path, workshop, lines)) as life:
                await server.said(m.Hello)
                server.invite(1)
                first = await server.said(m.Upload)
                patch = full_disk("index")
                server.tell(m.Receipt(1, 1, "recorded"))
                with pytest.raises(StoreError, match="No space left on device"):
                    await asyncio.wait_for(life, 20)
                patch.undo()
            again = device(broker, tmp_path, workshop, lines)
            async with alive(again):
                assert (await server.said(m.Upload)).blob.sha256 == first.blob.sha256
                server.tell(m.Receipt(1, 1, "recorded"))
                server.invite(2)
                assert (await server.said(m.Upload)).task == 2
            assert again.store.residual()

    asyncio.run(scene())


def test_other_programs_find_the_model_of_the_last_task(tmp_path, workshop):
    lines = []

    async def play(task):
        async with federation() as (broker, server):
            server.offer()
            made = device(broker, tmp_path / "state", workshop, lines)
            made.shelf = Shelf(tmp_path / "model")
            async with alive(made):
                await server.said(m.Hello)
                server.invite(task)
                await server.said(m.Upload)
        return Predictor.open(tmp_path)

    found = asyncio.run(play(1))
    x = toy_data(5)["x"]
    expected = x @ BUNDLE.weights["weight"].T + BUNDLE.weights["bias"]
    np.testing.assert_allclose(found.predict(x=x)["logits"], expected, rtol=1e-5, atol=1e-6)
