"""Stage 4, smaller weights: round-to-nearest (RTN), GPTQ, the linear layers that run the result, and perplexity.

    python quantize.py                                                      the demo: reads out/ppo, writes out/ppo-int4
    python quantize.py DIR --calibration FILE --text FILE --save_path OUT   4 bits by GPTQ, and a table of what it cost
    python quantize.py DIR --bits 8 --text FILE --save_path OUT             8 bits by RTN
    python quantize.py DIR --eval --text FILE                               perplexity of any directory

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2210.17323).
A weight becomes a code of 4 or 8 bits on a grid that all weights of a group (neighbours in a row) share:

    w ~ (q - zero) * scale    symmetric: zero is the middle code;  asymmetric: the grid spans smallest to largest weight

RTN takes the nearest code. GPTQ minimizes |W X - Q X|^2 and not |W - Q|^2, where X are the layer's inputs on some text.
It rounds one column after another, and after each changes those not rounded yet, so that they make up for the error:

    E_j = (W_j - Q_j) / U_jj      W_k = W_k - E_j U_jk  for all k > j      U^T U = H^-1, U upper triangular, H = X X^T

Four-bit layers are stored as AutoGPTQ stores them. Eight codes of one output o, of neighbouring inputs i, share a word:

    qweight[r, o], an int32     bit 31      28                                   7     4 3     0
    r = i // 8                     | i=8r+7  | i=8r+6  |  ...  | i=8r+2  | i=8r+1  | i=8r    |     shape (I/8, O)

    qzeros (G, O/8)  the same, eight outputs of one group to a word; "gptq" files hold zero - 1, "gptq_v2" files zero
    scales (G, O)    float16             g_idx (I,)  the group of each input: i // group_size in the files written here

Eight-bit layers are two tensors: `weight` (O, I) int8 and `scale` (O,) float32, w ~ weight * scale.

Where the steps of `gptq` differ from the paper, by what measured best on stories260K, a LLaMA of 260,000 weights:
1. The weights of a dead input (H_jj = 0) are rounded to nearest; the authors set them to zero.
2. Columns are taken by falling H_jj (the authors' --act-order) unless --file_order is given.
3. The factor U comes from one Cholesky and one triangular inverse, see `inverse_factor`.
4. Grids are set before the first column is rounded (AutoGPTQ's "static groups"). So columns may be taken in any order
   and a group still is a run of neighbours, which the fast kernels need. A grid is shrunk, down to 0.6 of its span,
   where that lowers the error that GPTQ counts, sum (w - q)^2 / U_jj^2. The authors' code clips too, but with equal
   weights. RTN does not: with equal weights 4 bits of SmolLM2-135M went from perplexity 34.1 to 38.2, 8 bits from 27.41
   to 27.49 (unrounded 27.43).
5. The updates are the paper's.

Letters: O outputs and I inputs of a layer, G groups, S columns of a group, N tokens; B, T, C as in model.py.
"""

import functools
import math
import time
from argparse import Namespace
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora
from data import demo, records, run, text, weights
from model import Block, Llama, LlamaConfig, Where

SHRINK = tuple(1 - i / 40 for i in range(17))  # of a grid's span: 1, 0.975, ... 0.6
SMALLEST = {4: 2.0**-24, 8: 2.0**-126}         # bits: least scale above 0 in a file, which has float16 or float32


# ---- grids and rounding to nearest ----------------------------------------------------------------------------------

class Quantized(NamedTuple):
    """A matrix W (O, I) as w[o, i] ~ (q[o, i] - zero[o, group[i]]) * scale[o, group[i]]."""
    q: Tensor        # (O, I) uint8, 0 .. 2^bits - 1
    scale: Tensor    # (O, G) float32; for 4 bits they are numbers of float16
    zero: Tensor     # (O, G) uint8
    group: Tensor    # (I,) int32

    def dequantize(self) -> Tensor:
        g = self.group.long()
        zero, scale = self.zero.float().T[g].T, self.scale.T[g].T  # (O, I) each, in memory as a Linear4 has its codes
        return (self.q.float() - zero) * scale                     # (O, I)


