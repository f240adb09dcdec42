"""The configuration that a user sets and that `adapter_config.json` holds."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from peft.config import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from adapterkern import __version__
from adapterkern.integrations.peft.checkpoint import CONTAINER, METHOD, SavedWeights
from adapterkern.integrations.peft.saving import staged
from adapterkern.modules.bottleneck import REDUCTION_FACTOR, BottleneckAdapter

PLACEMENTS = ("houlsby", "pfeiffer", "parallel")


def _must_be_local(folder: str) -> bool:
    """Whether this cannot be the name of a model on the hub, which has one slash at the most."""
    return (
        os.path.isdir(folder) or folder.startswith((".", "~")) or folder.rstrip("/").count("/") > 1
    )


def _is_layer(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0


def _check_expression(name: str, value: object) -> None:
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(
                f"{name}={value!r} is no regular expression: {error}.\n"
                "  hint: give the suffixes of names as a list"
            ) from error


class PeftMethod(str, Enum):
    """The method's name in PEFT, which compares it as a string and reads its `.value`."""

    BOTTLENECK = METHOD


@dataclass
class BottleneckConfig(PeftConfig):
    """Bottleneck adapters (Houlsby et al. 2019) for `peft.get_peft_model`.

    Every targeted linear layer is followed by an adapter: y = base_layer(x), then
    y + scaling * up(act(down(y))). By default these layers are the output projections of attention
    (self and cross) and of the feed-forward blocks (FFN) in all parts of a model, so an adapter
    comes before the dropout and the residual add of its sublayer. They are found by the structure
    of the model; where that is unclear, an error asks for `target_modules`. Experts get no
    adapters, only the dense parts beside them. Layers that share their weights, as all of ALBERT
    do, share the adapter.

    Args:
        placement: "houlsby" (after attention and after the FFN), "pfeiffer" (after the FFN alone)
            or "parallel" (beside the FFN, He et al. 2021: FFN(x) + scaling * up(act(down(x))); x is
            what the FFN reads, in pre-LN models the normed input). AdapterHub's par_bn for a
            post-LN model is "parallel" with reduction_factor=2, activation="relu" and scaling=4.0.
        target_modules: the linear layers to adapt: a list of name suffixes, a regular expression
            for whole names, or "all-linear"; None takes those of the placement. With "parallel"
            each must be the last layer of an FFN; else an adapter follows each.
        exclude_modules: layers to leave out: a list of name suffixes or a regular expression.
        bottleneck_size: R, the width inside the adapter.
        reduction_factor: H / R for layers of width H; 16 if `bottleneck_size` is not given either.
        activation, bias, scaling, dropout, init: as in `adapterkern.BottleneckAdapter`.
        layers_to_transform: index or indices of the layers to adapt, counted from 0 (an int, list,
            tuple, range or set; kept as a list); `target_modules` must then be a list or None.
        layers_pattern: name(s) of the module list that `layers_to_transform` counts, such as
            "layers" or "h".
        modules_to_save: modules trained and saved in full beside the adapters, such as a
            classification head.

    The remaining arguments are those of `peft.PeftConfig`. `saved_with` is for files alone: there
    it names the import that loading needs, the version, and the number of the save.

    Raises:
        TypeError, ValueError: both sizes are given, `BottleneckAdapter` refuses a value, or the
            layer indices are invalid or do not go with the target modules.
    """

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": 'Layers to adapt: name suffixes, a regular expression or "all-linear".'},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Layers to leave out: suffixes or a regular expression."}
    )
    bottleneck_size: int | None = field(
        default=None, metadata={"help": "Width inside the adapter."}
    )
    reduction_factor: float | None = field(
        default=None, metadata={"help": "Width of the layer over that inside the adapter; 16."}
    )
    activation: str = field(default="gelu", metadata={"help": "Activation inside the adapter."})
    bias: bool = field(default=True, metadata={"help": "Whether the adapter has biases."})
    scaling: float | str = field(
        default=1.0, metadata={"help": 'A number, "learned" or "channel".'}
    )
    dropout: float = field(default=0.0, metadata={"help": "Dropout on what the adapter adds."})
    init: str = field(default="identity", metadata={"help": '"identity", "houlsby" or "bert".'})
    layers_to_transform: Iterable[int] | int | None = field(
        default=None, metadata={"help": "Index or indices of the layers to adapt."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name(s) of the list that layers_to_transform counts."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained and saved in full beside the adapters."}
    )
    placement: str = field(
        default="houlsby", metadata={"help": '"houlsby", "pfeiffer" or "parallel".'}
    )
    saved_with: Any = field(
        default=None, repr=False, metadata={"help": "Written by saving; leave it None."}
    )

    def __post_init__(self) -> None:
        """Complete and check the fields, so that a mistake shows where it was made."""
        super().__post_init__()
        self.peft_type = PeftMethod.BOTTLENECK
        # Not a field, so not saved: what the weights beside the file that was read say, which is
        # compared with a model before the weights are loaded into it.
        self.saved = self.saved_with if isinstance(self.saved_with, SavedWeights) else None
        self.saved_with = None
        if self.placement not in PLACEMENTS:
            raise ValueError(
                f"placement must be one of {', '.join(PLACEMENTS)}, got {self.placement!r}."
            )
        if self.bottleneck_size is None and self.reduction_factor is None:
            self.reduction_factor = REDUCTION_FACTOR
        if not isinstance(self.bias, bool):
            raise ValueError(
                f"bias says whether the adapter has biases: True or False, got {self.bias!r}.\n"
                "  hint: the base model's biases stay frozen; modules_to_save can train modules"
            )
        if isinstance(self.modules_to_save, str):
            raise TypeError(f"modules_to_save must be a list, got {self.modules_to_save!r}.")
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            if isinstance(getattr(self, name), set | tuple):
                setattr(self, name, sorted(getattr(self, name)))
        for name in ("target_modules", "exclude_modules"):
            _check_expression(name, getattr(self, name))
        self._check_layer_indices()
        # This refuses values that no layer could have.
        BottleneckAdapter(REDUCTION_FACTOR, **self.adapter_arguments(), device="meta")

    def _check_layer_indices(self) -> None:
        layers = self.layers_to_transform
        if layers is not None:
            numbers = [layers] if isinstance(layers, int) else layers
            if not isinstance(numbers, Iterable) or not all(_is_layer(one) for one in numbers):
                raise TypeError(
                    "layers_to_transform must be the number of a layer, counted from 0, or several "
                    f"in a list, tuple, range or set, got {layers!r}."
                )
            self.layers_to_transform = sorted(set(numbers))
            if not self.layers_to_transform:
                raise ValueError(
                    "layers_to_transform is empty, and no layer would be adapted.\n"
                    "  hint: None adapts all of them"
                )
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                f"layers_to_transform needs target_modules as a list, got {self.target_modules!r}."
                "\n  hint: write the layer indices into the regular expression"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r} names the list that layers_to_transform "
                "counts, and that is None.\n  hint: set layers_to_transform=[...]"
            )

    def exclude(self, suffixes: list[str]) -> None:
        """Leave out layers beside those that `exclude_modules` leaves out."""
        if suffixes and isinstance(self.exclude_modules, str):
            names = "|".join(map(re.escape, suffixes))
            self.exclude_modules = rf"(?:{self.exclude_modules})|(?:.*\.)?(?:{names})"
        elif suffixes:
            self.exclude_modules = sorted({*(self.exclude_modules or []), *suffixes})

    def adapter_arguments(self) -> dict[str, Any]:
        """Keyword arguments of `BottleneckAdapter`, all but the hidden size."""
        arguments: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("bottleneck_size", "activation", "bias", "scaling", "dropout", "init")
        }
        if self.reduction_factor is not None:
            arguments["reduction_factor"] = self.reduction_factor
        return arguments

    def check_sizes(self, saved: SavedWeights) -> None:
        """Compare the widths with those of the saved weights, before memory is taken for any.

        Raises:
            ValueError: they differ.
        """
        for key, shape in saved.shapes.items():
            if not key.endswith(f".{CONTAINER}.down_proj.weight") or len(shape) != 2:
                continue  # other shapes are compared with those of a model
            width: int | float | None = self.bottleneck_size
            if width is None:
                assert self.reduction_factor is not None  # __post_init__ has set one of the two
                width = max(1.0, shape[1] // self.reduction_factor)
            if width != shape[0]:
                raise ValueError(
                    f"bottleneck_size {self.bottleneck_size} and reduction_factor "
                    f"{self.reduction_factor} do not fit {key} of shape {list(shape)}"
                )

    def to_dict(self) -> dict[str, Any]:
        """The fields, and how to load them."""
        return {
            **super().to_dict(),
            "saved_with": {
                "import": __package__,
                "library": f"adapterkern {__version__}",
            },
        }

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json` in one step: a reader finds the old file or the new one."""
        with staged(save_directory) as fresh:
            super().save_pretrained(fresh, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> "BottleneckConfig":
        """Read a saved configuration; a local folder of a saved adapter must be complete.

        Raises:
            ValueError: there is no configuration, or the weights of a saved adapter are missing or
                cut short.
        """
        folder = os.path.join(pretrained_model_name_or_path, subfolder or "")
        if _must_be_local(folder) and not os.path.isfile(os.path.join(folder, CONFIG_NAME)):
            found = "no such folder" if not os.path.isdir(folder) else f"no {CONFIG_NAME} in it"
            raise ValueError(
                f"{folder} must be the folder of a saved adapter, with {CONFIG_NAME} and "
                f"{SAFETENSORS_WEIGHTS_NAME}: {found}.\n"
                "  hint: save_pretrained writes one, and a subfolder for each adapter that is not "
                'called "default"; a save that was cut off leaves no configuration'
            )
        config = super().from_pretrained(
            pretrained_model_name_or_path, subfolder=subfolder, **kwargs
        )
        # PeftModel.save_pretrained sets inference_mode. A configuration saved on its own has no
        # weights beside it.
        ours = isinstance(config, BottleneckConfig)  # PEFT reads those of every method
        if ours and os.path.isdir(folder) and config.inference_mode and config.saved is None:
            raise ValueError(
                f"{folder} has the configuration of a saved adapter but no "
                f"{SAFETENSORS_WEIGHTS_NAME}.\n"
                "  hint: copy the whole folder, or save the adapter again"
            )
        return config
