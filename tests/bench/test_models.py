"""Whole models: the adapters sit where they should, and rows say what they are."""

import contextlib
import dataclasses
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from adapterkern import BottleneckAdapter
from adapterkern.bench.results import LostDeviceError, ModelRow, Timing
from adapterkern.bench.timing import MIN_SAMPLES, CudaTimer, WallTimer
from benchmarks import attention, model_level, models
from benchmarks.models import SPECS

CPU = torch.device("cpu")
BY_NAME = {spec.name: spec for spec in SPECS}
OWN_PLACES = [spec for spec in SPECS if spec.places]
PRESETS = [spec for spec in SPECS if spec.preset]  # AdapterHub's
GPT2, BERT, LLAMA = "gpt2-medium-1x128-H", "bert-base-32x128", "llama-7b-block-4x2048"


def needs_adapterhub():
    pytest.importorskip("adapters", reason="adapters cannot be imported", exc_type=ImportError)


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
    for spec in OWN_PLACES:
        if spec.family == "gpt2":
            each = 2 * 1024 * spec.bottleneck_size
            count = 24 * 2 * each
            wanted = 0.5e6 if "32x512" in spec.name else 11e6
            assert count == pytest.approx(wanted, rel=0.05)


def test_plain_and_full_are_the_same_model_frozen_and_not():
    plain, full = built("bert-base-32x128", "plain"), built("bert-base-32x128", "full")
    assert not any(p.requires_grad for p in plain.parameters())
    assert all(p.requires_grad for p in full.parameters())
    for a, b in zip(plain.parameters(), full.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("variant", models.FOLDED)
def test_a_block_gives_the_same_with_the_residual_and_the_norm_folded_in(variant):
    plain = built("block-1024", "plain")
    adapted, folded = built("block-1024", "adapterkern"), built("block-1024", variant)
    folded.load_state_dict(adapted.state_dict())
    x = models.embedder(BY_NAME["block-1024"].tiny(), plain, CPU, torch.float32)()
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


class Recorded:
    """Records what attention was given, and which tensors were asked whether they are true."""

    def __init__(self, monkeypatch):
        self.attention, self.asked = [], []
        product, truth = nn.functional.scaled_dot_product_attention, torch.Tensor.__bool__

        def attend(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
            self.attention.append((None if attn_mask is None else attn_mask.shape, is_causal))
            return product(q, k, v, attn_mask, dropout_p, is_causal, **options)

        def ask(tensor):
            self.asked.append(tensor)
            return truth(tensor)

        monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", attend)
        monkeypatch.setattr(torch.Tensor, "__bool__", ask)


def forward(name, variant):
    spec, model = BY_NAME[name].tiny(), built(name, variant).eval()
    with torch.no_grad():
        return model(inputs_embeds=models.embedder(spec, model, CPU, torch.float32)())[0]


@pytest.mark.parametrize("variant", ["plain", "adapterhub", "lora", "adapterkern"])
@pytest.mark.parametrize(("name", "causal"), [(GPT2, True), (BERT, False), (LLAMA, True)])
def test_attention_gets_no_mask_and_the_host_waits_for_no_tensor(
    name, causal, variant, monkeypatch
):
    if variant == "adapterhub":
        needs_adapterhub()
    recorded = Recorded(monkeypatch)
    without = forward(name, variant)
    assert set(recorded.attention) == {(None, causal)}
    assert recorded.asked == []
    monkeypatch.setattr(attention, "leave_masks_out", lambda _model: None)
    torch.testing.assert_close(without, forward(name, variant), rtol=1e-5, atol=1e-5)


def test_a_model_that_builds_a_mask_all_the_same_gets_no_time(monkeypatch):
    def leave_one_in(model):
        attention_mask = torch.ones(2, 1, 8, 8, dtype=torch.bool)
        model.register_forward_pre_hook(
            lambda _module, _inputs, options: ((), {**options, "attention_mask": attention_mask}),
            with_kwargs=True,
        )

    monkeypatch.setattr(attention, "leave_masks_out", leave_one_in)
    (row,) = model_level.measure_model(
        BY_NAME[GPT2].tiny(), "forward", "eager", WallTimer(), torch.float32, 0.0, ("plain",)
    )
    assert row.status == "failed"
    assert "attention got a mask of [2, 1, 8, 8]" in row.note
    assert row.milliseconds is None


@pytest.mark.parametrize("name", [spec.name for spec in OWN_PLACES])
def test_adapterhub_trains_as_many_parameters_as_ours_at_real_widths(name):
    needs_adapterhub()
    spec = dataclasses.replace(BY_NAME[name], layers=1, vocabulary=8)
    meta = torch.device("meta")
    trained = {
        variant: sorted(
            p.shape
            for p in models.build(spec, variant, meta, torch.float32).parameters()
            if p.requires_grad and p.dim() == 2
        )
        for variant in ("adapterhub", "adapterkern")
    }
    assert trained["adapterhub"] == trained["adapterkern"]
    assert len(trained["adapterhub"]) == 2 * 2  # two adapters, each down and up


def test_the_trained_share_is_of_the_whole_model():
    pytest.importorskip("peft", reason="peft is not installed")
    for name, millions in ((BERT, 109), ("gpt2-medium-16x256-H", 355)):
        model = models.build(BY_NAME[name], "adapterkern", torch.device("meta"), torch.bfloat16)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in model.parameters())
        assert (total - trained) / 1e6 == pytest.approx(millions, rel=0.01)
        assert 0.005 < trained / total < 0.05  # as published


def preset_rows(spec, mode):
    needs_adapterhub()
    return model_level.measure_model(spec, mode, "eager", WallTimer(), torch.float32, 0.0)


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("name", "mode"), [(spec.name, mode) for spec in PRESETS for mode in spec.modes]
)
def test_stock_and_patched_adapterhub_stand_side_by_side(name, mode):
    spec = BY_NAME[name]
    rows = preset_rows(spec.tiny(), mode)
    assert [row.variant for row in rows] == list(models.PATCHED)
    assert [(row.status, row.note) for row in rows] == [("ok", "")] * 4
    assert len({row.trained for row in rows[1:]}) == 1
    assert rows[1].trained > 0


