"""Code blocks of Markdown pages: found, and run as a reader would paste them.

A comment in the line before a block keeps it from being run, with the reason:
`<!-- not run: why -->`, `<!-- needs: gpu -->`, `<!-- needs: gpu, a_package -->`.

A value behind a `print` is a promise: `print(y.shape)  # torch.Size([2, 8])` has to print that.
"""

import ast
import contextlib
import importlib.util
import io
import re
import sys
import tokenize
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").rglob("*.md"))
CONDITION = re.compile(r"<!-- (not run|needs): (.+?) -->\s*\Z")
# Packages that an installation for use may lack. A misspelt import is none of them, and fails.
OPTIONAL = {"accelerate", "adapters", "bitsandbytes", "matplotlib", "peft", "transformers"}


@dataclass(frozen=True)
class Snippet:
    """A fenced block; `line` is that of its first line of code."""

    page: Path
    line: int
    language: str
    code: str
    condition: tuple[str, str] | None  # ("not run", why) or ("needs", what)

    def __str__(self):
        return f"{self.page.relative_to(ROOT).as_posix()}:{self.line}"


def tokens_of(page):
    return MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))


def snippets_of(page, language):
    """The blocks of a page in that language, in their order."""
    found, before = [], ""
    for token in tokens_of(page):
        if token.type == "fence" and token.info.split()[:1] == [language]:
            match = CONDITION.search(before)
            condition = match and (match[1], match[2])
            found.append(Snippet(page, token.map[0] + 2, language, token.content, condition))
        before = token.content if token.type == "html_block" else ""
    return found


def reason_to_skip(snippet):
    """Why the block does not run here, None if it does."""
    kind, text = snippet.condition or ("", "")
    if kind == "not run":
        return text
    needed = set(text.split(", ")) if kind == "needs" else set()
    if "gpu" in needed and not torch.cuda.is_available():
        return "needs a CUDA device"
    imported = {match[1] for match in re.finditer(r"^\s*(?:import|from) (\w+)", snippet.code, re.M)}
    for package in sorted(imported & OPTIONAL | needed - {"gpu"}):
        if package not in sys.modules and importlib.util.find_spec(package) is None:
            return f"needs {package}, which is not installed"
    return None


def run(snippet, namespace):
    """Execute a block in `namespace` and hold what its comments promise to be printed.

    Raises:
        AssertionError: the block failed, or printed something else; the message has file and line.
    """
    tree = ast.parse(snippet.code, filename=str(snippet.page))
    promised = _promised_outputs(tree, snippet.code)
    ast.increment_lineno(tree, snippet.line - 1)  # tracebacks then name the page's lines
    for statement in tree.body:
        code = compile(ast.Module([statement], []), str(snippet.page), "exec", dont_inherit=True)
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                exec(code, namespace)
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            lines = [frame.lineno for frame in frames if frame.filename == str(snippet.page)]
            where = f"{snippet.page.relative_to(ROOT).as_posix()}:{lines[-1]}"
            raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
        expected = promised.get(statement.lineno - snippet.line + 1)
        if expected is not None and printed.getvalue().strip() != expected:
            where = f"{snippet.page.relative_to(ROOT).as_posix()}:{statement.lineno}"
            raise AssertionError(
                f"{where}: the comment promises {expected!r}, printed was {printed.getvalue()!r}"
            )


def _promised_outputs(tree, code):
    """The value in the comment behind a `print`, by the line on which the statement begins."""
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(code).readline)
        if token.type == tokenize.COMMENT
    }
    return {
        statement.lineno: comments[statement.end_lineno]
        for statement in tree.body
        if ast.unparse(statement).startswith("print(")
        and _is_value(comments.get(statement.end_lineno, ""))
    }


def _is_value(text):
    """Whether a comment is a value, as `True`, `(2, 8)` or `torch.bfloat16`, rather than words."""
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return re.fullmatch(r"torch\.\w+(\(.*\))?", text) is not None
    return True
