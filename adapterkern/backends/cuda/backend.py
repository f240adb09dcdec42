"""Capabilities, allocation and launch of the CUDA kernels."""

import ctypes
import functools
import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adapterkern import _env, _torch
from adapterkern.backends.base import (
    FIRST_FEATURES,
    NORM_FEATURES,
    Backend,
    BackendUnsupportedError,
    allow_tf32,
    empty_gradients,
    empty_grouped_outputs,
    empty_outputs,
    empty_units,
    optional_rows,
    packed,
    rows,
    scaling_gradient,
    zero_gradients,
)
from adapterkern.backends.cuda import extension, grouped, launch_config, norm, rooms
from adapterkern.backends.cuda.facts import Device
from adapterkern.backends.cuda.launch_config import (
    CLUSTER_SIZES,
    MAX_BOTTLENECK_SIZE,
    NO_SLICES,
    TokenPlan,
    row_block_plan,
    token_plan,
    token_slices,
    token_stages,
)
from adapterkern.backends.cuda.params import (
    ACTIVATIONS,
    BACKWARD,
    DTYPES,
    FORWARD,
    NORMS,
    TFLOAT32,
    BackwardParams,
    ForwardParams,
    flat,
    float_bits,
    view,
)
from adapterkern.backends.cuda.problems import problem_of
from adapterkern.backends.repeat import STREAM, Recording, Repeats, options_of
from adapterkern.grouped.call import OPERATION, GroupedCall, option_values
from adapterkern.grouped.call import tensor_values as grouped_tensor_values
from adapterkern.results import Gradients, Needs, Outputs, Saved, added_gradients, given_of
from adapterkern.spec import AdapterCall, AdapterSpec, tensor_values

# Bytes of shared memory of a block on compute capability 8.0: more means large tiles, for which
# code for 8.0 has no kernels.
OLDER_MEMORY = 163 * 1024


# The tensors of rows that a kernel copies to shared memory, beside its output.
FORWARD_MOVED = "x", "residual", "skip", "down_weight", "up_weight"
BACKWARD_MOVED = "dy", "z", "down_weight", "up_weight"


class Launches(Recording):
    """The launch of one call."""

    def launch(
        self, function: Callable, layout: struct.Struct, params: tuple, device: torch.device
    ) -> None:
        """Call the extension's `function` with the bytes of a struct."""
        send = functools.partial(_send, function, layout, device.index or 0)
        send(_stream(device), *flat(params))
        if not self._keeps:
            return
        slots = [(self.slot(v[0]), *v[1:]) if isinstance(v, tuple) else v for v in params]
        self.step(send, (STREAM, *flat(slots)))


def _send(
    function: Callable, layout: struct.Struct, device: int, stream: int, *fields: float
) -> None:
    *numbers, last = fields
    if isinstance(last, float):  # the scale, which beyond float32 is infinite, as in eager
        last = ctypes.c_float(last).value
    function(layout.pack(*numbers, last), device, stream)


