"""sft.py: loss and loop against plain cross-entropy, one process against two, a resumed run against an unbroken one."""

import argparse
import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import data.run
import lora
import ppo
import quantize
import rm
import sft
import zero
from data import demo, records, text
from data.text import Tokenizer
from data.weights import DTYPES, is_adapter
from model import Llama, LlamaConfig

ROOT, REAL = Path(__file__).parents[1], Path(__file__).parents[2] / "shared" / "real"
TEMPLATE = text.TEMPLATES["alpaca"]
ENV = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
SIZES = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=48, vocab_size=1280, max_seq_len=160)


def make_model(folder: Path, **sizes) -> Path:
    Llama(LlamaConfig(**SIZES | sizes), generator=torch.Generator().manual_seed(1)).save_pretrained(folder)
    Tokenizer(demo.FOLDER).save(folder, "alpaca")
    return folder


def write(file: Path, content: list) -> Path:
    file.write_text(json.dumps(content))
    return file


@pytest.fixture(scope="session")
def own_tokenizer(tmp_path_factory) -> Path:
    """A byte-level BPE of 400 ids, learnt from the demo's prompts, with ChatML's markers."""
    folder = tmp_path_factory.mktemp("tokenizer")
    text.main(["train", str(demo.FOLDER / "prompts.jsonl"), str(folder), "--vocab_size", "400"])
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with model/ and data.json: 24 records, of which --eval_size 2 leaves 22 to train on."""
    folder = tmp_path_factory.mktemp("base")
    make_model(folder / "model")
    write(folder / "data.json", demo.instruction_records(5, 24))
    return folder


def flags(base: Path, out: Path, *further) -> list[str]:
    """Of a flag given twice, the last counts."""
    given = ["--pretrain", base / "model", "--dataset", base / "data.json", "--save_path", out, "--batch_size", 4,
             "--accumulation_steps", 1, "--max_epochs", 1, "--lr", 3e-3, "--log_interval", 1, "--eval_size", 2]
    return [str(flag) for flag in (*given, *further)]


def run(base: Path, out: Path, *further) -> dict:
    return sft.main(flags(base, out, *further))


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path, key: str = "loss") -> list[float]:
    return [row[key] for row in metrics(out)]


def weights(folder: Path, file: str = "model.safetensors") -> dict:
    return safetensors.torch.load_file(folder / file)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def encoded(file: Path, max_len: int = 160) -> list:
    tokenizer = Tokenizer(demo.FOLDER)
    encode = partial(text.encode_example, tokenizer=tokenizer, template=TEMPLATE, max_len=max_len)
    return text.encode_all(records.read_records([file], "sft"), encode, "examples", say=print)


def plain_loss(model: Llama, examples: list) -> tuple[float, int]:
    """Sum of -log p over the target tokens one example at a time, and their number, written down anew."""
    nll = 0.0
    for ids, target in examples:
        labels = torch.tensor([i if learn else -100 for i, learn in zip(ids, target)])
        logits = model(torch.tensor([ids]))[0, :-1]
        nll += F.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum").item()
    return nll, sum(sum(target) for _, target in examples)


def kill_in(monkeypatch, step: int) -> None:
    """The run dies while it computes this step."""
    real = sft.cosine_lr

    def lr(update, *rest):
        if update == step:
            raise KeyboardInterrupt
        return real(update, *rest)
    monkeypatch.setattr(sft, "cosine_lr", lr)


# ---- the loss -------------------------------------------------------------------------------------------------------

@pytest.mark.lesson
def test_loss_is_on_replies_only(base):
    """A mask that is computed and then dropped. The states that predict replies are all that the head sees."""
    model, examples = Llama.from_pretrained(base / "model"), encoded(base / "data.json")[:4]
    kept = []
    model.norm.register_forward_hook(lambda module, x, y: kept.append(y) or y.retain_grad())
    tokens, _, target = text.collate(examples)
    loss = sft.lm_loss(model, tokens, target)
    loss.backward()
    nll, n = plain_loss(model, examples)
    replies = [Tokenizer(demo.FOLDER).encode(r["output"], False, True) for r in demo.instruction_records(5, 24)[:4]]
    assert loss.item() == pytest.approx(nll, rel=1e-6) and n == target.sum() == sum(map(len, replies))
    predicting = model.hidden(tokens)[:, :-1][target[:, 1:]]  # (N, C)
    assert torch.allclose(kept[0], predicting, atol=1e-5) and kept[0].grad.any(-1).all() and not target[:, 0].any()
    assert all(ids[-1] == 2 and learn[-1] for ids, learn in examples)  # EOS is learnt


def test_loss_of_a_head_with_adapters(base):
    """A PEFT file may target lm_head. Its product is not that of the weight alone, and its adapter learns."""
    model, examples = Llama.from_pretrained(base / "model"), encoded(base / "data.json")[:2]
    model.output = lora.LoRALinear(model.output, 2, 4.0)
    with torch.no_grad():
        model.output.lora_B.normal_(generator=torch.Generator().manual_seed(0))
    tokens, _, target = text.collate(examples)
    loss = sft.lm_loss(model, tokens, target)
    loss.backward()
    assert loss.item() == pytest.approx(plain_loss(model, examples)[0], rel=1e-5) and model.output.lora_B.grad.any()


@pytest.mark.lesson
@pytest.mark.parametrize("dtype, frozen, bound", [("fp32", False, 1e-5), ("fp32", True, 1e-5), ("bf16", False, 3e-2),
                                                  ("fp16", False, 1e-2)])
def test_head_and_loss_in_one_are_cross_entropy(monkeypatch, dtype, frozen, bound):
    """Value and gradients in fp64, over several chunks, with an answer of probability 0 and one of probability 1."""
    monkeypatch.setattr(sft.HeadLoss, "ROWS", 20)
    g = torch.Generator().manual_seed(0)
    h, weight = torch.randn(53, 16, generator=g), torch.randn(40, 16, generator=g)
    answer = torch.randint(0, 40, (53,), generator=g)
    h[3] = weight[5] * 8   # logits beyond exp's range in fp32
    answer[3] = 6
    h[4] = weight[7] * 8
    answer[4] = 7
    h, weight = (t.to(DTYPES[dtype]).requires_grad_() for t in (h, weight))
    weight.requires_grad_(not frozen)
    exact = [t.detach().double().requires_grad_() for t in (h, weight)]
    want = F.cross_entropy(exact[0] @ exact[1].T, answer, reduction="sum")
    (want / 100).backward()
    loss = sft.HeadLoss.apply(h, weight, answer)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(want.item(), rel=bound / 10)
    (loss / 100).backward()
    for ours, other in zip((h, weight)[:2 - frozen], exact):
        assert ours.grad.dtype == DTYPES[dtype]
        assert (ours.grad.double() - other.grad).abs().max() <= bound * other.grad.abs().max()
    assert (weight.grad is None) == frozen


@pytest.mark.lesson
def test_rare_pieces_get_a_gradient_in_fp16():
    """Probabilities of 1e-9 are 0 in fp16, so the head's rows of rare pieces would never move."""
    h, weight = torch.zeros(4, 2, dtype=torch.float16), torch.zeros(3, 2, dtype=torch.float16, requires_grad=True)
    h[:, 0] = 1
    with torch.no_grad():
        weight[0, 0] = 20.7  # pieces 1 and 2 have a probability of 1e-9
    (sft.HeadLoss.apply(h, weight, torch.zeros(4, dtype=torch.long)) * 2.0**16).backward()
    assert weight.grad[1:, 0].tolist() == pytest.approx([4 * 2**16 * math.exp(-20.7)] * 2, rel=1e-2)


