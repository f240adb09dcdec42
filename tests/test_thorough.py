"""What the default run keeps of a sweep, and that it says what it left out."""

import itertools
import re
from pathlib import Path

import thorough

pytest_plugins = ["pytester"]
CONFTEST = f"""
import sys

sys.path.insert(0, {str(Path(thorough.__file__).parent)!r})
import thorough

def pytest_configure(config):
    config.pluginmanager.register(thorough.Report(config))
    for name in "sweep", "thorough":
        config.addinivalue_line("markers", name)
"""
TESTS = """
import pytest

@pytest.mark.sweep("form", lambda p: p["dtype"].upper())
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("form", ["row_block", "split"])
def test_forms(form, dtype):
    pass

@pytest.mark.sweep
@pytest.mark.parametrize("fault", range(4))
def test_faults(fault):
    pass

@pytest.mark.thorough
def test_all_night():
    pass

def test_plain():
    pass
"""


def test_covering_shows_every_value_in_the_fewest_cases_of_a_product():
    shown = [set(enumerate(case)) for case in itertools.product("abc", "wxyz")]
    kept = thorough.covering(shown)
    assert len(kept) == 4
    assert set().union(*(shown[index] for index in kept)) == set().union(*shown)


def test_covering_takes_turns_through_what_is_crossed():
    """Not all of the second with the first of the first."""
    shown = [set(enumerate(case)) for case in itertools.product("abc", "xyz")]
    assert [sorted(shown[index]) for index in thorough.covering(shown)] == [
        [(0, "a"), (1, "x")],
        [(0, "b"), (1, "y")],
        [(0, "c"), (1, "z")],
    ]


def run(pytester, *options):
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(TESTS)
    return pytester.runpytest_inprocess("-p", "no:cacheprovider", "-p", "no:benchmark", *options)


def test_the_default_run_shows_every_value_and_tells_what_it_left_out(pytester):
    result = run(pytester, "-m", "not thorough", "-v")
    result.assert_outcomes(passed=5, deselected=7)
    forms = re.findall(r"test_forms\[(\w+)-(\w+)\] PASSED", result.stdout.str())
    assert {form for form, _ in forms} == {"row_block", "split"}
    assert {dtype for _, dtype in forms} == {"fp32", "bf16", "fp16"}
    left_out = "7 thorough tests were left out; run them with: "
    assert left_out + thorough.COMMAND in result.outlines


def test_the_two_runs_together_run_each_test_once(pytester):
    result = run(pytester, "-m", "thorough")
    result.assert_outcomes(passed=7, deselected=5)
    result.stdout.no_fnmatch_line("*left out*")


def test_the_workers_of_xdist_tell_what_they_left_out(pytester):
    result = run(pytester, "-m", "not thorough", "-n", "1")
    result.stdout.fnmatch_lines(["7 thorough tests were left out*"])
