"""serve.py: the engine against Llama.generate and the model's own logits, the API over real connections, the page in a
real browser."""

import ast
import base64
import http.client
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from queue import Empty

import pytest
import torch
import torch.nn.functional as F
from conftest import FORKS

import lora
import quantize
import serve
from data import demo, text
from model import Llama, LlamaConfig, keep_top_p
from serve import Engine, Refusal, Request, Served, Server, common, cut, draw, uniform

REAL = Path(__file__).parents[2] / "shared" / "real" / "stories260K"
SIZES = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=44, vocab_size=1280, max_seq_len=256)
TOKENIZER = text.Tokenizer(demo.FOLDER)
BYTES = {int(piece[3:5], 16): i for i in range(TOKENIZER.vocab_size) if (piece := TOKENIZER.piece(i))[:3] == "<0x"}
ALPACA = text.TEMPLATES["alpaca"]


def tiny(dtype: torch.dtype = torch.float32, **sizes) -> Llama:
    """Random, with logits far enough apart for argmax to be the same by every way."""
    model = Llama(LlamaConfig(**SIZES | sizes), generator=torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2.5 if p.dim() == 2 else 1.2)
    return model.to(dtype)


MODEL = tiny()
SERVED = Served(MODEL, TOKENIZER, ALPACA, "tiny", 256)


def engine_of(model: Llama = MODEL, rows: int = 4, max_waiting: int = 256) -> Engine:
    return Engine(SERVED._replace(model=model), rows, max_waiting)


def ids(n: int, seed: int = 0) -> list[int]:
    return [1, *torch.randint(3, 1280, (n - 1,), generator=torch.Generator().manual_seed(1000 * n + seed)).tolist()]


def job(prompt: list[int], served: Served = SERVED, **wishes) -> Request:
    return Request(served, [prompt], **{"max_tokens": 12, "temperature": 0.0} | wishes)


def finish(engine: Engine, *jobs: Request) -> list[list[int]]:
    """Runs until these are done; the new ids of their answers. The engine has no thread: this one steps."""
    for one in jobs:
        engine.submit(one)
    while engine.running or engine.reading or engine.waiting.qsize():
        engine.step()
    return [answer.made for one in jobs for answer in one.answers]


def events(one: Request) -> list[serve.Event | Refusal]:
    found = []
    while True:
        try:
            found.append(one.events.get_nowait())
        except Empty:
            return found


def said(one: Request, index: int = 0) -> str:
    return "".join(event.text for event in events(one) if event.index == index)


def scripted(answer: list[int | None], prompt: int, vocab: int = 1280) -> Llama:
    """A model that gives answer[i] after prompt + i tokens, whatever was said; an id of None has NaN logits."""
    model = tiny()

    def hidden(tokens, cache, start):
        position = torch.tensor(start)[:, None] + torch.arange(tokens.shape[1])
        places = [p - prompt + 1 for p in position.flatten().tolist()]
        wanted = [answer[i] if 0 <= i < len(answer) else 2 for i in places]
        x = F.one_hot(torch.tensor([w or 0 for w in wanted]), vocab).float() * 1e4
        x[[i for i, w in enumerate(wanted) if w is None]] = math.nan
        return x.view(*tokens.shape, vocab)
    model.hidden, model.output = hidden, torch.nn.Identity()
    return model


def pieces_of(words: str) -> list[int]:
    return TOKENIZER.encode(words, bos=False)


def raw_bytes(words: str) -> list[int]:
    """The same text byte by byte, as the tokenizer falls back to it."""
    return [BYTES[byte] for byte in words.encode()]


# ---- formulas: sampling, stop strings -------------------------------------------------------------------------------

@pytest.mark.lesson
def test_uniform_is_uniform():
    u = sorted(uniform(3, choice, position) for choice in range(20) for position in range(500))
    assert 0 < u[0] and u[-1] <= 1
    # Kolmogorov-Smirnov at 10,000: p = 0.0007
    assert max(abs(value - (i + 0.5) / len(u)) for i, value in enumerate(u)) < 0.02
    assert uniform(1, 23, 4) != uniform(12, 3, 4)


@pytest.mark.lesson
@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.5, 1.0), (1.7, 0.8), (1.0, 0.3), (1.0, 1e-320)])
def test_draw_follows_the_distribution(temperature, top_p):
    """A fine grid of u gives each token its probability among those that top_p keeps."""
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(1)) * 2
    n = 20000
    u = [(i + 0.5) / n for i in range(n)]
    drawn = draw(logits.expand(n, -1).clone(), [temperature] * n, [top_p] * n, u)
    share = torch.bincount(drawn, minlength=50) / n
    probs = (logits[0].double() / temperature).softmax(-1)
    kept, reached = torch.zeros(50, dtype=torch.bool), 0.0
    for token in probs.argsort(descending=True).tolist():  # the smallest set of likeliest tokens that reaches p
        kept[token] = reached < top_p
        reached += probs[token].item()
    assert (share - torch.where(kept, probs, 0.0) / probs[kept].sum()).abs().max() < 2 / n
    assert not (share > 0)[~kept].any() and ((keep_top_p(logits / temperature, top_p)[0] > -math.inf) == kept).all()


@pytest.mark.lesson
def test_draw_treats_rows_by_themselves():
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(2))
    logits[3, 7] = math.nan
    together = draw(logits, [0.0, 1.0, 0.6, 1.0], [1.0, 0.5, 1.0, 1.0], [0.0, 0.4, 0.9, 0.5]).tolist()
    rows = [(0.0, 1.0, 0.0), (1.0, 0.5, 0.4), (0.6, 1.0, 0.9)]
    apart = [draw(logits[b:b + 1], [t], [p], [u]).item() for b, (t, p, u) in enumerate(rows)]
    assert together == [*apart, -1] and together[0] == logits[0].argmax()
    assert draw(torch.zeros(1, 5), [1.0], [1.0], [1.0]).item() == 4
    assert draw(torch.zeros(1, 5), [1.0], [1.0], [1e-17]).item() == 0
    rounded = torch.randn(100, 30, generator=torch.Generator().manual_seed(3))  # some sums end a little below 1
    ones = [1.0] * 100
    assert rounded.softmax(-1).cumsum(-1)[:, -1].min() < 1 and draw(rounded, ones, ones, ones).max() < 30


def test_a_folded_tokenizer_has_text_for_every_id():
    """Ids are those of a model of random weights, whose vocabulary is larger. The first three pieces have no text."""
    folded, n = serve.Folded(demo.FOLDER), TOKENIZER.vocab_size - 3
    assert [folded.token_bytes(i) for i in (0, n - 1, n, 5 * n + 4)] == [
        TOKENIZER.token_bytes(i) for i in (3, n + 2, 3, 7)]


@pytest.mark.lesson
@pytest.mark.parametrize("presence, frequency, expected", [
    (0.5, 0.25, [0, 0, -1.25, 0, -0.75]), (0.5, 0, [0, 0, -0.5, 0, -0.5]), (0, 0.25, [0, 0, -0.75, 0, -0.25])])
def test_penalties_are_openais_formula(presence, frequency, expected):
    logits = torch.zeros(5)
    serve.penalize(logits, [2, 4, 2, 2], presence, frequency)
    assert logits.tolist() == expected


@pytest.mark.lesson
def test_stop_strings_are_never_shown_and_nothing_is_lost():
    """On random texts in random pieces; the text up to the stop string is str.partition's."""
    rng = random.Random(0)
    for _ in range(2000):
        stop, words = ("".join(rng.choice("ab") for _ in range(rng.randint(*size))) for size in ((1, 5), (0, 14)))
        shown, stopped, at = 0, False, 0
        while at < len(words) and not stopped:
            at = min(at + rng.randint(1, 4), len(words))
            end, stopped = cut(words[:at], shown, (stop,), over=at == len(words))
            assert shown <= end and (words.partition(stop)[0] if stop in words else words).startswith(words[:end])
            shown = end
        assert stopped == (stop in words) and words[:shown] == words.partition(stop)[0]
    assert cut("one Obs", 0, ("Observation", "zzz"), over=False) == (4, False)
    assert cut("one Obs", 0, ("Observation", "zzz"), over=True) == (7, False)
    assert cut("x STOP y END", 0, ("END", "STOP"), over=False) == (2, True)


@pytest.mark.lesson
def test_common_beginnings():
    assert common([1, 2, 3], [1, 2, 4]) == 2 and common([], [1]) == 0 and common([1, 2], [1, 2, 3]) == 2


# ---- engine: equalities ---------------------------------------------------------------------------------------------

def test_alone_is_in_a_full_batch_is_generate(monkeypatch):
    """Greedy in fp32, exactly: requests that come and go at any step, read in chunks, in rows used before, give the ids
    of Llama.generate, which knows neither rows nor chunks."""
    monkeypatch.setattr(serve, "CHUNK", 7)
    monkeypatch.setattr(serve, "FIRST_SLOTS", 8)  # the cache grows meanwhile
    prompts = [ids(n, n) for n in (3, 40, 9, 22, 31, 2, 60, 17, 5, 12)]
    expected = MODEL.generate(prompts, 12, temperature=0)
    engine, jobs, most = engine_of(), [job(prompt) for prompt in prompts], 0
    for one in jobs:  # a new one joins at every second step
        engine.submit(one)
        engine.step()
        engine.step()
        most = max(most, len(engine.running) + len(engine.reading))
    assert most <= 4
    finish(engine)
    assert 60 + 12 <= engine.cache.kv[0].shape[3] < 256
    assert [answer.made for one in jobs for answer in one.answers] == expected
    assert engine.counters["requests"] == len(prompts)
    assert [finish(engine_of(), job(prompt))[0] for prompt in prompts] == expected
    assert engine.counters["prompt_tokens"] + engine.counters["prefix_tokens_reused"] == sum(map(len, prompts))


@pytest.mark.skipif(not REAL.exists(), reason=f"needs the real weights in {REAL}")
def test_real_model_writes_its_reference_story():
    model, tokenizer = Llama.from_pretrained(REAL / "hf").eval(), text.Tokenizer(REAL / "hf")
    served = Served(model, tokenizer, ALPACA, "stories", model.config.max_seq_len)
    one = job(tokenizer.encode("Once upon a time"), served, max_tokens=150)
    with quantize.packed(model):
        finish(Engine(served, 4), one)
    story = (REAL / "greedy.txt").read_text()
    assert len(story) > 300 and story.lstrip().startswith(("Once upon a time" + said(one))[:300])


