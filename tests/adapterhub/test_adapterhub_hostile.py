"""Folders as a fault or a stranger may leave them: load refuses each by name."""

import json
import os
import pickle
import resource
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_adapterhub_checkpoint import CONFIG, H, folder_with, weights
from torch.nn.utils import parametrizations

from adapterkern.integrations import adapterhub
from adapterkern.integrations.adapterhub import checkpoint, files
from adapterkern.modules.bottleneck import BottleneckAdapter

DOWN = "bert.encoder.layer.1.output.adapters.task.adapter_down.0.weight"
ODD_VALUES = [
    None, True, 0, 1, -1, 7, 10**18, 10**400, 0.5, -0.0, 1e-320, 1e308, float("nan"),
    float("inf"), "", "x", "task", "[" * 500, [], [0], ["x"], [[]], [1.5], {}, {"a": 1},
    {"0": None}, {"default": 1e-300}, {"default": []},
]  # fmt: skip


def refused(path: str | Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        adapterhub.load(path)
    assert str(raised.value).startswith(str(path))


def load_or_refusal(path: Path) -> tuple:
    try:
        return adapterhub.load(path), ""
    except (ValueError, adapterhub.UnsupportedAdapterError) as error:
        return None, str(error)


def changed(convert, *names: str) -> dict:
    return {k: convert(w) if not names or k in names else w for k, w in weights().items()}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (changed(lambda w: w.to(torch.int8)), "the down_weight is int8, none of float32, float16"),
        (changed(lambda w: w.to(torch.complex64)), "the up_bias is complex64, none of"),
        (changed(lambda w: w.to(torch.float8_e4m3fn)), "the up_bias is float8_e4m3fn, none of"),
        (changed(lambda w: w.bool()), "the up_bias is bool"),
        (changed(lambda w: w.half(), DOWN), "1.output: the tensors differ in dtype: down_weight f"),
        (changed(lambda w: w.to_sparse(), DOWN), "down_weight must be a plain .*, sparse_coo"),
        (changed(lambda w: w.to("meta"), DOWN), "1.output: the down_weight is on the meta device"),
        (
            changed(lambda w: torch.zeros(1).expand(w.shape), DOWN),
            r"the down_weight has the shape \[2, 32\] and only 4 bytes",
        ),
        (
            {**weights(), "y.loras.task.lora_A": torch.zeros(1).expand(10**6, 10**6)},
            r"y\.loras\.task\.lora_A has the shape \[1000000, 1000000\] and only 4 bytes",
        ),
        ({**weights(), "y": torch.ones(2).to_sparse()}, "y must be a plain dense"),
        (dict(enumerate(weights().values())), "does not hold a mapping of names to tensors"),
        ({**weights(), "step": 3}, "does not hold a mapping of names to tensors"),
        (list(weights().values()), "does not hold a mapping"),
        (None, "does not hold a mapping"),
    ],
)  # fmt: skip
def test_tensors_that_no_adapter_computes_with_are_refused(tmp_path, tensors, message):
    path = folder_with(tmp_path)
    torch.save(tensors, os.path.join(path, "pytorch_adapter.bin"))
    refused(path, message)


def test_views_of_larger_memory_and_negative_views_give_their_values(tmp_path):
    whole = torch.randn(2 * H, 2 * H, dtype=torch.complex64)
    tensors = {**weights(), DOWN: whole.conj().imag[:2, :H]}
    up = DOWN.replace("down.0", "up")
    tensors[up] = tensors[up].T.contiguous().T
    assert tensors[DOWN].is_neg()
    assert not tensors[up].is_contiguous()
    adapter = adapterhub.load(folder_with(tmp_path, tensors)).layers["bert.encoder.layer.1.output"]
    assert torch.equal(adapter.down_proj.weight, -whole.imag[:2, :H])
    assert torch.equal(adapter.up_proj.weight, tensors[up])
    assert adapter.up_proj.weight.is_contiguous()
    assert adapter.down_proj.weight.untyped_storage().nbytes() == 2 * H * 4


