"""An inference server: OpenAI's HTTP interface, a batching engine written out, a page to talk to the model and watch training.

    python serve.py out/ppo                                     then open http://127.0.0.1:7070, or point a client at .../v1
    python serve.py LLAMA_DIR --quant 4bit --api_key SECRET --http_host 0.0.0.0 --http_port 8080
    python serve.py out/ppo --benchmark --concurrency 1,4,16    real requests over HTTP; a shape (mid) has random weights
    python serve.py http://host:port --benchmark                the same against any other server with this interface
    curl 127.0.0.1:7070/v1/chat/completions -H 'Content-Type: application/json' \\
         -d '{"messages": [{"role": "user", "content": "Write a story about a fox and a kite."}], "stream": true}'

One thread, the engine, owns the model; each connection has a thread of its own that only waits for text. The engine repeats
one step, and in every step each answer on its way takes what it needs: an answer being written one token, a prompt being read
a chunk of itself. All tokens of a step go through the matrices together, so weights are read once a step, however many answers
there are (Yu et al. 2022, "Orca": continuous batching). Only attention looks at each slot of the cache by itself:

    cache (one slot = one row, preallocated)                        this step computes
    slot 0  [system prompt|question |answer so f                    1 token             } neighbours: one call of attention
    slot 1  [system prompt|another question |ans                    1 token             }
    slot 2  [system prompt|a long text, read up to here             64 tokens, a chunk    its own call
    slot 3  [system prompt|old question|old answer                  nothing: it is free, its tokens stay for reuse

A new prompt starts from the slot whose tokens begin as it does, free or busy, and copies what they share (the system prompt, the
chat so far) instead of computing it: `common`. Which slot, with whom, and in which chunks changes an answer by no more than
rounding, and its random numbers depend on its seed, choice and position alone (`uniform`): alone or in a full batch, the same text.

What differs from OpenAI: one model, which a request may name or leave out; `ignore_eos` writes on to max_tokens; usage counts EOS;
several answers (n) at temperature 0 are equal; prompt and max_tokens that do not fit the context together are refused; fields that
we do not know are refused unless null.

Letters: N tokens of a step, V vocabulary, B rows that get a new token.
"""

import argparse
import base64
import hashlib
import hmac
import http.client
import io
import ipaddress
import json
import math
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import NamedTuple

import torch
from torch import Tensor

import lora
import quantize
from data import demo, run, text
from data.text import TextStream, Tokenizer, check_tokenizer, read_template
from data.weights import DTYPES, read_json, write_file
from model import SHAPES, KVCache, Llama, random_model

CHUNK = 64             # prompt tokens a step while others wait for theirs: as long as a decode step of 16 rows, twice the pause
CHUNK_MOST = 512       # and while nobody does, or on a GPU, where a step of few tokens leaves most of it idle
LINGER = 0.05          # of a step's time to wait for the next question of a client that has just got its answer
MIN_REUSE = 8          # copying fewer tokens is not worth its calls
CALL = 2**19           # bytes of the cache that are read in the time one call of attention costs: 25 us at 20 GB/s
PAGE = (Path(__file__).parent / "data" / "page.html").read_text("utf-8")
HEAD_BYTES, BODY_BYTES = 2**16, 2**20
STREAM_PAUSE = 0.01    # seconds from one piece of a stream to the next: no screen shows more, and each costs time that the engine's Python waits for
REQUEST_SECONDS = 30   # for a client to send its request, and to take a piece of the answer
MAX_MESSAGES, MAX_CHOICES, MAX_STOPS, MAX_CONNECTIONS = 512, 32, 16, 1024


class Refusal(Exception):
    """An answer that is an error: HTTP status, one sentence, the parameter at fault, OpenAI's code for it."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, headers: dict | None = None):
        super().__init__(message)
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        self.status, self.headers = status, headers or {}
        kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


# ---- text -----------------------------------------------------------------------------------------------------------

def cut(text: str, stops: list[str]) -> tuple[int, bool]:
    """(how many characters of text may be shown, whether a stop string ends it there). What might be the beginning of a stop
    string is held back: "Obs" while "Observation" is one."""
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    if found:
        return min(found), True
    held = (k for stop in stops for k in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:k]))
    return len(text) - max(held, default=0), False


# ---- sampling -------------------------------------------------------------------------------------------------------

def uniform(seed: int, choice: int, position: int) -> float:
    """The one random number in (0, 1] of a token: a hash, so that it depends on nothing else, neither neighbours nor machine."""
    digest = hashlib.blake2b(f"{seed} {choice} {position}".encode(), digest_size=8).digest()
    return (1 + (int.from_bytes(digest, "big") >> 11)) / 2**53


def penalize(logits: Tensor, seen: Counter, presence: float, frequency: float) -> None:
    """OpenAI's formula, in place: logits (V) of each token already written lose presence + frequency * times."""
    if seen:
        ids = torch.tensor(list(seen), device=logits.device)
        times = torch.tensor(list(seen.values()), device=logits.device, dtype=logits.dtype)
        logits[ids] -= presence + frequency * times


def draw(logits: Tensor, temperature: list[float], top_p: list[float], u: list[float]) -> Tensor:
    """One id for each row of logits (B, V) -> (B,), by inverting the distribution at u: the first token where the cumulated
    probability reaches u. Temperature 0 is argmax. top_p as in model.sample. A row with NaN or infinity in it gives -1."""
    highest, token = logits.max(-1)
    warm = [b for b, t in enumerate(temperature) if t > 0]
    if warm:
        column = logits.new_tensor([[max(temperature[b], 1e-6), top_p[b], u[b]] for b in warm])                  # (B', 3)
        probs = (logits[warm] / column[:, :1]).softmax(-1)                                                      # (B', V)
        narrow = [i for i, b in enumerate(warm) if top_p[b] < 1]
        if narrow:
            ordered, order = probs[narrow].sort(descending=True)
            drop = ordered.cumsum(-1) - ordered >= column[narrow, 1:2]  # the likelier ones alone reach p
            probs[narrow] = probs[narrow].masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), 0.0)
        total = probs.cumsum(-1)
        token[warm] = torch.searchsorted(total, column[:, 2:] * total[:, -1:])[:, 0].clamp(max=logits.shape[-1] - 1)
    return torch.where(highest.isfinite(), token, -1)


# ---- engine ---------------------------------------------------------------------------------------------------------

class Sampling(NamedTuple):
    """What a request asks for, the same for all its answers."""
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    presence: float = 0.0
    frequency: float = 0.0
    logprobs: int | None = None  # how many alternatives to report; None reports nothing
    ignore_eos: bool = False


class Event(NamedTuple):
    """What the engine tells a request's thread: more text of one answer, its end, or an error."""
    index: int
    text: str = ""
    logprobs: tuple = ()         # (where its text begins, id, logprob, ((id, logprob), ...)) of each token shown since the last event
    finish: str | None = None
    error: Refusal | None = None


class Job:
    """One request: its answers, and the queue in which their text arrives. `client` is its socket, looked at for having left."""

    def __init__(self, prompts: list[list[int]], n: int, sampling: Sampling, tokenizer: Tokenizer, chat: bool = True, client: socket.socket | None = None):
        self.events: SimpleQueue[Event] = SimpleQueue()
        self.sampling, self.client, self.left = sampling, client, False
        self.prompt_tokens, self.reused, self.began, self.first = sum(map(len, prompts)), 0, time.perf_counter(), None
        self.answers = [Answer(self, p * n + i, i, prompt, tokenizer, chat) for p, prompt in enumerate(prompts) for i in range(n)]

    @property
    def completion_tokens(self) -> int:
        return sum(len(answer.ids) - answer.prompt for answer in self.answers)

    def usage(self) -> dict:
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens,
                "total_tokens": self.prompt_tokens + self.completion_tokens, "prompt_tokens_details": {"cached_tokens": self.reused}}


