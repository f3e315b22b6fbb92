"""A process that trains a module with onnxruntime-training and prints its step time.

python step_ort_training.py MODULE:FACTORY DATA.npz --program FOLDER --threads 1 --seconds 1.5

Its artifacts are made first where the folder is not there.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnx
import torch
from onnxruntime import SessionOptions
from onnxruntime.training import artifacts
from onnxruntime.training.api import CheckpointState, Module, Optimizer
from step_torch import BATCH, LR, load
from stopwatch import Stopwatch
from torch import Tensor, nn


class Rows(nn.Module):
    """One row of logits for each prediction, as its loss wants."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x).flatten(0, -2)


def write(module: nn.Module, x: Tensor, folder: Path) -> None:
    folder.mkdir(parents=True)
    model = str(folder / "forward.onnx")
    torch.onnx.export(
        Rows(module),
        (x[:BATCH],),
        model,
        input_names=["x"],
        output_names=["logits"],
        dynamic_axes={"x": {0: "batch"}},
        training=torch.onnx.TrainingMode.TRAINING,
        do_constant_folding=False,
        opset_version=15,
        dynamo=False,
    )
    trained = [name for name, parameter in Rows(module).named_parameters() if parameter.requires_grad]
    frozen = [name for name, parameter in Rows(module).named_parameters() if not parameter.requires_grad]
    artifacts.generate_artifacts(
        onnx.load(model),
        requires_grad=trained,
        frozen_params=frozen,
        loss=artifacts.LossType.CrossEntropyLoss,
        optimizer=artifacts.OptimType.SGD,
        artifact_directory=str(folder),
    )
    (folder / "complete").touch()


def train(folder: Path, x: Tensor, y: Tensor, threads: int, watch: Stopwatch) -> dict[str, float]:
    options = SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    state = CheckpointState.load_checkpoint(str(folder / "checkpoint"))
    paths = [str(folder / name) for name in ("training_model.onnx", "eval_model.onnx", "optimizer_model.onnx")]
    module = Module(paths[0], state, paths[1], session_options=options)
    optimizer = Optimizer(paths[2], module)
    optimizer.set_learning_rate(LR)
    module.train()
    inputs, labels = x.numpy(), y.numpy()
    rng, loss = np.random.default_rng(0), np.zeros(())
    while True:
        order = rng.permutation(len(inputs))
        for start in range(0, len(order), BATCH):
            if watch.over():
                return watch.report() | {"loss": float(loss)}
            index = order[start : start + BATCH]
            loss = module(inputs[index], labels[index].ravel())
            optimizer.step()
            module.lazy_reset_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("factory")
    parser.add_argument("data")
    parser.add_argument("--program", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.5)
    given = parser.parse_args()
    module, x, y = load(given.factory, given.data)
    if not (given.program / "complete").exists():
        write(module, x, given.program)
    print(json.dumps(train(given.program, x, y, given.threads, Stopwatch(given.seconds))))


if __name__ == "__main__":
    main()
