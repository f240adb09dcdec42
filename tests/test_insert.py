"""adapterkern.insert: adapters behind the modules of any model."""

import copy
import pickle

import pytest
import torch
from torch import nn

import adapterkern as ak

H = 12
EXACT = {"rtol": 0, "atol": 0}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(H, H)

    def forward(self, x):
        return self.out(x), "weights"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attention()
        self.down_proj = nn.Linear(H, H)

    def forward(self, x):
        x = x + self.attention(x)[0]
        return x + self.down_proj(x).relu()


def model_of():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(H, H), Block(), Block())


def drawn(adapters):
    for adapter in adapters.values():
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, std=0.5)
    return adapters


def by_hand(model, adapters, x):
    """The model with its adapters, from the base model's parts."""
    x = model[0](x)
    for number in (1, 2):
        block = model[number]
        h = block.attention.out(x)
        x = x + adapters[f"{number}.attention.out.adapter"](h)
        h = block.down_proj(x)
        x = x + adapters[f"{number}.down_proj.adapter"](h).relu()
    return x


def test_an_adapter_follows_every_module_that_is_named():
    base, x = model_of(), torch.randn(3, H)
    model = copy.deepcopy(base)
    adapters = ak.insert(model, after=["out", "down_proj"], bottleneck_size=5, activation="relu")
    assert list(adapters) == [
        "1.attention.out.adapter", "1.down_proj.adapter",
        "2.attention.out.adapter", "2.down_proj.adapter",
    ]  # fmt: skip
    for name, adapter in adapters.items():
        assert model.get_submodule(name) is adapter
        assert (adapter.hidden_size, adapter.bottleneck_size, adapter.activation) == (H, 5, "relu")
    torch.testing.assert_close(model(x), base(x), **EXACT)  # near the identity: at it
    drawn(adapters)
    torch.testing.assert_close(model(x), by_hand(base, adapters, x), **EXACT)


def test_only_the_adapters_train_unless_asked_otherwise():
    model = model_of()
    adapters = drawn(ak.insert(model, after="down_proj", bottleneck_size=2))
    assert len(adapters) == 2
    model(torch.randn(3, H)).square().sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {f"{a}.{p}" for a in adapters for p, _ in adapters[a].named_parameters()}
    free = model_of()
    free[0].weight.requires_grad_(False)
    ak.insert(free, after="down_proj", freeze=False)
    assert [n for n, p in free.named_parameters() if not p.requires_grad] == ["0.weight"]


def test_the_model_keeps_its_classes_and_its_keys():
    base, model = model_of(), model_of()
    ak.insert(model, after=["out", "down_proj"])
    assert type(model[1].down_proj) is nn.Linear
    found = model.load_state_dict(base.state_dict(), strict=False)
    assert not found.unexpected_keys
    assert all(".adapter." in key for key in found.missing_keys)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_call_their_own_adapters(copied):
    model, x = model_of(), torch.randn(3, H)
    adapters = drawn(ak.insert(model, after="down_proj"))
    expected = model(x)
    twin = copied(model)
    drawn(adapters)
    torch.testing.assert_close(twin(x), expected, **EXACT)
    assert not torch.allclose(model(x), expected)


def test_the_first_of_a_tuple_is_adapted():
    base, x = model_of(), torch.randn(3, H)
    model = copy.deepcopy(base)
    adapters = drawn(ak.insert(model, after="1.attention", hidden_size=H))
    found, rest = model[1].attention(x)
    torch.testing.assert_close(found, adapters["1.attention.adapter"](base[1].attention(x)[0]))
    assert rest == "weights"


def test_a_second_adapter_follows_the_first():
    base, x = model_of(), torch.randn(3, H)
    model = copy.deepcopy(base)
    first = drawn(ak.insert(model, after="0", bottleneck_size=2))["0.adapter"]
    second = drawn(ak.insert(model, after="0", name="second", bottleneck_size=3))["0.second"]
    torch.testing.assert_close(model[0](x), second(first(base[0](x))), **EXACT)
    adapters = ak.insert(model, after="down_proj", name="third")  # not behind those of adapters
    assert list(adapters) == ["1.down_proj.third", "2.down_proj.third"]


