"""Capabilities, allocation and launch of the Triton kernels."""

import contextlib
import functools
import math

import torch
from torch import Tensor

from adapterkern import _env
from adapterkern.backends.base import (
    FIRST_FEATURES,
    Backend,
    allow_tf32,
    empty_gradients,
    empty_outputs,
    empty_units,
    packed,
    rows,
    scaling_gradient,
    unit_rows,
    unit_stride,
    zero_gradients,
)
from adapterkern.backends.triton.launch_config import (
    MOST_REGISTERS,
    Device,
    LaunchConfig,
    Problem,
    RowBlock,
    Split,
    cdiv,
    out_stages,
    sum_config,
    sum_stages,
)
from adapterkern.backends.triton.tuned import device_of, token_plan, weight_gradient_plan
from adapterkern.spec import (
    AdapterCall,
    AdapterSpec,
    Gradients,
    Needs,
    Outputs,
    Saved,
    added_gradients,
)

try:
    import triton.language as tl

    from adapterkern.backends.triton import backward as bwd
    from adapterkern.backends.triton import forward as fwd
    from adapterkern.backends.triton import weight_gradients
    from adapterkern.backends.triton.activations import DERIVATIVES, VALUES

    _IMPORT_ERROR = None
except ImportError as error:
    _IMPORT_ERROR = f"triton cannot be imported ({error})"
    VALUES = DERIVATIVES = {}

# The device that CPU tensors are planned for. Triton's interpreter gets few SMs, so that small
# tests reach both forms; `compile_only` sets the GPU that it compiles for.
cpu_device = Device(num_sms=4, shared_memory=227 * 1024)


