"""A batching engine, and OpenAI's HTTP interface around it, with a page to talk to the model and to watch training.

    python serve.py out/ppo                                    then open http://127.0.0.1:7070; clients use .../v1
    python serve.py SMOLLM2_DIR --say "What is the capital of France?"                 one answer on the terminal
    python serve.py LLAMA_DIR --quant 4bit --api_key SECRET --http_host 0.0.0.0 --http_port 8080
    python serve.py out/ppo --benchmark --concurrency 1,4,16   real requests over HTTP; mid has random weights,
                                                               http://host:port is any server with this interface

The engine repeats one step (Yu et al. 2022, "Orca": continuous batching). Answers begin and end at any step. A step is
1. one forward call for one token of every answer that is being written, so the weights are read once for all of them;
2. a forward call for a chunk of a prompt (or of several short ones), so a long one delays the answers only a little.
Call 1 needs no copy of the cache, because the answers that are being written always have its first rows:

    a row of the cache holds the keys and values of           in this step the model reads
    row 0  [system prompt|question |answer so f               1 token  \\
    row 1  [system prompt|another question |ans               1 token   } tokens of shape (3, 1)
    row 2  [system prompt|a third question|answer so far      1 token  /
    row 3  [system prompt|old question|old answer             nothing: the row is free, what it holds can be reused
    row 4  [system prompt|a long text, read up to here        64 tokens, of shape (1, 64)

When an answer ends, the last running answer is swapped into its row. A prompt that is read to its end is swapped into
the first row behind the answers. A new prompt copies the keys and values of its beginning from any row that holds them.
An answer's random numbers depend on its seed, choice and position alone: it is the same alone and in a full batch.

Letters: B rows of a call, T tokens in each, C width, V vocabulary; in the cache K key heads, S slots, D a head's size.
"""

import argparse
import hmac
import http.client
import ipaddress
import json
import math
import multiprocessing
import os
import random
import re
import reprlib
import secrets
import signal
import socket
import socketserver
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import numpy as np
import torch
from torch import Tensor

import quantize
from data import demo, run, text, weights
from model import SHAPES, KVCache, Llama, keep_top_p, random_model


# ---- what the engine works on ---------------------------------------------------------------------------------------

class Served(NamedTuple):
    """The model that is served."""
    model: Llama
    tokenizer: text.Tokenizer
    template: text.Template     # words the messages of a chat as one prompt
    name: str
    context: int                # most tokens of a prompt and its answer together


@dataclass(eq=False)
class Request:
    """What a client asks for, in OpenAI's words, and what the engine gives it: Events in a queue, or a Refusal, which
    ends the request."""
    served: Served
    prompts: list[list[int]]
    chat: bool = False
    n: int = 1
    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int | None = None  # how many alternatives to report; None reports nothing
    ignore_eos: bool = False
    stream: bool = False
    include_usage: bool = False

    def __post_init__(self):
        prompts = [prompt for prompt in self.prompts for _ in range(self.n)]
        self.answers = [Answer(self, index, prompt) for index, prompt in enumerate(prompts)]
        self.events: SimpleQueue[Event | Refusal] = SimpleQueue()
        self.over = False                      # set by the thread of its client at the end, or by the engine at a fault
        self.reused = 0                        # prompt tokens whose keys and values were copied
        self.began = time.perf_counter()
        prefix = "chatcmpl-" if self.chat else "cmpl-"
        self.head = {"id": prefix + secrets.token_hex(12), "created": int(time.time()), "model": self.served.name}


# ---- sampling -------------------------------------------------------------------------------------------------------

def uniform(seed: int, choice: int, position: int) -> float:
    """Returns the random number in (0, 1] of a token. It depends on no other row: Random hashes a text by SHA-512."""
    return 1 - random.Random(f"{seed} {choice} {position}").random()


def penalize(logits: Tensor, made: list[int], presence: float, frequency: float) -> None:
    """OpenAI's formula, in place: logits (V) of each token already written lose presence + frequency * times."""
    if made and (presence or frequency):
        times = torch.tensor(made, device=logits.device).bincount(minlength=len(logits))   # (V)
        logits -= presence * (times > 0) + frequency * times


def draw(logits: Tensor, temperature: list[float], top_p: list[float], u: list[float]) -> Tensor:
    """Draws one id for each row of logits (B, V) -> (B,), by inverting the distribution at u: the first token where the
    cumulated probability reaches u. Temperature 0 is argmax. A row with NaN or +infinity in it gives -1."""
    token = logits.argmax(-1)                                                          # (B,)
    if max(temperature) > 0:
        t, p, target = logits.new_tensor([temperature, top_p, u])[..., None]           # (B, 1) each
        scaled = logits / t.clamp(min=1e-6)                                            # (B, V)
        if min(top_p) < 1:
            scaled = keep_top_p(scaled, p)
        total = scaled.softmax(-1).cumsum(-1)                                          # (B, V), at the end 1 or nearly
        drawn = torch.searchsorted(total, target * total[:, -1:])                      # (B, 1)
        token = torch.where(t > 0, drawn, token[:, None])[:, 0]                        # (B,)
    return torch.where(logits.amax(-1).isfinite(), token, -1)


# ---- engine ---------------------------------------------------------------------------------------------------------

CHUNK = 64             # prompt tokens a step on a CPU while answers are written: call 2 takes about as long as call 1
CHUNK_MOST = 512       # prompt tokens a step otherwise: fewer leave a GPU mostly idle
FIRST_SLOTS = 256      # slots of each row on a CPU, until an answer needs more


