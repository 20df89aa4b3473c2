"""model.py against numpy by hand, the reference logits in shared/real, and itself by another way."""

import inspect
import itertools
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lora
import model as M
import quantize
from data.text import TEMPLATES, Tokenizer, encode_prompt
from data.text import main as train_tokenizer
from data.weights import DTYPES, quantization, read_tensors
from model import KVCache, Llama, LlamaConfig, sample

REAL = Path(__file__).parents[2] / "shared" / "real"
STORIES = REAL / "stories260K"
DEMO = Path(M.__file__).parent / "data" / "demo"
needs_real = pytest.mark.skipif(not STORIES.exists(), reason=f"needs the real weights in {STORIES}")
SIZES = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=44, vocab_size=64, max_seq_len=64)


def bf16_fails() -> str:
    """Why torch itself cannot multiply in bf16 on this processor; empty where it can."""
    try:
        F.linear(torch.ones(2, 32, dtype=torch.bfloat16), torch.ones(64, 32, dtype=torch.bfloat16))
    except RuntimeError as error:
        return f"F.linear fails in bf16 on this processor: {error}"
    return ""


needs_bf16 = pytest.mark.skipif(bool(bf16_fails()), reason=bf16_fails())


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny(seed: int = 0, **sizes) -> Llama:
    """Random, with norms that are not 1 and logits far enough apart for argmax to be the same by every way."""
    model = Llama(LlamaConfig(**SIZES | sizes), generator=seeded(seed)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2.5) if p.dim() == 2 else p.add_(torch.randn(p.shape, generator=seeded(seed)), alpha=0.2)
            p.data = p.to(DTYPES[model.config.dtype])
    return model


def some(n: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 64, (n,), generator=seeded(100 * seed + n)).tolist()


PROMPTS = [some(3), some(9), some(17)]


@torch.no_grad()
def logits(model: Llama, ids: list[int]) -> Tensor:
    return model(torch.tensor([ids]))[0]


def markov(successors: dict[int, int], sizes: list[int] | None = None, vocab: int = 16) -> Llama:
    """A scripted model: the logits after token i are row i of a table, whatever came before. `sizes` notes batches."""
    model = tiny(dim=vocab, vocab_size=vocab)
    table = torch.zeros(vocab, vocab)
    for token, successor in successors.items():
        table[token, successor] = 9.0
    model.output.weight.data = table.T.contiguous()

    def hidden(tokens: Tensor, at: tuple | None = None, **_) -> Tensor:
        if sizes is not None:
            sizes.append(len(tokens))
        h = F.one_hot(tokens, vocab).float()
        return h if at is None else h[at]
    model.hidden = hidden
    return model


# ---- formulas -------------------------------------------------------------------------------------------------------

