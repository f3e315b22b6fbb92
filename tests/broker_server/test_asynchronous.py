import math

import pytest

from broker_server import events as e
from edge_client.wire import messages as m
from edge_client.wire import transfer
from tests.broker_server.desk import NAME, TOPICS, Desk, Paper, digest, invited, of, settings, status, told, update

BUFFERED = {"mode": "buffered", "concurrency": 3, "buffer": 2, "deadline": 60.0, "clients": 4, "max_staleness": 2}


def desk(paper: Paper | None = None, *, manual: tuple[type, ...] = (), **sections: dict[str, object]) -> Desk:
    rounds = BUFFERED | sections.pop("round", {})
    return Desk(settings(round=rounds, stop={"rounds": 50}, **sections), paper, manual=manual)


def started(*names: str, **sections) -> Desk:
    table = desk(**sections)
    table.hello(*(names or "abcd"))
    return table


def flying(table: Desk) -> dict[str, tuple[int, int]]:
    """By client, the open tasks without an update."""
    paper = table.paper
    return {
        task.cohort[0]: identity
        for identity, task in paper.tasks.items()
        if identity not in paper.outcomes and not paper.updates[identity]
    }


def send(table: Desk, client: str, samples: int = 10) -> list[e.Action]:
    return table.upload(client, update(samples), identity=flying(table)[client])


def test_as_many_clients_train_as_the_settings_say_each_in_a_task_of_its_own():
    table = desk()
    assert not of(table.hello(*"abc"), e.OpenTask)
    asked = invited(table.hello("d"))
    assert len(asked) == 3
    assert len({invitation.task for invitation in asked.values()}) == 3
    assert {(one.version, one.held, one.deadline) for one in asked.values()} == {(0, 0, 60.0)}


def test_a_slot_that_becomes_free_goes_to_a_client_that_has_none():
    table = started()
    first = next(iter(flying(table)))
    (waiting,) = set("abcd") - set(flying(table))
    actions = send(table, first)
    assert status(actions, first) == ["recorded"]
    assert set(invited(actions)) == {waiting}


def test_enough_updates_make_a_version_and_close_their_tasks_only():
    table = started()
    one, two, three = flying(table)
    made_of = [flying(table)[client] for client in (one, two)]
    send(table, one, 10)
    actions = send(table, two, 30)
    (aggregate,) = of(actions, e.Aggregate)
    assert aggregate.closes == tuple(made_of)
    assert (aggregate.result.version, aggregate.result.clients, aggregate.result.samples) == (1, 2, 40)
    assert flying(table)[three] not in table.paper.outcomes
    assert table.paper.rounds[1].metrics == {"staleness": 0.0}
    assert {invitation.version for invitation in invited(actions).values()} == {1}


def test_a_rate_falls_with_the_versions_that_there_are():
    table = desk(train={"hypers": {"lr": 0.5}, "decay": {"kind": "step", "every": 1}})
    rates = {one.plan.hypers["lr"] for one in invited(table.hello(*"abcd")).values()}
    while table.paper.version < 2:
        found = invited(send(table, next(iter(flying(table)))))
        rates |= {one.plan.hypers["lr"] * 2**one.version for one in found.values()}
    assert rates == {0.5}


def test_a_version_is_evaluated_at_the_rate_that_made_it():
    train = {"hypers": {"lr": 0.5}, "decay": {"kind": "step", "every": 1}}
    table = desk(train=train, evaluation={"clients": 1, "every": 1})
    table.hello(*"abcd")
    while table.paper.version < 1:
        actions = send(table, next(iter(flying(table))))
    rates = {(one.kind, one.version): one.plan.hypers["lr"] for one in invited(actions).values()}
    assert rates["evaluate", 1] == 0.5


