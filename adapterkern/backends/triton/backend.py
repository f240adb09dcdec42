"""Capabilities, allocation and launch of the Triton kernels."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from adapterkern import _env
from adapterkern.backends.base import (
    FIRST_FEATURES,
    Backend,
    allow_tf32,
    empty_gradients,
    empty_outputs,
    packed,
    rows,
    scaling_gradient,
    zero_gradients,
)
from adapterkern.backends.repeat import options_of
from adapterkern.backends.triton import tuned
from adapterkern.backends.triton.launch_config import (
    SUM,
    Device,
    LaunchConfig,
    Problem,
    RowBlock,
    Split,
    cdiv,
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
    tensor_values,
)

try:
    import triton.language as tl

    from adapterkern.backends.triton import backward as bwd
    from adapterkern.backends.triton import forward as fwd
    from adapterkern.backends.triton import launcher
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
        if call.x.numel() == 0:
            return empty_outputs(call, save)
        y, z = launcher.run(
            tensor_values(call),
            (save, tuned.generation, *options_of(call)),
            lambda recording: self._forward(call, save, recording),
        )
        return Outputs(y), Saved(z)

    def _forward(self, call: AdapterCall, save: bool, recording) -> tuple[Tensor, Tensor | None]:
        outputs, saved = empty_outputs(call, save)
        y, z = recording.own(outputs.y), recording.own(saved.z)
        x = rows(call.x)
        device = _device(x.device)
        plan = token_plan(forward_problem(call, x, device), device)
        if isinstance(plan, RowBlock):
            self._forward_row_block(recording, call, x, y, z, plan.kernel)
        else:
            self._forward_split(recording, call, x, y, z, plan)
        return y, z

    def _forward_row_block(
        self, recording, call, x: Tensor, y: Tensor, z: Tensor | None, config: LaunchConfig
    ) -> None:
        residual, skip = _optional_rows(call.residual), _optional_rows(call.skip)
        recording.launch(
            fwd.bottleneck_fwd_kernel, (cdiv(x.shape[0], config.block_t),),
            x, packed(call.down_weight), packed(call.up_weight),
            packed(call.down_bias), packed(call.up_bias), residual, skip,
            packed(call.scaling), call.scale, y, z,
            x.shape[0], call.hidden_size, call.bottleneck_size,
            x.stride(0), _stride(residual), _stride(skip),
            VALUES[call.activation], **_dtypes(call), ADD_INPUT=call.add_input, **_channel(call),
            **_tiles(call, config),
        )  # fmt: skip

    def _forward_split(
        self, recording, call, x: Tensor, y: Tensor, z: Tensor | None, plan: Split
    ) -> None:
        num_tokens, hidden, bottleneck = x.shape[0], call.hidden_size, call.bottleneck_size
        residual, skip = _optional_rows(call.residual), _optional_rows(call.skip)
        down_bias = packed(call.down_bias)
        partial = None
        if plan.num_splits > 1:
            shape = plan.num_splits, num_tokens, bottleneck
            partial = recording.own(x.new_empty(shape, dtype=torch.float32))
        elif z is None:
            z = recording.own(x.new_empty((num_tokens, bottleneck), dtype=call.compute_dtype))
        config = plan.narrow
        token_blocks = cdiv(num_tokens, config.block_t)
        grid = token_blocks, cdiv(bottleneck, config.block_r), plan.num_splits
        recording.launch(
            fwd.bottleneck_fwd_down_kernel, grid,
            x, packed(call.down_weight), down_bias, z if partial is None else partial,
            num_tokens, hidden, bottleneck, plan.features_per_split, x.stride(0),
            **_dtypes(call), PARTIAL=partial is not None, **_tiles(call, config),
        )  # fmt: skip
        config = plan.widen
        blocks = cdiv(num_tokens, config.block_t), cdiv(hidden, config.block_h)
        recording.launch(
            fwd.bottleneck_fwd_up_kernel, blocks,
            partial, z, x, packed(call.up_weight), down_bias, packed(call.up_bias),
            residual, skip, packed(call.scaling), call.scale, y,
            num_tokens, hidden, bottleneck, plan.num_splits,
            x.stride(0), _stride(residual), _stride(skip),
            VALUES[call.activation], **_dtypes(call), ADD_INPUT=call.add_input, **_channel(call),
            **_tiles(call, config),
        )  # fmt: skip

    def backward(
        self, call: AdapterCall, saved: Saved, upstream: Outputs, needs: Needs
    ) -> Gradients:
        if call.x.numel() == 0:
            return zero_gradients(call, upstream, needs)
        inputs = *tensor_values(call), saved.z, upstream.y
        *computed, sums = launcher.run(
            inputs,
            (needs, tuned.generation, *options_of(call)),
            lambda recording: self._backward(call, saved.z, upstream.y, needs, recording),
        )
        added = added_gradients(upstream, needs)
        return Gradients(*computed)._replace(scaling=scaling_gradient(call, sums), **added)

    def _backward(
        self, call: AdapterCall, z: Tensor | None, dy: Tensor, needs: Needs, recording
    ) -> tuple[Tensor | None, ...]:
        """The gradients but for the scaling's, of which the last result holds the sums."""
        assert z is not None
        x, dy, sums = rows(call.x), rows(dy), None
        out = empty_gradients(call, needs._replace(residual=False, skip=False, scaling=False))
        for gradient in out:
            recording.own(gradient)
        dz = recording.own(torch.empty_like(z)) if needs.down_weight or needs.down_bias else None
        device = _device(x.device)
        if needs.dz:
            plan = token_plan(dx_problem(call, dy, device), device)
            if isinstance(plan, RowBlock):
                self._dx_row_block(recording, call, z, dy, out.x, dz, plan.kernel)
            else:
                self._dx_split(recording, call, z, dy, out.x, dz, plan)
        if needs.parameters:
            sums = self._weight_gradients(recording, call, x, dy, z, dz, out, needs)
        return *out, sums

    def _dx_row_block(
        self,
        recording,
        call: AdapterCall,
        z: Tensor,
        dy: Tensor,
        dx: Tensor | None,
        dz: Tensor | None,
        config: LaunchConfig,
    ) -> None:
        recording.launch(
            bwd.bottleneck_bwd_dx_kernel, (cdiv(dy.shape[0], config.block_t),),
            dy, z, packed(call.down_weight), packed(call.up_weight),
            packed(call.scaling), call.scale, dx, dz,
            dy.shape[0], call.hidden_size, call.bottleneck_size, dy.stride(0),
            DERIVATIVES[call.activation], **_dtypes(call), ADD_INPUT=call.add_input,
            **_channel(call), **_tiles(call, config),
        )  # fmt: skip

    def _dx_split(
        self,
        recording,
        call,
        z: Tensor,
        dy: Tensor,
        dx: Tensor | None,
        dz: Tensor | None,
        plan: Split,
    ) -> None:
        num_tokens, hidden, bottleneck = dy.shape[0], call.hidden_size, call.bottleneck_size
        partial = None
        if plan.num_splits > 1:
            shape = plan.num_splits, num_tokens, bottleneck
            partial = recording.own(z.new_empty(shape, dtype=torch.float32))
        elif dz is None:
            dz = recording.own(torch.empty_like(z))
        derivative = DERIVATIVES[call.activation]
        config = plan.narrow
        token_blocks = cdiv(num_tokens, config.block_t)
        grid = token_blocks, cdiv(bottleneck, config.block_r), plan.num_splits
        recording.launch(
            bwd.bottleneck_bwd_split_dz_kernel, grid,
            dy, z, packed(call.up_weight), packed(call.scaling), call.scale,
            dz if partial is None else partial,
            num_tokens, hidden, bottleneck, plan.features_per_split, dy.stride(0),
            derivative, **_dtypes(call), PARTIAL=partial is not None, **_channel(call),
            **_tiles(call, config),
        )  # fmt: skip
        if dx is None and partial is None:
            return
        config = plan.widen
        feature_blocks = cdiv(hidden, config.block_h) if dx is not None else 1
        recording.launch(
            bwd.bottleneck_bwd_split_dx_kernel, (cdiv(num_tokens, config.block_t), feature_blocks),
            partial, dz, dy, z, packed(call.down_weight), dx,
            num_tokens, hidden, bottleneck, plan.num_splits, dy.stride(0),
            derivative, **_dtypes(call), ADD_INPUT=call.add_input, **_tiles(call, config),
        )  # fmt: skip

    def _weight_gradients(
        self,
        recording,
        call: AdapterCall,
        x: Tensor,
        dy: Tensor,
        z: Tensor,
        dz: Tensor | None,
        gradients: Gradients,
        needs: Needs,
    ) -> Tensor | None:
        """Write those of the weights and biases; return the sums over tokens for the scaling."""
        num_tokens, hidden, bottleneck = x.shape[0], call.hidden_size, call.bottleneck_size
        parameters = (call.down_weight, call.up_weight, call.down_bias, call.up_bias)
        out = (gradients.down_weight, gradients.up_weight, gradients.down_bias, gradients.up_bias)
        device = _device(x.device)
        plan = weight_gradient_plan(weights_problem(call, x, dy, device), device)
        config = plan.kernel
        partial = plan.num_splits > 1 or needs.scaling
        sums: Sequence[Tensor | None] = out
        if partial:
            # d(scaling) needs G and sum(dy) even where dW_up and db_up are not asked for.
            wanted = (needs.down_weight, needs.up_weight or needs.scaling, needs.down_bias,
                      needs.up_bias or (needs.scaling and call.up_bias is not None))  # fmt: skip
            sums = [
                recording.own(p.new_empty((plan.num_splits, *p.shape), dtype=torch.float32))
                if want and p is not None
                else None
                for p, want in zip(parameters, wanted, strict=True)
            ]
        grid = cdiv(hidden, config.block_h), cdiv(bottleneck, config.block_r), plan.num_splits
        recording.launch(
            bwd.bottleneck_bwd_dw_kernel, grid,
            x, dy, z, dz, packed(call.scaling), call.scale, *sums,
            num_tokens, hidden, bottleneck, plan.tokens_per_split, x.stride(0), dy.stride(0),
            VALUES[call.activation], **_dtypes(call), PARTIAL=partial, **_channel(call),
            **_tiles(call, config),
        )  # fmt: skip
        if not partial:
            return None
        d_scaling = (
            recording.own(x.new_empty(hidden, dtype=torch.float32)) if needs.scaling else None
        )
        units = bottleneck if needs.scaling else SUM.block_r
        recording.launch(
            bwd.bottleneck_bwd_dw_sum_kernel, (cdiv(hidden, SUM.block_h), cdiv(bottleneck, units)),
            *sums, packed(call.up_weight), packed(call.up_bias),
            packed(call.scaling), call.scale, *out, d_scaling,
            hidden, bottleneck, plan.num_splits, units,
            **_channel(call), BLOCK_H=SUM.block_h, BLOCK_R=SUM.block_r,
            num_warps=SUM.num_warps, num_stages=SUM.num_stages,
        )  # fmt: skip
        return d_scaling


def _optional_rows(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else rows(tensor)


def _stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


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


def _dtypes(call: AdapterCall) -> dict:
    types = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    tf32 = call.compute_dtype == torch.float32 and allow_tf32()
    return {"DTYPE": types[call.compute_dtype], "PRECISION": "tf32" if tf32 else "ieee"}


def _channel(call: AdapterCall) -> dict:
    return {"CHANNEL_SCALING": call.scaling is not None and call.scaling.numel() > 1}


def _tiles(call: AdapterCall, config: LaunchConfig) -> dict:
    return {
        "EVEN_H": call.hidden_size % config.block_h == 0,
        "EVEN_R": call.bottleneck_size % config.block_r == 0,
        "BLOCK_T": config.block_t,
        "BLOCK_H": config.block_h,
        "BLOCK_R": config.block_r,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
