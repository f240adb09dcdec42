"""`explain`: which backend runs a call, or every adapter call of a model, and why."""

import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, takewhile
from typing import Any, overload

import torch
from torch import Tensor, nn

from adapterkern import _torch, dispatch
from adapterkern.backends import NAMES, get
from adapterkern.grouped import functional
from adapterkern.grouped.ops import NO_LEAVES
from adapterkern.modules.adapter_bank import AdapterBank
from adapterkern.modules.bottleneck import BottleneckAdapter
from adapterkern.modules.warmup import undisturbed
from adapterkern.spec import AdapterSpec
from adapterkern.validation import name_of

CALLED = "PyTorch modules"  # where a projection has to be called to be itself
COLUMNS = ("adapter", "calls", "H", "R", "activation", "dtype", "norm", "runs on")
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole part of a dotted name
_observing = threading.Lock()  # held while a model is being explained


@dataclass(frozen=True)
class Explanation:
    """Which backend runs a call, and every reason why the others do not."""

    call: str
    backend: str
    reasons: dict[str, tuple[str, ...]]

    def __str__(self) -> str:
        return "\n".join([self.call, f"  runs on: {self.backend}", *self._listed()])

    def _listed(self) -> list[str]:
        if self.backend == CALLED:  # the same for every backend
            return [f"  {CALLED}: {why}" for why in next(iter(self.reasons.values()))]
        return [f"  {name}: {why}" for name, reasons in self.reasons.items() for why in reasons]


@dataclass(frozen=True)
class AdapterRow:
    """One kind of call that a model made of one of its adapters."""

    adapter: str  # the name of its module in the model; "" where no module holds the weights
    calls: int  # of this kind; 0 for an adapter that the model did not call
    hidden_size: int
    bottleneck_size: int
    activation: str
    dtype: str  # of the computation
    norm: str  # in the same call: "LayerNorm", "RMSNorm" or ""
    explanation: Explanation | None  # None where it was not called

    @property
    def backend(self) -> str:
        """What runs it; "not called" where nothing did."""
        return "not called" if self.explanation is None else self.explanation.backend


@dataclass(frozen=True)
class ModelExplanation:
    """Every adapter of a model, what its calls ran on, and why; str() makes a table of it."""

    rows: tuple[AdapterRow, ...]
    apart: tuple[str, ...] = ()  # which adapters of a mixed batch no grouped call served, and why

    def __str__(self) -> str:
        lines: list[tuple[str, ...]] = [
            (r.adapter or "(no module)", str(r.calls), str(r.hidden_size), str(r.bottleneck_size),
             r.activation, r.dtype, r.norm, r.backend)
            for r in self.rows
        ]  # fmt: skip
        why = dict.fromkeys(
            line for r in self.rows if r.explanation for line in r.explanation._listed()
        )
        lines = [COLUMNS, *lines]
        if not any(r.norm for r in self.rows):  # a column that would be empty
            lines = [(*line[:-2], line[-1]) for line in lines]
        return "\n".join([*table(lines[0], lines[1:]), *why, *self.apart])


@overload
def explain(
    adapter: BottleneckAdapter | AdapterBank | dispatch.Call, *args: Any, **kwargs: Any
) -> Explanation: ...
@overload
def explain(adapter: Callable, *args: Any, **kwargs: Any) -> ModelExplanation: ...
def explain(adapter: Any, *args: Any, **kwargs: Any) -> Explanation | ModelExplanation:
    """Which backend runs a call, and every reason why the others do not.

    Args:
        adapter: a `BottleneckAdapter` (or any module with its `as_call`), or a call that `as_call`
            made: gives an `Explanation`, and nothing is computed. Or a whole model, or any other
            callable: it runs once, without gradients, and every adapter that it holds or calls is
            a row of a `ModelExplanation`; a call of many adapters is one row, named after the bank,
            or else after the module that holds them. The state of the model and of the random
            generators is afterwards what it was.
        args, kwargs: what `adapter` is called with, as in `explain(model, **tokenizer(text))`.

    Raises:
        TypeError, ValueError: the call is not valid.
        LookupError: a callable that called no adapter.
    """
    dispatch.check_environment()
    if isinstance(adapter, dispatch.Call):
        return _explanation(adapter.spec(), dispatch.wanted_backend("auto"))
    if hasattr(adapter, "as_call"):
        unfused = adapter.unfused_reason()
        if unfused is not None:
            return _called(adapter, unfused)
        return _explanation(
            adapter.as_call(*args, **kwargs).spec(), dispatch.wanted_backend(adapter.backend)
        )
    return _explain_model(adapter, args, kwargs)


