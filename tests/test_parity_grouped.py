"""adapterkern.parity of many adapters: the cases, what they miss, `adapterkern check` of them."""

import json
from dataclasses import replace

import pytest
import torch

from adapterkern import parity
from adapterkern.activations import ACTIVATIONS
from adapterkern.backends import get
from adapterkern.backends.base import FIRST_FEATURES, GROUPED_FEATURES
from adapterkern.backends.reference.backend import ReferenceBackend
from adapterkern.cli.main import main
from adapterkern.parity import GroupedCase, check_case, differing_bits, grouped_cases, refusals
from adapterkern.testing import nan_filled_memory

REFERENCE = get("reference")
ALL = FIRST_FEATURES | GROUPED_FEATURES
CASE = GroupedCase(scaling="learned", skip=True, residual="tensor")
SMALL = GroupedCase(num_tokens=9, hidden_size=12, bottleneck_size=5)
GRADIENTS = (
    "x", "down_weights", "up_weights", "down_biases", "up_biases", "residual", "skip", "scalings",
)  # fmt: skip


def spoil(monkeypatch, method, change):
    """Let a method of the reference return what `change` makes of its result and the call."""
    right = getattr(ReferenceBackend, method)

    def spoilt(self, call, *arguments):
        return change(right(self, call, *arguments), call)

    monkeypatch.setattr(ReferenceBackend, method, spoilt)


def missed(case):
    return {row.tensor for row in check_case(case, "reference") if not row.passed}


@pytest.mark.parametrize(
    "case",
    grouped_cases(REFERENCE.dtypes, REFERENCE.activations, small=True, features=ALL),
    ids=lambda c: f"reference-{c}",
)
def test_reference_of_many_adapters_matches_float64(case):
    with nan_filled_memory():
        rows = check_case(case, "reference")
    assert not [str(row) for row in rows if not row.passed]


def test_a_case_of_many_adapters_compares_y_and_every_gradient():
    rows = check_case(CASE, "reference")
    gradients = ["dx", *(f"d_{name}" for name in GRADIENTS[1:])]
    assert [row.tensor for row in rows] == ["y", "y (no grad)", *gradients]
    asked = replace(CASE, needs=("up_weights", "x"))
    assert [r.tensor for r in check_case(asked, "reference")][2:] == ["dx", "d_up_weights"]
    frozen = replace(CASE, scaling="fixed")
    assert "d_scalings" not in [row.tensor for row in check_case(frozen, "reference")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [n for n in GRADIENTS if n not in ("residual", "skip")])
def test_a_gradient_of_many_adapters_that_is_off_by_five_percent_is_missed(
    monkeypatch, name, dtype
):
    def change(gradients, call):
        return gradients._replace(**{name: getattr(gradients, name) * 1.05})

    spoil(monkeypatch, "grouped_backward", change)
    case = replace(SMALL, scaling="learned", dtype=dtype)
    assert missed(case) == {"dx" if name == "x" else f"d_{name}"}


def test_a_gradient_in_a_unit_beyond_the_rank_is_missed(monkeypatch):
    def change(gradients, call):
        gradients.down_weights[1, -1] = 1e-4
        return gradients

    spoil(monkeypatch, "grouped_backward", change)
    assert missed(SMALL) == {"d_down_weights"}


def test_a_row_with_the_adapter_of_another_slot_is_missed(monkeypatch):
    def change(result, call):
        y, z = result
        y[3] = call.x[3]
        return y, z

    assert SMALL.ids()[3] >= 0
    spoil(monkeypatch, "grouped_forward", change)
    assert missed(SMALL) == {"y", "y (no grad)"}


def test_a_read_beyond_the_rank_is_missed(monkeypatch):
    """Such units hold NaN."""
    right = ReferenceBackend.grouped_forward

    def change(self, call, save):
        return right(self, call._replace(ranks=None), save)

    monkeypatch.setattr(ReferenceBackend, "grouped_forward", change)
    assert missed(replace(SMALL, needs=())) == {"y", "y (no grad)"}


