"""data/run.py: flags and their ranges, exit codes, checkpoints that outlive a kill, processes that outlive no other."""

import argparse
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import model
import ppo
import quantize
import rm
import serve
import sft
import zero
from data import run

ROOT = Path(__file__).parents[1]
ENV = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
ALONE = run.World(0, 1, torch.device("cpu"))


def args_of(folder: Path, **more) -> argparse.Namespace:
    flags = dict(save_path=folder, save_interval=500, max_steps=None, dataset=[Path("故事.json")], lr=None, seed=3)
    return argparse.Namespace(**flags | more)


class Weight:
    """Stands for an optimizer: a checkpoint of it is one tensor."""

    def __init__(self, numbers: int = 0, value: float = 0.0):
        self.states = [{"weight": torch.full((numbers,), value)}]

    def state_dict(self) -> dict:
        return self.states[0]

    def load_state_dict(self, states: list[dict]) -> None:
        self.states = states


def save(folder: Path, step: int, numbers: int = 1000) -> None:
    args = args_of(folder, save_interval=1)
    run.save_checkpoint(args, ALONE, {"step": step, "marks": {}}, {"a": Weight(numbers, float(step))})


def load(folder: Path, world: run.World = ALONE, marks: dict = {}, **more) -> tuple[dict, torch.Tensor]:
    weight = Weight()
    meta = run.load_checkpoint(args_of(folder, **{"save_interval": 1} | more), world, marks, {"a": weight})
    return meta, weight.states[0]["weight"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "resume").iterdir())


# ---- flags ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, given, value", [
    (run.whole(1), "1", 1), (run.whole(0, 5), "5", 5), (run.whole(-3), "-3", -3), (run.whole(0), "9" * 9, 999999999),
    (run.number(), "0", 0.0), (run.number(), "2e-5", 2e-5), (run.number(0, 1), "1", 1.0),
    (run.number(0, above=True), "1e-9", 1e-9),
])
def test_numbers_within_their_range(kind, given, value):
    assert kind(given) == value and type(kind(given)) is type(value)


@pytest.mark.parametrize("kind, given, message", [
    (run.whole(1), "0", "must be at least 1, not 0"),
    (run.whole(1, 8), "9", "must be at least 1 and at most 8, not 9"),
    (run.number(), "nan", "must be a finite number, not nan"),
    (run.number(), "inf", "must be a finite number, not inf"),
    (run.number(-1), "-inf", "must be a finite number, not -inf"),
    (run.number(), "-1e-9", "must be at least 0, not -1e-9"),
    (run.number(0, 1), "1.01", "must be at least 0 and at most 1, not 1.01"),
    (run.number(0, above=True), "0", "must be above 0, not 0"),
])
def test_numbers_outside_their_range(kind, given, message):
    with pytest.raises(argparse.ArgumentTypeError, match=f"^{message}$"):
        kind(given)


SCRIPTS = {"model": model, "zero": zero, "sft": sft, "rm": rm, "ppo": ppo, "quantize": quantize, "serve": serve}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_number_has_a_range_where_it_is_declared(script, monkeypatch):
    """GPT2-Chinese#60: a learning rate far above 1 was taken. A bare int or float takes any number, and NaN."""
    flags = []
    monkeypatch.setattr(run.Parser, "print_help", lambda self: flags.extend(self._actions))
    with pytest.raises(SystemExit):
        SCRIPTS[script].main(["--help"])
    assert flags and not [flag.dest for flag in flags if flag.type in (int, float) and not flag.choices]


