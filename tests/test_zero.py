"""zero.py against torch's own AdamW and plain autograd, on one process and on two and four real ones (gloo)."""

import gc
import json
import os
import re
import socket
import subprocess
import sys
import types
import warnings
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora
import data.run
import zero
from model import SHAPES, Llama, LlamaConfig

ROOT = Path(__file__).parents[1]
CONFIG = LlamaConfig(dim=16, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=8, ffn_dim=20, vocab_size=37, max_seq_len=16)
TOKENS = torch.arange(8 * 10).view(8, 10) ** 2 % 37


def llama(tied: bool = False) -> Llama:
    return Llama(LlamaConfig(**vars(CONFIG) | {"tie_embeddings": tied}), generator=torch.Generator().manual_seed(0))


def lm(model: Llama, tokens: Tensor, n: int = 8 * 9) -> Tensor:
    return F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="sum") / n


def torch_adamw(params: list[nn.Parameter], decay: float = 0.1, **more) -> torch.optim.AdamW:
    groups = [{"params": [p for p in params if p.dim() > 1], "weight_decay": decay}, {"params": [p for p in params if p.dim() <= 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=True, **more)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def some(*shapes: tuple[int, ...]) -> tuple[list[nn.Parameter], list[Tensor]]:
    """Parameters, and gradients for them."""
    rng = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(shape, generator=rng)) for shape in shapes], [torch.randn(shape, generator=rng) for shape in shapes]


def feed(optimizer: zero.ZeRO2, params: list[nn.Parameter], grads: list[Tensor], last: bool = True) -> None:
    """A backward that gives exactly these gradients."""
    optimizer.backward(sum((p * g).sum() for p, g in zip(params, grads)), last)


def named(params: list[nn.Parameter]) -> list[tuple[str, nn.Parameter]]:
    return [(f"p{i}", p) for i, p in enumerate(params)]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(map(torch.equal, a, b))


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a, b))


def test_formula_is_torchs_adamw():
    (p,), (g,) = some((5, 7))
    theirs = nn.Parameter(p.detach().double())
    reference = torch.optim.AdamW([theirs], betas=(0.8, 0.95), eps=1e-8, weight_decay=0.1)
    ours, m, v = theirs.detach().clone(), torch.zeros(5, 7).double(), torch.zeros(5, 7).double()
    for step, lr in enumerate((1e-1, 3e-2, 1e-3), 1):
        theirs.grad = g.double() * step
        set_lr(reference, lr)
        reference.step()
        ours, m, v = zero.adamw(ours, theirs.grad, m, v, step, lr, (0.8, 0.95), 1e-8, 0.1)
        assert distance([ours], [theirs]) < 1e-12
    # Bias correction at step 1: without decay every weight moves by lr exactly, whatever the size of its gradient.
    moved = zero.adamw(torch.zeros(3), torch.tensor([1e-3, 1.0, -50.0]), torch.zeros(3), torch.zeros(3), 1, 0.5, (0.9, 0.95), 1e-8, 0.0)[0]
    assert moved.tolist() == pytest.approx([-0.5, -0.5, 0.5], rel=1e-4)


@pytest.mark.parametrize("bucket_elements, tied, strategy", [(1, True, "naive"), (500, False, "zero2"), (2**20, True, "zero2_cpu"), (2**20, False, "ddp")])
def test_twenty_steps_are_torchs_to_the_bit(bucket_elements, tied, strategy):
    """Matrices decayed and norms not (Z14), a changing learning rate; a tied head is one parameter. One process, any strategy."""
    ours, theirs = llama(tied), llama(tied)
    reference = torch_adamw(list(theirs.parameters()))
    optimizer = zero.ZeRO2(ours.named_parameters(), weight_decay=0.1, max_norm=1e9, bucket_elements=bucket_elements, strategy=strategy)
    assert (len(optimizer.buckets) > 10) == (bucket_elements == 1) and sum(b.master.numel() for b in optimizer.buckets) == sum(p.numel() for p in theirs.parameters())
    for step in range(1, 21):
        optimizer.backward(lm(ours, TOKENS))
        optimizer.step(lr=1e-2 / step)
        lm(theirs, TOKENS).backward()
        set_lr(reference, 1e-2 / step)
        reference.step()
        reference.zero_grad()
    assert equal(list(ours.parameters()), list(theirs.parameters()))
    assert all(p.grad is None for p in ours.parameters())
    assert not tied or ours.output.weight is ours.tok_embeddings.weight


