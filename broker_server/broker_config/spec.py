"""What a broker's configuration is made of, whichever broker it is for, and the folder that it makes."""

import dataclasses
import os
import pwd
from dataclasses import dataclass
from pathlib import Path

import msgspec

from edge_client.errors import ConfigError

SERVER, ENROLMENT, CLAIM = "@server", "@enrol", "@claim"
"""Users that are no devices: no device can have such a name. Every claim has the same one: what it may do does not
depend on which it is, and so no rule has to be written for each."""
OVERHEAD = 1024
"""Bytes of an MQTT packet beside its payload: a topic has at most 213."""
FILES = ("ca.crt", "broker.crt", "broker.key", "crl.pem")
"""What a broker needs of an authority. The key that makes certificates is not among them."""
_KEPT, _FOLDERS = "fedge.json", "brokers"


@dataclass(frozen=True)
class BrokerSpec:
    """A federation's broker.

    Args:
        federation: its name.
        authority: the folder that ``fedge ca init`` made; what the broker needs of it is copied.
        host: the address to listen on.
        port: for MQTT over TLS.
        message_limit: bytes of the largest payload that passes.
        queue: messages that wait for a slow subscriber, at least.
        place: where the folder will lie on the broker's machine; empty is where it is written.
        user: who the broker runs as where it is started by root, and who owns the files then; empty is who writes them.
        devices: those that have a valid certificate, for brokers that must know everyone by name.
        revoked: those that have none any more.
        muted: those that may say nothing for a while.
        expected: those that will enrol, for such brokers too.
    """

    federation: str
    authority: Path
    host: str = "0.0.0.0"  # noqa: S104 (certificates are asked for)
    port: int = 8883
    message_limit: int = 2_000_000
    queue: int = 100_000
    place: str = ""
    user: str = ""
    devices: tuple[str, ...] = ()
    revoked: tuple[str, ...] = ()
    muted: tuple[str, ...] = ()
    expected: tuple[str, ...] = ()

    @property
    def packet_limit(self) -> int:
        """Bytes of the largest MQTT packet."""
        return self.message_limit + OVERHEAD

    @property
    def owner(self) -> str:
        """Who the broker runs as."""
        return self.user or pwd.getpwuid(os.geteuid()).pw_name

    def at(self, folder: Path) -> Path:
        """Where ``folder`` will lie when the broker reads it."""
        return Path(self.place) if self.place else folder.absolute()

    @property
    def topics(self) -> str:
        """What all topics begin with."""
        return f"fedge/{self.federation}"


def fill(folder: Path, spec: BrokerSpec, texts: dict[str, str], own: tuple[str, ...] = ()) -> None:
    """Write a folder with the authority's files and ``texts``, for its owner alone.

    Where root writes it for another user, the files are that user's, and so are the folders ``own`` in it, in which the
    broker writes. The folder itself is root's: what its user put there, root would otherwise write and give away later.

    Raises:
        ConfigError: a file of the authority is missing, or the disk refuses.
    """
    user = _other(folder, spec.user)
    if user is not None:
        _take(folder, user)
    for name in FILES:
        path = spec.authority / name
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ConfigError(
                f"{path}: cannot be read ({error.strerror}); expected the folder of an authority: fedge ca init"
            ) from error
        _write(folder / name, data)
    for name, text in texts.items():
        _write(folder / name, text.encode())
    try:
        for name in own:
            (folder / name).mkdir(mode=0o700, exist_ok=True)
        if user is not None:
            for name in (*FILES, *texts, *own):
                os.chown(folder / name, user.pw_uid, user.pw_gid, follow_symlinks=False)
    except OSError as error:
        raise ConfigError(
            f"{error.filename}: cannot be written ({error.strerror}); check disk and permissions"
        ) from error


def _other(folder: Path, name: str) -> pwd.struct_passwd | None:
    """To whom root gives what it writes; None where files stay who writes them."""
    if not name or os.geteuid() != 0:
        return None
    try:
        user = pwd.getpwnam(name)
    except KeyError as error:
        raise ConfigError(f"{folder}: cannot be given to user {name!r} ({error}); name one with --user") from error
    return user if user.pw_uid else None


def _take(folder: Path, user: pwd.struct_passwd) -> None:
    """Make a folder root's, which a broker's user can read and not write."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if folder.is_symlink():
            raise ConfigError(f"{folder} is a symbolic link; name the folder itself")
        os.chown(folder, 0, user.pw_gid, follow_symlinks=False)
        folder.chmod(0o750)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error.strerror}); check disk and permissions") from error


def remember(folder: Path, kind: str, spec: BrokerSpec, **settings: str | int) -> None:
    """Keep how a folder was written, so that it can be written anew (`recall`), and that it was (`known`).

    Raises:
        ConfigError: the disk refuses.
    """
    absolute = dataclasses.replace(spec, authority=spec.authority.absolute())
    kept = msgspec.json.encode(Kept(kind, settings, absolute), enc_hook=str)
    _write(folder / _KEPT, msgspec.json.format(kept))
    if folder.absolute() not in known(spec.authority):
        listed = (*known(spec.authority), folder.absolute())
        _write(spec.authority / _FOLDERS, "".join(f"{one}\n" for one in listed).encode())


class Kept(msgspec.Struct, forbid_unknown_fields=True):
    """What `remember` kept."""

    kind: str
    settings: dict[str, str | int]
    spec: BrokerSpec


def recall(folder: Path) -> Kept:
    """How a folder was written.

    Raises:
        ConfigError: it was not written by ``fedge broker config``, or not by who asks.
    """
    path = folder / _KEPT
    try:
        # It says which files are copied to where: to be believed only where nobody else can have put it there.
        if others := {folder.stat().st_uid, path.lstat().st_uid} - {os.geteuid()}:
            raise ConfigError(
                f"{path} can be changed by user {min(others)}, and user {os.geteuid()} would do what it says; write "
                "the folder anew with `fedge broker config`, or say this as that user"
            )
        return msgspec.json.decode(path.read_bytes(), type=Kept, dec_hook=lambda kind, value: kind(value))
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{path}: {error}; expected a folder that `fedge broker config` wrote") from error


def known(authority: Path) -> tuple[Path, ...]:
    """The folders that were written for an authority, those that are gone left out."""
    try:
        lines = (authority / _FOLDERS).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return ()
    return tuple(folder for folder in map(Path, lines) if (folder / _KEPT).exists())


def _write(path: Path, data: bytes) -> None:
    # Here, so that a server whose federation is not signed does not load cryptography.
    from edge_client.trust.keys import write_secret

    write_secret(path, data)
