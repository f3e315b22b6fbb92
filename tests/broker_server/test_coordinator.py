import dataclasses
import itertools
import math
import sys
from collections.abc import Callable, Iterable

import msgspec
import pytest

from broker_server import events as e
from broker_server.coordinator import Coordinator
from edge_client.wire import messages as m
from edge_client.wire import transfer
from tests.broker_server.desk import (
    BUNDLE,
    LIMIT,
    TOPICS,
    Desk,
    Paper,
    digest,
    invited,
    of,
    settings,
    status,
    told,
    update,
)

THREE = {"cohort": 2, "clients": 3, "minimum": 2, "deadline": 60.0}


def desk(paper: Paper | None = None, *, manual: tuple[type, ...] = (), **sections: dict[str, object]) -> Desk:
    return Desk(settings(**({"round": THREE} | sections)), paper, manual=manual)


def others(table: Desk, *names: str) -> list[str]:
    return [name for name in names if name not in table.cohort]


# Rounds.


def test_the_first_round_waits_for_its_quorum():
    table = desk()
    assert of(table.actions, e.Retain) == [e.Retain(TOPICS.offer, m.encode(m.Offer("toys", 1, BUNDLE, 1.0)))]
    assert not of(table.hello("a", "b"), e.OpenTask)
    assert not of(table.hello("c", available=False), e.OpenTask)
    actions = table.hello("c")
    (opened,) = of(actions, e.OpenTask)
    assert len(opened.task.cohort) == 2
    assert set(invited(actions)) == set(opened.task.cohort)


def test_the_choice_repeats_from_the_seed():
    cohorts = set()
    for _ in range(2):
        table = desk(round=THREE | {"clients": 8})
        table.hello(*"abcdefgh")
        cohorts.add(tuple(table.cohort))
    assert len(cohorts) == 1


def test_over_selection_asks_more_and_closes_at_the_goal():
    table = desk(round=THREE | {"over_select": 1.5})
    table.hello("a", "b", "c")
    assert len(table.cohort) == 3
    table.upload("a")
    actions = table.upload("b", update(30))
    assert of(actions, e.Aggregate)[0].result.samples == 40
    assert [client for _, client in table.paper.counted[0]] == ["a", "b"]
    assert status(table.upload("c", identity=(1, 1)), "c") == ["late"]
    assert table.paper.rounds[1].clients == 2
    assert table.task == (1, 2)  # the next round is under way


def test_an_invitation_says_what_to_do():
    table = desk(
        train={"epochs": 2, "batch_size": 8, "hypers": {"lr": 0.5}},
        codec={"target": "step", "value": 3.0, "feedback": "none"},
    )
    invitation = next(iter(invited(table.hello("a", "b", "c")).values()))
    assert invitation.plan == m.TrainPlan(2, 0, 8, {"lr": 0.5})
    assert invitation.update == m.UpdatePlan("quantized", "step", 3.0, "none")
    assert (invitation.round, invitation.kind, invitation.deadline) == (1, "train", 60.0)
    assert (invitation.version, invitation.held, invitation.digest) == (0, 0, digest(0))
    assert invitation.delta is None


def test_the_rate_of_an_invitation_falls_with_its_round():
    table = desk(train={"hypers": {"lr": 0.5}, "decay": {"kind": "step", "every": 1}})
    first = invited(table.hello("a", "b", "c"))
    one, other = table.cohort
    table.upload(one)
    second = invited(table.upload(other))
    assert {invitation.plan.hypers["lr"] for invitation in first.values()} == {0.5}
    assert {invitation.plan.hypers["lr"] for invitation in second.values()} == {0.25}


def test_at_the_deadline_the_minimum_is_enough():
    table = desk(round={"cohort": 3, "minimum": 2, "deadline": 60.0})
    table.hello("a", "b", "c")
    table.upload("a")
    table.upload("b")
    assert not of(table.wait(59.0), e.Aggregate)
    assert of(table.wait(1.5), e.Aggregate)


def test_fewer_than_the_minimum_void_the_task_and_ask_again():
    table = desk(round={"cohort": 3, "minimum": 2, "deadline": 60.0})
    table.hello("a", "b", "c")
    table.upload("a")
    actions = table.wait(61.0)
    assert of(actions, e.CloseTask) == [e.CloseTask(1, 1, "void")]
    assert status(actions, "a") == ["void"]
    assert not told(actions, "b", m.Receipt)
    assert "1 of 2 updates" in of(actions, e.Log)[0].text
    assert status(table.upload("b", identity=(1, 1)), "b") == ["void"]
    assert of(table.wait(10.0), e.OpenTask)[0].task.round == 1
    for client in "abc":
        table.upload(client)
    assert table.paper.sums == [30]


def test_a_void_result_is_told_again_with_each_invitation_until_the_next_one_counts():
    table = desk(round={"cohort": 3, "minimum": 2, "deadline": 60.0})
    table.hello("a", "b", "c")
    table.upload("a")
    table.wait(61.0)
    asked = table.wait(10.0)
    assert [one.void for one in told(asked, "a")] == [(1, 1)]
    assert [one.void for one in told(asked, "b")] == [None]
    assert [one.void for one in told(table.hello("a", boot=b"boot0001"), "a")] == [(1, 1)]
    for client in "abc":
        actions = table.upload(client)
    assert {one.void for one in invited(actions).values()} == {None}


