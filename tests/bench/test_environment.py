"""A result's header identifies its machine and its tree."""

import subprocess

from adapterkern.bench.environment import folder_name, git_state


def test_the_dirty_flag_is_of_the_sources_alone(tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "new.json").write_text("{}")
    commit, dirty = git_state(tmp_path)
    assert len(commit) == 40
    assert dirty is False
    (tmp_path / "adapterkern").mkdir()
    (tmp_path / "adapterkern" / "code.py").write_text("")
    assert git_state(tmp_path)[1] is True
    assert git_state(tmp_path / "missing") == (None, None)


def test_a_gpu_names_its_folder():
    assert folder_name("NVIDIA H200") == "nvidia-h200"
    assert folder_name("NVIDIA GeForce RTX 4090 (24 GB)") == "nvidia-geforce-rtx-4090-24-gb"
