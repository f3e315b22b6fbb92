"""Small random networks of covered layers train as in PyTorch; FEDGE_EXAMPLES=500 draws as many, anew each time."""

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, note, settings
from torch import Tensor
from torch.nn import functional as F

from export.bundle import export_bundle
from tests.export.networks import Recipe, recipes
from tests.export.training import assert_trains_as_pytorch, gathered

EXAMPLES = int(os.environ.get("FEDGE_EXAMPLES", "0"))


def loss_of(recipe: Recipe) -> Any:
    def function(outputs: Tensor, targets: Tensor) -> Tensor:
        if recipe.loss == "cross_entropy":
            return gathered(outputs, targets, **recipe.loss_options)
        if recipe.loss == "nll":
            return F.nll_loss(outputs.flatten(0, -2), targets.flatten())
        named = {
            "mse": F.mse_loss, "l1": F.l1_loss, "huber": F.huber_loss,
            "bce_with_logits": F.binary_cross_entropy_with_logits,
        }[recipe.loss]  # fmt: skip
        found: Tensor = named(outputs, targets, **recipe.loss_options)
        return found

    return function


def drawn(recipe: Recipe, seed: int) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    size = (recipe.batch, *recipe.shape)
    x = generator.integers(0, recipe.tokens, size) if recipe.kind == "tokens" else generator.standard_normal(size)
    x = x if recipe.kind == "tokens" else x.astype(np.float32)
    with torch.no_grad():
        shape = recipe.make().eval()(torch.tensor(x)).shape
    if recipe.loss in ("cross_entropy", "nll"):
        return {"x": x, "y": generator.integers(0, shape[-1], shape[:-1])}
    values = generator.integers(0, 2, shape) if recipe.loss == "bce_with_logits" else generator.standard_normal(shape)
    return {"x": x, "y": values.astype(np.float32)}


def check(recipe: Recipe) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "r.fedge"
        kind = "int64" if recipe.kind == "tokens" else "float32"
        export_bundle(
            recipe.make(), path, name="r", inputs=[(recipe.shape, kind)], loss=recipe.loss,
            loss_options=recipe.loss_options, **recipe.training,
        )  # fmt: skip
        assert_trains_as_pytorch(recipe.make, path, lambda seed: drawn(recipe, seed), loss_of(recipe))


@settings(
    max_examples=EXAMPLES or 20,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    phases=(Phase.generate,) if not EXAMPLES else (Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False,
)
@given(recipe=recipes())
def test_a_random_network_trains_as_in_pytorch(recipe: Recipe) -> None:
    note(str(recipe.make()))
    check(recipe)
