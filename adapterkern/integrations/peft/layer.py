"""A linear layer with its adapters."""

import threading
from collections.abc import Sequence
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from adapterkern import dispatch
from adapterkern.backends.base import BackendUnsupportedError
from adapterkern.integrations.peft.blocks import output_size
from adapterkern.integrations.peft.checkpoint import CONTAINER
from adapterkern.integrations.peft.config import BottleneckConfig
from adapterkern.integrations.peft.grouped import NamedBatch
from adapterkern.modules.bottleneck import BottleneckAdapter
from adapterkern.modules.deferral import is_deferred

BASE = "__base__"  # PEFT's name for "no adapter" in a mixed batch
CANNOT_MERGE = (
    "bottleneck adapters cannot be merged or unmerged: they are nonlinear in the layer's output, "
    "so no linear weight equals layer and adapter together.\n"
    "  hint: keep them, or call unload() for the base model"
)


class BlockInput(threading.local):
    """What an FFN reads, kept between its first and its last layer, in each thread apart.

    Its method `keep` is a forward pre-hook of the first layer: a copied model copies the object
    with it, and torch.compile traces a method where it cannot trace an object that is called.
    """

    value: Tensor | None = None

    def keep(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Keep the layer's input."""
        self.value = args[0] if args else None

    def take(self) -> Tensor | None:
        """Return what was kept, and keep it no longer: it may hold a graph."""
        value, self.value = self.value, None
        return value

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return BlockInput, ()


class BottleneckLinear(nn.Module, BaseTunerLayer):
    """A linear layer (nn.Linear, Conv1D, quantised), then the active adapters one after another.

    An adapter beside the FFN that the layer ends reads x of that FFN in place of what is before it,
    and adds to that.

    Shapes: x [..., K] to y [..., H], in the dtype of the base layer's output [..., H].
    """

    adapter_layer_names = (CONTAINER,)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: BottleneckConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_adapter = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.parallel: set[str] = set()  # adapters beside the FFN
        self.reads: tuple[nn.Module, BlockInput] | None = None  # a tuple: the module is not ours
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Add an adapter, on the base layer's device and in its dtype; the tuner activates it."""
        size = output_size(self.get_base_layer())
        assert size is not None  # BottleneckModel has checked every target
        adapter = BottleneckAdapter(size, **config.adapter_arguments())
        self.bottleneck_adapter[adapter_name] = adapter
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def place_beside(self, adapter_name: str, up: nn.Module) -> None:
        """Let an adapter read what `up` reads, the first layer of the FFN that this one ends."""
        self.parallel.add(adapter_name)
        if self.reads is None:
            if isinstance(up, BaseTunerLayer):
                up = up.get_base_layer()  # which stays when the adapters of that layer go
            self.reads = (up, BlockInput())
            up.register_forward_pre_hook(self.reads[1].keep)

    def stop_reading(self) -> None:
        """Take the hook from the first layer of the FFN."""
        if self.reads is not None:
            up, block_input = self.reads
            hooks = up._forward_pre_hooks
            for key in [key for key, hook in hooks.items() if hook == block_input.keep]:
                del hooks[key]
        self.reads = None

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; see PEFT for which is active then."""
        super().delete_adapter(adapter_name)
        self.parallel.discard(adapter_name)
        if not self.parallel:
            self.stop_reading()

    def forward(
        self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Tensor:
        """base_layer(x), adapted by the active adapters or by the one named for each input."""
        block_input = None if self.reads is None else self.reads[1].take()
        y = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return y
        if adapter_names is not None:
            return self._adapt_by_input(y, block_input, adapter_names)
        for name in self.active_adapters:
            if name in self.bottleneck_adapter:
                y = self._adapt(y, block_input, name)
        return y

    def adapters_to_run(self) -> list[BottleneckAdapter]:
        """The active adapters, in the order of their calls."""
        if self.disable_adapters:
            return []
        adapters: Any = self.bottleneck_adapter
        return [adapters[name] for name in self.active_adapters if name in adapters]

    def runs_beside(self, adapter: nn.Module) -> bool:
        """Whether an adapter reads the FFN's input."""
        return any(self.bottleneck_adapter[name] is adapter for name in self.parallel)

    def _adapt(self, y: Tensor, block_input: Tensor | None, name: str) -> Tensor:
        adapter = self.bottleneck_adapter[name]
        if name in self.parallel:
            adapted = adapter(_read_by(name, y, block_input), residual=y)
        else:
            adapted = y if is_deferred(adapter) else adapter(y)
        # A learned scaling stays float32 in a half-precision model and would widen the result.
        return adapted.to(y.dtype)

    def _adapt_by_input(
        self, y: Tensor, block_input: Tensor | None, names: Sequence[str]
    ) -> Tensor:
        """y [B, ..., H], or [B * T, H] from blocks that flatten their tokens; B names."""
        if not names or len(y) % len(names) or not (y.dim() == 2 or len(y) == len(names)):
            raise ValueError(
                f"adapter_names must name one adapter for each input, got {len(names)} names for "
                f"hidden states of shape {list(y.shape)}.\n"
                "  hint: where the model repeats its inputs by itself, call it with set_adapter, "
                "once for each adapter"
            )
        adapters, different = self.bottleneck_adapter, dict.fromkeys(names)
        # What is left out here is BASE, and adapters of other layers.
        used = {name: adapters[name] for name in different if name in adapters}
        if not used:
            return y
        if len(used) == len(different) == 1:
            return self._adapt(y, block_input, next(iter(used)))
        batch = names if isinstance(names, NamedBatch) else NamedBatch(names)
        plan = batch.plan(self, used, self.parallel, y)
        adapted, apart = y, list(plan.apart)
        for group in plan.groups:
            read = _read_by(group.names[0], y, block_input) if group.beside else y
            try:
                adapted = group.run(read, adapted, batch.routing(group, y)).to(y.dtype)
            except BackendUnsupportedError as error:  # of a backend that is named, or strict
                why = " ".join(str(error).split())
                dispatch.report_apart(f"each of {', '.join(group.names)}", why)
                apart += group.names
        return self._adapt_apart(y, block_input, adapted, batch, apart) if apart else adapted

    def _adapt_apart(
        self,
        y: Tensor,
        block_input: Tensor | None,
        adapted: Tensor,
        names: Sequence[str],
        apart: Sequence[str],
    ) -> Tensor:
        """`adapted`, with the inputs of some adapters in the place of what it has for them."""

        def by_input(tensor: Tensor) -> Tensor:
            return tensor.reshape(len(names), -1, y.shape[-1]) if y.dim() == 2 else tensor

        inputs, whole = by_input(y), by_input(adapted).clone()
        for name in apart:
            rows = [row for row, other in enumerate(names) if other == name]
            beside = name in self.parallel
            read = by_input(_read_by(name, y, block_input))[rows] if beside else None
            whole[rows] = self._adapt(inputs[rows], read, name)
        return whole.view_as(y)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: see CANNOT_MERGE."""
        raise ValueError(CANNOT_MERGE)

    def unmerge(self) -> None:
        """Refuse: see CANNOT_MERGE."""
        raise ValueError(CANNOT_MERGE)


def _read_by(name: str, y: Tensor, block_input: Tensor | None) -> Tensor:
    """What an adapter beside the FFN reads."""
    if block_input is None or block_input.shape != y.shape:
        shape = "nothing" if block_input is None else list(block_input.shape)
        raise RuntimeError(
            f"the parallel adapter {name!r} must read its FFN's input, of shape "
            f"{list(y.shape)}, and got {shape}: the model calls the FFN's layers in another "
            'way than its source says.\n  hint: placement="pfeiffer" reads no input'
        )
    return block_input
