import random
from collections import Counter

from broker_server.selection import Candidate, select

FLEET = [Candidate(f"pi-{number}", samples=number, available=number % 4 != 0) for number in range(40)]


def test_only_available_ones_and_each_once():
    chosen = select(FLEET, 12, random.Random(1))
    assert len(set(chosen)) == 12
    assert not {f"pi-{number}" for number in range(0, 40, 4)} & set(chosen)


def test_the_seed_decides_and_not_the_order():
    shuffled = FLEET.copy()
    random.Random(5).shuffle(shuffled)
    assert select(FLEET, 5, random.Random(1)) == select(shuffled, 5, random.Random(1))
    assert select(FLEET, 5, random.Random(1)) != select(FLEET, 5, random.Random(2))


def test_the_choice_stays_the_same_from_release_to_release():
    assert select(FLEET, 4, random.Random(2026)) == ["pi-13", "pi-27", "pi-29", "pi-5"]


def test_fewer_than_wanted_and_none():
    assert sorted(select(FLEET, 1000, random.Random(1))) == sorted(c.id for c in FLEET if c.available)
    assert select([], 3, random.Random(1)) == []
    assert select(FLEET, 0, random.Random(1)) == []


def test_everybody_is_equally_likely():
    rng, fleet = random.Random(3), [Candidate(str(number)) for number in range(10)]
    counts = Counter(client for _ in range(5000) for client in select(fleet, 3, rng))
    # 1,500 expected each; the standard deviation of a count is 32.
    assert all(abs(counts[str(number)] - 1500) < 5 * 32 for number in range(10))
