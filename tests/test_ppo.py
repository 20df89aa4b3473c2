"""ppo.py: every formula against a hand-made table or a second way to compute it, then runs of tiny models."""

import argparse
import copy
import json
import math
import re
import shutil
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

import lora
import ppo
import quantize
import sft
import zero
from data import demo, measure, records, rules, run, text
from model import Llama, LlamaConfig
from ppo import Experience, Models
from rm import RewardModel
from sft import Stage

RULE = f"{Path(demo.__file__)}:reward"
WORLD = run.World(0, 1, torch.device("cpu"))
TEMPLATE = text.TEMPLATES["alpaca"]
SIZES = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=48, vocab_size=1280, max_seq_len=160)
T = torch.tensor


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def write(file: Path, found: list) -> Path:
    file.write_text(json.dumps(found), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with an SFT model, a reward model rm/, one that is an adapter on the SFT model, rm-lora/, prompts.json
    (8) and ptx.json (5)."""
    folder = tmp_path_factory.mktemp("base")
    Llama(LlamaConfig(**SIZES), generator=drawn(1)).save_pretrained(folder / "model")
    reward = RewardModel(Llama(LlamaConfig(**SIZES), head=False, generator=drawn(2)), drawn(2))
    reward.config.extra["reward_mean"] = 0.3
    reward.save_pretrained(folder / "rm")
    reward = RewardModel(quantize.open_model(folder / "model", head=False), drawn(2))
    lora.attach(reward, 2, generator=drawn(2))
    for layer in lora.adapters(reward).values():
        layer.lora_B.data.normal_(std=0.1, generator=drawn(3))
    lora.save_adapter(reward, folder / "rm-lora", folder / "model", {"reward_mean": 0.1})
    for name in ("model", "rm", "rm-lora"):
        text.Tokenizer(demo.FOLDER).save(folder / name, "alpaca")
    write(folder / "prompts.json", demo.prompt_records(0)[:8])
    write(folder / "ptx.json", demo.instruction_records(5, 5))
    return folder


def flags(base, out, *further) -> list[str]:
    given = [
        "--pretrain", base / "model", "--rm_path", base / "rm", "--prompt_dataset", base / "prompts.json",
        "--save_path", out, "--max_input_len", 48, "--max_seq_len", 64, "--num_episodes", 3, "--max_timesteps", 1,
        "--update_timesteps", 1, "--max_epochs", 2, "--experience_batch_size", 4, "--train_batch_size", 2, "--lr", 1e-3,
        "--critic_lr", 1e-3, "--eval_size", 4, "--target_kl", 0, "--log_interval", 1, *further]
    return [str(flag) for flag in given]    # of a flag given twice, the last counts


def main(base, out, *further) -> dict:
    return ppo.main(flags(base, out, *further))


def resolved(base, out, *further) -> argparse.Namespace:
    args = ppo.parse(flags(base, out, *further))
    run.resolve(args, ppo.FINETUNE | {"kl_coef": 0.1})  # whatever the preset's becomes
    return args


def stage_of(args: argparse.Namespace, world: run.World = WORLD, dtype: torch.dtype = torch.float32) -> Stage:
    return Stage(args, world, dtype, text.Tokenizer(demo.FOLDER), TEMPLATE, [2], False)


def opened(base, out, *further) -> tuple[argparse.Namespace, Models]:
    """The four models of a run, and its flags."""
    args = resolved(base, out, *further)
    args.template = "alpaca"
    return args, ppo.open_models(stage_of(args))


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]


def weights(folder: Path) -> dict:
    return safetensors.torch.load_file(next(folder.glob("*model.safetensors")))


def on_one_base(base: Path) -> tuple:
    """The flags of a run whose four models share their base."""
    return "--lora_rank", 2, "--rm_path", base / "rm-lora"


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


PROMPTS = [[1, 40, 41, 42, 43], [1, 50, 51], [1, 60], [1, 70, 71, 72]]
ANSWERS = [[80, 81, 82, 2], [90, 2], [100, 101, 102, 103, 104, 105], [2]]


def asked(prompts: list[list[int]]) -> list[ppo.Prompt]:
    return [ppo.Prompt(ids, {}) for ids in prompts]


def rolled(prompts: list[list[int]] = PROMPTS, answers: list[list[int]] = ANSWERS) -> Experience:
    """What rollout gives when these are the answers."""
    tokens, _ = text.pad([prompt + answer for prompt, answer in zip(prompts, answers)])
    _, mask = text.pad(answers)
    ended = T([answer[-1] == 2 for answer in answers])
    return Experience(tokens, T([len(prompt) for prompt in prompts]), mask, ended, ids=answers)


def split(e: Experience) -> list[tuple[list[int], list[int]]]:
    """The ids of prompt and answer of every row, from the tensors."""
    rows = zip(e.tokens.tolist(), e.prompt_len.tolist(), ppo.lengths(e).tolist())
    return [(row[:start], row[start:end]) for row, start, end in rows]


# ---- formulas -------------------------------------------------------------------------------------------------------

@pytest.mark.lesson
@pytest.mark.parametrize("odd", [100.0, -3.0, math.nan])
def test_gae_by_hand(odd):
    """What the critic says of padding, or a reward there, must not reach the advantages of real tokens."""
    adv, ret = ppo.gae(T([[0.0, 1.0, odd]]), T([[0.0, 0.0, odd]]), T([[True, True, False]]), 1.0, 0.95)
    assert adv.tolist()[0] == pytest.approx([0.95, 1, 0])
    assert ret.tolist()[0] == pytest.approx([0.95, 1, 0])


@pytest.mark.lesson
def test_gae_by_hand_with_discount():
    adv, ret = ppo.gae(T([[0.1, -0.2, 1.0]]), T([[0.5, 0.4, 0.3]]), T([[True] * 3]), 0.9, 0.5)
    # deltas: 0.1 + 0.36 - 0.5 = -0.04;  -0.2 + 0.27 - 0.4 = -0.33;  1 - 0.3 = 0.7
    assert adv.tolist()[0] == pytest.approx([-0.04 + 0.45 * (-0.33 + 0.45 * 0.7), -0.33 + 0.45 * 0.7, 0.7])
    assert ret.tolist()[0] == pytest.approx([0.45325, 0.385, 1.0])


@pytest.mark.lesson
@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 1.0), (0.97, 0.0)])
def test_gae_is_the_double_sum(gamma, lam):
    reward, value = torch.randn(2, 5, 9, generator=drawn(0), dtype=torch.float64)
    lengths = [9, 1, 4, 7, 2]
    adv, ret = ppo.gae(reward, value, torch.arange(9) < T(lengths)[:, None], gamma, lam)
    for b, n in enumerate(lengths):
        v = [*value[b, :n].tolist(), 0.0]
        delta = [reward[b, t].item() + gamma * v[t + 1] - v[t] for t in range(n)]
        expected = [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]
        assert adv[b].tolist() == pytest.approx(expected + [0.0] * (9 - n), abs=1e-12)
        assert ret[b, :n].tolist() == pytest.approx([a + x for a, x in zip(expected, v)], abs=1e-12)


@pytest.mark.lesson
def test_whitening_is_over_the_mask():
    """Variance by n, not n - 1; and the mean is taken off (torchtune's shift_mean adds it back)."""
    mask = torch.rand(6, 7, generator=drawn(1)) < 0.6
    x = 5 + 3 * torch.randn(6, 7, generator=drawn(2))
    y = ppo.whiten(torch.where(mask, x, math.nan), mask)
    assert abs(y[mask].mean()) < 1e-6 and y[mask].std(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert not y[~mask].any()
    assert torch.allclose(y[mask], (x[mask] - x[mask].mean()) / x[mask].std(correction=0), atol=1e-6)
    assert ppo.whiten(T([[4.0, 8.0]]), T([[True, True]])).tolist()[0] == pytest.approx([-1, 1])


@pytest.mark.lesson
@pytest.mark.parametrize("n", [0, 1])
def test_whitening_of_too_few_tokens_gives_zeros(n):
    x = torch.randn(6, 7, generator=drawn(2))
    assert not ppo.whiten(x, torch.arange(42).view(6, 7) < n).any()
    assert not ppo.whiten(torch.full((2, 2), 3.0), torch.ones(2, 2, dtype=torch.bool)).any()


@pytest.mark.lesson
def test_whitening_of_two_processes_is_that_of_all_rows(monkeypatch):
    mask = torch.rand(6, 7, generator=drawn(1)) < 0.6
    x = 5 + 3 * torch.randn(6, 7, generator=drawn(2))
    whole = ppo.whiten(x, mask)
    # Round by round the n-th sum of each half is learnt, until a half can be computed with all sums given.
    sums = []
    for _ in range(3):
        given, halves = [[], []], []
        for half in (0, 1):
            known = iter(sums)

            def all_reduce(v):
                given[half].append(v.clone())
                return next(known, v)
            monkeypatch.setattr(run, "all_reduce", all_reduce)
            halves.append(ppo.whiten(x[half::2], mask[half::2]))
        sums = [a + b for a, b in zip(*given)]
    assert torch.allclose(torch.stack(halves, 1).flatten(0, 1), whole, atol=1e-6)


@pytest.mark.lesson
def test_kl_estimators_are_unbiased():
    """Coati's k3 was built from pi / ref on samples of pi, which is another number."""
    logp, ref = torch.randn(2, 5, generator=drawn(3), dtype=torch.float64).log_softmax(-1)
    exact = F.kl_div(ref, logp, log_target=True, reduction="sum").item()    # KL(pi, ref)
    for estimator in (ppo.kl_k1, ppo.kl_k3):
        assert (logp.exp() * estimator(logp, ref)).sum().item() == pytest.approx(exact, abs=1e-12)
    assert (ppo.kl_k3(logp, ref) >= 0).all()
    assert abs((logp.exp() * ppo.kl_k3(ref, logp)).sum().item() - exact) > 0.05


@pytest.mark.lesson
def test_reward_is_put_on_the_last_token():
    """Not on the padding after EOS, where it would be masked away. An answer without EOS has it at its last token."""
    mask = rolled([[1]] * 2, [[40, 41, 2], [40, 41, 42, 43, 44]]).mask
    assert ppo.token_rewards(torch.zeros(2, 5), T([1.0, 2.0]), mask, 0.0).tolist() == [[0, 0, 1, 0, 0], [0, 0, 0, 0, 2]]
    kl = T([[0.5, -1.0, 2.0, 5.0, math.nan], [1.0, 1.0, 1.0, 1.0, 3.0]])    # 5 and NaN stand at masked places
    reward = ppo.token_rewards(kl, T([1.0, 2.0]), mask, 0.1)
    assert reward[0].tolist() == pytest.approx([-0.05, 0.1, 0.8, 0, 0])
    assert reward[1].tolist() == pytest.approx([-0.1] * 4 + [1.7])


@pytest.mark.lesson
@pytest.mark.parametrize("kl, kl_coef", [(6.6, 0.202), (5.4, 0.198), (60, 0.204), (-1, 0.196), (6, 0.2)])
def test_kl_coef_adapts_to_a_target(kl, kl_coef):
    """0.2 for a target of 6 nats; one update changes it by 2 % at most."""
    assert ppo.next_kl_coef(0.2, kl, 6.0) == pytest.approx(kl_coef)


def one(x: float) -> torch.Tensor:
    return T([[float(x)]])


@pytest.mark.lesson
@pytest.mark.parametrize("adv, ratio, loss, clipped", [
    (1, 1.5, -1.2, 1), (-1, 1.5, 1.5, 0), (1, 0.5, -0.5, 0), (-1, 0.5, 0.8, 1), (1, 1.1, -1.1, 0)])
def test_policy_loss_by_hand(adv, ratio, loss, clipped):
    value, clipfrac = ppo.policy_loss(one(math.log(ratio)), one(0), one(adv), T([[True]]), 0.2)
    assert (value.item(), clipfrac.item()) == pytest.approx((loss, clipped))


@pytest.mark.lesson
@pytest.mark.parametrize("value, loss", [(1, 0.845), (0.6, 0.98)])  # 0.5 * max(1, 1.3^2); 0.6 is within the clip
def test_value_loss_by_hand(value, loss):
    """With its factor of a half, once."""
    assert ppo.value_loss(one(value), one(0.5), one(2), T([[True]]), 0.2).item() == pytest.approx(loss)


@pytest.mark.lesson
def test_masked_mean():
    x = T([[1.0, 3.0, math.nan]])
    assert ppo.masked_mean(x, T([[True, True, False]])).item() == 2
    assert ppo.masked_mean(x, T([[False, False, False]])).item() == 0


@pytest.mark.lesson
def test_value_loss_is_the_worse_of_two_squares():
    mask = T([[True, True, False], [True, False, False]])
    value, old, ret = torch.randn(3, 2, 3, generator=drawn(4))
    squares = []
    for v, o, r in zip(value[mask].tolist(), old[mask].tolist(), ret[mask].tolist()):
        squares.append(max((v - r) ** 2, (o + min(max(v - o, -0.2), 0.2) - r) ** 2))
    assert ppo.value_loss(value, old, ret, mask, 0.2).item() == pytest.approx(sum(squares) / 3 / 2, rel=1e-5)


def gradients(logp, old_logp, adv, value, old_value, ret, mask) -> tuple:
    logp, value = logp.clone().requires_grad_(), value.clone().requires_grad_()
    loss = ppo.policy_loss(logp, old_logp, adv, mask, 0.2)[0] + ppo.value_loss(value, old_value, ret, mask, 0.2)
    loss.backward()
    return loss.item(), logp.grad, value.grad


@pytest.mark.lesson
@pytest.mark.parametrize("garbage", [1e4, 100.0, -math.inf, math.nan])
@pytest.mark.parametrize("where", range(6))
def test_masked_places_reach_neither_loss_nor_gradient(where, garbage):
    """0 * NaN is NaN: a mask after the exponential keeps NaN out of the loss, and lets it into the gradient."""
    mask = T([[True, True, False], [True, False, False]])
    given = [*torch.randn(6, 2, 3, generator=drawn(4))]
    loss, logp_grad, value_grad = gradients(*given, mask)
    assert logp_grad[mask].any() and value_grad[mask].all()
    given[where] = torch.where(mask, given[where], garbage)
    loss_too, logp_grad_too, value_grad_too = gradients(*given, mask)
    assert loss == loss_too and torch.equal(logp_grad, logp_grad_too) and torch.equal(value_grad, value_grad_too)
    assert not logp_grad[~mask].any() and not value_grad[~mask].any()


@pytest.mark.lesson
@pytest.mark.parametrize("adv, log_ratio, loss", [(1, 100, -1.2), (1, 1000, -1.2), (-1, -100, 0.8), (1, 0.3, -1.2)])
def test_a_clipped_token_has_no_gradient(adv, log_ratio, loss):
    """Even where e^100 overflows: backward of the exponential would multiply 0 by infinity."""
    logp = one(log_ratio).requires_grad_()
    found, _ = ppo.policy_loss(logp, one(0), one(adv), T([[True]]), 0.2)
    found.backward()
    assert found.item() == pytest.approx(loss) and logp.grad.item() == 0


@pytest.mark.lesson
def test_a_ratio_that_overflows_unclipped_is_not_hidden():
    """With advantage -1 nothing is clipped: the loss is infinite, so the run stops."""
    logp = one(100).requires_grad_()
    loss, _ = ppo.policy_loss(logp, one(0), one(-1), T([[True]]), 0.2)
    loss.backward()
    assert loss.item() == math.inf and logp.grad.item() == math.inf


# ---- the other algorithms -------------------------------------------------------------------------------------------

@pytest.mark.lesson
@pytest.mark.parametrize("estimate, expected", [
    # the groups are (1, 2, 6), of mean 3 and variance (4 + 1 + 9) / 3, and (0, 0, 3), of mean 1 and variance 2
    (ppo.leave_one_out, [[1 - 4, 2 - 3.5, 6 - 1.5], [-1.5, -1.5, 3]]),
    (ppo.group_centred, [[-2, -1, 3], [-1, -1, 2]]),
    (ppo.group_normalised, [[x / math.sqrt(14 / 3) for x in (-2, -1, 3)], [x / math.sqrt(2) for x in (-1, -1, 2)]])])
def test_group_advantages_by_hand(estimate, expected):
    found = estimate(T([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]]))
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float32), atol=1e-6)


