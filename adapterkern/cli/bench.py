"""`adapterkern bench`: what an adapter costs, against plain layers and the physical limits."""

import argparse
import math
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

EPILOG = """\
names for --baseline:
  plain         two nn.Linear with the activation between them, plus x
  adapterhub    the Adapter module of the `adapters` package
  addmm         torch.addmm with fused biases
  compile       torch.compile of plain; compile-max with max-autotune
  cublaslt      cuBLASLt products with fused epilogues (a GPU, nvmath-python)
  lora          PEFT's LoRA layer of equal rank, without its base product
  no-adapter    y is x
  limit         copies of memory that no implementation can do without
  separate      with --norm: the fused adapter, then torch's norm
  single, loop, lora-mixed, routing, limit
                with --adapters: one adapter for all tokens, a call for each
                adapter, PEFT with a LoRA for each sequence, the sort of tokens
  all           all of them

presets: bert-base, roberta-large, gpt2-medium, llama-7b, llama-70b

examples:
  adapterkern bench --quick
  adapterkern bench --quick --baseline all --plot bars.png
  adapterkern bench --preset bert-base --mode forward --json mine.json
  adapterkern bench --hidden-size 1024 --bottleneck-size 64 \\
                    --tokens 16 2048 16384 --plot times.png
  adapterkern bench --adapters 4 16 --rows 1 128 --mode forward
  adapterkern bench --quick --compare before.json
  adapterkern bench --compare before.json after.json

exit codes: 0 success, 1 a backend of this package gave a wrong result or the
GPU was lost, 2 wrong usage or a backend that cannot run here, 130 interrupted
"""

DESCRIPTION = """\
Times one adapter layer as this package runs it and as others do, in turn on
the same tensors in one process, and prints for each the 20th, 50th and 80th
percentile of its calls and its time over adapterkern's. Every result is first
compared with float64: a wrong one gets no time. A GPU adds bandwidth, the
shares of a copy's speed and of the memory's peak, host time, memory and
kernels. Without a GPU it times the package's PyTorch reference, which says
nothing about the kernels.
"""


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "bench",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sizes = {"type": int, "nargs": "+", "metavar": "N"}
    parser.add_argument("--hidden-size", **sizes, help="H >= 1, with --bottleneck-size")
    parser.add_argument("--bottleneck-size", **sizes, help="R >= 1, with --hidden-size")
    parser.add_argument("--tokens", **sizes, help="T >= 1, the rows of x")
    parser.add_argument("--preset", nargs="+", metavar="MODEL", help="the widths of these models")
    parser.add_argument(
        "--dtype",
        nargs="+",
        help="bf16 (default on a GPU), fp16, fp32 (default on a CPU), fp64 (of the backends "
        "the reference alone)",
    )
    parser.add_argument("--activation", nargs="+", help="default: gelu")
    parser.add_argument(
        "--mode",
        nargs="+",
        metavar="MODE",
        help="forward (no gradients recorded), backward (of a saved forward), step (both in one "
        "call) (default: forward step)",
    )
    _add_many(parser, sizes)
    norms = ("layer", "rms")
    parser.add_argument("--norm", choices=norms, help="norm(x + skip + adapter), in one pass")
    parser.add_argument(
        "--backend", nargs="+", metavar="NAME", help="of this package (default: all that can run)"
    )
    parser.add_argument(
        "--baseline",
        nargs="+",
        metavar="NAME",
        help="what to compare with, or all (default on a GPU: all but compile-max, which takes "
        "about a minute a case; on a CPU: plain); on a GPU limit is always among them",
    )
    parser.add_argument("--quick", action="store_true", help="one shape, and nothing that compiles")
    parser.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help="S > 0 seconds of sampling a case and kind of timing, 5 to 200 samples (default: 0.5, "
        "with --quick 0.2)",
    )
    _add_output(parser)
    parser.set_defaults(run=run)


def _add_output(parser: argparse.ArgumentParser) -> None:
    """Add the options of what is written, drawn, printed and compared."""
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the result, also after each case"
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw time against tokens, or bars where there is one number (.png, .svg, .pdf, ...)",
    )
    parser.add_argument("--brief", action="store_true", help="print times and ratios alone")
    parser.add_argument(
        "--compare",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="one file: this run against it; two files: the second against the first",
    )
    parser.add_argument("--force", action="store_true", help="compare results of different devices")


