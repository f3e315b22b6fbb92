"""Recurrent layers."""

from torch.overrides import TorchFunctionMode


class RecurrentMode(TorchFunctionMode):
    """Placeholder."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore
        return func(*args, **(kwargs or {}))


RECURRENT = {}
