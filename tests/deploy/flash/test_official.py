"""What is on a card is found without mounting it; what a client cannot run on is refused with the reason."""

import pytest

from deploy.flash.image import Base
from deploy.flash.official import OURS
from edge_client.errors import FlashError
from tests.cards import KINDS, MIB, ROOT, card, needs_tools

pytestmark = needs_tools


def inspected(tmp_path, *arguments, **options):
    base = Base.of(card(tmp_path / "card.img", *arguments, **options))
    return base.system(base.extract_boot(tmp_path / "boot.img"))


@pytest.mark.parametrize(("kind", "label"), [*((kind, "dos") for kind in KINDS), ("firstrun", "gpt")])
def test_the_kind_and_python_are_found(tmp_path, kind, label):
    found = inspected(tmp_path, kind, label=label)
    assert (found.kind, found.python, found.foreign) == (kind, KINDS[kind][3], "")
    assert KINDS[kind][2] in found.name


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"machine": "armhf"}, "32-bit armhf"),
        ({"machine": "amd64"}, "64-bit amd64"),
        ({"system": "ubuntu"}, "expected Raspberry Pi OS Lite"),
        ({"python": "3.9"}, "Python 3.9"),
    ],
    ids=lambda value: str(value),
)
def test_what_a_client_cannot_run_on_is_refused(tmp_path, options, reason):
    with pytest.raises(FlashError, match=reason):
        inspected(tmp_path, "firstrun", **options)


def test_a_system_without_a_way_to_set_it_up_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(KINDS, "firstrun", ({}, (), "12 (bookworm)", "3.11"))
    with pytest.raises(FlashError, match="none of the ways"):
        inspected(tmp_path, "firstrun")


def test_a_card_that_rpi_preseed_has_set_up_is_refused(tmp_path):
    with pytest.raises(FlashError, match="booted before"):
        inspected(tmp_path, "preseed", root=["var/lib/rpi-preseed/applied"])


@pytest.mark.parametrize(
    ("boot", "sign"),
    [
        ({"cmdline.txt": "root=x ds=nocloud;i=rpi-imager-17\n"}, "i=rpi-imager"),
        ({"firstrun.sh": "#!/bin/sh\n"}, "firstrun.sh"),
        ({"custom.toml": f"{OURS}\n"}, ""),
    ],
)
def test_another_programs_settings_are_noticed(tmp_path, boot, sign):
    assert inspected(tmp_path, "cloud-init", boot=boot).foreign.startswith(sign)


def test_a_damaged_root_partition_is_refused(tmp_path):
    path = card(tmp_path / "card.img", "firstrun")
    with path.open("r+b") as file:
        file.seek(ROOT[0] * MIB)
        file.write(bytes(65536))
    base = Base.of(path)
    with pytest.raises(FlashError, match="root partition cannot be read"):
        base.system(base.extract_boot(tmp_path / "boot.img"))


def test_a_boot_partition_that_is_not_fat_is_refused(tmp_path):
    path = card(tmp_path / "card.img", "firstrun")
    with path.open("r+b") as file:
        file.seek(MIB)
        file.write(bytes(65536))
    base = Base.of(path)
    with pytest.raises(FlashError, match="expected FAT"):
        base.system(base.extract_boot(tmp_path / "boot.img"))
