"""`AdapterBank`: many adapters of one place in a model, of which each token takes its own."""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adapterkern import _torch
from adapterkern.activations import canonical_name
from adapterkern.grouped import functional, ops, reference
from adapterkern.grouped.call import GroupedCall, make_grouped_call
from adapterkern.grouped.routing import AdapterRouting
from adapterkern.modules.bank_parts import Parts, check_fit, parts_of
from adapterkern.modules.bottleneck import BottleneckAdapter

# The stack of each parameter of an adapter, in the order of `ops.KINDS`.
_STACK_OF = {
    "down_proj.weight": "down_weights",
    "up_proj.weight": "up_weights",
    "down_proj.bias": "down_biases",
    "up_proj.bias": "up_biases",
    "scaling": "scalings",
}
assert tuple(_STACK_OF.values()) == ops.KINDS


class AdapterBank(nn.Module):
    """Bottleneck adapters by name, of which each token of a batch takes its own.

    y[t] = residual[t] + skip[t] + scaling * up(act(down(x[t]))) of the adapter that the routing
    names for token t; residual[t] + skip[t] where it names none.

    Args:
        hidden_size: H, the width of x.
        max_bottleneck_size: R, the most units of an adapter.
        slots: S, the most adapters at a time.
        activation: of all adapters, as in `adapterkern.bottleneck_adapter`.
        bias: whether adapters may have biases.
        residual: "input" adds x; None adds nothing.
        backend: as in `adapterkern.bottleneck_adapter`.
        device, dtype: of the weights; torch's defaults if not given.

    Attributes:
        down_weights, up_weights, down_biases, up_biases: [S, R, H], [S, H, R], [S, R], [S, H], the
            slots, at addresses that stay: `add` and `remove` write one slot in place, so that CUDA
            graphs stay valid. A bank does not grow; a larger one is a new one.
        ranks: [S] int32, the units of each adapter; 0 where there is none.
        scalings: [S] float32 (float64 of a float64 bank).
        adapters: by name, `BottleneckAdapter`s whose parameters lie in the slots: one Parameter a
            slot, to be trained, frozen or run alone. Where an adapter has fewer units than R, its
            up_proj.weight has gaps, which fused optimizers and FSDP do not take.

    After a backward, an adapter that no token took has gradients None, so that an optimizer leaves
    it alone; in graphs (torch.compile, CUDA graphs), which do not know, zeros.

    Raises:
        TypeError, ValueError: a size is no integer or below 1, or a name is unknown.

    Source: Houlsby et al. 2019, arXiv:1902.00751; many in one batch: docs/many-adapters.md.
    """

    down_weights: Tensor
    up_weights: Tensor
    down_biases: Tensor | None
    up_biases: Tensor | None
    ranks: Tensor
    scalings: Tensor

    def __init__(
        self,
        hidden_size: int,
        max_bottleneck_size: int = 64,
        slots: int = 16,
        *,
        activation: str = "gelu",
        bias: bool = True,
        residual: str | None = "input",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        units = max_bottleneck_size
        # These make the checks of all options, and no memory of weights.
        BottleneckAdapter(hidden_size, units, backend=backend, device="meta", dtype=dtype)
        AdapterRouting(1, slots, device="meta")
        if residual not in ("input", None):
            raise ValueError(f'residual must be "input" or None, got {residual!r}.')
        self.hidden_size, self.max_bottleneck_size, self.slots = hidden_size, units, slots
        self.activation, self.residual, self.backend = canonical_name(activation), residual, backend
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
        self._scales: dict[str, float] = {}  # what `scalings` holds of adapters that learn none
        self._routings: weakref.WeakSet[AdapterRouting] = weakref.WeakSet()

    # The adapters

    @property
    def names(self) -> list[str]:
        """The names of the adapters, the oldest first."""
        return list(self._slot_of)

    def __getitem__(self, name: str) -> BottleneckAdapter:
        """The adapter of that name, whose parameters are those of the bank.

        Raises:
            KeyError: there is none.
        """
        self._check_known([name])
        return self.adapters[name]  # type: ignore[return-value]

    def __contains__(self, name: object) -> bool:
        return name in self._slot_of

    def __len__(self) -> int:
        return len(self._slot_of)

    def ids(self, names: Iterable[str | None]) -> Tensor:
        """The slots of adapters as `AdapterRouting.update` takes them: int32, -1 for None.

        They lie on the CPU, so that the host knows what a batch needs.

        Raises:
            KeyError: a name is unknown.
            TypeError: names is a single string.
        """
        if isinstance(names, str):
            raise TypeError(f"names must be a list of names, got the string {names!r}.")
        listed = list(names)
        self._check_known([name for name in listed if name is not None])
        slots = [-1 if name is None else self._slot_of[name] for name in listed]
        return torch.tensor(slots, dtype=torch.int32, device="cpu")

    def add(
        self, name: str, adapter: BottleneckAdapter | Mapping[str, Tensor]
    ) -> BottleneckAdapter:
        """Copy an adapter into a free slot, in place.

        Args:
            name: a new one; it becomes the name of a module, so it has no dots.
            adapter: a `BottleneckAdapter`, or the state dict of one: with the bank's activation, no
                dropout, H features and at most `max_bottleneck_size` units. A state dict that holds
                no learned scaling has a scaling of 1. What is frozen stays so.

        Returns:
            The adapter as the bank has it, as `bank[name]` gives it.

        Raises:
            TypeError: it is neither, or the name is no string.
            ValueError: the name is taken or has a dot, the bank is full, or the adapter does not
                fit; the message lists every reason.
        """
        self._check_new(name)
        parts = parts_of(adapter)
        check_fit(
            name, parts, self.hidden_size, self.max_bottleneck_size, self.activation,
            self.down_biases is not None,
        )  # fmt: skip
        made = self._make(name, parts)
        with torch.no_grad():
            for key, parameter in made.named_parameters():
                parameter.copy_(parts.tensors[key])
                parameter.requires_grad_(key not in parts.frozen)
        return made

    def remove(self, name: str) -> None:
        """Free the slot of an adapter, in place: from then on, tokens of that slot take none.

        Raises:
            KeyError: there is none of that name.
            ValueError: the last batch of a routing that this bank has served still names it.
        """
        self._check_known([name])
        slot = self._slot_of[name]
        if any(r.used is not None and slot in r.used for r in self._routings):
            raise ValueError(
                f"adapter {name!r} is in use: a routing that this bank has served names it.\n"
                "  hint: routing.update(...) for a batch without it, or drop that routing."
            )
        with torch.no_grad():
            for stack in (self.ranks, self.scalings, self.down_biases, self.up_biases):
                if stack is not None:
                    stack[slot].zero_()
        del self.adapters[name], self._slot_of[name], self._scales[name]

    # The call

    def forward(
        self,
        x: Tensor,
        routing: AdapterRouting,
        skip: Tensor | None = None,
        *,
        residual: Tensor | None = None,
    ) -> Tensor:
        """y [..., H], contiguous but for a batch without any adapter, whose y may be x itself.

        Args:
            x: [..., H], T tokens.
            routing: updated for these tokens, with ids of this bank.
            skip: [..., H], added too.
            residual: [..., H], added in place of what the bank adds.

        Raises:
            TypeError, ValueError, BackendUnsupportedError: as
                `adapterkern.grouped_bottleneck_adapter`.
        """
        call, leaves = self._prepared(x, routing, skip, residual)
        if routing.used == () and not _in_graph(x):
            functional.validated(call)
            return reference.without_adapter(call, copies=False)
        return functional.run_call(call, self.backend, leaves)

    def as_call(
        self,
        x: Tensor,
        routing: AdapterRouting,
        skip: Tensor | None = None,
        *,
        residual: Tensor | None = None,
    ) -> GroupedCall:
        """The call that `forward` makes of these arguments, as `adapterkern.explain` takes it."""
        return self._prepared(x, routing, skip, residual)[0]

    def unfused_reason(self) -> str | None:
        """None: nothing keeps a bank from the kernels but what they say themselves."""
        return None

    def _prepared(
        self, x: Tensor, routing: AdapterRouting, skip: Tensor | None, residual: Tensor | None
    ) -> tuple[GroupedCall, ops.Leaves]:
        functional.check_routing(x, routing)
        in_graph = _in_graph(x)
        if not in_graph:
            self._routings.add(routing)
        leaves, are_slots = self._leaves(routing, in_graph)
        records = torch.is_grad_enabled() and any(p.requires_grad for p in leaves.parameters)
        call = make_grouped_call(
            x, self.down_weights, self.up_weights, self.down_biases, self.up_biases,
            self.residual if residual is None else residual, skip, self.scalings, self.ranks,
            routing.buffers(), self.activation, records,
        )  # fmt: skip
        if not are_slots:  # FSDP, or torch.func: the parameters lie elsewhere for now
            return ops.with_stacks(call, leaves), ops.NO_LEAVES
        return call, leaves if records else ops.NO_LEAVES

    def _leaves(self, routing: AdapterRouting, in_graph: bool) -> tuple[ops.Leaves, bool]:
        """The parameters that a batch takes, and whether they lie in the slots."""
        used = routing.used
        if used is None and torch.is_grad_enabled() and not in_graph:
            used = routing.used_slots()  # waits for the device
        kinds, slots, parameters = [], [], []
        are_slots = not _torch.functorch_is_active()
        for name, slot in self._slot_of.items():
            if used is not None and not in_graph and slot not in used:
                continue
            adapter: Any = self.adapters[name]
            self._check_unchanged(name, adapter, in_graph)
            for kind, parameter in enumerate(_parameters_of(adapter)):
                if parameter is not None:
                    kinds.append(kind)
                    slots.append(slot)
                    parameters.append(parameter)
                    if are_slots and not in_graph:
                        stack = getattr(self, ops.KINDS[kind])
                        are_slots = _lies_in(parameter, stack, slot)
        return ops.Leaves(tuple(kinds), tuple(slots), tuple(parameters)), are_slots

    def _check_unchanged(self, name: str, adapter: Any, in_graph: bool) -> None:
        """Follow a scaling that was set on the adapter; refuse what a bank cannot follow."""
        if adapter.activation != self.activation or adapter.dropout:
            raise ValueError(
                f"adapter {name!r} must keep the bank's activation, {self.activation}, and a "
                f"dropout of 0, got {adapter.activation} and {adapter.dropout}."
            )
        scale = adapter.scaling
        if isinstance(scale, float) and scale != self._scales[name] and not in_graph:
            with torch.no_grad():
                self.scalings[self._slot_of[name]].fill_(scale)
            self._scales[name] = scale

    # The slots

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
        with torch.no_grad():
            self.scalings[slot].fill_(parts.scaling)
            self.ranks[slot].fill_(size)
        self.adapters[name] = adapter
        self._slot_of[name], self._scales[name] = slot, parts.scaling
        return adapter

    def _view(self, key: str, slot: int, shape: Sequence[int]) -> Tensor:
        stack = getattr(self, _STACK_OF[key])
        return ops.part_of(stack, ops.KINDS.index(_STACK_OF[key]), slot, shape).detach()

    def _put_into_slots(self) -> None:
        """Let parameters that torch put elsewhere lie in their slots again, with their values."""
        for name, slot in self._slot_of.items():
            for key, parameter in self.adapters[name].named_parameters():
                stack = getattr(self, _STACK_OF[key])
                if not _lies_in(parameter, stack, slot):
                    view = self._view(key, slot, parameter.shape)
                    view.copy_(parameter.detach())
                    parameter.data = view

    def _apply(self, fn: Any, recurse: bool = True) -> "AdapterBank":
        scalings = self.scalings
        super()._apply(fn, recurse)
        if self.scalings.dtype not in (torch.float32, torch.float64):  # as kernels read them
            self.scalings = scalings.to(self.scalings.device, torch.float32)
        self._put_into_slots()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._routings = weakref.WeakSet()
        self._put_into_slots()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_routings": None}  # a copy serves routings of its own

    # Names
    def _check_known(self, names: Iterable[str]) -> None:
        unknown = [name for name in dict.fromkeys(names) if name not in self._slot_of]
        if unknown:
            raise KeyError(
                f"unknown adapters: {', '.join(map(repr, unknown))} (this bank has "
                f"{', '.join(self._slot_of) or 'none'})."
            )

    def _check_new(self, name: str) -> None:
        if not isinstance(name, str):
            raise TypeError(f"the name of an adapter must be a string, got {name!r}.")
        if name in self._slot_of:
            raise ValueError(
                f"this bank already has an adapter {name!r}.\n  hint: bank.remove({name!r}) first."
            )
        if not name or "." in name or hasattr(nn.ModuleDict(), name):
            raise ValueError(
                f"{name!r} cannot name an adapter: it becomes the name of a module, which has no "
                "dots and is no method."
            )
        if len(self._slot_of) == self.slots:
            raise ValueError(
                f"all {self.slots} slots of this bank are taken, by {', '.join(self._slot_of)}.\n"
                f"  hint: remove one, or make AdapterBank(..., slots={2 * self.slots})."
            )

    def extra_repr(self) -> str:
        return (
            f"{self.hidden_size}, max_bottleneck_size={self.max_bottleneck_size}, "
            f"slots={self.slots}, activation={self.activation!r}, residual={self.residual!r}"
        )


def _in_graph(x: Tensor) -> bool:
    """Whether a graph is being made, whose batches are not the one at hand."""
    return torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _parameters_of(adapter: Any) -> tuple[Tensor | None, ...]:
    """The parameters of an adapter in the order of `ops.KINDS`."""
    down, up, scaling = adapter.down_proj, adapter.up_proj, adapter.scaling
    learned = scaling if isinstance(scaling, Tensor) else None
    return down.weight, up.weight, down.bias, up.bias, learned


def _lies_in(parameter: Tensor, stack: Tensor, slot: int) -> bool:
    """Whether a parameter is a part of the stack, from the start of the slot."""
    if (parameter.dtype, parameter.device) != (stack.dtype, stack.device) or stack.is_meta:
        return False
    return parameter.data_ptr() == stack.data_ptr() + slot * stack.stride(0) * stack.itemsize
