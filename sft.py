"""Stage 1, supervised fine-tuning (SFT): next-token prediction on answers.

    python sft.py                                                     the demo: a small LLaMA from scratch on data/demo
    torchrun --standalone --nproc_per_node=2 sft.py                   the same on two processes, the same losses
    python sft.py --pretrain LLAMA_DIR --dataset alpaca_data.json     fine-tune real weights
    python sft.py --pretrain LLAMA_DIR --dataset alpaca_data.json --lora_rank 16 --batch_size 1 --accumulation_steps 8

Ouyang et al. 2022, "InstructGPT" (arXiv 2203.02155), section 3.5, first step.

    tokens    BOS  p   p   p   a   a   a  EOS  .   .        p prompt, a answer, . padding
    target     -   -   -   -   x   x   x   x   -   -        x target, predicted from the hidden state one place before

    loss = sum over targets of -log p(token | all tokens before it) / number of targets

What matters and is easy to get wrong:

1. Only answers are targets, EOS included: a model that never sees EOS as a target never stops.
2. The loss of a step is the sum over all its target tokens divided by their number, over all micro-batches and
   processes. A mean of means would weigh a token of a short answer more, and change with --accumulation_steps.
3. The order of the data depends on seed, epoch and global batch size alone, so 1 process with batch 8 and 2 with
   batch 4 take the same steps.
4. `--resume` continues bit for bit: weights, moments, schedule, position in the data and random states are those of the
   interrupted run.

Letters: B batch, T time, C channels, V vocabulary, N target tokens of a micro-batch, n rows of a chunk of them.
"""

import math
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora
import quantize
import zero
from data import demo, records, run, text, weights
from data.run import World
from data.text import Tokenizer
from model import Llama, LlamaConfig


# ---- the loss -------------------------------------------------------------------------------------------------------

def lm_loss(model: Llama, tokens: Tensor, target: Tensor) -> Tensor:
    """Returns the sum of -log p over the target tokens.

    tokens (B, T) are ids, padded on the right. target (B, T) is True at target tokens, never in column 0. Both may be
    on the CPU: then the targets are found without waiting for the GPU.
    """
    # 1. The head sees the hidden states before target tokens only: no logits are computed for prompts or padding.
    index = target[:, 1:].flatten().nonzero().flatten()                 # (N,) targets, among B * (T - 1) places
    answer = tokens[:, 1:].flatten()[index].to(model.device)            # (N,) their ids
    h = model.hidden(tokens.to(model.device))[:, :-1].flatten(0, 1)     # (B * (T - 1), C) one place before each token
    h = h.index_select(0, index.to(model.device))                       # (N, C)
    if torch.is_grad_enabled() and isinstance(model.output, nn.Linear):
        return HeadLoss.apply(h, model.output.weight, answer)
    return quantize.head_nll(model.output, h, answer)                   # evaluation, or a head with adapters


