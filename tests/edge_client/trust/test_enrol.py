"""A device asks until it is told, believes the federation alone, and stores what it was given."""

import asyncio
import contextlib
import random

import msgspec
import pytest

from broker_server.registrar import Registrar
from edge_client.errors import ConfigError, TransportError
from edge_client.events import Connected, Disconnected, Log, Publish, Received, Subscribe, Tick
from edge_client.memory import MemoryBroker, MemoryLink
from edge_client.trust import enrol
from edge_client.trust.certificate import make_request
from edge_client.trust.enrol import Enrolment, Granted, Refused, enroll, keep_renewed, renew, renewing, warnings
from edge_client.trust.identity import Identity
from edge_client.trust.keys import SigningKey
from edge_client.wire import enrolment as wire
from tests.office import DAY, NONCE, NOW, Office


@pytest.fixture(scope="module")
def office(tmp_path_factory):
    return Office(tmp_path_factory.mktemp("office") / "authority")


class Asking:
    """A device whose state machine is driven by hand, with the claim it has."""

    def __init__(self, office, client="pi-7"):
        self.office, self.claim, self.key = office, office.claim(), SigningKey.generate()
        sign, pins = self.claim.signing_key.sign, self.claim.publics
        self.machine = Enrolment(
            "toys", self.claim.user, client, self.key, sign, pins, "fedge 1", NONCE, random.Random(1)
        )
        self.topic = wire.told_topic("toys", self.claim.user)

    def does(self, event, now=0.0):
        return list(self.machine.handle(event, now))

    def hears(self, told, *, sign=None, user=None, topic=None):
        sign = sign or self.office.authority.signing.sign
        return self.does(Received(topic or self.topic, wire.seal("toys", user or self.claim.user, told, sign)))

    def told(self, **changes):
        """What the federation tells a device that may have a certificate, with changes."""
        certificate = self.office.authority.issue(make_request(self.key, "pi-7"), "pi-7", 30.0, now=NOW)
        told = wire.Told(
            NONCE,
            "issued",
            "",
            certificate.der,
            self.office.authority.certificate.der,
            self.office.authority.pins,
            NOW,
        )
        return msgspec.structs.replace(told, **changes)


def test_it_subscribes_before_it_asks_and_asks_the_same_again(office):
    asking = Asking(office)
    subscribe, ask = asking.does(Connected())
    assert subscribe == Subscribe((asking.topic,))
    assert isinstance(ask, Publish)
    assert ask.topic == wire.ask_topic("toys", asking.claim.user)
    assert asking.does(Tick(), 1.0) == []
    now, pauses = 0.0, []
    for _ in range(8):
        pauses.append(asking.machine.wake - now)
        now = asking.machine.wake
        *said, again = asking.does(Tick(), now)
        assert again == ask
        assert all(isinstance(one, Log) and "nobody answers" in one.text for one in said)
    assert 1.5 <= pauses[0] <= 2.5
    assert 22.5 <= pauses[-1] <= 37.5


def test_that_nobody_answers_is_said_once_a_connection(office):
    asking = Asking(office)
    asking.does(Connected())
    lines = [one for _ in range(9) for one in asking.does(Tick(), asking.machine.wake) if isinstance(one, Log)]
    assert len(lines) == 1
    assert "ca.key" in lines[0].text


def test_without_a_connection_it_waits_and_with_a_new_one_it_asks_again(office):
    asking = Asking(office)
    asking.does(Connected())
    assert asking.does(Disconnected()) == []
    assert asking.machine.wake is None
    assert asking.does(Tick(), 1e9) == []
    assert [type(one) for one in asking.does(Connected(), 5.0)] == [Subscribe, Publish]


def test_it_takes_the_certificate_that_it_asked_for_once(office):
    asking = Asking(office)
    asking.does(Connected())
    (granted,) = asking.hears(asking.told())
    assert isinstance(granted, Granted)
    assert granted.certificate.public == asking.key.public
    assert (granted.pins, granted.issued) == (office.authority.pins, NOW)
    assert asking.machine.wake is None
    assert asking.hears(asking.told()) == asking.does(Connected()) == asking.does(Tick(), 9e9) == []


