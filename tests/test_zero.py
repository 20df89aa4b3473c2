"""zero.py against torch's own AdamW and plain autograd, on one process and on two and four real ones (gloo).

What several processes do is in the functions named `check_...`: the processes run them all in turn, and each is
reported by a test of its own.
"""

import contextlib
import ctypes
import dataclasses
import gc
import io
import os
import re
import signal
import traceback
import warnings
import weakref
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora
import quantize
import sft
import zero
from data import run
from model import SHAPES, Llama, LlamaConfig

CONFIG = LlamaConfig(dim=16, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=8, ffn_dim=20, vocab_size=37, max_seq_len=16)
WIDER = LlamaConfig(dim=64, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=32, ffn_dim=96, vocab_size=99, max_seq_len=16)
TOKENS = torch.arange(8 * 10).view(8, 10) ** 2 % 37


def llama(tied: bool = False, config: LlamaConfig = CONFIG) -> Llama:
    return Llama(LlamaConfig(**vars(config) | {"tie_embeddings": tied}), generator=torch.Generator().manual_seed(0))


def lm(model: Llama, tokens: Tensor, n: int = 8 * 9) -> Tensor:
    logits = model(tokens)[:, :-1].flatten(0, 1).float()
    return F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum") / n


def torch_adamw(params: list[nn.Parameter], decay: float = 0.1, **more) -> torch.optim.AdamW:
    """Torch's AdamW, which decays matrices only, as zero.py does."""
    groups = [{"params": [p for p in params if p.dim() > 1], "weight_decay": decay},
              {"params": [p for p in params if p.dim() <= 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, **{"betas": (0.9, 0.95), "eps": 1e-8, "fused": True} | more)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def some(*shapes: tuple[int, ...]) -> tuple[list[nn.Parameter], list[Tensor]]:
    """Parameters, and gradients for them."""
    rng = torch.Generator().manual_seed(3)
    params = [nn.Parameter(torch.randn(shape, generator=rng)) for shape in shapes]
    return params, [torch.randn(shape, generator=rng) for shape in shapes]


def feed(optimizer: zero.ZeRO2, params: list[nn.Parameter], grads: list[Tensor], last: bool = True) -> None:
    """A backward that gives exactly these gradients; without parameters, a micro-batch without examples."""
    optimizer.backward(sum((p * g).sum() for p, g in zip(params, grads)) if params else None, last)


def named(params: list[nn.Parameter]) -> list[tuple[str, nn.Parameter]]:
    return [(f"p{i}", p) for i, p in enumerate(params)]


def equal(a: Iterable[Tensor], b: Iterable[Tensor]) -> bool:
    return all(map(torch.equal, a, b))


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a, b))


def relative(a: Iterable[Tensor], b: Iterable[Tensor]) -> float:
    a, b = (torch.cat([x.detach().flatten().double() for x in xs]) for xs in (a, b))
    return ((a - b).norm() / b.norm()).item()


def state_of(optimizer: zero.ZeRO2) -> list[Tensor]:
    return [x for bucket in optimizer.buckets for x in (bucket.master, bucket.m, bucket.v)]


def elements(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# ---- formulas -------------------------------------------------------------------------------------------------------

@pytest.mark.lesson
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


@pytest.mark.lesson
def test_first_step_moves_every_weight_by_lr():
    """The bias correction at step 1: without decay the size of a gradient does not count."""
    gradient, nothing = torch.tensor([1e-3, 1.0, -50.0]), torch.zeros(3)
    moved, _, _ = zero.adamw(nothing, gradient, nothing, nothing, 1, 0.5, (0.9, 0.95), 1e-8, 0.0)
    assert moved.tolist() == pytest.approx([-0.5, -0.5, 0.5], rel=1e-4)


@pytest.mark.lesson
@pytest.mark.parametrize("divisor", [1.0, 4.0])
def test_the_fused_pass_is_the_formula(divisor):
    """In chunks of which the last is not full, the gradient divided before, the low copy made from the new weights."""
    (p, m, v), (g, *_) = some((1000,), (1000,), (1000,))
    p, m, v = p.detach(), m.detach(), v.detach().abs()
    low = torch.zeros(1000, dtype=torch.bfloat16)
    expected = zero.adamw(p.double(), g.double() / divisor, m.double(), v.double(), 3, 0.1, (0.9, 0.95), 1e-8, 0.1)
    zero.fused_adamw(p, g.clone(), m, v, low, 3, 0.1, (0.9, 0.95), 1e-8, 0.1, divisor=divisor, chunk=64)
    assert distance([p, m, v], [x.float() for x in expected]) < 1e-6 and torch.equal(low, p.bfloat16())


@pytest.mark.lesson
def test_norm_of_a_long_vector():
    """torch's own fp32 norm is 5e-4 off here, and clipping with it differs between one process and two."""
    x = torch.randn(2**23 + 5, generator=torch.Generator().manual_seed(0))
    assert zero.sum_of_squares(x).item() == pytest.approx(x.double().square().sum().item(), rel=1e-6)


# ---- one process ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bucket_elements, tied, strategy", [
    (1, True, "naive"), (500, False, "zero2"), (2**20, True, "zero2_cpu"), (2**20, False, "ddp")])
def test_twenty_steps_are_torchs_to_the_bit(bucket_elements, tied, strategy):
    """Matrices decayed and norms not, a changing learning rate; a tied head is one parameter; any strategy."""
    ours, theirs = llama(tied), llama(tied)
    reference = torch_adamw(list(theirs.parameters()))
    optimizer = zero.ZeRO2(ours.named_parameters(), weight_decay=0.1, max_norm=1e9, bucket_elements=bucket_elements,
                           strategy=strategy)
    assert (len(optimizer.buckets) > 10) == (bucket_elements == 1)
    assert sum(bucket.master.numel() for bucket in optimizer.buckets) == elements(theirs)
    for step in range(1, 21):
        optimizer.backward(lm(ours, TOKENS))
        optimizer.step(lr=1e-2 / step)
        lm(theirs, TOKENS).backward()
        set_lr(reference, 1e-2 / step)
        reference.step()
        reference.zero_grad()
    assert equal(ours.parameters(), theirs.parameters())
    assert all(p.grad is None for p in ours.parameters())
    assert not tied or ours.output.weight is ours.tok_embeddings.weight


