"""Enrolment beside a running server: over a link, at its own pace, and never in the way of rounds."""

import asyncio
import contextlib

import pytest

from broker_server.authority import REGISTRY
from broker_server.registrar import Registrar
from broker_server.registry import Registry
from broker_server.responder import Responder, responding
from edge_client.errors import ConfigError, LedgerError
from edge_client.memory import MemoryBroker, MemoryLink
from edge_client.wire import enrolment as wire
from tests.office import NOW, Device, Office, issued


class Ear:
    """Hears what users are told, on a broker in memory, and speaks for them."""

    def __init__(self, broker: MemoryBroker) -> None:
        self.link, self.said = MemoryLink(broker), asyncio.Queue()

    def connected(self):
        self.link.subscribe(("fedge/toys/enrol/#",))

    def disconnected(self, reason):
        pass

    def message(self, topic, payload):
        if topic.endswith("/told"):
            self.said.put_nowait((topic.split("/")[3], payload))

    def ask(self, user, payload):
        self.link.publish(wire.ask_topic("toys", user), payload)


class Counter:
    """A Responder on a broker in memory, and one who asks there."""

    def __init__(self, office: Office, **options) -> None:
        self.office, self.broker, self.lines = office, MemoryBroker(), asyncio.Queue()
        self.ear = Ear(self.broker)
        self.responder = Responder(
            "toys",
            MemoryLink(self.broker),
            lambda: Registrar(office.authority, Registry.open(office.folder / REGISTRY), office.registrar.rule, 30.0),
            self.lines.put_nowait,
            **{"wall": lambda: NOW, "poll": 0.01, **options},
        )

    async def told(self):
        user, payload = await self.ear.said.get()
        return user, wire.unseal("toys", user, payload, wire.Told)[0]


@contextlib.asynccontextmanager
async def working(office, **options):
    counter = Counter(office, **options)
    lives = [asyncio.ensure_future(one) for one in (counter.ear.link.run(counter.ear), counter.responder.run())]
    # The registry is opened in a thread.
    while not counter.responder.link.settled:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    async with asyncio.timeout(20):
        yield counter
    lives[1].cancel()
    await counter.ear.link.close()
    await asyncio.gather(*lives, return_exceptions=True)


def ask(device, claim, **options):
    return device.payload(claim.user, claim.signing_key, **options)


def test_it_answers_who_asks(tmp_path):
    office = Office(tmp_path)

    async def play():
        async with working(office) as counter:
            claim, device = office.claim(), Device(office, "pi-7")
            counter.ear.ask(claim.user, ask(device, claim))
            user, told = await counter.told()
            assert user == claim.user
            assert issued(told).public == device.key.public
            assert await counter.lines.get() == f"enrolment: 'pi-7' enrolled by {claim.user}, fedge 1"

    asyncio.run(play())


def test_who_was_approved_is_told_without_asking_again(tmp_path):
    office = Office(tmp_path, "ask")

    async def play():
        async with working(office) as counter:
            claims = office.claims(2)
            for number, claim in enumerate(claims):
                counter.ear.ask(claim.user, ask(Device(office, f"pi-{number}"), claim))
                assert (await counter.told())[1].status == "pending"
            office.registry.decide(claims[1].user, approved=True)
            user, told = await counter.told()
            assert (user, told.status) == (claims[1].user, "issued")
            office.registry.decide(claims[0].user, approved=False, detail="no")
            user, told = await counter.told()
            assert (user, told.status, told.detail) == (claims[0].user, "refused", "no")

    asyncio.run(play())


def test_brokers_hear_who_is_enrolled_and_who_is_not_any_more(tmp_path):
    office = Office(tmp_path)
    Device(office, "pi-1").ask(office.claim())

    async def play():
        heard = asyncio.Queue()
        changed = lambda valid, gone: heard.put_nowait((valid, gone)) or ["told"]  # noqa: E731
        async with working(office, changed=changed) as counter:
            assert await heard.get() == (("pi-1",), ())
            claim = office.claim()
            counter.ear.ask(claim.user, ask(Device(office, "pi-2"), claim))
            assert await heard.get() == (("pi-1", "pi-2"), ())
            office.registry.revoke("pi-1", NOW)
            assert await heard.get() == (("pi-2",), ("pi-1",))
        assert heard.empty()

    asyncio.run(play())


