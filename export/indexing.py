"""Reading and writing at places: slices, indices, masks, sorting; with what their gradients need.

A gradient of a slice is a padding; that of a lookup adds up by ScatterND or ScatterElements, so that repeated places
count as often as they were read.
"""

from collections.abc import Sequence

from edge_client.errors import ExportError
from export.lower import Lowering, Rule, Size, Value
from export.operators import Operand, operand

END = 2**60
"""An end of a slice beyond this means: up to the last element."""


def _pad(b: Lowering, out: Value, name: str, dim: int, before: Size, after: Size) -> str:
    """``name`` with zeros around it along one axis; negative numbers crop."""
    if isinstance(before, int) and isinstance(after, int) and before == after == 0:
        return name
    pads: list[Size] = [0] * (2 * out.rank)
    pads[dim], pads[dim + out.rank] = before, after
    return b.op("Pad", name, b.sizes(pads), b.scalar(0, out.dtype))


def _spread(b: Lowering, out: Value, name: str, shape: Sequence[Size], dim: int, start: Size, step: int) -> str:
    """Elements of ``name`` (``shape``) at ``start``, ``start + step``, ... along ``dim`` of zeros of ``out``'s size."""
    count, length = shape[dim], out.shape[dim]
    if step != 1:
        apart = [*shape[: dim + 1], 1, *shape[dim + 1 :]]
        wide = Value("", tuple(apart), out.dtype)
        name = _pad(b, wide, b.reshape(name, apart), dim + 1, 0, step - 1)
        name = b.reshape(name, [*shape[:dim], count * step, *shape[dim + 1 :]])
    return _pad(b, out, name, dim, start, length - start - count * step)


def _start(start: int | None, length: Size) -> Size:
    if not start:
        return 0
    if isinstance(length, int):
        return min(max(start + length if start < 0 else start, 0), length)
    return start + length if start < 0 else start


def _slice(
    b: Lowering, out: Value, x: Value, dim: int = 0, start: int | None = None, end: Size | None = None, step: int = 1
) -> str:
    if not start and step == 1 and (end is None or (isinstance(end, int) and end > END)):
        return x.name
    last = b.ints([2**62]) if end is None else b.size(end)
    return b.op("Slice", x.name, b.ints([start or 0]), last, b.ints([dim]), b.ints([step]))


def _slice_backward(
    b: Lowering, out: Value, grad: Value, sizes: object, dim: int, start: int, end: object, step: int
) -> str:
    return _spread(b, out, grad.name, grad.shape, dim % out.rank, _start(start, out.shape[dim]), step)


