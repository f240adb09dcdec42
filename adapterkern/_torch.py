"""The one door to torch's private names: what each is for, and the public way that stands in.

Every function is tried once at import. Where a release of torch lacks a name that it uses, or with
ADAPTERKERN_PUBLIC_TORCH=1, its stand-in in `PUBLIC` takes its place: slower, with the same answers,
but that nothing public tells of hooks on all modules. tests/test_torch_door.py runs both ways.
Other modules call through this one, as in `_torch.functorch_is_active()`.
"""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode  # documented by this name

from adapterkern import _env

__all__ = ["INDUCTOR", "ORDINARY", "PUBLIC", "TorchDispatchMode"]

ORDINARY = (Tensor, nn.Parameter)
INDUCTOR = "torch._inductor"  # the module that torch.compile's own warnings come from

# Any, because the stubs of torch leave private names out.
_C: Any = torch._C
_forward_ad: Any = forward_ad
_every: Any = sys.modules[nn.Module.__module__]
_Function = TypeVar("_Function", bound=Callable)
_ONE = torch.ones((), device="cpu")
_FUNCTIONS = tuple(  # the __torch_function__ of ordinary classes: a tensor's, and a parameter's
    getattr(kind.__torch_function__, "__func__", kind.__torch_function__) for kind in ORDINARY
)
_HOOKS, _OWN_FORWARD = "hooks", "a forward of its own"


class _Probe(torch.autograd.Function):
    """A function without `setup_context`: the transforms of torch.func are bound to refuse it."""

    @staticmethod
    def forward(ctx: Any, one: Tensor) -> Tensor:
        return one.view_as(one)


def _probe_functorch() -> bool:
    if torch.compiler.is_compiling():  # a probe cannot be traced; plain operations are never wrong
        return True
    try:
        _Probe.apply(_ONE)
    except (RuntimeError, AssertionError):  # the latter under fake tensors, where none can tell
        return True
    return False


def _probe_forward_ad() -> bool:
    if torch.compiler.is_compiling():
        return True
    try:
        forward_ad.make_dual(_ONE, _ONE)
    except RuntimeError:  # it asks for a level to be entered first
        return False
    except AssertionError:
        return True
    return True


def _has_no_memory(tensor: Tensor) -> bool:
    """Whether a plain tensor wraps others, as the batched ones do: then it has no address."""
    try:
        return type(tensor) in ORDINARY and tensor.data_ptr() < 0
    except RuntimeError:
        return True


def _is_its_own(module: nn.Module, forward: Any) -> bool:
    """Whether a forward set on a module is another than that of its class, which accelerate leaves
    there when it takes its hooks away."""
    function, bound_to = getattr(forward, "__func__", None), getattr(forward, "__self__", None)
    return not (function is type(module).forward and bound_to is module)


def _find_named_hooks(*modules: nn.Module) -> str | None:
    for module in modules:
        state = vars(module)
        if "forward" in state and _is_its_own(module, state["forward"]):
            return _OWN_FORWARD
        if any(hooks for n, hooks in state.items() if n.endswith("_hooks") and "ward" in n):
            return _HOOKS
    return None


def _infer_below_autograd(op: Callable, *arguments: Any) -> Any:
    with torch.inference_mode():
        results = op(*arguments)
    # Autograd saves no inference tensors; nor does selective checkpointing, which raises here.
    return [result.clone() for result in results]


PUBLIC: dict[str, Callable] = {}


def _or(public: Callable, *sample: Any) -> Callable[[_Function], _Function]:
    """Choose between the decorated function and `public`, by a call of the former with `sample`."""

    def choose(private: Any) -> Any:
        PUBLIC[private.__name__] = public
        try:
            private(*sample)
        except (AttributeError, KeyError):
            return public
        return public if _env.PUBLIC_TORCH == "1" else private

    return choose


def _current_stream(device: int) -> int:
    return 0 if device < 0 else torch.cuda.current_stream(device).cuda_stream


@_or(_current_stream, -1)
def current_stream(device: int) -> int:
    """The stream on which a GPU's launches are queued, without a `torch.cuda.Stream` around it.

    device: its index; the choice between the two ways asks for -1, which is no device.
    """
    if device < 0 and torch.version.cuda is None:  # built without CUDA, it lacks the name
        return 0
    raw = _C._cuda_getCurrentRawStream
    return 0 if device < 0 else raw(device)


@_or(lambda: True)  # the caller then asks for the device at hand
def may_autocast() -> bool:
    """Whether autocast is on for some device, at a third of the time of asking for one."""
    return _C._is_any_autocast_enabled()


@_or(torch.compiler.is_exporting)
def is_exporting() -> bool:
    """Whether torch.export traces; torch 2.9's own function says so under torch.compile too."""
    return torch.compiler._is_exporting_flag


@_or(_probe_functorch)
def functorch_is_active() -> bool:
    """Whether vmap, grad, jvp or another transform of torch.func runs."""
    return _C._are_functorch_transforms_active()


