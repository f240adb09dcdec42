"""Parallel and BatchSplit of a patched model: one launch for all children of a layer.

In both, each child owns a run of the batch's rows; input and residual of all of them are what the
`pre_forward` of the first child makes. So the library's loop over slices and its `torch.cat` are
one call of the op of many adapters, in which a child is a slot:

    y[t] = residual[t] + s_i * (act(x[t] D_i^T + b_i) U_i^T + c_i), i the child that owns row t;
    y[t] = x[t] for a child that has no adapter in this layer.

A ParallelAdapter adds no residual here; the library does, behind the composition. Sizes and
scalings differ as they like. What differs in more, or is a composition itself, keeps the loop,
whose children `fast_path.compose_single` runs one by one; so does everything where no kernel takes
several adapters, since plain PyTorch gathers and scatters rows that the loop only cuts.

The stacked weights are copied anew at every call and handed over as the leaves of the call, so that
each parameter gets its own gradient: nothing tells of a write through `.data`, so a stack that was
kept could be stale.
"""

import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adapterkern import _torch, dispatch
from adapterkern.backends.base import BackendUnsupportedError
from adapterkern.errors import FallbackWarning
from adapterkern.grouped import ops
from adapterkern.grouped.call import OPERATION, TILE, GroupedCall, make_grouped_call
from adapterkern.grouped.routing import AdapterRouting, sort_tokens
from adapterkern.integrations.adapterhub import fast_path
from adapterkern.integrations.adapterhub.eligibility import Parts, parts_of
from adapterkern.integrations.adapterhub.reasons import GROUP_REASONS, SAME_LAUNCH
from adapterkern.integrations.adapterhub.stock import (
    AdapterCompositionBlock,
    BatchSplit,
    BottleneckLayer,
    ForwardContext,
    Parallel,
    ParallelAdapter,
)
from adapterkern.modules import explain as explaining

_stock_parallel = BottleneckLayer.compose_parallel
_stock_batch_split = BottleneckLayer.compose_batch_split
# What the grouped call replaces: a subclass with its own keeps the loop.
_INLINED = {name: getattr(BottleneckLayer, name) for name in ("vslice", "pad_and_concat")}


class Group(NamedTuple):
    """The children of a composition, of which one launch can serve all."""

    slots: tuple[int, ...]  # of each child; -1 where it has no adapter in this layer
    parts: tuple[Parts, ...]  # of each slot
    is_parallel: bool


class Layout(NamedTuple):
    """What is the same in every layer that has these children and rows. Read-only, and shared."""

    routing: tuple[Tensor, Tensor, Tensor, Tensor]
    ranks: Tensor | None
    scalings: Tensor | None  # 1 where a scaling is learned


def compose_parallel(self: Any, adapter_setup: Any, state: Any, lvl: int = 0) -> Any:
    """In place of the library's: the state after all children, on repeated rows."""
    group, context = _group(self, adapter_setup, state), ForwardContext.get_context()
    if group is None or context is None:
        return _stock_parallel(self, adapter_setup, state, lvl)
    children = len(group.slots)
    if not context.adapters_parallelized:  # the first such layer, as the library does it
        context.original_batch_size = len(state.hidden_states)
        state, context.adapters_parallelized = self.repeat(state, children), True
    rows, left = divmod(len(state.hidden_states), children)
    after = None if left else _after(self, adapter_setup, group, state, (rows,) * children)
    return _stock_parallel(self, adapter_setup, state, lvl) if after is None else after


def compose_batch_split(self: Any, adapter_setup: Any, state: Any, lvl: int = 0) -> Any:
    """In place of the library's: the state after all children, each on rows of its own."""
    group, after, rows = _group(self, adapter_setup, state), None, adapter_setup.batch_sizes
    fits = sum(rows) == len(state.hidden_states) and min(rows) >= 0
    if group is not None and fits and len(rows) == len(group.slots):
        after = _after(self, adapter_setup, group, state, tuple(rows))
    return _stock_batch_split(self, adapter_setup, state, lvl) if after is None else after


def group_of(layer: Any, setup: Any) -> Group | str:
    """The children of a composition in this layer as a group, or the code in `GROUP_REASONS` of
    what forbids it; "" where there are not two adapters to group.
    """
    adapters = layer.adapters.__dict__["_modules"]  # at half the time of the ModuleDict
    if not all(type(child) is str for child in setup.children):
        return "nested"
    slots: list[int] = []
    of_slots: list[Any] = []
    for child in setup.children:
        slots.append(len(of_slots) if child in adapters else -1)
        if child in adapters:
            of_slots.append(adapters[child])
    if len(of_slots) < 2:
        return ""
    parts = [parts_of(adapter) for adapter in of_slots]
    if any(isinstance(found, str) for found in parts):
        return "child"
    kinds = {(type(adapter), _kind(found)) for adapter, found in zip(of_slots, parts, strict=True)}
    if len(kinds) > 1:
        return "differ"
    if any(isinstance(found[5], Tensor) and found[5].numel() != 1 for found in parts):
        return "scaling"
    return Group(tuple(slots), tuple(parts), type(of_slots[0]) is ParallelAdapter)  # type: ignore[arg-type]


