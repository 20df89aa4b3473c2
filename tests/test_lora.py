"""lora.py: equalities, each with the published bug that it would have caught."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import lora
import zero
from data import weights
from data.text import Tokenizer, read_template
from lora import adapters, attach, disabled, fold, load_adapter, merge, save_adapter, unmerge
from model import Llama, LlamaConfig

STORIES = Path(lora.__file__).parents[1] / "shared" / "real" / "stories260K"

TOKENS = torch.arange(20).view(2, 10) * 3 % 64


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(seed: int = 0, dtype: torch.dtype = torch.float32, **sizes) -> Llama:
    """Grouped-query attention, and a feed-forward width that 8 does not divide."""
    usual = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=44, vocab_size=64, max_seq_len=32)
    model = Llama(LlamaConfig(**usual | sizes), generator=seeded(seed)).eval()
    for p in model.parameters():
        p.data = p.data.to(dtype) * (10 if p.dim() == 2 else 1)  # as large as a trained model's
    return model


def trained(model: nn.Module | None = None, rank: int = 4, seed: int = 1, **kwargs) -> nn.Module:
    """With adapters that say something: B is not zero."""
    model = model or small()
    attach(model, rank, generator=seeded(seed), **kwargs)
    for layer in adapters(model).values():
        layer.lora_B.data.normal_(std=0.1, generator=seeded(seed + 1))
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS)


def differ(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


class Reward(nn.Module):
    """What lora.py needs to know of rm.RewardModel."""

    def __init__(self, seed: int = 0):
        super().__init__()
        self.trunk, self.score = small(seed), nn.Linear(32, 1, bias=False)
        self.trunk.output = None
        nn.init.normal_(self.score.weight, generator=seeded(seed))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.score(self.trunk.hidden(tokens)[:, -1])[:, 0]


# ---- formulas -------------------------------------------------------------------------------------------------------

@pytest.mark.lesson
def test_every_matrix_of_a_block_is_adapted_and_the_start_is_the_base():
    """minimind adapts square matrices only, so grouped-query k and v and the feed-forward stay untouched."""
    model = small()
    assert {name.rpartition(".")[2] for name in attach(model, 4)} == set(lora.LINEARS) and len(adapters(model)) == 2 * 7
    assert {(32, 16), (32, 44), (44, 32)} <= {(m.lora_A.shape[1], m.lora_B.shape[0]) for m in adapters(model).values()}
    assert torch.equal(logits(model), logits(small()))
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())
    trains = 2 * 4 * sum(sides for sides in (64, 48, 48, 64, 76, 76, 76))  # layers x rank x (in + out)
    assert lora.trainable_report(model) == (trains, trains + sum(p.numel() for p in small().parameters()))


@pytest.mark.lesson
def test_layer_is_the_formula_and_A_is_drawn_as_published():
    base = nn.Linear(8, 6, bias=False)
    layer = lora.LoRALinear(base, 2, alpha=5.0, generator=seeded(3))
    assert torch.equal(layer.lora_A, nn.init.kaiming_uniform_(torch.empty(2, 8), a=math.sqrt(5), generator=seeded(3)))
    layer.lora_B.data.normal_()
    x, (W, A, B) = torch.randn(3, 8), (t.detach().double() for t in (base.weight, layer.lora_A, layer.lora_B))
    assert differ(layer(x).double(), x.double() @ (W + 5.0 / 2 * B @ A).T) < 1e-5
    bf16 = lora.LoRALinear(base, 2, 5.0, dtype=torch.bfloat16, generator=seeded(3))
    assert torch.equal(layer.lora_A.bfloat16(), bf16.lora_A)  # drawn in fp32
    assert trained().layers[0].attention.wk.scaling == 2.0  # alpha is 2 r


# ---- invariants ------------------------------------------------------------------------------------------------------

def test_dropout_follows_eval_and_train():
    """ColossalChat's LoraBase.train does not recurse. A new layer in a model in eval mode must not start to drop."""
    model = trained(dropout=0.3)
    assert torch.equal(logits(model), logits(trained()))
    assert not torch.equal(logits(model.train()), logits(model))
    assert torch.equal(logits(model.eval()), logits(trained()))