@pytest.mark.lesson
def test_logits_never_exist_whole():
    """The largest tensor of a step with many pieces: with autograd's cross-entropy it is the logits, several times."""
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            tensors = [t for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, torch.Tensor)]
            self.numel = max([self.numel, *(t.numel() for t in tensors)])
            return out

    sizes = SIZES | dict(dim=8, n_layers=1, n_heads=1, n_kv_heads=1, ffn_dim=8, vocab_size=3000, max_seq_len=400)
    model, tokens = Llama(LlamaConfig(**sizes)), torch.randint(0, 3000, (4, 400))
    target = torch.ones(4, 400, dtype=torch.bool)
    target[:, 0] = False
    with Largest() as largest:
        sft.lm_loss(model, tokens, target).backward()
    trained = largest.numel
    with Largest() as largest, torch.no_grad():
        sft.lm_loss(model, tokens, target)
    assert trained == largest.numel == sft.HeadLoss.ROWS * 3000 < 4 * 399 * 3000


@pytest.mark.lesson
@pytest.mark.parametrize("filler", [0, 2])
def test_padding_changes_nothing(base, filler):
    """Padding that is taught or, where it has the id of EOS, an EOS that is not."""
    tokenizer, results = Tokenizer(demo.FOLDER), []
    rows = [tokenizer.encode("fox", eos=True), tokenizer.encode("once upon a time", eos=True)]
    for width in (None, 16, 64):
        model = Llama.from_pretrained(base / "model")
        tokens, _, target = text.collate([(ids, [False] + [True] * (len(ids) - 1)) for ids in rows], filler)
        if width:
            tokens = F.pad(tokens, (0, width - tokens.shape[1]), value=filler)
            target = F.pad(target, (0, width - target.shape[1]))
        loss = sft.lm_loss(model, tokens, target)
        loss.backward()
        results.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    (loss, gradient), *others = results
    for other, its_gradient in others:
        assert other == pytest.approx(loss, rel=1e-6)
        assert (its_gradient - gradient).abs().max() < 1e-6 * gradient.abs().max()


