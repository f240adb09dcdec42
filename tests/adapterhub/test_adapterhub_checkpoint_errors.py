"""Adapter folders that are not read, and checkpoints that are not written: each by name."""

import os

import pytest
import torch
from test_adapterhub_checkpoint import (
    BART,
    CONFIG,
    DOUBLE,
    LEFT_OUT,
    H,
    R,
    folder_with,
    in_places,
    stock_model,
    weights,
    without,
)

from adapterkern.integrations import adapterhub
from adapterkern.integrations.adapterhub import exchange
from adapterkern.modules.bottleneck import BottleneckAdapter


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ("compacter++", "phm"),
        ({**CONFIG, "phm_layer": True}, "phm"),
        ({**CONFIG, "use_gating": True}, "gating"),
        ({**CONFIG, "ln_before": True}, "ln_before"),
        ({**CONFIG, "ln_after": True}, "ln_after"),
    ],
)
def test_adapters_without_a_bottleneck_adapter_are_refused_by_name(tmp_path, config, reason):
    with pytest.raises(adapterhub.UnsupportedAdapterError, match=f"- {reason}: "):
        adapterhub.load(folder_with(tmp_path, config=config))


def test_fusion_and_other_methods_are_refused_by_name(tmp_path):
    os.makedirs(tmp_path / "fusion")
    (tmp_path / "fusion" / "adapter_fusion_config.json").write_text("{}")
    with pytest.raises(adapterhub.UnsupportedAdapterError, match="fusion"):
        adapterhub.load(tmp_path / "fusion")
    with pytest.raises(ValueError, match="no bottleneck adapter"):
        adapterhub.load(folder_with(tmp_path / "lora", config={"architecture": "lora", "r": 8}))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (without(weights(), "layer.1.output.adapters.task.adapter_up.bias"), "up_bias is missing"),
        (without(weights(layers=3), "layer.1."), r"bert\.encoder\.layer\.1\.output is missing"),
        (weights(name="other"), "no weight of this adapter"),
        (
            {**weights(), **{k: v[:, :16] for k, v in weights().items() if "down.0.w" in k}},
            "is due",
        ),
        (weights(r=5), "R is 5"),
        ({**weights(), "x.adapters.task.gate.weight": torch.ones(1)}, "gate.weight is unknown"),
        ({}, "no weight"),
    ],
    ids=["tensor", "layer", "name", "shape", "size", "unknown", "empty"],
)
def test_incomplete_and_foreign_weights_are_refused(tmp_path, tensors, message):
    with pytest.raises(ValueError, match=message):
        adapterhub.load(folder_with(tmp_path, tensors))


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        (DOUBLE, in_places(places=["output"]), "mh_adapter, output_adapter are 2 places a layer"),
        (DOUBLE, without(in_places(), "2.attention"), r"layer\.2\.attention\.output is missing"),
        (DOUBLE, without(in_places(), "0.attention"), r"layer\.0\.attention\.output is missing"),
        (LEFT_OUT, without(in_places(4), "layer.2"), r"layer\.2\.output is missing"),
        (LEFT_OUT, without(in_places(), "layer.0"), r"layer\.0\.output is missing"),
        (DOUBLE, without(BART, "encoder.layers.1.a"), r"encoder\.layers\.1\.att\S+ is missing"),
        (
            {**DOUBLE, "leave_out": [2]},  # the first of the decoder
            without(BART, "encoder.layers.0"),
            r"encoder\.layers\.0\.attention_adapters is missing",
        ),
        ({**DOUBLE, "cross_adapter": True}, BART, "cross_adapter are 3 places"),
        ({**CONFIG, "reduction_factor": {"1": 16, "default": 8}}, weights(), "0.*R is 2.*give 4"),
        ({**CONFIG, "reduction_factor": {"0": 16}}, weights(), "names neither its number nor"),
    ],
)
def test_gaps_are_refused(tmp_path, config, tensors, message):
    with pytest.raises(ValueError, match=message):
        adapterhub.load(folder_with(tmp_path, tensors, config))


