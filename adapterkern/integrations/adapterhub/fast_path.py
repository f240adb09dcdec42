"""The methods that stand in for three of the library's `BottleneckLayer` while a model is patched;
`mixed` has two more, for children that one launch serves.

`compose_single` (level ADAPTER) is the one place where the library calls an adapter, in whatever
composition. `bottleneck_layer_forward` (level LAYER) is the whole layer for a single active
adapter: no composition is built, and the block's residual is added in the adapter's own pass. With
h the block's output, inp its input, t = h + inp, A(x) = scaling * up(act(down(x))), and LN the
block's LayerNorm in post-LN models (pre-LN models have none here):

    original_ln_before, residual h    LN(t + A(LN(t)))       pre-LN: t + A(t), one pass over t
    input and residual h              LN(h + A(h) + inp)     pre-LN: h + A(h) + inp
    residual LN(t)                    x + A(x) with x = LN(t); with original_ln_after LN(. + inp)
    parallel                          LN(inp + A(inp) + h)   pre-LN: inp + A(inp) + h

An LN that comes last, and that is an nn.LayerNorm and no more, runs in the adapter's pass as well.
What these do not cover runs the library's code. The methods are class-level and keep nothing on
modules, so copies, pickles, threads and DataParallel replicas need no care, and torch.compile
traces them without a graph break.
"""

import uuid
import warnings
from typing import Any

import torch
from torch import Tensor

from adapterkern.backends.base import BackendUnsupportedError
from adapterkern.dispatch import is_declared
from adapterkern.errors import FallbackWarning, UnsupportedAdapterError
from adapterkern.functional import run_call
from adapterkern.integrations.adapterhub.eligibility import norm_parts_of, parts_of, with_norm_of
from adapterkern.integrations.adapterhub.reasons import REASONS
from adapterkern.integrations.adapterhub.stock import (
    AdapterSetup,
    BottleneckLayer,
    ForwardContext,
    ParallelAdapter,
    Stack,
)
from adapterkern.results import given_of
from adapterkern.spec import make_call

# Levels of a model: which of the library's methods stand aside.
OFF, ADAPTER, LAYER = 0, 1, 2
FLAG = "_adapterkern_level"  # on a model's ModelAdaptersConfig: (token, level, strict)

_stock_single = BottleneckLayer.compose_single
_stock_fuse = BottleneckLayer.compose_fuse
_stock_forward = BottleneckLayer.bottleneck_layer_forward
# The path of a single adapter replaces these too: a subclass with its own keeps the library's path.
_INLINED = {
    name: getattr(BottleneckLayer, name)
    for name in ("get_active_setup", "compose", "compose_stack", "pre_block")
}

# A flag counts only under the token it was written with, so `patch()` and `unpatch()` forget every
# flag at once, and a pickle does not carry the patch into another process.
token = uuid.uuid4().hex
default = (OFF, False)  # level and strict of models without a flag
warned: set[str] = set()
_usual_classes: set[type] = set()


def level_of(config: Any) -> int:
    """The level of the model with this `ModelAdaptersConfig`."""
    flag = getattr(config, FLAG, None)
    return flag[1] if flag is not None and flag[0] == token else default[0]


def is_strict(config: Any) -> bool:
    """Whether a fallback of the model with this `ModelAdaptersConfig` is an error."""
    flag = getattr(config, FLAG, None)
    return flag[2] if flag is not None and flag[0] == token else default[1]


def bottleneck_layer_forward(
    self: Any, hidden_states: Tensor, residual_input: Tensor | None, layer_norm: Any
) -> Tensor:
    """In place of the library's: the layer's output [B, S, H], of h and inp [B, S, H]."""
    config = getattr(self, "adapters_config", None)
    if config is not None and level_of(config) == LAYER:
        adapter = _single_active(self, config)
        if adapter is not None:
            output = _layer(adapter, hidden_states, residual_input, layer_norm)
            if output is not None:
                return output
    return _stock_forward(self, hidden_states, residual_input, layer_norm)


