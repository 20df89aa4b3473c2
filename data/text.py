r"""Text to ids and back: the tokenizer, streamed text, prompt templates, training examples, batches.

A model reads and writes ids. A tokenizer cuts text into pieces, and a piece's id is its place in the vocabulary, which
was learnt by byte pair encoding: it began with the smallest pieces, and again and again the two neighbours that stood
together most often were merged into a new one. Spaces belong to the pieces, so the ids alone give the text back.

LLaMA, Llama 2 and TinyLlama use sentencepiece. It merges characters, and writes a space "▁". A character without a
piece becomes its UTF-8 bytes. `streamed` is what TextStream returns as the ids arrive one by one:

    text           a fox 🦊
    pieces         <s>    ▁a   ▁fo      x      ▁ <0xF0> <0x9F> <0xA6> <0x8A>   </s>
    ids              1   263  1701  29916  29871    243    162    169    141      2
    streamed              "a" " fo"    "x"    " "                        "🦊"

Encoding puts a space before every text, so that "fox" is the same piece at the beginning as inside a sentence. Decoding
drops that space.

Llama 3 and SmolLM2 merge bytes, so every text has pieces. A byte is written as a printable character: "Ġ" is a space,
and "ðŁ¦Ĭ" are the four bytes of the fox. SmolLM2 puts no BOS before a text, and ends an answer in its own EOS:

    text           a fox 🦊
    pieces           a   Ġfox   ĠðŁ     ¦      Ĭ <|im_end|>
    ids             81  16438 15107   116    228          2
    streamed       "a" " fox"   " "         "🦊"

    python -m data.text train FILES --vocab_size N OUT      learns a tokenizer of the second kind

On the way from a file to a batch (B, T), a conversation is

    a record --normalise--> messages --render--> segments --encode_example--> ids and targets --collate--> tensors

Choices that raise no error when they are made wrongly:
1. A template's markers, such as <|im_end|>, become ids before its gaps are filled. What people say is never searched
   for markers: a user who types "<|im_end|>" gets ordinary pieces. ([INST] is text even in the template of Llama 2.) A
   record of raw text, {"text"}, has no template. The markers that it spells out are meant, and become ids.
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

import argparse
import base64
import codecs
import hashlib
import itertools
import json
import random
import re
import string
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, lru_cache, partial
from heapq import heappop, heappush
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import sentencepiece
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data import weights

# ---- byte pair encoding ---------------------------------------------------------------------------------------------


def learn(texts: Iterable[str], size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Learns byte pair encoding from texts: the pieces with their ids, and the merges, first to last.

        words of the text            pairs                        merge
        l o w ×5   w i d e s t ×3    (l, o) 5, (s, t) 3, ...      (l, o): "lo" becomes a piece
        lo w ×5    w i d e s t ×3    (lo, w) 5, (s, t) 3, ...     (lo, w): "low" becomes a piece

    Of equally frequent pairs, the one whose left piece has the lower id comes first, then the right one's id decides.
    A pair that stands only once is not merged: learning ends there, even if there are fewer pieces than `size`.

    Every merge looks through all pairs. To 2,000 pieces, the demo's 1.6 MB take 7 seconds on a core of an AMD EPYC. The
    time grows with the number of merges times that of pairs: a vocabulary of 100,000 pieces would need a heap.
    """
    # 1. Equal words are merged alike, so each is kept once, with its count. It begins as single bytes.
    cut = regular(LLAMA3)
    counts = Counter(word for text in texts for word in cut.findall(text))
    pieces = {word: list(spell(word.encode())) for word in counts}
    vocabulary = {byte: i for i, byte in enumerate(sorted(ALPHABET))}
    # 2. How often does each pair of neighbours stand in the text, and in which words?
    pairs, where = Counter(), defaultdict(set)

    def count(word: str, sign: int) -> None:
        for pair in pairwise(pieces[word]):
            pairs[pair] += sign * counts[word]
            where[pair].add(word)

    for word in counts:
        count(word, 1)
    merges = []
    while len(vocabulary) < size:
        # 3. The most frequent pair becomes a piece.
        most = max(pairs.values(), default=0)
        if most < 2:
            break
        equals = [pair for pair, found in pairs.items() if found == most]
        best = min(equals, key=lambda pair: [vocabulary[side] for side in pair])
        merges.append(best)
        vocabulary.setdefault("".join(best), len(vocabulary))
        # 4. It is merged. Counts change only in the words where it stands.
        for word in where.pop(best):
            count(word, -1)
            pieces[word] = merge(pieces[word], {best: 0})
            count(word, 1)
    return vocabulary, merges


