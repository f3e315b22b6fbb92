"""Personal layers, Ditto and fine-tuning against PyTorch; what stays on the device stays there, through power cuts."""

import contextlib
import shutil

import msgspec
import numpy as np
import pytest
import torch

from edge_client import events as e
from edge_client.bundle import Bundle
from edge_client.codec.model import untrained
from edge_client.codec.update import decode_scalars, decode_update
from edge_client.data import ArraySource
from edge_client.device import Device, Workshop
from edge_client.errors import BundleError
from edge_client.learning.own import DITTO, LAYERS, OwnModel, remembered_layers, remembered_model
from edge_client.manifest import update_layouts
from edge_client.memory import MemoryBroker, MemoryLink
from edge_client.predict import Model as Predictor
from edge_client.shelf import Shelf
from edge_client.store import FileCopies, Store
from edge_client.trainer import Trainer
from edge_client.wire import messages as m
from edge_client.worker import Worker
from export.bundle import export_bundle
from tests.edge_client.learning.rounds import Reference, Rounds, exported, personal, plan, sources
from tests.edge_client.test_store import Faults, PowerCut
from tests.toy import toy_bundle, toy_data

NEAR = {"rtol": 1e-5, "atol": 2e-6}


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("net") / "net.fedge")


def kept_of(rounds, client):
    """By name, what a client keeps."""
    vector = remembered_layers(rounds.bundle, rounds.workers[client].store.recall)
    assert vector is not None
    return rounds.bundle.kept.views(vector)


def assert_equal(found, expected, names):
    assert set(found) == set(names)
    for name in names:
        np.testing.assert_allclose(found[name], expected[name].numpy(), **NEAR, err_msg=name)


def mean(states, names):
    return {
        name: torch.stack([state[name].double() for state in states]).mean(0).to(states[0][name].dtype)
        for name in names
    }