def nearest_code(w: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Returns the nearest code of each w, as a float; shapes broadcast."""
    return (w / scale + zero).round_().clamp_(0, 2**bits - 1)


def best_grid(w: Tensor, bits: int, sym: bool, shrinks: tuple[float, ...],
              importance: Tensor) -> tuple[Tensor, Tensor]:
    """Returns scale and zero, (O, G) each, of the groups w (O, G, S): of the full span times each of `shrinks`, the one
    with the least sum of importance (G, S) * (w - its code's value)^2."""
    most = 2**bits - 1
    low = w.amin(-1).clamp_(max=0)                                             # (O, G): 0 is in the span
    high = w.amax(-1).clamp_(min=0)                                            # (O, G)
    if sym:
        high = torch.maximum(high, -low)
        low = -high
    best_scale, best_zero, least = low, low, math.inf
    for shrink in shrinks:
        scale = ((high - low) * (shrink / most)).clamp_(min=SMALLEST[bits])
        if bits == 4:
            scale = scale.half().float()  # before the codes are chosen, so that they fit what the file will say
        zero = (-low * shrink / scale).round_().clamp_(0, most)
        if sym:
            zero = torch.full_like(scale, 2**(bits - 1))
        q = nearest_code(w, scale[..., None], zero[..., None], bits)           # (O, G, S)
        difference = q.sub_(zero[..., None]).mul_(scale[..., None]).sub_(w)    # (O, G, S), in place: it stays in cache
        error = difference.square_().mul_(importance).sum(-1)                  # (O, G)
        better = error < least
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
        least = torch.where(better, error, least)
    return best_scale, best_zero


def grids(w: Tensor, bits: int, group_size: int, sym: bool, clip: bool, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Returns scale and zero, (O, G) fp32 each, of the groups of w (O, I). An error in a column costs importance (I,)
    times its square; with clip the best of all SHRINK is taken."""
    O, I = w.shape
    S = I if group_size == -1 else min(group_size, I)
    padding = (0, -I % S)                                                      # columns that the last group lacks
    shrinks = SHRINK if clip else (1.0,)
    importance = F.pad(importance, padding).view(-1, S)                        # (I,) -> (G, S)
    rows = max(1, 2**16 // I) if w.device.type == "cpu" else O                 # 256 KB stay in a processor's cache
    parts = [F.pad(part, padding).unflatten(1, (-1, S)) for part in w.split(rows)]         # (rows, I) -> (rows, G, S)
    found = [best_grid(part, bits, sym, shrinks, importance) for part in parts]
    scale, zero = zip(*found)
    return torch.cat(scale), torch.cat(zero)


def groups_of(I: int, group_size: int, device=None) -> Tensor:
    """Returns the group of each column, (I,) int32."""
    return torch.arange(I, dtype=torch.int32, device=device) // (I if group_size == -1 else group_size)


def rtn(w: Tensor, bits: int, group_size: int, sym: bool) -> Quantized:
    """Rounds W (O, I) to nearest. Every group of group_size columns (-1: the whole row; the last one may be smaller)
    has a grid of its own. Raises ValueError for bits or a group size that no grid has."""
    check_grid(bits, group_size)
    w = w.float()
    scale, zero = grids(w, bits, group_size, sym, False, torch.ones_like(w[0]))  # (O, G) each
    group = groups_of(w.shape[1], group_size, w.device)
    g = group.long()
    q = nearest_code(w, scale[:, g], zero[:, g], bits)                          # (O, I)
    return Quantized(q.to(torch.uint8), scale, zero.to(torch.uint8), group)


# ---- GPTQ -----------------------------------------------------------------------------------------------------------

def hessian(inputs: Iterable[Tensor]) -> Tensor | None:
    """Returns H = X X^T (I, I) in fp32 of a layer's inputs, which come in parts x (N, I); None where there are none.

    The lower triangle is summed, 256 columns at a time, which spares nearly half of the products."""
    H = None
    for x in inputs:
        x = x.float()
        H = x.new_zeros(x.shape[1], x.shape[1]) if H is None else H
        for start in range(0, len(H), 256):
            H[start:, start:start + 256].addmm_(x[:, start:].T, x[:, start:start + 256])  # (I - start, N) @ (N, 256)
    return H if H is None else H.tril_() + H.tril(-1).T


def inverse_factor(H: Tensor, damp: float) -> Tensor:
    """Returns the upper triangular U with U^T U = (H + damp * mean(diag H) * identity)^-1, the paper's Cholesky factor
    of the inverse.

    J reverses the order of rows, and is its own inverse. From J H J = L L^T follows H = R R^T with R = J L J, which is
    upper triangular, so U = R^-1. That is one inversion less than inverting H and factoring the inverse, and so half
    the rounding. Where the factor does not exist, 10 and 100 times the damping are tried. Raises ValueError where that
    does not help, or damp is 0."""
    eye = torch.eye(len(H), device=H.device)
    for factor in (1, 10, 100):
        damped = H + factor * damp * H.diagonal().mean() * eye
        L, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        # L_jj^2 / H_jj is the share of an input that the others do not explain. In fp32, 5e-6 may be rounding.
        if not failed and (damp or (L.diagonal().square() > 1e-5 * damped.diagonal().flip(0)).all()):
            return torch.linalg.solve_triangular(L.flip(0, 1), eye, upper=True)
        if damp == 0:
            raise ValueError(f"the inputs of this layer span fewer than its {len(H)} dimensions, so its Hessian has no "
                             "inverse: calibrate on more text, or with --damp 0.01")
    raise ValueError("the Hessian has no inverse even with 100 times the damping: look at the calibration text")


def gptq(w: Tensor, hessian: Tensor, bits: int, group_size: int, sym: bool, act_order: bool = False, clip: bool = False,
         damp: float = 0.01, block: int = 128) -> Quantized:
    """Quantizes W (O, I) so that |W X - Q X|^2 is small, hessian = X X^T (I, I). With the identity it is `rtn` to the
    bit, where clip is off.

    block: columns after which all columns to the right are updated (any number gives the same result but for rounding).
    Raises ValueError as rtn does, and with damp 0 where H is singular."""
    check_grid(bits, group_size)
    I = w.shape[1]
    H = hessian.float().clone()
    # 1. A dead input is always 0, and so are its row and column of H. With H_jj = 1 it is tied to no other column.
    dead = H.diagonal() == 0                                                           # (I,)
    H.diagonal()[dead] = 1
    # 2. The order of the columns. A stable sort: where all H_jj are equal it is the file's order.
    order = torch.arange(I, device=w.device)
    if act_order:
        order = torch.argsort(H.diagonal(), descending=True, stable=True)              # (I,)
    # 3. U, upper triangular, with U^T U = (H + damping)^-1. U_jj^2 is the paper's [H_F^-1]_jj, F the columns from j on.
    U = inverse_factor(H[order][:, order], damp)                                       # (I, I)
    diagonal = U.diagonal()                                                            # (I,)
    # 4. The grid of every group. An error of one in column j will cost 1 / U_jj^2, by the paper's equation (2). Only
    #    ratios of the costs matter: with the identity all are exactly 1.
    importance = torch.empty_like(diagonal)                                            # (I,), in the file's order
    importance[order] = (diagonal.min() / diagonal).square()
    importance[dead] = 0
    scale, zero = grids(w.float(), bits, group_size, sym, clip, importance)            # (O, G) each
    group = groups_of(I, group_size, w.device)
    # 5. Column after column; W is held transposed, so that a column of the paper is a row in memory.
    W = w.float().T[order].contiguous()                                                # (I, O)
    codes = torch.empty(W.shape, dtype=torch.uint8, device=w.device)                   # (I, O), in the file's order
    scale_t, zero_t = scale.T.contiguous(), zero.T.contiguous()                        # (G, O) each
    column, g, d = order.tolist(), group[order].tolist(), diagonal.tolist()            # of every step
    E = torch.empty(block, W.shape[1], device=w.device)                                # (block, O)
    for first in range(0, I, block):
        last = min(first + block, I)
        for j in range(first, last):
            s, z = scale_t[g[j]], zero_t[g[j]]                                         # (O,) each
            q = nearest_code(W[j], s, z, bits)
            codes[column[j]] = q
            e = torch.div(W[j] - q.sub_(z).mul_(s), d[j], out=E[j - first])            # E_j = (W_j - Q_j) / U_jj
            W[j + 1:last].addr_(U[j, j + 1:last], e, alpha=-1)                         # W_k -= E_j U_jk in the block
        W[last:].addmm_(U[first:last, last:].T, E[:last - first], alpha=-1)            # and then in all columns after
    return Quantized(codes.T.contiguous(), scale, zero.to(torch.uint8), group)


# ---- packing --------------------------------------------------------------------------------------------------------

def shifts(device) -> Tensor:
    """By how many bits each of the eight codes is shifted in its word."""
    return torch.arange(0, 32, 4, dtype=torch.int32, device=device)[:, None]           # (8, 1)


def pack_int4(q: Tensor) -> Tensor:
    """Packs codes q (O, I), whole numbers 0 .. 15, into words (ceil(I / 8), O) int32. Input 8r is in the lowest four
    bits of word r. Where 8 does not divide I, the last word is filled with 0."""
    if q.numel() and (q.min() < 0 or q.max() > 15):
        raise ValueError(f"codes reach from {q.min()} to {q.max()}, four bits hold 0 to 15")
    q = F.pad(q.to(torch.int32), (0, -q.shape[1] % 8))                                 # (O, I)
    q = q.T.unflatten(0, (-1, 8))                                                      # (I/8, 8, O)
    return (q << shifts(q.device)).sum(1, dtype=torch.int32)                           # (I/8, O): disjoint bits, + is |


def unpack_int4(words: Tensor, width: int | None = None) -> Tensor:
    """The inverse of pack_int4: unpacks words (R, O) int32 to codes (O, 8R) uint8, or the first `width` columns."""
    q = (words[:, None] >> shifts(words.device)) & 15                                  # (R, 8, O)
    return q.flatten(0, 1)[:width].T.to(torch.uint8)                                   # (O, 8R)


# ---- layers ---------------------------------------------------------------------------------------------------------

class QuantizedLinear(nn.Module):
    """A frozen linear layer x (..., I) -> y (..., O). It has no parameters, its codes are buffers."""

    def __init__(self, in_features: int, out_features: int, **buffers: Tensor):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)

    def forward(self, x: Tensor) -> Tensor:
        return QuantizedProduct.apply(x, self)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return self.quantized().dequantize().to(dtype)                                 # (O, I)

    def plain(self, dtype: torch.dtype) -> nn.Linear:
        """Returns a plain linear layer of the dequantized weights: adapters can be merged into it."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.dequantize(dtype).contiguous())
        return linear

    def _apply(self, fn, recurse: bool = True):
        """model.to(device) moves the buffers, model.to(dtype) leaves them: scales in bf16 would be other scales."""
        for name, buffer in self._buffers.items():
            self._buffers[name] = buffer.to(fn(buffer).device)
        return self


class Linear4(QuantizedLinear):
    """Four bits in AutoGPTQ's tensors, zeros as in gptq_v2. Where 8 does not divide O or I, last words are not full."""

    @classmethod
    def of(cls, m: Quantized) -> "Linear4":
        O, I = m.q.shape
        qweight = pack_int4(m.q)                                                       # (I/8, O)
        qzeros = pack_int4(m.zero.T).T.contiguous()                                    # (G, O) -> (O/8, G) -> (G, O/8)
        scales = m.scale.T.contiguous().half()                                         # (G, O)
        return cls(I, O, qweight=qweight, qzeros=qzeros, scales=scales, g_idx=m.group.clone())

    def quantized(self) -> Quantized:
        q = unpack_int4(self.qweight, self.in_features)                                # (I/8, O) -> (O, I)
        zero = unpack_int4(self.qzeros.T, self.out_features)                           # (O/8, G) -> (G, O)
        return Quantized(q, self.scales.float().T, zero.T, self.g_idx)


class Linear8(QuantizedLinear):
    """Eight bits, one scale a row: `weight` (O, I) int8, `scale` (O,) float32."""

    @classmethod
    def of(cls, m: Quantized) -> "Linear8":
        O, I = m.q.shape
        weight = (m.q.short() - m.zero).to(torch.int8)                                 # (O, I)
        return cls(I, O, weight=weight, scale=m.scale[:, 0].contiguous())

    def quantized(self) -> Quantized:
        q, scale = (self.weight.short() + 128).to(torch.uint8), self.scale[:, None]    # (O, I), (O, 1)
        group = groups_of(self.in_features, -1, q.device)                              # (I,)
        return Quantized(q, scale, torch.full_like(scale, 128, dtype=torch.uint8), group)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return (self.weight * self.scale[:, None]).to(dtype)                           # (O, I)


class QuantizedProduct(torch.autograd.Function):
    """y = x W^T of a frozen quantized layer, through which adapters train (QLoRA, Dettmers et al. 2023).

    Autograd keeps no W between forward and backward. Backward dequantizes it again."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dequantize(x.dtype))

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        return dy @ ctx.layer.dequantize(dy.dtype), None                               # (..., O) @ (O, I)


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


# ---- a whole model, block by block ----------------------------------------------------------------------------------

TOKENS = 4096  # of a batch that passes through a block, about
# Each half of a block: its norm, the linears that read the normalized x, and the linear that reads their outputs.
HALVES = {
    "attention": ("attention_norm", ("wq", "wk", "wv"), "wo"),
    "feed_forward": ("ffn_norm", ("w1", "w3"), "w2"),
}
Row = tuple[list[int], list[bool]]  # a text: its ids, and which of them count as predicted


class Scheme(NamedTuple):
    """How a model is quantized."""
    method: str = "gptq"
    bits: int = 4
    group_size: int = 128    # columns; -1 is the whole row
    sym: bool = False
    act_order: bool = True
    clip: bool = True        # by GPTQ alone
    damp: float = 0.01       # of the mean of H's diagonal: the paper's
    head: bool = False       # the output head too

    def __str__(self) -> str:
        groups = f", groups of {self.group_size}" if self.group_size != -1 else ""
        return f"{self.bits} bits{groups}" + (", symmetric" if self.sym else "")

    def settings(self) -> dict:
        """Returns the quantization_config of config.json, by which other programs read the tensors."""
        settings = {"bits": self.bits, "group_size": self.group_size, "sym": self.sym, "lm_head": self.head,
                    "octet_method": self.method}
        if self.bits == 8:
            return settings | {"quant_method": "octet"}
        if self.damp:  # gptqmodel refuses a 0
            settings["damp_percent"] = self.damp
        return settings | {
            "quant_method": "gptq", "checkpoint_format": "gptq" if self.sym else "gptq_v2",
            "desc_act": self.act_order, "static_groups": True, "true_sequential": True, "pack_dtype": "int32"}


@dataclass
class Batch:
    """Rows on their way through the blocks. They are padded on the right, where no real token looks."""
    x: Tensor         # (B, T, C) the residual stream
    where: Where      # positions and angles, the same for every row
    mask: Tensor      # (B, T) True where a token is real
    tokens: Tensor    # (B, T)
    target: Tensor    # (B, T) True where a token counts as predicted


def embed(model: Llama, rows: list[Row], device) -> list[Batch]:
    """Returns batches of about TOKENS tokens, before the first block."""
    step = max(1, TOKENS // max((len(ids) for ids, _ in rows), default=1))
    batches = []
    for start in range(0, len(rows), step):
        tokens, mask, target = (t.to(model.device) for t in text.collate(rows[start:start + step]))
        x = model.tok_embeddings(tokens)                                               # (B, T, C)
        where = model.locate(tokens[:1])
        where = where._replace(cos=where.cos.to(device), sin=where.sin.to(device))
        batches.append(Batch(x.to(device), where, mask.to(device), tokens, target))
    return batches


def blocks_on(model: Llama, device) -> Iterator[Block]:
    """Yields the blocks in order, each on the device while it is in use: the whole model may be larger than a GPU."""
    home = model.device
    for block in model.layers:
        yield block.to(device)
        block.to(home)


@torch.no_grad()
def quantize_model(model: Llama, scheme: Scheme, rows: list[Row] = (), device="cpu",
                   progress: Callable[[int, list[dict]], None] = lambda i, report: None) -> list[dict]:
    """Puts quantized layers in the place of a model's linears; the model is changed. GPTQ calibrates every block on the
    outputs of the quantized blocks before it, for `rows`.

    progress(i, report) is called after block i. Returns a report: each layer's name and relative errors."""
    for name, p in model.named_parameters():
        if not p.isfinite().all():
            raise ValueError(f"{name} is not finite: the model is broken, nothing was written")
    if scheme.method == "gptq" and not rows:
        raise ValueError("gptq needs texts to calibrate on: give rows, or use rtn")
    batches = embed(model, rows, device) if scheme.method == "gptq" else []
    errors = []
    for i, block in enumerate(blocks_on(model, device)):
        report = []
        for half in HALVES:
            report += quantize_half(block, half, f"layers.{i}.{half}", scheme, batches)
        errors += report
        progress(i, report)
    if scheme.head:
        inputs = (model.norm(batch.x[batch.mask].to(model.device)) for batch in batches)
        errors += quantize_linears(model, ("output",), "model", scheme, hessian(inputs))
    model.quantized = scheme.settings()
    return errors


def quantize_half(block: Block, half: str, prefix: str, scheme: Scheme, batches: list[Batch]) -> list[dict]:
    """Quantizes the attention or the feed-forward of a block, and takes the batches through it. Returns the report."""
    norm_name, first, last = HALVES[half]
    norm, module = getattr(block, norm_name), getattr(block, half)
    # 1. wq, wk and wv, or w1 and w3, read the normalized x.
    H = hessian(norm(b.x)[b.mask] for b in batches)
    report = quantize_linears(module, first, prefix, scheme, H)
    # 2. The inputs of wo, or w2, come from the linears that step 1 has quantized. With Identity in the place of wo, or
    #    w2, the half returns exactly these inputs.
    linear = getattr(module, last)
    setattr(module, last, nn.Identity())
    ys = []                                                                            # (B, T, I) each
    for b in batches:
        ys.append(module(norm(b.x), b.where) if half == "attention" else module(norm(b.x)))
    setattr(module, last, linear)
    H = hessian(y[b.mask] for y, b in zip(ys, batches))
    report += quantize_linears(module, (last,), prefix, scheme, H)
    # 3. The half adds its output to the residual stream.
    for y, b in zip(ys, batches):
        b.x = b.x + getattr(module, last)(y)                                           # (B, T, C)
    return report


def quantize_linears(parent: nn.Module, names: tuple[str, ...], prefix: str, scheme: Scheme,
                     H: Tensor | None) -> list[dict]:
    """Quantizes linears of parent with the same inputs, as one matrix: by GPTQ with the H of these inputs, by RTN
    without.

    Returns of each its name and, with H, its error by RTN on unshrunk grids and by GPTQ."""
    if H is not None and not H.isfinite().all():
        raise ValueError(f"the inputs of {prefix}.{names[0]} are not finite: they overflow, try --dtype fp32 or bf16; "
                         "nothing was written")
    linears = [getattr(parent, name) for name in names]
    outputs = [linear.out_features for linear in linears]
    W = torch.cat([linear.weight for linear in linears]).float()                       # (O, I), of all together
    grid = {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.sym}
    if H is None:
        m = rtn(W, **grid)
    else:
        m = gptq(W, H, **grid, act_order=scheme.act_order, clip=scheme.clip, damp=scheme.damp)
    report = []
    parts = (t.split(outputs) for t in (W, m.q, m.scale, m.zero))                      # (O of one linear, ...) each
    for name, w, q, scale, zero in zip(names, *parts):
        part = Quantized(q, scale, zero, m.group)
        setattr(parent, name, Linear8.of(part) if scheme.bits == 8 else Linear4.of(part))
        errors = {}
        if H is not None:
            rounded = rtn(w, **grid)
            errors = {"rtn": layer_error(w, rounded.dequantize(), H), "gptq": layer_error(w, part.dequantize(), H)}
        report.append({"layer": f"{prefix}.{name}"} | errors)
    return report


def layer_error(W: Tensor, Q: Tensor, H: Tensor) -> float:
    """Returns |W X - Q X|^2 / |W X|^2 of an approximation Q (O, I), by way of H = X X^T."""
    square = lambda D: ((D @ H) * D).sum()  # |D X|^2 = trace(D H D^T)
    return (square(W - Q) / square(W).clamp(min=1e-30)).item()


@torch.no_grad()
def round_model(model: Llama, quant: str, device="cpu") -> None:
    """Quantizes a model by RTN to be used at once: "8bit", or "4bit" in groups of 32. An untied head gets 8 bits."""
    by_rows = Scheme("rtn", 8, -1, sym=True)
    quantize_model(model, by_rows if quant == "8bit" else Scheme("rtn", 4, 32), device=device)
    if model.output is not None and not model.config.tie_embeddings:
        quantize_linears(model, ("output",), "model", by_rows, None)
        model.quantized["lm_head"] = True


# ---- perplexity -----------------------------------------------------------------------------------------------------

def windows(ids: list[int], length: int, bos: int | None, most: int | None = None) -> list[Row]:
    """Cuts a text into rows of `length` ids: BOS and the next length - 1, or the next `length` where there is no BOS.
    The last partial one is dropped. All ids but a row's first count as predicted."""
    front = [] if bos is None else [bos]
    step = length - len(front)
    starts = range(0, len(ids) - step + 1, step)[:most]
    return [(front + ids[i:i + step], [False] + [True] * (length - 1)) for i in starts]


def head_nll(head: nn.Module, h: Tensor, answer: Tensor) -> Tensor:
    """Returns the sum of -log p of the next ids, answer (N,), after hidden states h (N, C). Logits of 512 rows exist at
    a time."""
    total = torch.zeros((), device=h.device)
    for rows, right in zip(h.split(512), answer.split(512)):
        total = total + F.cross_entropy(head(rows).float(), right, reduction="sum")    # logits (512, V)
    return total


@torch.no_grad()
def perplexity(model: Llama, rows: list[Row], device="cpu") -> float:
    """Returns exp of the mean -log p over all target ids of all rows."""
    batches = embed(model, rows, device)
    for block in blocks_on(model, device):
        for b in batches:
            b.x = block(b.x, b.where)
    nll, n = 0.0, 0
    for b in batches:
        target = b.target[:, 1:]                                                       # (B, T - 1)
        x = b.x.to(model.device)[:, :-1]                                               # (B, T - 1, C)
        h = model.norm(x[target])                                                      # (N, C)
        nll += head_nll(model.output, h, b.tokens[:, 1:][target]).item()
        n += len(h)
    if not math.isfinite(nll):
        raise ValueError("the model's probabilities are not finite: its weights or its dtype are broken "
                         "(try --dtype fp32)")
    return math.exp(min(nll / n, 700.0))                                               # exp(710) overflows


# ---- opening any directory ------------------------------------------------------------------------------------------

def open_model(directory: str | Path, dtype: torch.dtype | None = None, device="cpu", head: bool = True,
               quant: str | None = None, adapter: str = "auto", base: Path | None = None) -> Llama:
    """Opens a directory of any kind: plain, quantized, or a LoRA adapter of either.

    dtype: of activations and plain weights; None is the file's.
    head: False gives a trunk, of a reward model too.
    quant: "8bit" or "4bit" rounds a plain model by RTN, and must agree with a quantized one.
    adapter: "merge" it into its base, "keep" it beside the base, "auto" merges into a plain base and keeps beside a
        quantized or rounded one. A quantized base becomes a full-precision model by merging.
    base: the adapter's base, where that is not the one that it names.
    The layers of a quantized model dequantize at every call, as training needs it; generate inside `packed`."""
    if quant not in (None, "8bit", "4bit") or adapter not in ("merge", "keep", "auto"):
        raise ValueError(f"quant is {quant!r} and adapter is {adapter!r}: they can be 8bit, 4bit or None, and merge, "
                         "keep or auto")
    path = Path(directory)
    adapted = weights.is_adapter(path)
    home = (base or lora.base_path(path)) if adapted else path
    scheme = read_scheme(home)
    if scheme and quant and int(quant[0]) != scheme["bits"]:
        raise ValueError(f"{home} is quantized to {scheme['bits']} bits, {quant} was asked for: leave the flag out, "
                         "or quantize the original again")
    if head and adapted and lora.read_adapter_config(path).get("task_type") == "SEQ_CLS":
        raise ValueError(f"{path} is a reward model, it has no words: open it with "
                         "RewardModel.from_pretrained of rm.py")
    install_layers = functools.partial(install, scheme=scheme, directory=home, device=device) if scheme else None
    model = Llama.read(home, dtype, "cpu" if quant else device, head, install_layers)
    merge = adapter == "merge" or (adapter == "auto" and not scheme and not quant)
    if adapted and merge:
        lora.load_adapter(model, path)
        lora.fold(model)
    if quant and not model.quantized:
        round_model(model, quant, device)
        if quant == "4bit":
            print("note: 4 bits by RTN at load; GPTQ loses less: "
                  f"python quantize.py {path} --calibration FILE --save_path OUT", flush=True)
    if adapted and not merge:
        lora.load_adapter(model, path)
    return model.to(device)


def install(model: Llama, tensors: dict[str, weights.Stored], scheme: dict, directory: Path, device) -> None:
    """Puts the quantized layers of a directory, for which `read_scheme` returned `scheme`, into a model without
    weights, and takes their tensors out of the dictionary."""
    for name, linear in lora.linears(model).items():
        layer = read_layer(linear, name, tensors, scheme, directory)
        if layer is not None:
            lora.replace(model, name, layer.to(device))
    if not quantized_layers(model):
        raise ValueError(f"{directory} says that it is quantized, but no layer is: copy it again, or remove the "
                         "quantization_config or quantize_config.json of another model")
    if model.output is None:
        for name in [name for name in tensors if name.startswith("output.")]:
            del tensors[name]
    model.quantized = scheme


# ---- files ----------------------------------------------------------------------------------------------------------

ONES = 0x11111111                          # "gptq" files store a word of eight zeros minus this: 1 from each zero
SIZES = (16, 32, 64, 128, 256, 512, 1024)  # group sizes that other programs read, beside whole rows


def save(model: Llama, directory: str | Path) -> None:
    """Writes a quantized model: 4 bits as AutoGPTQ has it, 8 bits in our two tensors a layer; the scheme is put into
    config.json."""
    settings = model.quantized
    if not settings:
        raise ValueError("the model is not quantized: write it with save_pretrained")
    layers = quantized_layers(model)
    if settings["bits"] == 4 and any(isinstance(layer, Linear8) for layer in layers.values()):
        raise ValueError("this model was rounded at load, with a head in 8 bits, for which 4-bit files have no place: "
                         "use quantize_model, or quantize.py")
    exact = {f"{name}.{leaf}": buffer for name, layer in layers.items() for leaf, buffer in layer.named_buffers()}
    more = {"quantization_config": settings}
    if settings["bits"] == 8:
        more["model_type"] = weights.FOREIGN
    else:
        say_limits(settings, layers.values())
        if settings["checkpoint_format"] == "gptq":  # a zero of 0 borrows from its neighbour, as in gptqmodel
            exact |= {name: buffer - ONES for name, buffer in exact.items() if name.endswith("qzeros")}
    tensors = dict(model.named_parameters()) | exact  # a tied head appears once, as the embedding
    weights.write_model(directory, vars(model.config), tensors, more=more, exact=exact)


def say_limits(settings: dict, layers: Collection[QuantizedLinear]) -> None:
    """Prints what other programs cannot read of a 4-bit model, as seen with gptqmodel 7.6 and transformers 5.24."""
    odd = [layer for layer in layers if layer.out_features % 8 or layer.in_features % 8]
    size = settings["group_size"]
    limits = []
    if odd:
        limits.append(f"of {len(layers)} matrices, {len(odd)} have a side that 8 does not divide: gptqmodel reads "
                      "them, llama.cpp does not")
    if size not in (-1, *SIZES):
        limits.append(f"gptqmodel and transformers have no groups of {size}, but of {SIZES} and whole rows")
    if settings["lm_head"]:
        limits.append("transformers leaves out a quantized head and makes up another, gptqmodel and llama.cpp read it")
    if limits:
        print("note: " + "; ".join(limits), flush=True)


# What a quantization_config may hold, and the meaning of a key that it leaves out.
SETTINGS = {
    "quant_method": weights.among("gptq", "octet"),
    "bits": weights.among(4, 8),
    "group_size": ("a whole number of columns above 0, or -1 for whole rows",
                   lambda size: type(size) is int and (size > 0 or size == -1)),
    "checkpoint_format": weights.among("gptq", "gptq_v2"),
}
DEFAULTS = {"quant_method": None, "bits": None, "group_size": -1, "desc_act": False, "lm_head": False}


def check_grid(bits: int, group_size: int) -> None:
    """Raises ValueError for bits or a group size that no grid has."""
    weights.check({"bits": bits, "group_size": group_size}, SETTINGS, "the grid")


def read_scheme(directory: str | Path) -> dict | None:
    """Returns the quantization_config of a directory, checked, with all keys that are read here; None where there is
    none."""
    settings = weights.quantization(directory)
    if settings is None:
        return None
    settings = settings if isinstance(settings, dict) else {"quant_method": settings}
    settings = DEFAULTS | {"checkpoint_format": settings.get("format", "gptq")} | settings
    bits = {"bits": weights.among(8 if settings["quant_method"] == "octet" else 4)}
    weights.check(settings, SETTINGS | bits, f"{directory}/config.json", " to be read here")
    older = Path(directory) / "quantize_config.json"
    others = weights.read_json(older) if older.exists() else {}
    if any(settings[key] != others.get(key, settings[key]) for key in ("bits", "group_size", "desc_act")):
        weights.note(f"{older} differs from the quantization_config in config.json, which is the one that is used")
    return settings


def read_layer(linear: nn.Linear, name: str, tensors: dict[str, weights.Stored], scheme: dict,
               directory: Path) -> QuantizedLinear | None:
    """Returns the quantized layer for the place of `linear`, and takes its tensors out of the dictionary. None where
    the file holds a plain weight."""
    I, O, S = linear.in_features, linear.out_features, scheme["group_size"]
    G = 1 if S == -1 else -(-I // S)
    shown = weights.hf_name(name)
    words = lambda n: -(-n // 8)  # that hold n codes
    kind, shapes = Linear8, {"scale": (O,), "weight": (O, I)}
    if scheme["bits"] == 4:
        kind, shapes = Linear4, {"qweight": (words(I), O), "qzeros": (G, words(O)), "scales": (G, O), "g_idx": (I,)}
    if f"{name}.{next(iter(shapes))}" not in tensors:  # the first leaf is one that a plain layer lacks
        return None
    if "g_idx" in shapes and not scheme["desc_act"]:  # some writers leave out a g_idx of i // S
        by_place = weights.Stored((I,), torch.int32, lambda: groups_of(I, S))
        tensors.setdefault(f"{name}.g_idx", by_place)
    buffers = {}
    for leaf, shape in shapes.items():
        stored, floats = tensors.pop(f"{name}.{leaf}", None), leaf.startswith("scale")
        if stored is None or stored.shape != shape or stored.dtype.is_floating_point != floats:
            found = "missing" if stored is None else f"{stored.shape} {stored.dtype}"
            kind_of_numbers = "floats" if floats else "whole numbers"
            raise ValueError(f"{directory}: {shown}.{leaf} is {found}, by the config it should be {shape} "
                             f"{kind_of_numbers}: the file is of another layout or was cut, copy it again")
        buffers[leaf] = stored.read()
    if kind is Linear4:
        g = buffers["g_idx"] = buffers["g_idx"].to(torch.int32)
        if g.min() < 0 or g.max() >= G:
            raise ValueError(f"{directory}: {shown}.g_idx reaches from {g.min()} to {g.max()}, there are {G} groups "
                             "from 0 on: copy the file again")
        if scheme["checkpoint_format"] == "gptq":  # added to whole words, so that what a zero of 0 borrowed comes back
            buffers["qzeros"] = buffers["qzeros"] + ONES
    bias = tensors.pop(f"{name}.bias", None)       # AutoGPTQ writes one of zeros
    if bias is not None and bias.read().any():
        raise ValueError(f"{directory}: {shown} has a bias, a LLaMA has none")
    return kind(I, O, **buffers)


# ---- fast kernels: nothing above needs them -------------------------------------------------------------------------

Product = Callable[[Tensor], Tensor]  # x (..., I) -> y (..., O)
SAME_INPUT = {"wk": "wq", "wv": "wq", "w3": "w1"}


@contextmanager
def packed(model: nn.Module, keep: bool = True) -> Iterator[None]:
    """Inside this context every linear of the model runs on the fastest kernel that works here. On leaving, all is as
    before.

    Inside, the weights are held twice. A layer whose input needs a gradient runs as outside. keep=False frees each
    weight that is packed, for a server that needs the memory: the model is of no use afterwards."""
    changed = []
    try:
        for layers in by_input(model):
            product = fast_product(joined(layers))
            for layer, part in zip(layers, shared(product, layers) if product else ()):
                layer.forward = functools.partial(fast_forward, layer, part)
                changed.append(layer)
                if not keep:
                    for tensors in (layer._parameters, layer._buffers):
                        tensors.update(dict.fromkeys(tensors))  # None in the place of each
        yield
    finally:
        for layer in changed:
            del layer.forward


def fast_forward(layer: nn.Module, product: Product, x: Tensor) -> Tensor:
    needs_gradient = torch.is_grad_enabled() and x.requires_grad
    return type(layer).forward(layer, x) if needs_gradient else product(x)


def by_input(model: nn.Module) -> Iterable[list[nn.Module]]:
    """Returns the linears of a model that are not packed yet, in lists of those that can be one product: quantized ones
    that read the same input, in the same order. For one row a call of a kernel costs as much as the arithmetic in it.
    """
    lists = {}
    for name, layer in model.named_modules():
        kind = type(layer)
        if kind not in (nn.Linear, Linear4, Linear8) or "forward" in vars(layer):
            continue
        parent, _, leaf = name.removesuffix(".base").rpartition(".")                   # base: of an adapter
        first = leaf if kind is nn.Linear else SAME_INPUT.get(leaf, leaf)
        groups = layer.g_idx.tolist() if kind is Linear4 else []
        lists.setdefault((parent, first, kind, *groups), []).append(layer)
    return lists.values()


def joined(layers: list[QuantizedLinear]) -> QuantizedLinear:
    """Returns one layer with the outputs of all."""
    if len(layers) == 1:
        return layers[0]
    q, scale, zero, groups = zip(*(layer.quantized() for layer in layers))             # (O of one layer, ...) each
    return type(layers[0]).of(Quantized(torch.cat(q), torch.cat(scale), torch.cat(zero), groups[0]))


def shared(product: Product, layers: list[nn.Module]) -> list[Product]:
    """Cuts the product of joined layers into one for each. The first that is called with an input computes all outputs,
    and each takes its own once: an adapter adds to it in place."""
    if len(layers) == 1:
        return [product]
    sizes = [layer.out_features for layer in layers]
    read, outputs = None, {}  # the last input, and what was not taken yet of its outputs

    def part(layer: nn.Module, x: Tensor) -> Tensor:
        nonlocal read
        if layer not in outputs or read is not x:
            outputs.update(zip(layers, torch.split_with_sizes_copy(product(x), sizes, -1)))  # (..., O of one layer)
            read = x
        y = outputs.pop(layer)
        if not outputs:
            read = None  # the input of a long text is large
        return y
    return [functools.partial(part, layer) for layer in layers]


def onednn_product(layer: nn.Linear) -> Product:
    """oneDNN's kernel for few rows. The plain weight is copied into the layout that it reads fastest."""
    weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), 16)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def int4_product(layer: Linear4) -> Product | None:
    """PyTorch's int4 kernel (tinygemm): bf16 times (q - 8) * scale + offset, with offset = (8 - zero) * scale, in bf16.

    It reads G' runs of 32 to 256 columns that share a grid, so columns are brought in the order of their groups. None
    where groups are no such runs. I and O below are padded to whole blocks of the kernel."""
    m, cuda = layer.quantized(), layer.qweight.is_cuda
    O, I = m.q.shape
    order = torch.argsort(m.group, stable=True)
    columns, rows = (0, -I % (128 if cuda else 32)), (0, -O % (8 if cuda else 64))     # padding of I and of O
    group = F.pad(m.group[order], columns, value=len(layer.scales) - 1)                # (I,)
    runs = (size for size in (256, 128, 64, 32) if torch.equal(group[::size].repeat_interleave(size), group))
    size = next(runs, None)
    if size is None:
        return None
    g = group[::size].long()                                                           # (G',)
    scale, zero = (F.pad(t.float()[:, g].T, rows) for t in (m.scale, m.zero))          # (G', O) each
    grid = torch.stack((scale, (8 - zero) * scale), dim=-1).bfloat16()                 # (G', O, 2)
    codes = F.pad(m.q[:, order], columns + rows)                                       # (O, I)
    if cuda:
        multiply = torch.ops.aten._weight_int4pack_mm
        weight = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)  # two to a byte
    else:
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int().contiguous(), 1)

    in_order, padded = torch.equal(order, order.sort().values), len(group) > I

    def product(x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)                                                        # (N, I)
        if not in_order:
            rows = rows[:, order]
        if padded:
            rows = F.pad(rows, columns)
        y = multiply(rows.bfloat16().contiguous(), weight, size, grid)[:, :O]          # (N, O)
        return y.to(x.dtype).view(*x.shape[:-1], O)                                    # (..., O)
    return product


def int8_product(layer: Linear8) -> Product:
    """int8 times int8: every row of x is rounded to int8 by its own largest entry, products are summed in int32, both
    scales are multiplied in afterwards. oneDNN's kernel takes x as unsigned bytes only, so 128 stands for 0."""
    weight = torch.ops.onednn.qlinear_prepack(layer.weight, None)
    scale, half = layer.scale / 127, torch.tensor(128.5)
    zero = torch.zeros(layer.out_features, dtype=torch.int64)
    multiply = torch.ops.onednn.qlinear_pointwise

    def product(x: Tensor) -> Tensor:
        wide = x.float()
        largest = wide.abs().amax(-1, keepdim=True).clamp_(min=1e-30)                  # (..., 1)
        q = torch.addcdiv(half, wide, largest, value=127).to(torch.uint8)              # + 0.5 and cut off is rounding
        y = multiply(q, 1.0, 128, weight, scale, zero, None, 1.0, 0, torch.float32, "none", [], "")
        return y.mul_(largest).to(x.dtype)                                             # (..., O)
    return product


def int8_weight_product(layer: Linear8) -> Product | None:
    """bf16 times int8, for a CPU without VNNI. The kernel would round our scales to bf16, so it gets ones. None where
    16 does not divide the inputs: it reads past the end of such rows."""
    if layer.in_features % 16:
        return None
    weight, scale = layer.weight, layer.scale
    ones = torch.ones(layer.out_features, dtype=torch.bfloat16)

    def product(x: Tensor) -> Tensor:
        y = torch._weight_int8pack_mm(x.flatten(0, -2).bfloat16(), weight, ones)       # (N, O)
        return (y.float() * scale).to(x.dtype).unflatten(0, x.shape[:-1])              # (..., O)
    return product


def int8_cuda_product(layer: Linear8) -> Product:
    """int8_product on CUDA. Its kernel takes more than 16 rows, and sides that 8 divides."""
    O, I = layer.weight.shape
    weight = F.pad(layer.weight, (0, -I % 8, 0, -O % 8)).T                             # (I, O)
    scale = layer.scale

    def product(x: Tensor) -> Tensor:
        rows = x.flatten(0, -2).float()                                                # (N, I)
        unit = rows.abs().amax(-1, keepdim=True).clamp_(min=1e-30) / 127               # (N, 1)
        q = (rows / unit).round().to(torch.int8)
        q = F.pad(q, (0, -I % 8, 0, max(0, 17 - len(q))))
        y = torch._int_mm(q, weight)[:len(rows), :O]                                   # (N, O) int32
        return (y * unit * scale).to(x.dtype).unflatten(0, x.shape[:-1])               # (..., O)
    return product


KERNELS = {
    ("cpu", nn.Linear): (onednn_product,),
    ("cpu", Linear4): (int4_product,),
    ("cpu", Linear8): (int8_product, int8_weight_product),
    ("cuda", Linear4): (int4_product,),
    ("cuda", Linear8): (int8_cuda_product,),
}
WORTH = 2**20  # bytes of a plain weight: below, a call costs more than the layout saves


def fast_product(layer: nn.Module) -> Product | None:
    """Returns a function that computes the layer's output faster; None where no kernel for it works on this machine."""
    weight = next(iter(layer.state_dict().values()))
    device = weight.device.type
    if weight.is_floating_point() and weight.nbytes < WORTH:
        return None
    for kernel in KERNELS.get((device, type(layer)), ()):
        if kernel_works(kernel, type(layer), weight.dtype, device):
            return kernel(layer)
    return None


@functools.cache
@torch.no_grad()
def kernel_works(kernel: Callable, kind: type, dtype: torch.dtype, device: str) -> bool:
    """Whether a kernel gives the output of the layer, for 5 rows and for 1. Each kernel is tried once.

    They are internal functions of PyTorch, and their layouts have changed between versions. Some are missing, some
    refuse (oneDNN packs bf16 with AVX512 only), and without VNNI oneDNN's sums of int8 products overflow where inputs
    and weights are all large, as x[0] and W[0] are here."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(64, 256, generator=generator)                                      # (O, I)
    x = torch.randn(5, 256, generator=generator)                                       # (N, I)
    W[0], x[0] = 1, 1
    if kind is Linear4:
        layer = Linear4.of(rtn(W, 4, 64, False))
    elif kind is Linear8:
        layer = Linear8.of(rtn(W, 8, -1, True))
    else:
        layer, x = nn.Linear(256, 64, bias=False, dtype=dtype), x.to(dtype)
        layer.weight.copy_(W)
    layer, x = layer.to(device), x.to(device)
    try:
        product = kernel(layer)
        for rows in (x, x[4:]):
            right = layer(rows)                                                        # (N, O)
            error = (product(rows) - right).abs().amax(1)                              # (N,)
            if not (error < 0.05 * right.abs().amax(1)).all():
                return False
    except (RuntimeError, AttributeError, TypeError):
        return False
    return True


# ---- texts and the table --------------------------------------------------------------------------------------------

@dataclass
class Source:
    """What is known of a directory before its weights are read."""
    path: Path
    base: Path                  # of an adapter; else the same
    home: Path                  # where tokenizer and template lie
    config: LlamaConfig
    tokenizer: text.Tokenizer
    asked: str | None           # --template
    is_demo: bool               # a model of the demo world
    is_chain: bool              # no directory was named: the step of the demo that follows ppo.py

    @functools.cached_property
    def template(self) -> str:
        """The template's name. A directory whose Jinja text is unknown is refused here, where records are read."""
        return text.choose_template(self.home, self.asked, "alpaca", print)


def open_source(path: Path | None, template: str | None = None) -> Source:
    is_chain = path is None
    path = run.finished(Path("out/ppo"), "ppo", "--pretrain") if is_chain else path
    base, home = lora.base_path(path), lora.home(path)
    config = LlamaConfig(**weights.read_config(base))
    tokenizer = text.Tokenizer(home)
    text.check_tokenizer(tokenizer, config.vocab_size)
    return Source(path, base, home, config, tokenizer, template, demo.is_demo(home), is_chain)


def encode_rows(examples: list[dict], source: Source, length: int) -> list[Row]:
    template = text.TEMPLATES[source.template]
    encode = functools.partial(text.encode_example, tokenizer=source.tokenizer, template=template, max_len=length)
    return text.encode_all(examples, encode, "examples", say=print)


def read_rows(path: Path, source: Source, length: int, most: int | None, skip_bad: bool) -> tuple[list[Row], str]:
    """Reads texts to calibrate on or to measure with. Returns them, and in words how they were cut. Records (.json,
    .jsonl, either gzipped) are put into the prompt template, and answers alone are predicted; any other file is one
    text, cut into windows."""
    if path.name.endswith((".json", ".jsonl", ".json.gz", ".jsonl.gz")):
        rows = encode_rows(records.read_records([path], "sft", skip_bad, most), source, length)
        return rows, f"{len(rows)} records in template {source.template}, cut at {length} ids, only answers predicted"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is no file: name a text file, or records as .json or .jsonl")
    try:
        ids = source.tokenizer.encode(path.read_text("utf-8"), bos=False)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}), nor named .json or .jsonl: "
                         "name a text file") from None
    bos = source.tokenizer.bos_id
    width, first, before = (length, "the first", "") if bos is None else (length - 1, "BOS", "BOS before each, ")
    rows = windows(ids, length, bos, most)
    if not rows:
        raise ValueError(f"{path} is too short: it has {len(ids)} ids, one window takes {width}; "
                         "name a longer text or lower --max_len")
    return rows, (f"{len(rows)} windows of {width} ids on end, {before}the last partial one dropped, "
                  f"every id but {first} predicted")


