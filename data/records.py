r"""Files of examples -> conversations, preference pairs, prompts.

A file is a JSON list or JSON lines, either of them gzipped; content decides, not the name. One sample of every form:

sft         {"instruction": "Add the numbers.", "input": "2, 3", "output": "5"}     Alpaca; the input is optional
sft         {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
sft         {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}          ShareGPT
sft         {"text": "Once upon a time."}                                           every token learnt: pretraining, ptx
preference  {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Hello.", "rejected": " No."}                 rm-static
preference  {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi\n\nAssistant: No."}    HH-RLHF
preference  {"prompt": "Hi", "responses": ["Hello.", "Hm.", "No."]}                 best first
prompt      {"instruction": "Write a haiku."}                                       InstructionWild's seed prompts
prompt      {"prompt": "Write a haiku."}                                            or any of the above but text
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

GAP = re.compile(r"[\s,]*")  # what may stand between two items of a list


def _list_items(text: str) -> Iterator[tuple[int, object, str]]:
    """(line, value, "") for each item of a JSON list."""
    json.loads(text)  # finds what is broken, but does not tell on which line an item begins: hence the second pass
    decode, at = json.JSONDecoder().raw_decode, text.index("[") + 1
    start = GAP.match(text, at).end()
    line = 1 + text.count("\n", 0, start)
    while text[start] != "]":
        value, at = decode(text, start)
        yield line, value, ""
        begun, start = start, GAP.match(text, at).end()
        line += text.count("\n", begun, start)


def _line_items(data: bytes) -> Iterator[tuple[int, object, str]]:
    """(line, value, fault) for each line that is not blank; fault says why a line has no value, else it is ""."""
    for line, raw in enumerate(data.split(b"\n"), 1):  # not splitlines, which also cuts at the U+2028 in people's texts
        if raw.strip():
            value, fault = None, ""
            try:
                value = json.loads(raw.decode())
            except UnicodeDecodeError:
                fault = "not UTF-8"
            except json.JSONDecodeError as error:
                fault = f"not valid JSON ({error.msg}); a file is a JSON list or has one JSON object per line"
            yield line, value, fault


def _items(path: Path) -> Iterator[tuple[int, object, str]]:
    """(line, value, fault) for each record of a file, in order."""
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
    try:
        yield from _list_items(data.decode()) if data.lstrip().startswith(b"[") else _line_items(data)
    # A broken list is an error in any case: nobody can tell where its next record begins
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8; convert the file to UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: broken JSON list ({error.msg}); mend the file") from None


ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
TURN = re.compile(r"\n\n(Human|Assistant):")  # HH-RLHF's mark; the blank line tells it from "Assistant:" in a sentence


def _text(record: dict, key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise ValueError(f'"{key}" must be text, not {"missing or null" if value is None else type(value).__name__}')
    value.encode()  # half a surrogate pair ("\ud83d") is legal JSON but no text; its UnicodeEncodeError is a ValueError
    return value


def _chat(turns: object) -> list[dict]:
    """[{"role", "content"}] or ShareGPT's [{"from", "value"}] -> messages, unchecked."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError('a conversation must be a list of {"role", "content"}')
    messages = []
    for turn in turns:
        role = str(turn.get("role", turn.get("from")))
        if role not in ROLES:
            raise ValueError(f'a role must be one of {", ".join(ROLES)}, not "{role}"')
        messages.append({"role": ROLES[role], "content": _text(turn, "content" if "content" in turn else "value")})
    return messages


def _conversation(record: dict, key: str) -> list[dict]:
    r"""A list of messages or a transcript "\n\nHuman: ...\n\nAssistant: ..." -> messages, unchecked."""
    if not isinstance(record[key], str):
        return _chat(record[key])
    before, *parts = TURN.split("\n\n" + _text(record, key).strip())
    if before or not parts:
        raise ValueError(f'"{key}" is no transcript, which begins with "Human:", and there is no "prompt" beside it')
    return [{"role": ROLES[who.lower()], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2])]


def _prompt(record: dict) -> list[dict]:
    """The field "prompt", plain text, a transcript or a list of messages -> messages, unchecked."""
    if isinstance(record["prompt"], str) and not record["prompt"].lstrip().startswith("Human:"):
        return [{"role": "user", "content": _text(record, "prompt")}]
    messages = _conversation(record, "prompt")
    opened = messages[-1:] == [{"role": "assistant", "content": ""}]  # the transcript ends in "Assistant:"
    return messages[:-1] if opened else messages


def _instruction(record: dict) -> list[dict]:
    """Alpaca's fields -> messages, unchecked; "history", LLaMA-Factory's list of [instruction, output], comes before."""
    past = record.get("history") or []
    if not isinstance(past, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in past):
        raise ValueError('"history" must be a list of [instruction, output]')
    turns = [{"role": role, "content": text} for pair in past for role, text in zip(("user", "assistant"), pair)]
    user = {"role": "user", "content": _text(record, "instruction")}
    if record.get("input") is not None and _text(record, "input").strip():
        user["input"] = record["input"]  # kept apart, because Alpaca words a prompt with input differently
    return [*_chat(turns), user]


