"""The blocks of each page of docs/ run in their order, and the runner itself is no fool."""

import re

import pytest
import snippets
from snippets import DOCS, ROOT, reason_to_skip, run, snippets_of

PAGES = [page for page in DOCS if snippets_of(page, "python")]


def name_of(page):
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_docs_page_runs_from_top_to_bottom(page, namespace, pasted_into):
    left_out = {snippet: reason_to_skip(snippet) for snippet in snippets_of(page, "python")}
    to_run = [snippet for snippet, reason in left_out.items() if reason is None]
    if not to_run:
        pytest.skip("; ".join(f"{snippet}: {reason}" for snippet, reason in left_out.items()))
    pasted_into(page)
    for snippet in to_run:
        run(snippet, namespace)


@pytest.mark.parametrize("page", [snippets.README, *DOCS], ids=name_of)
def test_runner_sees_every_block_of_a_page(page):
    """A block that is indented, as in a tab of the site, is none to the parser."""
    fences = re.findall(r"^\s*```+ *python", page.read_text(encoding="utf-8"), re.M)
    assert len(snippets_of(page, "python")) == len(fences)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_that_do_not_run_are_python_all_the_same(page):
    for snippet in snippets_of(page, "python"):
        compile(snippet.code, str(snippet), "exec")


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.setattr(snippets, "ROOT", tmp_path)

    def write(text):
        (tmp_path / "page.md").write_text(text)
        return tmp_path / "page.md"

    return write


def test_runner_names_the_line_that_fails(page):
    written = page("words\n\n```python\nx = 1\n\ndef f():\n    return x / 0\n\nf()\n```\n")
    (snippet,) = snippets_of(written, "python")
    with pytest.raises(AssertionError, match=r"^page\.md:7: ZeroDivisionError: division by zero"):
        run(snippet, {})


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("print(1 + 1)  # 3", "promises '3', printed was '2"),
        ("print(torch.zeros(2).shape)  # torch.Size([3])", "printed was 'torch.Size"),
        ("print(1 + 1)  # 2", None),
        ("print(1 + 1)  # as many as there are", None),
        ("y = 1 + 1  # 3", None),
    ],
)
def test_runner_holds_a_value_behind_a_print(page, line, said):
    (snippet,) = snippets_of(page(f"```python\nimport torch\n{line}\n```\n"), "python")
    if said is None:
        return run(snippet, {})
    with pytest.raises(AssertionError, match=re.escape(said)):
        run(snippet, {})


@pytest.mark.parametrize(
    ("before", "code", "reason"),
    [
        ("<!-- not run: takes an hour -->\n", "x", "takes an hour"),
        ("<!-- needs: no_such_package -->\n", "x", "needs no_such_package, which is not installed"),
        ("<!-- needs: torch, ast -->\n", "x", None),
        ("<!-- not run: that one -->\n```python\ny\n```\n", "x", None),
        ("", "import adapterken", None),
    ],
)
def test_runner_skips_what_a_comment_says(page, before, code, reason):
    snippet = snippets_of(page(f"{before}```python\n{code}\n```\n"), "python")[-1]
    assert reason_to_skip(snippet) == reason


def test_runner_skips_a_package_that_is_optional(page, monkeypatch):
    monkeypatch.setattr(snippets, "OPTIONAL", {"no_such_package"})
    (snippet,) = snippets_of(page("```python\nfrom no_such_package import a\n```\n"), "python")
    assert reason_to_skip(snippet) == "needs no_such_package, which is not installed"


@pytest.mark.parametrize(
    ("name", "made"),
    [("answerdotai/ModernBERT-base", "ModernBertModel"), ("Qwen/Qwen3-0.6B", "Qwen3Model")],
)
def test_stand_in_hub_gives_the_class_that_is_named(page, pasted_into, name, made):
    transformers = pytest.importorskip("transformers")
    pasted_into(page(f'```python\nname = "{name}"\n```\n'))
    assert type(transformers.AutoModel.from_pretrained(name)).__name__ == made
    words = transformers.AutoTokenizer.from_pretrained(name)
    assert words.decode(words("Grüße!")["input_ids"], skip_special_tokens=True) == "Grüße!"
    with pytest.raises(OSError, match="cached files"):
        transformers.AutoModel.from_pretrained("someone/another-model")
