"""Launch configurations compiled in parallel, in processes that do not touch the GPU.

The kernels then lie in Triton's cache on disk, where the process that times them finds them. A
compiler that crashes or hangs on one configuration costs that configuration alone.
"""

import itertools
import queue
import signal
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from adapterkern.backends.triton.launch_config import Device
from adapterkern.backends.triton.mixes import Mix, compile_entry
from adapterkern.backends.triton.tuned import Entry

SECONDS = 60.0  # a kernel takes under one; what takes so long never ends in good time
URGENT, ORDINARY = 0, 1
_END = 2  # behind all work


@dataclass(frozen=True)
class Work:
    """One entry to compile for one mix; timed: see `compile_entry`; may_spill: whether
    registers that spill to memory are no problem.
    """

    entry: Entry
    mix: Mix
    timed: bool = False
    may_spill: bool = True


def problem_of(work: Work, capability: int, device: Device) -> str | None:
    """Return why this GPU cannot run the work, in the compiler's words; None if it can."""
    from adapterkern.backends.triton import compile_only

    try:
        launches = compile_entry(work.entry, work.mix, capability, device, work.timed)
    except Exception as error:  # the compiler raises anything on tiles it was not made for
        return " ".join(f"{type(error).__name__}: {error}".split())[:300]
    for launch in () if work.may_spill else launches:
        stack = compile_only.resources(launch.cubin).stack
        if stack > compile_only.MOST_STACK_BYTES:
            return f"{launch.kernel} spills {stack} bytes a thread"
    return None


def _serve(connection: Connection, capability: int, device: Device) -> None:
    """Serve as a compiler's process until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this one
    try:
        while True:
            connection.send(problem_of(connection.recv(), capability, device))
    except (EOFError, BrokenPipeError):
        pass


class _Compiler:
    """One process that compiles."""

    def __init__(self, capability: int, device: Device) -> None:
        context = get_context("spawn")  # a fork of a process that uses CUDA is not sound
        self._connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(theirs, capability, device), daemon=True
        )
        self.process.start()
        theirs.close()  # so that the end of the process shows here

    def ask(self, work: Work, seconds: float) -> str | None:
        """Return what `problem_of` returns in that process.

        Raises:
            RuntimeError: there is no answer; the process is of no more use.
        """
        try:
            self._connection.send(work)
            if self._connection.poll(seconds):
                return self._connection.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode
            raise RuntimeError(f"the compiler's process ended with exit code {code}") from None
        raise RuntimeError(f"the compiler took longer than {seconds:g} s")

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self._connection.close()


class Compilers:
    """A pool of processes that compile for one GPU; each result is `problem_of`'s.

    multiprocessing's own pool waits for ever where a process died, and an executor gives up all
    work then. This is a context manager; leaving it ends the processes at once.
    """

    def __init__(self, jobs: int, capability: int, device: Device, seconds: float = SECONDS):
        self._target = capability, device
        self._seconds = seconds
        self._queue: queue.PriorityQueue = queue.PriorityQueue()
        self._order = itertools.count()  # first come, first served, within a priority
        self._closed = threading.Event()
        self._running: set[_Compiler] = set()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(jobs)]
        for thread in self._threads:
            thread.start()

    def submit(self, work: Work, priority: int = ORDINARY) -> "Future[str | None]":
        """Queue one piece of work, before all others where it is urgent."""
        future: Future[str | None] = Future()
        self._queue.put((priority, next(self._order), work, future))
        return future

    def __enter__(self) -> "Compilers":
        return self

    def __exit__(self, *_exception: Any) -> None:
        self._closed.set()
        for compiler in tuple(self._running):
            compiler.process.kill()
        for _ in self._threads:
            self._queue.put((_END, next(self._order), None, None))
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        """Run one thread, which has one process at a time do the work."""
        compiler: _Compiler | None = None
        while True:
            _, _, work, future = self._queue.get()
            if work is None:
                break
            if self._closed.is_set():
                future.cancel()
                continue
            if compiler is None:
                compiler = _Compiler(*self._target)
                self._running.add(compiler)
                if self._closed.is_set():  # `__exit__` has not seen the new process
                    compiler.process.kill()
            try:
                future.set_result(compiler.ask(work, self._seconds))
            except RuntimeError as error:
                self._running.remove(compiler)
                compiler.stop()
                compiler = None
                future.set_result(str(error))
        if compiler is not None:
            compiler.stop()
