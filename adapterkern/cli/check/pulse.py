"""A sign of life while a case, or the start of a process, takes long."""

import sys
import threading
import time

SECONDS = 5.0


class Pulse:
    """Within the block, a line on stderr after each SECONDS in which nothing was printed.

    Args:
        doing: what is being done.
        silent: whether there is to be no such line.
    """

    def __init__(self, doing: str, silent: bool = False) -> None:
        self._silent = silent
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.now(doing)

    def __enter__(self) -> "Pulse":
        if not self._silent:
            self._thread.start()
        return self

    def __exit__(self, *_exc_info: object) -> None:
        self._ended.set()
        if not self._silent:
            self._thread.join()

    def now(self, doing: str) -> None:
        """Something may have been printed, and this is done next."""
        self._doing, self._since = doing, time.monotonic()

    def _run(self) -> None:
        told = 0.0
        while not self._ended.wait(SECONDS / 10):
            now, since = time.monotonic(), self._since
            if now - max(since, told) >= SECONDS:
                told = now
                print(f"... {now - since:.0f} s: {self._doing}", file=sys.stderr, flush=True)
