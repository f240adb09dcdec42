"""Numbers that the README repeats are those of their source."""

import re

import pytest
from command_lines import PROJECT
from snippets import README, ROOT

TEXT = README.read_text(encoding="utf-8")


def cells_of(first):
    """The cells of the first table row whose first one is `first`."""
    row = re.search(rf"^\| *{re.escape(first)} *\|(.+)\|$", TEXT, re.M)
    assert row, f"the README has no table row for {first!r}"
    return [cell.strip() for cell in row[1].split("|")]


@pytest.mark.parametrize(
    ("shown", "case"),
    [("forward", "forward"), ("training step (forward and backward)", "step")],
)
def test_readme_shows_the_measured_times(shown, case):
    measured = cells_of(f"{case}-bf16-gelu-T16384-H1024-R64")
    header = cells_of("case")
    ours = float(measured[header.index("us")])
    ratio = float(measured[header.index("vs plain")].removesuffix("x"))
    fused, plain, faster = (re.match(r"[\d.]+", cell)[0] for cell in cells_of(shown))
    assert float(fused) == pytest.approx(ours, rel=0.01)
    assert float(plain) == pytest.approx(ours * ratio, rel=0.01)
    assert float(faster) == pytest.approx(ratio, abs=0.05)


def test_readme_shows_what_adapters_add_to_a_block():
    (result,) = set(re.findall(r"benchmarks/results/[\w./-]+/report\.md", TEXT))
    rows = re.findall(
        r"^\| block-1024 \| ([\w-]+) \| (\w+) \|.+\+([\d.]+) %", (ROOT / result).read_text(), re.M
    )
    added = {(variant, mode): share for variant, mode, share in rows}
    words = " ".join(TEXT.split())
    for variant, sentence in (
        ("adapterkern", "two adapters add {} % to the forward and {} % to a training step"),
        ("adapterhub", "AdapterHub's add {} % and {} %"),
    ):
        assert sentence.format(added[variant, "forward"], added[variant, "step"]) in words


@pytest.mark.parametrize("package", ["torch", "triton", "transformers", "peft", "adapters"])
def test_readme_names_the_lowest_versions(package):
    extras = PROJECT["project"]["optional-dependencies"]
    required = [*PROJECT["project"]["dependencies"], *extras["peft"], *extras["adapterhub"]]
    (lowest,) = (
        re.search(r">=([\d.]+)", one)[1] for one in required if re.match(rf"{package}\b", one)
    )
    assert cells_of(package)[0] == lowest


def test_readme_names_the_lowest_python():
    lowest = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert f"Python {lowest} and torch {cells_of('torch')[0]} or later" in TEXT


def test_readme_names_every_extra_but_that_of_maintainers():
    (named,) = re.findall(r"The extras are (.+?)\.\n?", TEXT, re.S)
    extras = set(PROJECT["project"]["optional-dependencies"]) - {"dev"}
    assert set(re.findall(r"`(\w+)`", named)) == extras
