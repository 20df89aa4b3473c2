"""ZeRO-2 by hand: how several processes train one model, and the AdamW whose state is divided among them.

    torchrun --standalone --nproc_per_node=2 sft.py --strategy zero2      two processes, half of the optimizer each
    python sft.py --strategy zero2_cpu                                    optimizer in CPU memory, model on the GPU
    python zero.py --plan 7B --nproc 4                                    what fits where, before anything is loaded
    python zero.py --plan 7B --ppo --lora_rank 8 --bits 4                 ppo.py, adapters beside a quantized base

Rajbhandari et al. 2020, "ZeRO" (arXiv 1910.02054) is the paper for what is sharded, Ren et al. 2021, "ZeRO-Offload"
(arXiv 2101.06840) for the CPU part, Li et al. 2020, "PyTorch Distributed" (arXiv 2006.15704) for buckets and their
overlap with backward, Loshchilov & Hutter 2019 for AdamW. Mixed-precision training keeps 16 bytes per parameter: 2 for
the weight and 2 for the gradient in bf16, and 12 for the optimizer: the fp32 master weight 4, the moments m 4 and v 4
(section 3.1). Here the gradient takes 4: an fp32 sum does not round small gradients away. With N processes:

                              on the device                                in CPU memory
    strategy      weights  gradient  master, m, v    7B, N = 4, bf16      gradient  master, m, v      7B
    naive, ddp       2        4           12              121 GB
    zero2            2        4/N         12/N             40 GB
    zero2_cpu        2        0            0               13 GB             4/N       12/N            27 GB

(fp32 training has no low-precision copy: weights are 4 and the master is a part of them.) All strategies share one
class: naive is one process; ddp sums gradients over all and holds the rest whole; zero2 and zero2_cpu shard.

Where a parameter lies. Five parameters a .. e of one element each, two processes, one bucket:

    gradients, last parameter first, padded to a multiple of 2     e  d  c | b  a  .
    shard that process 0 / 1 owns                                  0  0  0 | 1  1  1
    on both:     weights, whole, low precision                     e  d  c   b  a  .
    process 0:   master, m, v, gradient in fp32                    e  d  c
    process 1:                                                               b  a  .

A big matrix is a bucket of its own, and its gradient is sent from where autograd left it; small ones share a bucket.
Vectors (norms) have buckets of their own, because they are not decayed. A step has three phases:

    1. backward    hook hook | hook hook | hook     each bucket, when its last gradient is there, is reduce-scattered:
       buckets        |== 0 ====|                   its owners get the sum of their shards over all processes, while
                                |== 1 ====|         backward goes on, and add it up in fp32 over micro-batches
    2. update      norm over all shards (one number is summed over processes), clip, AdamW on the process's own shards
    3. all-gather  |- AdamW 0 -|- AdamW 1 -|        bucket by bucket the owners send their new weights to all, while
                               |== 0 ==||== 1 ==|   the next bucket's AdamW runs

Of Psi parameters, Psi elements are reduce-scattered per micro-batch and Psi gathered per step: without accumulation
2 Psi, as much as an all-reduce (section 7.1). Buckets are sent in index order on every process: messages match by order
alone, so two processes that sent in the order of their own backward could add bucket 0 of one to bucket 1 of the other.
A parameter without a gradient counts as zeros. Every process calls `backward` equally often, with None where it has no
examples.

With zero2_cpu on a GPU the shard lies in CPU memory. Gradients are copied on a stream of their own through a few pinned
buffers of bucket size (pinning all would round up to powers of two, and pinned memory cannot be swapped out), AdamW
runs on the CPU, and each bucket of new weights is copied back while the next is updated. Without a GPU it is zero2.

Departures: a reduce-scatter is direct messages and a sum in rank order (`exchange`); gradients are sums, not means (the
loss is already divided by the number of tokens over all processes); the gradient is fp32; epsilon as torch has it.
Shapes: a bucket is flat, (N * n,), and made of N shards, (n,). naive and ddp have N = 1: their shard is the whole.
"""

import math
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data import run, weights
from model import SHAPES, Llama, LlamaConfig


# ---- AdamW ----------------------------------------------------------------------------------------------------------

