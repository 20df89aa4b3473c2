"""Stage 3, PPO and PPO-ptx: sample answers, score them with the reward model, and make the better ones likelier.

    python ppo.py                                                       the demo: reads out/sft and out/rm, writes out/ppo
    torchrun --standalone --nproc_per_node=2 ppo.py
    python ppo.py --pretrain SFT_DIR --rm_path RM_DIR --prompt_dataset prompts.jsonl --pretrain_dataset alpaca_data.json --lora_rank 16
    python ppo.py --max_steps 1 --show_tokens                           one answer, token by token: log-probabilities, KL, values, rewards

Schulman et al. 2017, "PPO" (arXiv 1707.06347); Schulman et al. 2016, "GAE" (1506.02438); Ziegler et al. 2019 (1909.08593)
for the KL reward; Ouyang et al. 2022 (2203.02155) for ptx; Huang et al. 2024 (2403.17031) for the details that decide.

Four models: the actor (policy) starts as the SFT model, ref stays it; the critic starts as the reward model, reward stays it.
With --lora_rank there are two: ref is the actor with its adapter off, reward is the critic with its adapter off.

A row is prompt | response | padding, all padding on the right, so no model needs a mask. Prompt of 3, response of 4 (R = 5):

    column     0    1    2    3    4    5    6    7          prompt_len = 3, T = 8
    token      p0   p1   p2   a0   a1   a2   EOS  .
    response             |--- a0   a1   a2   EOS  .          mask  1 1 1 1 0       (B, R): True at response tokens, EOS too
    predicted from       p2   a0   a1   a2                   column prompt_len - 1 + t: logp[t], ref_logp[t], value[t]
    score                                    r               read at the last response token, put into reward[3]

One update, with the papers' letters (x prompt, y response, beta = --kl_coef):
    1. rollout   y ~ pi(. | x) with the KV cache
    2. scoring   logp, ref_logp, value, score r(x, y); less --eos_penalty where y never ended
    3. reward_t = -beta * (logp_t - ref_logp_t), and + r at the last token of y
    4. delta_t = reward_t + gamma V_{t+1} - V_t;  adv_t = sum_l (gamma lam)^l delta_{t+l};  ret = adv + V;  adv whitened
    5. for --max_epochs, in minibatches: maximise min(rho adv, clip(rho, 1 - eps, 1 + eps) adv), rho = pi / pi_old; fit V to ret
       ptx: the SFT loss on a batch of --pretrain_dataset is mixed in

Departures and choices:
 1. `ptx_coef * ptx + (1 - ptx_coef) * policy` as Coati has it; InstructGPT: policy + gamma * ptx, so ptx_coef = gamma / (1 + gamma).
 2. pi_old comes from the training forward (step 2), not from the cache: the ratio is then exactly 1 at the first update, which
    is checked; a ratio that is not 1 there means that two code paths disagree, and PPO would learn from the difference.
 3. --temperature divides the logits in the scores too: the policy that is improved is the one that was sampled from.
 4. Dropout is off throughout: with it, the ratio would be noise.
 5. gamma = 1: an answer is good or not as a whole. Advantages are whitened over all response tokens of all processes.
 6. A response that reached the limit keeps its tokens; no EOS is invented. Its score is read where it stopped, less the penalty.

Letters: B rows, T columns, R longest response, N response tokens of a batch, C channels, V vocabulary.
"""

import argparse
import copy
import json
import math
import random
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import lora
import sft
import zero
from data import demo, run, text
from data.records import read_records
from data.text import Tokenizer, check_tokenizer
from model import Llama
from rm import RewardModel

DEMO = {"prompt_dataset": [demo.FOLDER / "prompts.jsonl"], "pretrain_dataset": [demo.FOLDER / "sft.jsonl.gz"], "num_episodes": 24, "max_timesteps": 1, "update_timesteps": 1,
        "max_epochs": 2, "experience_batch_size": 64, "train_batch_size": 16, "accumulation_steps": 1, "ptx_batch_size": 4, "ptx_coef": 0.02, "lr": 3e-4, "critic_lr": 5e-4,
        "weight_decay": 0.0, "kl_coef": 0.05, "max_input_len": 64, "max_seq_len": 160}
# Coati: the same but lr 7e-6 for both, and ptx_coef 0.9 as here.
FINETUNE = {"num_episodes": 10, "max_timesteps": 10, "update_timesteps": 10, "max_epochs": 5, "experience_batch_size": 8, "train_batch_size": 8, "accumulation_steps": 1,
            "ptx_batch_size": 1, "ptx_coef": 0.9, "lr": 5e-6, "critic_lr": 9e-6, "weight_decay": 0.0, "kl_coef": 0.1, "max_input_len": 96, "max_seq_len": 128}
KL_WARNING = 30.0  # nats an answer; beyond it samples have little to do with the SFT model, and the reward model was never asked about such text


# ---- formulas -------------------------------------------------------------------------------------------------------

