"""The prediction for a block with two adapters: sums done by hand, and the goals of the norm."""

import pytest

from benchmarks import block_model, model
from benchmarks.__main__ import main

H200 = model.CARDS["h200"]
ROWS = {(row.hidden_size, row.mode, row.part): row for row in block_model.overheads(H200)}
U = 16384 * 1024 * 2  # bytes of an activation
WEIGHTS = 2 * 1024 * 64 * 2  # of one adapter
# The products take 2 T H^2 (3 + 1 + 4 + 4) FLOPs, attention 4 T S H, gelu 8 U.
SUBLAYERS = (24 * 16384 * 1024**2 + 4 * 16384 * 512 * 1024) / 738e12 + 8 * U / 4.3e12


def test_an_overhead_is_the_bytes_beyond_those_of_the_block():
    norms = 2 * 5 * U / 4.3e12  # two adds of 3 U and two norms of 2 U
    separate = ROWS[1024, "forward", "separate"]
    assert separate.passes == 5
    assert separate.percent["torch"] == pytest.approx(
        100 * 2 * WEIGHTS / 4.3e12 / (SUBLAYERS + norms)
    )
    norms = 2 * 3 * U / 4.3e12
    beyond = 2 * (2 * U + WEIGHTS) / 4.3e12
    assert separate.percent["one pass"] == pytest.approx(100 * beyond / (SUBLAYERS + norms))


def test_a_norm_in_the_same_pass_moves_what_the_block_moves_anyway():
    for hidden in block_model.WIDTHS:
        forward, step = (ROWS[hidden, mode, "floor"] for mode in ("forward", "step"))
        assert (forward.passes, step.passes) == (3, 4 + 5)
        assert 0 < forward.percent["one pass"] < 0.1  # the weights
        assert forward.percent["torch"] < -1  # whose add and norm are two passes
        assert 0.5 < step.percent["one pass"] < 2.5  # two passes of the backward


def test_the_plan_at_width_1024_keeps_the_goal_that_its_bytes_allow():
    row = ROWS[1024, "forward", "triton"]
    assert row.passes == pytest.approx(3, abs=0.05)
    assert row.percent["torch"] <= 1.2


def test_every_way_to_adapt_a_block_has_a_row(capsys):
    assert main(["model", "--backend", "triton"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for row in ROWS.values():
        start = f"| H {row.hidden_size}, {row.mode} | {block_model.PARTS[row.part]} | "
        (line,) = [line for line in lines if line.startswith(start)]
        assert f"| {row.percent['torch']:+.1f} % | {row.percent['one pass']:+.1f} % |" in line
