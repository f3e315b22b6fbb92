"""Every algorithm in the worker: updates come over the ledger, and a restart changes no bit."""

import msgspec
import numpy as np
import pytest

from broker_server import events as e
from broker_server.aggregation import registry
from broker_server.config import Federation
from broker_server.records import Round, Task
from broker_server.training import train_plan
from broker_server.worker import Worker
from edge_client.bundle import Bundle
from edge_client.codec.update import CodecSettings, encode_update
from edge_client.errors import ConfigError
from edge_client.manifest import update_layouts
from edge_client.wire.messages import CORRECTION, DISTANCE, RECEIVED_LOSS
from tests.toy import toy_bundle

DATA = toy_bundle(buffer=True, control=True, proximal=True)
BUNDLE = Bundle.from_bytes(DATA)
LAYOUTS = update_layouts(BUNDLE.manifest)
CLIENTS = 7
SCALARS = {"steps": 3.0, RECEIVED_LOSS: 1.5, "loss": 0.5, DISTANCE: 0.3, CORRECTION: 0.1}
OWN = "tests.broker_server.aggregation.own_algorithm:BY_LOSS"


def settings(folder, **sections) -> Federation:
    base = {"federation": {"name": "toys", "bundle": "b", "state": str(folder)}, "codec": {"kind": "none"}}
    return msgspec.convert(base | sections, Federation)


def delta(number: int) -> np.ndarray:
    return np.random.default_rng(number).normal(0, 0.1, BUNDLE.layout.size).astype(np.float32)


def encoded(number: int, kind: str = "none", **scalars: float) -> bytes:
    count = LAYOUTS["buffers"].size
    vectors = {"delta": delta(number), "buffers": np.full(count, number, np.float32)}
    scalars = {"samples": 10 + number, **SCALARS, "steps": 1.0 + number % 3} | scalars
    return encode_update(vectors, LAYOUTS, scalars, CodecSettings(kind=kind, value=0.01)).data


def open_task(worker: Worker, number: int, version: int) -> None:
    clients = tuple(f"c{client}" for client in range(CLIENTS))
    worker.perform(
        e.OpenTask(
            Task(
                epoch=1,
                task=number,
                round=number,
                kind="train",
                version=version,
                cohort=clients,
                plan=b"",
                opened=0.0,
            )
        )
    )


def aggregate(worker: Worker, number: int) -> e.Aggregated:
    result = Round(round=number, version=number, clients=1, samples=1, seconds=0.0, bytes_up=0, bytes_down=0)
    answer = worker.perform(e.Aggregate(((1, number),), result, frozenset()))
    assert isinstance(answer, e.Aggregated)
    return answer


def parameters(worker: Worker):
    publication = worker._publication
    return publication.parameters() - BUNDLE.initial(), publication.buffers()


CASES = [(name, "sgd", "none") for name in (*registry.ALGORITHMS, OWN)]
CASES += [("fedavg", name, "none") for name in registry.OPTIMIZERS if name != "sgd"]
CASES += [("krum", "yogi", "quantized")]


@pytest.mark.parametrize(("algorithm", "optimizer", "kind"), CASES)
def test_a_restart_in_the_midst_gives_the_same_bits(tmp_path, algorithm, optimizer, kind):
    digests = []
    for name, crash in (("whole", False), ("torn", True)):
        found = settings(
            tmp_path / name,
            aggregation={"algorithm": algorithm, "norm": 0.3},
            server={"optimizer": optimizer, "schedule": {"kind": "cosine", "warmup": 1}},
            codec={"kind": kind},
        )
        worker = Worker(found, DATA)
        worker.start()
        for number in (1, 2):
            open_task(worker, number, number - 1)
            for client in range(CLIENTS):
                if crash and client == 4:
                    worker.close()
                    worker = Worker(found, DATA)
                    list(worker.replay(worker.start()))
                answer = worker.perform(e.Record(1, number, f"c{client}", encoded(10 * number + client, kind)))
                assert isinstance(answer, e.Recorded)
            digest = aggregate(worker, number).digest
        moved, _ = parameters(worker)
        assert np.abs(moved).max() > 1e-4
        digests.append(digest)
        worker.close()
    assert digests[0] == digests[1]


