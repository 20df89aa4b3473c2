"""Stage 2, the reward model: a LLaMA whose head gives one number, trained so that better answers get larger ones.

    python rm.py                                                        the demo: reads out/sft, writes out/rm
    torchrun --standalone --nproc_per_node=2 rm.py
    python rm.py --pretrain SFT_DIR --dataset rm-static.jsonl --loss_fn log_exp --save_path rmstatic
    python rm.py --loss_fn dpo                                          a policy from the rankings: writes out/dpo

Ouyang et al. 2022 (arXiv 2203.02155), section 3.5, second step; Stiennon et al. 2020 (arXiv 2009.01325). Huang et al.
2024, "The N+ implementation details of RLHF with PPO" (arXiv 2403.17031), for head, initialisation and normalisation.

    prompt   response A                     score at the last real token
    p p p p  a a a a a EOS                  r(A) ----.
    p p p p  b b b EOS  .   .   .           r(B) ----+--> -log sigmoid(r(A) - r(B)),  A was preferred
                        padding, on the right: causal attention never looks there

    loss of one prompt with K responses = mean over its pairs of -log sigmoid(r(better) - r(worse))

1. All responses to a prompt are scored in one batch, each at its own last token (found by length, never by comparing
   ids).
2. A ranking of K responses gives K(K-1)/2 pairs. The weight of each is 1 / that number, so every prompt counts the
   same: pairs of one prompt are not independent.
3. With d = r(better) - r(worse), log_sig is -log sigmoid(d) and log_exp is log(1 + exp(-d)). They are Coati's two names
   for one function; both are computed in a form that does not overflow.
4. The head starts with standard deviation 1/sqrt(dim + 1). (Coati: 1/(dim + 1), which gives scores too alike to learn
   from.)
5. After training the mean score of the SFT model's own answers is stored as `reward_mean` and subtracted from every
   score, so that PPO starts near zero and a positive reward means "better than before".

6. `pad_token_id` is an id that no text produces. transformers scores a row of a batch at the last id that differs from
   it, so it may not be EOS.

DPO (--loss_fn dpo) needs no reward model. Rafailov et al. 2023 (arXiv 2305.18290): among all policies pi, the one with
the largest mean of r(x, y) - beta KL(pi, ref) is pi(y | x) = ref(y | x) exp(r(x, y) / beta) / Z(x). Solved for r:

    r(x, y) = beta h(x, y) + beta log Z(x),    h(x, y) = log pi(y | x) - log ref(y | x)

Z is the same for all responses to a prompt, so it cancels in every pair. A language model is thus a reward model with
the score beta h, and is trained as one. What is written is the policy: stages 2 and 3 in one.

    dpo    -log sigmoid(beta h(better) - beta h(worse))             1 to 3 hold as they are
    ipo    (beta h(better) - beta h(worse) - 1/2)^2                 Azar et al. 2023 (2310.12036)
    --sft_coef c adds c * -log pi(best response) / its tokens to the loss of a prompt (Pang et al. 2024, 2404.19733)

7. log pi(y | x) is the sum over the tokens of y, its end marker included, also in ipo: in its paper y is the whole
   answer. (Other code divides h by the number of tokens there, which asks for another beta.) Equation 17 of the paper
   is (h(better) - h(worse) - 1 / (2 beta))^2. Times beta^2 that is ipo here, whose size does not depend on beta.
8. ref is the model at the start. Its log-probabilities are computed once, before the first step, and kept: 4 bytes a
   response instead of a second model in memory, and no second forward a step. A new adapter changes nothing yet, so
   with --lora_rank too this is the model with its adapter off.
9. Only differences are trained. ipo stops at one of 1 / (2 beta) nats, dpo never does. The better responses may become
   less likely too, as long as the worse ones lose more, and the probability goes to text that is in no ranking. Then
   `chosen`, the mean score of the better ones, falls far below 0; lower --lr, or give --sft_coef.

Letters: B rows of a batch (all responses), T time, C channels, P pairs, N tokens of the responses, V vocabulary.
"""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain, combinations, islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora
import quantize
import sft
from data import demo, records, run, text, weights
from model import Llama
from sft import Stage


# ---- the model ------------------------------------------------------------------------------------------------------

