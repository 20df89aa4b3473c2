"""model.py against references of its own: numpy by hand, the reference logits in shared/real, and itself by another way.

Names such as M13 are cases of the developers' list of faults that users of this field met."""

from data.text import Tokenizer
import data.run
import data.weights
from data.weights import hf_name
import dataclasses
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora
import model as M
from model import KVCache, Llama, LlamaConfig, sample

REAL = Path(__file__).parents[2] / "shared" / "real"
STORIES = REAL / "stories260K"
DEMO = Path(M.__file__).parent / "data" / "demo"
needs_real = pytest.mark.skipif(not STORIES.exists(), reason=f"needs the real weights in {STORIES}")
SIZES = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=44, vocab_size=64, max_seq_len=64)


def read_config(directory) -> LlamaConfig:
    return LlamaConfig(**data.weights.read_config(directory))



def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny(seed: int = 0, **sizes) -> Llama:
    """Random, with norms that are not 1 and logits far enough apart for argmax to be the same by every way."""
    model = Llama(LlamaConfig(**SIZES | sizes), generator=seeded(seed)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2.5) if p.dim() == 2 else p.add_(torch.randn(p.shape, generator=seeded(seed)), alpha=0.2)
            p.data = p.to(data.weights.DTYPES[model.config.dtype])
    return model


def some(n: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 64, (n,), generator=seeded(100 * seed + n)).tolist()


PROMPTS = [some(3), some(9), some(17)]


@torch.no_grad()
def logits(model: Llama, ids: list[int]) -> Tensor:
    return model(torch.tensor([ids]))[0]


def markov(successors: dict[int, int], sizes: list[int] | None = None, vocab: int = 16) -> Llama:
    """A scripted model: the logits after token i are row i of a table, whatever came before. `sizes` notes every batch."""
    model = tiny(dim=vocab, vocab_size=vocab)
    table = torch.zeros(vocab, vocab)
    for token, successor in successors.items():
        table[token, successor] = 9.0
    model.output.weight.data = table.T.contiguous()

    def hidden(tokens: Tensor, *_, **__) -> Tensor:
        if sizes is not None:
            sizes.append(len(tokens))
        return F.one_hot(tokens, vocab).float()
    model.hidden = hidden
    return model


def rewrite(directory: Path, edit) -> Path:
    """Let `edit` change the tensors, by name, of a directory that holds one safetensors file."""
    tensors = safetensors.torch.load_file(directory / "model.safetensors")
    edit(tensors)
    safetensors.torch.save_file(tensors, directory / "model.safetensors")
    return directory


def configure(directory: Path, drop: tuple[str, ...] = (), **keys) -> Path:
    config = json.loads((directory / "config.json").read_text()) | keys
    (directory / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key not in drop}))
    return directory


