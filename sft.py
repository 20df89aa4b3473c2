"""Stage 1, supervised fine-tuning: next-token prediction on answers. Also the plumbing that stages 2 and 3 reuse.

    python sft.py                                                       the demo: a small LLaMA from scratch on data/demo
    torchrun --standalone --nproc_per_node=2 sft.py                     the same on two processes, the same losses
    python sft.py --pretrain LLAMA_DIR --dataset alpaca_data.json       fine-tune real weights
    python sft.py --pretrain LLAMA_DIR --dataset alpaca_data.json --lora_rank 16 --batch_size 1 --accumulation_steps 8
    python sft.py --benchmark mid [--dtype bf16 --compile]              how long an update takes on this machine

Ouyang et al. 2022, "InstructGPT" (arXiv 2203.02155), section 3.5, first step. What matters and is easy to get wrong:

1. Only answers are learnt, EOS included: a model that never sees EOS as a target never stops.
2. The loss of a step is the sum over all its target tokens divided by their run.number, over all micro-batches and processes.
   A mean of means would weigh a token of a short answer more, and change with --accumulation_steps.
3. The order of the data depends on seed and epoch alone, so 1 process with batch 8 and 2 with batch 4 take the same steps.
4. `--resume` continues bit for bit: weights, moments, schedule, position and random states are those of the interrupted run.

Letters: B batch, T time, C channels, V vocabulary, N target tokens of a micro-batch.
"""

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import lora
import quantize
import zero
from data import demo, run, text
from data.records import read_records
from data.text import Tokenizer, check_tokenizer, read_template
from model import SHAPES, Llama, LlamaConfig

# The demo's preset, used only when the input is the demo world; real weights get FINETUNE.
DEMO = {"dataset": [demo.FOLDER / "sft.jsonl.gz"], "lr": 2e-3, "batch_size": 16, "accumulation_steps": 1, "max_epochs": 2, "max_len": 160, "weight_decay": 0.1}
# Coati: lr 5e-6, 3 epochs. 2e-5 is Alpaca's for full fine-tuning, and decay 0 too.
FINETUNE = {"lr": 2e-5, "batch_size": 4, "accumulation_steps": 8, "max_epochs": 3, "weight_decay": 0.0}
# Tied embeddings: most of the task is copying words from the instruction, which then needs no second table to be learnt.
DEMO_MODEL = LlamaConfig(dim=192, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=64, ffn_dim=512, vocab_size=1280, max_seq_len=256, tie_embeddings=True)


# ---- opening --------------------------------------------------------------------------------------------------------

def inputs_of(args: argparse.Namespace) -> list[Path]:
    """The directories that a run reads its weights from: --pretrain, and the base of an adapter."""
    return [] if args.pretrain is None else [args.pretrain, *([lora.base_path(args.pretrain)] if lora.is_adapter(args.pretrain) else [])]


def open_tokenizer(args: argparse.Namespace, directory: Path | None, world: run.World) -> Tokenizer:
    """The tokenizer of a model directory (an adapter without one: of its base), the demo's without; settles args.template."""
    if directory is None:
        directory = demo.FOLDER
    elif not directory.exists():
        raise FileNotFoundError(f"{directory} does not exist: name a weights directory")
    elif lora.is_adapter(directory) and not (directory / "tokenizer.model").exists():
        directory = lora.base_path(directory)
    tokenizer = Tokenizer(directory)
    named = read_template(directory)
    if args.template is None:
        args.template = named if named in text.TEMPLATES else "alpaca"
    elif named not in (None, args.template):
        run.say(world, f"note: {directory} was trained with the template {named}, --template {args.template} replaces it")
    return tokenizer


def open_llama(directory: Path, dtype: torch.dtype | None, world: run.World, head: bool = True) -> Llama:
    """A model from a weights directory, plain or quantized, or from an adapter merged into its base. dtype None is for training
    all weights, which quantized ones do not allow."""
    base = lora.base_path(directory) if lora.is_adapter(directory) else directory
    if (quantized := quantize.read_scheme(base)) and dtype is None and base == directory:
        raise ValueError(f"{directory} is quantized, its weights cannot be trained: give --lora_rank to train adapters beside them")
    model = quantize.load(base, dtype, world.device, head=head)
    if base != directory:
        if quantized:
            run.say(world, f"note: {directory} is an adapter of a quantized model: merged they are a full-precision one, with that one's memory")
        lora.load_adapter(model, directory)
        lora.fold(model)
    return model


