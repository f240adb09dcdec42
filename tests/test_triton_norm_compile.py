"""The kernels of a norm as they compile for GPUs that are not here: they fit, keep their registers,
and read back in whole vectors, under way while they compute.

Each case is a plan of its own: a row block of each height, a width with and without masks, and the
kernels that have rows to themselves.
"""

from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import sass
import triton_sass
from compile_pool import few_or_all, outcomes_of_each

from adapterkern.backends.triton.backend import TritonBackend
from adapterkern.backends.triton.compile_only import MOST_STACK_BYTES, compile_only, resources
from adapterkern.backends.triton.launch_config import Device
from adapterkern.backends.triton.mixes import Mix, uniform
from adapterkern.backends.triton.norm_launches import NormLaunches
from adapterkern.results import Needs, Outputs
from adapterkern.spec import with_norm

pytestmark = pytest.mark.thorough

HALF, SINGLE = torch.bfloat16, torch.float32
MB = 1024 * 1024
DEVICES = {  # the last with an L2 of 72 MB
    80: Device(108, 163 * 1024, 8, 40 * MB),
    90: Device(132, 227 * 1024, 9, 60 * MB),
    89: Device(128, 99 * 1024, 8, 72 * MB),
}
FUSED = {"bottleneck_norm_fwd_kernel", "bottleneck_norm_bwd_dx_kernel"}
ROWS = {"norm_rows_kernel", "norm_rows_bwd_kernel"}


class Case(NamedTuple):
    """block_t: of the row block, None for the kernels that have rows to themselves."""

    capability: int
    mix: Mix
    sizes: tuple[int, int, int]
    block_t: int | None
    precision: str = "high"


CASES = (
    Case(90, uniform(HALF), (16384, 1024, 64), 32),
    Case(90, uniform(HALF), (16384, 512, 128), 64),
    Case(90, uniform(HALF), (2048, 1024, 48), 16),
    Case(90, uniform(HALF), (16384, 515, 63), 64),
    Case(90, uniform(HALF), (16384, 4096, 64), None),
    Case(90, uniform(HALF), (16, 1024, 64), None),
    Case(90, uniform(SINGLE), (16384, 512, 64), 32),
    Case(90, uniform(SINGLE), (16384, 256, 64), 32, "highest"),
    Case(90, Mix(HALF, SINGLE, HALF, SINGLE), (16384, 256, 64), 64),
    Case(80, uniform(HALF), (16384, 512, 128), 64),
    Case(89, uniform(HALF), (16384, 1024, 64), 32),
    Case(89, uniform(SINGLE), (16384, 4096, 64), None),
)
FEW = CASES[0], CASES[4]  # one of each kind


def outcomes(case: Case) -> list[tuple]:
    """(kernel, block_t, shared, registers, stack, machine code) of the kernels of the norm, in a
    forward that saves nothing, one that does, and its backward. Runs in a process of its own."""
    for name in ("forward_row_block", "forward_split", "dx_row_block", "dx_split"):
        setattr(NormLaunches, name, lambda *_: None)  # tests/test_triton_compile.py has these
    NormLaunches.weight_gradients = lambda *_: None
    torch.set_float32_matmul_precision(case.precision)
    device, kernels = DEVICES[case.capability], TritonBackend()
    call = case.mix.call(*case.sizes)
    call = call._replace(skip=torch.empty(call.x.shape, dtype=call.output_dtype))
    weight, bias = torch.empty(2, call.hidden_size, dtype=case.mix.weights)
    call = with_norm(call, weight, bias, "layer", 1e-5, 0.0, False, False)
    needs = Needs(*[True] * 5, skip=True, norm_weight=True, norm_bias=True)
    with compile_only(case.capability, device) as launches:
        kernels.forward(call, False)
        outputs, saved = kernels.forward(call, True)
        upstream = Outputs(None, torch.empty_like(outputs.normed))
        saved = saved._replace(stream=outputs.y)
        kernels.backward(call.for_backward(needs), saved, upstream, needs)
        return [
            (n.kernel, n.arguments["BLOCK_T"], n.shared, *resources(n.cubin), n.cubin)
            for n in launches
            if n.kernel in FUSED | ROWS
        ]


@pytest.fixture(scope="module", params=few_or_all(FEW, CASES))
def compiled(request, tmp_path_factory):
    return outcomes_of_each(outcomes, request.param, tmp_path_factory.mktemp("triton_cache"))


def code_of(outcome: tuple) -> list[sass.Instruction]:
    return sass.parse(triton_sass.disassemble(outcome[-1]))


def test_cases_reach_every_height_and_both_ways(compiled):
    for case, found in compiled.items():
        assert {one[0] for one in found} == (ROWS if case.block_t is None else FUSED)
        if case.block_t is not None:
            assert {one[1] for one in found if "fwd" in one[0]} == {case.block_t}, case
    assert {case.block_t for case in CASES} == {None, 16, 32, 64}


def test_registers_of_a_norm_do_not_spill(compiled):
    """Not at all in half precision; of other dtypes and odd sizes some beside the loops."""
    spilled = {}
    for case, found in compiled.items():
        half = case.mix == uniform(HALF) and case.sizes[1] % 16 == 0
        for kernel, block_t, _, registers, stack, _ in found:
            if stack > (MOST_STACK_BYTES if half else 4 * MOST_STACK_BYTES):
                spilled[case, kernel, block_t] = registers, stack
    assert not spilled


def test_row_blocks_of_a_norm_fit_an_sm(compiled):
    for case, found in compiled.items():
        for kernel, _, shared, registers, _, _ in found:
            assert shared <= DEVICES[case.capability].shared_memory
            assert kernel in ROWS or registers <= 255  # of eight warps


def test_loops_of_a_norm_read_in_whole_vectors_that_are_under_way(compiled):
    """The read-back of the sum and of ds among them. Vectors over the features, and the partial
    sums of the norm's gradients, are narrower than 16 bytes a thread."""
    for case in FEW:
        for outcome in compiled[case]:
            loops = sass.loops(code_of(outcome))
            inner = [loop for loop in loops if loop.count("STG") and not spans(loop, loops)]
            assert inner, outcome[0]
            for loop in inner:
                assert loop.count("STL", "LDL") == 0, (outcome[0], loop.summary())
                assert loop.count("LDG") == 0, (outcome[0], loop.summary())
                assert any(copy.width == 16 for copy in loop.named("LDGSTS")), loop.summary()
                assert loop.stages_in_flight >= 1, (outcome[0], loop.summary())


def spans(loop: sass.Loop, loops: list[sass.Loop]) -> bool:
    """Whether another loop lies within it."""
    first, last = loop.instructions[0].address, loop.instructions[-1].address
    return any(
        other is not loop
        and first <= other.instructions[0].address
        and other.instructions[-1].address <= last
        for other in loops
    )


def test_a_sum_that_waits_is_stored_to_stay_and_normed_to_leave(compiled):
    """L2 is to keep the one until it is read, and not the other."""
    kernel, *_ = alone = compiled[CASES[0]][0]
    assert kernel == "bottleneck_norm_fwd_kernel"
    stores = [one for one in code_of(alone) if one.name == "STG"]
    assert [".EF" in store.opcode for store in stores] == [False, True]
