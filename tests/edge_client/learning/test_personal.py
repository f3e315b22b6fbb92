"""Personal layers, Ditto and fine-tuning against PyTorch; what stays on the device stays there, through power cuts."""

import msgspec
import numpy as np
import pytest
import torch

from edge_client.bundle import Bundle
from edge_client.codec.update import decode_scalars, decode_update
from edge_client.errors import BundleError
from edge_client.learning.own import DITTO, LAYERS, OwnModel, remembered_layers, remembered_model
from edge_client.manifest import update_layouts
from edge_client.predict import Model as Predictor
from edge_client.shelf import Shelf
from edge_client.store import Store
from tests.edge_client.learning.rounds import Reference, Rounds, exported, personal, plan, sources

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


def is_number(name):
    return not name.endswith("num_batches_tracked")


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
