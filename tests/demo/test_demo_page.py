"""docs/demo.md: its generated part is that of the committed run."""

import json

import pytest
from canned import canned_report

from benchmarks import demo_page, readme


@pytest.fixture
def root(tmp_path):
    """A tree with a committed run and the page, whose section holds something old."""
    (tmp_path / demo_page.RUN).parent.mkdir(parents=True)
    (tmp_path / demo_page.RUN).write_text(canned_report(seeds=5).to_json())
    return tmp_path


def search_of(chosen: dict[str, float]) -> dict:
    """A search whose choice has these rates."""
    return {
        "texts": {"train": 1575, "validation": 394},
        "rounds": {"first_steps": 30, "kept": 4, "steps": 100, "finalists": 2, "seeds": 3},
        "grid": {method: [{}] * 12 for method in chosen},
        "finalists": {
            method: {
                "chosen": {"recipe": {"name": "a shape", "learning_rate": rate}, "accuracy": 0.6789}
            }
            for method, rate in chosen.items()
        },
    }


def test_without_a_run_the_page_stays_as_it_is(tmp_path):
    assert demo_page.section(tmp_path) is None
    demo_page.draw(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert demo_page.PAGE not in readme.sections(None, tmp_path)


def test_section_has_the_table_with_every_seed(root):
    name, text = readme.sections(None, root)[demo_page.PAGE]
    assert name == "demo"
    adapters = canned_report(seeds=5).methods[0]
    seeds = [", ".join(f"{100 * one:.1f}" for one in result.by_seed) for result in adapters.tasks]
    assert (
        "| held-out accuracy of | trained | share | topic % | kind % | step |\n"
        "|---|---|---|---|---|---|\n"
        f"| bottleneck adapters | 226,368 | 0.99% | 69.1 ±1.4 ({seeds[0]}) "
        f"| 65.2 ±1.4 ({seeds[1]}) | 181 ms |\n"
    ) in text
    assert "| largest class, always |  |  | 10.5 | 30.5 |  |\n" in text
    assert "| before training |  |  | 9.1 | 15.2 |  |\n" in text
    assert "means over the seeds. In brackets: each seed's accuracy." in text
    assert (
        "\n- topic: adapters are indistinguishable from LoRA (-0.6; -3.1 to +1.9), and lose to "
        "full fine-tuning (-4.7; -7.8 to -1.6).\n- kind: "
    ) in text
    assert f"](../{demo_page.PICTURE})" in text
    assert "MiniLM-L6 on cpu (x86_64, 2 threads), adapterkern 0.1.0, torch 2.13.0+cpu" in text
    assert demo_page.SEARCH not in text


def test_section_shows_the_search_where_it_is_on_record(root):
    found = search_of({"adapters": 4e-3, "lora": 2e-3, "full": 1e-4})
    (root / demo_page.SEARCH).write_text(json.dumps(found))
    text = demo_page.section(root)
    assert "trained on 1,575 of the training texts and judged on the other 394" in text
    assert text.endswith(
        "| bottleneck adapters | 12 | a shape | 0.004 | 67.9 |\n"
        "| LoRA, same budget | 12 | a shape | 0.002 | 67.9 |\n"
        "| full fine-tuning | 12 | a shape | 0.0001 | 67.9 |"
    )


def test_picture_is_drawn_from_the_run(root):
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    demo_page.draw(root)
    assert (root / demo_page.PICTURE).read_bytes()[:4] == b"\x89PNG"


def test_page_and_run_agree():
    text = (readme.ROOT / demo_page.PAGE).read_text(encoding="utf-8")
    first, last = readme.markers("demo")
    assert 0 < text.find(first) < text.find(last)
    section = demo_page.section(readme.ROOT)
    if section is None:
        pytest.skip(f"no run is committed as {demo_page.RUN}")
    assert text[text.find(first) + len(first) : text.find(last)].strip() == section, (
        "the page and the run disagree; run `python -m benchmarks readme`"
    )
