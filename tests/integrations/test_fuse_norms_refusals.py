"""What fuse_norms recognises, and what it refuses by name."""

import contextlib
import copy
import functools
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from families import build
from fused_models import assert_same, base, first, inputs, norms, pair, uneven
from random_adapters import randomised
from torch import nn

import adapterkern as ak
from adapterkern.integrations.transformers import explain, fuse_norms, sites, unfuse_norms
from adapterkern.integrations.transformers.blocks import BLOCKS
from adapterkern.integrations.transformers.norms import KINDS, describe, kind_of
from adapterkern.integrations.transformers.sources import SOURCES, recognised, source_hash

ROOT = Path(__file__).parents[2]
FIVE = int(transformers.__version__.split(".")[0]) >= 5
VERSION = 5 if FIVE else 4
CLASSES = {  # of every family that is promised, with what each is known as
    "bert": {"BertSelfOutput": "post_norm", "BertOutput": "post_norm"},
    "roberta": {"RobertaSelfOutput": "post_norm", "RobertaOutput": "post_norm"},
    "electra": {"ElectraSelfOutput": "post_norm", "ElectraOutput": "post_norm"},
    "deberta": {
        "DebertaSelfOutput": "post_norm", "DebertaOutput": "post_norm",
        "DebertaLayerNorm": "deberta_norm",
    },
    "deberta_v2": {"DebertaV2SelfOutput": "post_norm", "DebertaV2Output": "post_norm"},
    "mpnet": {"MPNetAttention": "mpnet", "MPNetSelfAttention": "part", "MPNetOutput": "post_norm"},
    "distilbert": {"TransformerBlock": f"distilbert_{VERSION}", "FFN": "part"},
    "llama": {
        "LlamaDecoderLayer": "llama", "LlamaAttention": "part", "LlamaMLP": "part",
        "LlamaRMSNorm": "llama_norm",
    },
    "mistral": {
        "MistralDecoderLayer": "llama", "MistralAttention": "part", "MistralMLP": "part",
        "MistralRMSNorm": "llama_norm",
    },
    "qwen2": {
        "Qwen2DecoderLayer": "llama", "Qwen2Attention": "part", "Qwen2MLP": "part",
        "Qwen2RMSNorm": "llama_norm",
    },
    "gpt2": {"GPT2Block": f"gpt2_{VERSION}", "GPT2Attention": "part", "GPT2MLP": "part"},
    "opt": {"OPTDecoderLayer": f"opt_{VERSION}", "OPTAttention": "part"},
    "gemma": {"GemmaDecoderLayer": "llama", "GemmaRMSNorm": "gemma_norm"},
    "helium": {"HeliumRMSNorm": "helium_norm"},
    "gemma2": {"Gemma2DecoderLayer": "norm_before_add"},
    "gemma3": {"Gemma3DecoderLayer": "norm_before_add"},
    "olmo2": {"Olmo2DecoderLayer": "norm_before_add"},
    "t5": {"T5LayerFF": None},
}  # fmt: skip
DISTILBERT = (
    ["DistilBertSelfAttention"] if FIVE
    else ["MultiHeadSelfAttention", "DistilBertSdpaAttention", "DistilBertFlashAttention2"]
)  # fmt: skip
CLASSES["distilbert"] |= dict.fromkeys(DISTILBERT, "part")


def modeling(family):
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


@pytest.fixture(autouse=True)
def _warned():
    sites._warned.clear()


@pytest.mark.parametrize("family", CLASSES)
def test_every_class_is_recognised_by_its_source(family):
    found = {name: recognised(getattr(modeling(family), name)) for name in CLASSES[family]}
    assert found == CLASSES[family]


def test_the_table_has_one_meaning_for_each_source():
    hashes = [one for known in SOURCES.values() for one in known]
    assert len(hashes) == len(set(hashes))
    assert all(re.fullmatch("[0-9a-f]{12}", one) for one in hashes)
    assert set(SOURCES) == {*BLOCKS, *KINDS, "part", "norm_before_add"}


