"""The kernel backends on CPU tensors, with launches that do nothing: their host work is left."""

import contextlib
from collections.abc import Iterator
from unittest import mock

from adapterkern.backends.base import Backend
from adapterkern.backends.cuda.backend import CudaBackend
from adapterkern.backends.cuda.facts import Device

NAMES = ("cuda", "triton", "triton-row-block")  # few tokens take two kernels forward, rows one


class _NoKernels:
    """In the place of the CUDA extension."""

    def forward(self, packed: bytes, device: int, stream: int) -> None: ...
    def backward(self, packed: bytes, device: int, stream: int) -> None: ...


@contextlib.contextmanager
def free_launches(name: str) -> Iterator[Backend]:
    """Within the block, the backend of one of NAMES; Triton compiles its kernels at first use."""
    if name == "cuda":
        yield CudaBackend(_NoKernels(), Device(num_sms=132))
        return
    from adapterkern.backends.triton import compile_only, launch_config
    from adapterkern.backends.triton.backend import TritonBackend

    # Triton keeps the launcher of a kernel for each GPU: no other stand-in has this much memory.
    num_sms = 1 if name == "triton-row-block" else 132
    device = launch_config.Device(num_sms, shared_memory=228 * 1024)

    def launch(*arguments: object) -> None: ...

    with (
        mock.patch.object(compile_only._StandIn, "launcher_cls", return_value=launch),
        compile_only.compile_only(90, device),
    ):
        yield TritonBackend()
