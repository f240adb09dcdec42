"""Compile the Triton kernels for GPUs that are not here, and read what they would use.

Works without a driver: `triton.compile` targets any architecture, and the disassembler ships inside
the Triton wheel. Run as a script (in a process without TRITON_INTERPRET) it compiles every
configuration that the launch functions return over the grid below and prints one JSON line each;
tests/test_triton_compile.py holds the bounds.
"""

import dataclasses
import functools
import itertools
import json
import re
import sys
import unittest.mock
from multiprocessing import Pool
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from adapterkern.backends.triton import backend, backward, compile_only, forward, launch_config
from adapterkern.backends.triton.activations import gelu, gelu_derivative
from adapterkern.backends.triton.launch_config import Device, LaunchConfig, RowBlock
from adapterkern.spec import make_call

KB = 1024
DEVICES = {  # capability: a typical card of it
    80: Device(num_sms=108, shared_memory=163 * KB),
    86: Device(num_sms=82, shared_memory=99 * KB),
    89: Device(num_sms=128, shared_memory=99 * KB),
    90: Device(num_sms=132, shared_memory=227 * KB),
    100: Device(num_sms=148, shared_memory=227 * KB),
    120: Device(num_sms=170, shared_memory=99 * KB),
}
SAME_CODE = {89: 86}  # both get the same code with the same registers, as a test holds
HIDDEN_SIZES = (384, 768, 1024, 4096, 8192)
BOTTLENECK_SIZES = (8, 16, 48, 64, 128, 256, 384, 512, 1024)
NUM_TOKENS = (1, 16, 32, 128, 1024, 2048, 4096, 8192, 16384, 65536, 1 << 20)
TORCH_TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Mix(NamedTuple):
    """Element types of x and dx, of the parameters, of y, dy and what is added to y, of the
    products; and whether float32 products keep full precision.
    """

    x: str
    weights: str
    y: str
    products: str
    ieee: bool = False


UNIFORM = {
    "bf16": Mix("bf16", "bf16", "bf16", "bf16"),
    "autocast": Mix("fp32", "fp32", "fp32", "bf16"),
    "tf32": Mix("fp32", "fp32", "fp32", "fp32"),
    "fp32": Mix("fp32", "fp32", "fp32", "fp32", ieee=True),
}
MIXED = {
    "master": Mix("bf16", "fp32", "bf16", "bf16"),  # float32 master weights
    "wide-y": Mix("bf16", "bf16", "fp32", "bf16"),  # a float32 residual, skip or scaling
    "master-wide-y": Mix("bf16", "fp32", "fp32", "bf16"),
}
WIDEST = "master-wide-y"
DTYPES = UNIFORM | MIXED


@dataclasses.dataclass(frozen=True)
class Job:
    capability: int
    kernel: str
    dtype: str
    config: LaunchConfig
    options: tuple[
        tuple[str, object], ...
    ] = ()  # arguments to replace, for the variants of one kernel


def jobs(capabilities=tuple(DEVICES), dtypes=tuple(UNIFORM)) -> list[Job]:
    """Return every distinct kernel launch over the grid; those that differ in sizes are one."""
    return [job for pair in itertools.product(capabilities, dtypes) for job in jobs_of(*pair)]


@functools.cache
def jobs_of(capability: int, dtype: str) -> tuple[Job, ...]:
    found: dict[Job, None] = {}
    for sizes in itertools.product(NUM_TOKENS, HIDDEN_SIZES, BOTTLENECK_SIZES):
        for kernel, config in launches(DTYPES[dtype], *sizes, DEVICES[capability]):
            found[Job(capability, kernel, dtype, config)] = None
    return tuple(found)


