"""Stage 3, PPO and PPO-ptx: sample answers, score them with the reward model, and make the better ones likelier.
At the end (6), what RLOO, GRPO, GSPO and CISPO change.

    python ppo.py                                       the demo: reads out/sft and out/rm, writes out/ppo
    torchrun --standalone --nproc_per_node=2 ppo.py
    python ppo.py --pretrain SFT_DIR --rm_path RM_DIR --prompt_dataset prompts.jsonl --pretrain_dataset alpaca.json
    python ppo.py --algorithm grpo                      without a critic: writes out/grpo
    python ppo.py --algorithm grpo --reward_fn data/demo.py:reward      a rule judges the answers, no reward model
    python ppo.py --eval out/ppo --best_of 1,4,16       its reward, KL, win rate and gold score; best-of-n
    python ppo.py --sweep                               a run for each of several kl_coef: gold and proxy against the KL
    python ppo.py --max_steps 1 --show_tokens           an answer token by token: log-probabilities, KL, values, rewards

Schulman et al. 2017, "PPO" (arXiv 1707.06347); Schulman et al. 2016, "GAE" (1506.02438); Ziegler et al. 2019
(1909.08593) for the KL reward; Ouyang et al. 2022 (2203.02155) for ptx; Huang et al. 2024 (2403.17031) for the details
that decide.

Four models: the actor (policy) starts as the SFT model, and ref is the SFT model unchanged; the critic starts as the
reward model, and reward is the reward model unchanged. With --lora_rank only two are in memory: ref is the actor with
its adapter off, and the critic is an adapter and a head on the weights of the reward model. Where that is an adapter
itself, on the weights from which the actor starts, all four stand on one frozen base (Santacroce et al. 2023,
2310.00036).

A row is prompt | response | padding, all padding on the right, so no model needs a mask. Prompt of 3, response of 4:

    column     0    1    2    3    4    5    6    7      prompt_len = 3, T = 8, R = 5
    token      p0   p1   p2   a0   a1   a2   EOS  .
    response             |--- a0   a1   a2   EOS  .      mask  1 1 1 1 0       (B, R): True at response tokens, EOS too
    predicted from       p2   a0   a1   a2               column prompt_len - 1 + t: logp[t], ref_logp[t], value[t]
    score                                    r           read at the last response token, put into reward[3]

One update, with the papers' letters (x prompt, y response, beta = --kl_coef):
    1. rollout   y ~ pi(. | x) with the KV cache
    2. scoring   logp, ref_logp, value V, score r(x, y), which is --eos_penalty lower where y never ended
    3. reward_t = -beta * (logp_t - ref_logp_t), plus r at the last token of y
    4. delta_t = reward_t + gamma V_{t+1} - V_t;  adv_t = sum_l (gamma lam)^l delta_{t+l};  ret = adv + V;  adv whitened
    5. for --max_epochs, in minibatches, with rho = pi / pi_old: maximise min(rho adv, clip(rho, 1 - eps, 1 + eps) adv);
       fit V to ret;  ptx: the SFT loss on a batch of --pretrain_dataset is mixed in

The other algorithms draw --group_size answers to a prompt and need no critic:

    --algorithm   advantage of an answer's tokens     loss, with eps = --clip         KL to ref   mean over
    ppo           GAE, whitened                       a token's ratio, clipped        reward      tokens
    rloo          reward - mean of the K - 1 others   the same                        reward      tokens
    grpo          (reward - mean of K) / deviation    the same                        loss        an answer, answers
    gspo          as grpo                             the answer's ratio, clipped     loss        answers
    cispo         as grpo                             log pi, weight clipped          loss        tokens

The two places of the KL have two gradients. With k1 in the reward it is that of KL(pi, ref). k3 in the loss is
differentiated as it stands, as GRPO's paper does: its expectation is the gradient of KL(ref, pi).

Departures and choices:
 a. `ptx_coef * ptx + (1 - ptx_coef) * policy` as Coati has it; InstructGPT: policy + gamma * ptx, so
    ptx_coef = gamma / (1 + gamma).
 b. pi_old comes from the training forward (step 2), not from the cache: the ratio is then exactly 1 at the first
    update, which is checked. A ratio that is not 1 there means that two code paths disagree, and PPO would learn from
    the difference.
 c. --temperature divides the logits in the scores too: the policy that is improved is the one that was sampled from.
 d. Dropout is off throughout: with it, the ratio would be noise.
 e. gamma = 1: the score judges the answer as a whole. Advantages are whitened over the response tokens of all
    processes. Rewards are not: rm.py gives the SFT model's answers the mean 0, as InstructGPT has it, and whitening
    would take the size of the score back out.
 f. A response that reached the limit keeps its tokens; no EOS is invented. Its score is read where it stopped, less the
    penalty. Ziegler et al. cut at the first period after a number of tokens; a fixed score of -1 in place of the
    reward, as others have it, would hide which of such answers is better.
 g. RLOO's paper takes one step a batch and sums over an answer's tokens. Here the sum is divided by the tokens of the
    minibatch, and later steps are clipped as PPO's. The papers of GSPO and CISPO leave the KL out: --kl_coef 0.
    GSPO's paper clips at 3e-4 and 4e-4, for answers of thousands of tokens; the demo's have 40.

What "The N implementation details of RLHF with PPO" and its follow-up (Huang et al. 2023 and 2024) list, beside a to f:
    adaptive KL             --kl_target, off: a fixed beta is one run of a sweep, and compares with others
    critic's start          the reward model; with --reward_fn the SFT model and a new head, which --critic_warmup lets
                            learn first. It is another network than the actor, so that --vf_coef moves no policy
    padding                 on the right, here in rollouts too: the cache takes rows of unequal length, and no position
                            needs to be shifted. EOS is never the padding: its token is learnt
    sampling                from the whole distribution, without top-k or top-p: the ratio is that of this distribution
    learning rate           warm-up and a cosine here, a line to 0 there; AdamW's eps is 1e-8, theirs 1e-5 in PyTorch
    value clip, entropy     a clipped value and no bonus for entropy, as there: the KL to ref keeps the policy broad

Letters: B rows, b rows of a micro-batch, T columns, R longest response, N response tokens of a batch, C channels,
V vocabulary (in the steps above, V is the value).
"""

import copy
import math
import random
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import chain, count, islice
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora
import quantize
import rm
import sft
import zero
from data import demo, measure, records, rules, run, text, weights
from model import Llama
from rm import RewardModel
from sft import Stage


class Models(NamedTuple):
    actor: Llama
    critic: RewardModel | None      # None where the baseline is the mean of a group
    ref: Llama                      # with LoRA the same object as actor
    reward: RewardModel | rules.Rules   # with LoRA the critic shares its frozen weights


Optimizers = dict[str, zero.ZeRO2]      # of the "actor", and of the "critic" where there is one


class Prompt(NamedTuple):
    ids: list[int]
    record: dict        # as records.read_records gives it


class Experience(NamedTuple):
    """Answers, and what each step adds to them. The answers to one prompt are rows that follow one another."""
    # 1. rollout
    tokens: Tensor                      # (B, T) prompt | response | padding
    prompt_len: Tensor                  # (B,)
    mask: Tensor                        # (B, R) True at response tokens
    ended: Tensor                       # (B,) True where EOS came
    asked: list[dict] | None = None     # B records
    ids: list[list[int]] | None = None  # B answers
    said: list[str] | None = None       # the same as text
    # 2. scoring; without a critic, value and ret stay None
    logp: Tensor | None = None          # (B, R) of the policy that sampled
    ref_logp: Tensor | None = None      # (B, R)
    value: Tensor | None = None         # (B, R)
    by_rule: Tensor | None = None       # (B, F) of each function of --reward_fn
    score: Tensor | None = None         # (B,) of models.reward, less --eos_penalty where the answer never ended
    # 3. rewards, 4. advantages
    reward: Tensor | None = None        # (B, R)
    adv: Tensor | None = None           # (B, R)
    ret: Tensor | None = None           # (B, R)
    alike: Tensor | None = None         # (B,) True where all answers to the prompt have the same reward


