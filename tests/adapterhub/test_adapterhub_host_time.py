"""Host time of an active layer call, stock and patched in one run, of one token of 32 features."""

import contextlib
import statistics
import timeit

import pytest
import torch

pytest.importorskip("adapters", reason="patching needs the adapters library", exc_type=ImportError)

import adapterhub_models as models
from adapters.methods.bottleneck import BottleneckLayer

from adapterkern.integrations import adapterhub
from adapterkern.integrations.adapterhub import fast_path

MODES = {
    "recorded": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


def active_layer(name: str, preset: str):
    """A call of a layer with an adapter that is trained."""
    model = models.build(name)
    model.add_adapter("a", config=preset)
    model.train_adapter("a")
    model.eval()
    layer = next(m for m in model.modules() if isinstance(m, BottleneckLayer) and len(m.adapters))
    norm = torch.nn.LayerNorm(models.HIDDEN).requires_grad_(False) if name == "bert" else None
    h, inp = torch.randn(1, 1, models.HIDDEN), torch.randn(1, 1, models.HIDDEN)
    return model, lambda: layer.bottleneck_layer_forward(h, inp, norm)


def medians(model, call, rounds: int = 25, number: int = 50) -> tuple[float, float]:
    """Microseconds of a call, stock and patched: medians of short runs in turn."""
    times: dict[bool, list[float]] = {False: [], True: []}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(rounds):
            for patched, found in times.items():
                with adapterhub.patched(model) if patched else contextlib.nullcontext():
                    timeit.timeit(call, number=20)  # Python forgets what it knew of a class
                    found.append(timeit.timeit(call, number=number) / number * 1e6)
    finally:
        torch.set_num_threads(threads)
    return statistics.median(times[False]), statistics.median(times[True])


def ratio(model, call, limit: float, what: str) -> float:
    """Patched over stock; where the machine was busy, of another try."""
    for _ in range(3):
        stock, patched = medians(model, call)
        print(f"{what}: stock {stock:.1f} us, patched {patched:.1f} us ({patched / stock:.2f})")
        if patched < stock * limit:
            break
    return patched / stock


@pytest.fixture
def free_kernel(spy, monkeypatch):
    """A backend whose kernels cost nothing: what is left is the host time a GPU waits for."""
    outputs = torch.empty(1, 1, models.HIDDEN), torch.empty(1, 2)
    calls = []
    monkeypatch.setattr(spy, "forward", lambda call, save_z: calls.append(save_z) or outputs)
    # The shortcut of the CPU, which a GPU does not take.
    monkeypatch.setattr(fast_path, "reference_infers", lambda x: False)
    return calls


# A third of stock's time is reached without gradients. With them it is just met in pre-LN models,
# and not in post-LN ones, where PyTorch's own LayerNorms and sums stay. The rest is for noise.
@pytest.mark.parametrize("preset", ["seq_bn", "double_seq_bn", "par_bn"])
@pytest.mark.parametrize(
    ("name", "mode", "limit"),
    [
        ("gpt2", "no_grad", 0.36),
        ("gpt2", "inference_mode", 0.36),
        ("gpt2", "recorded", 0.38),
        ("bert", "no_grad", 0.36),
        ("bert", "recorded", 0.43),
    ],
)
def test_host_time_around_a_kernel_is_a_third_of_stock_s(free_kernel, name, mode, preset, limit):
    model, call = active_layer(name, preset)
    with MODES[mode]():
        with adapterhub.patched(model):
            assert call().requires_grad == (mode == "recorded")
        assert free_kernel == [mode == "recorded"]
        assert ratio(model, call, limit, f"{name} {preset} {mode}, free kernel") < limit


# On the CPU PyTorch's operations are most of the time, and with gradients they are nearly all.
@pytest.mark.parametrize("preset", ["seq_bn", "scaled_par_bn"])
@pytest.mark.parametrize(
    ("mode", "limit"),
    [("no_grad", 0.48), ("inference_mode", 0.46), ("recorded", 0.95), ("autocast", 1.2)],
)
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_host_time_on_the_cpu_is_what_the_documentation_says(name, preset, mode, limit):
    model, call = active_layer(name, preset)
    with MODES[mode]():
        assert ratio(model, call, limit, f"{name} {preset} {mode}, CPU") < limit
