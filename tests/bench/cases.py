"""The training benchmark's cases: a factory, its input, and a set of samples that every contender reads."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from federations import FEDGE, command

SAMPLES = 256
"""Eight batches of 32: small enough to be made at once, large enough that batches differ."""


@dataclass(frozen=True)
class Case:
    """A model to train by cross-entropy at batch 32."""

    title: str
    factory: str
    shape: tuple[int, ...]
    """Of one sample; codes below ``classes`` where ``codes``, else values of a standard normal distribution."""
    classes: int
    codes: bool = False
    """Whether samples are sequences of codes, with a target for each."""
    convolution: bool = False
    """Whether it is made of 2-D convolutions, which channels-last memory may speed up in PyTorch."""


CASES = {
    "2nn": Case("2NN MLP", "export.models.mcmahan:mnist_2nn", (1, 28, 28), 10),
    "cnn": Case("McMahan CNN", "export.models.mcmahan:mnist_cnn", (1, 28, 28), 10, convolution=True),
    "digits": Case("digits CNN", "export.models.digits:digits_cnn", (1, 8, 8), 10, convolution=True),
    "ds-cnn": Case("DS-CNN", "export.models.keyword:ds_cnn", (1, 49, 10), 12, convolution=True),
    "resnet8": Case("ResNet-8", "export.models.resnet:resnet8", (3, 32, 32), 10, convolution=True),
    "sensor-cnn": Case("1-D sensor CNN", "export.models.sensors:sensor_cnn", (9, 128), 6),
    "gru": Case("GRU, 40 characters", "export.models.shakespeare:char_gru", (40,), 80, codes=True),
    "transformer": Case("transformer, 2 layers", "export.models.transformer:char_transformer", (64,), 80, codes=True),
    "lora": Case("LoRA, 4 frozen layers", "export.models.lora:gpt_lora", (64,), 80, codes=True),
}


def write_samples(case: Case, path: Path) -> None:
    """``x [256, *shape]`` float32 or int64, and ``y`` int64 as the targets are."""
    rng = np.random.default_rng(0)
    size = (SAMPLES, *case.shape)
    x = rng.integers(0, case.classes, size) if case.codes else rng.standard_normal(size, np.float32)
    y = rng.integers(0, case.classes, size if case.codes else SAMPLES)
    np.savez(path, x=x, y=y)


def export_case(case: Case, bundle: Path, variables: dict[str, str], *options: str) -> None:
    """Export the case's model by the command line, in a process of its own.

    Raises:
        BenchError: it cannot be exported.
    """
    kind = "int64" if case.codes else "float32"
    shape = ",".join(map(str, case.shape))
    command(
        [str(FEDGE), "export", case.factory, "--input", shape, "--input-dtype", kind, *options, "-o", str(bundle)],
        bundle.with_suffix(".export.txt"),
        variables=variables,
    )


def write_gemm(path: Path, size: int = 1024) -> None:
    """A graph of one Gemm of two square matrices, neither of them constant: what a training step is made of."""
    from onnx import TensorProto, helper, save

    a, b, c = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [size, size]) for name in "abc")
    graph = helper.make_graph([helper.make_node("Gemm", ["a", "b"], ["c"])], "gemm", [a, b], [c])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(path))
