"""The PEFT tuner puts adapters behind linear layers and tells PEFT what is special about them."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, _maybe_include_all_linear_layers
from peft.utils import get_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from adapterkern.integrations.peft.blocks import Blocks, find_blocks
from adapterkern.integrations.peft.checkpoint import (
    CONTAINER,
    mismatches,
    of_one_save,
    refusal,
    same_but_for_names,
    without_adapter_name,
)
from adapterkern.integrations.peft.layer import BASE, CANNOT_MERGE, BottleneckLinear
from adapterkern.integrations.peft.mixed_batch import adapter_names_in_forward, check_names
from adapterkern.integrations.peft.targets import (
    check_layers,
    check_modules_to_save,
    check_parallel,
    check_target,
    default_targets,
    report_suffixes,
)
from adapterkern.integrations.peft.weighted import combined_config, fill


class AdapterConfigs(dict):
    """Configurations by adapter name; a stack, a list of names, stands for its first adapter.

    `PeftModel.set_adapter` and `PeftModel.active_peft_config` look up the active one here.
    """

    def __contains__(self, name: object) -> bool:
        if isinstance(name, list | tuple):
            return bool(name) and all(one in self for one in name)
        return super().__contains__(name)

    def __getitem__(self, name: Any) -> Any:
        if isinstance(name, list | tuple):
            name = next((one for one in name if one in self), None)
        return super().__getitem__(name)


class BottleneckModel(BaseTuner):
    """A model whose targeted linear layers are `BottleneckLinear`s, as `get_peft_model` builds."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLinear
    blocks: Blocks  # of the model, known while a parallel adapter is added

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        **kwargs: Any,
    ) -> None:
        if isinstance(peft_config, PeftConfig):
            peft_config = {adapter_name: peft_config}
        super().__init__(model, AdapterConfigs(peft_config), adapter_name, **kwargs)
        if not isinstance(self.peft_config, AdapterConfigs):  # that of a method injected before
            self.peft_config = AdapterConfigs(self.peft_config)
            self.model.peft_config = self.peft_config

    # Injection

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Add an adapter to every targeted layer.

        Raises:
            ValueError: the name cannot be an adapter's, a target is no linear layer, or the
                configuration was read beside weights of another model. The model is unchanged.
        """
        _check_adapter_name(model, adapter_name)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        problems = self._misfits(adapter_name)
        if problems:
            self.delete_adapter(adapter_name)
            _unwrap_empty(model)
            for parameter in trainable:
                parameter.requires_grad_(True)
            raise refusal(problems)

    def _misfits(self, adapter_name: str) -> list[str]:
        """Reasons why the weights beside the configuration's file do not fit this adapter."""
        config: Any = self.peft_config[adapter_name]
        if config.saved is None or not config.inference_mode:
            return []  # for training, the settings alone may be wanted of the folder
        weights = get_peft_model_state_dict(
            self, adapter_name=adapter_name, save_embedding_layers=False
        )
        expected = {f"base_model.{key}": tuple(weight.shape) for key, weight in weights.items()}
        if same_but_for_names(expected, config.saved.shapes):
            return []  # names are compared on loading, when PEFT has translated them
        return mismatches(expected, config.saved.shapes)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules is None:
            model_type = model_config.get("model_type")
            targets, excluded = default_targets(self.model, model_type, peft_config.placement)
            peft_config.target_modules = targets
            peft_config.exclude(excluded)
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Check every target before the first is replaced."""
        _maybe_include_all_linear_layers(peft_config, model)  # PEFT does it only after this
        names = [name for name, _ in model.named_modules() if name and f".{CONTAINER}." not in name]
        check_layers(peft_config, names, self._check_target_module_exists)
        check_modules_to_save(peft_config, names)
        report_suffixes(peft_config, names, self._check_target_module_exists)
        parallel = peft_config.placement == "parallel"
        if parallel:
            self.blocks = find_blocks(model)
        for name in names:
            if not self._check_target_module_exists(peft_config, name):
                continue
            layer = model.get_submodule(name)
            if not isinstance(layer, BottleneckLinear):
                check_target(name, layer, model.get_submodule(name.rpartition(".")[0]))
            if parallel:
                check_parallel(self.blocks, name)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, BottleneckLinear):
            target.update_layer(adapter_name, peft_config)
            layer = target
        else:
            layer = BottleneckLinear(target, adapter_name, peft_config)
            self._replace_module(parent, target_name, layer, target)
        if peft_config.placement == "parallel":
            up = self.model.get_submodule(self.blocks.feed_forward[current_key])
            layer.place_beside(adapter_name, up)

    # PEFT reads a field `bias` as a mode for the base model's biases; here it is the adapter's.

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        pass

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        own: set[nn.Parameter] = set()
        for module in model.modules():
            if isinstance(module, BottleneckLinear):
                own.update(module.bottleneck_adapter.parameters())
            elif isinstance(module, AuxiliaryTrainingWrapper):
                own.update(module.parameters())
        for parameter in model.parameters():
            if parameter not in own:
                parameter.requires_grad_(False)

    def disable_adapter_layers(self) -> None:
        """Let the base model run alone."""
        self._enable_adapter_layers(enabled=False)

    @classmethod
    def _get_learnable_bias_state_dict(
        cls, model: nn.Module, state_dict: dict[str, Tensor], config: PeftConfig
    ) -> dict[str, Tensor]:
        return {}

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "cat",
    ) -> None:
        """Add an adapter made of others; it is saved and loaded as any, and frozen at first.

        Args:
            adapters: names; each may have layers of its own.
            weights: a number for each of them, of any sign; they are not normalised.
            adapter_name: of the new adapter.
            combination_type: "cat": exactly the weighted sum of what the adapters add, by one as
                wide as all of them together (one adapter and one weight: that adapter, rescaled).
                "linear": the weighted sum of their parameters, as wide as each, which computes
                something else, since an adapter is nonlinear.

        Raises:
            ValueError: a name is unknown or taken, or these adapters have no such combination:
                "cat" needs one activation and dropout, "linear" equal settings and layers.
        """
        if adapter_name in self.peft_config:
            raise ValueError(f"this model already has an adapter {adapter_name!r}.")
        configs: Any = self.peft_config
        config = combined_config(self.model, configs, adapters, weights, combination_type)
        self.peft_config[adapter_name] = config
        try:
            self.inject_adapter(self.model, adapter_name)
        except Exception:
            self.peft_config.pop(adapter_name, None)
            raise
        fill(self.model, adapters, weights, adapter_name, combination_type)

    # Running

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activate one adapter, or several stacked in the order of the list or tuple.

        Raises:
            ValueError: a name is unknown.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        unknown = [name for name in names if name not in self.peft_config]
        if unknown:
            raise ValueError(
                f"unknown adapters: {', '.join(unknown)} "
                f"(this model has {', '.join(self.peft_config)})."
            )
        active = adapter_name if isinstance(adapter_name, str) else names
        super().set_adapter(active, inference_mode=inference_mode)

    @contextmanager
    def _enable_peft_forward_hooks(
        self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Iterator[None]:
        """PEFT opens this around forward and generate, with their arguments."""
        if adapter_names is None:
            yield
            return
        names = check_names(adapter_names, self.peft_config)
        with adapter_names_in_forward(self.model, names):
            yield

    def unload(self) -> nn.Module:
        """The base model, without adapters."""
        for module in self.modules():
            if isinstance(module, BottleneckLinear):
                module.stop_reading()
        return super().unload()

    def _check_merge_allowed(self) -> None:
        raise ValueError(CANNOT_MERGE)

    # Saving and loading

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        if f".{CONTAINER}." in key:
            return without_adapter_name(key, adapter_name)
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Rename as PEFT does, but refuse weights that do not fit; PEFT would copy those that do.

        Raises:
            ValueError: a weight of the adapter is missing, has another shape or has no place, or
                belongs to a later save with other settings.
        """
        saved = getattr(config, "saved", None)
        state_dict = dict(of_one_save(saved, state_dict))
        if saved is not None:  # of that save, this was the loading
            config.saved = dataclasses.replace(saved, save=None)  # type: ignore[attr-defined]
        renamed = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        own = f".{CONTAINER}.{adapter_name}."
        expected = {
            key: tuple(weight.shape)
            for key, weight in model.state_dict().items()
            if own in key or (key in renamed and f".{CONTAINER}." not in key)
        }
        found = {key: tuple(weight.shape) for key, weight in renamed.items()}
        problems = mismatches(expected, found)
        if problems:
            raise refusal([without_adapter_name(problem, adapter_name) for problem in problems])
        return renamed