def merge(symbols: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Merges neighbours into pieces: always the pair of the lowest rank, and of equal pairs the leftmost.

        s y s t e m s       ranks: (s, t) 0, (e, m) 1, (s, y) 2, (st, em) 3
        s y st e m s        rank 0, although (s, y) stands before it: it was learnt first
        s y st em s         rank 1
        sy st em s          rank 2
        sy stem s           rank 3, whose two pieces ranks 0 and 1 made

    A search through all pairs for every merge would take n² steps for n symbols. So the pairs wait in a heap, lowest
    rank first, and each piece knows its neighbours, so that none has to move.
    """
    end = len(symbols)
    pieces = [*symbols, ""]  # the empty piece closes a ring, and has a rank with nobody
    after = [*range(1, end + 1), 0]
    before = [end, *range(end)]
    heap = []

    def offer(left: int) -> None:
        rank = ranks.get((pieces[left], pieces[after[left]]))
        if rank is not None:
            heappush(heap, (rank, left))

    for left in range(end):
        offer(left)
    while heap:
        # 1. The lowest rank comes out. If an earlier merge has taken one of its two pieces, it is thrown away.
        rank, left = heappop(heap)
        right = after[left]
        if ranks.get((pieces[left], pieces[right])) == rank:
            # 2. The left piece takes the right one in.
            pieces[left] += pieces[right]
            pieces[right] = ""
            after[left] = after[right]
            before[after[right]] = left
            # 3. It makes two new pairs with its neighbours.
            offer(before[left])
            offer(left)
    return [piece for piece in pieces if piece]


def byte_alphabet() -> str:
    """GPT-2's printable character for each byte: its own in Latin-1 where that is printable, else one from U+0100 on.
    A space is "Ġ", a line break "Ċ", byte 255 "ÿ"."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    return "".join(chr(byte if byte in printable else next(others)) for byte in range(256))


ALPHABET = byte_alphabet()


def spell(content: bytes) -> str:
    """Bytes as printable characters."""
    return "".join(ALPHABET[byte] for byte in content)


# ---- words: no piece reaches over their ends ------------------------------------------------------------------------

# How words are cut: GPT-2's pattern, and Llama 3's, in which a word may begin with any one sign, and a number has at
# most three digits. In both, a space belongs to the word behind it.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
WHITE_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Python's \s has \x1c-\x1f too


@cache
def regular(pattern: str) -> re.Pattern:
    r"""A pattern of tokenizer.json for Python's re, which has no \p{..}, and another \s: \p{L}+ -> [A-Za-zªµº...]+"""
    if re.search(r"\\(?!p\{[LMNPSZC]\}|[sSrnt])", pattern):
        raise unknown({"Regex": pattern})
    pattern = pattern.replace(r"\S", r"[^\s]")
    pattern = re.sub(r"(\\p\{.\}|\\s)(?![^\[]*\])", r"[\1]", pattern)  # a class outside of [...] needs its own
    pattern = pattern.replace(r"\s", WHITE_SPACE)
    return re.compile(re.sub(r"\\p\{(.)\}", lambda found: category(found[1]), pattern))


@cache
def category(name: str) -> str:
    r"""The characters of a category of Unicode, such as L (letters) or N (numbers), for the inside of [...]."""
    of_all = "".join(unicodedata.category(chr(code))[0] for code in range(sys.maxunicode + 1))
    runs = [(run.start(), run.end() - 1) for run in re.finditer(f"{name}+", of_all)]
    return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in runs)


# ---- the tokenizer: text <-> ids ------------------------------------------------------------------------------------

CONFIG_FILE, MAP_FILE, JINJA_FILE = "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"
# What Hugging Face's directories say of a tokenizer. Of the first two, the first is read if both are there.
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", CONFIG_FILE, MAP_FILE, "added_tokens.json", JINJA_FILE)


