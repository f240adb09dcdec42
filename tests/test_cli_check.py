"""`adapterkern check`: what it prints, what it returns."""

import itertools
import json
import re
import signal
import subprocess
import sys
import warnings

import pytest
import torch

from adapterkern import __version__, norm, parity, testing
from adapterkern.activations import ACTIVATIONS
from adapterkern.backends import get
from adapterkern.backends.reference.backend import ReferenceBackend
from adapterkern.cli.check import process, worker
from adapterkern.cli.main import main
from adapterkern.results import Outputs

QUICK = ["check", "--backend", "reference", "--quick", "--dtype", "fp32"]
IDS = [f"fp32-{activation}-T37-H70-R20" for activation in sorted(ACTIVATIONS)]
NUM_CASES, TENSORS = len(IDS), 7
RELU = IDS.index("fp32-relu-T37-H70-R20")


def events(capsys):
    """Return the printed events but each case's begin, which must come right before its end."""
    every = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for begin, end in itertools.pairwise(every):
        assert (begin["event"] == "begin") == (end["event"] == "case")
        assert end["event"] != "case" or begin["case"] == end["case"]
    return [event for event in every if event["event"] != "begin"]


def flat(text):
    """Return a text without its line ends, wherever it was wrapped."""
    return " ".join(text.split())


@pytest.fixture
def wrong_dx(monkeypatch):
    backward = ReferenceBackend.backward

    def wrong(self, *arguments):
        gradients = backward(self, *arguments)
        return gradients._replace(x=gradients.x * 1.1)

    monkeypatch.setattr(ReferenceBackend, "backward", wrong)


@pytest.fixture
def raises_in_relu(monkeypatch):
    forward = ReferenceBackend.forward

    def explode(self, call, save):
        if call.activation == "relu":
            raise IndexError("no such\n tile")
        return forward(self, call, save)

    monkeypatch.setattr(ReferenceBackend, "forward", explode)


def test_check_prints_each_error_beside_its_tolerance(capsys):
    assert main(QUICK) == 0
    lines = capsys.readouterr().out.splitlines()
    header = next(index for index, line in enumerate(lines) if "tolerance  used" in line)
    rows = [line.split() for line in lines[header + 1 :] if line.startswith("  ")]
    tensors = ["y", "dx", "d_down_weight", "d_up_weight", "d_down_bias", "d_up_bias"]
    assert [row[:2] for row in rows] == [["fp32", tensor] for tensor in tensors]
    for row in rows:
        assert 0 < float(row[2]) <= float(row[3]) < 1e-5
        assert row[5].startswith("fp32-")
    assert lines[-3] == f"passed: {NUM_CASES * TENSORS} comparisons on reference, 0 missed"


def test_check_prints_a_line_as_each_case_ends(capsys):
    assert main(QUICK) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"adapterkern {__version__}, torch {torch.__version__}, on the CPU"
    assert lines[1] == f"cases to compare with float64: reference {NUM_CASES}"
    assert lines[3] == f"reference on cpu: {NUM_CASES} cases"
    for line, case in zip(lines[4 : NUM_CASES + 4], IDS, strict=True):
        found = re.fullmatch(r"passed +(\d+)% +(\d+\.\d) s  (\S+)", line)
        assert found[3] == case
        assert 0 < int(found[1]) <= 100
    assert lines[NUM_CASES + 4] == ""
    assert max(map(len, lines)) <= 80


@pytest.mark.thorough
def test_check_streams_its_lines():
    """A pipe has the first lines while the second case still runs."""
    slow = (
        "import sys\n"
        "from adapterkern.cli.check import worker\n"
        "from adapterkern.cli.main import main\n"
        "run = worker._run_case\n"
        "def held(case, *rest):\n"
        "    if case.activation == 'gelu_tanh':\n"
        "        sys.stdin.readline()\n"
        "    return run(case, *rest)\n"
        "worker._run_case = held\n"
        f"sys.exit(main({[*QUICK, '--json']!r}))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", slow], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    first = [json.loads(process.stdout.readline()) for _ in range(3)]
    assert [event["event"] for event in first] == ["backend", "begin", "case"]
    with process:  # not `communicate`, which would miss what is already in the file's buffer
        process.stdin.write("go on\n")
        process.stdin.close()
        # begin and end of each other case, and the end
        assert len(process.stdout.read().splitlines()) == 2 * (NUM_CASES - 1) + 1
    assert process.returncode == 0


