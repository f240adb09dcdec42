"""Results as text: a header of facts, then a table a case."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from adapterkern.bench.calibration import from_dict
from adapterkern.bench.results import NO_RATIO, Result, Row, Timing

NO_GPU = (
    "no GPU here: these are times of this package's PyTorch reference, on the CPU.",
    "It saves memory, not time: what makes adapters fast are the kernels for GPUs.",
)
WIDTH = 80  # columns of a terminal
_STATUS = {
    "unavailable": "not available",
    "wrong": "WRONG RESULT, not timed",
    "out_of_memory": "out of memory",
    "failed": "failed",
}


def first_lines(result: Result) -> list[str]:
    """Return what must be known to read the rows. Without a GPU the first line says so."""
    header = result.header
    versions = header.get("versions", {})
    lines = [] if result.on_gpu else [*NO_GPU]
    names = ("adapterkern", "torch", *(("triton",) if result.on_gpu else ()))
    software = ", ".join(f"{name} {versions[name]}" for name in names if versions.get(name))
    commit = header.get("commit")
    if commit:
        software += f", commit {commit[:9]}{' with changes' if header.get('dirty') else ''}"
    if result.on_gpu:
        lines.append(f"{result.device}: {software}")
    else:
        lines += [f"{processor(result)}:", f"  {software}"]
        lines += _busy(header)
    measured = from_dict(header.get("calibration", {}))
    if measured.copy_bandwidth is not None:
        facts = [f"copy {measured.copy_bandwidth / 1e12:.2f} TB/s"]
        for dtype, rate in (("bf16", measured.matrix_rate), ("fp32", measured.matrix_rate_fp32)):
            if rate is not None:
                facts.append(f"{dtype} products {rate / 1e12:.0f} TFLOP/s")
        if measured.graph_kernel is not None:
            facts.append(f"smallest kernel in a graph {measured.graph_kernel * 1e6:.1f} us")
        lines.append("measured in this run: " + ", ".join(facts))
    if measured.peak_bandwidth is not None:
        lines.append(f"peak of its memory: {measured.peak_bandwidth / 1e12:.2f} TB/s")
    if header.get("tuned"):
        lines.append(f"tuned launch configurations: {', '.join(header['tuned'])}")
    if measured.steady is False:
        moves = ", ".join(f"{name} {move:+.1%}" for name, move in measured.moves.items())
        lines.append(f"UNSTEADY: {moves} during the run")
    return lines


def processor(result: Result) -> str:
    """Return the name of the CPU, and how many threads a call had."""
    threads = result.header.get("cpu_threads")
    name = result.header.get("cpu") or result.device
    return name if threads is None else f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def _busy(header: dict[str, Any]) -> list[str]:
    load, cpus = header.get("load_average"), header.get("cpus")
    if load is None or cpus is None or load <= cpus / 2:
        return []
    return [f"BUSY: a load of {load:.1f} on {cpus} CPUs before this run; its times vary for that"]


def render(result: Result, brief: bool = False) -> str:
    """Return the whole result, one table a case, and one of all cases if there are several.

    brief: leave out all columns but the headline's times and the ratio.
    """
    cases = list(dict.fromkeys(row.case for row in result.rows))
    tables = [
        _render_case([row for row in result.rows if row.case == case], result, brief)
        for case in cases
    ]
    lines = [line for table in tables for line in ("", *table)]
    overview = _overview(result) if len(cases) > 1 else []
    lines += ["", *overview] if overview else []
    lines += ["", *_legend(result, brief)] if cases else []
    if any(_too_wide(table) for table in tables) and not brief:
        lines.append(f"--brief prints times and ratios alone, in {WIDTH} columns.")
    if _too_wide(overview):
        lines.append("Fewer names behind --baseline make the table of all cases narrower.")
    return "\n".join([*first_lines(result), *lines])


_NORMS = {"layer": "LayerNorm", "rms": "RMSNorm"}
_MIXES = {
    "even": "  adapters {} of {} tokens each",
    "zipf": "  adapters {} by Zipf's law, sequences of {} tokens",
    "none": "  adapters {}, which no token takes",
}


def _legend(result: Result, brief: bool) -> list[str]:
    names = {row.provider for row in result.rows}
    lines = [
        "p20/p50/p80: a fifth, half and four fifths of the calls took at most so long.",
        "time/adapterkern: median time over that of adapterkern's first row: above 1.00x",
        "  adapterkern is faster, below it slower; ~: may be chance, p20 to p80 overlap.",
    ]
    if "limit" in names:
        lines.append("limit: copies of memory that no implementation can do without.")
    if result.on_gpu:
        lines += [
            "cold: L2 overwritten before each call; hot: input just written; graph: per",
            "  call, in a CUDA graph over activations and weights in turn; eager: wall time.",
        ]
    if result.on_gpu and not brief:
        lines += [
            "GB/s: bytes of the floor over time (limit: its own bytes); of copy: time of limit",
            "  over time; of peak: GB/s over the peak bandwidth of the memory.",
            "host: CPU time to launch a call; kernels: nodes of its CUDA graph.",
            "peak: memory beyond the inputs; transient: beyond what stays.",
        ]
    if not brief and any(row.saved_bytes is not None for row in result.rows):
        lines.append("saved: memory that a forward keeps for its backward.")
    return lines


def _too_wide(table: list[str]) -> bool:
    """Whether columns go beyond a terminal's; a long note behind them is no column."""
    return any(len(line) > WIDTH for line in table if "  " in line.strip())


