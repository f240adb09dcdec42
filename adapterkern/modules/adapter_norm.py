"""`AdapterNorm`: an adapter and the norm behind it as one pass, over the modules that exist."""

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from adapterkern import _torch, dispatch
from adapterkern.functional import bottleneck_adapter_norm
from adapterkern.modules.bottleneck import BottleneckAdapter, is_linear
from adapterkern.spec import AdapterCall, with_norm
from adapterkern.validation import name_of


class Norm(NamedTuple):
    """A norm module as `adapterkern.bottleneck_adapter_norm` takes it."""

    weight: Tensor | None  # [H]
    bias: Tensor | None  # [H]
    norm: str  # "layer" | "rms"
    eps: float
    weight_offset: float = 0.0
    cast_before_weight: bool = False


def describe(norm: nn.Module) -> Norm:
    """nn.LayerNorm or nn.RMSNorm as a `Norm`.

    Raises:
        TypeError: another class, a subclass too: its forward need not be what its name says.
        ValueError: it normalises more than the last dimension.
    """
    kind = type(norm)
    if kind not in (nn.LayerNorm, nn.RMSNorm) or not isinstance(norm, nn.LayerNorm | nn.RMSNorm):
        base = next((k.__name__ for k in (nn.LayerNorm, nn.RMSNorm) if isinstance(norm, k)), None)
        what = kind.__qualname__ if base is None else f"{kind.__qualname__}, a subclass of {base}"
        raise TypeError(
            f"norm must be an nn.LayerNorm or an nn.RMSNorm itself, got {what}.\n"
            "  hint: adapterkern.bottleneck_adapter_norm takes the norm's parameters and numbers; "
            "adapterkern.integrations.transformers.fuse_norms knows the norms of transformers."
        )
    if len(norm.normalized_shape) != 1:
        raise ValueError(
            "norm must normalise the last dimension alone, "
            f"got normalized_shape {tuple(norm.normalized_shape)}."
        )
    if isinstance(norm, nn.LayerNorm):
        return Norm(norm.weight, norm.bias, "layer", float(norm.eps))
    if norm.eps is not None:
        return Norm(norm.weight, None, "rms", float(norm.eps))
    # Without an eps, torch takes that of float32 for half precision too.
    double = norm.weight is not None and norm.weight.dtype == torch.float64
    eps = torch.finfo(torch.float64 if double else torch.float32).eps
    return Norm(norm.weight, None, "rms", eps)


