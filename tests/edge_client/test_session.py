"""The session as a pure machine: events in, actions out, on a clock that the test turns by hand."""

import hashlib
import itertools
import random

import msgspec
import pytest

from edge_client import events as e
from edge_client.held import NO_HASH, Held, SessionSettings
from edge_client.session import ClientSession
from edge_client.upload import Pending
from edge_client.wire import messages as m
from edge_client.wire.topics import Topics
from edge_client.wire.transfer import Assembly, count, piece, refer

TOPICS = Topics("demo")
DOWN = TOPICS.down("pi")
BOOT = b"bootboot"
BUNDLE = random.Random(1).randbytes(20 * 1024)
INLINE = refer(b"bundle", chunk=1024)
CHUNKED = refer(BUNDLE, chunk=1024)
OTHER = refer(b"another bundle", chunk=1024)
V1, V2 = bytes([1] * 32), bytes([2] * 32)
DELTA = random.Random(2).randbytes(5 * 1024)
LIMIT = 10**6


class Machine:
    """A session, its clock, and everything that it ever asked for; due Ticks are fed as the clock moves."""

    def __init__(self, held=None, **settings):
        settings = {"window": 4, "blob_limit": LIMIT, "chunk": 1024, "inline": 100} | settings
        self.session = ClientSession(
            SessionSettings("pi", "demo", **settings), held or Held(), random.Random(7), boot=BOOT
        )
        self.now = 0.0

    def feed(self, event):
        actions = self.session.handle(event, self.now)
        if not self.still():
            actions += self.session.handle(e.Tick(), self.now)
        assert self.still()
        return actions

    def still(self):
        """Nothing is left to do now; a wake that is past and stays past would keep a driver spinning."""
        wake = self.session.wake
        return wake is None or wake > self.now

    def told(self, message, topic=DOWN):
        return self.feed(e.Received(topic, m.encode(message)))

    def offered(self, bundle=INLINE, epoch=1, spread=0.0, **more):
        return self.told(m.Offer("demo", epoch, bundle, spread, **more), TOPICS.offer)

    def chunk(self, ref, index, data):
        return self.feed(e.Received(TOPICS.published(ref.sha256, index), piece(data, ref, index)))

    def wait(self, seconds):
        """Let time pass; what happened, with when."""
        end, found = self.now + seconds, []
        while (wake := self.session.wake) is not None and wake <= end:
            self.now = max(self.now, wake)
            found += [(self.now, action) for action in self.session.handle(e.Tick(), self.now)]
            assert self.still()
        self.now = end
        return found


def said(actions, kind=None):
    """The messages among the actions, of one kind where that is given."""
    messages = [m.decode(a.payload) for a in actions if isinstance(a, e.Publish) and a.topic == TOPICS.up("pi")]
    return [message for message in messages if kind is None or isinstance(message, kind)]


def only(actions, kind):
    return [action for action in actions if isinstance(action, kind)]


def held(version=1, digest=V1, pending=None):
    return Held(INLINE.sha256, version, digest, pending, samples=50)


def joined(**settings):
    """A client that has said hello, holding version 1 of the bundle."""
    known = {k: settings.pop(k) for k in ("version", "digest", "pending") if k in settings}
    machine = Machine(held(**known), **settings)
    machine.feed(e.Connected())
    machine.offered()
    return machine


def invitation(task=1, **changes):
    plain = m.Invitation(1, task, 1, "train", m.TrainPlan(), m.UpdatePlan(), 5, 60.0, 1, 1, V1)
    return msgspec.structs.replace(plain, **changes)


def worked(machine, task=1, update=b"update", version=1, digest=V1):
    return machine.feed(e.Finished(1, task, update, version, digest))


def backed_off(waits, longest):
    """Whether each wait is the nominal one, or up to a quarter less."""
    return len(waits) == len(longest) and all(
        0.75 * most <= wait <= most + 1e-6 for wait, most in zip(waits, longest, strict=True)
    )


# Hello.


def test_a_connection_subscribes_in_one_packet_and_sends_no_update_before_the_offer():
    machine = Machine(held(pending=Pending(1, 1, b"u")))
    assert machine.feed(e.Connected()) == [e.Subscribe((TOPICS.offer, DOWN))]
    assert {type(message) for message in said([action for _, action in machine.wait(1000)])} == {m.Hello}


def test_an_offer_that_does_not_come_is_subscribed_to_again_then_asked_for_and_less_and_less_often():
    machine = Machine(held())
    for epoch in (0, 1):
        machine.feed(e.Connected())
        began, waited = machine.now, machine.wait(1200.0)
        asked = [when for when, action in waited if action == e.Subscribe((TOPICS.offer, DOWN))]
        gaps = [after - before for before, after in itertools.pairwise([began, *asked])]
        assert backed_off(gaps[:7], [5, 10, 20, 40, 80, 160, 300])
        # What is retained may be missing or another's: a server tells its offer to who speaks of no or an old epoch.
        greetings = [(when, *said([action])) for when, action in waited if isinstance(action, e.Publish)]
        assert [(when, message.epoch) for when, message in greetings] == [(when, epoch) for when in asked[1:]]
        machine.offered()
        assert said([action for _, action in machine.wait(1.0)]) == []  # hello came with the offer
        machine.feed(e.Disconnected())
        # What was known before the connection broke may be over: the offer is wanted again.