@pytest.mark.parametrize("mode", ["synchronous", "buffered"])
def test_a_void_result_is_told_by_the_next_server_too(mode):
    table = desk(round={"cohort": 3, "minimum": 2, "deadline": 60.0}, manual=(e.OpenTask,))
    table.hello("a", "b", "c")
    table.perform()
    table.upload("a")
    table.wait(61.0)
    assert table.paper.outcomes[table.task] == "void"
    sizes = {"cohort": 3, "minimum": 2} if mode == "synchronous" else {"buffer": 3}
    table = Desk(settings(round={"mode": mode, **sizes}), table.paper)
    table.hello("a", "b", "c")
    actions = table.wait(30.0) + table.actions
    assert {client: one.void for client, one in invited(actions).items()} == {"a": (1, 1), "b": None, "c": None}
    assert invited(table.hello("a")).keys() == {"a"}


CODECS = {
    "the same for all": ({"value": 0.3}, {"a": (0.3, 0), "b": (0.3, 0), "pi-7": (0.3, 0)}),
    "by id and by pattern": (
        {"target": "bits", "value": 0.2, "clients": {"pi-*": 0.1, "b": 0.05}},
        {"a": (0.2, 0), "b": (0.05, 0), "pi-7": (0.1, 0)},
    ),
    "the first that fits": (
        {"target": "bits", "value": 0.2, "clients": {"pi-7": 0.3, "*": 0.05}},
        {"a": (0.05, 0), "b": (0.05, 0), "pi-7": (0.3, 0)},
    ),
    "by link, where it is known": (
        {"target": "bits", "value": 0.2, "upload_seconds": 2.5},
        {"a": (0.2, 0), "b": (0.2, 2500), "pi-7": (0.2, 1)},
    ),
}


@pytest.mark.parametrize("name", CODECS)
def test_each_client_is_told_its_rate(name):
    codec, expected = CODECS[name]
    table = desk(codec=codec, round={"cohort": 3, "clients": 3})
    table.hello("a")
    table.hello("b", uplink=1000.0)
    found = invited(table.hello("pi-7", uplink=0.001))
    assert {client: (told_.update.value, told_.update.limit) for client, told_ in found.items()} == expected
    assert {told_.update.target for told_ in found.values()} == {codec.get("target", "nmse")}


def test_a_link_that_has_changed_changes_the_limit():
    table = desk(codec={"upload_seconds": 10.0}, round={"cohort": 2, "clients": 2})
    table.hello("a", "b", uplink=50.0)
    again = invited(table.hello("a", uplink=20.0))
    assert again["a"].update.limit == 200


UNEVEN = {"a": 20, "b": 40, "c": 140}


def test_over_a_cohort_each_client_is_told_its_step_the_same_again_after_a_restart():
    sections = {"codec": {"target": "cohort", "value": 2.0}, "round": {"cohort": 3, "minimum": 2}}
    table = desk(Paper(pace=0.003), **sections)
    first: dict[str, m.Invitation] = {}
    for client, samples in UNEVEN.items():
        first |= invited(table.hello(client, samples=samples))
    assert {one.update for one in first.values()} == {m.UpdatePlan("quantized", "nmse", 0.1)}
    asked: dict[str, m.Invitation] = {}
    for client in UNEVEN:
        asked |= invited(table.upload(client))
    assert {one.update.target for one in asked.values()} == {"absolute"}
    steps = {client: one.update.value for client, one in asked.items()}
    assert steps == {client: pytest.approx(0.006 * 200 / (w * math.sqrt(3))) for client, w in UNEVEN.items()}
    # A server that knows of one client only, and of the pace from the ledger.
    table = desk(table.paper, **sections)
    again = invited(table.hello("b", version=1, samples=40))
    assert {client: one.update.value for client, one in again.items()} == {"b": steps["b"]}
    # The next task follows what the ledger says of aggregates.
    for client in ("a", "c"):
        table.hello(client, version=1, samples=UNEVEN[client])
    table.paper.pace *= 2
    for client in UNEVEN:
        asked |= invited(table.upload(client, identity=table.task))
    assert asked["b"].update.value == pytest.approx(2 * steps["b"])


def test_over_a_cohort_the_noise_is_that_of_the_goal_and_not_of_all_that_are_asked():
    sections = {"codec": {"target": "cohort", "value": 2.0}, "round": {"cohort": 2, "over_select": 1.5, "clients": 3}}
    table = desk(Paper(pace=0.003, version=1, kept={0, 1}), **sections)
    asked = invited(table.hello("a", "b", "c"))
    assert [one.update.value for one in asked.values()] == [pytest.approx(0.006 * math.sqrt(2))] * 3


def test_a_void_is_told_once_the_ledger_has_it():
    table = desk(round={"cohort": 3, "minimum": 2, "deadline": 60.0}, manual=(e.CloseTask,))
    table.hello("a", "b", "c")
    table.upload("a")
    assert not told(table.wait(61.0), "a", m.Receipt)
    assert status(table.perform(), "a") == ["void"]


def test_a_void_round_waits_for_clients_without_spinning():
    table = desk(round={"cohort": 2, "minimum": 2, "deadline": 60.0})
    table.hello("a", "b")
    for client in "ab":
        table.say(client, m.Goodbye(b"boot0000"))
    table.wait(100.0)
    assert table.coordinator.phase == "waiting"
    assert table.coordinator.wake > table.now + 600  # when it looks who has fallen silent
    assert of(table.hello("a", "b"), e.OpenTask)


def test_a_deadline_waits_for_what_is_being_recorded():
    table = desk(manual=(e.Record,))
    table.hello("a", "b", "c")
    first, second = table.cohort
    table.upload(first)
    table.perform()
    table.upload(second)
    assert not of(table.wait(100.0), e.CloseTask)
    assert of(table.perform(), e.Aggregate)


