"""A thousand clients that lose broker or server at once come back spread out: real machines on a virtual clock."""

import random
from collections import Counter

import pytest

from broker_server import events as e
from edge_client import events as c
from edge_client.held import Held, SessionSettings
from edge_client.session import ClientSession
from edge_client.transport import back_off
from edge_client.upload import Pending
from edge_client.wire import messages as m
from tests.broker_server.desk import BUNDLE, NAME, TOPICS, Desk, Paper, digest, of, settings

FLEET = 1000
CONFIG = settings(round={"cohort": 5, "clients": FLEET})


def name(number):
    return f"c{number:04d}"


def session(number, pending=None, **more):
    held = Held(BUNDLE.sha256, 0, digest(0), pending, samples=10)
    rng = random.Random(number)
    return ClientSession(SessionSettings(name(number), NAME, **more), held, rng, rng.randbytes(8))


def said(actions, kind):
    published = [m.decode(action.payload) for action in actions if isinstance(action, c.Publish)]
    return [message for message in published if isinstance(message, kind)]


def peak(times, window=1.0):
    """The most of these in any ``window`` seconds, on a grid of half of it."""
    halves = Counter(int(time / (window / 2)) for time in times)
    return max(halves[half] + halves[half + 1] for half in halves)


def offer_of(desk, actions):
    (retained,) = [action for action in of(actions, e.Retain) if action.topic == TOPICS.offer]
    return retained.payload


def greeted(paper=None):
    desk = Desk(CONFIG, paper or Paper())
    desk.hello(*map(name, range(FLEET)))
    return desk


def hellos(offer, connected):
    """When each of the fleet says hello, where it is connected at these times and has the offer at once."""
    times = []
    for number, now in enumerate(connected):
        one = session(number)
        one.handle(c.Connected(), now)
        actions = one.handle(c.Received(TOPICS.offer, offer), now)
        while not said(actions, m.Hello):
            now = one.wake
            actions = one.handle(c.Tick(), now)
        times.append(now)
    return times


@pytest.mark.parametrize("outage", [0.5, 10.0, 120.0])
def test_a_broker_that_restarts_is_not_overrun_by_connections_nor_the_server_by_hellos(outage):
    connected = []
    for number in range(FLEET):
        rng, now, short = random.Random(number), 0.0, 0
        while (now := now + back_off(short, 60.0, rng)) < outage:
            short += 1
        connected.append(now)
    assert peak(connected) <= 0.6 * FLEET
    assert max(connected) <= outage + 60.0
    desk = greeted()
    desk.feed(e.Disconnected())
    times = hellos(offer_of(desk, desk.feed(e.Connected())), connected)
    assert peak(times) <= 300
    assert max(time - start for time, start in zip(times, connected, strict=True)) <= 5.0


def test_a_new_epoch_is_not_answered_by_all_at_once_though_a_new_server_knows_nobody():
    desk = greeted()
    paper = desk.paper
    for client in desk.cohort:
        desk.upload(client)
    again = Desk(CONFIG, paper)
    times = hellos(offer_of(again, again.actions), [0.0] * FLEET)
    assert peak(times) <= 300
    assert max(times) <= 5.0


def test_a_small_fleet_answers_as_fast_as_it_was_told():
    desk = Desk(settings(transfer={"spread": 0.0}))
    desk.hello("a", "b", "c")
    assert m.decode(offer_of(desk, desk.feed(e.Connected()))).spread == 0.0


def test_a_fleet_that_waits_for_a_dead_server_does_not_ask_in_chorus():
    offer = m.encode(m.Offer(NAME, 1, BUNDLE, 5.0, heartbeat=300.0))
    times = []
    for number in range(FLEET):
        one, now = session(number, Pending(1, 1, b"update"), longest=60.0), 0.0
        one.handle(c.Connected(), now)
        one.handle(c.Received(TOPICS.offer, offer), now)
        last = 0.0
        while (now := one.wake) < 1800.0:
            if said(one.handle(c.Tick(), now), m.Upload):
                assert now - last <= 60.0
                last = now
                times.append(now)
    assert peak(times) <= 300
    assert peak([time for time in times if time > 600.0]) <= 60