@pytest.mark.parametrize("sizes", [dict(dtype=torch.bfloat16), dict(n_kv_heads=4), dict(tie_embeddings=True)], ids=str)
def test_other_models_agree_with_generate(sizes):
    model, prompts = tiny(**sizes), [ids(n) for n in (5, 30, 11)]
    expected = model.generate(prompts, 12, temperature=0)
    assert finish(engine_of(model, 3), *map(job, prompts)) == expected
    with quantize.packed(model):
        assert finish(engine_of(model, 3), *map(job, prompts)) == expected


def test_sampling_depends_on_seed_choice_and_position_alone():
    wish = dict(temperature=1.0, max_tokens=20)
    alone = finish(engine_of(), job(ids(9), n=3, seed=5, **wish))
    company = engine_of(rows=5)
    for n in (4, 30, 6):
        company.submit(job(ids(n), temperature=0.7, top_p=0.9, max_tokens=40, seed=9))
    company.step()
    company.step()
    assert finish(company, job(ids(9), n=3, seed=5, **wish)) == alone
    assert len({tuple(answer) for answer in alone}) == 3  # the answers to one request differ
    assert finish(engine_of(), job(ids(9), n=3, seed=6, **wish)) != alone
    assert len({tuple(answer) for answer in finish(engine_of(), job(ids(9), n=3))}) == 1  # at temperature 0 they do not


def test_penalties_in_the_engine_are_those_of_a_plain_loop():
    prompt, presence, frequency = ids(6), 0.7, 1.1
    wish = dict(presence_penalty=presence, frequency_penalty=frequency, max_tokens=25, ignore_eos=True)
    got = finish(engine_of(rows=1), job(prompt, **wish))[0]
    made: list[int] = []
    for _ in range(25):
        with torch.no_grad():
            logits = MODEL(torch.tensor([prompt + made]))[0, -1]
        for token, times in Counter(made).items():
            logits[token] -= presence + frequency * times
        made.append(logits.argmax().item())
    assert got == made != finish(engine_of(rows=1), job(prompt, max_tokens=25, ignore_eos=True))[0]


def test_logprobs_are_the_models_own():
    """Before temperature and penalties, one for each token that is shown."""
    prompt = ids(8)
    one = job(prompt, temperature=0.8, seed=4, presence_penalty=1.0, logprobs=3, ignore_eos=True)
    made = finish(engine_of(rows=2), one)[0]
    with torch.no_grad():
        expected = MODEL(torch.tensor([prompt + made]))[0, len(prompt) - 1:-1].log_softmax(-1)
    rows = [row for event in events(one) for _, row in event.tokens]
    assert [bytes(row["bytes"]) for row in rows] == [TOKENIZER.token_bytes(token) for token in made]
    for row, token, reference in zip(rows, made, expected):
        assert row["logprob"] == pytest.approx(reference[token].item(), abs=1e-4)
        best = [bytes(other["bytes"]) for other in row["top_logprobs"]]
        assert best == [TOKENIZER.token_bytes(i) for i in reference.topk(3).indices.tolist()]


def test_all_ids_that_end_a_text_end_an_answer():
    """A config may name several, and another one than the tokenizer's."""
    model = scripted([*pieces_of("fox")[:1], 7, *pieces_of("kite")], 4)
    model.stop_at([7, 9])
    one = job(ids(4), SERVED._replace(model=model))
    finish(engine_of(model), one)
    assert one.answers[0].made[-1] == 7 and one.answers[0].finish == "stop"


# ---- engine: rows, chunks, prefixes ---------------------------------------------------------------------------------

def test_a_long_prompt_does_not_stall_the_others(monkeypatch):
    monkeypatch.setattr(serve, "CHUNK", 8)
    engine, short, long = engine_of(rows=2), job(ids(4), max_tokens=60, ignore_eos=True), job(ids(100))
    engine.submit(short)
    engine.step()
    engine.submit(long)
    for _ in range(13):  # 100 tokens, 8 a step: every step gives the short one its token
        before, read = len(short.answers[0].made), engine.counters["prompt_tokens"]
        engine.step()
        assert len(short.answers[0].made) == before + 1 and engine.counters["prompt_tokens"] - read <= 8
    assert len(long.answers[0].made) == 1
    alone = engine_of(rows=2)
    alone.submit(job(ids(100)))
    alone.step()
    assert (alone.counters["prompt_tokens"], alone.counters["steps"]) == (100, 1)  # with nobody to wait, at once


def test_a_shared_beginning_is_computed_once():
    system = ids(60)
    first, second = system + ids(5, 1)[1:], system + ids(7, 2)[1:]
    engine = engine_of(rows=3)
    answers = finish(engine, job(first))
    assert engine.counters["prompt_tokens"] == 64
    both = job(second), job(first, max_tokens=40, ignore_eos=True)
    answers += finish(engine, *both)
    assert engine.counters["prompt_tokens"] == 64 + 6 + 1 and engine.counters["prefix_tokens_reused"] == 60 + 63
    assert [one.reused for one in both] == [60, 63]
    assert answers[0] == answers[2][:len(answers[0])] and answers[1] == MODEL.generate([second], 12, temperature=0)[0]
    # the chat so far: the answer's own keys and values are there too
    longer = first + answers[2][:30] + ids(4, 3)[1:]
    fresh = finish(engine_of(rows=3), job(longer))
    assert finish(engine, job(longer)) == fresh
    assert engine.counters["prefix_tokens_reused"] == 60 + 63 + len(first) + 30


def test_a_chat_goes_on_in_its_row_only_when_its_answer_has_ended():
    """Else it would take the row of an answer that is still written."""
    wish = dict(max_tokens=20, ignore_eos=True)
    (alone,) = finish(engine_of(rows=2), job(ids(5), **wish))
    engine, running = engine_of(rows=2), job(ids(5), **wish)
    engine.submit(running)
    for _ in range(4):
        engine.step()
    begun = running.answers[0].held
    finish(engine, job(begun + [7, 8]))
    assert 5 < len(begun) < 10 and running.answers[0].made == alone
    rows = list(engine.rows)
    finish(engine, job(ids(5) + alone[:19] + [7, 8]))
    assert [row is old for row, old in zip(engine.rows, rows)].count(False) == 1
    assert running.answers[0] not in engine.rows


def test_several_choices_and_simultaneous_requests_compute_their_prompt_once():
    engine = engine_of()
    finish(engine, job(ids(50), n=4, temperature=1.0), job(ids(50)[:48] + [5, 6, 7]))
    assert engine.counters["prompt_tokens"] == 50 + 3 + 3


def test_a_new_prompt_takes_the_row_that_was_free_for_longest():
    engine, chats = engine_of(rows=2), [ids(40, i) for i in range(3)]
    for chat in chats[:2]:
        finish(engine, job(chat))
    again = job(chats[0] + [5, 6, 7])
    finish(engine, again)                # now the second chat is the one that nobody went on with for longest
    finish(engine, job(chats[2]))
    kept, lost = job(chats[0] + [5, 6, 7, 8]), job(chats[1])
    finish(engine, kept, lost)
    assert again.reused >= 40 and kept.reused >= 43 and lost.reused < 5


def test_rows_hold_what_they_say():
    """After any course of answers that begin, end and swap, the keys and values of each row are those of the ids that
    it is said to hold, free or not, and the running answers have the first rows."""
    rng, engine, jobs = random.Random(0), engine_of(rows=4), []
    for step in range(60):
        if rng.random() < 0.4:
            jobs.append(job(ids(rng.randint(2, 40), step), max_tokens=rng.randint(1, 12)))
            engine.submit(jobs[-1])
        if jobs and rng.random() < 0.05:
            rng.choice(jobs).over = True
        if jobs:
            engine.step()
        for answer in engine.running:
            assert answer.held == answer.prompt + answer.made[:-1]
    for row, held in enumerate(answer.held for answer in engine.rows):
        alone = serve.KVCache(MODEL.config, 1, 256, torch.float32, "cpu")
        with torch.no_grad():
            MODEL.hidden(torch.tensor([held]), cache=alone)
        for kv, expected in zip(engine.cache.kv, alone.kv):
            assert torch.allclose(kv[:, row, :, :len(held)], expected[:, 0, :, :len(held)], atol=1e-4)


def test_queue_and_counters():
    def told() -> dict:
        return dict(re.findall(r"^octet_(\w+) (\S+)$", serve.prometheus(engine), re.MULTILINE))
    engine = engine_of(rows=2, max_waiting=3)
    for _ in range(2):
        engine.submit(job(ids(4), max_tokens=5, ignore_eos=True))
        engine.step()
    for _ in range(3):
        engine.submit(job(ids(4), max_tokens=5, ignore_eos=True))
    with pytest.raises(Refusal, match="3 answers are waiting") as refused:
        engine.submit(job(ids(4)))
    assert refused.value.status == 429 and 1 <= int(refused.value.headers["Retry-After"]) <= 60
    assert [told()[name] for name in ("slots", "slots_used", "waiting", "refused_total")] == ["2", "2", "3", "1"]
    finish(engine)
    names = ("slots_used", "waiting", "answers_total", "completion_tokens_total", "first_token_seconds_count")
    assert [told()[name] for name in names] == ["0", "0", "5", "25", "5"]
    assert 0 < float(told()["first_token_seconds_sum"]) < 60


def test_a_request_that_is_over_frees_its_row_within_one_step():
    """Its client has left; one that leaves while it waits is never started."""
    engine = engine_of(rows=1)
    a, b, c = (job(ids(5, i), max_tokens=200, ignore_eos=True) for i in range(3))
    for one in (a, b, c):
        engine.submit(one)
    for _ in range(3):
        engine.step()
    assert len(a.answers[0].made) == 3 and not b.answers[0].made
    a.over = b.over = True
    engine.step()
    assert [len(one.answers[0].made) for one in (a, b, c)] == [3, 0, 1]


