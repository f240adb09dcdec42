"""`adapterkern bench` and `adapterkern tune`: what they print, write and refuse."""

import json
from argparse import Namespace

import pytest
import torch

from adapterkern.bench import results
from adapterkern.bench.table import in_unit, time_unit
from adapterkern.cli.main import main

TINY = ["bench", "--hidden-size", "32", "--bottleneck-size", "4", "--tokens", "8", "16"]
TINY += ["--seconds", "0.001"]

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@no_gpu
def test_without_a_gpu_the_first_line_says_so_and_no_speed_up_is_claimed(capsys):
    assert main(TINY) == 0
    out, err = capsys.readouterr()
    first = out.splitlines()[0]
    assert first.startswith("no GPU here: these are times of this package's PyTorch reference")
    labels = ("  adapterkern (reference)", "  plain")
    rows = [line for line in out.splitlines() if line.startswith(labels)]
    assert [row.split()[0] for row in rows] == ["adapterkern", "plain"] * 4
    for claim in ("x faster", "speed", "of copy", "of peak", "GB/s", "host", "%"):
        assert claim not in out
    assert max(map(len, out.splitlines())) <= 80
    assert "[1/4] forward-fp32-gelu-T8-H32-R4" in err
    assert "[4/4] step-fp32-gelu-T16-H32-R4, about " in err


@no_gpu
def test_json_holds_what_was_printed(tmp_path, capsys):
    path = tmp_path / "result.json"
    assert main([*TINY, "--mode", "forward", "--json", str(path)]) == 0
    result = results.load(path)
    assert [row.key for row in result.rows] == [
        f"forward-fp32-gelu-T{tokens}-H32-R4 {name}"
        for tokens in (8, 16)
        for name in ("reference", "plain")
    ]
    header = json.loads(path.read_text())["header"]
    assert header["device_type"] == "cpu"
    assert header["versions"]["torch"] == torch.__version__
    printed = capsys.readouterr().out
    times = [result.rows[0].time.p20, result.rows[0].time.p50, result.rows[0].time.p80]
    unit = time_unit(row.time.p50 for row in result.rows[:2])
    assert "/".join(in_unit(time, unit) for time in times) in printed


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--baseline", "eager"], "known baselines are plain, adapterhub, addmm, compile,"),
        (["--preset", "bert"], "known presets are bert-base, roberta-large, gpt2-medium,"),
        (["--backend", "opencl"], "known backends are triton, cuda, reference"),
        (["--dtype", "fp8"], "fp32, fp16, bf16"),
        (["--mode", "sideways"], "forward, backward, step"),
        (["--activation", "prelu"], "known activations are gelu"),
        (["--hidden-size", "64"], "--hidden-size and --bottleneck-size go together"),
        (["--tokens", "0"], "must be at least 1"),
        (["--compare", "missing.json"], "cannot read missing.json"),
        (["--seconds", "-1"], "--seconds must be above 0 and finite, got -1"),
        (["--seconds", "0"], "got 0"),
        (["--seconds", "nan"], "got nan"),
        (["--compare", "a", "b", "--json", "c", "--quick"], "it cannot take --quick, --json"),
        (
            ["--compare", "a", "b", "--plot", "c.png", "--mode", "step"],
            "cannot take --mode, --plot",
        ),
        (["--compare", "a", "b", "c"], "takes one or two files, got 3"),
        (["--plot", "times.xyz"], ".pdf, .pgf, .png"),
    ],
)
def test_wrong_usage_is_refused_with_what_would_be_right(options, wanted, capsys):
    assert main(["bench", *options]) == 2
    out, err = capsys.readouterr()
    assert wanted in err
    assert out == ""


