"""The store survives a power cut at any file operation, and settles residuals as their update's fate demands."""

import builtins
import os
import threading

import msgspec
import numpy as np
import pytest

from edge_client import store as module
from edge_client.codec.layout import Layout, TensorSpec
from edge_client.codec.model import untrained
from edge_client.errors import StoreError
from edge_client.held import NO_HASH, Held
from edge_client.store import FileCopies, Store, claimed
from edge_client.upload import Pending

A, B = bytes([1] * 32), bytes([2] * 32)
V1, V2 = bytes([3] * 32), bytes([4] * 32)
LAYOUT = Layout((TensorSpec("w", (4,)),))


def seen(folder, **options):
    """All that a new start finds."""
    store = Store(folder, **options)
    return store.held(), store.bundle(), store.residual()


def remembered(folder):
    store = Store(folder)
    return store.recall("variate"), store.recall("head")


def prepared(folder):
    """A client with a bundle, a version, a recorded residual and an update without a receipt."""
    store = Store(folder)
    store.install(A, b"bundle a")
    store.commit(
        1, 1, b"update 1", b"residual 1", version=1, digest=V1, settles={"variate": b"c1"}, keeps={"head": b"h1"}
    )
    store.settle(1, 1, recorded=True)
    store.commit(
        1, 2, b"update 2", b"residual 2", version=1, digest=V1, settles={"variate": b"c2"}, keeps={"head": b"h2"}
    )
    return store


class PowerCut(BaseException):
    pass


