"""ZeRO-2 by hand: how several processes train one model, and the AdamW whose state they share out among them.

    torchrun --standalone --nproc_per_node=2 sft.py --strategy zero2        two processes, half of the optimizer each
    python sft.py --strategy zero2_cpu                                      one process: optimizer in CPU memory, model on the GPU
    python zero.py --plan 7B --nproc 4                                      what fits where, before anything is loaded
    python zero.py --bench                                                  how fast the pieces are on this machine

Rajbhandari et al. 2020, "ZeRO" (arXiv 1910.02054) is the paper for what is sharded, Ren et al. 2021, "ZeRO-Offload" (arXiv
2101.06840) for the CPU part, Li et al. 2020, "PyTorch Distributed" (arXiv 2006.15704) for buckets and their overlap with
backward, Loshchilov & Hutter 2019 for AdamW. Mixed-precision training of Psi parameters keeps 16 Psi bytes: 2 weights and
2 gradient in bf16, and 12 for the optimizer: fp32 master weights 4, moments m 4 and v 4 (section 3.1 of the paper). Here the
gradient is summed in fp32 (4), so that many micro-batches do not round away. Bytes per parameter, N processes:

                                   on the device                                       in CPU memory
    strategy      weights  gradient  master, m, v    7B, N = 4, bf16      gradient  master, m, v
    naive, ddp       2        4           12              121 GB
    zero2            2        4/N         12/N             40 GB
    zero2_cpu        2        0            0               13 GB             4/N       12/N             27 GB

(fp32 training has no low-precision copy: weights are 4 and the master is a part of them.) Three things share this class:
naive is one process; ddp sums gradients over all and holds the rest whole; zero2 shards. One process is the same code.

Where a parameter lies. Five parameters a .. e of one element each, two processes, one bucket:

    gradients, last parameter first, padded to a multiple of 2     e  d  c | b  a  .
    shard that process 0 / 1 owns                                  0  0  0 | 1  1  1
    on both:     weights, whole, low precision                     e  d  c   b  a  .
    process 0:   master, m, v, gradient in fp32                    e  d  c
    process 1:                                                               b  a  .

A big matrix is a bucket of its own, and its gradient travels from where autograd left it; small ones share a bucket. Vectors
(norms) have theirs, because they are not decayed. A step has three phases:

    1. backward    hook hook | hook hook | hook     each bucket, when its last gradient is there, is reduce-scattered: its owner
       buckets        |== 0 ====|                   gets the sum of its shard over all processes, asynchronously, while backward
                                |== 1 ====|         goes on; added up in fp32 over micro-batches; the rest is freed
    2. update      norm over all shards (one number is summed over processes), clip, AdamW on the own shards
    3. gather      |- AdamW 0 -|- AdamW 1 -|        bucket by bucket the owners send their new weights to all, while the
                               |== 0 ==||== 1 ==|   next bucket's AdamW runs

Per micro-batch Psi elements are reduce-scattered, per step Psi are gathered: without accumulation 2 Psi, as much as an
all-reduce (section 7.1). Buckets leave in index order on every process: messages match by order alone, so two processes that
launched in the order of their own backward could add bucket 0 of one to bucket 1 of the other. What got no gradient counts as
zero, and a process that has fewer micro-batches than another joins the missing rounds with zeros: else the others would wait.

With zero2_cpu on a GPU the shard lives in CPU memory. Gradients cross on a stream of their own through a few pinned buffers
of bucket size (pinning all would round up to powers of two, and take memory that nothing else can have), AdamW runs on the
CPU, and each bucket of new weights goes back while the next is updated. On a CPU zero2_cpu is zero2.

Departures: a reduce-scatter is direct messages and a local sum in rank order, see `exchange`; gradients are sums, not means (the
loss is already divided by the number of tokens over all processes); the fp32 gradient, see above; epsilon as torch has it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data import run, weights


def exchange(send: list[Tensor], receive: list[Tensor], rank: int) -> list[dist.Work]:
    """Start sending send[r] to process r and receiving receive[r] from it, for all r but the own.

    Reduce-scatter and all-gather are both made of it. gloo's own reduce-scatter is an all-reduce that throws most of its
    result away, and takes 4 times as long; its all-gather takes twice as long. A ring in bf16 rounds at every process; here the
    receiver adds up in fp32, and always in rank order. The bytes are those of a ring: (N - 1) / N of the buffer, each way.
    """
    return dist.batch_isend_irecv([op for r in range(len(send)) if r != rank for op in (dist.P2POp(dist.irecv, receive[r], r), dist.P2POp(dist.isend, send[r], r))])


# ---- AdamW ----------------------------------------------------------------------------------------------------------

def adamw(p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> tuple[Tensor, Tensor, Tensor]:
    """One step of AdamW (Loshchilov & Hutter 2019, algorithm 2), as a formula: returns the new p, m, v. step counts from 1.

    `fused_adamw` lets torch._fused_adamw_ do this arithmetic in one pass over memory; a test holds the two together.
    """
    beta1, beta2 = betas
    p = p - lr * weight_decay * p            # decoupled decay: not part of the gradient, so Adam's 1/sqrt(v) does not scale it
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    m_hat = m / (1 - beta1 ** step)          # m and v start at 0 and are too small by exactly this factor
    v_hat = v / (1 - beta2 ** step)
    return p - lr * m_hat / (v_hat.sqrt() + eps), m, v


def fused_adamw(p: Tensor, g: Tensor, m: Tensor, v: Tensor, low: Tensor | None, step: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
                divisor: float = 1.0, chunk: int = 2**18) -> None:
    """`adamw` in place, on flat tensors; the gradient is divided by `divisor` on the way; low gets a rounded copy of p.

    On a CPU in chunks of 5 MB, which are still in the cache when the copy reads p again: that halves the time of both."""
    if divisor != 1.0 and p.device.type == "mps":  # whose kernel knows no grad_scale
        g.div_(divisor)
        divisor = 1.0
    # full, not tensor: that one copies from the host, for which a GPU is waited for
    t, scale = torch.full((), float(step), device=p.device), None if divisor == 1.0 else torch.full((), divisor, device=p.device)
    chunk = chunk if low is not None and p.device.type == "cpu" else max(p.numel(), 1)
    for i in range(0, p.numel(), chunk):
        span = slice(i, i + chunk)
        torch._fused_adamw_([p[span]], [g[span]], [m[span]], [v[span]], [], [t], lr=lr, beta1=betas[0], beta2=betas[1], weight_decay=weight_decay, eps=eps,
                            amsgrad=False, maximize=False, grad_scale=scale)
        if low is not None:
            low[span].copy_(p[span])


def sum_of_squares(x: Tensor) -> Tensor:
    """Of a flat tensor. On a CPU in chunks: torch adds a long vector up in a few fp32 sums, and is 5e-4 off after 12 million."""
    chunks = x.split(2**16) if x.device.type == "cpu" else [x]
    return torch.stack([torch.dot(chunk, chunk) for chunk in chunks]).sum()


@dataclass
class Bucket:
    names: list[str]
    params: list[nn.Parameter]
    spans: list[slice]             # where each parameter lies in flat
    weight_decay: float
    flat: Tensor                   # what the model computes with: its parameters are views of it; padded to a multiple of the shards
    own: slice                     # this process's shard of flat; all of it where nothing is sharded
    master: Tensor                 # fp32 weights of the shard; in fp32 on the same device a view of flat
    m: Tensor
    v: Tensor
    grad: Tensor | None = None     # fp32, the sum over processes and the step's micro-batches so far; none before the first
    came: dict[int, Tensor] = field(default_factory=dict)  # gradients of this micro-batch, by parameter

    def shards(self, flat: Tensor) -> list[Tensor]:
        """flat cut into the shards of process 0, 1, ..."""
        return list(flat.split(len(self.m)))

    def show(self, flat: Tensor) -> None:
        """Make the parameters views of flat."""
        for p, span in zip(self.params, self.spans):
            p.data = flat[span].view(p.shape)


class Flight(NamedTuple):
    """A bucket under way."""
    bucket: Bucket
    pieces: list[Tensor]           # of the own shard, one from each process; of ddp none, its grad is summed in place
    whole: Tensor | None           # what is being sent
    works: list[dist.Work]


class StepStats(NamedTuple):
    grad_norm: float   # over all parameters and processes, before clipping
    skipped: bool      # the gradient was not finite, nothing was changed
    seconds: float     # of norm, update and gather, without the wait for gradients
    copying: float     # seconds that this process waited for, or spent on, copies between GPU and CPU memory


class ZeRO2:
    """AdamW over the trainable parameters of a model, for one process or many.

    Per step: `backward(loss, last=...)` for each micro-batch, `flush()`, `step(lr)`. Matrices are decayed, vectors (norms) are not.
    Processes may have different numbers of micro-batches, or none.

    named_parameters: as of a module; frozen ones are left out, a tied one counts once. dtype: what the model computes in
    (fp32, bf16, fp16). max_norm: clip the global gradient norm to it, 0 = never. fp16 scales the loss (Micikevicius et al.
    2018): doubled after `GROWTH` good steps, halved at an overflow, which skips the step on all processes alike.
    trace: print a timeline of the first step.
    """

    GROWTH = 1000          # good steps until the loss scale is tried at twice its value (torch's GradScaler waits 2000)
    MAX_SKIPS = 20         # skipped steps in a row after which the run is lost
    IN_FLIGHT = 4          # buckets under way at once: the next one waits for the oldest
    PINNED = 3             # buffers between GPU and CPU: one that fills, one that is read, one to spare

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], dtype: torch.dtype = torch.float32, betas: tuple[float, float] = (0.9, 0.95),
                 eps: float = 1e-8, weight_decay: float = 0.0, max_norm: float = 1.0, bucket_elements: int = 2**20, strategy: str = "ddp", trace: bool = False):
        trainable = list({id(p): (name, p) for name, p in named_parameters if p.requires_grad and p.numel()}.values())
        if not trainable:
            raise ValueError("the model has no trainable parameter")
        self.strategy = run.ALIASES.get(strategy, strategy)
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.sharded = self.world > 1 and self.strategy.startswith("zero2")
        self.device = trainable[0][1].device
        self.home = torch.device("cpu") if self.strategy == "zero2_cpu" else self.device  # of master, m, v and gradient
        self.betas, self.eps, self.max_norm = betas, eps, max_norm
        self.updates = 0                                          # steps taken (not skipped): AdamW's t
        self.skipped, self.skips_in_row, self.good_in_row = 0, 0, 0
        self.scale = 2.0**16 if dtype == torch.float16 else 1.0   # of the loss
        self.dynamic = dtype == torch.float16
        shards, own = (self.world, self.rank) if self.sharded else (1, 0)
        self.buckets = [make_bucket(names, params, decay, dtype, self.home, shards, own) for names, params, decay in group(trainable, bucket_elements, weight_decay)]
        # ---- of the step under way ----
        self.rounds, self.closed = 0, False                       # micro-batches so far; was the last among them?
        self.next_launch = 0                                      # index of the bucket that is launched next
        self.flying: deque[Flight] = deque()
        self.more: tuple[Tensor, dist.Work] | None = None         # how many processes have a further micro-batch
        self.crossing = None if self.home == self.device else Crossing(self.buckets, self.PINNED)
        self.timeline: Timeline | None = Timeline(self.device) if trace else None
        for bucket in self.buckets:
            for i, p in enumerate(bucket.params):
                p.register_post_accumulate_grad_hook(lambda p, bucket=bucket, i=i: self.collect(bucket, i, p))

    # ---- phase 1: backward ----

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Backward of one micro-batch; `last` says that this process has no further one in this step."""
        assert not self.closed, "backward after the micro-batch that was called the last: its gradient would miss the sum"
        self.open_round(last)
        if loss is not None:
            (loss * self.scale).backward()
        self.close_round()
        if last:
            self.flush()

    def flush(self) -> None:
        """Take part, with zeros, in what other processes have more micro-batches for. `step` does it; call it before any
        other collective between backward and step, else that one meets a bucket of another process."""
        while not self.rounds or self.expected():
            self.open_round(last=True)
            self.close_round()
        self.closed = True

    def expected(self) -> bool:
        """Is there, on any process, a micro-batch after this round?"""
        if not self.sharded:  # ddp sums once a step, at the last
            return not self.closed
        count, work = self.more
        work.wait()
        return count.item() > 0

    def open_round(self, last: bool) -> None:
        self.rounds, self.closed, self.next_launch = self.rounds + 1, last, 0
        if self.sharded:
            count = torch.tensor([0.0 if last else 1.0], device=self.device)
            self.more = count, dist.all_reduce(count, async_op=True)
        self.mark("backward begins")

    def close_round(self) -> None:
        """Launch the buckets with a parameter that got no gradient, and wait for all."""
        self.mark("backward ends")
        while self.next_launch < len(self.buckets):
            self.launch()
        while self.flying:
            self.land()

    def collect(self, bucket: Bucket, i: int, p: nn.Parameter) -> None:
        """Autograd has finished p.grad: take it, and launch what is complete."""
        bucket.came[i], p.grad = p.grad.reshape(-1), None
        while self.next_launch < len(self.buckets) and len(self.buckets[self.next_launch].came) == len(self.buckets[self.next_launch].params):
            self.launch()

    def launch(self) -> None:
        """Send the next bucket to its owners."""
        bucket = self.buckets[self.next_launch]
        self.next_launch += 1
        if not self.sharded:
            if bucket.came or bucket.grad is None:
                self.add(bucket, whole_gradient(bucket))
            if self.world > 1 and self.closed:
                self.flying.append(Flight(bucket, [], None, [dist.all_reduce(bucket.grad, async_op=True)]))
                self.mark("launch", bucket)
            return
        if len(self.flying) >= self.IN_FLIGHT:
            self.land()
        whole = whole_gradient(bucket)
        parts = bucket.shards(whole)
        pieces = [parts[r] if r == self.rank else torch.empty_like(parts[r]) for r in range(self.world)]
        self.flying.append(Flight(bucket, pieces, whole, exchange(parts, pieces, self.rank)))
        self.mark("launch", bucket)

    def land(self) -> None:
        """Wait for the oldest bucket under way, and add it up."""
        bucket, pieces, _, works = self.flying.popleft()
        for work in works:
            work.wait()
        self.mark("land", bucket)
        if pieces:
            total = torch.add(pieces[0].float(), pieces[1])  # fp32 whatever travelled
            for piece in pieces[2:]:
                total.add_(piece)
            self.add(bucket, total)

    def add(self, bucket: Bucket, gradient: Tensor) -> None:
        """To what earlier micro-batches gave. `gradient` is nobody else's: it may become the sum itself."""
        if self.crossing is not None:
            self.crossing.out(bucket, gradient)
        elif bucket.grad is None:
            bucket.grad = gradient.float()
        else:
            bucket.grad.add_(gradient)

    # ---- phases 2 and 3: update and gather ----

    def step(self, lr: float) -> StepStats:
        """Clip and apply the summed gradient. Raises FloatingPointError after MAX_SKIPS skipped steps in a row."""
        self.flush()
        if self.crossing is not None:
            self.crossing.land_all()
        began = time.perf_counter()
        squares = torch.stack([sum_of_squares(bucket.grad) for bucket in self.buckets]).sum()
        if self.sharded:
            squares = squares.to(self.device)
            dist.all_reduce(squares)
        grad_norm = squares.sqrt().item() / self.scale  # the one host synchronisation of a step
        finite = grad_norm < float("inf")  # False for NaN too
        if finite:
            divisor = self.scale
            if self.max_norm and grad_norm > self.max_norm:
                divisor *= (grad_norm + 1e-6) / self.max_norm  # 1e-6 as in torch's clip_grad_norm_
            self.updates += 1
            self.update(lr, divisor)
        try:
            self.count(finite)
        finally:
            for bucket in self.buckets:
                bucket.grad = None
            self.rounds, self.closed, self.more = 0, False, None
        if self.timeline is not None and self.updates:
            if self.rank == 0:
                print(self.timeline.text(self.rank), flush=True)
            self.timeline = None
        return StepStats(grad_norm, not finite, time.perf_counter() - began, 0.0 if self.crossing is None else self.crossing.take_seconds())

    def update(self, lr: float, divisor: float) -> None:
        works: list[dist.Work] = []
        self.mark("update begins")
        for bucket in self.buckets:
            mine = bucket.flat[bucket.own]
            low = None if bucket.master.data_ptr() == mine.data_ptr() else mine if self.crossing is None else self.crossing.buffer(mine)
            fused_adamw(bucket.master, bucket.grad, bucket.m, bucket.v, low, self.updates, lr, self.betas, self.eps, bucket.weight_decay, divisor)
            if self.crossing is not None:
                self.crossing.back(low, mine)
            works += self.gather(bucket)
        self.mark("update ends")
        for work in works:
            work.wait()
        self.mark("gathered")

    def gather(self, bucket: Bucket) -> list[dist.Work]:
        """Start sending the own shard of the weights to all, and receiving theirs."""
        if not self.sharded:
            return []
        shards = bucket.shards(bucket.flat)
        return exchange([shards[self.rank]] * self.world, shards, self.rank)

    def count(self, finite: bool) -> None:
        """Book-keeping of skipped steps and of the loss scale; all processes see the same sums, so all decide alike."""
        if finite:
            self.skips_in_row, self.good_in_row = 0, self.good_in_row + 1
            if self.dynamic and self.good_in_row == self.GROWTH:
                self.scale, self.good_in_row = self.scale * 2, 0
            return
        self.skipped, self.skips_in_row, self.good_in_row = self.skipped + 1, self.skips_in_row + 1, 0
        if self.dynamic and self.scale <= 1:
            raise FloatingPointError(f"the gradient overflows fp16 even at loss scale 1, first in {self.first_broken()}: use --dtype bf16, or a lower --lr")
        if self.dynamic:
            self.scale /= 2
        if self.skips_in_row >= self.MAX_SKIPS:
            raise FloatingPointError(f"{self.skips_in_row} steps in a row had a gradient that is not finite, first in {self.first_broken()}: lower --lr, or look at the data")

    def first_broken(self) -> str:
        """The first parameter, in the model's order, with a gradient that is not finite, on any process."""
        places = [(bucket, name, span) for bucket in reversed(self.buckets) for name, span in reversed(list(zip(bucket.names, bucket.spans)))]  # buckets are the model reversed
        broken = [i for i, (bucket, _, span) in enumerate(places) if not bucket.grad[relative(overlap(span, bucket.own), bucket.own)].isfinite().all()]
        first = torch.tensor(min(broken, default=len(places)), device=self.device)
        if self.sharded:
            dist.all_reduce(first, dist.ReduceOp.MIN)
        return places[first.item()][1] if first < len(places) else "the sum over all parameters"

    def mark(self, what: str, bucket: Bucket | None = None) -> None:
        if self.timeline is not None:
            under_way = sum(flight.bucket.flat.nbytes for flight in self.flying)
            self.timeline.mark(what, None if bucket is None else self.buckets.index(bucket), 0 if bucket is None else bucket.flat.numel(), under_way)

    # ---- state ----

    @contextmanager
    def masters(self, dtype: torch.dtype = torch.float32) -> Iterator[None]:
        """Within it process 0's parameters hold the fp32 masters (rounded to dtype), to save them: what many small updates
        have added up to may be less than a bf16 copy can hold. All processes take part; the others' parameters stay as they are."""
        for bucket in self.buckets if self.buckets[0].flat.dtype != torch.float32 else ():  # in fp32 they hold them anyway
            whole = torch.empty_like(bucket.flat, dtype=torch.float32) if self.sharded and self.rank == 0 else bucket.master
            if self.sharded:
                ops = [dist.P2POp(dist.isend, bucket.master.to(self.device), 0)] if self.rank else [dist.P2POp(dist.irecv, part, r) for r, part in enumerate(bucket.shards(whole)) if r]
                for work in dist.batch_isend_irecv(ops):
                    work.wait()
            if self.rank == 0:
                whole[bucket.own].copy_(bucket.master)
                bucket.show(whole.to("cpu", dtype))
        yield
        for bucket in self.buckets:
            bucket.show(bucket.flat)

    def state_dict(self) -> dict:
        """What continuing needs of this process, by parameter name: its piece of each, and where that begins. The states of
        all processes together are whole, so any number of processes can load them, under any strategy."""
        pieces = {}
        for bucket in self.buckets if self.sharded or self.rank == 0 else ():  # of ddp one is enough
            # A view would drag all of flat into the file.
            master = bucket.master if bucket.master.nbytes == bucket.master.untyped_storage().nbytes() else bucket.master.clone()
            held = {"master": master, "m": bucket.m, "v": bucket.v}
            for name, p, span in zip(bucket.names, bucket.params, bucket.spans):
                mine = overlap(span, bucket.own)
                if mine.start < mine.stop:
                    pieces[name] = {"shape": list(p.shape), "start": mine.start - span.start} | {key: flat[relative(mine, bucket.own)] for key, flat in held.items()}
        return {"pieces": pieces} | {key: getattr(self, key) for key in ("updates", "skipped", "skips_in_row", "good_in_row", "scale")}

    def load_state_dict(self, states: dict | list[dict]) -> None:
        """From the state of one process or the list of all, whoever wrote them. Raises ValueError when they are of other parameters."""
        states = [states] if isinstance(states, dict) else states
        ours, theirs = {name for bucket in self.buckets for name in bucket.names}, {name for state in states for name in state["pieces"]}
        if ours != theirs:
            raise ValueError(f"the checkpoint's optimizer holds other parameters than this model trains, for instance {', '.join(sorted(ours ^ theirs)[:5])}: resume with the flags of the first run")
        for bucket in self.buckets:
            for name, p, span in zip(bucket.names, bucket.params, bucket.spans):
                mine, found = overlap(span, bucket.own), 0
                for piece in (state["pieces"][name] for state in states if name in state["pieces"]):
                    if list(p.shape) != piece["shape"]:
                        raise ValueError(f"{name} is {tuple(piece['shape'])} in the checkpoint and {tuple(p.shape)} here: resume the same model")
                    theirs = slice(span.start + piece["start"], span.start + piece["start"] + len(piece["m"]))  # as a place in flat
                    common = overlap(mine, theirs)
                    found += common.stop - common.start
                    for key in ("master", "m", "v"):
                        getattr(bucket, key)[relative(common, bucket.own)].copy_(piece[key][relative(common, theirs)])
                if found != mine.stop - mine.start:
                    raise ValueError(f"the checkpoint holds {found} of the {mine.stop - mine.start} numbers of {name} that this process needs: the file of a process is missing")
            bucket.flat[bucket.own].copy_(bucket.master)
        for work in [work for bucket in self.buckets for work in self.gather(bucket)]:
            work.wait()
        for key in ("updates", "skipped", "skips_in_row", "good_in_row", "scale"):
            setattr(self, key, states[0][key])