def read_texts(args: Namespace, source: Source, length: int) -> tuple[list[Row], str]:
    """Reads the texts to measure perplexity on: --text, for the demo's models records of its generator, or nothing."""
    if args.text is not None:
        return read_rows(args.text, source, length, None, args.skip_bad_records)
    if not source.is_demo:
        return [], ""
    examples = [records.normalise(record, "sft") for record in demo.instruction_records(1, 200)]
    rows = encode_rows(examples, source, length)
    return rows, f"{len(rows)} records that the generator wrote for this, only answers predicted"


class Line(NamedTuple):
    """A model in the table."""
    method: str
    bits: float                 # a weight of a quantized layer, grids included; of a plain model, of its dtype
    bytes: int                  # of the weights in the directory
    perplexity: float | None
    tokens_per_second: float | None
    gold: float | None          # the demo's score on held-out instructions


def measure(model: Llama, method: str, source: Source, texts: list[Row], device) -> Line:
    layers = quantized_layers(model).values()
    element = weights.DTYPES[model.config.dtype].itemsize
    quantized = sum(buffer.nbytes for layer in layers for buffer in layer.buffers())
    n = sum(layer.in_features * layer.out_features for layer in layers)
    bits = 8 * quantized / n if n else 8 * element
    size = quantized + element * sum(p.numel() for p in model.parameters())
    value = perplexity(model, texts, device) if texts else None
    speed = gold = None
    # Perplexity needs one block at a time on the device. Speed and gold need the whole model, else they stay None.
    with suppress(torch.OutOfMemoryError), packed(model.to(device)):
        speed = decoding_speed(model)
        if source.is_chain:
            gold = demo.measure(model, source.tokenizer, text.TEMPLATES[source.template])["gold"]
    return Line(method, bits, size, value, speed, gold)