class CudaBackend(Backend):
    """Launches the kernels of `adapterkern._cuda`."""

    name = "cuda"
    devices = frozenset({"cuda"})
    dtypes = frozenset(DTYPES)
    activations = frozenset(ACTIVATIONS)
    features = FIRST_FEATURES | NORM_FEATURES | grouped.FEATURES
    operations = frozenset({"bottleneck_adapter", OPERATION})

    def __init__(self, kernels: Any = None, device: Device | None = None) -> None:
        """Run the extension, or CPU tensors on `kernels` in its place, planned for `device`."""
        self._kernels, self._planned_device = kernels, device
        self._repeats = Repeats(Launches)
        self._unavailable = None
        if kernels is not None:
            self.devices = frozenset({"cpu"})  # type: ignore[misc]
        else:  # asked once, here: the answer stays, and torch.compile must not trace an import
            self._unavailable = extension.unavailable_reason()
            self._kernels = extension.load().module

    def unavailable_reason(self) -> str | None:
        return self._unavailable

    def unsupported_reasons(self, spec: AdapterSpec) -> list[str]:
        if self._unavailable is not None:  # the declarations of absent kernels would only repeat it
            return [self._unavailable]
        return super().unsupported_reasons(spec) + grouped.declined(spec)

    def limits(self, spec: AdapterSpec) -> list[str]:
        reasons = []
        if spec.bottleneck_size > MAX_BOTTLENECK_SIZE:
            reasons.append(
                f"bottleneck_size {spec.bottleneck_size} exceeds {MAX_BOTTLENECK_SIZE}, "
                "the widest that stays on chip"
            )
        on_gpu = spec.device.type == "cuda" and torch.cuda.is_available()
        if on_gpu:
            major, minor = torch.cuda.get_device_capability(spec.device)
            if major < 8:
                reasons.append(
                    f"compute capability {major}.{minor} is below 8.0 (no bfloat16 tensor cores)"
                )
            elif problem := extension.code_problem(major, minor):
                reasons.append(problem)
        if not reasons and spec.features & NORM_FEATURES:
            known = on_gpu or self._planned_device is not None
            reasons = norm.declined(spec, self._device(spec.device) if known else None)
        return reasons

    def forward(self, call: AdapterCall, save: bool) -> tuple[Outputs, Saved]:
        self._check_loaded()
        if call.x.numel() == 0:
            return empty_outputs(call, save)
        y, normed, z, mean, rstd = self._run(
            tensor_values(call),
            (save, *options_of(call)),
            lambda recording: self._forward(call, save, recording),
            call.scale,
        )
        return Outputs(y, normed), Saved(z, mean, rstd)

    def _forward(
        self, call: AdapterCall, save: bool, recording: Launches
    ) -> tuple[Tensor | None, ...]:
        outputs, saved = empty_outputs(call, save)
        results = {"y": outputs.y, "normed": outputs.normed, "z": saved.z}
        results |= {"mean": saved.mean, "rstd": saved.rstd}
        num_tokens = call.num_tokens
        added_rows, choose = optional_rows, token_plan
        if call.norm != "none":
            added_rows, choose = norm.whole_rows, norm.norm_plan
        # Copies made here stay bound to a name until the launch: addresses keep nothing alive.
        inputs = {
            "x": rows(call.x),
            "down_weight": rows(call.down_weight),
            "up_weight": rows(call.up_weight),
            "down_bias": packed(call.down_bias),
            "up_bias": packed(call.up_bias),
            "residual": added_rows(call.residual),
            "skip": added_rows(call.skip),
            "scaling": packed(call.scaling),
            "norm_weight": packed(call.norm_weight),
            "norm_bias": packed(call.norm_bias),
        }
        moved = {name: inputs[name] for name in FORWARD_MOVED} | {"y": outputs.y}
        added = "x" if call.add_input else "residual", "skip"
        plan = choose(problem_of(call, num_tokens, moved, *added), self._device(call.x.device))
        room = results | {"partial": rooms.partial(plan, call, num_tokens)}
        for tensor in room.values():
            recording.own(tensor)
        params = ForwardParams(
            **_views(inputs | room),
            **_form(plan),
            **_options(call, num_tokens),
            eps=float_bits(call.eps),
        )
        recording.launch(self._kernels.forward, FORWARD, params, call.x.device)
        return tuple(results.values())

    def backward(
        self, call: AdapterCall, saved: Saved, upstream: Outputs, needs: Needs
    ) -> Gradients:
        self._check_loaded()
        if given_of(upstream).numel() == 0:
            return zero_gradients(call, saved, upstream, needs)
        *computed, d_sum, d_scaling = self._run(
            (*tensor_values(call), *saved, *upstream),
            (needs, *options_of(call)),
            lambda recording: self._backward(call, saved, upstream, needs, recording),
            call.scale,
        )
        added = added_gradients(upstream.y if call.norm == "none" else d_sum, needs)
        return Gradients(*computed)._replace(scaling=scaling_gradient(call, d_scaling), **added)

    def _backward(
        self,
        call: AdapterCall,
        saved: Saved,
        upstream: Outputs,
        needs: Needs,
        recording: Launches,
    ) -> tuple[Tensor | None, ...]:
        """The gradients but for the scaling's, of which the last result holds the sums; before it
        that of the sum, where a norm follows it."""
        assert saved.z is not None or not needs.z
        device, num_tokens = self._device(call.x.device), call.num_tokens
        dy, d_sum = upstream.y, None
        if call.norm != "none":  # then dy is not given, but made of what is
            shape, dtype = given_of(upstream).shape, call.output_dtype
            dy = d_sum = call.x.new_empty(shape, dtype=dtype) if needs.sum else None
        inputs = {
            "x": optional_rows(call.x),
            "dy": optional_rows(dy),
            "z": saved.z,
            "down_weight": optional_rows(call.down_weight),
            "up_weight": optional_rows(call.up_weight),
            "up_bias": packed(call.up_bias),
            "scaling": packed(call.scaling),
        }
        inputs |= norm.backward_inputs(call, saved, upstream)
        row_blocks = norm.row_blocks(num_tokens, call.hidden_size, device)
        kept = needs._replace(residual=False, skip=False, scaling=False)
        out, d_scaling = empty_gradients(call, kept), None
        if needs.scaling:
            d_scaling = call.x.new_empty(call.hidden_size, dtype=torch.float32)
        written = {
            "dx": out.x,
            "d_down_weight": out.down_weight,
            "d_up_weight": out.up_weight,
            "d_down_bias": out.down_bias,
            "d_up_bias": out.up_bias,
            "d_scaling": d_scaling,
            "d_norm_weight": out.norm_weight,
            "d_norm_bias": out.norm_bias,
        }
        moved = {name: inputs[name] for name in BACKWARD_MOVED} | {"dx": out.x}
        problem = problem_of(call, num_tokens, moved, *["dy"] * call.add_input)
        tokens = token_slices(problem, device) if needs.parameters else NO_SLICES
        # The weight gradients read dz and a = act(z), which the kernels of dx store on their way.
        # For a alone the row-block form is right at any size: it then reads nothing but z.
        room = {
            "sum_norm_weight": rooms.column_sums(call, row_blocks) if needs.norm_weight else None,
            "sum_norm_bias": rooms.column_sums(call, row_blocks) if needs.norm_bias else None,
            "dz": empty_units(call, num_tokens) if needs.down_weight or needs.down_bias else None,
            "a": empty_units(call, num_tokens) if needs.up_weight or needs.scaling else None,
            "partial": None,
        }
        plan = (token_plan if needs.dz else row_block_plan)(problem, device)
        room["partial"] = rooms.partial(plan, call, num_tokens)
        sums, sum_views = rooms.sums(call, needs, tokens.number)
        for tensor in (*out, d_sum, d_scaling, *room.values(), sums):
            recording.own(tensor)
        params = BackwardParams(
            **_views(inputs | written | room),
            **sum_views,
            **_form(plan),
            token_splits=tokens.number,
            tokens_per_split=tokens.length,
            token_stages=token_stages(problem, device),
            norm_blocks=row_blocks,
            **_options(call, num_tokens),
        )
        recording.launch(self._kernels.backward, BACKWARD, params, call.x.device)
        return *out, d_sum if needs.added else None, d_scaling

    def grouped_forward(self, call: GroupedCall, save: bool) -> tuple[Tensor, Tensor | None]:
        self._check_loaded()
        if call.x.numel() == 0:
            return empty_grouped_outputs(call, save)
        tf32 = call.compute_dtype == torch.float32 and allow_tf32()
        device = self._device(call.x.device)
        y, z = self._run(
            grouped_tensor_values(call),
            (OPERATION, save, tf32, option_values(call)),
            lambda recording: grouped.forward(self._kernels, recording, call, save, tf32, device),
            1.0,
        )
        return y, z

    def _device(self, device: torch.device) -> Device:
        return self._planned_device or _gpu(device)

    def _run(
        self, inputs: tuple, options: tuple, code: Callable[[Launches], Any], scale: float
    ) -> Any:
        """Run a call's launch on the device of x and its current stream."""
        device = inputs[0].device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            # torch, unlike the runtime, makes no context on the caller's device to return to it.
            with torch.cuda.device(device):
                return self._run(inputs, options, code, scale)
        return self._repeats.run(inputs, options, _stream(device), code, scale)

    def _check_loaded(self) -> None:
        if self._unavailable is not None or self._kernels is None:
            raise BackendUnsupportedError(f'backend "{self.name}": {self._unavailable}')