def test_non_finite_logits_fail_one_request():
    """The row's next user is not poisoned: behind the mask a NaN is 0 * NaN."""
    words = pieces_of("Once there was a fox.")
    engine, broken = engine_of(scripted([*words[:2], None], 4), 2), job(ids(4))
    finish(engine, broken)
    error = events(broken)[-1]
    assert error.status == 500 and "non-finite" in str(error)
    engine = engine_of(scripted([*words[:2], None], 4), 3)
    both, other = job(ids(4), n=2, max_tokens=3), job(ids(3), max_tokens=2)
    finish(engine, both, other)
    assert [event.status for event in events(both) if isinstance(event, Refusal)] == [500]
    assert events(other)[-1].finish == "stop" and engine.counters["failed"] == 1
    engine = engine_of(rows=2)
    good = MODEL.generate([ids(60), ids(5)], 12, temperature=0)
    engine.cache.kv[0][:, 0, :, 20:] = math.nan
    with MODEL.output.register_forward_hook(lambda module, x, y: y * math.nan):
        finish(engine, job(ids(30)))
    long, short = job(ids(60)), job(ids(5))
    assert finish(engine, long, short) == good and engine.counters["failed"] == 1 and not engine.running


def start(engine: Engine) -> threading.Thread:
    thread = threading.Thread(target=engine.run, daemon=True)
    thread.start()
    return thread


def test_a_step_that_fails_ends_its_requests_and_no_others(capsys):
    engine = engine_of(rows=2)
    thread = start(engine)
    for part in ("forward", "swap", "sample"):
        sound = getattr(engine, part)
        setattr(engine, part, lambda *_: 1 / 0)
        one = job(ids(4))
        engine.submit(one)
        assert one.events.get(timeout=10).status == 500
        setattr(engine, part, sound)
    one = job(ids(4))
    engine.submit(one)
    while not one.events.get(timeout=10).finish:
        pass
    engine.stop(5.0)
    thread.join(10)
    assert not thread.is_alive() and "ZeroDivisionError" in capsys.readouterr().err


def test_a_step_that_fails_half_way_leaves_nothing_to_reuse():
    """Keys and values of a row may then be another's."""
    engine, prompts = engine_of(rows=2), [ids(40), ids(50)]
    expected, swap = MODEL.generate(prompts, 12, temperature=0), engine.swap

    def half(a: int, b: int) -> None:
        if engine.running:
            engine.swap = swap
            engine.cache.kv[0][:, [0, 1]] = engine.cache.kv[0][:, [1, 0]]
            raise MemoryError
        swap(a, b)
    engine.swap = half
    thread, lost = start(engine), [job(prompt, max_tokens=200, ignore_eos=True) for prompt in prompts]
    for one in lost:
        engine.submit(one)
    until(lambda: all(one.over for one in lost))
    engine.stop(0.0)
    thread.join(10)
    engine.end = math.inf  # and goes on here
    assert finish(engine, *map(job, prompts)) == expected


def test_what_does_not_finish_in_time_is_told_so():
    engine, gate, finished = engine_of(rows=1), threading.Semaphore(1), []
    one, waits = job(ids(4), max_tokens=200, ignore_eos=True), job(ids(5))
    step = engine.step
    engine.step = lambda: (gate.acquire(timeout=15), step())
    engine.submit(one)
    engine.submit(waits)
    thread = threading.Thread(target=lambda: finished.append(engine.run()))
    thread.start()
    engine.stop(0.0)
    gate.release(1000)
    thread.join()
    assert finished == [False] and len(one.answers[0].made) < 5
    assert events(one)[-1].status == 503 == events(waits)[-1].status


# ---- the text of an answer ------------------------------------------------------------------------------------------

def test_stop_string_across_tokens():
    words, wish = pieces_of("The fox found a heavy kite. The end of it."), dict(max_tokens=50, chat=True, stream=True)
    engine, one = engine_of(scripted(words, 4), 1), job(ids(4), stop=("kite. The e",), **wish)
    finish(engine, one)
    got = events(one)
    assert "".join(event.text for event in got) == "The fox found a heavy "
    assert [event.finish for event in got if event.finish] == ["stop"]
    assert not any("kite" in event.text for event in got) and len(got) > 3
    assert len(one.answers[0].made) < len(words)  # nothing is computed behind it


@pytest.mark.parametrize("words", ["🦊", "é", "狐狸和风筝", "a🦊🪁b", "naïve 狐 🦊!"])
def test_characters_are_never_cut(words):
    """Bytes of one character come in several tokens."""
    wish = dict(chat=True, stream=True)
    engine, one = engine_of(scripted(raw_bytes(words), 4), 1), job(ids(4), max_tokens=50, **wish)
    finish(engine, one)
    got = events(one)
    assert "".join(event.text for event in got) == words and not any("�" in event.text for event in got)
    assert [event.text for event in got if event.text] == list(words)  # each as soon as it is complete
    engine, one = engine_of(scripted(raw_bytes(words), 4), 1), job(ids(4), max_tokens=1, chat=True)
    finish(engine, one)
    assert said(one) == (words[0] if ord(words[0]) < 128 else "�")  # cut by length, what there is is shown


def test_a_character_that_is_cut_is_one_replacement_character():
    engine, one = engine_of(scripted(raw_bytes("狐🦊"), 4), 1), job(ids(4), max_tokens=6, chat=True)
    finish(engine, one)
    assert said(one) == "狐�"


def test_a_completion_goes_on_with_its_prompts_text():
    prompt = TOKENIZER.encode("There was once")
    words = TOKENIZER.encode("There was once a kind fox near the village.")[len(prompt):]
    for chat, expected in ((False, " a kind fox near the village."), (True, "a kind fox near the village.")):
        engine, one = engine_of(scripted(words, len(prompt)), 1), job(prompt, max_tokens=50, chat=chat)
        finish(engine, one)
        assert said(one) == expected


def test_logprobs_of_text_that_a_stop_string_cuts_off_are_dropped():
    words = pieces_of("The fox found a kite.")
    wish = dict(stop=(" found",), max_tokens=50, logprobs=0, chat=True)
    engine, one = engine_of(scripted(words, 4), 1), job(ids(4), **wish)
    finish(engine, one)
    event, = events(one)
    rows = [row for _, row in event.tokens]
    assert b"".join(bytes(row["bytes"]) for row in rows) == b" The fox"
    whole, = serve.form(one, [event])["choices"]
    assert whole["message"]["content"] == "The fox" and whole["logprobs"]["content"] == rows


# ---- over HTTP ------------------------------------------------------------------------------------------------------

def serving(model: Llama = MODEL, *flags: str, rows: int = 4, max_waiting: int = 64, listen: bool = True,
            verbose: bool = False) -> Server:
    quiet = [] if verbose else ["--benchmark"]
    server = Server(engine_of(model, rows, max_waiting), serve.parse(["--http_port", "0", *quiet, *flags]))
    start(server.engine)
    return accept(server) if listen else server


def accept(server: Server) -> Server:
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    return server


def close(server: Server) -> None:
    server.engine.stop(0.0)
    server.finish(5.0)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = serving(MODEL, "--runs", str(tmp_path_factory.mktemp("out")))
    yield server
    close(server)


def connect(server: Server) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(*server.server_address, timeout=20)


def post(client: http.client.HTTPConnection, path: str, body: object) -> None:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    client.request("POST", path, raw, {"Content-Type": "application/json"})


def ask(server: Server, path: str, body: object = None, headers: dict | None = None) -> tuple[int, dict | str, dict]:
    """(status, JSON or text, headers) of one request; a body makes it a POST."""
    connection = connect(server)
    raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    kind = {"Content-Type": "application/json"}
    connection.request("GET" if body is None else "POST", path, raw, kind | (headers or {}))
    response = connection.getresponse()
    content = response.read().decode()
    connection.close()
    is_json = response.getheader("Content-Type", "").startswith("application/json")
    return response.status, json.loads(content) if is_json and content else content, dict(response.getheaders())


def stream(server: Server, path: str, body: dict) -> list:
    status, content, headers = ask(server, path, body | {"stream": True})
    assert status == 200 and headers["Content-Type"].startswith("text/event-stream")
    parts = content.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def until(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not within the time"
        time.sleep(0.005)


class Paced:
    """The engine's forward calls, so many at a time."""

    def __init__(self, engine: Engine, calls: int):
        self.forward, self.gate = engine.forward, threading.Semaphore(calls)
        engine.forward = self

    def __call__(self, *arguments) -> torch.Tensor:
        self.gate.acquire(timeout=15)
        return self.forward(*arguments)

    def go_on(self) -> None:
        self.gate.release(100_000)


CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
HELLO = {"messages": [{"role": "user", "content": "Write a story about a fox and a kite."}], "max_tokens": 9}


def test_chat_is_the_templates_prompt_and_the_models_answer(server):
    prompt = text.encode_prompt(HELLO["messages"], TOKENIZER, ALPACA)
    expected = MODEL.generate([prompt], 9, temperature=0)[0]
    status, body, _ = ask(server, CHAT, HELLO | {"temperature": 0})
    assert status == 200 and body["object"] == "chat.completion" and body["model"] == "tiny"
    message = {"role": "assistant", "content": TOKENIZER.decode(expected), "refusal": None}
    assert body["choices"] == [{"index": 0, "logprobs": None, "finish_reason": "length", "message": message}]
    used = body["usage"]
    counts = (used["prompt_tokens"], used["completion_tokens"], used["total_tokens"])
    assert counts == (len(prompt), 9, len(prompt) + 9)
    parts = [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]
    messages = [{"role": "developer", "content": parts}, *HELLO["messages"]]
    worded = [{"role": "system", "content": "Be kind."}, *HELLO["messages"]]
    neutral = {"stop": None, "n": None, "tools": [], "weird": None, "logprobs": False, "top_logprobs": 0}
    wish = {"messages": messages, "max_completion_tokens": 3, "temperature": 0} | neutral
    status, body, _ = ask(server, CHAT, wish)
    assert status == 200 and body["usage"]["prompt_tokens"] == len(text.encode_prompt(worded, TOKENIZER, ALPACA))
    assert body["usage"]["completion_tokens"] == 3


def test_completions_take_text_ids_and_lists(server):
    for prompt in ("Once", TOKENIZER.encode("Once")):
        status, body, _ = ask(server, COMPLETE, {"prompt": prompt, "temperature": 0, "model": "tiny"})
        assert status == 200 and body["object"] == "text_completion" and body["usage"]["completion_tokens"] == 16
        made = MODEL.generate([TOKENIZER.encode("Once")], 16, temperature=0)[0]
        assert "Once" + body["choices"][0]["text"] == TOKENIZER.decode(TOKENIZER.encode("Once") + made)
    wish = {"prompt": ["Once", "Two"], "n": 2, "seed": 4, "max_tokens": 5}
    status, body, _ = ask(server, COMPLETE, wish | {"logprobs": 2})
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert len({choice["text"] for choice in body["choices"]}) == 4
    for choice in body["choices"]:
        shown = choice["logprobs"]
        assert {len(shown[key]) for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset")} == {5}
        assert all(len(top) == 2 for top in shown["top_logprobs"])
        # bytes of no character have no place in the text
        places = itertools.takewhile(lambda row: "\\x" not in row[1], zip(shown["text_offset"], shown["tokens"]))
        whole = list(places)
        assert whole and all(choice["text"][at:].startswith(token) for at, token in whole)
    again = ask(server, COMPLETE, wish)[1]["choices"]
    assert [choice["text"] for choice in again] == [choice["text"] for choice in body["choices"]]


@pytest.mark.parametrize("path, extra", [
    (CHAT, HELLO),
    (CHAT, HELLO | {"n": 3, "logprobs": True, "top_logprobs": 2}),
    (COMPLETE, {"prompt": "Once", "max_tokens": 9, "logprobs": 1}),
])
def test_streamed_is_not_streamed(server, path, extra):
    """And the form of the chunks."""
    wish = extra | {"seed": 7, "temperature": 0.9, "stop": ["zz"]}
    _, whole, _ = ask(server, path, wish)
    *chunks, last = stream(server, path, wish | {"stream_options": {"include_usage": True}})
    assert last["choices"] == [] and all(chunk["usage"] is None for chunk in chunks)
    details, used = last["usage"].pop("prompt_tokens_details"), whole["usage"]
    assert 0 <= details["cached_tokens"] < last["usage"]["prompt_tokens"]  # once, not for each of n
    assert last["usage"] == {key: value for key, value in used.items() if "details" not in key}
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in [*chunks, last]}) == 1
    assert re.fullmatch("(chat)?cmpl-[0-9a-f]{24}", last["id"])
    for choice in whole["choices"]:
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        assert [part["finish_reason"] for part in own if part["finish_reason"]] == [choice["finish_reason"]]
        assert own[-1]["finish_reason"]
        if path == COMPLETE:
            assert "".join(part["text"] for part in own) == choice["text"]
            offsets = sum((part["logprobs"]["text_offset"] for part in own), [])
            assert offsets == choice["logprobs"]["text_offset"]
            continue
        assert own[0]["delta"]["role"] == "assistant" and not any("role" in part["delta"] for part in own[1:])
        assert "".join(part["delta"].get("content", "") for part in own) == choice["message"]["content"]
        if "logprobs" in extra:
            streamed = sum((part["logprobs"]["content"] for part in own), [])
            told = choice["logprobs"]["content"]
            assert [row["bytes"] for row in streamed] == [row["bytes"] for row in told] != []
            assert [row["logprob"] for row in streamed] == pytest.approx([row["logprob"] for row in told], abs=1e-4)
    assert "usage" not in stream(server, path, wish)[-1]


