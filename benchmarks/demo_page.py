"""What docs/demo.md shows: the committed run of five seeds, and the search behind its recipes."""

import json
from pathlib import Path

from adapterkern.cli.demo.findings import MethodResult, Report
from adapterkern.cli.demo.wording import (
    comparison_meaning,
    comparisons,
    device_in_words,
    intervals_meaning,
    milliseconds,
    percent,
    plus_minus,
    seeds_in_words,
    share,
    sizes_in_words,
    versions_in_words,
)

PAGE = "docs/demo.md"
RUN = "benchmarks/results/demo/five-seeds/report.json"
PICTURE = "benchmarks/results/demo/five-seeds/report.png"
SEARCH = "benchmarks/results/demo/recipe.json"


def section(root: Path) -> str | None:
    """Return the generated part of the page; None as long as no run is committed.

    Raises:
        ValueError: the run has another format.
    """
    if not (root / RUN).exists():
        return None
    report = Report.from_json((root / RUN).read_text(encoding="utf-8"))
    parts = [
        f"{report.model['name']} on {device_in_words(report)}, {versions_in_words(report)}, "
        f"{seeds_in_words(report.seeds)}, "
        f"{report.command['steps']} steps of {report.command['batch_size']} texts for each task, "
        f"method and seed; [all numbers](../{RUN}).",
        f"![accuracies, trained parameters and losses of the three methods](../{PICTURE})",
        _markdown(_method_rows(report)),
        f"{intervals_meaning(report)} In brackets: each seed's accuracy.",
        "\n".join([comparison_meaning(report), "", *_verdicts(report)]),
        f"On disk: {sizes_in_words(report)}.",
        "\n".join(["The checks of this run:", "", *_checks(report)]),
    ]
    if (root / SEARCH).exists():
        search = json.loads((root / SEARCH).read_text(encoding="utf-8"))
        parts += [_search_meaning(search), _markdown(_search_rows(search, report))]
    return "\n\n".join(parts)


def draw(root: Path) -> None:
    """Draw the picture of the committed run anew, if there is one."""
    if (root / RUN).exists():
        from adapterkern.cli.demo.plot import plot_report  # matplotlib

        report = Report.from_json((root / RUN).read_text(encoding="utf-8"))
        plot_report(report, root / PICTURE)


def _method_rows(report: Report) -> list[list[str]]:
    tasks = report.methods[0].tasks
    names = [f"{task.task} %" for task in tasks]
    header = ["held-out accuracy of", "trained", "share", *names, "step"]
    majority = [percent(report.majority[task.task]) for task in tasks]
    return [
        header,
        *(_method_row(method) for method in report.methods),
        ["largest class, always", "", "", *majority, ""],
        ["before training", "", "", *(percent(task.before) for task in tasks), ""],
    ]


def _method_row(method: MethodResult) -> list[str]:
    cells = [
        f"{percent(task.after)} {plus_minus(task)} ({', '.join(map(percent, task.by_seed))})"
        for task in method.tasks
    ]
    trained = f"{method.trained:,}"
    return [method.label, trained, share(method), *cells, milliseconds(method.step_ms)]


def _verdicts(report: Report) -> list[str]:
    return [f"- {task}: {sentence}" for task, sentence in comparisons(report).items()]


def _checks(report: Report) -> list[str]:
    return [
        f"- {'held' if check.passed else 'FAILED'}: {check.name} ({check.detail})"
        for check in report.checks
    ]


def _search_meaning(search: dict) -> str:
    texts, rounds = search["texts"], search["rounds"]
    return (
        f"The [search](../{SEARCH}) trained on {texts['train']:,} of the training texts and judged "
        f"on the other {texts['validation']:,}: every candidate for {rounds['first_steps']} steps, "
        f"the best {rounds['kept']} of each method for {rounds['steps']} steps, the best "
        f"{rounds['finalists']} of these from {rounds['seeds']} seeds. Accuracies are means over "
        "both tasks and these seeds:"
    )


def _search_rows(search: dict, report: Report) -> list[list[str]]:
    rows = [["", "candidates", "chosen", "learning rate", "accuracy in %, set aside"]]
    for method in report.methods:
        chosen = search["finalists"][method.method]["chosen"]
        rows.append(
            [
                method.label,
                str(len(search["grid"][method.method])),
                chosen["recipe"]["name"],
                f"{chosen['recipe']['learning_rate']:g}",
                percent(chosen["accuracy"]),
            ]
        )
    return rows


def _markdown(rows: list[list[str]]) -> str:
    """A table whose first row is its header."""
    header, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([header, "|---" * len(rows[0]) + "|", *body])
