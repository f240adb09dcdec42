"""Capabilities, allocation and launch of the Triton kernels."""

import functools

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
    rows,
    scaling_gradient,
    unit_rows,
    zero_gradients,
)
from adapterkern.backends.repeat import options_of
from adapterkern.backends.triton import tuned
from adapterkern.backends.triton.launch_config import (
    Device,
    Problem,
    RowBlock,
)
from adapterkern.backends.triton.tuned import device_of, token_plan, weight_gradient_plan
from adapterkern.results import Gradients, Needs, Outputs, Saved, added_gradients
from adapterkern.spec import AdapterCall, AdapterSpec, tensor_values

try:
    from triton import knobs

    from adapterkern.backends.triton import launcher
    from adapterkern.backends.triton.activations import VALUES
    from adapterkern.backends.triton.launches import CallLaunches

    if knobs.runtime.interpret:  # as the kernels that were just defined have found it
        from adapterkern.backends.triton.interpreter import make_bfloat16_exact

        make_bfloat16_exact()
    _IMPORT_ERROR = None
except ImportError as error:
    _IMPORT_ERROR = f"triton cannot be imported ({error})"
    VALUES = {}

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
            call.scale,
        )
        return Outputs(y), Saved(z)

    def _forward(self, call: AdapterCall, save: bool, recording) -> tuple[Tensor, Tensor | None]:
        outputs, saved = empty_outputs(call, save)
        y, z = recording.own(outputs.y), recording.own(saved.z)
        x = rows(call.x)
        device = _device(x.device)
        plan = token_plan(forward_problem(call, x, device), device)
        launches = CallLaunches(call, recording, device)
        if isinstance(plan, RowBlock):
            launches.forward_row_block(x, y, z, plan.kernel)
        else:
            launches.forward_split(x, y, z, plan)
        return y, z

    def backward(
        self, call: AdapterCall, saved: Saved, upstream: Outputs, needs: Needs
    ) -> Gradients:
        dy = upstream.given
        if dy.numel() == 0:
            return zero_gradients(call, saved, upstream, needs)
        *computed, sums = launcher.run(
            (*tensor_values(call), saved.z, dy),
            (needs, tuned.generation, *options_of(call)),
            lambda recording: self._backward(call, saved.z, dy, needs, recording),
            call.scale,
        )
        added = added_gradients(upstream.y, needs)
        return Gradients(*computed)._replace(scaling=scaling_gradient(call, sums), **added)

    def _backward(
        self, call: AdapterCall, z: Tensor | None, dy: Tensor, needs: Needs, recording
    ) -> tuple[Tensor | None, ...]:
        """The gradients but for the scaling's, of which the last result holds the sums."""
        dy, sums = rows(dy), None
        num_tokens = dy.shape[0]
        out = empty_gradients(call, needs._replace(residual=False, skip=False, scaling=False))
        for gradient in out:
            recording.own(gradient)
        dz = a = None
        if needs.down_weight or needs.down_bias:
            dz = recording.own(empty_units(call, num_tokens))
        if needs.up_weight or needs.scaling:
            a = recording.own(empty_units(call, num_tokens))
        device = _device(dy.device)
        launches = CallLaunches(call, recording, device)
        if needs.z:
            assert z is not None
            z = unit_rows(call, z)  # hooks on saved tensors may have packed it
            plan = token_plan(dx_problem(call, dy, device), device)
            if isinstance(plan, RowBlock):
                launches.dx_row_block(z, dy, out.x, dz, a, plan.kernel)
            else:
                launches.dx_split(z, dy, out.x, dz, a, plan)
        if needs.parameters:
            weights = weight_gradient_plan(weights_problem(call, call.x, dy, device), device)
            sums = launches.weight_gradients(dy, dz, a, out, needs, weights)
        return *out, sums


def forward_problem(call: AdapterCall, x: Tensor, device: Device) -> Problem:
    """The problem that the launch of y is planned for; x [T, H]."""
    return _problem(call, device, x, call.down_weight, call.up_weight)


def dx_problem(call: AdapterCall, dy: Tensor, device: Device) -> Problem:
    """The problem that the launch of dz and dx is planned for; dy [T, H]."""
    return _problem(call, device, dy, call.down_weight, call.up_weight)


def weights_problem(call: AdapterCall, x: Tensor, dy: Tensor, device: Device) -> Problem:
    """The problem that the weight gradients' launch is planned for; dy [T, H], x or its outline."""
    return _problem(call, device, dy, x)


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
