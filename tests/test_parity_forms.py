"""The default grid of `parity` reaches every kernel form that the planners can choose.

What there is to reach is read off the planners themselves, over many sizes and devices: a new form
or tile without a case fails here.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import astuple, replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from adapterkern.backends import get
from adapterkern.backends.base import optional_rows
from adapterkern.backends.cuda import launch_config as cuda
from adapterkern.backends.cuda.backend import FORWARD_MOVED
from adapterkern.backends.cuda.problems import problem_of
from adapterkern.backends.triton import backend as triton_backend
from adapterkern.backends.triton import launch_config as triton
from adapterkern.parity import Case, grid

KB = 1024
SMS, MEMORY = (108, 132, 148), (99 * KB, 163 * KB, 227 * KB)
TRITON_DEVICES = [triton.Device(*pair) for pair in itertools.product(SMS, MEMORY)]
CUDA_DEVICES = [
    *(cuda.Device(sms, memory=memory) for sms, memory in itertools.product(SMS, MEMORY)),
    *(cuda.Device(sms, memory, memory) for sms, memory in itertools.product(SMS, MEMORY)),
    *(cuda.Device(sms, 227 * KB, 227 * KB, warpgroups=True) for sms in (114, 132)),
]
CLASSES = {
    "fp32": Case(torch.float32),
    "tf32": Case(torch.float32, tf32=True),
    "fp16": Case(torch.float16),
    "bf16": Case(torch.bfloat16),
}
# These lie on either side of what the planners divide by and compare with.
TOKENS = (
    *(1, 16, 17, 64, 100, 128, 300, 512, 1024, 1500, 2048, 3000, 4097, 8192),
    *(10000, 12000, 14500, 65536),
)
HIDDEN = (1, 64, 128, 200, 256, 300, 384, 512, 768, 1024, 1536, 2048, 4096, 8192)
BOTTLENECKS = (1, 8, 16, 17, 32, 33, 64, 65, 72, 128, 129, 256, 257, 1024)


def problems(case: Case) -> dict:
    """Return what the backends' launches of `case` depend on, as the backends make it; per Triton
    device those of y, of dx and of the weights."""
    few = (2,) * len(case.shape)
    small = replace(case, shape=few, hidden_size=8, bottleneck_size=8, nonfinite=False)
    tensors = small.draw("cpu", seed=0)
    with small.precision(torch.device("cpu")):
        call = small.make_call(tensors)
        dy = small.draw_grad_output(call, seed=0).reshape(-1, 8)
        x = tensors["x"].reshape(-1, 8)
        of_triton = {
            device: (
                triton_backend.forward_problem(call, x, device),
                triton_backend.dx_problem(call, dy, device),
                triton_backend.weights_problem(call, x, dy, device),
            )
            for device in TRITON_DEVICES
        }
        moved = {name: optional_rows(getattr(call, name)) for name in FORWARD_MOVED}
        of_cuda = problem_of(call, 1, moved, "x" if call.add_input else "residual", "skip")
        return {"triton": of_triton, "cuda": of_cuda}


def triton_launches(templates, sizes, device) -> Iterator[tuple]:
    """Yield the kernels of one call: direction or weights, form, tile, sums in parts; and for
    each whether the sizes divide evenly into its tile."""
    forward, dx, weights = (template._replace(**sizes) for template in templates)
    hidden, bottleneck = sizes["hidden_size"], sizes["bottleneck_size"]
    plan = triton.token_plan(forward, device)
    plans = {"forward": plan, "dx": plan if dx == forward else triton.token_plan(dx, device)}
    for direction, plan in plans.items():
        if isinstance(plan, triton.RowBlock):
            kernels = [("row block", plan.kernel, False)]
        else:
            parts = plan.num_splits > 1
            kernels = [("into, split", plan.narrow, parts), ("out of, split", plan.widen, parts)]
        for form, tile, parts in kernels:
            even = hidden % tile.block_h == 0, bottleneck % tile.block_r == 0
            yield direction, form, tile.block_t, tile.block_h, tile.block_r, parts
            yield direction, form, "even in H, R", even
    plan = triton.weight_gradient_plan(weights, device)
    tile = plan.kernel
    even = hidden % tile.block_h == 0, bottleneck % tile.block_r == 0
    yield "weights", tile.block_t, tile.block_h, tile.block_r, plan.num_splits > 1
    yield "weights", "even in H, R", even


def cuda_launches(template, sizes, device) -> Iterator[tuple]:
    """Yield the form of dz, dx and y with its width, and that of the weight gradients; and for
    each whether rows are whole vectors."""
    bottleneck = sizes["bottleneck_size"]
    if bottleneck > cuda.MAX_BOTTLENECK_SIZE:
        return
    problem = template._replace(**sizes)
    whole = sizes["hidden_size"] % 8 == 0, bottleneck % 8 == 0
    if not all(whole):
        problem = problem._replace(beside=None)
    if device.warpgroups:  # with tensors of any other kind these take the forms of the others
        if plan := cuda.resident_plan(problem, device):
            yield f"resident in clusters of {plan.slices.number}", plan.slices.number
        return
    plan, width = cuda.token_plan(problem, device), cuda.facts().row_block(problem, device).width
    if plan.num_clusters:
        form = f"cluster of {plan.slices.number}, {plan.cluster_tokens} tokens"
    else:
        form = "split" if plan.slices.number else "row block"
        form += " of large tiles" if plan.large_tiles else ""
    yield form, width
    yield form.split()[0], "whole vectors in H, R", whole
    tile = cuda.facts().gradient(problem)[1:3]
    yield "weights", tile, cuda.token_slices(problem, device).number > 1
    yield "weights", tile, f"{cuda.token_stages(problem, device)} stages"
    yield "weights", "whole vectors in H, R", whole


def launches(templates: dict, sizes: dict) -> Iterator[tuple]:
    """Yield ("triton" or "cuda", launch, device) of every device."""
    for device in TRITON_DEVICES:
        for launch in triton_launches(templates["triton"][device], sizes, device):
            yield "triton", launch, device
    for device in CUDA_DEVICES:
        for launch in cuda_launches(templates["cuda"], sizes, device):
            yield "cuda", launch, device


def sizes_of(case: Case) -> dict:
    return {
        "num_tokens": torch.Size(case.shape).numel(),
        "hidden_size": case.hidden_size,
        "bottleneck_size": case.bottleneck_size,
    }


def all_launches() -> dict[tuple, set]:
    """Return every launch that a planner gives, per class of arithmetic, with its devices.

    Half precisions take the same plans, so each is asked once for both."""
    templates = {name: problems(case) for name, case in CLASSES.items()}
    found = defaultdict(set)
    names = "num_tokens", "hidden_size", "bottleneck_size"
    for sizes in itertools.product(TOKENS, HIDDEN, BOTTLENECKS):
        for dtype_class in ("fp32", "tf32", "fp16"):
            for backend, launch, device in launches(
                templates[dtype_class], dict(zip(names, sizes, strict=True))
            ):
                found[backend, dtype_class, launch].add(device)
    assert templates["fp16"] == templates["bf16"]
    for backend, dtype_class, launch in list(found):
        if dtype_class == "fp16":
            found[backend, "bf16", launch] = found[backend, "fp16", launch]
    return found


def reached_by(cases: list[Case]) -> dict[tuple, set]:
    found = defaultdict(set)
    for case in cases:
        if case.needs is not None or case.nonfinite or sizes_of(case)["num_tokens"] == 0:
            continue  # not every gradient, or not of every token
        for backend, launch, device in launches(problems(case), sizes_of(case)):
            found[backend, case.dtype_class, launch].add(device)
    return found


def missing(cases: list[Case]) -> list[str]:
    """Return the launches that none of the cases makes, each with the devices."""
    reached = reached_by(cases)
    found = []
    for key, devices in all_launches().items():
        if without := sorted(astuple(d)[:3] for d in devices - reached[key]):  # memory comes first
            places = ", ".join(f"{sms} SMs with {max(more) // KB} KB" for sms, *more in without)
            found.append(f"{' '.join(map(str, key))} on {places}")
    return found


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return grid(get("triton").dtypes, get("triton").activations)


@pytest.mark.thorough
def test_default_grid_reaches_every_launch_on_every_device(cases):
    assert get("triton").dtypes == get("cuda").dtypes
    assert not missing(cases)


@pytest.mark.thorough
def test_form_without_a_case_is_named(cases, monkeypatch):
    """A planner might come to give clusters of sixteen."""
    monkeypatch.setattr(cuda, "CLUSTER_SIZES", (2, 4, 8, 16))
    cuda.token_plan.cache_clear()
    try:
        named = missing(cases)
    finally:
        cuda.token_plan.cache_clear()
    of_sixteen = [line for line in named if "cluster of 16, 16 tokens" in line]
    for dtype_class, width in itertools.product(("fp16", "bf16"), (16, 32, 64, 128)):
        start = f"cuda {dtype_class} ('cluster of 16, 16 tokens', {width}) on "
        (line,) = (line for line in of_sixteen if line.startswith(start))
        assert "132 SMs with 227 KB" in line


def test_default_grid_stays_small(cases):
    assert len(cases) <= 180
    for case in cases:
        num_tokens = sizes_of(case)["num_tokens"]
        assert num_tokens <= 15_000, case
        assert num_tokens * case.hidden_size <= 2_600_000, case


def test_default_grid_meets_every_activation_and_option_in_every_arithmetic(cases):
    plain = Case()
    for name, arithmetic in CLASSES.items():
        of_class = [case for case in cases if case.dtype_class == name]
        assert {case.activation for case in of_class} == get("triton").activations
        for field, values in {
            "residual": {"input", "tensor", "none"},
            "skip": {False, True},
            "scaling": {1.0, 0.7, "channel"},
            "layout": {"contiguous", "rows", "expanded", "spread", "unaligned"},
            "grad_layout": {"contiguous", "rows", "spread", "unaligned"},
            "parameter_layout": {"contiguous", "strided"},
            "nonfinite": {False, True},
        }.items():
            assert {getattr(case, field) for case in of_class} >= values, (name, field)
        if arithmetic.dtype.itemsize == 2:
            assert {case.parameter_dtype for case in of_class} == {None, torch.float32}
            assert {case.autocast for case in of_class} == {None, arithmetic.dtype}
    assert {case.bias for case in cases} == {"both", "down", "up", "none"}
    assert {case.needs for case in cases} > {plain.needs, ("x",), ("scaling",)}
