"""Losses by name against torch.nn.functional: options, ignored targets, exact sums; and losses written in torch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_client.errors import ExportError
from edge_client.manifest import Feature
from export.bundle import export_bundle
from export.losses import parse_options, resolve_loss
from tests.export.autograd import assert_gradients

WEIGHT = (0.5, 2.0, 0.0, 1.0, 3.0)
CLASS_OPTIONS: list[dict[str, Any]] = [
    {},
    {"ignore_index": 2},
    {"weight": WEIGHT},
    {"label_smoothing": 0.1},
    {"weight": WEIGHT, "label_smoothing": 0.2, "ignore_index": 0},
]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(11)


def class_batch(*inner: int, ignored: int = -100) -> tuple[Tensor, Tensor]:
    targets = torch.randint(0, 5, (4, *inner))
    targets.view(-1)[0] = ignored
    return torch.randn(4, *inner, 5) * 3, targets


def agrees(name: str, outputs: Tensor, targets: Tensor, **options: Any) -> None:
    """Traced and lowered, the loss has PyTorch's value and gradient (through the reference), and its count."""
    loss = resolve_loss(name, **options)

    def function(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return loss.traced(outputs, targets.detach()), loss.count(outputs, targets)

    assert_gradients(function, [outputs, targets])
    leaf = outputs.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(loss.reference(leaf, targets), leaf)
    (found,) = torch.autograd.grad(loss.traced(leaf, targets), leaf)
    torch.testing.assert_close(loss.traced(outputs, targets), loss.reference(outputs, targets))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("options", CLASS_OPTIONS)
@pytest.mark.parametrize("inner", [(), (3,)])
def test_cross_entropy(options: dict[str, Any], inner: tuple[int, ...]) -> None:
    agrees("cross_entropy", *class_batch(*inner, ignored=options.get("ignore_index", -100)), **options)


@pytest.mark.parametrize("options", CLASS_OPTIONS[:3])
def test_nll(options: dict[str, Any]) -> None:
    logits, targets = class_batch(2, ignored=options.get("ignore_index", -100))
    agrees("nll", logits.log_softmax(-1), targets, **options)


@pytest.mark.parametrize("positive", [None, 3.0, (0.5, 1.0, 4.0)])
def test_binary_cross_entropy_with_logits_at_zero_too(positive: object) -> None:
    logits = torch.randn(4, 3) * 4
    logits[0] = torch.tensor([0.0, 40.0, -40.0])
    agrees("bce_with_logits", logits, (torch.rand(4, 3) > 0.5).float(), pos_weight=positive)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mse", {}),
        ("l1", {}),
        ("huber", {}),
        ("huber", {"delta": 0.5}),
        ("smooth_l1", {}),
        ("smooth_l1", {"beta": 0.5}),
        ("smooth_l1", {"beta": 0}),
    ],
)
def test_regressions_on_both_sides_of_every_kink(name: str, options: dict[str, Any]) -> None:
    targets = torch.arange(24.0).reshape(4, 6)
    offsets = torch.tensor([0.0, 0.5, -0.5, 1.0, -1.0, 3.0])
    agrees(name, targets + offsets, targets, **options)


@pytest.mark.parametrize(
    ("name", "options"), [*(("cross_entropy", o) for o in CLASS_OPTIONS), *(("nll", o) for o in CLASS_OPTIONS[:3])]
)
def test_sums_of_batches_make_the_mean_of_all(name: str, options: dict[str, Any]) -> None:
    loss = resolve_loss(name, **options)
    outputs, targets = torch.randn(9, 5).log_softmax(-1), torch.randint(0, 5, (9,))
    parts = [(outputs[:4], targets[:4]), (outputs[4:], targets[4:])]
    total = sum(float(loss.traced(*part) * loss.count(*part)) for part in parts)
    count = sum(float(loss.count(*part)) for part in parts)
    assert total / count == pytest.approx(float(loss.reference(outputs, targets)), rel=1e-5)


def test_nothing_but_ignored_targets_is_no_loss_and_no_gradient() -> None:
    for name in ("cross_entropy", "nll"):
        loss = resolve_loss(name, weight=WEIGHT)
        for target in (-100, 2, 99, -1):  # ignored, of weight 0, no class at all
            outputs = torch.randn(3, 5).requires_grad_()
            targets = torch.full((3,), target)
            value = loss.traced(outputs, targets)
            (gradient,) = torch.autograd.grad(value, outputs)
            assert value == 0
            assert not gradient.any()
            assert loss.count(outputs, targets) == 0
    agrees("cross_entropy", torch.randn(4, 5), torch.full((4,), -100))


def test_ignored_targets_are_not_counted_as_correct() -> None:
    loss = resolve_loss("cross_entropy", ignore_index=1)
    outputs = torch.eye(5)[:4] * 9
    assert loss.metrics(outputs, torch.tensor([0, 1, 2, -100]))["correct"] == 2
    assert loss.count(outputs, torch.tensor([0, 1, 2, -100])) == 2