def _unwrap_empty(model: nn.Module) -> None:
    """Put back the modules that PEFT wrapped and no adapter uses any more."""
    for name, module in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        if isinstance(module, BottleneckLinear) and not module.bottleneck_adapter:
            setattr(model.get_submodule(parent), child, module.base_layer)
        elif isinstance(module, ModulesToSaveWrapper) and not module.modules_to_save:
            setattr(model.get_submodule(parent), child, module.original_module)


def _check_adapter_name(model: nn.Module, name: str) -> None:
    """PEFT finds an adapter's weights by its name between dots: a module's name misleads it."""
    if name == BASE:
        raise ValueError(
            f"{BASE!r} cannot name an adapter: in adapter_names it stands for the base model alone."
            "\n  hint: choose another name"
        )
    if not isinstance(name, str) or set(name) & set("/\\\0"):
        raise ValueError(
            f"{name!r} cannot name an adapter: a name is a string without slashes, since saving "
            "makes a folder of it.\n  hint: choose another name"
        )
    taken = {CONTAINER, "down_proj", "up_proj", "scaling", "weight", "bias"}
    for key, _ in model.named_parameters():
        taken.update(key.split(f".{CONTAINER}.")[0].split(".modules_to_save.")[0].split("."))
    if not name or "." in name or hasattr(nn.ModuleDict(), name) or name in taken:
        raise ValueError(
            f"{name!r} cannot name an adapter: a name has no dots and is no module, parameter or "
            "method of the model, or PEFT would mix up their weights.\n"
            f'  hint: choose another, such as "{name.replace(".", "_")}_adapter"'
        )