def common(a: list[int], b: list[int]) -> int:
    """Returns how many ids the common beginning of a and b has."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


class Engine:
    """Owns the model. Any thread may `submit` a Request and wait for its events. One calls `run`, and computes."""

    def __init__(self, served: Served, rows: int = 16, max_waiting: int = 256):
        self.served, self.model, self.max_waiting = served, served.model, max_waiting
        slots = min(FIRST_SLOTS, served.context) if self.model.device.type == "cpu" else served.context
        self.cache = KVCache(self.model.config, rows, slots, self.model.norm.weight.dtype, self.model.device)
        self.rows = Request(served, [[]], n=rows).answers    # the answer that each row has, at first an empty one
        self.count = 0                                       # answers that are being written, in the first rows
        self.reading: list[Answer] = []                      # at most one, whose prompt is being read in some row
        self.waiting: SimpleQueue[Answer] = SimpleQueue()
        self.end = math.inf                                  # time.monotonic() at which `run` stops at the latest
        self.counters = Counter()

    @property
    def running(self) -> list["Answer"]:
        """The answers that are being written: running[i] in row i."""
        return self.rows[:self.count]

    def submit(self, request: Request) -> None:
        """Puts a request's answers into the queue. Refusal 503 while shutting down, 429 when the queue is full."""
        count = self.waiting.qsize()
        if self.end < math.inf:
            raise Refusal(503, "the server is shutting down")
        if count >= self.max_waiting:
            self.counters["refused"] += 1
            raise Refusal(429, f"{count} answers are waiting already: try again later", code="queue_full")
        self.counters["requests"] += 1
        for answer in request.answers:
            self.waiting.put(answer)

    def stop(self, seconds: float) -> None:
        """Refuses new requests from now on, and lets `run` go on for so many seconds with those that it has."""
        self.end = time.monotonic() + seconds

    def run(self) -> bool:
        """Steps until `stop` was called and all answers have ended, or its time is over. Returns whether all ended."""
        try:
            while time.monotonic() < self.end and (
                    self.end == math.inf or self.count or self.reading or self.waiting.qsize()):
                try:
                    self.step()
                except Exception as error:  # a fault of ours, or no memory: it ends the requests of this step
                    traceback.print_exc()
                    for answer in self.rows:
                        answer.done = 0         # its row may be half written
                    why = f"the engine failed ({type(error).__name__}): see the server's log"
                    self.fail(self.running + self.reading, Refusal(500, why))
        finally:
            self.end, rest = 0.0, self.running + self.reading
            while self.waiting.qsize():
                rest.append(self.waiting.get())
            self.fail(rest, Refusal(503, "the server was shut down before the answer was complete"))
        return not rest

    @torch.inference_mode()
    def step(self) -> None:
        """The two calls of the docstring above, after freeing the rows of requests that are over."""
        for answer in self.running:
            if answer.request.over:
                self.release(answer)
        self.reading = [answer for answer in self.reading if not answer.request.over]
        # 1. One token of every answer that is being written.
        if self.count:
            self.sample(self.running, self.forward(self.running))
        # 2. A chunk of one prompt or of several. The logits of a prompt's last token give the first of its answer.
        left = CHUNK if self.count and self.model.device.type == "cpu" else CHUNK_MOST
        while left and (self.reading or self.seat()):
            answer, before = self.reading[0], self.reading[0].done
            logits = self.forward([answer], left)                                      # (1, V)
            new = answer.done - before
            left -= new
            self.counters["prompt_tokens"] += new
            if answer.done == len(answer.prompt):
                self.swap(self.rows.index(answer), self.count)
                self.count += 1
                self.reading = []
                self.sample([answer], logits)

    def forward(self, answers: list["Answer"], most: int = 1) -> Tensor:
        """Reads the next ids of answers in neighbouring rows, at most so many of each. Returns the logits (B, V)."""
        first, done = self.rows.index(answers[0]), [answer.done for answer in answers]
        ids = [(answer.prompt + answer.made)[answer.done:answer.done + most] for answer in answers]
        tokens = torch.tensor(ids, device=self.model.device)                           # (B, T)
        need = max(done) + tokens.shape[1]
        if need > self.cache.kv[-1].shape[3]:
            self.widen(min(2 * need, self.served.context))
        cache = self.cache.rows(first, first + len(answers))
        x = self.model.hidden(tokens, cache=cache, start=done)                         # (B, T, C)
        for answer in answers:
            answer.done += tokens.shape[1]
        self.counters["steps"] += 1
        return self.model.output(x[:, -1]).float()                                     # (B, V)

    def seat(self) -> bool:
        """Gives the first waiting answer a free row, with the beginning of its prompt copied from any row that holds
        it. Returns False if none waits or no row is free. An idle engine waits here for 0.1 s."""
        free = range(self.count, len(self.rows))
        if not free:
            return False
        try:
            while (answer := self.waiting.get(timeout=0 if self.count else 0.1)).request.over:
                pass  # its client has left, or another answer of its request has failed
        except Empty:
            return False
        wanted = answer.prompt[:-1]  # the last token is always computed: its logits are needed
        answer.done, _, source = max((common(other.held, wanted), row in free, row)
                                     for row, other in enumerate(self.rows))
        if source in free and answer.done == self.rows[source].done:  # all of it is reused: a chat goes on in its row
            row = source
        else:                                                         # else into the row that is free for longest
            row = min(free, key=lambda row: self.rows[row].freed)
            for kv in self.cache.kv:                                                   # (2, rows, K, S, D)
                kv[:, row, :, :answer.done] = kv[:, source, :, :answer.done]
        self.rows[row] = answer
        self.reading = [answer]
        if answer.choice == 0:  # usage counts a prompt once, not n times
            answer.request.reused += answer.done
        self.counters["prefix_tokens_reused"] += answer.done
        return True

    def swap(self, a: int, b: int) -> None:
        """Exchanges two rows of the cache. When the answer in row 0 of three ends:

            row 0  [prompt|an answer. EOS             row 0  [another prompt|its answer so f
            row 1  [a prompt|text                     row 1  [a prompt|text
            row 2  [another prompt|its answer so f    row 2  [prompt|an answer. EOS            free
        """
        if a == b:
            return
        longest = max(self.rows[a].done, self.rows[b].done)
        for kv in self.cache.kv:                                                       # (2, rows, K, S, D)
            kv[:, [a, b], :, :longest] = kv[:, [b, a], :, :longest]
        self.rows[a], self.rows[b] = self.rows[b], self.rows[a]

    def widen(self, slots: int) -> None:
        """Gives all rows so many slots, layer by layer, so that a second copy of the cache never exists."""
        for layer, kv in enumerate(self.cache.kv):                                     # (2, rows, K, old S, D)
            self.cache.kv[layer] = torch.nn.functional.pad(kv, (0, 0, 0, slots - kv.shape[3]))  # (2, rows, K, S, D)

    def sample(self, answers: list["Answer"], logits: Tensor) -> None:
        """Gives each answer one token from its row of logits (B, V)."""
        biased = logits.clone()
        for answer, row in zip(answers, biased):
            penalize(row, answer.made, answer.request.presence_penalty, answer.request.frequency_penalty)
        temperature = [answer.request.temperature for answer in answers]
        top_p = [answer.request.top_p for answer in answers]
        u = [uniform(answer.request.seed, answer.choice, len(answer.prompt) + len(answer.made)) for answer in answers]
        ids = draw(biased, temperature, top_p, u).tolist()
        for answer, token, own in zip(answers, ids, logits):
            if answer.request.over:
                continue  # another answer of its request has failed just now
            if token < 0:
                self.clear(answer)
                continue
            self.counters["completion_tokens"] += 1
            if not answer.made:
                self.counters["first_token_seconds_sum"] += time.perf_counter() - answer.request.began
                self.counters["first_token_seconds_count"] += 1
            answer.take(token, own)
            if answer.finish:
                self.counters["answers"] += 1
                self.release(answer)

    def release(self, answer: "Answer") -> None:
        """Frees the row of a running answer. The last running answer is swapped into it."""
        self.count -= 1
        self.swap(self.rows.index(answer), self.count)
        answer.freed = self.counters["steps"]

    def clear(self, answer: "Answer") -> None:
        """Ends an answer whose logits are not finite, and clears its row: behind a mask, 0 * NaN would still be NaN."""
        answer.done = 0
        for kv in self.cache.kv:
            kv[:, self.rows.index(answer)] = 0
        why = "the model gave non-finite logits: its weights or its dtype are broken (try --dtype fp32)"
        self.fail([answer], Refusal(500, why, code="non_finite_logits"))

    def fail(self, answers: list["Answer"], refusal: "Refusal") -> None:
        """Ends the requests of these answers with an error. The next step frees their rows."""
        for request in {answer.request for answer in answers}:
            self.counters["failed"] += 1
            request.over = True
            request.events.put(refusal)


