"""rm.py: the score against a hidden state times the head, the loss against its closed form, runs of a tiny model."""

import argparse
import json
import math
import random
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

import data.run
import lora
import ppo
import quantize
import rm
import sft
import zero
from data import demo, records, text
from data.text import Tokenizer
from data.weights import hf_name
from model import Llama, LlamaConfig
from rm import RewardModel
from test_sft import SIZES, TEMPLATE, kill_in, losses, make_model, own_tokenizer, same, weights, write  # noqa: F401
from test_sft import run as run_sft


def tiny(seed: int = 3, **sizes) -> RewardModel:
    generator = torch.Generator().manual_seed(seed)
    return RewardModel(Llama(LlamaConfig(**SIZES | sizes), head=False, generator=generator), generator).eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with an SFT model as model/, as adapter/ of it and as merged/, and pref.json: 20 rankings of 4."""
    folder = tmp_path_factory.mktemp("base")
    make_model(folder / "model")
    write(folder / "data.json", demo.instruction_records(5, 24))
    write(folder / "pref.json", demo.preference_records(5, 20))
    run_sft(folder, folder / "adapter", "--lora_rank", 4, "--max_steps", 2, "--save_interval", 0)
    lora.main(["merge", str(folder / "adapter"), str(folder / "merged")])
    return folder


def run(base, out, *further) -> dict:
    given = ["--pretrain", base / "model", "--dataset", base / "pref.json", "--save_path", out, "--batch_size", 2,
             "--accumulation_steps", 2, "--lr", 3e-3, "--log_interval", 1, "--eval_size", 2, "--max_len", 100]
    return rm.main([str(flag) for flag in (*given, *further)])


def kept(monkeypatch) -> list:
    """Whatever main trained and sampled: [model, ...], answers."""
    models, answers, save, sample = [], [], sft.save_model, rm.sample_answers
    monkeypatch.setattr(sft, "save_model", lambda model, *rest: (models.append(model), save(model, *rest)))
    monkeypatch.setattr(rm, "sample_answers", lambda *rest: (answers.append(sample(*rest)), answers[-1])[1])
    return [models, answers]


def plain_score(model: RewardModel, row: list[int]) -> float:
    """One row, nothing padded: hidden state of its last token times the head."""
    h = model.trunk.hidden(torch.tensor([row]))[0, -1]
    return (h @ model.score.weight[0]).item() - model.reward_mean


# ---- the score ------------------------------------------------------------------------------------------------------

@pytest.mark.lesson
@pytest.mark.parametrize("filler", [0, 2])
@torch.no_grad()
def test_score_is_at_the_last_real_token(filler):
    """Two faults: the last column taken for all rows; the first id that looks like padding, where padding is EOS and a
    dialogue has EOS inside."""
    model, short = tiny(), [1, 40, 41, 2, 50, 51, 2]
    model.config.extra["reward_mean"] = 0.25
    rows = [short, [1, *range(100, 118), 2], [1, 40, 41, 2, 2]]  # a partner three times longer; two EOS at the end
    expected = [plain_score(model, row) for row in rows]
    T = max(map(len, rows))
    for left in (False, True):
        filled = [[filler] * (T - len(row)) + row if left else row + [filler] * (T - len(row)) for row in rows]
        mask = torch.tensor([[T - len(row) <= j if left else j < len(row) for j in range(T)] for row in rows])
        assert model(torch.tensor(filled), mask).tolist() == pytest.approx(expected, abs=1e-5)
    assert len({round(score, 4) for score in expected}) == 3


@pytest.mark.lesson
@pytest.mark.parametrize("loss", [rm.log_sig, rm.log_exp])
def test_loss_is_the_closed_form_and_never_overflows(loss):
    """log(sigmoid(d)) and log(1 + exp(-d)) as they are written give inf from |d| = 89 on in fp32."""
    differences = [-200.0, -89.0, -3.0, 0.0, 0.5, 89.0, 200.0]
    chosen = torch.tensor(differences).requires_grad_()
    value = loss(chosen, torch.zeros(7))
    value.sum().backward()
    log1pexp = lambda x: x + math.log1p(math.exp(-x)) if x > 0 else math.log1p(math.exp(x))
    assert value.tolist() == pytest.approx([log1pexp(-d) for d in differences], rel=1e-6, abs=1e-30)
    assert chosen.grad.tolist() == pytest.approx([-1 / (1 + math.exp(d)) for d in differences], rel=1e-5, abs=1e-30)


@pytest.mark.lesson
def test_padding_of_one_side_changes_nothing(monkeypatch):
    """Both answers compared over a common span, so that the shorter one is judged on its padding."""
    ranking, results, pad = [[1, 40, 41, 42, 2], [1, 40, 60, 2]], [], text.pad
    for filler in (None, 0, 2):
        def padded(rows):
            tokens, mask = pad(rows, filler)
            return F.pad(tokens, (0, 10), value=filler), F.pad(mask, (0, 10), value=False)
        if filler is not None:
            monkeypatch.setattr(text, "pad", padded)
        model = tiny()
        chosen, rejected = rm.score_rows(model, ranking)
        rm.log_sig(chosen, rejected).backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        results.append(((chosen.item(), rejected.item()), gradient))
    (scores, gradient), *others = results
    assert scores == pytest.approx([plain_score(tiny(), row) for row in ranking], abs=1e-6)
    for its_scores, its_gradient in others:
        assert its_scores == pytest.approx(scores, abs=1e-6)
        assert (its_gradient - gradient).abs().max() < 1e-6 * gradient.abs().max()


@pytest.mark.lesson
def test_rankings_are_pairs_of_equal_weight_in_all():
    better, worse, weight = rm.pairs([3, 2])
    assert (better.tolist(), worse.tolist()) == ([0, 0, 1, 3], [1, 2, 2, 4])
    assert weight.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1])
    model, rankings = tiny(), [[[1, 40 + i, 2] for i in range(k)] for k in (4, 2, 3)]
    scores = rm.score_rows(model, [row for ranking in rankings for row in ranking])
    loss = rm.ranking_sums(scores, rankings, "log_exp")["loss"]
    expected = 0.0
    for ranking in rankings:
        scores = [plain_score(model, row) for row in ranking]
        places = [(i, j) for i in range(len(scores)) for j in range(i + 1, len(scores))]
        terms = [math.log1p(math.exp(scores[j] - scores[i])) for i, j in places]
        expected += sum(terms) / len(terms)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.lesson
def test_a_tie_is_not_right():
    """With a tie counted as right, a model that gives every text the same score has an accuracy of 1."""
    scores = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 3.0, 1.0])
    sums = rm.ranking_sums(scores, 4 * [[[1, 40, 2], [1, 41, 2]]], "log_sig")
    figures = rm.ranking_figures({name: x.item() for name, x in sums.items()})
    assert figures == {"accuracy": 0.5, "margin": 0.5, "chosen": 1.25}


@pytest.mark.lesson
def test_head_starts_at_one_over_root_of_dim_plus_one():
    model, again = (tiny(dim=2048, ffn_dim=8, n_layers=1, vocab_size=8) for _ in range(2))
    assert model.score.weight.std().item() == pytest.approx(2049 ** -0.5, rel=0.06) and model.score.bias is None
    assert torch.equal(model.score.weight, again.score.weight)
    seeded = RewardModel(model.trunk, torch.Generator().manual_seed(0))
    drawn = torch.randn(1, 2048, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(seeded.score.weight, 2049 ** -0.5 * drawn, rtol=1e-5)  # 2047 would be 5e-4 off


# ---- training -------------------------------------------------------------------------------------------------------

def test_a_marker_word_is_found_and_chance_is_not(base, tmp_path):
    """Accuracy at 50 % for ever; and a leak of order, length or labels, which would show as more than 50 % on random
    labels."""
    rng, marked = random.Random(0), []
    for _ in range(600):
        texts = [rng.choices(demo.OBJECTS["en"], k=rng.randrange(4, 9)) for _ in range(2)]
        texts[0][rng.randrange(4)] = "dragon"
        marked.append({"prompt": "Say it.", "chosen": " ".join(texts[0]), "rejected": " ".join(texts[1])})
    turned = [{"prompt": "Say it.", "chosen": r["rejected"], "rejected": r["chosen"]} for r in marked]
    mixed = [r if rng.random() < 0.5 else t for r, t in zip(marked, turned)]
    more = ("--eval_size", 60, "--batch_size", 8, "--max_steps", 25, "--lr", 1e-2, "--template", "plain")
    summaries = []
    for name, content in (("right", marked), ("mixed", mixed)):
        file = write(tmp_path / f"{name}.json", content)
        summaries.append(run(base, tmp_path / name, "--dataset", file, "--save_interval", 0, *more))
    right, chance = summaries
    assert right["accuracy"] >= 0.95 > right["accuracy_before"] and right["margin"] > 1 and right["eval_loss"] < 0.3
    assert 0.35 < chance["accuracy"] < 0.65 and chance["eval_loss"] > 0.6


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_loss_falls_in_every_dtype(base, tmp_path, dtype):
    """0.69 at the first step and NaN for ever after."""
    epochs, share = (5, 0.8) if dtype == "fp16" else (10, 0.4)  # fp16's matrix products are slow on a CPU
    run(base, tmp_path, "--max_datasets_size", 8, "--eval_size", 0, "--max_epochs", epochs, "--dtype", dtype,
        "--lr", 1e-2)
    found = losses(tmp_path)  # two updates an epoch: whole epochs are compared, they are over the same rankings
    assert len(found) == 2 * epochs and all(map(math.isfinite, found)) and sum(found[-2:]) < share * sum(found[:2])


def test_files_of_a_run(base, tmp_path):
    """Rows and summary have accuracy and margin; without held-out rankings the summary has them as null."""
    summary = run(base, tmp_path, "--max_steps", 2, "--eval_size", 0)
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert {"step", "loss", "lr", "seconds", "tokens_per_second", "accuracy", "margin"} <= row.keys()
        assert not {"right", "pairs", "eval_loss"} & row.keys() and 0 <= row["accuracy"] <= 1
    saved = json.loads((tmp_path / "summary.json").read_text())
    assert saved == json.loads(json.dumps(summary)) and saved["steps"] == 2
    for key in ("eval_loss", "accuracy", "margin"):
        assert saved[key] is None and saved[f"{key}_before"] is None


@pytest.mark.parametrize("rank", [0, 4])
def test_what_was_trained_is_what_is_loaded(base, tmp_path, monkeypatch, rank):
    """Faults: the head of another copy was saved, or none. And the reward mean is that of the SFT model's answers."""
    models, answers = kept(monkeypatch)
    before, out = weights(base / "model"), tmp_path / "out"
    summary = run(base, out, "--max_steps", 4, "--lora_rank", rank, "--lr", 1e-2)
    trained, loaded = models[0].eval(), RewardModel.from_pretrained(out).eval()
    rows = answers[0]
    start = RewardModel(Llama.from_pretrained(base / "model", head=False), torch.Generator().manual_seed(0))
    assert (loaded.score.weight - start.score.weight).abs().max() > 1e-3
    assert torch.equal(loaded.score.weight, trained.score.weight)
    with torch.no_grad():
        tokens, mask = text.pad(rows)
        scores = loaded(tokens, mask)
        bound = 5e-6 if rank else 1e-6  # folding an adapter rounds
        assert (scores - trained(tokens, mask)).abs().max() < bound
        assert summary["reward_mean"] == loaded.reward_mean != 0
        assert abs(scores.mean()) < bound and scores.std() > 1e-4
        assert scores.tolist() == pytest.approx([plain_score(loaded, row) for row in rows], abs=2e-6)
    tokenizer, read = Tokenizer(demo.FOLDER), records.read_records([base / "pref.json"], "preference")
    prompts = [text.encode_prompt(r["messages"], tokenizer, TEMPLATE) for r in read]
    assert [row[:len(prompt)] for row, prompt in zip(rows, prompts)] == prompts and len(rows) == 20
    assert all(len(row) == 100 or row[-1] == 2 for row in rows)
    assert same(before, weights(base / "model"))
    if not rank:
        config, saved = json.loads((out / "config.json").read_text()), weights(out)
        assert config["architectures"] == ["LlamaForSequenceClassification"] and config["num_labels"] == 1
        assert (config["id2label"], config["label2id"]) == ({"0": "reward"}, {"reward": 0})
        assert (config["pad_token_id"], config["eos_token_id"]) == (0, 2)
        assert config["reward_mean"] == summary["reward_mean"] and saved["score.weight"].shape == (1, 32)
        assert saved.keys() - before.keys() == {"score.weight"} and before.keys() - saved.keys() == {"lm_head.weight"}
        return
    config, saved = lora.read_adapter_config(out), weights(out, "adapter_model.safetensors")
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    assert config["reward_mean"] == loaded.reward_mean and not (out / "config.json").exists()
    assert lora.base_path(out).samefile(base / "model") and len(saved) == 2 * 14 + 1
    assert all(x.any() for name, x in saved.items() if "lora_B" in name) and "base_model.model.score.weight" in saved
    for name, module in lora.adapters(models[0]).items():
        assert torch.equal(module.base.weight, before[hf_name(f"{name.removeprefix('trunk.')}.weight")])
    lora.main(["merge", str(out), str(tmp_path / "merged")])
    with torch.no_grad():
        assert (RewardModel.from_pretrained(tmp_path / "merged")(tokens, mask) - scores).abs().max() < bound


