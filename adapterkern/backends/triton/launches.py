"""The launches of the Triton kernels: which arguments each takes for a call and a plan."""

import math

import torch
import triton.language as tl
from torch import Tensor

from adapterkern.backends.base import (
    allow_tf32,
    empty_units,
    optional_rows,
    packed,
    unit_stride,
)
from adapterkern.backends.triton import backward as bwd
from adapterkern.backends.triton import forward as fwd
from adapterkern.backends.triton import launcher, weight_gradients
from adapterkern.backends.triton.activations import GRADIENTS, VALUES
from adapterkern.backends.triton.launch_config import (
    SUM,
    Device,
    LaunchConfig,
    Split,
    WeightGradient,
    cdiv,
    gradient_stages,
    into_stages,
    out_stages,
    sum_stages,
)
from adapterkern.grouped.call import GroupedCall
from adapterkern.results import Gradients, Needs
from adapterkern.spec import AdapterCall, shape_of

TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


class CallLaunches:
    """The launches of one call on one device, which `recording` runs and notes."""

    def __init__(self, call: AdapterCall, recording: launcher.Launches, device: Device) -> None:
        self._call, self._device = call, device
        self._launch, self._own = recording.launch, recording.own

    def forward_row_block(
        self, x: Tensor, y: Tensor, z: Tensor | None, config: LaunchConfig
    ) -> None:
        call = self._call
        residual, skip = optional_rows(call.residual), optional_rows(call.skip)
        self._launch(
            fwd.bottleneck_fwd_kernel, (cdiv(x.shape[0], config.block_t),),
            x, packed(call.down_weight), packed(call.up_weight),
            packed(call.down_bias), packed(call.up_bias), residual, skip,
            packed(call.scaling), scale_of(call), y, z,
            x.shape[0], call.hidden_size, call.bottleneck_size,
            x.stride(0), stride_of(residual), stride_of(skip), unit_stride(call),
            ACTIVATION=VALUES[call.activation], ADD_INPUT=call.add_input,
            OUT_STAGES=self._out_stages(
                config, call.up_weight, y, x if call.add_input else residual, skip
            ),
            **dtypes_of(call), **channel_of(call), **units_of(call),
            **self._tiles(config, x, call.down_weight),
        )  # fmt: skip

    def forward_split(self, x: Tensor, y: Tensor, z: Tensor | None, plan: Split) -> None:
        call = self._call
        num_tokens, hidden, bottleneck = x.shape[0], call.hidden_size, call.bottleneck_size
        residual, skip = optional_rows(call.residual), optional_rows(call.skip)
        down_bias = packed(call.down_bias)
        partial, a = None, None
        if plan.num_splits > 1:
            partial = self._own(empty_units(call, plan.num_splits, num_tokens, dtype=torch.float32))
        else:
            a = self._own(empty_units(call, num_tokens))
        stride_unit = unit_stride(call)
        config = plan.narrow
        token_blocks = cdiv(num_tokens, config.block_t)
        grid = token_blocks, cdiv(bottleneck, config.block_r), plan.num_splits
        self._launch(
            fwd.bottleneck_fwd_down_kernel, grid,
            x, packed(call.down_weight), down_bias, partial, z if partial is None else None, a,
            num_tokens, hidden, bottleneck, plan.features_per_split, x.stride(0), stride_unit,
            ACTIVATION=VALUES[call.activation],
            **dtypes_of(call), **units_of(call), **self._tiles(config, x, call.down_weight),
        )  # fmt: skip
        config = plan.widen
        slices = cdiv(hidden, plan.features_per_program)
        self._launch(
            fwd.bottleneck_fwd_up_kernel, (cdiv(num_tokens, config.block_t), slices),
            partial, a, x, packed(call.up_weight), down_bias, packed(call.up_bias),
            residual, skip, packed(call.scaling), scale_of(call), y, None if partial is None else z,
            num_tokens, hidden, bottleneck, plan.num_splits, plan.features_per_program,
            x.stride(0), stride_of(residual), stride_of(skip), stride_unit,
            ACTIVATION=VALUES[call.activation], ADD_INPUT=call.add_input,
            ONE_TILE=bottleneck <= config.block_r,
            OUT_STAGES=self._out_stages(
                config, call.up_weight, y, x if call.add_input else residual, skip
            ),
            SUM_STAGES=sum_stages(config, self._device),
            **dtypes_of(call), **channel_of(call), **units_of(call),
            **tiles_of(call, config, config.num_stages),
        )  # fmt: skip

    def dx_row_block(
        self, z: Tensor, dy: Tensor, dx: Tensor | None, dz: Tensor | None,
        a: Tensor | None, config: LaunchConfig,
    ) -> None:  # fmt: skip
        call = self._call
        self._launch(
            bwd.bottleneck_bwd_dx_kernel, (cdiv(dy.shape[0], config.block_t),),
            dy, z, packed(call.down_weight), packed(call.up_weight),
            packed(call.scaling), scale_of(call), dx, dz, a,
            dy.shape[0], call.hidden_size, call.bottleneck_size, dy.stride(0), z.stride(0),
            **activations_of(call), ADD_INPUT=call.add_input,
            OUT_STAGES=self._out_stages(
                config, call.down_weight, dx, dy if call.add_input else None
            ),
            **dtypes_of(call), **channel_of(call), **units_of(call),
            **self._tiles(config, dy, call.up_weight),
        )  # fmt: skip

    def dx_split(
        self, z: Tensor, dy: Tensor, dx: Tensor | None, dz: Tensor | None,
        a: Tensor | None, plan: Split,
    ) -> None:  # fmt: skip
        call = self._call
        num_tokens, hidden, bottleneck = dy.shape[0], call.hidden_size, call.bottleneck_size
        wants_dz = dx is not None or dz is not None
        partial, splits, features = None, plan.num_splits, plan.features_per_split
        if not wants_dz:  # a alone, which no slice of H has a part in
            splits, features = 1, hidden
        elif splits > 1:
            partial = self._own(empty_units(call, splits, num_tokens, dtype=torch.float32))
        elif dz is None:
            dz = self._own(empty_units(call, num_tokens))
        config = plan.narrow
        grid = cdiv(num_tokens, config.block_t), cdiv(bottleneck, config.block_r), splits
        first = partial is None  # the kernel that finishes dz and a, and stores them
        self._launch(
            bwd.bottleneck_bwd_split_dz_kernel, grid,
            dy, z, packed(call.up_weight), packed(call.scaling), scale_of(call),
            partial, dz if first else None, a if first else None,
            num_tokens, hidden, bottleneck, features, dy.stride(0), z.stride(0),
            **activations_of(call), **dtypes_of(call), **channel_of(call), **units_of(call),
            **self._tiles(config, dy, call.up_weight),
        )  # fmt: skip
        if dx is None and partial is None:
            return
        config = plan.widen
        features, slices = plan.features_per_program, cdiv(hidden, plan.features_per_program)
        if dx is None:  # one tile of features: each would add up the sums and store dz and a anew
            features, slices = config.block_h, 1
        self._launch(
            bwd.bottleneck_bwd_split_dx_kernel, (cdiv(num_tokens, config.block_t), slices),
            partial, dz, None if first else a, dy, z, packed(call.down_weight), dx,
            num_tokens, hidden, bottleneck, splits, features, dy.stride(0), z.stride(0),
            **activations_of(call), ADD_INPUT=call.add_input, ONE_TILE=bottleneck <= config.block_r,
            OUT_STAGES=self._out_stages(
                config, call.down_weight, dx, dy if call.add_input else None
            ),
            SUM_STAGES=sum_stages(config, self._device),
            **dtypes_of(call), **units_of(call), **tiles_of(call, config, config.num_stages),
        )  # fmt: skip

    def weight_gradients(
        self,
        dy: Tensor,
        dz: Tensor | None,
        a: Tensor | None,
        gradients: Gradients,
        needs: Needs,
        plan: WeightGradient,
    ) -> Tensor | None:
        """Write those of the weights and biases; return the sums over tokens for the scaling."""
        call = self._call
        num_tokens, hidden, bottleneck = dy.shape[0], call.hidden_size, call.bottleneck_size
        x = optional_rows(call.x)
        down, up = gradients.down_weight, gradients.up_weight
        down_bias, up_bias = gradients.down_bias, gradients.up_bias
        config = plan.kernel
        in_parts = plan.num_splits > 1 or needs.scaling

        def room(output: Tensor | None, like: Tensor | None, wanted: bool = False) -> Tensor | None:
            """The partial sums of an output; they may be wanted where the output is not."""
            if not in_parts:
                return output
            if like is None or (output is None and not wanted):
                return None
            shape = (plan.num_splits, *shape_of(like))
            return self._own(like.new_empty(shape, dtype=torch.float32))

        # d(scaling) needs G and sum(dy) even where dW_up and db_up are not asked for.
        part_down, part_down_bias = room(down, call.down_weight), room(down_bias, call.down_bias)
        part_up = room(up, call.up_weight, needs.scaling)
        part_up_bias = room(up_bias, call.up_bias, needs.scaling)
        scaling, scale, channel = packed(call.scaling), scale_of(call), channel_of(call)
        grid = cdiv(hidden, config.block_h), cdiv(bottleneck, config.block_r), plan.num_splits
        self._launch(
            weight_gradients.bottleneck_bwd_dw_kernel, grid,
            x, dy, dz, a, None if in_parts else scaling, None if in_parts else scale,
            part_down, part_up, part_down_bias, part_up_bias,
            num_tokens, hidden, bottleneck, plan.tokens_per_split,
            stride_of(x), dy.stride(0), unit_stride(call),
            **dtypes_of(call), CHANNEL_SCALING=channel["CHANNEL_SCALING"] and not in_parts,
            **units_of(call), **tiles_of(call, config, self._gradient_stages(config, call.x, dy)),
        )  # fmt: skip
        if not in_parts:
            return None
        d_scaling = None
        if needs.scaling:
            d_scaling = self._own(dy.new_empty(hidden, dtype=torch.float32))
        config = SUM
        unit_blocks = 1 if needs.scaling else cdiv(bottleneck, config.block_r)
        up_tiles = cdiv(hidden, config.block_h) * unit_blocks
        down_tiles = cdiv(bottleneck, 8) * cdiv(hidden, config.block_h * config.block_r // 8)
        self._launch(
            weight_gradients.bottleneck_bwd_dw_sum_kernel, (max(up_tiles, down_tiles), 2),
            part_down, part_up, part_down_bias, part_up_bias,
            packed(call.up_weight), packed(call.up_bias), scaling, scale,
            down, up, down_bias, up_bias, d_scaling,
            hidden, bottleneck, plan.num_splits,
            **channel, **units_of(call), BLOCK_S=config.block_t,
            BLOCK_H=config.block_h, BLOCK_R=config.block_r,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        return d_scaling

    def _tiles(self, config: LaunchConfig, loaded: Tensor, weight: Tensor) -> dict:
        """Of a kernel whose first loop reads `loaded` [T, H] and a weight."""
        sizes = loaded.element_size(), weight.element_size()
        return tiles_of(self._call, config, into_stages(config, self._device, *sizes))

    def _gradient_stages(self, config: LaunchConfig, x: Tensor, dy: Tensor) -> int:
        rows, units = x.element_size() + dy.element_size(), 2 * self._call.compute_dtype.itemsize
        return gradient_stages(config, self._device, rows, units)

    def _out_stages(
        self, config: LaunchConfig, weight: Tensor, output: Tensor | None, *loaded: Tensor | None
    ) -> int:
        """Of the loop that writes `output`; `loaded` are the tensors [T, H] that it reads."""
        if output is None:
            return 1
        row_bytes = sum(tensor.element_size() for tensor in loaded if tensor is not None)
        sizes = row_bytes, weight.element_size(), output.element_size()
        return out_stages(config, self._device, *sizes)


def stride_of(tensor: Tensor | None) -> int:
    """From one row to the next; 0, which nothing reads, where there is no tensor."""
    return 0 if tensor is None else tensor.stride(0)


def scale_of(call: AdapterCall) -> float | None:
    """The float that scales the sum; None, which costs the kernels nothing, where it is 1 or
    `scaling` takes its place."""
    return None if call.scaling is not None or call.scale == 1.0 else call.scale


def dtypes_of(call: AdapterCall | GroupedCall) -> dict:
    """Of the products: their operands' dtype, and how exact those of float32 are."""
    tf32 = call.compute_dtype == torch.float32 and allow_tf32()
    return {"DTYPE": TYPES[call.compute_dtype], "PRECISION": "tf32" if tf32 else "ieee"}


def channel_of(call: AdapterCall) -> dict:
    """Whether each feature has a scaling of its own."""
    return {"CHANNEL_SCALING": call.scaling is not None and call.scaling.numel() > 1}


def activations_of(call: AdapterCall | GroupedCall) -> dict:
    """The activation and its gradient."""
    return {"ACTIVATION": VALUES[call.activation], "GRADIENT": GRADIENTS[call.activation]}


def units_of(call: AdapterCall | GroupedCall) -> dict:
    """Rows of W_up begin at multiples of this many elements: vectors of so many load it."""
    return {"R_MULTIPLE": math.gcd(call.bottleneck_size, 8)}


def tiles_of(call: AdapterCall | GroupedCall, config: LaunchConfig, stages: int) -> dict:
    """The tile of a kernel, and which sizes of the call it divides."""
    return {
        "EVEN_H": call.hidden_size % config.block_h == 0,
        "EVEN_R": call.bottleneck_size % config.block_r == 0,
        "BLOCK_T": config.block_t,
        "BLOCK_H": config.block_h,
        "BLOCK_R": config.block_r,
        "num_warps": config.num_warps,
        "num_stages": stages,
    }
