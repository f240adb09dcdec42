"""A result as Markdown: facts, goals, tables of adapters, models and host overhead."""

from collections.abc import Iterable, Sequence

from adapterkern.bench import table
from adapterkern.bench.results import ModelRow, Result, Row
from benchmarks import goals, models

BASELINES = ("plain", "adapterhub", "addmm", "compile", "compile-max", "cublaslt", "lora")


def summary(result: Result) -> str:
    """The text of a report's Markdown file."""
    parts = [
        f"# Benchmark report: {result.device}",
        "\n".join([*(f"- {line}" for line in table.first_lines(result)), *_facts(result)]),
    ]
    if result.on_gpu:
        parts += ["## Goals", goals_table(result)]
    parts += ["## One adapter", adapters(result.rows, result.on_gpu)]
    if result.models:
        parts += ["## Models", _models(result.models, result.on_gpu)]
        if not result.on_gpu:
            parts.append("Widths of a few units on a CPU: that it runs, and nothing else.")
    if result.host:
        parts += ["## Host overhead, 4 tokens", _host(result)]
    problems = _problems(result)
    if problems:
        parts += ["## Not measured", problems]
    return "\n\n".join(parts) + "\n"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], text: int = 1) -> str:
    """A Markdown table; the first `text` columns to the left, numbers to the right."""
    rule = ["---" if index < text else "---:" for index in range(len(head))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def adapters(rows: Sequence[Row], on_gpu: bool) -> str:
    """Our times by case, and with a GPU the time of each baseline over ours."""
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
    present = [name for name in BASELINES if any(name in row.ratios for row in ours)]
    head = ["case", "backend", "timing", "us", "of floor", *(f"vs {name}" for name in present)]
    return markdown(
        head,
        (
            (
                str(row.case),
                row.provider,
                row.headline,
                f"{row.time.p50:.1f}" if row.time else "-",
                "-" if row.floor_fraction is None else f"{row.floor_fraction:.0%}",
                *(f"{row.ratios[name]:.2f}x" if name in row.ratios else "-" for name in present),
            )
            for row in ours
        ),
        text=3,
    )


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
        "clocks after": header.get("clocks_after"),
    }
    lines = [f"- {name}: {value}" for name, value in facts.items() if value]
    for name, outcome in header.get("outcomes", {}).items():
        says = f" ({outcome['says']})" if outcome.get("says") else ""
        lines.append(f"- {name}: {outcome['status']} in {outcome['seconds']} s{says}")
    return lines


def goals_table(result: Result) -> str:
    """Every goal, whether it is met, and what was found."""
    return markdown(
        ("goal", "promise", "state", "found"),
        ((v.goal, v.promise, v.state, v.found) for v in goals.verdicts(result)),
        text=4,
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
            adapted = row.variant in ("adapterhub", "adapterkern")
            published = models.PUBLISHED.get(row.model) if adapted else None
            cells.append("-" if over is None else f"{over:+.1f} %")
            cells.append("-" if published is None else f"{published:+.1f} %")
        body.append(cells)
    return markdown(head, body, text=4)


def _host(result: Result) -> str:
    return markdown(
        ("call", "median us", "interquartile range us"),
        ((e["name"], f"{e['median_us']:.1f}", f"{e['iqr_us']:.1f}") for e in result.host),
    )


def _problems(result: Result) -> str:
    reasons: dict[str, list[str]] = {}
    for row in (*result.rows, *result.models):
        if row.status != "ok":
            name = row.provider if isinstance(row, Row) else row.variant
            reasons.setdefault(f"{name}: {row.status.replace('_', ' ')}, {row.note}", []).append(
                row.key
            )
    lines = [f"- {reason} ({len(keys)} rows)" for reason, keys in reasons.items()]
    for entry in result.log:
        if entry["status"] != "done":
            note = f", {entry['note']}" if entry.get("note") else ""
            lines.append(f"- {entry['task']}: {entry['status']}{note}")
    return "\n".join(lines)
