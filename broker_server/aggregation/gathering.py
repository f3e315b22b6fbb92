"""The updates that the next version is made of, as they come, and what they make together."""

from collections.abc import Callable, Mapping
from pathlib import Path

from broker_server.aggregation.blocks import LedgerBlocks
from broker_server.aggregation.buffers import BufferAggregator
from broker_server.aggregation.cohort import CohortAggregator
from broker_server.aggregation.median import median
from broker_server.aggregation.streaming import Aggregator
from broker_server.aggregation.weighting import Report, Stage
from edge_client.codec.layout import Layout, Vector

Identity = tuple[int, int]
"""Epoch and number of a task."""


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
    """

    def __init__(
        self,
        rule: Aggregator | CohortAggregator,
        stage: Stage,
        buffers: BufferAggregator,
        layouts: Mapping[str, Layout],
        load: Callable[[int, int, str], bytes],
        scratch: Path,
    ) -> None:
        self._rule = rule
        self._stage = stage
        self._buffers = buffers
        self._layouts = layouts
        self._load = load
        self._scratch = scratch
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        if isinstance(self._rule, Aggregator):
            self._sum = self._rule.init(self._layouts["delta"].size)
            self._buffer_sum = self._buffers.init()
        self._tasks: set[Identity] = set()
        self._members: list[tuple[Identity, Report]] = []

    def __contains__(self, task: Identity) -> bool:
        return task in self._tasks

    def add(self, task: Identity, report: Report, vectors: Mapping[str, Vector]) -> None:
        """One more update to a training task."""
        report = self._stage(report, vectors["delta"])
        self._tasks.add(task)
        if isinstance(self._rule, CohortAggregator):
            self._members.append((task, report))
            return
        self._sum = self._rule.add(self._sum, vectors["delta"], report)
        if "buffers" in vectors:
            self._buffer_sum = self._buffers.add(self._buffer_sum, vectors["buffers"], report.samples)

    def finish(self) -> tuple[Vector, Vector | None]:
        """The aggregate (``[n_params] float32``) and the buffers, where there are any; then it begins anew.

        Raises:
            TrainingError: there are too few updates.
        """
        if isinstance(self._rule, CohortAggregator):
            found = (
                self._rule.finish(self._blocks("delta")),
                (median().finish(self._blocks("buffers")) if "buffers" in self._layouts else None),
            )
        else:
            found = (
                self._rule.finish(self._sum),
                (self._buffers.finish(self._buffer_sum) if "buffers" in self._layouts else None),
            )
        self.clear()
        return found

    def _blocks(self, name: str) -> LedgerBlocks:
        members = self._members

        def load(member: int) -> bytes:
            task, report = members[member]
            return self._load(*task, report.client)

        reports = [report for _, report in members]
        if name == "buffers":
            reports = [Report(report.client) for report in reports]
        return LedgerBlocks(reports, load, self._layouts, name, self._scratch)