def _single_active(layer: Any, config: Any) -> Any:
    """The adapter that alone is active here; None if there is none, or more is asked for."""
    contexts = getattr(AdapterSetup.storage, "contexts", None)
    setup = contexts[-1].adapter_setup if contexts else config.active_setup
    if type(setup) is not Stack or len(setup.children) != 1:
        return None
    name = setup.children[0]
    adapters = layer.__dict__["_modules"]["adapters"].__dict__["_modules"]
    if type(name) is not str or name not in adapters:
        return None
    skipped = config.skip_layers
    if skipped is not None and layer.layer_idx in skipped:
        return None
    if _scores_wanted() or not _is_usual(type(layer)):
        return None
    return adapters[name]


def _scores_wanted() -> bool:
    contexts = getattr(ForwardContext.storage, "contexts", None)
    return bool(contexts and contexts[-1].output_adapter_gating_scores)


def _is_usual(kind: type) -> bool:
    # A compiled call must not read what eager calls remember: it would be compiled anew for it.
    compiling = torch.compiler.is_compiling()
    if not compiling and kind in _usual_classes:
        return True
    if kind.compose_single is not compose_single:  # type: ignore[attr-defined]
        return False
    usual = all(getattr(kind, name) is method for name, method in _INLINED.items())
    if usual and not compiling:
        _usual_classes.add(kind)
    return usual


def _layer(adapter: Any, h: Tensor, inp: Tensor | None, layer_norm: Any) -> Tensor | None:
    """The fused layer; None where `compose_single` or the library must decide."""
    if type(h) is not Tensor or _is_traced():
        return None
    if inp is not None and (type(inp) is not Tensor or inp.shape != h.shape):
        return None
    parts = parts_of(adapter)
    if isinstance(parts, str):
        return None
    state = adapter.__dict__
    ln_after, residual = state["original_ln_after"], state["residual_before_ln"]
    norm = (layer_norm, norm_parts_of(layer_norm)) if layer_norm else None
    after = norm if ln_after else None
    if type(adapter) is ParallelAdapter:
        if inp is None:
            return None
        return _adapt(parts, inp, inp if ln_after else h, h if ln_after else None, after)
    if inp is None and (ln_after or layer_norm):
        return None
    if residual is not True and residual is not False:
        return None
    x, skip = h, inp if ln_after else None
    if state["original_ln_before"] and inp is not None:
        t = h + inp
        x = _normalised(norm, t)
        if residual and ln_after:
            h, skip = t, None  # the residuals h and inp add up to t, which is at hand
    return _adapt(parts, x, h if residual else x, skip, after)


def _normalised(norm: Any, x: Tensor) -> Tensor:
    """LN(x) for a norm and its parts; x where the block has no LN."""
    if norm is None:
        return x
    module, parts = norm
    return module(x) if isinstance(parts, str) else torch.layer_norm(x, *parts)


def _is_traced() -> bool:
    """Whether torch.jit.trace or its ONNX export runs; dispatch itself heeds torch.export."""
    return torch.jit.is_tracing()


def _adapt(
    parts: Any, x: Tensor, residual: Tensor | None, skip: Tensor | None = None, norm: Any = None
) -> Tensor | None:
    """The fused adapter, and the norm behind it where there is one; None where x and the parameters
    meet only under autocast, which is off.
    """
    down_weight, up_weight, down_bias, up_bias, activation, scaling = parts
    if x.dtype != down_weight.dtype and not torch.is_autocast_enabled(x.device.type):
        return None
    tensors = (x, down_weight, up_weight, down_bias, up_bias, residual, skip)
    call = make_call(*tensors, activation, scaling)
    if norm is None:
        return given_of(run_call(call))
    norm_parts = norm[1]
    if not isinstance(norm_parts, str) and is_declared("layer_norm", x.device.type):
        normed = with_norm_of(call, norm_parts)
        if not isinstance(normed, str):
            # What was named, or ADAPTERKERN_STRICT, is about the adapter: it need not take norms.
            try:
                return given_of(run_call(normed))
            except BackendUnsupportedError:
                pass
    return _normalised(norm, given_of(run_call(call)))