@pytest.mark.parametrize("rank", [0, 2])
def test_padding_is_an_id_that_no_text_produces(base, tmp_path, own_tokenizer, rank):
    """transformers scores a row at the last id that differs from pad_token_id: were it EOS, one token too early."""
    tokenizer = Tokenizer(own_tokenizer)
    Llama(LlamaConfig(**SIZES | {"vocab_size": 400, "eos_id": tokenizer.eos_id})).save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model", "chatml", tokenizer.eos_id)  # as SmolLM2's: its pad_token is its EOS
    out = tmp_path / "out"
    run(base, out, "--pretrain", tmp_path / "model", "--max_steps", 1, "--max_len", 160, "--lora_rank", rank)
    if rank:
        lora.main(["merge", str(out), str(tmp_path / "merged")])
        out = tmp_path / "merged"
    config = json.loads((out / "config.json").read_text())
    assert config["pad_token_id"] == tokenizer.pad_id == tokenizer.special("<|pad|>") != 0
    assert json.loads((out / "tokenizer_config.json").read_text())["pad_token"] == "<|pad|>"  # for other programs
    ends = [tokenizer.eos_id, tokenizer.special("<|im_end|>")]
    assert rank or config["eos_token_id"] == ends


def test_a_tokenizer_without_padding_is_said(base, tmp_path, monkeypatch, capsys):
    start = sft.start

    def without(*rest):
        stage = start(*rest)
        stage.tokenizer.pad_id = None
        return stage
    monkeypatch.setattr(sft, "start", without)
    run(base, tmp_path, "--max_steps", 1)
    assert "none can be padding: transformers will score one answer at a time" in capsys.readouterr().out
    assert json.loads((tmp_path / "config.json").read_text())["pad_token_id"] is None
    assert RewardModel.from_pretrained(tmp_path).reward_mean != 0


