"""A device's file: what it says becomes the command line's options, and mistakes are one line."""

import pytest
from click.testing import CliRunner

from edge_client.cli import join
from edge_client.errors import ConfigError
from edge_client.service.gate import ALWAYS
from edge_client.service.settings import DeviceSettings

BAD = {
    "missing": (None, "No such file"),
    "no TOML": ("broker = ", "device.toml: "),
    "unknown": ("brokr = 'x'", "unknown field `brokr`"),
    "type": ("threads = 'two'", "Expected `int"),
    "share": ("share = 'faces'", "share is 'faces'; expected labels, features, both with a comma, or nothing"),
    "rule": ("[training]\nhours = ['noon']", "expected a window such as"),
    "negative": ("[data]\nkeep_mib = -1", "expected 0 or more"),
    "no memory": ("[data]\nmemory_mib = 0", "memory_mib"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_names_the_file_and_what_is_wrong(tmp_path, name):
    text, expected = BAD[name]
    path = tmp_path / "device.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=r"device\.toml") as caught:
        DeviceSettings.load(path)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def joined(monkeypatch):
    """What `fedge join` would be called with."""
    found = {}
    monkeypatch.setattr(join, "callback", lambda **options: found.update(options))

    def call(*arguments):
        result = CliRunner().invoke(join, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return found

    return call


def test_the_file_says_what_the_command_line_does_not(tmp_path, joined):
    path = tmp_path / "device.toml"
    path.write_text(
        'broker = "mqtt://h"\nid = "pi"\nthreads = 3\nholdout = 0.25\nspin = true\nshare = "labels"\n'
        '[data]\nsource = "x.npz"\nkeep_days = 2\nkeep_mib = 1\n[training]\nhottest = 60\n'
    )
    found = joined("--config", str(path), "--threads", "2")
    assert (found["url"], found["client"], found["data"]) == ("mqtt://h", "pi", "x.npz")
    assert (found["threads"], found["holdout"], found["spin"], found["once"]) == (2, 0.25, True, False)
    assert found["share"] == "labels"
    assert found["config"].training.hottest == 60
    assert (found["config"].data.retention.size, found["config"].data.retention.seconds) == (1 << 20, 172_800)
    assert joined("mqtt://other", "--config", str(path))["url"] == "mqtt://other"


def test_without_a_file_a_client_trains_always(joined):
    found = joined("mqtt://h", "--id", "pi", "--data", "x.npz")
    assert (found["config"].training, found["share"]) == (ALWAYS, "")