def decoding_speed(model: Llama) -> float | None:
    """Returns the tokens a second of one row, without the prefill; None where the context has no room for any."""
    rates = []
    for _ in range(4):  # the first warms up
        steps = model.generate_steps([[1]], 33, temperature=0, eos_id=-1)
        next(steps, None)
        started = time.perf_counter()
        made = sum(1 for _ in steps)
        rates.append(made / (time.perf_counter() - started))
    return max(rates) or None


def print_table(table: list[Line]) -> None:
    print(f"{'method':50} {'bits a weight':>13} {'MB in all':>9} {'perplexity':>10} {'tokens/s':>8}")
    for line in table:
        megabytes = line.bytes / 1e6
        value = "-" if line.perplexity is None else f"{line.perplexity:.4f}"
        speed = "-" if line.tokens_per_second is None else f"{line.tokens_per_second:.1f}"
        print(f"{line.method:50} {line.bits:13.2f} {megabytes:9.1f} {value:>10} {speed:>8}")


# ---- command line ---------------------------------------------------------------------------------------------------

def parse(argv: list[str] | None) -> Namespace:
    parser = run.Parser("Quantize a LLaMA to 4 bits by GPTQ, or to 8 or 4 by rounding to nearest, and print what it "
                        "cost. Without flags, the demo: reads out/ppo, writes out/ppo-int4.")
    flag = parser.add_argument
    # input and output
    flag("directory", type=Path, nargs="?", metavar="DIR",
         help="weights directory to quantize, of any layout, or a LoRA adapter, which is merged first (out/ppo)")
    flag("--pretrain", type=Path, help="the same as DIR")
    flag("--save_path", type=Path,
         help="directory to write; without it the table is all there is (the demo: out/ppo-int4)")
    flag("--eval", action="store_true", help="change nothing, print the perplexity of DIR, quantized or not, on --text")
    # how
    flag("--bits", type=int, choices=[4, 8], help="4 in groups, or 8 with one scale a row (4)")
    flag("--method", choices=["gptq", "rtn"], help="gptq needs --calibration (4 bits: gptq, 8 bits: rtn)")
    flag("--group_size", type=run.whole(-1), help="columns that share a scale; -1 for whole rows (128, the demo: 32)")
    flag("--sym", action="store_true", default=None,
         help="zero is the middle code of every grid: AutoGPTQ's first format, which more programs read, at some loss")
    order = parser.add_mutually_exclusive_group()
    order.add_argument("--act_order", action="store_true", default=None,
                       help="gptq: take columns by falling activation; on anyway without --file_order")
    order.add_argument("--file_order", dest="act_order", action="store_false", help="gptq: take columns as they come")
    flag("--no_clip", dest="clip", action="store_false",
         help="gptq: let every grid span all weights of its group, instead of the best of 17 shrunk ones")
    flag("--damp", type=run.number(0, 1), default=0.01, help="gptq: added to H's diagonal, as a share of its mean")
    flag("--head", action="store_true", help="quantize the output head too (not where it is tied to the embedding)")
    # text
    flag("--calibration", type=Path,
         help="gptq: text file, or instruction records as .json or .jsonl, like what the model will see")
    flag("--text", type=Path, help="to measure perplexity on, of either kind; not the calibration text")
    flag("--template", choices=list(text.TEMPLATES), help="prompts of records (the directory's)")
    flag("--max_len", type=run.whole(2), default=256, help="ids of a window or a record, BOS included")
    flag("--max_datasets_size", type=run.whole(1), default=128, help="windows or records to calibrate on")
    flag("--skip_bad_records", action="store_true", help="count and skip broken records instead of stopping")
    # run
    flag("--dtype", choices=["auto", "fp32", "bf16", "fp16"], default="auto",
         help="to compute in; sums and grids are fp32 (auto: bf16 on CUDA, fp32 elsewhere)")
    flag("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto",
         help="auto: cuda where there is one, else cpu; one block at a time is on it")
    args = parser.parse_args(argv)
    if args.directory and args.pretrain and args.directory != args.pretrain:
        raise ValueError(f"DIR {args.directory} and --pretrain {args.pretrain} are two models: name one")
    args.pretrain = args.directory or args.pretrain
    return args


