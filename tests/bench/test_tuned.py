"""Tuned launch configurations: the nearest entry, the plan it makes, the file, and the search."""

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from adapterkern.backends.triton import launch_config, tuned
from adapterkern.backends.triton.launch_config import (
    Device,
    LaunchConfig,
    Problem,
    RowBlock,
    Split,
    WeightGradient,
)
from adapterkern.backends.triton.tuned import Entry, nearest
from adapterkern.bench import tune
from adapterkern.bench.cases import BenchCase
from adapterkern.bench.providers import PROVIDERS
from adapterkern.bench.timing import WallTimer, interleave
from adapterkern.cli.main import main

H200 = Device(num_sms=132, shared_memory=227 * 1024)
TILES = LaunchConfig(128, 64, 64, 8, 3)


def problem(tokens, hidden=1024, bottleneck=64, ieee=False, wide=False):
    return Problem(tokens, hidden, bottleneck, ieee, wide)


def row_block(tokens, hidden=1024, bottleneck=64, **kernel):
    entry_problem = problem(tokens, hidden, bottleneck)
    return Entry(entry_problem, "row_block", (replace(TILES, **kernel),))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    tuned.clear_caches()
    yield tmp_path
    tuned.clear_caches()


def test_the_nearest_entry_has_the_smallest_largest_factor():
    entries = [row_block(2048), row_block(8192), row_block(16384, hidden=1536)]
    assert nearest(entries, "tokens", problem(12000)) is entries[1]  # 1.46, against 1.5 for H
    assert nearest(entries, "tokens", problem(16384, hidden=1400)) is entries[2]
    assert nearest(entries, "tokens", problem(2048)) is entries[0]


def test_no_entry_serves_a_problem_more_than_twice_its_size():
    entries = [row_block(1024)]
    assert nearest(entries, "tokens", problem(2048)) is entries[0]
    assert nearest(entries, "tokens", problem(2049)) is None
    assert nearest(entries, "tokens", problem(511)) is None
    assert nearest(entries, "tokens", problem(1024, hidden=2049)) is None
    assert nearest(entries, "tokens", problem(1024, bottleneck=31)) is None
    assert nearest([], "tokens", problem(1024)) is None


def test_an_entry_serves_its_own_arithmetic_and_kind_only():
    entries = [row_block(1024)]
    assert nearest(entries, "tokens", problem(1024, wide=True)) is None
    assert nearest(entries, "tokens", problem(1024, ieee=True)) is None
    assert nearest(entries, "weights", problem(1024)) is None


def test_a_row_block_too_narrow_for_r_is_no_candidate():
    narrow, wide = row_block(1024), row_block(700, bottleneck=128, block_r=128)
    assert nearest([narrow, wide], "tokens", problem(1024, bottleneck=80)) is wide
    assert nearest([narrow], "tokens", problem(1024, bottleneck=80)) is None


def test_equal_distances_are_told_apart_by_the_sum_then_by_order():
    first, second = row_block(1024, bottleneck=32, block_r=128), row_block(1024, block_r=128)
    third = row_block(1024, bottleneck=32, block_r=128, num_warps=4)
    assert nearest([first, second], "tokens", problem(2048, bottleneck=64)) is second
    assert nearest([first, third], "tokens", problem(1024)) is first


@pytest.mark.parametrize("tokens", [1, 100, 4097])
@pytest.mark.parametrize("programs", [1, 2, 4])
def test_the_slices_of_a_tuned_plan_cover_everything_once(tokens, programs):
    asked = problem(tokens, hidden=1000, bottleneck=70)
    split = tuned.plan(Entry(asked, "split", (TILES, TILES), programs), asked, H200)
    assert isinstance(split, Split)
    assert split.features_per_split % TILES.block_h == 0
    assert (split.num_splits - 1) * split.features_per_split < 1000
    assert split.num_splits * split.features_per_split >= 1000
    weights = tuned.plan(Entry(asked, "weight_gradient", (TILES,), programs), asked, H200)
    assert isinstance(weights, WeightGradient)
    assert weights.tokens_per_split % TILES.block_t == 0
    assert (weights.num_splits - 1) * weights.tokens_per_split < tokens
    assert weights.num_splits * weights.tokens_per_split >= tokens


def test_without_an_entry_the_formula_decides(folder):
    for tokens in (1, 16, 2048, 16384):
        for bottleneck in (64, 256):
            asked = problem(tokens, bottleneck=bottleneck)
            assert tuned.token_plan(asked, H200) == launch_config.token_plan(asked, H200)
            wanted = launch_config.weight_gradient_plan(asked, H200)
            assert tuned.weight_gradient_plan(asked, H200) == wanted


