r"""Text to ids and back: the tokenizer, streamed text, prompt templates, training examples, batches.

A model reads and writes ids. A tokenizer of the LLaMA family (sentencepiece) cuts text into pieces, and a piece's id is
its place in the vocabulary. The vocabulary was learnt by byte pair encoding: it began with single characters, and again
and again the two neighbouring pieces that stood together most often were merged into a new one. Spaces belong to the
pieces, written "▁", so the ids alone give the text back. A character without a piece becomes its UTF-8 bytes, so every
text has ids. This is what LLaMA's own tokenizer gives, and what TextStream returns as the ids arrive one by one:

    text           a fox 🦊
    pieces         <s>    ▁a   ▁fo      x      ▁ <0xF0> <0x9F> <0xA6> <0x8A>   </s>
    ids              1   263  1701  29916  29871    243    162    169    141      2
    streamed              "a" " fo"    "x"    " "                        "🦊"

Encoding puts a space before every text, so that "fox" is the same piece at the beginning as inside a sentence. Decoding
drops that space. On the way from a file to a batch (B, T), a conversation is

    a record --normalise--> messages --render--> segments --encode_example--> ids and targets --collate--> tensors

Choices that raise no error when they are made wrongly:
1. A template's markers, such as <|im_end|>, become ids before its gaps are filled. What people say is never searched
   for markers: a user who types "<|im_end|>" gets ordinary pieces. ([INST] is text even in the template of Llama 2.)
2. Only the replies of a conversation are targets. A reply ends in the template's end marker, which is a target too,
   unless max_len cut it: cut text is not an end. What follows the marker belongs to the next question.
3. What stands between two markers is tokenized as one string, as other servers do it, but a reply by itself. So a
   prompt is the exact beginning of its training example. A sentencepiece reply begins with "▁" then. Other servers
   encode "### Response: reply" as one text, and there the reply begins with "▁" too (Hugging Face's tokenizer in its
   default, "legacy" mode).
4. Masks come from lengths, never from comparing ids, so padding may have any id, even that of EOS.
5. The order of an epoch depends on seed, epoch and global batch only: the same steps on 1 process and on 8.

Letters: B rows of a batch, T time.
"""

import codecs
import hashlib
import random
import re
import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import sentencepiece
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data import weights

# ---- the tokenizer: text <-> ids ------------------------------------------------------------------------------------

# What Hugging Face's directories say of a tokenizer. Of the first two, the first is read if both are there.
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "chat_template.jinja")


