"""adapterkern.explain: of one call, and of every adapter of a model."""

import threading

import pytest
import torch
from torch import nn

import adapterkern as ak
from adapterkern import dispatch
from adapterkern.backends import get
from adapterkern.grouped import functional, ops
from adapterkern.grouped.call import make_grouped_call
from adapterkern.modules.explain import table


def test_explain_names_the_choice_and_every_reason(clean_dispatch):
    adapter = ak.BottleneckAdapter(10, 4)
    explanation = ak.explain(adapter, torch.zeros(3, 10))
    spec = adapter.as_call(torch.zeros(3, 10)).spec()
    assert explanation.call == "H=10 R=4 gelu float32 on cpu, features: bias, input_residual"
    assert explanation.backend == "reference"
    for name in ("cuda", "triton"):
        assert explanation.reasons[name] == tuple(get(name).unsupported_reasons(spec))
        assert f"\n  {name}: {explanation.reasons[name][0]}" in str(explanation)
    assert "\n  runs on: reference\n" in str(explanation)


def test_explain_tells_what_was_passed_over(spy):
    adapter = ak.BottleneckAdapter(10, 4)
    assert ak.explain(adapter, torch.zeros(10)).backend == "triton"
    assert ak.explain(adapter, torch.zeros(10)).reasons["reference"] == ("triton comes first",)
    with ak.use_backend("reference"):
        explanation = ak.explain(adapter, torch.zeros(10))
    assert explanation.backend == "reference (named)"
    assert explanation.reasons["triton"] == ("reference was named",)
    adapter.backend = "cuda"
    assert ak.explain(adapter, torch.zeros(10)).backend == "none: cuda was named and raises"
    assert not spy.forwards


def test_explain_sees_autocast_options_and_training(clean_dispatch):
    adapter = ak.BottleneckAdapter(10, 4, dropout=0.5)
    x = torch.zeros(3, 10)
    with torch.autocast("cpu", torch.bfloat16):
        explanation = ak.explain(adapter, x, residual=None, skip=x)
    assert explanation.call == (
        "H=10 R=4 gelu bfloat16 on cpu, features: bias, dropout, mixed_dtypes, skip"
    )
    assert "dropout" not in ak.explain(adapter.eval(), x).call


def test_explain_of_a_call_is_that_of_its_adapter(spy):
    x = torch.zeros(3, 10)
    adapter = ak.BottleneckAdapter(10, 4)
    assert ak.explain(adapter.as_call(x)) == ak.explain(adapter, x)


