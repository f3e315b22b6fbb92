"""A model in service: nobody trains, clients evaluate, and training can go on afterwards as if nothing had been."""

import pytest

from broker_server import events as e
from edge_client.wire import messages as m
from tests.broker_server.desk import Desk, Paper, invited, of, settings, told, update

EVALUATE = {"round": {"mode": "evaluation"}, "evaluation": {"clients": 2, "deadline": 30.0}}


def trained(rounds: int = 2) -> Paper:
    """A ledger whose federation has finished."""
    table = Desk(settings(round={"cohort": 2}, stop={"rounds": rounds}))
    table.hello("a", "b")
    for _ in range(rounds):
        for client in "ab":
            table.upload(client)
    assert of(table.actions, e.Stop)
    assert m.decode(of(table.actions, e.Retain)[-1].payload).finished
    return table.paper


def answer(table: Desk, right: int = 5) -> list[e.Action]:
    actions: list[e.Action] = []
    for client in table.cohort:
        actions += table.upload(client, update(10, sum_count=10, sum_correct=right))
    return actions


def test_a_finished_federation_is_evaluated_once_and_says_so():
    paper = trained()
    table = Desk(settings(**EVALUATE), paper)
    assert not m.decode(of(table.actions, e.Retain)[-1].payload).finished, "clients come back"
    asked = invited(table.hello("a", "b", version=2))
    assert {one.kind for one in asked.values()} == {"evaluate"}
    assert {one.version for one in asked.values()} == {2}
    actions = answer(table)
    (done,) = of(actions, e.FinishRound)
    assert (done.result.round, done.result.version, done.result.clients, done.best) == (3, 2, 0, False)
    assert done.result.metrics["client_accuracy"] == done.result.metrics["client_accuracy_worst"] == 0.5
    assert done.result.metrics["client_answers"] == 2
    assert of(actions, e.Stop)[0].reason == "version 2 is evaluated"
    assert paper.version == 2


def test_it_waits_for_those_that_are_asked_and_then_goes_on_with_who_is_there():
    table = Desk(settings(**EVALUATE), trained())
    assert not invited(table.hello("a", version=2))
    assert invited(table.wait(20.0)).keys() == {"a"}
    assert of(answer(table), e.Stop)


def test_of_an_untrained_model_too():
    table = Desk(settings(**EVALUATE))
    table.hello("a")
    assert not of(table.wait(60.0), e.OpenTask)
    table.hello("b")
    assert of(answer(table), e.FinishRound)[0].result.version == 0


def test_it_evaluates_again_and_again():
    service = {**EVALUATE, "evaluation": {"clients": 2, "deadline": 30.0, "period": 600.0}}
    table = Desk(settings(**service), trained())
    table.hello("a", "b", "c", version=2)
    for number in range(3):
        (result,) = (action.result for action in of(answer(table, number), e.FinishRound))
        assert result.round == 3 + number
        assert result.seconds <= 2.0, "and not the time since the one before"
        assert not of(table.wait(590.0), e.OpenTask)
        table.hello(*"abc", version=2)
        assert of(table.wait(11.0), e.OpenTask)[0].task.round == 4 + number
    # Nobody is left to answer: the evaluation ends, and the next one waits for somebody, without spinning.
    ended = [done for client in "abc" for done in of(table.say(client, m.Goodbye(b"boot0000")), e.FinishRound)]
    assert [done.result.metrics["client_answers"] for done in ended] == [0.0]
    assert not of(table.wait(3000.0), e.OpenTask)
    assert invited(table.hello("d", version=2)).keys() == {"d"}


@pytest.mark.parametrize("clients", [0, 2])
def test_the_server_measures_its_own_data(clients):
    sections = {**EVALUATE, "evaluation": {"clients": clients, "data": "held out"}}
    table = Desk(settings(**sections), trained())
    if clients:
        table.hello("a", "b", version=2)
        answer(table)
    (done,) = of(table.actions, e.FinishRound)
    assert done.result.metrics["accuracy"] == 0.2
    assert of(table.actions, e.Stop)


def test_training_goes_on_afterwards_and_counts_its_own_rounds_alone():
    paper = trained()
    table = Desk(settings(**EVALUATE), paper)
    table.hello("a", "b", version=2)
    answer(table)
    decay = {"hypers": {"lr": 0.8}, "decay": {"kind": "step", "every": 1, "factor": 0.5}}
    table = Desk(settings(round={"cohort": 2}, stop={"rounds": 3}, train=decay), paper)
    asked = invited(table.hello("a", "b", version=2))
    assert {(one.kind, one.round, one.plan.hypers["lr"]) for one in asked.values()} == {("train", 4, 0.2)}
    for client in "ab":
        table.upload(client)
    assert of(table.actions, e.Stop)[0].reason == "3 rounds are done"
    assert (paper.version, sorted(paper.rounds)) == (3, [1, 2, 3, 4])


def test_rounds_in_service_do_not_make_the_rate_fall():
    """Fine-tuning for an evaluation is done at the rate that made the model, and not at 0."""
    train = {"hypers": {"lr": 0.5}, "decay": {"kind": "linear"}}
    paper = trained()
    table = Desk(settings(**EVALUATE, train=train, stop={"rounds": 2}), paper)
    asked = invited(table.hello("a", "b", version=2))
    assert {one.plan.hypers["lr"] for one in asked.values()} == {0.25}
    answer(table)
    table = Desk(settings(round={"cohort": 2}, train=train, stop={"rounds": 4}), paper)
    asked = invited(table.hello("a", "b", version=2))
    assert {(one.round, one.plan.hypers["lr"]) for one in asked.values()} == {(4, 0.25)}


def test_a_server_that_ends_in_between_asks_anew():
    paper = trained()
    table = Desk(settings(**EVALUATE), paper)
    table.hello("a", "b", version=2)
    first, _ = table.cohort
    table.upload(first, update(10, sum_count=10, sum_correct=5))
    paper.outcomes[table.task] = "void"  # as the worker does it: an evaluation without rounds is done anew
    table = Desk(settings(**EVALUATE), paper)
    table.hello("a", "b", version=2)
    assert told(table.actions, first, m.Invitation)[-1].void is not None
    assert of(answer(table), e.FinishRound)[0].result.metrics["client_answers"] == 2


def test_what_was_interrupted_is_evaluated():
    table = Desk(settings(round={"cohort": 2}, evaluation={"clients": 2}))
    table.hello("a", "b")
    for client in "ab":
        table.upload(client)
    assert table.paper.unfinished == 1
    table.paper.outcomes[table.task] = "void"
    again = Desk(settings(**EVALUATE), table.paper)
    again.hello("a", "b", version=1)
    (done,) = of(answer(again), e.FinishRound)
    assert (done.result.round, done.result.clients) == (1, 2)
    assert of(again.actions, e.Stop)