# ---- what the engine gives back: refusals, events, the text of an answer -------------------------------------------

class Refusal(Exception):
    """A refused request: HTTP status, one sentence, the parameter at fault, OpenAI's code for it."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, **headers: str):
        super().__init__(message)
        usual = "server_error" if status >= 500 else "invalid_request_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, usual)
        self.status = status
        self.headers = {"Retry-After": "5"} if status in (429, 503) else headers
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Event(NamedTuple):
    """More of an answer. The thread of the client waits for it."""
    index: int                      # of the answer in its request
    text: str
    tokens: list[tuple[int, dict]]  # with logprobs: where the text of each begins in the answer, and its `report`
    finish: str | None              # "stop" or "length" when the answer has ended
    first: bool                     # the first event of this answer


class Answer:
    """One answer: its prompt, the ids that were sampled, and their text."""

    def __init__(self, request: Request, index: int, prompt: list[int]):
        self.request, self.index, self.prompt = request, index, prompt
        self.choice = index % request.n
        self.made: list[int] = []
        self.done = 0                               # ids of prompt and answer whose keys and values lie in its row
        self.freed = 0                              # the step in which it ended
        self.text = ""
        self.shown = 0                              # characters of text that the client has got
        self.begun = False                          # it has got an event
        self.tokens: list[tuple[int, dict]] = []    # as in Event, those that the client has not got
        self.finish: str | None = None
        self.stops = set() if request.ignore_eos else request.served.model.stops()
        # A completion goes on with its prompt's text, " there" after "Once"; a reply stands by itself.
        self.stream = text.TextStream(request.served.tokenizer, [] if request.chat else prompt[-16:])

    @property
    def held(self) -> list[int]:
        """The ids whose keys and values lie in its row."""
        return (self.prompt + self.made)[:self.done]

    def take(self, token: int, logits: Tensor) -> None:
        """Adds the token that was drawn from logits (V). Puts text that may be shown into the request's queue, as
        it comes for a stream, else all at the end.

        An answer ends at EOS, at max_tokens (either is `over`: nothing will be held back), or at a stop string."""
        request = self.request
        self.made.append(token)
        ended = token in self.stops
        over = ended or len(self.made) == request.max_tokens
        if not ended:
            if request.logprobs is not None:
                self.tokens.append((len(self.text), report(request.served.tokenizer, logits, token, request.logprobs)))
            self.text += self.stream.push(token)
        if over:
            self.text += self.stream.rest()
            self.finish = "stop" if ended else "length"
        end, stopped = cut(self.text, self.shown, request.stop, over)
        if stopped:
            self.finish = "stop"
        if self.finish or request.stream and (end > self.shown or not self.begun):
            ready = len(self.tokens) if over and not stopped else sum(start < end for start, _ in self.tokens)
            new, self.tokens = self.tokens[:ready], self.tokens[ready:]
            request.events.put(Event(self.index, self.text[self.shown:end], new, self.finish, not self.begun))
            self.shown, self.begun = end, True


def report(tokenizer: text.Tokenizer, logits: Tensor, token: int, count: int) -> dict:
    """Returns OpenAI's `logprobs` of a token and of the `count` likeliest at its place, by the model's logits (V)."""
    logprobs = logits.log_softmax(-1)

    def row(i: int) -> dict:
        raw = tokenizer.token_bytes(i)
        said = raw.decode("utf-8", "backslashreplace") or tokenizer.piece(i)  # special tokens add no text
        return {"token": said, "logprob": max(logprobs[i].item(), -9999.0), "bytes": list(raw)}
    return row(token) | {"top_logprobs": [row(i) for i in logprobs.topk(count).indices.tolist()]}


def cut(said: str, start: int, stops: tuple[str, ...], over: bool) -> tuple[int, bool]:
    """Returns how many characters of the text may be shown, and whether a stop string ends it. `start` of them were
    shown. Until the answer is over, a possible beginning of a stop string is held back: "Obs" of "Observation"."""
    found = [at for stop in stops if (at := said.find(stop, start)) >= 0]
    if found or over:
        return min(found, default=len(said)), bool(found)
    held = [k for stop in stops for k in range(1, len(stop)) if said.endswith(stop[:k], start)]
    return len(said) - max(held, default=0), False


# ---- requests: tables of fields -------------------------------------------------------------------------------------
#
# What differs from OpenAI: one model, which a request may name or leave out; `ignore_eos` writes on to max_tokens;
# usage counts EOS; several answers (n) at temperature 0 are equal; prompt and max_tokens that do not fit the context
# together are refused; fields that we do not know are refused unless null.

MAX_MESSAGES, MAX_CHOICES, MAX_STOPS = 512, 32, 16


class Check(NamedTuple):
    """What a value must be, in words and as a test."""
    words: str
    fits: Callable[[object], bool]


def number(low: float, high: float) -> Check:
    return Check(f"a number from {low} to {high}", lambda x: type(x) in (int, float) and low <= x <= high)


def whole(low: int, high: int) -> Check:
    return Check(f"a whole number from {low} to {high}", lambda x: type(x) is int and low <= x <= high)  # True is none


def each(value: object) -> list:
    return value if isinstance(value, list) else [value]


ANYTHING = Check("given", lambda x: x is not None)
TEXT = Check("text", lambda x: isinstance(x, str))
YES_OR_NO = Check("true or false", lambda x: type(x) is bool)
OBJECT = Check("a JSON object", lambda x: isinstance(x, dict))
STOPS = Check(f"text or a list of at most {MAX_STOPS} texts of 1 to 1000 characters",
              lambda x: len(each(x)) <= MAX_STOPS and all(isinstance(s, str) and 0 < len(s) <= 1000 for s in each(x)))
MESSAGES = Check(f'a list of 1 to {MAX_MESSAGES} {{"role", "content"}}',
                 lambda x: isinstance(x, list) and 0 < len(x) <= MAX_MESSAGES)
ROLE = Check("system, user or assistant", lambda x: x in ("system", "developer", "user", "assistant"))
CONTENT = Check("text or a list of parts", lambda x: isinstance(x, str | list) and x != [])
PART = Check('{"type": "text", "text": ...}: this model reads text alone',
             lambda x: isinstance(x, dict) and x.get("type") == "text" and isinstance(x.get("text"), str))

SHARED = {
    "model": ANYTHING,
    "n": whole(1, MAX_CHOICES),
    "max_tokens": whole(1, 2**31),
    "temperature": number(0, 2),
    "top_p": Check("a number above 0 to 1", lambda x: number(0, 1).fits(x) and x > 0),
    "seed": whole(-2**63, 2**64),
    "stop": STOPS,
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "ignore_eos": YES_OR_NO,
    "stream": YES_OR_NO,
    "stream_options": OBJECT,
    "user": TEXT,
}
COMPLETION = SHARED | {"prompt": ANYTHING, "logprobs": whole(0, 5)}
CHAT = SHARED | {
    "messages": MESSAGES,
    "max_completion_tokens": whole(1, 2**31),
    "logprobs": YES_OR_NO,
    "top_logprobs": whole(0, 20),
}
MESSAGE = {"role": ROLE, "content": CONTENT, "name": ANYTHING}
OPTIONS = {"include_usage": YES_OR_NO, "include_obfuscation": YES_OR_NO}
REQUIRED = {"prompt", "messages", "role", "content"}
quoted = reprlib.Repr().repr  # quotes a value in an error message, short and not too deep
# Fields of OpenAI's that mean something we do not do, and the values with which they ask for nothing.
NEUTRAL = {
    "best_of": [1],
    "echo": [False],
    "function_call": ["none", "auto"],
    "functions": [[]],
    "logit_bias": [{}],
    "metadata": [{}],
    "modalities": [["text"]],
    "parallel_tool_calls": [True, False],
    "response_format": [{"type": "text"}],
    "service_tier": ["auto", "default"],
    "store": [False],
    "suffix": [""],
    "tool_calls": [[]],
    "tool_choice": ["none", "auto"],
    "tools": [[]],
}


def need(value: object, param: str, check: Check):
    """Returns the value if it fits, raises Refusal otherwise. `param` is empty for the whole body."""
    if not check.fits(value):
        what = "missing" if value is None else quoted(value)
        raise Refusal(400, f"{param or 'the body'} is {what}, it must be {check.words}", param or None)
    return value


def read(value: object, fields: dict[str, Check], at: str = "") -> dict:
    """Returns the fields of an object that are given, each checked. Null counts as missing. `at` names the object."""
    for name, x in need(value, at, OBJECT).items():
        if name not in fields and x is not None and x not in NEUTRAL.get(name, []):
            does = "asks for what this server does not do" if name in NEUTRAL else "is no field that this server knows"
            raise Refusal(400, f"{at}{quoted(name)} {does}: leave it out", at or name[:60])
    return {name: need(value.get(name), f"{at}.{name}" if at else name, check) for name, check in fields.items()
            if name in REQUIRED or value.get(name) is not None}


def read_messages(messages: list, served: Served) -> list[int]:
    """Returns the ids of the prompt that the template makes of OpenAI's messages."""
    turns = []
    for i, message in enumerate(messages):
        turn = read(message, MESSAGE, f"messages[{i}]")
        said = turn["content"]
        if isinstance(said, list):
            said = "".join(need(part, f"messages[{i}].content[{j}]", PART)["text"] for j, part in enumerate(said))
        turns.append({"role": turn["role"].replace("developer", "system"), "content": said})
    try:
        return text.encode_prompt(turns, served.tokenizer, served.template)
    except ValueError as error:
        raise Refusal(400, f"messages: {error}", "messages") from None


