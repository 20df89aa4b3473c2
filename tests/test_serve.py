"""serve.py: the engine against Llama.generate and the model's own logits, the API over real connections, the page in a real browser.

Names such as V04 are cases of the developers' list of faults that users of this field met."""

import ast
import base64
import hashlib
import http.client
import itertools
import json
import math
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

from data.text import Tokenizer
import data.records
import data.run
import data.text
import lora
import serve
from data import demo
from model import Llama, LlamaConfig, sample
from serve import Answer, Engine, Job, Refusal, Sampling, Server, attention_calls, common, cut, draw, uniform

REAL = Path(__file__).parents[2] / "shared" / "real" / "stories260K"
SIZES = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=44, vocab_size=1280, max_seq_len=256)
TOKENIZER = Tokenizer(demo.FOLDER)
ALPACA = data.text.TEMPLATES["alpaca"]


def tiny(dtype: torch.dtype = torch.float32, **sizes) -> Llama:
    """Random, with logits far enough apart for argmax to be the same by every way."""
    model = Llama(LlamaConfig(**SIZES | sizes), generator=torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2.5 if p.dim() == 2 else 1.2)
    return model.to(dtype)


MODEL = tiny()


def ids(n: int, seed: int = 0) -> list[int]:
    return [1, *torch.randint(3, 1280, (n - 1,), generator=torch.Generator().manual_seed(1000 * n + seed)).tolist()]


def job(prompt: list[int], n: int = 1, client: socket.socket | None = None, chat: bool = False, **sampling) -> Job:
    return Job([prompt], n, Sampling(**{"max_tokens": 12, "temperature": 0.0} | sampling), TOKENIZER, chat, client)


def turn(engine: Engine) -> list[tuple[Answer, int]]:
    """One step of an engine whose thread was not started: what the thread does, at the test's own pace."""
    engine.drop_left()
    work = engine.plan()
    if work:
        engine.step(work)
    return work


def finish(engine: Engine, *jobs: Job) -> list[list[int]]:
    """Run until these jobs are done; the new ids of their answers."""
    for one in jobs:
        engine.submit(one)
    while engine.running or engine.waiting:
        turn(engine)
    return [answer.ids[answer.prompt:] for one in jobs for answer in one.answers]


def events(one: Job) -> list[serve.Event]:
    found = []
    while True:
        try:
            found.append(one.events.get_nowait())
        except Empty:
            return found


def text(one: Job, index: int = 0) -> str:
    return "".join(event.text for event in events(one) if event.index == index)


def scripted(answer: list[int], prompt: int, vocab: int = 1280) -> Llama:
    """A model that gives answer[i] after prompt + i tokens, whatever was said; an id of None has NaN logits."""
    model = tiny()

    def hidden(tokens, cache, start):
        position = torch.tensor(start)[:, None] + torch.arange(tokens.shape[1])
        wanted = [answer[p - prompt + 1] if 0 <= p - prompt + 1 < len(answer) else 2 for p in position.flatten().tolist()]
        x = F.one_hot(torch.tensor([w or 0 for w in wanted]), vocab).float() * 1e4
        x[[i for i, w in enumerate(wanted) if w is None]] = math.nan
        return x.view(*tokens.shape, vocab)
    model.hidden, model.output = hidden, torch.nn.Identity()
    return model


def pieces_of(said: str) -> list[int]:
    return TOKENIZER.encode(said, bos=False)


def raw_bytes(said: str) -> list[int]:
    """The same text byte by byte, as the tokenizer falls back to it."""
    return [TOKENIZER.sp.piece_to_id(f"<0x{byte:02X}>") for byte in said.encode()]


# ---- engine: equalities ---------------------------------------------------------------------------------------------

def test_alone_is_in_a_full_batch_is_generate(monkeypatch):
    """Greedy in fp32, exactly: requests that come and go at any step, read in chunks, in slots used before, give the ids of
    Llama.generate, which knows neither slots nor chunks."""
    monkeypatch.setattr(serve, "CHUNK", 7)
    prompts = [ids(n, n) for n in (3, 40, 9, 22, 31, 2, 60, 17, 5, 12)]
    expected = MODEL.generate(prompts, 12, temperature=0)
    engine, jobs = Engine(MODEL, slots=4), [job(prompt) for prompt in prompts]
    for one in jobs:  # a new one joins at every second step
        engine.submit(one)
        turn(engine), turn(engine)
    assert max(len(engine.running) for _ in [turn(engine)]) <= 4
    finish(engine)
    assert [answer.ids[answer.prompt:] for one in jobs for answer in one.answers] == expected
    assert [finish(Engine(MODEL, slots=4), job(prompt))[0] for prompt in prompts] == expected
    assert engine.counters["prompt_tokens"] + engine.counters["prefix_tokens"] == sum(map(len, prompts))


@pytest.mark.skipif(not REAL.exists(), reason=f"needs the real weights in {REAL}")
def test_real_model_writes_its_reference_story():
    model, tokenizer = Llama.from_pretrained(REAL / "hf").eval(), Tokenizer(REAL / "hf")
    one = Job([tokenizer.encode("Once upon a time")], 1, Sampling(150, temperature=0.0), tokenizer, chat=False)
    finish(Engine(model, 4), one)
    story = (REAL / "greedy.txt").read_text()
    assert len(story) > 300 and story.lstrip().startswith(("Once upon a time" + text(one))[:300])


def test_bf16_and_fused_weights_agree_with_generate():
    for model in (tiny(torch.bfloat16), tiny(), tiny(n_kv_heads=4), tiny(tie_embeddings=True)):
        prompts = [ids(n) for n in (5, 30, 11)]
        assert finish(Engine(model, 3), *map(job, prompts)) == model.generate(prompts, 12, temperature=0)


def test_sampling_depends_on_seed_choice_and_position_alone():
    wish = dict(temperature=1.0, max_tokens=20)
    alone = finish(Engine(MODEL, 4), job(ids(9), n=3, seed=5, **wish))
    company = Engine(MODEL, 5)
    for n in (4, 30, 6):
        company.submit(job(ids(n), temperature=0.7, max_tokens=40, seed=9))
    turn(company), turn(company)
    assert finish(company, job(ids(9), n=3, seed=5, **wish)) == alone
    assert len({tuple(answer) for answer in alone}) == 3                                   # V13
    assert finish(Engine(MODEL, 4), job(ids(9), n=3, seed=6, **wish)) != alone
    assert len({tuple(answer) for answer in finish(Engine(MODEL, 4), job(ids(9), n=3))}) == 1  # and equal at temperature 0


def test_uniform_is_uniform():
    u = sorted(uniform(3, choice, position) for choice in range(20) for position in range(500))
    assert 0 < u[0] and u[-1] <= 1
    assert max(abs(value - (i + 0.5) / len(u)) for i, value in enumerate(u)) < 0.02        # Kolmogorov-Smirnov at 10,000: p = 0.0007
    assert uniform(1, 23, 4) != uniform(12, 3, 4)


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.5, 1.0), (1.7, 0.8), (1.0, 0.3), (1.0, 1e-9)])
def test_draw_follows_the_distribution(temperature, top_p):
    """A fine grid of u gives each token its probability among those that top_p keeps; model.sample draws none of the others."""
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(1)) * 2
    n = 20000
    u = [(i + 0.5) / n for i in range(n)]
    share = torch.bincount(draw(logits.expand(n, -1).clone(), [temperature] * n, [top_p] * n, u), minlength=50) / n
    probs = (logits[0].double() / temperature).softmax(-1)
    kept, reached = torch.zeros(50, dtype=torch.bool), 0.0
    for token in probs.argsort(descending=True).tolist():  # the smallest set of likeliest tokens that reaches p
        kept[token] = reached < top_p
        reached += probs[token].item()
    assert (share - torch.where(kept, probs, 0.0) / probs[kept].sum()).abs().max() < 2 / n
    others = torch.bincount(sample(logits.expand(n, -1), temperature, 0, top_p, torch.Generator().manual_seed(0)), minlength=50) > 0
    assert not (others & ~kept).any() and not (share > 0)[~kept].any()


