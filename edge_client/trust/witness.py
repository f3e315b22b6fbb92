"""What a device remembers of what it has believed, over power cuts: its own starts, and the newest offer.

One small file. A device writes it once when it starts and once for each new offer, not for every message.
"""

from pathlib import Path

import msgspec

from edge_client.errors import ConfigError, StoreError
from edge_client.trust.keys import write_secret
from edge_client.wire.envelope import Stamp


class _Remembered(msgspec.Struct, frozen=True):
    life: int = 0
    newest: Stamp = Stamp(0, 0, 0)
    issued: float = 0.0


class Witness:
    """The memory in one file; ``life`` counts the starts of the device, of which opening this is one.

    ``wall`` is the time in seconds since 1970, as far as the device knows: with a clock, a device whose memory is lost
    still counts on from there, and the server believes it. ``issued`` is when the newest offer was, 0 where there is
    none: a time that certainly has passed.

    Raises:
        StoreError: the file cannot be read or written, or is damaged.
    """

    def __init__(self, path: Path, wall: float) -> None:
        self._path = path
        before = self._read()
        self.life = max(before.life + 1, int(wall))
        self.newest, self.issued = before.newest, before.issued
        self._write()

    def remember(self, newest: Stamp, issued: float) -> None:
        """This offer was believed, which was issued at a time in seconds since 1970.

        Raises:
            StoreError: the disk refuses.
        """
        self.newest, self.issued = newest, max(self.issued, issued)
        self._write()

    def _read(self) -> _Remembered:
        try:
            return msgspec.msgpack.decode(self._path.read_bytes(), type=_Remembered)
        except FileNotFoundError:
            return _Remembered()
        except OSError as error:
            raise StoreError(f"{self._path}: cannot be read ({error.strerror}); it must be readable") from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise StoreError(
                f"{self._path} is damaged ({error}); remove it, and the device believes what it is offered first"
            ) from error

    def _write(self) -> None:
        try:
            write_secret(self._path, msgspec.msgpack.encode(_Remembered(self.life, self.newest, self.issued)))
        except ConfigError as error:
            raise StoreError(str(error)) from error
