"""Offline search of launch configurations: candidates, and the fastest that gives the right result.

The search times a forward for the token plan and a whole backward for the weight gradients' plan,
interleaved with the configuration in force, which stays unless a candidate beats it by more than
GAIN.
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from adapterkern.backends.triton import launch_config, tuned
from adapterkern.backends.triton.launch_config import (
    Device,
    LaunchConfig,
    Problem,
    RowBlock,
    Split,
)
from adapterkern.backends.triton.tuned import Entry
from adapterkern.bench.cases import BenchCase
from adapterkern.bench.gate import Gate
from adapterkern.bench.measure import headline, outputs_of, prepared_call
from adapterkern.bench.providers import PROVIDERS
from adapterkern.bench.timing import CudaTimer, Subject

GAIN = 0.02  # what a run's noise can give by itself
IN_FORCE = "in force"
# Both in order of worth: what most models have, and training and decode before what lies between.
SHAPES = ((1024, 64), (768, 48), (4096, 64), (768, 64), (1024, 128), (2048, 64), (4096, 256))
TOKENS = (16384, 16, 4096, 1024, 65536, 128)
# Of plan, and the mode that it is timed in.
KINDS = (("tokens", "forward"), ("weights", "backward"))


@dataclass(frozen=True)
class Found:
    """The outcome for one problem; before_us and after_us are of the same interleaved run."""

    entry: Entry
    before_us: float
    after_us: float
    changed: bool
    tried: int

    def __str__(self) -> str:
        problem = self.entry.problem
        name = (
            f"{self.entry.kind} T{problem.num_tokens}-H{problem.hidden_size}"
            f"-R{problem.bottleneck_size}"
        )
        if not self.changed:
            return f"{name}: {self.before_us:.1f} us, kept ({self.tried} tried)"
        first = self.entry.kernels[0]
        tiles = f"{first.block_t}x{first.block_h}x{first.block_r}"
        return (
            f"{name}: {self.before_us:.1f} us to {self.after_us:.1f} us, "
            f"{self.entry.form} {tiles}, {first.num_warps} warps, {first.num_stages} stages "
            f"({self.tried} tried)"
        )


@dataclass(frozen=True)
class Search:
    """One thing to search: a plan of this kind, timed on this case."""

    kind: str
    case: BenchCase
    problem: Problem


def searches(
    shapes: Iterable[tuple[int, int]],
    tokens: Iterable[int],
    dtypes: Iterable[str],
    ieee: bool,
    done: Iterable[Entry] = (),
) -> list[Search]:
    """What is to be searched, in the given order with the number of tokens slowest, without what
    `done` has an entry for.

    Raises:
        ValueError: a size below 1 or an unknown dtype.
    """
    known = {(entry.kind, entry.problem) for entry in done}
    found = []
    grid = itertools.product(tokens, dtypes, shapes, KINDS)
    for count, dtype, (hidden, bottleneck), (kind, mode) in grid:
        case = BenchCase(hidden, bottleneck, count, dtype, mode=mode)
        problem = problem_of(case, ieee)
        if (kind, problem) not in known:
            found.append(Search(kind, case, problem))
    return list(dict.fromkeys(found))


def current(kind: str, problem: Problem, device: Device) -> Entry:
    """The plan in force as an entry."""
    if kind == "weights":
        weights = tuned.weight_gradient_plan(problem, device)
        return Entry(problem, "weight_gradient", (weights.kernel,))
    tokens = tuned.token_plan(problem, device)
    if isinstance(tokens, RowBlock):
        return Entry(problem, "row_block", (tokens.kernel,))
    return Entry(problem, "split", (tokens.narrow, tokens.widen))


def candidates(kind: str, problem: Problem, device: Device) -> list[Entry]:
    """What is tried beside the plan in force: its neighbours in each direction, and the other form.

    Tiles that need more shared memory than a block may use are left out; those that do not compile
    for another reason drop out when they are tried.
    """
    base = current(kind, problem, device)
    entries = list(_neighbours(base))
    if kind == "tokens":
        other = _other_form(base, problem, device)
        entries += [] if other is None else [other, *_neighbours(other)]
    fitting = [
        entry
        for entry in dict.fromkeys(entries)
        if entry != base and all(_fits(kernel, problem, device) for kernel in entry.kernels)
    ]
    return [entry for entry in fitting if _holds(entry, problem)]


def _neighbours(entry: Entry) -> Iterable[Entry]:
    """One or two properties of the first kernel changed at a time, and the number of slices."""
    first, rest = entry.kernels[0], entry.kernels[1:]
    steps: list[dict[str, int]] = [
        *({"block_t": size} for size in (16, 32, 64, 128)),
        *({"block_h": size} for size in (32, 64, 128)),
        *({"num_warps": count, "num_stages": stages} for count in (4, 8) for stages in (2, 3, 4)),
    ]
    pairs = [{**a, **b} for a, b in itertools.combinations(steps, 2) if not a.keys() & b.keys()]
    for change in (*steps, *pairs):
        yield replace(entry, kernels=(replace(first, **change), *rest))
    for second in rest:
        for change in steps:
            yield replace(entry, kernels=(first, replace(second, **change)))
    if entry.form != "row_block":
        for programs in (1, 2, 4):
            yield replace(entry, programs_per_sm=programs)


def _other_form(entry: Entry, problem: Problem, device: Device) -> Entry | None:
    """A split in place of a row block and the other way round, None where R is too wide."""
    if entry.form == "row_block":
        few = launch_config.token_plan(problem._replace(num_tokens=1024), device)
        if isinstance(few, Split):
            return Entry(problem, "split", (few.narrow, few.widen))
        return None
    many = launch_config.token_plan(problem._replace(num_tokens=1 << 24), device)
    return Entry(problem, "row_block", (many.kernel,)) if isinstance(many, RowBlock) else None


def _fits(kernel: LaunchConfig, problem: Problem, device: Device) -> bool:
    """Whether the pipelined tiles fit in shared memory: an estimate from below."""
    element = 4 if problem.wide or problem.ieee else 2
    tile = (kernel.block_t + kernel.block_r) * kernel.block_h * element
    return tile * (kernel.num_stages - 1) <= device.shared_memory


def _holds(entry: Entry, problem: Problem) -> bool:
    """Whether a row block holds all of R, and no tile is far larger than the problem."""
    first = entry.kernels[0]
    if entry.form == "row_block" and first.block_r < problem.bottleneck_size:
        return False
    return entry.form == "weight_gradient" or first.block_t <= max(16, 2 * problem.num_tokens)


def search(
    case: BenchCase,
    problem: Problem,
    device: Device,
    kind: str,
    timer: CudaTimer,
    seconds: float = 0.2,
    progress: Callable[[str], Any] = lambda _text: None,
    limit: int | None = None,
) -> Found:
    """The fastest entry of this kind for a case, that of now if none is faster by GAIN.

    Each candidate is first run once and compared with float64; the eight that a short timing finds
    fastest are then timed against the plan in force.
    """
    base = current(kind, problem, device)
    tried = candidates(kind, problem, device)[:limit]
    with timer.session():
        inputs = case.draw(timer.device)
        provider = PROVIDERS["triton"]
        built = provider.build(case, inputs)
        gate = Gate(case, inputs)
        right: dict[str, tuple[Entry, Subject]] = {}
        for number, entry in enumerate([base, *tried]):
            progress(f"{case} {kind}: {number}/{len(tried)}")
            try:
                with tuned.forced(entry):
                    outputs = outputs_of(built, case, inputs)
                    verdict = gate.judge(outputs, built.activation, tuple(built.parameters))
                    call = _with_entry(prepared_call(built, case, inputs.x, inputs.dy), entry)
            except Exception:  # a tile that does not compile or fit is no candidate
                if entry is base:
                    raise
                continue
            if verdict.passed:
                right[IN_FORCE if entry is base else str(number)] = entry, Subject([call])
        if IN_FORCE not in right:
            raise RuntimeError(f"the configuration in force gives a wrong result on {case}.")
        how = headline(case, timer.device)
        subjects = {name: subject for name, (_, subject) in right.items()}
        short = timer.measure(how, subjects, 0.0)
        finalists = sorted(short, key=lambda name: short[name].p50)[:8]
        final = {name: subjects[name] for name in dict.fromkeys([IN_FORCE, *finalists])}
        times = timer.measure(how, final, seconds)
    before = times[IN_FORCE].p50
    best = min(times, key=lambda name: times[name].p50)
    changed = times[best].p50 < before * (1 - GAIN)
    chosen = best if changed else IN_FORCE
    return Found(right[chosen][0], before, times[chosen].p50, changed, len(tried))


def _with_entry(call: Callable[[], Any], entry: Entry) -> Callable[[], Any]:
    def forced_call() -> Any:
        with tuned.forced(entry):
            return call()

    return forced_call


def problem_of(case: BenchCase, ieee: bool) -> Problem:
    """The launch problem of a case whose tensors all have its dtype."""
    single = case.dtype == "fp32"
    return Problem(
        case.tokens, case.hidden_size, case.bottleneck_size, ieee=single and ieee, wide=single
    )


def merge(old: Iterable[Entry], new: Iterable[Entry]) -> list[Entry]:
    """The entries of a file after a search: a new one replaces that of the same problem."""
    kept = {(entry.kind, entry.problem): entry for entry in (*old, *new)}
    return list(kept.values())
