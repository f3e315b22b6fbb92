"""A session that signs: what a device is offered and told is believed once, in order, and while it is fresh."""

import pytest

from edge_client import events as e
from edge_client.held import Held
from edge_client.session import ClientSession
from edge_client.wire import messages as m
from edge_client.wire.envelope import Stamp
from tests import signing
from tests.edge_client.test_session import BOOT, DOWN, INLINE, OTHER, TOPICS, V1, Machine, held, invitation, only, said

WALL, DAY = 1_800_000_000.0, 86_400.0


def offer(epoch=1, bundle=INLINE, issued=WALL, days=7.0, **more):
    return m.Offer("demo", epoch, bundle, 0.0, issued=issued, expires=issued + days * DAY, **more)


class Device(Machine):
    """A machine with a voice, and the server that it hears."""

    def __init__(self, known=None, newest=None, wall=WALL, life=1, passed=0.0, **settings):
        super().__init__(known or held(), **settings)
        voice = signing.member("demo", "pi", life, newest=newest, passed=passed)
        self.session = ClientSession(self.session.settings, known or held(), self.session.rng, BOOT, voice)
        self.host = signing.host("demo", 1)
        self.feed(e.Clock(wall))
        self.feed(e.Connected())

    def offered(self, message=None, host=None):
        return self.raw((host or self.host).proclaim(message or offer()), TOPICS.offer)

    def raw(self, payload, topic=DOWN):
        actions = self.feed(e.Received(topic, payload))
        for action in only(actions, e.Publish):
            self.host.hear("pi", action.payload)
        return actions

    def told(self, message, topic=DOWN):
        return self.raw(self.host.tell("pi", message), topic)


def joined(**more):
    device = Device(**more)
    device.offered()
    return device


def texts(actions):
    return [log.text for log in only(actions, e.Log)]


def refused(actions, words):
    (text,) = texts(actions)
    return len(actions) == 1 and words in text


def test_a_task_from_offer_to_receipt_signed_both_ways():
    device = joined()
    (work,) = only(device.told(invitation()), e.Work)
    assert work.invitation == invitation()
    (said,) = only(device.feed(e.Finished(1, 1, b"update", 1, V1)), e.Publish)
    heard = device.host.hear("pi", said.payload).message
    assert (heard.epoch, heard.task, heard.blob.inline) == (1, 1, b"update")
    assert only(device.told(m.Receipt(1, 1, "recorded")), e.Settle) == [e.Settle(1, 1, recorded=True)]
    assert device.session.idle
    assert (device.session.dropped, device.session.distrusted) == (0, 0)


def test_a_last_will_is_signed_before_there_is_an_offer():
    device = Device()
    will = device.session.goodbye()
    device.offered()
    assert device.host.hear("pi", will.payload).message == m.Goodbye(BOOT)


# Offers.


@pytest.mark.parametrize(
    "payload",
    [
        m.encode(offer(9)),
        signing.host("demo", 9, key=b"mallory").proclaim(offer(9)),
        signing.host("else", 9).proclaim(offer(9)),
        signing.host("demo", 9).tell("pi", offer(9)),
    ],
    ids=["unsigned", "another key", "another federation", "for one client"],
)
def test_an_offer_that_is_not_the_federations_is_refused(payload):
    device = Device()
    actions = device.raw(payload, TOPICS.offer)
    assert len(texts(actions)) == 1
    assert not only(actions, e.Witness)
    assert device.session.distrusted == 1
    assert only(device.offered(), e.Publish)  # the right one is believed all the same


def test_what_an_older_offer_says_is_not_gone_back_to():
    device, old, new = Device(), signing.host("demo", 1), signing.host("demo", 2)
    first = old.proclaim(offer(1, OTHER))
    device.host = new
    device.offered(offer(2))
    assert refused(device.raw(first, TOPICS.offer), "an old offer")


def test_the_newest_offer_is_remembered_over_a_power_cut():
    device = Device()
    (remembered,) = only(device.offered(), e.Witness)
    assert remembered.stamp == Stamp(1, 0, 1)
    assert not only(device.raw(b"rubbish", TOPICS.offer), e.Witness)
    later = Device(newest=Stamp(2, 0, 1), life=2)
    assert refused(later.offered(), "an old offer")


def asks(actions):
    """Whether all that is said asks for a newer offer."""
    return {type(message) for message in said(actions)} <= {m.Hello}


def test_an_expired_offer_is_refused():
    device = Device(wall=WALL + 8 * DAY)
    actions = device.offered()
    assert refused(actions, "expired 86400 s ago")
    assert asks([action for _, action in device.wait(60.0)])
    assert only(device.offered(offer(issued=WALL + 8 * DAY)), e.Publish)