def launches(mix: Mix, tokens: int, hidden: int, bottleneck: int, device: Device):
    """Yield (kernel, config) of one forward and backward, as the backend plans them."""

    def empty(kind: str, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=TORCH_TYPES[kind], device="meta")

    x, dy = empty(mix.x, tokens, hidden), empty(mix.y, tokens, hidden)
    weights = empty(mix.weights, bottleneck, hidden), empty(mix.weights, hidden, bottleneck)
    call = make_call(x, *weights)._replace(compute_dtype=TORCH_TYPES[mix.products])
    with unittest.mock.patch.object(backend, "allow_tf32", return_value=not mix.ieee):
        problems = backend.forward_problem(call, x, device), backend.dx_problem(call, dy, device)
        weights_problem = backend.weights_problem(call, x, dy, device)
    forward_plan, dx_plan = (launch_config.token_plan(problem, device) for problem in problems)
    if isinstance(forward_plan, RowBlock):
        yield "bottleneck_fwd_kernel", forward_plan.kernel
    else:
        yield "bottleneck_fwd_down_kernel", forward_plan.narrow
        yield "bottleneck_fwd_up_kernel", forward_plan.widen
    if isinstance(dx_plan, RowBlock):
        yield "bottleneck_bwd_dx_kernel", dx_plan.kernel
    else:
        yield "bottleneck_bwd_split_dz_kernel", dx_plan.narrow
        yield "bottleneck_bwd_split_dx_kernel", dx_plan.widen
    plan = launch_config.weight_gradient_plan(weights_problem, device)
    yield "bottleneck_bwd_dw_kernel", plan.kernel
    yield "bottleneck_bwd_dw_sum_kernel", launch_config.SUM


def largest_jobs(capabilities=tuple(DEVICES)) -> list[Job]:
    """Return what `jobs` leaves out, each kernel with its largest tiles: the mixes of types, and a
    float for a scaling, which lets the kernels that scale dy stage more than a learned one.
    """
    found = []
    for capability in capabilities:
        widest = largest(capability, WIDEST)
        for dtype in DTYPES:
            for kernel, config in largest(capability, dtype).items():
                names = arguments_of(kernel)
                scales_dy = "DERIVATIVE" in names and "CHANNEL_SCALING" in names
                # The same tiles hold more in the widest mix.
                mixed = dtype == WIDEST or (dtype in MIXED and config != widest[kernel])
                if not (mixed or (scales_dy and dtype in UNIFORM)):
                    continue
                options = {"CHANNEL_SCALING": False, "scaling_ptr": None}
                options = {name: value for name, value in options.items() if name in names}
                found.append(Job(capability, kernel, dtype, config, tuple(options.items())))
                if "PARTIAL" in names and (scales_dy or dtype == WIDEST):
                    options["PARTIAL"] = True
                    found.append(Job(capability, kernel, dtype, config, tuple(options.items())))
    return found


def largest(capability: int, dtype: str) -> dict[str, LaunchConfig]:
    """Return each kernel's configuration with the most elements in its tiles in flight."""

    def staged(config: LaunchConfig) -> int:
        return (config.block_t + config.block_r) * config.block_h * config.num_stages

    configs: dict[str, LaunchConfig] = {}
    for job in jobs((capability,), (dtype,)):
        configs[job.kernel] = max(configs.get(job.kernel, job.config), job.config, key=staged)
    return configs


def arguments_of(kernel: str) -> list[str]:
    return (getattr(forward, kernel, None) or getattr(backward, kernel)).arg_names


def option_jobs(capability: int = 90) -> list[Job]:
    """Return each kernel once for every option that changes what is compiled: a missing tensor,
    another scaling, masks.
    """
    none = {
        "bottleneck_fwd_kernel": (
            "z_ptr", "skip_ptr", "scaling_ptr", "down_bias_ptr", "up_bias_ptr",
        ),
        "bottleneck_fwd_down_kernel": ("down_bias_ptr",),
        "bottleneck_fwd_up_kernel": ("partial_ptr", "z_ptr", "skip_ptr", "scaling_ptr"),
        "bottleneck_bwd_dx_kernel": ("dx_ptr", "dz_ptr", "scaling_ptr"),
        "bottleneck_bwd_split_dz_kernel": ("scaling_ptr",),
        "bottleneck_bwd_split_dx_kernel": ("partial_ptr", "dz_ptr", "dx_ptr"),
        "bottleneck_bwd_dw_kernel": ("d_down_ptr", "d_up_ptr", "d_down_bias_ptr", "d_up_bias_ptr"),
        "bottleneck_bwd_dw_sum_kernel": (
            "part_down_ptr", "part_up_ptr", "part_down_bias_ptr", "part_up_bias_ptr",
            "d_up_ptr", "d_up_bias_ptr", "d_scaling_ptr", "up_bias_ptr",
        ),
    }  # fmt: skip
    flags = (
        {"PARTIAL": True},
        {"CHANNEL_SCALING": False},
        {"EVEN_H": False},
        {"EVEN_R": True},
        {"ADD_INPUT": False},
    )
    found = []
    for job in jobs((capability,), ("bf16",)):
        if job.kernel not in none:
            continue  # the first configuration of each kernel
        variants = [{name: None} for name in none.pop(job.kernel)]
        for flag in flags:
            names = arguments_of(job.kernel)
            if set(flag) <= set(names):
                variants.append(flag)
            if "ADD_INPUT" in flag and "residual_ptr" in names:
                variants.append({**flag, "residual_ptr": "*fp32"})
        found += [dataclasses.replace(job, options=tuple(variant.items())) for variant in variants]
    return found


