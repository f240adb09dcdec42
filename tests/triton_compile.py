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
from collections.abc import Iterable
from multiprocessing import Pool
from typing import NamedTuple

import sass
import torch
import triton
import triton.language as tl
import triton_sass
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from adapterkern.backends.triton import (
    backend,
    backward,
    compile_only,
    forward,
    launch_config,
    weight_gradients,
)
from adapterkern.backends.triton.activations import GRADIENTS, VALUES
from adapterkern.backends.triton.launch_config import Device, LaunchConfig, RowBlock
from adapterkern.spec import make_call

KB = 1024
DEVICES = {  # capability: a typical card of it
    80: Device(num_sms=108, shared_memory=163 * KB, major=8),
    86: Device(num_sms=82, shared_memory=99 * KB, major=8),
    89: Device(num_sms=128, shared_memory=99 * KB, major=8),
    90: Device(num_sms=132, shared_memory=227 * KB),
    100: Device(num_sms=148, shared_memory=227 * KB, major=10),
    120: Device(num_sms=170, shared_memory=99 * KB, major=12),
}
# Blackwell takes the plans of the same memory before it. IEEE products take CUDA cores, whose code
# is alike everywhere.
DTYPES_OF: dict[int, tuple[str, ...]] = {
    80: ("bf16", "tf32"),
    86: ("bf16", "tf32", "fp32"),
    89: ("bf16", "tf32", "fp32"),
    90: ("bf16", "tf32", "fp32"),
    100: ("bf16",),
    120: ("bf16",),
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
    "tf32": Mix("fp32", "fp32", "fp32", "fp32"),
    "fp32": Mix("fp32", "fp32", "fp32", "fp32", ieee=True),
}
MIXED = {
    "autocast": Mix("fp32", "fp32", "fp32", "bf16"),
    "master": Mix("bf16", "fp32", "bf16", "bf16"),  # float32 master weights
    "wide-y": Mix("bf16", "bf16", "fp32", "bf16"),  # a float32 residual, skip or scaling
    "master-wide-y": Mix("bf16", "fp32", "fp32", "bf16"),
    "wide-x": Mix("fp32", "bf16", "fp32", "bf16"),  # half-precision weights under autocast
}
WIDEST = "master-wide-y"
DTYPES = UNIFORM | MIXED
Options = tuple[tuple[str, object], ...]
CHANNEL: Options = (("CHANNEL_SCALING", True), ("scaling_ptr", "given"))
ODD: Options = (("EVEN_H", False), ("R_MULTIPLE", 1), ("aligned", False))  # no tile divides sizes


@dataclasses.dataclass(frozen=True)
class Job:
    """One kernel to compile; options: arguments to replace, and whether all others are `aligned`:
    whether sizes and strides are multiples of 16."""

    capability: int
    kernel: str
    dtype: str
    config: LaunchConfig
    options: Options = ()

    def having(self, options: Options) -> "Job":
        """The same job with the options that its kernel has an argument for."""
        names = (*arguments_of(self.kernel), "aligned")
        kept = dict(self.options) | {name: value for name, value in options if name in names}
        return dataclasses.replace(self, options=tuple(kept.items()))


def jobs(capabilities=tuple(DEVICES), dtypes=None) -> list[Job]:
    """Return every configuration of every kernel over the grid, with the first options that it is
    launched with."""
    found = []
    for capability in capabilities:
        for dtype in dtypes or DTYPES_OF[capability]:
            found += jobs_of(capability, dtype)
    return found


@functools.cache
def jobs_of(capability: int, dtype: str, odd: bool = False) -> tuple[Job, ...]:
    """odd: of sizes that no tile divides."""
    found: dict[tuple, Job] = {}
    for tokens, hidden, bottleneck in itertools.product(NUM_TOKENS, HIDDEN_SIZES, BOTTLENECK_SIZES):
        sizes = (tokens, hidden + 3, bottleneck - 1) if odd else (tokens, hidden, bottleneck)
        for kernel, config, options in launches(DTYPES[dtype], *sizes, DEVICES[capability]):
            job = Job(capability, kernel, dtype, config, tuple(options.items()))
            job = job.having(ODD) if odd else job
            found.setdefault((kernel, config, options.get("ONE_TILE")), job)
    return tuple(found.values())


