"""Command lines of Markdown pages: found, and held against parsers, files and extras that exist."""

import argparse
import contextlib
import io
import itertools
import re
import shlex
import sys
from dataclasses import dataclass

from snippets import ROOT, tokens_of

from adapterkern import _env
from adapterkern.cli.main import build_parser

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest brings there

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
HOME = PROJECT["project"]["urls"]["Homepage"]
EXTRAS = set(PROJECT["project"]["optional-dependencies"])
MARKERS = {text.split(":")[0] for text in PROJECT["tool"]["pytest"]["ini_options"]["markers"]}
SHELLS = ("bash", "sh", "shell", "console")
OURS = re.compile(r"((ADAPTERKERN_)?\w+=\S* )*(adapterkern|pip|pytest|python|torchrun) [\w.\"-]")
FOLDERS = tuple(f"{path.name}/" for path in ROOT.iterdir() if path.is_dir())
# In running text `python -m benchmarks gpu` is a name; a block has to run as it stands.
UNFINISHED = re.compile(r"are required|expected (one|at least one) argument")
PLACEHOLDER = re.compile(r"invalid .*: '[A-Z]+'")  # `--stage STAGE`


@dataclass(frozen=True)
class Command:
    where: str
    text: str
    whole: bool  # of a block, not of running text


def commands_of(page):
    """The command lines in blocks for a shell, and those that code in running text names."""
    name = page.relative_to(ROOT).as_posix()
    for token in tokens_of(page):
        if token.type == "fence" and token.info.split()[:1] in [[shell] for shell in SHELLS]:
            for number, line in _lines_of(token.content):
                yield Command(f"{name}:{token.map[0] + 1 + number}", line, whole=True)
        for child in token.children or ():
            if child.type == "code_inline" and OURS.match(child.content):
                yield Command(f"{name}:{token.map[0] + 1}", child.content, whole=False)


def _lines_of(block):
    """Each line with its number in the block, continued ones as one, without the prompt."""
    whole = ""
    for number, line in enumerate(block.splitlines(), start=1):
        whole += line.removeprefix("$ ")
        if not whole.endswith("\\"):
            yield number, whole
            whole = ""
        whole = whole.removesuffix("\\")


def problems_of(command):
    """What a shell, a parser or pip would complain of; nothing if the command is right."""
    words = shlex.split(command.text.replace("[DIR ...]", "").replace("...", ""), comments=True)
    problems, part = [], []
    for word in [*words, ";"]:
        if word in ("&&", "||", "|", ";", "&"):
            problems += _problems_of_one(part, command.whole)
            part = []
        else:
            part.append(word)
    return problems


def _problems_of_one(words, whole):
    while words and re.fullmatch(r"\w+=.*", words[0]):
        name = words[0].partition("=")[0]
        if name.startswith("ADAPTERKERN_") and name not in {one.name for one in _env.VARIABLES}:
            return [f"there is no variable {name}"]
        words = words[1:]
    match words:
        case ["adapterkern", *rest]:
            chosen = next((word for word in rest if not word.startswith("-")), None)
            return _parsed(lambda: build_parser(chosen).parse_args(rest), whole)
        case ["python", "-m", "benchmarks", *rest]:
            return _parsed(lambda: _parse_benchmarks(rest), whole)
        case ["pip" | "uv", *_, "install" | "wheel" | "download"] | ["pip", _, *_]:
            return _pip(words)
        case ["pytest", *rest] | ["python", "-m", "pytest", *rest]:
            marks = [after for word, after in itertools.pairwise(rest) if word == "-m"]
            named = {name for mark in marks for name in re.findall(r"\w+", mark)}
            unknown = named - MARKERS - {"not", "and", "or"}
            return [f"there is no marker {name}" for name in sorted(unknown)] + _missing(rest)
    return _missing(words)


def _missing(words):
    """Paths into the tree that are not there; other paths are the reader's own."""
    paths = [word.partition("::")[0] for word in words if word.startswith(FOLDERS)]
    return [f"there is no {path}" for path in paths if not list(ROOT.glob(path.rstrip("/")))]


def _parsed(parse, whole):
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint), contextlib.redirect_stdout(io.StringIO()):
            parse()
    except SystemExit as stopped:
        text = complaint.getvalue()
        fine = PLACEHOLDER.search(text) or (not whole and UNFINISHED.search(text))
        if stopped.code not in (0, None) and not fine:
            return [text.strip().splitlines()[-1]]
    return []


def _parse_benchmarks(words):
    """`python -m benchmarks` parses and runs in one function, which stops here in between."""
    from benchmarks.__main__ import main

    parse = argparse.ArgumentParser.parse_args

    def stop(parser, *arguments):
        parse(parser, *arguments)
        raise SystemExit(0)

    argparse.ArgumentParser.parse_args = stop
    try:
        main(words)
    finally:
        argparse.ArgumentParser.parse_args = parse


def _pip(words):
    """Extras exist, and nothing is asked of an index that does not have it."""
    problems = []
    for word in words:
        bare, extras = re.fullmatch(r"([^\[]*)(?:\[([\w,-]*)\].*)?", word, re.S).groups()
        ours = bare in ("", ".", "adapterkern")
        if ours and extras:
            unknown = set(extras.split(",")) - EXTRAS
            problems += [f"there is no extra {name}" for name in sorted(unknown)]
        if bare == "adapterkern" and " @ " not in word:
            problems.append(f"{word} is on no index yet; name its source, as in '.' or {HOME}")
        if bare == "adapterkern" and " @ " in word and f" @ git+{HOME}" not in word:
            problems.append(f"{word} does not name git+{HOME}")
    return problems + _missing(words)
