"""The goals, and what a result says of each. Pure functions.

They are stated for an H200 in bfloat16: fractions of the copy and ratios hold on any GPU, times in
microseconds are for information elsewhere. What is judged is the backend that `backend="auto"`
runs; the others are listed beside it.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from adapterkern.backends import NAMES
from adapterkern.bench import roofline
from adapterkern.bench.cases import BenchCase
from adapterkern.bench.results import ModelRow, Result, Row
from benchmarks.judge import TF32, Judge, Verdict, over

DEVICE = "H200"
WORKSPACE_MB = 20


def verdicts(result: Result) -> list[Verdict]:
    """Judge every goal against a result; nothing measured on a CPU counts."""
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
    bf16 = [row for row in rows if row.case.dtype == "bf16" and row.case.kind == "one"]
    found = [*judged, _auto(bf16, auto, calibration)]
    if not result.on_gpu or DEVICE in result.device:
        return found
    return [replace(v, met=None) if v.absolute and v.met is not None else v for v in found]


def auto_rows(rows: Iterable[Row], order: Sequence[str] = NAMES) -> list[Row]:
    """Return this package's row of the backend that "auto" runs, one a case.

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
    plain = [row for row in rows if row.case.kind == "one"]
    normed = [row for row in rows if row.case.kind == "norm"]
    many = [row for row in rows if row.case.kind == "many"]
    bf16 = Judge([row for row in plain if row.case.dtype == "bf16"], calibration)
    return [
        *_speed(bf16),
        *_block(models),
        *_norm(Judge(normed, calibration), models),
        *_many(Judge(many, calibration)),
        *_decode(bf16),
        *_memory(bf16),
        _repeatable(rows),
        *_dtypes(Judge(plain, calibration)),
    ]


def _of_copy(row: Row) -> float | None:
    return row.copy_fraction


def _in_graph(row: Row) -> float | None:
    return row.timings["graph"].p50 if "graph" in row.timings else None


def _against(baseline: str) -> Callable[[Row], float | None]:
    return lambda row: row.ratios.get(baseline)


def _speed(judge: Judge) -> list[Verdict]:
    def large(case: BenchCase) -> bool:
        return case.tokens >= 16384 and case.bottleneck_size <= 64

    forward, step = judge.of("forward", large), judge.of("step", large)
    return [
        forward.least("forward", "of the copy, worst", _of_copy, 0.75, _share, later="90%"),
        *(
            step.least("step", f"against {name}", _against(name), now, _times, later=later)
            for name, now, later in (("plain", 2.0, "2.80x"), ("compile", 1.5, "2.30x"))
        ),
        judge.least("everywhere", "against plain layers", _against("plain"), 1.0, _times),
    ]


def _block(models: Iterable[ModelRow]) -> list[Verdict]:
    """Judge what two adapters add to a transformer block of width 1024, in a graph."""
    goals = {"forward": 5.0, "step": 7.0}
    return [
        _overhead(models, "block", f"{mode} with two adapters", "block-1024", mode, bound)
        for mode, bound in goals.items()
    ]


def _overhead(
    models: Iterable[ModelRow],
    goal: str,
    promise: str,
    name: str,
    mode: str,
    bound: float,
    variant: str = "adapterkern",
) -> Verdict:
    """Judge the per cent that a variant of a model takes beyond the plain one, in a graph."""
    rows = {(r.model, r.mode, r.variant): r for r in models if r.execution == "graph"}
    promise = f"{promise} <= {bound:g} %"
    row, plain = rows.get((name, mode, variant)), rows.get((name, mode, "plain"))
    if row is None or plain is None or row.overhead_percent is None:
        return Verdict(goal, promise, why="no such case was run" if row is None else row.note)
    percent = row.overhead_percent
    times = [r.milliseconds.p50 for r in (plain, row) if r.milliseconds is not None]
    why = f"{name} in a graph: plain and adapted {' and '.join(f'{t:.3f}' for t in times)} ms"
    return Verdict(goal, promise, over(percent, bound, " %"), percent <= bound, why)


def _norm(judge: Judge, models: Iterable[ModelRow]) -> list[Verdict]:
    """Judge the adapter whose residual and norm are in its pass: its forward by the 3 passes over
    memory that an add and a norm take without an adapter; what it keeps for its backward, the
    stream and z; and what two of them add to a block.
    """
    models = list(models)

    def large(case: BenchCase) -> bool:
        return case.tokens >= 16384

    def saved(row: Row) -> float | None:
        case = row.case
        numbers = case.tokens * (case.hidden_size + case.bottleneck_size) * case.element_size
        return None if row.saved_bytes is None else row.saved_bytes / numbers

    forward, step = judge.of("forward", large), judge.of("step", large)
    in_pass = "LayerNorm in the same pass"
    return [
        forward.least("norm", "forward, of 3 passes over memory", _of_copy, 0.75, _share, "90%"),
        judge.least("norm", "against a norm of its own", _against("separate"), 1.0, _times),
        step.most("norm", "saved beside x and skip, of stream and z", saved, 1.01, ""),
        *(
            _overhead(
                models,
                "norm",
                f"{in_pass}, {name} forward with two adapters",
                name,
                "forward",
                bound,
                "adapterkern-norm",
            )
            for name, bound in (("block-1024", 1.2), ("block-4096", 0.4))
        ),
    ]


