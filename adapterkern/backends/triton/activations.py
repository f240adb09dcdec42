"""Activations on float32 tiles, and their gradients dz of da; formulas as in docs/math.md. relu's
selects, as autograd's does: Inf or NaN behind an inactive unit must not pass.

They use tl.exp and tl.erf alone, with constants to the right of tiles, so that the same source runs
in Triton's CPU interpreter.
"""

import triton
import triton.language as tl

from adapterkern.activations import LEAKY_SLOPE

_INV_SQRT_2 = tl.constexpr(0.7071067811865476)
_INV_SQRT_2_PI = tl.constexpr(0.3989422804014327)
_TWO_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)
_TANH_CUBIC = tl.constexpr(0.044715)
_LEAKY_SLOPE = tl.constexpr(LEAKY_SLOPE)


@triton.jit
def gelu(z):
    return 0.5 * z * (1 + tl.erf(z * _INV_SQRT_2))


@triton.jit
def gelu_gradient(z, da):
    return da * (0.5 * (1 + tl.erf(z * _INV_SQRT_2)) + z * tl.exp(-0.5 * z * z) * _INV_SQRT_2_PI)


@triton.jit
def sigmoid(z):
    return 1 / (1 + tl.exp(-z))


@triton.jit
def sigmoid_gradient(z, da):
    s = sigmoid(z)
    return da * (s * (1 - s))


@triton.jit
def gelu_tanh(z):
    # 0.5 z (1 + tanh c) = z sigmoid(2c): no tanh, and no cancellation for negative z.
    return z * sigmoid((z + z * z * z * _TANH_CUBIC) * _TWO_SQRT_2_OVER_PI)


@triton.jit
def gelu_tanh_gradient(z, da):
    s = sigmoid((z + z * z * z * _TANH_CUBIC) * _TWO_SQRT_2_OVER_PI)
    return da * (s + z * s * (1 - s) * (1 + z * z * (3 * _TANH_CUBIC)) * _TWO_SQRT_2_OVER_PI)


@triton.jit
def relu(z):
    return tl.where(z < 0, 0.0, z)  # NaN passes, as in eager


@triton.jit
def relu_gradient(z, da):
    return tl.where(z <= 0, 0.0, da)  # NaN is active, as in eager


@triton.jit
def silu(z):
    return z * sigmoid(z)


@triton.jit
def silu_gradient(z, da):
    s = sigmoid(z)
    return da * (s * (1 + z * (1 - s)))


@triton.jit
def tanh(z):
    # (1 - e) / (1 + e) cancels near zero; below 0.625 the odd polynomial of Cephes' tanhf keeps
    # full precision (Moshier, https://www.netlib.org/cephes/).
    square = z * z
    series = -5.70498872745e-3 * square + 2.06390887954e-2
    series = series * square - 5.37397155531e-2
    series = series * square + 1.33314422036e-1
    series = series * square - 3.33332819422e-1
    near = z + z * square * series
    decay = tl.exp(-2 * tl.abs(z))
    far = (1 - decay) / (1 + decay)
    return tl.where(tl.abs(z) < 0.625, near, tl.where(z < 0, -far, far))


@triton.jit
def tanh_gradient(z, da):
    decay = tl.exp(-2 * tl.abs(z))
    # sech^2, without the cancellation of 1 - tanh^2
    return da * (4 * decay / ((1 + decay) * (1 + decay)))


@triton.jit
def leaky_relu(z):
    return tl.where(z > 0, z, z * _LEAKY_SLOPE)


@triton.jit
def leaky_relu_gradient(z, da):
    return da * tl.where(z > 0, 1.0, _LEAKY_SLOPE)


@triton.jit
def identity(z):
    return z


@triton.jit
def identity_gradient(z, da):
    return da


VALUES = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": relu,
    "silu": silu,
    "tanh": tanh,
    "sigmoid": sigmoid,
    "leaky_relu": leaky_relu,
    "identity": identity,
}
GRADIENTS = {
    "gelu": gelu_gradient,
    "gelu_tanh": gelu_tanh_gradient,
    "relu": relu_gradient,
    "silu": silu_gradient,
    "tanh": tanh_gradient,
    "sigmoid": sigmoid_gradient,
    "leaky_relu": leaky_relu_gradient,
    "identity": identity_gradient,
}