class Answer:
    """One answer on its way: the ids of its prompt and of what was sampled, and the text that was not shown yet."""

    def __init__(self, job: Job, index: int, choice: int, prompt: list[int], tokenizer: Tokenizer, chat: bool):
        self.job, self.index, self.choice, self.ids, self.prompt = job, index, choice, list(prompt), len(prompt)
        self.eos_id = -1 if job.sampling.ignore_eos else tokenizer.eos_id
        # A completion goes on with its prompt's text, " there" after "Once"; a reply stands by itself.
        self.stream = TextStream(tokenizer, [] if chat else prompt[-16:])
        self.pending, self.shown, self.entries, self.seen = "", 0, [], Counter()
        self.slot: int | None = None

    def take(self, token: int, logprob: float = 0.0, top: tuple = ()) -> bool:
        """Add a sampled id, send off what may be shown; True when the answer is over."""
        sampling = self.job.sampling
        self.ids.append(token)
        made = len(self.ids) - self.prompt
        ended = token == self.eos_id
        over = ended or made == sampling.max_tokens
        if not ended:
            if sampling.logprobs is not None:
                self.entries.append((self.shown + len(self.pending), token, logprob, top))
            if sampling.presence or sampling.frequency:
                self.seen[token] += 1
            self.pending += self.stream.push(token)
        if over:
            self.pending += self.stream.rest()
        show, stopped = cut(self.pending, sampling.stop)
        if over and not stopped:
            show = len(self.pending)
        text, self.pending, self.shown = self.pending[:show], self.pending[show:], self.shown + show
        count = len(self.entries) if over and not stopped else sum(entry[0] < self.shown for entry in self.entries)
        entries, self.entries = tuple(self.entries[:count]), self.entries[count:]
        finish = "stop" if stopped or ended else "length" if over else None
        if text or entries or finish or made == 1:
            self.job.events.put(Event(self.index, text, entries, finish))
        return finish is not None


def common(a: list[int], b: list[int]) -> int:
    """How many ids a and b begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def attention_calls(rows: list[tuple[int, int]], call: int) -> list[list[tuple[int, int]]]:
    """Group rows (slot, tokens to look at), sorted by slot, into calls of attention. One call takes neighbours only, and looks
    at as many slots for each as the longest needs; a call costs as much as looking at `call` slots."""
    calls: list[list[tuple[int, int]]] = []
    for slot, length in rows:
        last = calls[-1] if calls else []
        longest = max((n for _, n in last), default=0)
        if last and last[-1][0] == slot - 1 and (len(last) + 1) * max(longest, length) <= len(last) * longest + length + call:
            last.append((slot, length))
        else:
            calls.append([(slot, length)])
    return calls


def gone(clients: list[socket.socket]) -> set[socket.socket]:
    """Those whose other side has closed: readable, and nothing to read. Never waits."""
    open_ones = {fd: client for client in clients if (fd := client.fileno()) >= 0}  # asked once: its thread may close it meanwhile
    if hasattr(select, "poll"):
        poll = select.poll()
        for fd in open_ones:
            poll.register(fd, select.POLLIN)
        ready = [fd for fd, _ in poll.poll(0)]
    else:  # Windows
        ready = select.select(list(open_ones), [], [], 0)[0] if open_ones else []
    closed = set(clients) - set(open_ones.values())
    for client in map(open_ones.get, ready):
        try:
            if not client.recv(1, socket.MSG_PEEK):
                closed.add(client)
        except OSError:
            closed.add(client)
    return closed


class Engine(threading.Thread):
    """Owns the model. `submit` a Job from any thread, read its events; the thread ends after `stop`."""

    def __init__(self, model: Llama, slots: int = 16, context: int | None = None, max_waiting: int = 256):
        super().__init__(name="engine", daemon=True)
        c = model.config
        self.model, self.context, self.max_waiting = model, context or c.max_seq_len, max_waiting
        self.cache = KVCache(c, slots, self.context, model.norm.weight.dtype, model.device)
        self.call = CALL // (2 * c.n_kv_heads * c.head_dim * self.cache.kv[0].itemsize)  # slots of one layer in CALL bytes
        self.held: list[list[int]] = [[] for _ in range(slots)]  # the ids whose keys and values lie in each slot
        self.used = [0] * slots                                  # the step in which a slot was last given back
        self.running: list[Answer] = []                          # those with a slot, in order of arrival
        self.waiting: deque[Answer] = deque()
        self.changed = threading.Condition()                     # guards waiting, draining, stopped
        self.draining = self.stopped = False
        self.counters = Counter()
        self.seconds_each = 1.0                                  # a running mean, for Retry-After

    # -- called by other threads

    def submit(self, job: Job) -> None:
        """Put a job's answers into the queue. Refusal 503 while shutting down, 429 when the queue is full."""
        with self.changed:
            if self.draining:
                raise Refusal(503, "the server is shutting down", headers={"Retry-After": "30"})
            if len(self.waiting) >= self.max_waiting:
                self.counters["refused"] += 1
                wait = math.ceil(len(self.waiting) / len(self.held) * self.seconds_each)
                raise Refusal(429, f"{len(self.waiting)} answers are waiting already: try again later", code="queue_full",
                              headers={"Retry-After": str(min(max(wait, 1), 60))})
            self.waiting.extend(job.answers)
            self.counters["requests"] += 1
            self.changed.notify()

    def stop(self, seconds: float) -> bool:
        """Refuse new work, finish what there is for so long, then end; whether all was finished."""
        deadline = time.monotonic() + seconds
        with self.changed:
            self.draining = True
            finished = self.changed.wait_for(lambda: not self.waiting and not self.running, deadline - time.monotonic())
            self.stopped = True
            self.changed.notify_all()
        self.join()
        return finished

    # -- called by the engine's thread

    def run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.running or self.stopped)
                if self.stopped:
                    break
            try:
                self.drop_left()
                work, done, began = self.plan(), self.counters["answers"], time.perf_counter()
                if work:
                    self.step(work)
                done = self.counters["answers"] - done
                if done and self.running:  # whoever got an answer often asks again at once, and would just miss the next step
                    with self.changed:
                        self.changed.wait_for(lambda: len(self.waiting) >= done, LINGER * (time.perf_counter() - began))
            except Exception as error:  # a fault of ours or no memory: those on the way get an answer, later ones a new start
                traceback.print_exc()
                self.fail([*self.running, *list(self.waiting)[:1]], Refusal(500, f"the engine failed ({type(error).__name__}): see the server's log"))
            with self.changed:
                self.changed.notify_all()
        self.fail([*self.running, *self.waiting], Refusal(503, "the server was shut down before the answer was complete"))

    def drop_left(self) -> None:
        """Free the slots, and places in the queue, of clients that are not there any more."""
        with self.changed:
            jobs = {answer.job for answer in [*self.running, *self.waiting]}
        closed = gone([job.client for job in jobs if job.client is not None])
        left = {job for job in jobs if job.left or job.client in closed}
        if left:
            self.counters["left"] += len(left)
            with self.changed:
                self.waiting = deque(answer for answer in self.waiting if answer.job not in left)
            for answer in [answer for answer in self.running if answer.job in left]:
                self.release(answer)
            for job in left:
                job.events.put(Event(0, error=Refusal(499, "the client has left")))

    def plan(self) -> list[tuple[Answer, int]]:
        """Who computes how many tokens in this step. First come, first served; every answer being written gets its token."""
        work = [(answer, 1) for answer in self.running if len(answer.ids) == len(self.held[answer.slot]) + 1]
        alone = len(self.running) + len(self.waiting) == 1
        budget = CHUNK if self.model.device.type == "cpu" and not alone else CHUNK_MOST
        reading = [answer for answer in self.running if len(answer.ids) > len(self.held[answer.slot]) + 1]
        while budget:
            if reading:
                answer = reading.pop(0)
            elif self.waiting and self.seat(self.waiting[0]):
                with self.changed:
                    answer = self.waiting.popleft()
                self.running.append(answer)
            else:
                break
            n = min(budget, len(answer.ids) - len(self.held[answer.slot]))
            work.append((answer, n))
            budget -= n
        return work

    def seat(self, answer: Answer) -> bool:
        """Give the answer a slot that holds the beginning of its prompt. False if none is free, or if another prompt is being
        read right now that shares more of its beginning: worth waiting for."""
        busy = {other.slot for other in self.running}
        free = [slot for slot in range(len(self.held)) if slot not in busy]
        if not free:
            return False
        ids = answer.ids[:-1]  # the last token is always computed: its output is wanted
        reuse, _, source = max((common(held, ids), slot not in busy, slot) for slot, held in enumerate(self.held))
        if any(common(other.ids[:other.prompt], ids) >= reuse + MIN_REUSE for other in self.running):
            return False
        # In place if that slot is free and nothing is lost with it, as when a chat goes on; else in the slot that was free for longest.
        slot = source if reuse and source in free and reuse == len(self.held[source]) else min(free, key=lambda s: (bool(self.held[s]), self.used[s]))
        if slot != source:
            reuse = reuse if reuse >= MIN_REUSE else 0
            for kv in self.cache.kv if reuse else ():
                kv[:, slot, :, :reuse] = kv[:, source, :, :reuse]
        self.held[slot] = ids[:reuse]
        answer.slot = slot
        answer.job.reused += reuse if answer.choice == 0 else 0  # usage counts a prompt once, however many answers
        self.counters["prefix_tokens"] += reuse
        return True

    @torch.inference_mode()
    def step(self, work: list[tuple[Answer, int]]) -> None:
        """One forward pass for all, then one sampled token for each answer whose known ids are all in the cache."""
        work = sorted((w for w in work if w[1] == 1), key=lambda w: w[0].slot) + [w for w in work if w[1] > 1]
        starts = [len(self.held[answer.slot]) for answer, _ in work]
        calls: list[list[int]] = []  # places in work: neighbouring rows of the cache with one token each, or a prompt's chunk alone
        for i, (answer, n) in enumerate(work):
            before = work[i - 1] if i else None
            if before and n == before[1] == 1 and answer.slot == before[0].slot + 1:
                calls[-1].append(i)
            else:
                calls.append([i])
        x = []
        for call in calls:
            token = torch.tensor([work[i][0].ids[starts[i]:starts[i] + work[i][1]] for i in call], device=self.model.device)  # (B, T)
            view = self.cache.rows(work[call[0]][0].slot, work[call[-1]][0].slot + 1)
            x.append(self.model.hidden(token, cache=view, start=[starts[i] for i in call])[:, -1])                            # (B, C)
        x = torch.cat(x)
        ready, last = [], []
        for at, ((answer, n), start) in enumerate(zip(work, starts)):
            self.held[answer.slot] += answer.ids[start:start + n]
            self.counters["prompt_tokens"] += n if start + n <= answer.prompt else 0
            if start + n == len(answer.ids):
                ready.append(answer)
                last.append(at)
        self.counters["steps"] += 1
        if ready:
            self.sample(ready, self.model.output(x if len(last) == len(x) else x[last]).float())

    def sample(self, answers: list[Answer], logits: Tensor) -> None:
        """One token for each answer from its row of logits (B, V); those that are over give their slot back."""
        wanted = [answer.job.sampling for answer in answers]
        logprobs, top = {}, {}
        for b, s in enumerate(wanted):
            if s.logprobs is not None:
                logprobs[b] = logits[b].log_softmax(-1)  # the model's own, before temperature and penalties
                top[b] = logprobs[b].topk(min(s.logprobs, logits.shape[-1]))
            if s.presence or s.frequency:
                penalize(logits[b], answers[b].seen, s.presence, s.frequency)
        u = [uniform(s.seed, answer.choice, len(answer.ids)) if s.temperature else 0.0 for s, answer in zip(wanted, answers)]
        ids = draw(logits, [s.temperature for s in wanted], [s.top_p for s in wanted], u).tolist()  # the one wait for a GPU
        now = time.perf_counter()
        for b, (answer, token) in enumerate(zip(answers, ids)):
            if answer not in self.running:
                continue  # its request has failed just now, by another answer
            if token < 0:
                for kv in self.cache.kv:
                    kv[:, answer.slot].zero_()  # a hidden NaN is not harmless to the slot's next user: 0 * NaN is NaN
                self.held[answer.slot].clear()
                self.fail([answer], Refusal(500, "the model gave non-finite logits: its weights or its dtype are broken (try --dtype fp32)", code="non_finite_logits"))
                continue
            self.counters["completion_tokens"] += 1
            job = answer.job
            if job.first is None:
                job.first = now
                self.counters["first_token_seconds"] += now - job.began
                self.counters["first_tokens"] += 1
            alternatives = tuple(zip(top[b].indices.tolist(), top[b].values.tolist())) if b in top else ()
            if answer.take(token, logprobs[b][token].item() if b in logprobs else 0.0, alternatives):
                self.seconds_each += 0.1 * (now - job.began - self.seconds_each)
                self.counters["answers"] += 1
                self.release(answer)

    def release(self, answer: Answer) -> None:
        self.running.remove(answer)
        self.used[answer.slot] = self.counters["steps"]

    def fail(self, answers: list[Answer], refusal: Refusal) -> None:
        """End these answers, and the others of the same requests, with an error."""
        jobs = {answer.job for answer in answers}
        self.counters["failed"] += len(jobs)
        for answer in [answer for answer in self.running if answer.job in jobs]:
            self.release(answer)
        with self.changed:
            self.waiting = deque(answer for answer in self.waiting if answer.job not in jobs)
        for job in jobs:
            job.events.put(Event(0, error=refusal))