class Tokenizer:
    """A sentencepiece model. BOS and EOS are added as ids, never as text."""

    def __init__(self, path: str | Path):
        """path: a sentencepiece file, or a directory that has it as tokenizer.model."""
        file = self.file = find_tokenizer(Path(path))
        self.proto = file.read_bytes()
        self.sp = sentencepiece.SentencePieceProcessor()
        try:
            self.sp.LoadFromSerializedProto(self.proto)
        except RuntimeError as error:
            raise ValueError(f"{file} is not a sentencepiece model: copy it again ({error})") from None
        self.fingerprint = hashlib.sha256(self.proto).hexdigest()  # equal fingerprints mean equal ids
        self.vocab_size = self.sp.vocab_size()
        self.bos_id = self.sp.bos_id()
        self.eos_id = self.sp.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise ValueError(f"{file} defines no BOS or no EOS piece: it is not a LLaMA tokenizer")
        self.pad_id = max(self.sp.unk_id(), 0)  # of a reward model: with bytes for every character, no text produces it
        first = self.sp.encode_as_pieces("a")[0]
        self.space = b" " if first.startswith("▁") else b""  # encoding puts it before every text

    def encode(self, text: str, bos: bool = True, eos: bool = False, special: bool = True) -> list[int]:
        """The ids of a text, BOS before them and EOS after them if asked for.

        special: the marks of special tokens inside the text become their ids. A sentencepiece model lists no such marks.
        """
        # Sentencepiece refuses a lone surrogate (half an emoji in broken JSON), so it becomes U+FFFD first.
        valid = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return [self.bos_id] * bos + self.sp.encode(valid) + [self.eos_id] * eos  # 1. never parsed from the text

    def special(self, mark: str) -> int | None:
        """The id of a special token. "<s>" and "</s>" are BOS and EOS, whatever this tokenizer calls them."""
        return {"<s>": self.bos_id, "</s>": self.eos_id}.get(mark)

    def piece(self, i: int) -> str:
        """The piece of an id as the vocabulary has it: "▁fox" or "<0xF0>"."""
        return self.sp.id_to_piece(i) if 0 <= i < self.vocab_size else f"({i})"  # an embedding may have more rows

    def token_bytes(self, i: int) -> bytes:
        """The UTF-8 bytes that an id adds to a text. BOS, EOS and ids beyond the vocabulary add none."""
        if not 0 <= i < self.vocab_size or self.sp.is_control(i):
            return b""
        piece = self.piece(i)
        return bytes.fromhex(piece[3:5]) if self.sp.is_byte(i) else piece.replace("▁", " ").encode()

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids. A byte that is not part of a character becomes U+FFFD."""
        return "".join(self.stream(ids))

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of ids as they arrive, one part for each id (perhaps empty) and one at the end."""
        text = TextStream(self)
        for i in ids:
            yield text.push(i)
        yield text.rest()

    def save(self, directory: str | Path, template: str | None = None) -> None:
        """Writes the tokenizer's files as they came, so that transformers gives a text the same ids. The template is
        named in tokenizer_config.json. If another one came, its Jinja text is replaced."""
        directory, own = Path(directory), "tokenizer.json" if self.file.suffix == ".json" else "tokenizer.model"
        for name in TOKENIZER_FILES:
            came = self.file if name == own else self.file.parent / name
            if came.exists():
                weights.write_file(directory / name, came.read_bytes())
            else:
                (directory / name).unlink(missing_ok=True)  # another tokenizer's, from an earlier run
        config_file, jinja_file = directory / "tokenizer_config.json", directory / "chat_template.jinja"
        if config_file.exists():
            config = weights.read_json(config_file)
        else:
            config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False,
                      "legacy": True, "bos_token": self.piece(self.bos_id), "eos_token": self.piece(self.eos_id),
                      "unk_token": self.piece(self.pad_id)}
        if template is not None:
            config["template"] = template
            if template != read_template(directory):
                config["chat_template"] = TEMPLATES[template].jinja(self)
                if jinja_file.exists():  # it counts more than the config's text
                    weights.write_file(jinja_file, config["chat_template"].encode())
        weights.write_json(config_file, config)


