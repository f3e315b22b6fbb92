"""A process that trains a bundle as ``fedge join`` does and prints its step time; or the runtime's Gemm rate.

python step_fedge.py BUNDLE DATA.npz --threads 1 [--spin] [--seconds 1.5 | --steps 1]
python step_fedge.py --gemm MODEL.onnx --threads 1 [--seconds 1.5]
"""

import argparse
import json
import time

import numpy as np
from stopwatch import Stopwatch

from edge_client import runtime
from edge_client.bundle import Bundle
from edge_client.data import ArraySource
from edge_client.trainer import Trainer
from edge_client.wire.messages import TrainPlan

LR = 0.001


def train(path: str, data: str, threads: int, spin: bool, watch: Stopwatch) -> dict[str, float]:
    """Train until the watch ends it; the trainer asks before each step whether to stop."""
    runtime.spare_memory()
    bundle = Bundle.open(path)
    with np.load(data) as arrays:
        source = ArraySource(dict(arrays))
    plan = TrainPlan(steps=10_000_000, batch_size=32, hypers={"lr": LR})
    result = Trainer(bundle, threads=threads, spin=spin).train(bundle.initial(), source, plan, seed=0, stop=watch.over)
    return watch.report() | {"loss": result.loss}


def gemm(path: str, threads: int, enough: float) -> dict[str, float]:
    """GFLOP/s of the graph's one Gemm of square matrices: the best of its runs, as it stands for a limit."""
    with open(path, "rb") as file:
        session = runtime.session(file.read(), threads=threads)
    size = session.get_inputs()[0].shape[0]
    rng = np.random.default_rng(0)
    given = {value.name: rng.standard_normal((size, size), np.float32) for value in session.get_inputs()}
    seconds = []
    while sum(seconds) < enough:
        start = time.perf_counter()
        session.run(None, given)
        seconds.append(time.perf_counter() - start)
    return {"gflops": 2 * size**3 / min(seconds) / 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?")
    parser.add_argument("data", nargs="?")
    parser.add_argument("--gemm")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--spin", action="store_true")
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--steps", type=int, default=0)
    given = parser.parse_args()
    if given.gemm:
        print(json.dumps(gemm(given.gemm, given.threads, given.seconds)))
    else:
        watch = Stopwatch(given.seconds, given.steps)
        print(json.dumps(train(given.bundle, given.data, given.threads, given.spin, watch)))


if __name__ == "__main__":
    main()