def test_streams_are_read_line_by_line():
    """Some clients take U+2028, U+2029 and U+0085 for the end of a line."""
    words = "a\u2028b\u2029c\x85d"
    server = serving(scripted(raw_bytes(words), 4))
    _, content, _ = ask(server, COMPLETE, {"prompt": ids(4), "stream": True, "temperature": 0, "max_tokens": 20})
    chunks = [json.loads(line[6:]) for line in content.splitlines() if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == words
    close(server)


def test_logprobs_of_impossible_tokens_are_json():
    """A model that gives -inf: JSON knows no infinity."""
    model = scripted(raw_bytes("ab"), 4)
    model.output = torch.nn.Threshold(0.5, -math.inf)
    server = serving(model)
    wish = {"prompt": ids(4), "logprobs": 2, "temperature": 0, "max_tokens": 2}
    status, body, _ = ask(server, COMPLETE, wish)
    assert status == 200 and sorted(body["choices"][0]["logprobs"]["top_logprobs"][0].values()) == [-9999.0, 0.0]
    close(server)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory) -> Served:
    """A random model with a byte-level tokenizer, whose answers end at <|im_end|>."""
    folder = tmp_path_factory.mktemp("bytes")
    (folder / "story.txt").write_text("Once there was a fox. 从前有一只狐狸。" * 20, "utf-8")
    text.main(["train", str(folder / "story.txt"), str(folder), "--vocab_size", "300"])
    MODEL.save_pretrained(folder)
    return serve.open_served(serve.parse([str(folder), "--template", "chatml"]))


def test_special_tokens_end_answers_and_never_show(byte_level):
    """Bytes of one character, a special token that ends nothing, one that ends the answer."""
    tokenizer = byte_level.tokenizer
    first, end = tokenizer.bos_id, tokenizer.special("<|im_end|>")
    words = [byte for char in "a狐🦊" for byte in tokenizer.encode(char, bos=False)]
    assert end in byte_level.model.stops() and len(words) > 3
    model = scripted([*words[:2], first, *words[2:], end, 5], 4)
    model.stop_at(byte_level.model.stops())
    one = job(ids(4), byte_level._replace(model=model), chat=True, stream=True, logprobs=1, max_tokens=30)
    finish(engine_of(model), one)
    got = events(one)
    assert [event.text for event in got if event.text] == ["a", "狐", "🦊"] and got[-1].finish == "stop"
    rows = [row for event in got for _, row in event.tokens]
    assert b"".join(bytes(row["bytes"]) for row in rows).decode() == "a狐🦊"
    assert {row["token"] for row in rows if not row["bytes"]} == {tokenizer.piece(first)}


def test_markers_are_ids_in_a_prompt_and_text_in_a_message(byte_level):
    end = byte_level.tokenizer.special("<|im_end|>")
    said = "fox<|im_end|>"
    completion = serve.read_request({"prompt": said}, False, byte_level)
    chat = serve.read_request({"messages": [{"role": "user", "content": said}]}, True, byte_level)
    asked = serve.read_request({"messages": [{"role": "user", "content": "fox"}]}, True, byte_level)
    assert completion.prompts[0][-1] == end
    assert chat.prompts[0].count(end) == asked.prompts[0].count(end)
    assert "fox<|im_end|>" in "".join(map(byte_level.tokenizer.piece, chat.prompts[0])).replace("Ġ", " ")


def test_smollm2_answers_as_transformers_does(smollm2, monkeypatch):
    """A real chat model, over HTTP: prompt, answer and end of transformers, by both endpoints, streamed too. A prompt
    of no token, which a tokenizer without BOS makes of no text, is refused."""
    served = serve.open_served(serve.parse([str(smollm2 / "hf")]))
    server = Server(Engine(served, 2), serve.parse(["--benchmark"]))
    start(server.engine)
    accept(server)
    with quantize.packed(served.model):
        for chat in json.loads((REAL.parent / "smollm2" / "chats.json").read_text()):
            said = chat["answer"].removesuffix("<|im_end|>")
            wish = {"messages": chat["messages"], "temperature": 0}
            _, body, _ = ask(server, CHAT, wish)
            choice = body["choices"][0]
            assert choice["message"]["content"] == said and choice["finish_reason"] == "stop"
            used = body["usage"]
            counts = used["prompt_tokens"], used["completion_tokens"]
            assert counts == (len(chat["ids"]), len(chat["greedy"]))
            pieces = [chunk["choices"][0]["delta"]["content"] for chunk in stream(server, CHAT, wish)]
            assert "".join(pieces) == said and len(pieces) > 1
            _, body, _ = ask(server, COMPLETE, {"prompt": chat["prompt"], "temperature": 0, "max_tokens": 60})
            assert body["choices"][0]["text"] == said and body["usage"]["prompt_tokens"] == counts[0]
    assert ask(server, COMPLETE, {"prompt": ""})[1]["error"]["param"] == "prompt"
    close(server)