def read_prompts(prompt: object, served: Served) -> list[list[int]]:
    """Returns the ids of each prompt of a completion: text, ids, or a list of either."""
    last = served.model.config.vocab_size - 1
    is_id = whole(0, last).fits
    is_prompt = lambda x: isinstance(x, str) or isinstance(x, list) and x and all(map(is_id, x))
    several = [prompt] if is_prompt(prompt) else each(prompt)
    if not 0 < len(several) <= MAX_CHOICES or not all(map(is_prompt, several)):
        words = f"text, ids from 0 to {last}, or a list of at most {MAX_CHOICES} of either"
        raise Refusal(400, f"prompt is {quoted(prompt)}, it must be {words}", "prompt")
    # Markers such as <|im_end|> in the text of a completion become their ids: its client words the chat.
    prompts = [served.tokenizer.encode(one) if isinstance(one, str) else one for one in several]
    if not all(prompts):
        raise Refusal(400, f"prompt is {quoted(prompt)}, it must be text of at least one token", "prompt")
    return prompts


def read_request(body: object, chat: bool, served: Served) -> Request:
    """Returns the Request of a JSON body. Raises Refusal with the name of a parameter that is not right."""
    asked = read(body, CHAT if chat else COMPLETION)
    if asked.get("model", served.name) != served.name:
        why = f"model is {quoted(asked['model'])}, this server has {served.name!r} alone"
        raise Refusal(404, why, "model", "model_not_found")
    prompts = [read_messages(asked["messages"], served)] if chat else read_prompts(asked["prompt"], served)

    # What depends on two fields.
    n = asked.get("n", 1)
    if n * len(prompts) > MAX_CHOICES:
        why = f"n is {n} for {len(prompts)} prompts, at most {MAX_CHOICES} answers are given at once"
        raise Refusal(400, why, "n")
    longest = max(map(len, prompts))
    room = served.context - longest
    key = "max_completion_tokens" if "max_completion_tokens" in asked else "max_tokens"
    usual = max(1, room if chat else min(16, room))  # 1 without room: refused below
    most = asked.get(key, usual)
    if most > room:
        why = (f"the prompt has {longest} tokens and {key} is {most}, together more than the model's context of "
               f"{served.context}: shorten the prompt or lower {key}")
        param = "messages" if chat else "prompt"
        raise Refusal(400, why, key if room > 0 else param, "context_length_exceeded")
    logprobs = asked.get("logprobs")
    if chat:
        top = asked.get("top_logprobs", 0)
        if top and not logprobs:
            raise Refusal(400, "top_logprobs needs logprobs to be true", "top_logprobs")
        logprobs = top if logprobs else None
    options = read(asked.get("stream_options", {}), OPTIONS, "stream_options")
    asked |= {
        "prompts": prompts,
        "chat": chat,
        "max_tokens": most,
        "logprobs": logprobs,
        "stop": tuple(each(asked.get("stop", []))),
        "seed": asked.get("seed", secrets.randbits(62)),
        "include_usage": asked.get("stream", False) and options.get("include_usage", False),
    }
    return Request(served, **{name: value for name, value in asked.items() if name in Request.__dataclass_fields__})


# ---- OpenAI's forms -------------------------------------------------------------------------------------------------

def form(request: Request, events: list[Event], usage: dict | None = None) -> dict:
    """Words events as OpenAI's JSON: a chat's or a completion's, whole or a chunk of a stream."""
    kind = "text_completion"
    if request.chat:
        kind = "chat.completion.chunk" if request.stream else "chat.completion"
    body = {**request.head, "object": kind, "choices": [choice(request, event) for event in events]}
    if usage or request.include_usage:
        body["usage"] = usage
    return body


