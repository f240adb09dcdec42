"""`AdapterSlots`: the memory of a bank, and adapters whose parameters lie in it."""

import itertools
import operator
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adapterkern import _torch
from adapterkern.grouped import ops
from adapterkern.modules.bank_parts import (
    Facts,
    Parts,
    check_fit,
    check_followed,
    facts_of,
    parts_of,
    scaling_of,
)
from adapterkern.modules.bottleneck import BottleneckAdapter
from adapterkern.modules.fused_steps import refuse_fused_steps

# The stack of each parameter of an adapter, in the order of `ops.KINDS`.
_STACK_OF = {
    "down_proj.weight": "down_weights",
    "up_proj.weight": "up_weights",
    "down_proj.bias": "down_biases",
    "up_proj.bias": "up_biases",
    "scaling": "scalings",
}
assert tuple(_STACK_OF.values()) == ops.KINDS


Adapters = Sequence[tuple[int, Sequence[Tensor | None]]]  # slot, parameters as `parameters_of`


class Bindings(NamedTuple):
    """All adapters of a bank, as they were when last looked at."""

    adapters: Adapters
    are_in_slots: bool
    options: list[tuple[Any, ...]]
    options_in: list[dict[str, Any]]
    objects: list[Any]  # projections, their parameters, learned scalings; then what holds them
    projections_in: list[Any]
    parameters_in: list[Any]
    scalings_in: list[Any]
    parameters: list[Tensor]
    addresses: list[int]

    def hold(self) -> bool:
        """Whether nothing has changed. A bank asks at every call, so this reads dicts alone."""
        try:
            now = itertools.chain(
                itertools.chain.from_iterable(map(_PROJECTIONS, self.projections_in)),
                itertools.chain.from_iterable(map(_PARAMETERS, self.parameters_in)),
                map(_SCALING, self.scalings_in),
            )
            return (
                [(*_OPTIONS(s), s.get("scaling")) for s in self.options_in] == self.options
                and all(map(operator.is_, now, self.objects))
                and [*map(Tensor.data_ptr, self.parameters)] == self.addresses
            )
        except KeyError:  # parametrized, or learned no longer
            return False


_OPTIONS = operator.itemgetter("activation", "dropout")
_PROJECTIONS = operator.itemgetter("down_proj", "up_proj")
_PARAMETERS = operator.itemgetter("weight", "bias")
_SCALING = operator.itemgetter("scaling")


