"""The speed goals of an H200 in bfloat16, and what a result says of each. Pure functions.

What is judged is the backend that `backend="auto"` runs; the others are listed beside it.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from adapterkern.backends import NAMES
from adapterkern.bench.cases import BenchCase
from adapterkern.bench.results import ModelRow, Result, Row
from benchmarks.judge import TF32, Judge, Verdict, over

WORKSPACE_MB = 20


def verdicts(result: Result) -> list[Verdict]:
    """Every goal against a result; nothing measured on a CPU counts."""
    rows = [row for row in result.rows if row.ours] if result.on_gpu else []
    models = result.models if result.on_gpu else []
    calibration = result.header.get("calibration", {})
    auto = auto_rows(rows, result.header.get("backends", NAMES))
    judged = _verdicts(auto, models, calibration)
    for name in sorted({row.provider for row in rows}):
        own = [row for row in rows if row.provider == name]
        if all(row in auto for row in own):
            continue
        for index, other in enumerate(_verdicts(own, [], calibration)):
            if other.met is not None:
                others = (*judged[index].others, f"{name} {other.found}")
                judged[index] = replace(judged[index], others=others)
    half = [row for row in rows if row.case.dtype == "bf16"]
    return [*judged, *_families(half, calibration), _auto(half, auto, calibration)]


def auto_rows(rows: Iterable[Row], order: Sequence[str] = NAMES) -> list[Row]:
    """Of this package's rows that of the backend which "auto" runs, one a case.

    It is the first of `order` that can run the case, however fast, and though its result be wrong.
    """
    ranks = {name: rank for rank, name in enumerate(order)}
    chosen: dict[BenchCase, Row] = {}
    for row in sorted(rows, key=lambda row: ranks.get(row.provider, len(ranks))):
        if row.ours and row.status != "unavailable":
            chosen.setdefault(row.case, row)
    return list(chosen.values())


def _verdicts(
    rows: list[Row], models: list[ModelRow], calibration: dict[str, float]
) -> list[Verdict]:
    bf16 = Judge([row for row in rows if row.case.dtype == "bf16"], calibration)
    return [
        *_forward(bf16),
        *_backward(bf16),
        *_step(bf16),
        *_block(models),
        *_decode(bf16),
        *_memory(bf16),
        *_repeatable(rows),
        *_dtypes(Judge(rows, calibration)),
    ]


def _fraction(row: Row) -> float | None:
    return row.floor_fraction


def _floor_fraction(row: Row) -> float | None:
    """Of the whole floor, products and launches included, where those bound it."""
    return row.floor_us / row.time.p50 if row.floor_us is not None and row.time else None


def _in_graph(row: Row) -> float | None:
    return row.timings["graph"].p50 if "graph" in row.timings else None


def _against(baseline: str) -> Callable[[Row], float | None]:
    return lambda row: row.ratios.get(baseline)


def _forward(judge: Judge) -> list[Verdict]:
    narrow = judge.of("forward", lambda c: c.tokens >= 16384 and c.bottleneck_size <= 64)
    at_128 = judge.of("forward", lambda c: c.tokens >= 16384 and c.bottleneck_size == 128)
    at_256 = judge.of("forward", lambda c: c.tokens >= 16384 and c.bottleneck_size == 256)
    ratios = (("adapterhub", 3.1), ("compile", 2.3), ("addmm", 2.2), ("cublaslt", 1.35))
    mean = "forward, of the copy floor, geometric mean"
    return [
        narrow.least("G1", mean, _fraction, 0.90, _share, mean=True),
        narrow.least("G1", "forward, of the copy floor, worst", _fraction, 0.85, _share),
        at_128.least("G1", "forward at R = 128", _fraction, 0.82, _share),
        at_256.least("G1", "forward at R = 256, of the floor", _floor_fraction, 0.70, _share),
        *(
            narrow.least("G2", f"forward against {name}", _against(name), least, _times, mean=True)
            for name, least in ratios
        ),
    ]


def _backward(judge: Judge) -> list[Verdict]:
    def long(case: BenchCase) -> bool:
        wide = case.hidden_size >= 2048 and case.tokens >= 16384
        return case.bottleneck_size <= 64 and (case.tokens >= 65536 or wide)

    def middle(case: BenchCase) -> bool:
        narrow = case.hidden_size <= 1024 and case.bottleneck_size <= 64
        return case.tokens == 16384 and narrow

    def other(case: BenchCase) -> bool:
        small = case.tokens >= 4096 and case.bottleneck_size <= 128
        return small and not long(case) and not middle(case)

    parts = (
        ("backward, many tokens or wide", long, 0.80),
        ("backward, T = 16384, H <= 1024", middle, 0.73),
        ("backward, elsewhere from T = 4096", other, 0.55),
    )
    return [
        judge.of("backward", part).least("G3", name, _fraction, least, _share)
        for name, part, least in parts
    ]


def _step(judge: Judge) -> list[Verdict]:
    chosen = judge.of("step", lambda c: c.tokens >= 16384 and c.bottleneck_size <= 64)
    everywhere = judge.of("step", lambda _case: True)
    least = (("adapterhub", 2.8), ("compile", 2.3), ("cublaslt", 1.3))
    never = "never slower than cublaslt"
    return [
        *(
            chosen.least("G4", f"training step against {n}", _against(n), at, _times, mean=True)
            for n, at in least
        ),
        everywhere.least("G4", never, _against("cublaslt"), 1, _times),
    ]


def _block(models: Iterable[ModelRow]) -> list[Verdict]:
    rows = {(r.model, r.mode, r.variant): r for r in models if r.execution == "graph"}
    ours, folded = "adapterkern", "adapterkern-skip"
    parts = (
        ("block forward, two adapters", "block-1024", "forward", ours, 5.0),
        ("block training step", "block-1024", "step", ours, 7.0),
        ("block forward, LayerNorm in the same pass", "block-1024", "forward", folded, 1.2),
        ("block training step, LayerNorm in the same pass", "block-1024", "step", folded, 3.0),
        (
            "block forward at H = 4096, LayerNorm in the same pass",
            "block-4096",
            "forward",
            folded,
            0.4,
        ),
    )
    found = []
    for name, model, mode, variant, bound in parts:
        promise = f"{name} <= {bound:g} %"
        row, plain = rows.get((model, mode, variant)), rows.get((model, mode, "plain"))
        if row is None or plain is None or row.overhead_percent is None:
            why = "no such case was run" if row is None else row.note
            found.append(Verdict("G5", promise, why=why))
            continue
        percent = row.overhead_percent
        times = [r.milliseconds.p50 for r in (plain, row) if r.milliseconds is not None]
        why = f"{model} in a graph: plain and adapted {' and '.join(f'{t:.3f}' for t in times)} ms"
        if variant == folded:
            why += "; no kernel has the LayerNorm yet, this one folds in the residual"
        found.append(Verdict("G5", promise, over(percent, bound, " %"), percent <= bound, why))
    return found


def _decode(judge: Judge) -> list[Verdict]:
    chosen = judge.of(
        "forward", lambda c: c.tokens <= 16 and c.bottleneck_size <= 64 and c.hidden_size <= 4096
    )

    return [
        chosen.most("G7", "decode, in a graph", _in_graph, 3.3, " us"),
        chosen.most("G7", "decode, host time of a call", lambda row: row.host_us, 7.0, " us"),
    ]


def _memory(judge: Judge) -> list[Verdict]:
    steps = judge.of("step", lambda c: c.tokens >= 2048)

    def activations(row: Row) -> float | None:
        size = row.case.tokens * row.case.hidden_size * row.case.element_size
        return None if row.transient_bytes is None else row.transient_bytes / size

    def saved(row: Row) -> float | None:
        size = row.case.tokens * row.case.bottleneck_size * row.case.element_size
        return None if row.saved_bytes is None else row.saved_bytes / size

    def workspace(row: Row) -> float | None:
        return None if row.transient_bytes is None else row.transient_bytes / 1e6

    return [
        steps.most("G9", "transient activations in a step", activations, 0.99, " Ud"),
        steps.most("G9", "saved beside x", saved, 1.01, " Ur"),
        steps.most("G9", "transient workspace of a step", workspace, WORKSPACE_MB, " MB"),
    ]


def _repeatable(rows: list[Row]) -> list[Verdict]:
    known = [row for row in rows if row.repeatable is not None]
    atomics = Verdict("G10", "at most 5 % slower than atomics", why="no atomic variant exists")
    promise = "the same bits on every run"
    if not known:
        return [Verdict("G10", promise, why="no case was run twice"), atomics]
    changing = [str(row.case) for row in known if not row.repeatable]
    found = f"{len(known) - len(changing)} of {len(known)} cases"
    return [Verdict("G10", promise, found, not changing, ", ".join(changing)), atomics]


def _dtypes(judge: Judge) -> list[Verdict]:
    def same(case: BenchCase) -> bool:
        return (case.tokens, case.shape) == (16384, "H1024-R64")

    rows = {row.case.dtype: row for row in judge.of("forward", same).rows}
    brain = _fraction(rows["bf16"]) if "bf16" in rows else None

    def apart(row: Row) -> float | None:
        half = _fraction(row)
        return None if half is None or brain is None else abs(half / brain - 1) * 100

    def single(tf32: bool) -> Judge:
        kept = [row for row in judge.rows if (TF32 in row.note) is tf32]
        return Judge(kept, judge.calibration).of("forward", lambda c: c.dtype == "fp32")

    half = judge.of("forward", lambda c: same(c) and c.dtype == "fp16")
    return [
        half.most("G11", "float16 apart from bfloat16", apart, 2.0, " %"),
        single(True).least("G11", "float32 with TF32, of its floor", _fraction, 0.85, _share),
        single(False).most(
            "G11", "float32 in full precision, error of its tolerance", _of_tolerance, 1.0, ""
        ),
    ]


def _families(rows: list[Row], calibration: dict[str, float]) -> list[Verdict]:
    """What the Triton and the CUDA kernels promise, each by themselves."""

    def narrow(case: BenchCase) -> bool:
        return case.tokens >= 16384 and case.bottleneck_size <= 64 and case.hidden_size <= 8192

    def prompt(case: BenchCase) -> bool:
        return (case.tokens, case.hidden_size) == (2048, 1024) and case.bottleneck_size <= 64

    def decode(case: BenchCase) -> bool:
        return case.tokens <= 16 and case.bottleneck_size <= 64 and case.hidden_size <= 4096

    triton, cuda = (
        Judge([row for row in rows if row.provider == name], calibration)
        for name in ("triton", "cuda")
    )
    worst = "forward, T >= 16384, R <= 64, of the copy floor"
    back = "backward, T >= 16384, R <= 64, of its three-pass floor"
    return [
        triton.of("forward", narrow).least("Triton", worst, _fraction, 0.75, _share),
        triton.of("backward", narrow).least("Triton", back, _fraction, 0.55, _share),
        *(
            triton.of("step", narrow).least(
                "Triton", f"training step against {name}", _against(name), at, _times
            )
            for name, at in (("adapterhub", 2.2), ("compile", 1.8))
        ),
        triton.of("forward", prompt).least(
            "Triton", "forward, T = 2048, H = 1024, of the floor", _floor_fraction, 0.4, _share
        ),
        cuda.of("forward", narrow).least("CUDA", worst, _fraction, 0.88, _share),
        cuda.of("backward", narrow).least("CUDA", back, _fraction, 0.65, _share),
        cuda.of("forward", prompt).most(
            "CUDA", "forward, T = 2048, H = 1024, in a graph", _in_graph, 3.5, " us"
        ),
        cuda.of("forward", decode).most("CUDA", "decode, in a graph", _in_graph, 3.3, " us"),
    ]


def _auto(rows: list[Row], auto: list[Row], calibration: dict[str, float]) -> Verdict:
    """That no backend, and no plain layers, would have been faster; 3 % are noise."""
    fastest: dict[BenchCase, float] = {}
    for row in rows:
        if row.time is not None:
            plain = row.ratios.get("plain", math.inf) * row.time.p50
            fastest[row.case] = min(fastest.get(row.case, math.inf), row.time.p50, plain)

    def against_best(row: Row) -> float | None:
        return fastest[row.case] / row.time.p50 if row.time and len(rows) > len(chosen) else None

    chosen = [row for row in auto if row.case.dtype == "bf16"]
    promise = "against the best of all backends and plain layers, on any shape"
    return Judge(chosen, calibration).least("auto", promise, against_best, 0.97, _times)


def _of_tolerance(row: Row) -> float | None:
    return row.error / row.tolerance if row.error is not None and row.tolerance else None


def _share(value: float) -> str:
    return f"{value:.0%}"


def _times(value: float) -> str:
    return f"{value:.2f}x"
