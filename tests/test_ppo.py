"""ppo.py: every formula against a hand-made table or a second way to compute it, then runs of tiny models."""

import argparse
import json
import math
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from data.text import Tokenizer
import data.records
import data.run
import data.text
import lora
import ppo
import sft
import zero
from data import demo
from model import Llama, LlamaConfig
from ppo import Experience, Models
from rm import RewardModel
from test_sft import ENV, TEMPLATE, TORCHRUN, kill_in, make_model, metrics, same, weights, write

WORLD = data.run.World(0, 1, torch.device("cpu"))
SIZES = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=48, vocab_size=1280, max_seq_len=160)
T = torch.tensor


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny(seed: int = 1, reward: bool = False):
    trunk = Llama(LlamaConfig(**SIZES), head=not reward, generator=drawn(seed)).eval()
    return RewardModel(trunk, drawn(seed)).eval() if reward else trunk


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with an SFT model, a reward model rm/, prompts.json (8) and ptx.json (5)."""
    folder = tmp_path_factory.mktemp("base")
    make_model(folder / "model")
    model = tiny(2, reward=True)
    model.config.extra["reward_mean"] = 0.3
    model.save_pretrained(folder / "rm")
    Tokenizer(demo.FOLDER).save(folder / "rm", "alpaca")
    write(folder / "prompts.json", demo.prompt_records(0)[:8])
    write(folder / "ptx.json", demo.instruction_records(5, 5))
    return folder


def flags(base, out, *further) -> list[str]:
    given = ["--pretrain", base / "model", "--rm_path", base / "rm", "--prompt_dataset", base / "prompts.json", "--save_path", out, "--max_input_len", 48, "--max_seq_len", 64,
             "--num_episodes", 3, "--max_timesteps", 1, "--update_timesteps", 1, "--max_epochs", 2, "--experience_batch_size", 4, "--train_batch_size", 2, "--lr", 1e-3,
             "--critic_lr", 1e-3, "--eval_size", 4, "--target_kl", 0, "--log_interval", 1, *further]
    return [str(flag) for flag in given]


def run(base, out, *further) -> dict:
    return ppo.main(flags(base, out, *further))


def resolved(base, out, *further) -> argparse.Namespace:
    args = ppo.parse(flags(base, out, *further))
    data.run.resolve(args, ppo.FINETUNE | {"kl_coef": 0.1})  # whatever the preset's becomes
    return args


def opened(base, out, *further) -> tuple[argparse.Namespace, Models]:
    """The four models of a run, and its flags."""
    args = resolved(base, out, *further)
    return args, ppo.open_models(args, sft.open_tokenizer(args, args.pretrain, WORLD), WORLD, torch.float32)[0]


def rows(prompts: list[list[int]], answers: list[list[int]]) -> tuple:
    """As rollout gives them: tokens, prompt_len, mask, ended."""
    return data.text.pad([p + a for p, a in zip(prompts, answers)])[0], T([len(p) for p in prompts]), data.text.pad(answers)[1], T([a[-1] == 2 for a in answers])


PROMPTS, ANSWERS = [[1, 40, 41, 42, 43], [1, 50, 51], [1, 60], [1, 70, 71, 72]], [[80, 81, 82, 2], [90, 2], [100, 101, 102, 103, 104, 105], [2]]


# ---- formulas -------------------------------------------------------------------------------------------------------

def test_gae_by_hand():
    """P04, P05: the critic's output on padding, or a reward there, in the advantages of real tokens."""
    mask = T([[True, True, False]])
    for odd in (100.0, -3.0, math.nan):
        adv, ret = ppo.gae(T([[0.0, 1.0, odd]]), T([[0.0, 0.0, odd]]), mask, 1.0, 0.95)
        assert adv.tolist()[0] == pytest.approx([0.95, 1, 0]) and ret.tolist()[0] == pytest.approx([0.95, 1, 0])
    adv, ret = ppo.gae(T([[0.1, -0.2, 1.0]]), T([[0.5, 0.4, 0.3]]), T([[True] * 3]), 0.9, 0.5)
    # deltas: 0.1 + 0.36 - 0.5 = -0.04;  -0.2 + 0.27 - 0.4 = -0.33;  1 - 0.3 = 0.7
    assert adv.tolist()[0] == pytest.approx([-0.04 + 0.45 * (-0.33 + 0.45 * 0.7), -0.33 + 0.45 * 0.7, 0.7]) and ret.tolist()[0] == pytest.approx([0.45325, 0.385, 1.0])


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 1.0), (0.97, 0.0)])
def test_gae_is_the_double_sum(gamma, lam):
    g = drawn(0)
    reward, value = torch.randn(2, 5, 9, generator=g, dtype=torch.float64)
    lengths = [9, 1, 4, 7, 2]
    adv, ret = ppo.gae(reward, value, torch.arange(9) < T(lengths)[:, None], gamma, lam)
    for b, n in enumerate(lengths):
        v = [*value[b, :n].tolist(), 0.0]
        delta = [reward[b, t].item() + gamma * v[t + 1] - v[t] for t in range(n)]
        expected = [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)] + [0.0] * (9 - n)
        assert adv[b].tolist() == pytest.approx(expected, abs=1e-12)
        assert ret[b, :n].tolist() == pytest.approx([a + x for a, x in zip(expected[:n], v)], abs=1e-12)