@_or(_probe_forward_ad)
def forward_ad_is_active() -> bool:
    """Whether a level of forward-mode AD is entered, so that tensors may carry tangents."""
    return _forward_ad._current_level >= 0


@_or(_has_no_memory, _ONE)
def is_batched(gradient: Tensor) -> bool:
    """Whether it is the gradient of many outputs: vmap around autograd, is_grads_batched=True."""
    functorch = _C._functorch
    return _C._are_functorch_transforms_active() or functorch.is_legacy_batchedtensor(gradient)


@_or(torch.jit.is_tracing)
def jit_is_tracing() -> bool:
    """Whether torch.jit.trace records, for itself or for an export to ONNX."""
    return _C._get_tracing_state() is not None


@_or(contextlib.nullcontext)  # sizes are then compared with a warning
@contextlib.contextmanager
def jit_tracing_paused() -> Iterator[None]:
    """Within the block torch.jit.trace records nothing, and sizes are the integers that they are
    elsewhere: to compare them is then no warning of a size that the trace holds fast.
    """
    state = _C._get_tracing_state()
    _C._set_tracing_state(None)
    try:
        yield
    finally:
        _C._set_tracing_state(state)


@_or(lambda tensor: True, _ONE)  # the op may be called at any time
def is_watched(tensor: Any) -> bool:
    """Whether the op must be seen, or torch's dispatcher must prepare this tensor.

    The former is so under a dispatch mode, torch.jit.trace (of a backward) and the profiler, the
    latter with subclasses.
    """
    return (
        _C._len_torch_dispatch_stack() > 0
        or type(tensor) not in ORDINARY
        or _C._get_tracing_state() is not None
        or _C._autograd._profiler_enabled()
    )


_is_neg: Any = Tensor.is_neg
_is_zero: Any = getattr(Tensor, "_is_zerotensor", None)


def _have_views_of_values(tensors: Iterable[Tensor]) -> bool:
    try:
        return any(t.is_neg() or (t.numel() > 0 and t.data_ptr() == 0) for t in tensors)
    except RuntimeError:  # no address at all, as under fake tensors; a copy does no harm
        return True


@_or(_have_views_of_values, (_ONE,))
def has_views_of_values(tensors: Iterable[Tensor]) -> bool:
    """Whether the memory of some tensor does not hold its values: they are its negatives, as in
    `z.conj().imag`, or zeros that no memory holds.
    """
    return True in map(_is_neg, tensors) or True in map(_is_zero, tensors)


@_or(_infer_below_autograd, tuple)
def below_autograd(op: Callable, *arguments: Any) -> Any:
    """Call an op below its autograd kernel, which would otherwise call itself."""
    with _C._AutoDispatchBelowAutograd():
        return op(*arguments)


@_or(_find_named_hooks, nn.Module())
def beyond_its_class(*modules: nn.Module) -> str | None:
    """What a call of these modules does beyond the forward of their classes, None if nothing.

    There may be hooks on one or on all modules of the process, or a forward that accelerate or
    activation patching has set on the instance. AdapterHub's path asks of seven at every call.
    """
    if (
        _every._global_forward_hooks
        or _every._global_forward_pre_hooks
        or _every._global_backward_hooks
        or _every._global_backward_pre_hooks
    ):
        return "hooks on all modules (FlopCounterMode sets them)"
    for module in modules:
        state = module.__dict__
        if "forward" in state and _is_its_own(module, state["forward"]):
            return _OWN_FORWARD
        if (
            state["_forward_hooks"]
            or state["_forward_pre_hooks"]
            or state["_backward_hooks"]
            or state["_backward_pre_hooks"]
        ):
            return _HOOKS
    return None


@_or(lambda: "torch._dynamo" in sys.modules)
def has_compiled() -> bool:
    """Whether torch.compile ran: its module may be there without that."""
    return getattr(sys.modules.get("torch._dynamo.convert_frame"), "FRAME_COUNTER", 0) > 0


@_or(torch.compiler.assume_constant_result, lambda: None)
def constant_under_compile(function: Any) -> Any:
    """Let torch.compile take the function's result as given, without the import of torch._dynamo
    (1 s) that the public decorator does."""
    function._dynamo_marked_constant = True
    return function


@_or(lambda function: function.apply, _Probe)
def apply_of(function: Any) -> Callable:
    """The `apply` of a Function without what comes before it for functorch, which takes 2 us."""
    return super(torch.autograd.Function, function).apply


def is_subclass(tensor: Tensor) -> bool:
    """Whether a tensor has semantics of its own: DTensor, NestedTensor, quantised ones, or any
    class that says what functions of torch do with it.

    The subclasses with which torch itself traces are ordinary.
    """
    kind = type(tensor)
    if kind in ORDINARY or kind.__module__.startswith("torch._subclasses."):
        return False
    function = getattr(kind.__torch_function__, "__func__", kind.__torch_function__)
    return kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ or function not in _FUNCTIONS