def resolve(args: Namespace, source: Source) -> Scheme:
    """Fills in the flags left open, and refuses those that contradict one another or the model."""
    run.resolve(args, {"bits": 4})
    if args.bits == 8:
        run.resolve(args, {"method": "rtn", "group_size": -1, "sym": True})
    run.resolve(args, {
        "method": "gptq",
        "group_size": 32 if source.is_demo else 128,
        "sym": False,
        "calibration": demo.FOLDER / "sft.jsonl.gz" if source.is_demo else None,
        "save_path": Path(f"out/ppo-int{args.bits}") if source.is_chain else None,
    })
    check_grid(args.bits, args.group_size)
    for holds, sentence in (
            (weights.quantization(source.base),
             f"{source.base} is already quantized: quantize the original, a second rounding would only lose more "
             "(--eval measures this one)"),
            (args.bits == 8 and args.group_size != -1,
             f"8 bits have one scale a row, --group_size {args.group_size} is for 4 bits: leave it out"),
            (args.method == "gptq" and args.calibration is None,
             "--method gptq needs --calibration: name a text file, or instruction records, like what the model will "
             "see (or --method rtn, which needs none)"),
            (args.method == "rtn" and args.act_order is not None,
             "the order of columns means nothing to --method rtn: leave the flag out, or use gptq"),
            (args.head and source.config.tie_embeddings,
             "--head: this model's head is its embedding, which is read row by row and stays as it is; leave it out")):
        if holds:
            raise ValueError(sentence)
    run.resolve(args, {"act_order": True})
    return Scheme(**{name: getattr(args, name) for name in Scheme._fields})


