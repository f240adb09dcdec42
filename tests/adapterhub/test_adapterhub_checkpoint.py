"""Adapter folders are read and written without the library."""

import json
import os
import shutil

import pytest
import torch

from adapterkern.integrations import adapterhub
from adapterkern.integrations.adapterhub import checkpoint as module
from adapterkern.modules.bottleneck import BottleneckAdapter

H, R = 32, 2
CONFIG = {
    "mh_adapter": False,
    "output_adapter": True,
    "non_linearity": "relu",
    "reduction_factor": 16,
    "original_ln_before": True,
}


DOUBLE = {**CONFIG, "mh_adapter": True}
PLACES = ("attention.output", "output")


def weights(
    name: str = "task",
    layers: int = 2,
    kind: str = "adapters",
    r: int = R,
    place: str = "output",
    stack: str = "bert.encoder.layer",
) -> dict:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "adapter_down.0.weight": (r, H),
        "adapter_down.0.bias": (r,),
        "adapter_up.weight": (H, r),
        "adapter_up.bias": (H,),
    }
    return {
        f"{stack}.{i}.{place}.{kind}.{name}.{key}": torch.randn(shape, generator=generator)
        for i in range(layers)
        for key, shape in shapes.items()
    }


def folder_with(path, tensors: dict | None = None, config=CONFIG, **meta) -> str:
    """A folder as the library writes it."""
    os.makedirs(path, exist_ok=True)
    meta = {
        "config": config,
        "hidden_size": H,
        "model_type": "bert",
        "name": "task",
        "version": "adapters.1.3.0",
        **meta,
    }
    meta = {key: value for key, value in meta.items() if value is not None}
    with open(os.path.join(path, "adapter_config.json"), "w") as file:
        json.dump(meta, file)
    torch.save(weights() if tensors is None else tensors, os.path.join(path, "pytorch_adapter.bin"))
    return str(path)


def test_load_gives_config_and_weights_of_every_layer(tmp_path):
    tensors = weights()
    saved = adapterhub.load(folder_with(tmp_path, tensors))
    assert (saved.name, saved.metadata["model_type"]) == ("task", "bert")
    assert (saved.config["residual_before_ln"], saved.config["reduction_factor"]) == (True, 16)
    assert list(saved.layers) == [f"bert.encoder.layer.{i}.output" for i in range(2)]
    for layer, adapter in saved.layers.items():
        assert isinstance(adapter, BottleneckAdapter)
        assert (adapter.activation, adapter.scaling) == ("relu", 1.0)
        prefix = f"{layer}.adapters.task."
        assert torch.equal(adapter.down_proj.weight, tensors[prefix + "adapter_down.0.weight"])
        assert torch.equal(adapter.down_proj.bias, tensors[prefix + "adapter_down.0.bias"])
        assert torch.equal(adapter.up_proj.weight, tensors[prefix + "adapter_up.weight"])
        assert torch.equal(adapter.up_proj.bias, tensors[prefix + "adapter_up.bias"])


@pytest.mark.parametrize("safetensors", [False, True], ids=["bin", "safetensors"])
def test_save_and_load_return_the_same_bits(tmp_path, safetensors):
    first = adapterhub.load(folder_with(tmp_path / "a"))
    first.other_weights["bert.invertible_adapters.task.F.0.weight"] = torch.arange(3.0)
    adapterhub.save(first, tmp_path / "b", safetensors=safetensors)
    written = "adapter.safetensors" if safetensors else "pytorch_adapter.bin"
    assert set(os.listdir(tmp_path / "b")) == {"adapter_config.json", written}
    second = adapterhub.load(tmp_path / "b")
    assert (second.name, second.config) == (first.name, first.config)
    assert second.metadata == first.metadata
    for layer, adapter in first.layers.items():
        for key, value in adapter.state_dict().items():
            assert torch.equal(second.layers[layer].state_dict()[key], value)
    assert torch.equal(
        second.other_weights["bert.invertible_adapters.task.F.0.weight"], torch.arange(3.0)
    )


@pytest.mark.parametrize(
    ("name", "versioned", "activation"),
    [
        ("gelu", None, "gelu_tanh"),
        ("gelu_orig", None, "gelu"),
        ("gelu", "adapters.1.0.0", "gelu"),
        ("gelu_new", "adapters.1.0.0", "gelu_tanh"),
        ("relu", None, "relu"),
        ("swish", None, "silu"),
        ("leakyrelu", "1", "leaky_relu"),
        ("linear", "1", "identity"),
    ],
)
def test_activation_names_mean_what_their_version_says(tmp_path, name, versioned, activation):
    config = {**CONFIG, "non_linearity": name}
    saved = adapterhub.load(folder_with(tmp_path / "a", config=config, version=versioned))
    assert next(iter(saved.layers.values())).activation == activation
    adapterhub.save(saved, tmp_path / "b")  # with a version, so by its present name
    again = adapterhub.load(tmp_path / "b")
    assert next(iter(again.layers.values())).activation == activation