def test_clients_at_once_get_their_own_answers(server):
    """8 clients, five rounds."""
    questions = [f"Tell me the secret of client {i}: {'xyz'[i % 3] * i}" for i in range(8)]
    bodies = [{"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 15}
              for question in questions]
    alone = [ask(server, CHAT, body)[1]["choices"][0]["message"]["content"] for body in bodies]
    answers = [[None] * 5 for _ in bodies]

    def client(i: int) -> None:
        for turn in range(5):
            answers[i][turn] = ask(server, CHAT, bodies[i])[1]["choices"][0]["message"]["content"]
    clients = [threading.Thread(target=client, args=(i,)) for i in range(8)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    assert answers == [[answer] * 5 for answer in alone] and len(set(alone)) == 8


def test_prompt_and_max_tokens_share_the_context(server):
    """What does not fit is refused, the same on both endpoints, streamed or not, with the three numbers; what just fits
    works, and the default never asks for too much."""
    prompt = ids(200)
    for extra in ({}, {"stream": True}):
        status, body, _ = ask(server, COMPLETE, {"prompt": prompt, "max_tokens": 57} | extra)
        assert status == 400 and all(number in body["error"]["message"] for number in ("200", "57", "256"))
        assert body["error"]["code"] == "context_length_exceeded"
    whole = ask(server, COMPLETE, {"prompt": prompt, "max_tokens": 56, "ignore_eos": True})[1]
    assert whole["usage"]["total_tokens"] == 256
    assert ask(server, COMPLETE, {"prompt": ids(250), "ignore_eos": True})[1]["usage"]["completion_tokens"] == 6
    long = [{"role": "user", "content": "fox " * 90}]
    room = 256 - len(text.encode_prompt(long, TOKENIZER, ALPACA))
    assert ask(server, CHAT, {"messages": long, "max_tokens": room + 1})[0] == 400
    assert ask(server, CHAT, {"messages": long, "ignore_eos": True})[1]["usage"]["completion_tokens"] == room


def test_models_and_metrics(server):
    status, body, _ = ask(server, "/v1/models")
    assert status == 200 and body["data"][0]["id"] == "tiny" and ask(server, "/v1/models/tiny")[1] == body["data"][0]
    assert ask(server, "/v1/models/other")[0] == 404 and ask(server, "/v1/models/t%69ny")[0] == 200
    status, told, headers = ask(server, "/metrics")
    assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
    for line in told.splitlines():
        assert re.fullmatch(r"# (HELP|TYPE) octet_\w+ .+|octet_\w+ \d+(\.\d+)?(e-?\d+)?", line), line
    assert "# TYPE octet_waiting gauge" in told and "# TYPE octet_steps_total counter" in told
    status, health, _ = ask(server, "/health")
    assert status == 200 and set(health) == {"status", "slots", "used", "waiting"}
    head = raw_request(server, b"HEAD /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert status_of(head) == 200 and head.endswith(b"\r\n\r\n")


def test_200_connections_at_once():
    """The listen queue is long enough: all connect before any is accepted, and all get an answer, or 429 with
    Retry-After."""
    server = serving(max_waiting=100, listen=False)
    clients = [connect(server) for _ in range(200)]
    for client in clients:
        client.timeout = 2.0
        client.connect()
        client.sock.settimeout(20.0)
    accept(server)
    for client in clients:
        post(client, COMPLETE, {"prompt": "Once", "max_tokens": 2})
    answers = [client.getresponse() for client in clients]
    assert set(Counter(answer.status for answer in answers)) <= {200, 429}
    assert all(answer.getheader("Retry-After") for answer in answers if answer.status == 429)
    for client in clients:
        client.close()
    until(lambda: not server.engine.running)
    assert ask(server, CHAT, HELLO)[0] == 200
    close(server)


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_leaves_over_http(streamed):
    """The step counter stops, the next request starts at once."""
    server = serving(rows=1)
    engine, body = server.engine, {"prompt": "Once", "max_tokens": 250, "ignore_eos": True, "temperature": 0}
    pace = Paced(engine, 3)  # 3 steps, then the engine waits for the client to be gone
    client = connect(server)
    post(client, COMPLETE, body | {"stream": streamed})
    if streamed:
        response = client.getresponse()
        assert response.readline().startswith(b"data: ")
        response.close()
    until(lambda: engine.counters["steps"] == 3)
    client.close()
    until(lambda: not server.requests)
    pace.go_on()
    until(lambda: not engine.running)
    assert engine.counters["steps"] <= 5 and engine.counters["left"] == 1
    assert ask(server, CHAT, HELLO)[0] == 200
    close(server)


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_closes_its_sending_half_gets_its_answer(server, streamed):
    """As `printf ... | nc -N` does: it has sent all it will."""
    body = json.dumps({"prompt": "Once", "max_tokens": 30, "ignore_eos": True, "stream": streamed}).encode()
    with socket.create_connection(server.server_address, timeout=20) as client:
        client.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        client.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    assert status_of(answer) == 200 and (answer.endswith(b"[DONE]\n\n") or b'"completion_tokens": 30' in answer)


def test_an_error_in_the_middle_of_a_stream_is_an_event():
    words = pieces_of("Once there was a fox.")
    server = serving(scripted([*words[:3], None], 4))
    pace, client = Paced(server.engine, 3), connect(server)
    post(client, COMPLETE, {"prompt": ids(4), "stream": True, "temperature": 0})
    response = client.getresponse()
    assert response.status == 200 and response.readline().startswith(b"data: ")
    pace.go_on()
    *_, error, done, _ = response.read().decode().split("\n\n")
    client.close()
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "non_finite_logits" and done == "data: [DONE]"
    status, body, _ = ask(server, COMPLETE, {"prompt": ids(4), "temperature": 0})
    assert status == 500 and body["error"]["code"] == "non_finite_logits"
    assert ask(server, COMPLETE, {"prompt": ids(4), "temperature": 0, "max_tokens": 2})[0] == 200
    close(server)


def test_a_fault_of_ours_frees_the_row_and_closes_nothing_else(monkeypatch, capfd):
    server = serving(rows=1)
    monkeypatch.setattr(serve, "form", lambda *_: 1 / 0)
    wish = {"prompt": "Once", "max_tokens": 250, "ignore_eos": True, "stream": True}
    status, body, _ = ask(server, COMPLETE, wish)
    assert status == 500 and body["error"]["type"] == "server_error"
    until(lambda: not server.engine.running)
    assert server.engine.counters["completion_tokens"] < 250 and "ZeroDivisionError" in capfd.readouterr().err
    assert ask(server, "/health")[0] == 200
    close(server)


def test_draining_refuses_new_work():
    server = serving(rows=1)
    engine, pace, got = server.engine, Paced(server.engine, 2), []
    wish = {"prompt": "Once", "max_tokens": 20, "ignore_eos": True}
    client = threading.Thread(target=lambda: got.append(ask(server, COMPLETE, wish)))
    client.start()
    until(lambda: engine.counters["steps"] == 2)
    engine.stop(20.0)
    status, body, headers = ask(server, CHAT, HELLO)
    assert status == 503 and headers["Retry-After"] and ask(server, "/health")[0] == 503
    pace.go_on()
    client.join()
    assert got[0][0] == 200
    server.finish(5.0)


# ---- curves and page ------------------------------------------------------------------------------------------------

def write_run(folder: Path, name: str = "ppo", rows: int = 5) -> None:
    (folder / name).mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"step": i, "loss": 1 / i, "objective/scores": i / 2, "objective/kl": i / 10,
                         "grad_norm": None, "note": "x"}) for i in range(1, rows + 1)]
    (folder / name / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 6, "lo')
    summary = {"gold_before": 0.4, "gold_after": 0.9, "flags": {"api_key": "secret"}}
    (folder / name / "summary.json").write_text(json.dumps(summary))


def test_curves(tmp_path):
    write_run(tmp_path)
    run, = serve.read_curves(tmp_path)
    assert run["name"] == "ppo" and run["gold_before"] == 0.4 and run["gold_after"] == 0.9 and "flags" not in run
    assert set(run["curves"]) == {"loss", "objective/scores", "objective/kl"}
    assert run["curves"]["loss"] == [[i, 1 / i] for i in range(1, 6)]
    write_run(tmp_path, "long", 4000)
    run = serve.read_curves(tmp_path)[0]
    assert 300 < len(run["curves"]["loss"]) < 900 and run["curves"]["loss"][-1][0] == 4000
    outside = tmp_path.parent / "outside.jsonl"
    outside.write_text('{"step": 1, "loss": 2}\n')
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "metrics.jsonl").symlink_to(outside)
    assert [run["name"] for run in serve.read_curves(tmp_path)] == ["long", "ppo"]


SWEEP = {"rungs": [{"kl_coef": 0.4, "kl": 2.0, "proxy": 1.0, "gold": 0.6}, {"kl_coef": 0, "kl": 9.0, "proxy": 3.0,
                                                                             "gold": 0.3}],
         "best_of": [{"n": 1, "kl": 0.0, "proxy": 0.0, "gold": 0.5}, {"n": 2, "kl": 0.19, "proxy": 0.5, "gold": 0.6}]}


def write_sweep(folder: Path, name: str = "sweep") -> None:
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "sweep.json").write_text(json.dumps(SWEEP))


def test_sweeps(tmp_path):
    """One that is being written by another program, or that lies elsewhere, is none."""
    outside = tmp_path.parent / "elsewhere"
    write_sweep(outside, "")
    for name in ("a", "b", "c"):
        write_sweep(tmp_path, name)
    (tmp_path / "b" / "sweep.json").write_text('{"rungs": [')
    (tmp_path / "c" / "sweep.json").unlink()
    (tmp_path / "c" / "sweep.json").symlink_to(outside / "sweep.json")
    assert serve.read_sweeps(tmp_path) == [SWEEP | {"name": "a"}]


def test_curves_over_http(server):
    assert ask(server, "/runs")[1] == {"runs": [], "sweeps": []}
    write_run(server.args.runs)
    write_sweep(server.args.runs)
    status, body, _ = ask(server, "/runs")
    assert status == 200 and body["runs"][0]["name"] == "ppo" and body["sweeps"][0]["name"] == "sweep"
    for name in ("ppo", "sweep"):
        shutil.rmtree(server.args.runs / name)


def test_the_page_is_one_file_and_never_makes_markup_of_text(server):
    """Nothing in it turns text into markup or fetches anything from elsewhere."""
    status, page, _ = ask(server, "/")
    markup = (r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|createContextualFragment|srcdoc"
              r"|eval\(|new Function")
    assert status == 200 and not re.search(markup, page)
    assert not re.search(r"""(src|href)=["']?(https?:)?//|@import|url\(""", page)
    addresses = set(re.findall(r"https?://[^\"'` ]+", page))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, which nobody fetches
    body = re.sub(r"<script>.*</script>|<style>.*</style>", "", page, flags=re.DOTALL)
    assert not re.search(r"<[^>]*\son\w+=", body)  # no handler in an attribute
    assert all(len(line) <= 120 for line in page.splitlines())


class Browser:
    """A headless Chromium and one page of it, driven over its DevTools protocol: JSON over a websocket (RFC 6455)."""

    def __init__(self, binary: str, folder: Path, url: str):
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                 "--remote-debugging-port=0", f"--user-data-dir={folder}"]
        self.process = subprocess.Popen([binary, *flags, "about:blank"], stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL)
        port_file = folder / "DevToolsActivePort"
        until(lambda: port_file.exists() and port_file.read_text().count("\n"), 60)
        port = int(port_file.read_text().split()[0])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("PUT", "/json/new?" + url)
        target = json.loads(connection.getresponse().read())
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        path = target["webSocketDebuggerUrl"].partition(str(port))[2]
        key = base64.b64encode(os.urandom(16)).decode()
        head = [f"GET {path} HTTP/1.1", f"Host: 127.0.0.1:{port}", "Upgrade: websocket", "Connection: Upgrade",
                "Sec-WebSocket-Version: 13", f"Sec-WebSocket-Key: {key}", "", ""]
        self.socket.sendall("\r\n".join(head).encode())
        self.file, self.count = self.socket.makefile("rb"), 0
        while self.file.readline().strip():
            pass

    def call(self, method: str, **params) -> dict:
        self.count += 1
        payload = json.dumps({"id": self.count, "method": method, "params": params}).encode()
        mask = os.urandom(4)
        size = len(payload)
        length = bytes([0x80 | size]) if size < 126 else struct.pack("!BH", 0x80 | 126, size)
        masked = bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))
        self.socket.sendall(b"\x81" + length + mask + masked)
        while True:
            answer = json.loads(self.message())
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]

    def message(self) -> bytes:
        whole = b""
        while True:
            first, size = self.file.read(2)
            if size > 125:
                size, = struct.unpack("!H" if size == 126 else "!Q", self.file.read(2 if size == 126 else 8))
            whole += self.file.read(size)
            if first & 0x80:
                return whole

    def run(self, script: str) -> object:
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def key(self, key: str, code: str, number: int, modifiers: int = 0) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=code, windowsVirtualKeyCode=number,
                      modifiers=modifiers)

    def write(self, words: str) -> None:
        self.call("Input.insertText", text=words)
        self.key("Enter", "Enter", 13)

    def close(self) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait(20)


