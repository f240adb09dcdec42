"""adapterkern.insert_banks: many adapters on a whole model, and a route for each batch."""

import copy
import pickle

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import checkpoint

import adapterkern as ak
from tests.banked_models import (
    CLOSE,
    EXACT,
    NAMES,
    PLACES,
    B,
    H,
    alone,
    banked,
    gradients,
    input_of,
    linear_layers,
    model_of,
    random_adapters,
)
from tests.banks import random_adapter


def test_each_sequence_takes_the_adapters_of_its_name_at_every_place():
    model, banks = banked()
    assert list(banks) == PLACES
    assert banks.names == list(NAMES)
    x, names = input_of(), ["narrow", None, "wide", "narrow"]
    banks.route(names)
    y = model(x)
    for row, name in enumerate(names):
        expected = alone(banks, x[row : row + 1], name)
        torch.testing.assert_close(y[row : row + 1], expected, **CLOSE)
    assert (y[0] - y[3]).abs().max() > 0.1
    for name in (*NAMES, None):
        banks.route(name)
        torch.testing.assert_close(model(x), alone(banks, x, name), **CLOSE)


def test_a_model_computes_what_it_did_until_something_is_routed():
    base, x = model_of(), input_of()
    model, banks = banked(copy.deepcopy(base))
    torch.testing.assert_close(model(x), base(x), **EXACT)
    banks.add("new", bottleneck_size=4)  # the identity at the start
    for route in ("new", ["new"] * B, [None] * B):
        banks.route(route)
        torch.testing.assert_close(model(x), base(x), **EXACT)


def test_only_the_adapters_that_a_batch_names_get_gradients():
    model, banks = banked()
    banks.route(["wide", None, "wide", None])
    model(input_of()).square().sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {
        f"{place}.bank.adapters.wide.{own}"
        for place, adapter in banks.adapters("wide").items()
        for own, _ in adapter.named_parameters()
    }


def test_a_batch_that_waits_for_its_backward_keeps_its_route():
    model, banks = banked()
    batches = [(["wide", "narrow"], input_of(2)), (["narrow", None, "narrow"], input_of(3))]
    expected = {}
    for names, x in batches:
        banks.route(names)
        model(x).square().sum().backward()
    expected = gradients(model)
    model.zero_grad()
    losses = []
    for names, x in batches:
        banks.route(names)
        losses.append(model(x).square().sum())
    banks.route(None)
    for loss in losses:
        loss.backward()
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, **EXACT)


def test_checkpoints_run_again_under_the_route_that_stays():
    model, banks = banked()
    x = input_of()
    banks.route(["wide", "narrow", None, "narrow"])
    model(x).square().sum().backward()
    expected = gradients(model)
    model.zero_grad()
    h = x
    for block in model:
        h = checkpoint(block, h, use_reentrant=False)
    h.square().sum().backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], **EXACT)


def test_a_batch_may_be_seen_in_inference_mode_before_it_trains():
    model, banks = banked()
    x = input_of()
    banks.route(["wide", "narrow", None, "narrow"])
    with torch.inference_mode():
        expected = model(x)
    y = model(x)
    torch.testing.assert_close(y, expected, **EXACT)
    y.sum().backward()
    assert len(gradients(model)) == 2 * 4 * len(PLACES)


def test_a_route_keeps_few_routings_and_copies_none():
    model, banks = banked()
    banks.route(["wide", "narrow"])
    size = len(pickle.dumps(model))
    for length in range(1, 20):
        model(torch.randn(2, length, H, dtype=torch.float64))
    _, routings = banks._route._now
    assert len(routings) == 8
    assert len(pickle.dumps(model)) < size + 100


def test_a_batch_makes_one_routing_for_each_number_of_tokens():
    model, banks = banked()
    banks.route(["wide"] * B)
    model(input_of())
    model(input_of())
    served = {id(routing) for bank in banks.values() for routing in bank._routings}
    assert len(served) == 2  # B L tokens and B


def test_adapters_of_a_part_of_the_places():
    model, banks = banked()
    some = PLACES[1:4]
    banks.add("some", random_adapters(3, some))
    assert list(banks.adapters("some")) == some
    with pytest.raises(KeyError, match=r"'some' is not at 0\.out, and a routing needs it at every"):
        banks.ids(["wide", "some"])
    x = input_of(2)
    banks.route("some")
    switched = model(x)
    banks.route(["some", "some"])
    torch.testing.assert_close(model(x), switched, **CLOSE)
    banks.route(["some", "wide"])
    torch.testing.assert_close(model(x)[:1], switched[:1], **CLOSE)
    torch.testing.assert_close(model(x)[1:], alone(banks, x[1:], "wide"), **CLOSE)


def test_slots_may_differ_between_places_but_not_for_one_routing():
    model, banks = banked()
    x, names = input_of(2), ["narrow", "wide"]
    banks.route(names)
    expected = model(x)
    banks.route(None)
    swapped = banks[PLACES[2]]
    saved = {name: copy.deepcopy(swapped[name]) for name in NAMES}
    for name in NAMES:
        swapped.remove(name)
    for name in reversed(NAMES):
        swapped.add(name, saved[name])
    banks.route(names)
    torch.testing.assert_close(model(x), expected, **EXACT)
    with pytest.raises(ValueError, match=r"not\s+the same for narrow, wide\.\n  hint: banks.route"):
        banks.ids(names)


