"""Counts what a call of a bank asks of the host before its backend: the same in every run."""

import pytest
import torch
from banks import bank_of, routed
from host_work import work_of

from adapterkern.backends import get
from adapterkern.grouped import functional


@pytest.fixture
def served(monkeypatch):
    """A bank of 16, a batch that names all, and a backend that has its results ready."""
    bank, x = bank_of({f"n{i}": 8 for i in range(16)}, slots=16), torch.randn(16, 16)
    y, z = torch.empty(16, 16), torch.empty(16, 8)
    backend = type(get("reference"))
    monkeypatch.setattr(
        backend, "grouped_forward", lambda self, call, save: (y, z if save else None)
    )
    return bank, x, routed(bank, bank.names)


# Idle, 16 adapters take about 15 us more than the op: 32 projections, 64 parameters, 16 options.
@pytest.mark.parametrize(("records", "frames", "own_calls"), [(False, 34, 62), (True, 40, 67)])
def test_a_bank_adds_few_frames_to_its_op(served, records, frames, own_calls):
    """A module that is searched for an adapter is a frame more for each, a check of one a call."""
    bank, x, routing = served
    with torch.set_grad_enabled(records):
        call, leaves = bank._prepared(x, routing, None, None)
        op = work_of(lambda: functional.run_call(call, "auto", leaves))
        whole = work_of(lambda: bank(x, routing))
    assert whole.modules == 1
    assert whole.frames - op.frames <= frames
    assert whole.own_calls.total() - op.own_calls.total() <= own_calls, whole.own_calls


@torch.no_grad()
def test_frames_of_a_bank_do_not_grow_with_its_adapters(served):
    bank, x, routing = served
    few = bank_of({"a": 8, "b": 8}, slots=16)
    of_few = routed(few, ["a", "b"] * 8)
    works = [work_of(lambda: few(x, of_few)), work_of(lambda: bank(x, routing))]
    assert works[0].frames == works[1].frames
