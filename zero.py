"""Processes and sharding: how several processes train one model, and the AdamW that they share.

Strategies here: `naive` (one process) and `ddp` (every process holds everything; gradients are summed over processes).
Rajbhandari et al. 2020, "ZeRO" (arXiv 1910.02054) is the paper for what can be sharded; Li et al. 2020, "PyTorch
Distributed" (arXiv 2006.15704) for buckets and their overlap with backward; Loshchilov & Hutter 2019 for AdamW.

    torchrun --standalone --nproc_per_node=2 sft.py --strategy ddp
    python sft.py                                   one process is the same code with world 1 and no communication

All trainable parameters live in flat buckets. A bucket is cut in the order in which backward finishes parameters, which is
last layer first, so the first bucket is complete, and its sum under way, while most of backward is still to come:

    parameters, last first   [ w2.1 | w1.1 | wq.1 ][ w2.0 | w1.0 | wq.0 ][ norms, not decayed ]
                              bucket 0               bucket 1               bucket 2
    backward  -------------->  hook hook hook ^       hook hook hook ^       ... ^
    all-reduce of a bucket                    |==== 0 ====|          |==== 1 ====|

    each bucket, fp32:   master (weights)   grad (sum over micro-batches)   m, v (AdamW's moments)
    in fp32 the model's parameters ARE views of master; in bf16/fp16 they are views of a low copy that every step refreshes

Buckets are launched strictly in index order on every process: collectives match up by order alone, so two processes that
launched in the order of their own backward could add bucket 0 of one to bucket 1 of the other. A bucket with a parameter
that got no gradient is filled with zeros and launched by `flush`; else the other processes would wait for it for ever.

Departures: torch's own DistributedDataParallel is not used; bucket sums are sums, not means (the loss is already divided by
the number of tokens over all processes); AdamW's epsilon is outside the square root and after bias correction, as torch has it.
"""

import ctypes
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
# Its functions take the process group of the moment of import as a default argument. Imported later (by torch.compile or
# torch.utils.checkpoint) they would keep the group and its threads alive beyond `stop`: one exit in four then aborts.
import torch.distributed.nn
from torch import Tensor, nn

STRATEGIES = ("naive", "ddp")


# ---- processes ------------------------------------------------------------------------------------------------------

class World(NamedTuple):
    rank: int            # this process, 0 .. world - 1
    world: int           # number of processes
    device: torch.device


def start(device: str = "auto", strategy: str = "ddp") -> World:
    """Join the processes that torchrun (or any launcher that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT)
    started; without a launcher this process is the whole world. The one place where a device is chosen.
    Raises ValueError when the device is not there, or `naive` meets more than one process."""
    keep_freed_memory()
    rank, world, local = (int(os.environ.get(key, default)) for key, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if strategy == "naive" and world > 1:
        raise ValueError(f"--strategy naive is for one process and {world} were started: they would train {world} different models; use --strategy ddp")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(f"process {local} of this machine wants GPU {local}, but there are {torch.cuda.device_count()}: start fewer processes or use --device cpu")
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
    elif device == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps, but this machine has no Apple GPU: use --device cpu")
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return World(rank, world, torch.device(device))


def keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next one. By itself it hands large blocks back to the system at once, and
    every step pays again for having their pages zeroed: a tenth to a third of a step on a CPU. Linux with glibc only."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt is not None:
            for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**26)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD in malloc.h
                mallopt(parameter, value)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


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


# ---- AdamW ----------------------------------------------------------------------------------------------------------

