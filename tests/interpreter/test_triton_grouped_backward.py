"""The backward of many adapters in Triton's interpreter, against the reference in float64."""

import pytest
import torch
from grouped_calls import (
    ALL,
    Sizes,
    buffers,
    check,
    draw,
    same_bits,
    subsets,
    triton_gradients,
)

import adapterkern as ak
from adapterkern.backends.triton import backend as triton_backend
from adapterkern.backends.triton import grouped_gradient_launches as launches
from adapterkern.backends.triton.launch_config import Device, Problem, Split
from adapterkern.grouped.call import TILE, GroupedNeeds
from adapterkern.parity import judge

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def mixed_ids(tokens: int, slots: int, seed: int = 0) -> list[int]:
    """Slots at random, some tokens without any, and none in the last slot."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, slots - 1, (tokens,), generator=generator).tolist()


@pytest.mark.sweep("dtype")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("with_scalings", [False, True], ids=["unscaled", "scaled"])
def test_every_gradient_of_different_ranks_is_right(dtype, with_scalings):
    options = {} if with_scalings else {"scalings": None}
    sizes = Sizes(mixed_ids(90, 5), 67, 21, 5, [21, 7, 16, 1, 9], dtype, options=options)
    found = check(*draw(sizes))
    assert found.up_weights is not None
    assert not found.up_weights[4].any()
    assert not found.up_weights[1, :, 7:].any()


@pytest.mark.parametrize(
    ("hidden", "bottleneck", "ranks"),
    [(64, 16, None), (64, 64, [64, 0, 48]), (24, 130, [130, 97, 5]), (20, 200, None)],
    ids=["even", "rank-0", "wide", "wide-unranked"],
)
def test_sizes_and_both_forms_are_right(hidden, bottleneck, ranks):
    call, dy = draw(Sizes(mixed_ids(40, 3), hidden, bottleneck, 3, ranks, torch.bfloat16))
    problem = Problem(40, hidden, bottleneck, ieee=False, wide=False)
    plan = launches.token_plan(problem, triton_backend.cpu_device)
    assert isinstance(plan, Split) == (bottleneck > 128)
    check(call, dy)


@pytest.mark.parametrize(
    "options",
    [
        # Not zero at zero, where units and rows fill up.
        {"activation": "sigmoid"},
        {"activation": "sigmoid", "scalings": None},
        {"residual": None, "activation": "silu"},
        {"down_biases": None, "up_biases": None, "activation": "relu"},
        {"max_tokens": 300, "ranks": None},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_are_right(options):
    ranks = None if "ranks" in options else [13, 5, 8]
    sizes = Sizes(mixed_ids(80, 3), 36, 13, 3, ranks, torch.float16, options=options)
    check(*draw(sizes))


def test_float32_weights_under_bfloat16_tokens_get_float32_gradients():
    sizes = Sizes(
        mixed_ids(100, 4), 50, 12, 4, [12, 3, 8, 12], torch.bfloat16, weights=torch.float32
    )
    found = check(*draw(sizes))
    assert found.down_weights is not None
    assert found.down_weights.dtype == torch.float32


def test_float32_dy_of_bfloat16_products_is_right():
    residual = torch.zeros(70, 33)
    sizes = Sizes(mixed_ids(70, 3), 33, 9, 3, None, torch.bfloat16, options={"residual": residual})
    call, dy = draw(sizes)
    assert dy.dtype == torch.float32
    check(call, dy)


@pytest.mark.parametrize("kind", ["every-other-row", "one-row", "one-number", "transposed"])
def test_dy_of_any_strides_gives_the_same_bits(kind):
    call, _ = draw(Sizes(mixed_ids(40, 3), 34, 10, 3, [10, 4, 7], torch.float32))
    whole = torch.randn(80, 34)
    dy = {
        "every-other-row": whole[::2],
        "one-row": whole[:1].expand(40, 34),
        "one-number": whole[0, 0].expand(40, 34),
        "transposed": torch.randn(34, 40).t(),
    }[kind]
    assert same_bits(triton_gradients(call, dy), triton_gradients(call, dy.contiguous()))


def test_weights_of_any_strides_give_the_same_bits():
    call, dy = draw(Sizes(mixed_ids(40, 3), 34, 10, 3, [10, 4, 7], torch.float32))
    wide = torch.full((3, 34, 20), float("nan"))
    wide[:, :, ::2] = call.up_weights
    strided = call._replace(up_weights=wide[:, :, ::2])
    assert same_bits(triton_gradients(call, dy), triton_gradients(strided, dy))


def test_subsets_give_the_bits_of_all_together():
    """x comes as an outline where no gradient needs its values, as `for_backward` makes it."""
    call, dy = draw(Sizes([0, -1, 0], 9, 5, 1, [3], torch.float32))
    whole = triton_gradients(call, dy, ALL)
    for needs in subsets():
        found = triton_gradients(call, dy, needs)
        for name, out in found._asdict().items():
            if not getattr(needs, name):
                assert out is None, (needs, name)
            else:
                assert torch.equal(out, getattr(whole, name)), (needs, name)


@pytest.mark.thorough
def test_subsets_of_a_wide_bottleneck_give_the_bits_of_all_together():
    call, dy = draw(Sizes(mixed_ids(20, 2), 18, 140, 2, [140, 3], torch.bfloat16))
    whole = triton_gradients(call, dy, ALL)
    for needs in (
        GroupedNeeds(x=True),
        GroupedNeeds(up_weights=True),
        GroupedNeeds(up_biases=True),
    ):
        found = triton_gradients(call, dy, needs)
        name = next(name for name in needs._fields if getattr(needs, name))
        assert torch.equal(getattr(found, name), getattr(whole, name))


@pytest.mark.sweep
@pytest.mark.parametrize("with_scalings", [False, True], ids=["whole", "in-parts"])
def test_one_adapter_with_all_tokens_is_summed_over_several_chunks(with_scalings):
    options = {} if with_scalings else {"scalings": None}
    call, dy = draw(Sizes([1] * 700, 24, 8, 3, None, torch.bfloat16, options=options))
    problem = Problem(700, 24, 8, ieee=False, wide=False)
    kernel = triton_backend.weight_gradient_plan(problem, triton_backend.cpu_device).kernel
    chunks = launches.Chunks.of(problem, 3, kernel, triton_backend.cpu_device)
    assert chunks.rows == 4 * TILE < 700 // 2
    found = check(call, dy)
    assert same_bits(found, triton_gradients(call, dy))


@pytest.mark.thorough
def test_a_zipf_mix_over_16_slots_is_right_and_repeats_its_bits():
    """Slots that lie in one chunk, begin in one and end in the next, and fill several."""
    generator = torch.Generator().manual_seed(3)
    weights = torch.arange(1.0, 17.0) ** -1.5
    ids = torch.multinomial(weights, 700, replacement=True, generator=generator).tolist()
    ranks = [8, 3, 5, 8, 1, 8, 8, 0, 2, 8, 8, 7, 6, 8, 4, 8]
    call, dy = draw(Sizes(ids, 20, 8, 16, ranks, torch.float32, options={"scalings": None}))
    starts = call.slot_offsets.tolist()
    taken = [s for s in range(16) if starts[s] < starts[s + 1]]
    assert {starts[s] // 256 == (starts[s + 1] - 1) // 256 for s in taken} == {True, False}
    found = check(call, dy)
    assert same_bits(found, triton_gradients(call, dy))


def test_a_permuted_batch_gives_permuted_bits_of_dx():
    sizes = Sizes(mixed_ids(100, 4), 64, 16, 4, [16, 5, 9, 16], torch.float32)
    call, dy = draw(sizes)
    place = torch.randperm(100, generator=torch.Generator().manual_seed(1))
    moved, _ = draw(Sizes([sizes.ids[i] for i in place], 64, 16, 4, sizes.ranks, torch.float32))
    moved = moved._replace(
        x=call.x[place], down_weights=call.down_weights, up_weights=call.up_weights,
        down_biases=call.down_biases, up_biases=call.up_biases, scalings=call.scalings,
    )  # fmt: skip
    whole, permuted = triton_gradients(call, dy), triton_gradients(moved, dy[place])
    assert torch.equal(permuted.x, whole.x[place])


@pytest.mark.parametrize("ids", [[-1] * 70, [0], [-1, 1, -1]], ids=["none", "one", "one-of-three"])
def test_few_tokens_and_none_with_an_adapter_are_right(ids):
    call, dy = draw(Sizes(ids, 20, 6, 2, None, torch.float32))
    found = check(call, dy)
    without = torch.tensor(ids) < 0
    assert torch.equal(found.x[without], dy[without])


def test_no_tokens_give_zeros():
    call, dy = draw(Sizes([], 20, 6, 2, None, torch.float32, options={"max_tokens": 4}))
    found = triton_gradients(call, dy, z=torch.empty(0, 6))
    assert found.x.shape == (0, 20)
    assert all(not out.any() for out in found if out is not None)


def test_a_grid_depends_on_sizes_alone():
    """No distribution of the tokens, and no rank, changes a launch."""
    noted = []

    class Noting(triton_backend.launcher.Launches):
        def launch(self, kernel, grid, *arguments, **named):
            noted.append((kernel, grid, [a for a in arguments if not hasattr(a, "shape")], named))

    for ids, ranks in ([-1] * 90, [8, 8]), ([0] * 90, [8, 1]), ([0, 1] * 45, [2, 8]):
        call, dy = draw(Sizes(ids, 32, 8, 2, ranks))
        recording = Noting((), keeps=False)
        one = launches.GradientLaunches(call, dy, recording, triton_backend.cpu_device)
        problem = Problem(90, 32, 8, ieee=True, wide=True)
        one.gradients(torch.zeros(90, 8), ALL, problem, problem)
    assert len(noted) == 9
    assert noted[:3] == noted[3:6] == noted[6:]


@pytest.mark.parametrize("slots", [1, 3, 300])
@pytest.mark.parametrize("tokens", [1, 64, 5000])
def test_segments_have_numbers_of_their_own(slots, tokens):
    """However rows are distributed, chunk + slot is below the number that there is room for."""
    device = Device(num_sms=132, shared_memory=227 * 1024)
    problem = Problem(tokens, 64, 16, ieee=False, wide=False)
    kernel = triton_backend.weight_gradient_plan(problem, device).kernel
    chunks = launches.Chunks.of(problem, slots, kernel, device)
    for seed in range(3):
        starts = buffers(mixed_ids(tokens, slots + 1, seed), slots)[3].tolist()
        numbers = [
            chunk + slot
            for slot in range(slots)
            for chunk in range(starts[slot] // chunks.rows, -(-starts[slot + 1] // chunks.rows))
            if starts[slot] < starts[slot + 1]
        ]
        assert len(set(numbers)) == len(numbers)
        assert all(0 <= number < chunks.segments for number in numbers)


def test_a_bank_trains_with_the_kernels():
    """The whole way: used adapters get their gradients, unused ones None."""
    torch.manual_seed(0)
    bank = ak.AdapterBank(32, 12, 4)
    for name, units in ("fr", 12), ("de", 5), ("it", 8):
        bank.add(name, ak.BottleneckAdapter(32, units, init="bert"))
    routing = ak.AdapterRouting(60, 4)
    routing.update(bank.ids(["fr", None, "de"]), seq_len=20)
    x, dy = torch.randn(3, 20, 32, requires_grad=True), torch.randn(3, 20, 32)
    found = {}
    for backend in ("triton", "reference"):
        with ak.use_backend(backend):
            bank(x, routing).backward(dy)
        named = dict(bank.named_parameters()) | {"x": x}
        found[backend] = {name: p.grad for name, p in named.items()}
        for parameter in named.values():
            parameter.grad = None
    unused = [name for name, gradient in found["triton"].items() if gradient is None]
    assert len(unused) == 4
    for name, gradient in found["reference"].items():
        if name in unused:
            assert gradient is None
            continue
        got = found["triton"][name]
        error, tolerance = judge(name, got, gradient.double(), [gradient], got.dtype)
        assert error <= max(tolerance, 1e-6), name
