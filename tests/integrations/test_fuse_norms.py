"""fuse_norms: the same results, from one pass where there were three, and the rest unchanged."""

import contextlib
import copy
import io

import peft
import pytest
import torch
from fused_models import (
    NAMES,
    POST_NORM,
    PRE_NORM,
    assert_same,
    base,
    first,
    inputs,
    loss_of,
    pair,
    rms,
    trainable,
    uneven,
)
from random_adapters import randomised
from safetensors.torch import load_file

import adapterkern as ak
from adapterkern.integrations.peft import BottleneckConfig
from adapterkern.integrations.transformers import explain, fuse_norms, sites, unfuse_norms
from adapterkern.modules import adapter_norm as normed_calls
from adapterkern.modules import bottleneck as plain_calls


@pytest.fixture
def calls(monkeypatch):
    """What runs: "norm" and "prenorm" for passes with a norm, "add" for those with the add alone,
    and "alone" for adapters that run as they do without fuse_norms."""
    seen = []

    def note_normed(*args, **kwargs):
        assert kwargs["residual"] == "input"
        assert kwargs["skip"] is not None
        seen.append("prenorm" if kwargs["prenorm"] else "norm")
        return normed(*args, **kwargs)

    def note_plain(*args, **kwargs):
        seen.append("alone" if kwargs["skip"] is None else "add")
        return plain(*args, **kwargs)

    normed, plain = normed_calls.bottleneck_adapter_norm, plain_calls.bottleneck_adapter
    monkeypatch.setattr(normed_calls, "bottleneck_adapter_norm", note_normed)
    monkeypatch.setattr(plain_calls, "bottleneck_adapter", note_plain)
    return seen


@pytest.mark.sweep("backend", "name")
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_family_gives_the_same_in_one_pass(name, backend, calls):
    model, fused = pair(name)
    given = inputs(name)
    expected = first(model, **given)
    assert calls == ["alone"] * 4
    calls.clear()
    with ak.use_backend(backend):
        found = first(fused, **given)
    post_norm = name in POST_NORM or name == "xlm-roberta"
    assert calls == (["norm"] * 4 if post_norm else ["prenorm", "add"] * 2)
    assert_same(found, expected)


@pytest.mark.parametrize("name", ["bert", "deberta", "distilbert", "llama", "gemma", "opt"])
def test_gradients_are_the_same(name):
    model, fused = pair(name)
    gradients = []
    for one in (model, fused):
        one.requires_grad_(True)  # the norms too
        with ak.use_backend("reference"):
            loss_of(one, inputs(name)).backward()
        gradients.append({key: p.grad for key, p in one.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    # That of a key's bias is 0 but for rounding, so the largest sets the measure.
    largest = max(map(rms, gradients[0].values()))
    for key, expected in gradients[0].items():
        assert_same(gradients[1][key], expected, least=1e-3 * largest)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_the_stream_goes_on_beside_the_norm(name):
    model, fused = pair(name)
    streams = [
        one(**inputs(name), output_hidden_states=True).hidden_states for one in (model, fused)
    ]
    assert len(streams[0]) == 3
    for expected, found in zip(*streams, strict=True):
        assert_same(found, expected)


@pytest.mark.parametrize("name", ["llama", "gemma", "deberta", "bert"])
def test_half_precision_rounds_where_the_model_does(name):
    model, fused = pair(name, lambda model: model.to(torch.bfloat16))
    expected = first(model, **inputs(name))
    found = first(fused, **inputs(name))
    # Where no kernel runs, the roundings are the model's own, but in DeBERTa's formula.
    assert torch.equal(found, expected) or name == "deberta"
    assert_same(found, expected, torch.bfloat16)
    with ak.use_backend("reference"):
        assert_same(first(fused, **inputs(name)), expected, torch.bfloat16)


def test_a_learned_scaling_leaves_the_stream_in_the_dtype_of_the_model():
    model, fused = pair("llama", lambda model: model.to(torch.bfloat16), scaling="learned")
    for one in (model, fused):
        for key, parameter in one.named_parameters():
            if key.endswith("scaling"):
                parameter.data = parameter.data.float() * 1.7
    expected = first(model, **inputs("llama"))
    found = first(fused, **inputs("llama"))
    assert expected.dtype == found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


@pytest.mark.parametrize("placement", ["pfeiffer", "houlsby"])
@pytest.mark.parametrize("name", ["llama", "distilbert", "gpt2"])
def test_sites_without_an_adapter_run_as_they_are(name, placement, calls):
    model, fused = pair(name, placement=placement, layers_to_transform=[1])
    expected = first(model, **inputs(name))
    calls.clear()
    assert_same(first(fused, **inputs(name)), expected)
    assert "alone" not in calls
    assert len(calls) == {"pfeiffer": 1, "houlsby": 2}[placement]


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "opt", "mpnet"])
def test_inserted_adapters_are_fused_as_those_of_peft(name, calls):
    model = uneven(base(name)).eval()
    ends = {
        "bert": ["attention.output.dense", "output.dense"],
        "mpnet": ["attn.o", "output.dense"],
        "llama": ["o_proj", "down_proj"],
        "gpt2": ["attn.c_proj", "mlp.c_proj"],
        "opt": ["out_proj", "fc2"],
    }[name]
    ak.insert(model, after=ends, bottleneck_size=4, init="bert")
    expected = first(model, **inputs(name))
    fuse_norms(model)
    calls.clear()
    assert_same(first(model, **inputs(name)), expected)
    assert calls == (["norm"] * 4 if name in POST_NORM else ["prenorm", "add"] * 2)