def launches(mix: Mix, tokens: int, hidden: int, bottleneck: int, device: Device):
    """Yield (kernel, config, options) of one forward and backward, as the backend plans them."""

    def empty(kind: str, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=TORCH_TYPES[kind], device="meta")

    x, dy = empty(mix.x, tokens, hidden), empty(mix.y, tokens, hidden)
    weights = empty(mix.weights, bottleneck, hidden), empty(mix.weights, hidden, bottleneck)
    call = make_call(x, *weights)._replace(compute_dtype=TORCH_TYPES[mix.products])
    with unittest.mock.patch.object(backend, "allow_tf32", return_value=not mix.ieee):
        problems = backend.forward_problem(call, x, device), backend.dx_problem(call, dy, device)
        weights_problem = backend.weights_problem(call, x, dy, device)
    forward_plan, dx_plan = (launch_config.token_plan(problem, device) for problem in problems)

    def stages(config: LaunchConfig, loaded: int, output: torch.Tensor) -> dict:
        """`loaded`: bytes of an element of each of the tensors [T, H] that are read."""
        sizes = loaded, weights[0].element_size(), output.element_size()
        return {"OUT_STAGES": launch_config.out_stages(config, device, *sizes)}

    def fitting(config: LaunchConfig, loaded: torch.Tensor) -> LaunchConfig:
        """The configuration with the stages of its first loop, which reads `loaded`."""
        sizes = loaded.element_size(), weights[0].element_size()
        return dataclasses.replace(
            config, num_stages=launch_config.into_stages(config, device, *sizes)
        )

    def absent(*names: str) -> dict:
        return dict.fromkeys(names)

    # x and one skip of y's type are added; see `compiled_kernel`.
    added = x.element_size() + dy.element_size()
    if isinstance(forward_plan, RowBlock):
        kernel = forward_plan.kernel
        yield "bottleneck_fwd_kernel", fitting(kernel, x), stages(kernel, added, dy)
    else:
        narrow, widen, parts = forward_plan.narrow, forward_plan.widen, forward_plan.num_splits > 1
        into = absent("z_ptr", "a_ptr") if parts else absent("partial_ptr")
        out = absent("a_ptr") if parts else absent("partial_ptr", "z_ptr")
        out |= {"ONE_TILE": bottleneck <= widen.block_r} | stages(widen, added, dy)
        out |= {"SUM_STAGES": launch_config.sum_stages(widen, device)}
        yield "bottleneck_fwd_down_kernel", fitting(narrow, x), into
        yield "bottleneck_fwd_up_kernel", widen, out
    if isinstance(dx_plan, RowBlock):
        kernel = dx_plan.kernel
        yield "bottleneck_bwd_dx_kernel", fitting(kernel, dy), stages(kernel, dy.element_size(), x)
    else:
        narrow, widen, parts = dx_plan.narrow, dx_plan.widen, dx_plan.num_splits > 1
        into = absent("dz_ptr", "a_ptr") if parts else absent("partial_ptr")
        out = {} if parts else absent("partial_ptr", "a_ptr")
        out |= {"ONE_TILE": bottleneck <= widen.block_r} | stages(widen, dy.element_size(), x)
        out |= {"SUM_STAGES": launch_config.sum_stages(widen, device)}
        yield "bottleneck_bwd_split_dz_kernel", fitting(narrow, dy), into
        yield "bottleneck_bwd_split_dx_kernel", widen, out
    plan = launch_config.weight_gradient_plan(weights_problem, device)
    sums = dict.fromkeys(("down_ptr", "up_ptr", "down_bias_ptr", "up_bias_ptr"), "*fp32")
    sizes = x.element_size() + dy.element_size(), 2 * call.compute_dtype.itemsize
    fit = launch_config.gradient_stages(plan.kernel, device, *sizes)
    kernel = dataclasses.replace(plan.kernel, num_stages=fit)
    yield "bottleneck_bwd_dw_kernel", kernel, sums if plan.num_splits > 1 else {}
    yield "bottleneck_bwd_dw_sum_kernel", launch_config.SUM, {}