@pytest.mark.lesson
def test_schedule_by_hand():
    """Rises over the first two of eight updates, then half a cosine to a tenth."""
    half = [1 + math.cos(math.pi * i / 6) for i in range(1, 7)]
    want = [0.5, 1.0, *(0.1 + 0.9 * x / 2 for x in half)]
    assert [sft.cosine_lr(i, 8, 1.0, 0.25) for i in range(1, 9)] == pytest.approx(want)
    assert sft.cosine_lr(1, 1, 1.0, 0.05) == sft.cosine_lr(7, 7, 1.0, 1.0) == 1.0  # nothing but warm-up


def test_a_token_weighs_the_same_in_any_micro_batch(base, tmp_path):
    """A mean of means, in which the tokens of short answers weigh ten times more."""
    two = write(tmp_path / "two.json", [{"instruction": "Say it.", "output": " ".join(["fox"] * n)} for n in (4, 49)])
    assert [sum(target) for _, target in encoded(two)] == [5, 50]
    for name, batch, accumulated in (("one", 2, 1), ("two", 1, 2)):
        run(base, tmp_path / name, "--dataset", two, "--batch_size", batch, "--accumulation_steps", accumulated,
            "--max_epochs", 3)
    for key in ("loss", "grad_norm"):
        assert losses(tmp_path / "one", key) == pytest.approx(losses(tmp_path / "two", key), rel=1e-4)


def test_every_step_has_the_mean_of_its_own_tokens(base, tmp_path):
    """10 micro-batches, accumulation 4 are 3 updates, the third of 2. At lr 0 each loss can be recomputed."""
    run(base, tmp_path, "--max_datasets_size", 20, "--eval_size", 0, "--batch_size", 2, "--accumulation_steps", 4,
        "--max_epochs", 2, "--lr", 0)
    examples, model = encoded(base / "data.json")[:20], Llama.from_pretrained(base / "model")
    batches = [b for epoch in range(2) for b in text.global_batches([len(ids) for ids, _ in examples], 8, 0, epoch)]
    assert [len(b) for b in batches] == [8, 8, 4] * 2
    expected = [nll / n for nll, n in (plain_loss(model, [examples[i] for i in b]) for b in batches)]
    assert losses(tmp_path) == pytest.approx(expected, rel=1e-5)
    assert same(weights(tmp_path), weights(base / "model"))  # saved and reloaded = before


def test_schedule_counts_updates(base, tmp_path):
    """25 batches, accumulation 4, 3 epochs are 21 updates; a schedule in batches would end too early or never."""
    write(tmp_path / "25.json", demo.instruction_records(6, 25))
    run(base, tmp_path / "out", "--dataset", tmp_path / "25.json", "--eval_size", 0, "--batch_size", 1,
        "--accimulation_steps", 4, "--max_epochs", 3, "--warmup", 0.1, "--lr", 1e-3)
    lr = losses(tmp_path / "out", "lr")
    assert losses(tmp_path / "out", "step") == list(range(1, 22))
    assert lr[:3] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3]) and all(a > b for a, b in zip(lr[2:], lr[3:]))
    assert lr[11] == pytest.approx(1e-4 + 9e-4 * (1 + math.cos(math.pi / 2)) / 2) and lr[-1] == pytest.approx(1e-4)


def test_prompt_that_fills_max_len_is_left_out(base, tmp_path, capsys):
    """Such an example leaves no target: 0 / 0."""
    stories = demo.instruction_records(7, 3)
    write(tmp_path / "three.json", stories)
    write(tmp_path / "four.json", [stories[0] | {"instruction": "fox " * 320}, *stories])
    for name in ("three", "four"):
        run(base, tmp_path / name, "--dataset", tmp_path / f"{name}.json")
    assert losses(tmp_path / "three") == losses(tmp_path / "four")
    assert "1 of 4 examples are left out: none of their first 160 tokens is a target" in capsys.readouterr().out


def test_overfitted_answers_end(tmp_path):
    """A model that never stops, for want of an EOS among the targets."""
    make_model(tmp_path / "model", dim=64)
    words = "fox bear owl cat dog".split()
    stories = [{"instruction": f"Say {word}.", "output": " ".join([word] * (i + 1))} for i, word in enumerate(words)]
    write(tmp_path / "data.json", stories)
    more = ("--batch_size", 5, "--max_epochs", 60, "--lr", 1e-2, "--log_interval", 60)
    summary = run(tmp_path, tmp_path / "out", *more)
    model, tokenizer = Llama.from_pretrained(tmp_path / "out").eval(), Tokenizer(tmp_path / "out")
    asked = [[{"role": "user", "content": story["instruction"]}] for story in stories]
    prompts = [text.encode_prompt(messages, tokenizer, TEMPLATE) for messages in asked]
    answers = model.generate(prompts, 40, temperature=0)
    assert summary["loss"] < 0.1 and all(ids[-1] == 2 for ids in answers)
    assert [tokenizer.decode(ids) for ids in answers] == [story["output"] for story in stories]


