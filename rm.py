"""Stage 2, the reward model: a LLaMA whose head gives one number, trained so that better answers get larger ones.

    python rm.py                                                        the demo: reads out/sft, writes out/rm
    torchrun --standalone --nproc_per_node=2 rm.py
    python rm.py --pretrain SFT_DIR --dataset rm-static.jsonl --loss_fn log_exp --save_path rmstatic

Ouyang et al. 2022 (arXiv 2203.02155), section 3.5, second step; Stiennon et al. 2020 (arXiv 2009.01325). Huang et al. 2024,
"The N+ implementation details of RLHF with PPO" (arXiv 2403.17031), for head, initialisation and normalisation.

    prompt   response A                     score at the last real token
    p p p p  a a a a a EOS                  r(A) ----.
    p p p p  b b b EOS  .   .   .           r(B) ----+--> -log sigmoid(r(A) - r(B)),  A was preferred
                        padding, on the right: causal attention never looks there

1. All responses to a prompt are scored in one batch, each at its own last token (found by length, never by comparing ids).
2. A ranking of K responses is all K(K-1)/2 pairs, weighted 1 / that number: pairs of one prompt are not independent.
3. log_sig is -log sigmoid(d), log_exp is log(1 + exp(-d)), Coati's two names for the same function; both are computed in the
   form that does not overflow.
4. The head starts with standard deviation 1/sqrt(dim + 1) (Coati: 1/(dim + 1), which gives scores too alike to learn from).
5. After training the mean score of the SFT model's own answers is stored as `reward_mean` and subtracted from every score, so
   that PPO starts near zero and a positive reward means "better than before".

Letters: B rows of a batch (all responses), T time, C channels, P pairs.
"""

import argparse
from functools import partial
from itertools import combinations, islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora
import quantize
import sft
from data import demo, run, text
from data.records import normalise, read_records
from data.text import Tokenizer, check_tokenizer
from data.weights import fill, read_config, read_tensors, write_model
from model import Llama, LlamaConfig

DEMO = {"dataset": [demo.FOLDER / "preferences.jsonl.gz"], "lr": 1e-3, "batch_size": 4, "accumulation_steps": 2, "max_epochs": 1, "max_len": 160, "weight_decay": 0.1}
# Coati: lr 9e-6, 1 epoch, batch 1. One epoch is InstructGPT's: reward models overfit in the second.
FINETUNE = {"lr": 9e-6, "batch_size": 4, "accumulation_steps": 8, "max_epochs": 1, "weight_decay": 0.0}


class RewardModel(nn.Module):
    """A LLaMA trunk and a head without bias that gives one number a token."""

    def __init__(self, trunk: Llama, generator: torch.Generator | None = None):
        super().__init__()
        self.trunk, self.config = trunk, trunk.config
        self.score = nn.Linear(trunk.config.dim, 1, bias=False, device=trunk.device)
        if trunk.device.type != "meta":
            nn.init.normal_(self.score.weight, std=(trunk.config.dim + 1) ** -0.5, generator=generator)

    @property
    def device(self) -> torch.device:
        return self.trunk.device

    @property
    def reward_mean(self) -> float:
        return self.config.extra.get("reward_mean", 0.0)

    def values(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """A score after every token, (B, T), in fp32: the critic's view. Padding on the right needs no mask."""
        h = self.trunk.hidden(tokens, mask)  # (B, T, C)
        return F.linear(h.float(), self.score.weight.float()).squeeze(-1) - self.reward_mean  # (B, T)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """tokens (B, T), mask (B, T) True where real, padding on either side -> scores (B,) at each row's last real token."""
        return at_last(self.values(tokens, mask), mask)

    @classmethod
    def from_pretrained(cls, directory: str | Path, dtype: torch.dtype | None = None, device="cpu", base: Path | None = None) -> "RewardModel":
        """Read what save_pretrained or lora.save_adapter wrote; an adapter is folded into its base, the one that it names
        unless `base` names another. Raises ValueError when there is no head: a plain LLaMA scores nothing."""
        directory = Path(directory)
        if lora.is_adapter(directory):
            if lora.read_adapter_config(directory).get("task_type") != "SEQ_CLS":
                raise ValueError(f"{directory} is an adapter of a language model, not of a reward model: train one with rm.py")
            model = cls(quantize.load(base or lora.base_path(directory), dtype, device, head=False))
            config = lora.load_adapter(model, directory)
            model.config.extra["reward_mean"] = config.get("reward_mean", 0.0)
            lora.fold(model)
            return model
        fields = read_config(directory)
        tensors, config = read_tensors(directory, fields), LlamaConfig(**fields)
        if "score.weight" not in tensors:
            raise ValueError(f"{directory} has no score.weight: it is not a reward model, train one with rm.py")
        with torch.device("meta"):
            model = cls(Llama(config, head=False))
        fill(model.trunk, tensors, dtype, device, directory, ("score.weight", "output.weight"))
        model.trunk.make_rope()
        score = tensors["score.weight"].read()
        if score.shape != model.score.weight.shape:
            raise ValueError(f"{directory}: score.weight is {tuple(score.shape)}, a reward model of this width has {tuple(model.score.weight.shape)}")
        model.score.weight = nn.Parameter(score.to(device, torch.float32, copy=True))  # tiny, and computed in fp32 anyway
        return model

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the layout of LlamaForSequenceClassification, which scores the last id that is not pad_token_id: so 0, never EOS."""
        tensors = {name.removeprefix("trunk."): p for name, p in self.named_parameters()}
        write_model(directory, vars(self.config), tensors, "LlamaForSequenceClassification",
                    {"pad_token_id": 0, "num_labels": 1, "id2label": {"0": "reward"}, "label2id": {"reward": 0}})


def at_last(x: Tensor, mask: Tensor) -> Tensor:
    """The entry of x (B, T) at each row's last True of mask (B, T) -> (B,)."""
    place = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, place, -1).amax(1, keepdim=True)  # (B, 1)
    return x.gather(1, last).squeeze(1)


