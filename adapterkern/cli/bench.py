"""`adapterkern bench`: what an adapter costs, against plain layers and the physical limits."""

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

EPILOG = """\
baselines: plain, adapterhub, addmm, compile, compile-max, cublaslt, lora, no-adapter, limit
presets: bert-base, roberta-large, gpt2-medium, llama-7b, llama-70b

examples:
  adapterkern bench --quick
  adapterkern bench --preset bert-base gpt2-medium --mode forward step --json mine.json
  adapterkern bench --hidden-size 1024 --bottleneck-size 64 --tokens 16 2048 16384 --plot times.png
  adapterkern bench --compare before.json after.json
  adapterkern bench --quick --compare before.json

exit codes: 0 success, 1 a backend of this package gave a wrong result, 2 wrong usage
"""

DESCRIPTION = """\
Times adapters in one process, all implementations in turn on the same tensors, and reports for
each: 20th, 50th and 80th percentile, achieved bandwidth, the fraction of the floor at the copy
bandwidth measured in the same run, the ratio to every baseline, host time, memory and launches.
Each is first compared with float64: a wrong result gets no time. Without a GPU it times the
PyTorch reference against plain layers.
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
    parser.add_argument("--hidden-size", **sizes, help="H, with --bottleneck-size")
    parser.add_argument("--bottleneck-size", **sizes, help="R, with --hidden-size")
    parser.add_argument("--tokens", **sizes, help="T, the rows of x")
    parser.add_argument("--preset", nargs="+", metavar="MODEL", help="the widths of these models")
    parser.add_argument("--dtype", nargs="+", help="bf16 (default on a GPU), fp16, fp32 (on a CPU)")
    parser.add_argument("--activation", nargs="+", default=["gelu"], help="default: gelu")
    parser.add_argument(
        "--mode",
        nargs="+",
        default=["forward", "step"],
        metavar="MODE",
        help="forward, backward, step (default: forward step)",
    )
    parser.add_argument(
        "--backend", nargs="+", metavar="NAME", help="of this package (default: all that can run)"
    )
    parser.add_argument(
        "--baseline",
        nargs="+",
        metavar="NAME",
        help="what to compare with, or all (default on a GPU: all but compile-max, which takes "
        "about a minute a case; on a CPU: plain)",
    )
    parser.add_argument("--quick", action="store_true", help="one shape, nothing that compiles")
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="of sampling a case and kind of timing"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw time against tokens")
    parser.add_argument(
        "--compare",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="one file: this run against it; two files: the second against the first",
    )
    parser.add_argument("--force", action="store_true", help="compare results of different devices")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write; or compare two files."""
    from adapterkern.bench import compare, plot, table
    from adapterkern.bench.results import ResultError, load, save

    try:
        plan = _plan(arguments)
        earlier = [load(path) for path in arguments.compare or []]
        if len(earlier) == 2:
            _print_comparison(arguments.compare, earlier, arguments.force)
            return 0
        if earlier and earlier[0].device != plan.header["device"] and not arguments.force:
            compare.compare(earlier[0], plan.result)  # says so before measuring
    except (ResultError, ValueError) as error:
        return _refuse(str(error))
    for line in table.first_lines(plan.result):
        print(line, flush=True)
    result = plan.measure(arguments.json)
    shown = table.render(result).splitlines()[len(table.first_lines(result)) :]
    print("\n".join([*_calibration_lines(result), *shown]))
    if arguments.json:
        save(result, arguments.json)
        print(f"\nwritten to {arguments.json}")
    if arguments.plot:
        try:
            plot.plot(result, arguments.plot)
            print(f"\ndrawn in {arguments.plot}")
        except ValueError as error:
            print(f"\nnot drawn: {error}")
    if earlier:
        try:
            comparisons = compare.compare(earlier[0], result, arguments.force)
            print("\n" + compare.render(comparisons, str(arguments.compare[0]), "this run"))
        except ResultError as error:
            print(f"\nnot compared: {error}")
    wrong = any(row.ours and row.status == "wrong" for row in result.rows)
    return 1 if wrong else 0


class _Plan:
    """What will be measured, checked before anything runs."""

    def __init__(self, header: dict, cases: list, providers: list, settings: Any) -> None:
        from adapterkern.bench.results import Result

        self.header, self.cases, self.providers = header, cases, providers
        self.settings = settings
        self.result = Result(header)

    def measure(self, path: Path | None = None) -> Any:
        """Calibrate, then measure case by case, with progress on stderr.

        After each case the result so far is in the file `path`, should the run be interrupted.
        """
        import dataclasses

        import torch

        from adapterkern.bench import calibration, environment, measure
        from adapterkern.bench.results import save
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
        for case in self.cases:
            progress.next()
            self.result.rows += measure.measure_case(
                case, self.providers, timer, measured, self.settings, progress
            )
            if path is not None:
                save(self.result, path)
        if isinstance(timer, CudaTimer):
            with timer.session():
                after = calibration.copy_bandwidth(timer, 0.3)
            measured = dataclasses.replace(measured, copy_bandwidth_after=after)
            self.header["clocks_after"] = environment.clocks(device)
        progress.end()
        self.header["calibration"] = measured.as_dict()
        return self.result


