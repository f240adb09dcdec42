"""What a call costs on the host before any kernel runs."""

import time

import torch
from torch.nn import functional as F

import adapterkern as ak
from adapterkern import dispatch

CALLS, ROUNDS = 300, 15
MOST = 1.8  # times the four eager operations


def fastest(function) -> float:
    """Seconds a call, the least of several rounds: what the machine takes when it is let."""
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            function()
        rounds.append((time.perf_counter() - start) / CALLS)
    return min(rounds)


def test_a_call_without_grad_costs_little_more_than_four_eager_operations(spy, monkeypatch):
    """The launch stubbed: the backend only allocates what a kernel would fill."""
    y, no_z = torch.empty(4, 64), torch.empty(0)
    monkeypatch.setattr(spy, "forward", lambda call, save_z: (torch.empty_like(y), no_z.clone()))
    x, down, up = torch.randn(4, 64), torch.randn(8, 64), torch.randn(64, 8)
    down_bias, up_bias = torch.randn(8), torch.randn(64)

    def fused():
        return ak.bottleneck_adapter(x, down, up, down_bias, up_bias)

    def eager():
        return x + F.linear(F.gelu(F.linear(x, down, down_bias)), up, up_bias)

    with torch.no_grad():
        fused()
        assert [decision.backend for decision in dispatch._decisions.values()] == ["triton"]
        assert fastest(fused) < MOST * fastest(eager)
