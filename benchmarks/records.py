"""rows.jsonl, the material of everything drawn offline: read as a `Result`, and merged.

A line is an object with "record": header (the first), calibration, row, model, host, task or end.
"""

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from adapterkern.bench import results
from adapterkern.bench.environment import folder_name
from adapterkern.bench.results import Result, ResultError, Row
from benchmarks.gpu.output import EVENTS, JUNIT, ROWS, SAMPLES, SUMMARY, TUNED

Entry = dict[str, Any]
_KEPT = (EVENTS, SUMMARY, SAMPLES, JUNIT, TUNED)  # of each run beside the merged rows; not its log


def read(path: Path) -> list[Entry]:
    """Return the records of a file, whose last line may be half of one where the run was killed.

    Raises:
        ResultError: it cannot be read, has no header, or another schema.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ResultError(f"cannot read {path}: {error}") from error
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ResultError(f"{path}, line {number} is not JSON ({error}).") from error
    if not entries:
        raise ResultError(f"{path} is empty: that run ended before it knew its machine.")
    schema = entries[0].get("schema")
    if entries[0].get("record") != "header" or schema != results.SCHEMA:
        raise ResultError(
            f"{path} begins with no header of schema {results.SCHEMA!r} (found {schema!r}).\n"
            "  hint: measure again, or read it with the version of adapterkern that wrote it"
        )
    return entries


def result_of(entries: Sequence[Entry], origin: str) -> Result:
    """Return the records as a result: the last row of each key that has a time. It is finished
    where a report among the runs left nothing out.

    Raises:
        ResultError: a record does not fit its class.
    """
    header = {key: value for key, value in entries[0].items() if key not in ("record", "schema")}
    ends = [entry for entry in entries if entry["record"] == "end"]
    header["finished"] = any(end["stage"] == "report" and end["finished"] for end in ends)
    header["stages"] = [entry["stage"] for entry in entries if entry["record"] == "header"]
    calibrations = [entry for entry in entries if entry["record"] == "calibration"]
    header["calibration"] = calibrations[-1]["values"] if calibrations else {}
    content = {
        "schema": results.SCHEMA,
        "header": header,
        "rows": [entry["content"] for entry in entries if entry["record"] == "row"],
        "models": [entry["content"] for entry in entries if entry["record"] == "model"],
        "host": [entry["content"] for entry in entries if entry["record"] == "host"],
        "log": [entry for entry in entries if entry["record"] == "task"],
    }
    found = results.from_json(json.dumps(content), origin)
    found.rows, found.models = _newest(found.rows), _newest(found.models)
    return found


def load(path: Path) -> Result:
    """Return the result in a rows.jsonl.

    Raises:
        ResultError: the file cannot be read or is not of this schema.
    """
    return result_of(read(path), str(path))


def _newest(rows: Iterable[Any]) -> list[Any]:
    """Return one row a key: the last, but none with a time is given up for one without. Ratios
    that only an earlier row of the case has stay: they too were taken in turn on this machine.
    """
    kept: dict[str, Any] = {}
    for row in rows:
        old = kept.pop(row.key, None)
        if old is not None and old.timed and not row.timed:
            row = old
        elif old is not None and isinstance(row, Row):
            row.ratios = {**old.ratios, **row.ratios}
        kept[row.key] = row
    return list(kept.values())


def merge(folders: Sequence[Path], into: Path) -> tuple[Path, int]:
    """Add runs to <into>/<gpu>/<date>-<commit>/; that folder, and how many runs it holds now.

    rows.jsonl holds the records of all, those that were there first; each run's events, summary,
    clocks and tests come along under its stage's name.

    Raises:
        ResultError: runs of different commits or GPUs, a run without a GPU, of a changed tree, or
            one that is there already; or no such file.
    """
    runs = [(folder, read(folder / ROWS)) for folder in folders]
    first = runs[0][1][0]
    for folder, entries in runs:
        _belongs(folder, entries[0], runs[0][0], first)
    date = str(first["created"])[:10]
    target = into / folder_name(first["device"]) / f"{date}-{first['commit'][:9]}"
    old = read(target / ROWS) if (target / ROWS).exists() else []
    stages = [str(entry["stage"]) for entry in old if entry["record"] == "header"]
    known = {str(entry["created"]) for entry in old if entry["record"] == "header"}
    for folder, entries in runs:
        if entries[0]["created"] in known:
            raise ResultError(f"{folder} is in {target} already, or was named twice.")
        known.add(entries[0]["created"])
    target.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(entry) for entry in (*old, *(e for _, entries in runs for e in entries))]
    part = target / f".{ROWS}.part"
    part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    part.replace(target / ROWS)
    for folder, entries in runs:
        stage = str(entries[0]["stage"])
        prefix = f"{stage}-{stages.count(stage) + 1}" if stage in stages else stage
        stages.append(stage)
        for name in _KEPT:
            if (folder / name).exists():
                shutil.copyfile(folder / name, target / f"{prefix}-{name}")
    return target, len(stages)


def _belongs(folder: Path, header: Entry, other: Path, first: Entry) -> None:
    """Refuse a run that cannot be committed beside the first.

    Raises:
        ResultError: why.
    """
    for key in ("commit", "device"):
        if header[key] != first[key]:
            raise ResultError(
                f"{folder} is of {key} {header[key]}, {other} of {first[key]}; only runs of one "
                "commit on one kind of GPU make one result."
            )
    if header["device_type"] != "cuda":
        raise ResultError(f"{folder} was a dry run: nothing of it was measured on a GPU.")
    if header["dirty"]:
        raise ResultError(f"{folder} was measured on a tree with changes that no commit has.")