@pytest.mark.parametrize(
    ("name", "parts"),
    [("llama", ["self_attn", "mlp"]), ("distilbert", ["attention", "ffn"]), ("gpt2", ["attn"])],
)
def test_adapters_behind_whole_parts_are_fused_too(name, parts, calls):
    model = uneven(base(name)).train()  # DistilBERT's and GPT-2's dropout is within the parts
    ak.insert(model, after=parts, hidden_size=32, bottleneck_size=4, init="bert")
    torch.manual_seed(9)
    expected = first(model, **inputs(name))
    report = fuse_norms(model)
    assert all(row.fused for row in report.rows)
    assert len(report.rows) == 2 * len(parts)
    calls.clear()
    torch.manual_seed(9)
    assert_same(first(model, **inputs(name)), expected)
    per_block = {"llama": ["prenorm", "add"], "distilbert": ["norm"] * 2, "gpt2": ["prenorm"]}
    assert calls == 2 * per_block[name]


@pytest.mark.parametrize("name", [POST_NORM[0], "distilbert", *PRE_NORM[:1], "gpt2", "opt"])
def test_attentions_and_hidden_states_are_returned_as_before(name, recwarn):
    options = {"output_attentions": True, "output_hidden_states": True, "return_dict": True}
    outputs = []
    for one in pair(name):
        one.base_model.model.set_attn_implementation("eager")
        with torch.no_grad():
            outputs.append(one(**inputs(name), **options))
            one(**inputs(name))
    for key in ("hidden_states", "attentions"):
        assert len(outputs[0][key]) == len(outputs[1][key]) >= 2
        for expected, found in zip(outputs[0][key], outputs[1][key], strict=True):
            assert_same(found, expected)
    assert all(row.fused for row in explain(one).rows)  # hooks that note weights do no harm


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_generate_with_a_cache_writes_the_same(name, calls):
    model, fused = pair(name)
    ids = inputs(name)["input_ids"]
    written = []
    for one in (model, fused):
        calls.clear()
        written.append(
            one.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4,
                min_new_tokens=4, do_sample=False, use_cache=True,
            )
        )  # fmt: skip
    assert torch.equal(*written)
    assert calls == ["prenorm", "add"] * 8


# What stays as it is.


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_keys_children_and_saved_folders_stay(name, tmp_path):
    model, fused = pair(name)
    assert list(model.state_dict()) == list(fused.state_dict())
    assert [n for n, _ in model.named_modules()] == [n for n, _ in fused.named_modules()]
    model.save_pretrained(tmp_path / "plain")
    fused.save_pretrained(tmp_path / "fused")
    saved = [load_file(tmp_path / one / "adapter_model.safetensors") for one in ("plain", "fused")]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(saved[1][key], weight) for key, weight in saved[0].items())
    loaded = peft.PeftModel.from_pretrained(uneven(base(name)), tmp_path / "fused").eval()
    fuse_norms(loaded)
    assert torch.equal(first(loaded, **inputs(name)), first(fused, **inputs(name)))


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_unfuse_puts_the_forwards_of_the_classes_back(name, calls):
    model, fused = pair(name)
    blocks = [module for module in fused.modules() if "forward" in vars(module)]
    assert len(blocks) == {"bert": 4, "llama": 2}[name]
    for module in blocks:
        module.own = 1
    fuse_norms(fused)  # a second time changes nothing
    assert [module for module in fused.modules() if "forward" in vars(module)] == blocks
    unfuse_norms(fused)
    assert all(module.forward.__func__ is type(module).forward for module in blocks)
    assert not any("forward" in vars(module) for module in fused.modules())
    calls.clear()
    assert torch.equal(first(fused, **inputs(name)), first(model, **inputs(name)))
    assert set(calls) == {"alone"}


