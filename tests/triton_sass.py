"""The machine code of Triton's kernels, and the hazard that ptxas leaves in it."""

import functools
import re
import subprocess
import tempfile

from sass import Instruction, loops

from adapterkern.backends.triton.compile_only import CUOBJDUMP

_WGMMA = re.compile(r"HGMMA\.64x\d+x\d+\S* R\d+, (R(\d+)|gdesc)")
_WGMMA_WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x[0-9a-f]+)")


@functools.lru_cache(maxsize=64)
def disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def hazards(instructions: list[Instruction]) -> list[str]:
    """Return the writes to registers that a wgmma which is still under way may read.

    A warpgroup's wgmma reads its A operand from registers at any time until the wait that covers
    it, and ptxas before 13.3 does not keep other writes away (triton-lang/triton#9433). Loops are
    gone round twice, so that what one iteration leaves under way meets the next.
    """
    found = []
    for loop in loops(instructions):
        pending: list[set[int]] = []
        for instruction in [*loop.instructions] * 2:
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