def test_hello_comes_within_the_spread_and_says_what_is_held():
    machine = Machine(held(), software="test 1", uplink=5e4)
    machine.feed(e.Connected())
    machine.feed(e.Counted(m.Traffic(10, 20)))
    assert machine.offered(spread=8.0, epoch=3) == []
    ((when, hello),) = machine.wait(8.0)
    assert 0 < when < 8
    expected = m.Hello(3, BOOT, INLINE.sha256, 1, V1, 50, True, m.Traffic(10, 20), "test 1", 5e4)
    assert said([hello]) == [expected]


def test_hello_comes_once_for_each_connection_and_epoch_and_then_by_heartbeat():
    machine = joined()
    assert machine.offered() == []
    assert said(machine.offered(epoch=2), m.Hello)[0].epoch == 2
    machine.feed(e.Disconnected())
    assert machine.session.wake is None
    assert machine.wait(10_000) == []
    machine.feed(e.Connected())
    assert len(said(machine.offered(epoch=2), m.Hello)) == 1
    machine.told(m.Receipt(1, 1, "late"))
    beats = [when - machine.now for when, _ in machine.wait(3000)]
    assert 8 <= len(beats) <= 13  # 300 s, give or take a quarter


def pauses(machine, seconds):
    """Between hellos, from the last one on, with nothing said by the server."""
    times = [machine.now] + [when for when, action in machine.wait(seconds) if said([action], m.Hello)]
    return [after - before for before, after in itertools.pairwise(times)]


def test_a_hello_without_a_sign_from_the_server_is_said_again_and_then_left_to_heartbeats():
    machine = joined()
    waits = pauses(machine, 3000)
    assert backed_off(waits[:6], [5, 10, 20, 40, 80, 160])
    assert all(225 <= wait <= 375 for wait in waits[6:])
    # Another epoch, and news of its own, are said anew.
    assert said(machine.offered(epoch=2), m.Hello)
    assert backed_off(pauses(machine, 40), [5, 10, 20])
    assert said(machine.feed(e.Available(False)), m.Hello)
    assert backed_off(pauses(machine, 40), [5, 10, 20])


@pytest.mark.parametrize(
    "sign",
    [m.Receipt(1, 1, "late"), m.Credit(bytes(32), (0,)), invitation()],
    ids=lambda sign: type(sign).__name__,
)
def test_any_word_of_the_server_shows_that_it_has_heard_the_hello(sign):
    machine = joined()
    machine.told(sign)
    assert pauses(machine, 200) == []


def test_an_offer_that_answers_a_hello_of_before_shows_nothing():
    machine = joined()
    machine.told(m.Offer("demo", 1, INLINE, 0.0))
    assert len(pauses(machine, 40)) == 3


def test_a_large_fleet_does_not_say_hello_again_sooner_than_its_heartbeats():
    machine = Machine(held())
    machine.feed(e.Connected())
    machine.offered(spread=500.0)
    first, second = [when for when, action in machine.wait(1000) if said([action], m.Hello)][:2]
    assert 225 <= second - first <= 375


def test_a_lower_epoch_is_ignored():
    machine = joined()
    machine.offered(epoch=5)
    before = machine.session.wake
    assert machine.offered(OTHER, epoch=4) == []
    assert machine.session.wake == before
    assert said(machine.feed(e.Available(True)))[0].epoch == 5


def test_availability_is_told_at_once_when_there_is_somebody_to_tell():
    machine = Machine(held())
    assert machine.feed(e.Available(False)) == []
    machine.feed(e.Connected())
    assert machine.feed(e.Available(True)) == []
    machine.offered()
    assert [hello.available for hello in said(machine.feed(e.Available(False)))] == [False]
    machine.feed(e.Disconnected())
    assert machine.feed(e.Available(True)) == []


def test_goodbye_is_of_this_life():
    assert said([Machine().session.goodbye()]) == [m.Goodbye(BOOT)]


# The bundle.


def test_an_inline_bundle_is_installed_within_the_spread_then_hello():
    machine = Machine()
    machine.feed(e.Connected())
    assert machine.offered(spread=4.0) == []
    ((when, install),) = machine.wait(4.0)
    assert 0 < when < 4
    assert install == e.Install(INLINE.sha256, b"bundle")
    assert machine.offered(spread=4.0) == []  # again, while the driver is at it
    (hello,) = said(machine.feed(e.Installed(INLINE.sha256, 9)))
    assert (hello.bundle, hello.version, hello.digest, hello.samples) == (INLINE.sha256, 0, NO_HASH, 9)
    assert only([action for _, action in machine.wait(100)], e.Install) == []