def add_adapters(model: torch.nn.Module, args: argparse.Namespace) -> None:
    """Freeze the model and put adapters on it, the same on every process. Frozen weights go to the compute dtype."""
    lora.attach(model, args.lora_rank, args.lora_alpha, args.lora_dropout, dtype=torch.float32, generator=torch.Generator(model.device).manual_seed(args.seed))


def resolve_max_len(args: argparse.Namespace, config: LlamaConfig) -> None:
    run.resolve(args, {"max_len": min(512, config.max_seq_len)})
    if args.max_len > config.max_seq_len:
        raise ValueError(f"--max_len {args.max_len} is beyond the model's context of {config.max_seq_len} tokens")


def set_up(model: Llama, args: argparse.Namespace) -> None:
    model.grad_checkpoint = args.grad_checkpoint
    if args.compile:
        for layer in model.layers:
            layer.compile()  # dynamic shapes from the second length on


def make_optimizer(model: torch.nn.Module, args: argparse.Namespace, dtype: torch.dtype) -> zero.ZeRO2:
    return zero.ZeRO2(model.named_parameters(), dtype, weight_decay=args.weight_decay, max_norm=args.clip_grad, strategy=args.strategy, trace=args.trace)


def base_for_adapter(model: Llama, args: argparse.Namespace, tokenizer: Tokenizer, world: run.World) -> str:
    """What an adapter will name as its base: --pretrain, or, when that was an adapter itself, the merged model, written beside."""
    if not lora.is_adapter(args.pretrain):
        return str(args.pretrain.resolve())
    if world.rank == 0:
        model.save_pretrained(args.save_path / "base")
        tokenizer.save(args.save_path / "base", args.template)
    return "base"


def save_model(model: torch.nn.Module, optimizer: zero.ZeRO2, args: argparse.Namespace, tokenizer: Tokenizer, base: str | None, world: run.World, extra: dict | None = None) -> None:
    """Write the model, or its adapter, and remove what an earlier run of the other kind left, which would be read instead."""
    adapter = base is not None
    with optimizer.masters():
        if world.rank == 0:
            lora.save_adapter(model, args.save_path, base, extra) if adapter else model.save_pretrained(args.save_path)
    if world.rank == 0:
        for pattern in ("config.json", "model*.safetensors*") if adapter else ("adapter_*",):
            for file in args.save_path.glob(pattern):
                file.unlink()
        tokenizer.save(args.save_path, args.template)
    run.barrier()


# ---- training -------------------------------------------------------------------------------------------------------

def cosine_lr(update: int, total: int, peak: float, warmup: float, floor: float = 0.1) -> float:
    """Learning rate of an update (1 .. total): rises over the first `warmup` share, reaches peak, falls along half a
    cosine to floor * peak at the last update."""
    rising = max(1, math.ceil(warmup * total))
    if update <= rising:
        return peak * update / rising
    share = (update - rising) / (total - rising)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share)))


def lm_loss(model: Llama, tokens: Tensor, target: Tensor) -> Tensor:
    """Sum of -log p over the target tokens. tokens (B, T) ids, padding on the right; target (B, T) True where a token is
    learnt (never at column 0). Both may be on the CPU: what the head needs is picked there, so a GPU is not waited for."""
    device = model.device
    index = target[:, 1:].flatten().nonzero().flatten()                        # (N,) of B * (T-1) places
    answer = tokens[:, 1:].flatten()[index].to(device)                         # (N,) the token to predict ...
    h = model.hidden(tokens.to(device))[:, :-1].flatten(0, 1).index_select(0, index.to(device))  # (N, C) ... from the place before it
    if torch.is_grad_enabled() and type(model.output) is torch.nn.Linear:             # no row of logits is spent on a prompt
        return HeadLoss.apply(h, model.output.weight, answer)
    pairs = zip(h.split(HeadLoss.ROWS), answer.split(HeadLoss.ROWS))
    return sum((F.cross_entropy(model.output(rows).float(), right, reduction="sum") for rows, right in pairs), h.new_zeros((), dtype=torch.float32))


