"""On a GPU: it computes what the CPU computes, within stated bounds; copies overlap; the memory plan holds.

    pytest tests/test_gpu.py -s                              skipped without CUDA; every test prints its figures
    OCTET_TEST_DEVICE=cpu pytest tests/test_gpu.py -s        the same lines on the CPU, without what CUDA alone has

Nothing here turns TF32 on, and PyTorch's default is off: fp32 means fp32, and its bounds would not hold with TF32.
"""

import copy
import gc
import http.client
import json
import math
import os
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from statistics import fmean

import pytest
import torch
from torch import Tensor, nn

import lora
import ppo
import quantize
import rm
import serve
import sft
import zero
from data import demo, run, text, weights
from model import SHAPES, Llama, LlamaConfig, random_model

NAME = os.environ.get("OCTET_TEST_DEVICE", "cuda")
CUDA = NAME == "cuda"
DEVICE = torch.device("cuda:0" if CUDA else NAME)
CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(CUDA and not torch.cuda.is_available(), reason="PyTorch finds no GPU with CUDA")
cuda_alone = pytest.mark.skipif(not CUDA, reason="streams, pinned memory and kernels that CUDA alone has")

SIZES = dict(dim=128, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=32, ffn_dim=352, vocab_size=1280, max_seq_len=256)
TOKENIZER = text.Tokenizer(demo.FOLDER)
TEMPLATE = text.TEMPLATES["alpaca"]


@pytest.fixture(autouse=True)
def figures(request):
    """Prints how long a test took, and gives its memory back."""
    began = time.perf_counter()
    yield
    synchronize()
    seconds = time.perf_counter() - began
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
    print(f"\n  [{seconds:.1f} s] {request.node.name}")


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(**sizes) -> Llama:
    return Llama(LlamaConfig(**SIZES | sizes), generator=drawn(0)).eval()


def tiny(**sizes) -> Llama:
    """Random, with logits far enough apart for argmax to be the same by every way."""
    model = random(**sizes)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2.0 if p.dim() == 2 else 1.2)
    return model


