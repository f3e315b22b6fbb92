"""The outbox: one update at a time, announced until it has its receipt, in the chunks that the broker takes."""

import math
import random

import pytest

from edge_client.upload import Outbox, Patience, Pending
from edge_client.wire.messages import Traffic
from edge_client.wire.transfer import count

UPDATE = random.Random(3).randbytes(5000)
NOTHING = Traffic()


@pytest.fixture
def outbox():
    return Outbox(inline=100, chunk=1024, patience=Patience(5.0, 300.0, random.Random(1)))


def test_nothing_is_said_before_the_server_is_known_to_be_there(outbox):
    assert outbox.empty
    assert outbox.wake is None
    outbox.put(Pending(1, 7, UPDATE))
    assert (outbox.empty, outbox.wake, outbox.say(NOTHING, 1e9)) == (False, None, None)
    outbox.schedule(3.0)
    assert (outbox.wake, outbox.say(NOTHING, 2.9)) == (3.0, None)
    upload = outbox.say(Traffic(10, 20), 3.0)
    assert (upload.epoch, upload.task, upload.blob.size) == (1, 7, 5000)
    assert upload.traffic == Traffic(5010, 20), "with the bytes that follow"
    assert 3.0 < outbox.wake <= 3.0 + 10.0


def test_only_its_own_receipt_settles_an_update(outbox):
    outbox.put(Pending(1, 7, UPDATE), at=0.0)
    assert outbox.holds(1, 7)
    for epoch, task in ((1, 6), (2, 7)):
        assert not outbox.settle(epoch, task, 1.0)
        assert not outbox.holds(epoch, task)
    assert outbox.settle(1, 7, 1.0)
    assert outbox.empty
    assert not outbox.settle(1, 7, 2.0), "a second receipt says nothing new"


def test_only_a_grant_for_this_update_sends_chunks_and_its_receipt_tells_the_speed(outbox):
    outbox.put(Pending(1, 7, UPDATE), at=0.0)
    blob = outbox.say(NOTHING, 0.0).blob
    assert list(outbox.grant(bytes(32), (0, 1), 1.0)) == []
    sent = dict(outbox.grant(blob.sha256, (*range(count(blob)), 99, 0), 1.0))
    assert b"".join(sent[index] for index in range(count(blob))) == UPDATE
    outbox.settle(1, 7, 11.0)
    assert outbox.speed == 500.0
    outbox.put(Pending(1, 8, b"small"), at=20.0)
    assert outbox.say(NOTHING, 20.0).blob.inline == b"small"
    outbox.settle(1, 8, 21.0)
    assert outbox.speed == 500.0, "what travels in one message tells nothing about the link"


def test_a_lost_connection_waits_for_the_server_and_tells_no_speed(outbox):
    outbox.put(Pending(1, 7, UPDATE), at=0.0)
    blob = outbox.say(NOTHING, 0.0).blob
    list(outbox.grant(blob.sha256, (0,), 1.0))
    outbox.interrupt()
    assert outbox.wake is None
    outbox.schedule(9.0)
    assert outbox.say(NOTHING, 9.0).blob == blob
    outbox.settle(1, 7, 10.0)
    assert outbox.speed == 0.0


def test_an_update_is_cut_again_to_what_the_broker_takes_and_stays_due(outbox):
    outbox.put(Pending(1, 7, UPDATE), at=4.0)
    outbox.cut(100, 512)
    assert outbox.wake == 4.0
    assert count(outbox.say(NOTHING, 4.0).blob) == 10
    due = outbox.wake
    outbox.cut(100, 512)
    assert outbox.wake == due, "sizes that have not changed change nothing"
    outbox.drop()
    outbox.put(Pending(1, 8, b"x" * 99), at=math.inf)
    outbox.cut(100, 64)
    outbox.schedule(5.0)
    assert outbox.say(NOTHING, 5.0).blob.inline is None, "an announcement is no larger than a chunk"