def _read_sft(record: dict) -> dict:
    if "instruction" in record and "output" in record:
        messages = [*_instruction(record), {"role": "assistant", "content": _text(record, "output")}]
    elif "messages" in record or "conversations" in record:
        messages = _chat(record["messages" if "messages" in record else "conversations"])
    elif _text(record, "text").strip():
        return {"text": record["text"]}
    else:
        raise ValueError('"text" is empty')
    return {"messages": check_messages(messages, "assistant")}


def _read_preference(record: dict) -> dict:
    if "prompt" in record and "responses" in record:
        messages, responses = _prompt(record), record["responses"]
    elif "prompt" in record and isinstance(record["chosen"], str):
        messages, responses = _prompt(record), [record["chosen"], record["rejected"]]
    else:
        chosen, rejected = (check_messages(_conversation(record, key), "assistant") for key in ("chosen", "rejected"))
        if chosen[:-1] != rejected[:-1]:
            raise ValueError('"chosen" and "rejected" must be the same conversation up to the last reply')
        messages, responses = chosen[:-1], [chosen[-1]["content"], rejected[-1]["content"]]
    if not isinstance(responses, list) or len(responses) < 2:
        raise ValueError('"responses" must be a list of at least two texts, the best first')
    # rm-static's responses begin with the space that stood after "Assistant:"
    responses = [_text({"response": response}, "response").strip() for response in responses]
    return {"messages": check_messages(messages, "user"), "responses": responses}


def _read_prompt(record: dict) -> dict:
    if "instruction" in record:
        messages = _instruction(record)
    elif "prompt" in record:
        messages = _prompt(record)
    else:
        messages = _conversation(record, next(key for key in ("messages", "conversations", "chosen") if key in record))
        if messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
    return {"messages": check_messages(messages, "user")}


class Kind(NamedTuple):
    """The records that one stage reads: a record has all keys of one of the forms."""

    noun: str
    stage: str
    forms: tuple[tuple[str, ...], ...]
    read: Callable[[dict], dict]


KINDS = {
    "preference": Kind("preferences", "rm.py", (("chosen", "rejected"), ("prompt", "responses")), _read_preference),
    "sft": Kind("instructions with answers, conversations or text", "sft.py",
                (("instruction", "output"), ("messages",), ("conversations",), ("text",)), _read_sft),
    "prompt": Kind("prompts", "ppo.py --prompt_dataset",
                   (("instruction",), ("prompt",), ("messages",), ("conversations",), ("chosen",)), _read_prompt),
}


def normalise(record: object, kind: str) -> dict:
    """A JSON value -> a record of this kind; ValueError with the reason, the keys expected and the keys found."""
    keys = set(record) if isinstance(record, dict) else set()
    fitting = [name for name in KINDS if any(keys.issuperset(form) for form in KINDS[name].forms)]
    try:
        if kind in fitting:
            return KINDS[kind].read(record)
        other = KINDS[fitting[0]] if fitting else None
        raise ValueError(f"these are {other.noun}, for {other.stage}" if other else "unknown form")
    except ValueError as error:
        noun, stage, forms, _ = KINDS[kind]
        expected = " or ".join(f"{{{', '.join(form)}}}" for form in forms)
        found = ", ".join(record) if keys else f"none (a {type(record).__name__})"
        raise ValueError(f"{error}; {stage} reads {noun}: expected keys {expected}; found keys {found}") from None


def read_records(paths: list[str | Path], kind: str, skip_bad: bool = False, limit: int | None = None,
                 say: Callable[[str], object] = print) -> list[dict]:
    """The records of some files, normalised; with limit the first so many good ones over all files.

    kind "sft" gives {"text"} or {"messages": [..., assistant]}, "preference" {"messages": [..., user], "responses":
    [best, ..., worst]}, "prompt" {"messages": [..., user]}; a user's message perhaps has "input" beside its "content".
    A bad record raises ValueError with file, line, reason and keys, or with skip_bad is skipped: `say` gets one line
    with their number for each file. A missing file (FileNotFoundError), or one without a good record, is never skipped."""
    records = []
    for path in map(Path, paths):
        before, faults = len(records), []
        for line, value, fault in _items(path):
            if len(records) == limit:
                break
            try:
                if fault:
                    raise ValueError(fault)
                records.append(normalise(value, kind))
            except ValueError as error:
                if not skip_bad:
                    raise ValueError(f"{path}, line {line}: {error} (mend it or pass --skip_bad_records)") from None
                faults.append(f"line {line}: {error}")
        if len(records) == before:
            why = f"all {len(faults)} are bad, first {faults[0]}" if faults else "expected a JSON list or JSON lines"
            raise ValueError(f"{path} has no usable record: {why}")
        if faults:
            say(f"{path}: skipped {len(faults)} bad of {len(faults) + len(records) - before} records, first {faults[0]}")
        if len(records) == limit:
            break
    return records