def test_whitening_is_over_the_mask():
    """P17: n - 1 in the variance. And advantages that keep their mean (torchtune's shift_mean)."""
    mask = torch.rand(6, 7, generator=drawn(1)) < 0.6
    x = 5 + 3 * torch.randn(6, 7, generator=drawn(2))
    y = ppo.whiten(torch.where(mask, x, math.nan), mask)
    assert abs(y[mask].mean()) < 1e-6 and y[mask].std(correction=0).item() == pytest.approx(1, abs=1e-6) and not y[~mask].any()
    assert torch.allclose(y[mask], (x[mask] - x[mask].mean()) / x[mask].std(correction=0), atol=1e-6)
    for n in (0, 1):
        assert not ppo.whiten(x, torch.arange(42).view(6, 7) < n).any()
    assert not ppo.whiten(torch.full((2, 2), 3.0), torch.ones(2, 2, dtype=torch.bool)).any()
    two = ppo.whiten(T([[4.0, 8.0]]), T([[True, True]]))
    assert two.tolist()[0] == pytest.approx([-1, 1])
    # Two processes: round by round the n-th sum of each half is learnt, until a half can be computed with all sums given.
    sums = []
    for _ in range(3):
        given, halves = [[], []], []
        for half in (0, 1):
            known = iter(sums)
            halves.append(ppo.whiten(x[half::2], mask[half::2], lambda v: (given[half].append(v.clone()), next(known, v))[1]))
        sums = [a + b for a, b in zip(*given)]
    assert torch.allclose(torch.stack(halves, 1).flatten(0, 1), y, atol=1e-6)


def test_kl_estimators_are_unbiased():
    """Coati's k3 was built from pi / ref on samples of pi, which is another number."""
    logp, ref = torch.randn(2, 5, generator=drawn(3), dtype=torch.float64).log_softmax(-1)
    exact = F.kl_div(ref, logp, log_target=True, reduction="sum").item()  # KL(pi, ref)
    for estimator in (ppo.kl_k1, ppo.kl_k3):
        assert (logp.exp() * estimator(logp, ref)).sum().item() == pytest.approx(exact, abs=1e-12)
    assert (ppo.kl_k3(logp, ref) >= 0).all() and abs((logp.exp() * ppo.kl_k3(ref, logp)).sum().item() - exact) > 0.05


def test_reward_is_put_on_the_last_token():
    """P02: on the padding after EOS, and masked away; P13: an answer without EOS has its score at its last token."""
    _, _, mask, _ = rows([[1]] * 2, [[40, 41, 2], [40, 41, 42, 43, 44]])
    zeros = torch.zeros(2, 5)
    assert ppo.token_rewards(zeros, T([1.0, 2.0]), mask, 0.0).tolist() == [[0, 0, 1, 0, 0], [0, 0, 0, 0, 2]]
    kl = T([[0.5, -1.0, 2.0, 5.0, math.nan], [1.0, 1.0, 1.0, 1.0, 3.0]])  # P05: a difference of 5 at a masked place
    reward = ppo.token_rewards(kl, T([1.0, 2.0]), mask, 0.1)
    assert reward[0].tolist() == pytest.approx([-0.05, 0.1, 0.8, 0, 0]) and reward[1].tolist() == pytest.approx([-0.1] * 4 + [1.7])


def test_losses_by_hand():
    """P15: the value loss without its factor, or with it twice."""
    one = T([[True]])
    v = lambda x: T([[float(x)]])
    assert ppo.value_loss(v(1), v(0.5), v(2), one, 0.2).item() == pytest.approx(0.845)   # 0.5 * max(1, 1.3^2)
    assert ppo.value_loss(v(0.6), v(0.5), v(2), one, 0.2).item() == pytest.approx(0.98)  # within the clip
    for adv, ratio, loss, clipped in ((1, 1.5, -1.2, 1), (-1, 1.5, 1.5, 0), (1, 0.5, -0.5, 0), (-1, 0.5, 0.8, 1), (1, 1.1, -1.1, 0)):
        value, clipfrac = ppo.policy_loss(v(math.log(ratio)), v(0), v(adv), one, 0.2)
        assert (value.item(), clipfrac.item()) == pytest.approx((loss, clipped))


def test_masked_places_reach_no_loss():
    mask, x = T([[True, True, False], [True, False, False]]), torch.randn(4, 2, 3, generator=drawn(4))
    garbage = torch.where(mask, x, 1e4)
    results = []
    for a in (x, garbage):
        logp, value = a[0].clone().requires_grad_(), a[1].clone().requires_grad_()
        loss = ppo.policy_loss(logp, a[2], a[3], mask, 0.2)[0] + ppo.value_loss(value, a[2], a[3], mask, 0.2)
        loss.backward()
        assert not logp.grad[~mask].any() and not value.grad[~mask].any() and value.grad[mask].all()
        results.append((loss.item(), logp.grad[mask], value.grad[mask]))
    assert results[0][0] == results[1][0] and all(torch.equal(a, b) for a, b in zip(results[0][1:], results[1][1:]))
    mean = sum(max((p - r).item() ** 2, (q + min(max(p - q, -0.2), 0.2) - r).item() ** 2) for p, q, r in zip(x[1][mask], x[2][mask], x[3][mask])) / 3
    assert ppo.value_loss(x[1], x[2], x[3], mask, 0.2).item() == pytest.approx(mean / 2, rel=1e-5)
    assert ppo.masked_mean(x[0], torch.zeros(2, 3, dtype=torch.bool)).item() == 0


# ---- places in a row ------------------------------------------------------------------------------------------------