def test_an_old_update_counts_and_says_how_old_it_is():
    table = started()
    slow, *_ = flying(table)
    while table.paper.version < 2:
        send(table, next(client for client in flying(table) if client != slow))
    assert status(send(table, slow), slow) == ["recorded"]
    send(table, next(iter(flying(table))))
    assert table.paper.version == 3
    assert table.paper.rounds[3].metrics["staleness"] > 0
    assert len({client for _, client in table.paper.counted[2]} & {slow}) == 1


def test_an_update_that_is_too_old_is_refused_and_the_receipt_says_why():
    table = started()
    slow, *_ = flying(table)
    identity = flying(table)[slow]
    while table.paper.version < 3:
        assert identity not in table.paper.outcomes
        send(table, next(client for client in flying(table) if client != slow))
    assert table.paper.outcomes[identity] == "void"
    (receipt,) = told(table.upload(slow, identity=identity), slow, m.Receipt)
    assert receipt.status == "refused"
    assert "round.max_staleness, 2" in receipt.detail
    assert all(key != (identity, slow) for made_of in table.paper.counted for key in made_of)


def test_a_deadline_frees_the_slot_and_a_late_update_still_counts():
    table = started()
    slow, *_ = flying(table)
    identity = flying(table)[slow]
    (waiting,) = set("abcd") - set(flying(table))
    actions = table.wait(61.0)
    assert set(invited(actions)) == {waiting}
    assert status(table.upload(slow, identity=identity), slow) == ["recorded"]


def test_a_client_that_leaves_frees_its_slot_and_goes_on_with_its_task_when_it_is_back():
    table = started()
    gone, *_ = flying(table)
    identity = flying(table)[gone]
    (waiting,) = set("abcd") - set(flying(table))
    actions = table.say(gone, m.Goodbye(b"boot0000"))
    assert set(invited(actions)) == {waiting}
    again = invited(table.hello(gone))[gone]
    assert (again.epoch, again.task) == identity


def test_a_client_that_has_lost_its_task_begins_one_from_the_newest_version():
    table = started()
    restarted, *_ = flying(table)
    identity = flying(table)[restarted]
    for client in [client for client in flying(table) if client != restarted]:
        send(table, client)
    assert table.paper.version == 1
    table.say(restarted, m.Goodbye(b"boot0000"))
    table.wait(61.0)
    actions = table.hello(restarted, boot=b"boot0001", state=bytes(32))
    assert table.paper.outcomes[identity] == "void"
    assert invited(actions)[restarted].version == 1


def test_a_client_that_holds_the_version_of_its_task_may_have_an_update_for_it():
    table = started()
    restarted, *_ = flying(table)
    identity = flying(table)[restarted]
    again = invited(table.hello(restarted, boot=b"boot0001"))[restarted]
    assert (again.epoch, again.task) == identity


def test_an_invitation_said_again_leads_to_the_version_of_its_task():
    table = started()
    while table.paper.version < 1:
        send(table, next(iter(flying(table))))
    slow = next(client for client, key in flying(table).items() if table.paper.tasks[key].version == 1)
    while table.paper.version < 2:
        send(table, next(client for client in flying(table) if client != slow))
    again = invited(table.hello(slow, state=bytes(32)))[slow]
    assert (again.held, again.version, again.digest) == (0, 1, digest(1))
    assert again.delta is not None


def test_no_client_has_two_tasks_at_once():
    table = started(round={"concurrency": 10})
    assert sorted(flying(table)) == list("abcd")
    table.hello(*"abcd")
    assert len(table.paper.tasks) == 4


def test_those_whose_update_waits_are_asked_again_only_where_there_are_no_others():
    table = started(round={"concurrency": 4, "buffer": 3})
    (first, *_) = flying(table)
    assert set(invited(send(table, first))) == {first}
    table = started(*"abcdefgh", round={"concurrency": 4, "buffer": 3, "clients": 8})
    assert set(invited(send(table, next(iter(flying(table)))))) <= set("abcdefgh") - {first}


