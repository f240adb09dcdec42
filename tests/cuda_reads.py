"""What compiled kernels read of the structs of csrc/params.h, in machine code and in PTX."""

import re
from collections.abc import Iterable
from typing import NamedTuple

import cuda_sass
from sass import Instruction

from adapterkern.backends.cuda.params import (
    BackwardParams,
    ForwardParams,
    GroupedForwardParams,
    View,
)

# Where the parameters of a kernel start in the bank of constants, by the generation.
FIRST = {"sm_8": 0x160, "sm_9": 0x210}
_OPERAND = re.compile(r"c\[0x0\]\[([^\]]+)\]")
_FUNCTION = re.compile(r"^(?:\.\w+ )*\.(?:entry|func)\b(?: \(.*?\))? (\w+)", re.MULTILINE)
_DEFINITION = re.compile(
    r"^\s*(?:@!?%p\d+\s+)?(\w[\w.:]*)\s+(%rd\d+),\s*([^;,]+)(?:,\s*([^;]+))?;", re.MULTILINE
)
_LOAD = re.compile(r"ld\.param\.\S+\s+[^\[]+\[([\w%$]+)(?:\+(-?\d+))?\]")


class Reads(NamedTuple):
    """words: such as "x.data", of views alone; computed: reads at addresses of registers whose
    value depends on more than the parameters' own address, so that they could be of any word."""

    words: frozenset[str]
    computed: tuple[str, ...]

    @classmethod
    def at(cls, mangled: str, offsets: Iterable[int], computed: Iterable[str]) -> "Reads":
        kind = ForwardParams if "ForwardI" in mangled else BackwardParams
        names = _names(GroupedForwardParams if "grouped" in mangled else kind)
        found = {names[offset // 8] for offset in offsets}
        return cls(frozenset(name for name in found if "." in name), tuple(computed))

    def by_view(self) -> set[str]:
        """Such as "x:dts", for the data, the type and the stride of x."""
        views = {word.partition(".")[0] for word in self.words}
        parts = {"d": "data", "t": "type", "s": "stride"}
        return {
            f"{v}:{''.join(k for k, part in parts.items() if f'{v}.{part}' in self.words)}"
            for v in views
        }


def of_machine_code(mangled: str, code: Iterable[Instruction], first: int) -> Reads:
    """Reads of the constant bank from `first` on."""
    offsets, computed = [], []
    for instruction in code:
        for operand in _OPERAND.findall(instruction.text):
            if not operand.startswith("0x"):
                computed.append(instruction.text)
            elif int(operand, 16) >= first:
                offsets.append(int(operand, 16) - first)
    return Reads.at(mangled, offsets, computed)


def of_ptx(mangled: str, body: str) -> Reads:
    """Reads by ld.param, whose address is the parameter's plus a number, or a register's."""
    definitions: dict[str, list[tuple[str, ...]]] = {}
    for opcode, target, *operands in _DEFINITION.findall(body):
        definitions.setdefault(target, []).append((opcode, *operands))

    def offset_of(base: str) -> int | None:
        if base == f"{mangled}_param_0":
            return 0
        match definitions.get(base):
            case [("mov.b64" | "mov.u64", other, "")]:
                return offset_of(other)
            case [("add.s64", other, number)] if re.fullmatch(r"-?\d+", number):
                offset = offset_of(other)
                return None if offset is None else offset + int(number)
        return None

    offsets, computed = [], []
    for load in _LOAD.finditer(body):
        base, number = load.groups(default="0")
        if base.startswith("retval"):
            continue
        offset = offset_of(base)
        if offset is None:
            computed.append(load[0])
        else:
            offsets.append(offset + int(number))
    return Reads.at(mangled, offsets, computed)


def of(arch: str) -> dict[str, Reads]:
    """Map the adapter kernels (mangled) of the extension's code for an architecture to reads."""
    if arch.startswith("compute_"):
        text = cuda_sass.cuobjdump("--dump-ptx", "--gpu-architecture", f"sm_{arch[8:]}")
        _, *parts = _FUNCTION.split(text)
        bodies = zip(parts[::2], parts[1::2], strict=True)
        return {name: of_ptx(name, body) for name, body in bodies if cuda_sass.kernel_name(name)}
    first = FIRST[arch[:4]]
    return {
        name: of_machine_code(name, code, first)
        for name, code in cuda_sass.sass(arch).items()
        if cuda_sass.kernel_name(name)
    }


def _names(kind: type) -> list[str]:
    """The names of the struct's words of 8 bytes, those of views with a dot."""
    names: list[str] = []
    for name, field in kind.__annotations__.items():
        parts = ("data", "type", "stride") if field == View else ()
        names += [f"{name}.{part}" for part in parts] or [name]
    return names
