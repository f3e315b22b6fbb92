"""Deltas of a task, with rounds and without: what has the same bytes is spread once, and cleared as often as built."""

from broker_server import events as e
from broker_server.flights import Flights
from broker_server.records import Task
from broker_server.tasks import OpenTask
from edge_client.wire import transfer
from tests.broker_server.desk import settings

SAME, OTHER = (transfer.refer(bytes([number]) * 5000, chunk=1024, inline=1024) for number in (1, 2))
VERSIONS = {number: bytes([number]) * 32 for number in range(4)}


def task(number: int, *cohort: str) -> Task:
    return Task(epoch=1, task=number, round=1, kind="train", version=3, cohort=cohort, plan=b"", opened=0.0)


def of(actions, kind):
    return [action for action in actions if isinstance(action, kind)]


def test_versions_of_one_anchor_share_their_delta():
    open_ = OpenTask(task(1, "a", "b", "c"), settings(), VERSIONS, limit=10**6)
    for client, held in zip("abc", (0, 1, 2), strict=True):
        assert open_.invite(client, held, VERSIONS[held]) == [e.Prepare(held, 3)]
    actions = [action for held, ref in ((0, OTHER), (1, SAME), (2, SAME)) for action in open_.prepared(held, ref)]
    assert of(actions, e.Spread) == [e.Spread(OTHER), e.Spread(SAME)]
    assert len(of(actions, e.Publish)) == 3
    assert open_.blobs() == [OTHER, SAME]
    assert open_.sweep() == [e.Sweep(OTHER), e.Sweep(SAME), e.Sweep(SAME)]


def test_without_rounds_too():
    flights = Flights(settings(), 10**6)
    ways = {"a": (0, 3), "b": (1, 3), "c": (2, 3)}
    for number, (client, way) in enumerate(ways.items(), 1):
        flights.launch(task(number, client), b"boot0000")
        flight = flights.of(client)
        assert flight is not None
        flight.way, flights._deltas[way] = way, None
    actions = [action for way in ways.values() for action in flights.prepared(way, SAME)[0]]
    assert actions == [e.Spread(SAME)]
    assert flights.blobs() == [SAME]
    assert flights.prepared((7, 3), SAME)[0] == [e.Sweep(SAME)]
