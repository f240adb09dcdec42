"""Capabilities, allocation and launch of the Triton kernels."""

import functools

import torch
from torch import Tensor

from adapterkern import _env
from adapterkern.backends.base import (
    FIRST_FEATURES,
    GROUPED_FEATURES,
    NORM_FEATURES,
    Backend,
    allow_tf32,
    empty_gradients,
    empty_grouped_gradients,
    empty_grouped_outputs,
    empty_outputs,
    empty_units,
    rows,
    scaling_gradient,
    unit_rows,
    zero_gradients,
)
from adapterkern.backends.repeat import options_of
from adapterkern.backends.triton import norm_plan, tuned
from adapterkern.backends.triton.launch_config import (
    Device,
    LaunchConfig,
    Problem,
    RowBlock,
    Split,
)
from adapterkern.backends.triton.tuned import device_of, token_plan, weight_gradient_plan
from adapterkern.grouped.call import (
    OPERATION,
    GroupedCall,
    GroupedGradients,
    GroupedNeeds,
    option_values,
)
from adapterkern.grouped.call import tensor_values as grouped_tensor_values
from adapterkern.results import Gradients, Needs, Outputs, Saved, added_gradients, given_of
from adapterkern.spec import AdapterCall, AdapterSpec, tensor_values

try:
    from triton import knobs

    from adapterkern.backends.triton import grouped_gradient_launches, grouped_launches, launcher
    from adapterkern.backends.triton.activations import VALUES
    from adapterkern.backends.triton.norm_launches import NormLaunches, stream_of

    if knobs.runtime.interpret:  # as the kernels that were just defined have found it
        from adapterkern.backends.triton.interpreter import make_bfloat16_exact

        make_bfloat16_exact()
    _IMPORT_ERROR = None
except ImportError as error:
    _IMPORT_ERROR = f"triton cannot be imported ({error})"
    VALUES = {}

MOST_SLOTS = 65535  # of a grid's last dimension
# Each program of the routing counts the tokens of all slots, in one bin for each: 1024. Triton 3.6
# compiles 2048 in 20 seconds, and 16384 not within ten minutes.
MOST_ROUTED_SLOTS = 1024 - 2

# The device that CPU tensors are planned for. Triton's interpreter gets few SMs, so that small
# tests reach both forms; `compile_only` sets the GPU that it compiles for.
cpu_device = Device(num_sms=4, shared_memory=227 * 1024)


