"""A process that encodes and decodes one update and prints what it takes.

python codec_cost.py UPDATE.npz SETTINGS [--seconds 2]

The settings are `edge_client.codec.update.CodecSettings` as JSON. Speeds are medians, in million parameters a second
of processor time, which is the time of one core that does nothing else; the environment must say that threads are one.
Memory is what encoding adds to the peak, the result included, in sizes of the vector: the larger of what the system and
what Python's allocator count.
"""

import argparse
import json
import resource
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
from stored import Update

from broker_server.aggregation.fedavg import fedavg
from broker_server.aggregation.weighting import Report
from edge_client.codec.layout import Layout, TensorSpec
from edge_client.codec.update import CodecSettings, EncodedUpdate, decode_update, encode_update


def encode(update: Update, settings: CodecSettings) -> EncodedUpdate:
    return encode_update({"delta": update.vector}, {"delta": update.layout}, {"samples": 1}, settings)


def resident() -> int:
    """Peak resident bytes of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory(update: Update, settings: CodecSettings) -> float:
    """Extra memory of encoding, in sizes of the vector."""
    # What is loaded and cached on first use is no part of it.
    few = np.random.default_rng(0).standard_normal(4096, np.float32)
    encode(Update(few, Layout((TensorSpec("weight", (64, 64)),))), settings)
    before = resident()
    encode(update, settings)
    grown = resident() - before
    tracemalloc.start()
    encode(update, settings)
    traced = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return max(grown, traced) / update.vector.nbytes


def rate(update: Update, work: Callable[[], object], seconds: float) -> float:
    """Million parameters a second."""
    taken: list[float] = []
    while len(taken) < 3 or sum(taken) < seconds:
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return update.vector.size / statistics.median(taken) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("update", type=Path)
    parser.add_argument("settings")
    parser.add_argument("--seconds", type=float, default=2.0)
    given = parser.parse_args()
    update = Update.read(given.update)
    settings = msgspec.json.decode(given.settings, type=CodecSettings)
    extra = memory(update, settings)
    encoded = encode(update, settings)
    aggregator = fedavg()
    total = aggregator.init(update.vector.size)

    def receive() -> None:
        aggregator.add(total, decode_update(encoded.data, {"delta": update.layout}).vectors["delta"], Report())

    found = {
        "bits": 8 * len(encoded.data) / update.vector.size,
        "encode_mparams_s": rate(update, lambda: encode(update, settings), given.seconds),
        "decode_mparams_s": rate(update, receive, given.seconds),
        "encode_extra_memory": extra,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
