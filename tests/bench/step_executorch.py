"""A process that trains a module with ExecuTorch's training extension and prints its step time.

python step_executorch.py MODULE:FACTORY DATA.npz --program FILE.pte --threads 1 --seconds 1.5

The program is exported first where its file is not there. Batch 32 is baked in.
"""

import argparse
import json
from pathlib import Path

import torch
from executorch.exir import EdgeCompileConfig, to_edge
from executorch.extension.pybindings._C import _unsafe_reset_threadpool
from executorch.extension.training import _load_for_executorch_for_training, get_sgd_optimizer
from step_torch import BATCH, LR, load, loss_of
from stopwatch import Stopwatch
from torch import Tensor, nn
from torch.export import export
from torch.export.experimental import _export_forward_backward


class Loss(nn.Module):
    """The graph that is exported: its first output must be the loss."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return loss_of(self.module(x), y)


def write(module: nn.Module, x: Tensor, y: Tensor, path: Path) -> None:
    joint = _export_forward_backward(export(Loss(module), (x[:BATCH], y[:BATCH]), strict=True))
    program = to_edge(joint, compile_config=EdgeCompileConfig(_check_ir_validity=False)).to_executorch()
    with path.open("wb") as file:
        program.write_to_file(file)


def train(path: Path, x: Tensor, y: Tensor, watch: Stopwatch) -> dict[str, float]:
    module = _load_for_executorch_for_training(str(path))
    # Its parameters exist once it has run.
    module.forward_backward("forward", (x[:BATCH], y[:BATCH]))
    optimizer = get_sgd_optimizer(module.named_parameters(), LR)
    loss = torch.zeros(())
    while True:
        for index in torch.randperm(len(x)).split(BATCH):
            if watch.over():
                return watch.report() | {"loss": loss.item()}
            (loss,) = module.forward_backward("forward", (x[index], y[index]))
            optimizer.step(module.named_gradients())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("factory")
    parser.add_argument("data")
    parser.add_argument("--program", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.5)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    module, x, y = load(given.factory, given.data)
    if not given.program.exists():
        write(module, x, y, given.program)
    _unsafe_reset_threadpool(given.threads)
    print(json.dumps(train(given.program, x, y, Stopwatch(given.seconds))))


if __name__ == "__main__":
    main()
