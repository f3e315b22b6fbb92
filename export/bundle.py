"""Write a bundle: trace, lower, optimize, verify, and only then a file."""

import hashlib
import math
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import torch
from safetensors.numpy import save
from torch import Tensor, nn

from edge_client import runtime
from edge_client.bundle import MANIFEST, manifest_bytes, write_members
from edge_client.errors import BundleError, ExportError
from edge_client.manifest import FORMAT, Feature, Manifest, Parameter, Role, with_personal
from export.activations import ACTIVATIONS
from export.average import AVERAGE
from export.backward import GRADIENTS
from export.budget import training_graph
from export.convolution import CONVOLUTION
from export.dropout import DROPOUT
from export.folding import FOLDING
from export.graph import OPSET
from export.indexing import INDEXING
from export.inplace import check_in_place
from export.loops import RECURRENT
from export.lora import Lora, add_adapters
from export.losses import Loss, LossFunction, resolve_loss
from export.lower import Rule, dtype_name, lower
from export.normalization import NORMALIZATION
from export.operators import OPERATORS
from export.optimize import optimize
from export.padding import PADDING
from export.partial import TrainOnly, changing_buffers, choose_trainable
from export.pooling import POOLING
from export.reductions import REDUCTIONS
from export.report import Convolution, Report
from export.resize import RESIZE
from export.step import SEED, Problem, eval_step
from export.trace import trace
from export.training import Training, fix
from export.updates import STEP, choose_optimizer
from export.verify import Graphs, verify

RULES: Mapping[str, Rule] = (
    OPERATORS
    | REDUCTIONS
    | INDEXING
    | GRADIENTS
    | ACTIVATIONS
    | NORMALIZATION
    | CONVOLUTION
    | POOLING
    | AVERAGE
    | RESIZE
    | PADDING
    | FOLDING
    | DROPOUT
    | RECURRENT
)
LEAST_RUNTIME = "1.24"