def test_value_is_that_of_the_state_before_the_token():
    """P01: values of the prompt. A critic that says its position: prompt of 5, answer of 4 -> 4 5 6 7."""
    tokens, prompt_len, mask, _ = rows(PROMPTS, ANSWERS)
    critic = SimpleNamespace(score=SimpleNamespace(weight=torch.zeros(1)), values=lambda tokens: torch.arange(tokens.shape[1]).expand(tokens.shape).float())
    values = ppo.critic_values(critic, tokens, prompt_len, mask)
    assert values.tolist() == [[4, 5, 6, 7, 0, 0], [2, 3, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6], [3, 0, 0, 0, 0, 0]]
    assert ppo.reward_scores(critic, tokens, prompt_len, mask).tolist() == [8, 4, 7, 4]  # the last token itself: EOS is read


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_distribution_sampled_from(temperature):
    """P07: logits not divided by the temperature. P12: a loss on the question. P27: EOS left out."""
    model, (tokens, prompt_len, mask, _) = tiny(), rows(PROMPTS, ANSWERS)
    kept = []
    model.norm.register_forward_hook(lambda module, x, y: kept.append(y) or y.retain_grad())
    logp = ppo.logprobs(model, tokens, prompt_len, mask, temperature)
    for b, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS)):
        log_softmax = (model(T([prompt + answer]))[0] / temperature).log_softmax(-1)
        expected = [log_softmax[len(prompt) - 1 + t, token].item() for t, token in enumerate(answer)]
        assert logp[b].tolist() == pytest.approx(expected + [0.0] * (6 - len(answer)), abs=1e-5)
    (logp * torch.rand(logp.shape, generator=drawn(5))).sum().backward()
    touched = kept[0].grad.abs().sum(-1) > 0
    columns = [[len(p) - 1 <= j < len(p) - 1 + len(a) for j in range(tokens.shape[1])] for p, a in zip(PROMPTS, ANSWERS)]
    assert touched.tolist() == columns


def test_scoring_does_what_the_five_steps_say(base, tmp_path):
    """P12, P13: per-token KL and final score of a batch, written down anew; tokens of an answer that never ended are as sampled."""
    args, models = opened(base, tmp_path, "--eos_penalty", 0.7, "--kl_coef", 0.2, "--temperature", 0.8)
    with torch.no_grad():
        for p in models.actor.parameters():
            p += 0.01 * torch.randn(p.shape, generator=drawn(6))
    tokens, prompt_len, mask, ended = rows(PROMPTS, ANSWERS)
    e = ppo.score(models, tokens, prompt_len, mask, ended, args, rows=3)
    assert torch.equal(e.tokens, tokens) and e.ended.tolist() == [True, True, False, True]
    loaded, reference = RewardModel.from_pretrained(base / "rm"), Llama.from_pretrained(base / "model")
    with torch.no_grad():
        for b, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS)):
            row, n = T([prompt + answer]), len(answer)
            kl = [(model(row)[0] / 0.8).log_softmax(-1)[range(len(prompt) - 1, len(prompt) - 1 + n), answer] for model in (models.actor, reference)]
            kl = (kl[0] - kl[1]).tolist()
            score = loaded(row, torch.ones_like(row, dtype=torch.bool)).item() - (0.0 if answer[-1] == 2 else 0.7)
            reward = [-0.2 * x for x in kl]
            reward[-1] += score
            assert e.score[b].item() == pytest.approx(score, abs=1e-5) and e.reward[b].tolist() == pytest.approx(reward + [0.0] * (6 - n), abs=1e-5)
    assert (e.logp - e.ref_logp).abs().max() > 1e-3
    assert torch.equal(e.ret, e.adv + torch.where(mask, e.value, 0.0)) and torch.equal(e.adv, ppo.gae(e.reward, e.value, mask, 1.0, 0.95)[0])
    figures = ppo.objective(e, lambda x: x)
    assert figures["objective/kl"] == pytest.approx((e.logp - e.ref_logp).sum().item() / 4, rel=1e-5)  # a sum over tokens, a mean over answers
    assert (figures["eos_rate"], figures["response_length"], figures["distinct_answers"]) == (0.75, 13 / 4, 1) and figures["objective/scores"] == pytest.approx(e.score.mean().item())
    joined = ppo.join([Experience(*(x[:2] for x in e)), Experience(*(x[2:] for x in e))])
    assert all(torch.equal(a, b) for a, b in zip(joined, e))


# ---- the update -----------------------------------------------------------------------------------------------------

def fixed(args: argparse.Namespace, models: Models) -> Experience:
    """Four scored answers, with advantages far from equal."""
    e = ppo.score(models, *rows(PROMPTS, ANSWERS), args, rows=4)
    return e._replace(adv=torch.randn(e.adv.shape, generator=drawn(7)) * e.mask, ret=torch.randn(e.adv.shape, generator=drawn(8)) * e.mask)


def update(models: Models, e: Experience, examples: list, args: argparse.Namespace, world: data.run.World = WORLD, schedule: float = 0.0) -> tuple[dict, list[dict], tuple]:
    """One update -> what it logs, and the gradient of its last minibatch by name, actor's and critic's. eps 1e-3: Adam's
    usual one blows rounding errors of a gradient near 0 up to whole steps."""
    optimizers = tuple(zero.ZeRO2(m.named_parameters(), torch.float32, eps=1e-3, max_norm=0.0) for m in models[:2])
    ptx = ppo.ptx_batches(examples, args.ptx_batch_size * world.world, 0, 0) if examples else None
    total = lambda x: data.run.all_reduce(x.clone())
    gradients = [{}, {}]
    for o, kept in zip(optimizers, gradients):  # a step frees its gradient
        def look(lr, divisor, o=o, kept=kept, update=o.update):
            kept.update({name: b.grad[span].clone() for b in o.buckets for name, span in zip(b.names, b.spans)})
            update(lr, divisor)
        o.update = look
    figures = ppo.update(models, optimizers, e, ptx, examples, schedule, 1, args, world, total, torch.float32)
    return figures, gradients, optimizers


