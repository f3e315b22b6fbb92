"""``fedge export`` and its factories."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from edge_client.bundle import Bundle
from edge_client.errors import ExportError
from export.cli import export, load_module


def test_exports_and_reports(tmp_path: Path) -> None:
    path = tmp_path / "d.fedge"
    command = [
        "export.models.logistic:logistic_regression",
        "--input",
        "1,28,28",
        "--scale",
        "0.00392",
        "-o",
        str(path),
    ]
    result = CliRunner().invoke(export, command, catch_exceptions=False)
    assert result.exit_code == 0
    assert "7,850 trainable parameters" in result.output
    assert "worst relative error" in result.output
    assert path.is_file()


def test_options_of_the_optimizer_and_of_partial_training(tmp_path: Path) -> None:
    file, path = tmp_path / "mine.py", tmp_path / "m.fedge"
    file.write_text(
        "from torch import nn\n\ndef make():\n    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))\n"
    )
    words = f"{file}:make --input 4 --optimizer adamw --beta1 0.8 --clip 1.5 --control --freeze 0.* -o {path}".split()
    output = CliRunner().invoke(export, words, catch_exceptions=False).output
    assert "10 trainable parameters and 20 frozen" in output
    assert "loads in" in output
    manifest = Bundle.open(path).manifest
    assert manifest.defaults() == {
        "lr": 0.05, "weight_decay": 0.0, "beta1": 0.8, "beta2": 0.999, "eps": 1e-8, "max_norm": 1.5
    }  # fmt: skip
    assert manifest.control

    words = f"{file}:make --input 4 --lora-rank 2 --lora-target 0 -o {path}".split()
    assert "16 trainable parameters and 30 frozen" in CliRunner().invoke(export, words, catch_exceptions=False).output
    with pytest.raises(ExportError, match="need --lora-rank"):
        CliRunner().invoke(export, [*words[:3], "--lora-alpha", "2"], catch_exceptions=False)


def test_the_report_says_what_was_measured(tmp_path: Path) -> None:
    path, written = tmp_path / "d.fedge", tmp_path / "d.json"
    words = f"export.models.digits:digits_cnn --input 1,8,8 -v --report {written} -o {path}".split()
    output = CliRunner().invoke(export, words, catch_exceptions=False).output
    report = json.loads(written.read_text())
    assert set(report["load_ms"]) == {"train", "eval", "infer"}
    assert report["sizes"].keys() == {"train.onnx", "eval.onnx", "infer.onnx", "weights.safetensors"}
    assert 0 < report["seconds"] < 60
    assert report["parity"]["worst_relative_error"] < report["parity"]["tolerance"]
    assert report["parameters"] == {"trainable": 38_282}
    assert report["tuned"]
    first, second = report["convolutions"]
    assert first == {"layer": "1->16 3x3 on 8x8", "formulation": "taps", "milliseconds": {}}
    assert second["layer"] == "16->32 3x3 on 8x8"
    assert second["formulation"] in second["milliseconds"]
    assert min(second["milliseconds"].values()) > 0
    assert f"16->32 3x3 on 8x8: {second['formulation']} (" in output

    with pytest.raises(ExportError, match="name a file that can be written"):
        CliRunner().invoke(
            export, [*words[:-2], "--report", str(tmp_path / "no" / "d.json"), "-o", str(path)], catch_exceptions=False
        )


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("models", "not of the form"),
        ("no.such.package:make", "cannot be imported: ModuleNotFoundError"),
        ("no_such_file.py:make", "there is no file"),
        ("export.models.digits:cnn", "has no 'cnn'; it has digits_cnn"),
        ("export.models.shakespeare:CharacterModel", "failed: TypeError"),
        ("os:getcwd", "returned str; expected a torch.nn.Module"),
        ("export.bundle:LEAST_RUNTIME", "is a str; name a function"),
    ],
)
def test_bad_factories(factory: str, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        load_module(factory)


def test_a_file_as_factory(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("from torch import nn\n\ndef make():\n    return nn.Linear(2, 2)\n")
    assert load_module(f"{file}:make")
    file.write_text("import nothing_like_this\n")
    with pytest.raises(ExportError, match="cannot be imported"):
        load_module(f"{file}:make")


def test_a_bad_shape() -> None:
    command = ["export.models.logistic:logistic_regression", "--input", "1,x"]
    with pytest.raises(ExportError, match="not a shape"):
        CliRunner().invoke(export, command, catch_exceptions=False)
