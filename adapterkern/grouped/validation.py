"""Checks that the tensors of a call of many adapters fit together, as `adapterkern.validation`."""

import math

import torch
from torch import Tensor

from adapterkern.validation import (
    HINT,
    Tensors,
    device_problems,
    dtype_problems,
    given_tensors,
    layout_problems,
    name_of,
    token_problems,
    transpose_hint,
)

ROUTING = ("token_slots", "order", "tiles", "slot_offsets")  # an AdapterRouting makes these
_REQUIRED = ("x", "down_weights", "up_weights")


def grouped_problems(tensors: Tensors, compute_dtype: torch.dtype) -> list[str]:
    """List what is wrong with the tensors of a call of many adapters, as `validate` does.

    Raises:
        TypeError: something that must be a tensor is not.
    """
    given = given_tensors(tensors, (*_REQUIRED, *ROUTING))
    floating = {n: t for n, t in given.items() if n not in (*ROUTING, "ranks", "scalings")}
    return (
        layout_problems(given)
        + _shape_problems(given)
        + dtype_problems(floating, compute_dtype)
        + _slot_dtype_problems(given, compute_dtype)
        + device_problems(_with_one_routing(given))
    )


def _with_one_routing(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the names that their users know."""
    named = {n: t for n, t in given.items() if n not in ROUTING}
    return named | {"routing": given["order"]}


def _shape_problems(given: dict[str, Tensor]) -> list[str]:
    x, down, up = given["x"], given["down_weights"], given["up_weights"]
    if x.dim() == 0:
        return ["x must have shape [..., H], got a 0-dimensional tensor."]
    if down.dim() != 3 or up.dim() != 3:
        return [
            "down_weights must have shape [S, R, H] and up_weights [S, H, R], "
            f"got {list(down.shape)} and {list(up.shape)}."
            f"{HINT}stack the weights of the adapters, as in torch.stack([a.weight, b.weight])."
        ]
    slots, bottleneck, hidden = *down.shape[:2], x.shape[-1]
    if 0 in (slots, bottleneck, hidden):
        return [
            "the number of slots, bottleneck_size and hidden_size must be at least 1, got "
            f"x {list(x.shape)} and down_weights {list(down.shape)}."
        ]
    problems = _weight_problems(given)
    routed = given["slot_offsets"].shape[0] - 2
    if routed != slots:
        problems.append(
            f"routing must be made for the {slots} slots of down_weights, got one for {routed}."
            f"{HINT}AdapterRouting(max_tokens, {slots})."
        )
    tokens, most = math.prod(x.shape[:-1]), given["token_slots"].shape[0]
    if tokens > most:
        problems.append(
            f"x must have at most the {most} tokens that routing was made for, got {tokens}."
            f"{HINT}AdapterRouting(max_tokens={tokens}, slots={slots})."
        )
    return problems + token_problems(given, x.shape[-1])


def _weight_problems(given: dict[str, Tensor]) -> list[str]:
    x, down, up = given["x"], given["down_weights"], given["up_weights"]
    slots, bottleneck, hidden = *down.shape[:2], x.shape[-1]
    hint = ""
    if down.shape[2] != hidden:
        turned = down.shape[1] == hidden
        if tuple(up.shape) == (slots, *down.shape[:0:-1]) and not turned:
            hidden = down.shape[2]  # x alone does not fit
            hint = f"{HINT}both weights are for hidden_size {hidden}; is x the one meant?"
        elif turned:
            bottleneck = down.shape[2]
            hint = transpose_hint("down_weights uses", "this looks like its transpose")
    elif tuple(up.shape) == (slots, bottleneck, hidden):
        hint = transpose_hint("up_weights uses", "this looks like its transpose")
    problems = []
    if hint and hidden != x.shape[-1]:
        problems.append(
            f"down_weights must have shape [S, R, H] = [{slots}, {bottleneck}, {x.shape[-1]}] to "
            f"match x {list(x.shape)}, got {list(down.shape)}."
        )
    shapes = {
        "down_weights": ("[S, R, H]", (slots, bottleneck, hidden)),
        "up_weights": ("[S, H, R]", (slots, hidden, bottleneck)),
        "down_biases": ("[S, R]", (slots, bottleneck)),
        "up_biases": ("[S, H]", (slots, hidden)),
        "scalings": ("[S]", (slots,)),
        "ranks": ("[S]", (slots,)),
    }
    problems += [
        f"{name} must have shape {letters} = {list(shape)} to match x {list(x.shape)} and "
        f"down_weights {list(down.shape)}, got {list(given[name].shape)}."
        for name, (letters, shape) in shapes.items()
        if name in given and tuple(given[name].shape) != shape
    ]
    if problems:
        problems[0] += hint
    return problems


def _slot_dtype_problems(given: dict[str, Tensor], compute: torch.dtype) -> list[str]:
    """Of the tensors that hold a number for each slot."""
    wide = torch.float64 if compute == torch.float64 else torch.float32
    problems = []
    for name, dtype in (("scalings", wide), ("ranks", torch.int32)):
        if name in given and given[name].dtype != dtype:
            problems.append(
                f"{name} must be {name_of(dtype)}, got {name_of(given[name].dtype)}."
                f"{HINT}use {name}.to(torch.{name_of(dtype)})."
            )
    return problems
