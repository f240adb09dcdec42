"""Single modules of other libraries as `BottleneckAdapter`s that share their parameters.

Recognised by their attributes, so none of the libraries is imported:

    AdapterHub       Adapter, ParallelAdapter     adapter_down, adapter_up, non_linearity
    OpenDelta        AdapterLayer                 modulelist.{down_proj, non_linear, up_proj}
    SpeechBrain      HoulsbyAdapterLinear         adapter_down_proj, adapter_up_proj, activation
    LLM-Adapters     bottleneck Linear            adapter_down, adapter_up, act_fn
    NeMo             LinearAdapter                module, a Sequential, and norm_position
"""

from typing import Any

from torch import Tensor, nn

from adapterkern.errors import UnsupportedAdapterError
from adapterkern.integrations.adapterhub.activations import activation_name
from adapterkern.integrations.adapterhub.hooks import any_hooked
from adapterkern.integrations.adapterhub.reasons import REASONS
from adapterkern.modules.bottleneck import BottleneckAdapter


def from_module(module: nn.Module) -> BottleneckAdapter:
    """An adapter of another library as a `BottleneckAdapter` over the same parameters.

    What the module does around the adapter stays with the caller:

    - AdapterHub: `adapter(x, residual=...)`, with None for a ParallelAdapter.
    - OpenDelta: `adapter(hidden)` is what `post_forward` returns for float32 input.
    - SpeechBrain: `adapter(module.pretrained_linear(x))` is the module's output.
    - LLM-Adapters: `adapter(x)` before the linear layer (mh_adapter) or behind it
      (output_adapter); `adapter(x, residual=linear(x))` beside it (parallel_adapter).
    - NeMo: `adapter(x, residual=None)` is the module's output; its strategy adds x.

    A `BottleneckAdapter` drops out of its up-projection alone. Stochastic depth (AdapterPlus) and
    dropout of the input (LLM-Adapters) are refused while their p is positive, in evaluation too,
    since the result could be trained without them. The result is in the mode of the module, of its
    dropout where it has one. Hooks cannot be carried over and are refused.

    Raises:
        UnsupportedAdapterError: the maths is not that of a `BottleneckAdapter`; the message says
            why.
        TypeError: not a module that is known.
    """
    for matches, convert in (
        (_is_adapterhub, _from_adapterhub),
        (_is_opendelta, _from_opendelta),
        (_is_speechbrain, _from_speechbrain),
        (_is_llm_adapters, _from_llm_adapters),
        (_is_nemo, _from_nemo),
    ):
        if matches(module):
            return convert(module)
    raise TypeError(
        f"{type(module).__name__} is no adapter that adapterkern knows.\n"
        "  hint: AdapterHub's Adapter, OpenDelta's AdapterLayer, SpeechBrain's "
        "HoulsbyAdapterLinear, LLM-Adapters' Linear and NeMo's LinearAdapter are"
    )


def adapter_from_tensors(
    down_weight: Tensor,
    up_weight: Tensor,
    down_bias: Tensor | None,
    up_bias: Tensor | None,
    *,
    activation: str,
    scaling: float | str | Tensor = 1.0,
    dropout: float = 0.0,
) -> BottleneckAdapter:
    """A `BottleneckAdapter` over these tensors; parameters among them are shared, not copied.

    Shapes: down_weight [R, H], up_weight [H, R], down_bias [R], up_bias [H], scaling [1] or [H].
    """
    bottleneck_size, hidden_size = down_weight.shape
    adapter = BottleneckAdapter(
        hidden_size, bottleneck_size, activation=activation, dropout=dropout, device="meta"
    )
    for projection, weight, bias in (
        (adapter.down_proj, down_weight, down_bias),
        (adapter.up_proj, up_weight, up_bias),
    ):
        projection.weight = _parameter(weight)
        projection.register_parameter("bias", None if bias is None else _parameter(bias))
    if isinstance(scaling, Tensor):
        del adapter.scaling
        adapter.scaling = _parameter(scaling)
    else:
        adapter.scaling = float(scaling)
    return adapter


def _parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)


def _has(module: nn.Module, *names: str) -> bool:
    return all(hasattr(module, name) for name in names)


def _is_adapterhub(module: nn.Module) -> bool:
    return _has(module, "adapter_down", "adapter_up", "non_linearity", "residual_before_ln")


def _is_opendelta(module: nn.Module) -> bool:
    return _has(module, "bottleneck_dim", "instantiated", "post_forward")


def _is_speechbrain(module: nn.Module) -> bool:
    return _has(module, "pretrained_linear", "adapter_down_proj", "adapter_up_proj", "activation")


def _is_llm_adapters(module: nn.Module) -> bool:
    return _has(module, "adapter_down", "adapter_up", "act_fn", "adapter_scaling", "adapter_type")


def _is_nemo(module: nn.Module) -> bool:
    return _has(module, "module", "norm_position") and isinstance(module.module, nn.Sequential)


