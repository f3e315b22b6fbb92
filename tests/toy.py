"""A hand-made bundle and its data, for tests that need something to train and not a model exported by torch.

The model is softmax regression, or a perceptron with one hidden ReLU layer; its gradients are written out below, and
:func:`reference_step` says the same in numpy. Making a bundle takes milliseconds and always gives the same bytes.
"""

import hashlib
import io
import zipfile
from collections.abc import Callable, Mapping

import msgspec
import numpy as np
import numpy.typing as npt
import safetensors.numpy
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, checker, helper

from edge_client.manifest import FORMAT, Feature, Hyper, Manifest, Optimizer, Parameter

Arrays = dict[str, npt.NDArray[np.generic]]
OPSET = 18


def toy_bundle(
    features: int = 4,
    classes: int = 3,
    hidden: int = 0,
    momentum: bool = False,
    proximal: bool = False,
    *,
    frozen: bool = False,
    buffer: bool = False,
    control: bool = False,
    seed: int = 0,
    scale: float = 1.0,
    alter: Callable[[dict[str, bytes]], None] | None = None,
) -> bytes:
    """The bytes of a bundle: inputs ``x`` (float32 [features]), targets ``y`` (int64 []), output ``logits``.

    Trainable parameters: ``weight`` and ``bias``; where ``hidden`` is the width of a hidden layer, ``hidden.weight``
    and ``hidden.bias`` before them. ``frozen`` adds a frozen factor ``gain`` [features] of the input; ``buffer`` adds
    float ``mean`` [features] (a running mean of x, rate 0.1) and int64 ``seen`` [] (samples so far), which do not
    change the loss; ``control`` adds control variates. Hypers: lr 0.1, weight_decay 0, momentum 0.9 and mu 0.01 where
    asked for. ``alter`` may change the members before the zip is made.
    """
    parameters = _parameters(features, classes, hidden, frozen, buffer)
    rng = np.random.default_rng(seed)
    weights: Arrays = {}
    for parameter in parameters:
        if parameter.role == "trainable":
            weights[parameter.name] = rng.normal(0, 0.5, parameter.shape).astype(np.float32)
        else:
            weights[parameter.name] = (
                rng.uniform(0.5, 2, parameter.shape).astype(np.float32)
                if parameter.role == "frozen"
                else np.zeros(parameter.shape, parameter.dtype)
            )
    members = {
        "train.onnx": _train(parameters, hidden > 0, momentum, proximal, control).SerializeToString(deterministic=True),
        "eval.onnx": _evaluate(parameters, hidden > 0).SerializeToString(deterministic=True),
        "infer.onnx": _infer(parameters, hidden > 0).SerializeToString(deterministic=True),
        "weights.safetensors": safetensors.numpy.save(weights),
    }
    hypers = [Hyper("lr", 0.1), Hyper("weight_decay", 0.0)]
    hypers += [Hyper("momentum", 0.9)] * momentum + [Hyper("mu", 0.01)] * proximal
    manifest = Manifest(
        format=FORMAT,
        name="toy",
        parameters=parameters,
        inputs=(Feature("x", (features,), "float32", scale=scale),),
        targets=(Feature("y", (), "int64"),),
        outputs=(Feature("logits", (classes,), "float32"),),
        loss="cross_entropy",
        metrics=("correct",),
        optimizer=Optimizer("sgd", ("momentum",) if momentum else ()),
        hypers=tuple(hypers),
        proximal=proximal,
        control=control,
        constants={
            "train.onnx": tuple(p.name for p in parameters if p.role == "frozen"),
            "eval.onnx": tuple(p.name for p in parameters if p.role != "buffer"),
            "infer.onnx": tuple(p.name for p in parameters if p.role != "buffer"),
        },
        opset=OPSET,
        least_runtime="1.24",
        files={name: hashlib.sha256(data).hexdigest() for name, data in members.items()},
    )
    members["manifest.json"] = msgspec.json.encode(manifest)
    if alter is not None:
        alter(members)
    return zip_members(members)


def zip_members(members: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip of the members, in their order, dated 1980 so that its bytes depend on nothing else."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data, compression)
    return buffer.getvalue()


def toy_data(samples: int, seed: int = 0, *, features: int = 4, classes: int = 3, noise: float = 0.1) -> Arrays:
    """``x`` (float32 [samples, features]) and ``y`` (int64 [samples]), near linearly separable.

    The rule that labels them is the same for every seed, so that several clients and a test set fit together.
    """
    teacher = np.random.default_rng(1234).normal(size=(features, classes))
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(samples, features)).astype(np.float32)
    y = (x @ teacher + noise * rng.normal(size=(samples, classes))).argmax(1)
    return {"x": x, "y": y.astype(np.int64)}