@pytest.mark.parametrize("make", [small, Reward])
def test_disabled_is_the_base_and_comes_back(make):
    """A reference that is the policy itself, so that the KL is always 0."""
    model, base = trained(make()), logits(make())
    on = logits(model)
    with pytest.raises(KeyError), disabled(model):
        assert torch.equal(logits(model), base)
        with disabled(model):
            pass
        assert torch.equal(logits(model), base)  # the inner one must not switch on again
        raise KeyError
    assert torch.equal(logits(model), on) and differ(on, base) > 0.1


def test_twins_share_what_is_frozen_and_an_adapter_on_an_adapter_is_switched_off_alone():
    """A reward model whose own adapter goes off with that of the critic on it scores as the language model."""
    model = trained().requires_grad_(False)
    on, twin = logits(model), lora.twin(model)
    own = {place for tensor in (*model.parameters(), *model.buffers()) if (place := tensor.data_ptr())}
    assert {t.data_ptr() for t in (*twin.parameters(), *twin.buffers())} == own
    trained(twin, rank=2, seed=5)
    added = {name for name, p in twin.named_parameters() if p.data_ptr() not in own}
    assert added == {name for name, p in twin.named_parameters() if p.requires_grad} and len(added) == 2 * 14
    assert len(adapters(twin)) == 14 and torch.equal(logits(model), on) and differ(logits(twin), on) > 0.1
    with disabled(twin):
        assert torch.equal(logits(twin), on)
    assert not own & {p.data_ptr() for p in lora.twin(small()).parameters()}    # nothing of it is frozen


def test_merged_is_the_adapter_and_unmerged_is_the_base_to_the_bit():
    """Merging had no effect, or the adapter was applied twice [EricLBuehler/candle-lora#26]. loralib's weights drift
    when train() and eval() alternate."""
    model, base = trained(), small().state_dict()
    on, saved = logits(model), model.state_dict().keys()
    bound = 3e-5 * on.abs().max()  # kernels of other processors add up in another order
    for _ in range(5):
        merge(model)
        merge(model)
        model.train().eval()
        assert 0 < differ(logits(model), on) < bound and model.state_dict().keys() == saved
        with pytest.raises(ValueError, match="call unmerge"), disabled(model):
            pass
        unmerge(model)
        unmerge(model)
        assert torch.equal(logits(model), on)
    for name, layer in adapters(model).items():
        assert torch.equal(layer.base.weight, base[f"{name}.weight"])
    for prepare in (unmerge, merge):
        model = trained()
        prepare(model)
        fold(model)
        assert differ(logits(model), on) < bound
        assert model.state_dict().keys() == base.keys() and all(p.requires_grad for p in model.parameters())


def test_bf16_merges_in_fp32():
    """B A summed in bf16 costs quality [huggingface/peft#2502]. One rounding of the exact sum is what may be lost."""
    model = trained(small(dtype=torch.bfloat16))
    exact = [layer.base.weight.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
             for layer in adapters(model).values()]
    merge(model)
    for layer, weight in zip(adapters(model).values(), exact):
        assert layer.base.weight.dtype == torch.bfloat16
        assert (layer.base.weight != weight.bfloat16()).float().mean() < 1e-3  # a near tie may fall either way


class Int8(nn.Module):
    """A quantized linear, as far as lora.py sees one."""
    in_features = out_features = 32

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_quantized_base_runs_and_refuses_to_merge():
    model = small()
    model.layers[0].attention.wq = Int8()
    base = logits(model)
    assert differ(logits(trained(model)), base) > 0.1
    with disabled(model):
        assert torch.equal(logits(model), base)
    with pytest.raises(ValueError, match="quantized"):
        merge(model)


# ---- runs -----------------------------------------------------------------------------------------------------------

def test_gradient_checkpointing_gives_the_same_gradients():
    """With a frozen embedding, reentrant checkpointing returns None for every adapter [microsoft/LoRA#120]."""
    gradients = []
    for checkpointed in (False, True):
        model = trained().train()
        model.grad_checkpoint = checkpointed
        model(TOKENS).square().mean().backward()
        gradients.append([layer.lora_B.grad for layer in adapters(model).values()])
    assert all(a.abs().max() > 0 and differ(a, b) <= 1e-5 * a.abs().max() for a, b in zip(*gradients))


