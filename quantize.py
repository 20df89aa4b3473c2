"""Stage 4, smaller weights: round-to-nearest (RTN), GPTQ, the linear layers that run the result, and perplexity.

    python quantize.py                                                        the demo: reads out/ppo, writes out/ppo-int4
    python quantize.py DIR --calibration FILE --text FILE --save_path OUT     4 bits by GPTQ, and a table of what it cost
    python quantize.py DIR --bits 8 --text FILE --save_path OUT               8 bits by RTN
    python quantize.py DIR --eval --text FILE                                 perplexity, of a quantized directory too
    python quantize.py --benchmark big                                        how fast it decodes here, beside bf16

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (arXiv 2210.17323).
A weight becomes a code of 4 or 8 bits on a grid that all weights of a group (some neighbours in a row) share:

    w ~ (q - zero) * scale        symmetric: zero is the middle code;  asymmetric: the grid spans smallest to largest weight

RTN takes the nearest code. GPTQ takes the codes one column after another and lets the columns not yet fixed make up for the
error, by how the layer's inputs X correlate: it minimizes |W X - Q X|^2 and not |W - Q|^2. All it needs of X is H = X X^T.

Four-bit layers are stored as AutoGPTQ stores them. Eight codes of one output o, of neighbouring inputs i, share a word:

    qweight[r, o], an int32     bit 31      28                                   7     4 3     0
    r = i / 8                      | i=8r+7  | i=8r+6  |  ...  | i=8r+2  | i=8r+1  | i=8r    |     shape (I/8, O)

    qzeros (G, O/8)  the same, eight outputs of one group to a word; "gptq" files hold zero - 1, "gptq_v2" files zero itself
    scales (G, O)    float16                     g_idx (I,)  the group of each input, i / group_size unless act-order moved it

Eight-bit layers are two tensors: `weight` (O, I) int8 and `scale` (O,) float32, w ~ weight * scale.

Where this differs from the paper, by what measured best on a small trained LLaMA (perplexity lost, as a share of RTN's loss):
1. Grids are set before the first column is fixed (AutoGPTQ's "static groups"). So columns may be taken in any order and a
   group still is a run of neighbours, which the fast kernels need.
2. Columns are taken by falling H_jj (the authors' --act-order) unless --file_order is given.
3. A grid is shrunk, down to 0.6 of its span, where that lowers the error that GPTQ counts, sum (w - q)^2 / U_jj^2. Clipping
   is in the authors' code too, there unweighted. `rtn` has it with equal weights, off unless asked for.
4. A dead input (H_jj = 0) keeps its plainly rounded weights; the authors set them to zero.
5. The factor U comes from one Cholesky and one triangular inverse, see `inverse_factor`.

Letters: O outputs and I inputs of a layer, G groups, S columns of a group, N rows of a product (tokens); B, T, C as in model.py.
"""

import argparse
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora
from data import demo, run, text
from data.records import normalise, read_records
from data.text import Tokenizer, check_tokenizer, read_template
from data.weights import DTYPES, FOREIGN, fill, hf_name, quantization, read_config, read_tensors, write_model
from model import SHAPES, Llama, LlamaConfig, Where, random_model

SHRINK = tuple(1 - i / 40 for i in range(17))  # of a grid's span: 1, 0.975, ... 0.6; finer steps changed nothing measurable
SMALLEST = 2.0**-24                            # of a scale: the smallest number of float16, where scales are stored
TOKENS = 4096                                  # that pass through a block at a time, at least one row


# ---- grids and rounding to nearest ----------------------------------------------------------------------------------

class Quantized(NamedTuple):
    """A matrix W (O, I) as w[o, i] ~ (q[o, i] - zero[o, group[i]]) * scale[o, group[i]]."""
    q: Tensor        # (O, I) uint8, 0 .. 2^bits - 1
    scale: Tensor    # (O, G) float32; for 4 bits they are numbers of float16
    zero: Tensor     # (O, G) uint8
    group: Tensor    # (I,) int32

    def dequantize(self) -> Tensor:
        g = self.group.long()
        return (self.q.float() - self.zero.float()[:, g]) * self.scale[:, g]  # (O, I)


def check_grid(bits: int, group_size: int) -> None:
    """ValueError for what no grid can have."""
    if bits not in (4, 8):
        raise ValueError(f"{bits} bits are not offered: choose 4 or 8")
    if type(group_size) is not int or group_size != -1 and group_size < 1:
        raise ValueError(f"group size {group_size!r} is no number of columns: give a whole number above 0, or -1 for whole rows")


def code(w: Tensor, scale: Tensor, zero: Tensor, most: int) -> Tensor:
    """The nearest code of each w, as a float; shapes broadcast."""
    return (w / scale + zero).round_().clamp_(0, most)