# ---- requests -------------------------------------------------------------------------------------------------------

# Fields of OpenAI's that mean something we do not do, and the values with which they ask for nothing.
NEUTRAL = {"logit_bias": [{}], "best_of": [1], "echo": [False], "suffix": [""], "response_format": [{"type": "text"}], "tools": [[]],
           "functions": [[]], "tool_choice": ["none", "auto"], "function_call": ["none", "auto"], "parallel_tool_calls": [True, False],
           "store": [False], "metadata": [{}], "modalities": [["text"]], "service_tier": ["auto", "default"]}
KNOWN = {"model", "stream", "stream_options", "n", "stop", "max_tokens", "temperature", "top_p", "seed", "presence_penalty",
         "frequency_penalty", "logprobs", "user", "ignore_eos"}


def shown(value: object) -> str:
    """A value in an error message, short."""
    try:
        text = value if isinstance(value, str) else json.dumps(value)
    except RecursionError:  # just not too deep to be read
        return "nested too deeply"
    return repr(text[:60] + "...") if len(text) > 60 else repr(value)


def number(body: dict, name: str, default, low: float, high: float, whole: bool = False, above: bool = False):
    """body[name] if it is a number from low to high; null and missing are the default. Refusal 400 naming it otherwise."""
    value = body.get(name)
    if value is None:
        return default
    fits = type(value) is int if whole else type(value) in (int, float)  # True is an int too, but no number
    if not fits or not low <= value <= high or above and value == low:
        kind, first = "a whole number" if whole else "a number", f"above {low:g}" if above else f"from {low:g}"
        raise Refusal(400, f"{name} is {shown(value)}, it must be {kind} {first} to {high:g}", name)
    return value


def flag(body: dict, name: str) -> bool:
    value = body.get(name)
    if value not in (None, True, False) or type(value) in (int, float):
        raise Refusal(400, f"{name} is {shown(value)}, it must be true or false", name)
    return bool(value)


def content_text(content: object, param: str) -> str:
    """A message's content, text or a list of text parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise Refusal(400, f"{param} is {shown(content)}, it must be text or a list of parts", param)
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise Refusal(400, f'{param}[{i}] is {shown(part)}, it must be {{"type": "text", "text": ...}}: this model reads text alone', f"{param}[{i}]")
    return "".join(part["text"] for part in content)


def read_messages(body: dict) -> list[dict]:
    """OpenAI's messages -> data's. Refusal 400 for what a template cannot word."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not 1 <= len(messages) <= MAX_MESSAGES:
        what = f"a list of {len(messages)}" if isinstance(messages, list) else "missing" if messages is None else shown(messages)
        raise Refusal(400, f'messages is {what}, it must be a list of 1 to {MAX_MESSAGES} {{"role", "content"}}', "messages")
    read = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise Refusal(400, f'messages[{i}] is {shown(message)}, it must be {{"role", "content"}}', f"messages[{i}]")
        role = message.get("role")
        if role not in ("system", "developer", "user", "assistant"):
            raise Refusal(400, f"messages[{i}].role is {shown(role)}, it must be system, user or assistant", f"messages[{i}].role")
        for key, value in message.items():
            if key not in ("role", "content", "name") and value not in (None, []):
                raise Refusal(400, f"messages[{i}] has {shown(key)}, which this server does not know", f"messages[{i}]")
        read.append({"role": "system" if role == "developer" else role, "content": content_text(message.get("content"), f"messages[{i}].content")})
    return read


