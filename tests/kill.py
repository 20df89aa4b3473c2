"""Kills training at random moments, or fills its disk, resumes it, and compares what it leaves with an unbroken run.

    python tests/kill.py [--seed N] [--moments 20] [--full 8] [--only sft-2-7]

Four runs (sft; rm with an adapter; rm with DPO; ppo), each on one process and on two, each killed (SIGKILL) at
`moments` moments. Of two processes the odd moments kill one alone. A moment is one of three, in turn:

    time      after a share of the unbroken run's time, anywhere from its first line to its last
    before    just before its nth change of the disk (a file opened for writing, renamed, removed, ...), for any n
    after     a moment after its nth change of the disk, as it goes on: mostly in the middle of a file

Then `full` moments at which the disk of a process is full from its nth change on (not a byte more can be written), also
for quantize.py, `lora.py merge`, `model.py convert`, `ppo.py --eval`: one sentence, exit code 2, and no .tmp.

A process to which nothing was done must end by itself, with one sentence. (If the other one is killed before it has
joined, nothing tells it: torchrun does, and so do we, by SIGTERM.) Then the same command with --resume must leave what
the unbroken run left: the same files with the same bytes (weights, tokenizer, checkpoint), and the same figures but for
times. A run that ended before its first checkpoint says so, and is started anew.
"""

import argparse
import io
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import lora  # noqa: E402
import model  # noqa: E402
import ppo  # noqa: E402
import quantize  # noqa: E402
import rm  # noqa: E402
import sft  # noqa: E402
from conftest import FORKS, Ended, Group  # noqa: E402
from data import demo, run, text  # noqa: E402
from model import Llama, LlamaConfig  # noqa: E402

SIZES = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=48, vocab_size=1280, max_seq_len=160)
COMMON = "--pretrain model --batch_size 2 --accumulation_steps 1 --max_steps 6 --save_interval 1 --lr 3e-3"
PPO = ("--pretrain model --rm_path rm --prompt_dataset prompts.json --max_input_len 48 --max_seq_len 56 "
       "--experience_batch_size 2 --train_batch_size 2 --eval_size 2")
RUNS = {
    "sft": (sft, f"{COMMON} --dataset data.json --eval_size 2 --eval_interval 3 --log_interval 1 --max_len 80"),
    "rm": (rm, f"{COMMON} --dataset pref.json --eval_size 2 --max_len 64 --lora_rank 2 --log_interval 1"),
    "dpo": (rm, f"{COMMON} --dataset pref.json --eval_size 2 --max_len 64 --loss_fn dpo --log_interval 1"),
    "ppo": (ppo, f"{PPO} --pretrain_dataset data.json --num_episodes 6 --max_timesteps 1 --update_timesteps 1 "
                 "--max_epochs 1 --lr 1e-3 --critic_lr 1e-3 --target_kl 0 --save_interval 1 --log_interval 1"),
}
SAVES = {   # OUT is the directory to write
    "quantize": (quantize, "model --bits 4 --method rtn --group_size 8 --save_path OUT"),
    "merge": (lora, "merge adapter OUT"),
    "convert": (model, "convert model OUT"),
    "eval": (ppo, f"{PPO} --eval model --save_path OUT --write OUT/best.json"),
}
STRATEGIES = {1: "ddp", 2: "zero2"}
FULL = re.compile(r"a_test\.py: \S+ cannot be written: make room or name another directory \(.+\)\n")
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.chmod"}
SENTENCE = re.compile(r"a_test\.py: process \d stops: it lost the connection to another one, which has failed \(.+\)\n")


def make_inputs() -> None:
    """Writes models and records into the current directory."""
    for name, seed in (("model", 1), ("rm", 2)):
        generator = torch.Generator().manual_seed(seed)
        llama = Llama(LlamaConfig(**SIZES), head=name == "model", generator=generator)
        (llama if name == "model" else rm.RewardModel(llama, generator)).save_pretrained(name)
        text.Tokenizer(demo.FOLDER).save(name, "alpaca")
    llama = Llama.from_pretrained("model")
    lora.attach(llama, 2)
    lora.save_adapter(llama, "adapter", str(Path("model").resolve()))
    found = {"data": demo.instruction_records(5, 26), "pref": demo.preference_records(5, 26),
             "prompts": demo.prompt_records(0)[:8]}
    for name, records in found.items():
        Path(f"{name}.json").write_text(json.dumps(records))


