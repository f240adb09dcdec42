"""Counts what one call asks of the host beside its kernel; benchmarks/test_host_overhead.py times
it."""

import pytest
import torch
from host_work import Operations, free_kernel, work_of
from torch.nn import functional as F

import adapterkern as ak


@pytest.fixture
def parts():
    adapter = ak.BottleneckAdapter(16, 4)
    down, up = adapter.down_proj, adapter.up_proj
    return adapter, torch.randn(2, 16), (down.weight, up.weight, down.bias, up.bias)


# An autograd.Function that keeps five tensors for the backward takes six calls.
@pytest.mark.parametrize(("records", "most"), [(False, 37), (True, 43)])
def test_one_call_makes_few_calls_of_its_own(parts, records, most):
    """A check, a conversion or a copy more is a call more."""
    _, x, weights = parts
    with torch.set_grad_enabled(records), free_kernel(torch.empty(2, 16), torch.empty(2, 4)):
        assert ak.bottleneck_adapter(x, *weights).requires_grad == records
        work = work_of(lambda: ak.bottleneck_adapter(x, *weights))
    assert work.modules == 0
    assert work.own_calls.total() <= most, work.own_calls


def test_a_module_s_call_is_one_module_and_the_reading_of_its_parameters(parts):
    adapter, x, weights = parts
    with torch.no_grad(), free_kernel(torch.empty(2, 16), torch.empty(2, 4)):
        function = work_of(lambda: ak.bottleneck_adapter(x, *weights))
        module = work_of(lambda: adapter(x))
    assert module.modules == 1
    assert module.own_calls.total() - function.own_calls.total() <= 10, module.own_calls


@torch.no_grad()
def test_one_call_is_one_operation(parts):
    _, x, weights = parts
    down, up, down_bias, up_bias = weights
    with Operations() as fused:
        ak.bottleneck_adapter(x, *weights)
    with Operations() as eager:
        x + F.linear(F.gelu(F.linear(x, down, down_bias)), up, up_bias)
    assert len(eager.names) >= 4
    assert fused.names[0] == "adapterkern.forward"
    assert len(fused.names) == 1
