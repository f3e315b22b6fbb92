"""The README's commands and snippets, executed in order in an empty folder, as a reader would."""

import lzma
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from broker_server.authority import REGISTRY
from broker_server.broker import EmbeddedBroker, find_mosquitto
from broker_server.config import load
from broker_server.registry import Registry
from tests import cards
from tests.datasets import LOADERS, DataSet

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)(?: file=(\S+))?\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)

# Run by CI itself: a test that runs all tests does not end.
ELSEWHERE = {"make test", "make lint"}
# An authority, and a broker that asks for certificates.
FLEET = re.compile(r"\bfleet\b|fedge (ca|revoke)")
# Cards: the programs that handle images, besides.
CARDS = re.compile(r"fedge flash|pip download")
DATA = Path(os.environ.get("FEDGE_DATA", ROOT.parent / "shared" / "data"))
SMALL = {
    "make bench-round": ("tests/bench/round.py", ""),
    "make bench-training": (
        "tests/bench/training.py",
        "digits --seconds 0.02 --threads 1 --attempts 1 --chapters steps,memory,start",
    ),
    "make bench-memory": ("tests/bench/memory.py", "digits --seconds 0.05"),
    "make bench-uploads": ("tests/bench/uploads.py", "--clients 10 --size 200000"),
    "make bench-aggregation": ("tests/bench/aggregation.py", "--params 50000 --clients 5"),
    "make bench-attacks": ("tests/bench/attacks.py", "--quick"),
}
"""What benchmarks run, and with what they take seconds."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run(command: list[str], folder: Path, environment: dict[str, str], seconds: float) -> None:
    """Run a program and everything it starts; what still runs at the end is ended with it."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        pytest.fail(f"{command} took more than {seconds:.0f} s and said:\n{said}")
    assert process.returncode == 0, f"{command} ended with {process.returncode} and said:\n{said}"


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    # What `make test` was given is not for the commands.
    own = {name: value for name, value in os.environ.items() if name not in ("ARGS", "MAKEFLAGS", "MFLAGS")}
    return own | {"PATH": path, "PYTHONUNBUFFERED": "1", "ORT_DISABLE_TELEMETRY": "1"} | more


def kind(language: str, text: str) -> str:
    lines = set(text.strip().splitlines())
    if language == "sh" and lines <= ELSEWHERE:
        return "elsewhere"
    if language == "sh" and any(re.search(r"\bmake bench|tests/bench|build/data", line) for line in lines):
        return "bench"
    if language == "sh" and lines == {"make demo"}:
        return "demo"
    if language == "sh" and any(line.startswith("fedge doctor --broker") for line in lines):
        return "doctor"
    if CARDS.search(text):
        return "cards"
    return "fleet" if FLEET.search(text) else "walk"


def test_every_block_is_of_a_kind_that_is_run():
    assert {language for language, _, _ in BLOCKS} == {"sh", "python", "toml"}
    kinds = [kind(language, text) for language, _, text in BLOCKS]
    assert kinds.count("demo") == 1
    assert kinds.count("bench") == 2
    assert kinds.count("elsewhere") == 1
    assert kinds.count("doctor") == 1
    assert kinds.count("walk") >= 9
    assert kinds.count("fleet") == 6
    assert kinds.count("cards") == 3


def test_the_robust_rules_are_part_of_a_federation_file_that_is_taken(tmp_path):
    files = {name: text for _, name, text in BLOCKS if name}
    federation = re.sub(r"^(cohort|minimum) = \d+", r"\1 = 8", files["federation.toml"], flags=re.MULTILINE)
    (tmp_path / "federation.toml").write_text(f"{federation}\n{files['robust.toml']}", encoding="utf-8")
    assert load(tmp_path / "federation.toml").aggregation.algorithm == "multi-krum"


