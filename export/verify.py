"""Parity with PyTorch, checked at every export.

Three steps from the initial weights at several batch sizes and kinds of input. Each tensor is compared twice: its
value, relative to its largest magnitude, and what the steps changed, relative to the largest change. A change of less
than 1 % of the tensor's magnitude is taken as 1 %: below that, float32 rounding of the weights themselves comes into
reach of the tolerance, while a wrong gradient (an error as large as the change) is caught down to a millionth of the
weights. What differs then is compared with PyTorch in float64, and counts where it is beyond several times PyTorch's
own rounding error. Some gradients are zero but for rounding, as that of a bias before batch normalisation: where
PyTorch itself is off by a percent of a change, the change counts as at least a tenth of the largest in the model.

Max-pooling and ReLU have gradients that jump: where two values of a window differ by less than rounding, each library
may rightly see another maximum, and one such element moves a weight's gradient by a percent. Among 100,000 windows that
happens, so a disagreement counts when it repeats with fresh data, in the end of a few examples, which have fewer
elements to jump; but where the whole batch is off by more than a jump could be, few examples excuse nothing. Batch
normalisation makes rounding errors large where all values of a channel are one, as on uniform inputs, and a ReLU behind
it jumps with their sign: there, a disagreement counts when PyTorch agrees with itself in float64, and on inputs that
differ by as little as rounding.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from edge_client import runtime
from edge_client.errors import ExportError
from edge_client.manifest import Parity
from export import modes, reference
from export.step import SEED, Problem
from export.trials import KINDS, Arrays, draw_batch, given_for, largest_index, moved_model
from export.updates import STEP, Tensors

TOLERANCE = 1e-4
BATCHES = (1, 7, 32)
STEPS = 3
ATTEMPTS = (1, 1, 2, 4, 8, 8, 16, 16)
"""What the batch is divided by, attempt by attempt."""
JUMP = 0.3
"""What a jump may move a gradient by, relative to its largest element: ResNet-18's by a tenth."""
LEAST_CHANGE = 1e-2
NEGLIGIBLE = 0.1
NOISY = 1e-2
"""Of a change that PyTorch itself rounds by so much, nothing is known but that it is small."""
ROUNDINGS = 8
"""Rounding errors of PyTorch's own that a result may be off; Winograd's algorithms have up to five times as much."""
UNIFORM = ("zero", "constant")
ROUNDING = 1e-6
_NORMALISING = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)

Run = Callable[[Mapping[str, npt.NDArray[np.generic]]], Arrays]


@dataclass(frozen=True)
class Graphs:
    """The three serialized graphs of a bundle; ``constants`` names the inputs that each is given when loaded."""

    train: bytes
    eval: bytes
    infer: bytes
    constants: Mapping[str, tuple[str, ...]]

    def values(self, kind: str, state: Tensors) -> Arrays:
        """What the graph ``kind`` is given when loaded, of the model ``state``."""
        tensors = {name: state[name.removeprefix("param.")].contiguous().numpy() for name in self.constants[kind]}
        return {name: np.require(value, value.dtype, ["C", "A"]) for name, value in tensors.items()}


@dataclass
class _Worst:
    error: float = 0.0
    what: str = ""

    def see(self, error: float, what: str) -> None:
        # NaN counts as worst, and stays.
        if not math.isnan(self.error) and not error <= self.error:
            self.error, self.what = error, what

    @property
    def fits(self) -> bool:
        """Whether all is within the tolerance."""
        return self.error <= TOLERANCE


def verify(problem: Problem, graphs: Graphs, *, seed: int = 0) -> Parity:
    """Compare the graphs with PyTorch's own autograd, optimizer and losses.

    Raises:
        ExportError: they disagree by more than `TOLERANCE`; the message names the tensor and the case.
    """
    moved = moved_model(problem)
    train = _runner(graphs.train, graphs.values("train", problem.state))
    evaluate, infer = (_runner(getattr(graphs, kind), graphs.values(kind, moved)) for kind in ("eval", "infer"))
    generator = np.random.default_rng(seed)
    worst, cases = _Worst(), 0
    limit = largest_index(problem.module)
    modes = {name: module.training for name, module in problem.module.named_modules()}
    try:
        for batch, kind in itertools.product(BATCHES, KINDS):
            whole = math.inf
            for shrink in ATTEMPTS:
                size = _size(problem, batch, shrink)
                case = f"{kind} inputs, batch {size}"
                found = _Worst()
                data = draw_batch(problem, size, kind, limit, generator)
                given = given_for(problem, data, cases)
                wanted = _wanted(problem, given)
                if wanted is not None:
                    result = _found(problem, train, given, wanted)
                    _compare_training(result, wanted, given, case, found)
                    exact = _exact(problem, given) if not found.fits else None
                    if exact is not None:
                        found = _Worst()
                        _compare_training(result, exact, given, case, found, wanted)
                    if not found.fits and kind in UNIFORM and _undefined(problem, given, wanted):
                        found = _Worst()
                _compare_evaluation(problem, moved, evaluate, infer, data, case, found)
                whole = min(whole, found.error) if shrink == 1 else whole
                # What a few examples do not show is wrong all the same, unless it is as small as a jump.
                if found.fits and whole <= JUMP:
                    break
            else:
                found.see(whole, f"the whole batch ({kind} inputs, batch {batch})")
            worst.see(found.error, found.what)
            cases += 1
    finally:
        for name, module in problem.module.named_modules():
            module.training = modes[name]
    if not worst.fits:
        raise ExportError(
            f"the training graph disagrees with PyTorch: {worst.what} is off by {worst.error:.1e} relative, "
            f"allowed is {TOLERANCE:.0e}; nothing was written. Report the model, or replace the layer"
        )
    return Parity(float(worst.error), TOLERANCE, cases, str(torch.__version__), runtime.VERSION)


