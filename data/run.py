"""What makes a function a command: the processes it runs in, its flags, its exit code, what it prints, what it writes.

    def main(argv=None) -> dict:
        args = parse(argv)                                  # by run.training_parser, or by run.Parser
        world = run.start(args.device, args.strategy)       # rank, number of processes, device
        ...
        return run.write_summary(args, world, figures)

    if __name__ == "__main__":
        run.command(main)

`python X.py` is one process. `torchrun --nproc_per_node=N X.py`, or any launcher that sets RANK, WORLD_SIZE,
LOCAL_RANK, MASTER_ADDR and MASTER_PORT, starts N that run the same code; process 0 prints and writes for all.
A run leaves in SAVE_PATH

    metrics.jsonl     one object per logged step; a resumed run first cuts off what came after its checkpoint
    resume/step-N     the newest checkpoint: meta.json, and of each process rank-R.pt with its part of the optimizer
    summary.json      final figures and every flag

and ends with exit code 0, with 2 after bad input, with 1 after a failure, or with 130 after Ctrl-C.
"""

import argparse
import ctypes
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
# torch.compile and torch.utils.checkpoint import this module. Its functions keep the process group of that moment as a
# default argument. If that is after `start`, the group outlives `stop`, and the process may abort at its exit.
import torch.distributed.nn
from torch import Tensor, nn

from data.text import TEMPLATES
from data.weights import DTYPES, append_line, read_json, write_file, write_json

try:
    import resource
except ImportError:     # Windows
    resource = None


# ---- the world of processes -----------------------------------------------------------------------------------------

# Coati's names
ALIASES = {"colossalai_zero2": "zero2", "colossalai_zero2_cpu": "zero2_cpu", "colossalai_gemini": "zero2_cpu"}
STRATEGIES = ("naive", "ddp", "zero2", "zero2_cpu", *ALIASES)


class World(NamedTuple):
    rank: int               # of this process, 0 .. world - 1
    world: int              # number of processes
    device: torch.device
    idle: int = 0           # peak memory in bytes before this process loaded anything


def start(device: str = "auto", strategy: str = "ddp") -> World:
    """Joins the processes that a launcher started; without a launcher this process is the only one."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if strategy == "naive" and world > 1:
        raise ValueError(f"--strategy naive is for one process and {world} were started: they would train {world} "
                         "different models; use --strategy ddp")
    if strategy == "colossalai_gemini" and rank == 0:
        print("note: --strategy colossalai_gemini runs as zero2_cpu", flush=True)
    chosen = choose_device(device)
    keep_freed_memory()
    if world > 1 and not dist.is_initialized():
        # How long a process waits for the others. While process 0 writes a large model, they wait in a barrier for
        # minutes. Without a limit they would wait for ever for a process that hangs.
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=timedelta(minutes=30))
        signal.signal(signal.SIGTERM, told_to_stop)
    return World(rank, world, chosen, peak_memory_bytes(chosen))


def stop() -> None:
    """Leaves the group of processes, when all have come to the end."""
    if dist.is_initialized():
        dist.barrier()      # after it no process uses the group any more
        dist.destroy_process_group()


def choose_device(name: str) -> torch.device:
    """auto is the GPU where there is one, else the CPU. Each process of a machine takes the GPU of its own number."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps, but this machine has no Apple GPU: use --device cpu")
    if name != "cuda":
        return torch.device(name)
    local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if gpus == 0:
        raise ValueError("--device cuda, but PyTorch finds no GPU on this machine: use --device cpu")
    if local >= gpus:
        raise ValueError(f"process {local} of this machine wants GPU {local}, but there are {gpus}: start fewer "
                         "processes or use --device cpu")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto is bf16 on a GPU and fp32 elsewhere."""
    if name == "auto":
        name = "bf16" if device.type == "cuda" else "fp32"
    return DTYPES[name]


def keep_freed_memory() -> None:
    """Lets glibc keep the memory that a step frees for the next step.

    By default glibc returns large blocks to the system, which then zeroes their pages anew in every step. The first
    arguments are the constants of malloc.h. One arena only, because other arenas hold no block above 64 MB."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:                 # musl has none
        mallopt(-4, 0)                      # M_MMAP_MAX: no block has a mapping of its own
        mallopt(-1, 2**31 - 1)              # M_TRIM_THRESHOLD: the heap never shrinks
        mallopt(-2, 2**26)                  # M_TOP_PAD: it grows by 64 MB
        mallopt(-8, 1)                      # M_ARENA_MAX


