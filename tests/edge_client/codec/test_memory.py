"""Large models are encoded and decoded in bounded memory, measured on processes of their own.

``FEDGE_MODEL=100000000`` tries a hundred million parameters (about a minute and 1 GiB).
"""

import json
import os
import resource
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from edge_client.codec.blocks import BLOCK
from edge_client.codec.layout import Layout, TensorSpec
from edge_client.codec.update import CodecSettings, decode_update, encode_update
from edge_client.codec.vector import VectorEncoder
from edge_client.codec.versions import CodedState, apply_delta, encode_delta
from tests.edge_client.codec.conftest import planted

ROOT = Path(__file__).parents[3]
SIDE = 2000
PARAMETERS = int(os.environ.get("FEDGE_MODEL", 24_000_000))
LAYOUT = Layout(tuple(TensorSpec(f"t{i}", (SIDE, SIDE)) for i in range(PARAMETERS // SIDE**2)))


def resident() -> int:
    """Most bytes of memory that this process had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def vector() -> np.ndarray:
    """A few directions and noise in each tensor, made without much memory beside it."""
    rng = np.random.default_rng(1)
    whole = np.empty(LAYOUT.size, np.float32)
    for _, where in LAYOUT.slices():
        matrix = whole[where].reshape(SIDE, SIDE)
        rng.standard_normal(out=matrix, dtype=np.float32)
        for at in range(0, SIDE, 100):
            left, right = rng.standard_normal((100, 4), np.float32), rng.standard_normal((4, SIDE), np.float32)
            matrix[at : at + 100] += left @ right
    return whole


def encode(path: str, step: float) -> int:
    """Bytes that encoding took beside the vector."""
    delta = vector()
    before = resident()
    data = encode_update({"delta": delta}, {"delta": LAYOUT}, {}, CodecSettings(target="step", value=step)).data
    taken = resident() - before
    Path(path).write_bytes(data)
    return taken


def decode(path: str) -> int:
    """Bytes that decoding took, the model itself with them."""
    data = Path(path).read_bytes()
    before = resident()
    decode_update(data, {"delta": LAYOUT})
    return resident() - before


def version(path: str) -> None:
    """A version of two codes, as a delta."""
    encoder = VectorEncoder(vector(), LAYOUT)
    code = encoder.encode(3 * encoder.rms)
    Path(path).write_bytes(encode_delta(CodedState(LAYOUT), CodedState(LAYOUT, (code, code))))


def take_delta(path: str) -> int:
    """Bytes that applying it took, the new version with them."""
    data = Path(path).read_bytes()
    before = resident()
    apply_delta(CodedState(LAYOUT), data, LAYOUT)
    return resident() - before


def measured(call: str) -> int | None:
    script = f"import json; from tests.edge_client.codec.test_memory import *; print(json.dumps({call}))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    found: int | None = json.loads(done.stdout)
    return found


def test_an_update(tmp_path):
    size = 4 * LAYOUT.size
    path = str(tmp_path / "update")
    assert measured(f"encode({path!r}, 1.0)") < 3 * size
    # The model, and what a block of four million elements takes.
    assert measured(f"decode({path!r})") < size + 30 * BLOCK


def test_a_delta(tmp_path):
    path = str(tmp_path / "delta")
    assert measured(f"version({path!r})") is None
    # The sum of the codes, the one that is added to it, and what a block takes.
    assert measured(f"take_delta({path!r})") < 2 * 4 * LAYOUT.size + 30 * BLOCK


@pytest.mark.parametrize("bits", [0.1, 1.0])
def test_a_model_of_one_block(bits):
    """Beside the vector: what is left out, which is as large, and what the encoder needs."""
    layout = Layout((TensorSpec("w", (1000, 1500)), TensorSpec("b", (1000,))))
    delta = planted(layout, 1)
    tracemalloc.start()
    try:
        encode_update({"delta": delta}, {"delta": layout}, {}, CodecSettings(target="bits", value=bits))
        assert tracemalloc.get_traced_memory()[1] < 3 * delta.nbytes
    finally:
        tracemalloc.stop()
