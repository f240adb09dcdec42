"""The forms that the launch configuration can choose, each with sizes that make it do so."""

from dataclasses import dataclass

ONE_SM = 1  # every grid fills such a GPU: row blocks where R allows them, no slices
MANY_SMS = 10**6  # no grid fills it: the split form, as many slices as the sizes allow


@dataclass(frozen=True)
class Form:
    """One way in which the launch configuration runs a call, and sizes that make it do so."""

    num_sms: int
    tokens: int
    hidden_size: int
    bottleneck_size: int
    row_block: bool = False
    feature_slices: bool = False  # z and da in partial sums over slices of H
    token_slices: bool = False  # weight gradients in partial sums over slices of T

    @property
    def sizes(self) -> dict:
        return {
            "shape": (self.tokens,),
            "hidden_size": self.hidden_size,
            "bottleneck_size": self.bottleneck_size,
        }


FORMS = {
    "row_block": Form(ONE_SM, 137, 70, 20, row_block=True),
    "split": Form(MANY_SMS, 37, 70, 20),
    "split_features": Form(MANY_SMS, 19, 530, 20, feature_slices=True),
    "split_wide": Form(ONE_SM, 37, 75, 150),
    # Their sum has two tiles of units.
    "token_slices": Form(MANY_SMS, 530, 33, 20, token_slices=True),
}
