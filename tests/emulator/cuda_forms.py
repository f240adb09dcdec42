"""The forms of the CUDA kernels, and the smallest problems that show each at work."""

from dataclasses import dataclass, replace

import torch

from adapterkern.backends.cuda.facts import Device

CLUSTER_MEMORY = 227 * 1024  # of compute capability 9.0
RESIDENT = Device(8, CLUSTER_MEMORY, CLUSTER_MEMORY, warpgroups=True)
WITHOUT_CLUSTERS = Device(1, CLUSTER_MEMORY, cluster_sizes=())  # as a part of such a GPU may be


@dataclass(frozen=True)
class Form:
    """A problem, and a device on which it takes one form of the kernels."""

    device: Device
    tokens: int
    hidden: int
    bottleneck: int
    feature_slices: int = 0  # of H; 0: the row-block form
    cluster_tokens: int = 0  # 0: not the cluster form
    token_slices: bool = False  # more than one slice of the tokens, in the weight gradients
    resident: bool = False
    large_tiles: bool = False
    token_stages: int = 3  # of the weight gradients

    @property
    def scaling(self) -> str:
        """The most that a scaling can be: the resident form has no backward for one per channel."""
        return "learned" if self.resident else "channel"

    @property
    def sizes(self) -> dict:
        return {
            "shape": (self.tokens,),
            "hidden_size": self.hidden,
            "bottleneck_size": self.bottleneck,
        }

    def takes(self, dtype: torch.dtype) -> bool:
        """Whether the form has this dtype: those of newer GPUs are for halves."""
        return dtype.itemsize == 2 or not (self.cluster_tokens or self.large_tiles or self.resident)


# No size divides evenly into tiles. The resident form needs whole vectors: its blocks walk over
# three tiles, and of the eight in a cluster the last two have no features. One cluster walks over
# three blocks of tokens; of the four blocks of the next one the last has no features; the last form
# is as wide as clusters get. Two forms have the large tiles of the GPUs with clusters. The first
# takes six steps, so that its five stages are used again.
FORMS = {
    "row_block": Form(Device(1), 70, 331, 20),
    "row_block_wide": Form(Device(1), 37, 70, 150),
    "row_block_large": Form(WITHOUT_CLUSTERS, 150, 202, 60, large_tiles=True, token_stages=6),
    "split": Form(Device(64), 37, 70, 20, feature_slices=1),
    "split_over_h": Form(Device(64), 5, 530, 20, feature_slices=3),
    "split_large": Form(
        replace(WITHOUT_CLUSTERS, num_sms=6),
        137,
        1290,
        60,
        feature_slices=3,
        large_tiles=True,
        token_stages=6,
    ),
    "token_slices": Form(Device(8), 530, 33, 9, token_slices=True),
    "many_stages": Form(
        Device(12, memory=CLUSTER_MEMORY), 530, 72, 20, token_slices=True, token_stages=6
    ),
    "resident": Form(
        replace(RESIDENT, num_sms=2), 150, 200, 24, feature_slices=2, resident=True, token_stages=6
    ),
    "resident_of_four": Form(
        replace(RESIDENT, cluster_sizes=(4,)),
        150,
        520,
        24,
        feature_slices=4,
        resident=True,
        token_stages=6,
    ),
    "resident_of_eight": Form(
        replace(RESIDENT, cluster_sizes=(8,)),
        150,
        1032,
        64,
        feature_slices=8,
        resident=True,
        token_stages=6,
    ),
    "cluster": Form(
        Device(1, CLUSTER_MEMORY), 150, 300, 20, feature_slices=2, cluster_tokens=64, token_stages=6
    ),
    "cluster_few": Form(
        Device(14, CLUSTER_MEMORY), 37, 530, 20, feature_slices=4, cluster_tokens=16, token_stages=6
    ),
    "cluster_of_eight": Form(
        Device(18, CLUSTER_MEMORY),
        20,
        1030,
        100,
        feature_slices=8,
        cluster_tokens=16,
        token_stages=6,
    ),
}
