"""The privileged part: what it installs and what not, how it goes back, and that power cuts do no harm."""

import ast
import ensurepip
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from deploy.update import place, updater
from deploy.update.machine import Machine, RefusedError
from deploy.update.updater import Updater
from edge_client.trust.keys import SigningKey
from tests.deploy.update.bench import BROKEN, DAY, NOW, Device, record, stage, wheel


@pytest.fixture(autouse=True)
def the_disk_is_not_waited_for(monkeypatch):
    """A machine under test has other things to write, which take long."""
    monkeypatch.setattr(updater.os, "sync", lambda: None)
    monkeypatch.setattr(updater.os, "fsync", lambda _: None)


@pytest.fixture
def device(tmp_path):
    return Device(tmp_path / "device")


def release(device, tmp_path, version="0.2.0", *, code=None, key=None, **more):
    made = wheel(tmp_path / "wheels", version, **({} if code is None else {"code": code}))
    device.staged(record(made, version=version, **more), made, key=key)
    return made


def test_a_good_release_is_installed_and_kept_once_it_has_heard_the_server(device, tmp_path):
    release(device, tmp_path)
    said = device.update()
    assert (said["version"], said["stage"]) == ("0.2.0", "healthy")
    assert (device.runs, os.readlink(device.base / "previous")) == ("0.2.0", "releases/0.1.0")
    assert device.machine.started == ["0.2.0"]
    # Woken again by the same file: nothing is left to do.
    assert device.update()["stage"] == "healthy"
    assert device.machine.started == ["0.2.0"]


def test_where_what_judges_gives_no_answer_the_release_is_refused_and_that_is_said(device, tmp_path, monkeypatch):
    release(device, tmp_path)
    for number, said in enumerate(("", "[]", "{}", '{"error": ""}', '{"error": "", "version": "0.2.0", "files": 3}')):
        (device.base / "journal.json").unlink(missing_ok=True)
        monkeypatch.setattr(device.machine, "judge", lambda *_, said=said: json.loads(said))
        assert device.update()["stage"] == "refused", number
        assert device.runs == "0.1.0"


def test_one_that_cannot_be_imported_never_takes_the_place_of_the_client(device, tmp_path):
    release(device, tmp_path, code=BROKEN)
    said = device.update()
    assert said["stage"] == "refused"
    assert "does not start: No module named 'a_library" in said["detail"]
    assert (device.runs, device.machine.started) == ("0.1.0", [])
    assert not (device.base / "releases" / "0.2.0").exists()


def test_one_that_does_not_hear_the_server_makes_way_for_the_one_before(device, tmp_path):
    release(device, tmp_path)
    device.machine.hears = False
    said = device.update()
    assert (said["stage"], said["detail"]) == ("back", "the new client has not heard the server within 600 s")
    assert (device.runs, device.machine.started) == ("0.1.0", ["0.2.0", "0.1.0"])
    # The same one is not tried again, and a newer one is.
    device.machine.hears = True
    device.update()
    assert device.runs == "0.1.0"
    release(device, tmp_path, "0.2.1")
    device.update()
    assert (device.runs, os.readlink(device.base / "previous")) == ("0.2.1", "releases/0.1.0")
    assert sorted(entry.name for entry in (device.base / "releases").iterdir()) == ["0.1.0", "0.2.1"]


def test_one_that_ends_again_and_again_makes_way_before_its_time_is_over(device, tmp_path):
    release(device, tmp_path)
    device.machine.hears, device.machine.ends = False, 5
    assert device.update()["detail"] == "the new client ended 5 times by itself"
    assert device.runs == "0.1.0"
    assert device.machine.time == 0


def test_one_that_takes_the_device_down_makes_way_after_some_starts(device, tmp_path):
    release(device, tmp_path)
    device.machine.sleep = lambda _: (_ for _ in ()).throw(PowerCut)
    device.machine.hears = False
    for _ in range(4):
        with pytest.raises(PowerCut):
            device.update()
        assert device.runs == "0.2.0"
    assert device.update()["stage"] == "back"
    assert device.runs == "0.1.0"


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"key": SigningKey.generate()}, "signature"),
        ({"expires": NOW - DAY}, "expired"),
        ({"version": "0.0.9"}, "older than 0.1.0"),
        ({"issued": NOW + DAY}, "ahead of the clock"),
    ],
    ids=["forged", "expired", "older", "of the future"],
)
def test_a_release_that_is_not_believed_changes_nothing(device, tmp_path, more, reason):
    release(device, tmp_path, **more)
    said = device.update()
    assert said["stage"] == "refused"
    assert reason in said["detail"]
    assert (device.runs, device.machine.started) == ("0.1.0", [])