def read_prompts(body: dict, tokenizer: Tokenizer, model: Llama, context: int) -> list[list[int]]:
    """The completions endpoint's prompt: text, ids, or a list of either."""
    prompt = body.get("prompt")
    several = prompt if isinstance(prompt, list) and prompt and type(prompt[0]) is not int else [prompt]
    if len(several) > MAX_CHOICES:
        raise Refusal(400, f"prompt is a list of {len(several)}, at most {MAX_CHOICES} are taken at once", "prompt")
    read = []
    for one in several:
        if isinstance(one, str):
            check_characters(len(one), context, "prompt")
            read.append(tokenizer.encode(one))
        elif isinstance(one, list) and one and all(type(i) is int and 0 <= i < model.config.vocab_size for i in one):
            read.append(one)
        else:
            what = "missing" if one is None else shown(one)
            raise Refusal(400, f"prompt is {what}, it must be text, ids from 0 to {model.config.vocab_size - 1}, or a list of either", "prompt")
    return read


def check_characters(characters: int, context: int, param: str) -> None:
    """Refuse what is far too long before it is tokenized, which takes time by its length."""
    if characters > 32 * context + 1024:
        raise Refusal(400, f"the prompt has {characters} characters, the model's context is {context} tokens: shorten the prompt", param, "context_length_exceeded")


def read_stops(body: dict) -> tuple[str, ...]:
    stop = body.get("stop")
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or any(not isinstance(s, str) or not 0 < len(s) <= 1000 for s in stops):
        raise Refusal(400, f"stop is {shown(stop)}, it must be text or a list of at most {MAX_STOPS} texts, none of them empty", "stop")
    return tuple(stops)


class Wish(NamedTuple):
    """A request, read and checked."""
    prompts: list[list[int]]
    n: int
    sampling: Sampling
    stream: bool
    include_usage: bool
    chat: bool


def read_request(body: object, chat: bool, model: Llama, tokenizer: Tokenizer, template: text.Template, context: int, name: str) -> Wish:
    """The JSON body of a completion -> Wish. Refusal with the parameter's name for whatever is not right with it."""
    if not isinstance(body, dict):
        raise Refusal(400, f"the body is {shown(body)}, it must be a JSON object")
    known = KNOWN | ({"messages", "max_completion_tokens", "top_logprobs"} if chat else {"prompt"})
    for key, value in body.items():
        if key not in known and value is not None and not (key in NEUTRAL and value in NEUTRAL[key]):
            does = "asks for what this server does not do" if key in NEUTRAL else "is not a field that this server knows"
            raise Refusal(400, f"{shown(key)} {does}: leave it out", key[:60])
    if body.get("model") not in (None, name):
        raise Refusal(404, f"model is {shown(body['model'])}, this server has {name!r} alone", "model", "model_not_found")
    if not isinstance(body.get("user"), str | None):
        raise Refusal(400, f"user is {shown(body['user'])}, it must be text", "user")
    stream, options = flag(body, "stream"), body.get("stream_options")
    if options is not None and (not isinstance(options, dict) or not set(options) <= {"include_usage", "include_obfuscation"}):
        raise Refusal(400, f'stream_options is {shown(options)}, it must be {{"include_usage": true or false}}', "stream_options")
    n = number(body, "n", 1, 1, MAX_CHOICES, whole=True)
    if chat:
        messages = read_messages(body)
        check_characters(sum(len(message["content"]) for message in messages), context, "messages")
        try:
            prompts = [text.encode_prompt(messages, tokenizer, template)]
        except ValueError as error:
            raise Refusal(400, f"messages: {error}", "messages") from None
    else:
        prompts = read_prompts(body, tokenizer, model, context)
    if len(prompts) * n > MAX_CHOICES:
        raise Refusal(400, f"n is {n} for {len(prompts)} prompts, at most {MAX_CHOICES} answers are given at once", "n")
    longest = max(map(len, prompts))
    if longest >= context:
        raise Refusal(400, f"the prompt has {longest} tokens, the model's context is {context}, which leaves no room for an answer: shorten the prompt",
                      "messages" if chat else "prompt", "context_length_exceeded")
    key = "max_completion_tokens" if chat and body.get("max_completion_tokens") is not None else "max_tokens"
    most = number(body, key, None, 1, 2**31, whole=True)
    if most is not None and longest + most > context:
        raise Refusal(400, f"the prompt has {longest} tokens and {key} is {most}, together more than the model's context of {context}: lower {key} to {context - longest} or leave it out",
                      key, "context_length_exceeded")
    if most is None:  # OpenAI's defaults: 16 for a completion, what fits for a chat
        most = context - longest if chat else min(16, context - longest)
    if chat:
        alternatives = number(body, "top_logprobs", 0, 0, 20, whole=True)
        logprobs = alternatives if flag(body, "logprobs") else None
        if body.get("top_logprobs") is not None and logprobs is None:
            raise Refusal(400, "top_logprobs needs logprobs to be true", "top_logprobs")
    else:
        logprobs = number(body, "logprobs", None, 0, 5, whole=True)
    sampling = Sampling(most, float(number(body, "temperature", 1.0, 0, 2)), float(number(body, "top_p", 1.0, 0, 1, above=True)),
                        number(body, "seed", secrets.randbits(62), -2**63, 2**64, whole=True), read_stops(body),
                        float(number(body, "presence_penalty", 0.0, -2, 2)), float(number(body, "frequency_penalty", 0.0, -2, 2)), logprobs, flag(body, "ignore_eos"))
    return Wish(prompts, n, sampling, stream, stream and isinstance(options, dict) and flag(options, "include_usage"), chat)


# ---- answers --------------------------------------------------------------------------------------------------------

class Form:
    """Words events as OpenAI's JSON: a chat's or a completion's, whole or as chunks of a stream."""

    def __init__(self, wish: Wish, name: str, tokenizer: Tokenizer):
        self.wish, self.tokenizer = wish, tokenizer
        kind = ("chat.completion.chunk" if wish.stream else "chat.completion") if wish.chat else "text_completion"
        self.head = {"id": f"{'chatcmpl' if wish.chat else 'cmpl'}-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": name}

    def chunk(self, event: Event, first: bool) -> dict:
        choice = {"index": event.index, "logprobs": self.logprobs(event), "finish_reason": event.finish}
        if self.wish.chat:
            choice["delta"] = ({"role": "assistant"} if first else {}) | ({"content": event.text} if event.text or first else {})
        else:
            choice["text"] = event.text
        return self.head | {"choices": [choice]} | ({"usage": None} if self.wish.include_usage else {})

    def whole(self, events: list[Event], usage: dict) -> dict:
        choices = []
        for index in range(len(self.wish.prompts) * self.wish.n):
            own = [event for event in events if event.index == index]
            joined = Event(index, "".join(event.text for event in own), sum((event.logprobs for event in own), ()), own[-1].finish)
            choice = {"index": index, "logprobs": self.logprobs(joined), "finish_reason": joined.finish}
            choices.append(choice | ({"message": {"role": "assistant", "content": joined.text, "refusal": None}} if self.wish.chat else {"text": joined.text}))
        return self.head | {"choices": choices, "usage": usage}

    def logprobs(self, event: Event) -> dict | None:
        if self.wish.sampling.logprobs is None:
            return None
        if self.wish.chat:
            rows = [self.entry(token, logprob) | {"top_logprobs": [self.entry(*other) for other in top]} for _, token, logprob, top in event.logprobs]
            return {"content": rows, "refusal": None}
        return {"tokens": [self.entry(token, logprob)["token"] for _, token, logprob, _ in event.logprobs], "token_logprobs": [logprob for *_, logprob, _ in event.logprobs],
                "top_logprobs": [{self.entry(*other)["token"]: other[1] for other in top} for *_, top in event.logprobs], "text_offset": [start for start, *_ in event.logprobs]}

    def entry(self, token: int, logprob: float) -> dict:
        raw = self.tokenizer.token_bytes(token)
        return {"token": raw.decode("utf-8", "backslashreplace"), "logprob": max(logprob, -9999.0), "bytes": list(raw)}


def to_json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")  # half an emoji in a request cannot be said in UTF-8


def prometheus(engine: Engine) -> str:
    """The counters as Prometheus reads them."""
    c = engine.counters
    rows = [("octet_slots", "gauge", "slots of the cache", len(engine.held)), ("octet_slots_used", "gauge", "slots with an answer on its way", len(engine.running)),
            ("octet_waiting", "gauge", "answers waiting for a slot", len(engine.waiting)),
            ("octet_steps_total", "counter", "forward passes", c["steps"]), ("octet_requests_total", "counter", "requests accepted", c["requests"]),
            ("octet_answers_total", "counter", "answers completed", c["answers"]), ("octet_refused_total", "counter", "requests refused by a full queue", c["refused"]),
            ("octet_left_total", "counter", "requests whose client left", c["left"]), ("octet_failed_total", "counter", "requests that failed", c["failed"]),
            ("octet_prompt_tokens_total", "counter", "prompt tokens computed", c["prompt_tokens"]), ("octet_prefix_tokens_reused_total", "counter", "prompt tokens taken from the cache", c["prefix_tokens"]),
            ("octet_completion_tokens_total", "counter", "tokens sampled", c["completion_tokens"]),
            ("octet_first_token_seconds_sum", "counter", "time to first token, summed", c["first_token_seconds"]), ("octet_first_token_seconds_count", "counter", "first tokens", c["first_tokens"])]
    return "".join(f"# HELP {name} {text}\n# TYPE {name} {kind}\n{name} {value}\n" for name, kind, text, value in rows)