def adamw(p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, lr: float, betas: tuple[float, float], eps: float,
          weight_decay: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the new p, m, v of one step of AdamW (Loshchilov & Hutter 2019, algorithm 2). step counts from 1.

    This is the formula. `fused_adamw` computes the same in one pass over memory; a test compares the two.
    """
    beta1, beta2 = betas
    p = p - lr * weight_decay * p            # decoupled decay: not in the gradient, so 1 / sqrt(v) does not scale it
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    m_hat = m / (1 - beta1 ** step)          # m and v start at 0 and are too small by exactly this factor
    v_hat = v / (1 - beta2 ** step)
    return p - lr * m_hat / (v_hat.sqrt() + eps), m, v


# ---- buckets --------------------------------------------------------------------------------------------------------

Named = list[tuple[str, nn.Parameter]]


class Bucket:
    """Parameters whose gradients are sent together, and this process's shard of their optimizer state."""

    def __init__(self, named: Named, weight_decay: float, dtype: torch.dtype, home: torch.device, shards: int,
                 rank: int):
        """The model computes in dtype. home is the device of the optimizer state, of which this bucket holds shard
        number rank of N = shards."""
        self.names, self.params = zip(*named)
        self.weight_decay = weight_decay if self.params[0].dim() >= 2 else 0.0      # vectors (norms) are not decayed
        sizes = [p.numel() for p in self.params]
        n = -(-sum(sizes) // shards)                                                # elements of a shard, rounded up
        self.sizes = [*sizes, shards * n - sum(sizes)]                              # the last is padding
        self.own = slice(rank * n, rank * n + n)                                    # this process's shard of flat
        # The master is made from the file's dtype: over bf16 it would lose its low bits.
        padding = torch.zeros(self.sizes[-1], device=self.params[0].device)
        whole = torch.cat([p.detach().flatten().float() for p in self.params] + [padding])      # (N * n,)
        self.flat = whole.to(dtype)          # (N * n,) what the model computes with: parameters are views of it
        self.shard = self.flat[self.own]     # (n,)
        self.master = whole[self.own].to(home)                                      # (n,) in fp32 a view of flat ...
        if dtype != torch.float32:
            self.master = self.master.clone()                                       # ... else memory of its own
        self.m, self.v = torch.zeros_like(self.master), torch.zeros_like(self.master)           # (n,) each
        self.grad: Tensor | None = None      # (n,) fp32, summed over processes and the micro-batches of this step
        self.show(self.flat)

    def show(self, flat: Tensor) -> None:
        """Makes the parameters views of flat, (N * n,)."""
        for p, part in zip(self.params, flat.split(self.sizes)):
            p.data = part.view(p.shape)

    def full(self) -> bool:
        """Whether backward has computed all gradients. It usually computes that of the last parameter last."""
        return all(p.grad is not None for p in reversed(self.params))

    def take_gradient(self) -> Tensor:
        """Returns the gradient of this micro-batch, (N * n,), and removes it from the parameters."""
        parts = [p.new_zeros(p.numel()) if p.grad is None else p.grad.reshape(-1) for p in self.params]  # flat, each
        for p in self.params:
            p.grad = None
        if len(parts[0]) == len(self.flat):
            return parts[0]                                                         # a matrix alone: without a copy
        return torch.cat([*parts, self.flat.new_zeros(self.sizes[-1])])

    def add(self, gradient: Tensor) -> None:
        """Adds the gradient of a micro-batch, (n,), to the fp32 sum. The first becomes the sum, without a copy if it is
        fp32."""
        if self.grad is None:
            self.grad = gradient.float()
        else:
            self.grad.add_(gradient)


# ---- messages ------------------------------------------------------------------------------------------------------

def exchange(send: Sequence[Tensor], receive: Sequence[Tensor], rank: int) -> list[dist.Work]:
    """Starts to send send[r] to process r and to receive receive[r] from it, for every r but this process's own.

    Reduce-scatter and all-gather are both made of it. A process sends and receives as many bytes as in a ring,
    (N - 1) / N of the buffer. A ring in bf16 rounds at every process. Here the receiver adds up in fp32, and always in
    rank order. Reduce-scatter and all-gather take about half the time of gloo's own: measured on two processes of two
    CPU cores, 2^24 elements in fp32.
    """
    both = (dist.irecv, receive), (dist.isend, send)
    return dist.batch_isend_irecv([dist.P2POp(operation, tensors[r], r) for operation, tensors in both
                                   for r in range(len(send)) if r != rank])


# ---- ZeRO-2 ---------------------------------------------------------------------------------------------------------

class StepStats(NamedTuple):
    grad_norm: float   # over all parameters and processes, before clipping
    skipped: bool      # the gradient was not finite: nothing was changed
    seconds: float     # of norm, update and all-gather, without the wait for gradients
    copying: float     # seconds that this process waited for copies between GPU and CPU memory


class ZeRO2:
    """AdamW over the trainable parameters of a model, for one process or many.

    Per step: `backward(loss, last=...)` for each micro-batch, then `step(lr)`.

    named_parameters: as of a module, which names a tied one once; frozen ones are left out. dtype: what the model
    computes in (fp32, bf16, fp16). max_norm: clip the global gradient norm to it, 0 = never. fp16 scales the loss
    (Micikevicius et al. 2018): doubled after GROWTH good steps, halved at an overflow, which skips the step on all
    processes alike. trace: print a timeline of the first step.
    """

    GROWTH = 1000          # good steps until the loss scale is tried at twice its value (torch's GradScaler waits 2000)
    MAX_SKIPS = 20         # skipped steps in a row after which the run is lost
    MAX_PENDING = 4        # reduce-scatters that run at once: the next one waits for the oldest

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], dtype: torch.dtype = torch.float32,
                 betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8, weight_decay: float = 0.0,
                 max_norm: float = 1.0, bucket_elements: int = 2**20, strategy: str = "ddp", trace: bool = False):
        self.params = {name: p for name, p in named_parameters if p.requires_grad and p.numel()}
        if not self.params:
            raise ValueError("the model has no trainable parameter")
        self.strategy = run.ALIASES.get(strategy, strategy)
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.sharded = self.world > 1 and self.strategy.startswith("zero2")
        self.device = next(iter(self.params.values())).device
        self.betas, self.eps, self.max_norm = betas, eps, max_norm
        self.trace = trace and self.rank == 0
        offload = self.strategy == "zero2_cpu" and self.device.type == "cuda"
        home = torch.device("cpu") if offload else self.device
        shards, shard = (self.world, self.rank) if self.sharded else (1, 0)
        groups = group(list(self.params.items()), bucket_elements)
        self.buckets = [Bucket(named, weight_decay, dtype, home, shards, shard) for named in groups]
        self.copies = CopyStream(self.buckets) if offload else None
        # Counts of steps: taken (AdamW's t), skipped, skipped in a row, good in a row.
        self.updates, self.skipped, self.skips_in_row, self.good_in_row = 0, 0, 0, 0
        self.scale = 2.0**16 if dtype == torch.float16 else 1.0                     # factor of the loss
        # The step under way
        self.complete = False                # backward was called with its last micro-batch
        self.unsent = deque()                # buckets of this micro-batch whose reduce-scatter has not begun
        self.pending = deque()               # reduce-scatters that run: (bucket, N parts of (n,), works)
        for p in self.params.values():
            p.register_post_accumulate_grad_hook(self.on_gradient)

    # ---- phase 1: backward, reduce-scatter ----

    def backward(self, loss: Tensor | None, last: bool = True) -> None:
        """Phase 1: adds the gradient of one micro-batch, summed over processes, to that of the step.

        Every process calls it equally often in a step, with None where it has no examples in this round. last, the same
        on all processes, says that this is the step's last micro-batch: ddp sums over processes only then.
        """
        assert not self.complete, "backward after the step's last micro-batch: its gradient would miss the sum"
        self.refuse_other_gradients()
        self.complete = last
        self.unsent.extend(self.buckets)
        self.mark("backward begins")
        if loss is not None:
            (loss * self.scale).backward()                     # meanwhile on_gradient sends the buckets that fill
        self.mark("backward ends")
        while self.unsent:                                     # the others: a parameter without a gradient counts as 0
            self.reduce_scatter(self.unsent.popleft())
        self.wait()                                            # for all reduce-scatters

    def on_gradient(self, p: nn.Parameter) -> None:
        """Autograd has computed the gradient of p. Sends the buckets that are full, in index order."""
        while self.unsent and self.unsent[0].full():
            self.reduce_scatter(self.unsent.popleft())

    def reduce_scatter(self, bucket: Bucket) -> None:
        """Starts to sum the bucket's gradient over processes. This process will keep the sum of its own shard."""
        gradient = bucket.take_gradient()                                           # (N * n,)
        if self.sharded:
            self.wait(self.MAX_PENDING - 1)
            parts = gradient.split(len(bucket.shard))                               # N of (n,), one for each process
            received = [part if r == self.rank else torch.empty_like(part) for r, part in enumerate(parts)]
            self.pending.append((bucket, received, exchange(parts, received, self.rank)))   # N of (n,), one from each
        else:                                                                       # N = 1: ddp sums the whole
            self.add(bucket, gradient)
            if self.world > 1 and self.complete:
                self.pending.append((bucket, [], [dist.all_reduce(bucket.grad, async_op=True)]))
        self.mark("reduce-scatter begins", bucket)

    def wait(self, most: int = 0) -> None:
        """Waits until at most `most` reduce-scatters run. Adds the result of each to its bucket's sum."""
        while len(self.pending) > most:
            bucket, received, works = self.pending.popleft()
            for work in works:
                work.wait()
            if received:
                self.add(bucket, reduce(torch.add, received[1:], received[0].float()))      # (n,) in fp32
            self.mark("reduce-scatter ends", bucket)

    def add(self, bucket: Bucket, gradient: Tensor) -> None:
        """Adds the gradient of a micro-batch, (n,), to the bucket's sum, which may lie in CPU memory."""
        if self.copies is None:
            bucket.add(gradient)
        else:
            self.copies.start(self.copies.buffer(gradient), gradient, bucket)

    # ---- phase 2: update; phase 3: all-gather ----

    def step(self, lr: float) -> StepStats:
        """Phase 2: clips the summed gradient and updates this process's shards. Phase 3: gathers the new weights.

        A gradient that is not finite skips both. Raises FloatingPointError after MAX_SKIPS skipped steps in a row.
        """
        self.refuse_other_gradients()
        if not self.complete:
            self.backward(None)                                # an empty micro-batch is the last
        copying = self.copies.wait() if self.copies else 0.0
        began = time.perf_counter()
        grad_norm = self.global_norm()
        first_broken = None if math.isfinite(grad_norm) else self.first_broken()
        if first_broken is None:
            self.update(lr, grad_norm)
        for bucket in self.buckets:
            bucket.grad = None
        self.complete = False
        self.count(first_broken)
        return StepStats(grad_norm, first_broken is not None, time.perf_counter() - began, copying)

    def global_norm(self) -> float:
        """Returns the norm of the whole gradient. Every process sums the squares of its shards, (n,) each."""
        squares = torch.stack([sum_of_squares(bucket.grad) for bucket in self.buckets]).sum()
        if self.sharded:
            squares = run.all_reduce(squares.to(self.device))
        return squares.sqrt().item() / self.scale              # the one point of a step where the host waits for a GPU

    def update(self, lr: float, grad_norm: float) -> None:
        """Phases 2 and 3, bucket by bucket: the new weights of one are sent while the next is updated."""
        clip = max(1.0, (grad_norm + 1e-6) / self.max_norm) if self.max_norm else 1.0       # as torch's clip_grad_norm_
        self.updates += 1
        works = []
        for bucket in self.buckets:
            # 2. update
            low = self.copies.buffer(bucket.shard) if self.copies else bucket.shard             # (n,) low precision
            fused_adamw(bucket.master, bucket.grad, bucket.m, bucket.v, low, self.updates, lr, self.betas, self.eps,
                        bucket.weight_decay, divisor=self.scale * clip)
            if self.copies:
                self.copies.start(bucket.shard, low)
            # 3. all-gather
            works += self.all_gather(bucket)
        for work in works:
            work.wait()
        self.mark("all-gather ends")
        self.trace = False

    def all_gather(self, bucket: Bucket) -> list[dist.Work]:
        """Starts to send this process's shard of the new weights to all, and to receive theirs into flat."""
        if not self.sharded:
            return []
        self.mark("all-gather begins", bucket)
        shards = bucket.flat.split(len(bucket.shard))                               # N of (n,)
        return exchange([bucket.shard] * self.world, shards, self.rank)

    # ---- skipped steps, the loss scale, what is refused and traced ----

    def count(self, first_broken: str | None) -> None:
        """Counts skipped steps and adapts the loss scale. All processes know the same norm, so all decide alike."""
        fp16 = self.buckets[0].flat.dtype == torch.float16
        if first_broken is None:
            self.skips_in_row, self.good_in_row = 0, self.good_in_row + 1
            if fp16 and self.good_in_row == self.GROWTH:
                self.scale, self.good_in_row = self.scale * 2, 0
            return
        self.skipped, self.skips_in_row, self.good_in_row = self.skipped + 1, self.skips_in_row + 1, 0
        if fp16 and self.scale <= 1:
            raise FloatingPointError(f"the gradient overflows fp16 even at loss scale 1, first in {first_broken}: "
                                     "use --dtype bf16, or a lower --lr")
        if fp16:
            self.scale /= 2
        if self.skips_in_row >= self.MAX_SKIPS:
            raise FloatingPointError(f"{self.skips_in_row} steps in a row had a gradient that is not finite, first in "
                                     f"{first_broken}: lower --lr, or look at the data")

    def first_broken(self) -> str:
        """Returns the first parameter, in the model's order, with a gradient that is not finite on any process."""
        names = list(self.params)
        broken = torch.zeros(len(names), device=self.device)
        for bucket in self.buckets:
            for name, _, place, _ in pieces(bucket):
                broken[names.index(name)] = not bucket.grad[place].isfinite().all()
        run.all_reduce(broken)
        return next((name for name, n in zip(names, broken) if n), "the sum over all parameters")

    def refuse_other_gradients(self) -> None:
        """Raises RuntimeError for a gradient between two calls of backward: it was never summed over processes."""
        for name, p in self.params.items():
            if p.grad is not None:
                raise RuntimeError(f"{name} has a gradient that is not the optimizer's, as of a plain loss.backward(): "
                                   "call optimizer.backward(loss) instead, after setting .grad to None")

    def mark(self, what: str, bucket: Bucket | None = None) -> None:
        """Under trace, prints when an event of the first step happened, and how many bytes were being sent then."""
        if self.trace:
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()                # else Python is ahead of the GPU
            now, number = time.perf_counter(), self.buckets.index(bucket) if bucket else ""
            megabytes = sum(bucket.flat.nbytes for bucket, *_ in self.pending) / 1e6
            print(f"{now:12.4f} s  {what:<22}{number:>4}{megabytes:9.1f} MB being sent", flush=True)

    # ---- state ----

    @contextmanager
    def masters(self) -> Iterator[None]:
        """Inside this context process 0's parameters hold the fp32 masters, to be saved: a bf16 copy would lose the sum
        of many small updates. All processes take part; the parameters of others stay as they are."""
        for bucket in self.buckets if self.buckets[0].flat.dtype != torch.float32 else ():
            whole = bucket.master.to(self.device)                                   # (n,)
            if self.sharded:
                shards = [torch.empty_like(whole) for _ in range(self.world)] if self.rank == 0 else None
                dist.gather(whole, shards)
                whole = torch.cat(shards or [whole])                                # (N * n,) on process 0
            if self.rank == 0:
                bucket.show(whole.cpu())
        try:
            yield
        finally:
            for bucket in self.buckets:
                bucket.show(bucket.flat)

    COUNTS = ("updates", "skipped", "skips_in_row", "good_in_row", "scale")

    def state_dict(self) -> dict:
        """Returns the piece of each parameter's state that this process owns, and where in the parameter it begins.

        The states of all processes together are whole: any number of processes can load them, under any strategy.
        """
        saved = {}
        for bucket in self.buckets if self.sharded or self.rank == 0 else ():       # under ddp all hold the same
            master = bucket.master.clone() if self.sharded else bucket.master       # a view is saved with all of flat
            for name, p, place, start in pieces(bucket):
                if place.start < place.stop:
                    saved[name] = {"shape": list(p.shape), "start": start, "master": master[place],
                                   "m": bucket.m[place], "v": bucket.v[place]}
        return {"pieces": saved} | {key: getattr(self, key) for key in self.COUNTS}

    def load_state_dict(self, states: list[dict]) -> None:
        """Loads the states of all processes that saved them, which may be more or fewer than this run has.

        Raises ValueError where they hold other parameters."""
        other = sorted(set(self.params) ^ {name for state in states for name in state["pieces"]})
        if other:
            some = ", ".join(other[:5])
            raise ValueError("the checkpoint's optimizer holds other parameters than this model trains, for instance "
                             f"{some}: resume with the flags of the first run")
        for bucket in self.buckets:
            for name, p, place, start in pieces(bucket):
                saved = [state["pieces"][name] for state in states if name in state["pieces"]]
                saved.sort(key=lambda piece: piece["start"])
                shape, here, n = tuple(saved[0]["shape"]), tuple(p.shape), p.numel()
                if shape != here:
                    raise ValueError(f"{name} is {shape} in the checkpoint and {here} here: resume the same model")
                held = sum(len(piece["m"]) for piece in saved)
                if held != n:
                    raise ValueError(f"the checkpoint holds {held} of the {n} numbers of {name}: the file of a process "
                                     "is missing")
                for key in ("master", "m", "v"):
                    whole = torch.cat([piece[key] for piece in saved])              # (elements of p,)
                    getattr(bucket, key)[place].copy_(whole[start:][:place.stop - place.start])
            bucket.shard.copy_(bucket.master)
        for work in [work for bucket in self.buckets for work in self.all_gather(bucket)]:
            work.wait()
        for key in self.COUNTS:
            setattr(self, key, states[0][key])


