"""Two result files side by side: a ratio, and a verdict that noise cannot give."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from adapterkern.bench.results import Result, ResultError, Row, Timing
from adapterkern.bench.table import aligned, in_unit, time_unit

# Two runs of one program differ by this much, whatever their quantiles say.
LEAST_NOISE = 0.02
# Beyond it "same" would say nothing. Of 222 rows timed on H200s all but one are steadier.
MOST_NOISE_OF_SAME = 0.10
VERDICTS = ("faster", "same", "slower", "too noisy")
_HINT = (
    "too noisy: the samples of one call differ by more than the change to be told.",
    "Measure both files again with nothing else running, with longer calls (such as",
    "--tokens 512), more repeats (--seconds 2) and, on a CPU, fewer threads than",
    "there are CPUs (OMP_NUM_THREADS=1).",
)


@dataclass(frozen=True)
class Comparison:
    """One row of both files: of which case, by which implementation, in which kind of timing, and
    its two times."""

    case: str
    label: str
    kind: str
    before: Timing
    after: Timing

    @property
    def ratio(self) -> float:
        """The median after over that before."""
        return self.after.p50 / self.before.p50

    @property
    def noise(self) -> float:
        """How far from 1 a ratio may be by chance alone, see `verdict`."""
        least = self.before.p20 * self.after.p20
        spread = self.before.p80 * self.after.p80 / least if least else math.inf
        return max(LEAST_NOISE, spread - 1)

    @property
    def verdict(self) -> str:
        """Faster, slower, same or too noisy.

        With the ratio r of the medians and the 20th and 80th percentiles of the samples,

            noise n = max(2 %, p80 / p20 of before * p80 / p20 of after - 1)

            slower      r > 1 + n
            faster      r < 1 / (1 + n)
            same        in between, and n <= 10 %: a change of more than n would have shown
            too noisy   in between, and n > 10 %

        So a change has to exceed the spreads of both files together; a large one is told however
        noisy they are. Half of each spread would be too little: among 14 runs of one program on
        two CPUs with a load of 10, it took 20 % of the 2184 pairs of rows for a change, and this
        rule takes 1.4 %.
        """
        if self.ratio > 1 + self.noise:
            return "slower"
        if self.ratio < 1 / (1 + self.noise):
            return "faster"
        return "same" if self.noise <= MOST_NOISE_OF_SAME else "too noisy"


def different_devices(before: Result, after: Result) -> str | None:
    """Return both names if the devices of the files differ, as CPUs do by model, else None."""
    if before.device != after.device:
        return f"{before.device} and {after.device}"
    models = before.header.get("cpu"), after.header.get("cpu")
    if before.on_gpu or None in models or models[0] == models[1]:
        return None
    return f"{models[0]} and {models[1]}"


def compare(before: Result, after: Result, force: bool = False) -> list[Comparison]:
    """Return every row that both files have a time for, in the order of `after`.

    Raises:
        ResultError: the files are of different devices (unless forced) or have no row in common.
    """
    apart = different_devices(before, after)
    if apart and not force:
        raise ResultError(
            f"the files are of different devices, {apart}.\n  hint: --force compares them anyway"
        )
    old = {row.key: row for row in before.rows}
    pairs = ((old.get(row.key), row) for row in after.rows)
    found = [entry for first, second in pairs if first and (entry := _pair(first, second))]
    for model in after.models:
        earlier = next((entry for entry in before.models if entry.key == model.key), None)
        if earlier is None or model.milliseconds is None or earlier.milliseconds is None:
            continue
        times = _microseconds(earlier.milliseconds), _microseconds(model.milliseconds)
        found.append(
            Comparison(f"{model.model} {model.mode}", model.variant, model.execution, *times)
        )
    if not found:
        raise ResultError(
            "the files have no timed row in common.\n"
            "  hint: measure the same shapes, modes and implementations in both"
        )
    return found


def _pair(before: Row, after: Row) -> Comparison | None:
    if before.time is None or after.time is None or before.headline != after.headline:
        return None
    return Comparison(str(after.case), after.label, after.headline, before.time, after.time)


def _microseconds(timing: Timing) -> Timing:
    return Timing(timing.p20 * 1e3, timing.p50 * 1e3, timing.p80 * 1e3, timing.samples)


def render(comparisons: list[Comparison], before: str, after: str) -> str:
    """Render the comparison as one table a case, and the count of each verdict."""
    lines = [f"before: {before}", f"after:  {after}"]
    for case, kind in dict.fromkeys((entry.case, entry.kind) for entry in comparisons):
        here = [entry for entry in comparisons if (entry.case, entry.kind) == (case, kind)]
        lines += ["", f"{case} ({kind})", *_table(here)]
    verdicts = [entry.verdict for entry in comparisons]
    counts = ", ".join(f"{verdicts.count(name)} {name}" for name in VERDICTS)
    lines += ["", *(_HINT if "too noisy" in verdicts else ()), counts]
    return "\n".join(lines)


def _table(comparisons: Iterable[Comparison]) -> list[str]:
    entries = list(comparisons)
    unit = time_unit(entry.before.p50 for entry in entries)
    head = ["implementation", f"before {unit}", f"after {unit}", "after/before", "noise", "verdict"]
    body = (
        (
            entry.label,
            in_unit(entry.before.p50, unit),
            in_unit(entry.after.p50, unit),
            f"{entry.ratio:.3f}x",
            f"{entry.noise:.0%}",
            entry.verdict,
        )
        for entry in entries
    )
    return aligned([head, *body])