def test_two_steps_move_every_B_and_no_base_weight():
    """An adapter that looked trained was empty [tloen/alpaca-lora#446]."""
    model = small()
    attach(model, 4, generator=seeded(0))
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model(TOKENS).logsumexp(-1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == ("lora_" not in name), name


def test_optimizer_holds_the_adapters_alone():
    """Frozen weights lay in ZeRO's flat buffer, which then fitted no gradient."""
    model = small()
    names = attach(model, 4, generator=seeded(0))
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = zero.ZeRO2(model.named_parameters(), weight_decay=0.1)
    assert sum(bucket.master.numel() for bucket in optimizer.buckets) == lora.trainable_report(model)[0]
    held = {name for bucket in optimizer.buckets for name in bucket.names}
    assert held == {f"{name}.lora_{half}" for name in names for half in "AB"}
    for _ in range(3):
        optimizer.backward(model(TOKENS).logsumexp(-1).square().mean())
        assert not optimizer.step(1e-2).skipped
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == ("lora_" not in name), name


def steps(model: nn.Module, n: int) -> list[float]:
    """n steps of plain gradient descent, which has no state to lose; the loss before each."""
    found = []
    for _ in range(n):
        loss = nn.functional.cross_entropy(model(TOKENS[:, :-1]).flatten(0, 1), TOKENS[:, 1:].flatten())
        loss.backward()
        found.append(loss.item())
        for p in model.parameters():
            if p.grad is not None:
                p.data -= 0.05 * p.grad
                p.grad = None
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_goes_on_from_the_file_alone(tmp_path, dtype):
    """"Resume" began from nothing, since only a full checkpoint was looked for [tloen/alpaca-lora#585]."""
    model = small(dtype=dtype)
    attach(model, 4, generator=seeded(1))
    before = steps(model, 5)
    save_adapter(model, tmp_path, base="base")
    again = small(dtype=dtype)
    load_adapter(again, tmp_path)
    assert all(p.requires_grad == ("lora_" in name) for name, p in again.named_parameters())
    after, expected = steps(again, 3), steps(model, 3)
    assert after == expected and after[0] < before[0] - 0.1 and after[2] < after[0]
    small().save_pretrained(tmp_path / "full")
    with pytest.raises(FileNotFoundError, match="has no adapter_config.json: name the folder of a LoRA adapter"):
        load_adapter(small(), tmp_path / "full")


# ---- files ----------------------------------------------------------------------------------------------------------

def test_save_and_load_give_the_same_model(tmp_path):
    """An adapter file had 443 bytes [tloen/alpaca-lora#446]."""
    model = trained(dropout=0.1)
    save_adapter(model, tmp_path, base="../base", extra={"note": 1})
    shapes = {name: tuple(t.shape) for name, t in safetensors.torch.load_file(tmp_path / lora.WEIGHTS).items()}
    assert len(shapes) == 2 * 14 and shapes["base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"] == (16, 4)
    umask = os.umask(0)
    os.umask(umask)
    assert [file.stat().st_mode & 0o777 for file in tmp_path.iterdir()] == 2 * [0o666 & ~umask]
    again, state = small(), torch.get_rng_state()
    config = load_adapter(again, tmp_path)
    assert torch.equal(state, torch.get_rng_state())
    assert differ(logits(again), logits(model)) < 1e-6
    assert [config[key] for key in ("note", "r", "lora_alpha", "lora_dropout", "rank_pattern")] == [1, 4, 8, 0.1, {}]
    told = {"use_rslora": False, "use_dora": False, "fan_in_fan_out": False, "inference_mode": True,
            "init_lora_weights": True, "bias": "none", "modules_to_save": None}  # what PEFT would do otherwise
    assert told.items() <= json.loads((tmp_path / lora.CONFIG).read_text()).items()
    again.layers[1].attention.wq = again.layers[1].attention.wq.base  # one q_proj without, so names must become full
    save_adapter(again, tmp_path / "part", base="x")
    assert len(load_adapter(small(), tmp_path / "part")["target_modules"]) == 13
    seven = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert config["target_modules"] == seven
    with pytest.raises(ValueError, match="no adapters"):
        save_adapter(small(), tmp_path / "empty", base="x")
    assert weights.is_adapter(tmp_path) and not weights.is_adapter(tmp_path / "empty")


def test_reward_adapter_keeps_its_head(tmp_path):
    """The head is trained in full and must travel with the adapter."""
    model = trained(Reward(seed=1))
    model.trunk.load_state_dict(trained(Reward()).trunk.state_dict())
    save_adapter(model, tmp_path, base="base", extra={"reward_mean": 0.5})
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in lora.adapter_state(model)
    again = Reward()
    config = load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model)) and differ(logits(again), logits(trained(Reward()))) > 0.1
    assert (config["task_type"], config["modules_to_save"], config["reward_mean"]) == ("SEQ_CLS", ["score"], 0.5)
    (tmp_path / lora.CONFIG).write_text(json.dumps(config | {"target_modules": "all-linear"}))
    load_adapter(Reward(), tmp_path)  # "all" leaves out the head
    with pytest.raises(ValueError, match="1 unexpected .score.weight"):
        load_adapter(small(), tmp_path)