# ---- what ZeRO-2 is made of -----------------------------------------------------------------------------------------

def group(trainable: Named, bucket_elements: int) -> list[Named]:
    """Returns the parameters of each bucket, the model's last first, as backward computes them. Matrices and vectors
    have separate buckets. A parameter of at least bucket_elements is a bucket alone. 2^20 elements are 2 MB in bf16,
    for which the latency of a message is small."""
    done, filling = [], {True: [], False: []}
    for name, p in reversed(trainable):
        bucket = filling[p.dim() >= 2] if p.numel() < bucket_elements else []
        bucket.append((name, p))
        if sum(q.numel() for _, q in bucket) >= bucket_elements:
            done.append(bucket.copy())
            bucket.clear()
    return done + [bucket for bucket in filling.values() if bucket]


def pieces(bucket: Bucket) -> Iterator[tuple[str, nn.Parameter, slice, int]]:
    """Yields each parameter's piece in this process's shard: its place there, and where in the parameter it begins."""
    own = bucket.own
    for name, p, end in zip(bucket.names, bucket.params, accumulate(bucket.sizes)):
        start = max(end - p.numel(), own.start)                # start, stop, end: places in flat
        stop = max(start, min(end, own.stop))                  # start == stop: nothing of p is in the shard
        yield name, p, slice(start - own.start, stop - own.start), start - end + p.numel()


