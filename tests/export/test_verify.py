"""What verification catches: every way of being wrong that a few examples, or NaN, could hide."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edge_client.errors import ExportError
from edge_client.manifest import Feature
from export import training, verify
from export.bundle import RULES, export_bundle
from export.lower import Lowering, Value
from export.step import TOTAL, Problem

VECTOR = [((6,), "float32")]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def spoiled(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Let the training graph's results be changed by ``change(outputs, rows)``."""
    made = verify._runner

    def runner(*arguments: Any) -> verify.Run:
        run = made(*arguments)

        def changed(feeds: Any) -> verify.Arrays:
            outputs = run(feeds)
            return change(outputs, len(feeds["x"])) if any(name.startswith("next.") for name in outputs) else outputs

        return changed

    monkeypatch.setattr(verify, "_runner", runner)


def times(factor: float, outputs: verify.Arrays) -> verify.Arrays:
    return {n: a * np.float32(factor) if n.startswith("next.") else a for n, a in outputs.items()}


def test_nan_is_no_agreement(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spoiled(monkeypatch, lambda outputs, rows: times(np.nan, outputs))
    with pytest.raises(ExportError, match="disagrees"):
        export_bundle(net(), tmp_path / "n.fedge", name="n", inputs=VECTOR)


def test_what_is_wrong_for_larger_batches_only_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spoiled(monkeypatch, lambda outputs, rows: times(1.5 if rows > 2 else 1, outputs))
    with pytest.raises(ExportError, match="whole batch"):
        export_bundle(net(), tmp_path / "n.fedge", name="n", inputs=VECTOR)


def test_gradients_of_earlier_slices_are_missed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = training.slice_step

    def forgetful(problem: Problem) -> Any:
        function, fixed = made(problem)
        kept = f"{TOTAL}grad."

        def forgets(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return function({n: t * 0 if n.startswith(kept) else t for n, t in tensors.items()})

        return forgets, fixed

    monkeypatch.setattr(training, "slice_step", forgetful)
    with pytest.raises(ExportError, match="disagrees"):
        export_bundle(net(), tmp_path / "n.fedge", name="n", inputs=VECTOR, micro_batch=8)


def test_slices_of_one_row_are_left_to_pytorch_where_it_refuses_them(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    for rows in (2, 3, 6):
        export_bundle(module, tmp_path / f"{rows}.fedge", name="n", inputs=VECTOR, micro_batch=rows)


class Siamese(nn.Module):
    """One recurrent layer on two halves of the input."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer, self.head = kind(3, 4, batch_first=True), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        first, second = (self.layer(part)[0][:, -1] for part in x.chunk(2, 1))
        result: Tensor = self.head(torch.cat([first, second], 1))
        return result


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_recurrent_layer_may_be_used_twice(kind: type[nn.RNNBase], tmp_path: Path) -> None:
    export_bundle(Siamese(kind), tmp_path / "n.fedge", name="n", inputs=[((6, 3), "float32")])


def test_integer_sums_over_a_convolution(tmp_path: Path) -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        active = (outputs > 0).sum((0, 2, 3)).detach()
        return ((outputs.mean((2, 3)) - targets) ** 2 * (active > 0)).mean()

    targets = [Feature("t", (4,), "float32")]
    module = nn.Conv2d(2, 4, 3)
    inputs = [((2, 6, 6), "float32")]
    export_bundle(module, tmp_path / "n.fedge", name="n", inputs=inputs, loss=loss, targets=targets)


def test_evaluation_is_compared_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def wrong(b: Lowering, out: Value, x: Value) -> str:
        return b.op("Tanh", b.op("Mul", x.name, b.scalar(1.001, "float32")))

    with pytest.raises(ExportError, match="disagrees"):
        export_bundle(net(), tmp_path / "n.fedge", name="n", inputs=VECTOR, rules={**RULES, "aten.tanh": wrong})
