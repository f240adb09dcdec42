"""Ctrl-C, SIGTERM and SIGHUP end a command in one way: as KeyboardInterrupt(number of the signal).

What a command does then, such as ending its processes, is not interrupted in its turn: people press
Ctrl-C twice, and a closed terminal sends more than one signal. To say what was done so far, a
command raises the KeyboardInterrupt that `told` makes, whose sentence `report` prints.
"""

import contextlib
import math
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from typing import Any

WIDTH = 80
# Within these seconds a second signal is taken as one with the first. Later it interrupts again: a
# library may have swallowed the first.
GRACE = 2.0
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # the last is not on Windows
SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))


class _Interrupter:
    """The handler of the signals, and what it has to remember."""

    def __init__(self) -> None:
        self.raised_at = -math.inf
        self.holds = 0
        self.put_off: int | None = None
        self.is_over = False  # the command has ended by a signal

    def __call__(self, number: int, _frame: Any) -> None:
        if self.is_over or time.monotonic() - self.raised_at < GRACE:
            return
        if self.holds:
            self.put_off = number
            return
        self.raised_at = time.monotonic()
        raise KeyboardInterrupt(number)


_interrupter = _Interrupter()


@contextlib.contextmanager
def handled(ends_process: bool) -> Iterator[None]:
    """Within the block the signals raise KeyboardInterrupt(number).

    A signal that the caller ignores, as nohup does, or has a handler for, is left alone. Where the
    process ends after the block, and a signal has ended the block, further ones are ignored.
    """
    global _interrupter
    in_main_thread = threading.current_thread() is threading.main_thread()
    defaults = (signal.SIG_DFL, signal.default_int_handler)
    before = {number: signal.getsignal(number) for number in SIGNALS if in_main_thread}
    mine = {number: handler for number, handler in before.items() if handler in defaults}
    _interrupter = interrupter = _Interrupter()
    for number in mine:
        signal.signal(number, interrupter)
    try:
        yield
    finally:
        ended = ends_process and interrupter.is_over
        for number, handler in mine.items():
            # Python's own shutdown puts handlers back, but leaves what is ignored.
            signal.signal(number, signal.SIG_IGN if ended else handler)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Put a signal off to the end of the block, for work that must not be left half done: a process
    that is started but not yet in the care of a `try`, a file that is renamed.
    """
    interrupter = _interrupter
    interrupter.holds += 1
    try:
        yield
    finally:
        interrupter.holds -= 1
        number = interrupter.put_off
        if not interrupter.holds and number is not None:
            interrupter.put_off = None
            interrupter(number, None)


@contextlib.contextmanager
def children_undisturbed() -> Iterator[None]:
    """Processes that the block starts hear none of the signals: a terminal sends Ctrl-C to them
    too, and they would report it beside their parent, whose care it is to end them.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # a new process inherits the mask
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def number_of(interrupt: KeyboardInterrupt) -> int:
    """The signal that was meant; SIGINT where Python's own handler raised."""
    return interrupt.args[0] if interrupt.args else signal.SIGINT


def told(interrupt: KeyboardInterrupt, sentence: str) -> KeyboardInterrupt:
    """The exception to raise in its place, with what `report` is to print ("": nothing)."""
    return KeyboardInterrupt(number_of(interrupt), sentence)


def report(interrupt: KeyboardInterrupt) -> int:
    """Print the sentence on stderr, or that the command was interrupted; return the exit code."""
    _interrupter.is_over = True
    number = number_of(interrupt)
    name = signal.Signals(number).name
    sentence = interrupt.args[1] if len(interrupt.args) > 1 else f"adapterkern: ended by {name}"
    with contextlib.suppress(OSError):  # the terminal may be gone, and with it the reader
        sys.stdout.flush()
    if sentence:
        with contextlib.suppress(OSError):
            lines = textwrap.fill(sentence, WIDTH, break_long_words=False, break_on_hyphens=False)
            print(lines, file=sys.stderr, flush=True)
    # An interrupt that passes through code in a string, as dataclasses and namedtuples are made of,
    # lets Python end `python -m` by a signal of its own; code in a string that ends well undoes it.
    exec("")
    return 128 + number