def all_reduce(x: Tensor) -> Tensor:
    """Sums x over all processes, in place, and returns it."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def reduce_sums(sums: dict[str, Tensor]) -> dict[str, float]:
    """Adds up named numbers over all processes. Takes tensors (), returns floats."""
    return dict(zip(sums, all_reduce(torch.stack(list(sums.values()))).tolist()))


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def gather(x) -> list:
    """Returns the x of every process, in order of their ranks, on every process."""
    found = [x]
    if dist.is_initialized():
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, x)
    return found


def peak_memory_bytes(device: torch.device) -> int:
    """The peak memory of this process so far: allocated memory on a GPU, resident memory elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024        # Linux counts in KiB


# ---- flags ----------------------------------------------------------------------------------------------------------

class WrongFlag(ValueError):
    """A command line that is refused. Every process has the same one, so process 0 alone prints the sentence."""


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """--help with the default of each flag that has one other than 0."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return super()._get_help_string(action) if action.default else action.help


class Parser(argparse.ArgumentParser):
    """argparse for all scripts: a wrong flag gives one sentence without the usage text, and --help gives defaults."""

    def __init__(self, description: str, **more):
        super().__init__(description=description, formatter_class=Help, **more)

    def error(self, message: str):
        raise WrongFlag(f"{message} (see --help)")

    def tell(self, usual: dict, demo: dict) -> None:
        """Adds to --help the defaults that `resolve` fills in later, since they depend on the input."""
        for action in self._actions:
            told = []
            for prefix, defaults in (("", usual), ("the demo: ", demo)):
                value = defaults.get(action.dest)
                if isinstance(value, list):
                    value = shown([path.name for path in value])
                told += [] if value is None else [f"{prefix}{value}"]
            if told:
                action.help += " (" + "; ".join(told) + ")"


def shown(value) -> str:
    """Returns a flag's value as it is typed."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def typed(args: argparse.Namespace) -> dict[str, str]:
    """Returns the values of all flags, in order of their names."""
    return {flag: shown(value) for flag, value in sorted(vars(args).items())}


def number(at_least: float = 0, at_most: float = math.inf, above: bool = False,
           read: type[float] | type[int] = float) -> Callable[[str], float]:
    """The type of a flag that takes numbers from at_least to at_most; with `above` at_least itself is not allowed."""
    kind = "finite number" if read is float else "whole number"
    bounds = f"above {at_least}" if above else f"at least {at_least}"
    if at_most < math.inf:
        bounds += f" and at most {at_most}"

    def parse(given: str) -> float:
        try:
            value = read(given)
        except ValueError:
            value = math.nan
        if not abs(value) < math.inf:
            raise argparse.ArgumentTypeError(f"must be a {kind}, not {given}")
        if not at_least <= value <= at_most or above and value == at_least:
            raise argparse.ArgumentTypeError(f"must be {bounds}, not {given}")
        return value
    return parse


whole = partial(number, read=int)       # the same for whole numbers


