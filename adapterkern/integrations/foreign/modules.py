"""Finds the parts of a single module by its library; it imports none of the libraries.

OpenDelta        AdapterLayer                 modulelist.{down_proj, non_linear, up_proj}
SpeechBrain      HoulsbyAdapterLinear         adapter_down_proj, adapter_up_proj, activation
LLM-Adapters     bottleneck Linear            adapter_down, adapter_up, act_fn
NeMo             LinearAdapter                module, a Sequential, and norm_position
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from adapterkern.integrations.foreign.conversion import convert, unsupported
from adapterkern.integrations.foreign.described import from_description
from adapterkern.modules.bottleneck import BottleneckAdapter


def from_module(
    module: nn.Module,
    *,
    down: str | None = None,
    activation: str | Callable | None = None,
    up: str | None = None,
    scaling: str | float | None = None,
    dropout: str | None = None,
    residual: str | None = "input",
    check: bool = True,
) -> BottleneckAdapter:
    """Return an adapter of another library, or your own, as a `BottleneckAdapter`.

    It is over the same parameters. A module of your own is described by the names of its parts:

        foreign.from_module(module, down="fc1", activation="act", up="fc2")

    Args:
        down, up: the names of two plain `nn.Linear` in the module, as in `get_submodule`.
        activation: the name of a submodule or of a function that the module holds, a function, or
            the name of an activation such as "gelu".
        scaling: a number, or the name of a number or a parameter in the module; None: 1.
        dropout: the name of an `nn.Dropout` that drops out of the up-projection.
        residual: what the module adds itself: "input", or None where the caller adds it; the
            module's output is then `adapter(x, residual=None)`.
        check: call the module once in each mode with random weights, and refuse it where its output
            differs from that of the adapter. False takes the description's word.

    Modules of these libraries are known; what they do around the adapter stays with the caller:

    - OpenDelta: `adapter(hidden)` is what `post_forward` returns for float32 input.
    - SpeechBrain: `adapter(module.pretrained_linear(x))` is the module's output.
    - LLM-Adapters: `adapter(x)` before the linear layer (mh_adapter) or behind it
      (output_adapter); `adapter(x, residual=linear(x))` beside it (parallel_adapter).
    - NeMo: `adapter(x, residual=None)` is the module's output; its strategy adds x.

    A `BottleneckAdapter` drops out of its up-projection alone. Dropout of the input (LLM-Adapters)
    is refused while its p is positive, in evaluation too, since the result could be trained without
    it. The result is in the mode of the module, of its dropout where it has one. Hooks cannot be
    carried over and are refused.

    Raises:
        UnsupportedAdapterError: the maths is not that of a `BottleneckAdapter`, or not that of the
            description; the message says why.
        ValueError: a name in the description is none of the module's; those that are there are
            listed.
        TypeError: not a module that is known, or half a description.
    """
    described = {"down": down, "activation": activation, "up": up}
    if any(part is not None for part in (*described.values(), scaling, dropout)):
        missing = [name for name, part in described.items() if part is None]
        if missing:
            raise TypeError(
                f"a description needs down, activation and up; {missing[0]} is missing."
            )
        return from_description(module, down, activation, up, scaling, dropout, residual, check)
    for matches, from_library in (
        (_is_opendelta, _from_opendelta),
        (_is_speechbrain, _from_speechbrain),
        (_is_llm_adapters, _from_llm_adapters),
        (_is_nemo, _from_nemo),
    ):
        if matches(module):
            return from_library(module)
    raise TypeError(
        f"{type(module).__name__} is no adapter that adapterkern knows.\n"
        "  hint: OpenDelta's AdapterLayer, SpeechBrain's HoulsbyAdapterLinear, LLM-Adapters' "
        "Linear and NeMo's LinearAdapter are; adapterhub.from_module knows AdapterHub's Adapter "
        "too, and from_module(module, down=..., activation=..., up=...) takes one of your own"
    )


def _has(module: nn.Module, *names: str) -> bool:
    return all(hasattr(module, name) for name in names)


def _is_opendelta(module: nn.Module) -> bool:
    return _has(module, "bottleneck_dim", "instantiated", "post_forward")


def _is_speechbrain(module: nn.Module) -> bool:
    return _has(module, "pretrained_linear", "adapter_down_proj", "adapter_up_proj", "activation")


def _is_llm_adapters(module: nn.Module) -> bool:
    return _has(module, "adapter_down", "adapter_up", "act_fn", "adapter_scaling", "adapter_type")


def _is_nemo(module: nn.Module) -> bool:
    return _has(module, "module", "norm_position") and isinstance(module.module, nn.Sequential)


def _from_opendelta(module: Any) -> BottleneckAdapter:
    if not module.instantiated:
        raise unsupported(module, "it has no parameters before it has seen its first input")
    layers = module.modulelist
    function = getattr(layers.non_linear, "f", layers.non_linear)
    around = (layers, layers.non_linear)
    return convert(module, layers.down_proj, function, layers.up_proj, around=around)


def _from_speechbrain(module: Any) -> BottleneckAdapter:
    return convert(module, module.adapter_down_proj, module.activation, module.adapter_up_proj)


def _from_llm_adapters(module: Any) -> BottleneckAdapter:
    dropout = getattr(module, "adapter_dropout", None)
    if isinstance(dropout, nn.Dropout) and dropout.p > 0:
        raise unsupported(
            module, "it drops out of its input while training", "set its adapter_dropout.p = 0"
        )
    if getattr(module, "disable_adapters", False):
        raise unsupported(module, "its adapter is switched off", "set its disable_adapters = False")
    return convert(
        module, module.adapter_down, module.act_fn, module.adapter_up, module.adapter_scaling,
        around=(dropout,),
    )  # fmt: skip


def _from_nemo(module: Any) -> BottleneckAdapter:
    layers = list(module.module)
    for index, layer in enumerate(layers):
        if _is_norm(layer):
            where = _place(index, layers)
            raise unsupported(
                module, f"it has its own {type(layer).__name__} {where} its projections"
            )
    if len(layers) != 3:
        kinds = ", ".join(type(layer).__name__ for layer in layers)
        raise unsupported(module, f"it is not a linear layer, an activation and another: {kinds}")
    down, function, up = layers
    dropout = getattr(module, "dropout", None)
    return convert(module, down, function, up, dropout=dropout, around=(module.module,))


def _is_norm(layer: nn.Module) -> bool:
    return not isinstance(layer, nn.Linear) and "Norm" in type(layer).__name__


def _place(index: int, layers: list[nn.Module]) -> str:
    """Return where among the linear layers the layer of this index stands."""
    if not any(isinstance(layer, nn.Linear) for layer in layers[:index]):
        return "before"
    if not any(isinstance(layer, nn.Linear) for layer in layers[index:]):
        return "after"
    return "between"
