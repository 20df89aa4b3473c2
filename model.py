"""LLaMA in one file: config, transformer, KV cache, sampling, generation.

Touvron et al. 2023, "LLaMA: Open and Efficient Foundation Language Models" (arXiv 2302.13971). What makes it a LLaMA:
RMSNorm before each half of a block (Zhang & Sennrich 2019), rotary positions (Su et al. 2021), SwiGLU (Shazeer 2020),
grouped-query attention (Ainslie et al. 2023), no biases.

    python model.py DIR "Once upon a time" [--max_new_tokens 200 --temperature 0]     prints prompts and their continuations
    python model.py out/ppo --chat "Write a story about a fox and a kite."             answers by the directory's prompt template
    python model.py DIR|SHAPE --benchmark [--batch 1 16 --dtype bf16 --compile]        tokens/s and the memory bandwidth in use
    python model.py convert IN OUT                                                     Meta's layout to Hugging Face's, or back

Names are those of Meta's own files (wq, w1, tok_embeddings, ...), so a checkpoint maps name by name. The one trap is rotary
embedding: Meta's files rotate neighbouring pairs (0,1) (2,3) ..., Hugging Face's rotate the two halves (0,D/2) (1,D/2+1) ...
Inside we are Hugging Face's half-rotation, and the rows of wq and wk are permuted where Meta files are read, nowhere else:

    row of one head in Meta's file   0  1  2  3  4  5  6  7        (D = 8; pairs are neighbours)
    row inside                       0  2  4  6  1  3  5  7        (pairs are D/2 = 4 apart)

Letters on reshaping lines: B batch, T time (tokens of this call), S slots of the cache, C channels (dim), H query heads,
K key/value heads, G = H / K query heads that share one of them, D head dim, V vocabulary.
"""

import itertools
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data.run import Parser, command
from data.text import TEMPLATES, Tokenizer, check_tokenizer, encode_prompt, read_template
from data.weights import DTYPES, check_config, fill, quantization, read_config, read_tensors, write_file, write_model


@dataclass
class LlamaConfig:
    dim: int = 256              # C, width of the residual stream
    n_layers: int = 6
    n_heads: int = 8            # H
    n_kv_heads: int = 8         # K; fewer than H is grouped-query attention
    head_dim: int = 32          # D; H * D need not be C
    ffn_dim: int = 704          # width inside the feed-forward
    vocab_size: int = 2048      # V, rows of the embedding; may exceed the tokenizer's size (padded embeddings)
    max_seq_len: int = 512
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_factor: float = 1.0    # positions are divided by it (linear interpolation, Chen et al. 2023)
    tie_embeddings: bool = False
    dtype: str = "float32"      # of the file that was read, and so of the file that will be written
    bos_id: int | None = 1
    eos_id: int | None = 2
    extra: dict = field(default_factory=dict)  # further keys for config.json, such as a reward model's "reward_mean"

    def __post_init__(self):
        vars(self).update(check_config(dict(vars(self))))


def shape(dim: int, n_layers: int, n_heads: int, n_kv_heads: int, ffn_dim: int, vocab_size: int = 32000, context: int = 2048) -> LlamaConfig:
    return LlamaConfig(dim, n_layers, n_heads, n_kv_heads, dim // n_heads, ffn_dim, vocab_size, context)


# To measure with, and LLaMA's own (Touvron et al. 2023, table 2). big is TinyLlama-1.1B.
SHAPES = {"tiny": shape(256, 6, 8, 4, 704, 2048), "small": shape(512, 8, 8, 8, 1376), "mid": shape(768, 12, 12, 12, 2048),
          "big": shape(2048, 22, 32, 4, 5632), "7B": shape(4096, 32, 32, 32, 11008), "13B": shape(5120, 40, 40, 40, 13824),
          "33B": shape(6656, 60, 52, 52, 17920), "65B": shape(8192, 80, 64, 64, 22016), "70B": shape(8192, 80, 64, 8, 28672, 32000, 4096)}


# ---- transformer ----------------------------------------------------------------------------------------------------

class Linear(nn.Linear):
    """nn.Linear without a bias, quick in bf16 on a processor that cannot multiply bf16 as well."""

    def __init__(self, fan_in: int, fan_out: int):
        super().__init__(fan_in, fan_out, bias=False)
        self.cpu_has_bf16 = cpu_has_bf16()

    def forward(self, x: Tensor) -> Tensor:
        if self.cpu_has_bf16 or x.dtype != torch.bfloat16 or x.device.type != "cpu":
            return F.linear(x, self.weight)
        return WideLinear.apply(x, self.weight) if torch.is_grad_enabled() else wide_linear(x, self.weight)


def cpu_has_bf16() -> bool:
    """False on an x86 processor without instructions for bf16 products: there PyTorch's take 4 times as long as those in fp32."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True  # not known to be slow
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def wide_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T of bf16 tensors in fp32, some rows of W at a time: as many as stay in the processor's cache (2^18 are 1 MB)."""
    if x.numel() <= 2 * x.shape[-1]:  # one or two rows wait for memory, and W is half as long in bf16
        return F.linear(x, weight)
    x32 = x.float()
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    rows = max(16, 2**18 // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        y[..., start:start + rows] = F.linear(x32, weight[start:start + rows].float())
    return y


class WideLinear(torch.autograd.Function):
    """x W^T of bf16 tensors, multiplied in fp32 and rounded once: what bf16 hardware does too. Only bf16 is kept for backward."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.float(), weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dy = dy.float()
        dx = (dy @ weight.float()).to(x.dtype) if ctx.needs_input_grad[0] else None
        dw = (dy.flatten(0, -2).T @ x.flatten(0, -2).float()).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return dx, dw


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension; the mean in fp32 whatever the dtype of x."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # the compiler fuses the formula by itself, and derives it
            return rms_norm(x, self.weight, self.eps)
        return RMSNormFunction.apply(x, self.weight, self.eps) if torch.is_grad_enabled() else normalize(x, self.weight, self.eps)[0]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The formula. `normalize` computes the same in place where it can."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def normalize(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """rms_norm(x), and r = 1 / sqrt(mean(x^2) + eps) of each row (..., 1). The norm takes one pass over x, mean(x^2) two;
    addcmul is norm * norm / C + eps in one call, and calls are what one token costs in a small model."""
    x32 = x.float()
    norm = torch.linalg.vector_norm(x32, dim=-1, keepdim=True)
    r = torch.full_like(norm, eps).addcmul_(norm, norm, value=1 / x.shape[-1]).rsqrt_()
    return (x32 * r).to(x.dtype).mul_(weight), r


class RMSNormFunction(torch.autograd.Function):
    """rms_norm with its gradient by hand, which takes half the passes over memory that autograd's takes, and keeps x alone.

    With r = 1/sqrt(mean(x^2) + eps) and n = x r:   dx = r (w dy - n mean(w dy n)),   dw = sum over rows of dy n
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, r = normalize(x, weight, eps)
        ctx.save_for_backward(x, weight, r)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, r = ctx.saved_tensors
        n = x.float() * r
        dy_n = (dy * n).view(-1, x.shape[-1])                                # (rows, C), fp32
        dw = dy_n.sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        mean = torch.mv(dy_n, weight.float()).view_as(r) / x.shape[-1]       # of w dy n
        dx = (dy * weight).float().addcmul_(n, mean, value=-1).mul_(r)
        return dx.to(x.dtype), dw, None


def rope_table(config: LlamaConfig, device=None) -> tuple[Tensor, Tensor]:
    """cos and sin of position / rope_factor * theta^(-2i/D), each (max_seq_len, D), laid out as `rotate` takes them.

    The operations come in transformers' order: at position 100,000 another rounding is another angle in the third decimal.
    """
    i = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32)
    frequency = 1.0 / config.rope_theta ** (i / config.head_dim) / config.rope_factor  # (D/2,)
    position = torch.arange(config.max_seq_len, device=device, dtype=torch.float32)
    angle = torch.outer(position, frequency)  # (max_seq_len, D/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (a, b) = (x[i], x[i + D/2]) by its angle: (a, b) cos + (b, a) (-sin, sin), in three passes.
    x (..., T, D); cos and sin broadcast to it, sin negative in its first half."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class Packed(nn.Module):
    """One or several Linears, one below the other, in the order of bytes that oneDNN's kernels for few rows read fastest.
    `multiply` is their kernel; the weight can no longer be trained or saved."""

    def __init__(self, linears: list[Linear]):
        super().__init__()
        weight = torch.cat([linear.weight.detach() for linear in linears])
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, 16)  # 16 rows: as fast for one row as a layout for one

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")


