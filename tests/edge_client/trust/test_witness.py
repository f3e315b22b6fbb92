"""What a device remembers: its starts count up, whatever its clock says, and the newest offer outlives a power cut."""

import pytest

from edge_client.errors import StoreError
from edge_client.trust.witness import Witness
from edge_client.wire.envelope import Stamp


def test_each_start_is_a_life_of_its_own(tmp_path):
    path = tmp_path / "witness.msgpack"
    assert [Witness(path, 0.0).life for _ in range(3)] == [1, 2, 3]
    assert Witness(path, 1000.5).life == 1000
    assert Witness(path, 5.0).life == 1001  # the clock went back
    assert path.stat().st_mode & 0o777 == 0o600


def test_with_a_clock_a_lost_memory_does_not_make_a_device_young_again(tmp_path):
    before = Witness(tmp_path / "a", 1e9).life
    assert Witness(tmp_path / "b", 1e9 + 1).life > before


def test_the_newest_offer_is_remembered(tmp_path):
    path = tmp_path / "witness.msgpack"
    first = Witness(path, 0.0)
    assert first.newest == Stamp(0, 0, 0)
    first.remember(Stamp(7, 0, 3), 1e9)
    first.remember(Stamp(8, 0, 1), 1e9 - 1)
    after = Witness(path, 0.0)
    assert (after.newest, after.issued) == (Stamp(8, 0, 1), 1e9)


@pytest.mark.parametrize("data", [b"", b"rubbish", b"\x81\xa4life\xa1x"])
def test_a_memory_that_is_damaged_is_named_and_not_taken_for_none(tmp_path, data):
    path = tmp_path / "witness.msgpack"
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"witness.msgpack is damaged"):
        Witness(path, 0.0)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="witness"):
        Witness(tmp_path / "file" / "witness.msgpack", 0.0)
