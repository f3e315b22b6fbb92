"""Images in folders named after their class; read by Pillow, which is an extra of its own."""

from pathlib import Path

import numpy as np

from edge_client.data import Array
from edge_client.errors import DataError
from edge_client.manifest import Feature, Manifest

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".pgm", ".ppm", ".webp"})
_PIXELS = 1 << 26


def label_of(path: Path, manifest: Manifest) -> int:
    """The class of an image by the name of its folder: a label of the bundle, or its number.

    Raises:
        DataError: the bundle does not take one image and one class, or has no such class.
    """
    if len(manifest.inputs) != 1 or [(t.dtype, t.shape) for t in manifest.targets] != [("int64", ())]:
        raise DataError(f"{path}: images need a bundle with one input and one class; use .npz")
    name, labels = path.parent.name, manifest.targets[0].labels or manifest.outputs[0].labels
    if name in labels:
        return labels.index(name)
    if name.isascii() and name.isdigit():
        return int(name)
    wanted = ", ".join(labels[:10]) or "numbers: the bundle names no labels"
    raise DataError(f"{path}: folder {name!r} is no class of the bundle; expected {wanted}")


def read_image(path: Path, feature: Feature) -> Array:
    """An image as uint8, in the shape of ``feature``: ``[h, w]``, ``[1, h, w]`` in grey or ``[3, h, w]`` in colour.

    It is scaled to height and width; its proportions are not kept.

    Raises:
        DataError: it cannot be read, Pillow is missing, or the feature is no image.
    """
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise DataError(f"{path}: images need Pillow: pip install 'fedge[images]'") from error
    *channels, height, width = feature.shape if len(feature.shape) > 1 else (0, 0)
    if channels not in ([], [1], [3]) or not height:
        raise DataError(f"{path}: input {feature.name!r} has shape {list(feature.shape)}; expected [h, w] or [c, h, w]")
    try:
        with Image.open(path) as image:
            if image.width * image.height > _PIXELS:
                raise DataError(f"{path}: {image.width} x {image.height} pixels; an image may have {_PIXELS}")
            # A JPEG is decoded no larger than needed.
            image.draft("RGB" if channels == [3] else "L", (width, height))
            made = image.convert("RGB" if channels == [3] else "L").resize((width, height))
            pixels = np.asarray(made, np.uint8)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: not an image that Pillow reads ({error})") from error
    return (pixels.transpose(2, 0, 1) if channels == [3] else pixels).reshape(feature.shape)