@pytest.mark.lesson
@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_a_group_that_is_alike_teaches_nothing(base, tmp_path, algorithm):
    """Equal rewards differ by rounding: divided by their deviation, that would be an advantage as good as any."""
    args = resolved(base, tmp_path, "--algorithm", algorithm, "--group_size", 2)
    reward = T([[0.0, 0.7], [0.3, 0.4 + 1e-6], [1.0, 2.0], [4.0, 0.0]])     # rows of the answers to two prompts
    mask = T([[True, True], [True, True], [True, True], [True, False]])
    e = Experience(T([[1]]), T([1]), mask, T([True]), reward=reward)
    e = ppo.advantages(e, args)
    assert e.alike.tolist() == [True, True, False, False] and e.ret is None
    assert torch.allclose(e.adv, T([[0.0, 0.0], [0.0, 0.0], [-1.0, -1.0], [1.0, 0.0]]), atol=1e-6)


LOSSES = {
    # adv 1 and ratio 2 at two tokens, adv -1 and ratio 1.1 at one. clip 0.2, clip_high 0.5
    "ppo": -(1.5 + 1.5) / 3 + 1.1 / 3,
    "grpo": (-1.5 + 1.1) / 2,
    "gspo": (-1.5 + 1.1) / 2,
    "cispo": (-1.5 * (math.log(2) + math.log(2)) + 1.1 * math.log(1.1)) / 3,
}


@pytest.mark.lesson
@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_two_answers_by_hand(name):
    algorithm = ppo.ALGORITHMS[name]
    logp = T([[2.0, 2.0], [1.1, math.nan]]).log()
    mask, adv = T([[True, True], [True, False]]), T([[1.0, 1.0], [-1.0, math.nan]])
    loss, clipfrac = algorithm.loss(logp, torch.zeros(2, 2), adv, mask, 0.2, 0.5, ppo.MEANS[algorithm.unit])
    assert loss.item() == pytest.approx(LOSSES[name])
    assert clipfrac.item() == pytest.approx(2 / 3 if algorithm.unit == "tokens" else 1 / 2)


@pytest.mark.lesson
def test_gspo_has_the_geometric_mean_of_the_ratios():
    """And each token a share of its gradient: s adv / |y|, none where s is clipped."""
    logp = T([[2.0, 1.0, 0.25], [8.0, 1.0, 5.0]]).log().requires_grad_()
    mask, adv = T([[True] * 3, [True, True, False]]), T([[1.0] * 3, [3.0] * 3])
    loss, clipfrac = ppo.gspo_loss(logp, torch.zeros(2, 3), adv, mask, 0.3, 0.4, ppo.answer_mean)
    loss.backward()
    s = (2 * 1 * 0.25) ** (1 / 3)       # 0.794; the other, 8 ^ (1 / 2), is clipped
    assert loss.item() == pytest.approx(-(s + 3 * 1.4) / 2) and clipfrac.item() == 0.5
    assert torch.allclose(logp.grad, T([[-s / 3 / 2] * 3, [0.0] * 3]))


@pytest.mark.lesson
def test_cispo_still_teaches_a_clipped_token():
    """With the bound as its weight; PPO gives it no gradient, GSPO none to its whole answer."""
    logp = T([[2.0, 0.5, 1.1]]).log().requires_grad_()
    mask, adv = T([[True] * 3]), T([[1.0] * 3])
    ppo.cispo_loss(logp, torch.zeros(1, 3), adv, mask, 0.2, 0.5, ppo.masked_mean)[0].backward()
    assert torch.allclose(logp.grad, T([[-1.5, -0.8, -1.1]]) / 3)


@pytest.mark.lesson
@pytest.mark.parametrize("name", ["gspo", "cispo"])
@pytest.mark.parametrize("garbage", [1e4, -math.inf, math.nan])
@pytest.mark.parametrize("where", range(3))
def test_masked_places_reach_no_loss(name, where, garbage):
    mask, algorithm = T([[True, True, False], [True, False, False]]), ppo.ALGORITHMS[name]
    results, given = [], [*torch.randn(3, 2, 3, generator=drawn(4))]
    for filled in (given[where], torch.where(mask, given[where], garbage)):
        logp, old_logp, adv = (filled if i == where else x for i, x in enumerate(given))
        logp = logp.clone().requires_grad_()
        loss, _ = algorithm.loss(logp, old_logp, adv, mask, 1.0, 9.0, ppo.MEANS[algorithm.unit])
        loss.backward()
        results.append((loss.item(), logp.grad))
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])
    assert results[0][1][mask].any() and not results[0][1][~mask].any()


@pytest.mark.lesson
def test_answer_mean_counts_every_answer_the_same():
    x, mask = T([[1.0, 3.0, 5.0], [7.0, math.nan, math.nan]]), T([[True] * 3, [True, False, False]])
    assert ppo.answer_mean(x, mask).item() == (3 + 7) / 2 and ppo.masked_mean(x, mask).item() == 16 / 4


@pytest.mark.lesson
def test_whose_gradient_each_kl_is():
    """By enumeration of a vocabulary of 5. k1 as a reward: that of KL(pi, ref). k3 in the loss: that of KL(ref, pi)."""
    theta, ref = torch.randn(2, 5, generator=drawn(3), dtype=torch.float64)
    theta, ref = theta.requires_grad_(), ref.log_softmax(-1)

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, theta)[0]
    logp = theta.log_softmax(-1)
    pi = logp.detach().exp()                    # the policy that samples has no gradient
    k1_rewarded = gradient((pi * ppo.kl_k1(logp, ref).detach() * logp).sum())       # REINFORCE's: reward times log pi
    k3_in_loss = gradient((pi * ppo.kl_k3(logp := theta.log_softmax(-1), ref)).sum())
    reverse = gradient(F.kl_div(ref, theta.log_softmax(-1), log_target=True, reduction="sum"))
    forward = gradient(F.kl_div(theta.log_softmax(-1), ref, log_target=True, reduction="sum"))
    assert torch.allclose(k1_rewarded, reverse) and torch.allclose(k3_in_loss, forward)
    assert (reverse - forward).abs().max() > 0.05


# ---- places in a row ------------------------------------------------------------------------------------------------

@pytest.mark.lesson
def test_value_is_that_of_the_state_before_the_token():
    """A critic that says its position: prompt of 5, answer of 4 -> 4 5 6 7, and no value of the prompt but its last."""
    critic = SimpleNamespace(values=lambda tokens, at: torch.arange(tokens.shape[1]).expand(tokens.shape).float()[at])
    expected = [[4, 5, 6, 7, 0, 0], [2, 3, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6], [3, 0, 0, 0, 0, 0]]
    assert ppo.critic_values(critic, rolled()).tolist() == expected
    assert ppo.reward_scores(critic, rolled()).tolist() == [8, 4, 7, 4]     # the last token itself: EOS is read


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_distribution_sampled_from(temperature):
    """Logits divided by the temperature, answers alone, EOS with them. No other state reaches the head."""
    model, e = Llama(LlamaConfig(**SIZES), generator=drawn(1)).eval(), rolled()
    kept = []
    model.norm.register_forward_hook(lambda module, x, y: kept.append(y) or y.retain_grad())
    logp = ppo.logprobs(model, e, temperature)
    for b, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS)):
        log_softmax = (model(T([prompt + answer]))[0] / temperature).log_softmax(-1)
        expected = [log_softmax[len(prompt) - 1 + t, token].item() for t, token in enumerate(answer)]
        assert logp[b].tolist() == pytest.approx(expected + [0.0] * (6 - len(answer)), abs=1e-5)
    (logp * torch.rand(logp.shape, generator=drawn(5))).sum().backward()
    rows = zip(model.hidden(e.tokens), PROMPTS, ANSWERS)
    predicting = torch.cat([row[len(prompt) - 1:len(prompt) - 1 + len(answer)] for row, prompt, answer in rows])
    assert torch.allclose(kept[0], predicting, atol=1e-5) and kept[0].grad.any(-1).all()