def cast(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A copy there. Parameters alone are cast: the rotary tables stay fp32, as in every opened model."""
    model = copy.deepcopy(model).to(device)
    for p in model.parameters():
        p.data = p.data.to(dtype)
    if dtype == torch.float64:
        model.double()
    return model


def distance(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|."""
    a, b = a.double().cpu(), b.double().cpu()
    return ((a - b).norm() / b.norm()).item()


def some_tokens(rows: int, length: int, vocab: int = 1280, seed: int = 0) -> Tensor:
    return torch.randint(3, vocab, (rows, length), generator=drawn(seed))


# ---- one forward, one backward --------------------------------------------------------------------------------------

# Of the norm of what fp64 gives on the CPU. The CPU itself is 9e-7, 1.3e-2 and 1.7e-3 from it.
BOUNDS = {"fp32": 3e-6, "bf16": 3e-2, "fp16": 4e-3}


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("n_kv_heads", [2, 4])
@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_logits_are_the_cpus(dtype, n_kv_heads, padding):
    model, tokens = random(n_kv_heads=n_kv_heads), some_tokens(4, 70)
    real = torch.arange(70) < torch.tensor([70, 3, 41, 64])[:, None]
    mask = {"none": None, "right": real, "left": real.flip(1)}[padding]
    shown = real | True if mask is None else mask
    found = []
    for device, precision in ((CPU, torch.float64), (CPU, weights.DTYPES[dtype]), (DEVICE, weights.DTYPES[dtype])):
        with torch.no_grad():
            logits = cast(model, device, precision)(tokens.to(device), None if mask is None else mask.to(device))
        found.append(logits.cpu()[shown])
    right, cpu, gpu = found
    print(f"\n  logits from fp64's: CPU {distance(cpu, right):.1e}, {NAME} {distance(gpu, right):.1e}")
    assert distance(gpu, right) < BOUNDS[dtype]


GRADIENTS = {"fp32": 1e-5, "bf16": 5e-2, "fp16": 1e-2}      # of the norm; the CPU in the same dtype is as far


@pytest.mark.parametrize("dtype", GRADIENTS)
@pytest.mark.parametrize("rank", [0, 8])
def test_loss_and_gradients_are_the_cpus(dtype, rank):
    """Against fp32 on the CPU. The head's gradient comes from sft.HeadLoss, in chunks: there are more than 512 rows."""
    model, tokens = random(), some_tokens(8, 90)
    if rank:
        lora.attach(model, rank, generator=drawn(1))
        for layer in lora.adapters(model).values():
            layer.lora_B.data.normal_(std=0.02, generator=drawn(2))
    target = torch.ones_like(tokens, dtype=torch.bool)
    target[:, :5] = False
    n = target.sum().item()
    found = []
    for device, precision in ((CPU, torch.float32), (CPU, weights.DTYPES[dtype]), (DEVICE, weights.DTYPES[dtype])):
        there = cast(model, device, precision).train()
        loss = sft.lm_loss(there, tokens, target) / n
        loss.backward()
        gradient = torch.cat([p.grad.float().cpu().flatten() for p in there.parameters() if p.grad is not None])
        found.append((loss.item(), gradient))
    (right, exact), (cpu, by_cpu), (gpu, by_gpu) = found
    print(f"\n  loss {right:.6f}, from it: CPU {cpu - right:+.1e}, {NAME} {gpu - right:+.1e} | gradients: CPU "
          f"{distance(by_cpu, exact):.1e}, {NAME} {distance(by_gpu, exact):.1e}")
    assert abs(gpu - right) < BOUNDS[dtype] * right
    assert distance(by_gpu, exact) < GRADIENTS[dtype]


def test_reward_scores_are_the_cpus():
    model = rm.RewardModel(Llama(LlamaConfig(**SIZES), head=False, generator=drawn(2)), drawn(2)).eval()
    rows = [some_tokens(1, n)[0].tolist() for n in (5, 70, 31)]
    with torch.no_grad():
        right, found = rm.score_rows(model, rows), rm.score_rows(cast(model, DEVICE, torch.float32), rows)
    print(f"\n  scores {right.tolist()}, on {NAME} {found.tolist()}")
    assert torch.allclose(found.cpu(), right, atol=1e-5)


# ---- training -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A folder with a model, a reward model rm/, and records for each stage."""
    folder = tmp_path_factory.mktemp("base")
    Llama(LlamaConfig(**SIZES), generator=drawn(1)).save_pretrained(folder / "model")
    rm.RewardModel(Llama(LlamaConfig(**SIZES), head=False, generator=drawn(2)), drawn(2)).save_pretrained(folder / "rm")
    for name in ("model", "rm"):
        TOKENIZER.save(folder / name, "alpaca")
    for name, found in (("sft", demo.instruction_records(5, 180)), ("prompts", demo.prompt_records(0)[:64]),
                        ("rankings", demo.preference_records(1, 96, noise=0.0))):
        (folder / f"{name}.json").write_text(json.dumps(found), encoding="utf-8")
    return folder


STEPS = 20
# stage: script, what falls, and flags
LOOP = ["--batch_size", 4, "--accumulation_steps", 2, "--max_epochs", 4, "--eval_size", 8]
STAGES = {
    "sft": (sft, "loss", ["--dataset", "sft.json", "--lr", 3e-3, *LOOP]),
    "rm": (rm, "loss", ["--dataset", "rankings.json", "--lr", 2e-3, *LOOP]),
    "dpo": (rm, "loss", ["--dataset", "rankings.json", "--loss_fn", "dpo", "--lr", 1e-3, *LOOP]),
    "ppo": (ppo, "loss/value_avg", [
        "--rm_path", "rm", "--prompt_dataset", "prompts.json", "--pretrain_dataset", "sft.json", "--max_input_len", 56,
        "--max_seq_len", 72, "--num_episodes", 20, "--max_timesteps", 1, "--update_timesteps", 1, "--max_epochs", 2,
        "--experience_batch_size", 8, "--train_batch_size", 4, "--eval_size", 8, "--target_kl", 0, "--lr", 1e-4,
        "--critic_lr", 3e-3, "--ptx_coef", 0.1]),
}


def train(stage: str, device: str, dtype: str, strategy: str, rank: int, base: Path, out: Path) -> list[dict]:
    """Runs a script for STEPS steps. Returns the rows of its metrics.jsonl, and prints its summary."""
    script, _, flags = STAGES[stage]
    given = [base / str(flag) if (base / str(flag)).exists() else flag for flag in flags]
    given += ["--pretrain", base / "model", "--save_path", out, "--device", device, "--dtype", dtype, "--strategy",
              strategy, "--lora_rank", rank, "--max_steps", STEPS, "--log_interval", 1, "--save_interval", 0]
    began = time.perf_counter()
    script.main([str(flag) for flag in given])
    seconds = time.perf_counter() - began
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == STEPS
    print(f"\n  {stage} on {device}, {dtype}, {strategy}, rank {rank}: {seconds:.1f} s")
    return rows


@pytest.fixture(scope="module")
def cpu_run(base, tmp_path_factory):
    """The rows of a run on the CPU, made once."""
    return cache(lambda stage, rank: train(stage, "cpu", "fp32", "naive", rank, base, tmp_path_factory.mktemp("cpu")))


RUNS = [(dtype, strategy, rank) for dtype in ("fp32", "bf16") for strategy in ("naive", "zero2_cpu") for rank in (0, 8)]


@pytest.mark.parametrize("dtype, strategy, rank", [*RUNS, ("fp16", "naive", 0), ("fp16", "zero2_cpu", 8)])
@pytest.mark.parametrize("stage", STAGES)
def test_twenty_steps(stage, dtype, strategy, rank, base, tmp_path, cpu_run):
    """All figures are finite, the loss falls, and where nothing is sampled it is the CPU's: in fp32 within 2e-3 at each
    of the steps, as rounding grows from step to step; in 16 bits within 0.06, their rounding."""
    rows = train(stage, NAME, dtype, strategy, rank, base, tmp_path)
    what = STAGES[stage][1]
    losses = [row[what] for row in rows]
    wrong = {key: x for row in rows for key, x in row.items() if isinstance(x, float) and not math.isfinite(x)}
    broken = [key for row in rows for key, x in row.items() if x is None and key != "grad_norm"]
    print(f"  {what}:", " ".join(f"{x:.4f}" for x in losses), "| skipped", rows[-1]["skipped"])
    if "seconds/copies" in rows[-1]:
        print("  ms of norm, update, gather:", *(f"{1e3 * row['seconds/optimizer']:.1f}" for row in rows[-3:]),
              "| of waiting for copies:", *(f"{1e3 * row['seconds/copies']:.1f}" for row in rows[-3:]))
    assert not wrong and not broken
    assert fmean(losses[-5:]) < fmean(losses[:5])
    if stage != "ppo":
        right = [row["loss"] for row in cpu_run(stage, rank)]
        worst = max(abs(x - y) / abs(y) for x, y in zip(losses, right))
        print(f"  from the CPU's in fp32: step 1 {abs(losses[0] / right[0] - 1):.1e}, at most {worst:.1e}")
        assert worst < (2e-3 if dtype == "fp32" else 0.06)


def test_rules_judge_groups(base, tmp_path):
    """GRPO with the demo's gold score and a second rule, which a child process computes."""
    (tmp_path / "rule.py").write_text("def length(prompt, answer, record):\n    return len(answer)\n")
    summary = ppo.main([str(flag) for flag in [
        "--algorithm", "grpo", "--reward_fn", f"{demo.__file__}:reward", tmp_path / "rule.py:length=0.01",
        "--pretrain", base / "model",
        "--prompt_dataset", base / "prompts.json", "--save_path", tmp_path / "out", "--group_size", 4,
        "--max_input_len", 56, "--max_seq_len", 80, "--experience_batch_size", 16, "--train_batch_size", 8,
        "--num_episodes", 3,
        "--max_timesteps", 1, "--update_timesteps", 1, "--eval_size", 4, "--device", NAME, "--lr", 1e-4,
        "--log_interval", 1, "--save_interval", 0]])
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text("utf-8").splitlines()]
    for row in rows:
        print("  ", {key: round(x, 4) for key, x in row.items()})
    assert len(rows) == 3 and math.isfinite(summary["reward_after"]) and rows[0]["alike_groups"] == 0
    assert all(math.isfinite(x) for row in rows for x in row.values() if x is not None)