def serve(machine, actions, ref, data, lost=()):
    """Play the broker with the retained chunks: answer each subscription, but for those lost the first time."""
    lost, everything, queue = set(lost), list(actions), list(actions)
    open_ = set()
    while queue:
        action = queue.pop(0)
        if isinstance(action, e.Unsubscribe):
            open_ -= set(action.topics)
        if isinstance(action, e.Subscribe):
            open_ |= set(action.topics)
            assert len(open_) <= 4
            for index in [int(topic.rsplit("/", 1)[1]) for topic in action.topics]:
                if index in lost:
                    lost.discard(index)
                    continue
                found = machine.chunk(ref, index, data)
                everything += found
                queue += found
    return everything, open_


def test_a_chunked_bundle_is_pulled_window_by_window():
    machine = Machine()
    machine.feed(e.Connected())
    actions, left = serve(machine, machine.offered(CHUNKED), CHUNKED, BUNDLE)
    assert only(actions, e.Install) == [e.Install(CHUNKED.sha256, BUNDLE)]
    assert left == set()
    assert machine.chunk(CHUNKED, 3, BUNDLE) == []


def test_lost_chunks_are_subscribed_to_again_then_asked_for():
    machine = Machine()
    machine.feed(e.Connected())
    actions, _ = serve(machine, machine.offered(CHUNKED), CHUNKED, BUNDLE, lost={0, 7, 19})
    found = []
    for _ in range(10):
        if only(actions, e.Install):
            break
        later = [action for _, action in machine.wait(5.0)]
        found += later
        actions, left = serve(machine, later, CHUNKED, BUNDLE)
    assert only(actions, e.Install) == [e.Install(CHUNKED.sha256, BUNDLE)]
    assert left == set()
    assert isinstance(found[0], e.Unsubscribe)
    machine = Machine()
    machine.feed(e.Connected())
    machine.offered(CHUNKED)
    (missing,) = said([action for _, action in machine.wait(16.0)], m.Missing)
    assert missing == m.Missing(CHUNKED.sha256, (0, 1, 2, 3))


def test_a_download_goes_on_after_a_new_connection():
    machine = Machine()
    machine.feed(e.Connected())
    machine.offered(CHUNKED)
    machine.chunk(CHUNKED, 1, BUNDLE)
    machine.feed(e.Disconnected())
    first, second = machine.feed(e.Connected())
    assert first == e.Subscribe((TOPICS.offer, DOWN))
    assert second.topics == tuple(TOPICS.published(CHUNKED.sha256, index) for index in (0, 2, 3, 4))
    assert machine.offered(CHUNKED) == []


def test_a_damaged_download_starts_again():
    machine = Machine()
    machine.feed(e.Connected())
    ref = refer(BUNDLE[:2048], chunk=1024, inline=0)
    machine.offered(ref)
    machine.chunk(ref, 0, bytes(2048))
    actions = machine.chunk(ref, 1, bytes(2048))
    (log,) = only(actions, e.Log)
    assert "downloading again" in log.text
    assert only(actions, e.Subscribe) == []
    actions = [action for _, action in machine.wait(5.0)]
    (again,) = only(actions, e.Subscribe)
    assert said(actions, m.Missing) == [m.Missing(ref.sha256, (0, 1))]  # what is retained may be damaged
    actions, _ = serve(machine, [again], ref, BUNDLE[:2048])
    assert only(actions, e.Install) == [e.Install(ref.sha256, BUNDLE[:2048])]


def test_a_download_that_is_damaged_again_and_again_starts_less_and_less_often():
    machine = Machine()
    machine.feed(e.Connected())
    machine.offered(CHUNKED)
    times = []
    for _ in range(9):
        for index in range(20):
            machine.chunk(CHUNKED, index, bytes(len(BUNDLE)))
        assert machine.chunk(CHUNKED, 0, BUNDLE) == []  # still on its way when it was given up
        began = machine.now
        when = min(when for when, action in machine.wait(700.0) if isinstance(action, e.Subscribe))
        times.append(when - began)
    assert times == [5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 600.0, 600.0]


def test_a_connection_that_is_lost_does_not_hurry_a_damaged_download():
    machine = Machine()
    machine.feed(e.Connected())
    ref = refer(BUNDLE[:2048], chunk=1024, inline=0)
    machine.offered(ref)
    for index in range(2):
        machine.chunk(ref, index, bytes(2048))
    machine.feed(e.Disconnected())
    assert len(only(machine.feed(e.Connected()), e.Subscribe)) == 1
    assert any(len(one.topics) == 2 for one in only([action for _, action in machine.wait(6.0)], e.Subscribe))


def test_a_topic_is_fit_for_a_terminal_when_it_is_logged():
    machine = Machine()
    machine.feed(e.Connected())
    (log,) = only(machine.feed(e.Received("x\x1b[2J\x1b]0;owned\x07\nok", b"junk")), e.Log)
    assert log.text.isprintable()


def test_a_rejected_bundle_is_said_once_and_then_there_is_silence():
    machine = Machine()
    machine.feed(e.Connected())
    machine.offered()
    (log,) = machine.feed(e.Rejected(INLINE.sha256, "opset 99"))
    assert "opset 99" in log.text
    assert machine.offered(epoch=2) == []
    assert machine.feed(e.Available(False)) == []
    assert machine.session.wake is None
    assert only(machine.offered(OTHER, epoch=3), e.Install) == [e.Install(OTHER.sha256, b"another bundle")]


