"""The bytes that the formulae of a norm count are those that its kernels load and store."""

import pytest
import torch
from test_triton_traffic import counted_bytes, sums

from adapterkern.backends.triton import backend as triton_backend
from adapterkern.backends.triton import norm_traffic, traffic
from adapterkern.backends.triton.launch_config import Device, Problem, token_plan
from adapterkern.results import Needs, Outputs
from adapterkern.spec import make_call, with_norm

KB = 1024
# Sizes that every tile divides, so that no lane is masked; SMs and L2 for each form.
FORMS = {
    "row_block": (256, 256, 64, 1, 1 << 20),
    "rows_behind_a_row_block": (256, 256, 64, 1, 1),
    "split": (64, 1024, 64, 8, 1 << 20),
}


@pytest.mark.thorough
@pytest.mark.parametrize("prenorm", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_formulae_count_what_the_kernels_of_a_norm_move(form, prenorm, monkeypatch):
    tokens, hidden, bottleneck, num_sms, l2 = FORMS[form]
    device = Device(num_sms, 227 * KB, l2=l2)
    monkeypatch.setattr(triton_backend, "cpu_device", device)
    x, skip, d_normed, d_stream = torch.randn(4, tokens, hidden, dtype=torch.bfloat16)
    down, up = torch.randn(2, hidden * bottleneck, dtype=torch.bfloat16)
    weight, bias = torch.randn(2, hidden, dtype=torch.bfloat16)
    call = make_call(x, down.view(bottleneck, hidden), up.view(hidden, bottleneck), skip=skip)
    call = with_norm(call, weight, bias, "layer", 1e-5, 0.0, False, prenorm)
    problem = Problem(tokens, hidden, bottleneck, ieee=False, wide=False)
    plan = token_plan(problem, device)
    backend = triton_backend.TritonBackend()
    for save in (False, True):
        with counted_bytes(monkeypatch) as moved:
            outputs, saved = backend.forward(call, save)
        assert moved == sums(norm_traffic.forward(problem, plan, device, 2, save, prenorm))

    needs = Needs(x=True, down_weight=True, up_weight=True, norm_weight=True, norm_bias=True)
    upstream = Outputs(d_stream if prenorm else None, d_normed)
    with counted_bytes(monkeypatch) as moved:
        backend.backward(call, saved._replace(stream=outputs.y), upstream, needs)
    weights = triton_backend.weight_gradient_plan(problem, device)
    assert moved == sums(
        norm_traffic.input_gradient(problem, plan, device, 2, prenorm)
        + traffic.weight_gradients(problem, weights, device)
    )