def test_draw_treats_rows_by_themselves():
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(2))
    logits[3, 7] = math.nan
    together = draw(logits, [0.0, 1.0, 0.6, 1.0], [1.0, 0.5, 1.0, 1.0], [0.0, 0.4, 0.9, 0.5]).tolist()
    apart = [draw(logits[b:b + 1], [t], [p], [u]).item() for b, (t, p, u) in enumerate([(0.0, 1.0, 0.0), (1.0, 0.5, 0.4), (0.6, 1.0, 0.9)])]
    assert together == [*apart, -1] and together[0] == logits[0].argmax()
    assert draw(torch.zeros(1, 5), [1.0], [1.0], [1.0]).item() == 4 and draw(torch.zeros(1, 5), [1.0], [1.0], [1e-17]).item() == 0


def test_penalties_are_openais_formula():
    logits = torch.zeros(5)
    serve.penalize(logits, Counter({2: 3, 4: 1}), 0.5, 0.25)
    assert logits.tolist() == [0, 0, -1.25, 0, -0.75]
    prompt, presence, frequency = ids(6), 0.7, 1.1
    got = finish(Engine(MODEL, 1), job(prompt, presence=presence, frequency=frequency, max_tokens=25, ignore_eos=True))[0]
    made: list[int] = []
    for _ in range(25):
        with torch.no_grad():
            logits = MODEL(torch.tensor([prompt + made]))[0, -1]
        for token, times in Counter(made).items():
            logits[token] -= presence + frequency * times
        made.append(logits.argmax().item())
    assert got == made != finish(Engine(MODEL, 1), job(prompt, max_tokens=25, ignore_eos=True))[0]


def test_logprobs_are_the_models_own():
    """Before temperature and penalties, one for each token that is shown."""
    prompt = ids(8)
    one = job(prompt, temperature=0.8, seed=4, presence=1.0, logprobs=3, ignore_eos=True)
    made = finish(Engine(MODEL, 2), one)[0]
    with torch.no_grad():
        expected = MODEL(torch.tensor([prompt + made]))[0, len(prompt) - 1:-1].log_softmax(-1)
    rows = [row for event in events(one) for row in event.logprobs]
    assert [token for _, token, _, _ in rows] == made
    for (_, token, logprob, top), reference in zip(rows, expected):
        assert logprob == pytest.approx(reference[token].item(), abs=1e-4)
        assert [i for i, _ in top] == reference.topk(3).indices.tolist()


# ---- engine: slots, chunks, prefixes --------------------------------------------------------------------------------

def test_a_long_prompt_does_not_stall_the_others(monkeypatch):
    monkeypatch.setattr(serve, "CHUNK", 8)
    engine, short, long = Engine(MODEL, 2), job(ids(4), max_tokens=60, ignore_eos=True), job(ids(100))
    engine.submit(short)
    turn(engine)
    engine.submit(long)
    for step in range(13):  # 100 tokens, 8 a step: every step gives the short one its token
        before = short.completion_tokens
        work = turn(engine)
        assert short.completion_tokens == before + 1 and sum(n for _, n in work) <= 9
    assert long.completion_tokens == 1
    alone = Engine(MODEL, 2)
    alone.submit(job(ids(100)))
    assert [n for _, n in turn(alone)] == [100]  # with nobody to wait, at once


def test_a_shared_beginning_is_computed_once():
    system = ids(60)
    first, second = system + ids(5, 1)[1:], system + ids(7, 2)[1:]
    engine = Engine(MODEL, 3)
    answers = finish(engine, job(first))
    assert engine.counters["prompt_tokens"] == 64
    both = job(second), job(first, max_tokens=40, ignore_eos=True)
    answers += finish(engine, *both)
    assert engine.counters["prompt_tokens"] == 64 + 6 + 1 and engine.counters["prefix_tokens"] == 60 + 63
    assert [one.reused for one in both] == [60, 63]
    assert answers[0] == answers[2][:len(answers[0])] and answers[1] == MODEL.generate([second], 12, temperature=0)[0]
    # the chat so far: the answer's own keys and values are there too
    longer = first + answers[2][:30] + ids(4, 3)[1:]
    fresh = finish(Engine(MODEL, 3), job(longer))
    assert finish(engine, job(longer)) == fresh and engine.counters["prefix_tokens"] == 60 + 63 + len(first) + 30


def test_several_choices_and_simultaneous_requests_compute_their_prompt_once():
    engine = Engine(MODEL, 4)
    finish(engine, job(ids(50), n=4, temperature=1.0), job(ids(50)[:48] + [5, 6, 7]))
    assert engine.counters["prompt_tokens"] == 50 + 3 + 3


def test_slots_queue_and_counters():
    engine = Engine(MODEL, slots=2, max_waiting=3)
    for _ in range(2):
        engine.submit(job(ids(4), max_tokens=5, ignore_eos=True))
        turn(engine)
    for _ in range(3):
        engine.submit(job(ids(4), max_tokens=5, ignore_eos=True))
    with pytest.raises(Refusal, match="3 answers are waiting") as refused:
        engine.submit(job(ids(4)))
    assert refused.value.status == 429 and 1 <= int(refused.value.headers["Retry-After"]) <= 60
    told = dict(re.findall(r"^(\w+) (\S+)$", serve.prometheus(engine), re.MULTILINE))
    assert [told[f"octet_{name}"] for name in ("slots", "slots_used", "waiting", "refused_total")] == ["2", "2", "3", "1"]
    finish(engine)
    told = dict(re.findall(r"^(\w+) (\S+)$", serve.prometheus(engine), re.MULTILINE))
    assert [told[f"octet_{name}"] for name in ("slots_used", "waiting", "answers_total", "completion_tokens_total")] == ["0", "0", "5", "25"]


def test_a_client_that_leaves_frees_its_slot_within_one_step():
    """V06, and V07: one that leaves while it waits is never started."""
    engine, pairs = Engine(MODEL, slots=1), [socket.socketpair() for _ in range(3)]
    a, b, c = (job(ids(5, i), client=here, max_tokens=200, ignore_eos=True) for i, (_, here) in enumerate(pairs))
    for one in (a, b, c):
        engine.submit(one)
    for _ in range(3):
        turn(engine)
    assert a.completion_tokens == 3 and b.completion_tokens == 0
    pairs[1][0].close()
    pairs[0][0].close()
    turn(engine)
    assert (a.completion_tokens, b.completion_tokens, c.completion_tokens) == (3, 0, 1)
    assert events(b)[-1].error.status == 499 and engine.counters["left"] == 2
    pairs[2][0].send(b"more")  # a client that says something has not left
    turn(engine)
    assert c.completion_tokens == 2


def test_calls_of_attention():
    assert attention_calls([(0, 10), (1, 12), (3, 10)], 100) == [[(0, 10), (1, 12)], [(3, 10)]]
    assert attention_calls([(0, 10), (1, 1000), (2, 10)], 100) == [[(0, 10)], [(1, 1000)], [(2, 10)]]
    assert attention_calls([(0, 10), (1, 1000), (2, 10)], 2000) == [[(0, 10), (1, 1000), (2, 10)]]
    assert common([1, 2, 3], [1, 2, 4]) == 2 and common([], [1]) == 0 and common([1, 2], [1, 2, 3]) == 2