# ---- curves ---------------------------------------------------------------------------------------------------------

def read_curves(folder: Path, points: int = 400) -> list[dict]:
    """Of every run under the folder: name, curves {metric: [[step, value], ...]} thinned to about so many points, gold score
    before and after. Files are named by the folder alone, never by a request."""
    runs = []
    for file in sorted(folder.glob("*/metrics.jsonl")):
        if not file.resolve().is_relative_to(folder.resolve()):
            continue
        rows = []
        for line in file.read_text("utf-8", "replace").splitlines()[-100_000:]:
            try:
                row = json.loads(line)
            except ValueError:
                continue  # the last line of a run at work may be half a line
            if isinstance(row, dict) and type(row.get("step")) in (int, float):
                rows.append(row)
        thin = rows[::-max(1, len(rows) // points)][::-1]  # counted from the end: the newest is always there
        keys = sorted({key for row in thin for key, value in row.items() if type(value) in (int, float) and key != "step"})
        curves = {key: [[row["step"], row[key]] for row in thin if type(row.get(key)) in (int, float) and math.isfinite(row[key])] for key in keys}
        summary = {}
        if (file.parent / "summary.json").is_file():
            try:
                summary = read_json(file.parent / "summary.json")
            except (ValueError, OSError):
                pass  # a run that is being written
        gold = {key: summary[key] for key in ("gold_before", "gold_after", "gold") if type(summary.get(key)) in (int, float)}
        runs.append({"name": file.parent.name, "curves": curves, "changed": file.stat().st_mtime} | gold)
    return runs


# ---- HTTP -----------------------------------------------------------------------------------------------------------

class Reader(io.RawIOBase):
    """A socket that is read with a bound on bytes and on time, both for a whole request: a byte now and then is no way around."""

    def __init__(self, connection: socket.socket):
        self.connection, self.bytes, self.deadline = connection, 0, 0.0

    def allow(self, amount: int, seconds: float) -> None:
        self.bytes, self.deadline = amount, time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        if self.bytes <= 0:
            raise Refusal(431, f"the head of the request is longer than {HEAD_BYTES} bytes")
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.connection.settimeout(left)
        count = self.connection.recv_into(buffer)
        self.bytes -= count
        return count


def host_allowed(host: str | None, names: set[str]) -> bool:
    """Whether a Host header names this server by an address or a name of its own. A page elsewhere can have its own name lead
    to 127.0.0.1 (DNS rebinding), but then the browser sends that name."""
    name = (host or "").rpartition("]")[0].removeprefix("[") if (host or "").startswith("[") else (host or "").partition(":")[0]
    try:
        ipaddress.ip_address(name)
        return True
    except ValueError:
        return name.lower() in names


def page_policy(page: str) -> str:
    """What the page's browser may do: run this one script and style, talk to this server, nothing else."""
    own = {tag: base64.b64encode(hashlib.sha256(page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0].encode()).digest()).decode() for tag in ("script", "style")}
    return (f"default-src 'none'; connect-src 'self'; img-src data:; style-src 'sha256-{own['style']}'; script-src 'sha256-{own['script']}'; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


class Handler(BaseHTTPRequestHandler):
    """One connection. Every path ends in one answer: text, JSON, a stream, or an error in OpenAI's form."""
    protocol_version, server_version, sys_version = "HTTP/1.1", "octet", ""
    wbufsize, disable_nagle_algorithm, timeout = 2**16, True, REQUEST_SECONDS

    def setup(self) -> None:
        super().setup()
        self.reader = Reader(self.connection)
        self.rfile = io.BufferedReader(self.reader, 8192)

    def handle_one_request(self) -> None:
        self.close_connection, self.sent, self.unread, self.command, self.path = True, None, 0, "", ""
        self.headers, self.request_version, self.requestline, self.began = {}, "HTTP/1.1", "", time.perf_counter()
        try:
            self.reader.allow(HEAD_BYTES, self.server.request_seconds)
            self.raw_requestline = self.rfile.readline(HEAD_BYTES + 1)
            if not self.raw_requestline:
                return
            self.began = time.perf_counter()
            if not self.parse_request():  # it has answered, through send_error
                return
            if self.request_version == "HTTP/0.9":
                return self.send_error(400, "HTTP/0.9")
            try:
                self.answer()
            except Refusal as refusal:
                self.refuse(refusal)
        except Refusal as refusal:  # out of the reader, in the middle of the head
            self.unread = BODY_BYTES  # or whatever else may come
            self.refuse(refusal)
        except (TimeoutError, OSError):
            self.close_connection = True  # the client is slow or has left
        except Exception:
            traceback.print_exc()
            self.refuse(Refusal(500, "the server failed: see its log"))

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Called by the standard library for what it cannot parse."""
        self.close_connection = True
        self.request_version = "HTTP/1.1"
        self.refuse(Refusal(int(code), f"the request cannot be read ({message or HTTPStatus(code).phrase})"))

    def handle_expect_100(self) -> bool:
        """curl asks before it sends a longer body, and waits."""
        super().handle_expect_100()
        self.wfile.flush()
        return True

    def refuse(self, refusal: Refusal) -> None:
        if self.sent is not None:  # in the middle of an answer
            self.close_connection = True
            return
        if self.unread:  # what was not read would be taken for the next request; closing with it unread loses our answer on its way
            self.close_connection = True
        self.send(refusal.status, to_json(refusal.body), headers=refusal.headers)
        if self.unread:
            self.discard()

    def discard(self) -> None:
        """Read off the rest of a body that is refused, within bounds, so that the client gets to read the answer."""
        try:
            self.connection.shutdown(socket.SHUT_WR)
            self.reader.allow(64 * BODY_BYTES, 5.0)
            while self.unread > 0 and (part := self.rfile.read(min(self.unread, 2**16))):
                self.unread -= len(part)
        except (OSError, Refusal):
            pass

    def send(self, status: int, content: bytes, kind: str = "application/json", headers: dict | None = None) -> None:
        self.connection.settimeout(self.server.request_seconds)
        self.begin(status, kind, {"Content-Length": str(len(content)), **(headers or {})})
        if self.command != "HEAD" and status != 304:
            self.wfile.write(content)
        self.wfile.flush()

    def begin(self, status: int, kind: str, headers: dict) -> None:
        self.sent = status
        self.send_response_only(status)
        origin = self.server.cors
        cors = {"Access-Control-Allow-Origin": origin, "Vary": "Origin"} if origin else {}
        close = {"Connection": "close"} if self.close_connection else {}
        for name, value in {"Content-Type": kind, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store", **cors, **close, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.log(status)

    def log(self, status: int) -> None:
        if self.server.verbose:  # ascii() escapes whatever a request may have put there
            print(f"{self.client_address[0]} {ascii(self.command)[1:-1][:20]} {ascii(self.path)[1:-1][:200]} {status} {1e3 * (time.perf_counter() - self.began):.0f} ms", file=sys.stderr, flush=True)

    # -- what is asked for

    def answer(self) -> None:
        length = self.body_length()
        self.unread = length
        self.check_host()
        path = self.path.partition("?")[0].rstrip("/") or "/"
        if self.command == "OPTIONS" and self.server.cors:
            return self.send(204, b"", headers={"Access-Control-Allow-Methods": "GET, POST", "Access-Control-Allow-Headers": "Authorization, Content-Type", "Access-Control-Max-Age": "600"})
        get = {"/": self.get_page, "/health": self.get_health, "/metrics": self.get_metrics, "/runs": self.get_runs, "/v1/models": self.get_models}
        get |= {f"/v1/models/{self.server.name}": self.get_model}
        post = {"/v1/completions": False, "/v1/chat/completions": True}
        if path not in get and path not in post:
            raise Refusal(404, f"{shown(path)} is not here: there are {', '.join(list(get)[:5])}, {' and '.join(post)}")
        allowed = ("GET", "HEAD") if path in get else ("POST",)
        if self.command not in allowed:
            raise Refusal(405, f"{path} answers {' and '.join(allowed)}, not {shown(self.command)}", headers={"Allow": ", ".join(allowed)})
        if path not in ("/", "/health"):
            self.check_key()
        if path in get:
            if length:
                raise Refusal(400, f"{self.command} takes no body")
            return get[path]()
        if self.headers.get_content_type() != "application/json":  # what a form or a script elsewhere can send without asking is not
            raise Refusal(415, "Content-Type must be application/json")
        self.complete(self.read_body(length), post[path])

    def body_length(self) -> int:
        if self.headers.get("Transfer-Encoding"):
            self.close_connection = True
            raise Refusal(411, "Transfer-Encoding is not taken: send Content-Length")
        lengths = set(self.headers.get_all("Content-Length", []))
        if not lengths:
            if self.command == "POST":
                self.close_connection = True
                raise Refusal(411, "Content-Length is missing")
            return 0
        text = lengths.pop()
        if lengths or not text.isascii() or not text.isdigit() or len(text) > 18:
            self.close_connection = True
            raise Refusal(400, "Content-Length must be one whole number")
        self.unread = int(text)
        if self.unread > BODY_BYTES:
            raise Refusal(413, f"the body has {text} bytes, at most {BODY_BYTES} are taken")
        return int(text)

    def check_host(self) -> None:
        hosts = self.headers.get_all("Host", [])
        if self.request_version == "HTTP/1.0" and not hosts:
            return  # no browser
        if len(hosts) != 1 or not host_allowed(hosts[0], self.server.names):
            raise Refusal(403, f"Host {shown(hosts[0] if hosts else None)} is not a name of this server: --allow_host NAME adds one")
        origin = self.headers.get("Origin")
        if origin is not None and origin != self.server.cors and origin.partition("://")[2] != hosts[0]:
            raise Refusal(403, f"a page of {shown(origin)} may not use this server: --cors ORIGIN would allow one")

    def check_key(self) -> None:
        if self.server.api_key is None:
            return
        scheme, _, key = self.headers.get("Authorization", "").partition(" ")
        same = hmac.compare_digest(key.strip().encode("utf-8", "surrogateescape"), self.server.api_key.encode())  # in constant time
        if scheme.lower() != "bearer" or not same:
            raise Refusal(401, "the API key is missing or wrong: send it as Authorization: Bearer KEY", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def read_body(self, length: int) -> object:
        self.reader.allow(length + 1, max(1.0, self.reader.deadline - time.monotonic()))
        raw = self.rfile.read(length)
        self.unread = 0
        if len(raw) < length:
            raise ConnectionError("the client closed in the middle of its body")

        def refuse(constant: str):
            raise ValueError(f"{constant} is not JSON")
        try:
            return json.loads(raw.decode("utf-8"), parse_constant=refuse)
        except (ValueError, RecursionError) as error:
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error).partition("\n")[0][:200]
            raise Refusal(400, f"the body is not JSON ({reason})") from None

    def get_page(self) -> None:
        self.send(200, PAGE.encode(), "text/html; charset=utf-8", {"Content-Security-Policy": page_policy(PAGE), "Referrer-Policy": "no-referrer"})

    def get_health(self) -> None:
        engine = self.server.engine
        ok = engine.is_alive() and not engine.draining
        self.send(200 if ok else 503, to_json({"status": "ok" if ok else "shutting down", "slots": len(engine.held), "used": len(engine.running), "waiting": len(engine.waiting)}))

    def get_metrics(self) -> None:
        self.send(200, prometheus(self.server.engine).encode(), "text/plain; version=0.0.4; charset=utf-8")

    def get_runs(self) -> None:
        body = to_json({"runs": read_curves(self.server.runs) if self.server.runs.is_dir() else []})
        tag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'
        same = self.headers.get("If-None-Match") == tag
        self.send(304 if same else 200, b"" if same else body, headers={"ETag": tag, "Cache-Control": "no-cache"})

    def model_card(self) -> dict:
        return {"id": self.server.name, "object": "model", "created": self.server.created, "owned_by": "octet", "max_model_len": self.server.engine.context}

    def get_models(self) -> None:
        self.send(200, to_json({"object": "list", "data": [self.model_card()]}))

    def get_model(self) -> None:
        self.send(200, to_json(self.model_card()))

    def complete(self, body: object, chat: bool) -> None:
        server = self.server
        wish = read_request(body, chat, server.engine.model, server.tokenizer, server.template, server.engine.context, server.name)
        job = Job(wish.prompts, wish.n, wish.sampling, server.tokenizer, chat, self.connection)
        server.engine.submit(job)
        server.open_jobs.add(job)
        try:
            (self.stream if wish.stream else self.whole)(job, Form(wish, server.name, server.tokenizer))
        finally:
            job.left = True  # frees its slots if an error has brought us here
            server.open_jobs.discard(job)

    def whole(self, job: Job, form: Form) -> None:
        events, open_answers = [], len(job.answers)
        while open_answers:
            event = job.events.get()
            if event.error:
                raise event.error
            events.append(event)
            open_answers -= event.finish is not None
        self.send(200, to_json(form.whole(events, job.usage())))

    def stream(self, job: Job, form: Form) -> None:
        open_answers, begun = len(job.answers), set()
        while open_answers:
            event, chunks = job.events.get(), []
            while event is not None:  # what has come meanwhile goes off together
                if event.error and self.sent is None:
                    raise event.error
                chunks.append(event.error.body if event.error else form.chunk(event, event.index not in begun))
                begun.add(event.index)
                open_answers = 0 if event.error else open_answers - (event.finish is not None)
                try:
                    event = job.events.get_nowait() if open_answers else None
                except Empty:
                    event = None
            if not open_answers:
                if form.wish.include_usage and "error" not in chunks[-1]:
                    chunks.append(form.head | {"choices": [], "usage": job.usage()})
                chunks.append("[DONE]")
            self.send_events(chunks)
            if open_answers:
                time.sleep(STREAM_PAUSE)
        self.send_part(b"")

    def send_events(self, chunks: list) -> None:
        if self.sent is None:
            self.connection.settimeout(self.server.request_seconds)
            chunked = self.request_version != "HTTP/1.0"
            self.close_connection = self.close_connection or not chunked
            self.begin(200, "text/event-stream; charset=utf-8", {"Transfer-Encoding": "chunked"} if chunked else {})
        self.send_part(b"".join(b"data: " + (chunk.encode() if isinstance(chunk, str) else to_json(chunk)) + b"\n\n" for chunk in chunks))

    def send_part(self, content: bytes) -> None:
        chunked = self.request_version != "HTTP/1.0"
        self.wfile.write(b"%x\r\n%b\r\n" % (len(content), content) if chunked else content)
        self.wfile.flush()


class Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 1024

    def __init__(self, address: tuple[str, int], engine: Engine, tokenizer: Tokenizer, template: text.Template, name: str, runs: Path = Path("out"),
                 api_key: str | None = None, cors: str | None = None, allow_hosts: tuple[str, ...] = (), verbose: bool = False, request_seconds: float = REQUEST_SECONDS):
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.engine, self.tokenizer, self.template, self.name, self.runs = engine, tokenizer, template, name, runs
        self.api_key, self.cors, self.verbose, self.request_seconds, self.created = api_key, cors, verbose, request_seconds, int(time.time())
        self.names = {"localhost", address[0].lower(), socket.gethostname().lower(), *(host.lower() for host in allow_hosts)}
        self.places, self.open_jobs = threading.Semaphore(MAX_CONNECTIONS), set()
        super().__init__(address, Handler)

    def server_bind(self) -> None:  # the standard library's asks a name server for our name, which can take seconds
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.server_address[:2]

    def process_request(self, request, client_address) -> None:
        if self.places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request, client_address) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.places.release()

    def finish(self, seconds: float) -> None:
        """Let go of the address once all answers are on their way, or after so long."""
        deadline = time.monotonic() + seconds
        while self.open_jobs and time.monotonic() < deadline:
            time.sleep(0.01)
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a client that has left is no error
            traceback.print_exc()


# ---- opening --------------------------------------------------------------------------------------------------------


def open_model(directory: Path, quant: str | None, dtype: torch.dtype | None, device: str) -> Llama:
    """A plain or quantized directory, or an adapter, which is merged into a plain base and stays beside a quantized one."""
    base = lora.base_path(directory) if lora.is_adapter(directory) else directory
    config = base / "config.json"
    if quantized := quant is not None or config.is_file() and bool(read_json(config).get("quantization_config")):
        model = quantize.open_model(base, dtype, device, quant=quant)
    else:
        model = Llama.from_pretrained(base, dtype, device)
    if base != directory:
        lora.load_adapter(model, directory)
        if not quantized:
            lora.fold(model)
    return model.eval()


# ---- measuring ------------------------------------------------------------------------------------------------------

class Folded(Tokenizer):
    """A stand-in for a model of random weights: every id has the text of some piece of a smaller vocabulary."""

    def token_bytes(self, i: int) -> bytes:
        return super().token_bytes(3 + i % (self.vocab_size - 3))


def random_prompts(count: int, tokens: int, vocab: int, seed: int) -> list[list[int]]:
    """Prompts that share nothing with one another nor with those of another seed, so that none is found in the cache."""
    return torch.randint(3, vocab, (count, tokens), generator=torch.Generator().manual_seed(seed)).tolist()


def ask(url: str, prompt: list[int], new: int, key: str | None) -> dict:
    """One streamed request over HTTP: seconds to its first token and to its last, and the number of tokens by its usage."""
    host = url.partition("://")[2].rstrip("/")
    body = {"prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    connection = http.client.HTTPConnection(host, timeout=600)
    began = time.perf_counter()
    connection.request("POST", "/v1/completions", to_json(body), {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})})
    response = connection.getresponse()
    if response.status != 200:
        raise ValueError(f"{url} answers {response.status}: {response.read(500).decode('utf-8', 'replace')}")
    first = last = usage = None
    for line in response:
        if line.startswith(b"data: {"):
            last = time.perf_counter()
            first = first or last
            usage = json.loads(line[6:]).get("usage") or usage
    connection.close()
    if usage is None:
        raise ValueError(f"{url} sent no usage at the end of its stream")
    return {"first": first - began, "last": last - began, "tokens": usage["completion_tokens"]}


def quantile(values: list[float], share: float) -> float:
    """The value that this share of them does not exceed."""
    return sorted(values)[min(len(values) - 1, math.ceil(share * len(values)) - 1)]


def measure(one: Callable[[list[int]], dict], prompts: list[list[int]], concurrency: int) -> dict:
    """Let so many clients ask, each its next question when it has its answer (a closed loop). Only new tokens are counted;
    a request's tokens/s are those after its first token, the total's over the whole time."""
    left, done = deque(prompts), []

    def client() -> None:
        with suppress(IndexError):
            while True:
                done.append(one(left.popleft()))
    threads = [threading.Thread(target=client) for _ in range(concurrency)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    if len(done) < len(prompts):
        raise ValueError(f"{len(prompts) - len(done)} of {len(prompts)} requests failed: see above")
    first, each = [row["first"] for row in done], [(row["tokens"] - 1) / max(row["last"] - row["first"], 1e-9) for row in done]
    return {"concurrency": concurrency, "requests": len(done), "prompt_tokens": len(prompts[0]), "new_tokens": done[0]["tokens"],
            "first_token_ms_p50": 1e3 * quantile(first, 0.5), "first_token_ms_p95": 1e3 * quantile(first, 0.95),
            "tokens_per_second_each_p50": quantile(each, 0.5), "tokens_per_second_each_slowest_5_percent": quantile(each, 0.05),
            "tokens_per_second": sum(row["tokens"] for row in done) / seconds, "seconds": seconds}


def ask_engine(engine: Engine, tokenizer: Tokenizer, new: int, prompt: list[int]) -> dict:
    """`ask` without HTTP."""
    job = Job([prompt], 1, Sampling(new, temperature=0.0, ignore_eos=True), tokenizer, chat=False)
    began = time.perf_counter()
    engine.submit(job)
    while not (event := job.events.get()).finish:
        if event.error:
            raise event.error
    return {"first": job.first - began, "last": time.perf_counter() - began, "tokens": job.completion_tokens}


def print_row(row: dict, name: str) -> None:
    print(f"{name:<8}{row['concurrency']:>8}{row['requests']:>10}{row['first_token_ms_p50']:>12.0f}{row['first_token_ms_p95']:>7.0f}{row['tokens_per_second_each_p50']:>14.1f}"
          f"{row['tokens_per_second_each_slowest_5_percent']:>9.1f}{row['tokens_per_second']:>12.1f}", flush=True)


def benchmark_url(url: str, args: argparse.Namespace, vocab: int) -> list[dict]:
    """The client's side, for this server or any other."""
    print(f"prompts of {args.prompt_tokens} random tokens, {args.new_tokens} new ones, greedy, EOS ignored\n"
          f"{'through':<8}{'clients':>8}{'requests':>10}{'first token':>12}{'p95':>7}{'tokens/s each':>14}{'slowest':>9}{'in all':>12}\n"
          f"{'':<26}{'ms p50':>12}{'ms':>7}{'p50':>14}{'5 %':>9}", flush=True)
    rows = []
    for concurrency in args.concurrency:
        if not rows:
            ask(url, random_prompts(1, args.prompt_tokens, vocab, 1)[0], 4, args.api_key)  # warms up
        prompts = random_prompts(concurrency * args.rounds, args.prompt_tokens, vocab, 2 + len(rows))
        rows.append(measure(lambda prompt: ask(url, prompt, args.new_tokens, args.api_key), prompts, concurrency))
        print_row(rows[-1], "HTTP")
    return rows


# ---- command line ---------------------------------------------------------------------------------------------------

def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = run.Parser("Serve a model over OpenAI's HTTP interface, with a page to talk to it and to watch training; or measure how fast that is.")
    parser.add_argument("directory", nargs="?", default="out/ppo", help=f"weights directory: Hugging Face or Meta layout, quantized, or a LoRA adapter; with --benchmark also a shape with random weights ({' '.join(SHAPES)}), or the URL of a server")
    # model
    parser.add_argument("--quant", choices=["8bit", "4bit"], help="quantize a plain directory at load by rounding to nearest (the head to 8 bits); on a quantized one it must agree")
    parser.add_argument("--dtype", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="auto: bf16 on CUDA, fp32 elsewhere")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="auto: cuda where there is one, else cpu")
    parser.add_argument("--template", choices=sorted(text.TEMPLATES), help="prompt template of chats (the one that the directory names, else plain)")
    # engine
    parser.add_argument("--max_batch", type=int, default=16, help="answers at once: slots of the cache")
    parser.add_argument("--max_len", type=int, help="tokens that a slot has room for, prompt and answer (the model's context)")
    parser.add_argument("--max_waiting", type=int, default=256, help="answers that may wait for a slot; further requests get 429")
    # HTTP
    parser.add_argument("--http_host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--http_port", type=int, default=7070, help="0 takes a free one")
    parser.add_argument("--api_key", help="ask clients for this key")
    parser.add_argument("--cors", metavar="ORIGIN", help="let pages of this origin use the server, such as https://example.org")
    parser.add_argument("--allow_host", nargs="+", default=[], metavar="NAME", help="further names of this server, as a proxy in front of it sends them in Host")
    parser.add_argument("--runs", type=Path, default=Path("out"), help="folder of the runs whose curves the page shows")
    # measuring
    parser.add_argument("--benchmark", action="store_true", help="measure instead of serving: clients that ask over HTTP, each its next question when it has its answer")
    parser.add_argument("--concurrency", default="1,4,16", help="numbers of clients, one line of the table each")
    parser.add_argument("--prompt_tokens", type=int, default=32, help="length of the benchmark's prompts")
    parser.add_argument("--new_tokens", type=int, default=64, help="length of its answers")
    parser.add_argument("--rounds", type=int, default=3, help="questions of each client")
    parser.add_argument("--json", type=Path, default=Path("out/benchmark.json"), help="file for its figures")
    parser.add_argument("--vocab", type=int, default=1000, help="the benchmark of a URL draws its prompts from ids below this")
    args = parser.parse_args(argv)
    try:
        args.concurrency = [int(part) for part in args.concurrency.split(",")]
    except ValueError:
        raise ValueError(f"--concurrency {args.concurrency} is no list of numbers such as 1,4,16") from None
    for name, value in [(name, getattr(args, name)) for name in ("max_batch", "prompt_tokens", "new_tokens", "rounds")] + [("concurrency", min(args.concurrency))]:
        if value < 1:
            raise ValueError(f"--{name} is {value}, it must be at least 1")
    for name, most in (("max_waiting", 2**20), ("http_port", 65535)):
        if not 0 <= getattr(args, name) <= most:
            raise ValueError(f"--{name} is {getattr(args, name)}, it must be from 0 to {most}")
    if args.api_key is not None and not (args.api_key and args.api_key.isascii() and args.api_key.isprintable() and " " not in args.api_key):
        raise ValueError("--api_key must be printable ASCII without spaces: it travels in a header")
    if args.cors is not None and not (args.cors.isascii() and args.cors.startswith(("http://", "https://")) and args.cors.count("/") == 2):
        raise ValueError(f"--cors {args.cors!r} is no origin such as https://example.org")
    return args


def open_everything(args: argparse.Namespace) -> tuple[Llama, Tokenizer, text.Template, str]:
    """Model, tokenizer, template and the name to serve it by."""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    dtype = DTYPES[("bf16" if device == "cuda" else "fp32") if args.dtype == "auto" else args.dtype]
    directory = Path(args.directory)
    if args.benchmark and args.directory in SHAPES and not directory.exists():
        model = random_model(SHAPES[args.directory], dtype, device).eval()
        if args.quant:
            quantize.round_model(model, args.quant, device)
        return model, Folded(demo.FOLDER), text.TEMPLATES["plain"], args.directory
    if args.directory == "out/ppo" and not any((directory / name).exists() for name in ("config.json", lora.CONFIG)):
        raise FileNotFoundError("out/ppo has no finished model: run `python ppo.py` first, which makes it, or name a weights directory")
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} does not exist: name a weights directory")
    own = lora.home(directory)
    tokenizer = Tokenizer(own)
    named = args.template or read_template(own)
    if named not in text.TEMPLATES:
        what = f"the prompt template {named}, which is not known here" if named else "no prompt template"
        print(f"note: {own} names {what}: chats are worded by the plain one; --template chooses another")
        named = "plain"
    model = open_model(directory, args.quant, dtype, device)
    check_tokenizer(tokenizer, model.config.vocab_size)
    return model, tokenizer, text.TEMPLATES[named], directory.resolve().name


