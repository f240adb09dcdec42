"""Banks of a whole model: what is added, saved, copied, removed and refused."""

import copy
import pickle
import re

import pytest
import torch
from torch import nn

import adapterkern as ak
from tests.banked_models import (
    CLOSE,
    EXACT,
    LAYERS,
    NAMES,
    PLACES,
    B,
    H,
    L,
    alone,
    banked,
    input_of,
    model_of,
    random_adapters,
)
from tests.banks import random_adapter


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


def test_a_scaling_goes_beside_saved_adapters():
    model = model_of()
    banks = ak.insert_banks(model, LAYERS, slots=2, activation="relu")
    banks.add("first", random_adapters(4, scaling=0.25))
    saved = {place: a.state_dict() for place, a in banks.adapters("first").items()}
    banks.add("again", saved, scaling=0.25)
    x = input_of()
    outputs = []
    for name in ("first", "again"):
        banks.route([name] * B)
        outputs.append(model(x))
    torch.testing.assert_close(*outputs, **EXACT)


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


def test_an_adapter_that_a_routing_of_ones_own_names_is_not_removed():
    _, banks = banked()
    routing = ak.AdapterRouting(B * L, slots=3)
    routing.update(banks.ids(["wide"] * B), seq_len=L)
    banks.route(routing)  # which no bank has served yet
    with pytest.raises(ValueError, match="'wide' is in use: the model is routed to it"):
        banks.remove("wide")
    banks.remove("narrow")
    assert list(banks.adapters("wide")) == PLACES


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
        ((random_adapters(2),), {"init": "bert"}, TypeError, "only new adapters take init"),
        ((random_adapters(2),), {"scaling": 2.0}, ValueError,
         "at 0.out: adapter 'new' has a scaling of its own"),
        (({"0.out": random_adapter(2, H, scaling="learned").state_dict()},), {"scaling": 2.0},
         ValueError, "has a scaling of its own"),
        (({"0.out": random_adapter(2, H).state_dict()},), {"scaling": "learned"}, TypeError,
         "scaling must be a number, got 'learned'"),
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


def damaged(adapter, kind):
    state = adapter.state_dict()
    if kind == "scalar":
        state["down_proj.weight"] = torch.tensor(1.0)
    else:
        state["up_proj.weight"] = state["up_proj.weight"].to_sparse()
    return state


@pytest.mark.parametrize(
    ("kind", "message"),
    [("scalar", "must have shape"), ("sparse", "must be dense, got torch.sparse")],
)
def test_damaged_state_dicts_are_added_nowhere(kind, message):
    _, banks = banked()
    adapters = random_adapters(4)
    adapters["1.fc"] = damaged(adapters["1.fc"], kind)
    with pytest.raises(ValueError, match=rf"at 1\.fc: .*{message}"):
        banks.add("new", adapters)
    assert banks.names == list(NAMES)


def test_memory_that_ends_leaves_no_adapter_behind(monkeypatch):
    _, banks = banked()
    adapters = random_adapters(4)
    last = adapters["1.fc"].down_proj.weight
    copy_ = torch.Tensor.copy_

    def failing(self, other, *args, **kwargs):
        if other is last:
            raise torch.OutOfMemoryError("no memory")
        return copy_(self, other, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "copy_", failing)
    with pytest.raises(torch.OutOfMemoryError, match=r"^no memory$"):
        banks.add("new", adapters)
    monkeypatch.undo()
    assert banks.names == list(NAMES)
    assert all(bank.ranks.count_nonzero() == 2 for bank in banks.values())
    banks.add("new", adapters)


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ("strange", KeyError, "unknown adapters: 'strange' (these banks have wide, narrow)"),
        (["wide", "strange", 3], KeyError, "'strange', 3"),
        (3, TypeError, "an AdapterRouting, got 3"),
        ({"wide"}, TypeError, "an AdapterRouting, got {'wide'}"),  # which has no order
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


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tokens_that_names_do_not_divide_are_refused():
    model = nn.Linear(H, H)
    banks = ak.insert_banks(model, "")
    banks.add("a", bottleneck_size=2)
    banks.route(["a", None])
    with pytest.raises(ValueError, match=r"names of 2 sequences.*got \[3, 12\]"):
        model(torch.randn(3, H))
    assert model(torch.randn(0, H)).shape == (0, H)
    banks.route([])
    assert model(torch.randn(0, H)).shape == (0, H)
    with pytest.raises(ValueError, match=r"names of 0 sequences.*got \[5, 12\]"):
        model(torch.randn(5, H))
    banks.route(["a", None])
    rows = [torch.randn(3, H), torch.randn(2, H)]
    with pytest.raises(ValueError, match="enable_nested_tensor=False"):
        model(torch.nested.nested_tensor(rows))


def test_a_module_without_hidden_states_works_until_something_is_routed():
    class Named(nn.Linear):
        def forward(self, x):
            return {"hidden": super().forward(x)}

    model = Named(H, H)
    banks = ak.insert_banks(model, "")
    banks.add("a", bottleneck_size=2)
    assert set(model(torch.randn(3, H))) == {"hidden"}
    banks.route("a")
    with pytest.raises(TypeError, match="whose output must be a tensor or a tuple"):
        model(torch.randn(3, H))


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
    with pytest.raises(ValueError, match="fits none"):  # a bank is no place for another
        ak.insert_banks(model, "bank", name="second", hidden_size=H)
    fresh = model_of()
    for wrong in ("a.b", "", 3):
        for put in (ak.insert, ak.insert_banks):
            with pytest.raises(ValueError, match="a string without dots, got"):
                put(fresh, "out", name=wrong)
    assert all(p.requires_grad for p in fresh.parameters())
    with pytest.raises(KeyError, match="these banks have none"):
        banks.adapters("a")
    with pytest.raises(TypeError, match="names must be a list of names, got 'ab'"):
        banks.ids("ab")
