"""The forward of many adapters and their routing as they compile for GPUs that are not here: they
fit, keep their registers, and load in whole vectors, as one adapter's kernel does.
"""

from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import sass
import triton_sass
from compile_pool import few_or_all, outcomes_of_each
from fake_gpu import FakeGpu, fake_gpu, pointers

from adapterkern.backends.triton.backend import TritonBackend
from adapterkern.backends.triton.compile_only import MOST_STACK_BYTES, compile_only, resources
from adapterkern.backends.triton.launch_config import Device
from adapterkern.grouped.call import make_grouped_call

pytestmark = pytest.mark.thorough

HALF, SINGLE = torch.bfloat16, torch.float32
DEVICES = {
    80: Device(108, 163 * 1024, 8),
    89: Device(128, 99 * 1024, 8),
    90: Device(132, 227 * 1024, 9),
}
TILED = ["grouped_fwd_kernel"]
BY_ROW = ["grouped_fwd_row_down_kernel", "grouped_fwd_row_up_kernel"]


class Case(NamedTuple):
    """sizes: T, H, R, S. weights and added: the dtypes of the stacks, of skip."""

    capability: int
    sizes: tuple[int, int, int, int]
    x: torch.dtype = HALF
    weights: torch.dtype = HALF
    added: torch.dtype = HALF
    ranks: bool = True
    precision: str = "high"


MAIN, EVEN = Case(90, (16384, 1024, 64, 16)), Case(90, (16384, 1024, 64, 16), ranks=False)
DECODE = Case(90, (64, 1024, 64, 64))
CASES = (
    MAIN,
    EVEN,
    DECODE,
    Case(90, (2048, 768, 48, 16)),
    Case(90, (4096, 1024, 128, 4)),
    Case(90, (16384, 1024, 256, 4)),
    Case(90, (16384, 1027, 63, 4)),
    Case(90, (4096, 1024, 128, 4), HALF, SINGLE, SINGLE),
    Case(90, (16384, 1024, 64, 4), SINGLE, SINGLE, SINGLE, precision="highest"),
    Case(90, (16, 1024, 256, 16)),
    Case(80, (16384, 1024, 64, 16)),
    Case(80, (16384, 1024, 256, 4), HALF, SINGLE, SINGLE),
    Case(89, (2048, 1024, 64, 16)),
    Case(89, (64, 1027, 63, 4)),
)