class AdapterNorm(nn.Module):
    """An adapter and the norm behind it, in one pass: norm(residual + skip + scaling * up(...)).

    Args:
        adapter: a `BottleneckAdapter`.
        norm: an nn.LayerNorm or nn.RMSNorm over the adapter's hidden_size, with or without
            parameters.

    Both stay the modules that they are, as `adapter` and `norm`, and keep their parameters: this
    module has none of its own. Options, training mode and what is frozen are read at each call.

    Where either has to be called to be itself (hooks, a wrapped projection), or where the norm's
    parameters have a dtype that makes torch's norm return another dtype than the kernels do, the
    two modules are called one after the other: with a warning under "auto", as an error under a
    named backend.

    Shapes: x [..., H] to normed [..., H], or (normed, stream) with `prenorm`.

    Raises:
        TypeError: `adapter` or `norm` is of another class.
        ValueError: the norm has another width than the adapter.

    Source: Houlsby et al. 2019, arXiv:1902.00751; Ba et al. 2016, arXiv:1607.06450; Zhang and
    Sennrich 2019, arXiv:1910.07467.
    """

    def __init__(self, adapter: BottleneckAdapter, norm: nn.LayerNorm | nn.RMSNorm) -> None:
        super().__init__()
        if not isinstance(adapter, BottleneckAdapter):
            raise TypeError(f"adapter must be a BottleneckAdapter, got {type(adapter).__name__}.")
        describe(norm)
        if norm.normalized_shape != (adapter.hidden_size,):
            raise ValueError(
                f"norm must be over the adapter's hidden_size {adapter.hidden_size}, "
                f"got normalized_shape {tuple(norm.normalized_shape)}."
            )
        self.adapter = adapter
        self.norm = norm

    @overload
    def forward(
        self,
        x: Tensor,
        residual: str | Tensor | None = "input",
        skip: Tensor | None = None,
        *,
        prenorm: Literal[False] = False,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        x: Tensor,
        residual: str | Tensor | None = "input",
        skip: Tensor | None = None,
        *,
        prenorm: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...
    def forward(
        self,
        x: Tensor,
        residual: str | Tensor | None = "input",
        skip: Tensor | None = None,
        *,
        prenorm: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """normed, or (normed, stream); `residual` and `skip` as in
        `adapterkern.bottleneck_adapter_norm`."""
        return adapter_norm(
            self.adapter, self.norm, describe(self.norm), x, residual, skip, prenorm
        )

    @property
    def backend(self) -> str:
        """The adapter's."""
        return self.adapter.backend

    def as_call(
        self, x: Tensor, residual: str | Tensor | None = "input", skip: Tensor | None = None,
        *, prenorm: bool = False,
    ) -> AdapterCall:  # fmt: skip
        """The call that `forward` makes of these arguments, as `adapterkern.explain` takes it."""
        return with_norm(
            self.adapter.as_call(x, residual, skip), *describe(self.norm), prenorm=prenorm
        )

    def unfused_reason(self) -> str | None:
        """Why a module must be called, not read: wrapped, quantised, hooked. Else None."""
        return unfused_reason(self.adapter, self.norm)


def adapter_norm(
    adapter: BottleneckAdapter,
    norm: nn.Module,
    description: Norm,
    x: Tensor,
    residual: str | Tensor | None = "input",
    skip: Tensor | None = None,
    prenorm: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`AdapterNorm.forward` for any norm module that `description` says all about."""
    down, up = adapter.down_proj, adapter.up_proj
    weight, bias, kind, eps, weight_offset, cast_before_weight = description
    reason = None
    if (
        type(adapter).forward is not BottleneckAdapter.forward
        or not (is_linear(down) and is_linear(up))
        or _torch.beyond_its_class(adapter, norm, down, up)
    ):
        reason = unfused_reason(adapter, norm)
    elif _torch.may_autocast() or (weight is not None and _is_other_dtype(weight, x)):
        call = with_norm(adapter.as_call(x, residual, skip), *description, prenorm=prenorm)
        reason = dtype_reason(call)
    if reason is not None:
        described = f"{type(norm).__name__} behind BottleneckAdapter({adapter.extra_repr()})"
        dispatch.report_unfused(x.device, described, reason, adapter.backend)
        stream = adapter(x, residual, skip)
        return (norm(stream), stream) if prenorm else norm(stream)
    return bottleneck_adapter_norm(  # type: ignore[call-overload, misc]
        x, down.weight, up.weight, weight, down.bias, up.bias, bias,
        residual=residual, skip=skip, activation=adapter.activation, scaling=adapter.scaling,
        dropout=adapter.dropout if adapter.training else 0.0,
        norm=kind, eps=eps, weight_offset=weight_offset, cast_before_weight=cast_before_weight,
        prenorm=prenorm, backend=adapter.backend,
    )  # fmt: skip


def unfused_reason(adapter: BottleneckAdapter, norm: nn.Module) -> str | None:
    """Why the adapter or the norm must be called, not read. None if neither has to be."""
    if type(adapter).forward is not BottleneckAdapter.forward:
        return f"{type(adapter).__qualname__} has a forward of its own and must be called"
    for name, module in (("adapter", adapter), ("norm", norm)):
        beyond = _torch.beyond_its_class(module)
        if beyond is not None:
            return f"the {name} has {beyond} and must be called to be itself"
    return adapter.unfused_reason()


def _is_other_dtype(weight: Tensor, x: Tensor) -> bool:
    return isinstance(x, Tensor) and weight.dtype != x.dtype  # a Proxy of torch.fx has no dtype yet


def dtype_reason(call: AdapterCall) -> str | None:
    """Why the kernels would return another dtype than the norm module itself. They widen that of
    the stream by the parameters', as Llama's norm does; torch keeps the stream's, but that autocast
    on a GPU runs norms in float32.
    """
    if call.cast_before_weight:
        return None
    device, due = call.x.device.type, call.output_dtype
    if device == "cuda" and torch.is_autocast_enabled(device):
        due = torch.promote_types(due, torch.float32)
    if call.normed_dtype == due:
        return None
    found = f"{name_of(call.normed_dtype)} where the norm itself returns {name_of(due)}"
    return f"a norm in the same pass would return {found}"
