"""The speed goals of an H200 in bfloat16, and what a result says of each. Pure functions."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from adapterkern.bench.cases import BenchCase
from adapterkern.bench.results import ModelRow, Result, Row

NOT_MEASURED = "-"


@dataclass(frozen=True)
class Verdict:
    """One promise: what was asked, what was found. met is None where it was not measured."""

    goal: str
    promise: str
    found: str = NOT_MEASURED
    met: bool | None = None

    @property
    def state(self) -> str:
        """In a word or two."""
        return {True: "met", False: "missed", None: "not measured"}[self.met]


def verdicts(result: Result) -> list[Verdict]:
    """Every goal against a result; nothing measured on a CPU counts."""
    rows = _fastest(result.rows) if result.on_gpu else []
    models = result.models if result.on_gpu else []
    parts: list[Callable[[], list[Verdict]]] = [
        lambda: _forward(rows),
        lambda: _backward(rows),
        lambda: _step(rows),
        lambda: _block(models),
        lambda: _decode(rows),
        lambda: _memory(rows),
        lambda: _repeatable(rows),
        lambda: _dtypes(rows),
    ]
    return [verdict for part in parts for verdict in part()]


def _fastest(rows: Iterable[Row]) -> list[Row]:
    """Of this package's rows the fastest of each case: what a dispatcher can choose."""
    best: dict[BenchCase, Row] = {}
    for row in rows:
        if row.ours and row.time is not None:
            other = best.get(row.case)
            if other is None or other.time is None or row.time.p50 < other.time.p50:
                best[row.case] = row
    return list(best.values())


def _forward(rows: list[Row]) -> list[Verdict]:
    narrow = _select(
        rows, "forward", lambda case: case.tokens >= 16384 and case.bottleneck_size <= 64
    )
    shares = _fractions(narrow)
    at_128 = _select(rows, "forward", lambda c: c.tokens >= 16384 and c.bottleneck_size == 128)
    at_256 = _select(rows, "forward", lambda c: c.tokens >= 16384 and c.bottleneck_size == 256)
    compute = [r.floor_us / r.time.p50 for r in at_256 if r.floor_us is not None and r.time]
    ratios = (("adapterhub", 3.1), ("compile", 2.3), ("addmm", 2.2), ("cublaslt", 1.35))
    return [
        _at_least("G1", "forward, of the copy floor, geometric mean", _mean(shares), 0.90, _share),
        _at_least("G1", "forward, of the copy floor, worst", _least(shares), 0.85, _share),
        _at_least("G1", "forward at R = 128", _least(_fractions(at_128)), 0.82, _share),
        _at_least("G1", "forward at R = 256, of the floor", _least(compute), 0.70, _share),
        *(
            _at_least("G2", f"forward against {name}", _mean(_ratios(narrow, name)), least, _times)
            for name, least in ratios
        ),
    ]


def _backward(rows: list[Row]) -> list[Verdict]:
    def long(case) -> bool:
        wide = case.hidden_size >= 2048 and case.tokens >= 16384
        return case.bottleneck_size <= 64 and (case.tokens >= 65536 or wide)

    def middle(case) -> bool:
        narrow = case.hidden_size <= 1024 and case.bottleneck_size <= 64
        return case.tokens == 16384 and narrow

    def other(case) -> bool:
        small = case.tokens >= 4096 and case.bottleneck_size <= 128
        return small and not long(case) and not middle(case)

    parts = (
        ("backward, many tokens or wide", long, 0.80),
        ("backward, T = 16384, H <= 1024", middle, 0.73),
        ("backward, elsewhere from T = 4096", other, 0.55),
    )
    return [
        _at_least("G3", name, _least(_fractions(_select(rows, "backward", part))), least, _share)
        for name, part, least in parts
    ]


def _step(rows: list[Row]) -> list[Verdict]:
    chosen = _select(rows, "step", lambda c: c.tokens >= 16384 and c.bottleneck_size <= 64)
    everywhere = _select(rows, "step", lambda _case: True)
    least = (("adapterhub", 2.8), ("compile", 2.3), ("cublaslt", 1.3))
    return [
        *(
            _at_least(
                "G4", f"training step against {name}", _mean(_ratios(chosen, name)), at, _times
            )
            for name, at in least
        ),
        _at_least(
            "G4", "never slower than cublaslt", _least(_ratios(everywhere, "cublaslt")), 1, _times
        ),
    ]