def test_each_task_shuffles_its_own_way():
    table = started(round={"concurrency": 4, "buffer": 4})
    first, *_ = flying(table)
    again = invited(send(table, first))[first]
    assert again.version == 0
    assert again.round == again.task  # what the client's shuffles are seeded with


def test_a_client_that_declines_is_asked_again_when_it_says_hello():
    table = started()
    tired, *_ = flying(table)
    identity = flying(table)[tired]
    (waiting,) = set("abcd") - set(flying(table))
    actions = table.say(tired, m.Decline(*identity, "too hot"))
    assert set(invited(actions)) == {waiting}
    assert table.paper.outcomes[identity] == "void"
    assert tired not in invited(send(table, waiting))
    assert tired in invited(table.hello(tired)) or len(flying(table)) == 3


def test_a_refused_update_frees_the_slot_and_its_client_rests():
    table = started()
    broken, *_ = flying(table)
    identity = flying(table)[broken]
    actions = table.upload(broken, b"rubbish", identity=identity)
    assert status(actions, broken) == ["refused"]
    assert broken not in invited(actions)
    assert len(flying(table)) == 3
    assert status(table.upload(broken, b"rubbish", identity=identity), broken) == ["refused"]


def test_what_is_recorded_twice_is_answered_twice_and_counted_once():
    table = started()
    first, *_ = flying(table)
    identity = flying(table)[first]
    send(table, first)
    assert status(table.upload(first, identity=identity), first) == ["recorded"]
    while table.paper.version < 2:
        send(table, next(iter(flying(table))))
    assert status(table.upload(first, identity=identity), first) == ["recorded"]
    keys = [key for made_of in table.paper.counted for key in made_of]
    assert len(keys) == len(set(keys))


def test_an_update_beyond_the_buffer_waits_for_the_version_and_goes_into_the_next():
    table = started(manual=(e.Record,))
    one, two, three = flying(table)
    for client in (one, two, three):
        send(table, client)
    assert [action.client for action in table.waiting] == [one, two]
    table.perform()
    actions = table.perform()
    kinds = [type(action) for action in actions]
    assert kinds.index(e.Aggregate) < kinds.index(e.Record)
    assert [action.client for action in table.waiting] == [three]
    table.perform()
    assert [client for _, client in table.paper.counted[0]] == [one, two]


def test_updates_that_come_while_a_version_is_measured_are_recorded_for_the_next():
    table = started(evaluation={"data": "some.npz"}, manual=(e.Evaluate,))
    for client in list(flying(table))[:2]:
        send(table, client)
    assert table.coordinator.phase == "measure"
    for _ in range(3):
        first = next(iter(flying(table)))
        assert status(send(table, first), first) == ["recorded"]
    assert table.paper.version == 1
    table.perform()
    assert table.paper.version == 2
    assert len(table.paper.counted[1]) == 3
    assert table.paper.rounds[1].metrics["accuracy"] == 0.1


def test_clients_evaluate_as_they_become_free():
    table = started(evaluation={"clients": 2}, round={"concurrency": 4})
    for client in list(flying(table))[:2]:
        send(table, client)
    for number in range(2):
        # All others train; the next one that is done evaluates before it trains again.
        ((client, identity),) = [
            (client, key) for client, key in flying(table).items() if table.paper.tasks[key].kind == "evaluate"
        ]
        if not number:
            send(table, next(other for other in flying(table) if other != client))
        table.upload(client, update(5, sum_count=4, sum_correct=1 + number), identity=identity)
        assert table.coordinator.phase == ("train" if number else "evaluate")
    assert table.paper.rounds[1].metrics["client_accuracy"] == 3 / 8
    evaluated = [key for key, task in table.paper.tasks.items() if task.kind == "evaluate"]
    assert [table.paper.outcomes[identity] for identity in evaluated] == ["done", "done"]
    assert len(flying(table)) == 4


