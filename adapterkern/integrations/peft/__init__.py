"""Bottleneck adapters as a PEFT method: importing this package registers it, as type "BOTTLENECK".

    from adapterkern.integrations.peft import BottleneckConfig
    model = peft.get_peft_model(model, BottleneckConfig(reduction_factor=16))

Saved folders load with `PeftModel.from_pretrained` wherever this package was imported first.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

try:
    from peft import PeftModel, mapping
    from peft.config import PeftConfigMixin
    from peft.tuners.tuners_utils import BaseTuner
except ImportError as error:
    raise ImportError(
        "adapterkern.integrations.peft needs peft and transformers, and one of them is missing.\n"
        '  hint: pip install "peft>=0.21" transformers'
    ) from error
if not hasattr(BaseTuner, "_remap_adapter_state_dict_for_load"):
    raise ImportError(
        "adapterkern.integrations.peft needs peft >= 0.21, whose tuners name the keys they save.\n"
        '  hint: pip install --upgrade "peft>=0.21"'
    )

from adapterkern.integrations.peft.adapterhub import from_adapterhub, to_adapterhub
from adapterkern.integrations.peft.config import BottleneckConfig, PeftMethod
from adapterkern.integrations.peft.layer import BottleneckLinear
from adapterkern.integrations.peft.loading import adapters_in
from adapterkern.integrations.peft.model import BottleneckModel
from adapterkern.integrations.peft.model_card import describe
from adapterkern.integrations.peft.offload import update_offload_index
from adapterkern.integrations.peft.reading import read_settings
from adapterkern.integrations.peft.saving import staged

__all__ = [
    "BottleneckConfig",
    "BottleneckLinear",
    "BottleneckModel",
    "adapters_in",
    "from_adapterhub",
    "to_adapterhub",
]


def _register() -> None:
    """Enter the method into PEFT's tables, which accept any str-enum beside their own."""
    method = PeftMethod.BOTTLENECK
    configs: dict[Any, Any] = mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    tuners: dict[Any, Any] = mapping.PEFT_TYPE_TO_TUNER_MAPPING
    prefixes: dict[Any, str] = mapping.PEFT_TYPE_TO_PREFIX_MAPPING
    taken = configs.get(method, BottleneckConfig)
    if taken.__module__ != BottleneckConfig.__module__:
        raise ImportError(
            f'PEFT already has a method "{method.value}", from {taken.__module__}.\n'
            "  hint: use that one, or do not import it together with adapterkern.integrations.peft"
        )
    configs[method] = BottleneckConfig
    tuners[method] = BottleneckModel
    prefixes[method] = BottleneckModel.prefix
    save, read = PeftModel.save_pretrained, PeftConfigMixin.__dict__["from_json_file"].__func__
    PeftModel.save_pretrained = _saving_whole(save)  # type: ignore[method-assign]
    update = getattr(PeftModel, "_update_offload", None)
    if update is not None:  # private: a PEFT without it may need no help, and the rest works
        PeftModel._update_offload = _finding_offloaded(update)  # type: ignore[method-assign]
    PeftConfigMixin.from_json_file = classmethod(_reading_checked(read))  # type: ignore[assignment]


def _saving_whole(save: Callable[..., None]) -> Callable[..., None]:
    """Make PEFT's `save_pretrained`, which writes file by file into the folder, a single step for
    the models of this method; PEFT has no hook for it.
    """

    @functools.wraps(save)
    def save_pretrained(self: PeftModel, save_directory: str, *args: Any, **options: Any) -> None:
        if not isinstance(self.base_model, BottleneckModel) or os.path.isfile(save_directory):
            return save(self, save_directory, *args, **options)
        with staged(save_directory) as folder:
            save(self, folder, *args, **options)
            describe(folder)

    return save_pretrained


def _finding_offloaded(update: Callable[..., Any]) -> Callable[..., Any]:
    """Make PEFT's bookkeeping of weights on the disk, which knows LoRA's names, know ours."""

    @functools.wraps(update)
    def _update_offload(self: PeftModel, *args: Any, **options: Any) -> Any:
        ours = isinstance(self.base_model, BottleneckModel)
        return (update_offload_index if ours else update)(self, *args, **options)

    return _update_offload


def _reading_checked(read: Callable[..., Any]) -> Callable[..., Any]:
    """Make PEFT's reading of `adapter_config.json`, with which every way of loading begins, look at
    the weights beside it too; PEFT has no hook for it.
    """

    @functools.wraps(read)
    def from_json_file(cls: type[PeftConfigMixin], path_json_file: str, **options: Any) -> Any:
        return read_settings(functools.partial(read, cls, **options), path_json_file)

    return from_json_file


_register()