def test_a_refusal_is_the_end(office):
    asking = Asking(office)
    asking.does(Connected())
    assert asking.hears(wire.Told(NONCE, "refused", "because")) == [Refused("because")]
    assert asking.hears(asking.told()) == []


def test_it_waits_for_a_person_patiently_and_says_so_once(office):
    asking = Asking(office)
    asking.does(Connected())
    pending = wire.Told(NONCE, "pending", "ask the operator")
    (said,) = asking.hears(pending)
    assert "waiting for approval of pi-7 by @claim-" in said.text
    assert 45.0 <= asking.machine.wake <= 75.0
    assert asking.hears(pending) == []
    (again,) = asking.does(Tick(), asking.machine.wake)
    assert isinstance(again, Publish)
    assert isinstance(asking.hears(asking.told())[0], Granted)


# What a man at the broker can say.

FORGED = {
    "a certificate in the federation's name": {"sign": SigningKey.generate().sign},
    "a refusal in the federation's name": {"told": wire.Told(NONCE, "refused"), "sign": SigningKey.generate().sign},
    "unsigned": {"sign": lambda _: b""},
    "the answer to another question": {"nonce": bytes(16)},
    "the answer to another user": {"user": "@claim-00000000"},
}


@pytest.mark.parametrize("case", FORGED)
def test_what_the_federation_has_not_said_to_this_device_now_is_not_believed(office, case):
    asking = Asking(office)
    asking.does(Connected())
    wake = asking.machine.wake
    forged = dict(FORGED[case])
    told = forged.pop("told", None) or asking.told(nonce=forged.pop("nonce", NONCE))
    (said,) = asking.hears(told, **forged)
    assert "dropped an answer" in said.text
    # It is said once, and the device goes on.
    assert asking.hears(told, **forged) == []
    assert asking.machine.wake == wake
    assert isinstance(asking.hears(asking.told())[0], Granted)


def test_another_key_cannot_be_slipped_in(office):
    """A man at the broker with a pin of his own can sign what he likes: the device knows the federation's already."""
    asking, thief = Asking(office), SigningKey.generate()
    asking.does(Connected())
    (said,) = asking.hears(asking.told(pins=(thief.public,)), sign=thief.sign)
    assert "has not signed" in said.text


@pytest.mark.parametrize("payload", [b"", b"\xc1", bytes(20_000), bytes(200)], ids=range(4))
def test_nonsense_is_dropped(office, payload):
    asking = Asking(office)
    asking.does(Connected())
    (said,) = asking.does(Received(asking.topic, payload))
    assert "dropped an answer" in said.text


def test_other_topics_are_not_for_it(office):
    asking = Asking(office)
    asking.does(Connected())
    assert asking.hears(asking.told(), topic="fedge/toys/pub/offer") == []


def test_what_was_issued_has_to_be_what_was_asked_for(office, tmp_path):
    other = Office(tmp_path, number=1)
    theirs = other.authority.issue(make_request(SigningKey.generate(), "pi-7"), "pi-7", 30.0, now=NOW)
    for changes, words in (
        ({"certificate": theirs.der}, "another key or name"),
        ({"authority": other.authority.certificate.der}, "not issued by"),
        ({"certificate": b"x"}, "cannot be read"),
        ({"pins": ()}, "without the federation's keys"),
        ({"issued": NOW + 31 * DAY}, "no time to live"),
    ):
        asking = Asking(office)
        asking.does(Connected())
        (refused,) = asking.hears(asking.told(**changes))
        assert isinstance(refused, Refused)
        assert words in refused.reason


# The driver, over a broker in memory.


