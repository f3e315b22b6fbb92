"""Training a part of a model: frozen by name, biases, the last modules, tied weights, adapters."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edge_client.bundle import Bundle
from edge_client.data import ArraySource
from edge_client.errors import ExportError
from edge_client.trainer import Trainer
from edge_client.wire.messages import TrainPlan
from export.bundle import export_bundle
from export.lora import Lora, add_adapters
from export.partial import choose_trainable
from export.report import Report
from tests.export.loaded import graph_of, session_of


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x))
        return logits


class Tied(nn.Module):
    """An embedding that is the read-out too, as in small language models."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.mix = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.readout = nn.Linear(4, 7, bias=False)
        self.readout.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.readout(torch.tanh(self.mix(self.tokens(x))))
        return logits


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(1)


def export(module: nn.Module, folder: Path, **options: Any) -> Report:
    return export_bundle(module, folder / "p.fedge", name="p", inputs=[((5,), "float32")], **options)


def trained(report: Report) -> list[str]:
    return [p.name for p in report.manifest.parameters if p.role == "trainable"]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"freeze": ["features.*"]}, ["head.weight", "head.bias"]),
        ({"freeze": ["*.0.*", "head.weight"]}, ["features.2.weight", "features.2.bias", "head.bias"]),
        ({"train_only": "bias"}, ["features.0.bias", "features.2.bias", "head.bias"]),
        ({"last": 2}, ["features.2.weight", "features.2.bias", "head.weight", "head.bias"]),
        ({"last": 2, "train_only": "bias", "freeze": ["head.*"]}, ["features.2.bias"]),
    ],
)
def test_only_what_trains_travels_and_the_rest_is_constant(
    options: dict[str, Any], names: list[str], tmp_path: Path
) -> None:
    report = export(Small(), tmp_path, optimizer="momentum", **options)
    assert trained(report) == names
    graph = graph_of(report.path, "train").graph
    assert {i.name for i in graph.input if i.name.startswith("param.")} == {f"param.{n}" for n in names}
    assert {o.name for o in graph.output if o.name.startswith("next.")} == {
        f"next.{prefix}{n}" for n in names for prefix in ("", "momentum.")
    }
    read = {name for node in graph.node for name in node.input} | {o.name for o in graph.output}
    assert all(any(out in read for out in node.output) for node in graph.node)