@contextmanager
def quick(model: nn.Module) -> Iterator[None]:
    """Inside, layers that have a faster form for few rows (quantized ones that no fuse has replaced) work in it too, for which they
    hold their weights twice."""
    layers = [module for module in model.modules() if hasattr(module, "quicken")]
    try:
        for layer in layers:
            layer.quicken(True)
        yield
    finally:
        for layer in layers:
            layer.quicken(False)


def joined(linears: list[nn.Module], rows: int) -> nn.Module | None:
    """One layer that does the work of several with the same input, for batches of `rows` rows; None where there is none."""
    if any(type(linear) is not Linear for linear in linears):  # an adapter, or quantized: those know by themselves how
        join = getattr(linears[0], "join", None)
        return join(linears, rows) if join and all(type(linear) is type(linears[0]) for linear in linears) else None
    weight = linears[0].weight
    if weight.dtype == torch.float32:
        pays = rows > 1  # for one row PyTorch's own kernel reads as fast
    else:
        pays = weight.dtype == torch.bfloat16 and (rows <= 2 or linears[0].cpu_has_bf16)
    large = sum(linear.weight.nbytes for linear in linears) >= 2**21  # a call of oneDNN's kernel costs 25 us
    if pays and large and weight.device.type == "cpu" and torch.backends.mkldnn.is_available():
        return Packed(linears)
    if len(linears) == 1:
        return linears[0]
    with torch.device("meta"):
        one = Linear(weight.shape[1], sum(linear.out_features for linear in linears))
    one.weight = nn.Parameter(torch.cat([linear.weight.detach() for linear in linears]), requires_grad=False)
    return one


class KVCache:
    """Keys and values of all layers, preallocated; row b of the batch owns slots 0 .. S-1 of row b.

    A token at position p of its row lies in slot p, so rows of different length need no padding on the left: a row's own
    length is all there is to know, and what lies beyond it (padding of the prefill) is overwritten before it is visible.
    Of each layer one tensor, (B, 2K, S, D): the K key heads, then the K value heads, so that one copy stores both.
    """

    def __init__(self, config: LlamaConfig, batch: int, slots: int, dtype: torch.dtype, device, lazy: bool = False):
        """lazy: on a CPU, take memory only as slots are written to for the first time."""
        if dtype == torch.bfloat16 and torch.device(device).type == "cpu" and not cpu_has_bf16():
            dtype = torch.float32  # there attention over bf16 takes 4 times as long
        shape = (batch, 2 * config.n_kv_heads, slots, config.head_dim)
        self.kv = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]
        self.dtype = dtype

    def place(self, position: Tensor, rows: Tensor | None = None) -> Tensor:
        """Where the tokens at position (B, T) go, in a layer seen as (B*2K*S, D): index (B*2K*T,). `rows` (B,) says which
        rows of the cache they belong to, several times the same one if need be; None is all of them in order."""
        B, heads, S, _ = self.kv[0].shape
        first = torch.arange(0, B * heads * S, S, device=position.device).view(B, heads, 1)  # slot 0 of each head
        first = first if rows is None else first[rows]
        return (first + position.clamp(max=S - 1)[:, None]).flatten()  # padding and ended rows may stand beyond the last slot

    def write(self, layer: int, kv: Tensor, place: Tensor, slots: int) -> tuple[Tensor, Tensor]:
        """Store kv (B, 2K, T, D) at `place`; return keys and values in the first `slots` slots, (B, K, slots, D) each."""
        D, all_heads = kv.shape[-1], self.kv[layer]
        kv = kv if kv.dtype == self.dtype else kv.to(self.dtype)
        all_heads.view(-1, D).index_copy_(0, place, kv.reshape(-1, D))  # (B*2K*S, D) <- (B*2K*T, D)
        return all_heads.narrow(2, 0, slots).chunk(2, dim=1)

    def keep(self, rows: Tensor) -> None:
        """Drop all rows of the batch but these, layer by layer: never a second copy of the whole."""
        for layer, kv in enumerate(self.kv):
            self.kv[layer] = kv[rows]