def encoded(base) -> list:
    return [data.text.encode_example(r, Tokenizer(demo.FOLDER), TEMPLATE, 64) for r in data.records.read_records([base / "ptx.json"], "sft")]


def test_gradient_is_the_stated_mixture(base, tmp_path):
    """P23: (1 - c) g_ppo + c g_lm. And Coati's ptx took ids, labels and mask from three different batches: ours is the SFT loss."""
    examples, gradients = encoded(base), {}
    for c in (0.0, 0.3, 1.0):
        args, models = opened(base, tmp_path, "--ptx_coef", c, "--max_epochs", 1, "--train_batch_size", 4, "--ptx_batch_size", 4)
        e = fixed(args, models)
        figures, (gradients[c], critic), _ = update(models, e, examples if c else [], args)
    indices = next(ppo.ptx_batches(examples, 4, 0, 0))
    tokens, _, target = data.text.collate([examples[i] for i in indices])
    model = Llama.from_pretrained(base / "model")
    loss = sft.lm_loss(model, tokens, target) / target.sum()
    loss.backward()
    assert figures["loss/ptx_avg"] == pytest.approx(loss.item(), rel=1e-6)
    g_lm = {name: p.grad.flatten() for name, p in model.named_parameters()}
    model.zero_grad()
    adv = ppo.whiten(e.adv, e.mask)
    (-(ppo.logprobs(model, e.tokens, e.prompt_len, e.mask) - e.logp).exp() * adv).sum().div(e.mask.sum()).backward()  # ratio 1: nothing is clipped
    g_ppo = {name: p.grad.flatten() for name, p in model.named_parameters()}
    for name in g_lm:
        for c, g in gradients.items():
            assert (g[name] - (1 - c) * g_ppo[name] - c * g_lm[name]).abs().max() < 1e-6 * (1 + g[name].abs().max()), (name, c)
    model = RewardModel.from_pretrained(base / "rm")
    (0.5 * ((ppo.critic_values(model, e.tokens, e.prompt_len, e.mask) - e.ret) ** 2)[e.mask].mean()).backward()
    assert all((critic[name] - p.grad.flatten()).abs().max() < 1e-6 * (1 + p.grad.abs().max()) for name, p in model.named_parameters())
    assert figures["val/ratio"] == pytest.approx(1, abs=1e-6) and figures["policy/clipfrac_avg"] == 0


def test_micro_batches_change_nothing(base, tmp_path):
    """A mean of the means of 2 x 2 rows would weigh the tokens of short answers more."""
    results = []
    for shape in ((4, 1), (2, 2), (1, 4)):
        args, models = opened(base, tmp_path, "--max_epochs", 1, "--train_batch_size", shape[0], "--accumulation_steps", shape[1], "--vf_coef", 0.5)
        results.append(update(models, fixed(args, models), [], args))
    for figures, gradients, _ in results[1:]:
        assert all(figures[key] == pytest.approx(results[0][0][key], rel=1e-5, abs=1e-6) for key in figures)
        for ours, other in zip(gradients, results[0][1]):
            assert all((ours[name] - other[name]).abs().max() < 1e-5 * (1e-2 + other[name].abs().max()) for name in ours)


def test_ratio_that_is_not_one_stops_the_run(base, tmp_path, capsys):
    """P08: old and new log-probabilities from two code paths. fp32 stops, bf16 warns."""
    args, models = opened(base, tmp_path)
    e = fixed(args, models)
    with pytest.raises(FloatingPointError, match="the ratio is not 1 before the first update: .* differ by 1.00e-03"):
        update(models, e._replace(logp=e.logp - 1e-3 * e.mask), [], args)
    ppo.check_ratio(9e-5, torch.float32, WORLD)
    ppo.check_ratio(0.04, torch.bfloat16, WORLD)
    assert capsys.readouterr().out == ""
    ppo.check_ratio(0.06, torch.bfloat16, WORLD)
    assert "log-probabilities differ by 0.060 on average" in capsys.readouterr().out


def test_every_record_is_seen_once_an_epoch(base):
    """The position of a stream is all that a resumed run knows: it must be that of the unbroken one."""
    prompts = [[i] for i in range(7)]
    stream = [p[0] for k in range(14) for p in ppo.draw(prompts, 3, 0, 3 * k)]
    assert all(sorted(stream[i:i + 7]) == list(range(7)) for i in range(0, 42, 7)) and stream[:7] != stream[7:14] and stream != [p[0] for p in ppo.draw(prompts, 42, 1, 0)]
    examples = [([1] * n, []) for n in (5, 9, 2, 7, 3)]
    for batch in (3, 8):  # small file: cycled
        batches = ppo.ptx_batches(examples, batch, 0, 0)
        stream = [next(batches) for _ in range(10)]
        flat = sum(stream, [])
        assert {len(b) for b in stream} == {batch} and all(sorted(flat[i:i + 5]) == list(range(5)) for i in range(0, 30, 5))
        assert all(next(ppo.ptx_batches(examples, batch, 0, k * batch)) == stream[k] for k in range(10))


def test_no_two_rollouts_are_alike(base, tmp_path):
    """ColossalAI called torch.manual_seed(41) before each rollout: the same noise at every step and on every rank."""
    args, models = opened(base, tmp_path)
    answers = {}
    for what in (("rollout", 0, 0), ("rollout", 0, 1), ("rollout", 1, 0), ("evaluate", 0)):
        for rank in (0, 1):
            e, _, _ = ppo.experience(models, [[1, 40, 41]] * 4, what, Tokenizer(demo.FOLDER), args, data.run.World(rank, 2, WORLD.device))
            answers[what, rank] = str(e.tokens.tolist())
    assert len(set(answers.values())) == 8
    again, _, _ = ppo.experience(models, [[1, 40, 41]] * 4, ("rollout", 0, 1), Tokenizer(demo.FOLDER), args, data.run.World(1, 2, WORLD.device))
    assert str(again.tokens.tolist()) == answers[("rollout", 0, 1), 1]
    one = ppo.experience(models, [[1, 40, 41]], ("evaluate", 0), Tokenizer(demo.FOLDER), args, data.run.World(1, 2, WORLD.device))[0]
    assert len(one.tokens) == 1  # fewer prompts than processes


