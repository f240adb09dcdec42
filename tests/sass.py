"""A reader of machine code: its loops, what they load and compute, and how many loads they await.

`cuobjdump -sass`, from Triton's wheel, prints one instruction a line. A loop is what lies between a
branch backwards and its target. `ptxas` puts rare paths behind the end of a kernel, so an outer
loop may span it all: gates ask for the innermost.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?([^;]+?)\s*;", re.MULTILINE)
_REGISTER = re.compile(r"\bR(\d+)\b")
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
    def registers(self) -> list[int]:
        """The general registers that it names, in order; a wide operand by its first alone."""
        return [int(number) for number in _REGISTER.findall(self.text)]

    @property
    def target(self) -> int | None:
        """The address that it branches to, if it is a branch."""
        found = re.search(r"(0x[0-9a-f]+)", self.text) if self.name == "BRA" else None
        return int(found[1], 16) if found else None

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

    instructions: Sequence[Instruction]

    @property
    def span(self) -> tuple[int, int]:
        return self.instructions[0].address, self.instructions[-1].address

    def count(self, *names: str) -> int:
        return count(self.instructions, *names)

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
        for instruction in [*self.instructions] * 2:  # round the loop, since loads may run ahead
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


def count(instructions: Sequence[Instruction], *names: str) -> int:
    """The number of instructions of these names, LDG counting every LDG.*; of all without names."""
    return sum(not names or each.name in names for each in instructions)


def parse(code: str) -> list[Instruction]:
    """The instructions of one kernel."""
    found = _LINE.findall(code)
    assert found, f"no instruction in {code[:200]!r}"
    return [Instruction(int(address, 16), text) for address, text in found]


def loops(instructions: Sequence[Instruction]) -> list[Loop]:
    """Every loop, the inner ones of a nest too; not the trap behind a kernel's end, which branches
    to itself.
    """
    found = []
    for end, branch in enumerate(instructions):
        if branch.target is not None and branch.target < branch.address:
            body = [each for each in instructions[: end + 1] if each.address >= branch.target]
            found.append(Loop(body))
    return found


def innermost_loops(instructions: Sequence[Instruction]) -> list[Loop]:
    """The loops that contain no other one."""
    every = loops(instructions)

    def contains(outer: Loop, inner: Loop) -> bool:
        (start, end), (first, last) = outer.span, inner.span
        return outer is not inner and start <= first and last <= end

    return [loop for loop in every if not any(contains(loop, other) for other in every)]
