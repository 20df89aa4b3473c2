"""Stage 1, supervised fine-tuning (SFT): next-token prediction on answers.

    python sft.py                                                     the demo: a small LLaMA from scratch on data/demo
    torchrun --standalone --nproc_per_node=2 sft.py                   the same on two processes, the same losses
    python sft.py --pretrain LLAMA_DIR --dataset alpaca_data.json     fine-tune real weights
    python sft.py --pretrain LLAMA_DIR --dataset alpaca_data.json --lora_rank 16 --batch_size 1 --accumulation_steps 8
    python sft.py --tokenizer TOKENIZER_DIR                           from scratch on the tokenizer that is named

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
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import lora
import quantize
import zero
from data import demo, records, run, text, weights
from data.run import World
from data.text import Tokenizer
from model import Llama, LlamaConfig


# ---- the loss -------------------------------------------------------------------------------------------------------

def target_states(model: Llama, tokens: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the hidden state from which each target token is predicted (N, C), and the tokens' ids (N,), row by row.

    tokens (B, T) are ids, padded on the right. target (B, T) is True at target tokens, never in column 0. Both may be
    on the CPU: then the targets are found without waiting for the GPU.
    """
    row, column = target[:, 1:].nonzero(as_tuple=True)                  # (N,), (N,): one place before each target token
    answer = tokens[row, column + 1]                                    # (N,) their ids
    tokens, row, column, answer = (x.to(model.device, non_blocking=True) for x in (tokens, row, column, answer))
    return model.hidden(tokens, at=(row, column)), answer               # (N, C), (N,)


def lm_loss(model: Llama, tokens: Tensor, target: Tensor) -> Tensor:
    """Returns the sum of -log p over the target tokens; tokens and target (B, T) as in target_states."""
    # 1. The head sees the hidden states before target tokens only: no logits are computed for prompts or padding.
    h, answer = target_states(model, tokens, target)                    # (N, C), (N,)
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
            log_p = (rows @ weight.T).float().log_softmax(-1)           # (n, V)
            right = torch.arange(len(ids), device=h.device), ids        # the places of the answers
            loss -= log_p[right].sum()
            log_p.exp_()[right] -= 1                                    # in place: softmax - onehot(answer)
            d_logits = log_p.to(weight.dtype)                           # (n, V)
            d_rows.copy_(d_logits @ weight)                             # (n, C)
            if dw is not None:
                dw.addmm_(d_logits.T, rows)                             # (V, C)
            del log_p, d_logits                                         # before the next chunk's logits
        ctx.save_for_backward(dh, dw)
        return loss

    @staticmethod
    def backward(ctx, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        dh, dw = ctx.saved_tensors
        return dh.mul_(d_loss), dw if dw is None else dw.mul_(d_loss), None


def cosine_lr(update: int, total: int, peak: float, warmup: float) -> float:
    """Returns the learning rate of an update (1 .. total).

    It rises linearly to peak over the first `warmup` share of the updates, then falls along half a cosine to a tenth
    of it."""
    rising = max(1, math.ceil(warmup * total))
    if update <= rising:
        return peak * update / rising
    share = (update - rising) / (total - rising)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * share)))


# ---- the training loop of stages 1 and 2 ----------------------------------------------------------------------------

class Stage(NamedTuple):
    """What the functions of a stage share and do not change."""
    args: Namespace
    world: World
    dtype: torch.dtype                  # of the computation
    tokenizer: Tokenizer
    template: text.Template
    stops: list[int]                    # ids that end an answer: the tokenizer's EOS, and the template's end of a turn
    is_demo: bool

    def say(self, line: str) -> None:
        run.say(self.world, line)


class Task(NamedTuple):
    """What the loop must know of a stage. An example has one row of tokens in stage 1, one a response in stage 2."""
    examples: list                                      # to train on
    held: list                                          # held out, to evaluate on
    rows: Callable[[object], list[int]]                 # example -> length of each of its rows
    units: Callable[[object], int]                      # example -> its part of the loss's divisor: target tokens, or 1
    sums: Callable[[list], dict[str, Tensor]]           # micro-batch -> sums over it: "loss" and what `figures` needs
    names: tuple[str, ...] = ("loss",)                  # names of these sums
    figures: Callable[[dict], dict] = lambda sums: {}   # sums over a batch -> the stage's own metrics
    prepare: Callable[[], object] = lambda: None        # called while the weights are still those of the start

    def lengths(self, examples: list) -> list[int]:
        """Returns the length of the longest row of each example, by which micro-batches are sorted."""
        return [max(self.rows(example)) for example in examples]