def test_answers_end_where_a_chat_template_ends_them(tmp_path, own_tokenizer, capsys):
    """A tokenizer without BOS, whose EOS is not the end of a turn: training and generation must mean the same end."""
    model = Llama(LlamaConfig(**SIZES | {"vocab_size": 400, "dim": 64, "bos_id": None, "eos_id": 0}))
    model.save_pretrained(tmp_path / "model")
    tokenizer = Tokenizer(own_tokenizer)
    tokenizer.save(tmp_path / "model", "zephyr")
    words = "fox bear owl".split()
    stories = [{"instruction": f"Say {word}.", "output": " ".join([word] * (i + 1))} for i, word in enumerate(words)]
    write(tmp_path / "data.json", stories)
    run(tmp_path, tmp_path / "out", "--batch_size", 3, "--max_epochs", 50, "--lr", 1e-2, "--template", "chatml",
        "--eval_size", 0)
    model, end = Llama.from_pretrained(tmp_path / "out").eval(), tokenizer.special("<|im_end|>")
    replaced = "was trained with the template zephyr, --template chatml replaces it"
    assert capsys.readouterr().out.count(replaced) == 1
    assert "<|im_end|>" in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["chat_template"]
    assert end != tokenizer.eos_id and model.config.eos_id == (0, tokenizer.eos_id, end)
    asked = [[{"role": "user", "content": story["instruction"]}] for story in stories]
    chatml = text.TEMPLATES[text.read_template(tmp_path / "out")]
    answers = model.generate([text.encode_prompt(messages, tokenizer, chatml) for messages in asked], 40, temperature=0)
    assert all(ids[-1] == end for ids in answers)
    assert [tokenizer.decode(ids) for ids in answers] == [story["output"] for story in stories]


# ---- runs -----------------------------------------------------------------------------------------------------------

def test_files_of_a_run(base, tmp_path):
    summary = run(base, tmp_path, "--max_steps", 3, "--eval_interval", 2)
    rows, examples = metrics(tmp_path), encoded(base / "data.json")
    assert len(rows) == 3 == summary["steps"]
    assert all({"step", "loss", "lr", "seconds", "tokens_per_second"} <= row.keys() for row in rows)
    assert "eval_loss" in rows[1] and not {"eval_loss"} & (rows[0].keys() | rows[2].keys())
    saved = json.loads((tmp_path / "summary.json").read_text())
    assert saved == json.loads(json.dumps(summary)) and saved["flags"]["max_len"] == 160
    assert {"eval_loss", "seconds", "tokens_per_second", "peak_memory_bytes", "planned_memory_bytes"} <= saved.keys()
    for folder, key in ((base / "model", "eval_loss_before"), (tmp_path, "eval_loss")):
        nll, n = plain_loss(Llama.from_pretrained(folder), text.split_held_out(examples, 2, 0)[1])
        assert summary[key] == pytest.approx(nll / n, rel=1e-5)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["template"] == "alpaca"


def test_adapter_and_an_adapter_on_it(base, tmp_path):
    """Three runs: an adapter; all weights from it; a new adapter on it, whose base is the merged model beside it."""
    before = {file.name: file.read_bytes() for file in (base / "model").iterdir()}
    first, full, second = tmp_path / "first", tmp_path / "full", tmp_path / "second"
    make_model(first)  # of an earlier run: would be read instead of the adapter
    summary = run(base, first, "--lora_rank", 4)
    assert before == {file.name: file.read_bytes() for file in (base / "model").iterdir()}
    assert is_adapter(first)
    assert not {"config.json", "model.safetensors"} & {file.name for file in first.iterdir()}
    assert lora.base_path(first).samefile(base / "model")
    assert summary["eval_loss"] < summary["eval_loss_before"] - 0.01
    for folder, more in ((full, ()), (second, ("--lora_rank", 2))):
        again = run(base, folder, "--pretrain", first, *more)
        assert again["eval_loss_before"] == pytest.approx(summary["eval_loss"], abs=1e-5)
    assert not is_adapter(full) and not (full / "base").exists()
    assert lora.base_path(second).samefile(second / "base")
    merged = Llama.from_pretrained(base / "model")
    lora.load_adapter(merged, first)
    lora.fold(merged)
    beside = Llama.from_pretrained(second / "base")
    assert same(dict(merged.named_parameters()), dict(beside.named_parameters()))
    assert Tokenizer(second / "base").fingerprint == Tokenizer(base / "model").fingerprint


