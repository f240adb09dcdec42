"""The search: candidates that compile are gated and timed, interleaved with the formula's plan.

An entry has to pass the parity gate in step mode, whatever it is timed in: a token plan also
launches the gradients of z and x. It also has to compile for every mix of dtypes that it may meet:
for the widest before it is timed, and if it is the fastest for all of them, while the next search
is timed.
"""

import functools
import itertools
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from adapterkern.backends.triton import tuned
from adapterkern.backends.triton.launch_config import Device
from adapterkern.backends.triton.mixes import Mix, mixes, uniform, widest
from adapterkern.backends.triton.tuned import Entry, Evidence, HeldOut
from adapterkern.bench import rotation
from adapterkern.bench.cases import BenchCase
from adapterkern.bench.compiling import ORDINARY, URGENT, Compilers, Work
from adapterkern.bench.gate import Gate, repeats
from adapterkern.bench.measure import headline, outputs_of, prepared_call, rotating_call
from adapterkern.bench.providers import PROVIDERS
from adapterkern.bench.timing import CudaTimer, Subject
from adapterkern.bench.tune import HELD_OUT, Search, candidates, formula, problem_of, timed

GAIN = 0.02  # what a run's noise can give by itself
FINALISTS = 8
BASE, AFTER = "the formula's plan", "the nearest entry's plan"
Progress = Callable[[str], Any]
# An entry and its compilations.
Compiling = tuple[Entry, "list[Future[str | None]]"]


def _quiet(_text: str) -> None:
    pass


@dataclass(frozen=True)
class Found:
    """The outcome for one problem; before_us and after_us are of the same interleaved run.

    refused: why faster entries were not taken, which some mix of dtypes could not run.
    """

    entry: Entry
    before_us: float
    after_us: float
    changed: bool
    tried: int
    refused: tuple[str, ...] = ()

    def __str__(self) -> str:
        problem = self.entry.problem
        name = (
            f"{self.entry.kind} T{problem.num_tokens}-H{problem.hidden_size}"
            f"-R{problem.bottleneck_size}"
        )
        tried = f"({self.tried} tried)" + "".join(f"\n  refused: {why}" for why in self.refused)
        if not self.changed:
            return f"{name}: {self.before_us:.1f} us, kept {tried}"
        first = self.entry.kernels[0]
        tiles = f"{first.block_t}x{first.block_h}x{first.block_r}"
        return (
            f"{name}: {self.before_us:.1f} us to {self.after_us:.1f} us, "
            f"{self.entry.form} {tiles}, {first.num_warps} warps, {first.num_stages} stages {tried}"
        )


@dataclass(frozen=True)
class Queued:
    """A search whose entries are being compiled, by name; BASE is the one to beat."""

    search: Search
    entries: dict[str, Compiling]


@dataclass
class Ranked:
    """A search whose entries were timed. faster: those that beat the formula, the fastest first;
    proofs: whether the first of them compiles for every mix.
    """

    search: Search
    base: Entry
    before_us: float
    faster: list[tuple[float, Entry]]
    tried: int
    proofs: "list[Future[str | None]]" = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def enqueue(
    search: Search, device: Device, compilers: Compilers, limit: int | None = None
) -> Queued:
    """Have the formula's plan and all candidates compiled for what is timed and the widest mix."""
    base = formula(search.kind, search.problem, device)
    tried = candidates(search.kind, search.problem, device)[:limit]
    named = {BASE: base} | {str(number): entry for number, entry in enumerate(tried)}
    also = [widest(search.kind, search.problem, device)]
    return Queued(search, _compiled(search.case, named, compilers, also))


def _compiled(
    case: BenchCase,
    entries: dict[str, Entry],
    compilers: Compilers,
    also: Iterable[Mix] = (),
    priority: int = ORDINARY,
) -> dict[str, Compiling]:
    """Return each entry with its compilations for the case, and for other mixes."""
    mix = uniform(case.torch_dtype, case.activation)
    found: dict[str, Compiling] = {}
    for name, entry in entries.items():
        # Only candidates must not spill: with odd sizes the formula's plan does.
        work = [Work(entry, mix, timed=True, may_spill=name in (BASE, AFTER))]
        work += [Work(entry, other) for other in also]
        found[name] = entry, [compilers.submit(one, priority) for one in work]
    return found


