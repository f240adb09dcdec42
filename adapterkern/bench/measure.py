"""One case, all providers: build, pass the parity gate, count memory, time, count launches."""

import gc
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapterkern import _torch
from adapterkern.bench import memory, roofline, rotation
from adapterkern.bench.built import Built, UnavailableError, failure
from adapterkern.bench.calibration import Calibration
from adapterkern.bench.cases import BenchCase, Inputs
from adapterkern.bench.gate import Gate, repeats
from adapterkern.bench.providers import PROVIDERS, Provider
from adapterkern.bench.results import NO_RATIO, LostDeviceError, Row, Timing
from adapterkern.bench.rotation import FixedWeightsError
from adapterkern.bench.timing import CALLS_IN_EAGER, CudaTimer, Subject, WallTimer

# Up to here a call is shorter than its launch: its time in a graph is what a captured model pays.
FEW_TOKENS = 4096
# Exchanged weights may err by so many tolerances: the gate has judged the rounding before, and
# weights that did not arrive are wrong by half.
EXCHANGE_SLACK = 4
MOST_TOKENS_EAGER = 2048  # beyond, the host runs ahead and wall time says nothing more
_CASES = {"one": "a case of one adapter", "norm": "a norm", "many": "many adapters in a batch"}


@dataclass(frozen=True)
class Settings:
    """The extent of a run. seconds: time to sample each kind of timing of each case."""

    seconds: float = 0.5
    details: bool = True  # memory, saved bytes, kernels, host time
    hot: bool = False  # on a GPU, time also with the input just written


@dataclass
class _Entry:
    """A provider on its way through one case."""

    row: Row
    provider: Provider
    built: Built | None = None


