"""Sites: an adapted layer of a block, the residual add behind it, and often a norm behind that."""

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adapterkern import _torch
from adapterkern.errors import FallbackWarning
from adapterkern.integrations.transformers.norms import Kind, describe
from adapterkern.modules.adapter_norm import Norm, adapter_norm, unfused_reason
from adapterkern.modules.bottleneck import BottleneckAdapter
from adapterkern.modules.deferral import deferred
from adapterkern.modules.insert import inserted_adapters
from adapterkern.validation import name_of

NONE_ACTIVE = "no adapter is active behind this layer"
# transformers 5 keeps hooks of this module on attentions, to note the weights beside their output.
_CAPTURES = "transformers.utils.output_capturing"
_warned: set[str] = set()


class Site(NamedTuple):
    """Where a class of blocks runs a layer, an add and a norm one after another."""

    layer: tuple[str, ...]  # the adapted layer, as a path from the block
    norm: str | None  # the norm behind the add; None where the next block holds it
    dropout: tuple[str, ...] | None = None  # a module, or a number of the block, before the add

    @property
    def part(self) -> str | None:
        """The part of the block that calls the layer, where the block itself does not."""
        return self.layer[0] if len(self.layer) > 1 else None

    def behind_part(self) -> "Site":
        """The same with the part in place of the layer: dropout within it comes before then."""
        inside = self.dropout is not None and self.dropout[:1] == self.layer[:1]
        return self._replace(layer=self.layer[:1], dropout=None if inside else self.dropout)


class Placed(NamedTuple):
    """A site of one block, with what was recognised there."""

    site: Site
    kind: Kind | None  # of its norm
    classes: tuple[type | None, type | None]  # of the part and of the norm


