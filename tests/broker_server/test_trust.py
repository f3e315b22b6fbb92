"""A coordinator that signs: whom it believes, what it refuses, and who is not listened to any more."""

import hashlib
from dataclasses import dataclass, field

import pytest

from broker_server import events as e
from edge_client.wire import messages as m
from edge_client.wire import transfer
from edge_client.wire.voice import SignedMember
from tests import signing
from tests.broker_server.desk import BUNDLE, NAME, TOPICS, Desk, Paper, digest, of, settings, told, update

WALL = 1_800_000_000.0
DAY = 86_400.0
ROUND = {"cohort": 2, "clients": 2, "minimum": 1, "deadline": 60.0}
BUFFERED = {"mode": "buffered", "concurrency": 2, "buffer": 2, "clients": 2}
MODES = pytest.mark.parametrize("rounds", [ROUND, BUFFERED], ids=["rounds", "buffered"])


@dataclass
class Federation:
    """A desk that signs, and clients that do."""

    rounds: dict = field(default_factory=lambda: ROUND)
    sections: dict = field(default_factory=dict)
    paper: Paper | None = None
    revoked: set = field(default_factory=set)
    renewed: dict[str, bytes] = field(default_factory=dict)
    members: dict[str, SignedMember] = field(default_factory=dict)

    def __post_init__(self):
        config = settings(**({"round": self.rounds, "transfer": {"inline": 0, "chunk": 1024}} | self.sections))

        def voice(epoch):
            return signing.host(NAME, epoch, revoked=self.revoked, keys=self.renewed)

        self.desk = Desk(config, self.paper, voice=voice, wall=WALL)

    def member(self, client):
        return self.members.setdefault(client, signing.member(NAME, client))

    def say(self, client, message, epoch=None, voice=None):
        payload = (voice or self.member(client)).say(message, self.desk.restored.epoch if epoch is None else epoch)
        return self.raw(client, payload)

    def raw(self, client, payload):
        return self.desk.feed(e.Received(TOPICS.up(client), payload))

    def hello(self, *clients, epoch=None, boot=b"boot0000", voice=None):
        actions = []
        for client in clients:
            epoch_ = self.desk.restored.epoch if epoch is None else epoch
            said = m.Hello(epoch_, boot, BUNDLE.sha256, 0, digest(0), 10, True)
            actions += self.say(client, said, epoch, voice)
        return actions

    def upload(self, data=None, **who):
        """An announcement for the open task of a client."""
        ((client, samples),) = who.items()
        epoch, number = self.task(client)
        return m.Upload(epoch, number, transfer.refer(data or update(samples), chunk=1024))

    def task(self, client):
        open_ = [one for identity, one in self.desk.paper.tasks.items() if identity not in self.desk.paper.outcomes]
        return next((one.epoch, one.task) for one in open_ if client in one.cohort)

    @property
    def recorded(self):
        return sorted(client for updates in self.desk.paper.updates.values() for client in updates)

    @property
    def dropped(self):
        return self.desk.coordinator.dropped, self.desk.coordinator.distrusted


def faults(actions):
    return [(action.client, action.kind) for action in of(actions, e.Misconduct)]


# What the server says.


@MODES
def test_a_whole_round_is_signed_and_believed_on_both_sides(rounds):
    table = Federation(rounds)
    (offered,) = of(table.desk.actions, e.Retain)
    for client in ("a", "b"):
        assert isinstance(table.member(client).hear(offered.payload), m.Offer)
    actions = table.hello("a", "b")
    for client in ("a", "b"):
        (invited,) = [
            table.member(client).hear(action.payload)
            for action in of(actions, e.Publish)
            if action.topic == TOPICS.down(client)
        ]
        assert isinstance(invited, m.Invitation)
        assert (invited.epoch, invited.task) == table.task(client)
    first = table.say("a", table.upload(a=10))
    second = table.say("b", table.upload(b=20))
    assert told(first, "a", m.Receipt)[0].status == told(second, "b", m.Receipt)[0].status == "recorded"
    assert table.desk.paper.sums == [30]
    assert table.dropped == (0, 0)


