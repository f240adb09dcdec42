"""One case, all providers: build, pass the parity gate, count memory, time, count launches."""

import contextlib
import gc
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapterkern.backends.base import BackendUnsupportedError
from adapterkern.bench import memory, roofline
from adapterkern.bench.calibration import Calibration
from adapterkern.bench.cases import BenchCase, Inputs
from adapterkern.bench.gate import Gate
from adapterkern.bench.providers import Built, Provider, UnavailableError
from adapterkern.bench.results import Row
from adapterkern.bench.timing import CALLS_IN_GRAPH, CudaTimer, Subject, WallTimer

# Up to here a call is shorter than its launch: its time in a graph is what a captured model pays.
FEW_TOKENS = 4096
MOST_TOKENS_EAGER = 2048  # beyond, the host runs ahead and wall time says nothing more
DISTINCT_BYTES = 3 * 50 * 2**20  # of buffers in turn where they are large: three L2s of an H200


@dataclass(frozen=True)
class Settings:
    """How much is measured. seconds: of sampling, for each kind of timing of each case."""

    seconds: float = 0.5
    details: bool = True  # memory, saved bytes, kernels, host time


@dataclass
class _Entry:
    """A provider on its way through one case."""

    row: Row
    provider: Provider
    built: Built | None = None


def measure_case(
    case: BenchCase,
    providers: Sequence[Provider],
    timer: WallTimer | CudaTimer,
    calibration: Calibration,
    settings: Settings | None = None,
    progress: Callable[[str], Any] = lambda _text: None,
) -> list[Row]:
    """One row a provider, in the given order. A provider that fails costs its own row alone."""
    settings = settings or Settings()
    device = timer.device if isinstance(timer, CudaTimer) else torch.device("cpu")
    entries = [
        _Entry(
            Row(case, provider.name, ours=provider.ours, headline=headline(case, device)), provider
        )
        for provider in providers
    ]
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # what earlier cases compiled would count against torch's limit
    with timer.session(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch._inductor")  # advice on other settings
        warnings.filterwarnings("ignore", message="The CUDA Graph is empty")  # no-adapter's is
        try:
            inputs = case.draw(device)
        except Exception as error:
            for entry in entries:
                _record(entry.row, error)
            return [entry.row for entry in entries]
        _admit(entries, case, inputs, progress)
        if settings.details:
            for entry in entries:
                _guarded(entry, _count, case, inputs, timer, device)
        _time(entries, case, inputs, timer, settings, progress)
        if settings.details:  # last: a profiler slows the launches of what runs after it
            for entry in entries:
                _count_kernels(entry, case, inputs, device)
    rows = [entry.row for entry in entries]
    _derive(rows, case, calibration, device)
    _release(device)
    return rows


def headline(case: BenchCase, device: torch.device) -> str:
    """The kind of timing that a case's ratios are of."""
    if device.type != "cuda":
        return "eager"
    return "graph" if case.tokens <= FEW_TOKENS else "cold"


def kinds(case: BenchCase, timer: WallTimer | CudaTimer) -> list[str]:
    """The kinds of timing that say something about a case."""
    return [kind for kind in timer.kinds if kind != "eager" or _eager_tells(case, timer)]


def _eager_tells(case: BenchCase, timer: WallTimer | CudaTimer) -> bool:
    return isinstance(timer, WallTimer) or case.tokens <= MOST_TOKENS_EAGER


def _admit(
    entries: list[_Entry], case: BenchCase, inputs: Inputs, progress: Callable[[str], Any]
) -> None:
    """Build each provider and send it through the parity gate."""
    gate = Gate(case, inputs)

    def admit(entry: _Entry) -> None:
        progress(f"{case}: checking {entry.provider.name}")
        built = entry.provider.build(case, inputs)
        entry.row.note = built.note
        if built.checked:
            outputs = outputs_of(built, case, inputs)
            names = tuple(name for name in inputs.parameters if name in built.parameters)
            verdict = gate.judge(outputs, built.activation, names)
            entry.row.error, entry.row.tolerance = verdict.error, verdict.tolerance
            if not verdict.passed:
                entry.row.status, entry.row.note = "wrong", str(verdict)
                return
            if entry.provider.ours:
                again = outputs_of(built, case, inputs)
                entry.row.repeatable = all(
                    torch.equal(outputs[name], again[name]) for name in outputs
                )
        entry.built = built

    for entry in entries:
        _guarded(entry, admit)


def outputs_of(built: Built, case: BenchCase, inputs: Inputs) -> dict[str, Tensor]:
    """What the parity gate judges: y, and in a mode with gradients dx and d_<parameter>."""
    if case.mode == "forward":
        with torch.no_grad():
            return {"y": built.forward(inputs.x)}
    x = inputs.x.detach().requires_grad_()
    y = built.forward(x)
    gradients = torch.autograd.grad(y, [x, *built.parameters.values()], inputs.dy)
    names = ["dx", *(f"d_{name}" for name in built.parameters)]
    return {"y": y.detach(), **dict(zip(names, gradients, strict=True))}


def prepared_call(built: Built, case: BenchCase, x: Tensor, dy: Tensor) -> Callable[[], Any]:
    """The case's mode as a function without arguments, on these buffers."""
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
        # y as well: it is alive until the next layer has used it.
        return lambda: (y := built.forward(x), torch.autograd.grad(y, leaves, dy))
    y = built.forward(x)
    return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)