class Pass(NamedTuple):
    """What one call of a block runs at a site."""

    adapter: BottleneckAdapter | None  # None: the layer itself runs what follows it
    norm: Any
    description: Norm | None = None
    narrows: bool = False  # whether the layer holds the adapter's output to the dtype of its input

    def deferred(self) -> deferred:
        """A context in which the layer leaves out the adapter."""
        return deferred(self.adapter)

    def add(self, h: Tensor, skip: Tensor) -> Tensor:
        """The stream: what follows the layer's output h, and the residual `skip`."""
        if self.adapter is None or self._widens(h):
            return self._adapted(h) + skip
        return self.adapter(h, skip=skip)

    def add_and_norm(self, h: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of the stream, and the stream."""
        if self.adapter is None or self.description is None or self._widens(h):
            stream = self._adapted(h) + skip
            return self.norm(stream), stream
        return adapter_norm(  # type: ignore[return-value]
            self.adapter, self.norm, self.description, h, skip=skip, prenorm=True
        )

    def normed(self, h: Tensor, skip: Tensor) -> Tensor:
        """The norm of the stream alone."""
        if self.adapter is None or self.description is None or self._widens(h):
            return self.norm(self._adapted(h) + skip)
        return adapter_norm(  # type: ignore[return-value]
            self.adapter, self.norm, self.description, h, skip=skip
        )

    def _adapted(self, h: Tensor) -> Tensor:
        return h if self.adapter is None else self.adapter(h).to(h.dtype)

    def _widens(self, h: Tensor) -> bool:
        """Whether a learned scaling would widen a stream that the layer keeps narrow."""
        scaling = self.adapter.scaling if self.narrows and self.adapter is not None else None
        return (
            isinstance(scaling, Tensor) and torch.promote_types(scaling.dtype, h.dtype) != h.dtype
        )


def prepare(block: nn.Module, placed: Placed | None, site: Site) -> Pass:
    """The pass of a call; it leaves the adapter to the layer where that is needed."""
    norm = None if site.norm is None else getattr(block, site.norm)
    if placed is None:
        return Pass(None, norm)
    site = placed.site
    layer = reach(block, site.layer)
    adapter = adapter_behind(layer)
    if adapter == NONE_ACTIVE:
        return Pass(None, norm)
    if isinstance(adapter, str):
        report(adapter)
        return Pass(None, norm)
    obstacle = obstacle_at(block, placed, layer, adapter)
    obstacle = obstacle or active_dropout(block, site, adapter)
    if obstacle is not None:
        report(obstacle)
        return Pass(None, norm)
    description = None if norm is None else describe(norm, placed.kind)
    return Pass(adapter, norm, description, hasattr(layer, "adapters_to_run"))


def adapter_behind(layer: Any) -> BottleneckAdapter | str:
    """The one adapter that runs behind this layer just now, or why there is none such."""
    if is_wrapped(layer):
        return f"a {type(layer).__name__} wraps the adapted layer, and may run it again elsewhere"
    peft = hasattr(layer, "adapters_to_run")  # by its method: plain models need no peft
    adapters = layer.adapters_to_run() if peft else inserted_adapters(layer)
    if not adapters:
        return NONE_ACTIVE
    if len(adapters) > 1:
        return "several adapters follow one another behind this layer"
    if peft and layer.runs_beside(adapters[0]):
        return "its adapter is parallel: it reads the input of the FFN"
    return adapters[0]


def is_wrapped(layer: Any) -> bool:
    """Whether a module around an adapted layer passes its attributes on, as wrappers for
    checkpointing do: such a layer is computed again where nothing defers its adapter."""
    return hasattr(layer, "adapters_to_run") and not hasattr(type(layer), "adapters_to_run")


def obstacle_at(
    block: nn.Module, placed: Placed, layer: Any, adapter: BottleneckAdapter
) -> str | None:
    """Why a site must run as it stands, in whatever mode. None where nothing forbids one pass."""
    site = placed.site
    part = None if site.part is None else getattr(block, site.part)
    norm = None if site.norm is None else getattr(block, site.norm)
    for name, module, kind in zip(("part", "norm"), (part, norm), placed.classes, strict=True):
        if module is not None and type(module) is not kind:
            return f"its {name} became a {type(module).__name__} after fuse_norms"
    hooks = _hooks_on_layer(layer)
    if hooks is not None:
        return hooks
    if part is not None and _is_watched(part):
        return f"{type(part).__name__} has hooks or a forward of its own"
    if norm is None:
        reason = adapter.unfused_reason() or _torch.beyond_its_class(adapter)
    else:
        reason = unfused_reason(adapter, norm) or _strange_norm(norm, placed.kind, adapter)
    return reason or _strange_dropout(block, site)


def _hooks_on_layer(layer: Any) -> str | None:
    """Of what sees or changes the output of the layer; one hook is that of `insert`."""
    if has_own_forward(layer):
        return "the adapted layer has a forward of its own, which may do more with its output"
    peft = hasattr(layer, "adapters_to_run")
    hooks = layer._forward_hooks, layer._backward_hooks, layer._backward_pre_hooks
    if sum(map(len, hooks)) > (0 if peft else 1):
        return "the adapted layer has hooks, which would see its output without the adapter"
    if peft and layer._forward_pre_hooks:
        return "the adapted layer has hooks, as each has in a batch with adapter_names"
    return None


def has_own_forward(module: nn.Module) -> bool:
    """Whether someone has replaced the forward; that of the class, bound, is left by many."""
    forward = module.__dict__.get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def _is_watched(part: nn.Module) -> bool:
    if _torch.beyond_its_class(part) is None:
        return False
    others = part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks
    captures = all(hook.__module__ == _CAPTURES for hook in part._forward_hooks.values())
    return "forward" in part.__dict__ or any(others) or not captures or not part._forward_hooks


def _strange_norm(norm: Any, kind: Kind | None, adapter: BottleneckAdapter) -> str | None:
    weight, eps = norm.weight, describe(norm, kind).eps
    for parameter in (weight, getattr(norm, "bias", None)):
        if parameter is not None and (_torch.is_subclass(parameter) or hasattr(parameter, "ds_id")):
            return "the parameters of its norm are sharded, or a class of tensors of their own"
    if not eps > 0:
        return f"the eps of its norm is {eps}"
    dtype = adapter.down_proj.weight.dtype
    widens = kind is not None and kind.cast_before_weight
    if weight is not None and torch.promote_types(weight.dtype, dtype) != dtype and not widens:
        found = f"{name_of(weight.dtype)} parameters behind an adapter in {name_of(dtype)}"
        return f"its norm has {found}, and returns the latter where the pass would widen it"
    return None


def _strange_dropout(block: nn.Module, site: Site) -> str | None:
    dropout = None if site.dropout is None else reach(block, site.dropout)
    if not isinstance(dropout, nn.Module):
        return None
    if type(dropout) not in (nn.Dropout, nn.Identity):
        return f"its dropout is a {type(dropout).__name__}"
    if _torch.beyond_its_class(dropout) is not None:
        return "its dropout has hooks or a forward of its own"
    return None


def active_dropout(block: nn.Module, site: Site, adapter: BottleneckAdapter) -> str | None:
    """Why a call runs a site as it stands in training: the order of dropout and adapter, or a
    dropout within the adapter, which takes plain operations.
    """
    if adapter.training and adapter.dropout > 0:
        return f"while training, the adapter's own dropout of p = {adapter.dropout} is active"
    dropout: Any = 0 if site.dropout is None else reach(block, site.dropout)
    is_module = isinstance(dropout, nn.Module)
    p = getattr(dropout, "p", 0) if is_module else dropout
    training = dropout.training if is_module else block.training
    if not training or p == 0:
        return None
    return f"while training, dropout of p = {p} comes between adapter and add; evaluation is fused"


def reach(block: nn.Module, path: tuple[str, ...]) -> Any:
    """The attribute at the end of a path; None where there is none."""
    found: Any = block
    for name in path:
        found = getattr(found, name, None)
    return found


def report(reason: str) -> None:
    """Warn that a site of a fused model runs as it stands: once a reason, never while compiling."""
    if not torch.compiler.is_compiling() and reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"adapterkern: a block that fuse_norms prepared runs its adapter, add and norm one "
            f"after another: {reason}. See adapterkern.integrations.transformers.explain(model).",
            FallbackWarning,
            stacklevel=4,
        )