@pytest.mark.parametrize(
    "kind",
    [
        "attention_text_task_adapters",
        "attention_text_lang_adapters",
        "layer_text_task_adapters",
        "layer_text_lang_adapters",
    ],
)
def test_legacy_names_are_read(tmp_path, kind):
    saved = adapterhub.load(folder_with(tmp_path, weights(kind=kind)))
    assert list(saved.layers) == [f"bert.encoder.layer.{i}.output" for i in range(2)]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("pfeiffer", {"original_ln_before": True, "non_linearity": "relu"}),
        ("houlsby", {"mh_adapter": True, "non_linearity": "swish"}),
        ("seq_bn[non_linearity='tanh', scaling=2.0]", {"non_linearity": "tanh", "scaling": 2.0}),
        (
            {**CONFIG, "invertible_adapter": {"block_type": "nice", "reduction_factor": 2}},
            {"inv_adapter": "nice", "inv_adapter_reduction_factor": 2},
        ),
        (
            {"architecture": "union", "configs": [{"architecture": "lora", "r": 8}, CONFIG]},
            {"original_ln_before": True, "reduction_factor": 16},
        ),
        ({**CONFIG, "reduction_factor": {"0": 16, "default": 15}}, {"reduction_factor": ...}),
    ],
    ids=["pfeiffer", "houlsby", "fields", "invertible", "union", "factors"],
)
def test_configurations_are_resolved(tmp_path, config, expected):
    both = in_places(2) if config == "houlsby" else weights()
    found = adapterhub.load(folder_with(tmp_path, both, config)).config
    for key, value in expected.items():
        assert value is ... or found[key] == value


def test_learned_scalings_are_parameters(tmp_path):
    for kind, size in (("learned", 1), ("channel", H)):
        tensors = weights()
        for i in range(2):
            tensors[f"bert.encoder.layer.{i}.output.adapters.task.scaling"] = torch.full(
                (size,), 3.0
            )
        config = {**CONFIG, "scaling": kind}
        saved = adapterhub.load(folder_with(tmp_path / kind, tensors, config))
        adapter = next(iter(saved.layers.values()))
        assert torch.equal(adapter.scaling, torch.full((size,), 3.0))
        adapterhub.save(saved, tmp_path / f"{kind}2")
        again = next(iter(adapterhub.load(tmp_path / f"{kind}2").layers.values()))
        assert torch.equal(again.scaling, adapter.scaling)


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


def without(tensors: dict, part: str) -> dict:
    return {key: value for key, value in tensors.items() if part not in key}


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


def in_places(layers: int = 3, stack: str = "bert.encoder.layer", places=PLACES) -> dict:
    return {k: v for p in places for k, v in weights(layers=layers, place=p, stack=stack).items()}


LEFT_OUT = {**DOUBLE, "leave_out": [1]}
BART = {
    **in_places(2, "encoder.layers", ("attention_adapters", "output_adapters")),
    **in_places(2, "decoder.layers", ("attention_adapters", "output_adapters")),
}


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


@pytest.mark.parametrize(
    ("config", "tensors"),
    [
        (LEFT_OUT, without(in_places(), "layer.1.")),
        ({**DOUBLE, "leave_out": [0, 1]}, without(without(in_places(), "layer.0."), "layer.1.")),
        ({**DOUBLE, "leave_out": [2]}, without(BART, "decoder.layers.0")),
        (
            {**DOUBLE, "leave_out": [1, 2]},
            without(without(BART, "encoder.layers.1"), "decoder.layers.0"),
        ),
        (
            {**CONFIG, "reduction_factor": {"0": 32, "1": 16}},
            {**weights(r=1, layers=1), **without(weights(), "layer.0")},
        ),
    ],
    ids=["middle", "first", "of-decoder", "of-both", "factors"],
)
def test_what_the_configuration_leaves_out_is_no_gap(tmp_path, config, tensors):
    loaded = adapterhub.load(folder_with(tmp_path, tensors, config))
    assert len(loaded.layers) == len(tensors) // 4


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
        ({"reduction_factor": 0}, "reduction_factor must be a positive number, .*got 0"),
        ({"reduction_factor": "x"}, "reduction_factor must be a positive number, .*got 'x'"),
        ({"reduction_factor": None}, "reduction_factor must be .*got None"),
        ({"reduction_factor": {"0": -1}}, "reduction_factor must be"),
        ({"reduction_factor": True}, "reduction_factor must be"),
        ({"non_linearity": None}, "non_linearity must be the name of an activation, got None"),
        ({"scaling": "foo"}, 'scaling must be a number, "learned" or "channel", got \'foo\''),
        ({"dropout": 1.5}, r"dropout must be a number in \[0, 1\), got 1\.5"),
        ({"leave_out": None}, "leave_out must be a list of layer numbers, got None"),
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


