r"""Files of examples -> conversations, preference pairs, prompts.

A file is a JSON list or JSON lines, gzipped or not. Its content tells which, not its name. A sample of every form:

sft         {"instruction": "Add the numbers.", "input": "2, 3", "output": "5"}     Alpaca; the input is optional
sft         {"instruction": "Add the numbers.", "context": "2, 3", "response": "5"}                            Dolly
sft         {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
sft         {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}          ShareGPT
sft         {"prompt": "Hi", "completion": " Hello."}                               TRL
sft         {"text": "Once upon a time."}                                           every token a target: pretraining
preference  {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Hello.", "rejected": " No."}                 rm-static
preference  {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi\n\nAssistant: No."}    HH-RLHF
preference  {"prompt": "Hi", "responses": ["Hello.", "Hm.", "No."]}                 best first
prompt      {"instruction": "Write a haiku."}                                       InstructionWild's seed prompts
prompt      {"prompt": "Write a haiku."}                                            or any of the above but text

A prompt or an answer may also be a list of messages; a conversation may also be a transcript of "Human:" and
"Assistant:" turns. Beside any of these but {"text"}, a text "system" is the system message. "input" and "context" are
the text that an instruction or a prompt speaks of. A reply with "weight": 0 or "train": false is context, no target.
A note names the keys of a file that have a value and are neither read nor known to say nothing.
"""

import codecs
import gzip
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from data.text import check_messages
from data.weights import refuse_pointer

# ---- a record form is its keys --------------------------------------------------------------------------------------


class Form(NamedTuple):
    """A record has a form if it has the keys of its question and of its answers."""

    question: str                            # the key of the prompt, or of a whole conversation
    answers: tuple[str, ...] = ()            # best first; () if the conversation holds its answer, or none is needed
    beside: tuple[str, ...] = ("system",)    # keys that are read where a record has them


class Kind(NamedTuple):
    """The records that one stage reads. A record is read by the first form that fits."""

    noun: str   # what a message calls such records
    stage: str  # the script, or the flag of it, that reads them
    forms: tuple[Form, ...]


PASSAGES = ("input", "context")  # Alpaca's and Dolly's key of the text that an instruction speaks of
ASKED = ("system", *PASSAGES)
KINDS = {
    "preference": Kind("preferences", "rm.py", (
        Form("prompt", ("responses",), ASKED),          # a ranking
        Form("prompt", ("chosen", "rejected"), ASKED),  # rm-static, TRL
        Form("chosen", ("chosen", "rejected")),         # HH-RLHF
    )),
    "sft": Kind("instructions with answers, conversations or text", "sft.py", (
        Form("instruction", ("output",), ASKED),        # Alpaca
        Form("instruction", ("response",), ASKED),      # Dolly
        Form("messages"),
        Form("conversations"),                          # ShareGPT
        Form("prompt", ("completion",), ASKED),         # TRL
        Form("text", beside=()),
    )),
    "prompt": Kind("prompts", "ppo.py --prompt_dataset", (
        Form("instruction", beside=ASKED),
        Form("prompt", beside=ASKED),
        Form("messages"),
        Form("conversations"),
        Form("chosen"),
    )),
}
MARKS = {"weight", "train"}  # of a message: 0 or false makes a reply context
# Keys of a record or of a message that say nothing to be learnt, and keys that change what it means.
NEUTRAL = {"id", "index", "prompt_id", "name", "title", "url", "source", "category", "lang", "score", "meta"}
REFUSED = {"history", "tools", "functions", "tool_calls", "function_call", "image", "images", "audio", "video"}


def find_form(record: object, kind: str) -> Form | None:
    """The first form of this kind whose keys the record has."""
    keys = set(record) if isinstance(record, dict) else set()
    return next((form for form in KINDS[kind].forms if keys.issuperset((form.question, *form.answers))), None)