def test_an_unwritable_file_is_refused_before_anything_is_measured(tmp_path, capsys):
    blocker = tmp_path / "blocker"
    blocker.write_text("")
    for option in ("--json", "--plot"):
        assert main(["bench", option, str(blocker / "x.json")]) == 2
        out, err = capsys.readouterr()
        assert "cannot write to" in err
        assert out == ""
    assert main(["bench", "--json", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err


@no_gpu
def test_backends_that_cannot_run_here_are_an_error_and_no_table(capsys):
    assert main([*TINY, "--backend", "triton", "cuda"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "no backend that --backend names can run here:" in err
    assert "  - triton: no CUDA device\n  - cuda: " in err
    assert main([*TINY, "--mode", "forward", "--backend", "reference", "triton"]) == 0
    assert "adapterkern (triton): not available, no CUDA device" in capsys.readouterr().out


def test_help_names_every_dtype_and_the_bounds(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["bench", "--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    bounds = ("fp64", "T >= 1", "H >= 1", "R >= 1", "S > 0", "5 to 200 samples")
    for said in (*bounds, "or the GPU was lost", "on a GPU limit is always among them"):
        assert said in text


def test_help_explains_every_baseline_in_80_columns(capsys):
    from adapterkern.bench.providers import BASELINES

    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    explained = text[text.index("names for --baseline:") : text.index("presets:")]
    assert {entry.name for entry in BASELINES} <= set(explained.replace(",", " ").split())


@no_gpu
def test_a_compilation_is_announced_before_it_takes_its_time(capsys, monkeypatch):
    from adapterkern.bench import providers

    quick = providers.Provider("compile", "", providers._plain, compiled=True)
    monkeypatch.setitem(providers.PROVIDERS, "compile", quick)
    assert main([*TINY[:5], "--tokens", "8", "--seconds", "0.001", "--baseline", "compile"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == [
        "[1/2] forward-fp32-gelu-T8-H32-R4",
        "[1/2] forward-fp32-gelu-T8-H32-R4: compiling compile, up to a minute",
    ]


@no_gpu
def test_the_load_of_the_machine_is_in_the_header(tmp_path, monkeypatch, capsys):
    import os

    monkeypatch.setattr(os, "getloadavg", lambda: (12.5, 1.0, 1.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    path = tmp_path / "result.json"
    options = [*TINY[:5], "--tokens", "8", "--seconds", "0.001", "--mode", "forward"]
    assert main([*options, "--brief", "--json", str(path)]) == 0
    assert results.load(path).header["load_average"] == 12.5
    assert "BUSY: a load of 12.5 on 2 CPUs" in capsys.readouterr().out


def test_all_among_the_baselines_is_all_of_them():
    from adapterkern.bench.providers import BASELINES
    from adapterkern.cli.bench_choices import baseline_names

    def named(*words, norm=None, adapters=None):
        asked = Namespace(baseline=list(words), quick=True, norm=norm, adapters=adapters)
        return baseline_names(asked, "cuda")

    many = ["single", "loop", "lora-mixed", "routing", "limit"]
    of_one = [entry.name for entry in BASELINES if entry.name not in many[:-1]]
    assert named("all", norm="layer") == of_one
    of_one.remove("separate")
    assert named("all") == named("all", "plain") == of_one
    assert named("all", adapters=[]) == named(adapters=[16]) == many
    assert named("plain", "lora") == ["plain", "lora"]


@pytest.mark.sweep
@no_gpu
@pytest.mark.parametrize("saved", [True, False])
def test_an_interrupted_run_prints_what_was_measured(tmp_path, monkeypatch, capsys, saved):
    from adapterkern.bench import measure

    whole, cases = measure.measure_case, []

    def measure_case(case, *arguments):
        cases.append(case)
        if len(cases) == 3:
            raise KeyboardInterrupt
        return whole(case, *arguments)

    monkeypatch.setattr(measure, "measure_case", measure_case)
    path = tmp_path / "result.json"
    assert main([*TINY, *(["--json", str(path)] if saved else [])]) == 130
    out = capsys.readouterr().out
    assert out.count("  adapterkern (reference) ") == 2
    where = f"; they are in {path}" if saved else ""
    assert out.splitlines()[-1] == f"interrupted: 2 of 4 cases were measured{where}"
    if saved:
        assert [row.case for row in results.load(path).rows] == [cases[0]] * 2 + [cases[1]] * 2


@pytest.mark.sweep
@no_gpu
@pytest.mark.parametrize("saved", [True, False])
def test_a_lost_gpu_ends_the_run_with_what_was_measured(tmp_path, monkeypatch, capsys, saved):
    from adapterkern.bench import measure

    whole, cases = measure.measure_case, []

    def measure_case(case, *arguments):
        cases.append(case)
        rows = whole(case, *arguments)
        if len(cases) == 2:
            error = results.LostDeviceError("the GPU was lost in the work of plain: odd", "plain")
            rows[1].status, rows[1].timings, rows[1].note = "failed", {}, "the GPU was lost"
            error.rows = rows
            raise error
        return rows

    monkeypatch.setattr(measure, "measure_case", measure_case)
    path = tmp_path / "result.json"
    assert main([*TINY, *(["--json", str(path)] if saved else [])]) == 1
    out = capsys.readouterr().out
    assert out.count("  adapterkern (reference) ") == 2
    assert "  plain: failed, the GPU was lost" in out
    where = f"; they are in {path}" if saved else ""
    assert out.splitlines()[-2:] == [
        "the GPU was lost in the work of plain: odd",
        f"ended: 2 of 4 cases were measured{where}",
    ]
    assert len(cases) == 2
    if saved:
        assert [row.status for row in results.load(path).rows] == ["ok", "ok", "ok", "failed"]


@no_gpu
def test_a_picture_that_fails_costs_no_number(tmp_path, monkeypatch, capsys):
    from adapterkern.bench import plot

    def broken(*_):
        raise RuntimeError("no font")

    monkeypatch.setattr(plot, "plot", broken)
    monkeypatch.setattr(plot, "refusal", lambda _path: None)
    assert main([*TINY, "--mode", "forward", "--plot", str(tmp_path / "a.png")]) == 0
    out = capsys.readouterr().out
    assert out.count("  adapterkern (reference) ") == 2
    assert out.endswith("not drawn: no font\n")


@no_gpu
def test_a_missing_package_shows_in_its_row(capsys, monkeypatch):
    from adapterkern.bench import external
    from adapterkern.bench.built import UnavailableError

    def missing(module, package):
        raise UnavailableError(f"{package} cannot be imported (No module named {module!r})")

    monkeypatch.setattr(external, "_import", missing)
    options = ["--tokens", "8", "--mode", "forward", "--baseline", "adapterhub", "plain"]
    assert main([*TINY[:5], "--seconds", "0.001", *options]) == 0
    out = capsys.readouterr().out
    assert "adapterhub: not available, adapters cannot be imported" in out
    assert any(line.split()[:1] == ["plain"] for line in out.splitlines())


@no_gpu
def test_a_wrong_backend_is_an_exit_code(monkeypatch, capsys):
    from adapterkern.backends.reference.backend import ReferenceBackend
    from adapterkern.results import Outputs

    forward = ReferenceBackend.forward

    def wrong(self, call, save):
        outputs, saved = forward(self, call, save)
        return Outputs(outputs.y * 1.01), saved

    monkeypatch.setattr(ReferenceBackend, "forward", wrong)
    assert main([*TINY, "--mode", "forward"]) == 1
    out = capsys.readouterr().out
    assert "adapterkern (reference): WRONG RESULT, not timed, y: error" in out


def test_a_gpu_table_labels_every_timing_and_ratio(gpu_result):
    from adapterkern.bench.table import render

    text = render(gpu_result)
    assert text.splitlines()[0] == (
        "Made-up GPU: adapterkern 0.1.0, torch 2.9.0, triton 3.5.0, commit 012345678"
    )
    assert "measured in this run: copy 4.00 TB/s, bf16 products 700 TFLOP/s" in text
    assert "UNSTEADY" not in text
    head = next(line for line in text.splitlines() if line.startswith("  implementation"))
    labels = (
        "cold us p20/p50/p80",
        "hot us",
        "time/adapterkern",
        "GB/s",
        "of copy",
        "of peak",
        "host us",
        "transient",
    )
    for label in labels:
        assert label in head
    plain = next(line for line in text.splitlines() if line.startswith("  plain"))
    assert "2.50x" in plain  # 0.8 of the floor against 0.32
    gpu_result.header["calibration"]["copy_bandwidth_after"] = 3.8e12
    assert "UNSTEADY" in render(gpu_result)


@no_gpu
def test_tune_needs_a_gpu_and_says_so(capsys):
    assert main(["tune"]) == 2
    err = capsys.readouterr().err
    assert (
        "nothing to tune here: it searches for the Triton kernels on a GPU (no CUDA device)" in err
    )
    assert "everything works without it" in err
    assert main(["tune", "--preset", "bert"]) == 2
    assert "known presets are" in capsys.readouterr().err
