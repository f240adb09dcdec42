"""Launches with a norm: which kernels a plan takes, and that repeated launches are the first."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fake_gpu import FakeGpu, fake_gpu, pointers
from host_work import work_of
from triton.runtime.jit import JITFunction
from triton_calls import ROW_BLOCK, SPLIT, parts, tensor

from adapterkern.backends import get
from adapterkern.backends.traffic import total
from adapterkern.backends.triton import norm_plan, norm_traffic, traffic
from adapterkern.backends.triton.launch_config import (
    Device,
    LaunchConfig,
    Problem,
    token_plan,
    weight_gradient_plan,
)
from adapterkern.results import Needs, Outputs
from adapterkern.spec import make_call, with_norm
from benchmarks.free_launches import free_launches

MB = 1024 * 1024
SMALL = FakeGpu(device=Device(num_sms=1, shared_memory=227 * 1024))
H200 = Device(num_sms=132, shared_memory=227 * 1024, l2=60 * MB)
NO_L2 = FakeGpu(device=Device(num_sms=1, shared_memory=227 * 1024, l2=1))
ALL = Needs(*[True] * 5, residual=False, skip=True, norm_weight=True, norm_bias=True)
ROW_BLOCK_KERNELS = [
    "bottleneck_norm_fwd_kernel",
    "bottleneck_norm_bwd_dx_kernel",
    "norm_bwd_sum_kernel",
    "bottleneck_bwd_dw_kernel",
]


def norm_call(tokens, hidden, bottleneck, *, norm="layer", **changes):
    options = {"eps": 1e-5, "weight_offset": 0.0, "cast_before_weight": False, "prenorm": False}
    options = {name: changes.pop(name, value) for name, value in options.items()}
    given = parts(tokens, hidden, bottleneck, **changes)
    given.setdefault("skip", tensor(tokens, hidden))
    weight, bias = (tensor(hidden) for _ in range(2))
    return with_norm(make_call(**given), weight, bias, norm, **options)


def both_passes(gpu, call, needs=ALL):
    """The names of the kernels, and all arguments but addresses."""
    del gpu.launches[:]
    outputs, saved = get("triton").forward(call, True)
    saved = saved._replace(stream=outputs.y)
    d_stream = torch.zeros_like(outputs.y) if call.prenorm else None
    upstream = Outputs(d_stream, torch.zeros_like(outputs.normed))
    get("triton").backward(call.for_backward(needs), saved, upstream, needs)
    return [
        (
            n.kernel,
            n.grid,
            n.cubin,
            [(k, str(v)) for k, v in n.arguments.items() if "_ptr" not in k],
        )
        for n in gpu.launches
    ]


def kernels_of(gpu, call, needs=ALL):
    return [launch[0] for launch in both_passes(gpu, call, needs)]


OPTIONS = {
    "layer": {},
    "rms": {"norm": "rms"},
    "an-eps-that-is-the-scale": {"eps": 0.5},
    "offset": {"weight_offset": 1.0},
    "cast": {"cast_before_weight": True},
    "prenorm": {"prenorm": True},
}


@pytest.mark.parametrize(
    ("sizes", "kinds"),
    [(ROW_BLOCK, OPTIONS), (SPLIT, ("layer", "offset"))],
    ids=["row-block", "split"],
)
def test_calls_with_a_norm_are_repeated_whatever_their_scale(sizes, kinds, monkeypatch):
    """No option is taken for another, nor for the scale, which changes from call to call."""
    runs, ordinary = [], JITFunction.run

    def counted(kernel, *args, **named):
        runs.append(kernel)
        return ordinary(kernel, *args, **named)

    monkeypatch.setattr(JITFunction, "run", counted)
    with fake_gpu(replace(SMALL)) as gpu:

        def launched(scale):
            calls = {name: norm_call(*sizes, scaling=scale, **OPTIONS[name]) for name in kinds}
            return {name: both_passes(gpu, call) for name, call in calls.items()}

        first = launched(0.5)
        assert len({str(launches) for launches in first.values()}) == len(kinds)
        launched(0.75)
        del runs[:]
        assert launched(0.5) == first
        assert str(launched(0.25)) == str(first).replace("'scale', '0.5'", "'scale', '0.25'")
        assert not runs


@pytest.mark.parametrize("needs", [ALL, Needs(norm_bias=True), Needs(skip=True), Needs(x=True)])
def test_repeated_gradients_are_of_their_own_call(needs):
    with fake_gpu(replace(SMALL)) as gpu:
        call = norm_call(*ROW_BLOCK)
        for _ in range(4):
            both_passes(gpu, call, needs)
        named = pointers(gpu.launches[0])
    assert not named  # addresses alone: a repetition
    assert {launch.kernel for launch in gpu.launches} <= {
        *ROW_BLOCK_KERNELS,
        "norm_rows_bwd_kernel",
    }


def test_the_kernel_of_the_sum_normalises_it_where_l2_keeps_its_rows():
    with fake_gpu(replace(SMALL)) as gpu:
        assert kernels_of(gpu, norm_call(*ROW_BLOCK)) == ROW_BLOCK_KERNELS
    with fake_gpu(replace(NO_L2)) as gpu:
        assert kernels_of(gpu, norm_call(*ROW_BLOCK)) == [
            "bottleneck_fwd_kernel",
            "norm_rows_kernel",
            "norm_rows_bwd_kernel",
            "norm_bwd_sum_kernel",
            "bottleneck_bwd_dx_kernel",
            "bottleneck_bwd_dw_kernel",
        ]


def test_only_what_is_asked_for_is_launched_with_a_norm():
    with fake_gpu(replace(SMALL)) as gpu:
        for needs, kernels in (
            (Needs(x=True), ["bottleneck_norm_bwd_dx_kernel"]),
            (Needs(skip=True), ["norm_rows_bwd_kernel"]),
            (Needs(norm_weight=True), ["norm_rows_bwd_kernel", "norm_bwd_sum_kernel"]),
            (
                Needs(up_weight=True),
                ["norm_rows_bwd_kernel", "bottleneck_bwd_dx_kernel", "bottleneck_bwd_dw_kernel"],
            ),
        ):
            call = norm_call(*ROW_BLOCK)
            assert kernels_of(gpu, call, needs)[1:] == kernels
        dx = [n for n in gpu.launches if n.kernel == "bottleneck_bwd_dx_kernel"]
        assert all(launch.arguments["dz_ptr"] is None for launch in dx)


def test_row_blocks_with_a_norm_shrink_until_l2_keeps_their_rows():
    tall = LaunchConfig(64, 64, 64, 4, 5, 2, most_out_stages=5)
    problem, h200 = Problem(16384, 1024, 64, False, False), H200

    def planned(row_bytes, problem=problem, device=h200):
        found = norm_plan.row_block(tall, problem, device, row_bytes)
        return found and (found[0].block_t, found[1])

    assert planned(4) == (64, 132)  # 35 MB
    assert planned(6) == planned(8) == (32, 132)
    assert planned(10) is None
    assert planned(8, device=Device(132, 227 * 1024, 9, 50 * MB)) is None
    assert planned(6, problem._replace(hidden_size=4096)) is None
    assert planned(8, problem._replace(num_tokens=640)) == (64, 10)
    # Blocks that short would read too many weights for their rows.
    assert planned(6, problem._replace(hidden_size=2560)) is None


def test_rows_of_few_tokens_get_a_program_each():
    device = Device(132, 227 * 1024)
    for tokens, hidden, tile, programs in (
        (16, 1024, (1, 1024), 16),
        (16, 4096, (1, 1024), 16),
        (600, 768, (4, 1024), 150),
        (16384, 4096, (16, 256), 264),
        (1 << 20, 33, (16, 128), 264),
    ):
        config, found = norm_plan.rows(tokens, hidden, device)
        assert ((config.block_t, config.block_h), found) == (tile, programs)


def test_a_norm_costs_no_pass_over_memory_at_the_headline_shape():
    """U: the bytes of x. A norm of its own reads the sum and writes normed: 2 U more."""
    problem = Problem(16384, 1024, 64, False, False)
    plan, unit = token_plan(problem, H200), 16384 * 1024 * 2
    z, weights, statistics = 16384 * 64 * 2, 2 * 1024 * 64 * 2, 2 * 16384 * 4

    def memory(**options):
        return total(norm_traffic.forward(problem, plan, H200, **options), "memory")

    assert memory(save=False) == 3 * unit + weights
    assert memory(save=False, prenorm=True) == 4 * unit + weights
    assert memory(save=True) == 4 * unit + weights + z + statistics
    of_weights = traffic.weight_gradients(problem, weight_gradient_plan(problem, H200), H200)
    small = weights + 3 * z + statistics + 2 * 1024 * 2  # z, dz and a; the norm's gradients
    for d_stream, passes in ((False, 4), (True, 5)):
        kernels = norm_traffic.input_gradient(problem, plan, H200, d_stream=d_stream)
        assert total(kernels, "memory") == passes * unit + small
    # The weight gradients read x and ds.
    assert 2 * unit < total(of_weights, "memory") < 2.2 * unit


def test_a_repeated_call_with_a_norm_asks_no_more_of_the_host():
    """In Python frames, as in tests/test_host_overhead.py: three outputs more are three frames, and
    the host neither plans nor searches for a kernel."""
    call = norm_call(2, 16, 4)
    with torch.no_grad(), free_launches("triton") as kernels:
        outputs, saved = kernels.forward(call, True)
        saved, upstream = saved._replace(stream=outputs.y), Outputs(None, outputs.normed)
        works = [
            work_of(lambda: kernels.forward(call, True)),
            work_of(lambda: kernels.forward(call, False)),
            work_of(lambda: kernels.backward(call, saved, upstream, ALL)),
        ]
    for work, frames, own_calls in zip(works, (35, 31, 44), (73, 60, 96), strict=True):
        assert work.frames <= frames
        assert work.own_calls.total() <= own_calls, work.own_calls


@pytest.mark.parametrize(
    ("device", "widest", "with_skip"),
    [
        (H200, 2048, 1024),
        (Device(108, 163 * 1024, 8, 40 * MB), 1536, 1024),  # A100
        (Device(142, 99 * 1024, 8, 96 * MB), 2048, 2048),  # L40S
        (Device(80, 99 * 1024, 8, 6 * MB), 256, 0),  # A10
    ],
    ids=["H200", "A100", "L40S", "A10"],
)
def test_one_kernel_takes_the_widths_that_the_docs_name(device, widest, with_skip):
    """docs/norm.md: bfloat16, 64 units, 16384 tokens; what is added, and the sum, pass by L2."""
    for added, expected in ((1, widest), (2, with_skip)):
        found = [0]
        for hidden in (256, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192):
            problem = Problem(16384, hidden, 64, ieee=False, wide=False)
            kernel = token_plan(problem, device).kernel
            if norm_plan.row_block(kernel, problem, device, 2 * (added + 1)) is not None:
                found.append(hidden)
        assert found[-1] == expected
