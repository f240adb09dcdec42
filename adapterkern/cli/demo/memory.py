"""Peak memory of one part of the run: of the process on a CPU, of torch's allocator on a GPU."""

import contextlib
import sys
from pathlib import Path
from types import ModuleType

import torch

resource: ModuleType | None
try:
    import resource
except ImportError:  # Windows
    resource = None

_CLEAR_REFS = Path("/proc/self/clear_refs")


def reset_peak(device: torch.device) -> None:
    """Start a new high-water mark; where the system cannot (macOS), the old one stays."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            _CLEAR_REFS.write_text("5")  # proc(5): resets the peak resident set size


def peak_bytes(device: torch.device) -> int | None:
    """The high-water mark in bytes, None where it is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_is_per_part(device: torch.device) -> bool:
    """Whether `reset_peak` works here: otherwise a peak is that of the whole run so far."""
    return device.type == "cuda" or _CLEAR_REFS.exists()