def test_an_offer_has_a_date_and_is_dated_anew_long_before_it_expires():
    table = Federation(sections={"trust": {"authority": "x", "offer_days": 4.0}})
    (first,) = of(table.desk.actions, e.Retain)
    offer = m.decode(first.payload)
    assert (offer.issued, offer.expires) == (WALL, WALL + 4 * DAY)
    assert table.desk.feed(e.Clock(WALL + 0.9 * DAY)) == []
    (again,) = of(table.desk.feed(e.Clock(WALL + 1.1 * DAY)), e.Retain)
    assert m.decode(again.payload).issued == WALL + 1.1 * DAY
    member = table.member("a")
    member.hear(first.payload)
    member.hear(again.payload)
    with pytest.raises(Exception, match="an old offer"):
        member.hear(first.payload)


@pytest.mark.parametrize("restarted", [False, True])
def test_a_clock_that_is_set_back_does_not_date_an_offer_before_an_earlier_one(restarted):
    paper = Paper()
    table = Federation(paper=paper)
    table.desk.feed(e.Clock(WALL + 300 * DAY))  # it was wrong
    assert paper.issued == WALL + 300 * DAY
    if restarted:
        table = Federation(paper=paper)
        (offer,) = of(table.desk.actions, e.Retain)
        assert "the date of an earlier offer" in of(table.desk.actions, e.Log)[0].text
        assert m.decode(offer.payload).issued == WALL + 300 * DAY
    assert table.desk.feed(e.Clock(WALL)) == []
    assert table.desk.feed(e.Clock(WALL + 299 * DAY)) == []
    (again,) = of(table.desk.feed(e.Clock(WALL + 310 * DAY)), e.Retain)
    assert m.decode(again.payload).issued == paper.issued == WALL + 310 * DAY


def test_a_federation_that_does_not_sign_dates_nothing():
    (retained,) = of(Desk(settings()).actions, e.Retain)
    assert (m.decode(retained.payload).issued, m.decode(retained.payload).expires) == (0.0, 0.0)


# Offers that others put in its place.


@pytest.mark.parametrize("kind", ["forged", "older", "changed", "unsigned"])
def test_another_offer_in_its_place_is_put_right(kind):
    table = Federation()
    (mine,) = of(table.desk.actions, e.Retain)
    offer = m.decode(mine.payload)
    other = {
        "forged": lambda: signing.host(NAME, 99, key=b"mallory").proclaim(m.Offer(NAME, 99, BUNDLE, 0.0)),
        "older": lambda: signing.host(NAME, 0).proclaim(m.Offer(NAME, 0, BUNDLE, 0.0)),
        "changed": lambda: signing.host(NAME, 1).proclaim(m.Offer(NAME, 1, offer.bundle, 5.0, finished=True)),
        "unsigned": lambda: m.encode(m.Offer(NAME, 99, BUNDLE, 0.0)),
    }[kind]()
    assert of(table.desk.feed(e.Received(TOPICS.offer, other)), e.Retain) == [mine]
    # Not for each of a thousand: the next one is put right a moment later.
    assert of(table.desk.feed(e.Received(TOPICS.offer, other)), e.Retain) == []
    assert len(of(table.desk.wait(2.0), e.Retain)) == 1
    assert not of(table.desk.actions, e.Fenced)


def test_its_own_offer_that_comes_back_moves_nothing():
    table = Federation()
    (mine,) = of(table.desk.actions, e.Retain)
    assert table.desk.feed(e.Received(TOPICS.offer, mine.payload)) == []


def test_a_newer_server_of_the_federation_fences_this_one_and_a_forged_one_does_not():
    table = Federation()
    newer = m.Offer(NAME, 9, BUNDLE, 0.0)
    assert not of(table.desk.feed(e.Received(TOPICS.offer, signing.host(NAME, 9, key=b"m").proclaim(newer))), e.Fenced)
    assert of(table.desk.feed(e.Received(TOPICS.offer, signing.host(NAME, 9).proclaim(newer))), e.Fenced)


