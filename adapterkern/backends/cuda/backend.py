"""Capabilities, allocation and launch of the CUDA kernels."""

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from adapterkern.backends.base import (
    Backend,
    BackendUnsupportedError,
    Gradients,
    Needs,
    allow_tf32,
    packed,
    rows,
)
from adapterkern.backends.cuda import extension
from adapterkern.backends.cuda.launch_config import (
    MAX_BOTTLENECK_SIZE,
    Device,
    Problem,
    Slices,
    TokenPlan,
    token_plan,
    token_slices,
)
from adapterkern.backends.cuda.params import (
    ACTIVATIONS,
    DTYPES,
    NOTHING,
    TFLOAT32,
    BackwardParams,
    ForwardParams,
    view,
)
from adapterkern.spec import AdapterCall, AdapterSpec


class CudaBackend(Backend):
    """Launches the kernels of `adapterkern._cuda`."""

    name = "cuda"
    devices = frozenset({"cuda"})
    dtypes = frozenset(DTYPES)
    activations = frozenset(ACTIVATIONS)
    features = frozenset(
        {
            "bias",
            "input_residual",
            "external_residual",
            "skip",
            "scaling",
            "learned_scaling",
            "mixed_dtypes",
        }
    )

    def __init__(self) -> None:
        # Asked once, here: the answer stays, and torch.compile must not trace an import.
        self._unavailable = extension.unavailable_reason()
        self._kernels = extension.load().module

    def unavailable_reason(self) -> str | None:
        return self._unavailable

    def unsupported_reasons(self, spec: AdapterSpec) -> list[str]:
        if self._unavailable is not None:  # the declarations of absent kernels would only repeat it
            return [self._unavailable]
        return super().unsupported_reasons(spec)

    def limits(self, spec: AdapterSpec) -> list[str]:
        reasons = []
        if spec.bottleneck_size > MAX_BOTTLENECK_SIZE:
            reasons.append(
                f"bottleneck_size {spec.bottleneck_size} exceeds {MAX_BOTTLENECK_SIZE}, "
                "the widest that stays on chip"
            )
        if spec.device.type == "cuda" and torch.cuda.is_available():
            major, minor = torch.cuda.get_device_capability(spec.device)
            if major < 8:
                reasons.append(
                    f"compute capability {major}.{minor} is below 8.0 (no bfloat16 tensor cores)"
                )
        return reasons

    def forward(self, call: AdapterCall, save_z: bool) -> tuple[Tensor, Tensor]:
        kernels = self._loaded_kernels()
        # What is made here stays bound to a name until the launch: addresses keep nothing alive.
        inputs = {
            "x": rows(call.x),
            "down_weight": rows(call.down_weight),
            "up_weight": rows(call.up_weight),
            "down_bias": packed(call.down_bias),
            "up_bias": packed(call.up_bias),
            "residual": None if call.residual is None else rows(call.residual),
            "skip": None if call.skip is None else rows(call.skip),
            "scaling": packed(call.scaling),
        }
        device, num_tokens = call.x.device, call.x.numel() // call.hidden_size
        y = torch.empty(call.x.shape, dtype=call.output_dtype, device=device)
        z = torch.empty(
            (num_tokens, call.bottleneck_size) if save_z else 0,
            dtype=call.compute_dtype,
            device=device,
        )
        if num_tokens == 0:
            return y, z
        plan = token_plan(_problem(call, num_tokens), _device(device))
        room = {"y": y, "z": z if save_z else None, "partial": _partial(plan, call, num_tokens)}
        params = ForwardParams(**_views(inputs | room), **_form(plan), **_options(call, num_tokens))
        kernels.forward(params.pack(), *_queue(device))
        return y, z

    def backward(
        self, call: AdapterCall, z: Tensor, grad_output: Tensor, needs: Needs
    ) -> Gradients:
        kernels = self._loaded_kernels()
        inputs = {
            "x": rows(call.x),
            "dy": rows(grad_output),
            "z": z,
            "down_weight": rows(call.down_weight),
            "up_weight": rows(call.up_weight),
            "up_bias": packed(call.up_bias),
            "scaling": packed(call.scaling),
        }
        device, num_tokens = call.x.device, call.x.numel() // call.hidden_size
        out = _gradients(call, needs)
        if num_tokens == 0:
            for tensor in filter(torch.is_tensor, out.values()):
                tensor.zero_()
            return _returned(call, out)
        problem = _problem(call, num_tokens)
        plan, tokens = TokenPlan(Slices(0, 0)), Slices(0, 0)
        room: dict[str, Tensor | None] = {"dz": None, "partial": None}
        if needs.down_weight or needs.down_bias:
            room["dz"] = torch.empty_like(z)
        if needs.x or room["dz"] is not None:
            plan = token_plan(problem, _device(device))
            room["partial"] = _partial(plan, call, num_tokens)
        if any(needs[1:]):
            tokens = token_slices(problem, _device(device))
        sums, sum_views = _sums(call, needs, tokens.number)
        params = BackwardParams(
            **_views(inputs | out | room),
            **sum_views,
            **_form(plan),
            token_splits=tokens.number,
            tokens_per_split=tokens.length,
            **_options(call, num_tokens),
        )
        kernels.backward(params.pack(), *_queue(device))
        del sums  # kept until here
        return _returned(call, out)

    def _loaded_kernels(self) -> ModuleType:
        if self._unavailable is not None or self._kernels is None:
            raise BackendUnsupportedError(f'backend "{self.name}": {self._unavailable}')
        return self._kernels


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
        "scale": call.scale,
    }


