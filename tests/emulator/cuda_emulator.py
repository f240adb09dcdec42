"""csrc/ compiled for the CPU: the same kernels, with `include/` in place of the GPU."""

import ctypes
import itertools
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[1] / "csrc"
COMPILER = shutil.which("g++")

ROUND_ROBIN = 0  # copies are carried out at their wait
RUN_AHEAD = 1  # one warp runs far ahead of the others; copies are carried out at once
SCHEDULES = {"round_robin": ROUND_ROBIN, "run_ahead": RUN_AHEAD, "run_ahead_late_copies": 2}

# Kernels move memory of any type in words, which nvcc allows.
# With -O2 the compiler takes half as long again, and the kernels run as fast.
FLAGS = ("-std=c++17", "-O1", "-fno-strict-aliasing", "-fPIC", "-shared", "-Wall",
         "-Wno-unknown-pragmas")  # fmt: skip
# Instrumented code takes four times as long to optimise, and the few cases run half as long again.
SANITIZER_FLAGS = ("-O0", "-g", "-fsanitize=address", "-fno-omit-frame-pointer")


def missing() -> str | None:
    """Return why the emulator cannot be built here; None if it can."""
    if COMPILER is None:
        return "needs g++"
    if platform.machine() != "x86_64":
        return f"the emulator's fibres are written for x86-64, this is {platform.machine()}"
    return None


def build(
    folder: Path,
    source: str = "library.cpp",
    flags: Sequence[str] = (),
    changes: Mapping[str, Sequence[tuple[str, str]]] | None = None,
) -> Path:
    """Compile `source` with copies of csrc/ in `folder`; return the shared library.

    Args:
        changes: file of csrc/ to (text, replacement) pairs; each text must occur exactly once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in SOURCES.iterdir():
        if path.suffix in (".cu", ".cuh", ".h"):
            text = path.read_text()
            for old, new in (changes or {}).get(path.name, ()):
                assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times in {path}"
                text = text.replace(old, new)
            (folder / path.name).write_text(text)
    for path in (HERE / "include").iterdir():  # their twins replace ptx.cuh and launch.cuh
        shutil.copy(path, folder)
    library = folder / "library.so"
    command = [COMPILER, *FLAGS, *flags, f"-I{folder}", "-x", "c++", str(HERE / source)]
    done = subprocess.run([*command, "-o", str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    return library


def narrowed(*dtypes: str) -> dict[str, list[tuple[str, str]]]:
    """Return changes that leave these element types, for 17 <= R <= 32: a fifteenth of the work."""
    text = (SOURCES / "static_switch.h").read_text()
    cases = re.findall(r"^ *case k\w+:\n *return body\(Type<(\w+)>\(\)\);\n", text, re.MULTILINE)
    dropped = [rf"^ *case k\w+:\n.*Type<{name}>.*\n" for name in cases if name not in dtypes]
    dropped += [rf"^ *if \(bottleneck_size <= {width}\) .*\n" for width in (16, 64, 128, 256)]
    lines = [re.search(pattern, text, re.MULTILINE)[0] for pattern in dropped]
    return {"static_switch.h": [(line, "") for line in lines]}


class Emulator:
    """Stands in for the extension `adapterkern._cuda`, for tensors on the CPU."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        for function in (self.library.emulated_forward, self.library.emulated_backward):
            function.restype = ctypes.c_char_p
            function.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint]
        self.seed = ROUND_ROBIN

    def forward(self, packed: bytes, device: int, stream: int) -> None:
        _check(self.library.emulated_forward(packed, len(packed), self.seed))

    def backward(self, packed: bytes, device: int, stream: int) -> None:
        _check(self.library.emulated_backward(packed, len(packed), self.seed))

    def facts(self) -> tuple:
        return facts_of(self.library)


def facts_of(library: ctypes.CDLL) -> tuple:
    """Return what `adapterkern._cuda.facts` would, from a library that holds facts.cpp."""
    room = (ctypes.c_int64 * 1024)()
    library.launch_facts(room)
    numbers = iter(room)

    def rows(width: int) -> list[tuple]:
        return [tuple(itertools.islice(numbers, width)) for _ in range(next(numbers))]

    lists = next(numbers), next(numbers), rows(11), rows(11), rows(7), rows(4)
    return *lists, tuple(itertools.islice(numbers, 9))


def _check(error: bytes | None) -> None:
    if error is not None:
        raise RuntimeError(error.decode())
