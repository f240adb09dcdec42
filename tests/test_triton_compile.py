"""Every Triton configuration that can be launched, compiled for sm_80 to sm_120 without a GPU,
within bounds. Where two of these get the same code, one is compiled.
"""

import dataclasses
import os
import re
from multiprocessing import get_context

import pytest
import triton_compile

from adapterkern.backends.triton.compile_only import MOST_STACK_BYTES

CAPABILITIES = tuple(triton_compile.DEVICES)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Job to outcome, for all jobs of this module, compiled in a pool of processes."""
    jobs = triton_compile.jobs() + triton_compile.option_jobs() + triton_compile.largest_jobs()
    same = triton_compile.SAME_CODE
    sources = {job: on(same.get(job.capability, job.capability), job) for job in jobs}
    distinct = list(dict.fromkeys(sources.values()))
    os.environ["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton_cache"))
    try:
        with get_context("spawn").Pool(os.cpu_count()) as pool:
            outcomes = pool.map(triton_compile.compile_or_explain, distinct, chunksize=8)
            found = dict(zip(distinct, outcomes, strict=True))
            return {job: found[source] for job, source in sources.items()}
    finally:
        del os.environ["TRITON_CACHE_DIR"]


def on(capability: int, job: triton_compile.Job) -> triton_compile.Job:
    return dataclasses.replace(job, capability=capability)


def outcomes_of(compiled, capability: int):
    found = {job: outcome for job, outcome in compiled.items() if job.capability == capability}
    assert len(found) > 100
    return found


def test_grid_reaches_every_kernel_and_both_forms():
    kernels = {job.kernel for job in triton_compile.jobs((90,), ("bf16",))}
    assert kernels == {
        "bottleneck_fwd_kernel",
        "bottleneck_fwd_down_kernel",
        "bottleneck_fwd_up_kernel",
        "bottleneck_bwd_dx_kernel",
        "bottleneck_bwd_split_dz_kernel",
        "bottleneck_bwd_split_dx_kernel",
        "bottleneck_bwd_dw_kernel",
        "bottleneck_bwd_dw_sum_kernel",
    }


@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda c: f"sm_{c}")
def test_every_configuration_compiles(compiled, capability):
    failed = {
        job: o["error"] for job, o in outcomes_of(compiled, capability).items() if "error" in o
    }
    assert not failed


@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda c: f"sm_{c}")
def test_shared_memory_fits_the_device(compiled, capability):
    limit = triton_compile.DEVICES[capability].shared_memory
    over = {
        job: o["shared"]
        for job, o in outcomes_of(compiled, capability).items()
        if o["shared"] > limit
    }
    assert not over


@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda c: f"sm_{c}")
def test_registers_do_not_spill(compiled, capability):
    spilled = {
        job: o["stack"]
        for job, o in outcomes_of(compiled, capability).items()
        if o["stack"] > MOST_STACK_BYTES
    }
    assert not spilled


@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda c: f"sm_{c}")
def test_products_run_on_tensor_cores(compiled, capability):
    """The IEEE float32 ones, partial sums, and variants without any product are exempt."""
    without = [
        job
        for job, outcome in outcomes_of(compiled, capability).items()
        if outcome["tensor_instructions"] == 0
        and job.dtype != "fp32"
        and job.kernel != "bottleneck_bwd_dw_sum_kernel"
        and ("dx_ptr", None) not in job.options
    ]
    assert not without


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_capabilities_that_share_a_compilation_get_the_same_code(compiled, dtype):
    """Every kernel's PTX agrees but for its header, and so do registers, stack, shared memory."""

    def code(kernel) -> str:
        return re.sub(r"(?m)^(//|\.version|\.target).*$", "", kernel.asm["ptx"])

    for capability, source in triton_compile.SAME_CODE.items():
        for job in {job.kernel: job for job in triton_compile.jobs((source,), (dtype,))}.values():
            kernel = triton_compile.compiled_kernel(on(capability, job))
            assert code(kernel) == code(triton_compile.compiled_kernel(job))
            assert triton_compile.resources(kernel) == compiled[job]


def test_float32_weights_and_gradients_count_among_the_tiles():
    """Tiles for 2-byte tensors do not fit 99 KB where dy or the weights are float32."""
    kernel, limit = "bottleneck_bwd_split_dz_kernel", triton_compile.DEVICES[86].shared_memory
    config = triton_compile.largest(86, "bf16")[kernel]
    options = (("CHANNEL_SCALING", False), ("scaling_ptr", None))
    for dtype in ("bf16", *triton_compile.MIXED):
        job = triton_compile.Job(86, kernel, dtype, config, options)
        needs_other_tiles = triton_compile.compile_job(job)["shared"] > limit
        assert needs_other_tiles == (dtype in triton_compile.MIXED)
        planned = {(job.kernel, job.config) for job in triton_compile.jobs((86,), (dtype,))}
        assert ((kernel, config) in planned) != needs_other_tiles


def test_compiler_report_sees_a_spill():
    """The gate can fail: a tile far beyond the register file is reported with its stack."""
    config = triton_compile.LaunchConfig(
        block_t=128, block_h=64, block_r=256, num_warps=4, num_stages=2
    )
    job = triton_compile.Job(80, "bottleneck_fwd_kernel", "bf16", config)
    assert triton_compile.compile_job(job)["stack"] > MOST_STACK_BYTES
