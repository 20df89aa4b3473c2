r"""LLaMA in one file: config, transformer, KV cache, sampling, generation.

Touvron et al. 2023, "LLaMA: Open and Efficient Foundation Language Models" (arXiv 2302.13971). One block changes the
residual stream x (B, T, C) twice:

    h = norm(x)       x = x + wo softmax(q k^T / sqrt(D) + causal) v       q = rope(wq h)   k = rope(wk h)   v = wv h
    h = norm(x)       x = x + w2 (silu(w1 h) * w3 h)

with RMSNorm (Zhang & Sennrich 2019), rotary positions (Su et al. 2021), SwiGLU (Shazeer 2020) and no biases. Heads of a
small model (SHAPES["tiny"]: C = 256, H = 8, D = 32), where H / K = 2 query heads share one key head:

    q (B, T, 256) -> (B, 8, T, 32)   q0 q1  q2 q3  q4 q5  q6 q7
                                       \ /    \ /    \ /    \ /
    k (B, T, 128) -> (B, 4, T, 32)     k0     k1     k2     k3         v likewise

    python model.py DIR "Once upon a time" [--max_new_tokens 200 --temperature 0]     prints prompts and their continuations
    python model.py out/ppo --chat "Write a story about a fox and a kite."             answers by the directory's prompt template
    python model.py convert IN OUT                                                     writes any layout in Hugging Face's

Where this differs from the paper: grouped-query attention (Ainslie et al. 2023), tied embeddings and linear scaling of
positions (Chen et al. 2023) are read too, because later models of the family have them. Names are those of Meta's files
(wq, w1, tok_embeddings, ...); rotary embedding is the half-rotation of Hugging Face's files (data/weights.py).

Letters on reshaping lines: B batch, T time (tokens of this call), S slots of the cache that are in use (S = T without a
cache), C channels (dim), H query heads, K key/value heads, D head dim, V vocabulary.
"""

import copy
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
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
    rope_factor: float = 1.0    # positions are divided by it
    tie_embeddings: bool = False
    dtype: str = "float32"      # of the file that was read, and so of the file that will be written
    bos_id: int | None = 1
    eos_id: int | tuple[int, ...] | None = 2
    extra: dict = field(default_factory=dict)  # further keys for config.json, such as a reward model's "reward_mean"

    def __post_init__(self):
        vars(self).update(weights.check_config(dict(vars(self))))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension. F.rms_norm takes the mean in fp32 whatever x is."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rope_table(config: LlamaConfig, device=None) -> tuple[Tensor, Tensor]:
    """cos and sin of position / rope_factor * theta^(-2i/D), each (max_seq_len, D), laid out as `rotate` takes them.

    The operations come in transformers' order: at position 100,000 another rounding is another angle in the third decimal.
    """
    i = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32)
    frequency = 1.0 / config.rope_theta ** (i / config.head_dim) / config.rope_factor  # (D/2,)
    position = torch.arange(config.max_seq_len, device=device, dtype=torch.float32)
    angle = torch.outer(position, frequency)                                           # (max_seq_len, D/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (a, b) = (x[i], x[i + D/2]) by its angle: (a, b) cos + (b, a) (-sin, sin).
    x (..., T, D); cos and sin broadcast to it, sin is negative in its first half."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class Where(NamedTuple):
    """Where the tokens (B, T) of one call stand. It is the same for all layers; `Transformer.locate` makes it."""
    cos: Tensor                # (1 or B, 1, T, D), the angles of their positions
    sin: Tensor
    visible: Tensor | None     # (1 or B, 1, T, S), True where a token sees a slot; None: what is_causal says, or all
    is_causal: bool            # token t sees tokens 0 .. t
    row: Tensor                # (B, 1), numbers of the rows
    position: Tensor           # (1 or B, T), also the slots of the cache that the tokens go into
    slots: int                 # S