def test_the_number_of_layers_is_checked_where_it_is_given(tmp_path):
    path = folder_with(tmp_path)
    assert len(adapterhub.load(path, num_layers=2).layers) == 2
    with pytest.raises(ValueError, match=r"layer\.2\.output is missing"):
        adapterhub.load(path, num_layers=3)
    with pytest.raises(ValueError, match=r"layer\.1\.output is there, but num_layers is 1"):
        adapterhub.load(path, num_layers=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduction_factor": 0}, "reduction_factor must be a number of at least .*got 0"),
        ({"reduction_factor": "x"}, "reduction_factor must be a number of at least .*got 'x'"),
        ({"reduction_factor": None}, "reduction_factor must be .*got None"),
        ({"reduction_factor": {"0": -1}}, "reduction_factor must be"),
        ({"reduction_factor": True}, "reduction_factor must be"),
        ({"non_linearity": None}, "non_linearity must be the name of an activation, got None"),
        ({"scaling": "foo"}, 'scaling must be a number, "learned" or "channel", got \'foo\''),
        ({"dropout": 1.5}, r"dropout must be a number in \[0, 1\), got 1\.5"),
        ({"leave_out": None}, "leave_out must be a list of layer numbers below 1000, got None"),
        ({"invertible_adapter": {"x": 1}}, "invertible_adapter must be a dict of block_type"),
        ({"invertible_adapter": "nice"}, "invertible_adapter must be .*got 'nice'"),
        ({"architecture": "union", "configs": None}, "configs of a union must be a list, got None"),
        ({"architecture": "union", "configs": "seq_bn"}, "configs of a union must be a list"),
        ({"architecture": "union", "configs": [7]}, "got 7"),
    ],
)
def test_fields_of_a_wrong_kind_are_named(tmp_path, change, message):
    path = folder_with(tmp_path, config={**CONFIG, **change})
    with pytest.raises(ValueError, match=message) as raised:
        adapterhub.load(path)
    assert str(raised.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("hidden_size", "x", "a positive integer"),
        ("hidden_size", 0, "a positive"),
        ("name", 7, "a s"),
    ],
)
def test_entries_of_a_wrong_kind_are_named(tmp_path, field, value, expected):
    path = folder_with(tmp_path, **{field: value})
    with pytest.raises(ValueError, match=f"{path}.*: {field} must be {expected}.*got {value!r}"):
        adapterhub.load(path)


@pytest.mark.parametrize("name", ["prelu", "of my own"])
def test_activations_without_a_fused_form_are_refused_by_name(tmp_path, name):
    path = folder_with(tmp_path, config={**CONFIG, "non_linearity": name})
    with pytest.raises(adapterhub.UnsupportedAdapterError, match=f"non_linearity is '{name}'") as e:
        adapterhub.load(path)
    assert str(e.value).startswith(f"{path}: ")