def adamw(p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> tuple[Tensor, Tensor, Tensor]:
    """One step of AdamW (Loshchilov & Hutter 2019, algorithm 2), as a formula: returns the new p, m, v. step counts from 1.

    `Optimizer.step` lets torch._fused_adamw_ do this arithmetic in one pass over memory; a test holds the two together.
    """
    beta1, beta2 = betas
    p = p - lr * weight_decay * p            # decoupled decay: not part of the gradient, so Adam's 1/sqrt(v) does not scale it
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    m_hat = m / (1 - beta1 ** step)          # m and v start at 0 and are too small by exactly this factor
    v_hat = v / (1 - beta2 ** step)
    return p - lr * m_hat / (v_hat.sqrt() + eps), m, v


@dataclass
class Bucket:
    names: list[str]
    params: list[nn.Parameter]
    weight_decay: float
    master: Tensor                 # fp32, all parameters one after the other
    grad: Tensor                   # fp32, the sum of this step's micro-batches
    m: Tensor
    v: Tensor
    low: Tensor | None             # bf16/fp16 copy that the model computes with; None in fp32
    spans: list[slice] = field(default_factory=list)   # where each parameter lies
    got: set[int] = field(default_factory=set)         # parameters whose gradient lies in grad, this step
    waiting: set[int] = field(default_factory=set)     # parameters whose gradient of the last micro-batch is still to come
    work: dist.Work | None = None                      # the all-reduce under way


class StepStats(NamedTuple):
    grad_norm: float   # over all parameters and processes, before clipping
    skipped: bool      # the gradient was not finite, nothing was changed


class Optimizer:
    """AdamW over the trainable parameters of a model, for one process or many.

    Per step: `backward(loss, last=...)` for each micro-batch, `flush()`, `step(lr)`. Matrices are decayed, vectors (norms) are not.

    named_parameters: as of a module; frozen ones are left out, a tied one counts once. dtype: what the model computes in
    (fp32, bf16, fp16). max_norm: clip the global gradient norm to it, 0 = never. fp16 scales the loss (Micikevicius et al.
    2018): doubled after `GROWTH` good steps, halved at an overflow, which skips the step on all processes alike.
    """

    GROWTH = 1000          # good steps until the loss scale is tried at twice its value (torch's GradScaler waits 2000)
    MAX_SKIPS = 20         # skipped steps in a row after which the run is lost

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], dtype: torch.dtype = torch.float32, betas: tuple[float, float] = (0.9, 0.95),
                 eps: float = 1e-8, weight_decay: float = 0.0, max_norm: float = 1.0, bucket_elements: int = 2**22):
        trainable = list({id(p): (name, p) for name, p in named_parameters if p.requires_grad}.values())
        if not trainable:
            raise ValueError("the model has no trainable parameter")
        self.betas, self.eps, self.max_norm = betas, eps, max_norm
        self.updates = 0                                          # steps taken (not skipped): AdamW's t
        self.skipped, self.skips_in_row, self.good_in_row = 0, 0, 0
        self.scale = 2.0**16 if dtype == torch.float16 else 1.0   # of the loss
        self.dynamic = dtype == torch.float16
        self.buckets: list[Bucket] = []
        self.next_launch = 0                                      # index of the bucket that is launched next
        self.reducing = False                                     # does this backward hold the last micro-batch?
        for names, params, decay in group(trainable, bucket_elements, weight_decay):
            self.buckets.append(make_bucket(names, params, decay, dtype))
        for bucket in self.buckets:
            for i, p in enumerate(bucket.params):
                p.register_post_accumulate_grad_hook(lambda p, bucket=bucket, i=i: self.collect(bucket, i, p))

    def collect(self, bucket: Bucket, i: int, p: nn.Parameter) -> None:
        """Autograd has finished p.grad: add it to the bucket, and launch what is complete."""
        assert bucket.work is None, "backward after the micro-batch that was called the last: its gradient would miss the sum"
        into = bucket.grad[bucket.spans[i]]
        into.add_(p.grad.view(-1)) if i in bucket.got else into.copy_(p.grad.view(-1))
        p.grad = None
        bucket.got.add(i)
        if self.reducing:
            bucket.waiting.discard(i)
            while self.next_launch < len(self.buckets) and not self.buckets[self.next_launch].waiting:
                self.launch()

    def launch(self) -> None:
        """Start the sum of the next bucket over all processes; its silent parameters count as zero."""
        bucket = self.buckets[self.next_launch]
        for i in set(range(len(bucket.params))) - bucket.got:
            bucket.grad[bucket.spans[i]].zero_()
        if dist.is_initialized():
            bucket.work = dist.all_reduce(bucket.grad, async_op=True)
        self.next_launch += 1

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Backward of one micro-batch; `last` lets the buckets travel while it runs."""
        if last:
            self.reducing = True
            for bucket in self.buckets:
                bucket.waiting = set(range(len(bucket.params)))
        (loss * self.scale).backward()
        self.reducing = False

    def flush(self) -> None:
        """Launch what backward did not: buckets with a silent parameter, all of them where a process had no micro-batch.
        Call it before any other collective between backward and step, else that one meets a bucket of another process."""
        while self.next_launch < len(self.buckets):
            self.launch()

    def step(self, lr: float) -> StepStats:
        """Clip and apply the summed gradient. Raises FloatingPointError after MAX_SKIPS skipped steps in a row."""
        self.flush()
        for bucket in self.buckets:
            if bucket.work is not None:
                bucket.work.wait()
        squares = torch.stack([torch.dot(bucket.grad, bucket.grad) for bucket in self.buckets])
        grad_norm = squares.sum().sqrt().item() / self.scale  # the one host synchronisation of a step
        finite = grad_norm < float("inf")  # False for NaN too
        if finite:
            factor = 1.0 / self.scale
            if self.max_norm and grad_norm > self.max_norm:
                factor *= self.max_norm / (grad_norm + 1e-6)  # 1e-6 as in torch's clip_grad_norm_
            self.updates += 1
            for bucket in self.buckets:
                if factor != 1.0:
                    bucket.grad.mul_(factor)
                self.update(bucket, lr)
        lost = None if finite else self.first_broken()
        for bucket in self.buckets:
            bucket.got, bucket.waiting, bucket.work = set(), set(), None
        self.next_launch = 0
        self.count(finite, lost)
        return StepStats(grad_norm, not finite)

    def update(self, bucket: Bucket, lr: float) -> None:
        t = torch.tensor(float(self.updates), device=bucket.master.device)
        torch._fused_adamw_([bucket.master], [bucket.grad], [bucket.m], [bucket.v], [], [t], lr=lr, beta1=self.betas[0], beta2=self.betas[1],
                            weight_decay=bucket.weight_decay, eps=self.eps, amsgrad=False, maximize=False)
        if bucket.low is not None:
            bucket.low.copy_(bucket.master)

    def first_broken(self) -> str:
        for bucket in reversed(self.buckets):  # reversed buckets are in the model's order
            for name, span in reversed(list(zip(bucket.names, bucket.spans))):
                if not bucket.grad[span].isfinite().all():
                    return name
        return "the sum over all parameters"

    def count(self, finite: bool, lost: str | None) -> None:
        """Book-keeping of skipped steps and of the loss scale; all processes see the same sums, so all decide alike."""
        if finite:
            self.skips_in_row, self.good_in_row = 0, self.good_in_row + 1
            if self.dynamic and self.good_in_row == self.GROWTH:
                self.scale, self.good_in_row = self.scale * 2, 0
            return
        self.skipped, self.skips_in_row, self.good_in_row = self.skipped + 1, self.skips_in_row + 1, 0
        if self.dynamic and self.scale <= 1:
            raise FloatingPointError(f"the gradient overflows fp16 even at loss scale 1, first in {lost}: use --dtype bf16, or a lower --lr")
        if self.dynamic:
            self.scale /= 2
        if self.skips_in_row >= self.MAX_SKIPS:
            raise FloatingPointError(f"{self.skips_in_row} steps in a row had a gradient that is not finite, first in {lost}: lower --lr, or look at the data")

    # ---- state ----

    @contextmanager
    def masters(self) -> Iterator[None]:
        """Within it the model's parameters are views of the fp32 masters, to save them: what many small updates have added
        up to may be less than a bf16 copy can hold."""
        for bucket in self.buckets:
            for p, span in zip(bucket.params, bucket.spans):
                p.data = bucket.master[span].view(p.shape)
        yield
        for bucket in self.buckets:
            home = bucket.master if bucket.low is None else bucket.low
            for p, span in zip(bucket.params, bucket.spans):
                p.data = home[span].view(p.shape)

    def state_dict(self) -> dict:
        """Everything that continuing needs, by parameter name, so that any number of processes can load it."""
        flat = {key: {name: getattr(bucket, key)[span].view(p.shape) for bucket in self.buckets for name, p, span in zip(bucket.names, bucket.params, bucket.spans)}
                for key in ("master", "m", "v")}
        return flat | {key: getattr(self, key) for key in ("updates", "skipped", "skips_in_row", "good_in_row", "scale")}

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError when the state is of other parameters."""
        ours = {name for bucket in self.buckets for name in bucket.names}
        if ours != set(state["master"]):
            odd = sorted(ours ^ set(state["master"]))[:5]
            raise ValueError(f"the checkpoint's optimizer holds other parameters than this model trains, for instance {', '.join(odd)}: resume with the flags of the first run")
        for bucket in self.buckets:
            for name, p, span in zip(bucket.names, bucket.params, bucket.spans):
                for key in ("master", "m", "v"):
                    if state[key][name].shape != p.shape:
                        raise ValueError(f"{name} is {tuple(state[key][name].shape)} in the checkpoint and {tuple(p.shape)} here: resume the same model")
                    getattr(bucket, key)[span].copy_(state[key][name].reshape(-1))
            if bucket.low is not None:
                bucket.low.copy_(bucket.master)
        for key in ("updates", "skipped", "skips_in_row", "good_in_row", "scale"):
            setattr(self, key, state[key])


