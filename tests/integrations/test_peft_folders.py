"""What a saved folder tells, and folders that are damaged or hostile."""

import json
import struct
import subprocess
import sys

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from adapterkern import __version__
from adapterkern.integrations.peft import BottleneckConfig

LOAD = """
import sys, torch, transformers, peft
{first}
torch.manual_seed(0)
base = transformers.BertModel.from_pretrained(sys.argv[1]).eval()
model = peft.PeftModel.from_pretrained(base, sys.argv[2])
with torch.no_grad():
    torch.save(model(torch.arange(3, 13).view(2, 5))[0], sys.argv[3])
"""


def adapted(base, **fields):
    return peft.get_peft_model(base, BottleneckConfig(init="bert", **fields)).eval()


@pytest.fixture
def folder(tiny, tmp_path):
    """The folder of an adapter with R = 4 for H = 32."""
    adapted(tiny("bert"), bottleneck_size=4).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.thorough
@pytest.mark.parametrize("first", ["import adapterkern.integrations.peft", ""])
def test_saved_adapter_loads_in_a_fresh_process_after_the_import_alone(tiny, tmp_path, first):
    """PEFT looks for no methods of others: neither entry points nor the file's own words."""
    tiny("bert").save_pretrained(tmp_path / "base")
    base = type(tiny("bert")).from_pretrained(tmp_path / "base").eval()
    model = adapted(base)
    model.save_pretrained(tmp_path / "saved")
    command = [sys.executable, "-c", LOAD.format(first=first)]
    command += [str(tmp_path / name) for name in ("base", "saved", "result.pt")]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if not first:
        assert "KeyError: 'BOTTLENECK'" in finished.stderr
        return
    assert finished.returncode == 0, finished.stderr
    with torch.no_grad():
        expected = model(torch.arange(3, 13).view(2, 5))[0]
    assert torch.equal(torch.load(tmp_path / "result.pt"), expected)


def test_files_name_the_import_that_loading_needs(folder):
    written = json.loads((folder / "adapter_config.json").read_text())["saved_with"]
    assert written["import"] == "adapterkern.integrations.peft"
    assert written["library"] == f"adapterkern {__version__}"
    card = (folder / "README.md").read_text()
    assert "\nimport adapterkern.integrations.peft" in card
    assert "KeyError: 'BOTTLENECK'" in card
    assert "y + scaling * (act(y @ down.T + down_bias) @ up.T + up_bias)" in card
    front = card.split("---")[1]
    assert "library_name: peft" in front
    assert "- adapterkern\n" in front


def test_model_card_says_it_once_and_keeps_what_the_user_wrote(tiny, folder):
    card = folder / "README.md"
    card.write_text(
        card.read_text().replace("- adapterkern\n", "- adapterkern\n- mine\n") + "End.\n"
    )
    adapted(tiny("bert")).save_pretrained(folder)
    text = card.read_text()
    assert text.count("## Loading with adapterkern") == 1
    assert text.count(f"- adapterkern {__version__}") == 1
    assert text.endswith("End.\n")


# Damage


def rewrite(folder, **changes):
    """Save the weights again as another program would, with some changed."""
    path = folder / "adapter_model.safetensors"
    save_file({**load_file(path), **changes}, path)


DOWN = "base_model.model.encoder.layer.0.output.dense.bottleneck_adapter.down_proj.weight"


def raw(header, data=b""):
    def damage(folder):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        content = struct.pack("<Q", len(text)) + text + data
        (folder / "adapter_model.safetensors").write_bytes(content)

    return damage