def test_non_finite_logits_fail_one_request():
    """V21. The slot's next user is not poisoned: hidden behind the mask a NaN is 0 * NaN."""
    said = pieces_of("Once there was a fox.")
    engine = Engine(scripted([*said[:2], None], 4), 2)
    broken = job(ids(4))
    finish(engine, broken)
    error = events(broken)[-1].error
    assert error.status == 500 and "non-finite" in str(error)
    engine, both, other = Engine(scripted([*said[:2], None], 4), 3), job(ids(4), n=2, max_tokens=3), job(ids(3), max_tokens=2)
    finish(engine, both, other)
    assert [event.error.status for event in events(both) if event.error] == [500] and events(other)[-1].finish == "stop" and engine.counters["failed"] == 1
    engine = Engine(MODEL, 2)
    good = MODEL.generate([ids(60), ids(5)], 12, temperature=0)
    engine.cache.kv[0][0, :, 20:] = math.nan
    with MODEL.output.register_forward_hook(lambda module, x, y: y * math.nan):
        finish(engine, job(ids(30)))
    long, short = job(ids(60)), job(ids(5))
    assert finish(engine, long, short) == good and engine.counters["failed"] == 1 and not engine.running


def test_a_step_that_fails_ends_its_requests_and_no_others(capsys):
    engine = Engine(MODEL, 2)
    engine.start()
    for part in ("step", "seat"):
        sound = getattr(engine, part)
        setattr(engine, part, lambda *_: 1 / 0)
        one = job(ids(4))
        engine.submit(one)
        assert one.events.get(timeout=10).error.status == 500
        setattr(engine, part, sound)
    one = job(ids(4))
    engine.submit(one)
    while not (event := one.events.get(timeout=10)).finish:
        assert event.error is None
    assert engine.stop(5.0) and "ZeroDivisionError" in capsys.readouterr().err


# ---- text -----------------------------------------------------------------------------------------------------------

def test_stop_strings_are_never_shown_and_nothing_is_lost():
    """V04, on random texts in random pieces; the text up to the stop string is str.partition's."""
    rng = random.Random(0)
    for _ in range(2000):
        stop, said = ("".join(rng.choice("ab") for _ in range(rng.randint(*size))) for size in ((1, 5), (0, 14)))
        shown, pending, stopped, at = "", "", False, 0
        while at < len(said) and not stopped:
            piece = said[at:at + rng.randint(1, 4)]
            at += len(piece)
            pending += piece
            show, stopped = cut(pending, [stop])
            shown, pending = shown + pending[:show], pending[show:]
            assert (said.partition(stop)[0] if stop in said else said).startswith(shown)
        assert stopped == (stop in said) and shown + ("" if stopped else pending) == said.partition(stop)[0]
    assert cut("one Obs", ["Observation", "zzz"]) == (4, False) and cut("x STOP y END", ["END", "STOP"]) == (2, True)


def test_stop_string_across_tokens():
    said = pieces_of("The fox found a heavy kite. The end of it.")
    engine, one = Engine(scripted(said, 4), 1), job(ids(4), stop=("kite. The e",), max_tokens=50, chat=True)
    finish(engine, one)
    got = events(one)
    assert "".join(event.text for event in got) == "The fox found a heavy " and [event.finish for event in got if event.finish] == ["stop"]
    assert not any("kite" in event.text for event in got) and len(got) > 3


@pytest.mark.parametrize("said", ["🦊", "é", "狐狸和风筝", "a🦊🪁b", "naïve 狐 🦊!"])
def test_characters_are_never_cut(said):
    """V01: bytes of one character come in several tokens."""
    engine, one = Engine(scripted(raw_bytes(said), 4), 1), job(ids(4), max_tokens=50, chat=True)
    finish(engine, one)
    got = events(one)
    assert "".join(event.text for event in got) == said and not any("�" in event.text for event in got)
    assert [event.text for event in got if event.text] == list(said)  # each as soon as it is complete
    engine, one = Engine(scripted(raw_bytes(said), 4), 1), job(ids(4), max_tokens=1, chat=True)
    finish(engine, one)
    assert text(one) == (said[0] if ord(said[0]) < 128 else "�")  # cut by length, what there is is shown


def test_a_completion_goes_on_with_its_prompts_text():
    prompt = TOKENIZER.encode("There was once")
    said = TOKENIZER.encode("There was once a kind fox near the village.")[len(prompt):]
    for chat, expected in ((False, " a kind fox near the village."), (True, "a kind fox near the village.")):
        engine, one = Engine(scripted(said, len(prompt)), 1), job(prompt, max_tokens=50, chat=chat)
        finish(engine, one)
        assert text(one) == expected


def test_logprobs_of_text_that_a_stop_string_cuts_off_are_dropped():
    said = pieces_of("The fox found a kite.")
    engine, one = Engine(scripted(said, 4), 1), job(ids(4), stop=(" found",), max_tokens=50, logprobs=0, chat=True)
    finish(engine, one)
    tokens = [row[1] for event in events(one) for row in event.logprobs]
    assert b"".join(TOKENIZER.token_bytes(token) for token in tokens) == b" The fox"
    assert TOKENIZER.token_bytes(raw_bytes("é")[0]) == b"\xc3" and TOKENIZER.token_bytes(2) == TOKENIZER.token_bytes(99999) == b""


# ---- over HTTP ------------------------------------------------------------------------------------------------------

def serving(model: Llama = MODEL, slots: int = 4, max_waiting: int = 64, listen: bool = True, **options) -> Server:
    engine = Engine(model, slots, max_waiting=max_waiting)
    engine.start()
    server = Server(("127.0.0.1", 0), engine, TOKENIZER, ALPACA, "tiny", **options)
    return accept(server) if listen else server


def accept(server: Server) -> Server:
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    return server


def close(server: Server) -> None:
    server.engine.stop(0.0)
    server.finish(5.0)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = serving(runs=tmp_path_factory.mktemp("out"))
    yield server
    close(server)


def connect(server: Server) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)


def ask(server: Server, path: str, body: object = None, headers: dict | None = None) -> tuple[int, dict | str, dict]:
    """(status, JSON or text, headers) of one request; a body makes it a POST."""
    connection = connect(server)
    raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection.request("GET" if body is None else "POST", path, raw, {"Content-Type": "application/json"} | (headers or {}))
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


CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
HELLO = {"messages": [{"role": "user", "content": "Write a story about a fox and a kite."}], "max_tokens": 9}


