"""What a bank and the function of many adapters refuse, in which words."""

import pytest
import torch
from banks import bank_of, routed
from torch import nn

import adapterkern as ak

X = torch.ones(3, 16)


def routing_of(tokens=3, slots=5, **options):
    return ak.AdapterRouting(8, slots, **options).update([0] * tokens)


def stacked(down=(5, 8, 16), up=(5, 16, 8), routing=None, **more):
    tensors = torch.ones(down), torch.ones(up)
    return lambda: ak.grouped_bottleneck_adapter(X, *tensors, routing or routing_of(), **more)


def call(x=X, routing=None, *rest, **more):
    return lambda: bank_of()(x, routing_of() if routing is None else routing, *rest, **more)


DOWN = "down_weights must have shape [S, R, H] = [5, 8, 16] to match x [3, 16] and down_weights"
UP = "up_weights must have shape [S, H, R] = [5, 16, 8] to match x [3, 16] and down_weights"
LAYOUT = "nn.Linear layout (out_features, in_features); this looks like its transpose."
ALL_CPU = ", ".join(
    f"{name} on cpu"
    for name in (
        "down_weights", "up_weights", "down_biases", "up_biases", "scalings", "ranks",
    )
)  # fmt: skip
CALLS = {
    "tokens": (
        call(routing=routing_of(4)),
        "x must have the 4 tokens of the last routing.update, got 3.\n"
        "  hint: update(ids) takes one id a token; with seq_len or cu_seqlens one a sequence.",
    ),
    "slots": (
        call(routing=routing_of(slots=4)),
        "routing must be made for the 5 slots of down_weights, got one for 4.\n"
        "  hint: AdapterRouting(max_tokens, 5).",
    ),
    "routing-elsewhere": (
        call(routing=routing_of(device="meta")),
        f"all tensors must be on one device, got x on cpu, {ALL_CPU}, routing on meta.\n"
        "  hint: AdapterRouting(max_tokens, slots, device='cpu').",
    ),
    "bank-elsewhere": (
        lambda: bank_of().to("meta")(X, routing_of()),
        "all tensors must be on one device, got x on cpu, "
        f"{ALL_CPU.replace('cpu', 'meta')}, routing on cpu.\n  hint: bank.to('cpu').",
    ),
    "no-routing": (
        lambda: bank_of()(X, None), "routing must be an AdapterRouting, got NoneType.\n"
        "  hint: AdapterRouting(max_tokens, slots).update(bank.ids(names), seq_len=...).",
    ),
    "ids-for-a-routing": (
        lambda: bank_of()(X, bank_of().ids(["full"] * 3)),
        "routing must be an AdapterRouting, got Tensor.\n"
        "  hint: AdapterRouting(max_tokens, slots).update(bank.ids(names), seq_len=...).",
    ),
    "no-x": (call(x=None), "x must be a torch.Tensor, got NoneType."),
    "hidden-size": (
        call(x=torch.ones(3, 12)),
        "down_weights must have shape [S, R, H] = [5, 8, 12] to match x [3, 12], got [5, 8, 16].\n"
        "  hint: both weights are for hidden_size 16; is x the one meant?",
    ),
    "integers": (
        call(x=X.long()),
        "x must be a floating-point tensor (float32, float16, bfloat16, float64), got int64.\n"
        "  hint: convert it, as in x.float().",
    ),
    "float64": (
        call(x=X.double()),
        "down_weights, up_weights, down_biases and up_biases are float32 but the computation runs "
        "in float64; float64 does not mix with other types.\n"
        "scalings must be float64, got float32.\n"
        "  hint: convert one side, e.g. adapter.to(torch.float64).",
    ),
    "float64-without-adapters": (
        call(x=X.double(), routing=ak.AdapterRouting(3, 5).update([-1] * 3)),
        "down_weights, up_weights, down_biases and up_biases are float32 but the computation runs "
        "in float64; float64 does not mix with other types.\n"
        "scalings must be float64, got float32.\n"
        "  hint: convert one side, e.g. adapter.to(torch.float64).",
    ),
    "no-dimension": (
        call(x=torch.ones(()), routing=routing_of(1)),
        "x must have shape [..., H], got a 0-dimensional tensor.",
    ),
    "skip": (
        call(X, None, X[:1]),
        "skip must have the shape of x, [3, 16], got [1, 16].\n"
        "  hint: nothing is broadcast; use skip.expand_as(x).",
    ),
    "residual": (
        call(residual="none"), "residual must be \"input\", a tensor or None, got 'none'.",
    ),
    "one-adapter": (
        stacked((8, 16), (16, 8)),
        "down_weights must have shape [S, R, H] and up_weights [S, H, R], got [8, 16] and "
        "[16, 8].\n  hint: stack the weights of the adapters, as in torch.stack([a.weight, "
        "b.weight]).",
    ),
    "down-transposed": (
        stacked(down=(5, 16, 8)),
        f"{DOWN} [5, 16, 8], got [5, 16, 8].\n  hint: down_weights uses {LAYOUT}",
    ),
    "up-transposed": (
        stacked(up=(5, 8, 16)),
        f"{UP} [5, 8, 16], got [5, 8, 16].\n  hint: up_weights uses {LAYOUT}",
    ),
    "other-slots": (stacked(up=(3, 16, 8)), f"{UP} [5, 8, 16], got [3, 16, 8]."),
    "ranks-int64": (
        stacked(ranks=torch.ones(5, dtype=torch.int64)),
        "ranks must be int32, got int64.\n  hint: use ranks.to(torch.int32).",
    ),
    "ranks-of-others": (
        stacked(ranks=torch.ones(4, dtype=torch.int32)),
        "ranks must have shape [S] = [5] to match x [3, 16] and down_weights [5, 8, 16], got [4].",
    ),
    "scalings-float64": (
        stacked(scalings=torch.ones(5, dtype=torch.float64)),
        "scalings must be float32, got float64.\n  hint: use scalings.to(torch.float32).",
    ),
    "a-float-for-scalings": (
        stacked(scalings=0.5), "scalings must be a torch.Tensor, got float.",
    ),
    "beyond-the-routing": (
        stacked(routing=ak.AdapterRouting(2, 5)),
        "x must have the 0 tokens of the last routing.update, got 3.\n"
        "  hint: update(ids) takes one id a token; with seq_len or cu_seqlens one a sequence.",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("function", "message"), CALLS.values(), ids=CALLS)
def test_a_call_that_does_not_fit_is_refused(function, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        function()
    assert str(caught.value) == message


def add(name="fr", adapter=None, **options):
    made = adapter if adapter is not None else ak.BottleneckAdapter(16, 4, **options)
    return lambda bank: bank.add(name, made)


def with_one_bias():
    adapter = ak.BottleneckAdapter(16, 4)
    adapter.up_proj.bias = None
    return adapter


KEYS = (
    "the state dict of an adapter has down_proj.weight, up_proj.weight and, together, "
    "down_proj.bias, up_proj.bias, and a learned scaling; got "
)
MODULE = "cannot name an adapter: it becomes the name of a module, which has no dots and is no "
UNKNOWN = "(this bank has full, narrow, thin)."
BANKS = {
    "unknown-ids": (
        lambda bank: bank.ids(["a", "full", "b", "a"]), f"unknown adapters: 'a', 'b' {UNKNOWN}",
    ),
    "ids-of-numbers": (lambda bank: bank.ids([0]), f"unknown adapters: 0 {UNKNOWN}"),
    "a-string": (
        lambda bank: bank.ids("full"), "names must be a list of names, got 'full'.",
    ),
    "no-list": (lambda bank: bank.ids(None), "names must be a list of names, got None."),
    "unknown-item": (lambda bank: bank["fr"], f"unknown adapters: 'fr' {UNKNOWN}"),
    "unknown-removed": (lambda bank: bank.remove("fr"), f"unknown adapters: 'fr' {UNKNOWN}"),
    "wide": (
        add(adapter=ak.BottleneckAdapter(16, 9)),
        "adapter 'fr': bottleneck_size must be at most the bank's 8, got 9.\n"
        "  hint: a bank with max_bottleneck_size=9.",
    ),
    "hidden-size": (
        add(adapter=ak.BottleneckAdapter(12, 4)),
        "adapter 'fr': down_proj.weight must have shape [R, 16] and up_proj.weight [16, R], got "
        "[4, 12] and [12, 4].",
    ),
    "activation": (
        add(activation="relu"),
        "adapter 'fr': its activation must be the bank's, gelu, got relu.\n"
        "  hint: a bank has one activation; make a second bank.",
    ),
    "dropout": (
        add(dropout=0.1),
        "adapter 'fr': its dropout must be 0, got 0.1.\n  hint: adapter.dropout = 0.0 first.",
    ),
    "channel": (
        add(scaling="channel"),
        "adapter 'fr': scaling must be a float or of shape [1], got [16].\n  hint: multiply "
        "up_proj.weight's rows and up_proj.bias by it, which computes the same.",
    ),
    "all-at-once": (
        add(scaling="channel", dropout=0.1, activation="relu"),
        "adapter 'fr': scaling must be a float or of shape [1], got [16].\n"
        "adapter 'fr': its activation must be the bank's, gelu, got relu.\n"
        "adapter 'fr': its dropout must be 0, got 0.1.\n  hint: multiply "
        "up_proj.weight's rows and up_proj.bias by it, which computes the same.",
    ),
    "no-adapter": (
        add(adapter=nn.Linear(16, 4)),
        "adapter must be a BottleneckAdapter or the state dict of one, got Linear.",
    ),
    "empty": (
        add(adapter={}), f"{KEYS}nothing.\n  hint: BottleneckAdapter.state_dict() makes one.",
    ),
    "strange-keys": (
        add(adapter={"gate": torch.ones(2)}),
        f"{KEYS}gate.\n  hint: BottleneckAdapter.state_dict() makes one.",
    ),
    "quantised": (
        add(adapter={
            f"{name}.weight": torch.ones(shape, dtype=torch.int8)
            for name, shape in (("down_proj", (4, 16)), ("up_proj", (16, 4)))
        }),
        "adapter 'fr': its tensors must be floating-point ones, got int8.",
    ),
    "one-bias": (
        lambda bank: bank.add("fr", with_one_bias()),
        "an adapter must have both biases or none, got one.\n"
        "  hint: torch.nn.init.zeros_ makes a bias that adds nothing.",
    ),
    "meta": (
        add(adapter=ak.BottleneckAdapter(16, 4, device="meta")),
        "adapter 'fr': its tensors must have values; some are on the meta device.\n"
        "  hint: to_empty(device=...) and load them first.",
    ),
    "taken": (
        add("full"), "this bank already has an adapter 'full'.\n  hint: remove it first.",
    ),
    "dot": (add("a.b"), f"'a.b' {MODULE}method."),
    "method": (add("keys"), f"'keys' {MODULE}method."),
    "no-string": (add(3), "the name of an adapter must be a string, got 3."),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BANKS.values(), ids=BANKS)
def test_a_bank_refuses_and_stays_as_it_is(change, message):
    bank = bank_of()
    before = {key: tensor.clone() for key, tensor in bank.state_dict().items()}
    with pytest.raises((KeyError, TypeError, ValueError)) as caught:
        change(bank)
    assert caught.value.args[0] == message
    after = bank.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert bank.ranks.tolist() == [8, 5, 1, 0, 0]


def test_a_bank_without_biases_refuses_them():
    with pytest.raises(ValueError, match="biases") as caught:
        ak.AdapterBank(16, 8, 2, bias=False).add("fr", ak.BottleneckAdapter(16, 4))
    assert str(caught.value) == (
        "adapter 'fr': it has biases, and the bank has none.\n  hint: a bank with bias=True."
    )


def test_a_full_bank_names_what_it_holds():
    with pytest.raises(ValueError, match="slots") as caught:
        bank_of(slots=3).add("fr", ak.BottleneckAdapter(16, 4))
    assert str(caught.value) == (
        "all 3 slots of this bank are taken, by full, narrow, thin; there is none for 'fr'.\n"
        "  hint: remove one, or make a bank with slots=6."
    )


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((16.0,), {}, "hidden_size must be an integer, got 16.0."),
        ((16, None), {}, "max_bottleneck_size must be an integer, got None."),
        ((16, 8, 0), {}, "slots must be at least 1, got 0."),
        ((16, 8, True), {}, "slots must be an integer, got True."),
        ((16,), {"residual": "x"}, "residual must be \"input\" or None, got 'x'."),
        ((16,), {"dtype": torch.int8}, "dtype must be one of float32, float16, bfloat16, float64, "
         "got torch.int8."),
    ],
)  # fmt: skip
def test_a_bank_refuses_sizes_and_options(arguments, options, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        ak.AdapterBank(*arguments, **options)
    assert str(caught.value) == message


def test_a_kernel_backend_that_is_named_refuses_what_it_cannot_run():
    bank = bank_of(backend="cuda")
    with pytest.raises(ak.BackendUnsupportedError, match='backend "cuda" cannot run this call'):
        bank(X, routed(bank, ["full"] * 3))
