"""Stage 1, supervised fine-tuning: next-token prediction on answers. Also the plumbing that stages 2 and 3 reuse.

    python sft.py                                                       the demo: a small LLaMA from scratch on data/demo
    torchrun --standalone --nproc_per_node=2 sft.py                     the same on two processes, the same losses
    python sft.py --pretrain LLAMA_DIR --dataset alpaca_data.json       fine-tune real weights
    python sft.py --pretrain LLAMA_DIR --dataset alpaca_data.json --lora_rank 16 --batch_size 1 --accumulation_steps 8
    python sft.py --benchmark mid [--dtype bf16 --compile]              how long an update takes on this machine

Ouyang et al. 2022, "InstructGPT" (arXiv 2203.02155), section 3.5, first step. What matters and is easy to get wrong:

1. Only answers are learnt, EOS included: a model that never sees EOS as a target never stops.
2. The loss of a step is the sum over all its target tokens divided by their number, over all micro-batches and processes.
   A mean of means would weigh a token of a short answer more, and change with --accumulation_steps.
3. The order of the data depends on seed and epoch alone, so 1 process with batch 8 and 2 with batch 4 take the same steps.
4. `--resume` continues bit for bit: weights, moments, schedule, position and random states are those of the interrupted run.

Letters: B batch, T time, C channels, V vocabulary, N target tokens of a micro-batch.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import data
import lora
import quantize
import zero
from data import demo
from model import DTYPES, SHAPES, Linear, Llama, LlamaConfig, Parser, Tokenizer, check_tokenizer, cpu_has_bf16, read_template, sentence, write_file

# The demo's preset, used only when the input is the demo world; real weights get FINETUNE.
DEMO = {"dataset": [demo.FOLDER / "sft.jsonl.gz"], "lr": 2e-3, "batch_size": 16, "accumulation_steps": 1, "max_epochs": 2, "max_len": 160, "weight_decay": 0.1}
# Coati: lr 5e-6, 3 epochs. 2e-5 is Alpaca's for full fine-tuning, and decay 0 too.
FINETUNE = {"lr": 2e-5, "batch_size": 4, "accumulation_steps": 8, "max_epochs": 3, "weight_decay": 0.0}
# Tied embeddings: most of the task is copying words from the instruction, which then needs no second table to be learnt.
DEMO_MODEL = LlamaConfig(dim=192, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=64, ffn_dim=512, vocab_size=1280, max_seq_len=256, tie_embeddings=True)


# ---- flags ----------------------------------------------------------------------------------------------------------

def whole(at_least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if value < at_least:
            raise argparse.ArgumentTypeError(f"must be at least {at_least}, not {value}")
        return value
    parse.__name__ = "whole number"  # argparse says "invalid whole number value: 'x'"
    return parse


def number(at_least: float = 0.0) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = float(text)
        if not (math.isfinite(value) and value >= at_least):
            raise argparse.ArgumentTypeError(f"must be a finite number of at least {at_least}, not {text}")
        return value
    parse.__name__ = "number"
    return parse


def make_parser(description: str, save_path: str) -> Parser:
    """The flags that all three stages share. A default of None is filled in later: it depends on the input (`resolve`)."""
    parser = Parser(description)
    # input and output
    parser.add_argument("--pretrain", type=Path, help="weights directory to start from: Hugging Face or Meta layout, or a LoRA adapter, which is merged first")
    parser.add_argument("--model", choices=["llama"], default="llama", help="architecture; LLaMA is the only one here")
    parser.add_argument("--save_path", type=Path, default=Path(save_path), help="directory to write")
    parser.add_argument("--template", choices=sorted(data.TEMPLATES), help="prompt template (the one that --pretrain names, else alpaca)")
    parser.add_argument("--max_datasets_size", type=whole(1), help="use only so many records (all)")
    parser.add_argument("--skip_bad_records", action="store_true", help="count and skip broken records instead of stopping")
    # optimization
    parser.add_argument("--lr", type=number(), help="peak learning rate")
    parser.add_argument("--weight_decay", type=number(), help="AdamW's decay of matrices; vectors are never decayed")
    parser.add_argument("--warmup", type=number(), default=0.05, help="share of the updates over which the learning rate rises")
    parser.add_argument("--clip_grad", type=number(), default=1.0, help="clip the global gradient norm to this (0 = never)")
    parser.add_argument("--max_steps", type=whole(1), help="stop after so many updates")
    parser.add_argument("--accumulation_steps", "--accimulation_steps", type=whole(1), help="micro-batches an update (Coati published the second spelling)")
    parser.add_argument("--grad_checkpoint", action="store_true", help="recompute activations in backward: less memory, a third more time")
    # LoRA
    parser.add_argument("--lora_rank", type=whole(0), default=0, help="rank of low-rank adapters on every linear layer; 0 trains all weights")
    parser.add_argument("--lora_alpha", type=number(), help="adapters are scaled by alpha / rank (2 * rank)")
    parser.add_argument("--lora_dropout", type=number(), default=0.0, help="dropout on the input of the adapters")
    # run
    parser.add_argument("--strategy", choices=zero.STRATEGIES, default="ddp", help="naive is for one process; ddp sums gradients over all; zero2 also shards gradients and optimizer, "
                        "zero2_cpu keeps them in CPU memory; the others are Coati's names for these")
    parser.add_argument("--seed", type=int, default=0, help="of initial weights, order of the data, dropout and sampling")
    parser.add_argument("--dtype", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="to compute in; the master weights are fp32 (auto: bf16 on CUDA, fp32 elsewhere)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="auto: cuda where there is one, else cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks: slower start, faster steps")
    parser.add_argument("--trace", action="store_true", help="print when each gradient bucket of the first update left and arrived")
    parser.add_argument("--log_interval", type=whole(1), default=10, help="updates between two lines of metrics.jsonl")
    parser.add_argument("--save_interval", type=whole(0), default=500, help="updates between two checkpoints for --resume (0 = none)")
    parser.add_argument("--resume", action="store_true", help="continue from SAVE_PATH/resume")
    return parser


def resolve(args: argparse.Namespace, defaults: dict) -> None:
    """Fill in the flags that the user left open."""
    for key, value in defaults.items():
        if getattr(args, key) is None:
            setattr(args, key, value)


def demo_tokenizer(directory: Path | None) -> bool:
    """Is this a model of the demo world? Its tokenizer tells: no other model has it."""
    return directory is not None and (directory / "tokenizer.model").exists() and (directory / "tokenizer.model").read_bytes() == (demo.FOLDER / "tokenizer.model").read_bytes()


def check_save_path(args: argparse.Namespace) -> None:
    """Find out before training, not after, that the result cannot be written."""
    inputs = [] if args.pretrain is None else [args.pretrain, *([lora.base_path(args.pretrain)] if lora.is_adapter(args.pretrain) else [])]
    if args.save_path.resolve() in [path.resolve() for path in inputs]:
        raise ValueError(f"--save_path {args.save_path} is --pretrain or its base: the run would overwrite its own input, name another directory")
    try:
        args.save_path.mkdir(parents=True, exist_ok=True)
        probe = args.save_path / "write.tmp"
        probe.write_bytes(b"")
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"--save_path {args.save_path} cannot be written ({error.strerror}): name a directory that can") from None


# ---- printing -------------------------------------------------------------------------------------------------------

def say(world: zero.World, text: str) -> None:
    if world.rank == 0:
        print(text, flush=True)


def say_flags(world: zero.World, args: argparse.Namespace) -> None:
    say(world, "flags: " + " ".join(f"{key}={' '.join(map(str, value)) if isinstance(value, list) else value}" for key, value in sorted(vars(args).items())))


def progress(world: zero.World, step: int, total: int, started: float, text: str, log: bool, first: int = 0) -> None:
    """One line that updates on a terminal; elsewhere a plain line where `log` says so. Rank 0 only."""
    if world.rank:
        return
    left = (time.perf_counter() - started) / max(step - first, 1) * (total - step)
    line = f"step {step}/{total} | {text} | {left / 60:.1f} min left" if left > 90 else f"step {step}/{total} | {text} | {left:.0f} s left"
    if sys.stdout.isatty():
        print(f"\r\x1b[K{line}", end="\n" if step == total else "", flush=True)
    elif log or step == total:
        print(line, flush=True)


# ---- opening --------------------------------------------------------------------------------------------------------

def open_tokenizer(args: argparse.Namespace, directory: Path | None, world: zero.World) -> Tokenizer:
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
        args.template = named if named in data.TEMPLATES else "alpaca"
    elif named not in (None, args.template):
        say(world, f"note: {directory} was trained with the template {named}, --template {args.template} replaces it")
    return tokenizer


def compute_dtype(args: argparse.Namespace, world: zero.World) -> torch.dtype:
    return DTYPES["bf16" if world.device.type == "cuda" else "fp32"] if args.dtype == "auto" else DTYPES[args.dtype]


def open_llama(directory: Path, dtype: torch.dtype | None, world: zero.World, head: bool = True) -> Llama:
    """A model from a weights directory, plain or quantized, or from an adapter merged into its base. dtype None is for training
    all weights, which quantized ones do not allow."""
    base = lora.base_path(directory) if lora.is_adapter(directory) else directory
    if (quantized := quantize.read_scheme(base)) and dtype is None and base == directory:
        raise ValueError(f"{directory} is quantized, its weights cannot be trained: give --lora_rank to train adapters beside them")
    model = quantize.load(base, dtype, world.device, head=head)
    if base != directory:
        if quantized:
            say(world, f"note: {directory} is an adapter of a quantized model: merged they are a full-precision one, with that one's memory")
        lora.load_adapter(model, directory)
        lora.fold(model)
    return model


def add_adapters(model: torch.nn.Module, args: argparse.Namespace) -> None:
    """Freeze the model and put adapters on it, the same on every process. Frozen weights go to the compute dtype."""
    lora.attach(model, args.lora_rank, args.lora_alpha, args.lora_dropout, dtype=torch.float32, generator=torch.Generator(model.device).manual_seed(args.seed))


def resolve_max_len(args: argparse.Namespace, config: LlamaConfig) -> None:
    resolve(args, {"max_len": min(512, config.max_seq_len)})
    if args.max_len > config.max_seq_len:
        raise ValueError(f"--max_len {args.max_len} is beyond the model's context of {config.max_seq_len} tokens")


def set_up(model: Llama, args: argparse.Namespace) -> None:
    model.grad_checkpoint = args.grad_checkpoint
    if args.compile:
        for layer in model.layers:
            layer.compile()  # dynamic shapes from the second length on


def make_optimizer(model: torch.nn.Module, args: argparse.Namespace, dtype: torch.dtype) -> zero.ZeRO2:
    return zero.ZeRO2(model.named_parameters(), dtype, weight_decay=args.weight_decay, max_norm=args.clip_grad, strategy=args.strategy, trace=args.trace)


def base_for_adapter(model: Llama, args: argparse.Namespace, tokenizer: Tokenizer, world: zero.World) -> str:
    """What an adapter will name as its base: --pretrain, or, when that was an adapter itself, the merged model, written beside."""
    if not lora.is_adapter(args.pretrain):
        return str(args.pretrain.resolve())
    if world.rank == 0:
        model.save_pretrained(args.save_path / "base")
        tokenizer.save(args.save_path / "base", args.template, data.TEMPLATES[args.template].jinja)
    return "base"


def save_model(model: torch.nn.Module, optimizer: zero.ZeRO2, args: argparse.Namespace, tokenizer: Tokenizer, base: str | None, world: zero.World, extra: dict | None = None) -> None:
    """Write the model, or its adapter, and remove what an earlier run of the other kind left, which would be read instead."""
    adapter = base is not None
    with optimizer.masters():
        if world.rank == 0:
            lora.save_adapter(model, args.save_path, base, extra) if adapter else model.save_pretrained(args.save_path)
    if world.rank == 0:
        for pattern in ("config.json", "model*.safetensors*") if adapter else ("adapter_*",):
            for file in args.save_path.glob(pattern):
                file.unlink()
        tokenizer.save(args.save_path, args.template, data.TEMPLATES[args.template].jinja)
    zero.barrier()


# ---- checkpoints ----------------------------------------------------------------------------------------------------

def random_state(world: zero.World) -> dict[str, Tensor]:
    return {"cpu": torch.get_rng_state()} | ({"cuda": torch.cuda.get_rng_state(world.device)} if world.device.type == "cuda" else {})


def set_random_state(state: dict[str, Tensor], world: zero.World) -> None:
    torch.set_rng_state(state["cpu"])
    if world.device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], world.device)


def fingerprint(model: torch.nn.Module, examples: list, seed: int) -> dict[str, str]:
    """Tells another model, dataset or seed apart at resume. Of weights, the first 64 numbers of each tensor will do."""
    weights, ids = hashlib.sha256(), hashlib.sha256()
    for name, p in (*model.named_parameters(), *model.named_buffers()):  # weights are buffers where they are quantized
        weights.update(name.encode() + str(tuple(p.shape)).encode() + p.detach().flatten()[:64].float().cpu().numpy().tobytes())
    ids.update(json.dumps(examples).encode())
    return {"seed": str(seed), "model": weights.hexdigest(), "dataset": ids.hexdigest()}  # in this order: the seed also changes the others


def checkpoints(save_path: Path) -> list[Path]:
    """Whole checkpoints, the newest last; a .tmp is one that a kill cut short."""
    return sorted(path for path in (save_path / "resume").glob("step-*") if path.suffix != ".tmp")


def save_checkpoint(save_path: Path, world: zero.World, meta: dict, state: dict) -> None:
    """SAVE_PATH/resume/step-N: meta.json, and of each process rank-R.pt, its part of the optimizer and its random state.
    Written under another name and renamed when whole; only then the previous one goes. A kill at any moment leaves one."""
    folder = save_path / "resume"
    new = folder / f"step-{meta['step']:08d}"
    temporary = new.with_suffix(".tmp")
    if world.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write_file(temporary / "meta.json", json.dumps(meta, indent=1).encode())
    zero.barrier()
    torch.save({"optimizer": state, "random": random_state(world)}, temporary / f"rank-{world.rank}.pt")
    zero.barrier()
    if world.rank == 0:
        shutil.rmtree(new, ignore_errors=True)
        temporary.rename(new)
        for old in folder.glob("step-*"):
            if old != new:
                shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(save_path: Path, world: zero.World, marks: dict[str, str], strategy: str) -> tuple[dict, list[dict], dict | None]:
    """(meta, the optimizer states of all processes that wrote it, this one's random state or None if they were not as many).
    Refuses another model, dataset or seed."""
    found = checkpoints(save_path)
    if not found:
        raise FileNotFoundError(f"--resume, but {save_path / 'resume'} holds no checkpoint: run without --resume first (a checkpoint every --save_interval updates)")
    try:
        meta = json.loads((found[-1] / "meta.json").read_text())
        # mmap: each process reads of each file only what it needs
        ranks = [torch.load(found[-1] / f"rank-{rank}.pt", map_location="cpu", weights_only=True, mmap=True) for rank in range(meta["world"])]
    except Exception as error:  # zip, pickle and JSON errors share no base class
        raise ValueError(f"the checkpoint {found[-1]} cannot be read: remove it and start again ({error})") from None
    for what, mark in marks.items():
        if meta["marks"].get(what) != mark:
            raise ValueError(f"{found[-1]} is of another {what} than this run: resume with the flags of the first run, or use another --save_path")
    if (meta["world"], meta["strategy"]) != (world.world, strategy):
        say(world, f"note: the checkpoint was written by {meta['world']} processes with {meta['strategy']}, this run has {world.world} with {strategy}: "
                   "optimizer state and the rest of the epoch are shared out anew")
    return meta, [rank["optimizer"] for rank in ranks], ranks[world.rank]["random"] if meta["world"] == world.world else None


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
    if torch.is_grad_enabled() and type(model.output) is Linear:               # no row of logits is spent on a prompt
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
        dtype = torch.bfloat16 if h.dtype == torch.bfloat16 and (h.device.type != "cpu" or cpu_has_bf16()) else torch.float32
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


def stop_if_broken(loss: float, step: int, lr: float, save_path: Path) -> None:
    if not math.isfinite(loss):
        kept = checkpoints(save_path)
        raise FloatingPointError(f"the loss is {loss} at step {step} with learning rate {lr:.3g}: lower --lr, or look at the data; "
                                 f"{f'the last good checkpoint is {kept[-1]}' if kept else 'there is no checkpoint yet'}")


def open_metrics(save_path: Path, world: zero.World, step: int) -> Callable[[dict], None]:
    """A function that appends a row to metrics.jsonl, cut back first to what was logged up to `step`. A new run (step 0) also
    removes an old one's checkpoints: it would be resumed from them if it died before its first."""
    file = save_path / "metrics.jsonl"
    if world.rank == 0:
        if not step:
            shutil.rmtree(save_path / "resume", ignore_errors=True)
        rows = file.read_text().splitlines() if step and file.exists() else []
        kept = []
        for row in rows:
            with suppress(json.JSONDecodeError):  # the last line of a killed run may be half a line
                kept += [row] if json.loads(row)["step"] <= step else []
        write_file(file, "".join(row + "\n" for row in kept).encode())

    def append(row: dict) -> None:
        if world.rank == 0:
            with file.open("a") as out:
                finite = {key: value if not isinstance(value, float) or math.isfinite(value) else None for key, value in row.items()}
                out.write(json.dumps(finite) + "\n")  # JSON knows no Infinity, which the gradient norm of a skipped step is
    return append


def write_summary(args: argparse.Namespace, world: zero.World, figures: dict) -> dict:
    summary = figures | {"peak_memory_bytes": zero.peak_memory_bytes(world.device), "world": world.world, "torch": torch.__version__,
                         "flags": {key: value if isinstance(value, int | float | str | None) else [str(v) for v in value] if isinstance(value, list) else str(value)
                                   for key, value in vars(args).items()}}
    if world.rank == 0:
        write_file(args.save_path / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False).encode())
    return summary


