"""A process that trains a module with PyTorch, by the usual loop, and prints its step time; or the step's FLOP.

python step_torch.py MODULE:FACTORY DATA.npz --threads 1 [--compile] [--channels-last] [--seconds 1.5 | --steps 1]
python step_torch.py MODULE:FACTORY DATA.npz --flop

Nothing of fedge is imported but the factory's module.
"""

import argparse
import importlib
import json

import numpy as np
import torch
import torch.nn.functional as F
from stopwatch import Stopwatch
from torch import Tensor, nn

LR = 0.001
BATCH = 32


def load(factory: str, data: str) -> tuple[nn.Module, Tensor, Tensor]:
    place, _, name = factory.partition(":")
    torch.manual_seed(0)
    module: nn.Module = getattr(importlib.import_module(place), name)()
    with np.load(data) as arrays:
        x, y = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"])
    return module.train(), x.float() / 255 if x.dtype == torch.uint8 else x, y


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def train(module: nn.Module, x: Tensor, y: Tensor, watch: Stopwatch) -> dict[str, float]:
    """The usual loop, until the watch ends it."""
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=LR)
    loss = torch.zeros(())
    while True:
        for index in torch.randperm(len(x)).split(BATCH):
            if watch.over():
                return watch.report() | {"loss": loss.item()}
            optimizer.zero_grad()
            loss = loss_of(module(x[index]), y[index])
            loss.backward()
            optimizer.step()


def flop(module: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """GFLOP of one step: matrix products and convolutions, forward and backward."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # The counter knows the products that attention is made of, not the fused operator for CPUs.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss_of(module(x[:BATCH]), y[:BATCH]).backward()
    return {"gflop": counter.get_total_flops() / 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("factory")
    parser.add_argument("data")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--flop", action="store_true")
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--steps", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    module, x, y = load(given.factory, given.data)
    if given.channels_last:
        module, x = module.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    if given.flop:
        print(json.dumps(flop(module, x, y)))
        return
    if given.compile:
        module.compile()
        loss_of(module(x[:BATCH]), y[:BATCH]).backward()
    print(json.dumps(train(module, x, y, Stopwatch(given.seconds, given.steps))))


if __name__ == "__main__":
    main()