def slowed(frequency: float, scaling: tuple[float, ...]) -> float:
    """One pair's frequency, case by case, by wavelengths in tokens as Meta's own code has it."""
    factor, low, high, context = (*scaling, 1, 4, 0)[:4] if scaling else (1, 1, 4, 0)  # linear: all waves are long
    wavelength = 2 * math.pi / frequency
    if wavelength < context / high:
        return frequency
    if wavelength > context / low:
        return frequency / factor
    smooth = (context / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / factor + smooth * frequency


def by_hand(model: Llama, ids: list[int]) -> np.ndarray:
    """The whole forward pass in numpy and fp64, head by head and pair by pair."""
    c = model.config
    w = {name: p.detach().double().numpy() for name, p in model.named_parameters()}

    def norm(x, name):
        return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + c.norm_eps) * w[name]

    def turn(x):  # (T, D)
        out = x.copy()
        for p, i in np.ndindex(len(x), c.head_dim // 2):
            angle, j = p * slowed(c.rope_theta ** (-2 * i / c.head_dim), c.rope_scaling), i + c.head_dim // 2
            out[p, i] = x[p, i] * math.cos(angle) - x[p, j] * math.sin(angle)
            out[p, j] = x[p, i] * math.sin(angle) + x[p, j] * math.cos(angle)
        return out

    x = w["tok_embeddings.weight"][ids]
    for layer in range(c.n_layers):
        at = f"layers.{layer}."
        h, heads = norm(x, at + "attention_norm.weight"), []
        for head in range(c.n_heads):
            own = slice(head * c.head_dim, (head + 1) * c.head_dim)
            shared = slice(own.start // c.head_dim * c.n_kv_heads // c.n_heads * c.head_dim, None)
            q = turn(h @ w[at + "attention.wq.weight"][own].T)
            k = turn(h @ w[at + "attention.wk.weight"][shared][:c.head_dim].T)
            score = np.einsum("qd,kd->qk", q, k) / math.sqrt(c.head_dim)
            score = np.exp(np.where(np.tri(len(ids), dtype=bool), score, -np.inf) - score.max())
            v = h @ w[at + "attention.wv.weight"][shared][:c.head_dim].T
            heads.append(score / score.sum(-1, keepdims=True) @ v)
        x = x + np.concatenate(heads, -1) @ w[at + "attention.wo.weight"].T
        h = norm(x, at + "ffn_norm.weight")
        a, b = h @ w[at + "feed_forward.w1.weight"].T, h @ w[at + "feed_forward.w3.weight"].T
        x = x + (a / (1 + np.exp(-a)) * b) @ w[at + "feed_forward.w2.weight"].T
    return norm(x, "norm.weight") @ w.get("output.weight", w["tok_embeddings.weight"]).T


@pytest.mark.lesson
@pytest.mark.parametrize("sizes", [
    {}, dict(n_kv_heads=4, head_dim=6), dict(n_kv_heads=1, tie_embeddings=True),
    dict(n_layers=1, rope_scaling=(4.0,), rope_theta=500.0),
    dict(n_layers=1, rope_scaling=(8.0, 1.0, 4.0, 64), rope_theta=500.0),  # pairs of waves 6, 30, 140 and 664 tokens
])
def test_forward_is_the_formula(sizes):
    model = tiny(**sizes)
    np.testing.assert_allclose(logits(model, some(20)).numpy(), by_hand(model, some(20)), atol=2e-4)


@pytest.mark.lesson
def test_norm_divides_by_the_root_mean_square():
    norm, x = M.RMSNorm(3, 1.0), torch.tensor([[1.0, 2.0, 4.0]])
    norm.weight.data = torch.tensor([1.0, 1.0, 10.0])
    assert torch.allclose(norm(x), torch.tensor([[1.0, 2.0, 40.0]]) / math.sqrt(7 + 1))  # mean of squares 7, eps 1
    big = torch.full((1, 3), 300.0, dtype=torch.float16)  # its square is beyond fp16
    assert torch.equal(norm.half()(big), torch.tensor([[1.0, 1.0, 10.0]]).half())


@pytest.mark.lesson
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mean_of_the_norm_is_in_fp32(dtype):
    """A sum in bf16 stops at 256: 1 more is rounded away."""
    norm = M.RMSNorm(4096, 1e-6).to(dtype)
    assert torch.equal(norm(torch.ones(1, 4096, dtype=dtype)), torch.ones(1, 4096, dtype=dtype))


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_norm_and_its_gradient_are_those_in_fp64(dtype, bound):
    g = seeded(0)
    x, dy = (torch.randn(2, 5, 24, generator=g).to(dtype) for _ in range(2))
    norm = M.RMSNorm(24, 1e-2).to(dtype)
    norm.weight.data = torch.randn(24, generator=g).to(dtype)
    x64, w64 = (t.detach().double().requires_grad_() for t in (x, norm.weight))
    y64 = x64 * torch.rsqrt(x64.square().mean(-1, keepdim=True) + 1e-2) * w64
    y64.backward(dy.double())
    y = norm(x.requires_grad_())
    y.backward(dy)
    for ours, exact in ((y, y64), (x.grad, x64.grad), (norm.weight.grad, w64.grad)):
        assert ours.dtype == dtype and (ours.double() - exact).abs().max() <= bound * exact.abs().max()


@pytest.mark.lesson
def test_rotation_turns_each_pair_by_its_angle():
    cos, sin = torch.tensor([0.0, 1.0, 0.0, 1.0]), torch.tensor([-1.0, 0.0, 1.0, 0.0])  # a quarter, and nothing
    turned = M.rotate(torch.tensor([1.0, 2.0, 3.0, 4.0]), cos, sin)
    assert torch.allclose(turned, torch.tensor([-3.0, 2.0, 1.0, 4.0]), atol=1e-6)


@pytest.mark.lesson
def test_feed_forward_of_one_number():
    ff = tiny(dim=1, ffn_dim=1, vocab_size=4).layers[0].feed_forward
    ff.w1.weight.data[:], ff.w2.weight.data[:], ff.w3.weight.data[:] = 2.0, 3.0, 5.0
    assert ff(torch.ones(1)).item() == pytest.approx(3 * (2 / (1 + math.exp(-2))) * 5)


@pytest.mark.lesson
def test_initial_deviation_of_every_matrix():
    """llama2.c scales w3, which does not write to the residual stream, and leaves w2, which does."""
    sizes = SIZES | dict(dim=128, n_layers=8, ffn_dim=200, n_heads=8, head_dim=16, n_kv_heads=8, vocab_size=500)
    model = Llama(LlamaConfig(**sizes), generator=seeded(0))
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert torch.equal(p, torch.ones_like(p)), name
        else:
            share = 1 / math.sqrt(2 * 8) if name.endswith(("wo.weight", "w2.weight")) else 1
            assert p.std().item() * math.sqrt(128) == pytest.approx(share, rel=0.03), name
    again = Llama(model.config, generator=seeded(0))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


@pytest.mark.lesson
def test_where_tokens_stand_as_in_the_docstring():
    model = tiny()
    left = model.locate(torch.zeros(1, 5, dtype=torch.long), torch.tensor([[False, False, True, True, True]]))
    assert left.position.tolist() == [[0, 0, 0, 1, 2]]
    assert left.visible[0, 0].int().tolist() == [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0],
                                                 [0, 0, 1, 1, 1]]
    going_on = model.locate(torch.zeros(2, 2, dtype=torch.long), start=[3, 1])
    assert going_on.position.tolist() == [[3, 4], [1, 2]] and going_on.slots == 5
    assert going_on.visible[:, 0].int().tolist() == [[[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]],
                                                     [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]]
    for start, T, is_causal in ((None, 4, True), ([0, 0], 4, True), ([7, 7], 1, False)):  # these need no mask
        where = model.locate(torch.zeros(2, T, dtype=torch.long), start=start)
        assert where.visible is None and where.is_causal == is_causal and len(where.position) == 1


# ---- equalities -----------------------------------------------------------------------------------------------------

def test_gradient_checkpointing_changes_no_gradient():
    model, gradients = tiny(), []
    for model.grad_checkpoint in (False, True):
        model.zero_grad()
        model(torch.tensor([some(12)])).logsumexp(-1).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) and a.abs().sum() > 0 for a, b in zip(*gradients))


