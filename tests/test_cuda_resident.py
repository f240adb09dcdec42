"""When the resident form is chosen, for which tensors, and what its machine code does."""

import itertools

import cuda_facts
import cuda_sass
import pytest
import sass
import torch
from cuda_sass import LOCAL_MEMORY
from sass import Instruction

from adapterkern.backends.base import optional_rows
from adapterkern.backends.cuda import launch_config, traffic
from adapterkern.backends.cuda.backend import FORWARD_MOVED
from adapterkern.backends.cuda.facts import Device, Problem
from adapterkern.backends.cuda.launch_config import (
    NO_SLICES,
    ROWS_AHEAD,
    Slices,
    TokenPlan,
    cdiv,
    resident_plan,
    token_plan,
)
from adapterkern.backends.cuda.problems import problem_of
from adapterkern.parity import Case

MEMORY = 227 * 1024
H200 = Device(132, MEMORY, MEMORY, warpgroups=True)
PROBLEMS = [
    Problem(tokens, hidden, bottleneck, True, 1 + beside, beside)
    for tokens, hidden, bottleneck, beside in itertools.product(
        (1, 100, 1024, 2048, 16384, 65537),
        (64, 200, 768, 1024, 3072, 4096, 8192),
        (8, 64, 72),
        (0, 1),
    )
]


def whole(tokens: int, hidden: int, bottleneck: int = 64, beside: int | None = 0) -> Problem:
    return Problem(tokens, hidden, bottleneck, True, beside=beside)


@pytest.fixture(autouse=True)
def facts_of_the_sources(monkeypatch):
    monkeypatch.setattr(launch_config, "facts", cuda_facts.of_the_sources)


@pytest.mark.parametrize(
    ("problem", "slices", "clusters"),
    [
        (whole(16384, 512), Slices(2, 256), 66),
        (whole(16384, 768), Slices(2, 384), 66),
        (whole(16384, 1024), Slices(2, 512), 66),
        (whole(16384, 1024, beside=1), Slices(2, 512), 66),
        (whole(16384, 2048), Slices(4, 512), 33),
        (whole(16384, 4096), Slices(8, 512), 16),
        (whole(2048, 1024), Slices(4, 256), 32),
        (whole(2048, 4096), Slices(8, 512), 16),
        (whole(1024, 1024), Slices(8, 128), 16),
    ],
    ids=str,
)
def test_resident_plans_on_an_h200(problem, slices, clusters):
    plan = TokenPlan(slices, shared_bytes=MEMORY, resident_clusters=clusters)
    assert token_plan(problem, H200) == plan


@pytest.mark.parametrize(
    ("problem", "device"),
    [
        (whole(16384, 1024), Device(132, MEMORY, MEMORY)),  # no wgmma
        (whole(16384, 1024, beside=None), H200),  # tensors that copies do not take as they are
        (whole(16384, 1024, 72), H200),  # wider than a tile
        (whole(16384, 8192), H200),  # slices wider than a block holds
        (whole(16, 1024), H200),  # one tile
    ],
    ids=["device", "tensors", "bottleneck", "hidden", "tokens"],
)
def test_other_forms_take_what_the_resident_one_cannot(problem, device):
    assert resident_plan(problem, device) is None
    assert token_plan(problem, device) == token_plan(problem._replace(beside=None), device)


@pytest.mark.parametrize(("beside", "widest"), [(0, 7168), (1, 6656), (2, 5632)])
def test_widest_hidden_size(beside, widest):
    """docs/performance.md names these."""
    assert resident_plan(whole(16384, widest, beside=beside), H200)
    assert resident_plan(whole(16384, widest + 8, beside=beside), H200) is None


def test_plans_hold_their_rows_and_the_next_and_stay_within_the_device():
    seen = set()
    for problem, sms in itertools.product(PROBLEMS, (1, 8, 114, 132)):
        plan = resident_plan(problem, at(sms))
        if plan is None:
            continue
        size, length = plan.slices
        fact, panels = launch_config.facts().resident, length // launch_config.PANEL
        seen.add(size)
        assert size * length >= problem.hidden_size
        assert fact.row_slots(plan.shared_bytes, panels, problem.beside) >= panels + ROWS_AHEAD
        assert plan.resident_clusters <= cdiv(problem.num_tokens, fact.tokens)
        assert sms / 2 <= plan.resident_clusters * size <= sms
    assert seen == {2, 4, 8}


