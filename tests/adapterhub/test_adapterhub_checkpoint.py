"""Adapter folders are read and written without the library."""

import json
import os

import pytest
import torch

from adapterkern.integrations import adapterhub
from adapterkern.integrations.adapterhub.configs import DEFAULTS, resolve
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
    """Write a folder as the library does."""
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
@pytest.mark.parametrize("name", ["task", "layer_text_task_adapters"])
def test_legacy_names_are_read(tmp_path, kind, name):
    saved = adapterhub.load(folder_with(tmp_path, weights(name, kind=kind), name=name))
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


def without(tensors: dict, part: str) -> dict:
    return {key: value for key, value in tensors.items() if part not in key}


def in_places(layers: int = 3, stack: str = "bert.encoder.layer", places=PLACES) -> dict:
    return {k: v for p in places for k, v in weights(layers=layers, place=p, stack=stack).items()}


LEFT_OUT = {**DOUBLE, "leave_out": [1]}
BART = {
    **in_places(2, "encoder.layers", ("attention_adapters", "output_adapters")),
    **in_places(2, "decoder.layers", ("attention_adapters", "output_adapters")),
}


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


def test_unions_rename_no_activation_of_old_files(tmp_path):
    """The library, too, renames only those of a plain dict."""
    config = {"architecture": "union", "configs": [{**CONFIG, "non_linearity": "gelu"}]}
    saved = adapterhub.load(folder_with(tmp_path / "a", config=config, version=None))
    adapterhub.save(saved, tmp_path / "b")  # with a version
    for found in (saved, adapterhub.load(tmp_path / "b")):
        assert {adapter.activation for adapter in found.layers.values()} == {"gelu"}


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


class RoundTrip:
    """A stock adapter "task", saved and loaded by us, and its output in a model that loads ours."""

    def __init__(self, folder, name: str, config, safetensors: bool = False):
        self.model, self.models = stock_model(name)
        self.folder, self.name, self.safetensors = folder, name, safetensors
        self.model.add_adapter("task", config=config, set_active=True)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for key, parameter in sorted(self.model.named_parameters()):
                if ".task." in key:  # also invertible adapters and prefixes
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        self.expected = self.output_of(self.model)
        # The library cannot write shared tensors, which prefix tuning has, as safetensors.
        theirs_safe = safetensors and config != "mam"
        self.model.save_adapter(str(folder / "theirs"), "task", use_safetensors=theirs_safe)
        self.saved = adapterhub.load(folder / "theirs", model_type=self.model.config.model_type)

    def output_of(self, model) -> torch.Tensor:
        with torch.no_grad():
            return model(**self.models.inputs(self.name))[0]

    def back(self) -> torch.Tensor:
        path = self.folder / "ours"
        adapterhub.save(self.saved, path, safetensors=self.safetensors)
        fresh = self.models.build(self.name)
        torch.manual_seed(99)  # so that what the folder lacks is drawn otherwise
        loaded = fresh.load_adapter(str(path), set_active=True, use_safetensors=self.safetensors)
        assert loaded == self.saved.name
        return self.output_of(fresh)


OTHERS_TOO = ["seq_bn_inv[non_linearity='gelu']", "mam", "prompt_tuning|seq_bn", "lora|seq_bn"]


@pytest.mark.parametrize("safetensors", [False, True], ids=["bin", "safetensors"])
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("bert", "double_seq_bn"),
        *(("bert", config) for config in OTHERS_TOO),
        ("gpt2", "scaled_par_bn"),
        ("bart", "seq_bn[cross_adapter=True]"),
        ("t5", "double_seq_bn"),
        ("qwen2-hooks", "seq_bn[reduction_factor={'1': 8, 'default': 16}]"),
    ],
)
def test_folders_go_to_the_library_and_back(tmp_path, name, config, safetensors):
    trip = RoundTrip(tmp_path, name, config, safetensors)
    modules = trip.model.named_modules()
    layers = {n for n, m in modules if "task" in (getattr(m, "adapters", None) or ())}
    assert set(trip.saved.layers) == layers
    assert torch.equal(trip.back(), trip.expected)


@pytest.mark.parametrize("config", OTHERS_TOO)
def test_the_round_trip_sees_other_weights_that_are_lost(tmp_path, config):
    trip = RoundTrip(tmp_path, "bert", config)
    assert trip.saved.other_weights
    trip.saved.other_weights.clear()
    assert not torch.equal(trip.back(), trip.expected)


@pytest.mark.parametrize("new", ["new", "loras", "0", "F"])
@pytest.mark.parametrize("config", ["seq_bn", *OTHERS_TOO, "loreft|seq_bn"])
def test_a_renamed_adapter_keeps_all_its_weights(tmp_path, config, new):
    trip = RoundTrip(tmp_path, "bert", config)
    trip.saved.name = new
    assert torch.equal(trip.back(), trip.expected)
    again = adapterhub.load(tmp_path / "ours")
    assert len(again.other_weights) == len(trip.saved.other_weights)
    again.name = "task"  # and back, from a name that other parts of a weight's may have too
    adapterhub.save(again, tmp_path / "back")
    back = adapterhub.load(tmp_path / "back").other_weights
    assert list(back) == list(trip.saved.other_weights)


@pytest.mark.parametrize("text", ["mam", "prefix_tuning|seq_bn", "mam[dropout=0.0]"])
def test_a_union_by_name_is_kept_as_one(tmp_path, text):
    trip = RoundTrip(tmp_path, "bert", text)
    path = tmp_path / "theirs" / "adapter_config.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps({**meta, "config": text}))
    trip.saved = adapterhub.load(tmp_path / "theirs")
    assert trip.saved.saved_config == text
    assert torch.equal(trip.back(), trip.expected)


def outcome(config) -> object:
    """Return what a configuration resolves to, or the words with which it is refused."""
    try:
        return [{k: part[k] for k in (*DEFAULTS, *CONFIG)} for part in resolve(config, True)]
    except adapterhub.UnsupportedAdapterError as error:
        return str(error)
    except ValueError as error:
        return str(error).split(":")[0]  # what follows repeats the configuration


def test_every_preset_is_what_the_library_makes_of_it():
    stock_model()
    from adapters.configuration import ADAPTER_CONFIG_MAP, AdapterConfig

    unions = ("lora|seq_bn", "prefix_tuning[flat=True]|double_seq_bn", "mam[dropout=0.5]")
    assert {name for name in ADAPTER_CONFIG_MAP if "unknown" in str(outcome(name))} == set()
    for text in (*ADAPTER_CONFIG_MAP, *unions):
        assert outcome(text) == outcome(AdapterConfig.load(text).to_dict()), text
    assert outcome("lora") == "the configuration has no bottleneck adapter"
    assert [part["is_parallel"] for part in outcome("mam")] == [True]


@pytest.mark.parametrize(
    "preset", ["seq_bn", "double_seq_bn", "par_bn", "scaled_par_bn", "seq_bn_inv", "pfeiffer"]
)
def test_presets_are_those_of_the_library(preset):
    stock_model()
    from adapters.configuration import ADAPTER_CONFIG_MAP

    theirs = ADAPTER_CONFIG_MAP[preset].to_dict()
    (ours,) = resolve(preset, versioned=True)
    ours = {key: value for key, value in ours.items() if key in theirs}  # 1.1 has fewer
    assert ours == {key: theirs[key] for key in ours}
    assert set(theirs) - set(ours) <= {k for k in theirs if "phm" in k.lower() or "hyper" in k}
