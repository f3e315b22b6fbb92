"""Where a broker is: a URL, what it says, and whether one may go there in the open."""

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import quote, unquote, urlsplit

from edge_client.errors import ConfigError, TransportError


@dataclass(frozen=True)
class Address:
    """Where a broker listens: ``mqtt://[user:password@]host[:port][/federation]``, ``mqtts://`` for TLS."""

    host: str
    port: int
    tls: bool = False
    username: str | None = None
    password: str | None = None
    federation: str | None = None

    @classmethod
    def parse(cls, url: str) -> "Address":
        """Read a URL.

        Raises:
            TransportError: it is not one that fedge can use.
        """
        shown = re.sub(r"//[^@/]*@", "//...@", url)  # a log is no place for a password
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise TransportError(f"broker URL {shown!r}: {error}; expected mqtt://host:port") from error
        if parts.scheme not in ("mqtt", "mqtts") or not parts.hostname:
            raise TransportError(f"broker URL {shown!r} is not of the form mqtt://host:port or mqtts://host:port")
        tls = parts.scheme == "mqtts"
        name = parts.path.strip("/") or None
        user = None if parts.username is None else unquote(parts.username)
        password = None if parts.password is None else unquote(parts.password)
        return cls(parts.hostname, port or (8883 if tls else 1883), tls, user, password, name)

    @property
    def loopback(self) -> bool:
        """Whether the broker is on this machine, where nobody listens in between."""
        try:
            return ipaddress.ip_address(self.host.partition("%")[0]).is_loopback
        except ValueError:
            return self.host.lower().rstrip(".") == "localhost"

    def check(self, *, insecure: bool = False) -> None:
        """Refuse to go over a network in the open, unless told to.

        Raises:
            ConfigError: it is neither TLS nor loopback, and not ``insecure``.
        """
        if not (self.tls or self.loopback or insecure):
            raise ConfigError(
                f"broker {self} is on another machine, and what goes there by mqtt:// is read and changed by anybody "
                "in between; use mqtts://, or say --insecure where you trust the network"
            )

    @property
    def url(self) -> str:
        """The URL that `parse` reads this address from, password included."""
        user = "" if self.username is None else quote(self.username, safe="")
        password = "" if self.password is None else f":{quote(self.password, safe='')}"
        return str(self).replace("://", f"://{user}{password}@" if user else "://", 1)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'mqtts' if self.tls else 'mqtt'}://{host}:{self.port}"
