"""How finely each client tells its update: what is said of that in its invitation.

With ``codec.target = "cohort"`` the noise of the aggregate is what is asked for. A client's quantization noise enters
the aggregate with its share ``p = w / W`` of the weights, so that the bits of all clients together are fewest where
``p * step`` is the same for each: reverse water-filling, over a cohort instead of over one vector (Cover and Thomas,
"Elements of Information Theory", 10.3). With ``m`` updates of mean weight ``w'`` that is

    step = value * pace * sqrt(m) * w' / w

where ``pace`` is how far an element of the model moves in a round (`Publication.pace`): the aggregate's noise is then
that of a step of ``value * pace``, whatever the cohort. All of it but ``value / w`` is the same for a whole task. It is
in the ledger with the task, so that a server which is started anew asks for the same steps.
"""

import math
import struct
from collections.abc import Iterable
from statistics import fmean, median_low

from broker_server.config import Federation
from broker_server.records import Task
from edge_client.wire import messages as m

_TOLERANCE = struct.Struct("<d")
_BELIEVED = 10.0
"""A weight counts as at most so many medians in the mean: one client's claim must not make all others silent."""
_FIRST = 0.1
"""The noise (``nmse``) with which clients tell their updates while nothing is known of aggregates."""
_LEAST, _MOST = 1e-30, 1e12


def tolerance(settings: Federation, pace: float, samples: Iterable[int], updates: int) -> bytes:
    """A training task's plan, for the ledger: ``pace * sqrt(m) * w'``; no bytes where there is nothing to say.

    Args:
        settings: those of the federation.
        pace: how far an element of the model moves in a round, 0 where it is not known.
        samples: what clients have that take part, or may.
        updates: how many of them make an aggregate.
    """
    weights = [_weight(settings, count) for count in samples]
    if settings.codec.target != "cohort" or not pace > 0 or not weights:
        return b""
    most = _BELIEVED * median_low(weights)
    mean = fmean(min(weight, most) for weight in weights)
    return _TOLERANCE.pack(pace * math.sqrt(updates) * mean)


def update_plan(settings: Federation, task: Task, client: str, samples: int, uplink: float) -> m.UpdatePlan:
    """How a client with so many samples encodes its update; ``uplink`` is what it can send, in bytes a second."""
    codec = settings.codec
    target, value = codec.target, codec.rate(client)
    if target != "cohort":
        return m.UpdatePlan(codec.kind, target, value, codec.feedback, codec.limit(uplink))
    if not task.plan:
        return m.UpdatePlan(codec.kind, "nmse", _FIRST, codec.feedback, codec.limit(uplink))
    (tolerated,) = _TOLERANCE.unpack(task.plan)
    step = min(max(value * tolerated / _weight(settings, samples), _LEAST), _MOST)
    return m.UpdatePlan(codec.kind, "absolute", step, codec.feedback, codec.limit(uplink))


def _weight(settings: Federation, samples: int) -> float:
    """What an update counts, as far as that is known before it is there."""
    return float(max(1, samples)) if settings.aggregation.weights == "samples" else 1.0
