"""Emulated phones in a process of their own, a real broker, real sockets."""

import asyncio

import msgspec
import numpy as np
import psutil
import pytest

from broker_server.broker import find_mosquitto
from broker_server.config import Federation
from broker_server.ledger import Ledger
from broker_server.simulation import Simulated, simulate
from edge_client.errors import ConfigError, FedgeError
from tests.brokers import FEDERATION, KINDS, secured
from tests.toy import toy_bundle, toy_data


def settings(folder, **sections) -> Federation:
    (folder / "toy.fedge").write_bytes(toy_bundle())
    np.savez(folder / "data.npz", **toy_data(400))
    base = {
        "federation": {"name": "toys", "bundle": str(folder / "toy.fedge"), "state": str(folder / "state")},
        "round": {"cohort": 4, "deadline": 30.0},
        "transfer": {"spread": 0.0},
        "train": {"batch_size": 16, "epochs": 4},
        "stop": {"rounds": 5},
        "simulation": {
            "clients": 8,
            "data": str(folder / "data.npz"),
            "split": "dirichlet",
            "test_fraction": 0.25,
            "slots": 1,
        },
    }
    merged = {name: base.get(name, {}) | sections.get(name, {}) for name in {*base, *sections}}
    return msgspec.convert(merged, Federation)


@pytest.fixture(autouse=True)
def nothing_stays_behind():
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    after = {child.pid for child in psutil.Process().children(recursive=True)}
    assert after <= before


def run(config: Federation, on_round=lambda done: None) -> Simulated:
    return asyncio.run(asyncio.wait_for(simulate(config, lambda line: None, on_round), 60))


@pytest.mark.parametrize("kind", KINDS)
def test_a_small_fleet_with_certificates(tmp_path, kind):
    """Phones, server and its probes do all that they must, and the generated rules let them."""
    phones = [f"phone-{number:04d}" for number in range(4)]
    with secured(kind, tmp_path, tuple(phones)) as broker:
        identities, authority = tmp_path / "identities", broker.certificates.folder
        identities.mkdir()
        for name in phones:
            broker.certificates.device(name).rename(identities / name)
        own = {"tls_ca": "ca.crt", "tls_certificate": "server.crt", "tls_key": "server.key"}
        config = settings(
            tmp_path,
            federation={"name": FEDERATION},
            broker={"url": str(broker.address), **{key: str(authority / name) for key, name in own.items()}},
            simulation={"clients": 4, "identities": str(identities)},
            stop={"rounds": 2},
            transfer={"inline": 0},
        )
        result = run(config)
    assert [done.clients for done in result.rounds] == [4, 4]


def test_a_federation_with_an_authority_is_tried_out_without_the_keys_of_its_devices(tmp_path):
    trust, lines = {"authority": str(tmp_path / "elsewhere")}, []
    config = settings(tmp_path, trust=trust, simulation={"clients": 4}, stop={"rounds": 1})
    result = asyncio.run(asyncio.wait_for(simulate(config, lines.append), 60))
    assert len(result.rounds) == 1
    assert lines[0] == "simulation.identities is empty: no certificates and no signatures in this run"


def test_a_small_fleet(tmp_path):
    seen = []
    result = run(settings(tmp_path), seen.append)
    assert result.outcome.reason == "5 rounds are done"
    assert seen == result.rounds
    assert [done.clients for done in seen] == [4] * 5
    assert seen[-1].metrics["accuracy"] > 0.5
    fleet = result.fleet
    assert (fleet.clients, fleet.dropped) == (8, 0)
    assert fleet.sent > sum(done.bytes_up for done in seen) * 0.9
    assert fleet.received > 8 * (tmp_path / "toy.fedge").stat().st_size
    assert (tmp_path / "state" / "models" / "best" / "infer.onnx").is_file()


def test_all_phones_evaluate_and_how_fair_the_model_is_to_them_is_told(tmp_path):
    config = settings(tmp_path, evaluation={"clients": 8}, simulation={"holdout": 0.3}, stop={"rounds": 2})
    for done in run(config).rounds:
        found = {name.removeprefix("client_accuracy"): done.metrics[name] for name in done.metrics if "t_acc" in name}
        assert found.keys() == {"", "_mean", "_worst", "_spread"}
        assert found["_worst"] < found["_mean"] <= 1
        assert 0 < found["_spread"] <= 0.5
        assert done.metrics["client_loss_worst"] > done.metrics["client_loss_mean"]


def counting(tmp_path, **sections) -> Federation:
    return settings(
        tmp_path,
        evaluation={"clients": 8, "confusion": True},
        analytics={"labels": True, "features": 5, "range": [-4.0, 4.0], "least": 8},
        simulation={"share": "labels,features", "holdout": 0.3, "test_fraction": 0.0},
        stop={"rounds": 1},
        **sections,
    )


def test_what_all_phones_hold_is_counted_and_a_finished_federation_goes_on_being_evaluated(tmp_path):
    """In rounds, and without them: then the phones come back to the model that they have trained."""
    trained = run(counting(tmp_path))
    (found,) = trained.findings
    assert (found.round, found.version, found.clients) == (1, 1, {"confusion": 8, "labels": 8, "features": 8})
    y = toy_data(400)["y"]
    held = [row.samples + label for row, label in zip(found.by_class, found.labels, strict=True)]
    assert held == np.bincount(y).tolist(), "each sample is tested on or trained on"
    right = sum(found.confusion[label][label] for label in range(3))
    assert right / sum(map(sum, found.confusion)) == trained.rounds[0].metrics["client_accuracy"]
    assert all(sum(one.shares) == sum(found.labels) for one in found.features)
    served = run(counting(tmp_path, round={"mode": "evaluation"}))
    assert served.outcome.reason == "version 1 is evaluated"
    (result,) = served.rounds
    assert (result.round, result.version, result.clients, result.metrics["client_answers"]) == (2, 1, 0, 8)
    first, again = served.findings
    assert first == found
    assert (again.round, again.confusion, again.labels, again.features) == (
        2,
        found.confusion,
        found.labels,
        found.features,
    )
    assert result.metrics["client_accuracy"] == trained.rounds[0].metrics["client_accuracy"]


