"""``fedge export`` and its factories."""

from pathlib import Path

import pytest
from click.testing import CliRunner

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
