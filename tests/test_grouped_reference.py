"""The reference of many adapters, by properties: it is what its adapters compute one by one."""

import pytest
import torch
from banks import one_at_a_time, random_adapter
from host_work import Operations
from hypothesis import given, settings
from hypothesis import strategies as st

import adapterkern as ak
from adapterkern.activations import ACTIVATIONS
from adapterkern.backends import get
from adapterkern.grouped import reference
from adapterkern.grouped.call import GroupedNeeds

HIDDEN, UNITS, SLOTS = 6, 5, 4
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
NEEDS = GroupedNeeds(*[True] * 8)
SETTINGS = settings(deadline=None, derandomize=True, max_examples=25, database=None)


@st.composite
def mixed_batches(draw):
    """A bank whose free units and slots hold NaN, x, names, and which tensors are added."""
    torch.manual_seed(draw(st.integers(0, 10**6)))
    options = {
        "activation": draw(st.sampled_from(sorted(ACTIVATIONS))), "bias": draw(st.booleans()),
    }  # fmt: skip
    residual = draw(st.sampled_from(["input", None]))
    bank = ak.AdapterBank(HIDDEN, UNITS, SLOTS, residual=residual, dtype=torch.float64, **options)
    for stack in (bank.down_weights, bank.up_weights, bank.down_biases, bank.up_biases):
        if stack is not None:
            stack.fill_(torch.nan)
    for name, units in zip("abc", draw(st.lists(st.integers(1, UNITS), max_size=3)), strict=False):
        scaling = draw(st.sampled_from([1.0, -0.5, "learned"]))
        more = {"scaling": scaling, "dtype": torch.float64, **options}
        bank.add(name, random_adapter(units, HIDDEN, **more))
    names = draw(st.lists(st.sampled_from([None, *bank.names]), max_size=9))
    wide = (len(names), HIDDEN)
    x = torch.randn(wide, dtype=torch.float64, requires_grad=True)
    skip = torch.randn(wide, dtype=torch.float64) if draw(st.booleans()) else None
    return bank, names, x, skip


def routed(bank, names):
    return ak.AdapterRouting(len(names) + 3, SLOTS).update(bank.ids(names))


def alone(bank, x, names, skip):
    if bank.residual == "input":
        return one_at_a_time(bank, x, names, skip)
    zeros = torch.zeros_like(x[:1])
    rows = [
        zeros if name is None else bank[name](x[i : i + 1], None) for i, name in enumerate(names)
    ]
    y = torch.cat(rows) if rows else torch.zeros_like(x)
    return y if skip is None else y + skip


@SETTINGS
@given(mixed_batches())
def test_any_batch_equals_its_adapters_called_one_at_a_time(batch):
    bank, names, x, skip = batch
    leaves = [x, *bank.parameters()]
    y, wanted = bank(x, routed(bank, names), skip), alone(bank, x, names, skip)
    torch.testing.assert_close(y, wanted, **CLOSE)
    assert y.is_contiguous()
    if not y.requires_grad:
        return
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, leaves, dy, allow_unused=True)
    expected = torch.autograd.grad(wanted, leaves, dy, allow_unused=True)
    for gradient, want, leaf in zip(found, expected, leaves, strict=True):
        assert (gradient is None) == (want is None) or leaf is x
        if gradient is not None:
            want = torch.zeros_like(gradient) if want is None else want
            torch.testing.assert_close(gradient, want, **CLOSE)


@SETTINGS
@given(mixed_batches(), st.randoms(use_true_random=False))
def test_a_batch_in_another_order_gives_its_rows_in_that_order(batch, random):
    """To rounding: the BLAS rounds a row as its place in the product has it."""
    bank, names, x, _ = batch
    order = random.sample(range(len(names)), len(names))
    y = bank(x, routed(bank, names))
    shuffled = bank(x[order], routed(bank, [names[i] for i in order]))
    torch.testing.assert_close(shuffled, y[order], **CLOSE)


@SETTINGS
@given(mixed_batches())
def test_plain_operations_give_what_the_reference_gives(batch):
    bank, names, x, skip = batch
    call = bank.as_call(x, routed(bank, names), skip)
    y, z = reference.forward(call)
    torch.testing.assert_close(reference.plain(call), y, **CLOSE)
    assert z.shape == (len(names), UNITS)
    for row, name in zip(z, names, strict=True):
        units = 0 if name is None else bank[name].bottleneck_size
        assert torch.equal(row[units:], torch.zeros(UNITS - units, dtype=torch.float64))


