"""The machine code of the installed extension: its kernels, and what they use of a GPU."""

import importlib.util
import re
import subprocess
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
from sass import Instruction
from sass import parse as instructions_of

from adapterkern.backends.cuda import extension

REGISTERS_OF_WIDTH = {"64": 2, "128": 4}
LOCAL_MEMORY = ("LDL", "STL")
# Disassembly takes half a minute an architecture: the default run reads one.
SM_80 = pytest.param("sm_80", marks=pytest.mark.thorough)
ARCHS = [SM_80, "sm_90a"]


def in_double(instructions: Sequence[Instruction]) -> list[Instruction]:
    """The instructions in double precision, conversions included."""
    return [i for i in instructions if re.match(r"D(ADD|MUL|FMA|SETP|MNMX)\b|.*\.F64", i.opcode)]


def parse(text: str) -> dict[str, list[Instruction]]:
    """Map each kernel (mangled) in the output of `cuobjdump --dump-sass` to its instructions."""
    _, *parts = re.split(r"^\s*Function : (\S+)", text, flags=re.MULTILINE)
    return {name: instructions_of(code) for name, code in zip(parts[::2], parts[1::2], strict=True)}


def most_in_flight(instructions: Sequence[Instruction], name: str = "LDG") -> int:
    """How many loads are under way at once, at most: issued, and none of their registers used yet.

    A warp issues in order and waits at the first use, so loads that follow it come later."""
    waiting: list[range] = []
    most = 0
    for each in instructions:
        registers = each.registers
        is_load = each.name == name and bool(registers)
        read = registers[1:] if is_load else registers
        waiting = [range_ for range_ in waiting if not any(r in range_ for r in read)]
        if is_load:
            width = each.opcode.rpartition(".")[2]
            waiting.append(range(registers[0], registers[0] + REGISTERS_OF_WIDTH.get(width, 1)))
            most = max(most, len(waiting))
    return most


def archs() -> list[str]:
    """The architectures that the extension holds machine code for; skips without an extension."""
    found = [arch for arch in extension.build_record().archs if arch.startswith("sm_")]
    if not found:
        pytest.skip(f"needs the extension: {extension.load().problem}")
    return found


def cuobjdump(*options: str) -> str:
    """The output of cuobjdump for the installed extension."""
    spec = importlib.util.find_spec("triton")
    library = importlib.util.find_spec("adapterkern._cuda")
    if spec is None:
        pytest.skip("needs cuobjdump, which comes with triton")
    if library is None:
        pytest.skip(f"needs the extension: {extension.load().problem}")
    tool = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run(
        [str(tool), *options, library.origin], capture_output=True, text=True, check=True
    ).stdout


@cache
def sass(arch: str) -> dict[str, list[Instruction]]:
    """The kernels of one architecture; the tool takes its time, so the answer is kept.
    Skips where the extension holds no code for it."""
    if arch not in archs():
        pytest.skip(f"the extension holds no code for {arch}")
    return parse(cuobjdump("--dump-sass", "--gpu-architecture", arch))


@cache
def resources() -> dict[str, dict[str, dict[str, int]]]:
    """Map architecture to kernel (mangled) to REG, STACK, SHARED."""
    found: dict = defaultdict(dict)
    arch = ""
    for line in cuobjdump("--dump-resource-usage").splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            arch = match[1]
        if match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        if "REG:" in line:
            found[arch][name] = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)}
    return found


def is_empty(arch: str, mangled: str) -> bool:
    """Whether the devices of an architecture have no use for an adapter kernel, which then traps:
    clusters and large tiles on 8.x, the small tiles of two sizes on 9.0. PTX is for any device, but
    the resident form for 9.0 alone."""
    if kernel_name(mangled) == "bottleneck_resident_kernel":
        return arch != "sm_90a"
    unused = {"sm_8": r"ClusterShape|Li(64|128)ELb1E", "sm_9": r"Li(64|128)ELb0E"}.get(arch[:4])
    is_half = re.search("__half|__nv_bfloat16", mangled)
    is_half = is_half and not re.search("Gradient|grouped", mangled)  # whose tiles have one size
    return bool(unused and is_half and re.search(unused, mangled))


def kernel_name(mangled: str) -> str | None:
    """The name of an adapter kernel as profilers show it, None for another function."""
    match = re.search(r"bottleneck_\w+?_kernel", mangled)
    return match[0] if match else None
