"""`adapterkern info` as people read it: whether adapters run, what is amiss, the details."""

import json

import pytest
import torch
from info_reports import HEALTHY, gpu, machine

from adapterkern import _env
from adapterkern.backends.cuda import extension
from adapterkern.backends.triton.backend import TritonBackend
from adapterkern.cli import main
from adapterkern.cli.info import probes, text
from adapterkern.cli.info.summary import summarise

H200 = {"name": "NVIDIA H200", "capability": "9.0", "memory_gib": 139.8}


def choice(backend: str, device: str = "cuda") -> dict:
    """A report's entry in which every dtype has the same backend."""
    return {"device": device, "float32": backend, "float16": backend, "bfloat16": backend}


def render(report: dict, problems: tuple[str, ...] = ()) -> str:
    return text.render({"summary": summarise(report), **report, "problems": list(problems)})


PLAIN = "adapters run in plain PyTorch (backend reference), correct but not faster."


@pytest.mark.parametrize(
    ("report", "says"),
    [
        pytest.param(
            machine(choice=choice("triton"), gpus={"devices": [H200]}),
            "Adapters run on this machine with: triton, on NVIDIA H200.",
            id="triton",
        ),
        pytest.param(
            machine(choice={"float32": "triton"}, gpus={"devices": [H200] * 8}),
            "Adapters run on this machine with: triton (float32), cuda (float16, bfloat16), on "
            "NVIDIA H200, the first of 8 GPUs.",
            id="by-dtype-on-eight",
        ),
        pytest.param(
            machine(choice=choice("reference", "cpu"), gpus={"devices": []}),
            f"This machine has no GPU that PyTorch can use: {PLAIN}",
            id="cpu",
        ),
        pytest.param(
            machine(choice=choice("reference"), gpus=gpu(name="Tesla T4")),
            f"On Tesla T4, {PLAIN}",
            id="old-gpu",
        ),
        pytest.param(
            machine(choice=choice("reference (named)")),
            f"As ADAPTERKERN_BACKEND asks, {PLAIN}",
            id="reference-by-name",
        ),
        pytest.param(
            machine(choice=choice("none: triton was named and raises", "cpu")),
            "Adapters do not run on this machine: every call raises an error.",
            id="named-but-not-here",
        ),
        pytest.param(
            machine(choice={"bfloat16": "none: cuda was named and raises"}),
            "Adapters do not run on this machine in bfloat16: every call raises an error.",
            id="named-but-not-for-a-dtype",
        ),
        pytest.param(
            machine(choice=choice("triton", "cpu"), gpus={"devices": []}),
            "Adapters run on this machine with: triton, in Triton's CPU interpreter, which is far "
            "slower than plain PyTorch: unset TRITON_INTERPRET unless you test kernels.",
            id="interpreter",
        ),
        pytest.param(
            {**machine(choice=choice("cuda")), "gpus": {"error": "RuntimeError: no"}},
            "Adapters run on this machine with: cuda, on a GPU.",
            id="gpus-not-known",
        ),
    ],
)
def test_the_report_begins_with_whether_adapters_run_and_with_what(report, says):
    assert summarise(report) == says
    lines = render(report).splitlines()
    assert " ".join(lines[: 1 + len(says) // 81]) == says or lines[0] == says


def test_info_begins_with_what_this_machine_runs(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(_env, "BACKEND", "reference")
    assert main.main(["info"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("As ADAPTERKERN_BACKEND asks, adapters run in plain PyTorch")
    assert main.main(["info", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)["summary"]
    assert " ".join(out.split()).startswith(f"{summary} ")


def test_a_gpu_that_runs_triton_is_named_with_it(monkeypatch):
    """With the CPU in the place of the GPU: the sentence follows what dispatch would choose."""
    monkeypatch.setattr(TritonBackend, "devices", frozenset({"cpu"}))
    monkeypatch.setattr(TritonBackend, "unavailable_reason", lambda _self: None)
    chosen = probes.probe_choice() | {"device": "cuda"}
    report = machine(choice=chosen, gpus={"devices": [H200]})
    assert summarise(report) == "Adapters run on this machine with: triton, on NVIDIA H200."


def test_what_is_amiss_stands_before_the_details():
    problem = "Triton needs a C compiler and there is none: install gcc, or set CC " * 2
    lines = render(HEALTHY, (problem, "second problem")).splitlines()
    assert lines[1:3] == ["", "What is amiss:"]
    assert lines[3].startswith("- Triton needs a C compiler and there is none: install gcc")
    assert lines[4].startswith("  ")
    assert lines[5:7] == ["- second problem", ""]
    assert lines[7].startswith("versions      adapterkern 0.1.0, python 3.11.7, torch 2.9.1")
    assert render(HEALTHY).splitlines()[1:3] == ["Nothing is amiss.", ""]


def test_render_is_plain_text_within_eighty_columns():
    long = {"built": False, "reason": "why not " * 40 + "\n  hint: a cure"}
    lines = render(machine(extension=long), ("a problem " * 20,)).splitlines()
    assert max(map(len, lines)) <= 80
    assert all(line.isascii() and line.isprintable() for line in lines)
    assert "driver        580.65.06, CUDA up to 13.0" in lines
    assert "              hint: a cure" in lines


def test_render_keeps_a_name_and_its_version_on_one_line():
    report = machine(versions=dict.fromkeys(("transformers", "peft", "adapters"), "1.2.3"))
    out = render(report)
    for name, version in report["versions"].items():
        assert f"{name} {version}" in out


def test_render_tells_what_the_machine_has():
    out = render(HEALTHY)
    assert "cuda:0 NVIDIA H100, capability 9.0, 79.2 GiB, runs sm_90a of the" in out
    assert "launches      repeated calls reuse recorded launches, which costs the host less" in out
    assert "tuned         /home/me/h100.json: 25 entries from NVIDIA H100, used here" in out
    assert "/package/a100.json: 7 entries from NVIDIA A100, for other GPUs" in out
    assert "on cuda: float32 -> cuda, float16 -> cuda, bfloat16 -> cuda" in out


def test_render_tells_for_which_gpus_the_extension_was_built():
    report = machine(extension={"kernels": ["one", "two"]})
    built = "CUDA build    built for sm_80, sm_90a, compute_90 by nvcc 13.0.88; 2 kernels"
    assert built in render(report).splitlines()


def test_render_tells_the_recorded_reason_of_a_missing_extension(monkeypatch):
    """Whatever words setup.py left: with their cure, once, and the backend's line refers to it."""
    record = extension.BuildRecord("no GPU was in sight: set SOMETHING=1", None, ())
    monkeypatch.setattr(extension, "build_record", lambda: record)
    monkeypatch.setattr(extension, "importlib", Missing())
    monkeypatch.setattr(extension, "load", extension.load.__wrapped__)
    part = probes.probe_extension()
    assert part["built"] is False
    report = machine(backends={"cuda": part["reason"]})
    out = render({**report, "extension": part})
    assert "no GPU was in sight: set SOMETHING=1" in " ".join(out.split())
    assert out.count("SOMETHING") == 1
    assert "cuda: see CUDA build" in out


class Missing:
    """In place of importlib: there is no extension."""

    def import_module(self, name: str) -> None:
        raise ModuleNotFoundError(name)


def test_a_misspelled_variable_is_amiss(monkeypatch, capsys):
    monkeypatch.setattr(_env, "UNKNOWN", ("ADAPTERKERN_BACKND",))
    assert main.main(["info", "--json"]) == 0
    says = "ADAPTERKERN_BACKND is no variable of adapterkern; did you mean ADAPTERKERN_BACKEND?"
    assert says in json.loads(capsys.readouterr().out)["problems"]


def test_the_help_of_commands_fits_eighty_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for words in (["--help"], ["info", "--help"], ["check", "--help"]):
        with pytest.raises(SystemExit):
            main.main(words)
        lines = capsys.readouterr().out.splitlines()
        assert [line for line in lines if len(line) > 80] == []
