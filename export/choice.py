"""Which formulation each convolution takes: by what it is, and among those in question by measured time."""

import math
import time
from dataclasses import dataclass, field

import numpy as np

from edge_client import runtime
from export.columns import Columns
from export.depthwise import Depthwise
from export.direct import Direct
from export.formulation import (
    Formulation,
    Layer,
    from_channel_major,
    from_spatial_major,
    to_channel_major,
    to_spatial_major,
)
from export.graph import Graph, Port
from export.lower import Lowering, operator_name
from export.optimize import optimize
from export.pointwise import Pointwise
from export.taps import MOST_CHANNELS, Taps
from export.trace import Traced
from export.winograd import Winograd

BATCH = 32
LEAST_WORK = 4e6
"""Layers of fewer multiplications, for a batch, take the likely fastest: a measurement would tell noise from noise."""

CLEARLY = 0.9
"""Another formulation than the likely fastest must take at most this share of its time: equal exports stay equal."""

_RUNS = 5
_MOST_VALUES = 2**21
"""Elements of input and output together; for larger images, or more of them, fewer are measured."""


def has_depthwise(traced: Traced) -> bool:
    """Whether a traced step has a depthwise convolution; what lies between two of them had better keep their layout."""
    for node in traced.graph.nodes:
        if operator_name(node.target) == "aten.convolution":
            groups, weight = node.args[8], node.args[1].meta["val"]
            if groups > 1 and groups == weight.shape[0] and weight.shape[1] == 1:
                return True
    return False


@dataclass(frozen=True)
class Choice:
    """What a layer takes, and the milliseconds of a batch of 32 (both gradients included) that were measured."""

    formulation: Formulation
    milliseconds: dict[str, float] = field(default_factory=dict)


@dataclass
class Choices:
    """Chooses for one export; equal layers get the same. ``timed``: whether formulations are measured."""

    channel_major: bool = False
    timed: bool = False
    made: dict[Layer, Choice] = field(default_factory=dict)

    def __call__(self, layer: Layer) -> Formulation:
        """The formulation for ``layer``."""
        if layer not in self.made:
            self.made[layer] = self._chosen(layer)
        return self.made[layer].formulation

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

    def _chosen(self, layer: Layer) -> Choice:
        found = self.candidates(layer)
        if not self.timed or len(found) == 1 or Pointwise.suits(layer) or _work(layer) < LEAST_WORK:
            return Choice(found[0])
        times = {one.name: self._measured(layer, one) for one in found}
        best = min(found, key=lambda one: times[one.name])
        if times[best.name] > CLEARLY * times[found[0].name]:
            best = found[0]
        return Choice(best, {name: round(value, 3) for name, value in times.items()})

    def _measured(self, layer: Layer, formulation: Formulation) -> float:
        """Milliseconds of a batch: forward and gradients, from and to the layout of the neighbours."""
        values = layer.inputs * math.prod(layer.sizes) + layer.outputs * math.prod(layer.results)
        batch = max(1, min(BATCH, _MOST_VALUES // values))
        graph = self._graph(layer, formulation)
        session = runtime.session(graph.to_model("layer"))
        rng = np.random.default_rng(0)
        given = {p.name: rng.standard_normal([n or batch for n in p.shape], np.float32) for p in graph.inputs}
        names = [port.name for port in graph.outputs]
        best = math.inf
        for _ in range(_RUNS):
            start = time.perf_counter()
            session.run(names, given)
            best = min(best, time.perf_counter() - start)
        return best * 1e3 * BATCH / batch

    def _graph(self, layer: Layer, formulation: Formulation) -> Graph:
        rank = len(layer.sizes) + 2
        enter, leave = (
            (from_channel_major, to_channel_major) if self.channel_major else (from_spatial_major, to_spatial_major)
        )

        def port(name: str, channels: int, sizes: tuple[int, ...]) -> Port:
            return Port(name, (channels, *sizes, None) if self.channel_major else (*sizes, None, channels), "float32")

        graph = Graph(
            [
                port("x", layer.inputs, layer.sizes),
                port("grad", layer.outputs, layer.results),
                Port("weight", layer.weight_shape, "float32"),
            ],
            [],
        )
        b = Lowering(graph, None, self, True)
        x, grad = enter(b, "x", rank), enter(b, "grad", rank)
        outputs = [
            (leave(b, formulation.convolve(b, x, "weight"), rank), port("y", layer.outputs, layer.results)),
            (formulation.toward_weight(b, grad, x), Port("weight_grad", layer.weight_shape, "float32")),
        ]
        # Few channels are a model's input, whose gradient nothing asks for.
        if layer.inputs > MOST_CHANNELS:
            toward_input = leave(b, formulation.toward_input(b, grad, "weight"), rank)
            outputs.append((toward_input, port("x_grad", layer.inputs, layer.sizes)))
        for name, result in outputs:
            b.output(name, result)
        return optimize(graph)


def _work(layer: Layer) -> float:
    return float(BATCH * math.prod(layer.results) * layer.outputs * layer.inputs * layer.taps / layer.groups)