def test_answers_have_the_room_of_their_own_prompt(base):
    """One prompt of nearly --max_len must not leave all the others one token; prompts without room are passed over."""
    model, tokenizer = Llama.from_pretrained(base / "model"), Tokenizer(demo.FOLDER)
    args, plain = argparse.Namespace(max_len=48, seed=0), text.TEMPLATES["plain"]
    stage = sft.Stage(args, data.run.World(0, 1, model.device), torch.float32, tokenizer, plain, [2], False)
    short, long, full = ({"messages": [{"role": "user", "content": "fox " * n}]} for n in (2, 30, 60))
    lengths = [len(text.encode_prompt(r["messages"], tokenizer, plain)) for r in (short, long)]
    longer = [{"messages": [{"role": "user", "content": "fox " * n + end}]}
              for n in range(30, 60) for end in ("", "a", "a b")]
    brim = next(r for r in longer if len(text.encode_prompt(r["messages"], tokenizer, plain)) == 48)
    rows = rm.sample_answers(model, [full, brim, long, short], stage)
    assert lengths[0] < 20 and 40 < lengths[1] < 48 and [len(row) for row in rows] == [48, 48]
    assert rows[0][:lengths[1]] == text.encode_prompt(long["messages"], tokenizer, plain)
    assert len(rm.sample_answers(model, 66 * [long], stage)) == 64


