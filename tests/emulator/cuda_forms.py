"""The forms of the CUDA kernels, and the smallest problems that show each at work."""

from dataclasses import dataclass

import torch

from adapterkern.backends.cuda.launch_config import Device

CLUSTER_MEMORY = 227 * 1024  # of compute capability 9.0


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
    token_stages: int = 3  # of the weight gradients

    @property
    def sizes(self) -> dict:
        return {
            "shape": (self.tokens,),
            "hidden_size": self.hidden,
            "bottleneck_size": self.bottleneck,
        }

    def takes(self, dtype: torch.dtype) -> bool:
        """Whether the form has this dtype: clusters multiply in half precision alone."""
        return self.cluster_tokens == 0 or dtype.itemsize == 2


# No size divides evenly into tiles. One cluster walks over three blocks of tokens; of the four
# blocks of the next one the last has no features; the last form is as wide as clusters get.
FORMS = {
    "row_block": Form(Device(1), 70, 75, 20),
    "row_block_wide": Form(Device(1), 37, 70, 150),
    "split": Form(Device(64), 37, 70, 20, feature_slices=1),
    "split_over_h": Form(Device(64), 5, 530, 20, feature_slices=2),
    "token_slices": Form(Device(8), 530, 33, 9, token_slices=True),
    "many_stages": Form(
        Device(12, memory=CLUSTER_MEMORY), 530, 72, 20, token_slices=True, token_stages=6
    ),
    "cluster": Form(Device(2, CLUSTER_MEMORY), 150, 300, 20, feature_slices=2, cluster_tokens=64),
    "cluster_few": Form(
        Device(14, CLUSTER_MEMORY), 37, 530, 20, feature_slices=4, cluster_tokens=16
    ),
    "cluster_of_eight": Form(
        Device(18, CLUSTER_MEMORY), 20, 1030, 100, feature_slices=8, cluster_tokens=16
    ),
}