def test_bf16_learns_what_is_smaller_than_its_step():
    """Norms that stayed 1.0 for a whole training, because 1.0 - 6e-4 is 1.0 in bf16."""
    p, lone = (nn.Parameter(torch.ones(64, dtype=torch.bfloat16)) for _ in range(2))
    g, exact = torch.linspace(0.5, 2, 64), nn.Parameter(torch.ones(64))
    optimizer = zero.ZeRO2([("norm", p)], torch.bfloat16, max_norm=0)
    reference, control = (torch.optim.AdamW([q], lr=6e-4, betas=(0.9, 0.95), weight_decay=0.0) for q in (exact, lone))
    for _ in range(100):
        feed(optimizer, [p], [g.bfloat16()])
        optimizer.step(6e-4)
        exact.grad, lone.grad = g.bfloat16().float(), g.bfloat16()
        reference.step()
        control.step()
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
    with pytest.raises(OSError, match="full"), optimizer.masters():  # where saving fails, the model stays in bf16
        assert torch.equal(p.detach(), exact)
        raise OSError("the disk is full")
    assert torch.equal(p.detach(), exact.bfloat16())


@pytest.mark.parametrize("max_norm, small", [(0.5, 0.01), (0, 0.01), (100.0, 0.01), (1e-5, 1e-5)])
def test_clipping_is_by_the_norm_before_it(max_norm, small):
    """Clipping that did nothing while another norm was reported. At a norm of 1e-5 torch's 1e-6 shows."""
    (ours, _), (theirs, grads) = (some((6, 4), (9,)) for _ in range(2))
    grads = [10 * g / torch.cat([g.flatten() for g in grads]).norm() for g in grads]
    optimizer = zero.ZeRO2(named(ours), weight_decay=0.1, max_norm=max_norm)
    reference = torch_adamw(theirs, lr=0.1)
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
    """Only the first micro-batch reached the buffer."""
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
        assert distance(ours, theirs) < 1e-6  # not to the bit: torch rounds what fills no vector otherwise


def test_frozen_parameters_are_left_alone(tmp_path):
    model, before = llama(), [p.detach().clone() for p in llama().parameters()]
    model.tok_embeddings.weight.requires_grad_(False)
    optimizer = zero.ZeRO2(model.named_parameters(), torch.bfloat16, weight_decay=0.1)
    assert "tok_embeddings.weight" not in [name for bucket in optimizer.buckets for name in bucket.names]
    model.tok_embeddings.weight.data = model.tok_embeddings.weight.bfloat16()
    optimizer.backward(lm(model, TOKENS))
    optimizer.step(0.1)
    assert torch.equal(model.tok_embeddings.weight, before[0].bfloat16()) and model.tok_embeddings.weight.grad is None
    trained = list(model.parameters())[1:]
    assert not any(torch.equal(p.float(), old) for p, old in zip(trained, before[1:]))
    with optimizer.masters():
        model.save_pretrained(tmp_path)
    again = Llama.from_pretrained(tmp_path)  # all of them are in the file, and not the buckets that they are views of
    assert torch.equal(again.tok_embeddings.weight, before[0].bfloat16().float())
    assert equal([p.bfloat16() for p in list(again.parameters())[1:]], trained)
    assert (tmp_path / "model.safetensors").stat().st_size < 1.1 * 4 * elements(model) + 4000  # + names


@pytest.mark.parametrize("bucket_elements", [1, 2**22])
def test_empty_parameters(bucket_elements):
    """Zero-element parameters at the start, in the middle and at the end."""
    shapes = ((0,), (3, 2), (0, 4), (5,), (2, 0))
    (ours, _), (theirs, grads) = some(*shapes), some(*shapes)
    optimizer = zero.ZeRO2(named(ours), max_norm=0, bucket_elements=bucket_elements)
    reference = torch_adamw([p for p in theirs if p.numel()], 0.0, lr=0.1)
    for _ in range(3):
        feed(optimizer, ours, grads)
        optimizer.step(0.1)
        for p, g in zip(theirs, grads):
            p.grad = g
        reference.step()
    assert distance([p for p in ours if p.numel()], [p for p in theirs if p.numel()]) < 1e-6


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_gradient_skips_the_step_and_twenty_stop_the_run(bad):
    """Skipped without a word, and nothing learnt."""
    params, grads = some((4, 4), (5,))
    optimizer = zero.ZeRO2(named(params), bucket_elements=1)
    feed(optimizer, params, grads)
    assert not optimizer.step(0.1).skipped
    before = [t.clone() for t in state_of(optimizer)]
    broken = grads[1].clone()
    broken[2] = bad
    for i in range(1, 20):
        feed(optimizer, params, [grads[0], broken])
        assert optimizer.step(0.1).skipped and (optimizer.skipped, optimizer.updates) == (i, 1)
    assert equal(before, state_of(optimizer)) and optimizer.scale == 1
    feed(optimizer, params, [grads[0], broken])
    with pytest.raises(FloatingPointError, match="20 steps in a row.* p1:"):
        optimizer.step(0.1)
    feed(optimizer, params, grads)
    assert not optimizer.step(0.1).skipped and (optimizer.skips_in_row, optimizer.updates) == (0, 2)


def test_fp16_loss_scale_halves_doubles_and_ends(monkeypatch):
    """A scale that never recovered, and a run that ended after 14 hours without a reason."""
    monkeypatch.setattr(zero.ZeRO2, "GROWTH", 3)
    params, grads = some((4, 4), (5,))
    optimizer = zero.ZeRO2(named(params), torch.float16, max_norm=0)
    exact = [p.detach().float().clone() for p in params]
    assert optimizer.scale == 65536 and params[0].dtype == torch.float16
    feed(optimizer, params, [g.half() for g in grads])  # 65536 is beyond fp16's largest number
    assert optimizer.step(0.1).skipped and optimizer.scale == 32768 and equal([p.float() for p in params], exact)
    grads = [g / 1024 for g in grads]
    norm = torch.cat([g.flatten() for g in grads]).norm().item()
    for scale in (32768, 32768, 65536):
        feed(optimizer, params, [g.half() for g in grads])
        stats = optimizer.step(0.1)
        assert not stats.skipped and optimizer.scale == scale and stats.grad_norm == pytest.approx(norm, rel=1e-2)
    assert relative(optimizer.buckets[0].m, (1 - 0.9**3) * grads[0]) < 1e-2  # the moments know nothing of the scale
    optimizer.good_in_row = 2
    other = zero.ZeRO2(named(some((4, 4), (5,))[0]), torch.float16)
    other.load_state_dict([optimizer.state_dict()])
    assert (other.scale, other.good_in_row, other.skipped, other.updates) == (65536, 2, 1, 3)
    optimizer.scale = 1.0
    feed(optimizer, params, [grads[0].half(), torch.full((5,), float("inf")).half()])
    with pytest.raises(FloatingPointError, match="loss scale 1, first in p1"):
        optimizer.step(0.1)


