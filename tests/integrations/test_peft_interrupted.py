"""Saves that are stopped half-way, and folders that several processes use at once."""

import contextlib
import json
import pathlib
import pkgutil
import subprocess
import sys

import peft
import pytest
import torch
from random_adapters import randomised
from safetensors.torch import load_file
from torch import nn

from adapterkern.integrations.peft import BottleneckConfig


def interrupt(monkeypatch, where, calls=0):
    """Let a function be interrupted once it has been called that often; a writer, amid its file."""
    module, _, name = where.rpartition(".")
    function = getattr(pkgutil.resolve_name(module), name)
    left = iter(range(calls))

    def interrupted(*args, **kwargs):
        if next(left, None) is None:
            if name == "safe_save_file":
                pathlib.Path(args[1]).write_bytes(b"half of it")
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    monkeypatch.setattr(where, interrupted)


def test_interrupted_save_of_a_new_folder_is_no_adapter(tiny, tmp_path, monkeypatch):
    model = randomised(tiny("bert"))
    interrupt(monkeypatch, "peft.peft_model.safe_save_file")
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config.json'"):
        peft.PeftModel.from_pretrained(tiny("bert"), str(tmp_path))


@pytest.mark.parametrize("name", ["default", "french"])
@pytest.mark.parametrize(
    "where",
    ["peft.peft_model.safe_save_file", "adapterkern.integrations.peft.saving.os.replace"],
    ids=["amid-the-weights", "amid-the-configuration"],
)
def test_interrupted_save_leaves_the_adapter_that_was_there(
    tiny, batch, output, tmp_path, monkeypatch, name, where
):
    old = randomised(tiny("bert"), name, activation="relu")
    old.save_pretrained(tmp_path)
    folder = tmp_path if name == "default" else tmp_path / name
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    new = randomised(tiny("bert"), name, activation="tanh")
    nn.init.ones_(next(p for key, p in new.named_parameters() if "down_proj.bias" in key))
    with monkeypatch.context() as patch:
        interrupt(patch, where)
        with pytest.raises(KeyboardInterrupt):
            new.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    loaded = peft.PeftModel.from_pretrained(tiny("bert"), folder)
    assert torch.equal(output(loaded, batch("bert")), output(old, batch("bert")))


@pytest.mark.parametrize("before", ["safetensors", "bin", "none"])
@pytest.mark.parametrize("after", ["safetensors", "bin"])
def test_save_stopped_between_any_two_renames_leaves_the_old_adapter_or_the_new(
    tiny, batch, output, tmp_path, monkeypatch, before, after
):
    """The folder changes over once, from all of the one to all of the other."""
    models = {
        "old": randomised(tiny("bert"), activation="relu"),
        "new": randomised(tiny("bert"), activation="tanh"),
    }
    expected = {name: output(model, batch("bert")) for name, model in models.items()}
    found = []
    while not found or found[-1] != "finished":
        folder = tmp_path / str(len(found))
        if before != "none":
            models["old"].save_pretrained(folder, safe_serialization=before == "safetensors")
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            interrupt(patch, "adapterkern.integrations.peft.saving.os.replace", len(found))
            models["new"].save_pretrained(folder, safe_serialization=after == "safetensors")
            found.append("finished")
        try:
            loaded = peft.PeftModel.from_pretrained(tiny("bert"), folder)
        except ValueError as error:
            state = "none" if "Can't find 'adapter_config.json'" in str(error) else str(error)
        else:
            result = output(loaded, batch("bert"))
            state = next(name for name in models if torch.equal(result, expected[name]))
        if found and found[-1] == "finished":
            assert state == "new"
        else:
            found.append(state)
    first = "none" if before == "none" else "old"
    assert found == sorted(found, key=[first, "new", "finished"].index)
    assert found.count(first) >= 2
    # The configuration, without which PEFT finds no adapter, comes last; over an old adapter the
    # weights decide before it.
    assert ("new" in found) == (before != "none")


