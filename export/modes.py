"""What is active while a step is traced, and what while PyTorch computes the reference."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch.nn.modules import transformer

from export.attention import AttentionMode
from export.composites import CompositeMode
from export.embedding import EmbeddingMode
from export.lora import AdapterMode
from export.recurrent import RecurrentMode
from export.spatial import SpatialMode


@contextmanager
def tracing() -> Iterator[None]:
    """Layers whose steps PyTorch hides are written out; `DropoutMode` comes on top, inside the step."""
    # A transformer looks into a mask for whether it is causal; while tracing, its elements are not known.
    known = mock.patch.object(transformer, "_detect_is_causal_mask", lambda mask, causal, size: bool(causal))
    modes = (RecurrentMode, AttentionMode, EmbeddingMode, SpatialMode, CompositeMode, AdapterMode)
    with ExitStack() as active:
        for mode in modes:
            active.enter_context(mode())
        active.enter_context(known)
        yield


@contextmanager
def reference() -> Iterator[None]:
    """PyTorch's own layers, less the short cut of attention in evaluation: it gives zeros where padding is."""
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was)
