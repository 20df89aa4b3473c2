"""zero.py against torch's own AdamW and plain autograd, on one process and on two real ones (gloo)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zero
from model import Llama, LlamaConfig

ROOT = Path(__file__).parents[1]
CONFIG = LlamaConfig(dim=16, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=8, ffn_dim=20, vocab_size=37, max_seq_len=16)
TOKENS = torch.arange(8 * 10).view(8, 10) ** 2 % 37


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two would fight over 16 x 16 matrices, and take longer."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


@pytest.mark.parametrize("bucket_elements", [1, 500, 2**22])
@pytest.mark.parametrize("tied", [False, True])
def test_twenty_steps_are_torchs_to_the_bit(bucket_elements, tied):
    """Matrices decayed and norms not (Z14), a changing learning rate; a tied head is one parameter."""
    ours, theirs = llama(tied), llama(tied)
    reference, optimizer = torch_adamw(list(theirs.parameters())), zero.ZeRO2(ours.named_parameters(), weight_decay=0.1, max_norm=0, bucket_elements=bucket_elements)
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


def test_clipping_is_by_the_norm_before_it():
    """Z04: clipping that did nothing while another norm was reported."""
    for max_norm in (0.5, 0, 100.0):
        (ours, _), (theirs, grads) = (some((6, 4), (9,)) for _ in range(2))
        grads = [10 * g / torch.cat([g.flatten() for g in grads]).norm() for g in grads]
        optimizer, reference = zero.ZeRO2(named(ours), weight_decay=0.1, max_norm=max_norm), torch_adamw(theirs, lr=0.1)
        for size in (1.0, 0.01):  # Adam forgets a factor common to all steps, so the second gradient has another
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


def test_frozen_parameters_are_left_alone():
    model, before = llama(), [p.detach().clone() for p in llama().parameters()]
    model.tok_embeddings.weight.requires_grad_(False)
    optimizer = zero.ZeRO2(model.named_parameters(), torch.bfloat16, weight_decay=0.1)
    assert "tok_embeddings.weight" not in [name for bucket in optimizer.buckets for name in bucket.names]
    model.tok_embeddings.weight.data = model.tok_embeddings.weight.bfloat16()
    optimizer.backward(lm(model, TOKENS))
    optimizer.step(0.1)
    assert torch.equal(model.tok_embeddings.weight, before[0].bfloat16()) and model.tok_embeddings.weight.grad is None
    assert not any(torch.equal(p.float(), old) for p, old in list(zip(model.parameters(), before))[1:])
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
    assert zero.start("cpu", "naive") == (0, 1, torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="GPU 0, but there are 0.*--device cpu"):
        zero.start("cuda")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="naive is for one process and 2 were started.*--strategy ddp"):
        zero.start("cpu", "naive")


WORKER = """
import torch
from torch import nn
import torch.distributed as dist
import zero
from test_zero import TOKENS, distance, equal, feed, llama, lm, named, some, torch_adamw

rank, world, _ = zero.start("cpu")
assert world == 2 and zero.broadcast_object(f"from {rank}") == "from 0"

def same_everywhere(params):
    flat = torch.cat([p.detach().flatten() for p in params])
    both = [torch.empty_like(flat) for _ in range(2)]
    dist.all_gather(both, flat)
    return torch.equal(*both)

# 1. Each half of the batch = the batch on one process; the parameters stay equal to the bit. Many buckets.
ours, theirs = llama(), llama()
optimizer = zero.ZeRO2(ours.named_parameters(), weight_decay=0.1, max_norm=0.5, eps=1e-3, bucket_elements=50)
alone = torch_adamw(list(theirs.parameters()))
assert len(optimizer.buckets) > 10
for step in range(5):
    for i in range(2):
        optimizer.backward(lm(ours, TOKENS[4 * rank + 2 * i:4 * rank + 2 * i + 2]), last=i == 1)
    lm(theirs, TOKENS).backward()
    optimizer.flush()
    theirs_by_name = dict(theirs.named_parameters())
    for bucket in optimizer.buckets:
        for name, span in zip(bucket.names, bucket.spans):
            assert distance([bucket.grad[span]], [theirs_by_name[name].grad.flatten()]) < 1e-6, name
    norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5).item()
    stats = optimizer.step(1e-2)
    assert abs(stats.grad_norm - norm) < 1e-5 * norm and norm > 0.5, (stats, norm)  # of all processes, not of this one
    for group in alone.param_groups:
        group["lr"], group["eps"] = 1e-2, 1e-3
    alone.step()
    alone.zero_grad()
assert same_everywhere(ours.parameters()) and distance(list(ours.parameters()), list(theirs.parameters())) < 1e-5

# 2. Other parameters silent here than there; then nothing on rank 1; then nothing anywhere. A collective between.
(params, _), (lone, grads) = some((4, 4), (5,), (3, 2)), some((4, 4), (5,), (3, 2))
optimizer, alone = zero.ZeRO2(named(params), max_norm=0, weight_decay=0.1, bucket_elements=1), torch_adamw(lone, lr=0.1)
for used in (((0, 2), (1,)), ((1,), (0, 1, 2)), ((0, 1, 2), ()), ((), ())):
    if used[rank]:
        feed(optimizer, [params[i] for i in used[rank]], [grads[i] for i in used[rank]])
    optimizer.flush()
    assert zero.all_reduce(torch.ones(3)).tolist() == [2, 2, 2]
    optimizer.step(0.1)
    for i, p in enumerate(lone):
        p.grad = grads[i] * (used[0] + used[1]).count(i)
    alone.step()
    assert same_everywhere(params) and distance(params, lone) < 1e-6, used

# 3. NaN on rank 1 only: both skip, and go on together.
before = [p.detach().clone() for p in params]
feed(optimizer, params, [g * (float("nan") if rank else 1) for g in grads])
assert optimizer.step(0.1).skipped and optimizer.skipped == 1 and equal(params, before)
feed(optimizer, params, grads)
assert not optimizer.step(0.1).skipped and same_everywhere(params) and not equal(params, before)

# 4. A micro-batch after the one called the last would miss the sum: refused.
feed(optimizer, params, grads)
try:
    feed(optimizer, params, grads)
    raise SystemExit("accepted")
except AssertionError as error:
    assert "after the micro-batch" in str(error)
optimizer.step(0.1)
zero.stop()
print("done", flush=True)
"""


def test_two_processes(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(tmp_path / "worker.py")]
    result = subprocess.run(command, env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and result.stdout.count("done") == 2, result.stdout + result.stderr