def fused_adamw(p: Tensor, g: Tensor, m: Tensor, v: Tensor, low: Tensor, step: int, lr: float,
                betas: tuple[float, float], eps: float, weight_decay: float, divisor: float = 1.0,
                chunk: int = 2**18) -> None:
    """Does `adamw` in place, with g divided by divisor, and copies the new p to low, rounded to its dtype.

    All are (n,). low may be p itself. On a CPU a chunk is in the cache when it is read again.
    """
    t = torch.full((), float(step), device=p.device)           # torch.tensor would copy from the host: a GPU waits
    chunk = chunk if p.device.type == "cpu" else len(p)
    for p, g, m, v, low in zip(*(x.split(chunk) for x in (p, g, m, v, low))):       # (chunk,) each
        if divisor != 1:
            g.div_(divisor)                                    # mps ignores the kernel's own divisor, grad_scale
        torch._fused_adamw_([p], [g], [m], [v], [], [t], lr=lr, beta1=betas[0], beta2=betas[1], eps=eps,
                            weight_decay=weight_decay, amsgrad=False, maximize=False)
        low.copy_(p)


def sum_of_squares(x: Tensor) -> Tensor:
    """x (n,) -> (). On a CPU in chunks: torch adds up a long vector in a few fp32 sums, 5e-4 off after 12 million."""
    chunks = x.split(2**16) if x.device.type == "cpu" else [x]
    return torch.stack([torch.dot(chunk, chunk) for chunk in chunks]).sum()


