"""Every command line in README and docs is one that the package, pip or pytest would take."""

import pytest
from command_lines import Command, commands_of, problems_of
from snippets import DOCS, README, ROOT

PAGES = [README, *DOCS, *(ROOT / name for name in ("CONTRIBUTING.md", "csrc/README.md"))]
PAGES += [ROOT / "examples/README.md", ROOT / "benchmarks/results/README.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_page_names_commands_that_exist(page):
    problems = {f"{one.where} {one.text}": problems_of(one) for one in commands_of(page)}
    assert {text: found for text, found in problems.items() if found} == {}


def test_readme_shows_the_two_commands():
    shown = [command.text for command in commands_of(README) if command.whole]
    assert any("adapterkern demo" in text for text in shown)
    assert any('".[test]" && pytest' in text for text in shown)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("adapterkern demo --slowly", "unrecognized arguments: --slowly"),
        ("adapterkern demonstrate", "invalid choice: 'demonstrate'"),
        ("ADAPTERKERN_BULD_CUDA=0 pip install -e .", "no variable ADAPTERKERN_BULD_CUDA"),
        ('pip install -e ".[tests]" && pytest', "no extra tests"),
        ("pip install adapterkern", "on no index"),
        ('pip install "adapterkern[peft]>=0.1"', "on no index"),
        ('pip install "adapterkern[peft] @ git+https://example.org/adapterkern"', "git+https"),
        ("python -m benchmarks gpu --stage verify", "required: --out"),
        ("python -m benchmarks graph", "invalid choice: 'graph'"),
        ("pytest -m through tests", "no marker through"),
        ("python examples/peft_birt.py", "no examples/peft_birt.py"),
        ("pytest tests/test_no_such.py::test_it", "no tests/test_no_such.py"),
    ],
)
def test_command_check_finds_the_fault(text, problem):
    (found,) = problems_of(Command("page.md:1", text, whole=True))
    assert problem in found


@pytest.mark.parametrize(
    "text",
    [
        "adapterkern bench --quick  # a comment",
        "ADAPTERKERN_BUILD_CUDA=0 pip install -v .",
        "pip install dist/adapterkern-0.1.0-py3-none-any.whl",
        "pip install torch --index-url https://download.pytorch.org/whl/cpu",
        "python -m benchmarks gpu --stage verify --out DIR",
        "pytest -n 2 --dist loadfile -m 'not gpu' tests",
        "python my_training.py",
    ],
)
def test_command_check_passes_what_is_right(text):
    assert problems_of(Command("page.md:1", text, whole=True)) == []