def test_quantized_weights_are_trained_by_adapters_alone(base, tmp_path, capsys):
    """Without --lora_rank they are refused at the door; an adapter of theirs is merged into a full-precision model."""
    model = Llama.from_pretrained(base / "model")
    quantize.quantize_model(model, quantize.Scheme("rtn", 8, -1, True))
    quantize.save(model, tmp_path / "int8")
    Tokenizer(base / "model").save(tmp_path / "int8", "alpaca")
    with pytest.raises(ValueError, match="int8 is quantized, its weights cannot be trained: give --lora_rank"):
        run(base, tmp_path / "full", "--pretrain", tmp_path / "int8")
    adapter = run(base, tmp_path / "adapter", "--pretrain", tmp_path / "int8", "--lora_rank", 4)
    assert adapter["eval_loss"] < adapter["eval_loss_before"] - 0.01
    assert lora.base_path(tmp_path / "adapter").samefile(tmp_path / "int8")
    full = run(base, tmp_path / "full", "--pretrain", tmp_path / "adapter", "--max_steps", 1)
    assert "adapter of a quantized model: merged they are a full-precision one" in capsys.readouterr().out
    assert full["eval_loss_before"] == pytest.approx(adapter["eval_loss"], abs=1e-4)
    assert "quantization_config" not in json.loads((tmp_path / "full" / "config.json").read_text())


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_runs_and_saves_the_master(base, tmp_path, dtype):
    """What is saved is the fp32 master: a file rounded to the compute dtype has lost what small steps had added."""
    run(base, tmp_path / "a", "--dtype", dtype, "--max_epochs", 3)
    assert losses(tmp_path / "a")[-1] < losses(tmp_path / "a")[0] - 0.1
    assert {t.dtype for t in weights(tmp_path / "a").values()} == {torch.float32}  # the dtype of the input
    run(base, tmp_path / "b", "--dtype", dtype, "--max_steps", 1, "--lr", 0)
    assert same(weights(tmp_path / "b"), weights(base / "model"))


def test_skipped_step_is_logged_as_json(base, tmp_path, monkeypatch):
    """A gradient norm of inf is legal, `Infinity` in metrics.jsonl is not: the web page would show nothing."""
    real = zero.ZeRO2.backward
    monkeypatch.setattr(zero.ZeRO2, "backward", lambda optimizer, loss, last: real(optimizer, loss * 1e30, last))
    run(base, tmp_path, "--dtype", "fp16", "--max_steps", 2)
    assert losses(tmp_path, "skipped") == [1, 2] and losses(tmp_path, "grad_norm") == [None, None]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_learn_the_same(base, tmp_path, monkeypatch):
    # The compiler's cache does not tell apart what it compiled for other instructions (ATEN_CPU_CAPABILITY).
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    for name, more in (("plain", ()), ("compiled", ("--compile",))):
        run(base, tmp_path / name, "--max_steps", 3, "--log_interval", 1, *more)
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


def test_recomputed_activations_change_nothing(base, tmp_path):
    for name, more in (("plain", ()), ("again", ("--grad_checkpoint", "--strategy", "naive"))):
        run(base, tmp_path / name, "--lora_rank", 2, "--lora_dropout", 0.1, *more)
    assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path / "again"), rel=1e-6)


@pytest.mark.skipif(not REAL.exists(), reason=f"needs {REAL}")
def test_real_weights_and_instructions(tmp_path):
    instructions = REAL / "instruct" / "self_instruct_seed_175.json"
    given = ["--pretrain", REAL / "stories260K" / "hf", "--dataset", instructions, "--save_path", tmp_path,
             "--max_steps", 2, "--accumulation_steps", 1, "--log_interval", 1]
    summary = sft.main(list(map(str, given)))
    assert summary["steps"] == 2 and 0 < summary["loss"] < 12 and summary["flags"]["lr"] == 2e-5
    assert Llama.from_pretrained(tmp_path).config.ffn_dim == 172


def test_demo_model_starts_the_same_everywhere(tmp_path):
    states = []
    for seed in ("3", "3", "4"):
        torch.manual_seed(len(states))
        args = sft.parse(["--seed", seed, "--save_path", str(tmp_path)])
        states.append(sft.open_model(sft.start(args, True, sft.DEMO)).state_dict())
    assert same(states[0], states[1]) and not same(states[0], states[2])