def test_the_page_in_a_real_browser(tmp_path):
    """Chat, stop and turns by keyboard; text that looks like markup; curves that grow while a run goes on."""
    names = ("chromium", "chromium-browser", "google-chrome")
    binary = next(filter(None, map(shutil.which, names)), None)
    if binary is None:
        pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    evil = '<img src=x onerror="document.title=1">'
    messages = [{"role": "user", "content": "Hi"}]
    begin = len(text.encode_prompt(messages, TOKENIZER, ALPACA))
    server = serving(scripted(raw_bytes(evil), begin), "--runs", str(tmp_path / "out"), rows=2)
    engine = server.engine
    browser = Browser(binary, tmp_path / "profile", server.url)
    run = browser.run
    try:
        ready = "document.activeElement?.id === 'box' && document.querySelector('#model').textContent === 'tiny'"
        until(lambda: run(ready), 60)
        browser.write("Hi")
        until(lambda: run("document.querySelectorAll('#log .note').length === 1"))
        assert run("document.querySelector('#log .assistant').textContent") == evil
        assert run("document.images.length") == 0 and run("document.title") == "Octet"
        assert run("messages.map(m => m.role + ':' + m.content)") == ["user:Hi", "assistant:" + evil]

        # a second turn carries the first; Esc stops it, and frees the row
        fox = pieces_of("fox")[-1]
        engine.model.hidden = lambda tokens, cache, start: F.one_hot(torch.full(tokens.shape, fox), 1280).float() * 9
        pace = Paced(engine, 3)
        browser.write("More")
        until(lambda: run("document.querySelectorAll('#log .assistant')[1]?.textContent.length >= 3"))
        turns = [*messages, {"role": "assistant", "content": evil}, {"role": "user", "content": "More"}]
        assert engine.running[0].prompt == text.encode_prompt(turns, TOKENIZER, ALPACA)
        assert run("document.querySelector('#send').textContent") == "Stop"
        browser.key("Escape", "Escape", 27)
        until(lambda: run("document.querySelector('#send').textContent") == "Send")
        assert "stopped" in run("document.querySelector('#log').lastChild.textContent")
        until(lambda: not server.requests)
        pace.go_on()
        until(lambda: not engine.running)
        assert engine.counters["left"] == 1

        # temperature and length reach the server; an error is text too
        run("document.querySelector('#length').value = 100000")
        browser.write("<b>x</b>")
        until(lambda: run("document.querySelector('#log .error') !== null"))
        assert "max_tokens is 100000" in run("document.querySelector('#log .error').textContent")
        assert run("document.querySelector('#box').value") == "<b>x</b>"
        assert run("document.querySelectorAll('#log b').length") == 0

        # training: by keyboard, drawn, growing
        write_run(server.args.runs, "<b>ppo</b>".replace("/", "_"))
        browser.key("t", "KeyT", 84, modifiers=1)
        until(lambda: run("document.querySelectorAll('#training figure').length") == 3)
        told = run("[...document.querySelectorAll('#training svg')].map(s => s.getAttribute('aria-label'))")
        assert told[0].startswith("Reward and gold score: score from 0.5 to 2.5, gold from 0.4 to 0.9, over 5 steps")
        assert "nats from 0.1 to 0.5" in told[1]
        assert run("document.querySelector('#training h2').firstChild.textContent") == "<b>ppo<_b>"
        line = "document.querySelectorAll('#training polyline')[0].getAttribute('points')"
        points = run(line).split()
        assert len(points) == 5 and len({tuple(map(float, point.split(","))) for point in points}) == 5
        write_run(server.args.runs, "<b>ppo<_b>", 9)
        run("draw()")
        until(lambda: run(line).count(",") == 9)
        # a sweep: gold and proxy of two runs and of two best-of-n, at the square root of the KL
        write_sweep(server.args.runs, "<b>sweep<_b>")
        run("draw()")
        until(lambda: run("document.querySelectorAll('.sweep circle').length") == 8)
        told = run("document.querySelector('.sweep svg').getAttribute('aria-label')")
        assert "gold of the runs from 0.6 to 0.3 at 9 nats" in told and "proxy of best-of-n from 0 to 0.5" in told
        at = run("[...document.querySelectorAll('.sweep circle:not(.open).k2')].map(c => Number(c.getAttribute('cx')))")
        assert (at[1] - 48) / (at[0] - 48) == pytest.approx(math.sqrt(9 / 2))
        assert run("document.querySelectorAll('#training b b, #training h2 b').length") == 0
        browser.key("c", "KeyC", 67, modifiers=1)
        assert run("document.activeElement.id") == "box"
        assert run("document.querySelector('#training').hidden") is True
        # a phone: nothing is wider than the screen
        browser.call("Emulation.setDeviceMetricsOverride", width=360, height=640, deviceScaleFactor=2, mobile=True)
        for name in ("chat", "training"):
            run(f"view('{name}')")
            assert run("document.documentElement.scrollWidth") <= 360
        assert run("performance.getEntriesByType('resource').every(r => r.name.startsWith(location.origin))")
    finally:
        browser.close()
        close(server)


# ---- command line ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    MODEL.save_pretrained(folder)
    TOKENIZER.save(folder, "alpaca")
    return folder


