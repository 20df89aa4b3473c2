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
"Assistant:" turns. Beside any of these but {"text"}, a text "system" is the system message.
"""

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from data.text import check_messages

# ---- a record form is its keys --------------------------------------------------------------------------------------


class Form(NamedTuple):
    """A record has a form if it has the keys of its question and of its answers."""

    question: str                  # the key of the prompt, or of a whole conversation
    answers: tuple[str, ...] = ()  # best first; () if the conversation holds its answer, or none is needed


class Kind(NamedTuple):
    """The records that one stage reads. A record is read by the first form that fits."""

    noun: str   # what a message calls such records
    stage: str  # the script, or the flag of it, that reads them
    forms: tuple[Form, ...]


KINDS = {
    "preference": Kind("preferences", "rm.py", (
        Form("prompt", ("responses",)),          # a ranking
        Form("prompt", ("chosen", "rejected")),  # rm-static, TRL
        Form("chosen", ("chosen", "rejected")),  # HH-RLHF
    )),
    "sft": Kind("instructions with answers, conversations or text", "sft.py", (
        Form("instruction", ("output",)),        # Alpaca
        Form("instruction", ("response",)),      # Dolly
        Form("messages"),
        Form("conversations"),                   # ShareGPT
        Form("prompt", ("completion",)),         # TRL
        Form("text"),
    )),
    "prompt": Kind("prompts", "ppo.py --prompt_dataset", (
        Form("instruction"),
        Form("prompt"),
        Form("messages"),
        Form("conversations"),
        Form("chosen"),
    )),
}
PASSAGES = ("input", "context")  # Alpaca's and Dolly's key of the text that an instruction speaks of
# Keys that change what a record means and are not supported, with the remedy.
REFUSED = {"history": 'write its turns into "messages"'}  # LLaMA-Factory's earlier turns


def find_form(record: object, kind: str) -> Form | None:
    """The first form of this kind whose keys the record has."""
    keys = set(record) if isinstance(record, dict) else set()
    return next((form for form in KINDS[kind].forms if keys.issuperset((form.question, *form.answers))), None)


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
    for key, remedy in REFUSED.items():
        if record.get(key):
            raise ValueError(f'"{key}" is not read here: {remedy}')
    if form.question == "text":
        if not read_text(record["text"], "text").strip():
            raise ValueError('"text" is empty')
        return {"text": record["text"]}
    messages = []
    if system := read_optional(record, "system"):
        messages.append({"role": "system", "content": system})
    if kind == "preference":
        return read_ranking(record, form, messages)
    messages += read_question(record, form.question)
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
    prompt, read = system, read_turns  # HH-RLHF: every answer is a whole conversation
    if form.question == "prompt":
        prompt, read = system + read_question(record, "prompt"), read_answer
    conversations = []
    for key, answer in answers:
        turns = read(answer, key)
        if turns[:len(prompt)] == prompt:  # some data sets repeat the prompt in every answer
            turns = turns[len(prompt):]
        conversations.append(check_messages(prompt + turns, "assistant"))
    messages = conversations[0][:-1]
    if any(conversation[:-1] != messages for conversation in conversations):
        raise ValueError('"chosen" and "rejected" must be the same conversation up to the last reply')
    return {"messages": messages, "responses": [conversation[-1]["content"].strip() for conversation in conversations]}


def read_question(record: dict, key: str) -> list[dict]:
    """The messages of a form's question, unchecked."""
    value = record[key]
    if key == "instruction":
        user = {"role": "user", "content": read_text(value, key)}
        if passages := list(filter(None, [read_optional(record, name) for name in PASSAGES])):
            user["input"] = "\n".join(passages)  # kept apart: Alpaca words a prompt with input differently
        return [user]
    if key == "prompt" and isinstance(value, str) and not value.lstrip().startswith("Human:"):
        return [{"role": "user", "content": read_text(value, key)}]
    messages = read_turns(value, key)
    if key == "prompt" and messages[-1:] == [{"role": "assistant", "content": ""}]:
        messages.pop()  # a transcript that ends in "Assistant:"
    return messages


def read_answer(value: object, key: str) -> list[dict]:
    """The messages of an answer, unchecked."""
    if isinstance(value, list):
        return read_turns(value, key)
    said = read_text(value, key)
    if key == "completion":
        said = said.strip()  # a completion begins with the space that follows the prompt
    return [{"role": "assistant", "content": said}]


ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
TURN = re.compile(r"\n\n(Human|Assistant):")  # HH-RLHF's mark; the blank line tells it from "Assistant:" in a sentence


def read_turns(value: object, key: str) -> list[dict]:
    r"""Messages, ShareGPT's turns or a transcript "\n\nHuman: ...\n\nAssistant: ..." -> messages, unchecked."""
    turns = value
    if isinstance(value, str):
        before, *parts = TURN.split("\n\n" + read_text(value, key).strip())
        turns = [{"role": who.lower(), "content": said.strip()} for who, said in zip(parts[::2], parts[1::2])]
        turns = None if before else turns  # text before the first turn: no transcript
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f'"{key}" is no conversation, which is a list of {{"role", "content"}} or a transcript that '
                         'begins with "Human:"')
    messages, known = [], ", ".join(ROLES)
    for turn in turns:
        role = str(turn.get("role", turn.get("from")))
        if role not in ROLES:
            raise ValueError(f'a role must be one of {known}, not "{role}"')
        said = "content" if "content" in turn else "value"
        messages.append({"role": ROLES[role], "content": read_text(turn.get(said), said)})
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

GAP = re.compile(r"[\s,]*")  # what may stand between two items of a list


def list_items(text: str) -> Iterator[tuple[int, object]]:
    """(line, value) for each item of a JSON list."""
    json.loads(text)  # raises if the list is broken; it gives no line of an item, so a second pass follows
    decode, at = json.JSONDecoder().raw_decode, text.index("[") + 1
    start = GAP.match(text, at).end()
    line = 1 + text.count("\n", 0, start)
    while text[start] != "]":
        value, at = decode(text, start)
        yield line, value
        begun, start = start, GAP.match(text, at).end()
        line += text.count("\n", begun, start)


def read_items(path: Path) -> Iterator[tuple[int, object]]:
    """(line, value) for each item of a JSON list, or (line, bytes), not parsed yet, for each line of JSON lines."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; check the path of the data set")
    if path.is_dir():
        raise ValueError(f"{path} is a directory; name the data files in it")
    data = path.read_bytes()
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
        raise ValueError(f"{path}, line {line}: not UTF-8; convert the file to UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: broken JSON list ({error.msg}); mend the file") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: broken JSON list ({error}); mend the file") from None


def parse_line(raw: bytes) -> object:
    """The value of one line of JSON lines."""
    try:
        return json.loads(raw.decode())
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", error)
        raise ValueError(f"not valid JSON ({reason}); a file is a JSON list or has one JSON object per line") from None


def read_file(path: Path, kind: str, skip_bad: bool, limit: int | None, say: Callable[[str], object]) -> list[dict]:
    """The records of one file, at most `limit`; otherwise as read_records."""
    records, faults = [], []
    for line, item in read_items(path):
        if len(records) == limit:
            break
        try:
            value = parse_line(item) if isinstance(item, bytes) else item
            record = normalise(value, kind)
            if kind == "prompt":
                record |= {"record": value, "place": f"{path}, line {line}"}
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
    that is missing (FileNotFoundError) or has no good record is not skipped."""
    records = []
    for path in map(Path, paths):
        if len(records) == limit:
            break
        room = None if limit is None else limit - len(records)
        records += read_file(path, kind, skip_bad, room, say)
    return records