def log_sig(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log sigmoid(chosen - rejected), per pair (P,)."""
    return -F.logsigmoid(chosen - rejected)


def log_exp(chosen: Tensor, rejected: Tensor) -> Tensor:
    """log(1 + exp(rejected - chosen)), per pair (P,): the same function, written as Coati's second loss."""
    return F.softplus(rejected - chosen)


LOSSES = {"log_sig": log_sig, "log_exp": log_exp}


def pairs(sizes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Rankings of `sizes` responses, best first, their rows one after the other -> row of the better, row of the worse, and
    weight, (P,) each. sizes [3, 2] gives better 0 0 1 3, worse 1 2 2 4, weight 1/3 1/3 1/3 1."""
    better, worse, weight, start = [], [], [], 0
    for size in sizes:
        for i, j in combinations(range(start, start + size), 2):
            better.append(i)
            worse.append(j)
            weight.append(2 / (size * (size - 1)))
        start += size
    return torch.tensor(better), torch.tensor(worse), torch.tensor(weight)


def score_rankings(model: RewardModel, rankings: list[list[list[int]]]) -> tuple[Tensor, Tensor, Tensor]:
    """Score all responses of some rankings in one batch -> chosen (P,), rejected (P,), weight (P,)."""
    tokens, mask = text.pad([row for ranking in rankings for row in ranking])
    device = model.score.weight.device
    scores = at_last(model.values(tokens.to(device)), mask.to(device))  # (B,)
    better, worse, weight = (x.to(device) for x in pairs([len(ranking) for ranking in rankings]))
    return scores[better], scores[worse], weight


def pair_sums(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(right, margin, pairs): what accuracy and mean margin are made of; a tie is not right."""
    return torch.stack(((chosen > rejected).sum(), (chosen - rejected).sum(), torch.tensor(len(chosen)).to(chosen.device))).float()


def pair_figures(sums: list[float]) -> dict:
    right, margin, n = sums
    return {"accuracy": right / max(n, 1), "margin": margin / max(n, 1)}


@torch.no_grad()
def evaluate(model: RewardModel, held: list, loss_fn: str, args: argparse.Namespace, world: run.World) -> dict:
    """eval_loss, accuracy and margin over all pairs of the held-out rankings, shared out over the processes."""
    if not held:
        return {"eval_loss": None, "accuracy": None, "margin": None}
    model.eval()
    total = torch.zeros(4, device=world.device)
    lengths = [max(map(len, ranking)) for ranking in held]
    for micro in filter(None, text.micro_batches(list(range(len(held))), lengths, args.batch_size, world.rank, world.world)):
        chosen, rejected, weight = score_rankings(model, [held[i] for i in micro])
        total += torch.cat(((LOSSES[loss_fn](chosen, rejected) * weight).sum().view(1), pair_sums(chosen, rejected)))
    loss, *sums = run.all_reduce(total).tolist()
    model.train()
    return {"eval_loss": loss / len(held)} | pair_figures(sums)


def sample_answers(model: Llama, records: list[dict], tokenizer: Tokenizer, args: argparse.Namespace, n: int = 64) -> list[list[int]]:
    """The SFT model's own answers to the first n prompts that leave room for one, prompt included; every process draws the same."""
    template = text.TEMPLATES[args.template]
    encoded = (text.encode_prompt(record["messages"], tokenizer, template) for record in records)
    prompts = list(islice((prompt for prompt in encoded if len(prompt) < args.max_len), n))
    generator = torch.Generator(model.device).manual_seed(args.seed)
    answers = model.generate(prompts, [args.max_len - len(prompt) for prompt in prompts], eos_id=tokenizer.eos_id, generator=generator)
    return [prompt + answer for prompt, answer in zip(prompts, answers)]


@torch.no_grad()
def mean_score(model: RewardModel, rows: list[list[int]]) -> float:
    """Mean of the raw scores (no mean subtracted yet) of some token rows."""
    model.eval()
    total = 0.0
    for i in range(0, len(rows), 16):
        tokens, mask = (x.to(model.score.weight.device) for x in text.pad(rows[i:i + 16]))
        total += (at_last(model.values(tokens), mask) + model.reward_mean).sum().item()
    return total / len(rows)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = run.training_parser("Stage 2: the reward model. Without flags, the demo: reads out/sft, writes out/rm.", "out/rm")
    parser.add_argument("--dataset", type=Path, nargs="+", help="preferences: prompt/chosen/rejected, HH-RLHF transcripts or rankings (data/__init__.py)")
    parser.add_argument("--loss_fn", choices=sorted(LOSSES), default="log_sig", help="two names for the same function, see the docstring")
    parser.add_argument("--batch_size", type=run.whole(1), help="rankings (or pairs) a process and micro-batch")
    parser.add_argument("--max_epochs", type=run.whole(1), help="passes over the data")
    parser.add_argument("--max_len", type=run.whole(2), help="longest prompt with response in tokens; longer responses are cut (512, or the model's context)")
    parser.add_argument("--eval_size", type=run.whole(0), default=64, help="rankings held out for accuracy and margin, at most a tenth of all")
    parser.add_argument("--eval_interval", type=run.whole(0), default=0, help="updates between two evaluations (0 = at the end only)")
    parser.tell(FINETUNE, DEMO)
    args = parser.parse_args(argv)
    if args.pretrain is None:
        args.pretrain = run.finished(Path("out/sft"), "sft", "--pretrain")
    return args


def read_rankings(args: argparse.Namespace, tokenizer: Tokenizer, world: run.World, is_demo: bool) -> tuple[list, list, list[dict]]:
    """(train, held out, the records they came from). Held out of the demo are clean rankings about unseen pairs of things."""
    encode = partial(text.encode_preference, tokenizer=tokenizer, template=text.TEMPLATES[args.template], max_len=args.max_len)
    records = read_records(args.dataset, "preference", args.skip_bad_records, args.max_datasets_size, partial(run.say, world))
    encoded, dropped = text.encode_all(records, encode, "rankings")
    if dropped:
        run.say(world, f"note: {dropped} of {len(records)} rankings have a prompt of --max_len {args.max_len} tokens or responses that are equal up to there: left out")
    rankings = [responses for responses, _ in encoded]
    if is_demo:
        clean = [normalise(record, "preference") for record in demo.preference_records(1, 150, noise=0.0, held=True)]
        return rankings, [responses for responses, _ in text.encode_all(clean, encode, "rankings")[0]], records
    return *text.split_held_out(rankings, args.eval_size, args.seed), records


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    world = run.start(args.device, args.strategy)
    is_demo = args.dataset is None and demo.is_demo(args.pretrain)
    run.check_save_path(args.save_path, sft.inputs_of(args))
    tokenizer = sft.open_tokenizer(args, args.pretrain, world)
    run.resolve(args, DEMO if is_demo else {"dataset": DEMO["dataset"]} | FINETUNE)
    trunk = sft.open_llama(args.pretrain, run.choose_dtype(args.dtype, world.device) if args.lora_rank else None, world)
    check_tokenizer(tokenizer, trunk.config.vocab_size)
    sft.resolve_max_len(args, trunk.config)
    rankings, held, records = read_rankings(args, tokenizer, world, is_demo)
    run.say_flags(world, args)
    answers = sample_answers(trunk, records, tokenizer, args)
    base = sft.base_for_adapter(trunk, args, tokenizer, world) if args.lora_rank else None
    trunk.output = None  # answers are drawn: the language head has done its work
    model = RewardModel(trunk, torch.Generator(trunk.device).manual_seed(args.seed))
    model.config.extra.pop("reward_mean", None)
    if args.lora_rank:
        sft.add_adapters(model, args)
        model.score.weight.requires_grad_(True)  # the head is new: it is trained in full and stored with the adapter
    marks = run.fingerprint(model, rankings, args.seed)
    sft.set_up(trunk, args)
    torch.manual_seed(args.seed * 1000 + world.rank)
    optimizer = sft.make_optimizer(model, args, run.choose_dtype(args.dtype, world.device))

    def loss_of(micro: list[int]) -> tuple[Tensor, Tensor]:
        chosen, rejected, weight = score_rankings(model, [rankings[i] for i in micro])
        return (LOSSES[args.loss_fn](chosen, rejected) * weight).sum(), pair_sums(chosen.detach(), rejected.detach())

    task = sft.Task([list(map(len, ranking)) for ranking in rankings], len, loss_of, 3, pair_figures, partial(evaluate, model, held, args.loss_fn, args, world))
    with run.resumable(args):
        figures = sft.train(model, optimizer, task, marks, args, world)
    model.config.extra["reward_mean"] = mean_score(model, answers)
    figures["reward_mean"] = model.reward_mean
    sft.save_model(model, optimizer, args, tokenizer, base, world, {"reward_mean": model.reward_mean})
    summary = run.write_summary(args, world, figures)
    accuracy = "" if summary["accuracy"] is None else f"held-out accuracy {summary['accuracy']:.3f}, mean margin {summary['margin']:.2f}, "
    run.say(world, f"wrote {args.save_path}: {accuracy}{summary['seconds']:.0f} s, {run.peak_text(summary, world)}")
    return summary


if __name__ == "__main__":
    run.command(main)