def quantized(base, bits: int) -> str:
    """The name of the model rounded to so many bits, in the folder."""
    folder = base / f"int{bits}"
    if not folder.exists():
        model = Llama.from_pretrained(base / "model")
        quantize.quantize_model(model, quantize.Scheme("rtn", bits, -1 if bits == 8 else 128, bits == 8))
        quantize.save(model, folder)
        Tokenizer(base / "model").save(folder, "alpaca")
    return folder.name


def four_models(base, out, form: str, rm_path, rank: int = 2) -> tuple[ppo.Models, sft.Stage]:
    args = ppo.parse(list(map(str, ("--pretrain", base / form, "--rm_path", rm_path, "--lora_rank", rank,
                                    "--save_path", out))))
    stage = sft.start(args, False, ppo.FINETUNE)
    return ppo.open_models(stage), stage


def places(model: torch.nn.Module) -> set[int]:
    """Where the tensors lie that adapters leave as they are, but for the language head."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {tensor.data_ptr() for name, tensor in tensors if not re.search("lora_|score|^output", name)}


def check_plan(models: ppo.Models, stage: sft.Stage, rank: int, bits: int = 0) -> None:
    """zero.py --plan knows what ppo.py holds, from the shape alone; cached is larger than what an update takes."""
    size, held = zero.size_of(models.actor.config, rank, bits, ppo=True), {}
    for model in models:
        held |= {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    assert 4 * size.total + size.codes == sum(held.values())
    given = (list(models[:2]), list(models[2:]), "naive", stage.world, 64, stage.dtype, rank, False)
    for cached in (0, 9, 99_999):
        planned = zero.plan(size, "naive", 1, 64, 4, gpu=False, cached=cached)
        assert zero.run_plan(*given, cached)[1] == planned["device: peak at once"]
    assert planned["device: packed"] == (size.codes or 4 * (2 * (2 * 32 * 48 + 3 * 32 * 48) + 1280 * 32))


def test_plan_of_four_models_of_their_own(base, tmp_path):
    run(base, tmp_path / "rm", "--max_steps", 1)
    check_plan(*four_models(base, tmp_path / "ppo", "model", tmp_path / "rm", 0), rank=0)


@pytest.mark.parametrize("form", ["model", "adapter", "int8", "int4"])
def test_four_models_have_one_base(base, tmp_path, capsys, form):
    """Stage 1 trained all weights or an adapter, or its model was quantized. What is shared computes what it did."""
    if form.startswith("int"):
        quantized(base, int(form[3:]))
    tokens = torch.arange(3, 60)[None]
    run(base, tmp_path / "rm", "--pretrain", base / form, "--max_steps", 2, "--lora_rank", 2)
    models, stage = four_models(base, tmp_path / "ppo", form, tmp_path / "rm")
    check_plan(models, stage, 2, int(form[3:]) if form.startswith("int") else 0)
    assert places(models.actor) == places(models.critic) == places(models.reward) and len(places(models.actor)) > 12
    assert "of their own in memory" not in capsys.readouterr().out
    alone = RewardModel.from_pretrained(tmp_path / "rm").eval()
    with torch.no_grad(), lora.disabled(models.ref):
        assert torch.equal(models.ref(tokens), quantize.open_model(sft.origin(stage.args))(tokens))
        scores = models.reward.values(tokens)
        assert (scores - alone.values(tokens)).abs().max() < 1e-5 and torch.equal(scores, models.critic.values(tokens))
    trained = {name for name, p in models.critic.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 14 + 1 and not any("base.lora" in name for name in trained)


@pytest.mark.parametrize("form, reason", [
    ("plain", "rm is no adapter"), ("other", "rm is an adapter on .*merged, which has other weights than .*model"),
    ("int8", "rm is an adapter on .*int8, which has other weights than .*model")])
def test_bases_that_are_not_shared_are_named(base, tmp_path, capsys, form, reason):
    start, rank = {"plain": ("model", 0), "other": ("merged", 2), "int8": (quantized(base, 8), 2)}[form]
    run(base, tmp_path / "rm", "--pretrain", base / start, "--max_steps", 1, "--lora_rank", rank)
    models, _ = four_models(base, tmp_path / "ppo", "model", tmp_path / "rm")
    told = [line for line in capsys.readouterr().out.splitlines() if "of their own in memory" in line]
    assert len(told) == 1 and re.search(f"^note: .*{reason}, .*rm.py --pretrain .*model --lora_rank 2`$", told[0])
    assert not places(models.actor) & places(models.critic) and places(models.critic) == places(models.reward)
    tokens = torch.arange(3, 60)[None]
    with torch.no_grad():
        alone = RewardModel.from_pretrained(tmp_path / "rm").eval().values(tokens)
        assert (models.critic.values(tokens) - alone).abs().max() < 1e-5
    assert bool(quantize.quantized_layers(models.critic)) == (form == "int8")


@pytest.mark.parametrize("rank", [0, 2])
def test_all_forms_of_stage_1_are_accepted(base, tmp_path, rank):
    """An adapter's names looked for in a full model. Stage 3 opens each too, and all have the same trunk."""
    tokens = torch.arange(3, 60)[None]
    run(base, tmp_path / "rm", "--max_steps", 1, "--lora_rank", rank)
    losses_before, hidden = [], []
    for form in ("adapter", "merged"):
        summary = run(base, tmp_path / form, "--pretrain", base / form, "--max_steps", 1, "--lora_rank", rank)
        losses_before.append(summary["eval_loss_before"])
        given = ["--pretrain", base / form, "--rm_path", tmp_path / form, "--lora_rank", rank]
        args = ppo.parse([str(x) for x in (*given, "--save_path", tmp_path / f"ppo-{form}")])
        stage = sft.start(args, False, ppo.FINETUNE)
        models = ppo.open_models(stage)
        assert (sft.origin(stage.args).name == "base") == (form == "adapter" and rank > 0)
        assert (models.ref is models.actor) == bool(rank)
        with torch.no_grad():
            hidden.append(models.actor.hidden(tokens))
    assert losses_before[0] == pytest.approx(losses_before[1], abs=1e-6)
    plain = Llama.from_pretrained(base / "model").hidden(tokens)
    assert (hidden[0] - hidden[1]).abs().max() < 1e-5 < (hidden[0] - plain).abs().max()


