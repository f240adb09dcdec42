"""State dicts and copies of a bank: what they hold, what loads, what is refused in which words."""

import copy
import io
import pickle

import pytest
import torch
from banks import bank_of, one_at_a_time, random_adapter, routed
from safetensors.torch import load_file, save_file, save_model

import adapterkern as ak

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
NAMES = ["full", "narrow", None, "thin"]


def empty(**options):
    return ak.AdapterBank(16, 8, 5, **options)


def lie_in_slots(bank):
    """Whether a write to each parameter shows in the stacks."""
    for name in bank.names:
        slot = bank.ids([name])[0]
        with torch.no_grad():
            for parameter in bank[name].parameters():
                parameter.add_(1.0)
        units = bank[name].bottleneck_size
        pairs = [
            (bank[name].down_proj.weight, bank.down_weights[slot, :units]),
            (bank[name].up_proj.weight, bank.up_weights[slot, :, :units]),
            (bank[name].down_proj.bias, bank.down_biases[slot, :units]),
            (bank[name].up_proj.bias, bank.up_biases[slot]),
        ]
        if isinstance(bank[name].scaling, torch.Tensor):
            pairs.append((bank[name].scaling, bank.scalings[slot : slot + 1]))
        if not all(torch.equal(p, part) for p, part in pairs):
            return False
    return True


def assert_same(bank, other):
    x = torch.randn(4, 16, dtype=bank.down_weights.dtype)
    torch.testing.assert_close(
        other(x, routed(other, NAMES)), bank(x, routed(bank, NAMES)), rtol=0, atol=0
    )
    assert lie_in_slots(other)


def mixed_bank():
    bank = bank_of()
    bank.remove("thin")
    bank.add("thin", random_adapter(2, scaling="learned"))
    bank["narrow"].scaling = 0.5
    return bank


def test_state_dict_has_adapters_by_name_and_the_scalings_that_are_not_learned():
    bank = mixed_bank()
    state = bank.state_dict()
    keys = ["down_proj.weight", "down_proj.bias", "up_proj.weight", "up_proj.bias"]
    wanted = {f"adapters.{name}.{key}" for name in bank.names for key in keys}
    wanted |= {"adapters.thin.scaling", "scalings.full", "scalings.narrow"}
    assert state.keys() == wanted
    assert state["scalings.narrow"].item() == 0.5
    assert state["scalings.narrow"].dtype == torch.float32
    assert torch.equal(state["adapters.narrow.up_proj.weight"], bank["narrow"].up_proj.weight)


def test_tensors_of_a_state_dict_are_dense_and_share_no_memory():
    bank = mixed_bank()
    state = bank.state_dict()
    assert all(t.is_contiguous() for t in state.values())
    assert len({t.untyped_storage().data_ptr() for t in state.values()}) == len(state)
    assert all(t.untyped_storage().nbytes() == t.numel() * t.itemsize for t in state.values())
    kept = bank.state_dict(keep_vars=True)
    assert kept["adapters.narrow.up_proj.weight"] is bank["narrow"].up_proj.weight


def test_what_inference_mode_copies_can_be_trained():
    bank, x = bank_of(), torch.randn(2, 16)
    old = bank["narrow"]
    with torch.inference_mode():
        saved = bank.state_dict()
        bank.remove("narrow")
    empty = ak.AdapterBank(16, 8, 5)
    empty.load_state_dict(saved, assign=True)
    for y in (old(x), empty["narrow"](x)):
        y.sum().backward()


def test_state_dict_of_an_adapter_alone_holds_nothing_of_its_neighbours():
    bank = bank_of(options={"scaling": "learned"})
    for adapter in (bank["narrow"], copy.deepcopy(bank)["narrow"]):
        for tensor in adapter.state_dict().values():
            assert tensor.is_contiguous()
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
        kept = adapter.state_dict(keep_vars=True)
        assert all(kept[key] is parameter for key, parameter in adapter.named_parameters())


