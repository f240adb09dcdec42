"""adapterkern.parity: the rule itself, and the reference under it."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from adapterkern import parity
from adapterkern.activations import ACTIVATIONS
from adapterkern.backends import get
from adapterkern.backends.reference.backend import ReferenceBackend
from adapterkern.parity import Case, Row, check_case, differing_bits, grid, metric, place, refusals
from adapterkern.results import Outputs
from adapterkern.testing import nan_filled_memory

HALVES = (torch.float16, torch.bfloat16)
REFERENCE = get("reference")


def spoil_forward(monkeypatch, change):
    forward = ReferenceBackend.forward

    def spoilt(self, call, save):
        outputs, saved = forward(self, call, save)
        return Outputs(change(outputs.y)), saved

    monkeypatch.setattr(ReferenceBackend, "forward", spoilt)


def spoil_gradient(monkeypatch, name, change):
    backward = ReferenceBackend.backward

    def spoilt(self, *arguments):
        gradients = backward(self, *arguments)
        return gradients._replace(**{name: change(getattr(gradients, name))})

    monkeypatch.setattr(ReferenceBackend, "backward", spoilt)


def missed(case) -> set[str]:
    return {row.tensor for row in check_case(case, "reference") if not row.passed}


@pytest.mark.parametrize(
    "case",
    grid(REFERENCE.dtypes, REFERENCE.activations, small=True, features=REFERENCE.features),
    ids=lambda c: f"reference-{c}",
)
def test_reference_matches_float64(case):
    with nan_filled_memory():
        rows = check_case(case, "reference")
    assert not [str(row) for row in rows if not row.passed]


def test_check_case_compares_y_and_every_gradient():
    rows = check_case(Case(residual="tensor", skip=True, scaling="channel"), "reference")
    assert [row.tensor for row in rows] == [
        "y", "y (no grad)", "dx", "d_down_weight", "d_up_weight", "d_down_bias", "d_up_bias",
        "d_residual", "d_skip", "d_scaling",
    ]  # fmt: skip


def test_check_case_compares_only_the_gradients_a_case_needs():
    rows = check_case(Case(needs=("up_weight", "down_bias")), "reference")
    assert [row.tensor for row in rows] == ["y", "y (no grad)", "d_up_weight", "d_down_bias"]


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(
    ("field", "tensor"),
    [("x", "dx")] + [(n, f"d_{n}") for n in ("down_weight", "up_weight", "down_bias", "up_bias")],
)
def test_check_case_misses_a_gradient_that_is_off_by_five_percent(
    monkeypatch, dtype, field, tensor
):
    spoil_gradient(monkeypatch, field, lambda gradient: gradient * 1.05)
    assert missed(Case(dtype=dtype)) == {tensor}


def test_check_case_misses_a_relative_error_of_1e_6_in_float32(monkeypatch):
    spoil_forward(monkeypatch, lambda y: y * (1 + 1e-6))
    assert missed(Case()) == {"y", "y (no grad)"}


def test_check_case_passes_an_error_of_half_a_rounding(monkeypatch):
    """An error of 3e-8 in float32 is within what two right implementations differ by."""
    spoil_forward(monkeypatch, lambda y: (y.double() * (1 + 3e-8)).float())
    assert missed(Case()) == set()


def test_check_case_misses_one_nan(monkeypatch):
    def change(y):
        y = y.clone()
        y[-1, -1] = torch.nan
        return y

    spoil_forward(monkeypatch, change)
    assert missed(Case()) == {"y", "y (no grad)"}


def test_check_case_misses_unwritten_output(monkeypatch):
    def change(y):
        out = torch.empty_like(y)
        out[:-1] = y[:-1]
        return out

    spoil_forward(monkeypatch, change)
    with nan_filled_memory():
        assert missed(Case()) == {"y", "y (no grad)"}


def test_check_case_misses_another_dtype_and_names_both(monkeypatch):
    spoil_forward(monkeypatch, torch.Tensor.float)
    rows = check_case(Case(dtype=torch.float16), "reference")
    assert rows[0].note == "float32 [37, 70], expected float16 [37, 70]"
    assert not rows[0].passed


def test_check_case_of_no_tokens_wants_exact_zeros(monkeypatch):
    case = Case(shape=(0,))
    assert missed(case) == set()
    spoil_gradient(monkeypatch, "up_bias", lambda gradient: gradient + 1e-30)
    assert missed(case) == {"d_up_bias"}


def test_check_case_judges_a_single_number_over_several_draws(monkeypatch):
    """One learned scaling's gradient takes 16 draws; an error of 1 % of its size is a miss."""
    case = Case(shape=(3,), scaling="learned")
    assert case.draws == 16
    assert Case().draws == 1
    assert missed(case) == set()
    spoil_gradient(monkeypatch, "scaling", lambda gradient: gradient * 1.01)
    assert missed(case) == {"d_scaling"}


