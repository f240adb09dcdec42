"""A linear layer with its adapters."""

from collections.abc import Sequence
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from adapterkern.integrations.peft.checkpoint import CONTAINER
from adapterkern.integrations.peft.config import BottleneckConfig
from adapterkern.integrations.peft.targets import output_size
from adapterkern.modules.bottleneck import BottleneckAdapter

BASE = "__base__"  # PEFT's name for "no adapter" in a mixed batch
CANNOT_MERGE = (
    "bottleneck adapters cannot be merged or unmerged: they are nonlinear in the layer's output, "
    "so no linear weight equals layer and adapter together.\n"
    "  hint: keep them, or call unload() for the base model"
)


class BottleneckLinear(nn.Module, BaseTunerLayer):
    """A linear layer (nn.Linear, Conv1D, quantised), then the active adapters one after another.

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
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Add an adapter, on the base layer's device and in its dtype; the tuner activates it."""
        size = output_size(self.get_base_layer())
        assert size is not None  # BottleneckModel has checked every target
        adapter = BottleneckAdapter(size, **config.adapter_arguments())
        self.bottleneck_adapter[adapter_name] = adapter
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def forward(
        self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Tensor:
        """base_layer(x), adapted by the active adapters or by the one named for each input."""
        y = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return y
        if adapter_names is not None:
            return self._adapt_by_input(y, adapter_names)
        for name in self.active_adapters:
            if name in self.bottleneck_adapter:
                y = self._adapt(y, name)
        return y

    def _adapt(self, y: Tensor, name: str) -> Tensor:
        # A learned scaling stays float32 in a half-precision model and would widen the result.
        return self.bottleneck_adapter[name](y).to(y.dtype)

    def _adapt_by_input(self, y: Tensor, names: Sequence[str]) -> Tensor:
        """y [B, ..., H], or [B * T, H] from blocks that flatten their tokens; B names."""
        flat = y.dim() == 2
        if not names or len(y) % len(names) or not (flat or len(y) == len(names)):
            raise ValueError(
                f"adapter_names must name one adapter for each input, got {len(names)} names for "
                f"hidden states of shape {list(y.shape)}.\n"
                "  hint: where the model repeats its inputs by itself, call it with set_adapter, "
                "once for each adapter"
            )
        inputs = y.reshape(len(names), -1, y.shape[-1]) if flat else y
        adapted = inputs.clone()
        for name in dict.fromkeys(names):
            if name in self.bottleneck_adapter:  # neither BASE nor an adapter of other layers
                rows = [row for row, other in enumerate(names) if other == name]
                adapted[rows] = self._adapt(inputs[rows], name)
        return adapted.view_as(y)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: see CANNOT_MERGE."""
        raise ValueError(CANNOT_MERGE)

    def unmerge(self) -> None:
        """Refuse: see CANNOT_MERGE."""
        raise ValueError(CANNOT_MERGE)
