"""Folders that are written as a whole: a reader, or a crash, meets the old one or the new one.

Two files cannot be replaced at once, but two folders can change places: `written_whole` fills a new
folder beside the old one and has the kernel swap them. Where that is not possible (another system
than Linux, a mount point, a parent that may not be written) `placed` moves the files one by one.
"""

import contextlib
import ctypes
import glob
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from adapterkern.integrations.staging import STAGE, stage_in, sweep

_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


@contextlib.contextmanager
def written_whole(folder: str | os.PathLike, replaced: Sequence[str]) -> Iterator[str]:
    """Yield an empty folder to write into; its files are those of `folder` when the block ends.

    Until then nothing in `folder` changes, and an error leaves it, and the folders above it, as
    they were. What a killed process left beside `folder` goes at the next time.

    Args:
        folder: the folder to write, new or old.
        replaced: names that are gone afterwards where the block did not write them; all other
            files stay. The last of them is what makes the folder complete: where files are moved
            one by one it is removed first and put last.
    """
    target = Path(os.path.realpath(folder))
    made = [path for path in (target, *target.parents) if not path.is_dir()]
    try:
        target.mkdir(parents=True, exist_ok=True)
        beside_it = target.parent.glob(glob.escape(_prefix(target)) + "*")
        sweep((*beside_it, *target.glob(f"{STAGE}*")))
        with contextlib.ExitStack() as stack:
            # Beside it, for one rename of the whole; else within it, for one of each file.
            beside = _stage(stack, target.parent, _prefix(target))
            fresh = beside or _stage(stack, target, STAGE)
            if fresh is None:
                raise PermissionError(
                    f"{target} cannot be written: no new files are allowed there."
                )
            yield str(fresh)
            if not (beside and _exchange(fresh, target, replaced)):
                _place(fresh, target, replaced)
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()  # only if it is empty
        raise


def _prefix(target: Path) -> str:
    return f".{target.name}{STAGE}"


def _stage(stack: contextlib.ExitStack, parent: Path, prefix: str) -> Path | None:
    """A stage that goes with the stack; None where no folder may be made."""
    with contextlib.suppress(OSError):
        return Path(stack.enter_context(stage_in(parent, prefix)))
    return None


def _exchange(fresh: Path, target: Path, replaced: Sequence[str]) -> bool:
    """Let the two folders change places, with the old one's other files in both; whether it did."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    try:
        shutil.copystat(target, fresh)
        _carry(target, fresh, replaced)
    except OSError:
        return False
    paths = os.fsencode(fresh), os.fsencode(target)
    if rename(_HERE, paths[0], _HERE, paths[1], _EXCHANGE) != 0:
        return False
    with contextlib.suppress(OSError):
        _carry(fresh, target, replaced)  # what others put there in the meantime
    return True


def _carry(source: Path, target: Path, replaced: Sequence[str]) -> None:
    """Link or copy what the source has and the target lacks."""
    for path in source.iterdir():
        place = target / path.name
        if path.name in replaced or path.name.startswith(STAGE) or os.path.lexists(place):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, place, symlinks=True, copy_function=_link)
        else:
            _link(path, place)


def _link(source: str | os.PathLike, target: str | os.PathLike) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without links
        shutil.copy2(source, target, follow_symlinks=False)


def _place(fresh: Path, target: Path, replaced: Sequence[str]) -> None:
    """Move the files one by one, so that an incomplete folder lacks what completes it."""
    for name in reversed(replaced):
        with contextlib.suppress(FileNotFoundError):
            os.remove(target / name)
    for name in sorted(os.listdir(fresh), key=lambda name: name == replaced[-1]):
        os.replace(fresh / name, target / name)