class Attention(nn.Module):
    """Multi-head attention. H / K query heads share one key head and one value head."""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.layer, self.n_heads, self.n_kv_heads, self.head_dim = layer, config.n_heads, config.n_kv_heads, config.head_dim
        self.wq = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wo = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)

    def forward(self, x: Tensor, where: Where, cache: "KVCache | None" = None) -> Tensor:
        B, T, _ = x.shape
        H, K, D = self.n_heads, self.n_kv_heads, self.head_dim
        q = self.wq(x).view(B, T, H, D).transpose(1, 2)                   # (B, H, T, D)
        k = self.wk(x).view(B, T, K, D).transpose(1, 2)                   # (B, K, T, D)
        v = self.wv(x).view(B, T, K, D).transpose(1, 2)                   # (B, K, T, D)
        q, k = rotate(q, where.cos, where.sin), rotate(k, where.cos, where.sin)
        if cache is not None:
            k, v = cache.write(self.layer, k, v, where)                   # (B, K, S, D), all that the rows have so far
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=where.visible, is_causal=where.is_causal, enable_gqa=H != K)
        return self.wo(y.transpose(1, 2).reshape(B, T, H * D))            # (B, H, T, D) -> (B, T, C)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, layer)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, where: Where, cache: "KVCache | None" = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), where, cache)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    """The network. With head=False it ends at the final norm, as the trunk of a reward model does."""

    def __init__(self, config: LlamaConfig, head: bool = True, generator: torch.Generator | None = None):
        super().__init__()
        self.config = config
        self.quantized: dict | None = None  # the scheme, where quantize.py has replaced the linears
        self.grad_checkpoint = False        # recompute each block in backward instead of keeping its activations
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False) if head else None
        if head and config.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight
        if self.device.type != "meta":
            self.init_weights(generator)
            self.make_rope()

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draws matrices from N(0, 1/dim). The two of a block that write to the residual stream (wo, w2) get 1/sqrt(2L) of
        that deviation, because its variance grows with the 2L additions (GPT-2). GPT-2's constant 0.02 fits a width of
        2500; the demo's 192 learns three times slower with it."""
        for name, p in self.named_parameters():
            if p.dim() == 1:
                nn.init.ones_(p)
            else:
                into_residual = name.endswith(("attention.wo.weight", "feed_forward.w2.weight"))
                std = (self.config.dim * (2 * self.config.n_layers if into_residual else 1)) ** -0.5
                nn.init.normal_(p, std=std, generator=generator)

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
               start: list[int] | None = None) -> Tensor:
        """The last block's output after the final norm, (B, T, C). `locate` says what each token sees."""
        where = self.locate(tokens, mask, start)
        x = self.tok_embeddings(tokens)                                     # (B, T, C)
        for layer in self.layers:
            if self.grad_checkpoint and torch.is_grad_enabled():
                x = checkpoint(layer, x, where, use_reentrant=False)        # non-reentrant: the embedding may be frozen (LoRA)
            else:
                x = layer(x, where, cache)
        return self.norm(x)

    def locate(self, tokens: Tensor, mask: Tensor | None = None, start: list[int] | None = None) -> Where:
        """Works out positions, angles and visibility, once a call for all layers.

            mask (. is padding)          with a cache and start = [3, 1]: the tokens new to row 0 are d and e
            .  .  a  b  c                slot     0  1  2  3  4
            position 0  1  2             row 0    a  b  c  d  e       d (position 3) sees slots 0 .. 3, e sees 0 .. 4
            c sees a, b, c               row 1    a  b  c  .  .       b (position 1) sees slots 0 .. 1, c sees 0 .. 2

        Padding may stand on either side. On the right it needs no mask, since no real token looks to its right.
        """
        (B, T), start = tokens.shape, start or [0] * len(tokens)
        slots = max(start) + T                        # `start` is a list, so nothing waits for a GPU
        even = min(start) == max(start)               # all rows stand at the same positions
        if slots > self.config.max_seq_len:
            raise ValueError(f"{slots} tokens do not fit the model's context of {self.config.max_seq_len}: shorten the text "
                             "or --max_len")
        slot = torch.arange(slots, device=tokens.device)                                                 # (S,)
        first = torch.tensor(start[:1] if even else start, device=tokens.device)                         # (1 or B,)
        position = first[:, None] + slot[:T]                                                             # (1 or B, T)
        is_causal, visible = mask is None and slots == T, None
        sees_all = mask is None and even and T == 1   # one token a row, the last of its row
        if not is_causal and not sees_all:
            visible = slot <= position[:, None, :, None]                                                 # (1 or B, 1, T, S)
        if mask is not None:
            itself = torch.eye(T, dtype=torch.bool, device=tokens.device)  # a softmax over no key would be NaN
            visible = visible & mask[:, None, None, :] | itself                                          # (B, 1, T, T)
            position = (mask.cumsum(1) - 1).clamp(min=0)                                                 # (B, T)
        dtype = self.norm.weight.dtype
        cos, sin = self.cos[position][:, None].to(dtype), self.sin[position][:, None].to(dtype)          # (1 or B, 1, T, D)
        row = torch.arange(B, device=tokens.device)[:, None]                                             # (B, 1)
        return Where(cos, sin, visible, is_causal, row, position, slots)


