"""`adapterkern check`: every backend that can run here against float64, forward and gradients.

Runs the cases of `adapterkern.parity`. Where there is no GPU, the Triton kernels run in Triton's
CPU interpreter, in a process of their own: the interpreter is chosen when kernels are defined.
"""

import argparse
import contextlib
import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from typing import Any

import torch

from adapterkern import __version__, _env, parity, testing
from adapterkern.backends import NAMES, get
from adapterkern.spec import TENSOR_NAMES

DESCRIPTION = """\
Compares y and the gradients of x, residual, skip, both weights, both biases and the scaling with a
computation in float64, for every backend that can run on this machine, over dtypes, activations,
ragged sizes and all options of a call. Without a GPU the Triton kernels run in Triton's CPU
interpreter.

The error is rms(out - float64) / rms(float64). The tolerance is twice (gradients: three times) the
error that plain PyTorch operations make in the same dtype on the same device, and at least one
rounding of the output. The table shows, per dtype of the products and tensor, the case that came
closest to its tolerance.
"""

EPILOG = """\
examples:
  adapterkern check                        about half a minute on two CPU cores
  adapterkern check --quick                every dtype and activation, at one size
  adapterkern check --backend triton --dtype bf16 --full
  adapterkern check --json | python -m json.tool

exit codes:
  0  every comparison is within its tolerance
  1  a miss, a backend that raised, or a backend named with --backend that cannot run here
  2  wrong usage
"""

_DTYPES = {
    spelling: dtype
    for dtype, short in parity.SHORT_NAMES.items()
    for spelling in (short, str(dtype).removeprefix("torch."))
}

_ORDER = ("y", "dx", *(f"d_{name}" for name in TENSOR_NAMES[1:]), "-")  # of the table's rows
_MOST_MISSES = 20  # listed one by one

# A report is made of dicts as --json prints them, so that the interpreter's process can hand its
# part over: {name, device, unavailable, seconds, refused: {case: reasons}, rows: [{case, ...}]}.
Report = dict[str, Any]