def apart(call: Callable, *arguments):
    """call(*arguments) in a thread that ends with it. For all that computes before the engine does: each thread that computes gets
    OpenMP workers of its own, and where those of all threads together outnumber the cores, GNU's OpenMP puts workers to sleep
    between any two operations. Waking them for each made a step of 8 rows of a 1.1 G model take 155 ms, instead of 123."""
    future = Future()

    def work() -> None:
        try:
            future.set_result(call(*arguments))
        except BaseException as error:
            future.set_exception(error)
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        thread.join()
    except KeyboardInterrupt:
        os._exit(130)  # while the thread computes: PyTorch aborts, with a message, in threads that Python ends on its way out
    return future.result()


def start_engine(args: argparse.Namespace) -> tuple[Engine, Tokenizer, text.Template, str]:
    model, tokenizer, template, name = open_everything(args)
    return make_engine(model, args), tokenizer, template, name


def make_engine(model: Llama, args: argparse.Namespace) -> Engine:
    context = model.config.max_seq_len
    if args.max_len is not None and not 2 <= args.max_len <= context:
        raise ValueError(f"--max_len {args.max_len} must be from 2 to the model's context of {context}")
    try:
        engine = Engine(model, args.max_batch, args.max_len, args.max_waiting)
    except RuntimeError as error:  # no memory
        raise ValueError(f"the cache of {args.max_batch} slots with {args.max_len or context} tokens does not fit into memory: lower --max_batch or --max_len ({str(error).partition(chr(10))[0][:100]})") from None
    engine.start()
    return engine