def _called(adapter: Any, reason: str) -> Explanation:
    return Explanation(str(adapter), CALLED, dict.fromkeys(NAMES, (reason,)))


def _explanation(spec: AdapterSpec, wanted: str) -> Explanation:
    reasons = {name: get(name).unsupported_reasons(spec) for name in NAMES}
    if wanted == "auto":
        able = [name for name in NAMES if not reasons[name]]
        chosen = able[0] if able else "none: no backend can run it"
        if chosen == "reference" and spec.norm is not None:
            rest = _explanation(spec.without_norm(), wanted)
            chosen = f"{rest.backend}, then torch's {spec.norm}"
        reasons |= {name: [f"{chosen} comes first"] for name in able[1:]}
    else:
        chosen = f"none: {wanted} was named and raises" if reasons[wanted] else f"{wanted} (named)"
        others = [name for name in NAMES if name != wanted]
        reasons |= {name: [*reasons[name], f"{wanted} was named"] for name in others}
    listed = {name: tuple(why) for name, why in reasons.items() if why}
    return Explanation(spec.describe(), chosen, listed)


def _explain_model(model: Callable, args: Sequence, kwargs: dict) -> ModelExplanation:
    modules = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    adapters = {
        name: m for name, m in modules.items() if isinstance(m, BottleneckAdapter | AdapterBank)
    }
    seen = _Seen(modules)
    unfused: Counter[tuple[str, str]] = Counter()
    with ExitStack() as stack:
        stack.enter_context(_observed(seen))
        for name, adapter in adapters.items():
            reason = adapter.unfused_reason()
            if reason is not None:  # dispatch is not asked, so a hook counts the calls
                hook = partial(_count, unfused, (name, reason))
                stack.callback(adapter.register_forward_pre_hook(hook).remove)
        if _torch.has_compiled():  # nor does compiled code ask
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if isinstance(model, nn.Module):
            stack.enter_context(undisturbed(model, args, kwargs))
        stack.enter_context(torch.no_grad())
        model(*args, **kwargs)
    rows = [_row_of_call(*key, count) for key, count in seen.calls.items()]
    rows += [
        _row_of_module(name, adapters[name], count, _called(adapters[name], reason))
        for (name, reason), count in unfused.items()
    ]
    told = {row.adapter for row in rows} | seen.grouped
    for name, m in adapters.items():
        if isinstance(m, AdapterBank):  # its row tells of its adapters
            told.update(f"{name}.adapters.{one}".removeprefix(".") for one in m.names)
    rows += [_row_of_module(name, adapters[name], 0, None) for name in adapters if name not in told]
    if not rows:
        raise LookupError(f"{model!r} called no adapter, so there is nothing to explain.")
    order = {name: place for place, name in enumerate(modules)}
    rows.sort(key=lambda row: order.get(row.adapter, -1))
    return ModelExplanation(tuple(rows), tuple(seen.apart))


