"""adapterkern.insert_banks: many adapters on a whole model, and a route for each batch."""

import copy
import pickle
import re

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import adapterkern as ak
from tests.banks import random_adapter

H, B, L = 12, 4, 3
NAMES = ("wide", "narrow")
EXACT = {"rtol": 0, "atol": 0}
CLOSE = {"rtol": 1e-12, "atol": 1e-12}  # of float64: sums in another order, and no more


class Block(nn.Module):
    """The hidden states are [B, L, H] behind `out`, [B L, H] behind `fc`, [B, H] behind `pool`."""

    def __init__(self):
        super().__init__()
        self.out, self.fc, self.pool = (nn.Linear(H, H) for _ in range(3))

    def forward(self, x):
        x = x + self.out(x)
        x = x + self.fc(x.flatten(0, 1)).tanh().view_as(x)
        return x + self.pool(x[:, 0]).unsqueeze(1)


LAYERS = ["out", "fc", "pool"]
PLACES = [f"{block}.{layer}" for block in (0, 1) for layer in LAYERS]


def model_of(blocks=2):
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(blocks))).double()


def input_of(batch=B):
    return torch.randn(batch, L, H, dtype=torch.float64)


def random_adapters(units, places=PLACES, **options):
    options = {"dtype": torch.float64, "activation": "relu"} | options
    return {place: random_adapter(units, H, **options) for place in places}


def banked(model=None, **options):
    """A model with banks that have two random adapters."""
    model = model_of() if model is None else model
    banks = ak.insert_banks(model, LAYERS, slots=3, activation="relu", **options)
    for name, units in zip(NAMES, (5, 2), strict=True):
        banks.add(name, random_adapters(units))
    return model, banks


def alone(banks, x, name):
    """The base model, with the adapters of that name inserted as single ones."""
    model = model_of()
    if name is not None:
        units = banks[PLACES[0]][name].bottleneck_size
        there = ak.insert(model, LAYERS, bottleneck_size=units, activation="relu")
        for place in PLACES:
            saved = banks[place][name].state_dict()
            there[f"{place}.adapter"].load_state_dict(saved)
    return model(x)


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


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


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
    model = nn.Sequential(nn.Linear(H, H), nn.Linear(H, H)).double()
    banks = ak.insert_banks(model, ["0", "1"], slots=2, activation="relu")
    for name in NAMES:
        banks.add(name, random_adapters(4, ["0", "1"]))
    x, lengths = torch.randn(7, H, dtype=torch.float64), [2, 4, 1]
    names = ["wide", None, "narrow"]
    routing = ak.AdapterRouting(10, slots=2)
    routing.update(banks.ids(names), cu_seqlens=torch.tensor([0, 2, 6, 7]))
    banks.route(routing)
    y = model(x)
    for rows, expected_rows, name in zip(y.split(lengths), x.split(lengths), names, strict=True):
        banks.route(name)
        torch.testing.assert_close(rows, model(expected_rows), **CLOSE)


def test_adapters_are_saved_and_added_elsewhere(tmp_path):
    model, banks = banked()
    saved = {place: a.state_dict() for place, a in banks.adapters("narrow").items()}
    torch.save(saved, tmp_path / "narrow.pt")
    assert (tmp_path / "narrow.pt").stat().st_size < 40_000  # not whole banks
    other = model_of()
    others = ak.insert_banks(other, LAYERS, max_bottleneck_size=2, slots=1, activation="relu")
    loaded = others.add("loaded", torch.load(tmp_path / "narrow.pt"))
    assert loaded == others.adapters("loaded")
    x = input_of()
    for at, name in ((banks, "narrow"), (others, "loaded")):
        at.route(name)
    torch.testing.assert_close(other(x), model(x), **EXACT)


def test_the_state_dict_of_the_model_has_all_adapters():
    model, banks = banked()
    twin = model_of()
    twins = ak.insert_banks(twin, LAYERS, slots=3, activation="relu")
    twin.load_state_dict(model.state_dict())
    assert twins.names == list(NAMES)
    x = input_of(2)
    for at in (banks, twins):
        at.route(["wide", "narrow"])
    torch.testing.assert_close(twin(x), model(x), **EXACT)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_have_banks_and_a_route_of_their_own(copied):
    model, banks = banked()
    x = input_of(2)
    banks.route(["wide", "narrow"])
    expected = model(x)
    twin, twins = copied((model, banks))
    only = copied(model)
    banks.route(None)
    for adapter in banks.adapters("wide").values():
        nn.init.zeros_(adapter.up_proj.weight)
    torch.testing.assert_close(twin(x), expected, **EXACT)
    torch.testing.assert_close(only(x), expected, **EXACT)
    assert twins["0.out"] is twin[0].out.bank
    twins.route("narrow")
    torch.testing.assert_close(twin(x), alone(twins, x, "narrow"), **CLOSE)
    torch.testing.assert_close(model(x), model_of()(x), **EXACT)


def test_explain_has_a_row_for_each_bank():
    model, banks = banked()
    x = input_of()
    banks.route(["wide", None, "narrow", "wide"])
    rows = ak.explain(model, x).rows
    assert [row.adapter for row in rows] == [f"{place}.bank" for place in PLACES]
    assert {(row.calls, row.backend) for row in rows} == {(1, "reference")}
    banks.route(None)
    assert {row.backend for row in ak.explain(model, x).rows} == {"not called"}