# ---- runs -----------------------------------------------------------------------------------------------------------

def spied(monkeypatch) -> list:
    """The models of each run, copies of their state at the start, and the arguments of check_ratio."""
    found, real, check = [], ppo.open_models, ppo.check_ratio

    def open_models(*rest):
        models, base = real(*rest)
        found.append(SimpleNamespace(models=models, before=[{n: p.detach().clone() for n, p in m.named_parameters()} for m in models], ratios=[]))
        return models, base
    monkeypatch.setattr(ppo, "open_models", open_models)
    monkeypatch.setattr(ppo, "check_ratio", lambda first, *rest: (found[-1].ratios.append(first), check(first, *rest)))
    return found


NAMES = {"step", "loss", "lr", "seconds", "tokens_per_second", "objective/kl", "objective/kl_k3", "objective/entropy", "objective/scores", "objective/rlhf_reward",
         "policy/approxkl_avg", "policy/clipfrac_avg", "val/ratio", "loss/policy_avg", "loss/value_avg", "loss/ptx_avg", "eos_rate", "response_length", "distinct_answers",
         "seconds/rollout", "seconds/scoring", "seconds/update"}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_changes_actor_and_critic_alone(base, tmp_path, monkeypatch, dtype):
    """P16, P28."""
    found = spied(monkeypatch)
    summary = run(base, tmp_path, "--pretrain_dataset", base / "ptx.json", "--ptx_coef", 0.3, "--ptx_batch_size", 2, "--dtype", dtype)
    models, before = found[0].models, found[0].before
    for model, old, changes in zip(models, before, (True, True, False, False)):
        now = dict(model.named_parameters())
        assert all(torch.equal(now[name], old[name]) != changes for name in now if not changes or "norm" not in name)
        assert not model.training and all(p.requires_grad == changes for p in now.values())
    assert same({n: p.float() for n, p in before[0].items()}, {n: p.to(models.ref.norm.weight.dtype).float() for n, p in before[2].items()}) or dtype == "bf16"
    assert all(torch.equal(before[1][name].to(models.ref.norm.weight.dtype), before[3][name]) for name in before[1]) and models.critic.reward_mean == models.reward.reward_mean == 0.3
    assert same(dict(RewardModel.from_pretrained(base / "rm").named_parameters()), before[1])
    actor = Llama.from_pretrained(tmp_path)
    assert all((p - q).abs().max() < (1e-9 if dtype == "fp32" else 1e-2) for p, q in zip(actor.parameters(), models.actor.parameters()))
    table = metrics(tmp_path)
    assert [row["step"] for row in table] == [1, 2, 3] == list(range(1, summary["steps"] + 1)) and all(NAMES <= row.keys() for row in table)
    assert abs(table[0]["objective/kl"]) == 0 and abs(table[-1]["objective/kl"]) > 0 and table[0]["loss/ptx_avg"] > 1 and table[0]["policy/approxkl_avg"] > 0
    assert found[0].ratios[0] < (1e-5 if dtype == "fp32" else 1e-2)
    saved = json.loads((tmp_path / "summary.json").read_text())
    assert {"reward_before", "reward_after", "kl", "seconds", "tokens_per_second", "peak_memory_bytes"} <= saved.keys() and saved["flags"]["kl_coef"] == 0.1
    assert Tokenizer(tmp_path).fingerprint == Tokenizer(demo.FOLDER).fingerprint and json.loads((tmp_path / "tokenizer_config.json").read_text())["template"] == "alpaca"


def test_critic_starts_as_the_reward_model(base, tmp_path):
    """P16, P28: its value at the last token is the score, reward mean included."""
    tokens, prompt_len, mask, _ = rows(PROMPTS, ANSWERS)
    scores = RewardModel.from_pretrained(base / "rm")(*data.text.pad([p + a for p, a in zip(PROMPTS, ANSWERS)]))
    for rank in (0, 2):
        _, models = opened(base, tmp_path, "--lora_rank", rank)
        at_end = models.critic.values(tokens)[range(4), prompt_len + mask.sum(1) - 1]
        with ppo.frozen(models):
            assert torch.equal(at_end, ppo.reward_scores(models.reward, tokens, prompt_len, mask)) and torch.allclose(at_end, scores, atol=1e-6)
        assert scores.abs().min() > 1e-3


