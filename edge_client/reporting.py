"""What a device tells in an evaluation beside sums of metrics: counts, in layouts that both sides know.

=============  =====================================================================================================
``confusion``  ``[classes, classes]``: of its test data, how many samples of each class (row) the model takes for which
               class (column)
``labels``     ``[classes]``: how many samples of each class it trains on
``features``   of what it trains on, for each input of floats ``[columns, 1 + bins + 1 + 4]``: how many values are below
               the range, in each bin of it, and above it; then of the values z in the range, where its ends are 0 and
               1, the sum of z and the sum of z^2 in units of 1/65536, each as its multiple of 2^24 and the rest
=============  =====================================================================================================

All of them are whole numbers of at least 0, which float32 holds exactly below 2^24: what several devices tell adds up
exactly, in any order. An input has a column for each value of a sample where these are few, else one for all of them.
Of sequences each place counts; labels that are no class, such as padding, do not.
"""

from dataclasses import dataclass

from edge_client.codec.layout import Layout, TensorSpec
from edge_client.errors import ConfigError
from edge_client.manifest import Feature, Manifest
from edge_client.wire.messages import ReportPlan

CONFUSION, LABELS, FEATURES = "confusion", "labels", "features"
NOTHING = "nothing"
HELD = "samples.held"
"""The scalar of an update that says how many samples the labels and features are of: those that it trains on."""
USUAL = frozenset({CONFUSION})
"""What a device tells of its data unless it is told otherwise, where it is asked; metrics it tells always."""
MOST_CLASSES = 1000
UNIT = 65536
LIMB = 1 << 24
_COLUMNS = 64
"""Values of a sample that are counted each by itself."""
_MOMENTS = 4


@dataclass(frozen=True)
class Classes:
    """Where a model's scores are: one for each class, along ``axis`` of the output with the batch."""

    count: int
    axis: int
    labels: tuple[str, ...]
    """Their names, as many as the bundle knows."""

    @property
    def names(self) -> tuple[str, ...]:
        """A name for each: its label, or its number."""
        return tuple(self.labels[i] if i < len(self.labels) else str(i) for i in range(self.count))


def classes(manifest: Manifest) -> Classes | None:
    """The classes of a model with one target of classes and one output of scores; None where it has another shape."""
    if len(manifest.targets) != 1 or len(manifest.outputs) != 1 or "correct" not in manifest.metrics:
        return None
    target, output = manifest.targets[0], manifest.outputs[0]
    if target.dtype != "int64" or len(output.shape) != len(target.shape) + 1:
        return None
    # They come last, or first as PyTorch has them where there are several targets for a sample.
    last = output.shape[:-1] == target.shape
    return Classes(output.shape[-1] if last else output.shape[0], -1 if last else 1, output.labels or target.labels)


def columns(feature: Feature) -> int:
    """How many histograms an input has."""
    return feature.size if feature.size <= _COLUMNS else 1


def floats(manifest: Manifest) -> list[Feature]:
    """The inputs that have histograms."""
    return [feature for feature in manifest.inputs if feature.dtype == "float32"]


def report_layouts(manifest: Manifest, plan: ReportPlan) -> dict[str, Layout]:
    """The vectors that ``plan`` asks for, as far as the model has such things."""
    found: dict[str, Layout] = {}
    scored = classes(manifest)
    if scored is not None and scored.count <= MOST_CLASSES:
        if plan.confusion:
            found[CONFUSION] = Layout((TensorSpec(CONFUSION, (scored.count, scored.count)),))
        if plan.labels:
            found[LABELS] = Layout((TensorSpec(LABELS, (scored.count,)),))
    if plan.bins and (inputs := floats(manifest)):
        wide = plan.bins + 2 + _MOMENTS
        found[FEATURES] = Layout(tuple(TensorSpec(feature.name, (columns(feature), wide)) for feature in inputs))
    return found


def sharing(text: str) -> frozenset[str]:
    """What a device tells, from a text such as ``labels,features``.

    Raises:
        ConfigError: it names something else.
    """
    words = {word.strip() for word in text.split(",")} - {""}
    known = {CONFUSION, LABELS, FEATURES, NOTHING}
    if (unknown := sorted(words - known)) or (NOTHING in words and len(words) > 1):
        found = unknown[0] if unknown else text
        raise ConfigError(f"share is {found!r}; expected {LABELS}, {FEATURES}, both with a comma, or {NOTHING}")
    return frozenset() if NOTHING in words else USUAL | words