@contextmanager
def resumable(args: argparse.Namespace) -> Iterator[None]:
    """Whoever interrupts the run inside is told what is left of it."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"go on from {args.save_path / 'resume'} with the same command and --resume" if checkpoints(args.save_path) else
                                f"before its first checkpoint: it cannot be resumed (--save_interval {args.save_interval} updates)") from None


def finished(path: Path, script: str, flag: str) -> Path:
    """The path, if a script of the chain has written a model there."""
    if not any((path / name).exists() for name in ("config.json", lora.CONFIG)):
        how = "has no finished model" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{path} {how}: run {script}.py first, or name a model with {flag}")
    return path


def run(main: Callable[[], dict]) -> None:
    """A script's entry: bad input ends in one sentence and exit code 2, a broken run in one sentence and 1.
    `python -X dev` shows the traceback instead."""
    name = Path(sys.argv[0]).name
    try:
        main()
        zero.stop()
    except (ValueError, OSError, FloatingPointError) as error:
        if sys.flags.dev_mode:
            raise
        if not zero.failed(error):
            print(f"{name}: {sentence(error)}", file=sys.stderr, flush=True)
        sys.exit(1 if isinstance(error, FloatingPointError) else 2)
    except KeyboardInterrupt as stop:
        if os.environ.get("RANK", "0") == "0":
            print(f"\n{name}: interrupted" + (f", {stop}" if str(stop) else ""), file=sys.stderr)
        sys.exit(130)


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


def train(model: torch.nn.Module, optimizer: zero.ZeRO2, task: Task, marks: dict, args: argparse.Namespace, world: zero.World) -> dict:
    """The loop of stages 1 and 2. Returns what summary.json takes: last loss, steps, seconds, tokens_per_second, ..."""
    batch, lengths = args.batch_size * args.accumulation_steps * world.world, task.lengths
    epoch, step, seen, old_batch = 0, 0, 0, batch  # seen: samples of this epoch that are done; old_batch: what its order was made with
    if args.resume:
        meta, states, random = load_checkpoint(args.save_path, world, marks, optimizer.strategy)
        optimizer.load_state_dict(states)
        del states
        if random is not None:
            set_random_state(random, world)
        epoch, step, seen, old_batch = meta["epoch"], meta["step"], meta["seen"], meta["batch"]
    before = meta["before"] if args.resume else {f"{key}_before": value for key, value in task.evaluate().items()}
    append = open_metrics(args.save_path, world, step)
    updates = data.global_batches(lengths, batch, args.seed, epoch, seen, old_batch) if epoch < args.max_epochs else []
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
            mine = data.micro_batches(indices, lengths, args.batch_size, world.rank, world.world)
            for micro in mine:
                summed, further = task.loss_of(micro)
                optimizer.backward(summed / divisor, last=micro is mine[-1])
                sums += torch.cat((summed.detach().float().view(1), further.to(world.device)))
            optimizer.flush()  # before the next collective: processes differ in which buckets their backward launched
            loss, *further = zero.all_reduce(sums).tolist()
            loss /= divisor
            stop_if_broken(loss, step, lr, args.save_path)
            stats = optimizer.step(lr)
            # ---- log, evaluate, save ----
            seen += len(indices)
            tokens = sum(sum(task.rows[i]) for i in indices)
            tokens_done += tokens
            now = time.perf_counter()
            row = {"step": step, "loss": loss, "lr": lr, "seconds": now - started, "tokens_per_second": tokens / (now - began),
                   "grad_norm": stats.grad_norm, "skipped": optimizer.skipped, "seconds/optimizer": stats.seconds, "seconds/copies": stats.copying} | task.figures(further)
            log = step % args.log_interval == 0 or step == total
            progress(world, step, total, started, describe(row), log, first)
            if args.eval_interval and step % args.eval_interval == 0 and step < total:
                row |= task.evaluate()
            if log or "eval_loss" in row:
                append(row)
            if args.save_interval and (step % args.save_interval == 0 or step == args.max_steps):
                meta = {"step": step, "epoch": epoch, "seen": seen, "batch": old_batch, "world": world.world, "strategy": optimizer.strategy, "marks": marks, "before": before}
                save_checkpoint(args.save_path, world, meta, optimizer.state_dict())
        epoch, seen, old_batch = epoch + 1, 0, batch
        updates = data.global_batches(lengths, batch, args.seed, epoch)
    seconds = time.perf_counter() - started
    return {"planned_memory_bytes": planned, "loss": row.get("loss"), "steps": step, "seconds": seconds, "tokens_per_second": tokens_done / seconds, "skipped": optimizer.skipped} | before | task.evaluate()


def describe(row: dict) -> str:
    """A row of metrics as the progress line has it."""
    own = "".join(f" | {key} {row[key]:.3f}" for key in row if key not in ("step", "loss", "lr", "seconds", "tokens_per_second", "grad_norm", "skipped") and not key.startswith("seconds/"))
    return f"loss {row['loss']:.4f}{own} | lr {row['lr']:.1e} | {row['tokens_per_second']:,.0f} tokens/s" + (f" | skipped {row['skipped']}" if row["skipped"] else "")


def say_plan(model: torch.nn.Module, task: Task, batch: int, total: int, args: argparse.Namespace, world: zero.World) -> int:
    """Print what the run will do and take; returns the planned peak of memory above start-up."""
    lengths = task.lengths
    padding = data.padding_share(task.rows, [data.micro_batches(b, lengths, args.batch_size, 0, 1) for b in data.global_batches(lengths, batch, args.seed, 0)])
    trainable, everything = lora.trainable_report(model)
    say(world, f"{len(lengths)} examples, {sum(map(sum, task.rows)):,} tokens, padding {100 * padding:.1f} % | {total} updates of {args.batch_size} x {args.accumulation_steps} accumulated "
               f"x {world.world} processes = {batch} examples | {trainable:,} of {everything:,} parameters trained")
    tokens = args.batch_size * max((len(rows) * max(rows) for rows in task.rows), default=0)  # of the largest micro-batch
    line, peak = zero.run_plan([(model, model.config)], [], args.strategy, world, tokens, compute_dtype(args, world), args.lora_rank, args.grad_checkpoint)
    say(world, line)
    return peak


def peak_text(summary: dict, world: zero.World) -> str:
    peak = summary["peak_memory_bytes"]
    return f"peak memory {peak / 1e9:.2f} GB, {(peak - world.idle) / 1e9:.2f} above start-up, {summary['planned_memory_bytes'] / 1e9:.2f} planned"


# ---- stage 1 --------------------------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model: Llama, held: list, args: argparse.Namespace, world: zero.World) -> dict:
    """eval_loss: mean loss per target token of the held-out examples, shared out over the processes; None without any."""
    if not held:
        return {"eval_loss": None}
    model.eval()
    total = torch.zeros(2, device=world.device)
    for micro in data.micro_batches(list(range(len(held))), [len(ids) for ids, _ in held], args.batch_size, world.rank, world.world):
        tokens, _, target = data.collate([held[i] for i in micro])
        total += torch.stack((lm_loss(model, tokens, target).float(), target.sum().to(world.device)))
    nll, targets = zero.all_reduce(total).tolist()
    model.train()
    return {"eval_loss": nll / targets}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser("Stage 1: supervised fine-tuning. Without flags, the demo: a small LLaMA from scratch on data/demo.", "out/sft")
    parser.add_argument("--dataset", type=Path, nargs="+", help="records to learn: JSON list or lines, instruction, chat or text (data/__init__.py)")
    parser.add_argument("--batch_size", type=whole(1), help="examples a process and micro-batch")
    parser.add_argument("--max_epochs", type=whole(1), help="passes over the data")
    parser.add_argument("--max_len", type=whole(2), help="longest example in tokens; longer ones are cut (512, or the model's context)")
    parser.add_argument("--eval_size", type=whole(0), default=128, help="records held out for the evaluation loss, at most a tenth of all")
    parser.add_argument("--eval_interval", type=whole(0), default=0, help="updates between two evaluations (0 = at the end only)")
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


def open_model(args: argparse.Namespace, tokenizer: Tokenizer, world: zero.World) -> tuple[Llama, str | None]:
    """(model, base): from scratch or from --pretrain, with adapters if asked for; base is what they will name as theirs."""
    if args.pretrain is None:
        # Made on the CPU whatever the device, so that it starts the same everywhere.
        model = Llama(DEMO_MODEL, generator=torch.Generator().manual_seed(args.seed)).to(world.device)
        return model, None
    # All weights: in the file's dtype, from which the fp32 master is made. With LoRA they are frozen and only computed with.
    model = open_llama(args.pretrain, compute_dtype(args, world) if args.lora_rank else None, world)
    check_tokenizer(tokenizer, model.config)
    if not args.lora_rank:
        return model, None
    base = base_for_adapter(model, args, tokenizer, world)
    add_adapters(model, args)
    return model, base


def read_examples(args: argparse.Namespace, tokenizer: Tokenizer, world: zero.World) -> tuple[list, list]:
    records = data.read_records(args.dataset, "sft", args.skip_bad_records, args.max_datasets_size, partial(say, world))
    encode = partial(data.encode_example, tokenizer=tokenizer, template=data.TEMPLATES[args.template], max_len=args.max_len)
    examples, dropped = data.encode_all(records, encode, "examples")
    if dropped:
        say(world, f"note: {dropped} of {len(records)} examples have a prompt of --max_len {args.max_len} tokens or more: left out")
    return data.split_held_out(examples, args.eval_size, args.seed)


def benchmark(args: argparse.Namespace, world: zero.World, repeats: int = 7) -> dict:
    """Time whole updates (forward, backward, clipping, AdamW) on random tokens, every one but the first a target."""
    dtype = compute_dtype(args, world)
    resolve(args, {"batch_size": 4 if args.benchmark == "mid" else 8, "max_len": 256, "accumulation_steps": 1, "weight_decay": 0.0, "lr": 1e-4})
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
    figures = {"seconds": seconds, "tokens_per_second": B * T * args.accumulation_steps * world.world / seconds, "peak_memory_bytes": zero.peak_memory_bytes(world.device)}
    say(world, f"{args.benchmark} {str(dtype).removeprefix('torch.')}{' compiled' if args.compile else ''}, {args.accumulation_steps} x {B} x {T} tokens x {world.world} processes: {1e3 * seconds:.0f} ms an update (median of {repeats}), "
               f"{figures['tokens_per_second']:,.0f} tokens/s, peak memory {figures['peak_memory_bytes'] / 1e9:.2f} GB")
    return figures


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    world = zero.start(args.device, args.strategy)
    if args.benchmark:
        return benchmark(args, world)
    is_demo = args.pretrain is None
    check_save_path(args)
    tokenizer = open_tokenizer(args, args.pretrain, world)
    resolve(args, DEMO if is_demo else FINETUNE)
    model, base = open_model(args, tokenizer, world)
    resolve_max_len(args, model.config)
    examples, held = read_examples(args, tokenizer, world)
    say_flags(world, args)
    marks = fingerprint(model, examples, args.seed)
    set_up(model, args)
    torch.manual_seed(args.seed * 1000 + world.rank)  # dropout: each process its own
    optimizer = make_optimizer(model, args, compute_dtype(args, world))

    def loss_of(micro: list[int]) -> tuple[Tensor, Tensor]:
        tokens, _, target = data.collate([examples[i] for i in micro])
        return lm_loss(model, tokens, target), torch.zeros(0)

    task = Task([[len(ids)] for ids, _ in examples], lambda indices: sum(sum(examples[i][1]) for i in indices), loss_of, 0, lambda sums: {},
                partial(evaluate, model, held, args, world))
    with resumable(args):
        figures = train(model, optimizer, task, marks, args, world)
    save_model(model, optimizer, args, tokenizer, base, world)
    if is_demo:
        figures |= zero.broadcast_object(demo.measure(model, tokenizer, data.TEMPLATES[args.template]) if world.rank == 0 else None)
        say(world, f"held-out instructions: gold score {figures['gold']:.3f} (en {figures['gold_en']:.3f}, zh {figures['gold_zh']:.3f})")
    summary = write_summary(args, world, figures)
    evaluated = "" if summary["eval_loss"] is None else f"eval loss {summary['eval_loss']:.4f}, "
    say(world, f"wrote {args.save_path}: {evaluated}{summary['seconds']:.0f} s, {peak_text(summary, world)}")
    return summary


if __name__ == "__main__":
    run(main)