def test_adapter_of_a_bank_s_state_dict_loads_alone():
    bank, x = mixed_bank(), torch.randn(3, 16)
    alone = ak.BottleneckAdapter(16, 2, scaling="learned")
    state = bank.state_dict()
    prefix = "adapters.thin."
    alone.load_state_dict(
        {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}
    )
    torch.testing.assert_close(alone(x), bank["thin"](x), rtol=0, atol=0)


@pytest.mark.parametrize("way", ["torch", "save_file", "save_model"])
@pytest.mark.parametrize("assign", [False, True])
def test_an_empty_bank_loads_what_another_saved(tmp_path, way, assign):
    bank = mixed_bank()
    if way == "torch":
        torch.save(bank.state_dict(), tmp_path / "bank")
        state = torch.load(tmp_path / "bank")
    else:
        save = {"save_file": lambda b, p: save_file(b.state_dict(), p), "save_model": save_model}
        save[way](bank, tmp_path / "bank")
        state = load_file(tmp_path / "bank")
    other = empty()
    addresses = other.up_weights.data_ptr(), other.ranks.data_ptr()
    other.load_state_dict(state, assign=assign)
    assert (other.up_weights.data_ptr(), other.ranks.data_ptr()) == addresses
    assert sorted(other.names) == sorted(bank.names)
    assert other["narrow"].scaling == 0.5
    assert_same(bank, other)


def test_a_bank_within_a_model_loads_there():
    model, other = torch.nn.Sequential(mixed_bank()), torch.nn.Sequential(empty())
    other.load_state_dict(model.state_dict())
    assert_same(model[0], other[0])


@pytest.mark.parametrize("assign", [False, True])
def test_known_names_load_in_place_and_new_ones_beside_them(assign):
    bank, other = mixed_bank(), empty()
    for name in ("narrow", "full"):
        other.add(name, random_adapter(bank[name].bottleneck_size))
    held = other["narrow"].up_proj.weight
    address = held.data_ptr()
    other.load_state_dict(bank.state_dict(), assign=assign)
    assert other.names == ["narrow", "full", "thin"]
    assert other["narrow"].up_proj.weight.data_ptr() == address
    assert (other["narrow"].up_proj.weight is held) != assign
    assert_same(bank, other)


def test_bank_on_the_meta_device_becomes_real_with_what_it_is_assigned():
    bank, other = mixed_bank(), empty(device="meta")
    other.load_state_dict(bank.state_dict(), assign=True)
    assert other.ranks.tolist() == [8, 5, 2, 0, 0]
    assert_same(bank, other)


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
def test_bank_that_is_emptied_of_values_keeps_ranks_and_scalings():
    bank, other = mixed_bank(), empty(device="meta")
    other.load_state_dict(bank.state_dict())
    other.to_empty(device="cpu")
    other.load_state_dict(bank.state_dict())
    assert other.ranks.tolist() == [8, 5, 2, 0, 0]
    assert_same(bank, other)


def test_a_state_dict_of_another_dtype_is_converted():
    bank, other = mixed_bank().double(), empty()
    other.load_state_dict(bank.state_dict(), assign=True)
    assert other["narrow"].up_proj.weight.dtype == torch.float32
    assert_same(bank.float(), other)


def test_missing_and_strange_keys_are_told_by_name():
    bank = mixed_bank()
    state = bank.state_dict()
    state |= {"scalings.fr": torch.ones(()), "strange": torch.ones(())}
    del state["scalings.narrow"], state["adapters.full.up_proj.bias"]
    with pytest.raises(RuntimeError) as caught:
        bank.load_state_dict(state)
    message = str(caught.value)
    assert "Missing key(s)" in message
    assert "Unexpected key(s)" in message
    found = bank.load_state_dict(state, strict=False)
    assert found.missing_keys == ["scalings.narrow", "adapters.full.up_proj.bias"]
    assert sorted(found.unexpected_keys) == ["scalings.fr", "strange"]
    bank.add("more", random_adapter(3))
    found = bank.load_state_dict(mixed_bank().state_dict(), strict=False)
    assert len([key for key in found.missing_keys if ".more" in key]) == 5
    assert not found.unexpected_keys