def group(trainable: list[tuple[str, nn.Parameter]], bucket_elements: int, weight_decay: float) -> list[tuple[list[str], list[nn.Parameter], float]]:
    """Share parameters out over buckets, last parameter first, matrices (decayed) and vectors (not) apart.
    2^22 elements are 16 MB in fp32: large enough that latency does not count, small enough that the first leaves early."""
    done, filling = [], {}
    for name, p in reversed(trainable):
        decay = weight_decay if p.dim() >= 2 else 0.0
        names, params, _ = filling.setdefault((decay, p.dim() >= 2), ([], [], decay))
        names.append(name)
        params.append(p)
        if sum(q.numel() for q in params) >= bucket_elements:
            done.append(filling.pop((decay, p.dim() >= 2)))
    return done + list(filling.values())


def make_bucket(names: list[str], params: list[nn.Parameter], weight_decay: float, dtype: torch.dtype) -> Bucket:
    """Move the parameters into flat storage; from here on p.data is a view of it, in `dtype`."""
    numel, device = sum(p.numel() for p in params), params[0].device
    master, grad, m, v = (torch.zeros(numel, dtype=torch.float32, device=device) for _ in range(4))
    low = None if dtype == torch.float32 else torch.zeros(numel, dtype=dtype, device=device)
    bucket = Bucket(names, params, weight_decay, master, grad, m, v, low)
    offset = 0
    for p in params:
        span = slice(offset, offset + p.numel())
        bucket.spans.append(span)
        master[span].copy_(p.detach().view(-1))  # from the dtype of the file: a detour over bf16 would lose its low bits
        offset = span.stop
    home = master if low is None else low.copy_(master)
    for p, span in zip(params, bucket.spans):
        p.data = home[span].view(p.shape)
    return bucket
