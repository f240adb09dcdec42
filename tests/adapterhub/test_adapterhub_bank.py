"""Adapters that the library has saved go into a bank."""

import pytest
import torch

pytest.importorskip("adapters", reason="patching needs the adapters library", exc_type=ImportError)

from adapterhub_models import bert

import adapterkern as ak
from adapterkern.integrations import adapterhub

SMALL = "seq_bn[reduction_factor=4]"


def test_adapters_in_a_folder_go_into_a_bank(tmp_path):
    model = bert(SMALL, "seq_bn[reduction_factor=8,scaling='learned']")
    banks = {}
    for name in "ab":
        model.save_adapter(str(tmp_path / name), name)
        for place, adapter in adapterhub.adapters_in(tmp_path / name).items():
            assert isinstance(adapter, ak.BottleneckAdapter)
            bank = banks.setdefault(place, ak.AdapterBank(32, 8, slots=2, activation="relu"))
            bank.add(name, adapter)
    assert set(banks) == {"encoder.layer.0.output", "encoder.layer.1.output"}
    x = torch.randn(3, 32)
    for place, bank in banks.items():
        y = bank(x, ak.AdapterRouting(3, 2).update(bank.ids(["b", None, "a"])))
        layer = model.get_submodule(place)
        for row, name in ((0, "b"), (2, "a")):
            expected = layer.adapters[name](x[row : row + 1], x[row : row + 1])[0]
            torch.testing.assert_close(y[row : row + 1], expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(y[1], x[1])


def test_adapters_in_another_folder_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        adapterhub.adapters_in(tmp_path)
    model = bert(SMALL)
    model.save_adapter(str(tmp_path), "a")
    with pytest.raises(ValueError, match="not 'gpt2'"):
        adapterhub.adapters_in(tmp_path, model_type="gpt2")