def test_each_adapterhub_variant_runs_its_own_path(monkeypatch):
    needs_adapterhub()
    from adapters.methods.bottleneck import BottleneckLayer

    from adapterkern.integrations.adapterhub import fast_path

    stock = BottleneckLayer.bottleneck_layer_forward
    spec, paths, outputs = BY_NAME["bert-base-32x128-seq_bn"].tiny(), {}, {}
    counted = {"_layer": "layer", "run_call": "call", "_stock_single": "stock"}
    for variant in models.PATCHED[1:]:
        model = models.build(spec, variant, CPU, torch.float32).eval()
        calls = paths[variant] = []
        with models.patched(model, variant), monkeypatch.context() as patch, torch.no_grad():
            for name, kind in counted.items():
                inner = getattr(fast_path, name)
                patch.setattr(
                    fast_path,
                    name,
                    lambda *a, inner=inner, kind=kind, calls=calls, **k: (
                        calls.append(kind) or inner(*a, **k)
                    ),
                )
            x = models.embedder(spec, model, CPU, torch.float32)()
            outputs[variant] = model(inputs_embeds=x).last_hidden_state
    assert "layer" in paths["adapterhub-patched"]
    assert "layer" not in paths["adapterhub-patched-calls"]
    assert "call" in paths["adapterhub-patched-calls"]
    assert paths["adapterhub"] == []
    for variant in models.PATCHED[2:]:
        torch.testing.assert_close(outputs[variant], outputs["adapterhub"], rtol=1e-5, atol=1e-5)
    preset_rows(spec, "forward")
    assert BottleneckLayer.bottleneck_layer_forward is stock