def one_round(tmp_path, **sections):
    worker = Worker(settings(tmp_path / "state", **sections), DATA)
    try:
        worker.start()
        open_task(worker, 1, 0)
        for client in range(CLIENTS):
            worker.perform(e.Record(1, 1, f"c{client}", encoded(client)))
        aggregate(worker, 1)
        return parameters(worker)
    finally:
        worker.close()


def test_the_median_is_that_of_what_clients_sent_and_buffers_have_theirs(tmp_path):
    moved, buffers = one_round(tmp_path, aggregation={"algorithm": "median"})
    np.testing.assert_allclose(moved, np.median([delta(client) for client in range(CLIENTS)], axis=0), atol=1e-6)
    np.testing.assert_array_equal(buffers, np.full(LAYOUTS["buffers"].size, 3.0))


def test_weights_of_one_s_own(tmp_path):
    moved, _ = one_round(tmp_path, aggregation={"weights": "uniform", "clients": {"c0": 3.0}})
    weights = [3.0] + [1.0] * (CLIENTS - 1)
    expected = np.average([delta(client) for client in range(CLIENTS)], axis=0, weights=weights)
    np.testing.assert_allclose(moved, expected, atol=1e-6)


def test_bounded_norms(tmp_path):
    moved, _ = one_round(tmp_path, aggregation={"weights": "uniform", "norm": 0.1})
    short = [delta(client) * 0.1 / np.linalg.norm(delta(client)) for client in range(CLIENTS)]
    np.testing.assert_allclose(moved, np.mean(short, axis=0), atol=1e-6)


def test_a_bounded_update_counts_shortened_for_a_robust_rule_too(tmp_path):
    moved, _ = one_round(tmp_path, aggregation={"algorithm": "median", "norm": 0.1})
    short = [delta(client) * 0.1 / np.linalg.norm(delta(client)) for client in range(CLIENTS)]
    np.testing.assert_allclose(moved, np.median(short, axis=0), atol=1e-6)


@pytest.mark.parametrize(
    ("algorithm", "scalar"),
    [("fednova", "steps"), ("qfedavg", RECEIVED_LOSS), ("scaffold", DISTANCE), ("feddyn", CORRECTION), (OWN, "loss")],
)
@pytest.mark.parametrize("value", [float("nan"), -1.0, 1e12])
def test_an_update_that_does_not_say_what_is_needed_is_refused(tmp_path, algorithm, scalar, value):
    worker = Worker(settings(tmp_path, aggregation={"algorithm": algorithm}), DATA)
    worker.start()
    open_task(worker, 1, 0)
    answer = worker.perform(e.Record(1, 1, "c0", encoded(1, **{scalar: value})))
    assert isinstance(answer, e.Refused)
    least = 0.099 if scalar == DISTANCE else 0
    assert f"of its {scalar}; expected {least:g} to 1e+09, which {algorithm} needs: update fedge" in answer.reason
    worker.close()


def test_steps_that_nobody_can_have_made_do_not_make_a_large_control(tmp_path):
    worker = Worker(settings(tmp_path, aggregation={"algorithm": "scaffold"}), DATA)
    worker.start()
    open_task(worker, 1, 0)
    answer = worker.perform(e.Record(1, 1, "c0", encoded(1, **{DISTANCE: 1e-9})))
    assert isinstance(answer, e.Refused)
    # None at all are those of a client that kept the model as it was.
    assert isinstance(worker.perform(e.Record(1, 1, "c1", encoded(1, **{DISTANCE: 0.0}))), e.Recorded)
    worker.close()


