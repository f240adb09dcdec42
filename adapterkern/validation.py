"""Checks that the tensors of a call fit together, before any pointer is taken."""

import numbers
from typing import Any

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LAYOUTS = (torch.strided, torch.jagged)  # nested tensors are jagged; they bring their own linear

DROPOUT = "a number in [0, 1)"

Tensors = dict[str, Tensor | None]  # the tensors of an `AdapterCall` by name


def name_of(dtype: torch.dtype) -> str:
    """The name of a dtype without torch's prefix, as in "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def validate(tensors: Tensors, compute_dtype: torch.dtype, dropout: float) -> None:
    """Check layouts, shapes, dtypes and devices of the tensors of a call, and its dropout.

    Raises:
        TypeError: something that must be a tensor or a number is not.
        ValueError: shapes, dtypes or devices disagree, or a tensor is sparse; the message lists
            every problem and the likely cure.
    """
    for name, tensor in tensors.items():
        absent = tensor is None and name not in ("x", "down_weight", "up_weight")
        if not absent and not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}.")
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    problems = (
        _layout_problems(given)
        + _shape_problems(given)
        + _dtype_problems(given, compute_dtype)
        + _device_problems(given)
        + dropout_problems(dropout)
    )
    if problems:
        raise ValueError("\n".join(problems))


def real(name: str, value: Any, expected: str) -> float:
    """A real number as a float: Python's own, numpy's or another; a truth value is none.

    Raises:
        TypeError: it is no such number.
        ValueError: no float is as large.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be {expected}, got {value!r}.")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be {expected}, got a number beyond all floats.") from None


def dropout_problems(dropout: float) -> list[str]:
    """List what is wrong with a probability of dropout.

    Raises:
        TypeError: it is no number.
    """
    dropout = real("dropout", dropout, DROPOUT)
    if 0.0 <= dropout < 1.0:
        return []
    return [
        f"dropout must be in [0, 1), got {dropout}.\n"
        "  hint: it is a probability: 0.1 drops one element in ten, 0 none."
    ]


def _layout_problems(given: dict[str, Tensor]) -> list[str]:
    return [
        f"{name} must be a dense (strided) tensor, got {str(tensor.layout).removeprefix('torch.')}."
        f"\n  hint: use {name}.to_dense()."
        for name, tensor in given.items()
        if tensor.layout not in LAYOUTS
    ]


def _shape_problems(given: dict[str, Tensor]) -> list[str]:
    x, down, up = given["x"], given["down_weight"], given["up_weight"]
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
    return problems + _vector_problems(given, hidden, bottleneck) + _token_problems(given)


def _vector_problems(given: dict[str, Tensor], hidden: int, bottleneck: int) -> list[str]:
    problems = []
    for name, size in (("down_bias", bottleneck), ("up_bias", hidden)):
        bias = given.get(name)
        if bias is not None and tuple(bias.shape) != (size,):
            problems.append(
                f"{name} must have shape [{size}], got {list(bias.shape)}."
                + (f"\n  hint: use {name}.reshape({size})." if bias.numel() == size else "")
            )
    scaling = given.get("scaling")
    if scaling is not None and tuple(scaling.shape) not in ((1,), (hidden,)):
        problem = (
            f"scaling must be a float or a tensor of shape [1] or [{hidden}], "
            f"got {list(scaling.shape)}."
        )
        if scaling.numel() in (1, hidden):
            problem += f"\n  hint: use scaling.reshape({scaling.numel()})."
        problems.append(problem)
    return problems


def _token_problems(given: dict[str, Tensor]) -> list[str]:
    shape = given["x"].shape
    return [
        f"{name} must have the shape of x, {list(shape)}, got {list(given[name].shape)}."
        + _shape_hint(name, given[name], given["x"])
        for name in ("residual", "skip")
        if name in given and given[name].shape != shape
    ]


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


def _dtype_problems(given: dict[str, Tensor], compute: torch.dtype) -> list[str]:
    allowed = ", ".join(map(name_of, FLOAT_DTYPES))
    problems = [
        f"{name} must be a floating-point tensor ({allowed}), got {name_of(tensor.dtype)}."
        + ("" if tensor.is_complex() else f"\n  hint: convert it, as in {name}.float().")
        for name, tensor in given.items()
        if tensor.dtype not in FLOAT_DTYPES
    ]
    if problems:
        return problems
    x = given["x"]
    for name, tensor in given.items():
        dtype = name_of(tensor.dtype)
        if name in ("down_weight", "up_weight", "down_bias", "up_bias"):
            if not _is_convertible(tensor.dtype, x.dtype, compute):
                problems.append(
                    f"{name} is {dtype} but the computation runs in {name_of(compute)}.\n"
                    f"  hint: convert one side, e.g. adapter.to(torch.{name_of(x.dtype)}), "
                    "or use torch.autocast."
                )
        elif name != "x" and (tensor.dtype == torch.float64) != (compute == torch.float64):
            problems.append(
                f"{name} is {dtype} but the computation runs in {name_of(compute)}; "
                "float64 does not mix with other types.\n  hint: convert one side."
            )
    return problems


def _is_convertible(dtype: torch.dtype, given: torch.dtype, compute: torch.dtype) -> bool:
    """Whether a parameter takes part: it is of the compute dtype, or the float32 master of it.

    Under autocast any of the three smaller dtypes is converted, as eager does it.
    """
    if dtype == compute:
        return True
    autocast = compute != given
    return torch.float64 not in (dtype, compute) and (autocast or dtype == torch.float32)


def _device_problems(given: dict[str, Tensor]) -> list[str]:
    devices = {name: tensor.device for name, tensor in given.items()}
    if len(set(devices.values())) == 1:
        return []
    listing = ", ".join(f"{name} on {device}" for name, device in devices.items())
    return [
        f"all tensors must be on one device, got {listing}.\n"
        f"  hint: adapter.to({str(given['x'].device)!r})."
    ]
