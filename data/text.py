r"""Tokenizers, prompt templates, text <-> ids, batches of ids. Choices that raise no error when they are made wrongly:
1. Markers such as [INST] are text; only BOS and EOS are ids. A user who types "</s>" gets ordinary pieces.
2. Of a conversation only the replies are targets. Each ends in EOS, unless cut at max_len: cut text is not an end.
3. Pieces are tokenized one by one, so a prompt is exactly the beginning of its training example. Sentencepiece puts a "▁"
   before a reply encoded alone, and so it stands in "### Response: reply" encoded as one text, as other servers do it
   (Hugging Face's tokenizer in its default, "legacy" mode).
4. Masks come from lengths, never from comparing ids, so padding may have any id, even that of EOS.
5. The order of an epoch depends on seed, epoch and global batch only: the same steps on 1 process and on 8.
"""

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import sentencepiece
import torch
from torch import Tensor

from data.weights import read_json, write_file, write_json


# ---- tokenizer ------------------------------------------------------------------------------------------------------

class Tokenizer:
    """A sentencepiece model. BOS and EOS are added as ids, never as text; "</s>" typed by a user is ordinary pieces."""

    def __init__(self, path: str | Path):
        path = Path(path)
        file = path / "tokenizer.model" if path.is_dir() else path
        if not file.exists() and (path / "params.json").exists() and (path.parent / "tokenizer.model").exists():
            file = path.parent / "tokenizer.model"  # Meta puts one beside the folders 7B, 13B, ...
        if not file.exists():
            only = ", a tokenizer.json cannot be read here" if (path / "tokenizer.json").exists() else ""
            raise FileNotFoundError(f"{file} does not exist{only}: put the sentencepiece file of the original release there")
        self.proto = file.read_bytes()
        self.sp = sentencepiece.SentencePieceProcessor()
        try:
            self.sp.LoadFromSerializedProto(self.proto)
        except RuntimeError as error:
            raise ValueError(f"{file} is not a sentencepiece model: copy it again ({error})") from None
        self.vocab_size = self.sp.vocab_size()
        self.bos_id, self.eos_id = self.sp.bos_id(), self.sp.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise ValueError(f"{file} defines no BOS or no EOS piece: it is not a LLaMA tokenizer")

    @property
    def fingerprint(self) -> str:
        """Two tokenizers with equal fingerprints give equal ids."""
        return hashlib.sha256(self.proto).hexdigest()

    def encode(self, text: str, bos: bool = True, eos: bool = False) -> list[int]:
        # Sentencepiece takes a lone surrogate (half an emoji in broken JSON) for an error, so it becomes U+FFFD first.
        ids = self.sp.encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def decode(self, ids: list[int]) -> str:
        """Text of ids; BOS, EOS and ids beyond the vocabulary (padded embeddings) give nothing."""
        return self.sp.decode([i for i in ids if 0 <= i < self.vocab_size and i not in (self.bos_id, self.eos_id)])

    def piece(self, i: int) -> str:
        """The piece of an id, to be shown; an embedding may have more rows than there are pieces."""
        return self.sp.id_to_piece(i) if i < self.vocab_size else f"({i})"

    def token_bytes(self, i: int) -> bytes:
        """What one id stands for: UTF-8, or one byte of it."""
        if not 0 <= i < self.vocab_size or self.sp.is_control(i):
            return b""
        piece = self.sp.id_to_piece(i)
        return bytes([int(piece[3:5], 16)]) if self.sp.is_byte(i) else piece.replace("▁", " ").encode()

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Text piece by piece as ids arrive; joined, exactly decode(ids). Bytes of an unfinished character are held back."""
        text = TextStream(self)
        for i in ids:
            if piece := text.push(i):
                yield piece
        if piece := text.rest():
            yield piece

    def save(self, directory: str | Path, template: str | None = None) -> None:
        """Write tokenizer.model and tokenizer_config.json, with the prompt template's name and its Jinja text."""
        directory = Path(directory)
        config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": True,
                  "bos_token": self.sp.id_to_piece(self.bos_id), "eos_token": self.sp.id_to_piece(self.eos_id),
                  "unk_token": self.sp.id_to_piece(self.sp.unk_id())}
        if template is not None:
            config |= {"template": template, "chat_template": TEMPLATES[template].jinja if template in TEMPLATES else None}
        write_file(directory / "tokenizer.model", self.proto)
        write_json(directory / "tokenizer_config.json", config)


