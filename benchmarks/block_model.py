"""Predicts what two adapters add to a post-norm block, by bytes and products alone.

    python -m benchmarks model

The block is that of `models.Block`, with 16384 tokens. Its own products take their FLOPs at the
rate of the matrix library or their bytes, whichever is longer. "torch" adds the residual in one
pass and normalises in another; "one pass" does both at once, which is what a compiler makes of it
and the hardest to compare with. docs/performance.md has the table.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from adapterkern.backends.traffic import Traffic, total
from adapterkern.bench import roofline
from adapterkern.bench.cases import BenchCase
from benchmarks.model import Card, seconds, triton_calls

TOKENS, SEQUENCE, BOTTLENECK = 16384, 512, 64
WIDTHS = (1024, 4096)
# What stands between a sublayer and the next, by the names of `roofline`, and as a reader knows it.
PARTS = {
    "adapterhub": "AdapterHub's adapter, torch's add and norm",
    "separate": "the fused adapter with the residual, torch's norm, by their bytes",
    "floor": "norm in the same pass, by its bytes",
    "triton": "norm in the same pass, Triton's plan",
}
BLOCKS = {"torch": "no-adapter", "one pass": "add-norm"}


class Overhead(NamedTuple):
    """What one way to adapt a block costs: passes over [T, H] between two sublayers, and per cent
    of the block without adapters, by its name in BLOCKS."""

    hidden_size: int
    mode: str
    part: str
    passes: float
    percent: dict[str, float]


def overheads(card: Card, widths: tuple[int, ...] = WIDTHS) -> Iterator[Overhead]:
    """The rows of the table."""
    for hidden in widths:
        for mode in ("forward", "step"):
            case = BenchCase(hidden, BOTTLENECK, TOKENS, mode=mode, norm="layer")
            for part in PARTS:
                time = _seconds(case, part, card)
                percent = {}
                for name, bare in BLOCKS.items():
                    without = _seconds(case, bare, card)
                    whole = _sublayers(case, card) + 2 * without
                    percent[name] = 100 * 2 * (time - without) / whole
                yield Overhead(hidden, mode, part, _passes(case, part, card), percent)


def _seconds(case: BenchCase, part: str, card: Card) -> float:
    if part == "triton":
        return seconds(_triton(case, card), card)
    machine = roofline.Machine(card.copy_bandwidth, card.matrix_rate, card.near_empty)
    return roofline.seconds(case, machine, part)


def _passes(case: BenchCase, part: str, card: Card) -> float:
    """How often an activation [T, H] is read or written."""
    if part == "triton":
        row = case.tokens * case.hidden_size * case.element_size
        return total(_triton(case, card), "memory") / row
    return sum(kernel.ud for kernel in roofline.kernels(case, part))


def _triton(case: BenchCase, card: Card) -> list[Traffic]:
    if case.mode == "forward":
        return triton_calls(case, card)[1]
    calls = [replace(case, mode=mode) for mode in ("forward", "backward")]
    return [kernel for call in calls for kernel in triton_calls(call, card, save=True)[1]]


def _sublayers(case: BenchCase, card: Card) -> float:
    """Seconds of a block's attention and feed-forward sublayers, forward or a step whose weights
    are frozen: a backward has as many products, those of the inputs' gradients, and attention's
    two and a half times as many."""
    tokens, hidden = case.tokens, case.hidden_size
    row = tokens * hidden * case.element_size

    def product(inputs: float, outputs: float) -> float:
        weight = inputs * outputs * hidden * hidden * case.element_size
        flops = 2.0 * tokens * inputs * outputs * hidden * hidden
        moved = (inputs + outputs) * row + weight
        return max(flops / card.library_rate, moved / card.copy_bandwidth)

    products = product(1, 3) + product(1, 1) + product(1, 4) + product(4, 1)
    attention = max(4.0 * tokens * SEQUENCE * hidden / card.library_rate,
                    4 * row / card.copy_bandwidth)  # fmt: skip
    activation = 8 * row / card.copy_bandwidth
    forward = products + attention + activation
    if case.mode == "forward":
        return forward
    return forward + products + 2.5 * attention + 1.5 * activation


def table(rows: list[Overhead]) -> str:
    """A Markdown table of the predictions."""
    lines = [
        f"| block of {TOKENS} tokens | between two sublayers | U | over torch's block "
        "| over a block that adds and normalises in one pass |",
        "|---|---|---:|---:|---:|",
    ]
    for row in rows:
        cells = " | ".join(f"{row.percent[name]:+.1f} %" for name in BLOCKS)
        lines.append(
            f"| H {row.hidden_size}, {row.mode} | {PARTS[row.part]} | {row.passes:.1f} | {cells} |"
        )
    return "\n".join(lines)