def test_a_flood_is_neither_answered_nor_logged_and_others_are_heard(tmp_path):
    office = Office(tmp_path)

    async def play():
        async with working(office) as counter:
            thief, claim, device = office.claim(), office.claim(), Device(office, "pi-7")
            payload = ask(Device(office, "thief"), thief)
            for _ in range(2000):
                counter.ear.ask(thief.user, payload)
            for number in range(200):
                counter.ear.ask(f"@claim-{number:08x}", bytes(40))
            user = ""
            while user != claim.user:
                counter.ear.ask(claim.user, ask(device, claim))
                with contextlib.suppress(TimeoutError):
                    user, told = await asyncio.wait_for(counter.told(), 0.05)
            assert issued(told).public == device.key.public
        lines = [counter.lines.get_nowait() for _ in range(counter.lines.qsize())]
        assert len(lines) <= 23
        assert f"enrolment: 'pi-7' enrolled by {claim.user}, fedge 1" in lines

    asyncio.run(play())


@pytest.mark.parametrize("topic", ["fedge/toys/enrol/@server/ask", "fedge/toys/enrol/a/b"])
def test_topics_on_which_nobody_asks_are_refused(tmp_path, topic):
    office = Office(tmp_path)

    async def play():
        counter = Counter(office)
        counter.responder.message(topic, b"x")
        assert "is not one on which a device asks" in counter.lines.get_nowait()
        counter.responder.message(wire.ask_topic("toys", "pi-7"), bytes(wire.LIMIT + 1))
        assert counter.lines.empty()

    asyncio.run(play())


def test_an_answer_that_fails_is_said_and_the_next_one_is_given(tmp_path):
    office = Office(tmp_path)

    async def play():
        async with working(office) as counter:
            whole = Registrar.answer
            claims = office.claims(2)

            def fail(self, user, payload, now):
                raise LedgerError("the disk is full")

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Registrar, "answer", fail)
                counter.ear.ask(claims[0].user, b"x")
                assert await counter.lines.get() == f"enrolment: {claims[0].user} gets no answer: the disk is full"
            assert Registrar.answer is whole
            counter.ear.ask(claims[1].user, ask(Device(office, "pi-7"), claims[1]))
            assert (await counter.told())[1].status == "issued"

    asyncio.run(play())


def test_without_the_authoritys_key_nobody_is_enrolled_and_that_is_said(tmp_path):
    Office(tmp_path)
    (tmp_path / "ca.key").unlink()

    async def play():
        lines = []
        async with responding(tmp_path, "toys", pytest.fail, lines.append):
            pass
        assert "ca.key is not there" in lines[0]

    asyncio.run(play())


def test_another_federations_authority_is_refused(tmp_path):
    Office(tmp_path)

    async def play():
        async with responding(tmp_path, "others", pytest.fail, print):
            pass

    with pytest.raises(ConfigError, match="authority of 'toys'; expected that of 'others'"):
        asyncio.run(play())


def test_a_registry_that_cannot_be_used_ends_enrolment_with_a_word_and_not_the_server(tmp_path):
    Office(tmp_path)
    (tmp_path / REGISTRY).write_bytes(b"x" * 5000)

    async def play():
        lines = asyncio.Queue()
        async with responding(tmp_path, "toys", lambda name: MemoryLink(MemoryBroker()), lines.put_nowait):
            assert "enrolment has ended" in await lines.get()

    asyncio.run(play())


def test_a_flood_on_one_topic_is_dropped_before_anything_is_made_of_it(tmp_path):
    office = Office(tmp_path)

    async def play():
        responder = Counter(office).responder
        for number in range(1000):
            responder.message(wire.ask_topic("toys", "@claim-00000000"), b"%d" % number + bytes(10_000))
            responder.message(wire.ask_topic("toys", "@claim-00000001"), bytes(wire.LIMIT + 1))
        flooded = responder._queue.qsize()
        responder.message(wire.ask_topic("toys", "pi-7"), b"somebody else")
        return flooded, responder._queue.qsize()

    flooded, after = asyncio.run(play())
    assert 1 <= flooded <= 30
    assert after == flooded + 1
