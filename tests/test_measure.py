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


def test_a_model_is_compared_by_its_first_answers():
    """Proxies 2, 0, 1 against 1, 1, 1: a win, a loss, a tie. The best of two by proxy has the gold 0.2, 0.6, 0.5."""
    found = measure.Answers([], [], [[80], [82], [84]], {
        "proxy": T([[2.0, 3.0], [0.0, 9.0], [1.0, 0.0]]), "gold": T([[0.1, 0.2], [0.4, 0.6], [0.5, 0.9]]),
        "kl": torch.ones(3, 2), "eos_rate": torch.ones(3, 2, dtype=torch.bool)})
    plain = measure.Answers([], [], [[1], [1, 2], [1]], {
        "proxy": torch.ones(3, 1), "gold": T([[0.0], [0.0], [0.9]]), "kl": torch.full((3, 1), 5.0),
        "eos_rate": torch.ones(3, 1, dtype=torch.bool)})
    figures = measure.compare(found, plain, [1, 2])
    wins, (low, high), (gold_low, gold_high) = figures["win_rate"], *(measure.wilson(p, 3) for p in (1 / 2, 2 / 3))
    assert wins == pytest.approx({"proxy": 1 / 2, "proxy_low": low, "proxy_high": high, "gold": 2 / 3,
                                  "gold_low": gold_low, "gold_high": gold_high})
    assert figures["model"] == pytest.approx({"proxy": 15 / 6, "gold": 2.7 / 6, "kl": 1, "eos_rate": 1,
                                              "distinct_1": 1, "distinct_2": 0})
    assert figures["sft"] == pytest.approx({"proxy": 1, "gold": 0.3, "kl": 0, "eos_rate": 1,
                                            "distinct_1": 2 / 4, "distinct_2": 1})
    one, two = figures["best_of"]
    assert one == pytest.approx({"n": 1, "kl": 0, "proxy": 15 / 6, "gold": 2.7 / 6})
    assert two == pytest.approx({"n": 2, "kl": math.log(2) - 1 / 2, "proxy": 13 / 3, "gold": 1.3 / 3})


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