@pytest.mark.parametrize(
    ("error", "tolerance", "passed"),
    [
        (1.0, 2.0, True),
        (2.0, 2.0, True),
        (2.1, 2.0, False),
        (0.0, 0.0, True),
        (math.nan, 2.0, False),
        (math.inf, math.inf, False),
        (1.0, math.nan, False),
    ],
)
def test_row_passes_within_its_tolerance_and_never_unless_finite(error, tolerance, passed):
    assert Row("reference", Case(), "y", error, tolerance).passed is passed


def test_metric_is_the_relative_root_mean_square():
    oracle = torch.tensor([3.0, 4.0])
    assert metric(oracle + torch.tensor([0.3, -0.4]), oracle) == pytest.approx(0.1)
    assert metric(torch.full((4,), 2e-3), torch.zeros(4)) == pytest.approx(2e-3)
    assert metric(torch.empty(0), torch.empty(0)) == 0
    assert math.isnan(metric(torch.tensor([1.0, torch.nan]), torch.ones(2)))


@pytest.mark.parametrize("half", HALVES)
def test_oracle_rounds_what_enters_the_products_and_nothing_else(half):
    """Under autocast the residual is added as it is, as the same sum in numpy's float64 shows."""
    case = Case(autocast=half, activation="relu", scaling="channel")
    tensors = case.draw("cpu", seed=1)
    call = case.make_call(tensors)
    assert call.compute_dtype == half
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    dy = torch.ones(37, 70, dtype=torch.float64)
    oracle = parity._run_plain(case, wide, Outputs(dy), operands_in=half)

    def rounded(name):
        return tensors[name].to(half).double().numpy()

    z = rounded("x") @ rounded("down_weight").T + rounded("down_bias")
    u = np.maximum(z, 0) @ rounded("up_weight").T + rounded("up_bias")
    y = wide["x"].numpy() + wide["scaling"].numpy() * u
    np.testing.assert_allclose(oracle["y"].detach().numpy(), y, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(oracle["d_scaling"].numpy(), u.sum(0), rtol=1e-12, atol=1e-12)
    dz = (dy.numpy() * wide["scaling"].numpy()) @ rounded("up_weight") * (z > 0)
    dx = dz @ rounded("down_weight") + 1
    np.testing.assert_allclose(oracle["dx"].numpy(), dx, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", ["rows", "transposed", "spread", "expanded", "unaligned"])
@pytest.mark.parametrize("half", HALVES)
def test_oracle_and_eager_draw_from_contiguous_copies(monkeypatch, half, layout):
    """torch's own half-precision product on a CPU with AMX reads the NaN between rows."""
    seen = []
    plain = parity._run_plain

    def watched(case, tensors, upstream, **options):
        seen.append([*tensors.values(), upstream.y])
        return plain(case, tensors, upstream, **options)

    monkeypatch.setattr(parity, "_run_plain", watched)
    case = Case(half, layout=layout, residual="tensor", skip=True, grad_layout=layout)
    check_case(case, "reference")
    assert len(seen) == 2
    for tensor in seen[0] + seen[1]:
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("hidden", [70, 129, 264])
def test_reference_reads_no_gap_between_rows(half, hidden):
    """Plain torch may read it (oneDNN on a CPU with AMX), and a NaN beside x would reach y."""
    case = Case(half, hidden_size=hidden, layout="rows", grad_layout="rows")
    assert missed(case) == set()


def test_differing_bits_names_the_tensors_that_vary(monkeypatch):
    assert differing_bits(Case(dtype=torch.bfloat16), "reference") == []
    runs = iter(range(10))
    spoil_gradient(monkeypatch, "up_weight", lambda gradient: gradient + 1e-3 * next(runs))
    assert differing_bits(Case(), "reference") == ["d_up_weight"]


def test_differing_bits_compares_as_many_runs_as_asked_for(monkeypatch):
    runs = iter([0, 0, 0, 1])
    spoil_gradient(monkeypatch, "up_weight", lambda gradient: gradient + 1e-3 * next(runs))
    assert differing_bits(Case(), "reference", runs=4) == ["d_up_weight"]
    assert next(runs, "none left") == "none left"


def test_refusals_lists_every_reason_a_backend_gives(monkeypatch):
    assert refusals(Case(), "reference") == []
    reasons = ["no such feature", "no such size"]
    monkeypatch.setattr(ReferenceBackend, "unsupported_reasons", lambda self, spec: reasons)
    assert refusals(Case(), "reference") == reasons


def test_case_id_reads_as_its_options():
    plain = Case(dtype=torch.bfloat16, hidden_size=768, bottleneck_size=48)
    assert str(plain) == "bf16-gelu-T37-H768-R48"
    loaded = replace(plain, shape=(2, 3), bias="none", residual="tensor", needs=("x", "up_weight"))
    loaded = replace(loaded, residual_dtype=torch.float32, scaling="channel", layout="rows")
    assert str(loaded) == (
        "bf16-gelu-T2x3-H768-R48-bias_none-residual_tensor_fp32-scaling_channel-x_rows"
        "-needs_x+up_weight"
    )
    assert str(Case(tf32=True, nonfinite=True)) == "tf32-gelu-T37-H70-R20-nonfinite"


def test_case_draw_is_repeatable_and_of_order_one():
    case = Case(shape=(200,), dtype=torch.float64, activation="identity", bias="none")
    first, again, other = (case.draw("cpu", seed) for seed in (0, 0, 1))
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        assert not torch.equal(tensor, other[name])
    z = first["x"] @ first["down_weight"].T
    assert z.std() == pytest.approx(1, rel=0.1)
    assert (z @ first["up_weight"].T).std() == pytest.approx(2, rel=0.2)


@pytest.mark.parametrize(
    ("layout", "stride"),
    [
        ("contiguous", (35, 7, 1)),
        ("rows", (75, 15, 1)),
        ("transposed", (7, 21, 1)),
        ("expanded", (0, 7, 1)),
        ("scalar", (0, 0, 0)),
        ("spread", (70, 14, 2)),
        ("unaligned", (35, 7, 1)),
    ],
)
def test_place_keeps_the_values_amid_nan(layout, stride):
    values = torch.arange(1.0, 106.0).reshape(3, 5, 7)
    placed = place(values, layout)
    assert placed.stride() == stride
    first = {"expanded": values[:1], "scalar": values[:1, :1, :1]}
    expected = first.get(layout, values).expand(3, 5, 7)
    assert torch.equal(placed, expected)
    memory = torch.empty(0).set_(placed.untyped_storage())
    assert memory.isfinite().sum() == 105  # nothing but the values
    assert memory[:128].isnan().all()
    assert memory[-127:].isnan().all()
    assert placed.data_ptr() % 16 == (4 if layout == "unaligned" else 0)


@pytest.mark.parametrize("small", [True, False])
def test_grid_covers_what_a_backend_declares(small):
    dtypes = {torch.float32, torch.bfloat16}
    quick, default, full = (grid(dtypes, ACTIVATIONS, level, small) for level in parity.LEVELS)
    assert set(quick) < set(default) < set(full)
    for cases in (quick, default, full):
        assert {(c.dtype, c.activation) for c in cases} >= {
            (d, a) for d in dtypes for a in ACTIVATIONS
        }
        assert len({str(case) for case in cases}) == len(cases)
    assert {c.shape for c in default} >= {(0,), (1,)}
    assert max(c.bottleneck_size for c in default) > 128
    assert {c.scaling for c in default} == {1.0, 0.7, "learned", "channel"}
    assert {c.grad_layout for c in default} == set(parity.LAYOUTS)
    assert {c.layout for c in default} == set(parity.LAYOUTS) - {"scalar"}
    assert torch.bfloat16 in {c.autocast for c in default}
    assert {(c.tf32, c.dtype) for c in default} == {
        *((False, dtype) for dtype in dtypes), (True, torch.float32)
    }  # fmt: skip
    assert {c.nonfinite for c in default} == {False, True}


def test_grid_of_an_unknown_level_lists_the_known_ones():
    with pytest.raises(ValueError, match="quick, default, full"):
        grid(HALVES, ["gelu"], "slow")