def training_parser(description: str) -> Parser:
    """The flags that sft.py, rm.py and ppo.py share. A flag without a default is None until `resolve` fills it in."""
    parser = Parser(description)
    flag = parser.add_argument
    # input and output
    flag("--pretrain", type=Path,
         help="weights directory to start from: Hugging Face or Meta layout, or a LoRA adapter, which is merged first")
    flag("--model", choices=["llama"], default="llama", help="architecture; LLaMA is the only one here")
    flag("--save_path", type=Path, help="directory to write")
    flag("--template", choices=sorted(TEMPLATES), help="prompt template (the one that --pretrain names, else alpaca)")
    flag("--max_datasets_size", type=whole(1), help="use only so many records (all)")
    flag("--skip_bad_records", action="store_true", help="count and skip broken records instead of stopping")
    # optimization
    flag("--lr", type=number(0, 1), help="peak learning rate")
    flag("--weight_decay", type=number(0, 10), help="AdamW's decay of matrices; vectors are never decayed")
    flag("--warmup", type=number(0, 1), default=0.05, help="share of the updates over which the learning rate rises")
    flag("--clip_grad", type=number(), default=1.0, help="clip the global gradient norm to this (0 = never)")
    flag("--max_steps", type=whole(1), help="stop after so many updates")
    flag("--accumulation_steps", "--accimulation_steps", type=whole(1),
         help="micro-batches an update (Coati published the second spelling)")
    flag("--grad_checkpoint", action="store_true",
         help="recompute activations in backward: less memory, a third more time")
    # LoRA
    flag("--lora_rank", type=whole(0, 4096), default=0,
         help="rank of low-rank adapters on every linear layer; 0 trains all weights")
    flag("--lora_alpha", type=number(0, above=True), help="adapters are scaled by alpha / rank (2 * rank)")
    flag("--lora_dropout", type=number(0, 0.9), default=0.0, help="dropout on the input of the adapters")
    # run
    flag("--strategy", choices=STRATEGIES, default="ddp",
         help="naive is for one process; ddp sums gradients over all; zero2 also shards gradients and optimizer, "
              "zero2_cpu keeps them in CPU memory; the others are Coati's names for these")
    flag("--seed", type=whole(-2**31, 2**31), default=0,
         help="of initial weights, order of the data, dropout and sampling")
    flag("--dtype", choices=["auto", "fp32", "bf16", "fp16"], default="auto",
         help="to compute in; the master weights are fp32 (auto: bf16 on CUDA, fp32 elsewhere)")
    flag("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto",
         help="auto: cuda where there is one, else cpu")
    flag("--compile", action="store_true", help="torch.compile the blocks: slower start, faster steps")
    flag("--trace", action="store_true", help="print when each gradient bucket of the first update left and arrived")
    flag("--log_interval", type=whole(1), default=10, help="updates between two lines of metrics.jsonl")
    flag("--save_interval", type=whole(0), default=500, help="updates between two checkpoints for --resume (0 = none)")
    flag("--resume", action="store_true", help="continue from SAVE_PATH/resume")
    return parser


def resolve(args: argparse.Namespace, defaults: dict) -> None:
    """Fills in the flags that the user left open."""
    for key, value in defaults.items():
        if getattr(args, key) is None:
            setattr(args, key, value)


def finished(path: Path, script: str, flag: str) -> Path:
    """Returns the path if a script of the chain has written a model there."""
    if not any((path / name).exists() for name in ("config.json", "adapter_config.json")):
        state = "has no finished model" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{path} {state}: run {script}.py first, or name a model with {flag}")
    return path


def check_save_path(save_path: Path, inputs: list[Path]) -> None:
    """Finds out before the run, not after, that its result cannot be written."""
    if save_path.resolve() in [path.resolve() for path in inputs]:
        raise ValueError(f"--save_path {save_path} is read too, the run would overwrite its own input: name another "
                         "directory")
    try:
        save_path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=save_path):
            pass
    except OSError as error:
        raise ValueError(f"--save_path {save_path} cannot be written ({error.strerror}): name a directory that can "
                         "be") from None


# ---- how a command ends ---------------------------------------------------------------------------------------------