def test_decoding_gives_the_last_token_of_the_whole_and_forgets_it():
    spec = BY_NAME["gpt2-medium-16x256-seq_bn"].tiny()
    model = models.build(spec, "plain", CPU, torch.float32).eval()
    x = models.embedder(spec, model, CPU, torch.float32, tokens=9)()
    past = models.past_of(model, x[:, :8])
    with torch.no_grad():
        whole = model(inputs_embeds=x).last_hidden_state[:, -1:]
        for _ in range(2):
            last = model(inputs_embeds=x[:, 8:], past_key_values=past, use_cache=True)
            torch.testing.assert_close(last.last_hidden_state, whole, rtol=1e-5, atol=1e-5)
    assert past.get_seq_length() == 8


def test_a_step_has_no_loss_of_its_own(monkeypatch):
    given = []
    backward = torch.autograd.backward
    monkeypatch.setattr(
        torch.autograd, "backward", lambda *some: given.append(some) or backward(*some)
    )
    spec, model = BY_NAME[BERT].tiny(), built(BERT, "full")
    row = ModelRow(spec.name, "full", "step", "eager")
    step = model_level._call(spec, model, list(model.parameters()), row, CPU, torch.float32)
    step()
    step()
    (out, dy), (_, again) = given
    assert out.shape == dy.shape == (2, 8, 32)
    assert out.grad_fn is not None
    assert again is dy
    embedding = model.get_input_embeddings().weight
    assert embedding.grad is not None  # full fine-tuning trains it too


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
        "adapterkern-norm": ("ok", True),
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
    """A GPU's timer whose graph runs what was captured, and whose events give known times."""

    def __init__(self):
        self.device, self.captured, self.sampled = CPU, [], []

    def session(self):
        return contextlib.nullcontext()

    def capture(self, subject):
        (call,) = subject.calls
        self.captured.append(subject.least_calls)
        return SimpleNamespace(replay=call), subject.least_calls

    def between_events(self, subject, before, call):
        self.sampled.append("ahead")
        subject.late = len(self.captured) == 1
        call()
        return 2000.0

    def with_gaps(self, call):
        self.sampled.append("gaps")
        call()
        return 3000.0


@pytest.mark.parametrize(
    ("execution", "how", "milliseconds"), [("eager", "gaps", 3.0), ("graph", "ahead", 2.0)]
)
def test_a_model_is_timed_by_events_and_its_graph_holds_one_call(execution, how, milliseconds):
    spec, timer = BY_NAME["block-1024"].tiny(), Replaying()
    rows = model_level.measure_model(
        spec, "step", execution, timer, torch.float32, 0.0, ("plain", "adapterkern")
    )
    assert timer.captured == ([1, 1] if execution == "graph" else [])
    assert timer.sampled == [how] * 2 * (MIN_SAMPLES + 1)
    for row in rows:
        assert (row.status, row.note) == ("ok", "")
        assert row.milliseconds == Timing(*[milliseconds] * 3, 5, (milliseconds,) * 5)


def test_a_graph_whose_launch_the_gpu_waits_for_says_so():
    spec = BY_NAME["block-1024"].tiny()
    (row,) = model_level.measure_model(
        spec, "forward", "graph", Replaying(), torch.float32, 0.0, ("plain",)
    )
    assert (row.status, row.milliseconds.p50) == ("ok", 2.0)
    assert row.note == "launches included, the host was behind the GPU"


def test_a_model_that_loses_the_gpu_ends_the_measuring(monkeypatch):
    def lost(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(models, "build", lost)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    spec = BY_NAME["block-1024"].tiny()
    with pytest.raises(LostDeviceError, match="in the work of plain"):
        model_level.measure_model(spec, "step", "eager", Replaying(), torch.float32, 0.0)