class TextStream:
    """Ids go in and text comes out, one id at a time. Joined, the parts are the text of all ids.

    A character has up to four bytes in UTF-8, and each byte may come in an id of its own. Half a character is not text.
    So the bytes of the ids go to a UTF-8 decoder. It returns a character when its last byte is there, and keeps the
    bytes of an unfinished one. If the next byte does not continue that character, U+FFFD takes the character's place.

    before: ids whose text is known already, such as a prompt. The stream goes on after them.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()):
        self.token_bytes = tokenizer.token_bytes
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.space = tokenizer.space  # to be dropped from the first bytes
        for i in before:
            self.push(i)

    def push(self, i: int) -> str:
        """The text that this id completes."""
        new = self.token_bytes(i)
        if new:
            new = new.removeprefix(self.space)
            self.space = b""
        return self.utf8.decode(new)

    def rest(self) -> str:
        """The text of the bytes that are kept, when no more ids come."""
        return self.utf8.decode(b"", final=True)


def check_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises ValueError if the tokenizer has more pieces than the model's embedding has rows (vocab_size)."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} pieces, the model's embedding {vocab_size} rows: "
                         "use the tokenizer.model that came with the model")


# ---- templates: the words around a conversation ---------------------------------------------------------------------


# The markers that are ids. Other markers, such as Llama 2's [INST] and Zephyr's <|user|>, are text.
MARKER = re.compile(r"(</?s>|<\|(?:im_start|im_end|start_header_id|end_header_id|eot_id)\|>)")


class Segment(NamedTuple):
    """A marker, which becomes its id, or a text, which is tokenized on its own."""

    text: str
    marker: bool
    target: bool


def fill(wording: str, target: bool, **said: str | None) -> list[Segment]:
    """A wording -> its markers, and between them its texts, filled with what was said. No text is searched for markers,
    because the wording is split before it is filled."""
    parts = MARKER.split(wording)  # a text, a marker, a text, ..., a text
    return [Segment(part.format(**said), place % 2 == 1, target) for place, part in enumerate(parts) if part]


class Template(NamedTuple):
    """The words around a conversation. {system}, {question}, {input} and {reply} are what its messages say. {opening}
    stands before a question. <s> and </s> are the ids BOS and EOS, whatever the tokenizer calls them."""

    question: str                # a user's turn, up to where the reply goes on
    input: str = "\n{input}"     # follows a question that has an "input", as Alpaca's records have
    reply: str = "{reply}"
    end: str = "</s>"            # the marker that closes a reply
    system: str = "<s>{system}"  # {opening} of the first question, if the conversation has a system message
    opening: str = "<s>"         # {opening} of the first question, if it has none
    opening_input: str = ""      # the same for a first question with an input, if it is worded differently
    again: str = ""              # {opening} of every later question
    strip: tuple[str, ...] = ()  # the roles whose messages lose the white space around them

    @property
    def inside(self) -> bool:
        """Is the opening stripped together with its question? White space between the two is inside then, and stays."""
        return "{opening}{question}" in self.question

    def render(self, messages: list[dict]) -> list[Segment]:
        """Checked messages -> segments. The words of a reply are one segment."""
        segments, opening, system = [], self.opening, None
        if "input" in messages[0]:
            opening = self.opening_input or opening
        for message in messages:
            said = message["content"]
            if "input" in message:
                said += self.input.format(input=message["input"])
            if message["role"] in self.strip:
                said = said.rstrip() if self.inside and opening else said.strip()
            if message["role"] == "system":
                opening, system = self.system, said
            elif message["role"] == "assistant":
                segments += fill(self.reply + self.end, target=True, reply=said)
            else:
                wording = self.question.replace("{opening}", opening)
                segments += fill(wording, target=False, question=said, system=system)
                opening = self.again
        return segments

    def jinja(self, tokenizer: Tokenizer) -> str:
        """The template as a chat_template, so that other servers give a conversation the same ids with this tokenizer.
        """
        names = dict.fromkeys(("{system}", "{question}", "{reply}"), "said")
        names |= {"{opening}": "turn.opening", "{input}": "message['input']", "</s>": "eos_token"}
        names["<s>"] = "bos_token" if tokenizer.bos_id is not None else "''"

        def expression(wording: str) -> str:
            parts = filter(None, re.split(r"(</?s>|{\w+})", wording))
            return " + ".join(names.get(part, repr(part)) for part in parts) or "''"

        asked, end, start = self.question.partition(self.end)  # `start` opens the reply
        space = tokenizer.space.decode() if not self.question.endswith("\n") else ""  # a reply's own "▁"
        wordings = self._asdict() | {"question": asked + end, "start": start, "reply": space + self.reply + self.end}
        expressions = {name: expression(words) for name, words in wordings.items() if isinstance(words, str)}
        inside = "turn.opening" if self.inside else "false"
        return JINJA.substitute(expressions, strip=list(self.strip), inside=inside)


# Template.render in Jinja. The names after $ are expressions that Template.jinja makes of the wording.
JINJA = string.Template(
    "{% set turn = namespace(opening=messages[0]['input'] and $opening_input or $opening) %}"
    "{% for message in messages %}"
    "{% set said = message['content'] + ($input if message['input'] else '') %}"
    "{% if message['role'] in $strip %}{% set said = said.rstrip() if $inside else said.strip() %}{% endif %}"
    "{% if message['role'] == 'system' %}{% set turn.opening = $system %}"
    "{% elif message['role'] == 'assistant' %}{{ $reply }}"
    "{% else %}{{ $question }}{% if add_generation_prompt or not loop.last %}{{ $start }}{% endif %}"
    "{% set turn.opening = $again %}{% endif %}{% endfor %}")

# Stanford Alpaca's two wordings, which Coati took over: github.com/tatsu-lab/stanford_alpaca#data-release
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
ALPACA_INPUT = ("Below is an instruction that describes a task, paired with an input that provides further context. "
                "Write a response that appropriately completes the request.")
# FastChat's vicuna_v1.1: github.com/lm-sys/FastChat/blob/main/docs/vicuna_weights_version.md
VICUNA = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions.")

# SmolLM2's own Jinja puts it before a conversation without a system message.
SMOLLM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
# Llama 3.1's Jinja opens every system message with two dates, and puts them there even if no one wrote a message. Its
# today is the 26th of July 2024. Llama 3.2's Jinja asks the clock instead, and both word tools: we do neither.
LLAMA31 = ("<s><|start_header_id|>system<|end_header_id|>\n\n"
           "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n{system}<|eot_id|>")

TEMPLATES = {
    "alpaca": Template(
        opening="<s>" + ALPACA,
        opening_input="<s>" + ALPACA_INPUT,
        question="{opening}\n\n### Instruction:\n{question}\n\n### Response:",
        input="\n\n### Input:\n{input}"),
    # Meta's chat_completion. Every question opens with BOS, and a space stands between a reply and its EOS.
    "llama2": Template(
        system="<<SYS>>\n{system}\n<</SYS>>\n\n",
        opening="",
        question="<s>[INST] {opening}{question} [/INST]",
        reply="{reply} ",
        strip=("user", "assistant")),
    # TinyLlama's too. Every turn ends in EOS, and a reply begins its line, without a space.
    "zephyr": Template(
        system="<s><|system|>\n{system}</s>\n",
        question="{opening}<|user|>\n{question}</s>\n<|assistant|>\n",
        again="\n"),
    "vicuna": Template(
        opening=f"<s>{VICUNA} ",
        system="<s>{system} ",
        question="{opening}USER: {question} ASSISTANT:"),
    # HH-RLHF's transcript, which base models continue well.
    "plain": Template(
        system="<s>{system}\n\n",
        question="{opening}Human: {question}\n\nAssistant:",
        again="\n\n"),
    # OpenAI's markup of chats, as SmolLM2 words it. No BOS opens it.
    "chatml": Template(
        opening=f"<|im_start|>system\n{SMOLLM}<|im_end|>\n",
        system="<|im_start|>system\n{system}<|im_end|>\n",
        question="{opening}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n",
        end="<|im_end|>",
        again="\n"),
    "llama3": Template(
        system="<s><|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>",
        question="{opening}<|start_header_id|>user<|end_header_id|>\n\n{question}<|eot_id|>"
                 "<|start_header_id|>assistant<|end_header_id|>\n\n",
        end="<|eot_id|>",
        strip=("system", "user", "assistant")),
}
TEMPLATES["llama3.1"] = TEMPLATES["llama3"]._replace(system=LLAMA31, opening=LLAMA31.replace("{system}", ""))


def check_messages(messages: list[dict], last: str) -> list[dict]:
    """Returns messages if they are an optional system message, then user and assistant in turn up to the role `last`.
    ValueError with the reason otherwise, and for a blank user message. A blank reply is legal: it teaches EOS."""
    turns = list(messages)
    if turns and turns[0]["role"] == "system":
        del turns[0]
    for number, turn in enumerate(turns, 1):
        if turn["role"] != ("assistant", "user")[number % 2]:
            raise ValueError(f"turn {number} is the {turn['role']}'s, but user and assistant alternate, the user first")
        if turn["role"] == "user" and not turn["content"].strip():
            raise ValueError("the prompt is empty")
    if not turns or turns[-1]["role"] != last:
        raise ValueError(f"the conversation must end with a message of the {last}")
    return messages


# ---- text -> ids ----------------------------------------------------------------------------------------------------


def marker_ids(marker: str, tokenizer: Tokenizer) -> list[int]:
    """The id of a marker, in a list. The list is empty for the BOS of a tokenizer that opens texts with none."""
    found = tokenizer.special(marker)
    if found is None and marker != "<s>":
        raise ValueError(f"the tokenizer has no {marker}: template and tokenizer do not fit, choose by --template")
    return [] if found is None else [found]


def answer_end(tokenizer: Tokenizer, template: Template) -> int:
    """The id of the marker that closes a reply: a target of every example, and where generation stops."""
    return marker_ids(template.end, tokenizer)[0]


def encode_messages(messages: list[dict], tokenizer: Tokenizer, template: Template) -> tuple[list[int], list[bool]]:
    """Messages -> ids and target flags, uncut."""
    ids, target, before = [], [], ""
    for text, marker, is_target in template.render(messages):
        if marker:
            new = marker_ids(text, tokenizer)
        else:
            # A reply that begins a line has no "▁" (Zephyr's): it is encoded after a line break, which is dropped.
            line_break = "\n" if is_target and tokenizer.space and before.endswith("\n") else ""
            dropped = len(tokenizer.encode(line_break, bos=False))
            new = tokenizer.encode(line_break + text, bos=False, special=False)[dropped:]  # 1., 3.
        ids += new
        target += [is_target] * len(new)  # 2. replies alone, with their end
        before = text
    return ids, target


def encode_prompt(messages: list[dict], tokenizer: Tokenizer, template: Template) -> list[int]:
    """The ids of a prompt, up to where the reply begins. The ids of its training example begin with them.
    ValueError where check_messages(messages, "user") finds fault."""
    ids, _ = encode_messages(check_messages(messages, "user"), tokenizer, template)
    return ids


def encode_example(record: dict, tokenizer: Tokenizer, template: Template,
                   max_len: int) -> tuple[list[int], list[bool]] | None:
    """An sft record -> at most max_len ids, and flags that are True where the id is a target: replies and their end
    markers, or all of a {"text"} but the first id, which nothing predicts. The first is BOS where the tokenizer opens a
    text with it. None if the cut leaves no target."""
    if "text" in record:
        ids = tokenizer.encode(record["text"], bos=True, eos=True)
        target = [False] + [True] * (len(ids) - 1)
    else:
        ids, target = encode_messages(record["messages"], tokenizer, template)
    return (ids[:max_len], target[:max_len]) if any(target[:max_len]) else None


def encode_preference(record: dict, tokenizer: Tokenizer, template: Template, max_len: int) -> list[list[int]] | None:
    """A preference record -> for each response, best first, the ids of prompt + response + its end, at most max_len.

    A response that the cut made equal to a better one is left out: it would teach nothing (loss ln 2, gradient 0). None
    if fewer than two remain, for example because the prompt alone fills max_len."""
    rows = []
    for response in record["responses"]:
        answered = [*record["messages"], {"role": "assistant", "content": response}]
        ids, _ = encode_messages(answered, tokenizer, template)
        if ids[:max_len] not in rows:
            rows.append(ids[:max_len])
    return rows if len(rows) > 1 else None


def encode_all(records: list[dict], encode: Callable, what: str) -> tuple[list, int]:
    """encode(record) of each record that gives one, and the number of records that give None. ValueError if all give
    None; in its sentence `what` names the records ("preferences")."""
    encoded = [example for example in map(encode, records) if example is not None]
    total = len(records)
    if records and not encoded:
        raise ValueError(f"none of the {total} {what} fits: the prompt alone fills max_len, or the responses are equal "
                         "up to it; raise --max_len")
    return encoded, total - len(encoded)


# ---- ids -> batches -------------------------------------------------------------------------------------------------

# Global batches whose examples are sorted by length together: enough for little padding, few enough to mix the lengths
# over an epoch.
WINDOW = 50
# Examples of a sorted window that stay together. A global batch of many chunks mixes all lengths, and so all kinds of
# text. If whole batches had one length, a bilingual set would give all-Chinese and all-English steps in turn, and
# training would swing between them. Micro-batches are cut from a sorted global batch, so padding stays small if
# --batch_size is small.
CHUNK = 8


def split_held_out(records: list, n: int, seed: int) -> tuple[list, list]:
    """(train, held_out): n records, at most a tenth, drawn by the seed. Both parts keep the order of the records."""
    rng = random.Random(f"held out {seed}")
    held = set(rng.sample(range(len(records)), min(n, len(records) // 10)))
    return [record for i, record in enumerate(records) if i not in held], [records[i] for i in sorted(held)]


def chunks(items: list, size: int) -> list[list]:
    return [items[i:i + size] for i in range(0, len(items), size)]


def epoch_order(lengths: list[int], batch: int, seed: int, epoch: int) -> list[int]:
    """The order of a whole epoch. The examples are shuffled and cut into windows; a small last window joins the one
    before it. A window is sorted by length, so that neighbours need little padding, and cut into chunks, which are
    shuffled again, a smaller one last."""
    rng = random.Random(f"{seed} {epoch}")  # 5. a string is hashed by SHA-512: the same order on every platform
    shuffled = list(range(len(lengths)))
    rng.shuffle(shuffled)
    windows = chunks(shuffled, WINDOW * batch)
    if len(windows) > 1 and len(windows[-1]) < WINDOW * batch:
        small = windows.pop()
        windows[-1] += small
    order = []
    for window in windows:
        parts = chunks(sorted(window, key=lengths.__getitem__), min(batch, CHUNK))  # a stable sort: ties stay shuffled
        rng.shuffle(parts)
        parts.sort(key=len, reverse=True)  # stable too: only the smaller one moves
        for part in parts:
            order += part
    return order


def global_batches(lengths: list[int], batch: int, seed: int, epoch: int, skip: int = 0,
                   skip_batch: int | None = None) -> list[list[int]]:
    """The examples (their indices) of each step of an epoch: every example once, the last step perhaps with fewer.

    batch: examples in a step, over all processes and accumulated micro-batches.
    skip: examples of this epoch that a resumed run has consumed.
    skip_batch: the global batch with which this epoch was begun, if it was another. The order of the epoch is rebuilt
    with it, and the remaining examples are cut into new batches, so that no example is seen twice or missed."""
    begun_with = skip_batch if skip and skip_batch else batch
    return chunks(epoch_order(lengths, begun_with, seed, epoch)[skip:], batch)


def micro_batches(indices: list[int], lengths: list[int], batch_size: int, rank: int, world: int) -> list[list[int]]:
    """One process's micro-batches of a global batch, each of at most batch_size examples of similar length.

    The examples are sorted by length, cut, and dealt out in rounds. Every process has a micro-batch in every round,
    because all processes call backward together; [] means that no examples are left for it. Of 9 examples, with
    batch_size 2 and 3 processes:

        round                     1                |             2
        micro-batch    [0, 1]  [2, 3]  [4, 5]      |  [6, 7]    [8]     []
        rank             0       1       2         |    0        1       2
    """
    micro = chunks(sorted(indices, key=lengths.__getitem__), batch_size)
    micro += [[]] * (-len(micro) % world)
    return micro[rank::world]


def padding_share(rows: list[list[int]], batches: list[list[list[int]]]) -> float:
    """The share of padding among all tokens, 0 to 1.

    rows: for each example the lengths of its rows. batches: for each global batch its micro-batches of indices, none of
    them empty."""
    micro = [[n for i in indices for n in rows[i]] for batch in batches for indices in batch]
    return 1 - sum(map(sum, micro)) / sum(len(lengths) * max(lengths) for lengths in micro)


def pad(rows: list[list[int]], filler: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of ids -> tokens (B, T) int64, padded on the right, and mask (B, T) bool, True where the token is real."""
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    tokens = pad_sequence(tensors, batch_first=True, padding_value=filler)  # (B, T)
    lengths = torch.tensor([len(row) for row in rows])[:, None]             # (B, 1)
    return tokens, torch.arange(tokens.shape[1]) < lengths                  # (B, T) 4.


