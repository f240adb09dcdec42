"""Adapters that the inputs of a batch name, side by side in one grouped call."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adapterkern import _torch, dispatch
from adapterkern.grouped import functional, ops
from adapterkern.grouped.call import make_grouped_call
from adapterkern.grouped.routing import AdapterRouting
from adapterkern.modules.bank_slots import parameters_of
from adapterkern.modules.bottleneck import BottleneckAdapter, is_linear
from adapterkern.modules.deferral import is_deferred
from adapterkern.spec import compute_dtype_of

_ABSENT = object()
_MOST_ROUTINGS = 8  # kept: without a cache of keys and values, every step of generate has its own


class Group(NamedTuple):
    """Adapters of a layer that one grouped call serves, each in a slot of the stacked tensors.

    The stacks are copies; `leaves` are the parameters that they are copies of, so that gradients
    reach these.
    """

    names: tuple[str, ...]
    beside: bool  # whether they read the FFN's input
    activation: str
    backend: str
    ids: tuple[int, ...]  # the slot of each input, -1 for none
    stacks: tuple[Tensor | None, ...]  # in the order of `ops.KINDS`
    ranks: Tensor | None
    leaves: ops.Leaves

    def run(self, read: Tensor, residual: Tensor, routing: AdapterRouting) -> Tensor:
        """residual, and what the adapters of the inputs make of `read`."""
        down, up, down_biases, up_biases, scalings = self.stacks
        assert down is not None
        assert up is not None
        records = torch.is_grad_enabled() and any(p.requires_grad for p in self.leaves.parameters)
        call = make_grouped_call(
            read, down, up, down_biases, up_biases, residual, None, scalings, self.ranks,
            routing.buffers(), self.activation, records,
        )  # fmt: skip
        return functional.run_call(call, self.backend, self.leaves)


class Plan(NamedTuple):
    """How a layer runs the adapters that a batch names."""

    state: Sequence[Any]  # what it was made of; another one makes it stale
    groups: Sequence[Group]
    apart: Mapping[str, str]  # adapters that run on their own, and why


class NamedBatch(list[str]):
    """The adapter of each input, and what a model's layers share and keep while they serve them:
    the stacks of each layer, and the routings, of which layers with the same adapters share one.

    It lives as long as one forward or generate. Every call of a layer compares its adapters with
    what the stacks were made of. Torch tells of all changes but those in place through `.data`.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(names)
        self._plans: dict[nn.Module, Plan] = {}
        self._routings: dict[tuple, AdapterRouting] = {}
        self._ranks: dict[tuple, Tensor] = {}

    def replace(self, names: Sequence[str]) -> None:
        """Name other adapters."""
        self[:] = names
        self._plans.clear()
        self._routings.clear()

    def plan(
        self, layer: nn.Module, adapters: Mapping[str, Any], beside: set[str], y: Tensor
    ) -> Plan:
        """How `layer` runs these of its adapters, now.

        beside: those that read the FFN's input. y: what the base layer gave.
        """
        why = _reason_of_call(y)
        if why is not None:
            if not torch.compiler.is_compiling():
                dispatch.report_apart(f"adapters {', '.join(adapters)}", why)
            return Plan((), (), dict.fromkeys(adapters, why))
        wide = torch.promote_types(compute_dtype_of(y), torch.float32)
        state = [wide, *map(_state_of, adapters.values())]
        plan = self._plans.get(layer)
        if plan is None or plan.state != state:
            plan = self._plans[layer] = self._made(state, adapters, beside, wide)
        return plan

    def _made(
        self, state: list[Any], adapters: Mapping[str, Any], beside: set[str], wide: torch.dtype
    ) -> Plan:
        apart: dict[str, str] = {}
        alike: dict[tuple, list[str]] = {}
        for name, adapter in adapters.items():
            why = _reason_of(adapter)
            if why is not None:
                apart[name] = why
                dispatch.report_apart(f"adapter {name!r}", why)
                continue
            weights = adapter.down_proj.weight, adapter.up_proj.weight
            stored = tuple((weight.dtype, weight.device) for weight in weights)
            key = name in beside, adapter.activation, adapter.backend, stored
            alike.setdefault(key, []).append(name)
        groups = [
            self._grouped({n: adapters[n] for n in names}, reads_input, kind, backend, wide)
            for (reads_input, kind, backend, _), names in alike.items()
        ]
        return Plan(state, groups, apart)

    def _grouped(
        self,
        adapters: dict[str, Any],
        beside: bool,
        activation: str,
        backend: str,
        wide: torch.dtype,
    ) -> Group:
        slot_of = {name: slot for slot, name in enumerate(adapters)}
        each = [parameters_of(adapter) for adapter in adapters.values()]
        down, up, down_bias, up_bias, _ = zip(*each, strict=True)
        sizes = [weight.shape[0] for weight in down]
        device = down[0].device
        with torch.inference_mode(False), torch.no_grad():  # they may outlive an inference mode
            ranks = self._ranks_of(sizes, device) if min(sizes) < max(sizes) else None
            stacks = (
                *map(ops.stack_of, (down, up, down_bias, up_bias)),
                _scalings([a.scaling for a in adapters.values()], wide, device),
            )  # fmt: skip
        return Group(
            tuple(adapters), beside, activation, backend,
            tuple(slot_of.get(name, -1) for name in self), stacks, ranks,
            ops.leaves_of(enumerate(each)),
        )  # fmt: skip

    def _ranks_of(self, sizes: list[int], device: torch.device) -> Tensor:
        """Made once for all layers, since to send numbers to a GPU is to wait for it."""
        key = *sizes, device
        if key not in self._ranks:
            self._ranks[key] = torch.tensor(sizes, dtype=torch.int32, device=device)
        return self._ranks[key]

    def routing(self, group: Group, y: Tensor) -> AdapterRouting:
        """Of a group's slots for the tokens of y, in which those of an input follow one another."""
        tokens = y.shape[:-1].numel() // len(self)
        key = group.ids, len(group.names), tokens, y.device
        if key not in self._routings:
            if len(self._routings) >= _MOST_ROUTINGS:
                self._routings.clear()
            with torch.inference_mode(False):
                made = AdapterRouting(max(1, tokens * len(self)), key[1], device=y.device)
                self._routings[key] = made.update(group.ids, seq_len=tokens)
        return self._routings[key]


