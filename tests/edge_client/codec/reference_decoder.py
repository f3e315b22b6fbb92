"""A second decoder, written from ``edge_client/codec/FORMAT.md`` alone: plain Python, slow, and nothing of the first.

A layout is a list of ``(name, shape)``, a vector a list of floats, a state ``(codes, offset)`` and a raw one a
list of floats. Headings are those of the page.
"""

import hashlib
import math
import struct

import msgspec
from pcodec import standalone

BLOCK_LIMIT = 2**22


class RefusedError(Exception):
    """The bytes are corrupt."""


def require(condition, why):
    if not condition:
        raise RefusedError(why)


class Cursor:
    """Conventions: fixed sizes, varints, sections."""

    def __init__(self, data):
        self.data, self.at = bytes(data), 0

    def take(self, count):
        require(self.at + count <= len(self.data), "cut off")
        self.at += count
        return self.data[self.at - count : self.at]

    def fixed(self, form):
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))

    def varint(self, limit=2**34):
        value = 0
        for place in range(5):
            (byte,) = self.take(1)
            value += (byte & 127) << 7 * place
            if byte < 128:
                require(value <= limit, "count")
                return value
        raise RefusedError("varint")

    def section(self):
        return self.take(self.varint())

    def rest(self):
        return self.take(len(self.data) - self.at)

    def end(self):
        require(self.at == len(self.data), "bytes left over")


# Layout


def matrix(shape):
    rows = shape[0] if len(shape) > 1 and math.prod(shape) > 0 else 1
    return rows, math.prod(shape) // rows


def total(layout):
    return sum(math.prod(shape) for _, shape in layout)


def digest_of_layout(layout):
    tensors = [{"name": name, "shape": list(shape)} for name, shape in layout]
    return hashlib.sha256(msgspec.msgpack.encode({"tensors": tensors})).digest()


# Blocks


def parts(name, shape, limit):
    rows, columns = matrix(shape)
    if rows * columns <= limit:
        return [(name, shape)]
    if columns > limit or columns == 1:
        size = rows * columns
        return [(name, (min(limit, size - at),)) for at in range(0, size, limit)]
    each = limit // columns
    return [(name, (min(each, rows - at), *shape[1:])) for at in range(0, rows, each)]


def cut(layout, limit):
    found, block = [], []
    for name, shape in layout:
        for part in parts(name, shape, limit):
            if total(block) and total([*block, part]) > limit:
                found.append(block)
                block = []
            block.append(part)
    return [*found, block] if total(block) else found


def split(cursor, layout, limit):
    cuts = cut(layout, limit)
    lengths = [cursor.varint() for _ in cuts[:-1]]
    bodies = [cursor.take(length) for length in lengths]
    if cuts:
        bodies.append(cursor.rest())
    cursor.end()
    return list(zip(cuts, bodies, strict=True))


# Lists