def _kind(parts: Any) -> tuple:
    """What the adapters of one launch have in common, besides their class."""
    down, up, down_bias, up_bias, activation, _ = parts
    given = tuple(t is None or (t.dtype, t.device) for t in (down, up, down_bias, up_bias))
    return activation, down.shape[1], given


def call_of(
    group: Group, x: Tensor, residual: Tensor | None, tokens: tuple[int, ...]
) -> tuple[GroupedCall, ops.Leaves] | str:
    """The one call of these children, of which each owns so many tokens of x in turn; or the code
    in `GROUP_REASONS` of what forbids it.
    """
    downs, ups, down_biases, up_biases, activations, scales = zip(*group.parts, strict=True)
    ranks = tuple(down.shape[0] for down in downs)
    floats = tuple(1.0 if isinstance(s, Tensor) else float(s) for s in scales)
    layout = _layout(x, group.slots, tokens, ranks, floats)
    learned = [(i, s) for i, s in enumerate(scales) if isinstance(s, Tensor)]
    with torch.no_grad():
        down, up, down_bias, up_bias = map(ops.stack_of, (downs, ups, down_biases, up_biases))
        assert down is not None
        assert up is not None
        scalings = _scalings(layout, learned, down)
    leaves = ops.NO_LEAVES
    if torch.is_grad_enabled():
        of_learned = [s if isinstance(s, Tensor) else None for s in scales]
        parameters = zip(downs, ups, down_biases, up_biases, of_learned, strict=True)
        leaves = ops.leaves_of(enumerate(parameters))
    records = any(parameter.requires_grad for parameter in leaves.parameters)
    call = make_grouped_call(
        x, down, up, down_bias, up_bias, residual, None, scalings, layout.ranks, layout.routing,
        activations[0], records,
    )  # fmt: skip
    dtype = call.output_dtype
    if any(torch.promote_types(dtype, scaling.dtype) != dtype for _, scaling in learned):
        return "scaling"
    return call, leaves if records else ops.NO_LEAVES


def backend_of(call: GroupedCall) -> str | None:
    """The backend that is named, or the kernels that take the call; None where neither is so."""
    try:
        decision = dispatch.select(call)
    except BackendUnsupportedError:  # what was named, or ADAPTERKERN_STRICT, is about one adapter
        return None
    is_named = dispatch.wanted_backend("auto") != "auto"
    runs = not decision.plain and (is_named or decision.backend != "reference")
    return decision.backend if runs else None


def is_served(device_type: str) -> bool:
    """Whether a backend that would run there has the op of many adapters at all."""
    return dispatch.is_declared(OPERATION, device_type)


def _group(layer: Any, setup: Any, state: Any) -> Group | None:
    """The group of a composition that may run as one, whatever its inputs turn out to be."""
    config, x = layer.adapters_config, state.hidden_states
    if state.bottleneck_up is not None or fast_path.level_of(config) == fast_path.OFF:
        return None
    if type(x) is not Tensor or not is_served(x.device.type) or not _is_usual(type(layer)):
        return None
    if _torch.functorch_is_active() or _torch.forward_ad_is_active():
        return None  # plain operations have to run, and the loop has fewer
    group = group_of(layer, setup)
    if isinstance(group, str):
        _report(group, layer, setup)
        return None
    return group


def _is_usual(kind: Any) -> bool:
    return (
        kind.compose_single is fast_path.compose_single
        and not kind.allow_multi_parallelize
        and all(getattr(kind, name) is method for name, method in _INLINED.items())
    )


def _after(layer: Any, setup: Any, group: Group, state: Any, rows: tuple[int, ...]) -> Any:
    """The state after a group whose children have so many rows each; None where the library's loop
    must run it, or raise its own error.
    """
    if not state.hidden_states.numel() or type(state.input_tensor) is not Tensor:
        return None
    state = layer.pre_block(setup, state)
    x, residual = state.hidden_states, state.adapter_residual
    if fast_path.call_reason(x, residual) is not None or not _meet(x.dtype, group.parts[0][0]):
        return None
    per_row = math.prod(x.shape[1:-1])
    tokens = tuple(n * per_row for n in rows)
    found = call_of(group, x, None if group.is_parallel else residual, tokens)
    if isinstance(found, str):
        _report(found, layer, setup)
        return None
    backend = backend_of(found[0])
    if backend is None:
        return None
    y = ops.run(found[0], backend, found[1])
    if -1 in group.slots and not found[0].add_input:  # what is added to y is not x there
        pieces = zip(group.slots, y.split(rows), x.split(rows), strict=True)
        y = torch.cat([of_x if slot < 0 else of_y for slot, of_y, of_x in pieces])
    last = setup.children[-1] if group.slots[-1] >= 0 else state.last
    return state._replace(hidden_states=y, last=last)


def _meet(dtype: torch.dtype, weight: Tensor) -> bool:
    """Whether hidden states of this dtype and the weight have one dtype, or autocast gives it."""
    return dtype == weight.dtype or torch.is_autocast_enabled(weight.device.type)


