"""model.py against references of its own: numpy by hand, the reference logits in shared/real, and itself by another way.

Names such as M13 are cases of the developers' list of faults that users of this field met."""

from data.text import Tokenizer
import data.run
import data.weights
import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

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