def test_chat_is_the_templates_prompt_and_the_models_answer(server):
    prompt = data.text.encode_prompt(HELLO["messages"], TOKENIZER, ALPACA)
    expected = MODEL.generate([prompt], 9, temperature=0)[0]
    status, body, _ = ask(server, CHAT, HELLO | {"temperature": 0})
    assert status == 200 and body["object"] == "chat.completion" and body["model"] == "tiny"
    assert body["choices"] == [{"index": 0, "logprobs": None, "finish_reason": "length",
                                "message": {"role": "assistant", "content": TOKENIZER.decode(expected), "refusal": None}}]
    used = body["usage"]
    assert (used["prompt_tokens"], used["completion_tokens"], used["total_tokens"]) == (len(prompt), 9, len(prompt) + 9)
    parts = [{"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]}, *HELLO["messages"]]
    worded = [{"role": "system", "content": "Be kind."}, *HELLO["messages"]]
    status, body, _ = ask(server, CHAT, {"messages": parts, "max_completion_tokens": 3, "temperature": 0, "stop": None, "n": None, "tools": [], "weird": None})
    assert status == 200 and body["usage"]["prompt_tokens"] == len(data.text.encode_prompt(worded, TOKENIZER, ALPACA)) and body["usage"]["completion_tokens"] == 3


def test_completions_take_text_ids_and_lists(server):
    for prompt in ("Once", TOKENIZER.encode("Once")):
        status, body, _ = ask(server, COMPLETE, {"prompt": prompt, "temperature": 0, "model": "tiny"})
        assert status == 200 and body["object"] == "text_completion" and body["usage"]["completion_tokens"] == 16
        made = MODEL.generate([TOKENIZER.encode("Once")], 16, temperature=0)[0]
        assert "Once" + body["choices"][0]["text"] == TOKENIZER.decode(TOKENIZER.encode("Once") + made)
    status, body, _ = ask(server, COMPLETE, {"prompt": ["Once", "Two"], "n": 2, "seed": 3, "max_tokens": 5, "logprobs": 2})
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3] and len({choice["text"] for choice in body["choices"]}) == 4
    for choice in body["choices"]:
        shown = choice["logprobs"]
        assert len(shown["tokens"]) == len(shown["token_logprobs"]) == len(shown["top_logprobs"]) == len(shown["text_offset"]) == 5 and all(len(top) == 2 for top in shown["top_logprobs"])
        whole = list(itertools.takewhile(lambda row: "\\x" not in row[1], zip(shown["text_offset"], shown["tokens"])))  # bytes of no character have no place in the text
        assert whole and all(choice["text"][at:].startswith(token) for at, token in whole)
    again = ask(server, COMPLETE, {"prompt": ["Once", "Two"], "n": 2, "seed": 3, "max_tokens": 5})[1]["choices"]
    assert [choice["text"] for choice in again] == [choice["text"] for choice in body["choices"]]


@pytest.mark.parametrize("path, extra", [(CHAT, HELLO), (CHAT, HELLO | {"n": 3, "logprobs": True, "top_logprobs": 2}), (COMPLETE, {"prompt": "Once", "max_tokens": 9, "logprobs": 1})])
def test_streamed_is_not_streamed(server, path, extra):
    """V22 too: the form of the chunks."""
    wish = extra | {"seed": 7, "temperature": 0.9, "stop": ["zz"]}
    _, whole, _ = ask(server, path, wish)
    *chunks, last = stream(server, path, wish | {"stream_options": {"include_usage": True}})
    assert last["choices"] == [] and all(chunk["usage"] is None for chunk in chunks)
    assert 0 <= last["usage"]["prompt_tokens_details"]["cached_tokens"] < last["usage"]["prompt_tokens"]  # once, not for each of n
    assert {k: v for k, v in last["usage"].items() if "details" not in k} == {k: v for k, v in whole["usage"].items() if "details" not in k}
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in [*chunks, last]}) == 1
    for choice in whole["choices"]:
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        assert [part["finish_reason"] for part in own if part["finish_reason"]] == [choice["finish_reason"]] and own[-1]["finish_reason"]
        if path == CHAT:
            assert own[0]["delta"]["role"] == "assistant" and not any("role" in part["delta"] for part in own[1:])
            assert "".join(part["delta"].get("content", "") for part in own) == choice["message"]["content"]
            if "logprobs" in extra:
                streamed, told = sum((part["logprobs"]["content"] for part in own), []), choice["logprobs"]["content"]
                assert [row["bytes"] for row in streamed] == [row["bytes"] for row in told] != []
                assert [row["logprob"] for row in streamed] == pytest.approx([row["logprob"] for row in told], abs=1e-4)
        else:
            assert "".join(part["text"] for part in own) == choice["text"]
            assert sum((part["logprobs"]["text_offset"] for part in own), []) == choice["logprobs"]["text_offset"]
    assert "usage" not in stream(server, path, wish)[-1]


