"""Many adapters in one batch: a kernel reads and writes each token's own row, whatever the strides
of the tensors are, and what a row holds stays in it."""

from dataclasses import replace

import pytest
import torch
from grouped_calls import Sizes, draw, same_bits, triton_gradients

from adapterkern.backends import get
from adapterkern.backends.triton import grouped_launches
from adapterkern.backends.triton.launch_config import RowBlock
from adapterkern.grouped.call import GroupedCall

triton = get("triton")
IDS = [1, -1, 0, 2, 1, 1, 0]
BAD = 4  # a token, of slot 1
SIZES = Sizes(IDS, 37, 20, 3, [20, 9, 16])


@pytest.fixture(params=["tiled", "by_row"])
def form(request, monkeypatch):
    """Every forward takes it, whatever its sizes are."""

    def plan(problem, device):
        if request.param == "tiled":
            return RowBlock(grouped_launches.tiled(problem, device))
        return grouped_launches.by_row(problem, device)

    monkeypatch.setattr(grouped_launches, "forward_plan", plan)
    return request.param


def added(call: GroupedCall) -> GroupedCall:
    """The call with a residual and a skip of its own."""
    residual, skip = torch.randn(2, *call.x.shape)
    return call._replace(add_input=False, residual=residual, skip=skip)


def with_room(rows: torch.Tensor, features: int) -> torch.Tensor:
    """The same rows, that many features apart from each other; NaN between them."""
    wide = torch.full((rows.shape[0], rows.shape[1] + features), float("nan"), dtype=rows.dtype)
    wide[:, : rows.shape[1]] = rows
    return wide[:, : rows.shape[1]]


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("moved", ["x", "residual", "skip", "all"])
def test_every_tensor_is_read_by_its_own_strides(moved):
    call = added(draw(SIZES)[0])
    names = {"x": 3, "residual": 5, "skip": 11}  # no two alike
    moved = names if moved == "all" else {moved: names[moved]}
    apart = call._replace(**{n: with_room(getattr(call, n), by) for n, by in moved.items()})
    for found, expected in zip(
        triton.grouped_forward(apart, True), triton.grouped_forward(call, True), strict=True
    ):
        assert torch.equal(found, expected)


def test_a_backward_reads_x_and_dy_by_their_own_strides():
    call, dy = draw(SIZES)
    apart = call._replace(x=with_room(call.x, 3))
    assert same_bits(triton_gradients(apart, with_room(dy, 5)), triton_gradients(call, dy))


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_row_that_is_not_finite_spoils_no_other(value):
    call = added(draw(SIZES)[0])
    bad = call.x.clone()
    bad[BAD] = value
    others = [token for token in range(len(IDS)) if token != BAD]
    y, z = triton.grouped_forward(call._replace(x=bad), True)
    for found, expected in zip((y, z), triton.grouped_forward(call, True), strict=True):
        assert torch.equal(found[others], expected[others])
    assert not y[BAD].isfinite().any()


@pytest.mark.usefixtures("form")
def test_units_beyond_the_rank_take_nothing_from_a_row_that_is_not_finite():
    """relu turns the -Inf of all units into zeros; 0 times Inf beyond them would be NaN."""
    call = added(draw(SIZES)[0])._replace(activation="relu")
    call.down_weights[1].abs_().neg_()
    call.x[BAD] = float("inf")
    y, z = triton.grouped_forward(call, True)
    assert y[BAD].isfinite().all()
    assert (z[BAD, :9] == -float("inf")).all()
    assert not z[BAD, 9:].any()


@pytest.mark.sweep
@pytest.mark.parametrize("where", ["x", "dy"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_row_that_is_not_finite_spoils_gradients_of_its_own_adapter_alone(where, value):
    call, dy = draw(SIZES)
    found_of = {"x": call.x.clone(), "dy": dy.clone()}
    found_of[where][BAD] = value
    bad = call._replace(x=found_of["x"])
    clean, found = triton_gradients(call, dy), triton_gradients(bad, found_of["dy"])
    others = [token for token in range(len(IDS)) if token != BAD]
    assert torch.equal(found.x[others], clean.x[others])
    for name in ("down_weights", "up_weights", "down_biases", "up_biases", "scalings"):
        of, expected = getattr(found, name), getattr(clean, name)
        assert torch.equal(of[[0, 2]], expected[[0, 2]]), name
    assert not found.down_weights[1, :9].isfinite().all()


@pytest.mark.thorough
@pytest.mark.parametrize("height", [16, 32, 64])
def test_every_height_of_a_row_block_covers_a_tile(monkeypatch, height):
    """150 tokens of a slot fill two tiles and begin a third: of four, two or one row block each."""
    ids = [1] * 150 + [0] * 20
    call, _ = draw(Sizes(ids, 40, 16, 2))
    expected = triton.grouped_forward(call, True)
    tiled = grouped_launches.tiled
    monkeypatch.setattr(
        grouped_launches,
        "forward_plan",
        lambda problem, device: RowBlock(replace(tiled(problem, device), block_t=height)),
    )
    for found, other in zip(triton.grouped_forward(call, True), expected, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-5, atol=1e-5)
