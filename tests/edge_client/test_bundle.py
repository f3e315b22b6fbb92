"""Bundles: what is in them comes out, and whatever is wrong with one is said in one line that tells what to do."""

import hashlib
import io
import zipfile

import msgspec
import numpy as np
import pytest
import safetensors.numpy

from edge_client import bundle as module
from edge_client.bundle import EVAL, INFER, MANIFEST, TRAIN, WEIGHTS, Bundle
from edge_client.errors import BundleError
from tests.toy import toy_bundle, zip_members

GOOD = toy_bundle(hidden=2, frozen=True, buffer=True)


def members_of(data=GOOD):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def with_manifest(**changes):
    def alter(members):
        manifest = msgspec.json.decode(members[MANIFEST])
        members[MANIFEST] = msgspec.json.encode(manifest | changes)

    return toy_bundle(alter=alter)


def with_weights(weights):
    """A bundle whose weights are ``weights`` (bytes, or arrays) with the right hash."""

    def alter(members):
        data = weights if isinstance(weights, bytes) else safetensors.numpy.save(weights)
        manifest = msgspec.json.decode(members[MANIFEST])
        manifest["files"][WEIGHTS] = hashlib.sha256(data).hexdigest()
        members[WEIGHTS], members[MANIFEST] = data, msgspec.json.encode(manifest)

    return toy_bundle(alter=alter)