@pytest.mark.parametrize("script, flags", [
    ("sft", "--warmup 100"), ("sft", "--lr 2"), ("sft", "--lora_dropout 1"), ("sft", "--lora_rank 100000"),
    ("sft", "--weight_decay 1e3"), ("sft", "--accumulation_steps 0"), ("rm", "--beta 0"), ("rm", "--warmup -1"),
    ("ppo", "--lam 95"), ("ppo", "--gamma 2"), ("ppo", "--clip 20"), ("ppo", "--value_clip 40"),
    ("quantize", "--damp 1.5 DIR"), ("quantize", "--bits 3 DIR"), ("quantize", "--max_len 1 DIR"),
    ("serve", "--max_batch 1000000000"), ("serve", "--http_port 65536"), ("serve", "--concurrency 1,100000"),
    ("model", "DIR Hi --temperature -1"), ("model", "DIR Hi --top_p 2"), ("model", "DIR Hi --top_k -1"),
    ("model", "DIR Hi --repetition_penalty 0"), ("model", "DIR Hi --seed 99999999999999999999"),
    ("zero", "--plan 7B --nproc 0"),
])
def test_a_number_that_can_only_be_a_mistake_is_refused(script, flags):
    with pytest.raises(run.WrongFlag, match=r"must be|invalid choice|no list of numbers"):
        SCRIPTS[script].main(flags.split())


def test_errors_of_the_system_are_told_without_their_number(tmp_path):
    with pytest.raises(OSError) as caught:
        (tmp_path / "x").read_text()
    assert run.sentence(caught.value) == f"{tmp_path}/x: no such file or directory"
    assert run.sentence(FileNotFoundError("x is missing")) == "x is missing"
    assert run.sentence(ValueError("x\ny is no number")) == "x y is no number"


@pytest.mark.parametrize("flags, message", [
    ("--warmup 100", "--warmup: must be at least 0 and at most 1, not 100"),
    ("--lr 20", "--lr: must be at least 0 and at most 1"),
    ("--lora_alpha 0", "--lora_alpha: must be above 0"),
    ("--max_steps 0", "--max_steps: must be at least 1"),
    ("--max_steps many", "--max_steps: must be a whole number, not many"),
    ("--weight_decay x", "--weight_decay: must be a finite number, not x"),
    ("--seed 1.5", "--seed: must be a whole number, not 1.5"),
    ("--dtype int8", "--dtype: invalid choice: 'int8'"),
    ("--frobnicate", "unrecognized arguments: --frobnicate"),
])
def test_wrong_flag_is_one_sentence(flags, message):
    with pytest.raises(ValueError, match=f"{message}.*see --help") as caught:
        run.training_parser("A test.").parse_args(flags.split())
    assert "\n" not in str(caught.value)


def test_flags_left_open_are_filled_in_and_told(capsys):
    parser = run.training_parser("A test.")
    parser.add_argument("--dataset", type=Path, nargs="+", help="records")
    usual, demo = {"lr": 2e-5}, {"lr": 1e-3, "dataset": [Path("a/b.json"), Path("c.json")]}
    args = parser.parse_args(["--weight_decay", "0.5"])
    run.resolve(args, demo | {"weight_decay": 0.1})
    assert (args.lr, args.weight_decay, args.dataset) == (1e-3, 0.5, demo["dataset"])
    parser.tell(usual, demo)
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "peak learning rate (2e-05; the demo: 0.001)" in said and "records (the demo: b.json c.json)" in said
    assert "two lines of metrics.jsonl (default: 10)" in said and "None" not in said and "False" not in said


# ---- processes and devices ------------------------------------------------------------------------------------------

def test_naive_with_two_processes_and_missing_devices_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert run.start("auto", "naive")[:3] == (0, 1, torch.device("cpu")) and run.start("cpu", "naive").idle > 0
    with pytest.raises(ValueError, match="--device cuda, but PyTorch finds no GPU on this machine: use --device cpu"):
        run.start("cuda")
    if not torch.backends.mps.is_available():
        with pytest.raises(ValueError, match="no Apple GPU"):
            run.start("mps")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="process 1 of this machine wants GPU 1, but there are 1: start fewer"):
        run.start("cuda")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="naive is for one process and 2 were started"):
        run.start("cpu", "naive")


def test_aliases_of_coati(capsys):
    assert run.ALIASES.keys() < set(run.STRATEGIES) and set(run.ALIASES.values()) < set(run.STRATEGIES)
    note = "note: --strategy colossalai_gemini runs as zero2_cpu\n"
    for name, said in (("colossalai_gemini", note), ("colossalai_zero2", "")):
        assert run.start("cpu", name)[:3] == (0, 1, torch.device("cpu")) and capsys.readouterr().out == said