def test_selected_rows_lose_only_padding():
    e = rolled()
    some = ppo.select(e, T([3, 1]))
    assert some.tokens.tolist() == [[1, 70, 71, 72, 2], [1, 50, 51, 90, 2]] and some.prompt_len.tolist() == [4, 3]
    assert torch.equal(some.mask, e.mask[[3, 1]]) and some.ended.tolist() == [True, True] and some.logp is None
    assert split(some) == [([1, 70, 71, 72], [2]), ([1, 50, 51], [90, 2])]


def test_scoring_does_what_the_five_steps_say(base, tmp_path):
    """Per-token KL and final score of a batch, written down anew. An answer that never ended keeps its tokens."""
    args, models = opened(base, tmp_path, "--eos_penalty", 0.7, "--kl_coef", 0.2, "--temperature", 0.8,
                          "--train_batch_size", 3)
    with torch.no_grad():
        for p in models.actor.parameters():
            p += 0.01 * torch.randn(p.shape, generator=drawn(6))
    answers = rolled()
    e = ppo.advantages(ppo.scoring(models, answers, args), args)
    assert torch.equal(e.tokens, answers.tokens) and e.ended.tolist() == [True, True, False, True]
    loaded, reference = RewardModel.from_pretrained(base / "rm"), Llama.from_pretrained(base / "model")
    with torch.no_grad():
        for b, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS)):
            row, n = T([prompt + answer]), len(answer)
            places = range(len(prompt) - 1, len(prompt) - 1 + n)
            logp, ref = ((model(row)[0] / 0.8).log_softmax(-1)[places, answer] for model in (models.actor, reference))
            score = loaded(row, torch.ones_like(row, dtype=torch.bool)).item() - (0.0 if answer[-1] == 2 else 0.7)
            reward = [-0.2 * x for x in (logp - ref).tolist()]
            reward[-1] += score
            assert e.score[b].item() == pytest.approx(score, abs=1e-5)
            assert e.reward[b].tolist() == pytest.approx(reward + [0.0] * (6 - n), abs=1e-5)
    assert (e.logp - e.ref_logp).abs().max() > 1e-3
    assert torch.equal(e.ret, e.adv + torch.where(e.mask, e.value, 0.0))
    assert torch.equal(e.adv, ppo.gae(e.reward, e.value, e.mask, 1.0, 0.95)[0])
    figures = ppo.objective(e, stage_of(args))
    kl = (e.logp - e.ref_logp).sum().item() / 4     # a sum over tokens, a mean over answers
    assert figures["objective/kl"] == pytest.approx(kl, rel=1e-5)
    assert figures["objective/scores"] == pytest.approx(e.score.mean().item())
    assert (figures["eos_rate"], figures["response_length"], figures["distinct_answers"]) == (0.75, 13 / 4, 1)


def test_parts_of_a_batch_are_scored_as_the_whole(base, tmp_path):
    args, models = opened(base, tmp_path)
    whole, parts = (ppo.scoring(models, rolled(), argparse.Namespace(**vars(args) | {"train_batch_size": size}))
                    for size in (4, 1))
    assert whole.adv is whole.ret is None       # step 4 is for whole groups
    for name in ("tokens", "mask", "ended", "logp", "ref_logp", "value", "score", "reward"):
        a, b = getattr(whole, name), getattr(parts, name)
        assert a.shape == b.shape and torch.allclose(a.float(), b.float(), atol=1e-5), name


def test_rows_of_similar_length_share_a_part():
    """Rows of 9, 5, 7 and 5 tokens; the two of 5 keep their order."""
    assert [part.tolist() for part in ppo.by_length(rolled(), torch.arange(4), 2)] == [[1, 3], [2, 0]]
    assert [part.tolist() for part in ppo.by_length(rolled(), T([2, 3, 0]), 2)] == [[3, 2], [0]]


# ---- the update -----------------------------------------------------------------------------------------------------

def fixed(args: argparse.Namespace, models: Models) -> Experience:
    """Four scored answers, with advantages far from equal."""
    e = ppo.advantages(ppo.scoring(models, rolled(), args), args)
    adv, ret = (torch.randn(e.adv.shape, generator=drawn(seed)) * e.mask for seed in (7, 8))
    return e._replace(adv=adv, ret=ret)


def stream(examples: list, args: argparse.Namespace, world: run.World = WORLD) -> Iterator[list]:
    size = args.ptx_batch_size * world.world
    return ppo.batches(examples, [len(ids) for ids, _ in examples], size, 0, 0)


def update(models: Models, e: Experience, examples: list, args: argparse.Namespace, world: run.World = WORLD,
           schedule: float = 0.0) -> tuple[dict, dict]:
    """One update -> what it logs, and the gradient of its last minibatch by model and name. eps 1e-3, because Adam's
    usual one blows rounding errors of a gradient near 0 up to whole steps."""
    optimizers = {name: zero.ZeRO2(model.named_parameters(), torch.float32, eps=1e-3, max_norm=0.0)
                  for name, model in zip(("actor", "critic"), ppo.trained(models))}
    if not examples:
        args.ptx_coef = 0.0     # as read_ptx does
    found = {"actor": {}, "critic": {}}
    for name, optimizer in optimizers.items():
        keep_gradients(optimizer, found[name])
    figures = ppo.update(models, optimizers, e, stream(examples, args, world), schedule, 1, stage_of(args, world))
    return figures, found


def keep_gradients(optimizer: zero.ZeRO2, kept: dict) -> None:
    """Copies the summed gradient, by parameter name, before a step frees it."""
    step = optimizer.step

    def look(lr):
        for bucket in optimizer.buckets:
            kept.update({name: bucket.grad[place].clone() for name, _, place, _ in zero.pieces(bucket)})
        return step(lr)
    optimizer.step = look


def encoded(base) -> list:
    tokenizer = text.Tokenizer(demo.FOLDER)
    found = records.read_records([base / "ptx.json"], "sft")
    return [text.encode_example(record, tokenizer, TEMPLATE, 64).examples[0] for record in found]


def close(a: dict, b: dict, tolerance: float = 1e-5) -> bool:
    return all((a[name] - b[name]).abs().max() < tolerance * (1e-2 + b[name].abs().max()) for name in a)


def test_gradient_is_the_stated_mixture(base, tmp_path):
    """(1 - c) g_ppo + c g_lm. Coati's ptx took ids, labels and mask from three different batches."""
    examples, found = encoded(base), {}
    for c in (0.0, 0.3, 1.0):
        args, models = opened(base, tmp_path, "--ptx_coef", c, "--max_epochs", 1, "--train_batch_size", 4,
                              "--ptx_batch_size", 4)
        e = fixed(args, models)
        figures, gradient = update(models, e, examples if c else [], args)
        found[c] = gradient["actor"]
    model = Llama.from_pretrained(base / "model")
    tokens, _, target = text.collate(next(stream(examples, args)))
    loss = sft.lm_loss(model, tokens, target) / target.sum()
    loss.backward()
    assert figures["loss/ptx_avg"] == pytest.approx(loss.item(), rel=1e-6)
    g_lm = {name: p.grad.flatten() for name, p in model.named_parameters()}
    model.zero_grad()
    ratio = (ppo.logprobs(model, e) - e.logp).exp()     # 1: nothing is clipped
    (-ratio * ppo.whiten(e.adv, e.mask)).sum().div(e.mask.sum()).backward()
    g_ppo = {name: p.grad.flatten() for name, p in model.named_parameters()}
    for c, g in found.items():
        for name in g_lm:
            mixture = (1 - c) * g_ppo[name] + c * g_lm[name]
            assert (g[name] - mixture).abs().max() < 1e-6 * (1 + g[name].abs().max()), (name, c)
    critic = RewardModel.from_pretrained(base / "rm")
    (0.5 * ((ppo.critic_values(critic, e) - e.ret) ** 2)[e.mask].mean()).backward()
    for name, p in critic.named_parameters():
        assert (gradient["critic"][name] - p.grad.flatten()).abs().max() < 1e-6 * (1 + p.grad.abs().max())
    assert figures["val/ratio"] == pytest.approx(1, abs=1e-6) and figures["policy/clipfrac_avg"] == 0


def test_figures_have_the_names_of_what_they_are(base, tmp_path):
    """At a policy that has moved, so that all differ. Figures kept by place were easily logged under another's name."""
    args, models = opened(base, tmp_path, "--max_epochs", 1, "--train_batch_size", 2, "--accumulation_steps", 2,
                          "--clip", 0.1)
    e = fixed(args, models)
    moved = e._replace(logp=e.logp + 0.3 * torch.randn(e.logp.shape, generator=drawn(10)) * e.mask)
    optimizers = {name: zero.ZeRO2(getattr(models, name).named_parameters()) for name in ("actor", "critic")}
    args.ptx_coef = 0.0
    figures = ppo.update(models, optimizers, moved, iter([]), 0.0, 2, stage_of(args))
    adv, change = ppo.whiten(e.adv, e.mask), e.logp - moved.logp
    policy, clipfrac = ppo.policy_loss(e.logp, moved.logp, adv, e.mask, 0.1)
    expected = {
        "loss/policy_avg": policy.item(), "policy/clipfrac_avg": clipfrac.item(), "loss/ptx_avg": 0.0,
        "loss/value_avg": ppo.value_loss(e.value, e.value, e.ret, e.mask, args.value_clip).item(),
        "policy/approxkl_avg": (change.exp() - 1 - change)[e.mask].mean().item(),
        "val/ratio": change.exp()[e.mask].mean().item(), "policy/entropy_avg": -e.logp[e.mask].mean().item(),
        "early_stop": 0, "minibatches": 1, "lr": 0.0}
    assert figures == pytest.approx(expected, rel=1e-4, abs=1e-6) and 0 < clipfrac < 1


def test_micro_batches_change_nothing(base, tmp_path):
    """A mean of the means of 2 x 2 rows would weigh the tokens of short answers more."""
    results = []
    for size, accumulation in ((4, 1), (2, 2), (1, 4)):
        args, models = opened(base, tmp_path, "--max_epochs", 1, "--train_batch_size", size,
                              "--accumulation_steps", accumulation, "--vf_coef", 0.5)
        results.append(update(models, fixed(args, models), [], args))
    (expected, expected_gradients), *others = results
    for figures, found in others:
        assert figures == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert all(close(found[name], expected_gradients[name]) for name in ("actor", "critic"))


EVERYTHING_OFF = {
    "ppo": ("--no_whiten", "--lam", 1),
    "rloo": (),
    "grpo": ("--no_std", "--no_length"),
    "gspo": ("--no_std",),
    "cispo": ("--no_std",),
}


def sampled(name: str, base, tmp_path, *more) -> tuple[argparse.Namespace, Models, Experience]:
    """Two groups of two scored answers, of 4, 2, 6 and 1 tokens."""
    size = 1 if name == "ppo" else 2
    args, models = opened(base, tmp_path, "--algorithm", name, "--group_size", size, "--max_epochs", 1, *more)
    return args, models, ppo.advantages(ppo.scoring(models, rolled(), args), args)