@pytest.mark.parametrize("more", [{}, {"dtype": torch.float16}])
def test_gradients_of_a_plain_backward_are_never_lost(more):
    """loss.backward() instead of the optimizer's own: they were dropped but for the last call's, silently."""
    params, grads = some((4, 4), (5,))
    optimizer = zero.ZeRO2(named(params), **more)
    before = [p.detach().clone() for p in params]
    for refused in (lambda: optimizer.step(0.1), lambda: feed(optimizer, params, grads)):
        params[1].sum().backward()
        with pytest.raises(RuntimeError, match=r"p1 has a gradient .*call optimizer.backward\(loss\)"):
            refused()
        assert equal(params, before)
        params[1].grad = None
    feed(optimizer, params, [g / 2**17 for g in grads])
    params[1].sum().backward()
    with pytest.raises(RuntimeError, match="p1 has a gradient"):  # also after the step's last micro-batch
        optimizer.step(0.1)
    params[1].grad = None
    assert not optimizer.step(0.1).skipped and not equal(params, before)  # goes on as if nothing had been


class Stream:
    """Stands in for a CUDA stream and its events: copies are made at once, and what waits for what is written down."""

    def __init__(self, name: str, story: list[str]):
        self.name, self.story = name, story

    def wait_stream(self, other: "Stream") -> None:
        self.story.append(f"{self.name} waits for {other.name}")

    wait_event = wait_stream

    def record_event(self) -> "Stream":
        return Stream(f"an event of {self.name}", self.story)

    def synchronize(self) -> None:
        self.story.append(f"the host waits for {self.name}")


@pytest.fixture
def streams(monkeypatch) -> list[str]:
    """CUDA's streams replaced; returns what they will tell."""
    story = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("copies", story))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("compute", story))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(Tensor, "record_stream", lambda x, stream: story.append(f"memory is kept for {stream.name}"))
    return story


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_way_over_cpu_memory_changes_no_bit(dtype, streams):
    """What zero2_cpu does beside a GPU; more buckets than pinned buffers, and more than one micro-batch."""
    direct, around = llama(), llama()
    a, b = (zero.ZeRO2(model.named_parameters(), dtype, weight_decay=0.1, max_norm=0.5, bucket_elements=100,
                       strategy="zero2_cpu") for model in (direct, around))
    b.copies = zero.CopyStream(b.buckets)
    assert a.copies is None and len(b.buckets) > 2 * b.copies.BUFFERS
    for step in range(3):
        for optimizer, model in ((a, direct), (b, around)):
            for i in range(2):  # with offload, only the first micro-batch counted
                optimizer.backward(lm(model, TOKENS[4 * i:4 * i + 4]), last=i == 1)
        stats = a.step(1e-2), b.step(1e-2)
        assert stats[0][:2] == stats[1][:2] and stats[1].copying > 0 == stats[0].copying
        assert equal(direct.parameters(), around.parameters())
    assert equal(state_of(a), state_of(b))


def test_copies_wait_for_what_they_need(streams):
    """A gradient that is copied before it is computed, or whose memory is given away; weights used before they came."""
    (p,), (g,) = some((6, 4))
    optimizer = zero.ZeRO2([("p", p)], torch.bfloat16)
    optimizer.copies = zero.CopyStream(optimizer.buckets)
    feed(optimizer, [p], [g.bfloat16()])
    assert streams == ["copies waits for compute", "memory is kept for copies"]
    streams.clear()
    optimizer.step(0.1)
    assert streams == ["the host waits for an event of copies",  # the gradient is there
                       "copies waits for compute", "compute waits for an event of copies"]
    streams.clear()
    for _ in range(optimizer.copies.BUFFERS):
        optimizer.copies.buffer(g.view(-1))
        assert not streams or streams == ["the host waits for an event of copies"]
        optimizer.copies.start(torch.zeros(24), g.view(-1), optimizer.buckets[0])
        assert len(optimizer.copies.running) <= optimizer.copies.BUFFERS
        streams[:] = [word for word in streams if word.startswith("the host")]
    assert streams == ["the host waits for an event of copies"]  # the copy that used the buffer last has ended


def test_aliases_of_coati():
    ours = {"colossalai_zero2": "zero2", "colossalai_zero2_cpu": "zero2_cpu", "colossalai_gemini": "zero2_cpu"}
    for name, strategy in ours.items():
        assert name in run.STRATEGIES and zero.ZeRO2(named(some((3,))[0]), strategy=name).strategy == strategy


# ---- state ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_goes_through_a_file_and_on(tmp_path, dtype):
    """By name and whole, so another cut into buckets loads it; what is saved is no larger than what it holds."""
    first, second = llama(), Llama(CONFIG)
    a = zero.ZeRO2(first.named_parameters(), dtype, weight_decay=0.1)
    b = zero.ZeRO2(second.named_parameters(), dtype, weight_decay=0.1, bucket_elements=100)
    for _ in range(2):
        a.backward(lm(first, TOKENS))
        a.step(1e-2)
    torch.save(a.state_dict(), tmp_path / "state.pt")
    assert (tmp_path / "state.pt").stat().st_size < 1.1 * 12 * elements(first) + 20_000  # + names
    b.load_state_dict([torch.load(tmp_path / "state.pt", weights_only=True)])
    assert equal(first.parameters(), second.parameters()) and next(second.parameters()).dtype == dtype
    for optimizer, model in ((a, first), (b, second)):
        optimizer.backward(lm(model, TOKENS))
        optimizer.step(1e-2)
    after = [[p.float() for p in model.parameters()] for model in (first, second)]
    assert distance(*after) < (1e-6 if dtype == torch.float32 else 1e-2)


