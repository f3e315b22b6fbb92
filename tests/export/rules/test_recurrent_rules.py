"""Recurrent layers, each a Scan, against PyTorch's own."""

import time
import zipfile
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from export.bundle import export_bundle
from export.dropout import DropoutMode
from tests.export.autograd import assert_gradients

KINDS = {"lstm": nn.LSTM, "gru": nn.GRU, "tanh": nn.RNN, "relu": nn.RNN}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(7)


def network(kind: str, features: int = 3, hidden: int = 4, **options: Any) -> nn.Module:
    extra = {"nonlinearity": kind} if KINDS[kind] is nn.RNN else {}
    return KINDS[kind](features, hidden, **extra, **options)


def parameters(module: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in module.named_parameters()}


def assert_layer(module: nn.Module, steps: int, given: int = 0) -> set[str]:
    """All outputs and gradients, with ``given`` initial states."""
    count = module.num_layers * (2 if module.bidirectional else 1)
    first = module.batch_first

    def function(x: Tensor, *states: Tensor, **weights: Tensor) -> tuple[Tensor, ...]:
        start = tuple(s.transpose(0, 1) for s in states)
        args = (x if first else x.transpose(0, 1), *([start if given > 1 else start[0]] if given else []))
        output, last = torch.func.functional_call(module, weights, args)
        lasts = (last,) if isinstance(last, Tensor) else last
        return (output if first else output.transpose(0, 1), *(t.transpose(0, 1) for t in lasts))

    sizes = [getattr(module, "proj_size", 0) or module.hidden_size, module.hidden_size][:given]
    states = [torch.randn(3, count, size) for size in sizes]
    return assert_gradients(function, [torch.randn(3, steps, module.input_size), *states], parameters(module))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_one_layer(kind: str, steps: int) -> None:
    assert "Scan" in assert_layer(network(kind, batch_first=True), steps)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_in_both_directions_with_initial_states(kind: str) -> None:
    assert_layer(network(kind, num_layers=2, bidirectional=True), 3, 2 if kind == "lstm" else 1)


@pytest.mark.parametrize("kind", KINDS)
def test_no_biases(kind: str) -> None:
    assert_layer(network(kind, bias=False, num_layers=2), 3)


def test_projected_lstm() -> None:
    assert_layer(nn.LSTM(3, 5, proj_size=2, num_layers=2, bidirectional=True, batch_first=True), 3, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_between_layers(kind: str) -> None:
    module = network(kind, num_layers=3, dropout=0.4, batch_first=True)

    def function(x: Tensor, seed: Tensor, step: Tensor, **weights: Tensor) -> Tensor:
        with DropoutMode(seed, step):
            result: Tensor = torch.func.functional_call(module, weights, (x,))[0]
        return result

    fixed = {"seed": torch.tensor(3), "step": torch.tensor(5)} | parameters(module)
    assert_gradients(function, [torch.randn(3, 4, 3)], fixed)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_only_the_last_state_is_used(kind: str) -> None:
    module = network(kind, batch_first=True)

    def function(x: Tensor, **weights: Tensor) -> Tensor:
        last = torch.func.functional_call(module, weights, (x,))[1]
        result: Tensor = last[1][0] if kind == "lstm" else last[0]
        return result

    assert_gradients(function, [torch.randn(3, 4, 3)], parameters(module))


@pytest.mark.parametrize("cell", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
@pytest.mark.parametrize("bias", [True, False])
def test_cells_in_a_loop_of_the_model(cell: type[nn.Module], bias: bool) -> None:
    module = cell(3, 4, bias=bias)

    def function(x: Tensor, **weights: Tensor) -> Tensor:
        state: Any = None
        for t in range(x.shape[1]):
            state = torch.func.functional_call(module, weights, (x[:, t], *([state] if t else [])))
        result: Tensor = state if isinstance(state, Tensor) else state[0]
        return result

    assert_gradients(function, [torch.randn(3, 3, 3)], parameters(module))


class Sequence(nn.Module):
    def __init__(self, recurrent: nn.Module, outputs: int) -> None:
        super().__init__()
        self.recurrent = recurrent
        self.head = nn.Linear(outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.recurrent(x)[0][:, -1])
        return logits


def test_export_of_two_layers_in_both_directions(tmp_path: Path) -> None:
    module = Sequence(nn.LSTM(4, 6, num_layers=2, bidirectional=True, batch_first=True), 12)
    export_bundle(module, tmp_path / "s.fedge", name="s", inputs=[((8, 4), "float32")], optimizer="momentum")


def test_export_of_a_long_sequence_is_fast_and_small(tmp_path: Path) -> None:
    module, began = Sequence(nn.GRU(6, 16, batch_first=True), 16), time.process_time()
    report = export_bundle(module, tmp_path / "l.fedge", name="l", inputs=[((200, 6), "float32")])
    # Of processor time, which a busy machine does not stretch.
    assert time.process_time() - began < 10
    with zipfile.ZipFile(report.path) as archive:
        graph = onnx.load_from_string(archive.read("infer.onnx")).graph
    loop = next(node for node in graph.node if node.op_type == "Scan")
    assert len(loop.output) == 2, "what only gradients need is kept without any"
    assert report.sizes["train.onnx"] < 100_000