@pytest.mark.lesson
@pytest.mark.parametrize("name", ppo.ALGORITHMS)
def test_with_everything_off_the_update_is_reinforce(base, tmp_path, name):
    """-mean of (return - baseline) grad log pi. The baseline: the value, the other's reward, the group's mean."""
    args, models, e = sampled(name, base, tmp_path, "--kl_coef", 0, "--train_batch_size", 4, *EVERYTHING_OFF[name])
    _, found = update(models, e, [], args)
    model = Llama.from_pretrained(base / "model")
    logp, score = ppo.logprobs(model, e), e.score
    others = score[[1, 0, 3, 2]]
    baseline = {"ppo": e.value, "rloo": others[:, None]}.get(name, ((score + others) / 2)[:, None])
    surrogate = (score[:, None] - baseline) * logp * e.mask     # the reward comes at the end: each token's return is it
    lengths = e.mask.sum(1)
    expected = (surrogate.sum(1) / lengths).mean() if name == "gspo" else surrogate.sum() / lengths.sum()
    (-expected).backward()
    for parameter, p in model.named_parameters():
        difference = (found["actor"][parameter] - p.grad.flatten()).abs().max()
        assert difference < 1e-6 * (1 + p.grad.abs().max()) and p.grad.any(), parameter


@pytest.mark.lesson
def test_grpos_loss_is_that_of_the_paper(base, tmp_path):
    """Mean over answers of the mean over tokens of min(rho adv, clip(rho) adv) - beta k3; the policy has moved."""
    args, models, e = sampled("grpo", base, tmp_path, "--kl_coef", 0.3, "--train_batch_size", 4, "--clip_high", 0.5)
    noise = 0.3 * torch.randn(2, *e.mask.shape, generator=drawn(10)) * e.mask
    e = e._replace(logp=e.logp + noise[0], ref_logp=e.ref_logp + noise[1])
    optimizer, found = zero.ZeRO2(models.actor.named_parameters(), torch.float32, max_norm=0.0), {}
    keep_gradients(optimizer, found)
    args.ptx_coef = 0.0
    figures = ppo.update(models, {"actor": optimizer}, e, iter([]), 0.0, 2, stage_of(args))
    model = Llama.from_pretrained(base / "model")
    terms, kls = [], []
    for logp, old, ref, adv, mask in zip(ppo.logprobs(model, e), e.logp, e.ref_logp, e.adv, e.mask):
        ratio = (logp - old)[mask].exp()
        terms.append(torch.minimum(ratio * adv[mask], ratio.clamp(0.8, 1.5) * adv[mask]).mean())
        log_ratio = (ref - logp)[mask]
        kls.append((log_ratio.exp() - log_ratio - 1).mean())
    policy, kl = -sum(terms) / 4, sum(kls) / 4
    (policy + 0.3 * kl).backward()
    assert figures["loss/policy_avg"] == pytest.approx(policy.item(), rel=1e-4)
    assert figures["loss/kl_avg"] == pytest.approx(kl.item(), rel=1e-4) and 0 < figures["policy/clipfrac_avg"] < 1
    for name, p in model.named_parameters():
        assert (found[name] - p.grad.flatten()).abs().max() < 1e-6 * (1 + p.grad.abs().max()), name


@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_micro_batches_change_no_mean_over_answers(base, tmp_path, name):
    results = []
    for size, accumulation in ((4, 1), (2, 2), (1, 4)):
        args, models, e = sampled(name, base, tmp_path, "--train_batch_size", size,
                                  "--accumulation_steps", accumulation)
        results.append(update(models, e, [], args))
    (expected, expected_gradients), *others = results
    for figures, found in others:
        assert figures == pytest.approx(expected, rel=1e-5, abs=1e-6) and figures["minibatches"] == 1
        assert close(found["actor"], expected_gradients["actor"])


def test_answers_to_a_prompt_are_drawn_together(base, tmp_path):
    """Rows that follow one another, and no two alike; the prompts are shared as without groups."""
    args, models = opened(base, tmp_path, "--experience_batch_size", 4)
    for rank in (0, 1):
        stage = stage_of(args, run.World(rank, 2, WORLD.device))
        e = ppo.rollout(models.actor, asked(PROMPTS), ("rollout", 0, 1), stage, 3)
        prompts, answers = zip(*split(e))
        assert list(prompts) == [prompt for prompt in PROMPTS[rank::2] for _ in range(3)] and [*answers] == e.ids
        assert len(set(map(str, answers))) == 6


def test_ratio_that_is_not_one_stops_the_run(base, tmp_path, capsys):
    """Old and new log-probabilities from two code paths. fp32 stops, bf16 warns."""
    args, models = opened(base, tmp_path)
    e = fixed(args, models)
    with pytest.raises(FloatingPointError, match="the ratio is not 1 before the first update: .* differ by 1.00e-03"):
        update(models, e._replace(logp=e.logp - 1e-3 * e.mask), [], args)
    ppo.check_ratio(T([0.0, 9e-5]), stage_of(args))
    ppo.check_ratio(T([0.0, 0.08]), stage_of(args, dtype=torch.bfloat16))
    assert capsys.readouterr().out == ""
    ppo.check_ratio(T([0.02, 0.10]), stage_of(args, dtype=torch.bfloat16))
    assert "log-probabilities differ by 0.060 on average" in capsys.readouterr().out


@pytest.mark.lesson
@pytest.mark.parametrize("size", [3, 8])    # 8: more than there are, the file is cycled
@pytest.mark.parametrize("lengths", [[5, 9, 2, 7, 3], [0] * 5])
def test_every_record_is_seen_once_an_epoch(size, lengths):
    """The position of a stream is all that a resumed run knows: it must be that of the unbroken one."""
    items = list("abcde")
    endless = ppo.batches(items, lengths, size, 0, 0)
    first = [next(endless) for _ in range(10)]
    flat = sum(first, [])
    assert {len(batch) for batch in first} == {size}
    assert all(sorted(flat[i:i + 5]) == items for i in range(0, 30, 5))
    assert all(next(ppo.batches(items, lengths, size, 0, k * size)) == first[k] for k in range(10))


@pytest.mark.lesson
def test_each_epoch_and_each_seed_has_its_own_order():
    """As long as all items are of one length; else an epoch is first put in order of length."""
    items = list(range(7))
    streams = [ppo.batches(items, [0] * 7, 14, seed, 0) for seed in (0, 1)]
    first, second = next(streams[0]), next(streams[1])
    assert sorted(first[:7]) == sorted(first[7:]) == items and first[:7] != first[7:] and first != second


def test_no_two_rollouts_are_alike(base, tmp_path):
    """ColossalAI called torch.manual_seed(41) before each rollout: the same noise at every step and on every rank."""
    args, models = opened(base, tmp_path)

    def sample(purpose: tuple, rank: int) -> list:
        stage = stage_of(args, run.World(rank, 2, WORLD.device))
        return ppo.rollout(models.actor, asked([[1, 40, 41]] * 4), purpose, stage).tokens.tolist()
    purposes = [("rollout", 0, 1), ("rollout", 0, 2), ("rollout", 1, 1), ("evaluate", 0)]
    answers = {(purpose, rank): sample(purpose, rank) for purpose in purposes for rank in (0, 1)}
    assert len({str(answer) for answer in answers.values()}) == 8
    assert sample(("rollout", 0, 2), 1) == answers[("rollout", 0, 2), 1]


@pytest.mark.parametrize("prompts, world, rows", [(1, 2, [1, 1]), (5, 2, [3, 2]), (4, 2, [2, 2]), (2, 3, [1, 1, 1])])
def test_processes_share_the_prompts(base, tmp_path, prompts, world, rows):
    """With fewer prompts than processes, the first prompt is answered again: no process is without a row."""
    args, models = opened(base, tmp_path, "--experience_batch_size", 2)
    ids = [[1, 40 + i] for i in range(prompts)]
    stages = [stage_of(args, run.World(rank, world, WORLD.device)) for rank in range(world)]
    parts = [ppo.rollout(models.actor, asked(ids), ("evaluate", 0), stage) for stage in stages]
    assert [len(part.tokens) for part in parts] == rows
    assert {tuple(prompt) for part in parts for prompt, _ in split(part)} == set(map(tuple, ids))


def test_an_answer_ends_at_every_id_that_the_model_stops_at(base, tmp_path):
    """An end of turn is an end, though it is not the tokenizer's EOS: no --eos_penalty."""
    args, models = opened(base, tmp_path)
    models.actor.stop_at(range(3, 1280))
    e = ppo.rollout(models.actor, asked([[1, 40, 41]] * 4), ("evaluate", 0), stage_of(args))
    assert e.mask.shape == (4, 1) and e.ended.all()
    models.actor.config.eos_id = None
    e = ppo.rollout(models.actor, asked([[1, 40, 41]] * 4), ("evaluate", 0), stage_of(args))
    assert not e.ended.any() and e.mask.all()


def test_the_cache_is_packed_in_rollouts_only(base, tmp_path, monkeypatch):
    """Packed weights are for generation. Training and scoring run on the plain ones, so that the ratio is 1."""
    inside, real = [], quantize.packed

    class Packed:
        def __init__(self, model):
            self.context = real(model)

        def __enter__(self):
            inside.append(True)
            return self.context.__enter__()

        def __exit__(self, *error):
            inside.pop()
            return self.context.__exit__(*error)
    monkeypatch.setattr(quantize, "packed", Packed)
    generated, scored, real_generate, real_logprobs = [], [], Llama.generate, ppo.logprobs

    def generate(*rest, **more):
        generated.append(bool(inside))
        return real_generate(*rest, **more)

    def logprobs(*rest):
        scored.append(bool(inside))
        return real_logprobs(*rest)
    monkeypatch.setattr(Llama, "generate", generate)
    monkeypatch.setattr(ppo, "logprobs", logprobs)
    main(base, tmp_path, "--num_episodes", 1)
    assert len(generated) == 3 and all(generated)       # before, in the one rollout, and after
    assert len(scored) > 6 and not any(scored) and not inside


# ---- runs -----------------------------------------------------------------------------------------------------------

def spied(monkeypatch) -> list:
    """The models of each run, copies of their state at the start, and the differences that check_ratio was given."""
    found, real, check = [], ppo.open_models, ppo.check_ratio

    def open_models(*rest):
        models = real(*rest)
        before = [{name: p.detach().clone() for name, p in model.named_parameters()}
                  for model in ppo.modules(models)]
        found.append(SimpleNamespace(models=models, before=before, ratios=[]))
        return models

    def check_ratio(change, stage):
        found[-1].ratios.append(change.max().item() if stage.dtype == torch.float32 else change.mean().item())
        check(change, stage)
    monkeypatch.setattr(ppo, "open_models", open_models)
    monkeypatch.setattr(ppo, "check_ratio", check_ratio)
    return found


NAMES = {
    "step", "loss", "lr", "seconds", "tokens_per_second", "skipped", "seconds/rollout", "seconds/scoring",
    "seconds/update", "objective/kl", "objective/kl_k3", "objective/entropy", "objective/scores",
    "objective/rlhf_reward", "policy/approxkl_avg", "policy/clipfrac_avg", "policy/entropy_avg", "val/ratio",
    "loss/policy_avg", "loss/value_avg", "loss/ptx_avg", "early_stop", "minibatches", "eos_rate", "response_length",
    "distinct_answers", "objective/scores_std", "objective/kl_coef", "val/explained_variance"}