def largest_jobs(capabilities=(86, 90)) -> list[Job]:
    """Return what `jobs` leaves out, each kernel with its largest tiles: the widest mix of types,
    and with it one scaling a channel and sizes that no tile divides; float32 tensors under
    autocast; the loops that a learned scaling enters, in the other types."""
    found = []
    for capability in capabilities:
        for job in largest(jobs_of(capability, WIDEST)).values():
            found += [job, job.having(CHANNEL)]
        for dtype in ("bf16", WIDEST):
            found += largest(jobs_of(capability, dtype, odd=True)).values()
        found += largest(jobs_of(capability, "autocast")).values()
        for dtype in DTYPES_OF[capability]:
            found += filter(None, map(scaled, largest(jobs_of(capability, dtype)).values()))
    return list(dict.fromkeys(found))


def scaled(job: Job) -> Job | None:
    """Return the job with one scaling a channel where that changes its loop, else None."""
    loops = ("bottleneck_bwd_dx_kernel", "bottleneck_bwd_split_dz_kernel")
    return job.having(CHANNEL) if job.kernel in loops else None


def wgmma_jobs() -> list[Job]:
    """Return every configuration for compute capability 9.0 whose loop may convert the factors of
    its product, in every mix of types, and the loops that a learned scaling enters, with one. The
    kernels out of the bottleneck convert no first factor: `jobs` has them. With relu, which takes
    the compiler a third of the time, where `jobs` does not have them with GELU."""
    relu: Options = (("ACTIVATION", "relu"), ("GRADIENT", "relu"))
    converting = ("fwd_kernel", "down_kernel", "bwd_dx_kernel", "dz_kernel", "dw_kernel")
    found = [job for job in jobs((90,), tuple(DTYPES)) if job.kernel.endswith(converting)]
    mixed = [job for job in found if job.dtype in MIXED]
    return [job.having(relu) for job in (*mixed, *filter(None, map(scaled, found)))]


def largest(jobs: Iterable[Job]) -> dict[str, Job]:
    """Return each kernel's launch with the most elements in its tiles in flight."""

    def staged(job: Job) -> int:
        config = job.config
        return (config.block_t + config.block_r) * config.block_h * config.num_stages

    found: dict[str, Job] = {}
    for job in jobs:
        found[job.kernel] = max(found.get(job.kernel, job), job, key=staged)
    return found


def function_of(kernel: str):
    modules = (forward, backward, weight_gradients)
    return next(getattr(module, kernel) for module in modules if hasattr(module, kernel))


def arguments_of(kernel: str) -> list[str]:
    return function_of(kernel).arg_names


def option_jobs(capability: int = 90) -> list[Job]:
    """Return each kernel once for every option that changes what is compiled: a missing tensor,
    another scaling, masks.
    """
    none = {
        "bottleneck_fwd_kernel": ("z_ptr", "skip_ptr", "down_bias_ptr", "up_bias_ptr"),
        "bottleneck_fwd_down_kernel": ("down_bias_ptr",),
        "bottleneck_fwd_up_kernel": ("z_ptr", "skip_ptr"),
        "bottleneck_bwd_dx_kernel": ("dx_ptr", "dz_ptr", "a_ptr"),
        "bottleneck_bwd_split_dz_kernel": (),
        "bottleneck_bwd_split_dx_kernel": ("dz_ptr", "a_ptr", "dx_ptr"),
        "bottleneck_bwd_dw_kernel": ("down_ptr", "up_ptr", "down_bias_ptr", "up_bias_ptr"),
        "bottleneck_bwd_dw_sum_kernel": (
            "part_down_ptr", "part_up_ptr", "part_down_bias_ptr", "part_up_bias_ptr",
            "d_up_ptr", "d_up_bias_ptr", "d_scaling_ptr", "up_bias_ptr",
        ),
    }  # fmt: skip
    flags = (
        {"scaling_ptr": "given"},
        {"scale": "fp32"},
        {"EVEN_H": False},
        {"EVEN_R": True},
        {"ADD_INPUT": False},
    )
    found = []
    for job in jobs((capability,), ("bf16",)):
        # The first configuration of each kernel; of the second of the split form, one that adds up
        # partial sums and stores dz.
        if job.kernel not in none or ("partial_ptr", None) in job.options:
            continue
        variants = [{name: None} for name in none.pop(job.kernel)]
        if job.kernel == "bottleneck_bwd_dx_kernel":
            variants.append({"dx_ptr": None, "dz_ptr": None})
        for flag in flags:
            names = arguments_of(job.kernel)
            if set(flag) <= set(names):
                variants.append(flag)
            if "ADD_INPUT" in flag and "residual_ptr" in names:
                variants.append({**flag, "residual_ptr": "*fp32"})
        found += [job.having(tuple(variant.items())) for variant in variants]
    return found


