"""Adapters in a transformers model of one's own, as the README shows it."""

import pytest
import torch

import adapterkern as ak

transformers = pytest.importorskip("transformers", reason="the models come from transformers")

SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "vocab_size": 61,
}  # fmt: skip


class Tagger(transformers.BertPreTrainedModel):
    """What a base checkpoint lacks transformers draws by class, here as the adapter says."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = transformers.BertModel(config)
        self.adapter = ak.BottleneckAdapter(config.hidden_size, 4, scaling="learned")
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, ak.BottleneckAdapter):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    def forward(self, ids):
        return self.adapter(self.bert(ids).last_hidden_state)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**SIZES)).save_pretrained(folder)
    return folder


def test_an_adapter_that_the_checkpoint_lacks_starts_as_the_identity(base):
    ids = torch.arange(10).reshape(2, 5)
    model = Tagger.from_pretrained(base).eval()
    assert torch.equal(model(ids), model.bert(ids).last_hidden_state)
    assert torch.equal(model.adapter.scaling, torch.ones(1))
    assert 0.05 < model.adapter.down_proj.weight.std() < 0.15


def test_an_adapter_that_the_checkpoint_has_is_loaded(base, tmp_path):
    model = Tagger.from_pretrained(base).eval()
    for parameter in model.adapter.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    again = Tagger.from_pretrained(tmp_path).eval()
    ids = torch.arange(10).reshape(2, 5)
    assert torch.equal(again(ids), model(ids))


def test_insert_adapts_a_model_that_is_loaded_already(base):
    ids = torch.arange(10).reshape(2, 5)
    model = transformers.BertModel.from_pretrained(base).eval()
    before = model(ids).last_hidden_state
    adapters = ak.insert(model, after=["attention.output.dense", "output.dense"])
    assert len(adapters) == 2
    assert torch.equal(model(ids).last_hidden_state, before)
    rows = ak.explain(model, input_ids=ids).rows
    assert [(row.adapter, row.calls) for row in rows] == [(name, 1) for name in adapters]
