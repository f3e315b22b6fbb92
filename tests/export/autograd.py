"""Hold operator rules to PyTorch's autograd: trace outputs and gradients of a function, run them on ONNX Runtime."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from edge_client import runtime
from edge_client.manifest import Feature
from export.bundle import RULES
from export.choice import Choices, has_depthwise
from export.lower import Choose, Rule, dtype_name, lower
from export.optimize import optimize
from export.trace import trace

BATCHES = (4, 1, 7)
EXERCISED: set[str] = set()
"""Operators whose rules a call of `assert_gradients` went through in this process."""


class _Recorded(Mapping[str, Rule]):
    """A table of rules that notes which of them are looked up."""

    def __init__(self, rules: Mapping[str, Rule]) -> None:
        self._rules = rules

    def __getitem__(self, name: str) -> Rule:
        rule = self._rules[name]
        EXERCISED.add(name)
        return rule

    def __iter__(self) -> Iterator[str]:
        return iter(self._rules)

    def __len__(self) -> int:
        return len(self._rules)


def operators(model: bytes) -> set[str]:
    """The operators of a graph; all of the default domain."""
    graph = onnx.load_from_string(model).graph
    assert all(node.domain == "" for node in graph.node)
    return {node.op_type for node in graph.node}


def assert_gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    batched: Sequence[Tensor],
    fixed: Mapping[str, Tensor] | None = None,
    *,
    module: nn.Module | None = None,
    rules: Mapping[str, Rule] = RULES,
    tolerance: float = 2e-5,
    batches: Sequence[int] = BATCHES,
    choose: Choose | None = None,
    counted: dict[str, int] | None = None,
) -> set[str]:
    """Outputs and the gradients of every float tensor agree with PyTorch at several batch sizes.

    ``function(*batched, **fixed)`` returns tensors. The first dimension of ``batched`` tensors is the batch, traced
    symbolically; their rows are repeated and cut to each size in ``batches``. Outputs of floats are weighted by random
    cotangents. The tolerance is relative to each tensor's largest magnitude. ``choose`` picks the formulation of
    convolutions. Returns the graph's operators; ``counted`` receives how many there are of each.
    """
    fixed = dict(fixed or {})
    sample = _outputs(function, batched, fixed)
    generator = torch.Generator().manual_seed(1)
    given = {f"x{i}": x for i, x in enumerate(batched)}
    weights = {f"c{i}": torch.randn(t.shape, generator=generator) for i, t in enumerate(sample)}
    rows = len(batched[0])
    moving = {n: t for n, t in weights.items() if t.dim() and t.shape[0] == rows}

    def step(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves = {
            n: tensors[n].detach().requires_grad_() if tensors[n].dtype == torch.float32 else tensors[n]
            for n in (*given, *fixed)
        }
        outputs = _outputs(function, [leaves[n] for n in given], {n: leaves[n] for n in fixed})
        total = torch.zeros(())
        for i, output in enumerate(outputs):
            if output.dtype == torch.float32 and output.requires_grad:
                total = total + (output * tensors[f"c{i}"]).sum()
        wanted = {n: t for n, t in leaves.items() if t.requires_grad}
        grads = torch.autograd.grad(total, list(wanted.values()), allow_unused=True) if wanted else ()
        results = {f"out{i}": t.detach() for i, t in enumerate(outputs)}
        return results | {f"grad.{n}": g for n, g in zip(wanted, grads, strict=True) if g is not None}

    features = [Feature(n, tuple(t.shape[1:]), dtype_name(t.dtype)) for n, t in (given | moving).items()]
    static = fixed | {n: t for n, t in weights.items() if n not in moving}
    traced = trace(step, static, features, module or nn.Module())
    graph = optimize(lower(traced, _Recorded(rules), choose or Choices(has_depthwise(traced))))
    model = graph.to_model("rule")
    session = runtime.session(model)
    names = [o.name for o in session.get_outputs()]
    for size in batches:
        feeds = {n: _rows(t, size) for n, t in (given | moving).items()} | static
        wanted = step(feeds)
        assert set(names) == set(wanted)
        used = {i.name for i in session.get_inputs()}
        found = session.run(names, {n: t.detach().numpy() for n, t in feeds.items() if n in used})
        for name, got in zip(names, found, strict=True):
            want = wanted[name].numpy()
            assert got.shape == want.shape, f"{name}: {got.shape}, PyTorch has {want.shape} (batch {size})"
            scale = max(float(np.abs(want, dtype=np.float64).max(initial=0)), 1e-3) if want.dtype != bool else 1.0
            worst = float(np.abs(got.astype(np.float64) - want.astype(np.float64)).max(initial=0)) / scale
            assert worst <= tolerance, f"{name} is off by {worst:.1e} of its largest magnitude (batch {size})"
    if counted is not None:
        counted |= Counter(node.op_type for node in onnx.load_from_string(model).graph.node)
    return operators(model)


def _outputs(
    function: Callable[..., Tensor | tuple[Tensor, ...]], batched: Sequence[Tensor], fixed: Mapping[str, Tensor]
) -> tuple[Tensor, ...]:
    result = function(*batched, **fixed)
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _rows(tensor: Tensor, size: int) -> Tensor:
    repeated = tensor.repeat(-(-size // len(tensor)), *[1] * (tensor.dim() - 1))
    return repeated[:size].contiguous()