@pytest.mark.parametrize("name", ["mish", "of my own"])
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


@pytest.mark.parametrize("step", ["save", "replace"])
def test_an_interrupted_save_never_leaves_a_mixture(tmp_path, monkeypatch, step):
    old = adapterhub.load(folder_with(tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "old")
    new = adapterhub.load(folder_with(tmp_path / "b", config={**CONFIG, "scaling": 2.0}))

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(*((module.torch, "save") if step == "save" else (os, "replace")), fail)
    for folder in (tmp_path / "a", tmp_path / "fresh"):
        with pytest.raises(OSError, match="disk full"):
            adapterhub.save(new, folder)
    monkeypatch.undo()
    assert not os.path.exists(tmp_path / "fresh")
    if step == "save":
        assert adapterhub.load(tmp_path / "a").config == old.config
    else:  # past the point of no return the folder says that it is incomplete
        with pytest.raises(FileNotFoundError, match="no adapter_config"):
            adapterhub.load(tmp_path / "a")


def test_a_checkpoint_can_be_made_by_hand(tmp_path):
    layers = {
        f"layers.{i}.output_adapters": BottleneckAdapter(H, R, activation="relu") for i in range(2)
    }
    made = adapterhub.AdapterCheckpoint(
        "mine", layers, "seq_bn", metadata={"model_type": "llama", "hidden_size": H}
    )
    adapterhub.save(made, tmp_path / "a")
    assert adapterhub.load(tmp_path / "a").config["original_ln_before"] is True


# With the library


def stock_model(name: str = "bert"):
    pytest.importorskip(
        "adapters", reason="round trips need the adapters library", exc_type=ImportError
    )
    import adapterhub_models as models

    if name not in models.CONFIGS:
        pytest.skip("this version of the library has no hooks")
    return models.build(name), models


@pytest.mark.parametrize("safetensors", [False, True], ids=["bin", "safetensors"])
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("bert", "double_seq_bn"),
        ("bert", "seq_bn_inv[non_linearity='gelu']"),
        ("bert", "mam"),
        ("gpt2", "scaled_par_bn"),
        ("bart", "seq_bn[cross_adapter=True]"),
        ("t5", "double_seq_bn"),
        ("qwen2-hooks", "seq_bn[reduction_factor={'1': 8, 'default': 16}]"),
    ],
)
def test_folders_go_to_the_library_and_back(tmp_path, name, config, safetensors):
    model, models = stock_model(name)
    model.add_adapter("task", config=config, set_active=True)
    models.randomise_adapters(model)
    inputs = models.inputs(name)
    with torch.no_grad():
        expected = model(**inputs)[0]
    # The library cannot write shared tensors, which prefix tuning has, as safetensors.
    theirs_safe = safetensors and config != "mam"
    model.save_adapter(str(tmp_path / "theirs"), "task", use_safetensors=theirs_safe)
    saved = adapterhub.load(tmp_path / "theirs", model_type=model.config.model_type)
    layers = {n for n, m in model.named_modules() if "task" in (getattr(m, "adapters", None) or ())}
    assert set(saved.layers) == layers
    adapterhub.save(saved, tmp_path / "ours", safetensors=safetensors)
    fresh = models.build(name)
    fresh.load_adapter(str(tmp_path / "ours"), set_active=True, use_safetensors=safetensors)
    with torch.no_grad():
        assert torch.equal(fresh(**inputs)[0], expected)


@pytest.mark.parametrize(
    "preset", ["seq_bn", "double_seq_bn", "par_bn", "scaled_par_bn", "seq_bn_inv", "pfeiffer"]
)
def test_presets_are_those_of_the_library(preset):
    stock_model()
    from adapters.configuration import ADAPTER_CONFIG_MAP

    from adapterkern.integrations.adapterhub.configs import resolve

    theirs = ADAPTER_CONFIG_MAP[preset].to_dict()
    (ours,) = resolve(preset, versioned=True)
    ours = {key: value for key, value in ours.items() if key in theirs}  # 1.1 has fewer
    assert ours == {key: theirs[key] for key in ours}
    assert set(theirs) - set(ours) <= {k for k in theirs if "phm" in k.lower() or "hyper" in k}
