r"""LLaMA in one file: config, transformer, KV cache, sampling, generation.

Touvron et al. 2023, "LLaMA: Open and Efficient Foundation Language Models" (arXiv 2302.13971). Each block changes the
residual stream x (B, T, C) twice, and h = norm(x) is computed anew before each change:

    x = x + wo softmax(q k^T / sqrt(D) + causal) v          q = rope(wq h)   k = rope(wk h)   v = wv h
    x = x + w2 (silu(w1 h) * w3 h)

norm is RMSNorm (Zhang & Sennrich 2019), rope rotary embedding (Su et al. 2021), the second line SwiGLU (Shazeer 2020),
and causal is -inf where a token would see a later one. There are no biases. H / K query heads share one key and one
value head (Ainslie et al. 2023), two in SHAPES["tiny"]:

    wq h (B, T, 256) -> (B, 8, T, 32)    q0 q1  q2 q3  q4 q5  q6 q7
                                           \ /    \ /    \ /    \ /
    wk h (B, T, 128) -> (B, 4, T, 32)      k0     k1     k2     k3          wv h likewise

    python model.py DIR "Once upon a time" [--temperature 0]                  prints prompts and their continuations
    python model.py out/ppo --chat "Write a story about a fox and a kite."    answers by the directory's prompt template
    python model.py convert IN OUT                                            writes any layout in Hugging Face's

The paper has no shared key heads, no tied embeddings and no scaling of positions (Chen et al. 2023); later LLaMAs do.
Letters: B batch, T time (tokens of this call), S slots of the cache in use (T without a cache), C channels (dim),
H query heads, K key/value heads, D head dim, V vocabulary. Names are those of Meta's files (wq, w1, ...).
"""

import copy
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data import run, text, weights


# ---- the model ------------------------------------------------------------------------------------------------------

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
    rope_scaling: tuple[float, ...] = ()  # what slow_down takes: (), (s,), or Llama 3's (s, low, high, N)
    tie_embeddings: bool = False
    dtype: str = "float32"      # of the file that was read, and so of the file that will be written
    bos_id: int | None = 1
    eos_id: int | tuple[int, ...] | None = 2
    extra: dict = field(default_factory=dict)  # further keys for config.json, such as a reward model's "reward_mean"

    def __post_init__(self):
        """Raises ValueError for a value that no model can have."""
        weights.check_config(vars(self))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension. F.rms_norm takes the mean in fp32 whatever x is."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rope_table(config: LlamaConfig, device=None) -> tuple[Tensor, Tensor]:
    """Returns cos and sin of the angles position * theta^(-i/D), i = 0, 2, 4 ... D - 2, each (max_seq_len, D): once
    for either half of D, sin negative in the first, as `rotate` takes them."""
    i = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32)
    frequency = slow_down(1.0 / float(config.rope_theta) ** (i / config.head_dim), *config.rope_scaling)   # (D/2,)
    position = torch.arange(config.max_seq_len, device=device, dtype=torch.float32)
    angle = torch.outer(position, frequency)                                           # (max_seq_len, D/2)
    cos, sin = angle.cos(), angle.sin()                                                # (max_seq_len, D/2)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (a, b) = (x[i], x[i + D/2]) by its angle: (a, b) cos + (b, a) (-sin, sin).
    x (..., T, D); cos and sin broadcast to it, sin is negative in its first half."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class Where(NamedTuple):
    """Where the tokens (B, T) of one call stand. It is the same for all layers; `Transformer.locate` makes it."""
    cos: Tensor                # (1 or B, 1, T, D), of the angles of their positions
    sin: Tensor
    visible: Tensor | None     # (1 or B, 1, T, S), True where a token sees a slot; None: see is_causal
    is_causal: bool            # True: token t sees tokens 0 .. t. False and visible None: a token sees all slots
    position: Tensor           # (1 or B, T), also the slots of the cache that keys and values go into
    slots: int                 # S
    even: bool                 # True: all rows stand at the same positions, the last T of the slots


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        C, H, K, D = config.dim, config.n_heads, config.n_kv_heads, config.head_dim
        self.layer, self.n_heads, self.n_kv_heads, self.head_dim = layer, H, K, D
        self.wq = nn.Linear(C, H * D, bias=False)
        self.wk = nn.Linear(C, K * D, bias=False)
        self.wv = nn.Linear(C, K * D, bias=False)
        self.wo = nn.Linear(H * D, C, bias=False)

    def forward(self, x: Tensor, where: Where, cache: "KVCache | None" = None) -> Tensor:
        B, T, _ = x.shape
        H, K, D = self.n_heads, self.n_kv_heads, self.head_dim
        q = self.wq(x).view(B, T, H, D).transpose(1, 2)                   # (B, H, T, D)
        k = self.wk(x).view(B, T, K, D).transpose(1, 2)                   # (B, K, T, D)
        v = self.wv(x).view(B, T, K, D).transpose(1, 2)                   # (B, K, T, D)
        q, k = rotate(q, where.cos, where.sin), rotate(k, where.cos, where.sin)
        if cache is not None:
            k, v = cache.write(self.layer, k, v, where)                   # (B, K, S, D), all that the rows have so far
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=where.visible, is_causal=where.is_causal,
                                           enable_gqa=H != K)             # (B, H, T, D)
        return self.wo(y.transpose(1, 2).reshape(B, T, H * D))            # (B, T, C)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))                   # (B, T, C) -> (B, T, ffn_dim) -> (B, T, C)