class HeadLoss(torch.autograd.Function):
    """Head and cross-entropy in one: the sum over rows of -log softmax(h W^T)[answer]; h (N, C), W (V, C), answer (N,).

    Logits are the largest tensor of a step, and autograd would keep several copies of them. But nothing is computed
    after the loss, so the gradient of the logits, softmax - onehot(answer), is known in forward already. Forward takes
    512 rows at a time through loss and gradient, so the full logits never exist. Backward only scales the gradients."""

    ROWS = 512      # enough for matrix products at full speed; with 32,000 pieces a chunk's fp32 logits are 65 MB

    @staticmethod
    def forward(ctx, h: Tensor, weight: Tensor, answer: Tensor) -> Tensor:
        if h.dtype == torch.float16:            # it cannot hold the probability of a rare piece
            h, weight = h.float(), weight.float()
        loss, dh = torch.zeros((), device=h.device), torch.empty_like(h)        # (), (N, C)
        dw = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None      # (V, C); a frozen head needs none
        for rows, ids, d_rows in zip(*(x.split(HeadLoss.ROWS) for x in (h, answer, dh))):       # d_rows: a view of dh
            logits = (rows @ weight.T).requires_grad_()                 # (n, V)
            with torch.enable_grad():
                part = F.cross_entropy(logits.float(), ids, reduction="sum")
            d_logits, = torch.autograd.grad(part, logits)               # (n, V)
            loss += part.detach()
            d_rows.copy_(d_logits @ weight)                             # (n, C)
            if dw is not None:
                dw.addmm_(d_logits.T, rows)                             # (V, C)
        ctx.save_for_backward(dh, dw)
        return loss

    @staticmethod
    def backward(ctx, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        dh, dw = ctx.saved_tensors
        return dh.mul_(d_loss), dw if dw is None else dw.mul_(d_loss), None


def cosine_lr(update: int, total: int, peak: float, warmup: float, floor: float = 0.1) -> float:
    """Returns the learning rate of an update (1 .. total).

    It rises linearly to peak over the first `warmup` share of the updates, then falls along half a cosine to
    floor * peak."""
    rising = max(1, math.ceil(warmup * total))
    if update <= rising:
        return peak * update / rising
    share = (update - rising) / (total - rising)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share)))


# ---- the training loop of stages 1 and 2 ----------------------------------------------------------------------------

class Task(NamedTuple):
    """What the loop must know of a stage. An example has one row of tokens in stage 1, one a response in stage 2."""
    examples: list                                      # to train on
    held: list                                          # held out, to evaluate on
    rows: Callable[[object], list[int]]                 # example -> length of each of its rows
    units: Callable[[object], int]                      # example -> its part of the loss's divisor: target tokens, or 1
    sums: Callable[[list], dict[str, Tensor]]           # micro-batch -> sums over it: "loss" and what `figures` needs
    names: tuple[str, ...] = ("loss",)                  # names of these sums
    figures: Callable[[dict], dict] = lambda sums: {}   # sums over a batch -> the stage's own metrics

    def lengths(self, examples: list) -> list[int]:
        """Returns the length of the longest row of each example, by which micro-batches are sorted."""
        return [max(self.rows(example)) for example in examples]


def batches(task: Task, batch: int, args: Namespace, position: dict) -> Iterator[list]:
    """Yields the examples of every update that is left from a position on.

    batch is the global batch size, position["batch"] the one for which the current epoch was shuffled. They differ if a
    resumed run has another batch size."""
    lengths = task.lengths(task.examples)
    first, seen = divmod(position["consumed"], len(lengths))
    for epoch in range(first, args.max_epochs):
        # 3. The order follows from seed, epoch and batch size.
        for indices in text.global_batches(lengths, batch, args.seed, epoch, seen, position["batch"]):
            yield [task.examples[i] for i in indices]
        seen = 0


def run_batch(task: Task, examples: list, args: Namespace, world: World,
              optimizer: zero.ZeRO2 | None = None) -> dict[str, float]:
    """Runs this process's share of a batch: forward, and with an optimizer backward.

    Returns loss and metrics of the whole batch."""
    divisor = sum(map(task.units, examples))        # 2. of the whole batch, on every process
    sums = dict.fromkeys(task.names, torch.zeros((), device=world.device))
    indices, lengths = list(range(len(examples))), task.lengths(examples)
    mine = text.micro_batches(indices, lengths, args.batch_size, world.rank, world.world)
    for number, micro in enumerate(mine, 1):
        loss = None                                 # a process without examples still calls backward: see zero.py
        if micro:
            new = task.sums([examples[i] for i in micro])
            loss = new["loss"] / divisor
            sums = {name: sums[name] + new[name].detach().float() for name in sums}
        if optimizer is not None:
            optimizer.backward(loss, last=number == len(mine))
    sums = run.reduce_sums(sums)
    return {"loss": sums["loss"] / divisor} | task.figures(sums)