def test_a_wheel_that_is_not_the_one_that_was_signed_is_not_installed(device, tmp_path):
    made = release(device, tmp_path)
    name = record(made, version="0.2.0").files[0].blob.sha256.hex()
    stage(device.root, f"{name}.whl", made.read_bytes()[:-1] + b"!")
    assert "not the file that was signed" in device.update()["detail"]
    assert device.runs == "0.1.0"


def test_a_release_of_before_is_not_installed_again_unless_it_is_issued_to_go_back(device, tmp_path):
    release(device, tmp_path, "0.2.0")
    device.update()
    release(device, tmp_path, "0.3.0", issued=NOW + 30)
    device.update()
    release(device, tmp_path, "0.2.0")
    assert "older than one that was installed here" in device.update()["detail"]
    assert device.runs == "0.3.0"
    release(device, tmp_path, "0.2.0", issued=NOW + 40, back=True)
    device.update()
    assert device.runs == "0.2.0"


def test_links_that_the_client_puts_in_the_way_are_not_followed(device, tmp_path):
    secret = tmp_path / "shadow"
    secret.write_text("root's alone")
    made = release(device, tmp_path)
    name = record(made, version="0.2.0").files[0].blob.sha256.hex()
    staged = stage(device.root, f"{name}.whl", b"")
    staged.unlink()
    staged.symlink_to(secret)
    assert "is not there" in device.update()["detail"]
    os.mkfifo(stage(device.root, "x", b"").with_name("pipe"))
    pipe = staged.with_name("release.signed")
    pipe.unlink()
    os.mkfifo(pipe)
    device.update()  # does not wait for who never writes
    state = device.root / "var" / "lib" / "fedge" / "state"
    shutil.move(state, tmp_path / "elsewhere")
    state.symlink_to(tmp_path / "elsewhere")
    device.update()
    assert device.runs == "0.1.0"


def test_keys_that_a_release_brings_are_believed_once_it_has_proved_itself(device, tmp_path):
    new = SigningKey.generate()
    release(device, tmp_path, pins=(new.public, device.key.public))
    device.update()
    release(device, tmp_path, "0.3.0", key=new, pins=(new.public,))
    device.update()
    release(device, tmp_path, "0.4.0")  # by the old key
    assert "signature" in device.update()["detail"]
    assert device.runs == "0.3.0"


class PowerCut(BaseException):
    """Nothing catches it."""


class Cuts:
    """Counts what changes the disk, and cuts the power at one of them: before it, or half-way through a build."""

    def __init__(self, monkeypatch, device, at):
        self.left, self.device = at, device
        for name in ("replace", "symlink", "link", "sync"):
            monkeypatch.setattr(updater.os, name, self.counted(getattr(updater.os, name)))
        self.build = device.machine.build
        device.machine.restart = self.counted(device.machine.restart)
        device.machine.build = self.halfway

    def halfway(self, folder, *more):
        folder.mkdir(parents=True)
        self.step()
        folder.rmdir()
        self.build(folder, *more)

    def counted(self, real):
        def instead(*arguments, **named):
            self.step()
            return real(*arguments, **named)

        return instead

    def step(self):
        self.left -= 1
        if self.left == 0:
            raise PowerCut


@pytest.mark.parametrize("hears", [True, False], ids=["good", "deaf"])
def test_a_power_cut_at_any_moment_leaves_a_client_and_the_update_is_gone_on_with(tmp_path, hears):
    made = wheel(tmp_path / "wheels", "0.2.0")
    for at in range(1, 200):
        device = Device(tmp_path / f"device-{at}")
        device.machine.hears = hears
        device.staged(record(made, version="0.2.0"), made)
        with pytest.MonkeyPatch.context() as patched:
            cuts = Cuts(patched, device, at)
            try:
                device.update()
            except PowerCut:
                assert device.runs in ("0.1.0", "0.2.0")
            over = cuts.left > 0
        del device.machine.restart, device.machine.build
        said = device.update()
        assert (said["stage"], device.runs) == (("healthy", "0.2.0") if hears else ("back", "0.1.0")), at
        assert json.loads((device.base / "journal.json").read_text())["phase"] == "idle"
        shutil.rmtree(device.root)
        if over:
            break
    assert 15 < at < 199


