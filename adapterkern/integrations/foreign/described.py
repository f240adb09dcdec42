"""A module of the user's own, described by the names of its parts and compared with its adapter."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from adapterkern.activations import canonical_name
from adapterkern.errors import UnsupportedAdapterError
from adapterkern.functional import bottleneck_adapter
from adapterkern.integrations.foreign.conversion import convert, unsupported
from adapterkern.modules.bottleneck import BottleneckAdapter

# In float64 the two differ by 1e-16, by 1e-7 where the module converts its input to float32; the
# two forms of gelu differ by 1e-4.
_TOLERANCE = 2e-6
_TOKENS = ((2, 3), (5,))  # the shapes before H that a module is tried with
_RESIDUALS = ("input", None)


def from_description(
    module: nn.Module,
    down: str | None,
    activation: str | Callable | None,
    up: str | None,
    scaling: str | float | None,
    dropout: str | None,
    residual: str | None,
    check: bool,
) -> BottleneckAdapter:
    """`from_module` for a module whose parts are named."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}.")
    if residual not in _RESIDUALS:
        raise ValueError(f'residual must be "input" or None, got {residual!r}.')
    parts = {name: _part(module, name, given) for name, given in (("down", down), ("up", up))}
    drop = None if dropout is None else _part(module, "dropout", dropout)
    scale = _scaling_of(module, scaling)
    adapter = convert(
        module, parts["down"], _function_of(module, activation), parts["up"], scale, drop
    )
    if check:
        _compare(module, adapter, drop, residual)
    return adapter


def _part(module: nn.Module, role: str, name: Any) -> nn.Module:
    if not isinstance(name, str):
        raise TypeError(f"{role} must be the name of a submodule, got {name!r}.")
    try:
        return module.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"{role} must be the name of a submodule of {type(module).__name__}, got {name!r}.\n"
            f"  hint: it has {children_of(module)}"
        ) from None


def children_of(module: nn.Module) -> str:
    """The names and classes of what is directly in a module."""
    found = [f"{name} ({type(child).__name__})" for name, child in module.named_children()]
    return ", ".join(found) or "no submodules"


def _function_of(module: nn.Module, given: Any) -> Any:
    """What is called between the projections, or the name of its activation."""
    if not isinstance(given, str):
        if callable(given):
            return given
        raise TypeError(f"activation must be a name or a function, got {given!r}.")
    try:
        return module.get_submodule(given)
    except AttributeError:
        held = getattr(module, given, None)
    if callable(held):
        return held
    try:
        return canonical_name(given)
    except ValueError as error:
        raise ValueError(
            f"activation must be the name of a submodule, of a function that the module holds, or "
            f"of an activation, got {given!r}.\n  hint: it has {children_of(module)}"
        ) from error


def _scaling_of(module: nn.Module, given: Any) -> float | Tensor:
    if given is None:
        return 1.0
    held = getattr(module, given, None) if isinstance(given, str) else given
    if isinstance(held, nn.Parameter) or (isinstance(held, float | int) and held is not True):
        return held
    what = f"{given!r}, which is a {type(held).__name__}" if isinstance(given, str) else repr(given)
    raise ValueError(
        "scaling must be a number, or the name of a number or a parameter in the module, "
        f"got {what}."
    )


def _compare(
    module: nn.Module, adapter: BottleneckAdapter, drop: nn.Module | None, residual: str | None
) -> None:
    """Refuse a module that computes something else, with random weights, in both modes.

    The weights as they are may hide it: an adapter that starts as the identity adds nothing.
    """
    trial = _Trial(module, adapter, drop)
    for mode in (False, True):
        x, y = trial.call(mode)
        up, scaled = trial.branch(x)
        off = {None: _off(y, scaled, scaled), "input": _off(y, x + scaled, scaled)}
        if not off[residual] <= _TOLERANCE:
            raise _difference(module, off, residual, mode)
        dropped = (_off(trial.dropped, wanted, wanted) for wanted in (up, scaled))
        if drop is not None and min(dropped) > _TOLERANCE:
            raise unsupported(module, "its dropout does not drop out of the up-projection")


