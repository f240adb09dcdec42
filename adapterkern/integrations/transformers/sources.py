"""Recognises classes of transformers by the source of their `forward`, whatever their names are.

Comments, formatting, annotations, docstrings, decorators of transformers itself and the messages of
errors do not count; methods of the class that `forward` calls do. So one entry holds for every
class that transformers copies from another.
"""

import ast
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

# The hashes of what is known, in transformers 4.57 and 5.17; there is one where both agree.
SOURCES: dict[str, tuple[str, ...]] = {
    # Blocks whose forward is replaced; the names are those of `blocks.BLOCKS`.
    "post_norm": ("bd131388eee1",),  # Bert, Roberta, Electra, Deberta, MPNet: (Self)Output
    "mpnet": ("f08321ed7bc1", "d7e734e83191"),  # MPNetAttention
    "distilbert_4": ("9121648b7e85",),  # TransformerBlock
    "distilbert_5": ("91edca288f4c",),
    "llama": ("c1d3e67e5255", "56851eb5314f"),  # Llama, Mistral, Qwen, Gemma: DecoderLayer
    "gpt2_4": ("2d283b1828c5",),  # GPT2Block
    "gpt2_5": ("bcf7bad99ceb",),
    "opt_4": ("003164604810",),  # OPTDecoderLayer
    "opt_5": ("c1d4c827fd11",),
    # Parts of blocks that return the output of the adapted layer, with nothing but dropout behind.
    "part": (
        "5aa5ee7b9bf5", "b15800006144",  # MPNetSelfAttention
        "5af3f404a546", "5cf89ac4b853", "ca355f3fcd53", "573163dc6254",  # DistilBert: SelfAttention
        "de04adc87039",  # DistilBert: FFN
        "2870f0ffc7df", "a8215193b2a3",  # LlamaAttention, GemmaAttention
        "7a352730b99b", "f900b344e10b",  # MistralAttention
        "7e7f8358fbce", "5990c957b2ac",  # Qwen2Attention
        "9bc52c5a0f66", "cf784f9249ee",  # Qwen3Attention
        "c175589be330", "0a01fc97686b",  # SmolLM3Attention
        "c667e32817f7",  # LlamaMLP, MistralMLP, Qwen2MLP, GemmaMLP
        "db170b02b60d",  # ArceeMLP
        "89b34cccf0d0",  # GlmMLP
        "937830adc8e1", "dc2f2408676c",  # GPT2Attention
        "e0cb41d12c40",  # GPT2MLP
        "d618106f8668", "4bababe30374",  # OPTAttention
    ),
    # Norms; the names are those of `norms.KINDS`.
    "llama_norm": ("f5c95295c0f8",),
    "gemma_norm": ("d6e75aa008b8",),
    "helium_norm": ("f8ed60cd782f",),
    "deberta_norm": ("79ffef5f9c92",),
    # Blocks that norm the adapted layer's output before they add it: there is nothing to fuse.
    "norm_before_add": (
        "56752f52e2a2", "523d775d567a", "616c4cee5761",  # Gemma2 and Gemma3: DecoderLayer
        "e42273250daa", "ddcc10218045",  # Olmo2DecoderLayer
    ),
}  # fmt: skip

# Fields of the syntax tree that tell nothing of what is computed, or that only some Pythons have.
_IGNORED = frozenset(
    ["annotation", "returns", "decorator_list", "ctx", "kind", "type_comment", "type_params"]
)


def recognised(kind: type) -> str | None:
    """The name in `SOURCES` of what a class computes; None for others."""
    found = source_hash(kind)
    return next((name for name, known in SOURCES.items() if found in known), None)


@functools.cache
def source_hash(kind: type) -> str:
    """The hash of a class's forward, or in words why it has none."""
    trees: dict[str, ast.AST] = {}
    waiting = ["forward"]
    while waiting:
        name = waiting.pop()
        method = getattr(kind, name)
        if _stranger(method) is not None:
            return f"wrapped by {_stranger(method)}"
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(method))).body[0]
        except (OSError, TypeError, SyntaxError):
            return "without a source"
        trees[name] = tree
        waiting += [called for called in _own_methods(kind, tree) if called not in trees]
    text = "\n".join(_plain(trees[name]) for name in sorted(trees))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _stranger(method: Callable[..., Any]) -> str | None:
    """The module of a decorator of someone else, whose source is not the one that is read."""
    while hasattr(method, "__wrapped__"):
        module = method.__globals__["__name__"]
        if module.partition(".")[0] not in ("transformers", "torch"):
            return module
        method = method.__wrapped__
    return None


def _own_methods(kind: type, tree: ast.AST) -> Iterator[str]:
    """Names of methods that a method calls on itself; those of nn.Module are known."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self":
            method = getattr(kind, node.attr, None)
            if inspect.isfunction(method) and not method.__module__.startswith("torch."):
                yield node.attr


def _plain(node: Any) -> str:
    """A syntax tree as text that is the same in every version of Python."""
    if isinstance(node, list):
        return f"[{','.join(map(_plain, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    if isinstance(node, ast.Raise):
        return "Raise"
    if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
        node.body = node.body[1:]
    fields = (
        f"{name}={_plain(value)}"
        for name, value in ast.iter_fields(node)
        if name not in _IGNORED and value not in (None, [])
    )
    return f"{type(node).__name__}({','.join(fields)})"
