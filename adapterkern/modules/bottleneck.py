"""`BottleneckAdapter`: the operation with its parameters."""

import numbers
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adapterkern import _torch, dispatch, reference
from adapterkern.activations import canonical_name
from adapterkern.backends import NAMES
from adapterkern.functional import bottleneck_adapter
from adapterkern.spec import AdapterCall, make_call
from adapterkern.validation import FLOAT_DTYPES, dropout_problems, name_of, real

INITS = ("identity", "houlsby", "bert")
SCALINGS = ("learned", "channel")


class BottleneckAdapter(nn.Module):
    """Bottleneck adapter, fused: y = residual + skip + scaling * up_proj(act(down_proj(x))).

    Args:
        hidden_size: H, the width of x.
        bottleneck_size: R; None: H // reduction_factor, at least 1.
        reduction_factor: H / R, used where `bottleneck_size` is None.
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
        ValueError: a size below 1, an unknown name, a dropout outside [0, 1), or a dtype that is
            not a floating-point one.

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
        reduction_factor: float = 16,
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
        sizes: dict[str, Any] = {"hidden_size": hidden_size, "bottleneck_size": bottleneck_size}
        for name, size in sizes.items():
            if size is not None and not isinstance(size, numbers.Integral):
                raise TypeError(f"{name} must be an integer, got {size!r}.")
        if bottleneck_size is None:
            if not isinstance(reduction_factor, float | int):
                raise TypeError(f"reduction_factor must be a number, got {reduction_factor!r}.")
            if not reduction_factor > 0:
                raise ValueError(f"reduction_factor must be positive, got {reduction_factor}.")
            bottleneck_size = max(1, int(hidden_size // reduction_factor))
        if hidden_size < 1 or bottleneck_size < 1:
            raise ValueError(
                "hidden_size and bottleneck_size must be at least 1, "
                f"got {hidden_size} and {bottleneck_size}.\n"
                "  hint: an adapter of size 0 is no adapter; leave it out."
            )
        if init not in INITS:
            raise ValueError(f"unknown init {init!r}.\n  hint: known inits are {', '.join(INITS)}.")
        if backend not in ("auto", *NAMES):
            known = ", ".join(NAMES)
            raise ValueError(
                f"unknown backend {backend!r}.\n  hint: known backends are auto, {known}."
            )
        if isinstance(scaling, str) and scaling not in SCALINGS:
            raise ValueError(f'scaling must be a float, "learned" or "channel", got {scaling!r}.')
        if not isinstance(scaling, str):
            scaling = real("scaling", scaling, 'a float, "learned" or "channel"')
        problems = dropout_problems(dropout)
        if problems:
            raise ValueError(*problems)
        if dtype is not None and dtype not in FLOAT_DTYPES:
            allowed = ", ".join(map(name_of, FLOAT_DTYPES))
            raise ValueError(f"dtype must be one of {allowed}, got {dtype}.")
        self.hidden_size = hidden_size
        self.bottleneck_size = bottleneck_size
        self.activation = canonical_name(activation)
        self.dropout = dropout
        self.init = init
        self.backend = backend
        self.down_proj = nn.Linear(
            hidden_size, bottleneck_size, bias=bias, device=device, dtype=dtype
        )
        self.up_proj = nn.Linear(
            bottleneck_size, hidden_size, bias=bias, device=device, dtype=dtype
        )
        if isinstance(scaling, str):
            size = 1 if scaling == "learned" else hidden_size
            self.scaling = nn.Parameter(torch.ones(size, device=device, dtype=dtype))
        else:
            self.scaling = scaling
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the parameters anew, as `init` says; a learned scaling returns to 1."""
        if self.init == "identity":
            self.down_proj.reset_parameters()  # nn.Linear's own: Kaiming-uniform with a = sqrt(5)
            nn.init.zeros_(self.up_proj.weight)
        else:
            for projection in (self.down_proj, self.up_proj):
                if self.init == "houlsby":
                    nn.init.trunc_normal_(projection.weight, std=0.01, a=-0.02, b=0.02)
                else:
                    nn.init.normal_(projection.weight, std=0.02)
        for projection in (self.down_proj, self.up_proj):
            if projection.bias is not None and (
                projection is self.up_proj or self.init != "identity"
            ):
                nn.init.zeros_(projection.bias)
        if isinstance(self.scaling, nn.Parameter):
            nn.init.ones_(self.scaling)

    def forward(
        self, x: Tensor, residual: str | Tensor | None = "input", skip: Tensor | None = None
    ) -> Tensor:
        """y [..., H]; `residual` and `skip` as in `adapterkern.bottleneck_adapter`."""
        down, up = self.down_proj, self.up_proj  # asked for once: nn.Module searches for them
        if not (_is_linear(down) and _is_linear(up)) or _torch.beyond_its_class(down, up):
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
        return self._fused_call(x, residual, skip, self.down_proj, self.up_proj)

    def _fused_call(
        self,
        x: Tensor,
        residual: str | Tensor | None,
        skip: Tensor | None,
        down: nn.Linear,
        up: nn.Linear,
    ) -> AdapterCall:
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
            if not _is_linear(projection):
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

        down, up = (partial(project, projection) for projection in (self.down_proj, self.up_proj))
        return reference.forward(call, down, up)[0].y

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


def _is_linear(projection: nn.Module) -> bool:
    """Whether the weights of a projection tell what its class computes."""
    return type(projection).forward is nn.Linear.forward


def _weight_dtype(projection: nn.Module) -> torch.dtype | None:
    """The dtype of its weight; None where that is packed or no floating-point one."""
    dtype = getattr(getattr(projection, "weight", None), "dtype", None)
    return dtype if dtype in FLOAT_DTYPES else None
