"""The summary of a run: short, and with all that a reader must not miss."""

import pytest

from benchmarks.gpu import digest

BEGIN = {"at": 0.0, "event": "begin", "stage": "verify", "commit": "0123456789abcdef"}
HEADER = {
    "record": "header",
    "device": "Made-up GPU",
    "driver": "1.2",
    "versions": {"torch": "2.11", "triton": "3.6"},
    "extension": {"problem": None, "runs": "sm_90a", "nvcc": "13.0"},
}


def row(index, **more):
    case = {"mode": "forward", "dtype": "bf16", "tokens": index, "hidden_size": 1024}
    return {
        "case": {**case, "bottleneck_size": 64},
        "provider": "cuda",
        "ours": True,
        "status": "ok",
        "note": "",
        "headline": "cold",
        "timings": {"cold": {"p50": 20.0}},
        "ratios": {"plain": 2.5, "addmm": 9.9},
        "copy_fraction": 0.81,
        "peak_fraction": 0.7,
        **more,
    }


def case(index, status, **more):
    facts = {"backend": "cuda", "case": f"case-{index}", "status": status, "rows": []}
    return {"at": 1.0, "event": "check case", "step": "parity", **facts, **more}


def command(step, says):
    return {"at": 1, "event": "command", "step": step, "command": step, "status": "passed",
            "says": says}  # fmt: skip


PLANNED = {"at": 1.0, "event": "check backend", "step": "parity", "backend": "cuda", "cases": 5}


def test_it_shows_steps_parity_and_rows(tmp_path):
    missed = [
        {"tensor": "dx", "error": 0.5, "passed": False},
        {"tensor": "y", "error": None, "passed": False},
        {"tensor": "d_up_weight", "error": 1e-9, "passed": True},
    ]
    events = [
        BEGIN,
        command("smoke", "5 passed, 41 skipped in 4.30s"),
        {"at": 1, "event": "step", "step": "smoke", "status": "passed", "seconds": 3.0},
        {"at": 1, "event": "step", "step": "memcheck", "status": "not run", "note": "out of time"},
        PLANNED,
        case(1, "passed"),
        case(2, "missed", rows=missed),
        case(3, "lost", note="illegal memory access"),
        {
            "at": 2,
            "event": "task",
            "task": "forward",
            "status": "hung",
            "note": "killed after 31 s",
        },
        {"at": 9, "event": "end", "passed": False},
    ]
    rows = [
        {"record": "row", "content": row(16)},
        {"record": "row", "content": row(17, timings={}, status="wrong", note="y: error 1")},
    ]
    lines = digest.summary(events, [HEADER, *rows], tmp_path).splitlines()
    assert lines[0] == "== verify on Made-up GPU: FAILED, commit 0123456789ab"
    assert lines[1] == "driver 1.2, torch 2.11, triton 3.6, extension: sm_90a, nvcc 13.0"
    assert "  smoke: passed, 3.0 s; 5 passed, 41 skipped in 4.30s" in lines
    assert "  memcheck: not run, out of time" in lines
    assert "parity, cuda: 1 passed, 1 missed, 1 lost, 2 not reached" in lines
    assert "  MISSED cuda case-2: dx 5.0e-01, y not finite" in lines
    assert "  LOST cuda case-3: illegal memory access" in lines
    assert "  forward bf16 T16 H1024 R64 cuda: 20.0 81% 70% plain 2.50x" in lines
    assert "  forward bf16 T17 H1024 R64 cuda: wrong, y: error 1" in lines
    assert "  forward: hung, killed after 31 s" in lines


def test_a_run_without_an_end_says_so(tmp_path):
    assert digest.summary([BEGIN], [], tmp_path).startswith(
        "== verify on an unknown machine: not finished"
    )


def test_an_interrupted_and_a_dry_run_say_so(tmp_path):
    events = [BEGIN, {"event": "interrupted", "during": "smoke"}, {"event": "end", "passed": False}]
    text = digest.summary(events, [{**HEADER, "device_type": "cpu"}], tmp_path)
    assert text.startswith("== dry run of verify on Made-up GPU: INTERRUPTED during smoke, commit")


def test_it_stays_short_whatever_happens(tmp_path):
    events = [BEGIN, *(case(i, "raised", note="x" * 500) for i in range(500))]
    events += [
        {"at": 1, "event": "task", "task": f"t{i}" * 20, "status": "died", "note": "y" * 300}
        for i in range(500)
    ]
    rows = [{"record": "row", "content": row(i, note="z" * 300)} for i in range(900)]
    text = digest.summary(events, [HEADER, *rows], tmp_path)
    assert len(text) < 10_000
    assert "and 488 more in events.jsonl" in text
    assert "and 860 more in rows.jsonl" in text
    assert text.splitlines()[-1] == "... the rest is in events.jsonl"


def test_clocks_are_those_of_a_busy_gpu_with_what_slowed_it(tmp_path):
    (tmp_path / "gpu.csv").write_text(  # headed as nvidia-smi does it
        "timestamp, clocks.current.sm [MHz], clocks.current.memory [MHz], power.draw [W], "
        "temperature.gpu, utilization.gpu [%], clocks_event_reasons.active\n"
        "2026/01/02 03:04:05.678, 345, 2619, 70.12, 30, 0, 0x0000000000000001\n"
        "2026/01/02 03:04:05.878, 1980, 2619, 400.00, 50, 99, 0x0000000000000000\n"
        "2026/01/02 03:04:06.078, 1700, 2619, 690.00, 61, 100, 0x0000000000000004\n"
        "2026/01/02 03:04:06.278, 17"
    )
    text = digest.summary([BEGIN], [], tmp_path)
    assert "2 samples at work: clocks.sm 1700 to 1980 MHz, power.draw 400 to 690 W" in text
    assert "0x0000000000000004 1x" in text


@pytest.mark.parametrize("content", [None, "", "a dry run has no GPU to sample\n"])
def test_no_samples_are_no_line(tmp_path, content):
    if content is not None:
        (tmp_path / "gpu.csv").write_text(content)
    assert "samples" not in digest.summary([BEGIN], [], tmp_path)