def train(model: nn.Module, optimizer: zero.ZeRO2, task: Task, marks: dict, args: Namespace,
          world: World) -> dict:
    """Trains to the end. Returns what summary.json takes: last loss, steps, seconds, tokens_per_second, ...

    marks tell which model, data and seed a checkpoint is of (run.fingerprint). position is where the run is: its step,
    the examples consumed, the batch size of the current epoch, and the evaluation before the first step."""
    batch = args.batch_size * args.accumulation_steps * world.world
    if args.resume:
        position = restore(optimizer, marks, args, world)
    else:
        position = {"step": 0, "consumed": 0, "batch": batch, "before": evaluate(model, task, args, world)}
    first, left = position["step"], list(batches(task, batch, args, position))
    total = min(first + len(left), args.max_steps or math.inf)
    planned = say_plan(model, task, batch, total, args, world)
    append = run.open_metrics(args.save_path, world, first)
    started, tokens_done, loss = time.perf_counter(), 0, None
    model.train()
    for step, examples in enumerate(left[:max(0, total - first)], first + 1):
        began = time.perf_counter()
        lr = cosine_lr(step, total, args.lr, args.warmup)
        figures = run_batch(task, examples, args, world, optimizer)
        loss = figures.pop("loss")
        run.stop_if_broken(loss, step, lr, args.save_path)
        stats = optimizer.step(lr)
        # ---- log, evaluate, save ----
        tokens = sum(sum(task.rows(example)) for example in examples)
        tokens_done += tokens
        now = time.perf_counter()
        row = {
            "step": step,
            "loss": loss,
            "lr": lr,
            "seconds": now - started,
            "tokens_per_second": tokens / (now - began),
            "grad_norm": stats.grad_norm,
            "skipped": optimizer.skipped,
            "seconds/optimizer": stats.seconds,
            "seconds/copies": stats.copying,
        } | figures
        log = step % args.log_interval == 0 or step == total
        run.progress(world, step, total, started, describe(row, figures), log, first)
        if args.eval_interval and step % args.eval_interval == 0 and step < total:
            row |= evaluate(model, task, args, world)
        if log or "eval_loss" in row:
            append(row)
        position |= {"step": step, "consumed": position["consumed"] + len(examples)}
        if position["consumed"] % len(task.examples) == 0:
            position["batch"] = batch       # the next epoch is shuffled for this run's batch size
        if args.save_interval and (step % args.save_interval == 0 or step == args.max_steps):
            meta = position | {"marks": marks, "strategy": optimizer.strategy}
            run.save_checkpoint(args.save_path, world, meta, optimizer.state_dict())
    seconds = time.perf_counter() - started
    before = {f"{key}_before": value for key, value in position["before"].items()}
    return before | evaluate(model, task, args, world) | {
        "planned_memory_bytes": planned, "loss": loss, "steps": position["step"], "seconds": seconds,
        "tokens_per_second": tokens_done / seconds, "skipped": optimizer.skipped}


def restore(optimizer: zero.ZeRO2, marks: dict, args: Namespace, world: World) -> dict:
    """4. Brings optimizer, weights and random state back from the newest checkpoint. Returns its position."""
    position, states, random = run.load_checkpoint(args.save_path, world, marks, optimizer.strategy)
    optimizer.load_state_dict(states)
    run.set_random_state(random, world)
    return position


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, args: Namespace, world: World) -> dict:
    """Returns eval_loss and the stage's own metrics over the held-out examples; all are None without any."""
    if not task.held:   # figures of zeros tell the names
        return dict.fromkeys(["eval_loss", *task.figures(dict.fromkeys(task.names, 0.0))])
    model.eval()
    figures = run_batch(task, task.held, args, world)
    model.train()
    return {"eval_loss": figures.pop("loss"), **figures}


def describe(row: dict, figures: dict) -> str:
    """Returns the progress line of a row of metrics."""
    own = "".join(f" | {key} {value:.3f}" for key, value in figures.items())
    skipped = f" | skipped {row['skipped']}" if row["skipped"] else ""
    return f"loss {row['loss']:.4f}{own} | lr {row['lr']:.1e} | {row['tokens_per_second']:,.0f} tokens/s{skipped}"


