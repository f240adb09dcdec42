"""CUDA's driver library by ctypes, for the two things that torch does not tell in every version.

Signatures and numbers are those of cuda.h; none of these functions has a later version of itself.
"""

import ctypes
import functools
from typing import Any

MEMORY_CLOCK_RATE = 36  # CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE, kHz
MEMORY_BUS_WIDTH = 37  # CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH, bits


def graph_nodes(graph: int) -> int:
    """Return the number of nodes of a `cudaGraph_t`, given as its address.

    Raises:
        OSError: there is no driver here.
        RuntimeError: the driver refuses.
    """
    count = ctypes.c_size_t()
    _call("cuGraphGetNodes", ctypes.c_void_p(graph), None, ctypes.byref(count))
    return count.value


def device_attribute(index: int, attribute: int) -> int:
    """Return a CUdevice_attribute of the device that torch, too, knows by this index.

    Raises:
        OSError: there is no driver here.
        RuntimeError: the driver refuses.
    """
    device, value = ctypes.c_int(), ctypes.c_int()
    _call("cuInit", ctypes.c_uint(0))
    _call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(index))
    _call("cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(attribute), device)
    return value.value


def _call(name: str, *arguments: Any) -> None:
    code = getattr(_library(), name)(*arguments)
    if code:
        raise RuntimeError(f"{name} gave CUresult {code}, not 0")


@functools.cache
def _library() -> Any:
    return ctypes.CDLL("libcuda.so.1")