def unread(record: dict, kind: str) -> list[str]:
    """The keys with a value that normalise does not read, of a record and of its messages. ValueError if the rest
    means something else without one of them."""
    form = find_form(record, kind)
    own = {form.question, *form.answers}
    read = own.union(form.beside)
    if kind == "prompt":  # PPO samples an answer of its own
        read |= {key for other in KINDS.values() for form in other.forms for key in form.answers}
    lists = [record[key] for key in own if isinstance(record[key], list)]
    turns = [turn for turn in chain(*lists) if isinstance(turn, dict)]
    parts = [(record, read), *((turn, MARKS | {*who_and_what(turn)}) for turn in turns)]
    found = {key for part, read in parts for key in part.keys() - read if part[key] not in (None, "", [], {})}
    if wrong := sorted(found & REFUSED):
        raise ValueError(f'"{wrong[0]}" is not read here, and the record means something else without it: leave it out')
    return sorted(found - NEUTRAL)


def normalise(record: object, kind: str) -> dict:
    """A JSON value -> a record of this kind; ValueError with the reason, the keys expected and the keys found."""
    noun, stage, forms = KINDS[kind]
    try:
        form = find_form(record, kind)
        if form is None:
            others = [other for name, other in KINDS.items() if find_form(record, name)]  # for another stage?
            raise ValueError(f"these are {others[0].noun}, for {others[0].stage}" if others else "unknown form")
        return read_form(record, form, kind)
    except ValueError as error:
        keys = [", ".join(dict.fromkeys((form.question, *form.answers))) for form in forms]  # each key once
        expected = "{" + "} or {".join(keys) + "}"
        found = ", ".join(record) if isinstance(record, dict) else f"none (a {type(record).__name__})"
        raise ValueError(f"{error}; {stage} reads {noun}: expected keys {expected}; found keys {found}") from None


# ---- from the keys of a form to messages ----------------------------------------------------------------------------


def read_form(record: dict, form: Form, kind: str) -> dict:
    """The record of this form in the shape that read_records documents."""
    if form.question == "text":
        if not read_text(record["text"], "text").strip():
            raise ValueError('"text" is empty')
        return {"text": record["text"]}
    messages = []
    if system := read_optional(record, "system"):
        messages.append({"role": "system", "content": system})
    if kind == "preference":
        return read_ranking(record, form, messages)
    messages += read_question(record, form)
    if kind == "sft":
        for key in form.answers:
            messages += read_answer(record[key], key)
        return {"messages": check_messages(messages, "assistant")}
    if form.question != "prompt" and messages and messages[-1]["role"] == "assistant":
        messages.pop()  # PPO samples an answer of its own
    return {"messages": check_messages(messages, "user")}


def read_ranking(record: dict, form: Form, system: list[dict]) -> dict:
    """A preference record. Every answer ends a conversation; these conversations are equal up to their last reply."""
    answers = [(key, record[key]) for key in form.answers]
    if form.answers == ("responses",):
        if not isinstance(record["responses"], list) or len(record["responses"]) < 2:
            raise ValueError('"responses" must be a list of at least two texts, the best first')
        answers = [("responses", answer) for answer in record["responses"]]
    if form.question == "prompt":
        prompt, read = system + read_question(record, form), read_answer
    else:  # HH-RLHF: every answer is a whole conversation
        prompt, read = system, read_turns
    conversations = []
    for key, answer in answers:
        turns = read(answer, key)
        if turns[:len(prompt)] == prompt:  # some data sets repeat the prompt in every answer
            turns = turns[len(prompt):]
        conversations.append(check_messages(prompt + turns, "assistant"))
    messages = conversations[0][:-1]
    if any(conversation[:-1] != messages for conversation in conversations):
        raise ValueError('"chosen" and "rejected" must be the same conversation up to the last reply')
    responses = [conversation[-1]["content"].strip() for conversation in conversations]
    if not all(responses[:-1]):
        raise ValueError("a response that is preferred to another one is empty")
    return {"messages": messages, "responses": responses}


def read_question(record: dict, form: Form) -> list[dict]:
    """The messages of a form's question, unchecked."""
    key = form.question
    value = record[key]
    if key == "instruction" or key == "prompt" and isinstance(value, str) and not is_transcript(value):
        messages = [{"role": "user", "content": read_text(value, key)}]
    else:
        messages = read_turns(value, key)
        if key == "prompt" and messages[-1:] == [{"role": "assistant", "content": ""}]:
            messages.pop()  # a transcript that ends in "Assistant:"
    passages = [read_optional(record, name) for name in PASSAGES if name in form.beside]
    if messages and any(passages):  # kept apart: Alpaca words a prompt with input differently
        messages[-1]["input"] = "\n".join(filter(None, passages))
    return messages


