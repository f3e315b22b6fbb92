"""How much an update counts that was trained on an older version than the newest."""


def discount(versions: int, exponent: float) -> float:
    """``(1 + s)^-a`` for an update that is ``versions`` (s) old: 1 for a fresh one (FedBuff, Nguyen et al. 2022)."""
    return float((1.0 + versions) ** -exponent)