def test_bf16_learns_what_is_smaller_than_its_step():
    """Z15: norms that stayed 1.0 for a whole training, because 1.0 - 6e-4 is 1.0 in bf16."""
    (p, lone), g = (nn.Parameter(torch.ones(64, dtype=torch.bfloat16)) for _ in range(2)), torch.linspace(0.5, 2, 64)
    exact = nn.Parameter(torch.ones(64))
    optimizer = zero.ZeRO2([("norm", p)], torch.bfloat16, max_norm=0)
    reference, control = (torch.optim.AdamW([q], lr=6e-4, betas=(0.9, 0.95), weight_decay=0.0) for q in (exact, lone))
    for _ in range(100):
        feed(optimizer, [p], [g.bfloat16()])
        optimizer.step(6e-4)
        exact.grad, lone.grad = g.bfloat16().float(), g.bfloat16()
        reference.step(), control.step()
    bucket = optimizer.buckets[0]
    assert (lone == 1).all() and (p != 1).all() and p.dtype == torch.bfloat16
    assert torch.equal(p.detach(), bucket.master.bfloat16()) and distance([bucket.master], [exact]) < 1e-6
    feed(optimizer, [p], [g.bfloat16()])
    assert {t.dtype for t in (bucket.master, bucket.grad, bucket.m, bucket.v)} == {torch.float32}
    with optimizer.masters():  # for saving: nothing is rounded away
        assert p.dtype == torch.float32 and torch.equal(p.detach(), bucket.master)
    assert p.dtype == torch.bfloat16 and torch.equal(p.detach(), bucket.flat)


def test_masters_are_the_files_weights():
    """Not what bf16 leaves of them."""
    exact = torch.linspace(1, 1.01, 64)
    p = nn.Parameter(exact.clone())
    optimizer = zero.ZeRO2([("w", p)], torch.bfloat16)
    assert torch.equal(optimizer.buckets[0].master, exact) and torch.equal(p.detach(), exact.bfloat16())


def test_clipping_is_by_the_norm_before_it():
    """Z04: clipping that did nothing while another norm was reported."""
    for max_norm, small in ((0.5, 0.01), (0, 0.01), (100.0, 0.01), (1e-5, 1e-5)):  # at the last torch's 1e-6 shows
        (ours, _), (theirs, grads) = (some((6, 4), (9,)) for _ in range(2))
        grads = [10 * g / torch.cat([g.flatten() for g in grads]).norm() for g in grads]
        optimizer, reference = zero.ZeRO2(named(ours), weight_decay=0.1, max_norm=max_norm), torch_adamw(theirs, lr=0.1)
        for size in (1.0, small):  # Adam forgets a factor common to all steps, so the second gradient has another
            feed(optimizer, ours, [g * size for g in grads])
            assert optimizer.step(0.1).grad_norm == pytest.approx(10 * size, rel=1e-5)
            for p, g in zip(theirs, grads):
                p.grad = g * size
            if max_norm:
                torch.nn.utils.clip_grad_norm_(theirs, max_norm)
            reference.step()
        assert distance(ours, theirs) < 1e-6


def test_accumulated_one_by_one_is_one_batch():
    """Z01: only the first micro-batch reached the buffer."""
    whole, parts = llama(), llama()
    a, b = (zero.ZeRO2(model.named_parameters(), bucket_elements=300) for model in (whole, parts))
    for _ in range(2):
        a.backward(lm(whole, TOKENS))
        for i in range(8):
            b.backward(lm(parts, TOKENS[i:i + 1]), last=i == 7)
        assert distance([x.grad for x in a.buckets], [x.grad for x in b.buckets]) < 1e-6
        assert a.step(1e-3).grad_norm == pytest.approx(b.step(1e-3).grad_norm, rel=1e-5)


def test_parameter_without_a_gradient_counts_as_zero():
    """Of this step: neither the last step's gradient again, nor a stale moment."""
    (ours, _), (theirs, grads) = (some((4, 4), (5,), (3, 2)) for _ in range(2))
    optimizer, reference = zero.ZeRO2(named(ours), max_norm=0, weight_decay=0.1), torch_adamw(theirs, lr=0.1)
    for used in ((0, 1, 2), (0, 2), (1,), ()):
        if used:
            feed(optimizer, [ours[i] for i in used], [grads[i] for i in used])
        optimizer.step(0.1)
        for i, p in enumerate(theirs):
            p.grad = grads[i] if i in used else torch.zeros_like(p)
        reference.step()
        assert distance(ours, theirs) < 1e-6  # not to the bit: torch's kernel rounds what fills no vector otherwise


def test_frozen_parameters_are_left_alone(tmp_path):
    model, before = llama(), [p.detach().clone() for p in llama().parameters()]
    model.tok_embeddings.weight.requires_grad_(False)
    optimizer = zero.ZeRO2(model.named_parameters(), torch.bfloat16, weight_decay=0.1)
    assert "tok_embeddings.weight" not in [name for bucket in optimizer.buckets for name in bucket.names]
    model.tok_embeddings.weight.data = model.tok_embeddings.weight.bfloat16()
    optimizer.backward(lm(model, TOKENS))
    optimizer.step(0.1)
    assert torch.equal(model.tok_embeddings.weight, before[0].bfloat16()) and model.tok_embeddings.weight.grad is None
    assert not any(torch.equal(p.float(), old) for p, old in list(zip(model.parameters(), before))[1:])
    with optimizer.masters():
        model.save_pretrained(tmp_path)
    again = Llama.from_pretrained(tmp_path)  # Z13, Z11: all of them, and not the buckets that they are views of
    assert torch.equal(again.tok_embeddings.weight, before[0].bfloat16().float()) and equal([p.bfloat16() for p in list(again.parameters())[1:]], list(model.parameters())[1:])
    assert (tmp_path / "model.safetensors").stat().st_size < 1.1 * 4 * sum(p.numel() for p in model.parameters()) + 4000  # + names
    with pytest.raises(ValueError, match="no trainable parameter"):
        zero.ZeRO2(model.requires_grad_(False).named_parameters())