def collate(examples: list[tuple[list[int], list[bool]]], filler: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """encode_example's results -> tokens, mask, target, each (B, T). target is True where the token is a target."""
    tokens, mask = pad([ids for ids, _ in examples], filler)    # (B, T)
    target, _ = pad([flags for _, flags in examples])           # (B, T)
    return tokens, mask, target.bool()


# ---- files ----------------------------------------------------------------------------------------------------------


def has_tokenizer(directory: str | Path) -> bool:
    """Does a directory hold a tokenizer's file?"""
    return (Path(directory) / "tokenizer.model").exists()


def find_tokenizer(path: Path) -> Path:
    """The sentencepiece file of a directory. Meta puts one file beside the folders 7B, 13B, ..."""
    file = path / "tokenizer.model" if path.is_dir() else path
    if not file.exists() and (path / "params.json").exists():
        file = path.parent / "tokenizer.model"
    if not file.exists():
        unread = ", a tokenizer.json cannot be read here" if (path / "tokenizer.json").exists() else ""
        raise FileNotFoundError(f"{file} does not exist{unread}: put the sentencepiece file of the original release "
                                "there")
    return file


# What a Jinja text has if it says what a template of ours says, and what it then has not. Any other text is unknown. To
# take one for another would put a wrong word, or a system message that the model never saw, into every prompt, and
# raise no error: Qwen's ChatML has another default system message, Mistral's [INST] has no <<SYS>>.
KNOWN_BY = {
    "chatml": (["<|im_start|>", "<|im_end|>\n", SMOLLM], ["bos_token"]),
    "llama3.1": (["<|start_header_id|>", "Cutting Knowledge Date: December 2023\n", 'set system_message = ""'], []),
    "llama3": (["<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>", "trim", "bos_token"], ["system"]),
    "llama2": (["bos_token + '[INST] '", "'<<SYS>>\n'", "'\n<</SYS>>\n\n'", "' [/INST]'"], ["system_message = '"]),
    "zephyr": (["'<|user|>\n' + message['content'] + eos_token", "'<|assistant|>"], ["messages[0]"]),
    "vicuna": (["'USER: '", "ASSISTANT:", VICUNA[:VICUNA.index("user's")], "eos_token"], []),
    "alpaca": (["### Instruction:\n", "### Response:", ALPACA], ["### Response:\n"]),
}


def find_template(directory: Path) -> tuple[str | None, Path | None]:
    """The name of a directory's prompt template, and the file that says it. The name is None where the file's Jinja
    text is unknown, and the file too where there is none."""
    file = directory / "tokenizer_config.json"
    config = weights.read_json(file) if file.exists() else {}
    if config.get("template") in TEMPLATES:
        return config["template"], file
    text = config.get("chat_template") or ""
    if isinstance(text, list):  # of named ones
        text = {one["name"]: one["template"] for one in text}.get("default", "")
    if (directory / "chat_template.jinja").exists():
        file = directory / "chat_template.jinja"
        text = file.read_text("utf-8")
    said = text.replace("\\n", "\n")
    for name, (has, has_not) in KNOWN_BY.items():
        if all(words in said for words in has) and not any(words in said for words in has_not):
            return name, file
    return None, file if text else None


def read_template(directory: str | Path) -> str | None:
    """The name of a directory's prompt template: as tokenizer_config.json says, or else as the Jinja text shows."""
    name, _ = find_template(Path(directory))
    return name


def choose_template(directory: str | Path, asked: str | None, usual: str, say: Callable[[str], object]) -> str:
    """The name of the template to use with a directory: the one asked for, else the directory's own, else the usual.
    say takes a note where a template is replaced or the usual one is taken."""
    own, file = find_template(Path(directory))
    if asked is not None:
        if own not in (None, asked):
            say(f"note: {directory} was trained with the template {own}, --template {asked} replaces it")
        return asked
    if own is None and file is not None:
        raise ValueError(f"{file} has a chat_template that is none of ours: choose the one nearest to it by --template "
                         + "|".join(TEMPLATES))
    if own is None:
        say(f"note: {directory} names no known prompt template, the {usual} one is used; --template chooses another")
    return own or usual