def at(sms: int) -> Device:
    return Device(sms, MEMORY, MEMORY, warpgroups=True)


def beside_of(case: Case) -> int | None:
    """What `problem_of` makes of a forward call's tensors."""
    tensors = case.draw("cpu", seed=0)
    call = case.make_call(tensors)
    moved = {name: optional_rows(getattr(call, name)) for name in FORWARD_MOVED}
    added = "x" if call.add_input else "residual", "skip"
    return problem_of(call, call.num_tokens, moved, *added).beside


@pytest.mark.parametrize(
    ("options", "beside"),
    [
        ({}, 0),
        ({"skip": True}, 1),
        ({"residual": "tensor"}, 1),
        ({"residual": "tensor", "skip": True}, 2),
        ({"residual": "none"}, 0),
        ({"hidden_size": 196}, None),
        ({"bottleneck_size": 20}, None),
        ({"layout": "unaligned"}, None),
        ({"layout": "rows"}, 0),
        ({"parameter_layout": "strided"}, 0),
        ({"dtype": torch.float32}, None),
        ({"parameter_dtype": torch.float32}, None),
    ],
    ids=str,
)
def test_tensors_that_copies_take_as_they_are(options, beside):
    case = {"dtype": torch.bfloat16, "shape": (9,), "hidden_size": 200, "bottleneck_size": 24}
    assert beside_of(Case(**(case | options))) == beside


def test_traffic_counts_the_rows_once():
    problem = whole(16384, 1024)
    (kernel,) = traffic.forward(problem, token_plan(problem, H200), H200, save=False)
    rows, weights = 16384 * 1024 * 2, 2 * 1024 * 64 * 2
    assert kernel.memory == 2 * rows + weights
    assert kernel.loads + kernel.stores == 2 * rows + 16384 // 64 * weights
    others = token_plan(problem._replace(beside=None), H200)
    assert others.slices == NO_SLICES
    (row_block,) = traffic.forward(problem, others, H200, save=False)
    assert kernel.shared_cycles < row_block.shared_cycles / 1.5


def resident_kernels() -> dict[str, list[Instruction]]:
    return {
        name: code
        for name, code in cuda_sass.sass("sm_90a").items()
        if cuda_sass.kernel_name(name) == "bottleneck_resident_kernel"
    }


def test_products_are_those_of_warpgroups_and_nothing_else_waits():
    """Two products of four steps each, and one wait for them; their loops load nothing from global
    memory and hold no barrier of the block. The cluster's stands at the start alone."""
    found = resident_kernels()
    assert len(found) == 2 * 2
    for name, code in found.items():
        assert sass.count(code, "HGMMA") == 8, name
        assert sass.count(code, "HMMA", *LOCAL_MEMORY) == 0, name
        assert not cuda_sass.in_double(code), name
        assert sass.count(code, "UCGABAR_ARV") == sass.count(code, "UCGABAR_WAIT") == 1, name
        assert sum(i.opcode.startswith("MEMBAR.ALL.GPU") for i in code) == 1, name
        loops = sorted(sass.loops(code), key=lambda loop: len(loop.instructions))
        into = next(loop for loop in loops if loop.count("HGMMA") and not loop.count("STG"))
        out = next(loop for loop in loops if loop.count("HGMMA") and loop.count("STG"))
        for loop, stores in ((into, 0), (out, 4)):  # 16 bytes each: 16 rows by 64 of 32 lanes
            assert (loop.count("HGMMA"), loop.count("STG")) == (4, stores), name
            assert sum("DEPBAR" in i.opcode for i in loop.instructions) == 1, name
            assert loop.count("LDG", "BAR", "UCGABAR_ARV") == 0, name
            membars = [i.opcode for i in loop.instructions if i.name == "MEMBAR"]
            assert membars == ["MEMBAR.ALL.CTA"], name  # of the fence for the asynchronous proxy


def test_exchange_and_copies_are_asynchronous():
    for name, code in resident_kernels().items():
        assert sass.count(code, "ARRIVES") == 3, name  # of the copies, when they have landed
        assert sass.count(code, "STAS") == 16 + 1, name  # pairs of sums; a vector of the bottleneck


def test_registers_allow_one_block():
    used = cuda_sass.resources()["sm_90a"]
    for name in resident_kernels():
        assert used[name]["REG"] <= 168, name