# ---- resume, two processes ------------------------------------------------------------------------------------------

def test_resumed_is_unbroken_to_the_bit(base, tmp_path, monkeypatch):
    more = ("--lora_rank", 4, "--lora_dropout", 0.3, "--save_interval", 2, "--max_epochs", 2)
    run(base, tmp_path / "whole", *more)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_in(patch, 6)
        run(base, tmp_path / "cut", *more)
    run(base, tmp_path / "cut", *more, "--resume")
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut") and len(losses(tmp_path / "cut")) == 10
    assert same(*(weights(tmp_path / name, "adapter_model.safetensors") for name in ("whole", "cut")))
    whole, cut = ((tmp_path / name / "adapter_config.json").read_bytes() for name in ("whole", "cut"))
    assert whole == cut


def run_to_the_end(base: Path, out: Path, *more) -> None:
    run(base, out, *more)
    data.run.stop()


def test_two_processes_are_one_with_twice_the_batch(base, tmp_path, start):
    """Rankings of different sizes, so that a mean of the processes' means would show."""
    rankings = demo.preference_records(6, 11)
    write(tmp_path / "pref.json", [r | {"responses": r["responses"][:2 + i % 3]} for i, r in enumerate(rankings)])
    more = ["--dataset", tmp_path / "pref.json", "--eval_size", 1, "--max_epochs", 2]
    for process in start(2, run_to_the_end, base, tmp_path / "two", *more, "--strategy", "zero2").wait():
        assert process.code == 0, process.err
    run(base, tmp_path / "one", *more, "--batch_size", 4)
    for key in ("loss", "accuracy", "margin", "grad_norm"):
        two = losses(tmp_path / "two", key)
        assert losses(tmp_path / "one", key) == pytest.approx(two, rel=1e-3, abs=1e-6), key
    one, two = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two"))
    assert len(losses(tmp_path / "one")) == 4 and one["accuracy"] == two["accuracy"]
    assert one["eval_loss"] == pytest.approx(two["eval_loss"], rel=1e-4)