class TextStream:
    """Ids in, text out, one at a time. After `before`, ids whose text is known already, the text goes on as theirs would.

    Each piece is the difference of two decodes that begin at the same id, because sentencepiece strips the space of
    whatever comes first; the beginning moves up only to an id that has text, so long answers stay cheap.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()):
        self.decode = tokenizer.decode
        self.held, self.sent = list(before), 0  # ids from the current beginning; characters of their text that were given out
        self.more()

    def push(self, i: int) -> str:
        """The text that is certain once this id is there. Bytes of an unfinished character are held back."""
        self.held.append(i)
        return self.more()

    def more(self) -> str:
        text = self.decode(self.held)
        # A character has at most four bytes, so up to three at the end may be the first ones of a character to come.
        broken = min(3, len(text) - len(text.rstrip("\ufffd")))
        new = text[self.sent:len(text) - broken]
        self.sent += len(new)
        if len(self.held) > 16 and not broken and (first := self.decode(self.held[-1:])):
            self.held, self.sent = self.held[-1:], len(first)
        return new

    def rest(self) -> str:
        """What was held back, when nothing more comes."""
        return self.decode(self.held)[self.sent:]


def read_template(directory: str | Path) -> str | None:
    """The template's name that a directory carries, or None."""
    file = Path(directory) / "tokenizer_config.json"
    return read_json(file).get("template") if file.exists() else None


def check_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> None:
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} pieces, the model's embedding {vocab_size} rows: use the "
                         "tokenizer.model that came with the model")


# ---- templates: the words around a conversation ---------------------------------------------------------------------

def check_messages(messages: list[dict], last: str) -> list[dict]:
    """Returns messages if they are an optional system message, then user and assistant in turn up to the role `last`.
    ValueError with the reason otherwise, and for a blank user message. A blank reply is legal: it teaches EOS."""
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    for i, turn in enumerate(turns):
        if turn["role"] != ("assistant" if i % 2 else "user"):
            raise ValueError(f"turn {i + 1} is the {turn['role']}'s, but user and assistant alternate, the user first")
        if turn["role"] == "user" and not turn["content"].strip():
            raise ValueError("the prompt is empty")
    if not turns or turns[-1]["role"] != last:
        raise ValueError(f"the conversation must end with a message of the {last}")
    return messages


class Segment(NamedTuple):
    """A piece of a conversation, tokenized on its own. The first piece opens with BOS whatever it says."""

    text: str
    reply: bool = False  # the assistant's: learnt, and always followed by EOS
    bos: bool = False  # opened by BOS
    eos: bool = False  # closed by an EOS that is not learnt


class Template(NamedTuple):
    """render: messages -> segments; a user's turn ends with the generation prompt, where the reply goes on.
    jinja: the same as a chat_template for other servers (which, but for Alpaca's, have no "input")."""

    render: Callable[[list[dict]], list[Segment]]
    jinja: str


def _render(ask: Callable, answer: Callable[[str], str], messages: list[dict]) -> list[Segment]:
    """`ask(user message, system text or None, is it the first turn)` words a user's turn, `answer(text)` a reply."""
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    segments = []
    for message in messages if system is None else messages[1:]:
        if message["role"] == "assistant":
            segments.append(Segment(answer(message["content"]), reply=True))
        else:
            segments += ask(message, system, not segments)
    return segments


def _question(message: dict) -> str:
    return f"{message['content']}\n{message['input']}" if "input" in message else message["content"]


# Stanford Alpaca's two wordings, which Coati took over: github.com/tatsu-lab/stanford_alpaca#data-release
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
ALPACA_INPUT = ("Below is an instruction that describes a task, paired with an input that provides further context. "
                "Write a response that appropriately completes the request.")
# FastChat's vicuna_v1.1: github.com/lm-sys/FastChat/blob/main/docs/vicuna_weights_version.md
VICUNA = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions.")


def _ask_alpaca(message: dict, system: str | None, first: bool) -> list[Segment]:
    preamble = (ALPACA_INPUT if "input" in message else ALPACA) if system is None else system
    extra = f"\n\n### Input:\n{message['input']}" if "input" in message else ""
    return [Segment(f"{preamble if first else ''}\n\n### Instruction:\n{message['content']}{extra}\n\n### Response:")]


def _ask_llama2(message: dict, system: str | None, first: bool) -> list[Segment]:
    preamble = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if first and system is not None else ""
    return [Segment(f"[INST] {(preamble + _question(message)).strip()} [/INST]", bos=True)]


def _ask_zephyr(message: dict, system: str | None, first: bool) -> list[Segment]:
    opening = [Segment(f"<|system|>\n{system}", eos=True)] if first and system is not None else []
    user = "<|user|>\n" + _question(message)
    return [*opening, Segment(user if first and not opening else "\n" + user, eos=True), Segment("\n<|assistant|>\n")]


def _ask_vicuna(message: dict, system: str | None, first: bool) -> list[Segment]:
    preamble = f"{VICUNA if system is None else system} " if first else ""
    return [Segment(f"{preamble}USER: {_question(message)} ASSISTANT:")]


