"""Tables of a made-up GPU result: units, and what the numbers of a case are measured by."""

import pytest

from adapterkern.bench.cases import BenchCase
from adapterkern.bench.results import Result, Row, Timing
from adapterkern.bench.table import in_unit, render, time_unit


def tables(result):
    """Return the lines of each case's table, by what the numbers are measured by."""
    blocks = [block.splitlines() for block in render(result).split("\n\n")[1:-1]]
    return {lines[1].strip(): lines[2:] for lines in blocks}


def on_cpu(times, case=None, **row):
    """A result of one case on a CPU: the median of each implementation, in us."""
    case = case or BenchCase(768, 48, 128, "fp32")
    rows = [
        Row(
            case,
            name,
            ours=name == "reference",
            headline="eager",
            timings={"eager": Timing(0.9 * time, time, 1.2 * time, 9)},
            **row,
        )
        for name, time in times.items()
    ]
    return Result({"device": "cpu (x86_64)", "device_type": "cpu", "cpu_threads": 2}, rows)


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
    assert "  time/adapterkern  GB/s  of copy  of peak  " in lines[0]
    # from the end: these two, host time, kernels and the sizes of peak and transient
    shares = [line.split()[-6:-4] for line in lines[1:]]
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
    assert title == "(floor -: the copy bandwidth was not measured)"
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
    assert title == "(floor 3.2 us)"  # 12.7 MB at 4 TB/s
    del first.header["calibration"]["matrix_rate"]
    (title,) = tables(first)
    assert title == "(floor 3.2 us without products: no bf16 rate was measured)"


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


@pytest.mark.parametrize(
    ("times", "unit"),
    [((0.4, 0.5, 900.0), "ns"), ((9.8, 411.0, 1500.0), "us"), ((1.0,), "us"), ((999.0,), "us"),
     ((285.0, 15_700.0, 16_000.0), "ms"), ((2e6, 3e6), "s"), ((), "us"), ((None, 2e3), "ms")],
)  # fmt: skip
def test_a_columns_unit_is_that_of_its_middle_time(times, unit):
    assert time_unit(times) == unit


@pytest.mark.parametrize(
    ("time", "unit", "shown"),
    [(9.8, "us", "9.80"), (9.996, "us", "10.0"), (411.4, "us", "411"), (12_345.0, "us", "12345"),
     (15_699.5, "ms", "15.7"), (9.8, "ms", "0.00980"), (0.5, "ns", "500"), (0.0, "us", "0"),
     (None, "us", "-")],
)  # fmt: skip
def test_a_time_has_three_digits(time, unit, shown):
    assert in_unit(time, unit) == shown


def test_a_cpu_table_names_adapterkern_scales_and_compares():
    result = on_cpu({"reference": 2000.0, "plain": 1500.0, "no-adapter": 9.8})
    title, head, *lines = render(result).split("\n\n")[1].splitlines()
    assert title == "forward  fp32 gelu  tokens 128  hidden 768  bottleneck 48"
    assert head.split() == ["implementation", "ms", "p20/p50/p80", "time/adapterkern"]
    assert [line.split() for line in lines] == [
        ["adapterkern", "(reference)", "1.80/2.00/2.40", "1.00x"],
        ["plain", "1.35/1.50/1.80", "0.75x"],
        ["no-adapter", "0.00882/0.00980/0.0118", "-"],  # it computes no y
    ]


def test_a_cpu_table_fits_a_terminal_and_a_busy_machine_is_told():
    case = BenchCase(768, 48, 512, "fp32", adapters=16, mix="zipf", mode="step")
    result = on_cpu({"reference": 2e3, "single": 1e3, "loop": 3e3}, case, saved_bytes=1 << 20)
    result.rows += on_cpu({"reference": 5e3, "plain": 4e3}, saved_bytes=1 << 20).rows
    result.header |= {"cpu": "Model A", "load_average": 1.0, "cpus": 2}
    text = render(result)
    assert max(map(len, text.splitlines())) <= 80
    assert "Model A, 2 threads:" in text.splitlines()
    assert "BUSY" not in text
    assert "--brief" not in text
    result.header["load_average"] = 1.1
    assert "BUSY: a load of 1.1 on 2 CPUs before this run; its times vary for that" in render(
        result
    )


def test_all_cases_are_in_one_table_at_the_end():
    result = on_cpu({"reference": 2000.0, "plain": 1500.0, "limit": 100.0})
    assert "all cases" not in render(result)
    case = BenchCase(768, 48, 128, "fp32", mode="step")
    result.rows += on_cpu({"reference": 4000.0, "lora": 5000.0, "no-adapter": 1.0}, case).rows
    block = render(result).split("\n\n")[3].splitlines()
    assert block[0] == "all cases: median of adapterkern, and time/adapterkern of the others"
    assert [line.split() for line in block[1:]] == [
        ["case", "adapterkern", "ms", "plain", "limit", "lora"],
        ["forward-fp32-gelu-T128-H768-R48", "2.00", "0.75x", "0.05x", "-"],
        ["step-fp32-gelu-T128-H768-R48", "4.00", "-", "-", "~1.25x"],
    ]


def test_too_wide_tables_say_how_to_get_fewer_columns(gpu_result):
    (*_, last) = render(gpu_result).splitlines()
    assert last == "--brief prints times and ratios alone, in 80 columns."
    brief = render(gpu_result, brief=True)
    assert max(map(len, brief.splitlines()[2:])) <= 80  # behind the facts of the run
    assert "host" not in brief
    names = ["reference", "plain", "adapterhub", "addmm", "compile", "compile-max", "lora"]
    result = on_cpu(dict.fromkeys(names, 1.0))
    result.rows += on_cpu(dict.fromkeys(names, 1.0), BenchCase(768, 48, 16, "fp32")).rows
    (*_, last) = render(result).splitlines()
    assert last == "Fewer names behind --baseline make the table of all cases narrower."


@pytest.mark.parametrize(("plain", "shown"), [(3000.0, "1.50x"), (2500.0, "~1.25x")])
def test_a_ratio_that_may_be_chance_is_marked(plain, shown):
    (line,) = (
        line
        for line in render(on_cpu({"reference": 2000.0, "plain": plain})).splitlines()
        if line.startswith("  plain")
    )
    assert line.split()[-1] == shown  # ours ends at 2400; 90 % of these are 2700 and 2250
