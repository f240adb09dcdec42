"""Whether an adapter runs fused, asked anew at every call: there is no cache to go stale."""

from typing import Any

from torch import Tensor, nn

from adapterkern import _torch
from adapterkern.integrations.adapterhub.stock import ActivationFunction, Adapter, ParallelAdapter
from adapterkern.integrations.foreign.activations import activation_name
from adapterkern.modules.adapter_norm import dtype_reason
from adapterkern.spec import AdapterCall, with_norm

# down_weight, up_weight, down_bias, up_bias, activation, scaling. A plain tuple, as the cheapest
# there is.
Parts = tuple[Tensor, Tensor, Tensor | None, Tensor | None, str, float | Tensor]
# normalized_shape, weight, bias, eps: as torch.layer_norm takes them.
NormParts = tuple[tuple[int, ...], Tensor | None, Tensor | None, float]

_PLAIN = (nn.Parameter, Tensor)
_NUMBERS = (type(None), float, int)


def parts_of(adapter: Any) -> Parts | str:
    """The parts of an adapter that a fused call needs, or the code in `REASONS` that forbids it."""
    kind = type(adapter)
    if kind is not Adapter and kind is not ParallelAdapter:
        return "sharded" if _is_sharding(kind) else "custom_class"
    state = adapter.__dict__  # as everywhere below: half the time of an nn.Module's attributes
    if state["use_gating"]:
        return "gating"
    if state["add_layer_norm_after"]:
        return "ln_after"
    if state["add_layer_norm_before"]:
        return "ln_before"
    modules = state["_modules"]
    sequence, up, dropout = modules["adapter_down"], modules["adapter_up"], modules["dropout"]
    layers = sequence.__dict__["_modules"]
    if type(sequence) is not nn.Sequential or len(layers) != 2:
        return "not_linear"
    down, non_linearity = layers.values()
    if type(down) is not nn.Linear or type(up) is not nn.Linear:
        return _linear_reason(down) or _linear_reason(up) or "not_linear"
    function = non_linearity.__dict__["_modules"].get("f")
    if type(non_linearity) is not ActivationFunction:
        activation = activation_name(non_linearity)
    else:
        activation = activation_name(non_linearity.f if function is None else function)
    if activation is None:
        return "activation"
    if type(dropout) is nn.Dropout:
        if dropout.training and dropout.p > 0:
            return "dropout"
    elif type(dropout) is not nn.Identity:
        return "dropout"
    called: tuple[nn.Module, ...] = (adapter, sequence, down, non_linearity, up, dropout)
    if function is not None:
        called += (function,)
    if "DropPath" in modules and kind is Adapter:  # ParallelAdapter has it and does not call it
        depth = modules["DropPath"]
        if depth.training or not type(depth).__module__.startswith("torchvision."):
            return "stochastic_depth"
        called += (depth,)
    if _torch.beyond_its_class(*called) is not None:
        return "hooks"
    down_weight, down_bias = _weight_and_bias(down)
    up_weight, up_bias = _weight_and_bias(up)
    if "scaling" in state:
        scaling = state["scaling"]
    elif "scaling" in state["_parameters"]:
        scaling = state["_parameters"]["scaling"]
    else:  # a buffer, or nothing: none of the library's
        return "custom_class"
    for parameter in (down_weight, up_weight, down_bias, up_bias, scaling):
        if type(parameter) in _NUMBERS:
            continue
        # DeepSpeed's ZeRO-3 marks what it gathers where a module is called, and else leaves empty.
        if type(parameter) not in _PLAIN or hasattr(parameter, "ds_id") or parameter.numel() == 0:
            return "sharded"
    if not (down_weight.is_cpu or down_weight.is_cuda):
        return "sharded" if down_weight.is_meta else "device"
    return down_weight, up_weight, down_bias, up_bias, activation, scaling


def norm_parts_of(norm: Any) -> NormParts | str:
    """The parts of a block's norm that need no call of the module, or the code in `NORM_REASONS`
    of why it must be called."""
    if type(norm) is not nn.LayerNorm:
        return "norm_class"
    if _torch.beyond_its_class(norm) is not None:
        return "norm_hooks"
    state = norm.__dict__
    parameters = state["_parameters"]
    if "weight" not in parameters:  # in a replica of nn.DataParallel
        return "norm_parameters"
    return state["normalized_shape"], parameters["weight"], parameters["bias"], state["eps"]


def with_norm_of(call: AdapterCall, parts: NormParts) -> AdapterCall | str:
    """The call with the norm behind it, or the code in `NORM_REASONS` of what would not be as it is
    where the norm follows in a pass of its own."""
    shape, weight, bias, eps = parts
    if shape != (call.hidden_size,) or type(eps) is not float or eps <= 0:
        return "norm_numbers"
    for parameter in (weight, bias):
        if parameter is not None and type(parameter) not in _PLAIN:
            return "norm_parameters"
    normed = with_norm(call, weight, bias, "layer", eps, 0.0, False, False)
    dtype = call.x.dtype if weight is None else weight.dtype
    if dtype == call.x.dtype and not _torch.may_autocast():
        return normed
    # torch refuses a stream that is wider than the norm's parameters, which is left to it.
    is_same = dtype_reason(normed) is None and dtype == normed.normed_dtype
    return normed if is_same else "norm_dtype"


def _is_sharding(kind: type) -> bool:
    """Whether a class is FSDP's: the wrapper of the first one, the mix-in of fully_shard."""
    return any(base.__name__ in ("FullyShardedDataParallel", "FSDPModule") for base in kind.__mro__)


def _weight_and_bias(linear: nn.Linear) -> tuple[Any, Any]:
    parameters = linear.__dict__["_parameters"]
    if "weight" in parameters:  # ten times as fast as the attributes
        return parameters["weight"], parameters["bias"]
    return linear.weight, linear.bias  # a replica of nn.DataParallel keeps them as attributes


def _linear_reason(projection: nn.Module) -> str | None:
    kind = type(projection)
    if kind is nn.Linear:
        return None
    if kind.__name__ == "PHMLayer":
        return "phm"
    if "bitsandbytes" in kind.__module__ or "quant" in kind.__module__.lower():
        return "quantized"
    return "not_linear"