class _Run:
    """One case on its way: the state that all work on its providers shares."""

    def __init__(
        self,
        case: BenchCase,
        providers: Sequence[Provider],
        timer: WallTimer | CudaTimer,
        settings: Settings,
        progress: Callable[[str], Any],
    ) -> None:
        self.case, self.timer, self.settings, self.progress = case, timer, settings, progress
        self.device = timer.device if isinstance(timer, CudaTimer) else torch.device("cpu")
        how = headline(case, self.device)
        self.entries = [
            _Entry(Row(case, provider.name, ours=provider.ours, headline=how), provider)
            for provider in providers
        ]
        self.rows = [entry.row for entry in self.entries]

    def measure(self) -> None:
        """Do everything up to what follows from the times.

        Raises:
            LostDeviceError: nothing more can be measured; the rows stand.
        """
        try:
            self.inputs = self.case.draw(self.device)
        except Exception as error:
            self.timer.raise_if_lost(error)
            for row in self.rows:
                _record(row, error)
            return
        self.gate = Gate(self.case, self.inputs)
        self.halved = rotation.halved(self.inputs)
        self.gate_of_halved = Gate(self.case, self.halved)
        for entry in self.entries:
            self._attempt(entry, "", self._admit)
        if self.settings.details:
            for entry in self._built():
                self._attempt(entry, "not counted", self._count)
        sets = rotation.sets(self.case, self.inputs, self.timer)
        for kind in kinds(self.case, self.timer, self.settings.hot):
            self._time(kind, sets)
        for row in self.rows:
            if row.timings:
                row.status = "ok"
        if self.settings.details and isinstance(self.timer, CudaTimer):
            for entry in self._built():
                self._attempt(entry, "kernels not counted", self._count_kernels)

    def _built(self) -> list[_Entry]:
        return [entry for entry in self.entries if entry.built is not None]

    def _attempt(self, entry: _Entry, what: str, work: Callable[[_Entry], Any]) -> None:
        """Do a part of the work on one provider, whose failure must not end the run.

        what: the part that the row's note then calls missing; "": all of it, as the status says.
        """
        try:
            work(entry)
        except Exception as error:
            if what:
                _add_note(entry.row, f"{what}: {failure(error)[1]}")
            else:
                entry.built = None
                _record(entry.row, error)
            self.timer.raise_if_lost(error, entry.provider.name)

    def _admit(self, entry: _Entry) -> None:
        """Build a provider and send it through the parity gate."""
        doing = "compiling" if entry.provider.compiled else "checking"
        self.progress(f"{self.case}: {doing} {entry.provider.name}")
        if self.case.kind not in entry.provider.kinds:
            raise UnavailableError(f"it is not for {_CASES[self.case.kind]}")
        row, built = entry.row, entry.provider.build(self.case, self.inputs)
        row.note = built.note
        if built.checked:
            outputs = outputs_of(built, self.case, self.inputs)
            names = self.inputs.named(built.parameters)
            verdict = self.gate.judge(outputs, built.activation, names)
            row.error, row.tolerance = verdict.error, verdict.tolerance
            if not verdict.passed:
                row.status, row.note = "wrong", str(verdict)
                return
            if entry.provider.ours:
                row.repeatable = repeats(lambda: outputs_of(built, self.case, self.inputs))
        entry.built = built

    def _count(self, entry: _Entry) -> None:
        built, row = entry.built, entry.row
        assert built is not None
        call = prepared_call(built, self.case, self.inputs.x, self.inputs.dy)
        row.host_us = self.timer.host_us(Subject([call]))
        counted = memory.allocated(call, self.device)
        if counted is not None:
            row.peak_bytes, row.transient_bytes = counted.peak, counted.transient
        if built.checked and self.case.mode != "forward":
            x = self.inputs.x.detach().requires_grad_()
            row.saved_bytes = memory.saved_bytes(
                lambda: built.forward(x), [x, *built.parameters.values()]
            )

    def _count_kernels(self, entry: _Entry) -> None:
        assert entry.built is not None
        assert isinstance(self.timer, CudaTimer)
        if not entry.built.in_graph or entry.provider.name in self.timer.not_captured:
            raise RuntimeError("its call cannot be captured")
        call = prepared_call(entry.built, self.case, self.inputs.x, self.inputs.dy)
        entry.row.kernels = memory.kernels_launched(call, self.timer)

    def _time(self, kind: str, sets: list[Inputs]) -> None:
        """Time all providers in one way. The row of one that fails says so, and its status does
        until another way gives a time.
        """
        rows = {row.provider: row for row in self.rows}
        subjects: dict[str, Subject] = {}
        for entry in self._built():
            name, broken = entry.provider.name, {}
            if kind == "graph" and isinstance(self.timer, CudaTimer):
                broken = self.timer.not_captured
            if kind == "graph" and entry.built is not None and not entry.built.in_graph:
                _add_note(rows[name], "graph: none can hold what waits for the host")
                continue
            if name in broken:  # one more try may cost the process
                _add_note(rows[name], f"graph: not tried, as it failed before: {broken[name]}")
                continue
            try:
                subjects[name] = self._subject(kind, entry, sets)
            except Exception as error:
                _record(rows[name], error, kind)
                self.timer.raise_if_lost(error, name)
        self.progress(f"{self.case}: timing {', '.join(subjects)} ({kind})")
        try:
            timings = self.timer.measure(kind, subjects, self.settings.seconds)
        except LostDeviceError as error:
            _record(rows[error.subject], error, kind)
            raise
        for name, subject in subjects.items():
            self._enter(rows[name], kind, subject, timings.get(name))

    def _enter(self, row: Row, kind: str, subject: Subject, timing: Timing | None) -> None:
        if timing is not None:
            row.timings[kind] = timing
        if subject.late:
            _add_note(row, f"{kind}: launches included, the host was behind the GPU")
        if subject.failure is not None:
            _record(row, subject.failure, kind)
            if kind == "graph" and isinstance(self.timer, CudaTimer) and row.status == "failed":
                self.timer.not_captured[row.provider] = failure(subject.failure)[1]

    def _subject(self, kind: str, entry: _Entry, sets: list[Inputs]) -> Subject:
        built, case = entry.built, self.case
        assert built is not None
        if kind == "graph":
            self._check_exchange(built)
            weights = rotation.weight_bytes(case) if built.parameters else 0
            entry.row.buffer_bytes = len(sets) * (rotation.activation_bytes(case) + weights)
            calls = [rotating_call(built, case, chosen) for chosen in sets]
            return Subject(calls, least_calls=rotation.least_calls(case))
        most = CALLS_IN_EAGER if kind == "eager" else 1
        calls = [prepared_call(built, case, chosen.x, chosen.dy) for chosen in sets[:most]]
        if kind != "hot":
            return Subject(calls)
        # `.data` hides the write: the same values are no change that a saved tensor has to know of.
        written = (self.inputs.dy if case.mode == "backward" else self.inputs.x).data
        source = written.clone()
        return Subject(calls, lambda: written.copy_(source))

    def _check_exchange(self, built: Built) -> None:
        """Check that a provider computes with whatever weights its leaves are given.

        Raises:
            FixedWeightsError: it does not, so each call of a graph would find its weights in L2.
        """
        if not built.parameters or not built.checked:
            return
        halved = self.halved
        names = halved.named(built.parameters)
        with rotation.exchanged(built.parameters, halved.parameters):
            outputs = outputs_of(built, self.case, halved)
        verdict = self.gate_of_halved.judge(outputs, built.activation, names)
        if not verdict.error <= EXCHANGE_SLACK * verdict.tolerance:
            raise FixedWeightsError(f"other weights in its leaves do not reach it ({verdict})")


