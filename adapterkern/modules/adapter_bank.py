"""`AdapterBank`: many adapters of one place in a model, of which each token takes its own."""

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from adapterkern import _torch, dispatch
from adapterkern.activations import canonical_name
from adapterkern.grouped import functional, ops, reference
from adapterkern.grouped.call import GroupedCall, make_grouped_call
from adapterkern.grouped.routing import AdapterRouting
from adapterkern.modules.bank_parts import parts_of
from adapterkern.modules.bank_slots import Adapters, AdapterSlots, parameters_of
from adapterkern.modules.bottleneck import BottleneckAdapter


class AdapterBank(AdapterSlots):
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
            up_proj.weight has gaps, which fused optimizers and FSDP refuse. Their state dicts have
            memory of their own, and scalings.NAME of each that learns none; an empty bank that
            loads such a state dict makes the adapters.

    After a backward, an adapter that no token took has gradients None, so that an optimizer leaves
    it alone; in graphs (torch.compile, CUDA graphs), which do not know, and under FSDP, whose other
    processes wait for them, zeros. DistributedDataParallel needs find_unused_parameters=True.

    A bank reads the weights of its adapters and calls none: hooks on them do not run.

    Raises:
        TypeError, ValueError: a size is no integer or below 1, or a name is unknown.

    Source: Houlsby et al. 2019, arXiv:1902.00751; many in one batch: docs/many-adapters.md.
    """

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
        # These make the checks of all options, and no memory of weights.
        if max_bottleneck_size is None:
            raise TypeError("max_bottleneck_size must be an integer, got None.")
        BottleneckAdapter(
            hidden_size, max_bottleneck_size, backend=backend, device="meta", dtype=dtype
        )
        AdapterRouting(1, slots, device="meta")
        if residual not in ("input", None):
            raise ValueError(f'residual must be "input" or None, got {residual!r}.')
        super().__init__(
            hidden_size, max_bottleneck_size, slots, bias, canonical_name(activation), backend,
            device, dtype,
        )  # fmt: skip
        self.residual = residual
        self._routings: weakref.WeakSet[AdapterRouting] = weakref.WeakSet()
        self._last: Any = _no_routing  # a weak reference to the latest of them

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
            TypeError: names is a single string, or no list.
        """
        if isinstance(names, str) or not isinstance(names, Iterable):
            raise TypeError(f"names must be a list of names, got {names!r}.")
        listed = list(names)
        self._check_known([name for name in listed if name is not None])
        return torch.tensor(self.slots_of(listed), dtype=torch.int32, device="cpu")

    def slots_of(self, names: Iterable[str | None]) -> list[int]:
        """The slots of adapters; -1 for None, and for a name that this bank does not have."""
        return [-1 if name is None else self._slot_of.get(name, -1) for name in names]

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
        self._check_fit(name, parts)
        if not self.down_weights.is_meta and any(t.is_meta for t in parts.tensors.values()):
            raise ValueError(
                f"adapter {name!r}: its tensors must have values; some are on the meta device.\n"
                "  hint: to_empty(device=...) and load them first."
            )
        made = self._make(name, parts)
        try:
            with torch.no_grad():
                for key, parameter in made.named_parameters():
                    parameter.copy_(parts.tensors[key])
                    parameter.requires_grad_(key not in parts.frozen)
        except BaseException:  # as where memory ends
            self._free(name)
            raise
        return made

    def remove(self, name: str) -> None:
        """Free the slot of an adapter, in place: from then on, tokens of that slot take none.

        The adapter, where something still holds it, goes on with memory of its own.

        Raises:
            KeyError: there is none of that name.
            ValueError: the last batch of a routing that this bank has served still names it.
        """
        self._check_known([name])
        self.check_unused(name)
        self._free(name)

    def check_unused(self, name: str) -> None:
        """Refuse an adapter that `remove` would not take away.

        Raises:
            ValueError: as `remove`.
        """
        slot = self._slot_of[name]
        if any(slot in routing.used_slots() for routing in self._routings):
            raise ValueError(
                f"adapter {name!r} is in use: a routing that this bank has served names it.\n"
                "  hint: routing.update([]), or for a batch without it, or drop that routing."
            )

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
        # In this order, for a graph would be of that batch. Stacks that are not the bank's own are
        # made of parameters that want their gradient at every call.
        own = call.down_weights is self._buffers["down_weights"]
        if not in_graph(x) and own and routing.used == ():
            dispatch.select(call, self.backend)  # which refuses what is not valid
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
        traced = in_graph(x)
        if not traced and self._last() is not routing:
            self._routings.add(routing)
            self._last = weakref.ref(routing)
        adapters, are_slots = self._adapters_of()
        records = torch.is_grad_enabled()
        if records and are_slots and not traced:
            used = routing.used_slots()  # waits for the device, if that alone knows
            adapters = [adapter for adapter in adapters if adapter[0] in used]
        records = records and any(
            p is not None and p.requires_grad for _, parameters in adapters for p in parameters
        )
        stacks: dict[str, Any] = self._buffers  # asked for once: nn.Module searches for them
        call = make_grouped_call(
            x, stacks["down_weights"], stacks["up_weights"], stacks["down_biases"],
            stacks["up_biases"], self.residual if residual is None else residual, skip,
            stacks["scalings"], stacks["ranks"], routing.buffers(), self.activation, records,
        )  # fmt: skip
        if not are_slots:  # FSDP, or torch.func: the parameters lie elsewhere for now
            return ops.with_stacks(call, ops.leaves_of(adapters)), ops.NO_LEAVES
        # Frozen ones too, for autograd to see that one changes before the backward.
        has_leaves = records or (call.gradient and not traced)
        return call, ops.leaves_of(adapters) if has_leaves else ops.NO_LEAVES

    def _adapters_of(self) -> tuple[Adapters, bool]:
        """The adapters, and whether their parameters lie in the slots."""
        transformed = _torch.functorch_is_active()
        fake = type(self._buffers["down_weights"]) is not Tensor
        if transformed or fake or torch.compiler.is_compiling():  # then no tensor has an address
            for name in self._slot_of:
                self._follow(name, self.adapters[name])
            every = [(slot, parameters_of(self.adapters[n])) for n, slot in self._slot_of.items()]
            return every, not transformed
        bindings = self._bound()
        return bindings.adapters, bindings.are_in_slots

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._routings, self._last = weakref.WeakSet(), _no_routing

    def __getstate__(self) -> dict[str, Any]:
        # A copy serves routings of its own.
        return {**super().__getstate__(), "_routings": None, "_last": None}

    # Names
    def _check_known(self, names: Iterable[str]) -> None:
        unknown = [n for n in names if not isinstance(n, str) or n not in self._slot_of]
        if unknown:
            raise KeyError(
                f"unknown adapters: {', '.join(dict.fromkeys(map(repr, unknown)))} (this bank has "
                f"{', '.join(self._slot_of) or 'none'})."
            )

    def extra_repr(self) -> str:
        return (
            f"{self.hidden_size}, max_bottleneck_size={self.max_bottleneck_size}, "
            f"slots={self.slots}, activation={self.activation!r}, residual={self.residual!r}"
        )


def in_graph(x: Tensor) -> bool:
    """Whether a graph is being made, whose batches are not the one at hand."""
    tracing = torch.compiler.is_compiling() or _torch.jit_is_tracing()
    return tracing or (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _no_routing() -> None:
    return None
