"""`AdapterRouting`: its four buffers against a plain model, and what it refuses in which words."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

import adapterkern as ak
from adapterkern.grouped.call import TILE, num_tiles

SETTINGS = settings(deadline=None, derandomize=True, max_examples=60, database=None)
BUFFERS = ("token_slots", "order", "tiles", "slot_offsets")


def model(ids, slots, max_tokens):
    """The buffers as lists, built as their docstring tells."""
    room = max_tokens + slots * (TILE - 1)
    groups = [[t for t, i in enumerate(ids) if i == slot] for slot in range(slots)]
    without = [t for t, i in enumerate(ids) if not 0 <= i < slots]
    order, tiles, offsets = [], [], []
    for slot, tokens in enumerate([*groups, without]):
        offsets.append(len(order))
        for first in range(0, len(tokens), TILE):
            tiles.append([slot, len(order) + first, min(TILE, len(tokens) - first)])
        order += tokens
        if slot < slots:
            order += [-1] * (-len(tokens) % TILE)
    offsets.append(len(order))
    most = -(-room // TILE)
    return {
        "token_slots": [i if 0 <= i < slots else -1 for i in ids] + [-1] * (max_tokens - len(ids)),
        "order": order + [-1] * (room - len(order)),
        "tiles": tiles + [[-1, 0, 0]] * (most - len(tiles)),
        "slot_offsets": offsets,
    }


def assert_is_model(routing, ids):
    for name, wanted in model(ids, routing.slots, routing.max_tokens).items():
        found = getattr(routing, name)
        assert found.dtype == torch.int32
        assert found.tolist() == wanted, name
    assert routing.num_tokens == len(ids)
    assert routing.used_slots() == tuple(sorted({i for i in ids if i >= 0}))
    in_use = [tile for tile in routing.tiles.tolist() if tile[0] >= 0]
    assert len(in_use) <= num_tiles(len(ids), routing.slots)


@st.composite
def batches(draw):
    slots = draw(st.integers(1, 5))
    runs = st.tuples(st.integers(-1, slots - 1), st.sampled_from([1, 2, 3, 63, 64, 65, 130]))
    ids = [i for i, count in draw(st.lists(runs, max_size=4)) for _ in range(count)]
    if draw(st.booleans()):
        ids = draw(st.permutations(ids)) if len(ids) < 70 else ids[::2] + ids[1::2]
    return slots, ids, draw(st.integers(0, 70))


@SETTINGS
@given(batches())
def test_routing_sorts_tokens_as_the_model_does(batch):
    slots, ids, spare = batch
    routing = ak.AdapterRouting(max(len(ids) + spare, 1), slots)
    assert routing.update(ids) is routing
    assert_is_model(routing, ids)


@SETTINGS
@given(batches(), batches())
def test_update_leaves_nothing_of_an_earlier_batch_and_keeps_addresses(first, second):
    slots = max(first[0], second[0])
    routing = ak.AdapterRouting(max(len(first[1]), len(second[1]), 1), slots)
    addresses = [buffer.data_ptr() for buffer in routing.buffers()]
    routing.update(first[1])
    routing.update(torch.tensor(second[1], dtype=torch.int32))
    assert_is_model(routing, second[1])
    assert [buffer.data_ptr() for buffer in routing.buffers()] == addresses


@SETTINGS
@given(st.lists(st.tuples(st.integers(-1, 2), st.integers(0, 90)), max_size=5))
def test_sequences_of_any_length_are_routed_as_their_tokens(sequences):
    ids = [i for i, length in sequences for _ in range(length)]
    bounds = list(itertools.accumulate((length for _, length in sequences), initial=0))
    routing = ak.AdapterRouting(500, 3)
    routing.update([i for i, _ in sequences], cu_seqlens=torch.tensor(bounds))
    lengths = {i: length for i, length in sequences if length}
    for name, wanted in model(ids, 3, 500).items():
        assert getattr(routing, name).tolist() == wanted
    assert routing.num_tokens == len(ids)
    assert set(lengths) - {-1} == set(routing.used_slots())


@SETTINGS
@given(st.lists(st.integers(-1, 2), max_size=6), st.integers(0, 80))
def test_sequences_of_one_length_are_routed_as_their_tokens(ids, length):
    routing = ak.AdapterRouting(500, 3).update(ids, seq_len=length)
    for name, wanted in model([i for i in ids for _ in range(length)], 3, 500).items():
        assert getattr(routing, name).tolist() == wanted


def test_a_routing_without_an_update_is_of_no_tokens():
    routing = ak.AdapterRouting(10, 2)
    assert_is_model(routing, [])
    assert repr(routing) == "AdapterRouting(max_tokens=10, slots=2, num_tokens=0, device='cpu')"


def test_ids_of_any_shape_and_kind_of_integer_are_one_a_token():
    ids = [0, 1, -1, 2, 2, 0]
    for dtype in (torch.int8, torch.int16, torch.int32, torch.int64):
        routing = ak.AdapterRouting(8, 3).update(torch.tensor(ids, dtype=dtype).view(2, 3))
        assert_is_model(routing, ids)


@pytest.mark.parametrize("lengths", [{}, {"seq_len": 2}, {"cu_seqlens": torch.tensor([0, 3, 4])}])
def test_what_lies_on_the_host_is_sent_without_a_wait(lengths):
    sent = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.Tensor.to and torch.device("meta") in args:
                sent.append(kwargs)
            return function(*args, **(kwargs or {}))

    with Watch():
        ak.AdapterRouting(9, 3, device="meta").update([0, -1], **lengths)
    assert sent == [{"non_blocking": True}] * (2 if "cu_seqlens" in lengths else 1)


def test_what_only_the_device_knows_is_read_from_the_buffers(monkeypatch):
    routing = ak.AdapterRouting(300, 4).update([3] * 70 + [-1] * 3 + [0])
    routing.used = None
    assert routing.used_slots() == (0, 3)
    assert routing.used == (0, 3)
    routing.used, routing._captured = None, True  # a CUDA graph may change the buffers
    assert routing.used_slots() == (0, 3)
    assert routing.used is None


def cumulative(*values, **options):
    return {"cu_seqlens": torch.tensor(values, **options)}


NAMES_HINT = "\n  hint: bank.ids(names) gives them."
SUMS_HINT = "\n  hint: it has the sums of lengths, as in F.pad(lengths.cumsum(0), (1, 0))."
ENDS_HINT = "\n  hint: it begins with 0 and ends with the tokens."
IN_RANGE = "ids must be slots from 0 to 2, or -1 for no adapter, got "
WRONG = {
    "out-of-range": ([0, 3, -2, 1], {}, ValueError, f"{IN_RANGE}-2, 3.{NAMES_HINT}"),
    "beyond-int32": (torch.tensor([2**32]), {}, ValueError, f"{IN_RANGE}4294967296.{NAMES_HINT}"),
    "beyond-int64": ([2**70], {}, ValueError, f"{IN_RANGE}9223372036854775807.{NAMES_HINT}"),
    "floats": ([0.5], {}, TypeError, f"ids must be integers, got [0.5].{NAMES_HINT}"),
    "bools": ([True], {}, TypeError, f"ids must be integers, got [True].{NAMES_HINT}"),
    "names": (["fr"], {}, TypeError, f"ids must be integers, got ['fr'].{NAMES_HINT}"),
    "name": ("fr", {}, TypeError, f"ids must be integers, got 'fr'.{NAMES_HINT}"),
    "none": (None, {}, TypeError, f"ids must be integers, got None.{NAMES_HINT}"),
    "number": (3, {}, TypeError, f"ids must be integers, got 3.{NAMES_HINT}"),
    "float-tensor": (
        torch.ones(2), {}, TypeError, "ids must be integers, got a tensor of float32.",
    ),
    "bool-tensor": (
        torch.ones(2, dtype=torch.bool), {}, TypeError,
        "ids must be integers, got a tensor of bool.",
    ),
    "meta": (
        torch.zeros(2, dtype=torch.int32, device="meta"), {}, ValueError,
        "ids are on the meta device and have no values; this routing is on cpu.",
    ),
    "too-many": (
        [0] * 5, {}, ValueError,
        "this routing is for at most 4 tokens, got 5.\n"
        "  hint: AdapterRouting(max_tokens=5, slots=3).",
    ),
    "too-many-in-sequences": (
        [0, 1], {"seq_len": 3}, ValueError,
        "this routing is for at most 4 tokens, got 6, in 2 sequences of 3.\n"
        "  hint: AdapterRouting(max_tokens=6, slots=3).",
    ),
    "too-many-in-ragged-sequences": (
        [0, 1], cumulative(0, 2, 30), ValueError,
        "this routing is for at most 4 tokens, got 30.\n"
        "  hint: AdapterRouting(max_tokens=30, slots=3).",
    ),
    "both-lengths": (
        [0], {"seq_len": 2, **cumulative(0, 2)}, ValueError,
        "seq_len and cu_seqlens both say how long sequences are; give one.",
    ),
    "negative-length": ([0], {"seq_len": -1}, ValueError, "seq_len must be at least 0, got -1."),
    "float-length": ([0], {"seq_len": 1.0}, TypeError, "seq_len must be an integer, got 1.0."),
    "bool-length": ([0], {"seq_len": True}, TypeError, "seq_len must be an integer, got True."),
    "sums-in-a-list": (
        [0], {"cu_seqlens": [0, 2]}, TypeError, "cu_seqlens must be a tensor, got list.",
    ),
    "float-sums": (
        [0], cumulative(0.0, 2.0), TypeError,
        "cu_seqlens must be integers, got a tensor of float32.",
    ),
    "sums-of-others": (
        [0], cumulative(0, 1, 2), ValueError,
        f"cu_seqlens must have shape [2] for 1 sequences, got [3].{ENDS_HINT}",
    ),
    "falling-sums": (
        [0, 1], cumulative(0, 3, 2), ValueError,
        f"cu_seqlens must begin with 0 and not fall, got [0, 3, 2].{SUMS_HINT}",
    ),
    "sums-from-one": (
        [0, 1], cumulative(1, 2, 3), ValueError,
        f"cu_seqlens must begin with 0 and not fall, got [1, 2, 3].{SUMS_HINT}",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("ids", "options", "kind", "message"), WRONG.values(), ids=WRONG)
def test_update_refuses_and_stays_with_the_batch_before(ids, options, kind, message):
    routing = ak.AdapterRouting(4, 3).update([2, -1, 0])
    with pytest.raises(kind) as caught:
        routing.update(ids, **options)
    assert str(caught.value) == message
    assert_is_model(routing, [2, -1, 0])


@pytest.mark.parametrize(
    ("sizes", "kind", "message"),
    [
        ((4.0, 3), TypeError, "max_tokens must be an integer, got 4.0."),
        ((4, True), TypeError, "slots must be an integer, got True."),
        ((0, 3), ValueError, "max_tokens must be at least 1, got 0."),
        ((4, 0), ValueError, "slots must be at least 1, got 0."),
        (
            (2**31, 3), ValueError,
            "max_tokens + 63 * slots must be below 2^31, got 2147483837.\n"
            "  hint: a routing is for one batch, not for a whole corpus.",
        ),
    ],
)  # fmt: skip
def test_routing_refuses_sizes(sizes, kind, message):
    with pytest.raises(kind) as caught:
        ak.AdapterRouting(*sizes)
    assert str(caught.value) == message
