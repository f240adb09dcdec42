"""Results as text: a header of facts, then a table a case."""

from collections.abc import Iterable, Sequence

from adapterkern.bench.calibration import from_dict
from adapterkern.bench.results import Result, Row, Timing

NO_GPU = (
    "no GPU here: the PyTorch reference against plain layers, on the CPU. These times say nothing "
    "about the kernels."
)
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
    lines = [] if result.on_gpu else [NO_GPU]
    software = ", ".join(
        f"{name} {versions[name]}"
        for name in ("adapterkern", "torch", "triton")
        if versions.get(name)
    )
    commit = header.get("commit")
    if commit:
        software += f", commit {commit[:9]}{' with changes' if header.get('dirty') else ''}"
    lines.append(f"{result.device}: {software}")
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


def render(result: Result) -> str:
    """Return the whole result, one table a case."""
    lines = first_lines(result)
    cases = list(dict.fromkeys(row.case for row in result.rows))
    for case in cases:
        rows = [row for row in result.rows if row.case == case]
        lines += ["", *_render_case(rows, result)]
    if result.on_gpu:
        lines += ["", *_LEGEND]
    return "\n".join(lines)


_NORMS = {"layer": "LayerNorm", "rms": "RMSNorm"}
_MIXES = {
    "even": "  adapters {} of {} tokens each",
    "zipf": "  adapters {} by Zipf's law, sequences of {} tokens",
    "none": "  adapters {}, which no token takes",
}
_LEGEND = (
    "times in us; cold: L2 overwritten before each call; hot: input just written; graph: per call,",
    "in a CUDA graph over activations and weights in turn; eager: wall time. GB/s: bytes of the",
    "floor over time (limit: its own bytes); of copy: time of limit over time; of peak: GB/s over",
    "the peak bandwidth of the memory. against: its time over that of our first row. peak: memory",
    "beyond the inputs; transient: beyond what stays; saved: kept for the backward.",
)


def _render_case(rows: list[Row], result: Result) -> list[str]:
    case, on_gpu = rows[0].case, result.on_gpu
    title = (
        f"{case.mode}  {case.dtype} {case.activation}  tokens {case.tokens}  "
        f"hidden {case.hidden_size}  bottleneck {case.bottleneck_size}"
    )
    title += "" if case.norm == "none" else f"  {_NORMS[case.norm]} in the same pass"
    title += _MIXES[case.mix].format(case.adapters, case.rows) if case.adapters else ""
    facts = _facts(rows, result) if on_gpu else []
    title += f"  ({', '.join(facts)})" if facts else ""
    kinds = list(dict.fromkeys(kind for row in rows for kind in row.timings))
    kinds.sort(key=lambda kind: kind != rows[0].headline)
    columns = [
        "provider",
        *(f"{kind} us p20/p50/p80" if i == 0 else f"{kind} us" for i, kind in enumerate(kinds)),
    ]
    if on_gpu:
        columns += ["against", "GB/s", "of copy", "of peak", "host us", "kernels"]
    memory = ("peak_bytes", "transient_bytes", "saved_bytes") if on_gpu else ("saved_bytes",)
    units = {name: _unit(getattr(row, name) for row in rows) for name in memory}
    columns += [f"{name.removesuffix('_bytes')} {unit}" for name, unit in units.items()]
    table = [columns]
    ours = next((row for row in rows if row.ours and row.time is not None), None)
    for row in rows:
        if row.status != "ok":
            continue
        cells = [row.provider]
        for index, kind in enumerate(kinds):
            timing = row.timings.get(kind)
            cells.append(_times(timing) if index == 0 else _number(timing.p50 if timing else None))
        if on_gpu:
            cells += [
                _against(row, ours),
                _number(row.gb_per_s, ".0f"),
                _number(row.copy_fraction, ".0%"),
                _number(row.peak_fraction, ".0%"),
                _number(row.host_us),
                _number(row.kernels, "d"),
            ]
        sizes = ((getattr(row, name), _UNITS[unit]) for name, unit in units.items())
        cells += ["-" if size is None else f"{size / by:.1f}" for size, by in sizes]
        table.append(cells)
    lines = [title, *aligned(table)] if len(table) > 1 else [title]
    for row in rows:
        if row.status != "ok":
            lines.append(f"  {row.provider}: {_STATUS[row.status]}, {row.note}")
        elif row.note:
            lines.append(f"  {row.provider}: {row.note}")
    return lines


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


def _times(timing: Timing | None) -> str:
    if timing is None:
        return "-"
    return "/".join(_number(value) for value in (timing.p20, timing.p50, timing.p80))


def _against(row: Row, ours: Row | None) -> str:
    if ours is None or row.provider not in ours.ratios:
        return "-"
    return f"{ours.ratios[row.provider]:.2f}x"


def _number(value: float | None, form: str = ".1f") -> str:
    return "-" if value is None else format(value, form)


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