def _add_many(parser: argparse.ArgumentParser, sizes: dict[str, Any]) -> None:
    """Add the options of many adapters in one batch."""
    parser.add_argument(
        "--adapters",
        type=int,
        nargs="*",
        metavar="N",
        help="N >= 1 adapters in one batch (without N: 1 4 16 64, on a CPU 1 4 16)",
    )
    parser.add_argument(
        "--rows",
        **sizes,
        help="with --adapters: tokens of each adapter (default: 1 32 128, on a CPU 1 32)",
    )
    parser.add_argument(
        "--mix",
        nargs="+",
        metavar="MIX",
        help="with --adapters: even, zipf, none: the same number of tokens for each adapter, fewer "
        "for each further one, no token with an adapter (default: even zipf)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write; or compare two files."""
    from adapterkern.bench import compare, plot, table
    from adapterkern.bench.results import LostDeviceError, ResultError, save

    try:
        earlier = _earlier(arguments)
        if len(earlier) == 2:
            _print_comparison(arguments.compare, earlier, arguments.force)
            return 0
        plan = _plan(arguments)
        if earlier and compare.different_devices(earlier[0], plan.result) and not arguments.force:
            compare.compare(earlier[0], plan.result)  # raises before measuring
    except (ResultError, ValueError) as error:
        return _refuse(str(error))
    for line in table.first_lines(plan.result):
        print(line, flush=True)
    result, ended = plan.result, None
    try:
        plan.measure(arguments.json)
    except (KeyboardInterrupt, LostDeviceError) as error:
        ended = error
    shown = table.render(result, arguments.brief).splitlines()[len(table.first_lines(result)) :]
    print("\n".join([*_calibration_lines(result), *shown]))
    if ended is not None:
        lost = isinstance(ended, LostDeviceError)
        done = len({row.case for row in result.rows})
        where = f"; they are in {arguments.json}" if arguments.json and done else ""
        print(f"\n{ended}" if lost else "")
        why = "ended" if lost else "interrupted"
        print(f"{why}: {done} of {len(plan.cases)} cases were measured{where}")
        return 1 if lost else 130
    if arguments.json:
        save(result, arguments.json)
        print(f"\nwritten to {arguments.json}")
    if arguments.plot:
        try:
            plot.plot(result, arguments.plot)
            print(f"\ndrawn in {arguments.plot}")
        except Exception as error:  # whatever it is, the numbers stand
            print(f"\nnot drawn: {error}")
    if earlier:
        try:
            comparisons = compare.compare(earlier[0], result, arguments.force)
            print("\n" + compare.render(comparisons, str(arguments.compare[0]), "this run"))
        except ResultError as error:
            print(f"\nnot compared: {error}")
    wrong = any(row.ours and row.status == "wrong" for row in result.rows)
    return 1 if wrong else 0


# A comparison of two files, which measures nothing, has no use for these options.
_MEASURING = (
    *("hidden_size", "bottleneck_size", "tokens", "preset", "dtype", "activation", "mode"),
    *("norm", "adapters", "rows", "mix", "backend", "baseline", "quick", "seconds", "json", "plot"),
    "brief",
)


def _earlier(arguments: argparse.Namespace) -> list[Any]:
    """Return the results to compare with.

    Raises:
        ValueError: too many files, or two and an option that would have no effect.
        ResultError: a file cannot be read.
    """
    from adapterkern.bench.results import load

    paths = arguments.compare or []
    if len(paths) > 2:
        raise ValueError(f"--compare takes one or two files, got {len(paths)}.")
    unused = [name for name in _MEASURING if getattr(arguments, name) not in (None, False)]
    if len(paths) == 2 and unused:
        names = ", ".join("--" + name.replace("_", "-") for name in unused)
        raise ValueError(
            f"--compare with two files measures nothing, so it cannot take {names}.\n"
            "  hint: name one file to compare a new run with it"
        )
    return [load(path) for path in paths]


class _Plan:
    """The measurements to make, checked before anything runs."""

    def __init__(self, header: dict, cases: list, providers: list, settings: Any) -> None:
        from adapterkern.bench.results import Result

        self.header, self.cases, self.providers = header, cases, providers
        self.settings = settings
        self.result = Result(header)

    def measure(self, path: Path | None = None) -> None:
        """Calibrate, then measure case by case, with progress on stderr.

        After each case the result so far is in the file `path`, should the run be interrupted.
        """
        import torch

        from adapterkern.bench import calibration, environment, measure
        from adapterkern.bench.results import LostDeviceError, save
        from adapterkern.bench.timing import CudaTimer, timer_for

        device = torch.device(self.header["device_type"])
        timer = timer_for(device)
        measured = calibration.Calibration()
        progress = _Progress(len(self.cases))
        if isinstance(timer, CudaTimer):
            progress("calibrating")
            with timer.session():
                measured = calibration.measure(timer)
            self.header["calibration"] = measured.as_dict()
        try:
            for case in self.cases:
                progress.next()
                try:
                    self.result.rows += measure.measure_case(
                        case, self.providers, timer, measured, self.settings, progress
                    )
                except LostDeviceError as error:
                    self.result.rows += error.rows
                    raise
                finally:
                    if path is not None:
                        save(self.result, path)
        finally:
            progress.end()
        if isinstance(timer, CudaTimer):
            with timer.session():
                measured = calibration.measure_after(timer, measured)
            self.header["clocks_after"] = environment.clocks(device)
        self.header["calibration"] = measured.as_dict()


def _plan(arguments: argparse.Namespace) -> _Plan:
    """Return the plan of the command line.

    Raises:
        ValueError: something in it cannot be done; the message says what could.
    """
    import torch

    from adapterkern.bench import environment, plot
    from adapterkern.bench.measure import Settings
    from adapterkern.bench.providers import providers
    from adapterkern.bench.results import unwritable
    from adapterkern.cli import bench_choices as choices

    for path in filter(None, (arguments.json, arguments.plot)):
        problem = unwritable(path.parent)
        if path.is_dir():
            problem = f"{path} is a folder; name a file"
        if problem:
            raise ValueError(problem)
    refusal = plot.refusal(arguments.plot) if arguments.plot else None
    if refusal:
        raise ValueError(f"--plot: {refusal}")
    seconds = arguments.seconds
    if seconds is None:
        seconds = 0.2 if arguments.quick else 0.5
    if not 0 < seconds < math.inf:
        raise ValueError(f"--seconds must be above 0 and finite, got {seconds:g}.")
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    cases = choices.cases(arguments, kind)
    chosen = providers(
        choices.backend_names(arguments, kind) + choices.baseline_names(arguments, kind)
    )
    header = environment.header(torch.device(kind), environment.command_line("adapterkern"))
    if kind == "cpu" and hasattr(os, "getloadavg"):  # Windows has none
        header |= {"load_average": os.getloadavg()[0], "cpus": os.cpu_count()}
    return _Plan(header, cases, chosen, Settings(seconds=seconds))


def _calibration_lines(result: Any) -> list[str]:
    from adapterkern.bench import table

    return [line for line in table.first_lines(result) if line.startswith(("measured", "UNSTEADY"))]


def _print_comparison(paths: list[Path], results: list[Any], force: bool) -> None:
    from adapterkern.bench import compare

    before, after = results
    comparisons = compare.compare(before, after, force)
    if before.device != after.device:
        print(f"different devices: {before.device} and {after.device}")
    print(compare.render(comparisons, str(paths[0]), str(paths[1])))


class _Progress:
    """Progress on stderr: rewritten in place on a terminal, else a line a case and compilation,
    which take longest. From the second case on it says about how long the rest will take.
    """

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self.live = sys.stderr.isatty()
        self._start = time.monotonic()
        self._said = ""

    def next(self) -> None:
        self.done += 1

    def __call__(self, text: str) -> None:
        case, _, doing = text.partition(": ")
        place = f"[{self.done}/{self.total}]"
        if self.live:
            shown = f"{place} {case}{self._left()}: {doing}"
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\033[K{shown[:width]}", end="", file=sys.stderr, flush=True)
        elif doing.startswith("compiling"):
            print(f"{place} {text}, up to a minute", file=sys.stderr, flush=True)
        elif case != self._said:
            self._said = case
            print(f"{place} {case}{self._left()}", file=sys.stderr, flush=True)

    def _left(self) -> str:
        if self.done < 2:
            return ""
        each = (time.monotonic() - self._start) / (self.done - 1)
        return f", about {each * (self.total - self.done + 1):.0f} s to go"

    def end(self) -> None:
        if self.live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _refuse(problem: str) -> int:
    print(f"adapterkern bench: {problem}", file=sys.stderr)
    return 2
