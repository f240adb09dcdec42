"""Summarises a run from its own events and records, in few characters."""

import csv
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.output import SAMPLED, SAMPLES

MOST_CHARACTERS = 9_800  # a remote run's reply keeps little more of its output
_MISSES, _ROWS, _NOTES = 12, 40, 10
_COUNTED = re.compile(r"\d+ (passed|failed|skipped).* in [\d.]+s")
Entry = dict[str, Any]


def summary(events: Sequence[Entry], records: Sequence[Entry], folder: Path) -> str:
    """Return the text, cut to MOST_CHARACTERS with a note where the rest is."""
    header = next((entry for entry in records if entry["record"] == "header"), {})
    parts = [
        _head(header, events),
        _steps(events),
        _parity(events),
        _adapters(records),
        _models(records),
        _clocks(folder / SAMPLES),
        _problems(events, records),
    ]
    text = "\n\n".join("\n".join(lines) for lines in parts if lines)
    if len(text) > MOST_CHARACTERS:
        text = text[:MOST_CHARACTERS].rsplit("\n", 1)[0] + "\n... the rest is in events.jsonl"
    return text + "\n"


def _of(entries: Sequence[Entry], key: str, *names: str) -> list[Entry]:
    return [entry for entry in entries if entry[key] in names]


def _head(header: Entry, events: Sequence[Entry]) -> list[str]:
    begin = next(iter(_of(events, "event", "begin")), {})
    end = next(iter(_of(events, "event", "end")), None)
    state = "not finished" if end is None else "passed" if end["passed"] else "FAILED"
    for entry in _of(events, "event", "interrupted"):
        state = f"INTERRUPTED during {entry['during'] or 'its start'}"
    dry = "" if header.get("device_type", "cuda") == "cuda" else "dry run of "
    lines = [
        f"== {dry}{begin.get('stage')} on {header.get('device', 'an unknown machine')}: {state}, "
        f"commit {str(begin.get('commit'))[:12]}"
    ]
    if header:
        built = header["extension"]
        runs = built["problem"] or f"{built.get('runs', 'built')}, nvcc {built['nvcc']}"
        versions = header["versions"]
        lines.append(
            f"driver {header.get('driver')}, torch {versions.get('torch')}, "
            f"triton {versions.get('triton')}, extension: {runs}"
        )
    return lines


def _steps(events: Sequence[Entry]) -> list[str]:
    """Return a line a step, with the counts of pytest, whose tests may all have been skipped."""
    lines = []
    for entry in _of(events, "event", "step"):
        own = [e for e in _of(events, "event", "command") if e["step"] == entry["step"]]
        counted = [e["says"] for e in own if _COUNTED.search(e["says"])]
        note = entry.get("note") or "; ".join([f"{entry.get('seconds')} s", *counted[:1]])
        lines.append(f"  {entry['step']}: {entry['status']}, {note}")
    return ["steps", *lines] if lines else []


def _parity(events: Sequence[Entry]) -> list[str]:
    planned: Counter[tuple[str, str]] = Counter()
    for entry in _of(events, "event", "check backend"):
        planned[entry["step"], entry["backend"]] += entry["cases"]
    cases = _of(events, "event", "check case")
    lines = []
    for (step, backend), count in planned.items():
        own = [case for case in cases if (case["step"], case["backend"]) == (step, backend)]
        counts = Counter(case["status"] for case in own)
        told = [f"{n} {status}" for status, n in counts.items()]
        told += [f"{count - len(own)} not reached"] if count > len(own) else []
        lines.append(f"{step}, {backend}: {', '.join(told) or 'no case'}")
    wrong = [case for case in cases if case["status"] not in ("passed", "refused")]
    for case in wrong[:_MISSES]:
        lines.append(f"  {case['status'].upper()} {case['backend']} {case['case']}: {_why(case)}")
    if len(wrong) > _MISSES:
        lines.append(f"  and {len(wrong) - _MISSES} more in events.jsonl")
    return lines


def _why(case: Entry) -> str:
    missed = [row for row in case.get("rows", []) if not row["passed"]]
    told = [f"{row['tensor']} {_number(row['error'])}" for row in missed[:4]]
    return (", ".join(told) or str(case.get("note", "")))[:160]


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.1e}"