def peft_file(path: Path, wide: bool = False, **config) -> Path:
    """A folder as PEFT writes it, q and k of both layers in rank 2. wide: one q in rank 4, old names, a pickle."""
    tensors = {}
    for i, (name, out) in [(i, side) for i in range(2) for side in (("q", 32), ("k", 16))]:
        prefix = f"base_model.model.model.layers.{i}.self_attn.{name}_proj.lora"
        rank = 4 if wide and i == 1 and name == "q" else 2
        for half, shape in ("A", (rank, 32)), ("B", (out, rank)):
            tensors[f"{prefix}_{half}{'.default' if wide else ''}.weight"] = torch.randn(shape, generator=seeded(i))
    torch.save(tensors, path / lora.PICKLE) if wide else safetensors.torch.save_file(tensors, path / lora.WEIGHTS)
    usual = dict(peft_type="LORA", task_type="CAUSAL_LM", r=2, lora_alpha=8, target_modules=["q_proj", "k_proj"],
                 bias="none", base_model_name_or_path="base")
    (path / lora.CONFIG).write_text(json.dumps(usual | config))
    return path


WIDE = dict(wide=True, rank_pattern={"1.self_attn.q_proj": 4})


@pytest.mark.parametrize("config, first, last", [  # scaling of layer 0's wq and layer 1's wq
    ({}, 4, 4),
    ({"use_rslora": True}, 8 / 2**0.5, 8 / 2**0.5),
    ({"target_modules": r".*\.self_attn\.[qk]_proj"}, 4, 4),
    ({"alpha_pattern": {"layers.0.self_attn.q_proj": 3}}, 1.5, 4),
    ({"alpha_pattern": {"k_proj": 3, "layers.1.*": 5}}, 4, 2.5),
    (WIDE, 4, 2),
    (WIDE | {"use_rslora": True}, 8 / 2**0.5, 4),
    (WIDE | {"alpha_pattern": {"q_proj": 3}}, 1.5, 0.75),
])
def test_files_of_others_compute_what_they_say(tmp_path, config, first, last):
    model = small()
    load_adapter(model, peft_file(tmp_path, **config))
    assert len(adapters(model)) == 4
    for layer, scaling in (model.layers[0].attention.wq, first), (model.layers[1].attention.wq, last):
        assert layer.scaling == pytest.approx(scaling)
    assert torch.equal(layer.lora_A, torch.randn(4 if "wide" in config else 2, 32, generator=seeded(1)))
    save_adapter(model, tmp_path / "resaved", base="base")  # what the patterns said survives our own config
    again = small()
    load_adapter(again, tmp_path / "resaved")
    assert torch.equal(logits(again), logits(model)) and differ(logits(again), logits(small())) > 0.1


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("base", ["fp32", "bf16"])
def test_merged_is_the_adapter_within_one_rounding(base, dtype, tmp_path, monkeypatch):
    """In fp32 to the last bits; else every weight of the exact sum is rounded once, from whatever the base has."""
    monkeypatch.chdir(tmp_path)
    small(dtype=weights.DTYPES[base]).save_pretrained("base")
    config = json.loads(Path("base/config.json").read_text())
    assert config["dtype"] == "float32"  # small's config says so
    Path("base/config.json").write_text(json.dumps(config | {"dtype": str(weights.DTYPES[base])[6:]}))
    model = trained(Llama.from_pretrained("base"))
    save_adapter(model, "adapter", base="../base")
    summary = lora.main(["merge", "adapter", "out", "--dtype", dtype])
    assert summary == {"matrices": 14, "dtype": str(weights.DTYPES[dtype])[6:]}
    out, exact = Llama.from_pretrained("out"), adapters(model)
    for name, layer in exact.items():
        W = layer.base.weight.float() + layer.scaling * (layer.lora_B @ layer.lora_A)
        assert torch.equal(out.get_parameter(f"{name}.weight"), W.to(weights.DTYPES[dtype])), name
    before, after = logits(model.float()), logits(out.float())
    bound = 32 * torch.finfo(weights.DTYPES[dtype]).eps * before.abs().mean()
    assert 0 < differ(after, logits(small())) and (after - before).abs().mean() < bound