def measure_case(
    case: BenchCase,
    providers: Sequence[Provider],
    timer: WallTimer | CudaTimer,
    calibration: Calibration,
    settings: Settings | None = None,
    progress: Callable[[str], Any] = lambda _text: None,
) -> list[Row]:
    """Measure a row for each provider, in the given order; one that fails costs only its row.

    On a GPU all are judged by the copy of the same case, so `limit` is added where it is missing.

    Raises:
        LostDeviceError: the GPU fails whatever is asked of it; its `rows` are what this returns.
    """
    if isinstance(timer, CudaTimer) and all(provider.name != "limit" for provider in providers):
        providers = [*providers, PROVIDERS["limit"]]
    if _torch.has_compiled():
        torch.compiler.reset()  # what earlier cases compiled would count against torch's limit
    run = _Run(case, providers, timer, settings or Settings(), progress)
    rows, device = run.rows, run.device
    try:
        with timer.session(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=_torch.INDUCTOR)  # advice on other settings
            warnings.filterwarnings("ignore", message="The CUDA Graph is empty")  # no-adapter's is
            run.measure()
        del run
        _release(timer)
    except LostDeviceError as error:
        for row in rows:
            if row.status == "ok" and not row.timings:
                row.status, row.note = "failed", "not measured: the GPU was lost before"
        error.rows = rows
        raise
    finally:
        _derive(rows, case, calibration, device, getattr(timer, "l2_bytes", 0))
    return rows


def headline(case: BenchCase, device: torch.device) -> str:
    """Return the kind of timing that a case's ratios are of."""
    if device.type != "cuda":
        return "eager"
    return "graph" if case.tokens <= FEW_TOKENS else "cold"


def kinds(case: BenchCase, timer: WallTimer | CudaTimer, hot: bool = False) -> list[str]:
    """Return the kinds of timing that say something about a case, with `hot` if asked for."""
    left_out = set() if hot else {"hot"}
    if isinstance(timer, CudaTimer) and case.tokens > MOST_TOKENS_EAGER:
        left_out.add("eager")
    return [kind for kind in timer.kinds if kind not in left_out]