def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x over the True places of mask, any equal shapes; 0 where there are none."""
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def whiten(x: Tensor, mask: Tensor, all_reduce=lambda total: total) -> Tensor:
    """(x - mean) / std over the True places of mask (B, R), zero elsewhere. With all_reduce (a sum over processes) mean and
    std are those of all processes. std divides by n, so one token or equal tokens give zeros, not NaN."""
    x = torch.where(mask, x, 0.0)
    n, total = all_reduce(torch.stack((mask.sum().to(x.dtype), x.sum())))
    centred = torch.where(mask, x - total / n.clamp(min=1), 0.0)
    variance = all_reduce(centred.square().sum()) / n.clamp(min=1)
    return centred / (variance.sqrt() + 1e-8)


def kl_k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """log(pi / ref) of sampled tokens, (B, R): unbiased for KL(pi, ref), single terms may be negative (Schulman 2020, "Approximating KL")."""
    return logp - ref_logp


def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """(ref / pi - 1) - log(ref / pi), (B, R): unbiased too, never negative, less variance. Built from ref / pi, not pi / ref."""
    log_ratio = ref_logp - logp
    return log_ratio.exp() - 1 - log_ratio


def token_rewards(kl: Tensor, score: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """-kl_coef * kl (B, R) at every response token, and + score (B,) at the last one."""
    place = torch.arange(mask.shape[1], device=mask.device)
    is_last = place == mask.sum(1, keepdim=True) - 1  # (B, R)
    return torch.where(mask, -kl_coef * kl, 0.0) + is_last * score[:, None]


def gae(reward: Tensor, value: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: reward, value (B, R), mask (B, R) True at response tokens -> adv, ret (B, R).
    Nothing at a masked place, value or reward, reaches a real one; after the last token comes value 0, the answer is over."""
    value, reward = torch.where(mask, value, 0.0), torch.where(mask, reward, 0.0)
    adv = torch.zeros_like(value)
    next_adv = next_value = torch.zeros_like(value[:, 0])  # (B,)
    for t in reversed(range(value.shape[1])):
        delta = reward[:, t] + gamma * next_value - value[:, t]
        next_adv = torch.where(mask[:, t], delta + gamma * lam * next_adv, 0.0)
        next_value = value[:, t]
        adv[:, t] = next_adv
    return adv, adv + value