@pytest.mark.parametrize("bucket_elements", [1, 2**22])
def test_empty_parameters(bucket_elements):
    """Z12: zero-element parameters at the start, in the middle and at the end; a bucket of nothing but those."""
    shapes = ((0,), (3, 2), (0, 4), (5,), (2, 0))
    (ours, _), (theirs, grads) = some(*shapes), some(*shapes)
    optimizer, reference = zero.ZeRO2(named(ours), max_norm=0, bucket_elements=bucket_elements), torch_adamw([p for p in theirs if p.numel()], 0.0, lr=0.1)
    for _ in range(3):
        feed(optimizer, ours, grads)
        optimizer.step(0.1)
        for p, g in zip(theirs, grads):
            p.grad = g
        reference.step()
    assert distance([p for p in ours if p.numel()], [p for p in theirs if p.numel()]) < 1e-6


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_gradient_skips_the_step_and_twenty_stop_the_run(bad):
    """Z05: skipped without a word, and nothing learnt."""
    params, grads = some((4, 4), (5,))
    optimizer = zero.ZeRO2(named(params), bucket_elements=1)
    feed(optimizer, params, grads)
    assert not optimizer.step(0.1).skipped
    before = [t.clone() for b in optimizer.buckets for t in (b.master, b.m, b.v)]
    broken = grads[1].clone()
    broken[2] = bad
    for i in range(1, 20):
        feed(optimizer, params, [grads[0], broken])
        assert optimizer.step(0.1).skipped and (optimizer.skipped, optimizer.updates) == (i, 1)
    assert equal(before, [t for b in optimizer.buckets for t in (b.master, b.m, b.v)]) and optimizer.scale == 1
    feed(optimizer, params, [grads[0], broken])
    with pytest.raises(FloatingPointError, match="20 steps in a row.* p1:"):
        optimizer.step(0.1)
    feed(optimizer, params, grads)
    assert not optimizer.step(0.1).skipped and (optimizer.skips_in_row, optimizer.updates) == (0, 2)


def test_fp16_loss_scale_halves_doubles_and_ends(monkeypatch):
    """Z07: a scale that never recovered, and a run that ended after 14 hours without a reason."""
    monkeypatch.setattr(zero.ZeRO2, "GROWTH", 3)
    params, grads = some((4, 4), (5,))
    optimizer = zero.ZeRO2(named(params), torch.float16, max_norm=0)
    exact = [p.detach().float().clone() for p in params]
    assert optimizer.scale == 65536 and params[0].dtype == torch.float16
    feed(optimizer, params, [g.half() for g in grads])  # 65536 is beyond fp16's largest number
    assert optimizer.step(0.1).skipped and optimizer.scale == 32768 and equal([p.float() for p in params], exact)
    for scale in (32768, 32768, 65536):
        feed(optimizer, params, [g.half() / 1024 for g in grads])
        stats = optimizer.step(0.1)
        assert not stats.skipped and optimizer.scale == scale and stats.grad_norm == pytest.approx(torch.cat([g.flatten() for g in grads]).norm().item() / 1024, rel=1e-2)
    optimizer.good_in_row = 2
    other = zero.ZeRO2(named(some((4, 4), (5,))[0]), torch.float16)
    other.load_state_dict(optimizer.state_dict())
    assert (other.scale, other.good_in_row, other.skipped, other.updates) == (65536, 2, 1, 3)
    optimizer.scale = 1.0
    feed(optimizer, params, [grads[0].half(), torch.full((5,), float("inf")).half()])
    with pytest.raises(FloatingPointError, match="loss scale 1, first in p1"):
        optimizer.step(0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_goes_through_a_file_and_on(tmp_path, dtype):
    """By name and whole (Z08), so another cut into buckets loads it; what is saved is no larger than what it holds (Z11)."""
    first, second = llama(), Llama(CONFIG)
    a, b = zero.ZeRO2(first.named_parameters(), dtype, weight_decay=0.1), zero.ZeRO2(second.named_parameters(), dtype, weight_decay=0.1, bucket_elements=100)
    for _ in range(2):
        a.backward(lm(first, TOKENS))
        a.step(1e-2)
    torch.save(a.state_dict(), tmp_path / "state.pt")
    assert (tmp_path / "state.pt").stat().st_size < 1.1 * 12 * sum(p.numel() for p in first.parameters()) + 20_000  # + names
    b.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert equal(list(first.parameters()), list(second.parameters())) and next(second.parameters()).dtype == dtype
    for optimizer, model in ((a, first), (b, second)):
        optimizer.backward(lm(model, TOKENS))
        optimizer.step(1e-2)
    assert distance([p.float() for p in first.parameters()], [p.float() for p in second.parameters()]) < (1e-6 if dtype == torch.float32 else 1e-2)
    state = a.state_dict()
    for other, what in ((llama(tied=True), "output.weight"), (Llama(LlamaConfig(**vars(CONFIG) | {"ffn_dim": 24})), "w[123].weight is")):
        with pytest.raises(ValueError, match=what):
            zero.ZeRO2(other.named_parameters()).load_state_dict(state)


def test_naive_with_two_processes_and_missing_devices_are_refused(monkeypatch):
    assert data.run.start("cpu", "naive")[:3] == (0, 1, torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="GPU 0, but there are 0.*--device cpu"):
        data.run.start("cuda")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="naive is for one process and 2 were started.*--strategy ddp"):
        data.run.start("cpu", "naive")