@SETTINGS
@given(mixed_batches())
def test_gradients_of_units_and_slots_that_no_token_used_are_zero(batch):
    bank, names, x, _ = batch
    call = bank.as_call(x, routed(bank, names))
    y, z = reference.forward(call)
    needs = NEEDS._replace(
        residual=False, skip=False, down_biases=call.down_biases is not None,
        up_biases=call.up_biases is not None,
    )  # fmt: skip
    found = reference.backward(call.for_backward(needs), z, torch.ones_like(y), needs)
    ranks = [0] * SLOTS
    for name in set(names) - {None}:
        ranks[bank.ids([name])] = bank[name].bottleneck_size
    for slot, rank in enumerate(ranks):
        assert not found.down_weights[slot, rank:].any()
        assert not found.up_weights[slot, :, rank:].any()
        if call.down_biases is not None:
            assert not found.down_biases[slot, rank:].any()
            assert found.up_biases[slot].any() == (rank > 0)
        assert found.scalings[slot].any() == (rank > 0)


def test_ranks_out_of_range_are_read_as_kernels_read_them():
    down, up, x = torch.randn(3, 6, 8), torch.randn(3, 8, 6), torch.randn(4, 8)
    routing = ak.AdapterRouting(4, 3).update([2, 1, 0, -1])
    found, wanted = (
        ak.grouped_bottleneck_adapter(x, down, up, routing, ranks=torch.tensor(r).int())
        for r in ([4, -3, 99], [4, 0, 6])
    )
    assert torch.equal(found, wanted)


def test_a_batch_of_no_tokens_is_empty_and_has_zeros_for_gradients():
    bank = ak.AdapterBank(HIDDEN, UNITS, SLOTS)
    bank.add("a", random_adapter(3, HIDDEN))
    x = torch.randn(0, 2, HIDDEN, requires_grad=True)
    y = bank(x, ak.AdapterRouting(4, SLOTS))
    assert y.shape == (0, 2, HIDDEN)
    routing = ak.AdapterRouting(4, SLOTS).update([0], seq_len=0)
    y = bank(x[:, 0], routing)
    assert y.shape == (0, HIDDEN)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.shape == x.shape
    down = torch.randn(SLOTS, UNITS, HIDDEN, requires_grad=True)
    up = torch.randn(SLOTS, HIDDEN, UNITS, requires_grad=True)
    y = ak.grouped_bottleneck_adapter(x[:, 0], down, up, routing)
    for gradient in torch.autograd.grad(y.sum(), [down, up]):
        assert not gradient.any()


def test_all_rows_of_one_adapter_are_that_adapter():
    adapter = random_adapter(3, HIDDEN)
    bank = ak.AdapterBank(HIDDEN, UNITS, SLOTS)
    bank.add("a", adapter)
    x = torch.randn(150, HIDDEN)
    y = bank(x, ak.AdapterRouting(150, SLOTS).update([0] * 150))
    torch.testing.assert_close(y, adapter(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("records", [False, True], ids=["no-grad", "recorded"])
def test_a_batch_known_to_have_no_adapter_is_its_sum_and_nothing_else(monkeypatch, records):
    """No op runs and nothing is copied; with `skip`, one sum is."""
    bank = ak.AdapterBank(HIDDEN, UNITS, SLOTS)
    bank.add("a", random_adapter(3, HIDDEN))
    monkeypatch.setattr(type(get("reference")), "grouped_forward", None)
    x, skip = torch.randn(7, HIDDEN, requires_grad=records), torch.randn(7, HIDDEN)
    routing = ak.AdapterRouting(7, SLOTS).update([-1] * 7)
    with torch.set_grad_enabled(records):
        with Operations() as nothing:
            assert bank(x, routing) is x
        with Operations() as one_sum:
            y = bank(x, routing, skip)
    of_dtypes = "aten.promote_types"  # of two dtypes, not of a tensor
    assert set(nothing.names) <= {of_dtypes}
    assert [name for name in one_sum.names if name != of_dtypes] == ["aten.add"]
    assert torch.equal(y, x + skip)
    if records:
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.ones_like(x))


def test_a_batch_known_to_have_no_adapter_is_still_checked():
    bank = ak.AdapterBank(HIDDEN, UNITS, SLOTS)
    routing = ak.AdapterRouting(7, SLOTS).update([-1] * 7)
    with pytest.raises(ValueError, match="is x the one meant"):
        bank(torch.randn(7, HIDDEN + 1), routing)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_reference_gives_the_same_bits_again(dtype):
    bank = ak.AdapterBank(HIDDEN, UNITS, SLOTS, dtype=dtype)
    bank.add("a", random_adapter(3, HIDDEN, dtype=dtype))
    x = torch.randn(70, HIDDEN, dtype=dtype, requires_grad=True)
    routing = ak.AdapterRouting(70, SLOTS).update([0, -1] * 35)
    results = []
    for _ in range(2):
        y = bank(x, routing)
        results.append([y, *torch.autograd.grad(y.float().sum(), [x, *bank.parameters()])])
    for first, again in zip(*results, strict=True):
        assert torch.equal(first, again)
