"""The loss allowed in TF32: that of products whose operands are cut off at ten explicit bits."""

from typing import Any

import torch
from torch import Tensor

from adapterkern import _torch

_aten = torch.ops.aten
# The operations that multiply matrices, and where their factors begin: addmm adds its first.
_PRODUCTS: dict[Any, int] = {_aten.mm: 0, _aten.bmm: 0, _aten.addmm: 1, _aten.baddbmm: 1}
_DROPPED_BITS = 52 - 10  # of float64's explicit bits


class TruncatedProducts(_torch.TorchDispatchMode):
    """Within the block, every float64 matrix product takes its two factors cut off at TF32's bits,
    in the forward and in autograd's backward. Sums and elementwise work stay as they are.

    The PTX ISA ("Alternate Floating-Point Data Formats") calls the layout of `.tf32` operands
    implementation-defined and leaves rounding to an explicit cvt: tensor cores that are handed
    plain float32, as Triton hands it to wgmma, ignore the low 13 bits. Truncation is off by up to a
    whole unit in the last place, twice what rounding is, and always towards zero: computed so, the
    errors of a product are 2.6 to 3.8 times those of operands that were rounded first, as cuBLAS
    does it. Both are TF32, so the wider one is the yardstick. A CPU has no TF32 at all: there this
    is the only one.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        first = _PRODUCTS.get(func.overloadpacket)
        if first is not None:
            args = list(args)
            args[first : first + 2] = map(truncated, args[first : first + 2])
        return func(*args, **(kwargs or {}))


def truncated(tensor: Tensor) -> Tensor:
    """Return a float64 tensor without the bits that TF32 has not; Inf and NaN stay."""
    bits = tensor.contiguous().view(torch.int64)
    return ((bits >> _DROPPED_BITS) << _DROPPED_BITS).view(torch.float64)
