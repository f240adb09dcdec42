"""Machine code of the kernels that the bf16 headline shapes launch, for sm_90 and sm_80: what is
under way while a loop computes, and what is not in it.
"""

import functools

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import sass
import triton_sass
from sass import Instruction, Loop

from adapterkern.backends.triton.backend import TritonBackend
from adapterkern.backends.triton.compile_only import Launch, compile_only
from adapterkern.backends.triton.launch_config import Device
from adapterkern.backends.triton.mixes import uniform
from adapterkern.results import Needs, Outputs

pytestmark = pytest.mark.thorough

DEVICES = {80: Device(108, 163 * 1024), 90: Device(132, 227 * 1024)}
SHAPES = (
    *((16384, 1024, 64), (16384, 4096, 64), (2048, 1024, 64), (2048, 4096, 64)),
    *((16, 1024, 64), (16, 4096, 64)),
)
# Groups of copies that are under way at least while a loop computes, of the loops with a product in
# their order.
IN_FLIGHT = {
    "bottleneck_fwd_kernel": (2, 1),
    "bottleneck_fwd_down_kernel": (2,),
    "bottleneck_fwd_up_kernel": (1,),
    "bottleneck_bwd_dx_kernel": (2, 1),
    "bottleneck_bwd_split_dz_kernel": (2,),
    "bottleneck_bwd_split_dx_kernel": (1,),
    "bottleneck_bwd_dw_kernel": (2,),
}


@functools.cache
def kernels(capability: int) -> dict[tuple[str, bytes], list[Instruction]]:
    """Return the instructions of every kernel that one of the shapes launches."""
    found = {}
    for sizes in SHAPES:
        for launch in launches_of(capability, *sizes):
            key = launch.kernel, launch.cubin
            found[key] = found.get(key) or sass.parse(triton_sass.disassemble(launch.cubin))
    return found


def launches_of(capability: int, tokens: int, hidden: int, bottleneck: int) -> list[Launch]:
    """Return the launches of a forward and of a backward with all gradients."""
    call, backend = uniform(torch.bfloat16).call(tokens, hidden, bottleneck), TritonBackend()
    with compile_only(capability, DEVICES[capability]) as launches:
        outputs, saved = backend.forward(call, save=True)
        dy = Outputs(torch.empty_like(outputs.y))
        backend.backward(call, saved, dy, Needs(True, True, True, True, True))
    return launches


def product_loops(instructions: list[Instruction]) -> list[Loop]:
    found = sass.loops(instructions)
    return [loop for loop in found if loop.count("HGMMA", "HMMA")]


@pytest.fixture(params=[90, 80], ids="sm_{}".format)
def code(request):
    return kernels(request.param)


def test_headline_shapes_reach_every_kernel(code):
    assert {name for name, _ in code} == {*IN_FLIGHT, "bottleneck_bwd_dw_sum_kernel"}


def test_product_loops_load_by_asynchronous_copies_alone(code):
    """Vectors of the bias alone are narrower than 16 bytes a thread."""
    for (name, _), instructions in code.items():
        loops = product_loops(instructions)
        assert len(loops) == len(IN_FLIGHT.get(name, ())), name
        for loop in loops:
            assert loop.count("LDG") == 0, (name, loop.summary())
            assert sum(copy.width == 16 for copy in loop.named("LDGSTS")) >= 2, loop.summary()


def test_product_loops_have_copies_under_way_while_they_compute(code):
    for (name, _), instructions in code.items():
        for loop, least in zip(product_loops(instructions), IN_FLIGHT.get(name, ()), strict=True):
            assert loop.stages_in_flight >= least, (name, loop.summary())


def test_partial_gradients_are_summed_with_several_vectors_under_way(code):
    for (name, _), instructions in code.items():
        if name == "bottleneck_bwd_dw_sum_kernel":
            wide = [
                loop
                for loop in sass.loops(instructions)
                if sum(load.width == 16 for load in loop.named("LDG")) >= 4
            ]
            assert len(wide) >= 2, name  # dW_down and dW_up
            for loop in wide:
                assert loop.loads_before_use() >= 2, loop.summary()


