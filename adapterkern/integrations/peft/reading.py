"""What `adapter_config.json` says, checked against its types and the weights beside it."""

import dataclasses
import os
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any

from adapterkern.integrations.peft.checkpoint import METHOD, read_saved_weights
from adapterkern.integrations.peft.config import BottleneckConfig

_CURE = "  hint: copy the folder again, or save the adapter again"


def read_settings(read: Callable[[str], Any], path: str) -> Any:
    """The fields of a configuration's file, read by `read`; those of another method as they are.

    Where the weights beside it are of another save, the folder is being saved or its writer was
    killed, and the fields are those that the weights were saved with.

    Raises:
        ValueError: the file or the header of the weights is damaged, they do not fit each other, or
            a field has a value that no configuration can have. The message names the file.
    """
    try:
        fields = read(path)
    except (ValueError, TypeError, RecursionError, IsADirectoryError) as error:
        raise ValueError(f"{path} cannot be read: {_short(error)}.\n{_CURE}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("peft_type", ""), str):
        raise ValueError(
            f"{path} must hold the fields of a configuration with the name of its method as "
            f"peft_type, got {str(fields)[:80]}.\n{_CURE}"
        )
    if fields.get("peft_type") != METHOD:
        return fields
    saved = read_saved_weights(os.path.dirname(path))
    if saved is not None and saved.settings is not None:
        own = fields.get("saved_with")
        if not isinstance(own, dict) or own.get("save") != saved.save:
            fields = dict(saved.settings)
    fields["saved_with"] = saved
    known = {name: fields[name] for name in fields if name in _HINTS}  # PEFT warns of the others
    try:
        problems = _wrong_types(known)
        if problems:
            raise TypeError("; ".join(problems))
        config = BottleneckConfig(**known)
        if saved is not None:
            config.check_sizes(saved)
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{path}: {_short(error)}.\n{_CURE}") from error
    return fields


_HINTS = typing.get_type_hints(BottleneckConfig)
_HINTS = {one.name: _HINTS[one.name] for one in dataclasses.fields(BottleneckConfig)}


def _wrong_types(fields: dict[str, Any]) -> list[str]:
    return [
        f"{name} must be {_HINTS[name]}, got {str(value)[:80]!r}"
        for name, value in fields.items()
        if not _fits(value, _HINTS[name])
    ]


def _fits(value: object, hint: Any) -> bool:
    """Whether JSON's value is of the type that a field is annotated with."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is list or origin is Iterable:
        return isinstance(value, list) and all(_fits(one, parts[0]) for one in value)
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return isinstance(value, float | int)
    if isinstance(hint, type) and issubclass(hint, str):  # enumerations too; their values are
        return isinstance(value, str)  # checked with the configuration
    return isinstance(value, origin or hint)


def _short(error: BaseException) -> str:
    return str(error).split("\n  hint:")[0].rstrip(".")[:400] or type(error).__name__