CRITICS = {"loss/value_avg", "val/explained_variance"}
PTX = ("--ptx_coef", 0.3, "--ptx_batch_size", 2)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_changes_actor_and_critic_alone(base, tmp_path, monkeypatch, dtype):
    found = spied(monkeypatch)
    summary = main(base, tmp_path, "--pretrain_dataset", base / "ptx.json", *PTX, "--dtype", dtype)
    models, before = found[0].models, found[0].before
    for model, old, changes in zip(models, before, (True, True, False, False)):
        now = dict(model.named_parameters())
        kept = [name for name in now if torch.equal(now[name], old[name])]
        assert all("norm" in name for name in kept) if changes else len(kept) == len(now)
        assert not model.training and all(p.requires_grad == changes for p in now.values())
    frozen = models.ref.norm.weight.dtype
    assert frozen == (torch.float32 if dtype == "fp32" else torch.bfloat16)
    for trained, copied in ((0, 2), (1, 3)):
        assert same({name: p.to(frozen) for name, p in before[trained].items()}, before[copied])
    assert models.critic.reward_mean == models.reward.reward_mean == 0.3
    assert same(dict(RewardModel.from_pretrained(base / "rm").named_parameters()), before[1])
    assert found[0].ratios[0] < (1e-5 if dtype == "fp32" else 1e-2)
    table = metrics(tmp_path)
    assert [row["step"] for row in table] == [1, 2, 3] == list(range(1, summary["steps"] + 1))
    assert all(NAMES == row.keys() for row in table)
    parts = [[row[f"seconds/{part}"] for part in ("rollout", "scoring", "update")] for row in table]
    assert all(min(took) > 0 and sum(took) < row["seconds"] + 1e-3 for took, row in zip(parts, table))
    assert table[0]["objective/kl"] == 0 and abs(table[-1]["objective/kl"]) > 0
    assert table[0]["loss/ptx_avg"] > 1 and table[0]["policy/approxkl_avg"] > 0
    actor, far = Llama.from_pretrained(tmp_path), 1e-9 if dtype == "fp32" else 1e-2
    assert all((p - q).abs().max() < far for p, q in zip(actor.parameters(), models.actor.parameters()))
    saved = json.loads((tmp_path / "summary.json").read_text("utf-8"))
    assert {"reward_before", "reward_after", "kl", "seconds", "tokens_per_second", "skipped", "peak_memory_bytes",
            "planned_memory_bytes"} <= saved.keys() and saved["flags"]["kl_coef"] == 0.1
    assert text.Tokenizer(tmp_path).fingerprint == text.Tokenizer(demo.FOLDER).fingerprint
    assert json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))["template"] == "alpaca"


@pytest.mark.parametrize("more", [(), ("--lora_rank", 2)], ids=["full", "lora"])
@pytest.mark.parametrize("name", [name for name in ppo.ALGORITHMS if name != "ppo"])
def test_a_run_without_a_critic(base, tmp_path, monkeypatch, capsys, name, more):
    """There is none in memory, its loss is not logged, and the reward model learns nothing."""
    found = spied(monkeypatch)
    summary = main(base, tmp_path, "--algorithm", name, "--group_size", 2, *more)
    models, before = found[0].models, found[0].before
    assert models.critic is None and not any(p.requires_grad for p in models.reward.parameters())
    assert found[0].ratios[0] < 1e-5 and (models.ref is models.actor) == bool(more)
    now = dict(models.actor.named_parameters())
    moved = [name for name in now if not torch.equal(now[name], before[0][name])]
    assert moved and all(now[name].requires_grad for name in moved)
    assert same(dict(models.reward.named_parameters()), before[-1])
    reward = RewardModel.from_pretrained(base / "rm")
    assert torch.equal(models.reward.score.weight, reward.score.weight) and models.reward.reward_mean == 0.3
    kl = {"loss/kl_avg"} if name != "rloo" else set()
    table = metrics(tmp_path)
    assert all(row.keys() == NAMES - CRITICS | {"alike_groups"} | kl for row in table) and len(table) == 3
    assert 0 < abs(table[-1]["objective/kl"]) and "| alike groups 0.000 |" in capsys.readouterr().out
    if name != "rloo":      # the KL is not in the reward
        assert all(row["objective/rlhf_reward"] == pytest.approx(row["objective/scores"]) for row in table)
    assert summary["reward_before"] != summary["reward_after"]


@pytest.mark.parametrize("rank", [0, 2])
def test_critic_starts_as_the_reward_model(base, tmp_path, rank):
    """Its value at the last token is the score, reward mean included."""
    _, models = opened(base, tmp_path, "--lora_rank", rank)
    e = rolled()
    at_end = models.critic.values(e.tokens)[range(4), e.prompt_len + e.mask.sum(1) - 1]
    scores = RewardModel.from_pretrained(base / "rm")(*text.pad([p + a for p, a in zip(PROMPTS, ANSWERS)]))
    assert torch.equal(at_end, ppo.reward_scores(models.reward, e))
    assert torch.allclose(at_end, scores, atol=1e-6) and scores.abs().min() > 1e-3


def test_adapter_off_is_the_reference(base, tmp_path, monkeypatch):
    """Were reference and policy the same LoRA model, the KL would always be 0. Dropout would move the ratio."""
    found, answers = spied(monkeypatch), rolled()
    with torch.no_grad():
        expected = ppo.logprobs(Llama.from_pretrained(base / "model"), answers)
        score = ppo.reward_scores(RewardModel.from_pretrained(base / "rm"), answers)
    files = {file: file.read_bytes() for file in base.rglob("*") if file.is_file()}
    main(base, tmp_path, "--lora_rank", 4, "--lora_dropout", 0.2)
    models, before = found[0].models, found[0].before
    assert models.ref is models.actor and found[0].ratios[0] < 1e-5
    trunks = [{p.data_ptr() for name, p in model.trunk.named_parameters() if "lora_" not in name}
              for model in (models.critic, models.reward)]
    assert trunks[0] == trunks[1]
    for model, old in zip(models[:2], before):
        for name, p in model.named_parameters():
            trains = "lora_" in name or name == "score.weight"
            assert p.requires_grad == trains and torch.equal(p, old[name]) != trains, name
    assert torch.equal(models.reward.score.weight, before[3]["score.weight"])
    args = resolved(base, tmp_path, "--train_batch_size", 4, "--eos_penalty", 0)
    e = ppo.advantages(ppo.scoring(models, answers, args), args)
    assert torch.equal(e.ref_logp, expected) and torch.equal(e.score, score)
    assert (e.logp - expected).abs().max() > 1e-4
    table = metrics(tmp_path)
    assert table[0]["objective/kl"] == table[0]["objective/kl_k3"] == 0 < table[-1]["objective/kl_k3"]
    assert files == {file: file.read_bytes() for file in base.rglob("*") if file.is_file()}
    loaded = Llama.from_pretrained(lora.base_path(tmp_path)).eval()
    lora.load_adapter(loaded, tmp_path)
    with torch.no_grad():
        assert lora.base_path(tmp_path).samefile(base / "model")
        assert torch.allclose(ppo.logprobs(loaded, answers), e.logp, atol=1e-6)
    for layer in lora.adapters(models.actor).values():  # noise in B: KL > 0
        layer.lora_B.data.normal_(std=0.05, generator=drawn(9))
    e = ppo.advantages(ppo.scoring(models, answers, args), args)
    assert ppo.masked_mean(ppo.kl_k3(e.logp, e.ref_logp), e.mask) > 1e-3 and torch.equal(e.ref_logp, expected)


def kill_in(monkeypatch, step: int) -> None:
    """The run dies in this step, before it has learnt."""
    real = ppo.update

    def update(models, optimizers, e, ptx, schedule, now, stage):
        if now == step:
            raise KeyboardInterrupt
        return real(models, optimizers, e, ptx, schedule, now, stage)
    monkeypatch.setattr(ppo, "update", update)


@pytest.mark.parametrize("kind", ["ppo", "grpo", "one base"])
def test_resumed_is_unbroken_to_the_bit(base, tmp_path, monkeypatch, kind):
    added = {"ppo": ("--kl_target", 0.01, "--critic_warmup", 2), "grpo": ("--algorithm", "grpo", "--group_size", 2),
             "one base": on_one_base(base)}[kind]
    more = ("--num_episodes", 6, "--save_interval", 3, "--pretrain_dataset", base / "ptx.json", *PTX, *added)
    whole = main(base, tmp_path / "whole", *more)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="with the same command and --resume"):
        kill_in(patch, 5)
        main(base, tmp_path / "cut", *more)
    cut = main(base, tmp_path / "cut", *more, "--resume")
    clock = {"seconds", "tokens_per_second", "seconds/rollout", "seconds/scoring", "seconds/update"}
    tables = [[{name: x for name, x in row.items() if name not in clock} for row in metrics(tmp_path / folder)]
              for folder in ("whole", "cut")]
    assert tables[0] == tables[1] and len(tables[0]) == 6
    assert len({row["objective/scores"] for row in tables[0]}) == 6
    if kind == "ppo":       # after 2 updates of the critic alone the policy is still the SFT model
        assert [abs(row["objective/kl"]) < 1e-5 for row in tables[0]] == [True] * 3 + [False] * 3
        assert [row["lr"] > 0 for row in tables[0]] == [False] * 2 + [True] * 4
        for row, after in zip(tables[0], tables[0][1:]):
            kl_coef = ppo.next_kl_coef(row["objective/kl_coef"], row["objective/kl"], 0.01)
            assert after["objective/kl_coef"] == kl_coef != row["objective/kl_coef"]
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert all(whole[name] == cut[name] for name in ("reward_before", "reward_after", "kl"))
    for flag, value in (("seed", 1), ("algorithm", "rloo")):
        with pytest.raises(ValueError, match=f"of another {flag}"):
            main(base, tmp_path / "cut", *more, "--group_size", 2, "--critic_warmup", 0, "--resume", f"--{flag}", value)


def test_the_streams_go_on_from_update_to_update(base, tmp_path, monkeypatch):
    """Also where --target_kl ends an update early: prompts and ptx examples, each once an epoch."""
    learnt, asked, backward, rollout = [], [], ppo.ptx_backward, ppo.rollout

    def ptx_backward(actor, optimizer, batch, stage):
        learnt.extend(str(ids) for ids, _ in batch)
        return backward(actor, optimizer, batch, stage)

    def ask(actor, prompts, purpose, *rest):
        asked.extend(map(str, prompts) if purpose[0] == "rollout" else [])
        return rollout(actor, prompts, purpose, *rest)
    monkeypatch.setattr(ppo, "ptx_backward", ptx_backward)
    monkeypatch.setattr(ppo, "rollout", ask)
    main(base, tmp_path, "--num_episodes", 4, "--target_kl", 1e-9, "--pretrain_dataset", base / "ptx.json", *PTX)
    assert [(row["minibatches"], row["early_stop"]) for row in metrics(tmp_path)] == [(2, 1)] * 4
    assert len(learnt) == len(asked) == 16
    assert all(len(set(learnt[i:i + 5])) == 5 for i in (0, 5, 10)) and len(set(learnt)) == 5
    assert len(set(asked[:8])) == 8 and set(asked[8:]) == set(asked[:8])


def test_an_update_learns_from_several_rollouts(base, tmp_path, monkeypatch, capsys):
    """The last one from what is left of them."""
    sizes, real = [], ppo.update

    def update(models, optimizers, e, *rest):
        sizes.append(len(e.tokens))
        return real(models, optimizers, e, *rest)
    monkeypatch.setattr(ppo, "update", update)
    main(base, tmp_path, "--num_episodes", 1, "--max_timesteps", 5, "--update_timesteps", 2, "--max_epochs", 1)
    assert sizes == [8, 8, 4] and [row["minibatches"] for row in metrics(tmp_path)] == [4, 4, 2]
    printed = capsys.readouterr().out
    assert "8 prompts | 3 updates of 2 x 4 x 1 answers, 1 epochs | ptx off" in printed
    assert printed.count("rollout: 4 of 8 answers") == printed.count("rollout:") - 1 == 1   # in the first update alone