def _first_problem(compilations: "Iterable[Future[str | None]]") -> str | None:
    return next((problem for one in compilations if (problem := one.result()) is not None), None)


def rank(
    queued: Queued,
    timer: CudaTimer,
    device: Device,
    compilers: Compilers,
    seconds: float = 0.2,
    progress: Progress = _quiet,
) -> Ranked:
    """Time what compiles and is right: all shortly, then the fastest FINALISTS for `seconds`, each
    time in turn with the formula's plan.

    Raises:
        RuntimeError: the formula's plan does not compile, or is wrong.
        LostDeviceError: nothing more can be timed.
    """
    search = queued.search
    with timer.session():
        admitted = _Admitted(search.case, timer)
        reasons = admitted.admit(queued.entries, progress)
        if BASE in reasons:
            raise RuntimeError(f"{BASE} cannot be timed on {search.case}: {reasons[BASE]}")
        how = headline(search.case, timer.device)
        short = timer.measure(how, admitted.subjects, 0.0)
        best = sorted(short, key=lambda name: short[name].p50)[:FINALISTS]
        entries = {name: entry for name, (entry, _) in queued.entries.items()}
        final = {name: entries[name] for name in dict.fromkeys([BASE, *best])}
        subjects = admitted.on_memory_of_their_own(final)
        times = timer.measure(how, subjects, seconds)
    if BASE not in times:
        raise RuntimeError(f"{BASE} cannot be timed on {search.case}: {subjects[BASE].failure}")
    before = times[BASE].p50
    faster = sorted((times[name].p50, name) for name in times)
    found = [(us, entries[name]) for us, name in faster if us < before * (1 - GAIN)]
    ranked = Ranked(search, entries[BASE], before, found, len(entries) - 1)
    _prove(ranked, device, compilers)
    return ranked


class _Admitted:
    """One case, its provider, and the entries that are ready to be timed."""

    def __init__(self, case: BenchCase, timer: CudaTimer) -> None:
        self.case, self.timer = case, timer
        self.inputs = case.draw(timer.device)
        self.built = PROVIDERS["triton"].build(case, self.inputs)
        # The forward that records nothing is another kernel than the one of a step.
        modes = ["step", "forward"] if case.mode == "forward" else ["step"]
        self.gates = [Gate(replace(case, mode=mode), self.inputs) for mode in modes]
        self.subjects: dict[str, Subject] = {}

    def admit(self, entries: dict[str, Compiling], progress: Progress) -> dict[str, str]:
        """Make subjects of those that compile and are right; why the others are not, by name."""
        reasons: dict[str, str] = {}
        for name, (entry, compiled) in entries.items():
            done = len(self.subjects) + len(reasons)
            progress(f"{self.case} {entry.kind}: {done}/{len(entries)}")
            reason = _first_problem(compiled)
            if reason is None:
                try:
                    with tuned.forced(entry):
                        reason = self._wrong()
                        call = prepared_call(self.built, self.case, self.inputs.x, self.inputs.dy)
                except Exception as error:  # what fails to run is no candidate, unless all does
                    self.timer.raise_if_lost(error, f"{self.case} with {entry}")
                    reason = f"{type(error).__name__}: {error}"
            if reason is None:
                self.subjects[name] = Subject([_with_entry(call, entry)])
            else:
                reasons[name] = reason
        return reasons

    def _wrong(self) -> str | None:
        """Return how the entry in force fails the parity gate, None if it passes."""
        for gate in self.gates:
            outputs = outputs_of(self.built, gate.case, self.inputs)
            verdict = gate.judge(outputs, self.built.activation, tuple(self.built.parameters))
            if not verdict.passed:
                return f"wrong in mode {gate.case.mode}: {verdict}"
            if not repeats(functools.partial(outputs_of, self.built, gate.case, self.inputs)):
                return f"other bits on another run in mode {gate.case.mode}"
        return None

    def on_memory_of_their_own(self, entries: dict[str, Entry]) -> dict[str, Subject]:
        """Return the subjects of these entries, in a graph with activations and weights of its own
        for each call, as `measure` times them: many captures, so only a few entries get them.
        """
        if headline(self.case, self.timer.device) != "graph":
            return {name: self.subjects[name] for name in entries}
        sets = rotation.sets(self.case, self.inputs, self.timer)
        found = {}
        for name, entry in entries.items():
            with tuned.forced(entry):
                calls = [rotating_call(self.built, self.case, chosen) for chosen in sets]
            calls = [_with_entry(call, entry) for call in calls]
            found[name] = Subject(calls, least_calls=rotation.least_calls(self.case))
        return found


