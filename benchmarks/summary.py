"""A result as Markdown: facts, goals, tables of adapters, models and host overhead."""

from collections.abc import Iterable, Sequence

from adapterkern.bench import table
from adapterkern.bench.results import ModelRow, Result, Row
from benchmarks import goals, judge, models

OF_NORM = ("separate", "no-adapter")  # of the cases with one
BASELINES = ("plain", "adapterhub", "addmm", "compile", "compile-max", "cublaslt", "lora", *OF_NORM)
OF_MANY = ("single", "loop", "lora-mixed")


def summary(result: Result) -> str:
    """Return the text of a report's Markdown file."""
    parts = [
        f"# Benchmark report: {result.device}",
        "\n".join([*(f"- {line}" for line in table.first_lines(result)), *_facts(result)]),
    ]
    if result.on_gpu:
        parts += ["## Goals", goals_table(result)]
    many = [row for row in result.rows if row.case.kind == "many"]
    one = [row for row in result.rows if row.case.kind != "many"]
    parts += ["## One adapter", adapters(one, result.on_gpu)]
    if many:
        parts += ["## Many adapters in one batch", adapters(many, result.on_gpu, OF_MANY)]
    presets = {spec.name for spec in models.SPECS if spec.preset}
    own = [row for row in result.models if row.model not in presets]
    stock = [row for row in result.models if row.model in presets]
    if result.models:
        parts += ["## Models", _models(own, result.on_gpu)]
        if result.on_gpu:
            parts += ["## Adapters against full fine-tuning", _against_full(own)]
        parts += ["## AdapterHub, stock and patched", _patched(stock, result.on_gpu)]
        if not result.on_gpu:
            parts.append("Widths of a few units on a CPU: that it runs, and nothing else.")
    if result.host:
        parts += ["## Host overhead, 4 tokens", _host(result)]
    problems = _problems(result)
    if problems:
        parts += ["## Not measured", problems]
    return "\n\n".join(parts) + "\n"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], text: int = 1) -> str:
    """Return a Markdown table; the first `text` columns to the left, numbers to the right."""
    rule = ["---" if index < text else "---:" for index in range(len(head))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def adapters(rows: Sequence[Row], on_gpu: bool, baselines: Sequence[str] = BASELINES) -> str:
    """Tabulate our times by case, and with a GPU the time of each baseline over ours."""
    ours = [row for row in rows if row.ours and row.time is not None]
    if not ours:
        return "No adapter was timed."
    if not on_gpu:
        timed = [row for row in rows if row.time is not None]
        return markdown(
            ("case", "provider", "p20 us", "p50 us", "p80 us"),
            ((f"{r.case}", r.provider, *_quantiles(r)) for r in timed),
            text=2,
        )
    present = [name for name in baselines if any(name in row.ratios for row in ours)]
    head = ["case", "backend", "timing", "us", "of copy", "of peak"]
    head += [f"vs {name}" for name in present]
    return markdown(
        head,
        (
            (
                f"{row.case}{f' {judge.TF32}' if judge.TF32 in row.note else ''}",
                row.provider,
                row.headline,
                f"{row.time.p50:.1f}" if row.time else "-",
                _share(row.copy_fraction),
                _share(row.peak_fraction),
                *(f"{row.ratios[name]:.2f}x" if name in row.ratios else "-" for name in present),
            )
            for row in ours
        ),
        text=3,
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _quantiles(row: Row) -> tuple[str, ...]:
    time = row.time
    assert time is not None  # asked of timed rows only
    return tuple(f"{value:.1f}" for value in (time.p20, time.p50, time.p80))


def _facts(result: Result) -> list[str]:
    header = result.header
    facts = {
        "driver": header.get("driver"),
        "CUDA": header.get("cuda"),
        "clocks before": header.get("clocks_before"),
        "stages": ", ".join(header.get("stages", [])),
        "nothing left out": header.get("finished"),
    }
    lines = [f"- {name}: {value}" for name, value in facts.items() if value]
    return lines


def goals_table(result: Result) -> str:
    """Tabulate every goal, if it is met, what was found and why; only promises before any run."""
    found = goals.verdicts(result)
    if all(verdict.met is None for verdict in found):
        promises: dict[str, list[str]] = {}
        for verdict in found:
            promises.setdefault(verdict.goal, []).append(verdict.promise)
        rows = ((goal, "; ".join(of), found[0].state) for goal, of in promises.items())
        return markdown(("goal", "promise", "state"), rows, text=3)
    head = ("goal", "promise", "state", "found", "why", "other backends")
    return markdown(
        head,
        (
            (v.goal, v.promise, v.state, v.found, v.why or "-", "; ".join(v.others) or "-")
            for v in found
        ),
        text=6,
    )


def _models(rows: Sequence[ModelRow], on_gpu: bool) -> str:
    head = ["model", "variant", "mode", "execution", "ms p50", "peak MiB", "trained"]
    if on_gpu:
        head += ["over plain", "published"]
    body = []
    for row in rows:
        if row.milliseconds is None:
            continue
        share = f"{row.trained / row.parameters:.2%}" if row.trained and row.parameters else "-"
        peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}"
        cells = [row.model, row.variant, row.mode, row.execution, f"{row.milliseconds.p50:.3f}"]
        cells += [peak, share]
        if on_gpu:
            over = row.overhead_percent
            adapted = row.variant in ("adapterhub", "adapterkern") and row.mode == "forward"
            published = models.PUBLISHED.get(row.model) if adapted else None
            cells.append("-" if over is None else f"{over:+.1f} %")
            cells.append("-" if published is None else f"{published:+.1f} %")
        body.append(cells)
    return markdown(head, body, text=4)


def _against_full(rows: Sequence[ModelRow]) -> str:
    """Compare steps that train adapters with those that train everything, in the same run."""
    steps = [row for row in rows if row.mode == "step" and row.milliseconds is not None]
    whole = {(row.model, row.execution): row for row in steps if row.variant == "full"}
    body = []
    for row in steps:
        full = whole.get((row.model, row.execution))
        if full is None or row.variant in ("plain", "full"):
            continue
        assert row.milliseconds is not None
        assert full.milliseconds is not None
        share = f"{row.trained / full.trained:.2%}" if row.trained and full.trained else "-"
        time = f"{row.milliseconds.p50 / full.milliseconds.p50:.2f}"
        peak = "-"
        if row.peak_bytes and full.peak_bytes:
            peak = f"{row.peak_bytes / full.peak_bytes:.2f}"
        body.append((row.model, row.variant, row.execution, share, "0.5-5 %", time, peak))
    if not body:
        return "No model was trained both ways."
    head = ("model", "variant", "execution", "trained of all", "published", "time of full")
    return markdown((*head, "peak memory of full"), body, text=3)


def _patched(rows: Sequence[ModelRow], on_gpu: bool) -> str:
    """Tabulate AdapterHub's models as they are and with our one line: times, and GPU ratios."""
    by_case: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in rows:
        if row.milliseconds is not None:
            key = row.model, row.mode, row.execution
            by_case.setdefault(key, {})[row.variant] = row.milliseconds.p50
    stock, patched = "adapterhub", "adapterhub-patched"
    body = []
    for key, times in by_case.items():
        if stock not in times:
            continue
        cells = [f"{times[name]:.3f}" if name in times else "-" for name in models.PATCHED]
        if on_gpu:
            for name in (patched, f"{patched}-calls"):
                cells.append(f"{times[stock] / times[name]:.2f}x" if name in times else "-")
        body.append((*key, *cells))
    if not body:
        return "No model of AdapterHub was timed."
    head = ["model", "mode", "execution", "plain ms", "stock ms", "patched ms", "calls only ms"]
    head += ["stock over patched", "stock over calls only"] if on_gpu else []
    return markdown(head, body, text=3)


def _host(result: Result) -> str:
    return markdown(
        ("call", "median us", "interquartile range us"),
        ((e["name"], f"{e['median_us']:.1f}", f"{e['iqr_us']:.1f}") for e in result.host),
    )


def _problems(result: Result) -> str:
    reasons: dict[str, list[str]] = {}
    rows: list[Row | ModelRow] = [*result.rows, *result.models]
    for row in rows:
        if row.status != "ok":
            name = row.provider if isinstance(row, Row) else row.variant
            reasons.setdefault(f"{name}: {row.status.replace('_', ' ')}, {row.note}", []).append(
                row.key
            )
    lines = [f"- {reason} ({len(keys)} rows)" for reason, keys in reasons.items()]
    undone: dict[str, list[str]] = {}
    for entry in result.log:
        if entry["status"] != "done":
            note = f", {entry['note']}" if entry.get("note") else ""
            undone.setdefault(f"{entry['status']}{note}", []).append(entry["task"])
    lines += [f"- {reason}: {', '.join(tasks)}" for reason, tasks in undone.items()]
    return "\n".join(lines)
