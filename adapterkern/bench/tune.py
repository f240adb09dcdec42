"""The problems that `adapterkern tune` searches, in order of worth, and the candidates for each.

`bench.search` times the candidates.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from adapterkern.backends.triton import launch_config
from adapterkern.backends.triton.launch_config import (
    Device,
    LaunchConfig,
    Problem,
    RowBlock,
    Split,
)
from adapterkern.backends.triton.tuned import Entry
from adapterkern.bench.cases import BenchCase

# A bare run searches these (H, R, T, kinds) in this order. An entry serves whatever is within a
# factor of two of it in every size, so few shapes reach most models, and no two are much closer:
# only 768 and 1024 (BERT, GPT-2, ViT), which are used most, have two.
_BOTH, _TOKENS = ("tokens", "weights"), ("tokens",)
WORTH = (
    # A training batch, of small models and of 7B ones.
    *((1024, 64, 16384, _BOTH), (768, 48, 16384, _BOTH), (4096, 64, 16384, _BOTH)),
    # Decoding in a batch: no gradients, and every microsecond counts as often as there are layers.
    *((1024, 64, 16, _TOKENS), (4096, 64, 16, _TOKENS)),
    # A micro-batch, or a prompt.
    *((1024, 64, 4096, _BOTH), (4096, 64, 4096, _BOTH), (768, 48, 4096, _BOTH)),
    # Wide bottlenecks, of which the last runs in the split form whatever T is.
    *((4096, 128, 16384, _BOTH), (4096, 256, 16384, _BOTH)),
    # Decoding one sequence.
    *((4096, 64, 1, _TOKENS), (1024, 64, 1, _TOKENS)),
    # Short prompts, then decoding in large batches.
    *((4096, 256, 1024, _TOKENS), (4096, 64, 1024, _TOKENS), (1024, 64, 1024, _TOKENS)),
    *((4096, 64, 128, _TOKENS), (1024, 64, 128, _TOKENS)),
)
SHAPES = tuple(dict.fromkeys(search[:2] for search in WORTH))
TOKENS = tuple(dict.fromkeys(search[2] for search in WORTH))
# No launch configuration is searched on these: what was found elsewhere must not cost them.
HELD_OUT = (
    BenchCase(1280, 24, 4097, "bf16", "gelu"),
    BenchCase(2560, 96, 30011, "bf16", "relu"),
    BenchCase(5120, 384, 1000, "bf16", "silu"),
    BenchCase(1280, 48, 30011, "fp16", "gelu"),
    BenchCase(3072, 64, 16384, "fp32", "gelu"),
)
# Up to here a call is taken for one of decoding, which records no gradient; beyond, a token plan is
# timed in a step, because it also launches the gradients of z and x.
DECODE_TOKENS = 128


@dataclass(frozen=True)
class Search:
    """One thing to search: a plan of this kind, timed on this case."""

    kind: str
    case: BenchCase
    problem: Problem

    def __str__(self) -> str:
        return f"{self.kind} {self.case}"


def asked_for(
    shapes: Sequence[tuple[int, int]] | None, tokens: Sequence[int] | None
) -> list[tuple[int, int, int, tuple[str, ...]]]:
    """Return WORTH, or every kind on every (H, R) of `shapes` with every T of `tokens`, which
    changes slowest. Where one of the two is None it is all that WORTH has.
    """
    if shapes is None and tokens is None:
        return list(WORTH)
    grid = itertools.product(TOKENS if tokens is None else tokens, shapes or SHAPES)
    return [(*shape, count, _BOTH) for count, shape in grid]


def searches(
    asked: Iterable[tuple[int, int, int, tuple[str, ...]]],
    dtypes: Iterable[str],
    ieee: bool,
    done: Iterable[Entry] = (),
) -> list[Search]:
    """Return what is to be searched, in the given order, without what `done` has an entry for.

    Args:
        asked: (H, R, T, kinds of plan), as in WORTH.
        dtypes: of everything in a call, by their short names.
        ieee: whether float32 products keep full precision.
        done: the entries of the file that the search adds to.

    Raises:
        ValueError: a size below 1 or an unknown dtype.
    """
    known = {(entry.kind, entry.problem) for entry in done}
    found = []
    for (hidden, bottleneck, tokens, kinds), dtype in itertools.product(asked, dtypes):
        for kind in kinds:
            case = timed(kind, BenchCase(hidden, bottleneck, tokens, dtype))
            problem = problem_of(case, ieee)
            if (kind, problem) not in known:
                found.append(Search(kind, case, problem))
    return list(dict.fromkeys(found))


def timed(kind: str, case: BenchCase) -> BenchCase:
    """Return the case in the mode that a plan of this kind is timed in."""
    few = case.tokens <= DECODE_TOKENS
    return replace(case, mode="backward" if kind == "weights" else "forward" if few else "step")


def formula(kind: str, problem: Problem, device: Device) -> Entry:
    """Return the plan of `launch_config` as an entry: what a search begins from, and has to beat.

    The plan in force will not do: it changes while a run finds entries for nearby problems, and
    candidates are compiled ahead of the searches before their own.
    """
    if kind == "weights":
        weights = launch_config.weight_gradient_plan(problem, device)
        return Entry(problem, "weight_gradient", (weights.kernel,), weights.kernel.blocks_per_sm)
    return _token_entry(problem, launch_config.token_plan(problem, device))


def _token_entry(problem: Problem, plan: RowBlock | Split) -> Entry:
    if isinstance(plan, RowBlock):
        return Entry(problem, "row_block", (plan.kernel,))
    return Entry(problem, "split", (plan.narrow, plan.widen), plan.narrow.blocks_per_sm)


def candidates(kind: str, problem: Problem, device: Device) -> list[Entry]:
    """Return what is tried beside the formula's plan: its neighbours in each direction, and the
    other form.

    Tiles that need more shared memory than a block may use are left out; those that do not compile
    for another reason drop out when they are compiled. What a launch would run in fewer stages is
    tried in those.
    """
    base = formula(kind, problem, device)
    entries = list(_neighbours(base))
    if kind == "tokens":
        other = _other_form(base, problem, device)
        entries += [] if other is None else [other, *_neighbours(other)]
    launched = _launched(base, device)
    fitting = [
        entry
        for entry in dict.fromkeys(_launched(entry, device) for entry in entries)
        if entry != launched and all(_fits(kernel, problem, device) for kernel in entry.kernels)
    ]
    return [entry for entry in fitting if _holds(entry, problem)]


def _neighbours(entry: Entry) -> Iterable[Entry]:
    """Change one or two properties of the first kernel at a time, and the number of slices."""
    first, rest = entry.kernels[0], entry.kernels[1:]
    steps: list[dict[str, int]] = [
        *({"block_t": size} for size in (16, 32, 64, 128)),
        *({"block_h": size} for size in (32, 64, 128)),
        *({"num_warps": count, "num_stages": stages} for count in (4, 8) for stages in (2, 3, 4)),
    ]
    pairs = [{**a, **b} for a, b in itertools.combinations(steps, 2) if not a.keys() & b.keys()]
    for change in (*steps, *pairs):
        yield replace(entry, kernels=(replace(first, **change), *rest))
    for second in rest:
        for change in steps:
            yield replace(entry, kernels=(first, replace(second, **change)))
    if entry.form != "row_block":
        for programs in (1, 2, 4):
            yield replace(entry, programs_per_sm=programs)


def _other_form(entry: Entry, problem: Problem, device: Device) -> Entry | None:
    """Return a split in place of a row block and the other way round, None where R is too wide."""
    # Row blocks of 16 tokens fill no GPU with 17, and those are too many for the tiles of decode.
    other = 17 if entry.form == "row_block" else 1 << 24
    found = _token_entry(
        problem, launch_config.token_plan(problem._replace(num_tokens=other), device)
    )
    return None if found.form == entry.form else found


def _launched(entry: Entry, device: Device) -> Entry:
    """Return the entry with the stages that its first kernel runs in, where tensors are uniform."""
    first, *rest = entry.kernels
    size = _element_size(entry.problem)
    if entry.kind == "weights":
        stages = launch_config.gradient_stages(first, device, 2 * size, 2 * size)
    else:
        stages = launch_config.into_stages(first, device, size, size)
    return replace(entry, kernels=(replace(first, num_stages=stages), *rest))


def _element_size(problem: Problem) -> int:
    return 4 if problem.wide or problem.ieee else 2


def _fits(kernel: LaunchConfig, problem: Problem, device: Device) -> bool:
    """Return whether the pipelined tiles fit in shared memory: an estimate from below."""
    tile = (kernel.block_t + kernel.block_r) * kernel.block_h * _element_size(problem)
    return tile * (kernel.num_stages - 1) <= device.shared_memory


def _holds(entry: Entry, problem: Problem) -> bool:
    """Return whether a row block holds all of R, and no tile is far larger than the problem."""
    first = entry.kernels[0]
    if entry.form == "row_block" and first.block_r < problem.bottleneck_size:
        return False
    return entry.form == "weight_gradient" or first.block_t <= max(16, 2 * problem.num_tokens)


def problem_of(case: BenchCase, ieee: bool) -> Problem:
    """Return the launch problem of a case whose tensors all have its dtype."""
    single = case.dtype == "fp32"
    return Problem(
        case.tokens, case.hidden_size, case.bottleneck_size, ieee=single and ieee, wide=single
    )


def merge(old: Iterable[Entry], new: Iterable[Entry]) -> list[Entry]:
    """Return the entries of a file after a search: a new one replaces that of the same problem."""
    kept = {(entry.kind, entry.problem): entry for entry in (*old, *new)}
    return list(kept.values())
