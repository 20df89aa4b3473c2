"""quantize.py against numpy, brute force, float64 and itself by another way.

Names such as Q03 are cases of the developers' list of faults that users of this field met."""

import inspect
import itertools
import json
import math
import platform
import re
import resource
import subprocess
import sys
import time
import types
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from data.text import Tokenizer
from data.weights import hf_name
import data.records
import data.run
import data.text
import lora
import quantize as Q
import sft
from model import Llama, LlamaConfig
from quantize import Linear4, Linear8, Quantized, Row, Scheme, gptq, pack_int4, rtn, unpack_int4

ROOT = Path(Q.__file__).parent
REAL = ROOT.parent / "shared" / "real"
STORIES, TEXT = REAL / "stories260K", REAL / "text"
needs_real = pytest.mark.skipif(not STORIES.exists(), reason=f"needs the real weights in {STORIES}")
DEMO = ROOT / "data" / "demo"
SIZES = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=172, vocab_size=1280, max_seq_len=64)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrix(O: int, I: int, seed: int = 0) -> Tensor:
    return torch.randn(O, I, generator=seeded(seed))


def correlated(I: int, N: int, seed: int = 0) -> Tensor:
    """N inputs that hang together, as a layer's do: (N, I)."""
    x = torch.randn(N, I, generator=seeded(seed))
    return x @ (torch.eye(I) + 0.5 * torch.randn(I, I, generator=seeded(seed + 1)) / I**0.5) + x[:, :1]


def tiny(seed: int = 0, dtype: str = "float32", **sizes) -> Llama:
    model = Llama(LlamaConfig(**SIZES | sizes, dtype=dtype), generator=seeded(seed)).eval()
    for p in model.parameters():
        p.data = (p.data * (3 if p.dim() == 2 else 1)).to(getattr(torch, dtype))
    return model