PROMPTS = [[1, 40, 41, 42, 43], [1, 50, 51], [1, 60], [1, 70, 71, 72]]
ANSWERS = [[80, 81, 82, 2], [90, 2], [100, 101, 102, 103, 104, 105], [2]]


@pytest.mark.parametrize("rank", [0, 8])
def test_scoring_and_update_of_given_answers_are_the_cpus(rank, base, tmp_path):
    """A rollout is sampled with the device's own generator. What follows it is the same, in fp32."""
    found = []
    for device in (CPU, DEVICE):
        args = ppo.parse([str(flag) for flag in ["--pretrain", base / "model", "--rm_path", base / "rm", "--lora_rank",
                                                 rank, "--prompt_dataset", base / "prompts.json", "--save_path",
                                                 tmp_path]])
        run.resolve(args, ppo.FINETUNE | {"template": "alpaca"})
        args.ptx_coef = 0.0
        args.train_batch_size = 2
        stage = sft.Stage(args, run.World(0, 1, device), torch.float32, TOKENIZER, TEMPLATE, [2], False)
        models = ppo.open_models(stage)
        tokens, _ = text.pad([prompt + answer for prompt, answer in zip(PROMPTS, ANSWERS)])
        _, mask = text.pad(ANSWERS)
        ended = torch.tensor([answer[-1] == 2 for answer in ANSWERS])
        answers = (tokens, torch.tensor(list(map(len, PROMPTS))), mask, ended)
        e = ppo.Experience(*(x.to(device) for x in answers))
        e = ppo.advantages(ppo.scoring(models, e, args), args)
        optimizers = {name: zero.ZeRO2(getattr(models, name).named_parameters(), eps=1e-3)
                      for name in ("actor", "critic")}
        with synchronizing(f"update with rank {rank}"):
            row = ppo.update(models, optimizers, e, iter([]), 1.0, 1, stage)
        found.append((e, row))
    (right, by_cpu), (here, by_gpu) = found
    print("\n  CPU", by_cpu, "\n ", NAME, by_gpu)
    for name in ("logp", "ref_logp", "value", "score", "reward", "adv", "ret"):
        assert torch.allclose(getattr(here, name).cpu(), getattr(right, name), atol=2e-5), name
    for name, x in by_cpu.items():
        assert by_gpu[name] == pytest.approx(x, rel=1e-3, abs=2e-5), name


