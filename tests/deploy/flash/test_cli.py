"""`fedge flash` on stand-ins of official images, judged by what is on the partitions that it wrote."""

import contextlib
import hashlib
import lzma
import os
import shutil
import subprocess

import pytest
from click.testing import CliRunner

from deploy.flash import cli, image, prepare, target
from edge_client.errors import FedgeError
from edge_client.service.settings import DeviceSettings
from edge_client.trust.claim import Claim
from tests.cards import BOOT, MIB, boot_files, card, index, needs_tools, run
from tests.deploy.flash.test_fetch import Server
from tests.office import NOW, Office

pytestmark = needs_tools
PASSPHRASE = "correct horse battery"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with stand-ins of images, claims of a federation, and a cache that stays for all tests."""
    folder = tmp_path_factory.mktemp("flash")
    index(folder / "index")
    (folder / "key.pub").write_text("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIExample me@laptop\n")
    (folder / "psk").write_text(f"{PASSPHRASE}\n")
    for kind in ("firstrun", "cloud-init", "preseed", "client"):
        card(folder / f"{kind}.img", kind)
    office = Office(folder / "authority")
    for number, claim in enumerate(office.claims(6, seconds=1e9)):
        claim.save(folder / "claims" / f"{number}.fedgeclaim")
    return folder


@pytest.fixture
def flash(place, tmp_path, monkeypatch):
    """The command, with pip's index and the cache in folders: what it prints, or the mistake that it names."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(place / "index"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.time, "time", lambda: NOW)
    shutil.copytree(place / "claims", tmp_path / "claims")

    def run(*arguments, given=None):
        arguments = [*map(str, arguments), "--cache", str(place / "cache")]
        done = CliRunner().invoke(cli.flash, arguments, input=given)
        if isinstance(done.exception, FedgeError):
            return f"{done.output}fedge: {done.exception}"
        assert done.exception is None, done.output
        return done.output

    return run


CLAIM = ("--claim", "claims/0.fedgeclaim")


@pytest.mark.parametrize("kind", ["firstrun", "cloud-init", "preseed", "client"])
def test_an_image_becomes_a_devices(flash, place, tmp_path, kind):
    said = flash(
        place / f"{kind}.img", "-o", "out.img", *CLAIM, "--hostname", "pi-7", "--ssh-key", place / "key.pub",
        "--wifi", "home", "--wifi-key", place / "psk", "--country", "gb",
    )  # fmt: skip
    assert f"set up by {kind}" in said
    assert said.endswith("out.img is written and checked\n")
    files = boot_files(tmp_path / "out.img")
    claim = (tmp_path / "claims/0.fedgeclaim").read_bytes()
    assert files["fedge/claim.fedgeclaim"] == claim
    (tmp_path / "device.toml").write_bytes(files["fedge/device.toml"])
    assert DeviceSettings.load(tmp_path / "device.toml").options() == {
        "url": "mqtt://127.0.0.1:1/toys",
        "client": "pi-7",
        "data": "drop:/var/lib/fedge/data",
    }
    wheels = {name.rpartition("/")[2]: data for name, data in files.items() if "/wheels/" in name}
    assert bool(wheels) == (kind != "client")
    for line in wheels.get("SHA256SUMS", b"").decode().splitlines():
        assert hashlib.sha256(wheels[line[66:]]).hexdigest() == line[:64]
    switch = {
        "firstrun": "fedge/firstrun.sh",
        "cloud-init": "user-data",
        "preseed": "rpi-preseed.toml",
        "client": "fedge/card.toml",
    }
    assert b"fedge" in files[switch[kind]] or b"pi-7" in files[switch[kind]]
    assert not any(PASSPHRASE.encode() in data for data in files.values())
    assert PASSPHRASE not in said
    # Nothing else has changed: neither the base, nor what is outside the boot partition.
    before, after = (place / f"{kind}.img").read_bytes(), (tmp_path / "out.img").read_bytes()
    start, end = BOOT[0] * MIB, (BOOT[0] + BOOT[1]) * MIB
    assert (before[:start], before[end:]) == (after[:start], after[end:])
    assert "config.txt" in files
    assert (tmp_path / "out.img").stat().st_mode & 0o777 == 0o600
    # The one that it made may be given again, and is not another program's.
    if kind == "cloud-init":
        assert "written" in flash("out.img", "-o", "again.img", *CLAIM)
    assert not list((place / "cache").glob("flash-*"))