def serve_into(file: Path, flags: tuple[str, ...]) -> None:
    output = os.open(file, os.O_CREAT | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    serve.main([*flags, "--http_port", "0"])


def started(file: Path, *flags: str) -> tuple[multiprocessing.Process, http.client.HTTPConnection]:
    """A server in a process of its own, which writes into a file, and a client of it."""
    process = FORKS.Process(target=serve_into, args=(file, flags))
    process.start()
    told = lambda: re.search(r"http://127\.0\.0\.1:(\d+)/v1", file.read_text() if file.exists() else "")
    until(lambda: told() or not process.is_alive(), 60)
    return process, http.client.HTTPConnection("127.0.0.1", int(told()[1]), timeout=30)


def test_sigterm_finishes_what_runs_and_refuses_the_rest(directory, tmp_path):
    process, client = started(tmp_path / "told", str(directory), "--max_batch", "1")
    wish = {"prompt": "Once", "max_tokens": 240, "ignore_eos": True, "stream": True}
    post(client, COMPLETE, wish | {"stream_options": {"include_usage": True}})
    response = client.getresponse()
    response.readline()
    process.terminate()
    until(lambda: "finishing" in (tmp_path / "told").read_text())
    rest = response.read().decode()
    assert rest.endswith("data: [DONE]\n\n") and '"completion_tokens": 240' in rest
    process.join(30)
    told = (tmp_path / "told").read_text()
    assert process.exitcode == 0 and "finished" in told and "Traceback" not in told
    c = MODEL.config
    size = 2 * 4 * c.n_layers * c.n_kv_heads * c.head_dim * c.max_seq_len / 1e9  # keys and values in fp32, of one row
    assert f"1 slots x {c.max_seq_len} tokens, cache up to {size:.2f} GB" in told


def test_a_second_signal_ends_at_once(directory, tmp_path):
    process, client = started(tmp_path / "told", str(directory))
    post(client, COMPLETE, {"prompt": "Once", "max_tokens": 250, "n": 32, "ignore_eos": True, "stream": True})
    client.getresponse().readline()
    os.kill(process.pid, signal.SIGINT)
    until(lambda: "finishing" in (tmp_path / "told").read_text())
    os.kill(process.pid, signal.SIGINT)
    process.join(10)
    assert process.exitcode == 130 and "finished" not in (tmp_path / "told").read_text()
    client.close()


def test_an_engine_that_is_interrupted_lets_nobody_wait():
    engine, one = engine_of(rows=1), job(ids(4))
    engine.submit(one)
    engine.submit(job(ids(4)))
    engine.step = lambda: signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        engine.run()
    assert events(one)[-1].status == 503
    with pytest.raises(Refusal, match="shutting down"):
        engine.submit(job(ids(4)))


def test_ctrl_c_while_loading_ends_at_once(monkeypatch):
    """The model is opened by the main thread, the one that signals reach, so no other thread is left computing."""
    def open_model(*arguments, **more):
        assert threading.current_thread() is threading.main_thread()
        raise KeyboardInterrupt
    monkeypatch.setattr(serve, "random_model", open_model)
    with pytest.raises(KeyboardInterrupt):
        serve.main(["tiny", "--benchmark"])


def test_say_answers_once(directory, capsys):
    serve.main([str(directory), "--say", "Write a story.", "--max_len", "60"])
    prompt = text.encode_prompt([{"role": "user", "content": "Write a story."}], TOKENIZER, ALPACA)
    shown = capsys.readouterr().out
    assert shown.endswith("\n") and "flags" not in shown and len(TOKENIZER.encode(shown)) > 3
    assert len(prompt) < 60


def test_adapters(directory, tmp_path):
    model = Llama.from_pretrained(directory)
    lora.attach(model, 4, generator=torch.Generator().manual_seed(1))
    for layer in lora.adapters(model).values():
        layer.lora_B.data.normal_(std=0.3, generator=torch.Generator().manual_seed(2))
    lora.save_adapter(model, tmp_path / "adapter", str(directory))
    served = serve.open_served(serve.parse([str(tmp_path / "adapter")]))
    assert served.template is ALPACA and served.name == "adapter" and served.tokenizer.vocab_size == 1280
    assert not lora.adapters(served.model)
    prompt = ids(9)
    made = finish(Engine(served, 2), job(prompt))[0]
    assert made == model.eval().generate([prompt], 12, temperature=0)[0]
    assert made != MODEL.generate([prompt], 12, temperature=0)[0]
    assert finish(engine_of(model, 2), job(prompt))[0] == made  # adapters that stay beside their base


@pytest.mark.parametrize("quant", ["8bit", "4bit"])
def test_quantized(directory, quant):
    """Rounded at load, alone and in company: as generate of the same weights dequantized, up to a token where the two
    choices were closer than 0.3 of the logits' deviation (kernels round their inputs by how many rows there are)."""
    model = quantize.open_model(directory, torch.float32, "cpu", quant=quant).eval()
    slow = quantize.open_model(directory, torch.float32, "cpu", quant=quant).eval()
    prompts = [ids(n) for n in (5, 40, 11, 23)]
    expected, same = slow.generate(prompts, 12, temperature=0), 0
    with quantize.packed(model):
        alone = [finish(engine_of(model), job(prompt))[0] for prompt in prompts]
        together = finish(engine_of(model), *map(job, prompts))
    for got in (alone, together):
        for prompt, a, b in zip(prompts, got, expected):
            at = common(a, b)
            same += at
            if at < min(len(a), len(b)):
                with torch.no_grad():
                    logits = slow(torch.tensor([prompt + b[:at]]))[0, -1]
                assert (logits[b[at]] - logits[a[at]]) / logits.std() < 0.3
    assert same > 24 and expected != MODEL.generate(prompts, 12, temperature=0)


def test_every_flag_is_read():
    source = Path(serve.__file__).read_text("utf-8")
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    flags = [call.args[0].value.removeprefix("--") for call in calls if getattr(call.func, "id", "") == "flag"]
    passed = source.replace('"--', "")
    assert len(flags) > 15
    assert all(re.search(rf"args\.{flag}\b", source) or f'"{flag}"' in passed for flag in flags)


# ---- benchmark ------------------------------------------------------------------------------------------------------

def test_benchmark_counts_new_tokens_alone(monkeypatch):
    """Prefill 10 ms, then 1 ms a token, by a clock of the test's."""
    now = [0.0]
    monkeypatch.setattr(serve.time, "perf_counter", lambda: now[0])

    def one(prompt: list[int]) -> dict:
        now[0] += 0.010 + 0.001 * 99
        return {"first": 0.010, "last": 0.109, "tokens": 100}
    row = serve.measure(one, [ids(32)] * 6, 1)
    assert row["first_token_ms_p50"] == pytest.approx(10) and row["tokens_per_second_each_p50"] == pytest.approx(1000)
    assert row["tokens_per_second"] == pytest.approx(100 / 0.109)
    assert (row["prompt_tokens"], row["new_tokens"], row["requests"], row["concurrency"]) == (32, 100, 6, 1)


def test_benchmark_quantiles(monkeypatch):
    """The value that a share of the requests does not exceed."""
    def row_of(values: list[float]) -> dict:
        left = iter(values)
        one = lambda prompt: {"first": next(left) / 1e3, "last": 1.0, "tokens": 2}
        return serve.measure(one, [[1]] * len(values), 1)
    assert row_of([3.0, 1.0, 2.0, 4.0])["first_token_ms_p50"] == pytest.approx(2.0)
    assert row_of(list(range(1, 101)))["first_token_ms_p95"] == pytest.approx(95)
    assert row_of([1.0])["first_token_ms_p50"] == row_of([1.0])["first_token_ms_p95"] == pytest.approx(1.0)


BENCHMARK = ["--benchmark", "--prompt_tokens", "24", "--new_tokens", "6", "--rounds", "2"]


def test_benchmark_over_http(directory, tmp_path, monkeypatch):
    monkeypatch.setattr(serve.multiprocessing, "get_context", lambda _: FORKS)  # a spawned process imports torch anew
    flags = [*BENCHMARK, "--concurrency", "1,3", "--max_batch", "4", "--json", str(tmp_path / "b.json")]
    summary = serve.main([str(directory), *flags])
    assert summary["prefix_tokens_reused"] < 8  # of 14 prompts of 24: each is read, none was asked before
    assert json.loads((tmp_path / "b.json").read_text()) == json.loads(json.dumps(summary))
    names = ("concurrency", "requests", "new_tokens", "prompt_tokens")
    assert [tuple(row[name] for name in names) for row in summary["rows"]] == [(1, 2, 6, 24), (3, 6, 6, 24)]
    assert {"dtype", "threads", "slots", "peak_memory_bytes"} <= set(summary)


def test_benchmark_of_a_url(server, tmp_path, capsys):
    """Any server with this interface; one that refuses is quoted."""
    flags = [*BENCHMARK, "--concurrency", "2", "--json", str(tmp_path / "b.json")]
    summary = serve.main([server.url, *flags])
    assert summary["url"] == server.url and summary["rows"][0]["requests"] == 4
    head, row = capsys.readouterr().out.splitlines()[-3:-1]
    assert "5 %" in head and row.split()[:2] == ["2", "4"]
    with pytest.raises(ValueError, match="together more than the model's context"):
        serve.main([server.url, *flags, "--new_tokens", "1000"])


# ---- refusals -------------------------------------------------------------------------------------------------------

def user(content: object) -> dict:
    return {"messages": [{"role": "user", "content": content}]}


TURN = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize("path, change, param", [
    (CHAT, {"temperature": "0.7"}, "temperature"),
    (CHAT, {"temperature": 10}, "temperature"),
    (CHAT, {"temperature": -1}, "temperature"),
    (CHAT, {"temperature": True}, "temperature"),
    (CHAT, {"top_p": 0}, "top_p"),
    (CHAT, {"top_p": 1.5}, "top_p"),
    (CHAT, {"n": 0}, "n"),
    (CHAT, {"n": 33}, "n"),
    (CHAT, {"n": 1.0}, "n"),
    (CHAT, {"max_tokens": 0}, "max_tokens"),
    (CHAT, {"max_tokens": -1}, "max_tokens"),
    (CHAT, {"max_tokens": "5"}, "max_tokens"),
    (CHAT, {"max_completion_tokens": 1000}, "max_completion_tokens"),
    (CHAT, {"seed": 1.5}, "seed"),
    (CHAT, {"stop": ""}, "stop"),
    (CHAT, {"stop": [1]}, "stop"),
    (CHAT, {"stop": ["a"] * 17}, "stop"),
    (CHAT, {"stop": ["a" * 1001]}, "stop"),
    (CHAT, {"presence_penalty": 2.1}, "presence_penalty"),
    (CHAT, {"stream": 1}, "stream"),
    (CHAT, {"stream": "yes"}, "stream"),
    (CHAT, {"stream_options": []}, "stream_options"),
    (CHAT, {"stream_options": {"include_everything": True}}, "stream_options"),
    (CHAT, {"logprobs": 3}, "logprobs"),
    (CHAT, {"top_logprobs": 2}, "top_logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"tools": [{"type": "function"}]}, "tools"),
    (CHAT, {"temprature": 1}, "temprature"),
    (CHAT, {"prompt": "Hi"}, "prompt"),
    (CHAT, {"user": 5}, "user"),
    (CHAT, {"response_format": {"type": "json_object"}}, "response_format"),
    (CHAT, {"messages": None}, "messages"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": [TURN] * 513}, "messages"),
    (CHAT, {"messages": ["Hi"]}, "messages[0]"),
    (CHAT, {"messages": [TURN | {"tool_call_id": "x"}]}, "messages[0]"),
    (CHAT, {"messages": [{"role": "tool", "content": "Hi"}]}, "messages[0].role"),
    (CHAT, user(5), "messages[0].content"),
    (CHAT, user([{"type": "image_url"}]), "messages[0].content[0]"),
    (CHAT, user(" "), "messages"),
    (CHAT, {"messages": [{"role": "assistant", "content": "Hi"}]}, "messages"),
    (CHAT, {"messages": [TURN, {"role": "user", "content": "Ho"}]}, "messages"),
    (CHAT, user("fox " * 300) | {"max_tokens": None}, "messages"),
    (CHAT, user("fox " * 30000), "messages"),
    (CHAT, {"model": "gpt-4"}, "model"),
    (CHAT, {"model": 5}, "model"),
    (COMPLETE, {}, "prompt"),
    (COMPLETE, {"prompt": []}, "prompt"),
    (COMPLETE, {"prompt": [1280]}, "prompt"),
    (COMPLETE, {"prompt": [-1]}, "prompt"),
    (COMPLETE, {"prompt": [True]}, "prompt"),
    (COMPLETE, {"prompt": [[]]}, "prompt"),
    (COMPLETE, {"prompt": ["a", 1]}, "prompt"),
    (COMPLETE, {"prompt": ["a"] * 33}, "prompt"),
    (COMPLETE, {"prompt": ["a"] * 20, "n": 2}, "n"),
    (COMPLETE, {"prompt": "a", "logprobs": 6}, "logprobs"),
    (COMPLETE, {"prompt": "a", "echo": True}, "echo"),
    (COMPLETE, {"prompt": "a", "best_of": 3}, "best_of"),
    (COMPLETE, {"prompt": "a", "messages": []}, "messages"),
], ids=lambda value: str(value)[:40])
def test_bad_values_are_refused_by_name(server, path, change, param):
    """Status 400 (404 for a model that is not here), OpenAI's form, the parameter's name; streamed or not."""
    for extra in ({}, {"stream": True}) if "stream" not in change else ({},):
        status, body, _ = ask(server, path, (HELLO if path == CHAT else {"max_tokens": 5}) | extra | change)
        assert status == (404 if param == "model" else 400), body
        assert set(body["error"]) == {"message", "type", "param", "code"} and body["error"]["param"] == param, body
        assert body["error"]["type"] == "invalid_request_error"
        name = param.partition("[")[0]
        assert name in body["error"]["message"] or body["error"]["code"] == "context_length_exceeded"
    assert not server.engine.running and not server.engine.waiting.qsize()


@pytest.mark.parametrize("raw", [
    b"{:", b"", b"null", b"[]", b"5", b'"x"', b"[" * 2**20, b'{"a":' * 10000, b"\xff\xfe",
    '{"messages": 1}'.encode("utf-16"), b'{"temperature": NaN}', b'{"prompt": "a", "temperature": Infinity}',
    b'{"seed": 1' + b"0" * 5000 + b"}", b'{"prompt": "\\ud83d"}',
], ids=lambda raw: repr(raw[:30]))
def test_broken_bodies(server, raw):
    """Half an emoji is legal JSON: as a prompt it is one unknown character."""
    status, body, _ = ask(server, COMPLETE, raw)
    assert status == 200 if b"ud83d" in raw else (400 <= status < 500 and body["error"]["message"])
    assert ask(server, "/health")[0] == 200


def test_nesting_of_every_depth(server):
    """Where Python just manages to read a value, it may not manage to print it."""
    for depth in range(850, 1010):
        status, body, _ = ask(server, COMPLETE, b'{"prompt": ' + b"[" * depth + b"]" * depth + b"}")
        assert status == 400 and body["error"]["message"], depth


def raw_request(server: Server, content: bytes, read: bool = True) -> bytes:
    with socket.create_connection(server.server_address, timeout=20) as client:
        try:
            client.sendall(content)
        except OSError:
            pass  # refused before all was sent
        answer = b""
        while read and (part := client.recv(65536)):
            answer += part
        return answer


def status_of(answer: bytes) -> int:
    return int(re.match(rb"HTTP/1\.1 (\d+) ", answer).group(1))


def post_head(path: str, length: int) -> bytes:
    return POST.replace(b"/v1/completions", path.encode()) + b"Content-Length: %d\r\n\r\n" % length


POST = (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Connection: close\r\n")


def get(path: bytes, *headers: bytes, method: bytes = b"GET", host: bytes = b"localhost") -> bytes:
    head = [b"%b %b HTTP/1.1" % (method, path), b"Host: " + host, *headers, b"Connection: close", b"", b""]
    return b"\r\n".join(head)


@pytest.mark.parametrize("content, status", [
    (b"nonsense\r\n\r\n", 400),
    (b"GET /\r\n\r\n", 403),
    (b"GET / HTTP/9.9\r\n\r\n", 505),
    (b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n", 403),
    (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", 400),
    (get(b"/health", host=b"evil.example"), 403),
    (get(b"/health", host=b"127.0.0.1.evil.example:80"), 403),
    (get(b"/health", host=b"[::1]:7070"), 200),
    (get(b"/health", host=b"127.0.0.1:7070"), 200),
    (b"GET /health HTTP/1.0\r\n\r\n", 200),
    (get(b"/health", b"Host: evil.example"), 403),
    (get(b"/health", b"Origin: https://evil.example"), 403),
    (get(b"/../../etc/passwd"), 404),
    (get(b"/", method=b"DELETE"), 405),
    (get(b"/v1/completions"), 405),
    (get(b"/v1/completions", method=b"OPTIONS"), 405),
    (get(b"/v1/completions", method=b"BREW"), 501),
    (b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 414),
    (get(b"/", *[b"A: b"] * 200), 431),
    (get(b"/", b"A: " + b"b" * 70000), 431),
    (POST + b"\r\n", 411),
    (POST + b"Content-Length: -5\r\n\r\n", 400),
    (POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}", 400),
    (POST + b"Content-Length: 1e3\r\n\r\n", 400),
    (POST + b"Content-Length: 99999999999999999999\r\n\r\n", 400),
    (POST + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n{}", 411),
    (POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", 411),
    (POST + b"Content-Length: 3000000\r\n\r\n" + b"[" * 3000000, 413),
    (POST.replace(b"application/json", b"text/plain") + b"Content-Length: 2\r\n\r\n{}", 415),
    (POST.replace(b"Content-Type: application/json\r\n", b"") + b"Content-Length: 2\r\n\r\n{}", 415),
    (POST + b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}", 415),
], ids=lambda value: repr(value[:60]) if isinstance(value, bytes) else str(value))
def test_requests_that_are_refused_as_a_whole(server, content, status):
    answer = raw_request(server, content)
    assert status_of(answer) == status, answer[:300]
    if status != 200:
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
    assert b"Access-Control" not in answer


def test_a_body_that_is_too_long_is_read_off(server):
    """Else the client meets a reset while it sends, and never gets to read why."""
    for _ in range(5):
        status, body, _ = ask(server, COMPLETE, b"[" * 3_000_000)
        assert status == 413 and "at most 1048576" in body["error"]["message"]


def test_a_client_that_asks_before_it_sends_its_body(server):
    """curl does, with longer ones: Expect: 100-continue."""
    body = json.dumps({"prompt": "Once", "max_tokens": 2}).encode()
    with socket.create_connection(server.server_address, timeout=20) as client:
        client.sendall(POST + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body))
        assert client.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(body)
        assert status_of(client.recv(1000)) == 200


def test_malformed_requests_never_break_the_server(server, capfd):
    """10,000 of random types, sizes and encodings: each gets an answer below 500, no traceback is printed, and
    afterwards the server is as before."""
    rng, seen = random.Random(0), Counter()

    def value(depth: int = 0) -> object:
        kinds = [None, True, False, 0, -1, 1.5, 1e308, 2**70, "", "x" * rng.randint(0, 300), "\ud83d\x00\n", "狐狸🦊",
                 [], {}, "stop", -0.0]
        if depth < 3 and rng.random() < 0.4:
            if rng.random() < 0.5:
                return [value(depth + 1) for _ in range(rng.randint(0, 4))]
            return {rng.choice(["role", "content", "type", "text", "a"]): value(depth + 1) for _ in range(3)}
        return rng.choice(kinds)
    fields = sorted({*serve.CHAT, *serve.COMPLETION, *serve.NEUTRAL, "x"})
    for i in range(10_000):
        path = rng.choice([CHAT, COMPLETE])
        body = dict(HELLO) if path == CHAT else {"prompt": "Once"}
        for _ in range(rng.randint(1, 3)):
            body[rng.choice(fields)] = value()
        body["max_tokens"] = rng.choice([0, "1", None, [], -3])
        if body["max_tokens"] is None:
            body["temperature"] = "hot"  # whatever else is well formed, this is not
        raw = json.dumps(body).encode()
        form = rng.random()
        if form < 0.1:
            raw = raw[:rng.randint(0, len(raw))]
        elif form < 0.2:
            raw = bytes(rng.randrange(256) for _ in range(rng.randint(0, 200)))
        elif form < 0.25:
            raw = raw.decode().encode(rng.choice(["utf-16", "utf-32", "utf-7"]))
        answer = raw_request(server, post_head(path, len(raw)) + raw)
        seen[status_of(answer)] += 1
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"], (raw, answer)
    assert set(seen) <= {400, 404} and not server.engine.running and not server.engine.waiting.qsize()
    assert ask(server, CHAT, HELLO)[0] == 200 and "Traceback" not in capfd.readouterr().err


def test_slow_clients_are_let_go(monkeypatch):
    """A byte now and then does not hold a connection, neither in the head nor in the body."""
    monkeypatch.setattr(serve.Handler, "timeout", 0.3)
    server = serving()
    for begun in (b"", b"GET / HT", POST + b"Content-Length: 50\r\n\r\n{"):
        with socket.create_connection(server.server_address, timeout=20) as client:
            client.sendall(begun)
            began = time.monotonic()
            with pytest.raises(OSError):
                while time.monotonic() < began + 15:
                    client.sendall(b"x")
                    client.settimeout(0.05)
                    try:
                        if client.recv(1) == b"":
                            raise ConnectionError
                    except TimeoutError:
                        pass
    assert ask(server, "/health")[0] == 200
    close(server)


def test_surplus_connections_are_closed(server, monkeypatch):
    monkeypatch.setattr(serve, "MAX_THREADS", 1)  # fewer than run: this one, the server's, the engine's
    assert raw_request(server, get(b"/health")) == b""
    monkeypatch.undo()
    assert status_of(raw_request(server, get(b"/health"))) == 200


def test_a_client_that_does_not_read_holds_no_row(monkeypatch):
    """Its answers are written to the end, or until its time to take a piece is over; its row goes to the next."""
    monkeypatch.setattr(serve.Handler, "timeout", 0.5)
    server = serving(rows=1)
    body = json.dumps({"prompt": "Once", "max_tokens": 250, "n": 8, "logprobs": 5, "ignore_eos": True,
                       "stream": True}).encode()
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(server.server_address)
    client.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    until(lambda: server.engine.running)
    assert ask(server, CHAT, HELLO)[0] == 200
    until(lambda: not server.requests)
    client.close()
    close(server)


def test_api_key():
    server = serving(MODEL, "--api_key", "secret")
    paths = ("/", "/health", "/v1/models", "/metrics", "/runs")
    assert [ask(server, path)[0] for path in paths] == [200, 200, 401, 401, 401]
    for header, status in ((None, 401), ("Bearer wrong", 401), ("secret", 401), ("Basic secret", 401),
                           ("Bearer sécret", 401), ("Bearer secret", 200), ("bearer secret", 200)):
        answer = ask(server, CHAT, HELLO, {} if header is None else {"Authorization": header})
        assert answer[0] == status, header
        assert status == 200 or answer[1]["error"]["type"] == "authentication_error"
    close(server)


def test_cors_is_for_the_origin_named():
    server = serving(MODEL, "--cors", "https://friend.example", "--allow_host", "proxy.example")
    origin = b"Origin: https://friend.example"
    options = get(b"/v1/chat/completions", origin, method=b"OPTIONS", host=b"proxy.example")
    answer = raw_request(server, options)
    assert status_of(answer) == 204 and b"Access-Control-Allow-Origin: https://friend.example\r\n" in answer
    # any header, as OpenAI's JavaScript client sends its own; browsers want Authorization named
    assert b"Access-Control-Allow-Headers: Authorization, *\r\n" in answer
    assert status_of(raw_request(server, options.replace(b"friend", b"foe"))) == 403
    status, _, headers = ask(server, CHAT, HELLO, {"Origin": "https://friend.example"})
    assert status == 200 and headers["Access-Control-Allow-Origin"] == "https://friend.example"
    assert headers["Access-Control-Expose-Headers"] == "Retry-After"
    close(server)


def test_what_a_request_says_is_logged_escaped(capfd):
    server = serving(verbose=True)
    raw_request(server, get(b"/\x1b[31m\xff%0d"))
    raw_request(server, get(b"/health", method=b"G\x1bT"))
    raw_request(server, b"GET /" + b"a" * 70000)
    close(server)
    logged = capfd.readouterr().err
    assert logged.count("\n") == 3 and all(status in logged for status in ("414", "404", "501"))
    assert logged.replace("\n", "").isprintable()


@pytest.mark.parametrize("argv, message", [
    (["nowhere"], "nowhere is not a directory: name a weights directory"),
    (["{empty}"], "has neither config.json nor params.json"),
    (["--max_batch", "0"], "max_batch"),
    (["--max_waiting", "-1"], "max_waiting"),
    (["--concurrency", "a"], "concurrency"),
    (["--concurrency", "4,0"], "concurrency"),
    (["--http_port", "70000"], "port"),
    (["--api_key", ""], "api_key"),
    (["--api_key", "se cret"], "api_key"),
    (["--cors", "evil"], "no origin"),
    (["--nonsense"], "nonsense"),
    (["{directory}", "--max_len", "257"], "max_len"),
    (["{directory}", "--http_host", "203.0.113.7"], "choose another --http_host"),
])
def test_wrong_flags_are_one_sentence(directory, tmp_path, argv, message):
    with pytest.raises((ValueError, OSError), match=message):
        serve.main([part.format(directory=directory, empty=tmp_path) for part in argv])