class CopyStream:
    """Copies between a GPU and the optimizer state in CPU memory, on a CUDA stream beside the one that computes.

    Only pinned memory can be copied from and to while CPU and GPU compute. A few pinned buffers are used in turn: one
    is written, one is read, and one is spare.
    """

    BUFFERS = 3

    def __init__(self, buckets: list[Bucket]):
        self.device = buckets[0].flat.device
        self.stream = torch.cuda.Stream(self.device)
        size = max(len(bucket.m) for bucket in buckets)
        pin = self.device.type == "cuda"
        self.buffers = deque(torch.empty(size, pin_memory=pin) for _ in range(self.BUFFERS))    # the next one first
        self.running = deque()               # copies, oldest first: (event of the end, target, bucket of a gradient)
        self.seconds = 0.0

    def buffer(self, like: Tensor) -> Tensor:
        """Returns pinned memory of the dtype and length of like, (n,), after the copy that used it last has ended."""
        if len(self.running) == self.BUFFERS:
            self.finish()
        self.buffers.rotate(-1)
        return self.buffers[-1].view(like.dtype)[:len(like)]

    def start(self, target: Tensor, source: Tensor, bucket: Bucket | None = None) -> None:
        """Starts a copy of (n,): of a gradient to pinned memory, for the sum of bucket, or of new weights from it."""
        computing = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(computing)                     # the GPU has computed source and has read the old target
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
        event = self.stream.record_event()
        if bucket is None:
            computing.wait_event(event)                        # what the GPU computes from here on sees the new weights
        else:
            source.record_stream(self.stream)                  # its memory is not reused before the copy has ended
        self.running.append((event, target, bucket))

    def finish(self) -> None:
        """Waits for the oldest copy. Adds it to its bucket's sum if it is a gradient."""
        began = time.perf_counter()
        event, target, bucket = self.running.popleft()
        event.synchronize()
        if bucket is not None:
            bucket.add(target.to(torch.float32, copy=True))
        self.seconds += time.perf_counter() - began

    def wait(self) -> float:
        """Waits for all copies. Returns the seconds that this process has waited for copies since the last call."""
        while self.running:
            self.finish()
        seconds, self.seconds = self.seconds, 0.0
        return seconds