def test_a_packed_image_becomes_cards_with_a_name_and_claim_each(flash, place, tmp_path):
    (tmp_path / "os.img.xz").write_bytes(lzma.compress((place / "cloud-init.img").read_bytes(), preset=0))
    arguments = ("os.img.xz", "--count", 3, "--claims", "claims", "-o", "cards")
    flash(*arguments)
    used = {}
    for number in (1, 2, 3):
        files = boot_files(tmp_path / f"cards/pi-{number}.img")
        used[number] = files["fedge/claim.fedgeclaim"]
        assert f'id = "pi-{number}"'.encode() in files["fedge/device.toml"]
        assert (tmp_path / f"claims/written/pi-{number}.fedgeclaim").read_bytes() == used[number]
    assert len(set(used.values())) == 3
    # Not even in the free space of the next card.
    keys = {number: Claim.load(tmp_path / f"claims/written/pi-{number}.fedgeclaim").key for number in used}
    third = (tmp_path / "cards/pi-3.img").read_bytes()
    for number, key in keys.items():
        assert (key.split("\n")[1].encode() in third) == (number == 3)
    assert "all 3 cards are written already" in flash(*arguments)
    assert len(list((tmp_path / "claims").glob("*.fedgeclaim"))) == 3
    # Said with a larger number, it goes on with what is missing.
    flash("os.img.xz", "--count", 4, "--claims", "claims", "-o", "cards")
    assert sorted(path.name for path in (tmp_path / "cards").iterdir()) == [f"pi-{n}.img" for n in (1, 2, 3, 4)]


def test_without_a_place_to_write_to_it_says_what_it_is(flash, place):
    said = flash(place / "firstrun.img")
    assert "Debian GNU/Linux 12 (bookworm), 64-bit ARM, Python 3.11; set up by firstrun" in said


def test_what_a_killed_run_has_left_goes_after_a_day(flash, place):
    old, new = place / "cache" / "flash-old", place / "cache" / "flash-new"
    for folder in (old, new):
        folder.mkdir(parents=True)
        (folder / "boot.img").write_text("a claim")
    os.utime(old, (NOW - 90_000, NOW - 90_000))
    os.utime(new, (NOW - 80_000, NOW - 80_000))
    flash(place / "client.img")
    assert (old.exists(), new.exists()) == (False, True)
    shutil.rmtree(new)


def test_an_image_is_fetched_from_its_url(flash, place, tmp_path):
    data = lzma.compress((place / "client.img").read_bytes(), preset=0)
    with Server(data=data, most=200_000) as server:
        assert "--sha256" in flash(server.url)
        assert "set up by client" in flash(server.url, "--sha256", hashlib.sha256(data).hexdigest())
        assert "another file" in flash(server.url, "--sha256", "0" * 64)


def test_another_programs_settings_are_replaced_only_when_told(flash, tmp_path):
    card(tmp_path / "imager.img", "cloud-init", boot={"cmdline.txt": "root=x ds=nocloud;i=rpi-imager-1\n"})
    said = flash("imager.img", "-o", "out.img", *CLAIM)
    assert "i=rpi-imager in cmdline.txt" in said
    assert not (tmp_path / "out.img").exists()
    assert "written" in flash("imager.img", "-o", "out.img", *CLAIM, "--force", "customised")