class Block(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, layer)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, where: Where, cache: "KVCache | None" = None,
                at: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x (B, T, C) -> (B, T, C), or only its rows and columns `at`, (N,) and (N,) -> (N, C)."""
        x = x + self.attention(self.attention_norm(x), where, cache)
        if at is not None:
            x = x[at]                                                     # (N, C)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    """The network. With head=False it ends at the final norm, as the trunk of a reward model does."""

    def __init__(self, config: LlamaConfig, head: bool = True, generator: torch.Generator | None = None):
        super().__init__()
        self.config = config
        self.quantized: dict | None = None  # the scheme, where quantize.py has replaced the linears
        self.grad_checkpoint = False        # recompute each block in backward instead of keeping its activations
        # nn.Embedding would draw its weights, and to draw on the meta device takes a second: it imports the compiler.
        self.tok_embeddings = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.dim), freeze=False)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False) if head else None
        if head and config.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight
        if self.device.type != "meta":
            init_weights(self, generator)
            self.make_rope()

    def make_rope(self) -> None:
        """Puts the angles beside the weights, in fp32: bf16 cannot tell position 257 from 258."""
        cos, sin = rope_table(self.config, self.device)
        self.register_buffer("cos", cos, persistent=False)  # (max_seq_len, D)
        self.register_buffer("sin", sin, persistent=False)

    @property
    def device(self) -> torch.device:
        return self.tok_embeddings.weight.device

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """tokens (B, T) ids, mask (B, T) True where a token is real -> logits (B, T, V)."""
        return self.output(self.hidden(tokens, mask))

    def hidden(self, tokens: Tensor, mask: Tensor | None = None, cache: "KVCache | None" = None,
               start: list[int] | Tensor | None = None, at: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The last block's output after the final norm, (B, T, C). `locate` says what each token sees.

        at: the rows and columns, (N,) each, of the tokens whose output is wanted, (N, C). In the last block the others
        then only give keys and values."""
        where = self.locate_all(start, cache) if isinstance(start, Tensor) else self.locate(tokens, mask, start)
        x = self.tok_embeddings(tokens)                                     # (B, T, C)
        for layer in self.layers:
            wanted = at if layer is self.layers[-1] else None
            if self.grad_checkpoint and torch.is_grad_enabled():
                # The reentrant kind gives no gradient where x needs none, as behind a frozen embedding.
                x = checkpoint(layer, x, where, None, wanted, use_reentrant=False)
            else:
                x = layer(x, where, cache, wanted)
        return self.norm(x)

    def locate(self, tokens: Tensor, mask: Tensor | None = None, start: list[int] | None = None) -> Where:
        """Works out where the tokens (B, T) stand and what they see, once a call for all layers.

            mask (. is padding)          with a cache and start = [3, 1], where the tokens are [[d, e], [b, c]]
            .  .  a  b  c                slot     0  1  2  3  4
            position 0  1  2             row 0    a  b  c  d  e       d (position 3) sees slots 0 .. 3, e sees 0 .. 4
            c sees a, b, c               row 1    a  b  c  .  .       b (position 1) sees slots 0 .. 1, c sees 0 .. 2

        Padding may stand on either side. On the right it needs no mask, since no real token looks to its right. A mask
        and a cache exclude each other.
        """
        B, T = tokens.shape
        start = start or [0] * B
        slots, even = max(start) + T, min(start) == max(start)                   # even: all rows have equally many
        if slots > self.config.max_seq_len:
            raise ValueError(f"{slots} tokens do not fit the model's context of {self.config.max_seq_len}: "
                             "shorten the text or --max_len")
        slot = torch.arange(slots, device=tokens.device)                                          # (S,)
        first = torch.tensor(start[:1] if even else start).to(tokens.device, non_blocking=True)   # (1 or B,)
        position = first[:, None] + slot[:T]                                                      # (1 or B, T)
        visible, is_causal = None, slots == T and mask is None
        if mask is not None or not (is_causal or even and T == 1):               # one token a row sees all slots
            visible = slot <= position[:, None, :, None]                                          # (1 or B, 1, T, S)
        if mask is not None:
            itself = torch.eye(T, dtype=torch.bool, device=tokens.device)        # softmax over no key would be NaN
            visible = visible & mask[:, None, None] | itself                                      # (B, 1, T, T)
            position = (mask.cumsum(1) - 1).clamp(min=0)                                          # (B, T)
        return Where(*self.angles(position), visible, is_causal, position, slots, even)

    def locate_all(self, position: Tensor, cache: "KVCache") -> Where:
        """The same for one token a row at position (B, 1), by a mask over all slots of the cache: nothing here depends
        on the numbers, so that a graph can repeat it."""
        slots = cache.kv[0].shape[3]
        visible = torch.arange(slots, device=position.device) <= position[:, None, :, None]       # (B, 1, 1, S)
        return Where(*self.angles(position), visible, False, position, slots, even=False)

    def angles(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Returns cos and sin for position (1 or B, T), each (1 or B, 1, T, D), in the dtype of the computation."""
        dtype = self.norm.weight.dtype
        return self.cos[position][:, None].to(dtype), self.sin[position][:, None].to(dtype)


# ---- the cache ------------------------------------------------------------------------------------------------------

class KVCache:
    """The keys and values of all tokens so far: a call computes only those of its new tokens.

    kv[layer] is (2, rows, K, slots, D), keys and values. The token at position p of a row lies in slot p:

        slot    0   1   2   3   4   5   6   7
        row 0   a   b   c   d   e   .   .   .      5 tokens so far: the next one goes into slot 5 and sees slots 0 .. 5
        row 1   a   b   x   x   x   .   .   .      2 tokens so far: the next one goes into slot 2 and sees slots 0 .. 2

    x is padding on the right of the first call. It is overwritten before a token can see it.
    """

    def __init__(self, config: LlamaConfig, rows: int, slots: int, dtype: torch.dtype, device):
        shape = (2, rows, config.n_kv_heads, slots, config.head_dim)
        self.kv = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]

    def write(self, layer: int, k: Tensor, v: Tensor, where: Where) -> tuple[Tensor, Tensor]:
        """Stores k and v (B, K, T, D) at their positions; returns those of all slots in use, (B, K, S, D) each."""
        kv, new = self.kv[layer], torch.stack((k, v))                                             # (2, B, K, T, D)
        if where.even:      # a plain copy is faster
            kv[:, :, :, where.slots - new.shape[3]:where.slots] = new
        else:
            row = torch.arange(len(k), device=k.device)[:, None]                                  # (B, 1)
            kv.transpose(2, 3)[:, row, where.position] = new.transpose(2, 3)                      # (2, B, T, K, D)
        return kv[:, :, :, :where.slots].unbind()

    def rows(self, first: int, last: int) -> "KVCache":
        """A view of rows first .. last - 1: what is written to it is written to this cache."""
        view = copy.copy(self)
        view.kv = [kv[:, first:last] for kv in self.kv]
        return view

    def keep(self, rows: list[int]) -> None:
        """Keeps these rows, in this order; one that is named twice is there twice. It goes layer by layer, so that a
        second copy of the whole never exists."""
        for layer, kv in enumerate(self.kv):
            self.kv[layer] = kv[:, rows]


class DecodingGraph:
    """The step of one token a row, recorded once as a CUDA graph: a replay is one launch in the place of hundreds.

    On an H200 this was 7 to 9 times faster in bf16 (tiny, mid, 1 and 16 rows), where launching takes longer than
    computing. A graph repeats its kernels with the same shapes and addresses. So every step looks at all slots of the
    cache, a mask hides those that are empty, and tokens and positions are copied to where the graph reads them."""

    def __init__(self, model: Transformer, cache: KVCache):
        rows, slots = cache.kv[0].shape[1], cache.kv[0].shape[3]
        self.token = torch.zeros(rows, 1, dtype=torch.long, device=model.device)                  # (B, 1)
        # The rehearsal writes to the last slot, which is overwritten before a token sees it.
        self.position = torch.full_like(self.token, slots - 1)                                    # (B, 1)
        self.graph = torch.cuda.CUDAGraph()
        model.hidden(self.token, cache=cache, start=self.position)      # cuBLAS and others set themselves up
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph):
            self.h = model.hidden(self.token, cache=cache, start=self.position)[:, 0]             # (B, C)

    def __call__(self, token: Tensor, start: list[int]) -> Tensor:
        """Returns the hidden states (B, C) of the tokens (B,) at positions start, in memory that the next call uses."""
        self.token.copy_(token[:, None])
        self.position.copy_(torch.tensor(start)[:, None], non_blocking=True)
        self.graph.replay()
        return self.h


# ---- sampling and generation ----------------------------------------------------------------------------------------

def sample(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0,
           generator: torch.Generator | None = None) -> Tensor:
    """Draws one id a row from logits (B, V) -> (B,). Temperature 0 takes the likeliest, whatever top_k and top_p say.
    A row with NaN or +infinity in it gives -1; a token of logit -infinity is never drawn."""
    highest, token = logits.max(-1)                # (B,) each
    if temperature > 0:
        scaled = logits / max(temperature, 1e-30)  # 1e-40 would make logits infinite and probabilities NaN
        if 0 < top_k < logits.shape[-1]:
            scaled = keep_top_k(scaled, top_k)
        if top_p < 1:
            scaled = keep_top_p(scaled, top_p)
        # argmax(p / e) with e ~ Exp(1) is a draw from p (the exponential race). It does not wait for a GPU.
        e = torch.empty_like(scaled).exponential_(generator=generator)             # (B, V)
        token = (scaled.softmax(-1) / e).argmax(-1)                                # (B,)
    return torch.where(highest.isfinite(), token, -1)  # NaN anywhere in a row is its maximum


def keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    """Sets all but the k largest logits (B, V) to -inf. They are found by place, because in bf16 many logits are equal
    and a comparison with the k-th would keep more than k."""
    kept = logits.topk(top_k)
    return torch.full_like(logits, -math.inf).scatter(-1, kept.indices, kept.values)


def keep_top_p(logits: Tensor, top_p: float | Tensor) -> Tensor:
    """Keeps the smallest set of likeliest tokens whose probability reaches top_p, the one that crosses it included, and
    sets the other logits (B, V) to -inf (nucleus sampling, Holtzman et al. 2020). top_p is a number, or (B, 1)."""
    probs, order = logits.softmax(-1).sort(descending=True)             # (B, V), likeliest first
    likelier = probs.cumsum(-1) - probs                                 # the probability of all likelier tokens
    drop = (likelier >= top_p) & (top_p < 1)                            # at 1 nothing is dropped by a rounded sum
    drop &= likelier > 0                                                # nor the likeliest at a p that is rounded to 0
    return logits.masked_fill(drop.scatter(-1, order, drop), -math.inf)


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Makes the tokens that have occurred less likely (CTRL, Keskar et al. 2019). logits (B, V), seen (B, V) bool. A
    positive logit is divided, a negative one multiplied."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


class Llama(Transformer):
    """The transformer as a language model, which continues prompts and lives in directories."""

    @torch.inference_mode()
    def generate_steps(self, prompts: list[list[int]],
                       max_new_tokens: int | list[int],                # one number, or one a prompt
                       temperature: float = 1.0,                       # 0 takes the likeliest token
                       top_k: int = 0,                                 # keep the k likeliest; 0: all
                       top_p: float = 1.0,                             # keep the likeliest of this probability; 1: all
                       eos_id: int | Sequence[int] | None = None,      # these end it; None: the config's, -1: none
                       generator: torch.Generator | None = None,
                       repetition_penalty: float = 1.0) -> Iterator[tuple[list[int], list[int]]]:
        """Yields (indices of the prompts still running, a new id of each) a step. The first step is a call with all
        prompts, each later one a call with one token a row. Finished rows leave the batch once they are half of it.

        A row ends at EOS, at max_new_tokens, or where prompt and answer fill the context (a prompt that fills it alone
        gives no new token). Raises ValueError for an empty prompt, one longer than the context, an id outside the
        vocabulary, or bad sampling values. Dropout is off only in eval(), as everywhere."""
        check_sampling(temperature, top_k, top_p, repetition_penalty)
        left = self.room(prompts, max_new_tokens)                              # left[i]: tokens prompt i may still get
        at = [len(prompt) for prompt in prompts]                               # at[i]: the position of its next token
        rows = [i for i in range(len(prompts)) if left[i]]                     # rows[b]: the prompt in row b
        stops = self.stops(eos_id)
        if not rows:
            return
        slots = max(at[i] + left[i] for i in rows)
        seen = torch.zeros(len(rows), self.config.vocab_size, dtype=torch.bool, device=self.device)  # (B, V)
        for b, i in enumerate(rows):
            seen[b, prompts[i]] = True
        distinct = list(dict.fromkeys(tuple(prompts[i]) for i in rows))        # P prompts: each is computed once
        cache = KVCache(self.config, len(distinct), slots, self.norm.weight.dtype, self.device)
        tokens, _ = text.pad(distinct)                                                               # (P, T)
        last = torch.arange(len(distinct)), torch.tensor([len(prompt) - 1 for prompt in distinct])   # (P,), (P,)
        h = self.hidden(tokens.to(self.device), cache=cache, at=last)          # (P, C), at each prompt's last token
        if len(distinct) < len(rows):
            place = [distinct.index(tuple(prompts[i])) for i in rows]
            cache.keep(place)
            h = h[place]                                                                             # (B, C)
        step = self.step_of(cache)
        while True:
            logits = self.output(h).float()                                                          # (B, V)
            if repetition_penalty != 1:
                logits = penalize_repetition(logits, seen, repetition_penalty)
            token = sample(logits, temperature, top_k, top_p, generator)                             # (B,)
            ids = token.tolist()                                               # the one wait for a GPU in a step
            if min(ids) < 0:
                raise ValueError("the model gave non-finite logits: its weights or its dtype are broken "
                                 "(try --dtype fp32)")
            new = {i: one for i, one in zip(rows, ids) if left[i]}
            yield list(new), list(new.values())
            for i, one in new.items():
                left[i] = 0 if one in stops else left[i] - 1
            running = [b for b, i in enumerate(rows) if left[i]]
            if not running:
                return
            seen.scatter_(1, token[:, None], True)
            if 2 * len(running) <= len(rows):                                  # not sooner: it copies the cache
                rows = [rows[b] for b in running]
                token = token[running]
                seen = seen[running]
                cache.keep(running)
                step = self.step_of(cache)
            h = step(token, [at[i] for i in rows])                                                   # (B, C)
            for i in rows:
                at[i] += left[i] > 0                                           # a finished row stays at its last slot

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], max_new_tokens: int | list[int], temperature: float = 1.0,
                 top_k: int = 0, top_p: float = 1.0, eos_id: int | Sequence[int] | None = None,
                 generator: torch.Generator | None = None, repetition_penalty: float = 1.0) -> list[list[int]]:
        """Continues each prompt, as generate_steps does. Returns the new ids only, EOS included where it came."""
        answers: list[list[int]] = [[] for _ in prompts]
        for rows, ids in self.generate_steps(prompts, max_new_tokens, temperature, top_k, top_p, eos_id, generator,
                                             repetition_penalty):
            for row, token in zip(rows, ids):
                answers[row].append(token)
        return answers

    def step_of(self, cache: KVCache) -> Callable[[Tensor, list[int]], Tensor]:
        """Returns the function of a decoding step, token (B,) and positions -> hidden states (B, C)."""
        if self.device.type == "cuda":
            return DecodingGraph(self, cache)
        return lambda token, start: self.hidden(token[:, None], cache=cache, start=start)[:, 0]

    def stops(self, eos_id: int | Iterable[int] | None = None) -> set[int]:
        """Returns the ids that end an answer. eos_id is as for `generate_steps`."""
        return set(weights.as_tuple(self.config.eos_id if eos_id is None else eos_id))

    def stop_at(self, ids: Iterable[int], bos_id: int | None = None) -> None:
        """Lets answers end at these ids too, here and in the directory that is written. bos_id: what the tokenizer
        begins a text with. A config that takes it for an EOS, or has another BOS, is of another tokenizer."""
        bos_id = self.config.bos_id if bos_id is None else bos_id
        ends = [token for token in weights.as_tuple(self.config.eos_id) if token != bos_id]
        self.config = replace(self.config, bos_id=bos_id, eos_id=weights.unite(ends, ids))

    def room(self, prompts: list[list[int]], max_new_tokens: int | list[int]) -> list[int]:
        """Returns how many new tokens each prompt may get: as asked, or as many as the context leaves. Raises
        ValueError for bad prompts."""
        context = self.config.max_seq_len
        rows = self.config.vocab_size
        most = max_new_tokens if isinstance(max_new_tokens, list) else [max_new_tokens] * len(prompts)
        if len(most) != len(prompts) or any(n < 0 for n in most):
            raise ValueError(f"max_new_tokens is {max_new_tokens}, it must be at least 0: one number, or a list of one "
                             f"for each of {len(prompts)} prompts")
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompt {i} is empty: give it at least the BOS id")
            n = len(prompt)
            if n > context:
                raise ValueError(f"prompt {i} has {n} tokens, the model's context is {context}: shorten the prompt")
            lowest = min(prompt)
            highest = max(prompt)
            if lowest < 0 or highest >= rows:  # on CUDA the embedding's own check kills the process
                raise ValueError(f"prompt {i} has ids from {lowest} to {highest}, the embedding has only {rows} rows: "
                                 "the tokenizer is another model's")
        return [min(n, context - len(prompt)) for n, prompt in zip(most, prompts)]

    @classmethod
    def from_pretrained(cls, directory: str | Path, dtype: torch.dtype | None = None, device="cpu",
                        head: bool = True) -> "Llama":
        """Reads a plain Hugging Face or Meta directory; dtype None keeps the file's. Raises ValueError or
        FileNotFoundError when anything is missing, left over, cut short, or of another architecture."""
        plain_config(directory)
        return cls.read(directory, dtype, device, head)

    @classmethod
    def read(cls, directory: str | Path, dtype: torch.dtype | None, device, head: bool,
             install: Callable[["Llama", dict[str, weights.Stored]], None] | None = None) -> "Llama":
        """The same without an adapter that lies beside the weights. install(model, tensors) may put other layers into
        the model, which has no weights yet, and take their tensors out of the dictionary."""
        config = LlamaConfig(**weights.read_config(directory))
        tensors = weights.read_tensors(directory, vars(config))
        if head and "score.weight" in tensors:  # with tied embeddings nothing else would tell it from a language model
            raise ValueError(f"{directory} is a reward model, it has no words: open it with "
                             "RewardModel.from_pretrained of rm.py")
        with torch.device("meta"):
            model = cls(config, head)
        if install is not None:
            install(model, tensors)
        weights.fill(model, tensors, dtype, device, directory)
        model.make_rope()
        return model

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes config.json and model.safetensors in Hugging Face's layout, in the dtype of the file that was read."""
        if self.quantized:
            raise ValueError("the model is quantized: write it with quantize.save")
        weights.write_model(directory, vars(self.config), dict(self.named_parameters()))  # a tied head appears once


def check_sampling(temperature: float, top_k: int, top_p: float, repetition_penalty: float = 1.0) -> None:
    """Raises ValueError naming the value that is out of range (NaN is out of every range)."""
    for name, value, fits, rule in (
            ("temperature", temperature, 0 <= temperature < math.inf, "finite and at least 0 (0 takes the likeliest)"),
            ("top_k", top_k, top_k >= 0, "at least 0 (0 keeps all tokens)"),
            ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1 (1 keeps all tokens)"),
            ("repetition_penalty", repetition_penalty, 0 < repetition_penalty < math.inf, "above 0 (1 is none)")):
        if not fits:
            raise ValueError(f"{name} is {value}, it must be {rule}")


# ---- contexts longer than in training -------------------------------------------------------------------------------

def slow_down(frequency: Tensor, factor: float = 1.0, *bands: float) -> Tensor:
    """Divides the frequencies (D/2,) of the pairs of a head, so that later positions have angles seen in training.

    Linear scaling divides all frequencies f by a factor s (Chen et al. 2023). Llama 3.1 leaves a pair as it is that
    turns `high` times or more in the N tokens of the first context. It divides by s where a pair turns `low` times or
    less, and blends between:

        r = N f / 2 pi                  turns in N tokens
        g = (r - low) / (high - low)    clamped to 0 .. 1
        f' = (1 - g) f / s + g f

    The operations come in the order of transformers: rounded otherwise, angles at position 100,000 differ by 0.001.
    """
    kept = 0.0
    if bands:
        low, high, context = bands
        turns = context / (2 * math.pi / frequency)                                    # (D/2,)
        kept = ((turns - low) / (high - low)).clamp(0, 1)                              # (D/2,)
    return (1 - kept) * frequency / factor + kept * frequency


# ---- directories ----------------------------------------------------------------------------------------------------

def plain_config(directory: str | Path) -> LlamaConfig:
    """Returns the config of a plain directory. Raises ValueError for a quantized one and for an adapter."""
    if weights.is_adapter(directory):
        raise weights.no_model(Path(directory))
    if weights.quantization(directory):
        raise ValueError(f"{directory} is quantized: open it with quantize.open_model, or on the command line with "
                         f"`python serve.py {directory} --say TEXT`")
    return LlamaConfig(**weights.read_config(directory))


# ---- random weights, and shapes to measure with ---------------------------------------------------------------------

def init_weights(model: Transformer, generator: torch.Generator | None = None) -> None:
    """Draws matrices from N(0, 1/dim). wo and w2, which write to the residual stream, get 1/sqrt(2L) of the deviation,
    since 2L of them are added up (GPT-2, whose constant 0.02 fits a width of 2500)."""
    for name, p in model.named_parameters():
        if p.dim() == 1:
            nn.init.ones_(p)
        else:
            into_residual = name.endswith(("attention.wo.weight", "feed_forward.w2.weight"))
            std = (model.config.dim * (2 * model.config.n_layers if into_residual else 1)) ** -0.5
            nn.init.normal_(p, std=std, generator=generator)


def random_model(config: LlamaConfig, dtype: torch.dtype, device, head: bool = True) -> Llama:
    """Returns a model of random weights, made in `dtype`: its speed is that of a trained one."""
    with torch.device("meta"):
        model = Llama(config, head)
    model = model.to(dtype).to_empty(device=device)
    init_weights(model)
    model.make_rope()
    return model


def shape(dim: int, n_layers: int, n_heads: int, n_kv_heads: int, ffn_dim: int, **more: int) -> LlamaConfig:
    sizes = {"vocab_size": 32000, "max_seq_len": 2048} | more
    return LlamaConfig(dim, n_layers, n_heads, n_kv_heads, dim // n_heads, ffn_dim, **sizes)


# Shapes to measure with, and LLaMA's own (Touvron et al. 2023, table 2). big is TinyLlama-1.1B.
SHAPES = {
    "tiny": shape(256, 6, 8, 4, 704, vocab_size=2048),
    "small": shape(512, 8, 8, 8, 1376),
    "mid": shape(768, 12, 12, 12, 2048),
    "big": shape(2048, 22, 32, 4, 5632),
    "7B": shape(4096, 32, 32, 32, 11008),
    "13B": shape(5120, 40, 40, 40, 13824),
    "33B": shape(6656, 60, 52, 52, 17920),
    "65B": shape(8192, 80, 64, 64, 22016),
    "70B": shape(8192, 80, 64, 8, 28672, max_seq_len=4096),
}


# ---- command line ---------------------------------------------------------------------------------------------------

@torch.no_grad()
def convert(argv: list[str]) -> None:
    """Writes a directory of any layout in Hugging Face's, in its own dtype, and compares the logits of both."""
    parser = run.Parser("Write a plain model of any layout in Hugging Face's (safetensors).", prog="model.py convert")
    parser.add_argument("source", type=Path, metavar="IN", help="weights directory to read")
    parser.add_argument("out", type=Path, metavar="OUT", help="directory to write, new or empty")
    args = parser.parse_args(argv)
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ValueError(f"{args.out} is there already and not empty: name a new directory")
    config = plain_config(args.source)
    tokenizer = text.Tokenizer(args.source)
    model = Llama.from_pretrained(args.source).eval()
    tokens = torch.arange(min(64, config.max_seq_len))[None] % config.vocab_size                  # (1, T), any text
    before = model(tokens)
    model.save_pretrained(args.out)
    tokenizer.save(args.out, text.read_template(args.source))
    del model  # two may not fit into memory at once
    if not torch.equal(Llama.from_pretrained(args.out).eval()(tokens), before):
        raise ValueError(f"{args.out} does not give the logits of {args.source}: a fault of ours, do not use it")
    print(f"wrote {args.out} in Hugging Face layout, {before.shape[1]} tokens have the same logits to the bit")


def parse(argv: list[str]):
    parser = run.Parser("Continue prompts with a LLaMA. `model.py convert IN OUT` writes any layout in Hugging Face's.")
    flag = parser.add_argument
    flag("directory", type=Path,
         help="weights directory in Hugging Face's or Meta's layout")
    flag("prompts", nargs="+", metavar="PROMPT",
         help="text to continue; several are continued one after the other")
    flag("--chat", action="store_true",
         help="each PROMPT is an instruction: put it into the directory's prompt template, print the answer alone")
    flag("--template", choices=sorted(text.TEMPLATES),
         help="prompt template of --chat (the one that the directory names, else plain)")
    flag("--max_new_tokens", type=run.whole(0), default=200,
         help="longest continuation in tokens")
    flag("--temperature", type=run.number(0), default=1.0,
         help="0 takes the likeliest token")
    flag("--top_k", type=run.whole(0), default=0,
         help="keep the k likeliest tokens (0 = all)")
    flag("--top_p", type=run.number(0, 1, above=True), default=1.0,
         help="keep the likeliest tokens that make up this probability (1 = all)")
    flag("--repetition_penalty", type=run.number(0, above=True), default=1.0,
         help="above 1 makes tokens already seen less likely")
    flag("--seed", type=run.whole(-2**31, 2**31), default=0,
         help="of sampling")
    flag("--dtype", choices=["auto", "fp32", "bf16", "fp16"], default="auto",
         help="auto: bf16 on CUDA, fp32 elsewhere")
    flag("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto",
         help="auto: cuda where there is one, else cpu")
    return parser.parse_intermixed_args(argv)  # a prompt may follow a flag


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["convert"]:
        return convert(argv[1:])
    args = parse(argv)
    note = partial(print, file=sys.stderr)
    config = plain_config(args.directory)
    tokenizer = text.Tokenizer(args.directory)
    text.check_tokenizer(tokenizer, config.vocab_size)
    stops = [tokenizer.eos_id]
    if args.chat:
        template = text.TEMPLATES[text.choose_template(args.directory, args.template, "plain", note)]
        stops.append(text.answer_end(tokenizer, template))
    device = run.choose_device(args.device)
    dtype = run.choose_dtype(args.dtype, device)
    if dtype == torch.bfloat16 and device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16") is False:
        note("note: this processor has no instructions for bf16, --dtype fp32 is faster")
    model = Llama.from_pretrained(args.directory, dtype, device).eval()
    model.stop_at(stops, tokenizer.bos_id)
    generator = torch.Generator(device).manual_seed(args.seed)
    for prompt in args.prompts:
        if args.chat:
            ids = text.encode_prompt([{"role": "user", "content": prompt}], tokenizer, template)
        else:
            ids = tokenizer.encode(prompt)
        steps = model.generate_steps([ids], args.max_new_tokens, args.temperature, args.top_k, args.top_p,
                                     generator=generator, repetition_penalty=args.repetition_penalty)
        answer = (one for _, new in steps for one in new)
        # A prompt that is shown is decoded with its answer as one stream, which keeps the space between them.
        for piece in tokenizer.stream(answer if args.chat else itertools.chain(ids, answer)):
            print(piece, end="", flush=True)
        print()


if __name__ == "__main__":
    run.command(main)
