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

    The interpreter stores bfloat16 as the uint16 of its bits. `tl.dot` multiplies those bits as
    integers (results around 1e10), and conversions to bfloat16 truncate where a GPU rounds to
    nearest even. Upstream declined a fix (triton-lang/triton#11584), so the two builder methods at
    fault are wrapped here: `create_dot` widens its operands first, `cast_impl` rounds. Both are
    exact, for ties, NaN, infinities and subnormals too.

    Arithmetic on bfloat16 tiles without a conversion stays wrong in the interpreter (a sum of bit
    patterns): a kernel converts to float32 before it computes, as it does for its precision anyway.

    numpy's warnings of Inf and NaN in the interpreter are turned off, since some cases have both.

    Verified on triton 3.6 to 3.9; the interpreter of 3.6 itself needs numpy below 2.4. Calling it
    again changes nothing.

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
    from triton.runtime.interpreter import InterpreterBuilder

    if not getattr(InterpreterBuilder, "has_exact_bfloat16", False):
        _install_exact_bfloat16(InterpreterBuilder)
        InterpreterBuilder.has_exact_bfloat16 = True
    warnings.filterwarnings(
        "ignore", "invalid value", RuntimeWarning, module=r"triton\.runtime\.interpreter"
    )


def _install_exact_bfloat16(builder: Any) -> None:
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    dot, cast = builder.create_dot, builder.cast_impl

    def widened(handle):
        """Widen a bfloat16 handle to float32, whose upper half its 16 bits are."""
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def rounded(data):
        """Round floating or integer data to the bits of bfloat16, to nearest, ties to even."""
        value = np.ascontiguousarray(data, dtype=np.float32).reshape(np.shape(data))
        bits = value.view(np.uint32).astype(np.uint64)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(value), np.uint16(0x7FC0), nearest)

    def create_dot(self, a, b, *rest, **options):
        return dot(self, widened(a), widened(b), *rest, **options)

    def cast_impl(self, source, target_type):
        before, after = source.dtype.scalar, target_type.scalar
        if before == after or tl.bfloat16 not in (before, after):
            return cast(self, source, target_type)
        if after == tl.bfloat16:
            return TensorHandle(rounded(source.data), tl.bfloat16)
        source = widened(source)
        return source if after == tl.float32 else cast(self, source, target_type)

    builder.create_dot = create_dot
    builder.cast_impl = cast_impl


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