@pytest.mark.parametrize("copied", [copy.deepcopy, "pickle"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_copies_are_fused_and_independent(name, copied):
    _, fused = pair(name)
    expected = first(fused, **inputs(name))
    if copied == "pickle":
        file = io.BytesIO()
        torch.save(fused, file)
        file.seek(0)
        copied = lambda _: torch.load(file, weights_only=False)  # noqa: E731
    twin = copied(fused)
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.zero_()
    assert torch.equal(first(twin, **inputs(name)), expected)
    assert all(row.fused for row in explain(twin).rows)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_switching_adapters_goes_on(name, calls):
    model = randomised(uneven(base(name)), "one")
    model.add_adapter("two", BottleneckConfig(bottleneck_size=3, init="bert"))
    model.add_adapter("beside", BottleneckConfig(placement="parallel", init="bert"))
    fused = copy.deepcopy(model)
    fuse_norms(fused)
    given = inputs(name)

    def same(**options):
        calls.clear()
        expected = first(model, **given, **options)
        stock = list(calls)
        calls.clear()
        found = first(fused, **given, **options)
        assert_same(found, expected)
        return torch.equal(found, expected) and calls == stock

    for adapter in ("one", "two", "one"):
        model.set_adapter(adapter)
        fused.set_adapter(adapter)
        assert not same()
        assert "alone" not in calls
    with model.disable_adapter(), fused.disable_adapter():
        assert same()
        assert not calls
    # What is no single adapter behind the layer runs the forward of the class.
    sites._warned.clear()
    with pytest.warns(ak.FallbackWarning, match="adapter_names"):
        assert same(adapter_names=["one", "__base__", "two"])
    model.base_model.set_adapter(["one", "two"])
    fused.base_model.set_adapter(["one", "two"])
    with pytest.warns(ak.FallbackWarning, match="several adapters"):
        assert same()
    model.set_adapter("beside")
    fused.set_adapter("beside")
    with pytest.warns(ak.FallbackWarning, match="parallel"):
        assert same()
    model.set_adapter("one")
    fused.set_adapter("one")
    fused.delete_adapter("two")
    assert not same()
    assert torch.equal(first(fused.unload(), **given), first(model.unload(), **given))


def test_only_what_is_asked_for_needs_gradients():
    _, fused = pair("bert")
    loss_of(fused, inputs("bert")).backward()
    assert {p.grad is not None for p in trainable(fused)} == {True}
    assert {p.grad is None for p in fused.parameters() if not p.requires_grad} == {True}


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_explain_of_the_package_names_the_adapters_of_fused_blocks(name):
    _, fused = pair(name)
    rows = ak.explain(fused, **inputs(name)).rows
    adapters = [n for n, m in fused.named_modules() if isinstance(m, ak.BottleneckAdapter)]
    assert [(row.adapter, row.calls) for row in rows] == [(adapter, 1) for adapter in adapters]


def double_what_it_returns(layer):
    forward = layer.dense.forward
    layer.dense.forward = lambda *given: 2 * forward(*given)


def take_the_eps(layer):
    layer.LayerNorm.eps = 0.0


def keep_the_norm_wide(layer):
    layer.bfloat16().LayerNorm.float()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (double_what_it_returns, "the adapted layer has a forward of its own"),
        (take_the_eps, "the eps of its norm is 0.0"),
        (keep_the_norm_wide, "its norm has float32 parameters behind an adapter in bfloat16"),
    ],
)
def test_what_the_pass_would_do_in_another_way_runs_as_it_stands(change, reason):
    sites._warned.clear()
    model, fused = pair("bert")
    layers = [one.base_model.model.encoder.layer[0].output for one in (model, fused)]
    for layer in layers:
        change(layer)
    weight = layers[0].dense.base_layer.weight
    given = [torch.randn(2, 3, size).to(weight.dtype) for size in (weight.shape[1], 32)]
    results = []
    for layer in layers:
        expectation = pytest.warns(ak.FallbackWarning, match=reason)
        with expectation if layer is layers[1] else contextlib.nullcontext():
            results.append(layer(*given))
    assert torch.equal(*results)
    told = [row.reason for row in explain(fused).rows]
    assert told[1].startswith(reason)
    assert not any(told[:1] + told[2:])