def read_answer(value: object, key: str) -> list[dict]:
    """The messages of an answer, unchecked."""
    if isinstance(value, list):
        return read_turns(value, key)
    said = read_text(value, key)
    if key == "completion":
        said = said.strip()  # a completion begins with the space that follows the prompt
    return [{"role": "assistant", "content": said}]


ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system",
         "developer": "system"}
# HH-RLHF's mark of a turn, which tells it from "Assistant:" in a sentence, and that of texts without blank lines.
TURNS = re.compile(r"\n[ \t]*\n(Human|Assistant):"), re.compile(r"\n[ \t]*(Human|Assistant):")


def is_transcript(prompt: str) -> bool:
    return prompt.strip().startswith("Human:") or prompt.strip().endswith(("\nAssistant:", "\rAssistant:"))


def split_transcript(said: str) -> list[dict] | None:
    r"""A transcript "\n\nHuman: ...\n\nAssistant: ..." -> messages. None if text stands before the first turn."""
    lines = "\n\n" + re.sub("\r\n?", "\n", said.strip())
    for mark in TURNS:
        before, *parts = mark.split(lines)
        names, texts = parts[::2], parts[1::2]
        if len(names) > 1 and names == (["Human", "Assistant"] * len(names))[:len(names)]:
            break
    turns = [{"role": name.lower(), "content": text.strip()} for name, text in zip(names, texts)]
    return None if before.strip() else turns


def who_and_what(turn: dict) -> tuple[str, str]:
    """The keys of a message's role and of its text: OpenAI's or ShareGPT's."""
    return "role" if "role" in turn else "from", "content" if "content" in turn else "value"


def read_turns(value: object, key: str) -> list[dict]:
    """Messages, ShareGPT's turns or a transcript -> messages, unchecked."""
    turns = split_transcript(read_text(value, key)) if isinstance(value, str) else value
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f'"{key}" is no conversation, which is a list of {{"role", "content"}} or a transcript that '
                         'begins with "Human:"')
    messages, known = [], ", ".join(ROLES)
    for turn in turns:
        who, what = who_and_what(turn)
        role = str(turn.get(who))
        if role not in ROLES:
            raise ValueError(f'a role must be one of {known}, not "{role}"')
        message = {"role": ROLES[role], "content": read_text(turn.get(what), what)}
        marks = [turn[mark] for mark in MARKS if turn.get(mark) is not None]
        if any(mark not in (0, 1) for mark in marks) or any(marks) and message["role"] != "assistant":
            raise ValueError('the "weight" or "train" of a message must be 0 or 1, and 0 for all but replies, which '
                             "alone are learnt")
        if not all(marks) and message["role"] == "assistant":
            message["train"] = False
        messages.append(message)
    return messages


def read_text(value: object, key: str) -> str:
    if not isinstance(value, str):
        found = "missing or null" if value is None else type(value).__name__
        raise ValueError(f'"{key}" must be text, not {found}')
    value.encode()  # half a surrogate pair ("\ud83d") is legal JSON but no text; its UnicodeEncodeError is a ValueError
    return value


def read_optional(record: dict, key: str) -> str:
    """The text of a key, or "" if the key is missing, null or blank."""
    value = record.get(key)
    return "" if value is None or not read_text(value, key).strip() else value


# ---- from files to JSON values --------------------------------------------------------------------------------------

OPENING, AFTER_ITEM = re.compile(r"\s*\[\s*(\]\s*)?"), re.compile(r"\s*([,\]]\s*)?")


def read_whole(digits: str) -> float:
    """A number of more digits than int() takes becomes infinity. No key that is read here holds such a number."""
    return int(digits) if len(digits) < 4300 else float(digits)


DECODER = json.JSONDecoder(parse_int=read_whole)


def list_items(text: str) -> Iterator[tuple[int, object]]:
    """(line, value) for each item of a JSON list. JSONDecodeError, which has a line, where the list is broken."""
    line, gap = 1, OPENING.match(text)
    while "]" not in gap[0]:
        line += gap[0].count("\n")
        try:
            value, end = DECODER.raw_decode(text, gap.end())
        except RecursionError:
            raise json.JSONDecodeError("nested too deeply", text, gap.end()) from None
        yield line, value
        line += text.count("\n", gap.end(), end)
        gap = AFTER_ITEM.match(text, end)
        if not gap[1]:
            raise json.JSONDecodeError("neither a comma nor the end of the list follows an item", text, gap.end())
    if gap.end() < len(text):
        raise json.JSONDecodeError("text follows the list", text, gap.end())