def _count(
    entry: _Entry,
    case: BenchCase,
    inputs: Inputs,
    timer: WallTimer | CudaTimer,
    device: torch.device,
) -> None:
    built, row = entry.built, entry.row
    if built is None:
        return
    call = prepared_call(built, case, inputs.x, inputs.dy)
    row.host_us = timer.host_us(Subject([call]))
    counted = memory.allocated(call, device)
    if counted is not None:
        row.peak_bytes, row.transient_bytes = counted.peak, counted.transient
    if built.checked and case.mode != "forward":
        x = inputs.x.detach().requires_grad_()
        row.saved_bytes = memory.saved_bytes(
            lambda: built.forward(x), [x, *built.parameters.values()]
        )


def _count_kernels(entry: _Entry, case: BenchCase, inputs: Inputs, device: torch.device) -> None:
    if entry.built is None or entry.row.status != "ok":
        return
    try:
        call = prepared_call(entry.built, case, inputs.x, inputs.dy)
        entry.row.kernels = memory.kernels_launched(call, device)
    except Exception as error:  # the times stand without it
        _add_note(entry.row, f"kernels not counted: {_sentence(error)}")


def _time(
    entries: list[_Entry],
    case: BenchCase,
    inputs: Inputs,
    timer: WallTimer | CudaTimer,
    settings: Settings,
    progress: Callable[[str], Any],
) -> None:
    buffers = [(inputs.x, inputs.dy)]
    try:
        for _ in range(1, _distinct_buffers(case, timer)):
            buffers.append((inputs.x.clone(), inputs.dy.clone()))
    except torch.OutOfMemoryError:
        pass  # fewer buffers then; the first ones are there
    # `.data`: rewriting the same values is no change that a saved tensor has to know of.
    written = inputs.dy.data if case.mode == "backward" else inputs.x.data
    source = written.clone()
    subjects: dict[str, Subject] = {}

    def prepare(entry: _Entry) -> None:
        if entry.built is not None:
            built = entry.built
            calls = [prepared_call(built, case, x, dy) for x, dy in buffers]
            subjects[entry.provider.name] = Subject(calls, lambda: written.copy_(source))

    for entry in entries:
        _guarded(entry, prepare)
    rows = {entry.provider.name: entry.row for entry in entries}
    for kind in kinds(case, timer):
        chosen = subjects
        if kind == "graph" and isinstance(timer, CudaTimer):
            chosen = _capturable(subjects, rows, timer)
        progress(f"{case}: timing {', '.join(chosen)} ({kind})")
        timings = timer.measure(kind, chosen, settings.seconds)
        for name, timing in timings.items():
            rows[name].timings[kind] = timing
            if kind == "graph":
                rows[name].buffer_bytes = len(buffers) * _activations(case)
        for name, subject in chosen.items():
            row = rows[name]
            if subject.late:
                _add_note(row, f"{kind}: launches included, the host was behind the GPU")
                subject.late = False
            if subject.failure is not None:
                status, note = failure(subject.failure)
                _add_note(row, f"{kind}: {note}")
                row.status = status  # until it is timed in another way
                if kind == "graph" and isinstance(timer, CudaTimer) and status == "failed":
                    timer.not_captured[name] = note
                subject.failure = None
    for name in subjects:
        if rows[name].timings:
            rows[name].status = "ok"