def command(main: Callable[[list[str] | None], object], argv: list[str] | None = None) -> None:
    """A script's entry. Bad input ends with one sentence and exit code 2, a broken run with one sentence and 1.

    `python -X dev` shows the traceback instead. Any other error is a fault of the code and shows it always."""
    name, rank = Path(sys.argv[0]).name, int(os.environ.get("RANK", 0))
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="replace")        # a terminal that knows no Chinese must not end the run
    try:
        main(argv)
        stop()
    except KeyboardInterrupt as interrupt:
        if rank == 0:
            how_to_go_on = f", {interrupt}" if str(interrupt) else ""
            print(f"\n{name}: interrupted{how_to_go_on}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        text, code = sentence(error), 2 if isinstance(error, ValueError | OSError) else 1
        lost = isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and "gloo" in text
        if sys.flags.dev_mode or isinstance(error, RuntimeError) and not lost:
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)       # torchrun's SIGTERM would add told_to_stop's sentence
        if lost:
            reason = text.partition(". ")[0]
            text = f"process {rank} stops: it lost the connection to another one, which has failed ({reason})"
        elif said_already(text) or isinstance(error, WrongFlag) and rank > 0:
            sys.exit(code)
        print(f"{name}: {text}", file=sys.stderr, flush=True)
        if lost and dist.is_initialized():
            sys.stdout.flush()
            os._exit(code)      # the usual exit may abort while a thread of the broken group still runs
        sys.exit(code)


def sentence(error: Exception) -> str:
    """Returns an error in words, without the number of a system error: "[Errno 13] Permission denied: 'x'".

    It is one line: what was typed, or the name of a file, may have several."""
    if not (isinstance(error, OSError) and error.strerror and str(error).startswith("[Errno")):
        return " ".join(str(error).splitlines())
    reason = error.strerror.lower()
    return reason if error.filename is None else f"{error.filename}: {reason}"


def said_already(text: str) -> bool:
    """Records that this process prints a sentence. Returns whether another one has printed it before.

    All processes may meet the same error; the sentence is counted in the store that they share."""
    with suppress(RuntimeError, ValueError):        # without a group, or after process 0 has ended with the store
        store = dist.distributed_c10d._get_default_store()
        store.set("said", "something")
        return store.add(text, 1) > 1
    return False


def told_to_stop(signal_number: int, frame) -> None:
    """Ends this process at SIGTERM. It prints a sentence unless another process has printed one."""
    with suppress(RuntimeError):
        if dist.distributed_c10d._get_default_store().check(["said"]):
            os._exit(1)     # the usual exit could wait for the other processes
    rank = os.environ["RANK"]
    os.write(2, f"process {rank} stops: SIGTERM, which torchrun sends when another one has failed\n".encode())
    os._exit(1)


# ---- printing -------------------------------------------------------------------------------------------------------

def say(world: World, text: str) -> None:
    if world.rank == 0:
        print(text, flush=True)


def say_flags(world: World, args: argparse.Namespace) -> None:
    say(world, "flags: " + " ".join(f"{flag}={value}" for flag, value in typed(args).items()))


# ---- checkpoints ----------------------------------------------------------------------------------------------------

def generators(world: World) -> list[torch.Generator]:
    """Returns what training draws random numbers from: PyTorch's generator of the CPU, and the one of this GPU."""
    gpu = [torch.cuda.default_generators[world.device.index]] if world.device.type == "cuda" else []
    return [torch.default_generator, *gpu]


def fingerprint(model: nn.Module, examples: list, seed: int) -> dict[str, str]:
    """Marks that a resumed run must have in common with the first one. 64 numbers of a tensor stand for all of it."""
    tensors = [*model.named_parameters(), *model.named_buffers()]               # quantized weights are buffers
    numbers = [(name, tuple(p.shape), p.detach().flatten()[:64].tolist()) for name, p in tensors]
    # The seed comes first because another seed changes the others too.
    marks = {"seed": seed, "model": numbers, "dataset": examples}
    return {what: hashlib.sha256(repr(mark).encode()).hexdigest() for what, mark in marks.items()}


def checkpoints(save_path: Path) -> list[Path]:
    """Returns the complete checkpoints, the newest last. A kill in the middle of writing leaves a .tmp."""
    return sorted(path for path in (save_path / "resume").glob("step-*") if path.suffix != ".tmp")


