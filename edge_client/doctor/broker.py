"""Experiments with a broker: what it does with what fedge would ask of it.

Everything happens below ``fedge/<federation>/probe/<random>``, where no client listens, and is cleared at the end.
"""

import dataclasses
import itertools
import secrets
import socket
import statistics
import time
from collections.abc import Iterator

from edge_client.address import Address
from edge_client.doctor.finding import Finding, Report, report
from edge_client.doctor.limits import LEAST, OVERHEAD, fitting, largest_payload
from edge_client.doctor.peer import Peer
from edge_client.errors import TransportError
from edge_client.tls import Tls

_CHUNK, _LARGEST_CHUNK = 64 * 1024, 1024 * 1024
_WINDOW = 16
"""Chunks that a client subscribes to at a time."""
_MANY, _BURST, _SMALL = 256, 2000, 4096
_UPLOADS = 16 * _WINDOW
"""Chunks that are under way to the server, with the settings that it comes with."""
_PATIENCE = 3
"""Connections that something is tried on: amqtt ends some without a reason, and fedge comes back too."""
_SECONDS = 3.0
"""What has not come within this time does not come."""
_DELAYED = 0.03
"""Seconds by which Nagle's algorithm and delayed acknowledgements give themselves away: they take 0.04."""
_CUT = "ends the connection of who sends them"


def examine(address: Address, federation: str | None = None, tls: Tls | None = None) -> Report:
    """Try out the broker at ``address``, with its user's rights: those of fedge's server are the ones that matter."""
    laboratory = _Laboratory(address, federation or address.federation or "doctor", tls)
    try:
        findings = tuple(laboratory.run())
        return report(str(address), findings, laboratory.chunk)
    finally:
        laboratory.clean()


def reach(address: Address, tls: Tls | None = None) -> Finding:
    """Whether the broker lets this device in, and how long a small question takes."""
    try:
        with Peer(address, f"fd-{secrets.token_hex(4)}", tls=tls) as peer:
            began = time.monotonic()
            peer.subscribe([f"fedge/{address.federation or 'doctor'}/pub/offer"])
            answer = time.monotonic() - began
    except TransportError as error:
        advice = "check address, port, user and password; on the broker's machine, that it listens on this network"
        if "certificate" in str(error).lower():
            advice = "check the clock, the folder of --identity (or SSL_CERT_FILE), and the host's name"
        return Finding("broker", "bad", str(error), advice)
    return Finding("broker", "good", f"{address} lets this device in and answers within {answer * 1e3:.0f} ms")


