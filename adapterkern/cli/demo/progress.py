"""What the demo is doing, while it does it: a bar on a terminal, plain lines elsewhere."""

import sys
import threading
import time

from tqdm import tqdm

LOOK = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
LOOK_WITHOUT_TOTAL = "{desc}: {n_fmt} {unit}s [{elapsed}{postfix}]"
TERMINAL_EVERY = 0.5  # seconds; the clock moves within a long step too
PLAIN_EVERY = 5.0  # seconds between two lines where there is no terminal

_running: "Progress | None" = None


def current() -> "Progress | None":
    """The phase that runs, or that an exception has just ended; None between two phases."""
    return _running


class Progress:
    """A phase of the run: a bar on a terminal, otherwise a plain line when it begins, every
    PLAIN_EVERY seconds, and when it ends; on stderr either way.

    Args:
        label: what is being done.
        total: how many steps it takes; None if nobody knows, or it is one.
        unit: what a step is.
    """

    def __init__(self, label: str, total: int | None = None, unit: str = "step") -> None:
        self.label, self.total, self.unit, self.done, self.note = label, total, unit, 0, ""

    def where(self) -> str:
        """The phase and its step in words: "training: topic, step 34 of 120"."""
        if self.total is None:
            return f"{self.label}, {self.unit} {self.done}" if self.done else self.label
        return f"{self.label}, {self.unit} {self.done} of {self.total}"

    def __enter__(self) -> "Progress":
        global _running
        _running = self
        self.start = time.monotonic()
        self.bar: tqdm | None = None
        if sys.stderr.isatty():
            look = LOOK if self.total is not None else LOOK_WITHOUT_TOTAL
            self.bar = tqdm(
                total=self.total, desc=self.label, unit=self.unit, bar_format=look,
                dynamic_ncols=True,
            )  # fmt: skip
        else:
            self._print(self.label)
        self.ended = threading.Event()
        self.clock = threading.Thread(target=self._tick, daemon=True)
        self.clock.start()
        return self

    def advance(self, note: str = "") -> None:
        """One step more; `note` is shown beside it."""
        self.done, self.note = self.done + 1, note
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update()

    def __exit__(self, kind: object, *exc_info: object) -> None:
        global _running
        try:
            self.ended.set()
            self.clock.join()
        finally:  # a Ctrl-C may come here too, and the bar's line has to end
            if self.bar is not None:
                self.bar.close()
        if self.bar is None and self.done:
            self._print(self._line())
        if kind is None:
            _running = None

    def _tick(self) -> None:
        """Shows that time passes, in a thread: a step may take minutes on a busy machine."""
        while not self.ended.wait(PLAIN_EVERY if self.bar is None else TERMINAL_EVERY):
            if self.bar is None:
                self._print(self._line())
            else:
                self.bar.refresh()

    def _line(self) -> str:
        count = f"{self.done}/{self.total}" if self.total is not None else str(self.done)
        parts = [f"{self.unit} {count}"] if self.done or self.total is not None else []
        parts += [self.note] if self.note else []
        return f"{self.label}: {', '.join([*parts, f'{time.monotonic() - self.start:.0f} s'])}"

    def _print(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)