def test_a_new_bundle_replaces_everything():
    machine = joined(pending=Pending(1, 1, b"old"))
    assert only(machine.offered(OTHER, epoch=2), e.Install) == [e.Install(OTHER.sha256, b"another bundle")]
    assert machine.told(invitation(2)) == machine.told(invitation(2))  # announces the old update, if anything
    (hello,) = said(machine.feed(e.Installed(OTHER.sha256, 8)))
    assert (hello.bundle, hello.version, hello.digest, hello.samples) == (OTHER.sha256, 0, NO_HASH, 8)
    assert machine.session.idle
    assert said([action for _, action in machine.wait(2000)], m.Upload) == []


def test_a_new_bundle_waits_for_the_task_under_way_to_end():
    machine = joined()
    machine.told(invitation())
    assert machine.offered(OTHER, epoch=2) == [e.Cancel()]
    assert machine.wait(10) == []
    actions = machine.feed(e.Failed(1, 1, "stopped", 1, V1))
    assert only(actions, e.Install) == [e.Install(OTHER.sha256, b"another bundle")]


def test_installs_come_one_after_the_other():
    machine = Machine()
    machine.feed(e.Connected())
    machine.offered()
    assert machine.offered(OTHER, epoch=2) == []
    assert machine.feed(e.Installed(INLINE.sha256, 1)) == [e.Install(OTHER.sha256, b"another bundle")]
    assert len(said(machine.feed(e.Installed(OTHER.sha256, 1)), m.Hello)) == 1
    machine = Machine()
    machine.feed(e.Connected())
    machine.offered()
    machine.offered(OTHER, epoch=2)
    assert only(machine.feed(e.Rejected(INLINE.sha256, "no")), e.Install)


def test_a_bundle_that_is_offered_back_stops_the_download_of_the_other():
    machine = joined()
    machine.offered(CHUNKED, epoch=2)
    actions = machine.offered(epoch=3)
    assert len(only(actions, e.Unsubscribe)[0].topics) == 4
    assert len(said(actions, m.Hello)) == 1
    assert said(machine.feed(e.Available(True)), m.Hello)


def test_the_end_of_a_task_deadline_does_not_stop_the_download_of_a_bundle():
    machine = joined()
    machine.told(invitation(delta=refer(DELTA, chunk=1024, inline=0), version=2, digest=V2))
    actions = machine.offered(CHUNKED, epoch=2)
    assert len(only(actions, e.Unsubscribe)[0].topics) == 4
    machine.wait(120)
    actions, _ = serve(machine, [action for _, action in machine.wait(60)], CHUNKED, BUNDLE)
    assert only(actions, e.Install) == [e.Install(CHUNKED.sha256, BUNDLE)]


def test_the_end_of_a_federation_is_told():
    machine = Machine(held())
    machine.feed(e.Connected())
    assert machine.offered(finished=True)[0] == e.Done()


# A task.


def test_from_invitation_to_receipt_inline():
    machine = joined()
    assert machine.told(invitation()) == [e.Work(invitation(), None)]
    assert not machine.session.idle
    assert machine.told(invitation()) == []
    machine.feed(e.Counted(m.Traffic(100, 7)))
    (upload,) = said(worked(machine))
    assert upload == m.Upload(1, 1, refer(b"update", chunk=1024), m.Traffic(106, 7))
    assert machine.told(m.Receipt(1, 1, "recorded")) == [e.Settle(1, 1, recorded=True)]
    assert machine.session.idle
    assert said([action for _, action in machine.wait(900)], m.Upload) == []


def test_from_delta_to_receipt_in_chunks():
    machine = joined()
    ref = refer(DELTA, chunk=1024, inline=0)
    invited = invitation(version=2, digest=V2, delta=ref)
    actions, left = serve(machine, machine.told(invited), ref, DELTA)
    assert only(actions, e.Work) == [e.Work(invited, DELTA)]
    assert left == set()
    update = random.Random(9).randbytes(2500)
    (upload,) = said(worked(machine, update=update, version=2, digest=V2))
    assert upload.blob == refer(update, chunk=1024, inline=100)
    sha = upload.blob.sha256
    assert machine.told(m.Credit(bytes(32), (0,))) == []
    sent = machine.told(m.Credit(sha, (2, 0, 2, 3, 4000)))
    assert sent == [e.Publish(TOPICS.uploaded("pi", sha, i), piece(update, upload.blob, i)) for i in (2, 0)]
    assert machine.wait(7.4) == []
    assert len(machine.told(m.Credit(sha, (1,)))) == 1
    ((when, again),) = machine.wait(10.0)
    assert backed_off([when - 7.4], [10])
    assert said([again]) == [upload.__class__(1, 1, upload.blob, m.Traffic())]
    assert machine.told(m.Receipt(1, 1, "late"))[0] == e.Settle(1, 1, recorded=False)
    assert said(machine.feed(e.Available(True)))[0].version == 2