class TritonBackend(Backend):
    """Triton kernels on NVIDIA GPUs; on CPU tensors only in Triton's interpreter."""

    name = "triton"
    operations = Backend.operations | {OPERATION}
    devices = frozenset({"cuda", "cpu"} if _env.TRITON_INTERPRET else {"cuda"})
    dtypes = frozenset({torch.float32, torch.float16, torch.bfloat16})
    activations = frozenset(VALUES)
    features = FIRST_FEATURES | NORM_FEATURES | GROUPED_FEATURES
    most_routed_slots = MOST_ROUTED_SLOTS

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
        if spec.slots is not None and spec.slots > MOST_SLOTS:
            return [f"{spec.slots} slots exceed the {MOST_SLOTS} of a launch"]
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
        y, normed, z, mean, rstd = launcher.run(
            tensor_values(call),
            (save, tuned.generation, *options_of(call)),
            lambda recording: self._forward(call, save, recording),
            call.scale,
        )
        return Outputs(y, normed), Saved(z, mean, rstd)

    def _forward(self, call: AdapterCall, save: bool, recording) -> tuple[Tensor | None, ...]:
        outputs, saved = empty_outputs(call, save)
        results = *outputs, saved.z, saved.mean, saved.rstd
        for result in results:
            recording.own(result)
        x = rows(call.x)
        device = _device(x.device)
        problem = forward_problem(call, x, device)
        plan = token_plan(problem, device)
        launches = NormLaunches(call, recording, device)
        fused = forward_norm_plan(call, plan, problem, device)
        if fused is not None:
            launches.forward_norm_row_block(x, outputs, saved, *fused)
            return results
        y = stream_of(outputs)
        if isinstance(plan, RowBlock):
            launches.forward_row_block(x, y, saved.z, plan.kernel)
        else:
            launches.forward_split(x, y, saved.z, plan)
        if call.norm != "none":
            launches.norm_rows(outputs, saved)
        return results

    def backward(
        self, call: AdapterCall, saved: Saved, upstream: Outputs, needs: Needs
    ) -> Gradients:
        if given_of(upstream).numel() == 0:
            return zero_gradients(call, saved, upstream, needs)
        *computed, sums, ds = launcher.run(
            (*tensor_values(call), *saved, *upstream),
            (needs, tuned.generation, *options_of(call)),
            lambda recording: self._backward(call, saved, upstream, needs, recording),
            call.scale,
        )
        added = added_gradients(upstream.y if call.norm == "none" else ds, needs)
        return Gradients(*computed)._replace(scaling=scaling_gradient(call, sums), **added)

    def _backward(
        self, call: AdapterCall, saved: Saved, upstream: Outputs, needs: Needs, recording
    ) -> tuple[Tensor | None, ...]:
        """The gradients but for those of the scaling, for which the last but one result holds the
        sums, and of what is added to the sum of a norm: that is the last."""
        given, sums, ds = given_of(upstream), None, None
        out = empty_gradients(call, needs._replace(residual=False, skip=False, scaling=False))
        for gradient in out:
            recording.own(gradient)
        num_tokens = given.numel() // call.hidden_size
        dz = a = None
        if needs.down_weight or needs.down_bias:
            dz = recording.own(empty_units(call, num_tokens))
        if needs.up_weight or needs.scaling:
            a = recording.own(empty_units(call, num_tokens))
        if needs.z:
            assert saved.z is not None
            # Hooks on saved tensors may have packed it.
            saved = saved._replace(z=unit_rows(call, saved.z))
        device = _device(given.device)
        launches = NormLaunches(call, recording, device)
        if call.norm == "none":
            dy = rows(given)
        elif needs.sum:
            assert saved.stream is not None
            ds = recording.own(given.new_empty(given.shape, dtype=saved.stream.dtype))
            dy = rows(ds)
        problem = plan = fused = None
        if needs.z:
            problem = dx_problem(call, dy, device)
            plan = token_plan(problem, device)
            fused = dx_norm_plan(call, plan, problem, saved, upstream, needs, device)
        if fused is not None:
            launches.dx_norm_row_block(saved, upstream, out, dy, dz, a, *fused)
        else:
            if call.norm != "none":
                launches.norm_gradients(saved, upstream, out, None if ds is None else dy)
            if plan is not None:
                assert saved.z is not None
                if isinstance(plan, RowBlock):
                    launches.dx_row_block(saved.z, dy, out.x, dz, a, plan.kernel)
                else:
                    launches.dx_split(saved.z, dy, out.x, dz, a, plan)
        if needs.parameters:
            weights = weight_gradient_plan(weights_problem(call, call.x, dy, device), device)
            sums = launches.weight_gradients(dy, dz, a, out, needs, weights)
        return *out, sums, ds if needs.added else None

    def grouped_forward(self, call: GroupedCall, save: bool) -> tuple[Tensor, Tensor | None]:
        y, z = launcher.run(
            grouped_tensor_values(call),
            ("grouped", save, allow_tf32(), option_values(call)),
            lambda recording: self._grouped_forward(call, save, recording),
        )
        return y, z

    def _grouped_forward(
        self, call: GroupedCall, save: bool, recording
    ) -> tuple[Tensor | None, ...]:
        x, device = rows(call.x), _device(call.x.device)
        y, z = map(recording.own, empty_grouped_outputs(call, save))
        if call.x.numel() == 0:
            return y, z
        plan = grouped_launches.forward_plan(grouped_launches.grouped_problem(call, device), device)
        launches = grouped_launches.GroupedForward(call, recording, device)
        if isinstance(plan, RowBlock):
            launches.tiled(x, y, z, plan.kernel)
        else:
            launches.by_row(x, y, z, plan)
        return y, z

    def route(self, ids: Tensor, buffers: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
        ids = ids.contiguous()

        def launch(recording) -> tuple[()]:
            grouped_launches.route(ids, buffers, recording)
            return ()

        launcher.run((ids, *buffers), ("route",), launch)

    def grouped_backward(
        self, call: GroupedCall, z: Tensor | None, dy: Tensor, needs: GroupedNeeds
    ) -> GroupedGradients:
        if dy.numel() == 0:
            empty = empty_grouped_gradients(call, needs)
            return GroupedGradients(*[None if t is None else t.zero_() for t in empty])

        def launch(recording) -> tuple[Tensor | None, ...]:
            device = _device(dy.device)
            flat = rows(dy)
            launches = grouped_gradient_launches.GradientLaunches(call, flat, recording, device)
            tokens = _problem(call, device, flat, call.down_weights, call.up_weights)
            out, sums = launches.gradients(z, needs, tokens, _problem(call, device, flat, call.x))
            return *out, sums

        *computed, sums = launcher.run(
            (*grouped_tensor_values(call), z, dy),
            ("grouped", needs, tuned.generation, allow_tf32(), option_values(call)),
            launch,
        )
        scalings = None if sums is None else sums.sum(1)
        return GroupedGradients(*computed)._replace(scalings=scalings)


def forward_norm_plan(
    call: AdapterCall, plan: RowBlock | Split, problem: Problem, device: Device
) -> tuple[LaunchConfig, int] | None:
    """The row block that computes the sum and normalises it, if one does."""
    if call.norm == "none" or not isinstance(plan, RowBlock):
        return None
    added = (call.x if call.add_input else call.residual, call.skip)
    passing = sum(tensor.element_size() for tensor in added if tensor is not None)
    return norm_plan.row_block(plan.kernel, problem, device, passing + call.output_dtype.itemsize)


def dx_norm_plan(
    call: AdapterCall, plan: RowBlock | Split, problem: Problem, saved: Saved, upstream: Outputs,
    needs: Needs, device: Device,
) -> tuple[LaunchConfig, int] | None:  # fmt: skip
    """The row block that computes ds and goes on to dz and dx, if one does."""
    if saved.stream is None or not needs.dz or not isinstance(plan, RowBlock):
        return None
    passing = sum(tensor.element_size() for tensor in upstream if tensor is not None)
    sizes = passing + 2 * saved.stream.element_size()  # and ds
    return norm_plan.row_block(plan.kernel, problem, device, sizes)


def forward_problem(call: AdapterCall, x: Tensor, device: Device) -> Problem:
    """The problem that the launch of y is planned for; x [T, H]."""
    return _problem(call, device, x, call.down_weight, call.up_weight)


def dx_problem(call: AdapterCall, dy: Tensor, device: Device) -> Problem:
    """The problem that the launch of dz and dx is planned for; dy [T, H]."""
    return _problem(call, device, dy, call.down_weight, call.up_weight)


def weights_problem(call: AdapterCall, x: Tensor, dy: Tensor, device: Device) -> Problem:
    """The problem that the weight gradients' launch is planned for; dy [T, H], x or its outline."""
    return _problem(call, device, dy, x)


def _problem(call: AdapterCall | GroupedCall, device: Device, *staged: Tensor) -> Problem:
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
