"""The operation as torch sees it: two registered ops and one autograd.Function around them.

The ops are defined with `Library.define` + `impl` + `register_fake`, and their autograd is a
ctx-style `autograd.Function`: `custom_op` + `register_autograd` and `setup_context` each cost more
host time than the eager adapter's four ops, and the former drops forward-mode tangents silently
(pytorch#176592, #139500, #192985). Eager calls enter that Function directly; graphs that
torch.compile or torch.export made hold the op, whose autograd kernel enters it. Below autograd,
where nobody watches operations, a call goes straight to its backend: the op's way through torch's
dispatcher costs 4 us, as much as all else here. Not public.
"""

import functools
import itertools
import logging
import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor

from adapterkern import _torch, reference
from adapterkern.backends import get
from adapterkern.backends.base import empty_gradients, empty_outputs
from adapterkern.spec import (
    TENSOR_NAMES,
    AdapterCall,
    Gradients,
    Needs,
    Outputs,
    Saved,
    added_gradients,
    option_values,
    tensor_values,
)

logger = logging.getLogger("adapterkern")

_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    float: "float",
    bool: "bool",
    str: "str",
    torch.dtype: "ScalarType",
}


def _schema(kind: type, prefix: str = "") -> str:
    """The fields of a NamedTuple as arguments of an op, from their annotations."""
    hints = get_type_hints(kind).items()
    return ", ".join(f"{_SCHEMA_TYPES[hint]} {prefix}{name}" for name, hint in hints)


_RESULTS = ", ".join(f"Tensor {name}" for name in Outputs._fields + Saved._fields)
_library = torch.library.Library("adapterkern", "DEF")
_library.define(f"forward(str backend, bool save, {_schema(AdapterCall)}) -> ({_RESULTS})")
_library.define(
    f"backward(str backend, bool[] needs, {_schema(AdapterCall)}, {_schema(Saved)}, "
    f"{_schema(Outputs, 'grad_')}) -> Tensor[]"
)


def _read(values: Iterable[Any], *kinds: Any) -> list[Any]:
    """Values in a row as one NamedTuple of each kind."""
    row = iter(values)
    return [kind(*itertools.islice(row, len(kind._fields))) for kind in kinds]


def _results(outputs: Outputs, saved: Saved) -> tuple[Tensor, ...]:
    """The results of an op, which cannot return None: a tensor of size 0 stands for it."""
    return tuple(outputs.y.new_empty(0) if t is None else t for t in (*outputs, *saved))


def _forward_kernel(backend: str, save: bool, *fields: Any) -> tuple[Tensor, ...]:
    return _results(*get(backend).forward(AdapterCall(*fields), save))


def _forward_fake(backend: str, save: bool, *fields: Any) -> tuple[Tensor, ...]:
    return _results(*empty_outputs(AdapterCall(*fields), save))


def _backward_kernel(backend: str, needs: Sequence[bool], *fields: Any) -> list[Tensor]:
    call, saved, upstream = _read(fields, AdapterCall, Saved, Outputs)
    gradients = get(backend).backward(call, saved, upstream, Needs(*needs))
    # An op may not return what it was given, as the gradients of residual and skip may be.
    return [
        g.clone(memory_format=torch.contiguous_format) if g is upstream.y else g
        for g in gradients
        if g is not None
    ]


def _backward_fake(backend: str, needs: Sequence[bool], *fields: Any) -> list[Tensor]:
    call, _, upstream = _read(fields, AdapterCall, Saved, Outputs)
    asked = Needs(*needs)
    computed = empty_gradients(call, asked)._replace(**added_gradients(upstream, asked))
    return [g.new_empty(g.shape) if g is upstream.y else g for g in computed if g is not None]


for _name, _impl, _fake in (
    ("forward", _forward_kernel, _forward_fake),
    ("backward", _backward_kernel, _backward_fake),
):
    # For every device: the reference runs wherever PyTorch does, and dispatch keeps others off.
    _library.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"adapterkern::{_name}", _fake, lib=_library)