def test_a_device_whose_clock_is_behind_says_so_and_takes_part():
    device = Device(wall=0.0)
    actions = device.offered()
    assert any("the clock is" in text for text in texts(actions))
    assert only(actions, e.Publish)
    assert not texts(device.offered())


def test_a_clock_that_was_lost_does_not_make_an_old_offer_fresh():
    device = Device(wall=0.0, passed=WALL + 8 * DAY)
    assert refused(device.offered(), "expired 86400 s ago")
    assert only(device.offered(offer(issued=WALL + 8 * DAY)), e.Publish)


def test_an_offer_tells_how_late_it_is_at_least_and_that_is_remembered():
    device = Device(wall=0.0)
    (remembered,) = only(device.offered(offer(issued=WALL + 30 * DAY)), e.Witness)
    assert remembered.issued == WALL + 30 * DAY
    assert refused(device.offered(offer(issued=WALL)), "expired")


def test_an_offer_that_expires_later_is_let_go_and_nothing_is_done_under_it():
    device = joined()
    device.feed(e.Clock(WALL + 6 * DAY))
    assert only([action for _, action in device.wait(2000.0)], e.Publish)
    device.feed(e.Clock(WALL + 8 * DAY))
    actions = [action for _, action in device.wait(2000.0)]
    assert texts(actions) == ["the offer has expired and no newer one has come; waiting for one"]
    assert asks(actions)
    assert TOPICS.offer in [topic for action in only(actions, e.Subscribe) for topic in action.topics]
    assert not only(device.told(invitation()), e.Work)
    assert only(device.offered(offer(issued=WALL + 8 * DAY)), e.Publish)


def test_an_invitation_under_an_offer_that_has_expired_is_not_carried_out():
    device = joined()
    device.feed(e.Clock(WALL + 8 * DAY))
    assert not only(device.told(invitation()), e.Work)


def test_dates_are_taken_from_the_clock_as_it_is_now():
    device = Device(wall=WALL + 30 * DAY)
    assert refused(device.offered(), "expired")
    device.feed(e.Clock(WALL + 60.0))  # it was set right
    assert only(device.offered(), e.Publish)


# Messages.


def test_an_invitation_is_carried_out_once():
    device = joined()
    payload = device.host.tell("pi", invitation())
    assert only(device.raw(payload), e.Work)
    assert refused(device.raw(payload), "said before")


@pytest.mark.parametrize("who", ["another key", "another client", "unsigned", "another life", "an older epoch"])
def test_an_invitation_that_is_not_for_this_device_is_not_carried_out(who):
    device = joined()
    other = signing.host("demo", 1)
    other.hear("po", signing.member("demo", "po").say(m.Decline(1, 1, ""), 1))
    mallory = signing.host("demo", 1, key=b"mallory")
    mallory._known = device.host._known
    older = signing.host("demo", 0)
    older._known = device.host._known
    payload = {
        "another key": lambda: mallory.tell("pi", invitation()),
        "another client": lambda: other.tell("po", invitation()),
        "unsigned": lambda: m.encode(invitation()),
        "another life": lambda: other.tell("pi", invitation()),
        "an older epoch": lambda: older.tell("pi", invitation()),
    }[who]()
    actions = device.raw(payload)
    assert not only(actions, e.Work)
    assert device.session.distrusted == 1


def test_a_forged_receipt_does_not_let_an_update_go():
    device = joined()
    device.told(invitation())
    device.feed(e.Finished(1, 1, b"update", 1, V1))
    mallory = signing.host("demo", 1, key=b"mallory")
    mallory._known = device.host._known
    assert not only(device.raw(mallory.tell("pi", m.Receipt(1, 1, "recorded"))), e.Settle)
    assert not device.session.idle


def test_credits_that_were_given_before_are_not_given_again():
    device = joined(inline=0)
    device.told(invitation())
    (said,) = only(device.feed(e.Finished(1, 1, b"u" * 3000, 1, V1)), e.Publish)
    sha256 = m.decode(said.payload).blob.sha256
    credit = device.host.tell("pi", m.Credit(sha256, (0, 1)))
    device.host.hear("pi", said.payload)
    assert len(only(device.feed(e.Received(DOWN, credit)), e.Publish)) == 2
    assert not only(device.feed(e.Received(DOWN, credit)), e.Publish)


def test_a_device_that_does_not_sign_still_understands_one_who_does():
    machine = Machine(Held())
    machine.feed(e.Connected())
    machine.feed(e.Received(TOPICS.offer, signing.host("demo", 1).proclaim(offer())))
    assert machine.session.dropped == 0