def test_phones_that_come_go_and_vanish(tmp_path):
    config = settings(
        tmp_path,
        round={"cohort": 4, "minimum": 1, "deadline": 5.0, "clients": 2},
        simulation={"dropout": 0.2, "availability": 0.8, "speed": [0.5, 1.0], "latency": 0.01, "bandwidth": 1e6},
        stop={"rounds": 4},
    )
    result = run(config)
    assert [done.round for done in result.rounds] == [1, 2, 3, 4]
    assert all(1 <= done.clients <= 4 for done in result.rounds)


def test_a_fleet_without_rounds(tmp_path):
    """Uneven phones that vanish now and then: versions go on, updates are of several ages, the model learns."""
    config = settings(
        tmp_path,
        round={"mode": "buffered", "concurrency": 5, "buffer": 3, "deadline": 10.0},
        simulation={"speed": [0.1, 1.0], "dropout": 0.1, "slots": 4},
        stop={"rounds": 12},
    )
    result = run(config)
    assert [done.version for done in result.rounds] == list(range(1, 13))
    assert all(done.clients >= 3 for done in result.rounds)
    assert sum(done.bytes_down for done in result.rounds) > 0
    assert max(done.metrics["staleness"] for done in result.rounds) > 0
    assert max(done.metrics["accuracy"] for done in result.rounds) > 0.5
    assert result.fleet.dropped == 0
    with Ledger.read(tmp_path / "state" / "ledger.db") as ledger:
        assert [version for version, _, _ in ledger.versions()] == list(range(1, 13))


@pytest.mark.parametrize(
    ("attack", "algorithm", "holds"),
    [("sign flip", "fedavg", False), ("sign flip", "multi-krum", True), ("label flip", "geometric-median", True)],
)
def test_a_quarter_of_the_phones_attacks(tmp_path, monkeypatch, attack, algorithm, holds):
    monkeypatch.setenv("FEDGE_ATTACK", attack)
    monkeypatch.setenv("FEDGE_ATTACKERS", "0.25")
    options = {"attackers": 0.25} if algorithm == "multi-krum" else {}
    config = settings(
        tmp_path,
        aggregation={"algorithm": algorithm, "options": options},
        round={"cohort": 8, "minimum": 7},
        simulation={"split": "iid"},
        stop={"rounds": 3},
    )
    result = asyncio.run(asyncio.wait_for(simulate(config, lambda line: None, fleet="tests.attackers"), 60))
    assert [done.clients for done in result.rounds] == [8] * 3
    assert (result.rounds[-1].metrics["accuracy"] > 0.6) is holds


def test_what_an_algorithm_asks_of_clients_reaches_them(tmp_path):
    config = settings(
        tmp_path,
        aggregation={"algorithm": "qfedavg"},
        server={"optimizer": "yogi", "learning_rate": 0.1},
        stop={"rounds": 4},
    )
    result = run(config)
    assert [done.clients for done in result.rounds] == [4] * 4
    assert result.rounds[-1].metrics["loss"] < result.rounds[0].metrics["loss"]


def test_control_variates_go_with_the_model(tmp_path):
    config = settings(tmp_path, aggregation={"algorithm": "scaffold"}, transfer={"inline": 0}, stop={"rounds": 3})
    (tmp_path / "toy.fedge").write_bytes(toy_bundle(control=True))
    result = run(config)
    assert [done.clients for done in result.rounds] == [4] * 3
    assert result.rounds[-1].metrics["loss"] < result.rounds[0].metrics["loss"]
    assert len(list((tmp_path / "state").rglob("memory-scaffold-*"))) >= 4


@pytest.mark.skipif(find_mosquitto() is None, reason="needs the Debian package mosquitto")
def test_three_hundred_phones_need_no_thread_each(tmp_path):
    small = {"clients": 300, "split": "iid", "test_fraction": 0.0, "slots": 2}
    rounds = {"cohort": 30, "deadline": 60.0}
    config = settings(tmp_path, simulation=small, round=rounds, stop={"rounds": 2}, broker={"kind": "mosquitto"})
    np.savez(tmp_path / "data.npz", **toy_data(900))
    result = run(config)
    assert [done.clients for done in result.rounds] == [30, 30]
    assert (result.fleet.clients, result.fleet.dropped) == (300, 0)
    # The loop's, the slots', those that connect (at most 32 in asyncio's pool), and a few of the runtime's.
    assert result.fleet.threads <= 48
    assert result.fleet.peak_rss_mib < 600


def test_without_data_there_is_nothing_to_simulate(tmp_path):
    with pytest.raises(ConfigError, match=r"simulation.data is empty"):
        run(settings(tmp_path, simulation={"data": ""}))


def test_data_that_does_not_fit_the_bundle_is_named_by_the_phones(tmp_path):
    np.savez(tmp_path / "wide.npz", **toy_data(100, features=9))
    with pytest.raises(FedgeError, match=r"9.*4|4.*9"):
        run(settings(tmp_path, simulation={"data": str(tmp_path / "wide.npz"), "test_fraction": 0.0}))


def test_a_label_that_is_not_in_the_data(tmp_path):
    with pytest.raises(FedgeError, match=r"emulated phones: .*'label'"):
        run(settings(tmp_path, simulation={"label": "label"}))
