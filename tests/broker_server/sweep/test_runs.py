"""What is checked before the first run starts, and when a result is of the same run."""

import numpy as np
import pytest

from broker_server.config import load
from broker_server.sweep.runs import Run, plan
from broker_server.sweep.settings_file import settings_file
from edge_client.errors import BundleError, ConfigError, FedgeError
from tests.broker_server.sweep.files import TOML, federation
from tests.toy import toy_bundle, toy_data


@pytest.fixture
def file(tmp_path):
    return federation(tmp_path)


def fingerprint(file, settings=None, seed=0, name="a"):
    return plan(file, [Run(name, settings or {}, seed)])[0].fingerprint


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (Run("b", {"train.hyper.lr": 1}), ["run b: ", "train.hyper is not a known key", "train.hypers"]),
        (Run("b", {"round.cohort": 0}), ["run b: ", "round.cohort is 0"]),
        (Run("b", {"round.cohort": 5}), ["run b: ", "simulation.clients, 4"]),
        (Run("b", {"train.hypers.mu": 1}), ["run b: ", "train.hypers.mu is not a hyperparameter", "lr"]),
        (Run("b", {"federation.seed": 1}), ["federation.seed cannot be set in a sweep", "seeds"]),
        (Run("b", {"federation.state": "x"}), ["federation.state cannot be set"]),
        (Run("b", {"simulation.data": ""}), ["run b: ", "simulation.data is empty"]),
        (Run("b", {"simulation.data": "none.npz"}), ["run b: ", "none.npz: cannot be read"]),
        (Run("b", {"simulation.slots": 2}), ["simulation.slots is set for all runs"]),
        (Run("b", seed=-1), ["run b: ", "federation.seed is -1"]),
        (Run("A"), ["runs a and A have the same name"]),
        (Run("../b"), ["run '../b'"]),
        (Run(""), ["run ''"]),
    ],
)
def test_a_mistake_in_any_run_is_found_and_named(file, run, words):
    with pytest.raises(ConfigError) as caught:
        plan(file, [Run("a"), run], {"simulation.slots": 1})
    assert all(word in str(caught.value) for word in words)


def test_runs_that_would_meet_on_one_broker_are_refused(file):
    file.write_text(TOML + '[broker]\nurl = "mqtt://127.0.0.1"\n')
    with pytest.raises(ConfigError, match=r"broker\.url is mqtt"):
        plan(file, [Run("a")])


def test_a_bundle_that_cannot_be_used(file):
    file.with_name("toy.fedge").write_bytes(b"PK")
    with pytest.raises(BundleError, match="run a: "):
        plan(file, [Run("a")])


PERSONAL = {"simulation.test_fraction": 0.0, "evaluation.clients": 2, "simulation.holdout": 0.3}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"aggregation.algorithm": "scaffold"}, "exported without --control"),
        ({"personal.method": "ditto"}, "needs the proximal term"),
        (PERSONAL | {"personal.layers": ["head.*"]}, "personal.layers"),
        ({"analytics.features": 4, "analytics.least": 1, "evaluation.clients": 2}, None),
    ],
)
def test_what_the_bundle_cannot_do_is_found_before_the_first_run_too(file, settings, says):
    runs = [Run("a", PERSONAL | {"personal.layers": ["bias"]}), Run("b", settings)]
    if says is None:
        assert len(plan(file, runs)) == 2
        return
    with pytest.raises(FedgeError, match=f"run b: .*{says}"):
        plan(file, runs)


def test_a_run_is_the_same_wherever_it_lies_and_however_it_is_said(file, tmp_path):
    other = tmp_path / "elsewhere"
    other.mkdir()
    moved = federation(other)
    moved.write_text(TOML.replace("rounds = 2", "rounds = 2\npatience = 0") + "[broker]\nport = 1883\n")
    assert fingerprint(file) == fingerprint(moved, {"train.batch_size": 32}, name="b")


@pytest.mark.parametrize("change", ["setting", "seed", "bundle", "data"])
def test_a_run_is_another_where_its_result_may_be(file, change):
    before = fingerprint(file)
    if change == "bundle":
        file.with_name("toy.fedge").write_bytes(toy_bundle(momentum=True, seed=1))
    if change == "data":
        np.savez(file.with_name("data.npz"), **toy_data(201))
    after = fingerprint(file, {"train.epochs": 2} if change == "setting" else {}, int(change == "seed"))
    assert after != before


def test_a_run_is_another_where_the_source_of_its_own_algorithm_is(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = tmp_path / "rules_of_a_sweep.py"
    settings = {"aggregation.algorithm": "rules_of_a_sweep:OURS"}
    module.write_text("from broker_server.aggregation.registry import ALGORITHMS\nOURS = ALGORITHMS['fedavg']\n")
    before = fingerprint(file, settings)
    assert fingerprint(file, settings) == before
    module.write_text(module.read_text() + "# changed\n")
    assert fingerprint(file, settings) != before


def test_settings_written_to_a_file_are_read_as_they_were(file, tmp_path):
    settings = {
        "train.hypers": {"lr": 1e-05, "momentum": 123456789.5},
        "codec.clients": {"pi-*": 0.05, "a.b": 0.2},
        "simulation.speed": [0.5, 1],
        "simulation.key": 'ü "\\ \x7f 😀',
        "server.schedule.kind": "cosine",
        "evaluation.data": "some.module:function",
        "stop.target": 0.5,
        "federation.seed": 2**40,
        "personal.method": "ditto",
        "personal.lambda": 0.5,
    }
    known = load(file, settings)
    written = tmp_path / "elsewhere.toml"
    written.write_text(settings_file(known), encoding="utf-8")
    assert load(written) == known
