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


def entry(ratio, *spreads):
    """A comparison whose files spread so far from the 20th to the 80th percentile, as a factor."""
    before, after = (
        Timing(median / spread**0.5, median, median * spread**0.5, 9)
        for median, spread in zip((100.0, 100.0 * ratio), spreads, strict=True)
    )
    return compare.Comparison("case", "plain", "eager", before, after)


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.1, "slower"), (0.9, "faster"), (1.015, "same"), (0.985, "same")]
)
def test_a_verdict_needs_more_than_the_noise_of_both_files(gpu_result, factor, verdict):
    found = compare.compare(gpu_result, slowed(gpu_result, factor))
    ours = [entry for entry in found if entry.label == "adapterkern (triton)"]
    assert len(ours) == 12
    for one in ours:
        assert one.ratio == pytest.approx(factor)
        assert one.noise == pytest.approx((1.01 / 0.99) ** 2 - 1)  # one per cent to either side
        assert one.verdict == verdict
    others = [entry for entry in found if entry.label == "plain"]
    assert {entry.verdict for entry in others} == {"same"}


@pytest.mark.parametrize(
    ("ratio", "spreads", "verdict"),
    [
        # no spread: two per cent all the same
        (1.0199, (1, 1), "same"), (1.0201, (1, 1), "slower"),
        (1 / 1.0199, (1, 1), "same"), (1 / 1.0201, (1, 1), "faster"),
        # noise of 9.9 and 10.1 per cent
        (1.0, (1.099, 1), "same"), (1.0, (1, 1.101), "too noisy"),
        # one of 1.5 * 1.6 - 1: in between nothing is told, and beyond it all the same
        (2.39, (1.5, 1.6), "too noisy"), (2.41, (1.5, 1.6), "slower"),
        (1 / 2.39, (1.5, 1.6), "too noisy"), (1 / 2.41, (1.5, 1.6), "faster"),
        # 184 per cent
        (1.0, (2.84, 1), "too noisy"), (2.8, (1, 2.84), "too noisy"), (3.0, (1, 2.84), "slower"),
    ],
)  # fmt: skip
def test_a_verdict_changes_where_the_rule_says(ratio, spreads, verdict):
    assert entry(ratio, *spreads).verdict == verdict


def test_the_noise_is_the_spread_of_both_files():
    assert entry(1.3, 1.5, 1.6).noise == pytest.approx(1.4)
    assert entry(1.3, 1, 1).noise == 0.02
    zero = compare.Comparison("case", "no-adapter", "graph", Timing(0, 1, 1, 9), Timing(1, 1, 1, 9))
    assert zero.verdict == "too noisy"


def test_too_noisy_says_what_to_do_and_no_line_is_wider_than_a_terminal():
    noisy = compare.render([entry(1.0, 2.84, 1)], "a.json", "b.json")
    assert noisy.splitlines()[-1] == "0 faster, 0 same, 0 slower, 1 too noisy"
    for cure in ("nothing else running", "--tokens 512", "--seconds 2", "OMP_NUM_THREADS=1"):
        assert cure in noisy
    assert max(map(len, noisy.splitlines())) <= 80
    assert "nothing else running" not in compare.render([entry(1.0, 1, 1)], "a.json", "b.json")


def test_times_of_models_are_compared_in_their_own_unit(gpu_result):
    later = copy.deepcopy(gpu_result)
    for model in later.models:
        model.milliseconds = Timing(1.6, 1.6, 1.6, 9)
    text = compare.render(compare.compare(gpu_result, later), "a", "b")
    lines = text[text.index("block-1024 forward (graph)") :].splitlines()
    assert lines[1].split()[:5] == ["implementation", "before", "us", "after", "us"]
    assert lines[2].split() == ["plain", "800", "1600", "2.000x", "2%", "slower"]


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
    assert lines[:2] == [f"before: {before}", f"after:  {after}"]
    place = lines.index("forward-bf16-gelu-T16384-H1024-R64 (cold)")
    assert lines[place + 2].split()[-3:] == ["1.200x", "4%", "slower"]
    assert lines[-1] == "0 faster, 40 same, 12 slower, 0 too noisy"


def test_the_command_refuses_different_devices_before_it_measures(gpu_result, tmp_path, capsys):
    from adapterkern.bench.results import save

    save(gpu_result, tmp_path / "gpu.json")
    assert main(["bench", "--quick", "--compare", str(tmp_path / "gpu.json")]) == 2
    out, err = capsys.readouterr()
    assert "different devices" in err
    assert out == ""