def test_the_fused_pass_is_the_formula():
    """In chunks of which the last is not full, the gradient divided on the way, the low copy rounded from the new weights."""
    (p, m, v), (g, *_) = (x for x in some((1000,), (1000,), (1000,)))
    p, m, v = p.detach(), m.detach(), v.detach().abs()
    low = torch.zeros(1000, dtype=torch.bfloat16)
    expected = zero.adamw(p.double(), g.double() / 4, m.double(), v.double(), 3, 0.1, (0.9, 0.95), 1e-8, 0.1)
    zero.fused_adamw(p, g.clone(), m, v, low, 3, 0.1, (0.9, 0.95), 1e-8, 0.1, divisor=4.0, chunk=64)
    assert distance([p, m, v], [x.float() for x in expected]) < 1e-6 and torch.equal(low, p.bfloat16())


def test_norm_of_a_long_vector():
    """torch's own fp32 norm is 5e-4 off here, and clipping with it differs between one process and two."""
    x = torch.randn(2**23 + 5, generator=torch.Generator().manual_seed(0))
    assert zero.sum_of_squares(x).item() == pytest.approx(x.double().square().sum().item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_way_over_cpu_memory_changes_no_bit(dtype):
    """What zero2_cpu does beside a GPU, with plain copies in place of the streams; more buckets than pinned buffers."""
    direct, around = llama(), llama()
    a, b = (zero.ZeRO2(model.named_parameters(), dtype, weight_decay=0.1, max_norm=0.5, bucket_elements=100, strategy="zero2_cpu") for model in (direct, around))
    b.crossing = zero.Crossing(b.buckets, b.PINNED)
    assert a.crossing is None and len(b.buckets) > 2 * b.PINNED
    for step in range(3):
        for optimizer, model in ((a, direct), (b, around)):
            for i in range(2):  # Z01: with offload, only the first micro-batch counted
                optimizer.backward(lm(model, TOKENS[4 * i:4 * i + 4]), last=i == 1)
        stats = a.step(1e-2), b.step(1e-2)
        assert stats[0][:2] == stats[1][:2] and stats[1].copying > 0 == stats[0].copying and equal(list(direct.parameters()), list(around.parameters()))
    assert equal([t for x in a.buckets for t in (x.master, x.m, x.v)], [t for x in b.buckets for t in (x.master, x.m, x.v)])


def test_aliases_of_coati(capsys):
    for name, ours in (("colossalai_zero2", "zero2"), ("colossalai_zero2_cpu", "zero2_cpu"), ("colossalai_gemini", "zero2_cpu")):
        assert name in data.run.STRATEGIES and zero.ZeRO2(named(some((3,))[0]), strategy=name).strategy == ours
        assert data.run.start("cpu", name)[:3] == (0, 1, torch.device("cpu"))
    assert capsys.readouterr().out == "note: --strategy colossalai_gemini runs as zero2_cpu\n"


# ---- the memory plan ----

def test_size_of_the_published_models():
    assert zero.size_of(SHAPES["7B"]).total == 6_738_415_616 and zero.size_of(SHAPES["13B"]).total == 13_015_864_320
    assert zero.size_of(SHAPES["70B"]).total == 68_976_648_192  # Llama 2's, with grouped queries


@pytest.mark.parametrize("tied", [False, True])
def test_size_of_a_model(tied):
    model = Llama(LlamaConfig(**vars(CONFIG) | {"n_kv_heads": 1, "tie_embeddings": tied}))
    size, adapted = zero.size_of(model.config), zero.size_of(model.config, 4)
    assert size.total == size.trained == sum(p.numel() for p in model.parameters()) and size.largest == 37 * 16
    lora.attach(model, 4)
    assert (adapted.total, adapted.trained) == tuple(sum(p.numel() for p in model.parameters() if p.requires_grad or not frozen) for frozen in (False, True))


@pytest.mark.parametrize("dtype, rank", [(torch.float32, 0), (torch.float32, 4), (torch.bfloat16, 4)])
def test_activations_are_what_autograd_keeps(dtype, rank):
    config = LlamaConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=160, vocab_size=99, max_seq_len=64)
    model, tokens, kept = Llama(config).to(dtype), torch.arange(4 * 64).view(4, 64) % 99, {}
    if rank:
        lora.attach(model, rank)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()} | {model.cos.untyped_storage().data_ptr(), model.sin.untyped_storage().data_ptr()}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model.hidden(tokens)
    size = zero.Size(64, 2, 64, 32, 160, 99, 1, 1, 1, rank)
    found = sum(x.untyped_storage().nbytes() for place, x in kept.items() if place not in own)
    assert found == pytest.approx(zero.activation_bytes(size, tokens.numel(), dtype.itemsize, False), rel=0.06)  # + rotary tables, norms' and softmax's denominators