def test_the_backward_stops_where_nothing_needs_it(tmp_path: Path) -> None:
    whole = len(graph_of(export(Small(), tmp_path).path, "train").graph.node)
    head = graph_of(export(Small(), tmp_path, freeze=["features.*"]).path, "train").graph.node
    # The gradient of tanh is 1 - y^2, and nothing before the head has one.
    assert len(head) < whole - 10
    assert sum(node.op_type == "Gemm" for node in head) == 4  # three layers and one update


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze": ["feature.*"]}, r"no parameter matches 'feature.\*'; the nearest are features"),
        ({"freeze": ["*"]}, "nothing left to train"),
        ({"train_only": "weights"}, "train_only is 'weights'; expected 'bias'"),
        ({"last": 4}, "last is 4; expected 1 to 3"),
        ({"lora": Lora(targets=["haed"])}, "no linear layer or attention matches 'haed'; the nearest are head"),
        ({"lora": Lora(rank=0)}, "rank 0"),
        ({"lora": Lora(), "last": 1}, "leave out freeze"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        export(Small(), tmp_path, **options)


def test_names_are_chosen_without_touching_the_module() -> None:
    module = Small()
    assert choose_trainable(module, freeze=["head.*"]) == {
        f"features.{i}.{n}" for i in (0, 2) for n in ("weight", "bias")
    }
    assert all(p.requires_grad for p in module.parameters())


def test_tied_weights_are_one_tensor_with_the_sum_of_both_gradients(tmp_path: Path) -> None:
    module = Tied()
    report = export_bundle(module, tmp_path / "t.fedge", name="t", inputs=[((6,), "int64")], lr=0.5)
    assert trained(report) == ["tokens.weight", "mix.weight", "mix.bias"]
    bundle = Bundle.open(report.path)
    generator = np.random.default_rng(0)
    x, y = generator.integers(0, 7, (4, 6)), generator.integers(0, 7, (4, 6))
    result = Trainer(bundle).train(
        bundle.initial(), ArraySource({"x": x, "y": y}), TrainPlan(epochs=1, batch_size=4), seed=0
    )
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    nn.functional.cross_entropy(module(torch.tensor(x)).flatten(0, 1), torch.tensor(y).flatten()).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    found = bundle.layout.views(result.local)["tokens.weight"]
    np.testing.assert_allclose(found, module.readout.weight.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_a_tied_weight_is_frozen_by_either_name() -> None:
    assert choose_trainable(Tied(), freeze=["readout.*"]) == {"mix.weight", "mix.bias"}


def test_adapters_train_and_the_base_does_not(tmp_path: Path) -> None:
    module = Small()
    report = export(module, tmp_path, lora=Lora(rank=2, targets=["features.*"], train=["head.bias"]), lr=0.2)
    adapters = [f"features.{i}.lora_{x}" for i in (0, 2) for x in "ab"]
    assert sorted(trained(report)) == sorted([*adapters, "head.bias"])
    bundle = Bundle.open(report.path)
    np.testing.assert_array_equal(bundle.weights["features.0.weight"], module.features[0].weight.detach().numpy())  # type: ignore[union-attr]
    assert not bundle.weights["features.0.lora_b"].any()

    generator = np.random.default_rng(0)
    x, y = generator.standard_normal((32, 5)).astype(np.float32), generator.integers(0, 3, 32)
    source = ArraySource({"x": x, "y": y})
    trainer = Trainer(bundle)
    result = trainer.train(bundle.initial(), source, TrainPlan(epochs=30, batch_size=8), seed=0)
    assert result.loss < 0.9 * trainer.evaluate(bundle.initial(), source)["loss"] / 32

    adapted, _ = add_adapters(module, Lora(rank=2, targets=["features.*"], train=["head.bias"]))
    values = {n: torch.tensor(v) for n, v in bundle.layout.views(result.local).items()}
    adapted.load_state_dict(values, strict=False)
    with torch.no_grad():
        loss = nn.functional.cross_entropy(adapted(torch.tensor(x)), torch.tensor(y), reduction="sum").item()
        # By hand: W + alpha / rank B A.
        layer, name = module.features[0], "features.0"
        layer.weight += 8 * values[f"{name}.lora_b"] @ values[f"{name}.lora_a"]  # type: ignore[union-attr, operator]
        np.testing.assert_allclose(layer(torch.ones(5)), adapted.get_submodule(name)(torch.ones(5)), rtol=1e-5)
    assert trainer.evaluate(result.local, source)["loss"] == pytest.approx(loss, rel=1e-5)


def test_adapters_of_a_layer_on_its_own_and_of_the_same_seed(tmp_path: Path) -> None:
    first, names = add_adapters(nn.Linear(5, 3), Lora(rank=2))
    second, _ = add_adapters(nn.Linear(5, 3), Lora(rank=2))
    assert names == {"lora_a", "lora_b"}
    assert torch.equal(first.get_parameter("lora_a"), second.get_parameter("lora_a"))
    export(nn.Linear(5, 3), tmp_path, lora=Lora(rank=2))


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.attention(x, x, x, need_weights=False)[0]
        logits: Tensor = self.head(mixed.mean(1))
        return logits


def test_adapters_in_attention_change_what_it_does() -> None:
    module, x = Attending(), torch.randn(2, 4, 8)
    adapted, names = add_adapters(module, Lora(rank=2, targets=["attention"]))
    assert names == {f"attention.{side}_lora_{x}" for side in ("in", "out") for x in "ab"}
    torch.testing.assert_close(adapted(x), module(x))
    with torch.no_grad():
        for name in names:
            adapted.get_parameter(name).normal_(generator=torch.Generator().manual_seed(0))
        inside: Any = adapted.attention
        module.attention.in_proj_weight += 8 * inside.in_lora_b @ inside.in_lora_a
        module.attention.out_proj.weight += 8 * inside.out_lora_b @ inside.out_lora_a
    torch.testing.assert_close(adapted(x), module(x), rtol=1e-4, atol=1e-5)


def test_frozen_integers_are_stored_in_the_graph(tmp_path: Path) -> None:
    class Picked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)
            self.register_buffer("order", torch.tensor([4, 0, 2]))

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.layer(x[:, self.order])
            return result

    report = export(Picked(), tmp_path)
    assert report.manifest.constants["train.onnx"] == ()
    found = session_of(report.path, "infer").run(None, {"x": np.eye(5, dtype=np.float32)})[0]
    assert found.shape == (5, 2)
