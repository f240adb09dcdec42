"""Every block of the README runs as pasted, alone, on the device at hand."""

import pytest
from snippets import README, reason_to_skip, run, snippets_of

SNIPPETS = snippets_of(README, "python")


@pytest.mark.parametrize("snippet", SNIPPETS, ids=str)
def test_readme_block_runs_as_pasted(snippet, namespace, pasted_into):
    reason = reason_to_skip(snippet)
    if reason is not None:
        pytest.skip(f"{snippet}: {reason}")
    pasted_into(README)
    run(snippet, namespace)


def test_readme_holds_no_block_back():
    assert len(SNIPPETS) >= 7
    assert [str(snippet) for snippet in SNIPPETS if snippet.condition] == []
