"""Write a bundle: trace, lower, optimize, verify, and only then a file."""

import hashlib
import math
import os
import tempfile
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from safetensors.numpy import save
from torch import Tensor, nn

from edge_client.errors import ExportError
from edge_client.manifest import FORMAT, Feature, Manifest, Parameter, Parity
from export.activations import ACTIVATIONS
from export.average import AVERAGE
from export.backward import GRADIENTS
from export.choice import Choices, has_depthwise
from export.convolution import CONVOLUTION
from export.folding import FOLDING
from export.graph import OPSET
from export.large import speed_up_large
from export.losses import Loss, LossFunction, resolve_loss
from export.lower import Rule, dtype_name, lower
from export.normalization import NORMALIZATION
from export.operators import OPERATORS
from export.optimize import optimize
from export.padding import PADDING
from export.pooling import POOLING
from export.resize import RESIZE
from export.step import Problem, choose_optimizer, eval_step, train_step
from export.trace import trace
from export.verify import Graphs, verify

RULES: Mapping[str, Rule] = (
    OPERATORS | GRADIENTS | ACTIVATIONS | NORMALIZATION | CONVOLUTION | POOLING | AVERAGE | RESIZE | PADDING | FOLDING
)
LEAST_RUNTIME = "1.24"


@dataclass(frozen=True)
class Report:
    """What an export made: the manifest, where it is, bytes of each member, seconds it took."""

    manifest: Manifest
    path: Path
    sizes: dict[str, int]
    seconds: float

    @property
    def parity(self) -> Parity:
        """How far PyTorch and ONNX Runtime were apart."""
        assert self.manifest.parity is not None
        return self.manifest.parity


def export_bundle(
    module: nn.Module,
    path: str | Path,
    *,
    name: str,
    inputs: Sequence[Feature | tuple[Sequence[int], str]],
    targets: Sequence[Feature] | None = None,
    loss: str | LossFunction = "cross_entropy",
    optimizer: str = "sgd",
    lr: float = 0.05,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    proximal: bool = False,
    labels: Sequence[str] = (),
    scale: float = 1.0,
    rules: Mapping[str, Rule] = RULES,
) -> Report:
    """Export ``module`` as a bundle that trains, evaluates and infers on stock ONNX Runtime.

    Args:
        module: takes one tensor for each input (first dimension the batch) and returns one tensor, or, for a callable
            loss, several. Parameters with ``requires_grad=False`` and buffers stay fixed.
        path: the file to write; it appears complete or not at all.
        name: the model's name.
        inputs: features, or ``(shape without batch, "float32" | "int64")``; unnamed ones are called ``x``, ``x1``, ...
        targets: given for a callable loss; the named losses derive theirs, called ``y``, from the outputs.
        loss: ``cross_entropy`` (logits ``[N, ..., C]``, targets ``[N, ...] int64``), ``bce_with_logits`` or ``mse``
            (targets of the outputs' shape), or a callable ``(outputs, *targets) -> scalar mean``.
        optimizer: ``sgd`` or ``momentum``, as `torch.optim.SGD`.
        lr: default learning rate, as are ``momentum`` and ``weight_decay``; all of them are scalar inputs of the graph.
        proximal: whether to take the proximal term of FedProx (Li et al. 2020, arXiv 1812.06127), with ``hyper.mu``.
        labels: names of the classes.
        scale: what integer data given for a float32 input is multiplied by.
        rules: table from operator to ONNX; for adding operators.

    Raises:
        ExportError: the module cannot be exported, or the graphs disagree with PyTorch. Nothing is written.
    """
    started = time.perf_counter()
    target = Path(path)
    problem = _problem(module, inputs, targets, resolve_loss(loss), optimizer, proximal, labels, scale,
                       lr=lr, momentum=momentum, weight_decay=weight_decay)  # fmt: skip
    was = {key: part.training for key, part in module.named_modules()}
    try:
        graphs = _graphs(problem, rules)
    finally:
        for key, part in module.named_modules():
            part.training = was[key]
    parity = verify(problem, graphs)
    weights = problem.trainable | problem.frozen
    members = {
        "train.onnx": graphs.train,
        "eval.onnx": graphs.eval,
        "infer.onnx": graphs.infer,
        "weights.safetensors": save({n: t.contiguous().numpy() for n, t in weights.items()}),
    }
    manifest = Manifest(
        format=FORMAT,
        name=name,
        parameters=_parameters(problem),
        inputs=problem.inputs,
        targets=problem.targets,
        outputs=problem.outputs,
        loss=problem.loss.name,
        metrics=problem.loss.names,
        optimizer=problem.optimizer,
        hypers=problem.hypers,
        proximal=proximal,
        opset=OPSET,
        least_runtime=LEAST_RUNTIME,
        files={member: hashlib.sha256(data).hexdigest() for member, data in members.items()},
        parity=parity,
    )
    _write(target, {"manifest.json": msgspec.json.format(msgspec.json.encode(manifest), indent=1)} | members)
    sizes = {member: len(data) for member, data in members.items()}
    return Report(manifest, target, sizes, time.perf_counter() - started)


