"""One backend against float64 in this process, case by case, as a stream of events.

An event is a dict as `--json` prints it, a line each, so that a process can hand its part over:

- {"event": "backend", "backend", "device", "unavailable": null or the reason, "cases": how many}
- {"event": "begin", "backend", "case"}, so that a hang has a name
- {"event": "case", "backend", "case", "status", "seconds", "note", "rows": [{"tensor", "error",
  "tolerance", "passed", "note", "dtype", "activation"}, ...]}; status: passed, missed, raised,
  refused or lost (the device, or the process); an error or a tolerance that is not finite is null
- {"event": "end", "passed", "comparisons", "missed", "cases"}, once, after all backends; "cases"
  counts those that were compared
"""

import argparse
import fnmatch
import math
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from adapterkern import parity, testing
from adapterkern.backends import get
from adapterkern.grouped.call import OPERATION

Event = dict[str, Any]

DTYPES = {
    spelling: dtype
    for dtype, short in parity.SHORT_NAMES.items()
    for spelling in (short, str(dtype).removeprefix("torch."))
}


def cases_of(
    name: str, device: torch.device, arguments: argparse.Namespace
) -> list[parity.AnyCase]:
    """Return the cases of one backend that --dtype and --case leave; --shard comes after that."""
    backend = get(name)
    dtypes = set(backend.dtypes)
    if arguments.dtype:
        dtypes &= {DTYPES[spelling] for spelling in arguments.dtype}
    small = device.type == "cpu"
    declared = dtypes, backend.activations, arguments.level, small, backend.features
    cases: list[parity.AnyCase] = [*parity.grid(*declared)]
    if OPERATION in backend.operations:
        cases += parity.grouped_cases(*declared)
    if arguments.case is None:
        return cases
    return [
        case
        for case in cases
        if any(fnmatch.fnmatchcase(str(case), pattern) for pattern in arguments.case)
    ]


def shard_of(cases: list[parity.AnyCase], shard: tuple[int, int] | None) -> list[parity.AnyCase]:
    """Return the I-th of `cases`, and each N-th after it, for a shard (I, N)."""
    return cases if shard is None else cases[shard[0] - 1 :: shard[1]]


def events(name: str, device: torch.device, cases: list[parity.AnyCase]) -> Iterator[Event]:
    """Yield the backend's own event, then those of each case; a case that loses the device is
    the last."""
    unavailable = get(name).unavailable_reason()
    yield backend_event(name, device, unavailable, len(cases))
    if unavailable is not None:
        return
    with testing.nan_filled_memory():
        for case in cases:
            yield {"event": "begin", "backend": name, "case": str(case)}
            event = _run_case(case, name, device)
            yield event
            if event["status"] == "lost":
                return


def backend_event(name: str, device: torch.device, unavailable: str | None, cases: int) -> Event:
    """Return the event that a backend begins with."""
    described = device.type
    if device.type == "cuda":
        described = torch.cuda.get_device_name(device)
    elif name == "triton":
        described = "cpu, in Triton's interpreter"
    return {
        "event": "backend",
        "backend": name,
        "device": described,
        "unavailable": unavailable,
        "cases": cases if unavailable is None else 0,
    }


def case_event(
    name: str, case: str, status: str, seconds: float, note: str, rows: list[dict]
) -> Event:
    """Return the event that a case ends with."""
    return {
        "event": "case",
        "backend": name,
        "case": case,
        "status": status,
        "seconds": round(seconds, 2),
        "note": note,
        "rows": rows,
    }


def _run_case(case: parity.AnyCase, name: str, device: torch.device) -> Event:
    started = time.monotonic()
    note, rows = "", []
    try:
        reasons = parity.refusals(case, name, device)
        if reasons:
            status, note = "refused", "; ".join(reasons)
        else:
            with warnings.catch_warnings():  # numpy's, of Inf and NaN in Triton's interpreter
                warnings.filterwarnings("ignore", "invalid value", RuntimeWarning)
                rows = parity.check_case(case, name, device)
            status = "passed" if all(row.passed for row in rows) else "missed"
    except Exception as error:  # whatever a backend raises is its failure, and the others still run
        status, note = "raised", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    lost = testing.lost_device(device)
    if lost is not None:
        status, note = "lost", lost
    if status in ("raised", "lost"):
        rows = [parity.Row(name, case, "y", math.nan, math.nan, note)]
    described = [_described(row) for row in rows]
    return case_event(name, str(case), status, time.monotonic() - started, note, described)


def _described(row: parity.Row) -> dict:
    return {
        "tensor": row.tensor,
        "error": row.error if math.isfinite(row.error) else None,
        "tolerance": row.tolerance if math.isfinite(row.tolerance) else None,
        "passed": row.passed,
        "note": row.note or ("" if math.isfinite(row.error) else "not finite"),
        "dtype": row.case.dtype_class,  # the products'
        "activation": row.case.activation,
    }