_forward_op = torch.ops.adapterkern.forward.default
_backward_op = torch.ops.adapterkern.backward.default


def _forward(backend: str, call: AdapterCall, save: bool) -> tuple[Outputs, Saved]:
    """Run the forward below autograd, as an op where operations are watched, faked or counted."""
    if not _torch.is_watched(call.x):
        return get(backend).forward(call, save)
    results = _torch.below_autograd(_forward_op, backend, save, *call)
    outputs, saved = _read(results, Outputs, Saved)
    return outputs, saved if save else Saved(None)


def _backward(
    backend: str, call: AdapterCall, saved: Saved, upstream: Outputs, needs: Needs
) -> Gradients:
    """Run the backward, as an op where operations are traced, faked or counted."""
    # Compiled autograd traces the backward of an eager call with tensors that look ordinary.
    if not torch.compiler.is_compiling() and not _torch.is_watched(upstream.y):
        if backend != "reference" and _torch.has_views_of_values(upstream):
            upstream = Outputs(upstream.y.clone())
        return get(backend).backward(call, saved, upstream, needs)
    added = added_gradients(upstream, needs)  # which an op would have to copy
    asked = [need and n not in added for n, need in zip(TENSOR_NAMES, needs, strict=True)]
    computed = iter(_backward_op(backend, asked, *call, *saved, *upstream))
    named = zip(TENSOR_NAMES, asked, strict=True)
    return Gradients(*[next(computed) if need else added.get(n) for n, need in named])


class _BottleneckAdapter(torch.autograd.Function):
    """Autograd of one call; the forward's backend runs the backward. Saves x, z and parameters."""

    # ctx style: see the top. `tensors` are those of `call`, which autograd does not look into.
    @staticmethod
    def forward(ctx, backend: str, call: AdapterCall, *tensors: Tensor | None):
        outputs, saved = _forward(backend, call, True)
        read = call.for_backward()
        ctx.save_for_backward(*tensor_values(read), *saved)
        ctx.options = option_values(read)
        ctx.backend = backend
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)  # or every backward would fill zeros for z
        return (*outputs, *saved)

    @staticmethod
    def backward(ctx, grad_y: Tensor | None, _grad_z: None) -> tuple[Tensor | None, ...]:
        if grad_y is None:
            return (None, None, *Gradients())
        _, _, *asked = ctx.needs_input_grad
        upstream, needs = Outputs(grad_y), Needs(*asked)
        *tensors, z = ctx.saved_tensors
        call, saved = AdapterCall(*tensors, *ctx.options), Saved(z)
        if not (needs.dz or needs.parameters):
            gradients = Gradients(**added_gradients(upstream, needs))
        elif torch.is_grad_enabled():  # create_graph=True: to be differentiated itself
            if ctx.backend != "reference":
                _log_plain_backward(ctx.backend)
            gradients = _differentiable_backward(call, upstream, needs)
        elif not torch.compiler.is_compiling() and _torch.is_batched(grad_y):
            gradients = reference.backward(call, saved, upstream, needs)
        else:
            gradients = _backward(ctx.backend, call, saved, upstream, needs)
        return (None, None, *gradients)  # autograd converts those of residual and skip


_apply = _torch.apply_of(_BottleneckAdapter)


def _forward_autograd(backend: str, save: bool, *fields: Any) -> tuple[Tensor, ...]:
    """The autograd kernel of the forward op, for calls from a graph."""
    call = AdapterCall(*fields)
    if _torch.forward_ad_is_active():  # known to no graph, which was traced without tangents
        return _results(*reference.forward(call))
    tensors = tensor_values(call)
    if not _needs_gradient(tensors):
        return _results(*_forward(backend, call, save))
    *outputs, z = _BottleneckAdapter.apply(backend, call, *tensors)
    return (*outputs, z if save else z.new_empty(0))


_library.impl("forward", _forward_autograd, "Autograd")