def compose_single(self: Any, adapter_setup: str, state: Any, lvl: int = 0) -> Any:
    """In place of the library's: the state after the adapter of that name.

    `state.bottleneck_up`, the scaled up-projection, is read by AdapterFusion alone. Here it is
    None everywhere but inside of `compose_fuse`, which marks its children by giving them one.
    """
    if state.bottleneck_up is not None or level_of(self.adapters_config) == OFF:
        return _stock_single(self, adapter_setup, state, lvl)
    adapter = self.adapters[adapter_setup]
    parts = parts_of(adapter)
    x, residual = state.hidden_states, state.adapter_residual
    reason = parts if isinstance(parts, str) else call_reason(x, residual)
    if reason is not None:
        where = f"adapter {adapter_setup!r}, {self.location_key} of layer {self.layer_idx}"
        report(reason, where, self.adapters_config)
        return _stock_single(self, adapter_setup, state, lvl)._replace(bottleneck_up=None)
    if type(adapter) is ParallelAdapter:
        residual = None  # the library adds it in post_forward
    output = _adapt(parts, x, residual)
    if output is None:
        return _on_other_dtype(self, adapter_setup, state, lvl)
    return state._replace(hidden_states=output, last=adapter_setup)


def call_reason(x: Any, residual: Any) -> str | None:
    """The code of what keeps this call of an eligible adapter on the library's path."""
    if type(x) is not Tensor or type(residual) is not Tensor or _is_traced():
        return "export"
    if residual.shape != x.shape:
        return "shape"
    return "gating_scores" if _scores_wanted() else None


def _on_other_dtype(layer: Any, name: str, state: Any, lvl: int) -> Any:
    """The library's own path, which raises as a rule; its error gets the cure."""
    try:
        return _stock_single(layer, name, state, lvl)._replace(bottleneck_up=None)
    except RuntimeError as error:
        dtype = state.hidden_states.dtype
        raise RuntimeError(
            f"{error}\n  adapter {name!r} and its input differ in dtype; the input is {dtype}.\n"
            f"  hint: model.adapter_to({name!r}, dtype={dtype}), or run under torch.autocast"
        ) from error


class _Mark:
    """No tensor, so that where no child replaces it the library's error is the library's own."""

    def __getitem__(self, _: Any) -> "_Mark":
        return self

    def repeat(self, *_: int) -> "_Mark":
        return self


_MARK = _Mark()


def compose_fuse(self: Any, adapter_setup: Any, state: Any, lvl: int = 0) -> Any:
    """In place of the library's: marks the children's state, so `compose_single` lets them be."""
    if state.bottleneck_up is not None or level_of(self.adapters_config) == OFF:
        return _stock_fuse(self, adapter_setup, state, lvl)
    where = f"{adapter_setup!r}, {self.location_key} of layer {self.layer_idx}"
    report("fuse", where, self.adapters_config)
    marked = state._replace(bottleneck_up=_MARK)
    return _stock_fuse(self, adapter_setup, marked, lvl)._replace(bottleneck_up=None)


def report(reason: str, where: str, config: Any) -> None:
    """Warn that something runs on the library's path: once a reason, never in a traced model.

    Raises:
        UnsupportedAdapterError: the model was patched with `strict`.
    """
    if reason == "export":
        return
    if is_strict(config):
        raise UnsupportedAdapterError(
            f"strict=True, and {where} cannot run fused (reason: {reason}, {REASONS[reason]}).\n"
            "  hint: adapterhub.patch(model) lets the PyTorch path run it"
        )
    if not torch.compiler.is_compiling() and reason not in warned:
        warned.add(reason)
        warnings.warn(
            f"adapterkern: {where} runs on the PyTorch path (reason: {reason}, {REASONS[reason]}). "
            "See adapterhub.explain(model).",
            FallbackWarning,
            stacklevel=3,
        )