def _views(tensors: dict[str, Tensor | None]) -> dict[str, Any]:
    return {name: view(tensor) for name, tensor in tensors.items()}


def _options(call: AdapterCall, num_tokens: int) -> dict[str, Any]:
    """The fields that both structs share."""
    tf32 = call.compute_dtype == torch.float32 and allow_tf32()
    return {
        "num_tokens": num_tokens,
        "hidden_size": call.hidden_size,
        "bottleneck_size": call.bottleneck_size,
        "activation": ACTIVATIONS[call.activation],
        "compute_dtype": TFLOAT32 if tf32 else DTYPES[call.compute_dtype],
        "add_input": call.add_input,
        "channel_scaling": call.scaling is not None and call.scaling.numel() > 1,
        "norm": NORMS[call.norm],
        "cast_before_weight": call.cast_before_weight,
        "weight_offset": float_bits(call.weight_offset),
        "scale": call.scale,
    }


def _form(plan: TokenPlan) -> dict[str, Any]:
    return {
        "num_splits": plan.slices.number,
        "features_per_split": plan.slices.length,
        "output_splits": plan.output_slices.number,
        "features_per_output_split": plan.output_slices.length,
        "num_clusters": plan.num_clusters,
        "cluster_tokens": plan.cluster_tokens,
        "large_tiles": plan.large_tiles,
        "shared_bytes": plan.shared_bytes,
        "resident_clusters": plan.resident_clusters,
    }


@functools.cache
def _gpu(device: torch.device) -> Device:
    """The device as it is for code of the extension, which knows 9.0 and later or does not."""
    properties = torch.cuda.get_device_properties(device)
    num_sms, module = properties.multi_processor_count, extension.load().module
    if module is None:
        return Device(num_sms)
    memory = module.shared_memory(device.index)
    if not extension.runs_clusters(properties.major, properties.minor):
        return Device(num_sms, memory=min(memory, OLDER_MEMORY))
    # A part of a GPU (MIG, MPS) may have no room for a cluster, or none for the larger sizes.
    threads = launch_config.facts().clusters[0].threads
    sizes = tuple(s for s in CLUSTER_SIZES if module.clusters(device.index, s, threads, memory) > 0)
    asked = _env.CUDA_RESIDENT == "1"
    warpgroups = asked and extension.runs_warpgroups(properties.major, properties.minor)
    return Device(num_sms, memory, memory, sizes, warpgroups)


def _stream(device: torch.device) -> int:
    """The stream on which the launches of this moment are queued."""
    return 0 if device.type == "cpu" else _torch.current_stream(device.index)
