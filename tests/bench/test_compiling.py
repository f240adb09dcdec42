"""Compiling without a GPU: its keys are those of the launches to come, and a crash costs one."""

import itertools
import os
import time
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fake_gpu import FakeGpu, fake_gpu
from tuning import H200, entry_of

from adapterkern.backends.triton import tuned
from adapterkern.backends.triton.compile_only import compile_only
from adapterkern.backends.triton.launch_config import Device, Problem
from adapterkern.backends.triton.mixes import Mix, compile_entry, mixes, uniform, widest
from adapterkern.bench import tune
from adapterkern.bench.cases import BenchCase
from adapterkern.bench.compiling import URGENT, Compilers, Work, problem_of
from adapterkern.bench.measure import outputs_of, prepared_call
from adapterkern.bench.providers import PROVIDERS

HALF, SINGLE = torch.bfloat16, torch.float32
_numbers = itertools.count(300)


def new_device():
    """Return an H200 with a number of SMs for which this process has no kernel yet."""
    return Device(next(_numbers), H200.shared_memory)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache on disk, for this process and those that it starts."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return tmp_path


def run(case, entry):
    """Run what a search runs of an entry: the gate in step mode, and the timed call."""
    inputs = case.draw("cpu")
    with tuned.forced(entry):
        built = PROVIDERS["triton"].build(case, inputs)
        outputs_of(built, replace(case, mode="step"), inputs)
        outputs_of(built, replace(case, mode="forward"), inputs)
        prepared_call(built, case, inputs.x, inputs.dy)()


