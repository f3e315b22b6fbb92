import io
import tarfile

from deploy.image.layer import Layer


def opened(layer):
    return tarfile.open(fileobj=io.BytesIO(layer.pack()))


def test_folders_come_before_what_is_in_them_and_all_is_roots():
    layer = Layer()
    layer.file("etc/fedge/device.toml", b"x")
    layer.link("opt/current", "releases/1")
    with opened(layer) as tar:
        members = tar.getmembers()
    assert [member.name for member in members] == ["etc", "etc/fedge", "etc/fedge/device.toml", "opt", "opt/current"]
    assert all((member.uid, member.gid) == (0, 0) for member in members)
    assert members[-1].linkname == "releases/1"


def test_scripts_and_programs_are_executable_and_the_rest_is_not():
    layer = Layer()
    layer.file("a", b"#!/bin/sh\n")
    layer.file("b", b"\x7fELF...")
    layer.file("c", b"text")
    layer.file("d", b"secret", 0o600)
    with opened(layer) as tar:
        assert [member.mode for member in tar.getmembers()] == [0o755, 0o755, 0o644, 0o600]


def test_bytes_depend_on_nothing_but_the_files(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "file").write_text("same")
    (tmp_path / "in" / "file").chmod(0o664)
    (tmp_path / "link").symlink_to("in/file")
    one, other = Layer(), Layer()
    one.tree("etc", tmp_path)
    other.link("etc/link", "in/file")
    other.file("etc/in/file", b"same")
    assert one.digest() == other.digest()
    other.file("etc/in/file", b"else")
    assert one.digest() != other.digest()
