"""Predicts calls of many adapters in one batch from the bytes of their plans, beside one adapter on
as many tokens, a loop over the adapters and a copy.

    python -m benchmarks model

One adapter is predicted from its own plan, the loop from its bytes and its launches alone
(`roofline`), which leaves out what the host needs for so many of them.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from adapterkern.backends.traffic import Batch, Traffic
from adapterkern.bench import roofline
from adapterkern.bench.cases import BenchCase
from benchmarks import model
from benchmarks.model import Card, Prediction

# (H, adapters, tokens of each, mix): decoding, prompts, and what the goals ask for.
CASES = (
    (4096, 16, 1, "even"),
    (4096, 64, 1, "even"),
    (1024, 16, 32, "even"),
    (1024, 16, 128, "even"),
    (4096, 16, 128, "even"),
    (1024, 64, 128, "zipf"),
    (1024, 16, 1024, "even"),
    (1024, 16, 128, "none"),
)
BOTTLENECK = 64


class Beside(NamedTuple):
    """A prediction, and the seconds of one adapter on all tokens, of a loop, and of a copy."""

    prediction: Prediction
    single: float
    loop: float | None  # None where no token has an adapter
    copy: float


def batch_of(case: BenchCase) -> Batch:
    """Who takes what in the case."""
    counts = Counter(case.adapter_of_sequences())
    groups = tuple(counts[slot] * case.rows for slot in range(case.adapters))
    return Batch(groups, counts[-1] * case.rows)


def cuda_calls(case: BenchCase, card: Card) -> tuple[str, list[Traffic]]:
    """As `triton_calls`, for the forward of the cuda backend, which has no backward; its extension
    has to be there."""
    from adapterkern.backends.cuda import grouped, grouped_traffic, launch_config

    clusters = card.shared_memory if card.has_clusters else 0
    device = launch_config.Device(card.num_sms, clusters, card.shared_memory)
    problem = launch_config.Problem(case.tokens, case.hidden_size, case.bottleneck_size, True)
    plan = grouped.grouped_plan(problem, case.adapters, device)
    calls = grouped_traffic.forward(problem, plan, device, batch_of(case), save=False)
    return "tiled" if plan.num_tiles else "by row", calls


def triton_calls(case: BenchCase, card: Card, save: bool = False) -> tuple[str, list[Traffic]]:
    """The form and the kernels that the triton backend would launch for a bfloat16 batch whose
    slots are its adapters."""
    from adapterkern.backends.triton import (
        grouped_gradient_launches,
        grouped_launches,
        grouped_traffic,
        launch_config,
    )

    device = launch_config.Device(card.num_sms, card.shared_memory)
    problem = launch_config.Problem(
        case.tokens, case.hidden_size, case.bottleneck_size, False, False
    )
    batch = batch_of(case)
    plan = grouped_launches.forward_plan(problem, device)
    form = "tiled" if isinstance(plan, launch_config.RowBlock) else "by row"
    forward = grouped_traffic.forward(
        problem, plan, device, batch, save=save or case.mode == "step"
    )
    if case.mode == "forward":
        return form, forward
    tokens = grouped_gradient_launches.token_plan(problem, device)
    config = launch_config.weight_gradient_plan(problem, device).kernel
    chunks = grouped_gradient_launches.Chunks.of(problem, case.adapters, config, device)
    backward = [
        *grouped_traffic.input_gradient(problem, tokens, device, batch),
        *grouped_traffic.weight_gradients(problem, config, chunks, device, batch),
    ]
    return form, forward + backward if case.mode == "step" else backward


BACKENDS = {"cuda": cuda_calls, "triton": triton_calls}


def predictions(card: Card, backends: Sequence[str] = tuple(BACKENDS)) -> Iterator[Beside]:
    """Each case's forward, and the step of those in which adapters share the training.

    Raises:
        RuntimeError: the CUDA extension is missing; the message tells why and the cure.
    """
    for hidden, adapters, rows, mix in CASES:
        for mode in ("forward", "step") if rows > 1 and mix != "none" else ("forward",):
            case = BenchCase(
                hidden, BOTTLENECK, adapters * rows, mode=mode, adapters=adapters, mix=mix
            )
            for backend in backends:
                if mode == "forward" or backend == "triton":  # the other trains no batch
                    yield predict(case, backend, card)


def predict(case: BenchCase, backend: str, card: Card) -> Beside:
    """What the model says of one batch."""
    form, kernels = BACKENDS[backend](case, card)
    one = replace(case, adapters=0, mix="even")
    if case.mode == "forward":
        single = model.BACKENDS[backend](one, card)[1]
    else:
        calls = [replace(one, mode=mode) for mode in ("forward", "backward")]
        single = [kernel for call in calls for kernel in model.triton_calls(call, card, True)[1]]
    machine = roofline.Machine(card.copy_bandwidth, card.matrix_rate, card.near_empty)
    return Beside(
        model.predict(case, backend, form, kernels, card),
        model.seconds(single, card),
        roofline.seconds(case, machine, "loop") if case.used_adapters else None,
        card.near_empty + roofline.moved_bytes(case, "limit") / card.copy_bandwidth,
    )


def table(rows: Sequence[Beside]) -> str:
    """A Markdown table of predictions."""
    lines = [
        "| many adapters (bf16), of R 64 | backend, form | HBM / floor | predicted us "
        "| over one adapter | loop us | over a copy | % of floor | bound by |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        found, case = row.prediction, row.prediction.case
        each = f"{case.adapters} x {case.tokens // case.adapters} tokens"
        mix = {"even": "", "zipf": ", Zipf", "none": ", none taken"}[case.mix]
        loop = "-" if row.loop is None else f"{row.loop * 1e6:.0f}"
        lines.append(
            f"| {case.mode} {each}{mix}, H {case.hidden_size} | {found.backend}, {found.form} "
            f"| {found.hbm:.2f} | {found.seconds * 1e6:.1f} | {found.seconds / row.single:.2f} "
            f"| {loop} | {found.seconds / row.copy:.2f} | {100 * found.fraction:.0f} "
            f"| {found.limit} |"
        )
    return "\n".join(lines)