def _block(models: Iterable[ModelRow]) -> list[Verdict]:
    def overhead(mode: str, variant: str) -> float | None:
        found = [
            row.overhead_percent
            for row in models
            if (row.model, row.mode, row.variant) == ("block-1024", mode, variant)
            and row.execution == "graph"
            and row.overhead_percent is not None
        ]
        return found[0] if found else None

    return [
        _at_most("G5", "block forward, two adapters", overhead("forward", "adapterkern"), 5.0),
        _at_most("G5", "block training step", overhead("step", "adapterkern"), 7.0),
        Verdict("G5", "block with LayerNorm in the same pass (there is no such kernel yet)"),
    ]


def _decode(rows: list[Row]) -> list[Verdict]:
    chosen = [
        row
        for row in _select(rows, "forward", lambda c: c.tokens <= 16 and c.bottleneck_size <= 64)
        if row.case.hidden_size <= 4096 and row.case.dtype == "bf16"
    ]
    graph = [row.timings["graph"].p50 for row in chosen if "graph" in row.timings]
    host = [row.host_us for row in chosen if row.host_us is not None]
    return [
        _at_most("G7", "decode, in a graph", max(graph, default=None), 3.3, " us"),
        _at_most("G7", "decode, host time of a call", max(host, default=None), 7.0, " us"),
    ]


def _memory(rows: list[Row]) -> list[Verdict]:
    steps = _select(rows, "step", lambda c: c.tokens >= 2048)
    activations = [
        row.transient_bytes / (row.case.tokens * row.case.hidden_size * row.case.element_size)
        for row in steps
        if row.transient_bytes is not None
    ]
    saved = [
        row.saved_bytes / (row.case.tokens * row.case.bottleneck_size * row.case.element_size)
        for row in steps
        if row.saved_bytes is not None
    ]
    return [
        _at_most(
            "G9", "transient activations in a step", max(activations, default=None), 0.99, " Ud"
        ),
        _at_most("G9", "saved beside x", max(saved, default=None), 1.01, " Ur"),
    ]


def _repeatable(rows: list[Row]) -> list[Verdict]:
    known = [row.repeatable for row in rows if row.repeatable is not None]
    bits = Verdict("G10", "the same bits on every run")
    if known:
        found = f"{sum(known)} of {len(known)} cases"
        bits = Verdict("G10", "the same bits on every run", found, all(known))
    return [bits, Verdict("G10", "at most 5 % slower than atomics (no atomic variant exists)")]


def _dtypes(rows: list[Row]) -> list[Verdict]:
    def fraction(dtype: str) -> float | None:
        found = [
            row.floor_fraction
            for row in rows
            if row.case.mode == "forward"
            and (row.case.dtype, row.case.tokens, row.case.shape) == (dtype, 16384, "H1024-R64")
        ]
        return found[0] if found else None

    half, brain, single = fraction("fp16"), fraction("bf16"), fraction("fp32")
    apart = abs(half / brain - 1) * 100 if half and brain else None
    return [
        _at_most("G11", "float16 apart from bfloat16", apart, 2.0),
        _at_least("G11", "float32, of its floor (TF32 off unless set)", single, 0.85, _share),
    ]


def _select(rows: list[Row], mode: str, wanted: Callable) -> list[Row]:
    """Rows of a mode in bfloat16; decode's dtype is the same."""
    return [
        row
        for row in rows
        if row.case.mode == mode and row.case.dtype == "bf16" and wanted(row.case)
    ]


def _fractions(rows: list[Row]) -> list[float]:
    return [row.floor_fraction for row in rows if row.floor_fraction is not None]


def _ratios(rows: list[Row], baseline: str) -> list[float]:
    return [row.ratios[baseline] for row in rows if baseline in row.ratios]


def _mean(values: list[float]) -> float | None:
    """Geometric."""
    if not values:
        return None
    return math.exp(sum(map(math.log, values)) / len(values))


def _least(values: list[float]) -> float | None:
    return min(values, default=None)


def _share(value: float) -> str:
    return f"{value:.0%}"


def _times(value: float) -> str:
    return f"{value:.2f}x"


def _at_least(
    goal: str, promise: str, found: float | None, least: float, form: Callable[[float], str]
) -> Verdict:
    promise = f"{promise} >= {form(least)}"
    if found is None:
        return Verdict(goal, promise)
    text = form(found) if found >= least else f"{form(found)}, {form(least - found)} short"
    return Verdict(goal, promise, text, found >= least)


def _at_most(
    goal: str, promise: str, found: float | None, most: float, unit: str = " %"
) -> Verdict:
    promise = f"{promise} <= {most:g}{unit}"
    if found is None:
        return Verdict(goal, promise)
    text = f"{found:.2f}{unit}"
    return Verdict(
        goal, promise, text if found <= most else f"{text}, {found - most:.2f} over", found <= most
    )