@pytest.mark.parametrize("recompute", [False, True])
def test_hidden_states_of_some_tokens_are_those_of_all(recompute):
    """And their gradients: the last block leaves out what only the others need."""
    model, tokens = tiny(), torch.tensor([some(12), some(12)[::-1]])
    at = torch.tensor([0, 1, 1]), torch.tensor([3, 0, 11])
    model.grad_checkpoint = recompute
    gradients = []
    for h in (model.hidden(tokens)[at], model.hidden(tokens, at=at)):
        model.zero_grad()
        h.square().mean().backward()
        gradients.append([h.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert all(torch.allclose(a, b, atol=1e-5) and a.any() for a, b in zip(*gradients))


@pytest.mark.lesson
def test_padding_changes_nothing():
    model = tiny()
    for ids in PROMPTS:
        alone = logits(model, ids)
        for pads, left in ((0, 0), (4, 4), (4, 0), (47, 0), (47, 47), (20, 7)):
            for pad_id in (0, 2, 63):
                row = [pad_id] * left + ids + [pad_id] * (pads - left)
                mask = torch.zeros(1, len(row), dtype=torch.bool)
                mask[0, left:left + len(ids)] = True
                with torch.no_grad():
                    out = model(torch.tensor([row]), mask)[0]
                assert torch.isfinite(out).all() and torch.allclose(out[left:left + len(ids)], alone, atol=1e-5)
                if not left:  # right padding needs no mask
                    assert torch.allclose(logits(model, row)[:len(ids)], alone, atol=1e-5)
        for cut in range(1, len(ids)):
            assert torch.allclose(logits(model, ids[:cut]), alone[:cut], atol=1e-5)
        mask = torch.ones(1, 2 * len(ids), dtype=torch.bool)  # holes in the middle, where wrong positions would show
        mask[0, 1:2 * len(ids):2] = False
        with torch.no_grad():
            out = model(torch.tensor([ids]).repeat_interleave(2, 1), mask)[0, ::2]
            one = model(torch.tensor([ids[:1], ids[:1]]), torch.tensor([[True], [False]]))
        assert torch.allclose(out, alone, atol=1e-5)
        assert torch.allclose(one[0], alone[:1], atol=1e-5) and torch.isfinite(one).all()  # a row of padding alone
    with pytest.raises(ValueError, match="65 tokens do not fit the model's context of 64"):
        logits(model, some(65))


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_do_not_reach_across_padding(tied):
    """Left padding in a batch gives the gradients of the rows alone, and none of them is NaN."""
    model, gradients = tiny(tie_embeddings=tied), []
    tokens, mask = torch.zeros(3, 17, dtype=torch.long), torch.zeros(3, 17, dtype=torch.bool)
    for b, ids in enumerate(PROMPTS):
        tokens[b, 17 - len(ids):], mask[b, 17 - len(ids):] = torch.tensor(ids), True
    for loss in (lambda: model(tokens, mask)[mask].logsumexp(-1).sum(),
                 lambda: sum(model(torch.tensor([ids])).logsumexp(-1).sum() for ids in PROMPTS)):
        model.zero_grad()
        loss().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for batched, alone in zip(*gradients):
        assert torch.allclose(batched, alone, atol=1e-4 * alone.abs().max().item())


@pytest.mark.lesson
@pytest.mark.parametrize("kv_heads", [4, 2])
@torch.no_grad()
def test_cache_equals_no_cache(kv_heads):
    """Rows of unequal and of equal length, then one token, then several: what lies beyond a row's end is never seen."""
    model = tiny(n_kv_heads=kv_heads)
    for lengths in ((4, 10), (10, 10)):
        rows, start = [some(n + 16, n) for n in lengths], list(lengths)
        cache = KVCache(model.config, 2, 30, torch.float32, "cpu")
        padded = [row[:n] + [5] * (10 - n) for row, n in zip(rows, start)]
        h = model.hidden(torch.tensor(padded), cache=cache)
        got = [[h[b, :n]] for b, n in enumerate(start)]
        for steps in (1, 3, 1, 5, 6):
            tokens = torch.tensor([row[s:s + steps] for row, s in zip(rows, start)])
            h = model.hidden(tokens, cache=cache, start=start)
            start = [s + steps for s in start]
            for b in range(2):
                got[b].append(h[b])
        for b in range(2):
            assert torch.allclose(torch.cat(got[b]), model.hidden(torch.tensor([rows[b]]))[0], atol=1e-5)


def test_a_model_is_opened_without_the_compiler(tmp_path):
    """PyTorch imports it to draw numbers on the meta device, which takes more than a second at every start."""
    tiny().save_pretrained(tmp_path)
    code = f"import sys, quantize; quantize.open_model({str(tmp_path)!r}); sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(M.__file__).parent).returncode == 0


@pytest.mark.parametrize("kv_heads, start", [(4, [4, 10]), (2, [4, 10]), (4, [10])])
@torch.no_grad()
def test_the_step_that_a_graph_records_is_a_decoding_step(kv_heads, start):
    """It looks at all slots and hides the empty ones, rows at their own positions; a graph itself needs a GPU."""
    model = tiny(n_kv_heads=kv_heads)
    padded = torch.tensor([some(n, n) + [5] * (10 - n) for n in start])
    caches = [KVCache(model.config, len(start), 16, torch.float32, "cpu") for _ in range(2)]
    for cache in caches:
        model.hidden(padded, cache=cache)
    for step in range(6):
        token, at = torch.tensor([[7 + step], [9 + step]][:len(start)]), [n + step for n in start]
        expected = model.hidden(token, cache=caches[0], start=at)
        got = model.hidden(token, cache=caches[1], start=torch.tensor(at)[:, None])
        assert torch.allclose(got, expected, atol=1e-5)


@needs_bf16
@torch.no_grad()
def test_cache_equals_no_cache_in_bf16():
    for sizes in ({}, dict(n_kv_heads=4, tie_embeddings=True)):
        model = tiny(dtype="bfloat16", **sizes)
        ids = torch.tensor([some(9), some(9)[::-1]])
        whole = model(ids)
        cache = KVCache(model.config, 2, 12, torch.bfloat16, "cpu")
        model.hidden(ids[:, :5], cache=cache)
        for t in range(5, 9):
            h = model.hidden(ids[:, t:t + 1], cache=cache, start=[t, t])[:, 0]
            assert h.dtype == torch.bfloat16
            assert (model.output(h) - whole[:, t]).abs().max() < 0.05 * whole.abs().max()


@pytest.mark.parametrize("kv_heads", [4, 2])
@torch.no_grad()
def test_views_of_a_cache_are_its_rows(kv_heads):
    """The calls of a server: a chunk of a prompt on one row, then one token each on rows of unequal length."""
    model = tiny(n_kv_heads=kv_heads)
    texts = {3: some(20, 1), 1: some(9, 2), 2: some(9, 3)}                      # row of the cache -> its ids
    cache, got = KVCache(model.config, 4, 64, torch.float32, "cpu"), {}
    for rows, start, T in (([3], [0], 12), ([1, 2], [0, 0], 7), ([2], [7], 1), ([1], [7], 1), ([3], [12], 7),
                           ([1, 2, 3], [8, 8, 19], 1)):
        tokens = torch.tensor([texts[row][s:s + T] for row, s in zip(rows, start)])
        h = model.hidden(tokens, cache=cache.rows(rows[0], rows[-1] + 1), start=start)
        for b, row in enumerate(rows):
            got.setdefault(row, []).append(h[b])
    for row, ids in texts.items():
        assert torch.allclose(torch.cat(got[row]), model.hidden(torch.tensor([ids]))[0], atol=1e-5)
    assert not any(kv[:, 0].any() for kv in cache.kv)                           # the row that no view held
    cache.keep([3, 1])
    h = model.hidden(torch.tensor([[5], [6]]), cache=cache, start=[20, 9])
    for b, ids in enumerate((texts[3] + [5], texts[1] + [6])):
        assert torch.allclose(h[b, 0], model.hidden(torch.tensor([ids]))[0, -1], atol=1e-5)


# ---- generation -----------------------------------------------------------------------------------------------------

def greedy_by_recomputing(model: Llama, ids: list[int], steps: int, penalty: float = 1.0) -> list[int]:
    ids = list(ids)
    for _ in range(steps):
        x = logits(model, ids)[-1]
        for i in set(ids):
            x[i] = x[i] / penalty if x[i] > 0 else x[i] * penalty
        ids.append(x.argmax().item())
    return ids[-steps:]


def test_greedy_batched_cached_is_single_uncached():
    model = tiny()
    expected = [greedy_by_recomputing(model, ids, 40) for ids in PROMPTS]
    assert len({tuple(answer) for answer in expected}) == 3 and all(len(set(answer)) > 5 for answer in expected)
    assert model.generate(PROMPTS, 40, 0, eos_id=-1) == expected
    assert model.generate(PROMPTS, 40, 0, top_k=5, top_p=0.3, eos_id=-1) == expected
    assert [model.generate([ids], 40, 0, eos_id=-1)[0] for ids in PROMPTS[::-1]] == expected[::-1]
    assert model.generate(PROMPTS, [7, 0, 40], 0, eos_id=-1) == [expected[0][:7], [], expected[2]]
    cut = [answer[:n] for answer, n in zip(expected, (10, 10, 2))]
    assert model.generate(PROMPTS, [10, 10, 2], 0, eos_id=-1) == cut  # row 2 ends at the last slot
    penalized = [greedy_by_recomputing(model, ids, n, 1.5) for n, ids in zip((2, 3, 30), PROMPTS)]
    assert model.generate(PROMPTS, [2, 3, 30], 0, eos_id=-1, repetition_penalty=1.5) == penalized


@pytest.mark.lesson
def test_a_repetition_penalty_lowers_what_was_seen():
    """A positive logit is divided, however small it is: multiplied it would become likelier."""
    logits = torch.tensor([[3.0, 0.5, -0.5, 0.0, 3.0], [3.0, 0.5, -0.5, 0.0, 3.0]])
    seen = torch.tensor([[True, True, True, True, False], [False] * 4 + [True]])
    expected = [[1.5, 0.25, -1.0, 0.0, 3.0], [3.0, 0.5, -0.5, 0.0, 1.5]]
    assert M.penalize_repetition(logits, seen, 2.0).tolist() == expected


def test_steps_have_the_defaults_of_generate():
    whole, steps = (inspect.signature(function).parameters for function in (Llama.generate, Llama.generate_steps))
    assert {name: whole[name].default for name in whole} == {name: steps[name].default for name in steps}


def test_padding_of_the_prompts_is_no_token_that_was_seen():
    """Prompts are padded with id 0; a penalty on 0 would change what a short prompt gets."""
    model = markov({5: 0})
    model.output.weight.data[1, 5] = 8.0  # after 5 comes 0 (9), or 1 (8) where 0 is penalized
    assert model.generate([[5], [5, 5, 5]], 1, 0, eos_id=-1, repetition_penalty=1.5) == [[0], [0]]


def test_a_prompt_of_several_rows_is_computed_once(monkeypatch):
    model, prompts, shapes = tiny(), [[5, 6, 7], [5, 6, 7], [8], [5, 6, 7]], []
    alone = [model.generate([prompt], 6, 0, eos_id=-1)[0] for prompt in prompts]
    real = model.hidden

    def hidden(tokens: Tensor, **rest) -> Tensor:
        shapes.append(tuple(tokens.shape))
        return real(tokens, **rest)
    monkeypatch.setattr(model, "hidden", hidden)
    assert model.generate(prompts, 6, 0, eos_id=-1) == alone
    assert shapes == [(2, 3)] + [(4, 1)] * 5


def test_finished_rows_leave_and_the_others_do_not_notice():
    sizes = []
    model = markov({3: 4, 4: 2, 5: 6, 6: 7, 7: 8, 8: 9, 9: 10, 10: 11, 11: 2, 12: 13, 13: 12}, sizes)
    assert model.generate([[3], [5]], 50, 0) == [[4, 2], [6, 7, 8, 9, 10, 11, 2]]
    assert sizes == [2, 2, 1, 1, 1, 1, 1]  # seven steps, not fifty; the ended row is gone
    steps = list(model.generate_steps([[3], [5], [12]], 3, 0))
    assert steps == [([0, 1, 2], [4, 6, 13]), ([0, 1, 2], [2, 7, 12]), ([1, 2], [8, 13])]
    assert model.generate([[4]], 3, 0, eos_id=-1) == [[2, 0, 0]]
    real, alone = tiny(), [tiny().generate([ids], 40, 0, eos_id=-1)[0] for ids in PROMPTS]
    eos = alone[0][1]  # ends row 0 early
    cut = [answer[:answer.index(eos) + 1] if eos in answer else answer for answer in alone]
    assert real.generate(PROMPTS, 40, 0, eos_id=eos) == cut and len(cut[0]) <= 2 < max(map(len, cut))


@pytest.mark.parametrize("eos_id, answers", [
    (2, [[4, 2], [6, 7, 8, 2]]), (7, [[4, 2, 0, 0, 0], [6, 7]]), ([7, 4], [[4], [6, 7]]),
    ((8,), [[4, 2, 0, 0, 0], [6, 7, 8]]), (-1, [[4, 2, 0, 0, 0], [6, 7, 8, 2, 0]]),
])
def test_an_answer_ends_at_any_eos(eos_id, answers):
    """A list of EOS ids in config.json was cut to its first, and generation went on after the others."""
    model = markov({3: 4, 4: 2, 5: 6, 6: 7, 7: 8, 8: 2})
    assert model.generate([[3], [5]], 5, 0, eos_id=eos_id) == answers
    model.config.eos_id = None if eos_id == -1 else eos_id
    assert model.generate([[3], [5]], 5, 0) == answers


@pytest.mark.parametrize("before, after", [(None, (4, 7)), (7, (7, 4)), ((2, 7), (2, 7, 4))])
def test_ids_that_end_an_answer_are_added_and_saved(before, after, tmp_path):
    model = markov({3: 4, 4: 2, 5: 6, 6: 7}, vocab=16)
    model.config.eos_id = before
    model.stop_at([4, 7, 4])
    assert model.config.eos_id == after and model.generate([[3], [5]], 5, 0) == [[4], [6, 7]]
    model.save_pretrained(tmp_path)
    assert Llama.from_pretrained(tmp_path).config.eos_id == after


@pytest.mark.parametrize("bos, eos, after", [
    (0, 1, (1, 2)), (1, 1, (1, 2)), (1, (2, 7), (1, (2, 7))), (3, 7, (1, (7, 2)))])
def test_bos_and_eos_are_those_of_the_tokenizer(bos, eos, after):
    """An old conversion had BOS 0 and EOS 1 in config.json, beside a tokenizer with 1 and 2. They were written back."""
    model = markov({3: 4}, vocab=16)
    model.config = replace(model.config, bos_id=bos, eos_id=eos)
    model.stop_at([2], bos_id=1)
    assert (model.config.bos_id, model.config.eos_id) == after


def test_the_context_is_the_limit():
    model = tiny(max_seq_len=32)
    answers = model.generate([some(30), some(32), some(2)], 50, 0, eos_id=-1)
    assert answers[:2] == [greedy_by_recomputing(model, some(30), 2), []] and len(answers[2]) == 30
    assert [len(answer) for answer in model.generate([some(2), some(31)], 50, eos_id=-1)] == [30, 1]
    assert model.generate([], 5) == []


def test_sampling_is_reproducible_and_leaves_the_global_state_alone():
    model, before = tiny(), torch.get_rng_state()
    a, b, c = (model.generate(PROMPTS, 20, 1.0, 50, 0.99, -1, seeded(seed), 1.1) for seed in (1, 1, 2))
    assert a == b != c and torch.equal(torch.get_rng_state(), before)
    assert model.generate(PROMPTS, 20, eos_id=-1) != model.generate(PROMPTS, 20, eos_id=-1)


def expected_probs(row: np.ndarray, temperature: float, top_k: int, top_p: float, seen: list[int], penalty: float):
    row = row.astype(np.float64).copy()
    for i in seen:
        row[i] = row[i] / penalty if row[i] > 0 else row[i] * penalty
    p = np.exp(row / temperature) / np.exp(row / temperature).sum()
    order = np.argsort(-p)
    kept = list(order[:top_k or None])
    p = np.where(np.isin(np.arange(len(p)), kept), p, 0) / p[kept].sum()
    total, nucleus = 0.0, []
    for i in kept:
        nucleus.append(i)
        total += p[i]
        if total >= top_p:
            break
    return np.where(np.isin(np.arange(len(p)), nucleus), p, 0) / p[nucleus].sum()


@pytest.mark.lesson
@pytest.mark.parametrize("temperature, top_k, top_p, penalty", [
    (1.0, 0, 1.0, 1.0), (0.5, 0, 1.0, 1.0), (2.0, 3, 1.0, 1.0), (1.0, 0, 0.7, 1.0), (1.0, 0, 0.01, 1.0),
    (1.5, 5, 0.8, 1.0), (1.0, 100, 1.0, 1.0), (1.0, 0, 1.0, 2.0), (0.7, 4, 0.9, 1.3), (1.0, 1, 1.0, 0.5),
])
def test_sampling_follows_the_table(temperature, top_k, top_p, penalty):
    """40,000 rows that have seen 3 (positive logit) and 5 (negative); five standard deviations are below 0.0125."""
    table = torch.tensor([0.3, -1.0, 0.0, 1.4, -2.0, -0.5, 2.0, 0.9])
    model = markov({}, vocab=8)
    model.output.weight.data[:, 5] = table
    drawn = model.generate([[3, 5]] * 40_000, 1, temperature, top_k, top_p, -1, seeded(0), penalty)
    p = expected_probs(table.numpy(), temperature, top_k, top_p, [3, 5], penalty)
    share = np.bincount(np.array(drawn)[:, 0], minlength=8) / len(drawn)
    assert np.abs(share - p).max() < 0.0125 and not share[p == 0].any() and share[p > 1e-3].all()


@pytest.mark.lesson
def test_top_p_of_each_row():
    x, top_p = 3 * torch.randn(50, 40, generator=seeded(0)), torch.linspace(0.02, 1, 50)[:, None]
    rows = M.keep_top_p(x, top_p)
    for row, logit, p in zip(rows, x, top_p.flatten().tolist()):
        assert torch.equal(row, M.keep_top_p(logit[None], p)[0])
        kept = logit.softmax(-1)[row.isfinite()].sort(descending=True).values
        assert kept.sum() > p - 1e-6 and kept[:-1].sum() < p + 1e-6  # it reaches p, and not before its last token
    assert torch.equal(rows[-1], x[-1])
    rare = torch.tensor([[0.0, -30.0], [-30.0, 0.0]])  # in fp32 the likelier token alone sums up to 1
    assert torch.equal(M.keep_top_p(rare, 1.0), rare) and torch.equal(M.keep_top_p(rare, torch.ones(2, 1)), rare)


@pytest.mark.lesson
def test_sampling_at_the_edges():
    x = torch.randn(200, 50, generator=seeded(0))
    for temperature in (0, 1e-40, 1e-300, 1e-5):
        assert torch.equal(sample(x, temperature), x.argmax(-1))
    assert torch.equal(sample(x, 1.0, top_k=1), x.argmax(-1)) and torch.equal(sample(x, 1.0, top_p=1e-9), x.argmax(-1))
    assert len(sample(torch.zeros(500, 8), 1.0, top_k=3).unique()) == 3  # equal logits are still only three
    assert len(sample(torch.zeros(500, 8), 1.0).unique()) == 8
    for broken, temperature in itertools.product((math.nan, math.inf), (0.0, 1.0)):
        logits = torch.tensor([[0.0, broken], [-math.inf, 1.0], [broken, 0.0]])
        assert sample(logits, temperature).tolist() == [-1, 1, -1]


# ---- runs -----------------------------------------------------------------------------------------------------------

def saved(directory: Path, template: str | None = None, **sizes) -> Path:
    """A directory with a model and the demo's tokenizer."""
    tokenizer = Tokenizer(DEMO)
    tiny(**dict(vocab_size=tokenizer.vocab_size) | sizes).save_pretrained(directory)
    tokenizer.save(directory, template)
    return directory


@needs_real
@pytest.mark.parametrize("layout", ["hf", "hf-sharded", "hf-bin", "meta", "meta-mp2"])
def test_real_weights_give_the_reference(layout):
    model, tokenizer = Llama.from_pretrained(STORIES / layout), Tokenizer(STORIES / layout)
    reference = np.load(STORIES / "reference.npz")
    for i in range(4):
        ours = logits(model, reference[f"ids_{i}"].tolist()).numpy()
        np.testing.assert_allclose(ours, reference[f"logits_{i}"], atol=1e-4)
    ids = reference["greedy_ids"].tolist()
    assert ids[:5] == tokenizer.encode("Once upon a time")
    assert model.generate([ids[:5]], 200, 0, eos_id=-1) == [ids[5:]]
    assert tokenizer.decode(ids).strip() == (STORIES / "greedy.txt").read_text().strip()


@needs_real
def test_command_line(capsys):
    M.main([str(STORIES / "meta-mp2"), "Once upon a time", "--temperature", "0", "--max_new_tokens", "200"])
    assert capsys.readouterr().out.strip() == (STORIES / "greedy.txt").read_text().strip()
    command = [sys.executable, M.__file__, str(STORIES / "llama2c"), "x"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "stories260K.bin" in done.stderr and done.stderr.count("\n") == 1


@needs_real
@pytest.mark.parametrize("layout", ["meta", "meta-mp2", "hf-sharded", "hf-bin"])
def test_convert_writes_hugging_faces_layout(layout, tmp_path, capsys):
    M.main(["convert", str(STORIES / layout), str(tmp_path / "out")])
    assert "in Hugging Face layout, 64 tokens have the same logits to the bit" in capsys.readouterr().out
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json"}
    theirs, ours = (read_tensors(folder) for folder in (STORIES / "hf", tmp_path / "out"))
    assert all(torch.equal(theirs[name].read(), ours[name].read()) for name in theirs) and theirs.keys() <= ours.keys()
    M.main([str(tmp_path / "out"), "Once upon a time", "--temperature", "0", "--max_new_tokens", "200"])
    assert capsys.readouterr().out.strip() == (STORIES / "greedy.txt").read_text().strip()
    with pytest.raises(ValueError, match="not empty: name a new directory"):
        M.main(["convert", str(STORIES / layout), str(tmp_path / "out")])


def test_convert_keeps_the_template_and_finds_a_wrong_copy(tmp_path, monkeypatch):
    source = saved(tmp_path / "in", "vicuna")
    M.main(["convert", str(source), str(tmp_path / "out")])
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == (source / "tokenizer_config.json").read_text()
    save = Llama.save_pretrained

    def wrong(model: Llama, directory: Path) -> None:
        with torch.no_grad():
            model.norm.weight[0] += 1e-3
        save(model, directory)
    monkeypatch.setattr(Llama, "save_pretrained", wrong)
    with pytest.raises(ValueError, match="does not give the logits"):
        M.main(["convert", str(source), str(tmp_path / "wrong")])


def test_chat_answers_by_the_directorys_template(tmp_path, capsys, monkeypatch):
    asked, tokenizer = [], Tokenizer(DEMO)
    fox = tokenizer.encode("a fox", bos=False)[:1]
    monkeypatch.setattr(Llama, "generate_steps",
                        lambda self, prompts, *_, **__: asked.append(prompts[0]) or [([0], fox)])
    question = "Write a story about a fox."
    unknown = "names no known prompt template, the plain one is used"
    for template, note in (("alpaca", ""), ("plain", ""), (None, unknown)):
        M.main([str(saved(tmp_path / str(template), template)), question, "--chat"])
        messages = [{"role": "user", "content": question}]
        assert asked[-1] == encode_prompt(messages, tokenizer, TEMPLATES[template or "plain"])
        told = capsys.readouterr()
        assert told.out == tokenizer.decode(fox) + "\n" and note in told.err and bool(note) == bool(told.err)
    M.main([str(tmp_path / "alpaca"), question])  # without --chat a prompt is continued, and shown
    assert asked[-1] == tokenizer.encode(question) and capsys.readouterr().out.startswith(question)


def test_command_line_ends_at_the_eos_of_tokenizer_and_config(tmp_path, monkeypatch):
    """An old conversion had EOS 1 in config.json beside a tokenizer whose EOS is 2: its answers never ended."""
    stops = []
    monkeypatch.setattr(Llama, "generate_steps", lambda self, *_, **__: stops.append(self.stops()) or [])
    for n, (eos_id, wanted) in enumerate(((1, {2}), (3, {2, 3}), ((2, 7), {2, 7}), (None, {2}))):
        M.main([str(saved(tmp_path / str(n), eos_id=eos_id)), "a fox"])
        assert stops[-1] == wanted


@pytest.fixture(scope="module")
def smol(smollm2) -> Llama:
    return Llama.from_pretrained(smollm2 / "hf").eval()


@needs_real
@torch.no_grad()
def test_smollm2_has_the_logits_and_answers_of_transformers(smol):
    reference = np.load(REAL / "smollm2" / "reference.npz")
    ours = logits(smol, reference["ids"].tolist())
    top = ours.gather(1, torch.from_numpy(reference["top_ids"]).long())
    np.testing.assert_allclose(top.numpy(), reference["top"], atol=1e-4)
    np.testing.assert_allclose(ours.logsumexp(-1).numpy(), reference["lse"], atol=1e-4)
    for chat in json.loads((REAL / "smollm2" / "chats.json").read_text("utf-8")):
        assert smol.generate([chat["ids"]], 50, 0) == [chat["greedy"]]


def test_smollm2_answers_on_the_command_line(smollm2, smol, capsys, monkeypatch):
    monkeypatch.setattr(Llama, "from_pretrained", lambda *_: smol)
    M.main([str(smollm2 / "hf"), "What is the capital of France?", "--chat", "--temperature", "0"])
    told = capsys.readouterr()
    assert (told.out, told.err) == ("The capital of France is Paris.\n", "")


def test_convert_and_chat_with_a_byte_level_tokenizer(tmp_path, capsys, monkeypatch):
    """The tokenizer's file comes along as it is. An answer ends at the EOS of tokenizer and config, and at a turn's."""
    (tmp_path / "a.txt").write_text("a fox and a kite and a fox\n" * 9)
    train_tokenizer(["train", str(tmp_path / "a.txt"), "--vocab_size", "300", str(tmp_path / "in")])
    tokenizer = Tokenizer(tmp_path / "in")
    tiny(vocab_size=tokenizer.vocab_size, eos_id=5).save_pretrained(tmp_path / "in")
    M.main(["convert", str(tmp_path / "in"), str(tmp_path / "out")])
    files = [(tmp_path / folder / "tokenizer.json").read_bytes() for folder in ("in", "out")]
    assert files[0] == files[1] and not (tmp_path / "out" / "tokenizer.model").exists()
    stops = []
    monkeypatch.setattr(Llama, "generate_steps", lambda self, *_, **__: stops.append(self.stops()) or [])
    M.main([str(tmp_path / "out"), "a fox", "--chat", "--template", "chatml"])
    assert stops == [{5, tokenizer.eos_id, tokenizer.special("<|im_end|>")}] and len(stops[0]) == 3


@needs_bf16
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_command_line_in_half_precision_notes_a_slow_processor(dtype, tmp_path, capsys, monkeypatch):
    arguments = [str(saved(tmp_path)), "a fox", "--dtype", dtype, "--max_new_tokens", "3"]
    for able in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": able})
        M.main(arguments)
        told, noted = capsys.readouterr(), dtype == "bf16" and not able
        assert told.out.startswith("a fox") and ("no instructions for bf16" in told.err) == noted


def test_command_line_compares_tokenizer_and_embedding(tmp_path, capsys):
    pieces = Tokenizer(DEMO).vocab_size
    for rows in (pieces, pieces + 1):
        directory = saved(tmp_path / str(rows), vocab_size=rows)
        M.main([str(directory), "a fox", "a kite and a fox", "--max_new_tokens", "3"])
        assert re.match("a fox.*\na kite and a fox", capsys.readouterr().out)
    with pytest.raises(ValueError, match=f"{pieces} pieces, the model's embedding {pieces - 1} rows"):
        M.main([str(saved(tmp_path / "few", vocab_size=pieces - 1)), "a fox"])


# ---- refusals -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("prompts, most, sentence", [
    ([some(33)], 1, "prompt 0 has 33 tokens, the model's context is 32: shorten the prompt"),
    ([[1], []], 1, "prompt 1 is empty"), ([[1]], -1, "at least 0"), ([[1], [1]], [3], "each of 2 prompts"),
    ([[1, 64]], 1, "ids from 1 to 64, the embedding has only 64 rows"), ([[-1, 3]], 1, "ids from -1 to 3"),
])
def test_prompts_that_cannot_be_continued(prompts, most, sentence):
    with pytest.raises(ValueError, match=sentence):
        tiny(max_seq_len=32).generate(prompts, most)


@pytest.mark.parametrize("name, value", [
    ("temperature", -1.0), ("temperature", math.nan), ("temperature", math.inf), ("top_k", -1), ("top_p", 0.0),
    ("top_p", 1.1), ("top_p", math.nan), ("repetition_penalty", 0.0), ("repetition_penalty", -1.0),
    ("repetition_penalty", math.nan), ("repetition_penalty", math.inf),
])
def test_sampling_values_out_of_range(name, value, tmp_path):
    with pytest.raises(ValueError, match=f"{name} is {value}, it must be"):
        tiny().generate([[1]], 1, **{name: value})
    with pytest.raises(ValueError, match=f"--{name}: must be .*, not {value}"):  # before anything is opened
        M.main([str(tmp_path), "x", f"--{name}", str(value)])


def test_non_finite_logits_are_an_error():
    model = tiny()
    model.norm.weight.data[3] = math.nan
    with pytest.raises(ValueError, match="non-finite logits"):
        model.generate([[1]], 1)


@pytest.mark.parametrize("arguments, words", [
    (["x", "hello"], "x is not a directory: name a weights directory"), (["x"], "PROMPT"),
    (["x", "hello", "--max_new_tokens", "-1"], "--max_new_tokens: must be at least 0"),
    (["x", "hello", "--benchmark"], "--benchmark"), (["convert", "x"], "OUT"), (["convert", "x", "y"], "x"),
])
def test_wrong_commands_are_one_sentence(arguments, words):
    with pytest.raises((ValueError, OSError), match=words) as error:
        M.main(arguments)
    assert "\n" not in str(error.value)


def test_directories_of_other_kinds_are_named_with_what_opens_them(tmp_path):
    model = Llama.from_pretrained(saved(tmp_path / "base"))
    lora.attach(model, 2)
    lora.save_adapter(model, tmp_path / "adapter", "../base")
    with pytest.raises(ValueError, match="merge and fold"):
        model.save_pretrained(tmp_path / "no")
    quantized = Llama.from_pretrained(tmp_path / "base")
    quantize.quantize_model(quantized, quantize.Scheme("rtn", 8, -1, True))
    with pytest.raises(ValueError, match="quantized: write it with quantize.save"):
        quantized.save_pretrained(tmp_path / "no")
    quantize.save(quantized, tmp_path / "int8")
    Tokenizer(DEMO).save(tmp_path / "int8")
    assert quantization(tmp_path / "int8")
    for name in ("adapter", "int8"):
        directory = tmp_path / name
        for opener in (lambda: Llama.from_pretrained(directory), lambda: M.main([str(directory), "x"]),
                       lambda: M.main(["convert", str(directory), str(tmp_path / "out")])):
            with pytest.raises((ValueError, OSError)) as error:
                opener()
            said = str(error.value)
            assert "quantize.open_model" in said and f"python serve.py {directory} --say" in said
    assert not (tmp_path / "no").exists() and not (tmp_path / "out").exists()
