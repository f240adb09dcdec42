"""Timers. Every sample of every subject is taken in turn (A B C A B C ...), never in blocks.

Kinds, each labelled in the result:

- cold: GPU events around one call, after the L2 cache was overwritten, as
  `triton.testing.do_bench` does. The GPU is kept busy meanwhile, so no launch is waited for; a
  sample in which the host was not ahead of it is taken again.
- hot: the same, after a kernel has just written the call's input: what a layer finds.
- graph: one CUDA graph of at most CALLS_IN_GRAPH calls in a row over distinct buffers, per call.
  With few tokens the buffers are smaller than L2 and stay in it.
- eager: wall time of calls in a row up to their completion, per call; host included.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from adapterkern.bench.results import Timing

KINDS = ("cold", "hot", "graph", "eager")
MIN_SAMPLES, MAX_SAMPLES = 5, 200
CALLS_IN_GRAPH = 20
CALLS_IN_EAGER = 20
# How long the GPU is kept busy before an event, so that the host gets ahead of it. Cycles; about a
# millisecond, longer than the launches of any eager adapter.
BUSY_CYCLES = 2_000_000
MOST_BUSY_CYCLES = 32 * BUSY_CYCLES


@dataclass
class Subject:
    """What is timed. calls: the same call over distinct buffers; produce: writes the first one's
    input anew; failure: what ended it, after which it is left out; late: some of its samples hold
    launches, because the host never got ahead of the GPU.
    """

    calls: Sequence[Callable[[], Any]]
    produce: Callable[[], Any] | None = None
    failure: Exception | None = field(default=None, repr=False)
    late: bool = False


def quantiles(samples: Sequence[float]) -> Timing:
    """The 20th, 50th and 80th percentile, interpolated.

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

    return Timing(at(0.2), at(0.5), at(0.8), len(ordered))


def interleave(
    subjects: dict[str, Subject],
    sample: Callable[[str, Subject], float],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Sample the subjects round robin for about `seconds`, at least MIN_SAMPLES rounds.

    A first round warms up and is discarded. A subject that raises is left out from then on, with
    the exception as its `failure`.

    Returns:
        Quantiles in microseconds of every subject that did not fail.
    """
    samples: dict[str, list[float]] = {name: [] for name in subjects}
    deadline = None
    for number in range(MAX_SAMPLES + 1):
        for name, subject in subjects.items():
            if subject.failure is not None:
                continue
            try:
                taken = sample(name, subject)
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
        """The block in which everything is prepared and measured."""
        return contextlib.nullcontext()

    def measure(self, kind: str, subjects: dict[str, Subject], seconds: float) -> dict[str, Timing]:
        """Quantiles by subject, see `interleave`."""
        turns = dict.fromkeys(subjects, 0)

        def sample(name: str, subject: Subject) -> float:
            call = subject.calls[turns[name] % len(subject.calls)]
            turns[name] += 1
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e6

        return interleave(subjects, sample, seconds)

    def host_us(self, subject: Subject) -> float | None:
        """None: on a CPU the call is the host's work."""
        return None


class CudaTimer:
    """Times on one GPU."""

    kinds: tuple[str, ...] = KINDS

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        # A GPU's L2 holds up to about 100 MB; twice and more of that leaves nothing behind.
        self._flush = torch.empty(256 * 2**20, dtype=torch.int8, device=device)
        self._start = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)
        self.not_captured: dict[str, str] = {}  # provider -> why its capture failed

    def session(self) -> contextlib.AbstractContextManager:
        """The block in which everything is prepared and measured: on one stream of its own.

        Autograd runs a backward on the stream of its forward, and the default stream cannot be
        captured into a graph.
        """
        self._stream.wait_stream(torch.cuda.default_stream(self.device))
        return torch.cuda.stream(self._stream)

    def measure(self, kind: str, subjects: dict[str, Subject], seconds: float) -> dict[str, Timing]:
        """Quantiles by subject, see `interleave`."""
        if kind == "graph":
            return self._measure_graphs(subjects, seconds)
        samplers = {"cold": self._cold, "hot": self._hot, "eager": self._eager}
        return interleave(subjects, samplers[kind], seconds)

    def host_us(self, subject: Subject) -> float | None:
        """Median CPU time to launch one call, the GPU not waited for."""
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
        self, before: Callable[[], Any], call: Callable[[], Any]
    ) -> tuple[float, bool]:
        """Microseconds of GPU time of `call` after `before` ran, and whether they are free of
        launches: the GPU had not reached `call` when the host was done with it.

        If it had, it is kept busy twice as long, up to MOST_BUSY_CYCLES.
        """
        cycles = BUSY_CYCLES
        while True:
            torch.cuda._sleep(cycles)
            before()
            self._start.record()
            call()
            self._end.record()
            ahead = not self._start.query()
            self._end.synchronize()
            if ahead or cycles >= MOST_BUSY_CYCLES:
                return self._start.elapsed_time(self._end) * 1e3, ahead
            cycles *= 2

    def _sample(self, subject: Subject, before: Callable[[], Any], call: Callable) -> float:
        microseconds, ahead = self.between_events(before, call)
        subject.late = subject.late or not ahead
        return microseconds

    def _cold(self, _name: str, subject: Subject) -> float:
        return self._sample(subject, self._flush.zero_, subject.calls[0])

    def _hot(self, _name: str, subject: Subject) -> float:
        return self._sample(subject, subject.produce or _nothing, subject.calls[0])

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
                    subject.failure = error

        def sample(name: str, subject: Subject) -> float:
            graph, calls = graphs[name]
            return self._sample(subject, _nothing, graph.replay) / calls

        return interleave(subjects, sample, seconds)

    def capture(
        self, subject: Subject, most_calls: int = CALLS_IN_GRAPH
    ) -> tuple[torch.cuda.CUDAGraph, int]:
        """A graph of calls over all buffers in turn, and the number of calls in it.

        A result stays alive until its buffer's turn comes again, so that outputs too are distinct
        memory. A capture that fails is undone, so that the process can go on.
        """
        buffers = len(subject.calls)
        calls = max(buffers, most_calls // buffers * buffers)
        graph = torch.cuda.CUDAGraph()
        for _ in range(3):
            for call in subject.calls:
                call()
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
        """What torch leaves undone when a capture ends in an error, until about its version 2.12:
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


def _nothing() -> None:
    pass


def timer_for(device: torch.device) -> WallTimer | CudaTimer:
    """The timer of a device."""
    return CudaTimer(device) if device.type == "cuda" else WallTimer()