def test_a_boot_partition_without_room_is_refused(flash, tmp_path):
    path = card(tmp_path / "full.img", "firstrun", boot={"kernel8.img": "x" * (38 * MIB)})
    assert "the boot partition is full" in flash(path, "-o", "out.img", *CLAIM)
    assert not (tmp_path / "out.img").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("nothing.img",), "nothing.img: No such file"),
        (("-o", "out.img"), "--server"),
        (("-o", "out.img", *CLAIM, "--wifi", "home:12345678"), "--country"),
        (("-o", "out.img", "--claim", "claims/0.fedgeclaim", "--claims", "claims"), "one of the two"),
        (("-o", "out.img", *CLAIM, "--count", "2"), "one --claim is good for one device"),
        (("-o", "out", "--claims", "claims", "--count", "7"), "fedge claim --count 1"),
        (("-o", "out", "--claims", "nowhere", "--count", "7"), "is no folder"),
        (("-o", "x", "--device", "/dev/null", *CLAIM), "name one place"),
        (("--device", "claims/0.fedgeclaim", *CLAIM), "no block device"),
        (("-o", "out.img", *CLAIM, "--max-size", "big"), "--max-size"),
        (("-o", "out.img", *CLAIM, "--ssh-key", "claims/0.fedgeclaim"), "private key"),
        (("-o", "claims/0.fedgeclaim/out.img", *CLAIM), "cannot be a folder"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_is_one_line(flash, place, arguments, reason):
    source = () if arguments == ("nothing.img",) else (place / "client.img",)
    said = flash(*source, *arguments)
    assert reason in said
    assert said.count("fedge: ") == 1


def test_an_expired_claim_is_refused_before_anything_is_written(flash, place, tmp_path, monkeypatch):
    monkeypatch.setattr(cli.time, "time", lambda: NOW + 2e9)
    assert "is over" in flash(place / "client.img", "-o", "out.img", *CLAIM)
    assert not (tmp_path / "out.img").exists()


def test_the_passphrase_is_asked_for(flash, place, tmp_path):
    given = ("-o", "out.img", *CLAIM, "--wifi", "home", "--country", "GB")
    said = flash(place / "client.img", *given, given=f"{PASSPHRASE}\n")
    assert "Passphrase of home" in said
    assert PASSPHRASE not in said
    assert b'ssid = "home"' in boot_files(tmp_path / "out.img")["fedge/card.toml"]


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A file in the place of a card reader's device, as the kernel would describe it."""
    path = tmp_path / "sdx"
    path.write_bytes(b"\xff" * (60 * MIB))
    state = {"places": (), "size": 60 * MIB}
    monkeypatch.setattr(
        target, "find", lambda path, _: target.Device(path, "sdx", state["size"], True, state["places"], "Reader")
    )
    return state


def test_cards_are_written_one_after_the_other(flash, place, tmp_path, reader):
    reader["size"] = MIB
    seen = []

    class Operator:
        """Puts a card in that is too small, then larger ones."""

        def check(self, device, **options):
            seen.append(device.size)
            try:
                real(device, **options)
            finally:
                reader["size"] = 60 * MIB

    real = target.check
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(target, "check", Operator().check)
        arguments = ("--device", "sdx", "--claims", "claims", "--count", 2)
        said = flash(place / "client.img", *arguments, given="\n\n\n")
    assert seen == [MIB, 60 * MIB, 60 * MIB]
    assert said.count("Put the card for pi-1 into sdx") == 2
    assert "too small" in said
    assert "the card for pi-2 is written and checked: take it out" in said
    assert b'id = "pi-2"' in boot_files(tmp_path / "sdx")["fedge/device.toml"]
    assert (tmp_path / "sdx").read_bytes()[-MIB:] == b"\xff" * MIB


def test_a_device_is_no_file_to_write_to(flash, place, tmp_path, reader, monkeypatch):
    monkeypatch.setattr(image, "is_device", lambda path: path.name == "sdx")
    assert "--device sdx" in flash(place / "client.img", "-o", "sdx", *CLAIM)
    assert (tmp_path / "sdx").read_bytes() == b"\xff" * (60 * MIB)


def test_a_card_in_use_is_not_touched(flash, place, tmp_path, reader):
    reader["places"] = ("/media/card",)
    assert "in use" in flash(place / "client.img", "--device", "sdx", *CLAIM)
    assert (tmp_path / "sdx").read_bytes() == b"\xff" * (60 * MIB)
    assert "written" in flash(place / "client.img", "--device", "sdx", *CLAIM, "--force", "mounted")


def test_a_card_that_is_written_already_gets_its_boot_partition_alone(flash, place, tmp_path, reader, monkeypatch):
    shutil.copy(place / "firstrun.img", tmp_path / "sdx")
    before = (tmp_path / "sdx").read_bytes()
    monkeypatch.setattr(image, "is_device", lambda path: path.name == "sdx")
    monkeypatch.setattr(prepare, "is_device", lambda path: path.name == "sdx")
    assert "set up by firstrun" in flash("sdx")
    assert (tmp_path / "sdx").read_bytes() == before
    assert "one device" in flash("sdx", "--claims", "claims", "--count", 2)
    assert "is written and checked" in flash("sdx", *CLAIM, "--hostname", "pi-9")
    after = (tmp_path / "sdx").read_bytes()
    start, end = BOOT[0] * MIB, (BOOT[0] + BOOT[1]) * MIB
    assert (before[:start], before[end:]) == (after[:start], after[end:])
    assert b'id = "pi-9"' in boot_files(tmp_path / "sdx")["fedge/device.toml"]


@pytest.fixture
def loop(tmp_path):
    """A block device of the kernel's, without being root of anything else."""
    path = tmp_path / "loop.img"
    with path.open("wb") as file:
        file.truncate(60 * MIB)
    try:
        device = run("losetup", "-f", "--show", path).decode().strip()
    except (AssertionError, subprocess.CalledProcessError):
        pytest.skip("needs a loop device, and to be root")
    yield device
    run("losetup", "-d", device)


def test_a_block_device_is_written_past_the_caches_and_then_again_in_place(flash, place, loop):
    assert "does not look like a card" in flash(place / "client.img", "--device", loop, *CLAIM)
    assert "is written and checked" in flash(place / "client.img", "--device", loop, *CLAIM, "--force", "fixed")
    assert b'id = "pi"' in boot_files(loop)["fedge/device.toml"]
    assert "set up by client" in flash(loop)
    assert "is written and checked" in flash(loop, *CLAIM, "--hostname", "pi-9", "--force", "fixed")
    assert b'id = "pi-9"' in boot_files(loop)["fedge/device.toml"]