def test_show_tokens_is_a_table_of_the_first_answer(base, tmp_path, capsys):
    main(base, tmp_path, "--num_episodes", 1, "--max_epochs", 1, "--show_tokens", "--eos_penalty", 0)
    prompt, after = capsys.readouterr().out.split("prompt: ")[1].split("token mask")
    head, *lines = after.split("\nscore ")[0].splitlines()
    assert "### Instruction:" in prompt and head.split() == "logp ref_logp kl value reward adv ret".split()
    rows = [line.split()[-8:] for line in lines]
    assert len(rows) > 3 and {mask for mask, *_ in rows[:-1]} == {"1"}
    assert all(float(kl) == pytest.approx(float(logp) - float(ref), abs=2e-3) for _, logp, ref, kl, *_ in rows)


def test_show_tokens_of_an_answer_that_ended():
    """The place after EOS is shown too: all of it must be zero."""
    e = rolled([[1, 40]], [[80, 81, 2]])
    e = Experience(*(F.pad(x, (0, 2)) if x.dim() == 2 else x for x in e[:4]), ids=e.ids)
    figures = torch.arange(1.0, 4.0).repeat(7, 1)
    logp, ref_logp, value, reward, adv, ret, _ = F.pad(figures, (0, 2))[:, None]
    e = e._replace(logp=logp, ref_logp=ref_logp, value=value, score=T([1.5]), reward=reward, adv=adv, ret=ret)
    lines = ppo.show_tokens(e, text.Tokenizer(demo.FOLDER)).splitlines()
    assert len(lines) == 7 and lines[-1] == "score 1.500, ended"
    assert lines[-2].split() == ["(padding)", "0", *["0.000"] * 7]
    assert lines[-3].split() == ["</s>", "1", "3.000", "3.000", "0.000", *["3.000"] * 4]


def test_the_first_updates_are_printed_and_then_every_log_interval(base, tmp_path, capsys):
    main(base, tmp_path, "--num_episodes", 6, "--max_epochs", 1, "--log_interval", 4)
    assert re.findall(r"^step (\d+)/6 ", capsys.readouterr().out, re.MULTILINE) == ["1", "2", "3", "4", "6"]


def test_a_prompt_of_max_input_len_tokens_is_kept():
    tokenizer, plain = text.Tokenizer(demo.FOLDER), text.TEMPLATES["plain"]
    found = [{"messages": [{"role": "user", "content": "fox " * n}]} for n in (1, 5, 9)]
    limit = len(text.encode_prompt(found[1]["messages"], tokenizer, plain))
    stage = Stage(argparse.Namespace(max_input_len=limit), WORLD, torch.float32, tokenizer, plain, [2], False)
    kept = ppo.encode_prompts(found, stage)
    assert [prompt.record for prompt in kept] == found[:2] and len(kept[1].ids) == limit


@pytest.mark.parametrize("kl_coef", [0.1, 1.0])
def test_toy_reward_is_raised(base, tmp_path, monkeypatch, kl_coef):
    """A point for every token 7, of which an answer has room for 8 or 9. Within 15 updates; a larger --kl_coef holds it
    back. The KL is not negative."""
    monkeypatch.setattr(ppo, "reward_scores", lambda reward, e: (e.tokens == 7).sum(1).float())
    args = resolved(base, tmp_path, "--max_seq_len", 11, "--train_batch_size", 16, "--experience_batch_size", 32,
                    "--lr", 3e-3, "--critic_lr", 3e-3, "--ptx_coef", 0, "--eos_penalty", 0, "--kl_coef", kl_coef)
    small, scores, kl = LlamaConfig(**SIZES | {"vocab_size": 16}), [], []
    actor = Llama(small, generator=drawn(1)).eval()
    critic = RewardModel(Llama(small, head=False, generator=drawn(2)), drawn(2)).eval()
    models = Models(actor, critic, *(ppo.freeze(copy.deepcopy(model), torch.float32) for model in (actor, critic)))
    optimizers = {name: zero.ZeRO2(getattr(models, name).named_parameters()) for name in ("actor", "critic")}
    stage = stage_of(args)
    for step in range(1, 16):
        answers = ppo.rollout(actor, asked([[1, 4, 5], [1, 6]] * 16), ("rollout", 0, step), stage)
        e = ppo.advantages(ppo.scoring(models, answers, args), args)
        figures = ppo.objective(e, stage) | ppo.update(models, optimizers, e, iter([]), 1.0, step, stage)
        scores.append(figures["objective/scores"])
        kl.append(figures["objective/kl"])
    assert min(kl) > -0.1 and kl[0] == 0 and figures["policy/approxkl_avg"] < 0.5
    if kl_coef == 0.1:
        assert scores[-1] > scores[0] + 4 and 10 < kl[-1] < measure.LARGE_KL
    else:
        assert scores[-1] > scores[0] + 0.3 and kl[-1] < 6


def test_demo_preset_measures_gold(base, tmp_path, monkeypatch, capsys):
    """With no --prompt_dataset and the demo's tokenizer. The gold score itself is test_demo's."""
    gold = iter([0.25, 0.75])
    monkeypatch.setattr(demo, "measure", lambda *rest: {
        "gold": next(gold), "gold_en": 0.0, "gold_zh": 0.0, "distinct_2": 0.5, "samples": ["狐狸 -> b"]})
    given = ("--pretrain", base / "model", "--rm_path", base / "rm", "--save_path", tmp_path, "--max_steps", 1,
             "--max_input_len", 48, "--max_seq_len", 60, "--eval_size", 4, "--experience_batch_size", 4,
             "--max_datasets_size", 20, "--critic_lr", 0, "--lr", 0)
    summary = ppo.main([str(flag) for flag in given])
    assert (summary["gold_before"], summary["gold_after"]) == (0.25, 0.75) and summary["kl"] == 0
    assert summary["steps"] == 1
    assert summary["flags"]["kl_coef"] == ppo.DEMO["kl_coef"] and summary["flags"]["ptx_coef"] == ppo.DEMO["ptx_coef"]
    assert 0 <= metrics(tmp_path)[0]["objective/gold"] <= 1
    printed = capsys.readouterr().out
    assert "gold score            0.250    0.750" in printed and "after (distinct-2 0.500):\n  狐狸 -> b" in printed


def test_the_table_reads_other_stages_whatever_the_locale(base, tmp_path, monkeypatch, capsys):
    """Their summary.json has Chinese samples. Under LC_ALL=C a run ended here with "'ascii' codec can't decode"."""
    folder = tmp_path / "sft"
    shutil.copytree(base / "model", folder)
    summary = {"samples": ["狐狸"], "seconds": 61.7, "eval_loss_before": 7.25, "eval_loss": 1.5}
    (folder / "summary.json").write_text(json.dumps(summary, ensure_ascii=False), encoding="utf-8")
    real = Path.read_text

    def read_text(file, encoding=None, errors=None):
        return real(file, encoding or "ascii", errors)
    monkeypatch.setattr(Path, "read_text", read_text)
    main(base, tmp_path / "out", "--pretrain", folder, "--num_episodes", 1)
    assert "62  held-out loss         7.250    1.500" in capsys.readouterr().out


HEALTHY = {"step": 9, "objective/kl": 4.0, "val/ratio": 1.02, "eos_rate": 0.1, "response_length": 30.0,
           "objective/scores": 0.5, "objective/scores_std": 0.3, "policy/entropy_avg": 0.4,
           "val/explained_variance": 0.2}


@pytest.mark.parametrize("ill, words", [
    ({}, ""),
    ({"objective/kl": -0.9}, ""),
    ({"objective/kl": -2.0}, "SFT model is -2.0 nats an answer on average, where no KL is below 0"),
    ({"objective/kl": 31.0}, "SFT model is 31.0 nats an answer: raise --kl_coef or lower --lr"),
    ({"val/ratio": 0.85}, "the ratio to the old policy is 0.85 on average"),
    ({"val/ratio": 1.15}, "the ratio to the old policy is 1.15 on average"),
    ({"eos_rate": 0.0}, "all answers were cut before their end: raise --max_seq_len"),
    ({"response_length": 1.0}, "the answers have 1.0 tokens on average"),
    ({"objective/scores_std": 0.0}, "all answers have the reward 0.500"),
    ({"val/explained_variance": -0.1}, "the critic's explained variance is -0.10"),
    ({"val/explained_variance": -0.1, "step": 5}, ""),
    ({"policy/entropy_avg": 0.04}, "the entropy is 0.040 nats a token"),
])
def test_what_is_wrong_is_said_once(ill, words, capsys):
    stage = SimpleNamespace(say=print)
    warned = []
    ppo.warn(HEALTHY | ill, warned, stage)
    said = capsys.readouterr().out
    step = ill.get("step", 9)
    assert said.startswith(f"warning: step {step}: ") and words in said and said.count("\n") == 1 if words else not said
    ppo.warn(HEALTHY | ill, warned, stage)
    assert not capsys.readouterr().out and len(warned) == bool(words)


def test_a_group_without_a_critic_has_no_word_on_it(capsys):
    row = {name: x for name, x in HEALTHY.items() if name != "val/explained_variance"}
    ppo.warn(row, [], SimpleNamespace(say=print))
    assert not capsys.readouterr().out


def test_a_run_warns_in_the_step_where_it_happens(base, tmp_path, monkeypatch, capsys):
    """Three updates, the second and third with a large KL; resumed, it was said already."""
    kl = iter([0.0, 0.0, 31.0, 32.0, 0.0])      # the first and the last are those of the evaluations
    real = ppo.objective
    monkeypatch.setattr(ppo, "objective", lambda e, stage: real(e, stage) | {"objective/kl": next(kl)})
    three = ("--num_episodes", 3, "--save_interval", 2)
    main(base, tmp_path, *three)
    assert capsys.readouterr().out.count("warning: step 2: the KL to the SFT model is 31.0 nats an answer") == 1
    kl = iter([33.0, 0.0])
    main(base, tmp_path, *three, "--resume")
    assert "warning" not in capsys.readouterr().out


def test_gold_of_a_step_is_of_its_own_answers(base, tmp_path):
    """Each answer by the rule, with the message that it answers."""
    tokenizer = text.Tokenizer(demo.FOLDER)
    asked = ["Write a story about a fox and a kite.", "写一个关于狐狸和风筝的故事。"]
    prompts = [text.encode_prompt([{"role": "user", "content": a}], tokenizer, TEMPLATE) for a in asked]
    answers = [tokenizer.encode("The fox saw the kite. In the end, everyone was happy.", bos=False, eos=True),
               tokenizer.encode("狐狸", bos=False)]
    e = rolled(prompts, answers)
    nothing = torch.zeros(e.mask.shape)
    e = e._replace(logp=nothing, ref_logp=nothing, value=nothing, score=torch.zeros(2), reward=nothing, ret=nothing,
                   asked=[{"messages": [{"role": "user", "content": a}]} for a in asked],
                   said=list(map(tokenizer.decode, answers)))
    stage = stage_of(resolved(base, tmp_path))._replace(is_demo=True)
    assert ppo.objective(e, stage)["objective/gold"] == pytest.approx((1.0 + 0.5 * 0.3) / 2)


def test_critic_can_be_trained_alone(base, tmp_path, monkeypatch):
    """--lr 0 holds the policy still, not the critic."""
    found = spied(monkeypatch)
    main(base, tmp_path, "--lr", 0, "--num_episodes", 1)
    assert same(weights(tmp_path), weights(base / "model"))
    assert not torch.equal(found[0].models.critic.score.weight, found[0].before[1]["score.weight"])


# ---- reward functions -----------------------------------------------------------------------------------------------