class _Trial:
    """A module with random weights, called in float64 on the CPU; itself it stays as it is."""

    def __init__(
        self, module: nn.Module, adapter: BottleneckAdapter, drop: nn.Module | None
    ) -> None:
        self.module, self.adapter, self.drop = module, adapter, drop
        self.dropped: Any = None  # what its dropout was given
        self._random = torch.Generator().manual_seed(0)
        self._shared = {id(tensor): self._like(tensor) for tensor in adapter.parameters()}
        named = [
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        ]
        self._state = {
            name: self._shared[id(tensor)] if id(tensor) in self._shared else tensor.cpu().double()
            for name, tensor in named
            if tensor.is_floating_point()
        }

    def _like(self, tensor: Tensor) -> Tensor:
        deviation = tensor.shape[-1] ** -0.5 if tensor.dim() == 2 else 1.0
        return self._draw(*tensor.shape) * deviation

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._random, dtype=torch.float64)

    def call(self, training: bool) -> tuple[Tensor, Tensor]:
        """x, and y of the module without the dropout that was described."""
        modes = {part: part.training for part in self.module.modules()}
        kept = getattr(self.drop, "p", None)
        handle = self.drop.register_forward_pre_hook(self._note) if self.drop else None
        try:
            self.module.train(training)
            if kept is not None:
                self.drop.p = 0.0  # type: ignore[union-attr]
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                return self._call_once()
        finally:
            for part, mode in modes.items():
                part.training = mode
            if kept is not None:
                self.drop.p = kept  # type: ignore[union-attr]
            if handle is not None:
                handle.remove()

    def _note(self, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.dropped = inputs[0]

    def _call_once(self) -> tuple[Tensor, Tensor]:
        errors = []
        for tokens in _TOKENS:
            x = self._draw(*tokens, self.adapter.hidden_size)
            try:
                # Tied weights have one value here already, which is not to be asked for.
                y = torch.func.functional_call(self.module, self._state, (x,), tie_weights=False)
            except Exception as error:  # a forward of anybody's
                errors.append(f"{type(error).__name__}: {error}")
                continue
            if isinstance(y, Tensor) and y.shape == x.shape:
                return x, y
            errors.append(
                f"{type(y).__name__} {list(getattr(y, 'shape', []))} came for {list(x.shape)}"
            )
        raise unsupported(
            self.module,
            f"it cannot be compared with one, since a call with x alone gives no y: {errors[0]}",
            "check=False takes your word for what it computes",
        )

    def branch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The up-projection of x, unscaled and scaled."""
        down, up, scaling = self.adapter.down_proj, self.adapter.up_proj, self.adapter.scaling
        weights = [down.weight, up.weight, down.bias, up.bias]
        tensors: Any = [None if tensor is None else self._shared[id(tensor)] for tensor in weights]
        activation = self.adapter.activation
        y = bottleneck_adapter(
            x, *tensors, residual=None, activation=activation, backend="reference"
        )
        return y, y * (self._shared[id(scaling)] if isinstance(scaling, Tensor) else scaling)


def _off(found: Any, wanted: Tensor, unit: Tensor) -> float:
    """The rms of the difference, measured in that of `unit`."""
    if not isinstance(found, Tensor) or found.shape != wanted.shape:
        return float("inf")
    return float((found - wanted).square().mean().sqrt() / unit.square().mean().sqrt())


def _difference(
    module: nn.Module, off: dict[str | None, float], residual: str | None, training: bool
) -> UnsupportedAdapterError:
    other = next(name for name in _RESIDUALS if name != residual)
    if off[other] <= _TOLERANCE:
        adds = "adds its input" if other else "does not add its input"
        call = "adapter(x)" if other else "adapter(x, residual=None)"
        return unsupported(
            module,
            f"the module {adds}, and residual={residual!r} says otherwise",
            f"residual={other!r}; its output is then {call}",
        )
    mode = "training" if training else "evaluation"
    return unsupported(
        module,
        f"in {mode} its output differs from that of these parts, by {off[residual]:.1g} of what "
        "they add",
        f"describe every part that it computes with, of {children_of(module)}",
    )