class RewardModel(nn.Module):
    """A LLaMA trunk and a head without bias that gives one number a token."""

    def __init__(self, trunk: Llama, generator: torch.Generator | None = None):
        super().__init__()
        self.trunk, self.config = trunk, trunk.config
        self.score = nn.Linear(trunk.config.dim, 1, bias=False)
        nn.init.normal_(self.score.weight, std=(trunk.config.dim + 1) ** -0.5, generator=generator)     # 4.
        self.score.to(trunk.device)         # drawn on the CPU: the same on every device

    @property
    def device(self) -> torch.device:
        return self.trunk.device

    @property
    def reward_mean(self) -> float:
        return self.config.extra.get("reward_mean", 0.0)

    def values(self, tokens: Tensor, mask: Tensor | None = None, at: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Returns a score after every token, (B, T), in fp32, or after those in these rows and columns `at`, (N,).

        Padding on the right needs no mask."""
        h = self.trunk.hidden(tokens, mask, at=at)                                  # (B, T, C), or (N, C)
        scores = F.linear(h.float(), self.score.weight.float()).squeeze(-1)         # (B, T), or (N,)
        return scores - self.reward_mean                                            # 5.

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Returns the score (B,) at each row's last real token.

        tokens (B, T); mask (B, T) True where a token is real, padding on either side."""
        return at_last(self.values(tokens, mask), mask)

    @classmethod
    def from_pretrained(cls, directory: str | Path, dtype: torch.dtype | None = None, device="cpu",
                        base: Path | None = None, trunk: Llama | None = None) -> "RewardModel":
        """Opens a reward model, plain or quantized, or an adapter, which is merged into its base (or into `base`).

        trunk: the base of an adapter, opened already. Then the adapter is kept beside it."""
        score, extra = read_head(directory)
        if score is None:
            raise ValueError(f"{directory} has no score.weight: it is not a reward model, train one with rm.py")
        if trunk is None:
            trunk = quantize.open_model(directory, dtype, device, head=False, adapter="merge", base=base)
        else:
            lora.load_adapter(trunk, directory)
        found, right = tuple(score.shape), (1, trunk.config.dim)
        if found != right:
            raise ValueError(f"{directory}: score.weight is {found}, a reward model of this width has {right}")
        model = cls(trunk, torch.Generator())
        model.score.weight.data = score.to(device, torch.float32, copy=True)
        model.config.extra["reward_mean"] = extra.get("reward_mean", 0.0)
        return model

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes the layout of transformers' LlamaForSequenceClassification."""
        tensors = {name.removeprefix("trunk."): p for name, p in self.named_parameters()}
        weights.write_model(directory, vars(self.config), tensors, "LlamaForSequenceClassification")


def read_head(directory: str | Path) -> tuple[Tensor | None, dict]:
    """Returns score.weight, None where the directory holds a language model, and what else its config says."""
    directory = Path(directory)
    if weights.is_adapter(directory):
        return lora.read_adapter(directory).get("score.weight"), lora.read_adapter_config(directory)
    fields = weights.read_config(directory)
    stored = weights.read_tensors(directory, fields).get("score.weight")
    return None if stored is None else stored.read(), fields["extra"]


def at_last(x: Tensor, mask: Tensor) -> Tensor:
    """Returns the entry (B,) of x (B, T) at each row's last True of mask (B, T)."""
    place = torch.arange(mask.shape[1], device=mask.device)                         # (T,)
    last = torch.where(mask, place, -1).amax(1, keepdim=True)                       # (B, 1)
    return x.gather(1, last).squeeze(1)                                             # (B,)


# ---- the loss -------------------------------------------------------------------------------------------------------

def log_sig(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log sigmoid(chosen - rejected), per pair (P,)."""
    return -F.logsigmoid(chosen - rejected)


def log_exp(chosen: Tensor, rejected: Tensor) -> Tensor:
    """log(1 + exp(rejected - chosen)), per pair (P,): the same function, written as Coati's second loss."""
    return F.softplus(rejected - chosen)


def ipo(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(chosen - rejected - 1/2)^2, per pair (P,)."""
    return (chosen - rejected - 0.5).square()


LOSSES = {"log_sig": log_sig, "log_exp": log_exp, "dpo": log_sig, "ipo": ipo}       # 3.
POLICY_LOSSES = ("dpo", "ipo")      # of a language model's scores; the others are of a reward model's


def pairs(sizes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the row of the better response, that of the worse one, and the weight of every pair, (P,) each.

    sizes are the numbers of responses of the rankings. Their rows follow one another, best first in each ranking.
    sizes [3, 2] gives better 0 0 1 3, worse 1 2 2 4, weight 1/3 1/3 1/3 1."""
    found, start = [], 0
    for size in sizes:
        places = list(combinations(range(start, start + size), 2))
        found += [(i, j, 1 / len(places)) for i, j in places]       # 2.
        start += size
    better, worse, weight = map(torch.tensor, zip(*found))
    return better, worse, weight


def score_rows(model: RewardModel, rows: list[list[int]]) -> Tensor:
    """Returns the scores (B,) of prompts with responses, in one batch."""
    tokens, mask = (x.to(model.device, non_blocking=True) for x in text.pad(rows))  # (B, T)
    return at_last(model.values(tokens), mask)                                      # (B,) 1.


def ranking_sums(scores: Tensor, rankings: list[list], loss_fn: str) -> dict[str, Tensor]:
    """Returns the loss of some rankings whose responses have the scores (B,), and the sums for `ranking_figures`.

    A tie is not right."""
    better, worse, weight = (x.to(scores.device, non_blocking=True) for x in pairs(list(map(len, rankings))))     # (P,)
    chosen, rejected = scores[better], scores[worse]                                # (P,)
    margin = chosen - rejected                                                      # (P,)
    return {
        "loss": (LOSSES[loss_fn](chosen, rejected) * weight).sum(),
        "right": (margin > 0).sum(),
        "margin": margin.sum(),
        "chosen": chosen.sum(),
        "pairs": scores.new_tensor(len(margin)),
    }


def ranking_figures(sums: dict[str, float]) -> dict[str, float]:
    """Returns the share of pairs with the better response ahead, their mean difference, and the mean better score."""
    n = max(sums["pairs"], 1)
    return {"accuracy": sums["right"] / n, "margin": sums["margin"] / n, "chosen": sums["chosen"] / n}


# ---- DPO: the policy is its own reward model ------------------------------------------------------------------------

@dataclass
class Response:
    """A response to a prompt. A ranking is a list of them, best first."""
    ids: list[int]              # prompt, response, end
    target: list[bool]          # False in the prompt
    reference: float = 0.0      # log ref(y | x), from `score_reference` on

    def __len__(self) -> int:
        return len(self.ids)


def encode_responses(record: dict, tokenizer: text.Tokenizer, template: text.Template,
                     max_len: int) -> text.Encoded:
    """Returns a ranking of the rows that text.encode_preference returns."""
    encoded = text.encode_preference(record, tokenizer, template, max_len)
    start = len(text.encode_prompt(record["messages"], tokenizer, template))
    return encoded._replace(examples=[
        [Response(row, [False] * start + [True] * (len(row) - start)) for row in rows] for rows in encoded.examples])


def logprobs(policy: Llama, responses: list[Response]) -> Tensor:
    """Returns log pi(y | x) of some responses, (B,), in fp32."""
    tokens, _, target = text.collate([(response.ids, response.target) for response in responses])       # (B, T)
    h, ids = sft.target_states(policy, tokens, target)                                      # (N, C), (N,)
    logp = -F.cross_entropy(policy.output(h).float(), ids, reduction="none")                # logits (N, V), logp (N,)
    return logp.new_zeros(target.shape).masked_scatter(target.to(logp.device), logp).sum(1)     # (B, T) -> (B,) 7.


@torch.no_grad()
def score_reference(policy: Llama, rankings: list[list[Response]], stage: Stage) -> None:
    """8. Fills in log ref(y | x) of all responses while the policy still is the reference. Processes share the work."""
    rank, world, device, _ = stage.world
    policy.eval()
    responses = sorted(chain(*rankings), key=len)
    found = torch.zeros(len(responses), device=device)                                      # (all,)
    for some in text.chunks(list(range(rank, len(responses), world)), stage.args.batch_size):
        found[some] = logprobs(policy, [responses[i] for i in some])
    for response, logp in zip(responses, run.all_reduce(found).tolist()):
        response.reference = logp


def policy_sums(policy: Llama, rankings: list[list[Response]], args: Namespace) -> dict[str, Tensor]:
    """Returns what ranking_sums does for the policy's scores, with the --sft_coef term in the loss."""
    responses = list(chain(*rankings))
    logp = logprobs(policy, responses)                                                      # (B,)
    h = logp - logp.new_tensor([response.reference for response in responses])              # (B,)
    sums = ranking_sums(args.beta * h, rankings, args.loss_fn)
    length = logp.new_tensor([sum(response.target) for response in responses])              # (B,)
    best = [response is ranking[0] for ranking in rankings for response in ranking]         # B
    sums["loss"] -= args.sft_coef * (logp / length)[best].sum()
    return sums


# ---- the mean reward ------------------------------------------------------------------------------------------------

def sample_answers(model: Llama, prompts: list[dict], stage: Stage) -> list[list[int]]:
    """Returns prompt and answer for the first 64 prompts that leave room for one; the SFT model answers.

    Every process samples the same."""
    longest = stage.args.max_len
    encoded = (text.encode_prompt(record["messages"], stage.tokenizer, stage.template) for record in prompts)
    rows = list(islice((row for row in encoded if len(row) < longest), 64))
    generator = torch.Generator(model.device).manual_seed(stage.args.seed)
    room = [longest - len(row) for row in rows]             # tokens of each answer at most
    answers = model.generate(rows, room, generator=generator)
    return [row + answer for row, answer in zip(rows, answers)]


@torch.no_grad()
def mean_score(model: RewardModel, rows: list[list[int]]) -> float:
    """Returns the mean score of some token rows."""
    model.eval()
    return sum(score_rows(model, some).sum().item() for some in text.chunks(rows, 16)) / len(rows)


# ---- files, flags, main ---------------------------------------------------------------------------------------------

DEMO = {"dataset": [demo.FOLDER / "preferences.jsonl.gz"], "lr": 1e-3, "batch_size": 4, "accumulation_steps": 2,
        "max_epochs": 1, "max_len": 160, "weight_decay": 0.1}
# Coati: lr 9e-6, 1 epoch, batch 1. One epoch is InstructGPT's: reward models overfit in the second.
FINETUNE = {"lr": 9e-6, "batch_size": 4, "accumulation_steps": 8, "max_epochs": 1, "weight_decay": 0.0}
# What dpo and ipo have instead. 1e-6 and a batch of 64 are those of DPO's paper. In the demo 3 epochs of dpo without
# --sft_coef reach a gold score of 0.905 at lr 2e-4 and beta 0.3; two at lr 1e-3 and beta 0.1 end at 0.193 (9.).
POLICY = {"beta": 0.1, "sft_coef": 0.0}
POLICY_DEMO = DEMO | POLICY | {"lr": 3e-4, "max_epochs": 3, "sft_coef": 1.0, "weight_decay": 0.0}
POLICY_FINETUNE = FINETUNE | POLICY | {"lr": 1e-6, "accumulation_steps": 16}


def parse(argv: list[str] | None) -> Namespace:
    """Returns the flags of stage 2. Those that depend on the input are None until sft.start fills them in."""
    parser = run.training_parser("Stage 2: the reward model. Without flags, the demo: reads out/sft, writes out/rm. "
                                 "With --loss_fn dpo, a policy instead: writes out/dpo.")
    flag = parser.add_argument
    flag("--dataset", type=Path, nargs="+",
         help="preferences: prompt/chosen/rejected, HH-RLHF transcripts or rankings (data/records.py)")
    flag("--loss_fn", choices=sorted(LOSSES), default="log_sig",
         help="of a pair: log_sig and log_exp are -log sigmoid of the difference; dpo and ipo train a "
              "policy, with defaults of their own, see the docstring")
    flag("--beta", type=run.number(0, above=True),
         help="dpo, ipo: what a nat of KL to the reference costs (0.1)")
    flag("--sft_coef", type=run.number(),
         help="dpo, ipo: weight of the mean -log p of the best response's tokens (0; the demo: 1)")
    sft.add_loop_flags(parser, "rankings", 64)
    parser.tell(FINETUNE, DEMO)
    args = parser.parse_args(argv)
    is_policy = args.loss_fn in POLICY_LOSSES
    if not is_policy and (args.beta, args.sft_coef) != (None, None):
        parser.error("--beta and --sft_coef are for a policy: give --loss_fn dpo or ipo too")
    args.save_path = args.save_path or Path("out", args.loss_fn if is_policy else "rm")
    if is_policy and is_for_reward_models(args.save_path):
        parser.error(f"--save_path {args.save_path} is a reward model's directory, where ppo.py would find a policy: "
                     "name another")
    args.pretrain = args.pretrain or run.finished(Path("out/sft"), "sft", "--pretrain")
    return args


def is_for_reward_models(directory: Path) -> bool:
    """Is it out/rm, or does a reward model lie there?"""
    is_model = weights.is_adapter(directory) or (directory / "config.json").exists()
    return directory.resolve() == Path("out/rm").resolve() or is_model and read_head(directory)[0] is not None


def split_rankings(found: list[dict], encode: Callable, stage: Stage) -> tuple[list, list]:
    """Returns the rankings to train on and those held out, encoded.

    Held out of the demo are rankings without label noise about unseen pairs of things."""
    args = stage.args
    encode = partial(sft.encode_all, encode=encode, what="rankings", max_len=args.max_len, stage=stage)
    if not stage.is_demo:
        return text.split_held_out(encode(found), args.eval_size, args.seed)
    clean = demo.preference_records(1, 150, noise=0.0, held=True)
    return encode(found), encode([records.normalise(record, "preference") for record in clean])


ranking_task = partial(
    sft.Task,
    rows=lambda ranking: list(map(len, ranking)),
    units=lambda ranking: 1,
    names=("loss", "right", "margin", "chosen", "pairs"),
    figures=ranking_figures)


def train_reward(trunk: Llama, found: list[dict], stage: Stage) -> dict:
    """Makes a reward model of the SFT model and writes it. Returns the figures of the summary."""
    args = stage.args
    rankings, held = split_rankings(found, text.encode_preference, stage)
    answers = sample_answers(trunk, found, stage)           # 5. while the trunk still has its language head
    trunk.output = None
    model = RewardModel(trunk, torch.Generator().manual_seed(args.seed))
    model.config.extra["pad_token_id"] = stage.tokenizer.pad_id     # 6.
    if stage.tokenizer.pad_id is None:
        stage.say("note: every token of the tokenizer may stand in a text, so none can be padding: transformers will "
                  "score one answer at a time")
    sft.set_up(model, args)
    sums = lambda some: ranking_sums(score_rows(model, list(chain(*some))), some, args.loss_fn)
    optimizer, figures = sft.train(model, ranking_task(rankings, held, sums=sums), stage)
    model.config.extra["reward_mean"] = mean_score(model, answers)      # 5.
    figures["reward_mean"] = model.reward_mean
    sft.save_model(model, optimizer, stage)
    return figures


def train_policy(policy: Llama, found: list[dict], stage: Stage) -> dict:
    """Trains the SFT model itself and writes it. Returns the figures of the summary."""
    args = stage.args
    rankings, held = split_rankings(found, encode_responses, stage)
    before = measure(policy, "before", stage)
    sft.set_up(policy, args)
    sums, prepare = partial(policy_sums, policy, args=args), partial(score_reference, policy, rankings + held, stage)
    optimizer, figures = sft.train(policy, ranking_task(rankings, held, sums=sums, prepare=prepare), stage)
    sft.save_model(policy, optimizer, stage)
    return figures | before | measure(policy, "after", stage)


def measure(policy: Llama, when: str, stage: Stage) -> dict:
    """Returns the demo's gold score and samples, nothing for another world's model."""
    figures = sft.measure_demo(policy.eval(), stage) if stage.is_demo else {}
    return {f"{name}_{when}": x for name, x in figures.items()}


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    is_policy = args.loss_fn in POLICY_LOSSES
    named = args.dataset is not None
    is_demo = not named and demo.is_demo(args.pretrain)
    preset, usual = (POLICY_DEMO, POLICY_FINETUNE) if is_policy else (DEMO, FINETUNE)
    stage = sft.start(args, is_demo, preset if is_demo else {"dataset": DEMO["dataset"]} | usual)
    if not named and not is_demo:   # as in Coati's published command
        stage.say("note: without --dataset the preferences are the demo's: name those of your own")
    model = sft.open_llama(stage)
    sft.resolve_max_len(args, model.config)
    found = sft.read_records(args.dataset, "preference", stage)
    run.say_flags(stage.world, args)
    figures = (train_policy if is_policy else train_reward)(model, found, stage)
    return sft.finish(figures, {"accuracy": "held-out accuracy {:.3f}", "margin": "mean margin {:.2f}",
                                "gold_before": "gold {:.3f} before", "gold_after": "{:.3f} after"}, stage)


if __name__ == "__main__":
    run.command(main)
