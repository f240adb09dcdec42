"""Every message that the troubleshooting page quotes is one that the sources can say."""

import ast
import re

import pytest
from snippets import ROOT, snippets_of, tokens_of

PAGE = ROOT / "docs/troubleshooting.md"
SOURCES = [ROOT / "setup.py", *sorted((ROOT / "adapterkern").rglob("*.py"))]
GAP = "\0"  # for a value that an f-string or "%s" puts in


def words(text):
    return " ".join(text.split())


def said_by(node):
    """The text of a string or an f-string; None of anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value.replace("%s", GAP)
    if isinstance(node, ast.JoinedStr):
        return "".join(said_by(part) or GAP for part in node.values)
    return None


@pytest.fixture(scope="module")
def messages():
    """All that the package's strings say, a line each."""
    trees = [ast.parse(source.read_text(encoding="utf-8")) for source in SOURCES]
    texts = [said_by(node) for tree in trees for node in ast.walk(tree)]
    return "\n".join(words(text) for text in texts if text)


def quotes():
    """Each quoted line and each reason in a table, as pieces between what differs."""
    lines = [
        line for snippet in snippets_of(PAGE, "text") for line in snippet.code.splitlines() if line
    ]
    for row in re.findall(r"^\| `(.+?)` \|", PAGE.read_text(encoding="utf-8"), re.M):
        lines.append(row)
    for line in lines:
        without_class = re.sub(r"^\w+Error: ", "", line)
        pieces = [words(piece).strip("'\".,;() ") for piece in without_class.split("...")]
        yield line, [piece for piece in pieces if len(piece) > 3]


@pytest.mark.parametrize(("line", "pieces"), list(quotes()))
def test_troubleshooting_quotes_what_the_sources_say(messages, line, pieces):
    assert max(map(len, pieces)) >= 10, "too little to be recognised by"
    assert [piece for piece in pieces if piece not in messages] == []


def test_troubleshooting_gives_each_message_a_heading():
    fences = [token for token in tokens_of(PAGE) if token.type == "fence"]
    assert len(fences) >= 20
    assert len(list(quotes())) >= 40


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("f'at most {limit} ' 'tokens'", f"at most {GAP} tokens"),
        ("'%s is not %s'", f"{GAP} is not {GAP}"),
        ("12", None),
    ],
)
def test_messages_have_a_gap_where_a_value_goes(code, said):
    assert said_by(ast.parse(code, mode="eval").body) == said