def test_clients_at_once_get_their_own_answers(server):
    """V15: 8 clients, five rounds."""
    questions = [f"Tell me the secret of client {i}: {'xyz'[i % 3] * i}" for i in range(8)]
    bodies = [{"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 15} for question in questions]
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


BAD = [
    (CHAT, {"temperature": "0.7"}, "temperature"), (CHAT, {"temperature": 10}, "temperature"), (CHAT, {"temperature": -1}, "temperature"),
    (CHAT, {"temperature": True}, "temperature"), (CHAT, {"top_p": 0}, "top_p"), (CHAT, {"top_p": 1.5}, "top_p"), (CHAT, {"n": 0}, "n"), (CHAT, {"n": 33}, "n"),
    (CHAT, {"n": 1.0}, "n"), (CHAT, {"max_tokens": 0}, "max_tokens"), (CHAT, {"max_tokens": -1}, "max_tokens"), (CHAT, {"max_tokens": "5"}, "max_tokens"),
    (CHAT, {"max_completion_tokens": 1000}, "max_completion_tokens"), (CHAT, {"seed": 1.5}, "seed"), (CHAT, {"stop": ""}, "stop"), (CHAT, {"stop": [1]}, "stop"),
    (CHAT, {"stop": ["a"] * 17}, "stop"), (CHAT, {"presence_penalty": 2.1}, "presence_penalty"), (CHAT, {"stream": 1}, "stream"), (CHAT, {"stream": "yes"}, "stream"),
    (CHAT, {"stream_options": []}, "stream_options"), (CHAT, {"logprobs": 3}, "logprobs"), (CHAT, {"top_logprobs": 2}, "top_logprobs"), (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"tools": [{"type": "function"}]}, "tools"), (CHAT, {"temprature": 1}, "temprature"), (CHAT, {"prompt": "Hi"}, "prompt"), (CHAT, {"user": 5}, "user"),
    (CHAT, {"response_format": {"type": "json_object"}}, "response_format"), (CHAT, {"messages": None}, "messages"), (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": "Hi"}] * 513}, "messages"), (CHAT, {"messages": ["Hi"]}, "messages[0]"), (CHAT, {"messages": [{"role": "tool", "content": "Hi"}]}, "messages[0].role"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"), (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
    (CHAT, {"messages": [{"role": "user", "content": " "}]}, "messages"), (CHAT, {"messages": [{"role": "assistant", "content": "Hi"}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": "Hi"}, {"role": "user", "content": "Ho"}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": "fox " * 300}], "max_tokens": None}, "messages"), (CHAT, {"messages": [{"role": "user", "content": "fox " * 30000}]}, "messages"),
    (CHAT, {"model": "gpt-4"}, "model"), (CHAT, {"model": 5}, "model"),
    (COMPLETE, {}, "prompt"), (COMPLETE, {"prompt": []}, "prompt"), (COMPLETE, {"prompt": [1280]}, "prompt"), (COMPLETE, {"prompt": [-1]}, "prompt"), (COMPLETE, {"prompt": [True]}, "prompt"),
    (COMPLETE, {"prompt": [[]]}, "prompt"), (COMPLETE, {"prompt": ["a", 1]}, "prompt"), (COMPLETE, {"prompt": ["a"] * 33}, "prompt"), (COMPLETE, {"prompt": ["a"] * 20, "n": 2}, "n"),
    (COMPLETE, {"prompt": "a", "logprobs": 6}, "logprobs"), (COMPLETE, {"prompt": "a", "echo": True}, "echo"), (COMPLETE, {"prompt": "a", "best_of": 3}, "best_of"), (COMPLETE, {"prompt": "a", "messages": []}, "messages"),
]


def test_bad_values_are_refused_by_name(server):
    """V12: status 400 (404 for a model that is not here), OpenAI's form, the parameter's name; streamed or not."""
    for path, change, param in BAD:
        for extra in ({}, {"stream": True}) if "stream" not in change else ({},):
            status, body, _ = ask(server, path, (HELLO if path == CHAT else {"max_tokens": 5}) | extra | change)
            assert status == (404 if param == "model" else 400), (change, body)
            assert set(body["error"]) == {"message", "type", "param", "code"} and body["error"]["param"] == param and body["error"]["type"] == "invalid_request_error", (change, body)
    assert not server.engine.running and not server.engine.waiting


def test_prompt_and_max_tokens_share_the_context(server):
    """V08, V09: what does not fit is refused, the same on both endpoints, streamed or not, with the three numbers; what just
    fits works, and the default never asks for too much."""
    prompt = ids(200)
    for extra in ({}, {"stream": True}):
        status, body, _ = ask(server, COMPLETE, {"prompt": prompt, "max_tokens": 57} | extra)
        assert status == 400 and all(number in body["error"]["message"] for number in ("200", "57", "256")) and body["error"]["code"] == "context_length_exceeded"
    assert ask(server, COMPLETE, {"prompt": prompt, "max_tokens": 56, "ignore_eos": True})[1]["usage"]["total_tokens"] == 256
    assert ask(server, COMPLETE, {"prompt": ids(250), "ignore_eos": True})[1]["usage"]["completion_tokens"] == 6
    long = [{"role": "user", "content": "fox " * 90}]
    room = 256 - len(data.text.encode_prompt(long, TOKENIZER, ALPACA))
    assert ask(server, CHAT, {"messages": long, "max_tokens": room + 1})[0] == 400
    assert ask(server, CHAT, {"messages": long, "ignore_eos": True})[1]["usage"]["completion_tokens"] == room


@pytest.mark.parametrize("raw", [b"{:", b"", b"null", b"[]", b"5", b'"x"', b"[" * 2**20, b'{"a":' * 10000, b"\xff\xfe", '{"messages": 1}'.encode("utf-16"), b'{"temperature": NaN}',
                                 b'{"seed": 1' + b"0" * 5000 + b"}", b'{"prompt": "\\ud83d"}'], ids=repr)
def test_broken_bodies(server, raw):
    """V10. (Half an emoji is legal JSON: as a prompt it is one unknown character.)"""
    status, body, _ = ask(server, COMPLETE, raw)
    assert status == 200 if b"ud83d" in raw else (400 <= status < 500 and body["error"]["message"])
    assert ask(server, "/health")[0] == 200


def test_nesting_of_every_depth(server):
    """Where Python just manages to read a value, it may not manage to print it."""
    for depth in range(850, 1010):
        status, body, _ = ask(server, COMPLETE, b'{"prompt": ' + b"[" * depth + b"]" * depth + b"}")
        assert status == 400 and body["error"]["message"], depth


def raw_request(server: Server, content: bytes, read: bool = True) -> bytes:
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as client:
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


POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"


@pytest.mark.parametrize("content, status", [
    (b"GET /\r\n\r\n", 400), (b"nonsense\r\n\r\n", 400), (b"GET / HTTP/9.9\r\n\r\n", 505), (b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n", 403), (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", 400),
    (b"GET /health HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n", 403), (b"GET /health HTTP/1.1\r\nHost: 127.0.0.1.evil.example:80\r\nConnection: close\r\n\r\n", 403),
    (b"GET /health HTTP/1.1\r\nHost: [::1]:7070\r\nConnection: close\r\n\r\n", 200), (b"GET /health HTTP/1.1\r\nHost: 127.0.0.1:7070\r\nConnection: close\r\n\r\n", 200),
    (b"GET /health HTTP/1.0\r\n\r\n", 200), (b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nConnection: close\r\n\r\n", 403),
    (b"GET /health HTTP/1.1\r\nHost: localhost\r\nOrigin: https://evil.example\r\nConnection: close\r\n\r\n", 403),
    (b"GET /../../etc/passwd HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 404), (b"DELETE / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 405),
    (b"GET /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 405), (b"OPTIONS /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 405),
    (b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 431), (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"A: b\r\n" * 200 + b"\r\n", 431),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"A: " + b"b" * 70000 + b"\r\n\r\n", 431), (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + (b"A: " + b"b" * 4000 + b"\r\n") * 20 + b"\r\n", 431),
    (POST + b"\r\n", 411), (POST + b"Content-Length: -5\r\n\r\n", 400), (POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}", 400), (POST + b"Content-Length: 1e3\r\n\r\n", 400),
    (POST + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n{}", 411),
    (POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", 411), (POST + b"Content-Length: 3000000\r\n\r\n" + b"[" * 3000000, 413), (POST + b"Content-Length: 99999999999999999999\r\n\r\n", 400),
    (POST.replace(b"application/json", b"text/plain") + b"Content-Length: 2\r\n\r\n{}", 415), (POST.replace(b"Content-Type: application/json\r\n", b"") + b"Content-Length: 2\r\n\r\n{}", 415),
], ids=lambda value: repr(value[:60]) if isinstance(value, bytes) else str(value))
def test_requests_that_are_refused_as_a_whole(server, content, status):
    answer = raw_request(server, content)
    assert status_of(answer) == status, answer[:300]
    if status != 200:
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
    assert b"Access-Control" not in answer


def test_a_client_that_asks_before_it_sends_its_body(server):
    """curl does, with longer ones: Expect: 100-continue."""
    body = json.dumps({"prompt": "Once", "max_tokens": 2}).encode()
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as client:
        client.sendall(POST + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body))
        assert client.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(body)
        assert status_of(client.recv(1000)) == 200


def test_malformed_requests_never_break_the_server(server, capfd):
    """10,000 of random types, sizes and encodings: each gets an answer below 500, no traceback is printed, and afterwards the
    server is as before."""
    rng = random.Random(0)
    connection, seen = connect(server), Counter()

    def value(depth: int = 0) -> object:
        kinds = [None, True, False, 0, -1, 1.5, 1e308, 2**70, "", "x" * rng.randint(0, 300), "\ud83d\x00\n", "狐狸🦊", [], {}, "stop", -0.0]
        if depth < 3 and rng.random() < 0.4:
            return [value(depth + 1) for _ in range(rng.randint(0, 4))] if rng.random() < 0.5 else {rng.choice(["role", "content", "type", "text", "a"]): value(depth + 1) for _ in range(3)}
        return rng.choice(kinds)
    fields = sorted(serve.KNOWN | set(serve.NEUTRAL) | {"messages", "prompt", "max_completion_tokens", "top_logprobs", "x"})
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
        connection.request("POST", path, raw, {"Content-Type": "application/json"})
        response = connection.getresponse()
        content = response.read()
        seen[response.status] += 1
        assert 400 <= response.status < 500 and json.loads(content)["error"]["message"], (raw, content)
    assert set(seen) <= {400, 404} and not server.engine.running and not server.engine.waiting
    assert ask(server, CHAT, HELLO)[0] == 200 and "Traceback" not in capfd.readouterr().err


def test_slow_clients_are_let_go():
    """A byte now and then does not hold a connection, neither in the head nor in the body."""
    server = serving(request_seconds=0.3)
    for begun in (b"", b"GET / HT", POST + b"Content-Length: 50\r\n\r\n{"):
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=20) as client:
            client.sendall(begun)
            began = time.monotonic()
            with pytest.raises(OSError):
                while True:
                    client.sendall(b"x")
                    client.settimeout(0.05)
                    try:
                        if client.recv(1) == b"":
                            raise ConnectionError
                    except TimeoutError:
                        pass
            assert time.monotonic() - began < 15
    assert ask(server, "/health")[0] == 200
    close(server)


def test_api_key():
    server = serving(api_key="secret")
    assert [ask(server, path)[0] for path in ("/", "/health", "/v1/models", "/metrics", "/runs")] == [200, 200, 401, 401, 401]
    for header, status in ((None, 401), ("Bearer wrong", 401), ("secret", 401), ("Basic secret", 401), ("Bearer sécret", 401), ("Bearer secret", 200), ("bearer secret", 200)):
        answer = ask(server, CHAT, HELLO, {} if header is None else {"Authorization": header})
        assert answer[0] == status, header
        assert status == 200 or answer[1]["error"]["type"] == "authentication_error"
    close(server)


def test_cors_is_for_the_origin_named():
    server = serving(cors="https://friend.example", allow_hosts=("proxy.example",))
    options = b"OPTIONS /v1/chat/completions HTTP/1.1\r\nHost: proxy.example\r\nOrigin: https://friend.example\r\nConnection: close\r\n\r\n"
    answer = raw_request(server, options)
    assert status_of(answer) == 204 and b"Access-Control-Allow-Origin: https://friend.example\r\n" in answer and b"Access-Control-Allow-Headers: Authorization, Content-Type\r\n" in answer
    assert status_of(raw_request(server, options.replace(b"friend", b"foe"))) == 403
    status, _, headers = ask(server, CHAT, HELLO, {"Origin": "https://friend.example"})
    assert status == 200 and headers["Access-Control-Allow-Origin"] == "https://friend.example"
    close(server)


def test_what_a_request_says_is_logged_escaped(capfd):
    server = serving(verbose=True)
    raw_request(server, b"GET /\x1b[31m\xff%0d HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    raw_request(server, b"G\x1bT /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    raw_request(server, b"GET /" + b"a" * 70000)
    close(server)
    logged = capfd.readouterr().err
    assert logged.count("\n") == 3 and "431" in logged and "404" in logged and "405" in logged and logged.replace("\n", "").isprintable() and logged.isascii()


def test_200_connections_at_once():
    """The listen queue is long enough: all connect before any is accepted, and all get an answer, or 429 with Retry-After."""
    server = serving(max_waiting=100, listen=False)
    clients = [connect(server) for _ in range(200)]
    for client in clients:
        client.timeout = 2.0
        client.connect()
        client.sock.settimeout(20.0)
    accept(server)
    for client in clients:
        client.request("POST", COMPLETE, json.dumps({"prompt": "Once", "max_tokens": 2}).encode(), {"Content-Type": "application/json"})
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
    """V06: the step counter stops, the next request starts at once."""
    server = serving(slots=1)
    body = {"prompt": "Once", "max_tokens": 250, "ignore_eos": True, "stream": streamed, "temperature": 0}
    step, gate = server.engine.step, threading.Semaphore(3)

    def paced(work) -> None:  # 3 steps, then the engine waits for the client to be gone
        gate.acquire(timeout=15)
        step(work)
    server.engine.step = paced
    client = connect(server)
    client.request("POST", COMPLETE, json.dumps(body).encode(), {"Content-Type": "application/json"})
    if streamed:
        response = client.getresponse()
        assert response.readline().startswith(b"data: ")
        response.close()
    until(lambda: server.engine.counters["steps"] == 3)
    client.close()
    gate.release(1000)
    until(lambda: not server.engine.running)
    assert server.engine.counters["steps"] <= 5 and server.engine.counters["left"] == 1
    assert ask(server, CHAT, HELLO)[0] == 200
    close(server)


def test_an_error_in_the_middle_of_a_stream_is_an_event():
    said = pieces_of("Once there was a fox.")
    server = serving(scripted([*said[:3], None], 4))
    step, gate = server.engine.step, threading.Semaphore(3)
    server.engine.step = lambda work: (gate.acquire(timeout=15), step(work))
    client = connect(server)
    client.request("POST", COMPLETE, json.dumps({"prompt": ids(4), "stream": True, "temperature": 0}), {"Content-Type": "application/json"})
    response = client.getresponse()
    assert response.status == 200 and response.readline().startswith(b"data: ")
    gate.release(1000)
    *_, error, done, _ = response.read().decode().split("\n\n")
    client.close()
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "non_finite_logits" and done == "data: [DONE]"
    status, body, _ = ask(server, COMPLETE, {"prompt": ids(4), "temperature": 0})
    assert status == 500 and body["error"]["code"] == "non_finite_logits"
    assert ask(server, COMPLETE, {"prompt": ids(4), "temperature": 0, "max_tokens": 2})[0] == 200
    close(server)


def test_a_fault_of_ours_frees_the_slot_and_closes_nothing_else(monkeypatch, capfd):
    server = serving(slots=1)
    monkeypatch.setattr(serve.Form, "chunk", lambda *_: 1 / 0)
    client = connect(server)
    client.request("POST", COMPLETE, json.dumps({"prompt": "Once", "max_tokens": 250, "ignore_eos": True, "stream": True}), {"Content-Type": "application/json"})
    response = client.getresponse()
    assert response.status == 500 and json.loads(response.read())["error"]["type"] == "server_error"
    until(lambda: not server.engine.running)
    assert server.engine.counters["left"] == 1 and "ZeroDivisionError" in capfd.readouterr().err
    client.request("GET", "/health")
    assert client.getresponse().status == 200
    client.close()
    close(server)


def test_models_and_metrics(server):
    status, body, _ = ask(server, "/v1/models")
    assert status == 200 and body["data"][0]["id"] == "tiny" and ask(server, "/v1/models/tiny")[1] == body["data"][0]
    assert ask(server, "/v1/models/other")[0] == 404
    status, told, headers = ask(server, "/metrics")
    assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
    for line in told.splitlines():
        assert re.fullmatch(r"# (HELP|TYPE) octet_\w+ .+|octet_\w+ \d+(\.\d+)?(e-?\d+)?", line), line
    head = raw_request(server, b"HEAD /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert status_of(head) == 200 and head.endswith(b"\r\n\r\n")


# ---- curves and page ------------------------------------------------------------------------------------------------

def write_run(folder: Path, name: str = "ppo", rows: int = 5) -> None:
    (folder / name).mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"step": i, "loss": 1 / i, "objective/scores": i / 2, "objective/kl": i / 10, "grad_norm": None, "note": "x"}) for i in range(1, rows + 1)]
    (folder / name / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 6, "lo')
    (folder / name / "summary.json").write_text(json.dumps({"gold_before": 0.4, "gold_after": 0.9, "flags": {"api_key": "secret"}}))


def test_curves(tmp_path):
    write_run(tmp_path)
    run, = serve.read_curves(tmp_path)
    assert run["name"] == "ppo" and run["gold_before"] == 0.4 and run["gold_after"] == 0.9 and "flags" not in run
    assert set(run["curves"]) == {"loss", "objective/scores", "objective/kl"} and run["curves"]["loss"] == [[i, 1 / i] for i in range(1, 6)]
    write_run(tmp_path, "long", 4000)
    run = serve.read_curves(tmp_path)[0]
    assert 300 < len(run["curves"]["loss"]) < 900 and run["curves"]["loss"][-1][0] == 4000
    outside = tmp_path.parent / "outside.jsonl"
    outside.write_text('{"step": 1, "loss": 2}\n')
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "metrics.jsonl").symlink_to(outside)
    assert [run["name"] for run in serve.read_curves(tmp_path)] == ["long", "ppo"]


def test_curves_over_http(server):
    assert ask(server, "/runs")[1] == {"runs": []}
    write_run(server.runs)
    status, body, headers = ask(server, "/runs")
    assert status == 200 and body["runs"][0]["name"] == "ppo"
    assert ask(server, "/runs", headers={"If-None-Match": headers["ETag"]})[0] == 304
    write_run(server.runs, rows=4)
    assert ask(server, "/runs", headers={"If-None-Match": headers["ETag"]})[0] == 200
    shutil.rmtree(server.runs / "ppo")


def test_the_page_is_one_file_and_never_makes_markup_of_text(server):
    """V16, V18: nothing in it turns text into markup, and its policy would not run what somebody got in."""
    status, page, headers = ask(server, "/")
    assert status == 200 and not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|createContextualFragment|srcdoc|eval\(|new Function", page)
    assert not re.search(r"""(src|href)=["']?(https?:)?//|@import|url\(""", page)
    script = re.search(r"<script>(.*)</script>", page, re.DOTALL).group(1)
    assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in headers["Content-Security-Policy"] and "unsafe" not in headers["Content-Security-Policy"]
    assert " on" not in re.sub(r"<script>.*</script>|<style>.*</style>", "", page, flags=re.DOTALL).replace(" on ", "")  # no handler in an attribute


class Browser:
    """A headless Chromium and one page of it, driven over its DevTools protocol: JSON over a websocket, by hand (RFC 6455)."""

    def __init__(self, binary: str, folder: Path, url: str):
        self.process = subprocess.Popen([binary, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--remote-debugging-port=0",
                                         f"--user-data-dir={folder}", "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port_file = folder / "DevToolsActivePort"
        until(lambda: port_file.exists() and port_file.read_text().count("\n"), 60)
        port = int(port_file.read_text().split()[0])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("PUT", "/json/new?" + url)
        target = json.loads(connection.getresponse().read())
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        path = target["webSocketDebuggerUrl"].partition(str(port))[2]
        self.socket.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}\r\n\r\n".encode())
        self.file, self.count = self.socket.makefile("rb"), 0
        while self.file.readline().strip():
            pass

    def call(self, method: str, **params) -> dict:
        self.count += 1
        payload, mask = json.dumps({"id": self.count, "method": method, "params": params}).encode(), os.urandom(4)
        length = bytes([0x80 | len(payload)]) if len(payload) < 126 else struct.pack("!BH", 0x80 | 126, len(payload))
        self.socket.sendall(b"\x81" + length + mask + bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload)))
        while True:
            message = b""
            while True:
                first, size = self.file.read(2)
                if size > 125:
                    size, = struct.unpack("!H" if size == 126 else "!Q", self.file.read(2 if size == 126 else 8))
                message += self.file.read(size)
                if first & 0x80:
                    break
            answer = json.loads(message)
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]

    def run(self, script: str) -> object:
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def key(self, key: str, code: str, number: int, modifiers: int = 0) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=code, windowsVirtualKeyCode=number, modifiers=modifiers)

    def close(self) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait(20)


