"""The updates that the next version is made of, as they come, and what they make together."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from broker_server.aggregation.blocks import LedgerBlocks
from broker_server.aggregation.buffers import BufferAggregator
from broker_server.aggregation.cohort import CohortAggregator
from broker_server.aggregation.median import median
from broker_server.aggregation.streaming import Aggregator
from broker_server.aggregation.variates import Side, beside
from broker_server.aggregation.weighting import Report, Stage
from edge_client.codec.layout import Layout, Vector

Identity = tuple[int, int]
"""Epoch and number of a task."""


class Gathered(NamedTuple):
    """What updates make together."""

    aggregate: Vector
    """``[n_params] float32``."""
    buffers: Vector | None = None
    """``[m] float32``, where there are any."""
    side: Side | None = None
    """Where something is added up beside the aggregate."""


class Gathering:
    """Adds updates up, or remembers whose they are where the rule wants all of them at once.

    Args:
        rule: how updates become one.
        stage: what each counts.
        buffers: how buffers become one, where they are added up. A rule over all updates is there because clients are
            not trusted: it goes with the median of each buffer.
        layouts: those of an update's vectors.
        load: the encoded update to a task (epoch and number) of a client.
        scratch: a folder for what does not fit into memory.
        side: how many times each update is added up beside the aggregate, where that is asked for.
    """

    def __init__(
        self,
        rule: Aggregator | CohortAggregator,
        stage: Stage,
        buffers: BufferAggregator,
        layouts: Mapping[str, Layout],
        load: Callable[[int, int, str], bytes],
        scratch: Path,
        side: Callable[[Report], float] | None = None,
    ) -> None:
        self._rule = rule
        self._stage = stage
        self._buffers = buffers
        self._layouts = layouts
        self._load = load
        self._scratch = scratch
        self._side = None if side is None else beside(side)
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        if isinstance(self._rule, Aggregator):
            self._sum = self._rule.init(self._layouts["delta"].size)
            self._buffer_sum = self._buffers.init()
        if self._side is not None:
            self._side_sum = self._side.init(self._layouts["delta"].size)
        self._tasks: set[Identity] = set()
        self._members: list[tuple[Identity, Report]] = []

    def __contains__(self, task: Identity) -> bool:
        return task in self._tasks

    def add(self, task: Identity, report: Report, vectors: Mapping[str, Vector]) -> None:
        """One more update to a training task."""
        report = self._stage(report, vectors["delta"])
        self._tasks.add(task)
        if self._side is not None:
            self._side_sum = self._side.add(self._side_sum, vectors["delta"], report)
        if isinstance(self._rule, CohortAggregator):
            self._members.append((task, report))
            return
        self._sum = self._rule.add(self._sum, vectors["delta"], report)
        if "buffers" in vectors:
            self._buffer_sum = self._buffers.add(self._buffer_sum, vectors["buffers"], report.samples)

    def finish(self) -> Gathered:
        """What the updates make; then it begins anew.

        Raises:
            TrainingError: there are too few updates.
        """
        buffers = None
        if isinstance(self._rule, CohortAggregator):
            aggregate = self._rule.finish(self._blocks("delta"))
            if "buffers" in self._layouts:
                buffers = median().finish(self._blocks("buffers"))
        else:
            aggregate = self._rule.finish(self._sum)
            if "buffers" in self._layouts:
                buffers = self._buffers.finish(self._buffer_sum)
        side = None
        if self._side is not None:
            side = Side(self._side.finish(self._side_sum), int(self._side_sum.sums[0]))
        self.clear()
        return Gathered(aggregate, buffers, side)

    def _blocks(self, name: str) -> LedgerBlocks:
        members = self._members

        def load(member: int) -> bytes:
            task, report = members[member]
            return self._load(*task, report.client)

        reports = [report for _, report in members]
        if name == "buffers":
            reports = [Report(report.client) for report in reports]
        return LedgerBlocks(reports, load, self._layouts, name, self._scratch)
