"""The machine code of the weight gradients does what its plan counts on: see launch_config.py."""

import re

import cuda_sass
import pytest
import sass
from cuda_sass import ARCHS, LOCAL_MEMORY
from sass import Instruction, Loop

from adapterkern.backends.cuda import launch_config
from adapterkern.backends.cuda.facts import Problem
from adapterkern.backends.cuda.launch_config import FEW_STAGES, MANY_STAGES, TOKEN_STEP

THREADS, REGISTERS = 256, 65536  # of a block; of an SM
WARPS = THREADS // 32
HALF = re.compile(r"GradientShapeI(?:6__half|13__nv_bfloat16)Li(\d+)EEELb1E")


def kernels(arch: str, name: str) -> dict[str, list[Instruction]]:
    """The kernels called `name` in the extension, by their mangled names."""
    return {n: code for n, code in cuda_sass.sass(arch).items() if cuda_sass.kernel_name(n) == name}


def gradient_kernels(arch: str, direct: bool) -> dict[str, list[Instruction]]:
    found = kernels(arch, "bottleneck_bwd_dw_kernel")
    chosen = {name: code for name, code in found.items() if f"ELb{int(direct)}E" in name}
    assert len(found) == 2 * len(chosen) == 16  # four precisions, two tiles
    return chosen


def step_loop(code: list[Instruction]) -> Loop:
    """The loop over the steps of the tokens: the one with the barrier."""
    (loop,) = (loop for loop in sass.loops(code) if loop.count("BAR"))
    return loop


@pytest.mark.parametrize("arch", ARCHS)
def test_weight_gradients_compute_no_activation_and_nothing_in_double(arch):
    for direct in (False, True):
        for name, code in gradient_kernels(arch, direct).items():
            assert sass.count(code, "MUFU") == 0, name
            assert cuda_sass.in_double(code) == [], name
            assert sass.count(code, *LOCAL_MEMORY) == 0, name


@pytest.mark.parametrize("arch", ARCHS)
def test_steps_load_by_cp_async_alone_all_stages_but_one_ahead(arch):
    """A step waits until the groups of all stages but two are pending, then starts another."""
    for name, code in gradient_kernels(arch, direct=True).items():
        loop = step_loop(code)
        assert loop.count("LDG") == loop.count("STG") == 0, name
        waits = {i.text.split()[-1] for i in loop.instructions if i.name == "DEPBAR"}
        assert waits == {hex(MANY_STAGES - 2), hex(FEW_STAGES - 2)}, name
        assert loop.count("LDGDEPBAR") == 1, name
        assert loop.count("BAR") == 1, name


@pytest.mark.parametrize("arch", ARCHS)
def test_step_of_half_precision_holds_its_products_and_little_else(arch):
    """A step takes 880 cycles at the floor of an H200, where each of the four schedulers of an SM
    issues the instructions of two warps."""
    chosen = {n: code for n, code in gradient_kernels(arch, direct=True).items() if HALF.search(n)}
    assert len(chosen) == 4
    for name, code in chosen.items():
        units, loop = int(HALF.search(name)[1]), step_loop(code)
        fact = launch_config.facts().gradient(Problem(1, 1, units, True))
        assert (units, 256) == (fact.units, fact.features)
        copied = 16 * THREADS * loop.count("LDGSTS")
        assert copied == TOKEN_STEP * (units + 256) * 2, name
        products = units * 256 * TOKEN_STEP // (16 * 8 * 16) // WARPS
        of_sums = 2 * 256 * TOKEN_STEP // (8 * 16) // WARPS  # of dy's columns, or else dz's
        assert loop.count("HMMA") == products + of_sums, name
        assert loop.count() <= 300, name
        assert len(code) <= 1000, name


@pytest.mark.parametrize("arch", ARCHS)
def test_blocks_an_sm_are_those_of_the_plan(arch):
    """An SM holds one block of the gradients, whose threads may take every register, and two of the
    sums."""
    used = cuda_sass.resources()[arch]
    for name, blocks in ("bottleneck_bwd_dw_kernel", 1), ("bottleneck_bwd_dw_sum_kernel", 2):
        for mangled in kernels(arch, name):
            assert used[mangled]["REG"] * THREADS * blocks <= REGISTERS, mangled
            assert used[mangled]["STACK"] == 0, mangled


@pytest.mark.parametrize("arch", ARCHS)
def test_converted_tiles_have_a_whole_step_of_float32_under_way(arch):
    """A thread loads its 32 features of a step in eight vectors, or 16 in four where the products
    are in float32, before it uses the first."""
    for name, code in gradient_kernels(arch, direct=False).items():
        loop = step_loop(code).instructions
        wide = [at for at, i in enumerate(loop) if i.opcode.startswith("LDG.E.128")]
        vectors = 8 if re.search("__half|__nv_bfloat16", name) else 4
        windows = [
            loop[first : last + 1] for first, last in zip(wide, wide[vectors - 1 :], strict=False)
        ]
        assert vectors in map(cuda_sass.most_in_flight, windows), name


@pytest.mark.parametrize("arch", ARCHS)
def test_sums_over_the_slices_have_sixteen_loads_under_way(arch):
    ((name, code),) = kernels(arch, "bottleneck_bwd_dw_sum_kernel").items()
    assert sass.count(code, "MUFU", *LOCAL_MEMORY) == 0
    loops = [loop for loop in sass.innermost_loops(code) if loop.count("LDG")]
    assert len(loops) == 4  # of both weights and both biases
    for loop in loops:
        assert cuda_sass.most_in_flight(loop.instructions) == 16, name
    assert sum("LDG.E.128" in i.opcode for loop in loops for i in loop.instructions) == 2 * 16
