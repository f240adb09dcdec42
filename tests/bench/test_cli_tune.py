"""`adapterkern tune`: its time, its file, how it ends, and what it says."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tuning import H200, AtOnce, Scripted, entry_of

from adapterkern.backends.triton import tuned
from adapterkern.backends.triton.tuned import HeldOut
from adapterkern.bench import search, tune
from adapterkern.bench.compiling import Compilers as COMPILERS
from adapterkern.bench.gate import Verdict
from adapterkern.bench.results import LostDeviceError
from adapterkern.cli.main import main

RANK = search.rank


@pytest.fixture
def tuner(tmp_path, monkeypatch):
    """`adapterkern tune` on a made-up H200 whose searches take a minute each."""
    from adapterkern.backends.triton.backend import TritonBackend
    from adapterkern.bench import compiling, timing
    from adapterkern.cli import tune as command

    folder = tmp_path / "home" / "tuned"  # which is not there yet
    state = SimpleNamespace(minutes=0, searched=[], fails=None, folder=folder, held_out={})
    monkeypatch.setattr(tuned, "FOLDERS", (folder, tmp_path / "package"))
    tuned.clear_caches()

    def rank(queued, timer, device, compilers, progress):
        if len(state.searched) == 3 and state.fails is not None:
            raise state.fails
        one = queued.search
        state.minutes += 1
        state.searched.append((one.kind, one.case.tokens))
        base = tune.formula(one.kind, one.problem, device)
        faster = replace(base, kernels=(replace(base.kernels[0], num_warps=2), *base.kernels[1:]))
        return search.Ranked(one, base, 20.0, [(10.0, faster)], 7)

    def judge(trial, timer, progress):
        after = state.held_out.get(trial.kind, 30.0)
        if isinstance(after, Exception):
            raise after
        return HeldOut(trial.kind, False, False, str(trial.case), 30.0, after)

    properties = SimpleNamespace(
        name="NVIDIA H200",
        multi_processor_count=132,
        shared_memory_per_block_optin=227 * 1024,
        major=9,
    )
    monkeypatch.setattr(TritonBackend, "unavailable_reason", lambda _self: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _index: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _index: (9, 0))
    monkeypatch.setattr(timing, "CudaTimer", lambda _device: None)
    state.compilers = lambda jobs, capability, device: AtOnce()
    monkeypatch.setattr(compiling, "Compilers", lambda *target: state.compilers(*target))
    monkeypatch.setattr(search, "rank", rank)
    monkeypatch.setattr(search, "judge", judge)
    clock = SimpleNamespace(monotonic=lambda: 60.0 * state.minutes)
    monkeypatch.setattr(command, "time", clock)
    yield state
    tuned.clear_caches()


TUNE = ["tune", "--hidden-size", "1024", "--bottleneck-size", "64", "--tokens", "2048", "16"]
ALL = [("tokens", 2048), ("weights", 2048), ("tokens", 16), ("weights", 16)]


def test_a_search_is_bounded_in_time_and_goes_on_where_it_was(tuner, capsys):
    path = tuner.folder / "nvidia-h200.json"
    assert main([*TUNE, "--minutes", "2.5", "--jobs", "3"]) == 0
    assert tuner.searched == ALL[:3]
    out = capsys.readouterr().out
    assert "NVIDIA H200: 4 searches, for 2.5 minutes, 3 processes compiling" in out
    assert "out of time: 1 searches are left" in out
    assert "tokens T2048-H1024-R64: 20.0 us to 10.0 us" in out
    assert out.endswith(f"3 of 3 configurations changed; written to {path}\n")
    entries = tuned.load(path).entries
    assert [entry.evidence for entry in entries] == [tuned.Evidence(20.0, 10.0, "NVIDIA H200")] * 3
    assert main(TUNE) == 0
    assert tuner.searched == ALL
    assert len(tuned.load(path).entries) == 4
    assert not tuned.FOLDERS[1].exists()  # the package is as it was
    assert main(TUNE) == 0
    assert tuner.searched == ALL


def test_a_tenth_of_the_time_is_for_the_held_out_shapes(tuner):
    assert main([*TUNE, "--minutes", "2.2"]) == 0  # 1.98 for searches of one minute
    assert len(tuner.searched) == 2


def test_no_more_is_compiled_ahead_than_a_few_searches(tuner, monkeypatch):
    """What is queued when the time is over keeps the compilers from the held-out shapes."""
    from adapterkern.cli import tune as command

    enqueue, queued = search.enqueue, []
    monkeypatch.setattr(search, "enqueue", lambda one, *rest: queued.append(one)
                        or enqueue(one, *rest))  # fmt: skip
    assert main(["tune", "--minutes", "2.2"]) == 0
    assert len(tuner.searched) == 2
    assert len(queued) == len(tuner.searched) - 1 + command.AHEAD
    queued.clear()
    tuner.searched.clear()
    assert main(["tune", "--minutes", "99"]) == 0
    assert len(queued) == len(tuner.searched) == 23  # each once, in its turn


@pytest.mark.parametrize(
    ("fails", "code", "says"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (torch.OutOfMemoryError("no room"), 0, "not searched, OutOfMemoryError: no room"),
        (LostDeviceError("the GPU was lost"), 1, "the GPU was lost\nended"),
    ],
)
def test_what_was_found_before_the_end_is_in_the_file(tuner, capsys, fails, code, says):
    tuner.fails = fails
    assert main(TUNE) == code
    assert len(tuned.load(tuner.folder / "nvidia-h200.json").entries) == 3
    out = capsys.readouterr().out
    assert says in out
    assert "3 of 3 configurations changed" in out


def test_the_compilers_are_those_of_the_gpu_and_of_the_command_line(tuner):
    targets = []

    def compilers(*target):
        targets.append(target)
        return AtOnce()

    tuner.compilers = compilers
    assert main([*TUNE, "--jobs", "5"]) == 0
    assert targets == [(5, 90, H200)]


@pytest.mark.thorough
def test_a_run_compiles_in_its_other_processes_alone(tuner, tmp_path, monkeypatch, capsys):
    """The whole command on a stand-in that compiles: two searches of two candidates each."""
    fake = pytest.importorskip("fake_gpu", reason="triton is not installed")
    from adapterkern.bench import compiling, timing

    device = replace(H200, num_sms=131)  # for which this process has no kernel yet
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(compiling, "Compilers", COMPILERS)
    monkeypatch.setattr(search, "rank", RANK)
    monkeypatch.setattr(timing, "CudaTimer", lambda _device: Scripted(lambda _entry: 20.0))
    monkeypatch.setattr(tuned, "device_of", lambda _index: device)
    monkeypatch.setattr(search.Gate, "judge", lambda *_: Verdict("y", 0.0, 1.0))
    monkeypatch.setattr(search, "repeats", lambda _outputs: True)  # they are what memory held
    sizes = ["--hidden-size", "64", "--bottleneck-size", "16", "--tokens", "300"]
    with fake.fake_gpu(fake.FakeGpu(device=device)) as gpu:
        assert main(["tune", *sizes, "--limit", "2", "--jobs", "2"]) == 0
    assert gpu.binaries == 0
    kernels = {launch.kernel for launch in gpu.launches}
    assert {"bottleneck_bwd_split_dz_kernel", "bottleneck_bwd_dw_kernel"} <= kernels
    assert "tokens T300-H64-R16: 20.0 us, kept (2 tried)" in capsys.readouterr().out
    assert len(tuned.load(tuner.folder / "nvidia-h200.json").entries) == 2


@pytest.fixture
def near_held_out(monkeypatch):
    """Both kinds of entry that the command line below finds give another plan there."""
    case = replace(tune.HELD_OUT[0], hidden_size=1280, bottleneck_size=48, tokens=3000)
    monkeypatch.setattr(search, "HELD_OUT", (case,))


def test_held_out_shapes_are_said_and_kept_with_the_entries(tuner, near_held_out, capsys):
    assert main(TUNE) == 0
    out = capsys.readouterr().out
    assert "held out tokens step-bf16-gelu-T3000-H1280-R48: 30.0 us to 30.0 us" in out
    assert "held out weights backward-bf16-gelu-T3000-H1280-R48" in out
    assert "dropped" not in out
    file = tuned.load(tuner.folder / "nvidia-h200.json")
    assert [row.kind for row in file.held_out] == ["tokens", "weights"]
    assert len(file.entries) == 4


def test_a_class_that_loses_on_a_held_out_shape_leaves_the_file(tuner, near_held_out, capsys):
    tuner.held_out = {"weights": 31.0}
    assert main(TUNE) == 0
    assert "dropped 2 entries for weights in half precision" in capsys.readouterr().out
    file = tuned.load(tuner.folder / "nvidia-h200.json")
    assert {entry.kind for entry in file.entries} == {"tokens"}
    assert [row.after_us for row in file.held_out] == [30.0, 31.0]


def test_a_device_lost_on_a_held_out_shape_leaves_the_entries(tuner, near_held_out, capsys):
    tuner.held_out = {"tokens": LostDeviceError("the GPU was lost")}
    assert main(TUNE) == 1
    assert "held-out shapes were not timed to the end" in capsys.readouterr().out
    assert len(tuned.load(tuner.folder / "nvidia-h200.json").entries) == 4


def test_a_held_out_shape_without_room_condemns_nothing(tuner, near_held_out, capsys):
    tuner.held_out = {"tokens": torch.OutOfMemoryError("no room")}
    assert main(TUNE) == 0
    assert "not timed, OutOfMemoryError: no room" in capsys.readouterr().out
    assert len(tuned.load(tuner.folder / "nvidia-h200.json").entries) == 4


def test_a_file_that_cannot_take_the_entries_is_refused_before_the_search(tuner, capsys):
    tuner.folder.mkdir(parents=True)
    other = tuner.folder / "nvidia-h100.json"
    tuned.save(other, "NVIDIA H100", H200, [entry_of(64)])
    before = other.read_text()
    (tuner.folder / "old.json").write_text('{"schema": "adapterkern-tuned/0"}')
    (tuner.folder / "folder").mkdir()
    for name, says in (
        ("nvidia-h100.json", "was searched on NVIDIA H100 (132 SMs), this is NVIDIA H200"),
        ("old.json", "has schema 'adapterkern-tuned/0'"),
        ("old.json", f"hint: delete {tuner.folder / 'old.json'}"),
        ("folder", "is a folder"),
        ("old.json/x.json", "cannot write to"),
    ):
        assert main([*TUNE, "--out", str(tuner.folder / name)]) == 2
        assert says in capsys.readouterr().err
    for options, says in (
        (["--minutes", "0"], "above 0"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--jobs", "0"], "--jobs must be at least 1"),
    ):
        assert main([*TUNE, *options]) == 2
        assert says in capsys.readouterr().err
    assert tuner.searched == []
    assert other.read_text() == before