# ---- the memory plan ------------------------------------------------------------------------------------------------

@pytest.mark.lesson
@pytest.mark.parametrize("name, total", [("7B", 6_738_415_616), ("13B", 13_015_864_320), ("70B", 68_976_648_192)])
def test_size_of_the_published_models(name, total):
    assert zero.size_of(SHAPES[name]).total == total


@pytest.mark.parametrize("tied", [False, True])
def test_size_of_a_model(tied):
    model = llama(tied)
    size, adapted = zero.size_of(model.config), zero.size_of(model.config, 4)
    assert size.total == size.trained == elements(model) and size.largest == 37 * 16
    lora.attach(model, 4)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (adapted.total, adapted.trained, adapted.largest) == (elements(model), trained, 4 * 20)


@pytest.mark.parametrize("bits, group_size", [(8, -1), (4, 128), (4, 32)])
def test_bytes_of_a_quantized_matrix(bits, group_size):
    """304 columns are two groups of 128 and one of 48."""
    kind = {8: quantize.Linear8, 4: quantize.Linear4}[bits]
    layer = kind.of(quantize.rtn(torch.randn(48, 304), bits, group_size, bits == 8))
    found = sum(buffer.nbytes for buffer in layer.buffers())
    assert found == zero.code_bytes(nn.Linear(304, 48), bits, group_size)


class Live(TorchDispatchMode):
    """Adds up the bytes of tensors while they live; views are not counted."""
    now = most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **kwargs or {})
        if made.data_ptr() not in [x.data_ptr() for x in args if isinstance(x, Tensor)]:
            self.now += made.nbytes
            self.most = max(self.most, self.now)
            weakref.finalize(made, lambda n: setattr(self, "now", self.now - n), made.nbytes)
        return made


@pytest.mark.parametrize("bits", [8, 4])
def test_bytes_while_a_matrix_is_dequantized(bits):
    kind = {8: quantize.Linear8, 4: quantize.Linear4}[bits]
    layer = kind.of(quantize.rtn(torch.randn(256, 512), bits, -1, bits == 8))
    with Live() as live:
        layer.dequantize(torch.bfloat16)
    assert live.most == pytest.approx(zero.DEQUANTIZED[bits] * 256 * 512, rel=0.03)


@pytest.mark.parametrize("dtype, rank", [(torch.float32, 0), (torch.float32, 4), (torch.bfloat16, 4)])
def test_activations_are_what_autograd_keeps(dtype, rank):
    config = LlamaConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=160, vocab_size=99,
                         max_seq_len=64)
    model, tokens, kept = Llama(config).to(dtype), torch.arange(4 * 64).view(4, 64) % 99, {}
    if rank:
        lora.attach(model, rank)
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model.hidden(tokens)
    size = zero.Size(config, False, 1, 1, 1, rank)
    found = sum(x.untyped_storage().nbytes() for place, x in kept.items() if place not in own)
    planned = zero.activation_bytes(size, tokens.numel(), dtype.itemsize, grad_checkpoint=False, gpu=False)
    assert found == pytest.approx(planned, rel=0.06)  # + rotary tables, the denominators of norms and softmax


@pytest.mark.lesson
def test_plan_is_the_papers_table():
    size = zero.size_of(SHAPES["7B"])
    ddp, zero2, offloaded = (zero.plan(size, name, 4, 512) for name in ("ddp", "zero2", "colossalai_zero2_cpu"))
    P = size.total
    for rows, N in ((ddp, 1), (zero2, 4)):
        on_device = {"weights": 2 * P, "gradient": 4 * P / N, "master": 4 * P / N, "moments": 8 * P / N}
        assert {part: rows[f"device: {part}"] for part in on_device} == on_device and rows["cpu: all"] == 0
    assert offloaded["device: weights"] == 2 * P and offloaded["device: master"] == 0
    assert (offloaded["cpu: gradient"], offloaded["cpu: master"], offloaded["cpu: moments"]) == (P, P, 2 * P)
    L = size.largest  # its gradient, and of zero2 the parts received and their sum in fp32
    buckets = [zero.plan(size, "zero2", nproc, 512)["device: buckets"] for nproc in (1, 2, 4)]
    assert buckets == [2 * L, 2 * L + (2 + 4) * L / 2, 2 * L + (2 + 4) * L / 4] and ddp["device: buckets"] == 2 * L
    pinned = {row: n for row, n in offloaded.items() if "pinned" in row}
    assert pinned == {"device: pinned": 0, "cpu: pinned": 3 * 4 * L / 4}
    V, C, rows = 32000, 4096, 512
    with_adapters = zero.plan(size._replace(rank=16), "ddp", 4, 2 * rows)["device: logits"]
    assert ddp["device: logits"] == 4 * (2 * rows * V + rows * C + V * C)
    assert with_adapters == 4 * (2 * rows * V + 2 * rows * C)  # no head is trained; 512 rows at a time
    assert zero2["sent a step"] == 2 * 2 * P * 3 / 4  # 2 Psi elements ...
    accumulated = zero.plan(size, "zero2", 4, 512, micro_batches=8)
    assert accumulated["sent a step"] == 9 * 2 * P * 3 / 4  # ... Psi a micro-batch and Psi a step
    assert zero.plan(size, "naive", 1, 512, element=4)["device: master"] == 0
    whole, checkpointed = (zero.plan(size, "naive", 1, 512, grad_checkpoint=on)["device: activations"]
                           for on in (False, True))
    norm = inputs = 512 * 2 * 4096
    assert checkpointed - norm == 32 * inputs + (whole - norm) / 32  # the inputs of all blocks, and one block whole
    one_card, no_card = (zero.plan(size, name, 1, 512, grad_checkpoint=True) for name in ("zero2_cpu", "zero2"))
    assert one_card["device: peak at once"] + 2**30 < 24 * 2**30 < no_card["device: peak at once"]
    assert one_card["device <-> cpu a step"] == 2 * 2 * P