# ---- the cache ------------------------------------------------------------------------------------------------------

class KVCache:
    """The keys and values of all tokens so far, so that generation computes only those of the new ones.

    One tensor a layer, (2, rows, K, S, D): keys and values. The token at position p of a row lies in slot p:

        slot    0   1   2   3   4   5   6   7
        row 0   a   b   c   d   e   .   .   .      5 tokens so far: the next one goes into slot 5 and sees slots 0 .. 5
        row 1   a   b   x   x   x   .   .   .      2 tokens so far: the next one goes into slot 2 and sees slots 0 .. 2

    So rows of different length need no padding on the left. x is padding on the right of the first call; a later token
    overwrites it before any token can see it.
    """

    def __init__(self, config: LlamaConfig, rows: int, slots: int, dtype: torch.dtype, device):
        shape = (2, rows, config.n_kv_heads, slots, config.head_dim)
        self.kv = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]

    def write(self, layer: int, k: Tensor, v: Tensor, where: Where) -> tuple[Tensor, Tensor]:
        """Stores k and v (B, K, T, D) at their positions; returns those of all slots in use, (B, K, S, D) each."""
        kv = self.kv[layer]
        kv[:, where.row, :, where.position] = torch.stack((k, v)).permute(1, 3, 0, 2, 4)   # (B, T, 2, K, D)
        keys, values = kv[:, :, :, :where.slots]
        return keys, values

    def rows(self, first: int, last: int) -> "KVCache":
        """A view of rows first .. last - 1: what is written to it is written to this cache."""
        view = copy.copy(self)
        view.kv = [kv[:, first:last] for kv in self.kv]
        return view

    def keep(self, rows: list[int]) -> None:
        """Drops all rows but these, layer by layer, so that a second copy of the whole never exists."""
        for layer, kv in enumerate(self.kv):
            self.kv[layer] = kv[:, rows]


# ---- sampling and generation ----------------------------------------------------------------------------------------

