"""Attacks on what is said: a real `fedge serve` and `fedge join`, and a man with the broker's own rights.

He reads everything, and may write and retain everywhere: access rules do not stop him, signatures have to.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from broker_server.authority import Authority
from edge_client.address import Address
from edge_client.doctor.peer import Peer
from edge_client.tls import Tls
from edge_client.trust.identity import Identity
from edge_client.trust.speech import identity_voice
from edge_client.wire import messages as m
from edge_client.wire import transfer
from edge_client.wire.topics import Topics
from edge_client.wire.voice import PlainMember
from tests.attacks.outcome import Outcome
from tests.attacks.puppet import Puppet
from tests.federation import NAME, Joining, Running, Serving, all_enrolled, enrolled, federation

TOPICS = Topics(NAME)
CHUNK = 1024
IN_CHUNKS = f"minimum = 1\n[transfer]\ninline = 0\nchunk = {CHUNK}\nspread = 0.0\n"
_UNSIGNED = """\
tls_ca = "authority/ca.crt"
tls_certificate = "authority/server.crt"
tls_key = "authority/server.key"
"""


@dataclass
class Scene:
    """A federation, whose devices are enrolled, and a man at its broker. ``signed``: whether it signs what it says."""

    folder: Path
    authority: Authority
    url: str
    man: Peer
    devices: dict[str, Identity]
    signed: bool

    @property
    def address(self) -> Address:
        """The broker's."""
        return Address.parse(self.url)

    def puppet(self, client: str) -> Puppet:
        """A new life of a device that is driven by hand."""
        return Puppet(self.address, self.devices[client], self.folder / f"{client}-state", time.time(), self.signed)

    def overheard(self, topic: str) -> bytes:
        """What is said on a topic next, as the man hears it."""
        while messages := self.man.take(1, 60.0):
            if messages[0].topic == topic and messages[0].payload:
                return messages[0].payload
        raise AssertionError(f"nothing was said on {topic}")


@contextmanager
def scene(folder: Path, *, signed: bool = True) -> Iterator[Scene]:
    """A federation of pi-7, the puppet and the liar; where it is not ``signed``, only the broker asks who one is."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        authority, url = stack.enter_context(federation(folder, rounds=1000, more=IN_CHUNKS))
        if not signed:
            file = folder / "federation.toml"
            text = file.read_text().replace('[trust]\nauthority = "authority"\n', "")
            ours = "".join(line.replace('"authority', f'"{folder}/authority') + "\n" for line in _UNSIGNED.splitlines())
            file.write_text(text.replace("[round]", ours + "[round]"))
        devices = all_enrolled(authority, folder, "pi-7", "puppet", "liar")
        man = stack.enter_context(Peer(Address.parse(url), "man", tls=Tls.of(authority.folder, "server")))
        man.subscribe([f"fedge/{NAME}/#"])
        yield Scene(folder, authority, url, man, devices, signed)


def judged(attack: str, where: str, process: Running, words: str, seconds: float = 20.0) -> Outcome:
    """Refused, if the line that says so comes in time."""
    line = process.heard(words, seconds)
    return Outcome(attack, line is not None, where, line or f"no line with {words!r} came within {seconds:.0f} s")


def replayed_update(scene: Scene) -> Outcome:
    """Say again what a device has said."""
    with Serving(scene.folder) as server, scene.puppet("puppet") as puppet:
        invitation = puppet.invited()
        said = puppet.say(m.Upload(invitation.epoch, invitation.task, transfer.refer(bytes(50), chunk=CHUNK)))
        puppet.hear(m.Receipt)
        scene.man.publish(TOPICS.up("puppet"), said)
        return judged("a replayed update", "server", server, "said before", 20.0 if scene.signed else 5.0)


def in_another_name(scene: Scene) -> Outcome:
    """Send an update for a device's task, signed with another device's key."""
    attack = "an update in another device's name"
    with Serving(scene.folder) as server, scene.puppet("puppet") as puppet:
        invitation = puppet.invited()
        voice = (
            identity_voice(scene.devices["liar"], scene.folder / "liar", time.time())[0]
            if scene.signed
            else PlainMember()
        )
        forged = m.Upload(invitation.epoch, invitation.task, transfer.refer(bytes(50), chunk=CHUNK))
        scene.man.publish(TOPICS.up("puppet"), voice.say(forged, puppet.offer.epoch))
        if (line := server.heard("the signature is not that of puppet", 20.0 if scene.signed else 5.0)) is not None:
            return Outcome(attack, True, "server", line)
        receipt = puppet.hear(m.Receipt)
        return Outcome(attack, False, "server", f"it was taken for the device's, which was told: {receipt.status}")


def tampered_chunk(scene: Scene) -> Outcome:
    """Put another chunk in the place of one of a device's update."""
    with Serving(scene.folder) as server, scene.puppet("puppet") as puppet:
        invitation = puppet.invited()
        data = bytes(2 * CHUNK + 100)
        ref = transfer.refer(data, chunk=CHUNK, inline=0)
        puppet.say(m.Upload(invitation.epoch, invitation.task, ref))
        for index in puppet.hear(m.Credit).indices:
            piece = transfer.piece(data, ref, index)
            sent = b"tampered" + piece[8:] if index == 0 else piece
            scene.man.publish(TOPICS.uploaded("puppet", ref.sha256, index), sent)
        return judged("a tampered chunk of an update", "server", server, "the update of puppet came damaged")


def offers(scene: Scene) -> Iterator[Outcome]:
    """Put a bundle, a changed offer, a forged one and an old one before a device; a server has made offers before."""
    old = scene.overheard(TOPICS.offer)
    with Serving(scene.folder), Joining(scene.folder, scene.url, "pi-7"):
        new = scene.overheard(TOPICS.offer)
        while m.decode(new).epoch == m.decode(old).epoch:
            new = scene.overheard(TOPICS.offer)
        # It says hello once it has believed the offer and installed the bundle.
        scene.overheard(TOPICS.up("pi-7"))
    yield _before_a_device(scene, "an old offer that is replayed", old, "an old offer")
    changed = new.replace(NAME.encode(), NAME.encode().upper(), 1)
    yield _before_a_device(scene, "a tampered offer", changed, "the signature is not the federation's")
    forged = m.encode(m.Offer(NAME, 2**40, m.BlobRef(bytes(32), 5, CHUNK, b"harm!"), 0.0))
    yield _before_a_device(scene, "a forged offer", forged, "not signed")
    yield _tampered_bundle(scene, new)


def _before_a_device(scene: Scene, attack: str, offer: bytes, words: str) -> Outcome:
    scene.man.publish(TOPICS.offer, offer, retain=True)
    with Joining(scene.folder, scene.url, "pi-7") as device:
        return judged(attack, "device", device, words)


def _tampered_bundle(scene: Scene, offer: bytes) -> Outcome:
    ref = m.decode(offer).bundle
    data = (scene.folder / "toy.fedge").read_bytes()
    for index in range(transfer.count(ref)):
        piece = transfer.piece(data, ref, index)
        sent = b"tampered" + piece[8:] if index == 1 else piece
        scene.man.publish(TOPICS.published(ref.sha256, index), sent, retain=True)
    scene.man.publish(TOPICS.offer, offer, retain=True)
    (scene.folder / "new").mkdir(exist_ok=True)
    enrolled(scene.authority, scene.folder / "new" / "identity", "new", time.time())
    with Joining(scene.folder, scene.url, "new") as device:
        return judged("a tampered chunk of a bundle", "device", device, "downloading again")