def compile_job(job: Job) -> dict:
    """Return {shared, registers, stack, tensor_instructions, hazards} of one kernel."""
    return resources(compiled_kernel(job))


def compiled_kernel(job: Job) -> triton.compiler.CompiledKernel:
    """Compile one kernel with all of its tensors, a scaling of 1, and the job's options."""
    kernel = function_of(job.kernel)
    mix = DTYPES[job.dtype]
    constants = {
        "ACTIVATION": "gelu",
        "GRADIENT": "gelu",
        "DTYPE": {"bf16": tl.bfloat16, "fp32": tl.float32}[mix.products],
        "PRECISION": "ieee" if mix.ieee else "tf32",
        "ADD_INPUT": True,
        "CHANNEL_SCALING": False,
        "EVEN_H": True,  # every block_h divides the hidden sizes of the grid
        "EVEN_R": False,  # masks cost registers, R = 48 needs them
        "R_MULTIPLE": 8,
        "BLOCK_T": job.config.block_t,
        "BLOCK_S": job.config.block_t,  # of the sum
        "BLOCK_H": job.config.block_h,
        "BLOCK_R": job.config.block_r,
        "residual_ptr": None,  # ADD_INPUT takes its place
        "scaling_ptr": None,
        "scale": None,
    }
    constants |= dict(job.options)
    constants["ACTIVATION"] = VALUES[constants["ACTIVATION"]]
    constants["GRADIENT"] = GRADIENTS[constants["GRADIENT"]]
    aligned = constants.pop("aligned", True)
    names = kernel.arg_names
    given = {name: value for name, value in constants.items() if isinstance(value, str)}
    given.pop("PRECISION")
    constants = {
        name: value for name, value in constants.items() if name in names and name not in given
    }

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if given.get(name, "given") != "given":
            return given[name]
        if name in ("z_ptr", "dz_ptr", "a_ptr"):
            return f"*{mix.products}"
        if name == "partial_ptr" or name.startswith("part_") or name == "d_scaling_ptr":
            return "*fp32"
        if name.endswith("_ptr"):
            of_y = name in ("y_ptr", "dy_ptr", "residual_ptr", "skip_ptr", "scaling_ptr")
            return f"*{mix.x if name in ('x_ptr', 'dx_ptr') else mix.y if of_y else mix.weights}"
        return "i32"

    # Triton specialises on the rest, but for odd sizes and those that a kernel leaves out.
    specialised = [
        i
        for i, name in enumerate(names)
        if kind(name) not in ("constexpr", "fp32")
        and name not in kernel.do_not_specialize
        and (aligned or name.endswith("_ptr"))
    ]
    source = ASTSource(
        fn=kernel,
        signature={name: kind(name) for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in specialised},
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
    used = compile_only.resources(compiled.asm["cubin"])
    return {
        "shared": compiled.metadata.shared,
        **used._asdict(),
        "tensor_instructions": len(tensor),
        "hazards": hazards(compiled),
        "spills": spills(compiled) if used.stack > compile_only.MOST_STACK_BYTES else 0,
    }


def spills(compiled) -> int:
    """Return how many instructions of loops move registers to memory and back."""
    code = sass.parse(triton_sass.disassemble(compiled.asm["cubin"]))
    return sum(loop.count("LDL", "STL") for loop in sass.loops(code))


def hazards(compiled) -> list[str]:
    """Return what `triton_sass.hazards` finds. Only a wgmma has them, and only one that takes its
    first factor from registers."""
    registers = re.search(r"wgmma\.mma_async\S*\s*\{[^}]*\},\s*\{", compiled.asm["ptx"])
    if registers is None:
        return []
    return triton_sass.hazards(sass.parse(triton_sass.disassemble(compiled.asm["cubin"])))


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
