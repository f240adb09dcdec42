"""The bytes that the traffic formulae count are those that the kernels load and store."""

from contextlib import contextmanager

import pytest
import torch
from triton.runtime import interpreter

from adapterkern.backends.triton import backend as triton_backend
from adapterkern.backends.triton import traffic
from adapterkern.backends.triton.launch_config import Device, LaunchConfig, Problem, Split
from adapterkern.results import Needs, Outputs
from adapterkern.spec import make_call

# Sizes that every tile divides, so that no lane is masked; SMs for each form.
FORMS = {
    "row_block": (256, 256, 64, 1),
    "split": (64, 1024, 64, 8),
    "wide": (128, 256, 256, 1),
    "wide_split": (64, 512, 256, 32),
}


@contextmanager
def counted_bytes(monkeypatch):
    """Yields {"loads": bytes, "stores": bytes} of the kernels that run within the block."""
    counts = {"loads": 0, "stores": 0}
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def counted(kind, pointers, mask):
        element = pointers.get_element_ty().primitive_bitwidth // 8
        counts[kind] += int(mask.data.sum()) * element

    def counting_load(self, ptrs, mask, *rest):
        counted("loads", ptrs, mask)
        return load(self, ptrs, mask, *rest)

    def counting_store(self, ptrs, value, mask, *rest):
        counted("stores", ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(builder, "create_masked_load", counting_load)
        patch.setattr(builder, "create_masked_store", counting_store)
        yield counts


@pytest.mark.parametrize("form", FORMS)
def test_formulae_count_what_the_kernels_move(form, monkeypatch):
    tokens, hidden, bottleneck, num_sms = FORMS[form]
    device = Device(num_sms=num_sms, shared_memory=227 * 1024)
    monkeypatch.setattr(triton_backend, "cpu_device", device)
    x, dy = torch.randn(2, tokens, hidden, dtype=torch.bfloat16)
    down = torch.randn(bottleneck, hidden, dtype=torch.bfloat16)
    up = torch.randn(hidden, bottleneck, dtype=torch.bfloat16)
    call = make_call(x, down, up)
    problem = Problem(tokens, hidden, bottleneck, ieee=False, wide=False)
    plan = triton_backend.token_plan(problem, device)
    weights = triton_backend.weight_gradient_plan(problem, device)
    backend = triton_backend.TritonBackend()

    with counted_bytes(monkeypatch) as moved:
        _, saved = backend.forward(call, save=True)
    assert moved == sums(traffic.forward(problem, plan, device))

    needs = Needs(x=True, down_weight=True, up_weight=True)
    with counted_bytes(monkeypatch) as moved:
        backend.backward(call, saved, Outputs(dy), needs)
    assert moved == sums(
        traffic.input_gradient(problem, plan, device)
        + traffic.weight_gradients(problem, weights, device)
    )


def test_partial_sums_are_added_up_once_where_only_dz_is_asked_for(monkeypatch):
    """R is wider than a tile, and dz would else be stored with each tile of the features."""
    tokens, hidden, bottleneck = 16, 1024, 256
    device = Device(num_sms=64, shared_memory=227 * 1024)
    monkeypatch.setattr(triton_backend, "cpu_device", device)
    # No formula plans this, but a tuned entry may.
    narrow, widen = LaunchConfig(16, 64, 128, 4, 4), LaunchConfig(16, 64, 64, 4, 3)
    plan = Split(narrow, widen, 4, hidden // 4, 64)
    monkeypatch.setattr(triton_backend, "token_plan", lambda *_: plan)
    x, dy = torch.randn(2, tokens, hidden, dtype=torch.bfloat16)
    down, up = torch.randn(2, hidden * bottleneck, dtype=torch.bfloat16)
    bias = torch.randn(bottleneck, dtype=torch.bfloat16)
    call = make_call(x, down.view(bottleneck, hidden), up.view(hidden, bottleneck), bias)
    backend = triton_backend.TritonBackend()
    _, saved = backend.forward(call, save=True)
    with counted_bytes(monkeypatch) as moved:
        backend.backward(call, saved, Outputs(dy), Needs(down_bias=True))
    partial, dz = 4 * plan.num_splits * tokens * bottleneck, 2 * tokens * bottleneck
    assert moved["stores"] == partial + dz + bias.nbytes


def sums(kernels):
    return {
        field: sum(getattr(kernel, field) for kernel in kernels) for field in ("loads", "stores")
    }
