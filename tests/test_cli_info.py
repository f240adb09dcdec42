"""The command line's frame, and `adapterkern info`: what it reports and what it calls a problem."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from info_reports import HEALTHY, gpu, machine

import adapterkern
from adapterkern import _env
from adapterkern.backends.triton import tuned
from adapterkern.backends.triton.launch_config import Device
from adapterkern.cli import info, main
from adapterkern.cli.info import probes, problems


def call(*words: str, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "adapterkern", *words]
    environment = {**os.environ, **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def run_in_process(capsys, *words: str) -> tuple[int, str, str]:
    try:
        code = main.main(words)
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_help_lists_every_command_without_importing_optional_packages():
    program = (
        "import sys\n"
        "from adapterkern.cli.main import main\n"
        "try:\n    main(['--help'])\n"
        "finally:\n    print(sorted({'transformers', 'peft', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, (_, summary) in main.COMMANDS.items():
        assert f"{name} " in done.stdout
        assert summary in done.stdout
    assert done.stdout.endswith("[]\n")


@pytest.mark.parametrize("name", main.COMMANDS)
def test_help_of_a_command_teaches_with_examples_and_exit_codes(capsys, name):
    code, out, _ = run_in_process(capsys, name, "--help")
    assert code == 0
    assert f"usage: adapterkern {name}" in out
    assert f"adapterkern {name}" in out.partition("examples:")[2]
    assert "exit codes:" in out


def test_version_is_the_packages(capsys):
    assert run_in_process(capsys, "--version") == (
        0,
        f"adapterkern {adapterkern.__version__}\n",
        "",
    )


def test_no_command_prints_the_help_as_an_error(capsys):
    code, out, err = run_in_process(capsys)
    assert (code, out) == (2, "")
    assert "usage: adapterkern" in err


def test_unknown_command_and_unknown_option_are_usage_errors(capsys):
    for words in (("bogus",), ("info", "--bogus")):
        code, out, err = run_in_process(capsys, *words)
        assert (code, out) == (2, "")
        assert "bogus" in err


def test_main_imports_the_chosen_command_alone_and_returns_its_code(capsys, monkeypatch):
    def add_parser(subparsers):
        parser = subparsers.add_parser("fine")
        parser.add_argument("--code", type=int)
        parser.set_defaults(run=lambda arguments: arguments.code)

    monkeypatch.setitem(sys.modules, "fake_command", SimpleNamespace(add_parser=add_parser))
    commands = {"broken": ("no_such_module", ""), "fine": ("fake_command", "")}
    monkeypatch.setattr(main, "COMMANDS", commands)
    assert run_in_process(capsys, "fine", "--code", "1") == (1, "", "")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        main.main(["broken"])


def test_interrupt_ends_a_command_without_a_traceback(capsys, monkeypatch):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "run", interrupted)
    assert run_in_process(capsys, "info") == (130, "", "adapterkern: ended by SIGINT\n")


@pytest.mark.parametrize("words", [("--help",), ("info",), ("check", "--quick"), ()])
@pytest.mark.parametrize(("attribute", "value"), [("BACKEND", "foo"), ("STRICT", "yes")])
def test_a_bad_environment_variable_is_a_usage_error(capsys, monkeypatch, words, attribute, value):
    monkeypatch.setattr(_env, attribute, value)
    code, out, err = run_in_process(capsys, *words)
    assert (code, out) == (2, "")
    assert err.startswith(f"adapterkern: error: the environment variable ADAPTERKERN_{attribute} ")
    assert f"got '{value}'" in err


def test_a_process_with_a_bad_environment_variable_ends_without_a_traceback():
    done = call("info", ADAPTERKERN_BACKEND="foo")
    assert (done.returncode, done.stdout) == (2, "")
    assert "ADAPTERKERN_BACKEND must be one of auto, " in done.stderr
    assert "Traceback" not in done.stderr


def test_info_json_is_one_object_with_every_probe_and_no_failure():
    done = call("info", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert set(report) == {"summary", *probes.PROBES, "problems"}
    assert [name for name in probes.PROBES if "error" in report[name]] == []
    assert report["versions"]["adapterkern"] == adapterkern.__version__
    assert report["versions"]["python"] == sys.version.split()[0]
    assert report["backends"]["reference"] is None


def test_info_tells_per_dtype_what_dispatch_chooses(monkeypatch):
    chosen = probes.probe_choice()
    assert set(chosen) == {"device", "float32", "float16", "bfloat16"}
    with adapterkern.use_backend("reference"):
        forced = probes.probe_choice()
    assert forced["bfloat16"] == "reference (named)"


def test_info_survives_any_probe_and_names_it(capsys, monkeypatch):
    def broken():
        raise OSError("no such thing")

    for name in probes.PROBES:
        monkeypatch.setitem(probes.PROBES, name, broken)
    code, out, err = run_in_process(capsys, "info")
    assert (code, err) == (0, "")
    assert out.startswith(
        "Whether adapters run on this machine is not known: the test of it failed."
    )
    for name in probes.PROBES:
        assert f"probe {name}: OSError: no such thing" in out


def test_info_shows_the_reason_of_a_missing_extension(monkeypatch):
    loaded = probes_extension().Loaded(None, "the CUDA extension is not built: nvcc not found.")
    monkeypatch.setattr(probes_extension(), "load", lambda: loaded)
    assert probes.probe_extension() == {"built": False, "reason": loaded.problem}


def probes_extension():
    from adapterkern.backends.cuda import extension

    return extension


def test_a_healthy_machine_has_no_problems():
    assert problems.find_problems(HEALTHY) == []


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        pytest.param(
            machine(versions={"torch": "2.5.1"}),
            "torch 2.5.1 is older than 2.9.1: pip install 'torch>=2.9.1'",
            id="old-torch",
        ),
        pytest.param(
            machine(versions={"triton": "3.7.1"}),
            "torch 2.9.1 is made for triton==3.5.1, but 3.7.1 is installed",
            id="wrong-triton",
        ),
        pytest.param(
            machine(versions={"triton": "3.6.0"}, torch={"triton_wanted": None}),
            "triton 3.6.0's interpreter fails with numpy 2.4.1: pip install 'numpy<2.4'",
            id="triton-3.6-numpy-2.4",
        ),
        pytest.param(
            machine(torch={"cuda": None}, gpus={"devices": []}),
            "an NVIDIA driver is present, but torch 2.9.1 is a CPU-only build",
            id="cpu-torch-beside-a-driver",
        ),
        pytest.param(
            machine(driver={"cuda": "12.8"}, gpus={"devices": []}),
            "the NVIDIA driver supports CUDA up to 12.8, torch was built for 13.0",
            id="old-driver",
        ),
        pytest.param(
            machine(gpus={"devices": []}),
            "torch sees no GPU: is CUDA_VISIBLE_DEVICES set empty?",
            id="hidden-gpu",
        ),
        pytest.param(
            machine(gpus=gpu(name="Tesla T4", capability="7.5")),
            "Tesla T4 has compute capability 7.5; the fused kernels need 8.0",
            id="old-gpu",
        ),
        pytest.param(
            machine(gpus=gpu(extension_error="no kernel image")),
            "does not run on NVIDIA H100: no kernel image. Build it anew with "
            "ADAPTERKERN_CUDA_ARCHS=9.0",
            id="no-code-for-the-gpu",
        ),
        pytest.param(
            machine(compiler={"compiler": None, "found": False}),
            "Triton needs a C compiler and there is none",
            id="no-compiler",
        ),
        pytest.param(
            machine(compiler={"compiler": "icc", "found": False}),
            "Triton needs a C compiler and icc is not there",
            id="wrong-CC",
        ),
        pytest.param(
            machine(compiler={"python_h_found": False}),
            "Triton needs /usr/include/python3.11/Python.h: install python3-dev",
            id="no-python-header",
        ),
        pytest.param(
            machine(cache={"writable": False}),
            "Triton cannot write /home/me/.triton/cache: set TRITON_CACHE_DIR",
            id="read-only-cache",
        ),
        pytest.param(
            machine(cache={"network": True, "filesystem": "nfs4"}),
            "is on a network disk (nfs4), where processes race",
            id="network-cache",
        ),
        pytest.param(
            machine(launches={"problem": "triton 9 launches kernels in another way."}),
            "triton 9 launches kernels in another way.",
            id="unknown-launches",
        ),
        pytest.param(
            machine(tuned={"problems": ["a.json is not JSON."]}),
            "tuned launch configurations left out: a.json is not JSON.",
            id="damaged-table",
        ),
        pytest.param(
            machine(
                environment={"ADAPTERKERN_BACKEND": "Triton"},
                backends={"triton": "no CUDA device"},
                choice={"float16": "none: triton was named and raises"},
            ),
            "ADAPTERKERN_BACKEND=Triton makes every call raise on cuda in float16 "
            "(no CUDA device): unset it, or name another backend",
            id="forced-backend-that-cannot-run",
        ),
    ],
)
def test_each_mishap_is_one_problem_with_its_cure(report, expected):
    found = problems.find_problems(report)
    assert len(found) == 1, found
    assert expected in found[0]


def test_triton_pairing_accepts_a_local_build_of_the_wanted_version():
    report = machine(versions={"triton": "3.5.1+git123"})
    assert problems.find_problems(report) == []


def test_missing_triton_is_a_problem_on_linux_alone(monkeypatch):
    report = machine(versions={"triton": None})
    monkeypatch.setattr(problems.platform, "system", lambda: "Linux")
    assert "triton is missing" in problems.find_problems(report)[0]
    monkeypatch.setattr(problems.platform, "system", lambda: "Darwin")
    assert problems.find_problems(report) == []


def test_without_a_gpu_what_triton_lacks_is_no_problem():
    report = machine(
        driver={"version": None, "cuda": None},
        gpus={"devices": []},
        compiler={"compiler": None, "found": False},
        cache={"writable": False, "network": True},
    )
    assert problems.find_problems(report) == []


def test_filesystem_of_takes_the_innermost_and_latest_mount(tmp_path):
    mounts = tmp_path / "mounts"
    inner = tmp_path / "my disk"
    inner.mkdir()
    point = str(inner).replace(" ", "\\040")
    mounts.write_text(f"a / ext4 rw 0 0\nb {point} xfs rw 0 0\nc {point} nfs4 rw 0 0\n")
    assert probes.filesystem_of(inner, mounts) == "nfs4"
    assert probes.filesystem_of(tmp_path, mounts) == "ext4"
    assert probes.filesystem_of(tmp_path, tmp_path / "absent") is None


def test_probe_cache_obeys_tritons_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "here" / "there"))
    found = probes.probe_cache()
    assert (found["folder"], found["writable"]) == (str(tmp_path / "here" / "there"), True)
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.setenv("TRITON_HOME", str(tmp_path))
    assert probes.probe_cache()["folder"] == str(tmp_path / ".triton" / "cache")
    (tmp_path / ".triton").write_text("a file where a folder should be")
    assert probes.probe_cache()["writable"] is False


def test_probe_launches_tells_what_the_launcher_found(monkeypatch):
    launcher = pytest.importorskip("adapterkern.backends.triton.launcher")
    assert probes.probe_launches() == {"problem": None}
    monkeypatch.setattr(launcher, "PROBLEM", "unknown")
    assert probes.probe_launches() == {"problem": "unknown"}


def test_probe_tuned_tells_which_files_serve_the_gpus_here(tmp_path, monkeypatch):
    device, other = Device(132, 232448), Device(108, 166912)
    for name, gpu_device in (("h200", device), ("a100", other)):
        tuned.save(tmp_path / f"{name}.json", name, gpu_device, [])
    (tmp_path / "old.json").write_text("{}")
    monkeypatch.setattr(tuned, "FOLDERS", (tmp_path, tmp_path / "missing"))
    assert [file["used"] for file in probes.probe_tuned()["files"]] == [False, False]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(tuned, "device_of", lambda _index: device)
    found = probes.probe_tuned()
    assert found["folder"] == str(tmp_path)
    assert found["files"] == [
        {"path": str(tmp_path / "a100.json"), "gpu": "a100", "entries": 0, "used": False},
        {"path": str(tmp_path / "h200.json"), "gpu": "h200", "entries": 0, "used": True},
    ]
    (problem,) = found["problems"]
    assert problem.startswith(f"{tmp_path / 'old.json'} has schema None, this version reads")


def test_probe_compiler_reports_the_compiler_that_triton_would_take(tmp_path, monkeypatch):
    compiler = tmp_path / "mycc"
    compiler.write_text("#!/bin/sh\necho mycc 1.2\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    found = probes.probe_compiler()
    assert (found["compiler"], found["version"]) == (str(compiler), "mycc 1.2")
    monkeypatch.setenv("CC", str(tmp_path / "absent"))
    assert probes.probe_compiler()["found"] is False


def test_the_lowest_versions_are_those_that_the_package_asks_for():
    required = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    for name, lowest in problems.LOWEST.items():
        assert f'"{name}>={lowest}' in required
