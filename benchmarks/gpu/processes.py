"""Runs children in process groups of their own: passes their lines on, ends them by the clock."""

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# The kernel ends a child whose parent is killed (prctl's PR_SET_PDEATHSIG, 1), so that no orphan
# goes on using the device.
_BOUND = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGKILL); "
    "os.getppid() == int(sys.argv[1]) or sys.exit('the parent is gone'); "
    "os.execvp(sys.argv[2], sys.argv[2:])"
)
_REAP_SECONDS = 5.0  # a process that hangs in the driver may not even end when it is killed
_DRAIN_SECONDS = 1.0  # for output after its end, which its own children may still hold open


@dataclass(frozen=True)
class Ended:
    """How a child ended. code: negative is a signal, None: it hung and was killed by the clock."""

    name: str
    code: int | None
    seconds: float
    last_line: str

    @property
    def status(self) -> str:
        """The outcome in a word or two."""
        if self.code is None:
            return "out of time"
        return "passed" if self.code == 0 else "failed"

    def __str__(self) -> str:
        signalled = self.code is not None and self.code < 0
        how = f"signal {-self.code}" if signalled and self.code else f"code {self.code}"
        return self.status if self.code in (0, None) else f"{self.status} ({how})"


class Child:
    """One process. on_line receives each line of its output and the stream, "out" or "err"."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        on_line: Callable[["Child", str, str], None],
        environment: Mapping[str, str],
        folder: Path,
        stdin: bool = False,
    ) -> None:
        """Start it.

        Raises:
            OSError: this Python cannot be started.
        """
        self.name, self._on_line = name, on_line
        self.last_line = ""
        self._started = time.monotonic()
        self._bytes = {"out": b"", "err": b""}
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", _BOUND, str(os.getpid()), *command],
            stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=dict(environment),
            cwd=folder,
            start_new_session=True,
        )

    @property
    def streams(self) -> dict[str, int]:
        """The file descriptors to read from."""
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        return {"out": self.process.stdout.fileno(), "err": self.process.stderr.fileno()}

    def take(self, stream: str, data: bytes) -> None:
        """Pass on the lines that `data` completes; empty data is the end."""
        *lines, rest = (self._bytes[stream] + data).split(b"\n")
        self._bytes[stream] = rest if data else b""
        if not data and rest:
            lines.append(rest)
        for line in lines:
            text = line.decode("utf-8", errors="replace").rstrip("\r")
            if not text.startswith("{"):  # an object for this program tells a reader nothing
                self.last_line = text.strip() or self.last_line
            self._on_line(self, stream, text)

    def send(self, line: str) -> bool:
        """Write one line to its input; False if it is gone."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line.encode() + b"\n")
            self.process.stdin.flush()
        except (OSError, ValueError):  # a broken pipe, or one that was closed
            return False
        return True

    def kill(self) -> None:
        """End it and all that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_REAP_SECONDS)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def ended(self, late: bool) -> Ended:
        """Return its end, as far as it is known."""
        seconds = round(time.monotonic() - self._started, 1)
        if not late:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_REAP_SECONDS)
        return Ended(self.name, None if late else self.process.poll(), seconds, self.last_line)


def watch(
    children: Sequence[Child], deadline: float, until: Callable[[], bool] = lambda: False
) -> bool:
    """Pass lines on until every child has ended, `until` holds, or the deadline is over.

    Returns:
        Whether it ended before the deadline; the children are left as they are.
    """
    with selectors.DefaultSelector() as selector:
        for child in children:
            for stream, descriptor in child.streams.items():
                selector.register(descriptor, selectors.EVENT_READ, (child, stream))
        drain_until: dict[Child, float] = {}
        while not until():
            now = time.monotonic()
            if now >= deadline:
                return False
            waiting = {key.data[0] for key in selector.get_map().values()}
            for child in waiting:
                if child.process.poll() is not None:
                    drain_until.setdefault(child, now + _DRAIN_SECONDS)
            if all(drain_until.get(child, deadline + 1) <= now for child in waiting):
                return True  # also where nobody waits any more
            for key, _ in selector.select(min(0.2, deadline - now)):
                child, stream = key.data
                data = os.read(key.fd, 1 << 16)
                child.take(stream, data)
                if not data:
                    selector.unregister(key.fd)
    return True


def run(children: Sequence[Child], deadline: float) -> list[Ended]:
    """Let children run side by side until the deadline, and end what is left."""
    try:
        watch(children, deadline)
        for child in children:  # its output may end before it does
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(max(0.0, deadline - time.monotonic()))
        return [child.ended(late=child.process.poll() is None) for child in children]
    finally:
        for child in children:
            child.kill()