def test_plan_on_the_command_line(capsys):
    zero.main(["--plan", "7B", "--nproc", "4", "--lora_rank", "16", "--grad_checkpoint", "--strategy", "zero2"])
    text = capsys.readouterr().out
    assert re.search(r"fits a card of +16 GB", text) and re.search(r"device: weights +13\.5\d GB", text)
    assert "sent a step" in text


@pytest.mark.parametrize("bits, card", [(8, 24), (4, 16)])
def test_ppo_of_7b_beside_quantized_weights(capsys, bits, card):
    """By the rows of an update that ppo.py takes unless told otherwise. Of four models whole, no card holds any."""
    given = ["--plan", "7B", "--ppo", "--batch_size", "8", "--max_len", "128", "--strategy", "naive"]
    zero.main([*given, "--lora_rank", "8", "--bits", str(bits)])
    assert int(re.search(r"fits a card of +(\d+) GB", capsys.readouterr().out)[1]) <= card
    zero.main(given)
    assert re.search("fits a card of +none", capsys.readouterr().out)
    with pytest.raises(ValueError, match=f"--bits {bits} needs --lora_rank: quantized weights are frozen"):
        zero.main([*given, "--bits", str(bits)])


def test_plan_of_a_directory(tmp_path, capsys):
    llama().save_pretrained(tmp_path)
    zero.main(["--plan", str(tmp_path)])
    assert f"{zero.size_of(CONFIG).trained / 1e6:,.1f} M trained" in capsys.readouterr().out


def test_plan_of_a_run_counts_shared_weights_once():
    model, world = llama(), run.World(0, 2, torch.device("cpu"))
    trained = [model]
    _, alone = zero.run_plan(trained, [], "zero2", world, 64, torch.float32)
    _, beside_itself = zero.run_plan(trained, [model], "zero2", world, 64, torch.float32)
    _, with_a_copy = zero.run_plan(trained, [llama()], "zero2", world, 64, torch.float32)
    assert alone == beside_itself == with_a_copy - 4 * elements(model)
    size = zero.size_of(CONFIG)
    assert alone == zero.plan(size, "zero2", 2, 64, element=4, gpu=False)["device: peak at once"]
    model.config = SHAPES["7B"]
    text, _ = zero.run_plan([model], [], "zero2", world, 512, torch.float32)
    parts = [rf"{part} \d+\.\d\d GB" for part in ("activations", "logits", "heap", "peak at once")]
    assert re.fullmatch(f"memory of a process: {', '.join(parts)}", text)


@pytest.mark.lesson
def test_parts_of_a_plan_by_hand():
    """C 16, 3 layers, Q 4 x 8, K 2 x 8, F 24, V 40. Bytes a token in bf16 on a GPU, with adapters of rank 4:"""
    config = LlamaConfig(dim=16, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=24, vocab_size=40)
    size = zero.Size(config, True, 10**5, 10**4, 5000, 4)
    block = 2 * 32 + 2 * 32 + 2 * (2 * 32 + 2 * 16) + 2 * 4 * 24 + 2 * 7 * 4  # norms, their output, attention, FFN, B
    assert zero.activation_bytes(size, 100, 2, False) == 100 * (3 * block + 32)
    assert zero.activation_bytes(size, 100, 2, True) == 100 * (3 * 32 + block + 32)  # the input of each block, and one
    on_cpu = 2 * 128 + 4 * 2 * 16 + 4 * (2 * 32 + 2 * 16) + 4 * 4 * 24  # a norm keeps x and the quotient in fp32
    assert zero.activation_bytes(size._replace(rank=0), 100, 4, False, gpu=False) == 100 * (3 * on_cpu + 128)
    for tokens, cached, alive in ((1, 0, "backward"), (10**4, 0, "forward"), (1, 10**6, "rollout")):
        rows = {row.removeprefix("device: "): n
                for row, n in zero.plan(size, "naive", 1, tokens, cached=cached).items() if row.startswith("device: ")}
        held = {"forward": rows["activations"] + rows["logits"], "backward": rows["gradient"] + rows["buckets"],
                "rollout": rows["packed"] + rows["cache"]}
        assert rows["cache"] == 2 * 2 * 3 * 16 * cached and max(held, key=held.get) == alive
        always = 2 * 10**5 + 4 * 10**4 + 8 * 10**4  # weights, master, moments
        assert rows["peak at once"] == always + held[alive]
    on_cpu = zero.plan(size, "naive", 1, 10**4, gpu=False, cached=10**6)  # a rollout leaves holes behind
    forward, *parts = (on_cpu[f"device: {part}"] for part in ("activations", "logits", "packed", "cache", "heap"))
    assert on_cpu["device: peak at once"] == always + forward + sum(parts) and min(parts) > 0


@pytest.mark.parametrize("tied", [False, True])
def test_size_of_ppos_models_is_theirs(tied):
    """Actor and critic learn; the reference and the reward model do not."""
    config = llama(tied).config
    actor, critic = elements(Llama(config)), elements(Llama(config, head=False)) + config.dim
    size = zero.size_of(config, ppo=True)
    assert (size.trained, size.total) == (actor + critic, 2 * (actor + critic))


@pytest.mark.parametrize("tokens", [1, 10**5])
def test_plan_of_a_run_has_the_activations_of_its_biggest_model(tokens):
    """dim 16 x 20 layers is more than dim 64 x 2. With few tokens the largest gradient counts."""
    wide, deep = llama(config=WIDER), llama(config=dataclasses.replace(CONFIG, n_layers=20))
    text, found = zero.run_plan([wide, deep], [], "ddp", run.World(0, 2, torch.device("cpu")), tokens, torch.float32)
    total, largest = elements(wide) + elements(deep), max(p.numel() for p in wide.parameters())
    size = zero.Size(deep.config, True, total, total, largest)
    rows = zero.plan(size, "ddp", 2, tokens, element=4, gpu=False)
    assert found == rows["device: peak at once"]
    if tokens > 1:  # what rounds to 0.01 is shown
        assert 5e6 < rows["device: logits"] < 1e7 and "logits 0.01 GB" in text


# ---- processes ------------------------------------------------------------------------------------------------------

