"""The two halves meet: a model exported from PyTorch, trained here, goes where PyTorch takes it."""

from collections import OrderedDict

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

from edge_client.bundle import Bundle
from edge_client.data import ArraySource
from edge_client.trainer import Trainer, _epoch_seed
from edge_client.wire.messages import TrainPlan
from export.bundle import export_bundle
from export.models.digits import digits_cnn

PLAN = TrainPlan(epochs=2, batch_size=32, hypers={"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3, "mu": 0.5})


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("bundle") / "digits.fedge"
    inputs = [((1, 8, 8), "float32")]
    export_bundle(digits_cnn(), path, name="digits", inputs=inputs, optimizer="momentum", proximal=True, scale=1 / 16)
    return Bundle.open(path)


@pytest.fixture(scope="module")
def source():
    digits = load_digits()
    return ArraySource({"x": digits.images[:210, None].astype(np.uint8), "y": digits.target[:210]})


def module_of(bundle, vector):
    views = bundle.layout.views(vector)
    module = digits_cnn()
    module.load_state_dict(OrderedDict((name, torch.tensor(view)) for name, view in views.items()))
    return module


def test_the_digits_cnn_trains_as_in_pytorch(bundle, source):
    result = Trainer(bundle).train(bundle.initial(), source, PLAN, seed=4)
    module = module_of(bundle, bundle.initial())
    anchor = [p.detach().clone() for p in module.parameters()]
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    for epoch in range(2):
        losses = []
        for batch in source.batches(32, seed=_epoch_seed(4, epoch)):
            x, y = torch.tensor(batch["x"]).float() / 16, torch.tensor(batch["y"])
            optimizer.zero_grad()
            loss = F.cross_entropy(module(x), y)
            losses.append(loss.item() * len(y))
            near = sum(((p - a) ** 2).sum() for p, a in zip(module.parameters(), anchor, strict=True))
            (loss + 0.5 / 2 * near).backward()
            optimizer.step()
    expected = bundle.layout.flatten({name: p.detach().numpy() for name, p in module.named_parameters()})
    moved = np.linalg.norm(expected - bundle.initial())
    assert np.linalg.norm(result.local - expected) < 1e-4 * moved
    assert result.loss == pytest.approx(sum(losses) / 210, rel=1e-4)


def test_evaluation_agrees_with_pytorch(bundle, source):
    sums = Trainer(bundle).evaluate(bundle.initial(), source, batch_size=64)
    with torch.no_grad():
        logits = module_of(bundle, bundle.initial())(torch.tensor(source.arrays["x"]).float() / 16)
    y = torch.tensor(source.arrays["y"])
    assert sums["count"] == 210
    assert sums["correct"] == (logits.argmax(1) == y).sum().item()
    assert sums["loss"] == pytest.approx(F.cross_entropy(logits, y, reduction="sum").item(), rel=1e-5)
