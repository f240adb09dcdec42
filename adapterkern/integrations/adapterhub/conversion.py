"""Single modules of AdapterHub as `BottleneckAdapter`s. The library is not imported."""

from typing import Any

from adapterkern.integrations import foreign
from adapterkern.integrations.adapterhub.reasons import REASONS
from adapterkern.integrations.foreign.conversion import convert, unsupported
from adapterkern.modules.bottleneck import BottleneckAdapter

_ATTRIBUTES = ("adapter_down", "adapter_up", "non_linearity", "residual_before_ln")


def from_module(module: Any) -> BottleneckAdapter:
    """AdapterHub's Adapter or ParallelAdapter as a `BottleneckAdapter` over the same parameters.

    `adapter(x, residual=...)` is the module's output, with None for a ParallelAdapter. Stochastic
    depth (AdapterPlus) is refused while its p is positive, in evaluation too, since the result
    could be trained without it. Mode, hooks and errors are as in `foreign.from_module`, which
    converts the modules of every other library.
    """
    if not all(hasattr(module, name) for name in _ATTRIBUTES):
        return foreign.from_module(module)
    if module.use_gating:
        raise unsupported(module, REASONS["gating"])
    if module.add_layer_norm_before:
        raise unsupported(module, REASONS["ln_before"])
    if module.add_layer_norm_after:
        raise unsupported(module, REASONS["ln_after"])
    depth = getattr(module, "DropPath", None)
    parallel = type(module).__name__ == "ParallelAdapter"  # has it and does not call it
    if depth is not None and not parallel and getattr(depth, "p", 1) > 0:
        raise unsupported(module, "it drops whole rows while training", "set its DropPath.p = 0")
    if any(type(projection).__name__ == "PHMLayer" for projection in module.modules()):
        raise unsupported(module, REASONS["phm"])
    if len(module.adapter_down) != 2:
        raise unsupported(module, "its adapter_down is not a linear layer and an activation")
    down, non_linearity = module.adapter_down  # called; module.non_linearity may be stale
    function = getattr(non_linearity, "f", non_linearity)
    return convert(
        module, down, function, module.adapter_up, module.scaling, module.dropout,
        around=(module.adapter_down, non_linearity, None if parallel else depth),
    )  # fmt: skip
