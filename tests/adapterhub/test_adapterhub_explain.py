"""The report that `explain` gives of a model."""

import pytest
import torch
from torch import nn

pytest.importorskip("adapters", reason="patching needs the adapters library", exc_type=ImportError)

import adapterhub_models as models
import adapters
import adapters.composition as ac
from adapterhub_models import UNFIT, bert
from adapters import AdapterSetup
from adapters.methods.bottleneck import BottleneckLayer
from test_adapterhub_oracle import calls_of

import adapterkern as ak
from adapterkern.integrations import adapterhub
from adapterkern.integrations.adapterhub.reasons import SAME_PASS


def test_explain_reads_well_on_a_mixed_model():
    model = bert("seq_bn[reduction_factor=4]", "double_seq_bn[ln_after=True]")
    text = str(adapterhub.explain(model))
    assert text.splitlines()[0] == (
        "2 of 6 adapter layers would run in adapterkern "
        "(not patched: all of it runs the library's code)"
    )
    cells = [line.split() for line in text.splitlines()[1:5]]
    assert cells[0][:3] == ["layer", "location", "adapter"]
    assert cells[2][0] == "encoder.layer.{0-1}.output"
    assert cells[2][1:] == ["output_adapter", "a", "32", "8", "relu", "reference", "no_kernel"]
    assert [line.split(":")[0] for line in text.splitlines()[-2:]] == ["  ln_after", "  no_kernel"]


def test_explain_names_activations_of_what_is_not_fused_too():
    model = bert(UNFIT, "seq_bn[non_linearity='mish']", "compacter++[reduction_factor=4]")
    shown = {(row.adapter, row.activation, row.runs_on) for row in adapterhub.explain(model).rows}
    assert shown == {
        ("a", "relu", "library"),
        ("b", "MishActivation", "library"),
        ("c", "gelu", "library"),
    }


def test_explain_respects_a_surrounding_setup():
    model = bert("seq_bn[reduction_factor=4]", "seq_bn[reduction_factor=4]")
    model.add_adapter_fusion(ac.Fuse("a", "b"))
    with AdapterSetup(ac.Fuse("a", "b")):
        assert {row.reason for row in adapterhub.explain(model).rows} == {"fuse"}
    assert {row.reason for row in adapterhub.explain(model).rows} == {""}


def test_explain_tells_models_of_one_container_apart():
    both = nn.ModuleList([bert(), bert()])
    adapterhub.patch(both[0])
    report = adapterhub.explain(both)
    assert str(report).splitlines()[0] == "2 of 4 adapter layers run in adapterkern (patched)"
    assert {(row.layer[0], row.reason) for row in report.rows} == {("0", ""), ("1", "unpatched")}


@pytest.mark.parametrize("config", ["seq_bn", "mam"])
def test_explain_sees_another_dtype_beside_heads_and_other_methods(config):
    model = adapters.BertAdapterModel(models.CONFIGS["bert"]().config).to(torch.bfloat16)
    model.add_classification_head("a")
    model.add_adapter("a", config=config, set_active=True)
    assert {row.reason for row in adapterhub.explain(model).rows} == {"dtype"}
    with pytest.raises(adapterhub.UnsupportedAdapterError, match="adapter_to"):
        adapterhub.patch(model, strict=True)
    model.adapter_to("a", dtype=torch.bfloat16)
    assert {row.reason for row in adapterhub.explain(model).rows} == {""}


# The norm behind an adapter. On the CPU the named reference takes it, and no kernel does.


@pytest.fixture
def named_reference():
    with ak.use_backend("reference"):
        yield


@pytest.mark.usefixtures("named_reference")
def test_explain_finds_the_norm_that_each_block_hands_over():
    for name in models.CONFIGS:
        model = models.build(name)
        model.add_adapter("a", config="seq_bn" if "hooks" in name else "double_seq_bn")
        model.set_active_adapters("a")
        handed = {}
        for call in calls_of(model, name, "float32"):
            handed[call.layer] = call.layer_norm
        for row in adapterhub.explain(model).rows:
            layer = model.get_submodule(row.layer)
            follows = handed[layer] is not None and layer.adapters["a"].original_ln_after
            expected = SAME_PASS if follows else ""
            assert row.norm == expected, row
            assert (row.norm != "") == (name in ("bert", "roberta", "distilbert", "bart"))


@pytest.mark.usefixtures("named_reference")
def test_explain_tells_why_the_library_norms():
    model = bert("seq_bn", "seq_bn[residual_before_ln='post_add']", "seq_bn[ln_after=True]")
    norm_of = {row.adapter: row.norm for row in adapterhub.explain(model).rows}
    assert norm_of == {"a": SAME_PASS, "b": "layer_level", "c": ""}
    model.set_active_adapters(ac.Stack("a", "b"))
    assert {row.norm for row in adapterhub.explain(model).rows} == {"layer_level", ""}
    model.delete_adapter("c")
    model.set_active_adapters("a")
    assert adapterhub.patch(model, layer_level=False).rows[0].norm == "layer_level"
    assert adapterhub.explain(model).rows[0].norm == "layer_level"
    assert adapterhub.patch(model).rows[0].norm == SAME_PASS
    assert str(adapterhub.explain(model)).count("LayerNorm in the same pass") == 1
    with ak.use_backend("auto"):
        report = adapterhub.explain(model)
    assert report.rows[0].norm == "no_kernel"
    assert "\n  no_kernel: no kernel takes the norm" in str(report)


class OfAChoice(BottleneckLayer):
    def forward(self, h, inp):
        norm = self.first if h is None else self.second
        return self.bottleneck_layer_forward(h, inp, norm)


class OfTwo(BottleneckLayer):
    def forward(self, h, inp):
        if h is None:
            return self.bottleneck_layer_forward(h, inp, self.first)
        return self.bottleneck_layer_forward(h, inp, layer_norm=self.second)


class OfNone(BottleneckLayer):
    def forward(self, h, inp):
        return self.bottleneck_layer_forward(h, inp, layer_norm=None)


class OfNoSource(BottleneckLayer):
    forward = eval("lambda self, h, inp: self.bottleneck_layer_forward(h, inp, self.first)")


@pytest.mark.usefixtures("named_reference")
@pytest.mark.parametrize("block", [OfAChoice, OfTwo, OfNoSource, OfNone])
def test_explain_says_so_where_the_source_does_not_tell_the_norm(block):
    model = bert()
    model.get_submodule("encoder.layer.0.output").__class__ = block
    norms = [row.norm for row in adapterhub.explain(model).rows]
    assert norms == ["" if block is OfNone else "norm_unknown", SAME_PASS]


@pytest.mark.usefixtures("named_reference")
@pytest.mark.parametrize("active", ["a", None])
def test_explain_sees_an_adapter_that_is_not_active_as_alone(active):
    model = bert("seq_bn", "par_bn")
    model.set_active_adapters(active)
    assert {(row.adapter, row.norm) for row in adapterhub.explain(model).rows} == {
        ("a", SAME_PASS),
        ("b", SAME_PASS),
    }


@pytest.mark.usefixtures("named_reference")
def test_explain_of_the_package_names_the_norm_too():
    model = bert("double_seq_bn")
    with adapterhub.patched(model):
        rows = ak.explain(model, **models.inputs("bert")).rows
    assert [row.norm for row in rows] == ["LayerNorm"] * 4
    assert {row.adapter[-10:] for row in rows} == {"adapters.a"}