@pytest.mark.parametrize("leaves", ["goodbye", "decline"])
def test_a_lost_member_is_replaced(leaves):
    table = desk()
    table.hello("a", "b", "c")
    lost, (spare,) = table.cohort[0], others(table, "a", "b", "c")
    word = m.Goodbye(b"boot0000") if leaves == "goodbye" else m.Decline(*table.task, "too hot")
    actions = table.say(lost, word)
    assert of(actions, e.Enlarge) == [e.Enlarge(1, 1, (spare,))]
    assert list(invited(actions)) == [spare]


def test_what_clients_say_cannot_harm_the_operators_terminal():
    table = desk()
    table.hello("a", "b", "c")
    logs = of(table.say(table.cohort[0], m.Decline(*table.task, "too\nhot\x1b[2J")), e.Log)
    logs += of(table.feed(e.Received("fedge/\x1b[2J", b"")), e.Log)
    assert len(logs) == 2
    assert all(log.text.isprintable() for log in logs)


def test_with_nobody_left_to_ask_the_minimum_closes_the_round():
    table = desk(round={"cohort": 3, "minimum": 1})
    table.hello("a", "b", "c")
    table.upload("a")
    table.say("b", m.Goodbye(b"boot0000"))
    assert of(table.say("c", m.Decline(1, 1, "no")), e.Aggregate)


def test_the_goodbye_of_an_earlier_life_is_ignored():
    table = desk()
    table.hello("a", "b", "c")
    member = table.cohort[0]
    table.hello(member, boot=b"boot0001")
    assert table.say(member, m.Goodbye(b"boot0000")) == []
    assert table.coordinator.clients == 3


def test_a_member_that_says_hello_is_invited_again():
    table = desk()
    table.hello("a", "b", "c")
    member, (spare,) = table.cohort[0], others(table, "a", "b", "c")
    assert list(invited(table.hello(member))) == [member]
    assert not invited(table.hello(spare))
    table.upload(member)
    assert not invited(table.hello(member))


def test_after_a_reconnection_the_cohort_is_reminded():
    table = desk()
    table.hello("a", "b", "c")
    done, asked = table.cohort
    table.upload(done)
    table.feed(e.Disconnected())
    actions = table.feed(e.Connected())
    assert list(invited(actions)) == [asked]
    assert of(actions, e.Retain)


def test_a_reconnection_does_not_invite_to_a_task_that_is_not_in_the_ledger():
    table = desk(manual=(e.OpenTask,))
    table.hello("a", "b", "c")
    table.feed(e.Disconnected())
    assert not invited(table.feed(e.Connected()))
    assert len(invited(table.perform())) == 2


def lines_of(call: Callable[[], object]) -> int:
    """How many lines of Python a call runs."""
    count, before = 0, sys.gettrace()

    def trace(frame: object, event: str, argument: object) -> object:
        nonlocal count
        count += event == "line"
        return trace

    sys.settrace(trace)  # type: ignore[arg-type]
    try:
        call()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("stage", ["quorum", "asked", "delta", "short"])