class Tokenizer:
    """One face for both kinds of files. BOS and EOS are added as ids, never as text.

    The kind, a SentencePiece or a BytePairs, knows what a file says: the pieces by their ids; which of them it added
    to those that were learnt; which are special, so that they have no text; whether their letters stand for bytes; and
    `config`, a tokenizer_config.json for where none came.
    """

    def __init__(self, path: str | Path):
        """path: a directory with a tokenizer, or its file: tokenizer.model (sentencepiece, or Llama 3's list of pieces)
        or tokenizer.json."""
        self.file = find_tokenizer(Path(path))
        self.kind, self.content = open_kind(self.file)
        self.fingerprint = hashlib.sha256(self.content).hexdigest()  # equal fingerprints mean equal ids
        self.vocab_size = max(self.kind.pieces) + 1
        self.bos_id, self.eos_id, self.pad_id = self.kind.bos_id, self.kind.eos_id, self.kind.pad_id
        opening = "".join(map(self.piece, self.encode("a", bos=False)))
        self.space = b" " if opening.startswith("▁") else b""  # encoding puts it before a text, decoding drops it

    def encode(self, text: str, bos: bool = True, eos: bool = False, special: bool = True,
               first: bool = True) -> list[int]:
        """The ids of a text.

        bos: what the tokenizer itself puts before a text goes there: BOS, or nothing (SmolLM2).
        eos: EOS goes behind it.
        special: special tokens that the text spells out become their ids. Otherwise they are text like any other, as
        what people say must be. (For a sentencepiece model they always are.)
        first: no other text stands before it. Some tokenizer.json puts "▁" before the first text alone.
        """
        # No file has bytes for a lone surrogate (half an emoji in broken JSON), so it becomes U+FFFD first.
        valid = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        front = [self.bos_id] if bos and self.bos_id is not None else []
        return front + self.kind.encode(valid, special, first) + [self.eos_id] * eos

    def special(self, marker: str) -> int | None:
        """The id of an added token. "<s>" and "</s>" are BOS and EOS, whatever this tokenizer calls them."""
        ids = self.kind.added | {"<s>": self.bos_id, "</s>": self.eos_id}
        return ids.get(marker)

    def piece(self, i: int) -> str:
        """The piece of an id as the vocabulary has it: "▁fox", "Ġfox" or "<0xF0>"."""
        return self.kind.pieces.get(i, f"({i})")  # an embedding may have more rows

    def token_bytes(self, i: int) -> bytes:
        """The UTF-8 bytes that an id adds to a text. Special tokens and ids beyond the vocabulary add none."""
        piece = self.kind.pieces.get(i, "")
        if i in self.kind.special:
            return b""
        if self.kind.byte_level:
            return piece.encode() if piece in self.kind.added else bytes(map(ALPHABET.index, piece))
        return BYTE_PIECES.get(piece) or piece.replace("▁", " ").encode()

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids. A byte that is not part of a character becomes U+FFFD."""
        return "".join(self.stream(ids))

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of ids as they arrive, one part for each id (perhaps empty) and one at the end."""
        text = TextStream(self)
        for i in ids:
            yield text.push(i)
        yield text.rest()

    def save(self, directory: str | Path, template: str | None = None, pad_id: int | None = None) -> None:
        """Writes the tokenizer's files as they came, so that transformers gives a text the same ids. The template is
        named in tokenizer_config.json. If another one came, its Jinja text is replaced.

        pad_id: the id with which other programs must pad what this model reads."""
        came, directory = self.file.parent, Path(directory)
        contents = {name: (came / name).read_bytes() for name in TOKENIZER_FILES if (came / name).exists()}
        contents[self.kind.saved_as] = self.content
        config = weights.read_json(came / CONFIG_FILE) if CONFIG_FILE in contents else {}
        config = config or dict(self.kind.config)
        if template is not None:
            config["template"] = template
            if template != read_template(came):
                config["chat_template"] = TEMPLATES[template].jinja(self)
                if JINJA_FILE in contents:  # it counts more than the config's text
                    contents[JINJA_FILE] = config["chat_template"].encode()
        for name in TOKENIZER_FILES:
            if name in contents:
                weights.write_file(directory / name, contents[name])
            else:
                (directory / name).unlink(missing_ok=True)  # another tokenizer's, from an earlier run
        padding = {"pad_token": self.piece(pad_id)} if pad_id is not None else {}
        weights.write_json(directory / CONFIG_FILE, config | padding)
        if padding and MAP_FILE in contents:  # it may count more than the config
            weights.write_json(directory / MAP_FILE, weights.read_json(directory / MAP_FILE) | padding)


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
                         "use the tokenizer that came with the model")


# ---- sentencepiece --------------------------------------------------------------------------------------------------

# The pieces of single bytes, for characters that have none.
BYTE_PIECES = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}


class SentencePiece:
    """A sentencepiece model, read by its library."""

    saved_as = "tokenizer.model"
    byte_level = False

    def __init__(self, content: bytes, file: Path):
        self.sp = sentencepiece.SentencePieceProcessor()
        try:
            self.sp.LoadFromSerializedProto(content)
            self.pieces = {i: self.sp.id_to_piece(i) for i in range(self.sp.vocab_size())}
        except (RuntimeError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is not a sentencepiece model: copy it again ({error})") from None
        self.bos_id = self.sp.bos_id()
        self.eos_id = self.sp.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise ValueError(f"{file} defines no BOS or no EOS piece: it is not a LLaMA tokenizer")
        self.pad_id = self.sp.unk_id()  # characters without a piece become bytes, so no text produces it
        self.special = set(filter(self.sp.is_control, self.pieces))
        self.added: dict[str, int] = {}  # it lists none
        self.config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False,
                       "legacy": True, "bos_token": self.pieces[self.bos_id], "eos_token": self.pieces[self.eos_id],
                       "unk_token": self.pieces[self.pad_id]}

    def encode(self, text: str, special: bool, first: bool) -> list[int]:
        return self.sp.encode(text)