# Patterns, the pass over the head, and the names that stay.
HEAD = {"head.weight", "head.bias"}
NORM = {f"norm.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
METHODS = {
    "FedPer": (["head.*"], 0, HEAD),
    "FedRep": (["head.*"], 3, HEAD),
    "FedBN": (["norm"], 0, NORM),
}


@pytest.mark.parametrize("name", METHODS)
def test_layers_that_stay_train_as_in_pytorch(net, tmp_path, name):
    patterns, head_epochs, stays = METHODS[name]
    rounds = Rounds(tmp_path, personal(net, *patterns), sources(3))
    assert {tensor.name for tensor in rounds.bundle.kept.tensors} == stays
    reference = Reference(rounds)
    asked = plan(head_epochs=head_epochs)
    travels = [n for n in reference.state if n not in stays]
    own = [{n: reference.state[n] for n in stays}] * 3
    for _ in range(3):
        trained = []
        for client in range(3):
            seed = reference.seed(client, asked)
            state = reference.state | own[client]
            if head_epochs:
                state = reference.train(state, client, seed + 1, trained=["head"], epochs=head_epochs)
            state = reference.train(state, client, seed, trained=["body", "norm"] if head_epochs else None)
            own[client] = {n: state[n] for n in stays}
            trained.append(state)
        rounds.train(asked)
        reference.state = reference.state | mean(trained, travels)
        assert_equal(rounds.shared(), reference.state, travels)
        for client in range(3):
            assert_equal(kept_of(rounds, client), own[client], stays)
    assert not np.allclose(*(kept_of(rounds, client)[min(stays - {"norm.num_batches_tracked"})] for client in (0, 1)))


def test_ditto_trains_a_model_of_its_own_as_in_pytorch(net, tmp_path):
    rounds = Rounds(tmp_path, net, sources(3))
    reference = Reference(rounds)
    asked = plan(method="ditto", pull=0.7, epochs=3, own={"lr": 0.05})
    own = [reference.state] * 3
    for _ in range(3):
        trained = []
        for client in range(3):
            seed = reference.seed(client, asked)
            trained.append(reference.train(reference.state, client, seed))
            own[client] = reference.train(
                own[client], client, seed + 2, epochs=3, lam=0.7, anchor=reference.state, lr=0.05
            )
        rounds.train(asked)
        reference.state = reference.state | mean(trained, reference.state)
        assert_equal(rounds.shared(), reference.state, reference.state)
        for client, state in enumerate(own):
            found = remembered_model(rounds.bundle, rounds.workers[client].store.recall)
            views = rounds.bundle.trained.views(found.parameters) | rounds.bundle.tracked.views(found.buffers)
            assert_equal(views, state, state)


def test_the_proximal_term_pulls_at_what_is_shared_alone(net, tmp_path):
    rounds = Rounds(tmp_path, personal(net, "head.*"), sources(1))
    reference = Reference(rounds)
    asked = plan(hypers={"lr": 0.1, "momentum": 0.5, "weight_decay": 0.01, "mu": 2.0})
    seed, start = reference.seed(0, asked), reference.state
    state = reference.train(start, 0, seed, lam=2.0, anchor=start, pulled=["body", "norm"])
    rounds.train(asked)
    assert_equal(rounds.shared(), state, [n for n in start if not n.startswith("head")])
    assert_equal(kept_of(rounds, 0), state, HEAD)


def test_each_device_evaluates_what_it_has_for_itself_beside_the_model_of_all(net, tmp_path):
    rounds = Rounds(tmp_path, net, sources(2))
    asked = plan(method="ditto", pull=0.1, epochs=5)
    rounds.train(asked)
    found = rounds.evaluate(0, asked)
    own = remembered_model(rounds.bundle, rounds.workers[0].store.recall)
    assert own is not None
    expected = rounds.trainer.evaluate(own.parameters, rounds.workers[0].test, buffers=own.buffers)
    assert {n: found[f"personal.sum.{n}"] for n in expected} == pytest.approx(expected)
    shared = rounds.trainer.evaluate(
        rounds.model.parameters(rounds.bundle.initial()), rounds.workers[0].test, buffers=rounds.model.buffers
    )
    assert {n: found[f"sum.{n}"] for n in shared} == pytest.approx(shared)
    assert found["personal.sum.loss"] < 0.8 * found["sum.loss"]


def test_with_layers_that_stay_there_is_one_model_and_who_never_trained_has_the_bundles(net, tmp_path):
    rounds = Rounds(tmp_path, personal(net, "head.*"), sources(3))
    asked = plan()
    for client in (0, 1):
        rounds.ask(client, asked)
    for client in (0, 2):
        found = rounds.evaluate(client, asked)
        kept = remembered_layers(rounds.bundle, rounds.workers[client].store.recall)
        assert (kept is None) == (client == 2)
        own = OwnModel.joined(rounds.bundle, rounds.model, kept)
        expected = rounds.trainer.evaluate(own.parameters, rounds.workers[client].test, buffers=own.buffers)
        for word in ("", "personal."):
            assert {n: found[f"{word}sum.{n}"] for n in expected} == pytest.approx(expected)


def test_a_plain_federation_measures_one_model_and_keeps_nothing(net, tmp_path):
    rounds = Rounds(tmp_path, net, sources(1))
    rounds.train(plan())
    assert not any(name.startswith("personal") for name in rounds.evaluate(0, plan()))
    assert not list(tmp_path.glob("*/memory-*"))


@pytest.mark.parametrize("layers", [(), ("head.*",)])
def test_fine_tuning_trains_the_received_model_and_keeps_and_sends_nothing_of_it(net, tmp_path, layers):
    data = personal(net, *layers) if layers else net
    rounds, plain = Rounds(tmp_path / "tuned", data, sources(2)), Rounds(tmp_path / "plain", data, sources(2))
    asked = plan(method="fine-tune", epochs=3, own={"lr": 0.05})
    rounds.train(asked)
    plain.train(plan())
    assert rounds.model.digest() == plain.model.digest()
    found, other = rounds.evaluate(0, asked), plain.evaluate(0, plan())
    assert found["sum.loss"] == other["sum.loss"]
    reference = Reference(rounds)
    start = {n: torch.tensor(np.array(value)) for n, value in rounds.shared().items()}
    kept = {n: torch.tensor(np.array(value)) for n, value in (kept_of(rounds, 0) if layers else {}).items()}
    seed = rounds.workers[0]._seed(rounds.work(0, asked, "evaluate").invitation)
    reference.train(
        {n: (start | kept)[n].to(value.dtype) for n, value in reference.state.items()},
        0,
        seed + 2,
        epochs=3,
        trained=["head"] if layers else None,
        lr=0.05,
    )
    with torch.no_grad():
        rows = next(iter(rounds.workers[0].test.batches(99, seed=None)))
        loss = torch.nn.functional.cross_entropy(
            reference.module.eval()(torch.tensor(rows["x"])), torch.tensor(rows["y"])
        )
    assert found["personal.sum.loss"] / found["personal.sum.count"] == pytest.approx(loss.item(), rel=1e-5)
    assert loss.item() < 0.9 * found["sum.loss"] / found["sum.count"]
    assert {path.name.split("-")[1] for path in (tmp_path / "tuned").glob("*/memory-*")} == (
        {"layers"} if layers else set()
    )


def traces(values):
    """Bytes by which a tensor would be found in what is sent: pairs of its values."""
    flat = np.ascontiguousarray(values, "<f4").ravel()
    return [flat[i : i + 2].tobytes() for i in range(len(flat) - 1)]


def test_personal_layers_are_in_no_byte_that_leaves(net, tmp_path):
    rounds = Rounds(tmp_path, personal(net, "head.*", "norm"), sources(2))
    asked = plan(head_epochs=1)
    layouts = update_layouts(rounds.bundle.manifest)
    assert set(layouts) == {"delta"}
    assert {tensor.name for tensor in layouts["delta"].tensors} == {"body.weight", "body.bias"}
    start = OwnModel.joined(rounds.bundle, rounds.model).kept(rounds.bundle)
    for _ in range(2):
        for client in range(2):
            update, before = rounds.ask(client, asked), start
            kept = remembered_layers(rounds.bundle, rounds.workers[client].store.recall)
            sent = decode_update(update, layouts)
            assert set(sent.vectors) == {"delta"}
            for secret in (*traces(kept), *traces(kept - before)):
                assert secret not in update
            told = decode_scalars(rounds.ask(client, asked, "evaluate"))
            assert len(told) == 7  # samples, and twice loss, correct and count


def test_what_a_client_keeps_survives_a_restart_and_another_bundle_forgets_it(net, tmp_path):
    rounds = Rounds(tmp_path, personal(net, "head.*"), sources(1))
    rounds.train(plan())
    before = kept_of(rounds, 0)
    again = Store(tmp_path / "0")
    found = rounds.bundle.kept.views(remembered_layers(rounds.bundle, again.recall))
    for name, value in before.items():
        np.testing.assert_array_equal(found[name], value)
    again.install(bytes(32), b"another")
    assert again.recall(LAYERS) is None
    assert not list((tmp_path / "0").glob("memory-*"))


@pytest.mark.parametrize("fate", [True, False])
def test_what_a_client_keeps_does_not_depend_on_what_becomes_of_its_update(net, tmp_path, fate):
    rounds = Rounds(tmp_path, personal(net, "head.*"), sources(1))
    rounds.ask(0, plan())
    before = kept_of(rounds, 0)
    rounds.workers[0].store.settle(1, 1, recorded=fate)
    for name, value in kept_of(rounds, 0).items():
        np.testing.assert_array_equal(value, before[name])


def test_what_is_damaged_or_diverges_does_not_become_what_a_client_has(net, tmp_path):
    rounds = Rounds(tmp_path, personal(net, "head.*"), sources(1))
    rounds.train(plan())
    before = kept_of(rounds, 0)
    with np.errstate(all="ignore"):
        rounds.ask(0, plan(hypers={"lr": 1e30, "weight_decay": 1e30}))
    for name, value in kept_of(rounds, 0).items():
        np.testing.assert_array_equal(value, before[name])
    store = rounds.workers[0].store
    store.commit(1, 9, b"update", None, version=1, digest=rounds.model.digest(), keeps={LAYERS: b"\x01damaged"})
    assert remembered_layers(rounds.bundle, store.recall) is None
    rounds.ask(0, plan())
    assert kept_of(rounds, 0)


def test_a_federation_that_gives_ditto_up_frees_its_models(net, tmp_path):
    rounds = Rounds(tmp_path, net, sources(1))
    rounds.train(plan(method="ditto"))
    assert rounds.workers[0].store.recall(DITTO) is not None
    rounds.train(plan())
    assert rounds.workers[0].store.recall(DITTO) is None


SERVED = {
    "layers": (("head.*",), {}),
    "ditto": ((), {"method": "ditto", "pull": 0.1}),
    "fine-tune": ((), {"method": "fine-tune", "own": {"lr": 0.05}}),
}


@pytest.mark.parametrize("kind", SERVED)
def test_programs_of_a_device_find_its_own_model(net, tmp_path, kind):
    layers, fields = SERVED[kind]
    shelf = Shelf(tmp_path / "model", durable=False)
    rounds = Rounds(tmp_path, personal(net, *layers) if layers else net, sources(1), shelf)
    asked = plan(**fields)
    rounds.train(asked)
    model = Predictor.open(tmp_path / "model")
    assert (model.version, model.description.personal) == (0, kind)
    test = rounds.workers[0].test
    rows = next(iter(test.batches(99, seed=None)))
    first, bundle = model.predict(x=rows["x"])["logits"], rounds.bundle
    scalars = rounds.evaluate(0, asked)
    model = Predictor.open(tmp_path / "model")
    assert (model.version, model.description.personal) == (1, kind)
    logits = model.predict(x=rows["x"])["logits"]
    correct = (logits.argmax(1) == rows["y"]).sum()
    assert correct == scalars["personal.sum.correct"]
    loss = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(rows["y"]), reduction="sum")
    assert loss.item() == pytest.approx(scalars["personal.sum.loss"], rel=1e-5)
    assert Shelf(tmp_path / "model").tuned(bundle) == (kind == "fine-tune")
    assert (kind == "ditto") == np.allclose(first, logits)


