"""The machine code of the kernels of y, dz and dx does what their plan counts on."""

import re

import cuda_sass
import pytest
import sass
from cuda_sass import ARCHS, LOCAL_MEMORY
from sass import Instruction, Loop

from adapterkern.backends.cuda import launch_config

REGISTERS = 65536  # of an SM
SHAPE = re.compile(r"RowBlockShapeI(f|6__half|13__nv_bfloat16|S\d*_)Li(\d+)ELb([01])E")
EMPTY = 50  # instructions; kernels that an architecture has no use for trap at once


def kernels(arch: str, name: str) -> dict[str, list[Instruction]]:
    """The kernels called `name` that do something on an architecture, by their mangled names."""
    found = {
        n: code for n, code in cuda_sass.sass(arch).items() if cuda_sass.kernel_name(n) == name
    }
    return {n: code for n, code in found.items() if sass.count(code) > EMPTY}


def halves(found: dict[str, list[Instruction]]) -> dict[str, list[Instruction]]:
    return {n: code for n, code in found.items() if re.search("__half|__nv_bfloat16", n)}


def loops_with(code: list[Instruction], *names: str) -> list[Loop]:
    """The loops that hold instructions of all these names."""
    return [loop for loop in sass.loops(code) if all(loop.count(name) for name in names)]


def the_fact(name: str) -> launch_config.RowBlockFacts:
    """What the plan knows of a row-block shape, found by its mangled name."""
    scalar, width, large = SHAPE.search(name).groups()
    half = "__half" in name or "__nv_bfloat16" in name
    assert half or scalar in "f" or scalar.startswith("S")  # S: TFloat32, named before
    (fact,) = (
        fact
        for fact in launch_config.facts().row_blocks
        if (fact.half, fact.width, fact.large) == (half, int(width), large == "1")
    )
    return fact


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("policy", ["Forward", "Backward"])
def test_product_into_the_bottleneck_waits_for_copies_alone(arch, policy):
    """One step: a barrier, cp.async of 16 bytes, ldmatrix and products."""
    seen = 0
    for kernel in ("bottleneck_row_block_kernel", "bottleneck_split_first_kernel"):
        for name, code in halves(kernels(arch, kernel)).items():
            if policy not in name:
                continue
            first = min(loops_with(code, "HMMA", "LDGSTS", "BAR"), key=lambda loop: loop.span)
            fact = the_fact(name)
            block_h = fact.added_bytes // fact.tokens // 2 - 8
            elements = (fact.tokens + fact.width) * block_h
            assert first.count("LDGSTS") == elements // 8 // fact.threads, name
            products = fact.tokens * fact.width * block_h // (16 * 8 * 16)
            assert first.count("HMMA") == products // (fact.threads // 32), name
            assert first.count("LDG", "STG", "MUFU", *LOCAL_MEMORY) == 0, name
            assert first.count("BAR") == 1, name
            seen += 1
    assert seen == 2 * 2 * 5


@pytest.mark.parametrize("arch", ARCHS)
def test_rows_are_added_from_shared_memory(arch):
    """The loop out of the bottleneck loads nothing into registers: all that is added is copied
    stages ahead. In the split form the loop also holds what precedes its first step, in which the
    partial sums are the only wide loads."""
    for name, code in halves(kernels(arch, "bottleneck_row_block_kernel")).items():
        out = max(loops_with(code, "HMMA", "STG", "LDGSTS"), key=lambda loop: loop.span)
        assert out.count("LDG", *LOCAL_MEMORY) == 0, name
        assert out.count("BAR") == 1, name
    for name, code in halves(kernels(arch, "bottleneck_split_second_kernel")).items():
        out = max(loops_with(code, "HMMA", "STG", "LDGSTS"), key=Loop.count)
        sums = [loop for loop in sass.innermost_loops(code) if loop.count("LDG")]
        wide = [i.address for i in out.instructions if i.opcode.startswith("LDG.E.128")]
        within = [i.address for loop in sums for i in loop.instructions if i.name == "LDG"]
        assert set(wide) <= set(within), name
        assert len(wide) == 8, name  # two for each of four slices
        (loop,) = (loop for loop in sums if wide[0] in [i.address for i in loop.instructions])
        assert cuda_sass.most_in_flight(loop.instructions) == 8, name


