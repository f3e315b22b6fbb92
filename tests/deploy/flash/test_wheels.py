"""The wheels for another machine: fetched once by pip, complete, and with them fedge and pip of this one."""

import hashlib
import zipfile

import pytest

from deploy.flash import wheels
from edge_client.errors import FlashError
from tests.cards import index, wheel


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """pip takes from a folder of small wheels, and from nowhere else."""
    folder = index(tmp_path / "index")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_they_are_complete_listed_and_kept(tmp_path, offline, monkeypatch):
    found = wheels.collect("3.13", tmp_path / "cache")
    names = {name.partition("-")[0] for name in found if name.endswith(".whl")}
    assert {"fedge", "pip", "onnxruntime", "numpy", "paho_mqtt", "cryptography"} <= names
    assert not any("cp311-cp311" in name for name in found)
    lines = found["SHA256SUMS"].read_text().splitlines()
    assert sorted(line[66:] for line in lines) == sorted(set(found) - {"SHA256SUMS"})
    assert all(hashlib.sha256(found[line[66:]].read_bytes()).hexdigest() == line[:64] for line in lines)
    # A second time, pip is not asked.
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    again = wheels.collect("3.13", tmp_path / "cache")
    assert again == found
    assert again["SHA256SUMS"].read_text().splitlines() == lines


def test_what_was_damaged_since_is_fetched_again(tmp_path, offline):
    found = wheels.collect("3.13", tmp_path / "cache")
    (name,) = (name for name in found if name.startswith("numpy"))
    good = found[name].read_bytes()
    found[name].write_bytes(b"damaged")
    assert wheels.collect("3.13", tmp_path / "cache")[name].read_bytes() == good


def test_an_index_that_lacks_a_wheel_is_told(tmp_path, offline):
    for path in offline.glob("numpy-*"):
        path.unlink()
    with pytest.raises(FlashError, match=r"pip download failed.*numpy"):
        wheels.collect("3.13", tmp_path / "cache")


def test_requirements_count_as_the_other_machine_sees_them(tmp_path):
    own = wheel(tmp_path, "own", needs=['old>=2; python_version < "3.12"', 'arm; platform_machine == "aarch64"'])
    assert wheels.missing([own], "3.13") == {"arm"}
    assert wheels.missing([own], "3.11") == {"arm", "old>=2"}
    arm, old = wheel(tmp_path, "arm"), wheel(tmp_path, "old", "1.9")
    assert wheels.missing([own, arm, old], "3.11") == {"old>=2"}


def test_fedge_is_packed_with_its_units_and_the_same_each_time(tmp_path):
    first = wheels.repack("fedge", tmp_path)
    data = first.read_bytes()
    assert wheels.repack("fedge", tmp_path).read_bytes() == data
    with zipfile.ZipFile(first) as archive:
        names = set(archive.namelist())
        assert archive.testzip() is None
    assert {"edge_client/cli.py", "deploy/systemd/fedge-client.service", "deploy/firstboot/install.sh"} <= names
    assert not any("__pycache__" in name or name.endswith(".pyc") for name in names)


def test_what_is_not_installed_cannot_be_packed(tmp_path):
    with pytest.raises(FlashError, match="pip install no-such-thing"):
        wheels.repack("no-such-thing", tmp_path)


def test_a_source_tree_on_the_path_does_not_hide_what_is_installed(tmp_path, monkeypatch):
    egg = tmp_path / "fedge.egg-info"
    egg.mkdir()
    (egg / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: fedge\nVersion: 0.0.1\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "-0.0.1-" not in wheels.repack("fedge", tmp_path).name
