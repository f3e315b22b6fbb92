"""How clients behave: buckets, strikes, mutes and twins, on a clock that the test turns by hand."""

import pytest

from broker_server.conduct import Conduct, Mute
from broker_server.config import Limits

LIMITS = Limits(messages=10.0, bytes=1000.0, strikes=3.0, mute_seconds=60.0)


def test_a_client_may_say_a_few_seconds_worth_at_once_and_then_its_rate():
    conduct = Conduct(LIMITS)
    assert [conduct.spend("a", 1, 0.0) for _ in range(41)] == [True] * 40 + [False]
    assert [conduct.spend("a", 1, 1.0) for _ in range(11)] == [True] * 10 + [False]
    assert conduct.spend("b", 1, 1.0) is True


def test_bytes_are_counted_too():
    conduct = Conduct(LIMITS)
    assert [conduct.spend("a", 3000, 0.0), conduct.spend("a", 3000, 0.0)] == [True, False]
    assert conduct.spend("a", 1000, 0.0) is True


def test_chunks_that_come_late_fit_into_what_may_be_said():
    conduct = Conduct(LIMITS, window=100)
    assert all(conduct.spend("a", 1, 0.0) is True for _ in range(200))


def test_who_goes_on_and_on_is_muted_and_the_others_are_not():
    conduct = Conduct(LIMITS)
    answers = [conduct.spend("a", 1, 0.0) for _ in range(110)]
    (mute,) = [answer for answer in answers if isinstance(answer, Mute)]
    assert (mute.client, mute.seconds) == ("a", 60.0)
    assert conduct.muted("a", 59.9)
    assert not conduct.muted("a", 60.0)
    assert not conduct.muted("b", 0.0)


def test_strikes_mute_and_each_mute_is_longer_up_to_a_bound():
    conduct, now, seconds = Conduct(LIMITS), 0.0, []
    for _ in range(9):
        assert conduct.strike("a", "x", now) is None
        assert conduct.strike("a", "x", now) is None
        mute = conduct.strike("a", "the last straw", now)
        assert mute is not None
        assert mute.reason == "the last straw"
        seconds.append(mute.seconds)
        now += mute.seconds
    assert seconds == [60.0 * 2**n for n in (0, 1, 2, 3, 4, 5, 6, 6, 6)]


def test_strikes_are_forgiven_with_time():
    conduct = Conduct(LIMITS)
    for minute in range(20):
        assert conduct.strike("a", "x", 60.0 * minute) is None


def test_a_client_that_is_forgiven_starts_anew():
    conduct = Conduct(LIMITS)
    while conduct.strike("a", "x", 0.0) is None:
        pass
    conduct.forgive("a")
    assert not conduct.muted("a", 0.0)
    assert conduct.spend("a", 1, 0.0) is True
    conduct.forgive("nobody")


@pytest.mark.parametrize(
    ("boots", "times"),
    [("aaaa", 0), ("abcdef", 0), ("aba", 0), ("ababa", 1), ("ababababab", 1), ("abcabcabc", 1)],
)
def test_boots_that_come_back_are_two_devices(boots, times):
    conduct = Conduct(LIMITS)
    assert sum(conduct.greeted("pi", boot.encode(), 0.0) for boot in boots) == times


def test_a_single_late_message_is_no_twin():
    conduct = Conduct(LIMITS)
    assert [conduct.twin("pi", 0.0) for _ in range(5)] == [False, False, True, False, False]


def test_names_that_are_made_up_do_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr("broker_server.conduct._RECORDS", 100)
    conduct = Conduct(LIMITS)
    for number in range(1000):
        conduct.spend(f"x{number}", 1, 0.0)
    assert len(conduct._records) == 100


def test_mutes_are_forgotten_with_time_too():
    conduct, now, seconds = Conduct(LIMITS), 0.0, []
    for pause in (0.0, 0.0, 7300.0, 0.0, 400_000.0):
        now += pause
        mute = next(filter(None, (conduct.strike("a", "x", now) for _ in range(9))))
        seconds.append(mute.seconds)
        now += mute.seconds
    assert seconds == [60.0, 120.0, 60.0, 120.0, 60.0]