# Messages that are not believed.


@MODES
def test_an_update_in_another_devices_name_is_refused(rounds):
    table = Federation(rounds)
    table.hello("a", "b")
    forged = signing.member(NAME, "b", 7, key=signing.key_of("a"))
    actions = table.say("b", table.upload(b=1_000_000), voice=forged)
    assert not told(actions, "b")
    table.raw("b", table.member("a").say(table.upload(b=1_000_000), 1))
    assert table.recorded == []
    assert table.dropped == (2, 2)
    table.say("b", table.upload(b=20))
    assert table.recorded == ["b"]


@MODES
def test_a_replayed_update_is_refused_also_for_a_later_task(rounds):
    table = Federation(rounds)
    table.hello("a", "b")
    payload = table.member("a").say(table.upload(a=10), 1)
    table.raw("a", payload)
    assert table.recorded == ["a"]
    assert not told(table.raw("a", payload), "a")
    assert table.dropped == (1, 1)


def test_an_update_that_was_tampered_with_is_refused():
    table = Federation()
    table.hello("a", "b")
    payload = table.member("a").say(table.upload(a=10), 1)
    at = payload.index(b'"samples":10') + len(b'"samples":')
    table.raw("a", payload[:at] + b"9" + payload[at + 1 :])
    assert table.recorded == []
    assert table.dropped == (1, 1)
    table.raw("a", payload)
    assert table.recorded == ["a"]


def test_chunks_that_were_tampered_with_never_make_up_an_update():
    table = Federation()
    table.hello("a", "b")
    data = update(10) + b" " * 3000
    epoch, task = table.task("a")
    ref = transfer.refer(data, chunk=1024, inline=0)
    table.say("a", m.Upload(epoch, task, ref))
    pieces = [transfer.piece(data, ref, index) for index in range(3)]
    for index, piece in enumerate([pieces[0].replace(b"10", b"90"), *pieces[1:]]):
        table.desk.feed(e.Received(TOPICS.uploaded("a", ref.sha256, index), piece))
    assert table.recorded == []
    table.say("a", m.Upload(epoch, task, ref))
    for index, piece in enumerate(pieces):
        table.desk.feed(e.Received(TOPICS.uploaded("a", ref.sha256, index), piece))
    assert table.recorded == ["a"]


def test_an_unsigned_message_is_refused_and_the_log_says_why_once():
    table = Federation()
    hello = m.Hello(1, b"boot0000", BUNDLE.sha256, 0, digest(0), 10, True)
    actions = [action for _ in range(3) for action in table.raw("a", m.encode(hello))]
    (line,) = of(actions, e.Log)
    assert "not signed" in line.text
    assert table.desk.coordinator.clients == 0


def test_what_was_said_under_an_older_epoch_brings_the_offer_and_nothing_else():
    first = Federation()
    first.hello("a", "b")
    old = first.member("a").say(first.upload(a=10), 1)
    paper = first.desk.paper
    table = Federation(paper=paper, members=first.members)
    assert table.desk.restored.epoch == 2
    (answer,) = table.raw("a", old)
    assert answer.topic == TOPICS.down("a")
    assert table.member("a").hear(answer.payload).epoch == 2
    assert table.recorded == []
    assert table.dropped == (0, 0)


def test_a_stranger_is_not_heard():
    table = Federation(revoked={"x"})
    table.hello("x")
    assert table.desk.coordinator.clients == 0
    assert table.dropped == (1, 1)


@MODES
def test_a_revoked_device_is_not_asked_and_not_believed_from_now_on(rounds):
    table = Federation(rounds)
    table.hello("a", "b")
    table.revoked.add("a")
    actions = table.desk.feed(e.Rekeyed((), ("a",)))
    assert any("a is not enrolled any more" in line.text for line in of(actions, e.Log))
    assert table.desk.coordinator.clients == 1
    table.say("a", table.upload(a=10))
    table.hello("a")
    assert table.recorded == []
    assert table.desk.coordinator.clients == 1


