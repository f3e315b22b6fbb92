"""The codec benchmark on tiny vectors and without NNCodec: every part runs and yields its fields."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.toy import toy_bundle

BENCH = Path(__file__).parent
OTHERS = "stc,eden,qsgd,int8_zstd,fp16"


def load(name: str) -> ModuleType:
    """A script's module, found as the scripts find each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        return importlib.import_module(name)


codec, updates = load("codec"), load("updates")


def run(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, str(BENCH / "codec.py"), *arguments, "--beside", OTHERS, "--seconds", "0"],
        env=os.environ | {"FEDGE_BUILD": str(folder), "FEDGE_SIDE": "64"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, "subprocess.CompletedProcess[str]"]:
    folder = tmp_path_factory.mktemp("build")
    return folder, run(folder, "gaussian", "laplace")


def test_points_have_their_fields(done):
    folder, process = done
    assert process.returncode == 0, process.stdout + process.stderr
    result = json.loads((folder / "bench" / "codec.json").read_text())
    assert {point["source"] for point in result["points"]} == {"gaussian", "laplace"}
    assert len(result["points"]) == 2 * len(codec.SWEEP)
    for point in result["points"]:
        assert point["codec_bits"] > 0
        assert 0 < point["nmse"] < 1
        assert point["ratio_to_nncodec"] is None
        other = codec.at(result["curves"][point["source"]]["stc"], point["codec_bits"])
        assert point["ratio_to_stc"] == (None if other is None else pytest.approx(point["nmse"] / other))
    assert any(point["ratio_to_eden"] for point in result["points"])
    assert result["synthetic_gap_bits"] > 0  # nothing at these sizes comes for free
    assert min(result[name] for name in ("encode_mparams_s", "decode_mparams_s", "encode_extra_memory")) > 0
    assert result["failed"] == {}
    assert {"cpu", "cores", "versions"} <= set(result["machine"])


def test_a_table_and_a_plot_are_written(done):
    folder, process = done
    table = (folder / "bench" / "codec.md").read_text()
    assert "| NMSE over NNCodec's, 0.1 to 1.25 bits | at most 0.8 | not measured |  |" in table
    assert table in process.stdout
    plot = (folder / "bench" / "codec.svg").read_text()
    assert "Gaussian, synthetic" in plot
    assert len(plot) < 100_000


def test_other_codecs_are_measured_once(done):
    folder, _ = done
    again = run(folder, "gaussian")
    assert again.returncode == 0, again.stderr
    assert "points (" not in again.stdout


def test_an_unknown_source_is_refused(tmp_path):
    process = run(tmp_path, "no-such-source")
    assert process.returncode == 2
    assert "'no-such-source' is no source; there are cnn" in process.stderr


def test_a_goal_is_judged_by_its_worst_point_of_a_real_update():
    def point(source: str, bits: float, ratio: float | None) -> dict[str, object]:
        fields = {f"ratio_to_{name}": ratio for name in codec.COMPARED}
        return {"source": source, "codec_bits": bits, "nmse": 0.1} | fields

    points = [point("gaussian", 0.5, 2.0), point("gru", 0.5, 0.7), point("gru", 1.0, None), point("gru", 2.0, 0.95)]
    rows = {title: (shown, met) for title, _, shown, met in codec.verdict({"points": points, "decode_mparams_s": 90})}
    assert rows["NMSE over NNCodec's, 0.1 to 1.25 bits"] == ("0.700 (gru, 0.50 bits; 1 points)", "yes")
    assert rows["NMSE over NNCodec's, above"][1] == "yes"
    assert rows["NMSE over EDEN's, from 0.35 bits"][1] == "**no**"
    assert rows["decode and accumulate, million parameters a second"] == ("90.0", "**no**")
    assert rows["encode, million parameters a second"] == ("not measured", "")


def test_a_federations_updates_hold_residuals_and_are_repeatable():
    rng = np.random.default_rng(0)
    arrays = {"x": rng.standard_normal((60, 4), np.float32), "y": rng.integers(0, 3, 60)}
    bundle = updates.Bundle.from_bytes(toy_bundle())
    plan = updates.TrainPlan(batch_size=10, hypers={"lr": 0.1})
    parts = np.array_split(np.arange(60), 3)
    coarse = updates.Federation(bundle, arrays, parts, 2, plan)
    exact = updates.Federation(bundle, arrays, parts, 2, plan, codec=updates.CodecSettings(kind="none"))
    found, again, without = (list(one.updates(4)) for one in (coarse, coarse, exact))
    assert [number for number, _ in found] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert all((a.vector == b.vector).all() for (_, a), (_, b) in zip(found, again, strict=True))
    assert (found[0][1].vector == without[0][1].vector).all()  # none has a residual yet
    assert any((a.vector != b.vector).any() for (_, a), (_, b) in zip(found, without, strict=True))


def test_an_update_survives_its_file(tmp_path):
    layout = updates.Layout((updates.TensorSpec("w", (2, 3)), updates.TensorSpec("b", (2,))))
    update = updates.Update(np.arange(8, dtype=np.float32), layout)
    update.write(tmp_path / "update.npz")
    found = updates.Update.read(tmp_path / "update.npz")
    assert found.layout == layout
    assert found.sizes == [6, 2]
    assert (found.vector == update.vector).all()