def lengths(e: Experience) -> Tensor:
    """Tokens of prompt and response, (B,)."""
    return e.prompt_len + e.mask.sum(1)


def select(e: Experience, rows: Tensor) -> Experience:
    """Returns these rows (b,), without the columns of tokens that are padding in all of them."""
    e = Experience(*(x[rows] if isinstance(x, Tensor) else None for x in e))
    return e._replace(tokens=e.tokens[:, :lengths(e).max()])    # (b, T)


def by_length(e: Experience, rows: Tensor, size: int) -> tuple[Tensor, ...]:
    """Cuts these rows (b,) into parts of `size` that have similar lengths, so that little is computed for padding."""
    order = lengths(e)[rows].argsort(stable=True)               # (b,)
    return rows[order.cpu()].split(size)


# ---- 1. rollout -----------------------------------------------------------------------------------------------------

def seeded(*purpose: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for one purpose. No earlier draw changes it, so a resumed run needs no stored random state."""
    return torch.Generator(device).manual_seed(random.Random(repr(purpose)).getrandbits(60))


def rollout(actor: Llama, prompts: list[Prompt], purpose: tuple, stage: Stage, group_size: int = 1,
            announce: bool = False) -> Experience:
    """Step 1: answers this process's share of the prompts, each group_size times. purpose: see seeded.

    --experience_batch_size answers are drawn at a time."""
    args, stops = stage.args, actor.stops()
    rank, world, device, _ = stage.world
    prompts = prompts[rank::world] or prompts[:1]       # fewer prompts than processes: the first is answered again
    ids, asked = zip(*(prompt for prompt in prompts for _ in range(group_size)))
    generator = seeded(*purpose, rank, device=device)   # no two rollouts and no two processes sample alike
    answers = []
    with quantize.packed(actor):
        for some in text.chunks(ids, args.experience_batch_size):
            room = [args.max_seq_len - len(prompt) for prompt in some]
            answers += actor.generate(some, room, args.temperature, generator=generator)
            if announce:
                stage.say(f"rollout: {len(answers)} of {len(ids)} answers")
    tokens, _ = text.pad([prompt + answer for prompt, answer in zip(ids, answers)])         # (B, T)
    _, mask = text.pad(answers)                                                             # (B, R)
    prompt_len = torch.tensor([len(prompt) for prompt in ids])                              # (B,)
    ended = torch.tensor([answer[-1] in stops for answer in answers])                       # (B,)
    said = [stage.tokenizer.decode(answer) for answer in answers]
    return Experience(*(x.to(device) for x in (tokens, prompt_len, mask, ended)), list(asked), answers, said)


# ---- 2. scoring -----------------------------------------------------------------------------------------------------

def response_places(e: Experience) -> tuple[Tensor, Tensor, Tensor]:
    """Row, place in the response, and column of every response token, (N,) each. Padding costs no logits."""
    row, place = e.mask.nonzero(as_tuple=True)                                  # (N,), (N,)
    return row, place, e.prompt_len[row] + place


def logprobs(model: Llama, e: Experience, temperature: float = 1.0) -> Tensor:
    """Log-probability of every response token under softmax(logits / temperature), (B, R), zero elsewhere."""
    row, place, column = response_places(e)
    h = model.hidden(e.tokens, at=(row, column - 1))                            # (B, T) -> (N, C): see the picture
    logits = model.output(h).float() / temperature                              # (N, V)
    sampled = e.tokens[row, column]                                             # (N,)
    logp = -F.cross_entropy(logits, sampled, reduction="none")                  # (N,)
    return logp.new_zeros(e.mask.shape).index_put((row, place), logp)           # (B, R)


def critic_values(critic: RewardModel, e: Experience) -> Tensor:
    """Value of the state before each response token, (B, R), zero elsewhere."""
    row, place, column = response_places(e)
    value = critic.values(e.tokens, at=(row, column - 1))                       # (B, T) -> (N,)
    return value.new_zeros(e.mask.shape).index_put((row, place), value)         # (B, R)


def reward_scores(reward: RewardModel, e: Experience) -> Tensor:
    """The reward model's score at the last response token, (B,)."""
    row = torch.arange(len(e.tokens), device=e.tokens.device)                   # (B,)
    return reward.values(e.tokens, at=(row, lengths(e) - 1))                    # (B, T) -> (B,)


def kl_k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """log(pi / ref) of sampled tokens, (B, R): unbiased for KL(pi, ref), single terms may be negative.

    Schulman 2020, "Approximating KL divergence"."""
    return logp - ref_logp


def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """(ref / pi - 1) - log(ref / pi), (B, R): unbiased too, never negative, less variance.

    Built from ref / pi, not pi / ref."""
    log_ratio = ref_logp - logp
    return log_ratio.exp() - 1 - log_ratio


# ---- 3. rewards -----------------------------------------------------------------------------------------------------

def token_rewards(kl: Tensor, score: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """-kl_coef * kl (B, R) at every response token, and + score (B,) at the last one."""
    place = torch.arange(mask.shape[1], device=mask.device)                     # (R,)
    is_last = place == mask.sum(1, keepdim=True) - 1                            # (B, R)
    return torch.where(mask, -kl_coef * kl, 0.0) + is_last * score[:, None]


def next_kl_coef(kl_coef: float, kl: float, target: float) -> float:
    """Ziegler et al. 2019: beta (1 + K_beta e) with e = kl / target - 1, kept within +- 0.2, and K_beta = 0.1."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + 0.1 * error)


@torch.no_grad()
def scoring(models: Models, answers: Experience, args: Namespace) -> Experience:
    """Steps 2 and 3, all by the training forward and nothing from the cache."""
    parts, judge = [], models.reward
    if isinstance(judge, rules.Rules):
        found = judge.rewards(answers.asked, answers.said, answers.ended.tolist())
        by_rule = torch.tensor(found, device=answers.tokens.device)                             # (B, F)
        weight = by_rule.new_tensor([rule.weight for rule in judge.rules])                      # (F,)
        answers = answers._replace(by_rule=by_rule, score=by_rule @ weight)                     # (B,)
    order = by_length(answers, torch.arange(len(answers.tokens)), args.train_batch_size)
    for rows in order:                                                                          # 2. scoring
        e = select(answers, rows)
        found = {"logp": logprobs(models.actor, e, args.temperature)}                           # (b, R)
        if models.critic is not None:
            found["value"] = critic_values(models.critic, e)                                    # (b, R)
        # With LoRA, ref is the actor with its adapter off.
        with lora.disabled(models.ref) if models.ref is models.actor else nullcontext():
            found["ref_logp"] = logprobs(models.ref, e, args.temperature)                       # (b, R)
        score = reward_scores(judge, e) if e.score is None else e.score                         # (b,)
        found["score"] = score - args.eos_penalty * ~e.ended                                    # (b,)
        parts.append(found)
    back = torch.cat(order).argsort()                                                           # (B,)
    e = answers._replace(**{name: torch.cat([part[name] for part in parts])[back] for name in found})   # B again
    kl_coef = 0.0 if ALGORITHMS[args.algorithm].kl_in_loss else args.kl_coef
    return e._replace(reward=token_rewards(kl_k1(e.logp, e.ref_logp), e.score, e.mask, kl_coef))    # 3. rewards (B, R)


# ---- 4. advantages --------------------------------------------------------------------------------------------------

def gae(reward: Tensor, value: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: reward, value (B, R), mask (B, R) True at response tokens -> adv, ret (B, R).

    Values and rewards at masked places change nothing at response tokens. After the last token the value is 0: the
    answer is over."""
    value, reward = torch.where(mask, value, 0.0), torch.where(mask, reward, 0.0)
    adv = torch.zeros_like(value)
    next_adv = next_value = torch.zeros_like(value[:, 0])                       # (B,)
    for t in reversed(range(value.shape[1])):
        delta = reward[:, t] + gamma * next_value - value[:, t]                 # (B,)
        next_adv = torch.where(mask[:, t], delta + gamma * lam * next_adv, 0.0)
        next_value = value[:, t]
        adv[:, t] = next_adv                                                    # adv_t = delta_t + gamma lam adv_{t+1}
    return adv, adv + value


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """(x - mean) / std over the True places of mask (B, R) of all processes, zero elsewhere.

    std divides by n, so one token or equal tokens give zeros, not NaN."""
    x = torch.where(mask, x, 0.0)                                               # (B, R)
    n, total = run.all_reduce(torch.stack((mask.sum().to(x.dtype), x.sum())))
    centred = torch.where(mask, x - total / n.clamp(min=1), 0.0)
    variance = run.all_reduce(centred.square().sum()) / n.clamp(min=1)
    return centred / (variance.sqrt() + 1e-8)


def advantages(e: Experience, args: Namespace) -> Experience:
    """Step 4. Without a critic the baseline comes from the group, see 6."""
    if e.value is None:
        return group_advantages(e, args)
    adv, ret = gae(e.reward, e.value, e.mask, args.gamma, args.lam)             # (B, R), (B, R)
    return e._replace(adv=adv, ret=ret)


# ---- 5. update ------------------------------------------------------------------------------------------------------

Mean = Callable[[Tensor, Tensor], Tensor]       # of x (B, R) over the True places of mask (B, R), see MEANS


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x over the True places of mask, any equal shapes; 0 where there are none."""
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def policy_loss(logp: Tensor, old_logp: Tensor, adv: Tensor, mask: Tensor, clip: float, clip_high: float | None = None,
                mean: Mean = masked_mean) -> tuple[Tensor, Tensor]:
    """Clipped surrogate, to be minimised: mean over response tokens of max(-rho adv, -clip(rho) adv).

    rho = pi / pi_old, all (B, R). Returns the loss and clipfrac, the share of tokens where the clipped term is larger.
    clip_high, where it is given, is the upper bound's own eps ("clip-higher" of DAPO, Yu et al. 2025, 2503.14476).
    Clipped and masked tokens have gradient 0. They leave the graph before the exponential: if it overflowed, backward
    would compute 0 * infinity, which is NaN."""
    log_ratio = torch.where(mask, logp - old_logp, 0.0)
    ratio = log_ratio.detach().exp()
    clipped = -adv * clipped_ratio(ratio, clip, clip_high)
    is_clipped = clipped > -adv * ratio
    unclipped = -adv * log_ratio.masked_fill(is_clipped, 0.0).exp()
    worse = torch.where(is_clipped, clipped, unclipped)         # max(-rho adv, -clip(rho) adv)
    return mean(worse, mask), mean(is_clipped.float(), mask)


def clipped_ratio(ratio: Tensor, clip: float, clip_high: float | None) -> Tensor:
    return ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))


def value_loss(value: Tensor, old_value: Tensor, ret: Tensor, mask: Tensor, clip: float) -> Tensor:
    """0.5 * mean over response tokens of max((V - ret)^2, (V_clipped - ret)^2), all (B, R).

    V_clipped is V, kept within `clip` of V_old."""
    value, old_value, ret = (torch.where(mask, x, 0.0) for x in (value, old_value, ret))
    clipped = old_value + (value - old_value).clamp(-clip, clip)
    worse = torch.maximum((value - ret).square(), (clipped - ret).square())
    return 0.5 * masked_mean(worse, mask)


def counts(mask: Tensor) -> Tensor:
    """The numbers of tokens and of answers in mask (B, R), (2,): every answer has a first token."""
    return torch.stack((mask.sum(), mask[:, 0].sum()))


def micro_batches(e: Experience, minibatch: Tensor, size: int) -> Iterator[tuple[Experience, dict[str, float], bool]]:
    """Cuts a minibatch into parts of `size` rows. Yields the part, its shares, and whether it is the last.

    A loss is a mean over the tokens of a part, or over its answers. Times the part's share of these, and summed over
    parts and processes, it is the mean over those of all processes. Every process has equally many rows, so equally
    many parts."""
    total = run.all_reduce(counts(e.mask[minibatch]))           # of all processes
    parts = by_length(e, minibatch, size)
    for rows in parts:
        share = counts(e.mask[rows]) / total
        yield select(e, rows), dict(zip(("tokens", "answers"), share.tolist())), rows is parts[-1]


def update(models: Models, optimizers: Optimizers, e: Experience, ptx: Iterator[list], schedule: float, step: int,
           stage: Stage) -> dict[str, float]:
    """Steps 4 (whitening) and 5 on the experience of update `step`.

    ptx: a stream of batches of examples. schedule: the share of each peak learning rate. Returns means over the
    minibatches, by their names in metrics.jsonl."""
    args, logged = stage.args, []
    lr = 0.0 if step <= args.critic_warmup else schedule * args.lr
    algorithm = ALGORITHMS[args.algorithm]
    unit = "tokens" if args.no_length else algorithm.unit
    if models.critic is not None and not args.no_whiten:
        e = e._replace(adv=whiten(e.adv, e.mask))                                   # 4. advantages
    for epoch in range(args.max_epochs):                                            # 5. update
        generator = seeded("minibatches", args.seed, step, epoch)
        order = torch.randperm(len(e.tokens), generator=generator)
        for minibatch in order.split(args.train_batch_size * args.accumulation_steps):
            sums = {"loss/ptx_avg": e.adv.new_zeros(())}
            for old, shares, last in micro_batches(e, minibatch, args.train_batch_size):
                tokens, share = shares["tokens"], shares[unit]
                logp = logprobs(models.actor, old, args.temperature)                # (b, R)
                pg_loss, clipfrac = algorithm.loss(logp, old.logp, old.adv, old.mask, args.clip, args.clip_high,
                                                   MEANS[unit])
                new = logp.detach()
                change = new - old.logp                                             # (b, R)
                if step == 1 and not logged:
                    check_ratio(change[old.mask].abs(), stage)
                figures = {
                    "loss/policy_avg": share * pg_loss,
                    "policy/clipfrac_avg": share * clipfrac,
                    "policy/approxkl_avg": tokens * masked_mean(kl_k3(old.logp, new), old.mask),
                    "val/ratio": tokens * masked_mean(change.exp(), old.mask),
                    "policy/entropy_avg": tokens * masked_mean(-new, old.mask),
                }
                if algorithm.kl_in_loss:
                    kl_loss = MEANS[unit](kl_k3(logp, old.ref_logp), old.mask)
                    pg_loss = pg_loss + args.kl_coef * kl_loss
                    figures["loss/kl_avg"] = share * kl_loss
                optimizers["actor"].backward((1 - args.ptx_coef) * share * pg_loss, last=last and not args.ptx_coef)
                if models.critic is not None:
                    value = critic_values(models.critic, old)                       # (b, R)
                    vf_loss = value_loss(value, old.value, old.ret, old.mask, args.value_clip)
                    optimizers["critic"].backward(args.vf_coef * tokens * vf_loss, last=last)
                    figures["loss/value_avg"] = tokens * vf_loss
                sums |= {name: sums.get(name, 0.0) + x.detach() for name, x in figures.items()}
            if args.ptx_coef:
                sums["loss/ptx_avg"] = ptx_backward(models.actor, optimizers["actor"], next(ptx), stage)
            row = run.reduce_sums(sums)
            logged.append(row)
            loss = sum(x for name, x in row.items() if name.startswith("loss/"))
            run.stop_if_broken(loss, step, lr, args)
            optimizers["actor"].step(lr)
            if models.critic is not None:
                optimizers["critic"].step(schedule * args.critic_lr)
        means = {name: fmean(row[name] for row in logged) for name in row}
        early_stop = 0 < args.target_kl < means["policy/approxkl_avg"]              # the same on all processes
        if early_stop:
            break
    return means | {"early_stop": int(early_stop), "minibatches": len(logged), "lr": lr}


def check_ratio(change: Tensor, stage: Stage) -> None:
    """Departure b: before the first update the ratio is exp(0) = 1. Raises FloatingPointError if it is not.

    change (N,) is |logp - old_logp|. In coarse dtypes it is not exactly 0, so a large one only warns."""
    if stage.dtype == torch.float32 and change.max() > 1e-4:
        raise FloatingPointError("the ratio is not 1 before the first update: log-probabilities differ by "
                                 f"{change.max():.2e}; scoring and update compute different things")
    if stage.dtype != torch.float32 and change.mean() > 0.05:
        stage.say(f"warning: before the first update log-probabilities differ by {change.mean():.3f} on average: "
                  f"{stage.dtype} is too coarse for this model, try --dtype fp32")


def ptx_backward(actor: Llama, optimizer: zero.ZeRO2, batch: list, stage: Stage) -> Tensor:
    """Backward of the weighted SFT loss of a ptx batch, as the step's last micro-batch.

    Returns this process's part of the loss."""
    tokens, _, target = text.collate(batch[stage.world.rank::stage.world.world])
    loss = sft.lm_loss(actor, tokens, target) / sum(sum(learnt) for _, learnt in batch)
    optimizer.backward(stage.args.ptx_coef * loss, last=True)
    return loss.detach()


# ---- 6. the other algorithms: what they change -----------------------------------------------------------------------

def leave_one_out(reward: Tensor) -> Tensor:
    """RLOO, Ahmadian et al. 2024 (2402.14740): reward (P, K) less the mean of the K - 1 others of its group."""
    others = (reward.sum(1, keepdim=True) - reward) / (reward.shape[1] - 1)
    return reward - others


def group_centred(reward: Tensor) -> Tensor:
    """Dr. GRPO, Liu et al. 2025 (2503.20783): reward (P, K) less the mean of its group."""
    return reward - reward.mean(1, keepdim=True)


def group_normalised(reward: Tensor) -> Tensor:
    """GRPO, Shao et al. 2024 (2402.03300): (reward - mean) / deviation of its group, (P, K).

    The deviation divides by K. Dr. GRPO's objection: it gives more weight to a prompt whose answers hardly differ."""
    centred = group_centred(reward)
    deviation = centred.square().mean(1, keepdim=True).sqrt()                       # (P, 1)
    return centred / (deviation + 1e-8)


def group_advantages(e: Experience, args: Namespace) -> Experience:
    """Step 4 without a critic: every token of an answer has the advantage of the whole answer.

    A group whose rewards are all alike teaches nothing. Rounding is kept from being divided by a deviation near 0."""
    estimate = ALGORITHMS[args.algorithm].advantages
    reward = e.reward.sum(1).view(-1, args.group_size)                              # (P, K)
    adv = group_centred(reward) if args.no_std else estimate(reward)                # (P, K)
    alike = torch.isclose(reward.amax(1, keepdim=True), reward, rtol=1e-5, atol=1e-5).all(1, keepdim=True)  # (P, 1)
    adv = adv.masked_fill(alike, 0.0).view(-1, 1) * e.mask                          # (B, R)
    return e._replace(adv=adv, alike=alike.expand_as(reward).flatten())


def answer_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the answers of the mean over an answer's tokens, as GRPO has it: x, mask (B, R).

    A token of a long answer counts less than one of a short answer (Dr. GRPO's other objection)."""
    return (torch.where(mask, x, 0.0).sum(1) / mask.sum(1)).mean()


def gspo_loss(logp: Tensor, old_logp: Tensor, adv: Tensor, mask: Tensor, clip: float, clip_high: float | None,
              mean: Mean) -> tuple[Tensor, Tensor]:
    """GSPO, Zheng et al. 2025 (2507.18071): PPO's loss with one ratio an answer, (pi(y) / pi_old(y))^(1 / |y|)."""
    log_ratio = torch.where(mask, logp - old_logp, 0.0).sum(1, keepdim=True) / mask.sum(1, keepdim=True)    # (B, 1)
    first = mask[:, :1]                                                             # (B, 1), True
    return policy_loss(log_ratio, torch.zeros_like(log_ratio), adv[:, :1], first, clip, clip_high, mean)


def cispo_loss(logp: Tensor, old_logp: Tensor, adv: Tensor, mask: Tensor, clip: float, clip_high: float | None,
               mean: Mean) -> tuple[Tensor, Tensor]:
    """CISPO, MiniMax 2025 (2506.13585): mean of -clip(rho) adv log pi, where clip(rho) is a weight without gradient.

    A clipped token still learns, with a bounded weight; in PPO's loss it has no gradient."""
    logp, adv = (torch.where(mask, x, 0.0) for x in (logp, adv))
    ratio = (logp.detach() - old_logp).exp()
    weight = clipped_ratio(ratio, clip, clip_high)
    return mean(-weight * adv * logp, mask), mean((weight != ratio).float(), mask)


MEANS = {"tokens": masked_mean, "answers": answer_mean}


class Algorithm(NamedTuple):
    advantages: Callable        # gae, or a function of the rewards of groups (P, K)
    loss: Callable
    kl_in_loss: bool            # k3 in the loss, or k1 in the reward
    unit: str                   # what a loss is a mean over, see MEANS
    preset: dict                # flags that are not PPO's


ALGORITHMS = {
    "ppo": Algorithm(gae, policy_loss, False, "tokens", {}),
    "rloo": Algorithm(leave_one_out, policy_loss, False, "tokens", {"group_size": 4}),
    "grpo": Algorithm(group_normalised, policy_loss, True, "answers", {"group_size": 8}),
    "gspo": Algorithm(group_normalised, gspo_loss, True, "answers", {"group_size": 8, "clip": 3e-3, "clip_high": 4e-3}),
    "cispo": Algorithm(group_normalised, cispo_loss, True, "tokens", {"group_size": 8, "clip": 1.0, "clip_high": 1.0}),
}


# ---- the loop -------------------------------------------------------------------------------------------------------

def batches(items: list, lengths: list[int], size: int, seed: int, seen: int) -> Iterator[list]:
    """An endless stream of batches, each epoch shuffled anew, from item number `seen` on.

    A batch may cross the end of an epoch, so after n batches exactly n * size items were seen."""
    order = chain.from_iterable(text.epoch_order(lengths, size, seed, epoch) for epoch in count())
    left = islice(order, seen, None)
    while True:
        yield [items[i] for i in islice(left, size)]


def train(models: Models, optimizers: Optimizers, prompts: list, examples: list, meta: dict, updates: int,
          stage: Stage) -> dict:
    """The updates after meta["step"]. meta: what a checkpoint holds beside weights. Returns figures of the summary."""
    args, world, first = stage.args, stage.world, meta["step"]
    now = stage._replace(args=copy.copy(args))      # its kl_coef is that of the next update, see --kl_target
    now.args.kl_coef = meta.get("kl_coef", args.kl_coef)
    # Sizes are over all processes.
    rollout_size = args.experience_batch_size // args.group_size * world.world      # prompts of a rollout
    size = args.update_timesteps * rollout_size                 # prompts of an update
    ptx_size = args.ptx_batch_size * world.world                # ptx examples of a minibatch
    asked = batches(prompts, [0] * len(prompts), size, args.seed, meta["prompts_seen"])     # not sorted by length
    ptx = batches(examples, [len(ids) for ids, _ in examples], ptx_size, args.seed, meta["ptx_seen"])
    log = run.Log(args, world, first, updates)
    for step in range(first + 1, updates + 1):
        began = time.perf_counter()
        rollouts_left = args.num_episodes * args.max_timesteps - (step - 1) * args.update_timesteps
        chosen = next(asked)[:rollouts_left * rollout_size]             # the last update may have fewer
        announce = step == first + 1 and args.update_timesteps > 1      # minutes can pass before the first update
        purpose = ("rollout", args.seed, step)
        answers = rollout(models.actor, chosen, purpose, stage, args.group_size, announce)          # 1. rollout
        rolled = time.perf_counter()
        e = advantages(scoring(models, answers, now.args), args)                                    # 2. to 4.
        scored = time.perf_counter()
        if args.show_tokens:
            stage.say(show_tokens(e, stage.tokenizer))
        schedule = sft.cosine_lr(step, updates, 1.0, args.warmup)
        means = objective(e, stage) | update(models, optimizers, e, ptx, schedule, step, now)       # 5. update
        updated = time.perf_counter()
        tokens = args.group_size * (sum(len(prompt.ids) for prompt in chosen) + means["response_length"] * len(chosen))
        row = means | log.row(step, means["loss/policy_avg"], means["lr"], tokens, began) | {
            "objective/kl_coef": now.args.kl_coef,
            "seconds/rollout": rolled - began,
            "seconds/scoring": scored - rolled,
            "seconds/update": updated - scored,
            "skipped": sum(optimizer.skipped for optimizer in optimizers.values()),
        }
        log.append(row)
        log.progress(step, describe(row), step % args.log_interval == 0 or step <= 3)
        warn(row, meta["warned"], stage)
        meta["step"] = step
        meta["prompts_seen"] += size
        meta["ptx_seen"] += row["minibatches"] * ptx_size
        if args.kl_target:
            meta["kl_coef"] = next_kl_coef(now.args.kl_coef, row["objective/kl"], args.kl_target)
            now.args.kl_coef = meta["kl_coef"]
        run.save_checkpoint(args, world, meta, optimizers)
    return {"steps": meta["step"]} | log.figures()


def evaluate(models: Models, prompts: list[Prompt], when: str, stage: Stage) -> dict:
    """Reward and KL of answers to these prompts, sampled with a fixed seed, and the demo's gold score."""
    with quantize.packed(models.actor):
        figures = rm.measure(models.actor, when, stage)
    answers = rollout(models.actor, prompts, ("evaluate", stage.args.seed), stage)
    means = objective(scoring(models, answers, stage.args), stage)
    return figures | {f"reward_{when}": means["objective/scores"], f"kl_{when}": means["objective/kl"]}


# ---- what is printed and logged -------------------------------------------------------------------------------------

def objective(e: Experience, stage: Stage) -> dict[str, float]:
    """Means over the answers of all processes, by their names in metrics.jsonl."""
    sums = {
        "answers": torch.ones_like(e.score),
        "objective/kl": kl_k1(e.logp, e.ref_logp),      # summed over the tokens of an answer
        "objective/kl_k3": kl_k3(e.logp, e.ref_logp),
        "objective/entropy": -e.logp,
        "objective/scores": e.score,
        "objective/rlhf_reward": e.reward,
        "eos_rate": e.ended,
        "response_length": e.mask,
        "distinct_answers": e.score.new_tensor(len(set(map(tuple, e.ids)))),
    }
    if e.alike is not None:
        sums["alike_groups"] = e.alike
    if e.by_rule is not None and len(e.by_rule.T) > 1:
        sums |= {f"objective/{rule.file.stem}.{rule.name}": x for rule, x in zip(stage.args.reward_fn, e.by_rule.T)}
    if stage.is_demo:   # only logged: the reward parts from the gold score in the end (Gao et al. 2022, 2210.10760)
        sums["objective/gold"] = gold_scores(e)
    totals = run.reduce_sums({name: x.sum() for name, x in sums.items()})
    answers = totals.pop("answers")
    figures = {name: total / answers for name, total in totals.items()}
    spread = measure.variance(e.score, torch.ones_like(e.ended), run.all_reduce)
    figures["objective/scores_std"] = spread.sqrt().item()
    if e.ret is not None:
        figures["val/explained_variance"] = measure.explained_variance(e.value, e.ret, e.mask, run.all_reduce).item()
    return figures


def gold_scores(e: Experience) -> Tensor:
    """The demo's gold score of every answer, (B,)."""
    rows = zip(e.asked, e.said, e.ended.tolist())
    return e.score.new_tensor([demo.gold(asked["messages"][-1]["content"], said, ended) for asked, said, ended in rows])


def show_tokens(e: Experience, tokenizer: text.Tokenizer) -> str:
    """The first answer as a table, a token a line."""
    known = e._asdict() | {"kl": kl_k1(e.logp, e.ref_logp)}
    names = ("logp", "ref_logp", "kl", "value", "reward", "adv", "ret")
    columns = {name: known[name][0] for name in names if known[name] is not None}
    table = torch.stack([*columns.values()], 1).tolist()        # R rows of 7, or of 5 without a critic
    head = " ".join(f"{name:>7}" for name in columns)
    prompt = tokenizer.decode(e.tokens[0, :e.prompt_len[0]].tolist())
    lines = [f"prompt: {prompt}", f"{'token':>16} mask {head}"]
    pieces = [*map(tokenizer.piece, e.ids[0]), "(padding)"]
    for piece, real, row in zip(pieces, e.mask[0].tolist(), table):
        figures = " ".join(f"{x:7.3f}" for x in row)
        lines.append(f"{piece:>16} {real:4d} {figures}")
    ended = "ended" if e.ended[0] else "never ended"
    return "\n".join([*lines, f"score {e.score[0]:.3f}, {ended}"])


def plan(models: Models, prompts: int, examples: int, stage: Stage) -> tuple[int, int]:
    """Prints what the run will do and take. Returns the number of updates and the planned peak of memory."""
    args, world = stage.args, stage.world
    updates = math.ceil(args.num_episodes * args.max_timesteps / args.update_timesteps)
    updates = min(updates, args.max_steps or updates)
    learning = trained(models)
    parameters = sum(lora.trainable_report(model)[0] for model in learning)
    ptx = f"{examples} examples, weight {args.ptx_coef}" if examples else "off"
    stage.say(f"{prompts} prompts | {updates} updates of {args.update_timesteps} x {args.experience_batch_size} x "
              f"{world.world} answers, {args.max_epochs} epochs | ptx {ptx} | {parameters:,} parameters trained")
    learnt, answered = (rows * args.max_seq_len for rows in (args.train_batch_size, args.experience_batch_size))
    return updates, sft.say_memory(learning, modules(models[2:]), learnt, stage, answered)


OWN = {"loss/value_avg": "value loss", "alike_groups": "alike groups"}     # with a critic, and with groups


def describe(row: dict) -> str:
    """The progress line of an update."""
    own = "".join(f" | {name} {row[key]:.3f}" for key, name in OWN.items() if key in row)
    return (f"score {row['objective/scores']:+.3f} | kl {row['objective/kl']:.2f} | "
            f"clipfrac {row['policy/clipfrac_avg']:.3f}{own} | length {row['response_length']:.0f} | "
            f"eos {row['eos_rate']:.2f}")


def warn(row: dict, warned: list[str], stage: Stage) -> None:
    """Prints the warnings of data/measure.py that are true of this row, each once. warned: those that were printed."""
    for is_true, sentence in measure.WARNINGS:
        if sentence not in warned and is_true(row):
            warned.append(sentence)
            stage.say(f"warning: step {row['step']}: " + sentence.format_map(row))


def print_table(args: Namespace, summary: dict) -> None:
    """What the three stages did, from the summary.json of each."""
    print(f"\n{'stage':<24}{'seconds':>8}  {'figure':<18}{'before':>9}{'after':>9}")
    for directory, name, figure in (
            (args.pretrain, "eval_loss", "held-out loss"),
            (args.rm_path, "accuracy", "held-out accuracy"),
            (args.save_path, "gold", "gold score"),
            (args.save_path, "reward", "reward")):
        file = directory and directory / "summary.json"     # None: no reward model
        found = weights.read_json(file) if file and file.exists() else {}
        after = found.get(f"{name}_after", found.get(name))
        if after is not None:
            place, before = str(directory)[-23:], found[f"{name}_before"]
            print(f"{place:<24}{found['seconds']:>8.0f}  {figure:<18}{before:>9.3f}{after:>9.3f}")
    for when in ("before", "after"):
        if f"samples_{when}" in summary:
            distinct = summary[f"distinct_2_{when}"]
            print(f"\n{when} (distinct-2 {distinct:.3f}):", *summary[f"samples_{when}"], sep="\n  ")


# ---- models and data ------------------------------------------------------------------------------------------------

def modules(models: tuple) -> list[nn.Module]:
    return [model for model in models if isinstance(model, nn.Module)]


def trained(models: Models) -> list[nn.Module]:
    return modules((models.actor, models.critic))


def freeze(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Makes a model one that is not trained, and returns it.

    Parameters alone are cast: bf16 rotary tables could not tell far positions apart."""
    model.requires_grad_(False)
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model


def check_same_tokenizer(directory: Path, stage: Stage) -> None:
    """Raises ValueError if this model reads other text from ids than --pretrain."""
    tokenizer, _ = sft.open_tokenizer(directory, stage.args.template, stage.say)
    if tokenizer.fingerprint != stage.tokenizer.fingerprint:
        raise ValueError(f"{directory} has another tokenizer than {stage.args.pretrain}: its ids mean other text, "
                         "train it from this model")


def open_reward(stage: Stage, dtype: torch.dtype | None, actor: Llama | None = None) -> RewardModel | rules.Rules:
    """What gives the rewards: the model of --rm_path, its weights in this dtype, or the functions of --reward_fn.

    actor: whose weights it may share."""
    args = stage.args
    if args.reward_fn:
        return rules.Rules(args.reward_fn)
    check_same_tokenizer(args.rm_path, stage)
    trunk = reward_base(actor, stage) if args.lora_rank and actor is not None else None
    reward = RewardModel.from_pretrained(args.rm_path, dtype, stage.world.device, args.rm_pretrain, trunk)
    text.check_tokenizer(stage.tokenizer, reward.config.vocab_size)
    return reward


def trunk_of(actor: Llama) -> Llama:
    """A trunk with the actor's weights. Frozen ones are the same in memory."""
    trunk = lora.twin(actor)
    trunk.output = None
    return trunk


def reward_base(actor: Llama, stage: Stage) -> Llama | None:
    """The base of a reward model that is an adapter: the actor's weights, if it was trained on them.

    Says so if they are not."""
    args, start = stage.args, sft.origin(stage.args)
    base, reason = None, "is no adapter"
    if weights.is_adapter(args.rm_path):
        base = args.rm_pretrain or lora.base_path(args.rm_path)
        if weights.same(base, start):
            return trunk_of(actor)
        reason = f"is an adapter on {base}, which has other weights than {start}"
    stage.say(f"note: {args.rm_path} {reason}, so that critic and reward have a base of their own in memory: to share "
              f"the actor's, train it by `python rm.py --pretrain {args.pretrain} --lora_rank {args.lora_rank}`")
    return base and quantize.open_model(base, stage.dtype, stage.world.device, head=False)


def open_critic(actor: Llama, reward: RewardModel | rules.Rules, stage: Stage) -> RewardModel:
    """What the critic starts as: the reward model, or the actor's trunk and a new head where functions judge."""
    if stage.args.reward_fn:
        return RewardModel(trunk_of(actor), seeded("critic", stage.args.seed))
    if stage.args.lora_rank:
        freeze(reward.trunk, stage.dtype)       # so that the critic has the same in memory
    return lora.twin(reward)


def open_models(stage: Stage) -> Models:
    args = stage.args
    actor = sft.open_llama(stage)
    reward = open_reward(stage, sft.stored_dtype(stage), actor)
    has_critic = ALGORITHMS[args.algorithm].advantages is gae
    critic = open_critic(actor, reward, stage) if has_critic else None
    models = Models(actor, critic, actor if args.lora_rank else copy.deepcopy(actor), reward)
    for model in modules(models[2:]):
        freeze(model, stage.dtype)
    for model in trained(models) if args.lora_rank else modules(models):
        sft.set_up(model, args)
    for model in modules(models):
        model.eval()    # dropout off, see departure d
    return models


def check_lengths(args: Namespace, models: Models) -> None:
    """Raises ValueError if an answer does not fit into --max_seq_len, or that not into the models' context."""
    context = min(model.config.max_seq_len for model in modules(models))
    if args.max_seq_len > context:
        raise ValueError(f"--max_seq_len {args.max_seq_len} is beyond the models' context of {context} tokens")
    if args.max_input_len >= args.max_seq_len:
        raise ValueError(f"--max_input_len {args.max_input_len} leaves no room for an answer within "
                         f"--max_seq_len {args.max_seq_len}")


def check_groups(args: Namespace) -> None:
    """Raises ValueError if --group_size is too small for the algorithm, or does not divide the answers of a rollout."""
    size, answers, algorithm = args.group_size, args.experience_batch_size, args.algorithm
    if size == 1 and algorithm != "ppo":
        raise ValueError(f"--group_size 1 leaves --algorithm {algorithm} nothing to compare an answer with: give at "
                         "least 2, or take ppo")
    if answers % size:
        raise ValueError(f"--experience_batch_size {answers} is no multiple of --group_size {size}: make it one")


def encode_prompts(found: list[dict], stage: Stage) -> list[Prompt]:
    """Prompt records and their ids, without those that are too long."""
    limit = stage.args.max_input_len
    prompts = [Prompt(text.encode_prompt(record["messages"], stage.tokenizer, stage.template), record)
               for record in found]
    kept = [prompt for prompt in prompts if len(prompt.ids) <= limit]
    if not kept:
        shortest = min(len(prompt.ids) for prompt in prompts)
        raise ValueError(f"all {len(prompts)} prompts have more than --max_input_len {limit} tokens, the shortest "
                         f"{shortest}: raise it")
    if dropped := len(prompts) - len(kept):
        stage.say(f"note: {dropped} of {len(prompts)} prompts have more than --max_input_len {limit} tokens: left out")
    return kept


def read_prompts(stage: Stage) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts to train on, and those to measure on: the same, but in the demo pairs of things that never occur
    together in the files."""
    prompts = encode_prompts(sft.read_records(stage.args.prompt_dataset, "prompt", stage), stage)
    if not stage.is_demo:
        return prompts, prompts
    unseen = [records.normalise(record, "prompt") | {"record": record, "place": "a held-out prompt"}
              for record in demo.prompt_records(0, held=True)]
    return prompts, encode_prompts(unseen, stage)


def read_ptx(stage: Stage) -> list:
    """The examples of --pretrain_dataset as stage 1 encodes them. Without that flag, --ptx_coef becomes 0.

    With --ptx_coef 0 there are none, and no file is read."""
    args = stage.args
    if args.pretrain_dataset is None or args.ptx_coef == 0:
        args.ptx_coef = 0.0
        return []
    return sft.read_examples(args.pretrain_dataset, args.max_seq_len, stage)


# ---- 7. measuring: --eval, --best_of, --write, --sweep ---------------------------------------------------------------

def judged(models: Models, prompts: list[Prompt], size: int, stage: Stage) -> measure.Answers:
    """`size` answers of models.actor to every prompt, drawn by all processes."""
    mine = rollout(models.actor, prompts, ("measure", stage.args.seed), stage, size, announce=True)
    e = scoring(models, mine, stage.args)
    figures = {"proxy": e.score, "kl": kl_k1(e.logp, e.ref_logp).sum(1), "eos_rate": e.ended, "length": e.mask.sum(1)}
    if stage.is_demo:
        figures["gold"] = gold_scores(e)
    rows = zip(e.asked, e.said, e.ids, *(x.tolist() for x in figures.values()))
    everyone = chain.from_iterable(run.gather([*rows]))
    # The rows that are left out are of processes that had no prompt of their own.
    asked, said, ids, *columns = zip(*islice(everyone, len(prompts) * size))
    figures = {name: torch.tensor(column).view(-1, size) for name, column in zip(figures, columns)}     # (P, N)
    return measure.Answers(asked[::size], text.chunks(said, size), ids[::size], figures)


def best_records(found: measure.Answers) -> list[dict]:
    """Of every prompt the best answer that ended, as a record that sft.py trains on.

    Rejection sampling: Touvron et al. 2023, "Llama 2" (2307.09288)."""
    ended, kept = found.figures["eos_rate"], []
    best = found.figures["proxy"].masked_fill(~ended, -math.inf).argsort(dim=1, stable=True)[:, -1]     # (P,)
    for asked, said, n, any_ended in zip(found.asked, found.said, best.tolist(), ended.any(1).tolist()):
        if any_ended:
            record, answer = asked["record"], said[n].strip()
            messages = [*asked["messages"], {"role": "assistant", "content": answer}]
            # An instruction may have an input beside it.
            kept.append(record | {"output": answer} if "instruction" in record else {"messages": messages})
    return kept


def measured(args: Namespace) -> dict:
    """--eval: compares the model in this directory with the SFT model, on the first --eval_size held-out prompts.

    With --write the prompts are those to train on: held-out ones must not get into a training file."""
    stage = begin(args)
    check_same_tokenizer(args.eval, stage)
    device, dtype = stage.world.device, stage.dtype
    actor = quantize.open_model(args.eval, dtype, device)
    ref = quantize.open_model(args.pretrain, dtype, device, adapter="merge")
    for model in (actor, ref):
        model.stop_at(stage.stops, stage.tokenizer.bos_id)
    models = Models(actor, None, ref, open_reward(stage, dtype))
    for model in modules(models):
        freeze(model, dtype).eval()
    check_lengths(args, models)
    prompts, held = read_prompts(stage)
    asked = (prompts if args.write else held)[:args.eval_size]
    run.say_flags(stage.world, args)
    found = judged(models, asked, max(args.best_of), stage)
    plain = judged(models._replace(actor=ref, ref=actor), asked, 1, stage)     # its KL is not used
    figures = measure.compare(found, plain, args.best_of)
    if stage.world.rank == 0:
        weights.write_json(args.save_path / "eval.json", figures)
        print(f"{args.eval}, then {args.pretrain}; the win rate with its 95 % interval; best-of-n")
        print_rows([figures["model"], figures["sft"]])
        print_rows([figures["win_rate"]])
        print_rows(figures["best_of"])
        if args.write:
            kept = best_records(found)
            weights.write_json(args.write, kept)
            print(f"wrote {len(kept)} records: sft.py --pretrain {args.pretrain} --dataset {args.write}")
    return figures


def print_rows(rows: list[dict]) -> None:
    """A table of rows that have the same keys."""
    print("".join(f"{name:>12}" for name in rows[0]))
    for row in rows:
        print("".join(f"{x:12.4g}" for x in row.values()))


LADDER = [0.8, 0.4, 0.2, 0.1, 0.05, 0.0]        # kl_coef


def sweep(args: Namespace) -> dict:
    """--sweep: learns once for each kl_coef, until the KL is large or the gold score is below that of the SFT model.

    As Gao et al. 2022, "Scaling laws for reward model overoptimization" (2210.10760): gold and proxy against the KL,
    for the algorithm and for the best-of-n answers of the SFT model. The fewer comparisons taught the reward model, the
    sooner gold falls while the proxy still rises: in the demo, one of rm.py --max_datasets_size 400 shows it. A rung is
    a run in a directory of its own."""
    world = run.start(args.device, args.strategy)
    best_of = args.best_of if max(args.best_of) > 1 else [2**i for i in range(7)]
    plain = rung(args, args.save_path / "sft", {"eval": args.pretrain, "best_of": best_of})
    found = {"rungs": [], "best_of": plain["best_of"]}
    for kl_coef in args.sweep or LADDER:
        figures = rung(args, args.save_path / f"kl-{kl_coef:g}", {"kl_coef": kl_coef})["model"]
        found["rungs"].append({"kl_coef": kl_coef} | figures)
        if world.rank == 0:
            weights.write_json(args.save_path / "sweep.json", found)
            print_rows(found["best_of"])
            print_rows(found["rungs"])
        if figures["kl"] > measure.LARGE_KL or figures.get("gold", 0) < plain["model"].get("gold", 0):
            break
    return found


def rung(args: Namespace, folder: Path, changed: dict) -> dict:
    """The figures of a directory of the sweep: learns there, unless a model to measure is named.

    With --resume, eval.json tells that all this was done before, and a checkpoint that the run was begun."""
    if args.resume and (folder / "eval.json").exists():
        return weights.read_json(folder / "eval.json")
    flags = vars(args) | {"save_path": folder, "best_of": [1]} | changed
    if flags["eval"] is None:
        learn(Namespace(**flags | {"resume": args.resume and bool(run.checkpoints(folder))}))
    return measured(Namespace(**flags | {"eval": flags["eval"] or folder}))


# ---- command line ---------------------------------------------------------------------------------------------------

whole, number = run.whole, run.number
FLAGS = (
    # flag                     range                   usual  demo   meaning
    ("num_episodes",           whole(1),               10,    30,    "episodes"),
    ("max_timesteps",          whole(1),               10,    1,     "rollouts an episode"),
    ("update_timesteps",       whole(1),               10,    1,     "rollouts an update learns from"),
    ("max_epochs",             whole(1),               5,     1,     "passes over the rollouts of an update"),
    ("experience_batch_size",  whole(1),               8,     64,    "answers a process and rollout"),
    ("train_batch_size",       whole(1),               8,     8,     "answers a process and micro-batch"),
    ("ptx_batch_size",         whole(1),               1,     2,     "ptx examples a process and minibatch"),
    ("max_input_len",          whole(1),               96,    64,    "longest prompt in tokens; longer are left out"),
    ("max_seq_len",            whole(2),               128,   160,   "longest prompt with answer in tokens"),
    ("eval_size",              whole(1),               64,    64,    "prompts to measure reward and KL on"),
    ("group_size",             whole(1),               1,     1,     "answers a prompt, drawn together"),
    ("temperature",            number(0, above=True),  1.0,   1.0,   "of sampling, and of the log-probabilities"),
    ("eos_penalty",            number(),               1.0,   1.0,   "less score for an answer that never ended"),
    ("kl_coef",                number(),               0.1,   0.05,  "beta: weight of the KL to the SFT model"),
    ("kl_target",              number(),               0.0,   0.0,   "KL an answer that kl_coef adapts to (0: none)"),
    ("gamma",                  number(0, 1),           1.0,   1.0,   "discount"),
    ("lam",                    number(0, 1),           0.95,  0.95,  "lambda of GAE"),
    ("clip",                   number(0, 1),           0.2,   0.2,   "eps: the ratio is kept within 1 +- eps"),
    ("clip_high",              number(0, 10),          None,  None,  "eps above 1, if not --clip (DAPO: 0.28)"),
    ("value_clip",             number(0, 10),          0.4,   0.4,   "a new value counts within this of the old"),
    ("target_kl",              number(),               0.1,   0.1,   "no more epochs above this KL a token (0: off)"),
    ("critic_lr",              number(0, 1),           9e-6,  5e-4,  "the critic's peak learning rate"),
    ("critic_warmup",          whole(0),               0,     0,     "first updates, in which only the critic learns"),
    ("vf_coef",                number(),               1.0,   1.0,   "of the critic's loss; only --clip_grad feels it"),
    ("ptx_coef",               number(0, 1),           0.9,   0.02,  "ptx_coef * ptx + (1 - ptx_coef) * policy"),
)
# "usual" are Coati's values, except for the learning rates, which are 7e-6 there.
FINETUNE = {name: usual for name, _, usual, _, _ in FLAGS} | {
    "lr": 5e-6,
    "accumulation_steps": 1,
    "weight_decay": 0.0,
}
CORRECTIONS = {"no_std": ("grpo", "gspo", "cispo"), "no_length": ("grpo",), "no_whiten": ("ppo",),
               "critic_warmup": ("ppo",)}
DEMO = FINETUNE | {name: value for name, _, _, value, _ in FLAGS} | {
    "lr": 3e-4,
    "prompt_dataset": [demo.FOLDER / "prompts.jsonl"],
    "pretrain_dataset": [demo.FOLDER / "sft.jsonl.gz"],
}


def parse(argv: list[str] | None) -> Namespace:
    """Returns the flags of stage 3. Those that depend on the input are None until run.resolve fills them in."""
    parser = run.training_parser("Stage 3: PPO and PPO-ptx. Without flags, the demo: reads out/sft and out/rm, writes "
                                 "out/ppo.")
    flag = parser.add_argument
    flag("--rm_path", type=Path, help="the reward model that rm.py wrote")
    flag("--reward_fn", type=rules.rule, nargs="+", metavar="FILE.py:NAME[=WEIGHT]",
         help="functions (prompt, answer, record) -> float that give the reward instead of --rm_path")
    flag("--rm_pretrain", type=Path, help="base of a reward model that is an adapter, if it has moved")
    flag("--prompt_dataset", type=Path, nargs="+",
         help="prompts to answer: any record form, answers are ignored (data/records.py)")
    flag("--pretrain_dataset", type=Path, nargs="+",
         help="records for ptx, instruction, chat or text (without it, ptx_coef is 0)")
    flag("--algorithm", choices=ALGORITHMS, default="ppo",
         help="advantages and loss; all but ppo do without a critic and need --group_size above 1")
    flag("--no_std", action="store_true",
         help="grpo, gspo, cispo: do not divide advantages by the group's deviation (Dr. GRPO)")
    flag("--no_length", action="store_true",
         help="grpo: do not divide an answer's loss by its length: the mean is over all tokens (DAPO, Dr. GRPO)")
    flag("--no_whiten", action="store_true", help="ppo: leave advantages as GAE gives them")
    flag("--show_tokens", action="store_true", help="print the first answer of an update by tokens")
    flag("--eval", type=Path, metavar="DIR",
         help="train nothing: measure the model in this directory, against that of --pretrain, and write eval.json "
              "into --save_path (DIR/eval)")
    flag("--best_of", type=lambda given: [*map(whole(1), given.split(","))], default=[1], metavar="1,2,4",
         help="with --eval: what the best of so many answers a prompt would get, chosen by the reward; with --sweep up "
              "to 64")
    flag("--write", type=Path, metavar="FILE",
         help="with --eval: write the best answer to each of the first --eval_size prompts as a record for sft.py "
              "(rejection sampling)")
    flag("--sweep", type=number(), nargs="*", metavar="KL_COEF",
         help="one run for each kl_coef in turn, until the model is too far from the SFT model or its gold score "
              "falls; sweep.json, which serve.py's page draws, goes into --save_path (out/sweep)")
    for name, kind, _, _, meaning in FLAGS:
        flag(f"--{name}", type=kind, help=meaning)
    parser.tell(FINETUNE | {"save_path": "out/ALGORITHM"}, DEMO)
    args = parser.parse_args(argv)
    for name, algorithms in CORRECTIONS.items():
        if getattr(args, name) and args.algorithm not in algorithms:
            parser.error(f"--{name} changes {', '.join(algorithms)}: --algorithm {args.algorithm} has no such step")
    measures = args.eval or args.sweep is not None
    if args.write and not args.eval or max(args.best_of) > 1 and not measures:
        parser.error("--write and --best_of are of answers of --eval: name the model that gives them")
    if args.eval and (args.resume or args.sweep is not None):
        parser.error("--eval measures a model that is there: leave --sweep and --resume out")
    usual = Path("out", args.algorithm if args.sweep is None else "sweep")
    args.save_path = args.save_path or (args.eval / "eval" if args.eval else usual)
    args.pretrain = args.pretrain or run.finished(Path("out/sft"), "sft", "--pretrain")
    if args.reward_fn and args.rm_path:
        parser.error("--reward_fn gives the reward instead of --rm_path: name one of them")
    if not args.reward_fn:
        args.rm_path = args.rm_path or run.finished(Path("out/rm"), "rm", "--rm_path")
    return args


def begin(args: Namespace) -> Stage:
    """Settles the flags that depend on the input and on the algorithm."""
    is_demo = args.prompt_dataset is None and demo.is_demo(args.pretrain)
    if args.prompt_dataset is None and not is_demo:
        raise ValueError("--prompt_dataset is missing: name the prompts to answer")
    preset = (DEMO if is_demo else FINETUNE) | ALGORITHMS[args.algorithm].preset
    if args.reward_fn:
        preset["eos_penalty"] = 0.0     # a function judges itself an answer that never ended
    return sft.start(args, is_demo, preset, *filter(None, [args.rm_path]))


def learn(args: Namespace) -> dict:
    """A run of the algorithm, from the models' directories to summary.json."""
    stage = begin(args)
    check_groups(args)

    # models and data
    models = open_models(stage)
    check_lengths(args, models)
    prompts, held = read_prompts(stage)
    held, examples = held[:args.eval_size], read_ptx(stage)
    run.say_flags(stage.world, args)
    data = [[prompt.ids for prompt in prompts], examples]
    marks = {"algorithm": args.algorithm} | run.fingerprint(nn.ModuleList(trained(models)), data, args.seed)
    optimizers = {name: sft.make_optimizer(model, stage) for name, model in zip(("actor", "critic"), trained(models))}
    updates, planned = plan(models, len(prompts), len(examples), stage)

    # training
    with run.resumable(args):
        if args.resume:
            meta = run.load_checkpoint(args, stage.world, marks, optimizers)
        else:
            stage.say(f"answering {len(held)} prompts, to compare with afterwards")
            before = evaluate(models, held, "before", stage)
            meta = {"step": 0, "prompts_seen": 0, "ptx_seen": 0, "warned": [], "before": before, "marks": marks}
        figures = meta["before"] | train(models, optimizers, prompts, examples, meta, updates, stage)
        sft.save_model(models.actor, optimizers["actor"], stage)
        figures |= evaluate(models, held, "after", stage)
    figures |= {
        "kl": figures.pop("kl_after"),
        "skipped": sum(optimizer.skipped for optimizer in optimizers.values()),
        "planned_memory_bytes": planned,
    }
    summary = sft.finish(figures, {"kl": "KL to the SFT model {:.2f} nats an answer"}, stage)
    if stage.world.rank == 0:
        print_table(args, summary)
    return summary


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    if args.eval:
        return measured(args)
    return learn(args) if args.sweep is None else sweep(args)


if __name__ == "__main__":
    run.command(main)