def test_a_device_that_is_enrolled_anew_is_believed_whatever_its_life_and_its_past():
    table = Federation(renewed={"a": b"the first key"})
    table.hello("a", voice=signing.member(NAME, "a", 1000, key=b"the first key"))
    for _ in range(1000):
        table.raw("a", b"rubbish")
    assert table.desk.coordinator.clients == 0
    table.renewed.clear()
    table.desk.feed(e.Rekeyed(("a",), ()))
    table.hello("a", voice=signing.member(NAME, "a", 1))
    assert table.desk.coordinator.clients == 1


# Two devices with one key.


def test_two_devices_with_one_key_are_noticed():
    table = Federation()
    table.hello("a", boot=b"boot-one")
    twin, found = signing.member(NAME, "a"), []
    for _ in range(4):
        found += faults(table.hello("a", boot=b"boot-two", voice=twin))
        found += faults(table.hello("a", boot=b"boot-one"))
    assert found == [("a", "twin")]
    assert any("copied card" in line.text for line in of(table.desk.actions, e.Log))


def test_two_devices_with_one_name_are_noticed_without_signatures_too():
    table, found = Desk(settings(round=ROUND)), []
    for _ in range(5):
        found += faults(table.hello("a", boot=b"boot-one")) + faults(table.hello("a", boot=b"boot-two"))
    assert found == [("a", "twin")]


# Devices that misbehave, whether anything is signed or not.


def test_a_flood_of_one_client_is_dropped_and_the_others_finish_their_round():
    table = Desk(settings(round=ROUND | {"cohort": 2, "clients": 2}))
    table.hello("a", "b", "x")
    hello, found = m.Hello(1, b"boot0000", BUNDLE.sha256, 0, digest(0), 10, True), []
    for _ in range(1000):
        found += faults(table.say("x", hello))
    assert found == [("x", "muted")]
    assert table.coordinator.ignores(TOPICS.up("x"), table.now)
    assert not table.coordinator.ignores(TOPICS.up("a"), table.now)
    assert table.coordinator.clients == 2
    for client in ("a", "b"):
        if client in table.cohort:
            table.upload(client)
    assert len(table.paper.updates[1, 1]) >= 1
    assert table.coordinator.dropped > 500


def test_a_muted_client_is_heard_again_when_its_time_is_over():
    table = Desk(settings(limits={"mute_seconds": 60.0}))
    for _ in range(10):
        table.feed(e.Received(TOPICS.up("x"), b"rubbish"))
    table.hello("x")
    assert table.coordinator.clients == 0
    table.wait(61.0)
    table.hello("x")
    assert table.coordinator.clients == 1


def test_a_client_whose_updates_cannot_be_used_is_muted_and_its_place_in_the_round_is_given_away():
    table = Desk(settings(round=ROUND | {"cohort": 1, "clients": 2}, limits={"strikes": 1.0}))
    table.hello("a", "b")
    (liar,) = table.cohort
    actions = table.upload(liar, b"no update")
    assert told(actions, liar, m.Receipt)[0].status == "refused"
    assert faults(actions) == [(liar, "muted")]
    (other,) = {"a", "b"} - {liar}
    assert table.upload(other) != []
    assert table.paper.version == 1


def test_unasked_chunks_are_charged_and_those_that_were_asked_for_are_free():
    limits = {"messages": 1.0, "bytes": 1e6, "strikes": 1.0}
    table = Desk(settings(round=ROUND, transfer={"inline": 0, "chunk": 1024, "window": 4}, limits=limits))
    table.hello("a", "b")
    data = b"x" * 1024 * 100
    data = data[:19_000]
    ref = transfer.refer(data, chunk=1024, inline=0)
    table.say("a", m.Upload(*table.task, ref))
    for index in range(18):
        assert not faults(
            table.feed(e.Received(TOPICS.uploaded("a", ref.sha256, index), transfer.piece(data, ref, index)))
        )
    found = []
    for _ in range(60):
        found += faults(table.feed(e.Received(TOPICS.uploaded("b", hashlib.sha256(b"").digest(), 0), bytes(1024))))
    assert found[:1] == [("b", "muted")]


