"""The structs of csrc/params.h, which a launch receives as bytes; every field is 8 bytes wide."""

import ctypes
import struct
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

View = tuple[int, int, int]  # address, dtype, elements from one row to the next

NOTHING: View = (0, 0, 0)
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
TFLOAT32 = 3  # a precision of products, not of tensors
ACTIVATIONS = {
    "gelu": 0,
    "gelu_tanh": 1,
    "relu": 2,
    "silu": 3,
    "tanh": 4,
    "sigmoid": 5,
    "leaky_relu": 6,
    "identity": 7,
}
NORMS = {"none": 0, "layer": 1, "rms": 2}


def view(tensor: Tensor | None) -> View:
    """The view of rows [T, H], a contiguous tensor [..., H] or a contiguous vector.

    An address does not keep its tensor alive: the caller must, until the launch.
    """
    if tensor is None:
        return NOTHING
    stride = tensor.stride(-2) if tensor.dim() > 1 else 0
    return tensor.data_ptr(), DTYPES[tensor.dtype], stride


def indices(tensor: Tensor | None) -> View:
    """The view of int32 indices, which have no dtype to choose from."""
    return NOTHING if tensor is None else (tensor.data_ptr(), 0, 0)


def float_bits(value: float) -> int:
    """The bits of `value` as a float32, which cross as an integer: of the floats of a launch only
    the scale may differ from call to call. Beyond float32 it is infinite, as in eager.
    """
    return int.from_bytes(ctypes.c_float(value), sys.byteorder)


def flat(params: Iterable[Any]) -> list[Any]:
    """The fields of a struct in a row, those of its views too."""
    fields: list[Any] = []
    for value in params:
        fields += value if isinstance(value, tuple) else (value,)
    return fields


class ForwardParams(NamedTuple):
    """The parameters of one forward launch."""

    num_tokens: int
    hidden_size: int
    bottleneck_size: int
    x: View
    down_weight: View
    up_weight: View
    down_bias: View
    up_bias: View
    residual: View
    skip: View
    scaling: View
    y: View
    z: View
    norm_weight: View
    norm_bias: View
    normed: View
    mean: View
    rstd: View
    partial: View
    num_splits: int
    features_per_split: int
    output_splits: int
    features_per_output_split: int
    num_clusters: int
    cluster_tokens: int
    large_tiles: int
    shared_bytes: int
    resident_clusters: int
    activation: int
    compute_dtype: int
    add_input: int
    channel_scaling: int
    norm: int
    cast_before_weight: int
    eps: int
    weight_offset: int
    scale: float

    def pack(self) -> bytes:
        """The bytes of the struct."""
        return FORWARD.pack(*flat(self))


class BackwardParams(NamedTuple):
    """The parameters of one backward launch."""

    num_tokens: int
    hidden_size: int
    bottleneck_size: int
    x: View
    dy: View
    z: View
    down_weight: View
    up_weight: View
    up_bias: View
    scaling: View
    dx: View
    dz: View
    a: View
    partial: View
    sum_down: View
    sum_up: View
    sum_down_bias: View
    sum_up_bias: View
    d_down_weight: View
    d_up_weight: View
    d_down_bias: View
    d_up_bias: View
    d_scaling: View
    d_normed: View
    d_stream: View
    stream: View
    mean: View
    rstd: View
    norm_weight: View
    sum_norm_weight: View
    sum_norm_bias: View
    d_norm_weight: View
    d_norm_bias: View
    num_splits: int
    features_per_split: int
    output_splits: int
    features_per_output_split: int
    num_clusters: int
    cluster_tokens: int
    large_tiles: int
    shared_bytes: int
    resident_clusters: int
    token_splits: int
    tokens_per_split: int
    token_stages: int
    norm_blocks: int
    activation: int
    compute_dtype: int
    add_input: int
    channel_scaling: int
    norm: int
    cast_before_weight: int
    weight_offset: int
    scale: float

    def pack(self) -> bytes:
        """The bytes of the struct."""
        return BACKWARD.pack(*flat(self))


class GroupedForwardParams(NamedTuple):
    """The parameters of one forward launch of many adapters."""

    num_tokens: int
    hidden_size: int
    bottleneck_size: int
    slots: int
    x: View
    down_weights: View
    up_weights: View
    down_biases: View
    up_biases: View
    residual: View
    skip: View
    scalings: View
    ranks: View
    token_slots: View
    order: View
    tiles: View
    y: View
    z: View
    partial: View
    down_slot_stride: int
    up_slot_stride: int
    num_tiles: int
    num_splits: int
    features_per_split: int
    shared_bytes: int
    activation: int
    compute_dtype: int
    add_input: int

    def pack(self) -> bytes:
        """The bytes of the struct."""
        return GROUPED_FORWARD.pack(*flat(self))


def _layout(kind: type) -> struct.Struct:
    """The layout of a struct, from the annotations of its fields."""
    codes = {View: "qqq", int: "q", float: "f4x"}  # the scale is padded to 8 bytes
    return struct.Struct("=" + "".join(codes[field] for field in kind.__annotations__.values()))


FORWARD = _layout(ForwardParams)
BACKWARD = _layout(BackwardParams)
GROUPED_FORWARD = _layout(GroupedForwardParams)
