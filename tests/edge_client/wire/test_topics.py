"""Topics: what is built is parsed, and nothing else is."""

import pytest

from edge_client.errors import WireError
from edge_client.wire.topics import Chunk, Topics

SHA = bytes(range(32))
TOPICS = Topics("demo")
CLIENTS = ["a", "pi-7", "_x", "-", "a.b", "A" * 64]


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("index", [0, 1, 999_999_999])
def test_round_trip(client, index):
    assert TOPICS.parse_up(TOPICS.up(client)) == (client, None)
    assert TOPICS.parse_up(TOPICS.uploaded(client, SHA, index)) == (client, Chunk(SHA, index))
    assert TOPICS.parse_pub(TOPICS.offer) is None
    assert TOPICS.parse_pub(TOPICS.published(SHA, index)) == Chunk(SHA, index)


def test_topics_stay_within_their_access_rules_and_seven_levels():
    up, down = [TOPICS.up("a"), TOPICS.uploaded("a", SHA, 1)], TOPICS.down("a")
    public = [TOPICS.offer, TOPICS.published(SHA, 1)]
    assert all(topic.startswith("fedge/demo/up/a/") and topic.startswith(TOPICS.every_up[:-1]) for topic in up)
    assert down.startswith("fedge/demo/down/a/")
    assert all(topic.startswith("fedge/demo/pub/") for topic in public)
    assert all(topic.count("/") < 7 for topic in [*up, down, *public])


HEX = SHA.hex()
HOSTILE_UP = [
    "",
    "fedge/demo/up/a",
    "fedge/demo/up/a/msg/",
    "fedge/demo/up/a/msg\n",
    "fedge/demo/up/a/msg/1",
    "/fedge/demo/up/a/msg",
    "fedge/other/up/a/msg",
    "fedge/demo/down/a/msg",
    "fedge/demo/up//msg",
    "fedge/demo/up/../msg",
    "fedge/demo/up/.a/msg",
    "fedge/demo/up/a b/msg",
    "fedge/demo/up/+/msg",
    "fedge/demo/up/#",
    "fedge/demo/up/ä/msg",
    f"fedge/demo/up/{'a' * 65}/msg",
    f"fedge/demo/up/a/{HEX}",
    f"fedge/demo/up/a/{HEX}/",
    f"fedge/demo/up/a/{HEX}/-1",
    f"fedge/demo/up/a/{HEX}/1\n",
    f"fedge/demo/up/a/{HEX}/٣",
    f"fedge/demo/up/a/{HEX}/{'1' * 10}",
    f"fedge/demo/up/a/{HEX.upper()}/1",
    f"fedge/demo/up/a/{HEX[:-1]}/1",
    "fedge/demo/up/" + "x" * 60_000,
]


@pytest.mark.parametrize("topic", HOSTILE_UP, ids=range(len(HOSTILE_UP)))
def test_hostile_topics_of_clients_are_refused(topic):
    with pytest.raises(WireError, match="not one that a client of 'demo' writes") as caught:
        TOPICS.parse_up(topic)
    assert len(str(caught.value)) < 1000


HOSTILE_PUB = [
    "",
    "fedge/demo/pub",
    "fedge/demo/pub/offer/",
    "fedge/demo/pub/offer\n",
    "fedge/other/pub/offer",
    "fedge/demo/up/a/msg",
    f"fedge/demo/pub/{HEX}",
    f"fedge/demo/pub/{HEX}/x",
    f"fedge/demo/pub/{HEX}/1/1",
    f"fedge/demo/pub/{HEX}/1\n",
]


@pytest.mark.parametrize("topic", HOSTILE_PUB, ids=range(len(HOSTILE_PUB)))
def test_hostile_topics_of_servers_are_refused(topic):
    with pytest.raises(WireError, match="not one that the server of 'demo' publishes"):
        TOPICS.parse_pub(topic)
