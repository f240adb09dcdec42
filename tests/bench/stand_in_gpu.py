"""A GPU for the timers: torch.cuda with a clock that work moves on by known times."""

import contextlib
from types import SimpleNamespace

import torch

from adapterkern.bench import timing
from adapterkern.bench.timing import CudaTimer

L2 = 50 * 2**20  # of an H100 and an H200


class StandIn:
    """Tensors are the CPU's; what `work` names is done at once, or recorded while captured.

    launching: milliseconds from the first launch of a sample to its last; lost: the device answers
    everything with an error.
    """

    def __init__(self, monkeypatch):
        self.now, self.log, self.recorded = 0.0, [], None
        self.launching, self.lost = 0.0, False
        self.busied, self.undone, self.graphs, self.flushed = [], [], [], []
        functions = {
            "CUDAGraph": lambda **options: Graph(self, options),
            "Event": lambda enable_timing: Event(self),
            "Stream": lambda *_: None,
            "_sleep": self.busy,
            "current_device": lambda: 0,
            "default_generators": [Generator(self)],
            "get_device_properties": lambda _device: SimpleNamespace(L2_cache_size=L2),
            "graph": self.graph,
            "graph_pool_handle": lambda: (0, 7),
            "synchronize": self.synchronize,
        }
        for name, value in functions.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end, raising=False)
        monkeypatch.setattr(timing, "random_bits", lambda size, _device: Bits(self, size))
        monkeypatch.setattr(CudaTimer, "session", lambda _timer: contextlib.nullcontext())

    def timer(self):
        return CudaTimer(torch.device("cpu"))

    def work(self, name, milliseconds=0.0):
        if self.recorded is not None:
            self.recorded.append((name, milliseconds))
        else:
            self.log.append(name)
            self.now += milliseconds

    def busy(self, cycles):
        self.busied.append(cycles)
        self.busy_since = self.now
        self.work("busy", cycles / 2e6)  # at 2 GHz

    def synchronize(self, *_):
        if self.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        self.log.append("wait")

    @contextlib.contextmanager
    def graph(self, graph, pool, stream):
        self.recorded = graph.work
        try:
            yield
        except RuntimeError as error:  # as in torch, the end of a broken capture raises by itself
            raise RuntimeError("operation failed due to a previous error") from error
        finally:
            self.recorded = None

    def end(self, index, pool):
        self.undone.append((index, pool))
        raise RuntimeError("not recording to that pool")  # as a version that has undone it


class Graph:
    def __init__(self, gpu, options):
        self.gpu, self.options, self.work = gpu, options, []
        gpu.graphs.append(self)

    def replay(self):
        for name, milliseconds in self.work:
            self.gpu.work(name, milliseconds)

    def raw_cuda_graph(self):
        assert self.options == {"keep_graph": True}
        return id(self)

    def reset(self):
        self.gpu.undone.append("graph")


class Event:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.at = self.gpu.now

    def query(self):
        return self.at <= self.gpu.busy_since + self.gpu.launching

    def synchronize(self):
        self.gpu.synchronize()

    def elapsed_time(self, other):
        return other.at - self.at


class Generator:
    """The default generator, whose state a broken capture leaves behind."""

    def __init__(self, gpu):
        self.clone_state = lambda: "fresh"
        self.graphsafe_set_state = gpu.undone.append


class Bits:
    """One of the buffers that a flush writes and reads."""

    def __init__(self, gpu, size):
        self.gpu, self.size = gpu, size

    def bitwise_not_(self):
        self.gpu.flushed.append(self)
        self.gpu.work("write", 0.05)

    def amax(self, _dim):
        self.gpu.flushed.append(self)
        self.gpu.work("read", 0.05)