def test_a_hello_costs_the_same_in_a_fleet_of_any_size(stage):
    """Before the quorum, while a task is under way, while its delta is built, and with nobody left to ask."""

    def cost(fleet: int) -> int:
        names = [f"c{number}" for number in range(fleet)]
        table = desk(
            round={"cohort": fleet // 2, "over_select": 1.8, "clients": fleet + 5 * (stage == "quorum"), "minimum": 1},
            manual=(e.Prepare,) if stage == "delta" else (),
        )
        table.hello(*names)
        if stage == "delta":
            for name in list(table.cohort)[: fleet // 2]:
                table.upload(name)
        if stage == "short":
            for name in names:
                table.say(name, m.Decline(*table.task, "no"))
        client = table.cohort[-1] if table.paper.tasks else names[-1]
        said = m.Hello(1, b"boot0000", BUNDLE.sha256, 0, digest(0), 10, True)
        event = e.Received(TOPICS.up(client), m.encode(said))
        return lines_of(lambda: table.coordinator.handle(event, table.now))

    assert cost(20) == cost(200)


def test_hellos_of_other_epochs_and_bundles_are_ignored():
    table = desk(round={"cohort": 1})
    hello = m.Hello(2, b"boot0000", BUNDLE.sha256, 0, digest(0), 10, True)
    assert table.say("a", hello) == []
    assert table.say("a", msgspec.structs.replace(hello, epoch=1, bundle=bytes(32))) == []
    assert table.say("a", msgspec.structs.replace(hello, epoch=1)) != []


def test_a_client_that_died_without_a_last_will_is_not_asked_after_a_few_heartbeats():
    table = desk(round={"cohort": 2, "clients": 3, "minimum": 1, "deadline": 60.0}, stop={"rounds": 99})
    table.hello("a", "b", "c")
    dead = table.cohort[0]
    alive = sorted({"a", "b", "c"} - {dead})
    for _ in range(4):
        table.wait(240.0)
        table.hello(*alive)
        for client in alive:
            if client in table.cohort:
                table.upload(client)
    assert table.coordinator.clients == 2
    assert dead not in table.cohort
    table.hello(dead)
    assert table.coordinator.clients == 3


# Updates.


def test_duplicates_of_an_upload_are_recorded_once():
    table = desk()
    table.hello("a", "b", "c")
    first = table.cohort[0]
    assert len(of(table.upload(first), e.Record)) == 1
    again = table.upload(first, update(99))
    assert not of(again, e.Record)
    assert status(again, first) == ["recorded"]
    table.upload(table.cohort[1])
    assert table.paper.sums == [20]
    assert status(table.upload(first, identity=(1, 1)), first) == ["recorded"]


def test_an_upload_announced_twice_while_it_is_recorded():
    table = desk(manual=(e.Record,))
    table.hello("a", "b", "c")
    first = table.cohort[0]
    table.upload(first)
    assert table.upload(first) == []
    assert len(table.waiting) == 1
    assert status(table.perform(), first) == ["recorded"]


def chunked(size: int) -> tuple[bytes, m.BlobRef]:
    data = update(10).ljust(size)
    return data, transfer.refer(data, chunk=1024, inline=0)


def send(table: Desk, client: str, data: bytes, ref: m.BlobRef, indices: Iterable[int]) -> list[e.Action]:
    actions = []
    for index in indices:
        topic = TOPICS.uploaded(client, ref.sha256, index)
        actions += table.feed(e.Received(topic, transfer.piece(data, ref, index)))
    return actions


def test_a_large_update_comes_in_chunks_that_were_asked_for():
    table = desk(transfer={"window": 2, "uploads": 1})
    table.hello("a", "b", "c")
    first, second = table.cohort
    data, ref = chunked(3500)
    announced = m.Upload(*table.task, ref)
    assert told(table.say(first, announced), first) == [m.Credit(ref.sha256, (0, 1))]
    assert told(table.say(second, announced), second) == []
    assert told(send(table, first, data, ref, (1,)), first) == [m.Credit(ref.sha256, (2,))]
    assert told(table.wait(11.0), first) == [m.Credit(ref.sha256, (0, 2))]
    send(table, first, data, ref, (0, 0, 2))
    actions = send(table, first, data, ref, (3,))
    assert status(actions, first) == ["recorded"]
    assert told(actions, second) == [m.Credit(ref.sha256, (0, 1))]


def test_an_update_that_comes_damaged_is_announced_and_sent_again():
    table = desk()
    table.hello("a", "b", "c")
    first = table.cohort[0]
    data, ref = chunked(3000)
    announced = m.Upload(*table.task, ref)
    table.say(first, announced)
    actions = send(table, first, bytes(3000), ref, (0, 1, 2))
    assert told(actions, first) == []
    assert [log.text for log in of(actions, e.Log)] == [f"the update of {first} came damaged; it is sent again"]
    assert told(table.say(first, announced), first) == [m.Credit(ref.sha256, (0, 1, 2))]
    assert status(send(table, first, data, ref, (0, 1, 2)), first) == ["recorded"]


def test_a_client_that_is_cut_off_and_a_server_that_dies_cost_no_chunk():
    config = settings(round={"cohort": 2, "clients": 2}, transfer={"window": 2})
    table = Desk(config)
    table.hello("a", "b")
    data, ref = chunked(4000)
    announced = m.Upload(*table.task, ref)
    table.say("a", announced)
    send(table, "a", data, ref, (0,))
    table.say("a", m.Goodbye(b"boot0000"))
    assert invited(table.hello("a"))
    assert told(table.say("a", announced), "a") == [m.Credit(ref.sha256, (1, 2))]
    send(table, "a", data, ref, (2,))
    again = Desk(config, table.paper)
    again.hello("a", "b")
    assert told(again.say("a", announced), "a") == [m.Credit(ref.sha256, (1, 3))]
    assert status(send(again, "a", data, ref, (1, 3)), "a") == ["recorded"]


def test_an_update_that_was_whole_when_the_server_died_is_recorded_without_a_chunk():
    config = settings(round={"cohort": 2, "clients": 2})
    table = Desk(config, manual=(e.Record,))
    table.hello("a", "b")
    data, ref = chunked(4000)
    table.say("a", announced := m.Upload(*table.task, ref))
    send(table, "a", data, ref, range(4))
    again = Desk(config, table.paper)
    again.hello("a", "b")
    assert status(again.say("a", announced), "a") == ["recorded"]


@pytest.mark.parametrize(
    ("blob", "words"),
    [
        (transfer.refer(b"NaN", chunk=1024), "malformed"),
        (msgspec.structs.replace(transfer.refer(b"x", chunk=1024), inline=b"y"), "SHA-256"),
        (m.BlobRef(bytes(32), LIMIT + 1, 1024), f"at most {LIMIT}"),
    ],
    ids=["unusable", "damaged", "oversized"],
)
def test_a_refused_update_gets_a_receipt_and_the_round_goes_on(blob, words):
    table = desk()
    table.hello("a", "b", "c")
    bad, good = table.cohort
    (spare,) = others(table, "a", "b", "c")
    actions = table.say(bad, m.Upload(*table.task, blob))
    (receipt,) = told(actions, bad, m.Receipt)
    assert receipt.status == "refused"
    assert words in receipt.detail
    assert list(invited(actions)) == [spare]
    table.upload(spare)
    table.upload(good)
    assert table.paper.counted == [[((1, 1), spare), ((1, 1), good)]]


def test_a_client_whose_update_was_refused_is_not_asked_again():
    table = desk(round={"cohort": 2, "clients": 2, "minimum": 1})
    table.hello("a", "b")
    table.upload("a", b"NaN")
    assert not invited(table.hello("a"))
    assert not invited(table.hello("a", boot=b"boot0001"))
    again = table.upload("a")
    assert not of(again, e.Record)
    (receipt,) = told(again, "a", m.Receipt)
    assert (receipt.status, "malformed" in receipt.detail) == ("refused", True)
    assert of(table.upload("b"), e.Aggregate)
    assert table.paper.sums == [10]
    assert "a" in table.cohort  # the next round asks it like all others


def test_an_update_that_comes_both_inline_and_in_chunks_counts_once():
    table = desk()
    table.hello("a", "b", "c")
    first, second = table.cohort
    data, ref = chunked(3000)
    table.say(first, m.Upload(*table.task, ref))
    table.upload(first, update(7))
    assert not of(send(table, first, data, ref, (0, 1, 2)), e.Record)
    table.upload(second)
    assert table.paper.rounds[1].samples == table.paper.sums[0] == 17


def test_malformed_foreign_and_unasked_messages_are_counted_and_dropped():
    table = desk()
    table.hello("a", "b", "c")
    before = table.coordinator.dropped
    bad = [
        (TOPICS.up("a"), b"\xff" * 100),
        (TOPICS.up("a"), bytes(m.MESSAGE_LIMIT + 1)),
        (TOPICS.up("a"), m.encode(m.Receipt(1, 1, "recorded"))),
        (TOPICS.up("a"), m.encode(m.Hello(1, b"boot0000", BUNDLE.sha256, 0, digest(0), 1, True))[:-3]),
        ("fedge/other/up/a/msg", m.encode(m.Goodbye(b"boot0000"))),
        ("fedge/toys/up/a b/msg", m.encode(m.Goodbye(b"boot0000"))),
        ("somewhere/else", b"hello"),
        (TOPICS.uploaded("a", bytes(32), 0), bytes(10)),
    ]
    logs = []
    for topic, payload in bad:
        logs += table.feed(e.Received(topic, payload))
    assert table.coordinator.dropped - before == len(bad)
    assert len(logs) == 1
    assert isinstance(logs[0], e.Log)
    for client in table.cohort:
        table.upload(client)
    assert table.paper.sums == [20]


def test_chunks_that_do_not_fit_are_dropped_and_the_upload_goes_on():
    table = desk()
    table.hello("a", "b", "c")
    first = table.cohort[0]
    data, ref = chunked(3000)
    table.say(first, m.Upload(*table.task, ref))
    for index, payload in ((0, b"short"), (9, bytes(1024)), (2, bytes(1024))):
        table.feed(e.Received(TOPICS.uploaded(first, ref.sha256, index), payload))
    assert table.coordinator.dropped == 3
    assert status(send(table, first, data, ref, (0, 1, 2)), first) == ["recorded"]


def test_an_unknown_task_is_answered_from_the_ledger():
    table = desk()
    table.hello("a", "b", "c")
    assert status(table.upload("a", identity=(0, 7)), "a") == ["late"]
    (spare,) = others(table, "a", "b", "c")
    assert status(table.upload(spare), spare) == ["late"]


def test_of_a_task_of_an_epoch_to_come_nothing_is_said():
    table = desk()
    table.hello("a", "b", "c")
    assert told(table.upload("a", identity=(2, 1)), "a") == []


def test_a_newer_offer_ends_the_server_and_an_older_one_is_replaced():
    table = desk()
    own = of(table.actions, e.Retain)
    assert any(TOPICS.offer in action.topics for action in of(table.actions, e.Subscribe))
    offer = m.decode(own[0].payload)
    assert isinstance(offer, m.Offer)
    assert table.feed(e.Received(TOPICS.offer, own[0].payload)) == []
    older, newer = (msgspec.structs.replace(offer, epoch=epoch) for epoch in (0, 2))
    assert of(table.feed(e.Received(TOPICS.offer, m.encode(older))), e.Retain) == own
    assert table.feed(e.Received(TOPICS.offer, m.encode(newer))) == [e.Fenced(2)]


def test_a_hello_of_an_epoch_before_is_answered_with_the_offer_that_it_missed():
    table = desk(desk().paper)
    before = m.Hello(1, b"boot0000", BUNDLE.sha256, 0, digest(0), 10, True)
    (offer,) = told(table.say("a", before), "a")
    assert isinstance(offer, m.Offer)
    assert offer.epoch == 2
    assert table.coordinator.clients == 0


# Versions and deltas.


def finish_round(table: Desk) -> list[e.Action]:
    actions: list[e.Action] = []
    for client in table.cohort:
        actions += table.upload(client)
    return actions


def test_deltas_lead_from_what_each_client_holds():
    table = desk(Paper(delta_bytes=3000), round={"cohort": 3})
    table.hello("a", "b", "c")
    actions = finish_round(table)
    (prepared,) = of(actions, e.Prepare)
    assert prepared == e.Prepare(0, 1)
    invitations = invited(actions)
    assert {invitation.held for invitation in invitations.values()} == {0}
    (spread,) = of(actions, e.Spread)
    assert all(invitation.delta == spread.ref for invitation in invitations.values())
    asked = table.say("a", m.Missing(spread.ref.sha256, (1, 99)))
    assert asked == [e.Spread(spread.ref, (1,))]
    assert table.say("a", m.Missing(bytes(32), (1,))) == []
    actions = finish_round(table)
    assert of(actions, e.Sweep) == [e.Sweep(spread.ref)]
    assert len(table.paper.blobs) == 1


def test_a_client_that_holds_something_unknown_starts_from_version_0():
    table = desk(round={"cohort": 2, "minimum": 1})
    table.hello("a", "b")
    finish_round(table)
    assert invited(table.hello("a", version=1))["a"].delta is None
    assert invited(table.hello("a", version=1, state=bytes(32)))["a"].held == 0
    assert invited(table.hello("a", version=77))["a"].held == 0


def test_what_the_ledger_may_forget_is_not_built_on():
    table = desk(round={"cohort": 1, "clients": 2}, manual=(e.Aggregate,), stop={"rounds": 9})
    table.hello("a", "b")
    for _ in range(6):
        table.upload(table.cohort[0])
        held = table.paper.version
        table.hello("z", version=max(0, held - 1))  # comes back while the next version is made
        table.perform()
        table.say("z", m.Goodbye(b"boot0000"))


def test_a_late_delta_is_cleared_away():
    table = desk(Paper(delta_bytes=3000), round={"cohort": 2, "minimum": 1}, manual=(e.Prepare,))
    table.hello("a", "b")
    finish_round(table)
    assert table.waiting == [e.Prepare(0, 1)]
    for client in "ab":
        table.upload(client)
    assert not table.paper.blobs
    table.manual = ()
    answer = e.Prepared(0, 1, transfer.refer(bytes(3000), chunk=1024, inline=0))
    table.paper.blobs[answer.ref.sha256] = b""
    assert of(table.feed(answer), e.Sweep) == [e.Sweep(answer.ref)]


def test_without_a_codec_one_snapshot_serves_all():
    table = desk(codec={"kind": "none"}, round={"cohort": 3})
    table.hello("a", "b", "c")
    finish_round(table)
    actions = finish_round(table)
    assert of(actions, e.Prepare) == [e.Prepare(0, 2)]


# Evaluation.


def test_the_server_evaluates_and_the_result_goes_with_its_round():
    table = desk(evaluation={"data": "held out"}, manual=(e.Evaluate,))
    table.hello("a", "b", "c")
    assert of(finish_round(table), e.Evaluate) == [e.Evaluate(1)]
    assert table.coordinator.phase == "measure"
    table.feed(e.Evaluated(7, {"accuracy": 0.1}))
    actions = table.feed(e.Evaluated(1, {"accuracy": 0.5}))
    assert of(actions, e.FinishRound)[0].result.metrics["accuracy"] == 0.5
    assert of(actions, e.FinishRound)[0].best


def test_an_aggregate_out_of_reach_is_told():
    table = desk(manual=(e.Aggregate, e.OpenTask))
    table.hello("a", "b", "c")
    table.perform()
    finish_round(table)
    actions = table.feed(e.Aggregated(1, digest(1), clipped=7))
    assert "version 1: 7 parameters would have gone out of all bounds" in of(actions, e.Log)[0].text
    assert of(actions, e.FinishRound)


def test_clients_evaluate_in_weighted_sums():
    table = desk(evaluation={"clients": 2, "deadline": 30.0}, round={"cohort": 3})
    table.hello("a", "b", "c")
    finish_round(table)
    task = table.paper.tasks[table.task]
    assert (task.kind, task.version, len(task.cohort)) == ("evaluate", 1, 2)
    first, second = task.cohort
    table.upload(first, update(10, sum_count=10, sum_correct=9, sum_loss=1.0))
    actions = table.upload(second, update(30, sum_count=30, sum_correct=3, sum_loss=7.0))
    result = of(actions, e.FinishRound)[0].result
    assert result.metrics["client_accuracy"] == 12 / 40
    assert result.metrics["accuracy"] == 12 / 40
    assert result.metrics["client_loss"] == 8 / 40
    assert result.metrics["client_accuracy_mean"] == 0.5
    assert result.metrics["client_accuracy_worst"] == 0.1
    assert result.metrics["client_loss_worst"] == 7 / 30
    assert result.metrics["client_accuracy_spread"] == pytest.approx(0.4)
    assert "accuracy_worst" not in result.metrics
    assert result.clients == 3
    assert of(actions, e.CloseTask) == [e.CloseTask(1, 2, "done")]


def test_the_order_in_which_clients_answer_changes_no_bit_of_a_round():
    found = []
    for order in itertools.permutations(range(4)):
        table = desk(evaluation={"clients": 4}, round={"cohort": 4})
        table.hello("a", "b", "c", "d")
        for phase in ("train", "evaluate"):
            assert table.coordinator.phase == phase
            for number in order:
                loss = (0.1, 1e9, 0.7, -1e-7)[number]
                table.upload(
                    "abcd"[number], update(number + 1, sum_count=number + 1, sum_loss=loss, sum_correct=number)
                )
        found.append(table.paper.rounds[1])
    assert all(one == found[0] for one in found)
    assert found[0].metrics["client_accuracy"] == 6 / 10


def test_an_evaluation_that_a_restart_interrupts_comes_to_the_same():
    results = [update(n, sum_count=n, sum_correct=right, sum_loss=0.1) for n, right in ((10, 9), (30, 3), (7, 7))]
    came: list[dict[str, float]] = []
    for restart in (False, True):
        paper = Paper()
        sections = {"evaluation": {"clients": 3}, "round": {"cohort": 3}}
        table = desk(paper, **sections)
        table.hello("a", "b", "c")
        finish_round(table)
        cohort, identity = table.cohort, table.task
        for client, result in zip(cohort[:2], results, strict=False):
            table.upload(client, result)
        if restart:
            table = desk(paper, **sections)
            table.hello("a", "b", "c")
        actions = table.upload(cohort[2], results[2], identity=identity)
        came.append(of(actions, e.FinishRound)[0].result.metrics)
    assert came[0] == came[1]
    assert (came[0]["client_accuracy"], came[0]["client_accuracy_worst"]) == (19 / 47, 0.1)


def test_an_evaluation_that_nobody_answers_ends_at_its_deadline():
    table = desk(evaluation={"clients": 2, "deadline": 30.0})
    table.hello("a", "b", "c")
    finish_round(table)
    actions = table.wait(31.0)
    assert "client_accuracy" not in of(actions, e.FinishRound)[0].result.metrics
    assert of(actions, e.OpenTask)[0].task.round == 2


def test_evaluations_may_be_rare():
    table = desk(evaluation={"data": "held out", "every": 2}, manual=(e.Evaluate,))
    table.hello("a", "b", "c")
    assert not of(finish_round(table), e.Evaluate)
    assert of(finish_round(table), e.Evaluate)


def test_training_metrics_and_traffic_are_part_of_the_result():
    table = desk(round={"cohort": 2})
    table.hello("a", "b", traffic=m.Traffic(100, 1000))
    table.now += 5
    for client in "ab":
        data = transfer.refer(update(10, sum_loss=5.0, sum_count=10, loss=3), chunk=1024)
        table.say(client, m.Upload(1, 1, data, m.Traffic(150, 1700)))
    result = table.paper.rounds[1]
    assert (result.bytes_up, result.bytes_down, result.seconds, result.samples) == (300, 3400, 5.0, 20)
    fair = {"train_loss_mean": 0.5, "train_loss_worst": 0.5, "train_loss_spread": 0.0}
    assert result.metrics == {"train_loss": 0.5, **fair}


# The end.


@pytest.mark.parametrize(
    ("stop", "metrics", "rounds", "words"),
    [
        ({"rounds": 2}, [0.1, 0.2], 2, "2 rounds are done"),
        ({"rounds": 9, "target": 0.5}, [0.1, 0.7], 2, "accuracy 0.7000 reaches the target 0.5"),
        ({"rounds": 9, "patience": 2}, [0.5, 0.4, 0.3], 3, "has not improved for 2 evaluations"),
        ({"rounds": 9, "seconds": 20.0}, [0, 0], 2, "20 s have passed"),
        ({"rounds": 9, "bytes": 390}, [0, 0], 2, "400 bytes"),
    ],
)
def test_stop_conditions(stop, metrics, rounds, words):
    table = desk(stop=stop, evaluation={"data": "held out"}, manual=(e.Evaluate,), round={"cohort": 2})
    table.hello("a", "b")
    for number, value in enumerate(metrics, 1):
        table.now += 10
        for client in "ab":
            ref = transfer.refer(update(), chunk=1024)
            table.say(client, m.Upload(*table.task, ref, m.Traffic(50 * number, 50 * number)))
        actions = table.feed(e.Evaluated(number, {"accuracy": value}))
    assert len(table.paper.rounds) == rounds
    assert words in of(actions, e.Stop)[0].reason
    offer = m.decode(of(actions, e.Retain)[-1].payload)
    assert isinstance(offer, m.Offer)
    assert offer.finished
    assert table.coordinator.wake is None


def test_a_finished_federation_that_is_started_again_says_so():
    table = desk(stop={"rounds": 1})
    table.hello("a", "b", "c")
    finish_round(table)
    again = desk(table.paper, stop={"rounds": 1})
    assert of(again.actions, e.Stop) == [e.Stop("1 rounds are done")]
    assert m.decode(of(again.actions, e.Retain)[-1].payload).finished


# Restarts.


def test_a_restart_goes_on_with_the_same_round_and_sums():
    table = desk(round={"cohort": 3, "minimum": 2})
    table.hello("a", "b", "c")
    table.upload("b", update(7, sum_loss=1.0, sum_count=7))
    again = desk(table.paper, round={"cohort": 3, "minimum": 2})
    assert again.coordinator.phase == "train"
    assert again.restored.epoch == 2
    assert set(invited(again.hello("a", "b", "c"))) == {"a", "c"}
    assert invited(again.hello("a"))["a"].epoch == 1
    assert status(again.upload("b", identity=(1, 1)), "b") == ["recorded"]
    again.upload("a", update(5, sum_loss=1.0, sum_count=5), identity=(1, 1))  # trained before the restart
    again.upload("c", update(4, sum_loss=2.0, sum_count=4))
    assert again.paper.sums == [16]
    assert again.paper.rounds[1].samples == 16
    metrics = again.paper.rounds[1].metrics
    assert (metrics["train_loss"], metrics["train_loss_worst"]) == (4 / 16, 2 / 4)
    assert again.task == (2, 2)


def test_a_restart_with_every_result_in_the_ledger_closes_the_task():
    table = desk(manual=(e.Aggregate,))
    table.hello("a", "b", "c")
    finish_round(table)
    again = desk(table.paper)
    assert of(again.actions, e.Aggregate)
    assert again.paper.sums == [20]


def test_a_restart_while_clients_evaluate_counts_the_round_once():
    sections = {"evaluation": {"clients": 1}, "stop": {"rounds": 2}, "round": {"cohort": 2}}
    table = desk(**sections)
    table.hello("a", "b")
    for client in table.cohort:
        table.upload(client)
    assert table.paper.tasks[table.task].kind == "evaluate"
    again = desk(table.paper, **sections)
    again.hello("a", "b")
    actions = again.upload(again.cohort[0], update(10, sum_count=10, sum_correct=5), identity=(1, 2))
    assert again.paper.rounds[1].metrics["accuracy"] == 0.5
    assert of(actions, e.OpenTask)[0].task.round == 2
    assert not of(again.actions, e.Stop)


def test_a_restart_before_the_server_has_evaluated_evaluates_and_finishes_the_round_first():
    sections = {"evaluation": {"data": "held out"}}
    table = desk(manual=(e.Evaluate,), **sections)
    table.hello("a", "b", "c")
    finish_round(table)
    again = desk(table.paper, **sections)
    (finished,) = of(again.actions, e.FinishRound)
    assert (finished.result.round, finished.result.metrics["accuracy"], finished.best) == (1, 0.1, True)
    assert finished.result.clients == 2
    actions = again.hello("a", "b", "c")
    assert of(actions, e.OpenTask)[0].task.round == 2
    third = desk(table.paper, **sections)
    assert not of(third.actions, e.FinishRound)


def test_a_restart_before_a_round_without_evaluation_is_finished():
    table = desk(evaluation={"data": "held out", "every": 2}, manual=(e.OpenTask, e.FinishRound))
    table.hello("a", "b", "c")
    table.perform()
    finish_round(table)
    assert [type(action) for action in table.waiting] == [e.FinishRound, e.OpenTask]
    again = desk(table.paper, evaluation={"data": "held out", "every": 2})
    assert not of(again.actions, e.Evaluate)
    assert [done.result.round for done in of(again.actions, e.FinishRound)] == [1]


@pytest.mark.parametrize("there", [2, 1])
def test_a_restart_before_clients_evaluate_asks_those_who_come_back(there):
    sections = {"evaluation": {"clients": 2}, "round": {"cohort": 2}}
    table = desk(manual=(e.OpenTask,), **sections)
    table.hello("a", "b")
    table.perform()
    finish_round(table)
    again = desk(table.paper, **sections)
    actions = again.hello(*"ab"[:there])
    if there < 2:
        assert not of(actions, e.OpenTask)
        actions = again.wait(12.0)
    (opened,) = of(actions, e.OpenTask)
    assert (opened.task.kind, opened.task.round, len(opened.task.cohort)) == ("evaluate", 1, there)
    for client in opened.task.cohort:
        again.upload(client, update(10, sum_count=10, sum_correct=4))
    assert again.paper.rounds[1].metrics["accuracy"] == 0.4
    assert again.paper.unfinished is None


def test_a_restart_while_clients_evaluate_measures_again_what_was_lost():
    sections = {"evaluation": {"data": "held out", "clients": 1}, "round": {"cohort": 2}}
    table = desk(**sections)
    table.hello("a", "b")
    finish_round(table)
    client = table.cohort[0]
    again = desk(table.paper, manual=(e.Evaluate,), **sections)
    assert again.coordinator.phase == "measure"
    assert not invited(again.hello("a", "b"))
    assert list(invited(again.perform())) == [client]
    again.upload(client, update(10, sum_count=10, sum_correct=5), identity=(1, 2))
    metrics = again.paper.rounds[1].metrics
    assert (metrics["accuracy"], metrics["client_accuracy"]) == (0.1, 0.5)


def test_what_an_earlier_run_left_on_the_broker_is_cleared_once_and_first():
    table = desk()
    start = dataclasses.replace(table.restored, leftovers=("x/1", "x/2"))
    fresh = Coordinator(settings(round=THREE), start)
    assert fresh.handle(e.Connected(), 5.0)[0] == e.Clear(("x/1", "x/2"))
    assert not of(fresh.handle(e.Connected(), 6.0), e.Clear)


def test_after_a_restart_a_round_waits_for_the_fleet_for_a_while():
    table = desk(stop={"rounds": 9})
    table.hello("a", "b", "c")
    table.upload(table.cohort[0])
    table.upload(table.cohort[1])
    table.upload(table.cohort[0])
    table.upload(table.cohort[1])
    table.paper.outcomes[table.task] = "void"
    again = desk(table.paper, stop={"rounds": 9})
    assert not of(again.hello("a", "b"), e.OpenTask)
    assert of(again.hello("c"), e.OpenTask)
    table.paper.outcomes[again.task] = "void"
    third = desk(table.paper, stop={"rounds": 9})
    assert not of(third.hello("a", "b"), e.OpenTask)
    assert of(third.wait(12.0), e.OpenTask)


def test_traffic_of_before_a_restart_is_not_counted_twice():
    table = desk(round={"cohort": 2})
    table.hello("a", "b", traffic=m.Traffic(100, 100))
    finish_round(table)
    again = desk(table.paper, round={"cohort": 2})
    again.hello("a", "b", traffic=m.Traffic(130, 140))
    for client in "ab":
        ref = transfer.refer(update(), chunk=1024)
        again.say(client, m.Upload(*again.task, ref, m.Traffic(200, 240)))
    assert (again.paper.rounds[2].bytes_up, again.paper.rounds[2].bytes_down) == (140, 200)


def test_the_same_events_give_the_same_actions():
    table = desk()
    events = [
        e.Connected(),
        *(
            e.Received(TOPICS.up(client), m.encode(m.Hello(1, b"boot0000", BUNDLE.sha256, 0, digest(0), 9, True)))
            for client in "cab"
        ),
        e.Opened(1, 1),
        e.Tick(),
    ]
    twins = [Coordinator(settings(round=THREE), dataclasses.replace(table.restored)) for _ in range(2)]
    assert [twins[0].handle(event, 5.0) for event in events] == [twins[1].handle(event, 5.0) for event in events]