def check_sampling(temperature: float, top_k: int, top_p: float, repetition_penalty: float = 1.0) -> None:
    """Raises ValueError naming the value that is out of range (NaN is out of every range)."""
    for name, value, fits, rule in (
            ("temperature", temperature, 0 <= temperature < math.inf, "a finite number of at least 0 (0 takes the likeliest token)"),
            ("top_k", top_k, top_k >= 0, "at least 0 (0 keeps all tokens)"),
            ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1 (1 keeps all tokens)"),
            ("repetition_penalty", repetition_penalty, 0 < repetition_penalty < math.inf, "above 0 (1 changes nothing)")):
        if not fits:
            raise ValueError(f"{name} is {value}, it must be {rule}")


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Makes tokens less likely that occurred already (CTRL, Keskar et al. 2019). logits (B, V), seen (B, V) True where so."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    """Sets all logits (B, V) but the k largest to -inf. It goes by place: in bf16 many logits are equal, and a comparison
    with the k-th value would keep more than k."""
    kept = logits.topk(top_k)
    return torch.full_like(logits, -math.inf).scatter(-1, kept.indices, kept.values)


def keep_top_p(logits: Tensor, top_p: float | Tensor) -> Tensor:
    """Keeps the smallest set of likeliest tokens whose probability reaches top_p, the token that crosses it included, and
    sets the other logits (B, V) to -inf (nucleus sampling, Holtzman et al. 2020). top_p is a number, or (B, 1)."""
    probs, order = logits.softmax(-1).sort(descending=True)     # (B, V), likeliest first
    likelier = probs.cumsum(-1) - probs                         # probability of all likelier tokens
    drop = (likelier >= top_p) & (top_p < 1)                    # rounding must not drop any at 1
    return logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -math.inf)


def sample(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0,
           generator: torch.Generator | None = None) -> Tensor:
    """Draws one id a row from logits (B, V) -> (B,). Temperature 0 is argmax. A row with NaN or infinity in it gives -1."""
    token = logits.argmax(-1)
    if temperature > 0:
        scaled = logits / max(temperature, 1e-30)  # 1e-40 would make logits infinite and probabilities NaN
        if 0 < top_k < logits.shape[-1]:
            scaled = keep_top_k(scaled, top_k)
        if top_p < 1:
            scaled = keep_top_p(scaled, top_p)
        # argmax(p / e) with e ~ Exp(1) is a draw from p (the exponential race), and a GPU is not waited for.
        race = torch.empty_like(scaled).exponential_(generator=generator)
        token = (scaled.softmax(-1) / race).argmax(-1)
    return torch.where(logits.amax(-1).isfinite(), token, -1)  # NaN anywhere in a row is its maximum


class Llama(Transformer):
    """The transformer as a language model: it writes text, and it is read from and written to directories."""

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], max_new_tokens: int | list[int], temperature: float = 1.0, top_k: int = 0,
                 top_p: float = 1.0, eos_id: int | Sequence[int] | None = None, generator: torch.Generator | None = None,
                 repetition_penalty: float = 1.0) -> list[list[int]]:
        """Continues each prompt; returns the new ids only, with EOS where it came.

        A row ends at eos_id (one id or any of several; None: the config's; -1: never), at max_new_tokens (one number, or
        one a prompt), or where prompt and answer fill the context (a prompt that fills it alone gives no new token).
        Raises ValueError for an empty prompt, one longer than the context, an id outside the vocabulary, or bad sampling
        values. Dropout is off only in eval(), as everywhere.
        """
        answers: list[list[int]] = [[] for _ in prompts]
        for rows, ids in self.generate_steps(prompts, max_new_tokens, temperature, top_k, top_p, eos_id, generator,
                                             repetition_penalty):
            for row, token in zip(rows, ids):
                answers[row].append(token)
        return answers

    @torch.inference_mode()
    def generate_steps(self, prompts: list[list[int]], max_new_tokens: int | list[int], temperature: float = 1.0,
                       top_k: int = 0, top_p: float = 1.0, eos_id: int | Sequence[int] | None = None,
                       generator: torch.Generator | None = None,
                       repetition_penalty: float = 1.0) -> Iterator[tuple[list[int], list[int]]]:
        """Yields (rows still running, their new ids) a step: first all prompts in one call, then one token a row and call.
        A finished row is not reported again. Finished rows leave the batch as soon as they are half of it."""
        check_sampling(temperature, top_k, top_p, repetition_penalty)
        limit, stops = self.room(prompts, max_new_tokens), self.stops(eos_id)
        rows = [i for i in range(len(prompts)) if limit[i] > 0]           # rows[b]: the prompt in row b of the batch
        if not rows:
            return
        tokens, real = (t.to(self.device) for t in text.pad([prompts[i] for i in rows]))                 # (B, T)
        slots = max(len(prompts[i]) + limit[i] for i in rows)
        cache = KVCache(self.config, len(rows), slots, self.norm.weight.dtype, self.device)
        seen = torch.zeros(len(rows), self.config.vocab_size, dtype=torch.bool, device=self.device)      # (B, V)
        for b, i in enumerate(rows):
            seen[b, prompts[i]] = True
        h = self.hidden(tokens, cache=cache)                                                             # (B, T, C)
        h = h[torch.arange(len(rows)), real.sum(1) - 1]                   # (B, C), of each row's last real token
        made, running = [0] * len(prompts), set(rows)
        while True:
            logits = self.output(h).float()                                                              # (B, V)
            if repetition_penalty != 1:
                logits = penalize_repetition(logits, seen, repetition_penalty)
            token = sample(logits, temperature, top_k, top_p, generator)                                 # (B,)
            ids = token.tolist()                                          # the one time a step that a GPU is waited for
            if min(ids) < 0:
                raise ValueError("the model gave non-finite logits: its weights or its dtype are broken (try --dtype fp32)")
            live = [(i, new) for i, new in zip(rows, ids) if i in running]
            yield [i for i, _ in live], [new for _, new in live]
            for i, new in live:
                made[i] += 1
                if new in stops or made[i] == limit[i]:
                    running.remove(i)
            if not running:
                return
            seen.scatter_(1, token[:, None], True)
            if 2 * len(running) <= len(rows):                             # not at every end: dropping rows copies the cache
                kept = [b for b, i in enumerate(rows) if i in running]
                rows, token, seen = [rows[b] for b in kept], token[kept], seen[kept]
                cache.keep(kept)
            start = [len(prompts[i]) + made[i] - 1 for i in rows]         # a finished row writes its last slot again
            h = self.hidden(token[:, None], cache=cache, start=start)[:, 0]                              # (B, C)

    def stops(self, eos_id: int | Sequence[int] | None) -> set[int]:
        """The ids that end an answer."""
        eos_id = self.config.eos_id if eos_id is None else eos_id
        if eos_id is None:
            return set()
        return {eos_id} if isinstance(eos_id, int) else set(eos_id)

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

    # ---- directories -------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, directory: str | Path, dtype: torch.dtype | None = None, device="cpu", head: bool = True) -> "Llama":
        """Reads a plain Hugging Face or Meta directory; dtype None keeps the file's. Raises ValueError or FileNotFoundError
        with a sentence when anything is missing, left over, cut short, or of another architecture."""
        if weights.quantization(directory):
            raise ValueError(f"{directory} is quantized: open it with quantize.open_model, not as a plain model")
        if not (Path(directory) / "config.json").exists() and (Path(directory) / "adapter_config.json").exists():
            raise ValueError(f"{directory} holds an adapter, not a model: open it with quantize.open_model, or merge it first "
                             f"with `python lora.py merge {directory} OUT`")
        config = LlamaConfig(**weights.read_config(directory))
        tensors = weights.read_tensors(directory, vars(config))
        if head and "score.weight" in tensors:  # with tied embeddings it would open as a language model, and babble
            raise ValueError(f"{directory} is a reward model, it has no words: open it with RewardModel.from_pretrained of rm.py")
        with torch.device("meta"):
            model = cls(config, head)
        weights.fill(model, tensors, dtype, device, directory, () if head else ("output.weight", "score.weight"))
        model.make_rope()
        return model

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes config.json and model.safetensors in Hugging Face layout, in the dtype of the file that was read."""
        if self.quantized:
            raise ValueError("the model is quantized: write it with quantize.save")
        weights.write_model(directory, vars(self.config), dict(self.named_parameters()))  # a tied head appears once