def _reason_of_call(y: Tensor) -> str | None:
    """Why no adapter of a batch can be grouped just now; None if nothing is against it."""
    if torch.compiler.is_compiling() or _torch.jit_is_tracing():
        return "a graph is made, which holds the batch's names"
    if _torch.functorch_is_active():
        return "a transform of torch.func is active"
    if type(y) not in _torch.ORDINARY:
        return f"the hidden states are a {type(y).__name__}"
    return None


def _reason_of(adapter: Any) -> str | None:
    """Why an adapter must be called on its own; None if nothing is against a group."""
    if type(adapter).forward is not BottleneckAdapter.forward:
        return f"it is a {type(adapter).__name__}, which must be called to be itself"
    down, up = adapter.down_proj, adapter.up_proj
    if not (is_linear(down) and is_linear(up)) or _torch.beyond_its_class(down, up):
        return adapter.unfused_reason()
    beyond = _torch.beyond_its_class(adapter)
    if beyond is not None:
        return f"it has {beyond} and must be called to be itself"
    if adapter.training and adapter.dropout:
        return f"it has a dropout of {adapter.dropout} in training"
    scaling = adapter.scaling
    if isinstance(scaling, Tensor) and scaling.numel() != 1:
        return "it has a scaling for each channel"
    for parameter in (down.weight, up.weight):
        if type(parameter) not in _torch.ORDINARY:
            return f"its weights are {type(parameter).__name__}s"
    if is_deferred(adapter):
        return "the block around the layer runs it"
    return None


def _state_of(adapter: Any) -> Any:
    """Equal as long as the adapter is what it was. Asked of every adapter at every call, so it
    reads dictionaries, through which nn.Module would search for each name.
    """
    down, up = adapter._modules["down_proj"], adapter._modules["up_proj"]
    values = (
        *(m._parameters.get(name, _ABSENT) for m in (down, up) for name in ("weight", "bias")),
        adapter._parameters.get("scaling", vars(adapter).get("scaling", _ABSENT)),
    )
    return (
        type(adapter), type(down), type(up), _torch.beyond_its_class(adapter, down, up),
        adapter.training and adapter.dropout, is_deferred(adapter), adapter.activation,
        adapter.backend, *map(_mark_of, values),
    )  # fmt: skip


def _mark_of(value: Any) -> Any:
    """Equal as long as it is the same tensor with the same values; numbers are themselves."""
    if value is _ABSENT:  # a parametrisation computes it, each time anew
        return object()
    if not isinstance(value, Tensor):
        return value
    try:
        return id(value), value._version, value.data_ptr()
    except RuntimeError:  # one of an inference mode counts no versions
        return object()


def _scalings(
    scalings: Sequence[float | Tensor], wide: torch.dtype, device: torch.device
) -> Tensor | None:
    """[S]; None where all are 1."""
    if all(isinstance(scale, float) and scale == 1.0 for scale in scalings):
        return None
    parts = [
        s.detach().to(device, wide).reshape(()) if isinstance(s, Tensor)
        else torch.full((), s, dtype=wide, device=device)
        for s in scalings
    ]  # fmt: skip
    return torch.stack(parts)