def export_bundle(
    module: nn.Module,
    path: str | Path,
    *,
    name: str,
    inputs: Sequence[Feature | tuple[Sequence[int], str]],
    targets: Sequence[Feature] | None = None,
    loss: str | LossFunction = "cross_entropy",
    loss_options: Mapping[str, object] | None = None,
    optimizer: str = "sgd",
    lr: float = 0.05,
    momentum: float = 0.9,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip: float | None = None,
    proximal: bool = False,
    control: bool = False,
    freeze: Sequence[str] = (),
    train_only: TrainOnly | None = None,
    last: int | None = None,
    lora: Lora | None = None,
    personal: Sequence[str] = (),
    labels: Sequence[str] = (),
    scale: float = 1.0,
    tune: bool = False,
    micro_batch: int | None = None,
    memory_budget: int | None = None,
    rules: Mapping[str, Rule] = RULES,
) -> Report:
    """Export ``module`` as a bundle that trains, evaluates and infers on stock ONNX Runtime.

    Args:
        module: takes one tensor for each input (first dimension the batch) and returns one tensor, or, for a callable
            loss, several. Parameters with ``requires_grad=False`` stay fixed, and so do buffers, except for those that
            its forward pass changes in training, such as running statistics.
        path: the file to write; it appears complete or not at all.
        name: the model's name.
        inputs: features, or ``(shape without batch, "float32" | "int64")``; unnamed ones are called ``x``, ``x1``, ...
        targets: given for a callable loss; the named losses derive theirs, called ``y``, from the outputs.
        loss: ``cross_entropy`` or ``nll`` (logits or log-probabilities ``[N, ..., C]``, targets ``[N, ...] int64``),
            ``bce_with_logits``, ``mse``, ``l1``, ``huber`` or ``smooth_l1`` (targets of the outputs' shape), or a
            callable ``(outputs, *targets) -> scalar mean``.
        loss_options: of a named loss, as in `torch.nn.functional`: ``weight``, ``ignore_index``, ``label_smoothing``,
            ``pos_weight``, ``delta``, ``beta``.
        optimizer: ``sgd``, ``momentum`` or ``nesterov``, as `torch.optim.SGD`; ``adam`` or ``adamw``.
        lr: default learning rate; ``momentum``, ``beta1``, ``beta2``, ``eps`` and ``weight_decay`` are defaults too,
            and all of them are scalar inputs of the graph.
        clip: default of the largest global norm of the gradient, ``hyper.max_norm``; 0 is off. None leaves clipping out
            of the graph, which saves a pass over all gradients.
        proximal: whether to take the proximal term of FedProx (Li et al. 2020, arXiv 1812.06127), with ``hyper.mu``.
        control: whether to take control variates of SCAFFOLD (Karimireddy et al. 2020, arXiv 1910.06378).
        freeze: patterns of the names of parameters that stay fixed, such as ``features.*``.
        train_only: ``bias`` trains biases only.
        last: trains only the last so many modules that have parameters.
        lora: adds low-rank adapters to a copy of the module and trains those; not with the three above.
        personal: patterns of the names of parameters and running statistics that each device keeps for itself, such as
            ``head.*``; ``norm`` is all of the layers that keep running statistics, such as batch normalisation.
        labels: names of the classes.
        scale: what integer data given for a float32 input is multiplied by.
        tune: measures the ways to compute each convolution where several suit, and takes the fastest on this machine.
            Without it equal models give equal bytes.
        micro_batch: a step passes forward and backward over at most so many rows at once, one slice of the batch after
            the other, and adds up their gradients: what it needs in memory is that of a slice, and another twice that
            of the gradients. Losses and updates are those of the whole batch, but batch normalisation normalises each
            slice and its running statistics advance slice by slice, as when gradients are accumulated in PyTorch.
        memory_budget: bytes that a training step at batch 32 may need beside the model, the optimizer's state and the
            batch: all values that live at once between forward and backward pass. The step is exported with a micro
            batch, with values that are computed again in the backward pass, or both, as needed. Larger batches need
            more, unless there is a micro batch. What the runtime takes for itself and loses in fragments comes on top:
            3 to 14 MiB, as measured with budgets of 10 to 50.
        rules: table from operator to ONNX; for adding operators.

    Raises:
        ExportError: the module cannot be exported, or the graphs disagree with PyTorch. Nothing is written.
    """
    started = time.perf_counter()
    target = Path(path)
    numbers = {"lr": lr, "momentum": momentum, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
    if micro_batch is not None and micro_batch < 1:
        raise ExportError(f"micro_batch is {micro_batch}; expected at least 1 row")
    _check_numbers(numbers | {"scale": scale} | ({} if clip is None else {"clip": clip}))
    rule, hypers = choose_optimizer(optimizer, numbers, proximal=proximal, clip=clip)
    if lora is None:
        chosen = choose_trainable(module, freeze=freeze, train_only=train_only, last=last)
    elif freeze or train_only is not None or last is not None:
        raise ExportError("LoRA freezes everything but its adapters; leave out freeze, train_only and last")
    else:
        module, chosen = add_adapters(module, lora)
    features = tuple(_feature(given, i, scale) for i, given in enumerate(inputs))
    resolved = resolve_loss(loss, **(loss_options or {}))
    wanted, outputs = _ports(module, features, targets, resolved, labels)
    problem = Problem(
        module, features, wanted, outputs, resolved, rule, proximal, control, hypers,
        chosen, changing_buffers(module, features), micro_batch
    )  # fmt: skip
    was = {key: part.training for key, part in module.named_modules()}
    try:
        training = training_graph(problem, rules, memory_budget, tune)
        problem = training.problem
        graphs = _graphs(training, rules)
    finally:
        for key, part in module.named_modules():
            part.training = was[key]
    parity = verify(problem, graphs)
    check_in_place(problem, graphs)
    load_ms = {kind: round(_load_ms(graphs, kind, problem.state), 2) for kind in ("train", "eval", "infer")}
    members = {
        "train.onnx": graphs.train,
        "eval.onnx": graphs.eval,
        "infer.onnx": graphs.infer,
        "weights.safetensors": save({n: t.contiguous().numpy() for n, t in problem.state.items()}),
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
        control=control,
        constants={
            f"{kind}.onnx": tuple(name.removeprefix("param.") for name in graphs.constants[kind])
            for kind in graphs.constants
        },
        opset=OPSET,
        least_runtime=LEAST_RUNTIME,
        files={member: hashlib.sha256(data).hexdigest() for member, data in members.items()},
        parity=parity,
        memory=training.memory.peak,
    )
    if personal:
        try:
            manifest = with_personal(manifest, personal)
        except BundleError as error:
            raise ExportError(str(error)) from error
    _write(target, {MANIFEST: manifest_bytes(manifest)} | members)
    sizes = {member: len(data) for member, data in members.items()}
    found = [
        Convolution(str(layer), choice.formulation.name, choice.milliseconds)
        for layer, choice in training.choices.made.items()
    ]
    return Report(manifest, target, sizes, time.perf_counter() - started, load_ms, tune, found, training.memory)


def _parameters(problem: Problem) -> tuple[Parameter, ...]:
    def described(tensor: Tensor) -> tuple[tuple[int, ...], str]:
        return tuple(tensor.shape), dtype_name(tensor.dtype)

    listed = []
    roles: tuple[tuple[Role, dict[str, Tensor]], ...] = (
        ("trainable", problem.trainable), ("buffer", problem.buffers), ("frozen", problem.frozen)
    )  # fmt: skip
    for role, tensors in roles:
        for name, tensor in tensors.items():
            shape, dtype = described(tensor)
            if role == "trainable" and dtype != "float32":
                raise ExportError(
                    f"parameter {name!r} is {dtype}; only float32 can be trained: call module.float() first"
                )
            listed.append(Parameter(name, shape, role, dtype))
    return tuple(listed)


def _graphs(training: Training, rules: Mapping[str, Rule]) -> Graphs:
    problem, choices = training.problem, training.choices
    features = (*problem.inputs, *problem.targets)
    module, outputs = problem.module, {feature.name for feature in problem.outputs}
    step, fixed = eval_step(problem)
    traced = trace(step, fixed, features, module.eval())
    evaluation, inference = lower(traced, rules, choices), lower(traced, rules, choices)
    evaluation.outputs = [port for port in evaluation.outputs if port.name not in outputs]
    inference.outputs = [port for port in inference.outputs if port.name in outputs]
    targets = {feature.name for feature in problem.targets}
    inference.inputs = [port for port in inference.inputs if port.name not in targets]
    for graph in (evaluation, inference):
        fix(graph, problem.state)
        optimize(graph)
    made = {"train": training.graph, "eval": evaluation, "infer": inference}
    return Graphs(
        **{kind: graph.to_model(kind) for kind, graph in made.items()},
        constants={kind: tuple(port.name for port in graph.external) for kind, graph in made.items()},
    )


def _load_ms(graphs: Graphs, kind: str, state: Mapping[str, Tensor]) -> float:
    constants = graphs.values(kind, dict(state))
    started = time.perf_counter()
    runtime.session(getattr(graphs, kind), constants=constants)
    return (time.perf_counter() - started) * 1e3


def _check_numbers(numbers: Mapping[str, float]) -> None:
    """Refuse what would train nothing or be no number, with the range."""
    for name, value in numbers.items():
        zero, below = name in ("momentum", "weight_decay", "clip", "beta1", "beta2"), name in ("beta1", "beta2")
        if not math.isfinite(value) or value < 0 or (value == 0 and not zero) or (below and value >= 1):
            wanted = "from 0 to below 1" if below else "of at least 0" if zero else "above 0"
            raise ExportError(f"{name} is {value:g}; expected a finite number {wanted}")


def _ports(
    module: nn.Module, inputs: tuple[Feature, ...], targets: Sequence[Feature] | None, loss: Loss, labels: Sequence[str]
) -> tuple[tuple[Feature, ...], tuple[Feature, ...]]:
    """Targets and outputs."""
    shapes = _output_shapes(module, inputs)
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
    for feature in (*inputs, *wanted):
        if feature.name in (STEP, SEED, "loss"):
            raise ExportError(f"an input is called {feature.name!r}, which the training graph needs; rename it")
    outputs = tuple(Feature(n, shape, "float32", labels=classes) for n, shape in zip(names, shapes, strict=True))
    return wanted, outputs


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
        with os.fdopen(descriptor, "wb") as file:
            write_members(file, members)
        Path(partial).chmod(0o644)
        Path(partial).replace(path)
    except OSError as error:
        Path(partial).unlink(missing_ok=True)
        raise ExportError(f"{path} cannot be written: {error.strerror}; choose another place with -o") from error