def test_class_weights_weigh_accuracy_too() -> None:
    loss = resolve_loss("cross_entropy", weight=WEIGHT)
    outputs = torch.eye(5)[:4] * 9
    assert loss.metrics(outputs, torch.tensor([0, 1, 3, 3]))["correct"] == 0.5 + 2 + 1
    assert loss.count(outputs, torch.tensor([0, 1, 3, 3])) == 0.5 + 2 + 1 + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "sum"}, "takes no option 'reduction'; it takes weight, ignore_index, label_smoothing"),
        ({"label_smoothing": 2}, "label_smoothing is 2"),
        ({"label_smoothing": float("nan")}, "label_smoothing is nan"),
        ({"weight": "heavy"}, "weight is 'heavy'"),
        ({"weight": [1.0, -1.0]}, "at least 0"),
        ({"weight": 2.0}, "one number for each class"),
        ({"ignore_index": 1.5}, "expected an integer"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        resolve_loss("cross_entropy", **options)


def test_options_bind_to_named_losses_only() -> None:
    with pytest.raises(ExportError, match="takes no options"):
        resolve_loss(F.mse_loss, delta=1.0)


def test_weights_match_the_classes(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="2 numbers for 3 classes"):
        export_bundle(
            nn.Linear(2, 3), tmp_path / "m.fedge", name="m", inputs=[((2,), "float32")], loss_options={"weight": (1, 2)}
        )


def test_options_on_a_command_line() -> None:
    found = parse_options(["label_smoothing=0.1", "ignore_index=-1", "weight=1,2,0.5", "pos_weight=3"])
    assert found == {"label_smoothing": 0.1, "ignore_index": -1, "weight": [1, 2, 0.5], "pos_weight": 3}
    for text in ("weight", "weight=", "=1", "weight=a"):
        with pytest.raises(ExportError, match="key=number"):
            parse_options([text])


def test_a_bundle_with_loss_options(tmp_path: Path) -> None:
    options = {"weight": (1.0, 2.0, 0.5), "label_smoothing": 0.1, "ignore_index": 1}
    inputs = [((4,), "float32")]
    report = export_bundle(nn.Linear(4, 3), tmp_path / "m.fedge", name="m", inputs=inputs, loss_options=options)
    assert report.parity.worst_relative_error <= report.parity.tolerance


def test_a_callable_written_in_torch(tmp_path: Path) -> None:
    def focal(logits: Tensor, targets: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, targets, reduction="none")
        return ((1 - torch.exp(-loss)) ** 2 * loss).mean()

    targets = [Feature("y", (), "int64")]
    report = export_bundle(
        nn.Linear(4, 3), tmp_path / "m.fedge", name="m", inputs=[((4,), "float32")], loss=focal, targets=targets
    )
    assert report.manifest.loss == "focal"


SCALES = torch.tensor([1, 2, 0.5, 0, -1])
CLASSES = (SCALES[:, None] * torch.tensor([2.0, -1.0, 0.0, 1.0]), torch.arange(5) % 4)
PAIRS = (torch.linspace(-2, 2, 20).reshape(4, 5), torch.linspace(3, -1, 20).reshape(4, 5) ** 2 / 4)


@pytest.mark.parametrize(
    "function",
    [
        F.cross_entropy,
        lambda x, y: F.cross_entropy(x, y, torch.tensor([1.0, 2.0, 0.5, 0.1]), ignore_index=0, label_smoothing=0.1),
        lambda x, y: F.cross_entropy(x, y, reduction="sum"),
        lambda x, y: F.nll_loss(x.log_softmax(1), y, torch.tensor([1.0, 2.0, 0.5, 0.1])),
        lambda x, y: F.nll_loss(x.log_softmax(1)[:, :, None, None], y[:, None, None]),
        lambda x, y: F.multi_margin_loss(x, y),
        lambda x, y: F.multi_margin_loss(x, y, p=2, margin=0.5),
    ],
)
def test_losses_over_classes_inside_a_callable(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert_gradients(function, CLASSES, batches=(5, 7))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, t: F.binary_cross_entropy(x.sigmoid(), t.sigmoid().detach()),
        lambda x, t: F.huber_loss(x, t, delta=0.7),
        lambda x, t: F.smooth_l1_loss(x, t, beta=0.5),
        lambda x, t: F.kl_div(x.log_softmax(1), t.softmax(1), reduction="batchmean"),
        lambda x, t: F.cosine_embedding_loss(x[:, :4], t[:, :4], t[:, 4].sign().detach(), margin=0.2),
        F.cosine_similarity,
        lambda x, t: F.margin_ranking_loss(x, t, (x > 0).float() * 2 - 1, margin=0.5),
        lambda x, t: F.soft_margin_loss(x, t.sign().detach()),
        lambda x, t: F.multilabel_soft_margin_loss(x, (t > 1).float()),
        lambda x, t: F.triplet_margin_loss(x, t, x * t),
        lambda x, t: F.hinge_embedding_loss(x, (t > 1).float() * 2 - 1),
        lambda x, t: F.poisson_nll_loss(x, t.detach()),
    ],
)
def test_losses_over_numbers_inside_a_callable(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert_gradients(function, PAIRS)
