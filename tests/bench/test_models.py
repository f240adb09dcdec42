"""Whole models: the adapters sit where they should, and rows say what they are."""

import contextlib
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from adapterkern import BottleneckAdapter
from adapterkern.bench.results import ModelRow, Timing
from adapterkern.bench.timing import CudaTimer, WallTimer
from benchmarks import model_level, models
from benchmarks.models import SPECS

CPU = torch.device("cpu")
BY_NAME = {spec.name: spec for spec in SPECS}


def built(name, variant):
    pytest.importorskip("peft", reason="peft is not installed")
    return models.build(BY_NAME[name].tiny(), variant, CPU, torch.float32)


def parts(model, kind):
    return [module for module in model.modules() if isinstance(module, kind)]


@pytest.mark.parametrize(
    ("name", "adapters"),
    [
        ("block-1024", 2),
        ("gpt2-medium-1x128-H", 4),  # two in each of two layers
        ("gpt2-medium-1x128-L", 2),
        ("bert-base-32x128", 4),
        ("llama-7b-block-4x2048", 2),
    ],
)
def test_a_model_has_its_adapters_and_trains_them_alone(name, adapters):
    spec = BY_NAME[name].tiny()
    model = built(name, "adapterkern")
    found = parts(model, BottleneckAdapter)
    assert len(found) == adapters
    assert {adapter.bottleneck_size for adapter in found} == {spec.bottleneck_size}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    hidden, bottleneck = spec.hidden_size, spec.bottleneck_size
    assert trained == adapters * (2 * hidden * bottleneck + hidden + bottleneck)


def test_published_models_have_about_as_many_trained_parameters_as_published():
    # 0.5 million for the long batch and 11 million for the others, in 24 layers of width 1024.
    for spec in SPECS:
        if spec.family == "gpt2":
            each = 2 * 1024 * spec.bottleneck_size
            count = 24 * spec.per_layer * each
            wanted = 0.5e6 if "32x512" in spec.name else 11e6
            assert count == pytest.approx(wanted, rel=0.05)


def test_plain_and_full_are_the_same_model_frozen_and_not():
    plain, full = built("bert-base-32x128", "plain"), built("bert-base-32x128", "full")
    assert not any(p.requires_grad for p in plain.parameters())
    assert all(p.requires_grad for p in full.parameters())
    for a, b in zip(plain.parameters(), full.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_block_gives_the_same_with_the_residual_folded_in():
    plain = built("block-1024", "plain")
    adapted, folded = built("block-1024", "adapterkern"), built("block-1024", "adapterkern-skip")
    folded.load_state_dict(adapted.state_dict())
    x = models.embedded_input(BY_NAME["block-1024"].tiny(), CPU, torch.float32)
    torch.testing.assert_close(adapted(x), folded(x))
    assert not torch.equal(adapted(x), plain(x))
    for adapter in parts(adapted, BottleneckAdapter):
        nn.init.zeros_(adapter.up_proj.weight)
    plain.load_state_dict(adapted.state_dict(), strict=False)
    torch.testing.assert_close(adapted(x), plain(x))


@pytest.mark.parametrize("mode", ["forward", "step"])
def test_every_variant_of_a_model_gets_a_row(mode):
    pytest.importorskip("peft", reason="peft is not installed")
    spec = BY_NAME["bert-base-32x128"].tiny()
    rows = model_level.measure_model(spec, mode, "eager", WallTimer(), torch.float32, 0.0)
    by_variant = {row.variant: row for row in rows}
    wanted = {"plain", "adapterhub", "lora", "adapterkern"} | (
        {"full"} if mode == "step" else set()
    )
    assert set(by_variant) == wanted
    for name in wanted - {"adapterhub"}:
        row = by_variant[name]
        assert row.status == "ok"
        assert row.milliseconds.p50 > 0
        assert row.overhead_percent is None  # a CPU tells nothing of what a GPU pays
    assert by_variant["plain"].trained == 0
    assert by_variant["adapterkern"].trained == 4 * 292


def test_a_step_trains_the_adapters_and_passes_gradients_to_the_input():
    spec = BY_NAME["block-1024"].tiny()
    model = built("block-1024", "adapterkern")
    before = [p.detach().clone() for p in model.parameters()]
    row = model_level.ModelRow(spec.name, "adapterkern", "step", "eager")
    trained = [p for p in model.parameters() if p.requires_grad]
    model_level._call(spec, model, trained, row, CPU, torch.float32)()
    for old, parameter in zip(before, model.parameters(), strict=True):
        assert torch.equal(old, parameter) != parameter.requires_grad


def test_a_missing_package_costs_its_variant_alone(monkeypatch):
    for name in ("adapters", "adapters.methods.modeling", "peft"):
        monkeypatch.setitem(sys.modules, name, None)
    spec = BY_NAME["block-1024"].tiny()
    rows = model_level.measure_model(spec, "forward", "eager", WallTimer(), torch.float32, 0.0)
    states = {row.variant: (row.status, row.milliseconds is not None) for row in rows}
    assert states == {
        "plain": ("ok", True),
        "adapterhub": ("unavailable", False),
        "lora": ("unavailable", False),
        "adapterkern": ("ok", True),
        "adapterkern-skip": ("ok", True),
    }


def test_out_of_memory_in_one_variant_is_recorded(monkeypatch):
    build = models.build

    def greedy(spec, variant, device, dtype):
        if variant == "adapterkern":
            raise torch.OutOfMemoryError("too large")
        return build(spec, variant, device, dtype)

    monkeypatch.setattr(models, "build", greedy)
    spec = BY_NAME["block-1024"].tiny()
    rows = model_level.measure_model(
        spec, "forward", "eager", WallTimer(), torch.float32, 0.0, ("plain", "adapterkern")
    )
    assert [row.status for row in rows] == ["ok", "out_of_memory"]


def test_overheads_are_relative_to_the_plain_model():
    rows = {name: ModelRow("m", name, "forward", "eager") for name in ("plain", "adapterkern")}
    for name, time in (("plain", 2.0), ("adapterkern", 2.1)):
        rows[name].milliseconds = Timing(time, time, time, 5)
    model_level._overheads(rows)
    assert rows["plain"].overhead_percent is None
    assert rows["adapterkern"].overhead_percent == pytest.approx(5.0)


def test_a_graph_needs_a_gpu_and_says_so():
    spec = BY_NAME["block-1024"].tiny()
    (row,) = model_level.measure_model(
        spec, "forward", "graph", WallTimer(), torch.float32, 0.0, ("plain",)
    )
    assert (row.status, row.note) == ("unavailable", "CUDA graphs need a GPU")


class Replaying(CudaTimer):
    """A GPU's timer whose graph runs what was captured."""

    def __init__(self):
        self.device, self.captured = CPU, []

    def session(self):
        return contextlib.nullcontext()

    def capture(self, subject, most_calls):
        (call,) = subject.calls
        self.captured.append(most_calls)
        return SimpleNamespace(replay=call), most_calls


def test_a_graph_of_a_model_holds_one_call_and_its_replay_is_timed():
    spec, timer = BY_NAME["block-1024"].tiny(), Replaying()
    rows = model_level.measure_model(
        spec, "step", "graph", timer, torch.float32, 0.0, ("plain", "adapterkern")
    )
    assert timer.captured == [1, 1]
    assert [row.status for row in rows] == ["ok", "ok"]
    assert all(row.milliseconds.p50 > 0 for row in rows)