def make_server(args: argparse.Namespace, engine: Engine, tokenizer: Tokenizer, template: text.Template, name: str, port: int, verbose: bool) -> Server:
    try:
        server = Server((args.http_host, port), engine, tokenizer, template, name, args.runs, args.api_key, args.cors, tuple(args.allow_host), verbose)
    except OSError as error:
        raise OSError(f"cannot listen on {args.http_host}:{port} ({error.strerror or error}): choose another --http_host or --http_port") from None
    threading.Thread(target=server.serve_forever, name="server", daemon=True).start()
    return server


def wait_for_signal() -> None:
    """Until SIGTERM or Ctrl-C; a second one ends the process at once."""
    stop = threading.Event()

    def handle(signum, frame) -> None:
        if stop.is_set():
            os._exit(128 + signum)
        stop.set()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, handle)
    stop.wait()


def benchmark(args: argparse.Namespace) -> dict:
    """Start a server, measure it from another process (whose Python does not hold up ours), then the engine without HTTP."""
    run.keep_freed_memory()
    engine, tokenizer, template, name = apart(start_engine, args)
    model = engine.model
    server = make_server(args, engine, tokenizer, template, name, 0, False)
    summary = {"model": name, "dtype": str(model.norm.weight.dtype).removeprefix("torch."), "quant": args.quant, "device": str(model.device), "threads": torch.get_num_threads(),
               "torch": torch.__version__, "slots": args.max_batch, "context": engine.context}
    print(" | ".join(f"{key} {value}" for key, value in summary.items() if value is not None), flush=True)
    host = f"[{args.http_host}]" if ":" in args.http_host else args.http_host
    passed = {"--concurrency": ",".join(map(str, args.concurrency)), "--prompt_tokens": args.prompt_tokens, "--new_tokens": args.new_tokens, "--rounds": args.rounds,
              "--json": args.json, "--vocab": model.config.vocab_size} | ({"--api_key": args.api_key} if args.api_key else {})
    command = [sys.executable, __file__, f"http://{host}:{server.server_port}", "--benchmark", *(str(part) for pair in passed.items() for part in pair)]
    if subprocess.run(command).returncode:
        raise ValueError("the clients of the benchmark failed: see above")
    rows = json.loads(args.json.read_text())["rows"]
    most = max(args.concurrency)
    alone = measure(lambda prompt: ask_engine(engine, tokenizer, args.new_tokens, prompt), random_prompts(most * args.rounds, args.prompt_tokens, model.config.vocab_size, 0), most)
    print_row(alone, "engine")
    through = next(row for row in rows if row["concurrency"] == most)
    summary |= {"rows": rows, "engine": alone, "http_cost": 1 - through["tokens_per_second"] / alone["tokens_per_second"], "prefix_tokens_reused": engine.counters["prefix_tokens"], "peak_memory_bytes": run.peak_memory_bytes(model.device)}
    engine.stop(1.0)
    server.finish(1.0)
    print(f"{most} clients get {through['tokens_per_second'] / rows[0]['tokens_per_second']:.2f} times the tokens of {rows[0]['concurrency']}; HTTP costs {100 * summary['http_cost']:.0f} %; "
          f"peak memory {summary['peak_memory_bytes'] / 1e9:.2f} GB; wrote {args.json}")
    return summary


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    url = args.benchmark and args.directory.startswith("http://")
    if not url:  # else it is `benchmark` that has started this process
        told = vars(args) | {"api_key": args.api_key and "(given)"}
        print("flags: " + " ".join(f"{key}={value}" for key, value in sorted(told.items())), flush=True)
    if args.benchmark:
        summary = {"url": args.directory, "rows": benchmark_url(args.directory, args, args.vocab)} if url else benchmark(args)
        write_file(args.json, json.dumps(summary, indent=1).encode())
        return summary
    run.keep_freed_memory()
    engine, tokenizer, template, name = apart(start_engine, args)
    model = engine.model
    server = make_server(args, engine, tokenizer, template, name, args.http_port, True)
    if not ipaddress.ip_address(server.server_address[0]).is_loopback and args.api_key is None:
        print(f"warning: {args.http_host} can be reached from other machines, and without --api_key anybody may use it", flush=True)
    cache = sum(kv.nbytes for kv in engine.cache.kv)
    print(f"{name}: {engine.model.norm.weight.dtype} on {model.device}, {args.max_batch} slots x {engine.context} tokens, cache {cache / 1e9:.2f} GB\n"
          f"page   http://{args.http_host}:{server.server_port}/\nclient http://{args.http_host}:{server.server_port}/v1", flush=True)
    wait_for_signal()
    print("finishing what runs, at most 30 s; once more to leave at once", flush=True)
    finished = engine.stop(30.0)
    server.finish(2.0)
    print("finished" if finished else "left: some answers were cut short", flush=True)
    return dict(engine.counters)


if __name__ == "__main__":
    run.command(main)
