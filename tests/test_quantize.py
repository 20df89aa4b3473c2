"""quantize.py against numpy, brute force, float64 and itself by another way."""

import copy
import dataclasses
import itertools
import json
import math
import os
import platform
import re
import resource
import shutil
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import lora
import model as M
import quantize as Q
import rm
import sft
from data import demo, run, text, weights
from model import Llama, LlamaConfig
from quantize import Linear4, Linear8, Quantized, Row, Scheme, gptq, open_model, pack_int4, packed, rtn, unpack_int4

ROOT = Path(Q.__file__).parent
REAL = ROOT.parent / "shared" / "real"
STORIES, TEXT = REAL / "stories260K", REAL / "text"
needs_real = pytest.mark.skipif(not STORIES.exists(), reason=f"needs the real weights in {STORIES}")
DEMO = ROOT / "data" / "demo"
SIZES = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=172, vocab_size=1280, max_seq_len=64)
BY_ROWS = Scheme("rtn", 8, -1, True)
BY_32 = Scheme("rtn", 4, 32)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrix(O: int, I: int, seed: int = 0) -> Tensor:
    return torch.randn(O, I, generator=seeded(seed))


def correlated(I: int, N: int, seed: int = 0) -> Tensor:
    """N inputs that hang together, as a layer's do: (N, I)."""
    x = torch.randn(N, I, generator=seeded(seed))
    return x @ (torch.eye(I) + 0.5 * torch.randn(I, I, generator=seeded(seed + 1)) / I**0.5) + x[:, :1]


def hessian(x: Tensor) -> Tensor:
    return Q.hessian([x])


def layer_of(bits: int, O: int, I: int, seed: int = 0, size: int = 32) -> Q.QuantizedLinear:
    w = matrix(O, I, seed)
    return Linear8.of(rtn(w, 8, -1, True)) if bits == 8 else Linear4.of(rtn(w, 4, size, False))


def tiny(seed: int = 0, dtype: str = "float32", **sizes) -> Llama:
    model = Llama(LlamaConfig(**SIZES | sizes, dtype=dtype), generator=seeded(seed)).eval()
    for p in model.parameters():
        p.data = (p.data * (3 if p.dim() == 2 else 1)).to(getattr(torch, dtype))
    return model


def quantized(scheme: Scheme, rows: list[Row] = (), **kwargs) -> Llama:
    model = tiny(**kwargs)
    Q.quantize_model(model, scheme, rows)
    return model