def test_an_evaluation_ends_at_its_deadline():
    table = started(evaluation={"clients": 3, "deadline": 20.0}, round={"concurrency": 4})
    for client in list(flying(table))[:2]:
        send(table, client)
    assert table.coordinator.phase == "evaluate"
    table.wait(21.0)
    assert table.coordinator.phase == "train"
    assert "client_accuracy" not in table.paper.rounds[1].metrics


def test_a_restart_goes_on_with_the_same_buffer_and_tasks():
    table = started()
    one, two, three = flying(table)
    left = {client: flying(table)[client] for client in (two, three)}
    send(table, one)
    paper = table.paper
    again = desk(paper)
    assert not of(again.actions, e.Aggregate)
    asked = invited(again.hello(*"abcd"))
    for client, identity in left.items():
        assert (asked[client].epoch, asked[client].task) == identity
    again.upload(two, update(30), identity=left[two])
    assert [client for _, client in paper.counted[0]] == [one, two]
    assert paper.sums == [40]


def test_over_a_buffer_each_client_is_told_its_step_the_same_again_after_a_restart():
    samples = {"a": 20, "b": 40, "c": 60, "d": 80}
    codec = {"target": "cohort", "value": 2.0}
    table = desk(Paper(pace=0.003), codec=codec)
    for client, count in samples.items():
        asked = invited(table.hello(client, samples=count))
    assert {one.update for one in asked.values()} == {m.UpdatePlan("quantized", "nmse", 0.1)}
    while table.paper.version < 1:
        asked = invited(send(table, next(iter(flying(table)))))
    # Of the mean of all who are there: 50.
    expected = {client: pytest.approx(0.006 * math.sqrt(2) * 50 / count) for client, count in samples.items()}
    (found,) = asked.items()
    client, invitation = found
    assert (invitation.update.target, invitation.update.value) == ("absolute", expected[client])
    table = desk(table.paper, codec=codec)
    again = invited(table.hello(client, samples=samples[client]))[client]
    assert (again.task, again.update) == (invitation.task, invitation.update)


def test_a_restart_with_a_full_buffer_makes_the_version():
    table = started(manual=(e.Aggregate,))
    for client in list(flying(table))[:2]:
        send(table, client)
    assert table.paper.version == 0
    again = desk(table.paper)
    assert again.paper.version == 0
    again.hello(*"abcd")
    assert again.paper.version == 1


def test_a_restart_knows_the_versions_of_old_tasks():
    table = started()
    slow, *_ = flying(table)
    identity = flying(table)[slow]
    while table.paper.version < 2:
        send(table, next(client for client in flying(table) if client != slow))
    again = desk(table.paper)
    found = invited(again.hello(slow, state=bytes(32)))[slow]
    assert ((found.epoch, found.task), found.version, found.digest) == (identity, 0, digest(0))


def test_while_the_connection_is_gone_nothing_is_lost():
    table = started()
    asked = flying(table)
    table.feed(e.Disconnected())
    first, *_ = asked
    send(table, first)
    before = len(table.paper.tasks)
    assert before == 3
    actions = table.feed(e.Connected())
    assert len(table.paper.tasks) == 4
    assert set(invited(actions)) == set(flying(table))


def test_deltas_are_cleared_once_nobody_is_on_them():
    table = started()
    table.paper.delta_bytes = 5000
    for _ in range(12):
        send(table, next(iter(flying(table))))
    versions = {table.paper.tasks[identity].version for identity in flying(table).values()}
    assert len(table.paper.blobs) <= len(flying(table))
    assert len(versions) <= 3
    for action in of(table.actions, e.Sweep):
        assert action.ref.sha256 not in table.paper.blobs or action.ref.inline is not None


