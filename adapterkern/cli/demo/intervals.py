"""95 % intervals of accuracies: over the held-out texts, or over seeds."""

import math
import statistics

import numpy as np

RESAMPLES = 10_000
GENERATOR_SEED = 0  # the interval of a result is a function of the result
CONFIDENCE = 0.95

# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom (NIST/SEMATECH e-Handbook
# of Statistical Methods, 1.3.6.7.2). Beyond, the last one: 4 % wide at most.
T_QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def bootstrap_interval(values: np.ndarray) -> list[float]:
    """[low, high] of the mean of `values` [N]: the percentiles 2.5 and 97.5 of its mean over
    RESAMPLES samples of N with replacement, drawn by a fixed generator.

    Args:
        values: of each text, 1 where it was told right, else 0; or the difference of two of these,
            which makes the interval a paired one.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.
    """
    # How often each distinct value is drawn is multinomial: the same samples, without the texts.
    distinct, counts = np.unique(values, return_counts=True)
    generator = np.random.default_rng(GENERATOR_SEED)
    drawn = generator.multinomial(len(values), counts / len(values), size=RESAMPLES)
    means = drawn @ distinct / len(values)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return [float(low), float(high)]


def t_interval(values: list[float]) -> list[float]:
    """[low, high] of the mean over seeds: mean -+ t(n - 1) s / sqrt(n), with s the standard
    deviation of the n values (n - 1 in its denominator) and t Student's two-sided 95 % quantile.

    Of two methods, the differences of their values seed by seed make the interval a paired one.
    It supposes that the values of many seeds would be spread normally.
    """
    n, mean = len(values), statistics.mean(values)
    quantile = T_QUANTILES[min(n - 1, len(T_QUANTILES)) - 1]
    half = quantile * statistics.stdev(values) / math.sqrt(n)
    return [mean - half, mean + half]
