"""When hellos come, on a clock that the test turns by hand."""

import random

from edge_client.greeting import Greeting
from edge_client.upload import Patience


def greeting():
    return Greeting(Patience(5.0, 300.0, random.Random(1)), random.Random(2))


def pauses(one, count, *, spread=0.0, now=0.0):
    """Seconds between so many hellos, each said when it is due."""
    found = []
    for _ in range(count):
        one.said(now, 300.0, spread)
        found.append(one.at - now)
        now = one.at
    return found


def near(found, nominal):
    return all(0.75 * most <= pause <= most for pause, most in zip(found, nominal, strict=True))


def test_without_a_sign_it_is_said_again_with_growing_pauses_and_then_by_heartbeat():
    one = greeting()
    one.plan(0.0)
    found = pauses(one, 9)
    assert near(found[:6], [5, 10, 20, 40, 80, 160])
    assert all(225 <= pause <= 375 for pause in found[6:])


def test_a_sign_leaves_the_next_one_to_the_heartbeat():
    one = greeting()
    one.plan(0.0)
    one.said(0.0, 300.0, 0.0)
    one.heard()
    assert 225 <= one.at <= 375
    assert all(225 <= pause <= 375 for pause in pauses(one, 3))


def test_a_sign_that_comes_before_a_hello_puts_off_neither_it_nor_that_it_is_said_again():
    one = greeting()
    one.plan(0.0)
    one.said(0.0, 300.0, 0.0)
    one.plan(7.0)
    one.heard()
    assert one.at == 7.0
    assert near(pauses(one, 2, now=7.0), [5, 10])


def test_a_large_fleet_says_it_no_sooner_than_by_its_heartbeats():
    one = greeting()
    one.plan(0.0)
    assert all(225 <= pause <= 375 for pause in pauses(one, 4, spread=50.0))
    one.plan(0.0)
    (first,) = pauses(one, 1, spread=10.0)
    assert 100 < first <= 105


def test_nobody_is_greeted_where_nobody_is_there():
    one = greeting()
    one.plan(0.0)
    one.said(0.0, 300.0, 0.0)
    one.plan(None)
    one.heard()
    assert one.at is None