def say_plan(model: nn.Module, task: Task, batch: int, total: int, args: Namespace, world: World) -> int:
    """Prints what the run will do and need. Returns the planned peak of memory above start-up, in bytes."""
    lengths, rows = task.lengths(task.examples), [task.rows(example) for example in task.examples]
    epoch = text.global_batches(lengths, batch, args.seed, 0)                       # of all processes
    micro_batches = [text.micro_batches(indices, lengths, args.batch_size, 0, 1) for indices in epoch]
    padding = 100 * text.padding_share(rows, micro_batches)
    trainable, everything = lora.trainable_report(model)
    n, tokens = len(rows), sum(map(sum, rows))
    run.say(world, f"{n} examples, {tokens:,} tokens, padding {padding:.1f} % | {total} updates of {args.batch_size} x "
                   f"{args.accumulation_steps} accumulated x {world.world} processes = {batch} examples | "
                   f"{trainable:,} of {everything:,} parameters trained")
    largest = args.batch_size * max(len(row) * max(row) for row in rows)        # tokens of a micro-batch
    dtype = run.choose_dtype(args.dtype, world.device)
    trained = [(model, model.config)]
    plan, peak = zero.run_plan(trained, [], args.strategy, world, largest, dtype, args.lora_rank, args.grad_checkpoint)
    run.say(world, plan)
    return peak


# ---- opening and saving models, for all three stages ----------------------------------------------------------------

def inputs_of(args: Namespace) -> list[Path]:
    """Returns the directories that --pretrain is read from: a model's, or those of an adapter and its base."""
    if args.pretrain is None:
        return []
    base = [lora.base_path(args.pretrain)] if lora.is_adapter(args.pretrain) else []
    return [args.pretrain, *base]


def open_tokenizer(args: Namespace, directory: Path | None, world: World) -> Tokenizer:
    """Opens the tokenizer of a model directory (None: the demo's), and settles args.template."""
    if directory is None:
        directory = demo.FOLDER
    elif not directory.exists():
        raise FileNotFoundError(f"{directory} does not exist: name a weights directory")
    home = lora.home(directory)
    named = text.read_template(home)
    if args.template is None:
        args.template = named if named in text.TEMPLATES else "alpaca"
    elif named not in (None, args.template):
        run.say(world, f"note: {home} was trained with the template {named}, --template {args.template} replaces it")
    return Tokenizer(home)


def open_llama(directory: Path, dtype: torch.dtype | None, world: World, head: bool = True) -> Llama:
    """Opens --pretrain to train it: an adapter is merged into its base.

    dtype None keeps the file's dtype. It is for training all weights, whose fp32 masters are made from the file's."""
    base = lora.base_path(directory) if lora.is_adapter(directory) else directory
    if weights.quantization(base) is not None:
        if dtype is None and base == directory:
            raise ValueError(f"{directory} is quantized, its weights cannot be trained: give --lora_rank to train "
                             "adapters beside them")
        if base != directory:
            run.say(world, f"note: {directory} is an adapter of a quantized model: merged they are a full-precision "
                           "one, with that one's memory")
    return quantize.open_model(directory, dtype, world.device, head=head, adapter="merge")


def add_adapters(model: nn.Module, args: Namespace) -> None:
    """Freezes the model and puts adapters on it, with the same numbers on every process."""
    generator = torch.Generator(model.device).manual_seed(args.seed)
    lora.attach(model, args.lora_rank, args.lora_alpha, args.lora_dropout, dtype=torch.float32, generator=generator)


def set_up(model: Llama, args: Namespace) -> None:
    """Applies --grad_checkpoint and --compile."""
    model.grad_checkpoint = args.grad_checkpoint
    if args.compile:
        for layer in model.layers:
            layer.compile()     # from the second batch length on, with dynamic shapes


def make_optimizer(model: nn.Module, args: Namespace, dtype: torch.dtype) -> zero.ZeRO2:
    return zero.ZeRO2(model.named_parameters(), dtype, weight_decay=args.weight_decay, max_norm=args.clip_grad,
                      strategy=args.strategy, trace=args.trace)


