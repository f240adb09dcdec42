"""Exact bfloat16 in Triton's CPU interpreter, which TRITON_INTERPRET=1 puts in a GPU's place."""

from typing import Any


def make_bfloat16_exact() -> None:
    """Mend the interpreter, for every kernel of this process. A second call changes nothing.

    The interpreter stores bfloat16 as the uint16 of its bits. `tl.dot` multiplies those bits as
    integers (results around 1e10), and conversions to bfloat16 truncate where a GPU rounds to
    nearest even. Upstream declined a fix (triton-lang/triton#11584), so the two builder methods at
    fault are wrapped here: `create_dot` widens its operands first, `cast_impl` rounds. Both are
    exact, for ties, NaN, infinities and subnormals too.

    Arithmetic on bfloat16 tiles without a conversion stays wrong in the interpreter (a sum of bit
    patterns): a kernel converts to float32 before it computes, as it does for its precision anyway.

    Verified on triton 3.6 to 3.9; the interpreter of 3.6 itself needs numpy below 2.4.

    Raises:
        ImportError, AttributeError: this triton has no such interpreter.
    """
    from triton.runtime.interpreter import InterpreterBuilder

    if not getattr(InterpreterBuilder, "has_exact_bfloat16", False):
        _wrap(InterpreterBuilder)
        InterpreterBuilder.has_exact_bfloat16 = True


def _wrap(builder: Any) -> None:
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
