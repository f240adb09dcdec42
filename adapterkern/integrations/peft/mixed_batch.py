"""`adapter_names`: one adapter for each input of a batch, in forward and generate."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from adapterkern.integrations.peft.grouped import NamedBatch
from adapterkern.integrations.peft.layer import BASE, BottleneckLinear

# The names under which models take their batch, the most reliable first.
INPUTS = (
    "input_ids",
    "inputs_embeds",
    "pixel_values",
    "input_features",
    "input_values",
    "decoder_input_ids",
    "inputs",
)
# What runs a part of a model again in the backward: of transformers, of torch and accelerate.
CHECKPOINTS = ("_gradient_checkpointing_func", "checkpoint_fn")


def check_names(names: Any, known: Iterable[str]) -> list[str]:
    """Check the names and return them as a list.

    Raises:
        ValueError: the names are no list, or one of them is unknown.
    """
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"adapter_names must be a list, a name for each input, got {names!r}.\n"
            "  hint: stacked adapters run on whole batches, after set_adapter([...])"
        )
    unknown = sorted(set(names) - set(known) - {BASE})
    if unknown:
        raise ValueError(
            f"adapter_names has unknown adapters: {', '.join(unknown)} (this model has "
            f'{", ".join(known)}).\n  hint: "{BASE}" stands for the base model without an adapter'
        )
    return list(names)


@contextmanager
def adapter_names_in_forward(model: nn.Module, names: list[str]) -> Iterator[None]:
    """Let every adapted layer of the model see the names while the context is open, and whenever
    gradient checkpointing runs a part of it again.

    Where generate repeats its inputs, for beams or returned sequences and after it has run an
    encoder, the names are repeated with them.
    """
    current = NamedBatch(names)
    adapted = [
        module
        for module in model.modules()
        if isinstance(module, BottleneckLinear | AuxiliaryTrainingWrapper)
    ]
    handles = [model.register_forward_pre_hook(_check_batch(current), with_kwargs=True)]
    try:
        with (
            _repeated_by_generate(model, names, current),
            _kept_by_checkpoints(model, adapted, current),
            _passed(adapted, current),
        ):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _repeated_by_generate(
    model: nn.Module, names: list[str], current: NamedBatch
) -> Iterator[None]:
    """Follow the one function with which generate repeats its inputs: how often follows from its
    arguments and two or three configurations, by rules that change between versions.
    """
    function = "_expand_inputs_for_generation"
    expand = getattr(model, function, None)
    if expand is None:
        yield
        return

    def expand_both(expand_size: int = 1, *args: Any, **kwargs: Any) -> Any:
        current.replace([name for name in names for _ in range(expand_size)])
        return expand(expand_size, *args, **kwargs)

    own = model.__dict__.get(function)
    model.__dict__[function] = expand_both
    try:
        yield
    finally:
        del model.__dict__[function]
        if own is not None:
            model.__dict__[function] = own


@contextmanager
def _kept_by_checkpoints(
    model: nn.Module, adapted: Sequence[nn.Module], current: NamedBatch
) -> Iterator[None]:
    """Let what is run again in the backward, when no context is open, be given the names too."""
    set_by_others = [
        (vars(module), attribute, vars(module)[attribute])
        for module in model.modules()
        for attribute in CHECKPOINTS
        if attribute in vars(module)
    ]

    def checkpoint(original: Callable, part: Callable, *args: Any, **kwargs: Any) -> Any:
        names = NamedBatch(current)

        def part_with_names(*args: Any, **kwargs: Any) -> Any:
            with _passed(adapted, names):
                return part(*args, **kwargs)

        return original(part_with_names, *args, **kwargs)

    try:
        for attributes, attribute, original in set_by_others:
            attributes[attribute] = partial(checkpoint, original)
        yield
    finally:
        for attributes, attribute, original in set_by_others:
            attributes[attribute] = original


@contextmanager
def _passed(adapted: Sequence[nn.Module], names: NamedBatch) -> Iterator[None]:
    """Give the names to each of these modules with its arguments."""

    def hook(
        module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        return args, {**kwargs, "adapter_names": names}

    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in adapted]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_batch(names: list[str]) -> Callable[..., None]:
    """A hook on the model, since blocks that flatten their tokens cannot see a wrong number."""

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = [*args, *(kwargs.get(name) for name in INPUTS)]
        batch = next((value for value in given if isinstance(value, Tensor) and value.dim()), None)
        if batch is not None and len(batch) != len(names):
            raise ValueError(
                f"adapter_names must name one adapter for each input, got {len(names)} names for "
                f"{len(batch)} inputs.\n"
                "  hint: generate repeats the names for beams and returned sequences; for methods "
                "that repeat inputs in other ways, call it with set_adapter, once for each adapter"
            )

    return hook
