"""Chooses the backend of a call: every refusal collected, each distinct fallback logged once."""

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from adapterkern import _env, _torch
from adapterkern.backends import NAMES, get
from adapterkern.backends.base import BackendUnsupportedError
from adapterkern.spec import PLAIN_FEATURES, AdapterSpec

logger = logging.getLogger("adapterkern")


class Decision(NamedTuple):
    """The decision on a call.

    plain: plain PyTorch operations run, see `PLAIN_FEATURES`. apart: no kernel takes the norm, so
    `backend` runs the call without it, and torch's norm comes behind.
    """

    spec: AdapterSpec
    backend: str
    plain: bool
    apart: bool = False


@runtime_checkable
class Call(Protocol):
    """A kind of call, as `spec.AdapterCall` is one: it knows its own layout, and nobody slices it.

    Dispatch reads the last two methods, which are therefore all that choosing a backend depends on.
    """

    def tensors(self) -> dict[str, Tensor | None]: ...
    def options(self) -> dict[str, Any]: ...
    def key(self) -> tuple: ...
    def spec(self) -> AdapterSpec: ...


class _Thread(threading.local):
    """What `use_backend` has set in one thread."""

    def __init__(self) -> None:
        self.forced: str | None = None
        # The threads in which autograd runs the backward of GPUs, and computes what checkpointing
        # left out: Python did not start them, and they open no blocks.
        self.is_foreign = threading.get_ident() not in {t.ident for t in threading.enumerate()}


_thread = _Thread()
_open: dict[object, str] = {}  # the blocks of all threads, the latest last
_latest: str | None = None
_lock = threading.Lock()  # of `_open` and `_latest`
_decisions: dict[tuple, Decision] = {}
_KERNELS = tuple(name for name in NAMES if name != "reference")
_MOST_DECISIONS = 4096  # kept; a process that sees more kinds of calls decides some of them again
_logged: dict[str, object] = {}  # each reason, with a mark of the call that was first


def select(call: Call, requested: str = "auto") -> Decision:
    """Validate a call and choose the backend that runs it.

    `requested`, else `use_backend`, else ADAPTERKERN_BACKEND names it; under "auto" the first
    registered backend without a reason against the call runs it, the reference at the latest.

    Raises:
        TypeError, ValueError: the call is not valid, see `validation.validate`; the backend's name
            is unknown; an environment variable has a value outside its list.
        BackendUnsupportedError: the named backend cannot run the call, or ADAPTERKERN_STRICT=1 and
            a call on a GPU would fall back to the reference.
    """
    wanted = wanted_backend(requested)
    if torch.compiler.is_compiling():  # once per graph: a cache's growth would be guarded on
        return _decide_in_graph(call.spec(), wanted, _torch.is_exporting())
    if _torch.jit_is_tracing():
        with _torch.jit_tracing_paused():
            spec = call.spec()
        if wanted not in ("auto", "reference"):
            reason = "torch.jit.trace records operations of PyTorch alone; torch.export does not"
            raise BackendUnsupportedError(_refusal(wanted, spec.describe(), [reason]))
        return _decide_in_graph(spec, wanted, exports=True)
    try:
        key = wanted, type(call), call.key()
        decision = _decisions.get(key)
    except (AttributeError, IndexError, RuntimeError, TypeError):  # not valid, or symbolic sizes
        return _decide(call.spec(), wanted)
    if decision is None:
        if len(_decisions) >= _MOST_DECISIONS:
            _decisions.clear()
        decision = _decisions[key] = _decide(call.spec(), wanted)
    return decision


def wanted_backend(requested: str) -> str:
    """The backend that `requested`, a surrounding `use_backend` or the environment names."""
    if requested != "auto":
        return requested
    return _thread.forced or (_thread.is_foreign and _latest) or _env.BACKEND


def is_declared(feature: str, device_type: str) -> bool:
    """Whether the backend that is named declares a feature or an operation, or under "auto" some
    kernel does: a quick no for callers that have another way. A yes is not yet the choice, which
    reads the call.
    """
    wanted = wanted_backend("auto")
    for name in _KERNELS if wanted == "auto" else (wanted,):
        backend = get(name)
        runs_there = backend.devices is None or device_type in backend.devices
        if runs_there and (feature in backend.features or feature in backend.operations):
            return True
    return False


def check_environment() -> None:
    """Refuse what is none of a variable's values, before it decides anything; warn once of a
    variable that is none of the package's: it may be misspelled, or be known to a later version.

    Raises:
        ValueError: a variable has such a value.
    """
    for name, value, known in (
        ("ADAPTERKERN_BACKEND", _env.BACKEND, ("auto", *NAMES)),
        ("ADAPTERKERN_STRICT", _env.STRICT, ("0", "1")),
        ("ADAPTERKERN_PUBLIC_TORCH", _env.PUBLIC_TORCH, ("0", "1")),
        ("ADAPTERKERN_CUDA_RESIDENT", _env.CUDA_RESIDENT, ("0", "1")),
    ):
        if value not in known:
            raise ValueError(
                f"the environment variable {name} must be one of {', '.join(known)}, "
                f"got {value!r}.\n  hint: unset {name}, or set it to one of these."
            )
    if _env.UNKNOWN:
        _warn_of_unknown_variables()