# ---- what a GPU waits for -------------------------------------------------------------------------------------------

@contextmanager
def synchronizing(what: str) -> Iterator[Counter]:
    """Counts the lines at which the host waits for the GPU, prints them, and puts them into the Counter at the end."""
    places = Counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if CUDA:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            if CUDA:
                torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if "synchronizing CUDA" in str(warning.message):
            places[f"{Path(warning.filename).name}:{warning.lineno}"] += 1
    print(f"\n  {what}: {places.total()} waits", dict(places))


@cuda_alone
@pytest.mark.parametrize("strategy, waits", [("naive", 1), ("zero2_cpu", 0)])
def test_an_update_waits_once(strategy, waits):
    """For the norm of the gradient, as zero.py says. With offload the norm is known to the CPU, which waits for the
    events of copies alone."""
    model = tiny().to(DEVICE)
    optimizer = zero.ZeRO2(model.named_parameters(), torch.bfloat16, strategy=strategy)
    tokens = some_tokens(4, 64)
    target = torch.ones_like(tokens, dtype=torch.bool)
    target[:, 0] = False
    for i in range(3):
        with synchronizing(f"{strategy}, update {i}") as places:
            optimizer.backward(sft.lm_loss(model, tokens, target) / 252)
            optimizer.step(1e-4)
    assert places.total() == waits