def texts(n: int = 6, seed: int = 0, longest: int = 40) -> list[Row]:
    """Rows of unequal length."""
    lengths = torch.randint(longest // 3, longest + 1, (n,), generator=seeded(seed)).tolist()
    ids = [torch.randint(3, 1280, (length,), generator=seeded(seed + i)).tolist() for i, length in enumerate(lengths)]
    return [(row, [False] + [True] * (len(row) - 1)) for row in ids]


TOKENS = torch.tensor([texts()[0][0]])  # (1, T)


def write_demo(directory: Path, **kwargs) -> Path:
    tiny(**kwargs).save_pretrained(directory)
    text.Tokenizer(DEMO).save(directory, "alpaca")
    return directory


def run_main(*flags) -> dict:
    return Q.main([str(flag) for flag in flags])


def near(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-4 * b.abs().max())


def same(a: Quantized, b: Quantized) -> bool:
    return all(torch.equal(left, right) for left, right in zip(a, b))


def clipped(w: Tensor, bits: int, size: int, sym: bool) -> Quantized:
    """Rounding to nearest on grids shrunk where that lowers the squared error."""
    scale, zero = Q.grids(w, bits, size, sym, True, torch.ones_like(w[0]))
    group = rtn(w, bits, size, sym).group
    g = group.long()
    q = Q.nearest_code(w, scale[:, g], zero[:, g], bits)
    return Quantized(q.to(torch.uint8), scale, zero.to(torch.uint8), group)


# ---- formulas: grids and rounding -----------------------------------------------------------------------------------

@pytest.mark.lesson
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits, size, I", [(4, 32, 128), (4, 32, 100), (4, -1, 172), (8, -1, 64)])
def test_rtn_takes_the_nearest_code(bits, size, I, sym):
    """Brute force over all codes; and no weight is further from its value than half a step."""
    w = matrix(9, I)
    m = rtn(w, bits, size, sym)
    step = I if size == -1 else size
    for o, i in itertools.product(range(9), range(I)):
        values = (np.arange(2**bits) - float(m.zero[o, i // step])) * float(m.scale[o, i // step])
        assert abs(values[m.q[o, i]] - float(w[o, i])) <= np.abs(values - float(w[o, i])).min() + 1e-6
    assert ((m.dequantize() - w).abs() <= 0.51 * m.scale[:, m.group.long()]).all()
    assert m.scale.shape == (9, -(-I // step)) and m.q.dtype == torch.uint8
    if bits == 4:
        assert torch.equal(m.scale.half().float(), m.scale)  # what the file can hold


@pytest.mark.lesson
def test_clipping_never_costs_squared_error():
    w = matrix(20, 96) ** 3  # outliers
    codes = (rtn(w, 4, 32, False), clipped(w, 4, 32, False))
    errors = [((m.dequantize() - w).view(20, 3, 32) ** 2).sum(-1) for m in codes]
    assert (errors[1] <= errors[0] + 1e-6).all() and errors[1].sum() < 0.99 * errors[0].sum()


def test_grids_do_not_depend_on_how_rows_are_cut():
    w = matrix(1500, 96)  # more than one slab
    whole = Q.grids(w, 4, 32, False, True, torch.ones(96))
    parts = [Q.grids(part, 4, 32, False, True, torch.ones(96)) for part in w.split(333)]
    assert all(torch.equal(whole[k], torch.cat([part[k] for part in parts])) for k in (0, 1))


def test_zero_rows_and_groups_stay_zero():
    """A scale of 0 would give 0/0."""
    w = matrix(6, 64)
    w[2] = 0
    w[4, 32:] = 0
    H = hessian(correlated(64, 200))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for sym in (True, False):
            for m in (rtn(w, 8, -1, sym), clipped(w, 4, 32, sym), gptq(w, H, 4, 32, sym, True, True),
                      gptq(w, torch.eye(64), 8, -1, True)):
                assert m.dequantize().isfinite().all() and not m.dequantize()[2].any()
        assert not rtn(w, 4, 32, False).dequantize()[4, 32:].any()


@pytest.mark.parametrize("factor", [1e-6, 1e-12, 1e-30])
def test_small_rows_keep_their_values_in_8_bits(factor):
    """The smallest float16 binds the scales of 4 bits only: rescaling a matrix rescales its rounding."""
    w = matrix(8, 64)
    assert torch.equal(rtn(w * factor, 8, -1, True).q, rtn(w, 8, -1, True).q)
    layer = Linear8.of(rtn(w * factor, 8, -1, True))
    assert (layer.dequantize(torch.float32) / factor - w).abs().max() < 0.02


# ---- formulas: GPTQ -------------------------------------------------------------------------------------------------

@pytest.mark.lesson
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits, size, sym", [(4, 16, True), (4, 32, False), (4, -1, False), (8, -1, True)])
def test_gptq_with_identity_is_rtn(bits, size, sym, act_order, clip):
    w = matrix(24, 172)
    w[:, ::3] = w[:, :1]  # ties
    for H in (torch.eye(172), 3.7 * torch.eye(172)):
        expected = (clipped if clip else rtn)(w, bits, size, sym)
        assert same(gptq(w, H, bits, size, sym, act_order, clip), expected)


def by_the_paper(w: Tensor, H: Tensor, m: Quantized, order: list[int], damp: float, most: int) -> np.ndarray:
    """Equations (2) and (3) in float64, column after column: the inverse is updated itself, no Cholesky, no blocks."""
    W, H = w.double().numpy().copy(), H.double().numpy()
    inverse = np.linalg.inv(H + damp * H.diagonal().mean() * np.eye(len(H)))
    scale, zero, group, Q_ = m.scale.double().numpy(), m.zero.double().numpy(), m.group.numpy(), np.empty_like(W)
    for j in order:
        s, z = scale[:, group[j]], zero[:, group[j]]
        Q_[:, j] = (np.clip(np.rint(W[:, j] / s + z), 0, most) - z) * s
        W -= np.outer((W[:, j] - Q_[:, j]) / inverse[j, j], inverse[j])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, j] = 1  # 0 by now; never read again
    return Q_


def falling(H: Tensor, act_order: bool) -> np.ndarray:
    return np.argsort(-H.diagonal().numpy(), kind="stable") if act_order else np.arange(len(H))


@pytest.mark.lesson
@pytest.mark.parametrize("bits, size, sym, act_order, clip", [
    (4, 32, False, False, False), (4, 32, True, True, True), (4, -1, False, True, False), (8, -1, True, False, False)])
def test_gptq_equals_the_papers_plain_recursion(bits, size, sym, act_order, clip):
    """Layer errors to 1e-4: blocks, lazy updates and the Cholesky factor change nothing."""
    w, H = matrix(40, 172), hessian(correlated(172, 2000))

    def error(q: np.ndarray) -> float:
        difference = w.double().numpy() - q
        return float(np.trace(difference @ H.double().numpy() @ difference.T))
    for block in (128, 7):
        m = gptq(w, H, bits, size, sym, act_order, clip, block=block)
        expected = by_the_paper(w, H, m, falling(H, act_order), 0.01, 2**bits - 1)
        assert abs(error(m.dequantize().double().numpy()) / error(expected) - 1) < 1e-4
    mine, plain = (Q.layer_error(w, q.dequantize(), H) for q in (m, rtn(w, bits, size, sym)))
    assert mine < 0.7 * plain


@pytest.mark.parametrize("act_order", [False, True])
def test_grids_count_errors_as_gptq_does(act_order):
    """Clipping weighs column j by 1 / [H_F^-1]_jj, F being the columns not fixed yet: inverted anew for every j."""
    w, H = matrix(30, 64) ** 3, hessian(correlated(64, 300) * torch.logspace(-1, 1, 64))
    order = falling(H, act_order)
    damped, importance = H.double().numpy() + 0.01 * H.diagonal().mean().item() * np.eye(64), torch.empty(64)
    for i, j in enumerate(order):
        importance[j] = 1 / np.linalg.inv(damped[np.ix_(order[i:], order[i:])])[0, 0]
    expected, zero = Q.grids(w, 4, 16, False, True, importance)
    m = gptq(w, H, 4, 16, False, act_order, clip=True)
    assert (m.scale == expected).float().mean() > 0.97 and (m.zero == zero).float().mean() > 0.97
    others = Q.grids(w, 4, 16, False, True, torch.ones(64))[0]
    assert (others == expected).float().mean() < 0.9


@pytest.mark.lesson
def test_layer_error_is_that_of_the_outputs():
    w, x = matrix(8, 32), correlated(32, 100)
    q = rtn(w, 4, 16, False).dequantize()
    expected = float((x @ (w - q).T).square().sum() / (x @ w.T).square().sum())
    assert Q.layer_error(w, q, hessian(x)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.lesson
def test_hessian_and_its_inverse_factor():
    """H = X X^T, also of inputs that come in parts; U^T U = (H + damp)^-1 and U is upper triangular."""
    x = correlated(600, 900)
    H = hessian(x)
    assert torch.allclose(H, x.T @ x, rtol=1e-4, atol=1e-2)
    assert torch.allclose(Q.hessian(x.split(250)), H, rtol=1e-4, atol=1e-2) and Q.hessian([]) is None
    U = Q.inverse_factor(H, 0.01).double()
    product = U.T @ U @ (H.double() + 0.01 * H.diagonal().mean().double() * torch.eye(600))
    assert (product - torch.eye(600)).abs().max() < 1e-3 and not U.tril(-1).any()


def test_dead_and_equal_inputs():
    """H is not positive-definite without damping. The dead column's weights are rounded plainly, and move no other."""
    x = correlated(64, 500)
    x[:, 5] = 0
    x[:, 9] = x[:, 8]
    w = matrix(16, 64)
    plain = rtn(w, 4, 32, False)
    for act_order in (False, True):
        m = gptq(w, hessian(x), 4, 32, False, act_order)
        assert m.dequantize().isfinite().all()
        assert torch.equal(m.q[:, 5], plain.q[:, 5]) and not torch.equal(m.q, plain.q)
        assert same(gptq(w, torch.zeros(64, 64), 4, 32, False, act_order, clip=True), plain)


def test_fewer_inputs_than_dimensions():
    """Fine with damping, a sentence without."""
    w, H = matrix(16, 64), hessian(correlated(64, 20))
    mine, plain = (Q.layer_error(w, m.dequantize(), H) for m in (gptq(w, H, 4, 32, False), rtn(w, 4, 32, False)))
    assert mine < 0.5 * plain
    for seed in range(6):  # one dimension missing: of some of these, rounding hides it from Cholesky
        with pytest.raises(ValueError, match="span fewer than its 64 dimensions.*--damp"):
            gptq(w, hessian(correlated(64, 500, seed)[:63]), 4, 32, False, damp=0.0)
    sizes = torch.logspace(-3, 3, 64)
    full = hessian(correlated(64, 640)) * sizes.outer(sizes)  # full rank, of very different sizes
    assert gptq(w, full, 4, 32, False, damp=0.0).dequantize().isfinite().all()


# ---- formulas: packing and layers -----------------------------------------------------------------------------------

@pytest.mark.lesson
def test_packing_by_hand():
    """Input 0 sits in the lowest four bits (lit-llama's packing lost codes)."""
    words = pack_int4(torch.arange(8)[None].repeat(2, 1))
    assert words.shape == (1, 2) and words.dtype == torch.int32
    assert [w & 0xffffffff for w in words[0].tolist()] == [0x76543210] * 2
    for O, I in ((1, 1), (5, 8), (3, 172), (16, 64)):
        q = torch.randint(0, 16, (O, I), generator=seeded(I), dtype=torch.uint8)
        assert torch.equal(unpack_int4(pack_int4(q), I), q) and pack_int4(q).shape == (-(-I // 8), O)
    with pytest.raises(ValueError, match="hold 0 to 15"):
        pack_int4(torch.tensor([[16]]))


@pytest.mark.lesson
@pytest.mark.parametrize("bits, O, I", [(4, 24, 44), (4, 9, 100), (8, 24, 44)])
def test_a_layer_is_its_matrix(bits, O, I):
    m = rtn(matrix(O, I), bits, 32 if bits == 4 else -1, bits == 8)
    layer, x = (Linear4 if bits == 4 else Linear8).of(m), matrix(5, I, 1)
    assert torch.equal(layer.dequantize(torch.float32), m.dequantize())
    assert torch.allclose(layer(x), x @ m.dequantize().T, atol=1e-5)
    assert torch.equal(layer.plain(torch.float32).weight, m.dequantize()) and same(layer.quantized(), m)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    for name, buffer in layer.to(torch.bfloat16).named_buffers():  # scales in bf16 would be other scales
        assert torch.equal(buffer, before[name]) and buffer.dtype == before[name].dtype


@pytest.mark.lesson
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_through_a_quantized_layer(bits, dtype):
    layer = layer_of(bits, 24, 44)
    W = layer.dequantize(torch.float32)
    x, dy = matrix(10, 44, 1).to(dtype).requires_grad_(), matrix(10, 24, 2).to(dtype)
    y = layer(x)
    y.backward(dy)
    exact = 1e-6 if dtype == torch.float32 else 0.01
    assert y.dtype == x.grad.dtype == dtype
    right, right_y = dy.float() @ W, x.float() @ W.T
    assert (x.grad.float() - right).norm() < exact * right.norm()
    assert (y.float() - right_y).norm() < exact * right_y.norm()


def test_size_of_a_quantized_weight():
    """Four bits in groups of 128 take at most 4.3 bits, eight take 8.1."""
    bits = lambda layer: 8 * sum(buffer.nbytes for buffer in layer.buffers()) / 512**2
    assert bits(layer_of(4, 512, 512, size=128)) <= 4.3 and bits(layer_of(8, 512, 512)) <= 8.1


# ---- invariants: a whole model --------------------------------------------------------------------------------------

def seen_hessians(model: Llama, rows: list[Row], monkeypatch, **scheme) -> dict[str, Tensor]:
    found, quantize_linears = {}, Q.quantize_linears

    def watched(parent, names, where, scheme, H):
        found[f"{where}.{names[0]}"] = H
        return quantize_linears(parent, names, where, scheme, H)
    with monkeypatch.context() as patch:
        patch.setattr(Q, "quantize_linears", watched)
        Q.quantize_model(model, Scheme("gptq", 4, 32, **scheme), rows)
    return found


def test_padding_does_not_enter_the_statistics(monkeypatch):
    """Texts of unequal length in one padded batch, and each alone."""
    together = seen_hessians(tiny(), texts(), monkeypatch)
    monkeypatch.setattr(Q, "TOKENS", 1)
    alone = seen_hessians(tiny(), texts(), monkeypatch)
    assert len(together) == 8
    first = "layers.0.attention.wq"  # later ones also depend on codes, where a rounding may tip
    assert torch.allclose(together[first], alone[first], rtol=1e-5, atol=1e-5 * alone[first].abs().max())


def test_layers_are_calibrated_on_what_they_will_see(monkeypatch):
    """q, k, v before o, gate and up before down, and blocks before it quantized: every H is that of the final model."""
    model, rows = tiny(), texts()
    found = seen_hessians(model, rows, monkeypatch, head=True)
    inputs = {}
    for name, module in Q.quantized_layers(model).items():
        inputs[name] = []
        module.register_forward_pre_hook(lambda module, x, seen=inputs[name]: seen.append(x[0].flatten(0, -2)))
    for ids, _ in rows:
        model(torch.tensor([ids]))
    first = ("attention.wq", "attention.wo", "feed_forward.w1", "feed_forward.w2")
    assert set(found) == {*(f"layers.{i}.{name}" for i in (0, 1) for name in first), "model.output"}
    for name, H in found.items():
        x = torch.cat(inputs[name.removeprefix("model.")]).double()
        assert (H - x.T @ x).norm() < 1e-4 * H.norm(), name


def test_perplexity_by_hand():
    """Three texts, padded, against exp of the summed cross-entropy."""
    model, rows, nll, n = tiny(), texts(3), 0.0, 0
    for ids, _ in rows:
        logp = model(torch.tensor([ids]))[0].double().log_softmax(-1)
        nll -= sum(logp[t - 1, ids[t]].item() for t in range(1, len(ids)))
        n += len(ids) - 1
    assert Q.perplexity(model, rows) == pytest.approx(math.exp(nll / n), rel=1e-5)
    flags = [False, True, True, True, True]
    assert Q.windows(list(range(10, 21)), 5, 1) == [([1, 10, 11, 12, 13], flags), ([1, 14, 15, 16, 17], flags)]
    assert Q.windows(list(range(10, 21)), 5, None) == [([10, 11, 12, 13, 14], flags), ([15, 16, 17, 18, 19], flags)]


def test_head_nll_in_parts_is_the_whole():
    head, h, answer = nn.Linear(8, 30, bias=False), matrix(1100, 8), torch.arange(1100) % 30
    expected = nn.functional.cross_entropy(head(h), answer, reduction="sum")
    assert torch.allclose(Q.head_nll(head, h, answer), expected, rtol=1e-5) and Q.head_nll(head, h[:0], answer[:0]) == 0


@needs_real
def test_perplexity_of_the_real_model(capsys):
    reference = json.loads((STORIES / "perplexity.json").read_text())
    summary = run_main(STORIES / "hf", "--eval", "--text", REAL / reference["text"])
    assert summary["perplexity"] == pytest.approx(reference["perplexity"], abs=1e-3)
    assert summary["windows"] == reference["windows"]
    said = "60 windows of 255 ids on end, BOS before each, the last partial one dropped"
    assert said in capsys.readouterr().out


def test_a_tokenizer_without_bos(smollm2, tmp_path, capsys):
    """The first 2 of the 40 windows of shared/real's perplexity.json, which have no BOS, against transformers 5.24. All
    40, which are the first 39,261 bytes, give its 27.43 too."""
    cut = (TEXT / "wikitext2_valid_head.txt").read_text("utf-8")[:2400]
    (tmp_path / "text").write_text(cut, "utf-8")
    summary = run_main(smollm2 / "hf", "--eval", "--text", tmp_path / "text")
    assert summary["windows"] == 2 and summary["perplexity"] == pytest.approx(19.207089765, abs=1e-3)
    said = "2 windows of 256 ids on end, the last partial one dropped, every id but the first predicted"
    assert said in capsys.readouterr().out


def test_gptq_of_smollm2_leaves_half_of_the_error(smollm2):
    """Its first block, 576 and 1536 wide, in groups that divide these and in groups that do not."""
    ids = text.Tokenizer(smollm2 / "hf").encode((TEXT / "wikitext2_valid_head.txt").read_text("utf-8")[:20000])
    model = open_model(smollm2 / "hf")
    plain = model.layers[:1]
    for size in (64, 128):
        model.layers = copy.deepcopy(plain)
        report = Q.quantize_model(model, Scheme("gptq", 4, size), Q.windows(ids, 256, None))
        assert len(report) == 7 and sum(row["gptq"] / row["rtn"] for row in report) < 0.5 * 7, report
        down, x = model.layers[0].feed_forward.w2, matrix(3, 1536)
        if fast := Q.fast_product(down):
            assert (fast(x) - down(x)).norm() < 6e-3 * down(x).norm()


def story_rows(name: str) -> list[Row]:
    tokenizer = text.Tokenizer(STORIES / "hf")
    return Q.windows(tokenizer.encode((TEXT / name).read_text("utf-8"), bos=False), 256, tokenizer.bos_id)


@needs_real
def test_quality_on_a_real_model():
    """8 bits within 0.5 %, by RTN, by GPTQ and through the fast kernel; 4-bit GPTQ leaves at most 0.5 of RTN's loss on
    average and never more than 0.6; smaller groups are not worse than whole rows."""
    calibration, held = story_rows("tinystories_calibration.txt"), story_rows("tinystories_eval.txt")

    def after(*scheme, **further) -> tuple[float, Llama]:
        model = Llama.from_pretrained(STORIES / "hf")
        Q.quantize_model(model, Scheme(*scheme, **further), calibration)
        return Q.perplexity(model, held), model

    plain = Q.perplexity(Llama.from_pretrained(STORIES / "hf"), held)
    for method in ("rtn", "gptq"):
        value, model = after(method, 8, -1, True)
        assert value < 1.005 * plain
        with packed(model):
            assert Q.perplexity(model, held) < 1.005 * plain
    left = []
    for size, sym in ((16, False), (32, True), (64, True)):
        by_gptq, by_rtn = after("gptq", 4, size, sym)[0], after("rtn", 4, size, sym)[0]
        left.append((by_gptq - plain) / (by_rtn - plain))
    assert sum(left) / 3 < 0.5 and max(left) < 0.6, left  # README has all of them
    by_32 = after("gptq", 4, 32, False)[0]
    assert by_32 < 1.02 * after("gptq", 4, -1, False)[0] and by_32 < 1.3 * plain


# ---- invariants: adapters on quantized weights ----------------------------------------------------------------------

@pytest.mark.parametrize("scheme", [BY_32, BY_ROWS])
def test_no_full_copy_of_a_frozen_weight_outlives_its_layer(scheme, monkeypatch):
    """With adapters, forward and backward: at most one dequantized matrix lives at a time, autograd keeps none."""
    model = quantized(scheme)
    lora.attach(model, 4, generator=seeded(1))
    alive, most, calls, kept = weakref.WeakSet(), [0], [0], []
    for cls in (Linear4, Linear8):
        def watched(self, dtype, dequantize=cls.dequantize):
            most[0], calls[0] = max(most[0], len(alive) + 1), calls[0] + 1
            W = dequantize(self, dtype)
            alive.add(W.untyped_storage())
            return W
        monkeypatch.setattr(cls, "dequantize", watched)
    sizes = {(layer.out_features, layer.in_features) for layer in Q.quantized_layers(model).values()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        loss = model(TOKENS).square().mean()
    assert calls[0] == 14 and not len(alive)
    loss.backward()
    assert most[0] == 1 and not len(alive) and calls[0] == 14 + 11  # what the first q, k and v read needs no gradient
    assert kept and not sizes & {*kept, *(shape[::-1] for shape in kept)}


@pytest.mark.parametrize("bits", [4, 8])
def test_stages_train_adapters_on_a_quantized_base(tmp_path, bits):
    """--pretrain takes the directory with --lora_rank and refuses it without; the base stays as it was, the adapter
    opens."""
    write_demo(tmp_path / "plain")
    run_main(tmp_path / "plain", "--method", "rtn", "--bits", bits, "--save_path", tmp_path / "base")
    flags = ["--pretrain", tmp_path / "base", "--dataset", DEMO / "sft.jsonl.gz", "--max_datasets_size", 24,
             "--max_len", 64, "--batch_size", 4, "--accumulation_steps", 1, "--max_epochs", 2, "--eval_size", 4,
             "--lr", 1e-2, "--save_path", tmp_path / "out"]
    with pytest.raises(ValueError, match="is quantized, its weights cannot be trained: give --lora_rank"):
        sft.main([str(flag) for flag in flags])
    before = (tmp_path / "base" / "model.safetensors").read_bytes()
    summary = sft.main([str(flag) for flag in (*flags, "--lora_rank", 4, "--grad_checkpoint")])
    assert summary["eval_loss"] < summary["eval_loss_before"] - 0.2
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == before
    model = open_model(tmp_path / "out").eval()
    with torch.no_grad():
        expected = model(TOKENS)
        assert (open_model(tmp_path / "base")(TOKENS) - expected).norm() > 0.05 * expected.norm()
        with packed(model):  # fast kernels under adapters
            assert (model(TOKENS) - expected).norm() < 0.05 * expected.norm()


# ---- invariants: fast kernels ---------------------------------------------------------------------------------------

def product_of(layer: nn.Module, kernel):
    """A kernel's product for a layer; skips where this machine has no such kernel."""
    if not Q.kernel_works(kernel, type(layer), next(iter(layer.state_dict().values())).dtype, "cpu"):
        pytest.skip(f"{kernel.__name__} does not work on this machine")
    return kernel(layer)


@pytest.mark.parametrize("O, I, size", [(172, 64, 32), (64, 172, 32), (5, 100, -1), (48, 300, 96), (70, 256, 256)])
def test_fast_int4_is_the_layer_within_its_rounding(O, I, size):
    """Odd widths, small outputs, one row and many: bf16 rounds x and scales to 2^-9."""
    layer = layer_of(4, O, I, size=size)
    product = product_of(layer, Q.int4_product)
    for n in (1, 3, 200):
        x = matrix(n, I, 7)
        assert (product(x) - layer(x)).norm() < 6e-3 * layer(x).norm()
    assert product(x.view(2, -1, I)).shape == (2, 100, O)


@pytest.mark.parametrize("kernel", [Q.int8_product, Q.int8_weight_product, Q.int8_cuda_product])
@pytest.mark.parametrize("O, I", [(172, 64), (64, 172), (5, 100)])
def test_fast_int8_is_the_layer_within_its_rounding(O, I, kernel):
    layer = layer_of(8, O, I)
    product = product_of(layer, kernel)
    if kernel is Q.int8_weight_product and I % 16:
        assert product is None
        return
    for n in (1, 20):
        x = matrix(n, I, 7) * torch.logspace(-2, 2, n)[:, None]  # every row has a scale of its own
        assert ((product(x) - layer(x)).norm(dim=1) < 0.015 * layer(x).norm(dim=1)).all() and not product(0 * x).any()
    assert product(x.view(2, -1, I)).shape == (2, 10, O)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_plain_matrix_is_packed(dtype):
    layer = nn.Linear(1024, 600, bias=False).to(dtype)
    small = nn.Linear(64, 64, bias=False).to(dtype)
    if not Q.kernel_works(Q.onednn_product, nn.Linear, dtype, "cpu"):
        assert Q.fast_product(layer) is None
        pytest.skip(f"oneDNN packs no {dtype} on this machine")
    model, x = nn.Sequential(layer), matrix(3, 1024, 1).to(dtype).view(1, 3, 1024)
    with torch.no_grad():
        right = model(x)
        with packed(model):
            assert "forward" in vars(layer) and (model(x) - right).abs().max() <= 0.01 * right.abs().max()
        assert "forward" not in vars(layer) and torch.equal(model(x), right) and Q.fast_product(small) is None


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="known of x86 alone")
def test_kernels_are_in_use():
    """The fall-back is as right as the kernels, so a fault of ours in calling them would only be slow."""
    assert Q.fast_product(layer_of(4, 64, 64)) and Q.fast_product(layer_of(8, 64, 64))
    assert Q.fast_product(nn.Linear(1024, 1024, bias=False))
    if torch.cpu._is_vnni_supported() and not os.environ.get("ONEDNN_MAX_CPU_ISA"):
        assert Q.kernel_works(Q.int8_product, Linear8, torch.int8, "cpu")
    if torch.cpu._is_avx512_bf16_supported() and not os.environ.get("ONEDNN_MAX_CPU_ISA"):
        assert Q.fast_product(nn.Linear(1024, 1024, bias=False).bfloat16())


def test_a_kernel_that_computes_something_else_is_not_used(monkeypatch):
    zeros = lambda layer: lambda x: torch.zeros(*x.shape[:-1], layer.out_features)
    missing = lambda layer: layer.no_such_kernel
    monkeypatch.setitem(Q.KERNELS, ("cpu", Linear4), (missing, zeros))
    monkeypatch.setitem(Q.KERNELS, ("cpu", nn.Linear), (zeros,))
    assert Q.fast_product(layer_of(4, 64, 64)) is None and Q.fast_product(nn.Linear(1024, 1024, bias=False)) is None


def test_layers_without_a_kernel_fall_back(monkeypatch):
    """Groups of 16 have no kernel; nor has a PyTorch whose kernels are missing or disagree."""
    assert Q.fast_product(layer_of(4, 8, 64, size=16)) is None
    monkeypatch.setattr(Q, "kernel_works", lambda *_: False)
    model, prompt = quantized(BY_32), [TOKENS[0, :5].tolist()]
    before, answer = model(TOKENS), model.generate(prompt, 8, temperature=0)
    with packed(model):
        assert torch.equal(model(TOKENS), before) and model.generate(prompt, 8, temperature=0) == answer


@pytest.mark.parametrize("scheme", [BY_32, BY_ROWS])
def test_packed_is_left_as_it_was_entered(scheme, monkeypatch):
    """PPO's rollouts: the kernels run while it generates and no longer, also where that fails, inside another `packed`,
    and not where a gradient is needed; names and weights stay the same meanwhile."""
    model, used = quantized(scheme, ffn_dim=176), []  # 16 divides every side, so every kernel takes it
    lora.attach(model, 2)
    names, before = list(model.state_dict()), model(TOKENS)
    if Q.fast_product(model.layers[0].attention.wq.base) is None:
        pytest.skip(f"this machine has no kernel of {scheme.bits} bits")
    fast_forward = Q.fast_forward

    def watched(layer, product, x):
        used.append(tuple(x.shape[:-1]))
        return fast_forward(layer, product, x)
    monkeypatch.setattr(Q, "fast_forward", watched)
    with packed(model):
        model.generate([TOKENS[0, :5].tolist(), TOKENS[0, 1:6].tolist()], 4, temperature=0, eos_id=-1)
        # A prefill and three steps of 14 matrices: the last block's feed-forward sees each prompt's last token alone.
        assert used == [(2, 5)] * 11 + [(2,)] * 3 + [(2, 1)] * 3 * 14
        with pytest.raises(ValueError), packed(model):
            model.generate([[]], 4)
        assert list(model.state_dict()) == names and len(used) == 4 * 14
        assert (model(TOKENS) - before).norm() > 0 and len(used) == 5 * 14  # the inner one has not ended the outer
        x = matrix(3, 64).requires_grad_()
        layer = model.layers[0].attention.wq.base
        assert torch.equal(layer(x), x @ layer.dequantize(torch.float32).T) and layer(x).requires_grad
    assert torch.equal(model(TOKENS), before) and len(used) == 5 * 14 + 2
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("scheme", [BY_32, BY_ROWS])
def test_layers_with_the_same_input_are_one_product(scheme, monkeypatch):
    """q, k and v in one call of the kernel give what each gives alone, in any order, also where one is called twice and
    its output was changed in place."""
    attention, x, other = quantized(scheme).layers[0].attention, matrix(5, 64), matrix(2, 64, 1)
    layers = [attention.wq, attention.wk, attention.wv]
    alone = [Q.fast_product(layer) for layer in layers]
    if alone[0] is None:
        pytest.skip(f"this machine has no kernel of {scheme.bits} bits")
    together, joined = [], Q.joined
    monkeypatch.setattr(Q, "joined", lambda layers: together.append(len(layers)) or joined(layers))
    with packed(attention):
        assert together == [3, 1] and not Q.by_input(attention)
        for order, now in itertools.product(itertools.permutations(range(3)), (x, other)):
            for k in (*order, order[0]):
                y = layers[k](now)
                assert torch.equal(y, alone[k](now))
                y += 1


@pytest.mark.parametrize("scheme", [None, BY_32, BY_ROWS])
def test_packed_weights_can_be_given_up(scheme, monkeypatch):
    """A server holds each weight once. A tied embedding stays, and the answers are the same."""
    monkeypatch.setattr(Q, "WORTH", 0)
    model = tiny(tie_embeddings=True)
    if scheme:
        Q.quantize_model(model, scheme)
    linears = [m for m in model.modules() if isinstance(m, nn.Linear | Q.QuantizedLinear) and Q.fast_product(m)]
    prompt = [TOKENS[0, :5].tolist()]
    with packed(model):
        answer = model.generate(prompt, 8, temperature=0)
    with packed(model, keep=False):
        assert model.generate(prompt, 8, temperature=0) == answer and model.tok_embeddings.weight is not None
        assert not any(m.state_dict() for m in linears)


@pytest.mark.parametrize("scheme", [BY_32, BY_ROWS])
def test_generation_on_the_kernels_is_the_reference(scheme):
    """Each id is the dequantizing model's likeliest, or lost to one that is nearly as likely."""
    model = quantized(scheme, tie_embeddings=True, seed=2)
    prompts = [ids[:n] for (ids, _), n in zip(texts(), (9, 4, 12))]
    with packed(model):
        answers = model.generate(prompts, 12, temperature=0, eos_id=-1)
    for prompt, answer in zip(prompts, answers):
        logits = model(torch.tensor([prompt + answer]))[0, len(prompt) - 1:-1]
        behind = logits.max(-1).values - logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert (behind < 0.05 * logits.std()).all()


# ---- opening any directory ------------------------------------------------------------------------------------------

def write_adapter(directory: Path, base: Path, model: Llama, seed: int = 3) -> Path:
    """An adapter that changes the logits of `model`, which stands on `base`."""
    lora.attach(model, 2, generator=seeded(seed))
    for layer in lora.adapters(model).values():
        layer.lora_B.data.normal_(0, 0.2, generator=seeded(seed))
    lora.save_adapter(model, directory, str(base))
    return directory


def write_quantized(directory: Path, scheme: Scheme) -> Path:
    Q.save(quantized(scheme), directory)
    return directory


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_open_plain_and_quantized(tmp_path, dtype):
    plain, base = write_demo(tmp_path / "plain"), write_quantized(tmp_path / "base", BY_32)
    for directory, layers in ((plain, 0), (base, 14)):
        model = open_model(directory, dtype)
        assert len(Q.quantized_layers(model)) == layers and bool(model.quantized) == bool(layers)
        assert model.norm.weight.dtype == (dtype or torch.float32)
        trunk = open_model(directory, dtype, head=False)
        assert trunk.output is None and torch.equal(trunk.hidden(TOKENS), model.hidden(TOKENS))


@needs_real
@pytest.mark.parametrize("layout", ["meta", "meta-mp2", "hf-sharded", "hf-bin"])
def test_open_every_layout(layout):
    tokens = torch.arange(3, 40)[None]
    assert torch.equal(open_model(STORIES / layout)(tokens), Llama.from_pretrained(STORIES / "hf")(tokens))


def test_open_an_adapter(tmp_path):
    """auto merges into a plain base and keeps beside a quantized one; merging there gives full precision."""
    plain, base = write_demo(tmp_path / "plain"), write_quantized(tmp_path / "base", BY_ROWS)
    for home in (plain, base):
        beside = open_model(home)
        path = write_adapter(tmp_path / f"adapter-{home.name}", home, beside)
        expected = beside(TOKENS)
        assert (expected - open_model(home)(TOKENS)).norm() > 0.1 * expected.norm()
        for how in ("auto", "keep", "merge"):
            model = open_model(path, adapter=how)
            kept = how == "keep" or (how == "auto" and home == base)
            assert bool(lora.adapters(model)) == kept and bool(model.quantized) == (kept and home == base)
            assert near(model(TOKENS), expected)


def test_open_an_adapter_on_another_base(tmp_path):
    first, second = write_demo(tmp_path / "first"), write_demo(tmp_path / "second", seed=5)
    beside = open_model(second)
    path = write_adapter(tmp_path / "adapter", first, beside)
    assert near(open_model(path, base=second)(TOKENS), beside(TOKENS))


@pytest.mark.parametrize("base", [".", "{}", "adapter/../adapter"])
def test_an_adapter_beside_the_base_that_it_names(tmp_path, monkeypatch, capsys, base):
    """huggingface/peft#1381: it was applied or ignored, by the spelling of the path and by the script."""
    monkeypatch.chdir(tmp_path)
    path = write_demo(Path("adapter"))
    beside = open_model(path)
    write_adapter(path, base.format(path.resolve()), beside)
    assert near(open_model(path)(TOKENS), beside(TOKENS))
    lora.main(["merge", "adapter", "merged"])
    assert not capsys.readouterr().err
    assert near(Llama.from_pretrained("merged")(TOKENS), beside(TOKENS))
    for use in (Llama.from_pretrained, lambda path: M.main(["convert", path, "out"])):
        with pytest.raises(ValueError, match="adapter holds an adapter: merge it first"):
            use("adapter")


def test_an_adapter_beside_another_model(tmp_path, capsys):
    """What a directory holds is asked once: all scripts refuse two models, and no adapter is what has no weights."""
    base, path = write_demo(tmp_path / "base"), write_demo(tmp_path / "both", seed=1)
    write_adapter(path, base, tiny())
    for use in (open_model, Llama.from_pretrained, lambda path: run_main(path, "--eval"),
                lambda path: lora.main(["merge", str(path), str(tmp_path / "out")])):
        with pytest.raises(ValueError, match=f"both holds a model, and an adapter of {base}: put the adapter into"):
            use(path)
    assert not (tmp_path / "out").exists()
    (path / lora.WEIGHTS).unlink()
    assert torch.equal(open_model(path)(TOKENS), tiny(1)(TOKENS))
    assert "both holds a model, and an adapter_config.json without weights" in capsys.readouterr().err
    write_adapter(path, base, tiny())
    (path / lora.CONFIG).unlink()
    assert torch.equal(open_model(path)(TOKENS), tiny(1)(TOKENS))
    assert "other files of weights than those that are read (adapter_model.safetensors)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["gptq_model-4bit-32g.safetensors", "model.safetensors"])
def test_settings_beside_the_config_are_read(tmp_path, capsys, name):
    """AutoGPTQ's older files. They were never called quantized."""
    path = write_quantized(tmp_path, BY_32)
    expected = open_model(path)(TOKENS)
    config = json.loads((path / "config.json").read_text())
    settings = config.pop("quantization_config")
    (path / "config.json").write_text(json.dumps(config))
    older = {key: settings[key] for key in ("bits", "group_size", "desc_act", "sym")}
    (path / "quantize_config.json").write_text(json.dumps(older | {"checkpoint_format": settings["checkpoint_format"]}))
    (path / "model.safetensors").rename(path / name)
    assert torch.equal(open_model(path)(TOKENS), expected)
    with pytest.raises(ValueError, match="is quantized: open it with"):
        Llama.from_pretrained(path)
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    for changed in ({}, {"group_size": 16}):  # where both stand, config.json counts
        (path / "quantize_config.json").write_text(json.dumps(older | changed))
        assert torch.equal(open_model(path)(TOKENS), expected)
        assert ("quantize_config.json differs from" in capsys.readouterr().err) == bool(changed)
    plain = write_demo(tmp_path / "plain")
    shutil.copy(path / "quantize_config.json", plain)
    with pytest.raises(ValueError, match="no layer is: copy it again, or remove the .* quantize_config.json"):
        open_model(plain)


def test_open_and_round(tmp_path, capsys):
    """quant rounds a plain model, must agree with a quantized one, and keeps an adapter beside what it rounded."""
    plain, base = write_demo(tmp_path / "plain"), write_quantized(tmp_path / "base", BY_32)
    assert open_model(plain, quant="8bit").quantized["bits"] == 8 and "GPTQ loses less" not in capsys.readouterr().out
    model = open_model(plain, quant="4bit")
    assert model.quantized["bits"] == 4 and "GPTQ loses less" in capsys.readouterr().out
    assert isinstance(model.layers[0].feed_forward.w1, Linear4)
    assert isinstance(model.output, Linear8) and model.output.scale.grad_fn is None
    assert torch.equal(model.output.weight, Linear8.of(rtn(tiny().output.weight, 8, -1, True)).weight)
    with pytest.raises(ValueError, match="rounded at load, with a head in 8 bits"):
        Q.save(model, tmp_path / "again")
    assert open_model(base, quant="4bit").quantized["bits"] == 4
    with pytest.raises(ValueError, match="quantized to 4 bits, 8bit was asked for"):
        open_model(base, quant="8bit")
    path = write_adapter(tmp_path / "adapter", plain, open_model(plain))
    beside, merged = open_model(path, quant="8bit"), open_model(path, quant="8bit", adapter="merge")
    assert len(lora.adapters(beside)) == 14 and not lora.adapters(merged) and merged.quantized["bits"] == 8
    assert (beside(TOKENS) - merged(TOKENS)).norm() < 0.1 * merged(TOKENS).norm()


def test_open_a_reward_model(tmp_path):
    """Of a plain, a quantized and an adapter's directory: head=False gives the trunk, head=True names who opens it."""
    plain, base = tmp_path / "plain", tmp_path / "base"
    model = rm.RewardModel(tiny(), seeded(1))
    model.trunk.output = None
    model.save_pretrained(plain)
    expected = model.trunk.hidden(TOKENS)
    Q.save(quantized(BY_ROWS), base)
    tensors = safetensors.torch.load_file(base / "model.safetensors")
    del tensors["lm_head.weight"]
    safetensors.torch.save_file(tensors | {"score.weight": torch.ones(1, 64)}, base / "model.safetensors")
    lora.attach(model, 2, generator=seeded(2))
    lora.save_adapter(model, tmp_path / "adapter", str(write_demo(tmp_path / "language")))
    for directory in (plain, base, tmp_path / "adapter"):
        with pytest.raises(ValueError, match="it has no words: open it with RewardModel.from_pretrained"):
            open_model(directory)
        trunk = open_model(directory, head=False)
        assert trunk.output is None and (trunk.hidden(TOKENS) - expected).norm() < 0.05 * expected.norm()


# ---- files ----------------------------------------------------------------------------------------------------------

def nibbles(words: np.ndarray, axis: int) -> np.ndarray:
    """int32 -> eight times as many codes along an axis, the lowest four bits first; by numpy alone."""
    parts = np.stack([(words.astype(np.int64) >> shift) & 15 for shift in range(0, 32, 4)], axis=axis + 1)
    return parts.reshape(*words.shape[:axis], -1, *words.shape[axis + 1:])


def pack(codes: np.ndarray, axis: int) -> np.ndarray:
    """The inverse of nibbles."""
    parts = [np.take(codes, range(k, codes.shape[axis], 8), axis).astype(np.int64) << 4 * k for k in range(8)]
    return sum(parts).astype(np.uint32).view(np.int32)


@pytest.mark.parametrize("sym, act_order", [(True, False), (False, True), (False, False), (True, True)])
def test_directory_by_an_independent_reader(tmp_path, sym, act_order):
    """AutoGPTQ's layout, read by numpy: codes, zeros minus one in `gptq` and as they are in `gptq_v2`, scales, g_idx,
    and words that are not full, which gptqmodel 7.6 reads in these shapes."""
    model = tiny()
    ramp = torch.tensor([[0.0], [1.0], [14.0], [15.0]]) - torch.linspace(0, 15, 32)
    model.layers[0].feed_forward.w2.weight.data[:4, :32] = ramp  # zeros at 15 .. 0
    Q.quantize_model(model, Scheme("gptq", 4, 32, sym, act_order, clip=False), texts())
    Q.save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    expected = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": sym, "desc_act": act_order,
                "checkpoint_format": "gptq" if sym else "gptq_v2", "static_groups": True, "true_sequential": True}
    assert {key: config[key] for key in expected} == expected
    stored = {name: t.numpy() for name, t in safetensors.torch.load_file(tmp_path / "model.safetensors").items()}
    for name, layer in Q.quantized_layers(model).items():
        prefix, O, I = weights.hf_name(name), layer.out_features, layer.in_features
        zero = nibbles(stored[f"{prefix}.qzeros"], 1)[:, :O] + (1 if sym else 0)         # (G, O)
        g, scales = stored[f"{prefix}.g_idx"], stored[f"{prefix}.scales"]
        dense = (nibbles(stored[f"{prefix}.qweight"], 0)[:I] - zero[g]) * scales[g].astype(np.float32)  # (I, O)
        assert np.allclose(dense.T, layer.dequantize(torch.float32).numpy(), atol=1e-7)
        assert scales.dtype == np.float16 and (g == np.arange(I) // 32).all()
        shapes = [stored[f"{prefix}.{part}"].shape for part in ("qweight", "qzeros")]
        assert shapes == [(-(-I // 8), O), (-(-I // 32), -(-O // 8))]
    if not sym:
        zeros = Q.quantized_layers(model)["layers.0.feed_forward.w2"].quantized().zero   # (O, G)
        assert {0, 15} <= set(zeros[:4, 0].tolist())
    modes = {oct((tmp_path / name).stat().st_mode & 0o777) for name in ("model.safetensors", "config.json")}
    assert len(modes) == 1


@pytest.mark.parametrize("bits, sym", [(4, True), (4, False), (8, True)])
@pytest.mark.parametrize("tied, dtype", [(True, "float32"), (False, "bfloat16")])
def test_saved_and_reloaded(tmp_path, bits, sym, tied, dtype):
    scheme = Scheme("rtn", bits, 32 if bits == 4 else -1, sym, head=not tied)
    model = quantized(scheme, tie_embeddings=tied, dtype=dtype)
    Q.save(model, tmp_path)
    again = open_model(tmp_path)
    assert torch.equal(again(TOKENS), model(TOKENS)) and again.config == model.config
    assert again.norm.weight.dtype == getattr(torch, dtype)
    assert again.quantized["bits"] == bits and isinstance(again.output, Q.QuantizedLinear) == (not tied)
    assert torch.equal(open_model(tmp_path, head=False).hidden(TOKENS), model.hidden(TOKENS))
    Q.save(again, tmp_path / "twice")
    assert (tmp_path / "twice" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="open it with quantize.open_model"):
        Llama.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="write it with quantize.save"):
        again.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="write it with save_pretrained"):
        Q.save(tiny(), tmp_path / "plain")


@pytest.mark.parametrize("size, sides, head, said", [
    (32, {"ffn_dim": 96}, False, ""),
    (48, {"ffn_dim": 96}, False, "no groups of 48"),
    (32, {}, False, "of 14 matrices, 6 have a side that 8 does not divide"),
    (-1, {"ffn_dim": 96}, True, "makes up another")])
def test_what_others_cannot_read_is_said(tmp_path, capsys, size, sides, head, said):
    """As gptqmodel and transformers were seen to do."""
    Q.save(quantized(Scheme("rtn", 4, size, head=head, damp=0.0), **sides), tmp_path)
    out = capsys.readouterr().out
    assert said in out and bool(said) == bool(out)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert not config["quantization_config"].keys() & {"method", "damp_percent"}  # gptqmodel refuses "rtn", and 0
    assert open_model(tmp_path).quantized["octet_method"] == "rtn"


def test_8_bits_are_no_llama_to_others(tmp_path):
    """transformers would read a "llama" with int8 tensors as nonsense."""
    model = quantized(BY_ROWS)
    Q.save(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "octet_int8"
    assert open_model(tmp_path).config == model.config


def change_config(directory: Path, change) -> None:
    config = json.loads((directory / "config.json").read_text())
    change(config["quantization_config"])
    (directory / "config.json").write_text(json.dumps(config))


def change_tensors(directory: Path, change) -> None:
    tensors = safetensors.torch.load_file(directory / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, directory / "model.safetensors")


def foreign(directory: Path, act_order: bool, layout: str) -> dict[str, Tensor]:
    """A checkpoint as AutoGPTQ writes it, made by numpy: groups that its act-order has scattered, zero biases. Returns
    the dense weights."""
    rng, model = np.random.default_rng(0), tiny(ffn_dim=96)
    tensors = {weights.hf_name(name): p.detach() for name, p in model.named_parameters()}
    dense = {}
    for name in [name for name in tensors if "proj" in name]:
        O, I = tensors.pop(name).shape
        q, zero = rng.integers(0, 16, (I, O)), rng.integers(0, 16, (I // 32, O))
        scale = rng.uniform(0.01, 0.02, (I // 32, O)).astype(np.float16)
        g = (rng.permutation(I) if act_order else np.arange(I)) // 32
        prefix = name.removesuffix(".weight")
        # In `gptq` files gptqmodel takes one from each zero by taking 0x11111111 from the word: a zero of 0 borrows.
        less = 0x11111111 if layout == "gptq" else 0
        words = (pack(zero, 1).astype(np.int64) - less).astype(np.uint32).view(np.int32)
        tensors |= {f"{prefix}.qweight": torch.tensor(pack(q, 0)), f"{prefix}.qzeros": torch.tensor(words),
                    f"{prefix}.scales": torch.tensor(scale), f"{prefix}.g_idx": torch.tensor(g.astype(np.int32)),
                    f"{prefix}.bias": torch.zeros(O)}
        dense[name] = torch.tensor(((q - zero[g]) * scale[g].astype(np.float32)).T.copy(), dtype=torch.float32)
    tiny(ffn_dim=96).save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False,
                                     "desc_act": act_order, "checkpoint_format": layout}
    (directory / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file({name: t.contiguous() for name, t in tensors.items()}, directory / "model.safetensors")
    return dense


@pytest.mark.parametrize("layout, key", [
    ("gptq", "checkpoint_format"), ("gptq_v2", "checkpoint_format"), ("gptq_v2", "format")])
@pytest.mark.parametrize("act_order", [False, True])
def test_checkpoints_of_others(tmp_path, act_order, layout, key):
    """Groups that act-order has scattered, both conventions for zeros, both names of the key; also on the kernels."""
    dense = foreign(tmp_path, act_order, layout)
    change_config(tmp_path, lambda q: q.update({key: q.pop("checkpoint_format")}))
    if not act_order:  # some writers leave out what the order of the file says already
        change_tensors(tmp_path, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.g_idx"))
    plain = tiny(ffn_dim=96)
    plain.load_state_dict({name: dense.get(weights.hf_name(name), p) for name, p in plain.state_dict().items()})
    model = open_model(tmp_path)
    with torch.no_grad():
        expected = plain(TOKENS)
        assert near(model(TOKENS), expected)
        product_of(model.layers[0].attention.wo, Q.int4_product)
        with packed(model):
            assert all("forward" in vars(layer) for layer in Q.quantized_layers(model).values())
            assert (model(TOKENS) - expected).norm() < 0.02 * expected.norm()


# ---- runs -----------------------------------------------------------------------------------------------------------

def test_table_and_summary(tmp_path, capsys):
    write_demo(tmp_path / "in")
    summary = run_main(tmp_path / "in", "--bits", 4, "--group_size", 32, "--calibration", DEMO / "sft.jsonl.gz",
                       "--max_datasets_size", 16, "--max_len", 64, "--save_path", tmp_path / "out")
    out = capsys.readouterr().out
    assert re.search(r"method +bits a weight +MB in all +perplexity +tokens/s\nfloat32 +32\.00 .*\n"
                     r"rtn 4 bits, groups of 32, no clipping +[45]\.\d\d .*\n"
                     r"gptq 4 bits, groups of 32 +[45]\.\d\d ", out)
    assert "block 2/2 | error in % of the output, RTN > GPTQ: wq " in out and "16 records in template alpaca" in out
    saved = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {"perplexity_before", "perplexity_after", "perplexity_rtn", "bytes_before", "bytes_after", "seconds",
            "tokens_per_second", "peak_memory_bytes", "flags"} <= saved.keys()
    assert saved["perplexity_after"] == summary["perplexity_after"] and len(summary["layers"]) == 14
    for name, key in (("in", "bytes_before"), ("out", "bytes_after")):
        assert abs((tmp_path / name / "model.safetensors").stat().st_size / summary[key] - 1) < 0.1
    again = run_main(tmp_path / "out", "--eval", "--max_len", 64)
    assert again["perplexity"] == pytest.approx(summary["perplexity_after"], rel=1e-5)


def test_a_template_is_needed_by_records_alone(tmp_path):
    """A Jinja text that is not known stops a run with records, until --template names one; a plain text needs none."""
    write_demo(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages[0]['content'] }}?"}))
    (tmp_path / "text").write_text("Once upon a time there was a fox. " * 40)
    run_main(tmp_path, "--eval", "--text", tmp_path / "text", "--max_len", 64)
    with pytest.raises(ValueError, match="none of ours: choose the one nearest to it by --template"):
        run_main(tmp_path, "--eval", "--max_len", 64)
    by_llama2, by_alpaca = (run_main(tmp_path, "--eval", "--max_len", 64, "--template", name)["perplexity"]
                            for name in ("llama2", "alpaca"))
    assert by_llama2 != by_alpaca


def test_an_adapter_is_merged_before_it_is_quantized(tmp_path):
    base = write_demo(tmp_path / "base")
    beside = open_model(base)
    write_adapter(tmp_path / "adapter", base, beside)
    summary = run_main(tmp_path / "adapter", "--bits", 8, "--max_len", 64, "--save_path", tmp_path / "out")
    expected = beside(TOKENS)
    assert (open_model(tmp_path / "out")(TOKENS) - expected).norm() < 0.1 * expected.norm()
    assert run_main(tmp_path / "adapter", "--eval", "--max_len", 64)["perplexity"] == pytest.approx(
        summary["perplexity_before"], rel=1e-4)


def test_decoding_speed_counts_tokens_that_were_made(monkeypatch):
    """A context of 9 makes 8 new tokens, however many were asked for; one of 1 makes none."""
    clock = itertools.count(0, 2.0)
    monkeypatch.setattr(Q.time, "perf_counter", lambda: next(clock))
    assert Q.decoding_speed(tiny(max_seq_len=9)) == 7 / 2  # the first belongs to the prefill
    assert Q.decoding_speed(tiny(max_seq_len=2)) is None and Q.decoding_speed(tiny(max_seq_len=1)) is None


def test_demo_names_what_makes_its_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="out/ppo does not exist: run ppo.py first"):
        run_main()


def test_demo_chain(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_demo(tmp_path / "out" / "ppo", max_seq_len=256)
    asked = demo.prompt_records(0, held=True)[:24]  # of 416
    monkeypatch.setattr(demo, "prompt_records", lambda seed, held: asked)
    summary = run_main("--max_datasets_size", 8)
    assert summary["flags"]["group_size"] == 32 and {"gold_before", "gold_after", "perplexity_rtn"} <= summary.keys()
    assert "gold score on held-out instructions: " in capsys.readouterr().out
    assert open_model(tmp_path / "out" / "ppo-int4").quantized["octet_method"] == "gptq"
    config = json.loads((tmp_path / "out" / "ppo-int4" / "tokenizer_config.json").read_text())
    assert config["template"] == "alpaca"


# ---- refusals -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [0, -2, 2.0, "32", None, True])
def test_group_size_that_is_none(size):
    for call in (lambda: rtn(matrix(4, 8), 4, size, True), lambda: gptq(matrix(4, 8), torch.eye(8), 4, size, True)):
        with pytest.raises(ValueError, match="it must be a whole number of columns"):
            call()


@pytest.mark.parametrize("method", [
    ("--method", "rtn"), ("--calibration", DEMO / "sft.jsonl.gz", "--max_datasets_size", 8, "--max_len", 64)])
def test_broken_weights_stop_the_run(tmp_path, method):
    """Infinity in a late layer, and nothing is written."""
    write_demo(tmp_path / "in")
    model = Llama.from_pretrained(tmp_path / "in")
    model.layers[1].feed_forward.w3.weight.data[3, 4] = math.inf
    model.save_pretrained(tmp_path / "in")
    with pytest.raises(ValueError, match="layers.1.feed_forward.w3|not finite"):
        run_main(tmp_path / "in", "--save_path", tmp_path / "out", *method)
    assert not [*(tmp_path / "out").glob("*.safetensors")] and not (tmp_path / "out" / "config.json").exists()
    with pytest.raises(ValueError, match="layers.1.feed_forward.w3.weight is not finite"):
        Q.quantize_model(model, Scheme("rtn"))


@pytest.mark.parametrize("flags, sentence", [
    (["--group_size", "0"], "group_size is 0, it must be a whole number of columns above 0, or -1"),
    (["--group_size", "many"], "--group_size: must be a whole number, not many"),
    (["--bits", "3"], "invalid choice: .?3"),
    (["--bits", "8", "--group_size", "32"], "one scale a row, --group_size 32 is for 4 bits"),
    (["--damp", "2"], "--damp: must be .*at most 1, not 2"),
    (["--method", "rtn", "--act_order"], "means nothing to --method rtn"),
    (["--calibration", "TEXT", "--act_order", "--file_order"], "not allowed with"),
    (["--calibration", "SHORT"], "is too short: it has 1 ids, one window takes 63"),
    (["--calibration", "FEW", "--damp", "0"], r"span fewer than its \d+ dimensions.*--damp"),
    (["--calibration", "nowhere.txt"], "nowhere.txt does not exist"),
    (["--calibration", "BINARY"], "is not text in UTF-8"),
    (["--method", "rtn", "--save_path", "IN"], "overwrite its own input"),
    (["--method", "rtn", "--head"], "its embedding"),
    (["--eval", "--bits", "4"], "--eval changes nothing, so --bits"),
    (["--pretrain", "elsewhere"], "two models"),
    (["--no_such_flag"], "unrecognized arguments"),
])
def test_wrong_flags_are_sentences(tmp_path, flags, sentence):
    write_demo(tmp_path / "in", tie_embeddings=True)
    few = "Once upon a time there was a fox and a kite and a hill. " * 4
    assert 63 <= len(text.Tokenizer(DEMO).encode(few, bos=False)) < 126  # one window
    content = {"TEXT": b"Once upon a time there was a fox. " * 100, "SHORT": b"Once", "FEW": few.encode(),
               "BINARY": b"\xff\xfe\x00 no text"}
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    paths = {name: tmp_path / name for name in content} | {"IN": tmp_path / "in"}
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        run_main(tmp_path / "in", "--max_len", 64, *(paths.get(flag, flag) for flag in flags))


def test_quantized_input_is_refused_and_plain_gptq_wants_text(tmp_path):
    write_quantized(tmp_path, BY_32)
    text.Tokenizer(DEMO).save(tmp_path, "alpaca")
    with pytest.raises(ValueError, match="already quantized: quantize the original"):
        run_main(tmp_path)
    with pytest.raises(ValueError, match="needs --calibration"):
        source = Q.open_source(write_demo(tmp_path / "plain"))
        Q.resolve(Q.parse(["DIR"]), dataclasses.replace(source, is_demo=False))


def test_eval_wants_text(tmp_path):
    """The demo's models alone have a generator that writes some."""
    args, source = Q.parse(["DIR", "--eval"]), Q.open_source(write_demo(tmp_path))
    source = dataclasses.replace(source, is_demo=False)
    with pytest.raises(ValueError, match="--eval needs --text: name a text file"):
        Q.evaluate(args, source, *Q.read_texts(args, source, 64), torch.float32, "cpu")


def test_hessians_that_are_refused():
    with pytest.raises(ValueError, match="no inverse even with 100 times the damping"):
        gptq(matrix(4, 8), -torch.eye(8), 4, 8, False)
    attention = tiny().layers[0].attention
    with pytest.raises(ValueError, match="the inputs of a.wq are not finite: they overflow"):
        Q.quantize_linears(attention, ("wq", "wk"), "a", Scheme(), torch.full((64, 64), math.inf))
    assert isinstance(attention.wq, nn.Linear)


def test_gptq_without_rows_does_not_round_in_silence():
    model = tiny()
    with pytest.raises(ValueError, match="gptq needs texts to calibrate on"):
        Q.quantize_model(model, Scheme("gptq"))
    assert not Q.quantized_layers(model)


@pytest.mark.parametrize("values, sentence", [
    (dict(quant="16bit"), "quant is '16bit'"),
    (dict(adapter="fold"), "adapter is 'fold'"),
    (dict(), "is not a directory")])
def test_open_model_refuses(tmp_path, values, sentence):
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        open_model(tmp_path / "nowhere", **values)


PREFIX = "model.layers.0.self_attn.q_proj."


@pytest.mark.parametrize("change, sentence", [
    (dict(bits=3), "bits is 3, it must be 4 to be read here"),
    (dict(bits=8), "bits is 8, it must be 4 to be read here"),
    (dict(group_size=0), "group_size is 0, it must be a whole number of columns above 0, or -1"),
    (dict(quant_method="awq"), "quant_method is 'awq', it must be gptq or octet"),
    (dict(checkpoint_format="marlin"), "checkpoint_format is 'marlin'"),
    (dict(group_size=64), r"qzeros is \(2, 8\) torch.int32, by the config it should be \(1, 8\) whole numbers"),
])
def test_bad_settings_are_sentences(tmp_path, change, sentence):
    foreign(tmp_path, False, "gptq")
    change_config(tmp_path, lambda q: q.update(change))
    with pytest.raises(ValueError, match=sentence):
        open_model(tmp_path)


@pytest.mark.parametrize("leaf, change, sentence", [
    ("qzeros", None, "q_proj.qzeros is missing, by the config it should be"),
    ("g_idx", None, "q_proj.g_idx is missing"),
    ("scales", lambda t: t.int(), r"scales is \(2, 64\) torch.int32, .* floats"),
    ("g_idx", lambda t: t + 6, "g_idx reaches from 6 to 7, there are 2 groups from 0 on"),
    ("bias", lambda t: t + 1, "has a bias"),
])
def test_bad_tensors_are_sentences(tmp_path, leaf, change, sentence):
    foreign(tmp_path, True, "gptq")
    if change is None:
        change_tensors(tmp_path, lambda tensors: tensors.pop(PREFIX + leaf))
    else:
        change_tensors(tmp_path, lambda tensors: tensors.update({PREFIX + leaf: change(tensors[PREFIX + leaf])}))
    with pytest.raises(ValueError, match=sentence):
        open_model(tmp_path)


def with_little_room(flags: list[str]) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    run.command(Q.main, flags)


def test_full_disk_leaves_nothing_half_written(tmp_path, start):
    """A process that may write no file above 100 KB, in place of a full disk: a sentence, exit code 2, no file under a
    final name."""
    write_demo(tmp_path / "in")
    (tmp_path / "text").write_text("Once upon a time there was a fox. " * 10)
    flags = [tmp_path / "in", "--method", "rtn", "--text", tmp_path / "text", "--max_len", 32, "--save_path",
             tmp_path / "out"]
    done, = start(1, with_little_room, [str(flag) for flag in flags]).wait()
    assert done.code == 2, done.err
    assert re.search(r"^a_test.py: .*model.safetensors cannot be written: make room .*\n$", done.err), done.err
    assert [file.name for file in (tmp_path / "out").iterdir()] == []


def test_every_flag_is_read():
    source = Path(Q.__file__).read_text()
    declared = re.findall(r'flag\("(?:--)?(\w+)"', source)
    assert len(declared) > 15
    fields = {*Scheme._fields, "no_clip"}  # resolve reads those by name
    for name in set(declared) - fields:
        assert re.search(rf"args\.{name}\b", source), f"--{name} is never read"