class AdapterSlots(nn.Module):
    """S slots for adapters of at most R units, and the adapters in them, by name.

    The base of `AdapterBank`, which describes the attributes.
    """

    down_weights: Tensor
    up_weights: Tensor
    down_biases: Tensor | None
    up_biases: Tensor | None
    ranks: Tensor
    scalings: Tensor

    def __init__(
        self, hidden_size: int, units: int, slots: int, bias: bool, activation: str, backend: str,
        device: torch.device | str | None, dtype: torch.dtype | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.hidden_size, self.max_bottleneck_size, self.slots = hidden_size, units, slots
        self.activation, self.backend = activation, backend
        shapes = {
            "down_weights": (slots, units, hidden_size),
            "up_weights": (slots, hidden_size, units),
            "down_biases": (slots, units) if bias else None,
            "up_biases": (slots, hidden_size) if bias else None,
        }
        for name, shape in shapes.items():
            stack = None if shape is None else torch.zeros(shape, device=device, dtype=dtype)
            self.register_buffer(name, stack, persistent=False)
        wide = torch.promote_types(self.down_weights.dtype, torch.float32)
        for name, kind in {"scalings": wide, "ranks": torch.int32}.items():
            zeros = torch.zeros(slots, device=device, dtype=kind)
            self.register_buffer(name, zeros, persistent=False)
        self.adapters = nn.ModuleDict()
        self._slot_of: dict[str, int] = {}
        self._facts: dict[str, Facts] = {}  # what the slots hold that is no parameter
        self._bindings: Bindings | None = None
        self.register_load_state_dict_post_hook(_rebind)

    def _make(self, name: str, parts: Parts) -> BottleneckAdapter:
        """An adapter whose parameters lie in a free slot, without values but for its scaling."""
        slot = min(set(range(self.slots)) - set(self._slot_of.values()))
        size = parts.bottleneck_size
        learned = "scaling" in parts.tensors
        adapter = BottleneckAdapter(
            self.hidden_size, size, activation=self.activation, bias=parts.bias,
            scaling="learned" if learned else parts.scaling, backend=self.backend, device="meta",
            dtype=self.down_weights.dtype,
        )  # fmt: skip
        for key, parameter in list(adapter.named_parameters()):
            module, _, own = key.rpartition(".")
            view = self._view(key, slot, parameter.shape)
            adapter.get_submodule(module).register_parameter(own, nn.Parameter(view))
        adapter.register_state_dict_post_hook(_give_own_memory)
        if size < self.max_bottleneck_size:
            refuse_fused_steps()
        self.adapters[name] = adapter
        self._slot_of[name] = slot
        self._write_facts([name])
        self._bindings = None
        return adapter

    @torch.no_grad()
    def _write_facts(self, names: Collection[str]) -> None:
        """Tell the kernels of the ranks of adapters, of scalings that are not learned, and of
        biases that are not there, in whose place a slot may have those of another adapter.
        """
        for name in names:
            slot, adapter = self._slot_of[name], self.adapters[name]
            self.ranks[slot].fill_(adapter.bottleneck_size)  # type: ignore[arg-type]
            self._facts[name] = scaling, *there = facts_of(adapter)
            if scaling is not None:
                self.scalings[slot].fill_(scaling)
            for stack, has_bias in zip((self.down_biases, self.up_biases), there, strict=True):
                if stack is not None and not has_bias:
                    stack[slot].zero_()

    @torch.no_grad()
    def _free(self, name: str) -> None:
        """Leave the slot of an adapter to others. It goes on with memory of its own, so that what
        still holds it, as an optimizer may, does not write into the next adapter of the slot.
        """
        slot = self._slot_of[name]
        for key, parameter in self.adapters[name].named_parameters():
            stack = getattr(self, _STACK_OF.get(key, ""), None)
            if stack is not None and lies_in(parameter, stack, slot):
                parameter.data = _dense_copy(parameter.detach())
        for stack in (self.ranks, self.scalings):
            stack[slot].zero_()
        del self.adapters[name], self._slot_of[name], self._facts[name]
        self._bindings = None

    # Where the parameters lie

    def _bound(self) -> Bindings:
        """The adapters as they are, with scalings that were set on them written to their slots."""
        if self._bindings is None or not self._bindings.hold():
            self._bindings = self._bind()
        return self._bindings

    def _bind(self) -> Bindings:
        found = Bindings([], True, [], [], [], [], [], [], [], [])
        adapters, are_in_slots = [], True
        stacks = [getattr(self, kind) for kind in ops.KINDS]
        of_projections: list[Tensor | None] = []
        learned: list[Tensor] = []
        for name, slot in self._slot_of.items():
            adapter: Any = self.adapters[name]
            self._follow(name, adapter)
            state, down, up = adapter.__dict__, adapter.down_proj, adapter.up_proj
            found.options.append((*_OPTIONS(state), state.get("scaling")))
            found.options_in.append(state)
            found.projections_in.append(adapter._modules)
            found.objects.extend((down, up))
            found.parameters_in.extend((down._parameters, up._parameters))
            of_projections.extend((down.weight, down.bias, up.weight, up.bias))
            parameters = parameters_of(adapter)
            adapters.append((slot, parameters))
            for parameter, stack in zip(parameters, stacks, strict=True):
                if parameter is None:
                    continue
                are_in_slots &= stack is not None and lies_in(parameter, stack, slot)
                if not _torch.is_subclass(parameter):
                    found.parameters.append(parameter)
            if isinstance(adapter.scaling, Tensor):
                learned.append(adapter.scaling)
                found.scalings_in.append(adapter._parameters)
        found.objects.extend((*of_projections, *learned))
        found.addresses.extend(map(Tensor.data_ptr, found.parameters))
        return found._replace(adapters=adapters, are_in_slots=are_in_slots)

    def _follow(self, name: str, adapter: Any) -> None:
        """Follow a scaling that was set on an adapter; refuse what a bank cannot follow."""
        check_followed(name, adapter, self.activation, self._facts[name])
        if facts_of(adapter) != self._facts[name]:
            self._write_facts([name])

    def _view(self, key: str, slot: int, shape: Sequence[int]) -> Tensor:
        stack = getattr(self, _STACK_OF[key])
        return ops.part_of(stack, ops.KINDS.index(_STACK_OF[key]), slot, shape).detach()

    @torch.no_grad()
    def _put_into_slots(self) -> None:
        """Let parameters that torch put elsewhere lie in their slots again, with their values."""
        self._bindings = None
        for name, slot in self._slot_of.items():
            for key, parameter in self.adapters[name].named_parameters():
                stack = getattr(self, _STACK_OF.get(key, ""), None)
                if stack is None or _torch.is_subclass(parameter):  # parametrized, or sharded
                    continue
                if not lies_in(parameter, stack, slot):
                    view = self._view(key, slot, parameter.shape)
                    view.copy_(parameter.detach())
                    parameter.data = view

    def _apply(self, fn: Any, recurse: bool = True) -> "AdapterSlots":
        scalings = self.scalings
        super()._apply(fn, recurse)
        if self.scalings.dtype not in (torch.float32, torch.float64):  # as kernels read them
            self.scalings = scalings.to(self.scalings.device, torch.float32)
        self._put_into_slots()
        self.ranks.zero_()
        self._write_facts(self._slot_of)  # which to_empty has forgotten
        return self

    # Copies and state dicts

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bindings": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        refuse_fused_steps()
        self._put_into_slots()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, adapter in self.adapters.items():
            if not isinstance(adapter.scaling, Tensor):
                scale = torch.tensor(adapter.scaling, dtype=self.scalings.dtype, device="cpu")
                destination[f"{prefix}scalings.{name}"] = scale

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Make the adapters that are not there yet, for the modules below to load; these take none
        that does not fit.
        """
        found: dict[str, dict[str, Any]] = {}
        for key in [key for key in state_dict if key.startswith(f"{prefix}adapters.")]:
            name, dot, rest = key.removeprefix(f"{prefix}adapters.").partition(".")
            if dot:
                found.setdefault(name, {})[rest] = state_dict[key]
        for name in {**found, **self._slot_of}:
            key, tensors = f"{prefix}scalings.{name}", found.get(name)
            try:
                scale = scaling_of(name, state_dict.get(key))
                if tensors is not None:
                    self._fit(name, tensors, 1.0 if scale is None else scale)
            except (TypeError, ValueError) as error:
                error_msgs.append(str(error))
                self._keep(name, state_dict, f"{prefix}adapters.{name}.")
                state_dict.pop(key, None)
                continue
            if isinstance(self.adapters[name].scaling, Tensor):
                continue  # a float beside it is an unexpected key
            if scale is None:
                missing_keys.append(key)
                continue
            del state_dict[key]
            setattr(self.adapters[name], "scaling", scale)  # noqa: B010  # mypy: no module
            self._write_facts([name])
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _fit(self, name: str, tensors: Mapping[str, Any], scale: float) -> None:
        """Make the adapter of a state dict, or see that it fits the one that is there."""
        if name not in self._slot_of:
            self._check_new(name)
            parts = parts_of(tensors)._replace(scaling=scale)
            self._check_fit(name, parts)
            self._make(name, parts)
            return
        there = dict(self.adapters[name].named_parameters())
        wrong = [
            f"{key} {list(tensor.shape)} for {list(there[key].shape)}"
            for key, tensor in tensors.items()
            if key in there and isinstance(tensor, Tensor) and tensor.shape != there[key].shape
        ]
        if wrong:
            raise ValueError(
                f"adapter {name!r} must have the shapes that it has in this bank, got "
                f"{', '.join(wrong)}.\n  hint: remove it first, or load a new bank."
            )

    def _keep(self, name: str, state_dict: Any, prefix: str) -> None:
        """Let the modules below load what they have, or nothing where there is no such adapter."""
        there: dict[str, Tensor] = {}
        if name in self._slot_of:
            there = dict(self.adapters[name].named_parameters())
        for key in [key for key in state_dict if key.startswith(prefix)]:
            own = key.removeprefix(prefix)
            if own in there:
                state_dict[key] = there[own].detach()
            else:
                del state_dict[key]

    def _check_fit(self, name: str, parts: Parts) -> None:
        check_fit(
            name, parts, self.hidden_size, self.max_bottleneck_size, self.activation,
            self.down_biases is not None,
        )  # fmt: skip

    def _check_new(self, name: str) -> None:
        """Refuse a name, or any where there is no slot left.

        Raises:
            TypeError, ValueError: as `AdapterBank.add`.
        """
        if not isinstance(name, str):
            raise TypeError(f"the name of an adapter must be a string, got {name!r}.")
        if name in self._slot_of:
            raise ValueError(
                f"this bank already has an adapter {name!r}.\n  hint: remove it first."
            )
        if not name or "." in name or hasattr(nn.ModuleDict(), name):
            raise ValueError(
                f"{name!r} cannot name an adapter: it becomes the name of a module, which has no "
                "dots and is no method."
            )
        if len(self._slot_of) == self.slots:
            raise ValueError(
                f"all {self.slots} slots of this bank are taken, by {', '.join(self._slot_of)}; "
                f"there is none for {name!r}.\n"
                f"  hint: remove one, or make a bank with slots={2 * self.slots}."
            )


def parameters_of(adapter: Any) -> tuple[Tensor | None, ...]:
    """The parameters of an adapter in the order of `ops.KINDS`."""
    down, up, scaling = adapter.down_proj, adapter.up_proj, adapter.scaling
    learned = scaling if isinstance(scaling, Tensor) else None
    return down.weight, up.weight, down.bias, up.bias, learned


def lies_in(parameter: Tensor, stack: Tensor, slot: int) -> bool:
    """Whether a parameter is a part of the stack, from the start of the slot."""
    if (parameter.dtype, parameter.device) != (stack.dtype, stack.device) or stack.is_meta:
        return False
    if _torch.is_subclass(parameter):  # as FSDP and tensor parallelism have them
        return False
    return parameter.data_ptr() == stack.data_ptr() + slot * stack.stride(0) * stack.itemsize


def _give_own_memory(adapter: Any, state_dict: Any, prefix: str, _: Any) -> None:
    """Let no tensor of a state dict, the adapter's own or the bank's, be a part of a stack: what
    saves it would save all slots, and safetensors takes no tensor with gaps.
    """
    for key in _STACK_OF:
        tensor = state_dict.get(f"{prefix}{key}")
        if tensor is None or isinstance(tensor, nn.Parameter):  # the latter: keep_vars=True
            continue
        if not tensor.is_meta and not _torch.is_subclass(tensor):
            state_dict[f"{prefix}{key}"] = _dense_copy(tensor)


@torch.inference_mode(False)  # whose tensors autograd does not take later
def _dense_copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _rebind(bank: Any, _: Any) -> None:
    """Back into the slots after assign=True; those on the meta device become real with it."""
    loaded = [p for p in bank.adapters.parameters() if not p.is_meta]
    if bank.down_weights.is_meta and loaded:
        for name, stack in bank.named_buffers(recurse=False):
            setattr(bank, name, torch.zeros_like(stack, device=loaded[0].device))
        bank._write_facts(bank._slot_of)
    bank._put_into_slots()