def test_a_file_serves_gpus_of_its_own_properties_alone(folder):
    entry = row_block(16384, block_t=64, num_warps=4)
    tuned.save(folder / "some-gpu.json", "Some GPU", H200, [entry])
    assert tuned.load(folder / "some-gpu.json") == ("Some GPU", H200, [entry])
    assert tuned.token_plan(problem(16000), H200) == RowBlock(entry.kernels[0])
    other = replace(H200, num_sms=108)
    assert tuned.token_plan(problem(16000), other) == launch_config.token_plan(
        problem(16000), other
    )


def test_the_file_of_the_present_gpu_comes_before_its_like(folder, monkeypatch):
    own, like = row_block(16384, num_warps=4), row_block(16384, num_warps=8)
    tuned.save(folder / "a-h100.json", "H100", H200, [like])  # as many SMs, as much memory
    tuned.save(folder / "b-h200.json", "H200", H200, [own])
    for names, wanted in (({"H200"}, own), ({"H100"}, like), ({"H200", "A100"}, own)):
        monkeypatch.setattr(tuned, "present", lambda _device, names=names: names)
        tuned.clear_caches()
        assert tuned.entries_for(H200) == (wanted,)
    monkeypatch.setattr(tuned, "present", lambda _device: {"GH200"})
    tuned.clear_caches()
    assert tuned.entries_for(H200) == (like, own)  # none of its own: those of its like


def test_the_present_gpus_of_some_properties_are_named(monkeypatch):
    def properties(index):
        sms = (132, 132, 108)[index]
        return SimpleNamespace(
            name=("H100", "H200", "A100")[index],
            multi_processor_count=sms,
            shared_memory_per_block_optin=227 * 1024,
        )

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    assert tuned.present(H200) == {"H100", "H200"}
    assert tuned.present(replace(H200, num_sms=108)) == {"A100"}


def test_shared_memory_comes_from_triton_where_torch_does_not_tell(monkeypatch):
    driver = pytest.importorskip("triton.runtime").driver
    utils = SimpleNamespace(get_device_properties=lambda index: {"max_shared_mem": 101376 + index})
    monkeypatch.setattr(driver, "_active", SimpleNamespace(utils=utils))
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda _index: SimpleNamespace(multi_processor_count=84),
    )
    assert tuned.device_of(1) == launch_config.Device(84, 101377)


@pytest.mark.parametrize("text", ['{"schema": "adapterkern-tuned/0"}', "{", "[]", "\xff"])
def test_a_file_that_cannot_be_read_is_left_out_with_one_warning(folder, text):
    (folder / "old.json").write_text(text, encoding="latin-1")
    tuned.save(folder / "some-gpu.json", "Some GPU", H200, [row_block(1024, block_t=32)])
    with pytest.warns(UserWarning, match=r"left out: .*old\.json") as warned:
        [tuned.token_plan(problem(tokens), H200) for tokens in (1000, 1024, 100000)]
    assert len(warned) == 1
    assert tuned.token_plan(problem(1000), H200).kernel.block_t == 32


