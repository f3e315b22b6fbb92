"""Optimizers in the graph, held to torch.optim over several steps with everything that joins a gradient on and off."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from edge_client.errors import ExportError
from edge_client.manifest import Feature
from export.bundle import export_bundle
from export.reference import make_optimizer
from export.updates import UPDATES
from tests.export.loaded import graph_of, session_of

HYPERS = {"lr": 0.03, "momentum": 0.8, "beta1": 0.85, "beta2": 0.97, "eps": 1e-8}
INPUTS = [((5,), "float32")]


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("optimizers")
    made: dict[tuple[str, bool], Path] = {}

    def get(name: str, clipped: bool) -> Path:
        if (name, clipped) not in made:
            path = folder / f"{name}{clipped}.fedge"
            clip = 0.0 if clipped else None
            export_bundle(
                network(), path, name=name, inputs=INPUTS, optimizer=name, clip=clip, proximal=True, control=True
            )
            made[name, clipped] = path
        return made[name, clipped]

    return get


def steps_in_pytorch(
    name: str,
    batch: tuple[Tensor, Tensor],
    extra: dict[str, Tensor],
    decay: float,
    mu: float,
    max_norm: float,
    steps: int,
) -> dict[str, Tensor]:
    module = network()
    optimizer = make_optimizer(name, list(module.parameters()), HYPERS | {"weight_decay": decay})
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(batch[0]), batch[1]).backward()  # type: ignore[no-untyped-call]
        for key, parameter in module.named_parameters():
            assert parameter.grad is not None
            parameter.grad += mu * (parameter.detach() - extra[f"anchor.{key}"]) + extra[f"control.{key}"]
        if max_norm:
            torch.nn.utils.clip_grad_norm_(module.parameters(), max_norm)
        optimizer.step()
    return {key: parameter.detach() for key, parameter in module.named_parameters()}


@pytest.mark.parametrize("name", list(UPDATES))
@pytest.mark.parametrize(
    ("decay", "mu", "control", "max_norm"),
    [(0.0, 0.0, 0.0, None), (0.1, 0.0, 0.0, None), (0.0, 0.3, 0.2, None), (0.1, 0.3, 0.2, None), (0.0, 0.0, 0.0, 0.0),
     (0.1, 0.3, 0.2, 0.0), (0.0, 0.0, 0.0, 0.1), (0.1, 0.3, 0.2, 0.1), (0.1, 0.3, 0.2, 100.0)],
)  # fmt: skip
def test_steps_agree_with_torch_optim(
    exported: Any, name: str, decay: float, mu: float, control: float, max_norm: float | None
) -> None:
    torch.manual_seed(5)
    x, y = torch.randn(6, 5), torch.tensor([0, 1, 2, 0, 1, 2])
    start = dict(network().named_parameters())
    extra = {f"anchor.{n}": p.detach() + 0.1 * torch.randn(p.shape) for n, p in start.items()}
    extra |= {f"control.{n}": control * torch.randn(p.shape) for n, p in start.items()}
    wanted = steps_in_pytorch(name, (x, y), extra, decay, mu, max_norm or 0.0, 5)
    session = session_of(exported(name, max_norm is not None), "train")
    inputs, outputs = {i.name: i for i in session.get_inputs()}, [o.name for o in session.get_outputs()]
    feeds = {n: np.zeros(i.shape, np.float32) for n, i in inputs.items() if n.startswith("slot.")}
    feeds |= {f"param.{n}": p.detach().numpy() for n, p in start.items()}
    feeds |= {n: t.numpy() for n, t in extra.items()} | {"x": x.numpy(), "y": y.numpy()}
    values = HYPERS | {"weight_decay": decay, "mu": mu, "max_norm": max_norm or 0.0}
    feeds |= {n: np.array(values[n[6:]], np.float32) for n in inputs if n.startswith("hyper.")}
    for step in range(5):
        if "step" in inputs:
            feeds["step"] = np.array(step + 1)
        found = dict(zip(outputs, session.run(outputs, feeds), strict=True))
        for key in feeds:
            kind, _, rest = key.partition(".")
            if kind in ("param", "slot"):
                feeds[key] = found[f"next.{rest}"]
    for key, want in wanted.items():
        moved = (want - start[key].detach()).abs().max().item()
        np.testing.assert_allclose(feeds[f"param.{key}"], want.numpy(), rtol=0, atol=2e-5 * moved + 1e-7)


@pytest.mark.parametrize("name", list(UPDATES))
def test_only_adam_counts_steps_and_only_clipping_takes_a_norm(exported: Any, name: str) -> None:
    for clipped in (False, True):
        inputs = {i.name for i in graph_of(exported(name, clipped), "train").graph.input}
        assert ("step" in inputs) == name.startswith("adam")
        assert "seed" not in inputs
        assert ("hyper.max_norm" in inputs) == clipped


def test_plain_sgd_is_one_matrix_product_for_each_matrix(tmp_path: Path) -> None:
    report = export_bundle(network(), tmp_path / "s.fedge", name="s", inputs=INPUTS)
    nodes = {node.output[0]: node for node in graph_of(report.path, "train").graph.node}
    for name in ("0.weight", "2.weight"):
        update = nodes[f"next.{name}"]
        assert update.op_type == "Gemm"
        assert len(update.input) == 3
        assert onnx.helper.get_node_attr_value(update, "alpha") == -1


def test_momentum_is_kept_in_the_same_matrix_product(tmp_path: Path) -> None:
    report = export_bundle(network(), tmp_path / "m.fedge", name="m", inputs=INPUTS, optimizer="momentum")
    nodes = {node.output[0]: node for node in graph_of(report.path, "train").graph.node}
    assert nodes["next.momentum.0.weight"].op_type == "Gemm"
    assert nodes["next.0.weight"].op_type == "Sub"


class Unreached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.spare = nn.Linear(5, 3), nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x)
        return result


@pytest.mark.parametrize(("name", "clip"), [("sgd", None), ("sgd", 1.0), ("adam", None), ("adam", 1.0)])
def test_what_the_loss_does_not_reach_stays(name: str, clip: float | None, tmp_path: Path) -> None:
    report = export_bundle(
        Unreached(), tmp_path / "u.fedge", name="u", inputs=INPUTS, optimizer=name, clip=clip, proximal=True
    )
    nodes = {node.output[0]: node for node in graph_of(report.path, "train").graph.node}
    assert nodes["next.spare"].op_type == "Identity"


def test_numbers_out_of_range(tmp_path: Path) -> None:
    for options, message in (
        ({"beta1": 1.0}, "beta1 is 1; expected a finite number from 0 to below 1"),
        ({"eps": 0.0}, "eps is 0; expected a finite number above 0"),
        ({"clip": -1.0}, "clip is -1; expected a finite number of at least 0"),
    ):
        with pytest.raises(ExportError, match=message):
            export_bundle(network(), tmp_path / "n.fedge", name="n", inputs=INPUTS, optimizer="adam", **options)  # type: ignore[arg-type]


def test_a_target_may_not_take_the_name_of_a_counter(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="an input is called 'step'"):
        export_bundle(network(), tmp_path / "n.fedge", name="n", inputs=[Feature("step", (5,), "float32")])