def overlap(a: slice, b: slice) -> slice:
    start = max(a.start, b.start)
    return slice(start, max(start, min(a.stop, b.stop)))


def relative(a: slice, base: slice) -> slice:
    """The place a, counted from the beginning of base."""
    return slice(a.start - base.start, a.stop - base.start)


def group(trainable: list[tuple[str, nn.Parameter]], bucket_elements: int, weight_decay: float) -> list[tuple[list[str], list[nn.Parameter], float]]:
    """Share parameters out over buckets, last parameter first, matrices (decayed) and vectors (not) apart; one of at least
    bucket_elements is a bucket alone. 2^20 are 2 MB in bf16: enough that latency does not count, small enough to leave early."""
    done, filling = [], {}
    for name, p in reversed(trainable):
        decay, kind = weight_decay if p.dim() >= 2 else 0.0, p.dim() >= 2
        if p.numel() >= bucket_elements:
            done.append(([name], [p], decay))
            continue
        names, params, _ = filling.setdefault(kind, ([], [], decay))
        names.append(name)
        params.append(p)
        if sum(q.numel() for q in params) >= bucket_elements:
            done.append(filling.pop(kind))
    return done + list(filling.values())


def make_bucket(names: list[str], params: list[nn.Parameter], weight_decay: float, dtype: torch.dtype, home: torch.device, shards: int, own: int) -> Bucket:
    """Move the parameters into flat storage, of which p.data is a view from here on, in `dtype`; optimizer state lives at `home`."""
    stops = torch.tensor([p.numel() for p in params]).cumsum(0).tolist()
    spans = [slice(stop - p.numel(), stop) for stop, p in zip(stops, params)]
    n = -(-stops[-1] // shards)  # of a shard, rounded up
    flat, mine = torch.zeros(n * shards, dtype=dtype, device=params[0].device), slice(own * n, own * n + n)
    master = flat[mine] if dtype == torch.float32 and home == flat.device else torch.zeros(n, dtype=torch.float32, device=home)
    for p, span in zip(params, spans):
        flat[span].copy_(p.detach().view(-1))
        ours = overlap(span, mine)
        master[relative(ours, mine)].copy_(p.detach().view(-1)[relative(ours, span)])  # from the dtype of the file: a detour over bf16 would lose its low bits
    m, v = (torch.zeros(n, dtype=torch.float32, device=home) for _ in range(2))
    bucket = Bucket(names, params, spans, weight_decay, flat, mine, master, m, v)
    bucket.show(flat)
    return bucket


def whole_gradient(bucket: Bucket) -> Tensor:
    """The bucket's gradient of this micro-batch, flat; parameters without one, and padding, are zero."""
    came, bucket.came = bucket.came, {}
    if len(bucket.params) == 1 and came and came[0].numel() == bucket.flat.numel():
        return came[0]  # where autograd left it
    padding = bucket.flat.new_zeros(bucket.flat.numel() - bucket.spans[-1].stop)
    return torch.cat([came[i] if i in came else bucket.flat.new_zeros(p.numel()) for i, p in enumerate(bucket.params)] + [padding])


class Crossing:
    """The way between a GPU and optimizer state in CPU memory: a stream for copies beside the one that computes, and a few
    pinned buffers, which alone can be copied from and to while both sides go on working. Without a GPU (in tests): plain copies."""

    def __init__(self, buckets: list[Bucket], buffers: int):
        self.device = buckets[0].flat.device
        cuda = self.device.type == "cuda"
        self.stream = torch.cuda.Stream(self.device) if cuda else None
        size = 4 * max(len(bucket.m) for bucket in buckets)
        self.free = [torch.empty(size, dtype=torch.uint8, pin_memory=cuda) for _ in range(buffers)]
        self.busy: deque[tuple[Tensor, Tensor, Bucket | None, torch.cuda.Event | None]] = deque()  # buffer, the part in use, whose gradient, copied when
        self.seconds = 0.0

    def buffer(self, like: Tensor) -> Tensor:
        """A pinned tensor; waits for the oldest copy when all are in use."""
        if not self.free:
            self.land()
        return self.free[-1].view(like.dtype)[:like.numel()]

    def copy(self, to: Tensor, source: Tensor, pinned: Tensor, bucket: Bucket | None) -> None:
        event = None
        with torch.cuda.stream(self.stream) if self.stream is not None else nullcontext():
            if self.stream is not None:
                self.stream.wait_stream(torch.cuda.default_stream(self.device))  # source is computed, to is no longer read
            to.copy_(source, non_blocking=True)
            if self.stream is not None:
                event = self.stream.record_event()
        self.busy.append((self.free.pop(), pinned, bucket, event))

    def out(self, bucket: Bucket, gradient: Tensor) -> None:
        """Add a gradient to the CPU's sum, as soon as it has arrived there."""
        pinned = self.buffer(gradient)
        self.copy(pinned, gradient, pinned, bucket)
        if self.stream is not None:
            gradient.record_stream(self.stream)  # else its memory would be given away before the copy is done

    def back(self, pinned: Tensor, weights: Tensor) -> None:
        """Copy new weights to the GPU; what it computes from here on waits for them."""
        self.copy(weights, pinned, pinned, None)
        if self.stream is not None:
            torch.cuda.default_stream(self.device).wait_event(self.busy[-1][3])

    def land(self) -> None:
        began = time.perf_counter()
        buffer, pinned, bucket, event = self.busy.popleft()
        if event is not None:
            event.synchronize()
        if bucket is not None and bucket.grad is None:
            bucket.grad = pinned.to(torch.float32, copy=True)
        elif bucket is not None:
            bucket.grad.add_(pinned)
        self.free.append(buffer)
        self.seconds += time.perf_counter() - began

    def land_all(self) -> None:
        while self.busy:
            self.land()

    def take_seconds(self) -> float:
        seconds, self.seconds = self.seconds, 0.0
        return seconds


class Timeline:
    """What `--trace` prints: when each bucket of the first step left and arrived, and how many bytes were under way."""

    def __init__(self, device: torch.device):
        self.device, self.rows = device, []

    def mark(self, what: str, bucket: int | None, elements: int, under_way: int) -> None:
        # On a GPU the program is far ahead of what is computed: an event takes the time when its turn comes.
        when = torch.cuda.Event(enable_timing=True) if self.device.type == "cuda" else time.perf_counter()
        if self.device.type == "cuda":
            when.record()
        self.rows.append((when, what, bucket, elements, under_way))

    def text(self, rank: int) -> str:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        first = self.rows[0][0]
        lines = [f"timeline of process {rank}, first step"]
        for when, what, bucket, elements, under_way in self.rows:
            ms = first.elapsed_time(when) if self.device.type == "cuda" else 1000 * (when - first)
            what = what if bucket is None else f"bucket {bucket} {what}, {elements:,} elements"
            lines.append(f"{ms:9.1f} ms  {what:<50}{under_way / 1e6:9.1f} MB under way")
        return "\n".join(lines)


# ---- the memory plan ------------------------------------------------------------------------------------------------

CARDS = (8, 12, 16, 24, 32, 40, 80)  # GiB


class Size(NamedTuple):
    """What the plan must know of a model: LLaMA's widths, and how many of its parameters are trained."""
    dim: int
    n_layers: int
    q_dim: int        # query heads x head width
    kv_dim: int
    ffn_dim: int
    vocab: int        # rows of the head; 0 without one
    total: int        # parameters
    trained: int
    largest: int      # elements of the largest trained parameter
    rank: int = 0     # of adapters


def size_of(config, lora_rank: int = 0) -> Size:
    """Of the language model of a `model.LlamaConfig`."""
    C, L, D, F, V = config.dim, config.n_layers, config.head_dim, config.ffn_dim, config.vocab_size
    Q, K = config.n_heads * D, config.n_kv_heads * D
    linears = [(C, Q), (C, K), (C, K), (Q, C), (C, F), (F, C), (C, F)]
    total = (1 if config.tie_embeddings else 2) * V * C + L * (sum(i * o for i, o in linears) + 2 * C) + C
    adapters = L * sum(lora_rank * (i + o) for i, o in linears)
    return Size(C, L, Q, K, F, V, total + adapters, adapters or total, lora_rank * F or max(V, F) * C, lora_rank)


def activation_bytes(size: Size, tokens: int, element: int, grad_checkpoint: bool) -> int:
    """What a block keeps for backward, a token: both norms' input and output (4 C), rotated queries, keys, values and the
    attention's output (2 Q + 2 K), and in the feed-forward w1 x, w3 x and what goes into w2 (3 F). With gradient
    checkpointing only the input of every block, and all of the block that is recomputed. The final norm: 2 C."""
    block = 4 * size.dim + 2 * size.q_dim + 2 * size.kv_dim + 3 * size.ffn_dim + 7 * size.rank
    kept = size.n_layers * size.dim + block if grad_checkpoint else size.n_layers * block
    return tokens * element * (kept + 2 * size.dim)


def logits_bytes(size: Size, tokens: int, element: int, rows: int = 512) -> int:
    """`sft.HeadLoss`: so many rows of logits at a time (twice: the next are computed before the last are freed), and the gradients
    of head and hidden states, which it makes in the forward."""
    return 4 * min(tokens, 2 * rows) * size.vocab + 4 * tokens * size.dim + (4 * size.vocab * size.dim if size.trained == size.total else 0)


class Plan(NamedTuple):
    """Bytes of one process."""
    device: dict[str, int]
    cpu: dict[str, int]
    peak: int        # most on the device at once
    sent: int        # to other processes, a step
    crossed: int     # between device and CPU memory, a step


def plan(size: Size, strategy: str, nproc: int, tokens: int, element: int = 2, grad_checkpoint: bool = False, micro_batches: int = 1, gpu: bool = True) -> Plan:
    """tokens: of a micro-batch. element: bytes of what the model computes in. Sources beside each line."""
    strategy = run.ALIASES.get(strategy, strategy)
    shards, offload = (nproc if strategy.startswith("zero2") else 1), strategy == "zero2_cpu" and gpu
    mine = -(-size.trained // shards)
    master = 0 if element == 4 and not offload else 4 * mine                    # in fp32 it is a part of the weights
    state = {"gradient": 4 * mine, "master": master, "moments": 8 * mine}       # Rajbhandari et al. 2020, section 3.1, but an fp32 gradient
    pinned = ZeRO2.PINNED * 4 * -(-size.largest // shards)
    # A bucket on the way: autograd's gradient, which is sent, and what is received and its sum. The largest is a matrix alone (`group`).
    flight = size.largest * element + ((size.largest * element + 4 * size.largest) // shards if shards > 1 else 0)
    device = {"weights": size.total * element} | ({} if offload else state) | {
        "buckets": flight, "activations": activation_bytes(size, tokens, element, grad_checkpoint) + tokens * element * 4 * size.ffn_dim,  # + a block's backward
        "logits": logits_bytes(size, tokens, element)}
    if not gpu:  # measured: code and buffers of torch and MKL, what the C library's heap loses between tensors, a bf16 head in fp32
        device["heap"] = 70_000_000 + device["activations"] * 9 // 25 + (4 * size.vocab * size.dim if element < 4 else 0)
    cpu = (state if offload else {}) | ({"pinned": pinned} if offload else {})
    # Activations are freed while gradients come: the peak is where backward begins or where it ends, with the embeddings'.
    stays = sum(device.get(key, 0) for key in ("weights", "master", "moments"))
    peak = stays + max(device["activations"] + device["logits"], device.get("gradient", 0) + element * size.largest) + flight + device.get("heap", 0)
    share = (nproc - 1) / nproc
    sent = share * size.trained * (element * (micro_batches + 1) if shards > 1 else 8)
    return Plan(device, cpu, peak, int(sent), (micro_batches * (element if nproc == 1 else 4) + element) * mine if offload else 0)


def run_plan(trained: list[tuple[nn.Module, object]], frozen: list[nn.Module], strategy: str, world: run.World, tokens: int, dtype: torch.dtype,
             lora_rank: int = 0, grad_checkpoint: bool = False) -> tuple[str, int]:
    """The plan of a run in one line, and its peak: (model, its LlamaConfig) of each that is trained, and what is only computed with."""
    plans = []
    for model, config in trained:
        numel = [p.numel() for p in model.parameters()]
        mine = [p.numel() for p in model.parameters() if p.requires_grad]
        size = Size(config.dim, config.n_layers, config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim, config.ffn_dim,
                    config.vocab_size if hasattr(model, "output") else 0, sum(numel), sum(mine), max(mine), lora_rank)
        plans.append(plan(size, strategy, world.world, tokens, dtype.itemsize, grad_checkpoint, gpu=world.device.type == "cuda"))
    parts = {key: sum(p.device.get(key, 0) for p in plans) for key in plans[0].device}
    parts |= {key: max(p.device[key] for p in plans) for key in ("activations", "logits", "buckets")}  # one model at a time
    parts["weights"] = sum({p.data_ptr(): p.nbytes for model in [m for m, _ in trained] + frozen for p in model.parameters()}.values())  # some are shared
    gradient, largest = parts.get("gradient", 0), max(p.numel() for model, _ in trained for p in model.parameters() if p.requires_grad)
    peak = sum(parts.values()) - gradient - parts["activations"] - parts["logits"] + max(parts["activations"] + parts["logits"], gradient + dtype.itemsize * largest)
    cpu = sum(sum(p.cpu.values()) for p in plans)
    text = ", ".join(f"{key} {gb(n)}" for key, n in parts.items() if n >= 5e6)
    return f"memory of a process: {text or 'next to nothing'}; at most {gb(peak)} at once" + (f", and {gb(cpu)} in CPU memory" if cpu else ""), peak


def plan_table(name: str, plans: dict[str, Plan]) -> str:
    rows = [("", *plans)]
    for where in ("device", "cpu"):
        for key in dict.fromkeys(key for p in plans.values() for key in getattr(p, where)):
            rows.append((f"{where}: {key}", *(gb(getattr(p, where).get(key, 0)) for p in plans.values())))
    rows.append(("device: peak at once", *(gb(p.peak) for p in plans.values())))
    rows.append(("cpu: all", *(gb(sum(p.cpu.values())) for p in plans.values())))
    # A gigabyte for the CUDA context, cuBLAS and what the allocator cannot use.
    rows.append(("fits a card of", *(next((f"{card} GB" for card in CARDS if p.peak + 2**30 <= card * 2**30), "none") for p in plans.values())))
    rows.append(("sent a step", *(gb(p.sent) for p in plans.values())))
    rows.append(("device <-> cpu a step", *(gb(p.crossed) for p in plans.values())))
    return name + "\n" + "\n".join(f"  {row[0]:<24}" + "".join(f"{cell:>12}" for cell in row[1:]) for row in rows)


def gb(n: float) -> str:
    return "-" if not n else f"{n / 1e9:.2f} GB"


# ---- command line ---------------------------------------------------------------------------------------------------

def bench_adamw(n: int = 100_000_000) -> None:
    """AdamW on n fp32 parameters with a bf16 copy, as `step` does it, beside torch's and a plain copy of as many bytes (30 a parameter)."""
    p, g, m, v = torch.randn(n) * 0.02, torch.randn(n) * 1e-3, torch.zeros(n), torch.zeros(n)
    low = torch.zeros(n, dtype=torch.bfloat16)
    lone = nn.Parameter(p.clone())
    lone.grad = g.clone()
    reference = torch.optim.AdamW([lone], lr=1e-4, weight_decay=0.01, fused=True)
    a, b = torch.ones(n * 30 // 8), torch.zeros(n * 30 // 8)
    for name, work in (("ours", lambda: fused_adamw(p, g, m, v, low, 2, 1e-4, (0.9, 0.95), 1e-8, 0.01)),
                       ("torch.optim.AdamW(fused=True) and copy_", lambda: (reference.step(), low.copy_(lone.detach()))), ("copy of the same bytes", lambda: b.copy_(a))):
        seconds = timed(work, 1, 5)
        print(f"AdamW on {n / 1e6:.0f} M parameters, {name}: {1000 * seconds:.0f} ms, {30 * n / seconds / 1e9:.1f} GB/s", flush=True)


def timed(work, warm_up: int, repeats: int) -> float:
    """Median seconds."""
    taken = []
    for i in range(warm_up + repeats):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[warm_up:])


def bench_step(args: argparse.Namespace) -> None:
    """One process of a training run on random tokens: step time and peak memory."""
    import lora
    import sft
    from model import SHAPES, Llama
    world = run.start("auto", args.strategy)
    config = replace(SHAPES[args.shape], max_seq_len=args.max_len)
    dtype, size = weights.DTYPES[args.dtype], size_of(config, args.lora_rank)
    model = Llama(config, generator=torch.Generator().manual_seed(0)).to(world.device)
    model.grad_checkpoint = args.grad_checkpoint
    if args.lora_rank:
        model.to(dtype)
        lora.attach(model, args.lora_rank, None, 0.0, dtype=torch.float32)
    optimizer = ZeRO2(model.named_parameters(), dtype, strategy=args.strategy, trace=args.trace)
    tokens = torch.randint(3, config.vocab_size, (args.batch_size, args.max_len), generator=torch.Generator().manual_seed(world.rank))
    target = torch.ones_like(tokens, dtype=torch.bool)
    target[:, 0] = False

    def step() -> None:
        optimizer.backward(sft.lm_loss(model, tokens, target) / (target.sum() * world.world))
        optimizer.step(1e-4)
        run.barrier()

    seconds, peak = timed(step, min(2, args.steps), args.steps), run.peak_memory_bytes(world.device)
    if world.rank == 0:
        planned = plan(size, args.strategy, world.world, tokens.numel(), dtype.itemsize, args.grad_checkpoint, gpu=world.device.type == "cuda").peak
        print(json.dumps({"shape": args.shape, "strategy": args.strategy, "dtype": args.dtype, "lora_rank": args.lora_rank, "processes": world.world, "ms_per_step": round(1000 * seconds),
                          "peak_gb": round(peak / 1e9, 2), "peak_above_start_up_gb": round((peak - world.idle) / 1e9, 3), "planned_gb": round(planned / 1e9, 3)}), flush=True)
    run.stop()


def bench(args: argparse.Namespace) -> None:
    """AdamW alone, then a step under each strategy, two processes that share out the cores."""
    bench_adamw()
    for strategy in ("ddp", "zero2", "zero2_cpu"):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.nproc}", __file__, "--bench", "--strategy", strategy, "--dtype", args.dtype,
                   "--shape", args.shape, "--batch_size", str(args.batch_size), "--max_len", str(args.max_len), "--lora_rank", str(args.lora_rank), "--steps", str(args.steps)]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.nproc))})