@pytest.mark.timeout(480)
def test_walk_through(tmp_path):
    """Model, export, training, federation, enrolment, phones: each block works on what the ones before have left."""
    ports = {"1883": str(free_port()), "8883": str(free_port())}
    kinds = {"walk"} if find_mosquitto() is None else {"walk", "fleet"}
    own = environment(PYTHONPATH=str(tmp_path), BENCH_SECONDS="0.2")
    if "fleet" in kinds and not cards.LACKING:
        kinds.add("cards")
        cards.card(tmp_path / "os.img", "cloud-init")
        image = lzma.compress((tmp_path / "os.img").read_bytes(), preset=0)
        (tmp_path / "raspios-lite-arm64.img.xz").write_bytes(image)
        (tmp_path / "wifi.txt").write_text("a good passphrase\n", encoding="utf-8")
        (tmp_path / "id_ed25519.pub").write_text(f"ssh-ed25519 {'A' * 68} me@here\n", encoding="utf-8")
        cards.index(tmp_path / "index")
        for name in ("fedge", "pip"):
            cards.wheel(tmp_path / "index", name, "99.0")
        own |= {"PIS": "2", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "index")}
        own |= {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    for language, name, text in BLOCKS:
        if kind(language, text) not in kinds:
            continue
        text = re.sub("|".join(ports), lambda found: ports[found[0]], text)
        if name:
            (tmp_path / name).write_text(text, encoding="utf-8")
            continue
        program = ["bash", "-euo", "pipefail", "-c"] if language == "sh" else [sys.executable, "-c"]
        # As in a terminal, where the folder of a script is on its path.
        run([*program, text], tmp_path, own, 120)
    assert (tmp_path / "state" / "models" / "best" / "infer.onnx").exists()
    assert (tmp_path / "results.json").exists()
    if "fleet" in kinds:
        assert (tmp_path / "fleet-state" / "models" / "best" / "infer.onnx").exists()
        with Registry.open(tmp_path / "authority" / REGISTRY) as registry:
            assert registry.standing(time.time()) == (("pi-0",), ("pi-1", "pi-2"))
        # What joined was asked for its certificate, and said nothing without its signature.
        assert (tmp_path / "fleet-0" / "witness.msgpack").exists()
        if "cards" in kinds:
            claims = [
                cards.boot_files(tmp_path / f"images/pi-{number}.img")["fedge/claim.fedgeclaim"] for number in (1, 2)
            ]
            assert claims[0] != claims[1]
        assert "require_certificate true" in (tmp_path / "broker" / "mosquitto.conf").read_text(encoding="utf-8")


def test_the_doctor_is_content_with_our_own_broker(tmp_path):
    (text,) = [text for language, _, text in BLOCKS if kind(language, text) == "doctor"]
    with EmbeddedBroker.start(tmp_path / "broker", port=free_port()) as broker:
        text = text.replace("mqtt://127.0.0.1:1883", broker.url)
        run(["bash", "-euo", "pipefail", "-c", text], tmp_path, environment(), 60)


def test_make_demo_is_the_demo_command():
    """tests/test_demo.py runs the command; make only has to call it."""
    assert "fedge demo -o build/demo" in made("demo")


def made(target):
    """What make would run."""
    return subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def few_samples(tmp_path_factory):
    """The data sets of the benchmarks with all their clients, but some twenty samples for each of a hundred of them."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("fashion-mnist", "mnist-writers", "shakespeare"):
        whole = LOADERS[name]()
        few = DataSet(*(thinned(part, rows) for part, rows in ((whole.train, 2000), (whole.test, 500))))
        few.write(folder / name)
    return folder


def thinned(arrays, rows):
    """Evenly spread rows of a data set, and the first of each user."""
    kept = np.linspace(0, len(arrays["y"]) - 1, rows).astype(int)
    if "user" in arrays:
        kept = np.union1d(kept, np.unique(arrays["user"], return_index=True)[1])
    return {key: values[kept] for key, values in arrays.items()}


@pytest.mark.timeout(300)
@pytest.mark.skipif(not DATA.exists(), reason=f"needs the data sets in {DATA}")
@pytest.mark.parametrize(
    "line", [line for la, _, text in BLOCKS if kind(la, text) == "bench" for line in text.split("\n") if line]
)
def test_benchmark_commands_run_small(line, tmp_path, few_samples):
    if find_mosquitto() is None:
        pytest.skip("needs the Debian package mosquitto")
    small = environment(FEDGE_BUILD=str(tmp_path), FEDGE_ROUNDS="1", FEDGE_PAIRS="1")
    line = line.replace(".venv/bin/python", sys.executable)
    if line.startswith("make"):
        script, options = SMALL[line]
        assert f"python {script}" in made(line.removeprefix("make "))
        line = f"{sys.executable} {script} {options}"
    (tmp_path / "data").symlink_to(few_samples)
    if "build/data" in line:
        line = line.replace("build/data", str(few_samples)) + " --rounds 1 --warmup 0"
    run(["bash", "-euc", line], ROOT, small, 280)
    # This one only prints.
    assert "fedavg_torch.py" in line or list((tmp_path / "bench").glob("*.json"))