def test_saving_in_the_other_format_leaves_no_older_weights(tiny, batch, output, tmp_path):
    randomised(tiny("bert"), activation="relu").save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("---\n{}\n---\nmine\n")
    (tmp_path / "optimizer.pt").write_bytes(b"kept")
    model = randomised(tiny("bert"), activation="tanh")
    for expected in ("adapter_model.bin", "adapter_model.safetensors"):
        model.save_pretrained(tmp_path, safe_serialization=expected.endswith("safetensors"))
        others = {"README.md", "optimizer.pt", "adapter_config.json"}
        assert {path.name for path in tmp_path.iterdir()} == {expected, *others}
        loaded = peft.PeftModel.from_pretrained(tiny("bert"), tmp_path)
        assert torch.equal(output(loaded, batch("bert")), output(model, batch("bert")))
    assert "mine" in (tmp_path / "README.md").read_text()


def races(what, folder, loads):
    """Run peft_folder_races.py and return what it saw, and the files that are left."""
    script = pathlib.Path(__file__).with_name("peft_folder_races.py")
    command = [sys.executable, str(script), what, str(folder), str(loads)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    printed = json.loads(finished.stdout.splitlines()[-1])
    assert printed["files"] == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    return printed["seen"]


@pytest.mark.thorough
def test_killed_saves_always_leave_a_whole_adapter(tmp_path):
    seen = races("kills", tmp_path, loads=30)
    assert set(seen) == {"model 0", "model 1"}


@pytest.mark.thorough
def test_reader_never_meets_a_mixture_of_two_writers(tmp_path):
    """Both write as fast as they can, so that many a load is refused, which says why."""
    seen = races("readers", tmp_path, loads=30)
    assert set(seen) <= {"model 0", "model 1", "refused"}


@pytest.mark.thorough
def test_reader_is_not_refused_while_the_settings_stay(tmp_path):
    seen = races("same-settings", tmp_path, loads=30)
    assert set(seen) == {"model 0", "model 1"}


def test_folder_saved_anew_during_a_load_is_refused(tiny, tmp_path, monkeypatch):
    """The weights are read last; here another process saves right before that."""
    randomised(tiny("bert"), activation="relu").save_pretrained(tmp_path)
    other = randomised(tiny("bert"), activation="tanh")
    load = peft.peft_model.load_peft_weights

    def late(*args, **options):
        other.save_pretrained(tmp_path)
        return load(*args, **options)

    monkeypatch.setattr("peft.peft_model.load_peft_weights", late)
    with pytest.raises(ValueError, match=r"was saved anew while it was being loaded.*\n.*again"):
        peft.PeftModel.from_pretrained(tiny("bert"), tmp_path)


def test_configuration_saved_beside_weights_is_theirs(tiny, batch, output, tmp_path):
    """A user may correct the settings of an adapter that lies there."""
    model = randomised(tiny("bert"), scaling=2.0)
    model.save_pretrained(tmp_path)
    BottleneckConfig(scaling=0.0, inference_mode=True).save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny("bert"), tmp_path)
    torch.testing.assert_close(output(loaded, batch("bert")), output(tiny("bert"), batch("bert")))


@pytest.mark.sweep
@pytest.mark.parametrize("alive", [True, False])
def test_stage_of_a_dead_writer_alone_is_swept(tiny, tmp_path, alive):
    stage = tmp_path / ".saving-x"
    stage.mkdir()
    (stage / "adapter_model.safetensors").write_bytes(b"half")
    code = (
        "import sys; from adapterkern.integrations.staging import lock; "
        f"lock({str(stage)!r}); print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout.readline() == b"locked\n"
        if not alive:
            writer.kill()
            writer.wait()
        randomised(tiny("bert")).save_pretrained(tmp_path)
        assert stage.exists() == alive
        writer.kill()


@pytest.mark.parametrize("renames", range(4))
def test_adapter_of_another_method_gives_way(tiny, tmp_path, monkeypatch, renames):
    """Its reader could not tell that its weights are gone, so its configuration goes first."""
    lora = peft.LoraConfig(target_modules=["query"])
    peft.get_peft_model(tiny("bert"), lora).save_pretrained(tmp_path)
    model = randomised(tiny("bert"))
    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        interrupt(patch, "adapterkern.integrations.peft.saving.os.replace", renames)
        model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    method = "LORA" if any("lora" in key for key in keys) else "BOTTLENECK"
    config = tmp_path / "adapter_config.json"
    assert not config.exists() or json.loads(config.read_text())["peft_type"] == method
    model.save_pretrained(tmp_path)
    assert json.loads(config.read_text())["peft_type"] == "BOTTLENECK"