@pytest.mark.parametrize("layout", ["hf", "hf-sharded", "hf-bin", "meta", "meta-mp2"])
@pytest.mark.skipif(not STORIES.exists(), reason=f"needs the real weights in {STORIES}")
def test_merge_command_reads_every_layout(layout, tmp_path, capsys):
    """From the files of real weights, tensor by tensor, without a model; beside it what merging in memory gives."""
    model = Llama.from_pretrained(STORIES / layout)
    trained(model, rank=2)
    save_adapter(model, tmp_path / "adapter", base=str(STORIES / layout))
    (tmp_path / "adapter" / "tokenizer_config.json").write_text('{"template": "alpaca"}')
    lora.main(["merge", str(tmp_path / "adapter"), str(tmp_path / "out")])
    assert "35 matrices merged, in float32" in capsys.readouterr().out
    out = Llama.from_pretrained(tmp_path / "out")
    fold(model)
    assert all(torch.equal(p, out.get_parameter(name)) for name, p in model.named_parameters())
    assert Tokenizer(tmp_path / "out").fingerprint == Tokenizer(STORIES / layout).fingerprint
    assert read_template(tmp_path / "out") == "alpaca"


def test_merged_model_has_the_tokenizer_of_its_base(smollm2, tmp_path):
    """Only a tokenizer.model was copied, so a merged SmolLM2 had none."""
    small().save_pretrained(tmp_path / "base")
    tokenizer = Tokenizer(smollm2 / "hf")
    tokenizer.save(tmp_path / "base")
    save_adapter(trained(), tmp_path / "adapter", base="../base")
    assert lora.home(tmp_path / "adapter").samefile(tmp_path / "base")
    lora.main(["merge", str(tmp_path / "adapter"), str(tmp_path / "out")])
    assert Tokenizer(tmp_path / "out").fingerprint == tokenizer.fingerprint
    assert read_template(tmp_path / "out") == read_template(smollm2 / "hf") == "chatml"


def test_merge_command_of_a_reward_adapter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small().save_pretrained("base")
    model = trained(Reward())
    save_adapter(model, "adapter", base="../base", extra={"reward_mean": 0.5})
    lora.main(["merge", "adapter", "out"])
    tensors = safetensors.torch.load_file("out/model.safetensors")
    config = json.loads(Path("out/config.json").read_text())
    assert torch.equal(tensors.pop("score.weight"), model.score.weight) and "lm_head.weight" not in tensors
    fold(model)
    assert all(torch.equal(tensors.pop(weights.hf_name(name)), p) for name, p in model.trunk.named_parameters())
    assert not tensors and config["architectures"] == ["LlamaForSequenceClassification"]
    said = [config[key] for key in ("reward_mean", "num_labels", "pad_token_id", "id2label")]
    assert said == [0.5, 1, 0, {"0": "reward"}]
    load_adapter(trunk := small_trunk(), "adapter")  # a trunk alone skips the head
    assert len(adapters(trunk)) == 14 and lora.read_adapter("adapter")["score.weight"].shape == (1, 32)