@cuda_alone
@pytest.mark.parametrize("lengths", [(9, 9, 9), (9, 4, 17)])
def test_a_decoding_step_waits_once(lengths):
    """For the ids, as model.py says."""
    prompts = [some_tokens(1, n)[0].tolist() for n in lengths]
    steps = tiny().to(DEVICE).generate_steps(prompts, 12, temperature=0.7, eos_id=-1,
                                             generator=torch.Generator(DEVICE).manual_seed(0))
    for _ in range(3):
        next(steps)
    with synchronizing(f"a decoding step of prompts of {lengths}") as places:
        next(steps)
    assert places.total() == 1


# ---- offload --------------------------------------------------------------------------------------------------------

Span = tuple[float, float]      # begin and end in microseconds


def shared(some: list[Span], others: list[Span]) -> float:
    """The time in which one of each goes on, where the spans of a list do not overlap."""
    return sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in some for b in others)


def joined(spans: list[Span]) -> list[Span]:
    """The same time, as spans that do not overlap."""
    found = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((begin, end))
    return found


def draw(lanes: dict[str, list[Span]], columns: int = 100) -> None:
    """Prints a line for each lane, a mark where a span goes on."""
    spans = [span for lane in lanes.values() for span in lane]
    first, last = min(a for a, _ in spans), max(b for _, b in spans)
    width = (last - first) / columns
    for name, lane in lanes.items():
        busy = [shared(lane, [(first + i * width, first + (i + 1) * width)]) for i in range(columns)]
        marks = "".join("#" if x > 0.5 * width else "+" if x > 0 else "." for x in busy)
        print(f"  {name:<22}|{marks}| {sum(b - a for a, b in lane) / 1e3:8.2f} ms")
    print(f"  {'':<22} {(last - first) / 1e3:.2f} ms in all; # busy, + partly")


@cuda_alone
def test_offload_overlaps(tmp_path):
    """Gradients leave while backward goes on, weights come back while AdamW goes on, all through pinned memory."""
    torch.set_num_threads(min(8, os.cpu_count()))
    model = random_model(SHAPES["mid"], torch.bfloat16, DEVICE).train()
    optimizer = zero.ZeRO2(model.named_parameters(), torch.bfloat16, strategy="zero2_cpu")
    assert all(buffer.is_pinned() for buffer in optimizer.copies.buffers)
    assert all(bucket.m.device == CPU and bucket.flat.is_cuda for bucket in optimizer.buckets)
    tokens = some_tokens(8, 512, 32000)
    target = torch.ones_like(tokens, dtype=torch.bool)
    target[:, 0] = False

    def step() -> None:
        began = time.perf_counter()
        optimizer.backward(sft.lm_loss(model, tokens, target) / tokens.numel())
        stats = optimizer.step(1e-4)
        synchronize()
        print(f"\n  a step of mid, 4096 tokens: {1e3 * (time.perf_counter() - began):.0f} ms, of them "
              f"{1e3 * stats.seconds:.0f} of norm and update, {1e3 * stats.copying:.0f} of waiting for copies")
    for _ in range(3):
        step()
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as profile:
        step()
    torch.set_num_threads(1)
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text("utf-8"))["traceEvents"]
    events = [event for event in events if event.get("ph") == "X"]
    span = lambda event: (float(event["ts"]), float(event["ts"]) + float(event["dur"]))
    copies = [event for event in events if event.get("cat") == "gpu_memcpy" and event["args"].get("bytes", 0) > 2**16]
    print("  large copies:", dict(Counter(f"{event['name']}, stream {event['args']['stream']}" for event in copies)))
    lanes = {
        "GPU computes": joined([span(event) for event in events if event.get("cat") == "kernel"]),
        "gradients to the CPU": joined([span(event) for event in copies if "DtoH" in event["name"]]),
        "AdamW on the CPU": joined([span(event) for event in events if event["name"] == "aten::_fused_adamw_"]),
        "weights to the GPU": joined([span(event) for event in copies if "HtoD" in event["name"]]),
    }
    draw(lanes)
    computing, gradients, adamw, new_weights = lanes.values()
    for name, copied, beside in (("gradients, beside backward", gradients, computing),
                                 ("weights, beside AdamW", new_weights, adamw)):
        lasts = sum(b - a for a, b in copied)
        print(f"  {name}: {100 * shared(copied, beside) / lasts:.0f} % of {lasts / 1e3:.2f} ms of copying")
        assert shared(copied, beside) > 0
    offloaded = [event for event in copies if "Pageable" not in event["name"]]
    assert len(offloaded) >= 2 * len(optimizer.buckets) - 4     # of a bucket of norms, a few kilobytes