def _parameters(problem: Problem) -> tuple[Parameter, ...]:
    def described(tensor: Tensor) -> tuple[tuple[int, ...], str]:
        return tuple(tensor.shape), dtype_name(tensor.dtype)

    listed = []
    for name, tensor in problem.trainable.items():
        shape, dtype = described(tensor)
        if dtype != "float32":
            raise ExportError(f"parameter {name!r} is {dtype}; only float32 can be trained: call module.float() first")
        listed.append(Parameter(name, shape, "trainable"))
    for name, tensor in problem.frozen.items():
        shape, dtype = described(tensor)
        listed.append(Parameter(name, shape, "frozen", dtype))
    return tuple(listed)


def _graphs(problem: Problem, rules: Mapping[str, Rule]) -> Graphs:
    features = (*problem.inputs, *problem.targets)
    module, outputs = problem.module, {feature.name for feature in problem.outputs}
    step, fixed = train_step(problem)
    stepped = trace(step, fixed, features, module.train())
    choices = Choices(has_depthwise(stepped))
    training = optimize(lower(stepped, rules, choices))
    speed_up_large(training)
    step, fixed = eval_step(problem)
    traced = trace(step, fixed, features, module.eval())
    evaluation, inference = lower(traced, rules, choices), lower(traced, rules, choices)
    evaluation.outputs = [port for port in evaluation.outputs if port.name not in outputs]
    inference.outputs = [port for port in inference.outputs if port.name in outputs]
    targets = {feature.name for feature in problem.targets}
    inference.inputs = [port for port in inference.inputs if port.name not in targets]
    return Graphs(
        training.to_model("train"), optimize(evaluation).to_model("eval"), optimize(inference).to_model("infer")
    )


def _check_numbers(numbers: Mapping[str, float]) -> None:
    """Refuse what would train nothing or be no number, with the range."""
    for name, value in numbers.items():
        low_allowed = name in ("momentum", "weight_decay")
        if not math.isfinite(value) or value < 0 or (value == 0 and not low_allowed):
            raise ExportError(
                f"{name} is {value:g}; expected a finite number {'of at least' if low_allowed else 'above'} 0"
            )