@pytest.mark.parametrize("device, auto", [("cpu", torch.float32), ("mps", torch.float32), ("cuda", torch.bfloat16)])
def test_dtype_of_a_device(device, auto):
    assert run.choose_dtype("auto", torch.device(device)) == auto
    assert run.choose_dtype("fp16", torch.device(device)) == torch.float16


def test_sums_keep_their_names():
    assert run.reduce_sums({"b": torch.tensor(2.0), "a": torch.tensor(1.0)}) == {"b": 2.0, "a": 1.0}


def end(case: tuple[str, int]) -> None:
    """One process of two, of which some end before the last collective."""
    how, who = case
    world = run.start("cpu")
    run.all_reduce(torch.ones(1))
    if how == "all":
        raise ValueError("the same error everywhere")
    if world.rank == who and how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if world.rank == who and how == "raise":
        raise LookupError("no such thing")
    if world.rank == who and how == "refuse":
        raise ValueError("only here")
    if world.rank != who and how == "stop":
        signal.raise_signal(signal.SIGTERM)
    run.all_reduce(torch.ones(1))


ENDS = [("kill", 0), ("kill", 1), ("raise", 0), ("raise", 1), ("refuse", 0), ("refuse", 1), ("all", 0), ("stop", 0),
        ("go", 0)]


@pytest.fixture(scope="module")
def ends(start) -> dict:
    """For each case, exit code and stderr of both processes."""
    groups = {case: start(2, run.command, end, case) for case in ENDS}
    return {case: [(process.code, process.err) for process in group.wait()] for case, group in groups.items()}


@pytest.mark.parametrize("how, code", [("kill", -9), ("raise", 1), ("refuse", 2)])
@pytest.mark.parametrize("who", [0, 1])
def test_nobody_waits_for_a_dead_process(ends, how, code, who):
    """One that was killed, or that ends by an error that the others do not meet."""
    results = ends[how, who]
    (ended, said), (survivor, sentence) = results[who], results[1 - who]
    assert ended == code and survivor == 1
    lost = "it lost the connection to another one, which has failed"
    assert re.fullmatch(rf"a_test\.py: process {1 - who} stops: {lost} \(.*\)\n", sentence)
    assert {"kill": "", "raise": "LookupError: no such thing", "refuse": "a_test.py: only here\n"}[how] in said


def test_an_error_of_all_processes_is_said(ends):
    """Once, if process 0, which has the store, is not the first to end; under torchrun, below, always once."""
    assert [code for code, _ in ends["all", 0]] == [2, 2]
    assert any("a_test.py: the same error everywhere\n" in said for _, said in ends["all", 0])


def test_sigterm_ends_a_process_with_a_sentence(ends):
    (survivor, _), (ended, said) = ends["stop", 0]
    assert (ended, survivor) == (1, 1)
    assert said == "process 1 stops: SIGTERM, which torchrun sends when another one has failed\n"


def test_processes_that_finish_say_nothing(ends):
    assert ends["go", 0] == [(0, ""), (0, "")]


