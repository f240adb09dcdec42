"""Results as text: a header of facts, then a table a case."""

from collections.abc import Sequence

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
    """What must be known to read the rows. Without a GPU the first line says so."""
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
        if measured.matrix_rate is not None:
            facts.append(f"bf16 products {measured.matrix_rate / 1e12:.0f} TFLOP/s")
        if measured.graph_kernel is not None:
            facts.append(f"smallest kernel in a graph {measured.graph_kernel * 1e6:.1f} us")
        lines.append("measured in this run: " + ", ".join(facts))
    if measured.steady is False:
        lines.append("UNSTEADY: the copy bandwidth moved by more than 3 % during the run")
    return lines


def render(result: Result) -> str:
    """The whole result, one table a case."""
    lines = first_lines(result)
    cases = list(dict.fromkeys(row.case for row in result.rows))
    for case in cases:
        rows = [row for row in result.rows if row.case == case]
        lines += ["", *_render_case(rows, result.on_gpu)]
    if result.on_gpu:
        lines += ["", *_LEGEND]
    return "\n".join(lines)


_LEGEND = (
    "times in us; cold: L2 overwritten before each call; hot: input just written; graph: per call,",
    "in a CUDA graph over distinct buffers; eager: wall time. GB/s: bytes of the floor over time.",
    "of floor: least bytes at this run's copy bandwidth, over time. against: its time over that of",
    "our first row. MiB: peak beyond the inputs, transient beyond what stays, saved for backward.",
)


def _render_case(rows: list[Row], on_gpu: bool) -> list[str]:
    case = rows[0].case
    title = (
        f"{case.mode}  {case.dtype} {case.activation}  tokens {case.tokens}  "
        f"hidden {case.hidden_size}  bottleneck {case.bottleneck_size}"
    )
    if on_gpu and rows[0].floor_us is not None:
        title += f"  (floor {rows[0].floor_us:.1f} us)"
    kinds = list(dict.fromkeys(kind for row in rows for kind in row.timings))
    kinds.sort(key=lambda kind: kind != rows[0].headline)
    columns = [
        "provider",
        *(f"{kind} us p20/p50/p80" if i == 0 else f"{kind} us" for i, kind in enumerate(kinds)),
    ]
    if on_gpu:
        columns += ["against", "GB/s", "of floor", "host us", "kernels", "peak", "transient"]
    columns += ["saved MiB"]
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
                _number(row.floor_fraction, ".0%"),
                _number(row.host_us),
                _number(row.kernels, "d"),
                _mebibytes(row.peak_bytes),
                _mebibytes(row.transient_bytes),
            ]
        table.append([*cells, _mebibytes(row.saved_bytes)])
    lines = [title, *aligned(table)] if len(table) > 1 else [title]
    for row in rows:
        if row.status != "ok":
            lines.append(f"  {row.provider}: {_STATUS[row.status]}, {row.note}")
        elif row.note:
            lines.append(f"  {row.provider}: {row.note}")
    return lines


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


def _mebibytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.1f}"


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Rows in columns, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  "
        + "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