@pytest.mark.parametrize("safetensors", [False, True], ids=["bin", "safetensors"])
def test_what_was_loaded_does_not_change_with_the_file(tmp_path, safetensors):
    path = folder_with(tmp_path)
    name = "adapter.safetensors" if safetensors else "pytorch_adapter.bin"
    if safetensors:
        save_file(weights(), os.path.join(path, name))
    saved = adapterhub.load(path)
    with open(os.path.join(path, name), "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        file.write(b"\xff" * size)
    found = saved.layers["bert.encoder.layer.1.output"].down_proj.weight
    assert torch.equal(found, weights()[DOWN])


@pytest.mark.thorough
@pytest.mark.parametrize("place", ["meta", "config"])
def test_no_value_of_any_entry_raises_anything_but_a_refusal_by_name(tmp_path, place):
    path = Path(folder_with(tmp_path / "a"))
    good = json.loads((path / "adapter_config.json").read_text())
    names = [*good, *CONFIG, *adapterhub.load(path).config, "architecture", "configs"]
    read = 0
    for name in names:
        for value in ODD_VALUES:
            meta = json.loads(json.dumps(good))
            (meta if place == "meta" else meta["config"])[name] = value
            (path / "adapter_config.json").write_text(json.dumps(meta))
            saved, said = load_or_refusal(path)
            if saved is None:
                assert said.startswith(str(path)), (name, value)
                assert len(said) < 5000, (name, value)
                continue
            read += 1
            y = saved.layers["bert.encoder.layer.0.output"](torch.randn(2, H))
            assert y.isfinite().all() or abs(float(value)) > 1e30, (name, value)
    assert read > 100  # most entries are not read at all


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"name": "t", "config": ' + b"[" * 200000 + b"]" * 200000 + b"}", "recursion"),
        (b'{"name": "t", "config": "' + b"x" * (1 << 21) + b'"}', "more than 1048576 bytes"),
        (b'{"name": "t", "config": ' + b"9" * 5000 + b"}", "cannot be read"),
        (b'{"name": "t", "config": "seq_bn[' + b"[" * 900 + b']"}', "cannot be read"),
        (b'{"name": "t", "config": "' + b"x" * 2000 + b'"}', "has 2000 characters: xxx"),
        (b"\xff\xfe{}", "cannot be read"),
        (b"", "cannot be read"),
        (b"\x00" * 100, "cannot be read"),
        (b"[]", "lacks a name"),
        (b"null", "lacks a name"),
    ],
    ids=["deep", "large", "digits", "preset", "name", "utf-16", "empty", "zeros", "list", "null"],
)
def test_configurations_that_are_none_are_refused(tmp_path, text, message):
    path = folder_with(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(text)
    refused(path, message)


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "pytorch_adapter.bin", "adapter.safetensors"]
)
def test_what_is_no_file_is_refused(tmp_path, name):
    path = folder_with(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).mkdir()
    refused(path, f"{name} is no file")
    (tmp_path / name).rmdir()
    for target in ("nowhere", name, "/dev/zero"):
        (tmp_path / name).symlink_to(target)
        refused(path, f"{name} is no file")
        (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    refused(path, f"{name} is no file")


def test_links_to_files_are_read(tmp_path):
    """As huggingface_hub's cache has them."""
    path = Path(folder_with(tmp_path / "blobs"))
    (tmp_path / "a").mkdir()
    for name in os.listdir(path):
        (tmp_path / "a" / name).symlink_to(path / name)
    saved = adapterhub.load(tmp_path / "a")
    assert torch.equal(
        saved.layers["bert.encoder.layer.1.output"].down_proj.weight, weights()[DOWN]
    )


@pytest.mark.parametrize("safetensors", [False, True], ids=["bin", "safetensors"])
def test_a_file_that_is_cut_anywhere_is_refused(tmp_path, safetensors):
    path = folder_with(tmp_path)
    name = "adapter.safetensors" if safetensors else "pytorch_adapter.bin"
    if safetensors:
        save_file(weights(), tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for size in (0, 1, 7, 8, 100, len(whole) // 2, len(whole) - 4, len(whole) - 1):
        (tmp_path / name).write_bytes(whole[:size])
        refused(path, f"{name} is damaged")


def test_a_packed_archive_is_refused_and_not_unpacked(tmp_path):
    path = Path(folder_with(tmp_path))
    with zipfile.ZipFile(path / "pytorch_adapter.bin") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path / "pytorch_adapter.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, entry in entries.items():
            archive.writestr(name, entry)
    refused(path, r"data\.pkl in it is compressed, which torch\.save does not do")


def test_files_of_old_versions_of_torch_are_read(tmp_path):
    path = folder_with(tmp_path)
    torch.save(weights(), tmp_path / "pytorch_adapter.bin", _use_new_zipfile_serialization=False)
    saved = adapterhub.load(path)
    assert torch.equal(
        saved.layers["bert.encoder.layer.1.output"].down_proj.weight, weights()[DOWN]
    )
    (tmp_path / "pytorch_adapter.bin").write_bytes(pickle.dumps({"a": 1}))
    refused(path, "damaged")


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of the process in kB")
@pytest.mark.parametrize("size", [H, 10**9], ids=["honest size", "size of the bomb"])
def test_sizes_are_compared_before_anything_is_allocated(tmp_path, size):
    """The header claims 4 TB, in a sparse file of a few blocks."""
    shape = [10**6, 10**6]
    header = {DOWN: {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * 10**12]}}
    head = json.dumps(header).encode()
    path = folder_with(tmp_path, hidden_size=size)
    with open(tmp_path / "adapter.safetensors", "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + 4 * 10**12)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(path, "down_bias is missing|damaged")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_a_layer_number_beyond_all_models_costs_nothing(tmp_path):
    far = {k.replace("layer.1", "layer.999999"): w for k, w in weights().items()}
    with pytest.raises(
        ValueError, match=r"layer\.20\.output is missing\n  - and|is missing"
    ) as raised:
        adapterhub.load(folder_with(tmp_path, far))
    assert str(raised.value).count("is missing") == 20
    longer = {k.replace("layer.1", "layer." + "9" * 5000): w for k, w in weights().items()}
    adapterhub.load(folder_with(tmp_path, longer))  # no number of a layer, so a name


def test_save_holds_to_what_load_reads(tmp_path):
    layers = {"encoder.layer.0.output": BottleneckAdapter(H, 2, activation="relu")}
    made = adapterhub.AdapterCheckpoint("mine", layers, "seq_bn", metadata={"x": "y" * (1 << 20)})
    with pytest.raises(ValueError, match=r"configuration and the metadata have .* bytes, over"):
        adapterhub.save(made, tmp_path / "a")
    made.metadata.clear()
    layers["encoder.layer.0.output"].up_proj.half()
    with pytest.raises(ValueError, match=r"differ in dtype: .*up_bias float16"):
        adapterhub.save(made, tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_saved_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    path, read, saved = folder_with(tmp_path / "a"), files.read_weights, []
    new = adapterhub.load(folder_with(tmp_path / "b", {k: w + 1 for k, w in weights().items()}))
    new.config = new.config | {"scaling": 2.0}
    for adapter in new.layers.values():
        adapter.scaling = 2.0

    def read_late(folder):
        if not saved:
            saved.append(adapterhub.save(new, path))
        return read(folder)

    monkeypatch.setattr(checkpoint, "read_weights", read_late)
    found = adapterhub.load(path)
    assert found.config["scaling"] == 2.0
    adapter = found.layers["bert.encoder.layer.1.output"]
    assert torch.equal(adapter.down_proj.weight, weights()[DOWN] + 1)


def test_a_folder_that_never_rests_is_refused(tmp_path, monkeypatch):
    path, states = folder_with(tmp_path), iter(range(1000))
    monkeypatch.setattr(files, "_state_of", lambda folder: next(states))
    refused(path, "changes faster than it can be read")


def test_weights_stay_in_their_file_until_they_are_known_to_fit(tmp_path):
    path = folder_with(tmp_path)
    mapped = files.read_weights(path)[DOWN]
    with open(tmp_path / "pytorch_adapter.bin", "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        file.write(b"\x00" * size)
    assert torch.equal(mapped, torch.zeros(2, H))


@pytest.mark.parametrize("scaling", ["learned", "channel"])
def test_a_learned_scaling_is_not_saved_as_a_number(tmp_path, scaling):
    layers = {"encoder.layer.0.output": BottleneckAdapter(H, 2, activation="relu", scaling=scaling)}
    with pytest.raises(ValueError, match="output: scaling is unknown"):
        adapterhub.save(adapterhub.AdapterCheckpoint("mine", layers, "seq_bn"), tmp_path / "a")
    made = adapterhub.AdapterCheckpoint("mine", layers, f"seq_bn[scaling='{scaling}']")
    adapterhub.save(made, tmp_path / "a")
    saved = adapterhub.load(tmp_path / "a").layers["encoder.layer.0.output"]
    assert torch.equal(saved.scaling, layers["encoder.layer.0.output"].scaling)


def test_a_projection_that_is_more_than_its_weights_is_not_saved(tmp_path):
    layers = {"encoder.layer.0.output": BottleneckAdapter(H, 2, activation="relu", init="bert")}
    adapter = layers["encoder.layer.0.output"]
    made = adapterhub.AdapterCheckpoint("mine", layers, "seq_bn")
    parametrizations.weight_norm(adapter.up_proj)  # its weight is what it computes with
    with torch.no_grad():
        adapter.up_proj.parametrizations.weight.original0.fill_(2.0)
    adapterhub.save(made, tmp_path / "a")
    saved = adapterhub.load(tmp_path / "a").layers["encoder.layer.0.output"]
    assert torch.equal(saved.up_proj.weight, adapter.up_proj.weight)
    adapter.down_proj = Wrapper(H, 2)
    with pytest.raises(ValueError, match="has a Wrapper as its down_proj, whose weights are not"):
        adapterhub.save(made, tmp_path / "b")
    assert os.listdir(tmp_path) == ["a"]


class Wrapper(torch.nn.Linear):
    """As LoRA's, whose weight is that of the layer below."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_weights_of_any_strides_are_saved_in_both_formats(tmp_path):
    layers = {"encoder.layer.0.output": BottleneckAdapter(H, 2, activation="relu", init="bert")}
    adapter = layers["encoder.layer.0.output"]
    adapter.up_proj.weight = torch.nn.Parameter(adapter.up_proj.weight.detach().T.contiguous().T)
    made = adapterhub.AdapterCheckpoint("mine", layers, "seq_bn")
    for safetensors in (False, True):
        adapterhub.save(made, tmp_path / "a", safetensors=safetensors)
        saved = adapterhub.load(tmp_path / "a").layers["encoder.layer.0.output"]
        assert torch.equal(saved.up_proj.weight, adapter.up_proj.weight)


def test_a_folder_that_names_no_model_type_fits_any(tmp_path):
    path = folder_with(tmp_path, model_type=None)
    assert adapterhub.load(path, model_type="gpt2").metadata.get("model_type") is None


def test_one_tensor_of_another_kind_is_one_problem(tmp_path):
    with pytest.raises(ValueError, match="the down_weight is int8") as raised:
        adapterhub.load(folder_with(tmp_path, changed(lambda w: w.to(torch.int8), DOWN)))
    assert str(raised.value).count("\n  - ") == 1


def test_layers_of_a_decoder_count_on_behind_those_of_the_encoder_that_are_left_out(tmp_path):
    """The encoder has four layers, the last two left out; the decoder's is the fifth."""
    config = {**CONFIG, "leave_out": [2, 3], "reduction_factor": {"default": 16, "4": 8}}
    encoder = weights(stack="model.encoder.layers")
    decoder = weights(stack="model.decoder.layers", layers=1, r=4)
    saved = adapterhub.load(folder_with(tmp_path, {**encoder, **decoder}, config))
    assert saved.layers["model.decoder.layers.0.output"].bottleneck_size == 4


class Tagged(torch.Tensor):
    pass


def test_tensors_of_a_class_of_their_own_are_not_saved(tmp_path):
    layers = {"encoder.layer.0.output": BottleneckAdapter(H, 2, activation="relu")}
    made = adapterhub.AdapterCheckpoint("mine", layers, "seq_bn")
    bias = layers["encoder.layer.0.output"].up_proj.bias.detach().as_subclass(Tagged)
    layers["encoder.layer.0.output"].up_proj.bias = torch.nn.Parameter(bias)
    with pytest.raises(ValueError, match="up_bias must be a plain dense tensor, got a Tagged"):
        adapterhub.save(made, tmp_path / "a")
    assert os.listdir(tmp_path) == []


def test_a_truth_value_is_no_size(tmp_path):
    one = {"bert.encoder.layer.0.output.adapters.task." + k: torch.ones(s) for k, s in ONE.items()}
    refused(
        folder_with(tmp_path, one, hidden_size=True), ".*hidden_size must be a positive integer"
    )


ONE = {
    "adapter_down.0.weight": (1, 1), "adapter_down.0.bias": (1,),
    "adapter_up.weight": (1, 1), "adapter_up.bias": (1,),
}  # fmt: skip


def test_a_decoder_alone_has_no_cross_attention_to_adapt(tmp_path):
    tensors = weights(stack="model.decoder.layers")
    path = folder_with(tmp_path, tensors, config={**CONFIG, "cross_adapter": True})
    assert len(adapterhub.load(path).layers) == 2


def test_a_scaling_is_a_float_wherever_it_came_from(tmp_path):
    config = adapterhub.load(folder_with(tmp_path, config={**CONFIG, "scaling": 2})).config
    assert type(config["scaling"]) is float


def test_other_weights_that_share_memory_are_saved_in_both_formats(tmp_path):
    saved = adapterhub.load(folder_with(tmp_path / "a"))
    shared = torch.arange(4.0)
    names = [f"bert.invertible_adapters.task.{letter}.0.weight" for letter in "FG"]
    saved.other_weights |= {names[0]: shared, names[1]: shared[:2]}
    for safetensors in (False, True):
        adapterhub.save(saved, tmp_path / "b", safetensors=safetensors)
        found = adapterhub.load(tmp_path / "b").other_weights
        assert torch.equal(found[names[0]], shared)
        assert torch.equal(found[names[1]], shared[:2])