@pytest.mark.parametrize("how, sentence", [("kill", "process 0 stops: "), ("all", "the same error everywhere")])
def test_torchrun_ends_too(tmp_path, how, sentence):
    """The survivor hears of it from its collective or from torchrun. Its sentence comes before torchrun's report."""
    (tmp_path / "cases.py").write_text(f"from test_run import end, run\nrun.command(end, ({how!r}, 1))")
    result = subprocess.run([*TORCHRUN, "cases.py"], cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and result.stderr.count(sentence) == 1, result.stderr
    assert result.stderr.index(sentence) < result.stderr.index("ChildFailedError")
    assert result.stderr.count(" stops: ") == (how == "kill")


# ---- how a command ends ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("error, code, said", [
    (ValueError("--lr is wrong"), 2, "--lr is wrong"),
    (FileNotFoundError("out/sft does not exist"), 2, "out/sft does not exist"),
    (PermissionError(13, "Permission denied", "out/x"), 2, "out/x: permission denied"),
    (OSError(28, "No space left on device"), 2, "no space left on device"),
    (FloatingPointError("the loss is nan"), 1, "the loss is nan"),
    (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1. This is"), 1,
     r"process 0 stops: it lost the connection to another one, which has failed \(\[gloo.*peer \[127.0.0.1\]:1\)"),
    (dist.DistBackendError("NCCL error"), 1, r"process 0 stops: it lost the connection .*\(NCCL error\)"),
])
def test_exit_codes(monkeypatch, capsys, error, code, said):
    def main(argv):
        assert argv == ["--lr", "1"]
        raise error
    monkeypatch.setattr(sys, "argv", ["/somewhere/sft.py"])
    with pytest.raises(SystemExit) as ended:
        run.command(main, ["--lr", "1"])
    assert ended.value.code == code and re.fullmatch(rf"sft\.py: {said}\n", capsys.readouterr().err)


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), LookupError("a mistake of ours")])
def test_an_error_of_ours_keeps_its_traceback(error):
    def main(argv):
        raise error
    with pytest.raises(type(error), match=str(error)):
        run.command(main)


def test_a_terminal_without_chinese(tmp_path):
    """Under LC_ALL=C a story ended the run after its training: 'ascii' codec can't encode characters."""
    story = "from data import run\nrun.command(lambda argv: print('从前', flush=True))"
    (tmp_path / "story.py").write_text(story, "utf-8")
    env = ENV | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    result = subprocess.run([sys.executable, tmp_path / "story.py"], env=env, capture_output=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"??\n", b"")


@pytest.mark.parametrize("saved, said", [
    (False, "before its first checkpoint: it cannot be resumed (--save_interval 500 updates)"),
    (True, "resume with the same command and --resume"),
])
def test_an_interrupted_run_says_what_is_left_of_it(tmp_path, monkeypatch, capsys, saved, said):
    def main(argv):
        with run.resumable(args_of(tmp_path)):
            (tmp_path / "resume").mkdir()
            if saved:
                save(tmp_path, 1)
            raise KeyboardInterrupt
    with pytest.raises(SystemExit) as ended:
        run.command(main)
    assert ended.value.code == 130 and said in capsys.readouterr().err


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_broken_loss_names_step_rate_and_checkpoint(tmp_path, loss):
    run.stop_if_broken(1.0, 7, 1e-3, args_of(tmp_path))
    message = f"the loss is {loss} at step 7 with learning rate 0.001: .*no checkpoint yet"
    with pytest.raises(FloatingPointError, match=message):
        run.stop_if_broken(loss, 7, 1e-3, args_of(tmp_path))
    save(tmp_path, 6)
    (tmp_path / "resume" / "step-00000007.tmp").mkdir()
    with pytest.raises(FloatingPointError, match=r"step-00000006$"):
        run.stop_if_broken(loss, 7, 1e-3, args_of(tmp_path))


# ---- checkpoints ----------------------------------------------------------------------------------------------------

