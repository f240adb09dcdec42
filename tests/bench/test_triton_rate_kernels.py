"""The calibration's Triton kernels compile for a GPU that is not here."""

import pytest

from adapterkern import _env

pytest.importorskip("triton", reason="triton is not installed")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import triton_rate_kernels

POINTERS = {
    "read_kernel": ("source_ptr", "sum_ptr"),
    "empty_kernel": tuple(f"{letter}_ptr" for letter in "abcdefg"),
}


@pytest.mark.skipif(_env.TRITON_INTERPRET, reason="the interpreter does not compile")
@pytest.mark.parametrize("name", POINTERS)
@pytest.mark.parametrize("capability", [80, 90])
def test_a_kernel_compiles(name, capability):
    kernel = getattr(triton_rate_kernels, name)
    signature = {
        argument: "*fp32" if argument in POINTERS[name] else "i32" for argument in kernel.arg_names
    }
    constants = {}
    if "BLOCK" in signature:
        signature["BLOCK"] = "constexpr"
        constants = {(kernel.arg_names.index("BLOCK"),): 4096}
    source = ASTSource(kernel, signature, constants)
    compiled = triton.compile(source, GPUTarget("cuda", capability, 32), {"num_warps": 8})
    text = compiled.asm["ptx"]
    if name == "read_kernel":
        assert "ld.global.cg" in text  # past L1