def test_repeating_a_chunk_that_has_come_is_charged():
    limits = {"messages": 1.0, "bytes": 1e6, "strikes": 1.0}
    table = Desk(settings(round=ROUND, transfer={"inline": 0, "chunk": 1024, "window": 4}, limits=limits))
    table.hello("a", "b")
    data = b"x" * 5000
    ref = transfer.refer(data, chunk=1024, inline=0)
    table.say("a", m.Upload(*table.task, ref))
    found = []
    for _ in range(60):
        found += faults(table.feed(e.Received(TOPICS.uploaded("a", ref.sha256, 0), transfer.piece(data, ref, 0))))
    assert found == [("a", "muted")]


def test_a_message_that_clears_is_not_held_against_its_client():
    table = Federation()
    table.hello("a", "b")
    for topic in (TOPICS.up("a"), TOPICS.uploaded("a", bytes(32), 0)):
        assert table.desk.feed(e.Received(topic, b"")) == []
    assert table.dropped == (0, 0)


# In whose name things are said.


@pytest.mark.parametrize("size", [10, 100_000])
def test_topics_outside_the_grammar_are_charged_to_the_client_whose_they_are(size):
    table = Desk(settings(round=ROUND))
    table.hello("a", "b")
    found = []
    for _ in range(1000):
        found += faults(table.feed(e.Received(f"fedge/{NAME}/up/a/junk", bytes(size))))
    assert found == [("a", "muted")]
    assert table.coordinator.ignores(f"fedge/{NAME}/up/a/else/where", table.now)
    assert not table.coordinator.ignores(TOPICS.up("b"), table.now)
    assert table.coordinator.clients == 1


def test_topics_outside_the_grammar_are_charged_where_all_is_signed_too():
    table, found = Federation(), []
    table.hello("a", "b")
    for _ in range(5000):
        found += faults(table.desk.feed(e.Received(f"fedge/{NAME}/up/a/junk", bytes(100_000))))
    assert found == [("a", "muted")]


def test_topics_of_nobody_are_dropped():
    table = Desk(settings(round=ROUND))
    for topic in (f"fedge/{NAME}/up", "fedge/others/up/a/msg", f"fedge/{NAME}/up/-!/msg", f"fedge/{NAME}/up/a"):
        table.feed(e.Received(topic, b"x"))
        assert not table.coordinator.ignores(topic, table.now)
    assert table.coordinator.dropped == 4


@pytest.mark.parametrize("kind", ["replayed", "rubbish", "unsigned", "forged", "no message", "junk"])
def test_what_a_client_has_not_signed_is_no_strike_against_it(kind):
    table = Federation()
    table.hello("b")
    hello = m.Hello(1, b"boot0000", BUNDLE.sha256, 0, digest(0), 10, True)
    payload = table.member("a").say(hello, 1)
    table.raw("a", payload)
    other = {
        "replayed": payload,
        "rubbish": b"rubbish",
        "unsigned": m.encode(hello),
        "forged": signing.member(NAME, "a", 9, key=b"mallory").say(hello, 1),
        "no message": table.member("a").say(m.Decline(1, 1, ""), 1)[:-3],
        "junk": b"",
    }[kind]
    topic = TOPICS.up("a") if kind != "junk" else f"fedge/{NAME}/up/a/junk"
    found = []
    for _ in range(100):
        found += faults(table.desk.feed(e.Received(topic, other)))
    assert found == []
    assert not table.desk.coordinator.ignores(TOPICS.up("a"), table.desk.now)
    assert table.desk.coordinator.clients == 2


