"""Links of README and docs lead somewhere: to a file of this tree, and to a heading in it."""

import itertools
import re
import urllib.parse

import pytest
from command_lines import HOME
from snippets import DOCS, README, ROOT, tokens_of

from benchmarks import readme

PAGES = [README, *DOCS, *(ROOT / name for name in ("CONTRIBUTING.md", "csrc/README.md"))]
PAGES += [ROOT / "examples/README.md", ROOT / "benchmarks/results/README.md"]
RAW = HOME.replace("github.com", "raw.githubusercontent.com")
IN_TREE = re.compile(rf"({HOME}/(blob|tree|raw)|{RAW})/main/")


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def links_of(page):
    """Where links and pictures of a page lead, those in HTML too."""
    for token in tokens_of(page):
        for child in token.children or ():
            target = child.attrGet("href") or child.attrGet("src")
            if target is not None:
                yield urllib.parse.unquote(target)
        for text in [token, *(token.children or ())]:
            if text.type.startswith("html"):
                yield from re.findall(r"(?:href|src)=\"([^\"]+)\"", text.content)


def anchors_of(page):
    """The anchors of a page's headings, as GitHub forms them, and of the names of an API page."""
    tokens, seen = tokens_of(page), {}
    anchors = set(re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), re.M))
    for opening, heading in itertools.pairwise(tokens):
        if opening.type == "heading_open":
            text = "".join(child.content for child in heading.children)
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            anchors.add(f"{slug}-{seen[slug]}" if slug in seen else slug)
            seen[slug] = seen.get(slug, 0) + 1
    return anchors


def problem_of(page, link):
    """Why a link leads nowhere, None if it leads somewhere or out of this tree."""
    path, _, anchor = IN_TREE.sub("/", link).partition("#")
    if re.match(r"[a-z]+:", path):
        return None if not link.startswith(f"{HOME}/") else "no path of the project's home"
    target = ROOT / path[1:] if path.startswith("/") else page.parent / path if path else page
    if not target.exists():
        return "no such file"
    if anchor and target.suffix == ".md" and anchor not in anchors_of(target):
        return f"no such heading; there are {', '.join(sorted(anchors_of(target)))}"
    return None


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_page_links_to_what_exists(page):
    problems = {link: problem_of(page, link) for link in links_of(page)}
    assert {link: problem for link, problem in problems.items() if problem} == {}


def test_readme_links_are_absolute():
    """An index shows the README without the tree around it."""
    links = {*links_of(README)}
    assert {link for link in links if not re.match(r"https://|#", link)} == set()
    assert len([link for link in links if IN_TREE.match(link)]) >= 8


def test_the_generated_section_links_to_the_home_of_the_project():
    assert readme.HOME == HOME


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_page_defines_the_names_that_its_links_use(page):
    """`[words][name]` without `[name]: address` is shown as it is written."""
    words = [
        child.content
        for token in tokens_of(page)
        for child in token.children or ()
        if child.type == "text"
    ]
    assert [text for text in words if re.search(r"\w\]\[[\w-]+\]", text)] == []


@pytest.mark.parametrize(
    ("link", "problem"),
    [
        ("docs/mat.md", "no such file"),
        (f"{HOME}/blob/main/docs/mat.md", "no such file"),
        (f"{HOME}/docs/math.md", "no path of the project's home"),
        ("docs/benchmarks.md#goal", "no such heading"),
        ("#no-such-heading", "no such heading"),
        ("docs/benchmarks.md#goals", None),
        (f"{HOME}/blob/main/docs/benchmarks.md#goals", None),
        (HOME, None),
        ("https://example.org/anything", None),
    ],
)
def test_link_check_finds_the_fault(link, problem):
    found = problem_of(README, link)
    assert found == problem if problem is None else problem in found