def _problem(
    module: nn.Module,
    inputs: Sequence[Feature | tuple[Sequence[int], str]],
    targets: Sequence[Feature] | None,
    loss: Loss,
    optimizer: str,
    proximal: bool,
    labels: Sequence[str],
    scale: float,
    **hypers: float,
) -> Problem:
    _check_numbers({"scale": scale} | hypers)
    features = tuple(_feature(given, i, scale) for i, given in enumerate(inputs))
    if not any(p.requires_grad for p in module.parameters()):
        raise ExportError(f"module {type(module).__name__} has no parameter with requires_grad=True; nothing to train")
    for key, part in module.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.track_running_stats:
            raise ExportError(
                f"module {key!r} is {type(part).__name__}, whose running statistics are not supported yet; "
                "use GroupNorm or LayerNorm"
            )
    shapes = _output_shapes(module, features)
    if loss.target_dtype is not None and len(shapes) != 1:
        raise ExportError(f"loss {loss.name!r} takes one output, the module returns {len(shapes)}; use a callable loss")
    classes = tuple(labels)
    names = [loss.output_name] if len(shapes) == 1 else [f"{loss.output_name}{i}" for i in range(len(shapes))]
    if targets is None and loss.target_dtype is None:
        raise ExportError(f"loss {loss.name!r} is a callable: say which targets it takes, targets=[Feature(...)]")
    wanted = tuple(targets) if targets is not None else loss.targets(shapes[0])
    if classes and loss.target_dtype == "int64":
        if len(classes) != shapes[0][-1]:
            raise ExportError(f"{len(classes)} labels for {shapes[0][-1]} classes; give one for each")
        wanted = tuple(msgspec.structs.replace(feature, labels=classes) for feature in wanted)
    outputs = tuple(Feature(n, shape, "float32", labels=classes) for n, shape in zip(names, shapes, strict=True))
    rule, settings = choose_optimizer(optimizer, proximal=proximal, **hypers)
    return Problem(module, features, wanted, outputs, loss, rule, proximal, settings)


def _feature(given: Feature | tuple[Sequence[int], str], place: int, scale: float) -> Feature:
    if isinstance(given, Feature):
        return given
    shape, dtype = given
    if dtype not in ("float32", "int64"):
        raise ExportError(f"input {place} has dtype {dtype!r}; use float32 or int64")
    name = "x" if place == 0 else f"x{place}"
    factor = scale if dtype == "float32" else 1.0
    return Feature(name, tuple(int(s) for s in shape), "float32" if dtype == "float32" else "int64", factor)


def _output_shapes(module: nn.Module, inputs: Sequence[Feature]) -> list[tuple[int, ...]]:
    batch = [torch.zeros((2, *f.shape), dtype=getattr(torch, f.dtype)) for f in inputs]
    given = ", ".join(f"{f.dtype} {['N', *f.shape]}" for f in inputs).replace("'", "")
    was = module.training
    try:
        with torch.no_grad():
            result = module.eval()(*batch)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ExportError(
            f"module {type(module).__name__} does not take inputs {given}: {reason}. "
            "Give its input shape without the batch, and its dtype"
        ) from error
    finally:
        module.train(was)
    tensors = (result,) if isinstance(result, Tensor) else result
    if not isinstance(tensors, tuple | list) or not all(isinstance(t, Tensor) and t.dim() > 0 for t in tensors):
        raise ExportError(
            f"module {type(module).__name__} returns {type(result).__name__}; return tensors with a batch"
        )
    if any(t.shape[0] != 2 for t in tensors):
        raise ExportError(
            f"module {type(module).__name__} returns {list(tensors[0].shape)} for a batch of 2; "
            "the first dimension of outputs is the batch"
        )
    return [tuple(t.shape[1:]) for t in tensors]


def _write(path: Path, members: Mapping[str, bytes]) -> None:
    try:
        descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error.strerror}; choose another place with -o") from error
    try:
        with os.fdopen(descriptor, "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for member, data in members.items():
                # A fixed date: the same model gives the same bytes.
                archive.writestr(zipfile.ZipInfo(member, (1980, 1, 1, 0, 0, 0)), data)
        Path(partial).chmod(0o644)
        Path(partial).replace(path)
    except OSError as error:
        Path(partial).unlink(missing_ok=True)
        raise ExportError(f"{path} cannot be written: {error.strerror}; choose another place with -o") from error
