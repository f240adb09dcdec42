"""Reads the machine code of the installed extension: kernels, their loops, their loads in flight.

A gate reads the code of a kernel from `sass(arch)` and asks `innermost_loops` for the loops that do
the work: `ptxas` puts rare paths behind the end of a kernel, so that an outer loop may span it all.
"""

import importlib.util
import re
import subprocess
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from adapterkern.backends.cuda import extension

REGISTERS_OF_WIDTH = {"64": 2, "128": 4}
LOCAL_MEMORY = ("LDL", "STL")


class Instruction(NamedTuple):
    """One instruction without its predicate, such as LDG.E.128 R4, [R2.64]."""

    address: int
    text: str

    @property
    def opcode(self) -> str:
        """The name with its modifiers, LDG.E.128."""
        return self.text.split()[0]

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def registers(self) -> list[int]:
        """The general registers that it names, in order; a wide operand by its first alone."""
        return [int(number) for number in re.findall(r"\bR(\d+)", self.text)]

    @property
    def target(self) -> int | None:
        """The address that it branches to, if it is a branch."""
        match = re.search(r"(0x[0-9a-f]+)", self.text) if self.name == "BRA" else None
        return int(match[1], 16) if match else None


@dataclass(frozen=True)
class Loop:
    """The instructions from the target of a backward branch to that branch."""

    instructions: tuple[Instruction, ...]

    @property
    def span(self) -> tuple[int, int]:
        return self.instructions[0].address, self.instructions[-1].address

    def count(self, *names: str) -> int:
        return count(self.instructions, *names)


def count(instructions: Sequence[Instruction], *names: str) -> int:
    """The number of instructions of these names, LDG counting every LDG.*; of all without names."""
    return sum(not names or each.name in names for each in instructions)


def in_double(instructions: Sequence[Instruction]) -> list[Instruction]:
    """The instructions in double precision, conversions included."""
    return [i for i in instructions if re.match(r"D(ADD|MUL|FMA|SETP|MNMX)\b|.*\.F64", i.opcode)]


def parse(text: str) -> dict[str, list[Instruction]]:
    """Map each kernel (mangled) in the output of `cuobjdump --dump-sass` to its instructions."""
    kernels: dict[str, list[Instruction]] = {}
    line_of_code = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([^;]+?)\s*;")
    for line in text.splitlines():
        if match := re.match(r"\s*Function : (\S+)", line):
            kernels[match[1]] = current = []
        elif match := line_of_code.match(line):
            current.append(Instruction(int(match[1], 16), match[2]))
    return kernels


def loops(instructions: Sequence[Instruction]) -> list[Loop]:
    """The loops of a kernel, one for each backward branch; its last branches to itself."""
    found = []
    for end, branch in enumerate(instructions):
        if branch.target is not None and branch.target < branch.address:
            body = [each for each in instructions[: end + 1] if each.address >= branch.target]
            found.append(Loop(tuple(body)))
    return found


def innermost_loops(instructions: Sequence[Instruction]) -> list[Loop]:
    """The loops that contain no other one."""
    every = loops(instructions)

    def contains(outer: Loop, inner: Loop) -> bool:
        (start, end), (first, last) = outer.span, inner.span
        return outer is not inner and start <= first and last <= end

    return [loop for loop in every if not any(contains(loop, other) for other in every)]


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
    """The kernels of one architecture; the tool takes ten seconds, so the answer is kept."""
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


def kernel_name(mangled: str) -> str | None:
    """The name of an adapter kernel as profilers show it, None for another function."""
    match = re.search(r"bottleneck_\w+?_kernel", mangled)
    return match[0] if match else None