def small_trunk() -> Llama:
    model = small()
    model.output = None
    return model


def test_home_and_base_of_an_adapter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("base").mkdir()
    save_adapter(trained(), "adapter", base="../base")
    assert lora.home("base") == Path("base") and lora.home("adapter").samefile("base")
    for name in ("tokenizer.model", "tokenizer.json"):
        Path("adapter", name).touch()
        assert lora.home("adapter") == Path("adapter")
        Path("adapter", name).unlink()
    save_adapter(trained(), "lost", base="meta-llama/Llama-2-7b")
    with pytest.raises(FileNotFoundError, match="names its base as 'meta-llama/Llama-2-7b', which is no folder"):
        lora.base_path("lost")
    Path("meta-llama/Llama-2-7b").mkdir(parents=True)
    assert lora.base_path("lost") == Path("meta-llama/Llama-2-7b") and lora.base_path("adapter").samefile("base")


# ---- refusals -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments, words", [
    (dict(rank=17), "rank 17 does not fit layers.0.attention.wk, which is 16 x 32"), (dict(rank=0), "rank 0"),
    (dict(rank=4, targets=("wq", "q_proj")), "called q_proj: choose targets among output, w1"),
    (dict(rank=4, dropout=1.0), "dropout is 1.0"), (dict(rank=4, targets=("output",)), "output shares its weight")])
def test_attach_refuses_and_leaves_the_model_alone(arguments, words):
    model = small(tie_embeddings=True)
    with pytest.raises(ValueError, match=words):
        attach(model, **arguments)
    assert not adapters(model) and all(p.requires_grad for p in model.parameters())
    for act in (merge, unmerge, fold, lambda model: disabled(model).__enter__()):
        with pytest.raises(ValueError, match="no adapters"):
            act(model)
    with pytest.raises(ValueError, match="already has adapters"):
        attach(trained(), 4)