def _scalings(layout: Layout, learned: Sequence[tuple[int, Tensor]], like: Tensor) -> Tensor | None:
    """[S], those of the layout with the values that are learned."""
    if not learned:
        return layout.scalings
    dtype = torch.promote_types(like.dtype, torch.float32)
    found = like.new_ones(len(like), dtype=dtype)
    if layout.scalings is not None:
        found.copy_(layout.scalings)
    for slot, scaling in learned:
        found[slot : slot + 1].copy_(scaling)
    return found


def outlook(layer: Any, setup: Any, dtype: torch.dtype | None) -> dict[str, tuple[str, str | None]]:
    """What becomes of the adapters of a layer that a setup puts in a Parallel or BatchSplit, for
    hidden states of this dtype: by name `Row.together`, and the backend of a call of all of them.
    """
    if not isinstance(setup, AdapterCompositionBlock):
        return {}
    found: dict[str, tuple[str, str | None]] = {}
    for child in setup.children:
        found |= outlook(layer, child, dtype)
    here = [name for name in setup.flatten() if name in layer.adapters]
    if isinstance(setup, (Parallel, BatchSplit)) and len(here) > 1:
        found |= dict.fromkeys(here, _outlook(group_of(layer, setup), dtype))
    return found


def _outlook(group: Group | str, dtype: torch.dtype | None) -> tuple[str, str | None]:
    if isinstance(group, str):
        return group, None
    down = group.parts[0][0]
    if not is_served(down.device.type):
        return "one_by_one", None
    if not _meet(dtype or down.dtype, down):
        return "", None  # each of them has a reason of its own
    x = down.new_empty((len(group.slots), down.shape[1]), dtype=dtype)
    residual = None if group.is_parallel else x
    call = call_of(group, x, residual, (1,) * len(group.slots))
    if isinstance(call, str):
        return call, None
    if backend_of(call[0]) is None:
        return "one_by_one", None
    return SAME_LAUNCH, explaining.explain(call[0]).backend


# The layout


def _layout(
    x: Tensor,
    slots: tuple[int, ...],
    tokens: tuple[int, ...],
    ranks: tuple[int, ...],
    scales: tuple[float, ...],
) -> Layout:
    device, wide = x.device, torch.promote_types(x.dtype, torch.float32)
    arguments = slots, tokens, ranks, scales, device, wide
    if torch.compiler.is_compiling():
        return _made(*arguments)
    if not x.is_cuda:
        return _kept(0, *arguments)
    if torch.cuda.is_current_stream_capturing():  # a graph must not read what may be dropped
        return _made(*arguments)
    # On another stream the kernels that made one need not have run yet.
    return _kept(_torch.current_stream(device.index), *arguments)


def _made(
    slots: tuple[int, ...],
    tokens: tuple[int, ...],
    ranks: tuple[int, ...],
    scales: tuple[float, ...],
    device: torch.device,
    wide: torch.dtype,
) -> Layout:
    """On the device itself, so that nothing waits and CUDA graphs may record it."""

    def filled(values: Sequence[Any], counts: Sequence[int], dtype: torch.dtype) -> Tensor:
        runs = zip(values, counts, strict=True)
        return torch.cat([torch.full((n,), v, dtype=dtype, device=device) for v, n in runs])

    ids, once = filled(slots, tokens, torch.int32), [1] * len(ranks)
    return Layout(
        _sorted(ids, len(ranks)),
        None if len(set(ranks)) == 1 else filled(ranks, once, torch.int32),
        None if set(scales) == {1.0} else filled(scales, once, wide),
    )


def _sorted(ids: Tensor, slots: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The buffers of a routing. In a graph, which takes no kernel of a routing's own, they are made
    by plain operations, of which torch keeps one set for all layers."""
    if not torch.compiler.is_compiling():
        return AdapterRouting(len(ids), slots, device=ids.device).update(ids).buffers()
    room = len(ids) + slots * (TILE - 1)
    shapes = ((len(ids),), (room,), (-(-room // TILE), 3), (slots + 2,))
    buffers = tuple(ids.new_empty(shape) for shape in shapes)
    sort_tokens(ids, slots, *buffers)
    return buffers  # type: ignore[return-value]


@functools.lru_cache(maxsize=16)  # a model's layers share one or a few
def _kept(stream: int, *arguments: Any) -> Layout:
    with torch.inference_mode(False):  # autograd saves no tensors that inference mode made
        return _made(*arguments)


def _report(reason: str, layer: Any, setup: Any) -> None:
    """Warn once a reason that a composition runs its adapters one by one: fused, so `strict` has
    nothing against it."""
    if not reason or torch.compiler.is_compiling() or f"group {reason}" in fast_path.warned:
        return
    fast_path.warned.add(f"group {reason}")
    warnings.warn(
        f"adapterkern: {setup!r}, {layer.location_key} of layer {layer.layer_idx} runs its "
        f"adapters one by one (reason: {reason}, {GROUP_REASONS[reason]}). "
        "See adapterhub.explain(model).",
        FallbackWarning,
        stacklevel=4,
    )
