"""Tables of a made-up GPU result: units, and what the numbers of a case are measured by."""

import pytest

from adapterkern.bench.table import render


def tables(result):
    """Return the lines of each case's table, by its title."""
    blocks = render(result).split("\n\n")[1:-1]
    return {block.splitlines()[0]: block.splitlines()[1:] for block in blocks}


@pytest.fixture
def first(gpu_result):
    """A result of its first case alone: forward, 4096 tokens, 768 wide, four providers."""
    gpu_result.rows = gpu_result.rows[:4]
    return gpu_result


def test_rows_are_shares_of_the_copy_and_of_the_memorys_peak(first):
    first.header["calibration"]["peak_bandwidth"] = 4.8e12
    assert "peak of its memory: 4.80 TB/s" in render(first).splitlines()
    for row, share in zip(first.rows, (0.81, 0.42, 0.24, 0.37), strict=True):
        row.copy_fraction, row.peak_fraction = share, share * 0.8
    first.rows[3].copy_fraction = first.rows[3].peak_fraction = None
    (lines,) = tables(first).values()
    assert "  against  GB/s  of copy  of peak  " in lines[0]
    # provider, cold, hot, against, GB/s and then these
    shares = [line.split()[5:7] for line in lines[1:]]
    assert shares == [["81%", "65%"], ["42%", "34%"], ["24%", "19%"], ["-", "-"]]


def test_tuned_launch_configurations_are_told_where_there_are_any(first):
    assert "tuned" not in render(first)
    first.header["tuned"] = ["/home/me/h200.json", "/package/h200.json"]
    told = "tuned launch configurations: /home/me/h200.json, /package/h200.json"
    assert told in render(first).splitlines()


def test_without_a_measured_copy_there_is_no_floor(first):
    first.header["calibration"] = {}
    for row in first.rows:
        row.floor_us = row.floor_fraction = None
    (title,) = tables(first)
    assert title.endswith("(floor -: the copy bandwidth was not measured)")
    assert "peak of its memory" not in render(first)


@pytest.mark.parametrize(
    ("after", "says"),
    [
        ({"copy_bandwidth_after": 3.8e12}, "UNSTEADY: copy bandwidth -5.0% during the run"),
        (
            {"copy_bandwidth_after": 4.0e12, "matrix_rate_after": 630e12},
            "UNSTEADY: copy bandwidth +0.0%, matrix rate -10.0% during the run",
        ),
        ({"copy_bandwidth_after": 3.9e12, "matrix_rate_after": 690e12}, None),
    ],
)
def test_an_unsteady_run_says_what_moved_and_how_far(first, after, says):
    before = {"copy_bandwidth": 4.0e12, "matrix_rate": 700e12}
    first.header["calibration"] = before | after
    told = [line for line in render(first).splitlines() if line.startswith("UNSTEADY")]
    assert told == ([says] if says else [])


def test_a_floor_without_a_rate_of_its_dtype_says_so(first):
    (title,) = tables(first)
    assert title.endswith("(floor 3.2 us)")  # 12.7 MB at 4 TB/s
    del first.header["calibration"]["matrix_rate"]
    (title,) = tables(first)
    assert title.endswith("(floor 3.2 us without products: no bf16 rate was measured)")


@pytest.mark.parametrize(
    ("l2", "says"), [(50 << 20, ", which stay in L2)"), (1 << 20, ")"), (None, ")")]
)
def test_buffers_of_a_graph_that_fit_in_l2_are_named(first, l2, says):
    first.header["l2_bytes"] = l2
    first.rows[0].buffer_bytes = 1310720
    (title,) = tables(first)
    assert title.endswith(f"graph over 1.2 MiB{says}")


def test_small_memory_is_in_kibibytes(first):
    for row in first.rows:
        row.saved_bytes, row.transient_bytes = 1056, 0
    (lines,) = tables(first).values()
    assert lines[0].endswith("peak MiB  transient KiB  saved KiB")
    assert lines[1].split()[-3:] == ["32.0", "0.0", "1.0"]
    first.rows[0].saved_bytes = 10 << 20
    (lines,) = tables(first).values()
    assert lines[0].endswith("saved MiB")
    assert lines[1].split()[-1] == "10.0"