# ---- tokenizer.json -------------------------------------------------------------------------------------------------

WHOLE = "(?s:.+)"  # all is one word


class BytePairs:
    """What a tokenizer.json says. A text goes through five steps, and the file says what each of them does:

        1. find added tokens     "Café 42<|im_end|>"   ->   "Café 42"   <|im_end|>
        2. normalize             NFC: é is one character, however it was typed
        3. cut into words        "Café"        " 42"
        4. symbols               C a f Ã ©     Ġ 4 2
        5. merge                 Ca fÃ©        Ġ4 2

    The symbols are bytes, written as printable characters. In a file that was made from a sentencepiece model they are
    characters, and the bytes of those that have no piece. What has nothing to do with ids is ignored: truncation,
    padding, offsets, pairs of texts, and the decoder, which undoes steps 4 and 3.
    """

    saved_as = "tokenizer.json"

    def __init__(self, said: dict, config: dict[str, str]):
        """said: the content of a tokenizer.json. config: the texts of tokenizer_config.json, which names EOS."""
        model, tokens = said["model"], said["added_tokens"]
        normalizers, cuts = steps(said.get("normalizer")), steps(said.get("pre_tokenizer"))
        self.byte_level = any(step["type"] == "ByteLevel" for step in cuts)
        check_model(model, self.byte_level)
        for token in tokens:
            if token["single_word"] or token["lstrip"] or token["rstrip"] or token["normalized"] and normalizers:
                raise unknown(token)
        self.vocabulary: dict[str, int] = model["vocab"]
        merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.whole_words = model.get("ignore_merges")  # a word that is a piece stays one, whatever merges would make
        self.added = {token["content"]: token["id"] for token in tokens}
        self.special = {token["id"] for token in tokens if token["special"]}
        self.ids = self.vocabulary | self.added
        self.pieces = {i: piece for piece, i in self.ids.items()}
        if len(self.pieces) < len(self.ids) or any(type(i) is not int or i < 0 for i in self.pieces):
            raise ValueError("tokenizer.json must give every piece a whole number of its own: copy it again")
        ordinary = [content for content, i in self.added.items() if i not in self.special]
        self.searched = {True: one_of(self.added), False: one_of(ordinary)}  # by encode's `special`
        self.steps = [step_of(step) for step in normalizers + cuts]
        if not self.byte_level and not any(re.search("[^▁]▁", left + right) for left, right in merges):
            # No merge joins "▁" to what stands before it, so the text may be cut there, and its words are remembered.
            self.steps.append(cutter("▁+[^▁]*|[^▁]+"))
        self.remembered = lru_cache(maxsize=65536)(self.word_ids)
        self.name_ends(put_before(steps(said.get("post_processor"))), config)

    def name_ends(self, bos: str | None, config: dict[str, str]) -> None:
        """BOS is what the file puts before a text. What it puts behind a text is asked for by encode's `eos`."""
        names = (config.get("eos_token"), "</s>", "<|end_of_text|>")
        known = [self.ids[name] for name in names if name in self.ids]
        if not known:
            raise ValueError("tokenizer.json names no EOS: put the tokenizer_config.json of the release beside it")
        self.bos_id = self.ids[bos] if bos else None
        self.eos_id = known[0]
        # A reward model's padding is an id that no text produces, and never EOS: the config's, or the likeliest name.
        names = [self.pieces[i] for i in sorted(self.special - {self.bos_id, self.eos_id})]
        fillers = [config.get("pad_token", ""), config.get("unk_token", ""), "pad", "unk", "reserved"]
        pad = min(names, key=lambda name: [filler not in name for filler in fillers], default=None)
        self.pad_id = self.ids.get(pad)
        self.config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos,
                       "eos_token": self.pieces[self.eos_id], "pad_token": pad}

    def encode(self, text: str, special: bool, first: bool) -> list[int]:
        ids = []
        for place, part in enumerate(self.searched[special].split(text)):
            if place % 2 == 1:  # 1. a text, a token, a text, ..., a text
                ids.append(self.added[part])
                continue
            words = [part] if part else []
            for step in self.steps:  # 2., 3.
                words = [new for i, word in enumerate(words) for new in step(word, first and place == i == 0)]
            for word in words:
                ids += self.remembered(word) if len(word) < 256 else self.word_ids(word)
        return ids

    def word_ids(self, word: str) -> list[int]:
        """The ids of a word. A symbol without a piece is dropped: SmolLM2 has none for some control characters."""
        if self.byte_level:
            word = spell(word.encode())  # 4.
        if self.whole_words and word in self.vocabulary:
            return [self.vocabulary[word]]
        symbols = []
        for letter in word:
            symbols += [letter] if letter in self.vocabulary else [f"<0x{byte:02X}>" for byte in letter.encode()]
        known = [symbol for symbol in symbols if symbol in self.vocabulary]
        return [self.vocabulary[piece] for piece in merge(known, self.ranks)]  # 5.