def test_a_plain_model_says_that_it_is_the_one_of_all(net, tmp_path):
    shelf = Shelf(tmp_path / "model", durable=False)
    Rounds(tmp_path, net, sources(1), shelf).train(plan())
    assert Predictor.open(tmp_path / "model").description.personal == ""
    description = msgspec.json.decode((tmp_path / "model" / "current" / "model.json").read_bytes())
    assert description["personal"] == ""


BAD = {
    "typo": (["haed.*"], "'haed.*': it matches no parameter that is trained; expected a pattern of body.weight, "),
    "everything": (["*"], "leave nothing to share"),
    "one of several": (["head.*", "tail"], "'tail'"),
}


@pytest.mark.parametrize("name", BAD)
def test_patterns_that_cannot_be_are_refused_with_what_there_is(net, name):
    patterns, says = BAD[name]
    with pytest.raises(BundleError) as caught:
        personal(net, *patterns)
    assert says in str(caught.value)
    assert "head.bias" in str(caught.value)


def test_without_running_statistics_there_is_no_norm_and_what_is_frozen_cannot_stay(tmp_path):
    body, head = torch.nn.Linear(6, 8), torch.nn.Linear(8, 3)
    module = torch.nn.Sequential(body, torch.nn.LayerNorm(8), head)
    data = exported(tmp_path / "plain.fedge", module, freeze=["0.*"])
    with pytest.raises(BundleError, match="no layer keeps running statistics"):
        personal(data, "norm")
    with pytest.raises(BundleError, match=r"matches no parameter that is trained; expected a pattern of 1\.weight"):
        personal(data, "0.*")