def test_a_routing_of_ones_own_serves_packed_sequences():
    model, banks = linear_layers()
    x, lengths = torch.randn(7, H, dtype=torch.float64), [2, 4, 1]
    names = ["wide", None, "narrow"]
    routing = ak.AdapterRouting(10, slots=2)
    routing.update(banks.ids(names), cu_seqlens=torch.tensor([0, 2, 6, 7]))
    banks.route(routing)
    y = model(x)
    for rows, expected_rows, name in zip(y.split(lengths), x.split(lengths), names, strict=True):
        banks.route(name)
        torch.testing.assert_close(rows, model(expected_rows), **CLOSE)


def test_fake_tensors_leave_nothing_behind():
    model, banks = linear_layers()
    x = torch.randn(6, H, dtype=torch.float64)
    banks.route(["wide", None])
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(model(x), FakeTensor)
    assert type(model(x)) is torch.Tensor


class TestCompiled:
    @pytest.fixture(autouse=True)
    def fresh(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    def test_a_routing_of_ones_own_is_part_of_one_graph(self):
        model, banks = linear_layers()
        routing = ak.AdapterRouting(6, slots=2)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        x = torch.randn(6, H, dtype=torch.float64)
        for names in (["wide", None, "narrow"], ["narrow", "narrow", "wide"]):
            routing.update(banks.ids(names), seq_len=2)
            banks.route(routing)
            y = compiled(x)
            banks.route(names)
            torch.testing.assert_close(y, model(x), **EXACT)

    def test_routes_by_name_hold_after_a_change(self):
        model, banks = linear_layers()
        compiled = torch.compile(model, backend="aot_eager")
        x = torch.randn(6, H, dtype=torch.float64)
        for route in (None, "wide", ["wide", None, "narrow"], "narrow", ["narrow", "wide"], None):
            banks.route(route)
            torch.testing.assert_close(compiled(x), model(x), **CLOSE)

    def test_a_list_of_names_is_compiled_once(self):
        model, banks = linear_layers()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        x = torch.randn(6, H, dtype=torch.float64)
        for count, names in enumerate((["wide", None], ["narrow", "wide"], ["narrow", None]), 1):
            banks.route(names)
            compiled(x)
            compiled(x)
            assert counter.frame_count == count

    def test_adapters_that_are_swapped_under_the_name_of_their_slot_stay_in_one_graph(self):
        model, banks = linear_layers()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        routing = ak.AdapterRouting(6, slots=2)
        x = torch.randn(6, H, dtype=torch.float64)
        frames = []
        for _ in range(6):
            banks.route(None)
            banks.remove("wide")
            banks.add("wide", random_adapters(4, ["0", "1"]))
            banks.route(routing.update(banks.ids(["wide", None, "narrow"]), seq_len=2))
            y = compiled(x)
            frames.append(counter.frame_count)
            banks.route(["wide", None, "narrow"])
            torch.testing.assert_close(y, model(x), **EXACT)
            routing.update([])
        assert frames[-1] == frames[2]

    def test_what_a_graph_made_stays_in_it(self):
        """Outside of it only the adapters that a batch names get gradients, and may not go."""
        model, banks = linear_layers()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        x = torch.randn(6, H, dtype=torch.float64)
        banks.route(["wide", None])
        with torch.inference_mode():
            compiled(x)
        model(x).sum().backward()
        assert all(".wide." in name for name in gradients(model))
        banks.remove("narrow")

    @pytest.mark.parametrize("strict", [False, True])
    def test_a_model_goes_on_after_an_export(self, strict):
        model, banks = linear_layers()
        x = torch.randn(6, H, dtype=torch.float64)
        banks.route(["wide", None])
        exported = torch.export.export(model, (x,), strict=strict)
        expected = model(x)
        torch.testing.assert_close(exported.module()(x), expected, **CLOSE)
        torch.testing.assert_close(copy.deepcopy(model)(x), expected, **EXACT)


def random_banks(model, after):
    banks = ak.insert_banks(model, after, slots=2)
    for name in NAMES:
        banks.add(name, {place: random_adapter(8, 32) for place in banks})
    return banks


def test_a_mixed_generation_says_what_each_adapter_says():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=97, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    banks = random_banks(model, ["attn.c_proj", "mlp.c_proj"])
    ids = torch.randint(97, (3, 5))
    names = ["narrow", None, "wide"]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    for beams in (1, 2):
        banks.route([name for name in names for _ in range(beams)])
        together = model.generate(ids, num_beams=beams, **options)
        for row, name in enumerate(names):
            banks.route(name)
            apart = model.generate(ids[row : row + 1], num_beams=beams, **options)
            assert torch.equal(together[row : row + 1], apart)
        assert not torch.equal(together[0, 5:], together[2, 5:])


def test_beams_of_a_decoder_are_named_behind_its_encoder():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=97, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2,
        decoder_start_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config).eval()
    banks = random_banks(model, ["o", "wo"])
    ids, names = torch.randint(1, 97, (2, 5)), ["narrow", "wide"]
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    banks.route(names)
    encoded = model.get_encoder()(ids)
    banks.route([name for name in names for _ in range(2)])
    together = model.generate(encoder_outputs=encoded, **options)
    for row, name in enumerate(names):
        banks.route(name)
        apart = model.generate(ids[row : row + 1], **options)
        assert torch.equal(together[row : row + 1], apart)