def steps(said: dict | None) -> list[dict]:
    """The steps of a normalizer, a pre-tokenizer or a post-processor: none, one, or those of a Sequence."""
    if said is None:
        return []
    if said["type"] != "Sequence":
        return [said]
    return next(value for value in said.values() if isinstance(value, list))


def unknown(said: dict) -> ValueError:
    shown = json.dumps(said, ensure_ascii=False)[:200]
    return ValueError(f"tokenizer.json has what is not known here: {shown}; a tokenizer.model beside it is read first")


def check_model(model: dict, byte_level: bool) -> None:
    """Refuses what gives other ids than these merges."""
    complete = model["vocab"].keys() >= set(ALPHABET if byte_level else BYTE_PIECES)  # no character is unknown then
    covered = byte_level or complete and model["byte_fallback"]
    refused = ["dropout", "continuing_subword_prefix", "end_of_word_suffix"] + ["unk_token"] * (not complete)
    if model["type"] != "BPE" or not covered or any(map(model.get, refused)):
        raise unknown({key: value for key, value in model.items() if key not in ("vocab", "merges")})


def step_of(said: dict) -> Callable[[str, bool], list[str]]:
    """What a step does with a text: makes another of it, or cuts words. It is told if that is where all text begins."""
    match said:
        case {"type": "NFC"}:
            return lambda text, first: [unicodedata.normalize("NFC", text)]
        case {"type": "Prepend", "prepend": str(front)}:
            return lambda text, first: [front + text]
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
            return lambda text, first: [text.replace(old, new)]
        case {"type": "Metaspace", "replacement": "▁"} if said.get("prepend_scheme", "always") in SCHEMES:
            pattern = "▁?[^▁]+|▁" if said.get("split", True) else WHOLE
            cut = cutter(pattern, front="▁", scheme=said.get("prepend_scheme", "always"))
            return lambda text, first: cut(text.replace(" ", "▁"), first)
        case {"type": "ByteLevel"}:
            pattern = GPT2 if said.get("use_regex", True) else WHOLE
            return cutter(pattern, front=" ", scheme="always" if said["add_prefix_space"] else "never")
        case {"type": "Digits", "individual_digits": bool(each)}:
            return cutter(r"\p{N}" if each else r"\p{N}+")
        case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False}:
            return cutter(pattern)
    raise unknown(said)


SCHEMES = ("always", "first", "never")


def cutter(pattern: str, front: str = "", scheme: str = "never") -> Callable[[str, bool], list[str]]:
    """Cuts a text into what the pattern matches and what lies between. `front` is put before it, if it is not there:
    "always", only where all text begins ("first"), or "never", see SCHEMES."""
    words = regular(f"({pattern})")

    def cut(text: str, first: bool) -> list[str]:
        if scheme == "always" or scheme == "first" and first:
            text = front + text.removeprefix(front)
        return [word for word in words.split(text) if word]

    return cut


def one_of(contents: Iterable[str]) -> re.Pattern:
    """A pattern that cuts a text at these strings, at the longest where several begin. Of none, it never cuts."""
    longest_first = sorted(contents, key=len, reverse=True)
    return re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")


def put_before(processors: list[dict]) -> str | None:
    """The token that the steps of a post-processor put before a text."""
    found = None
    for step in processors:
        match step:
            case {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": str(token)}}, {"Sequence": _}, *_]}:
                found = token
            case {"type": "ByteLevel"} | {"type": "TemplateProcessing", "single": [{"Sequence": _}, *_]}:
                continue
            case _:
                raise unknown(step)
    return found


# ---- what becomes a tokenizer.json ----------------------------------------------------------------------------------

LLAMA3_LINES = re.compile(rb"([A-Za-z0-9+/]+=* \d+(\s+|$))+")
# Llama 3's special tokens by their place behind the vocabulary. The other 251 are reserved.
LLAMA3_SPECIAL = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}