def choice(request: Request, event: Event) -> dict:
    said = {"text": event.text}
    if request.chat:
        opening = {"role": "assistant", "refusal": None} if event.first else {}
        said = {"delta" if request.stream else "message": {**opening, "content": event.text}}
    return {
        "index": event.index,
        **said,
        "logprobs": None if request.logprobs is None else logprobs(request, event.tokens),
        "finish_reason": event.finish,
    }


def logprobs(request: Request, tokens: list[tuple[int, dict]]) -> dict:
    rows = [row for _, row in tokens]
    if request.chat:
        return {"content": rows, "refusal": None}
    return {
        "tokens": [row["token"] for row in rows],
        "token_logprobs": [row["logprob"] for row in rows],
        "top_logprobs": [{other["token"]: other["logprob"] for other in row["top_logprobs"]} for row in rows],
        "text_offset": [start for start, _ in tokens],
    }


def usage(request: Request) -> dict:
    prompt = sum(map(len, request.prompts))
    made = sum(len(answer.made) for answer in request.answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": request.reused},
    }


# Some clients take these for the end of a line.
LINE_ENDS = str.maketrans({"\x85": r"\u0085", "\u2028": r"\u2028", "\u2029": r"\u2029"})


def to_json(value: object) -> bytes:
    said = json.dumps(value, ensure_ascii=False).translate(LINE_ENDS)
    return said.encode("utf-8", "replace")  # half an emoji in a request cannot be said in UTF-8


# ---- metrics and curves ---------------------------------------------------------------------------------------------

METRICS = {
    "slots": "rows of the cache",
    "slots_used": "rows with an answer on its way",
    "waiting": "answers waiting for a row",
    "steps_total": "forward passes",
    "requests_total": "requests accepted",
    "answers_total": "answers completed",
    "refused_total": "requests refused by a full queue",
    "left_total": "requests whose client left",
    "failed_total": "requests that failed",
    "prompt_tokens_total": "prompt tokens computed",
    "prefix_tokens_reused_total": "prompt tokens taken from the cache",
    "completion_tokens_total": "tokens sampled",
    "first_token_seconds_sum": "time to first token, summed",
    "first_token_seconds_count": "first tokens",
}


def state(engine: Engine) -> dict:
    return {
        "status": "ok" if engine.end == math.inf else "shutting down",
        "slots": len(engine.rows),
        "used": engine.count + len(engine.reading),
        "waiting": engine.waiting.qsize(),
    }


def prometheus(engine: Engine) -> str:
    """The engine's state and counters as Prometheus reads them."""
    now = state(engine)
    lines = []
    for name, words in METRICS.items():
        key = name.removeprefix("slots_").removesuffix("_total")
        kind, value = ("gauge", now[key]) if key in now else ("counter", engine.counters[key])
        lines.append(f"# HELP octet_{name} {words}\n# TYPE octet_{name} {kind}\noctet_{name} {value}\n")
    return "".join(lines)


def numbers(line: str) -> dict[str, float]:
    """Returns the finite numbers of a JSON object; {} if the line is none: a run may be writing its last line."""
    with suppress(ValueError):
        row = json.loads(line)
        if isinstance(row, dict):
            return {name: x for name, x in row.items() if weights.is_number(x)}
    return {}


def of_runs(folder: Path, name: str) -> list[Path]:
    """Returns the files of this name that the runs under a folder have written, but for links out of the folder."""
    return [file for file in sorted(folder.glob(f"*/{name}")) if file.resolve().is_relative_to(folder.resolve())]