def test_what_a_client_has_signed_and_is_wrong_is_a_strike_and_is_one_once():
    table, found = Federation(), []
    table.hello("a", "b")
    wrong = m.Receipt(1, 1, "recorded")
    payload = table.member("a").say(wrong, 1)
    for _ in range(30):
        found += faults(table.raw("a", payload))
    assert found == []
    for _ in range(9):
        found += of(table.say("a", wrong), e.Misconduct)
    ((client, kind, reason, _),) = ((one.client, one.kind, one.reason, one.seconds) for one in found)
    assert (client, kind) == ("a", "muted")
    assert "in the name of a" in reason


@MODES
def test_a_flood_in_a_clients_name_says_in_whose_name_it_was(rounds):
    table, found = Federation(rounds), []
    table.hello("a", "b")
    for _ in range(1000):
        found += of(table.raw("a", b"rubbish"), e.Misconduct)
    (mute,) = found
    assert "in the name of a" in mute.reason


# Who is there.


@pytest.mark.parametrize("kind", ["older epoch", "said again", "goodbye"])
def test_what_is_not_believed_keeps_nobody_there(kind):
    table = Federation()
    older = table.member("a").say(m.Hello(0, b"boot0000", BUNDLE.sha256, 0, digest(0), 10, True), 0)
    hello = table.member("a").say(m.Hello(1, b"boot0000", BUNDLE.sha256, 0, digest(0), 10, True), 1)
    table.raw("a", hello)
    goodbye = table.member("a").say(m.Goodbye(b"another0"), 1)
    said = {"older epoch": older, "said again": hello, "goodbye": goodbye}[kind]
    assert table.desk.coordinator.clients == 1
    for _ in range(5):
        table.desk.wait(300.0)
        table.raw("a", said)
    assert table.desk.coordinator.clients == 0
    table.hello("a")
    assert table.desk.coordinator.clients == 1


def test_a_key_that_comes_back_is_not_believed_what_it_said_before():
    table = Federation()
    payload = table.member("a").say(m.Hello(1, b"boot0000", BUNDLE.sha256, 0, digest(0), 10, True), 1)
    table.raw("a", payload)
    table.revoked.add("a")
    table.desk.feed(e.Rekeyed((), ("a",)))
    table.revoked.discard("a")
    table.desk.feed(e.Rekeyed(("a",), ()))
    table.raw("a", payload)
    assert (table.desk.coordinator.clients, table.dropped) == (0, (1, 1))
    table.hello("a")
    assert table.desk.coordinator.clients == 1


# Keys that go while an update is on its way.

LONG = update(10) + b" " * 3000


def pieces(table, client, indices=range(3)):
    ref = transfer.refer(LONG, chunk=1024, inline=0)
    for index in indices:
        table.desk.feed(e.Received(TOPICS.uploaded(client, ref.sha256, index), transfer.piece(LONG, ref, index)))


@MODES
@pytest.mark.parametrize("before", [0, 1, 2])
def test_an_update_of_a_device_that_is_revoked_meanwhile_is_not_recorded(rounds, before):
    table = Federation(rounds)
    table.hello("a", "b")
    ref = transfer.refer(LONG, chunk=1024, inline=0)
    table.say("a", m.Upload(*table.task("a"), ref))
    pieces(table, "a", range(before))
    table.revoked.add("a")
    table.desk.feed(e.Rekeyed((), ("a",)))
    pieces(table, "a", range(before, 3))
    table.desk.wait(100.0)
    pieces(table, "a")
    assert table.recorded == []


@MODES
def test_an_update_is_not_recorded_either_before_the_server_has_looked_who_is_revoked(rounds):
    table = Federation(rounds)
    table.hello("a", "b")
    ref = transfer.refer(LONG, chunk=1024, inline=0)
    table.say("a", m.Upload(*table.task("a"), ref))
    table.revoked.add("a")
    pieces(table, "a")
    assert table.recorded == []