def _needs_gradient(tensors: Iterable[Tensor | None]) -> bool:
    if torch.is_grad_enabled():
        for tensor in tensors:  # a third of the time of any() over a generator
            if tensor is not None and tensor.requires_grad:
                return True
    return False


@functools.cache
def _log_plain_backward(backend: str) -> None:
    logger.warning(
        "the PyTorch reference runs the backward (%s: create_graph=True asks for a differentiable "
        "gradient, and the kernels have no second derivative)",
        backend,
    )


def _differentiable_backward(call: AdapterCall, upstream: Outputs, needs: Needs) -> Gradients:
    """The same gradients as a graph of plain PyTorch operations, for a second derivative."""
    # With aliases: an input computed from another must not count towards that one's gradient.
    inputs = {n: t.view_as(t) for n, t in call.tensors().items() if t is not None}
    parameters: dict[str, Any] = inputs
    outputs, _ = reference.forward(call._replace(**parameters))
    wanted = [name for name in inputs if getattr(needs, name)]
    sources, grad_y = [inputs[name] for name in wanted], upstream.y.to(outputs.y.dtype)
    computed = torch.autograd.grad(outputs.y, sources, grad_y, create_graph=True)
    named: dict[str, Any] = dict(zip(wanted, computed, strict=True))
    return Gradients(**named, **added_gradients(upstream, needs))


def run(call: AdapterCall, backend: str) -> Tensor:
    """y of a validated call on the backend of that name, recorded where a gradient is needed."""
    if torch.compiler.is_compiling():
        return _run_compiled(call, backend)
    if backend != "reference":  # whose operations read values, not memory
        call = _in_memory(call)
    tensors = tensor_values(call)
    if _needs_gradient(tensors):
        return _apply(backend, call, *tensors)[0]
    return _forward(backend, call, False)[0].y


def _run_compiled(call: AdapterCall, backend: str) -> Tensor:
    """As `run`, in a graph. The op takes a scale as a constant: with another at every call the
    graph would be made anew each time. Such a scale, and what is added after it, stay outside.
    """
    save = _needs_gradient(call.tensors().values())
    if not _is_dynamic(call.scale):
        return _forward_op(backend, save, *call)[0]
    inner = call._replace(scale=1.0, add_input=False, residual=None, skip=None)
    y = _forward_op(backend, save, *inner)[0] * call.scale
    for added in (call.x if call.add_input else call.residual, call.skip):
        if added is not None:
            y = y + added
    return y


def _is_dynamic(scale: float) -> bool:
    """Whether torch.compile takes it for one that changes: then it cannot compare it, unless with
    what guards compare it with, as with 1.
    """
    known, other = torch.fx.experimental.symbolic_shapes.statically_known_true, sys.float_info.min
    return not (known(scale == other) or known(scale != other))


def _in_memory(call: AdapterCall) -> AdapterCall:
    """The call with its values in memory, where kernels read them."""
    given = [tensor for tensor in tensor_values(call) if tensor is not None]
    if not _torch.has_views_of_values(given):
        return call
    copies = {n: t.clone() for n, t in call.tensors().items() if t is not None}
    parameters: dict[str, Any] = copies
    return call._replace(**parameters)


def _flops(products: int, fields: Iterable[Any]) -> int:
    shapes: Any = _read(fields, AdapterCall)[0]  # torch gives shapes in place of the tensors
    return products * 2 * math.prod(shapes.x[:-1]) * math.prod(shapes.down_weight)


def _forward_flops(backend: str, save: bool, *fields: Any, **_: Any) -> int:
    return _flops(2, fields)


def _backward_flops(backend: str, needs: Sequence[bool], *fields: Any, **_: Any) -> int:
    """Only those of the four products count whose gradients are asked for."""
    asked = Needs(*needs)
    products = asked.dz + asked.x + asked.down_weight + (asked.up_weight or asked.scaling)
    return _flops(products, fields)


def _register_flop_formulas() -> None:
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula(torch.ops.adapterkern.forward)(_forward_flops)
    register_flop_formula(torch.ops.adapterkern.backward)(_backward_flops)


_register_flop_formulas()