def test_the_page_in_a_real_browser(tmp_path):
    """Chat, stop and turns by keyboard; text that looks like markup; curves that grow while a run goes on."""
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if binary is None:
        pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    evil = '<img src=x onerror="document.title=1">'
    messages = [{"role": "user", "content": "Hi"}]
    start = len(data.text.encode_prompt(messages, TOKENIZER, ALPACA))
    server = serving(scripted(raw_bytes(evil), start), slots=2, runs=tmp_path / "out")
    browser = Browser(binary, tmp_path / "profile", f"http://127.0.0.1:{server.server_port}/")
    try:
        until(lambda: browser.run("document.activeElement?.id === 'box' && document.querySelector('#model').textContent === 'tiny'"), 60)
        browser.call("Input.insertText", text="Hi")
        browser.key("Enter", "Enter", 13)
        until(lambda: browser.run("document.querySelectorAll('#log .note').length === 1"))
        assert browser.run("document.querySelector('#log .assistant').textContent") == evil
        assert browser.run("document.images.length") == 0 and browser.run("document.title") == "Octet"
        assert browser.run("messages.map(m => m.role + ':' + m.content)") == ["user:Hi", "assistant:" + evil]

        # a second turn carries the first; Esc stops it, and frees the slot
        seen, step = [], server.engine.step
        server.engine.model.hidden = lambda tokens, cache, start: F.one_hot(torch.full(tokens.shape, pieces_of("fox")[-1]), 1280).float() * 9
        gate = threading.Semaphore(3)

        def paced(work) -> None:
            seen.append([answer.ids[:answer.prompt] for answer, _ in work])
            gate.acquire(timeout=15)
            step(work)
        server.engine.step = paced
        browser.call("Input.insertText", text="More")
        browser.key("Enter", "Enter", 13)
        until(lambda: browser.run("document.querySelectorAll('#log .assistant')[1]?.textContent.length >= 3"))
        assert seen[0][0] == data.text.encode_prompt([*messages, {"role": "assistant", "content": evil}, {"role": "user", "content": "More"}], TOKENIZER, ALPACA)
        assert browser.run("document.querySelector('#send').textContent") == "Stop"
        browser.key("Escape", "Escape", 27)
        until(lambda: browser.run("document.querySelector('#send').textContent") == "Send")
        assert "stopped" in browser.run("document.querySelector('#log').lastChild.textContent")
        gate.release(1000)
        until(lambda: not server.engine.running)
        assert server.engine.counters["left"] == 1

        # temperature and length reach the server; an error is text too
        server.engine.step = step
        browser.run("document.querySelector('#length').value = 100000")
        browser.call("Input.insertText", text="<b>x</b>")
        browser.key("Enter", "Enter", 13)
        until(lambda: browser.run("document.querySelector('#log .error') !== null"))
        assert "max_tokens is 100000" in browser.run("document.querySelector('#log .error').textContent") and browser.run("document.querySelector('#box').value") == "<b>x</b>"
        assert browser.run("document.querySelectorAll('#log b').length") == 0

        # training: by keyboard, drawn, growing
        write_run(server.runs, "<b>ppo</b>".replace("/", "_"))
        browser.key("t", "KeyT", 84, modifiers=1)
        until(lambda: browser.run("document.querySelectorAll('#training figure').length") == 3)
        told = browser.run("[...document.querySelectorAll('#training svg')].map(s => s.getAttribute('aria-label'))")
        assert told[0].startswith("Reward and gold score: score from 0.5 to 2.5, gold from 0.4 to 0.9, over 5 steps") and "nats from 0.1 to 0.5" in told[1]
        assert browser.run("document.querySelector('#training h2').firstChild.textContent") == "<b>ppo<_b>"
        points = browser.run("document.querySelectorAll('#training polyline')[0].getAttribute('points')").split()
        assert len(points) == 5 and len({tuple(map(float, point.split(","))) for point in points}) == 5
        write_run(server.runs, "<b>ppo<_b>", 9)
        browser.run("draw()")
        until(lambda: browser.run("document.querySelectorAll('#training polyline')[0].getAttribute('points')").count(",") == 9)
        browser.key("c", "KeyC", 67, modifiers=1)
        assert browser.run("document.activeElement.id") == "box" and browser.run("document.querySelector('#training').hidden") is True
        # a phone: nothing is wider than the screen
        browser.call("Emulation.setDeviceMetricsOverride", width=360, height=640, deviceScaleFactor=2, mobile=True)
        for name in ("chat", "training"):
            browser.run(f"view('{name}')")
            assert browser.run("document.documentElement.scrollWidth") <= 360
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


