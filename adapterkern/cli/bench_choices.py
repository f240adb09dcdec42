"""What the command line of `adapterkern bench` chooses: cases, backends and baselines."""

import argparse

from adapterkern.backends import NAMES, get
from adapterkern.bench import cases as bench_cases
from adapterkern.bench.cases import BenchCase
from adapterkern.bench.providers import BASELINES


def cases(arguments: argparse.Namespace, kind: str) -> list[BenchCase]:
    """Return what is to be timed on a device of this kind.

    Raises:
        ValueError: options that do not go together, or a case that cannot be.
    """
    shapes, quick = _shapes(arguments, kind), arguments.quick
    of_all = (
        arguments.mode or ("forward", "step"),
        arguments.dtype or (bench_cases.DTYPE[kind],),
        arguments.activation or ("gelu",),
    )
    if arguments.adapters is None:
        if arguments.rows or arguments.mix:
            raise ValueError("--rows and --mix are of many adapters.\n  hint: --adapters 16")
        tokens = arguments.tokens or (
            bench_cases.QUICK_TOKENS[kind] if quick else bench_cases.TOKENS[kind]
        )
        return bench_cases.grid(shapes, tokens, *of_all, arguments.norm or "none")
    if arguments.tokens or arguments.norm:
        raise ValueError(
            "--adapters goes with neither --tokens nor --norm.\n"
            "  hint: --rows says how many tokens each adapter has"
        )
    adapters = arguments.adapters or ((16,) if quick else bench_cases.ADAPTERS[kind])
    rows = arguments.rows or ((32,) if quick else bench_cases.ROWS[kind])
    mixes = arguments.mix or ("even", "zipf")
    found = bench_cases.grid_of_many(shapes, adapters, rows, mixes, *of_all)
    if not found:
        raise ValueError(
            "Zipf's mix needs two adapters and a multiple of 4 rows.\n"
            "  hint: --adapters 16 --rows 32"
        )
    return found


def _shapes(arguments: argparse.Namespace, kind: str) -> list[tuple[int, int]]:
    hidden, bottleneck = arguments.hidden_size, arguments.bottleneck_size
    if (hidden is None) != (bottleneck is None):
        raise ValueError("--hidden-size and --bottleneck-size go together.")
    if hidden is not None and arguments.preset:
        raise ValueError("--preset fixes the sizes; leave out --hidden-size and --bottleneck-size.")
    if hidden is not None:
        return [(h, r) for h in hidden for r in bottleneck]
    if arguments.preset:
        return bench_cases.preset_shapes(arguments.preset)
    if arguments.adapters is not None and not arguments.quick:
        return list(bench_cases.MANY_SHAPES[kind])
    return list(bench_cases.QUICK_SHAPES[kind] if arguments.quick else bench_cases.SHAPES)


def backend_names(arguments: argparse.Namespace, kind: str) -> list[str]:
    """Return the backends of this package to time.

    Raises:
        ValueError: an unknown name, or none of those named can run here.
    """
    if arguments.backend:
        for name in arguments.backend:
            if name not in NAMES:
                known = ", ".join(NAMES)
                raise ValueError(f"unknown backend {name!r}.\n  hint: known backends are {known}.")
        reasons = {name: get(name).unavailable_reason() for name in arguments.backend}
        if all(reasons.values()):
            lines = "".join(f"\n  - {name}: {reason}" for name, reason in reasons.items())
            raise ValueError(f"no backend that --backend names can run here:{lines}")
        return arguments.backend
    fused = [name for name in NAMES if name != "reference" and not get(name).unavailable_reason()]
    return fused if kind == "cuda" and fused else ["reference"]


def baseline_names(arguments: argparse.Namespace, kind: str) -> list[str]:
    """Return what to compare with, of the baselines that the cases have.

    Raises:
        ValueError: an unknown name.
    """
    of = "one" if arguments.adapters is None else "many"
    of = "norm" if arguments.norm else of
    applicable = [provider for provider in BASELINES if of in provider.kinds]
    if "all" in (arguments.baseline or []):
        return [provider.name for provider in applicable]
    if arguments.baseline:
        known = [provider.name for provider in BASELINES] + ["all"]
        for name in arguments.baseline:
            if name not in known:
                raise ValueError(
                    f"unknown baseline {name!r}.\n  hint: known baselines are {', '.join(known)}."
                )
        return arguments.baseline
    if kind == "cpu":
        few = {"one": ["plain"], "norm": ["plain", "separate", "no-adapter"]}
        return few.get(of) or [provider.name for provider in applicable]
    names = [entry.name for entry in applicable if not (arguments.quick and entry.compiled)]
    return [name for name in names if name != "compile-max"]