def from_llama3(lines: bytes) -> dict:
    """Llama 3's tokenizer.model, lines of a piece in base64 and its id, as the content of a tokenizer.json.

    The id is the rank too. There are no merges: any two pieces that make up a third may merge to it, at its rank."""
    coded = [line.split() for line in lines.splitlines()]
    vocabulary = {spell(base64.b64decode(piece)): int(i) for piece, i in coded}
    merges = [(piece[:cut], piece[cut:]) for piece in vocabulary for cut in range(1, len(piece))]
    merges = [(left, right) for left, right in merges if left in vocabulary and right in vocabulary]
    merges.sort(key=lambda pair: [vocabulary[piece] for piece in ("".join(pair), *pair)])
    reserved = itertools.count()
    names = [LLAMA3_SPECIAL.get(i) or f"reserved_special_token_{next(reserved)}" for i in range(256)]
    return byte_level_json(vocabulary, merges, [f"<|{name}|>" for name in names])


def byte_level_json(vocabulary: dict[str, int], merges: list[tuple[str, str]], special: Sequence[str]) -> dict:
    """The content of a tokenizer.json like Llama 3's: its pattern, special tokens behind the vocabulary, and the first
    of them, BOS, before every text."""
    bos, bos_id = special[0], len(vocabulary)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    split = {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    front = {"SpecialToken": {"id": bos, "type_id": 0}}
    text, second = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": name} | flags for i, name in enumerate(special, bos_id)],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [front, text],
            "pair": [front, text, second],
            "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
        },
        "decoder": byte_level,
        "model": {"type": "BPE", "ignore_merges": True, "vocab": vocabulary, "merges": merges},
    }


# ---- templates: the words around a conversation ---------------------------------------------------------------------

# The markers that are ids. Other markers, such as Llama 2's [INST] and Zephyr's <|user|>, are text.
MARKER = re.compile(r"(</?s>|<\|(?:im_start|im_end|start_header_id|end_header_id|eot_id)\|>)")


class Segment(NamedTuple):
    """A marker, which becomes its id, or a text, which is tokenized on its own."""

    text: str
    marker: bool
    target: bool | None  # None outside of replies


def fill(wording: str, target: bool | None, **said: str | None) -> list[Segment]:
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
        """Checked messages -> segments. The words of a reply are one segment. One with "train": False is no target."""
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
                segments += fill(self.reply + self.end, target=message.get("train", True), reply=said)
            else:
                wording = self.question.replace("{opening}", opening)
                segments += fill(wording, target=None, question=said, system=system)
                opening = self.again
        return segments

    def jinja(self, tokenizer: Tokenizer) -> str:
        """The template as a chat_template: with it, other servers give a conversation the ids that we give it."""
        names = dict.fromkeys(("{system}", "{question}", "{reply}"), "said")
        names |= {"{opening}": "turn.opening", "{input}": "message['input']", "</s>": "eos_token"}
        names["<s>"] = "bos_token" if tokenizer.bos_id is not None else "''"

        def expression(wording: object) -> str:
            """'Human: {question}' -> '"Human: " + said + ""'"""
            return re.sub(r"</?s>|{\w+}", lambda gap: f'" + {names[gap[0]]} + "', json.dumps(wording))

        asked, end, start = self.question.partition(self.end)  # `start` opens the reply
        space = tokenizer.space.decode() if not self.question.endswith("\n") else ""  # a reply's own "▁"
        wordings = self._asdict() | {"question": asked + end, "start": start, "reply": space + self.reply + self.end}
        wordings["inside"] = self.inside
        return JINJA.substitute({name: expression(wording) for name, wording in wordings.items()})