def test_the_updater_is_copied_once_and_believes_the_claim_of_the_card(tmp_path):
    base, claim = tmp_path / "opt" / "fedge", tmp_path / "claim"
    claim.write_text(json.dumps({"federation": "toys", "pins": ["00" * 32], "key": "secret"}))
    base.mkdir(parents=True)
    place.place(base)
    place.trust(base, claim)
    claim.write_text(json.dumps({"federation": "others", "pins": []}))
    place.trust(base, claim)
    assert json.loads((base / "trust.json").read_text()) == {"federation": "toys", "pins": ["00" * 32]}
    copied = {path.relative_to(base / "update").as_posix() for path in (base / "update").rglob("*.py")}
    assert copied == {"__main__.py", "deploy/__init__.py", *(f"deploy/update/{part}" for part in place.PARTS)}
    assert Updater(tmp_path)._journal.phase == "idle"


@pytest.mark.parametrize("part", place.PARTS)
def test_what_is_copied_needs_nothing_but_python(part):
    nodes = list(ast.walk(ast.parse((Path(place.__file__).parent / part).read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name for name in names if name.split(".")[0] not in sys.stdlib_module_names} <= {"deploy.update.machine"}


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


def test_a_client_that_the_processor_cannot_run_is_found_out_before_it_is_the_client(tmp_path):
    script(tmp_path / "bin" / "python", "kill -ILL $$\n")
    with pytest.raises(RefusedError, match=r"the new client does not start: ended by SIGILL$"):
        Machine(user="").probe(tmp_path)


def test_systemd_is_asked_for_what_it_alone_knows(tmp_path):
    machine = Machine(systemctl=str(script(tmp_path / "systemctl", f'echo "$@" >> {tmp_path}/said; echo 7\n')))
    machine.restart()
    assert machine.restarts() == 7
    assert (tmp_path / "said").read_text().splitlines() == [
        "reset-failed fedge-client.service",
        "restart --no-block fedge-client.service",
        "show --property=NRestarts --value fedge-client.service",
    ]


def test_the_whole_of_it_as_it_is_on_a_device(tmp_path):
    """The copied program, a real environment made of wheels without a network, and a judge in the client that runs."""
    device = Device(tmp_path / "device")
    root = Path(__file__).parents[3]
    judge = f'shift; PYTHONPATH={shlex.quote(str(root))} exec {shlex.quote(sys.executable)} "$@"\n'
    script(device.base / "releases" / "0.1.0" / "bin" / "python", judge)
    place.place(device.base)
    now = time.time()
    wheels = [wheel(tmp_path / "wheels", "0.2.0"), *Path(ensurepip.__file__).parent.glob("_bundled/pip-*.whl")]
    device.staged(record(*wheels, version="0.2.0", issued=now, expires=now + DAY), *wheels)
    # What systemd does: it starts the client, which reads on what trial it is and hears the server.
    answer = (
        f"import json; r = json.load(open('{device.base}/report.json')); "
        f"open('{device.root}/var/lib/fedge/state/release/alive', 'w').write(r['version'] + ' ' + r['token'])"
    )
    systemctl = script(tmp_path / "systemctl", f'[ "$1" = restart ] && {sys.executable} -c "{answer}"; echo 0\n')
    command = [
        sys.executable,
        "-I",
        str(device.base / "update"),
        "--root",
        str(device.root),
        "--user",
        "",
        "--judge-user",
        "",
    ]
    done = subprocess.run([*command, "--systemctl", str(systemctl)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert device.report["stage"] == "healthy", done.stderr + device.report["detail"]
    python = str(device.base / "current" / "bin" / "python")
    said = subprocess.run(
        [python, "-Ic", "import edge_client.device as d; print(d.VERSION)"], capture_output=True, check=True
    )
    assert said.stdout == b"0.2.0\n"


def test_one_that_is_staged_while_another_is_on_trial_is_looked_at_too(device, tmp_path):
    release(device, tmp_path, "0.2.0")
    newer = wheel(tmp_path / "wheels", "0.3.0")
    restart = device.machine.restart

    def and_then():
        restart()
        if device.machine.started == ["0.2.0"]:
            device.staged(record(newer, version="0.3.0", issued=NOW + 30), newer)

    device.machine.restart = and_then
    assert device.update()["version"] == "0.3.0"
    assert (device.runs, device.machine.started) == ("0.3.0", ["0.2.0", "0.3.0"])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has rights to give up")
def test_a_release_is_judged_with_nobodys_rights(tmp_path):
    script(tmp_path / "bin" / "python", 'echo "{\\"id\\": $(id -u)}"\n')
    # pytest's folders are for their owner alone, one of them for each process where tests run in several.
    for folder in (tmp_path, *tmp_path.parents):
        if folder == Path(tempfile.gettempdir()):
            break
        folder.chmod(0o755)
    assert Machine().judge(tmp_path, {}) == {"id": 65534}
