"""Tuned launch configurations: the nearest entry, the plan it makes, and the file."""

import json
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
from adapterkern.backends.triton.tuned import Entry, Evidence, HeldOut, nearest

H200 = Device(num_sms=132, shared_memory=227 * 1024)
TILES = LaunchConfig(128, 64, 64, 8, 3)


def problem(tokens, hidden=1024, bottleneck=64, ieee=False, wide=False):
    return Problem(tokens, hidden, bottleneck, ieee, wide)


def row_block(tokens, hidden=1024, bottleneck=64, **kernel):
    entry_problem = problem(tokens, hidden, bottleneck)
    return Entry(entry_problem, "row_block", (replace(TILES, **kernel),))


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The user's cache folder and the package's own, both empty."""
    made = tmp_path / "cache", tmp_path / "package"
    for folder in made:
        folder.mkdir()
    monkeypatch.setattr(tuned, "FOLDERS", made)
    tuned.clear_caches()
    yield made
    tuned.clear_caches()


@pytest.fixture
def folder(folders):
    return folders[0]


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
    assert tuned.load(folder / "some-gpu.json") == ("Some GPU", H200, [entry], ())
    assert tuned.token_plan(problem(16000), H200) == RowBlock(entry.kernels[0])
    other = replace(H200, num_sms=108)
    assert tuned.token_plan(problem(16000), other) == launch_config.token_plan(
        problem(16000), other
    )


def test_a_file_keeps_what_its_entries_were_found_by(folder):
    path = folder / "some-gpu.json"
    entry = replace(row_block(16384), evidence=Evidence(20.0, 15.0, "Some GPU"))
    row = HeldOut("tokens", False, False, "step-bf16-gelu-T4097-H1280-R24", 30.0, 29.0)
    tuned.save(path, "Some GPU", H200, [entry, row_block(64)], [row])
    read = tuned.load(path)
    assert [found.evidence for found in read.entries] == [None, entry.evidence]
    assert read.held_out == (row,)
    assert read.entries[1] == replace(entry, evidence=None)  # evidence makes no other entry


def test_a_file_without_evidence_is_read_as_before(folder):
    path = folder / "some-gpu.json"
    tuned.save(path, "Some GPU", H200, [row_block(64)])
    data = json.loads(path.read_text())
    del data["held_out"], data["entries"][0]["evidence"]
    path.write_text(json.dumps(data))
    assert tuned.load(path) == ("Some GPU", H200, [row_block(64)], ())


def test_the_file_of_the_present_gpu_comes_before_its_like(folder, monkeypatch):
    own, like = row_block(16384, num_warps=4), row_block(16384, num_warps=8)
    tuned.save(folder / "a-h100.json", "H100", H200, [like])  # as many SMs, as much memory
    tuned.save(folder / "b-h200.json", "H200", H200, [own])
    for names, wanted in (({"H200"}, own), ({"H100"}, like), ({"H200", "A100"}, own)):
        monkeypatch.setattr(tuned, "present", lambda _device, names=names: names)
        tuned.clear_caches()
        assert tuned.tables_for(H200) == [[wanted], []]
    monkeypatch.setattr(tuned, "present", lambda _device: {"GH200"})
    tuned.clear_caches()
    assert tuned.tables_for(H200) == [[like, own], []]  # none of its own: those of its like


def test_the_cache_folder_is_asked_before_the_package(folders):
    cached, packaged = row_block(2048, num_warps=4), row_block(1024, num_warps=8)
    far = row_block(100, num_warps=8)
    tuned.save(folders[0] / "h200.json", "H200", H200, [cached])
    tuned.save(folders[1] / "h200.json", "H200", H200, [packaged, far])
    assert tuned.tables_for(H200) == [[cached], [far, packaged]]
    assert tuned.token_plan(problem(1024), H200) == RowBlock(cached.kernels[0])
    assert tuned.token_plan(problem(1000), H200) == RowBlock(packaged.kernels[0])  # 2048 is far
    (folders[0] / "h200.json").unlink()
    tuned.clear_caches()
    assert tuned.token_plan(problem(1024), H200) == RowBlock(packaged.kernels[0])


def test_the_packages_file_of_this_gpu_comes_before_a_cached_one_of_its_like(folders, monkeypatch):
    monkeypatch.setattr(tuned, "present", lambda _device: {"H200"})
    tuned.save(folders[0] / "h100.json", "H100", H200, [row_block(1024, num_warps=4)])
    tuned.save(folders[1] / "h200.json", "H200", H200, [row_block(1024, num_warps=8)])
    assert tuned.tables_for(H200) == [[], [row_block(1024, num_warps=8)]]


def test_a_cache_folder_that_is_missing_or_closed_leaves_the_package(folders, monkeypatch):
    def closed(folder):
        if folder == folders[0]:
            raise PermissionError(13, "closed", str(folder))
        return os_listdir(folder)

    os_listdir = tuned.os.listdir
    tuned.save(folders[1] / "h200.json", "H200", H200, [row_block(1024)])
    monkeypatch.setattr(tuned.os, "listdir", closed)
    assert [*tuned.read_all()[0]] == [folders[1] / "h200.json"]
    monkeypatch.undo()
    monkeypatch.setattr(tuned, "FOLDERS", (folders[0] / "missing", folders[1]))
    assert [*tuned.read_all()[0]] == [folders[1] / "h200.json"]


def test_the_present_gpus_of_some_properties_are_named(monkeypatch):
    def properties(index):
        sms = (132, 132, 108, 132)[index]
        return SimpleNamespace(
            name=("H100", "H200", "A100", "B100")[index],
            multi_processor_count=sms,
            shared_memory_per_block_optin=227 * 1024,
            major=10 if index == 3 else 9,
        )

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    assert tuned.present(H200) == {"H100", "H200"}
    assert tuned.present(replace(H200, num_sms=108)) == {"A100"}
    assert tuned.present(replace(H200, major=10)) == {"B100"}


@pytest.mark.parametrize("text", ['{"schema": "adapterkern-tuned/0"}', "{", "[]", "\xff"])
def test_a_file_that_cannot_be_read_is_left_out_with_one_warning(folder, text):
    (folder / "old.json").write_text(text, encoding="latin-1")
    tuned.save(folder / "some-gpu.json", "Some GPU", H200, [row_block(1024, block_t=32)])
    with pytest.warns(UserWarning, match=r"left out: .*old\.json") as warned:
        [tuned.token_plan(problem(tokens), H200) for tokens in (1000, 1024, 100000)]
    assert len(warned) == 1
    assert tuned.token_plan(problem(1000), H200).kernel.block_t == 32


def spoil(data, change):
    first = data["entries"][0]
    {
        "form": lambda: first.update(form="spiral"),
        "no kernel": lambda: first.update(kernels=[]),
        "one of two kernels": lambda: first.update(form="split"),
        "zero tile": lambda: first["kernels"][0].update(block_t=0),
        "odd tile": lambda: first["kernels"][0].update(block_h=96),
        "text": lambda: first["problem"].update(num_tokens="64"),
        "another field": lambda: first["kernels"][0].update(block_q=16),
        "a field less": lambda: first.pop("programs_per_sm"),
        "no entries": lambda: data.update(entries=None),
    }[change]()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("form", "unknown form 'spiral'; known: row_block, split, weight_gradient"),
        ("no kernel", "0 kernels for the form 'row_block'"),
        ("one of two kernels", "1 kernels for the form 'split'"),
        ("zero tile", "a size of 0"),
        ("odd tile", "block_h of 96, which must be a power of two"),
        ("text", "a size of '64'"),
        ("another field", "block_q"),
        ("a field less", "programs_per_sm"),
        ("no entries", "does not fit"),
    ],
)
def test_a_damaged_file_is_never_half_used(folder, change, says):
    """The second entry is as it should be, and is left out with the first."""
    path = folder / "some-gpu.json"
    tuned.save(path, "Some GPU", H200, [row_block(64), row_block(4096, block_t=32)])
    assert tuned.token_plan(problem(4096), H200).kernel.block_t == 32
    data = json.loads(path.read_text())
    spoil(data, change)
    path.write_text(json.dumps(data))
    tuned.clear_caches()
    with pytest.warns(UserWarning, match="left out") as warned:
        plan = tuned.token_plan(problem(4096), H200)
    assert plan == launch_config.token_plan(problem(4096), H200)
    (message,) = (str(one.message) for one in warned)
    assert says in message
    assert message.endswith(f"hint: delete {path}; `adapterkern tune` writes a new one")


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
    path.write_text(path.read_text().replace(tuned.SCHEMA, "adapterkern-tuned/0"))
    with pytest.raises(ValueError, match="this version reads"):
        tuned.load(path)


def test_a_forced_entry_is_taken_within_its_block_only(folder):
    entry = row_block(16384, block_t=32)
    before = tuned.token_plan(problem(5), H200)
    with tuned.forced(entry):
        assert tuned.token_plan(problem(5), H200) == RowBlock(entry.kernels[0])
        assert tuned.weight_gradient_plan(problem(5), H200).kernel.block_t == 64  # the formula's
    assert tuned.token_plan(problem(5), H200) == before


def test_the_files_in_the_package_can_be_read():
    for path in tuned.FOLDERS[-1].glob("*.json"):
        gpu, device, entries, _ = tuned.load(path)
        assert gpu
        assert device.num_sms > 0
        assert entries
