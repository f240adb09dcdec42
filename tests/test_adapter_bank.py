"""`AdapterBank`: adapters in slots, called, added, removed, set, frozen, trained."""

import pytest
import torch
from banks import RANKS, bank_of, one_at_a_time, random_adapter, routed

import adapterkern as ak

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
NAMES = ["full", "narrow", None, "thin", "narrow", "full", "narrow", None]


def stacks(bank):
    kinds = ("down_weights", "up_weights", "down_biases", "up_biases", "scalings", "ranks")
    return {kind: getattr(bank, kind) for kind in kinds}


@pytest.mark.parametrize("with_skip", [False, True])
@pytest.mark.parametrize("scaling", [1.0, 0.5, "learned"])
def test_bank_computes_what_its_adapters_compute_one_at_a_time(scaling, with_skip):
    bank = bank_of(options={"scaling": scaling})
    x = torch.randn(8, 16)
    skip = torch.randn(8, 16) if with_skip else None
    y = bank(x, routed(bank, NAMES), skip)
    torch.testing.assert_close(y, one_at_a_time(bank, x, NAMES, skip), **CLOSE)
    assert not torch.allclose(y, x, atol=0.1)


def test_bank_routes_sequences_and_takes_another_residual():
    bank, x, other = bank_of(), torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    routing = routed(bank, ["narrow", None], seq_len=3)
    wanted = torch.stack([other[0] + bank["narrow"](x[0], residual=None), other[1]])
    torch.testing.assert_close(bank(x, routing, residual=other), wanted, **CLOSE)
    without = bank_of(residual=None)
    y = without(x, routed(without, ["narrow", None], seq_len=3))
    torch.testing.assert_close(y[0], without["narrow"](x[0], residual=None), **CLOSE)
    assert torch.equal(y[1], torch.zeros(3, 16))


def test_added_adapter_is_a_copy_that_lies_in_a_slot():
    bank, adapter = bank_of({}), random_adapter(5)
    held = adapter.up_proj.weight.detach().clone()
    made = bank.add("fr", adapter)
    assert made is bank["fr"]
    assert bank.names == ["fr"]
    assert "fr" in bank
    assert len(bank) == 1
    with torch.no_grad():
        adapter.up_proj.weight.zero_()
    assert torch.equal(made.up_proj.weight, held)
    assert torch.equal(bank.up_weights[0, :, :5], held)
    with torch.no_grad():
        made.up_proj.weight.fill_(3.0)
    assert torch.equal(bank.up_weights[0, :, :5], torch.full((16, 5), 3.0))
    assert bank.ranks.tolist() == [5, 0, 0, 0, 0]


def test_adapter_from_a_state_dict_computes_the_same():
    adapter, x = random_adapter(5, scaling="learned"), torch.randn(3, 16)
    bank = bank_of({})
    bank.add("fr", adapter.state_dict())
    y = bank(x, routed(bank, ["fr"] * 3))
    torch.testing.assert_close(y, adapter(x), **CLOSE)


def test_adapter_with_tied_weights_is_added_as_two_copies():
    adapter, x = random_adapter(16), torch.randn(2, 16)
    adapter.up_proj.weight = adapter.down_proj.weight
    bank = bank_of({"other": 16})
    bank.add("fr", adapter)
    torch.testing.assert_close(bank(x, routed(bank, ["fr"] * 2)), adapter(x), **CLOSE)


def test_removed_slot_is_free_and_its_tokens_take_no_adapter():
    bank, x = bank_of(), torch.randn(2, 16)
    ids = bank.ids(["full", "narrow"])
    addresses = {kind: stack.data_ptr() for kind, stack in stacks(bank).items()}
    bank.remove("full")
    y = bank(x, ak.AdapterRouting(2, 5).update(ids))
    assert torch.equal(y[0], x[0])
    torch.testing.assert_close(y[1:], bank["narrow"](x[1:]), **CLOSE)
    bank.add("next", random_adapter(3))
    assert bank.ids(["next", "narrow"]).tolist() == [0, 1]
    assert bank.names == ["narrow", "thin", "next"]
    assert {kind: stack.data_ptr() for kind, stack in stacks(bank).items()} == addresses


