"""What a plan of launches has to know of the CUDA kernels, from csrc/ as it is."""

import ctypes
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest

from adapterkern.backends.cuda import extension
from adapterkern.backends.cuda.facts import Facts, read_facts

sys.path.append(str(Path(__file__).parent / "emulator"))
import cuda_emulator


@cache
def of_the_sources() -> Facts:
    """Compile csrc/facts.cu for the CPU, which takes a second, and ask it; or the extension."""
    if cuda_emulator.missing() is not None:
        module = extension.load().module
        if module is None:
            pytest.skip(f"{cuda_emulator.missing()}, or the extension")
        return read_facts(module.facts())
    with tempfile.TemporaryDirectory() as folder:
        library = cuda_emulator.build(Path(folder), "facts.cpp", flags=["-O0"])
        return read_facts(cuda_emulator.facts_of(ctypes.CDLL(str(library))))