def test_adapter_off_is_the_reference(base, tmp_path, monkeypatch):
    """P24: reference and policy the same LoRA model, KL always 0. P09: dropout in the update moves the ratio."""
    found, (tokens, prompt_len, mask, ended) = spied(monkeypatch), rows(PROMPTS, ANSWERS)
    with torch.no_grad():
        expected = ppo.logprobs(Llama.from_pretrained(base / "model"), tokens, prompt_len, mask)
        score = ppo.reward_scores(RewardModel.from_pretrained(base / "rm"), tokens, prompt_len, mask)
    before = {file: file.read_bytes() for file in base.rglob("*") if file.is_file()}
    run(base, tmp_path, "--lora_rank", 4, "--lora_dropout", 0.2)
    models, old = found[0].models, found[0].before
    assert models.ref is models.actor and models.reward.trunk is models.critic.trunk and found[0].ratios[0] < 1e-5
    for model, start in zip(models[:2], old):
        for name, p in model.named_parameters():
            trains = "lora_" in name or name == "score.weight"
            assert p.requires_grad == trains and torch.equal(p, start[name]) != trains, name
    assert torch.equal(models.reward.score.weight, old[3]["score.weight"])
    args = resolved(base, tmp_path)
    e = ppo.score(models, tokens, prompt_len, mask, torch.ones(4, dtype=torch.bool), args, rows=4)
    assert torch.equal(e.ref_logp, expected) and torch.equal(e.score, score) and (e.logp - expected).abs().max() > 1e-4
    rewards = metrics(tmp_path)
    assert rewards[0]["objective/kl"] == rewards[0]["objective/kl_k3"] == 0 < rewards[-1]["objective/kl_k3"]
    assert before == {file: file.read_bytes() for file in base.rglob("*") if file.is_file()}
    loaded = Llama.from_pretrained(lora.base_path(tmp_path)).eval()
    lora.load_adapter(loaded, tmp_path)
    with torch.no_grad():
        assert lora.base_path(tmp_path).samefile(base / "model") and torch.allclose(ppo.logprobs(loaded, tokens, prompt_len, mask), e.logp, atol=1e-6)
    for layer in lora.adapters(models.actor).values():  # noise in B: KL > 0
        layer.lora_B.data.normal_(std=0.05, generator=drawn(9))
    e = ppo.score(models, *rows(PROMPTS, ANSWERS), args, rows=4)
    assert ppo.masked_mean(ppo.kl_k3(e.logp, e.ref_logp), mask) > 1e-3 and torch.equal(e.ref_logp, expected)


def test_resumed_is_unbroken_to_the_bit(base, tmp_path, monkeypatch):
    more = ("--num_episodes", 6, "--save_interval", 3, "--pretrain_dataset", base / "ptx.json", "--ptx_coef", 0.3, "--ptx_batch_size", 2)
    whole = run(base, tmp_path / "whole", *more)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_in(patch, 5)
        run(base, tmp_path / "cut", *more)
    cut = run(base, tmp_path / "cut", *more, "--resume")
    clock = {"seconds", "tokens_per_second", "seconds/rollout", "seconds/scoring", "seconds/update"}
    tables = [[{key: x for key, x in row.items() if key not in clock} for row in metrics(tmp_path / name)] for name in ("whole", "cut")]
    assert tables[0] == tables[1] and len(tables[0]) == 6 and len({row["objective/scores"] for row in tables[0]}) == 6
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut")) and all(whole[key] == cut[key] for key in ("reward_before", "reward_after", "kl"))
    with pytest.raises(ValueError, match="of another seed"):
        run(base, tmp_path / "cut", *more, "--resume", "--seed", 1)


def test_the_streams_go_on_from_update_to_update(base, tmp_path, monkeypatch):
    """Also where --target_kl ends an update early: prompts and ptx examples, each once an epoch."""
    indices, asked, real, experience = [], [], ppo.ptx_backward, ppo.experience
    monkeypatch.setattr(ppo, "ptx_backward", lambda actor, optimizer, some, *rest: (indices.extend(some), real(actor, optimizer, some, *rest))[1])
    monkeypatch.setattr(ppo, "experience", lambda models, prompts, seed, *rest: (asked.extend(map(str, prompts) if seed[0] == "rollout" else []), experience(models, prompts, seed, *rest))[1])
    run(base, tmp_path, "--num_episodes", 4, "--target_kl", 1e-9, "--pretrain_dataset", base / "ptx.json", "--ptx_coef", 0.3, "--ptx_batch_size", 2)
    assert [(row["minibatches"], row["early_stop"]) for row in metrics(tmp_path)] == [(2, 1)] * 4 and len(indices) == len(asked) == 16
    assert all(sorted(indices[i:i + 5]) == list(range(5)) for i in (0, 5, 10)) and len(set(asked[:8])) == 8 and set(asked[8:]) == set(asked[:8])


def test_an_update_learns_from_several_rollouts(base, tmp_path, monkeypatch, capsys):
    sizes, real = [], ppo.update
    monkeypatch.setattr(ppo, "update", lambda models, optimizers, e, *rest: (sizes.append(len(e.tokens)), real(models, optimizers, e, *rest))[1])
    run(base, tmp_path, "--num_episodes", 1, "--max_timesteps", 5, "--update_timesteps", 2, "--max_epochs", 1, "--show_tokens", "--eos_penalty", 0)
    assert sizes == [8, 8, 4] and [row["minibatches"] for row in metrics(tmp_path)] == [4, 4, 2]
    prompt, table = capsys.readouterr().out.split("prompt: ")[1].split("token mask    logp ref_logp      kl   value  reward     adv     ret\n")
    lines = [line.split()[-8:] for line in table.split("\nscore ")[0].splitlines()]
    assert "### Instruction:" in prompt and len(lines) > 3
    assert all(float(kl) == pytest.approx(float(logp) - float(ref), abs=2e-3) for _, logp, ref, kl, *_ in lines)