@pytest.mark.parametrize(
    ("algorithm", "bundle", "words"),
    [
        ("scaffold", {"proximal": True}, r"was exported without --control; export it with"),
        ("feddyn", {"control": True}, r"was exported without --proximal"),
        (
            "feddyn",
            {},
            r'"feddyn" cannot be had with bundle .*toy.*, which was exported without --control and --proximal',
        ),
    ],
)
def test_a_bundle_without_what_a_method_takes_is_refused_before_the_ledger_is_opened(
    tmp_path, algorithm, bundle, words
):
    with pytest.raises(ConfigError, match=words):
        Worker(settings(tmp_path / "state", aggregation={"algorithm": algorithm}), toy_bundle(**bundle))
    assert not (tmp_path / "state" / "ledger.db").exists()


def test_a_run_is_named_once_for_all_of_its_ledger(tmp_path):
    runs = []
    for _ in range(2):
        worker = Worker(settings(tmp_path), DATA)
        restored = worker.start()
        runs.append((restored.run, restored.epoch))
        worker.close()
    assert runs[0][0] == runs[1][0] == runs[0][1] == runs[1][1] - 1


def test_the_plan_names_the_method_and_what_it_fixes(tmp_path):
    more = {"aggregation": {"algorithm": "feddyn", "options": {"alpha": 0.25}}, "train": {"hypers": {"lr": 0.5}}}
    plan = train_plan(settings(tmp_path, **more), 1, 7)
    assert (plan.method, plan.hypers, plan.run) == ("feddyn", {"lr": 0.5, "mu": 0.25}, 7)
    plan = train_plan(settings(tmp_path, aggregation={"algorithm": "scaffold"}), 1, 7)
    assert (plan.method, plan.hypers) == ("scaffold", {})
    assert train_plan(settings(tmp_path), 1).method == "sgd"


def test_updates_that_lack_what_another_algorithm_needs_are_void(tmp_path):
    worker = Worker(settings(tmp_path), DATA)
    worker.start()
    open_task(worker, 1, 0)
    worker.perform(e.Record(1, 1, "c0", encoded(1, **{RECEIVED_LOSS: float("nan")})))
    worker.close()
    worker = Worker(settings(tmp_path, aggregation={"algorithm": "qfedavg"}), DATA)
    restored = worker.start()
    assert restored.open_tasks == ()
    assert not list(worker.replay(restored))
    worker.close()


def test_what_the_bundle_trains_with_is_looked_at_before_the_ledger_is_opened(tmp_path):
    def adam(members):
        manifest = msgspec.json.decode(members["manifest.json"])
        manifest["optimizer"]["name"] = "adam"
        members["manifest.json"] = msgspec.json.encode(manifest)

    with pytest.raises(ConfigError, match="fednova cannot be combined with the bundle's optimizer 'adam'"):
        Worker(settings(tmp_path / "state", aggregation={"algorithm": "fednova"}), toy_bundle(alter=adam))
    assert not (tmp_path / "state" / "ledger.db").exists()


@pytest.mark.parametrize(("algorithm", "measures"), [("fedavg", False), ("fednova", False), ("qfedavg", True)])
def test_clients_are_asked_for_the_loss_of_what_they_received_where_it_is_needed(tmp_path, algorithm, measures):
    plan = train_plan(settings(tmp_path, aggregation={"algorithm": algorithm}, train={"epochs": 3}), 1)
    assert (plan.measure, plan.epochs) == (measures, 3)


@pytest.mark.parametrize("train", [{"schedule": "linear"}, {"decay": {"kind": "step"}, "hypers": {"lr": 0.1}}])
def test_an_algorithm_is_told_how_the_clients_rate_falls(tmp_path, train):
    def proximal(members):
        manifest = msgspec.json.decode(members["manifest.json"])
        manifest["hypers"].append({"name": "mu", "default": 0.5})
        manifest["proximal"] = True
        members["manifest.json"] = msgspec.json.encode(manifest)

    with pytest.raises(ConfigError, match="fednova cannot be combined with a train"):
        Worker(settings(tmp_path, aggregation={"algorithm": "fednova"}, train=train), toy_bundle(alter=proximal))