@pytest.mark.parametrize("data_set", ["the demo's", "one's own"])
def test_a_model_from_scratch_on_ones_own_tokenizer(base, tmp_path, monkeypatch, own_tokenizer, data_set):
    """With the demo's data the demo's preset and gold score; else a preset of its own, and all of the context."""
    monkeypatch.setattr(demo, "measure", lambda *rest: dict.fromkeys(("gold", "gold_en", "gold_zh"), 0.5))
    more = [] if data_set == "the demo's" else ["--dataset", base / "data.json"]
    given = ["--tokenizer", own_tokenizer, "--save_path", tmp_path, "--max_steps", 2, "--max_datasets_size", 40]
    summary = sft.main(list(map(str, given + more)))
    assert ("gold" in summary) == (not more) and summary["flags"]["lr"] == 2e-3
    assert summary["flags"]["max_len"] == (256 if more else 160)
    model, tokenizer = Llama.from_pretrained(tmp_path), Tokenizer(tmp_path)
    assert tokenizer.fingerprint == Tokenizer(own_tokenizer).fingerprint
    assert (model.config.dim, model.config.vocab_size) == (192, 400)
    assert (model.config.bos_id, model.config.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert text.read_template(tmp_path) == "alpaca"


# ---- resume ---------------------------------------------------------------------------------------------------------

def test_resumed_is_unbroken_to_the_bit(base, tmp_path, monkeypatch):
    """With dropout, and killed twice: within an epoch, and after a checkpoint at the end of one (step 6 of 6)."""
    more = ("--lora_rank", 4, "--lora_dropout", 0.3, "--save_interval", 3, "--max_epochs", 2)
    whole = run(base, tmp_path / "whole", *more)
    for step in (5, 8):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            kill_in(patch, step)
            run(base, tmp_path / "cut", *more, *(["--resume"] if step == 8 else []))
        assert losses(tmp_path / "cut", "step") == list(range(1, step))
        with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
            file.write('{"step": 9, "lo')
        half = tmp_path / "cut" / "resume" / f"step-{step:08d}.tmp"  # the kill fell into the writing of a checkpoint
        half.mkdir()
        (half / "rank-0.pt").write_bytes(b"half")
    for _ in range(2):  # the second has no step left, as after a kill during the last save
        assert run(base, tmp_path / "cut", *more, "--resume")["loss"] == whole["loss"]
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    assert losses(tmp_path / "cut", "step") == list(range(1, 13))
    assert same(*(weights(tmp_path / name, "adapter_model.safetensors") for name in ("whole", "cut")))
    assert [path.name for path in (tmp_path / "cut" / "resume").iterdir()] == ["step-00000012"]


def test_another_batch_size_at_resume_misses_no_example(base, tmp_path, monkeypatch):
    """22 examples, twice: 8 in fours, 6 in twos, 8 in threes; in the second epoch 6 in threes and 16 in fives."""
    seen, real = [], text.collate

    def collate(examples):
        seen.extend(map(str, examples))
        return real(examples)
    monkeypatch.setattr(text, "collate", collate)
    monkeypatch.setattr(sft, "evaluate", lambda *rest: {"eval_loss": None})
    more = ("--max_epochs", 2, "--save_interval", 1)
    for step, again in ((3, ()), (6, ("--resume", "--batch_size", 2)), (11, ("--resume", "--batch_size", 3))):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            kill_in(patch, step)
            run(base, tmp_path, *more, *again)
    run(base, tmp_path, *more, "--resume", "--batch_size", 5)
    assert losses(tmp_path, "step") == list(range(1, 15))
    assert len(seen) == 44 and len(set(seen[:22])) == len(set(seen[22:])) == 22


def test_resume_refuses_another_run(base, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        run(base, tmp_path / "none", "--resume")
    run(base, tmp_path / "out", "--max_steps", 2)
    make_model(tmp_path / "wide", ffn_dim=64)
    write(tmp_path / "other.json", demo.instruction_records(8, 24))
    for what, *more in (("dataset", "--dataset", tmp_path / "other.json"), ("dataset", "--max_len", 90),
                        ("seed", "--seed", 1), ("model", "--pretrain", tmp_path / "wide"), ("model", "--lora_rank", 2)):
        with pytest.raises(ValueError, match=f"of another {what}"):
            run(base, tmp_path / "out", "--resume", *more)
    for _ in range(2):  # --max_steps counts the steps before, too
        run(base, tmp_path / "out", "--resume", "--max_steps", 3)
        assert losses(tmp_path / "out", "step") == [1, 2, 3]
    (tmp_path / "out" / "resume" / "step-00000003" / "rank-0.pt").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="cannot be read: remove it"):
        run(base, tmp_path / "out", "--resume")


def test_new_run_forgets_the_checkpoint_of_an_old_one(base, tmp_path, monkeypatch):
    """Else a new run with other flags that dies before its first checkpoint is resumed from the old run's last."""
    run(base, tmp_path, "--max_steps", 2)
    kill_in(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        run(base, tmp_path, "--lr", 1e-4)
    assert not list(tmp_path.glob("resume/step-*"))


@pytest.mark.parametrize("more, said", [
    ((), "before its first checkpoint: it cannot be resumed (--save_interval 500 updates)"),
    (("--save_interval", 1), "resume with the same command and --resume"),
])
def test_an_interrupted_run_says_what_is_left_of_it(base, tmp_path, monkeypatch, capsys, more, said):
    """Ctrl-C in the second update, in a folder with the checkpoint of an older run."""
    (tmp_path / "resume").mkdir()
    os.utime(tmp_path / "resume", (0, 0))
    kill_in(monkeypatch, 2)
    with pytest.raises(SystemExit) as ended:
        data.run.command(sft.main, flags(base, tmp_path, *more))
    assert ended.value.code == 130 and said in capsys.readouterr().err


# ---- two processes --------------------------------------------------------------------------------------------------

WORKER = """
import shutil, sys
from pathlib import Path
import pytest, torch
import data.run
from test_sft import kill_in, run

torch.set_num_threads(1)
base, out = Path(sys.argv[1]), Path(sys.argv[2])
more = ("--save_interval", 2, "--max_epochs", 2, "--strategy", "zero2")  # 22 examples, 8 a step: 3 steps an epoch
run(base, out / "two", *more)
with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
    kill_in(patch, 4)
    run(base, out / "cut", *more)
if torch.distributed.get_rank() == 0:
    shutil.copytree(out / "cut", out / "moved")
data.run.barrier()
run(base, out / "cut", *more, "--resume")
for strategy in ("ddp", "zero2_cpu"):
    run(base, out / strategy, "--max_epochs", 2, "--strategy", strategy)
for strategy in ("ddp", "zero2"):  # 9 examples are 8 + 1: the second process has none in the second update
    run(base, out / f"odd-{strategy}", "--max_datasets_size", 9, "--eval_size", 0, "--max_epochs", 2,
        "--strategy", strategy)
data.run.stop()
"""


def test_two_processes(base, tmp_path, capsys):
    """Half the batch each = the batch on one, under every strategy; resumed on two to the bit, and on one; a process
    without a micro-batch."""
    (tmp_path / "worker.py").write_text(WORKER)
    command = [*TORCHRUN, tmp_path / "worker.py", base, tmp_path]
    result = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert losses(tmp_path / "two") == losses(tmp_path / "cut")
    assert same(weights(tmp_path / "two"), weights(tmp_path / "cut"))
    run(base, tmp_path / "one", "--batch_size", 8, "--max_epochs", 2)
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-5)
    assert len(losses(tmp_path / "one")) == 6
    for strategy in ("ddp", "zero2_cpu"):
        assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / strategy), rel=1e-5)
    capsys.readouterr()
    run(base, tmp_path / "moved", "--batch_size", 8, "--max_epochs", 2, "--resume")
    assert losses(tmp_path / "moved") == pytest.approx(losses(tmp_path / "two"), rel=1e-5)
    said = capsys.readouterr().out
    assert "note: the checkpoint was written with processes=2, batch_size=4, save_interval=2, strategy=zero2, " in said
    assert "this run goes on from it with processes=1, batch_size=8, save_interval=500, strategy=ddp\n" in said
    run(base, tmp_path / "even", "--max_datasets_size", 9, "--eval_size", 0, "--max_epochs", 2, "--batch_size", 8)
    for strategy in ("ddp", "zero2"):
        assert losses(tmp_path / f"odd-{strategy}") == pytest.approx(losses(tmp_path / "even"), rel=1e-5)