class _Seen:
    """What dispatch is asked and told while a model runs."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.calls: Counter[tuple[str, AdapterSpec, str]] = Counter()
        self.grouped: set[str] = set()  # modules of adapters that a grouped call served
        self.apart: dict[str, None] = {}
        self.leaves: Sequence[Tensor] = ()  # of the grouped call that is being made
        self._owners = {
            id(tensor): name
            for name, module in modules.items()
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
        }

    def note(self, call: dispatch.Call, requested: str) -> None:
        """A call of the module that holds its weights, or else those that they are copies of."""
        tensors = call.tensors()
        holders = self._names(tensors[n] for n in tensors if not n.startswith("norm_"))
        if not holders:
            holders = self._names(self.leaves)
            self.grouped.update(holders, (name.rpartition(".")[0] for name in holders))
        self.calls[_common_parent(holders), call.spec(), dispatch.wanted_backend(requested)] += 1

    def _names(self, tensors: Iterable[Tensor | None]) -> list[str]:
        return [self._owners[id(tensor)] for tensor in tensors if id(tensor) in self._owners]


def _row_of_call(name: str, spec: AdapterSpec, wanted: str, calls: int) -> AdapterRow:
    return AdapterRow(
        name, calls, spec.hidden_size, spec.bottleneck_size, spec.activation,
        name_of(spec.compute_dtype), spec.norm or "", _explanation(spec, wanted),
    )  # fmt: skip


def _row_of_module(
    name: str, adapter: Any, calls: int, explanation: Explanation | None
) -> AdapterRow:
    tensor = next(chain(adapter.parameters(), adapter.buffers()), None)
    most = "max_" if isinstance(adapter, AdapterBank) else ""
    return AdapterRow(
        name, calls, adapter.hidden_size, getattr(adapter, f"{most}bottleneck_size"),
        adapter.activation, "?" if tensor is None else name_of(tensor.dtype), "", explanation,
    )  # fmt: skip


def _count(counter: Counter, key: tuple, *_: Any) -> None:
    counter[key] += 1


def _common_parent(names: list[str]) -> str:
    """The module that holds all of these, as "layer.0" does of "layer.0.down" and "layer.0.up"."""
    paths = [name.split(".") for name in names]
    same = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return ".".join(parts[0] for parts in same)


@contextmanager
def _observed(seen: _Seen) -> Iterator[None]:
    """Tell `seen` of all for which this thread asks dispatch, which need not know it."""
    thread = threading.get_ident()
    with _observing:
        select, run_call, report_apart = (
            dispatch.select, functional.run_call, dispatch.report_apart
        )  # fmt: skip

        def observed_select(call: dispatch.Call, requested: str = "auto") -> dispatch.Decision:
            if threading.get_ident() == thread:
                seen.note(call, requested)
            return select(call, requested)

        def observed_run(call: Any, backend: str = "auto", leaves: Any = NO_LEAVES) -> Tensor:
            if threading.get_ident() != thread:
                return run_call(call, backend, leaves)
            seen.leaves = leaves.parameters
            try:
                return run_call(call, backend, leaves)
            finally:
                seen.leaves = ()

        def observed_report(what: str, why: str) -> None:
            if threading.get_ident() == thread:
                seen.apart[f"{what} runs apart from the others of its batch: {why}"] = None
            report_apart(what, why)

        dispatch.select, dispatch.report_apart = observed_select, observed_report
        functional.run_call = observed_run
        try:
            yield
        finally:
            dispatch.select, dispatch.report_apart = select, report_apart
            functional.run_call = run_call


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Rows in aligned columns; those that differ only in numbers within the first cell, a module's
    name, are one line with ranges of numbers.
    """
    groups: dict[tuple[str, ...], list[list[int]]] = {}
    for name, *cells in rows:
        numbers = [int(number) for number in _NUMBER.findall(name)]
        groups.setdefault((_NUMBER.sub("*", name), *cells), []).append(numbers)
    lines = [tuple(heads)]
    for (name, *cells), members in groups.items():
        for values in zip(*members, strict=True):
            name = name.replace("*", _ranges(sorted(set(values))), 1)
        lines.append((name, *cells))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers in short: 3 for one, {0-2,5} for several."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
    return text if len(numbers) == 1 else "{" + text + "}"
