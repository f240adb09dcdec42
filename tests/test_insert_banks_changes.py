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


def test_adapters_are_saved_and_loaded_elsewhere(tmp_path):
    model, banks = banked()
    banks.remove("wide")
    some = {"0.out": {"scaling": 0.25}, "0.fc": {"bias": False}, "1.pool": {"scaling": "learned"}}
    banks.add("some", {p: random_adapters(4, [p], **options)[p] for p, options in some.items()})
    other = model_of()
    others = ak.insert_banks(other, LAYERS, max_bottleneck_size=4, slots=2, activation="relu")
    x = input_of()
    for name in ("narrow", "some"):
        file = tmp_path / f"{name}.pt"
        banks.save(name, file)
        assert file.stat().st_size < 20_000  # not whole banks
        loaded = others.load(f"loaded {name}", file)
        assert loaded == others.adapters(f"loaded {name}")
        banks.route([name] * B)
        others.route([f"loaded {name}"] * B)
        torch.testing.assert_close(other(x), model(x), **EXACT)
    assert list(loaded) == list(some)
    assert isinstance(loaded["1.pool"].scaling, nn.Parameter)


def test_state_dicts_by_place_are_added_too():
    model, banks = banked()
    banks.add("again", {place: a.state_dict() for place, a in banks.adapters("wide").items()})
    x, outputs = input_of(), []
    for name in ("wide", "again"):
        banks.route(name)
        outputs.append(model(x))
    torch.testing.assert_close(*outputs, **EXACT)


def test_what_cannot_be_loaded_is_refused(tmp_path):
    _, banks = banked()
    file = tmp_path / "wide.pt"
    banks.save("wide", file)
    tanh = ak.insert_banks(model_of(), LAYERS, activation="tanh")
    with pytest.raises(ValueError, match=r"at 0\.out: .* its activation must be the bank's, tanh"):
        tanh.load("wide", file)
    fewer = ak.insert_banks(model_of(1), LAYERS, activation="relu")
    with pytest.raises(ValueError, match=r"got '1\.out', '1\.fc', '1\.pool'"):
        fewer.load("wide", file)
    with pytest.raises(ValueError, match="already has an adapter 'wide'"):
        banks.load("wide", file)
    with pytest.raises(FileNotFoundError):
        banks.load("new", tmp_path / "none.pt")
    saved = torch.load(file)
    damages = {
        "text.pt": lambda path: path.write_text("text"),
        "short.pt": lambda path: path.write_bytes(file.read_bytes()[:700]),
        "list.pt": lambda path: torch.save([1], path),
        "keys.pt": lambda path: torch.save({"0.out": saved["0.out"]["weights"]}, path),
        "weights.pt": lambda path: torch.save({"0.out": saved["0.out"] | {"weights": {}}}, path),
        "pickle.pt": lambda path: torch.save(nn.Linear(2, 2), path),
    }
    for name, damage in damages.items():
        damage(tmp_path / name)
        with pytest.raises(
            ValueError, match=rf"{name} must be a file that AdapterBanks\.save wrote"
        ):
            banks.load("new", tmp_path / name)
    assert banks.names == list(NAMES)


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
    model.banks = banks
    whole = copied(model)
    banks.route(None)
    for adapter in banks.adapters("wide").values():
        nn.init.zeros_(adapter.up_proj.weight)
    torch.testing.assert_close(twin(x), expected, **EXACT)
    torch.testing.assert_close(only(x), expected, **EXACT)
    assert twins["0.out"] is twin[0].out.bank
    torch.testing.assert_close(whole(x), expected, **EXACT)
    whole.banks.route(None)
    torch.testing.assert_close(whole(x), model_of()(x), **EXACT)
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
    with pytest.raises(TypeError, match="takes no residual"):
        ak.insert_banks(model_of(), "out", residual=None)
    with pytest.raises(TypeError, match=r"takes no bottleneck_size\.\n  hint: max_bottleneck_size"):
        ak.insert_banks(model_of(), "out", bottleneck_size=8)
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
    with pytest.raises(KeyError, match=r"no bank at 'a'; its places are 0\.out, 1\.out, its"):
        banks["a"]
    assert "a" not in banks
    with pytest.raises(TypeError, match="names must be a list of names, got 'ab'"):
        banks.ids("ab")