def batches(task: Task, batch: int, args: Namespace, meta: dict) -> Iterator[list]:
    """Yields the examples of every update that is left from a position on.

    batch is the global batch size, meta["batch"] the one for which the current epoch was shuffled. They differ if a
    resumed run has another batch size."""
    lengths = task.lengths(task.examples)
    first, seen = divmod(meta["consumed"], len(lengths))
    for epoch in range(first, args.max_epochs):
        # 3. The order follows from seed, epoch and batch size.
        for indices in text.global_batches(lengths, batch, args.seed, epoch, seen, meta["batch"]):
            yield [task.examples[i] for i in indices]
        seen = 0


def run_batch(task: Task, examples: list, stage: Stage, optimizer: zero.ZeRO2 | None = None) -> dict[str, float]:
    """Runs this process's share of a batch: forward, and with an optimizer backward.

    Returns loss and metrics of the whole batch."""
    rank, world, device, _ = stage.world
    divisor = sum(map(task.units, examples))        # 2. of the whole batch, on every process
    sums = dict.fromkeys(task.names, torch.zeros((), device=device))
    indices, lengths = list(range(len(examples))), task.lengths(examples)
    mine = text.micro_batches(indices, lengths, stage.args.batch_size, rank, world)
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


def train(model: nn.Module, task: Task, stage: Stage) -> tuple[zero.ZeRO2, dict]:
    """Trains to the end. Returns the optimizer, and what summary.json takes: last loss, steps, seconds, ...

    meta is what a checkpoint holds beside weights: the step and its loss, the examples consumed, the batch size of the
    current epoch, the evaluation before the first step, and marks that tell which model, data and seed they are of."""
    args, world = stage.args, stage.world
    marks = run.fingerprint(model, task.examples, args.seed)
    torch.manual_seed(args.seed * 1000 + world.rank)            # dropout: each process has its own
    optimizer = make_optimizer(model, stage)                    # from here on the weights have the compute dtype
    task.prepare()
    batch = args.batch_size * args.accumulation_steps * world.world
    if args.resume:     # 4.
        meta = run.load_checkpoint(args, world, marks, {"optimizer": optimizer})
    else:
        before = evaluate(model, task, stage)
        meta = {"step": 0, "loss": None, "consumed": 0, "batch": batch, "before": before, "marks": marks}
    first, left = meta["step"], list(batches(task, batch, args, meta))
    total = min(first + len(left), args.max_steps or math.inf)
    planned = say_plan(model, task, batch, total, stage)
    log = run.Log(args, world, first, total)
    model.train()
    with run.resumable(args):
        for step, examples in enumerate(left[:max(0, total - first)], first + 1):
            began, lr = time.perf_counter(), cosine_lr(step, total, args.lr, args.warmup)
            figures = run_batch(task, examples, stage, optimizer)
            loss = figures.pop("loss")
            run.stop_if_broken(loss, step, lr, args)
            stats = optimizer.step(lr)
            # ---- log, evaluate, save ----
            tokens = sum(sum(task.rows(example)) for example in examples)
            row = log.row(step, loss, lr, tokens, began) | figures | {
                "grad_norm": stats.grad_norm,
                "skipped": optimizer.skipped,
                "seconds/optimizer": stats.seconds,
                "seconds/copies": stats.copying,
            }
            logged = step % args.log_interval == 0 or step == total
            log.progress(step, describe(row, figures), logged)
            if args.eval_interval and step % args.eval_interval == 0 and step < total:
                row |= evaluate(model, task, stage)
            if logged or "eval_loss" in row:
                log.append(row)
            meta |= {"step": step, "loss": loss, "consumed": meta["consumed"] + len(examples)}
            if meta["consumed"] % len(task.examples) == 0:
                meta["batch"] = batch       # the next epoch is shuffled for this run's batch size
            run.save_checkpoint(args, world, meta, {"optimizer": optimizer})
    summary = {f"{key}_before": value for key, value in meta["before"].items()} | log.figures() | {
        "planned_memory_bytes": planned,
        "loss": meta["loss"],
        "steps": meta["step"],
        "skipped": optimizer.skipped,
    }
    return optimizer, summary | evaluate(model, task, stage)


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, stage: Stage) -> dict:
    """Returns eval_loss and the stage's own metrics over the held-out examples; all are None without any."""
    if not task.held:   # figures of zeros tell the names
        return dict.fromkeys(["eval_loss", *task.figures(dict.fromkeys(task.names, 0.0))])
    model.eval()
    figures = run_batch(task, task.held, stage)
    model.train()
    return {"eval_loss": figures.pop("loss"), **figures}