def integers(data, count):
    if count == 0:
        require(not data, "bytes left over")
        return []
    cursor = Cursor(data)
    (tag,) = cursor.take(1)
    if tag < 32:
        require(count <= 4096 and len(data) - 1 <= 8 * count + 1, "rice")
        return rice(cursor.rest(), tag, count)
    if tag == 32:
        value = cursor.varint(2**32 - 1)
        cursor.end()
        return [value] * count
    if tag == 34:
        require(count <= 4096, "sparse list")
        hits = cursor.varint(count // 2)
        gaps, values = integers(cursor.section(), hits), integers(cursor.rest(), hits)
        return spread(gaps, values, count)
    require(tag == 33, "tag")
    try:
        found = standalone.simple_decompress(cursor.rest())
    except Exception as error:
        raise RefusedError("pcodec") from error
    require(found is not None and len(found) == count and str(found.dtype) == "uint32", "pcodec")
    return found.tolist()


def spread(gaps, values, count):
    found, at = [0] * count, -1
    for gap, value in zip(gaps, values, strict=True):
        at += gap + 1
        require(at < count and value + 1 < 2**32, "sparse list")
        found[at] = value + 1
    return found


def rice(data, k, count):
    bits = "".join(f"{byte:08b}" for byte in data)
    quotients, at = [], 0
    for _ in range(count):
        one = bits.find("1", at)
        require(one >= 0, "rice")
        quotients.append(one - at)
        at = one + 1
    require((at + k * count + 7) // 8 == len(data), "rice")
    values = []
    for number, quotient in enumerate(quotients):
        low = bits[at + k * number : at + k * (number + 1)]
        values.append(quotient * 2**k + int(low or "0", 2))
    require(max(values) < 2**32, "rice")
    return values


# Levels


def cls(count):
    return (count * count).bit_length()


def levels(data, layout):
    """The levels of all elements."""
    found = [0] * total(layout)
    cursor = Cursor(data)
    count = cursor.varint(len(found))
    if count == 0:
        cursor.end()
        return found
    streams = places(cursor, layout)
    told = []
    for stream in streams:
        word = cursor.varint()
        told += dense(cursor, stream, word // 2) if word % 2 else sparse(cursor, stream, word // 2)
    require(len(told) == count, "non-zeros")
    signs = cursor.section()
    cursor.end()
    require(len(signs) == (count + 7) // 8, "signs")
    for number, (place, magnitude) in enumerate(told):
        require(0 < magnitude < 2**31, "magnitude")
        found[place] = -magnitude if signs[number // 8] >> 7 - number % 8 & 1 else magnitude
    return found


def dense(cursor, stream, expected):
    magnitudes = integers(cursor.section(), len(stream))
    told = [(place, magnitude) for place, magnitude in zip(stream, magnitudes, strict=True) if magnitude]
    require(len(told) == expected, "non-zeros")
    return told


def sparse(cursor, stream, expected):
    require(expected <= len(stream), "non-zeros")
    if not expected:
        return []
    gaps, magnitudes = (integers(cursor.section(), expected) for _ in range(2))
    told, at = [], -1
    for gap, magnitude in zip(gaps, magnitudes, strict=True):
        at += gap + 1
        require(at < len(stream), "gap")
        told.append((stream[at], magnitude + 1))
    return told


def places(cursor, layout):
    """For each stream, its elements' places in the flat vector, in order."""
    words = integers(cursor.section(), len(layout))
    grids, start = [], 0
    for (_, shape), word in zip(layout, words, strict=True):
        rows, columns = matrix(shape)
        t, mode = word // 4, word % 4
        if word:
            require(0 < t < 64 and rows * columns and (rows > 1 or not mode), "classes")
            sides = [
                integers(cursor.section(), size) if mode & bit else [0] * size
                for bit, size in ((1, rows), (2, columns))
            ]
            require(max(max(side) for side in sides) < 64, "classes")
            grids.append((start, t, mode, *sides))
        start += rows * columns
    edges = [byte - 128 for byte in cursor.take(cursor.varint(255))]
    require(grids and edges == sorted(set(edges)), "edges")
    streams = [[] for _ in range(len(edges) + 1)]
    for start, t, mode, rows, columns in grids:
        offset = (cls(len(rows) * len(columns)) - t, cls(len(columns)), cls(len(rows)), t)[mode]
        by_row, by_column = grouped(rows, mode & 1), grouped(columns, mode & 2)
        for a, members in by_row:
            for b, others in by_column:
                stream = streams[sum(edge <= a + b - offset for edge in edges)]
                stream += [start + row * len(columns) + column for row in members for column in others]
    return streams


def grouped(classes, told):
    """Rows or columns by class, ascending; without those whose class is told and 0."""
    groups = {}
    for number, found in enumerate(classes):
        if found or not told:
            groups.setdefault(found, []).append(number)
    return sorted(groups.items())


# Quantized vectors


def f32(value):
    try:
        return struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)


LARGEST = struct.unpack("<f", b"\xff\xff\x7f\x7f")[0]


def value_of(level, offsets):
    if not level:
        return 0.0
    magnitude = abs(level)
    return math.copysign(magnitude + offsets[min(magnitude, 3) - 1] / 128, level)


def quantized(data, layout, limit=BLOCK_LIMIT):
    cursor = Cursor(data)
    (step,) = cursor.fixed("f")
    require(0 < step < math.inf, "step")
    return [value for block, body in split(cursor, layout, limit) for value in quantized_block(body, block, step)]


def quantized_block(data, block, step):
    cursor = Cursor(data)
    offsets = cursor.fixed("3b")
    suited = [number for number, (_, shape) in enumerate(block) if min(matrix(shape)) >= 8]
    ranks = integers(cursor.section(), len(suited)) if suited else []
    for number, rank in zip(suited, ranks, strict=True):
        require(rank <= min(64, min(matrix(block[number][1])) // 2), "rank")
    told = [(number, rank) for number, rank in zip(suited, ranks, strict=True) if rank]
    right = cursor.fixed("3b") if told else None
    factors = [("", (side, rank)) for number, rank in told for side in matrix(block[number][1])]
    found = levels(cursor.rest(), [*block, *factors])
    values = []
    for level in found[: total(block)]:
        value = value_of(level, offsets) * step
        values.append(f32(max(-LARGEST, min(LARGEST, value))))
    starts = [total(block[:number]) for number in range(len(block))]
    at = total(block)
    for number, rank in told:
        rows, columns = matrix(block[number][1])
        a, at = found[at : at + rows * rank], at + rows * rank
        b, at = found[at : at + columns * rank], at + columns * rank
        for place, element in enumerate(product(a, b, right, rank, step), starts[number]):
            values[place] = f32(values[place] + element)
    return values


def product(a, b, offsets, rank, step):
    require(all(abs(level) <= 2**22 for level in a + b), "factor")
    squares = [sum(level * level for level in a[i::rank]) for i in range(rank)]
    require(max(squares) <= 2**52, "factor")
    norms = [max(1, math.isqrt(square)) for square in squares]
    c = [value_of(level, offsets) / norms[place % rank] for place, level in enumerate(b)]
    largest = max(abs(value) for value in c)
    q = 24 - (math.frexp(largest)[1] if largest else 0)
    d = [round(value * 2.0**q) for value in c]
    rows = [a[j : j + rank] for j in range(0, len(a), rank)]
    columns = [d[k : k + rank] for k in range(0, len(d), rank)]
    scale = step * 2.0**-q
    return [f32(sum(x * y for x, y in zip(row, column, strict=True)) * scale) for row in rows for column in columns]


# Update


def raw(data, count):
    require(len(data) == 4 * count, "raw")
    return list(struct.unpack(f"<{count}f", data))


def update(data, layouts, limit=BLOCK_LIMIT):
    """Vectors by name, and scalars."""
    cursor = Cursor(data)
    require(cursor.take(3) == b"FU\x02", "magic")
    digest, scalars, kinds = msgspec.msgpack.decode(cursor.take(cursor.varint(16384)))
    sha = hashlib.sha256()
    for name in sorted(layouts):
        sha.update(name.encode() + b"\0" + digest_of_layout(layouts[name]))
    require(set(kinds) == set(layouts) and digest == sha.digest()[:8], "layouts")
    vectors = {}
    for name, (kind, length) in kinds.items():
        body, size = cursor.take(length), total(layouts[name])
        require(kind in (0, 1, 2, 3), "kind")
        if kind < 2:
            require(not body, "bytes left over")
            vectors[name] = [(0.0, math.nan)[kind]] * size
        else:
            vectors[name] = raw(body, size) if kind == 2 else quantized(body, layouts[name], limit)
    cursor.end()
    return vectors, scalars


# Versions of the global model


# A state is a pair of its codes and its offset, a raw one a list of floats.


def floats(values):
    return struct.pack(f"<{len(values)}f", *values)


def encoded_varint(value):
    out = []
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def listed(codes):
    return encoded_varint(len(codes)) + b"".join(encoded_varint(len(code)) + code for code in codes)


def digest_of_state(state):
    head = b"R" + floats(state) if isinstance(state, list) else b"C" + listed(state[0]) + floats(state[1])
    return hashlib.blake2b(head, digest_size=32).digest()


def version(codes, layout, limit=BLOCK_LIMIT):
    require(len(codes) <= 32, "count")
    offset = [0.0] * total(layout)
    for code in codes:
        if code:
            offset = [f32(a + b) for a, b in zip(offset, quantized(code, layout, limit), strict=True)]
    require(all(map(math.isfinite, offset)), "finite")
    return codes, offset


def parameters(state, base):
    return [f32(value + more) for value, more in zip(base, state[1], strict=True)]


def checked(state, digest):
    require(digest_of_state(state)[: len(digest)] == digest, "digest")
    return state


def codes_of(cursor):
    codes = [cursor.section() for _ in range(cursor.varint(32))]
    cursor.end()
    return codes


def delta(data, old, layout, limit=BLOCK_LIMIT):
    cursor = Cursor(data)
    require(cursor.take(3) == b"FD\x03", "magic")
    kind, after = cursor.take(1)[0], cursor.take(16)
    if kind == 1:
        return checked(raw(cursor.rest(), total(layout)), after)
    require(kind == 0 and not isinstance(old, list), "kind")
    count, summary = cursor.varint(32), cursor.take(8)
    kept = old[0][:count]
    require(len(kept) == count and hashlib.blake2b(listed(kept), digest_size=8).digest() == summary, "another version")
    return checked(version([*kept, *codes_of(cursor)], layout, limit), after)


def packed_state(data, layout, limit=BLOCK_LIMIT):
    cursor = Cursor(data)
    require(cursor.take(3) == b"FS\x03", "magic")
    kind, digest = cursor.take(1)[0], cursor.take(32)
    if kind == 1:
        return checked(raw(cursor.rest(), total(layout)), digest)
    require(kind == 0, "kind")
    return checked(version(codes_of(cursor), layout, limit), digest)


def model(data, read, layout):
    """State and buffers, and the control where there is one; ``read`` turns the inner delta or packed state into a
    state."""
    if data[:2] != b"FV":
        return buffered(data, read)[:2]
    cursor = Cursor(data)
    require(cursor.take(3) == b"FV\x01", "version")
    state, buffers, digest = buffered(cursor.section(), read)
    rest = cursor.rest()
    require(len(rest) > 16, "control")
    control = rest[:-16]
    require(hashlib.blake2b(b"V" + digest + control, digest_size=32).digest()[:16] == rest[-16:], "digest")
    require(control[0] in (2, 3), "kind")
    vector = raw(control[1:], total(layout)) if control[0] == 2 else quantized(control[1:], layout)
    require(all(math.isfinite(value) for value in vector), "finite")
    return state, buffers, vector


def buffered(data, read):
    """State, buffers and digest of a model without control."""
    if data[:2] != b"FB":
        state = read(data)
        return state, [], digest_of_state(state)
    cursor = Cursor(data)
    require(cursor.take(3) == b"FB\x01", "version")
    state = read(cursor.section())
    rest = cursor.rest()
    require(len(rest) > 16 and len(rest) % 4 == 0, "buffers")
    buffers = rest[:-16]
    digest = hashlib.blake2b(b"B" + digest_of_state(state) + buffers, digest_size=32).digest()
    require(digest[:16] == rest[-16:], "digest")
    return state, raw(buffers, len(buffers) // 4), digest