def read_curves(folder: Path) -> list[dict]:
    """Returns of every run under the folder: its name, curves {metric: [[step, value], ...]} thinned to 400 points or a
    few more, gold scores."""
    runs = []
    for file in of_runs(folder, "metrics.jsonl"):
        rows = [row for row in map(numbers, file.read_text("utf-8", "replace").splitlines()) if "step" in row]
        curves = {}
        for row in rows[::-max(1, len(rows) // 400)][::-1]:  # counted from the end: the newest is always there
            step = row.pop("step")
            for name, value in row.items():
                curves.setdefault(name, []).append([step, value])
        summary = file.with_name("summary.json")
        figures = numbers(summary.read_text("utf-8")) if summary.is_file() else {}
        gold = {name: value for name, value in figures.items() if name.startswith("gold")}
        runs.append({"name": file.parent.name, "curves": curves, "changed": file.stat().st_mtime, **gold})
    return runs


def read_sweeps(folder: Path) -> list[dict]:
    """Returns of every sweep.json that ppo.py --sweep wrote under the folder: its name, rungs and best_of."""
    sweeps = []
    for file in of_runs(folder, "sweep.json"):
        with suppress(ValueError):      # not JSON
            sweeps.append(weights.read_json(file) | {"name": file.parent.name})
    return sweeps


# ---- HTTP -----------------------------------------------------------------------------------------------------------

BODY_BYTES, MAX_THREADS = 2**20, 2048  # a connection has a thread
STREAM_PAUSE = 0.01    # seconds in which a stream collects events: a thread that wakes for each takes the engine's time
FORMS = {"/v1/completions": False, "/v1/chat/completions": True}  # path, is it a chat


class Handler(BaseHTTPRequestHandler):
    """One connection. Every request ends in one answer: text, JSON, a stream, or an error in OpenAI's form."""
    protocol_version = "HTTP/1.1"
    server_version = "octet"
    sys_version = ""
    disable_nagle_algorithm = True
    timeout = 30           # seconds for a client to send its request, and to take a piece of the answer

    def handle_one_request(self) -> None:
        self.sent = False
        self.server.reading[self.connection] = time.monotonic() + self.timeout
        try:
            super().handle_one_request()  # calls do_GET or the like
        except Refusal as refusal:
            self.refuse(refusal)
        except OSError:  # the client has left
            self.close_connection = True
        except Exception:
            traceback.print_exc()
            self.refuse(Refusal(500, "the server failed: see its log"))
        finally:
            self.server.reading.pop(self.connection, None)

    def answer(self) -> None:
        server = self.server
        content = self.read_body()  # before anything is refused: the next request begins after it
        del server.reading[self.connection]
        self.check_origin()
        if self.command == "OPTIONS" and server.args.cors:
            return self.send(204, b"")
        path = unquote(self.path.partition("?")[0]).rstrip("/") or "/"
        page = server.pages.get(path)
        if not page and path not in FORMS:
            paths = ", ".join(server.pages | FORMS)
            raise Refusal(404, f"{quoted(path)} is not here: there are {paths}")
        methods = "GET, HEAD" if page else "POST"
        if self.command not in methods:
            raise Refusal(405, f"{path} answers {methods}, not {quoted(self.command)}", Allow=methods)
        if path not in ("/", "/health"):
            self.check_key()
        if page:
            return self.send(*page())
        # Browsers let a page of another site send other types without asking the server first (CORS).
        if self.headers.get_content_type() != "application/json" or "Content-Encoding" in self.headers:
            raise Refusal(415, "Content-Type must be application/json, without a Content-Encoding")
        self.complete(content, FORMS[path])

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = answer

    def read_body(self) -> bytes:
        length = ",".join(set(self.headers.get_all("Content-Length", [])))
        if "Transfer-Encoding" in self.headers or self.command == "POST" and not length:
            raise Refusal(411, "the length of the body must be given, as Content-Length")
        length = length or "0"
        if not re.fullmatch("[0-9]{1,18}", length):
            raise Refusal(400, "Content-Length must be one whole number")
        if int(length) > BODY_BYTES:
            raise Refusal(413, f"the body has {length} bytes, at most {BODY_BYTES} are taken")
        return self.rfile.read(int(length))

    def check_origin(self) -> None:
        """Refuses pages of other sites. One can have its own name lead to 127.0.0.1 (DNS rebinding), but then the
        browser sends this name as Host."""
        hosts = self.headers.get_all("Host", [])
        origin = self.headers.get("Origin")
        if self.request_version == "HTTP/1.0" and not hosts:
            return  # no browser
        if len(hosts) != 1 or not host_allowed(hosts[0], self.server.names):
            raise Refusal(403, f"Host {quoted(hosts)} is not a name of this server: --allow_host NAME adds one")
        if origin not in (None, self.server.args.cors, f"http://{hosts[0]}", f"https://{hosts[0]}"):
            raise Refusal(403, f"a page of {quoted(origin)} may not use this server: --cors ORIGIN would allow one")

    def check_key(self) -> None:
        wanted = self.server.args.api_key
        scheme, _, key = self.headers.get("Authorization", "").partition(" ")
        given = f"{scheme.lower()} {key}"
        if wanted and not hmac.compare_digest(given.encode(), f"bearer {wanted}".encode()):  # in constant time
            why = "the API key is missing or wrong: send it as Authorization: Bearer KEY"
            raise Refusal(401, why, code="invalid_api_key", **{"WWW-Authenticate": "Bearer"})

    def complete(self, content: bytes, chat: bool) -> None:
        """Answers a request by the engine."""
        server = self.server
        try:
            body = json.loads(content.decode("utf-8"))
        except (ValueError, RecursionError) as error:  # broken, or nested too deeply
            raise Refusal(400, f"the body is not JSON ({error})") from None
        request = read_request(body, chat, server.served)
        # A client may close its sending half right after its last request. Then `gone` says nothing of the other half.
        self.patient = self.close_connection or self.gone()
        server.engine.submit(request)
        server.requests.add(request)
        try:
            if request.stream:
                self.stream(request)
            else:
                self.send(200, to_json(form(request, sorted(self.events(request)), usage(request))))
        except OSError:
            server.engine.counters["left"] += 1
            raise
        finally:
            request.over = True
            server.requests.discard(request)

    def events(self, request: Request) -> Iterator[Event]:
        """Yields the events until all answers have ended. Raises the Refusal that ends the request early."""
        unfinished = len(request.answers)
        while unfinished:
            if not self.patient and self.gone():
                raise ConnectionError("the client has left")
            with suppress(Empty):
                event = request.events.get(timeout=0.1)
                if isinstance(event, Refusal):
                    raise event
                if event.finish:
                    unfinished -= 1
                yield event

    def gone(self) -> bool:
        """Whether the client has closed its sending half: reading gives the end of the stream."""
        self.connection.settimeout(0)  # recv does not wait
        try:
            return not self.connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        finally:
            self.connection.settimeout(self.timeout)

    def stream(self, request: Request) -> None:
        """Sends server-sent events up to [DONE], then closes the connection: the length was not known before."""
        self.close_connection = True
        try:
            for event in self.events(request):
                self.send_chunk(form(request, [event]))
                if request.events.empty():
                    time.sleep(STREAM_PAUSE)
            if request.include_usage:
                self.send_chunk(form(request, [], usage(request)))
        except Refusal as refusal:
            if not self.sent:
                raise
            self.send_chunk(refusal.body)
        self.wfile.write(b"data: [DONE]\n\n")

    def send_chunk(self, chunk: dict) -> None:
        if not self.sent:
            self.begin(200, "text/event-stream; charset=utf-8")
        self.wfile.write(b"data: %b\n\n" % to_json(chunk))

    def send(self, status: int, content: bytes, kind: str = "application/json", **headers: str) -> None:
        self.begin(status, kind, **{"Content-Length": str(len(content)), **headers})
        if self.command != "HEAD":
            self.wfile.write(content)

    def begin(self, status: int, kind: str, **headers: str) -> None:
        self.sent = True
        self.send_response(status)
        if self.close_connection:
            self.send_header("Connection", "close")
        for name, value in {"Content-Type": kind, **self.server.headers, **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def refuse(self, refusal: Refusal) -> None:
        """Answers with an error and closes the connection, after reading what the client still sends: closing with
        unread bytes resets a connection, and the client may not get to read the answer."""
        self.close_connection = True
        self.request_version = "HTTP/1.1"
        if self.sent:
            return  # in the middle of an answer
        with suppress(OSError):
            self.send(refusal.status, to_json(refusal.body), **refusal.headers)
            self.connection.shutdown(socket.SHUT_WR)
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline and self.rfile.read1():
                pass

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Called by the standard library for what it cannot parse."""
        self.refuse(Refusal(int(code), f"the request cannot be read ({message})"))

    def log_message(self, format: str, *values: object) -> None:
        if not self.server.args.benchmark:
            super().log_message(format, *values)


def host_allowed(host: str, names: set[str]) -> bool:
    """Whether a Host header names this server by an address or by a name of its own."""
    with suppress(ValueError):
        name = urlsplit(f"//{host}").hostname or ""
        return name in names or bool(ipaddress.ip_address(name))
    return False


class Server(socketserver.ThreadingTCPServer):
    """Listens, and gives each connection a thread that waits for the engine."""
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 1024

    def __init__(self, engine: Engine, args: argparse.Namespace):
        self.engine, self.served, self.args = engine, engine.served, args
        self.requests: set[Request] = set()                 # those that are not answered yet
        self.reading: dict[socket.socket, float] = {}       # connections that send a request, and until when they may
        names = ("localhost", args.http_host, socket.gethostname(), *args.allow_host)
        self.names = {name.lower() for name in names}
        self.headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
        if args.cors:
            self.headers |= {
                "Access-Control-Allow-Origin": args.cors,
                "Access-Control-Allow-Methods": "GET, POST",
                "Access-Control-Allow-Headers": "Authorization, *",  # the star does not stand for Authorization
                "Access-Control-Expose-Headers": "Retry-After",
            }
        self.pages = pages(engine, args.runs)
        host, port = args.http_host, 0 if args.benchmark else args.http_port
        if ":" in host:
            self.address_family = socket.AF_INET6
            host = f"[{host}]"
        try:
            super().__init__((args.http_host, port), Handler)
        except OSError as error:
            why = f"cannot listen on {host}:{port} ({error.strerror or error})"
            raise OSError(f"{why}: choose another --http_host or --http_port") from None
        self.url = f"http://{host}:{self.server_address[1]}"

    def verify_request(self, request: socket.socket, client_address: tuple) -> bool:
        """Whether a new connection may have a thread. If not, it is closed."""
        return threading.active_count() < MAX_THREADS

    def service_actions(self) -> None:
        """Shuts the reading half of connections whose request takes too long, however steadily bytes arrive."""
        for connection, end in self.reading.copy().items():     # a copy in one step: other threads change the dict
            if time.monotonic() > end:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RD)

    def finish(self, seconds: float) -> None:
        """Frees the address once all requests are answered, or after so many seconds."""
        deadline = time.monotonic() + seconds
        while self.requests and time.monotonic() < deadline:
            time.sleep(0.01)
        self.shutdown()
        self.server_close()


def pages(engine: Engine, runs: Path) -> dict[str, Callable[[], tuple]]:
    """Returns what GET answers: a path -> a function that returns status, content, and its type where it is not JSON.
    """
    page = (Path(__file__).parent / "data" / "page.html").read_bytes()
    card = {
        "id": engine.served.name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "octet",
        "max_model_len": engine.served.context,
    }
    return {
        "/": lambda: (200, page, "text/html; charset=utf-8"),
        "/health": lambda: (200 if engine.end == math.inf else 503, to_json(state(engine))),
        "/metrics": lambda: (200, prometheus(engine).encode(), "text/plain; version=0.0.4; charset=utf-8"),
        "/runs": lambda: (200, to_json({"runs": read_curves(runs), "sweeps": read_sweeps(runs)})),
        "/v1/models": lambda: (200, to_json({"object": "list", "data": [card]})),
        f"/v1/models/{engine.served.name}": lambda: (200, to_json(card)),
    }


# ---- measuring ------------------------------------------------------------------------------------------------------

HEADER = """\
 clients  requests first token    p95 tokens/s each  slowest      in all
                        ms p50     ms           p50      5 %"""
ROW = ("{concurrency:>8}{requests:>10}{first_token_ms_p50:>12.0f}{first_token_ms_p95:>7.0f}"
       "{tokens_per_second_each_p50:>14.1f}{tokens_per_second_each_slowest_5_percent:>9.1f}{tokens_per_second:>12.1f}")


class Folded(text.Tokenizer):
    """The tokenizer of a model of random weights: every id has the text of some piece of a smaller vocabulary."""

    def token_bytes(self, i: int) -> bytes:
        return super().token_bytes(3 + i % (self.vocab_size - 3))


def ask(url: str, args: argparse.Namespace, prompt: list[int]) -> dict:
    """Sends one streamed request over HTTP. Returns seconds to its first token and to its last, and how many tokens."""
    body = {
        "prompt": prompt,
        "max_tokens": args.new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {args.api_key}"}
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=600)
    began = time.perf_counter()
    connection.request("POST", "/v1/completions", to_json(body), headers)
    times, last = [], b"{}"
    for line in connection.getresponse():
        if b"{" in line:
            last = line
            times.append(time.perf_counter() - began)
    used = json.loads(last.removeprefix(b"data: ")).get("usage")
    if not used:
        said = last[:500].decode("utf-8", "replace")
        raise ValueError(f"{url} gives no usage but {said}")
    return {"first": times[0], "last": times[-1], "tokens": used["completion_tokens"]}


def measure(one: Callable[[list[int]], dict], prompts: list[list[int]], concurrency: int) -> dict:
    """Measures `concurrency` clients, each of which asks again when it has its answer (a closed loop). Only new tokens
    count. A request's tokens/s are those after its first token, tokens/s in all are over the whole time."""
    began = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as clients:
        done = list(clients.map(one, prompts))
    seconds = time.perf_counter() - began
    first = [1e3 * row["first"] for row in done]
    rate = [(row["tokens"] - 1) / max(row["last"] - row["first"], 1e-9) for row in done]
    reached = partial(np.quantile, method="inverted_cdf")  # the value that a share of them does not exceed
    return {
        "concurrency": concurrency,
        "requests": len(done),
        "prompt_tokens": len(prompts[0]),
        "new_tokens": done[0]["tokens"],
        "first_token_ms_p50": reached(first, 0.5),
        "first_token_ms_p95": reached(first, 0.95),
        "tokens_per_second_each_p50": reached(rate, 0.5),
        "tokens_per_second_each_slowest_5_percent": reached(rate, 0.05),
        "tokens_per_second": sum(row["tokens"] for row in done) / seconds,
        "seconds": seconds,
    }


def measure_url(url: str, args: argparse.Namespace) -> list[dict]:
    """The client's side of the benchmark, for any server. No two prompts have a common beginning to be reused."""
    print(f"prompts of {args.prompt_tokens} random tokens, {args.new_tokens} new ones, greedy, EOS ignored\n{HEADER}")
    generator = torch.Generator().manual_seed(0)
    prompts = lambda n: torch.randint(3, args.vocab, (n, args.prompt_tokens), generator=generator).tolist()
    ask(url, args, *prompts(1))  # warms up
    rows = []
    for clients in map(int, args.concurrency.split(",")):
        rows.append(measure(partial(ask, url, args), prompts(clients * args.rounds), clients))
        print(ROW.format(**rows[-1]), flush=True)
    return rows


def benchmark(server: Server) -> dict:
    """Runs the engine until clients have measured it. Their process does not share our interpreter lock."""
    args, engine, model = server.args, server.engine, server.served.model
    summary = {
        "model": server.served.name,
        "dtype": str(model.norm.weight.dtype).removeprefix("torch."),
        "quant": args.quant,
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "slots": args.max_batch,
        "context": server.served.context,
    }
    print(" | ".join(f"{key} {value}" for key, value in summary.items() if value is not None), flush=True)
    args.vocab = model.config.vocab_size
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as clients:
        measured = clients.submit(measure_url, server.url, args)
        measured.add_done_callback(lambda _: engine.stop(0.0))
        engine.run()
    server.finish(2.0)
    rows, peak = measured.result(), run.peak_memory_bytes(model.device)
    gain = rows[-1]["tokens_per_second"] / rows[0]["tokens_per_second"]
    gigabytes = peak / 1e9
    print(f"{rows[-1]['concurrency']} clients get {gain:.2f} times the tokens of {rows[0]['concurrency']}; "
          f"peak memory {gigabytes:.2f} GB")
    reused = engine.counters["prefix_tokens_reused"]
    return summary | {"rows": rows, "prefix_tokens_reused": reused, "peak_memory_bytes": peak}


# ---- command line ---------------------------------------------------------------------------------------------------

def matching(pattern: str, words: str) -> Callable[[str], str]:
    """The type of a flag whose value must match a pattern."""
    def checked(said: str) -> str:
        if not re.fullmatch(pattern, said):
            raise argparse.ArgumentTypeError(f"{said!r} is no {words}")
        return said
    return checked


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = run.Parser("Serve a model over OpenAI's HTTP interface, with a page to talk to it and to watch training; "
                        "or measure how fast that is.")
    flag = parser.add_argument
    shapes = " ".join(SHAPES)
    flag("directory", nargs="?", default="out/ppo",
         help="weights directory: Hugging Face or Meta layout, quantized, or a LoRA adapter; with --benchmark also a "
              f"shape with random weights ({shapes}), or the URL of a server")
    flag("--say", metavar="TEXT", help="answer this once on the terminal, through the template, and end")
    # model
    flag("--quant", choices=["8bit", "4bit"],
         help="quantize a plain directory at load by rounding to nearest (the head to 8 bits); on a quantized one it "
              "must agree")
    flag("--dtype", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="auto: bf16 on CUDA, fp32 elsewhere")
    flag("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="auto: cuda if there is one")
    flag("--template", choices=sorted(text.TEMPLATES), help="prompt template (the directory's own, or plain)")
    # engine
    flag("--max_batch", type=run.whole(1, 4096), default=16, help="answers at once: rows of the cache")
    flag("--max_len", type=run.whole(2), help="tokens that a row has room for, prompt and answer (the model's context)")
    flag("--max_waiting", type=run.whole(0, 2**20), default=256,
         help="answers that may wait for a row; further requests get 429")
    # HTTP
    flag("--http_host", default="127.0.0.1", help="address to listen on")
    flag("--http_port", type=run.whole(0, 65535), default=7070, help="0 takes a free one")
    flag("--api_key", type=matching("[!-~]+", "key in printable ASCII without spaces"), help="ask clients for this key")
    flag("--cors", type=matching("https?://[!-.0-~]+", "origin such as https://example.org"), metavar="ORIGIN",
         help="let pages of this origin use the server")
    flag("--allow_host", nargs="+", default=[], metavar="NAME",
         help="further names of this server, as a proxy in front of it sends them in Host")
    flag("--runs", type=Path, default=Path("out"), help="folder of the runs whose curves the page shows")
    # measuring
    flag("--benchmark", action="store_true",
         help="measure instead of serving: clients that ask over HTTP, each its next question when it has its answer")
    flag("--concurrency", type=matching("[1-9][0-9]{0,2}(,[1-9][0-9]{0,2})*", "list of numbers such as 1,4,16"),
         default="1,4,16", help="numbers of clients, one line of the table each")
    flag("--prompt_tokens", type=run.whole(1), default=32, help="length of the benchmark's prompts")
    flag("--new_tokens", type=run.whole(1), default=64, help="length of its answers")
    flag("--rounds", type=run.whole(1), default=3, help="questions of each client")
    flag("--json", type=Path, default=Path("out/benchmark.json"), help="file for its figures")
    flag("--vocab", type=run.whole(4), default=1000, help="the benchmark of a URL draws its prompts from ids below it")
    return parser.parse_args(argv)


def open_served(args: argparse.Namespace) -> Served:
    """Opens what the flags name."""
    directory = Path(args.directory)
    device = run.choose_device(args.device)
    dtype = run.choose_dtype(args.dtype, device)
    if args.benchmark and args.directory in SHAPES and not directory.exists():
        model = random_model(SHAPES[args.directory], dtype, device)
        tokenizer, template = Folded(demo.FOLDER), text.TEMPLATES["plain"]
        if args.quant:
            quantize.round_model(model, args.quant, device)
    else:
        if args.directory == "out/ppo":
            run.finished(directory, "ppo", "DIRECTORY")
        source = quantize.open_source(directory)
        tokenizer = source.tokenizer
        template = text.TEMPLATES[text.choose_template(source.home, args.template, "plain", print)]
        model = quantize.open_model(directory, dtype, device, quant=args.quant)
        model.stop_at([tokenizer.eos_id, text.answer_end(tokenizer, template)], tokenizer.bos_id)
    context = args.max_len or model.config.max_seq_len
    if context > model.config.max_seq_len:
        raise ValueError(f"--max_len {context} is more than the model's context of {model.config.max_seq_len}")
    return Served(model.eval(), tokenizer, template, os.path.basename(os.path.abspath(directory)), context)


def say(served: Served, said: str) -> None:
    """Answers once, on the terminal."""
    prompt = text.encode_prompt([{"role": "user", "content": said}], served.tokenizer, served.template)
    # 0.7 as on the page: at 1 a model of 135 M parameters loses its thread.
    steps = served.model.generate_steps([prompt], served.context - len(prompt), temperature=0.7)
    for piece in served.tokenizer.stream(token for _, (token,) in steps):
        print(piece, end="", flush=True)
    print()


def serve(server: Server) -> dict:
    """Runs the engine until SIGTERM or Ctrl-C, then finishes what runs; a second signal ends the process at once."""
    engine, served = server.engine, server.served

    def on_signal(number: int, frame: object) -> None:
        if engine.end < math.inf:
            os._exit(128 + number)
        engine.stop(30.0)
        print("finishing what runs, at most 30 s; once more to leave at once", flush=True)
    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    host = server.server_address[0]
    if not ipaddress.ip_address(host).is_loopback and server.args.api_key is None:
        print(f"warning: {host} can be reached from other machines, and without --api_key anybody may use it")
    size = sum(kv.nbytes / kv.shape[3] for kv in engine.cache.kv) * served.context / 1e9
    print(f"{served.name}: {served.model.norm.weight.dtype} on {served.model.device}, {len(engine.rows)} slots x "
          f"{served.context} tokens, cache up to {size:.2f} GB")
    print(f"page   {server.url}/")
    print(f"client {server.url}/v1", flush=True)
    finished = engine.run()
    server.finish(2.0)
    print("finished" if finished else "left: some answers were cut short", flush=True)
    return dict(engine.counters)


def main(argv: list[str] | None = None) -> dict | None:
    args = parse(argv)
    world = run.start(args.device, "naive")
    if args.say is None:
        run.say_flags(world, argparse.Namespace(**vars(args) | {"api_key": args.api_key and "(given)"}))
    if args.benchmark and args.directory.startswith("http://"):
        summary = {"url": args.directory, "rows": measure_url(args.directory, args)}
    else:
        served = open_served(args)
        with quantize.packed(served.model, keep=False):
            if args.say is not None:
                return say(served, args.say)
            server = Server(Engine(served, args.max_batch, args.max_waiting), args)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            if not args.benchmark:
                return serve(server)
            summary = benchmark(server)
    weights.write_json(args.json, summary)
    print(f"wrote {args.json}")
    return summary


if __name__ == "__main__":
    run.command(main)
