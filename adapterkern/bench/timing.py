"""Timers. Every sample of every subject is taken in turn, in an order that rotates (A B C, B C A,
C A B), never in blocks.

Kinds, each labelled in the result:

- cold: GPU events around one call, after the L2 cache was overwritten and what was written has left
  it for memory. The GPU is kept busy meanwhile, so no launch is waited for; a sample in which the
  host was not ahead of it is taken again.
- hot: the same, after a kernel has just written the call's input: what a layer finds.
- graph: one CUDA graph of at least CALLS_IN_GRAPH calls in a row, each over memory of its own as
  far as `rotation` gives it any, per call.
- eager: wall time of calls in a row up to their completion, per call; host included.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adapterkern.bench.results import LostDeviceError, Timing

KINDS = ("cold", "hot", "graph", "eager")
MIN_SAMPLES, MAX_SAMPLES = 5, 200
CALLS_IN_GRAPH = 20
CALLS_IN_EAGER = 20
WARM_UP_CALLS = 3  # before a capture, which allows no compilation and no first allocation
# The GPU is kept busy for so many cycles before an event, so that the host gets ahead of it: at
# first about 50 us, the launches of an adapter, and at most about 30 ms, those of a large graph.
BUSY_CYCLES = 100_000
MOST_BUSY_CYCLES = 512 * BUSY_CYCLES
FLUSHED_L2S = 3  # a buffer of as many L2 caches leaves nothing of what was there before
# The size assumed where torch tells none is about the largest L2 there is (126 MB, B200), so that
# no smaller one keeps anything over a flush.
DEFAULT_L2_BYTES = 128 * 2**20


@dataclass
class Subject:
    """A call that is timed. calls: it over distinct buffers; produce: writes the first one's input
    anew; least_calls: the fewest in a graph; busy_cycles: for how long the GPU is kept busy before
    a sample, doubled as often as its launches take longer; failure: what ended it, after which it
    is left out; late: some samples hold launches, because the host never got ahead of the GPU.
    """

    calls: Sequence[Callable[[], Any]]
    produce: Callable[[], Any] | None = None
    least_calls: int = CALLS_IN_GRAPH
    busy_cycles: int = BUSY_CYCLES
    failure: Exception | None = field(default=None, repr=False)
    late: bool = False


def random_bits(size: int, device: torch.device) -> Tensor:
    """Draw about `size` bytes as int32: zeros would cost less power and so raise clocks."""
    bits = torch.empty(size // 4, dtype=torch.int32, device=device)
    generator = torch.Generator(device).manual_seed(0)
    return bits.random_(-(2**31), 2**31, generator=generator)


def l2_bytes(device: torch.device) -> int:
    """Return the size of a GPU's L2 cache, DEFAULT_L2_BYTES where torch does not tell it."""
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "L2_cache_size", 0) or DEFAULT_L2_BYTES


def quantiles(samples: Sequence[float]) -> Timing:
    """Return the 20th, 50th and 80th percentile, interpolated, and the samples as they came.

    Raises:
        ValueError: no samples.
    """
    if not samples:
        raise ValueError("no samples to take quantiles of.")
    ordered = sorted(samples)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    raw = tuple(round(sample, 3) for sample in samples)
    return Timing(at(0.2), at(0.5), at(0.8), len(ordered), raw)