def describe(row: dict, figures: dict) -> str:
    """Returns the progress line of a row of metrics."""
    own = "".join(f" | {key} {value:.3f}" for key, value in figures.items())
    skipped = f" | skipped {row['skipped']}" if row["skipped"] else ""
    return f"loss {row['loss']:.4f}{own} | lr {row['lr']:.1e} | {row['tokens_per_second']:,.0f} tokens/s{skipped}"


def say_plan(model: nn.Module, task: Task, batch: int, total: int, stage: Stage) -> int:
    """Prints what the run will do and need. Returns the planned peak of memory above start-up, in bytes."""
    args, world = stage.args, stage.world
    lengths, rows = task.lengths(task.examples), [task.rows(example) for example in task.examples]
    epoch = text.global_batches(lengths, batch, args.seed, 0)                       # of all processes
    micro_batches = [text.micro_batches(indices, lengths, args.batch_size, 0, 1) for indices in epoch]
    padding = 100 * text.padding_share(rows, micro_batches)
    trainable, everything = lora.trainable_report(model)
    n, tokens = len(rows), sum(map(sum, rows))
    stage.say(f"{n} examples, {tokens:,} tokens, padding {padding:.1f} % | {total} updates of {args.batch_size} x "
              f"{args.accumulation_steps} accumulated x {world.world} processes = {batch} examples | "
              f"{trainable:,} of {everything:,} parameters trained")
    largest = args.batch_size * max(len(row) * max(row) for row in rows)        # tokens of a micro-batch
    return say_memory([model], [], largest, stage)


# ---- opening and saving, for all three stages -----------------------------------------------------------------------

def open_tokenizer(directory: Path, template: str | None, say: Callable[[str], None]) -> tuple[Tokenizer, str]:
    """Opens the tokenizer of a model directory. Returns it, and the template's name: --template or the directory's."""
    if not directory.exists():
        raise FileNotFoundError(f"{directory} does not exist: name a weights directory")
    home = lora.home(directory)
    return Tokenizer(home), text.choose_template(home, template, "alpaca", say)


def start(args: Namespace, is_demo: bool, defaults: dict, *inputs: Path) -> Stage:
    """Joins the other processes, settles every flag, and opens the tokenizer.

    inputs: directories that are read beside --pretrain, so that --save_path may be none of them."""
    world = run.start(args.device, args.strategy)
    if args.pretrain is None:       # nothing was learnt in another template yet
        home, name = args.tokenizer or demo.FOLDER, args.template or "alpaca"
        run.check_save_path(args.save_path, [home])
        tokenizer = Tokenizer(home)
    else:
        run.check_save_path(args.save_path, [args.pretrain, lora.base_path(args.pretrain), *inputs])
        tokenizer, name = open_tokenizer(args.pretrain, args.template, partial(run.say, world))
    run.resolve(args, defaults | {"template": name})
    template = text.TEMPLATES[name]
    stops = [tokenizer.eos_id, text.answer_end(tokenizer, template)]
    return Stage(args, world, run.choose_dtype(args.dtype, world.device), tokenizer, template, stops, is_demo)


def origin(args: Namespace) -> Path:
    """Returns the directory whose weights training starts from: --pretrain, or where that is an adapter and a new one
    is to be trained on it, SAVE_PATH/base. open_llama writes the merged model there."""
    merges = args.lora_rank and weights.is_adapter(args.pretrain)
    return args.save_path / "base" if merges else args.pretrain


def open_llama(stage: Stage) -> Llama:
    """Opens --pretrain to train it: an adapter is merged into its base. With --lora_rank the weights are frozen.

    A new adapter is trained beside what it will be loaded beside: the merged weights, rounded to the file's dtype."""
    args, directory = stage.args, origin(stage.args)
    if weights.quantization(lora.base_path(args.pretrain)) is not None:
        if weights.is_adapter(args.pretrain):
            stage.say(f"note: {args.pretrain} is an adapter of a quantized model: merged they are a full-precision "
                      "one, with that one's memory")
        elif not args.lora_rank:
            raise ValueError(f"{args.pretrain} is quantized, its weights cannot be trained: give --lora_rank to train "
                             "adapters beside them")
    if directory != args.pretrain:
        if stage.world.rank == 0:
            quantize.open_model(args.pretrain, adapter="merge").save_pretrained(directory)
            stage.tokenizer.save(directory, args.template)
        run.barrier()
    model = quantize.open_model(directory, stored_dtype(stage), stage.world.device, adapter="merge")
    text.check_tokenizer(stage.tokenizer, model.config.vocab_size)
    model.stop_at(stage.stops, stage.tokenizer.bos_id)
    model.requires_grad_(not args.lora_rank)
    return model