@pytest.mark.thorough
def test_cluster_reads_what_is_added_before_its_products():
    """Bias and scaling are in shared memory, z and the rows come by cp.async; the residual and
    skip of a lane are under way together while the products run."""
    found = kernels("sm_90a", "bottleneck_cluster_kernel")
    assert len(found) == 2 * (2 + 1) * 4 * 2  # the forward also with a norm
    for name, code in found.items():
        # With a norm the sum goes to shared memory, and from there out.
        store = "STS" if "NormForward" in name else "STG"
        innermost = sass.innermost_loops(code)
        (out,) = (
            loop
            for loop in innermost
            if loop.count(store) and loop.count("HMMA") and loop.count("LDG")
        )
        first = next(i for i, each in enumerate(out.instructions) if each.name == "HMMA")
        assert sass.count(out.instructions[first:], "LDG") == 0, name
        assert cuda_sass.most_in_flight(out.instructions) >= 2, name
        walk = max(loops_with(code, "HMMA", "LDGSTS"), key=Loop.count)
        loads = walk.count("LDG") - out.count("LDG")
        assert loads <= 18, name  # of z, where R is not whole vectors wide: nine for each of two


@pytest.mark.parametrize("arch", ARCHS)
def test_no_adapter_kernel_computes_in_double_precision_or_local_memory(arch):
    for name in ("row_block", "split_first", "split_second", "cluster"):
        for mangled, code in kernels(arch, f"bottleneck_{name}_kernel").items():
            assert not cuda_sass.in_double(code), mangled
            assert sass.count(code, *LOCAL_MEMORY) == 0, mangled


@pytest.mark.parametrize("arch", ARCHS)
def test_registers_allow_the_blocks_that_the_plan_puts_on_an_sm(arch):
    used = cuda_sass.resources()[arch]
    for kernel in ("row_block", "split_first", "split_second"):
        for name in kernels(arch, f"bottleneck_{kernel}_kernel"):
            fact = the_fact(name)
            assert used[name]["REG"] * fact.threads * fact.blocks_per_sm <= REGISTERS, name
    if arch == "sm_90a":
        (threads,) = {fact.threads for fact in launch_config.facts().clusters}
        for name in kernels(arch, "bottleneck_cluster_kernel"):
            assert used[name]["REG"] * threads <= REGISTERS, name


@pytest.mark.parametrize(
    ("arch", "empty"),
    [
        pytest.param("sm_80", {"large", "cluster", "resident"}, marks=pytest.mark.thorough),
        ("sm_90a", {"small"}),
    ],
)
def test_an_architecture_has_the_tiles_that_its_devices_have_room_for(arch, empty):
    """The others would be machine code that is never run."""
    for name, code in cuda_sass.sass(arch).items():
        kernel, shape = cuda_sass.kernel_name(name), SHAPE.search(name)
        if kernel in ("bottleneck_cluster_kernel", "bottleneck_resident_kernel"):
            kind = kernel.split("_")[1]
        elif kernel == "bottleneck_grouped_tiles_kernel":
            kind = "of 64 tokens"  # tiles of many adapters, of one size for every device
        elif not shape or shape[2] not in ("64", "128") or name not in halves({name: code}):
            continue
        else:
            kind = "large" if shape[3] == "1" else "small"
        assert (sass.count(code) <= EMPTY) == (kind in empty), name


@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_stay_small(arch):
    """Rare code stands out of line and once, and no activation is unrolled over a whole vector."""
    for kernel, most in (("row_block", 4800), ("split_first", 2200), ("split_second", 4300),
                         ("cluster", 6900)):  # fmt: skip
        for name, code in kernels(arch, f"bottleneck_{kernel}_kernel").items():
            assert sass.count(code) <= most, name