def main(argv: list[str] | None = None) -> None:
    from model import SHAPES, LlamaConfig
    whole = run.whole
    parser = run.Parser("What a training run needs (--plan), and how fast the sharded optimizer is here (--bench).")
    parser.add_argument("--plan", metavar="MODEL", help=f"print the bytes that a process needs: a weights directory, or one of {' '.join(SHAPES)}")
    parser.add_argument("--bench", action="store_true", help="measure the AdamW step, and training steps under every strategy")
    parser.add_argument("--nproc", type=whole(1), help="processes (plan: 1, bench: 2)")
    parser.add_argument("--strategy", choices=run.STRATEGIES, help="only this one")
    parser.add_argument("--batch_size", type=whole(1), help="examples a process and micro-batch (plan: 4, bench: 2)")
    parser.add_argument("--accumulation_steps", type=whole(1), default=1, help="micro-batches a step")
    parser.add_argument("--max_len", type=whole(2), help="tokens of an example (plan: 512, bench: 256)")
    parser.add_argument("--lora_rank", type=whole(0), default=0, help="train adapters of this rank; 0 trains all weights")
    parser.add_argument("--grad_checkpoint", action="store_true", help="recompute activations in backward")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16", help="to compute in")
    parser.add_argument("--shape", choices=list(SHAPES), default="mid", help="model of the bench")
    parser.add_argument("--steps", type=whole(1), default=5, help="steps of the bench that are timed")
    parser.add_argument("--trace", action="store_true", help="bench: print when each bucket left and arrived")
    args = parser.parse_args(argv)
    for key, planned, benched in (("nproc", 1, 2), ("batch_size", 4, 2), ("max_len", 512, 256)):
        if getattr(args, key) is None:
            setattr(args, key, planned if args.plan else benched)
    if args.plan:
        if args.plan not in SHAPES and not os.path.isdir(args.plan):
            raise ValueError(f"--plan {args.plan}: neither a weights directory nor one of {' '.join(SHAPES)}")
        config = SHAPES.get(args.plan) or LlamaConfig(**weights.read_config(args.plan))
        size, element = size_of(config, args.lora_rank), 4 if args.dtype == "fp32" else 2
        names = [args.strategy] if args.strategy else ["naive" if args.nproc == 1 else "ddp", "zero2", "zero2_cpu"]
        plans = {name: plan(size, name, args.nproc, args.batch_size * args.max_len, element, args.grad_checkpoint, args.accumulation_steps) for name in names}
        print(plan_table(f"LLaMA {args.plan}, {size.total / 1e9:.2f} G parameters, {size.trained / 1e6:,.1f} M trained, {args.dtype}, {args.nproc} processes, "
                         f"micro-batches of {args.batch_size} x {args.max_len} tokens: bytes of one process", plans))
    elif args.bench and args.strategy:
        bench_step(args)
    elif args.bench:
        bench(args)
    else:
        parser.print_help()


if __name__ == "__main__":
    run.command(main)