def test_plan_is_the_papers_table():
    size, P = zero.size_of(SHAPES["7B"]), zero.size_of(SHAPES["7B"]).total
    ddp, zero2, offloaded = (zero.plan(size, name, 4, 512) for name in ("ddp", "zero2", "colossalai_zero2_cpu"))
    for p, shards in ((ddp, 1), (zero2, 4)):
        assert (p.device["weights"], p.device["gradient"], p.device["master"], p.device["moments"]) == (2 * P, 4 * P / shards, 4 * P / shards, 8 * P / shards) and not p.cpu
    assert offloaded.device["weights"] == 2 * P and "master" not in offloaded.device and (offloaded.cpu["master"], offloaded.cpu["moments"]) == (P, 2 * P)
    assert zero2.sent == 2 * 2 * P * 3 / 4 and zero.plan(size, "zero2", 4, 512, micro_batches=8).sent == 9 * 2 * P * 3 / 4  # 2 Psi; Psi a micro-batch and Psi
    assert zero.plan(size, "naive", 1, 512, element=4).device["master"] == 0
    one_card = zero.plan(size, "zero2_cpu", 1, 512, grad_checkpoint=True)
    assert one_card.peak + 2**30 < 24 * 2**30 < zero.plan(size, "zero2", 1, 512, grad_checkpoint=True).peak
    assert one_card.crossed == 2 * 2 * P


def test_plan_on_the_command_line(capsys):
    zero.main(["--plan", "7B", "--nproc", "4", "--lora_rank", "16", "--grad_checkpoint", "--strategy", "zero2"])
    text = capsys.readouterr().out
    assert re.search(r"fits a card of +16 GB", text) and re.search(r"device: weights +13\.5\d GB", text) and "sent a step" in text


def test_plan_of_a_directory(tmp_path, capsys):
    Llama(LlamaConfig(**vars(CONFIG))).save_pretrained(tmp_path)
    zero.main(["--plan", str(tmp_path)])
    assert f"{zero.size_of(LlamaConfig(**vars(CONFIG))).trained / 1e6:,.1f} M trained" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--plan 8B: neither a weights directory nor one of tiny"):
        zero.main(["--plan", "8B"])


