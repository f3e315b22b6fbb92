"""What a card makes of a Raspberry Pi: its name, its network, its federation."""

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from edge_client.address import Address
from edge_client.errors import ConfigError
from edge_client.trust.claim import Claim

DATA = "drop:/var/lib/fedge/data"
_HOSTNAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_USER = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
_KEY = re.compile(r"(ssh-|ecdsa-|sk-)[a-z0-9@.-]+ [A-Za-z0-9+/=]{16,}( .*)?")
_LONGEST_SSID = 32
_PASSPHRASE = range(8, 64)


@dataclass(frozen=True)
class Wifi:
    """A network that the device joins: WPA2, or WPA2 and WPA3; open where there is no key."""

    ssid: str
    key: str = dataclasses.field(default="", repr=False)
    """64 hexadecimal digits (IEEE 802.11, annex J.4), which open this one network, or nothing."""
    country: str = ""

    @classmethod
    def of(cls, ssid: str, passphrase: str, country: str) -> "Wifi":
        """The network ``ssid``, in a country by its code of two letters; the passphrase itself is not kept.

        Raises:
            ConfigError: a name, passphrase or country that cannot be one.
        """
        if not 0 < len(ssid.encode()) <= _LONGEST_SSID or not ssid.isprintable():
            raise ConfigError(f"--wifi {ssid!r}: expected a network's name, 1 to {_LONGEST_SSID} bytes")
        if not re.fullmatch(r"[A-Z]{2}", country):
            raise ConfigError(f"--country {country!r}: expected two letters, such as GB: radio rules depend on it")
        if not passphrase or re.fullmatch(r"[0-9A-Fa-f]{64}", passphrase):
            return cls(ssid, passphrase.lower(), country)
        secret = passphrase.encode()
        if len(secret) not in _PASSPHRASE:
            raise ConfigError(f"the passphrase of {ssid!r} has {len(secret)} bytes; expected 8 to 63, or 64 hex digits")
        return cls(ssid, hashlib.pbkdf2_hmac("sha1", secret, ssid.encode(), 4096, 32).hex(), country)


@dataclass(frozen=True)
class CardSettings:
    """One card. ``name`` is the device's in the federation, and its host name."""

    name: str
    server: str
    """The broker's URL, with the federation as its path."""
    data: str = DATA
    insecure: bool = False
    """Whether the device may go to another machine's broker without TLS."""
    wifi: Wifi | None = None
    user: str = "pi"
    ssh_keys: tuple[str, ...] = ()
    claim: bytes | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            ConfigError: a name, user, key or URL that cannot be one.
        """
        if not _HOSTNAME.fullmatch(self.name):
            raise ConfigError(f"--hostname {self.name!r}: expected 1 to 63 small letters, digits and inner dashes")
        if not _USER.fullmatch(self.user):
            raise ConfigError(f"--user {self.user!r}: expected up to 32 small letters, digits, dashes, underscores")
        for key in self.ssh_keys:
            if not _KEY.fullmatch(key) or not key.isprintable():
                raise ConfigError(f"--ssh-key {key[:16]!r}...: expected a public key, a line such as in id_ed25519.pub")
        Address.parse(self.server).check(insecure=self.insecure)
        if not self.data.isprintable() or not self.data:
            raise ConfigError(f"--data {self.data!r}: expected what `fedge join --data` takes")

    @property
    def device_toml(self) -> str:
        """``/etc/fedge/device.toml``, which `fedge join` reads."""
        insecure = "insecure = true\n" if self.insecure else ""
        return (
            f"broker = {quoted(self.server)}\nid = {quoted(self.name)}\n{insecure}\n"
            f"[data]\nsource = {quoted(self.data)}\nkeep_mib = 512\n"
        )

    @property
    def card_toml(self) -> str:
        """What ``fedge-firstboot`` sets where the system's own first boot does not: name, network, who may log in."""
        lines = [f"hostname = {quoted(self.name)}"]
        if self.ssh_keys:
            lines += [f"user = {quoted(self.user)}", f"ssh_keys = [{', '.join(map(quoted, self.ssh_keys))}]"]
        if self.wifi is not None:
            lines += ["", "[wifi]", f"ssid = {quoted(self.wifi.ssid)}", f"country = {quoted(self.wifi.country)}"]
            lines += [f"key = {quoted(self.wifi.key)}"]
        return "\n".join(lines) + "\n"


def quoted(text: str) -> str:
    """A printable string as TOML, YAML and JSON all write it; rpi-preseed's own reader knows no other escapes."""
    return json.dumps(text, ensure_ascii=False)


def server_of(url: str | None, claim: Claim | None) -> str:
    """The broker's URL with the federation, from what was said and what a claim says.

    Raises:
        ConfigError: neither says it, or they contradict each other.
    """
    if claim is None:
        if url is None:
            raise ConfigError("name the broker: --server mqtts://HOST:8883/FEDERATION, or a --claim, which says it")
        return url
    address = Address.parse(url or claim.broker)
    if address.federation not in (None, claim.federation):
        raise ConfigError(f"--server {url}: the claim is for the federation {claim.federation!r}")
    return f"{address.url}/{claim.federation}"


def read_claim(path: Path, now: float) -> Claim:
    """A claim that is good for some time yet; ``now`` in seconds since 1970.

    Raises:
        ConfigError: it cannot be read, is none, or is over.
    """
    claim = Claim.load(path)
    if now >= claim.expires:
        raise ConfigError(f"{path} is over: a card with it would be refused; make a new one with `fedge claim`")
    return claim