def read_items(path: Path) -> Iterator[tuple[int, object]]:
    """(line, value) for each item of a JSON list, or (line, bytes), not parsed yet, for each line of JSON lines."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; check the path of the data set")
    if path.is_dir():
        raise ValueError(f"{path} is a directory; name the data files in it")
    data = path.read_bytes()
    refuse_pointer(data, path)
    if data.startswith(b"PAR1"):
        raise ValueError(f"{path} is a Parquet file; turn it into JSON lines, with pandas: python -c \"import pandas; "
                         f"pandas.read_parquet('{path}').to_json('data.jsonl', orient='records', lines=True)\"")
    if data.startswith(b"\x1f\x8b"):  # gzip's magic number
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is a damaged gzip file ({error}); fetch it again") from None
    data = data.removeprefix(codecs.BOM_UTF8)
    if not data.lstrip().startswith(b"["):
        # Bytes are split at "\n" alone. str.splitlines would also split at a U+2028 inside a text.
        yield from ((line, raw) for line, raw in enumerate(data.split(b"\n"), 1) if raw.strip())
        return
    try:
        yield from list_items(data.decode())
    # A broken list is refused even where bad records are skipped: nobody can tell where its next record begins.
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        place = error.start - data.rfind(b"\n", 0, error.start)
        raise ValueError(f"{path}, line {line}: not UTF-8 at byte {place} of the line; convert the file") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: broken JSON list ({error.msg}); mend the file") from None


def parse_line(raw: bytes) -> object:
    """The value of one line of JSON lines."""
    try:
        return DECODER.decode(raw.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start + 1} of the line") from None
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "nested too deeply")
        raise ValueError(f"not valid JSON ({reason}); a file is a JSON list or has one JSON object per line") from None


def read_file(path: Path, kind: str, skip_bad: bool, limit: float, say: Callable[[str], object]) -> list[dict]:
    """The records of one file, at most `limit`; otherwise as read_records."""
    records, faults, not_read = [], [], Counter()
    for line, item in read_items(path):
        if len(records) == limit:
            break
        try:
            value = parse_line(item) if isinstance(item, bytes) else item
            record = normalise(value, kind)
            if kind == "prompt":
                record |= {"record": value, "place": f"{path}, line {line}"}
            not_read.update(unread(value, kind))
            records.append(record)
        except ValueError as error:
            if not skip_bad:
                raise ValueError(f"{path}, line {line}: {error} (mend it or pass --skip_bad_records)") from None
            faults.append(f"line {line}: {error}")
    if not records:
        why = f"all {len(faults)} are bad, first {faults[0]}" if faults else "expected a JSON list or JSON lines"
        raise ValueError(f"{path} has no usable record: {why}")
    if faults:
        total = len(faults) + len(records)
        say(f"{path}: skipped {len(faults)} bad of {total} records, first {faults[0]}")
    if not_read:
        keys = ", ".join(f"{key} in {count}" for key, count in not_read.items())
        say(f"note: {path}: keys that are not read, with the number of their records: {keys}")
    return records


def read_records(paths: list[str | Path], kind: str, skip_bad: bool = False, limit: int | None = None,
                 say: Callable[[str], object] = print) -> list[dict]:
    """The records of some files, normalised. With a limit they are the first `limit` good ones over all files.

    kind            a record it gives
    "sft"           {"messages": [..., assistant]} or {"text"}
    "preference"    {"messages": [..., user], "responses": [best, ..., worst]}
    "prompt"        {"messages": [..., user], "record", "place"}: the JSON value as it came, and its file and line

    A user's message may have "input" beside its "content". A bad record raises ValueError with file, line, reason and
    keys. With skip_bad it is skipped, and `say` gets one line for each file with the number of those skipped. A file
    that is missing (FileNotFoundError) or has no good record is not skipped. `say` also gets a line for each file with
    the keys that mean nothing here."""
    records, most = [], math.inf if limit is None else limit
    for path in map(Path, paths):
        if len(records) < most:
            records += read_file(path, kind, skip_bad, most - len(records), say)
    return records
