"""Checks that the tensors of a call fit together, before any pointer is taken."""

import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
HINT = "\n  hint: "  # between a problem's sentence and its cure
LAYOUTS = (torch.strided, torch.jagged)  # nested tensors are jagged; they bring their own linear

DROPOUT = "a number in [0, 1)"
EPS = "a number above 0"

Tensors = dict[str, Tensor | None]  # the tensors of an `AdapterCall` by name
_WEIGHTS = (
    *("down_weight", "up_weight", "down_bias", "up_bias"),
    *("down_weights", "up_weights", "down_biases", "up_biases"),  # of many adapters
)
_REQUIRED = ("x", "down_weight", "up_weight")
_OF_HIDDEN = ("up_bias", "norm_weight", "norm_bias")  # vectors of one element a feature


def name_of(dtype: torch.dtype) -> str:
    """The name of a dtype without torch's prefix, as in "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def validate(
    tensors: Tensors, compute_dtype: torch.dtype, dropout: float, more: Sequence[str] = ()
) -> None:
    """Check layouts, shapes, dtypes and devices of the tensors of a call, and its dropout.

    Args:
        more: problems that were found elsewhere.

    Raises:
        TypeError: something that must be a tensor or a number is not.
        ValueError: shapes, dtypes or devices disagree, or a tensor is sparse; the message has a
            sentence for every cause, and at its end the likely cure of the first that has one.
    """
    given = given_tensors(tensors, _REQUIRED)
    problems = (
        layout_problems(given)
        + _shape_problems(given)
        + dtype_problems(given, compute_dtype)
        + device_problems(given)
        + dropout_problems(dropout)
        + list(more)
    )
    refuse(problems)


def given_tensors(tensors: Tensors, required: Sequence[str]) -> dict[str, Tensor]:
    """The tensors that are there.

    Raises:
        TypeError: something that must be a tensor is not.
        ValueError: a nested tensor without a shape.
    """
    for name, tensor in tensors.items():
        absent = tensor is None and name not in required
        if not absent and not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}.")
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    for name, tensor in given.items():
        if tensor.is_nested and tensor.layout is torch.strided:  # it can be asked for no shape
            raise ValueError(
                f"{name} must not be a nested tensor of strided layout, which has no shape.{HINT}"
                "layout=torch.jagged works; nn.TransformerEncoder(enable_nested_tensor=False) pads."
            )
    return given


def refuse(problems: Sequence[str]) -> None:
    """Raise a ValueError with a sentence for every problem, and the first cure, if there is one."""
    if problems:
        split = [problem.partition(HINT) for problem in problems]
        hints = [hint for _, _, hint in split if hint]
        sentences = "\n".join(sentence for sentence, _, _ in split)
        raise ValueError(sentences + (HINT + hints[0] if hints else ""))


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


def norm_problems(eps: float, weight_offset: float) -> list[str]:
    """List what is wrong with the numbers of a norm."""
    problems = []
    if not 0.0 < eps < math.inf:
        problems.append(
            f"eps must be {EPS} and finite, got {eps}.{HINT}1e-5 and 1e-6 are usual; without it, "
            "a row of equal features divides by 0."
        )
    if not -math.inf < weight_offset < math.inf:  # a graph has isfinite of constants alone
        problems.append(
            f"weight_offset must be finite, got {weight_offset}.{HINT}0 for most norms, "
            "1 for those that store weight - 1, as Gemma's."
        )
    return problems


def _groups(named: Iterable[tuple[str, Any]]) -> Iterable[tuple[Any, list[str]]]:
    """Each value with the names that share it, so that one fault is told once."""
    groups: dict[Any, list[str]] = {}
    for name, value in named:
        groups.setdefault(value, []).append(name)
    return groups.items()


def _all(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _tensors(kind: str, names: list[str]) -> str:
    return f"a {kind} tensor" if len(names) == 1 else f"{kind} tensors"


def layout_problems(given: dict[str, Tensor]) -> list[str]:
    """List the tensors whose layout no backend reads."""
    wrong = [(name, t.layout) for name, t in given.items() if t.layout not in LAYOUTS]
    return [
        f"{_all(names)} must be {_tensors('dense (strided)', names)}, "
        f"got {str(layout).removeprefix('torch.')}.{HINT}use {names[0]}.to_dense()."
        for layout, names in _groups(wrong)
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
    if bottleneck == 0 or hidden == 0:
        return [
            f"hidden_size and bottleneck_size must be at least 1, got x {list(x.shape)} and "
            f"down_weight {list(down.shape)}."
            f"{HINT}an adapter of size 0 is no adapter; leave it out."
        ]
    problems = []
    if down.shape[1] != hidden:
        problem = (
            f"down_weight must have shape [R, H] = [R, {hidden}] to match x {list(x.shape)}, "
            f"got {list(down.shape)}."
        )
        if down.shape[0] == hidden:
            bottleneck = down.shape[1]
            if tuple(up.shape) == (bottleneck, hidden):
                problem = (
                    f"down_weight must have shape [R, H] and up_weight [H, R], with H = {hidden} "
                    f"to match x {list(x.shape)}, got {list(down.shape)} and {list(up.shape)}."
                )
                return [problem + transpose_hint("they use", "these look like their transposes")]
            problem += transpose_hint("down_weight uses", "this looks like its transpose")
        elif up.shape[0] == down.shape[1]:  # then x is what does not fit, and all else may
            hidden = up.shape[0]
            problem += f"{HINT}both weights are for hidden_size {hidden}; is x the one meant?"
        problems.append(problem)
    vectors = _vector_problems(given, hidden, bottleneck)
    if tuple(up.shape) != (hidden, bottleneck):
        problem = (
            f"up_weight must have shape [H, R] = [{hidden}, {bottleneck}] to match x "
            f"{list(x.shape)} and down_weight {list(down.shape)}, got {list(up.shape)}."
        )
        if tuple(up.shape) == (bottleneck, hidden):
            problem += transpose_hint("up_weight uses", "this looks like its transpose")
        elif not problems and up.shape[0] == hidden and not _vector_problems(given, *up.shape):
            vectors = []  # they fit the up_weight, so the down_weight alone may be another's
        problems.append(problem)
    return problems + vectors + token_problems(given, hidden)


def _vector_problems(given: dict[str, Tensor], hidden: int, bottleneck: int) -> list[str]:
    problems = []
    sizes = {"down_bias": bottleneck} | dict.fromkeys(_OF_HIDDEN, hidden)
    for name, size in sizes.items():
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


def token_problems(given: dict[str, Tensor], hidden: int) -> list[str]:
    """List what is added and has not the shape of x."""
    x = given["x"]
    wanted = (*x.shape[:-1], hidden)
    wrong = [(name, given[name].shape) for name in ("residual", "skip") if name in given]
    return [
        f"{_all(names)} must have the shape of x, {list(wanted)}, got {list(shape)}."
        + _shape_hint(names[0], shape, wanted)
        for shape, names in _groups(wrong)
        if shape != wanted
    ]


def _shape_hint(name: str, shape: torch.Size, wanted: tuple[int, ...]) -> str:
    if shape.numel() == math.prod(wanted):
        return f"{HINT}use {name}.reshape(x.shape)."
    ends = list(zip(shape[::-1], wanted[::-1], strict=False))
    if len(shape) <= len(wanted) and all(size in (1, due) for size, due in ends):
        return f"{HINT}nothing is broadcast; use {name}.expand_as(x)."
    return ""


def transpose_hint(what: str, looks: str) -> str:
    """The cure where a weight looks like the transpose of what is asked for."""
    return f"{HINT}{what} nn.Linear layout (out_features, in_features); {looks}."


def dtype_problems(given: dict[str, Tensor], compute: torch.dtype) -> list[str]:
    """List the tensors that cannot take part in a computation in this dtype."""
    allowed = ", ".join(map(name_of, FLOAT_DTYPES))
    dtypes = {name: tensor.dtype for name, tensor in given.items()}
    problems = [
        f"{_all(names)} must be {_tensors('floating-point', names)} ({allowed}), "
        f"got {name_of(dtype)}."
        + ("" if dtype.is_complex else f"{HINT}convert it, as in {names[0]}.float().")
        for dtype, names in _groups(dtypes.items())
        if dtype not in FLOAT_DTYPES
    ]
    if problems:
        return problems
    given_dtype = dtypes.pop("x")
    wrong = [
        (name, dtype)
        for name, dtype in dtypes.items()
        if (
            not _is_convertible(dtype, given_dtype, compute)
            if name in _WEIGHTS
            else (dtype == torch.float64) != (compute == torch.float64)
        )
    ]
    for dtype, names in _groups(wrong):
        are = "is" if len(names) == 1 else "are"
        problem = f"{_all(names)} {are} {name_of(dtype)} but the computation runs in "
        problem += name_of(compute)
        if torch.float64 in (dtype, compute):
            problem += "; float64 does not mix with other types"
        problem += "."
        if names[0] in _WEIGHTS:
            problem += f"{HINT}convert one side, e.g. adapter.to(torch.{name_of(given_dtype)})"
            problem += "." if torch.float64 in (dtype, compute) else ", or use torch.autocast."
        else:
            problem += f"{HINT}convert one side."
        problems.append(problem)
    return problems


def _is_convertible(dtype: torch.dtype, given: torch.dtype, compute: torch.dtype) -> bool:
    """Whether a parameter takes part: it is of the compute dtype, or the float32 master of it.

    Under autocast any of the three smaller dtypes is converted, as eager does it.
    """
    if dtype == compute:
        return True
    autocast = compute != given
    return torch.float64 not in (dtype, compute) and (autocast or dtype == torch.float32)


def device_problems(given: dict[str, Tensor]) -> list[str]:
    """List the devices where the tensors are not all on one."""
    devices = {name: tensor.device for name, tensor in given.items()}
    if len(set(devices.values())) == 1:
        return []
    here = devices["x"]
    away = [name for name, device in devices.items() if device != here]
    hint = f"adapter.to({str(here)!r})."
    if here.type == "meta":
        hint = "x is on the meta device and has no values; make it where the adapter is."
    elif away == ["routing"]:
        hint = f"AdapterRouting(max_tokens, slots, device={str(here)!r})."
    elif set(away) & {"down_weights", "up_weights"}:
        hint = f"bank.to({str(here)!r})."
    elif not set(away) & {"down_weight", "up_weight"}:
        hint = f"use {away[0]}.to({str(here)!r})."
    found = ", ".join(f"{name} on {device}" for name, device in devices.items())
    return [f"all tensors must be on one device, got {found}.{HINT}{hint}"]