def uploaded(machine, task=1, seconds=5.0, lost=False, size=3000):
    """An update in chunks, from the grant to the receipt; what the client says of its uplink then."""
    machine.told(invitation(task))
    (upload,) = said(worked(machine, task, update=bytes(size)), m.Upload)
    machine.wait(2.0)
    machine.told(m.Credit(upload.blob.sha256, (0, 1)))
    machine.wait(seconds / 2)
    if lost:
        machine.feed(e.Disconnected())
        machine.feed(e.Connected())
        machine.offered()
    machine.told(m.Credit(upload.blob.sha256, (2,)))
    machine.wait(seconds / 2)
    machine.told(m.Receipt(1, task, "recorded"))
    return said(machine.feed(e.Available(True)), m.Hello)[0].uplink


def test_an_upload_in_chunks_tells_how_fast_the_link_is():
    machine = joined()
    assert uploaded(machine) == pytest.approx(3000 / 5)
    assert uploaded(machine, 2, lost=True) == pytest.approx(3000 / 5)  # nothing new
    assert uploaded(machine, 3, seconds=10.0) == pytest.approx(3000 / 10)
    machine.told(invitation(4))
    worked(machine, 4)
    machine.wait(1.0)
    machine.told(m.Receipt(1, 4, "recorded"))
    assert said(machine.feed(e.Available(True)), m.Hello)[0].uplink == pytest.approx(3000 / 10)


def test_what_is_said_of_a_link_goes_before_what_is_measured():
    assert uploaded(joined(uplink=70.0)) == 70.0


def test_an_inline_delta_goes_to_work_at_once():
    machine = joined()
    invited = invitation(version=2, digest=V2, delta=refer(b"delta", chunk=1024))
    assert machine.told(invited) == [e.Work(invited, b"delta")]


def test_a_new_client_starts_from_the_bundle():
    machine = joined(version=0, digest=NO_HASH)
    invited = invitation(held=0, version=0, digest=V1)
    assert machine.told(invited) == [e.Work(invited, None)]


def test_announcements_are_repeated_with_a_back_off_of_up_to_five_minutes_for_ever():
    machine = joined()
    machine.told(invitation())
    worked(machine)
    times = [when for when, action in machine.wait(200_000.0) if said([action], m.Upload)]
    gaps = [after - before for before, after in zip([0.0, *times], times, strict=False)]
    assert backed_off(gaps[:6], [10, 20, 40, 80, 160, 300])
    assert backed_off(gaps[6:], [300] * len(gaps[6:]))
    assert len({round(gap) for gap in gaps[6:]}) > 20
    machine.wait(300 * 1500)  # 2 ** attempts would be too large for a float by now


def test_a_dead_server_is_tried_again_within_the_configured_patience():
    machine = joined(pending=Pending(1, 1, b"update"), patience=2.0, longest=30.0)
    times = [when for when, action in machine.wait(3600.0) if said([action], m.Upload)]
    assert max(after - before for before, after in itertools.pairwise([0.0, *times, 3600.0])) <= 30.0
    assert len(times) < 3600 / 30 / 0.75 + 8


@pytest.mark.parametrize("status", ["recorded", "late", "refused", "void"])
def test_receipts_settle(status):
    machine = joined()
    machine.told(invitation())
    worked(machine)
    settle, *log = machine.told(m.Receipt(1, 1, status, "why"))
    assert settle == e.Settle(1, 1, recorded=status == "recorded")
    assert ["why" in line.text for line in log] == ([True] if status == "refused" else [])
    assert machine.session.idle


def test_a_receipt_for_another_task_ends_nothing():
    machine = joined()
    machine.told(invitation())
    worked(machine)
    assert machine.told(m.Receipt(1, 2, "void")) == [e.Settle(1, 2, recorded=False)]
    assert machine.told(m.Receipt(0, 1, "void")) == [e.Settle(0, 1, recorded=False)]
    assert not machine.session.idle


def test_an_invitation_says_that_the_last_result_is_void():
    machine = joined()
    actions = machine.told(invitation(void=(1, 7)))
    assert [type(action) for action in actions] == [e.Settle, e.Work]  # first the residual, then what starts from it
    assert actions[0] == e.Settle(1, 7, recorded=False)


def test_an_invitation_ends_a_wait_for_the_receipt_of_a_void_task():
    machine = joined()
    machine.told(invitation())
    worked(machine)
    actions = machine.told(invitation(task=2, void=(1, 1)))
    assert [type(action) for action in actions] == [e.Settle, e.Work]
    assert actions[0] == e.Settle(1, 1, recorded=False)


def test_an_invitation_while_uploading_waits_for_the_receipt():
    machine = joined()
    machine.told(invitation())
    worked(machine)
    assert len(said(machine.told(invitation()), m.Upload)) == 1  # the server has lost it: it is announced again
    assert len(said(machine.told(invitation(2)), m.Upload)) == 1
    assert machine.told(m.Receipt(1, 1, "recorded")) == [e.Settle(1, 1, recorded=True), e.Work(invitation(2), None)]