def _render_case(rows: list[Row], result: Result, brief: bool) -> list[str]:
    columns = _columns(rows, result, brief)
    lines = _title(rows, result)
    if any(row.time is not None for row in rows):
        lines += aligned(list(zip(*columns, strict=True)))
    for row in rows:
        if row.status != "ok":
            lines.append(f"  {row.label}: {_STATUS[row.status]}, {row.note}")
        elif row.note:
            lines.append(f"  {row.label}: {row.note}")
    return lines


def _title(rows: list[Row], result: Result) -> list[str]:
    case = rows[0].case
    call = f"{case.mode}  {case.dtype} {case.activation}  tokens {case.tokens}"
    shape = f"hidden {case.hidden_size}  bottleneck {case.bottleneck_size}"
    shape += "" if case.norm == "none" else f"  {_NORMS[case.norm]} in the same pass"
    shape += _MIXES[case.mix].format(case.adapters, case.rows) if case.adapters else ""
    lines = [call, f"  {shape}"] if len(call + shape) + 2 > WIDTH else [f"{call}  {shape}"]
    facts = ", ".join(_facts(rows, result)) if result.on_gpu else ""
    return [*lines, f"  ({facts})"] if facts else lines


def _columns(rows: list[Row], result: Result, brief: bool) -> list[list[str]]:
    """Return the columns of a case's table, each from its head down, without the empty ones."""
    shown = [row for row in rows if row.status == "ok"]
    kinds = list(dict.fromkeys(kind for row in rows for kind in row.timings))
    kinds.sort(key=lambda kind: kind != rows[0].headline)
    columns = []
    for index, kind in enumerate(kinds):
        timings = [row.timings.get(kind) for row in shown]
        unit = time_unit(timing.p50 for timing in timings if timing)
        name = (
            f"{kind} {unit}" if result.on_gpu else unit
        )  # a CPU has one kind, which needs no name
        if index == 0:
            columns.append([f"{name} p20/p50/p80", *(_times(timing, unit) for timing in timings)])
        elif not brief:
            medians = [timing.p50 if timing else None for timing in timings]
            columns.append([name, *(in_unit(median, unit) for median in medians)])
    ours = _ours(rows)
    columns.append(["time/adapterkern", *(_ratio(row, ours) for row in shown)])
    if result.on_gpu and not brief:
        unit = time_unit(row.host_us for row in shown)
        columns += [
            ["GB/s", *(_number(row.gb_per_s, ".0f") for row in shown)],
            ["of copy", *(_number(row.copy_fraction, ".0%") for row in shown)],
            ["of peak", *(_number(row.peak_fraction, ".0%") for row in shown)],
            [f"host {unit}", *(in_unit(row.host_us, unit) for row in shown)],
            ["kernels", *(_number(row.kernels, "d") for row in shown)],
        ]
    memory = ("peak_bytes", "transient_bytes", "saved_bytes") if result.on_gpu else ("saved_bytes",)
    for name in () if brief else memory:
        unit = _unit(getattr(row, name) for row in shown)
        sizes = (getattr(row, name) for row in shown)
        cells = ("-" if size is None else f"{size / _UNITS[unit]:.1f}" for size in sizes)
        columns.append([f"{name.removesuffix('_bytes')} {unit}", *cells])
    names = ["implementation", *(row.label for row in shown)]
    return [names, *(column for column in columns if any(cell != "-" for cell in column[1:]))]