class TritonBackend(Backend):
    """Triton kernels on NVIDIA GPUs; on CPU tensors only in Triton's interpreter."""

    name = "triton"
    devices = frozenset({"cuda", "cpu"} if _env.TRITON_INTERPRET else {"cuda"})
    dtypes = frozenset({torch.float32, torch.float16, torch.bfloat16})
    activations = frozenset(VALUES)
    features = FIRST_FEATURES

    def unavailable_reason(self) -> str | None:
        if _IMPORT_ERROR is not None:
            return f"{_IMPORT_ERROR}; pip install triton"
        if _env.TRITON_INTERPRET:
            return None
        if not torch.cuda.is_available():
            return "no CUDA device"
        if torch.version.hip is not None:
            return "AMD GPUs are not supported"
        return None

    def limits(self, spec: AdapterSpec) -> list[str]:
        if spec.device.type != "cuda" or not torch.cuda.is_available():
            return []
        major, minor = torch.cuda.get_device_capability(spec.device)
        return (
            []
            if major >= 8
            else [f"compute capability {major}.{minor} is below 8.0 (no bfloat16 tensor cores)"]
        )

    def forward(self, call: AdapterCall, save: bool) -> tuple[Outputs, Saved]:
        outputs, saved = empty_outputs(call, save)
        x = rows(call.x)
        if x.shape[0] == 0:
            return outputs, saved
        device = _device(x.device)
        plan = token_plan(forward_problem(call, x, device), device)
        with _on(x.device):
            if isinstance(plan, RowBlock):
                self._forward_row_block(call, x, outputs.y, saved.z, plan.kernel)
            else:
                self._forward_split(call, x, outputs.y, saved.z, plan)
        return outputs, saved

    def _forward_row_block(
        self, call, x: Tensor, y: Tensor, z: Tensor | None, config: LaunchConfig
    ) -> None:
        residual, skip = _optional_rows(call.residual), _optional_rows(call.skip)
        fwd.bottleneck_fwd_kernel[(cdiv(x.shape[0], config.block_t),)](
            x, packed(call.down_weight), packed(call.up_weight),
            packed(call.down_bias), packed(call.up_bias), residual, skip,
            packed(call.scaling), _scale(call), y, z,
            x.shape[0], call.hidden_size, call.bottleneck_size,
            x.stride(0), _stride(residual), _stride(skip), unit_stride(call),
            ACTIVATION=VALUES[call.activation], ADD_INPUT=call.add_input,
            **_out_stages(config, call.up_weight, y, x if call.add_input else residual, skip),
            **_dtypes(call), **_channel(call), **_units(call), **_tiles(call, config),
        )  # fmt: skip

    def _forward_split(self, call, x: Tensor, y: Tensor, z: Tensor | None, plan: Split) -> None:
        num_tokens, hidden, bottleneck = x.shape[0], call.hidden_size, call.bottleneck_size
        residual, skip = _optional_rows(call.residual), _optional_rows(call.skip)
        down_bias = packed(call.down_bias)
        partial, a = None, None
        if plan.num_splits > 1:
            partial = empty_units(call, plan.num_splits, num_tokens, dtype=torch.float32)
        else:
            a = empty_units(call, num_tokens)
        stride_unit = unit_stride(call)
        config = plan.narrow
        token_blocks = cdiv(num_tokens, config.block_t)
        grid = token_blocks, cdiv(bottleneck, config.block_r), plan.num_splits
        fwd.bottleneck_fwd_down_kernel[grid](
            x, packed(call.down_weight), down_bias, partial, z if partial is None else None, a,
            num_tokens, hidden, bottleneck, plan.features_per_split, x.stride(0), stride_unit,
            ACTIVATION=VALUES[call.activation],
            **_dtypes(call), **_units(call), **_tiles(call, config),
        )  # fmt: skip
        config = plan.widen
        slices = cdiv(hidden, plan.features_per_program)
        fwd.bottleneck_fwd_up_kernel[cdiv(num_tokens, config.block_t), slices](
            partial, a, x, packed(call.up_weight), down_bias, packed(call.up_bias),
            residual, skip, packed(call.scaling), _scale(call), y, None if partial is None else z,
            num_tokens, hidden, bottleneck, plan.num_splits, plan.features_per_program,
            x.stride(0), _stride(residual), _stride(skip), stride_unit,
            ACTIVATION=VALUES[call.activation], ADD_INPUT=call.add_input,
            ONE_TILE=bottleneck <= config.block_r,
            **_out_stages(config, call.up_weight, y, x if call.add_input else residual, skip),
            SUM_STAGES=sum_stages(config, _device(x.device)),
            **_dtypes(call), **_channel(call), **_units(call), **_tiles(call, config),
        )  # fmt: skip

    def backward(
        self, call: AdapterCall, saved: Saved, upstream: Outputs, needs: Needs
    ) -> Gradients:
        x, dy = rows(call.x), rows(upstream.y)
        if x.shape[0] == 0:
            return zero_gradients(call, upstream, needs)
        assert saved.z is not None
        z = unit_rows(call, saved.z)  # hooks on saved tensors may have packed it
        out = empty_gradients(call, needs._replace(scaling=False))
        dz = empty_units(call, x.shape[0]) if needs.down_weight or needs.down_bias else None
        a = empty_units(call, x.shape[0]) if needs.up_weight or needs.scaling else None
        device = _device(x.device)
        with _on(x.device):
            if needs.dz or a is not None:
                plan = token_plan(dx_problem(call, dy, device), device)
                if isinstance(plan, RowBlock):
                    self._dx_row_block(call, z, dy, out.x, dz, a, plan.kernel)
                else:
                    self._dx_split(call, z, dy, out.x, dz, a, plan)
            if needs.parameters:
                sums = self._weight_gradients(call, x, dy, dz, a, out, needs)
                out = out._replace(scaling=scaling_gradient(call, sums))
        return out._replace(**added_gradients(upstream, needs))

    def _dx_row_block(
        self, call: AdapterCall, z: Tensor, dy: Tensor, dx: Tensor | None, dz: Tensor | None,
        a: Tensor | None, config: LaunchConfig,
    ) -> None:  # fmt: skip
        bwd.bottleneck_bwd_dx_kernel[(cdiv(dy.shape[0], config.block_t),)](
            dy, z, packed(call.down_weight), packed(call.up_weight),
            packed(call.scaling), _scale(call), dx, dz, a,
            dy.shape[0], call.hidden_size, call.bottleneck_size, dy.stride(0), z.stride(0),
            **_activations(call), ADD_INPUT=call.add_input,
            **_out_stages(config, call.down_weight, dx, dy if call.add_input else None),
            **_dtypes(call), **_channel(call), **_units(call), **_tiles(call, config),
        )  # fmt: skip

    def _dx_split(
        self, call: AdapterCall, z: Tensor, dy: Tensor, dx: Tensor | None, dz: Tensor | None,
        a: Tensor | None, plan: Split,
    ) -> None:  # fmt: skip
        num_tokens, hidden, bottleneck = dy.shape[0], call.hidden_size, call.bottleneck_size
        wants_dz = dx is not None or dz is not None
        partial, splits, features = None, plan.num_splits, plan.features_per_split
        if not wants_dz:  # a alone, which no slice of H has a part in
            splits, features = 1, hidden
        elif splits > 1:
            partial = empty_units(call, splits, num_tokens, dtype=torch.float32)
        elif dz is None:
            dz = empty_units(call, num_tokens)
        config = plan.narrow
        grid = cdiv(num_tokens, config.block_t), cdiv(bottleneck, config.block_r), splits
        first = partial is None  # the kernel that finishes dz and a, and stores them
        bwd.bottleneck_bwd_split_dz_kernel[grid](
            dy, z, packed(call.up_weight), packed(call.scaling), _scale(call),
            partial, dz if first else None, a if first else None,
            num_tokens, hidden, bottleneck, features, dy.stride(0), z.stride(0),
            **_activations(call),
            **_dtypes(call), **_channel(call), **_units(call), **_tiles(call, config),
        )  # fmt: skip
        if dx is None and partial is None:
            return
        config = plan.widen
        features = plan.features_per_program if dx is not None else hidden
        slices = cdiv(hidden, features)
        bwd.bottleneck_bwd_split_dx_kernel[cdiv(num_tokens, config.block_t), slices](
            partial, dz, None if first else a, dy, z, packed(call.down_weight), dx,
            num_tokens, hidden, bottleneck, splits, features, dy.stride(0), z.stride(0),
            **_activations(call), ADD_INPUT=call.add_input, ONE_TILE=bottleneck <= config.block_r,
            **_out_stages(config, call.down_weight, dx, dy if call.add_input else None),
            SUM_STAGES=sum_stages(config, _device(z.device)),
            **_dtypes(call), **_units(call), **_tiles(call, config),
        )  # fmt: skip

    def _weight_gradients(
        self,
        call: AdapterCall,
        x: Tensor,
        dy: Tensor,
        dz: Tensor | None,
        a: Tensor | None,
        gradients: Gradients,
        needs: Needs,
    ) -> Tensor | None:
        """Write those of the weights and biases; return the sums over tokens for the scaling."""
        num_tokens, hidden, bottleneck = x.shape[0], call.hidden_size, call.bottleneck_size
        down, up = gradients.down_weight, gradients.up_weight
        down_bias, up_bias = gradients.down_bias, gradients.up_bias
        device = _device(x.device)
        plan = weight_gradient_plan(weights_problem(call, x, dy, device), device)
        config = plan.kernel
        in_parts = plan.num_splits > 1 or needs.scaling

        def room(output: Tensor | None, like: Tensor | None, wanted: bool = False) -> Tensor | None:
            """The partial sums of an output; they may be wanted where the output is not."""
            if not in_parts:
                return output
            if like is None or (output is None and not wanted):
                return None
            return like.new_empty((plan.num_splits, *like.shape), dtype=torch.float32)

        # d(scaling) needs G and sum(dy) even where dW_up and db_up are not asked for.
        part_down, part_down_bias = room(down, call.down_weight), room(down_bias, call.down_bias)
        part_up = room(up, call.up_weight, needs.scaling)
        part_up_bias = room(up_bias, call.up_bias, needs.scaling)
        scaling, scale, channel = packed(call.scaling), _scale(call), _channel(call)
        grid = cdiv(hidden, config.block_h), cdiv(bottleneck, config.block_r), plan.num_splits
        weight_gradients.bottleneck_bwd_dw_kernel[grid](
            x, dy, dz, a, None if in_parts else scaling, None if in_parts else scale,
            part_down, part_up, part_down_bias, part_up_bias,
            num_tokens, hidden, bottleneck, plan.tokens_per_split,
            x.stride(0), dy.stride(0), unit_stride(call),
            **_dtypes(call), CHANNEL_SCALING=channel["CHANNEL_SCALING"] and not in_parts,
            **_units(call), **_tiles(call, config),
        )  # fmt: skip
        if not in_parts:
            return None
        d_scaling = x.new_empty(hidden, dtype=torch.float32) if needs.scaling else None
        config = sum_config(bottleneck)
        unit_blocks = 1 if needs.scaling else cdiv(bottleneck, config.block_r)
        weight_gradients.bottleneck_bwd_dw_sum_kernel[cdiv(hidden, config.block_h), unit_blocks](
            part_down, part_up, part_down_bias, part_up_bias,
            packed(call.up_weight), packed(call.up_bias), scaling, scale,
            down, up, down_bias, up_bias, d_scaling,
            hidden, bottleneck, plan.num_splits,
            **channel, **_units(call), BLOCK_H=config.block_h, BLOCK_R=config.block_r,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        return d_scaling


def _optional_rows(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else rows(tensor)


def _stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


def _scale(call: AdapterCall) -> float | None:
    """The float that scales the sum; None, which costs the kernels nothing, where it is 1 or
    `scaling` takes its place."""
    return None if call.scaling is not None or call.scale == 1.0 else call.scale


def forward_problem(call: AdapterCall, x: Tensor, device: Device) -> Problem:
    """The problem that the launch of y is planned for; x [T, H]."""
    return _problem(call, device, x, call.down_weight, call.up_weight)


def dx_problem(call: AdapterCall, dy: Tensor, device: Device) -> Problem:
    """The problem that the launch of dz and dx is planned for; dy [T, H]."""
    return _problem(call, device, dy, call.down_weight, call.up_weight)


def weights_problem(call: AdapterCall, x: Tensor, dy: Tensor, device: Device) -> Problem:
    """The problem that the weight gradients' launch is planned for; x and dy [T, H]."""
    return _problem(call, device, x, dy)


def _problem(call: AdapterCall, device: Device, *staged: Tensor) -> Problem:
    """`staged` tensors wait in shared memory in their own dtype: where that is small, one of
    float32 beside a half-precision x takes the wide tiles too.
    """
    single = call.compute_dtype == torch.float32
    mixed = device.small and any(tensor.dtype == torch.float32 for tensor in staged)
    return Problem(
        num_tokens=staged[0].shape[0],
        hidden_size=call.hidden_size,
        bottleneck_size=call.bottleneck_size,
        ieee=single and not allow_tf32(),
        wide=single or call.x.dtype == torch.float32 or mixed,
    )


_gpu = functools.cache(device_of)


def _device(device: torch.device) -> Device:
    return cpu_device if device.type == "cpu" else _gpu(device.index)


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, whatever device its pointers are on."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def _dtypes(call: AdapterCall) -> dict:
    types = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    tf32 = call.compute_dtype == torch.float32 and allow_tf32()
    return {"DTYPE": types[call.compute_dtype], "PRECISION": "tf32" if tf32 else "ieee"}


def _channel(call: AdapterCall) -> dict:
    return {"CHANNEL_SCALING": call.scaling is not None and call.scaling.numel() > 1}


def _activations(call: AdapterCall) -> dict:
    return {"ACTIVATION": VALUES[call.activation], "DERIVATIVE": DERIVATIVES[call.activation]}


def _units(call: AdapterCall) -> dict:
    """Rows of W_up begin at multiples of this many elements: vectors of so many load it."""
    return {"R_MULTIPLE": math.gcd(call.bottleneck_size, 8)}


def _out_stages(
    config: LaunchConfig, weight: Tensor, output: Tensor | None, *loaded: Tensor | None
) -> dict:
    if output is None:
        return {"OUT_STAGES": 1}
    row_bytes = sum(tensor.element_size() for tensor in loaded if tensor is not None)
    sizes = row_bytes, weight.element_size(), output.element_size()
    return {"OUT_STAGES": out_stages(config, _device(output.device), *sizes)}


def _tiles(call: AdapterCall, config: LaunchConfig) -> dict:
    return {
        "EVEN_H": call.hidden_size % config.block_h == 0,
        "EVEN_R": call.bottleneck_size % config.block_r == 0,
        "BLOCK_T": config.block_t,
        "BLOCK_H": config.block_h,
        "BLOCK_R": config.block_r,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "maxnreg": max_registers(config),
    }


def max_registers(config: LaunchConfig) -> int | None:
    """The bound in Triton's terms, which has None where there is none."""
    return None if config.max_registers == MOST_REGISTERS else config.max_registers