class Stop(NamedTuple):
    """What is done to a process of this rank, before change number `change` of its disk or after so many seconds."""
    kind: str
    rank: int
    change: int
    seconds: float


def work(place: str, name: str, flags: list[str], pipe: Connection, stop: Stop | None) -> None:
    """A process: tells the parent its rank and the number of each change of the disk that it is about to make."""
    os.chdir(place)
    rank, number, full = int(os.environ["RANK"]), 0, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1])

    def changes(event: str, args: tuple) -> None:
        nonlocal number
        if event in CHANGES or event == "open" and type(args[2]) is int and args[2] & (os.O_WRONLY | os.O_RDWR):
            number += 1
            pipe.send((rank, number))
            if stop and (rank, number) == (stop.rank, stop.change):
                if stop.kind == "before":
                    time.sleep(600)
                if stop.kind == "full":
                    resource.setrlimit(resource.RLIMIT_FSIZE, full)

    pipe.send((rank, 0))
    sys.addaudithook(changes)
    with ExitStack() as stack:
        if stop and stop.kind == "full" and stop.rank == rank:
            stack.enter_context(outputs_elsewhere())
        run.command((RUNS | SAVES)[name][0].main, flags)


@contextmanager
def outputs_elsewhere() -> Iterator[None]:
    """Outputs are files, which the full disk is not to have: what was said is written when there is room again."""
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
    try:
        yield
    finally:
        sys.stderr.flush()
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        os.write(2, sys.stderr.buffer.getvalue())


class Run:
    """A run of a stage in processes of its own."""

    def __init__(self, name: str, world: int, out: Path, resume: bool = False, stop: Stop | None = None):
        flags = (RUNS | SAVES)[name][1].replace("OUT", str(out)).split()
        if name in RUNS:
            flags += ["--strategy", STRATEGIES[world], "--save_path", str(out), *["--resume"] * resume]
        self.world, self.seen = world, Counter()
        self.reader, writer = FORKS.Pipe(duplex=False)
        self.group = Group(Path(tempfile.mkdtemp(dir=".")), world, work, os.getcwd(), name, flags, writer, stop)
        writer.close()

    def read(self, until: tuple[int, int] | None, seconds: float) -> None:
        """Reads what the processes tell until it is `until`, or for so many seconds, or until all have ended."""
        end = time.monotonic() + seconds
        while self.reader.poll(max(0, end - time.monotonic())):
            try:
                rank, number = self.reader.recv()
            except EOFError:
                return
            self.seen[rank] = number
            if (rank, number) == until:
                return

    def end(self) -> list[Ended]:
        """How each process ended. One that takes longer than 20 seconds gets a SIGTERM, then a SIGKILL."""
        for process in self.group.processes:
            process.join(20)
            process.terminate()
        return self.group.wait(20)

    def kill(self, ranks: list[int]) -> None:
        for rank in ranks:
            self.group.processes[rank].kill()


def left_by(out: Path) -> dict[str, object]:
    """What a run left that must be the same in every run: file names, and contents without times and flags."""
    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {key: plain(x) for key, x in value.items()
                    if not re.search("seconds|tokens_per_second|peak_memory|^flags$", key)}
        return value
    found = {}
    for file in sorted(path for path in out.rglob("*") if path.is_file()):
        content = file.read_bytes()
        if file.suffix in (".json", ".jsonl"):
            lines = content.decode().splitlines() if file.suffix == ".jsonl" else [content]
            content = [plain(json.loads(line)) for line in lines]
        found[str(file.relative_to(out))] = content
    return found


def stopped(name: str, world: int, out: Path, stop: Stop, ranks: list[int]) -> tuple[Run, list[Ended]]:
    """A run that was stopped, and how its processes ended."""
    shutil.rmtree(out, ignore_errors=True)
    cut = Run(name, world, out, stop=stop)
    if stop.kind != "full":
        cut.read((stop.rank, 0), 60)
        cut.read(*((None, stop.seconds) if stop.kind == "time" else ((stop.rank, stop.change), 60)))
        for rank in ranks:
            cut.group.processes[rank].kill()
    return cut, cut.end()


