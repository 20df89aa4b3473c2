"""What makes a function a command: the processes it runs in, its flags, what it prints, its files, its exit code."""

import argparse
import ctypes
import hashlib
import json
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
# Its functions take the process group of the moment of import as a default argument. Imported later (by torch.compile or
# torch.utils.checkpoint) they would keep the group and its threads alive beyond `stop`: one exit in four then aborts.
import torch.distributed.nn
from torch import Tensor

from data.text import TEMPLATES
from data.weights import DTYPES, write_file


# ---- processes ------------------------------------------------------------------------------------------------------

ALIASES = {"colossalai_zero2": "zero2", "colossalai_zero2_cpu": "zero2_cpu", "colossalai_gemini": "zero2_cpu"}  # Coati's names
STRATEGIES = ("naive", "ddp", "zero2", "zero2_cpu", *ALIASES)


class World(NamedTuple):
    rank: int            # this process, 0 .. world - 1
    world: int           # number of processes
    device: torch.device
    idle: int = 0        # bytes that this process had taken before it loaded anything


def start(device: str = "auto", strategy: str = "ddp") -> World:
    """Join the processes that torchrun (or any launcher that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT)
    started; without a launcher this process is the whole world. The one place where a device is chosen.
    Raises ValueError when the device is not there, or `naive` meets more than one process."""
    keep_freed_memory()
    rank, world, local = (int(os.environ.get(key, default)) for key, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if strategy == "naive" and world > 1:
        raise ValueError(f"--strategy naive is for one process and {world} were started: they would train {world} different models; use --strategy ddp")
    if strategy == "colossalai_gemini" and rank == 0:
        print("note: --strategy colossalai_gemini runs as zero2_cpu", flush=True)
    device = choose_device(device).type
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(f"process {local} of this machine wants GPU {local}, but there are {torch.cuda.device_count()}: start fewer processes or use --device cpu")
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
    elif device == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps, but this machine has no Apple GPU: use --device cpu")
    if world > 1 and not dist.is_initialized():
        # Hours, because writing a large model takes rank 0 long; that a process has died is found out by Watch.
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(hours=2))
        Watch(rank, world).start()
    device = torch.device(device)
    return World(rank, world, device, peak_memory_bytes(device))


def choose_device(name: str) -> torch.device:
    """auto: a CUDA device where there is one, else the CPU."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto: bf16 on CUDA, fp32 elsewhere."""
    return DTYPES[("bf16" if device.type == "cuda" else "fp32") if name == "auto" else name]


def keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next one. By itself it hands large blocks back to the system at once, and
    every step pays again for having their pages zeroed: a tenth to a third of a step on a CPU. One arena for all threads: others
    cannot hold blocks above 64 MB, and would take those by other ways. Linux with glibc only."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt is not None:
            for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**26), (-8, 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD, M_ARENA_MAX in malloc.h
                mallopt(parameter, value)


def stop() -> None:
    if dist.is_initialized():
        dist.barrier()  # from here on nobody waits for anybody
        for watch in watches():
            watch.leave("done")
        dist.destroy_process_group()


class Watch(threading.Thread):
    """Finds out that another process has died, and ends this one with a sentence, which otherwise would wait for it for ever.

    Each process writes a sign of life into torchrun's store (rank 0's under another launcher) and reads those of the others.
    Installed by `start`; an error that nobody catches is reported to the others too.
    """

    INTERVAL = 1.0
    SILENCE = 40.0   # seconds without a sign of life: more than a busy process (or one that swaps) needs, less than a minute

    def __init__(self, rank: int, world: int):
        super().__init__(daemon=True)
        self.rank, self.world, self.over = rank, world, threading.Event()
        # A client of its own: one that the main thread waits with would make this one wait too.
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        self.store = dist.PrefixStore(f"watch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        self.store.set(str(rank), "started")
        sys.excepthook = lambda kind, error, trace: (failed(error), sys.__excepthook__(kind, error, trace))

    def run(self) -> None:
        heard = [("", 0)] * self.world  # the last word of each, and the beat of its coming: a job that was suspended has missed none
        for beat in range(10**9):
            if self.over.wait(self.INTERVAL):
                return
            try:
                self.store.set(str(self.rank), f"alive {beat}")
                words = [word.decode() for word in self.store.multi_get([str(rank) for rank in range(self.world)])]
            except RuntimeError:
                if self.over.wait(3):  # not if everybody is leaving
                    return
                self.end("process 0, or the torchrun that started it, has died")
            for rank, word in enumerate(words):
                if word.startswith("failed"):
                    if self.over.wait(4 * self.INTERVAL):  # this process meets the same error, and says so itself
                        return
                    self.end(f"process {rank} {word}")
                if word != heard[rank][0]:
                    heard[rank] = word, beat
                elif word != "done" and (beat - heard[rank][1]) * self.INTERVAL > self.SILENCE:
                    self.end(f"process {rank} has died or hangs: no sign of life for {self.SILENCE:.0f} s")

    def hears(self, word: str) -> bool:
        """Whether process 0 ends with this word, within two beats."""
        for _ in range(40):
            try:
                if self.store.get("0").decode() == word:
                    return True
            except RuntimeError:  # it has ended
                return False
            time.sleep(self.INTERVAL / 20)
        return False

    def leave(self, word: str) -> None:
        self.over.set()
        self.join()
        self.store.set(str(self.rank), word)

    def end(self, why: str) -> None:
        print(f"process {self.rank} stops: {why}", file=sys.stderr, flush=True)
        os._exit(1)  # the main thread may wait inside a collective, where no exception reaches it


def watches() -> list[Watch]:
    return [thread for thread in threading.enumerate() if isinstance(thread, Watch)]


def failed(error: BaseException) -> bool:
    """Tell the other processes why this one ends; returns whether process 0 ends for the same reason, and will say it for all.
    An error of the communication is only an echo of another's death: then the watch finds out whose, and ends this process
    with its name."""
    heard, word = False, f"failed: {type(error).__name__}: {error}"
    for watch in watches():
        if isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and "gloo" in str(error):
            watch.join(watch.SILENCE + 5)
        heard = watch.rank > 0 and watch.hears(word)
        watch.leave(word)
        if watch.rank == 0 and not os.environ.get("TORCHELASTIC_USE_AGENT_STORE"):
            time.sleep(2 * watch.INTERVAL)  # the store ends with this process: let the others read it first
    return heard


def all_reduce(x: Tensor) -> Tensor:
    """Sum over all processes, in place; returns x."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def broadcast_object(x):
    """Rank 0's x on every process."""
    box = [x]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def peak_memory_bytes(device: torch.device) -> int:
    """High-water mark of this process: allocated memory on a GPU, resident memory elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


# ---- flags ----------------------------------------------------------------------------------------------------------

class Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default in (None, False, []) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse for all scripts: a wrong flag is a ValueError of one sentence, without forty lines of usage before it, and --help
    gives defaults where there are any."""

    def __init__(self, description: str, **more):
        super().__init__(description=description, formatter_class=Help, **more)

    def error(self, message: str):
        raise ValueError(f"{message} (see --help)")

    def tell(self, usual: dict, demo: dict) -> None:
        """Put into --help what is filled in later where a flag is left open, since it depends on the input."""
        for action in self._actions:
            values = [" ".join(Path(v).name for v in value) if isinstance(value, list) else str(value) for value in (usual.get(action.dest), demo.get(action.dest)) if value is not None]
            if values:
                usually = [] if usual.get(action.dest) is None else values[:1]
                action.help += f" ({'; '.join(usually + ([f'the demo: {values[-1]}'] if action.dest in demo else []))})"


def sentence(error: Exception) -> str:
    """An error in words: the system's own ("[Errno 13] Permission denied: 'x'") begin with a number that says nothing."""
    raw = isinstance(error, OSError) and error.strerror and error.errno is not None and str(error).startswith("[Errno")
    return str(error) if not raw else f"{error.filename}: {error.strerror.lower()}" if error.filename is not None else error.strerror


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


def training_parser(description: str, save_path: str) -> Parser:
    """The flags that all three stages share. A default of None is filled in later: it depends on the input (`resolve`)."""
    parser = Parser(description)
    # input and output
    parser.add_argument("--pretrain", type=Path, help="weights directory to start from: Hugging Face or Meta layout, or a LoRA adapter, which is merged first")
    parser.add_argument("--model", choices=["llama"], default="llama", help="architecture; LLaMA is the only one here")
    parser.add_argument("--save_path", type=Path, default=Path(save_path), help="directory to write")
    parser.add_argument("--template", choices=sorted(TEMPLATES), help="prompt template (the one that --pretrain names, else alpaca)")
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
    parser.add_argument("--strategy", choices=STRATEGIES, default="ddp", help="naive is for one process; ddp sums gradients over all; zero2 also shards gradients and optimizer, "
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


def check_save_path(save_path: Path, inputs: list[Path]) -> None:
    """Find out before training, not after, that the result cannot be written."""
    if save_path.resolve() in [path.resolve() for path in inputs]:
        raise ValueError(f"--save_path {save_path} is --pretrain or its base: the run would overwrite its own input, name another directory")
    try:
        save_path.mkdir(parents=True, exist_ok=True)
        probe = save_path / "write.tmp"
        probe.write_bytes(b"")
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"--save_path {save_path} cannot be written ({error.strerror}): name a directory that can") from None


# ---- printing -------------------------------------------------------------------------------------------------------

def say(world: World, text: str) -> None:
    if world.rank == 0:
        print(text, flush=True)


def say_flags(world: World, args: argparse.Namespace) -> None:
    say(world, "flags: " + " ".join(f"{key}={' '.join(map(str, value)) if isinstance(value, list) else value}" for key, value in sorted(vars(args).items())))


def progress(world: World, step: int, total: int, started: float, text: str, log: bool, first: int = 0) -> None:
    """One line that updates on a terminal; elsewhere a plain line where `log` says so. Rank 0 only."""
    if world.rank:
        return
    left = (time.perf_counter() - started) / max(step - first, 1) * (total - step)
    line = f"step {step}/{total} | {text} | {left / 60:.1f} min left" if left > 90 else f"step {step}/{total} | {text} | {left:.0f} s left"
    if sys.stdout.isatty():
        print(f"\r\x1b[K{line}", end="\n" if step == total else "", flush=True)
    elif log or step == total:
        print(line, flush=True)


def peak_text(summary: dict, world: World) -> str:
    peak = summary["peak_memory_bytes"]
    return f"peak memory {peak / 1e9:.2f} GB, {(peak - world.idle) / 1e9:.2f} above start-up, {summary['planned_memory_bytes'] / 1e9:.2f} planned"


# ---- checkpoints, metrics, summary ----------------------------------------------------------------------------------

def random_state(world: World) -> dict[str, Tensor]:
    return {"cpu": torch.get_rng_state()} | ({"cuda": torch.cuda.get_rng_state(world.device)} if world.device.type == "cuda" else {})


def set_random_state(state: dict[str, Tensor], world: World) -> None:
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


def save_checkpoint(save_path: Path, world: World, meta: dict, state: dict) -> None:
    """SAVE_PATH/resume/step-N: meta.json, and of each process rank-R.pt, its part of the optimizer and its random state.
    Written under another name and renamed when whole; only then the previous one goes. A kill at any moment leaves one."""
    folder = save_path / "resume"
    new = folder / f"step-{meta['step']:08d}"
    temporary = new.with_suffix(".tmp")
    if world.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write_file(temporary / "meta.json", json.dumps(meta, indent=1).encode())
    barrier()
    torch.save({"optimizer": state, "random": random_state(world)}, temporary / f"rank-{world.rank}.pt")
    barrier()
    if world.rank == 0:
        shutil.rmtree(new, ignore_errors=True)
        temporary.rename(new)
        for old in folder.glob("step-*"):
            if old != new:
                shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(save_path: Path, world: World, marks: dict[str, str], strategy: str) -> tuple[dict, list[dict], dict | None]:
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


def stop_if_broken(loss: float, step: int, lr: float, save_path: Path) -> None:
    if not math.isfinite(loss):
        kept = checkpoints(save_path)
        raise FloatingPointError(f"the loss is {loss} at step {step} with learning rate {lr:.3g}: lower --lr, or look at the data; "
                                 f"{f'the last good checkpoint is {kept[-1]}' if kept else 'there is no checkpoint yet'}")


def open_metrics(save_path: Path, world: World, step: int) -> Callable[[dict], None]:
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


def write_summary(args: argparse.Namespace, world: World, figures: dict) -> dict:
    summary = figures | {"peak_memory_bytes": peak_memory_bytes(world.device), "world": world.world, "torch": torch.__version__,
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
    if not any((path / name).exists() for name in ("config.json", "adapter_config.json")):
        how = "has no finished model" if path.exists() else "does not exist"
        raise FileNotFoundError(f"{path} {how}: run {script}.py first, or name a model with {flag}")
    return path


def command(main: Callable[[], dict]) -> None:
    """A script's entry: bad input ends in one sentence and exit code 2, a broken run in one sentence and 1.
    `python -X dev` shows the traceback instead."""
    name = Path(sys.argv[0]).name
    try:
        main()
        stop()
    except (ValueError, OSError, FloatingPointError) as error:
        if sys.flags.dev_mode:
            raise
        if not failed(error):
            print(f"{name}: {sentence(error)}", file=sys.stderr, flush=True)
        sys.exit(1 if isinstance(error, FloatingPointError) else 2)
    except KeyboardInterrupt as interrupt:
        if os.environ.get("RANK", "0") == "0":
            print(f"\n{name}: interrupted" + (f", {interrupt}" if str(interrupt) else ""), file=sys.stderr)
        sys.exit(130)