class Norm(nn.Module):
    def forward(self, x):
        return self._norm(x)

    def _norm(self, x):
        return x * 2


class SameNorm(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """With a docstring, a comment and other spacing."""
        return self._norm( x )  # fmt: skip

    def _norm(self, x):
        return x * 2


class OtherNorm(SameNorm):
    def _norm(self, x):
        return x * 3


def test_comments_do_not_count_and_methods_that_are_called_do():
    assert source_hash(Norm) == source_hash(SameNorm) != source_hash(OtherNorm)


def test_a_class_whose_forward_someone_wrapped_is_not_recognised(monkeypatch):
    kind = modeling("bert").BertOutput
    stock = kind.forward

    @functools.wraps(stock)
    def forward(self, *args):
        return 2 * stock(self, *args)

    monkeypatch.setattr(kind, "forward", forward)
    source_hash.cache_clear()
    assert source_hash(kind) == f"wrapped by {__name__}"
    assert recognised(kind) is None
    source_hash.cache_clear()


# Norms: kind, offset and cast are those of the class.


def gemma(**values):
    norm = modeling("gemma").GemmaRMSNorm(8, eps=0.25)
    nn.init.constant_(norm.weight, values.get("weight", 0.0))
    return norm


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_the_offset_of_gemma_follows_from_its_class_and_never_from_values(weight):
    norm = gemma(weight=weight)
    described = describe(norm, kind_of(norm))
    assert described[2:] == ("rms", 0.25, 1.0, False)
    llama = modeling("llama").LlamaRMSNorm(8, eps=0.25)
    nn.init.constant_(llama.weight, weight)
    assert describe(llama, kind_of(llama))[2:] == ("rms", 0.25, 0.0, True)


@pytest.mark.parametrize("family", ["gemma", "llama", "helium", "deberta"])
def test_the_order_of_cast_and_weight_is_the_norm_s_own(family):
    """In bfloat16, where the order shows, the other one is further from what the norm computes."""
    norm = uneven(nn.Sequential(norms(build(family))[1]))[0].to(torch.bfloat16)
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(400, 32, generator=generator).bfloat16()
    if hasattr(norm, "bias"):
        nn.init.zeros_(norm.bias)  # that DeBERTa's adds a bias to a rounded product shows as well
    described = describe(norm, kind_of(norm))
    swapped = described._replace(cast_before_weight=not described.cast_before_weight)

    def wrong(description):
        weight, bias, kind, *numbers = description
        zeros = torch.zeros(4, 32), torch.zeros(32, 4)
        found = ak.bottleneck_adapter_norm(
            x, *zeros, weight, None, None, bias, norm=kind, backend="reference",
            eps=numbers[0], weight_offset=numbers[1], cast_before_weight=numbers[2],
        )  # fmt: skip
        return (found != norm(x)).double().mean()

    assert wrong(described) < 0.5 * wrong(swapped)


class MyLayerNorm(nn.LayerNorm):
    pass


@pytest.mark.parametrize(
    ("norm", "what"),
    [
        (MyLayerNorm(32), "MyLayerNorm is a subclass of LayerNorm and of an unknown source"),
        (Norm(), "Norm is of an unknown source"),
    ],
)
def test_unknown_norms_are_refused_with_the_hash_of_their_source(norm, what):
    model = randomised(base("bert"))
    layer = model.base_model.model.encoder.layer[0].output
    layer.LayerNorm = norm
    report = fuse_norms(model)
    (row,) = (row for row in report.rows if not row.fused)
    assert row.layer.endswith("layer.0.output.dense")
    assert row.reason == f"its norm {what} ({source_hash(type(norm))})"
    assert "forward" not in vars(layer)


def test_a_norm_in_modules_to_save_is_refused():
    model = randomised(base("bert"), modules_to_save=["output.LayerNorm"])
    with pytest.raises(ValueError, match="norm ModulesToSaveWrapper is of an unknown source"):
        fuse_norms(model)


class Sharded(torch.Tensor):
    """A class of tensors with functions of its own, as DTensor is."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return super().__torch_function__(function, types, args, kwargs or {})


def test_sharded_parameters_of_a_norm_are_refused():
    model = randomised(base("bert"))
    norm = model.base_model.model.encoder.layer[0].output.LayerNorm
    norm.weight = nn.Parameter(torch.ones(32).as_subclass(Sharded), requires_grad=False)
    row = explain(model).rows[1]
    assert row.reason.startswith("the parameters of its norm are sharded")
    norm.weight = nn.Parameter(torch.ones(16))
    assert explain(model).rows[1].reason.startswith("the weight of its norm is [16] here")


def hooked(model, path):
    model.get_submodule(f"base_model.model.{path}").register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("name", "path", "reason"),
    [
        ("bert", "encoder.layer.0.output.dense", "the adapted layer has hooks"),
        ("bert", "encoder.layer.0.output.LayerNorm", "the norm has hooks"),
        ("bert", "encoder.layer.0.output.dropout", "its dropout has hooks"),
        ("llama", "model.layers.0.self_attn", "LlamaAttention has hooks"),
        ("llama", "model.layers.0.mlp", "LlamaMLP has hooks"),
        ("llama", "model.layers.0.post_attention_layernorm", "the norm has hooks"),
    ],
)
@pytest.mark.parametrize("before", [True, False])
def test_hooks_that_would_see_less_keep_the_model_s_own_forward(name, path, reason, before):
    model, fused = pair(name)
    if before:
        unfuse_norms(fused)
        hooked(fused, path)
        report = fuse_norms(fused)
    else:
        hooked(fused, path)
        report = explain(fused)
    (row,) = (row for row in report.rows if not row.fused)
    assert row.reason.startswith(reason)
    hooked(model, path)
    with contextlib.nullcontext() if before else pytest.warns(ak.FallbackWarning, match=reason):
        found = first(fused, **inputs(name))
    assert_same(found, first(model, **inputs(name)))


def test_hooks_on_the_block_itself_are_called_with_what_it_returns():
    model, fused = pair("llama")
    seen = []
    for one in (model, fused):
        layer = one.base_model.model.model.layers[0]
        layer.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
        first(one, **inputs("llama"))
    assert len(seen) == 2
    for expected, found in zip(*seen, strict=True):
        assert_same(found, expected)


def test_a_replaced_forward_is_left_alone():
    model = randomised(base("bert"))
    block = model.base_model.model.encoder.layer[0].output
    block.forward = lambda *args: type(block).forward(block, *args)
    mine = block.forward
    row = fuse_norms(model).rows[1]
    assert row.reason == "BertOutput has a forward of its own already"
    unfuse_norms(model)
    assert block.forward is mine
    block.forward = block.__class__.forward.__get__(block)  # what accelerate leaves behind
    assert fuse_norms(model).rows[1].fused


def test_unfuse_refuses_what_was_wrapped_since():
    _, fused = pair("bert")
    block = fused.base_model.model.encoder.layer[0].output
    block._old_forward, block.forward = block.forward, lambda *args: block._old_forward(*args)
    with pytest.raises(ValueError, match=r"layer\.0\.output were wrapped after fuse_norms"):
        unfuse_norms(fused)
    assert sum("forward" in vars(module) for module in fused.modules()) == 4
    block.forward = block._old_forward
    del block._old_forward
    unfuse_norms(fused)
    assert not any("forward" in vars(module) for module in fused.modules())


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "olmo2"])
def test_norm_before_add_is_refused_by_name(name):
    model = randomised(build(name))
    with pytest.raises(ValueError, match="norms the layer's output before it adds it") as error:
        fuse_norms(model)
    assert "layers.{0-1}.self_attn.o_proj" in str(error.value)
    assert not any("forward" in vars(module) for module in model.modules())


def test_unknown_blocks_are_refused_with_their_hashes():
    with pytest.raises(ValueError, match=r"T5DenseActDense \([0-9a-f]{12}\), T5LayerFF \([0-9a-f]"):
        fuse_norms(randomised(build("t5")))


def test_a_model_without_adapters_is_refused():
    with pytest.raises(ValueError, match="none of its layers has an adapter"):
        fuse_norms(base("bert"))
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
        fuse_norms("bert")
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
        unfuse_norms("bert")
    assert str(explain(base("bert"))) == "no adapted layers"


def test_parallel_adapters_are_refused():
    model = randomised(base("bert"), placement="parallel")
    with pytest.raises(ValueError, match="its adapter is parallel: it reads the input of the FFN"):
        fuse_norms(model)


def test_opt_with_norms_behind_is_refused():
    model = randomised(base("opt", do_layer_norm_before=False))
    with pytest.raises(ValueError, match="do_layer_norm_before is off"):
        fuse_norms(model)


def test_tensor_parallel_layers_are_refused():
    model = randomised(base("llama"))
    model.base_model.model.model.layers[0].self_attn.o_proj.base_layer._is_hooked = True
    report = fuse_norms(model)
    assert [row.reason for row in report.rows] == ["it is tensor-parallel", "", "", ""]


def test_cross_attention_in_between_runs_the_model_s_own_forward():
    model = randomised(build("gpt2"))
    fused = copy.deepcopy(model)
    report = fuse_norms(fused)
    assert {row.reason for row in report.rows if "cross" in row.layer} == {
        "no norm follows it alone in GPT2Block"
    }
    given = {**inputs("gpt2"), "encoder_hidden_states": torch.randn(3, 3, 32)}
    with pytest.warns(ak.FallbackWarning, match="cross-attention stands between"):
        found = first(fused, **given)
    assert torch.equal(found, first(model, **given))
    assert_same(first(fused, **inputs("gpt2")), first(model, **inputs("gpt2")))


def test_a_layer_whose_adapter_is_not_active_is_told_of():
    _, fused = pair("bert")
    with fused.disable_adapter():
        assert {row.reason for row in explain(fused).rows} == {
            "no adapter is active behind this layer"
        }


def test_explain_is_a_table_of_kinds_of_sites():
    _, fused = pair("llama")
    lines = str(explain(fused)).splitlines()
    assert lines[0] == "4 of 4 adapted layers run in one pass with what follows them"
    assert [re.split(r"  +", line) for line in lines[1:]] == [
        ["adapter behind", "in one pass with", "state"],
        ["base_model.model.model.layers.{0-1}.self_attn.o_proj", "add, LlamaRMSNorm", "fused"],
        ["base_model.model.model.layers.{0-1}.mlp.down_proj", "add", "fused"],
    ]


@pytest.mark.parametrize("name", ["bert", "llama", "gemma"])
@pytest.mark.parametrize("fault", ["skip", "eps", "weight_offset", "norm"])
def test_a_fault_in_a_pass_would_be_seen(name, fault, monkeypatch):
    """The comparison of the other tests finds each of them."""
    model, fused = pair(name)
    stock = sites.adapter_norm

    def faulty(adapter, norm, description, h, skip, **options):
        if fault == "skip":
            skip = torch.zeros_like(skip)
        elif fault == "norm":
            description = description._replace(
                norm={"rms": "layer", "layer": "rms"}[description.norm]
            )
        else:
            description = description._replace(**{fault: 0.02 + getattr(description, fault)})
        return stock(adapter, norm, description, h, skip=skip, **options)

    monkeypatch.setattr(sites, "adapter_norm", faulty)
    with pytest.raises(AssertionError):
        assert_same(first(fused, **inputs(name)), first(model, **inputs(name)))


def test_importing_it_needs_neither_transformers_nor_peft():
    code = (
        "import sys\n"
        "from adapterkern.integrations.transformers import fuse_norms\n"
        "print(*{'transformers', 'peft', 'adapters'} & set(sys.modules), 'loaded')"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=100
    )
    assert ran.stdout == "loaded\n", ran.stderr
