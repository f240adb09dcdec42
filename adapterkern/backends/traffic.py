"""What one launch moves, by arithmetic over its plan: the terms of a prediction, no measurement.

Each backend's `traffic` module lists the kernels that its plans launch as `Traffic`, and
`python -m benchmarks model` turns these into predicted times.
"""

from collections.abc import Sequence
from typing import NamedTuple

from adapterkern.grouped.call import TILE

# What an L2 of 50 MB keeps of one kernel's input for a second read: its two partitions hold copies
# of each other's lines, and outputs pass through it too. An assumption that a GPU has to confirm.
L2_KEEPS = 30e6
INDEX, ENTRY = 4, 12  # bytes of a token in a routing's `order`, and of a row of its `tiles`


class Traffic(NamedTuple):
    """The work of one kernel.

    kernel: its name; blocks: thread blocks (in Triton programs) of the launch; per_sm: blocks that
    an SM runs at once.
    memory: bytes to and from HBM; loads, stores: bytes that SMs load and store, in HBM or in L2.
    in_flight: bytes of loads that one block keeps under way; shared_cycles: cycles of all blocks'
    accesses to shared memory, 128 bytes each; flops: those of the products; waits: seconds in which
    a block waits for others and nothing else goes on.
    """

    kernel: str
    blocks: int
    per_sm: int
    memory: float
    loads: float
    stores: float
    in_flight: float
    shared_cycles: float = 0.0
    flops: float = 0.0
    waits: float = 0.0


class Batch(NamedTuple):
    """Who takes what: the tokens of each slot, and those without an adapter."""

    groups: tuple[int, ...]
    rest: int = 0

    @property
    def used(self) -> int:
        """The adapters that some token takes."""
        return sum(count > 0 for count in self.groups)

    @property
    def taken(self) -> int:
        """The tokens that take one."""
        return sum(self.groups)

    def row_blocks(self, block_t: int) -> int:
        """The row blocks of all adapters."""
        return sum(-(-count // block_t) for count in self.groups)

    def segments(self, chunk_rows: int) -> list[int]:
        """Into how many segments the chunks cut the rows of each slot."""
        found, begin = [], 0
        for count in self.groups:
            end = begin + -(-count // TILE) * TILE
            found.append((end - 1) // chunk_rows - begin // chunk_rows + 1 if count else 0)
            begin = end
        return found


def misses(resident_bytes: float) -> float:
    """The fraction of a second read that comes from HBM, if so many bytes were read in between."""
    return max(0.0, 1.0 - L2_KEEPS / resident_bytes) if resident_bytes else 0.0


def total(kernels: Sequence[Traffic], field: str) -> float:
    """The sum of one field over the kernels of a call."""
    return sum(getattr(kernel, field) for kernel in kernels)