def test_incomplete_and_foreign_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a folder"):
        adapterhub.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json"):
        adapterhub.load(tmp_path)
    path = folder_with(tmp_path / "a")
    with pytest.raises(ValueError, match="'bert', not 'gpt2'"):
        adapterhub.load(path, model_type="gpt2")
    os.remove(os.path.join(path, "pytorch_adapter.bin"))
    with pytest.raises(FileNotFoundError, match="neither"):
        adapterhub.load(path)
    with open(os.path.join(path, "pytorch_adapter.bin"), "wb") as file:
        file.write(b"half of a file")
    with pytest.raises(ValueError, match="damaged"):
        adapterhub.load(path)
    (tmp_path / "a" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match="this is a PEFT adapter"):
        adapterhub.load(path)
    (tmp_path / "a" / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        adapterhub.load(path)


def test_a_pickle_that_runs_code_is_not_run(tmp_path):
    class Malice:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    path = folder_with(tmp_path / "a")
    torch.save({"x": Malice()}, os.path.join(path, "pytorch_adapter.bin"))
    with pytest.raises(ValueError, match="damaged"):
        adapterhub.load(path)
    assert not os.path.exists(tmp_path / "owned")


def test_save_refuses_what_does_not_fit_and_writes_nothing(tmp_path):
    saved = adapterhub.load(folder_with(tmp_path / "a"))
    saved.config["non_linearity"] = "tanh"
    with pytest.raises(ValueError, match="has the activation relu"):
        adapterhub.save(saved, tmp_path / "b")
    assert not os.path.exists(tmp_path / "b")


@pytest.mark.parametrize(
    ("field", "value"), [("scaling", 4.0), ("dropout", 0.3)], ids=["scaling", "dropout"]
)
def test_save_refuses_options_that_the_configuration_has_otherwise(tmp_path, field, value):
    layers = {
        f"encoder.layer.{i}.output": BottleneckAdapter(H, R, activation="relu", **{field: value})
        for i in range(2)
    }
    made = adapterhub.AdapterCheckpoint("mine", layers, "seq_bn")
    message = rf"layer\.1\.output has the {field} {value}, the configuration"
    with pytest.raises(ValueError, match=message):
        adapterhub.save(made, tmp_path / "a")
    assert not os.path.exists(tmp_path / "a")
    made.config = f"seq_bn[{field}={value}]"
    adapterhub.save(made, tmp_path / "a")
    for adapter in adapterhub.load(tmp_path / "a").layers.values():
        assert getattr(adapter, field) == value


def test_save_onto_a_file_is_refused(tmp_path):
    saved = adapterhub.load(folder_with(tmp_path / "a"))
    (tmp_path / "b").write_text("mine")
    with pytest.raises(FileExistsError, match="b is a file; save needs a folder"):
        adapterhub.save(saved, tmp_path / "b")
    assert (tmp_path / "b").read_text() == "mine"


@pytest.mark.parametrize("step", ["save", "exchange", "replace"])
def test_an_interrupted_save_never_leaves_a_mixture(tmp_path, monkeypatch, step):
    old = adapterhub.load(folder_with(tmp_path / "a"))
    new = adapterhub.load(folder_with(tmp_path / "b", config={**CONFIG, "scaling": 2.0}))

    def fail(*_):
        raise OSError("disk full")

    if step == "replace":  # of single files, where folders cannot change places
        monkeypatch.setattr(exchange, "_exchange", lambda *_: False)
    owner, name = {"save": (torch, "save"), "exchange": (exchange, "_exchange")}.get(
        step, (os, "replace")
    )
    monkeypatch.setattr(owner, name, fail)
    for folder in (tmp_path / "a", tmp_path / "fresh"):
        with pytest.raises(OSError, match="disk full"):
            adapterhub.save(new, folder)
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    if step != "replace":
        assert adapterhub.load(tmp_path / "a").config == old.config
    else:  # past the point of no return the folder says that it is incomplete
        with pytest.raises(FileNotFoundError, match="no adapter_config"):
            adapterhub.load(tmp_path / "a")


def test_stock_folders_of_other_adapters_are_refused_by_name(tmp_path):
    model, _ = stock_model()
    for name, config, reason in (
        ("unipelt", "unipelt", "- gating: "),
        ("compacter", "compacter[reduction_factor=4]", "- phm: "),
        ("compacter++", "compacter++[reduction_factor=4]", "- phm: "),
    ):
        model.add_adapter(name, config=config)
        model.save_adapter(str(tmp_path / name), name)
        with pytest.raises(adapterhub.UnsupportedAdapterError, match=reason):
            adapterhub.load(tmp_path / name)
    model.add_adapter("a", config="seq_bn")
    model.add_adapter("b", config="seq_bn")
    model.add_adapter_fusion(["a", "b"])
    model.save_adapter_fusion(str(tmp_path / "fusion"), ["a", "b"])
    with pytest.raises(adapterhub.UnsupportedAdapterError, match=r"AdapterFusion.*\(fusion\)"):
        adapterhub.load(tmp_path / "fusion")


@pytest.mark.parametrize(
    ("config", "kind", "message"),
    [
        ("unipelt", adapterhub.UnsupportedAdapterError, "- gating: "),
        ("mam[use_gating=True]", adapterhub.UnsupportedAdapterError, "- gating: "),
        ("lora", ValueError, "no bottleneck adapter: 'lora'"),
        ("prefix_tuning|lora", ValueError, "no bottleneck adapter"),
        ("mam|lora", ValueError, "a union cannot be part of a union, got 'mam'"),
        (
            {"architecture": "union", "configs": [{"architecture": "union", "configs": []}]},
            ValueError,
            "a union cannot be part",
        ),
        ("mam[reduction_factor=4]", ValueError, "sets reduction_factor, which not all parts"),
        ("seq_bn[1]", ValueError, "fields of the configuration .* cannot be read"),
        ("my_own", ValueError, "unknown configuration 'my_own'.\n  hint: .*seq_bn.*mam.*lora"),
    ],
)
def test_presets_without_a_bottleneck_adapter_are_refused(tmp_path, config, kind, message):
    with pytest.raises(kind, match=message):
        adapterhub.load(folder_with(tmp_path, config=config))


def by_hand(name="mine", layers=None, config="seq_bn", **others) -> adapterhub.AdapterCheckpoint:
    made = {f"encoder.layer.{i}.output": BottleneckAdapter(H, R, activation="relu") for i in (0, 1)}
    return adapterhub.AdapterCheckpoint(name, made if layers is None else layers, config, **others)


SPARE = {"invertible_adapters.mine.F.0.weight": torch.ones(1)}


@pytest.mark.parametrize(
    ("checkpoint", "kind", "message"),
    [
        ({"a": 1}, TypeError, "needs an AdapterCheckpoint, got a dict"),
        (by_hand(7), TypeError, "name must be a string, got 7"),
        (by_hand(""), ValueError, "not empty.*got ''"),
        (by_hand("a.b"), ValueError, r'without "\.".*got \'a\.b\''),
        (by_hand("keys"), ValueError, r"no attribute of nn\.ModuleDict, got 'keys'"),
        (by_hand(layers=[]), TypeError, "layers must be a dict, got a list"),
        (by_hand(layers={}), ValueError, "no weight of this adapter"),
        (
            by_hand(layers={"a": torch.nn.Linear(2, 2)}),
            TypeError,
            r"layers\['a'\] must be a BottleneckAdapter, got a Linear",
        ),
        (by_hand(layers={7: BottleneckAdapter(H, R)}), TypeError, "keys of layers .* got 7"),
        (by_hand(config=None), ValueError, "the name of a preset, got None"),
        (by_hand(config={**CONFIG, "x": {1}}), TypeError, r"config\['x'\] must be what JSON"),
        (by_hand(config={**CONFIG, 1: 1}), TypeError, "keys of config must be strings, got 1"),
        (by_hand(metadata=None), TypeError, "metadata must be a dict, got a NoneType"),
        (by_hand(metadata={"z": torch.ones(1)}), TypeError, r"metadata\['z'\] must be what JSON"),
        (by_hand(metadata={"z": {1: 0, "a": 0}}), TypeError, r"metadata\['z'\] must be what JSON"),
        (by_hand(metadata={1: "z"}), TypeError, "keys of metadata must be strings, got 1"),
        (by_hand(metadata={"hidden_size": "x"}), ValueError, "hidden_size must be .*got 'x'"),
        (by_hand(metadata={"hidden_size": 2 * H}), ValueError, "R is 2; hidden_size 64"),
        (by_hand(metadata={"version": None}), ValueError, "version must be a string .*got None"),
        (by_hand(other_weights={"a": 1}), TypeError, r"other_weights\['a'\] must be a Tensor"),
        (by_hand("other", other_weights=SPARE), ValueError, "is not of the adapter 'other'"),
        (by_hand(layers={"a": BottleneckAdapter(H, R, bias=False)}), ValueError, "down_bias is m"),
        (
            by_hand(layers={"a": BottleneckAdapter(H, R, activation="relu", device="meta")}),
            ValueError,
            "a: the up_weight is on the meta device",
        ),
    ],
)
def test_what_no_folder_can_hold_is_refused_before_anything_is_written(
    tmp_path, checkpoint, kind, message
):
    with pytest.raises(kind, match=message):
        adapterhub.save(checkpoint, tmp_path / "new" / "x" / "y")
    old = folder_with(tmp_path / "old")
    with pytest.raises(kind):
        adapterhub.save(checkpoint, old)
    assert os.listdir(tmp_path) == ["old"]
    assert adapterhub.load(old).name == "task"


def test_a_save_that_fails_leaves_no_new_folders(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    (tmp_path / "mine").mkdir()
    with pytest.raises(OSError, match="disk full"):
        adapterhub.save(by_hand(), tmp_path / "mine" / "new" / "x" / "y")
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("bert.tunings.task.weight", "is not of the adapter 'task'"),
        ("bert.loras.other.task", "is not of the adapter 'task'"),
        ("bert.loras.new.lora_A", "would take another weight's place, bert.loras.new.lora_A"),
        ("x.adapters.new.adapter_up.bias", "would take another weight's place"),
    ],
)
def test_renaming_loses_no_weight_silently(tmp_path, key, message):
    extra = {"bert.loras.task.lora_A": torch.ones(1), key: torch.zeros(1)}
    saved = adapterhub.load(folder_with(tmp_path / "a", {**weights(), **extra}))
    adapterhub.save(saved, tmp_path / "copy")
    assert set(adapterhub.load(tmp_path / "copy").other_weights) == set(extra)
    saved.name = "new"
    with pytest.raises(ValueError, match=message):
        adapterhub.save(saved, tmp_path / "b")
    assert not os.path.exists(tmp_path / "b")


def test_a_changed_config_is_not_lost_in_a_union(tmp_path):
    union = {"architecture": "union", "configs": [{"architecture": "lora", "r": 8}, CONFIG]}
    saved = adapterhub.load(folder_with(tmp_path / "a", config=union))
    saved.config["original_ln_after"] = False
    with pytest.raises(ValueError, match="original_ln_after is False in config, True in the union"):
        adapterhub.save(saved, tmp_path / "b")
    assert not os.path.exists(tmp_path / "b")


def test_a_configuration_is_not_changed_through_a_checkpoint(tmp_path):
    adapterhub.load(folder_with(tmp_path / "a")).config["leave_out"].append(1)
    assert adapterhub.load(folder_with(tmp_path / "b")).config["leave_out"] == []