# ---- memory ---------------------------------------------------------------------------------------------------------

@cuda_alone
@pytest.mark.parametrize("shape, strategy, rank, bound", [
    ("mid", "naive", 0, 0.15), ("mid", "zero2_cpu", 0, 0.15),
    ("mid", "naive", 16, 0.15), ("mid", "zero2_cpu", 16, 0.15),
    ("big", "naive", 0, math.inf), ("big", "zero2_cpu", 16, math.inf)])
def test_plan_is_what_is_measured(shape, strategy, rank, bound):
    """Above what an update of a small model leaves in use: that of cuBLAS, in forward's thread and in backward's."""
    def update(config: LlamaConfig, batch: int, length: int) -> None:
        model = random_model(config, torch.bfloat16, DEVICE).train()        # as opened from a file of bf16
        if rank:
            lora.attach(model, rank)
        optimizer = zero.ZeRO2(model.named_parameters(), torch.bfloat16, strategy=strategy)
        tokens = some_tokens(batch, length, config.vocab_size)
        target = torch.ones_like(tokens, dtype=torch.bool)
        target[:, 0] = False
        for _ in range(2):
            optimizer.backward(sft.lm_loss(model, tokens, target) / target.sum())
            optimizer.step(1e-4)
        synchronize()
    bare = torch.cuda.memory_allocated()
    update(SHAPES["tiny"], 2, 32)
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    idle, batch, length = run.peak_memory_bytes(DEVICE), 4, 512
    update(SHAPES[shape], batch, length)
    measured = run.peak_memory_bytes(DEVICE) - idle
    rows = zero.plan(zero.size_of(SHAPES[shape], rank), strategy, 1, batch * length)
    planned = rows["device: peak at once"]
    print(f"\n  {shape}, {strategy}, rank {rank}: measured {measured / 1e6:.0f} MB, planned {planned / 1e6:.0f} MB "
          f"({100 * (planned / measured - 1):+.1f} %); in use before {bare / 1e6:.0f}, after tiny {idle / 1e6:.0f} MB")
    print("  planned:", ", ".join(f"{row} {n / 1e6:.0f}" for row, n in rows.items() if n > 1e6))
    assert planned == pytest.approx(measured, rel=bound)


# ---- generation -----------------------------------------------------------------------------------------------------