def test_an_invitation_while_working_cancels():
    machine = joined()
    machine.told(invitation())
    assert machine.told(invitation(2)) == [e.Cancel()]
    assert machine.feed(e.Failed(1, 1, "stopped", 1, V1)) == [e.Work(invitation(2), None)]
    machine.told(invitation(3))
    (upload,) = said(worked(machine, 2))  # it was done before the cancel reached it
    assert upload.task == 2
    assert machine.told(m.Receipt(1, 2, "late"))[1:] == [e.Work(invitation(3), None)]


def test_an_invitation_while_downloading_takes_over():
    machine = joined()
    machine.told(invitation(version=2, digest=V2, delta=refer(DELTA, chunk=1024, inline=0)))
    unsubscribed, work = machine.told(invitation(2))
    assert len(unsubscribed.topics) == 4
    assert work == e.Work(invitation(2), None)


def test_a_download_ends_at_the_deadline():
    machine = joined()
    machine.told(invitation(version=2, digest=V2, delta=refer(DELTA, chunk=1024, inline=0), deadline=7.0))
    assert machine.session.idle is False
    last = machine.wait(7.0)[-1]
    assert last[0] == 7.0
    assert isinstance(last[1], e.Unsubscribe)
    assert machine.session.idle
    assert machine.told(invitation(2)) == [e.Work(invitation(2), None)]


def test_a_failed_task_is_declined_and_hello_follows():
    machine = joined()
    machine.told(invitation())
    log, *rest = machine.feed(e.Failed(1, 1, "x" * 900, 0, NO_HASH))
    assert isinstance(log, e.Log)
    assert said(rest) == [m.Decline(1, 1, "x" * 500)]
    (hello,) = said([action for _, action in machine.wait(5.0)])
    assert (hello.version, hello.digest) == (0, NO_HASH)


def test_a_client_that_always_fails_asks_less_and_less_often():
    machine, waits = joined(), []
    for task in range(1, 10):
        machine.told(invitation(task))
        failed = machine.now
        machine.feed(e.Failed(1, task, "disk full", 1, V1))
        (at, hello), *_ = machine.wait(300.0)
        assert said([hello])
        waits.append(at - failed)
    assert backed_off(waits, [5, 10, 20, 40, 80, 160, 300, 300, 300])


def test_a_task_that_ends_while_offline_is_announced_after_the_next_offer():
    machine = joined()
    machine.told(invitation())
    machine.feed(e.Disconnected())
    assert worked(machine) == []
    assert machine.wait(1000) == []
    assert machine.feed(e.Connected()) == [e.Subscribe((TOPICS.offer, DOWN))]
    assert machine.offered(spread=5.0) == []
    hello, upload = said([action for _, action in machine.wait(5.0)])
    assert isinstance(hello, m.Hello)
    assert isinstance(upload, m.Upload)


def test_an_update_travels_in_chunks_that_the_server_has_measured():
    """A broker may take less than the client was set to send; what waits from an earlier life is cut anew."""
    update = bytes(range(256)) * 40
    machine = Machine(held(pending=Pending(1, 1, update)), chunk=8192, inline=16_384)
    machine.feed(e.Connected())
    (upload,) = said(machine.offered(bundle=INLINE, epoch=2), m.Upload)
    assert upload.blob == refer(update, chunk=INLINE.chunk, inline=INLINE.chunk)
    assert upload.blob.inline is None
    grants = machine.told(m.Credit(upload.blob.sha256, tuple(range(count(upload.blob)))))
    assert [len(action.payload) for action in only(grants, e.Publish)] == [1024] * 10
    wider = refer(b"bundle", chunk=65_536)
    assert wider.sha256 == INLINE.sha256
    (upload,) = said(machine.offered(bundle=wider, epoch=3), m.Upload)
    assert upload.blob.chunk == 8192


def test_a_version_that_is_not_held_gives_hello_instead_of_work():
    machine = joined()
    (hello,) = said(machine.told(invitation(held=7, version=9, digest=V2, delta=refer(b"d", chunk=1024))))
    assert (hello.version, hello.digest) == (1, V1)
    assert machine.session.idle


def test_tasks_are_declined_when_not_available_or_without_the_bundle():
    machine = joined()
    machine.feed(e.Available(False))
    assert said(machine.told(invitation())) == [m.Decline(1, 1, "not available")]
    machine = Machine()
    machine.feed(e.Connected())
    assert said(machine.told(invitation())) == [m.Decline(1, 1, "the bundle is not installed yet")]
    assert machine.session.idle


def test_a_restart_takes_up_the_update_without_a_receipt():
    machine = Machine(held(pending=Pending(4, 2, b"stored")))
    machine.feed(e.Connected())
    hello, upload = said(machine.offered(epoch=5))
    assert hello.epoch == 5
    assert (upload.epoch, upload.task, upload.blob.inline) == (4, 2, b"stored")
    assert machine.told(m.Receipt(4, 2, "void")) == [e.Settle(4, 2, recorded=False)]