def compile_job(job: Job) -> dict:
    """Return {shared, registers, stack, tensor_instructions} of one kernel."""
    return resources(compiled_kernel(job))


def compiled_kernel(job: Job) -> triton.compiler.CompiledKernel:
    """Compile one kernel with all of its options on, but for those that the job replaces."""
    kernel = getattr(forward, job.kernel, None) or getattr(backward, job.kernel)
    mix = DTYPES[job.dtype]
    constants = {
        "ACTIVATION": gelu,
        "DERIVATIVE": gelu_derivative,
        "DTYPE": {"bf16": tl.bfloat16, "fp32": tl.float32}[mix.products],
        "PRECISION": "ieee" if mix.ieee else "tf32",
        "ADD_INPUT": True,
        "CHANNEL_SCALING": True,
        "PARTIAL": False,  # the variant with the longer epilogue
        "EVEN_H": True,  # every block_h divides the hidden sizes of the grid
        "EVEN_R": False,  # masks cost registers, R = 48 needs them
        "BLOCK_T": job.config.block_t,
        "BLOCK_H": job.config.block_h,
        "BLOCK_R": job.config.block_r,
        "residual_ptr": None,  # ADD_INPUT takes its place
    }
    constants |= dict(job.options)
    names = kernel.arg_names
    pointers = {
        name: value
        for name, value in constants.items()
        if isinstance(value, str) and value[0] == "*"
    }
    constants = {
        name: value for name, value in constants.items() if name in names and name not in pointers
    }

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in pointers:
            return pointers[name]
        if name == "scale":
            return "fp32"
        if name in ("z_ptr", "dz_ptr"):
            return f"*{mix.products}"
        if name == "partial_ptr" or name.startswith("part_") or name == "d_scaling_ptr":
            return "*fp32"
        if name.endswith("_ptr"):
            of_y = name in ("y_ptr", "dy_ptr", "residual_ptr", "skip_ptr", "scaling_ptr")
            return f"*{mix.x if name in ('x_ptr', 'dx_ptr') else mix.y if of_y else mix.weights}"
        return "i32"

    aligned = [
        i
        for i, name in enumerate(names)
        if kind(name) not in ("constexpr", "fp32") and name not in ("num_tokens", "num_splits")
    ]
    source = ASTSource(
        fn=kernel,
        signature={name: kind(name) for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {
        "num_warps": job.config.num_warps,
        "num_stages": job.config.num_stages,
        "enable_fp_fusion": True,
    }
    return triton.compile(source, target=GPUTarget("cuda", job.capability, 32), options=options)


def resources(compiled) -> dict:
    # The PTX is searched: its matrix instructions map one to one, and disassembling is slow.
    tensor = re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", compiled.asm["ptx"])
    return {
        "shared": compiled.metadata.shared,
        **compile_only.resources(compiled.asm["cubin"])._asdict(),
        "tensor_instructions": len(tensor),
    }


def compile_or_explain(job: Job) -> dict:
    """Return the outcome of `compile_job`, or {error} in the compiler's own words."""
    try:
        outcome = compile_job(job)
    except Exception as error:
        outcome = {"error": f"{type(error).__name__}: {error}"}
    return outcome


if __name__ == "__main__":
    wanted = jobs(*[tuple(map(int, sys.argv[1].split(",")))] if len(sys.argv) > 1 else [])
    if len(sys.argv) > 2:
        wanted = [job for job in wanted if job.dtype in sys.argv[2].split(",")]
    with Pool(2) as pool:
        for job, outcome in zip(wanted, pool.imap(compile_or_explain, wanted), strict=True):
            print(json.dumps({**dataclasses.asdict(job), **outcome}), flush=True)