def random_model(config: LlamaConfig, dtype: torch.dtype, device, head: bool = True) -> Llama:
    """A model of random weights, made in `dtype`: for speed they are as good as others."""
    with torch.device("meta"):
        model = Llama(config, head)
    model = model.to(dtype).to_empty(device=device)
    model.init_weights()
    model.make_rope()
    return model


def shape(dim: int, n_layers: int, n_heads: int, n_kv_heads: int, ffn_dim: int, vocab_size: int = 32000,
          context: int = 2048) -> LlamaConfig:
    return LlamaConfig(dim, n_layers, n_heads, n_kv_heads, dim // n_heads, ffn_dim, vocab_size, context)


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
    "70B": shape(8192, 80, 64, 8, 28672, context=4096),
}


# ---- command line ---------------------------------------------------------------------------------------------------

@torch.no_grad()
def convert(argv: list[str]) -> None:
    """Writes a directory of any layout in Hugging Face's, in its own dtype, and compares the logits of both."""
    parser = run.Parser("Write a model of any plain layout in Hugging Face's (safetensors).", prog="model.py convert")
    parser.add_argument("source", type=Path, metavar="IN", help="weights directory to read")
    parser.add_argument("out", type=Path, metavar="OUT", help="directory to write, new or empty")
    args = parser.parse_args(argv)
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ValueError(f"{args.out} is there already and not empty: name a new directory")
    tokenizer = text.Tokenizer(args.source)
    model = Llama.from_pretrained(args.source).eval()
    tokens = torch.arange(min(64, model.config.max_seq_len))[None] % model.config.vocab_size             # (1, T), a fixed text
    before = model(tokens)
    model.save_pretrained(args.out)
    tokenizer.save(args.out, text.read_template(args.source))
    del model  # never two
    if not torch.equal(Llama.from_pretrained(args.out).eval()(tokens), before):
        raise ValueError(f"{args.out} does not give the logits of {args.source}: this is a fault of ours, do not use it")
    print(f"wrote {args.out} in Hugging Face layout, {before.shape[1]} tokens have the same logits to the bit")