def _from_adapterhub(module: Any) -> BottleneckAdapter:
    if module.use_gating:
        raise _unsupported(module, REASONS["gating"])
    if module.add_layer_norm_before:
        raise _unsupported(module, REASONS["ln_before"])
    if module.add_layer_norm_after:
        raise _unsupported(module, REASONS["ln_after"])
    depth = getattr(module, "DropPath", None)
    parallel = type(module).__name__ == "ParallelAdapter"  # has it and does not call it
    if depth is not None and not parallel and getattr(depth, "p", 1) > 0:
        raise _unsupported(module, "it drops whole rows while training", "set its DropPath.p = 0")
    if any(type(projection).__name__ == "PHMLayer" for projection in module.modules()):
        raise _unsupported(module, REASONS["phm"])
    if len(module.adapter_down) != 2:
        raise _unsupported(module, "its adapter_down is not a linear layer and an activation")
    down, non_linearity = module.adapter_down  # called; module.non_linearity may be stale
    function = getattr(non_linearity, "f", non_linearity)
    return _convert(
        module, down, function, module.adapter_up, module.scaling, module.dropout,
        around=(module.adapter_down, non_linearity, None if parallel else depth),
    )  # fmt: skip


def _from_opendelta(module: Any) -> BottleneckAdapter:
    if not module.instantiated:
        raise _unsupported(module, "it has no parameters before it has seen its first input")
    layers = module.modulelist
    function = getattr(layers.non_linear, "f", layers.non_linear)
    around = (layers, layers.non_linear)
    return _convert(module, layers.down_proj, function, layers.up_proj, around=around)


def _from_speechbrain(module: Any) -> BottleneckAdapter:
    return _convert(module, module.adapter_down_proj, module.activation, module.adapter_up_proj)


def _from_llm_adapters(module: Any) -> BottleneckAdapter:
    dropout = getattr(module, "adapter_dropout", None)
    if isinstance(dropout, nn.Dropout) and dropout.p > 0:
        raise _unsupported(
            module, "it drops out of its input while training", "set its adapter_dropout.p = 0"
        )
    if getattr(module, "disable_adapters", False):
        raise _unsupported(
            module, "its adapter is switched off", "set its disable_adapters = False"
        )
    return _convert(
        module, module.adapter_down, module.act_fn, module.adapter_up, module.adapter_scaling,
        around=(dropout,),
    )  # fmt: skip


def _from_nemo(module: Any) -> BottleneckAdapter:
    layers = list(module.module)
    for index, layer in enumerate(layers):
        if _is_norm(layer):
            where = _place(index, layers)
            raise _unsupported(
                module, f"it has its own {type(layer).__name__} {where} its projections"
            )
    if len(layers) != 3:
        kinds = ", ".join(type(layer).__name__ for layer in layers)
        raise _unsupported(module, f"it is not a linear layer, an activation and another: {kinds}")
    down, function, up = layers
    dropout = getattr(module, "dropout", None)
    return _convert(module, down, function, up, dropout=dropout, around=(module.module,))


def _is_norm(layer: nn.Module) -> bool:
    return not isinstance(layer, nn.Linear) and "Norm" in type(layer).__name__


def _place(index: int, layers: list[nn.Module]) -> str:
    """Where among the linear layers the layer of this index stands."""
    if not any(isinstance(layer, nn.Linear) for layer in layers[:index]):
        return "before"
    if not any(isinstance(layer, nn.Linear) for layer in layers[index:]):
        return "after"
    return "between"


def _convert(
    module: nn.Module,
    down: Any,
    function: Any,
    up: Any,
    scaling: float | Tensor = 1.0,
    dropout: nn.Module | None = None,
    around: tuple[Any, ...] = (),
) -> BottleneckAdapter:
    """Of these parts; `around` is what else the module calls, which computes nothing itself."""
    called = (module, down, function, up, dropout, *around)
    if any_hooked(tuple(part for part in called if isinstance(part, nn.Module))):
        raise _unsupported(module, REASONS["hooks"], "take them off, and put them on the result")
    for projection in (down, up):
        if type(projection) is not nn.Linear:
            raise _unsupported(
                module, f"a projection is a {type(projection).__name__}, not a plain nn.Linear"
            )
    activation = activation_name(function)
    if activation is None:
        raise _unsupported(module, f"its activation, {function!r}, has no fused form")
    if up.out_features != down.in_features:
        raise _unsupported(
            module,
            f"it maps {down.in_features} features to {up.out_features}, so x cannot be added",
        )
    mode, p = module.training, 0.0
    if type(dropout) is nn.Dropout:
        mode, p = dropout.training, dropout.p  # the one part of an adapter that heeds its mode
    elif dropout is not None and type(dropout) is not nn.Identity:
        raise _unsupported(module, f"its dropout is a {type(dropout).__name__}, not an nn.Dropout")
    return adapter_from_tensors(
        down.weight, up.weight, down.bias, up.bias,
        activation=activation, scaling=scaling, dropout=p,
    ).train(mode)  # fmt: skip


def _unsupported(module: nn.Module, why: str, hint: str = "") -> UnsupportedAdapterError:
    cure = f"\n  hint: {hint}" if hint else ""
    return UnsupportedAdapterError(
        f"{type(module).__name__} has no BottleneckAdapter: {why}.{cure}"
    )