FR = "adapters.fr."
REFUSED = {
    "wide": (
        {f"{FR}down_proj.weight": (9, 16), f"{FR}up_proj.weight": (16, 9)},
        "adapter 'fr': bottleneck_size must be at most the bank's 8, got 9.\n"
        "  hint: a bank with max_bottleneck_size=9.",
    ),
    "other-hidden-size": (
        {f"{FR}down_proj.weight": (4, 12), f"{FR}up_proj.weight": (12, 4)},
        "adapter 'fr': down_proj.weight must have shape [R, 16] and up_proj.weight [16, R], got "
        "[4, 12] and [12, 4].",
    ),
    "half-an-adapter": (
        {f"{FR}down_proj.weight": (4, 16)},
        "the state dict of an adapter has down_proj.weight, up_proj.weight and, together, "
        "down_proj.bias, up_proj.bias, and a learned scaling; got down_proj.weight.\n"
        "  hint: BottleneckAdapter.state_dict() makes one.",
    ),
    "strange-key": (
        {f"{FR}down_proj.weight": (4, 16), f"{FR}up_proj.weight": (16, 4), f"{FR}gate": (1,)},
        "the state dict of an adapter has down_proj.weight, up_proj.weight and, together, "
        "down_proj.bias, up_proj.bias, and a learned scaling; got down_proj.weight, gate, "
        "up_proj.weight.\n  hint: BottleneckAdapter.state_dict() makes one.",
    ),
    "scaling": (
        {f"{FR}down_proj.weight": (4, 16), f"{FR}up_proj.weight": (16, 4), "scalings.fr": (3,)},
        "adapter 'fr': its scaling must be a tensor of one number, got [3].",
    ),
    "known-name": (
        {"adapters.narrow.down_proj.weight": (4, 16)},
        "adapter 'narrow' must have the shapes that it has in this bank, got down_proj.weight "
        "[4, 16] for [5, 16].\n  hint: remove it first, or load a new bank.",
    ),
}


@pytest.mark.parametrize(("shapes", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("assign", [False, True])
def test_adapter_that_does_not_fit_is_refused_whole(shapes, message, assign):
    bank = mixed_bank()
    before = {key: tensor.clone() for key, tensor in bank.state_dict().items()}
    state = bank.state_dict() | {key: torch.ones(shape) for key, shape in shapes.items()}
    with pytest.raises(RuntimeError) as caught:
        bank.load_state_dict(state, assign=assign)
    assert f"\t{message}" in str(caught.value)
    assert "key(s)" not in str(caught.value)
    after = bank.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert lie_in_slots(bank)


def test_adapters_beyond_the_last_slot_are_refused():
    bank = ak.AdapterBank(16, 8, 2)
    with pytest.raises(RuntimeError) as caught:
        bank.load_state_dict(mixed_bank().state_dict())
    assert (
        "all 2 slots of this bank are taken, by full, narrow; there is none for 'thin'.\n"
        "  hint: remove one, or make a bank with slots=4."
    ) in str(caught.value)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda bank: pickle.loads(pickle.dumps(bank)),
    "torch.save": lambda bank: _saved_and_loaded(bank),
}


def _saved_and_loaded(bank):
    file = io.BytesIO()
    torch.save(bank, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_has_slots_of_its_own(copied):
    bank, x = mixed_bank(), torch.randn(4, 16)
    routing = routed(bank, NAMES)
    expected = bank(x, routing)
    other = copied(bank)
    assert_same(bank, other)
    other["narrow"].scaling = 2.0
    other.remove("thin")  # the routing is of the first bank
    other.add("de", random_adapter(4))
    assert torch.equal(bank(x, routing), expected)
    names = ["de", "narrow", "full", "full"]
    torch.testing.assert_close(
        other(x, routed(other, names)), one_at_a_time(other, x, names), **CLOSE
    )


def test_a_shallow_copy_is_the_same_bank():
    bank, x = mixed_bank(), torch.randn(4, 16)
    other = copy.copy(bank)
    assert torch.equal(other(x, routed(other, NAMES)), bank(x, routed(bank, NAMES)))
    assert other["thin"] is bank["thin"]
    assert lie_in_slots(bank)