def same_everywhere(params: Iterable[Tensor]) -> bool:
    flat = torch.cat([p.detach().flatten() for p in params])
    all_of_them = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(all_of_them, flat)
    return all(torch.equal(x, flat) for x in all_of_them)


def train(optimizer: zero.ZeRO2, model: Llama, steps: int) -> None:
    """Steps on all rows of TOKENS, in micro-batches of one row. The first process has a row fewer than the others and
    the last a row more: where one has none left, it takes part with None."""
    rank, world = dist.get_rank(), dist.get_world_size()
    rows = 8 // world
    mine = [rank * rows + i for i in range(rows)]
    mine = (mine[:-1] if rank == 0 else mine) + ([rows - 1] if rank == world - 1 else [])
    for _ in range(steps):
        for i in range(rows + 1):
            loss = lm(model, TOKENS[mine[i]:mine[i] + 1]) if i < len(mine) else None
            optimizer.backward(loss, last=i == rows)
            assert run.all_reduce(torch.ones(3)).tolist() == [world] * 3  # another collective between is legal
        optimizer.step(1e-3)


def adamw_of_the_whole(model: Llama, steps: int) -> None:
    alone = torch_adamw(list(model.parameters()), eps=1e-3, lr=1e-3)  # a small eps turns rounding into another sign
    for _ in range(steps):
        lm(model, TOKENS).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        alone.step()
        alone.zero_grad()


def sharded(model: Llama, **more) -> zero.ZeRO2:
    settings = {"weight_decay": 0.1, "max_norm": 0.5, "eps": 1e-3, "strategy": "zero2"}
    return zero.ZeRO2(model.named_parameters(), **settings | more)


