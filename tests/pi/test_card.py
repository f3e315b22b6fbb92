import shutil

import pytest

from deploy.image.card import assemble
from deploy.image.layer import Layer
from tests.pi.card import put_in_root, put_on_boot, take_from_root

_PATH = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"
pytestmark = pytest.mark.skipif(
    any(shutil.which(one, path=_PATH) is None for one in ("sfdisk", "mke2fs", "mcopy", "debugfs", "e2fsck")),
    reason="needs the Debian packages fdisk, e2fsprogs and mtools",
)


def test_what_is_put_on_a_card_is_there_and_units_are_switched_on(tmp_path):
    system = Layer()
    system.file("boot/firmware/cmdline.txt", b"")
    system.folder("etc/systemd/system")
    (tmp_path / "system.tar").write_bytes(system.pack())
    (tmp_path / "scratch").mkdir()
    card = tmp_path / "card.img"
    assemble(card, [tmp_path / "system.tar"], tmp_path / "scratch", spare=8)
    (tmp_path / "unit").write_text("[Unit]\n")
    put_in_root(
        card, {"/etc/systemd/system/one.service": tmp_path / "unit", "/var/lib/fedge/journal/a": tmp_path / "unit"}
    )
    put_on_boot(card, {"device.toml": b"x"}, tmp_path)
    take_from_root(card, "/etc", tmp_path / "taken")
    take_from_root(card, "/var/lib/fedge/journal", tmp_path / "taken")
    assert (tmp_path / "taken" / "journal" / "a").read_text() == "[Unit]\n"
    wanted = tmp_path / "taken" / "etc" / "systemd" / "system" / "multi-user.target.wants" / "one.service"
    assert str(wanted.readlink()) == "/etc/systemd/system/one.service"