# ---- the memory plan ------------------------------------------------------------------------------------------------

CARDS = (8, 12, 16, 24, 32, 40, 80)          # GiB
# On a CPU: torch's buffers, and holes between tensors. Measured with glibc: 150 MB in a run of tiny, 250 to 380 of mid.
HEAP = 200_000_000


# Bytes for each number of a matrix while quantize.py dequantizes it. At 8 bits: fp32, and rounded to the compute dtype.
# At 4 bits: the code in a byte, and in fp32 its zero, its scale, their difference and the product.
DEQUANTIZED = {8: 6, 4: 17}


class Size(NamedTuple):
    """Sizes of the models of a run, from which the plan is computed."""
    config: LlamaConfig    # of the largest
    head: bool             # logits are computed
    total: int             # parameters
    trained: int
    largest: int           # elements of the largest trained parameter
    rank: int = 0          # of adapters
    bits: int = 0          # of the linears of the layers, if they are quantized; then they are no parameters
    codes: int = 0         # bytes of these linears


class Part(NamedTuple):
    """What a process holds for one purpose."""
    what: str
    alive: str             # "always"; "forward": until backward begins; "backward": when it ends; "rollout": of ppo.py
    device: int            # bytes there
    cpu: int = 0           # bytes in CPU memory, beside a GPU


def size_of(config: LlamaConfig, lora_rank: int = 0, bits: int = 0, ppo: bool = False) -> Size:
    """Returns the size of a language model, with adapters of lora_rank beside all linears of its layers.

    ppo: of the four models of ppo.py. With adapters they share one base, and the reward model has an adapter of that
    rank too, on which the critic's is put."""
    with torch.device("meta"):                                 # shapes without memory
        model, trunk = Llama(config), Llama(config, head=False)
    base, judge = (sum(p.numel() for p in network.parameters()) for network in (model, trunk))
    largest = lora_rank * config.ffn_dim or max(p.numel() for p in model.parameters())
    linears = [module for module in model.layers.modules() if isinstance(module, nn.Linear)]
    adapters = sum(lora_rank * (linear.in_features + linear.out_features) for linear in linears)
    trained, frozen, codes = (adapters, base, 0) if lora_rank else (base, 0, 0)
    if ppo:
        judge = (adapters or judge) + config.dim               # critic or reward model, with a head of one number
        frozen += judge if lora_rank else trained + judge      # adapters switched off are the reference
        trained += judge
    if bits:
        codes = sum(code_bytes(linear, bits) for linear in linears)
        frozen -= sum(linear.weight.numel() for linear in linears)
    return Size(config, True, trained + frozen, trained, largest, lora_rank, bits, codes)


