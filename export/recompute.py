"""Recomputation: values of the forward pass that are computed again for the backward pass instead of being kept.

Checkpointing (Chen et al. 2016, arXiv 1604.06174), value by value as in POET (Patil et al. 2022, arXiv 2207.07697):
where the plan is highest, the value that frees most for the least work is computed again right before it is read, from
what is alive then anyway, until the plan fits.

ONNX Runtime would merge the copies with what they are copies of, and run them early. So a copy reads its inputs through
a Reshape, which copies nothing, to a shape that depends on a value of the backward pass: on zero times its size.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from export.graph import Graph, Node
from export.memory import VIEWS, Plan, measure, plan, roots

_LEAST_SHARE = 1 / 256
"""Of the peak: smaller values are not worth a copy."""
_LONGEST = 24
"""Nodes that one copy may take."""
_TRIED = 12
"""Candidates that are planned with before the search gives up."""
_BYTES_PER_SECOND, _FLOPS_PER_SECOND = 4e9, 3e10
_SLOW = frozenset(("Exp", "Erf", "Tanh", "Gelu", "Sigmoid", "Softmax", "LogSoftmax", "Log", "Pow", "Softplus", "Mish"))
_PRODUCTS = frozenset(("Gemm", "MatMul", "Conv", "ConvTranspose"))


@dataclass(frozen=True)
class _Candidate:
    """Copies of nodes, to stand before ``reader``, and what late readers read instead; ``work`` in seconds."""

    copies: list[Node]
    names: Mapping[str, str]
    readers: frozenset[int]
    reader: Node
    freed: int
    work: float


def recompute(graph: Graph, batch: int, budget: int, *, bound: bool = True) -> Plan:
    """Rewrite ``graph`` in place until at a batch of ``batch`` rows it needs at most ``budget`` bytes, if that can be.

    ``bound``: results have memory of their own; else they count, until the end. Returns the plan that was reached.
    """
    return _Recomputation(graph, batch, budget, bound).run()


class _Recomputation:
    def __init__(self, graph: Graph, batch: int, budget: int, bound: bool) -> None:
        self._graph, self._budget = graph, budget
        self._sizes, self._shapes = measure(graph, batch)
        _, self._others = measure(graph, batch + 1)
        results = [port.name for port in graph.outputs]
        self._bound, self._held = (results, []) if bound else ([], results)
        self._nodes = list(graph.nodes)
        self._count = 0
        self._constants: dict[str, list[int]] = {}

    def run(self) -> Plan:
        """Copy until the plan fits or nothing helps."""
        now = self._planned(self._nodes)
        while now.peak > self._budget:
            best = self._improved(now)
            if best is None:
                break
            self._nodes, now = best
        self._graph.nodes = self._nodes
        made = {name: np.array(value, np.int64) for name, value in self._constants.items()}
        self._graph.constants |= made
        self._graph.prune()
        return now

    def _planned(self, nodes: Sequence[Node]) -> Plan:
        return plan(nodes, self._sizes, self._bound, self._held)

    def _improved(self, now: Plan) -> tuple[list[Node], Plan] | None:
        found = sorted(self._candidates(now), key=lambda c: c.freed / c.work, reverse=True)
        for candidate in found[:_TRIED]:
            nodes = self._with(candidate)
            then = self._planned(nodes)
            if then.peak <= now.peak and then.excess(self._budget) < now.excess(self._budget):
                return nodes, then
        return None

    def _with(self, candidate: _Candidate) -> list[Node]:
        nodes: list[Node] = []
        for node in self._nodes:
            if node is candidate.reader:
                nodes += candidate.copies
            if id(node) in candidate.readers:
                inputs = [candidate.names.get(n, n) for n in node.inputs]
                node = Node(node.op, inputs, node.outputs, node.attributes)
            nodes.append(node)
        return _sorted(nodes)

    def _candidates(self, now: Plan) -> list[_Candidate]:
        shown = roots(now.order)
        producers = {name: node for node in now.order for name in node.outputs}
        places = {id(node): place for place, node in enumerate(now.order)}
        late: dict[str, list[Node]] = {}
        for node in now.order[now.place + 1 :]:
            for name in {name for inner in node.nested() for name in inner.inputs}:
                late.setdefault(shown.get(name, name), []).append(node)
        busy = {shown.get(name, name) for inner in now.order[now.place].nested() for name in inner.inputs}
        found = []
        for value, size in now.alive.items():
            if size < now.peak * _LEAST_SHARE or value in busy or value not in late or value in self._held:
                continue
            if producers[value] is now.order[now.place]:
                continue
            candidate = self._candidate(value, late[value], now, shown, producers, places)
            if candidate is not None:
                found.append(candidate)
        return found

    def _candidate(
        self,
        value: str,
        readers: list[Node],
        now: Plan,
        shown: Mapping[str, str],
        producers: Mapping[str, Node],
        places: Mapping[int, int],
    ) -> _Candidate | None:
        if any(node.branches for node in readers):
            return None
        after = self._backward_value(readers[0], now, producers, places)
        names = {n for node in readers for n in node.inputs if n and shown.get(n, n) == value}
        early = {n for n in names if n in producers and places[id(producers[n])] <= now.place}
        copier = _Copier(self, value, after, now.alive, shown, producers, f"again{self._count}.")
        self._count += 1
        if not early or not all(copier.copy(name) for name in sorted(early, key=lambda n: places[id(producers[n])])):
            return None
        freed = self._sizes[value] - copier.kept
        if freed <= 0:
            return None
        first = min(readers, key=self._position)
        return _Candidate(
            copier.nodes, copier.names, frozenset(id(n) for n in readers), first, freed, copier.work + 1e-6
        )

    def _position(self, node: Node) -> int:
        return next(i for i, other in enumerate(self._nodes) if other is node)

    def _backward_value(self, reader: Node, now: Plan, producers: Mapping[str, Node], places: Mapping[int, int]) -> str:
        """Something computed at the peak or later and before ``reader``, best something that it reads."""
        made = [(places[id(producers[n])], n) for n in reader.inputs if n in producers]
        inputs = [found for found in made if found[0] >= now.place]
        if inputs:
            return max(inputs)[1]
        return now.order[places[id(reader)] - 1].outputs[0]

    def pinned(self, name: str) -> list[int] | None:
        """The shape of a value as a Reshape takes it; None where it depends on the batch in more than one place."""
        one, other = self._shapes.get(name), self._others.get(name)
        if not one or other is None or len(one) != len(other) or 0 in one:
            return None
        shape = [size if size == size2 else -1 for size, size2 in zip(one, other, strict=True)]
        return shape if shape.count(-1) <= 1 else None

    def constant(self, value: list[int]) -> str:
        """The name of a constant of int64."""
        name = "again." + "x".join(map(str, value)) if value else "again.zero"
        self._constants[name] = value
        return name

    def know(self, name: str, like: str) -> None:
        """A copy has its original's size and shape."""
        self._sizes[name] = self._sizes.get(like, 0)
        for shapes in (self._shapes, self._others):
            if like in shapes:
                shapes[name] = shapes[like]

    def size(self, name: str) -> int:
        """Bytes of a value."""
        return self._sizes.get(name, 0)

    def work(self, node: Node) -> float:
        """Seconds that a node takes, roughly: what it reads and writes, and the arithmetic of products."""
        if node.op in VIEWS:
            return 0.0
        moved = sum(self.size(name) for name in (*node.inputs, *node.outputs) if name)
        seconds = moved / _BYTES_PER_SECOND * (4 if node.op in _SLOW else 1)
        if node.op in _PRODUCTS:
            a = self._shapes.get(node.inputs[0], ())
            b = self._shapes.get(node.inputs[1], ())
            deep = math.prod(b[1:]) if "Conv" in node.op else a[0 if node.attributes.get("transA") else -1] if a else 1
            seconds += self.size(node.outputs[0]) / 4 * 2 * deep / _FLOPS_PER_SECOND
        return seconds