def test_a_writer_that_fails_leaves_the_old_entries(folder, monkeypatch):
    path = folder / "some-gpu.json"
    tuned.save(path, "Some GPU", H200, [row_block(64)])
    before = path.read_text()
    monkeypatch.setattr(tuned.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        tuned.save(path, "Some GPU", H200, [row_block(128)])
    assert path.read_text() == before
    assert [entry.name for entry in folder.iterdir()] == ["some-gpu.json"]


def test_a_file_of_another_schema_is_refused(folder):
    path = folder / "old.json"
    tuned.save(path, "Some GPU", H200, [row_block(64)])
    path.write_text(path.read_text().replace("row_block", "spiral"))
    with pytest.raises(ValueError, match=r"unknown form 'spiral'; known: row_block, split"):
        tuned.load(path)
    path.write_text(path.read_text().replace(tuned.SCHEMA, "adapterkern-tuned/0"))
    with pytest.raises(ValueError, match="this version reads"):
        tuned.load(path)


def test_a_forced_entry_is_taken_within_its_block_only(folder):
    entry = row_block(16384, block_t=32)
    before = tuned.token_plan(problem(5), H200)
    with tuned.forced(entry):
        assert tuned.token_plan(problem(5), H200) == RowBlock(entry.kernels[0])
        assert tuned.weight_gradient_plan(problem(5), H200).kernel.block_t == 32  # the formula's
    assert tuned.token_plan(problem(5), H200) == before


def test_the_files_in_the_package_can_be_read():
    for path in tuned.FOLDER.glob("*.json"):
        gpu, device, entries = tuned.load(path)
        assert gpu
        assert device.num_sms > 0
        assert entries


@pytest.mark.parametrize("kind", ["tokens", "weights"])
@pytest.mark.parametrize("tokens", [16, 2048, 16384])
def test_candidates_differ_from_the_plan_in_force_and_fit(kind, tokens, folder):
    asked = problem(tokens)
    base = tune.current(kind, asked, H200)
    found = tune.candidates(kind, asked, H200)
    assert len(found) == len(set(found)) > 20
    assert base not in found
    for entry in found:
        assert entry.kind == kind
        assert entry.problem == asked
        for kernel in entry.kernels:
            tiles = (kernel.block_t + kernel.block_r) * kernel.block_h * 2
            assert tiles * (kernel.num_stages - 1) <= H200.shared_memory
    if kind == "tokens":
        assert {entry.form for entry in found} == {"row_block", "split"}


def test_current_plans_come_back_from_their_entries(folder):
    for tokens, bottleneck in ((16, 64), (2048, 64), (16384, 64), (16384, 256)):
        asked = problem(tokens, bottleneck=bottleneck)
        entry = tune.current("tokens", asked, H200)
        assert tuned.plan(entry, asked, H200) == launch_config.token_plan(asked, H200)
        entry = tune.current("weights", asked, H200)
        assert tuned.plan(entry, asked, H200) == launch_config.weight_gradient_plan(asked, H200)


class Scripted(WallTimer):
    """Gives the entry of each call a time of the script's."""

    device = torch.device("cpu")

    def __init__(self, script):
        self.script, self.timed = script, []

    def measure(self, kind, subjects, seconds):
        def sample(name, subject):
            taken = []
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(tuned, "forced", Spy(taken))
                subject.calls[0]()
            self.timed.append((name, taken[0]))
            return self.script(taken[0])

        return interleave(subjects, sample, seconds)


class Spy:
    def __init__(self, taken):
        self.taken = taken

    def __call__(self, entry):
        self.taken.append(entry)
        return contextlib.nullcontext()


def searched(monkeypatch, script, mode="forward", broken=lambda entry: False):
    reference = PROVIDERS["reference"]

    def build(case, inputs):
        built = reference.build(case, inputs)

        def forward(x):
            factor = 1.5 if any(map(broken, tuned._forced.values())) else 1.0
            return built.forward(x) * factor

        return replace(built, forward=forward)

    monkeypatch.setitem(PROVIDERS, "triton", replace(reference, name="triton", build=build))
    case = BenchCase(64, 8, 16, "fp32", mode=mode)
    kind = "tokens" if mode == "forward" else "weights"
    asked = tune.problem_of(case, ieee=True)
    return tune.search(case, asked, H200, kind, Scripted(script), seconds=0.0)


def test_the_search_takes_the_fastest_entry_that_is_right(folder, monkeypatch):
    def script(entry):
        return 40.0 if entry.kernels[0].num_stages == 4 else 100.0

    found = searched(monkeypatch, script)
    assert found.changed
    assert (found.before_us, found.after_us) == (100.0, 40.0)
    assert found.entry.kernels[0].num_stages == 4
    assert "100.0 us to 40.0 us" in str(found)
    # The same script, but four stages give a wrong result: nothing is left to gain.
    found = searched(monkeypatch, script, broken=lambda entry: entry.kernels[0].num_stages == 4)
    assert not found.changed
    assert found.after_us == found.before_us == 100.0
    assert "kept" in str(found)


def test_a_gain_within_the_noise_changes_nothing(folder, monkeypatch):
    base = tune.current("weights", tune.problem_of(BenchCase(64, 8, 16, "fp32"), True), H200)
    found = searched(monkeypatch, lambda entry: 100.0 if entry == base else 98.5, mode="backward")
    assert not found.changed
    assert found.entry == base


def test_a_new_entry_replaces_that_of_the_same_problem():
    old = [row_block(1024), row_block(2048)]
    new = [row_block(2048, num_warps=4), row_block(4096)]
    merged = tune.merge(old, new)
    assert [entry.problem.num_tokens for entry in merged] == [1024, 2048, 4096]
    assert [entry.kernels[0].num_warps for entry in merged] == [8, 4, 8]


def test_searches_come_in_the_given_order_and_leave_out_what_is_done():
    done = [row_block(16), Entry(problem(16384), "weight_gradient", (TILES,))]
    found = tune.searches([(1024, 64), (768, 48)], [16384, 16], ["bf16"], True, done)
    assert [(entry.kind, str(entry.case)) for entry in found] == [
        ("tokens", "forward-bf16-gelu-T16384-H1024-R64"),
        ("tokens", "forward-bf16-gelu-T16384-H768-R48"),
        ("weights", "backward-bf16-gelu-T16384-H768-R48"),
        ("weights", "backward-bf16-gelu-T16-H1024-R64"),
        ("tokens", "forward-bf16-gelu-T16-H768-R48"),
        ("weights", "backward-bf16-gelu-T16-H768-R48"),
    ]


@pytest.fixture
def tuner(folder, monkeypatch):
    """`adapterkern tune` on a made-up H200 whose searches take a minute each."""
    from adapterkern.backends.triton.backend import TritonBackend
    from adapterkern.bench import timing
    from adapterkern.cli import tune as command

    state = SimpleNamespace(minutes=0, searched=[], fails=None, folder=folder)

    def search(case, asked, device, kind, timer, **_):
        if len(state.searched) == 3 and state.fails is not None:
            raise state.fails
        state.minutes += 1
        state.searched.append((kind, case.tokens))
        form = "weight_gradient" if kind == "weights" else "row_block"
        return tune.Found(Entry(asked, form, (TILES,)), 20.0, 10.0, True, 7)

    properties = SimpleNamespace(
        name="NVIDIA H200",
        multi_processor_count=132,
        shared_memory_per_block_optin=227 * 1024,
    )
    monkeypatch.setattr(TritonBackend, "unavailable_reason", lambda _self: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _index: properties)
    monkeypatch.setattr(timing, "CudaTimer", lambda _device: None)
    monkeypatch.setattr(tune, "search", search)
    clock = SimpleNamespace(monotonic=lambda: 60.0 * state.minutes)
    monkeypatch.setattr(command, "time", clock)
    return state


TUNE = ["tune", "--hidden-size", "1024", "--bottleneck-size", "64", "--tokens", "2048", "16"]
ALL = [("tokens", 2048), ("weights", 2048), ("tokens", 16), ("weights", 16)]


def test_a_search_is_bounded_in_time_and_goes_on_where_it_was(tuner, capsys):
    path = tuner.folder / "nvidia-h200.json"
    assert main([*TUNE, "--minutes", "2.5"]) == 0
    assert tuner.searched == ALL[:3]
    out = capsys.readouterr().out
    assert "NVIDIA H200: 4 searches, for 2.5 minutes" in out
    assert "out of time: 1 searches are left" in out
    assert out.endswith(f"3 of 3 configurations changed; written to {path}\n")
    assert len(tuned.load(path).entries) == 3
    assert main(TUNE) == 0
    assert tuner.searched == ALL
    assert len(tuned.load(path).entries) == 4
    assert main(TUNE) == 0
    assert tuner.searched == ALL


@pytest.mark.parametrize(
    ("fails", "code"), [(KeyboardInterrupt(), 130), (torch.OutOfMemoryError("no room"), 0)]
)
def test_what_was_found_before_the_end_is_in_the_file(tuner, capsys, fails, code):
    tuner.fails = fails
    assert main(TUNE) == code
    assert len(tuned.load(tuner.folder / "nvidia-h200.json").entries) == 3
    assert "3 of 3 configurations changed" in capsys.readouterr().out


def test_a_file_that_cannot_take_the_entries_is_refused_before_the_search(tuner, capsys):
    other = tuner.folder / "nvidia-h100.json"
    tuned.save(other, "NVIDIA H100", H200, [row_block(64)])
    before = other.read_text()
    (tuner.folder / "old.json").write_text('{"schema": "adapterkern-tuned/0"}')
    (tuner.folder / "folder").mkdir()
    for name, says in (
        ("nvidia-h100.json", "was searched on NVIDIA H100 (132 SMs), this is NVIDIA H200"),
        ("old.json", "has schema 'adapterkern-tuned/0'"),
        ("folder", "is a folder"),
        ("old.json/x.json", "cannot write to"),
    ):
        assert main([*TUNE, "--out", str(tuner.folder / name)]) == 2
        assert says in capsys.readouterr().err
    for options, says in ((["--minutes", "0"], "above 0"), (["--limit", "0"], "at least 1")):
        assert main([*TUNE, *options]) == 2
        assert says in capsys.readouterr().err
    assert tuner.searched == []
    assert other.read_text() == before