class Block(nn.Module):
    """Two adapters, one of them called twice with different options, and one never."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(10, 10)
        self.dropout = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(10)
        self.first = ak.BottleneckAdapter(10, 4)
        self.second = ak.BottleneckAdapter(10, 2, activation="relu")
        self.unused = ak.BottleneckAdapter(10, 3)

    def forward(self, hidden, *, skip=None):
        hidden = self.norm(self.dropout(self.linear(hidden)))
        return self.second(self.first(self.first(hidden), skip=skip))


def test_explain_of_a_model_has_a_row_for_every_adapter(spy):
    x = torch.randn(3, 10)
    model = nn.Sequential(Block(), Block())
    model[1].second.backend = "reference"
    found = [(r.adapter, r.calls, r.bottleneck_size, r.backend) for r in ak.explain(model, x).rows]
    assert found == [
        ("0.first", 2, 4, "triton"), ("0.second", 1, 2, "triton"), ("0.unused", 0, 3, "not called"),
        ("1.first", 2, 4, "triton"), ("1.second", 1, 2, "reference (named)"),
        ("1.unused", 0, 3, "not called"),
    ]  # fmt: skip
    assert len(spy.forwards) == 5  # the model ran once, and one call named the reference


def test_explain_passes_keywords_and_tells_kinds_of_calls_apart(clean_dispatch):
    x = torch.randn(3, 10)
    rows = ak.explain(Block(), hidden=x, skip=x).rows
    assert [(row.adapter, row.calls) for row in rows] == [
        ("first", 1), ("first", 1), ("second", 1), ("unused", 0),
    ]  # fmt: skip
    assert ["skip" in row.explanation.call for row in rows[:2]] == [False, True]
    assert {row.backend for row in rows[:3]} == {"reference"}


def test_explain_of_a_model_is_a_table_with_the_reasons_below(clean_dispatch):
    text = str(ak.explain(nn.Sequential(Block(), Block(), Block()), torch.randn(3, 10)))
    lines = [line.split() for line in text.splitlines()]
    assert lines[0] == ["adapter", "calls", "H", "R", "activation", "dtype", "runs", "on"]
    assert lines[1] == ["{0-2}.first", "2", "10", "4", "gelu", "float32", "reference"]
    assert lines[2] == ["{0-2}.second", "1", "10", "2", "relu", "float32", "reference"]
    assert lines[3] == ["{0-2}.unused", "0", "10", "3", "gelu", "float32", "not", "called"]
    reason = get("triton").unsupported_reasons(Block().first.as_call(torch.zeros(1, 10)).spec())[0]
    assert text.count(f"\n  triton: {reason}") == 1


def test_explain_counts_the_calls_of_projections_that_are_modules():
    model = Block()
    model.first.down_proj.register_forward_hook(lambda *_: None)
    row = next(row for row in ak.explain(model, torch.randn(3, 10)).rows if row.adapter == "first")
    assert (row.calls, row.backend) == (2, "PyTorch modules")
    assert "\n  PyTorch modules: down_proj has hooks" in str(ak.explain(model, torch.randn(3, 10)))
    assert not model.first._forward_pre_hooks  # the one that counted is gone


def test_explain_leaves_the_model_as_it_was():
    model, x = Block(), torch.randn(3, 10)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    select, seed = dispatch.select, torch.get_rng_state()
    ak.explain(model, x)
    assert torch.equal(torch.get_rng_state(), seed)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert dispatch.select is select
    assert not any(parameter.grad is not None for parameter in model.parameters())
    with pytest.raises(RuntimeError):
        ak.explain(model, torch.randn(3, 11))
    assert dispatch.select is select


def test_explain_takes_a_callable_and_names_what_calls_no_adapter(spy):
    adapter, x = ak.BottleneckAdapter(10, 4), torch.zeros(3, 10)
    (row,) = ak.explain(lambda x: adapter(x), x).rows
    assert (row.adapter, row.explanation) == ("", ak.explain(adapter, x))
    with pytest.raises(LookupError, match="called no adapter"):
        ak.explain(nn.Identity(), x)


def test_explain_does_not_count_the_calls_of_other_threads():
    inside, done = threading.Event(), threading.Event()
    other, x = ak.BottleneckAdapter(10, 7), torch.randn(3, 10)

    def call_elsewhere():
        inside.wait(10)
        other(x)
        done.set()

    class Waiting(Block):
        def forward(self, hidden):
            inside.set()
            assert done.wait(10)
            return super().forward(hidden)

    thread = threading.Thread(target=call_elsewhere)
    thread.start()
    rows = ak.explain(Waiting(), x).rows
    thread.join()
    assert {row.bottleneck_size for row in rows} == {4, 2, 3}


def test_explain_sees_into_a_compiled_model():
    model, x = Block(), torch.randn(3, 10)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    rows = ak.explain(compiled, x).rows
    assert [(row.adapter.rpartition(".")[2], row.calls) for row in rows] == [
        ("first", 2), ("second", 1), ("unused", 0),
    ]  # fmt: skip


def test_tables_show_ranges_of_layers():
    rows = [(f"h.{i}.attn.{j}", "a") for i in (0, 1, 2, 5) for j in (3,)] + [("h.7.attn.3", "b")]
    assert table(("name", "x"), rows) == [
        "name              x", "h.{0-2,5}.attn.3  a", "h.7.attn.3        b",
    ]  # fmt: skip


def test_explain_refuses_what_the_call_would_refuse():
    with pytest.raises(ValueError, match=r"down_weight must have shape \[R, H\] = \[R, 11\]"):
        ak.explain(ak.BottleneckAdapter(10, 4), torch.zeros(3, 11))


class Served(nn.Module):
    """Two banks, of which one is called, and one of its adapters once more on its own."""

    def __init__(self):
        super().__init__()
        self.bank, self.idle = ak.AdapterBank(10, 8, 2), ak.AdapterBank(10, 4, 2)
        for bank in (self.bank, self.idle):
            for name in ("fr", "de"):
                bank.add(name, ak.BottleneckAdapter(10, 3))

    def forward(self, x, routing):
        return self.bank["de"](self.bank(self.bank(x, routing), routing))


def test_explain_shows_a_bank_as_one_row(clean_dispatch):
    routing = ak.AdapterRouting(3, 2).update([0, -1, 1])
    model = Served()
    table = ak.explain(model, torch.randn(3, 10), routing)
    found = [(r.adapter, r.calls, r.bottleneck_size, r.dtype, r.backend) for r in table.rows]
    assert found == [
        ("bank", 2, 8, "float32", "reference"),
        ("bank.adapters.de", 1, 3, "float32", "reference"),
        ("idle", 0, 4, "float32", "not called"),
    ]
    with torch.no_grad():
        assert ak.explain(model.bank, torch.randn(3, 10), routing) == table.rows[0].explanation


def test_explain_names_calls_of_copied_weights_by_what_they_are_copies_of(clean_dispatch):
    """And nothing of it stays for a call of weights that no module holds."""
    adapter = ak.BottleneckAdapter(10, 4)
    holder = nn.ModuleDict({"of": nn.ModuleList([adapter, ak.BottleneckAdapter(10, 4)])})
    routing = ak.AdapterRouting(3, 1).update([0, -1, 0])
    x = torch.randn(3, 10)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.holder = holder

        def forward(self, x):
            down, up = adapter.down_proj.weight, adapter.up_proj.weight
            call = make_grouped_call(
                x, down[None].clone(), up[None].clone(), None, None, "input", None, None, None,
                routing.buffers(), "gelu", False,
            )  # fmt: skip
            x = functional.run_call(call, "auto", ops.Leaves((0, 1), (0, 0), (down, up)))
            return ak.bottleneck_adapter(x, down.clone(), up.clone())

    found = [(row.adapter, row.calls) for row in ak.explain(Model(), x).rows]
    assert found == [("", 1), ("holder.of.0", 1), ("holder.of.1", 0)]
    assert functional.run_call.__module__ == functional.__name__