def test_differing_bits_of_many_adapters_names_the_tensors_that_vary(monkeypatch):
    assert differing_bits(CASE, "reference") == []
    runs = iter(range(10))

    def change(gradients, call):
        return gradients._replace(up_biases=gradients.up_biases + 1e-3 * next(runs))

    spoil(monkeypatch, "grouped_backward", change)
    assert differing_bits(CASE, "reference") == ["d_up_biases"]


def test_refusals_tell_of_the_gradient_that_a_case_asks_for(monkeypatch):
    monkeypatch.setattr(ReferenceBackend, "features", ALL - {"gradient", "ranks"})
    reasons = refusals(GroupedCase(), "reference")
    assert [reason.partition(" is")[0] for reason in reasons] == [
        'feature "gradient"', 'feature "ranks"',
    ]  # fmt: skip
    assert refusals(GroupedCase(needs=(), ranks=False), "reference") == []


@pytest.mark.parametrize("small", [True, False])
def test_cases_of_many_adapters_cover_what_a_backend_declares(small):
    dtypes = {torch.float32, torch.bfloat16}
    quick, default, full = (
        grouped_cases(dtypes, ACTIVATIONS, level, small, ALL) for level in parity.LEVELS
    )
    assert not quick
    assert set(default) < set(full)
    for cases in (default, full):
        assert len({str(case) for case in cases}) == len(cases)
        assert {c.dtype for c in cases} == dtypes
        assert {c.mix for c in cases} == {"mixed", "one", "distinct", "none"}
        assert {c.scaling for c in cases} == {"none", "fixed", "learned"}
        assert {0, 1} < {c.num_tokens for c in cases}
        assert {c.ranks for c in cases} == {c.bias for c in cases} == {True, False}
    assert {c.activation for c in full} == set(ACTIVATIONS)
    for dtype in dtypes:
        trained = [c for c in default if c.dtype == dtype and c.needs is None and c.ranks]
        assert min(c.num_tokens for c in trained) < 20
        # As many units as no kernel takes by row.
        assert max(c.num_tokens * c.bottleneck_size for c in trained) > 4096


def test_cases_ask_a_backend_only_for_what_it_declares():
    less = {"ranks", "gradient", "learned_scaling"}
    cases = grouped_cases([torch.float16], ["relu"], small=True, features=ALL - less)
    assert {(c.ranks, c.needs) for c in cases} == {(False, ())}
    cases = grouped_cases([torch.float16], ["relu"], features=ALL - {"learned_scaling"})
    assert {c.scaling for c in cases} == {"none", "fixed"}
    assert grouped_cases([], ["relu"]) == grouped_cases([torch.float16], []) == []


def test_the_id_of_a_case_of_many_adapters_reads_as_its_options():
    assert str(GroupedCase(torch.bfloat16)) == "grouped-bf16-gelu-T37-H70-R20-S3"
    loaded = replace(CASE, mix="one", ranks=False, bias=False, needs=(), tf32=True)
    assert str(loaded) == (
        "grouped-tf32-gelu-T37-H70-R20-S3-one-full_ranks-bias_none-residual_tensor-skip"
        "-scaling_learned-needs_nothing"
    )


def test_check_shows_many_adapters_in_its_table_and_its_events(capsys):
    command = ["check", "--backend", "reference", "--case", "grouped-*"]
    assert main(command) == 0
    table = capsys.readouterr().out
    assert "  fp32   d_down_weights " in table
    assert " d_scalings " in table
    assert main([*command, "--json"]) == 0
    every = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    rows = [row for event in every if event["event"] == "case" for row in event["rows"]]
    assert {row["tensor"] for row in rows} >= {"y", "dx", "d_down_weights", "d_scalings"}
    assert every[-1]["passed"]
    assert every[-1]["comparisons"] == len(rows) > 20


def test_check_fails_where_many_adapters_are_wrong(monkeypatch, capsys):
    def change(result, call):
        y, z = result
        return y * (1 + 1e-5), z

    spoil(monkeypatch, "grouped_forward", change)
    assert main(["check", "--backend", "reference", "--case", "grouped-fp32-gelu-T9-*"]) == 1
    assert "MISSED grouped-fp32-gelu-T9-H70-R20-S8" in capsys.readouterr().out
