"""Whole exports: shipped models, losses, optimizers, roles, and what goes wrong."""

import hashlib
import math
import re
import zipfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from edge_client.errors import ExportError
from edge_client.manifest import Feature, Manifest
from export.bundle import RULES, export_bundle
from export.lower import Lowering, Value
from export.models.digits import digits_cnn
from export.models.shakespeare import char_gru
from export.report import Report
from tests.export.loaded import graph_of, session_of


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(7)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Report:
    torch.manual_seed(7)
    path = tmp_path_factory.mktemp("digits") / "digits.fedge"
    return export_bundle(
        digits_cnn(),
        path,
        name="digits",
        inputs=[((1, 8, 8), "float32")],
        scale=0.0625,
        labels=[str(i) for i in range(10)],
        proximal=True,
        optimizer="momentum",
    )


def read(report: Report) -> dict[str, bytes]:
    with zipfile.ZipFile(report.path) as archive:
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
        return {name: archive.read(name) for name in archive.namelist()}


def test_bundle_holds_what_its_manifest_says(digits: Report) -> None:
    members = read(digits)
    manifest = msgspec.json.decode(members.pop("manifest.json"), type=Manifest)
    assert manifest == digits.manifest
    assert manifest.files == {name: hashlib.sha256(data).hexdigest() for name, data in members.items()}
    assert manifest.inputs == (Feature("x", (1, 8, 8), "float32", scale=0.0625),)
    assert manifest.targets[0].name == "y"
    assert manifest.targets[0].labels == tuple("0123456789")
    assert manifest.outputs[0].name == "logits"
    assert manifest.outputs[0].shape == (10,)
    assert {h.name for h in manifest.hypers} == {"lr", "momentum", "weight_decay", "mu"}
    assert digits.parity.worst_relative_error <= digits.parity.tolerance
    assert digits.parity.cases == 12


def test_equal_exports_give_equal_bytes(tmp_path: Path) -> None:
    made = []
    for name in ("a", "b"):
        torch.manual_seed(3)
        module = nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))
        report = export_bundle(module, tmp_path / f"{name}.fedge", name="m", inputs=[((2, 4, 4), "float32")])
        assert not report.tuned
        assert [one.milliseconds for one in report.convolutions] == [{}]
        made.append(report.path.read_bytes())
    assert made[0] == made[1]


def test_graphs_are_plain_onnx_under_the_contract_names(digits: Report) -> None:
    members, names = read(digits), [p.name for p in digits.manifest.parameters]
    for kind in ("train", "eval", "infer"):
        model = graph_of(digits.path, kind)
        assert [opset.domain for opset in model.opset_import] == [""]
        assert all(node.domain == "" for node in model.graph.node)
        stored = onnx.load_from_string(members[f"{kind}.onnx"]).graph
        external = {i.name: [(e.key, e.value) for e in i.external_data] for i in stored.initializer if i.external_data}
        assert set(external) == ({f"param.{n}" for n in names} if kind != "train" else set())
        assert all(where == [("location", "fedge")] for where in external.values())
    train = onnx.load_from_string(members["train.onnx"]).graph
    kinds = ("param", "anchor", "slot.momentum")
    hypers = {f"hyper.{h.name}" for h in digits.manifest.hypers}
    assert {i.name for i in train.input} == {f"{k}.{n}" for k in kinds for n in names} | hypers | {"x", "y"}
    nexts = {f"next.{n}" for n in names} | {f"next.momentum.{n}" for n in names}
    assert {o.name for o in train.output} == nexts | {"loss", "sum.correct", "sum.count"}
    sizes = {i.name: i.type.tensor_type.shape.dim for i in train.input}
    assert sizes["x"][0].dim_param == sizes["y"][0].dim_param == "batch"
    outputs = {o.name for o in onnx.load_from_string(members["eval.onnx"]).graph.output}
    assert outputs == {"sum.loss", "sum.count", "sum.correct"}


