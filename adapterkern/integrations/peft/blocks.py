"""The blocks of a transformer, found by what they are made of rather than by names.

A block is an item of a list of modules that contains attention: a module whose class says so, which
is a convention of transformers, timm and torch alike. In which order a block calls its linear
layers is read from the source of its forward. The last layer that attention calls is its output
projection, and H is that layer's width. Of the layers outside of attention, the one that returns to
H is the output projection of the feed-forward block. Whatever does not fit this is a problem to
report, never a guess.
"""

import ast
import functools
import inspect
import posixpath
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

LISTS = (nn.ModuleList, nn.Sequential)
OUTPUT_SIZES = ("out_features", "outfeatures", "output_size", "nf")
INPUT_SIZES = ("in_features", "infeatures", "input_size", "nx")


@dataclass
class Blocks:
    """Names of layers in a model, and what is unclear about it in words."""

    attention: list[str] = field(default_factory=list)  # output projections
    feed_forward: dict[str, str] = field(default_factory=dict)  # each with one that reads the input
    experts: list[str] = field(default_factory=list)  # blocks that have some
    problems: list[str] = field(default_factory=list)


def output_size(layer: nn.Module) -> int | None:
    """Width of a linear layer's output, plain or quantised; None for other layers."""
    return _size(layer, OUTPUT_SIZES)


def input_size(layer: nn.Module) -> int | None:
    """Width of a linear layer's input, plain or quantised; None for other layers."""
    return _size(layer, INPUT_SIZES)


def _size(layer: nn.Module, names: tuple[str, ...]) -> int | None:
    if isinstance(layer, BaseTunerLayer):
        layer = layer.get_base_layer()
    names = names if isinstance(layer, Conv1D) else names[:-1]
    return next(
        (size for name in names if isinstance(size := getattr(layer, name, None), int)), None
    )


def find_blocks(model: nn.Module) -> Blocks:
    """The output projections of attention (self and cross) and of the feed-forward blocks."""
    found = Blocks()
    for name, block in _blocks("", model):
        try:
            attention = _attention_outputs(block)
            width = output_size(block.get_submodule(attention[0]))
            feed_forward, has_experts = _feed_forward(block, width)
        except _Unclear as problem:
            found.problems.append(f"{name} ({type(block).__name__}) {problem}")
            continue
        found.attention += [_join(name, one) for one in attention]
        found.feed_forward |= {_join(name, d): _join(name, up) for d, up in feed_forward.items()}
        if has_experts:
            found.experts.append(name)
    if not found.attention and not found.problems:
        found.problems.append("no list of modules in it has items with attention")
    return found


class _Unclear(Exception):
    """What is unclear about a block, as the rest of a sentence that begins with its name."""


def _attention_outputs(block: nn.Module) -> list[str]:
    """The last layer that each attention calls; one width H, which another layer reads."""
    layers = _linear_layers(block)
    outputs = []
    for name in _attention_modules(block):
        called = _called_layers(block.get_submodule(name), name)
        kind = type(block.get_submodule(name)).__name__
        uncalled = [one for one in layers if _within(one, [name]) and one not in called]
        if uncalled:
            raise _Unclear(f"has {kind}, whose source calls no {', '.join(uncalled)} by name")
        width = output_size(layers[called[-1]])
        if all(input_size(layers[other]) != width for other in called[:-1]):
            raise _Unclear(f"has {kind}, where nothing reads the width of its last, {called[-1]}")
        outputs.append(called[-1])
    if len({output_size(layers[name]) for name in outputs}) != 1:
        raise _Unclear("has attention of several widths" if outputs else "has no attention")
    return outputs