def test_check_output_is_plain_without_a_terminal(capsys):
    main(QUICK)
    out, err = capsys.readouterr()
    assert "\r" not in out + err
    assert "\033" not in out + err


def test_check_fails_and_names_the_miss(wrong_dx, capsys):
    assert main(QUICK) == 1
    out = capsys.readouterr().out
    assert re.findall(r"MISSED +\d+x +\d+\.\d s  (\S+)  (\S+)\n", out) == [(i, "dx") for i in IDS]
    assert len(re.findall("^ *MISSED ", out, re.MULTILINE)) == 2 * NUM_CASES  # below the table too
    assert "MISSED fp32-gelu-T37-H70-R20 dx: 1." in out
    total = f"FAILED: {NUM_CASES * TENSORS} comparisons on reference, {NUM_CASES} missed"
    assert total in out.splitlines()
    assert "This machine does not compute right: MISSED, RAISED and LOST above" in flat(out)


def test_check_runs_the_norms_and_finds_a_fault_in_one(monkeypatch, capsys):
    prenorm = ["check", "--backend", "reference", "--dtype", "fp32"]
    prenorm.append("--case=fp32-*-layer_norm-prenorm")
    assert main(prenorm) == 0
    out = capsys.readouterr().out
    table = re.findall(r"^  fp32 +(\S+) ", out, flags=re.MULTILINE)
    assert table[:3] == ["y", "normed", "dx"]
    assert table[-2:] == ["d_norm_weight", "d_norm_bias"]
    assert re.search(r"\npassed: \d\d+ comparisons on reference, 0 missed\n", out)
    backward = norm.backward

    def without_the_stream(call, stream, statistics, d_normed, d_stream, needs):
        return backward(call, stream, statistics, d_normed, None, needs)

    monkeypatch.setattr(norm, "backward", without_the_stream)
    assert main(prenorm) == 1
    found = re.findall(r"^  MISSED (\S+) dx", capsys.readouterr().out, flags=re.MULTILINE)
    assert (
        "fp32-gelu-T17-H70-R20-needs_x+down_weight+up_weight+down_bias+up_bias-layer_norm-prenorm"
        in found
    )


def test_check_json_carries_every_comparison(wrong_dx, capsys):
    assert main([*QUICK, "--json"]) == 1
    backend, *cases, end = events(capsys)
    assert backend == {
        "event": "backend", "backend": "reference", "device": "cpu", "unavailable": None,
        "cases": NUM_CASES,
    }  # fmt: skip
    assert end == {
        "event": "end", "passed": False, "comparisons": NUM_CASES * TENSORS, "missed": NUM_CASES,
        "cases": NUM_CASES,
    }  # fmt: skip
    assert [case["case"] for case in cases] == IDS
    for case in cases:
        assert (case["event"], case["backend"], case["status"]) == ("case", "reference", "missed")
        assert case["seconds"] >= 0
        assert len(case["rows"]) == TENSORS
        for row in case["rows"]:
            assert row["passed"] == (row["tensor"] != "dx") == (row["error"] <= row["tolerance"])
            assert row["dtype"] == "fp32"
            assert row["activation"] in case["case"]


def test_check_counts_a_backend_that_raises_as_a_miss(raises_in_relu, capsys):
    assert main(QUICK) == 1
    out = capsys.readouterr().out
    assert re.search(r"RAISED .* s  fp32-relu-T37-H70-R20  IndexError: no such tile\n", out)
    assert "MISSED fp32-relu-T37-H70-R20 y: - of - (IndexError: no such tile)" in out
    comparisons = (NUM_CASES - 1) * TENSORS + 1
    assert f"FAILED: {comparisons} comparisons on reference, 1 missed" in out.splitlines()
    main([*QUICK, "--json"])
    (raised,) = (event for event in events(capsys) if event.get("status") == "raised")
    assert raised["note"] == "IndexError: no such tile"
    assert [row["passed"] for row in raised["rows"]] == [False]


def test_check_stops_a_backend_at_a_lost_device(raises_in_relu, monkeypatch, capsys):
    """A case that raised is one thing, a device that no longer answers another: the next cases
    would all fail."""
    answers = iter([None] * RELU + ["cuda:0 is lost: CUDA error: illegal access"] * NUM_CASES)
    monkeypatch.setattr(testing, "lost_device", lambda device: next(answers))
    assert main([*QUICK, "--json"]) == 1
    _, *cases, end = events(capsys)
    assert [case["status"] for case in cases] == ["passed"] * RELU + ["lost"]
    assert cases[-1]["case"] == IDS[RELU]
    assert cases[-1]["note"] == "cuda:0 is lost: CUDA error: illegal access"
    assert end["missed"] == 1