def try_moment(name: str, world: int, case: str, kind: str, seed: int, whole: dict) -> tuple[str, str]:
    """Stops a run at one moment. Returns how it ended, "resumed", "started anew" or "lost", and a line on it."""
    draw, out, killed = random.Random(f"{seed} {case}"), Path(case), False
    rank = draw.randrange(world)
    ranks = [rank] if kind == "full" or world == 1 or int(case[-1]) % 2 else list(range(world))
    while not killed:       # a run that was over before it could be killed is no trial
        stop = Stop(kind, rank, draw.randint(1, whole["changes"][rank]), draw.uniform(0, whole["seconds"]))
        cut, ends = stopped(name, world, out, stop, ranks)
        killed = kind == "full" or all(ends[rank].code == -9 for rank in ranks)
    line = f"{case} {kind} rank {ranks} {stop.seconds if kind == 'time' else stop.change:.4g}: "
    left = [path.name for path in out.rglob("*.tmp")]
    if kind == "full" and ends[rank].code == 0:     # only removing and renaming were left to do
        return ("lost", line + "ended well, but not whole") if left_by(out) != whole["left"] else ("resumed", line)
    if kind == "full" and (ends[rank].code != 2 or not FULL.fullmatch(ends[rank].err) or left):
        return "lost", f"{line}ended with {ends[rank].code}, left {left}: {ends[rank].err[-600:]!r}"
    for survivor in set(range(world)) - set(ranks):
        code, _, said = ends[survivor]
        joining = code == -signal.SIGTERM and not cut.seen[survivor] and not said
        if not (joining or code == 1 and SENTENCE.fullmatch(said)):
            return "lost", f"{line}process {survivor} ended with {code}: {said!r}"
    kept, how = [path.name for path in run.checkpoints(out)] + left, "resumed"
    ends = Run(name, world, out, resume=True).end() if name in RUNS else []
    if not ends or not run.checkpoints(out) and ends[0].code == 2 and "holds no checkpoint" in str(ends):
        if name in SAVES:
            shutil.rmtree(out, ignore_errors=True)
        ends, how = Run(name, world, out).end(), "started anew"
    line += f"{how} from {' '.join(kept) or 'nothing'}"
    if any(end.code or end.err and name in RUNS for end in ends):
        return "lost", f"{line}, ended with {[(end.code, end.err[-300:]) for end in ends]}"
    now = left_by(out)
    other = sorted(file for file in now.keys() | whole["left"].keys() if now.get(file) != whole["left"].get(file))
    shutil.rmtree(out)
    return ("lost", f"{line}, differs in {other}") if other else (how, line)


def unbroken(name: str, world: int) -> dict:
    """Runs a stage to its end. Returns what it left, how long it took, and each process's changes of the disk."""
    out = Path(f"{name}-{world}")
    whole = Run(name, world, out)
    whole.read((0, 0), 60)
    began = time.monotonic()
    whole.read(None, 60)
    seconds = time.monotonic() - began
    ends = whole.end()
    assert not any(end.code or end.err and name in RUNS for end in ends), ends
    return {"left": left_by(out), "seconds": seconds, "changes": whole.seen}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of the moments (drawn)")
    parser.add_argument("--moments", type=int, default=20, help="kills of each run on each number of processes")
    parser.add_argument("--full", type=int, default=8, help="full disks of each run and save")
    parser.add_argument("--only", default="", help="the cases whose names begin so: sft, ppo-2, dpo-1-13, merge-1-full")
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"   # for the processes
    moments = [(f"-{number}", ("time", "before", "after")[number % 3]) for number in range(args.moments)]
    full = [(f"-full-{number}", "full") for number in range(args.full)]
    table, began = {}, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        make_inputs()
        for name, world in [*itertools.product(RUNS, (1, 2)), *itertools.product(SAVES, (1,))]:
            prefix, whole = f"{name}-{world}", None
            for suffix, kind in [*moments * (name in RUNS), *full]:
                if f"{prefix}{suffix}".startswith(args.only):
                    whole = whole or unbroken(name, world)
                    end, line = try_moment(name, world, f"{prefix}{suffix}", kind, args.seed, whole)
                    table.setdefault((prefix, "full disk" if kind == "full" else "killed"), Counter())[end] += 1
                    print(f"{line}{' LOST' * (end == 'lost')}", flush=True)
        os.chdir(ROOT)
    print(f"\nseed {args.seed}, {time.monotonic() - began:.0f} s\n{'run':<20}    tried  resumed  started anew  lost")
    for (prefix, what), ends in table.items():
        print(f"{prefix:<10} {what:<9}{ends.total():>9}{ends['resumed']:>9}{ends['started anew']:>14}{ends['lost']:>6}")
    return int(any(ends["lost"] for ends in table.values()))


if __name__ == "__main__":
    sys.exit(main())
