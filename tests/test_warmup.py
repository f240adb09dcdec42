"""`ak.warmup`: later first calls find everything compiled, and nothing else has changed."""

import itertools

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="triton is not installed")

from fake_gpu import H200, FakeGpu, fake_gpu

import adapterkern as ak
from adapterkern.backends.triton.launch_config import Device

_numbers = itertools.count(200)


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """A GPU for which nothing was compiled yet, in this process or on disk."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with fake_gpu(FakeGpu(device=Device(next(_numbers), H200.shared_memory))) as gpu:
        yield gpu


class Model(nn.Module):
    """Two adapters around what draws random numbers and counts its calls."""

    def __init__(self, hidden=64, **options):
        super().__init__()
        self.first = ak.BottleneckAdapter(hidden, 16, **options)
        self.second = ak.BottleneckAdapter(hidden, 16, activation="relu", **options)
        self.norm = nn.BatchNorm1d(hidden)
        self.drop = nn.Dropout(0.5)

    def forward(self, inputs, scale=1.0):
        hidden = self.first(inputs["x"]) * scale
        return {"out": (self.second(self.norm(self.drop(hidden))),)}


def first_calls(module, *args, **kwargs):
    """Run forward without gradients, forward and backward with them; return each's binaries."""
    with torch.no_grad():
        module(*args, **kwargs)
    module(*args, **kwargs).sum().backward()


def test_after_warmup_the_first_calls_compile_nothing(gpu):
    adapter = ak.BottleneckAdapter(1024, 16, scaling="channel", dtype=torch.bfloat16)
    x, skip = (
        torch.randn(2, 3, 1024).bfloat16().requires_grad_(),
        torch.randn(2, 3, 1024).bfloat16(),
    )
    ak.warmup(adapter, x, skip=skip, residual=None)
    launched, compiled = len(gpu.launches), gpu.binaries
    assert compiled == 7  # down, up with and without z, dz, dx, dw and its sum
    first_calls(adapter, x, skip=skip, residual=None)
    assert gpu.binaries == compiled
    assert len(gpu.launches) > launched


@pytest.mark.thorough
def test_without_warmup_the_first_calls_compile(gpu):
    adapter = ak.BottleneckAdapter(64, 16, dtype=torch.bfloat16)
    first_calls(adapter, torch.randn(6, 64).bfloat16().requires_grad_())
    assert gpu.binaries == 6  # down with and without z, up, dz, dx, dw


@pytest.mark.thorough
@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(6, 128)[:, :64],
        torch.zeros(6, 65)[:, 1:],
        torch.zeros(64).expand(6, 64),
        torch.zeros(6 * 64 + 1)[1:].view(6, 64),
        torch.zeros(64, 6).T,
    ],
    ids=["strided", "strided-odd", "stride-0", "unaligned", "transposed"],
)
def test_warmup_sees_the_strides_and_the_alignment_of_its_inputs(gpu, x):
    adapter = ak.BottleneckAdapter(64, 16)
    ak.warmup(adapter, x)
    compiled = gpu.binaries
    first_calls(adapter, x)
    assert gpu.binaries == compiled > 0


def test_warmup_compiles_the_backward_of_what_requires_a_gradient(gpu):
    adapter = ak.BottleneckAdapter(64, 16).requires_grad_(False)
    ak.warmup(adapter, torch.zeros(6, 64))
    assert not [launch.kernel for launch in gpu.launches if "bwd" in launch.kernel]
    ak.warmup(adapter, torch.zeros(6, 64, requires_grad=True))
    backward = {launch.kernel for launch in gpu.launches if "bwd" in launch.kernel}
    assert backward == {"bottleneck_bwd_split_dz_kernel", "bottleneck_bwd_split_dx_kernel"}


@pytest.mark.thorough
def test_one_tensor_in_two_places_stays_one(gpu):
    adapter = ak.BottleneckAdapter(64, 16)
    x = torch.zeros(6, 64)
    ak.warmup(adapter, x, residual=x)
    up = next(launch for launch in gpu.launches if launch.kernel == "bottleneck_fwd_up_kernel")
    assert up.arguments["residual_ptr"] is None  # x is added as the input


def test_warmup_of_a_model_changes_nothing_in_it():
    model = Model()
    model.first.up_proj.weight.grad = torch.ones(64, 16)
    model.first.down_proj.weight.requires_grad_(False)
    model.second.eval()
    x = torch.randn(6, 64, requires_grad=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state, values, version = torch.get_rng_state(), x.detach().clone(), x._version
    ak.warmup(model, {"x": x}, scale=2.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, values)
    assert (x._version, x.grad) == (version, None)
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(model.first.up_proj.weight.grad, torch.ones(64, 16))
    assert all(p.grad is None for p in model.second.parameters())
    assert (model.training, model.first.training, model.second.training) == (True, True, False)


class Writer(nn.Module):
    def forward(self, x):
        return x.mul_(2)


def test_what_a_model_writes_into_its_input_is_written_into_a_copy():
    x = torch.ones(2, 3)
    ak.warmup(Writer(), x)
    assert torch.equal(x, torch.ones(2, 3))


@pytest.mark.sweep
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_warmup_records_whatever_mode_it_is_called_in(gpu, mode):
    adapter = ak.BottleneckAdapter(64, 16)
    with mode():
        ak.warmup(adapter, torch.zeros(6, 64))
    assert "bottleneck_bwd_dw_kernel" in {launch.kernel for launch in gpu.launches}


@pytest.mark.thorough
def test_under_autocast_the_later_step_has_its_gradients(gpu):
    layer = nn.Sequential(nn.Linear(64, 64), ak.BottleneckAdapter(64, 16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ak.warmup(layer, torch.randn(6, 64))
        compiled = gpu.binaries
        layer(torch.randn(6, 64)).sum().backward()
    assert gpu.binaries == compiled > 0
    assert layer[0].weight.grad is not None


def test_a_module_without_parameters_and_adapters_is_only_called():
    ak.warmup(nn.Identity(), torch.zeros(2, 3))
    ak.warmup(nn.Identity(), torch.zeros(2, 3, requires_grad=True))


def test_warmup_within_a_capture_says_where_it_belongs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"being captured.*\n.*before `with torch.cuda.graph"):
        ak.warmup(ak.BottleneckAdapter(64, 16), torch.zeros(6, 64))


def test_warmup_of_no_module_is_refused():
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, got Tensor.*\n.*first"):
        ak.warmup(torch.zeros(6, 64), ak.BottleneckAdapter(64, 16))
