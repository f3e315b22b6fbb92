"""Micro batches and memory budgets: the steps stay what they were, and the runtime keeps to the plan."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from edge_client.bundle import Bundle
from edge_client.errors import ExportError
from export.bundle import Report, export_bundle
from export.cli import export
from export.graph import Node
from export.memory import execution_order, format_size, parse_size
from tests.export.live import live_peak, profiled
from tests.export.loaded import graph_of, session_of

Arrays = dict[str, np.ndarray[Any, Any]]


class Encoder(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.layers = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 2, 64, dropout, batch_first=True), 1, enable_nested_tensor=False
        )
        self.head = nn.Linear(16, 11)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.layers(self.embed(x)))
        return result


def convolutions(norm: Callable[[int], nn.Module] = lambda _: nn.Identity()) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), norm(8), nn.Sigmoid(), nn.Conv2d(8, 8, 3, padding=1), norm(8), nn.Sigmoid(),
        nn.Conv2d(8, 8, 3, padding=1), norm(8), nn.Sigmoid(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(32, 4),
    )  # fmt: skip


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    codes: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)


CASES = {
    "convolutions": Case(convolutions, (2, 8, 8)),
    "normalised": Case(lambda: convolutions(nn.BatchNorm2d), (2, 8, 8)),
    "transformer": Case(Encoder, (12,), 11),
    "recurrent": Case(lambda: nn.Sequential(nn.Embedding(7, 8), Last(nn.GRU(8, 8, batch_first=True))), (5,), 7),
    "momentum": Case(
        lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)),
        (6,),
        options={"optimizer": "momentum", "clip": 0.3, "weight_decay": 0.01},
    ),
    "weighted": Case(
        lambda: nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 4)),
        (3,),
        9,
        {"loss_options": {"weight": [1.0, 3.0, 0.5, 2.0], "ignore_index": 1, "label_smoothing": 0.1}},
    ),
    "regression": Case(
        lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)),
        (6,),
        options={"loss": "huber", "optimizer": "adam"},
    ),
}


class Last(nn.Module):
    def __init__(self, inner: nn.GRU) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x)[0][:, -1]
        return result


def exported(case: Case, folder: Path, **options: Any) -> Report:
    torch.manual_seed(0)
    inputs = [(case.shape, "int64" if case.codes else "float32")]
    path = folder / f"{len(list(folder.iterdir()))}.fedge"
    return export_bundle(case.make(), path, name="m", inputs=inputs, **case.options, **options)


def batch_for(report: Report, case: Case, rows: int) -> Arrays:
    rng = np.random.default_rng(rows)
    (x,), (y,) = report.manifest.inputs, report.manifest.targets
    shape = (rows, *x.shape)
    given = rng.integers(0, case.codes, shape) if case.codes else rng.standard_normal(shape, np.float32)
    wanted = rng.integers(0, 4, (rows, *y.shape))
    return {"x": given, "y": wanted if y.dtype == "int64" else wanted.astype(np.float32)}


def feeds_of(report: Report, batch: Arrays, number: int = 1) -> Arrays:
    weights = Bundle.open(report.path).weights
    feeds: Arrays = {f"param.{p.name}": np.array(weights[p.name]) for p in report.manifest.parameters}
    feeds |= {f"hyper.{h.name}": np.array(h.default, np.float32) for h in report.manifest.hypers}
    for slot in report.manifest.optimizer.slots:
        feeds |= {
            f"slot.{slot}.{p.name}": np.zeros(p.shape, np.float32)
            for p in report.manifest.parameters
            if p.role == "trainable"
        }
    return feeds | batch | {"step": np.array(number), "seed": np.array(3)}


def three_steps(report: Report, batch: Arrays) -> Arrays:
    session = session_of(report.path, "train")
    inputs = [value.name for value in session.get_inputs()]
    names = [value.name for value in session.get_outputs()]
    feeds = feeds_of(report, batch)
    made: Arrays = {}
    for number in (1, 2, 3):
        feeds["step"] = np.array(number)
        results = dict(zip(names, session.run(names, {n: feeds[n] for n in inputs}), strict=True))
        made |= {f"{name} after step {number}": value for name, value in results.items()}
        for name, value in results.items():
            rest = name.removeprefix("next.")
            for key in (f"param.{rest}", f"slot.{rest}"):
                if name != rest and key in feeds:
                    feeds[key] = value
    return made


def assert_same_steps(one: Report, other: Report, batch: Arrays) -> None:
    first, second = three_steps(one, batch), three_steps(other, batch)
    assert first.keys() == second.keys()
    for name, value in first.items():
        scale = max(float(np.abs(value).max(initial=0)), 1e-2)
        np.testing.assert_allclose(second[name], value, rtol=0, atol=2e-5 * scale, err_msg=name)


@pytest.mark.parametrize("name", [name for name in CASES if name != "normalised"])
def test_slices_of_a_batch_make_the_step_of_the_whole_batch(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    plain, sliced = exported(case, tmp_path), exported(case, tmp_path, micro_batch=8)
    assert "Loop" in {node.op_type for node in graph_of(sliced.path, "train").graph.node}
    assert (plain.memory.rows, sliced.memory.rows) == (None, 8)
    for rows in (1, 7, 8, 32, 33):
        assert_same_steps(plain, sliced, batch_for(plain, case, rows))


def test_a_batch_that_is_ignored_altogether_changes_nothing(tmp_path: Path) -> None:
    case = CASES["weighted"]
    report = exported(case, tmp_path, micro_batch=2)
    batch = batch_for(report, case, 5)
    made = three_steps(report, batch | {"y": np.ones_like(batch["y"])})
    assert made["loss after step 3"] == 0
    start = Bundle.open(report.path).weights
    for parameter in report.manifest.parameters:
        np.testing.assert_array_equal(made[f"next.{parameter.name} after step 3"], start[parameter.name])


def test_running_statistics_advance_slice_by_slice(tmp_path: Path) -> None:
    case = CASES["normalised"]
    report = exported(case, tmp_path, micro_batch=8)
    batch = batch_for(report, case, 20)
    made = three_steps(report, batch)
    assert made["next.1.num_batches_tracked after step 1"] == 3
    torch.manual_seed(0)
    module = case.make().train()
    for start in (0, 8, 16):
        module(torch.from_numpy(batch["x"][start : start + 8]))
    for name, buffer in module.named_buffers():
        np.testing.assert_allclose(made[f"next.{name} after step 1"], buffer.numpy(), rtol=1e-4, atol=1e-6)


def test_dropout_has_another_mask_in_every_slice(tmp_path: Path) -> None:
    # The slices hold the same rows: with one mask for all of them, their sum would be that of one.
    case = Case(lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 4, bias=False)), (64,))
    report = exported(case, tmp_path, micro_batch=1, lr=1.0)
    row = {"x": np.ones((1, 64), np.float32), "y": np.zeros(1, np.int64)}
    once = three_steps(report, row)
    twice = three_steps(report, {name: np.repeat(value, 2, 0) for name, value in row.items()})
    start = Bundle.open(report.path).weights["1.weight"]
    moved = [made["next.1.weight after step 1"] - start != 0 for made in (once, twice)]
    assert moved[0].sum() < moved[1].sum() < start.size


@pytest.mark.parametrize("name", ["convolutions", "normalised", "transformer"])
def test_values_are_computed_again_to_fit_a_budget(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    plain = exported(case, tmp_path)
    budget = plain.memory.peak * 3 // 4
    # A micro batch as large as the batch leaves nothing but recomputation; a normalised batch is not cut unasked.
    again = exported(case, tmp_path, memory_budget=budget, micro_batch=None if name == "normalised" else 32)
    assert again.memory.copies > 0
    assert again.memory.peak <= budget
    assert again.memory.rows == (None if name == "normalised" else 32)
    for rows in (2, 7, 32):
        assert_same_steps(plain, again, batch_for(plain, case, rows))


def test_the_runtime_keeps_to_the_plan(tmp_path: Path) -> None:
    case = CASES["normalised"]
    plain = exported(case, tmp_path)
    again = exported(case, tmp_path, memory_budget=plain.memory.peak * 6 // 10)
    peaks = []
    for report in (plain, again):
        model = Bundle.open(report.path).train
        peaks.append(live_peak(model, feeds_of(report, batch_for(report, case, 32)), tmp_path))
        assert 0.75 * report.memory.peak < peaks[-1] <= 1.1 * report.memory.peak
    assert peaks[1] < 0.75 * peaks[0]


def test_nodes_run_in_the_order_that_is_planned_with(tmp_path: Path) -> None:
    case = CASES["transformer"]
    report = exported(case, tmp_path)
    model = graph_of(report.path, "train")
    feeds = feeds_of(report, batch_for(report, case, 3))
    _, events = profiled(model.SerializeToString(), feeds, tmp_path, optimized=False)
    nodes = [Node(node.op_type, list(node.input), list(node.output)) for node in model.graph.node]
    names = {id(node): proto.name for node, proto in zip(nodes, model.graph.node, strict=True)}
    ran = [event["name"].removesuffix("_kernel_time") for event in events]
    assert [names[id(node)] for node in execution_order(nodes)] == ran


def test_slices_come_first_where_rows_are_separate(tmp_path: Path) -> None:
    case = CASES["transformer"]
    plain = exported(case, tmp_path)
    fitted = exported(case, tmp_path, memory_budget=plain.memory.peak // 2)
    assert (fitted.memory.rows or 32) < 32
    assert fitted.memory.copies == 0
    assert fitted.memory.peak <= plain.memory.peak // 2
    assert_same_steps(plain, fitted, batch_for(plain, case, 32))


def test_a_budget_that_nothing_keeps_is_refused_with_the_least_that_can_be(tmp_path: Path) -> None:
    case = CASES["momentum"]
    with pytest.raises(ExportError, match=r"budget is 0\.2KiB; a step at batch 32 needs at least") as refused:
        exported(case, tmp_path, memory_budget=200)
    least = parse_size(str(refused.value).partition("at least ")[2].partition(",")[0])
    assert exported(case, tmp_path, memory_budget=least).memory.peak <= least
    with pytest.raises(ExportError, match="micro_batch is 0"):
        exported(case, tmp_path, micro_batch=0)


@pytest.mark.parametrize(
    ("text", "size"),
    [("64MiB", 64 * 2**20), ("64MB", 64 * 10**6), ("65536", 65536), ("1.5 GiB", 3 * 2**29), ("16KiB", 2**14)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "64 MiBs", "-1MiB", "0", "many", "1e3", "64M", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ExportError, match="is not a size"):
        parse_size(text)


def test_sizes_are_written_as_they_are_read() -> None:
    assert format_size(3 * 2**19) == "1.5MiB"
    assert parse_size(format_size(1234567, up=True)) >= 1234567


def test_the_command_says_what_a_step_needs(tmp_path: Path) -> None:
    words = ["export.models.logistic:logistic_regression", "--input", "1,28,28", "-o", str(tmp_path / "d.fedge")]
    output = CliRunner().invoke(export, [*words, "--micro-batch", "8"], catch_exceptions=False).output
    assert "in slices of 8 rows" in output
    with pytest.raises(ExportError, match="is not a size"):
        CliRunner().invoke(export, [*words, "--memory-budget", "large"], catch_exceptions=False)