@pytest.mark.parametrize("moved", [False, True], ids=["at-first", "moved"])
def test_an_optimizer_of_a_removed_adapter_leaves_the_next_one_of_its_slot(moved):
    bank = bank_of()
    if moved:
        bank.double().float()
    old, values = bank["narrow"], bank["narrow"].state_dict()
    values = {key: value.clone() for key, value in values.items()}
    optimizer = torch.optim.AdamW(bank.parameters(), lr=0.1)
    for parameter in bank.parameters():
        parameter.grad = torch.ones_like(parameter)
    bank.remove("narrow")
    new = random_adapter(8)
    bank.add("next", new)
    assert all(torch.equal(old.state_dict()[key], value) for key, value in values.items())
    optimizer.step()
    assert not torch.equal(old.up_proj.weight, values["up_proj.weight"])
    for found, wanted in zip(bank["next"].parameters(), new.parameters(), strict=True):
        assert torch.equal(found, wanted)


def test_name_in_use_stays_until_its_routing_is_updated_or_gone():
    bank, x = bank_of(), torch.randn(1, 16)
    routing = routed(bank, ["narrow"])
    bank.remove("thin")
    bank(x, routing)
    expected = (
        "adapter 'narrow' is in use: a routing that this bank has served names it.\n"
        "  hint: routing.update([]), or for a batch without it, or drop that routing."
    )
    with pytest.raises(ValueError, match="in use") as caught:
        bank.remove("narrow")
    assert str(caught.value) == expected
    routing.update(bank.ids(["full"]))
    bank.remove("narrow")
    with pytest.raises(ValueError, match="'full' is in use"):
        bank.remove("full")
    del routing
    bank.remove("full")
    assert bank.names == []


def test_ids_are_slots_on_the_cpu_and_minus_one_for_none():
    ids = bank_of().ids(["thin", None, "full"])
    assert ids.tolist() == [2, -1, 0]
    assert ids.dtype == torch.int32


def test_adapter_without_biases_has_none_of_those_that_were_in_its_slot():
    bank, x = bank_of({"old": 8}, slots=1), torch.randn(2, 16)
    bank.remove("old")
    bank.add("new", random_adapter(8, bias=False))
    torch.testing.assert_close(bank(x, routed(bank, ["new"] * 2)), bank["new"](x), **CLOSE)
    assert not bank.to_empty(device="cpu").down_biases.any()


def test_used_adapters_alone_get_gradients():
    bank, x = bank_of(options={"scaling": "learned"}), torch.randn(3, 16, requires_grad=True)
    names = ["narrow", None, "narrow"]
    bank(x, routed(bank, names)).square().sum().backward()
    found = {name: p.grad for name, p in bank.named_parameters()}
    dx, x.grad = x.grad, None
    bank.zero_grad()
    one_at_a_time(bank, x, names).square().sum().backward()
    torch.testing.assert_close(dx, x.grad, rtol=1e-4, atol=1e-5)
    for name, parameter in bank.named_parameters():
        assert (found[name] is None) == ("narrow" not in name)
        if found[name] is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "lengths",
    [{"cu_seqlens": torch.tensor([0, 0, 2, 2, 3, 3])}, {"seq_len": 0}],
    ids=["cu_seqlens", "seq_len"],
)
def test_an_adapter_of_empty_sequences_gets_no_gradients(lengths):
    bank = bank_of()
    ids = bank.ids(["thin", "narrow", None, "narrow", "full"])
    routing = ak.AdapterRouting(3, 5).update(ids, **lengths)
    bank(torch.randn(routing.num_tokens, 16, requires_grad=True), routing).sum().backward()
    trained = {1} if routing.num_tokens else set()
    assert set(routing.used) == trained
    for key, parameter in bank.named_parameters():
        assert (parameter.grad is not None) == (bool(trained) and "narrow" in key)


def test_frozen_adapters_stay_frozen_and_pass_gradients_on():
    adapter = random_adapter(5)
    adapter.up_proj.requires_grad_(False)
    bank = bank_of()
    assert not bank.add("mixed", adapter).up_proj.weight.requires_grad
    bank["narrow"].requires_grad_(False)
    x = torch.randn(3, 16, requires_grad=True)
    bank(x, routed(bank, ["mixed", "narrow", "full"])).sum().backward()
    assert x.grad.abs().sum() > 0
    having = {name for name, p in bank.named_parameters() if p.grad is not None}
    assert {name.partition(".up")[0].partition(".down")[0] for name in having} == {
        "adapters.mixed", "adapters.full",
    }  # fmt: skip
    assert "adapters.mixed.up_proj.weight" not in having
    bank.requires_grad_(False)
    assert not bank(x.detach(), routed(bank, ["mixed"] * 3)).requires_grad


