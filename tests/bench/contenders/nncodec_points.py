"""What NNCodec makes of vectors, in the environment where it is installed: ``code_nncodec.py REQUEST ANSWER``.

The request, JSON: ``updates``, a list of ``[path of an .npz with vector and tensors, list of steps in root mean
squares]``; ``settings``, a list of keyword arguments of `nncodec.nnc.compress`, all tried. The answer, JSON: for each
update a list of ``[bits per parameter, noise energy over signal energy]``.

Only its coder is imported. The package's other half (data sets, torchvision, federations) is no part of the codec.
"""

import json
import math
import sys
import types

import numpy as np

for name in ("framework", "framework.tensorflow_model", "framework.pytorch_model", "framework.use_case_init"):
    sys.modules[f"nncodec.{name}"] = types.ModuleType(f"nncodec.{name}")
framework = sys.modules["nncodec.framework"]
framework.__path__ = []
for name in ("tensorflow_model", "pytorch_model", "use_case_init"):
    setattr(framework, name, sys.modules[f"nncodec.framework.{name}"])

from nncodec import nnc  # noqa: E402

DENSITY = 2
"""Quantization parameters for each doubling of the step, as a power of two: the package's default."""


def parameter(step: float) -> int:
    """The quantization parameter whose step is nearest below."""
    octave = math.floor(math.log2(step))
    return (octave << DENSITY) + int((step / 2.0**octave - 1) * (1 << DENSITY))


def points(path: str, multiples: list[float], settings: list[dict]) -> list[tuple[float, float]]:
    """Bits and distortion of one update, for each step and each of the settings, decoded from the bytes."""
    with np.load(path) as file:
        vector, shapes = file["vector"], json.loads(str(file["tensors"]))
    scale = float(np.sqrt(np.mean(vector.astype(np.float64) ** 2)))
    tensors, start = {}, 0
    for name, shape in shapes:
        stop = start + math.prod(shape)
        tensors[name] = vector[start:stop].reshape(shape)
        start = stop
    energy = float(np.square(vector, dtype=np.float64).sum())
    found = []
    for multiple in multiples:
        # One step for all tensors, biases too: the default of a step of its own for those costs more than it gives.
        step = parameter(multiple * scale)
        for setting in settings:
            given = {name: tensor.copy() for name, tensor in tensors.items()}
            data = nnc.compress(
                given,
                bitstream_path=None,
                qp=step,
                nonweight_qp=step,
                qp_density=DENSITY,
                return_bitstream=True,
                **setting,
            )
            decoded = nnc.decompress(bytearray(data))
            noise = sum(
                float(np.square(decoded[name] - tensor, dtype=np.float64).sum()) for name, tensor in tensors.items()
            )
            found.append((8 * len(data) / vector.size, noise / energy))
    return found


def main() -> None:
    with open(sys.argv[1]) as file:
        request = json.load(file)
    answer = [points(path, steps, request["settings"]) for path, steps in request["updates"]]
    with open(sys.argv[2], "w") as file:
        json.dump(answer, file)


if __name__ == "__main__":
    main()
