"""The learning benchmark takes an hour; what it is made of is held here."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from broker_server.broker import find_mosquitto
from broker_server.config import load
from tests import datasets
from tests.bench.federations import BenchError
from tests.bench.learning import algorithms, buffered, figures, hostile, mcmahan, personal, trials
from tests.bench.learning.__main__ import PARTS
from tests.bench.learning.trials import Bench, Trial
from tests.toy import toy_bundle, toy_data


def result(accuracy, *, seconds=1.0, clients=10, **metrics):
    """What a trial may come to."""
    rows = [
        {
            "round": number,
            "clients": clients,
            "seconds": seconds,
            "bytes_up": 100,
            "bytes_down": 50,
            "metrics": {"accuracy": value, **metrics},
        }
        for number, value in enumerate(accuracy, 1)
    ]
    stamps = [3 + seconds * number for number in range(1, len(rows) + 1)]
    return {"rounds": rows, "stamps": stamps, "seconds": stamps[-1], "bytes_up": 0, "bytes_down": 0}


def bench(answer):
    """A benchmark whose trials come to ``answer(trial)``."""
    return SimpleNamespace(jobs=1, run=lambda asked, jobs=0: {trial.name: answer(trial) for trial in asked})


def test_a_target_is_reached_with_the_first_round_that_is_as_accurate():
    assert figures.rounds_to([0.1, 0.5, 0.4, 0.6], 0.5) == 2
    assert figures.rounds_to([0.1, 0.5, 0.4, 0.6], 0.55) == 4
    assert figures.rounds_to([0.1, 0.5], 0.51) is None


def test_smoothing_takes_the_last_rounds_and_fewer_at_the_beginning():
    assert figures.smoothed([1.0, 2.0, 3.0, 4.0], 2) == [1.0, 1.5, 2.5, 3.5]


def test_deviations_are_of_a_sample():
    assert figures.deviation([1.0, 2.0, 3.0]) == pytest.approx(1.0)
    assert figures.deviation([1.0]) == 0.0
    assert math.isnan(figures.mean([]))


def test_bytes_leave_out_the_round_in_which_phones_get_the_bundle():
    assert trials.traffic(result([0.1, 0.2, 0.3])) == [0, 150, 300]


def test_each_row_of_the_tables_takes_its_best_learning_rate():
    def answer(trial):
        rate = trial.settings["train.hypers.lr"]
        target = trial.settings["stop.target"]
        return result([0.5] * (30 - round(100 * rate)) + [target] if rate < 0.3 else [0.5] * 40)

    found = mcmahan.measure(bench(answer), full=False)
    assert [(one["model"], one["split"], one["epochs"], one["codec"]) for one in found["mcmahan"]] == [
        (model, split, epochs, codec)
        for model, split, epochs in (("2nn", "iid", 1), ("2nn", "shards", 1), ("cnn", "iid", 1), ("cnn", "iid", 5))
        for codec in ("quantized", "none")
    ]
    first = found["mcmahan"][0]
    assert (first["lr"], first["rounds"], first["paper_rounds"], first["target"]) == (0.2, 11, 87, 0.97)
    tried = [one for one in found["mcmahan_tried"] if (one["model"], one["split"]) == ("2nn", "iid")]
    assert {(one["lr"], one["rounds"]) for one in tried} == {(0.1, 21), (0.2, 11), (0.3, None)}
    assert {one["model"] for one in mcmahan.measure(bench(answer), full=True)["mcmahan"][8:]} == {"cnn"}


def test_algorithms_are_tuned_by_as_many_trials_and_compared_with_fedavg():
    asked = {}

    def answer(trial):
        method = trial.name.rpartition("-")[0]
        asked[trial.name] = trial
        last = 0.8 if "FedAdam" in method and "0.03" in method else 0.7 if "FedAvg_" in method else 0.6
        fair = {"client_accuracy_mean": 0.5, "client_accuracy_worst": 0.25, "client_accuracy_spread": 0.1}
        return result([0.5] * 20 + [last] * 20 + [0.0], **fair)

    found = algorithms.measure(bench(answer), full=False)["algorithms"]["cases"]["fashion-mnist"]
    assert {len(settings) for settings in found["tried"].values()} == {3}
    lines = found["lines"]
    assert lines["FedAvg"]["accuracy"] == pytest.approx(0.7)
    assert lines["FedAvg"]["rounds_ratio"] == 1.0
    assert lines["FedAdam"]["points"] == pytest.approx(10.0)
    assert lines["FedAdam"]["rounds"] < lines["FedAvg"]["rounds"]
    assert lines["FedProx"]["rounds"] is None
    assert lines["FedAdam"]["client_accuracy_worst"] == 0.25
    assert found["winners"] == ["FedAdam"]
    best = [one for one in asked.values() if one.name.startswith("fashion-mnist-FedAdam") and one.seed == 2]
    assert [one.settings["server.learning_rate"] for one in best] == [0.03]


def test_a_model_of_ones_own_beats_the_global_one_and_solitude_for_mean_and_worst(monkeypatch):
    def answer(trial):
        mean, worst = (0.9, 0.6) if "Ditto-60" in trial.name else (0.95, 0.4) if "FedRep" in trial.name else (0.8, 0.5)
        names = ("client_accuracy", "personal_accuracy")
        told = {name + figure: value for name in names for figure, value in (("_mean", mean), ("_worst", worst))}
        return result([0.0], **told)

    alone = {"_mean": 0.85, "_worst": 0.45}
    monkeypatch.setattr(personal, "alone", lambda bench, case, epochs, seed: alone)
    found = personal.measure(bench(answer), full=False)["personal"]["cases"]["mnist-writers"]
    assert found["winners"] == ["Ditto"]
    assert found["lines"]["Ditto"]["tuned"] == 60
    assert found["lines"]["alone"]["mean"] == pytest.approx(0.85)
    assert {len(settings) for settings in found["tried"].values()} == {2}


def test_clients_that_train_alone_have_what_they_have_in_the_federation(tmp_path, monkeypatch):
    monkeypatch.setattr(trials, "BUILD", tmp_path)
    monkeypatch.setitem(datasets.LOADERS, "toy", lambda: datasets.DataSet(toy_data(200), toy_data(20)))
    settings = {"simulation.clients": 5, "simulation.split": "iid", "train.batch_size": 8}
    monkeypatch.setitem(personal.CASES, "toy", personal.Case("toy", settings, 0.5))
    made = Bench("personal")
    (made.folder / "bundles").mkdir(parents=True)
    (made.folder / "bundles" / "mlp.fedge").write_bytes(toy_bundle())
    found = personal.alone(made, "toy", 20, 0)
    assert 0.5 < found["_worst"] <= found["_mean"] <= 1
    monkeypatch.setattr(personal, "solitude", None)
    assert personal.alone(made, "toy", 20, 0) == found


def test_rules_are_compared_with_clean_fedavg():
    def answer(trial):
        broken = trial.variables.get("FEDGE_ATTACK") == "sign flip" and trial.name.startswith("fedavg")
        return result([0.5, 0.1 if broken else 0.8] * 10, clients=20)

    found = hostile.measure(bench(answer), full=False)["attackers"]
    assert found["clean_accuracy"] == pytest.approx(0.68)
    assert "fedavg" in found["within_two_points"]["label flip"]
    assert "fedavg" not in found["within_two_points"]["sign flip"]
    (one,) = (one for one in found["cases"] if (one["rule"], one["attack"]) == ("fedavg", "sign flip"))
    assert one["below_clean"] == pytest.approx(0.42)


def test_time_to_the_target_begins_with_the_first_invitation():
    line = buffered.line(result([0.0] * 5 + [1.0] * 5, seconds=2.0))
    assert line["versions"] == 9
    assert line["seconds"] == pytest.approx(18.0)
    assert buffered.line(result([0.1]))["seconds"] is None


def test_both_ways_are_tuned_by_as_many_trials():
    def answer(trial):
        fast = 1.0 if "round.mode" in trial.settings else 2.0
        return result([0.0] * 5 + [1.0] * 5, seconds=fast * trial.settings.get("round.over_select", 1.5))

    assert len({len(grid) for grid in buffered.GRIDS.values()}) == 1
    found = buffered.measure(bench(answer), full=False)["buffered"]
    assert found["best"]["synchronous"].startswith("10 of 1.0 times")
    assert found["ratio"] == pytest.approx(0.75)


@pytest.mark.parametrize(
    "trial",
    [
        *(one for row in mcmahan.ROWS for one in mcmahan.trials(row, "quantized").values()),
        *(hostile.trial(rule, "none", 0) for rule in hostile.RULES),
        *(buffered.trial(mode, name, 0) for mode, names in buffered.GRIDS.items() for name in names),
        *(
            personal.trial(case, way, variant, 0)
            for case in personal.CASES
            for way, how in personal.WAYS.items()
            for variant in next(iter(how.tuned.values()))
        ),
        *(
            algorithms.trial(case, method, variant, 0)
            for case in algorithms.CASES
            for method in algorithms.METHODS
            for variant in algorithms.variants(algorithms.CASES[case], algorithms.METHODS[method])
        ),
    ],
    ids=lambda trial: trial.name,
)
def test_every_trial_has_settings_that_are_possible(trial, tmp_path):
    file = tmp_path / "federation.toml"
    file.write_text('[federation]\nname = "bench"\nbundle = "model.fedge"\n')
    common = {"evaluation.data": "test.npz", "simulation.data": "train.npz"}
    settings = load(file, {**common, **trial.settings})
    assert settings.round.mode == "buffered" or settings.round.minimum <= settings.round.cohort
    assert not trial.final or load(file, {**common, **trial.settings, **trial.final})


@pytest.mark.skipif(find_mosquitto() is None, reason="needs the Debian package mosquitto")
def test_trials_run_once_and_again_where_their_phones_are_others(tmp_path, monkeypatch):
    data, test = toy_data(200), toy_data(40, seed=1)
    monkeypatch.setattr(trials, "BUILD", tmp_path)
    monkeypatch.setitem(datasets.LOADERS, "toy", lambda: datasets.DataSet(data, test))
    made = Bench("part", jobs=1)
    (made.folder / "bundles").mkdir(parents=True)
    (made.folder / "bundles" / "toy.fedge").write_bytes(toy_bundle())
    settings = {"simulation.clients": 4, "round.cohort": 2, "stop.rounds": 2, "codec.kind": "none"}
    honest = Trial("one", "toy", "toy", settings, final={"evaluation.clients": 4})
    found = made.run([honest])["one"]
    assert [row["round"] for row in found["rounds"]] == [1, 2, 3]
    assert len(trials.accuracy(found)) == 3
    assert found["stamps"] == sorted(found["stamps"])
    assert ["client_accuracy_worst" in row["metrics"] for row in found["rounds"]] == [False, False, True]
    kept = made.folder / "part" / "runs" / "one" / "result.json"
    written = kept.stat().st_mtime_ns
    assert made.run([honest]) == {"one": found}
    assert kept.stat().st_mtime_ns == written
    paced = Trial(
        "one",
        "toy",
        "toy",
        settings,
        fleet="tests.bench.learning.phones",
        variables={"FEDGE_TRAINING_SECONDS": "0.1"},
    )
    again = made.run([paced])["one"]
    assert json.loads(kept.read_text())["beside"]["fleet"] == "tests.bench.learning.phones"
    assert min(row["seconds"] for row in again["rounds"]) > 0.1
    assert np.isfinite(trials.accuracy(again)).all()


def test_a_round_that_counts_too_few_updates_makes_no_fair_trial(tmp_path, monkeypatch):
    monkeypatch.setattr(trials, "BUILD", tmp_path)
    monkeypatch.setattr(trials, "run_all", lambda *given, **more: {"one": result([0.1, 0.2], clients=1)})
    monkeypatch.setattr(Bench, "_run", lambda self, trial: None)
    with pytest.raises(BenchError, match=r"one: rounds \[1, 2\] counted other than 2 updates"):
        Bench("part").run([Trial("one", "toy", "toy", {"round.cohort": 2})])
    assert Bench("part").run([Trial("one", "toy", "toy", {"round.cohort": 2}, exact=False)])


@pytest.mark.parametrize("part", PARTS)
def test_each_part_has_its_plot(part, tmp_path, monkeypatch):
    def answer(trial):
        fair = {
            f"{who}_accuracy{figure}": 0.5
            for who in ("client", "personal")
            for figure in ("_mean", "_worst", "_spread")
        }
        return result([0.1, 0.5, 0.9, 0.99], **fair)

    monkeypatch.setattr(personal, "alone", lambda bench, case, epochs, seed: {"_mean": 0.5, "_worst": 0.4})
    measure, plot = PARTS[part]
    found = measure(bench(answer), False)
    plot(json.loads(json.dumps(found)), tmp_path / "plot.svg")
    assert "</svg>" in (tmp_path / "plot.svg").read_text()