def evaluate(args: Namespace, source: Source, texts: list[Row], cut: str, dtype: torch.dtype, device) -> dict:
    """--eval: prints the perplexity of a directory as it is."""
    for name in ("save_path", "bits", "method", "group_size", "calibration"):
        if getattr(args, name) is not None:
            raise ValueError(f"--eval changes nothing, so --{name} has no meaning with it: how a directory is "
                             "quantized stands in its config.json")
    if not texts:
        raise ValueError("--eval needs --text: name a text file, or instruction records")
    value = perplexity(open_model(source.path, dtype).eval(), texts, device)
    print(f"{source.path}: perplexity {value:.4f} on {cut}")
    return {"perplexity": value, "windows": len(texts)}


def show_block(i: int, report: list[dict], blocks: int, began: float) -> None:
    """Prints a line after block i: the errors of its layers, and the time that is left."""
    done, errors = i + 1, ""
    left = (time.perf_counter() - began) / done * (blocks - done)
    for row in report:
        if "gptq" in row:
            leaf = row["layer"].rpartition(".")[2]
            by_rtn, by_gptq = 100 * row["rtn"], 100 * row["gptq"]
            errors += f" {leaf} {by_rtn:.3f}>{by_gptq:.3f}"
    errors = f" error in % of the output, RTN > GPTQ:{errors} |" if errors else ""
    print(f"block {done}/{blocks} |{errors} {left:.0f} s left", flush=True)


