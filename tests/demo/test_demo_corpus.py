"""The demo's texts."""

import pytest

from adapterkern.cli.demo import corpus


def test_corpus_is_large_and_spread_over_many_modules(texts):
    assert 2000 <= len(texts.train) + len(texts.held_out) <= 3000
    assert len(texts.modules) >= 80
    assert len(texts.held_out) == pytest.approx(0.2 * len(texts.train + texts.held_out), abs=1)


def test_corpus_halves_share_no_text(texts):
    train = {corpus.text_key(doc.text) for doc in texts.train}
    held_out = {corpus.text_key(doc.text) for doc in texts.held_out}
    assert not train & held_out
    assert len(train) == len(texts.train)
    assert len(held_out) == len(texts.held_out)


def test_corpus_is_the_same_every_time(texts):
    assert corpus.load_corpus() == texts


@pytest.mark.parametrize("task", corpus.TASKS, ids=lambda task: task.name)
def test_corpus_classes_are_all_there_and_none_dominates(texts, task):
    for docs in (texts.train, texts.held_out):
        counts = task.counts(docs)
        assert sum(counts) == len(docs)
        assert min(counts) >= 0.05 * len(docs)
        assert task.majority_share(docs) == max(counts) / len(docs) < 0.35


def test_corpus_module_belongs_to_one_topic():
    modules = [module for names in corpus.TOPICS.values() for module in names.split()]
    assert len(modules) == len(set(modules))


def test_corpus_labels_follow_the_source(tmp_path):
    (tmp_path / "re.py").write_text(
        '"""This module is documented at length."""\n'
        'def search(x):\n    """search(x) -> what the function search finds in x."""\n'
        'class Pattern:\n    """Describes what a Pattern instance may be."""\n'
        '    def match(self):\n        """Match this right from the beginning."""\n'
        '    def __len__(self):\n        """Tell how many groups there are."""\n'
        '    def short(self):\n        """Too short."""\n'
    )
    (tmp_path / "csv.py").write_text('"""THIS module, is documented at length!"""\n')
    found = corpus.load_corpus(tmp_path)
    docs = found.train + found.held_out
    assert {(doc.kind, doc.text) for doc in docs} == {
        ("module", "This module is documented at length."),
        ("function", "what the function it finds in x."),
        ("class", "Describes what a it instance may be."),
        ("method", "Match this right from the beginning."),
        ("special method", "Tell how many groups there are."),
    }
    assert {(doc.module, doc.topic) for doc in docs} == {("re", "text")}


def test_corpus_without_sources_says_so(tmp_path):
    with pytest.raises(corpus.CorpusError, match="frozen or zipped"):
        corpus.load_corpus(tmp_path)