def _with_entry(call: Callable[[], Any], entry: Entry) -> Callable[[], Any]:
    def forced_call() -> Any:
        with tuned.forced(entry):
            return call()

    return forced_call


def _prove(ranked: Ranked, device: Device, compilers: Compilers) -> None:
    """Have the fastest entry compiled for every mix that it may meet."""
    ranked.proofs = [
        compilers.submit(Work(entry, mix), URGENT)
        for _, entry in ranked.faster[:1]
        for mix in mixes(entry.kind, entry.problem, device)
    ]


def settle(ranked: Ranked, device: Device, compilers: Compilers, gpu: str) -> Found:
    """Return the fastest entry that compiles for every mix, the formula's where none does."""
    before, tried = ranked.before_us, ranked.tried
    while ranked.faster:
        after, entry = ranked.faster[0]
        problem = _first_problem(ranked.proofs)
        if problem is None:
            entry = replace(entry, evidence=Evidence(before, after, gpu))
            return Found(entry, before, after, True, tried, tuple(ranked.refused))
        ranked.refused.append(f"{after:.1f} us with {entry.kernels}: {problem}")
        del ranked.faster[0]
        _prove(ranked, device, compilers)
    entry = replace(ranked.base, evidence=Evidence(before, before, gpu))
    return Found(entry, before, before, False, tried, tuple(ranked.refused))


@dataclass(frozen=True)
class Trial:
    """A held-out shape for which the nearest entry gives another plan than the formula."""

    kind: str
    case: BenchCase
    entries: dict[str, Compiling]


def trials(
    entries: Iterable[Entry], ieee: bool, device: Device, compilers: Compilers
) -> list[Trial]:
    """Start to compile what the entries change on shapes that were not searched."""
    entries, found = tuple(entries), []
    for held_out, kind in itertools.product(HELD_OUT, ("tokens", "weights")):
        case = timed(kind, held_out)
        problem = problem_of(case, ieee)
        base, entry = formula(kind, problem, device), tuned.nearest(entries, kind, problem)
        if entry is None or tuned.plan(entry, problem, device) == tuned.plan(base, problem, device):
            continue
        named = {BASE: base, AFTER: replace(entry, problem=problem)}
        compiled = _compiled(case, named, compilers, priority=URGENT)  # before searches to come
        found.append(Trial(kind, case, compiled))
    return found


def judge(
    trial: Trial, timer: CudaTimer, seconds: float = 0.2, progress: Progress = _quiet
) -> HeldOut:
    """Time one held-out shape before and after.

    Raises:
        RuntimeError: the formula's plan cannot be timed, so that nothing is known.
        LostDeviceError: nothing more can be timed.
    """
    case = trial.case
    with timer.session():
        admitted = _Admitted(case, timer)
        reasons = admitted.admit(trial.entries, progress)
        ready = {name: trial.entries[name][0] for name in admitted.subjects}
        subjects = admitted.on_memory_of_their_own(ready)
        times = timer.measure(headline(case, timer.device), subjects, seconds)
    reasons |= {name: str(s.failure) for name, s in subjects.items() if s.failure is not None}
    if BASE in reasons:
        raise RuntimeError(f"{BASE} cannot be timed on {case}: {reasons[BASE]}")
    before = times[BASE].p50
    after = times[AFTER].p50 if AFTER in times else before
    problem = trial.entries[AFTER][0].problem
    why = reasons.get(AFTER, "")
    return HeldOut(trial.kind, problem.ieee, problem.wide, str(case), before, after, why)


def loses(row: HeldOut) -> bool:
    """Return whether a held-out shape condemns its class of entries."""
    return bool(row.problem) or row.after_us > row.before_us * (1 + GAIN)


def without(entries: Iterable[Entry], losers: Iterable[HeldOut]) -> list[Entry]:
    """Return the entries but those of the kind and arithmetic of these rows."""
    dropped = {(row.kind, row.ieee, row.wide) for row in losers}
    return [entry for entry in entries if (entry.kind, *entry.problem[3:]) not in dropped]