def save_checkpoint(args: argparse.Namespace, world: World, meta: dict, optimizers: dict) -> None:
    """Writes a checkpoint if meta["step"] is one of --save_interval or the one where --max_steps stops.

    SAVE_PATH/resume/step-N.tmp is written, renamed to step-N when complete, then the previous checkpoint is removed.
    So a kill at any moment leaves a complete one. optimizers: by name; meta: what else continuing needs."""
    step = meta["step"]
    if not args.save_interval or step % args.save_interval and step != args.max_steps:
        return
    new = args.save_path / "resume" / f"step-{step:08d}"
    temporary = new.with_suffix(".tmp")
    part = {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
    part["random"] = [generator.get_state() for generator in generators(world)]
    try:
        if world.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            write_json(temporary / "meta.json", meta | {"world": world.world, "flags": typed(args)})
        barrier()
        write_file(temporary / f"rank-{world.rank}.pt", partial(torch.save, part))
        barrier()
    except (OSError, RuntimeError):     # the disk is full, here or at another process, to which the connection is lost
        with suppress(OSError):
            for file in ("meta.json", f"rank-{world.rank}.pt"):
                (temporary / file).unlink(missing_ok=True)
            temporary.rmdir()           # by the last process: another one may still write into it
        raise
    if world.rank == 0:
        temporary.rename(new)
        remove_others(new)


def remove_others(checkpoint: Path) -> None:
    """Removes the older checkpoints, and what a kill left of one that was being written or removed."""
    for other in checkpoint.parent.glob("step-*"):
        if other != checkpoint:
            shutil.rmtree(other, ignore_errors=True)


def load_checkpoint(args: argparse.Namespace, world: World, marks: dict[str, str], optimizers: dict) -> dict:
    """Brings the optimizers, by name, and the random state back from the newest checkpoint. Returns its meta.

    Refuses another model, dataset or seed. Other flags and another number of processes are told."""
    found, folder = checkpoints(args.save_path), args.save_path / "resume"
    if not found:
        raise FileNotFoundError(f"--resume, but {folder} holds no checkpoint: run without --resume first "
                                "(a checkpoint every --save_interval updates)")
    newest = found[-1]
    try:
        meta = read_json(newest / "meta.json")
        before = {"processes": str(meta["world"])} | meta["flags"]
        files = [newest / f"rank-{rank}.pt" for rank in range(meta["world"])]
        # With mmap a process reads only what it needs of each file.
        parts = [torch.load(file, map_location="cpu", weights_only=True, mmap=True) for file in files]
    except Exception as error:      # zip, pickle and JSON errors share no base class
        reason = str(error).partition("\n")[0][:120]
        raise ValueError(f"the checkpoint {newest} cannot be read: remove it and start again ({reason})") from None
    for what, mark in marks.items():
        if meta["marks"].get(what) != mark:
            raise ValueError(f"{newest} is of another {what} than this run: resume with the flags of the first run, or "
                             "use another --save_path")
    now = {"processes": str(world.world)} | typed(args)
    changed = [flag for flag in now if now[flag] != before.get(flag) and flag not in ("resume", "save_path")]
    if changed:
        old, new = (", ".join(f"{flag}={flags.get(flag)}" for flag in changed) for flags in (before, now))
        say(world, f"note: the checkpoint was written with {old}, this run goes on from it with {new}")
    for name, optimizer in optimizers.items():
        optimizer.load_state_dict([part[name] for part in parts])       # of all processes: each takes its own part
    if meta["world"] == world.world:
        for generator, state in zip(generators(world), parts[world.rank]["random"]):
            generator.set_state(state)
    if world.rank == 0:
        remove_others(newest)       # a kill may have left them, and this run may write no checkpoint any more
    return meta


@contextmanager
def resumable(args: argparse.Namespace) -> Iterator[None]:
    """Inside, a Ctrl-C (KeyboardInterrupt) gets a sentence on how to resume the run."""
    try:
        yield
    except KeyboardInterrupt:
        folder = args.save_path / "resume"
        left = f"go on from {folder} with the same command and --resume"
        if not checkpoints(args.save_path):
            left = f"before its first checkpoint: it cannot be resumed (--save_interval {args.save_interval} updates)"
        raise KeyboardInterrupt(left) from None


def stop_if_broken(loss: float, step: int, lr: float, args: argparse.Namespace) -> None:
    """Raises FloatingPointError if the loss is not finite."""
    if not math.isfinite(loss):
        kept = checkpoints(args.save_path)
        left = f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
        raise FloatingPointError(f"the loss is {loss} at step {step} with learning rate {lr:.3g}: lower --lr, or look "
                                 f"at the data; {left}")


# ---- metrics and summary --------------------------------------------------------------------------------------------

class Log:
    """The rows of metrics.jsonl and the progress line of a run of `total` steps that begins after step `first`."""

    def __init__(self, args: argparse.Namespace, world: World, first: int, total: int):
        """Cuts off the rows after `first`. A new run (0) also removes an old one's checkpoints, from which --resume
        would continue if the new one died early."""
        self.world, self.first, self.total, self.file = world, first, total, args.save_path / "metrics.jsonl"
        if world.rank == 0 and first == 0:
            shutil.rmtree(args.save_path / "resume", ignore_errors=True)
        if world.rank == 0:
            try:
                lines = self.file.read_text("utf-8").splitlines(keepends=True) if first and self.file.exists() else []
                whole_lines = [line for line in lines if line.endswith("\n")]   # a killed run may leave half a line
                kept = [line for line in whole_lines if json.loads(line)["step"] <= first]
            except (ValueError, LookupError, TypeError) as error:
                raise ValueError(f"{self.file} has a line that no run has written: remove it ({error})") from None
            write_file(self.file, "".join(kept).encode())
        self.tokens, self.started = 0, time.perf_counter()

    def row(self, step: int, loss: float, lr: float, tokens: int, began: float) -> dict:
        """Returns the figures that every row has. began: the time.perf_counter() at which this step began."""
        now = time.perf_counter()
        self.tokens += tokens
        return {
            "step": step,
            "loss": loss,
            "lr": lr,
            "seconds": now - self.started,
            "tokens_per_second": tokens / (now - began),
        }

    def append(self, row: dict) -> None:
        """Writes a row. JSON has no Infinity, such as the gradient norm of a skipped step: it is written as null."""
        finite = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in row.items()}
        if self.world.rank == 0:
            append_line(self.file, json.dumps(finite))

    def progress(self, step: int, text: str, log: bool) -> None:
        """Prints the progress line: on a terminal over the one before, elsewhere as a line of its own if `log`."""
        seconds = (time.perf_counter() - self.started) / (step - self.first) * (self.total - step)
        minutes = seconds / 60
        left = f"{minutes:.1f} min left" if minutes > 1.5 else f"{seconds:.0f} s left"
        line = f"step {step}/{self.total} | {text} | {left}"
        if self.world.rank == 0 and sys.stdout.isatty():
            print(f"\r\x1b[K{line}", end="\n" if step == self.total else "", flush=True)
        elif log or step == self.total:
            say(self.world, line)

    def figures(self) -> dict:
        """Returns what summary.json takes of the whole run."""
        seconds = max(time.perf_counter() - self.started, 1e-9)
        return {"seconds": seconds, "tokens_per_second": self.tokens / seconds}


def write_summary(args: argparse.Namespace, world: World, figures: dict) -> dict:
    """Writes summary.json, and returns what it holds: the figures, what they were measured on, and every flag."""
    flags = json.loads(json.dumps(vars(args), default=str))         # paths as texts
    summary = figures | {"peak_memory_bytes": peak_memory_bytes(world.device), "world": world.world,
                         "torch": torch.__version__, "flags": flags}
    if world.rank == 0:
        write_json(args.save_path / "summary.json", summary)
    return summary