def live_bytes() -> int:
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = [x for x in gc.get_objects() if isinstance(x, Tensor)]
    storages = [x.untyped_storage() for x in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def check_twenty_steps_on_shares_are_adamw_on_the_batch(rank: int, world: int, folder: Path) -> None:
    """And parameters are equal to the bit everywhere."""
    cases = [("zero2", True, 50), ("zero2_cpu", False, 2**20)] + [("ddp", False, 50)] * (world == 2)
    for strategy, tied, size in cases:
        ours, theirs = llama(tied), llama(tied)
        optimizer = sharded(ours, bucket_elements=size, strategy=strategy)
        assert (len(optimizer.buckets) > 10) == (size == 50)
        train(optimizer, ours, 20)
        adamw_of_the_whole(theirs, 20)
        assert same_everywhere(ours.parameters())
        assert relative(ours.parameters(), theirs.parameters()) < 1e-6, strategy


def check_state_goes_to_files(rank: int, world: int, folder: Path) -> None:
    """One a process; then three steps more, for whoever goes on from them."""
    ours = llama()
    optimizer = sharded(ours, bucket_elements=300)
    train(optimizer, ours, 3)
    torch.save(optimizer.state_dict(), folder / f"state-{world}-{rank}.pt")
    before = [p.detach().clone() for p in ours.parameters()]
    train(optimizer, ours, 3)
    if rank == 0:
        torch.save((before, [p.detach().clone() for p in ours.parameters()]), folder / f"params-{world}.pt")


def check_state_of_four_processes_is_loaded(rank: int, world: int, folder: Path) -> None:
    """By two, under any strategy; not when a part of it is missing. (By four, that of four.)"""
    dist.barrier()
    states = [torch.load(folder / f"state-4-{r}.pt", weights_only=True, mmap=True) for r in range(4)]
    saved, later = torch.load(folder / "params-4.pt")
    for strategy in ("zero2", "ddp"):
        other = llama()
        optimizer = sharded(other, strategy=strategy)
        optimizer.load_state_dict(states)
        assert equal(other.parameters(), saved)
        for key in ("master", "m", "v"):
            for name, piece in optimizer.state_dict()["pieces"].items():
                whole = torch.cat([s["pieces"][name][key] for s in states if name in s["pieces"]])
                assert torch.equal(piece[key], whole[piece["start"]:][:len(piece[key])]), name
        train(optimizer, other, 3)
        assert relative(other.parameters(), later) < 1e-6
    split = next(name for name in states[0]["pieces"] if name in states[1]["pieces"])
    del states[1]["pieces"][split]
    with pytest.raises(ValueError, match=rf"numbers of {split}: the file of a process is missing"):
        sharded(llama(), strategy="ddp").load_state_dict(states)


def check_bytes_kept_and_elements_sent(rank: int, world: int, folder: Path) -> None:
    """bf16, Psi parameters: 2 Psi of weights and a share of 16 Psi; Psi sent a micro-batch and Psi a step. For saving,
    process 0 sees the fp32 masters; the others', and later its own, parameters stay bf16."""
    model = llama(config=WIDER)
    psi = elements(model)
    base = live_bytes() - 4 * psi
    optimizer = zero.ZeRO2(model.named_parameters(), torch.bfloat16, bucket_elements=4096, strategy="zero2")

    def kept(bytes_sharded: int) -> bool:
        sharded_bytes = bytes_sharded * psi / world
        return abs(live_bytes() - base - 2 * psi - sharded_bytes) < 0.03 * sharded_bytes

    sent, start_sending = [0], dist.batch_isend_irecv

    def counted(operations: list[dist.P2POp]) -> list[dist.Work]:
        sent[0] += sum(operation.tensor.numel() for operation in operations if operation.op is dist.isend)
        assert len(optimizer.pending) < optimizer.MAX_PENDING
        return start_sending(operations)

    def psi_was_sent() -> bool:
        elements_sent, sent[0] = sent[0], 0
        return abs(elements_sent - psi * (world - 1) / world) < 0.01 * psi

    assert kept(12)
    dist.batch_isend_irecv = counted
    for micro in range(3):
        optimizer.backward(lm(model, TOKENS[rank:rank + 1]), last=micro == 2)
        assert psi_was_sent() and kept(16)  # reduce-scattered; nothing but the own shard is kept
    optimizer.step(1e-3)
    assert psi_was_sent() and kept(12)  # all-gathered
    dist.batch_isend_irecv = start_sending

    pieces = [None] * world
    dist.all_gather_object(pieces, optimizer.state_dict()["pieces"])
    with optimizer.masters():
        for name, p in model.named_parameters():
            whole = torch.cat([piece[name]["master"] for piece in pieces if name in piece])
            assert torch.equal(p.detach().flatten(), whole) if rank == 0 else p.dtype == torch.bfloat16, name
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert same_everywhere([p.float() for p in model.parameters()])


def check_processes_may_differ_in_what_has_a_gradient(rank: int, world: int, folder: Path) -> None:
    """Other parameters silent here than there; nothing on process 1; nothing anywhere; three numbers on four processes;
    an empty parameter; one that lies on all processes. Then NaN on process 1 only: all skip, and go on together."""
    shapes = ((3,), (0, 2), (5, 3), (1,))
    for strategy in ("zero2", "zero2_cpu", "ddp"):
        (params, _), (lone, grads) = some(*shapes), some(*shapes)
        optimizer = zero.ZeRO2(named(params), max_norm=0, weight_decay=0.1, bucket_elements=1, strategy=strategy)
        alone = torch_adamw([p for p in lone if p.numel()], lr=0.1)
        for used in (((0, 3), (1, 2)), ((1,), (0, 1, 2, 3)), ((0, 1, 2), ()), ((), ())):
            mine = used[rank] if rank < 2 else ()
            feed(optimizer, [params[i] for i in mine], [grads[i] for i in mine])
            stats = optimizer.step(0.1)
            for i, p in enumerate(lone):
                p.grad = grads[i] * (used[0] + used[1]).count(i)
            alone.step()
            assert stats.grad_norm == pytest.approx(torch.cat([p.grad.flatten() for p in lone]).norm().item(), rel=1e-5)
            assert same_everywhere(params)
            assert max((a - b).abs().max() for a, b in zip(params, lone) if a.numel()) < 1e-6, (strategy, used)
        before = [p.detach().clone() for p in params]
        bad = [g.clone() for g in grads]
        bad[2].view(-1)[-1] += float("nan") if rank == 1 else 0  # one number, which one process owns
        feed(optimizer, params, bad)
        assert optimizer.step(0.1).skipped and optimizer.skipped == 1 and equal(params, before)
        feed(optimizer, params, grads)
        assert not optimizer.step(0.1).skipped and same_everywhere(params) and not equal(params, before)
        optimizer.MAX_SKIPS = 1
        feed(optimizer, params, bad)
        with pytest.raises(FloatingPointError, match="first in p2:"):  # on all alike, wherever the number lies
            optimizer.step(0.1)


def check_every_micro_batch_reaches_the_sum(rank: int, world: int, folder: Path) -> None:
    """Also one that nobody called the last; one after the last would miss the sum, and is refused."""
    for strategy in ("zero2", "ddp"):
        (params, _), (lone, grads) = some((3, 2), (5,)), some((3, 2), (5,))
        optimizer = zero.ZeRO2(named(params), max_norm=0, strategy=strategy)
        alone = torch_adamw(lone, 0.0, lr=0.1)
        for last in (False, True):
            for micro in range(3):
                feed(optimizer, params if micro != rank else [], grads, last=last and micro == 2)
            if last:
                with pytest.raises(AssertionError, match="after the step's last micro-batch"):
                    feed(optimizer, params, grads)
            optimizer.step(0.1)
            for p, g in zip(lone, grads):
                p.grad = g * (3 * world - min(world, 3))
            alone.step()
            assert distance(params, lone) < 1e-6 and same_everywhere(params), strategy


def check_bf16_gradients_are_added_up_in_fp32(rank: int, world: int, folder: Path) -> None:
    """Over processes and over micro-batches."""
    p = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = zero.ZeRO2([("p", p)], torch.bfloat16, strategy="zero2")
    for micro in range(2):
        gradient = torch.full((8,), 2.0 ** -(10 * (rank == 1) + micro), dtype=torch.bfloat16)
        feed(optimizer, [p], [gradient], last=micro == 1)
    assert (optimizer.buckets[0].grad == 1.5 * (world - 1 + 2.0 ** -10)).all()
    optimizer.step(1e-3)


def check_adapters_on_a_frozen_base(rank: int, world: int, folder: Path) -> None:
    model = llama()
    lora.attach(model, 2, generator=torch.Generator().manual_seed(1))
    frozen = model.tok_embeddings.weight.detach().clone()
    optimizer = zero.ZeRO2(model.named_parameters(), strategy="zero2")
    train(optimizer, model, 2)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert same_everywhere(trained) and any((p != 0).all() for name, p in model.named_parameters() if "lora_B" in name)
    assert torch.equal(frozen, model.tok_embeddings.weight)
    owned = sum(len(bucket.m) for bucket in optimizer.buckets)
    assert owned <= sum(p.numel() for p in trained) / world + 2 * world


def check_buckets_are_sent_while_backward_runs(rank: int, world: int, folder: Path) -> None:
    """As the timeline of the first step tells, which process 0 prints."""
    model = llama(config=WIDER)
    optimizer = zero.ZeRO2(model.named_parameters(), bucket_elements=4096, strategy="zero2", trace=True)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for _ in range(2):
            optimizer.backward(lm(model, TOKENS))
            optimizer.step(1e-3)
    rows = re.findall(r"^ *([\d.]+) s +(.+?) +([\d.]+) MB being sent$", printed.getvalue(), re.MULTILINE)
    events = [what for _, what, _ in rows]
    assert bool(rows) == (rank == 0)
    if rank == 0:
        assert events[0] == "backward begins" and events[-1] == "all-gather ends" and len(set(events)) == len(events)
        assert [float(seconds) for seconds, *_ in rows] == sorted(float(seconds) for seconds, *_ in rows)
        during = rows[:events.index("backward ends")]
        assert sum(what.startswith("reduce-scatter begins") for _, what, _ in during) > 3
        assert max(float(megabytes) for *_, megabytes in during) > 4 * 4096 / 1e6


CHECKS = {name.removeprefix("check_"): check for name, check in globals().items() if name.startswith("check_")}


def run_checks(folder: Path) -> None:
    """One process of the run: all checks in turn; `folder` takes what each says. None goes on after one that failed,
    whose collectives would be taken for the next one's."""
    rank, world, *_ = run.start("cpu")
    gc.freeze()  # live_bytes then looks at what the checks make, not at half a million objects of the imports
    assert run.gather(f"from {rank}") == [f"from {other}" for other in range(world)]
    for name, check in CHECKS.items():
        try:
            check(rank, world, folder)
        except BaseException:
            (folder / f"{name}-{world}-{rank}").write_text(traceback.format_exc())
            raise
        (folder / f"{name}-{world}-{rank}").write_text("passed")
    run.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, start) -> Path:
    """What the checks on four processes, and then on two, have left."""
    folder = tmp_path_factory.mktemp("processes")
    for world in (4, 2):
        ended = start(world, run_checks, folder).wait()
        (folder / f"output-{world}").write_text("".join(process.out + process.err for process in ended))
    return folder