@_torch.constant_under_compile  # it can trace neither the search for the nearest name nor the log
def _warn_of_unknown_variables() -> None:
    for sentence in _env.unknown_variables():
        mark = object()
        if _logged.setdefault(sentence, mark) is mark:
            logger.warning("%s", sentence)


def _decide(spec: AdapterSpec, wanted: str) -> Decision:
    check_environment()
    plain = not PLAIN_FEATURES.isdisjoint(spec.features)
    if wanted != "auto":
        reasons = get(wanted).unsupported_reasons(spec)
        if reasons:
            raise BackendUnsupportedError(_refusal(wanted, spec.describe(), reasons))
        return Decision(spec, wanted, plain)
    refused: dict[str, list[str]] = {}
    for name in NAMES:
        refused[name] = get(name).unsupported_reasons(spec)
        if not refused[name]:
            if name != "reference":
                return Decision(spec, name, plain)
            _report_fallback(spec, refused)
            if plain or spec.norm is None:
                return Decision(spec, name, plain)
            return _decide(spec.without_norm(), wanted)._replace(spec=spec, apart=True)
    listed = [f"{name}: {reason}" for name, reasons in refused.items() for reason in reasons]
    raise BackendUnsupportedError(_refusal("auto", spec.describe(), listed))


def _decide_in_graph(spec: AdapterSpec, wanted: str, exports: bool) -> Decision:
    """The decision for a graph. exports: whether other machines run it, that may lack this package.

    Such a graph holds plain operations, since what this machine has says nothing about those, and
    no runtime or converter knows the op. A kernel backend that is named stays: it was asked for.
    """
    if not exports or wanted not in ("auto", "reference"):
        return _decide(spec, wanted)
    check_environment()
    return Decision(spec, "reference", plain=True)


def _refusal(name: str, call: str, reasons: list[str]) -> str:
    listing = "\n".join(f"  - {reason}" for reason in reasons)
    return f'backend "{name}" cannot run this call ({call}):\n{listing}'


def _report_fallback(spec: AdapterSpec, refused: dict[str, list[str]]) -> None:
    """For a call that the reference runs where a kernel was to be expected, or for dropout."""
    if spec.device.type in ("cpu", "meta") and "dropout" not in spec.features:
        return
    why = "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in refused.items() if reasons)
    runs = f"torch's {spec.norm} runs behind" if spec.norm else "the PyTorch reference runs"
    _report(spec.device, f"{runs} {spec.describe()}", why)


def _report(device: torch.device, call: str, why: str) -> None:
    """One log line per distinct reason; under ADAPTERKERN_STRICT=1 an error for a call on a GPU."""
    if _env.STRICT == "1" and device.type not in ("cpu", "meta"):
        raise BackendUnsupportedError(
            f"ADAPTERKERN_STRICT=1 allows kernels alone, but {call}: {why}"
        )
    if torch.compiler.is_compiling():
        return
    mark = object()
    if _logged.setdefault(why, mark) is mark:  # of threads that come at once, one
        logger.warning("%s (%s)", call, why)


def report_unfused(device: torch.device, call: str, why: str, requested: str = "auto") -> None:
    """For a call that must run in plain PyTorch whatever the backends have: log that once.

    Raises:
        BackendUnsupportedError: a backend other than the reference is named (see `select`), or
            ADAPTERKERN_STRICT=1 and the call is on a GPU.
    """
    check_environment()
    wanted = wanted_backend(requested)
    if wanted not in ("auto", "reference"):
        raise BackendUnsupportedError(_refusal(wanted, call, [why]))
    _report(device, f"the PyTorch reference runs {call}", why)


def report_apart(what: str, why: str) -> None:
    """For adapters of a mixed batch that no grouped call serves: log that once for each reason.

    They run all the same, each on its inputs, so that no kernel is lost but the common launch.
    """
    mark = object()
    if _logged.setdefault(f"{what}: {why}", mark) is mark:
        logger.warning("%s runs apart from the others of its batch (%s)", what, why)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, calls with backend="auto" run on `name` ("auto": chosen automatically).

    In the thread that enters it, as with `torch.no_grad`: a thread of yours opens a block of its
    own, those that autograd starts follow the latest block that is open. Backward runs on the
    backend its forward ran on.

    Raises:
        ValueError: unknown backend name.
    """
    if name != "auto":
        get(name)
    before, _thread.forced, block = _thread.forced, name, object()
    _note(block, name)
    try:
        yield
    finally:
        _thread.forced = before
        _note(block, None)


def _note(block: object, name: str | None) -> None:
    """A block of some thread begins with this name, or ends."""
    global _latest
    with _lock:
        if name is None:
            del _open[block]
        else:
            _open[block] = name
        _latest = next(reversed(_open.values()), None)


def available() -> dict[str, str | None]:
    """Every registered backend: None if it can run in this process, else the reason why not."""
    return {name: get(name).unavailable_reason() for name in NAMES}
