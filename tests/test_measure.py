"""data/measure.py: each formula against a table by hand, or against all cases one by one."""

import itertools
import math

import pytest
import torch

from data import measure

T = torch.tensor


@pytest.mark.lesson
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_is_the_mean_over_all_sets(n):
    """Every set of n among 5 answers to 3 prompts, its best by score, and that one's value."""
    generator = torch.Generator().manual_seed(n)
    score, value = torch.randn(2, 3, 5, generator=generator)
    expected = []
    for p in range(3):
        sets = list(itertools.combinations(range(5), n))
        best = [max(chosen, key=lambda i: score[p, i]) for chosen in sets]
        expected.append(sum(value[p, i].item() for i in best) / len(sets))
    assert measure.best_of_n(score, value, n).tolist() == pytest.approx(expected)


@pytest.mark.lesson
def test_best_of_n_by_hand():
    """Of the 3 pairs of the scores 1, 2, 3, the best is 2 once and 3 twice. The gold of these is 0.9 and 0.3."""
    score, gold = T([[3.0, 1.0, 2.0]]), T([[0.3, 0.0, 0.9]])
    assert measure.best_of_n(score, score, 2).item() == pytest.approx((2 + 3 + 3) / 3)
    assert measure.best_of_n(score, gold, 2).item() == pytest.approx((0.9 + 0.3 + 0.3) / 3)


@pytest.mark.lesson
@pytest.mark.parametrize("n", [1, 2, 4])
def test_kl_of_best_of_n_is_that_of_its_density(n):
    """Best-of-n's density, relative to the model's, is n u^(n - 1) at the quantile u of the score: E log of that."""
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    density = n * u ** (n - 1)
    assert measure.best_of_kl(n) == pytest.approx((density * density.log()).mean().item(), abs=1e-6)


@pytest.mark.lesson
def test_a_tie_is_half_a_win():
    assert measure.win_rate(T([1.0, 2.0, 3.0, 4.0]), T([0.0, 2.0, 4.0, 1.0])) == 2.5 / 4


@pytest.mark.lesson
@pytest.mark.parametrize("share, n", [(0.0, 10), (0.3, 10), (0.75, 64), (1.0, 5)])
def test_wilsons_bounds_are_z_deviations_away(share, n):
    """A bound is a rate p from which the share is just 1.96 deviations, sqrt(p (1 - p) / n), away."""
    low, high = measure.wilson(share, n)
    assert -1e-12 < low <= share + 1e-12 and share - 1e-12 <= high < 1 + 1e-12 and high - low > 0.1
    for p in (low, high):
        assert (share - p) ** 2 == pytest.approx(1.96 ** 2 * p * (1 - p) / n, abs=1e-12)


@pytest.mark.lesson
@pytest.mark.parametrize("n, share", [(1, 4 / 8), (2, 4 / 6), (3, 4 / 4), (5, 0.0)])
def test_distinct_n_by_hand(n, share):
    """[1 2 1 2] and [1 2 3 4] have 8 ids of 4 kinds; pairs 12 21 12, 12 23 34; triples 121 212, 123 234."""
    assert measure.distinct_n([[1, 2, 1, 2], [1, 2, 3, 4]], n) == pytest.approx(share)


@pytest.mark.lesson
def test_explained_variance_by_hand():
    """Returns 1, 2, 3, 6 have the mean 3 and the variance 3.5; errors 0, 1, 0, 1 the variance 0.25."""
    mask = T([[True, True, False], [True, True, False]])
    ret, value = T([[1.0, 2.0, 99.0], [3.0, 6.0, math.nan]]), T([[1.0, 1.0, -99.0], [3.0, 5.0, math.nan]])
    assert measure.explained_variance(value, ret, mask).item() == pytest.approx(1 - 0.25 / 3.5)
    assert measure.explained_variance(ret, ret, mask).item() == 1
    assert measure.explained_variance(torch.full_like(ret, 7.0), ret, mask).item() == pytest.approx(0)
    assert measure.explained_variance(-ret, ret, mask).item() == pytest.approx(1 - 4)


@pytest.mark.lesson
def test_variance_of_two_processes_is_that_of_all():
    """The other process holds 2, 3, 6: all_reduce adds its numbers."""
    others = iter([T([3.0, 11.0]), T(1.0 + 0.0 + 9.0)])
    found = measure.variance(T([1.0, 50.0]), T([True, False]), lambda mine: mine + next(others))
    assert found.item() == pytest.approx(3.5)
