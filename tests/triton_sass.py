"""A reader of machine code: its loops, what they load and compute, and how many loads they await.

`cuobjdump -sass`, from Triton's wheel, prints one instruction a line. A loop is what lies between a
branch backwards and its target.
"""

import functools
import re
import subprocess
import tempfile
from collections import Counter
from typing import NamedTuple

from adapterkern.backends.triton.compile_only import CUOBJDUMP

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,6})\*/\s+(.*?)\s*;", re.MULTILINE)
_GUARD = re.compile(r"^@!?U?P\w+ ")
_REGISTER = re.compile(r"\bR(\d+)\b")
_WGMMA = re.compile(r"HGMMA\.64x\d+x\d+\S* R\d+, (R(\d+)|gdesc)")
_WGMMA_WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x[0-9a-f]+)")
_ASYNC_WAIT = re.compile(r"DEPBAR\.LE SB0, (0x[0-9a-f]+)")
# Their first register is read, not written; or they write none.
_NO_RESULT = ("ST", "LDGSTS", "RED", "BAR", "BRA", "DEPBAR", "LDGDEPBAR", "WARPGROUP", "HGMMA")
# Writers of more than one register: a load's width in bits, four registers of ldmatrix and so on.
_WIDTHS = ((".128", 4), (".64", 2), (".M88.4", 4), (".MT88.4", 4), (".M88.2", 2), (".MT88.2", 2))


class Instruction(NamedTuple):
    """One instruction. text: without its guard, such as "LDG.E.128 R4, desc[UR4][R2.64]"."""

    address: int
    text: str

    @property
    def opcode(self) -> str:
        return self.text.split()[0]

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.split(".")[0]

    @property
    def width(self) -> int:
        """Bytes a thread moves, of a load or a copy."""
        found = re.search(r"\.(128|64)\b", self.opcode)
        if found is not None:
            return int(found[1]) // 8
        return 1 if ".U8" in self.opcode else 2 if ".U16" in self.opcode else 4

    def written(self) -> set[int]:
        """The registers whose content the instruction replaces, as far as is seen here."""
        if self.name.startswith(_NO_RESULT):
            return set()
        target = re.match(r"\S+ R(\d+)\b", self.text)
        if target is None:
            return set()
        if self.name == "HMMA":
            width = 4 if ".F32" in self.opcode else 2
        else:
            width = next((count for mark, count in _WIDTHS if mark in self.opcode), 1)
        return set(range(int(target[1]), int(target[1]) + width))

    def read(self) -> set[int]:
        """The registers that the operands behind the first name: the least that it reads."""
        operands = self.text.partition(",")[2] if self.written() else self.text
        return {int(number) for number in _REGISTER.findall(operands)}


class Loop(NamedTuple):
    """The instructions from a branch's target to the branch."""

    instructions: list[Instruction]

    def count(self, *names: str) -> int:
        return sum(instruction.name in names for instruction in self.instructions)

    def named(self, name: str) -> list[Instruction]:
        return [instruction for instruction in self.instructions if instruction.name == name]

    @property
    def stages_in_flight(self) -> int:
        """How many groups of asynchronous copies are on their way while the loop computes: those
        that its longest wait leaves, 0 without such a wait."""
        waits = [_ASYNC_WAIT.search(one.text) for one in self.instructions]
        return max((int(wait[1], 16) for wait in waits if wait is not None), default=0)

    def loads_before_use(self) -> int:
        """The most plain global loads that are under way before one of their results is read."""
        most, pending = 0, set[int]()
        count = 0
        for instruction in self.instructions * 2:  # round the loop, since loads may run ahead
            if instruction.name == "LDG":
                count += 1
                pending |= instruction.written()
                most = max(most, count)
            elif instruction.read() & pending:
                count, pending = 0, set()
        return most

    def summary(self) -> str:
        first, last = self.instructions[0].address, self.instructions[-1].address
        counts = Counter(instruction.name for instruction in self.instructions)
        shown = ", ".join(
            f"{name} {counts[name]}"
            for name in (
                *("HGMMA", "HMMA", "UTCHMMA", "FFMA", "FADD", "FMUL", "LDGSTS", "LDG", "STG"),
                *("LDS", "LDSM", "STS", "STSM", "BAR", "WARPGROUP", "MUFU", "SHFL", "LDL", "STL"),
            )
            if counts[name]
        )
        widths = sorted({one.width for one in self.named("LDGSTS") + self.named("LDG")})
        return (
            f"{first:#x}-{last:#x}: {len(self.instructions)} instructions; {shown}; load widths "
            f"{widths}, {self.stages_in_flight} stages in flight, {self.loads_before_use()} loads"
        )


@functools.lru_cache(maxsize=64)
def disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def parse(code: str) -> list[Instruction]:
    found = _LINE.findall(code)
    assert found, f"no instruction in {code[:200]!r}"
    return [Instruction(int(address, 16), _GUARD.sub("", text)) for address, text in found]


def loops(instructions: list[Instruction]) -> list[Loop]:
    """Return every loop, the inner ones of a nest too; not the trap behind a kernel's end, which
    branches to itself."""
    found = []
    for last in instructions:
        target = re.search(r"^BRA\S* .*?(0x[0-9a-f]+)$", last.text)
        if target is not None and int(target[1], 16) < last.address:
            first = int(target[1], 16)
            body = [one for one in instructions if first <= one.address <= last.address]
            found.append(Loop(body))
    return found


def hazards(instructions: list[Instruction]) -> list[str]:
    """Return the writes to registers that a wgmma which is still under way may read.

    A warpgroup's wgmma reads its A operand from registers at any time until the wait that covers
    it, and ptxas before 13.3 does not keep other writes away (triton-lang/triton#9433). Loops are
    gone round twice, so that what one iteration leaves under way meets the next.
    """
    found = []
    for loop in loops(instructions):
        pending: list[set[int]] = []
        for instruction in loop.instructions * 2:
            issued = _WGMMA.search(instruction.text)
            waited = _WGMMA_WAIT.search(instruction.text)
            if issued is not None:
                first = issued[2]
                pending.append(set() if first is None else set(range(int(first), int(first) + 4)))
            elif waited is not None:
                left = int(waited[1], 16)
                pending = pending[-left:] if left else []
            elif any(operands & instruction.written() for operands in pending):
                found.append(f"{instruction.address:#x}: {instruction.text}")
    return list(dict.fromkeys(found))
