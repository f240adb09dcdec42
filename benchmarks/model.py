"""Predicts each form's time from the bytes of its plan, for a GPU that is not here.

    python -m benchmarks model
    python -m benchmarks model --tokens 2048 --hidden-size 4096 --bottleneck-size 64 --card h100

A kernel takes the time of a near-empty one and the longest of: its bytes at the copy bandwidth;
what its SMs load or store at L2's rate; the waits for loads, of which a block has so many bytes
under way (Little's law); its accesses to shared memory; and its products. To these come the waits
of a cluster's blocks for each other. The kernels of a call follow each other. What this leaves out
(barriers within a block, most bank conflicts, address arithmetic) makes a real kernel slower: a
prediction is the time that a plan allows, and its use is to compare plans.
docs/performance.md holds what measurements made of them.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from adapterkern.backends.traffic import Traffic, total
from adapterkern.bench import roofline
from adapterkern.bench.cases import BenchCase


class Card(NamedTuple):
    """What bounds a kernel. copy_bandwidth, l2_bandwidth: bytes a second; sm_l2_bandwidth: of one
    SM; clock: Hz; matrix_rate: FLOP/s in bfloat16 with mma.sync or wgmma; memory_latency,
    l2_latency: seconds under load; near_empty: seconds of a kernel in a CUDA graph; library_rate:
    FLOP/s of the matrix library's products.

    copy_bandwidth, l2_bandwidth and library_rate of the H200 were measured, the other numbers are
    assumptions from published microbenchmarks; `python -m benchmarks gpu` measures them on the card
    at hand.
    """

    num_sms: int
    shared_memory: int
    copy_bandwidth: float
    l2_bandwidth: float = 6.2e12
    sm_l2_bandwidth: float = 64 * 1.755e9
    clock: float = 1.755e9
    matrix_rate: float = 500e12
    memory_latency: float = 800e-9
    l2_latency: float = 300e-9
    near_empty: float = 2.2e-6
    has_clusters: bool = True
    library_rate: float = 700e12


# The rows of the table in docs/performance.md: (T, H, R).
SHAPES = (
    (16384, 1024, 64),
    (16384, 4096, 64),
    (2048, 1024, 64),
    (2048, 4096, 64),
    (16, 1024, 64),
    (16, 4096, 64),
    (16384, 4096, 256),
)
CARDS = {
    "h200": Card(132, 227 * 1024, 4.3e12, 8.7e12, library_rate=738e12),
    "h100": Card(132, 227 * 1024, 3.0e12),
    "a100": Card(
        *(108, 163 * 1024, 1.6e12, 4e12, 64 * 1.41e9, 1.41e9, 250e12),
        memory_latency=700e-9,
        has_clusters=False,
        library_rate=270e12,
    ),
}


def bounds(kernel: Traffic, card: Card) -> dict[str, float]:
    """Seconds of each bound by its name."""
    waves = -(-kernel.blocks // (card.num_sms * kernel.per_sm))
    on_one_sm = -(-kernel.blocks // card.num_sms)  # the fullest SM ends last
    loads, stores = kernel.loads / kernel.blocks, kernel.stores / kernel.blocks
    from_memory = min(1.0, kernel.memory / (kernel.loads + kernel.stores))
    latency = from_memory * card.memory_latency + (1 - from_memory) * card.l2_latency
    of_all = max(kernel.loads, kernel.stores) / card.l2_bandwidth
    return {
        "memory": kernel.memory / card.copy_bandwidth,
        "L2": max(of_all, on_one_sm * max(loads, stores) / card.sm_l2_bandwidth),
        "latency": waves * loads / kernel.in_flight * latency,
        "shared memory": on_one_sm * kernel.shared_cycles / kernel.blocks / card.clock,
        "products": on_one_sm * kernel.flops / kernel.blocks * card.num_sms / card.matrix_rate,
    }


def seconds(kernels: Sequence[Traffic], card: Card) -> float:
    """The predicted time of a call."""
    return sum(
        card.near_empty + kernel.waits + max(bounds(kernel, card).values()) for kernel in kernels
    )


class Prediction(NamedTuple):
    """One call under one plan. hbm: its bytes to and from memory over those of the floor; l2: what
    its SMs load and store over 2 U, the bytes of x and y; limit: the longest kernel's bound.
    """

    case: BenchCase
    backend: str
    form: str
    kernels: Sequence[Traffic]
    seconds: float
    floor: float
    hbm: float
    l2: float
    limit: str

    @property
    def fraction(self) -> float:
        """The floor's share of the predicted time."""
        return self.floor / self.seconds