def config(**fields):
    def damage(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return damage


def config_text(text):
    return lambda folder: (folder / "adapter_config.json").write_bytes(text)


def in_place_of(name, make):
    def damage(folder):
        (folder / name).unlink()
        make(folder / name)

    return damage


def pickled(content):
    def damage(folder):
        (folder / "adapter_model.safetensors").unlink()
        if isinstance(content, bytes):
            (folder / "adapter_model.bin").write_bytes(content)
        else:
            torch.save(content, folder / "adapter_model.bin")

    return damage


class Hostile:
    """What unpickling would call."""

    def __reduce__(self):
        return print, ("unpickled",)


HEADER = {DOWN: {"dtype": "F32", "shape": [4, 32], "data_offsets": [0, 512]}}
DAMAGES = {
    "int8": lambda folder: rewrite(folder, **{DOWN: torch.zeros(4, 32, dtype=torch.int8)}),
    "complex": lambda folder: rewrite(folder, **{DOWN: torch.zeros(4, 32, dtype=torch.complex64)}),
    "no-size": lambda folder: rewrite(folder, **{DOWN: torch.zeros(4, 0)}),
    "no-keys": raw({}),
    "other-keys": raw({"lora_A": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
    "header-of-2**60-bytes": lambda folder: (folder / "adapter_model.safetensors").write_bytes(
        struct.pack("<Q", 2**60) + b"{}"
    ),
    "header-is-no-json": raw(b"{{{{"),
    "header-is-a-list": raw([1]),
    "header-nested": raw(b'{"a":' * 100_000),
    "header-not-utf8": raw(b"\xff\xfe"),
    "offsets-beyond-the-end": raw(HEADER, b"short"),
    "offsets-too-large": raw({DOWN: {**HEADER[DOWN], "data_offsets": [0, 2**70]}}),
    "shape-overflows": raw({DOWN: {**HEADER[DOWN], "shape": [2**62, 2**62]}}, b"0" * 512),
    "metadata-is-no-json": raw({"__metadata__": {"adapterkern_config": "{"}, **HEADER}, b"0" * 512),
    "metadata-nested": raw(
        {"__metadata__": {"adapterkern_config": "[" * 100_000}, **HEADER}, b"0" * 512
    ),
    "metadata-is-a-list": raw({"__metadata__": {"adapterkern_config": "[]"}, **HEADER}, b"0" * 512),
    "metadata-of-another-method": raw(
        {"__metadata__": {"adapterkern_config": '{"peft_type": "LORA"}'}, **HEADER}, b"0" * 512
    ),
    "weights-are-a-folder": in_place_of("adapter_model.safetensors", lambda path: path.mkdir()),
    "config-is-a-folder": in_place_of("adapter_config.json", lambda path: path.mkdir()),
    "config-empty": config_text(b""),
    "config-no-json": config_text(b"{{"),
    "config-not-utf8": config_text(b'{"peft_type": "\xff"}'),
    "config-nested": config_text(b"[" * 100_000),
    "config-is-a-number": config_text(b"5"),
    "config-is-a-list": config_text(b"[]"),
    "config-without-end": config_text(b'{"peft_type": "BOTTLENECK", "scaling": ' + b"9" * 5000),
    "type-is-a-list": config(peft_type=["BOTTLENECK"]),
    "size-huge": config(bottleneck_size=10**9),
    "size-beyond-64-bits": config(bottleneck_size=10**30),
    "size-negative": config(bottleneck_size=-4),
    "size-is-text": config(bottleneck_size="4"),
    "size-is-a-truth-value": config(bottleneck_size=True),
    "factor-tiny": config(bottleneck_size=None, reduction_factor=1e-300),
    "factor-zero": config(bottleneck_size=None, reduction_factor=0),
    "factor-nan": config(bottleneck_size=None, reduction_factor=float("nan")),
    "scaling-nan": config(scaling=float("nan")),
    "scaling-infinite": config(scaling=float("inf")),
    "scaling-beyond-float": config(scaling=10**400),
    "scaling-null": config(scaling=None),
    "dropout-nan": config(dropout=float("nan")),
    "activation-unknown": config(activation="mish?"),
    "activation-is-a-list": config(activation=["gelu"]),
    "bias-is-text": config(bias="yes"),
    "targets-of-numbers": config(target_modules=[1, 2]),
    "targets-are-a-dict": config(target_modules={"a": 1}),
    "targets-no-expression": config(target_modules="(("),
    "excluded-no-expression": config(exclude_modules="(("),
    "modules-of-numbers": config(modules_to_save=[1]),
    "layers-nested": config(layers_to_transform=[[0]]),
    "layers-pattern-a-number": config(layers_pattern=1, layers_to_transform=[0]),
    "task-is-a-list": config(task_type=["SEQ_CLS"]),
    "task-unknown": config(task_type="POETRY"),
    "base-is-a-number": config(base_model_name_or_path=3),
    "revision-is-a-list": config(revision=[]),
    "mapping-is-text": config(auto_mapping="x"),
    "pickle-of-code": pickled({DOWN: Hostile()}),
    "pickle-of-a-list": pickled([1, 2]),
    "pickle-of-numbers": pickled({DOWN: 3}),
    "pickle-int8": pickled({DOWN: torch.zeros(4, 32, dtype=torch.int8)}),
    "pickle-of-other-sizes": pickled({DOWN: torch.zeros(7, 32)}),
    "pickle-empty": pickled(b""),
    "pickle-noise": pickled(bytes(range(256))),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_folder_is_a_value_error_that_names_it(tiny, folder, damage, capsys):
    damage(folder)
    base = tiny("bert")
    modules = [type(module) for module in base.modules()]
    with pytest.raises(ValueError, match="saved") as caught:
        peft.PeftModel.from_pretrained(base, str(folder))
    assert str(folder) in str(caught.value)
    assert [type(module) for module in base.modules()] == modules
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["int8", "size-huge", "config-nested", "pickle-of-code"])
def test_damaged_folder_is_refused_by_every_way_of_loading(tiny, folder, damage):
    DAMAGES[damage](folder)
    peft_model = adapted(tiny("bert"), bottleneck_size=4)
    ways = [
        lambda: peft_model.load_adapter(str(folder), "other"),
        lambda: peft.PeftConfig.from_pretrained(str(folder)),
        lambda: BottleneckConfig.from_pretrained(str(folder)),
        lambda: peft.AutoPeftModel.from_pretrained(str(folder)),
        lambda: tiny("bert").load_adapter(str(folder)),
    ]
    for way in ways:
        with pytest.raises(ValueError, match="saved") as caught:
            way()
        assert str(folder) in str(caught.value)


def test_sizes_are_compared_before_memory_is_taken(tiny, folder, monkeypatch):
    config(bottleneck_size=10**6)(folder)

    def taken(*args, **kwargs):
        raise AssertionError("an adapter was made")

    monkeypatch.setattr("adapterkern.integrations.peft.layer.BottleneckAdapter", taken)
    with pytest.raises(ValueError, match=r"bottleneck_size 1000000 .*do not fit .*\[4, 32\]"):
        peft.PeftModel.from_pretrained(tiny("bert"), str(folder))


def test_other_methods_read_their_files_as_before(tiny, tmp_path):
    peft.get_peft_model(tiny("bert"), peft.LoraConfig(target_modules=["query"])).save_pretrained(
        tmp_path
    )
    loaded = peft.PeftModel.from_pretrained(tiny("bert"), tmp_path)
    assert type(loaded.peft_config["default"]) is peft.LoraConfig
    with pytest.raises(FileNotFoundError):
        peft.PeftConfig.from_json_file(str(tmp_path / "nowhere.json"))
