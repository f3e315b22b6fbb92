"""Which parameters train: frozen by name, biases only, the last modules; and which buffers change."""

from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, nn

from edge_client.errors import ExportError
from edge_client.manifest import Feature

TrainOnly = Literal["bias"]


def matching(patterns: Sequence[str], names: Sequence[str], what: str) -> set[str]:
    """The names that match any of the patterns (as in `fnmatch`).

    Raises:
        ExportError: a pattern matches none; the message names the nearest.
    """
    found: set[str] = set()
    for pattern in patterns:
        hits = [name for name in names if fnmatchcase(name, pattern)]
        if not hits:
            near = get_close_matches(pattern, names, 3, 0.3) or list(names[:3])
            raise ExportError(
                f"no {what} matches {pattern!r}; {'the nearest are ' + ', '.join(near) if near else 'there is none'}"
            )
        found.update(hits)
    return found


def choose_trainable(
    module: nn.Module, *, freeze: Sequence[str] = (), train_only: TrainOnly | None = None, last: int | None = None
) -> frozenset[str]:
    """Names of the parameters to train: those with ``requires_grad``, less what is frozen here.

    Args:
        module: a parameter of several names (tied weights) has its first; it is frozen where any of them is.
        freeze: patterns of names, such as ``features.*``.
        train_only: ``bias`` trains biases and nothing else (Ben Zaken et al. 2022, arXiv 2106.10199).
        last: train only the last so many modules that have parameters of their own, in order of definition.

    Raises:
        ExportError: a pattern matches nothing, or nothing is left to train.
    """
    every = dict(module.named_parameters(remove_duplicate=False))
    if not any(p.requires_grad for p in every.values()):
        raise ExportError(f"module {type(module).__name__} has no parameter with requires_grad=True; nothing to train")
    fixed = {id(every[name]) for name in matching(freeze, list(every), "parameter")}
    if train_only is not None:
        if train_only != "bias":
            raise ExportError(f"train_only is {train_only!r}; expected 'bias'")
        fixed |= {id(p) for name, p in every.items() if not _is_bias(name)}
    if last is not None:
        owners = [part for part in module.modules() if any(True for _ in part.parameters(recurse=False))]
        if not 1 <= last <= len(owners):
            raise ExportError(f"last is {last}; expected 1 to {len(owners)}, the modules that have parameters")
        trained = {id(p) for owner in owners[-last:] for p in owner.parameters(recurse=False)}
        fixed |= {id(p) for p in every.values() if id(p) not in trained}
    chosen = frozenset(n for n, p in module.named_parameters() if p.requires_grad and id(p) not in fixed)
    if not chosen:
        raise ExportError(f"module {type(module).__name__} has nothing left to train; freeze fewer parameters")
    return chosen


def _is_bias(name: str) -> bool:
    # nn.MultiheadAttention has in_proj_bias, recurrent layers bias_ih_l0.
    last = name.rpartition(".")[2]
    return last.endswith("bias") or last.startswith("bias_")


def changing_buffers(module: nn.Module, inputs: Sequence[Feature]) -> frozenset[str]:
    """Names of the saved buffers that a forward pass in training changes, found by making one on a random batch of two.

    A module that refuses the batch changes nothing; tracing will say what is wrong.
    """
    saved = module.state_dict()
    generator = torch.Generator().manual_seed(0)
    # Random, because a running mean that is zero may stay so on this batch.
    before = {
        n: b + torch.rand(b.shape, generator=generator, dtype=b.dtype) if b.is_floating_point() else b
        for n, b in module.named_buffers()
        if n in saved
    }
    given = {n: b.detach().clone() for n, b in before.items()}
    state: dict[str, Tensor] = {n: p.detach() for n, p in module.named_parameters()} | given
    floats = {f.name: torch.randn((2, *f.shape), generator=generator) for f in inputs}
    batch = tuple(
        floats[f.name] if f.dtype == "float32" else torch.zeros((2, *f.shape), dtype=torch.int64) for f in inputs
    )
    modes = {part: part.training for part in module.modules()}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.func.functional_call(module.train(), state, batch)
    except Exception:
        # Tracing the step fails for the same reason, and names the module.
        return frozenset()
    finally:
        for part, training in modes.items():
            part.training = training
    # Values, because PyTorch does not count versions of running statistics.
    return frozenset(n for n in given if not torch.equal(state[n], before[n]))