# ---- DPO ------------------------------------------------------------------------------------------------------------

def dpo(base, out, *further) -> dict:
    return run(base, out, "--loss_fn", "dpo", *further)


def tiny_policy(vocab_size: int = 60) -> Llama:
    sizes = SIZES | {"vocab_size": vocab_size}
    return Llama(LlamaConfig(**sizes), generator=torch.Generator().manual_seed(4)).eval()


def responses(*rows: list[int], prompt: int = 2) -> list[rm.Response]:
    return [rm.Response(row, [i >= prompt for i in range(len(row))]) for row in rows]


def plain_logprob(policy: Llama, ids: list[int], prompt: int) -> torch.Tensor:
    """log pi(y | x) of one row, from the logits of all its places, in fp64."""
    logp = policy(torch.tensor([ids]))[0].double().log_softmax(-1)
    return sum(logp[i - 1, ids[i]] for i in range(prompt, len(ids)))


@pytest.mark.lesson
@pytest.mark.parametrize("loss_fn, sft_coef, expected", [
    ("dpo", 0.0, 0.4740770),    # -log sigmoid(0.1 * (2 - -3)) = log(1 + exp(-0.5))
    ("ipo", 0.0, 0.0),          # at a difference of 1 / (2 * 0.1) = 5 nats ipo has what it wants
    ("dpo", 0.5, 2.9740770),    # + 0.5 * 20 / 4
    ("ipo", 2.0, 10.0),         # + 2 * 20 / 4
])
def test_policy_losses_by_hand(monkeypatch, loss_fn, sft_coef, expected):
    """log pi -20 and -33, log ref -22 and -30: log-ratios 2 and -3. The better response has 4 tokens, the other 6."""
    better, worse = responses([1, 40, 5, 6, 7, 2], [1, 40, 5, 6, 7, 8, 9, 2])
    better.reference, worse.reference = -22.0, -30.0
    monkeypatch.setattr(rm, "logprobs", lambda policy, rows: torch.tensor([-20.0, -33.0]))
    args = argparse.Namespace(loss_fn=loss_fn, beta=0.1, sft_coef=sft_coef)
    sums = rm.policy_sums(None, [[better, worse]], args)
    assert sums["loss"].item() == pytest.approx(expected, abs=1e-6)
    assert sums["margin"].item() == pytest.approx(0.5) and sums["chosen"].item() == pytest.approx(0.2)


@pytest.mark.lesson
def test_ipo_is_equation_17_times_beta_squared():
    for beta, better, worse in ((0.1, 2.0, -3.0), (0.5, -4.0, 1.0), (2.0, 3.0, 2.0)):
        paper = (better - worse - 1 / (2 * beta)) ** 2
        ours = rm.ipo(torch.tensor([beta * better]), torch.tensor([beta * worse])).item()
        assert ours == pytest.approx(beta ** 2 * paper, abs=1e-5)


@pytest.mark.lesson
def test_logprobs_are_of_the_response_alone():
    """Prompt tokens counted, the end marker forgotten, a mean for the sum, padding of a shorter row."""
    policy, prompts = tiny_policy(), [2, 3, 2]
    rows = [[1, 40, 5, 2], [1, 40, 41, 6, 7, 8, 9, 2], [1, 40, 3, 3, 2]]
    some = [response for row, prompt in zip(rows, prompts) for response in responses(row, prompt=prompt)]
    found = rm.logprobs(policy, some)
    expected = [plain_logprob(policy, row, prompt).item() for row, prompt in zip(rows, prompts)]
    assert found.dtype == torch.float32 and found.tolist() == pytest.approx(expected, abs=1e-5)
    short = rm.logprobs(policy, responses(*([1, 40, i] for i in range(60)))).exp()
    assert short.sum().item() == pytest.approx(1, abs=1e-5)  # over all responses of one token
    tokenizer = Tokenizer(demo.FOLDER)
    record = records.normalise(demo.preference_records(1, 1)[0], "preference")
    for max_len in (160, 50):
        [ranking] = rm.encode_responses(record, tokenizer, TEMPLATE, max_len).examples
        for response, words in zip(ranking, record["responses"]):
            ids = [i for i, learnt in zip(response.ids, response.target) if learnt]
            assert ids == tokenizer.encode(words, False, True)[:len(ids)] and len(response) <= max_len
            assert max_len == 50 or ids[-1] == 2