def test_the_whole_model_can_be_followed():
    model = nn.Linear(4, H)
    adapter = drawn(ak.insert(model, after="", bottleneck_size=3))["adapter"]
    x = torch.randn(3, 4)
    expected = adapter(nn.functional.linear(x, model.weight, model.bias))
    torch.testing.assert_close(model(x), expected, **EXACT)


def test_device_dtype_and_mode_are_those_of_the_module():
    model = nn.Sequential(nn.Linear(H, H, device="meta", dtype=torch.bfloat16), nn.LayerNorm(H))
    model[1].eval()
    adapters = ak.insert(model, after=["0", "1"])
    weight = adapters["0.adapter"].up_proj.weight
    assert (weight.device.type, weight.dtype) == ("meta", torch.bfloat16)
    assert adapters["1.adapter"].up_proj.weight.dtype == torch.float32
    assert [adapter.training for adapter in adapters.values()] == [True, False]


def test_a_shared_module_has_one_adapter():
    shared = nn.Linear(H, H)
    model = nn.ModuleDict({"a": shared, "b": shared})
    assert list(ak.insert(model, after=["b", "a"])) == ["a.adapter"]


def test_compiled_without_a_break():
    model, x = model_of(), torch.randn(3, H)
    adapters = drawn(ak.insert(model, after=["out", "down_proj"], freeze=False))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    parameters = [p for adapter in adapters.values() for p in adapter.parameters()]
    found = torch.autograd.grad(compiled(x).square().sum(), parameters)
    expected = torch.autograd.grad(model(x).square().sum(), parameters)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("masked", [False, True])
def test_torchs_own_encoder_calls_its_adapters_in_evaluation(masked):
    """Its fused path reads weights and calls nothing, but steps aside for hooks."""
    layer = nn.TransformerEncoderLayer(H, 2, 24, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    adapters = drawn(ak.insert(model, after=["self_attn", "linear2"], bottleneck_size=4))
    assert len(adapters) == 4
    x, options = torch.randn(2, 5, H), {}
    if masked:
        options["src_key_padding_mask"] = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        found = model(x, **options)
        expected = model.train()(x, **options)  # no dropout: only the path differs
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("after", "options", "expected"),
    [
        (["fc9"], {}, "after must name modules of the model, and 'fc9' fits none.\n"
                      "  hint: its modules are *, *.attention, *.attention.out, *.down_proj"),
        ([], {}, "after must name modules of the model, and no name fits none."),
        ("attention", {}, "nothing in 1.attention, a Attention, tells the size of its output.\n"
                          "  hint: hidden_size=... does"),
        ("out", {"bottleneck_size": 0}, "at least 1"),
        ("out", {"name": "weight"}, "it has 'weight' already"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_and_nothing_is_changed(after, options, expected):
    model = model_of()
    before = list(model.state_dict())
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the text is compared below
        ak.insert(model, after, **options)
    assert expected in str(caught.value)
    assert list(model.state_dict()) == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_modules_that_are_not_called_are_refused():
    attention = nn.ModuleDict({"a": nn.MultiheadAttention(H, 2), "b": nn.ModuleList()})
    with pytest.raises(ValueError, match="reads its weights and never calls it"):
        ak.insert(attention, after="out_proj")
    with pytest.raises(ValueError, match="a ModuleList is never called"):
        ak.insert(attention, after="b")
    with pytest.raises(TypeError, match="got str"):
        ak.insert("model", after="b")
    with pytest.raises(TypeError, match="after must be names of modules, got 3"):
        ak.insert(attention, after=[3])


def test_outputs_that_are_no_tensor_are_named():
    class Named(nn.Linear):
        def forward(self, x):
            return {"y": super().forward(x)}

    model = Named(H, H)
    ak.insert(model, after="")
    with pytest.raises(TypeError, match="got dict"):
        model(torch.randn(2, H))