# ---- bad input ------------------------------------------------------------------------------------------------------

PREFERENCE = '[{"prompt": "a", "chosen": "b", "rejected": "c"}]'
BAD = {
    "missing dataset": (["--dataset", "{}/none.json"], None, "none.json does not exist"),
    "empty dataset": ([], "", "no usable record"),
    "record without key": ([], '[{"instruction": "a"}]', "line 1.*expected keys.*found keys instruction"),
    "broken JSON": ([], '{"instruction": "a", "output": "b"}\n{"instruction": \n', "line 2: not valid JSON"),
    "preferences": ([], PREFERENCE, "these are preferences, for rm.py"),
    "prompt fills max_len": (["--max_len", "12"], None, "none of the 24 examples fits.*raise --max_len"),
    "no config.json": (["--pretrain", "{}/noconfig"], None, "neither config.json nor params.json"),
    "no tokenizer": (["--pretrain", "{}/notokenizer"], None, "tokenizer.model does not exist"),
    "tokenizer too big": (["--pretrain", "{}/small"], None, "1280 pieces, the model's embedding 640 rows"),
    "missing weights": (["--pretrain", "{}/nowhere"], None, "nowhere does not exist"),
    "template of another tokenizer": (["--template", "chatml"], None, "has no <|im_.*do not fit"),
    "rank too large": (["--lora_rank", "17"], None, "LoRA rank 17 does not fit .*between 1 and 16"),
    "dropout 1": (["--lora_rank", "2", "--lora_dropout", "1"], None, "dropout"),
    "batch 0": (["--batch_size", "0"], None, "--batch_size: must be at least 1, not 0"),
    "lr nan": (["--lr", "nan"], None, "--lr: must be a finite number"),
    "word for a number": (["--max_steps", "many"], None, "--max_steps: must be a whole number, not many"),
    "warmup is a share": (["--warmup", "100"], None, "--warmup: must be at least 0 and at most 1, not 100"),
    "unknown flag": (["--frobnicate"], None, "unrecognized arguments: --frobnicate"),
    "below a file": (["--save_path", "{}/file/out"], None, "--save_path .*cannot be written"),
    "beyond the context": (["--max_len", "161"], None, "beyond the model's context of 160"),
    "over its input": (["--save_path", "{}/small", "--pretrain", "{}/small"], None, "overwrite its own input"),
    "over its adapter's base": (["--save_path", "{}/under", "--pretrain", "{}/adapter", "--lora_rank", "2"], None,
                                "overwrite its own input"),
}