@pytest.mark.lesson
@pytest.mark.parametrize("loss_fn", ["dpo", "ipo"])
def test_gradient_is_the_papers(loss_fn):
    """Rafailov et al., section 4: -beta sigmoid(-margin) (grad log pi(better) - grad log pi(worse)); for ipo the factor
    is 2 beta (margin - 1/2)."""
    policy, beta = tiny_policy(), 0.3
    rows = [[1, 40, 5, 6, 2], [1, 40, 7, 2]]
    ranking = responses(*rows)
    ranking[0].reference, ranking[1].reference = -10.0, -12.0
    args = argparse.Namespace(loss_fn=loss_fn, beta=beta, sft_coef=0.0)
    rm.policy_sums(policy, [ranking], args)["loss"].backward()
    found = [p.grad.clone() for p in policy.parameters()]
    gradients = []
    for row in rows:
        policy.zero_grad()
        logp = plain_logprob(policy, row, 2)
        logp.backward()
        gradients.append((logp.item(), [p.grad.clone() for p in policy.parameters()]))
    (better, plus), (worse, minus) = gradients
    margin = beta * (better + 10.0 - worse - 12.0)
    factor = -beta / (1 + math.exp(margin)) if loss_fn == "dpo" else 2 * beta * (margin - 0.5)
    assert abs(margin) > 0.05
    for ours, a, b in zip(found, plus, minus):
        assert (ours - factor * (a - b)).abs().max() < 2e-5 * (a - b).abs().max()


@pytest.mark.parametrize("loss_fn, start", [("dpo", math.log(2)), ("ipo", 0.25)])
@pytest.mark.parametrize("rank", [0, 4])
def test_a_policy_is_trained_and_written(base, tmp_path, monkeypatch, rank, loss_fn, start):
    """The reference must stay the model of the start, whatever the policy has become; what is written is a language
    model that stage 3 and the server open."""
    seen, real = [], rm.policy_sums
    monkeypatch.setattr(rm, "policy_sums", lambda policy, some, args: (seen.append(some), real(policy, some, args))[1])
    before, out = weights(base / "model"), tmp_path / "out"
    summary = dpo(base, out, "--loss_fn", loss_fn, "--lora_rank", rank, "--lr", 3e-3, "--max_epochs", 5, "--beta", 0.1,
                  "--weight_decay", 0)
    found, plain = losses(out), Llama.from_pretrained(base / "model")
    assert found[0] == pytest.approx(start, abs=1e-5) == summary["eval_loss_before"] and found[-1] < 0.8 * start
    assert losses(out, "accuracy")[-1] > 0.6 and losses(out, "margin")[-1] > 0.3
    for response in [response for some in seen for ranking in some for response in ranking]:
        with torch.no_grad():
            logp = plain_logprob(plain, response.ids, response.target.index(True)).item()
        assert response.reference == pytest.approx(logp, abs=1e-4)
    assert same(before, weights(base / "model"))
    trained = quantize.open_model(out)
    tokens = torch.arange(3, 60)[None]
    with torch.no_grad():
        assert (trained(tokens) - plain(tokens)).abs().max() > 1e-2
    if rank:
        config = lora.read_adapter_config(out)
        assert config["task_type"] == "CAUSAL_LM" and lora.base_path(out).samefile(base / "model")
    else:
        assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    summary = dpo(base, tmp_path / "again", "--pretrain", out, "--max_steps", 1)
    assert summary["eval_loss_before"] == pytest.approx(math.log(2), abs=1e-5)
    with pytest.raises(ValueError, match="not .*a reward model"):
        RewardModel.from_pretrained(out)


def test_a_policy_resumes_to_the_bit(base, tmp_path, monkeypatch):
    """A reference made of the policy that is resumed would give another loss."""
    more = ("--lora_rank", 4, "--lora_dropout", 0.3, "--save_interval", 2, "--max_epochs", 2, "--lr", 1e-2)
    dpo(base, tmp_path / "whole", *more)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_in(patch, 6)
        dpo(base, tmp_path / "cut", *more)
    dpo(base, tmp_path / "cut", *more, "--resume")
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut") and len(losses(tmp_path / "cut")) == 10
    assert same(*(weights(tmp_path / name, "adapter_model.safetensors") for name in ("whole", "cut")))


def dpo_to_the_end(base: Path, out: Path, *more) -> None:
    dpo(base, out, *more)
    data.run.stop()


