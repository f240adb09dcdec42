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
from adapterkern.backends.base import empty_gradients, empty_outputs, keeps_sum
from adapterkern.results import Gradients, Needs, Outputs, Saved, added_gradients, given_of
from adapterkern.spec import (
    TENSOR_NAMES,
    AdapterCall,
    Roles,
    join,
    option_values,
    split,
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


def schema(kind: type, prefix: str = "") -> str:
    """The fields of a NamedTuple as arguments of an op, from their annotations."""
    hints = get_type_hints(kind).items()
    return ", ".join(f"{_SCHEMA_TYPES[hint]} {prefix}{name}" for name, hint in hints)


_KEPT = [name for name in Saved._fields if name != "stream"]  # which is y, an output
_RESULTS = ", ".join(f"Tensor {name}" for name in [*Outputs._fields, *_KEPT])
_library = torch.library.Library("adapterkern", "DEF")
_library.define(f"forward(str backend, bool save, {schema(AdapterCall)}) -> ({_RESULTS})")
_library.define(
    f"backward(str backend, bool[] needs, {schema(AdapterCall)}, {schema(Saved)}, "
    f"{schema(Outputs, 'grad_')}) -> Tensor[]"
)


def _read(values: Iterable[Any], *kinds: Any) -> list[Any]:
    """Values in a row as one NamedTuple of each kind."""
    row = iter(values)
    return [kind(*itertools.islice(row, len(kind._fields))) for kind in kinds]


def _results(outputs: Outputs, saved: Saved) -> tuple[Tensor, ...]:
    """The results of an op, which cannot return None: a tensor of size 0 stands for it."""
    empty, results = given_of(outputs).new_empty, (*outputs, *saved[: len(_KEPT)])
    return tuple(empty(0) if t is None else t for t in results)


def _forward_kernel(backend: str, save: bool, *fields: Any) -> tuple[Tensor, ...]:
    return _results(*get(backend).forward(AdapterCall(*fields), save))


def _forward_fake(backend: str, save: bool, *fields: Any) -> tuple[Tensor, ...]:
    return _results(*empty_outputs(AdapterCall(*fields), save))


def _backward_kernel(backend: str, needs: Sequence[bool], *fields: Any) -> list[Tensor]:
    call, saved, upstream = _read(fields, AdapterCall, Saved, Outputs)
    gradients = get(backend).backward(call, saved, upstream, Needs(*needs))
    # An op may not return what it was given, as the gradients of residual and skip may be.
    returned: list[Tensor | None] = [upstream.y]
    for g in gradients:
        if g is not None:
            known = any(g is other for other in returned)
            returned.append(g.clone(memory_format=torch.contiguous_format) if known else g)
    return returned[1:]  # type: ignore[return-value]  # the first alone may be None


def _backward_fake(backend: str, needs: Sequence[bool], *fields: Any) -> list[Tensor]:
    call, saved, upstream = _read(fields, AdapterCall, Saved, Outputs)
    asked = Needs(*needs)
    d_sum = upstream.y if saved.stream is None else saved.stream
    added = added_gradients(d_sum, asked)
    computed = empty_gradients(call, asked)._replace(**added)
    return [g.new_empty(g.shape) if g is d_sum else g for g in computed if g is not None]


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
    y, normed, z, mean, rstd = results
    has_norm = call.norm != "none"
    outputs = Outputs(y if keeps_sum(call, save) else None, normed if has_norm else None)
    if not save:
        return outputs, Saved(None)
    layer = call.norm == "layer"
    return outputs, Saved(z, mean if layer else None, rstd if has_norm else None)


def _backward(
    backend: str, call: AdapterCall, saved: Saved, upstream: Outputs, needs: Needs
) -> Gradients:
    """Run the backward, as an op where operations are traced, faked or counted."""
    # Compiled autograd traces the backward of an eager call with tensors that look ordinary.
    if not torch.compiler.is_compiling() and not _torch.is_watched(given_of(upstream)):
        if backend != "reference":
            given = [d for d in upstream if d is not None]
            if _torch.has_views_of_values(given):
                upstream = Outputs(*[None if d is None else d.clone() for d in upstream])
        return get(backend).backward(call, saved, upstream, needs)
    # What is added has the gradient of the sum: an op would have to copy it, or to return it twice.
    has_norm = upstream.normed is not None
    sums = {"residual": has_norm and needs.added, "skip": False}
    asked = [sums.get(name, need) for name, need in zip(TENSOR_NAMES, needs, strict=True)]
    computed = iter(_backward_op(backend, asked, *call, *saved, *upstream))
    named = zip(TENSOR_NAMES, asked, strict=True)
    gradients = {name: next(computed) if need else None for name, need in named}
    d_sum = gradients["residual"] if has_norm else upstream.y
    return Gradients(**(gradients | added_gradients(d_sum, needs)))


class _BottleneckAdapter(torch.autograd.Function):
    """Autograd of one call; the forward's backend runs the backward.

    Saves what the gradients asked for need (`spec.split`). z is an output like y, so that a second
    derivative reaches x and the down-projection through it, without the values of x.
    """

    # ctx style: see the top. `tensors` are those of `call`, which autograd does not look into.
    @staticmethod
    def forward(ctx, backend: str, save: bool, call: AdapterCall, *tensors: Tensor | None):
        _, _, _, *asked = ctx.needs_input_grad
        needs = Needs(*asked)
        roles = Roles.of(needs)
        has_norm = call.norm != "none"
        reads_stream = has_norm and roles.stream
        outputs, saved = _forward(backend, call, save or roles.z or reads_stream)
        kept, ctx.outlines = split(tensors, roles)
        if needs.scaling:
            kept = _without_inference_tensors(kept, roles, needs)
        (y, normed), (z, mean, rstd, _) = outputs, saved
        of_norm = (mean, rstd, y) if reads_stream else (None, None, None)
        ctx.save_for_backward(*kept, z if roles.z else None, *of_norm)
        ctx.roles = roles
        ctx.options = option_values(call)
        ctx.backend = backend
        ctx.set_materialize_grads(False)  # or every backward would fill zeros for z
        if not (save and has_norm):  # every output costs autograd a microsecond
            return y, normed, z
        # The statistics are an op's results. To be differentiated, they are computed anew.
        ctx.mark_non_differentiable(*(t for t in (mean, rstd) if t is not None))
        return y, normed, z, mean, rstd

    @staticmethod
    def backward(
        ctx, grad_y: Tensor | None, grad_normed: Tensor | None, grad_z: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        _, _, _, *asked = ctx.needs_input_grad
        needs, gradients = Needs(*asked), Gradients()
        given = grad_y if grad_normed is None else grad_normed
        if given is None:
            given = grad_z
        if given is None:
            return (None, None, None, *gradients)
        *kept, z, mean, rstd, stream = ctx.saved_tensors
        call = join(kept, ctx.outlines, ctx.roles, ctx.options, given)
        if given is not grad_z:
            saved = Saved(z, mean, rstd, stream)
            if grad_normed is None and call.norm != "none":  # of the stream alone
                call, saved = call.without_norm(), Saved(z)
                needs = needs._replace(norm_weight=False, norm_bias=False)
            upstream = Outputs(grad_y, grad_normed)
            gradients = _gradients(ctx.backend, call, saved, upstream, needs)
        if grad_z is not None:  # a second derivative's
            below = reference.backward_of_down(call, grad_z, needs)
            pairs = zip(gradients, below, strict=True)
            gradients = Gradients(
                *[b if a is None else a if b is None else a + b for a, b in pairs]
            )
        return (None, None, None, *gradients)  # autograd converts those of residual and skip


def _without_inference_tensors(
    kept: Sequence[Tensor | None], roles: Roles, needs: Needs
) -> list[Tensor | None]:
    """Copies of inference tensors, which autograd does not save, where plain layers save none: for
    a learned scaling they keep u instead of the up-projection.
    """
    copied = ("up_bias",) if needs.dz else ("up_bias", "up_weight")
    return [
        t.clone() if t is not None and TENSOR_NAMES[index] in copied and t.is_inference() else t
        for index, t in zip(roles.values, kept, strict=True)
    ]


def _gradients(
    backend: str, call: AdapterCall, saved: Saved, upstream: Outputs, needs: Needs
) -> Gradients:
    """The gradients of the outputs, by the backend or in plain operations."""
    if upstream.normed is None and not (needs.dz or needs.parameters):
        return Gradients(**added_gradients(upstream.y, needs))
    if torch.is_grad_enabled():  # create_graph=True: to be differentiated itself
        if backend != "reference":
            log_plain_backward(backend)
        return reference.backward(call, saved, upstream, needs)
    if not torch.compiler.is_compiling() and _torch.is_batched(given_of(upstream)):
        return reference.backward(call, saved, upstream, needs)
    return _backward(backend, call, saved, upstream, needs)


_apply = _torch.apply_of(_BottleneckAdapter)


def _forward_autograd(backend: str, save: bool, *fields: Any) -> tuple[Tensor, ...]:
    """The autograd kernel of the forward op, for calls from a graph."""
    call = AdapterCall(*fields)
    if _torch.forward_ad_is_active():  # known to no graph, which was traced without tangents
        return _results(*reference.forward(call))
    tensors = tensor_values(call)
    if not _needs_gradient(tensors):
        return _results(*_forward(backend, call, save))
    y, normed, *kept = _BottleneckAdapter.apply(backend, save, call, *tensors)
    outputs = Outputs(y if keeps_sum(call, save) else None, normed)
    return _results(outputs, Saved(*kept) if save else Saved(None))


_library.impl("forward", _forward_autograd, "Autograd")


def _needs_gradient(tensors: Iterable[Tensor | None]) -> bool:
    if torch.is_grad_enabled():
        for tensor in tensors:  # a third of the time of any() over a generator
            if tensor is not None and tensor.requires_grad:
                return True
    return False


@functools.cache
def log_plain_backward(backend: str) -> None:
    """Say once that plain operations run a backward of this backend."""
    logger.warning(
        "the PyTorch reference runs the backward (%s: create_graph=True asks for a differentiable "
        "gradient, and the kernels have no second derivative)",
        backend,
    )


def run(call: AdapterCall, backend: str) -> Outputs:
    """The outputs of a validated call on the backend of that name, recorded where a gradient is
    needed."""
    if torch.compiler.is_compiling():
        return _run_compiled(call, backend)
    if backend != "reference":  # whose operations read values, not memory
        call = _in_memory(call)
    tensors = tensor_values(call)
    if _needs_gradient(tensors):
        return Outputs(*_apply(backend, False, call, *tensors)[:2])
    return _forward(backend, call, False)[0]


def _run_compiled(call: AdapterCall, backend: str) -> Outputs:
    """As `run`, in a graph. The op takes a scale as a constant: with another at every call the
    graph would be made anew each time. Such a scale, and what is added after it, stay outside.
    """
    save = _needs_gradient(call.tensors().values())
    if not _is_dynamic(call.scale):
        y, normed, *_ = _forward_op(backend, save, *call)
        return Outputs(y, None if call.norm == "none" else normed)
    inner = call.without_norm()._replace(scale=1.0, add_input=False, residual=None, skip=None)
    y = _forward_op(backend, save, *inner)[0] * call.scale
    for added in (call.x if call.add_input else call.residual, call.skip):
        if added is not None:
            y = y + added
    return Outputs(y, None if call.norm == "none" else reference.normalized(call, y))


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


def _forward_flops(backend: str, save: bool, *fields: Any, **_: Any) -> int:
    shapes: Any = _read(fields, AdapterCall)[0]  # torch gives shapes in place of the tensors
    return 2 * 2 * math.prod(shapes.x) * shapes.down_weight[0]


def _backward_flops(backend: str, needs: Sequence[bool], *fields: Any, **_: Any) -> int:
    """Only those of the four products count whose gradients are asked for."""
    asked = Needs(*needs)
    products = asked.dz + asked.x + asked.down_weight + (asked.up_weight or asked.scaling)
    shapes: Any = _read(fields, AdapterCall, Saved, Outputs)
    call, _, upstream = shapes
    shape = upstream.y if upstream.normed is None else upstream.normed
    return products * 2 * math.prod(shape) * call.down_weight[0]


def _register_flop_formulas() -> None:
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula(torch.ops.adapterkern.forward)(_forward_flops)
    register_flop_formula(torch.ops.adapterkern.backward)(_backward_flops)


_register_flop_formulas()
