"""A release's record: who signed it, when it may be installed, and what of it fits a device."""

import msgspec
import pytest

from edge_client.errors import TrustError, WireError
from edge_client.trust.keys import SigningKey, verify
from edge_client.trust.release import File, Record, admit, claimed, fitting, here, order, seal, unseal, versions
from edge_client.wire import messages as m

NOW, DAY = 1_800_000_000.0, 86_400.0
KEY = SigningKey.generate()
BLOB = m.BlobRef(bytes(32), 1000, 1024)
RECORD = Record(1, "toys", "0.2.0", NOW, NOW + DAY, (File("fedge-0.2.0-py3-none-any.whl", BLOB),))


def believed(data, signature):
    return verify(KEY.public, data, signature)


def files(*names):
    return [File(name, BLOB) for name in names]


def names(*wheels, platform):
    return [file.name for file in fitting(files(*wheels), platform)]


def test_a_record_that_was_signed_is_read_and_one_that_was_changed_is_not():
    sealed = seal(RECORD, KEY.sign)
    assert unseal(sealed, "toys", believed) == RECORD
    for place in range(len(sealed.record)):
        changed = bytearray(sealed.record)
        changed[place] ^= 1
        with pytest.raises(TrustError, match="signature"):
            unseal(m.Release(bytes(changed), sealed.signature), "toys", believed)
    with pytest.raises(TrustError, match="signature"):
        unseal(m.Release(sealed.record, bytes(64)), "toys", believed)
    with pytest.raises(TrustError, match="for federation 'toys'; this device is in 'others'"):
        unseal(sealed, "others", believed)


def test_what_is_signed_for_another_purpose_is_no_release():
    data = msgspec.msgpack.encode(RECORD)
    with pytest.raises(TrustError):
        unseal(m.Release(data, KEY.sign(data)), "toys", believed)


@pytest.mark.parametrize("change", [{"version": "../../etc"}, {"files": ()}, {"format": 2}, {"expires": -1.0}])
def test_a_signed_record_out_of_bounds_is_refused_all_the_same(change):
    fields = msgspec.structs.asdict(RECORD) | change
    data = msgspec.msgpack.encode(list(fields.values()))
    sealed = m.Release(data, KEY.sign(msgspec.msgpack.encode(["fedge-release/1", data])))
    with pytest.raises(WireError, match="another format"):
        unseal(sealed, "toys", believed)
    assert claimed(sealed) == ""


def test_a_release_is_admitted_within_its_time_and_not_twice_in_another_order():
    admit(RECORD, now=NOW + 60, running="0.1.0", newest=0.0)
    admit(RECORD, now=NOW - 60, running="0.1.0", newest=NOW - DAY)  # clocks differ
    with pytest.raises(TrustError, match="expired"):
        admit(RECORD, now=NOW + 2 * DAY, running="0.1.0", newest=0.0)
    with pytest.raises(TrustError, match="expired"):  # the clock was set back
        admit(RECORD, now=NOW, running="0.1.0", newest=NOW + 2 * DAY)
    with pytest.raises(TrustError, match="ahead of the clock"):
        admit(RECORD, now=NOW - DAY, running="0.1.0", newest=0.0)
    with pytest.raises(TrustError, match="older than one that was installed"):
        admit(RECORD, now=NOW + 60, running="0.1.0", newest=NOW + 30)
    with pytest.raises(TrustError, match=r"0\.2\.0 is older than 0\.10\.0"):
        admit(RECORD, now=NOW + 60, running="0.10.0", newest=0.0)
    admit(msgspec.structs.replace(RECORD, back=True), now=NOW + 60, running="0.10.0", newest=0.0)


def test_versions_are_in_order():
    rising = ["0.1.0.dev1", "0.1.0rc1", "0.1.0rc2", "0.1.0", "0.1.0.post1", "0.1.1", "0.2", "0.10.0", "1.0rc1", "1.0.0"]
    assert sorted(rising, key=order) == rising
    assert order("1.0") == order("1.0.0")


def test_a_device_takes_the_wheels_that_fit_it():
    wheels = [
        "fedge-0.2.0-py3-none-any.whl",
        "numpy-2.4.6-cp311-cp311-manylinux_2_27_aarch64.manylinux_2_28_aarch64.whl",
        "numpy-2.4.6-cp313-cp313-manylinux_2_27_aarch64.manylinux_2_28_aarch64.whl",
        "cryptography-46.0.0-cp38-abi3-manylinux_2_28_aarch64.whl",
    ]
    assert names(*wheels, platform="cp311-aarch64") == [wheels[0], wheels[1], wheels[3]]
    assert names(*wheels, platform="cp313-aarch64") == [wheels[0], wheels[2], wheels[3]]
    with pytest.raises(WireError, match="no wheel of cryptography, numpy fits cp311-x86_64"):
        names(*wheels, platform="cp311-x86_64")
    with pytest.raises(WireError, match="no wheel of numpy fits cp312-aarch64"):
        names(*wheels, platform="cp312-aarch64")
    with pytest.raises(WireError, match="no wheel of fedge"):
        names(*wheels[1:], platform="cp311-aarch64")
    with pytest.raises(WireError, match="not called as a wheel"):
        names("fedge.whl", platform="cp311-aarch64")
    assert names(wheels[0], platform=here()) == [wheels[0]]
    assert versions(wheels) == {"0.2.0"}