CASES = {
    "split": ("tokens", BenchCase(1040, 24, 50, "bf16", mode="forward")),
    "row-block": ("tokens", BenchCase(64, 16, 8192, "fp16", "relu", mode="step")),
    "weights": ("weights", BenchCase(1024, 64, 900, "fp32", mode="backward")),
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", CASES)
def test_a_search_finds_in_the_cache_what_another_process_compiled(cache, name):
    kind, case = CASES[name]
    device = new_device()
    base = tune.formula(kind, tune.problem_of(case, True), device)
    first = replace(base.kernels[0], num_stages=4)
    entry = replace(base, kernels=(first, *base.kernels[1:]), programs_per_sm=1)
    mix = uniform(case.torch_dtype, case.activation)
    with Compilers(1, 90, device) as compilers:
        assert compilers.submit(Work(entry, mix, timed=True)).result() is None
    assert list(cache.rglob("*.cubin"))
    with fake_gpu(FakeGpu(device=device)) as gpu:
        run(case, entry)
        assert gpu.binaries == 0
        launched = {launch.kernel for launch in gpu.launches}
        run(case, replace(entry, kernels=(replace(first, num_stages=3), *base.kernels[1:])))
        assert gpu.binaries > 0  # the count can rise
    assert "bottleneck_bwd_dw_kernel" in launched
    assert any("fwd" in kernel for kernel in launched)


@pytest.mark.thorough
def test_a_launch_tells_the_shared_memory_of_what_it_would_run(cache):
    entry = entry_of(16384)
    launches = compile_entry(entry, uniform(HALF), 90, H200)
    shared = {launch.kernel: launch.shared for launch in launches}
    tiles = (128 + 64) * 64 * 2  # x and W_down, of which two of three stages are under way
    assert shared["bottleneck_fwd_kernel"] >= 2 * tiles
    with compile_only(90, H200) as launches:
        assert launches == []


@pytest.mark.thorough
def test_compile_only_compiles_for_the_named_gpu_and_gives_the_driver_back(cache):
    from triton.runtime import driver

    before = dict(vars(driver))
    seen = []
    for capability in (90, 80):
        (first, *_) = compile_entry(entry_of(16384), uniform(HALF), capability, H200)
        seen.append(first.cubin)
    assert vars(driver) == before
    assert b"sm_90" in seen[0]
    assert b"sm_80" in seen[1]


def test_every_mix_of_a_problem_is_listed_and_no_other():
    def listed(kind, device, ieee=False, wide=False):
        problem = Problem(4096, 1024, 64, ieee, wide)
        found = mixes(kind, problem, device)
        assert widest(kind, problem, device) in found
        return {(mix.x, mix.weights, mix.products) for mix in found}, found

    small = Device(num_sms=84, shared_memory=99 * 1024)
    types, found = listed("tokens", H200)
    assert types == {(HALF, HALF, HALF), (HALF, SINGLE, HALF)}
    assert {(mix.added, mix.scaling) for mix in found} == {
        *itertools.product((None, HALF, SINGLE), repeat=2)
    }
    types, _ = listed("tokens", H200, wide=True)  # under autocast, and TF32
    assert types == {(SINGLE, HALF, HALF), (SINGLE, SINGLE, HALF), (SINGLE, SINGLE, SINGLE)}
    types, _ = listed("weights", H200, ieee=True, wide=True)
    assert types == {(SINGLE, SINGLE, SINGLE)}
    # Where shared memory is small, float32 weights take a plan of their own,
    types, _ = listed("tokens", small)
    assert types == {(HALF, HALF, HALF)}
    # and so does a float32 dy, in the backward alone.
    types, found = listed("weights", small)
    assert types == {(HALF, HALF, HALF), (HALF, SINGLE, HALF)}
    assert not [mix for mix in found if SINGLE in (mix.added, mix.scaling)]
    wide = widest("tokens", Problem(4096, 1024, 64, False, False), H200)
    assert (wide.weights, wide.added, wide.scaling) == (SINGLE, SINGLE, None)


@pytest.mark.thorough
def test_a_part_that_an_entry_does_not_serve_is_not_compiled_for_it(cache):
    """On a small GPU the backward of a float32 dy takes the wide plan, its forward does not."""
    small = Device(num_sms=84, shared_memory=99 * 1024)
    mix = Mix(HALF, HALF, HALF, added=SINGLE)
    launches = compile_entry(entry_of(16384), mix, 89, small)
    assert {launch.kernel for launch in launches} == {"bottleneck_fwd_kernel"}
    launches = compile_entry(entry_of(16384, arithmetic=(False, True), block_h=32), mix, 89, small)
    assert "bottleneck_bwd_dx_kernel" in {launch.kernel for launch in launches}
    assert "bottleneck_fwd_kernel" not in {launch.kernel for launch in launches}


@pytest.mark.thorough
def test_tiles_that_fit_in_bfloat16_but_not_beside_a_float32_dy_are_refused(cache):
    entry = entry_of(16384, num_stages=2, block_t=64, block_h=256, block_r=128)
    assert problem_of(Work(entry, uniform(HALF)), 90, H200) is None
    asked = problem_of(Work(entry, widest("tokens", entry.problem, H200)), 90, H200)
    assert asked is not None
    assert "OutOfResources" in asked
    assert f"Hardware limit: {H200.shared_memory}" in asked


@pytest.mark.thorough
def test_a_kernel_that_spills_is_refused_where_it_must_not(cache):
    entry = entry_of(16384, block_t=128, block_h=128, num_warps=4)
    assert "spills" in problem_of(Work(entry, uniform(HALF), may_spill=False), 90, H200)
    assert problem_of(Work(entry, uniform(HALF)), 90, H200) is None  # slow, but it runs


class Crash:
    """Takes the place of an entry and ends the process that reads it."""

    def __reduce__(self):
        return os._exit, (3,)


class Hang:
    def __reduce__(self):
        return time.sleep, (600,)


@pytest.mark.thorough
def test_a_compiler_that_crashes_or_hangs_costs_its_own_work_alone(cache):
    good = Work(entry_of(16384), uniform(HALF))
    with Compilers(1, 90, H200, seconds=45.0) as compilers:
        answers = [compilers.submit(Work(entry, good.mix)) for entry in (good.entry, Crash())]
        last = compilers.submit(good)
        assert [answer.result() for answer in answers] == [
            None,
            "the compiler's process ended with exit code 3",
        ]
        assert last.result() is None
    with Compilers(1, 90, H200, seconds=1.0) as compilers:
        assert (
            compilers.submit(Work(Hang(), good.mix)).result() == "the compiler took longer than 1 s"
        )


@pytest.mark.thorough
def test_urgent_work_comes_first_and_leaving_ends_the_rest_at_once(cache):
    mix = uniform(HALF)
    start = time.monotonic()
    with Compilers(1, 90, H200) as compilers:
        running = compilers.submit(Work(Crash(), mix))
        ordinary = [compilers.submit(Work(Hang(), mix)) for _ in range(3)]
        urgent = compilers.submit(Work(entry_of(16384), mix), URGENT)
        assert "exit code 3" in running.result()
        assert urgent.result() is None
    assert time.monotonic() - start < 60
    assert ordinary[-1].cancelled()