def _feed_forward(block: nn.Module, width: int | None) -> tuple[dict[str, str], bool]:
    """The dense output projection, with a layer that reads its block's input; are there experts?"""
    attention = _attention_modules(block)
    others = {name: one for name, one in walk(block) if not _within(name, attention)}
    experts = [
        name
        for name, one in others.items()
        if name.split(".")[-1] == "experts" or "experts" in type(one).__name__.lower()
    ]
    layers = _linear_layers(block)
    dense = [name for name in layers if name in others and not _within(name, experts)]
    parents = ["/" + "/".join(name.split(".")[:-1]) for name in dense]
    common = posixpath.commonpath(parents)[1:].replace("/", ".") if parents else ""
    called = [one for one in _called_layers(block.get_submodule(common), common) if one in dense]
    called = list(dict.fromkeys(called))  # branches may call the same ones
    if len(called) < len(dense):
        uncalled = ", ".join(sorted(set(dense) - set(called)))
        raise _Unclear(f"has layers that its source does not call by name: {uncalled}")
    sizes = {name: (input_size(layers[name]), output_size(layers[name])) for name in called}
    returning = [name for name in called if sizes[name][1] == width]
    if returning == called and all(size == (width, width) for size in sizes.values()):
        returning = called[-1:]  # as wide inside as outside: the order alone tells
    if len(returning) > 1:
        raise _Unclear(f"has several layers that may end its FFN: {', '.join(returning)}")
    for last in returning:
        inner = sizes[last][0]
        for name in called[: called.index(last)]:  # a gate may share one layer with the other half
            if inner is not None and sizes[name] in ((width, inner), (width, 2 * inner)):
                return {last: name}, bool(experts)
    if not experts:
        raise _Unclear("has no FFN of linear layers")
    return {}, True


def _within(name: str, modules: list[str]) -> bool:
    return any(one in ("", name) or name.startswith(f"{one}.") for one in modules)


def _join(name: str, inner: str) -> str:
    return ".".join(filter(None, (name, inner)))


def walk(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """named_modules, where a layer with adapters of any method counts as the layer alone."""
    yield name, module
    if not isinstance(module, BaseTunerLayer):
        for child_name, child in module.named_children():
            yield from walk(child, _join(name, child_name))


def _linear_layers(module: nn.Module) -> dict[str, nn.Module]:
    return {name: one for name, one in walk(module) if input_size(one) and output_size(one)}


def _attention_modules(module: nn.Module) -> list[str]:
    """The outermost attention modules."""
    found: list[str] = []
    for name, one in walk(module):
        if "attention" in type(one).__name__.lower() and _linear_layers(one):
            found += [] if _within(name, found) else [name]
    return found


def _blocks(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The innermost items that hold a whole block: T5 makes a list of a block's parts too."""
    holds_blocks = isinstance(module, LISTS) and any(map(_attention_modules, module))
    for key, child in module.named_children():
        holds_stages = any(
            isinstance(one, LISTS) and len(one) and all(map(_attention_modules, one))
            for _, one in walk(child)
        )
        if holds_stages or not holds_blocks:
            yield from _blocks(_join(name, key), child)
        elif _linear_layers(child):
            yield _join(name, key), child


# The order of calls


def _called_layers(module: nn.Module, name: str) -> list[str]:
    """Names of the linear layers that a module calls, in the order of their evaluation."""
    if isinstance(module, nn.Sequential):
        children = [key for key, _ in module.named_children()]
    else:
        children = _Calls(module).children
    layers: list[str] = []
    for key in children:
        child = module.get_submodule(key)
        if input_size(child) and output_size(child):
            layers.append(_join(name, key))
        elif not isinstance(child, BaseTunerLayer):
            layers += _called_layers(child, _join(name, key))
    return layers


class _Calls(ast.NodeVisitor):
    """The submodules that the forward of a module calls, its other methods included."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.children: list[str] = []
        self.named = dict(module.named_modules())
        self.entered: set[str] = set()
        self._enter("forward")

    def _enter(self, method: str) -> None:
        if method not in self.entered:
            self.entered.add(method)
            tree = _source_tree(inspect.unwrap(getattr(type(self.module), method)))
            if tree is not None:
                self.generic_visit(tree)

    def visit_Call(self, node: ast.Call) -> None:
        """Arguments come first: in down(act(gate(x)) * up(x)), down is called last."""
        for argument in (*node.args, *node.keywords):
            self.visit(argument)
        self.visit(node.func)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """self.child or self.method, called here or passed to be called; not self.child.weight."""
        value: ast.expr = node
        names: list[str] = []
        while isinstance(value, ast.Attribute):
            names.insert(0, value.attr)
            value = value.value
        name = ".".join(names)
        if not isinstance(value, ast.Name):
            self.visit(value)  # what is called in self.query(x).view(shape)
        elif value.id == "self" and name in self.named:
            self.children.append(name)
        elif value.id == "self" and inspect.isfunction(getattr(type(self.module), name, None)):
            self._enter(name)


@functools.cache
def _source_tree(function: Callable[..., object]) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