def base_for_adapter(model: Llama, args: Namespace, tokenizer: Tokenizer, world: World) -> str:
    """Returns what a new adapter will name as its base: --pretrain, or "base" if --pretrain is an adapter itself.

    Then the merged model is written to SAVE_PATH/base."""
    if not lora.is_adapter(args.pretrain):
        return str(args.pretrain.resolve())
    if world.rank == 0:
        model.save_pretrained(args.save_path / "base")
        tokenizer.save(args.save_path / "base", args.template)
    return "base"


def save_model(model: nn.Module, optimizer: zero.ZeRO2, args: Namespace, tokenizer: Tokenizer,
               base: str | None, world: World, extra: dict | None = None) -> None:
    """Writes the model, or with a base its adapter. Removes an adapter, or a model, that an earlier run left there."""
    adapter = base is not None
    with optimizer.masters():
        if world.rank == 0 and adapter:
            lora.save_adapter(model, args.save_path, base, extra)
        elif world.rank == 0:
            model.save_pretrained(args.save_path)
    if world.rank == 0:
        for pattern in ("config.json", "model*.safetensors*") if adapter else ("adapter_*",):
            for file in args.save_path.glob(pattern):
                file.unlink()
        tokenizer.save(args.save_path, args.template)
    run.barrier()


# ---- stage 1: files, flags, main ------------------------------------------------------------------------------------

# The defaults for the demo world; real weights get FINETUNE.
DEMO = {"dataset": [demo.FOLDER / "sft.jsonl.gz"], "lr": 2e-3, "batch_size": 16, "accumulation_steps": 1,
        "max_epochs": 2, "max_len": 160, "weight_decay": 0.1}
# Coati: lr 5e-6, 3 epochs. 2e-5 and no decay are Alpaca's for full fine-tuning.
FINETUNE = {"lr": 2e-5, "batch_size": 4, "accumulation_steps": 8, "max_epochs": 3, "weight_decay": 0.0}
# The demo's task is mostly to copy words of the instruction. Tied embeddings learn that from one table.
DEMO_MODEL = LlamaConfig(dim=192, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=64, ffn_dim=512, vocab_size=1280,
                         max_seq_len=256, tie_embeddings=True)


def add_loop_flags(parser: run.Parser, examples: str, held: int) -> None:
    """The flags of the training loop of stages 1 and 2."""
    flag = parser.add_argument
    flag("--batch_size", type=run.whole(1), help=f"{examples} a process and micro-batch")
    flag("--max_epochs", type=run.whole(1), help="passes over the data")
    flag("--max_len", type=run.whole(2),
         help=f"longest of the {examples} in tokens; longer ones are cut (512, or the model's context)")
    flag("--eval_size", type=run.whole(0), default=held,
         help=f"{examples} held out for evaluation, at most a tenth of all")
    flag("--eval_interval", type=run.whole(0), default=0,
         help="updates between two evaluations (0 = at the end only)")


def parse(argv: list[str] | None) -> Namespace:
    """Returns the flags of stage 1. Those that depend on the input are None until run.resolve fills them in."""
    parser = run.training_parser("Stage 1: supervised fine-tuning. Without flags, the demo: a small LLaMA from "
                                 "scratch on data/demo.", "out/sft")
    parser.add_argument("--dataset", type=Path, nargs="+",
                        help="records to learn: JSON list or lines, instruction, chat or text (data/records.py)")
    add_loop_flags(parser, "examples", 128)
    parser.tell(FINETUNE, DEMO)
    args = parser.parse_args(argv)
    if args.pretrain is None and args.dataset is not None:
        parser.error("--dataset needs --pretrain: without weights, only the demo is trained from scratch")
    if args.pretrain is None and args.lora_rank:
        parser.error("--lora_rank needs --pretrain: an adapter changes a trained model, from scratch there is none")
    if args.pretrain is not None and args.dataset is None:
        parser.error("--pretrain needs --dataset: name the records to fine-tune on")
    return args


