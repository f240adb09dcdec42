"""The demo's 95 % intervals."""

import numpy as np
import pytest

from adapterkern.cli.demo.intervals import T_QUANTILES, bootstrap_interval, t_interval


def test_bootstrap_interval_of_an_accuracy_is_that_of_the_binomial():
    # 300 of 400 right: the resampled count is binomial(400, 0.75), whose quantiles 2.5 and 97.5 %
    # are 283 and 317 (normal approximation: 300 -+ 1.96 * 8.66 = 283.03, 316.97).
    low, high = bootstrap_interval(np.repeat([1.0, 0.0], [300, 100]))
    assert low == pytest.approx(283 / 400, abs=1 / 400)
    assert high == pytest.approx(317 / 400, abs=1 / 400)


def test_bootstrap_interval_is_the_same_every_time_and_for_any_order():
    values = np.repeat([1.0, 0.0, -1.0], [40, 50, 10])
    shuffled = np.random.default_rng(5).permutation(values)
    assert bootstrap_interval(values) == bootstrap_interval(shuffled)


def test_bootstrap_interval_of_a_pairing_is_narrower_than_its_parts_allow():
    one = np.repeat([1.0, 0.0], [300, 100])
    other = one.copy()
    other[:12] = 0.0  # it tells 12 texts less
    low, high = bootstrap_interval(one - other)
    assert 0 < low < 12 / 400 < high < 24 / 400  # Poisson: 12 -+ 1.96 * 3.46
    assert bootstrap_interval(one)[0] < other.mean()  # apart, the two could not be told


def test_t_interval_is_the_textbook_one():
    # Mean 3, s = sqrt(2.5), n = 5, t = 2.776 (NIST/SEMATECH e-Handbook 1.3.6.7.2, 4 degrees of
    # freedom): 3 -+ 2.776 * 0.7071.
    assert t_interval([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx([1.0371, 4.9629], abs=1e-4)


def test_t_interval_of_two_seeds_uses_one_degree_of_freedom():
    assert t_interval([0.0, 2.0]) == pytest.approx([1 - 12.706, 1 + 12.706])


def test_t_interval_of_many_seeds_uses_the_last_quantile():
    values = [0.0, 1.0] * 50
    half = 2.042 * np.std(values, ddof=1) / 10
    assert t_interval(values) == pytest.approx([0.5 - half, 0.5 + half])


def test_t_quantiles_fall_towards_the_normal_one():
    assert len(T_QUANTILES) == 30
    assert list(T_QUANTILES) == sorted(T_QUANTILES, reverse=True)
    assert T_QUANTILES[-1] > 1.96
