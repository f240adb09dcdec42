"""Chooses the backend of a call: capabilities declared, every refusal collected, each fallback logged once."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adapterkern import _env
from adapterkern.backends import NAMES, get
from adapterkern.backends.base import BackendUnsupportedError
from adapterkern.spec import AdapterCall, AdapterSpec

logger = logging.getLogger("adapterkern")

_forced: str | None = None  # set by use_backend; process-wide, like the flags under torch.backends
_decisions: dict[tuple[AdapterSpec, str], str] = {}
_logged: set[str] = set()


@dataclass(frozen=True)
class Explanation:
    """Which backend runs a call, and every reason why the others do not."""

    call: str
    backend: str
    reasons: dict[str, tuple[str, ...]]

    def __str__(self) -> str:
        lines = [f"{self.call}", f"  runs on: {self.backend}"]
        for name, reasons in self.reasons.items():
            lines += [f"  {name}: {reason}" for reason in reasons]
        return "\n".join(lines)


def select(spec: AdapterSpec, requested: str = "auto") -> str:
    """The name of the backend that runs `spec`.

    `requested`, else `use_backend`, else ADAPTERKERN_BACKEND names it; under "auto" the first registered
    backend without a reason against the call runs it, the reference at the latest.

    Raises:
        BackendUnsupportedError: the named backend cannot run the call, or ADAPTERKERN_STRICT=1 and a call on a
            GPU would fall back to the reference.
        ValueError: unknown backend name.
    """
    wanted = requested if requested != "auto" else _forced or _env.BACKEND
    if torch.compiler.is_compiling():  # traced once per graph: no cache, whose growth would be guarded on
        return _decide(spec, wanted)
    chosen = _decisions.get((spec, wanted))
    if chosen is None:
        chosen = _decisions[spec, wanted] = _decide(spec, wanted)
    return chosen


def _decide(spec: AdapterSpec, wanted: str) -> str:
    if wanted != "auto":
        reasons = get(wanted).unsupported_reasons(spec)
        if reasons:
            raise BackendUnsupportedError(_refusal(wanted, spec, reasons))
        return wanted
    refused: dict[str, list[str]] = {}
    for name in NAMES:
        refused[name] = get(name).unsupported_reasons(spec)
        if not refused[name]:
            _report_fallback(name, spec, refused)
            return name
    raise AssertionError("the reference runs every valid call")


def _refusal(name: str, spec: AdapterSpec, reasons: list[str]) -> str:
    listing = "\n".join(f"  - {reason}" for reason in reasons)
    return f'backend "{name}" cannot run this call ({spec.describe()}):\n{listing}'


def _report_fallback(name: str, spec: AdapterSpec, refused: dict[str, list[str]]) -> None:
    """One log line per distinct fallback: a call for a GPU kernel that the reference runs instead."""
    if name != "reference" or (spec.device.type in ("cpu", "meta") and "dropout" not in spec.features):
        return
    why = "; ".join(f"{other}: {', '.join(reasons)}" for other, reasons in refused.items() if reasons)
    if _env.STRICT and spec.device.type != "cpu":
        raise BackendUnsupportedError(f"ADAPTERKERN_STRICT=1 and no fused backend can run {spec.describe()}: {why}")
    if why not in _logged and not torch.compiler.is_compiling():
        _logged.add(why)
        logger.warning("the PyTorch reference runs %s (%s)", spec.describe(), why)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, calls with backend="auto" run on `name` ("auto" restores the automatic choice).

    Process-wide, as the flags under `torch.backends` are. Backward runs on the backend its forward ran on.

    Raises:
        ValueError: unknown backend name.
    """
    global _forced
    if name != "auto":
        get(name)
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def available() -> dict[str, str | None]:
    """Every registered backend: None if it can run in this process, else the reason why not."""
    return {name: get(name).unavailable_reason() for name in NAMES}


def explain(adapter: nn.Module | AdapterCall, x: Tensor | None = None, **options) -> Explanation:
    """Which backend runs this call, and every reason why the others do not.

    Args:
        adapter: a `BottleneckAdapter` (or any module with its `as_call`), called with `x` and `options`.
        x: [..., H].
    """
    call = adapter if isinstance(adapter, AdapterCall) else adapter.as_call(x, **options)
    spec = call.spec()
    requested = getattr(adapter, "backend", "auto")
    wanted = requested if requested != "auto" else _forced or _env.BACKEND
    reasons = {name: get(name).unsupported_reasons(spec) for name in NAMES}
    if wanted != "auto":
        chosen = f"{wanted} (named)" if not reasons[wanted] else f"none: {wanted} was named and raises"
        reasons = {name: why if name == wanted else [*why, f"{wanted} was named"] for name, why in reasons.items()}
    else:
        chosen = next(name for name in NAMES if not reasons[name])
        later = NAMES[NAMES.index(chosen) + 1 :]
        reasons |= {name: [f"{chosen} comes first"] for name in later if not reasons[name]}
    return Explanation(spec.describe(), chosen, {name: tuple(why) for name, why in reasons.items() if why})
