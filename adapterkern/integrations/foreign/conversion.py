"""A `BottleneckAdapter` over the tensors, or over the parts of a module, of another library."""

from typing import Any

from torch import Tensor, nn

from adapterkern import _torch
from adapterkern.errors import UnsupportedAdapterError
from adapterkern.integrations.foreign.activations import activation_name
from adapterkern.modules.bottleneck import BottleneckAdapter


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
    """Make a `BottleneckAdapter` over these tensors; parameters among them are shared, not copied.

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


def convert(
    module: nn.Module,
    down: Any,
    function: Any,
    up: Any,
    scaling: float | Tensor = 1.0,
    dropout: nn.Module | None = None,
    around: tuple[Any, ...] = (),
) -> BottleneckAdapter:
    """Return the adapter of a module with these parts, over the same parameters.

    Args:
        function: the activation, as a module, a function or its name.
        around: what else the module calls, which computes nothing itself.

    Raises:
        UnsupportedAdapterError: a part has hooks, or is not what a `BottleneckAdapter` computes.
    """
    for part in (module, down, function, up, dropout, *around):
        if isinstance(part, nn.Module) and _torch.beyond_its_class(part) is not None:
            why = "hooks or an overridden forward run only where the module itself is called"
            raise unsupported(module, why, "take them off, and put them on the result")
    for projection in (down, up):
        if type(projection) is not nn.Linear:
            raise unsupported(
                module, f"a projection is a {type(projection).__name__}, not a plain nn.Linear"
            )
    activation = function if isinstance(function, str) else activation_name(function)
    if activation is None:
        raise unsupported(module, f"its activation, {function!r}, has no fused form")
    if up.out_features != down.in_features:
        raise unsupported(
            module,
            f"it maps {down.in_features} features to {up.out_features}, so x cannot be added",
        )
    if up.in_features != down.out_features:
        raise unsupported(
            module, f"its down-projection gives {down.out_features} features, its up-projection "
            f"takes {up.in_features}",
        )  # fmt: skip
    if isinstance(scaling, Tensor) and tuple(scaling.shape) not in ((1,), (up.out_features,)):
        raise unsupported(
            module, f"its scaling has the shape {list(scaling.shape)}, not [1] or [H]",
            "make it a parameter of shape [1]" if scaling.numel() == 1 else "",
        )  # fmt: skip
    mode, p = module.training, 0.0
    if type(dropout) is nn.Dropout:
        mode, p = dropout.training, dropout.p  # the one part of an adapter that heeds its mode
    elif dropout is not None and type(dropout) is not nn.Identity:
        raise unsupported(module, f"its dropout is a {type(dropout).__name__}, not an nn.Dropout")
    return adapter_from_tensors(
        down.weight, up.weight, down.bias, up.bias,
        activation=activation, scaling=scaling, dropout=p,
    ).train(mode)  # fmt: skip


def unsupported(module: nn.Module, why: str, hint: str = "") -> UnsupportedAdapterError:
    """Make the error that says why a module has no `BottleneckAdapter`, and any cure."""
    cure = f"\n  hint: {hint}" if hint else ""
    return UnsupportedAdapterError(
        f"{type(module).__name__} has no BottleneckAdapter: {why}.{cure}"
    )