@pytest.mark.parametrize("strategy", ["zero2", "ddp"])
def test_a_policy_of_two_processes_is_that_of_one(base, tmp_path, start, strategy):
    rankings = demo.preference_records(6, 11)
    write(tmp_path / "pref.json", [r | {"responses": r["responses"][:2 + i % 3]} for i, r in enumerate(rankings)])
    more = ["--dataset", tmp_path / "pref.json", "--eval_size", 1, "--max_epochs", 2, "--sft_coef", 0.5]
    for process in start(2, dpo_to_the_end, base, tmp_path / "two", *more, "--strategy", strategy).wait():
        assert process.code == 0, process.err
    dpo(base, tmp_path / "one", *more, "--batch_size", 1, "--accumulation_steps", 8, "--strategy", "naive")
    for key in ("loss", "margin", "chosen", "grad_norm"):
        two = losses(tmp_path / "two", key)
        assert losses(tmp_path / "one", key) == pytest.approx(two, rel=1e-3, abs=2e-5), key
    # Adam makes whole steps of gradients that are nothing but rounding: a few weights differ, on each processor others.
    one, two, begun = (weights(folder) for folder in (tmp_path / "one", tmp_path / "two", base / "model"))
    apart = {name: (one[name] - two[name]).norm() / (one[name] - begun[name]).norm() for name in one}
    assert len(losses(tmp_path / "one")) == 4 and max(apart.values()) < 0.02, apart


def test_a_bf16_policy_starts_at_ln_2(base, tmp_path):
    """A reference of the file's fp32 weights would be another model than the one that is trained in bf16."""
    summary = dpo(base, tmp_path, "--dtype", "bf16", "--max_steps", 1, "--batch_size", 8, "--beta", 5)
    assert summary["eval_loss_before"] == pytest.approx(math.log(2), abs=5e-2)


# ---- bad input ------------------------------------------------------------------------------------------------------

BAD = {
    "stage 1's records": (["--dataset", "{}/data.json"], "line 1: these are instructions with answers"),
    "no room for responses": (["--max_len", "12"], "none of the 20 rankings fits.*raise --max_len"),
    "beyond the context": (["--max_len", "161"], "beyond the model's context of 160"),
    "another loss": (["--loss_fn", "none"], "invalid choice: 'none'"),
    "missing weights": (["--pretrain", "{}/nowhere"], "nowhere does not exist"),
    "over its input": (["--save_path", "{}/model"], "overwrite its own input"),
    "beta of a reward model": (["--beta", "0.1"], "--beta and --sft_coef are for a policy: give --loss_fn dpo or ipo"),
    "answers of a reward model": (["--sft_coef", "1"], "--beta and --sft_coef are for a policy"),
    "beta of 0": (["--loss_fn", "dpo", "--beta", "0"], "must be above 0"),
    "a policy for ppo to score with": (["--loss_fn", "dpo", "--save_path", "out/rm"], "is a reward model's directory"),
    "a policy over a reward model": (["--loss_fn", "ipo", "--save_path", "{}/rm"], "is a reward model's directory"),
    "over its adapter": (["--loss_fn", "dpo", "--save_path", "{}/rm-adapter"], "is a reward model's directory"),
    "a policy from a reward model": (["--loss_fn", "dpo", "--pretrain", "{}/rm"], "is a reward model, it has no words"),
    "or from its adapter": (["--loss_fn", "dpo", "--pretrain", "{}/rm-adapter"], "is a reward model, it has no words"),
}


@pytest.fixture(scope="module")
def judges(base):
    """Reward models as rm/ and rm-adapter/ in base."""
    run(base, base / "rm", "--max_steps", 1)
    run(base, base / "rm-adapter", "--max_steps", 1, "--lora_rank", 2)


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_sentence(base, judges, tmp_path, case):
    more, message = BAD[case]
    with pytest.raises((ValueError, OSError), match=message) as caught:
        run(base, tmp_path, *(flag.replace("{}", str(base)) for flag in more))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["model", "adapter", "nothing"])
def test_a_policy_may_be_written_over_a_language_model(base, form):
    args = rm.parse(["--loss_fn", "dpo", "--pretrain", "out/sft", "--save_path", str(base / form)])
    assert args.save_path == base / form


def test_missing_stage_1_names_its_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="out/sft does not exist: run sft.py first"):
        rm.main([])
    (tmp_path / "out/sft").mkdir(parents=True)  # as an interrupted run leaves it
    (tmp_path / "out/sft/metrics.jsonl").touch()
    with pytest.raises(FileNotFoundError, match="out/sft has no finished model: run sft.py first"):
        rm.main([])


def test_a_language_model_is_no_reward_model(base):
    for form in ("model", "adapter"):
        with pytest.raises(ValueError, match="not .*a reward model.*train one with rm.py"):
            RewardModel.from_pretrained(base / form)


def test_a_head_of_another_width_is_refused(tmp_path):
    tiny().save_pretrained(tmp_path)
    tensors = weights(tmp_path)
    tensors["score.weight"] = torch.zeros(2, 32)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"score.weight is \(2, 32\), a reward model of this width has \(1, 32\)"):
        RewardModel.from_pretrained(tmp_path)