class Desk:
    """Answers on a broker in memory, with what the registrar says; the first ``deaf`` Asks are lost."""

    def __init__(self, registrar: Registrar, broker: MemoryBroker, wall=lambda: NOW, deaf: int = 0):
        self.registrar, self.link, self.wall, self.deaf = registrar, MemoryLink(broker), wall, deaf
        self.heard = 0

    def connected(self):
        self.link.subscribe(("fedge/toys/enrol/#",))

    def disconnected(self, reason):
        pass

    def message(self, topic, payload):
        if topic.endswith("/told"):
            return
        self.heard += 1
        user = wire.parse_ask("toys", topic)
        answer = self.registrar.answer(user, payload, self.wall())
        if answer.told is not None and self.heard > self.deaf:
            self.link.publish(wire.told_topic("toys", user), answer.told)


@contextlib.asynccontextmanager
async def served(office, **options):
    broker = MemoryBroker()
    desk = Desk(office.registrar, broker, **options)
    life = asyncio.ensure_future(desk.link.run(desk))
    await asyncio.sleep(0)
    yield broker, desk
    await desk.link.close()
    await life


def joining(broker):
    return lambda name: MemoryLink(broker)


def test_a_claim_becomes_an_identity(office, tmp_path):
    async def play():
        lines = []
        async with served(office) as (broker, _):
            made = await enroll(office.claim(), "pi-7", tmp_path / "identity", lines.append, connect=joining(broker))
        assert made == Identity.load(tmp_path / "identity")
        assert (made.client, made.federation, made.issued) == ("pi-7", "toys", NOW)
        assert office.registry.keys(NOW)["pi-7"] == made.key.public
        assert lines == []
        # What the claim was for TLS is gone.
        assert {path.suffix for path in (tmp_path / "identity").iterdir()} == {".key", ".crt", ".pub", ".json"}

    asyncio.run(play())


def test_a_lost_answer_is_asked_for_again(office, tmp_path, monkeypatch):
    monkeypatch.setattr(enrol, "_SOON", 0.001)

    async def play():
        async with served(office, deaf=2) as (broker, desk):
            made = await enroll(office.claim(), "pi-lost", tmp_path, print, connect=joining(broker))
        assert desk.heard >= 3
        assert office.registry.device("pi-lost").serial == made.serial

    asyncio.run(play())


def test_broken_off_it_goes_on_with_the_same_key_and_claim(office, tmp_path):
    async def play():
        claim = office.claim()
        with pytest.raises(TransportError, match="goes on where it was"):
            await enroll(claim, "pi-off", tmp_path, print, connect=joining(MemoryBroker()), patience=0.01)
        key = SigningKey.load(tmp_path / "device.key").public
        assert not Identity.there(tmp_path)
        async with served(office, deaf=1) as (broker, _):
            # The answer is lost and with it the power: the claim is used, and the device has nothing yet.
            with pytest.raises(TransportError):
                await enroll(claim, "pi-off", tmp_path, print, connect=joining(broker), patience=0.1)
            assert office.registry.claim(claim.user).state == "issued"
            made = await enroll(claim, "pi-off", tmp_path, print, connect=joining(broker))
        assert made.key.public == key

    asyncio.run(play())


def test_on_an_enrolled_device_it_does_nothing(office, tmp_path, monkeypatch):
    monkeypatch.setattr(enrol.time, "time", lambda: NOW)

    async def play():
        lines, spare = [], office.claim()
        async with served(office) as (broker, desk):
            made = await enroll(office.claim(), "pi-done", tmp_path, print, connect=joining(broker))
            heard = desk.heard
            assert await enroll(spare, "pi-done", tmp_path, lines.append, connect=joining(broker)) == made
            assert desk.heard == heard
            with pytest.raises(ConfigError, match="identity of 'pi-done'"):
                await enroll(spare, "pi-other", tmp_path, print, connect=joining(broker))
        (line,) = lines
        assert line.startswith(
            "pi-done is enrolled in 'toys' already; the claim was not used (for another key, remove "
        )
        assert office.registry.claim(spare.user).state == "open"

    asyncio.run(play())


