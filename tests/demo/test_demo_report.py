"""The demo's report: as JSON and as text."""

import json
import re
from pathlib import Path

import pytest
from canned import canned_report

from adapterkern.cli.demo import findings, wording

LONG = "an-organisation/" + 4 * "a-very-long-model-name-" + "v2"
CLAIMED = {"repeats": 7, "backend": "triton", "is_speed_claim": True}
UNCLAIMED = {"repeats": 7, "backend": "reference", "is_speed_claim": False}


def difference(low: float, high: float, task: str = "topic", method: str = "lora"):
    return findings.Difference(task, method, (low + high) / 2, [low, high])


def sentences(text: str) -> str:
    """The text without its line breaks and margins."""
    return " ".join(text.split())


def test_report_survives_json():
    original = canned_report(seeds=5)
    original.step_times.append(
        findings.StepTime(
            "float32", [16, 48], fused_ms=20.0, eager_ms=30.0, norm_ms=15.0, **CLAIMED
        )
    )
    original.mixed_times.append(
        findings.MixedTime(
            "float32", [18, 48], mixed_ms=200.0, switched_ms=300.0, runs=9, **CLAIMED
        )
    )
    assert findings.Report.from_json(original.to_json()) == original


def test_report_of_the_format_before_is_refused_with_a_cure():
    data = json.loads(canned_report().to_json())
    with pytest.raises(ValueError, match=r"must have format 2, got 1: .*(.|\n)*hint: .* a new one"):
        findings.Report.from_json(json.dumps({**data, "format": 1}))


@pytest.mark.parametrize("seeds", [1, 5])
@pytest.mark.parametrize("device", ["cpu", "cuda:0 (NVIDIA RTX PRO 6000 Blackwell Max-Q)"])
def test_no_line_is_wider_than_80_columns(seeds, device):
    report = canned_report(seeds=seeds)
    report.model["name"] = LONG
    report.machine["device"] = device
    report.seeds = [12345 + 7 * seed for seed in range(seeds)]
    report.command["out"] = "/home/somebody/" + 30 * "deep/"
    report.saved["folders"]["topic"] = report.command["out"] + "adapters/topic"
    report.methods[-1].trained = report.methods[-1].total = 7_000_000_000
    report.methods[0].peak_bytes = 17 << 30
    report.checks[0].detail = "other logits than before saving for " + 10 * "topic, "
    for made in (CLAIMED, UNCLAIMED):
        sizes = {"dtype": "bfloat16 autocast", "tokens": [16, 48], **made}
        report.step_times.append(
            findings.StepTime(fused_ms=2e3, eager_ms=3e3, norm_ms=1e3, **sizes)
        )
        report.mixed_times.append(
            findings.MixedTime(mixed_ms=2e3, switched_ms=3e3, runs=9, **sizes)
        )
    text = wording.as_text(report)
    assert [line for line in text.splitlines() if len(line) > 80] == []
    assert LONG in text.replace("\n", "").replace(" ", "")
    assert text.replace("\n", "").isprintable()  # no colours, no cursor movements


def test_table_has_each_accuracy_with_its_interval_above_the_baselines():
    report = canned_report()
    report.methods[1].tasks[0].interval = [0.58, 0.72]  # its wider side is below
    lines = wording.as_text(report).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("held-out accuracy of"))
    header, _, adapters, lora, full, majority, untrained = lines[start : start + 7]
    assert header.endswith("trained  share  topic %   95 %  kind %  95 %    step")
    assert adapters.endswith("226,368  0.99%     69.1   ±4.1    65.2  ±4.2  181 ms")
    assert " ".join(lora.split()[3:]) == "221,184 0.97% 69.7 ±11.7 66.9 ±4.1 205 ms"
    assert " ".join(full.split()[2:]) == "22,565,376 100% 73.8 ±3.9 66.5 ±4.1 243 ms"
    assert majority.split()[-2:] == ["10.5", "30.5"]
    assert untrained.split()[-2:] == ["9.1", "15.2"]
    ends = [
        [match.end() for match in re.finditer(r"(?<!±)\b\d+\.\d\b(?!\d|%)", line)][:2]
        for line in (adapters, lora, full, majority, untrained)
    ]
    assert ends == [ends[0]] * 5  # the accuracies stand below each other


def test_text_says_what_was_done_on_what():
    said = sentences(wording.as_text(canned_report()))
    assert "1,969 docstrings to train on and 492 held out" in said
    assert "120 steps of 16 texts for each task and method, seed 0;" in said
    assert "learning rate 0.004 for adapters, 0.002 for LoRA, 0.0001 for full" in said
    assert "device cpu (x86_64, 2 threads), adapterkern 0.1.0, torch 2.13.0+cpu" in said
    assert "bootstrap over the 492 held-out texts" in said


def test_a_quick_run_says_that_its_numbers_are_not_to_be_judged_by():
    report = canned_report(steps=8)
    assert "A quick run" not in wording.as_text(report)
    report.command["held_out"] = 96
    assert "A quick run shows the path, not what the methods reach" in wording.as_text(report)


@pytest.mark.parametrize(
    ("seeds", "words"),
    [([3], "seed 3"), ([0, 1], "seeds 0, 1"), ([2, 3, 4], "seeds 2 to 4"), ([1, 9], "seeds 1, 9")],
)
def test_seeds_are_named(seeds, words):
    assert wording.seeds_in_words(seeds) == words


