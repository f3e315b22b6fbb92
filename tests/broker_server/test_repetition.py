"""Chunks that are asked for again: each once in a while, a window at a time, and paid for by who asks."""

import dataclasses
import hashlib

import pytest

from broker_server import events as e
from broker_server.conduct import Conduct
from broker_server.config import Limits
from broker_server.repetition import Repetition
from edge_client.held import SessionSettings
from edge_client.wire import messages as m
from tests.broker_server.desk import TOPICS, Desk, of, settings

REF = m.BlobRef(hashlib.sha256(b"z").digest(), 5_000_000, 65_536)


def test_each_chunk_is_wanted_once_and_a_window_of_them_at_a_time():
    repetition = Repetition(4)
    assert repetition.wanted(REF, (0,) * 4096, 0.0) == (0,)
    assert repetition.wanted(REF, (7, 5, 7, 10_000, 6, 3, 2), 0.0) == (7, 5, 6, 3)


def test_what_was_published_a_moment_ago_is_not_published_once_more():
    repetition = Repetition(4)
    repetition.publish(REF, (0, 1), 10.0)
    assert repetition.wanted(REF, (0, 1, 2), 12.9) == (2,)
    assert repetition.wanted(REF, (0, 1, 2), 13.0) == (0, 1, 2)
    repetition.publish(REF, (0, 1), 13.0)
    repetition.forget()
    assert repetition.wanted(REF, (0, 1), 13.0) == (0, 1)


def test_what_is_published_again_is_charged_to_who_asks():
    conduct = Conduct(Limits(messages=10.0, bytes=1000.0))
    assert [conduct.afford("a", 3, 1000, 0.0), conduct.afford("a", 3, 1000, 0.0)] == [3, 1]
    assert conduct.afford("a", 3, 1000, 1.0) == 1
    assert conduct.afford("b", 3, 1000, 1.0) == 3
    assert [conduct.afford("c", 3, 9000, 1.0), conduct.afford("c", 3, 9000, 5.0)] == [1, 0]
    assert conduct.spend("c", 1, 5.0) is False


@pytest.mark.parametrize("named", [(0,) * 4096, tuple(range(77)) * 53])
def test_a_few_kilobytes_do_not_make_a_server_publish_hundreds_of_megabytes(named):
    table = Desk(settings())
    table.hello("a", "b", "c")
    table.coordinator.restored = dataclasses.replace(table.restored, bundle=REF)
    spread = []
    for client in ("a", "b", "c"):
        asked = m.encode(m.Missing(REF.sha256, named[:4096]))
        spread += of(table.feed(e.Received(TOPICS.up(client), asked)), e.Spread)
    chunks = [index for one in spread for index in one.indices]
    assert len(set(chunks)) == len(chunks) <= 3 * 16
    assert all(len(one.indices) <= 16 for one in spread)


def test_a_client_may_miss_its_whole_window_whatever_the_server_lets_it_upload_at_once():
    table = Desk(settings(transfer={"window": 1}))
    table.hello("a")
    table.coordinator.restored = dataclasses.replace(table.restored, bundle=REF)
    missed = tuple(range(SessionSettings("a", "b").window))
    spread = of(table.feed(e.Received(TOPICS.up("a"), m.encode(m.Missing(REF.sha256, missed)))), e.Spread)
    assert [one.indices for one in spread] == [missed]
