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

from adapterkern.integrations import adapterhub


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
    assert cells[2][1:] == ["output_adapter", "a", "32", "8", "relu", "reference"]
    assert text.splitlines()[-1].startswith("  ln_after: it has a LayerNorm of its own")


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