def test_character_model(tmp_path: Path) -> None:
    module = char_gru(vocabulary=20, hidden=16)
    report = export_bundle(module, tmp_path / "g.fedge", name="g", inputs=[((5,), "int64")], optimizer="momentum")
    assert report.manifest.targets == (Feature("y", (5,), "int64"),)
    assert report.manifest.outputs[0].shape == (5, 20)


class Everything(nn.Module):
    """Strides, odd sizes, overlapping pooling, depthwise, normalisation: what has a rule and is in no shipped model."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(8, 8, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 4)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.gelu(self.first(x))
        x = nn.functional.relu_(self.depthwise(x)) + x
        x = nn.functional.avg_pool2d(self.up(self.pool(x)), 2)
        x = self.norm(x.flatten(2).mean(-1))
        logits: Tensor = self.head(torch.tanh(x) * torch.sigmoid(x))
        return logits


def test_layers_beyond_the_shipped_models(tmp_path: Path) -> None:
    export_bundle(Everything(), tmp_path / "e.fedge", name="e", inputs=[((3, 15, 13), "float32")])


@pytest.mark.parametrize("pool", [(2, 2), (3, 3), (2, 3)])
def test_pooling_of_odd_sizes(pool: tuple[int, int], tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(1, 6, 3), nn.MaxPool2d(pool), nn.Flatten(), nn.LazyLinear(3))
    module(torch.zeros(1, 1, 9, 11))
    export_bundle(module, tmp_path / "p.fedge", name="p", inputs=[((1, 9, 11), "float32")])


@pytest.mark.parametrize(
    ("loss", "metrics"),
    [("bce_with_logits", ("correct",)), ("mse", ("squared_error", "absolute_error"))],
)
def test_losses(loss: str, metrics: tuple[str, ...], tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))
    report = export_bundle(module, tmp_path / "l.fedge", name="l", inputs=[((5,), "float32")], loss=loss)
    assert report.manifest.metrics == metrics
    assert report.manifest.targets == (Feature("y", (2,), "float32"),)


def test_binary_cross_entropy_has_its_gradient_where_logits_are_zero(tmp_path: Path) -> None:
    module = nn.Linear(4, 1)
    nn.init.zeros_(module.weight)
    nn.init.zeros_(module.bias)
    export_bundle(module, tmp_path / "z.fedge", name="z", inputs=[((4,), "float32")], loss="bce_with_logits")


def test_callable_loss(tmp_path: Path) -> None:
    def weighted(outputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        return (((outputs.squeeze(-1) - targets) ** 2) * weights).mean()

    targets = [Feature("price", (), "float32"), Feature("weight", (), "float32")]
    report = export_bundle(
        nn.Linear(3, 1), tmp_path / "c.fedge", name="c", inputs=[((3,), "float32")], loss=weighted, targets=targets
    )
    assert report.manifest.loss == "weighted"
    with pytest.raises(ExportError, match="targets="):
        export_bundle(nn.Linear(3, 1), tmp_path / "d.fedge", name="c", inputs=[((3,), "float32")], loss=weighted)


def test_frozen_parameters_and_buffers_do_not_train(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    module[0].requires_grad_(False)
    module.register_buffer("kept", torch.ones(1))
    report = export_bundle(module, tmp_path / "f.fedge", name="f", inputs=[((4,), "float32")])
    roles = {p.name: p.role for p in report.manifest.parameters}
    assert roles == {
        "2.weight": "trainable", "2.bias": "trainable", "0.weight": "frozen", "0.bias": "frozen", "kept": "frozen"
    }  # fmt: skip
    session = session_of(report.path, "train")
    assert not {"param.0.weight", "param.kept"} & {i.name for i in session.get_inputs()}
    assert not {"next.0.weight", "next.kept"} & {o.name for o in session.get_outputs()}


def test_evaluation_sums_over_batches_of_any_size(digits: Report) -> None:
    session = session_of(digits.path, "eval")
    rng = np.random.default_rng(0)
    x, y = rng.random((10, 1, 8, 8), np.float32), rng.integers(0, 10, 10)
    whole = session.run(["sum.loss", "sum.count"], {"x": x, "y": y})
    parts = [session.run(["sum.loss", "sum.count"], {"x": x[s], "y": y[s]}) for s in (slice(3), slice(3, 10))]
    np.testing.assert_allclose(whole, np.sum(parts, axis=0), rtol=1e-5)
    assert whole[1] == 10


def test_a_wrong_gradient_rule_is_caught_and_nothing_is_written(tmp_path: Path) -> None:
    def wrong(b: Lowering, out: Value, grad: Value, result: Value, threshold: float) -> str:
        return grad.name

    module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(ExportError, match=r"disagrees with PyTorch.*nothing was written"):
        export_bundle(
            module,
            tmp_path / "w.fedge",
            name="w",
            inputs=[((6,), "float32")],
            rules={**RULES, "aten.threshold_backward": wrong},
        )
    assert list(tmp_path.iterdir()) == []


def test_ties_in_pooling_go_to_the_first_maximum(tmp_path: Path) -> None:
    def every_maximum(b: Lowering, out: Value, grad: Value, x: Value, *_: object) -> str:
        up = b.constant(np.array([1, 1, 2, 2], np.float32))
        top = b.op("Resize", b.op("MaxPool", x.name, kernel_shape=[2, 2], strides=[2, 2]), "", up, mode="nearest")
        spread = b.op("Resize", grad.name, "", up, mode="nearest")
        return b.op("Mul", spread, b.cast(b.op("Equal", x.name, top), "bool", x.dtype))

    module = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 3))
    rules = {**RULES, "aten.max_pool2d_with_indices_backward": every_maximum}
    with pytest.raises(ExportError, match=r"(zero|constant|rounded) inputs"):
        export_bundle(module, tmp_path / "t.fedge", name="t", inputs=[((1, 8, 8), "float32")], rules=rules)


class Unsupported(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), Sorted())

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.body(x)
        return result


class Sorted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.logcumsumexp(x, 1)


class FixedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x if x.sum() > 0 else -x)
        return result


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (
            Unsupported(),
            {},
            r"module 'body.1' uses aten.logcumsumexp, which has no rule; the nearest .* torch.logsumexp",
        ),
        (FixedBatch(), {}, r"module 'FixedBatch' cannot be traced"),
        (nn.Linear(5, 2), {}, r"Linear does not take inputs float32 \[N, 4\]"),
        (
            nn.Linear(4, 2),
            {"loss": "hinge"},
            r"loss 'hinge' is unknown; use one of bce_with_logits, cross_entropy, huber",
        ),
        (
            nn.Linear(4, 2),
            {"optimizer": "lamb"},
            r"optimizer 'lamb' is unknown; use one of sgd, momentum, nesterov, adam, ",
        ),
        (nn.Linear(4, 2), {"labels": ["a"]}, r"1 labels for 2 classes"),
        (nn.ReLU(), {}, r"no parameter with requires_grad=True"),
        (nn.Linear(4, 2).double(), {}, r"does not take inputs"),
        (nn.Sequential(nn.Linear(4, 2), nn.Flatten(0)), {}, r"the first dimension of outputs is the batch"),
    ],
)
def test_mistakes(module: nn.Module, options: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message) as caught:
        export_bundle(module, tmp_path / "x.fedge", name="x", inputs=[((4,), "float32")], **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_place(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="cannot be written"):
        export_bundle(nn.Linear(4, 2), tmp_path / "no" / "x.fedge", name="x", inputs=[((4,), "float32")])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": math.nan}, "scale is nan; expected a finite number above 0"),
        ({"scale": 0.0}, "scale is 0; expected a finite number above 0"),
        ({"lr": -1.0}, "lr is -1; expected a finite number above 0"),
        ({"optimizer": "momentum", "momentum": -0.1}, "momentum is -0.1; expected a finite number of at least 0"),
        ({"weight_decay": math.inf}, "weight_decay is inf; expected a finite number of at least 0"),
    ],
)
def test_numbers_that_would_train_nothing(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=re.escape(message)):
        export_bundle(nn.Linear(3, 2), tmp_path / "n.fedge", name="n", inputs=[((3,), "float32")], **options)
    assert not list(tmp_path.iterdir())
