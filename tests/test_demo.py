"""``fedge demo`` as ``make demo`` calls it: offline, with the results that the README names."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FIELDS = ["accuracy", "rounds", "seconds", "clients", "bytes_up", "bytes_down", "fp32_bytes_up", "fp32_bytes_down"]


@pytest.mark.timeout(240)
def test_the_demo_does_what_it_stands_for(tmp_path):
    output = tmp_path / "demo"
    done = subprocess.run(
        [Path(sys.executable).with_name("fedge"), "demo", "-o", str(output)],
        env=os.environ | {"ORT_DISABLE_TELEMETRY": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((output / "summary.json").read_text())
    assert list(summary) == FIELDS
    assert summary["accuracy"] >= 0.95
    assert summary["clients"] == 20
    assert summary["fp32_bytes_up"] >= 10 * summary["bytes_up"] > 0
    assert summary["fp32_bytes_down"] >= 3 * summary["bytes_down"] > 0
    assert (output / "run.png").read_bytes().startswith(b"\x89PNG")
    for name in ("best", "last"):
        kept = {entry.name for entry in (output / "models" / name).iterdir()}
        assert {
            "infer.onnx",
            "infer.int8-dynamic.onnx",
            "infer.int8-static.onnx",
            "global.safetensors",
            "report.json",
        } <= kept