class Piece(NamedTuple):
    """Of the tokens in a `decode` of several lengths: those that belong to neighbouring rows of the cache, equally many to each."""
    tokens: slice            # of the step's tokens, row after row
    rows: slice              # of the cache
    slots: int               # how many slots of these rows are looked at
    allowed: Tensor | None   # True where a query may see a key, (rows, 1, G * T, slots) or broadcast to it; None is everywhere


@dataclass
class Where:
    """Where the tokens of one forward pass stand: their angles, what each may look at, and the cache they go into."""
    cos: Tensor              # (1 or B, 1, T, D); to decode (B, H+2K, D)
    sin: Tensor
    allowed: Tensor | None   # True where a query may see a key, (B, 1, T, keys); None is plain causal, or all for one token
    cache: KVCache | None = None
    place: Tensor | None = None     # (B*2K*T,), with a cache
    slots: int = 0                  # slots of the cache that hold something after this call
    pieces: list[Piece] | None = None


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.layer, self.n_heads, self.n_kv_heads, self.head_dim = layer, config.n_heads, config.n_kv_heads, config.head_dim
        self.wq = Linear(config.dim, config.n_heads * config.head_dim)
        self.wk = Linear(config.dim, config.n_kv_heads * config.head_dim)
        self.wv = Linear(config.dim, config.n_kv_heads * config.head_dim)
        self.wo = Linear(config.n_heads * config.head_dim, config.dim)
        self.wqkv: nn.Module | None = None  # the first three in one, after Llama.fuse

    def fuse(self, rows: int) -> None:
        if (wqkv := joined([self.wq, self.wk, self.wv], rows)) is not None:
            self.wqkv, self.wq, self.wk, self.wv = wqkv, None, None, None
        else:
            self.wq, self.wk, self.wv = (joined([linear], rows) or linear for linear in (self.wq, self.wk, self.wv))
        self.wo = joined([self.wo], rows) or self.wo

    def forward(self, x: Tensor, where: Where) -> Tensor:
        B, T, _ = x.shape
        H, K, D = self.n_heads, self.n_kv_heads, self.head_dim
        if self.wqkv is None:
            q, k, v = self.wq(x), self.wk(x), self.wv(x)
        else:
            q, k, v = self.wqkv(x).split((H * D, K * D, K * D), dim=-1)
        q = rotate(q.view(B, T, H, D).transpose(1, 2), where.cos, where.sin)  # (B, H, T, D)
        k = rotate(k.view(B, T, K, D).transpose(1, 2), where.cos, where.sin)  # (B, K, T, D)
        v = v.view(B, T, K, D).transpose(1, 2)                                # (B, K, T, D)
        if where.cache is not None:
            k, v = where.cache.write(self.layer, torch.cat((k, v), dim=1), where.place, where.slots)  # (B, K, S, D)
        y = F.scaled_dot_product_attention(q.to(k.dtype), k, v, attn_mask=where.allowed, is_causal=where.allowed is None,
                                           enable_gqa=H != K).to(x.dtype)     # (B, H, T, D)
        return self.wo(y.transpose(1, 2).reshape(B, T, H * D))                # (B, T, C)

    def decode(self, x: Tensor, where: Where) -> Tensor:
        """forward for one token a row, x (B, C), in few calls: here they take longer than the arithmetic. All heads are
        rotated together, those of v by 0; the G heads that share a key head stand as G queries of it."""
        B, H, K, D = x.shape[0], self.n_heads, self.n_kv_heads, self.head_dim
        qkv = self.wqkv.forward(x) if self.wqkv is not None else torch.cat((self.wq(x), self.wk(x), self.wv(x)), dim=-1)
        q, kv = rotate(qkv.view(B, H + 2 * K, D), where.cos, where.sin).split((H, 2 * K), dim=1)
        k, v = where.cache.write(self.layer, kv, where.place, where.slots)                 # (B, K, S, D)
        if where.pieces is not None:
            y = [self.look(q[piece.tokens], k, v, piece) for piece in where.pieces]
            return self.wo.forward((torch.cat(y) if len(y) > 1 else y[0]).to(x.dtype))     # (B, C)
        q = q.view(B, K, H // K, D)                                                        # (B, K, G, D)
        y = F.scaled_dot_product_attention(q if q.dtype == k.dtype else q.to(k.dtype), k, v, attn_mask=where.allowed)
        return self.wo.forward(y.reshape(B, H * D).to(x.dtype))                            # (B, C)

    def look(self, q: Tensor, k: Tensor, v: Tensor, piece: Piece) -> Tensor:
        """Attention of one piece's queries (R*T, H, D), T of them to each of its R rows -> (R*T, H*D). Queries of the heads
        that share a key head stand below each other, head after head."""
        H, K, D = self.n_heads, self.n_kv_heads, self.head_dim
        k, v = k[piece.rows, :, :piece.slots], v[piece.rows, :, :piece.slots]             # (R, K, S, D)
        R, T = k.shape[0], q.shape[0] // k.shape[0]
        q = q.view(R, T, K, H // K, D).permute(0, 2, 3, 1, 4).reshape(R, K, -1, D)         # (R, K, G*T, D)
        y = F.scaled_dot_product_attention(q if q.dtype == k.dtype else q.to(k.dtype), k, v, attn_mask=piece.allowed)
        return y.view(R, K, H // K, T, D).permute(0, 3, 1, 2, 4).reshape(R * T, H * D)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.w1 = Linear(config.dim, config.ffn_dim)
        self.w2 = Linear(config.ffn_dim, config.dim)
        self.w3 = Linear(config.dim, config.ffn_dim)
        self.w13: nn.Module | None = None  # w1 and w3 in one, after Llama.fuse

    def fuse(self, rows: int) -> None:
        if (w13 := joined([self.w1, self.w3], rows)) is not None:
            self.w13, self.w1, self.w3 = w13, None, None
        else:
            self.w1, self.w3 = (joined([linear], rows) or linear for linear in (self.w1, self.w3))
        self.w2 = joined([self.w2], rows) or self.w2

    def forward(self, x: Tensor) -> Tensor:
        if self.w13 is None:
            gate, up = self.w1(x), self.w3(x)
            kept = torch.is_grad_enabled() and not torch.compiler.is_compiling()
            return self.w2(SwiGLUFunction.apply(gate, up) if kept else F.silu(gate) * up)
        gate, up = self.w13.forward(x).chunk(2, dim=-1)
        return self.w2.forward(F.silu(gate).mul_(up))


class SwiGLUFunction(torch.autograd.Function):
    """silu(gate) * up. Keeps these two for backward and computes silu again; autograd keeps silu(gate) too, a fifth of what a
    block's activations take."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(dy * up, gate), F.silu(gate).mul_(dy)


class Block(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, layer)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, where: Where) -> Tensor:
        x = x + self.attention(self.attention_norm(x), where)
        return x + self.feed_forward(self.ffn_norm(x))

    def decode(self, x: Tensor, where: Where) -> Tensor:
        """forward for one token a row, x (B, C)."""
        x = x + self.attention.decode(self.attention_norm.forward(x), where)
        return x + self.feed_forward.forward(self.ffn_norm.forward(x))


class Llama(nn.Module):
    """The transformer. `Llama(config)` has random weights; with head=False it ends at the final norm (a reward model's trunk)."""

    def __init__(self, config: LlamaConfig, head: bool = True, generator: torch.Generator | None = None):
        super().__init__()
        self.config = config
        self.fused = self.graphs = False
        self.quantized: dict | None = None  # how, where quantize.py has put its layers in
        self.grad_checkpoint = False  # recompute each block in backward instead of keeping its activations
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = Linear(config.dim, config.vocab_size) if head else None
        if head and config.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight
        if self.tok_embeddings.weight.device.type != "meta":
            self.init_weights(generator)
            self.make_rope()

    def make_rope(self) -> None:
        cos, sin = rope_table(self.config, self.tok_embeddings.weight.device)
        self.register_buffer("cos", cos, persistent=False)  # (max_seq_len, D), fp32: bf16 cannot tell position 257 from 258
        self.register_buffer("sin", sin, persistent=False)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """N(0, 1/dim), and 1/sqrt(2L) of that deviation for the two matrices of a block (wo, w2) that write to the residual
        stream, whose variance would otherwise grow with the 2L additions (GPT-2). GPT-2's constant 0.02 is right for a
        width of 2500; the demo's 192 learns three times slower with it."""
        for name, p in self.named_parameters():
            if p.dim() == 1:
                nn.init.ones_(p)
            else:
                into_residual = name.endswith(("attention.wo.weight", "feed_forward.w2.weight"))
                std = (self.config.dim * (2 * self.config.n_layers if into_residual else 1)) ** -0.5
                nn.init.normal_(p, std=std, generator=generator)

    def fuse(self, rows: int = 1) -> "Llama":
        """Rearrange the weights for generation with batches of about `rows` rows: fewer and larger products, on a CPU in the
        layout that its kernels like. Block by block, so that no second copy of the model exists. Returns the model, which
        can no longer be trained or saved."""
        for layer in self.layers:
            layer.attention.fuse(rows)
            layer.feed_forward.fuse(rows)
        if self.output is not None and not self.config.tie_embeddings:  # a tied head stays one with the embedding
            self.output = joined([self.output], rows) or self.output
        self.fused = True
        return self

    def compile_decode(self) -> None:
        """torch.compile the step of one token. On CUDA as a graph, which needs the same shapes and addresses at every step:
        there each step looks at all slots of the cache, and a mask hides those that are empty."""
        self.graphs = self.device.type == "cuda"
        self.decode = torch.compile(self.decode, dynamic=not self.graphs, mode="reduce-overhead" if self.graphs else None)

    @property
    def device(self) -> torch.device:
        return self.tok_embeddings.weight.device

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """tokens (B, T) ids, mask (B, T) True where real (padding on either side) -> logits (B, T, V)."""
        return self.output(self.hidden(tokens, mask))

    def hidden(self, tokens: Tensor, mask: Tensor | None = None, cache: KVCache | None = None,
               start: Tensor | None = None, slots: int = 0) -> Tensor:
        """The last block's output after the final norm, (B, T, C).

        Four ways to call it. (tokens): rows begin at position 0; padding on the right needs no mask, since nothing real
        looks to its right. (tokens, mask): padding anywhere. (tokens, cache, slots=T): the first, and keys and values go into
        the cache. (tokens, cache, start, slots): rows go on at their own position start (B,) and see the slots below
        start + T of their cache row; `slots` bounds the slots that any row sees. For one token a row there is `decode`.
        """
        T = tokens.shape[1]
        longest = slots if cache is not None else T
        if longest > self.config.max_seq_len:
            raise ValueError(f"{longest} tokens do not fit the model's context of {self.config.max_seq_len}: shorten the text "
                             "or --max_len")
        where = self.locate(tokens, mask, cache, start, slots)
        x = self.tok_embeddings(tokens)  # (B, T, C)
        for layer in self.layers:
            if self.grad_checkpoint and torch.is_grad_enabled():
                x = checkpoint(layer, x, where, use_reentrant=False)  # non-reentrant: works with a frozen embedding (LoRA)
            else:
                x = layer(x, where)
        return self.norm(x)

    def locate(self, tokens: Tensor, mask: Tensor | None, cache: KVCache | None, start: Tensor | None, slots: int) -> Where:
        B, T = tokens.shape
        position, allowed = torch.arange(T, device=tokens.device).expand(B, T), None
        if start is not None:
            position = start[:, None] + position  # (B, T)
            allowed = torch.arange(slots, device=tokens.device) <= position[:, None, :, None]  # (B, 1, T, S)
        elif mask is not None:
            position = (mask.cumsum(1) - 1).clamp(min=0)  # (B, T), counted from the first real token
            causal = torch.ones(T, T, dtype=torch.bool, device=tokens.device).tril()
            itself = torch.eye(T, dtype=torch.bool, device=tokens.device)  # padding sees itself: a row without keys is NaN in some kernels
            allowed = (causal & mask[:, None, None, :]) | itself  # (B, 1, T, T)
        cos, sin = self.angles(position if allowed is not None else position[:1])  # (B or 1, T, D)
        return Where(cos[:, None], sin[:, None], allowed, cache, None if cache is None else cache.place(position), slots)

    def angles(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin at the given positions, one dimension more than these, in the dtype of the activations."""
        at = position.clamp(max=self.config.max_seq_len - 1)  # padding of a row may stand beyond the context
        return self.cos[at].to(self.norm.weight.dtype), self.sin[at].to(self.norm.weight.dtype)

    def decode(self, token: Tensor, cache: KVCache, start: Tensor, slots: int, even: bool = False, rows: Tensor | None = None,
               pieces: list[Piece] | None = None) -> Tensor:
        """hidden(token[:, None], cache=cache, start=start, slots=slots)[:, 0] for one token a row, (B,) -> (B, C), in a third
        of the calls. even=True says that every row sees all `slots` slots, which spares the mask.

        With `rows` and `pieces` the tokens are those of any rows of a larger cache, one of this, a hundred of that: token b
        belongs to row rows[b] and stands at position start[b]; the pieces say what each looks at."""
        B, H, K, D = token.shape[0], self.config.n_heads, self.config.n_kv_heads, self.config.head_dim
        cos, sin = (t[:, None].expand(B, H + K, D) for t in self.angles(start))
        cos = torch.cat((cos, cos.new_ones(B, K, D)), dim=1)     # (B, H+2K, D): v is turned by 0
        sin = torch.cat((sin, sin.new_zeros(B, K, D)), dim=1)
        hidden = pieces is None and not even
        allowed = (torch.arange(slots, device=token.device) <= start[:, None])[:, None, None] if hidden else None  # (B, 1, 1, S)
        where = Where(cos, sin, allowed, cache, cache.place(start[:, None], rows), slots, pieces)
        x = F.embedding(token, self.tok_embeddings.weight)  # (B, C)
        for layer in self.layers:
            x = layer.decode(x, where)
        return self.norm.forward(x)

    # ---- generation ----

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], max_new_tokens: int | list[int], temperature: float = 1.0, top_k: int = 0,
                 top_p: float = 1.0, eos_id: int = 2, generator: torch.Generator | None = None,
                 repetition_penalty: float = 1.0) -> list[list[int]]:
        """Continue each prompt; returns the new ids only, with EOS where it came. eos_id=-1 never stops.

        A row ends at EOS, at max_new_tokens (one number, or one a prompt), or where prompt and answer fill the context (a
        prompt that fills it alone gives no new token). Raises ValueError for an empty prompt, one longer than the context,
        an id outside the vocabulary, or bad sampling values. Dropout is off only in eval(), as everywhere.
        """
        answers: list[list[int]] = [[] for _ in prompts]
        steps = self.generate_steps(prompts, max_new_tokens, temperature, top_k, top_p, eos_id, generator, repetition_penalty)
        with quick(self):
            for rows, ids in steps:
                for row, token in zip(rows, ids):
                    answers[row].append(token)
        return answers

    @torch.inference_mode()
    def generate_steps(self, prompts: list[list[int]], max_new_tokens: int | list[int], temperature: float = 1.0, top_k: int = 0,
                       top_p: float = 1.0, eos_id: int = 2, generator: torch.Generator | None = None,
                       repetition_penalty: float = 1.0) -> Iterator[tuple[list[int], list[int]]]:
        """One (rows still running, their new ids) a step: prefill all prompts at once, then one token a row and step.
        Finished rows are never reported again, and leave the batch as soon as they are half of it."""
        check_sampling(temperature, top_k, top_p, repetition_penalty)
        limit = self.room(prompts, max_new_tokens)
        rows = [i for i in range(len(prompts)) if limit[i] > 0]  # rows[b]: which prompt sits in row b of the batch
        if not rows:
            return
        device = self.device
        length = torch.tensor([len(prompts[i]) for i in rows], device=device)  # (B,) tokens of each row so far
        longest = max(len(prompts[i]) for i in rows)
        tokens = torch.tensor([prompts[i] + [0] * (longest - len(prompts[i])) for i in rows], device=device)  # (B, T)
        cache = KVCache(self.config, len(rows), max(len(prompts[i]) + limit[i] for i in rows), self.norm.weight.dtype, device)
        if self.graphs:
            for kv in cache.kv:
                torch._dynamo.mark_static_address(kv)  # else a graph may not write to it
        seen = None
        if repetition_penalty != 1.0:
            seen = torch.zeros(len(rows), self.config.vocab_size, dtype=torch.bool, device=device)  # (B, V)
            for b, i in enumerate(rows):
                seen[b, prompts[i]] = True
        x = self.hidden(tokens, cache=cache, slots=longest)
        x = x[torch.arange(len(rows), device=device), length - 1]  # (B, C): each row's last real token
        made, done = [0] * len(prompts), set()
        while True:
            logits = self.output(x).float()  # (B, V)
            if seen is not None:
                logits = penalize_repetition(logits, seen, repetition_penalty)
            token = sample(logits, temperature, top_k, top_p, generator)  # (B,)
            ids = token.tolist()  # the one time a step that a GPU is waited for
            if min(ids) < 0:
                raise ValueError("the model gave non-finite logits: its weights or its dtype are broken (try --dtype fp32)")
            live = [(b, i) for b, i in enumerate(rows) if i not in done]
            yield [i for _, i in live], [ids[b] for b, _ in live]
            for b, i in live:
                made[i] += 1
                if ids[b] == eos_id or made[i] == limit[i]:
                    done.add(i)
            running = [b for b, i in enumerate(rows) if i not in done]
            if not running:
                return
            if seen is not None:
                seen[torch.arange(len(rows), device=device), token] = True
            if 2 * len(running) <= len(rows):  # not at every end: dropping rows copies the cache
                rows, kept = [rows[b] for b in running], torch.tensor(running, device=device)
                token, length = token[kept], length[kept]
                cache.keep(kept)
                seen = seen[kept] if seen is not None else None
            # A finished row that stays for now runs on unreported; locate() keeps it inside its own cache row.
            ends = [len(prompts[i]) + made[i] for i in rows]
            slots = cache.kv[0].shape[2] if self.graphs else max(ends)
            even = min(ends) == slots
            x = self.decode(token, cache, length, slots, even)  # (B, C)
            length = length + 1

    def room(self, prompts: list[list[int]], max_new_tokens: int | list[int]) -> list[int]:
        """How many new tokens each prompt may get: as asked, or as many as the context leaves. Raises on unusable prompts."""
        context, vocab = self.config.max_seq_len, self.config.vocab_size
        most = max_new_tokens if isinstance(max_new_tokens, list) else [max_new_tokens] * len(prompts)
        if len(most) != len(prompts) or any(n < 0 for n in most):
            raise ValueError(f"max_new_tokens is {max_new_tokens}, it must be at least 0: one number, or a list of one for each of "
                             f"{len(prompts)} prompts")
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompt {i} is empty: give it at least the BOS id")
            if len(prompt) > context:
                raise ValueError(f"prompt {i} has {len(prompt)} tokens, the model's context is {context}: shorten the prompt")
            if min(prompt) < 0 or max(prompt) >= vocab:  # on CUDA the embedding's own check kills the process
                raise ValueError(f"prompt {i} has ids from {min(prompt)} to {max(prompt)}, the embedding has rows 0 to "
                                 f"{vocab - 1}: the tokenizer is another model's")
        return [min(n, context - len(prompt)) for n, prompt in zip(most, prompts)]

    # ---- files ----

    @classmethod
    def from_pretrained(cls, directory: str | Path, dtype: torch.dtype | None = None, device="cpu", head: bool = True) -> "Llama":
        """Read a Hugging Face or Meta directory; dtype None keeps the file's. Raises ValueError or FileNotFoundError with a
        sentence when anything is missing, left over, cut short, or of another architecture."""
        if quantization(directory):
            raise ValueError(f"{directory} is quantized: open it with quantize.open_model, not as a plain model")
        fields = read_config(directory)
        tensors, config = read_tensors(directory, fields), LlamaConfig(**fields)
        if head and "score.weight" in tensors:  # with tied embeddings it would open as a language model, and babble
            raise ValueError(f"{directory} is a reward model, it has no words: open it with RewardModel.from_pretrained of rm.py")
        with torch.device("meta"):
            model = cls(config, head)
        fill(model, tensors, dtype, device, directory, () if head else ("output.weight", "score.weight"))
        model.make_rope()
        return model

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors in Hugging Face layout, in the dtype of the file that was read."""
        if self.fused:
            raise ValueError("the model is fused for generation: save it before, or open its directory again")
        if self.quantized:
            raise ValueError("the model is quantized: write it with quantize.save")
        write_model(directory, vars(self.config), dict(self.named_parameters()))  # a tied head appears once, as the embedding


# ---- sampling -------------------------------------------------------------------------------------------------------

def check_sampling(temperature: float, top_k: int, top_p: float, repetition_penalty: float = 1.0) -> None:
    """Raises ValueError naming the value that is out of range (NaN is out of every range)."""
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature is {temperature}, it must be a finite number of at least 0 (0 takes the likeliest token)")
    if not top_k >= 0:
        raise ValueError(f"top_k is {top_k}, it must be at least 0 (0 keeps all tokens)")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}, it must be above 0 and at most 1 (1 keeps all tokens)")
    if not (math.isfinite(repetition_penalty) and repetition_penalty > 0):
        raise ValueError(f"repetition_penalty is {repetition_penalty}, it must be above 0 (1 changes nothing)")


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens already seen less likely (CTRL, Keskar et al. 2019). logits (B, V), seen (B, V) True where it occurred."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0,
           generator: torch.Generator | None = None) -> Tensor:
    """Draw one id a row from logits (B, V) -> (B,). temperature 0 is argmax whatever top_k and top_p say.

    top_k keeps the k likeliest; top_p then keeps the smallest set of likeliest tokens whose probability reaches p
    (Holtzman et al. 2020), the token that crosses p included. A row with NaN or infinity in it gives -1.
    """
    if temperature == 0:
        highest, token = logits.max(-1)
    else:
        scaled = logits / max(temperature, 1e-30)  # 1e-40 would make logits infinite and probabilities NaN
        if 0 < top_k < logits.shape[-1]:
            kept = scaled.topk(top_k)  # by place, not by value: in bf16 many logits are equal, and k would keep more than k
            scaled = torch.full_like(scaled, -math.inf).scatter(-1, kept.indices, kept.values)
        if top_p < 1:
            probs, order = scaled.softmax(-1).sort(descending=True)  # (B, V) likeliest first
            before = probs.cumsum(-1) - probs  # probability of all likelier tokens
            drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
            scaled = scaled.masked_fill(drop, -math.inf)
        # argmax(p / e) with e ~ Exp(1) is a draw from p (the exponential race), and needs no host synchronisation.
        race = torch.empty_like(scaled).exponential_(generator=generator)
        token, highest = (scaled.softmax(-1) / race).argmax(-1), logits.amax(-1)
    return torch.where(highest.isfinite(), token, -1)  # NaN anywhere is the maximum


# ---- converting -----------------------------------------------------------------------------------------------------

def write_meta(model: Llama, directory: Path) -> None:
    """params.json and one consolidated.00.pth, wq and wk brought back into Meta's order, a tied head written out."""
    c, dim = model.config, model.config.dim
    if c.rope_factor != 1.0:
        raise ValueError(f"rotary scaling by {c.rope_factor} has no place in Meta's params.json: keep the Hugging Face layout")
    tensors = {}
    for name, p in model.named_parameters():
        t = p.detach().to("cpu", DTYPES[c.dtype])
        if name.endswith(("wq.weight", "wk.weight")):  # the inverse of join_meta's
            t = t.view(-1, 2, c.head_dim // 2, t.shape[1]).transpose(1, 2).reshape(t.shape)
        tensors[name] = t
    tensors.setdefault("output.weight", tensors["tok_embeddings.weight"])
    # Meta's code derives the feed-forward's width: 8/3 dim, times ffn_dim_multiplier, up to the next multiple_of.
    multiple = next((m for m in (256, 512, 1024, 2048, 4096, 128, 64, 32, 16, 8, 4, 2) if -(int(8 * dim / 3) // -m) * m == c.ffn_dim), None)
    width = {"multiple_of": multiple} if multiple else {"multiple_of": 1, "ffn_dim_multiplier": (c.ffn_dim + 0.5) / int(8 * dim / 3)}
    params = {"dim": dim, "n_layers": c.n_layers, "n_heads": c.n_heads, "n_kv_heads": c.n_kv_heads, "vocab_size": c.vocab_size,
              "norm_eps": c.norm_eps, "rope_theta": c.rope_theta, "max_seq_len": c.max_seq_len} | width
    if c.head_dim != dim // c.n_heads:
        params["head_dim"] = c.head_dim
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / "consolidated.00.pth.tmp"
    torch.save(tensors, temporary)
    os.replace(temporary, directory / "consolidated.00.pth")
    write_file(directory / "params.json", json.dumps(params, indent=1).encode())


@torch.no_grad()
def convert(argv: list[str]) -> None:
    """`python model.py convert IN OUT`: from Meta's layout to Hugging Face's or back, same dtype, compared afterwards."""
    parser = Parser("Write a model in the other layout: Meta's becomes Hugging Face's, Hugging Face's becomes Meta's (one part).", prog="model.py convert")
    parser.add_argument("source", type=Path, metavar="IN", help="weights directory to read")
    parser.add_argument("out", type=Path, metavar="OUT", help="directory to write, new or empty")
    args = parser.parse_args(argv)
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ValueError(f"{args.out} is there already and not empty: name a new directory")
    to_meta = (args.source / "config.json").exists()
    tokenizer = Tokenizer(args.source)
    model = Llama.from_pretrained(args.source).eval()
    tokens = torch.arange(min(64, model.config.max_seq_len))[None] % model.config.vocab_size  # (1, T), a fixed text
    before = model(tokens)
    if to_meta:
        write_meta(model, args.out)
        write_file(args.out / "tokenizer.model", tokenizer.proto)
    else:
        model.save_pretrained(args.out)
        tokenizer.save(args.out)
    del model  # never two
    if not torch.equal(Llama.from_pretrained(args.out).eval()(tokens), before):
        raise ValueError(f"{args.out} does not give the logits of {args.source}: this is a fault of ours, do not use it")
    print(f"wrote {args.out} in {'Meta' if to_meta else 'Hugging Face'} layout, {before.shape[1]} tokens have the same logits to the bit")


# ---- measuring ------------------------------------------------------------------------------------------------------

def read_bandwidth(device) -> float:
    """Bytes a second that this machine reads, by the dot product of two vectors far larger than any cache; median of 5."""
    a, b = (torch.ones(2**27, device=device) for _ in range(2))
    times = []
    for _ in range(6):
        started = time.perf_counter()
        torch.dot(a, b).item()
        times.append(time.perf_counter() - started)
    return 2 * a.nbytes / statistics.median(times[1:])


def benchmark(model: Llama, batches: list[int], prompt: int, new: int, repeats: int = 3) -> list[dict]:
    """Time prefill and decode of random prompts, greedy, EOS ignored. The weights a step reads are every matrix but the
    embedding, of which it reads one row. Medians; call it on a fused model."""
    c = model.config
    per_layer = c.dim * c.head_dim * 2 * (c.n_heads + c.n_kv_heads) + 3 * c.dim * c.ffn_dim
    stored = lambda module: sum(t.nbytes for t in module.buffers())  # of quantized layers, plain ones have no buffers
    element = model.norm.weight.dtype.itemsize
    read = (stored(model.layers) or c.n_layers * per_layer * element) + (stored(model.output) or c.vocab_size * c.dim * element)
    bandwidth, rows = read_bandwidth(model.device), []
    for batch in batches:
        prompts = torch.randint(3, c.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(0)).tolist()

        def seconds(tokens: int) -> float:
            times = []
            for _ in range(repeats):
                started = time.perf_counter()
                model.generate(prompts, tokens, temperature=0, eos_id=-1)
                times.append(time.perf_counter() - started)
            return statistics.median(times)

        model.generate(prompts, min(8, new), temperature=0, eos_id=-1)  # warms up, and compiles
        prefill, whole = seconds(1), seconds(new)
        decode = (new - 1) / (whole - prefill)  # steps a second
        row = {"batch": batch, "prompt": prompt, "new": new, "prefill_ms": prefill * 1e3, "prefill_tokens_per_second": batch * prompt / prefill,
               "decode_tokens_per_second": batch * decode, "tokens_per_second": batch * new / whole, "weights_bytes_per_second": read * decode,
               "read_bandwidth": bandwidth, "share": read * decode / bandwidth}
        rows.append(row)
        print(f"batch {batch:3d} | prefill {prompt} tokens {row['prefill_ms']:.0f} ms, {row['prefill_tokens_per_second']:,.0f} tokens/s | decode {row['decode_tokens_per_second']:,.1f} tokens/s, "
              f"with prefill {row['tokens_per_second']:,.1f} | weights {read / 1e6:,.0f} MB a step, {row['weights_bytes_per_second'] / 1e9:.1f} GB/s, "
              f"{100 * row['share']:.0f} % of the {bandwidth / 1e9:.1f} GB/s that torch.dot reads", flush=True)
    return rows


def random_model(config: LlamaConfig, dtype: torch.dtype, device, head: bool = True) -> Llama:
    """A model of random weights, made in `dtype`: for speed they are as good as others."""
    with torch.device("meta"):
        model = Llama(config, head)
    model = model.to(dtype).to_empty(device=device)
    model.init_weights()
    model.make_rope()
    return model


# ---- command line ---------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> list[dict] | None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["convert"]:
        return convert(argv[1:])
    parser = Parser("Continue prompts with a LLaMA, or measure its speed. `model.py convert IN OUT` changes between Meta's and Hugging Face's layout.")
    parser.add_argument("directory", help=f"weights directory: Hugging Face or Meta layout, quantized, or a LoRA adapter; for --benchmark also a shape with random weights: {' '.join(SHAPES)}")
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="text to continue; several are continued one after the other")
    parser.add_argument("--chat", action="store_true", help="each PROMPT is an instruction: put it into the directory's prompt template, print the answer alone")
    parser.add_argument("--max_new_tokens", type=int, default=200, help="longest continuation in tokens")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token")
    parser.add_argument("--top_k", type=int, default=0, help="keep the k likeliest tokens (0 = all)")
    parser.add_argument("--top_p", type=float, default=1.0, help="keep the likeliest tokens that make up this probability (1 = all)")
    parser.add_argument("--repetition_penalty", type=float, default=1.0, help="above 1 makes tokens already seen less likely")
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    parser.add_argument("--dtype", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="auto: bf16 on CUDA, fp32 elsewhere")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="auto: cuda where there is one, else cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile the step of one token: starts some 15 s later, then small models are faster; on CUDA with graphs")
    parser.add_argument("--benchmark", action="store_true", help="print tokens/s of prefill and decode, and the share of the memory bandwidth in use")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="rows of the benchmark's batches, one figure each")
    args = parser.parse_intermixed_args(argv)  # a prompt may follow a flag

    check_sampling(args.temperature, args.top_k, args.top_p, args.repetition_penalty)  # before minutes of loading
    if args.benchmark and args.prompts or not (args.benchmark or args.prompts):
        raise ValueError("give at least one PROMPT, or --benchmark without any (see --help)")
    if min(args.batch) < 1:
        raise ValueError(f"--batch {min(args.batch)} is no number of rows: it must be at least 1")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    dtype = DTYPES[("bf16" if device == "cuda" else "fp32") if args.dtype == "auto" else args.dtype]
    if args.benchmark and args.directory in SHAPES and not Path(args.directory).exists():
        model = random_model(SHAPES[args.directory], dtype, device).eval()
    else:
        from lora import home as tokenizer_home  # here, not above: they open quantized models and adapters by way of the other files
        from serve import open_model
        if not Path(args.directory).is_dir():
            raise FileNotFoundError(f"{args.directory} does not exist: name a weights directory")
        home = tokenizer_home(Path(args.directory))
        tokenizer = Tokenizer(home)
        model = open_model(Path(args.directory), None, dtype, device)
        check_tokenizer(tokenizer, model.config.vocab_size)
    model.fuse(max(args.batch) if args.benchmark else 1)
    if args.compile:
        model.compile_decode()
    if args.benchmark:
        context = model.config.max_seq_len
        print(f"{args.directory} {str(dtype).removeprefix('torch.')} on {device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
        return benchmark(model, args.batch, min(32, context // 4), min(128, context // 2))
    generator = torch.Generator(device).manual_seed(args.seed)
    for prompt in args.prompts:
        if args.chat:
            name = read_template(home)
            template = TEMPLATES[name if name in TEMPLATES else "plain"]
            ids, shown = encode_prompt([{"role": "user", "content": prompt}], tokenizer, template), []
        else:
            ids = shown = tokenizer.encode(prompt)
        steps = model.generate_steps([ids], args.max_new_tokens, args.temperature, args.top_k, args.top_p, tokenizer.eos_id,
                                     generator, args.repetition_penalty)
        # Decoding prompt and answer as one stream keeps the space between them.
        for piece in tokenizer.stream(itertools.chain(shown, (token for _, new in steps for token in new))):
            print(piece, end="", flush=True)
        print()


if __name__ == "__main__":
    command(main)
