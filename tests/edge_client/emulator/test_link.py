"""A radio keeps the order, takes its time, and loses what is under way when it falls."""

import asyncio

import pytest

from edge_client.emulator.link import RadioLink
from edge_client.emulator.profile import PhoneProfile
from edge_client.wire.messages import Traffic


class Inner:
    """The link underneath: notes what reaches it, and when."""

    traffic = Traffic(3, 4)

    def __init__(self):
        self.calls, self.handler = [], None
        self.over = asyncio.Event()

    def note(self, *call):
        self.calls.append((asyncio.get_running_loop().time(), *call))

    def publish(self, topic, payload, *, retain=False):
        self.note("publish", topic, payload, retain)

    def subscribe(self, topics):
        self.note("subscribe", topics)

    def unsubscribe(self, topics):
        self.note("unsubscribe", topics)

    def drop(self):
        self.note("drop")

    async def run(self, handler):
        self.handler = handler
        handler.connected()
        await self.over.wait()

    async def close(self):
        self.note("close")
        self.over.set()


class Phone:
    def __init__(self):
        self.events = []

    def connected(self):
        self.events.append("connected")

    def disconnected(self, reason):
        self.events.append(reason)

    def message(self, topic, payload):
        self.events.append((topic, payload))


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop whose clock jumps to the next timer: nothing waits, and times are exact."""

    def __init__(self):
        super().__init__()
        self._now = 0.0
        self._clock_resolution = 1e-9
        select = self._selector.select

        def jump(timeout):
            if timeout:
                self._now += timeout
            return select(0)

        self._selector.select = jump

    def time(self):
        return self._now


def play(scenario, **profile):
    async def body():
        inner, phone = Inner(), Phone()
        link = RadioLink(inner, PhoneProfile(**profile))
        life = asyncio.ensure_future(link.run(phone))
        await asyncio.sleep(0)
        await scenario(link, inner, phone)
        inner.over.set()
        await life

    loop = VirtualLoop()
    try:
        loop.run_until_complete(body())
    finally:
        loop.close()


def times(inner):
    return [pytest.approx(call[0]) for call in inner.calls]


def test_a_radio_without_limits_is_the_link_underneath():
    async def scenario(link, inner, phone):
        link.subscribe(("a", "b"))
        link.publish("t", b"x", retain=True)
        link.unsubscribe(("a",))
        inner.handler.message("t", b"x")
        assert [call[1:] for call in inner.calls] == [
            ("subscribe", ("a", "b")),
            ("publish", "t", b"x", True),
            ("unsubscribe", ("a",)),
        ]
        assert phone.events == ["connected", ("t", b"x")]
        assert link.traffic == Traffic(3, 4)

    play(scenario)


def test_bytes_take_bandwidth_one_after_the_other_and_latency_once():
    async def scenario(link, inner, phone):
        link.publish("t", bytes(100))
        link.publish("t", bytes(50))
        await asyncio.sleep(10)
        assert [when for when, *_ in inner.calls] == [pytest.approx(1.5), pytest.approx(2.0)]
        link.publish("t", bytes(100))
        await asyncio.sleep(10)
        assert inner.calls[2][0] == pytest.approx(11.5)

    play(scenario, bandwidth=100, latency=0.5)


def test_both_directions_have_their_own_lane():
    async def scenario(link, inner, phone):
        link.publish("t", bytes(1000))
        inner.handler.message("t", b"short")
        await asyncio.sleep(0.2)
        assert phone.events == ["connected", ("t", b"short")]
        assert inner.calls == []

    play(scenario, bandwidth=100, latency=0.1)


def test_messages_that_are_due_at_once_keep_their_order():
    async def scenario(link, inner, phone):
        for number in range(100):
            link.publish(str(number), b"")
            inner.handler.message(str(number), b"")
        await asyncio.sleep(1)
        assert [call[2] for call in inner.calls] == [str(number) for number in range(100)]
        assert [event[0] for event in phone.events[1:]] == [str(number) for number in range(100)]

    play(scenario, latency=0.5)


def test_what_is_under_way_is_lost_with_the_connection_and_does_not_delay_the_next():
    async def scenario(link, inner, phone):
        link.publish("lost", bytes(1000))
        inner.handler.message("lost", bytes(1000))
        link.drop()
        inner.handler.disconnected("fell")
        inner.handler.connected()
        link.publish("new", bytes(10))
        await asyncio.sleep(100)
        assert [call[1:3] for call in inner.calls] == [("drop",), ("publish", "new")]
        assert inner.calls[1][0] == pytest.approx(0.1)
        assert phone.events == ["connected", "fell", "connected"]

    play(scenario, bandwidth=100)


def test_a_connection_that_is_lost_takes_along_what_was_under_way():
    async def scenario(link, inner, phone):
        link.publish("lost", bytes(10))
        inner.handler.disconnected("fell")
        await asyncio.sleep(10)
        assert inner.calls == []

    play(scenario, bandwidth=100)


def test_closing_sends_what_is_under_way_but_does_not_wait_for_ever():
    async def goodbye(link, inner, phone):
        link.publish("goodbye", bytes(10))
        await link.close()
        assert [call[1] for call in inner.calls] == ["publish", "close"]

    play(goodbye, bandwidth=100, latency=0.5)

    async def too_much(link, inner, phone):
        link.publish("large", bytes(10**6))
        await link.close()
        assert [(call[0], call[1]) for call in inner.calls] == [(pytest.approx(2.0), "close")]

    play(too_much, bandwidth=100)