def test_several_seeds_are_said_to_be_what_the_intervals_are_of():
    said = sentences(wording.as_text(canned_report(seeds=5)))
    assert "seeds 0 to 4" in said
    assert "from the spread over 5 seeds" in said
    assert "paired seed by seed" in said
    assert "bootstrap" not in said


@pytest.mark.parametrize(
    ("low", "high", "verb"),
    [
        (0.002, 0.03, "beat"),
        (-0.03, -0.002, "lose to"),
        (-0.01, 0.02, "are indistinguishable from"),
        (0.0, 0.02, "are indistinguishable from"),
        (-0.02, 0.0, "are indistinguishable from"),
    ],
)
def test_verdict_is_by_where_zero_lies_in_the_interval(low, high, verb):
    assert wording.verdict(difference(low, high)) == verb


def test_each_task_gets_a_sentence_of_whom_the_adapters_beat_and_to_whom_they_lose():
    report = canned_report(
        differences=[
            difference(0.01, 0.03),
            difference(-0.05, -0.01, method="full"),
            difference(-0.02, 0.03, task="kind"),
            difference(-0.03, 0.02, task="kind", method="full"),
        ]
    )
    said = sentences(wording.as_text(report))
    assert (
        "topic adapters beat LoRA (+2.0; +1.0 to +3.0), and lose to full fine-tuning "
        "(-3.0; -5.0 to -1.0). kind adapters are indistinguishable from LoRA (+0.5; -2.0 to +3.0) "
        "and full fine-tuning (-0.5; -3.0 to +2.0)."
    ) in said
    assert "the 95 % interval, paired text by text, holds 0" in said


def test_text_names_a_failed_check():
    failed = canned_report()
    failed.checks.append(findings.Check("bits", False, "other logits"))
    assert not failed.passed
    assert "FAILED    bits\n          other logits" in wording.as_text(failed)
    assert "ok        saved adapters reload" in wording.as_text(failed)


def test_times_on_a_cpu_say_why_they_claim_nothing():
    report = canned_report()
    report.mixed_times.append(
        findings.MixedTime("float32", [18, 48], mixed_ms=88.0, switched_ms=0.5, runs=9, **UNCLAIMED)
    )
    said = sentences(wording.as_text(report))
    assert (
        "step adapterkern 181 ms; separate PyTorch layers 177 ms (16 x 48 tokens, float32, median "
        "of 7) mixed 8 adapters, trained and random, in one batch 88 ms; in 9 runs, one for "
        "each and one without, "
        "500 us "
        "(18 x 48 tokens, float32, median of 7) This CPU has no kernel to be faster with"
    ) in said
    assert "times as fast" not in said
    assert not re.search(r"fused path|reference|backend", said)


def test_times_on_a_gpu_claim_what_was_measured_with_its_kernels():
    report = canned_report(machine={"device": "cuda:0 (NVIDIA H100)"})
    sizes = {"dtype": "bfloat16 autocast", "tokens": [16, 48], **CLAIMED}
    report.step_times = [findings.StepTime(fused_ms=2.0, eager_ms=3.0, **sizes)]
    report.step_times += [findings.StepTime(fused_ms=2.0, eager_ms=3.0, norm_ms=1.5, **sizes)]
    report.mixed_times = [findings.MixedTime(mixed_ms=2.0, switched_ms=5.0, runs=9, **sizes)]
    said = sentences(wording.as_text(report))
    measured = "(16 x 48 tokens, bfloat16 autocast, median of 7, triton kernels)"
    assert (
        f"step adapterkern 2.0 ms; separate PyTorch layers 3.0 ms: 1.50 times as fast {measured} "
        "forward adapterkern 1.5 ms with the norm in its pass, 2.0 ms without; separate PyTorch "
        f"layers 3.0 ms: 2.00 times as fast {measured}"
    ) in said
    assert f"one without, 5.0 ms: 2.50 times as fast {measured}" in said
    assert "claim nothing" not in said
    report.mixed_times[0].is_speed_claim = False
    assert "claim nothing" not in sentences(wording.as_text(report))
    report.mixed_times = []
    report.step_times = [findings.StepTime("float32", [16, 48], "reference", 2.0, 3.0, 7, False)]
    assert "`adapterkern info` says why" in sentences(wording.as_text(report))


@pytest.mark.parametrize(
    ("value", "words"), [(0.0123, "12 us"), (2.34, "2.3 ms"), (181.4, "181 ms"), (1500.0, "1.5 s")]
)
def test_milliseconds_take_a_fitting_unit(value, words):
    assert wording.milliseconds(value) == words


@pytest.mark.parametrize(
    ("value", "words"),
    [(512, "512 bytes"), (935_212, "913.3 KiB"), (90_261_504, "86.1 MiB"), (28 << 30, "28.0 GiB")],
)
def test_size_takes_the_largest_fitting_unit(value, words):
    assert wording.size(value) == words


@pytest.mark.parametrize(
    ("value", "words"), [(48.4, "48 s"), (272.0, "4 min 32 s"), (119.7, "2 min 0 s")]
)
def test_duration_has_minutes_from_the_first_on(value, words):
    assert wording.duration(value) == words


def test_sizes_compare_the_adapter_with_the_model():
    report = canned_report()
    said = sentences(wording.as_text(report))
    assert "an adapter with its head 913.3 KiB, a fully fine-tuned model 86.1 MiB: 97 times" in said
    assert "memory" not in said
    report.methods[0].peak_bytes = 3 << 30
    assert "in a training step: adapters 3.0 GiB" in sentences(wording.as_text(report))


def test_write_atomically_leaves_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("old")

    def fail(scratch: Path) -> None:
        scratch.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        findings.write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