def be_killed_while_saving(folder: Path) -> None:
    """Saves in a child that is killed before its nth change of the disk, for each n, until one comes to its end."""
    real_save, left = torch.save, 0

    def dying(call: Callable, half: Callable | None = None) -> Callable:  # before call, or half-way through it
        def wrapped(*args, **more):
            nonlocal left
            left -= 1
            if left == 0:
                if half is not None:
                    half(*args)
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **more)
        return wrapped

    def half_saved(state: dict, file: Path) -> None:
        real_save(state, file)
        os.truncate(file, os.path.getsize(file) // 2)

    def half_written(path: Path, content: bytes) -> None:
        path.open("wb").write(content[:len(content) // 2])

    saved = 1
    save(folder, saved, 50_000)
    for moment in range(1, 100):
        step = moment + 1
        if (child := os.fork()) == 0:
            left = moment
            for name in ("mkdir", "rename", "replace", "unlink", "rmdir", "truncate", "chmod"):
                setattr(os, name, dying(getattr(os, name)))
            torch.save = dying(torch.save, half_saved)
            Path.write_bytes = dying(Path.write_bytes, half_written)
            save(folder, step, 50_000)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        meta, weight = load(folder)
        assert meta["step"] in (saved, step) and (weight == meta["step"]).all() and len(weight) == 50_000, meta
        saved = meta["step"]
        assert names(folder) == [f"step-{saved:08d}"], names(folder)
        if code == 0:
            break
        assert code == -9, code
    assert saved == step
    print(moment)


def test_a_kill_at_any_moment_leaves_a_checkpoint(tmp_path, start):
    """SIGKILL before each thing that saving does to the disk, and half-way through the writing of a file."""
    process, = start(1, be_killed_while_saving, tmp_path).wait()
    assert process.code == 0, process.err
    assert int(process.out) > 10  # moments


def test_a_full_disk_is_a_sentence_and_keeps_the_last_checkpoint(tmp_path):
    save(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"rank-0\.pt cannot be written: make room") as caught:
            save(tmp_path, 2, 50_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value) and names(tmp_path) == ["step-00000001"]
    assert load(tmp_path)[0]["step"] == 1


def test_a_full_disk_under_metrics_is_a_sentence(tmp_path):
    log, limits = run.Log(args_of(tmp_path), ALONE, 0, 4), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(OSError, match=r"metrics\.jsonl cannot be written: make room or name another directory \("):
            log.append({"step": 1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_checkpoint_brings_everything_back(tmp_path, capsys):
    torch.manual_seed(5)
    save(tmp_path, 3)
    drawn = torch.rand(4)
    meta, weight = load(tmp_path)
    assert torch.equal(torch.rand(4), drawn) and meta["step"] == 3
    assert torch.equal(weight, torch.full((1000,), 3.0)) and capsys.readouterr().out == ""


@pytest.mark.parametrize("interval, most, steps", [(2, None, [2, 4]), (2, 3, [2, 3, 4]), (0, 3, []), (10, None, [])])
def test_checkpoints_are_those_asked_for(tmp_path, interval, most, steps):
    saved = []
    for step in range(1, 5):
        args = args_of(tmp_path, save_interval=interval, max_steps=most)
        run.save_checkpoint(args, ALONE, {"step": step, "marks": {}}, {"a": Weight(3)})
        saved += [step] if run.checkpoints(tmp_path) == [tmp_path / "resume" / f"step-{step:08d}"] else []
    assert saved == steps


def test_other_processes_and_flags_are_said(tmp_path, capsys):
    """A resumed run with another learning rate has another schedule than its first part."""
    save(tmp_path, 3)
    torch.manual_seed(6)
    drawn = torch.rand(8)
    torch.manual_seed(6)
    load(tmp_path, run.World(0, 2, torch.device("cpu")), lr=1e-4, seed=3)
    assert torch.equal(torch.rand(8), drawn)    # of two processes none goes on with the one's random state
    note = "note: the checkpoint was written with processes=1, lr=None, this run goes on from it with processes=2, lr="
    assert f"{note}0.0001\n" in capsys.readouterr().out


def test_fingerprints_tell_models_data_and_seeds_apart():
    torch.manual_seed(0)
    model, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    marks = run.fingerprint(model, [[1, 2]], 0)
    assert marks == run.fingerprint(model, [[1, 2]], 0)
    others = {"model": (other, [[1, 2]], 0), "dataset": (model, [[1, 3]], 0), "seed": (model, [[1, 2]], 1)}
    for changed, again in others.items():
        found = run.fingerprint(*again)
        assert [key for key in marks if marks[key] != found[key]] == [changed]


def test_what_cannot_be_resumed_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint: run without --resume first"):
        load(tmp_path)
    save(tmp_path, 2)
    with pytest.raises(ValueError, match="step-00000002 is of another model than this run: resume with the flags of"):
        load(tmp_path, marks={"model": "x"})
    (tmp_path / "resume" / "step-00000002" / "rank-0.pt").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="cannot be read: remove it") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("line", [b"{", b"1", b"[]", b"{}", b'{"step": null}', b"\xff", b"\xef\xbb\xbf{}"])
def test_a_damaged_line_of_metrics_is_refused(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl has a line that no run has written: remove it \("):
        run.Log(args_of(tmp_path), ALONE, 1, 4)


# ---- metrics, summary, directories ----------------------------------------------------------------------------------

def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    log = run.Log(args_of(tmp_path), ALONE, 0, 4)
    for step in range(1, 5):
        log.append({"step": step, "loss": 1 / step, "grad_norm": math.inf if step == 2 else 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # the kill fell into the writing of a row
    save(tmp_path, 3)
    run.Log(args_of(tmp_path), ALONE, 3, 4).append({"step": 4, "loss": 0.0})
    refuse = lambda word: pytest.fail(f"{word} is no JSON: a browser cannot read this line")
    lines = (tmp_path / "metrics.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and rows[3]["loss"] == 0 and rows[1]["grad_norm"] is None
    assert names(tmp_path) == ["step-00000003"]
    run.Log(args_of(tmp_path), ALONE, 0, 4)  # a new run
    assert (tmp_path / "metrics.jsonl").read_text() == "" and not (tmp_path / "resume").exists()


def test_summary_holds_figures_and_flags(tmp_path):
    summary = run.write_summary(args_of(tmp_path), ALONE, {"loss": 1.5})
    assert json.loads((tmp_path / "summary.json").read_text("utf-8")) == summary
    assert summary["loss"] == 1.5 and summary["peak_memory_bytes"] > 1e7 and summary["world"] == 1
    rest = {"save_interval": 500, "max_steps": None, "dataset": ["故事.json"], "lr": None, "seed": 3}
    assert summary["flags"] == {"save_path": str(tmp_path)} | rest


def test_one_process_prints_and_writes(tmp_path, capsys):
    second = run.World(1, 2, torch.device("cpu"))
    run.say(second, "hello")
    log = run.Log(args_of(tmp_path), second, 0, 1)
    log.progress(1, "loss", True)
    log.append({"step": 1})
    run.write_summary(args_of(tmp_path), second, {})
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())
    log = run.Log(args_of(tmp_path), ALONE, 0, 2)
    log.progress(1, "loss 1", False)
    log.progress(2, "loss 1", False)
    assert capsys.readouterr().out == "step 2/2 | loss 1 | 0 s left\n"


def test_flags_are_printed_whole(tmp_path, capsys):
    run.say_flags(ALONE, argparse.Namespace(lr=0.1, dataset=[tmp_path / "a.json", Path("b.json")], pretrain=None))
    assert capsys.readouterr().out == f"flags: dataset={tmp_path / 'a.json'} b.json lr=0.1 pretrain=None\n"


def test_finished_names_the_command_that_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist: run sft.py first, or name a model with --pre"):
        run.finished(tmp_path / "nowhere", "sft", "--pretrain")
    with pytest.raises(FileNotFoundError, match="has no finished model: run sft.py first"):
        run.finished(tmp_path, "sft", "--pretrain")
    (tmp_path / "adapter_config.json").touch()
    assert run.finished(tmp_path, "sft", "--pretrain") == tmp_path


def test_save_path_is_checked_before_the_run(tmp_path):
    (tmp_path / "file").write_text("")
    run.check_save_path(tmp_path / "new" / "out", [tmp_path / "new"])
    assert (tmp_path / "new" / "out").is_dir() and not list((tmp_path / "new" / "out").iterdir())
    with pytest.raises(ValueError, match="overwrite its own input"):
        run.check_save_path(tmp_path / "new" / ".." / "file", [tmp_path / "x", tmp_path / "file"])
    with pytest.raises(ValueError, match="--save_path .*cannot be written"):
        run.check_save_path(tmp_path / "file" / "out", [])
