import io
import sys
import tarfile
import zipfile

import pytest

from deploy.image.layer import Layer
from deploy.image.packages import PYTHON
from deploy.image.release import release, service, version
from edge_client.errors import ConfigError

RELEASE = "opt/fedge/releases/7.1"
needs_same_python = pytest.mark.skipif(sys.version_info[:2] != PYTHON, reason="needs the image's Python")


def wheel(folder, name, tag="py3-none-any", **files):
    path = folder / f"{name}-7.1-{tag}.whl"
    info = f"{name}-7.1.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        for module, text in files.items():
            archive.writestr(f"{module}.py", text)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 7.1\n")
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def packed(layer):
    with tarfile.open(fileobj=io.BytesIO(layer.pack())) as tar:
        return {member.name: member.linkname or (tar.extractfile(member) or io.BytesIO()).read() for member in tar}


@needs_same_python
def test_a_release_is_a_venv_of_the_systems_python_with_byte_code(tmp_path):
    layer = Layer()
    wheels = [wheel(tmp_path, "fedge", fedge_like="x = 1"), wheel(tmp_path, "other", other="y = 2")]
    release(layer, wheels, tmp_path / "scratch")
    files = packed(layer)
    library = f"{RELEASE}/lib/python3.11/site-packages"
    assert files["opt/fedge/current"] == "releases/7.1"
    assert files[f"{RELEASE}/.whole"] == b""
    assert files[f"{RELEASE}/bin/python3"] == "/usr/bin/python3"
    assert files[f"{RELEASE}/bin/fedge"].startswith(f"#!/{RELEASE}/bin/python\n".encode())
    assert b"include-system-site-packages = false" in files[f"{RELEASE}/pyvenv.cfg"]
    assert {f"{library}/fedge_like.py", f"{library}/other.py"} <= set(files)
    code = files[f"{library}/__pycache__/other.cpython-311.pyc"]
    # Not looked up against the source's time, which the card does not keep (PEP 552), and at home where it will lie.
    assert code[4:8] == (1).to_bytes(4, "little")
    assert f"/{library}/other.py".encode() in code


def test_wheels_for_another_processor_are_refused(tmp_path):
    wheels = [wheel(tmp_path, "fedge"), wheel(tmp_path, "other", "cp311-cp311-manylinux_2_28_x86_64")]
    with pytest.raises(ConfigError, match=r"other.*expected wheels for aarch64"):
        release(Layer(), wheels, tmp_path / "scratch")


def test_the_version_is_the_clients(tmp_path):
    one, other = wheel(tmp_path, "fedge"), wheel(tmp_path, "other")
    assert version([one, other]) == "7.1"
    for wheels in ([other], [one, one]):
        with pytest.raises(ConfigError, match="wheels of fedge"):
            version(wheels)


def test_a_device_has_the_units_of_a_device_and_they_are_on():
    layer = Layer()
    service(layer)
    files = packed(layer)
    units = "usr/lib/systemd/system"
    for name in ("fedge-client", "fedge-enroll", "fedge-firstboot"):
        assert f"{units}/{name}.service" in files
        link = f"etc/systemd/system/multi-user.target.wants/{name}.service"
        assert files[link] == f"/{units}/{name}.service"
    assert not [name for name in files if "server" in name]
    assert {"usr/local/lib/fedge/firstboot.py", "usr/local/lib/fedge/enroll.py"} <= set(files)
    assert b"Storage=volatile" in files["usr/lib/systemd/journald.conf.d/fedge.conf"]
