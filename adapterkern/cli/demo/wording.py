"""The report in words, for a terminal of 80 columns or a log; no colours, no cursor movements."""

import textwrap
from collections.abc import Iterator

from adapterkern.cli.demo.findings import (
    Check,
    Difference,
    MethodResult,
    MixedTime,
    Report,
    StepTime,
    TaskResult,
)
from adapterkern.cli.demo.snippet import COLUMNS, snippet

SHORT = {"lora": "LoRA", "full": "full fine-tuning"}  # within a sentence
STEP = (
    "step: the median training step, the methods taken in turn; the time further down is of the "
    "longest texts."
)
QUICK = "A quick run shows the path, not what the methods reach: leave out --quick for that."
INDENT = 10  # of what stands beside a heading


def as_text(report: Report) -> str:
    """The report, every line of it at most COLUMNS wide, down to how its adapter is used."""
    first = report.methods[0].tasks[0].task
    parts = [
        list(_what_was_done(report)),
        [*_table(_method_rows(report)), "", *_wrapped("", " ".join(_remarks(report)))],
        _comparisons(report),
        [line for check in report.checks for line in _check(check)],
        [*_sizes(report), *_times(report), *_wrapped("whole run", duration(report.seconds))],
        _wrapped("written", f"{report.command['out']}: report.json, report.png, adapters/"),
        ["Use your adapter now:", "", snippet(report.saved["folders"][first])],
    ]
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def seeds_in_words(seeds: list[int]) -> str:
    """ "seed 3", "seeds 0 to 4", "seeds 1, 5, 9"."""
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    if len(seeds) > 2 and seeds == list(range(seeds[0], seeds[-1] + 1)):
        return f"seeds {seeds[0]} to {seeds[-1]}"
    return f"seeds {', '.join(map(str, seeds))}"


def device_in_words(report: Report) -> str:
    """The device that trained; of a CPU its kind and the threads."""
    machine = report.machine
    if machine["device"] != "cpu":
        return machine["device"]
    threads = machine["torch_threads"]
    return f"cpu ({machine['processor']}, {threads} thread{'s' if threads != 1 else ''})"


def versions_in_words(report: Report) -> str:
    """ "adapterkern 0.1.0, torch 2.13.0"."""
    return ", ".join(f"{name} {report.versions.get(name)}" for name in ("adapterkern", "torch"))


def intervals_meaning(report: Report) -> str:
    """What the intervals beside the accuracies are of, as a sentence."""
    if report.interval_of == "seeds":
        return (
            f"± is a 95 % interval from the spread over {len(report.seeds)} seeds, all judged on "
            "the same texts: other texts could move an accuracy further. The accuracies are means "
            "over the seeds."
        )
    return (
        f"± is a 95 % interval, by a bootstrap over the {report.corpus['held_out']:,} held-out "
        "texts. Other seeds give other numbers: --seeds 5 shows their spread."
    )


def percent(accuracy: float) -> str:
    """ "69.1"."""
    return f"{100 * accuracy:.1f}"


def plus_minus(task: TaskResult) -> str:
    """ "±4.0" in points: the interval's wider side, so that it promises no more than that."""
    low, high = task.interval
    return f"±{percent(max(high - task.after, task.after - low))}"


def verdict(difference: Difference) -> str:
    """What the adapters do to the other method, by where 0 lies in the interval: a verb."""
    low, high = difference.interval
    if low > 0:
        return "beat"
    return "lose to" if high < 0 else "are indistinguishable from"


def sizes_in_words(report: Report) -> str:
    """What an adapter and a whole model take on the disk."""
    adapter, model = report.saved["adapter_bytes"], report.saved["model_bytes"]
    return (
        f"an adapter with its head {size(adapter)}, a fully fine-tuned model {size(model)}: "
        f"{model / adapter:,.0f} times as much"
    )


def comparison_meaning(report: Report) -> str:
    """What the numbers in `comparisons` are."""
    paired = "seed by seed" if report.interval_of == "seeds" else "text by text"
    return (
        "Adapters against the others, in points; indistinguishable where the 95 % interval, paired "
        f"{paired}, holds 0:"
    )


def comparisons(report: Report) -> dict[str, str]:
    """By task a sentence of whom the adapters beat, lose to, or cannot be told from."""
    sentences = {}
    for task in dict.fromkeys(one.task for one in report.differences):
        verdicts: dict[str, list[str]] = {}
        for one in report.differences:
            if one.task == task:
                low, high = one.interval
                points = f"{100 * one.mean:+.1f}; {100 * low:+.1f} to {100 * high:+.1f}"
                other = SHORT.get(one.method, one.method)
                verdicts.setdefault(verdict(one), []).append(f"{other} ({points})")
        clauses = [f"{verb} {' and '.join(others)}" for verb, others in verdicts.items()]
        sentences[task] = f"adapters {', and '.join(clauses)}."
    return sentences


def share(method: MethodResult) -> str:
    """The trained share of the parameters in percent."""
    return f"{method.share:.2%}" if method.share < 0.99995 else "100%"


def milliseconds(value: float) -> str:
    """A time in the unit that keeps its number short."""
    if value < 1:
        return f"{1e3 * value:.0f} us"
    if value >= 1e3:
        return f"{value / 1e3:.1f} s"
    return f"{value:.1f} ms" if value < 10 else f"{value:.0f} ms"