def outputs_of(built: Built, case: BenchCase, inputs: Inputs) -> dict[str, Tensor]:
    """Return what the gate judges: y, and in a mode with gradients dx and d_<parameter>."""
    if case.mode == "forward":
        with torch.no_grad():
            return {"y": built.forward(inputs.x)}
    x = inputs.x.detach().requires_grad_()
    y = built.forward(x)
    gradients = torch.autograd.grad(y, [x, *built.parameters.values()], inputs.dy)
    names = ["dx", *(f"d_{name}" for name in built.parameters)]
    return {"y": y.detach(), **dict(zip(names, gradients, strict=True))}


def prepared_call(built: Built, case: BenchCase, x: Tensor, dy: Tensor) -> Callable[[], Any]:
    """Return the case's mode as a function without arguments, on these buffers."""
    if built.alone is not None:
        return built.alone(x, dy)
    if case.mode == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return built.forward(x)

        return forward
    x = x.detach().requires_grad_()
    leaves = [x, *built.parameters.values()]
    if case.mode == "step":
        # y is kept as well: it is alive until the next layer has used it.
        return lambda: (y := built.forward(x), torch.autograd.grad(y, leaves, dy))
    y = built.forward(x)
    return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)


def rotating_call(built: Built, case: BenchCase, chosen: Inputs) -> Callable[[], Any]:
    """Prepare the call with this set's weights too."""
    leaves = built.parameters
    with rotation.exchanged(leaves, chosen.parameters):  # a backward's forward is run here
        call = prepared_call(built, case, chosen.x, chosen.dy)
    return rotation.with_weights(call, leaves, chosen.parameters)


def _derive(
    rows: list[Row],
    case: BenchCase,
    calibration: Calibration,
    device: torch.device,
    l2_bytes: int = 0,
) -> None:
    """Fill in what follows from the times; a CPU, which tells nothing of a GPU, gets no ratio.

    With few tokens the copy, which has no weights, stays in an L2 of `l2_bytes` and is no measure
    of what has to come from memory.
    """
    machine = calibration.machine(case.dtype)
    limit = next((row for row in rows if row.provider == "limit"), None)
    in_l2 = limit and limit.headline == "graph" and (limit.buffer_bytes or 0) < l2_bytes
    copy = limit.time if limit and not in_l2 else None
    timed = [(row, row.time) for row in rows if row.time and row.provider not in NO_RATIO]
    for row, time in timed:
        rate = roofline.moved_bytes(case, _bytes_of(row)) / (time.p50 * 1e-6)
        row.gb_per_s = rate / 1e9
        if device.type == "cuda":
            row.copy_fraction = None if copy is None else copy.p50 / time.p50
            row.floor_fraction = _share(rate, calibration.copy_bandwidth)
            row.peak_fraction = _share(rate, calibration.peak_bandwidth)
            row.ratios = {one.provider: its.p50 / time.p50 for one, its in timed if one is not row}
    if device.type == "cuda" and machine is not None:
        for row in rows:
            row.floor_us = roofline.seconds(case, machine) * 1e6


def _share(rate: float, whole: float | None) -> float | None:
    return None if whole is None else rate / whole


def _bytes_of(row: Row) -> str:
    """Return whose bytes a row is judged by: those of a limit and of a single adapter are their
    own, all others' the floor's."""
    return row.provider if row.provider in ("limit", "single") else "floor"


def _add_note(row: Row, text: str) -> None:
    row.note = "; ".join(filter(None, [row.note, text]))


def _record(row: Row, error: Exception, kind: str = "") -> None:
    """Record an error in a row, which ends it or one kind of timing."""
    row.status, note = failure(error)
    _add_note(row, f"{kind}: {note}" if kind else note)


def _release(timer: WallTimer | CudaTimer) -> None:
    gc.collect()
    if isinstance(timer, CudaTimer):
        try:
            torch.cuda.synchronize(timer.device)
            torch.cuda.empty_cache()
        except RuntimeError as error:  # from work that nobody waited for
            timer.raise_if_lost(error)
