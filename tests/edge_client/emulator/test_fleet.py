"""Fleets: shared copies are counted, phones take part, and a fleet ends with its parent."""

import asyncio
import subprocess
import sys
import threading

import msgspec
import numpy as np
import pytest

from broker_server.broker import EmbeddedBroker, find_mosquitto
from edge_client.address import Address
from edge_client.bundle import Bundle
from edge_client.codec.layout import Layout, TensorSpec
from edge_client.codec.versions import CodedState
from edge_client.emulator.fleet import Fleet, FleetReport, FleetSpec, SharedCopies
from edge_client.errors import ConfigError, DataError, TransportError
from edge_client.events import Failed, Work
from edge_client.transport import MqttLink
from edge_client.wire import messages as m
from edge_client.wire.topics import Topics
from edge_client.wire.transfer import refer
from tests.edge_client.codec.conftest import coded
from tests.toy import toy_bundle, toy_data

LAYOUT = Layout((TensorSpec("w", (4,)),))
PARAMETERS = Bundle.from_bytes(toy_bundle()).layout
TOPICS = Topics("demo")
STATES = [coded(LAYOUT, number) for number in range(1, 9)]
needs_mosquitto = pytest.mark.skipif(find_mosquitto() is None, reason="needs the Debian package mosquitto")


def test_a_shared_copy_is_kept_as_long_as_a_phone_holds_it():
    copies, (first, second) = SharedCopies(), STATES[:2]
    for _ in range(2):
        copies.save(first.digest(), first, bytes(32))
    copies.save(second.digest(), second, first.digest())
    assert copies.load(first.digest(), LAYOUT).digest() == first.digest()
    copies.save(second.digest(), second, first.digest())
    assert copies.load(first.digest(), LAYOUT) is None
    assert copies.load(second.digest(), LAYOUT) is second


def test_counts_hold_when_slots_save_at_once():
    copies, before = SharedCopies(), sys.getswitchinterval()

    def life():
        held = bytes(32)
        for number in range(2000):
            state = STATES[number % 2]
            copies.save(state.digest(), state, held)
            held = state.digest()
            assert copies.load(held, LAYOUT) is not None

    failures = []

    def guarded():
        try:
            life()
        except AssertionError as error:
            failures.append(error)

    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=guarded) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not failures
    assert sum(copies._holders.values()) == 4


@pytest.fixture
def spec(tmp_path):
    arrays = toy_data(90, seed=1) | {"user": np.repeat(np.arange(3), 30)}
    np.savez(tmp_path / "data.npz", **arrays)
    plain = FleetSpec(
        url="mqtt://127.0.0.1:1", federation="demo", state=str(tmp_path / "state"), data=str(tmp_path / "data.npz"),
        clients=3, attempts=1,
    )  # fmt: skip

    def make(**changes):
        return msgspec.structs.replace(plain, **changes)

    return make


def built(spec):
    async def build():
        return Fleet(spec, lambda line: None)

    return asyncio.run(build())


def test_phones_are_named_and_share_one_bundle_folder(spec, tmp_path):
    fleet = built(spec(split="natural"))
    assert [phone.client for phone in fleet.phones] == ["phone-0000", "phone-0001", "phone-0002"]
    assert fleet.report() == FleetReport(3, 0, 0, 0, fleet.report().peak_rss_mib, threading.active_count())
    assert sorted(entry.name for entry in (tmp_path / "state").iterdir())[0] == "bundles"