def size(count: float) -> str:
    """Bytes in the largest unit of which there is one."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.{0 if unit == 'bytes' else 1}f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def duration(seconds: float) -> str:
    """ "48 s", "4 min 32 s"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _what_was_done(report: Report) -> Iterator[str]:
    model, corpus, command = report.model, report.corpus, report.command
    yield from _wrapped(
        "model",
        f"{model['name']} ({model['type']}, hidden size {model['hidden_size']}) with "
        f"{model['num_adapters']} adapters of width {model['bottleneck_size']}",
    )
    yield from _wrapped(
        "texts",
        f"{corpus['train']:,} docstrings to train on and {corpus['held_out']:,} held out, from "
        f"{corpus['modules']} modules of Python's standard library",
    )
    rates = ", ".join(f"{m.learning_rate:g} for {_name(m)}" for m in report.methods)
    yield from _wrapped(
        "training",
        f"{command['steps']} steps of {command['batch_size']} texts for each task and method, "
        f"{seeds_in_words(report.seeds)}; learning rate {rates}",
    )
    yield from _wrapped("device", f"{device_in_words(report)}, {versions_in_words(report)}")


def _name(method: MethodResult) -> str:
    return SHORT.get(method.method, "adapters")


def _method_rows(report: Report) -> list[list[str]]:
    tasks = report.methods[0].tasks
    headings = [heading for task in tasks for heading in (f"{task.task} %", "95 %")]
    rows = [["held-out accuracy of", "trained", "share", *headings, "step"]]
    for method in report.methods:
        accuracies = [cell for t in method.tasks for cell in (percent(t.after), plus_minus(t))]
        row = [method.label, f"{method.trained:,}", share(method), *accuracies]
        rows.append([*row, milliseconds(method.step_ms)])
    majority = [report.majority[task.task] for task in tasks]
    untrained = [task.before for task in tasks]
    for label, shares in (("largest class, always", majority), ("before training", untrained)):
        accuracies = [cell for one in shares for cell in (percent(one), "")]
        rows.append([label, "", "", *accuracies, ""])
    return rows


def _remarks(report: Report) -> list[str]:
    """What the table's numbers mean; a quick run, judged by a part of the texts, warns of them."""
    is_quick = report.command.get("held_out") is not None
    return [*([QUICK] if is_quick else []), intervals_meaning(report), STEP]


def _table(rows: list[list[str]]) -> list[str]:
    """Columns padded to their widest cell; the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def _comparisons(report: Report) -> list[str]:
    lines = [line for said in comparisons(report).items() for line in _wrapped(*said)]
    return [*_wrapped("", comparison_meaning(report)), *lines] if lines else []


def _check(check: Check) -> list[str]:
    state = "ok" if check.passed else "FAILED"
    return [*_wrapped(state, check.name), *_wrapped("", check.detail, INDENT)]


def _sizes(report: Report) -> Iterator[str]:
    yield from _wrapped("on disk", sizes_in_words(report))
    peaks = [(_name(m), m.peak_bytes) for m in report.methods if m.peak_bytes is not None]
    if peaks:
        listed = ", ".join(f"{name} {size(peak)}" for name, peak in peaks)
        yield from _wrapped("memory", f"of the GPU, at most, in a training step: {listed}")


def _times(report: Report) -> Iterator[str]:
    timed: list[StepTime | MixedTime] = [*report.step_times, *report.mixed_times]
    for step in report.step_times:
        yield from _step_lines(step)
    for mixed in report.mixed_times:
        yield from _mixed_lines(mixed)
    if timed and not any(one.is_speed_claim for one in timed):
        yield from _wrapped("", no_claim(on_gpu=report.machine["device"] != "cpu"), INDENT)


def no_claim(*, on_gpu: bool) -> str:
    """Why the times claim nothing about speed."""
    if on_gpu:
        return (
            "None of adapterkern's kernels ran on this GPU, so these times claim nothing about "
            "speed; `adapterkern info` says why."
        )
    return (
        "This CPU has no kernel to be faster with: adapterkern runs PyTorch's own operations on it."
        " On an NVIDIA GPU from compute capability 8.0 it runs its own kernels, which "
        "`adapterkern bench` times."
    )


def _step_lines(step: StepTime) -> list[str]:
    ours = f"adapterkern {milliseconds(step.fused_ms)}"
    heading, best = "step", step.fused_ms
    if step.norm_ms is not None:
        heading, best = "forward", step.norm_ms
        ours = f"adapterkern {milliseconds(step.norm_ms)} with the norm in its pass, "
        ours += f"{milliseconds(step.fused_ms)} without"
    return _wrapped(
        heading,
        f"{ours}; separate PyTorch layers {milliseconds(step.eager_ms)}"
        f"{_claim(step, step.eager_ms / best)} ({_measured(step)})",
    )


def _mixed_lines(mixed: MixedTime) -> list[str]:
    return _wrapped(
        "mixed",
        f"{mixed.runs - 1} adapters, trained and random, in one batch "
        f"{milliseconds(mixed.mixed_ms)}; in {mixed.runs} runs, one for each and one without, "
        f"{milliseconds(mixed.switched_ms)}{_claim(mixed, mixed.switched_ms / mixed.mixed_ms)} "
        f"({_measured(mixed)})",
    )


def _claim(timed: StepTime | MixedTime, times: float) -> str:
    return f": {times:.2f} times as fast" if timed.is_speed_claim else ""


def _measured(timed: StepTime | MixedTime) -> str:
    batch, length = timed.tokens
    kernels = f", {timed.backend} kernels" if timed.is_speed_claim else ""
    return f"{batch} x {length} tokens, {timed.dtype}, median of {timed.repeats}{kernels}"


def _wrapped(heading: str, text: str, indent: int = 0) -> list[str]:
    """`text` beside a heading, or below one without it, in lines of COLUMNS."""
    margin = INDENT if heading or indent else 0
    return textwrap.wrap(
        text,
        COLUMNS,
        initial_indent=heading.ljust(margin),
        subsequent_indent=" " * margin,
        break_on_hyphens=False,
    )
