"""Memory of a device stays what it is, however many steps and tasks it does."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

RUN = """
from edge_client import runtime
from edge_client.bundle import Bundle
from edge_client.codec.update import CodecSettings, encode_update
from edge_client.data import ArraySource
from edge_client.trainer import Trainer
from edge_client.wire.messages import TrainPlan
from tests.toy import toy_bundle, toy_data

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

runtime.spare_memory()
bundle = Bundle.from_bytes(toy_bundle(features=64, classes=10, hidden=64, momentum=True))
trainer, source = Trainer(bundle), ArraySource(toy_data(330, features=64, classes=10))
seen = []

def watch():
    seen.append(resident())
    return False

trainer.train(bundle.initial(), source, TrainPlan(steps=10_000, batch_size=32), seed=0, stop=watch)
print(seen[1_000], seen[-1])
marks = []
for task in range(300):
    model = bundle.initial()
    trainer.train(model, source, TrainPlan(steps=5, batch_size=32), seed=task)
    encode_update({"delta": model - bundle.initial()}, {"delta": bundle.layout}, {}, CodecSettings())
    marks.append(resident())
print(marks[100], marks[-1])
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_memory_does_not_grow_over_10000_steps_and_over_tasks() -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for line in done.stdout.splitlines():
        early, late = map(int, line.split())
        assert late - early < 1 << 20, done.stdout