def test_the_run_ends_when_its_stop_condition_holds():
    table = Desk(settings(round=BUFFERED, stop={"rounds": 2}))
    table.hello(*"abcd")
    while table.paper.version < 2:
        send(table, next(iter(flying(table))))
    assert of(table.actions, e.Stop) == [e.Stop("2 rounds are done")]
    late = next(iter(flying(table)))
    assert status(send(table, late), late) == ["recorded"]
    assert table.paper.version == 2
    assert NAME == "toys"


@pytest.mark.parametrize("buffer", [1, 5])
def test_three_clients_go_on_whatever_the_buffer(buffer):
    table = started(*"abc", round={"buffer": buffer, "clients": 3})
    for number in range(30):
        send(table, sorted(flying(table))[number % 3])
    assert table.paper.version == 30 // buffer
    assert sum(map(len, table.paper.counted)) == 30


def test_a_restart_counts_an_update_whose_client_is_at_its_next_task():
    table = started(*"abc", round={"buffer": 3, "clients": 3})
    first, *_ = flying(table)
    send(table, first)
    assert first in flying(table)
    again = desk(table.paper, round={"buffer": 3, "clients": 3})
    again.hello(*"abc")
    for client in list(flying(again))[:2]:
        send(again, client)
    assert len(again.paper.counted[0]) == 3
    assert again.paper.sums == [30]


def chunks(table: Desk, client: str, data: bytes, ref: m.BlobRef, indices) -> list[e.Action]:
    actions = []
    for index in indices:
        topic = TOPICS.uploaded(client, ref.sha256, index)
        actions += table.feed(e.Received(topic, transfer.piece(data, ref, index)))
    return actions


def announced(table: Desk, client: str, ref: m.BlobRef) -> list[e.Action]:
    return table.say(client, m.Upload(*flying(table)[client], ref))


def test_chunks_outlive_the_clients_absence_and_the_server():
    table = started()
    slow, *_ = flying(table)
    data = update(7).ljust(4000)
    ref = transfer.refer(data, chunk=1024, inline=0)
    announced(table, slow, ref)
    chunks(table, slow, data, ref, (0,))
    table.say(slow, m.Goodbye(b"boot0000"))
    table.hello(slow)
    assert told(announced(table, slow, ref), slow, m.Credit) == [m.Credit(ref.sha256, (1, 2, 3))]
    chunks(table, slow, data, ref, (2,))
    again = desk(table.paper)
    again.hello(*"abcd")
    assert told(announced(again, slow, ref), slow, m.Credit) == [m.Credit(ref.sha256, (1, 3))]
    assert status(chunks(again, slow, data, ref, (1, 3)), slow) == ["recorded"]


def test_an_update_that_comes_damaged_is_sent_again():
    table = started()
    client, *_ = flying(table)
    data = update(7).ljust(3000)
    ref = transfer.refer(data, chunk=1024, inline=0)
    announced(table, client, ref)
    assert told(chunks(table, client, bytes(3000), ref, range(3)), client) == []
    assert told(announced(table, client, ref), client) == [m.Credit(ref.sha256, (0, 1, 2))]
    assert status(chunks(table, client, data, ref, range(3)), client) == ["recorded"]


def test_chunks_of_a_task_that_is_over_are_dropped():
    table = started()
    client, *_ = flying(table)
    data = update(7).ljust(3000)
    ref = transfer.refer(data, chunk=1024, inline=0)
    announced(table, client, ref)
    chunks(table, client, data, ref, (0,))
    table.say(client, m.Decline(*flying(table)[client], "the disk is full"))
    before = table.coordinator.dropped
    assert not of(chunks(table, client, data, ref, (1, 2)), e.Keep)
    assert table.coordinator.dropped == before + 2


def test_a_client_that_has_died_without_a_last_will_is_not_asked_after_a_few_heartbeats():
    table = started()
    _, *others = flying(table)
    (waiting,) = set("abcd") - set(flying(table))
    for _ in range(4):
        table.wait(240.0)
        table.hello(*others, waiting)
    assert table.coordinator.clients == 3
