import pytest

from broker_server.uploads import Grant, Uploads
from edge_client.errors import WireError
from edge_client.wire import transfer

LIMIT = 100_000


def blob(size: int = 4000, fill: bytes = b"u"):
    data = (fill * size)[:size]
    return data, transfer.refer(data, chunk=1024, inline=0)


def give(uploads: Uploads, client: str, data, ref, indices, now: float = 0.0):
    done, grants = None, []
    for index in indices:
        done, more = uploads.chunk(client, ref.sha256, index, len(transfer.piece(data, ref, index)), now)
        grants += more
    return done, grants


def test_a_window_of_chunks_at_a_time():
    uploads = Uploads(4, 2, LIMIT)
    data, ref = blob()
    assert uploads.announce("a", ref, 0.0) == [Grant("a", ref.sha256, (0, 1))]
    assert give(uploads, "a", data, ref, (1,)) == (None, [Grant("a", ref.sha256, (2,))])
    assert give(uploads, "a", data, ref, (0,)) == (None, [Grant("a", ref.sha256, (3,))])
    assert give(uploads, "a", data, ref, (3, 2)) == (ref, [])
    assert uploads.wake is None


def test_places_are_limited_and_the_queue_moves_on():
    uploads = Uploads(2, 16, LIMIT)
    data, ref = blob()
    assert [grant.client for client in "abc" for grant in uploads.announce(client, ref, 0.0)] == ["a", "b"]
    done, grants = give(uploads, "b", data, ref, range(4))
    assert done == ref
    assert [grant.client for grant in grants] == ["c"]
    uploads.announce("d", ref, 0.0)
    assert [grant.client for grant in uploads.forget("a", 0.0)] == ["d"]


def test_silence_repeats_the_grant_and_then_costs_the_place():
    uploads = Uploads(1, 16, LIMIT, lease=10.0, patience=2)
    _, ref = blob()
    uploads.announce("a", ref, 0.0)
    uploads.announce("b", ref, 0.0)
    assert uploads.wake == 10.0
    assert uploads.tick(9.0) == []
    for now in (10.0, 20.0):
        assert [grant.client for grant in uploads.tick(now)] == ["a"]
    assert [grant.client for grant in uploads.tick(30.0)] == ["b"]


def test_announcing_again_repeats_what_is_missing():
    uploads = Uploads(1, 2, LIMIT)
    data, ref = blob()
    uploads.announce("a", ref, 0.0)
    give(uploads, "a", data, ref, (0,))
    assert uploads.announce("a", ref, 1.0) == [Grant("a", ref.sha256, (1, 2))]


def test_another_blob_of_the_same_client_replaces_the_first():
    uploads = Uploads(1, 16, LIMIT)
    (old, first), (data, second) = blob(), blob(fill=b"v")
    uploads.announce("a", first, 0.0)
    assert uploads.announce("a", second, 0.0) == [Grant("a", second.sha256, (0, 1, 2, 3))]
    with pytest.raises(WireError, match="not under way"):
        give(uploads, "a", old, first, (0,))
    assert give(uploads, "a", data, second, range(4))[0] == second


def test_a_silent_clients_chunks_stay_and_only_the_rest_is_asked_for_when_it_is_back():
    uploads = Uploads(1, 2, LIMIT, lease=10.0, patience=0)
    data, ref = blob()
    other, second = blob(fill=b"w")
    uploads.announce("a", ref, 0.0)
    give(uploads, "a", data, ref, (0,))
    uploads.announce("b", second, 0.0)
    assert [grant.client for grant in uploads.tick(10.0)] == ["b"]
    assert give(uploads, "a", data, ref, (1,), 11.0) == (None, [])  # it was under way when the place was lost
    assert uploads.announce("a", ref, 12.0) == []
    assert give(uploads, "b", other, second, range(4), 13.0)[1][-1] == Grant("a", ref.sha256, (2, 3))
    assert give(uploads, "a", data, ref, (3, 2), 14.0) == (ref, [])


def test_a_client_that_leaves_and_comes_back_goes_on():
    uploads = Uploads(1, 16, LIMIT)
    data, ref = blob()
    uploads.announce("a", ref, 0.0)
    give(uploads, "a", data, ref, (0, 1))
    uploads.forget("a", 1.0)
    assert uploads.wake is None
    assert uploads.announce("a", ref, 2.0) == [Grant("a", ref.sha256, (2, 3))]


def test_what_came_before_a_restart_is_not_asked_for_again():
    data, ref = blob()
    checklists = {"a": transfer.Checklist(ref, limit=LIMIT), "b": transfer.Checklist(ref, limit=LIMIT)}
    for index in range(4):
        checklists["a"].mark(index, len(transfer.piece(data, ref, index)))
    checklists["b"].mark(1, 1024)
    uploads = Uploads(4, 16, LIMIT)
    uploads.resume(checklists)
    assert uploads.here("a", ref)
    assert not uploads.here("b", ref)
    assert uploads.announce("b", ref, 0.0) == [Grant("b", ref.sha256, (0, 2, 3))]
    assert not uploads.here("c", ref)


@pytest.mark.parametrize(("index", "payload"), [(4, b""), (0, b"short"), (3, bytes(1024))])
def test_a_chunk_of_the_wrong_size_or_place_is_refused(index, payload):
    uploads = Uploads(1, 16, LIMIT)
    data, ref = blob()
    uploads.announce("a", ref, 0.0)
    with pytest.raises(WireError, match="does not belong"):
        uploads.chunk("a", ref.sha256, index, len(payload), 0.0)
    assert give(uploads, "a", data, ref, range(4))[0] == ref


def test_a_blob_above_the_limit_is_refused_before_anything_is_allocated():
    uploads = Uploads(1, 16, 3999)
    _, ref = blob()
    with pytest.raises(WireError, match="update of 4000 bytes; at most 3999"):
        uploads.announce("a", ref, 0.0)


def test_who_sends_a_byte_now_and_then_makes_way_for_those_who_wait():
    uploads = Uploads(1, 1, LIMIT, turn=30.0)
    data, slow = blob(fill=b"s")
    other, quick = blob(fill=b"q")
    uploads.announce("slow", slow, 0.0)
    assert uploads.announce("quick", quick, 1.0) == []
    give(uploads, "slow", data, slow, (0,), 9.0)
    assert uploads.tick(19.0) == [Grant("slow", slow.sha256, (1,))]
    give(uploads, "slow", data, slow, (1,), 28.0)
    assert uploads.wake == 30.0
    assert uploads.tick(30.0) == [Grant("quick", quick.sha256, (0,))]
    assert uploads.wake == 40.0
    # What has come of it stays, and its turn comes again.
    grants = []
    for index in range(4):
        _, grants = give(uploads, "quick", other, quick, (index,), 31.0)
    assert grants == [Grant("slow", slow.sha256, (2,))]


def test_a_slow_client_keeps_its_place_while_nobody_waits():
    uploads = Uploads(1, 1, LIMIT, turn=30.0)
    data, ref = blob()
    uploads.announce("slow", ref, 0.0)
    give(uploads, "slow", data, ref, (0,), 95.0)
    assert uploads.wake == 105.0
    assert uploads.tick(100.0) == []


def test_those_who_wait_take_turns():
    uploads = Uploads(1, 1, LIMIT, lease=1000.0, turn=30.0)
    for number, client in enumerate("abc"):
        uploads.announce(client, blob(fill=client.encode())[1], float(number))
    order = []
    for now in (30.0, 60.0, 90.0, 120.0):
        order += [grant.client for grant in uploads.tick(now)]
    assert order == ["b", "c", "a", "b"]