def flipped(name):
    """GOOD with the middle bit of one member's bytes turned over."""
    data, content = bytearray(GOOD), members_of()[name]
    data[GOOD.index(content) + len(content) // 2] ^= 16
    return bytes(data)


def claiming(name, size):
    """GOOD with both sizes of a member in the zip's directory replaced."""
    data = bytearray(GOOD)
    entry = data.rindex(name.encode()) - 46
    assert data[entry : entry + 4] == b"PK\x01\x02"
    data[entry + 20 : entry + 28] = size.to_bytes(4, "little") * 2
    return bytes(data)


def without(name):
    return zip_members({key: value for key, value in members_of().items() if key != name})


def parameters(**changes):
    found = msgspec.json.decode(members_of(toy_bundle())[MANIFEST])["parameters"]
    return [found[0] | changes, *found[1:]]


def other_zip():
    return zip_members({"readme.txt": b"hello"})


def with_extra():
    return zip_members(members_of() | {"run.py": b"import os"})


def twice():
    buffer = io.BytesIO(GOOD)
    with zipfile.ZipFile(buffer, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(TRAIN, b"other")
    return buffer.getvalue()


def moved_directory():
    data = bytearray(GOOD)
    entry = data.rindex(EVAL.encode()) - 46
    data[entry + 42 : entry + 46] = (7).to_bytes(4, "little")
    return bytes(data)


def toy_weights(**changes):
    return dict(Bundle.from_bytes(toy_bundle()).weights) | changes


F32 = np.float32
NONE = {TRAIN: [], EVAL: [], INFER: []}
DAMAGED = {
    "empty": (lambda: b"", "not a bundle.*fetch or export"),
    "not a zip": (lambda: b"\x80\x04" * 500, "not a bundle.*fetch or export"),
    "cut at half": (lambda: GOOD[: len(GOOD) // 2], "truncated.*fetch or export"),
    "cut by a byte": (lambda: GOOD[:-1], "truncated.*fetch or export"),
    "first half gone": (lambda: GOOD[len(GOOD) // 2 :], "fetch or export"),
    "foreign zip": (other_zip, "not a bundle.*'eval.onnx'.*fedge export"),
    "extra member": (with_extra, "unexpected or repeated member 'run.py'.*fedge export"),
    "member twice": (twice, "unexpected or repeated member 'train.onnx'"),
    "no weights": (lambda: without(WEIGHTS), "lacks member 'weights.safetensors'"),
    "compressed": (lambda: zip_members(members_of(), zipfile.ZIP_DEFLATED), "compressed.*again"),
    "directory astray": (moved_directory, "eval.onnx is not where.*again"),
    "claims more than there is": (lambda: claiming(INFER, 10_000_000), "infer.onnx claims 10000000 bytes.*again"),
    "claims the impossible": (lambda: claiming(EVAL, 4_000_000_000), "eval.onnx claims 4000000000.*allowed.*again"),
    "oversize manifest": (
        lambda: zip_members(members_of() | {MANIFEST: b" " * (5 << 20)}),
        "manifest.json claims 5242880 bytes, more than the allowed 4194304.*again",
    ),
    **{f"flipped {name}": (lambda name=name: flipped(name), f"{name}.*again") for name in module.LIMITS},
    "newer format": (lambda: with_manifest(format=4), "format 4.*reads format 3; update fedge"),
    "older format": (lambda: with_manifest(format=2), "format 2.*reads format 3; export"),
    "no format": (lambda: zip_members(members_of() | {MANIFEST: b"{}"}), "format.*again"),
    "manifest no JSON": (lambda: zip_members(members_of() | {MANIFEST: b"\xff\xfe"}), "manifest.json is not.*again"),
    "unknown key": (lambda: with_manifest(colour="red"), "colour.*again"),
    "wrong type": (lambda: with_manifest(name=7), r"\$.name.*again"),
    "constants missing": (lambda: with_manifest(constants={}), "constants of.*again"),
    "unknown constant": (lambda: with_manifest(constants=NONE | {EVAL: ["nope"]}), "'nope', a constant of eval.onnx"),
    "hash missing": (lambda: with_manifest(files={}), "hashes of.*again"),
    "name twice": (lambda: with_manifest(metrics=["correct", "correct"]), "metric 'correct' more than once"),
    "odd dtype": (
        lambda: with_manifest(parameters=parameters(dtype="float16")),
        "'weight' is float16; expected float32",
    ),
    "odd frozen dtype": (
        lambda: with_manifest(parameters=parameters(dtype="object", role="frozen")),
        "'weight' is object; expected one of float32",
    ),
    "negative shape": (lambda: with_manifest(parameters=parameters(shape=[-1, 4])), r"impossible shape \[-1, 4\]"),
    "vast shape": (lambda: with_manifest(parameters=parameters(shape=[1 << 40, 1 << 40])), "impossible shape"),
    "nothing to train": (lambda: with_manifest(parameters=[], constants=NONE), "nothing to train"),
    "weights of other shape": (
        lambda: with_weights(toy_weights(bias=np.zeros(5, F32))),
        r"'bias' is F32 \[5\].*says F32 \[3\]",
    ),
    "weights of other dtype": (lambda: with_weights(toy_weights(bias=np.zeros(3))), r"'bias' is F64 \[3\].*says F32"),
    "weight too many": (lambda: with_weights(toy_weights(more=np.zeros(3))), "unknown tensor 'more'"),
    "weight missing": (lambda: with_weights({"bias": np.zeros(3, F32)}), "lacks parameter 'weight'"),
    "weights empty": (lambda: with_weights(b""), "not a safetensors.*again"),
    "weights of vast header": (lambda: with_weights(b"\xff" * 8 + b"{}"), "header would end.*again"),
    "weights no JSON": (lambda: with_weights((3).to_bytes(8, "little") + b"[[["), "not a safetensors.*again"),
    "weights beyond the end": (
        lambda: with_weights(safetensors.numpy.save(toy_weights())[:-4]),
        "claims bytes .*again",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_one_bundle_error(case):
    make, says = DAMAGED[case]
    with pytest.raises(BundleError, match=says) as caught:
        Bundle.from_bytes(make())
    assert "\n" not in str(caught.value)


def test_every_truncation_is_refused():
    for size in range(0, len(GOOD), 97):
        with pytest.raises(BundleError):
            Bundle.from_bytes(GOOD[:size])


def test_a_good_bundle():
    bundle = Bundle.from_bytes(GOOD)
    members = members_of()
    assert bundle.digest == hashlib.sha256(GOOD).hexdigest()
    assert (bundle.train, bundle.eval, bundle.infer) == (members[TRAIN], members[EVAL], members[INFER])
    expected = safetensors.numpy.load(members[WEIGHTS])
    assert set(bundle.weights) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(bundle.weights[name], array)
        assert bundle.weights[name].dtype == array.dtype
    assert [tensor.name for tensor in bundle.layout.tensors] == ["hidden.weight", "hidden.bias", "weight", "bias"]
    np.testing.assert_array_equal(
        bundle.initial(), bundle.layout.flatten({t.name: expected[t.name] for t in bundle.layout.tensors})
    )
    np.testing.assert_array_equal(bundle.initial_buffers(), np.zeros(5, F32))


def test_weights_are_views_and_the_initial_model_is_a_copy():
    bundle = Bundle.from_bytes(GOOD)
    assert not bundle.weights["weight"].flags.writeable
    assert not bundle.weights["weight"].flags.owndata
    first = bundle.initial()
    first += 1
    assert not np.array_equal(first, bundle.initial())


def test_open(tmp_path):
    path = tmp_path / "toy.fedge"
    path.write_bytes(GOOD)
    assert Bundle.open(path).digest == Bundle.from_bytes(GOOD).digest
    path.write_bytes(GOOD[:-9])
    with pytest.raises(BundleError, match=r"toy\.fedge: this is not a bundle"):
        Bundle.open(path)


@pytest.mark.parametrize("name", ["missing.fedge", "."])
def test_open_says_which_path_cannot_be_read(tmp_path, name):
    with pytest.raises(BundleError, match=r"cannot be read .*fedge export"):
        Bundle.open(tmp_path / name)


def test_open_refuses_a_huge_file_unread(tmp_path, monkeypatch):
    path = tmp_path / "film.mp4"
    with path.open("wb") as file:
        file.truncate(module._LIMIT + 1)
    with pytest.raises(BundleError, match="more than a bundle's"):
        Bundle.open(path)
