"""Two files side by side: ratios, a verdict beyond noise, and what cannot be compared."""

import copy

import pytest

from adapterkern.bench import compare
from adapterkern.bench.results import ResultError, Timing
from adapterkern.cli.main import main


def slowed(result, factor, provider="triton"):
    changed = copy.deepcopy(result)
    for row in changed.rows:
        if row.provider == provider:
            row.timings = {
                kind: Timing(t.p20 * factor, t.p50 * factor, t.p80 * factor, t.samples)
                for kind, t in row.timings.items()
            }
    return changed


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.1, "slower"), (0.9, "faster"), (1.015, "same"), (0.985, "same")]
)
def test_a_verdict_needs_more_than_the_noise_of_both_files(gpu_result, factor, verdict):
    found = compare.compare(gpu_result, slowed(gpu_result, factor))
    ours = [entry for entry in found if entry.key.endswith("triton")]
    assert len(ours) == 12
    for entry in ours:
        assert entry.ratio == pytest.approx(factor)
        assert entry.band == pytest.approx(0.02)  # one per cent to either side in each file
        assert entry.verdict == verdict
    others = [entry for entry in found if entry.key.endswith("plain")]
    assert {entry.verdict for entry in others} == {"same"}


def test_noisy_files_have_a_wide_band():
    assert compare.noise_band(Timing(80, 100, 120, 9), Timing(90, 100, 110, 9)) == pytest.approx(
        0.3
    )
    assert compare.noise_band(Timing(1, 1, 1, 9), Timing(1, 1, 1, 9)) == 0.02


def test_different_devices_are_refused_unless_forced(gpu_result):
    other = copy.deepcopy(gpu_result)
    other.header["device"] = "Another GPU"
    with pytest.raises(ResultError, match=r"Made-up GPU and Another GPU.*\n.*--force"):
        compare.compare(gpu_result, other)
    assert len(compare.compare(gpu_result, other, force=True)) == 52


def test_cpus_of_different_models_are_different_devices(gpu_result):
    gpu_result.header |= {"device": "cpu (x86_64)", "device_type": "cpu", "cpu": "Model A"}
    other = copy.deepcopy(gpu_result)
    other.header["cpu"] = "Model B"
    with pytest.raises(ResultError, match=r"Model A and Model B.*\n.*--force"):
        compare.compare(gpu_result, other)
    assert len(compare.compare(gpu_result, other, force=True)) == 52
    del other.header["cpu"]  # a file that does not say
    assert compare.different_devices(gpu_result, other) is None


def test_one_gpu_in_another_host_is_the_same_device(gpu_result):
    other = copy.deepcopy(gpu_result)
    gpu_result.header["cpu"], other.header["cpu"] = "Model A", "Model B"
    assert compare.different_devices(gpu_result, other) is None


def test_files_without_a_common_row_are_refused(gpu_result):
    other = copy.deepcopy(gpu_result)
    other.rows, other.models = [], []
    with pytest.raises(ResultError, match="no timed row in common"):
        compare.compare(gpu_result, other)


def test_the_command_prints_both_files_and_counts_verdicts(gpu_result, tmp_path, capsys):
    from adapterkern.bench.results import save

    before, after = tmp_path / "before.json", tmp_path / "after.json"
    save(gpu_result, before)
    save(slowed(gpu_result, 1.2), after)
    assert main(["bench", "--compare", str(before), str(after)]) == 0
    lines = capsys.readouterr().out.splitlines()
    line = next(line for line in lines if "forward-bf16-gelu-T16384-H1024-R64 triton" in line)
    assert line.split()[-3:] == ["1.200", "2%", "slower"]
    assert lines[-1] == "0 faster, 40 same, 12 slower"


def test_the_command_refuses_different_devices_before_it_measures(gpu_result, tmp_path, capsys):
    from adapterkern.bench.results import save

    save(gpu_result, tmp_path / "gpu.json")
    assert main(["bench", "--quick", "--compare", str(tmp_path / "gpu.json")]) == 2
    out, err = capsys.readouterr()
    assert "different devices" in err
    assert out == ""