def add_parser(subparsers) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "check",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--backend", action="append", choices=NAMES, help="only this one (may be repeated)"
    )
    level = parser.add_mutually_exclusive_group()
    level.add_argument(
        "--quick", action="store_const", const="quick", dest="level", help="every activation once"
    )
    level.add_argument(
        "--full",
        action="store_const",
        const="full",
        dest="level",
        help="every activation at every size, every option in every dtype (minutes)",
    )
    parser.add_argument(
        "--dtype",
        action="append",
        choices=_DTYPES,
        metavar="DTYPE",
        help=f"only this one (may be repeated): {', '.join(parity.SHORT_NAMES.values())}",
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    parser.set_defaults(run=run, level="default")


def run(arguments: argparse.Namespace) -> int:
    """Check, print, and return the exit code."""
    try:
        device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        return _usage_error(f"unknown device {arguments.device!r}; use cpu, cuda or cuda:N.")
    if device.type not in ("cpu", "cuda"):
        return _usage_error(f"--device {device} is not supported; use cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        there = ", ".join(f"cuda:{index}" for index in range(torch.cuda.device_count()))
        return _usage_error(
            f"--device {device}: no such CUDA device here (has: {there or 'none'})."
        )
    reports = [_report(name, device, arguments) for name in arguments.backend or NAMES]
    passed = all(_passed(report, named=bool(arguments.backend)) for report in reports)
    if arguments.json:
        versions = {"adapterkern": __version__, "torch": torch.__version__}
        header = {"passed": passed, "level": arguments.level, **versions}
        print(json.dumps({**header, "backends": reports}, indent=2))
    else:
        print(_render(reports, passed))
    return 0 if passed else 1


def _usage_error(message: str) -> int:
    print(f"adapterkern check: error: {message}", file=sys.stderr)
    return 2


def _passed(report: Report, named: bool) -> bool:
    if report["unavailable"] is not None:
        return not named
    return all(row["passed"] for row in report["rows"]) and bool(report["rows"] or not named)


def _report(name: str, device: torch.device, arguments: argparse.Namespace) -> Report:
    """What one backend did: here, in the interpreter's process, or the reason for neither."""
    if name == "triton" and device.type == "cpu" and importlib.util.find_spec("triton"):
        if not _env.TRITON_INTERPRET:
            return _in_interpreter(arguments)
        testing.enable_triton_interpreter()
    report = _empty_report(name, device)
    report["unavailable"] = get(name).unavailable_reason()
    if report["unavailable"] is None:
        started = time.monotonic()
        _compare(report, device, arguments)
        report["seconds"] = round(time.monotonic() - started, 1)
    return report


def _empty_report(name: str, device: torch.device) -> Report:
    return {
        "name": name,
        "device": _device_name(name, device),
        "unavailable": None,
        "seconds": 0.0,
        "refused": {},
        "rows": [],
    }


def _device_name(name: str, device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "cpu, in Triton's interpreter" if name == "triton" else device.type


def _compare(report: Report, device: torch.device, arguments: argparse.Namespace) -> None:
    backend = get(report["name"])
    dtypes = set(backend.dtypes)
    if arguments.dtype:
        dtypes &= {_DTYPES[name] for name in arguments.dtype}
    small = device.type == "cpu"
    cases = parity.grid(dtypes, backend.activations, arguments.level, small)
    with _Progress(report["name"], len(cases)) as progress, testing.nan_filled_memory():
        for case in cases:
            progress.advance()
            reasons = parity.refusals(case, report["name"], device)
            if reasons:
                report["refused"][str(case)] = reasons
                continue
            report["rows"] += _compare_case(case, report["name"], device)


def _compare_case(case: parity.Case, name: str, device: torch.device) -> list[dict]:
    try:
        rows = parity.check_case(case, name, device)
    except Exception as error:  # whatever a backend raises is its failure, and the others still run
        note = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        rows = [parity.Row(name, case, "y", math.nan, math.nan, note)]
    return [
        {
            "case": str(case),
            "dtype": parity.SHORT_NAMES[case.autocast or case.dtype],  # of the products
            "activation": case.activation,
            "tensor": row.tensor,
            "error": row.error if math.isfinite(row.error) else None,
            "tolerance": row.tolerance if math.isfinite(row.tolerance) else None,
            "passed": row.passed,
            "note": row.note or ("" if math.isfinite(row.error) else "not finite"),
        }
        for row in rows
    ]


def _in_interpreter(arguments: argparse.Namespace) -> Report:
    """The Triton report of a process with TRITON_INTERPRET=1."""
    command = [sys.executable, "-m", "adapterkern", "check", "--json"]
    command += ["--backend", "triton", "--device", "cpu"]
    command += [f"--{arguments.level}"] if arguments.level != "default" else []
    for dtype in arguments.dtype or []:
        command += ["--dtype", dtype]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    process = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    with contextlib.suppress(json.JSONDecodeError):
        return json.loads(process.stdout)["backends"][0]
    row = {"case": "no case", "dtype": "-", "activation": "-", "tensor": "-", "passed": False}
    note = f"the process ended with code {process.returncode}, see above"
    return {
        **_empty_report("triton", torch.device("cpu")),
        "rows": [{**row, "error": None, "tolerance": None, "note": note}],
    }


class _Progress:
    """A counter on stderr while cases run: rewritten in place on a terminal, else one line."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total, self.done = name, total, 0
        self.live = sys.stderr.isatty()

    def __enter__(self) -> "_Progress":
        if not self.live:
            print(f"checking {self.name}: {self.total} cases", file=sys.stderr)
        return self

    def advance(self) -> None:
        self.done += 1
        if self.live:
            print(f"\rchecking {self.name}: {self.done}/{self.total}", end="", file=sys.stderr)
            sys.stderr.flush()

    def __exit__(self, *_exc) -> None:
        if self.live:
            print("\r\033[K", end="", file=sys.stderr)


def _render(reports: list[Report], passed: bool) -> str:
    lines = [
        f"adapterkern {__version__}, torch {torch.__version__}",
        "error: rms relative to float64; tolerance: twice (gradients: three times) the error of",
        "plain PyTorch in the same dtype, at least one rounding",
        "",
    ]
    for report in reports:
        lines += [*_render_report(report), ""]
    rows = [row for report in reports for row in report["rows"]]
    missed = sum(not row["passed"] for row in rows)
    ran = [report["name"] for report in reports if report["rows"]]
    verdict = "passed" if passed else "FAILED"
    return "\n".join(
        [
            *lines,
            f"{verdict}: {len(rows)} comparisons on {', '.join(ran) or 'nothing'}, {missed} missed",
        ]
    )


def _render_report(report: Report) -> list[str]:
    if report["unavailable"] is not None:
        return [f"{report['name']}: not run, {report['unavailable']}"]
    rows = report["rows"]
    cases = len({row["case"] for row in rows})
    activations = len({row["activation"] for row in rows})
    lines = [
        f"{report['name']} on {report['device']}: {cases} cases, {activations} activations, "
        f"{len(rows)} comparisons ({report['seconds']:.1f} s)"
    ]
    worst: dict[tuple[str, str], dict] = {}
    for row in rows:
        key = row["dtype"], row["tensor"].split()[0]
        if key not in worst or _share(row) > _share(worst[key]):
            worst[key] = row
    table: list[tuple[str, ...]] = [
        ("dtype", "tensor", "error", "tolerance", "used", "closest case")
    ]
    for dtype, tensor in sorted(worst, key=lambda key: (key[0], _ORDER.index(key[1]))):
        row = worst[dtype, tensor]
        table.append((dtype, tensor, *_numbers(row), row["case"]))
    lines += _aligned(table)
    missed = [row for row in rows if not row["passed"]]
    for row in missed[:_MOST_MISSES]:
        error, tolerance, _ = _numbers(row)
        note = f" ({row['note']})" if row["note"] else ""
        lines.append(f"  MISSED {row['case']} {row['tensor']}: {error} of {tolerance}{note}")
    if len(missed) > _MOST_MISSES:
        lines.append(f"  and {len(missed) - _MOST_MISSES} more misses; --json has all of them")
    for reason, count in _refusal_counts(report).items():
        lines.append(f"  not run: {count} cases, {reason}")
    return lines


def _share(row: dict) -> float:
    """The part of its tolerance that an error uses up."""
    if row["error"] is None or row["tolerance"] is None:
        return math.inf
    return row["error"] / row["tolerance"] if row["tolerance"] else math.inf * bool(row["error"])


def _numbers(row: dict) -> tuple[str, str, str]:
    error, tolerance = (
        "-" if row[key] is None else f"{row[key]:.1e}" for key in ("error", "tolerance")
    )
    share = _share(row)
    used = f"{share:.0%}" if share < 10 else f"{share:.0f}x" if math.isfinite(share) else "-"
    return error, tolerance, used


def _refusal_counts(report: Report) -> dict[str, int]:
    counts: dict[str, int] = {}
    for reasons in report["refused"].values():
        counts["; ".join(reasons)] = counts.get("; ".join(reasons), 0) + 1
    return counts


def _aligned(table: list[tuple[str, ...]]) -> list[str]:
    """Rows in columns, numbers (the third to the fifth) to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  "
        + "  ".join(
            cell.rjust(width) if 2 <= index <= 4 else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
