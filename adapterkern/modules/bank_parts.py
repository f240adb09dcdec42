"""What an `AdapterBank` takes of an adapter, and every reason against it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adapterkern import _torch
from adapterkern.modules.bottleneck import BottleneckAdapter, is_linear
from adapterkern.validation import FLOAT_DTYPES, HINT, name_of, refuse

_WEIGHTS = ("down_proj.weight", "up_proj.weight")
_BIASES = ("down_proj.bias", "up_proj.bias")


class Parts(NamedTuple):
    """An adapter as tensors and options. frozen: the tensors that are not trained."""

    tensors: Mapping[str, Tensor]
    activation: str | None = None  # None where nothing tells it
    scaling: float = 1.0  # where no tensor has it
    dropout: float = 0.0
    frozen: frozenset[str] = frozenset()

    @property
    def bottleneck_size(self) -> int:
        return self.tensors["down_proj.weight"].shape[0]

    @property
    def bias(self) -> bool:
        return _BIASES[0] in self.tensors


def parts_of(adapter: Any) -> Parts:
    """The parts of a `BottleneckAdapter`, or of its state dict.

    Raises:
        TypeError: it is neither.
        ValueError: the state dict is not one of a `BottleneckAdapter`, or a projection is something
            else than a plain linear layer.
    """
    if isinstance(adapter, BottleneckAdapter):
        projections = adapter.down_proj, adapter.up_proj
        if not all(map(is_linear, projections)) or _torch.beyond_its_class(*projections):
            raise ValueError(
                "the projections of an adapter must be plain linear layers, got "
                f"{' and '.join(type(p).__name__ for p in projections)}.\n"
                "  hint: take wrappers, hooks and quantisation off before it is added."
            )
        if (projections[0].bias is None) != (projections[1].bias is None):
            raise ValueError(
                "an adapter must have both biases or none, got one."
                f"{HINT}torch.nn.init.zeros_ makes a bias that adds nothing."
            )
        parameters = dict(adapter.named_parameters(remove_duplicate=False))  # tied: a copy of each
        learned = isinstance(adapter.scaling, nn.Parameter)
        return Parts(
            parameters, adapter.activation, 1.0 if learned else float(adapter.scaling),
            adapter.dropout, frozenset(n for n, p in parameters.items() if not p.requires_grad),
        )  # fmt: skip
    if not isinstance(adapter, Mapping):
        raise TypeError(
            "adapter must be a BottleneckAdapter or the state dict of one, got "
            f"{type(adapter).__name__}."
        )
    tensors = {key: value for key, value in adapter.items() if isinstance(value, Tensor)}
    known = {*_WEIGHTS, *_BIASES, "scaling"}
    missing = [key for key in _WEIGHTS if key not in tensors]
    strange = sorted(set(map(str, adapter)) - known)
    if missing or strange or len(set(_BIASES) & set(tensors)) == 1:
        raise ValueError(
            f"the state dict of an adapter has {', '.join(_WEIGHTS)} and, together, "
            f"{', '.join(_BIASES)}, and a learned scaling; got "
            f"{', '.join(sorted(map(str, adapter))) or 'nothing'}."
            f"{HINT}BottleneckAdapter.state_dict() makes one."
        )
    return Parts(tensors)


def scaling_of(name: str, value: Any) -> float | None:
    """The scaling that the state dict of a bank has for an adapter.

    Raises:
        ValueError: it is not one number.
    """
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.numel() != 1 or value.dtype == torch.bool:
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"adapter {name!r}: its scaling must be a tensor of one number, got {got}."
        )
    return float(value)


def check_fit(
    name: str, parts: Parts, hidden_size: int, most_units: int, activation: str, bias: bool
) -> None:
    """Refuse an adapter that does not fit a bank of these sizes and options.

    Raises:
        ValueError: the message lists every reason.
    """
    problems = []
    tensors = parts.tensors
    down, up = (tuple(tensors[key].shape) for key in _WEIGHTS)
    size = down[0] if down else 0
    if len(down) != 2 or down[1] != hidden_size or up != down[::-1]:
        problems.append(
            f"down_proj.weight must have shape [R, {hidden_size}] and up_proj.weight "
            f"[{hidden_size}, R], got {list(down)} and {list(up)}."
        )
    elif size > most_units:
        problems.append(
            f"bottleneck_size must be at most the bank's {most_units}, got {size}.{HINT}"
            f"a bank with max_bottleneck_size={size}."
        )
    if parts.bias and not bias:
        problems.append(f"it has biases, and the bank has none.{HINT}a bank with bias=True.")
    if parts.bias and not problems:
        sizes = {"down_proj.bias": (size,), "up_proj.bias": (hidden_size,)}
        problems += [
            f"{key} must have shape {list(shape)}, got {list(tensors[key].shape)}."
            for key, shape in sizes.items()
            if tuple(tensors[key].shape) != shape
        ]
    if "scaling" in tensors and tuple(tensors["scaling"].shape) != (1,):
        problems.append(
            f"scaling must be a float or of shape [1], got {list(tensors['scaling'].shape)}.{HINT}"
            "multiply up_proj.weight's rows and up_proj.bias by it, which computes the same."
        )
    if parts.activation is not None and parts.activation != activation:
        problems.append(
            f"its activation must be the bank's, {activation}, got {parts.activation}."
            f"{HINT}a bank has one activation; make a second bank."
        )
    if parts.dropout > 0:
        problems.append(
            f"its dropout must be 0, got {parts.dropout}.{HINT}adapter.dropout = 0.0 first."
        )
    sparse = sorted(key for key, t in tensors.items() if t.layout is not torch.strided)
    if sparse:
        problems.append(f"its tensors must be dense, got {tensors[sparse[0]].layout}: {sparse[0]}.")
    wrong = {name_of(t.dtype) for t in tensors.values() if t.dtype not in FLOAT_DTYPES}
    if wrong:
        problems.append(f"its tensors must be floating-point ones, got {', '.join(sorted(wrong))}.")
    refuse([f"adapter {name!r}: {problem}" for problem in problems])


Facts = tuple[float | None, bool, bool]


def facts_of(adapter: Any) -> Facts:
    """What a slot holds of an adapter beside its parameters: its scaling, None where it is learned,
    and whether the projections have biases.
    """
    scaling = None if isinstance(adapter.scaling, Tensor) else adapter.scaling
    return scaling, adapter.down_proj.bias is not None, adapter.up_proj.bias is not None


def check_followed(name: str, adapter: Any, activation: str, before: Facts) -> None:
    """Refuse what a bank cannot follow of the changes of an adapter that it has.

    Raises:
        ValueError: as said.
    """
    down, up = adapter.down_proj, adapter.up_proj
    if not is_linear(down) or not is_linear(up):
        raise ValueError(
            f"the projections of adapter {name!r} must stay plain linear layers, got "
            f"{type(down).__name__} and {type(up).__name__}."
            f"{HINT}a bank reads weights and calls no projection; run such an adapter alone."
        )
    if adapter.activation != activation or adapter.dropout:
        raise ValueError(
            f"adapter {name!r} must keep the bank's activation, {activation}, and a "
            f"dropout of 0, got {adapter.activation} and {adapter.dropout}."
        )
    if (before[1] and down.bias is None) or (before[2] and up.bias is None):
        raise ValueError(
            f"adapter {name!r} must keep its biases, and one is None."
            f"{HINT}torch.nn.init.zeros_ makes a bias that adds nothing."
        )
    if not _torch.jit_is_tracing():  # which warns of every comparison of shapes
        _check_shapes(name, adapter)


def _check_shapes(name: str, adapter: Any) -> None:
    down, up = adapter.down_proj, adapter.up_proj
    units, hidden = adapter.bottleneck_size, adapter.hidden_size
    shapes = list(down.weight.shape), list(up.weight.shape)
    if shapes != ([units, hidden], [hidden, units]):
        raise ValueError(
            f"adapter {name!r} must keep its {units} units, got weights of {shapes[0]} and "
            f"{shapes[1]}.{HINT}remove it, and add one of that size."
        )
    scaling = adapter.scaling
    if isinstance(scaling, Tensor) and scaling.numel() != 1:
        raise ValueError(
            f"adapter {name!r} must keep a scaling that is a float or of shape [1], got "
            f"{list(scaling.shape)}.{HINT}multiply up_proj.weight's rows and up_proj.bias by it, "
            "which computes the same."
        )