def grids(w: Tensor, bits: int, group_size: int, sym: bool, clip: bool = False, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """scale and zero, (O, G) fp32 each, of the groups of w (O, I). With clip, of every SHRINK the one with the least
    sum of importance (I,) * (w - its code's value)^2; None is 1 for all."""
    O, I = w.shape
    S, most = I if group_size == -1 else min(group_size, I), 2**bits - 1
    G = -(-I // S)
    importance = F.pad(torch.ones(I, device=w.device) if importance is None else importance, (0, G * S - I)).view(G, S)
    scales, zeros = torch.empty(O, G, device=w.device), torch.empty(O, G, device=w.device)
    rows = max(1, 2**16 // I) if w.device.type == "cpu" else O  # 256 KB stay in the processor's cache over all tries
    for start in range(0, O, rows):
        part = F.pad(w[start:start + rows], (0, G * S - I)).view(-1, G, S)                                    # (o, I) -> (o, G, S)
        low, high = part.amin(-1).clamp_(max=0), part.amax(-1).clamp_(min=0)                                  # (o, G): 0 has a code
        if sym:
            high = torch.maximum(high, -low)
            low = -high
        best = [low, low, torch.full_like(low, math.inf)]                                                     # scale, zero, error
        for shrink in SHRINK if clip else SHRINK[:1]:
            scale = ((high - low) * (shrink / most)).clamp_(min=SMALLEST)
            if bits == 4:
                scale = scale.half().float()  # before the codes are chosen: they fit what the file will say
            zero = torch.full_like(scale, 2**(bits - 1)) if sym else (-low * shrink / scale).round_().clamp_(0, most)
            q = code(part, scale[..., None], zero[..., None], most)                                           # (o, G, S)
            error = q.sub_(zero[..., None]).mul_(scale[..., None]).sub_(part).square_().mul_(importance).sum(-1)  # (o, G)
            better = error < best[2]
            best = [torch.where(better, new, old) for new, old in zip((scale, zero, error), best)]
        scales[start:start + rows], zeros[start:start + rows] = best[:2]
    return scales, zeros


def groups_of(I: int, group_size: int, device=None) -> Tensor:
    """The group of each column, (I,) int32."""
    return torch.arange(I, dtype=torch.int32, device=device) // (I if group_size == -1 else group_size)


def rtn(w: Tensor, bits: int, group_size: int, sym: bool, clip: bool = False) -> Quantized:
    """Round W (O, I) to nearest, every group of group_size columns (-1: the whole row, the last one may be smaller) on a grid
    of its own. clip shrinks grids where that lowers the squared error. Raises ValueError for other bits or no group size."""
    check_grid(bits, group_size)
    w = w.float()
    scale, zero = grids(w, bits, group_size, sym, clip)
    group = groups_of(w.shape[1], group_size, w.device)
    q, at = torch.empty(w.shape, dtype=torch.uint8, device=w.device), group.long()
    for rows in torch.arange(len(w)).split(4096):  # of a head there are many, and each pass makes several fp32 copies
        part = slice(rows[0], rows[-1] + 1)
        q[part] = code(w[part], scale[part, at], zero[part, at], 2**bits - 1)
    return Quantized(q, scale, zero.to(torch.uint8), group)


# ---- GPTQ -----------------------------------------------------------------------------------------------------------

def add_hessian(H: Tensor, x: Tensor) -> None:
    """Add X X^T of some rows x (N, I) to the lower triangle of H (I, I), in slabs, which spares nearly half of the products."""
    x = x.float()
    for start in range(0, H.shape[0], 256):
        H[start:, start:start + 256].addmm_(x[:, start:].T, x[:, start:start + 256])  # (I - start, N) @ (N, 256)


def hessian(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """H = X X^T (I, I) in fp32 of inputs x (..., I); mask (...) is True where a row is real, others do not count."""
    x = x.flatten(0, -2) if mask is None else x[mask]  # (N, I)
    H = torch.zeros(x.shape[-1], x.shape[-1], device=x.device)
    add_hessian(H, x)
    return H.tril() + H.tril(-1).T


def inverse_factor(H: Tensor, damp: float) -> Tensor:
    """Upper triangular U with U^T U = (H + damp * mean(diag H) * 1)^-1: "the Cholesky of the inverse" of the paper.

    With J the reversal of rows, J H J = L L^T gives H = R R^T for the upper triangular R = J L J, so U = R^-1. That is one
    inversion less than inverting H and factoring the inverse, and so half the rounding. More damping is tried where the
    factor does not exist, if there was any; ValueError otherwise."""
    eye = torch.eye(len(H), device=H.device)
    for factor in (1, 10, 100):
        damped = H + factor * damp * H.diagonal().mean() * eye
        L, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        # L_jj^2 / H_jj is the share of an input that the others do not explain; in fp32, up to 5e-6 of it was rounding.
        if not failed and (damp or (L.diagonal().square() > 1e-5 * damped.diagonal().flip(0)).all()):
            return torch.linalg.solve_triangular(L.flip(0, 1), eye, upper=True)
        if damp == 0:
            raise ValueError(f"the inputs of this layer span fewer than its {len(H)} dimensions, so its Hessian has no inverse: calibrate on more text, or with --damp 0.01")
    raise ValueError("the Hessian has no inverse even with 100 times the damping: look at the calibration text")


def gptq(w: Tensor, hessian: Tensor, bits: int, group_size: int, sym: bool, act_order: bool = False, clip: bool = False,
         damp: float = 0.01, block: int = 128) -> Quantized:
    """Quantize W (O, I) so that |W X - Q X|^2 is small, hessian = X X^T (I, I); with the identity it is `rtn` to the bit.

    block: columns after which the rest of W is updated (any number gives the same result but for rounding). Raises
    ValueError for other bits or no group size, or with damp 0 where H is singular."""
    check_grid(bits, group_size)
    I, most = w.shape[1], 2**bits - 1
    H = hessian.float().clone()
    # 1. A dead input never has a value: row and column of H are 0, and with H_jj = 1 it is tied to no other column.
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1
    # 2. The order of the columns. A stable sort: where all H_jj are equal it is the file's order.
    order = torch.argsort(H.diagonal(), descending=True, stable=True) if act_order else torch.arange(I, device=w.device)
    # 3. U, upper triangular, with U^T U = (H + lambda)^-1.  U_jj^2 is [H_F^-1]_jj, F being the columns from j on.
    U = inverse_factor(H[order][:, order], damp)
    diagonal = U.diagonal()
    # 4. The grid of every group. An error of one in column j will cost 1 / U_jj^2, by the paper's equation (2).
    importance = torch.empty_like(diagonal)
    importance[order] = (diagonal.min() / diagonal).square()
    importance[dead] = 0
    scale, zero = grids(w.float(), bits, group_size, sym, clip, importance)
    group = groups_of(I, group_size, w.device)
    at = group.long()[order]                          # (I,)
    # 5. Column after column; W is held transposed, so that a column of the paper is a row in memory.
    W = w.float().T[order].contiguous()               # (I, O)
    Q = torch.empty(W.shape, dtype=torch.uint8, device=w.device)
    scale_t, zero_t, d = scale.T.contiguous(), zero.T.contiguous(), diagonal.tolist()  # (G, O) each
    E = torch.empty(min(block, I), W.shape[1], device=w.device)
    for first in range(0, I, block):
        last = min(first + block, I)
        for j in range(first, last):
            s, z = scale_t[at[j]], zero_t[at[j]]      # (O,) each
            q = code(W[j], s, z, most)
            Q[j] = q
            e = torch.div(W[j] - q.sub_(z).mul_(s), d[j], out=E[j - first])            # E_j = (W_j - Q_j) / U_jj
            W[j + 1:last].addr_(U[j, j + 1:last], e, alpha=-1)                         # the columns left in this block ...
        W[last:].addmm_(U[first:last, last:].T, E[:last - first], alpha=-1)           # ... and lazily all after it
    codes = torch.empty_like(Q)
    codes[order] = Q
    return Quantized(codes.T.contiguous(), scale, zero.to(torch.uint8), group)


def layer_errors(W: Tensor, H: Tensor, *approximations: Tensor) -> list[float]:
    """|W X - Q X|^2 / |W X|^2 of each approximation Q (O, I), by way of H = X X^T."""
    squares = [((D @ H) * D).sum() for D in (W, *(W - Q for Q in approximations))]
    return [(square / squares[0].clamp(min=1e-30)).item() for square in squares[1:]]


# ---- packing --------------------------------------------------------------------------------------------------------

def shifts(device) -> Tensor:
    return torch.arange(0, 32, 4, dtype=torch.int32, device=device)[:, None]  # (8, 1)


def pack_int4(q: Tensor) -> Tensor:
    """Codes q (O, I), whole numbers 0 .. 15 -> words (ceil(I / 8), O) int32, input 8r in the lowest four bits of word r.
    Where 8 does not divide I, the last word is filled with 0."""
    if q.numel() and (q.min() < 0 or q.max() > 15):
        raise ValueError(f"codes reach from {q.min()} to {q.max()}, four bits hold 0 to 15")
    q = F.pad(q.to(torch.int32), (0, -q.shape[1] % 8)).T.reshape(-1, 8, q.shape[0])      # (O, I) -> (I/8, 8, O)
    return (q << shifts(q.device)).sum(1, dtype=torch.int32)                             # (I/8, O): disjoint bits, so + is |


def unpack_int4(words: Tensor, width: int | None = None) -> Tensor:
    """Words (R, O) int32 -> codes (O, 8R) uint8, or the first `width` columns of them: the inverse of pack_int4."""
    q = (words[:, None] >> shifts(words.device)) & 15                                    # (R, 8, O)
    return q.reshape(-1, words.shape[1]).T[:, :width].to(torch.uint8)                    # (O, 8R)


# ---- layers ---------------------------------------------------------------------------------------------------------

class QuantizedProduct(torch.autograd.Function):
    """y = x W^T of a frozen quantized layer. Nothing but the layer is kept: backward dequantizes W again (QLoRA, Dettmers et
    al. 2023), so a 16-bit W lives as long as one product."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer = layer
        return dequantized_product(x, layer, False)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        return dequantized_product(dy, ctx.layer, True), None


def dequantized_product(x: Tensor, layer: nn.Module, transposed: bool) -> Tensor:
    """x (..., I) W^T -> (..., O), or transposed x (..., O) W -> (..., I)."""
    W = layer.dequantize(x.dtype)  # (O, I)
    return F.linear(x, W.T if transposed else W)


class QuantizedLinear(nn.Module):
    """What the two layers share: a frozen x (..., I) -> y (..., O) that has no parameters, only buffers."""
    def __init__(self, fan_in: int, fan_out: int):
        super().__init__()
        self.in_features, self.out_features = fan_in, fan_out
        self.fast: nn.Module | None = None  # while the model generates, `quicken`

    @torch.compiler.disable  # it would unroll the loops of dequantizing, for minutes
    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return QuantizedProduct.apply(x, self)
        return dequantized_product(x, self, False) if self.fast is None else self.fast(x)

    def quicken(self, on: bool) -> None:
        """Run on the kernels that `fuse` gives, and keep what training needs: PPO's rollouts then take a step's time a token, and not
        that of dequantizing. What they sample differs from the slow layer's by the kernels' rounding; PPO's log-probabilities are the
        slow layer's anyway."""
        self.fast = self.join([self], 1) if on else None

    def plain(self, dtype: torch.dtype) -> nn.Linear:
        """The same layer with its weights written out: for a merge, which needs them."""
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=False)
        linear.weight = nn.Parameter(self.dequantize(dtype).contiguous())
        return linear

    def _apply(self, fn, recurse: bool = True):
        """model.to(device) moves the buffers, model.to(dtype) leaves them: scales in bf16 would be other scales."""
        for name, buffer in self._buffers.items():
            moved = fn(buffer)
            self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        return self


class Linear4(QuantizedLinear):
    """Four bits in AutoGPTQ's tensors; zeros as they are (gptq_v2), whatever the file had. Where 8 does not divide a side, the last
    words are not full."""

    def __init__(self, fan_in: int, fan_out: int, groups: int):
        super().__init__(fan_in, fan_out)
        self.register_buffer("qweight", torch.zeros(-(-fan_in // 8), fan_out, dtype=torch.int32))
        self.register_buffer("qzeros", torch.zeros(groups, -(-fan_out // 8), dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(groups, fan_out, dtype=torch.float16))
        self.register_buffer("g_idx", torch.zeros(fan_in, dtype=torch.int32))

    @classmethod
    def of(cls, m: Quantized) -> "Linear4":
        O, I = m.q.shape
        with torch.device(m.q.device):
            layer = cls(I, O, m.scale.shape[1])
        layer.qweight = pack_int4(m.q)                                                       # (I/8, O)
        layer.qzeros = pack_int4(m.zero.T).T.contiguous()                                    # (G, O) -> (O/8, G) -> (G, O/8)
        layer.scales = m.scale.T.contiguous().half()                                         # (G, O)
        layer.g_idx = m.group.clone()                                                        # (I,)
        return layer

    def quantized(self) -> Quantized:
        zero = unpack_int4(self.qzeros.T, self.out_features)                                 # (O/8, G) -> (G, O)
        return Quantized(unpack_int4(self.qweight, self.in_features), self.scales.float().T, zero.T, self.g_idx)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """W (O, I), a transposed view. On a CPU some words at a time, which stay in its cache from the first step to the last."""
        I, O = self.in_features, self.out_features
        zero = unpack_int4(self.qzeros.T, O).to(torch.int32)                                 # (O/8, G) -> (G, O)
        W = torch.empty(I, O, dtype=dtype, device=self.qweight.device)
        step = max(1, (2**14 if W.device.type == "cpu" else 2**22) // O)
        for r in range(0, len(self.qweight), step):
            g = self.g_idx[8 * r:8 * (r + step)].long()
            q = ((self.qweight[r:r + step, None] >> shifts(W.device)) & 15).flatten(0, 1)    # (R, 8, O) -> (8R, O)
            W[8 * r:8 * (r + step)] = q[:len(g)].sub_(zero[g]) * self.scales[g].float()
        return W.T

    @staticmethod
    def join(layers: "list[Linear4]", rows: int) -> "Fast4 | None":
        """The layers in one, on PyTorch's own kernel, or None where there is none for them or they read their inputs in different orders."""
        first = layers[0]
        if any(layer.g_idx.shape != first.g_idx.shape or not torch.equal(layer.g_idx, first.g_idx) for layer in layers):
            return None
        parts = [layer.quantized() for layer in layers]
        m = Quantized(*(torch.cat([getattr(part, name) for part in parts]) for name in ("q", "scale", "zero")), parts[0].group)
        fits = kernel_groups(m.group, m.scale.shape[1])
        return Fast4(m, *fits) if fits and kernel_works(4, m.q.device.type) else None


def kernel_groups(group: Tensor, groups: int) -> tuple[Tensor | None, int] | None:
    """How the int4 kernels can read columns whose groups are `group` (I,): (order to bring them in, or None for their own; columns
    of a kernel's group), or None for groups that it has not: it knows 32, 64, 128 and 256 columns, and groups are runs of equal size."""
    order = torch.argsort(group, stable=True)
    counts = torch.bincount(group, minlength=groups)
    S = int(counts[0])
    if (counts[:-1] != S).any() or counts[-1] > S:
        return None
    S = -(-S // 32) * 32 if groups == 1 else S  # one group a row: padded
    size = next((size for size in (256, 128, 64, 32) if S % size == 0), None)
    in_order = torch.equal(order, torch.arange(len(group), device=group.device))
    return None if size is None else (None if in_order else order, size)


class Fast4(nn.Module):
    """One or several Linear4, on tinygemm's kernels: bf16 times (q - 8) * scale + offset, with scale and offset (8 - zero) * scale in
    bf16. Outputs are padded to blocks of 64 (8 on CUDA), inputs to whole groups (and 128 on CUDA).

    On a CPU without bf16 products the kernel needs twice as long as fp32 for many rows. There WIDE rows and more take W block by
    block out of the kernel's own layout, found in PyTorch 2.13 with AVX512 and not trusted unless it gives the codes back:

        byte i of 32, of input k and outputs 64 b ... 64 b + 63:    | q[64b + 32 + i, k] | q[64b + i, k] |     (O/64, I, 32)
    """

    WIDE = 128  # rows: there both ways take as long

    def __init__(self, m: Quantized, order: Tensor | None, size: int):
        super().__init__()
        (O, I), device = m.q.shape, m.q.device
        cuda = device.type == "cuda"
        more_O = -O % (8 if cuda else 64)
        S = int(torch.bincount(m.group)[0])
        more_I = -I % (max(128, size) if cuda else size)
        self.in_features, self.out_features, self.size, self.padding = I, O, size, more_I
        self.register_buffer("order", order)
        q = m.q if order is None else m.q[:, order]
        q = F.pad(q, (0, more_I, 0, more_O))                                                           # (O, I)
        g = torch.arange(0, I + more_I, size, device=device).div(S, rounding_mode="floor").clamp(max=m.scale.shape[1] - 1)
        scale, zero = (F.pad(t.float()[:, g].T, (0, more_O)) for t in (m.scale, m.zero))               # (G', O) each
        self.register_buffer("grid", torch.stack((scale, (8 - zero) * scale), dim=-1).bfloat16())      # (G', O, 2)
        if cuda:
            weight = torch.ops.aten._convert_weight_to_int4pack(q[:, ::2] << 4 | q[:, 1::2], 8)        # (O, I/2) bytes
        else:
            weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int().contiguous(), 1)       # (O, I) words
        self.register_buffer("weight", weight)
        self.known = not cuda and not torch.cpu._is_avx512_bf16_supported() and torch.equal(self.codes(0, len(q) // 64).transpose(1, 2).flatten(0, 1), q)

    def codes(self, first: int, last: int) -> Tensor:
        """Of some blocks of 64 outputs, (b, I, 64) uint8."""
        pairs = self.weight.view(torch.uint8).view(len(self.weight) // 64, -1, 32)[first:last]         # (O, I/2) -> (b, I, 32)
        return torch.cat((pairs & 15, pairs >> 4), dim=-1)

    def wide(self, rows: Tensor) -> Tensor:
        """rows (N, I) times W^T in fp32, a few blocks of W at a time, which stay in the processor's cache -> (N, O)."""
        (N, I), blocks = rows.shape, len(self.weight) // 64
        y = rows.new_empty(N, blocks, 64)
        scale, offset = self.grid.float().view(-1, 1, blocks, 64, 2).permute(4, 2, 0, 1, 3).contiguous()  # (G', O, 2) -> (O/64, G', 1, 64) each
        offset = offset - 8 * scale
        step = max(1, 2**18 // (64 * I))
        for b in range(0, blocks, step):
            q = self.codes(b, b + step).float().view(-1, I // self.size, self.size, 64)                # (b, I, 64) -> (b, G', S, 64)
            W = torch.addcmul(offset[b:b + step], q, scale[b:b + step]).view(-1, I, 64)                # (b, I, 64)
            y[:, b:b + step] = torch.matmul(rows, W).transpose(0, 1)                                   # (b, N, 64) -> (N, b, 64)
        return y.view(N, -1)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)                                                         # (N, I)
        if self.order is not None:
            rows = rows[:, self.order]
        if self.padding:
            rows = F.pad(rows, (0, self.padding))
        if self.known and len(rows) >= self.WIDE:
            y = self.wide(rows.float())                                                                # (N, O)
        else:
            multiply = torch.ops.aten._weight_int4pack_mm if x.device.type == "cuda" else torch.ops.aten._weight_int4pack_mm_for_cpu
            y = multiply(rows.bfloat16().contiguous(), self.weight, self.size, self.grid)              # (N, O)
        return y[:, :self.out_features].to(x.dtype).view(*x.shape[:-1], self.out_features)             # (..., O)


class Linear8(QuantizedLinear):
    """Eight bits, a scale a row: `weight` (O, I) int8, `scale` (O,) float32."""

    def __init__(self, fan_in: int, fan_out: int):
        super().__init__(fan_in, fan_out)
        self.register_buffer("weight", torch.zeros(fan_out, fan_in, dtype=torch.int8))
        self.register_buffer("scale", torch.zeros(fan_out))

    @classmethod
    def of(cls, m: Quantized) -> "Linear8":
        with torch.device(m.q.device):
            layer = cls(m.q.shape[1], m.q.shape[0])
        layer.weight, layer.scale = (m.q.short() - m.zero).to(torch.int8), m.scale[:, 0].contiguous()
        return layer

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """W (O, I)."""
        W = torch.empty(self.weight.shape, dtype=dtype, device=self.weight.device)
        for start in range(0, len(W), 64):
            W[start:start + 64] = self.weight[start:start + 64] * self.scale[start:start + 64, None]
        return W

    @staticmethod
    def join(layers: "list[Linear8]", rows: int) -> "Fast8 | None":
        if not kernel_works(8, layers[0].weight.device.type):
            return None
        return Fast8(torch.cat([layer.weight for layer in layers]), torch.cat([layer.scale for layer in layers]))


class Fast8(nn.Module):
    """One or several Linear8 by int8 times int8: every row of x is brought to int8 by its own largest entry, products are summed
    in int32, and both scales are multiplied in afterwards.

    On a CPU the weights lie in the order of bytes that oneDNN's kernel reads fastest: 16 rows of x then take 1.6 times as long as
    one, where `_int_mm`, which sorts W anew in every call, takes 2.3 times as long. x comes as unsigned bytes, 128 meaning 0: for
    signed ones oneDNN has no fast kernel. A processor without instructions for int8 (VNNI) has only the kernel that leaves x in
    bf16, as slow for 16 rows as 16 calls."""

    def __init__(self, weight: Tensor, scale: Tensor):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.kernel = "int_mm" if weight.device.type == "cuda" else "onednn" if torch.cpu._is_vnni_supported() else "weight_only"
        if self.kernel == "onednn":
            weight = torch.ops.onednn.qlinear_prepack(weight, None)
            self.register_buffer("zero", torch.zeros(self.out_features, dtype=torch.int64))
        else:  # CUDA's kernel wants sizes that 8 divides; weight_only's reads past the end of rows that are no multiple of 16, and crashes
            by_I, by_O = (8, 8) if self.kernel == "int_mm" else (16, 1)
            weight = F.pad(weight, (0, -self.in_features % by_I, 0, -self.out_features % by_O))
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features).float()                                                 # (N, I)
        return getattr(self, self.kernel)(rows).to(x.dtype).view(*x.shape[:-1], self.out_features)                    # (N, O) -> (..., O)

    def onednn(self, rows: Tensor) -> Tensor:
        largest = rows.abs().amax(-1, keepdim=True).clamp_(min=1e-30).div_(127)                        # (N, 1)
        q = (rows / largest).add_(128.5).to(torch.uint8)                                               # 1 .. 255; + 0.5 and cut off is rounding
        y = torch.ops.onednn.qlinear_pointwise(q, 1.0, 128, self.weight, self.scale, self.zero, None, 1.0, 0, torch.float32, "none", [], "")
        return y.mul_(largest)                                                                         # (N, O)

    def int_mm(self, rows: Tensor) -> Tensor:
        largest = rows.abs().amax(-1, keepdim=True).clamp_(min=1e-30).div_(127)                        # (N, 1)
        q = (rows / largest).round_().to(torch.int8)
        q = F.pad(q, (0, self.weight.shape[1] - self.in_features, 0, max(0, 17 - len(q))))             # the kernel takes more than 16 rows
        y = torch._int_mm(q, self.weight.T)[:len(rows), :self.out_features]                            # (N, O) int32
        return (y * largest).mul_(self.scale)

    def weight_only(self, rows: Tensor) -> Tensor:
        one = self.scale.new_ones(self.out_features, dtype=torch.bfloat16)                             # the kernel would round our scales to bf16
        return torch._weight_int8pack_mm(F.pad(rows, (0, self.weight.shape[1] - self.in_features)).bfloat16(), self.weight, one).float().mul_(self.scale)


def agrees(fast: nn.Module, slow: nn.Module, device: str) -> bool:
    """Does a fast layer give what its slow one gives, for 1 and for 5 rows? The kernels are PyTorch's own affair, their layout has
    changed between versions: where they are missing, refuse, or compute something else, the slow layer takes their place."""
    x = torch.randn(5, slow.in_features, generator=torch.Generator().manual_seed(1)).to(device)
    right = slow(x)
    return all((fast(x[:n]) - right[:n]).abs().max() < 0.05 * right.abs().max() for n in (1, 5))


@functools.cache
def kernel_works(bits: int, device: str) -> bool:
    m = rtn(torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).to(device), bits, 64 if bits == 4 else -1, bits == 8)
    slow = Linear4.of(m) if bits == 4 else Linear8.of(m)
    try:
        return agrees(Fast4(m, None, 64) if bits == 4 else Fast8(slow.weight, slow.scale), slow, device)
    except (RuntimeError, AttributeError, TypeError):
        return False


# ---- a whole model --------------------------------------------------------------------------------------------------

BLOCK = {"attention": ("wq", "wk", "wv", "wo"), "feed_forward": ("w1", "w3", "w2")}  # the last of each reads what the others make


class Scheme(NamedTuple):
    """How a model is quantized."""
    method: str = "gptq"
    bits: int = 4
    group_size: int = 128    # columns; -1 is the whole row
    sym: bool = False
    act_order: bool = True
    clip: bool = True
    damp: float = 0.01       # of the mean of H's diagonal: the paper's
    head: bool = False       # the output head too


class Row(NamedTuple):
    """One text: ids, and which of them count as predicted."""
    ids: list[int]
    target: list[bool]


def windows(ids: list[int], length: int, bos: int, most: int | None = None) -> list[Row]:
    """Cut a text into consecutive runs of length - 1 ids, BOS before each; the last partial one is dropped. All ids but BOS count."""
    starts = range(0, len(ids) - length + 2, length - 1)[:most]
    return [Row([bos, *ids[i:i + length - 1]], [False] + [True] * (length - 1)) for i in starts]


def batches(model: Llama, rows: list[Row], device) -> Iterable[tuple[Tensor, Tensor, Tensor, Where]]:
    """tokens, mask, target, each (B, T), and where the tokens stand; padding on the right, which nothing real looks at."""
    step = max(1, TOKENS // max((len(row.ids) for row in rows), default=1))
    for i in range(0, len(rows), step):
        tokens, mask, target = text.collate(rows[i:i + step])
        where = model.locate(tokens[:1].to(model.device))
        yield tokens, mask.to(device), target, where._replace(cos=where.cos.to(device), sin=where.sin.to(device))


def head_nll(head: nn.Module, h: Tensor, answer: Tensor) -> Tensor:
    """Returns the sum of -log p of the answers (N,) after hidden states h (N, C); logits of 512 rows exist at a time."""
    total = torch.zeros((), device=h.device)
    for rows, right in zip(h.split(512), answer.split(512)):
        total = total + F.cross_entropy(head(rows).float(), right, reduction="sum")
    return total


@torch.no_grad()
def perplexity(model: Llama, rows: list[Row], device="cpu") -> float:
    """exp of the mean -log p over all target ids of all rows. One block at a time is on `device`, the model need not be."""
    home, parts = model.device, list(batches(model, rows, device))
    xs = [model.tok_embeddings(tokens.to(home)) for tokens, *_ in parts]                             # (B, T, C) each
    for layer in model.layers:
        layer.to(device)
        xs = [layer(x.to(device), where).to(home) for x, (*_, where) in zip(xs, parts)]
        layer.to(home)
    nll = n = 0.0
    for x, (tokens, _, target, _) in zip(xs, parts):
        h = model.norm(x[:, :-1][target[:, 1:].to(home)])                                            # (B, T-1, C) -> (N, C)
        nll += head_nll(model.output, h, tokens[:, 1:][target[:, 1:]].to(home)).item()
        n += len(h)
    if not math.isfinite(nll):
        raise ValueError("the model's probabilities are not finite: its weights or its dtype are broken (try --dtype fp32)")
    return math.exp(min(nll / n, 700.0))


def replace(parent: nn.Module, names: tuple[str, ...], where: str, scheme: Scheme, H: Tensor | None) -> list[dict]:
    """Quantize those linears of parent, which have the same inputs, as one matrix. Returns of each its name and, with H, its
    error before and after: by RTN on the same grid size and by GPTQ."""
    linears = [getattr(parent, name) for name in names]
    for name, linear in zip(names, linears):
        if not linear.weight.isfinite().all():
            raise ValueError(f"{where}.{name} has weights that are not finite: the model is broken, nothing was written")
    if H is not None and not H.isfinite().all():
        raise ValueError(f"the inputs of {where}.{names[0]} are not finite: they overflow, try --dtype fp32 or bf16; nothing was written")
    W = torch.cat([linear.weight for linear in linears]).float()                                     # (O, I), of all together
    if H is None:
        m = rtn(W, scheme.bits, scheme.group_size, scheme.sym, scheme.clip)
    else:
        try:
            m = gptq(W, H, scheme.bits, scheme.group_size, scheme.sym, scheme.act_order, scheme.clip, scheme.damp)
        except ValueError as error:
            raise ValueError(f"{where}.{names[0]}: {error}") from None
    report, start = [], 0
    plain = None if H is None else rtn(W, scheme.bits, scheme.group_size, scheme.sym).dequantize()
    for name, linear in zip(names, linears):
        part = slice(start, start := start + linear.out_features)
        mine = Quantized(m.q[part], m.scale[part], m.zero[part], m.group)
        setattr(parent, name, Linear8.of(mine) if scheme.bits == 8 else Linear4.of(mine))
        errors = layer_errors(W[part], H, plain[part], mine.dequantize()) if H is not None else []
        report.append({"layer": f"{where}.{name}"} | dict(zip(("rtn", "gptq"), errors)))
    return report


@torch.no_grad()
def quantize_model(model: Llama, scheme: Scheme, rows: list[Row] = (), device="cpu", progress: Callable[[int, list[dict]], None] = lambda i, report: None) -> list[dict]:
    """Put quantized layers in the place of a model's linears, one block after the other; the model is changed. `rows` are
    what GPTQ calibrates on. One block at a time is on `device`. Returns each layer's relative errors."""
    check_grid(scheme.bits, scheme.group_size)
    home, errors, gptq_on = model.device, [], scheme.method == "gptq"
    parts = list(batches(model, rows, device)) if gptq_on else []
    xs = [model.tok_embeddings(tokens.to(home)) for tokens, *_ in parts]                             # (B, T, C) each
    for i, layer in enumerate(model.layers):
        report = []
        layer.to(device)
        for half, norm in (("attention", layer.attention_norm), ("feed_forward", layer.ffn_norm)):
            module, (*first, last), where = getattr(layer, half), BLOCK[half], f"layers.{i}.{half}"
            if not gptq_on:
                report += [error for name in BLOCK[half] for error in replace(module, (name,), where, scheme, None)]
                continue
            # q, k and v, or gate and up, read what the norm gives ...
            report += replace(module, tuple(first), where, scheme, sum_hessians(real(norm(x.to(device)), mask) for x, (_, mask, *_) in zip(xs, parts)))
            # ... and o, or down, what these make of it now: with nothing in its place, the half returns that.
            linear = getattr(module, last)
            setattr(module, last, nn.Identity())
            call = (lambda x, where: module(norm(x), where)) if half == "attention" else (lambda x, where: module(norm(x)))
            inner = [call(x.to(device), where).to(home) for x, (*_, where) in zip(xs, parts)]        # (B, T, I) each
            setattr(module, last, linear)
            report += replace(module, (last,), where, scheme, sum_hessians(real(y.to(device), mask) for y, (_, mask, *_) in zip(inner, parts)))
            xs = [x + getattr(module, last)(y.to(device)).to(home) for x, y in zip(xs, inner)]
        layer.to(home)
        errors += report
        progress(i, report)
    if scheme.head:
        H = sum_hessians(real(model.norm(x), mask.to(home)) for x, (_, mask, *_) in zip(xs, parts)) if gptq_on else None
        errors += replace(model, ("output",), "model", scheme, H)
    model.quantized = scheme._asdict()
    return errors


def real(x: Tensor, mask: Tensor) -> Tensor:
    """The rows of x (B, T, I) that are no padding, (N, I); a view where all are real."""
    return x.flatten(0, 1) if mask.all() else x[mask]


def sum_hessians(inputs: Iterable[Tensor]) -> Tensor:
    """H of inputs (N, I) that come in parts."""
    H = None
    for x in inputs:
        H = torch.zeros(x.shape[1], x.shape[1], device=x.device) if H is None else H
        add_hessian(H, x)
    return H.tril_() + H.tril(-1).T


@contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """Inside, quantized layers use their fast kernels; they hold their weights twice meanwhile."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    try:
        for layer in layers:
            layer.quicken(True)
        yield
    finally:
        for layer in layers:
            layer.quicken(False)


# ---- files ----------------------------------------------------------------------------------------------------------

def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def unread(model: Llama) -> list[str]:
    """What of a 4-bit model other programs cannot read (gptqmodel 7.6, and transformers 5.24 by way of it, were tried)."""
    layers, size = quantized_layers(model), model.quantized["group_size"]
    odd = sum(bool(layer.out_features % 8 or layer.in_features % 8) for layer in layers.values())
    return ([f"of {len(layers)} matrices, {odd} have a side that 8 does not divide: gptqmodel reads them, llama.cpp does not"] if odd else []) + (
        [f"gptqmodel and transformers have no groups of {size}, but of 16, 32, 64, 128, 256, 512, 1024 and whole rows"] if size not in (-1, 16, 32, 64, 128, 256, 512, 1024) else []) + (
        ["transformers leaves out a quantized head and makes up another, gptqmodel and llama.cpp read it"] if model.quantized["head"] else [])


def save(model: Llama, directory: str | Path) -> None:
    """Write a quantized model: 4 bits as AutoGPTQ has it, 8 bits in our two tensors a layer, the rest as Llama.save_pretrained.
    Its config.json says how it is quantized."""
    if not model.quantized:
        raise ValueError("the model is not quantized: write it with save_pretrained")
    q, layers = model.quantized, quantized_layers(model)
    if q["bits"] == 4 and any(isinstance(layer, Linear8) for layer in layers.values()):
        raise ValueError("this model was rounded at load, with a head in 8 bits, for which 4-bit files have no place: use quantize_model, or quantize.py")
    tensors = dict(model.named_parameters())
    exact = {}
    for name, layer in layers.items():
        for buffer, tensor in layer.named_buffers():
            if buffer == "qzeros" and q["sym"]:
                tensor = tensor - 0x11111111  # of every zero: 8 becomes 7, so no digit borrows (but for those that fill up a word)
            exact[f"{name}.{buffer}"] = tensor
    config = {"bits": q["bits"], "group_size": q["group_size"], "sym": q["sym"], "octet_method": q["method"], "lm_head": q["head"]}
    more = {"quantization_config": config}
    if q["bits"] == 8:
        config |= {"quant_method": "octet"}
        more |= {"model_type": FOREIGN}
    else:
        config |= {"quant_method": "gptq", "checkpoint_format": "gptq" if q["sym"] else "gptq_v2", "desc_act": q["act_order"], "static_groups": True,
                   "true_sequential": True, "pack_dtype": "int32"} | ({"damp_percent": q["damp"]} if q["damp"] else {})  # gptqmodel refuses a 0
        if limits := unread(model):
            print(f"note: {'; '.join(limits)}", flush=True)
    write_model(directory, vars(model.config), tensors | exact, more=more, exact=exact)


def read_scheme(directory: str | Path) -> dict | None:
    """The quantization_config of a directory, checked; None where it is not quantized. ValueError for what cannot be read here."""
    q = quantization(directory)
    if not q:
        return None
    if not isinstance(q, dict) or q.get("quant_method") not in ("gptq", "octet"):
        raise ValueError(f"{directory} is quantized by {q.get('quant_method') if isinstance(q, dict) else q!r}: GPTQ's files and our own can be read here")
    q = {"group_size": -1, "sym": True, "desc_act": False, "checkpoint_format": q.get("format", "gptq"), "lm_head": False, "octet_method": "gptq", "damp_percent": 0.0} | q
    wanted = 4 if q["quant_method"] == "gptq" else 8
    if q.get("bits") != wanted:
        raise ValueError(f"{directory} has {q.get('bits')!r} bits in {'AutoGPTQ' if wanted == 4 else 'our own'} layout: of that layout, {wanted} bits can be read here")
    if type(q["group_size"]) is not int or q["group_size"] != -1 and q["group_size"] < 1:
        raise ValueError(f"{directory}/config.json has group_size {q['group_size']!r}: it must be a whole number above 0, or -1: copy it again")
    if q["checkpoint_format"] not in ("gptq", "gptq_v2"):
        raise ValueError(f"{directory} has checkpoint_format {q['checkpoint_format']!r}: gptq and gptq_v2 can be read here")
    return q


def take(tensors: dict, name: str, shape: tuple[int, ...], integer: bool, directory: Path) -> Tensor:
    """One tensor of a quantized layer, its shape and kind checked, out of the dictionary."""
    shown = hf_name(name)
    if name not in tensors:
        raise ValueError(f"{directory} lacks {shown}: the file is of another layout or was cut, copy it again")
    tensor = tensors.pop(name).read()
    if tuple(tensor.shape) != shape or tensor.is_floating_point() == integer:
        raise ValueError(f"{directory}: {shown} is {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}, by the config it should be {shape} {'whole numbers' if integer else 'floats'}")
    return tensor


def read_linear4(linear: nn.Linear, name: str, tensors: dict, q: dict, directory: Path) -> Linear4:
    """One layer of AutoGPTQ's tensors, out of the dictionary; Linear4 holds zeros as they are."""
    I, O, S = linear.in_features, linear.out_features, q["group_size"]
    G = 1 if S == -1 else -(-I // S)
    layer = Linear4(I, O, G)
    for buffer, tensor in list(layer.named_buffers()):
        setattr(layer, buffer, take(tensors, f"{name}.{buffer}", tuple(tensor.shape), buffer != "scales", directory))
    layer.g_idx = layer.g_idx.to(torch.int32)
    if layer.g_idx.min() < 0 or layer.g_idx.max() >= G:
        raise ValueError(f"{directory}: {hf_name(name)}.g_idx reaches from {layer.g_idx.min()} to {layer.g_idx.max()}, there are groups 0 to {G - 1}: copy the file again")
    if q["checkpoint_format"] == "gptq":
        layer.qzeros = layer.qzeros + 0x11111111               # (G, O/8): as gptqmodel writes them, a whole word at a time; a zero of 0 had borrowed
    bias = tensors.pop(f"{name}.bias", None)                   # AutoGPTQ writes one of zeros
    if bias is not None and bias.read().any():
        raise ValueError(f"{directory}: {hf_name(name)} has a bias, a LLaMA has none")
    return layer


@torch.no_grad()
def round_model(model: Llama, quant: str, device="cpu") -> None:
    """Quantize a model by RTN to be used at once: "8bit", or "4bit" in groups of 32. A head of its own becomes 8 bits in both."""
    quantize_model(model, Scheme("rtn", 8, -1, True) if quant == "8bit" else Scheme("rtn", 4, 32), device=device)
    if hasattr(model, "output") and not model.config.tie_embeddings:
        replace(model, ("output",), "model", Scheme("rtn", 8, -1, True), None)
        model.quantized["head"] = True


def load(directory: str | Path, dtype: torch.dtype | None = None, device="cpu", quant: str | None = None, head: bool = True) -> Llama:
    """Open a quantized directory; `dtype` is that of activations, embedding and norms (None: the file's). quant "8bit" or "4bit"
    quantizes a plain directory by RTN on the way, block by block, and must agree with a quantized one. Generate inside packed(model):
    elsewhere layers dequantize at every call, as training needs it. head=False: a reward model's trunk."""
    if quant not in (None, "8bit", "4bit"):
        raise ValueError(f"quant is {quant!r}: it can be 8bit or 4bit")
    directory, q = Path(directory), read_scheme(directory)
    if q is None:
        model = Llama.from_pretrained(directory, dtype, "cpu" if quant else device, head)
        if quant:
            round_model(model, quant, device)
            if quant == "4bit":
                print(f"note: 4 bits by RTN at load; GPTQ loses less: python quantize.py {directory} --calibration FILE --save_path OUT", flush=True)
        return model.to(device)
    if quant and int(quant[0]) != q["bits"]:
        raise ValueError(f"{directory} is quantized to {q['bits']} bits, {quant} was asked for: leave the flag out, or quantize the original again")
    fields = read_config(directory)
    config, tensors = LlamaConfig(**fields), read_tensors(directory, fields)
    with torch.device("meta"):
        model = Llama(config, head)
    for name, linear in list(model.named_modules()):
        if not isinstance(linear, nn.Linear):
            continue
        if q["bits"] == 4 and f"{name}.qweight" in tensors:
            layer = read_linear4(linear, name, tensors, q, directory)
        elif q["bits"] == 8 and f"{name}.scale" in tensors:
            layer, shape = Linear8(linear.in_features, linear.out_features), tuple(linear.weight.shape)
            layer.weight, layer.scale = take(tensors, f"{name}.weight", shape, True, directory), take(tensors, f"{name}.scale", shape[:1], False, directory)
        else:
            continue
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.to(device))
    if not quantized_layers(model):
        raise ValueError(f"{directory} says that it is quantized, but no layer is: copy it again")
    rest = {name: read for name, read in tensors.items() if head or not name.startswith(("output.", "score."))}
    fill(model, rest, dtype, device, directory)
    model.make_rope()
    model.quantized = {"method": q["octet_method"], "bits": q["bits"], "group_size": q["group_size"], "sym": bool(q["sym"]), "act_order": bool(q["desc_act"]), "clip": True,
                       "damp": q["damp_percent"], "head": bool(q["lm_head"])}
    return model


def open_model(directory: str | Path, dtype: torch.dtype | None = None, device="cpu", head: bool = True, quant: str | None = None,
               adapter: str = "auto", base: Path | None = None) -> Llama:
    """Open any directory; an adapter is merged into its base, or into `base`."""
    if not lora.is_adapter(directory):
        return load(directory, dtype, device, quant, head)
    model = load(base or lora.base_path(directory), dtype, device, quant, head)
    if not head:  # the adapter of a reward model has a score, which a trunk has not
        model.score = nn.Linear(model.config.dim, 1, bias=False, device=device)
    lora.load_adapter(model, directory)
    if not head:
        del model.score
    lora.fold(model)
    return model


# ---- command line ---------------------------------------------------------------------------------------------------

class Source(NamedTuple):
    """A directory to quantize, but for its weights."""
    path: Path
    config: LlamaConfig
    tokenizer: Tokenizer
    named: str | None  # the prompt template, as the directory says
    template: str      # and the one that is used
    is_demo: bool      # a model of the demo world
    is_chain: bool     # the step of the chain that no flag names


def read_rows(path: Path, tokenizer: Tokenizer, template: str, length: int, most: int | None, skip_bad: bool) -> tuple[list[Row], str]:
    """Texts to calibrate on or to measure with, and in words how they were cut. Records (.json, .jsonl, either gzipped) are put
    into the prompt template, and answers alone are predicted; any other file is one text, cut into windows."""
    if path.name.endswith((".json", ".jsonl", ".json.gz", ".jsonl.gz")):
        records = read_records([path], "sft", skip_bad, most)
        encode = functools.partial(text.encode_example, tokenizer=tokenizer, template=text.TEMPLATES[template], max_len=length)
        rows = [Row(*example) for example in text.encode_all(records, encode, "examples")[0]]
        return rows, f"{len(rows)} records in template {template}, cut at {length} ids, only answers predicted"
    if not path.is_file():
        raise FileNotFoundError(f"{path} {'is no file' if path.exists() else 'does not exist'}: name a text file, or records as .json or .jsonl")
    try:
        content = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}), nor named .json or .jsonl: name a text file") from None
    ids = tokenizer.encode(content, bos=False)
    rows = windows(ids, length, tokenizer.bos_id, most)
    if not rows:
        raise ValueError(f"{path} is too short: it has {len(ids)} ids, one window takes {length - 1}; name a longer text or lower --max_len")
    return rows, f"{len(rows)} windows of {length - 1} ids on end, BOS before each, the last partial one dropped, every id but BOS predicted"


def read_texts(args: argparse.Namespace, source: Source, length: int) -> tuple[list[Row], str]:
    """What to measure perplexity on, and how it was cut: --text, for the demo's models records of its generator, or nothing."""
    if args.text is not None:
        return read_rows(args.text, source.tokenizer, source.template, length, None, args.skip_bad_records)
    if not source.is_demo:
        return [], ""
    examples = (text.encode_example(normalise(record, "sft"), source.tokenizer, text.TEMPLATES[source.template], length) for record in demo.instruction_records(1, 200))
    texts = [Row(*example) for example in examples if example]
    return texts, f"{len(texts)} records that the generator wrote for this, only answers predicted"


def read_calibration(args: argparse.Namespace, source: Source, length: int) -> tuple[list[Row], str]:
    """GPTQ's text, and how it was cut. ValueError where it is too short for an undamped Hessian to have an inverse."""
    config = source.config
    rows, cut = read_rows(args.calibration, source.tokenizer, source.template, length, args.max_datasets_size, args.skip_bad_records)
    inputs, widest = sum(len(row.ids) for row in rows), max(config.ffn_dim, config.dim, config.n_heads * config.head_dim)
    if inputs < widest and args.damp == 0:
        raise ValueError(f"{args.calibration} gives {inputs} inputs, which cannot span the {widest} dimensions of the widest layer: calibrate on more text, or with --damp 0.01")
    if inputs < widest:
        print(f"note: {inputs} inputs to calibrate on, the widest layer has {widest} dimensions: more text would do better")
    return rows, cut


def print_table(table: list[tuple]) -> None:
    print(f"{'method':50} {'bits a weight':>13} {'MB in all':>9} {'perplexity':>10} {'tokens/s':>8}")
    for what, bits, size, value, speed in table:
        print(f"{what:50} {bits:13.2f} {size / 1e6:9.1f} {'-' if value is None else f'{value:.4f}':>10} {'-' if speed is None else f'{speed:.1f}':>8}")


def stored_bytes(model: Llama) -> int:
    """Of a model's weights in its directory."""
    return sum(p.numel() for p in model.parameters()) * DTYPES[model.config.dtype].itemsize + sum(b.nbytes for m in quantized_layers(model).values() for b in m.buffers())


def bits_a_weight(model: Llama) -> float:
    """Of the quantized layers, grids and all; of a plain model, its dtype's."""
    layers = quantized_layers(model).values()
    return 8 * sum(b.nbytes for m in layers for b in m.buffers()) / sum(m.in_features * m.out_features for m in layers) if layers else 8.0 * DTYPES[model.config.dtype].itemsize


def tokens_per_second(model: Llama, device, new: int = 32) -> float | None:
    """Of one row, decoding, without the prefill. None where it does not fit the device."""
    try:
        model.to(device)
        prompt = [list(range(3, 11))]

        def seconds(tokens: int) -> float:
            started = time.perf_counter()
            model.generate(prompt, tokens, temperature=0, eos_id=-1)
            return time.perf_counter() - started
        with packed(model):
            seconds(4)  # warms up
            return new / max(min(seconds(new + 1) for _ in range(3)) - min(seconds(1) for _ in range(3)), 1e-9)
    except torch.OutOfMemoryError:
        return None


def benchmark(name: str, batch: int, device, steps: int = 16) -> list[dict]:
    """Decoding tokens a second of a shape with random weights, in bf16 and in 8 and 4 bits (head too): a step of each in turn, so
    that what else the machine does meets all alike; medians."""
    schemes = {"bf16": None, "8 bits": Scheme("rtn", 8, -1, True, clip=False, head=True), "4 bits, groups of 128": Scheme("rtn", clip=False, head=True)}
    runs, seconds, stack = {}, {kind: [] for kind in schemes}, ExitStack()
    for kind, scheme in schemes.items():
        model = random_model(SHAPES[name], torch.bfloat16, device).eval()
        if scheme:
            quantize_model(model, scheme, device=device)
        stack.enter_context(packed(model))
        runs[kind] = model.generate_steps([list(range(3, 11))] * batch, steps + 4, temperature=0, eos_id=-1)
        for _ in range(3):  # the prefill, and steps that warm up
            next(runs[kind])
    for _ in range(steps):
        for kind, steps_of in runs.items():
            started = time.perf_counter()
            next(steps_of)
            seconds[kind].append(time.perf_counter() - started)
    median = {kind: statistics.median(taken) for kind, taken in seconds.items()}
    rows = [{"shape": name, "batch": batch, "weights": kind, "tokens_per_second": batch / taken, "ratio": median["bf16"] / taken} for kind, taken in median.items()]
    for row in rows:
        print(f"{name}, batch {batch}, {row['weights']:22} {row['tokens_per_second']:8.1f} tokens/s, {row['ratio']:.2f} x bf16", flush=True)
    return rows


def group_size(text: str) -> int:
    try:
        check_grid(4, int(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of columns, give a whole number above 0, or -1 for whole rows") from None
    return int(text)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = run.Parser("Quantize a LLaMA to 4 bits by GPTQ, or to 8 or 4 by rounding to nearest, and print what it cost. Without flags, the demo: reads out/ppo, writes out/ppo-int4.")
    # input and output
    parser.add_argument("directory", type=Path, nargs="?", metavar="DIR", help="weights directory to quantize, Hugging Face or Meta layout (out/ppo)")
    parser.add_argument("--pretrain", type=Path, help="the same as DIR")
    parser.add_argument("--save_path", type=Path, help="directory to write; without it the table is all there is (the demo: out/ppo-int4)")
    parser.add_argument("--eval", action="store_true", help="change nothing, print the perplexity of DIR, quantized or not, on --text")
    parser.add_argument("--benchmark", choices=list(SHAPES), metavar="SHAPE", help=f"quantize nothing, time decoding of random weights in bf16, 8 and 4 bits: {' '.join(SHAPES)}")
    parser.add_argument("--batch", type=run.whole(1), nargs="+", default=[1, 16], help="benchmark: rows decoded at once")
    # how
    parser.add_argument("--bits", type=int, choices=[4, 8], help="4 in groups, or 8 with one scale a row (4)")
    parser.add_argument("--method", choices=["gptq", "rtn"], help="gptq needs --calibration (4 bits: gptq, 8 bits: rtn)")
    parser.add_argument("--group_size", type=group_size, help="columns that share a scale; -1 for whole rows (128, the demo: 32)")
    parser.add_argument("--sym", action="store_true", help="zero is the middle code of every grid: AutoGPTQ's first format, which more programs read, at some loss")
    parser.add_argument("--act_order", action="store_true", help="gptq: take columns by falling activation; on anyway without --file_order")
    parser.add_argument("--file_order", action="store_true", help="gptq: take columns as they come")
    parser.add_argument("--no_clip", action="store_true", help="let every grid span all weights of its group, instead of the best of 17 shrunk ones")
    parser.add_argument("--damp", type=run.number(), default=0.01, help="gptq: added to H's diagonal, as a share of its mean")
    parser.add_argument("--head", action="store_true", help="quantize the output head too (not where it is tied to the embedding)")
    # text
    parser.add_argument("--calibration", type=Path, help="gptq: text file, or instruction records as .json or .jsonl, like what the model will see")
    parser.add_argument("--text", type=Path, help="to measure perplexity on, of either kind; not the calibration text")
    parser.add_argument("--max_len", type=run.whole(2), default=256, help="ids of a window or a record, BOS included")
    parser.add_argument("--max_datasets_size", type=run.whole(1), default=128, help="windows or records to calibrate on")
    parser.add_argument("--skip_bad_records", action="store_true", help="count and skip broken records instead of stopping")
    # run
    parser.add_argument("--dtype", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="to compute in; sums and grids are fp32 (auto: bf16 on CUDA, fp32 elsewhere)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="auto: cuda where there is one, else cpu; one block at a time is on it")
    args = parser.parse_args(argv)
    if args.directory and args.pretrain and args.directory != args.pretrain:
        raise ValueError(f"DIR {args.directory} and --pretrain {args.pretrain} are two models: name one")
    args.pretrain = args.directory or args.pretrain
    if args.eval and (named := [flag for flag in ("save_path", "bits", "method", "group_size", "calibration") if getattr(args, flag) is not None]):
        raise ValueError(f"--eval changes nothing, so --{named[0]} has no meaning with it: how a directory is quantized stands in its config.json")
    if args.act_order and args.file_order:
        raise ValueError("--act_order and --file_order are opposites: give one")
    return args


def resolve(args: argparse.Namespace, is_demo: bool) -> Scheme:
    """Fill in the flags left open, and refuse those that contradict one another."""
    bits = args.bits or 4
    if bits == 8 and args.group_size not in (None, -1):
        raise ValueError(f"8 bits have one scale a row, --group_size {args.group_size} is for 4 bits: leave it out")
    run.resolve(args, {"bits": 4, "method": "gptq" if bits == 4 else "rtn", "group_size": -1 if bits == 8 else 32 if is_demo else 128})
    if is_demo:
        run.resolve(args, {"calibration": demo.FOLDER / "sft.jsonl.gz"})
    if args.method == "gptq" and args.calibration is None:
        raise ValueError("--method gptq needs --calibration: name a text file, or instruction records, like what the model will see (or --method rtn, which needs none)")
    if args.method == "rtn" and (args.file_order or args.act_order):
        raise ValueError("the order of columns means nothing to --method rtn: leave the flag out, or use gptq")
    return Scheme(args.method, args.bits, args.group_size, args.sym or args.bits == 8, not args.file_order, not args.no_clip, args.damp, args.head)


def open_source(args: argparse.Namespace) -> Source:
    path = run.finished(Path("out/ppo"), "ppo", "--pretrain") if args.pretrain is None else args.pretrain
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a directory: name a weights directory")
    named, config, tokenizer = read_template(path), LlamaConfig(**read_config(path)), Tokenizer(path)
    check_tokenizer(tokenizer, config.vocab_size)
    source = Source(path, config, tokenizer, named, named if named in text.TEMPLATES else "alpaca", demo.is_demo(path), args.pretrain is None)
    args.pretrain = path
    return source


def compare(args: argparse.Namespace, source: Source, scheme: Scheme, texts: list[Row], rows: list[Row], dtype: torch.dtype | None, device) -> tuple[list[tuple], dict]:
    """Quantize, write, and measure before and after and what rounding alone would have given: the table, and summary.json's figures."""
    open_plain = lambda: Llama.from_pretrained(source.path, dtype).eval()
    table, figures = [], {}

    def measure(when: str, model: Llama, name: str) -> None:
        figures[f"bytes_{when}"], figures[f"perplexity_{when}"] = stored_bytes(model), perplexity(model, texts, device) if texts else None
        if source.is_chain:
            figures[f"gold_{when}"] = demo.measure(model.to(device), source.tokenizer, text.TEMPLATES[source.template])["gold"]
        bits = bits_a_weight(model)
        table.append((name, bits, figures[f"bytes_{when}"], figures[f"perplexity_{when}"], tokens_per_second(model, device)))

    # ---- before ----
    model = open_plain()
    measure("before", model, str(DTYPES[source.config.dtype]).removeprefix("torch."))
    del model

    # ---- quantize and save ----
    model, began = open_plain(), time.perf_counter()

    def progress(i: int, report: list[dict]) -> None:
        left = (time.perf_counter() - began) / (i + 1) * (source.config.n_layers - i - 1)
        errors = " ".join(f"{e['layer'].rpartition('.')[2]} {100 * e['rtn']:.3f}>{100 * e['gptq']:.3f}" for e in report if "gptq" in e)
        print(f"block {i + 1}/{source.config.n_layers} | {f'error in % of the output, RTN > GPTQ: {errors} | ' if errors else ''}{left:.0f} s left", flush=True)
    figures["layers"] = quantize_model(model, scheme, rows, device, progress)
    figures["quantize_seconds"] = time.perf_counter() - began
    if args.save_path:
        save(model, args.save_path)
        source.tokenizer.save(args.save_path, source.named)
    name = f"{scheme.method} {scheme.bits} bits" + (f", groups of {scheme.group_size}" if scheme.group_size != -1 else "") + (", symmetric" if scheme.sym else "")
    measure("after", model, name)
    figures["tokens_per_second"] = table[-1][-1]
    del model

    # ---- what rounding alone would have given ----
    figures["perplexity_rtn"] = figures["perplexity_after"] if args.method == "rtn" and args.no_clip else None
    if texts and figures["perplexity_rtn"] is None:
        model = open_plain()
        quantize_model(model, scheme._replace(method="rtn", clip=False), device=device)
        figures["perplexity_rtn"] = perplexity(model, texts, device)
        _, bits, size, _, speed = table[-1]
        table.insert(1, ("rtn" + name[len(scheme.method):] + ", no clipping", bits, size, figures["perplexity_rtn"], speed))
    return table, figures


def main(argv: list[str] | None = None) -> dict:
    started = time.perf_counter()
    args = parse(argv)
    world = run.start(args.device, "naive")
    dtype, device = run.choose_dtype(args.dtype, world.device), world.device
    if args.benchmark:
        with torch.inference_mode():
            return {"benchmark": [row for batch in args.batch for row in benchmark(args.benchmark, batch, device)], "seconds": time.perf_counter() - started}
    source = open_source(args)
    length = min(args.max_len, source.config.max_seq_len)
    texts, cut = read_texts(args, source, length)
    if args.eval:
        if not texts:
            raise ValueError("--eval needs --text: name a text file, or instruction records")
        value = perplexity(load(source.path, dtype), texts, device)
        print(f"{source.path}: perplexity {value:.4f} on {cut}")
        return {"perplexity": value, "windows": len(texts), "seconds": time.perf_counter() - started}
    if found := read_scheme(source.path):
        raise ValueError(f"{source.path} is already quantized to {found['bits']} bits: quantize the original, a second rounding would only lose more (--eval measures this one)")
    scheme = resolve(args, source.is_demo)
    if scheme.head and source.config.tie_embeddings:
        raise ValueError("--head: this model's head is its embedding, which is read row by row and stays as it is; leave the flag out")
    if source.is_chain and args.save_path is None:
        args.save_path = Path(f"out/ppo-int{scheme.bits}")
    if args.save_path:
        run.check_save_path(args.save_path, [args.pretrain])
    rows, calibrated = read_calibration(args, source, length) if scheme.method == "gptq" else ([], "")
    run.say_flags(world, args)
    if calibrated:
        print(f"calibration: {calibrated.rpartition(',')[0]}")
    table, figures = compare(args, source, scheme, texts, rows, dtype, device)
    print_table(table)
    if texts:
        print(f"perplexity: {cut}")
    if "gold_after" in figures:
        print(f"gold score on held-out instructions: {figures['gold_before']:.3f} before, {figures['gold_after']:.3f} after")
    figures |= {"seconds": time.perf_counter() - started}
    if args.save_path:
        figures = run.write_summary(args, world, figures)
        print(f"wrote {args.save_path} in {figures['seconds']:.0f} s, {figures['quantize_seconds']:.0f} of them quantizing")
    return figures


if __name__ == "__main__":
    run.command(main)