def _runner(model: bytes, constants: Arrays) -> Run:
    session = runtime.session(model, constants=constants)
    wanted = [i.name for i in session.get_inputs()]
    names = [o.name for o in session.get_outputs()]

    def run(feeds: Mapping[str, npt.NDArray[np.generic]]) -> Arrays:
        return dict(zip(names, session.run(names, {name: feeds[name] for name in wanted}), strict=True))

    return run


def _wanted(problem: Problem, given: reference.Given) -> reference.Trained | None:
    """PyTorch's result; None where it does not train on the batch: normalisation refuses a single value."""
    problem.module.train()
    try:
        return reference.train(problem, given, STEPS)
    except ValueError:
        if problem.micro_batch != 1 and len(next(iter(given.batch.values()))) > 1:
            raise
        return None


def _size(problem: Problem, batch: int, shrink: int) -> int:
    """Rows of an attempt: not down to one, which some layers refuse, and more than one slice where there are slices."""
    slices = problem.micro_batch
    if slices is None:
        return max(min(batch, 2), batch // shrink)
    size = max(min(batch, 2 * slices + 1), batch // shrink)
    return size - 1 if size > 1 and size % slices == 1 else size


def _found(problem: Problem, train: Run, given: reference.Given, wanted: reference.Trained) -> reference.Trained:
    """The training graph's result."""
    fixed = {f"hyper.{n}": np.array(v, np.float32) for n, v in given.hypers.items()}
    fixed |= {f"anchor.{n}": t.numpy() for n, t in given.anchors.items()}
    fixed |= {f"control.{n}": t.numpy() for n, t in given.controls.items()}
    fixed |= {n: t.numpy() for n, t in given.batch.items()} | {SEED: np.array(given.seed)}
    state = {f"param.{n}": t.numpy().copy() for n, t in (given.weights | given.buffers).items()}
    state |= {name: np.zeros_like(t.numpy()) for name, t in wanted.slots.items()}
    losses = []
    for step in range(STEPS):
        outputs = train(fixed | state | {STEP: np.array(step + 1)})
        losses.append(torch.from_numpy(outputs["loss"]))
        state = {f"param.{n}": outputs[f"next.{n}"] for n in given.weights | given.buffers}
        state |= {name: outputs[f"next.{name.removeprefix('slot.')}"] for name in wanted.slots}
    tensors = {name: torch.from_numpy(value) for name, value in state.items()}
    return reference.Trained(
        losses,
        {n: tensors[f"param.{n}"] for n in given.weights},
        {n: tensors[f"param.{n}"] for n in given.buffers},
        {n: tensors[n] for n in wanted.slots},
    )


def _exact(problem: Problem, given: reference.Given) -> reference.Trained | None:
    """PyTorch's result in float64; None for a module that has float32 constants of its own."""
    problem.module.train()
    try:
        return reference.train(problem, given, STEPS, torch.float64)
    except RuntimeError:
        return None


def _compare_training(
    found: reference.Trained,
    wanted: reference.Trained,
    given: reference.Given,
    case: str,
    worst: _Worst,
    rounded: reference.Trained | None = None,
) -> None:
    """``rounded`` is PyTorch's own result in float32, where ``wanted`` is the one in float64."""

    def noise(part: Callable[[reference.Trained], Tensor]) -> float:
        if rounded is None or not part(wanted).numel():
            return 0.0
        return float((part(rounded).double() - part(wanted).double()).abs().max())

    def floor_of(own: float, change: float, largest: float) -> float:
        """Below this, differences are rounding; a change that is all rounding is small beside the model's largest."""
        return max(own * ROUNDINGS / TOLERANCE, NEGLIGIBLE * largest if own > NOISY * change else 0.0)

    for step, (loss, expected) in enumerate(zip(found.losses, wanted.losses, strict=True)):
        own = noise(lambda result, step=step: result.losses[step])  # type: ignore[misc]
        floor = max(float(wanted.losses[0]), own * ROUNDINGS / TOLERANCE)
        worst.see(_relative(loss.numpy(), expected.numpy(), floor), f"loss ({case}, step {step + 1})")
    for kind, begins in (("weights", given.weights), ("buffers", given.buffers)):
        expect, after = getattr(wanted, kind), getattr(found, kind)
        changes = {n: _largest(expect[n].double() - t.double()) for n, t in begins.items()}
        for name, start in begins.items():
            got, want, begin = (tensor.numpy().astype(np.float64) for tensor in (after[name], expect[name], start))
            own = noise(lambda result, kind=kind, name=name: getattr(result, kind)[name])  # type: ignore[misc]
            floor = floor_of(own, changes[name], max(changes.values()))
            scale = float(np.abs(want).max(initial=0))
            worst.see(_relative(got, want, floor), f"{name!r} ({case})")
            least = max(floor, LEAST_CHANGE * scale)
            worst.see(_relative(got - begin, want - begin, least), f"the update of {name!r} ({case})")
    for key, tensor in wanted.slots.items():
        _, slot, name = key.split(".", 2)
        # A second moment is a square, and so is the change that does not matter.
        power = 2 if slot == "second_moment" else 1
        largest = max(_largest(t) for k, t in wanted.slots.items() if k.split(".")[1] == slot)
        own = noise(lambda result, key=key: result.slots[key])  # type: ignore[misc]
        floor = max((LEAST_CHANGE * _largest(given.weights[name])) ** power, floor_of(own, _largest(tensor), largest))
        worst.see(_relative(found.slots[key].numpy(), tensor.numpy(), floor), f"{slot} of {name!r} ({case})")


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _undefined(problem: Problem, given: reference.Given, wanted: reference.Trained) -> bool:
    """Whether PyTorch disagrees with itself: in float64, or, where it normalises, on inputs that differ by rounding.

    Elsewhere such inputs would break the ties of max-pooling, which are well defined.
    """
    problem.module.train()
    batches = [given.batch]
    if any(isinstance(module, _NORMALISING) for module in problem.module.modules()):
        generator = torch.Generator().manual_seed(given.seed)
        floats = {n: t for n, t in given.batch.items() if t.is_floating_point()}
        noise = {n: torch.randn(t.shape, generator=generator) * ROUNDING for n, t in floats.items()}
        batches.append(given.batch | {n: t + noise[n] * t.abs().clamp(min=1) for n, t in floats.items()})
    for batch in batches:
        try:
            other = reference.train(problem, replace(given, batch=batch), STEPS, torch.float64)
        except RuntimeError:
            # A module with float32 constants of its own.
            continue
        found = _Worst()
        _compare_training(wanted, other, given, "", found)
        if not found.fits:
            return True
    return False


def _compare_evaluation(
    problem: Problem, state: Tensors, evaluate: Run, infer: Run, data: Arrays, case: str, worst: _Worst
) -> None:
    found = infer(data) | evaluate(data)
    wanted = _evaluated(problem, state, data, torch.float32)
    seen = _Worst()
    _see_evaluation(found, wanted, wanted, case, seen)
    if not seen.fits:
        try:
            exact = _evaluated(problem, state, data, torch.float64)
        except RuntimeError:
            # A module with float32 constants of its own.
            exact = wanted
        seen = _Worst()
        _see_evaluation(found, exact, wanted, case, seen)
    worst.see(seen.error, seen.what)


def _evaluated(problem: Problem, state: Tensors, data: Arrays, dtype: torch.dtype) -> Arrays:
    """PyTorch's outputs and sums (``sum.<name>``), computed in ``dtype``."""
    problem.module.eval()
    with torch.no_grad(), modes.reference():
        batch = reference.in_dtype({n: torch.from_numpy(a) for n, a in data.items()}, dtype)
        outputs = problem.forward(dict(reference.in_dtype(state, dtype)), batch)
        given, count = problem.arguments(outputs, batch), problem.rows(batch, outputs)
        sums = {"loss": problem.loss.reference(*given) * count, "count": count} | problem.loss.metrics(*given)
    return {n: t.numpy() for n, t in (outputs | {f"sum.{n}": t for n, t in sums.items()}).items()}


def _see_evaluation(found: Arrays, wanted: Arrays, rounded: Arrays, case: str, worst: _Worst) -> None:
    """``rounded`` is PyTorch's own result in float32."""
    for name, want in wanted.items():
        got = found[name]
        if name == "sum.correct":
            # Where two classes score alike up to rounding, either may come first: allow one in the batch.
            worst.see(max(0.0, abs(float(got) - float(want)) - 1), f"{name} ({case})")
        else:
            own = np.abs(rounded[name].astype(np.float64) - want.astype(np.float64)).max(initial=0)
            what = name if name.startswith("sum.") else f"output {name!r}"
            worst.see(_relative(got, want, float(own) * ROUNDINGS / TOLERANCE), f"{what} ({case})")


def _relative(got: npt.NDArray[np.generic], want: npt.NDArray[np.generic], floor: float) -> float:
    if got.shape != want.shape:
        return float("inf")
    if not want.size:
        return 0.0
    finite = np.isfinite(want)
    if not finite.all():
        if not np.array_equal(got[~finite], want[~finite], equal_nan=True):
            return float("inf")
        got, want = got[finite], want[finite]
    difference = np.abs(got.astype(np.float64) - want.astype(np.float64)).max(initial=0)
    return float(difference / max(float(np.abs(want).max(initial=0)), floor, 1e-7))