def _ask_plain(message: dict, system: str | None, first: bool) -> list[Segment]:
    preamble = "" if first and system is None else f"{system if first else ''}\n\n"
    return [Segment(f"{preamble}Human: {_question(message)}\n\nAssistant:")]


def _jinja(preamble: str, user: str) -> str:
    """The chat_template of a format with one preamble and one wording of a user's turn."""
    return ("{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% else %}" + preamble
            + "{% endif %}{% for message in messages %}{% if message['role'] == 'user' %}" + user
            + "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
            "{% endif %}{% endfor %}")


TEMPLATES: dict[str, Template] = {
    "alpaca": Template(partial(_render, _ask_alpaca, str), _jinja(
        "{% if messages[0]['input'] %}" + ALPACA_INPUT + "{% else %}" + ALPACA + "{% endif %}",
        r"{{ '\n\n### Instruction:\n' + message['content'] }}"
        r"{% if message['input'] %}{{ '\n\n### Input:\n' + message['input'] }}{% endif %}{{ '\n\n### Response:' }}")),
    # Meta's chat_completion: every question opens with BOS, and a space stands between a reply and its EOS
    "llama2": Template(partial(_render, _ask_llama2, lambda text: text.strip() + " "),
        "{% if messages[0]['role'] == 'system' %}"
        r"{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
        "{% else %}{% set system = '' %}{% endif %}{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + ((system if loop.index0 < 2 else '') + message['content']) | trim + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}"
        "{% endfor %}"),
    # Also TinyLlama's: every turn ends in EOS, and a reply begins its line, without a space
    "zephyr": Template(partial(_render, _ask_zephyr, str),
        r"{{ bos_token }}{% for message in messages %}{{ ('' if loop.first else '\n') + '<|' + message['role'] + '|>' }}"
        r"{{ '\n' + message['content'] + eos_token }}{% endfor %}"
        r"{% if add_generation_prompt %}{{ '\n<|assistant|>\n' }}{% endif %}"),
    "vicuna": Template(partial(_render, _ask_vicuna, str), _jinja(
        VICUNA, "{{ (' ' if loop.index0 < 2 else '') + 'USER: ' + message['content'] + ' ASSISTANT:' }}")),
    # HH-RLHF's transcript, which base models continue well
    "plain": Template(partial(_render, _ask_plain, str), _jinja(
        "", r"{{ ('' if loop.first else '\n\n') + 'Human: ' + message['content'] + '\n\nAssistant:' }}")),
}


# ---- from records to ids --------------------------------------------------------------------------------------------

def _encode(messages: list[dict], tokenizer, template: Template) -> tuple[list[int], list[bool]]:
    """Messages -> ids and target flags, uncut."""
    ids, target, before = [], [], ""
    for text, reply, bos, eos in template.render(messages):
        # At the beginning of a line a reply has no "▁" (Zephyr): encode the line break with it, then drop it again
        lead = "\n" if reply and before.endswith("\n") else ""
        dropped = len(tokenizer.encode(lead, bos=False))
        new = tokenizer.encode(lead + text, bos=bos or not ids, eos=eos or reply)[dropped:]
        ids, target, before = ids + new, target + [reply] * len(new), text
    return ids, target


def encode_prompt(messages: list[dict], tokenizer, template: Template) -> list[int]:
    """BOS and the prompt, up to where the reply goes on: how encode_example's ids of the same conversation begin.
    ValueError where check_messages(messages, "user") finds fault."""
    return _encode(check_messages(messages, "user"), tokenizer, template)[0]


def encode_example(record: dict, tokenizer, template: Template, max_len: int) -> tuple[list[int], list[bool]] | None:
    """An sft record -> at most max_len ids, BOS first, and flags, True where the token is learnt: replies and their EOS,
    or all of a {"text"} but BOS. None if the cut leaves nothing to learn."""
    if "text" in record:
        ids = tokenizer.encode(record["text"], bos=True, eos=True)
        target = [False] + [True] * (len(ids) - 1)
    else:
        ids, target = _encode(record["messages"], tokenizer, template)
    return (ids[:max_len], target[:max_len]) if any(target[:max_len]) else None


def encode_preference(record: dict, tokenizer, template: Template, max_len: int) -> tuple[list[list[int]], int] | None:
    """A preference record -> ids of prompt + response + EOS, at most max_len, for each response, best first, and the
    prompt's length. A response that the cut made equal to a better one would teach nothing (loss ln 2, gradient 0) and is
    left out. None if fewer than two remain, as where the prompt alone fills max_len."""
    prompt = encode_prompt(record["messages"], tokenizer, template)
    rows = []
    for response in record["responses"]:
        answered = [*record["messages"], {"role": "assistant", "content": response}]
        row = _encode(answered, tokenizer, template)[0][:max_len]
        if row not in rows:
            rows.append(row)
    return (rows, len(prompt)) if len(rows) > 1 else None


