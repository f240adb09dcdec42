"""What one adapter call is: `AdapterCall`, tensors and options; `AdapterSpec`, all that is static.

Validation happens here once, before any pointer is taken, and reports all problems of a call.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LAYOUTS = (torch.strided, torch.jagged)  # the second of NestedTensor, which brings its own linear

# What a registered op would answer with a wrong or no derivative, or would not understand: such a
# call runs as plain PyTorch operations under plain autograd.
PLAIN_FEATURES = frozenset({"dropout", "forward_ad", "functorch", "tensor_subclass"})


class AdapterCall(NamedTuple):
    """y = residual + skip + scaling * (act(x W_down^T + b_down) W_up^T + b_up).

    The residual is `x` itself (add_input), another tensor (residual), or nothing. The scaling is
    the tensor `scaling` where given, else the float `scale`.
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
        """What this call needs beyond `act(x W_down^T) W_up^T`; a backend declares what it has."""
        wanted = {
            "bias": self.down_bias is not None or self.up_bias is not None,
            "input_residual": self.add_input,
            "external_residual": self.residual is not None,
            "skip": self.skip is not None,
            "scaling": self.scaling is not None or self.scale != 1.0,
            "learned_scaling": self.scaling is not None,
            "mixed_dtypes": any(t is not None and t.dtype != self.compute_dtype for t in self[:8]),
            "dropout": self.dropout > 0,
            "forward_ad": forward_ad._current_level >= 0,
            "functorch": torch._C._are_functorch_transforms_active(),
            "tensor_subclass": any(_is_foreign(t) for t in self[:8] if t is not None),
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


ORDINARY = (Tensor, nn.Parameter)


def _is_foreign(tensor: Tensor) -> bool:
    """Whether this is a subclass with semantics of its own: DTensor, NestedTensor.

    The subclasses with which torch traces are ordinary.
    """
    if type(tensor) in ORDINARY:
        return False
    from torch._subclasses import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    tracing = isinstance(tensor, FakeTensor | FunctionalTensor)
    return not tracing and (
        type(tensor).__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl
    )


def name_of(dtype: torch.dtype) -> str:
    """As in "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def validate(call: AdapterCall) -> None:
    """Check layouts, shapes, dtypes and devices of a call.

    Raises:
        TypeError: something that must be a tensor or a number is not.
        ValueError: shapes, dtypes or devices disagree, or a tensor is sparse; the message lists
            every problem and the likely cure.
    """
    for name, tensor in call.tensors().items():
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}.")
    problems = (
        _layout_problems(call)
        + _shape_problems(call)
        + _dtype_problems(call)
        + _device_problems(call)
        + dropout_problems(call.dropout)
    )
    if problems:
        raise ValueError("\n".join(problems))


def dropout_problems(dropout: float) -> list[str]:
    """What is wrong with a probability of dropout.

    Raises:
        TypeError: it is no number.
    """
    if not isinstance(dropout, float | int):
        raise TypeError(f"dropout must be a number in [0, 1), got {dropout!r}.")
    if 0.0 <= dropout < 1.0:
        return []
    return [
        f"dropout must be in [0, 1), got {dropout}.\n"
        "  hint: it is a probability: 0.1 drops one element in ten, 0 none."
    ]


def _layout_problems(call: AdapterCall) -> list[str]:
    return [
        f"{name} must be a dense (strided) tensor, got {str(tensor.layout).removeprefix('torch.')}."
        f"\n  hint: use {name}.to_dense()."
        for name, tensor in call.tensors().items()
        if tensor is not None and tensor.layout not in LAYOUTS
    ]


def _shape_problems(call: AdapterCall) -> list[str]:
    x, down, up = call.x, call.down_weight, call.up_weight
    if x.dim() == 0:
        return ["x must have shape [..., H], got a 0-dimensional tensor."]
    if down.dim() != 2 or up.dim() != 2:
        return [
            "down_weight must have shape [R, H] and up_weight [H, R], "
            f"got {list(down.shape)} and {list(up.shape)}."
        ]
    hidden, bottleneck = x.shape[-1], down.shape[0]
    problems = []
    if bottleneck == 0 or hidden == 0:
        problems.append(
            f"hidden_size and bottleneck_size must be at least 1, got x {list(x.shape)} and "
            f"down_weight {list(down.shape)}.\n"
            "  hint: an adapter of size 0 is no adapter; leave it out."
        )
    if down.shape[1] != hidden:
        problem = (
            f"down_weight must have shape [R, H] = [R, {hidden}] to match x {list(x.shape)}, "
            f"got {list(down.shape)}."
        )
        if down.shape[0] == hidden:
            problem += _transpose_hint("down_weight")
            bottleneck = down.shape[1]
        elif up.shape[0] == down.shape[1]:
            problem += (
                f"\n  hint: both weights are for hidden_size {up.shape[0]}; is x the one meant?"
            )
        problems.append(problem)
    if tuple(up.shape) != (hidden, bottleneck):
        problem = (
            f"up_weight must have shape [H, R] = [{hidden}, {bottleneck}] to match x "
            f"{list(x.shape)} and down_weight {list(down.shape)}, got {list(up.shape)}."
        )
        if tuple(up.shape) == (bottleneck, hidden):
            problem += _transpose_hint("up_weight")
        problems.append(problem)
    return problems + _vector_problems(call, hidden, bottleneck)


def _vector_problems(call: AdapterCall, hidden: int, bottleneck: int) -> list[str]:
    problems = []
    biases = (("down_bias", call.down_bias, bottleneck), ("up_bias", call.up_bias, hidden))
    for name, bias, size in biases:
        if bias is not None and tuple(bias.shape) != (size,):
            problems.append(
                f"{name} must have shape [{size}], got {list(bias.shape)}."
                + (f"\n  hint: use {name}.reshape({size})." if bias.numel() == size else "")
            )
    for name, tensor in (("residual", call.residual), ("skip", call.skip)):
        if tensor is not None and tensor.shape != call.x.shape:
            problems.append(
                f"{name} must have the shape of x, {list(call.x.shape)}, got {list(tensor.shape)}."
                + _shape_hint(name, tensor, call.x)
            )
    scaling = call.scaling
    if scaling is not None and tuple(scaling.shape) not in ((1,), (hidden,)):
        problems.append(
            f"scaling must be a float or a tensor of shape [1] or [{hidden}], "
            f"got {list(scaling.shape)}."
            + (
                f"\n  hint: use scaling.reshape({scaling.numel()})."
                if scaling.numel() in (1, hidden)
                else ""
            )
        )
    return problems


def _shape_hint(name: str, tensor: Tensor, x: Tensor) -> str:
    if tensor.numel() == x.numel():
        return f"\n  hint: use {name}.reshape(x.shape)."
    given, wanted = tensor.shape[::-1], x.shape[::-1]
    if len(given) <= len(wanted) and all(a in (1, b) for a, b in zip(given, wanted, strict=False)):
        return f"\n  hint: nothing is broadcast; use {name}.expand_as(x)."
    return ""


def _transpose_hint(name: str) -> str:
    return (
        f"\n  hint: {name} uses nn.Linear layout (out_features, in_features); "
        "this looks like its transpose."
    )


def _dtype_problems(call: AdapterCall) -> list[str]:
    allowed = ", ".join(map(name_of, FLOAT_DTYPES))
    problems = [
        f"{name} must be a floating-point tensor ({allowed}), got {name_of(tensor.dtype)}."
        + ("" if tensor.is_complex() else f"\n  hint: convert it, as in {name}.float().")
        for name, tensor in call.tensors().items()
        if tensor is not None and tensor.dtype not in FLOAT_DTYPES
    ]
    if problems:
        return problems
    compute = call.compute_dtype
    for name in ("down_weight", "up_weight", "down_bias", "up_bias"):
        parameter = getattr(call, name)
        if parameter is not None and not _is_convertible(parameter.dtype, call):
            problems.append(
                f"{name} is {name_of(parameter.dtype)} but the computation runs in "
                f"{name_of(compute)}.\n  hint: convert one side, e.g. "
                f"adapter.to(torch.{name_of(call.x.dtype)}), or use torch.autocast."
            )
    for name in ("residual", "skip", "scaling"):
        tensor = getattr(call, name)
        if tensor is not None and (tensor.dtype == torch.float64) != (compute == torch.float64):
            problems.append(
                f"{name} is {name_of(tensor.dtype)} but the computation runs in "
                f"{name_of(compute)}; float64 does not mix with other types.\n"
                "  hint: convert one side."
            )
    return problems


def _is_convertible(dtype: torch.dtype, call: AdapterCall) -> bool:
    """Whether a parameter of this dtype takes part: in the compute dtype, or as its float32 master.

    Under autocast any of the three smaller types is converted, as eager does.
    """
    if dtype == call.compute_dtype:
        return True
    autocast = call.compute_dtype != call.x.dtype
    return torch.float64 not in (dtype, call.compute_dtype) and (autocast or dtype == torch.float32)


def _device_problems(call: AdapterCall) -> list[str]:
    devices = {name: t.device for name, t in call.tensors().items() if t is not None}
    if len(set(devices.values())) == 1:
        return []
    listing = ", ".join(f"{name} on {device}" for name, device in devices.items())
    return [
        f"all tensors must be on one device, got {listing}.\n"
        f"  hint: adapter.to({str(call.x.device)!r})."
    ]
