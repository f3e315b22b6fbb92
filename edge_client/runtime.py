"""ONNX Runtime, set up for small devices: the one place that imports it."""

import ctypes
import functools
import os
from collections.abc import Mapping

# Recent wheels report usage to their maker; the variable counts only when it is set before the import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from edge_client.errors import BundleError, TrainingError

VERSION: str = ort.__version__

_AS_REQUESTED = 1
"""Of the strategies by which an arena grows; by default it doubles."""
_M_MMAP_THRESHOLD = -3
"""Of glibc's malloc.h."""
_LARGE_BLOCK = 1 << 18


def session(
    model: bytes,
    *,
    threads: int = 1,
    spin: bool = False,
    constants: Mapping[str, npt.NDArray[np.generic]] | None = None,
    by_priority: bool = False,
) -> ort.InferenceSession:
    """A CPU session for the graph ``model`` (a serialized ONNX model).

    Args:
        model: the graph; tensors stored in files beside it are refused, whatever the working directory holds.
        threads: threads inside one operator, at least 1; operators run one after the other.
        spin: whether threads of one operator stay awake, between operators too, until the run ends. Waking a thread
            takes longer than a small operator; what it costs is the other cores' time, and power.
        constants: the values of all constants that the graph declares without them (as external data), by name, of
            their shapes and dtypes. Their memory (C-contiguous) is shared, not copied, for as long as the session
            lives; what the runtime makes of constants when it loads them does not follow later changes.
        by_priority: the other order that the runtime can run operators in, to hold a graph's promises against.

    Raises:
        BundleError: the graph is damaged, or this onnxruntime cannot run it.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    if by_priority:
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    # The pattern reserves one block per batch size: 254 MB against 170 for a training step of eight convolutions.
    options.enable_mem_pattern = False
    # Fatal only: what goes wrong arrives as an exception, and a user's mistake deserves one line, not two.
    options.log_severity_level = 4
    # A spinning pool takes the other cores from the broker, from other sessions and from the battery.
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin)))
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # One arena for all sessions, where `spare_memory` has made one.
    options.add_session_config_entry("session.use_env_allocators", "1")
    # A graph that names external data would read files of the device, and training would send what it read.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
    values = {name: shared(array) for name, array in (constants or {}).items()}
    if values:
        options.add_external_initializers(list(values), list(values.values()))
    try:
        made = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        if os.devnull in str(error) or "external data path" in str(error).lower():
            raise BundleError(
                f"the graph has data in a file or in memory where it must have none ({_line(error)}); "
                "export the bundle again"
            ) from error
        raise BundleError(
            f"onnxruntime {VERSION} cannot load the graph ({_line(error)}); "
            "update onnxruntime, or export the bundle again"
        ) from error
    # onnxruntime borrows the values without counting a reference: they must live as long as the session.
    made.fedge_constants = values
    return made


def shared(array: npt.NDArray[np.generic]) -> ort.OrtValue:
    """An OrtValue over the memory of ``array`` (C-contiguous): what one writes, the other reads.

    The value keeps the array alive.

    Raises:
        TrainingError: this onnxruntime copies instead, so that training would change nothing.
    """
    value = ort.OrtValue.ortvalue_from_numpy(array)
    if array.size and value.data_ptr() != array.ctypes.data:
        raise TrainingError(
            f"onnxruntime {VERSION} copies a {array.dtype} array {list(array.shape)} where fedge needs it shared; "
            "install a standard build of onnxruntime 1.24 or later"
        )
    return value


def run(made: ort.InferenceSession, binding: ort.IOBinding, *, last: bool = False) -> None:
    """Run the session once with everything bound; after the ``last`` of several runs, their memory is given back.

    Raises:
        TrainingError: the runtime failed, for instance for want of memory.
    """
    options = None
    if last:
        options = ort.RunOptions()
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    try:
        made.run_with_iobinding(binding, options)
    except Exception as error:
        raise TrainingError(
            f"onnxruntime {VERSION} failed while running the graph ({_line(error)}); "
            "try a smaller batch, or export the bundle again"
        ) from error


def infer(made: ort.InferenceSession, inputs: Mapping[str, npt.NDArray[np.generic]]) -> list[npt.NDArray[np.generic]]:
    """The session's outputs, in its order.

    Raises:
        TrainingError: the runtime failed.
    """
    try:
        found: list[npt.NDArray[np.generic]] = made.run(None, dict(inputs))
    except Exception as error:
        raise TrainingError(f"onnxruntime {VERSION} failed while running the graph ({_line(error)})") from error
    return found


@functools.cache
def spare_memory() -> None:
    """Have this process keep little memory that it does not use: for devices, before the first session is made.

    Sessions made from then on share one arena. It takes memory as operators ask for it and splits free blocks wherever
    a large piece would stay unused, so that a step of the McMahan CNN needs 28 MiB instead of 33, at the same speed.

    glibc unmaps a block above a threshold when it is freed, and raises the threshold to the size of what was freed:
    after the first vector of 6 MB, vectors pile up in a heap that only grows. A threshold that is set stays. Other C
    libraries are left as they are.
    """
    settings = {
        "max_mem": 0,
        "arena_extend_strategy": _AS_REQUESTED,
        "max_dead_bytes_per_chunk": _LARGE_BLOCK,
        "initial_chunk_size_bytes": -1,
        "initial_growth_chunk_size_bytes": -1,
        "max_power_of_two_extend_bytes": -1,
    }
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(memory, ort.OrtArenaCfg(settings))
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)


def at_least(required: str) -> bool:
    """Whether this onnxruntime is version ``required`` (such as ``1.24``) or later.

    Raises:
        BundleError: ``required`` is not a version.
    """
    try:
        return _numbers(VERSION) >= _numbers(required)
    except ValueError:
        raise BundleError(
            f"the bundle asks for onnxruntime {required!r}, which is not a version such as '1.24'; export it again"
        ) from None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2])


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