def code_bytes(linear: nn.Linear, bits: int, group_size: int = 128) -> int:
    """Returns the bytes of a quantized linear whose sides 8 divides, see Linear8 and Linear4 of quantize.py."""
    O, I = linear.out_features, linear.in_features
    grids = -(-I // group_size) * O
    return bits * O * I // 8 + (4 * O if bits == 8 else 2 * grids + grids // 2 + 4 * I)     # scales, zeros, groups


def plan(size: Size, strategy: str, nproc: int, tokens: int, element: int = 2, grad_checkpoint: bool = False,
         micro_batches: int = 1, gpu: bool = True, cached: int = 0) -> dict[str, int]:
    """Returns the bytes of one process by what they are for. On the device and in CPU memory alike

        peak = what is alive always + max(what is alive in forward, what is alive in backward, ... in a rollout)

    since backward frees activations while it computes gradients: the peak is where it begins, or where it ends. A CPU's
    heap keeps what a rollout frees, in pieces too small for the tensors of an update: there it counts as alive always.

    tokens: of a micro-batch. element: bytes of a number that the model computes with. cached: tokens of a rollout in
    the KV cache, 0 where there are none.
    """
    strategy = run.ALIASES.get(strategy, strategy)
    offload = strategy == "zero2_cpu" and gpu                  # the optimizer state lies in CPU memory ...
    here = not offload                                         # ... or on the device
    N = nproc if strategy.startswith("zero2") else 1           # shards
    P, Psi, L = size.total, size.trained, size.largest
    n = -(-Psi // N)                                           # elements that this process owns
    c = size.config
    V, C, Q, K, F = c.vocab_size, c.dim, c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim, c.ffn_dim
    linears = element * C * (c.n_layers * (2 * Q + 2 * K + 3 * F) + V)              # their bytes, not quantized
    rows_at_once = 3 * tokens if cached else 2 * min(tokens, 512)                   # of V numbers, see "logits"
    rollout = "rollout" if gpu else "always"
    parts = [                                                  # of the state: ZeRO's section 3.1, gradient in fp32
        Part("weights", "always", element * P + size.codes),
        Part("dequantized", "always", DEQUANTIZED.get(size.bits, 0) * C * F),
        Part("gradient", "backward", 4 * n * here, 4 * n * offload),
        Part("master", "always", 4 * n * here * (element < 4), 4 * n * offload),    # in fp32 it is the weights
        Part("moments", "always", 8 * n * here, 8 * n * offload),
        # The largest bucket is one matrix: autograd's gradient, the parts from other processes, their sum in fp32.
        Part("buckets", "backward", element * L + (element + 4) * L // N * (N > 1)),
        Part("pinned", "always", 0, 4 * CopyStream.BUFFERS * -(-L // N) * offload),
        Part("activations", "forward", activation_bytes(size, tokens, element, grad_checkpoint, gpu)),
        # `sft.HeadLoss`: logits and probabilities of 512 rows, and the gradients of hidden states and head. ppo.py: log
        # probabilities of all rows, their gradient and that of the logits
        Part("logits", "forward", 4 * size.head * (rows_at_once * V + tokens * C + V * C * (size.rank == 0))),
        # `quantize.packed` holds codes twice, and on a CPU plain weights too.
        Part("packed", rollout, (cached > 0) * (size.codes or linears * (not gpu))),
        Part("cache", rollout, 2 * element * c.n_layers * K * cached),
        Part("heap", "always", HEAP * (not gpu)),
    ]
    rows = {}
    for where, name_of_peak in (("device", "peak at once"), ("cpu", "all")):
        held = Counter()
        for part in parts:
            rows[f"{where}: {part.what}"] = getattr(part, where)
            held[part.alive] += getattr(part, where)
        rows[f"{where}: {name_of_peak}"] = held.pop("always") + max(held.values())
    # Section 7: a reduce-scatter a micro-batch and an all-gather a step; ddp's fp32 all-reduce is one of each.
    sent = Psi * (nproc - 1) / nproc * (element * (micro_batches + 1) if N > 1 else 8)
    copied = n * (micro_batches * (element if N == 1 else 4) + element) * offload
    return rows | {"sent a step": int(sent), "device <-> cpu a step": copied}


def activation_bytes(size: Size, tokens: int, element: int, grad_checkpoint: bool, gpu: bool = True) -> int:
    """Returns the bytes that autograd keeps of the blocks and the last norm. With gradient checkpointing it keeps only
    the input of every block, and all of the block that is recomputed."""
    c = size.config
    C, F, r = c.dim, c.ffn_dim, size.rank
    Q, K = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    quotient = 0 if r else 4                                   # a CPU keeps fp32 input, and quotient for a trained norm
    norm = element * C if gpu else (4 + quotient) * C
    kept = [
        2 * norm,
        element * 2 * C,                                       # what the norms put out
        element * (2 * Q + 2 * K),                             # rotated queries and keys, values, attention's output
        element * 4 * F,                                       # w1 x, silu(w1 x), w3 x and the product
        element * 7 * r,                                       # the input of each B of an adapter
    ]
    L = c.n_layers
    blocks = L * element * C + sum(kept) if grad_checkpoint else L * sum(kept)
    return tokens * (blocks + norm)


def run_plan(trained: list[nn.Module], frozen: list[nn.Module], strategy: str, world: run.World, tokens: int,
             dtype: torch.dtype, lora_rank: int = 0, grad_checkpoint: bool = False,
             cached: int = 0) -> tuple[str, int]:
    """Returns the plan of a run in one line, and its peak in bytes. Of frozen models only the weights count."""
    numel = [p.numel() for model in trained for p in model.parameters() if p.requires_grad]
    models = trained + frozen                                  # some share weights
    plain = sum({p.data_ptr(): p.nbytes for model in models for p in model.parameters()}.values())
    stored = sum({t.data_ptr(): t.nbytes for model in models for t in model.state_dict().values()}.values())
    scheme = getattr(models[0], "trunk", models[0]).quantized or {"bits": 0}
    config = max((model.config for model in trained), key=lambda c: c.dim * c.n_layers)
    head = any(hasattr(model, "output") for model in trained)
    size = Size(config, head, plain // dtype.itemsize, sum(numel), max(numel), lora_rank, scheme["bits"],
                stored - plain)
    rows = plan(size, strategy, world.world, tokens, dtype.itemsize, grad_checkpoint, 1, world.device.type == "cuda",
                cached)
    shown = ", ".join(row.removeprefix("device: ") + " " + gb(n) for row, n in rows.items() if n >= 5e6)
    return f"memory of a process: {shown}", rows["device: peak at once"]


def gb(n: int) -> str:
    gigabytes = n / 1e9
    return f"{gigabytes:.2f} GB" if n else "-"


# ---- command line ---------------------------------------------------------------------------------------------------

def main(argv: list[str] | None = None) -> None:
    parser, shapes = run.Parser("What a training run needs of memory."), " ".join(SHAPES)
    flag = parser.add_argument
    flag("--plan", metavar="MODEL",
         help=f"print the bytes that a process needs: a weights directory, or one of {shapes}")
    flag("--nproc", type=run.whole(1), default=1, help="processes")
    flag("--strategy", choices=run.STRATEGIES, help="only this one")
    flag("--batch_size", type=run.whole(1), default=4, help="examples a process and micro-batch")
    flag("--accumulation_steps", type=run.whole(1), default=1, help="micro-batches a step")
    flag("--max_len", type=run.whole(2), default=512, help="tokens of an example")
    flag("--lora_rank", type=run.whole(0), default=0, help="rank of adapters; 0 trains all weights")
    flag("--bits", type=int, choices=[4, 8], default=0, help="of a quantized model, beside which adapters are trained")
    flag("--ppo", action="store_true", help="the four models of ppo.py, and its rollouts")
    flag("--grad_checkpoint", action="store_true", help="recompute activations in backward")
    flag("--dtype", choices=["bf16", "fp32"], default="bf16", help="to compute in")
    args = parser.parse_args(argv)
    if args.plan is None:
        return parser.print_help()
    if args.plan not in SHAPES and not Path(args.plan).is_dir():
        raise ValueError(f"--plan {args.plan}: neither a weights directory nor one of {shapes}")
    config = SHAPES.get(args.plan) or LlamaConfig(**weights.read_config(args.plan))
    if args.bits and not args.lora_rank:
        raise ValueError(f"--bits {args.bits} needs --lora_rank: quantized weights are frozen, what is trained are "
                         "adapters")
    size = size_of(config, args.lora_rank, args.bits, args.ppo)
    tokens, element = args.batch_size * args.max_len, weights.DTYPES[args.dtype].itemsize
    usual = "naive" if args.nproc == 1 else "ddp"
    names = [args.strategy] if args.strategy else [usual, "zero2", "zero2_cpu"]
    plans = [plan(size, name, args.nproc, tokens, element, args.grad_checkpoint, args.accumulation_steps,
                  cached=tokens * args.ppo) for name in names]
    # A gigabyte is for the CUDA context, cuBLAS and what the allocator cannot use.
    needed = [rows["device: peak at once"] / 2**30 + 1 for rows in plans]
    cards = [next((f"{card} GB" for card in CARDS if gib <= card), "none") for gib in needed]
    table = {row: [rows[row] for rows in plans] for row in plans[0]}
    cells = {"": names} | {row: map(gb, numbers) for row, numbers in table.items() if any(numbers)}
    billions, millions = size_of(config).total / 1e9, size.trained / 1e6
    print(f"LLaMA {args.plan}, {billions:.2f} G parameters, {millions:,.1f} M trained, {args.dtype}, "
          f"{args.nproc} processes, micro-batches of {args.batch_size} x {args.max_len} tokens: bytes of one process")
    for row, columns in (cells | {"fits a card of": cards}).items():
        print(f"  {row:<24}" + "".join(f"{column:>12}" for column in columns))


if __name__ == "__main__":
    run.command(main)