class _Copier:
    """Copies one value with what it is computed from, back to what is alive anyway."""

    def __init__(
        self,
        of: _Recomputation,
        value: str,
        after: str,
        alive: Collection[str],
        shown: Mapping[str, str],
        producers: Mapping[str, Node],
        prefix: str,
    ) -> None:
        self._of, self._value, self._after, self._alive = of, value, after, alive
        self._shown, self._producers, self._prefix = shown, producers, prefix
        self.nodes: list[Node] = []
        self.names: dict[str, str] = {}
        self.kept = 0
        self.work = 0.0
        self._zero = ""

    def copy(self, name: str) -> bool:
        """Copy what makes ``name``; returns whether that could be done."""
        if name in self.names:
            return True
        node = self._producers.get(name)
        if node is None or node.branches or not node.inputs or len(self.nodes) >= _LONGEST:
            return False
        replaced: dict[str, str] = {}
        for source in node.inputs:
            if source and not self._stays(source):
                if not self.copy(source):
                    return False
                replaced[source] = self.names[source]
        if not replaced:
            pinned = [(self._of.pinned(n), n) for n in node.inputs if n and not n.startswith("again.")]
            shape, source = next(((s, n) for s, n in pinned if s is not None and self._movable(n)), (None, ""))
            if shape is None:
                return False
            replaced[source] = self._barrier(source, shape)
        outputs = [self._prefix + n if n else "" for n in node.outputs]
        copied = Node(node.op, [replaced.get(n, n) for n in node.inputs], outputs, node.attributes)
        for original, fresh in zip(node.outputs, outputs, strict=True):
            if original:
                self._of.know(fresh, original)
                self.names[original] = fresh
        self.nodes.append(copied)
        self.work += self._of.work(copied)
        return True

    def _movable(self, name: str) -> bool:
        """Constants would be folded: they are no use as what ties a copy to its time."""
        return name in self._producers or self._of.size(name) > 0

    def _stays(self, name: str) -> bool:
        root = self._shown.get(name, name)
        if root == self._value or name in self.names:
            return False
        if root not in self._producers or root in self._alive:
            return True
        if self._of.size(root) <= self._of.size(self._value) / 32:
            self.kept += self._of.size(root)
            return True
        return False

    def _barrier(self, source: str, shape: list[int]) -> str:
        wanted, result = f"{self._prefix}{source}.shape", f"{self._prefix}{source}.late"
        if any(result in node.outputs for node in self.nodes):
            return result
        if not self._zero:
            size, self._zero = f"{self._prefix}size", f"{self._prefix}zero"
            self.nodes.append(Node("Size", [self._after], [size]))
            self.nodes.append(Node("Mul", [size, self._of.constant([0])], [self._zero]))
        self.nodes.append(Node("Add", [self._of.constant(shape), self._zero], [wanted]))
        self.nodes.append(Node("Reshape", [source, wanted], [result]))
        self._of.know(result, source)
        return result


def _sorted(nodes: Sequence[Node]) -> list[Node]:
    """The nodes in a topological order that is theirs where it can be: the runtime's order follows it."""
    producers = {name: node for node in nodes for name in node.outputs}
    done: set[int] = set()
    result: list[Node] = []
    for first in nodes:
        stack = [(first, False)]
        while stack:
            node, leaving = stack.pop()
            if leaving:
                result.append(node)
            elif id(node) not in done:
                done.add(id(node))
                stack.append((node, True))
                read = [producers[n] for inner in node.nested() for n in inner.inputs if n in producers]
                stack.extend((source, False) for source in reversed(read) if id(source) not in done)
    return result