def _many(judge: Judge) -> list[Verdict]:
    """Judge many adapters in one batch: the time of one adapter on the same tokens where each has
    so many that its weights are few, the weights' bandwidth where every token has its own, and that
    of a copy where none has any.
    """

    def over(baseline: str) -> Callable[[Row], float | None]:
        def times(row: Row) -> float | None:
            ratio = row.ratios.get(baseline)
            return None if ratio is None else 1 / ratio

        return times

    def shared(case: BenchCase) -> bool:
        return case.mix == "even" and case.adapters == 16 and case.rows >= 128

    def distinct(case: BenchCase) -> bool:
        return case.mix == "even" and case.adapters >= 64 and case.rows == 1

    def beyond_bytes(row: Row) -> float | None:
        found = over("single")(row)
        bytes_of_one = roofline.moved_bytes(row.case, "single") / roofline.moved_bytes(row.case)
        return None if found is None else found * bytes_of_one

    forward = judge.of("forward", shared)
    decode = judge.of("forward", distinct)
    promise = "16 adapters of 128 rows and more, of one adapter's time"
    return [
        forward.most("many", promise, over("single"), 1.10, "x"),
        forward.most("many", f"{promise}, by their bytes", beyond_bytes, 1.10, "x"),
        decode.least(
            *("many", "decode with every token's own adapter, of the copy bandwidth"),
            *(lambda row: row.floor_fraction, 0.80, _share),
        ),
        judge.of("forward", lambda case: case.mix == "none").most(
            "many", "no token with an adapter, of a copy's time", over("limit"), 1.5, "x"
        ),
    ]


def _decode(judge: Judge) -> list[Verdict]:
    chosen = judge.of(
        "forward", lambda c: c.tokens <= 16 and c.bottleneck_size <= 64 and c.hidden_size <= 4096
    )
    promise = f"in a graph, on an {DEVICE}"
    return [chosen.most("decode", promise, _in_graph, 8.0, " us", later="4 us", absolute=True)]


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
        steps.most("memory", "transient activations in a step", activations, 0.99, " Ud"),
        steps.most("memory", "saved beside x", saved, 1.01, " Ur"),
        steps.most("memory", "transient workspace of a step", workspace, WORKSPACE_MB, " MB"),
    ]


def _repeatable(rows: list[Row]) -> Verdict:
    known = [row for row in rows if row.repeatable is not None]
    promise = "the same on every run"
    if not known:
        return Verdict("bits", promise, why="no case was run twice")
    changing = [str(row.case) for row in known if not row.repeatable]
    found = f"{len(known) - len(changing)} of {len(known)} cases"
    return Verdict("bits", promise, found, not changing, ", ".join(changing))


def _dtypes(judge: Judge) -> list[Verdict]:
    def same(case: BenchCase) -> bool:
        return (case.tokens, case.shape) == (16384, "H1024-R64")

    rows = {row.case.dtype: row for row in judge.of("forward", same).rows}
    brain = _of_copy(rows["bf16"]) if "bf16" in rows else None

    def apart(row: Row) -> float | None:
        half = _of_copy(row)
        return None if half is None or brain is None else abs(half / brain - 1) * 100

    def single(tf32: bool) -> Judge:
        kept = [row for row in judge.rows if (TF32 in row.note) is tf32]
        return Judge(kept, judge.calibration).of("forward", lambda c: c.dtype == "fp32")

    half = judge.of("forward", lambda c: same(c) and c.dtype == "fp16")
    return [
        half.most("dtypes", "float16 apart from bfloat16", apart, 2.0, " %"),
        single(True).least("dtypes", "float32 with TF32, of the copy", _of_copy, 0.75, _share),
        single(False).most(
            "dtypes", "float32 in full precision, error of its tolerance", _of_tolerance, 1.0, ""
        ),
    ]


def _auto(rows: list[Row], auto: list[Row], calibration: dict[str, float]) -> Verdict:
    """Judge that no backend, and no plain layers, would have been faster; 3 % are noise."""
    fastest: dict[BenchCase, float] = {}
    for row in rows:
        if row.time is not None:
            plain = row.ratios.get("plain", math.inf) * row.time.p50
            fastest[row.case] = min(fastest.get(row.case, math.inf), row.time.p50, plain)

    def against_best(row: Row) -> float | None:
        return fastest[row.case] / row.time.p50 if row.time and len(rows) > len(chosen) else None

    chosen = [row for row in auto if row.case.dtype == "bf16" and row.case.kind == "one"]
    promise = "against the best of all backends and plain layers, on any shape"
    return Judge(chosen, calibration).least("auto", promise, against_best, 0.97, _times)


def _of_tolerance(row: Row) -> float | None:
    return row.error / row.tolerance if row.error is not None and row.tolerance else None


def _share(value: float) -> str:
    return f"{value:.0%}"


def _times(value: float) -> str:
    return f"{value:.2f}x"