@pytest.mark.thorough
def test_check_runs_each_backend_in_a_process_of_its_own(monkeypatch, capsys):
    """The second runs although the first dies, with the case that it died in as the miss."""
    started = []

    class Process(subprocess.Popen):
        def __init__(self, command, **options):
            started.append(command[command.index("--backend") + 1])
            if started[-1] == "triton":
                spoken = [
                    worker.backend_event("triton", torch.device("cpu"), None, 8),
                    worker.case_event("triton", IDS[0], "passed", 1.0, "", []),
                ]
                lines = "\n".join([*map(json.dumps, spoken), "oh"])
                dies = f"import os; print({lines!r}, flush=True); os.abort()"
                command = [sys.executable, "-c", dies]
            super().__init__(command, **options)

    monkeypatch.setattr(subprocess, "Popen", Process)
    words = ["check", "--backend", "triton", "--backend", "reference", "--device", "cpu"]
    assert main([*words, "--quick", "--dtype", "fp32", "--json"]) == 1
    out, err = capsys.readouterr()
    *both, end = map(json.loads, out.splitlines())
    both = [event for event in both if event["event"] != "begin"]
    assert started == ["triton", "reference"]
    assert "oh" in err  # a line that is no event goes by
    died = both[2]
    assert (died["backend"], died["status"], died["case"]) == ("triton", "lost", IDS[1])
    assert died["note"].startswith("the process ended by signal SIGABRT during this case")
    of_reference = [event for event in both if event["backend"] == "reference"]
    assert [event["status"] for event in of_reference[1:]] == ["passed"] * NUM_CASES
    assert end == {
        "event": "end", "passed": False, "comparisons": NUM_CASES * TENSORS + 1, "missed": 1,
        "cases": NUM_CASES + 1,
    }  # fmt: skip


def test_check_hands_its_options_to_the_processes(monkeypatch, capsys):
    seen = []

    class Process(subprocess.Popen):
        def __init__(self, command, **options):
            seen.append((command[2:], options["env"].get("TRITON_INTERPRET")))
            super().__init__([sys.executable, "-c", "pass"], **options)

    monkeypatch.setattr(subprocess, "Popen", Process)
    pytest.importorskip("triton")
    words = ["--full", "--dtype", "bf16", "--dtype", "fp32", "--case", "*tanh*", "--case", "b*"]
    words += ["--shard", "2/3", "--device", "cpu"]
    assert main(["check", *words, "--backend", "triton"]) == 1
    ((command, interpreted),) = seen
    assert command == [
        "adapterkern", "check", "--json", "--backend", "triton", "--device", "cpu", "--full",
        "--dtype", "bf16", "--dtype", "fp32", "--case=*tanh*", "--case=b*", "--shard", "2/3",
    ]  # fmt: skip
    assert interpreted == "1"
    assert "ended with code 0 during this case" in capsys.readouterr().out


def test_check_lists_an_unavailable_backend_with_its_reason(monkeypatch, capsys):
    monkeypatch.setattr(ReferenceBackend, "unavailable_reason", lambda self: "out of order")
    assert main(QUICK) == 1  # it was asked for by name
    assert "reference: not run, out of order" in capsys.readouterr().out


def test_check_counts_the_cases_a_backend_refuses(monkeypatch, capsys):
    def refuse(self, spec):
        return ["no tanh yet"] if spec.activation == "tanh" else []

    monkeypatch.setattr(ReferenceBackend, "unsupported_reasons", refuse)
    assert main(QUICK) == 0
    out = capsys.readouterr().out
    assert "not run: 1 cases, no tanh yet" in out
    assert f"passed: {(NUM_CASES - 1) * TENSORS} comparisons" in out


def test_check_finds_unwritten_memory(monkeypatch, capsys):
    forward = ReferenceBackend.forward

    def hole(self, call, save):
        outputs, saved = forward(self, call, save)
        out = torch.empty_like(outputs.y)
        out[1:] = outputs.y[1:]
        return Outputs(out), saved

    monkeypatch.setattr(ReferenceBackend, "forward", hole)
    assert main(QUICK) == 1
    assert "MISSED fp32-relu-T37-H70-R20 y: - of" in capsys.readouterr().out


