"""Plans and compiles calls for a GPU that is not used, or not present.

`kernel[grid](...)` binds its arguments, specialises on them, compiles for the target, loads the
binary and launches it. Within `compile_only` Triton's driver is a stand-in for a GPU of the given
properties and CPU tensors count as that GPU's: the backend's own launches run up to the last step,
which records instead of launching. Triton's cache on disk holds the compiled kernels under the keys
of the real launches, so that a process with the GPU loads them from there.
"""

import contextlib
import functools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from adapterkern.backends.triton import backend, launcher
from adapterkern.backends.triton.launch_config import Device

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
# ptxas keeps a few bytes of stack in some kernels at no cost; more would be spills in the loops.
MOST_STACK_BYTES = 32


@dataclass(frozen=True, eq=False)
class Launch:
    """A recorded launch. shared: bytes of shared memory of a block."""

    kernel: str
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    shared: int
    cubin: bytes = field(repr=False)


class Resources(NamedTuple):
    """The registers of one thread, and the bytes of its stack, which holds spilled registers."""

    registers: int
    stack: int


@functools.lru_cache(maxsize=4096)
def resources(cubin: bytes) -> Resources:
    """Read the resources of a binary with the disassembler in Triton's wheel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise ValueError(f"{CUOBJDUMP} tells of no registers: {usage[:200]!r}")
    return Resources(int(found[1]), int(found[2]))


class _StandIn:
    """Takes the place of triton.runtime.driver.active."""

    def __init__(self, capability: int, device: Device) -> None:
        self.capability, self.device = capability, device
        self.launches: list[Launch] = []

    def get_current_device(self) -> Any:
        # Triton keeps a GPU's target, kernels and limits under this index: 0 would be the process's
        # real GPU, and the same for stand-ins of different properties.
        return self.capability, self.device

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    @property
    def utils(self) -> Any:
        def load_binary(name: str, cubin: bytes, shared: int, device: Any) -> tuple:
            # These stand for module, function, registers, spills and the most threads a block.
            return None, cubin, 0, 0, 1024

        limit = {"max_shared_mem": self.device.shared_memory}
        return SimpleNamespace(get_device_properties=lambda device: limit, load_binary=load_binary)

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launch(x, y, z, stream, function, packed, meta, enter, leave, *arguments):
            # Ask for the present stand-in: cached kernels outlive the one they were loaded under.
            driver.active.launches.append(
                Launch(
                    metadata.name,
                    (x, y, z),
                    dict(zip(source.fn.arg_names, arguments, strict=True)),
                    metadata.shared,
                    function,
                )
            )

        return launch


@contextlib.contextmanager
def compile_only(capability: int, device: Device) -> Iterator[list[Launch]]:
    """Within the block, calls of the triton backend on CPU tensors compile for this GPU and record
    their launches in the yielded list; they return uninitialised memory.

    A tile beyond the GPU's shared memory raises as it would there. Triton's driver is process-wide,
    and so is its stand-in: use this in a process of its own, or in a test.

    Args:
        capability: such as 90 for compute capability 9.0.
        device: the properties by which launches are planned.
    """
    stand_in = _StandIn(capability, device)
    before, planned = dict(vars(driver)), backend.cpu_device
    driver.set_active(stand_in)
    backend.cpu_device = device
    try:
        yield stand_in.launches
    finally:
        vars(driver).update(before)
        backend.cpu_device = planned
        launcher.forget()  # what holds the stand-in, and with it the recorded launches' tensors