class _Laboratory:
    """One broker, and what is measured of it."""

    def __init__(self, address: Address, federation: str, tls: Tls | None) -> None:
        token = secrets.token_hex(4)
        self.chunk: int | None = None
        self._address, self._name, self._tls = address, f"fd-{token}", tls
        self._root, self._outside = f"fedge/{federation}/probe/{token}", f"fedge-doctor-{token}/outside"
        self._retained: list[str] = []
        self._five = False
        self._count = itertools.count(1)

    def run(self) -> Iterator[Finding]:
        """One finding after the other; none after one that leaves nothing to try."""
        for version, name in ((4, "MQTT 3.1.1"), (5, "MQTT 5")):
            found = self._version(version, name)
            yield found
            if found.level == "bad":
                return
        experiments = {
            "round trip": self._echo,
            "message size": self._size,
            "retained, exact": self._retained_exact,
            "retained, wildcard": self._retained_wildcard,
            "many filters": self._filters,
            "many chunks": self._many,
            "full queue": self._burst,
            "offline delivery": self._offline,
            "redelivery": self._redelivery,
            "access rules": self._denied,
            "passwords": self._anonymous,
            "dots in names": self._dots,
        }
        for name, experiment in experiments.items():
            try:
                found = experiment(name)
            except TransportError as error:
                found = Finding(name, "bad", str(error), "see the broker's log")
            yield found
            # The other experiments rest on these.
            if found.level == "bad" and experiment in (self._echo, self._size, self._retained_exact):
                return

    def clean(self) -> None:
        """Leave nothing on the broker."""
        if self._retained:
            with self._peer() as peer:
                peer.acknowledged([peer.send(topic, b"", retain=True) for topic in self._retained], _SECONDS)

    def _peer(self, name: str = "", *, version: int = 4, clean: bool = True, manual: bool = False) -> Peer:
        # A name of its own: some brokers take the end of a connection for that of the next one with its name.
        return Peer(
            self._address,
            f"{self._name}-{name or next(self._count)}",
            version=version,
            clean=clean,
            manual=manual,
            tls=self._tls,
        )

    def _keep(self, topics: list[str], payload: bytes) -> None:
        """Retain a message on each topic; on a new connection where the broker ends the one before."""
        self._retained += topics
        for _ in range(_PATIENCE):
            with self._peer() as peer:
                sent = [peer.send(topic, payload, retain=True) for topic in topics]
                if peer.acknowledged(sent, _SECONDS + 0.1 * len(topics)) or not peer.lost:
                    return

    def _version(self, version: int, name: str) -> Finding:
        try:
            with self._peer(version=version) as peer:
                told = peer.largest_packet
        except TransportError as error:
            if version == 5:
                return Finding(name, "note", "not spoken; fedge does not need it")
            return Finding(name, "bad", str(error), "check address, port, user and password; fedge speaks MQTT 3.1.1")
        self._five = version == 5
        says = "" if told is None else f"; says that it takes packets of {told:,} bytes"
        return Finding(name, "good", f"spoken{says}")

    def _echo(self, name: str) -> Finding:
        """Small messages to oneself: PUBACK and PUBLISH leave the broker one after the other, which Nagle delays."""
        began = time.monotonic()
        with socket.create_connection((self._address.host, self._address.port), timeout=10):
            wire = time.monotonic() - began
        topic, times = f"{self._root}/echo", []
        with self._peer() as peer:
            granted = peer.subscribe([topic])
            for number in range(20):
                began = time.monotonic()
                peer.send(topic, b"%d" % number)
                if not peer.take(1, _SECONDS):
                    why = "subscribing is refused" if granted == [False] else peer.lost or "nothing comes back"
                    return Finding(
                        name,
                        "bad",
                        f"what this user publishes on {topic} does not reach it: {why}",
                        "say that you are fedge's server, who reads and writes fedge/#: --broker "
                        "mqtt://server:password@host, or mqtts://host/FEDERATION --identity AUTHORITY",
                    )
                times.append(time.monotonic() - began)
        median = statistics.median(times)
        found = f"{median * 1e3:.1f} ms for a small message (a TCP handshake takes {wire * 1e3:.1f} ms)"
        if median - 2 * wire > _DELAYED:
            advice = "let the broker send small packets at once (mosquitto: set_tcp_nodelay true)"
            return Finding(name, "note", found, advice)
        return Finding(name, "good", found)

    def _size(self, name: str) -> Finding:
        most = _LARGEST_CHUNK + OVERHEAD
        limit = largest_payload(self._address, f"{self._name}-s", self._root, most, self._tls) or 0
        if limit < LEAST:
            advice = f"raise the broker's limit to {_CHUNK + OVERHEAD:,} bytes or more"
            return Finding(name, "bad", f"at most {limit:,} bytes pass; fedge needs {LEAST:,}", advice)
        self.chunk = fitting(limit, _CHUNK)
        if limit == most:
            return Finding(name, "good", f"1 MiB passes, so do chunks of any size; the server's are {_CHUNK:,} bytes")
        if self.chunk == _CHUNK:
            advice = f"leave transfer.chunk at or below {fitting(limit, _LARGEST_CHUNK)}"
            return Finding(name, "good", f"{limit:,} bytes pass, and so do chunks of {_CHUNK:,} bytes", advice)
        return Finding(
            name,
            "note",
            f"{limit:,} bytes pass; the server will cut its chunks to {self.chunk:,} bytes by itself",
            f"raise the broker's limit to {_CHUNK + OVERHEAD:,} bytes or more: transfers are faster then",
        )

    def _retained_exact(self, name: str) -> Finding:
        topics = [f"{self._root}/kept/{number}" for number in range(3)]
        self._keep(topics, b"kept")
        with self._peer() as peer:
            alive = [bool(peer.subscribe([topic]) and peer.take(1, _SECONDS)) for topic in topics]
        if not all(alive):
            found = f"{sum(alive)} of {len(alive)} come to a later subscriber"
            return Finding(name, "bad", found, "let the broker retain messages: models travel that way")
        with self._peer() as peer:
            peer.publish(topics[0], b"", retain=True)
        with self._peer() as peer:
            peer.subscribe(topics[:1])
            peer.subscribe(topics[1:2])
            left = {message.topic for message in peer.take(2, 0.5) if message.payload}
        if topics[0] in left:
            advice = "old models stay on the broker: watch its memory"
            return Finding(name, "note", "come to a later subscriber, but cannot be cleared", advice)
        return Finding(name, "good", "come to a later subscriber, and can be cleared")

    def _retained_wildcard(self, name: str) -> Finding:
        topics = [f"{self._root}/wild/{number}" for number in range(3)]
        self._keep(topics, b"kept")
        with self._peer() as peer:
            peer.subscribe([f"{self._root}/wild/#"])
            came = len(peer.take(len(topics), _SECONDS))
        if came < len(topics):
            found = f"{came} of {len(topics)} come; fedge does not need them"
            return Finding(name, "note", found)
        return Finding(name, "good", "come; fedge does not rely on it")

    def _filters(self, name: str) -> Finding:
        topics = [f"{self._root}/filter/{number}" for number in range(_WINDOW)]
        self._keep(topics, b"kept")
        with self._peer() as peer:
            granted = peer.subscribe(topics)
            came = {message.topic for message in peer.take(_WINDOW, _SECONDS)}
        if len(granted) != _WINDOW or not all(granted) or len(came) != _WINDOW:
            found = f"{sum(granted)} of {_WINDOW} filters in one SUBSCRIBE are granted, {len(came)} messages come"
            return Finding(name, "bad", found, f"set transfer.window to {max(1, len(came))} in the federation file")
        return Finding(name, "good", f"{_WINDOW} filters in one SUBSCRIBE, every retained message comes")

    def _many(self, name: str) -> Finding:
        """A model in chunks, pulled as a client pulls it."""
        topics = [f"{self._root}/many/{number}" for number in range(_MANY)]
        self._keep(topics, bytes(_SMALL))
        missing, again, began = set(topics), 0, time.monotonic()
        with self._peer() as peer:
            while missing and again < 3 and not peer.lost:
                for first in range(0, len(topics), _WINDOW):
                    window = [topic for topic in topics[first : first + _WINDOW] if topic in missing]
                    if window:
                        peer.subscribe(window)
                        missing -= {message.topic for message in peer.take(len(window), _SECONDS / 3)}
                        peer.unsubscribe(window)
                again += bool(missing)
        rate = _MANY * _SMALL / 1e6 / (time.monotonic() - began)
        if missing:
            found = f"{len(missing)} of {_MANY} retained chunks do not come, asked for three times"
            advice = "raise what the broker retains and queues (mosquitto: max_queued_messages 100000)"
            return Finding(name, "bad", found, advice)
        lost = f", some only when asked for {again + 1} times" if again else ""
        return Finding(name, "good", f"all {_MANY} retained chunks of 4 KiB come{lost}, {rate:.1f} MB/s")

    def _burst(self, name: str) -> Finding:
        """More messages than fit a queue, for a subscriber that does not read: the server, when it is busy."""
        for attempt in range(_PATIENCE):
            came, fate = self._overflow(f"{self._root}/burst/{attempt}")
            if fate != _CUT:
                break
        if came >= _BURST:
            return Finding(name, "good", f"{_BURST:,} messages wait for a slow subscriber; none is lost")
        found = f"keeps {came:,} of {_BURST:,} messages for a slow subscriber, {fate}"
        if came < _UPLOADS:
            advice = f"keep transfer.uploads * transfer.window below {came}, or raise the broker's queue"
        else:
            advice = "raise the queue (mosquitto: max_queued_messages 100000), or chunks will be sent again and again"
        return Finding(name, "note", f"{found}; fedge sends them again", advice)

    def _overflow(self, topic: str) -> tuple[int, str]:
        """How many messages come to a subscriber that slept while they were sent, and what became of the others."""
        with self._peer(manual=True) as slow, self._peer() as fast:
            slow.subscribe([topic])
            acknowledged = fast.acknowledged([fast.send(topic, bytes(64)) for _ in range(_BURST)], 10 * _SECONDS)
            fate = "acknowledges and loses the others" if acknowledged else "does not acknowledge the others"
            fate = _CUT if fast.lost else fate
            came = 0
            while came < _BURST and (message := slow.take(1, _SECONDS / 2)):
                slow.acknowledge(message[0])
                came += 1
        return came, fate

    def _offline(self, name: str) -> Finding:
        topic = f"{self._root}/offline"
        with self._peer("o", clean=False) as peer:
            peer.subscribe([topic])
        with self._peer() as peer:
            for number in range(5):
                peer.publish(topic, b"%d" % number)
        with self._peer("o", clean=False) as peer:
            came = len(peer.take(5, _SECONDS))
        with self._peer("o"):
            pass  # a clean session of that name ends the one that was kept
        if came < 5:
            return Finding(name, "note", f"{came} of 5 messages wait for a client that is away; fedge does not need it")
        return Finding(name, "good", "messages wait for a client that is away; fedge does not rely on it")

    def _redelivery(self, name: str) -> Finding:
        topic = f"{self._root}/again"
        with self._peer("a", clean=False, manual=True) as peer:
            peer.subscribe([topic])
            peer.publish(topic, b"once")
            peer.take(1, _SECONDS)
            peer.cut()
        with self._peer("a", clean=False) as peer:
            again = peer.take(1, _SECONDS)
        with self._peer("a"):
            pass
        if again:
            found = "what a client had no time to acknowledge comes again; fedge does not rely on it"
            return Finding(name, "good", found)
        found = f"what a client had no time to acknowledge is not sent again within {_SECONDS:.0f} s"
        return Finding(name, "note", f"{found}; fedge does not need it")

    def _denied(self, name: str) -> Finding:
        """Whether a publish that is not allowed looks like one that is."""
        try:
            with self._peer() as peer:
                peer.subscribe([self._outside])
                code = peer.publish(self._outside, b"denied", seconds=_SECONDS)
                came = bool(peer.take(1, _SECONDS / 3))
                lost = peer.lost
        except TransportError as error:
            return Finding(name, "note", str(error))
        if came:
            found = "this user reads and writes outside fedge/ too: no rule holds it back"
            return Finding(name, "note", found, "give each device its rules: `fedge broker config` writes them")
        if lost:
            return Finding(name, "note", f"a publish that is not allowed ends the connection ({lost})")
        if code is None:
            return Finding(name, "good", "a publish that is not allowed is not acknowledged")
        five = self._denied_in_five()
        found = f"a publish that is not allowed is acknowledged and dropped{five}; fedge trusts no acknowledgement"
        return Finding(name, "good", found)

    def _denied_in_five(self) -> str:
        if not self._five:
            return ""
        with self._peer(version=5) as peer:
            code = peer.publish(self._outside, b"denied", seconds=_SECONDS)
        return f" (MQTT 5 says {str(code)!r})" if code is not None and code.is_failure else " (in MQTT 5 too)"

    def _anonymous(self, name: str) -> Finding:
        nobody = dataclasses.replace(self._address, username=None, password=None)
        try:
            with Peer(nobody, f"{self._name}-nobody", tls=self._tls and Tls(self._tls.ca)):
                pass
        except TransportError:
            what = "certificate" if self._tls is not None and self._tls.certificate is not None else "one"
            return Finding(name, "good", f"nobody is let in without {'a ' * (what != 'one')}{what}")
        advice = "" if self._address.loopback else "ask for certificates: `fedge broker config` writes how"
        return Finding(name, "note", "anybody is let in without one", advice)

    def _dots(self, name: str) -> Finding:
        topic = f"{self._root}/a.b"
        try:
            with self._peer() as peer:
                peer.subscribe([topic])
                peer.send(topic, b"dot")
                works = bool(peer.take(1, _SECONDS))
        except TransportError:
            works = False
        if works:
            return Finding(name, "good", "topics may have dots, so names of devices may")
        return Finding(name, "note", "topics must not have dots", "give devices names without dots (fedge join --id)")