def test_a_removed_adapter_leaves_its_slots_to_the_next():
    model, banks = banked()
    banks.route(["wide", "narrow"])
    model(input_of(2))
    for name in NAMES:
        with pytest.raises(
            ValueError, match=f"'{name}' is in use: the model is routed to it.*\n.*None"
        ):
            banks.remove(name)
    banks.route("narrow")
    banks.remove("wide")
    assert banks.names == ["narrow"]
    banks.add("next", random_adapters(4))
    banks.route(["next", "narrow"])
    x = input_of(2)
    y = model(x)
    for row, name in enumerate(("next", "narrow")):
        expected = alone(banks, x[row : row + 1], name)
        torch.testing.assert_close(y[row : row + 1], expected, **CLOSE)


def test_a_removal_that_a_routing_forbids_removes_nothing():
    _, banks = banked()
    last = banks[PLACES[-1]]
    routing = ak.AdapterRouting(2, slots=3).update(last.ids(["wide", None]))
    last(input_of(1)[0, :2], routing)
    with pytest.raises(ValueError, match="a routing that this bank has served names it"):
        banks.remove("wide")
    assert list(banks.adapters("wide")) == PLACES


def test_an_adapter_that_does_not_fit_is_added_nowhere():
    _, banks = banked()
    adapters = random_adapters(4)
    adapters["1.fc"] = random_adapter(4, H, activation="tanh", dtype=torch.float64)
    with pytest.raises(ValueError, match=r"at 1\.fc: adapter 'new': its activation must be"):
        banks.add("new", adapters)
    assert banks.names == list(NAMES)
    banks.add("new", random_adapters(4))  # there is room
    with pytest.raises(ValueError, match=r"at 0\.out: all 3 slots .* are taken"):
        banks.add("one more", bottleneck_size=2)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((random_adapters(2, ["0.out", "2.out"]),), {}, ValueError,
         "got '2.out'.\n  hint: its places are 0.out, 0.fc"),
        (({},), {}, ValueError, "got {}"),
        ((random_adapter(2, H),), {}, TypeError, "a dict of them by place, got BottleneckAdapter"),
        ((random_adapters(2),), {"scaling": 2.0}, TypeError, "got scaling and adapters"),
        ((), {"bottleneck_size": 99}, ValueError,
         "at 0.out: adapter 'new': bottleneck_size must be at most"),
        ((), {"units": 2}, TypeError, "units"),
    ],
)  # fmt: skip
def test_what_cannot_be_added_is_refused(arguments, options, error, message):
    _, banks = banked()
    with pytest.raises(error, match=re.escape(message)):
        banks.add("new", *arguments, **options)
    assert banks.names == list(NAMES)


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ("strange", KeyError, "unknown adapters: 'strange' (these banks have wide, narrow)"),
        (["wide", "strange", 3], KeyError, "'strange', 3"),
        (3, TypeError, "an AdapterRouting, got 3"),
    ],
)
def test_what_cannot_be_routed_is_refused(names, error, message):
    model, banks = banked()
    banks.route("wide")
    with pytest.raises(error, match=re.escape(message)):
        banks.route(names)
    x = input_of()
    torch.testing.assert_close(model(x), alone(banks, x, "wide"), **CLOSE)  # as before


@pytest.mark.parametrize(("shape", "names"), [((2, L), 3), ((4, L), 2), ((3, L), 0)])
def test_a_batch_of_other_sequences_is_refused(shape, names):
    model, banks = banked()
    banks.route(["wide"] * names)
    with pytest.raises(ValueError, match=rf"names of {names} sequences.*\[{shape[0]}, {L}, {H}\]"):
        model(torch.randn(*shape, H, dtype=torch.float64))


def test_tokens_that_names_do_not_divide_are_refused():
    model = nn.Linear(H, H)
    banks = ak.insert_banks(model, "")
    banks.add("a", bottleneck_size=2)
    banks.route(["a", None])
    with pytest.raises(ValueError, match=r"names of 2 sequences.*got \[3, 12\]"):
        model(torch.randn(3, H))
    assert model(torch.randn(0, H)).shape == (0, H)


def test_unfit_models_and_options_are_refused():
    with pytest.raises(TypeError, match="residual is no option here"):
        ak.insert_banks(model_of(), "out", residual=None)
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got str"):
        ak.insert_banks("model", "out")
    model = model_of()
    with pytest.raises(ValueError, match="slots must be at least 1"):
        ak.insert_banks(model, "out", slots=0)
    assert all(p.requires_grad for p in model.parameters())
    banks = ak.insert_banks(model, "out")
    with pytest.raises(ValueError, match="it has 'bank' already"):
        ak.insert_banks(model, ["fc", "out"])
    assert not hasattr(model[0].fc, "bank")
    with pytest.raises(KeyError, match="these banks have none"):
        banks.adapters("a")
    with pytest.raises(TypeError, match="names must be a list of names, got 'ab'"):
        banks.ids("ab")


def linear_layers():
    """Two layers with a bank each, and their banks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(H, H), nn.Linear(H, H)).double()
    banks = ak.insert_banks(model, ["0", "1"], slots=2, activation="relu")
    for name in NAMES:
        banks.add(name, random_adapters(4, ["0", "1"]))
    return model, banks


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


def test_a_mixed_generation_says_what_each_adapter_says():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=97, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    banks = ak.insert_banks(model, after=["attn.c_proj", "mlp.c_proj"], slots=2)
    for name in NAMES:
        banks.add(name, {place: random_adapter(8, 32) for place in banks})
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