def _overview(result: Result) -> list[str]:
    """Return a table of all cases: the time of our first row, and of the others over it."""
    cases: dict[Any, list[Row]] = {}
    for row in result.rows:
        cases.setdefault(row.case, []).append(row)
    first = {case: ours for case, rows in cases.items() if (ours := _ours(rows))}
    unit = time_unit(ours.time.p50 for ours in first.values() if ours.time)
    names = dict.fromkeys(
        row.label
        for row in result.rows
        if row is not first.get(row.case) and row.provider not in NO_RATIO and row.timed
    )
    table = [["case", f"adapterkern {unit}", *names]]
    for case, ours in first.items():
        ratios = {row.label: _ratio(row, ours) for row in cases[case]}
        time = in_unit(ours.time.p50 if ours.time else None, unit)
        table.append([str(case), time, *(ratios.get(name, "-") for name in names)])
    if len(table) < 2 or not names:
        return []
    return ["all cases: median of adapterkern, and time/adapterkern of the others", *aligned(table)]


def _facts(rows: list[Row], result: Result) -> list[str]:
    """Return what the numbers of a case on a GPU are measured by."""
    facts = []
    case, floor = rows[0].case, rows[0].floor_us
    machine = from_dict(result.header.get("calibration", {})).machine(case.dtype)
    if machine is None or floor is None:
        facts.append("floor -: the copy bandwidth was not measured")
    else:
        unknown = machine.matrix_rate is None
        note = f" without products: no {case.dtype} rate was measured" if unknown else ""
        facts.append(f"floor {floor:.1f} us{note}")
    buffers = next((row.buffer_bytes for row in rows if row.buffer_bytes is not None), None)
    if buffers is not None:
        l2 = result.header.get("l2_bytes")
        warm = ", which stay in L2" if l2 is not None and buffers <= l2 else ""
        facts.append(f"graph over {buffers / 2**20:.1f} MiB{warm}")
    return facts


def _ours(rows: Iterable[Row]) -> Row | None:
    return next((row for row in rows if row.ours and row.timed), None)


def _times(timing: Timing | None, unit: str) -> str:
    if timing is None:
        return "-"
    return "/".join(in_unit(value, unit) for value in (timing.p20, timing.p50, timing.p80))


def _ratio(row: Row, ours: Row | None) -> str:
    """Return the time of a row over ours, which a row without an adapter has none of; behind a ~
    if their ranges from the 20th to the 80th percentile overlap."""
    if ours is None or ours.time is None or row.time is None or row.provider in NO_RATIO:
        return "-"
    overlap = row.time.p80 > ours.time.p20 and ours.time.p80 > row.time.p20
    doubt = "~" if overlap and row is not ours else ""
    return f"{doubt}{row.time.p50 / ours.time.p50:.2f}x"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


# In microseconds, which all times are measured in.
TIME_UNITS = {"s": 1e6, "ms": 1e3, "us": 1.0, "ns": 1e-3}


def time_unit(times: Iterable[float | None]) -> str:
    """Return the largest unit in which the middle one of these times in us is not below 1."""
    known = sorted(time for time in times if time is not None)
    middle = known[len(known) // 2] if known else 1.0
    return next((unit for unit, size in TIME_UNITS.items() if middle >= size), "ns")


def in_unit(time: float | None, unit: str) -> str:
    """Return a time in us as a number of that unit, in three digits or all before its point."""
    if time is None:
        return "-"
    value = time / TIME_UNITS[unit]
    rounded = float(f"{value:.2e}")
    decimals = 2 - math.floor(math.log10(rounded)) if rounded > 0 else 0
    return f"{value:.{max(0, decimals)}f}"


_UNITS = {"KiB": 2**10, "MiB": 2**20}


def _unit(sizes: Iterable[int | None]) -> str:
    """Return the unit of a column: KiB while its largest size is below 10 MiB."""
    most = max((size for size in sizes if size is not None), default=None)
    return "KiB" if most is not None and most < 10 * 2**20 else "MiB"


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Align rows in columns, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  "
        + "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
