"""Recurrent layers, unrolled in a form with a short backward pass.

PyTorch's own GRU hides its steps from tracing. Written out here, only what depends on the step before stays in the
loop: the input's projection and the weights' gradients are one matrix product over all steps each.
Formulas: Cho et al. 2014 (arXiv 1406.1078) in the variant of `torch.nn.GRU`.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from edge_client.errors import ExportError


class _Layer(torch.autograd.Function):
    """One layer: projected inputs ``[T, N, 3H]``, first state ``[N, H]``, ``[3H, H]``, ``[3H]`` -> ``[T, N, H]``."""

    @staticmethod
    def forward(ctx: Any, projected: Tensor, first: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        size = first.shape[1]
        state, states, gates, news, inners = first, [], [], [], []
        for t in range(projected.shape[0]):
            hidden = torch.addmm(bias, state, weight.t())
            gate = torch.sigmoid(projected[t, :, : 2 * size] + hidden[:, : 2 * size])
            inner = hidden[:, 2 * size :]
            new = torch.tanh(projected[t, :, 2 * size :] + gate[:, :size] * inner)
            state = new + gate[:, size:] * (state - new)
            states.append(state)
            gates.append(gate)
            news.append(new)
            inners.append(inner)
        stacked = torch.stack(states)
        ctx.save_for_backward(stacked, torch.stack(gates), torch.stack(news), torch.stack(inners), first, weight)
        return stacked

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        states, gates, news, inners, first, weight = ctx.saved_tensors
        size = first.shape[1]
        before = torch.cat([first.unsqueeze(0), states[:-1]])
        reset, update = gates[..., :size], gates[..., size:]
        slopes = gates * (1 - gates)
        toward_new = (1 - update) * (1 - news * news)
        toward_update = (before - news) * slopes[..., size:]
        toward_reset = inners * slopes[..., :size]
        steps = states.shape[0]
        grad = torch.zeros_like(first)
        projected, hidden = [], []
        for t in reversed(range(steps)):
            grad = grad + grads[0][t]
            new = grad * toward_new[t]
            both = torch.cat([new * toward_reset[t], grad * toward_update[t]], 1)
            inner = torch.cat([both, new * reset[t]], 1)
            projected.append(torch.cat([both, new], 1))
            hidden.append(inner)
            grad = grad * update[t] + torch.mm(inner, weight)
        through = torch.stack(hidden[::-1]).reshape(-1, 3 * size)
        toward_weight = torch.mm(through.t(), before.reshape(-1, size))
        return torch.stack(projected[::-1]), grad, toward_weight, through.sum(0)


def _gru(
    x: Tensor,
    start: Tensor,
    weights: Sequence[Tensor],
    has_bias: bool,
    layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor]:
    """The signature and the result of `torch.gru`."""
    if bidirectional or (dropout > 0 and training):
        raise ExportError("GRU with bidirectional=True or dropout is not supported yet; use one direction, dropout=0")
    sequence = x.transpose(0, 1) if batch_first else x
    last = []
    given = 4 if has_bias else 2
    for layer in range(layers):
        w_input, w_hidden, *biases = weights[layer * given : (layer + 1) * given]
        bias = biases[1] if has_bias else torch.zeros(w_hidden.shape[0])
        projected = F.linear(sequence, w_input, biases[0] if has_bias else None)
        sequence = _Layer.apply(projected, start[layer], w_hidden, bias)  # type: ignore[no-untyped-call]
        last.append(sequence[-1])
    return (sequence.transpose(0, 1) if batch_first else sequence), torch.stack(last)


class RecurrentMode(TorchFunctionMode):
    """While active, `torch.gru` is computed step by step."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Replace the recurrent functions, pass all others on."""
        # By name: torch.nn calls these through another object than torch.gru.
        name = getattr(func, "__name__", "")
        if name == "gru" and len(args) == 9:
            return _gru(*args)
        if name in ("lstm", "rnn_tanh", "rnn_relu"):
            raise ExportError(f"torch.{name} has no gradient rule yet; use nn.GRU")
        return func(*args, **(kwargs or {}))