def test_sigterm_finishes_what_runs_and_refuses_the_rest(directory):
    process = subprocess.Popen([sys.executable, serve.__file__, directory, "--http_port", "0", "--max_batch", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    port = None
    while port is None:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        port = int(found.group(1)) if (found := re.search(r"http://127\.0\.0\.1:(\d+)/v1", line)) else None
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("POST", COMPLETE, json.dumps({"prompt": "Once", "max_tokens": 240, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}), {"Content-Type": "application/json"})
    response = connection.getresponse()
    response.readline()
    process.send_signal(signal.SIGTERM)
    while "finishing" not in process.stdout.readline():
        pass
    rest = response.read().decode()
    assert rest.endswith("data: [DONE]\n\n") and '"completion_tokens": 240' in rest
    assert process.wait(30) == 0 and "finished" in process.stdout.read() and "Traceback" not in process.stderr.read()


@pytest.mark.parametrize("flags", [(), ("--benchmark",)])
def test_the_model_is_opened_in_a_thread_that_ends(monkeypatch, flags):
    """Else that thread keeps OpenMP workers, too many of them for the cores, and every step of the engine takes a third longer."""
    seen = []

    def open_everything(args):
        seen.append(threading.current_thread())
        raise ValueError("seen")
    monkeypatch.setattr(serve, "open_everything", open_everything)
    with pytest.raises(ValueError, match="seen"):
        serve.main(["nowhere", *flags])
    assert seen[0] is not threading.main_thread() and not seen[0].is_alive()


def test_draining_refuses_new_work():
    server = serving(slots=1)
    gate, step = threading.Semaphore(2), server.engine.step
    server.engine.step = lambda work: (gate.acquire(timeout=15), step(work))
    got = []
    client = threading.Thread(target=lambda: got.append(ask(server, COMPLETE, {"prompt": "Once", "max_tokens": 20, "ignore_eos": True})))
    client.start()
    until(lambda: server.engine.counters["steps"] == 2)
    stopper = threading.Thread(target=lambda: got.append(server.engine.stop(20.0)))
    stopper.start()
    until(lambda: server.engine.draining)
    status, body, headers = ask(server, CHAT, HELLO)
    assert status == 503 and headers["Retry-After"] and ask(server, "/health")[0] == 503
    gate.release(1000)
    client.join(), stopper.join()
    assert sorted(got, key=str)[0][0] == 200 and True in got
    server.finish(5.0)


def test_what_does_not_finish_in_time_is_told_so():
    engine, gate, one = Engine(MODEL, 1), threading.Semaphore(1), job(ids(4), max_tokens=200, ignore_eos=True)
    step, waits, finished = engine.step, job(ids(5)), []
    engine.step = lambda work: (gate.acquire(timeout=15), step(work))
    engine.submit(one), engine.submit(waits)
    engine.start()
    stopper = threading.Thread(target=lambda: finished.append(engine.stop(0.0)))
    stopper.start()
    until(lambda: engine.stopped)
    gate.release(1000)
    stopper.join()
    assert finished == [False] and one.completion_tokens < 5 and events(one)[-1].error.status == 503 == events(waits)[-1].error.status and not engine.running


def test_adapters_and_bad_directories(directory, tmp_path):
    model = Llama.from_pretrained(directory)
    lora.attach(model, 4, generator=torch.Generator().manual_seed(1))
    for layer in lora.adapters(model).values():
        layer.lora_B.data.normal_(std=0.3, generator=torch.Generator().manual_seed(2))
    lora.save_adapter(model, tmp_path / "adapter", str(directory))
    args = serve.parse([str(tmp_path / "adapter")])
    opened, tokenizer, template, name = serve.open_everything(args)
    assert template is ALPACA and name == "adapter" and tokenizer.vocab_size == 1280 and not lora.adapters(opened)
    prompt = ids(9)
    made = finish(Engine(opened, 2), job(prompt))[0]
    assert made == model.eval().generate([prompt], 12, temperature=0)[0] != MODEL.generate([prompt], 12, temperature=0)[0]
    assert finish(Engine(model, 2), job(prompt))[0] == made  # adapters that stay beside their base, as on a quantized one
    for argv, message in ((["nowhere"], "nowhere does not exist"), ([str(tmp_path)], "does not exist"), (["--max_batch", "0"], "max_batch is 0"), (["--concurrency", "a"], "no list of numbers"),
                          (["--http_port", "70000"], "port"), (["--api_key", ""], "api_key"), (["--cors", "evil"], "no origin"), (["--nonsense"], "nonsense"), ([str(directory), "--max_len", "257"], "max_len")):
        with pytest.raises((ValueError, OSError), match=message):
            serve.make_engine(serve.open_everything(serve.parse(argv))[0], serve.parse(argv))


@pytest.mark.parametrize("quant", ["8bit", "4bit"])
def test_quantized(directory, quant):
    """Rounded at load, alone and in company: as generate of the same weights dequantized, up to a token where the two choices
    were closer than 0.3 of the logits' deviation (the kernels round their inputs, by how many rows there are)."""
    quantize = pytest.importorskip("quantize", reason="needs quantize.py")
    model, slow = serve.open_model(directory, quant, torch.float32, "cpu"), quantize.open_model(directory, torch.float32, "cpu", quant=quant).eval()
    prompts = [ids(n) for n in (5, 40, 11, 23)]
    expected, same = slow.generate(prompts, 12, temperature=0), 0
    alone = [finish(Engine(model, 4), job(prompt))[0] for prompt in prompts]
    for got in (alone, finish(Engine(model, 4), *map(job, prompts))):
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
    flags = [call.args[0].value.removeprefix("--") for call in ast.walk(ast.parse(source)) if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "add_argument"]
    assert len(flags) > 15 and all(re.search(rf"args\.{flag}\b", source) or f'"{flag}"' in source.replace(f'"--{flag}"', "") for flag in flags)


# ---- benchmark ------------------------------------------------------------------------------------------------------

def test_benchmark_counts_new_tokens_alone(monkeypatch):
    """V19: prefill 10 ms, then 1 ms a token, by a clock of the test's."""
    now = [0.0]
    monkeypatch.setattr(serve.time, "perf_counter", lambda: now[0])

    def one(prompt: list[int]) -> dict:
        now[0] += 0.010 + 0.001 * 99
        return {"first": 0.010, "last": 0.109, "tokens": 100}
    row = serve.measure(one, [ids(32)] * 6, 1)
    assert row["first_token_ms_p50"] == pytest.approx(10) and row["tokens_per_second_each_p50"] == pytest.approx(1000)
    assert row["tokens_per_second"] == pytest.approx(100 / 0.109) and (row["prompt_tokens"], row["new_tokens"], row["requests"], row["concurrency"]) == (32, 100, 6, 1)
    assert serve.quantile([3.0, 1.0, 2.0, 4.0], 0.5) == 2.0 and serve.quantile(list(range(1, 101)), 0.95) == 95 and serve.quantile([1.0], 0.05) == 1.0


def test_benchmark_over_http(directory, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    summary = serve.main([str(directory), "--benchmark", "--concurrency", "1,3", "--prompt_tokens", "24", "--new_tokens", "6", "--rounds", "2", "--max_batch", "4", "--json", str(tmp_path / "b.json")])
    assert summary["prefix_tokens_reused"] < 8  # of 14 prompts of 24: each is read, none was asked before
    assert json.loads((tmp_path / "b.json").read_text()) == json.loads(json.dumps(summary))
    assert [(row["concurrency"], row["requests"], row["new_tokens"], row["prompt_tokens"]) for row in summary["rows"]] == [(1, 2, 6, 24), (3, 6, 6, 24)]
    assert {"dtype", "threads", "slots", "peak_memory_bytes", "http_cost"} <= set(summary) and "first token" in capfd.readouterr().out