def test_a_new_epoch_announces_the_update_again():
    machine = joined()
    machine.told(invitation())
    worked(machine)
    hello, upload = said(machine.offered(epoch=2))
    assert hello.epoch == 2
    assert (upload.epoch, upload.task) == (1, 1)


# What must not be believed.

BAD_DELTA = m.BlobRef(V1, 3, 1024, b"abc")
HUGE = m.BlobRef(V1, LIMIT + 1, 1024)
EMPTY = m.BlobRef(V1, 0, 1024)
OFFER = TOPICS.offer
CHUNK = TOPICS.published(V1, 0)
BAD = {
    "garbage": (DOWN, b"\xff\x00garbage"),
    "empty": (DOWN, b""),
    "garbage offer": (OFFER, b"\x01"),
    "cleared offer": (OFFER, b""),
    "oversized": (DOWN, bytes(m.MESSAGE_LIMIT + 1)),
    "a message of clients": (DOWN, m.encode(m.Goodbye(BOOT))),
    "somebody else's": (TOPICS.down("other"), m.encode(m.Receipt(1, 1, "recorded"))),
    "another federation": (OFFER, m.encode(m.Offer("other", 9, OTHER, 0.0))),
    "another federation's topic": (Topics("other").offer, m.encode(m.Offer("demo", 9, OTHER, 0.0))),
    "a bundle that lies": (OFFER, m.encode(m.Offer("demo", 9, BAD_DELTA, 0.0))),
    "a bundle too large": (OFFER, m.encode(m.Offer("demo", 9, HUGE, 0.0))),
    "an empty bundle": (OFFER, m.encode(m.Offer("demo", 9, EMPTY, 0.0))),
    "a delta that lies": (DOWN, m.encode(invitation(5, version=2, digest=V2, delta=BAD_DELTA))),
    "a delta too large": (DOWN, m.encode(invitation(5, version=2, digest=V2, delta=HUGE))),
    "an empty delta": (DOWN, m.encode(invitation(5, version=2, digest=V2, delta=EMPTY))),
    "a wild topic": ("fedge/demo/pub/" + "x" * 5000, b""),
}
STATES = {
    "idle": lambda: joined(),
    "working": lambda: (machine := joined(), machine.told(invitation()))[0],
    "uploading": lambda: (machine := joined(), machine.told(invitation()), worked(machine))[0],
    "downloading": lambda: (
        machine := joined(),
        machine.told(invitation(version=2, digest=V2, delta=refer(DELTA, chunk=1024, inline=0))),
    )[0],
    "fresh": lambda: (machine := Machine(), machine.feed(e.Connected()))[0],
}


def snapshot(session):
    return {name: repr(value) for name, value in vars(session).items() if name != "dropped"}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_message_is_counted_logged_once_and_changes_nothing(state, bad):
    machine = STATES[state]()
    before = snapshot(machine.session)
    (log,) = machine.feed(e.Received(*BAD[bad]))
    assert isinstance(log, e.Log)
    assert len(log.text) < 1000
    assert machine.feed(e.Received(*BAD[bad])) == []
    assert machine.session.dropped == 2
    assert snapshot(machine.session) == before


def test_chunks_of_other_blobs_are_ignored():
    machine = STATES["downloading"]()
    before = snapshot(machine.session)
    assert machine.feed(e.Received(CHUNK, bytes(1024))) == []
    assert machine.feed(e.Received(TOPICS.published(hashlib.sha256(DELTA).digest(), 0), bytes(7))) == []
    assert snapshot(machine.session) == before


@pytest.mark.parametrize("seed", range(40))
def test_whatever_happens_no_wake_stays_in_the_past_and_no_install_overtakes_a_task(seed):
    """A random life: events in any order that a driver can produce."""
    rng = random.Random(seed)
    machine = Machine()
    work, install, connected = None, None, False
    deltas = [None, refer(b"d", chunk=1024), refer(DELTA, chunk=1024, inline=0), BAD_DELTA]
    for _ in range(400):
        choices = [lambda: [action for _, action in machine.wait(rng.uniform(0, 60))]]
        choices.append(lambda: machine.feed(e.Available(rng.random() < 0.8)))
        if not connected:
            choices.append(lambda: machine.feed(e.Connected()))
        else:
            bundle = rng.choice([INLINE, INLINE, OTHER, CHUNKED])
            choices += [lambda: machine.feed(e.Disconnected())]
            choices += [lambda b=bundle: machine.offered(b, epoch=rng.randrange(5), spread=rng.uniform(0, 3))] * 2
            delta = rng.choice(deltas)
            invited = invitation(
                rng.randrange(6), held=rng.randrange(2), version=rng.randrange(3), digest=V1, delta=delta
            )
            choices += [lambda i=invited: machine.told(i)] * 3
            status = rng.choice(["recorded", "late", "refused", "void"])
            choices += [lambda s=status: machine.told(m.Receipt(1, rng.randrange(6), s))] * 2
            choices += [lambda: machine.chunk(CHUNKED, rng.randrange(count(CHUNKED)), BUNDLE)] * 4
            choices += [lambda: machine.chunk(deltas[2], rng.randrange(5), DELTA)] * 2
        if work is not None:
            task = work.invitation.task
            choices += [lambda t=task: machine.feed(e.Finished(1, t, b"update", 1, V1))]
            choices += [lambda t=task: machine.feed(e.Failed(1, t, "no", 0, NO_HASH))]
        if install is not None:
            choices += [lambda i=install: machine.feed(e.Installed(i.bundle, 5))] * 3
            choices += [lambda i=install: machine.feed(e.Rejected(i.bundle, "no"))]
        actions = rng.choice(choices)()
        session = machine.session
        ended = [action for action in actions if isinstance(action, e.Work | e.Install)]
        if not session._working or (ended and work is not None):
            work = None
        if not session._installing or (ended and install is not None):
            install = None
        for action in actions:
            if isinstance(action, e.Work):
                assert work is None
                assert install is None
                work = action
            if isinstance(action, e.Install):
                assert work is None
                assert install is None
                install = action
        connected = session._connected
        assert machine.still()