@pytest.mark.parametrize("kl_coef", [0.1, 1.0])
def test_toy_reward_is_raised(base, tmp_path, monkeypatch, kl_coef):
    """P18: a point for every token 7, of which an answer has room for 8 or 9. Within 15 updates; a larger --kl_coef holds it back. P07: KL is not negative."""
    monkeypatch.setattr(ppo, "reward_scores", lambda reward, tokens, prompt_len, mask: (tokens == 7).sum(1).float())
    args = resolved(base, tmp_path, "--max_seq_len", 11, "--train_batch_size", 16, "--lr", 3e-3, "--critic_lr", 3e-3, "--ptx_coef", 0, "--eos_penalty", 0, "--kl_coef", kl_coef)
    small, scores, kl = LlamaConfig(**SIZES | {"vocab_size": 16}), [], []
    actor, critic = Llama(small, generator=drawn(1)).eval(), RewardModel(Llama(small, head=False, generator=drawn(2)), drawn(2)).eval()
    models = Models(actor, critic, *(ppo.frozen_copy(m, torch.float32) for m in (actor, critic)))
    optimizers = tuple(zero.ZeRO2(m.named_parameters(), torch.float32) for m in (actor, critic))
    for step in range(1, 16):
        e, _, _ = ppo.experience(models, [[1, 4, 5], [1, 6]] * 16, ("rollout", 0, step), SimpleNamespace(eos_id=2), args, WORLD)
        figures = ppo.objective(e, lambda x: x) | ppo.update(models, optimizers, e, None, [], 1.0, step, args, WORLD, lambda x: x, torch.float32)
        scores, kl = [*scores, figures["objective/scores"]], [*kl, figures["objective/kl"]]
    assert min(kl) > -0.1 and kl[0] == 0 and figures["policy/approxkl_avg"] < 0.5
    assert (scores[-1] > scores[0] + 4 and 10 < kl[-1] < ppo.KL_WARNING) if kl_coef == 0.1 else (scores[-1] > scores[0] + 0.3 and kl[-1] < 6)


def test_demo_preset_measures_gold(base, tmp_path, monkeypatch, capsys):
    """With no --prompt_dataset and the demo's tokenizer. The gold score itself is test_demo's."""
    gold = iter([0.25, 0.75])
    monkeypatch.setattr(demo, "measure", lambda *rest: {"gold": next(gold), "gold_en": 0.0, "gold_zh": 0.0, "distinct_2": 0.5, "samples": ["a -> b"]})
    summary = ppo.main([str(x) for x in ("--pretrain", base / "model", "--rm_path", base / "rm", "--save_path", tmp_path, "--max_steps", 1, "--max_input_len", 48, "--max_seq_len", 60, "--eval_size", 4,
                                         "--experience_batch_size", 4, "--max_datasets_size", 20, "--critic_lr", 0, "--lr", 0)])
    assert (summary["gold_before"], summary["gold_after"]) == (0.25, 0.75) and summary["flags"]["kl_coef"] == ppo.DEMO["kl_coef"] and summary["flags"]["ptx_coef"] == ppo.DEMO["ptx_coef"]
    assert 0 <= metrics(tmp_path)[0]["objective/gold"] <= 1
    assert "gold score            0.250    0.750" in capsys.readouterr().out and summary["kl"] == 0


def test_gold_of_a_step_is_of_its_own_answers():
    """Each answer by the rule, its prompt in the template."""
    tokenizer, asked = Tokenizer(demo.FOLDER), ["Write a story about a fox and a kite.", "写一个关于狐狸和风筝的故事。"]
    texts = ["The fox saw the kite. In the end, everyone was happy.", "狐狸"]
    prompts, answers = [data.text.encode_prompt([{"role": "user", "content": a}], tokenizer, TEMPLATE) for a in asked], [tokenizer.encode(t, bos=False, eos=t is texts[0]) for t in texts]
    tokens, _ = data.text.pad([p + a for p, a in zip(prompts, answers)])
    _, mask = data.text.pad(answers)
    e = ppo.Experience(tokens, torch.tensor([len(p) for p in prompts]), mask, torch.tensor([True, False]), *[torch.zeros(2)] * 7)
    assert ppo.mean_gold(e, tokenizer, lambda x: x) == pytest.approx((1.0 + 0.5 * 0.3) / 2)


def test_critic_can_be_trained_alone(base, tmp_path, monkeypatch):
    """--lr 0 holds the policy still, not the critic."""
    found = spied(monkeypatch)
    run(base, tmp_path, "--lr", 0, "--num_episodes", 1)
    assert same(weights(tmp_path), weights(base / "model")) and not torch.equal(found[0].models.critic.score.weight, found[0].before[1]["score.weight"])


# ---- two processes --------------------------------------------------------------------------------------------------

WORKER = """
import sys
from pathlib import Path
import torch
import data.run, data.text
import ppo, zero
from test_ppo import Experience, encoded, fixed, opened, run, update

torch.set_num_threads(1)
base, out = Path(sys.argv[1]), Path(sys.argv[2])
world = data.run.start("cpu", "ddp")
actors, real = [], ppo.open_models
ppo.open_models = lambda *rest: (actors.append(real(*rest)), actors[-1])[1]
for strategy in ("zero2", "zero2_cpu", "ddp"):
    run(base, out / strategy, "--pretrain_dataset", base / "ptx.json", "--ptx_coef", 0.3, "--ptx_batch_size", 1, "--strategy", strategy)
torch.save([p.data for m in actors[-1][0][:2] for p in m.parameters()], out / f"actor-{world.rank}.pt")
args, models = opened(base, out / "none", "--train_batch_size", 2, "--ptx_coef", 0.3, "--ptx_batch_size", 1)
e = Experience(*(x[world.rank::2] for x in fixed(args, models)))
figures, gradients, _ = update(models, e, encoded(base), args, world, 1.0)
torch.save((figures, gradients, [p.data for m in models[:2] for p in m.parameters()]), out / f"update-{world.rank}.pt")
data.run.stop()
"""


