"""The client's side of an update: what it fetches, what it leaves to root's program, and what it says of it."""

import hashlib
import json

import msgspec
import pytest

from edge_client import events as e
from edge_client.service import update as module
from edge_client.service.update import Report, Updater
from edge_client.trust.keys import SigningKey, verify
from edge_client.trust.release import here, seal
from edge_client.wire import messages as m
from edge_client.wire import transfer
from edge_client.wire.topics import Topics
from tests.deploy.update.bench import NOW, record, wheel

KEY = SigningKey.generate()
TOPICS = Topics("toys")


class Scene:
    """An updater, a broker that has everything, and the clock."""

    def __init__(self, folder):
        self.folder, self.now, self.written = folder, 0.0, 0
        self.base = folder / "opt"
        self.base.mkdir()
        (self.base / "trust.json").write_text("{}")
        self.wheels = [
            wheel(folder / "wheels", "0.2.0"),
            wheel(folder / "wheels", "1.0", name="other", code="#" * 5000),
        ]
        self.release = seal(record(*self.wheels, version="0.2.0"), KEY.sign)
        self.blobs = {hashlib.sha256(path.read_bytes()).digest(): path.read_bytes() for path in self.wheels}
        self.lost = set()
        self.asked = []
        self.topics = set()
        self.updater = self.another()

    def another(self, running="0.1.0"):
        """Another life of the client."""
        self.topics.clear()

        def wrote(count):
            self.written += count

        believed = lambda data, signature: verify(KEY.public, data, signature)  # noqa: E731
        self.updater = Updater(self.folder / "state" / "release", self.base, TOPICS, believed, running, here(), wrote)
        return self.updater

    def announce(self, release=None):
        self.act(self.updater.announced(release or self.release, self.now, NOW + 60))

    def act(self, actions):
        """What a driver and a broker do."""
        waiting = []
        for action in actions:
            match action:
                case e.Subscribe(topics):
                    waiting += [topic for topic in topics if topic not in self.lost]
                    self.topics.update(topics)
                case e.Unsubscribe(topics):
                    self.topics.difference_update(topics)
                case e.Lacking(sha256, indices):
                    self.asked.append((sha256, indices))
        for topic in waiting:
            chunk = TOPICS.parse_pub(topic)
            if topic in self.topics:
                data = self.blobs[chunk.sha256][chunk.index * 1024 : (chunk.index + 1) * 1024]
                self.act(self.updater.message(topic, data, self.now))

    def report(self, stage, release=None, **more):
        name = hashlib.sha256((release or self.release).record).hexdigest()
        said = {"record": name, "version": "0.2.0", "stage": stage} | more
        (self.base / "report.json").write_bytes(msgspec.json.encode(msgspec.convert(said, Report)))

    @property
    def signed(self):
        return self.folder / "state" / "release" / "release.signed"


@pytest.fixture
def scene(tmp_path):
    return Scene(tmp_path)


def test_all_of_a_release_is_fetched_and_left_for_root(scene):
    scene.announce()
    assert msgspec.msgpack.decode(scene.signed.read_bytes(), type=m.Release) == scene.release
    for sha256, data in scene.blobs.items():
        assert scene.signed.with_name(f"{sha256.hex()}.whl").read_bytes() == data
    assert scene.updater.progress.stage == "staged"
    assert scene.topics == set()
    assert scene.written == sum(map(len, scene.blobs.values()))


def test_what_was_installed_before_is_not_fetched_again(scene):
    sha256 = next(iter(scene.blobs))
    kept = scene.base / "wheels" / sha256.hex() / scene.wheels[0].name
    kept.parent.mkdir(parents=True)
    kept.write_bytes(scene.blobs.pop(sha256))
    scene.announce()
    assert scene.updater.progress.stage == "staged"
    assert not scene.signed.with_name(f"{sha256.hex()}.whl").exists()


def test_a_client_that_is_started_anew_fetches_no_file_twice(scene):
    second = list(scene.blobs)[1]
    scene.lost = {TOPICS.published(second, 3)}
    scene.announce()
    assert scene.updater.progress.stage == "fetching"
    assert not scene.signed.exists()
    before, scene.lost = scene.written, set()
    scene.another()
    scene.announce()
    assert scene.signed.exists()
    assert scene.written - before == len(scene.blobs[second])