@pytest.mark.parametrize("config, words", [
    ({"use_dora": True}, "use_dora is True, it must be left out, .*merge_and_unload"),
    ({"layers_to_transform": [1]}, r"layers_to_transform is \[1\], it must be left out"),
    ({"bias": "all"}, "bias is 'all', it must be none, .*merge_and_unload"),
    ({"peft_type": "IA3"}, "peft_type is 'IA3', it must be LORA"),
    ({"modules_to_save": ["embed_tokens"]}, r"modules_to_save is \['embed_tokens'\], it must be score"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', it must be left out"),
    ({"init_lora_weights": "PiSSA_niter_4"}, "init_lora_weights is"),
    ({"r": 4}, "8 missing .*q_proj.lora_A.weight .4, 32..*, 8 unexpected .*lora_A.weight .2, 32."),
    ({"target_modules": ["q_proj"]}, "4 unexpected .*load its base, base"),
    ({"target_modules": "all-linear"}, r"20 missing .*, \.\.\.\), 0 unexpected: load its base"),
    ({"target_modules": ["c_attn"]}, "8 unexpected"),
    ({"r": None}, "r is None, it must be a whole number"), ({"lora_alpha": None}, "lora_alpha is None"),
    ({"target_modules": None}, "target_modules is None"),
])
def test_what_is_not_plain_lora_or_not_this_base_is_refused(tmp_path, config, words):
    model = small()
    with pytest.raises(ValueError, match=words):
        load_adapter(model, peft_file(tmp_path, **config))
    assert not adapters(model) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("sizes, words", [
    (dict(n_layers=3), "14 missing"), (dict(n_layers=1), "14 unexp"), (dict(ffn_dim=48), "6 missing .* 6 unexp")])
def test_another_base_is_refused(sizes, words, tmp_path):
    save_adapter(trained(), tmp_path, base="base")
    with pytest.raises(ValueError, match=words):
        load_adapter(small(**sizes), tmp_path)


def test_damaged_weights_are_refused(tmp_path):
    save_adapter(trained(), tmp_path, base="base")
    (tmp_path / lora.WEIGHTS).write_bytes(b"version https://git-lfs")
    with pytest.raises(ValueError, match=f"{lora.WEIGHTS} is a pointer of git-lfs"):
        load_adapter(small(), tmp_path)
    (tmp_path / lora.WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match="neither"):
        load_adapter(small(), tmp_path)


WRONG = ("(", [1], {"a": "b"}, {"(": 1}, -1, 1.5, math.nan, True)
TEXT, NUMBERS = ("(",), (-1, 1.5)


@pytest.mark.parametrize("key, right", [
    ("r", ()), ("lora_alpha", NUMBERS), ("lora_dropout", ()), ("reward_mean", NUMBERS), ("target_modules", ()),
    ("rank_pattern", ()), ("alpha_pattern", ()), ("use_rslora", (True,)), ("base_model_name_or_path", TEXT),
    ("modules_to_save", ()), ("peft_type", ()), ("bias", ()),
])
def test_config_of_wrong_types_is_refused(key, right, tmp_path):
    file = peft_file(tmp_path) / lora.CONFIG
    config = json.loads(file.read_text())
    for value in WRONG:
        file.write_text(json.dumps(config | {key: value}))
        if any(value is other or value == other and type(value) is type(other) for other in right):
            assert lora.read_adapter_config(tmp_path)[key] == value
        else:
            with pytest.raises(ValueError) as error:
                load_adapter(small(), tmp_path)
            assert str(error.value).startswith(f"{file}: {key} is {value!r}, it must be ")


@pytest.mark.parametrize("content", [None, "x", [1], 1])
def test_config_must_be_an_object(content, tmp_path):
    peft_file(tmp_path)
    (tmp_path / lora.CONFIG).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is not a JSON object: copy"):
        load_adapter(small(), tmp_path)


@pytest.mark.parametrize("content", [
    None, [], {"a": 1}, {1: torch.zeros(1)}, {"x.lora_A.weight": torch.zeros(1, dtype=torch.int8)}])
def test_weights_must_be_named_floats(content, tmp_path):
    peft_file(tmp_path)
    (tmp_path / lora.WEIGHTS).unlink()
    torch.save(content, tmp_path / lora.PICKLE)
    with pytest.raises(ValueError, match=r"\.bin (is no dictionary of named tensors|has torch.int8 in .*): get"):
        load_adapter(small(), tmp_path)


def test_merge_command_refuses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = trained()
    small().save_pretrained("base")
    save_adapter(model, "adapter", base="../base")
    for out in ("base", "adapter"):
        with pytest.raises(ValueError, match=f"{out} is the base or an adapter: name a folder of its own"):
            lora.main(["merge", "adapter", out])
    shutil.copytree("base", "quantized")
    config = json.loads(Path("base/config.json").read_text())
    Path("quantized/config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    save_adapter(model, "beside", base="../quantized")
    with pytest.raises(ValueError, match="quantized is quantized, .* name the original .*`python quantize.py out`"):
        lora.main(["merge", "beside", "out"])
    save_adapter(model, "on top", base="../adapter")
    with pytest.raises(ValueError, match="adapter holds an adapter: merge it first"):
        lora.main(["merge", "on top", "out"])
    tensors = safetensors.torch.load_file("base/model.safetensors")
    tensors.pop("model.norm.weight")
    safetensors.torch.save_file(tensors, "base/model.safetensors")
    with pytest.raises(ValueError, match="base does not fit its config, 1 missing .model.norm.weight."):
        lora.main(["merge", "adapter", "out"])
    small(tie_embeddings=True).save_pretrained("tied")
    save_adapter(trained(small(), targets=("output",)), "head", base="../tied")
    with pytest.raises(ValueError, match="output shares its weight"):
        lora.main(["merge", "head", "out"])
    assert not Path("out").exists()


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    """The error said "File too large" and named nothing; config and weights of before stay."""
    save_adapter(trained(), tmp_path, base="base")
    before = (tmp_path / lora.WEIGHTS).read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match=f"{lora.WEIGHTS} cannot be written: make room .*No space left"):
        save_adapter(trained(seed=5), tmp_path, base="other")
    assert {file.name for file in tmp_path.iterdir()} == {lora.CONFIG, lora.WEIGHTS}
    assert (tmp_path / lora.WEIGHTS).read_bytes() == before