@pytest.fixture(scope="module")
def bad_folder(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    make_model(folder / "small", vocab_size=640)
    for name in ("noconfig", "notokenizer", "under"):
        shutil.copytree(base / "model", folder / name)
    (folder / "noconfig" / "config.json").unlink()
    (folder / "notokenizer" / "tokenizer.model").unlink()
    model = Llama.from_pretrained(folder / "under")
    lora.attach(model, 2)
    lora.save_adapter(model, folder / "adapter", str(folder / "under"))
    (folder / "file").write_text("")
    return folder


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_sentence(base, bad_folder, tmp_path, case):
    more, content, message = BAD[case]
    if content is not None:
        (tmp_path / "data.json").write_text(content)
        more = ["--dataset", str(tmp_path / "data.json")]
    before = {file: file.read_bytes() for file in bad_folder.rglob("*") if file.is_file()}
    with pytest.raises((ValueError, OSError), match=message) as caught:
        run(base, tmp_path / "out", *(flag.replace("{}", str(bad_folder)) for flag in more))
    assert "\n" not in str(caught.value)
    assert not [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert before == {file: file.read_bytes() for file in bad_folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("given, message", [
    (["--dataset", "data.json"], "--dataset needs --pretrain, or --tokenizer"),
    (["--tokenizer", "DIR", "--pretrain", "DIR", "--dataset", "data.json"], "--tokenizer is for a model from scratch"),
    (["--tokenizer", "DIR", "--lora_rank", "4"], "--lora_rank needs --pretrain"),
    (["--lora_rank", "4"], "--lora_rank needs --pretrain"),
    (["--pretrain", "DIR"], "--pretrain needs --dataset"),
])
def test_flags_that_need_another(given, message):
    with pytest.raises(ValueError, match=message):
        sft.parse(given)


def test_exit_codes(base, tmp_path):
    """2 and a sentence for bad input, 1 for a loss of NaN, which names step, loss and rate; 0 with stdin closed."""
    shutil.copytree(base / "model", tmp_path / "model")
    tensors = weights(tmp_path / "model")
    tensors["model.norm.weight"][3] = math.inf
    safetensors.torch.save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})

    def start(out: str, *more) -> subprocess.Popen:
        command = [sys.executable, str(ROOT / "sft.py"), *flags(base, tmp_path / out, "--max_steps", 1, *more)]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=lambda: os.close(0))
        return subprocess.Popen(command, env=ENV, text=True, **pipes)

    runs = [start("a"), start("b", "--dataset", tmp_path / "none.json"), start("c", "--pretrain", tmp_path / "model")]
    out, err = zip(*(run.communicate(timeout=60) for run in runs))
    assert [run.returncode for run in runs] == [0, 2, 1], err
    assert re.fullmatch(r"sft\.py: \S+none\.json does not exist; .*\n", err[1])
    assert re.fullmatch(r"sft\.py: the loss is nan at step 1 with learning rate 0\.003: .*\n", err[2])
    assert not (tmp_path / "c" / "config.json").exists()
    assert err[0] == "" and "flags: " in out[0] and "lr=0.003" in out[0] and "step 1/1" in out[0]


@pytest.mark.parametrize("script", [sft, rm, ppo])
def test_every_flag_is_read(script, monkeypatch):
    """A flag that nobody reads is a promise that nobody keeps."""
    seen = []
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args",
                        lambda parser, argv: seen.extend(parser._actions) or sys.exit())
    with pytest.raises(SystemExit):
        script.parse([])
    source = "".join(map(inspect.getsource, (script, sft, data.run)))
    unread = [action.dest for action in seen if not re.search(rf"\bargs\.{action.dest}\b", source)]
    assert unread == ["help", "model"] and len(seen) > 25  # --model has one choice
    assert all(action.help for action in seen)


@pytest.mark.parametrize("script", [sft, rm, ppo])
def test_help_gives_what_will_be_filled_in(script, capsys):
    """For a real model and for the demo; and nowhere "None", which would be no default."""
    with pytest.raises(SystemExit):
        script.parse(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "None" not in said and "False" not in said
    for flag in ("lr", "max_epochs", "accumulation_steps"):
        defaults = rf"\({script.FINETUNE[flag]}; the demo: {script.DEMO[flag]}\)"
        assert re.search(rf"--{flag},? [^()]*(\([^()]*second spelling\) )?{defaults}", said), flag
    assert re.search(r"--dataset .*\(the demo: \w+\.jsonl\.gz\)|--prompt_dataset .*\(the demo: prompts\.jsonl\)", said)


def test_coatis_published_flags():
    command = ("--pretrain /7B/ --model llama --strategy naive --log_interval 10 --save_path /Coati-7B "
               "--dataset /data.json --batch_size 1 --accimulation_steps 8 --lr 2e-5 --max_datasets_size 512 "
               "--max_epochs 1 --lora_rank 16")
    args = sft.parse(command.split())
    assert (args.accumulation_steps, args.lora_rank, args.dataset) == (8, 16, [Path("/data.json")])