@pytest.mark.parametrize("world", [4, 2])
@pytest.mark.parametrize("name", CHECKS)
def test_on_several_processes(name, world, folder):
    files = [folder / f"{name}-{world}-{rank}" for rank in range(world)]
    said = [file.read_text() if file.exists() else "never ended" for file in files]
    assert said == ["passed"] * world, "\n".join([*said, (folder / f"output-{world}").read_text()])


@pytest.mark.parametrize("world", [4, 2])
def test_saved_on_several_resumed_on_one(world, folder):
    saved, later = torch.load(folder / f"params-{world}.pt")
    files = [folder / f"state-{world}-{rank}.pt" for rank in range(world)]
    model = llama()
    assert sum(file.stat().st_size for file in files) < 1.1 * 12 * elements(model) + world * 20_000  # + names
    optimizer = sharded(model, strategy="naive")
    optimizer.load_state_dict([torch.load(file, weights_only=True) for file in files])
    assert equal(model.parameters(), saved) and optimizer.updates == 3
    for _ in range(3):
        optimizer.backward(lm(model, TOKENS))
        optimizer.step(1e-3)
    assert relative(model.parameters(), later) < 1e-6


def die(who: list[int]) -> None:
    """One process of a run in which the other is killed while this one reduce-scatters."""
    rank, *_ = run.start("cpu")
    model = llama()
    optimizer = sharded(model, bucket_elements=50)
    train(optimizer, model, 1)
    if rank in who:
        os.kill(os.getpid(), signal.SIGKILL)
    optimizer.backward(lm(model, TOKENS))


@pytest.mark.parametrize("who", [0, 1])
def test_a_process_that_dies_ends_the_other(who, start):
    """With a sentence, under a launcher that does not end it."""
    ended = start(2, run.command, die, [who]).wait(60)
    said = ended[1 - who].err
    assert [ended[who].code, ended[1 - who].code] == [-9, 1], said
    assert f"a_test.py: process {1 - who} stops: it lost the connection to another one" in said


def measure(strategy: str, lora_rank: int, heap: str) -> None:
    """One process of a training run of mid on random tokens: prints the planned and the measured peak.

    "holes" is a heap as in real use, which keeps what is freed, so that there are holes between tensors. "none" gives
    each tensor memory of its own from the system: then the peak is that of live tensors."""
    if heap == "none":
        run.keep_freed_memory = lambda: ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD
    world = run.start("cpu", strategy)
    batch, length = 2 // world.world, 256
    model = Llama(SHAPES["mid"], generator=torch.Generator().manual_seed(0))
    if lora_rank:
        lora.attach(model, lora_rank)
    optimizer = zero.ZeRO2(model.named_parameters(), strategy=strategy)
    tokens = torch.randint(3, 32_000, (batch, length), generator=torch.Generator().manual_seed(world.rank))
    target = torch.ones_like(tokens, dtype=torch.bool)
    target[:, 0] = False
    for _ in range(2):
        optimizer.backward(sft.lm_loss(model, tokens, target) / (target.sum() * world.world))
        optimizer.step(1e-4)
        run.barrier()
    measured = run.peak_memory_bytes(world.device) - world.idle
    size = zero.size_of(SHAPES["mid"], lora_rank)
    rows = zero.plan(size, strategy, world.world, batch * length, element=4, gpu=False)
    planned = rows["device: peak at once"] - rows["device: heap"] * (heap == "none")
    run.say(world, f"planned {planned} measured {measured}")
    run.stop()


RUNS = [(1, "naive", 0, "holes", 0.15), (1, "naive", 16, "none", 0.1),
        (2, "zero2", 0, "holes", 0.15), (2, "zero2_cpu", 16, "none", 0.1)]


@pytest.fixture(scope="module")
def measured(start) -> dict:
    """How each run ended. Those of one process run at the same time."""
    groups = {}
    for world, *what, _ in RUNS:
        if world > 1:
            for group in groups.values():
                group.wait()
        groups[world, *what] = start(world, measure, *what)
    return {run: group.wait() for run, group in groups.items()}


@pytest.mark.parametrize("world, strategy, lora_rank, heap, bound", RUNS)
def test_plan_is_what_is_measured(world, strategy, lora_rank, heap, bound, measured):
    """A plan without activations, logits and buckets."""
    first, *_ = measured[world, strategy, lora_rank, heap]
    figures = re.search(r"planned (\d+) measured (\d+)", first.out)
    assert figures, first.err
    planned, peak = map(int, figures.groups())
    assert planned == pytest.approx(peak, rel=bound)


# ---- refusals -------------------------------------------------------------------------------------------------------

def some_state() -> dict:
    return zero.ZeRO2(llama().named_parameters()).state_dict()


def load(model: Llama, state: dict) -> None:
    zero.ZeRO2(model.named_parameters()).load_state_dict([state])


@pytest.mark.parametrize("refused, sentence", [
    (lambda: zero.ZeRO2(llama().requires_grad_(False).named_parameters()), "the model has no trainable parameter"),
    (lambda: load(llama(tied=True), some_state()), "holds other parameters than this model trains, .*output.weight"),
    (lambda: load(Llama(LlamaConfig(**vars(CONFIG) | {"ffn_dim": 24})), some_state()), "w[123].weight is"),
    (lambda: zero.main(["--plan", "8B"]), "--plan 8B: neither a weights directory nor one of tiny"),
    (lambda: zero.main(["--plan", "7B", "--nproc", "0"]), "argument --nproc: must be at least 1, not 0"),
])
def test_refusals(refused, sentence):
    with pytest.raises(ValueError, match=sentence):
        refused()