def test_an_invitation_that_crosses_the_announcement_of_chunks_does_not_repeat_it():
    machine = joined(pending=Pending(1, 1, bytes(3000)))
    assert said(machine.told(invitation()), m.Upload) == []
    machine.now += 4.0
    machine.told(m.Credit(refer(bytes(3000), chunk=1024, inline=0).sha256, (0,)))
    machine.now += 4.0
    assert said(machine.told(invitation()), m.Upload) == []
    machine.now += 1.5
    assert len(said(machine.told(invitation()), m.Upload)) == 1


# A download across restarts.


def kept(ref, data, indices):
    assembly = Assembly(ref, limit=LIMIT)
    for index in indices:
        assembly.add(index, piece(data, ref, index))
    return assembly


def fetching(partial=None, ref=CHUNKED, keep=0):
    machine = Machine(Held(partial=partial), keep=keep)
    machine.feed(e.Connected())
    return machine, machine.offered(ref)


def test_chunks_of_a_large_download_are_kept_once_each_until_its_bundle_is_installed():
    machine, _ = fetching()
    actions = [action for index in (0, 0, *range(1, 20)) for action in machine.chunk(CHUNKED, index, BUNDLE)]
    assert [action.index for action in only(actions, e.Keep)] == list(range(20))
    assert not only(actions, e.Discard)
    assert e.Discard() in machine.feed(e.Installed(CHUNKED.sha256, 50))


def test_a_small_download_is_not_worth_keeping():
    machine, _ = fetching(keep=CHUNKED.size + 1)
    assert not only(machine.chunk(CHUNKED, 0, BUNDLE), e.Keep)


def test_a_restart_goes_on_with_the_chunks_that_were_kept():
    machine, actions = fetching(kept(CHUNKED, BUNDLE, range(18)))
    assert only(actions, e.Subscribe)[-1].topics == tuple(TOPICS.published(CHUNKED.sha256, i) for i in (18, 19))
    machine.chunk(CHUNKED, 18, BUNDLE)
    assert e.Install(CHUNKED.sha256, BUNDLE) in machine.chunk(CHUNKED, 19, BUNDLE)


def test_a_restart_with_everything_kept_fetches_nothing():
    _, actions = fetching(kept(CHUNKED, BUNDLE, range(20)))
    assert e.Install(CHUNKED.sha256, BUNDLE) in actions
    assert len(only(actions, e.Subscribe)) == 0


def test_chunks_of_another_blob_are_of_no_use():
    other = bytes(len(BUNDLE))
    _, actions = fetching(kept(refer(other, chunk=1024, inline=0), other, range(20)))
    assert len(only(actions, e.Subscribe)[-1].topics) == 4


def test_damaged_chunks_that_were_kept_are_discarded_and_fetched_anew():
    partial = Assembly(CHUNKED, limit=LIMIT)
    for index in range(20):
        partial.add(index, bytes(1024))
    machine, actions = fetching(partial)
    assert e.Discard() in actions
    actions = [action for _, action in machine.wait(5.0)]
    assert len(only(actions, e.Subscribe)[-1].topics) == 4


def test_a_release_is_handed_on_and_what_it_lacks_is_asked_for_under_the_epoch():
    machine = Machine(Held(bundle=INLINE.sha256))
    machine.feed(e.Connected())
    machine.offered(epoch=3)
    release = m.Release(b"what it is", bytes(64))
    assert machine.told(release) == [e.Announced(release)]
    assert said(machine.feed(e.Lacking(V1, (1, 5)))) == [m.Missing(V1, (1, 5))]


def test_each_hello_says_how_the_device_is_then():
    machine = Machine(Held(bundle=INLINE.sha256))
    degrees = iter((40.0, 50.0))
    machine.session.condition = lambda: m.Condition(degrees=next(degrees))
    machine.feed(e.Connected())
    (first,) = said(machine.offered(), m.Hello)
    (second,) = said(machine.feed(e.Available(True)), m.Hello)
    assert (first.condition.degrees, second.condition.degrees) == (40.0, 50.0)
