"""What the demo is doing, while it does it: a bar on a terminal, plain lines elsewhere."""

import sys

from tqdm import tqdm

PLAIN_EVERY = 20  # steps between two progress lines where there is no terminal


class Progress:
    """A bar on a terminal, otherwise a plain line every PLAIN_EVERY steps; on stderr either way.

    Args:
        label: what is being done.
        total: how many steps it takes.
        unit: what a step is.
    """

    def __init__(self, label: str, total: int, unit: str = "step") -> None:
        self.label, self.total, self.unit, self.done = label, total, unit, 0
        self.bar = tqdm(total=total, desc=label, unit=unit) if sys.stderr.isatty() else None

    def __enter__(self) -> "Progress":
        return self

    def advance(self, note: str = "") -> None:
        """One step more; `note` is shown beside it."""
        self.done += 1
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update()
        elif self.done % PLAIN_EVERY == 0 or self.done == self.total:
            shown = f"{self.label}: {self.unit} {self.done}/{self.total}"
            print(f"{shown}, {note}" if note else shown, file=sys.stderr, flush=True)

    def __exit__(self, *exc_info: object) -> None:
        if self.bar is not None:
            self.bar.close()