def test_a_bundle_made_personal_at_export_or_by_the_server_has_the_same_bytes(net, tmp_path):
    made = exported(tmp_path / "head.fedge", personal=["head.*", "norm"])
    assert made == personal(net, "head.*", "norm") == personal(personal(net, "head.*"), "norm")
    bundle, plain = Bundle.from_bytes(made), Bundle.from_bytes(net)
    assert bundle.digest != plain.digest
    assert (bundle.train, bundle.eval, bundle.infer) == (plain.train, plain.eval, plain.infer)
    roles = {parameter.name: parameter.role for parameter in bundle.manifest.parameters}
    assert {name for name, role in roles.items() if role == "personal"} == HEAD | {"norm.weight", "norm.bias"}
    assert {name for name, role in roles.items() if role == "personal-buffer"} == NORM - {"norm.weight", "norm.bias"}


def career(folder, data, asked, came, trainer):
    """A client's tasks from where its store is, one number for each as it begins; ``came`` has what the server got."""
    bundle = trainer.bundle
    store = Store(folder, durable=False)
    source = ArraySource(toy_data(16, seed=1))
    client = Worker("pi", source, source, store, FileCopies(folder))
    if store.held().bundle == bytes(32):
        store.install(bytes.fromhex(bundle.digest), data)
    pending = store.held().pending
    if pending is not None:
        came.setdefault(pending.task, pending.update)
        store.settle(1, pending.task, recorded=True)
    model = untrained(bundle.layout, bundle.initial_buffers())
    for number in (1, 2):
        if number in came:
            continue
        update = m.UpdatePlan("none", feedback="none")
        invitation = m.Invitation(1, number, number, "train", asked, update, 5, 60.0, 0, 0, model.digest(), None)
        answer = client.perform(e.Work(invitation, None), trainer, lambda: False)
        assert isinstance(answer, e.Finished), answer
        came[number] = answer.update
        store.settle(1, number, recorded=True)


