"""Low-rank adapters, added at export: ``W x + (alpha / rank) B A x`` with ``W`` frozen (Hu et al. 2021, 2106.09685)."""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function

from edge_client.errors import ExportError
from export.partial import matching


@dataclass(frozen=True)
class Lora:
    """Which layers get adapters, and of which size.

    ``targets`` are patterns of names of `nn.Linear` modules, and of `nn.MultiheadAttention`, whose four projections are
    then adapted. Everything else is frozen, but for parameters that match ``train``, such as a new head. ``A`` is drawn
    from ``seed``, ``B`` is zero.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: Sequence[str] = ("*",)
    train: Sequence[str] = ()
    seed: int = 0


def adapted(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + (x A^T) B^T + bias``: ``x [N, in]``, ``a [rank, in]``, ``b [out, rank]``."""
    if has_torch_function((x, weight)):
        replaced: Tensor = handle_torch_function(adapted, (x, weight), x, weight, a, b, bias)
        return replaced
    return F.linear(x, weight, bias) + F.linear(F.linear(x, a), b)


class _Product(torch.autograd.Function):
    """``x (W + B A)^T + bias``: one product over the rows of ``x``, where the sum of two passes twice over them.

    The gradients of ``A`` and ``B`` go by the low rank, as they would there.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        whole = torch.addmm(weight, b, a)
        ctx.save_for_backward(x, whole, a, b)
        return F.linear(x, whole, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        x, whole, a, b = ctx.saved_tensors
        toward = torch.mm(grad, whole) if ctx.needs_input_grad[0] else None
        toward_a = torch.mm(torch.mm(grad, b).t(), x)
        toward_b = torch.mm(grad.t(), torch.mm(x, a.t()))
        return toward, None, toward_a, toward_b, grad.sum(0) if ctx.needs_input_grad[4] else None


class AdapterMode(TorchFunctionMode):
    """While active, adapters are merged into the weights once a step."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Replace `adapted`, pass all other functions on."""
        if func is adapted and not args[1].requires_grad:
            return _Product.apply(*args)  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


class _Linear(nn.Linear):
    """A linear layer and its adapter; the names of its own parameters stay."""

    def __init__(self, base: nn.Linear, lora: Lora, generator: torch.Generator) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None)
        self.weight, self.bias = base.weight, base.bias
        self.lora_a, self.lora_b = _adapter(base.out_features, base.in_features, lora, generator)
        self._factor = lora.alpha / lora.rank

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in] float32`` -> ``[..., out]``."""
        # Two dimensions: sums of matrix products then become part of the products.
        flat = x.reshape(-1, self.in_features)
        found = adapted(flat, self.weight, self.lora_a * self._factor, self.lora_b, self.bias)
        return found.reshape(*x.shape[:-1], self.out_features)


class _Attention(nn.MultiheadAttention):
    """Attention with adapters in its projections, which it adds to the weights: PyTorch projects out of reach.

    The weights' gradients are formed in full on the way to the adapters'; what travels is as small as elsewhere.
    """

    def adapt(self, lora: Lora, generator: torch.Generator) -> None:
        """Add the adapters."""
        if self.in_proj_weight is None:
            raise ExportError("attention whose keys or values have a width of their own takes no adapters; freeze it")
        width = self.embed_dim
        self.in_lora_a, self.in_lora_b = _adapter(3 * width, width, lora, generator)
        self.out_lora_a, self.out_lora_b = _adapter(width, width, lora, generator)
        self._factor = lora.alpha / lora.rank

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As `nn.MultiheadAttention`."""
        places: tuple[tuple[nn.Module, str, Tensor, Tensor], ...] = (
            (self, "in_proj_weight", self.in_lora_a, self.in_lora_b),
            (self.out_proj, "weight", self.out_lora_a, self.out_lora_b),
        )
        kept: list[Any] = [owner._parameters[name] for owner, name, _, _ in places]
        try:
            for (owner, name, a, b), weight in zip(places, kept, strict=True):
                whole: Any = weight + torch.mm(b, a * self._factor)
                owner._parameters[name] = whole
            return super().forward(*args, **kwargs)
        finally:
            for (owner, name, _, _), weight in zip(places, kept, strict=True):
                owner._parameters[name] = weight


def _adapter(rows: int, columns: int, lora: Lora, generator: torch.Generator) -> tuple[nn.Parameter, nn.Parameter]:
    # The spread of PyTorch's own linear layers.
    a = (torch.rand((lora.rank, columns), generator=generator) * 2 - 1) / columns**0.5
    return nn.Parameter(a), nn.Parameter(torch.zeros((rows, lora.rank)))


def add_adapters(module: nn.Module, lora: Lora) -> tuple[nn.Module, frozenset[str]]:
    """A copy of ``module`` with adapters, and the names of its parameters that train.

    Raises:
        ExportError: rank or alpha is out of range, or a pattern matches nothing.
    """
    if lora.rank < 1 or not 0 < lora.alpha < float("inf"):
        raise ExportError(f"LoRA has rank {lora.rank} and alpha {lora.alpha:g}; expected at least 1, and above 0")
    adapted = copy.deepcopy(module)
    inside = {id(m.out_proj) for m in adapted.modules() if isinstance(m, nn.MultiheadAttention)}
    kinds = (nn.Linear, nn.MultiheadAttention)
    found = {n: m for n, m in adapted.named_modules() if isinstance(m, kinds) and id(m) not in inside}
    chosen = matching(lora.targets, list(found), "linear layer or attention")
    generator = torch.Generator().manual_seed(lora.seed)
    before = {name for name, _ in adapted.named_parameters()}
    for name in found:
        if name not in chosen:
            continue
        base = found[name]
        if isinstance(base, nn.Linear):
            fresh = _Linear(base, lora, generator)
            fresh.train(base.training)
            if not name:
                adapted = fresh
            else:
                owner, _, last = name.rpartition(".")
                setattr(adapted.get_submodule(owner), last, fresh)
        else:
            # Its forward is all that differs, and encoder layers look into its attributes.
            base.__class__ = _Attention
            assert isinstance(base, _Attention)
            base.adapt(lora, generator)
    names = [name for name, _ in adapted.named_parameters()]
    trained = {name for name in names if name not in before}
    if lora.train:
        trained |= matching(lora.train, [name for name in names if name in before], "parameter")
    return adapted, frozenset(trained)