def test_two_processes(base, tmp_path):
    """minimind's ranks never averaged their gradients. Equal weights on both, and those of one process with all rows."""
    (tmp_path / "worker.py").write_text(WORKER)
    result = subprocess.run([*map(str, [*TORCHRUN, tmp_path / "worker.py", base, tmp_path])], env=ENV, capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stdout + result.stderr
    first, second = (torch.load(tmp_path / f"actor-{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, second)) and len(metrics(tmp_path / "ddp")) == 3
    assert all(torch.equal(p, q) for p, q in zip(Llama.from_pretrained(tmp_path / "ddp").parameters(), first))
    assert not same(weights(tmp_path / "ddp"), weights(base / "model"))
    for strategy in ("zero2", "zero2_cpu"):
        for key in ("loss", "loss/value_avg", "loss/ptx_avg", "objective/kl", "objective/scores"):
            assert [row[key] for row in metrics(tmp_path / strategy)] == pytest.approx([row[key] for row in metrics(tmp_path / "ddp")], rel=1e-3, abs=1e-5), (strategy, key)
    args, models = opened(base, tmp_path / "none", "--train_batch_size", 4, "--ptx_coef", 0.3, "--ptx_batch_size", 2)
    figures, gradients, _ = update(models, fixed(args, models), encoded(base), args, WORLD, 1.0)
    for rank in (0, 1):
        f, g, params = torch.load(tmp_path / f"update-{rank}.pt")
        assert figures == pytest.approx(f, rel=1e-4, abs=1e-6) and figures["minibatches"] == 2
        assert all((p - q).abs().max() < 1e-6 for p, q in zip(params, (p.data for m in models[:2] for p in m.parameters())))
        assert all((g[k][name] - gradients[k][name]).abs().max() < 1e-5 * (1e-2 + gradients[k][name].abs().max()) for k in (0, 1) for name in g[k])
    start = Llama.from_pretrained(base / "model")
    assert max((p - q).abs().max() for p, q in zip(start.parameters(), models.actor.parameters())) > 1e-4


# ---- bad input ------------------------------------------------------------------------------------------------------

BAD = {
    "temperature 0": (["--temperature", "0"], "--temperature 0 always gives the same answer"),
    "no room": (["--max_input_len", "64"], "--max_input_len 64 leaves no room for an answer within --max_seq_len 64"),
    "beyond the context": (["--max_seq_len", "161"], "--max_seq_len 161 is beyond the models' context of 160"),
    "all prompts too long": (["--max_input_len", "12"], "all 8 prompts have more than --max_input_len 12 tokens, the shortest 3"),
    "ptx_coef 2": (["--ptx_coef", "2"], "would turn the policy's loss around"),
    "nothing to evaluate": (["--eval_size", "0"], "--eval_size: must be at least 1, not 0"),
    "foreign tokenizer": (["--rm_path", "{}/foreign"], "has another tokenizer than .*train the reward model from this model"),
    "no reward model": (["--rm_path", "{}/model"], "has no score.weight: it is not a reward model, train one with rm.py"),
    "missing reward model": (["--rm_path", "{}/nowhere"], "nowhere does not exist"),
    "over the reward model": (["--save_path", "{}/rm"], "--save_path .* is --rm_path: the run would overwrite"),
    "missing prompts": (["--prompt_dataset", "{}/none.json"], "none.json does not exist"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_sentence(base, tmp_path, case):
    """P22: another tokenizer's ids would be scored."""
    more, message = BAD[case]
    if not (base / "foreign").exists():
        shutil.copytree(base / "rm", base / "foreign")
        with (base / "foreign" / "tokenizer.model").open("ab") as file:
            file.write(b"\xc0\x0c\x01")  # a field that sentencepiece does not know: it opens, and is another file
    with pytest.raises((ValueError, OSError), match=message) as caught:
        run(base, tmp_path, *(flag.replace("{}", str(base)) for flag in more))
    assert "\n" not in str(caught.value)


def test_missing_stage_names_its_command(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given, script in (([], "sft"), (["--pretrain", str(base / "model")], "rm")):
        with pytest.raises(FileNotFoundError, match=f"out/{script} does not exist: run {script}.py first"):
            ppo.main(given)


def test_long_prompts_are_counted_and_ptx_off_reads_nothing(base, tmp_path, capsys):
    """P20, P23."""
    write(tmp_path / "prompts.json", [*demo.prompt_records(0)[:3], {"instruction": "fox " * 30}, {"messages": [{"role": role, "content": said} for role, said in (("user", "Hi"), ("assistant", "Yes"), ("user", "Now?"))]}])
    run(base, tmp_path / "out", "--prompt_dataset", tmp_path / "prompts.json", "--num_episodes", 1, "--max_input_len", 60,
        "--max_seq_len", 70, "--pretrain_dataset", tmp_path / "none.json", "--ptx_coef", 0)
    out = capsys.readouterr().out
    assert "1 of 5 prompts have more than --max_input_len 60 tokens: left out" in out and "ptx off" in out and "ptx_coef=0.0" in out
    args = ppo.parse(flags(base, tmp_path, "--ptx_coef", 0.5))
    assert ppo.read_ptx(args, Tokenizer(demo.FOLDER), WORLD) == [] and args.ptx_coef == 0


def test_reward_of_nan_stops_the_run(base, tmp_path):
    shutil.copytree(base / "rm", tmp_path / "rm")
    tensors = weights(tmp_path / "rm")
    tensors["score.weight"][0, 3] = math.nan
    safetensors.torch.save_file(tensors, tmp_path / "rm" / "model.safetensors", {"format": "pt"})
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1 with learning rate 0.001"):
        run(base, tmp_path / "out", "--rm_path", tmp_path / "rm")
    assert not (tmp_path / "out" / "config.json").exists()