def _adapters(records: Sequence[Entry]) -> list[str]:
    """Return a line for each of our rows: time, shares of copy and of peak, and the ratios."""
    rows = [entry["content"] for entry in records if entry["record"] == "row"]
    ours = [row for row in rows if row["ours"]]
    if not ours:
        return []
    lines = ["adapter, us, of copy, of peak, times of others over ours"]
    for row in ours[:_ROWS]:
        case = row["case"]
        name = f"{case['mode']} {case['dtype']} T{case['tokens']} H{case['hidden_size']} "
        name += f"R{case['bottleneck_size']} {row['provider']}"
        timing = row["timings"].get(row["headline"])
        if timing is None:
            lines.append(f"  {name}: {row['status']}, {row['note'][:100]}")
            continue
        ratios = " ".join(
            f"{other} {ratio:.2f}x"
            for other, ratio in row["ratios"].items()
            if other in ("plain", "adapterhub", "compile", "cublaslt")
        )
        shares = f"{_share(row['copy_fraction'])} {_share(row['peak_fraction'])}"
        lines.append(f"  {name}: {timing['p50']:.1f} {shares} {ratios}".rstrip())
    if len(ours) > _ROWS:
        lines.append(f"  and {len(ours) - _ROWS} more in rows.jsonl")
    return lines


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _models(records: Sequence[Entry]) -> list[str]:
    by_case: dict[str, list[str]] = {}
    for entry in records:
        if entry["record"] != "model" or entry["content"]["milliseconds"] is None:
            continue
        row = entry["content"]
        over = row["overhead_percent"]
        text = f"{row['variant']} {row['milliseconds']['p50']:.3f}"
        text += "" if over is None else f" ({over:+.1f} %)"
        key = f"{row['model']} {row['mode']} {row['execution']}"
        by_case.setdefault(key, []).append(text)
    lines = [f"  {key}: {', '.join(texts)}" for key, texts in by_case.items()]
    return ["models, ms (and per cent over plain)", *lines] if lines else []


def _clocks(path: Path) -> list[str]:
    """Return the range of the clocks while the GPU worked, and every reason that slowed it."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return []
    rows = list(csv.reader(lines, skipinitialspace=True))
    if len(rows) < 2 or len(rows[0]) != len(SAMPLED):
        return []
    # Columns go by their order: nvidia-smi heads some of them by names other than those requested.
    samples = [dict(zip(SAMPLED, row, strict=True)) for row in rows[1:] if len(row) == len(SAMPLED)]
    busy = [sample for sample in samples if _float(sample["utilization.gpu"]) >= 50] or samples
    parts = []
    for name, unit in (("clocks.sm", "MHz"), ("power.draw", "W"), ("temperature.gpu", "C")):
        values = [_float(sample[name]) for sample in busy]
        parts.append(f"{name} {min(values):.0f} to {max(values):.0f} {unit}")
    reasons = Counter(sample["clocks_event_reasons.active"] for sample in busy)
    told = ", ".join(f"{reason} {count}x" for reason, count in reasons.most_common(4))
    return [f"{len(busy)} samples at work: {', '.join(parts)}; clock event reasons: {told}"]


def _float(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:  # "[N/A]"
        return float("nan")


def _problems(events: Sequence[Entry], records: Sequence[Entry]) -> list[str]:
    lines = []
    for entry in _of(events, "event", "task", "command"):
        if entry["status"] not in ("done", "passed"):
            name = entry.get("task") or f"{entry['step']}, {entry['command']}"
            lines.append(f"  {name}: {entry['status']}, {entry.get('note') or entry.get('says')}")
    reasons = Counter(
        f"{row['provider']}: {row['status']}, {row['note'][:90]}"
        for row in (entry["content"] for entry in records if entry["record"] == "row")
        if row["status"] != "ok"
    )
    lines += [f"  {reason} ({count} rows)" for reason, count in reasons.most_common(_NOTES)]
    if len(lines) > 3 * _NOTES:
        lines = [*lines[: 3 * _NOTES], f"  and {len(lines) - 3 * _NOTES} more in events.jsonl"]
    return ["not as it should be", *lines] if lines else []