def test_check_runs_triton_in_the_interpreter_without_a_gpu(capsys):
    pytest.importorskip("triton")
    command = ["check", "--backend", "triton", "--device", "cpu", "--quick", "--dtype", "bf16"]
    assert main(command) == 0
    out = capsys.readouterr().out
    count = len(get("triton").activations)
    told = f"{count} cases, {count} activations, {count * TENSORS} comparisons"
    assert f"triton on cpu, in Triton's interpreter: {told}" in flat(out)


def test_check_is_silent_about_the_values_that_it_plants(monkeypatch, recwarn, capsys):
    """numpy warns of sums of Inf and NaN in Triton's interpreter."""
    check_case = parity.check_case

    def warning(*arguments):
        warnings.warn("invalid value encountered in reduce", RuntimeWarning, stacklevel=1)
        return check_case(*arguments)

    monkeypatch.setattr(parity, "check_case", warning)
    assert main(["check", "--backend", "reference", "--case", "*-nonfinite"]) == 0
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


@pytest.mark.parametrize(
    ("code", "words"),
    [(1, "with code 1"), (-11, "by signal SIGSEGV"), (-int(signal.SIGKILL), "by signal SIGKILL"),
     (-200, "by signal 200")],
)  # fmt: skip
def test_check_says_how_a_process_ended(code, words):
    assert process.how(code) == words


def test_check_shards_divide_the_cases(capsys):
    found = []
    for shard in (1, 2, 3):
        assert main([*QUICK, "--json", "--shard", f"{shard}/3"]) == 0
        _, *cases, _ = events(capsys)
        found.append([case["case"] for case in cases])
    assert found == [IDS[0::3], IDS[1::3], IDS[2::3]]
    assert main([*QUICK, "--json", "--shard", "99/99"]) == 0  # more shards than cases
    assert events(capsys)[-1]["comparisons"] == 0


def test_check_runs_the_cases_that_fit_a_pattern(capsys):
    assert main([*QUICK, "--json", "--case", "*-gelu*", "--case", IDS[4]]) == 0
    _, *cases, _ = events(capsys)
    assert [case["case"] for case in cases] == [IDS[0], IDS[1], IDS[4]]


def test_check_refuses_a_pattern_that_fits_nothing(capsys):
    assert main([*QUICK, "--case", "fp32-relu"]) == 2
    err = capsys.readouterr().err
    assert f"--case fp32-relu fits none of {NUM_CASES} cases; some are {IDS[0]}, fp32-" in err


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--quick", "--full"], "not allowed with"),
        (["--dtype", "int8"], "'bf16'"),
        (["--backend", "numpy"], "'reference'"),
        (["--shard", "0/3"], "expected I/N with 1 <= I <= N, such as 2/14; got 0/3"),
        (["--shard", "4/3"], "expected I/N with 1 <= I <= N, such as 2/14; got 4/3"),
        (["--shard", "2"], "expected I/N with 1 <= I <= N, such as 2/14; got 2"),
        (["--shard", "1/-2"], "got 1/-2"),
    ],
)
def test_check_refuses_wrong_usage(capsys, words, hint):
    with pytest.raises(SystemExit) as exit_:
        main(["check", *words])
    assert exit_.value.code == 2
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", "unknown device 'gpu'; use cpu, cuda"),
        ("cuda", "--device cuda: no such CUDA device here (has: none)"),
        ("cuda:99", "--device cuda:99: no such CUDA device here (has: none)"),
        ("mps", "--device mps is not supported; use cpu, cuda or cuda:N"),
        ("xpu:0", "--device xpu:0 is not supported; use cpu, cuda or cuda:N"),
        ("meta", "--device meta is not supported; use cpu, cuda or cuda:N"),
    ],
)
def test_check_refuses_a_device_that_is_not_here(monkeypatch, capsys, device, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main(["check", "--device", device]) == 2
    assert message in capsys.readouterr().err


def test_check_lists_the_gpus_that_are_here(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert main(["check", "--device", "cuda:2"]) == 2
    assert "no such CUDA device here (has: cuda:0, cuda:1)" in capsys.readouterr().err


def test_check_leaves_deterministic_mode_as_it_was():
    main([*QUICK, "--json"])
    assert not torch.are_deterministic_algorithms_enabled()
