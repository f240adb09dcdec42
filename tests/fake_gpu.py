"""A GPU that compiles but does not run, with CPU tensors in the place of its own.

`compile_only` brings Triton's whole launch path up to its last step, so a wrong argument order, an
option that does not compile or a tile beyond shared memory shows without a device. Here calls of
the package get there too, and what was compiled is counted.
"""

import contextlib
from dataclasses import dataclass, field

import pytest
import torch
from triton.backends.nvidia.compiler import CUDABackend

from adapterkern import dispatch
from adapterkern.backends.triton.backend import TritonBackend
from adapterkern.backends.triton.compile_only import Launch, compile_only
from adapterkern.backends.triton.launch_config import Device

H200 = Device(num_sms=132, shared_memory=227 * 1024)


@dataclass
class FakeGpu:
    """By default a card of capability 9.0. binaries: how many were made while it was in place, and
    not found in this process or in Triton's cache on disk.
    """

    capability: int = 90
    device: Device = H200
    launches: list[Launch] = field(default_factory=list)
    binaries: int = 0


@contextlib.contextmanager
def fake_gpu(gpu: FakeGpu):
    """CPU tensors count as the fake GPU's: the triton backend runs the package's calls on them."""
    make_cubin = CUDABackend.make_cubin

    def counted(*args, **options):
        gpu.binaries += 1
        return make_cubin(*args, **options)

    with pytest.MonkeyPatch.context() as patch, compile_only(gpu.capability, gpu.device) as seen:
        gpu.launches = seen
        patch.setattr(CUDABackend, "make_cubin", counted)
        patch.setattr(TritonBackend, "devices", frozenset({"cpu"}))
        patch.setattr(TritonBackend, "unavailable_reason", lambda _self: None)
        patch.setattr(dispatch, "_decisions", {})
        yield gpu


def pointers(launch: Launch) -> dict[str, torch.Tensor]:
    """Return the tensors among a launch's arguments."""
    given = launch.arguments.items()
    return {name: value for name, value in given if isinstance(value, torch.Tensor)}
