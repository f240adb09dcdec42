"""Many adapters in one batch in the CUDA kernels, in both forms, by the parity rule."""

from dataclasses import replace

import cuda_emulator
import pytest
import torch
from cuda_grouped import (
    BF16,
    FLOAT,
    HALF,
    ROWS,
    TILES,
    GroupedCase,
    GroupedEmulator,
    backend,
    build,
    missed,
    permuted,
    random_case,
)
from emulated import emulated

import adapterkern as ak
from adapterkern.backends.cuda.facts import Device, Problem
from adapterkern.backends.cuda.grouped import grouped_plan

FORMS = {"tiles": TILES, "rows": ROWS}
RANDOM, PARTS = 320, 4
# Every width of the tiles, and sizes that divide into nothing.
WIDE = (100, 0, 3, 64)
CASES = {
    "one token": GroupedCase(tokens=1, ids=[2]),
    "ragged": GroupedCase(hidden=75, bottleneck=19, ranks=(19, 5, 0, 1)),
    "five steps": GroupedCase(tokens=200, hidden=392, bottleneck=64, ranks=(64, 40, 8)),
    "wide": GroupedCase(tokens=70, hidden=72, bottleneck=100, ranks=WIDE),
    "widest": GroupedCase(tokens=70, hidden=72, bottleneck=250, ranks=(250, 130)),
    "no ranks": GroupedCase(ranks=None, biases="none", scalings=False, skip=False),
    "nothing added": GroupedCase(residual="none", skip=False, biases="up"),
    "a residual": GroupedCase(residual="tensor", biases="down", activation="sigmoid"),
    "float32 stream": GroupedCase(residual="tensor", stream=FLOAT),
    "master weights": GroupedCase(weights=FLOAT),
    "gaps": GroupedCase(gaps=True, residual="tensor"),
    "room for more": GroupedCase(tokens=37, room=150),
    "no adapter at all": GroupedCase(ids=[-1] * 37),
    "one adapter": GroupedCase(ids=[3] * 37),
}


@pytest.fixture(scope="module")
def grouped(tmp_path_factory) -> GroupedEmulator:
    if cuda_emulator.missing() is not None:
        pytest.skip(cuda_emulator.missing())
    return build(tmp_path_factory.mktemp("grouped"))


@pytest.fixture(autouse=True)
def fresh_seed(request):
    yield
    if "grouped" in request.fixturenames:
        request.getfixturevalue("grouped").seed = cuda_emulator.ROUND_ROBIN


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.itemsize])


@pytest.mark.sweep("name", lambda p: (p["form"], p["dtype"]))
@pytest.mark.parametrize("dtype", [BF16, HALF, FLOAT], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_grouped_kernels_are_as_right_as_eager(grouped, name, form, dtype):
    case = replace(CASES[name], dtype=dtype)
    device = Device(2 * case.tokens if form == "rows" else 1)
    call = case.draw()
    plan = grouped_plan(
        Problem(case.tokens, case.hidden, case.bottleneck, dtype != FLOAT), call.slots, device
    )
    assert (plan.num_tiles > 0) == (form == "tiles" and case.tokens > 1)
    assert missed(call, backend(grouped, device)) == []


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["ragged", "wide", "no ranks"])
def test_grouped_kernels_hold_the_rule_in_tf32(grouped, name, form):
    case = replace(CASES[name], dtype=FLOAT)
    assert missed(case.draw(), backend(grouped, FORMS[form]), tf32=True) == []