def _form(plan: TokenPlan) -> dict[str, Any]:
    return {
        "num_splits": plan.slices.number,
        "features_per_split": plan.slices.length,
        "num_clusters": plan.num_clusters,
        "cluster_tokens": plan.cluster_tokens,
    }


def _partial(plan: TokenPlan, call: AdapterCall, num_tokens: int) -> Tensor | None:
    """Work space [S, T, R] of the split form."""
    if plan.slices.number == 0 or plan.num_clusters > 0:
        return None
    shape = plan.slices.number, num_tokens, call.bottleneck_size
    return torch.empty(shape, dtype=torch.float32, device=call.x.device)


def _gradients(call: AdapterCall, needs: Needs) -> dict[str, Tensor | None]:
    """Room for the gradients asked for, contiguous whatever the strides of the inputs are; that of
    the scaling still [H] in float32."""
    inputs = (call.x, call.down_weight, call.up_weight, call.down_bias, call.up_bias)
    names = ("dx", "d_down_weight", "d_up_weight", "d_down_bias", "d_up_bias")
    out = {
        name: torch.empty_like(t, memory_format=torch.contiguous_format)
        if need and t is not None
        else None
        for name, t, need in zip(names, inputs, needs[:5], strict=True)
    }
    out["d_scaling"] = None
    if needs.scaling and call.scaling is not None:
        out["d_scaling"] = torch.empty(call.hidden_size, dtype=torch.float32, device=call.x.device)
    return out


def _returned(call: AdapterCall, out: dict[str, Tensor | None]) -> Gradients:
    d_scaling = out["d_scaling"]
    if d_scaling is not None and call.scaling is not None:
        if call.scaling.numel() == 1:
            d_scaling = d_scaling.sum(0, keepdim=True)
        d_scaling = d_scaling.to(call.scaling.dtype)
    weights = out["d_down_weight"], out["d_up_weight"], out["d_down_bias"], out["d_up_bias"]
    return Gradients(out["dx"], *weights, d_scaling)


def _sums(call: AdapterCall, needs: Needs, count: int) -> tuple[Tensor, dict[str, Any]]:
    """Work space in one piece: for dW_down and G^T [S, R, H], and the column sums of dz [S, R] and
    dy [S, H].

    d(scaling) needs G and the sums of dy even where dW_up and db_up are not asked for.
    """
    bottleneck, hidden = call.bottleneck_size, call.hidden_size
    up_bias = needs.up_bias or (needs.scaling and call.up_bias is not None)
    wanted = (
        ("sum_down", needs.down_weight, bottleneck, hidden),
        ("sum_up", needs.up_weight or needs.scaling, bottleneck, hidden),
        ("sum_down_bias", needs.down_bias, 1, bottleneck),
        ("sum_up_bias", up_bias, 1, hidden),
    )
    offsets, size = {}, 0
    for name, want, height, width in wanted:
        if want:
            offsets[name] = size
            size += -(-count * height * width // 4) * 4  # so that each begins at 16 bytes
    room = torch.empty(size, dtype=torch.float32, device=call.x.device)
    address, code = room.data_ptr(), DTYPES[torch.float32]
    views = {
        name: (address + 4 * offsets[name], code, width) if name in offsets else NOTHING
        for name, _, _, width in wanted
    }
    return room, views


def _problem(call: AdapterCall, num_tokens: int) -> Problem:
    half = call.compute_dtype != torch.float32
    return Problem(num_tokens, call.hidden_size, call.bottleneck_size, half)


@functools.cache
def _device(device: torch.device) -> Device:
    properties = torch.cuda.get_device_properties(device)
    module, memory = extension.load().module, 0
    if module is not None and extension.runs_clusters(properties.major, properties.minor):
        memory = module.shared_memory(device.index)
    return Device(properties.multi_processor_count, memory)


def _queue(device: torch.device) -> tuple[int, int]:
    """Where a launch goes: the index of the device, and its current stream."""
    return device.index, torch.cuda.current_stream(device).cuda_stream
