"""How the next version of the global model is coded: from an anchor that moves on now and then.

A version is an *anchor* and one code more. The code tells how far the exact model has come from the anchor, at a step
that follows the size of rounds: a client pays for one code however many versions it missed, and what one version's
code left out is in the next one's, so that nothing adds up. Every few versions the newest becomes the anchor, and its
code stays for good. Once the codes that stayed take more bytes than one from the bundle's weights would, such a one
takes their place: clients that come for the first time, or after a year, pay little more than that.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from edge_client.codec.layout import Layout, Vector
from edge_client.codec.rate import solve
from edge_client.codec.vector import VectorEncoder
from edge_client.codec.versions import CODES_LIMIT, CodedState, add_codes

_AGE = 10
"""Versions that an anchor serves: twice as many or half as many take a few percent more bytes."""
_RESTART = 1.5
"""The codes that stayed may take so many times the bytes of one from the bundle's weights."""
_TRIES = 8
_FALL, _LEAST, _MOST = 0.7, 0.3, 0.9
"""A finer step is the noise that is allowed over that found, to this power, within these bounds, times the last."""
_NEAR = 1.02
_START, _SLOPE = 8.0, 1.2
"""Step at which to begin where only the noise is given, in root mean squares of what is left out; about how that goes
with the step, as powers."""


@dataclass(frozen=True, eq=False)
class Coder:
    """What coding a version starts from, and how.

    ``kept``: the anchor's codes; ``anchor``: ``[n] float32``, what they lead to; ``age``: versions since it became the
    anchor; ``noise``: what a version leaves out may have this share of the energy of all that the model has learned.
    """

    layout: Layout
    noise: float
    kept: tuple[bytes, ...]
    anchor: Vector
    age: int = 0

    @classmethod
    def after(cls, state: CodedState, age: int, noise: float) -> "Coder":
        """For the version after ``state``, whose anchor has served ``age`` versions; with 0 it is ``state``."""
        kept = state.codes if age == 0 else state.codes[:-1]
        anchor = state.offset if age == 0 else add_codes(kept, state.layout)
        return cls(state.layout, noise, kept, anchor, age)

    def encode(self, target: npt.NDArray[np.float64], step: float) -> tuple[CodedState, "Coder"]:
        """The version that comes nearest to ``target`` at this step, and what codes the one after it.

        Args:
            target: ``[n]``, finite: the exact parameters less the bundle's weights.
            step: quantization step, in units of parameters; smaller where ``noise`` asks for it. Where it is 0, the
                noise alone decides.
        """
        limit = self.noise * float(np.square(target).mean())
        code = _code(target - self.anchor, self.layout, step, limit)
        if self.age + 1 < _AGE:
            return CodedState(self.layout, (*self.kept, code)), replace(self, age=self.age + 1)
        kept = (*self.kept, code)
        # A code of its own step for step, so that the bytes of both can be compared.
        whole = _code(target, self.layout, step, limit)
        if sum(map(len, kept)) > _RESTART * len(whole) or len(kept) >= CODES_LIMIT // 2:
            kept = (whole,)
        state = CodedState(self.layout, kept)
        return state, Coder(self.layout, self.noise, kept, state.offset)


def _code(vector: npt.NDArray[np.float64], layout: Layout, step: float, limit: float) -> bytes:
    """A quantized vector, at ``step`` or finer, that leaves out at most ``limit`` (mean square) or nearly so."""
    rounded = vector.astype(np.float32)
    if not rounded.any():
        return b""
    encoder = VectorEncoder(rounded, layout)
    # Above the largest step there is nothing to try.
    step, share = min(step, encoder.bounds[1]) or encoder.bounds[1], limit / encoder.rms**2
    for _ in range(_TRIES):
        noise = encoder.noise(step)
        if noise <= _NEAR * share:
            break
        step *= min(max((share / noise) ** _FALL, _LEAST), _MOST)
    return encoder.encode(step)


def code_at(noise: float, vector: Vector, layout: Layout) -> bytes:
    """A quantized vector that leaves out about this share of the energy of ``vector``; no bytes where that is none.

    ``vector`` is ``[layout.size] float32``, finite.
    """
    if not vector.any():
        return b""
    encoder = VectorEncoder(vector, layout)
    solve(encoder.noise, noise, _START * math.sqrt(noise) * encoder.rms, _SLOPE, encoder.bounds)
    return encoder.encode(encoder.step)