BAD = {
    "too many phones": ({"clients": 91}, DataError, "91 clients"),
    "no users": ({"split": "natural", "key": "owner"}, DataError, "needs the user"),
    "no labels": ({"split": "shards", "label": "z"}, DataError, "'shards' needs the array 'z'"),
    "no data": ({"data": "nowhere.npz"}, DataError, "nowhere"),
    "speed": ({"speed": (0.0, 1.0)}, ConfigError, "speed"),
    "url": ({"url": "http://x"}, TransportError, "broker URL"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_fleet_that_cannot_be_is_refused(spec, name):
    changes, kind, text = BAD[name]
    with pytest.raises(kind, match=text):
        built(spec(**changes))


def test_a_broker_that_is_not_there_ends_the_fleet(spec):
    async def play():
        await asyncio.wait_for(Fleet(spec(), lambda line: None).run(), 20)

    with pytest.raises(TransportError, match=r"127\.0\.0\.1:1 after 1 attempts"):
        asyncio.run(play())


class Witness:
    """Remembers the work that it was given in place of a worker."""

    def perform(self, work, trainer, stop):
        self.plan = work.invitation.plan
        return Failed(1, 1, "seen", 0, bytes(32))


@pytest.mark.parametrize(("seconds", "own"), [(8.0, 2.0), (0.0, 0.0)])
def test_a_slow_phone_has_fewer_of_the_machine_s_seconds_to_train(spec, seconds, own):
    async def play():
        fleet, plan = Fleet(spec(speed=(0.25, 0.25)), lambda line: None), m.TrainPlan(epochs=3, seconds=seconds)
        phone, witness = fleet.phones[0], Witness()
        phone._worker, phone._bundle = witness, Bundle.from_bytes(toy_bundle())
        invited = m.Invitation(1, 1, 1, "train", plan, m.UpdatePlan(), 5, 60.0, 0, 0, bytes(32))
        assert (await phone._perform(Work(invited, None))).reason == "seen"
        assert witness.plan == msgspec.structs.replace(plan, seconds=own)

    asyncio.run(play())


class Server:
    """Invites every phone that says hello to one task, receipts each update, then ends the federation."""

    def __init__(self, url, clients, layout):
        self.link = MqttLink(Address.parse(url), "server")
        self.clients, self.digest = clients, CodedState(layout).digest()
        self.boots, self.updates, self.finished = {}, {}, asyncio.Event()
        self.uplinks = set()
        self.hello = asyncio.Event()

    def offer(self, finished):
        offer = m.Offer("demo", 1, refer(toy_bundle(), chunk=1024), 0.0, finished=finished)
        self.link.publish(TOPICS.offer, m.encode(offer), retain=True)

    def connected(self):
        self.link.subscribe((TOPICS.every_up,))
        self.offer(finished=False)

    def disconnected(self, reason):
        pass

    def message(self, topic, payload):
        client, _ = TOPICS.parse_up(topic)
        match m.decode(payload):
            case m.Hello(uplink=uplink):
                self.hello.set()
                self.uplinks.add(uplink)
                self.invite(client)
            case m.Upload() as upload:
                self.updates[client] = upload
                self.link.publish(TOPICS.down(client), m.encode(m.Receipt(1, 1, "recorded")))
                if len(self.updates) == self.clients:
                    self.offer(finished=True)
            case m.Decline():
                self.invite(client)

    def invite(self, client):
        if client not in self.updates:
            plan = m.TrainPlan(batch_size=8)
            invited = m.Invitation(1, 1, 1, "train", plan, m.UpdatePlan(), 5, 60.0, 0, 0, self.digest)
            self.link.publish(TOPICS.down(client), m.encode(invited))


@pytest.fixture(scope="module")
def broker(tmp_path_factory):
    with EmbeddedBroker.start(tmp_path_factory.mktemp("broker"), kind="mosquitto") as running:
        yield running


@needs_mosquitto
@pytest.mark.parametrize("habits", [{}, {"latency": 0.01, "bandwidth": 1e6}, {"dropout": 0.5, "seed": 3}])
def test_phones_take_part_until_the_federation_has_finished(broker, spec, habits):
    async def play():
        server = Server(broker.url, 3, PARAMETERS)
        life = asyncio.ensure_future(server.link.run(server))
        try:
            fleet = Fleet(spec(url=broker.url, holdout=0.2, attempts=0, slots=2, **habits), lambda line: None)
            await asyncio.wait_for(fleet.run(), 30)
            assert set(server.updates) == {phone.client for phone in fleet.phones}
            assert server.uplinks == {habits.get("bandwidth", 0.0)}
            report = fleet.report()
            assert report.sent > 0
            assert report.received > 3 * len(toy_bundle())
            assert report.dropped == 0
            assert report.peak_rss_mib > 10
        finally:
            server.offer(finished=False)
            await server.link.close()
            await life

    asyncio.run(play())


def process(tmp_path, data):
    (tmp_path / "fleet.json").write_bytes(data)
    return subprocess.Popen(
        [sys.executable, "-m", "edge_client.emulator", str(tmp_path / "fleet.json")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@needs_mosquitto
def test_a_fleet_process_ends_when_its_input_closes_and_prints_its_report(broker, spec, tmp_path):
    async def play():
        server = Server(broker.url, 4, PARAMETERS)  # one more than there are: it never finishes
        life = asyncio.ensure_future(server.link.run(server))
        try:
            fleet = process(tmp_path, msgspec.json.encode(spec(url=broker.url)))
            await asyncio.wait_for(server.hello.wait(), 20)
            out, errors = await asyncio.to_thread(fleet.communicate, None, 20)
            assert fleet.returncode == 0, errors
            assert msgspec.json.decode(out, type=FleetReport).clients == 3
        finally:
            await server.link.close()
            await life

    asyncio.run(play())


@pytest.mark.parametrize("data", [b"{", b'{"url": 1}'])
def test_a_bad_fleet_file_is_one_line_and_status_2(tmp_path, data):
    out, errors = (fleet := process(tmp_path, data)).communicate(timeout=20)
    assert fleet.returncode == 2
    assert out == b""
    assert errors.startswith(b"fedge: ")
    assert errors.count(b"\n") == 1
