"""What stays on the clients: what is published and said for it, what is refused, and that nothing of it comes here."""

import asyncio

import msgspec
import numpy as np
import pytest
import safetensors.numpy

from broker_server.artifacts import named_tensors, read_tensors
from broker_server.config import Federation, load
from broker_server.personal import Personal, check_personal, personal_plan, publishable
from broker_server.report import table
from broker_server.server import read_bundle
from broker_server.simulation import simulate
from broker_server.training import train_plan
from broker_server.worker import Worker
from edge_client.bundle import Bundle
from edge_client.errors import BundleError, ConfigError, FedgeError
from edge_client.learning.remembered import unpack_vector
from edge_client.wire.messages import PersonalPlan
from tests.toy import toy_bundle, toy_data

DEEP = toy_bundle(hidden=8, proximal=True, buffer=True)
HEAD = ["weight", "bias"]


def settings(folder, bundle=DEEP, **sections) -> Federation:
    (folder / "toy.fedge").write_bytes(bundle)
    base = {"federation": {"name": "toys", "bundle": str(folder / "toy.fedge"), "state": str(folder / "state")}}
    return msgspec.convert(base | sections, Federation)


def test_clients_get_the_bundle_with_the_layers_that_the_settings_name(tmp_path):
    config = settings(tmp_path, personal={"layers": HEAD})
    data = read_bundle(config)
    bundle, plain = Bundle.from_bytes(data), Bundle.from_bytes(DEEP)
    assert read_bundle(config) == data
    assert bundle.digest != plain.digest
    assert [tensor.name for tensor in bundle.layout.tensors] == ["hidden.weight", "hidden.bias"]
    assert [tensor.name for tensor in bundle.kept.tensors] == HEAD
    assert bundle.manifest.files == plain.manifest.files
    assert read_bundle(settings(tmp_path)) == DEEP
    one = settings(tmp_path, personal={"layers": "weight"})
    assert [tensor.name for tensor in Bundle.from_bytes(read_bundle(one)).kept.tensors] == ["weight"]


def test_the_plan_says_what_the_settings_do(tmp_path):
    config = settings(
        tmp_path, personal={"method": "ditto", "lambda": 0.5, "epochs": 3, "steps": 2, "hypers": {"lr": 0.5}}
    )
    assert train_plan(config, 1).personal == PersonalPlan("ditto", 3, 2, 0.5, 0, {"lr": 0.5})
    assert personal_plan(Personal(method="ditto")).pull == 0.1
    assert personal_plan(Personal(method="ditto", pull=0.0)).pull == 0.0
    assert personal_plan(Personal(layers="norm", head_epochs=2)) == PersonalPlan(head_epochs=2)
    assert train_plan(settings(tmp_path), 1).personal == PersonalPlan()


LEAST = '[federation]\nname = "demo"\nbundle = "toy.fedge"\n'
BAD = {
    "method": ('[personal]\nmethod = "dito"', r"personal\.method is 'dito'; expected one of \"ditto\", "),
    "lambda": ("[personal]\nlambda = -1", r"personal\.lambda is -1; expected a number from 0"),
    "unknown": ("[personal]\npull = 1", r"personal\.pull is not a known key; .*lambda"),
    "lambda of nothing": ("[personal]\nlambda = 1.0", r"personal\.lambda is 1\.0 and means nothing .*\"ditto\""),
    "lambda of tuning": ('[personal]\nmethod = "fine-tune"\nlambda = 1.0', r"personal\.lambda .*set .* to \"ditto\""),
    "epochs of nothing": (
        "[personal]\nepochs = 2",
        r"personal\.epochs is 2 and means nothing.*\"ditto\" or \"fine-tune\"",
    ),
    "mu": ('[personal]\nmethod = "ditto"\n[personal.hypers]\nmu = 1', r"personal\.hypers\.mu is what personal\.lambda"),
    "two at once": ('[personal]\nlayers = "head.*"\nmethod = "ditto"', r"personal\.layers cannot be combined"),
    "nothing": ('[personal]\nlayers = [""]', r"personal\.layers holds an empty pattern"),
    "held-out data": (
        '[personal]\nlayers = "norm"\n[evaluation]\ndata = "test.npz"',
        r"evaluation\.data cannot be combined with personal\.layers: .*set evaluation\.clients",
    ),
    "held-out share": (
        '[personal]\nlayers = "norm"\n[simulation]\ntest_fraction = 0.1',
        r"simulation\.test_fraction cannot be combined with personal\.layers: .*holdout",
    ),
    "nobody measures": (
        '[personal]\nlayers = "norm"\n[stop]\nmetric = "personal_accuracy"\ntarget = 0.9',
        r"needs? an evaluation",
    ),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD.keys())
def test_settings_that_cannot_be_are_refused_as_the_file_is_read(tmp_path, text, message):
    path = tmp_path / "federation.toml"
    path.write_text(LEAST + text)
    with pytest.raises(ConfigError, match=message) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ")