def stored_dtype(stage: Stage) -> torch.dtype | None:
    """Returns the dtype to open weights in. None is the file's, from which fp32 masters are made; adapters leave the
    weights as they are, so that of the computation is enough."""
    return stage.dtype if stage.args.lora_rank else None


def set_up(model: nn.Module, args: Namespace) -> None:
    """Puts adapters on a model, the same on every process, and freezes the rest; --grad_checkpoint and --compile."""
    if args.lora_rank:
        generator = torch.Generator().manual_seed(args.seed)       # of the CPU: A is the same on every device
        lora.attach(model, args.lora_rank, args.lora_alpha, args.lora_dropout, generator=generator)
        if hasattr(model, "score"):
            model.score.requires_grad_(True)        # a reward model's head is new: it is trained in full
    trunk = getattr(model, "trunk", model)
    trunk.grad_checkpoint = args.grad_checkpoint
    if args.compile:
        for layer in trunk.layers:
            layer.compile()     # from the second batch length on, with dynamic shapes
        for layer in trunk.modules():
            if isinstance(layer, quantize.QuantizedLinear):     # compiled, it would keep what it dequantizes
                layer.forward = torch.compiler.disable(layer.forward)


def make_optimizer(model: nn.Module, stage: Stage) -> zero.ZeRO2:
    args = stage.args
    return zero.ZeRO2(model.named_parameters(), stage.dtype, weight_decay=args.weight_decay, max_norm=args.clip_grad,
                      strategy=args.strategy, trace=args.trace)


def say_memory(trained: list[nn.Module], frozen: list[nn.Module], tokens: int, stage: Stage, cached: int = 0) -> int:
    """Prints what a run with micro-batches of so many tokens needs of memory. Returns its peak in bytes.

    cached: tokens of a rollout."""
    args = stage.args
    plan, peak = zero.run_plan(trained, frozen, args.strategy, stage.world, tokens, stage.dtype, args.lora_rank,
                               args.grad_checkpoint, cached)
    stage.say(plan)
    return peak


def save_model(model: nn.Module, optimizer: zero.ZeRO2, stage: Stage) -> None:
    """Writes the model, or its adapter. Removes an adapter, or a model, that an earlier run left there."""
    args, path, extra = stage.args, stage.args.save_path, model.config.extra
    with optimizer.masters():
        if stage.world.rank == 0:
            if args.lora_rank:
                base = origin(args)
                named = base.name if base.parent == path else base.resolve()    # the directory may be moved as a whole
                lora.save_adapter(model, path, named, extra)
                leftover = ["config.json", "model*.safetensors*"]
            else:
                model.save_pretrained(path)
                leftover = ["adapter_*"]
            for file in weights.glob(path, leftover):
                file.unlink()
            stage.tokenizer.save(path, args.template, extra.get("pad_token_id"))
    run.barrier()


def measure_demo(model: Llama, stage: Stage) -> dict:
    """Returns the demo's gold score of a model and samples, on every process. Process 0 measures."""
    figures = demo.measure(model, stage.tokenizer, stage.template) if stage.world.rank == 0 else None
    return run.gather(figures)[0]


def finish(figures: dict, measured: dict[str, str], stage: Stage) -> dict:
    """Writes summary.json and prints the last line. measured: a figure's name -> how it is printed, where there is one.

    Returns the summary."""
    summary = run.write_summary(stage.args, stage.world, figures)
    told = [wording.format(summary[name]) for name, wording in measured.items() if summary.get(name) is not None]
    peak, planned = summary["peak_memory_bytes"] / 1e9, summary["planned_memory_bytes"] / 1e9
    above = peak - stage.world.idle / 1e9
    told += [f"{summary['seconds']:.0f} s", f"peak memory {peak:.2f} GB", f"{above:.2f} above start-up"]
    stage.say(f"wrote {stage.args.save_path}: " + ", ".join([*told, f"{planned:.2f} planned"]))
    return summary


def read_records(paths: list[Path], kind: str, stage: Stage) -> list[dict]:
    args = stage.args
    return records.read_records(paths, kind, args.skip_bad_records, args.max_datasets_size, stage.say)


def encode_all(found: list[dict], encode: Callable, what: str, max_len: int, stage: Stage) -> list:
    """Returns what text.encode_example or encode_preference makes of the records, and says what is lost of them."""
    encode = partial(encode, tokenizer=stage.tokenizer, template=stage.template, max_len=max_len)
    return text.encode_all(found, encode, what, stage.say)