def policy_loss(logp: Tensor, old_logp: Tensor, adv: Tensor, mask: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Clipped surrogate, to be minimised: mean over response tokens of max(-rho adv, -clip(rho) adv), rho = pi / pi_old.
    All (B, R). Returns loss and the share of tokens where the clipped term was the larger."""
    ratio = (logp - old_logp).exp()
    free, clipped = -adv * ratio, -adv * ratio.clamp(1 - clip, 1 + clip)
    return masked_mean(torch.maximum(free, clipped), mask), masked_mean((clipped > free).float(), mask)


def value_loss(value: Tensor, old_value: Tensor, ret: Tensor, mask: Tensor, clip: float) -> Tensor:
    """0.5 * mean over response tokens of the worse of (V - ret)^2 and (V kept within `clip` of V_old - ret)^2. All (B, R)."""
    near = old_value + (value - old_value).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.maximum((value - ret).square(), (near - ret).square()), mask)


# ---- rollout and scoring --------------------------------------------------------------------------------------------

class Experience(NamedTuple):
    """What is known of some answers. On the CPU: these tensors are small, and indices made there cost a GPU no wait."""
    tokens: Tensor      # (B, T) prompt | response | padding
    prompt_len: Tensor  # (B,)
    mask: Tensor        # (B, R) True at response tokens
    ended: Tensor       # (B,) True where EOS came
    logp: Tensor        # (B, R) of the policy that sampled
    ref_logp: Tensor    # (B, R)
    value: Tensor       # (B, R)
    score: Tensor       # (B,) of the reward model, less --eos_penalty where the answer never ended
    reward: Tensor      # (B, R)
    adv: Tensor         # (B, R), not yet whitened
    ret: Tensor         # (B, R)


def places(prompt_len: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row, place in the response, and column of every response token, (N,) each."""
    row, t = mask.nonzero(as_tuple=True)
    return row, t, prompt_len[row] + t


def logprobs(model: Llama, tokens: Tensor, prompt_len: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of every response token under softmax(logits / temperature), (B, R), zero elsewhere. Arguments may lie
    on the CPU; the head runs on the N response tokens alone."""
    device = model.device
    row, t, column = (i.to(device) for i in places(prompt_len, mask))
    tokens = tokens.to(device)
    h = model.hidden(tokens)[row, column - 1]  # (N, C): a token is predicted from the column before it
    logp = -F.cross_entropy(model.output(h).float() / temperature, tokens[row, column], reduction="none")  # (N,)
    return torch.zeros(mask.shape, device=device).index_put((row, t), logp)  # (B, R)


def critic_values(critic: RewardModel, tokens: Tensor, prompt_len: Tensor, mask: Tensor) -> Tensor:
    """Value of the state before each response token, (B, R), zero elsewhere."""
    device = critic.score.weight.device
    row, t, column = (i.to(device) for i in places(prompt_len, mask))
    value = critic.values(tokens.to(device))[row, column - 1]  # (N,)
    return torch.zeros(mask.shape, device=device).index_put((row, t), value)  # (B, R)


def reward_scores(reward: RewardModel, tokens: Tensor, prompt_len: Tensor, mask: Tensor) -> Tensor:
    """The reward model's score at the last response token, (B,)."""
    device = reward.score.weight.device
    last = (prompt_len + mask.sum(1) - 1).to(device)  # (B,)
    return reward.values(tokens.to(device)).gather(1, last[:, None]).squeeze(1)


class Models(NamedTuple):
    actor: Llama
    critic: RewardModel
    ref: Llama           # with LoRA the same object as actor
    reward: RewardModel  # with LoRA the critic's trunk under a head of its own


@contextmanager
def frozen(models: Models):
    """Within it, ref and reward are what they were at the start."""
    if models.ref is not models.actor:
        yield
    else:
        with lora.disabled(models.actor), lora.disabled(models.critic):
            yield


@torch.no_grad()
def rollout(actor: Llama, prompts: list[list[int]], eos_id: int, max_seq_len: int, temperature: float, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Step 1: answer the prompts -> tokens (B, T), prompt_len (B,), mask (B, R), ended (B,)."""
    answers = actor.generate(prompts, [max_seq_len - len(prompt) for prompt in prompts], temperature, eos_id=eos_id, generator=generator)
    tokens, _ = text.pad([prompt + answer for prompt, answer in zip(prompts, answers)])
    _, mask = text.pad(answers)
    return tokens, torch.tensor([len(prompt) for prompt in prompts]), mask, torch.tensor([answer[-1] == eos_id for answer in answers])


@torch.no_grad()
def score(models: Models, tokens: Tensor, prompt_len: Tensor, mask: Tensor, ended: Tensor, args: argparse.Namespace, rows: int) -> Experience:
    """Steps 2 to 4 for rolled-out answers, `rows` at a time; everything by the training forward, nothing from the cache."""
    parts = []
    for i in range(0, len(tokens), rows):
        t, p, m = trim(tokens[i:i + rows], prompt_len[i:i + rows], mask[i:i + rows])
        logp, value = logprobs(models.actor, t, p, m, args.temperature), critic_values(models.critic, t, p, m)
        with frozen(models):
            ref_logp, scores = logprobs(models.ref, t, p, m, args.temperature), reward_scores(models.reward, t, p, m)
        parts.append([F.pad(x.cpu(), (0, mask.shape[1] - m.shape[1])) for x in (logp, ref_logp, value)] + [scores.cpu()])
    logp, ref_logp, value, scores = (torch.cat(x) for x in zip(*parts))
    scores = scores - args.eos_penalty * ~ended
    reward = token_rewards(kl_k1(logp, ref_logp), scores, mask, args.kl_coef)
    adv, ret = gae(reward, value, mask, args.gamma, args.lam)
    return Experience(tokens, prompt_len, mask, ended, logp, ref_logp, value, scores, reward, adv, ret)


def trim(tokens: Tensor, prompt_len: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cut the columns and places that only padding uses."""
    length = mask.sum(1)
    return tokens[:, :int((prompt_len + length).max())], prompt_len, mask[:, :int(length.max())]


def join(buffer: list[Experience]) -> Experience:
    """Several rollouts as one, padded to the widest."""
    T, R = (max(getattr(e, key).shape[1] for e in buffer) for key in ("tokens", "mask"))
    width = {"tokens": T}
    return Experience(*(torch.cat([F.pad(x, (0, width.get(key, R) - x.shape[1])) if x.dim() == 2 else x for x in (getattr(e, key) for e in buffer)])
                        for key in Experience._fields))


def objective(e: Experience, total) -> dict:
    """Means over the answers of all processes. total: a sum over processes of a 1-d tensor."""
    kl, k3, answers = kl_k1(e.logp, e.ref_logp), kl_k3(e.logp, e.ref_logp), len(e.tokens)
    texts = {tuple(row[p:].tolist()) for row, p in zip(e.tokens, e.prompt_len)}
    names = ("objective/kl", "objective/kl_k3", "objective/entropy", "objective/scores", "objective/rlhf_reward", "eos_rate", "response_length", "distinct_answers")
    sums = [torch.where(e.mask, x, 0.0).sum() for x in (kl, k3, -e.logp)] + [e.score.sum(), e.reward.sum(), e.ended.sum(), e.mask.sum(), torch.tensor(len(texts))]
    *means, n = total(torch.stack([x.float() for x in sums] + [torch.tensor(float(answers))])).tolist()
    return {name: x / n for name, x in zip(names, means)}


def mean_gold(e: Experience, tokenizer: Tokenizer, total) -> float:
    """The demo's gold score over the answers of all processes: to be drawn beside the reward, which it parts from in the end (Gao
    et al. 2022, "Scaling Laws for Reward Model Overoptimization"). Nothing learns from it."""
    texts = [(tokenizer.decode(row[:p].tolist()), tokenizer.decode(row[p:p + n].tolist())) for row, p, n in zip(e.tokens, e.prompt_len, e.mask.sum(1))]
    scores = [demo.gold(asked, answer, bool(ended)) for (asked, answer), ended in zip(texts, e.ended)]
    gold, n = total(torch.tensor([sum(scores), float(len(scores))])).tolist()
    return gold / n


def show_tokens(e: Experience, tokenizer: Tokenizer) -> str:
    """The first answer as a table, a token a line."""
    b, kl = 0, kl_k1(e.logp, e.ref_logp)
    start, n = int(e.prompt_len[b]), int(e.mask[b].sum())
    lines = [f"prompt: {tokenizer.decode(e.tokens[b, :start].tolist())}", f"{'token':>16} mask    logp ref_logp      kl   value  reward     adv     ret"]
    for t in range(min(n + 1, e.mask.shape[1])):
        i = int(e.tokens[b, start + t]) if e.mask[b, t] else -1  # an embedding may have more rows than the tokenizer has pieces
        piece = "(padding)" if i < 0 else tokenizer.piece(i)
        figures = " ".join(f"{x[b, t].item():7.3f}" for x in (e.logp, e.ref_logp, kl, e.value, e.reward, e.adv, e.ret))
        lines.append(f"{piece:>16} {int(e.mask[b, t]):4d} {figures}")
    return "\n".join([*lines, f"score {e.score[b]:.3f}, {'ended' if e.ended[b] else 'never ended'}"])


# ---- update ---------------------------------------------------------------------------------------------------------

def ptx_batches(examples: list, batch: int, seed: int, seen: int):
    """For ever: `batch` examples (indices) each, cut from an endless row of epochs, from `seen` samples on. A full batch even
    where an epoch ends within it: so the position is always batches * batch, and nothing is seen twice or missed."""
    lengths, left = [len(ids) for ids, _ in examples], []
    epoch, skip = divmod(seen, len(examples))
    while True:
        while len(left) < batch:
            left += sum(text.global_batches(lengths, batch, seed, epoch, skip), [])
            epoch, skip = epoch + 1, 0
        yield left[:batch]
        left = left[batch:]


def check_ratio(first: float, dtype: torch.dtype, world: run.World) -> None:
    """The ratio before any update is exp(0). first: mean |logp - old_logp| (bf16, fp16) or its maximum (fp32)."""
    if dtype == torch.float32 and first > 1e-4:
        raise FloatingPointError(f"the ratio is not 1 before the first update: log-probabilities differ by {first:.2e}; scoring and update compute different things")
    if dtype != torch.float32 and first > 0.05:
        run.say(world, f"warning: before the first update log-probabilities differ by {first:.3f} on average: {dtype} is too coarse for this model, try --dtype fp32")


def update(models: Models, optimizers: tuple[zero.ZeRO2, zero.ZeRO2], e: Experience, ptx, examples: list, schedule: float, step: int,
           args: argparse.Namespace, world: run.World, total, dtype: torch.dtype) -> dict:
    """Step 5: --max_epochs over the buffer in minibatches, at `schedule` times each learning rate. Returns the means of what is logged."""
    actor_opt, critic_opt = optimizers
    adv = whiten(e.adv, e.mask, total)
    rows_per_step = args.train_batch_size * args.accumulation_steps
    sums, steps, early, ptx_sum = torch.zeros(6), 0, 0, 0.0
    for epoch in range(args.max_epochs):
        order = torch.randperm(len(e.tokens), generator=seeded("minibatches", args.seed, step, epoch))
        for minibatch in order.split(rows_per_step):
            # ---- one minibatch: the means are over its response tokens on all processes ----
            n_all = total(e.mask[minibatch].sum().float().view(1)).item()
            seen = torch.zeros(6)
            micros = minibatch.split(args.train_batch_size)
            for k, rows in enumerate(micros):
                last = k == len(micros) - 1
                tokens, prompt_len, mask = trim(e.tokens[rows], e.prompt_len[rows], e.mask[rows])
                old_logp, old_value, a, ret = (x[rows, :mask.shape[1]].to(world.device) for x in (e.logp, e.value, adv, e.ret))
                m, share = mask.to(world.device), mask.sum().item() / n_all
                logp = logprobs(models.actor, tokens, prompt_len, mask, args.temperature)
                pg, clipfrac = policy_loss(logp, old_logp, a, m, args.clip)
                actor_opt.backward((1 - args.ptx_coef) * share * pg, last=last and not examples)
                value = critic_values(models.critic, tokens, prompt_len, mask)
                vf = value_loss(value, old_value, ret, m, args.value_clip)
                critic_opt.backward(args.vf_coef * share * vf, last=last)
                with torch.no_grad():
                    change = torch.where(m, logp - old_logp, 0.0)
                    if step == 1 and steps == 0:
                        check_ratio((change.abs().max() if dtype == torch.float32 else masked_mean(change.abs(), m)).item(), dtype, world)
                    figures = torch.stack((pg, vf, clipfrac, masked_mean(kl_k3(old_logp, logp), m), masked_mean(change.exp(), m), masked_mean(-logp, m)))
                seen += share * figures.detach().cpu()
            if examples:
                ptx_sum += ptx_backward(models.actor, actor_opt, next(ptx), examples, args, world)
            # ---- both models step; early stop looks at all processes alike ----
            actor_opt.flush()
            critic_opt.flush()
            sums += total(seen)
            run.stop_if_broken((sums[0] + sums[1] + ptx_sum).item(), step, schedule * args.lr, args.save_path)
            actor_opt.step(schedule * args.lr)
            critic_opt.step(schedule * args.critic_lr)
            steps += 1
        if args.target_kl and sums[3] / steps > args.target_kl:
            early = 1
            break
    names = ("loss/policy_avg", "loss/value_avg", "policy/clipfrac_avg", "policy/approxkl_avg", "val/ratio", "policy/entropy_avg")
    return {name: x / steps for name, x in zip(names, sums.tolist())} | {"loss/ptx_avg": total(torch.tensor([float(ptx_sum)])).item() / steps, "early_stop": early, "minibatches": steps}


def ptx_backward(actor: Llama, optimizer: zero.ZeRO2, indices: list[int], examples: list, args: argparse.Namespace, world: run.World) -> float:
    """The SFT loss of one ptx batch, weighted and sent backward as the step's last micro-batch; returns this process's share."""
    targets, nll = sum(sum(examples[i][1]) for i in indices), 0.0
    for micro in filter(None, text.micro_batches(indices, [len(ids) for ids, _ in examples], args.ptx_batch_size, world.rank, world.world)):
        tokens, _, target = text.collate([examples[i] for i in micro])
        loss = sft.lm_loss(actor, tokens, target) / targets
        optimizer.backward(args.ptx_coef * loss, last=True)
        nll += loss.item()
    return nll


# ---- stage 3 --------------------------------------------------------------------------------------------------------

def parse(argv: list[str] | None) -> argparse.Namespace:
    whole, number = run.whole, run.number
    parser = run.training_parser("Stage 3: PPO and PPO-ptx. Without flags, the demo: reads out/sft and out/rm, writes out/ppo.", "out/ppo")
    parser.add_argument("--rm_path", type=Path, help="the reward model that rm.py wrote")
    parser.add_argument("--rm_pretrain", type=Path, help="base of a reward model that is an adapter, if it has moved")
    parser.add_argument("--prompt_dataset", type=Path, nargs="+", help="prompts to answer: any record form, answers are ignored (data/__init__.py)")
    parser.add_argument("--pretrain_dataset", type=Path, nargs="+", help="records for ptx, instruction, chat or text (without it, ptx_coef is 0)")
    parser.add_argument("--num_episodes", type=whole(1), help="episodes")
    parser.add_argument("--max_timesteps", type=whole(1), help="rollouts an episode")
    parser.add_argument("--update_timesteps", type=whole(1), help="rollouts an update learns from")
    parser.add_argument("--max_epochs", type=whole(1), help="passes over the rollouts of an update")
    parser.add_argument("--experience_batch_size", type=whole(1), help="answers a process and rollout")
    parser.add_argument("--train_batch_size", type=whole(1), help="answers a process and micro-batch of the update")
    parser.add_argument("--ptx_batch_size", type=whole(1), help="ptx examples a process and minibatch")
    parser.add_argument("--critic_lr", type=number(), help="the critic's peak learning rate")
    parser.add_argument("--kl_coef", type=number(), help="beta: weight of the KL to the SFT model in the reward")
    parser.add_argument("--ptx_coef", type=number(), help="ptx_coef * ptx + (1 - ptx_coef) * policy")
    parser.add_argument("--vf_coef", type=number(), default=1.0, help="factor of the critic's loss; the critic has its own optimizer, so only --clip_grad feels it")
    parser.add_argument("--clip", type=number(), default=0.2, help="eps: the ratio is kept within 1 +- eps")
    parser.add_argument("--value_clip", type=number(), default=0.4, help="a new value counts within this of the old")
    parser.add_argument("--gamma", type=number(), default=1.0, help="discount")
    parser.add_argument("--lam", type=number(), default=0.95, help="lambda of GAE")
    parser.add_argument("--target_kl", type=number(), default=0.1, help="no further epoch once the mean KL a token between new and old policy passes this (0 = never stop)")
    parser.add_argument("--eos_penalty", type=number(), default=1.0, help="subtracted from the score of an answer that never ended")
    parser.add_argument("--temperature", type=number(), default=1.0, help="of sampling, and of the log-probabilities")
    parser.add_argument("--max_input_len", type=whole(1), help="longest prompt in tokens; longer ones are left out")
    parser.add_argument("--max_seq_len", type=whole(2), help="longest prompt with answer in tokens")
    parser.add_argument("--eval_size", type=whole(1), default=64, help="prompts that reward and KL are measured on before and after")
    parser.add_argument("--show_tokens", action="store_true", help="print the first answer of each update token by token")
    parser.tell(FINETUNE, DEMO)
    args = parser.parse_args(argv)
    if args.temperature == 0:
        raise ValueError("--temperature 0 always gives the same answer: PPO learns from differences, sample at 1")
    if args.ptx_coef is not None and args.ptx_coef > 1:
        raise ValueError(f"--ptx_coef {args.ptx_coef} would turn the policy's loss around: it is a share, 0 to 1")
    for key, script in (("pretrain", "sft"), ("rm_path", "rm")):
        if getattr(args, key) is None:
            setattr(args, key, run.finished(Path(f"out/{script}"), script, f"--{key}"))
    return args


def frozen_copy(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """A copy that is only computed with. Parameters alone are cast: rotary tables in bf16 could not tell far positions apart."""
    model = copy.deepcopy(model).requires_grad_(False)
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model


def open_models(args: argparse.Namespace, tokenizer: Tokenizer, world: run.World, dtype: torch.dtype) -> tuple[Models, str | None]:
    """The four models, and what an adapter will name as its base."""
    reward_tokenizer = sft.open_tokenizer(argparse.Namespace(template=args.template), args.rm_path, world)
    if reward_tokenizer.fingerprint != tokenizer.fingerprint:
        raise ValueError(f"{args.rm_path} has another tokenizer than {args.pretrain}: its ids mean other text, train the reward model from this model")
    # All weights: in the file's dtype, from which the fp32 master is made. Frozen ones are only computed with.
    actor = sft.open_llama(args.pretrain, dtype if args.lora_rank else None, world)
    critic = RewardModel.from_pretrained(args.rm_path, dtype if args.lora_rank else None, world.device, args.rm_pretrain)
    check_tokenizer(tokenizer, actor.config.vocab_size)
    check_tokenizer(tokenizer, critic.config.vocab_size)
    base = sft.base_for_adapter(actor, args, tokenizer, world) if args.lora_rank else None
    if args.lora_rank:
        reward = RewardModel(critic.trunk)
        reward.score.weight.data = critic.score.weight.detach().clone().to(dtype)
        sft.add_adapters(actor, args)
        sft.add_adapters(critic, args)
        critic.score.weight.requires_grad_(True)
        models = Models(actor, critic, actor, reward)
        reward.score.weight.requires_grad_(False)
    else:
        models = Models(actor, critic, frozen_copy(actor, dtype), frozen_copy(critic, dtype))
    for model in models:
        model.eval()  # dropout off, see 4 above
        sft.set_up(getattr(model, "trunk", model), args)
    return models, base


def read_prompts(args: argparse.Namespace, tokenizer: Tokenizer, world: run.World) -> list[list[int]]:
    records = read_records(args.prompt_dataset, "prompt", args.skip_bad_records, args.max_datasets_size, partial(run.say, world))
    prompts = [text.encode_prompt(record["messages"], tokenizer, text.TEMPLATES[args.template]) for record in records]
    kept = [prompt for prompt in prompts if len(prompt) <= args.max_input_len]
    if not kept:
        raise ValueError(f"all {len(prompts)} prompts have more than --max_input_len {args.max_input_len} tokens, the shortest {min(map(len, prompts))}: raise it")
    if len(kept) < len(prompts):
        run.say(world, f"note: {len(prompts) - len(kept)} of {len(prompts)} prompts have more than --max_input_len {args.max_input_len} tokens: left out")
    return kept


def read_ptx(args: argparse.Namespace, tokenizer: Tokenizer, world: run.World) -> list:
    """Examples of --pretrain_dataset as stage 1 encodes them; none when ptx is off, and the file is not even read."""
    if args.pretrain_dataset is None or args.ptx_coef == 0:
        args.ptx_coef = 0.0
        return []
    records = read_records(args.pretrain_dataset, "sft", args.skip_bad_records, args.max_datasets_size, partial(run.say, world))
    encode = partial(text.encode_example, tokenizer=tokenizer, template=text.TEMPLATES[args.template], max_len=args.max_seq_len)
    return text.encode_all(records, encode, "ptx examples")[0]


def seeded(*what, device="cpu") -> torch.Generator:
    """A generator of its own for each purpose: nothing depends on how much was drawn before, so a resumed run needs no state."""
    return torch.Generator(device).manual_seed(random.Random(repr(what)).getrandbits(60))


def draw(prompts: list[list[int]], n: int, seed: int, seen: int) -> list[list[int]]:
    """The next n prompts of an endless stream, each epoch shuffled anew, from `seen` prompts on."""
    drawn = []
    while len(drawn) < n:
        epoch, skip = divmod(seen + len(drawn), len(prompts))
        order = list(range(len(prompts)))
        random.Random(f"prompts {seed} {epoch}").shuffle(order)
        drawn += [prompts[i] for i in order[skip:skip + n - len(drawn)]]
    return drawn


def experience(models: Models, prompts: list[list[int]], seed: tuple, tokenizer: Tokenizer, args: argparse.Namespace, world: run.World) -> tuple[Experience, float, float]:
    """Answer and score prompts, this process's share of them; returns seconds of rollout and of scoring too."""
    generator = seeded(*seed, world.rank, device=world.device)  # no two rollouts, and no two processes, draw alike
    began = time.perf_counter()
    mine = prompts[world.rank::world.world] or prompts[:1]  # fewer prompts than processes: a second answer to the first
    rolled = rollout(models.actor, mine, tokenizer.eos_id, args.max_seq_len, args.temperature, generator)
    between = time.perf_counter()
    e = score(models, *rolled, args, args.train_batch_size)
    return e, between - began, time.perf_counter() - between


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    world = run.start(args.device, args.strategy)
    is_demo = args.prompt_dataset is None and demo.is_demo(args.pretrain)
    run.check_save_path(args.save_path, sft.inputs_of(args))
    if args.save_path.resolve() == args.rm_path.resolve():
        raise ValueError(f"--save_path {args.save_path} is --rm_path: the run would overwrite the reward model, name another directory")
    tokenizer = sft.open_tokenizer(args, args.pretrain, world)
    if not is_demo and args.prompt_dataset is None:
        raise ValueError("--prompt_dataset is missing: name the prompts to answer")
    run.resolve(args, DEMO if is_demo else FINETUNE)
    dtype = run.choose_dtype(args.dtype, world.device)
    models, base = open_models(args, tokenizer, world, dtype)
    check_lengths(args, models)
    prompts, examples = read_prompts(args, tokenizer, world), read_ptx(args, tokenizer, world)
    run.say_flags(world, args)
    with run.resumable(args):
        figures = train(models, base, prompts, examples, is_demo, dtype, tokenizer, args, world)
    summary = run.write_summary(args, world, figures)
    if world.rank == 0:
        print_table(args, summary, world)
    return summary


def check_lengths(args: argparse.Namespace, models: Models) -> None:
    context = min(models.actor.config.max_seq_len, models.critic.config.max_seq_len)
    if args.max_seq_len > context:
        raise ValueError(f"--max_seq_len {args.max_seq_len} is beyond the models' context of {context} tokens")
    if args.max_input_len >= args.max_seq_len:
        raise ValueError(f"--max_input_len {args.max_input_len} leaves no room for an answer within --max_seq_len {args.max_seq_len}")


def train(models: Models, base: str | None, prompts: list, examples: list, is_demo: bool, dtype: torch.dtype, tokenizer: Tokenizer,
          args: argparse.Namespace, world: run.World) -> dict:
    total = lambda x: run.all_reduce(x.to(world.device)).cpu()  # a sum over processes of a small CPU tensor
    marks = run.fingerprint(torch.nn.ModuleList([models.actor, models.critic]), [prompts, examples], args.seed)
    template = text.TEMPLATES[args.template]
    held = [text.encode_prompt([{"role": "user", "content": record["instruction"]}], tokenizer, template) for record in demo.prompt_records(0, held=True)] if is_demo else prompts
    held = [prompt for prompt in held if len(prompt) <= args.max_input_len]
    measure = partial(evaluate, models, held[:args.eval_size], is_demo, tokenizer, args, world, total)
    optimizers = sft.make_optimizer(models.actor, args, dtype), sft.make_optimizer(models.critic, args, dtype)
    rollouts = args.num_episodes * args.max_timesteps
    updates = min(math.ceil(rollouts / args.update_timesteps), args.max_steps or 10**9)
    step = first = drawn = prompts_seen = ptx_seen = 0  # drawn: rollouts so far
    if args.resume:
        meta, states, _ = run.load_checkpoint(args.save_path, world, marks, optimizers[0].strategy)
        for optimizer, key in zip(optimizers, ("actor", "critic")):
            optimizer.load_state_dict([state[key] for state in states])
        del states
        step = first = meta["step"]
        drawn, prompts_seen, ptx_seen = meta["drawn"], meta["prompts_seen"], meta["ptx_seen"]
    if not args.resume:
        run.say(world, f"answering {min(args.eval_size, len(held))} prompts, to compare with afterwards")
    before = meta["before"] if args.resume else measure()
    append = run.open_metrics(args.save_path, world, step)
    batch, ptx_batch = args.experience_batch_size * world.world, args.ptx_batch_size * world.world
    run.say(world, f"{len(prompts)} prompts | {updates} updates of {args.update_timesteps} x {args.experience_batch_size} x {world.world} answers, {args.max_epochs} epochs | "
                   f"ptx {f'{len(examples)} examples, weight {args.ptx_coef}' if examples else 'off'} | {sum(p.numel() for m in models[:2] for p in m.parameters() if p.requires_grad):,} parameters trained")
    plan, planned = zero.run_plan([(models.actor, models.actor.config), (models.critic, models.critic.config)], [models.ref, models.reward], args.strategy, world,
                                  args.train_batch_size * args.max_seq_len, dtype, args.lora_rank, args.grad_checkpoint)
    run.say(world, plan)
    started, tokens_done = time.perf_counter(), 0
    while step < updates:
        step, began = step + 1, time.perf_counter()
        buffer, rollout_seconds, scoring_seconds = [], 0.0, 0.0
        for _ in range(min(args.update_timesteps, rollouts - drawn)):
            e, a, b = experience(models, draw(prompts, batch, args.seed, prompts_seen), ("rollout", args.seed, drawn), tokenizer, args, world)
            buffer, rollout_seconds, scoring_seconds = [*buffer, e], rollout_seconds + a, scoring_seconds + b
            drawn, prompts_seen = drawn + 1, prompts_seen + batch
            if step == first + 1 and args.update_timesteps > 1:  # minutes can pass before the first update
                run.say(world, f"rollout {drawn} of {rollouts}: {batch} answers in {a + b:.1f} s")
        e = join(buffer)
        if args.show_tokens:
            run.say(world, show_tokens(e, tokenizer))
        update_began = time.perf_counter()
        schedule = sft.cosine_lr(step, updates, 1.0, args.warmup)
        row = {"step": step, "loss": None, "lr": schedule * args.lr} | objective(e, total)
        if is_demo:
            row["objective/gold"] = mean_gold(e, tokenizer, total)
        ptx = ptx_batches(examples, ptx_batch, args.seed, ptx_seen) if examples else None
        row |= update(models, optimizers, e, ptx, examples, schedule, step, args, world, total, dtype)
        ptx_seen += row["minibatches"] * ptx_batch
        now = time.perf_counter()
        tokens = total((e.mask.sum(1) + e.prompt_len).sum().view(1).float()).item()
        tokens_done += tokens
        row |= {"loss": row["loss/policy_avg"], "seconds": now - started, "tokens_per_second": tokens / (now - began), "seconds/rollout": rollout_seconds,
                "seconds/scoring": scoring_seconds, "seconds/update": now - update_began, "skipped": sum(o.skipped for o in optimizers)}
        append(row)
        run.progress(world, step, updates, started, f"score {row['objective/scores']:+.3f} | kl {row['objective/kl']:.2f} | clipfrac {row['policy/clipfrac_avg']:.3f} | "
                     f"value loss {row['loss/value_avg']:.3f} | length {row['response_length']:.0f} | eos {row['eos_rate']:.2f}", step % args.log_interval == 0 or step <= 3, first)
        if row["objective/kl"] > KL_WARNING or row["objective/kl"] < -1:
            run.say(world, f"warning: the KL to the SFT model is {row['objective/kl']:.1f} nats an answer: {'raise --kl_coef or lower --lr' if row['objective/kl'] > 0 else 'log-probabilities and samples disagree'}")
        if args.save_interval and (step % args.save_interval == 0 or step == args.max_steps):
            meta = {"step": step, "drawn": drawn, "prompts_seen": prompts_seen, "ptx_seen": ptx_seen, "world": world.world,
                    "strategy": optimizers[0].strategy, "marks": marks, "before": before}
            run.save_checkpoint(args.save_path, world, meta, {"actor": optimizers[0].state_dict(), "critic": optimizers[1].state_dict()})
    seconds = time.perf_counter() - started
    sft.save_model(models.actor, optimizers[0], args, tokenizer, base, world)
    after = measure()
    return {"planned_memory_bytes": planned} | {f"{key}_before": x for key, x in before.items() if key != "kl"} | {f"{key}_after": x for key, x in after.items() if key != "kl"} | {
        "kl": after["kl"], "steps": step, "seconds": seconds, "tokens_per_second": tokens_done / max(seconds, 1e-9), "skipped": sum(o.skipped for o in optimizers)}


def evaluate(models: Models, held: list, is_demo: bool, tokenizer: Tokenizer, args: argparse.Namespace, world: run.World, total) -> dict:
    """Reward and KL over held-out prompts (of the demo; else over the first prompts), and the demo's gold score; a fixed seed."""
    e, _, _ = experience(models, held, ("evaluate", args.seed), tokenizer, args, world)
    means = objective(e, total)
    figures = {"reward": means["objective/scores"], "kl": means["objective/kl"]}
    if is_demo:
        figures |= run.broadcast_object(demo.measure(models.actor, tokenizer, text.TEMPLATES[args.template]) if world.rank == 0 else None)
    return figures


def print_table(args: argparse.Namespace, summary: dict, world: run.World) -> None:
    """What the three stages did, from the summary.json of each."""
    rows = []
    for directory, key, figure in ((args.pretrain, "eval_loss", "held-out loss"), (args.rm_path, "accuracy", "held-out accuracy")):
        file = directory / "summary.json"
        of = json.loads(file.read_text()) if file.exists() else {}
        if of.get(key) is not None:
            rows.append((directory, of["seconds"], figure, of[f"{key}_before"], of[key]))
    figures = [("gold", "gold score"), ("reward", "reward")]
    rows += [(args.save_path, summary["seconds"], figure, summary[f"{key}_before"], summary[f"{key}_after"]) for key, figure in figures if f"{key}_before" in summary]
    print(f"\n{'stage':<24}{'seconds':>8}  {'figure':<18}{'before':>9}{'after':>9}")
    for directory, seconds, figure, before, after in rows:
        print(f"{str(directory)[-23:]:<24}{seconds:>8.0f}  {figure:<18}{before:>9.3f}{after:>9.3f}")
    print(f"KL to the SFT model {summary['kl']:.2f} nats an answer, {run.peak_text(summary, world)}")
    for when in ("before", "after"):
        if f"samples_{when}" in summary:
            print(f"\n{when} (distinct-2 {summary[f'distinct_2_{when}']:.3f}):", *summary[f"samples_{when}"], sep="\n  ")


if __name__ == "__main__":
    run.command(main)
