"""`adapterkern check`: its last line, what was not checked, and its signs of life."""

import re
import time

import pytest
import torch

from adapterkern import parity
from adapterkern.activations import ACTIVATIONS
from adapterkern.backends import NAMES
from adapterkern.backends.reference.backend import ReferenceBackend
from adapterkern.cli.check import pulse, worker
from adapterkern.cli.check.outcome import Outcome
from adapterkern.cli.check.verdict import Limits, last_lines
from adapterkern.cli.main import main

QUICK = ["check", "--backend", "reference", "--quick", "--dtype", "fp32"]
IDS = [f"fp32-{activation}-T37-H70-R20" for activation in sorted(ACTIVATIONS)]
RELU = IDS.index("fp32-relu-T37-H70-R20")
NO_GPU = "anything on a GPU (none here)"


@pytest.mark.parametrize(
    ("words", "refused", "says"),
    [
        ([], [], f"This machine computes right. Not checked: triton, cuda; {NO_GPU}; what "
         "--dtype leaves out."),
        (["--case", IDS[0]], [], f"This machine computes right. Not checked: triton, cuda; "
         f"{NO_GPU}; what --case and --dtype leave out."),
        (["--shard", "99/99"], [], "Nothing was compared, so nothing is known of this machine."),
        ([], ["no"], "Nothing is known of reference, which --backend names: see above."),
    ],
    ids=["whole", "one-case", "empty-shard", "all-refused"],
)  # fmt: skip
def test_the_last_line_says_whether_this_machine_computes_right(
    monkeypatch, capsys, words, refused, says
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ReferenceBackend, "unsupported_reasons", lambda self, spec: refused)
    main([*QUICK, *words])
    assert " ".join(capsys.readouterr().out.split()).endswith(f" missed {says}")


@pytest.mark.parametrize(
    ("ran", "limits", "says"),
    [
        (NAMES, Limits(torch.device("cuda"), True, []), "This machine computes right."),
        (("triton", "reference"), Limits(torch.device("cuda"), True, []),
         "This machine computes right. Not checked: cuda."),
        (NAMES, Limits(torch.device("cpu"), True, []),
         "This machine computes right. Not checked: anything on a GPU (--device cpu)."),
    ],
    ids=["all-on-a-gpu", "one-backend-missing", "not-on-the-gpu"],
)  # fmt: skip
def test_the_last_line_names_what_was_not_checked(ran, limits, says):
    outcome = Outcome()
    row = {"tensor": "y", "error": 0.0, "tolerance": 1.0, "passed": True, "note": ""}
    for name in ran:
        outcome.add(worker.backend_event(name, torch.device("cpu"), None, 1))
        outcome.add(worker.case_event(name, IDS[0], "passed", 0.0, "", [row]))
    first, *last = last_lines(outcome, True, limits).splitlines()
    assert first.startswith(f"passed: {len(ran)} comparisons on ")
    assert " ".join(last) == says


def test_check_gives_a_sign_of_life_in_a_long_case(monkeypatch, capsys):
    monkeypatch.setattr(pulse, "SECONDS", 0.2)
    check_case = parity.check_case

    def slow(case, *arguments):
        time.sleep(1.0 if case.activation == "relu" else 0.0)
        return check_case(case, *arguments)

    monkeypatch.setattr(parity, "check_case", slow)
    assert main(QUICK) == 0
    told = re.findall(r"^\.\.\. \d+ s: reference, (\S+)$", capsys.readouterr().err, re.MULTILINE)
    assert told.count(IDS[RELU]) >= 2
    assert main([*QUICK, "--json"]) == 0
    assert capsys.readouterr().err == ""  # its events tell what begins