def test_weight_gradients_have_no_activation(code):
    for (name, _), instructions in code.items():
        if name == "bottleneck_bwd_dw_kernel":
            assert not any(instruction.name == "MUFU" for instruction in instructions)
        if name == "bottleneck_bwd_dx_kernel":  # so the name is what the activation compiles to
            assert any(instruction.name == "MUFU" for instruction in instructions)


def test_no_loop_keeps_registers_in_memory_and_nothing_is_double(code):
    for (name, _), instructions in code.items():
        for loop in sass.loops(instructions):  # a constant that a step reads anew is no spill
            assert loop.count("STL") == 0, (name, loop.summary())
            assert loop.count("LDL") <= 1, (name, loop.summary())
        double = [one for one in instructions if one.name in ("DADD", "DMUL", "DFMA", "DSETP")]
        assert not double, (name, double)


def test_steps_of_the_hot_loops_stay_short(code):
    """Instructions a warp and a step; on Hopper, where wgmma takes whole tiles."""
    if code is not kernels(90):
        pytest.skip("a step of mma.sync has as many more as its tile has fragments")
    most = {"bottleneck_bwd_dx_kernel": (96, 210), "bottleneck_bwd_dw_kernel": (256,)}
    for (name, _), instructions in code.items():
        wgmma = [loop for loop in product_loops(instructions) if loop.count("HGMMA")]
        for loop, limit in zip(wgmma, most.get(name, ()), strict=False):
            assert len(loop.instructions) <= limit, (name, loop.summary())


def narrow_loads(launch: Launch, least: int = 16) -> list[str]:
    """Return the loads and copies in product loops of fewer than `least` bytes, but for copies of a
    bias, which are 4 bytes wide."""
    instructions = sass.parse(triton_sass.disassemble(launch.cubin))
    return [
        load.text
        for loop in product_loops(instructions)
        for load in (*loop.named("LDG"), *loop.named("LDGSTS"))
        if load.width < least and not (load.name == "LDGSTS" and load.width == 4)
    ]


@pytest.mark.parametrize("bottleneck", [24, 40, 104])
def test_weights_load_in_whole_vectors_where_8_divides_r(bottleneck):
    """Triton itself looks for 16 alone."""
    for launch in launches_of(90, 16384, 1024, bottleneck):
        assert not narrow_loads(launch), launch.kernel


@pytest.mark.parametrize("bottleneck", [5, 10, 100])
def test_rows_of_units_load_in_whole_vectors_whatever_r_is(bottleneck):
    """dz and a in the weight gradients: 16 bytes a thread, or its share of a tile of 16 units, 4.
    The rows of W_up show what else there would be: elements of 2 bytes, where R is odd."""
    launches = {launch.kernel: launch for launch in launches_of(90, 16384, 1024, bottleneck)}
    least = 16 if bottleneck > 16 else 4
    assert not narrow_loads(launches["bottleneck_bwd_dw_kernel"], least)
    if bottleneck == 5:
        assert narrow_loads(launches["bottleneck_bwd_dx_kernel"], least)


@pytest.mark.parametrize("waits_first", [False, True])
def test_hazards_are_writes_to_what_a_product_under_way_may_read(waits_first):
    write = "F2FP.BF16.F32.PACK_AB R5, R9, R8"
    wait = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
    middle = (wait, write) if waits_first else (write, wait)
    lines = ("HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8], R24, gsb0", *middle, "@P0 BRA 0x100")
    code = "\n".join(f"        /*{256 + 16 * i:04x}*/   {line} ;" for i, line in enumerate(lines))
    found = triton_sass.hazards(sass.parse(code))
    assert found == ([] if waits_first else [f"0x110: {write}"])