RULES = """
import os
import time

def length(prompt, answer, record):
    return len(answer) + 100 * record["ended"] + 1000 * len(record.get("kind", "a"))

def asked(prompt, answer, record):
    return {"First?": 1, "Second?": 2}[prompt]

def nan(prompt, answer, record):
    return float("nan")

def words(prompt, answer, record):
    return "many"

def slow(prompt, answer, record):
    time.sleep(60)

def dies(prompt, answer, record):
    os._exit(1)
"""


def rewards(tmp_path: Path, *names: str) -> list[list[float]]:
    """What these functions say of two answers."""
    (tmp_path / "rules.py").write_text(RULES)
    turns = [[{"role": "user", "content": "Zero?"}, {"role": "assistant", "content": "Yes."}], []]
    found = [{"messages": turns[i] + [{"role": "user", "content": question}], "record": {"kind": "ab"[:i]},
              "place": f"a.json, line {i + 1}"} for i, question in enumerate(["First?", "Second?"])]
    functions = rules.Rules([rules.rule(f"{tmp_path / 'rules.py'}:{name}") for name in names])
    try:
        return functions.rewards(found, ["The fox", "A"], [True, False])
    finally:
        functions.child.kill()


def test_functions_see_prompt_answer_and_record(tmp_path):
    """The last message, and the record with "ended"."""
    assert rewards(tmp_path, "length", "asked=-2") == [[7 + 100, 1], [1 + 1000, 2]]


def test_scores_of_functions_are_those_of_their_rows(base, tmp_path):
    """Their weighted sum, less --eos_penalty where the answer never ended."""
    args, models = opened(base, tmp_path, "--train_batch_size", 3, "--eos_penalty", 0.5)
    functions = object.__new__(rules.Rules)
    functions.rules = [rules.Rule(Path("a.py"), "one", 0.5), rules.Rule(Path("a.py"), "two", -2.0)]
    functions.rewards = lambda asked, answers, ended: [[2.0, 0.0], [4.0, 0.5], [6.0, 0.0], [0.0, -2.0]]
    assert ppo.scoring(models._replace(reward=functions), rolled(), args).score.tolist() == [1, 1, 2.5, 4]


@pytest.mark.parametrize("name, words", [
    ("nan", "rules.py:nan=1.0: returned nan"),
    ("words", "rules.py:words=1.0: raised ValueError: could not convert string to float: 'many'"),
    ("slow", "rules.py:slow=1.0: took more than 0.5 seconds"),
    ("dies", "rules.py:dies=1.0: ended its process")])
def test_a_function_that_fails_is_a_sentence_with_the_records_place(tmp_path, monkeypatch, name, words):
    monkeypatch.setattr(rules, "LONGEST_CALL", 0.5)
    with pytest.raises(ValueError, match=f"^a.json, line 1: --reward_fn .*{words}; mend the function or leave"):
        rewards(tmp_path, name)


def test_a_file_without_the_function_is_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="^--reward_fn: raised KeyError: 'none'"):
        rewards(tmp_path, "none")


def by_functions(base: Path, out: Path, *more) -> dict:
    """A run where these functions judge the answers."""
    given = flags(base, out, "--reward_fn", *more)
    place = given.index("--rm_path")
    return ppo.main(given[:place] + given[place + 2:])


@pytest.mark.parametrize("more", [("--algorithm", "grpo", "--group_size", 2), (), ("--lora_rank", 2)],
                         ids=["grpo", "ppo", "ppo with lora"])
def test_a_run_by_a_rule(base, tmp_path, monkeypatch, more):
    """The demo's. There is no reward model; PPO's critic starts as the actor's trunk. No --eos_penalty is added."""
    found = spied(monkeypatch)
    summary = by_functions(base, tmp_path, RULE, *more)
    models, before = found[0].models, found[0].before
    models.reward.child.kill()
    assert isinstance(models.reward, rules.Rules) and (models.critic is None) == ("grpo" in more)
    assert summary["flags"]["eos_penalty"] == 0 and len(metrics(tmp_path)) == 3
    assert all(row["objective/scores"] == 0 for row in metrics(tmp_path))       # a model of noise tells no story
    if models.critic is not None:
        trunk = {name.removeprefix("trunk."): p for name, p in before[1].items()}
        shared = [name for name in trunk if name in before[0] and "lora" not in name]
        assert len(shared) > 10 and all(torch.equal(trunk[name], before[0][name]) for name in shared)
        assert not torch.equal(models.critic.score.weight, before[1]["score.weight"])
        assert not any("output" in name for name in trunk)


# ---- measuring ------------------------------------------------------------------------------------------------------

def test_the_best_answers_that_ended_are_records_to_train_on(tmp_path):
    """An input stays beside its instruction. Of two equally good ones the last. Of the third prompt none has ended."""
    asked = [{"messages": [{"role": "user", "content": "Hi."}], "record": record}
             for record in ({"instruction": "Say.", "input": "This."}, {"prompt": "Hi."}, {"prompt": "Ho."})]
    proxy, ended = T([[0.1, 0.9], [0.5, 0.7], [0.1, 0.2]]), T([[True, True], [True, False], [False, False]])
    found = measure.Answers(asked, [["a", " b "], ["c", "d"], ["e", "f"]], [], {"proxy": proxy, "eos_rate": ended})
    kept = ppo.best_records(found)
    assert kept[0] == {"instruction": "Say.", "input": "This.", "output": "b"}
    assert kept[1]["messages"] == [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "c"}]
    assert len(kept) == 2 and len(records.read_records([write(tmp_path / "kept.json", kept)], "sft")) == 2
    assert ppo.best_records(found._replace(figures={"proxy": 0 * proxy, "eos_rate": ended}))[0]["output"] == "b"


def kept_answers(monkeypatch) -> list[measure.Answers]:
    """What each call of judged returned."""
    kept, judged = [], ppo.judged
    monkeypatch.setattr(ppo, "judged", lambda *given: (kept.append(judged(*given)), kept[-1])[1])
    return kept


def lengths(found: measure.Answers) -> list[float]:
    """Those of the first answers, as kept; checks that they are the numbers of their ids."""
    kept = found.figures["length"][:, 0].tolist()
    assert kept == [len(ids) for ids in found.first] and kept
    return kept


def test_kl_of_an_answer_is_summed_over_its_tokens(base, tmp_path, monkeypatch):
    monkeypatch.setattr(ppo, "kl_k1", lambda logp, ref_logp: (logp < 0).float())  # 1 nat a token
    kept = kept_answers(monkeypatch)
    main(base, tmp_path, "--eval", base / "model")
    assert all(found.figures["kl"][:, 0].tolist() == lengths(found) for found in kept) and len(kept) == 2


def test_eval_measures_a_directory(base, tmp_path, monkeypatch, capsys):
    """The SFT model itself is 0 nats away from itself."""
    best, judged = tmp_path / "best.json", kept_answers(monkeypatch)
    found = main(base, tmp_path / "out", "--eval", base / "model", "--best_of", "1,3", "--write", best)
    assert found == json.loads((tmp_path / "out" / "eval.json").read_text("utf-8")) and "gold" not in found["model"]
    assert found["model"]["kl"] == pytest.approx(0, abs=1e-4) and 1 < found["model"]["length"] < 64
    assert [found.figures["proxy"].shape for found in judged] == [(4, 3), (4, 1)] and all(map(lengths, judged))
    assert [len(said) for said in judged[0].said] == [3] * 4 and len(judged[0].asked) == 4
    one, three = found["best_of"]
    assert one["proxy"] == pytest.approx(found["model"]["proxy"]) and three["proxy"] > one["proxy"]
    kept = json.loads(best.read_text("utf-8"))
    assert f"wrote {len(kept)} records: sft.py --pretrain" in capsys.readouterr().out and len(kept) <= 4


def test_a_sweep_compares_with_the_best_of_up_to_64(base, tmp_path, monkeypatch):
    def rung(args, folder, changed):
        raise KeyboardInterrupt(changed["best_of"])
    monkeypatch.setattr(ppo, "rung", rung)
    with pytest.raises(KeyboardInterrupt, match=re.escape("[1, 2, 4, 8, 16, 32, 64]")):
        main(base, tmp_path, "--sweep", 1)


def test_a_sweep_is_a_run_a_rung(base, tmp_path, monkeypatch):
    """Its rungs are those of ppo.py --kl_coef; resumed, no finished rung is run again."""
    short = ("--num_episodes", 2, "--save_interval", 0)
    sweep = (*short, "--best_of", "1,2", "--sweep", 3)
    found = main(base, tmp_path / "sweep", *sweep, 0)
    assert [rung["kl_coef"] for rung in found["rungs"]] == [3, 0]
    main(base, tmp_path / "alone", *short, "--kl_coef", 3)
    assert same(weights(tmp_path / "sweep" / "kl-3"), weights(tmp_path / "alone"))
    assert not same(weights(tmp_path / "sweep" / "kl-0"), weights(tmp_path / "alone"))
    written = json.loads((tmp_path / "sweep" / "sweep.json").read_text("utf-8"))
    assert written == found and [row["n"] for row in found["best_of"]] == [1, 2]
    assert found["rungs"][0] == {"kl_coef": 3} | main(base, tmp_path / "again", "--eval", tmp_path / "alone")["model"]
    monkeypatch.delattr(ppo, "learn")
    assert main(base, tmp_path / "sweep", *sweep, 0, "--resume") == found
    with pytest.raises(NameError, match="learn"):
        main(base, tmp_path / "sweep", *sweep)


@pytest.mark.parametrize("figures, rungs", [
    ([{"kl": 5.0}, {"kl": 31.0}, {"kl": 9.0}], 2),
    ([{"kl": 5.0, "gold": 0.8}, {"kl": 7.0, "gold": 0.9}, {"kl": 9.0, "gold": 0.51}, {"kl": 9.0, "gold": 0.49}], 4),
])
def test_a_sweep_ends_where_it_breaks(base, tmp_path, monkeypatch, figures, rungs):
    """Where the KL is large, or the gold score below the SFT model's 0.5."""
    plain = {"best_of": [{"n": 1}], "model": {"gold": 0.5} if "gold" in figures[0] else {}}
    found = iter([plain, *({"model": row} for row in figures)])
    monkeypatch.setattr(ppo, "rung", lambda *given: next(found))
    assert len(main(base, tmp_path, "--sweep")["rungs"]) == rungs


# ---- two processes --------------------------------------------------------------------------------------------------

def train_in_each_way(base: Path, out: Path) -> None:
    """One process of two: runs under every strategy, and a single update; saves what each process has then."""
    world = run.start("cpu", "ddp")
    actors, real = [], ppo.open_models
    ppo.open_models = lambda *rest: (actors.append(real(*rest)), actors[-1])[1]
    ptx = ("--pretrain_dataset", base / "ptx.json", "--ptx_coef", 0.3, "--ptx_batch_size", 1)
    main(base, out / "odd", *ptx, "--num_episodes", 1, "--max_timesteps", 3, "--update_timesteps", 2,
         "--experience_batch_size", 3, "--accumulation_steps", 2, "--strategy", "zero2")
    for strategy in ("zero2", "zero2_cpu", "ddp"):
        main(base, out / f"one base, {strategy}", *on_one_base(base), "--eval_size", 1, "--strategy", strategy)
        main(base, out / strategy, *ptx, "--eval_size", 3, "--strategy", strategy)
    torch.save([p.data for model in actors[-1][:2] for p in model.parameters()], out / f"actor-{world.rank}.pt")
    args, models = opened(base, out / "none", "--train_batch_size", 2, "--ptx_coef", 0.3, "--ptx_batch_size", 1)
    e = ppo.select(fixed(args, models), torch.arange(world.rank, 4, 2))
    figures, gradients = update(models, e, encoded(base), args, world, 1.0)
    parameters = [p.data for model in models[:2] for p in model.parameters()]
    torch.save((figures, gradients, parameters), out / f"update-{world.rank}.pt")
    learnt = {name: learn(name, base, out / name, world) for name in ppo.ALGORITHMS}
    learnt["one base"] = learn("ppo", base, out / "ppo", world, *on_one_base(base))
    torch.save(learnt, out / f"algorithms-{world.rank}.pt")
    measured = [main(base, out / "eval", "--eval", base / "model", "--eval_size", size) for size in (1, 3)]
    torch.save(measured, out / f"eval-{world.rank}.pt")
    by_functions(base, out / "grpo", RULE, f"{out / 'rules.py'}:length=0.01", "--algorithm", "grpo", "--group_size", 2)
    run.stop()


