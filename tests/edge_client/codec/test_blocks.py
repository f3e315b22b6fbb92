import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_client.codec.blocks import BLOCK, blocks, join, split
from edge_client.codec.integers import Reader, varint
from edge_client.codec.layout import Layout, TensorSpec
from edge_client.errors import CodecError


def layout(*shapes):
    return Layout(tuple(TensorSpec(f"t{i}", shape) for i, shape in enumerate(shapes)))


def cut(limit, *shapes):
    """Shapes of each block's parts."""
    return [[part.shape for part in block.layout.tensors] for block in blocks(layout(*shapes), limit)]


SHAPES = st.lists(st.lists(st.integers(0, 12), max_size=3).map(tuple), max_size=6)


@given(SHAPES, st.integers(1, 60))
def test_every_element_is_in_exactly_one_block(shapes, limit):
    whole = layout(*shapes)
    found = blocks(whole, limit)
    assert [block.start for block in found] == [0, *(block.stop for block in found)][: len(found)]
    assert (found[-1].stop if found else 0) == whole.size
    for block in found:
        assert 0 < block.layout.size == block.stop - block.start <= limit


@given(SHAPES, st.integers(1, 60))
def test_parts_are_whole_tensors_or_runs_of_their_rows(shapes, limit):
    whole = layout(*shapes)
    tensors = {tensor.name: tensor for tensor in whole.tensors}
    elements = dict.fromkeys(tensors, 0)
    for block in blocks(whole, limit):
        for part in block.layout.tensors:
            tensor = tensors[part.name]
            elements[part.name] += part.size
            if tensor.size <= limit:
                assert part == tensor
            elif 1 < tensor.matrix[1] <= limit:
                assert part.matrix[1] == tensor.matrix[1], "rows stay whole"
            else:
                assert part.shape == (part.size,)
    assert elements == {name: tensor.size for name, tensor in tensors.items()}


def test_tensors_are_laid_together_while_there_is_room():
    assert cut(10, (4,), (2, 3), (1,), (10,)) == [[(4,), (2, 3)], [(1,)], [(10,)]]


def test_longer_tensors_are_cut_into_rows():
    assert cut(10, (5, 2, 2), (3,)) == [[(2, 2, 2)], [(2, 2, 2)], [(1, 2, 2), (3,)]]


def test_longer_rows_are_cut_into_runs():
    assert cut(10, (2, 12)) == [[(10,)], [(10,)], [(4,)]]
    assert cut(10, (23,)) == [[(10,)], [(10,)], [(3,)]]


def test_rows_of_one_element_are_cut_into_runs():
    assert cut(10, (15, 1), (3, 1)) == [[(10,)], [(5,), (3, 1)]]


def test_nothing_has_no_blocks():
    assert cut(10) == cut(10, (0, 3)) == []


def test_a_large_model_is_cut_at_the_limit_of_the_format():
    found = blocks(layout(*[(2000, 2000)] * 5, (3000, 4000)))
    assert BLOCK == 2**22
    assert [block.layout.size for block in found] == [4_000_000] * 5 + [4_192_000] * 2 + [3_616_000]


def test_cutting_again_costs_nothing():
    assert blocks(layout((7, 3)), 6) is blocks(layout((7, 3)), 6)


@pytest.mark.parametrize("shapes", [[(7,)], [(BLOCK,), (5,)], [(BLOCK + 1, 1), (BLOCK, 2)]])
def test_bytes_of_blocks_come_back(shapes):
    whole = layout(*shapes)
    rng = np.random.default_rng(1)
    bodies = [rng.bytes(200 * number) for number in range(len(blocks(whole)))]
    data = join(bodies)
    assert [bytes(body) for body in split(Reader(data, "update"), whole)] == bodies
    assert len(data) <= sum(map(len, bodies)) + 2 * (len(bodies) - 1)


def test_no_blocks_have_no_bytes():
    assert join([]) == b""
    assert split(Reader(b"", "update"), layout()) == []
    with pytest.raises(CodecError, match="too many"):
        split(Reader(b"x", "update"), layout())


def test_lengths_are_checked_before_anything_is_taken():
    two = layout((BLOCK,), (5,))
    with pytest.raises(CodecError, match="cut off"):
        split(Reader(varint(9) + b"12345678", "update"), two)
    with pytest.raises(CodecError, match="above"):
        split(Reader(varint(2**35 - 1), "update"), two)
    with pytest.raises(CodecError, match="cut off"):
        split(Reader(b"", "update"), two)
