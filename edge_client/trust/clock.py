"""Whether a clock can be believed. A Raspberry Pi has none: it starts where it stopped, or when its image was made."""

import time

_FIRST = 1_767_225_600.0
"""2026-01-01: fedge did not exist before."""
_DAY = 86_400.0


def believable(now: float, floor: float) -> str | None:
    """Why it cannot be ``now``; None where it can. Both are seconds since 1970.

    ``floor`` is a time that certainly has passed, such as when a certificate was issued, 0 where none is known. A day
    before it is believed: clocks differ.
    """
    if now < _FIRST:
        reason = "fedge is not that old"
    elif now < floor - _DAY:
        reason = f"it was {_shown(floor)} already when this device was enrolled"
    else:
        return None
    return (
        f"the clock shows {_shown(now)}, and {reason}: TLS may refuse certificates until it is set "
        "(timedatectl set-ntp true)"
    )


def _shown(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(moment))
