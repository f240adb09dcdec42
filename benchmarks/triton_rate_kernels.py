"""Two Triton kernels: one that reads from L2 only, one that does nothing."""

import triton
import triton.language as tl


@triton.jit
def read_kernel(source_ptr, sum_ptr, num_blocks, num_passes, BLOCK: tl.constexpr):
    """Each program reads an equal share of the blocks, another share in each pass.

    `.cg` reads past L1; the moving share keeps a program from finding its own blocks there anyway.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    offset = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for turn in range(num_passes):
        for step in range(tl.cdiv(num_blocks, programs)):
            block = (program + turn * 7 + step * programs) % num_blocks
            total += tl.load(source_ptr + block * BLOCK + offset, cache_modifier=".cg")
    tl.store(sum_ptr + program, tl.sum(total, 0))


@triton.jit
def empty_kernel(a_ptr, b_ptr, c_ptr, d_ptr, e_ptr, f_ptr, g_ptr, first, second, third):
    """Stores one number, so that it is not removed."""
    tl.store(a_ptr, first + second + third)
