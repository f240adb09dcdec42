"""Pre-activations and gradients at which masking differs from multiplication by a derivative."""

import math

import torch
from eager import ACTIVATIONS
from torch import Tensor

from adapterkern.backends.base import Backend, empty_units
from adapterkern.parity import Case
from adapterkern.results import Needs, Outputs, Saved

_Z = (-math.inf, -200.0, -1.0, -0.0, 0.0, 0.5, 3.0, math.inf, math.nan)
_DA = (math.inf, -math.inf, math.nan, 2.0, 0.0)


def grid_of_special_values(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(z, da): every z beside every da."""
    z, da = torch.tensor(_Z, dtype=dtype), torch.tensor(_DA, dtype=dtype)
    return z.repeat_interleave(len(_DA)), da.repeat(len(_Z))


def assert_gradient_is_autograds(backend: Backend, activation: str, dtype: torch.dtype) -> None:
    """dz = da act'(z) of the special values, seen through weights of one unit and one feature."""
    z, da = grid_of_special_values(dtype)
    case = Case(dtype, activation, z.shape, 1, 1, bias="none", residual="none")
    tensors = case.draw("cpu", seed=0)
    call = case.make_call(tensors | {n: torch.ones_like(t) for n, t in tensors.items()})
    rows = empty_units(call, z.numel()).copy_(z[:, None])
    needs = Needs(x=True)
    dz = backend.backward(call.for_backward(needs), Saved(rows), Outputs(da[:, None]), needs).x
    z.requires_grad_()
    (expected,) = torch.autograd.grad(ACTIVATIONS[activation](z), z, da)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(dz[:, 0], expected, rtol=tolerance, atol=tolerance, equal_nan=True)