# Template.render in Jinja. The names after $ are expressions that Template.jinja makes of the wording.
JINJA = string.Template(
    "{% set turn = namespace(opening=messages[0]['input'] and $opening_input or $opening) %}"
    "{% for message in messages %}"
    "{% set said = message['content'] + ($input if message['input'] else '') %}"
    "{% if message['role'] in $strip %}"
    "{% set said = said.rstrip() if $inside and turn.opening else said.strip() %}{% endif %}"
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
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
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
        raise ValueError(f"{tokenizer.file} has no {marker}: template and tokenizer do not fit, choose by --template")
    return [] if found is None else [found]


def answer_end(tokenizer: Tokenizer, template: Template) -> int:
    """The id of the marker that closes a reply: a target of every example, and where generation stops."""
    return marker_ids(template.end, tokenizer)[0]


def encode_messages(messages: list[dict], tokenizer: Tokenizer, template: Template) -> tuple[list[int], list[bool]]:
    """Messages -> ids and target flags, uncut."""
    ids, target, before = [], [], ""
    for text, marker, is_target in template.render(messages):
        is_reply = is_target is not None
        if marker:
            new = marker_ids(text, tokenizer)
        else:
            # A reply that begins a line has no "▁" (Zephyr's): it is encoded after a line break, which is dropped.
            line_break = "\n" if is_reply and tokenizer.space and before.endswith("\n") else ""
            dropped = len(tokenizer.encode(line_break, bos=False))
            first = is_reply or not ids  # a reply is a text by itself
            new = tokenizer.encode(line_break + text, bos=False, special=False, first=first)[dropped:]  # 1., 3.
        ids += new
        target += [bool(is_target)] * len(new)  # 2. replies alone, with their end
        before = text
    return ids, target


def encode_prompt(messages: list[dict], tokenizer: Tokenizer, template: Template) -> list[int]:
    """The ids of a prompt, up to where the reply begins. The ids of its training example begin with them.
    ValueError where check_messages(messages, "user") finds fault."""
    ids, _ = encode_messages(check_messages(messages, "user"), tokenizer, template)
    return ids


class Encoded(NamedTuple):
    """What becomes of a record."""

    examples: list   # mostly one; none, if nothing can be learnt from what max_len leaves of it
    lost: str = ""   # what max_len took away, as the end of a sentence about such records


def encode_example(record: dict, tokenizer: Tokenizer, template: Template, max_len: int) -> Encoded:
    """An sft record -> examples of at most max_len ids, and flags that are True where the id is a target: replies and
    their end markers, or all of a {"text"} but the first id, which nothing predicts. The first is BOS where the
    tokenizer opens a text with it. A longer text gives several examples, a longer conversation is cut."""
    if "text" in record:
        ids = tokenizer.encode(record["text"], bos=True, eos=True)
        # An example begins with the last id of the one before it, so that all others are targets once.
        rows = [ids[start:start + max_len] for start in range(0, len(ids) - 1, max_len - 1)]
        return Encoded([(row, [False] + [True] * (len(row) - 1)) for row in rows])
    ids, target = encode_messages(record["messages"], tokenizer, template)
    if not any(target[:max_len]):
        return Encoded([], f"left out: none of their first {max_len} tokens is a target")
    return Encoded([(ids[:max_len], target[:max_len])], f"cut at {max_len} tokens" if len(ids) > max_len else "")


def encode_preference(record: dict, tokenizer: Tokenizer, template: Template, max_len: int) -> Encoded:
    """A preference record -> an example: for each response, best first, the ids of prompt + response + its end, at most
    max_len.

    A response that the cut made equal to a better one is left out: it would teach nothing (loss ln 2, gradient 0). No
    example if fewer than two remain, for example because the prompt alone fills max_len."""
    whole = []
    for response in record["responses"]:
        answered = [*record["messages"], {"role": "assistant", "content": response}]
        ids, _ = encode_messages(answered, tokenizer, template)
        whole.append(tuple(ids))
    rows = list(map(list, dict.fromkeys(ids[:max_len] for ids in whole)))
    if len(set(record["responses"])) == 1:
        return Encoded([], "left out: their responses are equal")
    if len(rows) == 1:
        return Encoded([], f"left out: their responses are equal up to {max_len} tokens")
    return Encoded([rows], f"cut at {max_len} tokens" if max(map(len, whole)) > max_len else "")


def encode_all(records: list[dict], encode: Callable[[dict], Encoded], what: str, say: Callable[[str], object]) -> list:
    """The examples of all records. say takes a note for every way in which some lose. ValueError if none is left. In
    these sentences `what` names the records ("preferences")."""
    encoded = [encode(record) for record in records]
    examples = [example for one in encoded for example in one.examples]
    counts = Counter(one.lost for one in encoded if one.lost)
    notes = [f"{count} of {len(records)} {what} are {lost}" for lost, count in counts.items()]
    if records and not examples:
        raise ValueError(f"none of the {len(records)} {what} fits: " + "; ".join(notes) + "; raise --max_len")
    for note in notes:
        say(f"note: {note}")
    return examples


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
    return any((Path(directory) / name).exists() for name in TOKENIZER_FILES[:2])


def find_tokenizer(path: Path) -> Path:
    """The tokenizer's file of a directory. Meta puts one file beside the folders 7B, 13B, ..."""
    places = [path / name for name in TOKENIZER_FILES[:2]] if path.is_dir() else [path]
    if (path / "params.json").exists():
        places.append(path.parent / "tokenizer.model")
    for file in places:
        if file.exists():
            return file
    raise FileNotFoundError(f"{places[0]} does not exist, nor a tokenizer.json: put the file of the original release "
                            "there")


def open_kind(file: Path) -> tuple[SentencePiece | BytePairs, bytes]:
    """What a tokenizer's file says, and the bytes to save it as, so that transformers reads it."""
    content = file.read_bytes()
    weights.refuse_pointer(content, file)
    if file.suffix == ".json":
        said = weights.read_json(file)
    elif LLAMA3_LINES.fullmatch(content):
        said = from_llama3(content)
        content = json.dumps(said).encode()
    else:
        return SentencePiece(content, file), content
    try:
        return BytePairs(said, read_config(file.parent)), content
    except (LookupError, TypeError, AttributeError, re.error) as error:
        raise ValueError(f"{file} is not what a tokenizer's file should be: copy it again ({error!r})") from None


def is_named_text(value: object) -> bool:
    if not isinstance(value, dict) or not value.keys() >= {"name", "template"}:
        return False
    return all(isinstance(text, str) for text in value.values())


def read_config(directory: Path) -> dict[str, str]:
    """The texts that a directory's tokenizer_config.json gives, "" where it gives none. A token may stand there as
    {"content": text}, and a chat_template as a list of named ones, or in a file of its own, which counts more."""
    file = directory / CONFIG_FILE
    config = weights.read_json(file) if file.exists() else {}
    texts = {}
    for key in ("template", "chat_template", "eos_token", "pad_token", "unk_token"):
        match config.get(key):
            case None:
                texts[key] = ""
            case str(text):
                texts[key] = text
            case {"content": str(text)} if key.endswith("_token"):
                texts[key] = text
            case list(named) if key == "chat_template" and all(map(is_named_text, named)):
                texts[key] = next((one["template"] for one in named if one["name"] == "default"), "")
            case value:
                raise ValueError(f"{file}: {key} is {value!r}, it must be text")
    if (directory / JINJA_FILE).exists():
        texts["chat_template"] = (directory / JINJA_FILE).read_text("utf-8", "replace")
    return texts


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


def read_template(directory: Path) -> str | None:
    """The name of a directory's prompt template: as tokenizer_config.json says, or else as the Jinja text shows."""
    config = read_config(directory)
    if config["template"] in TEMPLATES:
        return config["template"]
    said = config["chat_template"].replace("\\n", "\n")
    for name, (has, has_not) in KNOWN_BY.items():
        if all(words in said for words in has) and not any(words in said for words in has_not):
            return name
    return None


def choose_template(directory: Path, asked: str | None, usual: str, say: Callable[[str], object]) -> str:
    """The name of the template to use with a directory: the one asked for, else the directory's own, else the usual.
    say takes a note where a template is replaced or the usual one is taken."""
    own = read_template(directory)
    if asked and own and asked != own:
        say(f"note: {directory} was trained with the template {own}, --template {asked} replaces it")
    if asked or own:
        return asked or own
    if read_config(directory)["chat_template"]:
        raise ValueError(f"{directory} has a chat_template that is none of ours: choose the one nearest to it by "
                         "--template " + "|".join(TEMPLATES))
    say(f"note: {directory} names no known prompt template, the {usual} one is used; --template chooses another")
    return usual


# ---- python -m data.text train --------------------------------------------------------------------------------------

SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|pad|>", "<|im_start|>", "<|im_end|>")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m data.text", description="Learns a byte-level BPE tokenizer.")
    parser.add_argument("command", choices=["train"])
    parser.add_argument("files", nargs="+", help="plain text in UTF-8")
    parser.add_argument("out", help="the directory for tokenizer.json and tokenizer_config.json")
    parser.add_argument("--vocab_size", type=int, required=True, help="all ids: 5 special tokens, 256 bytes, merges")
    args = parser.parse_intermixed_args(argv)
    try:
        if args.vocab_size < len(ALPHABET) + len(SPECIAL):
            raise ValueError(f"--vocab_size {args.vocab_size} is less than 256 bytes and {len(SPECIAL)} special tokens")
        vocabulary, merges = learn(map(read_text, args.files), args.vocab_size - len(SPECIAL))
        said = byte_level_json(vocabulary, merges, SPECIAL)
        weights.write_json(Path(args.out) / "tokenizer.json", said)
        weights.write_json(Path(args.out) / "tokenizer_config.json", BytePairs(said, {}).config)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    fewer = len(vocabulary) + len(SPECIAL) < args.vocab_size
    why = ", no other pair stands there twice: more text gives more pieces" if fewer else ""
    print(f"{args.out}: {len(vocabulary)} pieces and {len(SPECIAL)} special tokens{why}")


def read_text(file: str) -> str:
    try:
        return Path(file).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read as text in UTF-8: name other files ({error})") from None


if __name__ == "__main__":
    main()