@MODES
def test_an_update_of_a_device_that_was_revoked_while_the_server_was_down_is_not_recorded(rounds):
    first = Federation(rounds)
    first.hello("a", "b")
    ref = transfer.refer(LONG, chunk=1024, inline=0)
    first.say("a", m.Upload(*first.task("a"), ref))
    pieces(first, "a", range(2))
    table = Federation(rounds, paper=first.desk.paper, members=first.members, revoked={"a"})
    pieces(table, "a")
    assert table.recorded == []
    # One that was given to somebody else is: its new device has not announced it.
    other = Federation(rounds, paper=first.desk.paper, members=first.members)
    pieces(other, "a")
    assert other.recorded == []
    other.hello("a")
    other.say("a", m.Upload(*other.task("a"), ref))
    pieces(other, "a", [2])
    assert other.recorded == ["a"]


@MODES
def test_what_had_come_is_of_use_to_a_device_that_announces_it_with_its_new_key(rounds):
    table = Federation(rounds)
    table.hello("a", "b")
    ref = transfer.refer(LONG, chunk=1024, inline=0)
    announced = m.Upload(*table.task("a"), ref)
    table.say("a", announced)
    pieces(table, "a", range(2))
    table.renewed["a"] = b"another key"
    table.desk.feed(e.Rekeyed(("a",), ()))
    pieces(table, "a", [2])
    assert table.recorded == []
    voice = signing.member(NAME, "a", 2, key=b"another key")
    table.hello("a", voice=voice)
    table.say("a", announced, voice=voice)
    pieces(table, "a", [2])
    assert table.recorded == ["a"]


def test_an_update_that_waits_for_its_version_is_not_recorded_once_its_device_is_revoked():
    table = Federation(BUFFERED | {"buffer": 1})
    table.desk.manual = (e.Record,)
    table.hello("a", "b")
    table.say("a", table.upload(a=10))
    table.say("b", table.upload(b=20))  # while the first one is on its way to the ledger
    assert [action.client for action in table.desk.waiting] == ["a"]
    table.revoked.add("b")
    table.desk.feed(e.Rekeyed((), ("b",)))
    while table.desk.waiting:
        table.desk.perform()
    assert table.recorded == ["a"]


# Updates that come damaged.


def garbage(table, client, voice=None):
    """One update of this client that is not what it announced."""
    ref = transfer.refer(LONG, chunk=1024, inline=0)
    actions = table.say(client, m.Upload(*table.task(client), ref), voice=voice)
    for index in range(3):
        sent = bytes(len(transfer.piece(LONG, ref, index)))
        actions += table.desk.feed(e.Received(TOPICS.uploaded(client, ref.sha256, index), sent))
    return actions


@MODES
def test_an_update_that_comes_damaged_again_and_again_is_refused(rounds):
    table = Federation(rounds)
    table.hello("a", "b")
    for _ in range(3):
        assert told(garbage(table, "a"), "a", m.Receipt) == []
    (receipt,) = told(garbage(table, "a"), "a", m.Receipt)
    assert (receipt.status, "damaged 4 times" in receipt.detail) == ("refused", True)
    assert table.recorded == []
    table.say("b", table.upload(b=20))
    assert table.recorded == ["b"]


def test_a_device_that_sends_garbage_all_round_is_muted_and_the_ledger_says_in_whose_name():
    table, found = Federation(BUFFERED), []
    for _ in range(30):
        table.hello("a", "b")
        if found:
            break
        found += of(garbage(table, "a"), e.Misconduct)
    (mute,) = found
    assert (mute.client, mute.kind, "in the name of a" in mute.reason) == ("a", "muted", True)


def test_a_client_that_says_it_has_very_many_samples_counts_as_no_more_than_the_limit():
    for limits, expected in (({"samples": 500}, 500), ({}, 2**29 - 1)):
        table = Desk(settings(round=ROUND, limits=limits))
        table.hello("a", samples=2**29 - 1)
        (candidate,) = table.coordinator._roster.candidates()
        assert candidate.samples == expected