def _capturable(
    subjects: dict[str, Subject], rows: dict[str, Row], timer: CudaTimer
) -> dict[str, Subject]:
    """Without those whose capture failed in an earlier case: one more try may cost the process."""
    for name in subjects.keys() & timer.not_captured.keys():
        _add_note(rows[name], f"graph: not tried, as it failed before: {timer.not_captured[name]}")
    return {name: s for name, s in subjects.items() if name not in timer.not_captured}


def _activations(case: BenchCase) -> int:
    """Bytes of one call's x and y, or dy and dx: the least that is distinct in each buffer."""
    return 2 * case.tokens * case.hidden_size * case.element_size


def _distinct_buffers(case: BenchCase, timer: WallTimer | CudaTimer) -> int:
    """How many buffers a graph's calls take in turn; few tokens cannot fill L2 with them."""
    if isinstance(timer, WallTimer):
        return 1
    return max(1, min(CALLS_IN_GRAPH, -(-DISTINCT_BYTES // _activations(case))))


def _derive(
    rows: list[Row], case: BenchCase, calibration: Calibration, device: torch.device
) -> None:
    """What follows from the times; on a CPU, which tells nothing about a GPU, no ratio."""
    for row in rows:
        if row.time is not None and row.provider != "no-adapter":
            row.gb_per_s = roofline.moved_bytes(case, _bytes_of(row)) / row.time.p50 / 1e3
    if device.type != "cuda":
        return
    machine = calibration.machine(case.dtype)
    for row in rows:
        if machine is not None:
            row.floor_us = roofline.seconds(case, machine) * 1e6
        if row.time is None:
            continue
        if machine is not None and row.provider != "no-adapter":
            least = roofline.copy_seconds(case, machine, _bytes_of(row))
            row.floor_fraction = least * 1e6 / row.time.p50
        row.ratios = {
            other.provider: other.time.p50 / row.time.p50
            for other in rows
            if other.time is not None and other.provider not in (row.provider, "no-adapter")
        }


def _bytes_of(row: Row) -> str:
    """Whose bytes a row is judged by: a limit moves its own and no more, all others the floor's."""
    return "limit" if row.provider == "limit" else "floor"


def _add_note(row: Row, text: str) -> None:
    row.note = "; ".join(filter(None, [row.note, text]))


def _guarded(entry: _Entry, work: Callable[..., Any], *arguments: Any) -> None:
    try:
        work(entry, *arguments)
    except Exception as error:  # one provider's failure must not end the run
        entry.built = None
        _record(entry.row, error)


def _record(row: Row, error: Exception) -> None:
    row.status, row.note = failure(error)


def failure(error: Exception) -> tuple[str, str]:
    """(status, note) of a row whose measurement ended in this error."""
    if isinstance(error, UnavailableError | BackendUnsupportedError):
        return "unavailable", _sentence(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error):
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return "out_of_memory", _sentence(error)
    return "failed", _sentence(error)


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    kinds = (UnavailableError, BackendUnsupportedError)
    return text if isinstance(error, kinds) else f"{type(error).__name__}: {text}"


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # of a lost GPU; the rows measured before stand
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