def write_meta(model: Llama, directory: Path, parts: int = 1, pairs: bool = True) -> Path:
    """The layout of Meta's files: neighbouring rows of a head are a pair, matrices are cut into `parts`."""
    c, D = model.config, model.config.head_dim
    whole = {}
    for name, p in model.named_parameters():
        whole[name] = p.detach().clone()
        if pairs and name.endswith(("wq.weight", "wk.weight")):
            for row in range(len(p)):
                head, i = divmod(row, D)
                whole[name][head * D + (2 * i if i < D // 2 else 2 * i - D + 1)] = p.detach()[row]
    directory.mkdir()
    params = {name: getattr(c, name) for name in ("dim", "n_layers", "n_heads", "norm_eps", "max_seq_len")}
    (directory / "params.json").write_text(json.dumps(params | {"vocab_size": -1}))
    for n in range(parts):
        cut = {}
        for name, p in whole.items():
            columns = name.endswith(("wo.weight", "w2.weight", "tok_embeddings.weight"))
            cut[name] = p if p.dim() == 1 else p.chunk(parts, 1 if columns else 0)[n].clone()
        torch.save(cut | {"rope.freqs": torch.zeros(D // 2)}, directory / f"consolidated.{n:02d}.pth")
    return directory


# ---- the transformer ------------------------------------------------------------------------------------------------

def by_hand(model: Llama, ids: list[int]) -> np.ndarray:
    """The whole forward pass in numpy and fp64, head by head and pair by pair."""
    c = model.config
    w = {name: p.detach().double().numpy() for name, p in model.named_parameters()}

    def norm(x, name):
        return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + c.norm_eps) * w[name]

    def turn(x):  # (T, D)
        out = x.copy()
        for p, i in np.ndindex(len(x), c.head_dim // 2):
            angle, j = p / c.rope_factor * c.rope_theta ** (-2 * i / c.head_dim), i + c.head_dim // 2
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
            heads.append(score / score.sum(-1, keepdims=True) @ (h @ w[at + "attention.wv.weight"][shared][:c.head_dim].T))
        x = x + np.concatenate(heads, -1) @ w[at + "attention.wo.weight"].T
        h = norm(x, at + "ffn_norm.weight")
        a, b = h @ w[at + "feed_forward.w1.weight"].T, h @ w[at + "feed_forward.w3.weight"].T
        x = x + (a / (1 + np.exp(-a)) * b) @ w[at + "feed_forward.w2.weight"].T
    return norm(x, "norm.weight") @ w.get("output.weight", w["tok_embeddings.weight"]).T


@pytest.mark.parametrize("sizes", [{}, dict(n_kv_heads=4, head_dim=6), dict(n_kv_heads=1, tie_embeddings=True),
                                   dict(n_layers=1, rope_factor=4.0, rope_theta=500.0)])
def test_forward_is_the_formula(sizes):
    model = tiny(**sizes)
    np.testing.assert_allclose(logits(model, some(20)).numpy(), by_hand(model, some(20)), atol=2e-4)


def test_norm_rotation_and_feed_forward():
    norm, x = M.RMSNorm(3, 1.0), torch.tensor([[1.0, 2.0, 4.0]])
    norm.weight.data = torch.tensor([1.0, 1.0, 10.0])
    assert torch.allclose(norm(x), torch.tensor([[1.0, 2.0, 40.0]]) / math.sqrt(7 + 1))  # mean of squares 7, eps 1
    big = torch.full((1, 3), 300.0, dtype=torch.float16)  # its square is beyond fp16
    assert torch.equal(norm.half()(big), torch.tensor([[1.0, 1.0, 10.0]]).half())
    cos, sin = torch.tensor([0.0, 1.0, 0.0, 1.0]), torch.tensor([-1.0, 0.0, 1.0, 0.0])  # a quarter for the first pair, none for the second
    turned = M.rotate(torch.tensor([1.0, 2.0, 3.0, 4.0]), cos, sin)
    assert torch.allclose(turned, torch.tensor([-3.0, 2.0, 1.0, 4.0]), atol=1e-6)
    ff = tiny(dim=1, ffn_dim=1, vocab_size=4).layers[0].feed_forward
    ff.w1.weight.data[:], ff.w2.weight.data[:], ff.w3.weight.data[:] = 2.0, 3.0, 5.0
    assert ff(torch.ones(1)).item() == pytest.approx(3 * (2 / (1 + math.exp(-2))) * 5)


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


def test_gradient_checkpointing_changes_no_gradient():
    model, gradients = tiny(), []
    for model.grad_checkpoint in (False, True):
        model.zero_grad()
        model(torch.tensor([some(12)])).logsumexp(-1).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) and a.abs().sum() > 0 for a, b in zip(*gradients))


def test_padding_changes_nothing_m13_m14():
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
                if not left:
                    assert torch.allclose(logits(model, row)[:len(ids)], alone, atol=1e-5)  # right padding needs no mask
        for cut in range(1, len(ids)):
            assert torch.allclose(logits(model, ids[:cut]), alone[:cut], atol=1e-5)
        mask = torch.ones(1, 2 * len(ids), dtype=torch.bool)  # holes in the middle, where wrong positions would show
        mask[0, 1:2 * len(ids):2] = False
        with torch.no_grad():
            out = model(torch.tensor([ids]).repeat_interleave(2, 1), mask)[0, ::2]
        assert torch.allclose(out, alone, atol=1e-5)
    with pytest.raises(ValueError, match="65 tokens do not fit the model's context of 64"):
        logits(model, some(65))


@pytest.mark.lesson
@pytest.mark.parametrize("kv_heads", [4, 2])
@torch.no_grad()
def test_cache_equals_no_cache(kv_heads):
    """Rows of unequal and of equal length, then one token, then several at once: what lies beyond a row's end is never seen."""
    model = tiny(n_kv_heads=kv_heads)
    for lengths in ((4, 10), (10, 10)):
        rows, start = [some(lengths[0] + 16, 1), some(lengths[1] + 16, 2)], list(lengths)
        cache = KVCache(model.config, 2, 30, torch.float32, "cpu")
        padded = [row[:n] + [5] * (10 - n) for row, n in zip(rows, start)]
        h = model.hidden(torch.tensor(padded), cache=cache)
        got = [[h[b, :n]] for b, n in enumerate(start)]
        for steps in (1, 3, 1, 5, 6):
            h = model.hidden(torch.tensor([row[s:s + steps] for row, s in zip(rows, start)]), cache=cache, start=start)
            start = [s + steps for s in start]
            for b in range(2):
                got[b].append(h[b])
        for b in range(2):
            assert torch.allclose(torch.cat(got[b]), model.hidden(torch.tensor([rows[b]]))[0], atol=1e-5)


@pytest.mark.parametrize("kv_heads", [4, 2])
@torch.no_grad()
def test_views_of_a_cache_are_its_rows(kv_heads):
    """As the server works: a chunk of a prompt on one row of a larger cache, then one token a row on others of unequal length."""
    model = tiny(n_kv_heads=kv_heads)
    texts = {3: some(20, 1), 1: some(9, 2), 2: some(9, 3)}                      # row of the cache -> its ids
    cache, got = KVCache(model.config, 4, 64, torch.float32, "cpu"), {row: [] for row in texts}
    for rows, start, T in (([3], [0], 12), ([1, 2], [0, 0], 7), ([2], [7], 1), ([1, 2], [7, 8], 1), ([3], [12], 7),
                           ([1, 2, 3], [8, 8, 19], 1)):
        tokens = torch.tensor([texts[row][s:s + T] if s + T <= len(texts[row]) else [0] * T for row, s in zip(rows, start)])
        h = model.hidden(tokens, cache=cache.rows(rows[0], rows[-1] + 1), start=start)
        for b, (row, s) in enumerate(zip(rows, start)):
            if len(torch.cat([*got[row], h.new_zeros(0, 32)])) == s:            # row 2 computes its last token twice
                got[row].append(h[b])
    for row, ids in texts.items():
        assert torch.allclose(torch.cat(got[row]), model.hidden(torch.tensor([ids]))[0], atol=1e-5)
    assert not any(kv[:, 0].any() for kv in cache.kv)                           # nobody wrote to the row of no one


# ---- generation -----------------------------------------------------------------------------------------------------

def greedy_by_recomputing(model: Llama, ids: list[int], steps: int, penalty: float = 1.0) -> list[int]:
    ids = list(ids)
    for _ in range(steps):
        x = logits(model, ids)[-1]
        for i in set(ids):
            x[i] = x[i] / penalty if x[i] > 0 else x[i] * penalty
        ids.append(x.argmax().item())
    return ids[-steps:]


def test_greedy_batched_cached_is_single_uncached_m13_m19_m25():
    model = tiny()
    expected = [greedy_by_recomputing(model, ids, 40) for ids in PROMPTS]
    assert len({tuple(answer) for answer in expected}) == 3 and all(len(set(answer)) > 5 for answer in expected)
    assert model.generate(PROMPTS, 40, 0, eos_id=-1) == expected
    assert model.generate(PROMPTS, 40, 0, top_k=5, top_p=0.3, eos_id=-1) == expected
    assert [model.generate([ids], 40, 0, eos_id=-1)[0] for ids in PROMPTS[::-1]] == expected[::-1]
    assert model.generate(PROMPTS, [7, 0, 40], 0, eos_id=-1) == [expected[0][:7], [], expected[2]]
    assert model.generate(PROMPTS, [10, 10, 2], 0, eos_id=-1) == [a[:n] for a, n in zip(expected, (10, 10, 2))]  # row 2 ends at the last slot
    penalized = [greedy_by_recomputing(model, ids, n, 1.5) for n, ids in zip((2, 3, 30), PROMPTS)]
    assert model.generate(PROMPTS, [2, 3, 30], 0, eos_id=-1, repetition_penalty=1.5) == penalized


def test_finished_rows_leave_and_the_others_do_not_notice_m16():
    sizes = []
    model = markov({3: 4, 4: 2, 5: 6, 6: 7, 7: 8, 8: 9, 9: 10, 10: 11, 11: 2, 12: 13, 13: 12}, sizes)
    assert model.generate([[3], [5]], 50, 0) == [[4, 2], [6, 7, 8, 9, 10, 11, 2]]
    assert sizes == [2, 2, 1, 1, 1, 1, 1]  # seven steps, not fifty; the ended row is gone
    steps = list(model.generate_steps([[3], [5], [12]], 3, 0))
    assert steps == [([0, 1, 2], [4, 6, 13]), ([0, 1, 2], [2, 7, 12]), ([1, 2], [8, 13])]
    assert model.generate([[3], [5]], 4, 0, eos_id=7) == [[4, 2, 0, 0], [6, 7]]  # 2 is an id like others here
    assert model.generate([[4]], 3, 0, eos_id=-1) == [[2, 0, 0]]
    real, alone = tiny(), [tiny().generate([ids], 40, 0, eos_id=-1)[0] for ids in PROMPTS]
    eos = alone[0][1]  # ends row 0 early
    cut = [answer[:answer.index(eos) + 1] if eos in answer else answer for answer in alone]
    assert real.generate(PROMPTS, 40, 0, eos_id=eos) == cut and len(cut[0]) <= 2 < max(map(len, cut))


def test_the_context_is_the_limit_m18():
    model = tiny(max_seq_len=32)
    answers = model.generate([some(30), some(32), some(2)], 50, 0, eos_id=-1)
    assert answers[:2] == [greedy_by_recomputing(model, some(30), 2), []] and len(answers[2]) == 30
    assert [len(answer) for answer in model.generate([some(2), some(31)], 50, eos_id=-1)] == [30, 1]
    for prompts, n, sentence in (([some(33)], 1, "prompt 0 has 33 tokens, the model's context is 32"),
                                 ([[1], []], 1, "prompt 1 is empty"), ([[1]], -1, "at least 0"), ([[1], [1]], [3], "each of 2 prompts"),
                                 ([[1, 64]], 1, "ids from 1 to 64, the embedding has rows 0 to 63")):
        with pytest.raises(ValueError, match=sentence):
            model.generate(prompts, n)
    assert model.generate([], 5) == []


def test_sampling_is_reproducible_and_leaves_the_global_state_alone():
    model, before = tiny(), torch.get_rng_state()
    a, b, c = (model.generate(PROMPTS, 20, 1.0, 50, 0.99, -1, seeded(seed), 1.1) for seed in (1, 1, 2))
    assert a == b != c and torch.equal(torch.get_rng_state(), before)
    assert [model.generate(PROMPTS, 20, eos_id=-1) for _ in range(2)][0] != model.generate(PROMPTS, 20, eos_id=-1)


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


@pytest.mark.parametrize("temperature, top_k, top_p, penalty", [
    (1.0, 0, 1.0, 1.0), (0.5, 0, 1.0, 1.0), (2.0, 3, 1.0, 1.0), (1.0, 0, 0.7, 1.0), (1.0, 0, 0.01, 1.0), (1.5, 5, 0.8, 1.0),
    (1.0, 100, 1.0, 1.0), (1.0, 0, 1.0, 2.0), (0.7, 4, 0.9, 1.3), (1.0, 1, 1.0, 0.5)])
def test_sampling_follows_the_table(temperature, top_k, top_p, penalty):
    """40,000 rows that have seen 3 (its logit is positive) and 5 (negative); five standard deviations are below 0.0125."""
    table = torch.tensor([0.3, -1.0, 0.0, 1.4, -2.0, -0.5, 2.0, 0.9])
    model = markov({}, vocab=8)
    model.output.weight.data[:, 5] = table
    drawn = np.array(model.generate([[3, 5]] * 40_000, 1, temperature, top_k, top_p, -1, seeded(0), penalty))[:, 0]
    p = expected_probs(table.numpy(), temperature, top_k, top_p, [3, 5], penalty)
    share = np.bincount(drawn, minlength=8) / len(drawn)
    assert np.abs(share - p).max() < 0.0125 and not share[p == 0].any() and share[p > 1e-3].all()


def test_sampling_at_the_edges_m19():
    x = torch.randn(200, 50, generator=seeded(0))
    for temperature in (0, 1e-40, 1e-300, 1e-5):
        assert torch.equal(sample(x, temperature), x.argmax(-1))
    assert torch.equal(sample(x, 1.0, top_k=1), x.argmax(-1)) and torch.equal(sample(x, 1.0, top_p=1e-9), x.argmax(-1))
    assert len(sample(torch.zeros(500, 8), 1.0, top_k=3).unique()) == 3  # equal logits are still only three
    for name, values in (("temperature", (-1.0, math.nan, math.inf)), ("top_k", (-1,)), ("top_p", (0.0, 1.1, math.nan)),
                         ("repetition_penalty", (0.0, -1.0, math.nan))):
        for value in values:
            with pytest.raises(ValueError, match=f"{name} is {value}, it must be"):
                tiny().generate([[1]], 1, **{name: value})
    for broken, temperature in itertools.product((math.nan, math.inf), (0.0, 1.0)):
        assert sample(torch.tensor([[0.0, broken], [-math.inf, 1.0], [broken, 0.0]]), temperature).tolist() == [-1, 1, -1]
    model = tiny()
    model.norm.weight.data[3] = math.nan
    with pytest.raises(ValueError, match="non-finite logits"):
        model.generate([[1]], 1)


# ---- files ----------------------------------------------------------------------------------------------------------

def saved(directory: Path, **sizes) -> Path:
    tiny(**sizes).save_pretrained(directory)
    return directory


def same(a: Llama, b: Llama) -> bool:
    pairs = list(zip(a.named_parameters(), b.named_parameters(), strict=True))
    return all(n == m and torch.equal(p, q) and p.dtype == q.dtype for (n, p), (m, q) in pairs) and torch.equal(a.cos, b.cos)


@needs_real
def test_convert_there_and_back(tmp_path, capsys):
    for source, out, layout in (("meta-mp2", "hf", "Hugging Face"), ("hf-sharded", "meta", "Meta")):
        M.main(["convert", str(STORIES / source), str(tmp_path / out)])
        assert f"in {layout} layout, 64 tokens have the same logits to the bit" in capsys.readouterr().out
    first, back = torch.load(STORIES / "meta" / "consolidated.00.pth", weights_only=True), torch.load(tmp_path / "meta" / "consolidated.00.pth", weights_only=True)
    assert all(torch.equal(first[name], back[name]) for name in first if "rope" not in name) and "output.weight" in back
    theirs, ours = (json.loads((folder / "params.json").read_text()) for folder in (STORIES / "meta", tmp_path / "meta"))
    assert all(ours[key] == theirs[key] for key in ("dim", "n_layers", "n_heads", "n_kv_heads", "norm_eps"))
    assert -(int(8 * 64 / 3) // -ours["multiple_of"]) * ours["multiple_of"] == 172  # as Meta's code has it
    M.main([str(tmp_path / "meta"), "Once upon a time", "--temperature", "0", "--max_new_tokens", "200"])
    assert capsys.readouterr().out.strip() == (STORIES / "greedy.txt").read_text().strip()
    with pytest.raises(ValueError, match="not empty: name a new directory"):
        M.main(["convert", str(STORIES / "hf"), str(tmp_path / "meta")])


def test_chat_and_benchmark_command(tmp_path, capsys, monkeypatch):
    Tokenizer(DEMO).save(saved(tmp_path / "m", vocab_size=Tokenizer(DEMO).vocab_size), "alpaca")
    asked = []
    monkeypatch.setattr(Llama, "generate_steps", lambda self, prompts, *rest: asked.append(prompts[0]) or iter([([0], Tokenizer(DEMO).encode("a fox", bos=False)[:1])]))
    M.main([str(tmp_path / "m"), "Write a story about a fox.", "--chat"])
    assert "### Instruction:\nWrite a story about a fox.\n\n### Response:" in Tokenizer(DEMO).decode(asked[0]) and asked[0][0] == 1
    assert "Instruction" not in capsys.readouterr().out  # the answer alone
    monkeypatch.undo()
    monkeypatch.setattr(M, "read_bandwidth", lambda device: 1e9)
    rows = M.main([str(tmp_path / "m"), "--benchmark", "--batch", "1", "3", "--dtype", "bf16"])
    assert [row["batch"] for row in rows] == [1, 3] and all(row["decode_tokens_per_second"] > 0 for row in rows)
    for wrong, words in ((["x"], "does not exist|not a directory"), ([str(tmp_path / "m")], "at least one PROMPT"), ([str(tmp_path / "m"), "--benchmark", "--batch", "0"], "at least 1"),
                         ([str(tmp_path / "m"), "hello", "--benchmark"], "without any")):
        with pytest.raises((ValueError, OSError), match=words):
            M.main([*wrong, *(["hello"] if wrong == ["x"] else [])])


@needs_real
@pytest.mark.parametrize("layout", ["hf", "hf-sharded", "hf-bin", "meta", "meta-mp2"])
def test_real_weights_give_the_reference(layout):
    model, tokenizer = Llama.from_pretrained(STORIES / layout), Tokenizer(STORIES / layout)
    reference = np.load(STORIES / "reference.npz")
    for i in range(4):
        np.testing.assert_allclose(logits(model, reference[f"ids_{i}"].tolist()).numpy(), reference[f"logits_{i}"], atol=1e-4)
    ids = reference["greedy_ids"].tolist()
    assert ids[:5] == tokenizer.encode("Once upon a time") and model.generate([ids[:5]], 200, 0, eos_id=-1) == [ids[5:]]
    assert tokenizer.decode(ids).strip() == (STORIES / "greedy.txt").read_text().strip()


def test_command_line_takes_an_adapter(tmp_path, capsys):
    """As the other scripts do: its base is found, and the template's name beside it."""
    model = Llama.from_pretrained(saved(tmp_path / "base", vocab_size=1280))
    Tokenizer(DEMO).save(tmp_path / "base")
    lora.attach(model, 2)
    for layer in lora.adapters(model).values():
        layer.lora_B.data.normal_(generator=torch.Generator().manual_seed(0))
    lora.save_adapter(model, tmp_path / "adapter", "../base")
    said = []
    for directory in ("base", "adapter", "merged"):
        if directory == "merged":
            lora.main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")])
            capsys.readouterr()
        M.main([str(tmp_path / directory), "a fox", "--temperature", "0", "--max_new_tokens", "20"])
        said.append(capsys.readouterr().out)
    assert said[1] == said[2] != said[0]


def test_errors_of_the_system_are_told_without_their_number(tmp_path):
    with pytest.raises(OSError) as caught:
        (tmp_path / "x").read_text()
    assert data.run.sentence(caught.value) == f"{tmp_path}/x: no such file or directory" and data.run.sentence(FileNotFoundError("x is missing")) == "x is missing"


def test_command_line_compares_tokenizer_and_embedding_m15(tmp_path, capsys):
    pieces = Tokenizer(DEMO).vocab_size
    for rows, fits in ((pieces - 1, False), (pieces, True), (pieces + 1, True)):
        Tokenizer(DEMO).save(saved(tmp_path / str(rows), vocab_size=rows))
        arguments = [str(tmp_path / str(rows)), "a fox", "a kite and a fox", "--max_new_tokens", "3"]
        if fits:
            M.main(arguments)
            assert re.match("a fox.*\na kite and a fox", capsys.readouterr().out)
            continue
        with pytest.raises(ValueError, match=f"{pieces} pieces, the model's embedding {rows} rows: use the tokenizer.model"):
            M.main(arguments)


@needs_real
def test_command_line(capsys):
    M.main([str(STORIES / "meta-mp2"), "Once upon a time", "--temperature", "0", "--max_new_tokens", "200"])
    assert capsys.readouterr().out.strip() == (STORIES / "greedy.txt").read_text().strip()
    done = subprocess.run([sys.executable, M.__file__, str(STORIES / "llama2c"), "x"], capture_output=True, text=True)
    assert done.returncode == 2 and "stories260K.bin" in done.stderr and done.stderr.count("\n") == 1


@needs_real
@pytest.mark.parametrize("layout", ["hf", "hf-sharded", "hf-bin", "meta", "meta-mp2", "llama2c"])
def test_damaged_directories_end_in_one_sentence_m07(layout, tmp_path, capsys):
    """Every file of every layout cut, emptied, gone or renamed: a sentence, or the right text where the file is not needed."""
    names = sorted(file.name for file in (STORIES / layout).iterdir())
    weights = [name for name in names if not name.startswith("tokenizer") and not name.endswith(".json")]
    for name, damage in itertools.product(names, ("cut", "emptied", "gone", "renamed", "of another name")):
        directory = tmp_path / f"{name} {damage}"
        directory.mkdir()
        for other in names:  # not copytree, which copies the modes of a folder that is read-only
            shutil.copyfile(STORIES / layout / other, directory / other)
        file = directory / name
        if damage in ("cut", "emptied"):
            file.write_bytes(file.read_bytes()[:file.stat().st_size // 2 if damage == "cut" else 0])
        elif damage == "gone":
            file.unlink()
        else:
            file.rename(directory / (f"{name}.old" if damage == "renamed" else f"other{file.suffix}"))
        arguments = [str(directory), "Once", "--temperature", "0", "--max_new_tokens", "6"]
        if name == "tokenizer_config.json":
            M.main(arguments)
            assert capsys.readouterr().out == "Once upon a time, there was\n"
            continue
        with pytest.raises((ValueError, OSError)) as error:
            M.main(arguments)
        said = str(error.value)
        assert type(error.value) in (ValueError, FileNotFoundError) and str(directory) in said and "\n" not in said
        assert re.search(r"copy|get the|looked for|put the", said), said  # what to do
        if damage in ("cut", "emptied") and (name in weights or layout != "llama2c"):
            assert str(file) in said  # the one to copy again
        assert capsys.readouterr().out == ""
        shutil.rmtree(directory)


WRONG = (None, "x", [1], {"a": 1}, -1, 0, 1.5, 10**30, math.nan, True)


@pytest.mark.parametrize("key, harmless", [
    ("hidden_size", ()), ("num_hidden_layers", ()), ("num_attention_heads", ()), ("num_key_value_heads", ()), ("intermediate_size", ()),
    ("vocab_size", ()), ("max_position_embeddings", ()), ("rms_norm_eps", ()), ("head_dim", (None, 0)), ("tie_word_embeddings", ()),
    ("rope_theta", (None, 1.5, 10**30)), ("rope_parameters", (None, 0, {"a": 1})), ("rope_scaling", (None, 0, {"a": 1})), ("model_type", ()),
    ("quantization_config", (None, 0)), ("attention_bias", (None, 0)), ("mlp_bias", (None, 0)), ("hidden_act", (None,)),
    ("sliding_window", (None, 0, 10**30, math.nan)), ("bos_token_id", (None, -1, 0, 10**30)), ("eos_token_id", (None, [1], -1, 0, 10**30)),
    ("reward_mean", (-1, 0, 1.5, 10**30)), ("rope_parameters.rope_theta", (None, 1.5, 10**30)), ("rope_parameters.factor", (1.5, 10**30)),
    ("rope_parameters.rope_type", ())])
def test_config_of_wrong_types_is_refused(key, harmless, tmp_path):
    text, (outer, _, inner) = (saved(tmp_path) / "config.json").read_text(), key.partition(".")
    for value in WRONG:
        (tmp_path / "config.json").write_text(text)
        drop = ("rope_parameters",) if key in ("rope_theta", "rope_scaling") else ()
        configure(tmp_path, drop, **{outer: {"rope_type": "linear" if inner == "factor" else "default", inner: value} if inner else value})
        if any(value is other or value == other and type(value) is type(other) for other in harmless):
            model = Llama.from_pretrained(tmp_path)
            assert torch.isfinite(logits(model, some(9))).all()
            assert key.endswith(("rope_theta", "factor")) or torch.equal(logits(model, some(9)), logits(tiny(), some(9)))
            continue
        with pytest.raises(ValueError) as error:
            Llama.from_pretrained(tmp_path)
        assert type(error.value) is ValueError and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name, value", [("n_layers", 1001), ("dim", 2**20 + 1), ("vocab_size", 2**20 + 1), ("max_seq_len", 2**20 + 1)])
def test_sizes_beyond_any_model_are_refused_at_once(name, value):
    """A model of 10^12 layers or positions was begun, and took all time or all memory."""
    with pytest.raises(ValueError, match=f"{name} is {value}, it must be a whole number from 1 to {value - 1:,}"):
        LlamaConfig(**SIZES | {name: value})
    LlamaConfig(**SIZES | {name: value - 1})


@pytest.mark.parametrize("key, harmless", [
    ("dim", ()), ("n_layers", ()), ("n_heads", ()), ("n_kv_heads", (None,)), ("head_dim", (None, 0)), ("norm_eps", ()),
    ("max_seq_len", ()), ("rope_theta", (1.5, 10**30)), ("use_scaled_rope", (None, 0))])
def test_params_of_wrong_types_are_refused(key, harmless, tmp_path):
    file = write_meta(tiny(), tmp_path / "m") / "params.json"
    params = json.loads(file.read_text())
    for value in WRONG:
        file.write_text(json.dumps(params | {key: value}))
        if any(value is other or value == other and type(value) is type(other) for other in harmless):
            assert key == "rope_theta" or same(Llama.from_pretrained(file.parent), tiny())
            continue
        with pytest.raises(ValueError) as error:
            Llama.from_pretrained(file.parent)
        assert type(error.value) is ValueError and str(file.parent) in str(error.value) and "\n" not in str(error.value)
    file.write_text(json.dumps(params | {"n_heads": 8, "n_kv_heads": 2}))  # every shape is right, every head wrong
    with pytest.raises(ValueError, match="wk has rows for 4 heads of 4, by params.json there are 2"):
        Llama.from_pretrained(file.parent)


def test_weights_of_wrong_kinds_are_refused(tmp_path):
    """Integers would be read as weights a hundred times too large, and give text."""
    up = "model.layers.1.mlp.up_proj.weight"
    for dtype in (torch.int8, torch.uint8, torch.int32, torch.bool, torch.float8_e4m3fn):
        with pytest.raises(ValueError, match=f"{up} is {str(dtype)[6:]}, .*: get the model that is not quantized"):
            Llama.from_pretrained(rewrite(saved(tmp_path / "a"), lambda t: t.update({up: t[up].to(dtype)})))
    data.weights.write_model(tmp_path / "b", vars(tiny().config), dict(tiny().named_parameters()), "x", shard_bytes=20_000)
    index = tmp_path / "b" / "model.safetensors.index.json"
    for content in [*WRONG, *({"weight_map": value} for value in WRONG), {}, {"weight_map": {up: "../b"}}, {"weight_map": {up: None}}]:
        index.write_text(json.dumps(content))
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            Llama.from_pretrained(tmp_path / "b")
        assert str(index) in str(error.value) and re.search("copy", str(error.value))
    (tmp_path / "a" / "model.safetensors").unlink()
    meta = write_meta(tiny(n_kv_heads=4), tmp_path / "meta", 2)
    for content in (None, [], torch.zeros(1), {"model": {up: torch.zeros(1)}}, {1: torch.zeros(1)}, {up: 1}):
        for file in (tmp_path / "a" / "pytorch_model.bin", meta / "consolidated.01.pth"):
            torch.save(content, file)
            with pytest.raises(ValueError, match=f"{file} is no dictionary of named tensors: get"):
                Llama.from_pretrained(file.parent)
    for change in (lambda t: t[:1], lambda t: t.to(torch.int8)):
        torch.save({name: change(t) for name, t in torch.load(meta / "consolidated.00.pth").items()}, meta / "consolidated.01.pth")
        with pytest.raises(ValueError, match="differ in names, shapes or dtypes"):
            Llama.from_pretrained(meta)


def test_wrong_folders_m06(tmp_path):
    (tmp_path / "empty").mkdir()
    shutil.copytree(DEMO, tmp_path / "tokenizer only")
    for directory in (tmp_path / "missing", tmp_path / "empty", tmp_path / "tokenizer only"):
        with pytest.raises(FileNotFoundError) as error:
            Llama.from_pretrained(directory)
        for word in (str(directory), "config.json", "model.safetensors", "pytorch_model.bin", "consolidated.*.pth"):
            assert word in str(error.value)
    for keys, sentence in ((dict(model_type="gpt2"), "'gpt2' is not a LLaMA"), (dict(quantization_config={"bits": 4}), "quantize.open_model"),
                           (dict(rope_scaling={"rope_type": "llama3"}, rope_parameters=None), "'llama3' is not supported"),
                           (dict(attention_bias=True), "attention_bias"), (dict(hidden_act="gelu"), "hidden_act"),
                           (dict(hidden_size="32"), "does not describe"), (dict(num_key_value_heads=3), "4 query heads cannot"),
                           (dict(hidden_size=33), "33"), (dict(eos_token_id=[]), r"eos_id is \[\]"),
                           (dict(num_hidden_layers=3), "missing model.layers.2")):
        with pytest.raises(ValueError, match=sentence):
            Llama.from_pretrained(configure(saved(tmp_path / "m"), **keys))
    with pytest.raises(ValueError, match="lacks 'vocab_size'"):
        read_config(configure(saved(tmp_path / "m"), drop=("vocab_size",)))
    (tmp_path / "empty" / "adapter_config.json").touch()
    with pytest.raises(ValueError, match="lora.py merge"):
        Llama.from_pretrained(tmp_path / "empty")
    score = rewrite(saved(tmp_path / "rm", tie_embeddings=True), lambda t: t.update({"score.weight": torch.zeros(1, 32)}))
    with pytest.raises(ValueError, match="is a reward model"):
        Llama.from_pretrained(score)
    assert Llama.from_pretrained(score, head=False).output is None


def test_saved_and_reloaded_is_before(tmp_path):
    for sizes in ({}, dict(tie_embeddings=True), dict(head_dim=6, rope_theta=5e5, rope_factor=2.0, norm_eps=1e-3, bos_id=5, eos_id=7,
                                                      extra={"reward_mean": 0.5})):
        model = tiny(**sizes)
        model.save_pretrained(tmp_path)
        again = Llama.from_pretrained(tmp_path)
        assert same(model, again) and again.config == model.config
        assert torch.equal(logits(model, some(9)), logits(again, some(9)))
        assert (again.output.weight is again.tok_embeddings.weight) == model.config.tie_embeddings


def test_shards_index_and_leftovers_m07_m08(tmp_path):
    model = tiny()
    tensors = dict(model.named_parameters())
    (tmp_path / "model-of-mine.safetensors").touch()
    for shard_bytes in (20_000, 30_000, 10**9, 1):
        data.weights.write_model(tmp_path, vars(model.config), tensors, shard_bytes=shard_bytes)
        assert same(Llama.from_pretrained(tmp_path), model)
        files = {file.name for file in tmp_path.glob("model*")} - {"model-of-mine.safetensors", "model.safetensors.index.json"}
        if shard_bytes == 10**9:
            assert files == {"model.safetensors"} and not (tmp_path / "model.safetensors.index.json").exists()
            continue
        assert files == {f"model-{n + 1:05d}-of-{len(files):05d}.safetensors" for n in range(len(files))} and len(files) >= 3
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(4 * p.numel() for p in tensors.values())
        assert index["weight_map"].keys() == {hf_name(name) for name in tensors}
        for file in files:
            held = safetensors.torch.load_file(tmp_path / file)
            assert held.keys() == {name for name, named in index["weight_map"].items() if named == file}
            assert len(held) == 1 or sum(4 * p.numel() for p in held.values()) <= shard_bytes
    assert (tmp_path / "model-of-mine.safetensors").exists()
    stale = tmp_path / "model-00001-of-00099.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(1)}, stale)
    with pytest.raises(ValueError, match="index and files are of two different savings"):
        Llama.from_pretrained(tmp_path)
    stale.unlink()
    shutil.move(tmp_path / "model-00001-of-00021.safetensors", stale)
    with pytest.raises(FileNotFoundError, match="names model-00001-of-00021.safetensors, .* belongs to model-00001-of-00099"):
        Llama.from_pretrained(tmp_path)


def test_broken_shards_are_found_before_anything_is_built_m07(tmp_path, monkeypatch):
    model, built = tiny(), []
    tensors = dict(model.named_parameters())
    monkeypatch.setattr(M.Block, "__init__", lambda *_: built.append(1))
    for damage in ("gone", "cut", "emptied"):
        data.weights.write_model(tmp_path, vars(model.config), tensors, shard_bytes=50_000)
        shard = sorted(tmp_path.glob("model-*-of-*.safetensors"))[1]
        shard.unlink() if damage == "gone" else os.truncate(shard, shard.stat().st_size // 2 if damage == "cut" else 0)
        with pytest.raises((ValueError, FileNotFoundError), match=shard.name):
            Llama.from_pretrained(tmp_path)
        assert not built


def test_file_modes_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        Tokenizer(DEMO).save(saved(tmp_path / "m"))
    finally:
        os.umask(before)
    assert {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "m").iterdir()} == dict.fromkeys(
        ("config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json"), 0o640)


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_the_file_keeps_its_dtype(name, tmp_path):
    dtype, model = data.weights.DTYPES[name], tiny(dtype=name)
    model.save_pretrained(tmp_path / "a")
    assert Llama.from_pretrained(tmp_path / "a").norm.weight.dtype == dtype
    Llama.from_pretrained(tmp_path / "a", torch.float32).save_pretrained(tmp_path / "b")
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    configure(tmp_path / "c", drop=("dtype", "torch_dtype"))  # only the tensors tell
    for directory in (tmp_path / "a", tmp_path / "b", tmp_path / "c"):
        assert same(Llama.from_pretrained(directory), model) and read_config(directory).dtype == name
    assert read_config(write_meta(model, tmp_path / "meta")).dtype == name
    assert same(Llama.from_pretrained(tmp_path / "meta"), model)


def test_config_spellings_m03(tmp_path):
    saved(tmp_path)
    text = (tmp_path / "config.json").read_text()
    old, new = ("rope_theta", "rope_scaling"), ("rope_parameters",)
    for drop, keys, theta, factor in (
            (new, dict(rope_theta=5e5, rope_scaling=None), 5e5, 1),
            (old, dict(rope_parameters={"rope_theta": 5e5, "rope_type": "default"}), 5e5, 1),
            (old + new, {}, 1e4, 1), (new, dict(rope_theta=1e4, rope_scaling={"type": "linear", "factor": 4.0}), 1e4, 4),
            (old, dict(rope_parameters={"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0}), 1e4, 4)):
        (tmp_path / "config.json").write_text(text)
        config = read_config(configure(tmp_path, drop, max_position_embeddings=1000, **keys))
        cos, sin = M.rope_table(config)
        angle = 900 / factor * theta ** -(np.arange(0, 8, 2) / 8)
        want = np.concatenate((np.cos(angle), np.cos(angle), -np.sin(angle), np.sin(angle)))
        np.testing.assert_allclose(np.concatenate((cos[900], sin[900])), want, atol=1e-4)
    for key, value, field in (("rms_norm_eps", 0.5, "norm_eps"), ("num_key_value_heads", 4, "n_kv_heads"), ("head_dim", 16, "head_dim"),
                              ("tie_word_embeddings", True, "tie_embeddings"), ("eos_token_id", [7, 8], "eos_id"),
                              ("max_position_embeddings", 99, "max_seq_len")):
        (tmp_path / "config.json").write_text(text)
        changed = dataclasses.replace(read_config(tmp_path), **{field: value[0] if isinstance(value, list) else value})
        assert read_config(configure(tmp_path, **{key: value})) == changed
    (tmp_path / "config.json").write_text(text)
    optional = ("head_dim", "rms_norm_eps", "num_key_value_heads", "max_position_embeddings")
    config = read_config(configure(tmp_path, optional, sliding_window=50, model_type="mistral"))
    assert (config.head_dim, config.norm_eps, config.n_kv_heads, config.max_seq_len) == (8, 1e-6, 4, 50)


LLAMA = dict(model_type="llama", hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000,
             max_position_embeddings=2048, rms_norm_eps=1e-6, hidden_act="silu", tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
             pad_token_id=0, torch_dtype="float16", initializer_range=0.02, use_cache=True)
LLAMA2 = LLAMA | dict(max_position_embeddings=4096, rms_norm_eps=1e-5, pretraining_tp=1, rope_scaling=None)
CODE = LLAMA2 | dict(vocab_size=32016, max_position_embeddings=16384, torch_dtype="bfloat16", num_key_value_heads=32, rope_theta=1000000)
PLAIN = LlamaConfig(dim=4096, n_layers=32, n_heads=32, n_kv_heads=32, head_dim=128, ffn_dim=11008, vocab_size=32000, max_seq_len=2048,
                    norm_eps=1e-6, dtype="float16")


def sizes_of(dim: int, ffn: int, layers: int, heads: int, kv_heads: int | None = None) -> tuple[dict, dict]:
    """The same five numbers in Hugging Face's words and in ours."""
    theirs = dict(hidden_size=dim, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads)
    return (theirs | ({"num_key_value_heads": kv_heads} if kv_heads else {}),
            dict(dim=dim, ffn_dim=ffn, n_layers=layers, n_heads=heads, n_kv_heads=kv_heads or heads, head_dim=dim // heads))


@pytest.mark.parametrize("base, sizes, theirs, ours", [
    (LLAMA, sizes_of(4096, 11008, 32, 32), {}, {}),                                                                # LLaMA 7B, 13B, 33B, 65B
    (LLAMA, sizes_of(5120, 13824, 40, 40), {}, {}),
    (LLAMA, sizes_of(6656, 17920, 60, 52), {}, {}),
    (LLAMA, sizes_of(8192, 22016, 80, 64), dict(rms_norm_eps=1e-5), dict(norm_eps=1e-5)),
    (LLAMA2, sizes_of(4096, 11008, 32, 32, 32), {}, dict(norm_eps=1e-5, max_seq_len=4096)),                        # Llama 2
    (LLAMA2, sizes_of(5120, 13824, 40, 40, 40), {}, dict(norm_eps=1e-5, max_seq_len=4096)),
    (LLAMA2, sizes_of(8192, 28672, 80, 64, 8), {}, dict(norm_eps=1e-5, max_seq_len=4096)),
    (CODE, sizes_of(4096, 11008, 32, 32, 32), {},                                                                  # CodeLlama
     dict(norm_eps=1e-5, max_seq_len=16384, vocab_size=32016, rope_theta=1e6, dtype="bfloat16")),
    (CODE, sizes_of(4096, 11008, 32, 32, 32), dict(rope_theta=None, torch_dtype=None, dtype="bfloat16", rope_scaling=None,  # as saved by
                                                   rope_parameters={"rope_theta": 1000000.0, "rope_type": "default"}),  # transformers 5
     dict(norm_eps=1e-5, max_seq_len=16384, vocab_size=32016, rope_theta=1e6, dtype="bfloat16")),
    (CODE, sizes_of(8192, 22016, 48, 64, 8), dict(vocab_size=32000),
     dict(norm_eps=1e-5, max_seq_len=16384, rope_theta=1e6, dtype="bfloat16")),
    (LLAMA2, sizes_of(2048, 5632, 22, 32, 4), dict(max_position_embeddings=2048, torch_dtype="float32", rope_theta=10000.0),  # TinyLlama
     dict(norm_eps=1e-5, dtype="float32")),
    (LLAMA, sizes_of(4096, 11008, 32, 32), dict(max_sequence_length=2048), {}),                                    # Vicuna 1.3, 1.5, 1.5-16k
    (LLAMA2, sizes_of(4096, 11008, 32, 32, 32), {}, dict(norm_eps=1e-5, max_seq_len=4096)),
    (LLAMA2, sizes_of(4096, 11008, 32, 32, 32), dict(rope_scaling={"factor": 4.0, "type": "linear"}, max_sequence_length=16384),
     dict(norm_eps=1e-5, max_seq_len=4096, rope_factor=4.0)),
    (LLAMA, sizes_of(4096, 11008, 32, 32), dict(vocab_size=32001, torch_dtype="float32"), dict(vocab_size=32001, dtype="float32")),  # Alpaca
    (LLAMA, sizes_of(3200, 8640, 26, 32), {}, {}),                                                                 # OpenLLaMA 3B
    (LLAMA2, sizes_of(4096, 14336, 32, 32, 8), dict(model_type="mistral", max_position_embeddings=32768, sliding_window=4096,
                                                    rope_theta=10000.0, torch_dtype="bfloat16"),                                       # Mistral 0.1 and 0.2
     dict(norm_eps=1e-5, max_seq_len=4096, dtype="bfloat16")),
    (LLAMA2, sizes_of(4096, 14336, 32, 32, 8), dict(model_type="mistral", max_position_embeddings=32768, sliding_window=None,
                                                    rope_theta=1e6, torch_dtype="bfloat16"),
     dict(norm_eps=1e-5, max_seq_len=32768, rope_theta=1e6, dtype="bfloat16")),
    (LLAMA2, sizes_of(4096, 11008, 32, 32, 4), dict(vocab_size=64000, rope_theta=5000000.0, torch_dtype="bfloat16"),  # Yi-6B
     dict(norm_eps=1e-5, max_seq_len=4096, vocab_size=64000, rope_theta=5e6, dtype="bfloat16"))])
def test_published_configs_m03(base, sizes, theirs, ours, tmp_path):
    dropped = {key for key, value in theirs.items() if value is None and key != "sliding_window"}
    named = {key: value for key, value in (base | sizes[0] | theirs).items() if key not in dropped}
    (tmp_path / "config.json").write_text(json.dumps(named))
    assert read_config(tmp_path) == dataclasses.replace(PLAIN, **sizes[1] | ours)


@pytest.mark.parametrize("parts, params, vocab, ffn, ours", [
    (1, dict(dim=4096, n_heads=32, n_layers=32, multiple_of=256, norm_eps=1e-6), 32000, 11008, {}),
    (2, dict(dim=5120, n_heads=40, n_layers=40, multiple_of=256, norm_eps=1e-6), 32000, 13824, {}),
    (4, dict(dim=6656, n_heads=52, n_layers=60, multiple_of=256, norm_eps=1e-6), 32000, 17920, {}),
    (8, dict(dim=8192, n_heads=64, n_layers=80, multiple_of=256, norm_eps=1e-5), 32000, 22016, {}),
    (8, dict(dim=8192, n_heads=64, n_kv_heads=8, n_layers=80, multiple_of=4096, ffn_dim_multiplier=1.3, norm_eps=1e-5), 32000, 28672,
     dict(n_kv_heads=8)),                                                                                          # Llama 2 70B
    (1, dict(dim=4096, n_heads=32, n_layers=32, multiple_of=256, ffn_dim_multiplier=1.0, norm_eps=1e-5, rope_theta=1000000), 32016, 11008,
     dict(rope_theta=1e6, max_seq_len=16384)),                                                                     # CodeLlama 7B, 34B
    (4, dict(dim=8192, n_heads=64, n_kv_heads=8, n_layers=48, multiple_of=256, ffn_dim_multiplier=1.0, norm_eps=1e-5, rope_theta=1000000),
     32000, 22016, dict(n_kv_heads=8, rope_theta=1e6, max_seq_len=16384))])
def test_published_params_m04(parts, params, vocab, ffn, ours, tmp_path):
    dim, heads = params["dim"], params["n_heads"]
    D, multiple = dim // heads, params["multiple_of"]
    width = int(params.get("ffn_dim_multiplier", 1) * int(2 * 4 * dim / 3))
    assert (width + multiple - 1) // multiple * multiple == ffn  # Meta's rule, which the files need not be asked by
    rows = {"attention.wq": (heads * D, dim), "attention.wk": (params.get("n_kv_heads", heads) * D, dim), "feed_forward.w1": (ffn, dim)}
    shapes = {f"layers.0.{name}.weight": (height // parts, width) for name, (height, width) in rows.items()}
    shapes |= {"tok_embeddings.weight": (vocab, dim // parts), "output.weight": (vocab // parts, dim)}
    for n in range(parts):  # one number each, spread over the shape
        part = {name: torch.zeros((), dtype=torch.float16).expand(shape) for name, shape in shapes.items()}
        torch.save(part, tmp_path / f"consolidated.{n:02d}.pth")
    (tmp_path / "params.json").write_text(json.dumps(params | {"vocab_size": -1}))
    sizes = dict(dim=dim, n_heads=heads, n_kv_heads=heads, n_layers=params["n_layers"], head_dim=D, ffn_dim=ffn, vocab_size=vocab,
                 norm_eps=params["norm_eps"])
    assert read_config(tmp_path) == dataclasses.replace(PLAIN, **sizes | ours)


@pytest.mark.parametrize("keys, sentence", [
    (dict(model_type="gpt2"), "model_type 'gpt2' is not a LLaMA"), (dict(model_type="gemma"), "model_type 'gemma' is not a LLaMA"),
    (dict(model_type="qwen2"), "model_type 'qwen2' is not a LLaMA"), (dict(model_type="Yi"), "model_type 'Yi' is not a LLaMA"),
    (dict(attention_bias=True), "attention_bias = True, which is not supported"), (dict(mlp_bias=True), "mlp_bias = True"),
    (dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}), "scaling 'llama3' is not supported"),
    (dict(rope_parameters={"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5}), "scaling 'llama3' is not supported"),
    (dict(rope_scaling={"type": "dynamic", "factor": 2.0}), "scaling 'dynamic' is not supported"),
    (dict(rope_scaling={"type": "yarn", "factor": 2.0}), "scaling 'yarn' is not supported"),
    (dict(quantization_config={"quant_method": "gptq"}), "is quantized: open it with quantize.open_model")])
def test_other_architectures_are_refused_by_name(keys, sentence, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA2 | keys))
    with pytest.raises(ValueError, match=sentence) as error:
        Llama.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_names_must_agree_m12_m10(tmp_path):
    model, lost, embedding = tiny(), "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"
    fine = rewrite(saved(tmp_path / "a"), lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}))
    assert same(Llama.from_pretrained(fine), model)
    with pytest.raises(ValueError) as error:
        Llama.from_pretrained(rewrite(fine, lambda t: t.update({"model.layers.1.mlp.upp.weight": t.pop(lost)})))
    assert str(error.value) == f"{fine} does not fit its config: missing {lost}; unexpected model.layers.1.mlp.upp.weight"
    with pytest.raises(ValueError, match="missing lm_head.weight; unexpected nothing"):
        Llama.from_pretrained(rewrite(saved(tmp_path / "b"), lambda t: t.pop("lm_head.weight")))
    with pytest.raises(ValueError, match=r"model.embed_tokens.weight is \(63, 32\), by the config it should be \(64, 32\)"):
        Llama.from_pretrained(rewrite(saved(tmp_path / "b"), lambda t: t.update({embedding: torch.zeros(63, 32)})))
    tied = saved(tmp_path / "c", tie_embeddings=True)
    redundant = Llama.from_pretrained(rewrite(tied, lambda t: t.update({"lm_head.weight": t[embedding].clone()})))
    assert same(redundant, tiny(tie_embeddings=True)) and redundant.output.weight is redundant.tok_embeddings.weight
    with pytest.raises(ValueError, match="head that differs"):
        Llama.from_pretrained(rewrite(tied, lambda t: t["lm_head.weight"].add_(1)))


def test_meta_layouts_m01_m04(tmp_path):
    grouped = tiny()  # two key heads, one a part
    assert same(Llama.from_pretrained(write_meta(grouped, tmp_path / "grouped", 2)), grouped)
    for sizes in ({}, dict(tie_embeddings=True)):
        model, at = tiny(n_kv_heads=4, **sizes), tmp_path / str(len(sizes))
        at.mkdir()
        for parts in (1, 2, 4):
            assert same(Llama.from_pretrained(write_meta(model, at / f"{parts}", parts)), model)
        assert same(Llama.from_pretrained(write_meta(Llama.from_pretrained(at / "4"), at / "4to2", 2)), model)
        wrong = logits(Llama.from_pretrained(write_meta(model, at / "wrong", pairs=False)), some(64))
        assert (wrong - logits(model, some(64)))[20].abs().max() > 1e-2  # this test can fail
    (at / "4" / "consolidated.03.pth").unlink()
    with pytest.raises(ValueError, match="copy the missing parts"):
        Llama.from_pretrained(at / "4")
    (at / "4" / "consolidated.01.pth").unlink()
    with pytest.raises(FileNotFoundError, match="numbered from 00 without a gap"):
        Llama.from_pretrained(at / "4")
    torch.save({"something": torch.zeros(1)}, at / "2" / "consolidated.01.pth")
    with pytest.raises(ValueError, match="not parts of one checkpoint"):
        Llama.from_pretrained(at / "2")
    for keys, sentence in (({"use_scaled_rope": True}, "use_scaled_rope"), ({}, "lacks 'dim'")):
        (at / "1" / "params.json").write_text(json.dumps(keys))
        with pytest.raises(ValueError, match=sentence):
            Llama.from_pretrained(at / "1")


@pytest.mark.parametrize("layout", ["hf", "meta"])
def test_loading_holds_one_tensor_at_a_time(layout, tmp_path, monkeypatch):
    model, alive, read = tiny(), [], data.weights.read_tensors
    model.save_pretrained(tmp_path / "hf"), write_meta(model, tmp_path / "meta", 2)

    def watched(get):
        def call():
            tensor = get()
            assert sum(ref() is not None for ref in alive) <= 1
            alive.extend([weakref.ref(tensor)] * (tensor.dim() == 2))  # norms are whole in Meta's parts, mapped and not read
            return tensor
        return call
    monkeypatch.setattr(data.weights, "read_tensors", lambda *args: {name: stored._replace(read=watched(stored.read)) for name, stored in read(*args).items()})
    assert same(Llama.from_pretrained(tmp_path / layout), model) and len(alive) == 16


WATCHED_LOAD = """
import os, sys, threading
import torch
from data.weights import DTYPES
from model import Llama, LlamaConfig

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon:")) * 1024

with torch.device("meta"):  # the first time, PyTorch imports 70 MB of Python for it
    Llama(LlamaConfig())
for directory, dtype in zip(sys.argv[1::2], sys.argv[2::2]):
    if os.fork() == 0:  # a process for each: what one load leaves behind would hide the peak of the next
        start, seen, done = anonymous(), [], threading.Event()
        def watch():
            while not done.wait(0.0005):
                seen.append(anonymous())
        thread = threading.Thread(target=watch)
        thread.start()
        model = Llama.from_pretrained(directory, DTYPES[dtype])
        seen.append(anonymous())  # a busy machine may not have let the other thread look
        done.set()
        thread.join()
        print(max(seen) - start, sum(p.nbytes for p in model.parameters()), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts anonymous memory in /proc")
def test_loading_holds_one_copy(tmp_path):
    """The promise is a peak of 1.15 N + 300 MB over the start, for a model of N bytes in memory. 300 MB would hide a second copy
    of one this small (160 MB), so it gets 20: the largest matrix is 4. Matrices this small come from malloc's heap, with its holes."""
    model = Llama(LlamaConfig(dim=512, n_layers=12, n_heads=8, n_kv_heads=8, head_dim=64, ffn_dim=1408, vocab_size=2048, max_seq_len=64))
    tensors = {hf_name(name): p.detach() for name, p in model.named_parameters()}
    model.save_pretrained(tmp_path / "safetensors")
    model.config.dtype = "bfloat16"
    model.save_pretrained(tmp_path / "cast")
    model.config.dtype = "float32"
    (tmp_path / "bin").mkdir()
    shutil.copyfile(tmp_path / "safetensors" / "config.json", tmp_path / "bin" / "config.json")
    torch.save(tensors, tmp_path / "bin" / "pytorch_model.bin")
    write_meta(model, tmp_path / "meta", 2)
    layouts = ("safetensors", "cast", "bin", "meta")
    try:
        words = [word for name in layouts for word in (str(tmp_path / name), "fp32")]
        out = subprocess.run([sys.executable, "-c", WATCHED_LOAD, *words], cwd=Path(M.__file__).parent, capture_output=True, text=True,
                             check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}).stdout
    finally:
        for name in layouts:  # pytest keeps the folders of three runs
            shutil.rmtree(tmp_path / name)
    for name, line in zip(layouts, out.splitlines(), strict=True):
        peak, held = map(int, line.split())
        assert held == sum(p.nbytes for p in model.parameters()) > 140e6, name
        joined = 80e6 if name == "meta" else 20e6  # two parts become one tensor, whose memory the heap may not find again
        assert 0.9 * held < peak < 1.15 * held + joined, f"{name}: {peak / 1e6:.0f} MB for {held / 1e6:.0f}"


def test_a_model_with_adapters_is_not_saved_as_plain(tmp_path):
    with pytest.raises(ValueError, match="merge and fold"):
        data.weights.write_model(tmp_path, vars(tiny().config), {"norm.lora_A": torch.zeros(1)})