def test_a_refusal_is_an_error_with_the_reason(office, tmp_path):
    async def play():
        claim = office.claim()
        async with served(office) as (broker, _):
            await enroll(claim, "pi-first", tmp_path / "1", print, connect=joining(broker))
            with pytest.raises(ConfigError, match="'toys' refuses 'pi-second': the claim was used already"):
                await enroll(claim, "pi-second", tmp_path / "2", print, connect=joining(broker))
        assert not Identity.there(tmp_path / "2")

    asyncio.run(play())


def test_names_that_no_device_has_are_refused_before_anything_is_written(office, tmp_path):
    with pytest.raises(ConfigError, match="--id 'fs-1'"):
        asyncio.run(enroll(office.claim(), "fs-1", tmp_path / "identity", print))
    assert not (tmp_path / "identity").exists()


def enrolled(office, folder, client):
    async def play():
        async with served(office) as (broker, _):
            return await enroll(office.claim(), client, folder, print, connect=joining(broker))

    return asyncio.run(play())


def test_a_certificate_is_renewed_for_the_same_key(office, tmp_path):
    first, later = enrolled(office, tmp_path, "pi-renew"), NOW + 25 * DAY

    async def play():
        async with served(office, wall=lambda: later) as (broker, _):
            return await renew(first, print, joining(broker))

    second = asyncio.run(play())
    assert second == Identity.load(tmp_path)
    assert second.serial != first.serial
    assert (second.issued, second.expires) == (later, later + 30 * DAY)
    assert second.key.public == first.key.public
    assert office.registry.keys(later)["pi-renew"] == first.key.public


class Broken(MemoryLink):
    async def run(self, handler):
        raise TransportError("no broker")


def test_it_is_renewed_by_itself_when_it_is_due_and_tried_again_until_it_is(office, tmp_path):
    identity, later = enrolled(office, tmp_path, "pi-self"), NOW + 25 * DAY

    async def play():
        lines, broken = [], [Broken(MemoryBroker())]
        async with served(office, wall=lambda: later) as (broker, desk):
            times = iter([NOW, later, later, NOW, NOW])
            done = asyncio.Event()

            def wall():
                now = next(times, None)
                if now is None:
                    done.set()
                return now or NOW

            task = asyncio.ensure_future(
                keep_renewed(
                    identity,
                    lines.append,
                    lambda name: broken.pop() if broken else MemoryLink(broker),
                    wall=wall,
                    every=0.0,
                )
            )
            async with asyncio.timeout(10):
                await done.wait()
            task.cancel()
            assert desk.heard == 1
        assert "could not be renewed yet: no broker" in lines[0]
        assert lines[1:] == ["the certificate of pi-self holds until 2027-03-11: it was renewed"]
        assert Identity.load(tmp_path).issued == later

    asyncio.run(play())


def test_it_is_kept_renewed_while_the_device_runs_and_no_longer(office, tmp_path):
    identity, later = enrolled(office, tmp_path, "pi-run"), NOW + 25 * DAY

    async def play():
        said = asyncio.Queue()
        async with served(office, wall=lambda: later) as (broker, desk), asyncio.timeout(10):
            async with renewing(identity, said.put_nowait, joining(broker), wall=lambda: later):
                line = await said.get()
            assert desk.heard == 1
        assert line.startswith("the certificate of pi-run holds until ")
        assert line.endswith(": it was renewed")
        assert Identity.load(tmp_path).issued == later

    asyncio.run(play())


def test_what_is_said_of_clock_and_certificate_before_they_are_used(office, tmp_path):
    identity = enrolled(office, tmp_path, "pi-clock")
    assert list(warnings(identity, NOW)) == []
    (doubt,) = warnings(identity, NOW - 3 * DAY)
    assert "the clock shows" in doubt
    assert "when this device was enrolled" in doubt
    (over,) = warnings(identity, identity.expires)
    assert "which is over" in over
