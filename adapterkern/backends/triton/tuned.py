"""Launch configurations found by `adapterkern tune`, in <gpu>.json, and how one is looked up.

A file holds the GPU that it was searched on (its name, and its `Device`: number of SMs, shared
memory, major compute capability) and entries: one problem and the tiles that were fastest for it. A
call takes the tiles of the nearest entry of its own kind of arithmetic, from the file of its own
GPU, else from those of GPUs with the same `Device`. The user's cache folder is asked first, and the
package's own files where that has no entry near; where none is near, or none was searched,
`launch_config` decides. How many slices of H or of tokens a launch takes follows from the tiles,
the problem and the GPU.
"""

import contextlib
import functools
import json
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from adapterkern import _env
from adapterkern.backends.triton import launch_config
from adapterkern.backends.triton.launch_config import (
    Device,
    LaunchConfig,
    Problem,
    RowBlock,
    Split,
    WeightGradient,
    split_plan,
    weights_plan,
)

# The folders are asked in this order. `adapterkern tune` writes to the first, the user's own.
FOLDERS = (_env.CACHE / "tuned", Path(__file__).parent / "tuned")
# It changes with every change of the kernels after which older tiles may no longer fit: files in
# the cache folder outlive the version that wrote them.
SCHEMA = "adapterkern-tuned/3"
FORMS = {"row_block": 1, "split": 2, "weight_gradient": 1}  # form -> number of kernels in an entry
# An entry serves problems whose every size is within this factor of its own: tiles that suit 16
# tokens say nothing about 2048.
NEAR = 2.0


@dataclass(frozen=True)
class Evidence:
    """The times that an entry was chosen by, those of the formula's plan and of the entry in one
    interleaved run, and the GPU that they were measured on.
    """

    before_us: float
    after_us: float
    device: str


@dataclass(frozen=True)
class Entry:
    """The fastest tiles for one problem.

    kernels: one configuration, or for the split form the one into the bottleneck and the one out
    of it; programs_per_sm: how many programs the slices of H or of tokens aim at, of which the
    second kernel gets twice as many; evidence: what it was chosen by, which comparisons ignore.
    """

    problem: Problem
    form: str
    kernels: tuple[LaunchConfig, ...]
    programs_per_sm: int = 2
    evidence: Evidence | None = field(default=None, compare=False)

    @property
    def kind(self) -> str:
        """The plan's purpose: "tokens" (y, dz, dx) or "weights" (both weight gradients)."""
        return "weights" if self.form == "weight_gradient" else "tokens"


def nearest(
    entries: Sequence[Entry], kind: str, problem: Problem, limit: float = NEAR
) -> Entry | None:
    """Return the entry of this kind and arithmetic with the nearest sizes, None if none is near.

    The distance is the largest of the factors between the three sizes; the sum of the logarithms
    breaks ties, then the entries' order. A row block must hold all of R, so one with a narrower
    tile is no candidate.
    """
    best: tuple[tuple[float, float], Entry] | None = None
    for entry in entries:
        if entry.kind != kind or entry.problem[3:] != problem[3:]:
            continue
        if entry.form == "row_block" and entry.kernels[0].block_r < problem.bottleneck_size:
            continue
        sizes = zip(entry.problem[:3], problem[:3], strict=True)
        factors = [abs(math.log2(a / b)) for a, b in sizes]
        distance = max(factors), sum(factors)
        if distance[0] <= math.log2(limit) and (best is None or distance < best[0]):
            best = distance, entry
    return None if best is None else best[1]


def plan(entry: Entry, problem: Problem, device: Device) -> RowBlock | Split | WeightGradient:
    """Return the launch of `problem` with an entry's tiles."""
    first = entry.kernels[0]
    if entry.form == "row_block":
        return RowBlock(first)
    if entry.form == "split":
        return split_plan(problem, device, first, entry.kernels[1], entry.programs_per_sm)
    return weights_plan(problem, device, first, entry.programs_per_sm)


def token_plan(problem: Problem, device: Device) -> RowBlock | Split:
    """Plan as `launch_config.token_plan` does, but with the nearest tuned entry's tiles if any."""
    found = _find("tokens", problem, device)
    if found is None:
        return launch_config.token_plan(problem, device)
    return found


def weight_gradient_plan(problem: Problem, device: Device) -> WeightGradient:
    """Plan as `launch_config.weight_gradient_plan` does, but with tuned tiles if there are any."""
    found = _find("weights", problem, device)
    if found is None:
        return launch_config.weight_gradient_plan(problem, device)
    return found


_forced: dict[str, Entry] = {}
generation = 0  # rises with every change of the plans, for who keeps what followed from them


@contextlib.contextmanager
def forced(entry: Entry) -> Iterator[None]:
    """Give every launch of the entry's kind its tiles within the block, for the search."""
    before = dict(_forced)
    _forced[entry.kind] = entry
    _plans_changed()
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)
        _plans_changed()


def _plans_changed() -> None:
    global generation
    generation += 1


def _find(kind: str, problem: Problem, device: Device) -> Any:
    if kind in _forced:
        return plan(_forced[kind], problem, device)
    return _look_up(kind, problem, device)


@functools.lru_cache(maxsize=4096)
def _look_up(kind: str, problem: Problem, device: Device) -> Any:
    for entries in tables_for(device):
        entry = nearest(entries, kind, problem)
        if entry is not None:
            return plan(entry, problem, device)
    return None