def main(argv: list[str] | None = None) -> dict:
    started = time.perf_counter()
    # 1. The flags, the directory but for its weights, and the texts.
    args = parse(argv)
    world = run.start(args.device, "naive")
    device = world.device
    dtype = run.choose_dtype(args.dtype, device)
    source = open_source(args.pretrain, args.template)
    args.pretrain = source.path
    length = min(args.max_len, source.config.max_seq_len)
    texts, cut = read_texts(args, source, length)
    if args.eval:
        return evaluate(args, source, texts, cut, dtype, device) | {"seconds": time.perf_counter() - started}
    scheme = resolve(args, source)
    if args.save_path:
        run.check_save_path(args.save_path, [source.path, source.base])
    rows = []
    run.say_flags(world, args)
    if scheme.method == "gptq":
        rows, calibrated = read_rows(args.calibration, source, length, args.max_datasets_size, args.skip_bad_records)
        print("calibration: " + calibrated.rpartition(",")[0])  # the last words are of what is predicted

    # 2. The model as it is.
    open_plain = functools.partial(open_model, source.path, dtype, adapter="merge")
    before = measure(open_plain(), source.config.dtype, source, texts, device)
    # 3. The quantized model.
    model = open_plain()
    began = time.perf_counter()
    progress = functools.partial(show_block, blocks=source.config.n_layers, began=began)
    layers = quantize_model(model, scheme, rows, device, progress)
    quantizing = time.perf_counter() - began
    if args.save_path:
        save(model, args.save_path)
        source.tokenizer.save(args.save_path, text.read_template(source.home))
    after = measure(model, f"{scheme.method} {scheme}", source, texts, device)
    # 4. What rounding alone would have given.
    table = [before, after]
    rounded = after.perplexity
    if texts and scheme.method == "gptq":
        model = open_plain()
        quantize_model(model, scheme._replace(method="rtn"), device=device)
        rounded = perplexity(model, texts, device)
        table.insert(1, after._replace(method=f"rtn {scheme}, no clipping", perplexity=rounded))
    # 5. What it cost.
    print_table(table)
    if texts:
        print("perplexity: " + cut)
    seconds = time.perf_counter() - started
    figures = {
        "perplexity_before": before.perplexity,
        "perplexity_after": after.perplexity,
        "perplexity_rtn": rounded,
        "bytes_before": before.bytes,
        "bytes_after": after.bytes,
        "tokens_per_second": after.tokens_per_second,
        "seconds": seconds,
        "quantize_seconds": quantizing,
        "layers": layers,
    }
    if source.is_chain:
        print(f"gold score on held-out instructions: {before.gold:.3f} before, {after.gold:.3f} after")
        figures |= {"gold_before": before.gold, "gold_after": after.gold}
    if args.save_path:
        figures = run.write_summary(args, world, figures)
        print(f"wrote {args.save_path} in {seconds:.0f} s, {quantizing:.0f} of them quantizing")
    return figures


if __name__ == "__main__":
    run.command(main)