def texts(n: int = 6, seed: int = 0, longest: int = 40) -> list[Row]:
    """Rows of unequal length."""
    lengths = torch.randint(longest // 3, longest + 1, (n,), generator=seeded(seed)).tolist()
    return [Row(torch.randint(3, 1280, (length,), generator=seeded(seed + i)).tolist(), [False] + [True] * (length - 1)) for i, length in enumerate(lengths)]


def write_demo(directory: Path, **kwargs) -> Path:
    tiny(**kwargs).save_pretrained(directory)
    Tokenizer(DEMO).save(directory, "alpaca")
    return directory


def same(a: Quantized, b: Quantized) -> bool:
    return all(torch.equal(left, right) for left, right in zip(a, b))


# ---- grids and rounding ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits, size, I", [(4, 32, 128), (4, 32, 100), (4, -1, 172), (8, -1, 64)])
def test_rtn_takes_the_nearest_code(bits, size, I, sym):
    """Brute force over all codes; and no weight is further from its value than half a step (Q08, Q11)."""
    w = matrix(9, I)
    m = rtn(w, bits, size, sym)
    step = I if size == -1 else size
    for o in range(9):
        for i in range(I):
            g = i // step
            values = (np.arange(2**bits) - float(m.zero[o, g])) * float(m.scale[o, g])
            assert abs(values[m.q[o, i]] - float(w[o, i])) <= np.abs(values - float(w[o, i])).min() + 1e-6
    assert ((m.dequantize() - w).abs() <= 0.51 * m.scale[:, m.group.long()]).all()
    assert m.scale.shape == (9, -(-I // step)) and m.q.dtype == torch.uint8
    if bits == 4:
        assert torch.equal(m.scale.half().float(), m.scale)  # what the file can hold


def test_clipping_never_costs_squared_error():
    w = matrix(20, 96) ** 3  # outliers
    plain, clipped = (rtn(w, 4, 32, False, clip=clip).dequantize() for clip in (False, True))
    errors = [((q - w).view(20, 3, 32) ** 2).sum(-1) for q in (plain, clipped)]
    assert (errors[1] <= errors[0] + 1e-6).all() and errors[1].sum() < 0.99 * errors[0].sum()


@pytest.mark.parametrize("size", [0, -2, 2.0, "32", None, True])
def test_group_size_that_is_none(size):
    for call in (lambda: rtn(matrix(4, 8), 4, size, True), lambda: gptq(matrix(4, 8), torch.eye(8), 4, size, True)):
        with pytest.raises(ValueError, match="no number of columns"):
            call()


def test_zero_rows_and_groups_stay_zero():
    """Q09: scale 0 gives 0/0."""
    w = matrix(6, 64)
    w[2] = 0
    w[4, 32:] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for sym in (True, False):
            for m in (rtn(w, 8, -1, sym), rtn(w, 4, 32, sym, clip=True), gptq(w, Q.hessian(correlated(64, 200)), 4, 32, sym, True, True),
                      gptq(w, torch.eye(64), 8, -1, True)):
                assert m.dequantize().isfinite().all() and not m.dequantize()[2].any()
        assert not rtn(w, 4, 32, False).dequantize()[4, 32:].any()


# ---- GPTQ -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits, size, sym", [(4, 16, True), (4, 32, False), (4, -1, False), (8, -1, True)])
def test_gptq_with_identity_is_rtn(bits, size, sym, act_order, clip):
    w = matrix(24, 172)
    w[:, ::3] = w[:, :1]  # ties
    assert same(gptq(w, torch.eye(172), bits, size, sym, act_order, clip), rtn(w, bits, size, sym, clip))
    assert same(gptq(w, 3.7 * torch.eye(172), bits, size, sym, act_order, clip), rtn(w, bits, size, sym, clip))


def by_the_paper(w: Tensor, H: Tensor, m: Quantized, order: list[int], damp: float, most: int) -> np.ndarray:
    """Equations (2) and (3) in float64, one column after another: the inverse is updated itself, no Cholesky, no blocks."""
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


@pytest.mark.parametrize("bits, size, sym, act_order, clip", [(4, 32, False, False, False), (4, 32, True, True, True), (4, -1, False, True, False), (8, -1, True, False, False)])
def test_gptq_equals_the_papers_plain_recursion(bits, size, sym, act_order, clip):
    """Layer errors to 1e-4: blocks, lazy updates and the Cholesky factor change nothing."""
    w, H = matrix(40, 172), Q.hessian(correlated(172, 2000))
    order = np.argsort(-H.diagonal().numpy(), kind="stable") if act_order else range(172)
    for block in (128, 7):
        m = gptq(w, H, bits, size, sym, act_order, clip, block=block)
        expected = by_the_paper(w, H, m, order, 0.01, 2**bits - 1)
        error = lambda q: float(np.trace((w.double().numpy() - q) @ H.double().numpy() @ (w.double().numpy() - q).T))
        assert abs(error(m.dequantize().double().numpy()) / error(expected) - 1) < 1e-4
    mine, plain = Q.layer_errors(w, H, m.dequantize(), rtn(w, bits, size, sym, clip).dequantize())
    assert mine < 0.7 * plain


@pytest.mark.parametrize("act_order", [False, True])
def test_grids_count_errors_as_gptq_does(act_order):
    """Clipping weighs column j by 1 / [H_F^-1]_jj, F being the columns that are not fixed yet: inverted anew for every j."""
    w, H = matrix(30, 64) ** 3, Q.hessian(correlated(64, 300) * torch.logspace(-1, 1, 64))
    order = np.argsort(-H.diagonal().numpy(), kind="stable") if act_order else np.arange(64)
    damped, importance = H.double().numpy() + 0.01 * H.diagonal().mean().item() * np.eye(64), torch.empty(64)
    for i, j in enumerate(order):
        importance[j] = 1 / np.linalg.inv(damped[np.ix_(order[i:], order[i:])])[0, 0]
    expected, zero = Q.grids(w, 4, 16, False, True, importance)
    m = gptq(w, H, 4, 16, False, act_order, clip=True)
    assert (m.scale == expected).float().mean() > 0.97 and (m.zero == zero).float().mean() > 0.97
    assert (Q.grids(w, 4, 16, False, True)[0] == expected).float().mean() < 0.9  # weights of 1 choose others


def test_layer_error_is_that_of_the_outputs():
    w, x = matrix(8, 32), correlated(32, 100)
    q = rtn(w, 4, 16, False).dequantize()
    assert Q.layer_errors(w, Q.hessian(x), q)[0] == pytest.approx(float((x @ (w - q).T).square().sum() / (x @ w.T).square().sum()), rel=1e-4)


def test_inverse_factor():
    """U^T U = (H + damp)^-1 and U is upper triangular; in several slabs too."""
    x = correlated(600, 900)
    H = Q.hessian(x)
    assert torch.allclose(H, x.T @ x, rtol=1e-4, atol=1e-2)
    U = Q.inverse_factor(H, 0.01).double()
    product = U.T @ U @ (H.double() + 0.01 * H.diagonal().mean().double() * torch.eye(600))
    assert (product - torch.eye(600)).abs().max() < 1e-3 and not U.tril(-1).any()


def test_dead_and_equal_inputs():
    """Q01: a Cholesky that is not positive-definite. The dead column's weights are rounded plainly, and move no other."""
    x = correlated(64, 500)
    x[:, 5] = 0
    x[:, 9] = x[:, 8]
    w = matrix(16, 64)
    for act_order in (False, True):
        m, plain = gptq(w, Q.hessian(x), 4, 32, False, act_order), rtn(w, 4, 32, False)
        assert m.dequantize().isfinite().all() and torch.equal(m.q[:, 5], plain.q[:, 5]) and not torch.equal(m.q, plain.q)
        assert same(gptq(w, torch.zeros(64, 64), 4, 32, False, act_order, clip=True), plain)


def test_rank_below_width():
    """Fewer inputs than dimensions: fine with damping, a sentence without."""
    w, H = matrix(16, 64), Q.hessian(correlated(64, 20))
    mine, plain = Q.layer_errors(w, H, gptq(w, H, 4, 32, False).dequantize(), rtn(w, 4, 32, False).dequantize())
    assert mine < 0.5 * plain
    for seed in range(6):  # one dimension missing: of some of these, rounding hides it from Cholesky
        with pytest.raises(ValueError, match="span fewer than its 64 dimensions.*--damp"):
            gptq(w, Q.hessian(correlated(64, 500, seed)[:63]), 4, 32, False, damp=0.0)
    full = Q.hessian(correlated(64, 640)) * torch.logspace(-3, 3, 64).outer(torch.logspace(-3, 3, 64))  # full rank, of very different sizes
    assert gptq(w, full, 4, 32, False, damp=0.0).dequantize().isfinite().all()


# ---- packing and files ----------------------------------------------------------------------------------------------

def test_packing_by_hand():
    """Input 0 sits in the lowest four bits (lit-llama's packing lost codes)."""
    words = pack_int4(torch.arange(8)[None].repeat(2, 1))
    assert words.shape == (1, 2) and words.dtype == torch.int32 and [w & 0xffffffff for w in words[0].tolist()] == [0x76543210] * 2
    for O, I in ((1, 1), (5, 8), (3, 172), (16, 64)):
        q = torch.randint(0, 16, (O, I), generator=seeded(I), dtype=torch.uint8)
        assert torch.equal(unpack_int4(pack_int4(q), I), q) and pack_int4(q).shape == (-(-I // 8), O)
    with pytest.raises(ValueError, match="hold 0 to 15"):
        pack_int4(torch.tensor([[16]]))


def nibbles(words: np.ndarray, axis: int) -> np.ndarray:
    """int32 -> eight times as many codes along an axis, the lowest four bits first; by numpy alone."""
    parts = np.stack([(words.astype(np.int64) >> shift) & 15 for shift in range(0, 32, 4)], axis=axis + 1)
    return parts.reshape(*words.shape[:axis], -1, *words.shape[axis + 1:])


@pytest.mark.parametrize("sym, act_order", [(True, False), (False, True), (False, False), (True, True)])
def test_directory_by_an_independent_reader(tmp_path, sym, act_order):
    """AutoGPTQ's layout, read by numpy: codes, zeros minus one in `gptq` and as they are in `gptq_v2`, scales, g_idx, and words that
    are not full, which gptqmodel 7.6 reads in these shapes."""
    model = tiny()
    w = {name: p.detach().clone() for name, p in model.named_parameters()}
    w["layers.0.feed_forward.w2.weight"][:4, :32] = torch.tensor([[0.0], [1.0], [14.0], [15.0]]) - torch.linspace(0, 15, 32)  # Q08: zeros at 15 .. 0
    model.load_state_dict(w | {"output.weight": w["output.weight"]})
    Q.quantize_model(model, Scheme("gptq", 4, 32, sym, act_order, clip=False), texts())
    Q.save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert {key: config[key] for key in ("quant_method", "bits", "group_size", "sym", "desc_act", "checkpoint_format")} == {
        "quant_method": "gptq", "bits": 4, "group_size": 32, "sym": sym, "desc_act": act_order, "checkpoint_format": "gptq" if sym else "gptq_v2"}
    stored = {name: t.numpy() for name, t in safetensors.torch.load_file(tmp_path / "model.safetensors").items()}
    for name, layer in Q.quantized_layers(model).items():
        prefix, O, I = hf_name(name), layer.out_features, layer.in_features
        zero = nibbles(stored[f"{prefix}.qzeros"], 1)[:, :O] + (1 if sym else 0)         # (G, O)
        g = stored[f"{prefix}.g_idx"]
        dense = (nibbles(stored[f"{prefix}.qweight"], 0)[:I] - zero[g]) * stored[f"{prefix}.scales"][g].astype(np.float32)  # (I, O)
        assert np.allclose(dense.T, layer.dequantize(torch.float32).numpy(), atol=1e-7)
        assert stored[f"{prefix}.scales"].dtype == np.float16 and (g == np.arange(I) // 32).all()
        assert [stored[f"{prefix}.{part}"].shape for part in ("qweight", "qzeros")] == [(-(-I // 8), O), (-(-I // 32), -(-O // 8))]
    if not sym:
        assert {0, 15} <= set(zero_of(model, "layers.0.feed_forward.w2")[0, :4].tolist())
    assert oct((tmp_path / "model.safetensors").stat().st_mode & 0o777) == oct((tmp_path / "config.json").stat().st_mode & 0o777)


def zero_of(model: Llama, name: str) -> Tensor:
    return Q.quantized_layers(model)[name].quantized().zero.T  # (G, O)


@pytest.mark.parametrize("bits, sym", [(4, True), (4, False), (8, True)])
@pytest.mark.parametrize("tied, dtype", [(True, "float32"), (False, "bfloat16")])
def test_saved_and_reloaded(tmp_path, bits, sym, tied, dtype):
    model = tiny(tie_embeddings=tied, dtype=dtype)
    Q.quantize_model(model, Scheme("rtn", bits, 32 if bits == 4 else -1, sym, head=not tied))
    Q.save(model, tmp_path)
    again, tokens = Q.load(tmp_path), torch.tensor([texts()[0].ids])
    assert torch.equal(again(tokens), model(tokens)) and again.config == model.config and again.norm.weight.dtype == getattr(torch, dtype)
    assert again.quantized["bits"] == bits and isinstance(again.output, Q.QuantizedLinear) == (not tied)
    with pytest.raises(ValueError, match="open it with quantize.open_model"):
        Llama.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="write it with quantize.save"):
        again.save_pretrained(tmp_path / "plain")
    buffers = dict(again.named_buffers())
    for name, buffer in again.to(torch.bfloat16).named_buffers():
        assert name in ("cos", "sin") or torch.equal(buffer, buffers[name]) and buffer.dtype == buffers[name].dtype


def test_what_others_cannot_read_is_said(tmp_path, capsys):
    """As gptqmodel and transformers were seen to do; and an 8-bit model is no "llama" to them, which they would read as nonsense."""
    for size, sides, head, said in ((32, {"ffn_dim": 96}, False, ""), (48, {"ffn_dim": 96}, False, "no groups of 48"), (32, {}, False, "of 14 matrices, 6 have a side that 8 does not divide"),
                                    (-1, {"ffn_dim": 96}, True, "makes up another")):
        model = tiny(**sides)
        Q.quantize_model(model, Scheme("rtn", 4, size, head=head, damp=0.0))
        Q.save(model, tmp_path / "4")
        out = capsys.readouterr().out
        assert said in out and bool(said) == bool(out)
        config = json.loads((tmp_path / "4" / "config.json").read_text())
        assert config["model_type"] == "llama" and not config["quantization_config"].keys() & {"method", "damp_percent"}  # gptqmodel refuses "rtn", and 0
        assert Q.load(tmp_path / "4").quantized["method"] == "rtn"
    Q.quantize_model(model := tiny(), Scheme("rtn", 8, -1, True))
    Q.save(model, tmp_path / "8")
    assert json.loads((tmp_path / "8" / "config.json").read_text())["model_type"] == "octet_int8" and Q.load(tmp_path / "8").config == model.config


def foreign(directory: Path, act_order: bool, layout: str, **changed) -> dict[str, Tensor]:
    """A checkpoint as AutoGPTQ writes it, made by numpy: groups that its act-order has scattered, zero biases. Returns the
    dense weights."""
    rng, model = np.random.default_rng(0), tiny(ffn_dim=96)
    tensors = {hf_name(name): p.detach() for name, p in model.named_parameters()}
    dense = {}
    for name in [name for name in tensors if "proj" in name]:
        O, I = tensors.pop(name).shape
        q, zero = rng.integers(0, 16, (I, O)), rng.integers(0, 16, (I // 32, O))
        scale = rng.uniform(0.01, 0.02, (I // 32, O)).astype(np.float16)
        g = (rng.permutation(I) if act_order else np.arange(I)) // 32
        pack = lambda codes, axis: sum(np.take(codes, range(k, codes.shape[axis], 8), axis).astype(np.int64) << 4 * k for k in range(8)).astype(np.uint32).view(np.int32)
        prefix = name.removesuffix(".weight")
        # Q08: in `gptq` files gptqmodel takes one from each zero by taking 0x11111111 from the word: a zero of 0 borrows from the next.
        words = (pack(zero, 1).astype(np.int64) - (0x11111111 if layout == "gptq" else 0)).astype(np.uint32).view(np.int32)
        tensors |= {f"{prefix}.qweight": torch.tensor(pack(q, 0)), f"{prefix}.qzeros": torch.tensor(words),
                    f"{prefix}.scales": torch.tensor(scale), f"{prefix}.g_idx": torch.tensor(g.astype(np.int32)), f"{prefix}.bias": torch.zeros(O)}
        dense[name] = torch.tensor(((q - zero[g]) * scale[g].astype(np.float32)).T.copy(), dtype=torch.float32)
    tiny(ffn_dim=96).save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": act_order, "checkpoint_format": layout} | changed
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    safetensors.torch.save_file({name: t.contiguous() for name, t in tensors.items()}, directory / "model.safetensors")
    return dense


@pytest.mark.parametrize("checkpoint_format, key", [("gptq", "checkpoint_format"), ("gptq_v2", "checkpoint_format"), ("gptq_v2", "format")])
@pytest.mark.parametrize("act_order", [False, True])
def test_checkpoints_of_others(tmp_path, act_order, checkpoint_format, key):
    """Q05: groups that act-order has scattered, both conventions for zeros, both names of the key; also through the fast kernels."""
    dense = foreign(tmp_path, act_order, checkpoint_format)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"][key] = config["quantization_config"].pop("checkpoint_format")
    (tmp_path / "config.json").write_text(json.dumps(config))
    plain = tiny(ffn_dim=96)
    plain.load_state_dict({name: dense.get(hf_name(name), p) for name, p in plain.state_dict().items()})
    model, tokens = Q.load(tmp_path), torch.tensor([texts()[0].ids])
    with torch.no_grad():
        expected = plain(tokens)
        assert torch.allclose(model(tokens), expected, atol=1e-4 * expected.abs().max())
        if Q.kernel_works(4, "cpu"):
            model.fuse()
            assert isinstance(model.layers[0].attention.wo, Q.Fast4) and (model.layers[0].attention.wqkv is None) == act_order
            assert (model(tokens) - expected).norm() < 0.02 * expected.norm()


# ---- layers ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("O, I, size", [(172, 64, 32), (64, 172, 32), (5, 100, -1), (48, 300, 96), (70, 256, 256)])
def test_fast_int4_is_the_reference_within_its_rounding(O, I, size):
    """Odd widths, small outputs, several joined, one row and many (which take another way): bf16 rounds x and scales to 2^-9."""
    if not Q.kernel_works(4, "cpu"):
        pytest.skip("this PyTorch has no int4 product for the CPU")
    layers = [Linear4.of(rtn(matrix(O, I, seed), 4, size, False)) for seed in (0, 1)]
    fast = Linear4.join(layers, 1)
    for n in (1, 3, 200):
        x = matrix(n, I, 7)
        assert (fast(x) - torch.cat([layer(x) for layer in layers], dim=-1)).norm() < 6e-3 * fast(x).norm()
    assert fast(x.view(2, -1, I)).shape == (2, 100, 2 * O)


@pytest.mark.parametrize("vnni", [False, True])  # without and with int8 instructions
@pytest.mark.parametrize("O, I", [(172, 64), (64, 172), (5, 100)])
def test_fast_int8_is_the_reference_within_its_rounding(O, I, vnni, monkeypatch):
    if not Q.kernel_works(8, "cpu"):
        pytest.skip("this PyTorch has no int8 product for the CPU")
    layers = [Linear8.of(rtn(matrix(O, I, seed), 8, -1, True)) for seed in (0, 1)]
    if vnni and not torch.cpu._is_vnni_supported():
        pytest.skip("this processor has no int8 instructions")
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    fast = Linear8.join(layers, 1)
    assert fast.kernel == ("onednn" if vnni else "weight_only")
    for n in (1, 20):
        x = matrix(n, I, 7) * torch.logspace(-2, 2, n)[:, None]  # every row has a scale of its own
        right = torch.cat([layer(x) for layer in layers], dim=-1)
        assert ((fast(x) - right).norm(dim=1) < 0.015 * right.norm(dim=1)).all() and not fast(0 * x).any()


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="known of x86 alone")
def test_kernels_are_in_use():
    """The fall-back is as right as the kernels, so a fault of ours in calling them would only be slow."""
    assert Q.kernel_works(4, "cpu") and Q.kernel_works(8, "cpu")


def test_layers_without_a_kernel_fall_back(monkeypatch):
    """Groups of 16 have no kernel; nor has a PyTorch whose kernels are missing or disagree."""
    assert Linear4.join([Linear4.of(rtn(matrix(8, 64), 4, 16, False))], 1) is None
    assert not Q.agrees(torch.nn.Linear(64, 8, bias=False), Linear8.of(rtn(matrix(8, 64), 8, -1, True)), "cpu")
    monkeypatch.setattr(Q, "kernel_works", lambda bits, device: False)
    model, tokens = tiny(), torch.tensor([texts()[0].ids])
    Q.quantize_model(model, Scheme("rtn", 4, 32))
    before = model(tokens)
    prompt = [texts()[0].ids[:5]]
    answer = model.generate(prompt, 8, temperature=0)
    assert torch.equal(model.fuse()(tokens), before) and model.generate(prompt, 8, temperature=0) == answer


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_in_training_generates_on_the_kernels(bits, monkeypatch):
    """PPO's rollouts: the fast form is there while it generates and no longer, also where that fails; training sees the same weights."""
    if not Q.kernel_works(bits, "cpu"):
        pytest.skip(f"this PyTorch has no product of {bits} bits for the CPU")
    model, tokens, used = tiny(), torch.tensor([texts()[0].ids]), []
    Q.quantize_model(model, Scheme("rtn", bits, 32 if bits == 4 else -1, bits == 8))
    lora.attach(model, 2)
    kernel = Q.Fast4 if bits == 4 else Q.Fast8
    forward = kernel.forward
    monkeypatch.setattr(kernel, "forward", lambda layer, x: used.append(x.shape) or forward(layer, x))
    before = model(tokens)
    model.generate([texts()[0].ids[:5]] * 2, 4, temperature=0, eos_id=-1)
    assert len(used) == 4 * 14 and used[14] == (2, 64)  # a prefill and three steps of 14 matrices
    with pytest.raises(ValueError):
        model.generate([[]], 4)
    assert all(layer.fast is None for layer in Q.quantized_layers(model).values()) and torch.equal(model(tokens), before) and len(used) == 4 * 14


@pytest.mark.parametrize("bits", [4, 8])
def test_fused_generation_is_the_reference(bits):
    """Decoding through the fast kernels: each id is the reference's likeliest, or lost to one that is nearly as likely."""
    model = tiny(tie_embeddings=True)
    Q.quantize_model(model, Scheme("rtn", bits, 32 if bits == 4 else -1, bits == 8))
    prompts = [row.ids[:n] for row, n in zip(texts(), (9, 4, 12))]
    fused = tiny(tie_embeddings=True)
    Q.quantize_model(fused, Scheme("rtn", bits, 32 if bits == 4 else -1, bits == 8))
    fused.fuse(3)
    for prompt, answer in zip(prompts, fused.generate(prompts, 12, temperature=0, eos_id=-1)):
        logits = model(torch.tensor([prompt + answer]))[0, len(prompt) - 1:-1]
        behind = logits.max(-1).values - logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert (behind < 0.05 * logits.std()).all()


def test_size_of_a_quantized_weight():
    """Four bits in groups of 128: at most 4.3 bits, in the file, in memory and in the kernel's layout; eight: 8.1."""
    layer = Linear4.of(rtn(matrix(512, 512), 4, 128, False))
    fast = Linear4.join([layer], 1)
    bits = lambda module: 8 * sum(b.nbytes for b in module.buffers()) / 512**2
    assert bits(layer) <= 4.3 and (fast is None or bits(fast) <= 4.3) and bits(Linear8.of(rtn(matrix(512, 512), 8, -1, True))) <= 8.1


# ---- a whole model --------------------------------------------------------------------------------------------------

def seen_hessians(model: Llama, rows: list[Row], monkeypatch, **scheme) -> dict[str, Tensor]:
    found, replace = {}, Q.replace
    with monkeypatch.context() as patch:
        patch.setattr(Q, "replace", lambda parent, names, where, scheme, H: found.setdefault(f"{where}.{names[0]}", H) is None or replace(parent, names, where, scheme, H))
        Q.quantize_model(model, Scheme("gptq", 4, 32, **scheme), rows)
    return found


def test_padding_does_not_enter_the_statistics(monkeypatch):
    """Q14: texts of unequal length in one padded batch, and each alone."""
    together = seen_hessians(tiny(), texts(), monkeypatch)
    monkeypatch.setattr(Q, "TOKENS", 1)
    alone = seen_hessians(tiny(), texts(), monkeypatch)
    assert len(together) == 8
    first = "layers.0.attention.wq"  # later ones also depend on codes, where a rounding may tip
    assert torch.allclose(together[first], alone[first], rtol=1e-5, atol=1e-5 * alone[first].abs().max())
    x = matrix(4, 3).view(2, 2, 3)
    mask = torch.tensor([[True, True], [True, False]])
    assert torch.allclose(Q.hessian(x, mask), x[mask].T @ x[mask], rtol=1e-5)


def test_layers_are_calibrated_on_what_they_will_see(monkeypatch):
    """q, k, v before o, gate and up before down, and blocks before it quantized: every H is that of the final model's inputs."""
    model, rows = tiny(), texts()
    found = seen_hessians(model, rows, monkeypatch, head=True)
    inputs = {}
    for name, module in model.named_modules():
        if isinstance(module, Q.QuantizedLinear):
            module.register_forward_pre_hook(lambda module, x, name=name: inputs.setdefault(name, []).append(x[0].flatten(0, -2)))
    for row in rows:
        model(torch.tensor([row.ids]))
    assert set(found) == {*(f"layers.{i}.{name}" for i in (0, 1) for name in ("attention.wq", "attention.wo", "feed_forward.w1", "feed_forward.w2")), "model.output"}
    for name, H in found.items():
        x = torch.cat(inputs[name.removeprefix("model.")]).double()
        assert (H - x.T @ x).norm() < 1e-4 * H.norm(), name


def test_broken_weights_stop_the_run(tmp_path):
    """Q13: NaN in late layers, and the run went on."""
    write_demo(tmp_path / "in")
    model = Llama.from_pretrained(tmp_path / "in")
    model.layers[1].feed_forward.w3.weight.data[3, 4] = math.inf
    model.save_pretrained(tmp_path / "in")
    for method in (("--method", "rtn"), ("--calibration", str(DEMO / "sft.jsonl.gz"), "--max_datasets_size", "8", "--max_len", "64")):
        with pytest.raises(ValueError, match="layers.1.feed_forward.w3|not finite"):
            Q.main([str(tmp_path / "in"), "--save_path", str(tmp_path / "out"), *method])
        assert not [*(tmp_path / "out").glob("*.safetensors")] and not (tmp_path / "out" / "config.json").exists()
    with pytest.raises(ValueError, match="layers.1.feed_forward.w3 has weights that are not finite"):
        Q.quantize_model(model, Scheme("rtn"))


def test_perplexity_by_hand():
    """Q15: three texts, padded, against exp of the summed cross-entropy."""
    model, rows, nll, n = tiny(), texts(3), 0.0, 0
    for row in rows:
        logp = model(torch.tensor([row.ids]))[0].double().log_softmax(-1)
        nll -= sum(logp[t - 1, row.ids[t]].item() for t in range(1, len(row.ids)))
        n += len(row.ids) - 1
    assert Q.perplexity(model, rows) == pytest.approx(math.exp(nll / n), rel=1e-5)
    assert Q.windows(list(range(10, 21)), 5, 1) == [Row([1, 10, 11, 12, 13], [False, *[True] * 4]), Row([1, 14, 15, 16, 17], [False, *[True] * 4])]


@needs_real
def test_perplexity_of_the_real_model(capsys):
    reference = json.loads((STORIES / "perplexity.json").read_text())
    summary = Q.main([str(STORIES / "hf"), "--eval", "--text", str(REAL / reference["text"])])
    assert summary["perplexity"] == pytest.approx(reference["perplexity"], abs=1e-3) and summary["windows"] == reference["windows"]
    assert "60 windows of 255 ids on end, BOS before each, the last partial one dropped" in capsys.readouterr().out


def story_rows(name: str) -> list[Row]:
    tokenizer = Tokenizer(STORIES / "hf")
    return Q.windows(tokenizer.encode((TEXT / name).read_text("utf-8"), bos=False), 256, tokenizer.bos_id)


@needs_real
def test_quality_on_a_real_model():
    """Q03, Q06: 8 bits within 0.5 %, by RTN, by GPTQ and through the fast kernel; 4-bit GPTQ leaves at most 0.5 of RTN's loss on average
    and never more than 0.6; smaller groups are not worse than whole rows."""
    calibration, text = story_rows("tinystories_calibration.txt"), story_rows("tinystories_eval.txt")

    def after(*scheme, **further) -> tuple[float, Llama]:
        model = Llama.from_pretrained(STORIES / "hf")
        Q.quantize_model(model, Scheme(*scheme, **further), calibration)
        return Q.perplexity(model, text), model

    plain = Q.perplexity(Llama.from_pretrained(STORIES / "hf"), text)
    for method in ("rtn", "gptq"):
        value, model = after(method, 8, -1, True)
        assert value < 1.005 * plain and Q.perplexity(model.fuse(), text) < 1.005 * plain
    left = [(after("gptq", 4, size, sym)[0] - plain) / (after("rtn", 4, size, sym, clip=False)[0] - plain) for size, sym in ((16, False), (32, True), (64, True))]
    assert sum(left) / 3 < 0.5 and max(left) < 0.6, left  # README has all of them
    by_32 = after("gptq", 4, 32, False)[0]
    assert by_32 < 1.02 * after("gptq", 4, -1, False)[0] and by_32 < 1.3 * plain


# ---- QLoRA ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bits", [4, 8])
def test_no_full_copy_of_a_frozen_weight_outlives_its_layer(bits, monkeypatch):
    """Forward and backward of a model with adapters: at most one dequantized matrix lives at a time, autograd keeps none."""
    model = tiny()
    Q.quantize_model(model, Scheme("rtn", bits, 32 if bits == 4 else -1, bits == 8))
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
        loss = model(torch.tensor([texts()[0].ids])).square().mean()
    assert calls[0] == 14 and not len(alive)
    loss.backward()
    assert most[0] == 1 and not len(alive) and calls[0] == 14 + 11  # what the first q, k and v read needs no gradient
    assert kept and not sizes & {*kept, *(shape[::-1] for shape in kept)}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_through_a_quantized_layer(bits, dtype):
    layer = Linear8.of(rtn(matrix(24, 44), 8, -1, True)) if bits == 8 else Linear4.of(rtn(matrix(24, 44), 4, 32, False))
    W = layer.dequantize(torch.float32)
    x, dy = matrix(10, 44, 1).to(dtype).requires_grad_(), matrix(10, 24, 2).to(dtype)
    y = layer(x)
    y.backward(dy)
    exact = 1e-6 if dtype == torch.float32 else 0.01
    assert y.dtype == x.grad.dtype == dtype
    assert (x.grad.float() - dy.float() @ W).norm() < exact * (dy.float() @ W).norm() and (y.float() - x.float() @ W.T).norm() < exact * y.float().norm()


@pytest.mark.parametrize("bits", [4, 8])
def test_stages_train_adapters_on_a_quantized_base(tmp_path, bits):
    """--pretrain takes the directory with --lora_rank and refuses it without; the base stays as it was, its adapter opens and merges."""
    write_demo(tmp_path / "plain")
    Q.main([str(tmp_path / "plain"), "--method", "rtn", "--bits", str(bits), "--save_path", str(tmp_path / "base")])
    flags = ["--pretrain", tmp_path / "base", "--dataset", DEMO / "sft.jsonl.gz", "--max_datasets_size", 24, "--max_len", 64, "--batch_size", 4, "--accumulation_steps", 1, "--max_epochs", 2,
             "--eval_size", 4, "--lr", 1e-2, "--save_path", tmp_path / "out"]
    with pytest.raises(ValueError, match="is quantized, its weights cannot be trained: give --lora_rank"):
        sft.main([str(flag) for flag in flags])
    before = (tmp_path / "base" / "model.safetensors").read_bytes()
    summary = sft.main([str(flag) for flag in (*flags, "--lora_rank", 4, "--grad_checkpoint")])
    assert summary["eval_loss"] < summary["eval_loss_before"] - 0.2 and (tmp_path / "base" / "model.safetensors").read_bytes() == before
    model = Q.load(tmp_path / "base")
    lora.load_adapter(model, tmp_path / "out")
    tokens = torch.tensor([texts()[0].ids])
    with torch.no_grad():
        expected = model(tokens)
        assert (Q.load(tmp_path / "base").fuse()(tokens) - expected).norm() > 0.05 * expected.norm()
        lora.main(["merge", str(tmp_path / "out"), str(tmp_path / "merged")])
        assert torch.allclose(Llama.from_pretrained(tmp_path / "merged")(tokens), expected, atol=1e-4 * expected.abs().max())
        assert (model.fuse()(tokens) - expected).norm() < 0.05 * expected.norm()  # fast kernels under adapters
        assert not Q.quantized_layers(model) or not Q.kernel_works(4, "cpu")


# ---- command line ---------------------------------------------------------------------------------------------------

def test_table_and_summary(tmp_path, capsys):
    write_demo(tmp_path / "in")
    summary = Q.main([str(tmp_path / "in"), "--bits", "4", "--group_size", "32", "--calibration", str(DEMO / "sft.jsonl.gz"), "--max_datasets_size", "16", "--max_len", "64", "--save_path", str(tmp_path / "out")])
    out = capsys.readouterr().out
    assert re.search(r"method +bits a weight +MB in all +perplexity +tokens/s\nfloat32 .*\nrtn 4 bits, groups of 32, no clipping .*\ngptq 4 bits, groups of 32 ", out)
    assert "block 2/2 | error in % of the output, RTN > GPTQ: wq " in out and "16 records in template alpaca" in out
    saved = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {"perplexity_before", "perplexity_after", "perplexity_rtn", "bytes_before", "bytes_after", "seconds", "tokens_per_second", "peak_memory_bytes", "flags"} <= saved.keys()
    assert saved["perplexity_after"] == summary["perplexity_after"] and len(summary["layers"]) == 14
    sizes = [sum(f.stat().st_size for f in (tmp_path / name).glob("*.safetensors")) for name in ("in", "out")]
    assert all(abs(size / summary[key] - 1) < 0.1 for size, key in zip(sizes, ("bytes_before", "bytes_after")))
    again = Q.main([str(tmp_path / "out"), "--eval", "--max_len", "64"])
    assert again["perplexity"] == pytest.approx(summary["perplexity_after"], rel=1e-5)
    for quant in (None, "4bit"):
        assert Q.load(tmp_path / "out", quant=quant).quantized["bits"] == 4
    with pytest.raises(ValueError, match="quantized to 4 bits, 8bit was asked for"):
        Q.load(tmp_path / "out", quant="8bit")
    assert Q.load(tmp_path / "in", quant="8bit").quantized["bits"] == 8 and "GPTQ loses less" not in capsys.readouterr().out
    model = Q.load(tmp_path / "in", quant="4bit")
    assert model.quantized["bits"] == 4 and "GPTQ loses less" in capsys.readouterr().out
    assert isinstance(model.layers[0].feed_forward.w1, Linear4) and isinstance(model.output, Linear8) and model.output.scale.grad_fn is None
    assert torch.equal(model.output.weight, Linear8.of(rtn(Llama.from_pretrained(tmp_path / "in").output.weight, 8, -1, True)).weight)
    with pytest.raises(ValueError, match="rounded at load, with a head in 8 bits"):
        Q.save(model, tmp_path / "again")


def test_benchmark_decodes_the_same_model_in_three_ways(monkeypatch, capsys):
    models, real = [], Llama.fuse
    monkeypatch.setitem(Q.SHAPES, "tiny", LlamaConfig(**SIZES | {"ffn_dim": 128, "dim": 128}))
    monkeypatch.setattr(Llama, "fuse", lambda model, rows=1: (models.append((model.quantized or {"bits": 16})["bits"]), real(model, rows))[1])
    clock = itertools.accumulate(itertools.cycle((0, 4.0, 0, 2.0, 0, 1.0)))  # began and ended: steps of 4, 2 and 1 s in turn
    monkeypatch.setattr(Q, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    rows = [row for batch in (1, 2) for row in Q.benchmark("tiny", batch, torch.device("cpu"))]
    assert models == [16, 8, 4] * 2 and [(row["batch"], row["weights"]) for row in rows] == [(b, w) for b in (1, 2) for w in ("bf16", "8 bits", "4 bits, groups of 128")]
    assert [(row["tokens_per_second"], row["ratio"]) for row in rows] == [(0.25, 1), (0.5, 2), (1, 4), (0.5, 1), (1, 2), (2, 4)] and "4.00 x bf16" in capsys.readouterr().out
    monkeypatch.setattr(Q, "time", time)
    assert len(Q.main(["--benchmark", "tiny", "--batch", "1"])["benchmark"]) == 3


def test_demo_names_what_makes_its_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="out/ppo does not exist: run ppo.py first"):
        Q.main([])


def test_demo_chain(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_demo(tmp_path / "out" / "ppo", max_seq_len=256)
    asked = Q.demo.prompt_records(0, held=True)[:24]  # of 416
    monkeypatch.setattr(Q.demo, "prompt_records", lambda seed, held: asked)
    summary = Q.main(["--max_datasets_size", "8"])
    assert summary["flags"]["group_size"] == 32 and {"gold_before", "gold_after", "perplexity_rtn"} <= summary.keys()
    assert Q.load(tmp_path / "out" / "ppo-int4").quantized["method"] == "gptq"
    assert json.loads((tmp_path / "out" / "ppo-int4" / "tokenizer_config.json").read_text())["template"] == "alpaca"


@pytest.mark.parametrize("flags, sentence", [
    (["--group_size", "0"], "'0' is no number of columns"),
    (["--group_size", "many"], "'many' is no number of columns"),
    (["--bits", "3"], "invalid choice: 3"),
    (["--bits", "8", "--group_size", "32"], "one scale a row, --group_size 32 is for 4 bits"),
    (["--method", "rtn", "--act_order"], "means nothing to --method rtn"),
    (["--calibration", "TEXT", "--act_order", "--file_order"], "are opposites"),
    (["--calibration", "SHORT"], "is too short: it has 1 ids, one window takes 63"),
    (["--calibration", "FEW", "--damp", "0"], "gives 64 inputs, which cannot span the 172 dimensions"),
    (["--calibration", "nowhere.txt"], "nowhere.txt does not exist: name a text file"),
    (["--calibration", "BINARY"], "is not text in UTF-8"),
    (["--method", "rtn", "--save_path", "IN"], "overwrite its own input"),
    (["--method", "rtn", "--head"], "its embedding"),
    (["--eval", "--bits", "4"], "--eval changes nothing, so --bits"),
    (["--pretrain", "elsewhere"], "two models"),
    (["--no_such_flag"], "unrecognized arguments"),
])
def test_wrong_flags_are_sentences(tmp_path, flags, sentence):
    write_demo(tmp_path / "in", tie_embeddings=True)
    files = {"TEXT": "Once upon a time there was a fox. " * 100, "SHORT": "Once", "FEW": "Once upon a time there was a fox and a kite and a hill. " * 4}
    (tmp_path / "BINARY").write_bytes(b"\xff\xfe\x00 no text")
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    if "FEW" in flags:  # as many ids as make one window
        ids = Tokenizer(DEMO).encode(files["FEW"], bos=False)
        assert 63 <= len(ids) < 126
    given = [str(tmp_path / flag.lower()) if flag == "IN" else str(tmp_path / flag) if flag in ("TEXT", "SHORT", "FEW", "BINARY") else flag for flag in flags]
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        Q.main([str(tmp_path / "in"), "--max_len", "64", *given])


def test_quantized_input_is_refused_and_plain_gptq_wants_text(tmp_path):
    model = tiny()
    Q.quantize_model(model, Scheme("rtn", 4, 32))
    Q.save(model, tmp_path)
    Tokenizer(DEMO).save(tmp_path, "alpaca")
    with pytest.raises(ValueError, match="already quantized to 4 bits: quantize the original"):
        Q.main([str(tmp_path)])
    with pytest.raises(ValueError, match="needs --calibration"):
        Q.resolve(Q.parse(["DIR"]), False)


@pytest.mark.parametrize("change, sentence", [
    (dict(bits=3), "has 3 bits in AutoGPTQ layout"),
    (dict(bits=8), "has 8 bits in AutoGPTQ layout"),
    (dict(group_size=0), "has group_size 0"),
    (dict(quant_method="awq"), "is quantized by 'awq'"),
    (dict(checkpoint_format="marlin"), "checkpoint_format 'marlin'"),
    (dict(group_size=64), "qzeros is \\(2, 8\\) int32, by the config it should be \\(1, 8\\) whole numbers"),
    ("g_idx", "lacks model.layers.0.self_attn.q_proj.g_idx"),
    ("scales", "scales is \\(2, 64\\) int32"),
    ("range", "g_idx reaches from 0 to 7, there are groups 0 to 1"),
    ("bias", "has a bias"),
])
def test_bad_checkpoints_are_sentences(tmp_path, change, sentence):
    foreign(tmp_path, False, "gptq", **(change if isinstance(change, dict) else {}))
    if isinstance(change, str):
        tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
        prefix = "model.layers.0.self_attn.q_proj."
        if change == "g_idx":
            del tensors[prefix + "g_idx"]
        elif change == "scales":
            tensors[prefix + "scales"] = tensors[prefix + "scales"].int()
        elif change == "range":
            tensors[prefix + "g_idx"][3] = 7
        else:
            tensors[prefix + "bias"] += 1
        safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=sentence):
        Q.load(tmp_path)


def test_full_disk_leaves_nothing_half_written(tmp_path):
    """A process that may write no file above 100 KB, in place of a full disk: a sentence, exit code 2, no file under a final name."""
    write_demo(tmp_path / "in")
    (tmp_path / "text").write_text("Once upon a time there was a fox. " * 10)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    done = subprocess.run([sys.executable, ROOT / "quantize.py", tmp_path / "in", "--method", "rtn", "--text", tmp_path / "text", "--max_len", "32", "--save_path", tmp_path / "out"], capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 2 and re.fullmatch(r"quantize.py: .*model.safetensors cannot be written: make room .*\n", done.stderr), done.stderr
    assert [file.name for file in (tmp_path / "out").iterdir()] == []


def test_every_flag_is_read():
    source = inspect.getsource(Q)
    reads = source + inspect.getsource(sft)  # whose functions take the same args
    declared = re.findall(r'add_argument\("(?:--)?(\w+)"', source)
    assert len(declared) > 15
    for name in declared:
        assert re.search(rf"args\.{name}\b", reads), f"--{name} is never read"