@functools.cache
def tables_for(device: Device) -> list[list[Entry]]:
    """Return the entries that serve a GPU of these properties, a list for each folder, in order.
    A file that cannot be read is left out as a whole, with a warning.
    """
    files, problems = read_all()
    for problem in problems.values():
        warnings.warn(f"tuned launch configurations left out: {problem}", stacklevel=2)
    chosen = serving(files, device)
    return [
        [entry for path in chosen if path.parent == folder for entry in files[path].entries]
        for folder in FOLDERS
    ]


def read_all() -> tuple[dict[Path, "TunedFile"], dict[Path, str]]:
    """Return the files in the order in which they are asked, and why others cannot be read."""
    files, problems = {}, {}
    for folder in FOLDERS:
        names: list[str] = []
        # A folder that is missing, or closed to this user, holds nothing that they searched.
        with contextlib.suppress(OSError):
            names = sorted(os.listdir(folder))
        for path in (folder / name for name in names if name.endswith(".json")):
            try:
                files[path] = load(path)
            except (OSError, ValueError) as error:
                problems[path] = str(error)
    return files, problems


def serving(files: dict[Path, "TunedFile"], device: Device) -> list[Path]:
    """Return the files that were measured on this machine's GPUs of these properties, by name;
    where there is none, those of every GPU with these properties.
    """
    fitting = [path for path, file in files.items() if file.device == device]
    names = present(device)
    return [path for path in fitting if files[path].gpu in names] or fitting


def present(device: Device) -> set[str]:
    """Return the names of this machine's GPUs that have these properties."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        torch.cuda.get_device_properties(index).name
        for index in range(count)
        if device_of(index) == device
    }


def device_of(device: int | torch.device) -> Device:
    """Return the launch properties of a GPU."""
    properties: Any = torch.cuda.get_device_properties(device)
    memory = properties.shared_memory_per_block_optin
    sizes = properties.multi_processor_count, memory, properties.major
    l2 = getattr(properties, "L2_cache_size", 0)  # 0 where the driver does not tell it
    return Device(*sizes, l2) if l2 else Device(*sizes)


@dataclass(frozen=True)
class HeldOut:
    """A shape that was not searched, timed with the formula's plan and with a class of entries:
    those of one kind and arithmetic. problem: why these entries cannot run it, "" if they can.
    """

    kind: str
    ieee: bool
    wide: bool
    case: str
    before_us: float
    after_us: float
    problem: str = ""


class TunedFile(NamedTuple):
    """A file's content. held_out: the outcome on shapes that were not searched, for the record."""

    gpu: str
    device: Device
    entries: list[Entry]
    held_out: tuple[HeldOut, ...] = ()


def load(path: Path) -> TunedFile:
    """Return the GPU and the entries of a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is of another schema or does not fit it.
    """
    cure = f"\n  hint: delete {path}; `adapterkern tune` writes a new one"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}).{cure}") from error
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path} has schema {schema!r}, this version reads {SCHEMA!r}.{cure}")
    try:
        gpu = str(data["gpu"])
        device = Device(**data["device"])
        entries = [
            Entry(
                Problem(**entry["problem"]),
                entry["form"],
                tuple(LaunchConfig(**kernel) for kernel in entry["kernels"]),
                entry["programs_per_sm"],
                # Files of earlier versions hold no evidence.
                Evidence(**entry["evidence"]) if entry.get("evidence") else None,
            )
            for entry in data["entries"]
        ]
        held_out = tuple(HeldOut(**row) for row in data.get("held_out", ()))
        for entry in entries:
            _check(entry)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not fit {SCHEMA}: {error!r}{cure}") from error
    return TunedFile(gpu, device, entries, held_out)


def _check(entry: Entry) -> None:
    """Raise ValueError for what no search writes, which would stop a call or divide by zero."""
    if entry.form not in FORMS:
        raise ValueError(f"unknown form {entry.form!r}; known: {', '.join(FORMS)}")
    if len(entry.kernels) != FORMS[entry.form]:
        raise ValueError(f"{len(entry.kernels)} kernels for the form {entry.form!r}")
    tiles = [size for kernel in entry.kernels for size in vars(kernel).values()]
    for size in (*entry.problem[:3], *tiles, entry.programs_per_sm):
        if type(size) is not int or size < 1:
            raise ValueError(f"a size of {size!r}, which must be an integer of at least 1")
    for kernel in entry.kernels:
        for name, size in vars(kernel).items():
            if name.startswith(("block_", "num_warps")) and size & (size - 1):
                raise ValueError(f"{name} of {size}, which must be a power of two")


def save(
    path: Path,
    gpu: str,
    device: Device,
    entries: Sequence[Entry],
    held_out: Sequence[HeldOut] = (),
) -> None:
    """Write a file that `load` reads, sorted, so that a new search shows as a small difference. It
    is replaced in one step: no reader and no interruption meets half of it.
    """
    ordered = sorted(entries, key=lambda entry: (entry.kind, *entry.problem))
    data = {
        "schema": SCHEMA,
        "gpu": gpu,
        "device": vars(device),
        "entries": [
            {
                "problem": entry.problem._asdict(),
                "form": entry.form,
                "kernels": [vars(kernel) for kernel in entry.kernels],
                "programs_per_sm": entry.programs_per_sm,
                "evidence": entry.evidence and vars(entry.evidence),
            }
            for entry in ordered
        ],
        "held_out": [vars(row) for row in held_out],
    }
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    clear_caches()


def clear_caches() -> None:
    """Forget what was read, after a file changed."""
    tables_for.cache_clear()
    _look_up.cache_clear()
    _plans_changed()