def _plan(arguments: argparse.Namespace) -> _Plan:
    """The plan of the command line.

    Raises:
        ValueError: something in it cannot be done, with what could.
    """
    import torch

    from adapterkern.bench import cases as bench_cases
    from adapterkern.bench import environment
    from adapterkern.bench.measure import Settings
    from adapterkern.bench.providers import providers
    from adapterkern.bench.results import unwritable

    if arguments.compare and len(arguments.compare) > 2:
        raise ValueError(f"--compare takes one or two files, got {len(arguments.compare)}.")
    for path in filter(None, (arguments.json, arguments.plot)):
        problem = unwritable(path.parent)
        if path.is_dir():
            problem = f"{path} is a folder; name a file"
        if problem:
            raise ValueError(problem)
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError('--plot needs matplotlib: pip install "adapterkern[plot]"')
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = _shapes(arguments, kind)
    tokens = arguments.tokens or (
        bench_cases.QUICK_TOKENS[kind] if arguments.quick else bench_cases.TOKENS[kind]
    )
    cases = bench_cases.grid(
        shapes,
        tokens,
        arguments.mode,
        arguments.dtype or (bench_cases.DTYPE[kind],),
        arguments.activation,
    )
    chosen = providers(_backend_names(arguments, kind) + _baseline_names(arguments, kind))
    seconds = arguments.seconds or (0.2 if arguments.quick else 0.5)
    header = environment.header(torch.device(kind), environment.command_line("adapterkern"))
    return _Plan(header, cases, chosen, Settings(seconds=seconds))


def _shapes(arguments: argparse.Namespace, kind: str) -> list[tuple[int, int]]:
    from adapterkern.bench import cases as bench_cases

    hidden, bottleneck = arguments.hidden_size, arguments.bottleneck_size
    if (hidden is None) != (bottleneck is None):
        raise ValueError("--hidden-size and --bottleneck-size go together.")
    if hidden is not None and arguments.preset:
        raise ValueError("--preset fixes the sizes; leave out --hidden-size and --bottleneck-size.")
    if hidden is not None:
        return [(h, r) for h in hidden for r in bottleneck]
    if arguments.preset:
        return bench_cases.preset_shapes(arguments.preset)
    return list(bench_cases.QUICK_SHAPES[kind] if arguments.quick else bench_cases.SHAPES)


def _backend_names(arguments: argparse.Namespace, kind: str) -> list[str]:
    from adapterkern.backends import NAMES, get

    if arguments.backend:
        for name in arguments.backend:
            if name not in NAMES:
                known = ", ".join(NAMES)
                raise ValueError(f"unknown backend {name!r}.\n  hint: known backends are {known}.")
        return arguments.backend
    fused = [name for name in NAMES if name != "reference" and not get(name).unavailable_reason()]
    return fused if kind == "cuda" and fused else ["reference"]


def _baseline_names(arguments: argparse.Namespace, kind: str) -> list[str]:
    from adapterkern.bench.providers import BASELINES

    if arguments.baseline == ["all"]:
        return [provider.name for provider in BASELINES]
    if arguments.baseline:
        known = [provider.name for provider in BASELINES]
        for name in arguments.baseline:
            if name not in known:
                raise ValueError(
                    f"unknown baseline {name!r}.\n  hint: known baselines are {', '.join(known)}."
                )
        return arguments.baseline
    if kind == "cpu":
        return ["plain"]
    names = [entry.name for entry in BASELINES if not (arguments.quick and entry.compiled)]
    return [name for name in names if name != "compile-max"]


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
    """What runs, on stderr: rewritten in place on a terminal, else one line a case."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self.live = sys.stderr.isatty()
        self._case = ""

    def next(self) -> None:
        self.done += 1

    def __call__(self, text: str) -> None:
        if self.live:
            print(f"\r\033[K[{self.done}/{self.total}] {text[:100]}", end="", file=sys.stderr)
            sys.stderr.flush()
        elif text.partition(":")[0] != self._case:
            self._case = text.partition(":")[0]
            print(f"[{self.done}/{self.total}] {self._case}", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self.live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _refuse(problem: str) -> int:
    print(f"adapterkern bench: {problem}", file=sys.stderr)
    return 2
