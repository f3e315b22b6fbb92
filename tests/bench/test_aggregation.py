"""Rules over all updates of a task need the memory of some of their elements: the benchmark, in small."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from broker_server.aggregation.blocks import ROOM
from edge_client.codec.update import CodecSettings, encode_update

SCRIPT = Path(__file__).parent / "aggregation.py"
PARAMS, CLIENTS = 400_000, 160


def test_memory_is_bounded_whatever_the_number_of_updates(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import aggregation

    update = np.random.default_rng(1).laplace(0, 0.01, PARAMS).astype(np.float32)
    layouts = {"delta": aggregation.layout(PARAMS)}
    data = encode_update({"delta": update}, layouts, {"samples": 1}, CodecSettings()).data
    for number in range(aggregation.DIFFERENT):
        for noise in aggregation.NOISE.values():
            (tmp_path / f"{noise}-{number}").write_bytes(data)
    options = ["--params", str(PARAMS), "--clients", str(CLIENTS), "--robust", "krum"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options, "--prepared", str(tmp_path), "--scratch", str(tmp_path)],
        cwd=SCRIPT.parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    everything = 4 * PARAMS * CLIENTS / 2**20
    assert everything > 240
    assert 0 < found["memory_mib"] < 4 * ROOM / 2**20
