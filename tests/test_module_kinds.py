"""Projections that are more than their class says, one table: fused rightly, called, or refused."""

import copy
import functools
import pickle
import warnings

import pytest
import torch
from test_module import adapter_of
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.parametrize import register_parametrization

import adapterkern as ak

H, R = 12, 4
FUSED, CALLED, PLAIN = "fused", "called", "plain operations"


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


class Subclass(nn.Linear):
    """As torch's NonDynamicallyQuantizableLinear: the same, by another name."""


class CallsTwice(nn.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


class Doubles(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        if function is not nn.functional.linear:
            return super().__torch_function__(function, types, arguments, options or {})
        return 2 * function(*(t.as_subclass(torch.Tensor) for t in arguments))


class Square(nn.Module):
    def forward(self, weight):
        return weight * weight


def plain(projection, kind=nn.Linear):
    made = kind(projection.in_features, projection.out_features)
    made.load_state_dict(projection.state_dict())
    return made


def by(make):
    """Put what `make` makes of a projection in its place."""

    def change(projection, adapter, name):
        setattr(adapter, name, make(projection))

    return change


def replace(kind):
    return by(functools.partial(plain, kind=kind))


def double_parameters(projection, *_):
    projection.weight = nn.Parameter(projection.weight.detach().as_subclass(Doubles))


def plain_tensors(projection, *_):
    """As a replica of nn.DataParallel holds its parameters."""
    for key in ("weight", "bias"):
        parameter = getattr(projection, key)
        delattr(projection, key)
        object.__setattr__(projection, key, parameter * 1)


def own_forward(projection, *_):
    projection.forward = lambda x, forward=projection.forward: 2 * forward(x)


def quantise(projection, adapter, name):
    projection = plain(projection)
    with warnings.catch_warnings(action="ignore"):
        quantised = torch.ao.quantization.quantize_dynamic(nn.Sequential(projection), {nn.Linear})
    setattr(adapter, name, quantised[0])


def fake_quantise(projection, adapter, name):
    projection = plain(projection)
    with warnings.catch_warnings(action="ignore"):
        projection.qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
        made = torch.ao.nn.qat.Linear.from_float(projection)
    made.apply(torch.ao.quantization.disable_observer)  # else each call changes what follows
    setattr(adapter, name, made)


def low_rank(projection, adapter, name):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(nn.Sequential(projection), config)
    setattr(adapter, name, model.base_model.model[0])


def old_weight_norm(projection, *_):
    with warnings.catch_warnings(action="ignore"):
        nn.utils.weight_norm(projection)
    with torch.no_grad():
        projection.weight_g.mul_(3)  # projection.weight is what it was until the next call


def lazy(projection, adapter, name):
    made = nn.LazyLinear(projection.out_features)
    setattr(adapter, name, made)


KINDS = {
    "as it is": (lambda *_: None, FUSED),
    "subclass": (replace(Subclass), FUSED),
    "own call": (replace(CallsTwice), CALLED),
    "own forward": (own_forward, CALLED),
    "wrapper without bias": (by(Wrapper), CALLED),
    "sequential": (by(nn.Sequential), CALLED),
    "hook": (lambda p, *_: p.register_forward_hook(lambda m, x, y: 2 * y), CALLED),
    "pre-hook": (lambda p, *_: p.register_forward_pre_hook(lambda m, x: (2 * x[0],)), CALLED),
    "pruned": (lambda p, *_: prune.random_unstructured(p, "weight", amount=0.5), CALLED),
    "old weight norm": (old_weight_norm, CALLED),
    "old spectral norm": (lambda p, *_: nn.utils.spectral_norm(p), CALLED),
    "weight norm": (lambda p, *_: parametrizations.weight_norm(p), FUSED),
    "spectral norm": (lambda p, *_: parametrizations.spectral_norm(p), FUSED),
    "orthogonal": (lambda p, *_: parametrizations.orthogonal(p), FUSED),
    "parametrised bias": (lambda p, *_: register_parametrization(p, "bias", Square()), FUSED),
    "quantised": (quantise, CALLED),
    "fake-quantised": (fake_quantise, CALLED),
    "low rank": (low_rank, CALLED),
    "lazy": (lazy, CALLED),
    "compiled": (by(functools.partial(torch.compile, backend="eager")), CALLED),
    "compiled in place": (lambda p, *_: p.compile(backend="eager"), FUSED),
    "plain tensors": (plain_tensors, FUSED),
    "parameters of a class": (double_parameters, PLAIN),
}


def eager(adapter, x):
    """What the modules compute where each is called."""
    return x + adapter.up_proj(nn.functional.gelu(adapter.down_proj(x))) * adapter.scaling


def gradients_of(y, x, adapter):
    leaves = [x, *(p for p in adapter.parameters() if p.requires_grad)]
    found = torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)
    return [gradient for gradient in found if gradient is not None]


@pytest.mark.parametrize("name", ["down_proj", "up_proj"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("recompiled")
@pytest.mark.filterwarnings("ignore:quantized..linear_dynamic")
def test_every_kind_of_projection_gives_what_its_call_gives(spy, kind, name):
    change, way = KINDS[kind]
    adapter, x = adapter_of(scaling="channel"), torch.randn(3, H, requires_grad=True)
    change(getattr(adapter, name), adapter, name)
    # A call may change the module (spectral norm), and not every module can be copied.
    twin = copy.deepcopy(adapter) if "spectral" in kind else adapter
    reason = adapter.unfused_reason()
    y = adapter(x)
    assert len(spy.forwards) == (way == FUSED)
    assert (reason is not None) == (way == CALLED)
    expected = eager(twin, x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(
        gradients_of(y, x, adapter), gradients_of(expected, x, twin), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    if way == CALLED and kind != "lazy":
        adapter.backend = "triton"
        with pytest.raises(ak.BackendUnsupportedError, match=f"{name} (is a|has)"):
            adapter(x)


@pytest.mark.parametrize("change", [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))])
@pytest.mark.parametrize("kind", ["as it is", "low rank", "sequential"])
def test_a_copy_takes_the_way_of_what_it_copies(spy, change, kind):
    adapter, x = adapter_of(), torch.randn(3, H)
    KINDS[kind][0](adapter.up_proj, adapter, "up_proj")
    assert torch.equal(change(adapter)(x), adapter(x))
    assert len(spy.forwards) == 2 * (KINDS[kind][1] == FUSED)


def test_functional_call_computes_with_what_it_is_given(spy):
    adapter, other, x = adapter_of(), adapter_of(), torch.randn(3, H)
    found = torch.func.functional_call(adapter, dict(other.named_parameters()), (x,))
    torch.testing.assert_close(found, eager(other, x), rtol=1e-6, atol=1e-6)
    assert len(spy.forwards) == 1


def test_projections_of_another_width_are_used_where_they_meet(spy):
    adapter, x = adapter_of(), torch.randn(3, H)
    adapter.down_proj, adapter.up_proj = nn.Linear(H, R + 1), nn.Linear(R + 1, H)
    torch.testing.assert_close(adapter(x), eager(adapter, x), rtol=1e-6, atol=1e-6)
    assert len(spy.forwards) == 1
    adapter.up_proj = nn.Linear(R + 1, 1)  # one that a residual would broadcast
    with pytest.raises(ValueError, match=r"up_weight must have shape \[H, R\] = \[12, 5\]"):
        adapter(x)
    adapter.up_proj = nn.Sequential(adapter.up_proj)
    with pytest.raises(
        ValueError, match=r"up_proj must give the shape of x, \[3, 12\], got \[3, 1"
    ):
        adapter(x)


@pytest.mark.parametrize("way", ["disk", "memory", "dispatched"])
@pytest.mark.parametrize("scaling", [0.5, "channel"])
def test_an_adapter_whose_weights_are_kept_elsewhere_has_the_right_values(tmp_path, way, scaling):
    accelerate = pytest.importorskip("accelerate")
    adapter, x = adapter_of(scaling=scaling), torch.randn(3, H)
    model = nn.Sequential(nn.Linear(H, H), adapter)
    cpu = torch.device("cpu")
    with torch.no_grad():
        expected = model(x)
        if way == "disk":
            accelerate.disk_offload(model, str(tmp_path), execution_device=cpu)
        elif way == "memory":
            accelerate.cpu_offload(model, execution_device=cpu)
        else:
            places = {"0": "cpu", "1": "disk"}
            accelerate.dispatch_model(
                model, places, main_device=cpu, offload_dir=str(tmp_path), force_hooks=True
            )
        assert adapter.down_proj.weight.is_meta
        for _ in range(2):
            torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)