OWN = publishable(DEEP, Personal(layers=("weight", "bias")))
MISFITS = {
    "no such layer": (
        DEEP,
        {"layers": "head.*"},
        {},
        "'head.\\*': it matches no parameter .* of hidden.weight, hidden.bias",
    ),
    "all layers": (DEEP, {"layers": "*"}, {}, "leave nothing to share; expected some of hidden.weight"),
    "no norm": (toy_bundle(), {"layers": "norm"}, {}, "no layer keeps running statistics"),
    "ditto without its term": (toy_bundle(), {"method": "ditto"}, {}, "needs the proximal term.*--proximal"),
    "ditto with layers of the bundle": (OWN, {"method": "ditto"}, {}, "cannot be combined with the personal layers"),
    "a head of nothing": (DEEP, {"head_epochs": 2}, {}, "no layer stays on the clients"),
    "statistics alone": (DEEP, {"layers": "mean", "head_epochs": 1}, {}, "running statistics only"),
    "a hyper": (DEEP, {"method": "ditto", "hypers": {"lrr": 1.0}}, {}, "personal.hypers.lrr is not .*lr, mu"),
    "held-out data": (OWN, {}, {"evaluation": {"data": "test.npz"}}, "evaluation.data cannot be combined"),
    "a metric of nobody": (
        DEEP,
        {},
        {"stop": {"metric": "personal_accuracy", "target": 0.9}, "evaluation": {"clients": 2}},
        "clients have no model for themselves",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_the_bundle_cannot_do_is_refused_as_the_server_starts(tmp_path, name):
    data, section, more, message = MISFITS[name]
    config = settings(tmp_path, data, personal=section, **more)
    with pytest.raises(FedgeError, match=message) as caught:
        Worker(config, read_bundle(config))
    assert isinstance(caught.value, ConfigError | BundleError)
    assert not (tmp_path / "state").exists()


def test_what_fits_is_not_refused(tmp_path):
    for section in (
        {"layers": HEAD, "head_epochs": 2},
        {"method": "ditto"},
        {"layers": HEAD, "method": "fine-tune"},
        {},
    ):
        config = settings(tmp_path, personal=section)
        check_personal(config, Bundle.from_bytes(read_bundle(config)))


def simulated(folder, bundle=DEEP, **sections):
    # To each client the classes have other names.
    data, user = toy_data(240, seed=3), np.arange(240) % 4
    np.savez(folder / "data.npz", x=data["x"], y=(data["y"] + user) % 3, user=user)
    config = settings(
        folder,
        bundle,
        **{
            "round": {"cohort": 4, "deadline": 30.0},
            "transfer": {"spread": 0.0, "inline": 0},
            "train": {"batch_size": 8, "epochs": 2, "hypers": {"lr": 0.3, "mu": 0.0}},
            "stop": {"rounds": 3},
            "evaluation": {"clients": 4, "every": 3},
            "simulation": {
                "clients": 4,
                "data": str(folder / "data.npz"),
                "split": "natural",
                "holdout": 0.3,
                "slots": 1,
            },
        }
        | sections,
    )
    return asyncio.run(asyncio.wait_for(simulate(config, lambda line: None), 60))


FIGURES = ("", "_mean", "_worst", "_spread")


def test_layers_that_stay_leave_no_trace_on_the_server_and_each_client_is_measured_with_its_own(tmp_path):
    result = simulated(tmp_path, personal={"layers": HEAD, "head_epochs": 1}, codec={"kind": "none"})
    metrics = result.rounds[-1].metrics
    for figure in FIGURES:
        assert metrics["personal_accuracy" + figure] == metrics["client_accuracy" + figure]
    assert metrics["personal_accuracy"] == metrics["accuracy"] > 0.7
    bundle = Bundle.from_bytes(OWN)
    phones = sorted((tmp_path / "state" / "phones").glob("phone-*/memory-layers-*.bin"))
    assert len(phones) == 4
    ledger = b"".join(path.read_bytes() for path in (tmp_path / "state").glob("ledger.db*"))
    models = b"".join(path.read_bytes() for path in (tmp_path / "state" / "models").glob("*/*"))
    heads = [unpack_vector(path.read_bytes(), bundle.kept) for path in phones]
    assert not any(np.array_equal(one, heads[0]) for one in heads[1:])
    for head in heads:
        for at in range(len(head) - 1):
            secret = head[at : at + 2].tobytes()
            assert secret not in ledger
            assert secret not in models
    assert "personal" not in [column.header for column in table(result.rounds).columns]
    report = msgspec.json.decode((tmp_path / "state" / "models" / "last" / "report.json").read_bytes())
    assert report["about"]["personal"] == "untrained here, as in the bundle: weight, bias"
    assert report["samples"] == 0


def test_the_weights_of_a_device_make_a_whole_model(tmp_path):
    bundle = Bundle.from_bytes(OWN)
    mine = {name: np.array(value) for name, value in bundle.weights.items()}
    mine |= {name: mine[name] + np.float32(1) for name in ("weight", "hidden.bias", "mean")}
    safetensors.numpy.save_file(mine, tmp_path / "weights.safetensors")
    vector, buffers = read_tensors(tmp_path / "weights.safetensors", bundle)
    found = named_tensors(bundle, vector, buffers)
    assert set(found) == set(mine)
    for name, value in mine.items():
        np.testing.assert_array_equal(found[name], value)
    del mine["weight"]
    safetensors.numpy.save_file(mine, tmp_path / "shared.safetensors")
    vector, buffers = read_tensors(tmp_path / "shared.safetensors", bundle)
    np.testing.assert_array_equal(named_tensors(bundle, vector, buffers)["weight"], bundle.weights["weight"])


def test_a_model_of_its_own_is_measured_beside_the_one_of_all(tmp_path):
    result = simulated(tmp_path, personal={"method": "ditto", "lambda": 0.01, "epochs": 4})
    metrics = result.rounds[-1].metrics
    for figure in FIGURES:
        assert {"personal_accuracy" + figure, "client_accuracy" + figure} <= set(metrics)
    assert metrics["personal_accuracy"] > metrics["client_accuracy"] + 0.1
    shown = {column.header: list(column.cells)[-1] for column in table(result.rounds).columns}
    assert shown["accuracy"] == f"{metrics['accuracy']:.4f}"
    assert shown["personal"] == f"{metrics['personal_accuracy']:.4f}"
