"""What a run has done so far, for the sentence of one that is stopped. Imports nothing heavy."""

import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

SCRATCH = ".writing-*"  # folders in which files are written before they get their place


@dataclass
class Story:
    """A run that writes to `out`."""

    out: Path
    finished: list[str] = field(default_factory=list)
    written: list[str] = field(default_factory=list)  # in `out`
    start: float = field(default_factory=time.monotonic)
    made: list[Path] = field(
        default_factory=list
    )  # folders that were not there, the innermost first
    _scratch_before: set[Path] = field(default_factory=set)

    def make_folder(self) -> None:
        """Make `out`, and remember which folders were not there.

        Raises:
            OSError: that is not possible.
        """
        wanted = [self.out / "adapters", self.out, *self.out.parents]
        self.made = [folder for folder in wanted if not folder.exists()]
        self._scratch_before = self._scratch()
        self.out.mkdir(parents=True, exist_ok=True)

    def tidy(self) -> None:
        """Remove what is half-written, and the folders made by this run that hold nothing."""
        for folder in self._scratch() - self._scratch_before:
            shutil.rmtree(folder, ignore_errors=True)
        for folder in self.made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def sentence(self, doing: str) -> str:
        """What was being done, what is finished and what is written."""
        finished = ", ".join(self.finished) or "nothing"
        written = ", ".join(self.written)
        kept = f"{written} written to {self.out}" if written else f"nothing written to {self.out}"
        seconds = time.monotonic() - self.start
        return f"stopped while {doing} after {seconds:.0f} s; finished: {finished}; {kept}"

    def _scratch(self) -> set[Path]:
        return {*self.out.glob(SCRATCH), *(self.out / "adapters").glob(SCRATCH)}
