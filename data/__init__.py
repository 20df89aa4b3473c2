r"""Records, templates and batches: how a file of text becomes tensors. Callers bring a tokenizer.

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

Choices that raise no error when they are made wrongly:
1. Markers such as [INST] are text; only BOS and EOS are ids. A user who types "</s>" gets ordinary pieces.
2. Of a conversation only the replies are targets. Each ends in EOS, unless cut at max_len: cut text is not an end.
3. Pieces are tokenized one by one, so a prompt is exactly the beginning of its training example. Sentencepiece puts a "▁"
   before a reply encoded alone, and so it stands in "### Response: reply" encoded as one text, as other servers do it
   (Hugging Face's tokenizer in its default, "legacy" mode).
4. Masks come from lengths, never from comparing ids, so padding may have any id, even that of EOS.
5. The order of an epoch depends on seed, epoch and global batch only: the same steps on 1 process and on 8.
"""

import codecs
import gzip
import json
import random
import re
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

# ----------------------------------------------------------------------------------------------------------------------
# From files to JSON values

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


# ----------------------------------------------------------------------------------------------------------------------
# From JSON values to records

ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
TURN = re.compile(r"\n\n(Human|Assistant):")  # HH-RLHF's mark; the blank line tells it from "Assistant:" in a sentence


def _text(record: dict, key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise ValueError(f'"{key}" must be text, not {"missing or null" if value is None else type(value).__name__}')
    value.encode()  # half a surrogate pair ("\ud83d") is legal JSON but no text; its UnicodeEncodeError is a ValueError
    return value


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


def split_held_out(records: list, n: int, seed: int) -> tuple[list, list]:
    """(train, held_out): n records, at most a tenth, drawn by the seed; both parts keep the order of the records."""
    held = set(random.Random(f"held out {seed}").sample(range(len(records)), min(n, len(records) // 10)))
    return [record for i, record in enumerate(records) if i not in held], [records[i] for i in sorted(held)]


# ----------------------------------------------------------------------------------------------------------------------
# Templates: the words around a conversation


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


# ----------------------------------------------------------------------------------------------------------------------
# From records to ids


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


# ----------------------------------------------------------------------------------------------------------------------
# From ids to batches

WINDOW = 50  # global batches sorted together: enough for little padding, few enough to mix the lengths over an epoch
CHUNK = 8  # neighbours in length that stay together. A global batch of many chunks mixes all lengths, and so all kinds of
# text: with whole batches of one length, a bilingual set gives all-Chinese and all-English steps in turn, and training
# swings between them. Its micro-batches are sorted again, so padding stays small where --batch_size is.


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
    Some ranks get none of a small global batch, and must still take part in its step."""
    return _chunks(sorted(indices, key=lengths.__getitem__), batch_size)[rank::world]


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
