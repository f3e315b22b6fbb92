import numpy as np
import pytest

from broker_server.aggregation.blocks import LedgerBlocks
from broker_server.aggregation.weighting import Report
from edge_client.codec.blocks import BLOCK
from edge_client.codec.layout import Layout, TensorSpec
from edge_client.codec.update import CodecSettings, decode_update, encode_update
from edge_client.errors import LedgerError

SMALL = Layout((TensorSpec("weight", (40, 50)), TensorSpec("bias", (50,))))


def updates(layout: Layout, count: int, kind: str = "none") -> list[bytes]:
    rng = np.random.default_rng(5)
    made = [rng.standard_normal(layout.size, dtype=np.float32) for _ in range(count)]
    settings = CodecSettings(kind=kind)
    return [encode_update({"delta": one}, {"delta": layout}, {"samples": 1}, settings).data for one in made]


def blocks(data: list[bytes], layout: Layout, folder, **options) -> LedgerBlocks:
    reports = [Report(str(number), scale=1.0 if number else 0.5) for number in range(len(data))]
    return LedgerBlocks(reports, data.__getitem__, {"delta": layout}, "delta", folder, **options)


def whole(found: LedgerBlocks, members=None) -> np.ndarray:
    parts, end = [], 0
    for where, rows in found.read(members):
        assert where.start == end, "blocks follow one another"
        assert rows.nbytes <= found.room
        end = where.stop
        parts.append(rows)
    assert end == found.size
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize("kind", ["none", "quantized"])
@pytest.mark.parametrize("room", [1 << 26, 10_000, 4 * 3])
def test_rows_are_the_decoded_updates_shortened_by_their_scale(tmp_path, kind, room):
    data = updates(SMALL, 3, kind)
    decoded = np.stack([decode_update(one, {"delta": SMALL}).vectors["delta"] for one in data])
    decoded[0] *= 0.5
    found = blocks(data, SMALL, tmp_path, room=room)
    np.testing.assert_array_equal(whole(found), decoded)
    np.testing.assert_array_equal(whole(found, [2, 0]), decoded[[2, 0]])
    assert not list(tmp_path.iterdir()), "what was laid out on the disk is gone"


def test_a_model_of_several_blocks(tmp_path):
    layout = Layout((TensorSpec("a", (3, 1_000_000)), TensorSpec("b", (BLOCK // 2,)), TensorSpec("c", (7,))))
    data = updates(layout, 2)
    decoded = np.stack([decode_update(one, {"delta": layout}).vectors["delta"] for one in data])
    decoded[0] *= 0.5
    np.testing.assert_array_equal(whole(blocks(data, layout, tmp_path, room=1 << 23)), decoded)


def test_a_disk_without_room_is_named(tmp_path):
    with pytest.raises(LedgerError, match="cannot be laid out there"):
        whole(blocks(updates(SMALL, 3), SMALL, tmp_path / "missing", room=400))
