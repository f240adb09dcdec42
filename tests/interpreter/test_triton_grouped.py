"""Many adapters in one batch: the Triton forward in both forms, and the routing, against the
reference."""

import random

import pytest
import torch

from adapterkern.backends import get
from adapterkern.backends.triton import grouped_launches
from adapterkern.backends.triton.launch_config import RowBlock, Split
from adapterkern.grouped import reference
from adapterkern.grouped.call import make_grouped_call
from adapterkern.grouped.routing import AdapterRouting, sort_tokens
from adapterkern.parity import judge

pytestmark = pytest.mark.interpreter
triton = get("triton")
HALF, SINGLE, NAN = torch.bfloat16, torch.float32, float("nan")
FORMS = ("tiled", "by_row")


@pytest.fixture
def run_as(monkeypatch):
    """run_as(form): from here on every call takes it, whatever its sizes are."""

    def choose(form):
        def plan(problem, device):
            if form == "tiled":
                return RowBlock(grouped_launches.tiled(problem, device))
            return grouped_launches.by_row(problem, device)

        monkeypatch.setattr(grouped_launches, "forward_plan", plan)

    return choose


def unfilled(slots, max_tokens, fill=77):
    """Buffers of a routing."""
    room = max_tokens + 63 * slots
    shapes = (max_tokens,), (room,), (-(-room // 64), 3), (slots + 2,)
    return tuple(torch.full(shape, fill, dtype=torch.int32) for shape in shapes)


def drawn(sizes, dtype=SINGLE, *, weights=None, added=None, products=None, seed=0, **options):
    """A call of which every tensor is given but those that `absent` names. Units beyond a slot's
    rank are NaN, and so is all of a slot without units. `room`: of the routing, beyond the tokens.
    """
    tokens, hidden, bottleneck, slots = sizes
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype=weights or dtype):
        return torch.randn(*shape, generator=generator).to(dtype)

    absent, residual = options.pop("absent", ()), options.pop("residual", "input")
    ids = options.pop("ids", None)
    if ids is None:
        ids = torch.randint(-1, slots, (tokens,), generator=generator)
    ranks = torch.randint(0, bottleneck + 1, (slots,), generator=generator, dtype=torch.int32)
    ranks[0] = bottleneck // 8 * 8  # whole vectors
    given = {
        "down_weights": normal(slots, bottleneck, hidden) * hidden**-0.5,
        "up_weights": normal(slots, hidden, bottleneck) * bottleneck**-0.5,
        "down_biases": normal(slots, bottleneck),
        "up_biases": normal(slots, hidden),
    }
    if "ranks" not in absent:
        for slot, rank in enumerate(options.pop("ranks", ranks.tolist())):
            ranks[slot] = rank
            given["down_weights"][slot, rank:] = NAN
            given["down_biases"][slot, rank:] = NAN
            given["up_weights"][slot, :, rank:] = NAN
            if rank == 0:
                given["up_biases"][slot] = NAN
    if options.pop("gaps", False):
        for name in ("down_weights", "up_weights"):
            wide = torch.full((*given[name].shape[:2], 2 * given[name].shape[2]), NAN)
            wide = wide.to(given[name].dtype)
            wide[..., ::2] = given[name]
            given[name] = wide[..., ::2]
    wider = 2 * hidden + 5 if options.pop("strided", False) else hidden

    def rows(dtype=dtype):
        return normal(tokens, wider, dtype=dtype)[:, :hidden]

    given |= {
        "x": rows(),
        "skip": rows(added or dtype),
        "scalings": torch.rand(slots, generator=generator) + 0.5,
        "ranks": ranks,
    }
    given = {name: None if name in absent else tensor for name, tensor in given.items()}
    ids = torch.as_tensor(ids, dtype=torch.int32)
    buffers = unfilled(slots, tokens + options.pop("room", 0) + 1)
    sort_tokens(ids, slots, *buffers)
    call = make_grouped_call(
        **given,
        residual=rows(added or dtype) if residual == "tensor" else residual,
        routing=buffers,
        activation=options.pop("activation", "gelu"),
        gradient=False,
    )
    assert not options
    return call if products is None else call._replace(compute_dtype=products)


def widened(call):
    """The oracle's call: of operands rounded to the dtype of the products, in float64."""
    found = {}
    for name, tensor in call.tensors().items():
        if tensor is not None and tensor.is_floating_point():
            is_operand = name not in ("residual", "skip", "scalings")
            found[name] = (tensor.to(call.compute_dtype) if is_operand else tensor).double()
    if call.add_input:  # added as it is, not rounded
        found["residual"] = call.x.double()
    return call._replace(**found, add_input=False, compute_dtype=torch.float64)


def missed(call):
    y, z = triton.grouped_forward(call, save=True)
    oracles, eager = reference.forward(widened(call)), reference.forward(call)
    found = []
    for name, out, oracle, plain in zip("yz", (y, z), oracles, eager, strict=True):
        assert (out.dtype, out.shape) == (plain.dtype, plain.shape), name
        error, tolerance = judge(f"y {name}", out, oracle, [plain], plain.dtype)
        if not error <= tolerance:
            found.append(f"{name}: {error:.2e} of {tolerance:.2e}")
    assert y.is_contiguous()
    none = call.token_slots[: call.num_tokens] < 0
    assert torch.equal(y[none], reference.without_adapter(call)[none])
    assert not z[none].any()
    return found


SIZES = {
    "one-token": (1, 70, 20, 3),
    "some": (7, 70, 20, 4),
    "whole-vectors": (9, 64, 32, 3),
    "wide": (3, 75, 150, 3),
    "a-tile-and-more": (75, 33, 24, 2),
}
KINDS = (
    *(("some", dtype) for dtype in (SINGLE, HALF, torch.float16)),
    ("one-token", SINGLE),
    ("whole-vectors", HALF),
    ("wide", SINGLE),
    ("wide", torch.float16),
    ("a-tile-and-more", HALF),
)


@pytest.mark.parametrize(("name", "dtype"), KINDS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_grouped_forward_matches_float64(run_as, form, name, dtype):
    run_as(form)
    tokens, *others = SIZES[name]
    assert not missed(drawn((tokens if form == "tiled" else min(tokens, 7), *others), dtype))


@pytest.mark.parametrize("form", FORMS)
def test_a_call_that_saves_nothing_gives_the_same_bits(run_as, form):
    run_as(form)
    call = drawn((7, 70, 20, 4), HALF)
    y, nothing = triton.grouped_forward(call, save=False)
    assert nothing is None
    assert torch.equal(y, triton.grouped_forward(call, save=True)[0])


@pytest.mark.parametrize(("tokens", "bottleneck"), [(33, 126), (140, 63)])
def test_grouped_forward_matches_float64_with_many_tokens(tokens, bottleneck):
    """With the form that the plan takes."""
    call = drawn((tokens, 70, bottleneck, 3), HALF)
    problem = grouped_launches.grouped_problem(call, grouped_launches.Device(4, 227 * 1024))
    plan = grouped_launches.forward_plan(problem, grouped_launches.Device(4, 227 * 1024))
    assert isinstance(plan, RowBlock)
    assert not missed(call)


def test_by_row_adds_up_slices_of_the_features(run_as):
    run_as("by_row")
    call = drawn((1, 700, 20, 3), HALF, ids=[1], ranks=[3, 20, 5])
    problem = grouped_launches.grouped_problem(call, grouped_launches.Device(4, 227 * 1024))
    assert grouped_launches.by_row(problem, grouped_launches.Device(4, 227 * 1024)).num_splits > 4
    assert not missed(call)


OPTIONS = {
    "no-bias": {"absent": ("down_biases", "up_biases"), "activation": "sigmoid"},
    "down-bias": {"absent": ("up_biases",), "activation": "relu"},
    "up-bias": {"absent": ("down_biases", "skip"), "activation": "sigmoid"},
    "no-scaling": {"absent": ("scalings", "skip")},
    "no-ranks": {"absent": ("ranks",), "activation": "sigmoid"},
    "nothing-added": {"residual": None, "absent": ("skip",)},
    "residual": {"residual": "tensor", "strided": True},
    "strided": {"strided": True, "gaps": True},
    "room": {"room": 150},
    "fp32-weights": {"weights": SINGLE, "dtype": HALF},
    "autocast": {"products": HALF},
    "fp32-stream": {"added": SINGLE, "dtype": HALF, "residual": "tensor"},
    "full-ranks": {"ranks": [20, 20, 20]},
    "no-units": {"ranks": [0, 0, 0]},
}


@pytest.mark.sweep("form", "options")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("form", FORMS)
def test_grouped_forward_matches_float64_with_every_option(run_as, form, options):
    run_as(form)
    assert not missed(drawn((4, 70, 20, 3), ids=[2, -1, 1, 2], **options))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("slot", [-1, 1], ids=["none", "one"])
def test_a_batch_of_one_kind_matches(run_as, form, slot):
    run_as(form)
    assert not missed(drawn((5, 70, 20, 3), HALF, ids=[slot] * 5))


@pytest.mark.parametrize("form", FORMS)
def test_fewer_tokens_than_were_routed_match(run_as, form):
    """`order` then holds tokens that x has not, and beyond the last ones without an adapter."""
    run_as(form)
    call = drawn((8, 70, 20, 3), ids=[1, 2, 1, -1, 0, -1, -1, -1])
    few = call._replace(x=call.x[:6], skip=call.skip[:6])
    assert not missed(few)
    assert torch.equal(
        triton.grouped_forward(few, False)[0], triton.grouped_forward(call, False)[0][:6]
    )


@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=["fp32", "bf16"])
@pytest.mark.parametrize("form", FORMS)
def test_permuted_rows_give_permuted_bits_and_so_does_a_rerun(run_as, form, dtype):
    run_as(form)
    tokens = 70 if form == "tiled" else 6
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(-1, 2, (tokens,), generator=generator, dtype=torch.int32)
    call = drawn((tokens, 40, 20, 2), dtype, ids=ids)
    y, z = triton.grouped_forward(call, True)
    again = triton.grouped_forward(call, True)
    assert torch.equal(y, again[0])
    assert torch.equal(z, again[1])
    permutation = torch.randperm(tokens, generator=torch.Generator().manual_seed(2))
    buffers = unfilled(2, tokens)
    sort_tokens(ids[permutation], 2, *buffers)
    names = ("token_slots", "order", "tiles", "slot_offsets")
    moved = call._replace(
        x=call.x[permutation],
        skip=call.skip[permutation],
        **dict(zip(names, buffers, strict=True)),
    )
    y_moved, z_moved = triton.grouped_forward(moved, True)
    assert torch.equal(y_moved, y[permutation])
    assert torch.equal(z_moved, z[permutation])


def test_no_tokens_give_no_rows():
    y, z = triton.grouped_forward(drawn((0, 70, 20, 3), HALF), True)
    assert y.shape == (0, 70)
    assert z.shape == (0, 20)


@pytest.mark.parametrize(
    "numbers",
    [range(100), pytest.param(range(100, 1000), marks=pytest.mark.thorough)],
    ids=["few", "many"],
)
def test_random_batches_match(run_as, numbers):
    chosen = random.Random(numbers.start)
    missing = []
    for number in numbers:
        run_as(FORMS[number % 2])
        sizes = [chosen.randint(1, most) for most in (2, 40, 10, 2)]
        activation = chosen.choice(["gelu", "sigmoid", "relu"])
        optional = ("down_biases", "up_biases", "scalings", "skip", "ranks")
        absent = [name for name in optional if chosen.random() < 0.3]
        call = drawn(sizes, absent=absent, activation=activation, seed=number)
        y, z = triton.grouped_forward(call, True)
        for out, oracle in zip((y, z), reference.forward(widened(call)), strict=True):
            if not torch.allclose(out.double(), oracle, rtol=1e-5, atol=1e-5):
                missing.append((number, sizes, absent))
    assert not missing


def assert_routed(ids, slots, max_tokens):
    found, expected = unfilled(slots, max_tokens), unfilled(slots, max_tokens, 99)
    triton.route(ids, found)
    sort_tokens(ids, slots, *expected)
    for buffer, other in zip(found, expected, strict=True):
        assert torch.equal(buffer, other)


def test_routing_kernel_sorts_random_batches_as_the_reference():
    chosen, generator = random.Random(1), torch.Generator().manual_seed(1)
    for _ in range(60):
        slots, tokens = chosen.randint(1, 30), chosen.randint(0, chosen.choice((3, 70, 250)))
        ids = torch.randint(-3, slots + 3, (tokens,), generator=generator, dtype=torch.int32)
        assert_routed(ids, slots, tokens + chosen.choice((1, 1, 100)))


@pytest.mark.parametrize(
    ("ids", "slots", "max_tokens"),
    [
        ([], 3, 5),
        ([-1] * 70, 2, 70),
        ([1] * 130, 3, 130),
        ([0] * 64, 1, 64),
        ([2**31 - 1, -(2**31), 0, 5], 5, 4),
    ],
    ids=["no-tokens", "none", "one-slot", "a-whole-tile", "out-of-range"],
)
def test_routing_kernel_sorts_edges_as_the_reference(ids, slots, max_tokens):
    assert_routed(torch.tensor(ids, dtype=torch.int32), slots, max_tokens)


@pytest.mark.sweep
@pytest.mark.parametrize(("tokens", "slots"), [(9000, 2), (200, 1022), (260, 200)])
def test_routing_kernel_sorts_large_batches_as_the_reference(monkeypatch, tokens, slots):
    """More tokens than one step takes, and more slots than programs: here they run in turn, so each
    gets more groups."""
    monkeypatch.setattr(grouped_launches, "MOST_BINS_OF_GROUPS", 2**15)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(-1, slots, (tokens,), generator=generator, dtype=torch.int32)
    assert_routed(ids, slots, tokens + 5000)


def test_an_update_takes_the_kernel_and_reads_strided_ids(monkeypatch):
    launched = []
    route = grouped_launches.route
    monkeypatch.setattr(
        grouped_launches, "route", lambda *given: launched.append(1) or route(*given)
    )
    ids = torch.tensor([[1, 7], [0, 7], [-1, 7], [1, 7]], dtype=torch.int32)[:, 0]
    routing = AdapterRouting(6, 2).update(ids)
    assert len(launched) == 2  # and the empty one that it begins with
    assert routing.token_slots.tolist() == [1, 0, -1, 1, -1, -1]
    assert routing.order[64:66].tolist() == [0, 3]


def test_routings_of_more_slots_than_the_kernel_has_bins_for_do_without_it(monkeypatch):
    launched = []
    monkeypatch.setattr(grouped_launches, "route", lambda *_given: launched.append(1))
    AdapterRouting(4, triton.most_routed_slots)
    assert len(launched) == 1
    routing = AdapterRouting(4, triton.most_routed_slots + 1).update([1022, -1, 7, 1022])
    assert len(launched) == 1
    assert routing.order[64:66].tolist() == [0, 3]


def test_plan_is_by_row_for_few_tokens_alone():
    device = grouped_launches.Device(132, 227 * 1024)
    problem = grouped_launches.Problem(64, 1024, 64, ieee=False, wide=False)

    def form(**sizes):
        return type(grouped_launches.forward_plan(problem._replace(**sizes), device))

    assert [form(num_tokens=n) for n in (1, 64, 65, 16384)] == [Split, Split, RowBlock, RowBlock]
    assert form(num_tokens=16, bottleneck_size=1024) is Split
    heights = [grouped_launches.tiled(problem._replace(num_tokens=n), device) for n in
               (100, 2048, 4096, 16384)]  # fmt: skip
    assert [config.block_t for config in heights] == [16, 16, 32, 64]