class Faults:
    """Lets ``after`` file operations through, then cuts the power; a cut write leaves half of its bytes."""

    def __init__(self, monkeypatch, after):
        self.left, self.count = after, 0
        for place, name in [(os, "replace"), (os, "unlink"), (os, "fsync"), (os, "open")]:
            monkeypatch.setattr(place, name, self.guarded(getattr(place, name)))
        real = builtins.open

        def opened(path, mode="r", *rest, **more):
            if "w" in mode:
                self.step()
            file = real(path, mode, *rest, **more)
            if "w" in mode:
                file.write = self.torn(file, file.write)
            return file

        monkeypatch.setattr(module, "open", opened, raising=False)

    def step(self):
        self.count += 1
        if self.left == 0:
            raise PowerCut
        self.left -= 1

    def guarded(self, real):
        def call(*arguments, **named):
            self.step()
            return real(*arguments, **named)

        return call

    def torn(self, file, write):
        def call(data):
            try:
                self.step()
            except PowerCut:
                write(data[: len(data) // 2])
                file.flush()
                raise
            return write(data)

        return call


OPERATIONS = {
    "install": lambda store: store.install(B, b"bundle b"),
    "install again": lambda store: store.install(A, b"bundle a"),
    "commit": lambda store: store.commit(1, 3, b"update 3", b"residual 3", version=2, digest=V2),
    "commit with memories": lambda store: store.commit(
        1, 3, b"update 3", b"residual 3", version=2, digest=V2, settles={"variate": b"c"}, keeps={"head": b"h"}
    ),
    "commit without residual": lambda store: store.commit(1, 3, b"update 3", None, version=2, digest=V2),
    "recorded": lambda store: store.settle(1, 2, recorded=True),
    "refused": lambda store: store.settle(1, 2, recorded=False),
    "hold": lambda store: store.hold(0, NO_HASH),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_power_cut_leaves_the_old_state_or_the_new_one(tmp_path, name):
    old, new = prepared(tmp_path / "old"), prepared(tmp_path / "new")
    OPERATIONS[name](new)
    before, after = ((seen(one.folder), remembered(one.folder)) for one in (old, new))
    found, cuts = [], 0
    while True:
        store = prepared(tmp_path / str(cuts))
        with pytest.MonkeyPatch.context() as patch:
            faults = Faults(patch, cuts)
            try:
                OPERATIONS[name](store)
            except PowerCut:
                done = False
            else:
                done = True
        state = seen(store.folder), remembered(store.folder)
        assert state in (before, after)
        found.append(state == after)
        names = {entry.name for entry in os.scandir(store.folder)}
        assert names == Store(store.folder)._index.files() & names  # orphans are gone
        if done:
            break
        cuts += 1
    assert cuts == faults.count
    assert cuts >= 5
    assert found == sorted(found)  # once new, it stays new
    assert found[-1]


def test_a_new_folder_holds_nothing(tmp_path):
    assert seen(tmp_path / "deep" / "folder") == (Held(), None, None)


def test_what_is_committed_is_there_after_a_restart(tmp_path):
    prepared(tmp_path)
    assert seen(tmp_path) == (Held(A, 1, V1, Pending(1, 2, b"update 2")), b"bundle a", b"residual 1")


@pytest.mark.parametrize(("recorded", "residual"), [(True, b"residual 2"), (False, b"residual 1")])
def test_recorded_promotes_the_residual_and_anything_else_restores_the_one_before(tmp_path, recorded, residual):
    store = prepared(tmp_path)
    store.settle(1, 2, recorded=recorded)
    assert store.residual() == residual
    assert seen(tmp_path) == (Held(A, 1, V1), b"bundle a", residual)


def test_void_after_recorded_restores_and_is_the_last_word(tmp_path):
    store = prepared(tmp_path)
    store.settle(1, 2, recorded=True)
    store = Store(tmp_path)
    store.settle(1, 2, recorded=False)
    assert seen(tmp_path)[2] == b"residual 1"
    # A broker may deliver the receipt "recorded" once more, and after the one that took it back.
    store.settle(1, 2, recorded=True)
    assert seen(tmp_path)[2] == b"residual 1"


@pytest.mark.parametrize("other", [(1, 1), (0, 2), (2, 2), (1, 3)])
def test_another_task_settles_nothing(tmp_path, other):
    store = prepared(tmp_path)
    store.settle(*other, recorded=True)
    assert seen(tmp_path) == (Held(A, 1, V1, Pending(1, 2, b"update 2")), b"bundle a", b"residual 1")


def test_an_update_without_a_residual_leaves_the_residual_as_it_is(tmp_path):
    store = prepared(tmp_path)
    store.settle(1, 2, recorded=True)
    store.commit(1, 3, b"update 3", None, version=1, digest=V1)
    assert store.residual() == b"residual 2"
    store.settle(1, 3, recorded=False)
    assert store.residual() == b"residual 2"


def test_a_new_bundle_forgets_everything(tmp_path):
    store = prepared(tmp_path)
    store.install(B, b"bundle b")
    assert seen(tmp_path) == (Held(B), b"bundle b", None)
    assert sorted(os.listdir(tmp_path)) == sorted(["index.msgpack", f"bundle-{B.hex()}.fedge"])


def test_the_copy_of_the_model_is_replaced_and_a_damaged_one_counts_as_none(tmp_path):
    store, copies = prepared(tmp_path), FileCopies(tmp_path)
    state = untrained(LAYOUT, np.zeros(0, np.float32))
    copies.save(state.digest(), state, V1)
    store.commit(1, 3, b"u", None, version=2, digest=state.digest())
    Store(tmp_path)
    loaded = copies.load(state.digest(), LAYOUT)
    assert loaded is not None
    assert loaded.digest() == state.digest()
    path = tmp_path / f"model-{state.digest().hex()}.bin"
    path.write_bytes(path.read_bytes()[:-1])
    assert copies.load(state.digest(), LAYOUT) is None
    assert copies.load(V1, LAYOUT) is None
    store.hold(0, NO_HASH)
    assert not path.exists()


def test_settling_does_not_take_away_what_a_task_is_writing(tmp_path):
    store, copies, state = prepared(tmp_path), FileCopies(tmp_path), untrained(LAYOUT, np.zeros(0, np.float32))
    copies.save(state.digest(), state, V1)
    thread = threading.Thread(target=store.settle, args=(1, 2), kwargs={"recorded": True})
    thread.start()
    thread.join()
    store.commit(1, 3, b"u", None, version=2, digest=state.digest())
    assert copies.load(state.digest(), LAYOUT) is not None


def test_orphans_are_swept_at_the_start_and_nothing_else(tmp_path):
    prepared(tmp_path)
    kept = set(os.listdir(tmp_path))
    for name in ("update-99.bin", "index.msgpack.new", f"model-{V2.hex()}.bin"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    Store(tmp_path)
    assert set(os.listdir(tmp_path)) == kept | {"folder"}


def test_clients_of_one_machine_share_bundles(tmp_path):
    shared = tmp_path / "bundles"
    stores = [Store(tmp_path / name, durable=False, bundles=shared) for name in "ab"]
    for store in stores:
        store.install(A, b"bundle a")
    stores[0].install(B, b"bundle b")
    assert sorted(os.listdir(shared)) == [f"bundle-{digest.hex()}.fedge" for digest in (A, B)]
    assert seen(tmp_path / "a", bundles=shared)[1] == b"bundle b"
    assert seen(tmp_path / "b", bundles=shared)[1] == b"bundle a"
    assert os.listdir(tmp_path / "b") == ["index.msgpack"]


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x81", msgspec.msgpack.encode({"schema": 1, "version": "x"})])
def test_a_damaged_index_is_an_error_that_says_what_to_do(tmp_path, data):
    prepared(tmp_path)
    (tmp_path / "index.msgpack").write_bytes(data)
    with pytest.raises(StoreError, match=r"index\.msgpack is damaged .*remove the folder"):
        Store(tmp_path)


def test_every_truncated_index_is_an_error(tmp_path):
    prepared(tmp_path)
    index = tmp_path / "index.msgpack"
    data = index.read_bytes()
    for end in range(len(data)):
        index.write_bytes(data[:end])
        with pytest.raises(StoreError):
            Store(tmp_path)


def test_an_index_of_a_newer_fedge_is_named_whatever_its_fields(tmp_path):
    tmp_path.joinpath("index.msgpack").write_bytes(msgspec.msgpack.encode({"schema": 2, "version": "two"}))
    with pytest.raises(StoreError, match="schema 2; this fedge knows 1: update fedge"):
        Store(tmp_path)


def test_files_that_are_lost_count_as_nothing(tmp_path):
    prepared(tmp_path)
    for name in os.listdir(tmp_path):
        if name != "index.msgpack":
            (tmp_path / name).unlink()
    assert seen(tmp_path) == (Held(A, 1, V1), None, None)


def test_a_folder_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match=r"state folder .*file.*must be writable"):
        Store(tmp_path / "file")


def test_a_full_disk_is_an_error_and_changes_nothing(tmp_path, monkeypatch):
    store = prepared(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"cannot write .*update-3\.bin: No space left"):
        store.commit(1, 3, b"u", None, version=2, digest=V2)
    monkeypatch.undo()
    assert store.held().version == 1
    assert seen(tmp_path)[0] == Held(A, 1, V1, Pending(1, 2, b"update 2"))


def test_files_of_others_in_the_folder_stay(tmp_path):
    others = ["thesis.txt", "pi.npz", "update.bin", "model-1.bin", "federation.toml.new", "index.msgpack.bak"]
    for name in others:
        (tmp_path / name).write_bytes(b"precious")
    ours = ["update-7.bin", "residual-7.bin.new", f"model-{'0' * 64}.bin", f"bundle-{'f' * 64}.fedge.new"]
    for name in ours:
        (tmp_path / name).write_bytes(b"left by a power cut")
    prepared(tmp_path)
    left = os.listdir(tmp_path)
    assert set(others) <= set(left)
    assert not set(ours) & set(left)


def test_a_folder_has_one_client_at_a_time(tmp_path):
    folder = tmp_path / "new"
    with (
        claimed(folder),
        pytest.raises(StoreError, match=r"new is in use by another client; stop that one"),
        claimed(folder),
    ):
        pass
    with claimed(folder):
        Store(folder)


def test_a_folder_that_cannot_be_claimed_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match=r"state folder .*file.*must be writable"), claimed(tmp_path / "file"):
        pass


@pytest.mark.parametrize(("recorded", "variate"), [(True, b"c2"), (False, b"c1")])
def test_some_memories_follow_the_receipt_and_others_stay_whatever_it_says(tmp_path, recorded, variate):
    store = prepared(tmp_path)
    assert remembered(tmp_path) == (b"c1", b"h2")
    store.settle(1, 2, recorded=recorded)
    assert store.recall("variate") == variate
    assert remembered(tmp_path) == (variate, b"h2")


def test_what_was_recorded_goes_back_when_its_task_turns_out_void(tmp_path):
    store = prepared(tmp_path)
    store.settle(1, 2, recorded=True)
    store.settle(1, 2, recorded=False)
    assert remembered(tmp_path) == (b"c1", b"h2")


def test_memories_stay_that_a_task_does_not_name_and_go_where_it_gives_no_bytes(tmp_path):
    store = prepared(tmp_path)
    store.settle(1, 2, recorded=True)
    store.commit(1, 3, b"update 3", None, version=1, digest=V1)
    store.settle(1, 3, recorded=True)
    assert remembered(tmp_path) == (b"c2", b"h2")
    store.commit(1, 4, b"update 4", None, version=1, digest=V1, settles={"variate": b""}, keeps={"head": b""})
    assert remembered(tmp_path) == (b"c2", None)
    store.settle(1, 4, recorded=True)
    assert remembered(tmp_path) == (None, None)


def test_another_bundle_forgets_all_memories(tmp_path):
    store = prepared(tmp_path)
    store.install(B, b"bundle b")
    assert remembered(tmp_path) == (None, None)
    assert not list(tmp_path.glob("memory-*"))


def test_the_same_bundle_again_takes_nothing_that_only_the_device_knows(tmp_path):
    store = prepared(tmp_path)
    (tmp_path / f"bundle-{A.hex()}.fedge").write_bytes(b"damaged")
    store.install(A, b"bundle a")
    assert seen(tmp_path) == (Held(A, pending=Pending(1, 2, b"update 2")), b"bundle a", b"residual 1")
    assert remembered(tmp_path) == (b"c1", b"h2")
    store.settle(1, 2, recorded=True)
    assert (remembered(tmp_path), store.residual()) == ((b"c2", b"h2"), b"residual 2")