class HeadLoss(torch.autograd.Function):
    """Head and cross-entropy in one: the sum over rows of -log softmax(h W^T)[answer]; h (N, C), W (V, C), answer (N,).

    Logits are the largest tensor of a step, four times over by autograd: as computed, in fp32, as probabilities, and as
    gradient. But that gradient, p - onehot(answer), is known as soon as p is. So ROWS rows at a time are turned into it in
    place and multiplied on in the forward, and backward only scales. p of a rare piece is below what fp16 can hold: gradients
    stay in fp32, or in bf16 which has its range, until they are scaled.
    """

    ROWS = 512   # of logits that exist at a time: enough for the full speed of the products, 65 MB in fp32 with 32,000 pieces
    SLAB = 64    # of them that pass through fp32 and the processor's cache at a time

    @staticmethod
    def forward(ctx, h: Tensor, weight: Tensor, answer: Tensor) -> Tensor:
        dtype = torch.bfloat16 if h.dtype == torch.bfloat16 else torch.float32
        w, loss = weight.to(dtype), torch.zeros((), device=h.device)
        dh = torch.empty_like(h, dtype=dtype) if ctx.needs_input_grad[0] else None
        dw = torch.zeros_like(w) if ctx.needs_input_grad[1] else None
        for start in range(0, len(h), HeadLoss.ROWS):
            rows = h[start:start + HeadLoss.ROWS].to(dtype)                    # (n, C)
            logits = rows @ w.T                                                # (n, V)
            for part, right in zip(logits.split(HeadLoss.SLAB), answer[start:start + HeadLoss.ROWS, None].split(HeadLoss.SLAB)):
                p = part.float()                                               # in fp32 this is `part` itself
                loss -= p.gather(1, right).sum()
                p -= (highest := p.amax(-1, keepdim=True))                     # (slab, 1): exp cannot overflow
                total = p.exp_().sum(-1, keepdim=True)                         # (slab, 1)
                loss += (highest + total.log()).sum()
                p.div_(total).scatter_add_(1, right, torch.full_like(total, -1.0))
                part.copy_(p)
            if dh is not None:
                torch.mm(logits, w, out=dh[start:start + HeadLoss.ROWS])       # (n, C)
            if dw is not None:
                dw.addmm_(logits.T, rows)                                      # (V, C)
        ctx.gradients, ctx.dtypes = (dh, dw), (h.dtype, weight.dtype)
        return loss

    @staticmethod
    def backward(ctx, d: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        dh, dw = (None if g is None else g.mul_(d).to(dtype) for g, dtype in zip(ctx.gradients, ctx.dtypes))
        del ctx.gradients  # scaled in place: a second backward must not find them
        return dh, dw, None


class Task(NamedTuple):
    """What the loop of stages 1 and 2 must know of a stage."""
    rows: list[list[int]]                                     # tokens of each example's rows: one, or one a response of a ranking
    units: Callable[[list[int]], int]                         # examples -> what a step's loss is divided by: target tokens, rankings
    loss_of: Callable[[list[int]], tuple[Tensor, Tensor]]     # micro-batch -> summed loss (), further sums (S,)
    sums: int                                                 # S
    figures: Callable[[list[float]], dict]                    # further sums of a whole step -> the stage's own metrics
    evaluate: Callable[[], dict]

    @property
    def lengths(self) -> list[int]:
        """Of the longest row of each, by which examples are put together."""
        return [max(rows) for rows in self.rows]


def train(model: torch.nn.Module, optimizer: zero.ZeRO2, task: Task, marks: dict, args: argparse.Namespace, world: run.World) -> dict:
    """The loop of stages 1 and 2. Returns what summary.json takes: last loss, steps, seconds, tokens_per_second, ..."""
    batch, lengths = args.batch_size * args.accumulation_steps * world.world, task.lengths
    epoch, step, seen, old_batch = 0, 0, 0, batch  # seen: samples of this epoch that are done; old_batch: what its order was made with
    if args.resume:
        meta, states, random = run.load_checkpoint(args.save_path, world, marks, optimizer.strategy)
        optimizer.load_state_dict(states)
        del states
        if random is not None:
            run.set_random_state(random, world)
        epoch, step, seen, old_batch = meta["epoch"], meta["step"], meta["seen"], meta["batch"]
    before = meta["before"] if args.resume else {f"{key}_before": value for key, value in task.evaluate().items()}
    append = run.open_metrics(args.save_path, world, step)
    updates = text.global_batches(lengths, batch, args.seed, epoch, seen, old_batch) if epoch < args.max_epochs else []
    total = step + len(updates) + max(0, args.max_epochs - epoch - 1) * math.ceil(len(lengths) / batch)
    total = min(total, args.max_steps or total)
    planned = say_plan(model, task, batch, total, args, world)
    first, started, tokens_done, row = step, time.perf_counter(), 0, {}
    model.train()
    while step < total:
        for indices in updates[:total - step]:
            # ---- one update: every process knows the whole batch, so the divisor needs no communication ----
            began, step = time.perf_counter(), step + 1
            lr = cosine_lr(step, total, args.lr, args.warmup)
            divisor, sums = task.units(indices), torch.zeros(1 + task.sums, device=world.device)
            mine = [micro for micro in text.micro_batches(indices, lengths, args.batch_size, world.rank, world.world) if micro]
            for micro in mine:
                summed, further = task.loss_of(micro)
                optimizer.backward(summed / divisor, last=micro is mine[-1])
                sums += torch.cat((summed.detach().float().view(1), further.to(world.device)))
            optimizer.flush()  # before the next collective: processes differ in which buckets their backward launched
            loss, *further = run.all_reduce(sums).tolist()
            loss /= divisor
            run.stop_if_broken(loss, step, lr, args.save_path)
            stats = optimizer.step(lr)
            # ---- log, evaluate, save ----
            seen += len(indices)
            tokens = sum(sum(task.rows[i]) for i in indices)
            tokens_done += tokens
            now = time.perf_counter()
            row = {"step": step, "loss": loss, "lr": lr, "seconds": now - started, "tokens_per_second": tokens / (now - began),
                   "grad_norm": stats.grad_norm, "skipped": optimizer.skipped, "seconds/optimizer": stats.seconds, "seconds/copies": stats.copying} | task.figures(further)
            log = step % args.log_interval == 0 or step == total
            run.progress(world, step, total, started, describe(row), log, first)
            if args.eval_interval and step % args.eval_interval == 0 and step < total:
                row |= task.evaluate()
            if log or "eval_loss" in row:
                append(row)
            if args.save_interval and (step % args.save_interval == 0 or step == args.max_steps):
                meta = {"step": step, "epoch": epoch, "seen": seen, "batch": old_batch, "world": world.world, "strategy": optimizer.strategy, "marks": marks, "before": before}
                run.save_checkpoint(args.save_path, world, meta, optimizer.state_dict())
        epoch, seen, old_batch = epoch + 1, 0, batch
        updates = text.global_batches(lengths, batch, args.seed, epoch)
    seconds = time.perf_counter() - started
    return {"planned_memory_bytes": planned, "loss": row.get("loss"), "steps": step, "seconds": seconds, "tokens_per_second": tokens_done / seconds, "skipped": optimizer.skipped} | before | task.evaluate()


def describe(row: dict) -> str:
    """A row of metrics as the progress line has it."""
    own = "".join(f" | {key} {row[key]:.3f}" for key in row if key not in ("step", "loss", "lr", "seconds", "tokens_per_second", "grad_norm", "skipped") and not key.startswith("seconds/"))
    return f"loss {row['loss']:.4f}{own} | lr {row['lr']:.1e} | {row['tokens_per_second']:,.0f} tokens/s" + (f" | skipped {row['skipped']}" if row["skipped"] else "")


def say_plan(model: torch.nn.Module, task: Task, batch: int, total: int, args: argparse.Namespace, world: run.World) -> int:
    """Print what the run will do and take; returns the planned peak of memory above start-up."""
    lengths = task.lengths
    padding = text.padding_share(task.rows, [text.micro_batches(b, lengths, args.batch_size, 0, 1) for b in text.global_batches(lengths, batch, args.seed, 0)])
    trainable, everything = lora.trainable_report(model)
    run.say(world, f"{len(lengths)} examples, {sum(map(sum, task.rows)):,} tokens, padding {100 * padding:.1f} % | {total} updates of {args.batch_size} x {args.accumulation_steps} accumulated "
               f"x {world.world} processes = {batch} examples | {trainable:,} of {everything:,} parameters trained")
    tokens = args.batch_size * max((len(rows) * max(rows) for rows in task.rows), default=0)  # of the largest micro-batch
    line, peak = zero.run_plan([(model, model.config)], [], args.strategy, world, tokens, run.choose_dtype(args.dtype, world.device), args.lora_rank, args.grad_checkpoint)
    run.say(world, line)
    return peak


# ---- stage 1 --------------------------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model: Llama, held: list, args: argparse.Namespace, world: run.World) -> dict:
    """eval_loss: mean loss per target token of the held-out examples, shared out over the processes; None without any."""
    if not held:
        return {"eval_loss": None}
    model.eval()
    total = torch.zeros(2, device=world.device)
    for micro in filter(None, text.micro_batches(list(range(len(held))), [len(ids) for ids, _ in held], args.batch_size, world.rank, world.world)):
        tokens, _, target = text.collate([held[i] for i in micro])
        total += torch.stack((lm_loss(model, tokens, target).float(), target.sum().to(world.device)))
    nll, targets = run.all_reduce(total).tolist()
    model.train()
    return {"eval_loss": nll / targets}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = run.training_parser("Stage 1: supervised fine-tuning. Without flags, the demo: a small LLaMA from scratch on data/demo.", "out/sft")
    parser.add_argument("--dataset", type=Path, nargs="+", help="records to learn: JSON list or lines, instruction, chat or text (data/__init__.py)")
    parser.add_argument("--batch_size", type=run.whole(1), help="examples a process and micro-batch")
    parser.add_argument("--max_epochs", type=run.whole(1), help="passes over the data")
    parser.add_argument("--max_len", type=run.whole(2), help="longest example in tokens; longer ones are cut (512, or the model's context)")
    parser.add_argument("--eval_size", type=run.whole(0), default=128, help="records held out for the evaluation loss, at most a tenth of all")
    parser.add_argument("--eval_interval", type=run.whole(0), default=0, help="updates between two evaluations (0 = at the end only)")
    parser.add_argument("--benchmark", choices=sorted(SHAPES), metavar="SHAPE", help=f"train nothing, time updates of a model of random weights on random tokens: {' '.join(SHAPES)}")
    parser.tell(FINETUNE, DEMO)
    args = parser.parse_args(argv)
    if args.benchmark:
        return args
    if args.pretrain is None and args.dataset is not None:
        raise ValueError("--dataset needs --pretrain: without weights, only the demo is trained from scratch")
    if args.pretrain is None and args.lora_rank:
        raise ValueError("--lora_rank needs --pretrain: an adapter changes a trained model, there is nothing to adapt from scratch")
    if args.pretrain is not None and args.dataset is None:
        raise ValueError("--pretrain needs --dataset: name the records to fine-tune on")
    return args


def open_model(args: argparse.Namespace, tokenizer: Tokenizer, world: run.World) -> tuple[Llama, str | None]:
    """(model, base): from scratch or from --pretrain, with adapters if asked for; base is what they will name as theirs."""
    if args.pretrain is None:
        # Made on the CPU whatever the device, so that it starts the same everywhere.
        model = Llama(DEMO_MODEL, generator=torch.Generator().manual_seed(args.seed)).to(world.device)
        return model, None
    # All weights: in the file's dtype, from which the fp32 master is made. With LoRA they are frozen and only computed with.
    model = open_llama(args.pretrain, run.choose_dtype(args.dtype, world.device) if args.lora_rank else None, world)
    check_tokenizer(tokenizer, model.config.vocab_size)
    if not args.lora_rank:
        return model, None
    base = base_for_adapter(model, args, tokenizer, world)
    add_adapters(model, args)
    return model, base


def read_examples(args: argparse.Namespace, tokenizer: Tokenizer, world: run.World) -> tuple[list, list]:
    records = read_records(args.dataset, "sft", args.skip_bad_records, args.max_datasets_size, partial(run.say, world))
    encode = partial(text.encode_example, tokenizer=tokenizer, template=text.TEMPLATES[args.template], max_len=args.max_len)
    examples, dropped = text.encode_all(records, encode, "examples")
    if dropped:
        run.say(world, f"note: {dropped} of {len(records)} examples have a prompt of --max_len {args.max_len} tokens or more: left out")
    return text.split_held_out(examples, args.eval_size, args.seed)


def benchmark(args: argparse.Namespace, world: run.World, repeats: int = 7) -> dict:
    """Time whole updates (forward, backward, clipping, AdamW) on random tokens, every one but the first a target."""
    dtype = run.choose_dtype(args.dtype, world.device)
    run.resolve(args, {"batch_size": 4 if args.benchmark == "mid" else 8, "max_len": 256, "accumulation_steps": 1, "weight_decay": 0.0, "lr": 1e-4})
    model = Llama(SHAPES[args.benchmark]).to(world.device).train()
    if args.lora_rank:
        add_adapters(model.to(dtype), args)
        model.make_rope()
    set_up(model, args)
    optimizer = make_optimizer(model, args, dtype)
    B, T = args.batch_size, args.max_len
    tokens = torch.randint(3, model.config.vocab_size, (B, T), generator=torch.Generator().manual_seed(args.seed + world.rank))
    target = torch.ones(B, T, dtype=torch.bool)
    target[:, 0] = False
    seconds = []
    for step in range(-2, repeats):  # two to warm up, and compile
        started = time.perf_counter()
        for micro in range(args.accumulation_steps):
            loss = lm_loss(model, tokens, target) / (B * (T - 1) * args.accumulation_steps * world.world)
            optimizer.backward(loss, last=micro == args.accumulation_steps - 1)
        optimizer.flush()
        optimizer.step(args.lr)  # waits for the device
        seconds += [time.perf_counter() - started] if step >= 0 else []
    seconds = sorted(seconds)[len(seconds) // 2]
    figures = {"seconds": seconds, "tokens_per_second": B * T * args.accumulation_steps * world.world / seconds, "peak_memory_bytes": run.peak_memory_bytes(world.device)}
    run.say(world, f"{args.benchmark} {str(dtype).removeprefix('torch.')}{' compiled' if args.compile else ''}, {args.accumulation_steps} x {B} x {T} tokens x {world.world} processes: {1e3 * seconds:.0f} ms an update (median of {repeats}), "
               f"{figures['tokens_per_second']:,.0f} tokens/s, peak memory {figures['peak_memory_bytes'] / 1e9:.2f} GB")
    return figures


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    world = run.start(args.device, args.strategy)
    if args.benchmark:
        return benchmark(args, world)
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
    torch.manual_seed(args.seed * 1000 + world.rank)  # dropout: each process its own
    optimizer = make_optimizer(model, args, run.choose_dtype(args.dtype, world.device))

    def loss_of(micro: list[int]) -> tuple[Tensor, Tensor]:
        tokens, _, target = text.collate([examples[i] for i in micro])
        return lm_loss(model, tokens, target), torch.zeros(0)

    task = Task([[len(ids)] for ids, _ in examples], lambda indices: sum(sum(examples[i][1]) for i in indices), loss_of, 0, lambda sums: {},
                partial(evaluate, model, held, args, world))
    with run.resumable(args):
        figures = train(model, optimizer, task, marks, args, world)
    save_model(model, optimizer, args, tokenizer, base, world)
    if is_demo:
        figures |= run.broadcast_object(demo.measure(model, tokenizer, text.TEMPLATES[args.template]) if world.rank == 0 else None)
        run.say(world, f"held-out instructions: gold score {figures['gold']:.3f} (en {figures['gold_en']:.3f}, zh {figures['gold_zh']:.3f})")
    summary = run.write_summary(args, world, figures)
    evaluated = "" if summary["eval_loss"] is None else f"eval loss {summary['eval_loss']:.4f}, "
    run.say(world, f"wrote {args.save_path}: {evaluated}{summary['seconds']:.0f} s, {run.peak_text(summary, world)}")
    return summary


if __name__ == "__main__":
    run.command(main)
