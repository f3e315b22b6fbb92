"""Which formulation each convolution takes."""

from dataclasses import dataclass, field

from export.columns import Columns
from export.depthwise import Depthwise
from export.direct import Direct
from export.formulation import Formulation, Layer
from export.lower import operator_name
from export.pointwise import Pointwise
from export.taps import Taps
from export.trace import Traced
from export.winograd import Winograd


def has_depthwise(traced: Traced) -> bool:
    """Whether a traced step has a depthwise convolution; what lies between two of them had better keep their layout."""
    for node in traced.graph.nodes:
        if operator_name(node.target) == "aten.convolution":
            groups, weight = node.args[8], node.args[1].meta["val"]
            if groups > 1 and groups == weight.shape[0] and weight.shape[1] == 1:
                return True
    return False


@dataclass
class Choices:
    """Chooses for one export; equal layers get the same."""

    channel_major: bool = False
    made: dict[Layer, Formulation] = field(default_factory=dict)

    def __call__(self, layer: Layer) -> Formulation:
        """The formulation for ``layer``."""
        if layer not in self.made:
            self.made[layer] = self.candidates(layer)[0]
        return self.made[layer]

    def candidates(self, layer: Layer) -> list[Formulation]:
        """Those that can compute ``layer``, the likely fastest first."""
        found: list[Formulation] = []
        if Pointwise.suits(layer):
            found.append(Pointwise(layer, self.channel_major))
        if Taps.suits(layer):
            found.append(Taps(layer, self.channel_major))
        if Depthwise.suits(layer):
            found.append(Depthwise(layer))
        if Winograd.suits(layer):
            found.append(Winograd(layer))
        if Columns.suits(layer):
            found.append(Columns(layer))
        return [*found, Direct(layer)]