def encode_all(records: list[dict], encode: Callable, what: str) -> tuple[list, int]:
    """encode(record) of each record but the None, and the number of those. ValueError if all are None, in which `what`
    names the records ("preferences")."""
    encoded = [example for record in records if (example := encode(record)) is not None]
    if records and not encoded:
        raise ValueError(f"none of the {len(records)} {what} fits: the prompt alone fills max_len, or the responses are "
                         "equal up to it; raise --max_len")
    return encoded, len(records) - len(encoded)


# ---- from ids to batches --------------------------------------------------------------------------------------------

def split_held_out(records: list, n: int, seed: int) -> tuple[list, list]:
    """(train, held_out): n records, at most a tenth, drawn by the seed; both parts keep the order of the records."""
    held = set(random.Random(f"held out {seed}").sample(range(len(records)), min(n, len(records) // 10)))
    return [record for i, record in enumerate(records) if i not in held], [records[i] for i in sorted(held)]


WINDOW = 50  # global batches sorted together: enough for little padding, few enough to mix the lengths over an epoch
CHUNK = 8  # neighbours in length that stay together. A global batch of many chunks mixes all lengths, and so all kinds of


def _chunks(items: list, size: int) -> list[list]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _epoch(lengths: list[int], batch: int, seed: int, epoch: int) -> list[int]:
    """The order of a whole epoch: shuffled, sorted by length within windows so that neighbours need little padding, then
    the chunks of each window shuffled, a smaller one last."""
    rng = random.Random(f"{seed} {epoch}")  # a string is hashed by SHA-512: the same order on every platform
    order = list(range(len(lengths)))
    rng.shuffle(order)
    window = WINDOW * batch
    starts = range(0, max(1, len(order) // window) * window, window)  # the last window takes the rest, so none is small
    result = []
    for start, stop in pairwise([*starts, len(order)]):
        chunks = _chunks(sorted(order[start:stop], key=lengths.__getitem__), min(batch, CHUNK))  # stable: ties stay shuffled
        rng.shuffle(chunks)
        for indices in sorted(chunks, key=len, reverse=True):  # stable too: only the smaller one moves
            result += indices
    return result


def global_batches(lengths: list[int], batch: int, seed: int, epoch: int, skip: int = 0,
                   skip_batch: int | None = None) -> list[list[int]]:
    """The examples (their indices) of each step of an epoch, every example once, the last step perhaps with fewer.

    batch: examples in a step, over all processes and accumulated micro-batches. skip: examples of this epoch that a
    resumed run has consumed; skip_batch: the global batch with which this epoch was begun, if it was another: its order
    is rebuilt and what is left of it cut anew, so that nothing is seen twice or missed."""
    return _chunks(_epoch(lengths, skip_batch if skip and skip_batch else batch, seed, epoch)[skip:], batch)


def micro_batches(indices: list[int], lengths: list[int], batch_size: int, rank: int, world: int) -> list[list[int]]:
    """This rank's part of a global batch, as micro-batches of at most batch_size: sorted by length, dealt out in turn.
    Every rank gets equally many; where there is nothing left for a rank, its last one is empty."""
    chunks = _chunks(sorted(indices, key=lengths.__getitem__), batch_size)
    chunks += [[]] * (-len(chunks) % world)
    return chunks[rank::world]


def padding_share(rows: list[list[int]], batches: list[list[list[int]]]) -> float:
    """The share of padding among all tokens, 0 to 1. rows: tokens of each example's rows; each batch is a list of micro-batches."""
    micro = [[n for i in indices for n in rows[i]] for batch in batches for indices in batch]
    return 1 - sum(map(sum, micro)) / sum(len(lengths) * max(lengths) for lengths in micro)


def pad(rows: list[list[int]], filler: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of ids -> tokens (B, T) int64, padded on the right, and mask (B, T) bool, True where the token is real."""
    width = max(map(len, rows), default=0)
    tokens = torch.tensor([row + [filler] * (width - len(row)) for row in rows], dtype=torch.int64)
    mask = torch.arange(width) < torch.tensor([len(row) for row in rows], dtype=torch.int64)[:, None]  # (T,) < (B, 1)
    return tokens, mask


def collate(examples: list[tuple[list[int], list[bool]]], filler: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """encode_example's results -> tokens, mask, target, each (B, T); target is True where the token is learnt."""
    tokens, mask = pad([ids for ids, _ in examples], filler)
    return tokens, mask, pad([flags for _, flags in examples])[0].bool()