def parse(argv: list[str]):
    parser = run.Parser("Continue prompts with a LLaMA. `model.py convert IN OUT` writes any layout in Hugging Face's.")
    parser.add_argument("directory", type=Path, help="weights directory, Hugging Face or Meta layout")
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="text to continue; several are continued one after the other")
    parser.add_argument("--chat", action="store_true",
                        help="each PROMPT is an instruction: put it into the directory's prompt template, print the answer alone")
    parser.add_argument("--max_new_tokens", type=run.whole(0), default=200, help="longest continuation in tokens")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token")
    parser.add_argument("--top_k", type=int, default=0, help="keep the k likeliest tokens (0 = all)")
    parser.add_argument("--top_p", type=float, default=1.0, help="keep the likeliest tokens that make up this probability (1 = all)")
    parser.add_argument("--repetition_penalty", type=float, default=1.0, help="above 1 makes tokens already seen less likely")
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    parser.add_argument("--dtype", choices=["auto", "fp32", "bf16", "fp16"], default="auto",
                        help="auto: bf16 on CUDA, fp32 elsewhere")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto",
                        help="auto: cuda where there is one, else cpu")
    args = parser.parse_intermixed_args(argv)  # a prompt may follow a flag
    check_sampling(args.temperature, args.top_k, args.top_p, args.repetition_penalty)  # before minutes of loading
    return args


def open_plain(directory: Path, dtype: torch.dtype, device: torch.device) -> tuple[Llama, text.Tokenizer]:
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} does not exist: name a weights directory")
    if weights.quantization(directory) or (directory / "adapter_config.json").exists():
        raise ValueError(f"{directory} is quantized or holds an adapter, here only plain models are opened: "
                         f"python serve.py {directory} --say \"...\"")
    tokenizer = text.Tokenizer(directory)
    model = Llama.from_pretrained(directory, dtype, device).eval()
    text.check_tokenizer(tokenizer, model.config.vocab_size)
    return model, tokenizer


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["convert"]:
        return convert(argv[1:])
    args = parse(argv)
    device = run.choose_device(args.device)
    model, tokenizer = open_plain(args.directory, run.choose_dtype(args.dtype, device), device)
    named = text.read_template(args.directory) if args.chat else None
    template = text.TEMPLATES.get(named, text.TEMPLATES["plain"])
    generator = torch.Generator(device).manual_seed(args.seed)
    for prompt in args.prompts:
        ids = shown = tokenizer.encode(prompt)
        if args.chat:
            ids, shown = text.encode_prompt([{"role": "user", "content": prompt}], tokenizer, template), []
        steps = model.generate_steps([ids], args.max_new_tokens, args.temperature, args.top_k, args.top_p,
                                     [tokenizer.eos_id, *model.stops(None)], generator, args.repetition_penalty)
        # Decoding prompt and answer as one stream keeps the space between them.
        for piece in tokenizer.stream(itertools.chain(shown, (token for _, new in steps for token in new))):
            print(piece, end="", flush=True)
        print()


if __name__ == "__main__":
    run.command(main)
