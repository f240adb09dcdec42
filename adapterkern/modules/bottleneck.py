"""`BottleneckAdapter`: the operation with its parameters."""

import math
import numbers
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adapterkern import _torch, dispatch, reference
from adapterkern.activations import canonical_name
from adapterkern.backends import NAMES
from adapterkern.functional import bottleneck_adapter
from adapterkern.results import given_of
from adapterkern.spec import AdapterCall, make_call
from adapterkern.validation import FLOAT_DTYPES, dropout_problems, name_of, real

INITS = ("identity", "houlsby", "bert")
SCALINGS = ("learned", "channel")
REDUCTION_FACTOR = 16  # where nothing is said; the most common of published adapters
_MOST_UNITS = 2**31  # of a bottleneck: far beyond use, and far below what no float can count


class BottleneckAdapter(nn.Module):
    """Bottleneck adapter, fused: y = residual + skip + scaling * up_proj(act(down_proj(x))).

    Args:
        hidden_size: H, the width of x.
        bottleneck_size: R; None: H // reduction_factor, at least 1.
        reduction_factor: H / R, in place of `bottleneck_size`; 16 where neither is given.
        activation: see `adapterkern.bottleneck_adapter`.
        bias: whether both projections have a bias.
        scaling: a float, "learned" (a parameter of shape [1]) or "channel" (a parameter of shape
            [H]), both starting at 1.
        dropout: probability on the scaled up-projection while training; such a call runs on the
            PyTorch reference.
        init: "identity" (Kaiming-uniform down, zero up: the adapter starts as the identity, bit for
            bit), "houlsby" (both weights from a normal of sigma 0.01 truncated at two sigma, zero
            biases) or "bert" (both weights from a normal of sigma 0.02, zero biases).
        backend: "auto" | "cuda" | "triton" | "reference"; a named backend raises instead of falling
            back.
        device, dtype: of the parameters.

    Shapes: x [..., H] to y [..., H]; parameters down_proj.weight [R, H], down_proj.bias [R],
    up_proj.weight [H, R], up_proj.bias [H], scaling [1] or [H] where it is learned.

    A projection that is wrapped or quantised, or whose call does more than its class says (hooks on
    it or on all modules, a forward set on it), is called as a module, and PyTorch operations run
    around it: with a warning under "auto", as an error under a named backend.

    Raises:
        TypeError: a size, a number or a name is something else.
        ValueError: a size below 1, both `bottleneck_size` and `reduction_factor`, an unknown name,
            a dropout outside [0, 1), or a dtype that is not a floating-point one.

    Source: Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2020, arXiv:2005.00247; learned
    scaling: He et al. 2021, arXiv:2110.04366; channel scaling: Steitz and Roth 2024,
    arXiv:2406.06820.
    """

    down_proj: nn.Linear
    up_proj: nn.Linear
    scaling: float | nn.Parameter

    def __init__(
        self,
        hidden_size: int,
        bottleneck_size: int | None = None,
        *,
        reduction_factor: float | None = None,
        activation: str = "gelu",
        bias: bool = True,
        scaling: float | str = 1.0,
        dropout: float = 0.0,
        init: str = "identity",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        size = _bottleneck_size(hidden_size, bottleneck_size, reduction_factor)
        _check_options(scaling, dropout, init, backend, dtype)
        self.hidden_size = hidden_size
        self.bottleneck_size = size
        self.activation = canonical_name(activation)
        self.dropout = dropout
        self.init = init
        self.backend = backend
        options: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.down_proj = Projection(hidden_size, size, draw=init, **options)
        zero_or_drawn = "zeros" if init == "identity" else init
        self.up_proj = Projection(size, hidden_size, draw=zero_or_drawn, **options)
        if isinstance(scaling, str):
            length = 1 if scaling == "learned" else hidden_size
            self.scaling = nn.Parameter(torch.ones(length, device=device, dtype=dtype))
        else:
            self.scaling = float(scaling)

    def reset_parameters(self) -> None:
        """Draw the parameters anew, as `init` says; a learned scaling returns to 1."""
        for projection in (self.down_proj, self.up_proj):
            projection.reset_parameters()
        if isinstance(self.scaling, nn.Parameter):
            nn.init.ones_(self.scaling)

    def forward(
        self, x: Tensor, residual: str | Tensor | None = "input", skip: Tensor | None = None
    ) -> Tensor:
        """y [..., H]; `residual` and `skip` as in `adapterkern.bottleneck_adapter`."""
        down, up = self.down_proj, self.up_proj  # asked for once: nn.Module searches for them
        if not (is_linear(down) and is_linear(up)) or _torch.beyond_its_class(down, up):
            return self._forward_through_modules(x, residual, skip)
        return bottleneck_adapter(
            x, down.weight, up.weight, down.bias, up.bias, residual=residual, skip=skip,
            activation=self.activation, scaling=self.scaling,
            dropout=self.dropout if self.training else 0.0, backend=self.backend,
        )  # fmt: skip

    def as_call(
        self, x: Tensor, residual: str | Tensor | None = "input", skip: Tensor | None = None
    ) -> AdapterCall:
        """The call that `forward` makes of these arguments, as `adapterkern.explain` takes it."""
        down, up = self.down_proj, self.up_proj
        dropout = self.dropout if self.training else 0.0
        return make_call(
            x, down.weight, up.weight, down.bias, up.bias, residual, skip,
            self.activation, self.scaling, dropout,
        )  # fmt: skip

    def _stand_in_call(
        self, x: Tensor, residual: str | Tensor | None, skip: Tensor | None
    ) -> AdapterCall:
        """The call of `as_call` where weights cannot be read: others of the same shape stand in."""
        call = make_call(
            *(x, x, x, None, None, residual, skip, self.activation, self.scaling),
            self.dropout if self.training else 0.0,
        )
        shapes = (self.bottleneck_size, self.hidden_size), (self.hidden_size, self.bottleneck_size)
        dtypes = [
            _weight_dtype(projection) or torch.promote_types(call.compute_dtype, torch.float32)
            for projection in (self.down_proj, self.up_proj)
        ]
        down, up = (
            torch.empty(1, dtype=dtype, device=x.device).expand(shape)
            for dtype, shape in zip(dtypes, shapes, strict=True)
        )
        return call._replace(down_weight=down, up_weight=up)

    def unfused_reason(self) -> str | None:
        """Why a projection must be called, not read: wrapped, quantised, hooked. Else None."""
        for name, projection in (("down_proj", self.down_proj), ("up_proj", self.up_proj)):
            if not is_linear(projection):
                return f"{name} is a {type(projection).__name__}, which must be called to be itself"
            beyond = _torch.beyond_its_class(projection)
            if beyond is not None:
                return f"{name} has {beyond} and must be called to be itself"
        return None

    def _forward_through_modules(
        self, x: Tensor, residual: str | Tensor | None, skip: Tensor | None
    ) -> Tensor:
        """The reference with the projections called, each in the dtype of its weight."""
        call = self._stand_in_call(x, residual, skip)
        call.spec()  # validates it
        described, reason = f"BottleneckAdapter({self.extra_repr()})", self.unfused_reason()
        dispatch.report_unfused(x.device, described, str(reason), self.backend)

        def project(projection: nn.Module, inputs: Tensor) -> Tensor:
            inputs = inputs.to(_weight_dtype(projection) or call.compute_dtype)
            return projection(inputs)

        def project_up(inputs: Tensor) -> Tensor:
            u = project(self.up_proj, inputs)
            if u.shape != x.shape:  # one of size 1 would be broadcast
                raise ValueError(
                    f"up_proj must give the shape of x, {list(x.shape)}, got {list(u.shape)}."
                )
            return u

        return given_of(reference.forward(call, partial(project, self.down_proj), project_up)[0])

    def extra_repr(self) -> str:
        scaling: float | str | nn.Parameter = self.scaling
        if isinstance(scaling, nn.Parameter):
            scaling = "learned" if scaling.numel() == 1 else "channel"
        bias = getattr(self.down_proj, "bias", None) is not None
        return (
            f"hidden_size={self.hidden_size}, bottleneck_size={self.bottleneck_size}, "
            f"activation={self.activation}, bias={bias}, "
            f"scaling={scaling}, dropout={self.dropout}, init={self.init}, backend={self.backend}"
        )


class Projection(nn.Linear):
    """A linear layer that itself knows how the adapter starts.

    What materialises a model from the meta device (FSDP, `to_empty`) resets every submodule on its
    own, children after their parents, so the adapter's own reset would not have the last word.
    """

    def __init__(self, in_features: int, out_features: int, *, draw: str, **options: Any) -> None:
        self.draw = draw  # before nn.Linear's __init__, which draws
        super().__init__(in_features, out_features, **options)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the parameters anew."""
        if self.draw == "identity":
            super().reset_parameters()  # Kaiming-uniform with a = sqrt(5), the bias as well
            return
        if self.draw == "zeros":
            nn.init.zeros_(self.weight)
        elif self.draw == "houlsby":
            nn.init.trunc_normal_(self.weight, std=0.01, a=-0.02, b=0.02)
        else:
            nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def _bottleneck_size(hidden_size: int, size: int | None, factor: float | None) -> int:
    """R of an adapter from what was given of it, checked."""
    sizes: dict[str, Any] = {"hidden_size": hidden_size, "bottleneck_size": size}
    for name, given in sizes.items():
        if given is not None and not (isinstance(given, numbers.Integral) and given is not True):
            raise TypeError(f"{name} must be an integer, got {given!r}.")
    if size is not None and factor is not None:
        raise ValueError(
            f"bottleneck_size ({size}) and reduction_factor ({factor}) both fix the adapter's "
            "width.\n  hint: give one of them and leave the other None"
        )
    if size is None:
        factor = REDUCTION_FACTOR if factor is None else factor
        if not isinstance(factor, float | int):
            raise TypeError(f"reduction_factor must be a number, got {factor!r}.")
        if not factor > 0:
            raise ValueError(f"reduction_factor must be positive, got {factor}.")
        if hidden_size / _MOST_UNITS > factor:
            raise ValueError(
                f"reduction_factor must leave a bottleneck_size up to {_MOST_UNITS}, "
                f"got {factor} for hidden_size {hidden_size}."
            )
        size = max(1, int(hidden_size // factor))
    if hidden_size < 1 or size < 1:
        raise ValueError(
            "hidden_size and bottleneck_size must be at least 1, "
            f"got {hidden_size} and {size}.\n"
            "  hint: an adapter of size 0 is no adapter; leave it out."
        )
    return size


def _check_options(
    scaling: float | str, dropout: float, init: str, backend: str, dtype: torch.dtype | None
) -> None:
    if init not in INITS:
        raise ValueError(f"unknown init {init!r}.\n  hint: known inits are {', '.join(INITS)}.")
    if backend not in ("auto", *NAMES):
        known = ", ".join(NAMES)
        raise ValueError(f"unknown backend {backend!r}.\n  hint: known backends are auto, {known}.")
    expected = 'a float, "learned" or "channel"'
    if isinstance(scaling, str):
        if scaling not in SCALINGS:
            raise ValueError(f"scaling must be {expected}, got {scaling!r}.")
    elif not math.isfinite(real("scaling", scaling, expected)):
        raise ValueError(f"scaling must be finite, got {scaling}.")
    problems = dropout_problems(dropout)
    if problems:
        raise ValueError(*problems)
    if dtype is not None and dtype not in FLOAT_DTYPES:
        allowed = ", ".join(map(name_of, FLOAT_DTYPES))
        raise ValueError(f"dtype must be one of {allowed}, got {dtype}.")


def is_linear(projection: nn.Module) -> bool:
    """Whether the weights of a projection tell what a call of its class computes."""
    kind = type(projection)
    return kind.forward is nn.Linear.forward and kind.__call__ is nn.Module.__call__


def _weight_dtype(projection: nn.Module) -> torch.dtype | None:
    """The dtype of its weight; None where that is packed or no floating-point one."""
    dtype = getattr(getattr(projection, "weight", None), "dtype", None)
    return dtype if dtype in FLOAT_DTYPES else None
