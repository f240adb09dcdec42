"""`adapterkern check`: what it prints, what it returns."""

import json
import subprocess

import pytest
import torch

from adapterkern.backends.reference.backend import ReferenceBackend
from adapterkern.cli.main import main

QUICK = ["check", "--backend", "reference", "--quick", "--dtype", "fp32"]


@pytest.fixture
def wrong_dx(monkeypatch):
    backward = ReferenceBackend.backward

    def wrong(self, *arguments):
        gradients = backward(self, *arguments)
        return gradients._replace(x=gradients.x * 1.1)

    monkeypatch.setattr(ReferenceBackend, "backward", wrong)


def test_check_prints_each_error_beside_its_tolerance(capsys):
    assert main(QUICK) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    header = next(index for index, line in enumerate(lines) if "tolerance  used" in line)
    rows = [line.split() for line in lines[header + 1 :] if line.startswith("  ")]
    tensors = ["y", "dx", "d_down_weight", "d_up_weight", "d_down_bias", "d_up_bias"]
    assert [row[:2] for row in rows] == [["fp32", tensor] for tensor in tensors]
    for row in rows:
        assert 0 < float(row[2]) <= float(row[3]) < 1e-5
        assert row[5].startswith("fp32-")
    assert lines[-1] == "passed: 56 comparisons on reference, 0 missed"  # 8 activations, 7 tensors
    assert "checking reference: 8 cases" in err


def test_check_output_is_plain_without_a_terminal(capsys):
    main(QUICK)
    out, err = capsys.readouterr()
    assert "\r" not in out + err
    assert "\033" not in out + err


def test_check_fails_and_names_the_miss(wrong_dx, capsys):
    assert main(QUICK) == 1
    out = capsys.readouterr().out
    assert out.count("MISSED") == 8
    assert "MISSED fp32-gelu-T37-H70-R20 dx: 1." in out
    assert out.splitlines()[-1].startswith("FAILED: 56 comparisons on reference, 8 missed")


def test_check_json_carries_every_comparison(wrong_dx, capsys):
    assert main([*QUICK, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is False
    (backend,) = report["backends"]
    assert (backend["name"], backend["device"], backend["unavailable"]) == (
        "reference",
        "cpu",
        None,
    )
    assert len(backend["rows"]) == 56
    for row in backend["rows"]:
        assert row["passed"] == (row["tensor"] != "dx") == (row["error"] <= row["tolerance"])


def test_check_counts_a_backend_that_raises_as_a_miss(monkeypatch, capsys):
    def explode(self, call, save_z):
        raise IndexError("no such\n tile")

    monkeypatch.setattr(ReferenceBackend, "forward", explode)
    assert main(QUICK) == 1
    assert (
        "MISSED fp32-gelu-T37-H70-R20 y: - of - (IndexError: no such tile)"
        in capsys.readouterr().out
    )


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
    assert "passed: 49 comparisons" in out


def test_check_finds_unwritten_memory(monkeypatch, capsys):
    forward = ReferenceBackend.forward

    def hole(self, call, save_z):
        y, z = forward(self, call, save_z)
        out = torch.empty_like(y)
        out[1:] = y[1:]
        return out, z

    monkeypatch.setattr(ReferenceBackend, "forward", hole)
    assert main(QUICK) == 1
    assert "MISSED fp32-relu-T37-H70-R20 y: - of" in capsys.readouterr().out


def test_check_runs_triton_in_the_interpreter_without_a_gpu(capsys):
    pytest.importorskip("triton")
    command = ["check", "--backend", "triton", "--device", "cpu", "--quick", "--dtype", "bf16"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "triton on cpu, in Triton's interpreter: 8 cases, 8 activations, 56 comparisons" in out


def test_check_reports_an_interpreter_that_died(monkeypatch, capsys):
    pytest.importorskip("triton")
    died = subprocess.CompletedProcess([], -11, stdout="")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: died)
    assert main(["check", "--backend", "triton", "--device", "cpu"]) == 1
    assert "the process ended with code -11" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--quick", "--full"], "not allowed with"),
        (["--dtype", "int8"], "'bf16'"),
        (["--backend", "numpy"], "'reference'"),
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
