"""Helpers of tests and `adapterkern check`: exact bfloat16 in Triton's interpreter, NaN-filled
memory, and a test whether a device still answers.
"""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from adapterkern import _env


def enable_triton_interpreter() -> None:
    """Make bfloat16 exact in Triton's CPU interpreter. Call it once, before the first kernel runs.

    The triton backend does so itself where it runs interpreted
    (`backends.triton.interpreter.make_bfloat16_exact`); this is for kernels of your own. numpy's
    warnings of Inf and NaN in the interpreter are turned off, since some cases have both.

    Calling it again changes nothing.

    Raises:
        RuntimeError: the process was started without TRITON_INTERPRET=1.
        ImportError: triton is not installed.
    """
    if not _env.TRITON_INTERPRET:
        raise RuntimeError(
            "enable_triton_interpreter() needs TRITON_INTERPRET=1, which is read when kernels are "
            "defined and is not set in this process.\n  hint: set it before Python starts, e.g. "
            "`TRITON_INTERPRET=1 python -m pytest tests/interpreter`."
        )
    from adapterkern.backends.triton.interpreter import make_bfloat16_exact

    make_bfloat16_exact()
    warnings.filterwarnings(
        "ignore", "invalid value", RuntimeWarning, module=r"triton\.runtime\.interpreter"
    )


def lost_device(device: torch.device | str) -> str | None:
    """The error of a CUDA device that no longer answers; None if it answers, and for a CPU.

    After an illegal access or a trap, every further call in the process fails, this one too.
    """
    if torch.device(device).type != "cuda":
        return None
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        lines = str(error).splitlines() or [type(error).__name__]
        return f"{device} is lost: {lines[0]}"
    return None


@contextlib.contextmanager
def nan_filled_memory() -> Iterator[None]:
    """Within the block, memory from torch.empty and its relatives, such as new_empty, holds NaN.

    A kernel that reads uninitialised memory, or leaves a part of its output unwritten, then shows
    NaN instead of passing on memory that happened to be zero. The switch is torch's own
    (`torch.utils.deterministic`) and process-wide; integers get their largest value.
    """
    deterministic: Any = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        deterministic.fill_uninitialized_memory,
    )
    with warnings.catch_warnings():
        # The switch works in deterministic mode only, which warns about other operations.
        warnings.filterwarnings("ignore", message=".*deterministic.*")
        torch.use_deterministic_algorithms(True, warn_only=True)
        deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            deterministic.fill_uninitialized_memory = before[2]
