"""Folders to write into before files move into place, locked while their writers live."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

try:
    import fcntl
except ImportError:  # Windows, where a folder cannot be locked
    fcntl = None  # type: ignore[assignment]

STAGE = ".saving-"
ABANDONED_SECONDS = 24 * 3600.0  # of a stage without a lock, where nothing else tells


@contextmanager
def stage_in(parent: str | os.PathLike, prefix: str = STAGE) -> Iterator[str]:
    """Yield a new folder in `parent` that is locked, and goes with the block.

    Raises:
        OSError: no folder can be made there.
    """
    stage, held = _locked_stage(parent, prefix)
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if held is not None:
            os.close(held)


def _locked_stage(parent: str | os.PathLike, prefix: str) -> tuple[str, int | None]:
    while True:
        stage = tempfile.mkdtemp(dir=parent, prefix=prefix)
        try:
            held = lock(stage)
        except (BlockingIOError, FileNotFoundError):  # swept before it was locked
            continue
        except OSError:
            return stage, None
        if os.path.isdir(stage):
            return stage, held
        os.close(held)


def sweep(stages: Iterable[str | os.PathLike]) -> None:
    """Remove the stages, among these, of writers that are dead."""
    for stage in stages:
        if not os.path.isdir(stage):
            continue
        try:
            held = lock(stage)
        except (BlockingIOError, FileNotFoundError):
            continue
        except OSError:
            if time.time() - os.stat(stage).st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(stage, ignore_errors=True)
            continue
        shutil.rmtree(stage, ignore_errors=True)
        os.close(held)


def lock(folder: str | os.PathLike, patience: float = 0.0) -> int:
    """A descriptor that holds the folder's lock until it is closed or the process ends.

    Raises:
        BlockingIOError: another one holds it, and has for that many seconds.
        OSError: this system or file system has no locks.
    """
    if fcntl is None:
        raise OSError("no locks on this system")
    end = time.monotonic() + patience
    descriptor = os.open(folder, os.O_RDONLY)
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except OSError as error:
            if not isinstance(error, BlockingIOError) or time.monotonic() > end:
                os.close(descriptor)
                raise
        time.sleep(0.001)
