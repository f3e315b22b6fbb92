import zipfile

import pytest

from deploy.image import build as building
from deploy.image.bootstrap import Base
from deploy.image.build import build


@pytest.fixture
def made(tmp_path, monkeypatch):
    """What is put together, one entry for each image, with everything slow left out."""
    found = []

    def assemble(image, layers, scratch):
        found.append([path.name for path in layers])
        image.write_bytes(b"card")

    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(building, "ensure", lambda base, cache, log: cache / "system.tar")
    monkeypatch.setattr(building, "sources", lambda mirror: (f"deb {mirror} bookworm main",))
    monkeypatch.setattr("deploy.image.card.assemble", assemble)
    monkeypatch.setattr("deploy.image.release.release", lambda layer, wheels, scratch: None)
    return found


def wheel(folder, text):
    path = folder / "fedge-7.1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("edge_client.py", text)
    return path


def test_an_image_is_made_once_for_what_it_is_made_of(tmp_path, made, monkeypatch):
    cache, lines = tmp_path / "cache", []
    client = wheel(tmp_path, "x = 1")

    def image(mirror="http://one.example"):
        return build([client, tmp_path / "SHA256SUMS"], cache=cache, mirror=mirror, log=lines.append)

    first = image()
    assert first.read_bytes() == b"card"
    assert first.name.startswith("fedge-7.1-")
    assert "Raspberry Pi 5 does not boot it" in lines[-1]
    assert image() == first
    assert made == [["system.tar", "client.tar"]]
    others = {image("http://other.example")}
    wheel(tmp_path, "x = 2")
    others.add(image())
    with monkeypatch.context() as patch:
        patch.setattr(Base, "key", lambda base: "another system")
        others.add(image())
    with monkeypatch.context() as patch:
        patch.setattr("deploy.image.release.service", lambda layer: layer.file("etc/more", b""))
        others.add(image())
    assert len(others - {first}) == 4
    assert len(made) == 5


def test_what_fails_leaves_no_image(tmp_path, made, monkeypatch):
    def fails(image, layers, scratch):
        image.write_bytes(b"half")
        raise OSError

    monkeypatch.setattr("deploy.image.card.assemble", fails)
    with pytest.raises(OSError):  # noqa: PT011
        build([wheel(tmp_path, "x = 1")], cache=tmp_path / "cache", log=lambda line: None)
    assert not list((tmp_path / "cache").iterdir())