def interleave(
    subjects: dict[str, Subject],
    sample: Callable[[str, Subject], float],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Sample the subjects in turn for about `seconds`, at least MIN_SAMPLES rounds.

    Each round begins one subject later than the last, so that none always follows the same other.
    A first round warms up and is discarded. A subject that raises is left out from then on, with
    the exception as its `failure`.

    Returns:
        Quantiles in microseconds of every subject that did not fail.

    Raises:
        LostDeviceError: from a sample; nothing more can be timed.
    """
    samples: dict[str, list[float]] = {name: [] for name in subjects}
    order = list(subjects.items())
    deadline = None
    for number in range(MAX_SAMPLES + 1):
        first = number % max(1, len(order))
        for name, subject in order[first:] + order[:first]:
            if subject.failure is not None:
                continue
            try:
                taken = sample(name, subject)
            except LostDeviceError:
                raise
            except Exception as error:  # whatever it is, the others are still timed
                subject.failure = error
                continue
            if number > 0:
                samples[name].append(taken)
        if deadline is None:
            deadline = clock() + seconds
        if number >= MIN_SAMPLES and clock() >= deadline:
            break
    alive = [name for name, subject in subjects.items() if subject.failure is None]
    return {name: quantiles(samples[name]) for name in alive}


class WallTimer:
    """Times on the CPU: one call a sample, over its buffers in turn."""

    kinds: tuple[str, ...] = ("eager",)

    def session(self) -> contextlib.AbstractContextManager:
        """Return the block in which everything is prepared and measured."""
        return contextlib.nullcontext()

    def measure(self, kind: str, subjects: dict[str, Subject], seconds: float) -> dict[str, Timing]:
        """Return quantiles by subject, see `interleave`."""
        turns = dict.fromkeys(subjects, 0)

        def sample(name: str, subject: Subject) -> float:
            call = subject.calls[turns[name] % len(subject.calls)]
            turns[name] += 1
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e6

        return interleave(subjects, sample, seconds)

    def host_us(self, subject: Subject) -> float | None:
        """Return None: on a CPU the call is the host's work."""
        return None

    def raise_if_lost(self, cause: Exception, name: str = "") -> None:
        """Do nothing: a CPU is not lost by an error."""


class CudaTimer:
    """Times on one GPU."""

    kinds: tuple[str, ...] = KINDS

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self.l2_bytes = l2_bytes(device)
        self._written = random_bits(FLUSHED_L2S * self.l2_bytes, device)
        self._read = random_bits(FLUSHED_L2S * self.l2_bytes, device)
        self._start = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)
        self.not_captured: dict[str, str] = {}  # provider -> why its capture failed

    def session(self) -> contextlib.AbstractContextManager:
        """Return the block in which everything is prepared and measured: on one stream of its own.

        Autograd runs a backward on the stream of its forward, and the default stream cannot be
        captured into a graph.
        """
        self._stream.wait_stream(torch.cuda.default_stream(self.device))
        return torch.cuda.stream(self._stream)

    def measure(self, kind: str, subjects: dict[str, Subject], seconds: float) -> dict[str, Timing]:
        """Return quantiles by subject, see `interleave`."""
        if kind == "graph":
            return self._measure_graphs(subjects, seconds)
        samplers = {"cold": self._cold, "hot": self._hot, "eager": self._eager}
        return self.interleave(subjects, samplers[kind], seconds)

    def interleave(
        self, subjects: dict[str, Subject], sample: Callable[[str, Subject], float], seconds: float
    ) -> dict[str, Timing]:
        """Run `interleave`, but end when the device is lost."""

        def watched(name: str, subject: Subject) -> float:
            try:
                return sample(name, subject)
            except Exception as error:
                self.raise_if_lost(error, name)
                raise

        return interleave(subjects, watched, seconds)

    def raise_if_lost(self, cause: Exception, name: str = "") -> None:
        """Tell an error that costs one subject, `name`, from one that costs the device.

        Raises:
            LostDeviceError: the GPU cannot be synchronised any more.
        """
        try:
            torch.cuda.synchronize(self.device)
        except Exception:  # the same error again; the first one names where it showed
            text = " ".join(str(cause).split())[:200]
            where = f" in the work of {name}" if name else ""
            raise LostDeviceError(
                f"the GPU was lost{where}: {type(cause).__name__}: {text}\n"
                "  hint: measure on in a new process; this one gets no working device again",
                name,
            ) from cause

    def host_us(self, subject: Subject) -> float | None:
        """Return the median CPU time to launch one call without waiting for the GPU."""
        times = []
        for _ in range(MIN_SAMPLES):
            torch.cuda.synchronize(self.device)
            start = time.perf_counter()
            for index in range(CALLS_IN_EAGER):
                subject.calls[index % len(subject.calls)]()
            times.append((time.perf_counter() - start) / CALLS_IN_EAGER * 1e6)
        torch.cuda.synchronize(self.device)
        return quantiles(times).p50

    def between_events(
        self, subject: Subject, before: Callable[[], Any], call: Callable[[], Any]
    ) -> float:
        """Measure microseconds of GPU time of `call` after `before` ran, free of launches: the GPU
        had not reached `call` when the host was done with it.

        If it had, the sample is taken again with the GPU kept busy twice as long, which the subject
        remembers; it is `late` if MOST_BUSY_CYCLES are too few.
        """
        while True:
            torch.cuda._sleep(subject.busy_cycles)
            before()
            self._start.record()
            call()
            self._end.record()
            ahead = not self._start.query()
            self._end.synchronize()
            if ahead or subject.busy_cycles >= MOST_BUSY_CYCLES:
                subject.late = subject.late or not ahead
                return self._start.elapsed_time(self._end) * 1e3
            subject.busy_cycles *= 2

    def with_gaps(self, call: Callable[[], Any]) -> float:
        """Measure microseconds between GPU events around `call`, begun on an idle GPU: gaps in
        which it waits for the host count, as they do for a user.
        """
        torch.cuda.synchronize(self.device)
        self._start.record()
        call()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) * 1e3

    def _flush(self) -> None:
        """Overwrite L2, then read another buffer: the first leaves dirty lines behind, whose way
        to memory would otherwise fall into the timed call.
        """
        self._written.bitwise_not_()
        self._read.amax(0)

    def _cold(self, _name: str, subject: Subject) -> float:
        return self.between_events(subject, self._flush, subject.calls[0])

    def _hot(self, _name: str, subject: Subject) -> float:
        return self.between_events(subject, subject.produce or nothing, subject.calls[0])

    def _eager(self, _name: str, subject: Subject) -> float:
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        for index in range(CALLS_IN_EAGER):
            subject.calls[index % len(subject.calls)]()
        torch.cuda.synchronize(self.device)
        return (time.perf_counter() - start) / CALLS_IN_EAGER * 1e6

    def _measure_graphs(self, subjects: dict[str, Subject], seconds: float) -> dict[str, Timing]:
        graphs = {}
        for name, subject in subjects.items():
            if subject.failure is None:
                try:
                    graphs[name] = self.capture(subject)
                except Exception as error:  # what cannot be captured is not timed in a graph
                    self.raise_if_lost(error, name)
                    subject.failure = error

        def sample(name: str, subject: Subject) -> float:
            graph, calls = graphs[name]
            return self.between_events(subject, nothing, graph.replay) / calls

        return self.interleave(subjects, sample, seconds)

    def capture(self, subject: Subject, **options: bool) -> tuple[torch.cuda.CUDAGraph, int]:
        """Capture a graph of calls over all buffers equally often; return it and their number.

        A result stays alive until its buffer's turn comes again, so that outputs too are distinct
        memory. A capture that fails is undone, so that the process can go on. `options` are those
        of `torch.cuda.CUDAGraph`.
        """
        buffers = len(subject.calls)
        calls = -(-subject.least_calls // buffers) * buffers
        graph = torch.cuda.CUDAGraph(**options)
        for index in range(WARM_UP_CALLS):
            subject.calls[index % buffers]()
        torch.cuda.synchronize(self.device)
        kept: list[Any] = [None] * buffers
        pool = torch.cuda.graph_pool_handle()
        cause: BaseException | None = None
        try:
            with torch.cuda.graph(graph, pool=pool, stream=self._stream):
                try:
                    for index in range(calls):
                        kept[index % buffers] = subject.calls[index % buffers]()
                except BaseException as error:
                    cause = error  # the end of a broken capture raises anew, and says less
                    raise
        except BaseException as error:
            with contextlib.suppress(RuntimeError):  # a lost GPU, which the cause tells of
                self._undo_capture(graph, pool)
            raise (cause or error) from None
        del kept
        return graph, calls

    def _undo_capture(self, graph: torch.cuda.CUDAGraph, pool: Any) -> None:
        """Do what torch until about its version 2.12 leaves undone when a capture ends in an error:
        the allocator goes on waiting for the end of it, and the generator refuses to draw.
        """
        index = self.device.index
        index = torch.cuda.current_device() if index is None else index
        new, old = "_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool"
        end = getattr(torch._C, new, None) or getattr(torch._C, old)
        with contextlib.suppress(RuntimeError):  # torch has done it
            end(index, pool)
        graph.reset()
        generator = torch.cuda.default_generators[index]
        generator.graphsafe_set_state(generator.clone_state())


def nothing() -> None:
    """Prepare nothing before a sample."""


def timer_for(device: torch.device) -> WallTimer | CudaTimer:
    """Return the timer of a device."""
    return CudaTimer(device) if device.type == "cuda" else WallTimer()