def processes(tmp_path: Path, world: int, code: str, *args, launcher: bool = True, timeout: int = 240, **env) -> list[subprocess.CompletedProcess]:
    """Run code in `world` processes: under torchrun, or each started by hand, as another launcher would."""
    (tmp_path / "worker.py").write_text(code)
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"} | env
    if launcher:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", str(tmp_path / "worker.py"), *map(str, args)]
        return [subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(world)}
    started = [subprocess.Popen([sys.executable, str(tmp_path / "worker.py"), *map(str, args)], env=env | {"RANK": str(r), "LOCAL_RANK": str(r)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
               for r in range(world)]
    return [subprocess.CompletedProcess(p.args, p.returncode if out else p.wait(), *out) for p in started for out in [p.communicate(timeout=timeout)]]


WORKER = """
import gc, sys
import torch
from torch import nn
import torch.distributed as dist
import data.run
import lora, zero
from model import Llama, LlamaConfig
from test_zero import CONFIG, TOKENS, adamw_of_the_whole, distance, equal, feed, llama, live_bytes, lm, named, relative, some, torch_adamw

rank, world, *_ = data.run.start("cpu")
folder = sys.argv[1]
assert world in (2, 4) and data.run.broadcast_object(f"from {rank}") == "from 0"

def same_everywhere(params):
    flat = torch.cat([p.detach().flatten() for p in params])
    all_of_them = [torch.empty_like(flat) for _ in range(world)]
    dist.all_gather(all_of_them, flat)
    return all(torch.equal(x, flat) for x in all_of_them)

rows = 8 // world
def train(optimizer, model, steps):  # in micro-batches of one row; processes differ in how many they have
    mine = [rank * rows + i for i in range(rows)] if rank else list(range(rows - 1))
    mine += [rows - 1] if rank == world - 1 else []
    for _ in range(steps):
        for i in mine:
            optimizer.backward(lm(model, TOKENS[i:i + 1]), last=i == mine[-1])
        optimizer.flush()
        assert data.run.all_reduce(torch.ones(3)).tolist() == [world] * 3  # another collective between
        optimizer.step(1e-3)

# 1. Twenty steps on shares of the batch = on the batch with torch's AdamW; parameters equal to the bit everywhere.
for strategy, tied, size in (("zero2", True, 50), ("zero2_cpu", False, 2**20), ("ddp", False, 50))[:3 if world == 2 else 2]:
    ours, theirs = llama(tied), llama(tied)
    optimizer = zero.ZeRO2(ours.named_parameters(), weight_decay=0.1, max_norm=0.5, eps=1e-3, bucket_elements=size, strategy=strategy)
    assert (len(optimizer.buckets) > 10) == (size == 50)
    train(optimizer, ours, 20)
    adamw_of_the_whole(theirs, 20)
    assert same_everywhere(ours.parameters()) and relative(ours.parameters(), theirs.parameters()) < 1e-6, (strategy, relative(ours.parameters(), theirs.parameters()))

# 2. Its state goes to files, one a process; then three steps more, for whoever goes on from them.
ours = llama()
optimizer = zero.ZeRO2(ours.named_parameters(), weight_decay=0.1, max_norm=0.5, eps=1e-3, bucket_elements=300, strategy="zero2")
train(optimizer, ours, 3)
torch.save(optimizer.state_dict(), f"{folder}/state-{world}-{rank}.pt")
before = [p.detach().clone() for p in ours.parameters()]
train(optimizer, ours, 3)
if rank == 0:
    torch.save((before, [p.detach().clone() for p in ours.parameters()]), f"{folder}/params-{world}.pt")
if world == 2:  # saved on four
    states = [torch.load(f"{folder}/state-4-{r}.pt", weights_only=True, mmap=True) for r in range(4)]
    saved, later = torch.load(f"{folder}/params-4.pt")
    for strategy in ("zero2", "ddp"):
        other = llama()
        optimizer = zero.ZeRO2(other.named_parameters(), weight_decay=0.1, max_norm=0.5, eps=1e-3, strategy=strategy)
        optimizer.load_state_dict(states)
        assert equal(other.parameters(), saved)
        for key in ("master", "m", "v"):
            for name, piece in optimizer.state_dict()["pieces"].items():
                whole = torch.cat([s["pieces"][name][key] for s in states if name in s["pieces"]])
                assert torch.equal(piece[key], whole[piece["start"]:piece["start"] + len(piece[key])]), name
        train(optimizer, other, 3)
        assert relative(other.parameters(), later) < 1e-6
    split = next(name for name in states[0]["pieces"] if name in states[1]["pieces"])
    del states[1]["pieces"][split]
    other = zero.ZeRO2(llama().named_parameters(), strategy="ddp")
    try:
        other.load_state_dict(states)
        raise SystemExit("accepted")
    except ValueError as error:
        assert f"numbers of {split} that this process needs: the file of a process is missing" in str(error), error

# 3. Bytes of live tensors, and elements sent: bf16, Psi parameters.
config = LlamaConfig(dim=64, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=32, ffn_dim=96, vocab_size=99, max_seq_len=16)
model = Llama(config, generator=torch.Generator().manual_seed(0))
psi = sum(p.numel() for p in model.parameters())
base = live_bytes() - 4 * psi
optimizer = zero.ZeRO2(model.named_parameters(), torch.bfloat16, bucket_elements=4096, strategy="zero2")
assert abs(live_bytes() - base - 2 * psi - 12 * psi / world) < 0.03 * 12 * psi / world
sent, start_sending, most = [0], dist.batch_isend_irecv, [0]
def counted(ops):
    sent[0] += sum(op.tensor.numel() for op in ops if op.op is dist.isend)
    assert len(optimizer.flying) < optimizer.IN_FLIGHT
    return start_sending(ops)
dist.batch_isend_irecv = counted
for micro in range(3):
    sent[0] = 0
    optimizer.backward(lm(model, TOKENS[rank:rank + 1]), last=micro == 2)
    assert abs(sent[0] - psi * (world - 1) / world) < 0.01 * psi, (sent, psi)  # Psi reduce-scattered, a micro-batch
    assert abs(live_bytes() - base - 2 * psi - 16 * psi / world) < 0.03 * 16 * psi / world  # nothing but the owned shard is kept
sent[0] = 0
optimizer.step(1e-3)
assert abs(sent[0] - psi * (world - 1) / world) < 0.01 * psi  # Psi gathered, a step
assert abs(live_bytes() - base - 2 * psi - 12 * psi / world) < 0.03 * 12 * psi / world
dist.batch_isend_irecv = start_sending

# 4. For saving, rank 0 sees the fp32 masters; the others', and later its own, parameters stay bf16.
pieces = [None] * world
dist.all_gather_object(pieces, optimizer.state_dict()["pieces"])
with optimizer.masters():
    for name, p in model.named_parameters():
        if rank == 0:
            assert torch.equal(p.detach().flatten(), torch.cat([piece[name]["master"] for piece in pieces if name in piece])), name
        else:
            assert p.dtype == torch.bfloat16
low = dict(model.named_parameters())["layers.1.feed_forward.w2.weight"]
assert low.dtype == torch.bfloat16 and same_everywhere([p.float() for p in model.parameters()])

# 5. Other parameters silent here than there; nothing on rank 1; nothing anywhere; three numbers on four processes; an empty
# parameter; one parameter that lies on all processes. Then NaN on rank 1 only: all skip, and go on together.
for strategy in ("zero2", "zero2_cpu", "ddp"):
    shapes = ((3,), (0, 2), (5, 3), (1,))
    (params, _), (lone, grads) = some(*shapes), some(*shapes)
    optimizer, alone = zero.ZeRO2(named(params), max_norm=0, weight_decay=0.1, bucket_elements=1, strategy=strategy), torch_adamw([p for p in lone if p.numel()], lr=0.1)
    for used in (((0, 3), (1, 2)), ((1,), (0, 1, 2, 3)), ((0, 1, 2), ()), ((), ())):
        mine = used[rank] if rank < 2 else ()
        if mine:
            feed(optimizer, [params[i] for i in mine], [grads[i] for i in mine])
        optimizer.step(0.1)
        for i, p in enumerate(lone):
            p.grad = grads[i] * (used[0] + used[1]).count(i)
        alone.step()
        assert same_everywhere(params) and max((a - b).abs().max() for a, b in zip(params, lone) if a.numel()) < 1e-6, (strategy, used)
    before = [p.detach().clone() for p in params]
    bad = [g.clone() for g in grads]
    bad[2].view(-1)[-1] += float("nan") if rank == 1 else 0  # one number, which one process owns
    feed(optimizer, params, bad)
    assert optimizer.step(0.1).skipped and optimizer.skipped == 1 and equal(params, before)
    feed(optimizer, params, grads)
    assert not optimizer.step(0.1).skipped and same_everywhere(params) and not equal(params, before)
    optimizer.MAX_SKIPS = 1
    try:
        feed(optimizer, params, bad)
        optimizer.step(0.1)
        raise SystemExit("went on")
    except FloatingPointError as error:
        assert "first in p2:" in str(error)  # on all alike, wherever the number lies

# 6. A micro-batch after the one called the last would miss the sum: refused.
feed(optimizer, params, grads)
try:
    feed(optimizer, params, grads)
    raise SystemExit("accepted")
except AssertionError as error:
    assert "after the micro-batch" in str(error)
optimizer.step(0.1)

# 7. bf16 gradients are added up in fp32, over processes and over micro-batches.
p = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
optimizer = zero.ZeRO2([("p", p)], torch.bfloat16, strategy="zero2")
for micro in range(2):
    feed(optimizer, [p], [torch.full((8,), 2.0 ** -(10 * (rank == 1) + micro), dtype=torch.bfloat16)], last=micro == 1)
assert (optimizer.buckets[0].grad == 1.5 * (world - 1 + 2.0 ** -10)).all()
optimizer.step(1e-3)

# 8. Adapters on a frozen base.
model = llama()
lora.attach(model, 2, dtype=torch.float32, generator=torch.Generator().manual_seed(1))
frozen = model.tok_embeddings.weight.detach().clone()
optimizer = zero.ZeRO2(model.named_parameters(), strategy="zero2")
train(optimizer, model, 2)
trained = [p for p in model.parameters() if p.requires_grad]
assert same_everywhere(trained) and any((p != 0).all() for n, p in model.named_parameters() if "lora_B" in n or n.endswith(".B"))
assert torch.equal(frozen, model.tok_embeddings.weight) and sum(len(b.m) for b in optimizer.buckets) <= sum(p.numel() for p in trained) / world + 2 * world

# 9. Bytes are under way before backward ends.
model = Llama(config, generator=torch.Generator().manual_seed(0))
optimizer = zero.ZeRO2(model.named_parameters(), bucket_elements=4096, strategy="zero2", trace=True)
optimizer.backward(lm(model, TOKENS))
during = [row for row in optimizer.timeline.rows[:[row[1] for row in optimizer.timeline.rows].index("backward ends")]]
assert sum(row[1] == "launch" for row in during) > 3 and max(row[4] for row in during) > 4 * 4096
optimizer.step(1e-3)
assert optimizer.timeline is None
data.run.stop()
print("done", flush=True)
"""


def adamw_of_the_whole(model: Llama, steps: int) -> None:
    alone = torch_adamw(list(model.parameters()))
    for param_group in alone.param_groups:
        param_group["lr"], param_group["eps"] = 1e-3, 1e-3  # a small epsilon makes a difference of rounding one of sign
    for _ in range(steps):
        lm(model, TOKENS).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        alone.step()
        alone.zero_grad()


def relative(a: Iterable[Tensor], b: Iterable[Tensor]) -> float:
    a, b = (torch.cat([x.detach().flatten().double() for x in xs]) for xs in (a, b))
    return ((a - b).norm() / b.norm()).item()


def live_bytes() -> int:
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = [x for x in gc.get_objects() if isinstance(x, Tensor)]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def test_two_and_four_processes(tmp_path):
    for world in (4, 2):
        result, = processes(tmp_path, world, WORKER, tmp_path)
        assert result.returncode == 0 and result.stdout.count("done") == world, result.stdout + result.stderr
        assert result.stdout.count("timeline of process 0") == 1 and "MB under way" in result.stdout
    # Saved on two, and on four: resumed on one.
    for world in (4, 2):
        saved, later = torch.load(tmp_path / f"params-{world}.pt")
        model = llama()
        size = sum((tmp_path / f"state-{world}-{rank}.pt").stat().st_size for rank in range(world))
        assert size < 1.1 * 12 * sum(p.numel() for p in model.parameters()) + world * 20_000  # Z11; + names
        optimizer = zero.ZeRO2(model.named_parameters(), weight_decay=0.1, max_norm=0.5, eps=1e-3, strategy="naive")
        optimizer.load_state_dict([torch.load(tmp_path / f"state-{world}-{rank}.pt", weights_only=True) for rank in range(world)])
        assert equal(list(model.parameters()), saved) and optimizer.updates == 3
        for _ in range(3):
            optimizer.backward(lm(model, TOKENS))
            optimizer.step(1e-3)
        assert relative(model.parameters(), later) < 1e-6


DYING = """
import os, sys, time
import torch
import data.run
import zero
data.run.Watch.SILENCE, data.run.Watch.INTERVAL = 3.0, 0.25
rank, world, *_ = data.run.start("cpu")
data.run.all_reduce(torch.ones(1))
if rank == int(sys.argv[2]):
    if sys.argv[1] == "raise":
        raise LookupError("no such thing")
    os.kill(os.getpid(), 9)
data.run.all_reduce(torch.ones(1))
"""


@pytest.mark.parametrize("how, who, word", [("raise", 1, "process 1 failed: LookupError: no such thing"), ("raise", 0, "process 0 failed: LookupError: no such thing"),
                                            ("kill", 1, "process 1 has died or hangs"), ("kill", 0, "process 0, or the torchrun that started it, has died")])
def test_nobody_waits_for_a_dead_process(tmp_path, how, who, word):
    assert data.run.Watch.SILENCE + 5 * data.run.Watch.INTERVAL < 60
    results = processes(tmp_path, 2, DYING, how, who, launcher=False)
    assert f"process {1 - who} stops: {word}" in results[1 - who].stderr, results[1 - who].stderr
    assert results[1 - who].returncode == 1 and results[who].returncode == (1 if how == "raise" else -9)


def test_silence_is_counted_in_beats():
    """A job that was suspended finds that hours have passed; nobody has died of it. Here no time passes at all."""
    watch = data.run.Watch.__new__(data.run.Watch)
    beats, ended = iter([False] * 12 + [True]), []
    said = iter(["alive 0"] * 3 + ["alive 1"] * 20)  # process 1 is heard at beats 0 and 3, and then no longer
    watch.rank, watch.world, watch.INTERVAL, watch.SILENCE = 0, 2, 1.0, 5.0
    watch.over = types.SimpleNamespace(wait=lambda seconds: next(beats))
    watch.store = types.SimpleNamespace(set=lambda key, word: setattr(watch, "word", word), multi_get=lambda keys: [watch.word.encode(), next(said).encode()])
    watch.end = lambda why: ended.append((watch.word, why))
    watch.run()
    assert ended[0] == ("alive 9", "process 1 has died or hangs: no sign of life for 5 s")  # more than 5 beats after beat 3


@pytest.mark.parametrize("world, flags", [(1, ["--strategy", "naive"]), (1, ["--strategy", "naive", "--lora_rank", "16"]), (2, ["--strategy", "zero2"]), (2, ["--strategy", "zero2_cpu", "--lora_rank", "16"])])
def test_plan_is_what_is_measured(tmp_path, world, flags):
    """S18: a plan without activations, logits and buckets."""
    code = "import sys, zero; zero.main(sys.argv[1:])"
    result, = processes(tmp_path, world, code, "--bench", "--dtype", "fp32", "--steps", 1, "--batch_size", 2 // world, *flags)
    assert result.returncode == 0, result.stderr
    row = json.loads(next(line for line in result.stdout.splitlines() if line.startswith("{")))
    assert row["planned_gb"] == pytest.approx(row["peak_above_start_up_gb"], rel=0.1), row