def _slice_scatter(
    b: Lowering,
    out: Value,
    x: Value,
    source: Value,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> str:
    if step != 1:
        raise ExportError("writing to a slice with a step is not supported; use torch.where or torch.cat")
    first = _start(start, x.shape[dim])
    rest = x.shape[dim] - first - source.shape[dim]
    parts = [source.name]
    if not (isinstance(first, int) and first == 0):
        parts.insert(0, b.op("Slice", x.name, b.ints([0]), b.size(first), b.ints([dim])))
    if not (isinstance(rest, int) and rest == 0):
        after = b.size(first + source.shape[dim])
        parts.append(b.op("Slice", x.name, after, b.ints([2**62]), b.ints([dim])))
    return b.op("Concat", *parts, axis=dim) if len(parts) > 1 else parts[0]


def _select(b: Lowering, out: Value, x: Value, dim: int, index: int) -> str:
    return b.op("Gather", x.name, b.scalar(index, "int64"), axis=dim)


def _select_backward(b: Lowering, out: Value, grad: Value, sizes: object, dim: int, index: int) -> str:
    place, shape = dim % out.rank, list(grad.shape)
    shape.insert(place, 1)
    widened = b.op("Unsqueeze", grad.name, b.ints([place]))
    return _spread(b, out, widened, shape, place, _start(index, out.shape[place]), 1)


def _last(rank: int, first: int, second: int) -> list[int]:
    """An order of axes with two of them last."""
    moved = [first % rank, second % rank]
    return [axis for axis in range(rank) if axis not in moved] + moved


def _diagonal(b: Lowering, out: Value, x: Value, offset: int = 0, dim1: int = 0, dim2: int = 1) -> str:
    order = _last(x.rank, dim1, dim2)
    width, count = x.static(order[-1])[0], out.static(out.rank - 1)[0]
    flat = b.reshape(b.transpose(x.name, order), [*out.shape[:-1], -1] if out.rank == 1 else _flat(x, order))
    start = offset if offset >= 0 else -offset * width
    return b.slice(flat, [out.rank - 1], [start], [start + (count - 1) * (width + 1) + 1], width + 1)


def _flat(x: Value, order: Sequence[int]) -> list[Size]:
    rows, columns = x.static(*order[-2:])
    return [*(x.shape[axis] for axis in order[:-2]), rows * columns]


def _diagonal_backward(b: Lowering, out: Value, grad: Value, sizes: object, offset: int, dim1: int, dim2: int) -> str:
    order = _last(out.rank, dim1, dim2)
    width = out.static(order[-1])[0]
    flat = Value("", tuple(_flat(out, order)), out.dtype)
    start = offset if offset >= 0 else -offset * width
    spread = _spread(b, flat, grad.name, grad.shape, flat.rank - 1, start, width + 1)
    square = b.reshape(spread, [out.shape[axis] for axis in order])
    return b.transpose(square, [order.index(axis) for axis in range(out.rank)])


def _repeat(b: Lowering, out: Value, x: Value, times: Sequence[Size]) -> str:
    thin = [1] * (len(times) - x.rank)
    name = b.op("Unsqueeze", x.name, b.ints(range(len(thin)))) if thin else x.name
    return b.op("Tile", name, b.sizes(times))


def _gather(b: Lowering, out: Value, x: Value, dim: int, index: Value, **_: object) -> str:
    return b.op("GatherElements", x.name, index.name, axis=dim)


def _index_select(b: Lowering, out: Value, x: Value, dim: int, index: Value) -> str:
    return b.op("Gather", x.name, index.name, axis=dim)


def _scattered(b: Lowering, x: Value, dim: int, index: Value, source: Operand, reduction: str) -> str:
    if not isinstance(source, Value):
        updates = b.op("Expand", b.number(source, x.dtype), b.sizes(index.shape))
    elif source.rank == 0:
        updates = b.op("Expand", source.name, b.sizes(index.shape))
    else:
        updates = source.name
        larger = [i for i, (n, m) in enumerate(zip(source.shape, index.shape, strict=True)) if n is not m and n != m]
        if larger:
            ends = b.sizes([index.shape[i] for i in larger])
            updates = b.op("Slice", updates, b.ints([0] * len(larger)), ends, b.ints(larger))
    return b.op("ScatterElements", x.name, index.name, updates, axis=dim, reduction=reduction)


def _scatter(
    b: Lowering, out: Value, x: Value, dim: int, index: Value, source: Operand, *, reduce: str = "none"
) -> str:
    return _scattered(b, x, dim, index, source, {"multiply": "mul"}.get(reduce, reduce))


def _scatter_add(b: Lowering, out: Value, x: Value, dim: int, index: Value, source: Value) -> str:
    return _scattered(b, x, dim, index, source, "add")


def _scatter_reduce(
    b: Lowering, out: Value, x: Value, dim: int, index: Value, source: Value, reduce: str, *, include_self: bool = True
) -> str:
    kinds = {"sum": "add", "prod": "mul", "amax": "max", "amin": "min"}
    if not include_self or reduce not in kinds:
        raise ExportError(
            f"scatter_reduce with {reduce!r}, include_self={include_self} is not supported; "
            "use sum, prod, amax or amin with include_self=True"
        )
    return _scattered(b, x, dim, index, source, kinds[reduce])


def _places(
    b: Lowering, indices: Sequence[Value | None], rank: int, shape: Sequence[Size]
) -> tuple[list[int], int, str]:
    """Indexed axes, where their common dimensions stand in the result, and all indices as ``[*common, axes]``."""
    given = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if any(index.dtype == "bool" for _, index in given):
        raise ExportError("indexing with a mask gives a size that depends on the data; use torch.where or masked_fill")
    axes = [axis for axis, _ in given]
    # As in NumPy: the common dimensions come first unless the indexed axes are neighbours.
    place = axes[0] if axes == list(range(axes[0], axes[0] + len(axes))) else 0
    common = max(index.rank for _, index in given)
    sizes = b.sizes(shape[place : place + common])
    parts = []
    for _, index in given:
        whole = b.cast(index.name, index.dtype, "int64")
        wide = b.op("Expand", whole, sizes) if len(given) > 1 else whole
        parts.append(b.op("Unsqueeze", wide, b.ints([-1])))
    return axes, place, b.op("Concat", *parts, axis=-1) if len(parts) > 1 else parts[0]


def _index(b: Lowering, out: Value, x: Value, indices: Sequence[Value | None]) -> str:
    given = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if len(given) == 1 and given[0][1].dtype != "bool":
        return b.op("Gather", x.name, given[0][1].name, axis=given[0][0])
    axes, place, places = _places(b, indices, x.rank, out.shape)
    rest = [axis for axis in range(x.rank) if axis not in axes]
    found = b.op("GatherND", b.transpose(x.name, axes + rest), places)
    common = out.rank - len(rest)
    return b.transpose(found, _inward(common, place, out.rank))


def _inward(common: int, place: int, rank: int) -> list[int]:
    """The order of axes that moves the first ``common`` ones to ``place``."""
    rest = list(range(common, rank))
    return rest[:place] + list(range(common)) + rest[place:]


def _index_put(
    b: Lowering, out: Value, x: Value, indices: Sequence[Value | None], values: Value, accumulate: bool = False
) -> str:
    given = [index for index in indices if index is not None]
    if len(given) == 1 and given[0].dtype == "bool" and indices[0] is given[0]:
        if accumulate or values.rank > 0:
            raise ExportError("writing a tensor to where a mask is true is not supported; use torch.where")
        mask = b.reshape(given[0].name, [*given[0].shape, *[1] * (x.rank - given[0].rank)])
        return b.op("Where", mask, values.name, x.name)
    common_rank = max(index.rank for index in given)
    common: list[Size] = [1] * common_rank
    for index in given:
        for i, size in enumerate(index.shape, start=common_rank - index.rank):
            if not (isinstance(size, int) and size == 1):
                common[i] = size
    axes = [axis for axis, index in enumerate(indices) if index is not None]
    place = axes[0] if axes == list(range(axes[0], axes[0] + len(axes))) else 0
    rest = [axis for axis in range(x.rank) if axis not in axes]
    kept: list[Size] = [x.shape[axis] for axis in rest]
    whole: list[Size] = [*kept[:place], *common, *kept[place:]]
    _, _, places = _places(b, indices, x.rank, whole)
    wide = b.op("Expand", operand(b, values, x.dtype), b.sizes(whole)) if whole else values.name
    order = _inward(common_rank, place, len(whole))
    updates = b.transpose(wide, [order.index(i) for i in range(len(whole))])
    forth = axes + rest
    reduction = "add" if accumulate else "none"
    written = b.op("ScatterND", b.transpose(x.name, forth), places, updates, reduction=reduction)
    return b.transpose(written, [forth.index(axis) for axis in range(x.rank)])


def _ordered(b: Lowering, x: Value, dim: int, count: Size, largest: bool) -> tuple[str, str]:
    values, indices = b.ops("TopK", 2, x.name, b.size(count), axis=dim, largest=int(largest), sorted=1)
    return values, indices


def _sort(
    b: Lowering, out: object, x: Value, dim: int = -1, descending: bool = False, *, stable: bool | None = None
) -> tuple[str, str]:
    # TopK puts the lower index first among equals, which makes it stable.
    return _ordered(b, x, dim, x.shape[dim], descending)


def _topk(
    b: Lowering, out: object, x: Value, k: Size, dim: int = -1, largest: bool = True, _: bool = True
) -> tuple[str, str]:
    return _ordered(b, x, dim, k, largest)


def _kth(b: Lowering, x: Value, k: int, dim: int, keep: bool) -> tuple[str, str]:
    place = b.ints([k - 1]) if keep else b.scalar(k - 1, "int64")
    values, indices = (b.op("Gather", part, place, axis=dim) for part in _ordered(b, x, dim, k, False))
    return values, indices


def _kthvalue(b: Lowering, out: object, x: Value, k: int, dim: int = -1, keepdim: bool = False) -> tuple[str, str]:
    return _kth(b, x, k, dim, keepdim)


def _median(b: Lowering, out: object, x: Value, dim: int | None = None, keepdim: bool = False) -> str | tuple[str, str]:
    if dim is None:
        raise ExportError("the median of a whole tensor is not supported; flatten it and give the axis")
    return _kth(b, x, (x.static(dim)[0] + 1) // 2, dim, keepdim)


def _concatenated(b: Lowering, out: Value, tensors: Sequence[Value], dim: int = 0) -> str:
    return b.op("Concat", *[operand(b, t, out.dtype) for t in tensors], axis=dim)


def _split(b: Lowering, out: Sequence[Value | None], x: Value, sizes: Sequence[Size], dim: int = 0) -> tuple[str, ...]:
    return tuple(b.ops("Split", len(out), x.name, b.sizes(sizes), axis=dim))


INDEXING: dict[str, Rule] = {
    "aten.slice": _slice,
    "aten.slice_backward": _slice_backward,
    "aten.slice_scatter": _slice_scatter,
    "aten.select": _select,
    "aten.select_backward": _select_backward,
    "aten.diagonal": _diagonal,
    "aten.diagonal_backward": _diagonal_backward,
    "aten.repeat": _repeat,
    "aten.gather": _gather,
    "aten.index_select": _index_select,
    "aten.scatter": _scatter,
    "aten.scatter_add": _scatter_add,
    "aten.scatter_reduce": _scatter_reduce,
    "aten.index": _index,
    "aten.index_put": _index_put,
    "aten.sort": _sort,
    "aten.topk": _topk,
    "aten.kthvalue": _kthvalue,
    "aten.median": _median,
    "aten.cat": _concatenated,
    "aten.split_with_sizes": _split,
}