def learn(name: str, base: Path, out: Path, world: run.World, *more) -> tuple:
    """Advantages, loss and what an update by an algorithm trains. A process of two has every other group."""
    size = 1 if name == "ppo" else 2
    mine = torch.arange(4).view(-1, size)[world.rank::world.world].flatten()
    args, models = opened(base, out, "--algorithm", name, "--group_size", size, "--max_epochs", 2, "--kl_coef", 0.2,
                          "--train_batch_size", len(mine), *more)
    e = ppo.select(rolled(), mine)
    e = ppo.advantages(ppo.scoring(models, e, args), args)
    figures, _ = update(models, e, [], args, world, 3.0)
    return mine, e.adv, figures, [p.data for model in ppo.trained(models) for p in model.parameters()]


def test_two_processes(base, tmp_path, start):
    """minimind's ranks never averaged their gradients. Equal weights on both, and those of one process with all rows.

    Three prompts to evaluate are two on one process and one on the other. What is learnt from is as much on each, also
    where no batch size divides another: 2 x 3 answers are minibatches of 4 and 2, the 3 left over one of 2 + 1."""
    (tmp_path / "rules.py").write_text(RULES)
    for process in start(2, train_in_each_way, base, tmp_path).wait():
        assert process.code == 0, process.err
    first, second = (torch.load(tmp_path / f"actor-{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, second)) and len(metrics(tmp_path / "ddp")) == 3
    assert all(torch.equal(p, q) for p, q in zip(Llama.from_pretrained(tmp_path / "ddp").parameters(), first))
    assert not same(weights(tmp_path / "ddp"), weights(base / "model"))
    assert [row["minibatches"] for row in metrics(tmp_path / "odd")] == [4, 2]
    for kind, strategy in product(("", "one base, "), ("zero2", "zero2_cpu")):
        for name in ("loss", "loss/value_avg", "loss/ptx_avg", "objective/kl", "objective/scores"):
            folders = f"{kind}{strategy}", f"{kind}ddp"
            values, expected = ([row[name] for row in metrics(tmp_path / folder)] for folder in folders)
            assert values == pytest.approx(expected, rel=1e-3, abs=1e-5), (kind, strategy, name)
    args, models = opened(base, tmp_path / "none", "--train_batch_size", 4, "--ptx_coef", 0.3, "--ptx_batch_size", 2)
    figures, found = update(models, fixed(args, models), encoded(base), args, WORLD, 1.0)
    parameters = [p.data for model in models[:2] for p in model.parameters()]
    for rank in (0, 1):
        figures_of_rank, found_of_rank, parameters_of_rank = torch.load(tmp_path / f"update-{rank}.pt")
        assert figures == pytest.approx(figures_of_rank, rel=1e-4, abs=1e-6) and figures["minibatches"] == 2
        assert all((p - q).abs().max() < 1e-6 for p, q in zip(parameters_of_rank, parameters))
        assert all(close(found_of_rank[name], found[name]) for name in ("actor", "critic"))
    halves = [torch.load(tmp_path / f"algorithms-{rank}.pt") for rank in (0, 1)]
    for name in halves[0]:
        kind, more = ("ppo", on_one_base(base)) if name == "one base" else (name, ())
        _, adv, figures, parameters = learn(kind, base, tmp_path / "none", WORLD, *more)
        for half in halves:
            rows, adv_of_half, figures_of_half, parameters_of_half = half[name]
            assert (adv[rows] - adv_of_half).abs().max() < 1e-5 and adv.any(), name
            assert figures == pytest.approx(figures_of_half, rel=1e-4, abs=1e-5), name
            assert all((p - q).abs().max() < 1e-5 for p, q in zip(parameters_of_half, parameters)), name
    first, second = (torch.load(tmp_path / f"eval-{rank}.pt") for rank in (0, 1))
    for prompts, figures in zip((1, 3), first):     # one prompt is answered by both, and counted once
        share, *interval = figures["win_rate"].values()
        assert interval == pytest.approx(measure.wilson(share, prompts))
    assert first == second and json.loads((tmp_path / "eval" / "eval.json").read_text("utf-8")) == first[1]
    assert len(metrics(tmp_path / "grpo")) == 3
    for row in metrics(tmp_path / "grpo"):
        by_rule = row["objective/demo.reward"] + 0.01 * row["objective/rules.length"]
        assert row["objective/scores"] == pytest.approx(by_rule) and row["objective/rules.length"] > 1000
    start = Llama.from_pretrained(base / "model")
    assert max((p - q).abs().max() for p, q in zip(start.parameters(), models.actor.parameters())) > 1e-4


# ---- bad input ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("more, message", [
    (["--temperature", "0"], "--temperature: must be above 0, not 0"),
    (["--temperature", "nan"], "--temperature: must be a finite number, not nan"),
    (["--ptx_coef", "2"], "--ptx_coef: must be at least 0 and at most 1, not 2"),
    (["--lam", "95"], "--lam: must be at least 0 and at most 1, not 95"),
    (["--gamma", "2"], "--gamma: must be at least 0 and at most 1, not 2"),
    (["--clip", "20"], "--clip: must be at least 0 and at most 1, not 20"),
    (["--value_clip", "40"], "--value_clip: must be at least 0 and at most 10, not 40"),
    (["--critic_lr", "3"], "--critic_lr: must be at least 0 and at most 1, not 3"),
    (["--kl_coef", "-0.1"], "--kl_coef: must be at least 0, not -0.1"),
    (["--eval_size", "0"], "--eval_size: must be at least 1, not 0"),
    (["--max_epochs", "1.5"], "--max_epochs: must be a whole number, not 1.5"),
    (["--max_input_len", "64"], "--max_input_len 64 leaves no room for an answer within --max_seq_len 64"),
    (["--max_seq_len", "161"], "--max_seq_len 161 is beyond the models' context of 160"),
    (["--max_input_len", "12"], "all 8 prompts have more than --max_input_len 12 tokens, the shortest 3"),
    (["--rm_path", "{}/foreign"], "foreign has another tokenizer than .*train it from this model"),
    (["--rm_path", "{}/model"], "has no score.weight: it is not a reward model, train one with rm.py"),
    (["--rm_path", "{}/nowhere"], "nowhere does not exist"),
    (["--save_path", "{}/rm"], "--save_path .* is read too, the run would overwrite its own input: name another"),
    (["--save_path", "{}/model"], "--save_path .* is read too, the run would overwrite its own input: name another"),
    (["--prompt_dataset", "{}/none.json"], "none.json does not exist"),
    (["--algorithm", "rloo", "--group_size", "1"], "--group_size 1 leaves --algorithm rloo nothing to compare"),
    (["--group_size", "3"], "--experience_batch_size 4 is no multiple of --group_size 3: make it one"),
    (["--no_std"], "--no_std changes grpo, gspo, cispo: --algorithm ppo has no such step"),
    (["--no_length", "--algorithm", "gspo"], "--no_length changes grpo: --algorithm gspo has no such step"),
    (["--reward_fn", "nothing.py:reward"], "must be FILE.py:NAME or FILE.py:NAME=WEIGHT, .* not nothing.py:"),
    (["--reward_fn", f"{RULE}=much"], "--reward_fn: must be a finite number, not much"),
    (["--reward_fn", RULE], "--reward_fn gives the reward instead of --rm_path: name one of them"),
    (["--eval", "{}/foreign"], "foreign has another tokenizer than .*train it from this model"),
    (["--write", "best.json"], "--write and --best_of are of answers of --eval: name the model that gives them"),
    (["--best_of", "1,4"], "--write and --best_of are of answers of --eval: name the model that gives them"),
    (["--eval", "{}/model", "--sweep"], "--eval measures a model that is there: leave --sweep and --resume out"),
    (["--eval", "{}/model", "--resume"], "--eval measures a model that is there: leave --sweep and --resume out"),
    (["--best_of", "1,0"], "--best_of: must be at least 1, not 0"),
    (["--critic_warmup", "2", "--algorithm", "rloo"], "--critic_warmup changes ppo: --algorithm rloo has no such step"),
    (["--no_whiten", "--algorithm", "rloo"], "--no_whiten changes ppo: --algorithm rloo has no such step"),
], ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_bad_input_is_a_sentence(base, tmp_path, more, message):
    """The ids of another tokenizer would be scored as other text."""
    if not (base / "foreign").exists():
        shutil.copytree(base / "rm", base / "foreign")
        with (base / "foreign" / "tokenizer.model").open("ab") as file:
            file.write(b"\xc0\x0c\x01")     # a field that sentencepiece does not know: it opens, and is another file
    with pytest.raises((ValueError, OSError), match=message) as caught:
        main(base, tmp_path, *(flag.replace("{}", str(base)) for flag in more))
    assert "\n" not in str(caught.value)


def test_prompts_are_needed_unless_it_is_the_demo(base, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(base / "model", folder)
    with (folder / "tokenizer.model").open("ab") as file:
        file.write(b"\xc0\x0c\x01")
    with pytest.raises(ValueError, match="--prompt_dataset is missing: name the prompts to answer"):
        ppo.main(["--pretrain", str(folder), "--rm_path", str(base / "rm"), "--save_path", str(tmp_path / "out")])


@pytest.mark.parametrize("script", ["sft", "rm"])
def test_missing_stage_names_its_command(base, tmp_path, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    given = [] if script == "sft" else ["--pretrain", str(base / "model")]
    with pytest.raises(FileNotFoundError, match=f"out/{script} does not exist: run {script}.py first"):
        ppo.main(given)


def test_long_prompts_are_counted(base, tmp_path, capsys):
    """Records of other kinds are prompts too."""
    turns = (("user", "Hi"), ("assistant", "Yes"), ("user", "Now?"))
    chat = [{"role": role, "content": content} for role, content in turns]
    write(tmp_path / "prompts.json",
          [*demo.prompt_records(0)[:3], {"instruction": "fox " * 30}, {"messages": chat}])
    main(base, tmp_path / "out", "--prompt_dataset", tmp_path / "prompts.json", "--num_episodes", 1,
         "--max_input_len", 60, "--max_seq_len", 70)
    out = capsys.readouterr().out
    assert "1 of 5 prompts have more than --max_input_len 60 tokens: left out" in out and "4 prompts |" in out


def test_ptx_off_reads_nothing(base, tmp_path, capsys):
    main(base, tmp_path / "out", "--num_episodes", 1, "--pretrain_dataset", tmp_path / "none.json", "--ptx_coef", 0)
    out = capsys.readouterr().out
    assert "ptx off" in out and "ptx_coef=0.0" in out
    args = resolved(base, tmp_path, "--ptx_coef", 0.5)
    assert ppo.read_ptx(stage_of(args)) == [] and args.ptx_coef == 0


def test_reward_of_nan_stops_the_run(base, tmp_path):
    shutil.copytree(base / "rm", tmp_path / "rm")
    tensors = weights(tmp_path / "rm")
    tensors["score.weight"][0, 3] = math.nan
    safetensors.torch.save_file(tensors, tmp_path / "rm" / "model.safetensors", {"format": "pt"})
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1 with learning rate 0.001"):
        main(base, tmp_path / "out", "--rm_path", tmp_path / "rm")
    assert not (tmp_path / "out" / "config.json").exists()
