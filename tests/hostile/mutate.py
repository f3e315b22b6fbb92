"""Valid messages and what a hostile peer makes of them: other bytes, other types, lengths that are not there."""

import random
from typing import Any

import msgspec

from edge_client.wire import messages as m

LENGTHS = (0xC6, 0xC9, 0xDB, 0xDD, 0xDF)
"""First bytes of MessagePack's binaries, extensions, texts, arrays and maps whose length has four bytes."""
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2**31,
    2**48,
    2**48 + 1,
    2**64 - 1,
    -(2**63),
    0.0,
    1e8,
    1e300,
    float("nan"),
    float("inf"),
    "",
    "\x1b[31m\n",
    "x" * 500,
    b"",
    bytes(8),
    bytes(32),
    bytes(20_000),
    [],
    [0] * 4096,
    [[[[]]]],
    {},
    {"lr": 1e30},
)


def mutate(payload: bytes, dice: random.Random) -> bytes:
    """One to three changes to a payload, in its bytes or in what they mean."""
    for _ in range(dice.randint(1, 3)):
        payload = dice.choice((_flip, _cut, _insert, _length, _swap, _swap, _swap))(payload, dice)
    return payload


def _flip(payload: bytes, dice: random.Random) -> bytes:
    data = bytearray(payload)
    if data:
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    return bytes(data)


def _cut(payload: bytes, dice: random.Random) -> bytes:
    start = dice.randint(0, len(payload))
    return payload[:start] + payload[dice.choice((len(payload), min(len(payload), start + dice.randint(1, 40)))) :]


def _insert(payload: bytes, dice: random.Random) -> bytes:
    start = dice.randint(0, len(payload))
    return payload[:start] + dice.choice((dice.randbytes(dice.randint(1, 40)), payload)) + payload[start:]


def _length(payload: bytes, dice: random.Random) -> bytes:
    start = dice.randint(0, len(payload))
    claim = bytes([dice.choice(LENGTHS)]) + dice.choice((b"\xff\xff\xff\xff", b"\x00\x01\x00\x00"))
    return payload[:start] + claim + payload[start + dice.randint(0, 5) :]


def _swap(payload: bytes, dice: random.Random) -> bytes:
    """Another value, perhaps of another type, in the place of one, however deep."""
    try:
        message = msgspec.msgpack.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return payload
    at = message
    while isinstance(at, list | dict) and at:
        key = dice.choice(list(range(len(at)) if isinstance(at, list) else at))
        inner = at[key]
        if isinstance(inner, list | dict) and inner and dice.random() < 0.8:
            at = inner
            continue
        match dice.randrange(4):
            case 0 if isinstance(at, list):
                at.insert(key, dice.choice(VALUES))
            case 1:
                del at[key]
            case 2 if isinstance(inner, int):
                at[key] = inner + dice.choice((-1, 1, 7, 2**20))
            case _:
                at[key] = dice.choice(VALUES)
        break
    try:
        return msgspec.msgpack.encode(message)
    except OverflowError:
        return payload


def is_message(payload: bytes) -> bool:
    """Whether a payload is one after all."""
    try:
        m.decode(payload)
    except m.WireError:
        return False
    return True