def test_parameters_are_each_there_once():
    bank = bank_of(options={"scaling": "learned"})
    assert len(list(bank.parameters())) == len({id(p) for p in bank.parameters()}) == 15
    assert sum(p.numel() for p in bank.parameters()) == sum(
        r * 16 * 2 + r + 16 + 1 for r in RANKS.values()
    )


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5, foreach=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, weight_decay=0.5),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_steps_train_the_adapters_in_use_and_leave_all_other_bits(optimizer):
    bank = bank_of()
    twin = random_adapter(5)
    twin.load_state_dict(bank["narrow"].state_dict())
    x = torch.randn(6, 16)
    routing = routed(bank, ["narrow"] * 6)
    before = {kind: stack.clone() for kind, stack in stacks(bank).items()}
    ours, theirs = optimizer(bank.parameters()), optimizer(twin.parameters())
    for _ in range(3):
        for module, step, call in (
            (bank, ours, lambda: bank(x, routing)),
            (twin, theirs, lambda: twin(x)),
        ):
            module.zero_grad()
            call().square().sum().backward()
            step.step()
    for name, parameter in bank["narrow"].named_parameters():
        torch.testing.assert_close(parameter, twin.get_parameter(name), rtol=1e-3, atol=1e-4)
    assert not torch.equal(bank.up_weights[1], before["up_weights"][1])
    for kind, stack in stacks(bank).items():
        others = [slot for slot in range(5) if slot != 1]
        assert torch.equal(stack[others], before[kind][others]), kind
    assert torch.equal(bank.up_weights[1, :, 5:], torch.zeros(16, 3))


def test_fused_optimizer_takes_full_width_adapters():
    banks = [bank_of({"a": 8, "b": 8}) for _ in range(2)]
    banks[1].load_state_dict(banks[0].state_dict())
    x = torch.randn(2, 16)
    for bank, fused in zip(banks, (True, False), strict=True):
        optimizer = torch.optim.AdamW(bank.parameters(), lr=0.1, fused=fused)
        for _ in range(2):
            optimizer.zero_grad()
            bank(x, routed(bank, ["a", "b"])).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(banks[0].up_weights, banks[1].up_weights, rtol=1e-4, atol=1e-5)


def test_fused_optimizer_is_refused_where_it_would_write_into_other_slots():
    """torch's own takes a parameter with gaps for a block, and says nothing."""
    bank = bank_of()
    optimizer = torch.optim.AdamW(bank.parameters(), fused=True)
    bank(torch.randn(1, 16), routed(bank, ["full"])).sum().backward()
    optimizer.step()  # those with gaps have no gradient
    bank(torch.randn(1, 16), routed(bank, ["narrow"])).sum().backward()
    before = bank.up_weights.clone()
    with pytest.raises(RuntimeError, match="fused") as caught:
        optimizer.step()
    assert str(caught.value) == (
        "a fused optimizer takes parameters without gaps, got one of shape [16, 5] with strides "
        "[8, 1]: it has fewer units than its bank.\n  hint: fused=False, or an AdapterBank whose "
        "max_bottleneck_size is that of the adapters."
    )
    assert torch.equal(bank.up_weights, before)


@pytest.mark.parametrize("change", ["bfloat16", "double", "to"])
def test_optimizer_made_before_a_change_of_dtype_still_trains_the_slots(change):
    bank = bank_of(options={"scaling": "learned"})
    optimizer = torch.optim.SGD(bank.parameters(), lr=0.1)  # the eps of AdamW is 0 in float16
    getattr(bank, change)(*([torch.float16] if change == "to" else []))
    dtype = {"bfloat16": torch.bfloat16, "double": torch.float64, "to": torch.float16}[change]
    assert bank.down_weights.dtype == bank["narrow"].down_proj.weight.dtype == dtype
    assert bank.scalings.dtype == (torch.float64 if change == "double" else torch.float32)
    x = torch.randn(2, 16, dtype=dtype)
    routing = routed(bank, ["narrow", "thin"])
    before = bank.up_weights.clone(), bank.scalings.clone()
    bank(x, routing).float().sum().backward()
    optimizer.step()
    assert not torch.equal(bank.up_weights[1], before[0][1])
    assert not torch.equal(bank.scalings[1], before[1][1])
    assert torch.equal(bank.up_weights[0], before[0][0])
    alone = one_at_a_time(bank, x, ["narrow", "thin"]).to(dtype)
    torch.testing.assert_close(bank(x, routing), alone, rtol=2e-2, atol=2e-2)


def test_no_more_is_computed_for_a_batch_without_adapters_than_its_sum():
    bank, x = bank_of(), torch.randn(4, 16)
    routing = routed(bank, [None] * 4)
    assert bank(x, routing) is x
    skip = torch.randn(4, 16)
    assert torch.equal(bank(x, routing, skip), x + skip)
