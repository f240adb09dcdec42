"""What a plan of launches depends on: the device, the call, and the shapes of the compiled kernels,
which the extension tells; csrc/facts.h describes their fields.
"""

from dataclasses import dataclass
from typing import NamedTuple

SMALL_MEMORY = 99 * 1024  # bytes of shared memory that a block has on every GPU from 8.0 on
LARGE_MEMORY = 227 * 1024  # on compute capability 9.0 and 10.x, with code for them
PANEL = 64  # features; slices of H are multiples of it


@dataclass(frozen=True)
class Device:
    """The properties of a GPU on which a configuration may depend."""

    num_sms: int
    cluster_memory: int = 0  # bytes of shared memory of a block in a cluster; 0: no clusters
    memory: int = SMALL_MEMORY  # bytes of shared memory of a block
    cluster_sizes: tuple[int, ...] | None = None  # those that it can place; None: all
    warpgroups: bool = False  # whether it runs code for 9.0a, whose warpgroups multiply by wgmma

    @property
    def block_memory(self) -> int:
        """The shared memory that one block can have."""
        return max(self.memory, self.cluster_memory)


class Problem(NamedTuple):
    """The properties of a call on which its launch depends."""

    num_tokens: int
    hidden_size: int
    bottleneck_size: int
    half: bool  # products in float16 or bfloat16
    added: int = 1  # tiles of rows that are added to the output: float32 beside half counts twice
    # Of them those that are not the rows of the product; None: the resident form has no copies for
    # the call's tensors.
    beside: int | None = None


class RowBlockFacts(NamedTuple):
    """One shape of the row-block and split forms; csrc/facts.h describes the fields."""

    half: bool
    width: int
    large: bool
    tokens: int
    threads: int
    blocks_per_sm: int
    least_bytes: int
    in_bytes: int
    out_bytes: int
    added_bytes: int
    beside_bytes: int

    def bytes_for(self, stages: int, added: int) -> int:
        """The shared memory of a block whose pipelines have so many stages."""
        out = self.beside_bytes + stages * (self.out_bytes + added * self.added_bytes)
        return max(self.least_bytes, stages * self.in_bytes, out)


class ClusterFacts(NamedTuple):
    """One shape of the cluster form."""

    width: int
    tokens: int
    threads: int
    panel_bytes: int
    beside_bytes: int
    norm_panel_bytes: int
    norm_beside_bytes: int

    def bytes_for(self, features: int, norm: bool = False) -> int:
        """The shared memory of a block that has so many features, and their norm."""
        panels = features // PANEL
        of_norm = panels * self.norm_panel_bytes + self.norm_beside_bytes if norm else 0
        return panels * self.panel_bytes + self.beside_bytes + of_norm


class ResidentFacts(NamedTuple):
    """The one shape of the resident form."""

    width: int
    tokens: int
    threads: int
    tile_bytes: int
    panel_bytes: int  # beside the tiles, for each panel of features
    beside_bytes: int  # and for all of them
    slots_in: int
    slots_out: int  # if nothing is added but the rows of the product
    slots_out_beside: int  # if something is, which then stands in the slot

    def row_slots(self, memory: int, panels: int, beside: int) -> int:
        """The tiles of rows for which a block's shared memory has room."""
        out = self.slots_out_beside * (1 + beside) if beside else self.slots_out
        left = memory - self.beside_bytes - panels * self.panel_bytes
        return left // self.tile_bytes - self.slots_in - out


class GradientFacts(NamedTuple):
    """One shape of the weight gradients."""

    half: bool
    units: int
    features: int
    stage_bytes: int


class Facts(NamedTuple):
    """The shapes of the compiled kernels."""

    most_stages: int
    row_blocks: tuple[RowBlockFacts, ...]
    grouped: tuple[RowBlockFacts, ...]  # the tiles of many adapters
    clusters: tuple[ClusterFacts, ...]
    gradients: tuple[GradientFacts, ...]
    resident: ResidentFacts

    def row_block(self, problem: Problem, device: Device) -> RowBlockFacts:
        """The narrowest shape that holds R, with the largest tiles that the device has room for."""
        large = device.block_memory >= LARGE_MEMORY
        fits = [
            fact
            for fact in self.row_blocks
            if fact.half == problem.half
            and problem.bottleneck_size <= fact.width
            and fact.large <= large
        ]
        return min(fits, key=lambda fact: (fact.width, not fact.large))

    def cluster(self, problem: Problem, tokens: int) -> ClusterFacts | None:
        """The narrowest shape of so many tokens that holds R, if there is one."""
        fits = [
            fact
            for fact in self.clusters
            if problem.half and problem.bottleneck_size <= fact.width and fact.tokens == tokens
        ]
        return min(fits, default=None)

    def gradient(self, problem: Problem) -> GradientFacts:
        """The narrowest shape that holds R in one tile, or the widest, of which R takes more."""
        ours = sorted(fact for fact in self.gradients if fact.half == problem.half)
        return next((fact for fact in ours if problem.bottleneck_size <= fact.units), ours[-1])


def read_facts(told: tuple) -> Facts:
    """The facts as `adapterkern._cuda.facts` tells them."""
    panel, most_stages, row_blocks, grouped, clusters, gradients, resident = told
    assert panel == PANEL
    return Facts(
        most_stages,
        tuple(RowBlockFacts(*row) for row in row_blocks),
        tuple(RowBlockFacts(*row) for row in grouped),
        tuple(ClusterFacts(*row) for row in clusters),
        tuple(GradientFacts(*row) for row in gradients),
        ResidentFacts(*resident),
    )