@pytest.mark.parametrize("method", ["layers", "ditto"])
def test_a_power_cut_at_any_file_operation_changes_no_bit_of_what_a_device_has_for_itself(tmp_path, method):
    plain = toy_bundle(hidden=4, proximal=True, buffer=True)
    data = personal(plain, "weight", "bias", "mean") if method == "layers" else plain
    trainer = Trainer(Bundle.from_bytes(data))
    own = {"head_epochs": 1} if method == "layers" else {"method": "ditto", "pull": 0.5}
    asked = m.TrainPlan(steps=1, batch_size=8, personal=m.PersonalPlan(**own))

    def run(name, cut):
        came, faults = {}, None
        with pytest.MonkeyPatch.context() as patch:
            faults = Faults(patch, cut)
            with contextlib.suppress(PowerCut):
                career(tmp_path / name, data, asked, came, trainer)
        career(tmp_path / name, data, asked, came, trainer)
        store = Store(tmp_path / name)
        # Seconds differ from run to run.
        deltas = [decode_update(came[n], update_layouts(trainer.bundle.manifest)).vectors for n in (1, 2)]
        return deltas, store.recall(method), faults.count

    deltas, kept, steps = run("whole", -1)
    assert steps > 14
    assert kept is not None
    for cut in range(steps):
        found, has, _ = run(str(cut), cut)
        assert has == kept, cut
        for one, other in zip(found, deltas, strict=True):
            assert {n: v.tobytes() for n, v in one.items()} == {n: v.tobytes() for n, v in other.items()}, cut


def test_dittos_models_stand_between_the_device_and_the_mean_as_worked_by_hand(tmp_path):
    """Device k has the loss (v - a_k)^2: its model comes to (2 a_k + lambda w) / (2 + lambda), and w to the mean."""
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(module.weight, 3.0)
    path = tmp_path / "line.fedge"
    export_bundle(module, path, name="line", inputs=[((1,), "float32")], loss="mse", optimizer="sgd", proximal=True)
    wanted = (-1.0, 3.0)
    ones = np.ones((4, 1), np.float32)
    rounds = Rounds(tmp_path, path.read_bytes(), [ArraySource({"x": ones, "y": a * ones}) for a in wanted])
    asked = plan(hypers={"lr": 0.2}, method="ditto", pull=2.0, epochs=8)
    for _ in range(14):
        rounds.train(asked)
    assert rounds.shared()["weight"].item() == pytest.approx(1.0, abs=1e-4)
    for client, a in enumerate(wanted):
        found = remembered_model(rounds.bundle, rounds.workers[client].store.recall)
        assert found is not None
        assert found.parameters.item() == pytest.approx((2 * a + 2.0 * 1.0) / 4, abs=1e-4)


@pytest.mark.parametrize("kind", SERVED)
def test_after_a_restart_a_device_still_serves_its_own_model(net, tmp_path, kind):
    layers, fields = SERVED[kind]
    shelf = Shelf(tmp_path / "model", durable=False)
    rounds = Rounds(tmp_path, personal(net, *layers) if layers else net, sources(1), shelf)
    asked = plan(**fields)
    for _ in range(2):
        rounds.train(asked)
    rows = next(iter(rounds.workers[0].test.batches(99, seed=None)))
    before = Predictor.open(tmp_path / "model").predict(x=rows["x"])["logits"]
    workshop, source = Workshop(), rounds.workers[0].train
    if kind != "fine-tune":
        shutil.rmtree(tmp_path / "model")
    Device(
        client="client-0",
        federation="nets",
        connect=lambda will: MemoryLink(MemoryBroker(), will=will),
        store=Store(tmp_path / "0", durable=False),
        copies=FileCopies(tmp_path / "0"),
        workshop=workshop,
        open_data=lambda manifest: (source, source),
        log=lambda line: None,
        shelf=Shelf(tmp_path / "model", durable=False),
    )
    workshop.close()
    model = Predictor.open(tmp_path / "model")
    assert (model.version, model.description.personal) == (1, kind)
    np.testing.assert_array_equal(model.predict(x=rows["x"])["logits"], before)