def predict(
    case: BenchCase, backend: str, form: str, kernels: Sequence[Traffic], card: Card
) -> Prediction:
    """What the model says of one call's kernels."""
    machine = roofline.Machine(card.copy_bandwidth, card.matrix_rate, card.near_empty)
    slowest = max((bounds(kernel, card) for kernel in kernels), key=lambda b: max(b.values()))
    through = total(kernels, "loads") + total(kernels, "stores")
    limit = max(slowest, key=lambda name: slowest[name])
    return Prediction(
        case,
        backend,
        form,
        kernels,
        seconds(kernels, card),
        roofline.seconds(case, machine),
        total(kernels, "memory") / roofline.moved_bytes(case),
        through / (2 * case.tokens * case.hidden_size * case.element_size),
        limit if slowest[limit] > card.near_empty else "launch",
    )


def predictions(
    card: Card,
    shapes: Sequence[tuple[int, int, int]] = SHAPES,
    backends: Sequence[str] = ("cuda", "triton"),
) -> Iterator[Prediction]:
    """Each backend's plan for the forward and the backward of each shape (T, H, R).

    Raises:
        RuntimeError: the CUDA extension is missing; the message tells why and the cure.
    """
    for tokens, hidden, bottleneck in shapes:
        for mode in ("forward", "backward"):
            case = BenchCase(hidden, bottleneck, tokens, mode=mode)
            for backend in backends:
                form, kernels = BACKENDS[backend](case, card)
                yield predict(case, backend, form, kernels, card)


def triton_calls(case: BenchCase, card: Card, save: bool = False) -> tuple[str, list[Traffic]]:
    """The form and the kernels that the triton backend would launch for a uniform bfloat16 call; a
    norm comes behind a skip."""
    from adapterkern.backends.triton import launch_config, norm_traffic, traffic

    device = launch_config.Device(card.num_sms, card.shared_memory)
    problem = launch_config.Problem(
        case.tokens, case.hidden_size, case.bottleneck_size, False, False
    )
    plan = launch_config.token_plan(problem, device)
    form = "row block" if isinstance(plan, launch_config.RowBlock) else "split"
    of_tokens = traffic if case.norm == "none" else norm_traffic
    if case.mode == "forward":
        return form, of_tokens.forward(problem, plan, device, save=save)
    weights = launch_config.weight_gradient_plan(problem, device)
    return form, [
        *of_tokens.input_gradient(problem, plan, device),
        *traffic.weight_gradients(problem, weights, device),
    ]


def cuda_calls(case: BenchCase, card: Card) -> tuple[str, list[Traffic]]:
    """As `triton_calls`, for the cuda backend, whose extension has to be there."""
    from adapterkern.backends.cuda import launch_config, traffic

    clusters = card.shared_memory if card.has_clusters else 0
    device = launch_config.Device(
        card.num_sms, clusters, card.shared_memory, warpgroups=card.has_clusters
    )
    whole = case.hidden_size % 8 == 0 and case.bottleneck_size % 8 == 0
    problem = launch_config.Problem(
        case.tokens, case.hidden_size, case.bottleneck_size, True, beside=0 if whole else None
    )
    plan = launch_config.token_plan(problem, device)
    form = "row block" if plan.slices.number == 0 else "split"
    if plan.num_clusters > 0:
        form = f"cluster {plan.slices.number} x {plan.cluster_tokens}"
    if plan.resident_clusters > 0:
        form = f"resident {plan.slices.number} x 64"
    if case.mode == "forward":
        return form, traffic.forward(problem, plan, device, save=False)
    weights = launch_config.token_slices(problem, device)
    return form, [
        *traffic.input_gradient(problem, plan, device),
        *traffic.weight_gradients(problem, weights, device),
    ]


BACKENDS = {"cuda": cuda_calls, "triton": triton_calls}


def table(rows: Sequence[Prediction]) -> str:
    """A Markdown table of predictions."""
    lines = [
        "| case (bf16, T x H, R) | backend, form | HBM / floor | L2 / 2U | predicted us | floor us "
        "| % of floor | bound by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        case = row.case
        lines.append(
            f"| {case.mode} {case.tokens} x {case.hidden_size}, {case.bottleneck_size} "
            f"| {row.backend}, {row.form} | {row.hbm:.2f} | {row.l2:.2f} | {row.seconds * 1e6:.1f} "
            f"| {row.floor * 1e6:.1f} | {100 * row.fraction:.0f} | {row.limit} |"
        )
    return "\n".join(lines)


def kernel_table(rows: Sequence[Prediction], card: Card) -> str:
    """A Markdown table of the kernels of each prediction and what bounds them, in microseconds."""
    names = list(bounds(rows[0].kernels[0], card))
    lines = [
        f"| case | kernel | blocks | an SM | MB in memory | MB loaded | {' | '.join(names)} |",
        "|---" * (6 + len(names)) + "|",
    ]
    for row in rows:
        for kernel in row.kernels:
            times = " | ".join(f"{1e6 * value:.1f}" for value in bounds(kernel, card).values())
            lines.append(
                f"| {row.case} {row.backend} | {kernel.kernel} | {kernel.blocks} | {kernel.per_sm} "
                f"| {kernel.memory / 1e6:.1f} | {kernel.loads / 1e6:.1f} | {times} |"
            )
    return "\n".join(lines)
