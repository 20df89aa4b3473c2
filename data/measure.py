"""What tells how good answers are, and how well a run goes. Each formula with its paper.

    best-of-n             the reward that the best of n answers would have, and how far it is from the model's own
    win rate              how often a model's answers beat another one's, with an interval
    distinct-n            how little the answers repeat one another
    compare               all of these for a model and the SFT model: eval.json
    explained variance    how much of the returns a critic foresees
    WARNINGS              what the metrics of a run say of it

Letters: P prompts, N answers to each, B rows, R longest response.
"""

import math
from collections.abc import Callable
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor


# ---- best-of-n ------------------------------------------------------------------------------------------------------

def best_of_n(score: Tensor, value: Tensor, n: int) -> Tensor:
    """Expected value, (P,), of the answer with the best score among n. score and value are (P, N), N at least n.

    Nakano et al. 2021, "WebGPT" (2112.09332). Of all sets of n among the N drawn, the answer whose score is number i
    from below is the best in C(i - 1, n - 1) of C(N, n). The mean over all these sets is unbiased, with less variance
    than the best of one set. With value = score it is the expected best score itself."""
    N = score.shape[1]
    share = [math.comb(i - 1, n - 1) / math.comb(N, n) for i in range(1, N + 1)]
    order = score.argsort(dim=1, stable=True)                                   # (P, N)
    return value.gather(1, order).double() @ torch.tensor(share, dtype=torch.float64, device=value.device)  # (P,)


def best_of_kl(n: int) -> float:
    """KL of best-of-n to the model that draws the n answers, in nats an answer: log n - (n - 1) / n.

    Stiennon et al. 2020, "Learning to summarize" (2009.01325). Exact where no two scores are equal, else a bound
    above."""
    return math.log(n) - (n - 1) / n


# ---- against another model ------------------------------------------------------------------------------------------

def win_rate(score: Tensor, other: Tensor) -> float:
    """Share of prompts where score (P,) is above the other model's (P,); an equal one counts half."""
    return ((score > other).double() + (score == other).double() / 2).mean().item()


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The interval around a share of n independent trials, Wilson 1927; z = 1.96 makes it one of 95 %.

    Unlike share +- z deviations it stays within [0, 1], and is no single point at a share of 0 or 1."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return centre - half, centre + half


# ---- the answers themselves -----------------------------------------------------------------------------------------

def distinct_n(answers: list[list[int]], n: int) -> float:
    """Li et al. 2016 (1510.03055): different runs of n neighbouring ids, as a share of all; 1 if none comes twice.

    It falls with the number of answers, so only equally many can be compared."""
    runs = [tuple(ids[i:i + n]) for ids in answers for i in range(len(ids) - n + 1)]
    return len(set(runs)) / max(1, len(runs))


# ---- a model's answers, and another one's ---------------------------------------------------------------------------

class Answers(NamedTuple):
    """N answers of a model to each of P prompts."""
    asked: list[dict]               # P records
    said: list[list[str]]           # (P, N)
    first: list[list[int]]          # P, the ids of the first answer to each prompt
    figures: dict[str, Tensor]      # (P, N): proxy (the score), kl (k1), eos_rate, length, and in the demo gold


def means(answers: Answers) -> dict[str, float]:
    """Means over all answers; distinct-n is of the first answer to each prompt."""
    distinct = {f"distinct_{n}": distinct_n(answers.first, n) for n in (1, 2)}
    return {name: fmean(x.flatten().tolist()) for name, x in answers.figures.items()} | distinct


def compare(found: Answers, plain: Answers, best_of: list[int]) -> dict:
    """What eval.json holds. plain: the SFT model's answers.

    The win rate is that of the first answer to each prompt, so that trials are independent. The KL of best-of-n is that
    to the model measured."""
    wins, best = {}, [{"n": n, "kl": best_of_kl(n)} for n in best_of]
    for name in [name for name in ("proxy", "gold") if name in found.figures]:
        value, other = found.figures[name], plain.figures[name]                 # (P, N)
        wins[name] = win_rate(value[:, 0], other[:, 0])
        wins[f"{name}_low"], wins[f"{name}_high"] = wilson(wins[name], len(other))
        for row in best:
            row[name] = best_of_n(found.figures["proxy"], value, row["n"]).mean().item()
    return {"model": means(found), "sft": means(plain) | {"kl": 0.0}, "win_rate": wins, "best_of": best}


# ---- the critic -----------------------------------------------------------------------------------------------------

def variance(x: Tensor, mask: Tensor, all_reduce: Callable[[Tensor], Tensor] = lambda total: total) -> Tensor:
    """Variance over the True places of mask, any equal shapes; with all_reduce (a sum) over those of all processes."""
    x = x[mask]                                                                 # (number of True places,)
    n, total = all_reduce(torch.stack((mask.sum().to(x.dtype), x.sum())))
    return all_reduce((x - total / n).square().sum()) / n


def explained_variance(value: Tensor, ret: Tensor, mask: Tensor,
                       all_reduce: Callable[[Tensor], Tensor] = lambda total: total) -> Tensor:
    """1 - Var(ret - value) / Var(ret) over response tokens, all (B, R): the share of the returns that the critic knew.

    1 is a perfect critic. A critic that says one number has 0. Below 0 it is worse than that, and its advantages have
    more variance than the returns themselves ("explained_variance" of OpenAI Baselines)."""
    return 1 - variance(ret - value, mask, all_reduce) / variance(ret, mask, all_reduce)


# ---- a run ----------------------------------------------------------------------------------------------------------

LARGE_KL = 30   # nats an answer: so far from the SFT model is text that the reward model never saw

# When it is true of a row of ppo.py's metrics, and what is said then.
WARNINGS = (
    (lambda row: row["objective/kl"] < -1,
     "the KL to the SFT model is {objective/kl:.1f} nats an answer on average, where no KL is below 0: the answers "
     "were not drawn from the policy that scores them, compare --temperature and the template"),
    (lambda row: row["objective/kl"] > LARGE_KL,
     "the KL to the SFT model is {objective/kl:.1f} nats an answer: raise --kl_coef or lower --lr"),
    # Over answers of the old policy the ratio is 1 on average, whatever the new one is.
    (lambda row: abs(row["val/ratio"] - 1) > 0.1,
     "the ratio to the old policy is {val/ratio:.2f} on average, and not 1: lower --lr or --max_epochs"),
    (lambda row: row["eos_rate"] == 0,
     "all answers were cut before their end: raise --max_seq_len, or teach the SFT model to end its answers"),
    (lambda row: row["response_length"] < 1.5,
     "the answers have {response_length:.1f} tokens on average: look at them with --show_tokens; the reward may favour "
     "empty answers, or the prompt's end another template"),
    (lambda row: row["objective/scores_std"] < 1e-4,
     "all answers have the reward {objective/scores:.3f}, so that there is nothing to learn: look at the reward, or "
     "take prompts that are less hard or less easy"),
    # In the first updates the critic is still the reward model.
    (lambda row: row["step"] > 5 and row.get("val/explained_variance", 0) < 0,
     "the critic's explained variance is {val/explained_variance:.2f}, worse than one number for all: raise "
     "--critic_lr, or take --algorithm rloo, which has no critic"),
    (lambda row: row["policy/entropy_avg"] < 0.05,
     "the entropy is {policy/entropy_avg:.3f} nats a token, the policy hardly tries anything any more: raise --kl_coef "
     "or lower --lr"),
)
