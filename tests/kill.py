"""Kills training at random moments, resumes it, and compares what it leaves with what an unbroken run leaves.

    python tests/kill.py [--seed 0] [--moments 20] [--only sft-2-7]

Four runs (sft; rm with an adapter; ppo; rm with DPO), each on one process and on two, each killed (SIGKILL) at
`moments` moments. Of two processes the odd moments kill one alone. It is for by-hand use and not collected by pytest.

A moment is one of three, in turn:
    a share of the unbroken run's time, anywhere from its first line to its last
    just before its nth change of the disk (a file opened for writing, renamed, removed, ...), for any n
    a moment after its nth change of the disk, as it goes on: mostly in the middle of a file

A process that was not killed must end by itself, with one sentence. (If the other one is killed before it has joined,
nothing tells it: torchrun does, and so do we, by SIGTERM.) Then the same command with --resume must leave what
the unbroken run left: the same files with the same bytes (weights, tokenizer, checkpoint), and the same figures but for
times. A run that was killed before its first checkpoint says so, and is started anew.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"   # for the processes

import torch  # noqa: E402

import ppo  # noqa: E402
import rm  # noqa: E402
import sft  # noqa: E402
from conftest import FORKS, Ended, Group  # noqa: E402
from data import demo, run, text  # noqa: E402
from model import Llama, LlamaConfig  # noqa: E402

SIZES = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=48, vocab_size=1280, max_seq_len=160)
COMMON = "--pretrain model --batch_size 2 --accumulation_steps 1 --max_steps 6 --save_interval 1 --lr 3e-3"
RUNS = {
    "sft": (sft, f"{COMMON} --dataset data.json --eval_size 2 --eval_interval 3 --log_interval 1 --max_len 80"),
    "rm": (rm, f"{COMMON} --dataset pref.json --eval_size 2 --max_len 64 --lora_rank 2 --log_interval 1"),
    "dpo": (rm, f"{COMMON} --dataset pref.json --eval_size 2 --max_len 64 --loss_fn dpo --log_interval 1"),
    "ppo": (ppo, "--pretrain model --rm_path rm --prompt_dataset prompts.json --pretrain_dataset data.json "
                 "--max_input_len 48 --max_seq_len 56 --num_episodes 6 --max_timesteps 1 --update_timesteps 1 "
                 "--max_epochs 1 --experience_batch_size 2 --train_batch_size 2 --lr 1e-3 --critic_lr 1e-3 "
                 "--eval_size 2 --target_kl 0 --save_interval 1 --log_interval 1"),
}
STRATEGIES = {1: "ddp", 2: "zero2"}
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.chmod"}
SENTENCE = re.compile(r"a_test\.py: process \d stops: it lost the connection to another one, which has failed \(.+\)\n")


def make_inputs() -> None:
    """Writes models and records into the current directory."""
    for name, seed in (("model", 1), ("rm", 2)):
        generator = torch.Generator().manual_seed(seed)
        model = Llama(LlamaConfig(**SIZES), head=name == "model", generator=generator)
        (model if name == "model" else rm.RewardModel(model, generator)).save_pretrained(name)
        text.Tokenizer(demo.FOLDER).save(name, "alpaca")
    found = {"data": demo.instruction_records(5, 26), "pref": demo.preference_records(5, 26),
             "prompts": demo.prompt_records(0)[:8]}
    for name, records in found.items():
        Path(f"{name}.json").write_text(json.dumps(records))


def work(place: str, name: str, flags: list[str], pipe: Connection, hold: tuple[int, int] | None) -> None:
    """A process: tells the parent its rank and the number of each change of the disk that it is about to make.

    hold: the rank that waits to be killed before that change."""
    os.chdir(place)
    rank, number = int(os.environ["RANK"]), 0

    def changes(event: str, args: tuple) -> None:
        nonlocal number
        if event in CHANGES or event == "open" and type(args[2]) is int and args[2] & (os.O_WRONLY | os.O_RDWR):
            number += 1
            pipe.send((rank, number))
            if hold == (rank, number):
                time.sleep(600)

    pipe.send((rank, 0))
    sys.addaudithook(changes)
    run.command(RUNS[name][0].main, flags)


class Run:
    """A run of a stage in processes of its own."""

    def __init__(self, name: str, world: int, out: str, resume: bool = False, hold: tuple[int, int] | None = None):
        flags = [*RUNS[name][1].split(), "--strategy", STRATEGIES[world], "--save_path", out, *["--resume"] * resume]
        self.world, self.seen = world, Counter()
        self.reader, writer = FORKS.Pipe(duplex=False)
        self.group = Group(Path(tempfile.mkdtemp(dir=".")), world, work, os.getcwd(), name, flags, writer, hold)
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
                    if not key.startswith(("seconds", "tokens_per_second", "peak_memory", "flags"))}
        return value
    found = {}
    for file in sorted(path for path in out.rglob("*") if path.is_file()):
        content = file.read_bytes()
        if file.suffix in (".json", ".jsonl"):
            lines = content.decode().splitlines() if file.suffix == ".jsonl" else [content]
            content = [plain(json.loads(line)) for line in lines]
        found[str(file.relative_to(out))] = content
    return found


def try_moment(name: str, world: int, number: int, seed: int, whole: dict) -> tuple[str, str]:
    """Kills a run at one moment. Returns how it ended, "resumed", "started anew" or "lost", and a line on it."""
    draw, out = random.Random(f"{seed} {name} {world} {number}"), Path(f"{name}-{world}-{number}")
    rank = draw.randrange(world)
    ranks = [rank] if world == 1 or number % 2 else list(range(world))
    kind, killed = ("time", "before", "after")[number % 3], False
    while not killed:       # a run that was over before it could be killed is no trial
        shutil.rmtree(out, ignore_errors=True)
        seconds, change = draw.uniform(0, whole["seconds"]), draw.randint(1, whole["changes"][rank])
        cut = Run(name, world, str(out), hold=(rank, change) if kind == "before" else None)
        cut.read((rank, 0), 60)
        cut.read(*((None, seconds) if kind == "time" else ((rank, change), 60)))
        cut.kill(ranks)
        ends = cut.end()
        killed = all(ends[rank].code == -9 for rank in ranks)
    moment = f"at {seconds:.2f} s" if kind == "time" else f"{kind} change {change}"
    line = f"{out} {kind} rank {ranks} {moment}: "
    for survivor in set(range(world)) - set(ranks):
        code, _, said = ends[survivor]
        joining = code == -signal.SIGTERM and not cut.seen[survivor] and not said
        if not (joining or code == 1 and SENTENCE.fullmatch(said)):
            return "lost", f"{line}process {survivor} ended with {code}: {said!r}"
    kept = [path.name for path in run.checkpoints(out)] + [path.name for path in out.rglob("*.tmp")]
    ends, how = Run(name, world, str(out), resume=True).end(), "resumed"
    if not run.checkpoints(out) and all(end.code == 2 for end in ends) and "holds no checkpoint" in str(ends):
        ends, how = Run(name, world, str(out)).end(), "started anew"
    line += f"{how} from {' '.join(kept) or 'nothing'}"
    if any(end.code or end.err for end in ends):
        return "lost", f"{line}, ended with {[(end.code, end.err[-300:]) for end in ends]}"
    now = left_by(out)
    other = sorted(file for file in now.keys() | whole["left"].keys() if now.get(file) != whole["left"].get(file))
    shutil.rmtree(out)
    return ("lost", f"{line}, differs in {other}") if other else (how, line)


def unbroken(name: str, world: int) -> dict:
    """Runs a stage to its end. Returns what it left, how long it took, and each process's changes of the disk."""
    out, whole = f"{name}-{world}", Run(name, world, f"{name}-{world}")
    whole.read((0, 0), 60)
    began = time.monotonic()
    whole.read(None, 60)
    seconds = time.monotonic() - began
    ends = whole.end()
    assert not any(end.code or end.err for end in ends), ends
    return {"left": left_by(Path(out)), "seconds": seconds, "changes": whole.seen}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of the moments (drawn)")
    parser.add_argument("--moments", type=int, default=20, help="kills of each run on each number of processes")
    parser.add_argument("--only", default="", help="the cases whose names begin so: sft, ppo-2, dpo-1-13")
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    table, began = {}, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        make_inputs()
        for name, world in [(name, world) for name in RUNS for world in STRATEGIES]:
            case, table[name, world] = f"{name}-{world}", Counter()
            if not f"{case}-".startswith(args.only) and not args.only.startswith(case):
                continue
            whole = unbroken(name, world)
            print(f"{case}: {whole['seconds']:.2f} s, changes of the disk {dict(whole['changes'])}", flush=True)
            for number in range(args.moments):
                if f"{case}-{number}".startswith(args.only):
                    end, line = try_moment(name, world, number, args.seed, whole)
                    table[name, world][end] += 1
                    print(f"{line}{' LOST' * (end == 'lost')}", flush=True)
        os.chdir(ROOT)
    print(f"\nseed {args.seed}, {time.monotonic() - began:.0f} s\nrun  processes  tried  resumed  started anew  lost")
    for (name, world), ends in table.items():
        print(f"{name:<4}{world:>10}{ends.total():>7}{ends['resumed']:>9}{ends['started anew']:>14}{ends['lost']:>6}")
    return int(any(ends["lost"] for ends in table.values()))


if __name__ == "__main__":
    sys.exit(main())