def closest(model: Llama, prompt: list[int], answer: list[int]) -> float:
    """The smallest distance of the two largest logits on the way of an answer."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer]))[0, len(prompt) - 1:-1]                 # (n, V)
    best = logits.topk(2).values
    return (best[:, 0] - best[:, 1]).min().item()


@pytest.mark.parametrize("n_kv_heads", [2, 4])
def test_greedy_answers_are_the_cpus(n_kv_heads):
    """Rows that begin at different places and end at different steps, with EOS: together, alone, and on the CPU."""
    model = tiny(n_kv_heads=n_kv_heads)
    prompts = [some_tokens(1, n, seed=n + 200)[0].tolist() for n in (3, 40, 9, 22, 31, 2, 60, 17)]
    most = [30, 12, 30, 30, 5, 30, 30, 8]
    right = model.generate(prompts, most, temperature=0)
    there = cast(model, DEVICE, torch.float32)
    together = there.generate(prompts, most, temperature=0)
    alone = [there.generate([prompt], n, temperature=0)[0] for prompt, n in zip(prompts, most)]
    nearest = min(closest(model, prompt, answer) for prompt, answer in zip(prompts, right))
    print(f"\n  lengths {list(map(len, right))}; the two best logits are at least {nearest:.1e} apart")
    assert together == right and alone == right


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_sampling_is_repeated_by_its_seed(dtype):
    there = cast(tiny(), DEVICE, weights.DTYPES[dtype])
    prompts = [some_tokens(1, n)[0].tolist() for n in (3, 11, 40)]
    wishes = dict(temperature=0.9, top_k=50, top_p=0.9, repetition_penalty=1.1, eos_id=-1)
    a, b, c = (there.generate(prompts, 24, **wishes, generator=torch.Generator(DEVICE).manual_seed(seed))
               for seed in (1, 1, 2))
    assert a == b != c
    greedy = [there.generate(some, 24, temperature=0, eos_id=-1) for some in (prompts, prompts[:1])]
    same = fmean(x == y for x, y in zip(greedy[0][0], greedy[1][0]))
    print(f"\n  {dtype}: greedily, {100 * same:.0f} % of the ids are the same in a batch and alone")


# ---- quantization ---------------------------------------------------------------------------------------------------

def matrix(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=drawn(seed))


def test_gptq_is_the_cpus():
    """Codes may differ where a weight lies between two of them, so the error in the output is compared, within 2 %."""
    W = matrix(256, 512, 1)
    X = matrix(2048, 512, 2) @ torch.linspace(0.05, 2, 512).diag() @ matrix(512, 512, 3) / 20
    H = quantize.hessian([X])
    on_device = quantize.hessian([X.to(DEVICE)])
    print(f"\n  Hessian: {distance(on_device, H):.1e}")
    assert distance(on_device, H) < 1e-5
    for bits, size, sym in ((4, 64, False), (4, 128, True), (8, -1, True)):
        settings = dict(bits=bits, group_size=size, sym=sym, act_order=True, clip=True)
        right, found = quantize.gptq(W, H, **settings), quantize.gptq(W.to(DEVICE), on_device, **settings)
        rounded = quantize.rtn(W, bits, size, sym)
        errors = [quantize.layer_error(W, m.dequantize().cpu(), H) for m in (rounded, right, found)]
        same = (right.q == found.q.cpu()).double().mean().item()
        print(f"  {bits} bits, groups of {size}: error by RTN {errors[0]:.3e}, GPTQ on the CPU {errors[1]:.3e}, on "
              f"{NAME} {errors[2]:.3e}, {100 * same:.2f} % of the codes the same")
        assert errors[2] == pytest.approx(errors[1], rel=0.02)
        there = quantize.rtn(W.to(DEVICE), bits, size, sym)
        assert (there.q.cpu() == rounded.q).double().mean() > 0.9999


LAYERS = {4: quantize.Linear4, 8: quantize.Linear8}


@pytest.mark.parametrize("bits, size", [(8, -1), (4, 32), (4, 64), (4, 128), (4, 256), (4, -1)])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_quantized_layers_are_their_dequantized_product(bits, size, dtype):
    """The layer as it is, and its fast kernel, against x W^T of its weights in fp64 on the CPU. bf16 rounds x and the
    scales of 4 bits to 2^-9; 8 bits round each row of x to 127 steps."""
    precise, coarse = {"fp32": (3e-6, 6e-3), "bf16": (6e-3, 9e-3)}[dtype]
    coarse = 0.015 if bits == 8 else coarse
    for O, I in ((512, 1024), (172, 64), (5, 100), (70, 256)):
        layer = LAYERS[bits].of(quantize.rtn(matrix(O, I, 1), bits, size, bits == 8))
        W = layer.dequantize(torch.float64)
        there = layer.to(DEVICE)
        product = quantize.fast_product(there)
        works = "no kernel" if product is None else "kernel"
        if CUDA and (O, I) == (512, 1024) and size != -1:
            assert product is not None, "the kernel does not work on this card"
        worst = [0.0, 0.0]
        for n in (1, 3, 40):
            x = matrix(n, I, 7).to(weights.DTYPES[dtype])
            right = x.double() @ W.T
            for i, function in enumerate((there, product)):
                if function is not None:
                    worst[i] = max(worst[i], distance(function(x.to(DEVICE)), right))
        print(f"\n  {bits} bits, groups of {size}, {O} x {I}, {dtype}: {worst[0]:.1e}, {works} {worst[1]:.1e}", end="")
        assert worst[0] < precise and worst[1] < coarse


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_model_is_the_cpus(bits, base, tmp_path):
    """quantize.py as a whole, in fp32: the perplexities of its table within 1 %, and what it writes answers."""
    found = {}
    for device in ("cpu", NAME):
        given = [base / "model", "--bits", bits, "--text", base / "sft.json", "--device", device, "--dtype", "fp32",
                 "--save_path", tmp_path / device, "--template", "alpaca", "--max_datasets_size", 64]
        given += ["--calibration", base / "sft.json"] if bits == 4 else []
        found[device] = quantize.main([str(flag) for flag in given])
    names = ("perplexity_before", "perplexity_after")
    print(f"\n  {bits} bits:", {device: [figures[name] for name in names] for device, figures in found.items()})
    for name in names:
        assert found[NAME][name] == pytest.approx(found["cpu"][name], rel=0.01)
    model = quantize.open_model(tmp_path / NAME, torch.bfloat16, DEVICE).eval()
    with quantize.packed(model):
        assert len(model.generate([[1, 40, 41], [1, 50]], 8, temperature=0, eos_id=-1)[1]) == 8


# ---- the server -----------------------------------------------------------------------------------------------------

def ask(server: serve.Server, body: dict) -> list[dict]:
    """The JSON objects of an answer: one, or those of a stream."""
    client = http.client.HTTPConnection(*server.server_address, timeout=60)
    client.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = client.getresponse()
    content = response.read().decode()
    assert response.status == 200, content
    if not body.get("stream"):
        return [json.loads(content)]
    return [json.loads(part.removeprefix("data: ")) for part in content.split("\n\n")[:-2]]


@pytest.mark.parametrize("quant", [None, "8bit", "4bit"])
def test_server_answers(quant):
    """Streamed as not streamed; unquantized and in fp32, twelve at once as Llama.generate on the CPU alone."""
    model = tiny()
    there = cast(model, DEVICE, torch.float32)
    if quant:
        quantize.round_model(there, quant, DEVICE)
    served = serve.Served(there.eval(), TOKENIZER, TEMPLATE, "tiny", 256)
    with quantize.packed(there, keep=False):
        server = serve.Server(serve.Engine(served, 8), serve.parse(["--http_port", "0", "--benchmark"]))
        threads = [threading.Thread(target=target, daemon=True) for target in (server.engine.run, server.serve_forever)]
        for thread in threads:
            thread.start()
        words = [f"One day a fox and {n} bears walked to the lake" for n in range(12)]
        wish = {"model": "tiny", "max_tokens": 16, "temperature": 0, "seed": 1}
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda prompt: ask(server, wish | {"prompt": prompt})[0], words))
        # Of each kind the last two: their prompts are in the cache, so that both compute the same.
        *_, whole = [ask(server, wish | {"prompt": words[3]})[0] for _ in range(2)]
        parts = ask(server, wish | {"prompt": words[3], "stream": True})
        sampled = [ask(server, wish | {"prompt": words[0], "temperature": 1.0, "top_p": 0.9})[0] for _ in range(3)]
        server.engine.stop(0.0)
        server.finish(5.0)
    texts = [answer["choices"][0]["text"] for answer in answers]
    print(f"\n  {quant}: {texts[0]!r}")
    assert "".join(part["choices"][0]["text"] for part in parts if part["choices"]) == whole["choices"][0]["text"]
    assert sampled[1]["choices"][0]["text"] == sampled[2]["choices"][0]["text"]
    if quant is None:
        ids = [TOKENIZER.encode(prompt) for prompt in words]
        right = [model.generate([prompt], 16, temperature=0)[0] for prompt in ids]
        stops = model.stops()
        shown = [[one for one in answer if one not in stops] for answer in right]
        streams = [text.TextStream(TOKENIZER, prompt[-16:]) for prompt in ids]
        assert texts == ["".join(map(stream.push, new)) + stream.rest() for stream, new in zip(streams, shown)]