def open_model(args: Namespace, tokenizer: Tokenizer, world: World) -> tuple[Llama, str | None]:
    """Opens --pretrain or makes the demo's model. Returns it, and the base that an adapter on it will name."""
    if args.pretrain is None:
        # The weights are drawn on the CPU, so that they are the same on every device.
        model = Llama(DEMO_MODEL, generator=torch.Generator().manual_seed(args.seed))
        return model.to(world.device), None
    # With adapters the model itself is frozen, so the compute dtype is enough.
    dtype = run.choose_dtype(args.dtype, world.device) if args.lora_rank else None
    model = open_llama(args.pretrain, dtype, world)
    text.check_tokenizer(tokenizer, model.config.vocab_size)
    if not args.lora_rank:
        return model, None
    base = base_for_adapter(model, args, tokenizer, world)
    add_adapters(model, args)
    return model, base


def resolve_max_len(args: Namespace, config: LlamaConfig) -> None:
    """Fills in --max_len, which may not be beyond the model's context."""
    run.resolve(args, {"max_len": min(512, config.max_seq_len)})
    if args.max_len > config.max_seq_len:
        raise ValueError(f"--max_len {args.max_len} is beyond the model's context of {config.max_seq_len} tokens")


def read_examples(args: Namespace, tokenizer: Tokenizer, world: World) -> tuple[list, list]:
    """Returns the examples to train on and those held out; an example is its ids and target flags."""
    found = records.read_records(args.dataset, "sft", args.skip_bad_records, args.max_datasets_size,
                                 partial(run.say, world))
    template = text.TEMPLATES[args.template]
    encode = partial(text.encode_example, tokenizer=tokenizer, template=template, max_len=args.max_len)
    examples, dropped = text.encode_all(found, encode, "examples")
    n = len(found)
    if dropped:
        run.say(world, f"note: {dropped} of {n} examples have a prompt of --max_len {args.max_len} tokens or more: "
                       "left out")
    return text.split_held_out(examples, args.eval_size, args.seed)


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    world = run.start(args.device, args.strategy)
    is_demo = args.pretrain is None
    run.check_save_path(args.save_path, inputs_of(args))
    tokenizer = open_tokenizer(args, args.pretrain, world)
    run.resolve(args, DEMO if is_demo else FINETUNE)
    model, base = open_model(args, tokenizer, world)
    resolve_max_len(args, model.config)
    examples, held = read_examples(args, tokenizer, world)
    run.say_flags(world, args)
    marks = run.fingerprint(model, examples, args.seed)
    set_up(model, args)
    torch.manual_seed(args.seed * 1000 + world.rank)        # dropout: each process has its own
    optimizer = make_optimizer(model, args, run.choose_dtype(args.dtype, world.device))

    def sums(micro: list) -> dict[str, Tensor]:
        tokens, _, target = text.collate(micro)
        return {"loss": lm_loss(model, tokens, target)}

    rows, units = lambda example: [len(example[0])], lambda example: sum(example[1])
    task = Task(examples, held, rows, units, sums)
    with run.resumable(args):
        figures = train(model, optimizer, task, marks, args, world)
    save_model(model, optimizer, args, tokenizer, base, world)
    if is_demo:
        gold = demo.measure(model, tokenizer, text.TEMPLATES[args.template]) if world.rank == 0 else None
        figures |= run.broadcast_object(gold)
        run.say(world, f"held-out instructions: gold score {figures['gold']:.3f} "
                       f"(en {figures['gold_en']:.3f}, zh {figures['gold_zh']:.3f})")
    summary = run.write_summary(args, world, figures)
    evaluated = "" if summary["eval_loss"] is None else f"eval loss {summary['eval_loss']:.4f}, "
    memory = run.peak_text(summary, world)
    run.say(world, f"wrote {args.save_path}: {evaluated}{summary['seconds']:.0f} s, {memory}")
    return summary


if __name__ == "__main__":
    run.command(main)
