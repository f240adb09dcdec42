"""A GPU that compiles but does not run: Triton's whole launch path on the host, with the last step
recorded.

`kernel[grid](...)` binds its arguments, specialises, compiles for the target and would then hand
the binary to the driver. Here the driver is a stand-in, so a wrong argument order, an option that
does not compile or a tile beyond shared memory shows without a device.
"""

import contextlib
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from adapterkern.backends.triton import backend
from adapterkern.backends.triton.launch_config import Device


@dataclass
class Launch:
    kernel: str
    grid: tuple[int, int, int]
    arguments: dict[str, object]


@dataclass
class FakeGpu:
    """Stands in for triton.runtime.driver.active; a card of capability 9.0."""

    capability: int = 90
    device: Device = field(default_factory=lambda: Device(num_sms=132, shared_memory=227 * 1024))
    launches: list[Launch] = field(default_factory=list)
    record: bool = True

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    @property
    def utils(self):
        limit = {"max_shared_mem": self.device.shared_memory}
        return SimpleNamespace(
            get_device_properties=lambda device: limit,
            load_binary=lambda name, kernel, shared, device: (object(), object(), 0, 0, 1024),
        )

    def launcher_cls(self, source, metadata):
        def launch(grid_x, grid_y, grid_z, stream, function, packed, meta, enter, leave, *args):
            gpu = driver.active  # compiled kernels are cached and outlive the gpu that loaded them
            if gpu.record:
                bound = dict(zip(source.fn.arg_names, args, strict=True))
                gpu.launches.append(Launch(metadata.name, (grid_x, grid_y, grid_z), bound))

        return launch


@contextlib.contextmanager
def fake_gpu(gpu: FakeGpu):
    """CPU tensors count as the fake GPU's: the triton backend plans, compiles and launches for
    it.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "_INTERPRETED", gpu.device)
        patch.setattr(driver, "_active", gpu)
        backend._device.cache_clear()
        yield gpu
    backend._device.cache_clear()


def pointers(launch: Launch) -> dict[str, torch.Tensor]:
    """The tensors among a launch's arguments."""
    given = launch.arguments.items()
    return {name: value for name, value in given if isinstance(value, torch.Tensor)}
