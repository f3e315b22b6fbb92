import dataclasses
import subprocess

import pytest

from deploy.image import bootstrap
from deploy.image.bootstrap import Base, ensure, sources
from edge_client.errors import ConfigError

COMPONENTS = "main non-free-firmware"


def programs(folder, monkeypatch, **texts):
    """Only these programs are on this machine, each a shell script."""
    for name, text in texts.items():
        path = folder / name.replace("_", "-")
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def test_packages_come_from_where_this_machines_apt_has_them(tmp_path, monkeypatch):
    told = (
        "http://mirror.example/debian/|bookworm|Debian\n"
        "http://mirror.example/debian/|bookworm|Debian\n"
        "http://mirror.example/debian-security/|bookworm-security|Debian\n"
        "http://mirror.example/debian/|trixie|Debian\n"
        "http://tools.example/|bookworm|Somebody\n"
    )
    programs(tmp_path, monkeypatch, apt_get=f"/bin/cat <<'E'\n{told}E")
    assert sources() == (
        f"deb http://mirror.example/debian bookworm {COMPONENTS}",
        f"deb http://mirror.example/debian-security bookworm-security {COMPONENTS}",
    )


def test_without_such_an_archive_mmdebstrap_has_its_own(tmp_path, monkeypatch):
    programs(tmp_path, monkeypatch, apt_get="echo 'http://mirror.example/|noble|Ubuntu'")
    assert sources() == ()


def test_a_mirror_that_is_named_is_the_one():
    assert sources("http://mirror.example/debian/") == (
        f"deb http://mirror.example/debian bookworm {COMPONENTS}",
        f"deb http://mirror.example/debian bookworm-updates {COMPONENTS}",
        f"deb http://mirror.example/debian-security bookworm-security {COMPONENTS}",
    )


def test_a_system_is_kept_until_something_that_it_is_made_of_changes(tmp_path, monkeypatch):
    base = Base(("deb http://mirror.example/debian bookworm main",))
    kept = tmp_path / f"system-{base.key()[:16]}.tar"
    kept.write_bytes(b"tar")
    assert ensure(base, tmp_path, lambda line: None) == kept
    others = [dataclasses.replace(base, sources=()).key()]
    for name, value in (
        ("PACKAGES", ("systemd",)),
        ("LEFT_OUT", ()),
        ("UNUSED", ()),
        ("_PREPARE", ""),
        ("_FINISH", ""),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(bootstrap, name, value)
            others.append(base.key())
    assert len({base.key(), *others}) == len(others) + 1


def test_a_machine_without_mmdebstrap_is_told_what_to_install(tmp_path, monkeypatch):
    programs(tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match=r"mmdebstrap and arch-test not found: .*qemu-user-static.*without --build"):
        ensure(Base(), tmp_path / "cache", lambda line: None)


def test_a_machine_that_cannot_run_the_boards_programs_is_told_how_it_would(tmp_path, monkeypatch):
    programs(tmp_path, monkeypatch, mmdebstrap="exit 0", arch_test="exit 1")
    monkeypatch.setattr(bootstrap.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(bootstrap.os, "geteuid", lambda: 1000)
    with pytest.raises(ConfigError, match=r"cannot run arm64 programs: install .*binfmt_misc.*update-binfmts"):
        ensure(Base(), tmp_path / "cache", lambda line: None)


def test_what_mmdebstrap_gives_up_for_is_said_and_nothing_is_kept(tmp_path, monkeypatch):
    fails = "echo 'I: installing'; echo 'E: Unable to locate package nosuch' >&2; exit 25"
    programs(tmp_path, monkeypatch, mmdebstrap=fails, arch_test="exit 0")
    cache = tmp_path / "cache"
    with pytest.raises(ConfigError, match=r"status 25: E: Unable to locate package nosuch; see .*mmdebstrap\.log"):
        ensure(Base(), cache, lambda line: None)
    assert [path.name for path in cache.iterdir()] == ["mmdebstrap.log"]


def test_what_mmdebstrap_writes_is_kept_whole(tmp_path, monkeypatch):
    writes = 'while [ "$1" != bookworm ]; do shift; done; echo tar >"$2"'
    programs(tmp_path, monkeypatch, mmdebstrap=writes, arch_test="exit 0")
    made = ensure(Base(), tmp_path / "cache", lambda line: None)
    assert made.read_text() == "tar\n"
    programs(tmp_path, monkeypatch, mmdebstrap="exit 1")
    assert ensure(Base(), tmp_path / "cache", lambda line: None) == made


def test_the_root_grows_with_a_script_that_a_shell_can_read():
    script = bootstrap.files("deploy.image") / "overlay" / "usr" / "lib" / "fedge" / "grow-root"
    subprocess.run(["/bin/sh", "-n", str(script)], check=True)