def reference_step(
    weights: Mapping[str, npt.NDArray[np.float32]],
    velocity: Mapping[str, npt.NDArray[np.float32]],
    anchor: Mapping[str, npt.NDArray[np.float32]],
    x: npt.NDArray[np.float32],
    y: npt.NDArray[np.int64],
    *,
    lr: float = 0.1,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    mu: float = 0.0,
) -> tuple[dict[str, npt.NDArray[np.float32]], dict[str, npt.NDArray[np.float32]], float, int]:
    """What one run of the toy's train.onnx does, in float64 numpy: next weights, next velocity, mean loss, correct."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    inner = x.astype(np.float64)
    if "hidden.weight" in w:
        inner = np.maximum(inner @ w["hidden.weight"].T + w["hidden.bias"], 0)
    logits = inner @ w["weight"].T + w["bias"]
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    loss = float(-np.log(p[np.arange(len(y)), y]).mean())
    dz = (p - np.eye(p.shape[1])[y]) / len(y)
    gradients = {"weight": dz.T @ inner, "bias": dz.sum(0)}
    if "hidden.weight" in w:
        dh = (dz @ w["weight"]) * (inner > 0)
        gradients |= {"hidden.weight": dh.T @ x, "hidden.bias": dh.sum(0)}
    after, speed = {}, {}
    for name, value in w.items():
        gradient = gradients[name] + weight_decay * value + mu * (value - anchor[name])
        moved = momentum * velocity[name] + gradient
        after[name] = (value - lr * moved).astype(np.float32)
        speed[name] = moved.astype(np.float32)
    return after, speed, loss, int((logits.argmax(1) == y).sum())


def _parameters(features: int, classes: int, hidden: int, frozen: bool, buffer: bool) -> tuple[Parameter, ...]:
    found = [Parameter("gain", (features,), "frozen")] if frozen else []
    if hidden:
        found += [
            Parameter("hidden.weight", (hidden, features), "trainable"),
            Parameter("hidden.bias", (hidden,), "trainable"),
        ]
    if buffer:
        found += [Parameter("mean", (features,), "buffer"), Parameter("seen", (), "buffer", "int64")]
    found += [
        Parameter("weight", (classes, hidden or features), "trainable"),
        Parameter("bias", (classes,), "trainable"),
    ]
    return tuple(found)


class _Graph:
    """Nodes, inputs, outputs and constants of a graph under construction."""

    def __init__(self, parameters: tuple[Parameter, ...]) -> None:
        self.parameters = {parameter.name: parameter for parameter in parameters}
        self.nodes: list[NodeProto] = []
        self.inputs: list[ValueInfoProto] = []
        self.outputs: list[ValueInfoProto] = []
        self.constants: list[TensorProto] = []
        self.handed_over: list[Parameter] = []

    def add(self, op: str, *inputs: str, to: str | None = None, **attributes: object) -> str:
        name = to or f"v{len(self.nodes)}"
        # A trailing underscore keeps Cast's own attribute "to" apart from the name of the result.
        named = {key.rstrip("_"): value for key, value in attributes.items()}
        self.nodes.append(helper.make_node(op, list(inputs), [name], **named))
        return name

    def constant(self, value: npt.NDArray[np.generic]) -> str:
        name = f"c{len(self.constants)}"
        kind = TensorProto.FLOAT if value.dtype == np.float32 else TensorProto.INT64
        self.constants.append(helper.make_tensor(name, kind, value.shape, value.ravel().tolist()))
        return name

    def input(self, name: str, shape: tuple[int | str, ...], dtype: str = "float32") -> str:
        self.inputs.append(_info(name, shape, dtype))
        return name

    def output(self, name: str, shape: tuple[int | str, ...], dtype: str = "float32") -> str:
        self.outputs.append(_info(name, shape, dtype))
        return name

    def model(self) -> ModelProto:
        # The checker would look for a file of the constants that are handed over.
        given = [_info(f"param.{p.name}", p.shape, p.dtype) for p in self.handed_over]
        graph = helper.make_graph(self.nodes, "toy", [*self.inputs, *given], self.outputs, self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)
        checker.check_model(model, full_check=True)
        del model.graph.input[len(self.inputs) :]
        for p in self.handed_over:
            tensor = TensorProto(name=f"param.{p.name}", data_type=TensorProto.FLOAT, dims=p.shape)
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value="fedge")
            model.graph.initializer.append(tensor)
        return model


def _info(name: str, shape: tuple[int | str, ...], dtype: str) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT if dtype == "float32" else TensorProto.INT64, shape)


def _forward(graph: _Graph, deep: bool, training: bool = False) -> tuple[str, str, str]:
    """Inputs and layers up to the logits; returns the model's input, the last layer's input and the logits."""
    for parameter in graph.parameters.values():
        if training and parameter.role != "frozen":
            graph.input(f"param.{parameter.name}", parameter.shape, parameter.dtype)
        elif parameter.role != "buffer":
            graph.handed_over.append(parameter)
    features = graph.parameters["hidden.weight" if deep else "weight"].shape[1]
    entry = inner = graph.input("x", ("batch", features))
    if "gain" in graph.parameters:
        entry = inner = graph.add("Mul", "x", "param.gain")
    if deep:
        inner = graph.add("Relu", graph.add("Gemm", entry, "param.hidden.weight", "param.hidden.bias", transB=1))
    return entry, inner, graph.add("Gemm", inner, "param.weight", "param.bias", transB=1, to="logits")


def _sums(graph: _Graph) -> tuple[str, str]:
    """Adds ``sum.correct``; returns the summed loss and the one-hot targets."""
    classes = graph.parameters["weight"].shape[0]
    graph.input("y", ("batch",), "int64")
    column = graph.add("Unsqueeze", "y", graph.constant(np.array([1])))
    hot = graph.add("Cast", graph.add("Equal", column, graph.constant(np.arange(classes))), to_=1)
    picked = graph.add("Mul", graph.add("LogSoftmax", "logits", axis=1), hot)
    total = graph.add("Neg", graph.add("ReduceSum", picked, keepdims=0))
    right = graph.add("Equal", graph.add("ArgMax", "logits", axis=1, keepdims=0), "y")
    graph.add("ReduceSum", graph.add("Cast", right, to_=1), keepdims=0, to=graph.output("sum.correct", ()))
    return total, hot


def _count(graph: _Graph, to: str | None = None) -> str:
    size = graph.add("Gather", graph.add("Shape", "x"), graph.constant(np.array(0)))
    return graph.add("Cast", size, to_=1, to=to)


def _infer(parameters: tuple[Parameter, ...], deep: bool) -> ModelProto:
    graph = _Graph(parameters)
    _forward(graph, deep)
    graph.output("logits", ("batch", graph.parameters["weight"].shape[0]))
    return graph.model()


def _evaluate(parameters: tuple[Parameter, ...], deep: bool) -> ModelProto:
    graph = _Graph(parameters)
    _forward(graph, deep)
    total, _ = _sums(graph)
    graph.add("Identity", total, to=graph.output("sum.loss", ()))
    _count(graph, to=graph.output("sum.count", ()))
    return graph.model()


def _train(parameters: tuple[Parameter, ...], deep: bool, momentum: bool, proximal: bool, control: bool) -> ModelProto:
    graph = _Graph(parameters)
    entry, inner, _ = _forward(graph, deep, training=True)
    total, hot = _sums(graph)
    count = _count(graph)
    graph.add("Div", total, count, to=graph.output("loss", ()))
    dz = graph.add("Div", graph.add("Sub", graph.add("Softmax", "logits", axis=1), hot), count)
    rows = graph.constant(np.array([0]))
    gradients = {
        "weight": graph.add("Gemm", dz, inner, transA=1),
        "bias": graph.add("ReduceSum", dz, rows, keepdims=0),
    }
    if deep:
        active = graph.add("Cast", graph.add("Greater", inner, graph.constant(np.array(0, np.float32))), to_=1)
        back = graph.add("MatMul", dz, "param.weight")
        dh = graph.add("Mul", back, active)
        # The update of the weight waits for this last reader of it: a shape of zeros keeps every dimension.
        zeros = graph.add("Mul", graph.add("Size", back), graph.constant(np.zeros(2, np.int64)))
        gradients["weight"] = graph.add("Reshape", gradients["weight"], zeros)
        gradients["hidden.weight"] = graph.add("Gemm", dh, entry, transA=1)
        gradients["hidden.bias"] = graph.add("ReduceSum", dh, rows, keepdims=0)
    for name in ("lr", "weight_decay", *["momentum"] * momentum, *["mu"] * proximal):
        graph.input(f"hyper.{name}", ())
    for name, gradient in gradients.items():
        if control:
            variate = graph.input(f"control.{name}", graph.parameters[name].shape)
            gradient = graph.add("Add", gradient, variate)
        _update(graph, graph.parameters[name], gradient, momentum, proximal)
    if "mean" in graph.parameters:
        _running(graph, rows)
    return graph.model()


def _update(graph: _Graph, parameter: Parameter, gradient: str, momentum: bool, proximal: bool) -> None:
    name, shape = parameter.name, parameter.shape
    step = graph.add("Add", gradient, graph.add("Mul", "hyper.weight_decay", f"param.{name}"))
    if proximal:
        away = graph.add("Sub", f"param.{name}", graph.input(f"anchor.{name}", shape))
        step = graph.add("Add", step, graph.add("Mul", "hyper.mu", away))
    if momentum:
        kept = graph.add("Mul", "hyper.momentum", graph.input(f"slot.momentum.{name}", shape))
        step = graph.add("Add", kept, step, to=graph.output(f"next.momentum.{name}", shape))
    moved = graph.add("Mul", "hyper.lr", step)
    graph.add("Sub", f"param.{name}", moved, to=graph.output(f"next.{name}", shape))


def _running(graph: _Graph, rows: str) -> None:
    mean = graph.add("ReduceMean", "x", rows, keepdims=0)
    apart = graph.add("Sub", mean, "param.mean")
    change = graph.add("Mul", apart, graph.constant(np.array(0.1, np.float32)))
    graph.add("Add", "param.mean", change, to=graph.output("next.mean", graph.parameters["mean"].shape))
    size = graph.add("Gather", graph.add("Shape", "x"), graph.constant(np.array(0)))
    graph.add("Add", "param.seen", size, to=graph.output("next.seen", (), "int64"))