def call_of(case: Case):
    tokens, hidden, bottleneck, slots = case.sizes
    room = tokens + 63 * slots
    shapes = (tokens,), (room,), (-(-room // 64), 3), (slots + 2,)

    def weights(*shape):
        return torch.empty(slots, *shape, dtype=case.weights)

    return make_grouped_call(
        torch.empty(tokens, hidden, dtype=case.x),
        weights(bottleneck, hidden),
        weights(hidden, bottleneck),
        weights(bottleneck),
        weights(hidden),
        "input",
        torch.empty(tokens, hidden, dtype=case.added),
        torch.empty(slots),
        torch.empty(slots, dtype=torch.int32) if case.ranks else None,
        tuple(torch.empty(shape, dtype=torch.int32) for shape in shapes),
        "gelu",
        False,
    )


def outcomes(case: Case) -> list[tuple]:
    """(kernel, grid, shared, registers, stack, machine code) of a forward that saves z. Runs
    in a process of its own."""
    torch.set_float32_matmul_precision(case.precision)
    with compile_only(case.capability, DEVICES[case.capability]) as launches:
        TritonBackend().grouped_forward(call_of(case), True)
        return [(n.kernel, n.grid, n.shared, *resources(n.cubin), n.cubin) for n in launches]


def routing_outcomes(sizes: tuple[int, int]) -> list[tuple]:
    tokens, slots = sizes
    room = tokens + 63 * slots
    shapes = (tokens,), (room,), (-(-room // 64), 3), (slots + 2,)
    buffers = tuple(torch.empty(shape, dtype=torch.int32) for shape in shapes)
    with compile_only(90, DEVICES[90]) as launches:
        TritonBackend().route(torch.empty(tokens, dtype=torch.int32), buffers)
        return [(n.kernel, n.grid, n.shared, *resources(n.cubin), n.cubin) for n in launches]


ROUTINGS = ((64, 16), (16384, 16), (16384, 200), (256, 300), (256, 1022), (32768, 1022))
FEW = (MAIN, EVEN, DECODE, ROUTINGS[0])


def any_outcomes(case: Case | tuple[int, int]) -> list[tuple]:
    return outcomes(case) if isinstance(case, Case) else routing_outcomes(case)


@pytest.fixture(scope="module", params=few_or_all(FEW, (*CASES, *ROUTINGS)))
def compiled(request, tmp_path_factory):
    return outcomes_of_each(any_outcomes, request.param, tmp_path_factory.mktemp("triton_cache"))


def forwards(compiled: dict) -> list[Case]:
    return [case for case in compiled if isinstance(case, Case)]


def loops_of(outcome: tuple) -> list[sass.Loop]:
    return sass.innermost_loops(sass.parse(triton_sass.disassemble(outcome[-1])))


def test_one_launch_serves_many_tokens_and_two_a_few(compiled):
    for case in forwards(compiled):
        found = [outcome[0] for outcome in compiled[case]]
        assert found == (BY_ROW if case.sizes[0] <= 64 else TILED), case
    # As many tiles as 16384 tokens can take, whatever their adapters are.
    assert compiled[MAIN][0][1] == (16384 // 64 + 16, 1, 1)
    for sizes in compiled.keys() & set(ROUTINGS):
        assert [outcome[0] for outcome in compiled[sizes]] == ["grouped_route_kernel"]


def test_registers_of_many_adapters_do_not_spill(compiled):
    """Not at all in half precision; elsewhere some beside the loops."""
    for case, found in compiled.items():
        plain = not isinstance(case, Case) or (case.added == HALF and case.sizes[1] % 16 == 0)
        for kernel, _, _, registers, stack, _ in found:
            most = MOST_STACK_BYTES if plain else 4 * MOST_STACK_BYTES
            assert stack <= most, (case, kernel, registers, stack)
    for case in forwards(compiled):
        for outcome in (one for one in compiled[case] if one[4]):
            moved = [loop.count("LDL", "STL") for loop in loops_of(outcome)]
            assert not any(moved), (case, outcome[0], moved)


def test_kernels_of_many_adapters_fit_an_sm(compiled):
    for case in forwards(compiled):
        for kernel, _, shared, *_ in compiled[case]:
            assert shared <= DEVICES[case.capability].shared_memory, (case, kernel)
    for case in (MAIN, EVEN):  # two blocks of four warps an SM, as the plan counts on
        _, _, shared, registers, _, _ = compiled[case][0]
        assert 2 * (shared + 1024) <= 228 * 1024
        assert registers <= 255


def products_of(outcome: tuple) -> list[sass.Loop]:
    return [loop for loop in loops_of(outcome) if loop.count("HGMMA", "HMMA")]


def test_tiled_loops_copy_whole_vectors_while_they_compute(compiled):
    """Gathered rows and a slot's weights alike; with ranks there are a loop out of the bottleneck
    for those of whole vectors, which costs what it costs without ranks, and one for ragged ones."""
    numbers = {MAIN: 3, EVEN: 2, CASES[3]: 3, CASES[10]: 3}
    for case in compiled.keys() & numbers.keys():
        loops = products_of(compiled[case][0])
        assert len(loops) == numbers[case], case
        for loop in loops:
            copies = loop.named("LDGSTS")
            # The bias of the features, and single tokens' scales, are narrower.
            assert sum(copy.width == 16 for copy in copies) >= len(copies) - 6, loop.summary()
            assert {copy.width for copy in copies} <= {4, 8, 16}, loop.summary()
            assert loop.count("LDG") == 0, loop.summary()
            assert loop.stages_in_flight >= 1, loop.summary()
    found = [
        [loop for loop in products_of(compiled[case][0]) if loop.count("STG")]
        for case in (MAIN, EVEN)
    ]
    (whole, ragged), (even,) = (sorted(loops, key=lambda one: len(one[0])) for loops in found)
    assert len(whole.instructions) <= 1.15 * len(even.instructions)
    assert len(ragged.instructions) <= 1.4 * len(even.instructions)
    assert whole.count("BAR", "LDS", "STS") == even.count("BAR", "LDS", "STS")


def test_rows_without_an_adapter_move_in_whole_vectors(compiled):
    """The loop without a product that reads x and skip and stores y."""
    loops = [
        loop for loop in loops_of(compiled[MAIN][0]) if loop.count("STG") and loop.count("LDG")
    ]
    (copied,) = [loop for loop in loops if not loop.count("HGMMA")]
    assert {load.width for load in copied.named("LDG")} == {16}
    assert copied.loads_before_use() >= 8


def test_by_row_asks_for_a_whole_tile_of_a_weight_at_once(compiled):
    """64 tokens with an adapter each: every lane has 8 loads of 16 bytes under way, and an SM holds
    enough programs for 48 KB, twice what the latency of its memory needs."""
    into, out = compiled[DECODE]
    assert (into[1], out[1]) == ((64, 1, 8), (64, 8, 1))
    for outcome in (into, out):
        registers = outcome[3]
        (loop,) = [loop for loop in loops_of(outcome) if loop.count("LDG")]
        wide = [load for load in loop.named("LDG") if load.width == 16]
        assert len(wide) >= 8, loop.summary()
        assert loop.loads_before_use() >= 9, loop.summary()
        blocks = 64 * 1024 // (-(-registers * 32 // 256) * 256 * 4)
        assert blocks * 128 * 8 * 16 >= 48 * 1024, registers


def test_calls_of_many_adapters_are_repeated():
    """From the third on, with addresses alone, and no option is taken for another."""
    with fake_gpu(FakeGpu()) as gpu:
        seen = {}
        for sizes in ((64, 128, 16, 4), (2048, 128, 16, 4)):
            base = call_of(Case(90, sizes))
            for name, call in {
                "plain": base,
                "relu": base._replace(activation="relu"),
                "no-input": base._replace(add_input=False),
                "no-ranks": base._replace(ranks=None),
            }.items():
                for number in range(3):
                    del gpu.launches[:]
                    TritonBackend().grouped_forward(call, False)
                    found = [(n.kernel, n.grid, n.cubin) for n in gpu.launches]
                    assert seen.setdefault((sizes, name), found) == found
                    assert any(map(pointers, gpu.launches)) == (number < 2)
        assert len({str(found) for found in seen.values()}) == len(seen)
        routing = call_of(Case(90, (64, 128, 16, 4)))
        buffers = routing.token_slots, routing.order, routing.tiles, routing.slot_offsets
        for number in range(3):
            del gpu.launches[:]
            TritonBackend().route(torch.zeros(64, dtype=torch.int32), buffers)
            assert [n.kernel for n in gpu.launches] == ["grouped_route_kernel"]
            assert any(map(pointers, gpu.launches)) == (number < 2)
