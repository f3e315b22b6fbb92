"""A clock is believed unless something else shows that it is wrong; what it shows is said."""

import calendar

from edge_client.trust.clock import believable


def moment(text: str) -> float:
    year, month, day = map(int, text.split("-"))
    return float(calendar.timegm((year, month, day, 12, 0, 0)))


def test_a_clock_that_nothing_contradicts_is_believed():
    assert believable(moment("2027-03-01"), 0.0) is None
    assert believable(moment("2027-03-01"), moment("2026-11-25")) is None


def test_a_clock_before_fedge_is_not_believed():
    doubt = believable(0.0, 0.0)
    assert doubt is not None
    assert "1970-01-01 00:00 UTC" in doubt
    assert "timedatectl" in doubt


def test_a_clock_before_the_enrolment_is_not_believed_but_clocks_differ():
    enrolled = moment("2026-11-25")
    doubt = believable(moment("2026-04-27"), enrolled)
    assert doubt is not None
    assert "2026-04-27" in doubt
    assert "2026-11-25" in doubt
    assert believable(enrolled - 86_000, enrolled) is None
    assert believable(enrolled - 87_000, enrolled) is not None
