"""Which norm a block hands to its `BottleneckLayer`, read from the source of the block's forward.

No attribute says it: MBart's blocks have the norms of BART's, and hand over none.
"""

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

from torch import nn

from adapterkern.integrations.adapterhub.stock import BottleneckLayer

UNKNOWN = "norm_unknown"
_METHOD = "bottleneck_layer_forward"


def norm_behind(model: nn.Module, name: str, layer: Any) -> nn.Module | str | None:
    """The norm that the layer of this name is given; None if it is given none, or `UNKNOWN`."""
    holder_name, _, attribute = name.rpartition(".")
    called: tuple[str, ...] = (attribute,)
    holder = model.get_submodule(holder_name)
    if type(layer) is not BottleneckLayer:  # as BERT's: the layer is the block's output itself
        holder, called = layer, ()
    passed = _passed_norms(type(holder).forward, called)
    if len(passed) != 1:
        return UNKNOWN
    (norm_name,) = passed
    return None if norm_name is None else getattr(holder, norm_name, UNKNOWN)


@functools.cache
def _passed_norms(forward: Callable, called: tuple[str, ...]) -> frozenset[str | None]:
    """The names of what a forward hands to this attribute of its module, or to the module itself,
    as the norm: an attribute, None, or `UNKNOWN` for anything else."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return frozenset()
    paths = (("self", *called), ("self", *called, _METHOD))
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and _path(n.func) in paths]
    return frozenset(_norm_argument(call) for call in calls)


def _path(node: ast.expr) -> tuple[str, ...]:
    if isinstance(node, ast.Attribute):
        return (*_path(node.value), node.attr)
    return (node.id,) if isinstance(node, ast.Name) else ()


def _norm_argument(call: ast.Call) -> str | None:
    named = [keyword.value for keyword in call.keywords if keyword.arg == "layer_norm"]
    argument = (call.args[2:3] + named)[0]
    if isinstance(argument, ast.Constant) and argument.value is None:
        return None
    path = _path(argument)
    return path[1] if len(path) == 2 and path[0] == "self" else UNKNOWN