@pytest.mark.sweep
@pytest.mark.parametrize("part", range(PARTS))
def test_random_batches_are_as_right_as_eager(grouped, part):
    wrong = []
    for number in range(part, RANDOM, PARTS):
        case, device, grouped.seed = random_case(number)
        found = missed(case.draw(number), backend(grouped, device))
        wrong += [(number, device.num_sms, case, row) for row in found]
    assert not wrong


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["ragged", "five steps", "gaps"])
def test_rows_in_another_order_have_the_same_bits(grouped, name, form):
    call = CASES[name].draw()
    cuda = backend(grouped, Device(call.num_tokens) if form == "rows" else TILES)
    y, z = cuda.grouped_forward(call, True)
    order = torch.randperm(call.num_tokens)
    moved_y, moved_z = cuda.grouped_forward(permuted(call, order), True)
    assert torch.equal(bits(y[order]), bits(moved_y))
    assert torch.equal(bits(z[order]), bits(moved_z))


@pytest.mark.parametrize("form", FORMS)
def test_every_order_of_the_warps_gives_the_same_bits(grouped, form):
    call, cuda = CASES["five steps"].draw(), backend(grouped, Device(200 if form == "rows" else 1))
    found = []
    for grouped.seed in (0, 1, 2, 3):
        found += [bits(t) for t in cuda.grouped_forward(call, True)]
    for other in range(2, len(found), 2):
        assert torch.equal(found[0], found[other])
        assert torch.equal(found[1], found[other + 1])


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_row_without_an_adapter_is_what_is_added_bit_for_bit(grouped, form, skip):
    """A residual of -0 too, to which a product of 0 would have been added."""
    call = GroupedCase(ids=[-1, 1, 0] * 12, ranks=(24, 0), tokens=36, skip=skip).draw()
    call.x[:, ::2] = -0.0
    if call.skip is not None:
        call.skip[:, ::3] = -0.0
    y, z = backend(grouped, FORMS[form]).grouped_forward(call, True)
    expected = call.x if call.skip is None else call.x + call.skip
    for rest in (0, 1):  # no slot, and a slot of rank 0
        assert torch.equal(bits(y[rest::3]), bits(expected[rest::3].contiguous()))
        assert z[rest::3].count_nonzero() == 0
    assert not torch.equal(y[2::3], expected[2::3])


@pytest.mark.parametrize("form", FORMS)
def test_inf_stays_in_its_row_and_out_of_units_that_do_not_exist(grouped, form):
    call = GroupedCase(tokens=36, ids=[0, 1, 2] * 12, ranks=(24, 7, 16)).draw()
    clean, _ = backend(grouped, FORMS[form]).grouped_forward(call, True)
    call.x[4, 5] = float("inf")
    y, z = backend(grouped, FORMS[form]).grouped_forward(call, True)
    others = torch.arange(36) != 4
    assert torch.equal(y[others], clean[others])
    assert not z[4, :7].isfinite().any()
    assert z[4, 7:].count_nonzero() == 0


def test_a_bank_runs_on_the_cuda_backend_by_its_name(grouped):
    bank = ak.AdapterBank(72, 24, 3)
    for name, size in (("a", 24), ("b", 7)):
        bank.add(name, ak.BottleneckAdapter(72, size, init="houlsby"))
    routing = ak.AdapterRouting(40, 3).update(bank.ids(["a", None, "b", "a"] * 10))
    x = torch.randn(4, 10, 72)
    with torch.no_grad(), emulated(grouped, TILES):
        expected = bank(x, routing)
        stacks = bank.down_weights, bank.up_weights
        found = ak.grouped_bottleneck_adapter(
            x, *stacks, routing, bank.down_biases, bank.up_biases, bank.ranks, backend="cuda"
        )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_gradient_is_refused_with_the_backend_that_trains(grouped):
    call = GroupedCase(dtype=FLOAT).draw()
    routing = ak.AdapterRouting(37, 4).update(call.token_slots[:37])
    x = call.x.requires_grad_()
    with (
        emulated(grouped, TILES),
        pytest.raises(ak.BackendUnsupportedError, match=r"inference alone; the Triton backend"),
    ):
        ak.grouped_bottleneck_adapter(
            x, call.down_weights, call.up_weights, routing, ranks=call.ranks, backend="cuda"
        )