# ---- stage 1: files, flags, main ------------------------------------------------------------------------------------

# Coati: lr 5e-6, 3 epochs. 2e-5 and no decay are Alpaca's for full fine-tuning.
FINETUNE = {"lr": 2e-5, "batch_size": 4, "accumulation_steps": 8, "max_epochs": 3, "weight_decay": 0.0}
# For a model from scratch, of the shape below; and what is the demo's own.
SCRATCH = {"lr": 2e-3, "batch_size": 16, "accumulation_steps": 1, "max_epochs": 2, "weight_decay": 0.1}
DEMO = SCRATCH | {"dataset": [demo.FOLDER / "sft.jsonl.gz"], "max_len": 160}
# The demo's task is mostly to copy words of the instruction. Tied embeddings learn that from one table.
SHAPE = LlamaConfig(dim=192, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=64, ffn_dim=512, max_seq_len=256,
                    tie_embeddings=True)


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
    """Returns the flags of stage 1. Those that depend on the input are None until `start` fills them in."""
    parser = run.training_parser("Stage 1: supervised fine-tuning. Without flags, the demo: a small LLaMA from "
                                 "scratch on data/demo.")
    parser.add_argument("--dataset", type=Path, nargs="+",
                        help="records to learn: JSON list or lines, instruction, chat or text (data/records.py)")
    parser.add_argument("--tokenizer", type=Path,
                        help="train the demo's model from scratch on this tokenizer, see `python -m data.text train`")
    add_loop_flags(parser, "examples", 128)
    parser.tell(FINETUNE | {"save_path": "out/sft"}, DEMO)
    args = parser.parse_args(argv)
    args.save_path = args.save_path or Path("out/sft")
    if args.pretrain and args.tokenizer:
        parser.error("--tokenizer is for a model from scratch: the weights of --pretrain have a tokenizer of their own")
    if args.pretrain and not args.dataset:
        parser.error("--pretrain needs --dataset: name the records to fine-tune on")
    if args.lora_rank and not args.pretrain:
        parser.error("--lora_rank needs --pretrain: an adapter changes a trained model, from scratch there is none")
    if args.dataset and not (args.pretrain or args.tokenizer):
        parser.error("--dataset needs --pretrain, or --tokenizer to train a small model from scratch on it")
    return args


def open_model(stage: Stage) -> Llama:
    """Opens --pretrain or makes a new model."""
    args, tokenizer = stage.args, stage.tokenizer
    if args.pretrain:
        return open_llama(stage)
    config = replace(SHAPE, vocab_size=tokenizer.vocab_size, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)
    # The weights are drawn on the CPU, so that they are the same on every device.
    model = Llama(config, generator=torch.Generator().manual_seed(args.seed))
    model.stop_at(stage.stops)
    return model.to(stage.world.device)


def resolve_max_len(args: Namespace, config: LlamaConfig) -> None:
    """Fills in --max_len, which may not be beyond the model's context."""
    run.resolve(args, {"max_len": min(512, config.max_seq_len)})
    if args.max_len > config.max_seq_len:
        raise ValueError(f"--max_len {args.max_len} is beyond the model's context of {config.max_seq_len} tokens")


def read_examples(paths: list[Path], max_len: int, stage: Stage) -> list:
    """Returns examples to train on; each is its ids and target flags."""
    return encode_all(read_records(paths, "sft", stage), text.encode_example, "examples", max_len, stage)


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    is_demo, defaults = args.dataset is None, FINETUNE
    if args.pretrain is None:
        defaults = DEMO if is_demo else SCRATCH
    stage = start(args, is_demo, defaults)
    model = open_model(stage)
    resolve_max_len(args, model.config)
    examples = read_examples(args.dataset, args.max_len, stage)
    run.say_flags(stage.world, args)
    set_up(model, args)

    def sums(micro: list) -> dict[str, Tensor]:
        tokens, _, target = text.collate(micro)
        return {"loss": lm_loss(model, tokens, target)}

    rows, units = lambda example: [len(example[0])], lambda example: sum(example[1])
    examples, held = text.split_held_out(examples, args.eval_size, args.seed)
    optimizer, figures = train(model, Task(examples, held, rows, units, sums), stage)
    save_model(model, optimizer, stage)
    if is_demo:
        figures |= measure_demo(model, stage)
        stage.say(f"held-out instructions: gold score {figures['gold']:.3f} "
                  f"(en {figures['gold_en']:.3f}, zh {figures['gold_zh']:.3f})")
    return finish(figures, {"eval_loss": "eval loss {:.4f}"}, stage)


if __name__ == "__main__":
    run.command(main)
