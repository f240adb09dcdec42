"""What one adapter call is: `AdapterCall` (the tensors and options) and `AdapterSpec` (all of it that is static).

Validation happens here once, before any pointer is taken, and reports every problem of a call together.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class AdapterCall(NamedTuple):
    """y = residual + skip + scaling * (act(x W_down^T + b_down) W_up^T + b_up), as tensors and options.

    The residual is `x` itself (add_input), another tensor (residual), or nothing. The scaling is the tensor
    `scaling` where given, else the float `scale`.
    """

    x: Tensor  # [..., H]
    down_weight: Tensor  # [R, H]
    up_weight: Tensor  # [H, R]
    down_bias: Tensor | None  # [R]
    up_bias: Tensor | None  # [H]
    residual: Tensor | None  # [..., H]
    skip: Tensor | None  # [..., H]
    scaling: Tensor | None  # [1] or [H]
    scale: float
    add_input: bool
    activation: str
    compute_dtype: torch.dtype  # of both products' operands: the autocast dtype, else x's
    dropout: float = 0.0  # on the scaled up-projection; reference only

    @property
    def hidden_size(self) -> int:
        return self.down_weight.shape[1]

    @property
    def bottleneck_size(self) -> int:
        return self.down_weight.shape[0]

    @property
    def output_dtype(self) -> torch.dtype:
        """The dtype that the eager composition promotes to."""
        dtype = self.compute_dtype
        added = (self.scaling, self.x if self.add_input else self.residual, self.skip)
        for tensor in added:
            if tensor is not None:
                dtype = torch.promote_types(dtype, tensor.dtype)
        return dtype

    def tensors(self) -> dict[str, Tensor | None]:
        return {name: getattr(self, name) for name in TENSOR_NAMES}

    def spec(self) -> "AdapterSpec":
        """The static part of this call, validated (see `validate`)."""
        validate(self)
        return AdapterSpec(
            device=self.x.device,
            hidden_size=self.hidden_size,
            bottleneck_size=self.bottleneck_size,
            activation=self.activation,
            compute_dtype=self.compute_dtype,
            dtypes=tuple((n, t.dtype) for n, t in self.tensors().items() if t is not None),
            features=self.features(),
        )

    def features(self) -> frozenset[str]:
        """What this call needs beyond `act(x W_down^T) W_up^T`; a backend declares which of these it has."""
        wanted = {
            "bias": self.down_bias is not None or self.up_bias is not None,
            "input_residual": self.add_input,
            "external_residual": self.residual is not None,
            "skip": self.skip is not None,
            "scaling": self.scaling is not None or self.scale != 1.0,
            "learned_scaling": self.scaling is not None,
            "mixed_dtypes": any(t is not None and t.dtype != self.compute_dtype for t in self[:8]),
            "dropout": self.dropout > 0,
        }
        return frozenset(name for name, present in wanted.items() if present)


TENSOR_NAMES = AdapterCall._fields[:8]


@dataclass(frozen=True)
class AdapterSpec:
    """The static, hashable part of a call: all that decides which backend runs it."""

    device: torch.device
    hidden_size: int
    bottleneck_size: int
    activation: str
    compute_dtype: torch.dtype
    dtypes: tuple[tuple[str, torch.dtype], ...]
    features: frozenset[str]

    def describe(self) -> str:
        features = ", ".join(sorted(self.features)) or "none"
        return (
            f"H={self.hidden_size} R={self.bottleneck_size} {self.activation} "
            f"{name_of(self.compute_dtype)} on {self.device}, features: {features}"
        )


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def validate(call: AdapterCall) -> None:
    """Check shapes, dtypes and devices of a call.

    Raises:
        TypeError: something that must be a tensor is not.
        ValueError: shapes, dtypes or devices disagree; the message lists every problem and the likely cure.
    """
    for name, tensor in call.tensors().items():
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}.")
    problems = _shape_problems(call) or _dtype_problems(call) + _device_problems(call)
    if not 0.0 <= call.dropout < 1.0:
        problems.append(f"dropout must be in [0, 1), got {call.dropout}.")
    if problems:
        raise ValueError("\n".join(problems))


def _shape_problems(call: AdapterCall) -> list[str]:
    x, down, up = call.x, call.down_weight, call.up_weight
    if x.dim() == 0:
        return ["x must have shape [..., H], got a 0-dimensional tensor."]
    if down.dim() != 2 or up.dim() != 2:
        return [
            f"down_weight must have shape [R, H] and up_weight [H, R], got {list(down.shape)} and {list(up.shape)}."
        ]
    hidden, bottleneck = x.shape[-1], down.shape[0]
    problems = []
    if bottleneck == 0 or hidden == 0:
        problems.append(
            f"hidden_size and bottleneck_size must be at least 1, got x {list(x.shape)} and "
            f"down_weight {list(down.shape)}.\n  hint: an adapter of size 0 is no adapter; leave it out."
        )
    if down.shape[1] != hidden:
        problem = f"down_weight must have shape [R, H] = [R, {hidden}] to match x {list(x.shape)}, got {list(down.shape)}."
        if down.shape[0] == hidden:
            problem += _transpose_hint("down_weight")
            bottleneck = down.shape[1]
        problems.append(problem)
    if tuple(up.shape) != (hidden, bottleneck):
        problem = (
            f"up_weight must have shape [H, R] = [{hidden}, {bottleneck}] to match x {list(x.shape)} and "
            f"down_weight {list(down.shape)}, got {list(up.shape)}."
        )
        if tuple(up.shape) == (bottleneck, hidden):
            problem += _transpose_hint("up_weight")
        problems.append(problem)
    for name, bias, size in (("down_bias", call.down_bias, bottleneck), ("up_bias", call.up_bias, hidden)):
        if bias is not None and tuple(bias.shape) != (size,):
            problems.append(f"{name} must have shape [{size}], got {list(bias.shape)}.")
    for name, tensor in (("residual", call.residual), ("skip", call.skip)):
        if tensor is not None and tensor.shape != x.shape:
            problems.append(f"{name} must have the shape of x, {list(x.shape)}, got {list(tensor.shape)}.")
    if call.scaling is not None and tuple(call.scaling.shape) not in ((1,), (hidden,)):
        problems.append(
            f"scaling must be a float or a tensor of shape [1] or [{hidden}], got {list(call.scaling.shape)}."
            + ("\n  hint: use scaling.reshape(1)." if call.scaling.numel() == 1 else "")
        )
    return problems


def _transpose_hint(name: str) -> str:
    return f"\n  hint: {name} uses nn.Linear layout (out_features, in_features); this looks like its transpose."


def _dtype_problems(call: AdapterCall) -> list[str]:
    problems = []
    for name, tensor in call.tensors().items():
        if tensor is not None and tensor.dtype not in FLOAT_DTYPES:
            allowed = ", ".join(map(name_of, FLOAT_DTYPES))
            problems.append(f"{name} must be a floating-point tensor ({allowed}), got {name_of(tensor.dtype)}.")
    if problems:
        return problems
    compute = call.compute_dtype
    autocast = compute != call.x.dtype
    for name in ("down_weight", "up_weight", "down_bias", "up_bias"):
        parameter = getattr(call, name)
        # Parameters equal the computation's dtype, or are float32 masters of a half-precision one.
        # Under autocast any of the three smaller types is converted, as eager does.
        fits = parameter is None or parameter.dtype == compute
        masters = parameter is not None and torch.float64 not in (parameter.dtype, compute)
        if not fits and not (masters and (autocast or parameter.dtype == torch.float32)):
            problems.append(
                f"{name} is {name_of(parameter.dtype)} but the computation runs in {name_of(compute)}.\n"
                f"  hint: convert one side, e.g. adapter.to(torch.{name_of(call.x.dtype)}), or use torch.autocast."
            )
    for name in ("residual", "skip", "scaling"):
        tensor = getattr(call, name)
        if tensor is not None and (tensor.dtype == torch.float64) != (compute == torch.float64):
            problems.append(
                f"{name} is {name_of(tensor.dtype)} but the computation runs in {name_of(compute)}; "
                "float64 does not mix with other types.\n  hint: convert one side."
            )
    return problems


def _device_problems(call: AdapterCall) -> list[str]:
    devices = {name: t.device for name, t in call.tensors().items() if t is not None}
    if len(set(devices.values())) == 1:
        return []
    listing = ", ".join(f"{name} on {device}" for name, device in devices.items())
    return [f"all tensors must be on one device, got {listing}.\n  hint: adapter.to({str(call.x.device)!r})."]
