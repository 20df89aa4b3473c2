"""Stage 2, the reward model: a LLaMA whose head gives one number, trained so that better answers get larger ones.

    python rm.py                                                        the demo: reads out/sft, writes out/rm
    torchrun --standalone --nproc_per_node=2 rm.py
    python rm.py --pretrain SFT_DIR --dataset rm-static.jsonl --loss_fn log_exp --save_path rmstatic

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

Letters: B rows of a batch (all responses), T time, C channels, P pairs.
"""

from argparse import Namespace
from functools import partial
from itertools import combinations, islice
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
        self.score = nn.Linear(trunk.config.dim, 1, bias=False, device=trunk.device)
        nn.init.normal_(self.score.weight, std=(trunk.config.dim + 1) ** -0.5, generator=generator)     # 4.

    @property
    def device(self) -> torch.device:
        return self.trunk.device

    @property
    def reward_mean(self) -> float:
        return self.config.extra.get("reward_mean", 0.0)

    def values(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns a score after every token, (B, T), in fp32. The critic of ppo.py needs all, a reward the last alone.

        Padding on the right needs no mask."""
        h = self.trunk.hidden(tokens, mask)                                         # (B, T, C)
        scores = F.linear(h.float(), self.score.weight.float()).squeeze(-1)         # (B, T)
        return scores - self.reward_mean                                            # 5.

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Returns the score (B,) at each row's last real token.

        tokens (B, T); mask (B, T) True where a token is real, padding on either side."""
        return at_last(self.values(tokens, mask), mask)

    @classmethod
    def from_pretrained(cls, directory: str | Path, dtype: torch.dtype | None = None, device="cpu",
                        base: Path | None = None) -> "RewardModel":
        """Opens a reward model, plain or quantized, or an adapter, which is merged into its base (or into `base`)."""
        directory = Path(directory)
        if lora.is_adapter(directory):
            score, extra = lora.read_adapter(directory).get("score.weight"), lora.read_adapter_config(directory)
        else:
            fields = weights.read_config(directory)
            stored, extra = weights.read_tensors(directory, fields).get("score.weight"), fields["extra"]
            score = None if stored is None else stored.read()
        if score is None:
            raise ValueError(f"{directory} has no score.weight: it is not a reward model, train one with rm.py")
        trunk = quantize.open_model(directory, dtype, device, head=False, adapter="merge", base=base)
        found, right = tuple(score.shape), (1, trunk.config.dim)
        if found != right:
            raise ValueError(f"{directory}: score.weight is {found}, a reward model of this width has {right}")
        model = cls(trunk, torch.Generator(device))
        model.score.weight.data = score.to(device, torch.float32, copy=True)
        model.config.extra["reward_mean"] = extra.get("reward_mean", 0.0)
        return model

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes the layout of transformers' LlamaForSequenceClassification."""
        tensors = {name.removeprefix("trunk."): p for name, p in self.named_parameters()}
        weights.write_model(directory, vars(self.config), tensors, "LlamaForSequenceClassification")


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


LOSSES = {"log_sig": log_sig, "log_exp": log_exp}       # 3.


def pairs(sizes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the row of the better response, that of the worse one, and the weight of every pair, (P,) each.

    sizes are the numbers of responses of the rankings. Their rows follow one another, best first in each ranking.
    sizes [3, 2] gives better 0 0 1 3, worse 1 2 2 4, weight 1/3 1/3 1/3 1."""
    better, worse, weight, start = [], [], [], 0
    for size in sizes:
        for i, j in combinations(range(start, start + size), 2):
            better.append(i)
            worse.append(j)
            weight.append(2 / (size * (size - 1)))      # 2.
        start += size
    return torch.tensor(better), torch.tensor(worse), torch.tensor(weight)


def score_rankings(model: RewardModel, rankings: list[list[list[int]]]) -> tuple[Tensor, Tensor, Tensor]:
    """Scores all responses of some rankings in one batch. Returns chosen, rejected, weight of all pairs, each (P,)."""
    tokens, mask = text.pad([row for ranking in rankings for row in ranking])       # (B, T)
    scores = at_last(model.values(tokens.to(model.device)), mask.to(model.device))  # (B,) 1.
    better, worse, weight = (x.to(model.device) for x in pairs(list(map(len, rankings))))       # (P,)
    return scores[better], scores[worse], weight


def pair_sums(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """Returns the sums from which pair_figures makes accuracy and mean margin. A tie is not right."""
    d = chosen - rejected                                                           # (P,)
    return {"right": (d > 0).sum(), "margin": d.sum(), "pairs": d.new_tensor(len(d))}


def pair_figures(sums: dict[str, float]) -> dict[str, float]:
    """Returns the share of pairs with the better response ahead, and their mean score difference."""
    n = max(sums["pairs"], 1)
    return {"accuracy": sums["right"] / n, "margin": sums["margin"] / n}


# ---- the mean reward ------------------------------------------------------------------------------------------------

def sample_answers(model: Llama, prompts: list[dict], stage: Stage, n: int = 64) -> list[list[int]]:
    """Returns prompt and answer for the first n prompts that leave room for one; the SFT model answers.

    Every process samples the same."""
    longest = stage.args.max_len
    encoded = (text.encode_prompt(record["messages"], stage.tokenizer, stage.template) for record in prompts)
    rows = list(islice((row for row in encoded if len(row) < longest), n))
    generator = torch.Generator(model.device).manual_seed(stage.args.seed)
    room = [longest - len(row) for row in rows]             # tokens of each answer at most
    answers = model.generate(rows, room, generator=generator)
    return [row + answer for row, answer in zip(rows, answers)]


@torch.no_grad()
def mean_score(model: RewardModel, rows: list[list[int]]) -> float:
    """Returns the mean score of some token rows."""
    model.eval()
    total = 0.0
    for some in text.chunks(rows, 16):
        tokens, mask = (x.to(model.device) for x in text.pad(some))
        total += model(tokens, mask).sum().item()
    return total / len(rows)


# ---- files, flags, main ---------------------------------------------------------------------------------------------

DEMO = {"dataset": [demo.FOLDER / "preferences.jsonl.gz"], "lr": 1e-3, "batch_size": 4, "accumulation_steps": 2,
        "max_epochs": 1, "max_len": 160, "weight_decay": 0.1}
# Coati: lr 9e-6, 1 epoch, batch 1. One epoch is InstructGPT's: reward models overfit in the second.
FINETUNE = {"lr": 9e-6, "batch_size": 4, "accumulation_steps": 8, "max_epochs": 1, "weight_decay": 0.0}


def parse(argv: list[str] | None) -> Namespace:
    """Returns the flags of stage 2. Those that depend on the input are None until sft.start fills them in."""
    parser = run.training_parser("Stage 2: the reward model. Without flags, the demo: reads out/sft, writes out/rm.",
                                 "out/rm")
    parser.add_argument("--dataset", type=Path, nargs="+",
                        help="preferences: prompt/chosen/rejected, HH-RLHF transcripts or rankings (data/records.py)")
    parser.add_argument("--loss_fn", choices=sorted(LOSSES), default="log_sig",
                        help="of a pair; both are -log sigmoid of the difference, see the docstring")
    sft.add_loop_flags(parser, "rankings", 64)
    parser.tell(FINETUNE, DEMO)
    args = parser.parse_args(argv)
    args.pretrain = args.pretrain or run.finished(Path("out/sft"), "sft", "--pretrain")
    return args


def split_rankings(found: list[dict], stage: Stage) -> tuple[list, list]:
    """Returns the rankings to train on and those held out, encoded.

    Held out of the demo are rankings without label noise about unseen pairs of things."""
    args = stage.args
    encode = partial(sft.encode_all, encode=text.encode_preference, what="rankings", max_len=args.max_len, stage=stage)
    if not stage.is_demo:
        return text.split_held_out(encode(found), args.eval_size, args.seed)
    clean = demo.preference_records(1, 150, noise=0.0, held=True)
    return encode(found), encode([records.normalise(record, "preference") for record in clean])


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    is_demo = args.dataset is None and demo.is_demo(args.pretrain)
    named = args.dataset is not None
    stage = sft.start(args, is_demo, DEMO if is_demo else {"dataset": DEMO["dataset"]} | FINETUNE)
    if not named and not is_demo:   # as in Coati's published command
        stage.say("note: without --dataset the preferences are the demo's: name those of your own")
    trunk = sft.open_llama(stage)
    sft.resolve_max_len(args, trunk.config)
    found = sft.read_records(args.dataset, "preference", stage)
    rankings, held = split_rankings(found, stage)
    run.say_flags(stage.world, args)
    answers = sample_answers(trunk, found, stage)           # 5. while the trunk still has its language head
    base = sft.base_for_adapter(trunk, stage)
    trunk.output = None
    model = RewardModel(trunk, torch.Generator(trunk.device).manual_seed(args.seed))
    model.config.extra["pad_token_id"] = stage.tokenizer.pad_id     # 6.
    if stage.tokenizer.pad_id is None:
        stage.say("note: every token of the tokenizer may stand in a text, so none can be padding: transformers will "
                  "score one answer at a time")
    sft.set_up(model, args)

    def sums(micro: list) -> dict[str, Tensor]:
        chosen, rejected, weight = score_rankings(model, micro)
        return {"loss": (LOSSES[args.loss_fn](chosen, rejected) * weight).sum(), **pair_sums(chosen, rejected)}

    rows, units = lambda ranking: list(map(len, ranking)), lambda ranking: 1
    task = sft.Task(rankings, held, rows, units, sums, ("loss", "right", "margin", "pairs"), pair_figures)
    optimizer, figures = sft.train(model, task, stage)
    model.config.extra["reward_mean"] = mean_score(model, answers)      # 5.
    figures["reward_mean"] = model.reward_mean
    sft.save_model(model, optimizer, base, stage)
    return sft.finish(figures, {"accuracy": "held-out accuracy {:.3f}", "margin": "mean margin {:.2f}"}, stage)


if __name__ == "__main__":
    run.command(main)