def test_chunks_that_do_not_come_are_subscribed_to_again_and_then_asked_for(scene):
    second = list(scene.blobs)[1]
    scene.lost = {TOPICS.published(second, 3)}
    scene.announce()
    for _ in range(2):
        scene.now += 100
        scene.act(scene.updater.tick(scene.now))
    assert scene.asked == [(second, (3,))]
    scene.lost.clear()
    scene.act(scene.updater.connected(scene.now))
    assert scene.signed.exists()


def test_a_file_that_is_not_the_one_that_was_signed_is_never_left_for_root(scene):
    second = list(scene.blobs)[1]
    right = scene.blobs[second]
    scene.blobs[second] = right[:-1] + b"!"
    scene.announce()
    assert not scene.signed.exists()
    scene.blobs[second] = right
    scene.now += 1000
    scene.act(scene.updater.tick(scene.now))
    assert scene.signed.exists()


def test_a_release_that_is_not_the_federations_is_not_fetched(scene):
    scene.announce(seal(record(*scene.wheels, version="0.2.0"), SigningKey.generate().sign))
    assert scene.topics == set()
    assert not scene.signed.parent.exists()
    assert scene.updater.progress.stage == "refused"
    assert "signature" in scene.updater.progress.detail


def test_a_release_of_before_or_that_has_expired_is_not_fetched(scene):
    for release, reason in (
        (record(*scene.wheels, version="0.0.9"), "older than 0.1.0"),
        (record(*scene.wheels, version="0.2.0", expires=NOW), "expired"),
    ):
        scene.announce(seal(release, KEY.sign))
        assert scene.topics == set()
        assert reason in scene.updater.progress.detail


def test_where_there_is_no_room_it_says_so(scene, monkeypatch):
    monkeypatch.setattr(module, "free_disk", lambda _: 10 * 2**20)
    scene.announce()
    assert scene.updater.progress.stage == "refused"
    assert scene.updater.progress.detail.startswith("10 MiB of disk are free")


def test_a_device_that_nobody_could_update_takes_no_release(scene):
    (scene.base / "trust.json").unlink()
    scene.announce()
    assert not scene.updater.able
    assert scene.updater.progress is None


def test_what_root_says_is_said_to_the_server_and_its_release_not_fetched_again(scene):
    scene.announce()
    scene.report("back", detail="no word from the server")
    scene.another()
    scene.updater.look(joined=True)
    name = hashlib.sha256(scene.release.record).digest()[:8]
    assert scene.updater.progress == m.Progress("0.2.0", "back", "no word from the server", name)
    scene.signed.unlink()
    scene.announce()
    assert not scene.signed.exists()
    again = seal(record(*scene.wheels, version="0.2.0", issued=NOW + 30), KEY.sign)
    scene.announce(again)
    assert scene.updater.progress.stage == "staged"
    scene.updater.look(joined=True)  # root still speaks of the one before
    assert scene.updater.progress.stage == "staged"


def test_only_the_client_on_trial_says_that_it_lives_and_only_once_it_has_heard_the_server(scene):
    scene.announce()
    scene.report("trial", token="t1")
    alive = scene.signed.with_name("alive")
    scene.updater.look(joined=True)  # the old client, which is about to be stopped
    assert not alive.exists()
    scene.another("0.2.0").look(joined=False)
    assert not alive.exists()
    scene.updater.look(joined=True)
    assert alive.read_text() == "0.2.0 t1\n"
    assert scene.updater.progress.stage == "trial"
    scene.report("healthy")
    scene.updater.look(joined=True)
    assert scene.updater.progress.stage == "healthy"


@pytest.mark.parametrize("text", ["", "{", "[]", json.dumps({"record": "x", "version": "1", "stage": "back"})])
def test_a_report_that_is_none_is_as_good_as_no_report(scene, text):
    (scene.base / "report.json").write_text(text)
    scene.updater.look(joined=True)
    assert scene.updater.progress is None


def test_another_release_takes_the_place_of_one_under_way(scene):
    first, second = scene.blobs
    scene.lost = {TOPICS.published(second, 3)}
    scene.announce()
    newer = wheel(scene.folder / "newer", "0.3.0")
    scene.blobs[transfer.refer(newer.read_bytes(), chunk=1024).sha256] = newer.read_bytes()
    scene.announce(seal(record(newer, version="0.3.0"), KEY.sign))
    assert scene.updater.progress.version == "0.3.0"
    assert scene.updater.progress.stage == "staged"
    assert scene.topics == set()
    assert not scene.signed.with_name(f"{first.hex()}.whl").exists()
