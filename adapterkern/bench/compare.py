"""Two result files side by side: a ratio, and a verdict that noise cannot give."""

from dataclasses import dataclass

from adapterkern.bench.results import Result, ResultError, Timing
from adapterkern.bench.table import aligned

LEAST_BAND = 0.02  # two runs of the same program differ by this much, whatever their quantiles say


@dataclass(frozen=True)
class Comparison:
    """One row of both files. ratio: after over before; band: how far from 1 is still noise."""

    key: str
    kind: str
    before: float
    after: float
    band: float

    @property
    def ratio(self) -> float:
        return self.after / self.before

    @property
    def verdict(self) -> str:
        """Same, faster or slower."""
        if self.ratio > 1 + self.band:
            return "slower"
        return "faster" if self.ratio < 1 / (1 + self.band) else "same"


def noise_band(before: Timing, after: Timing) -> float:
    """Return half the relative distance from the 20th to the 80th percentile of both files."""
    spread = sum((timing.p80 - timing.p20) / (2 * timing.p50) for timing in (before, after))
    return max(LEAST_BAND, spread)


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
    found = []
    for row in after.rows:
        other = old.get(row.key)
        if (
            other is None
            or row.time is None
            or other.time is None
            or row.headline != other.headline
        ):
            continue
        band = noise_band(other.time, row.time)
        found.append(Comparison(row.key, row.headline, other.time.p50, row.time.p50, band))
    for model in after.models:
        earlier = next((entry for entry in before.models if entry.key == model.key), None)
        if earlier is None or model.milliseconds is None or earlier.milliseconds is None:
            continue
        old_time, new_time = earlier.milliseconds, model.milliseconds
        band = noise_band(old_time, new_time)
        found.append(Comparison(model.key, "model", old_time.p50 * 1e3, new_time.p50 * 1e3, band))
    if not found:
        raise ResultError("the files have no timed row in common.")
    return found


def render(comparisons: list[Comparison], before: str, after: str) -> str:
    """Render the comparison as a table, and the count of each verdict."""
    table = [["row", "timing", f"{before} us", f"{after} us", "ratio", "noise", "verdict"]]
    for entry in comparisons:
        numbers = (f"{entry.before:.1f}", f"{entry.after:.1f}", f"{entry.ratio:.3f}")
        table.append([entry.key, entry.kind, *numbers, f"{entry.band:.0%}", entry.verdict])
    verdicts = [entry.verdict for entry in comparisons]
    counts = ", ".join(f"{verdicts.count(name)} {name}" for name in ("faster", "same", "slower"))
    return "\n".join([*aligned(table), counts])
