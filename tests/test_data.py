"""data: expected values written by hand; a test that guards a fault met elsewhere names the thread where it was told."""

import gzip
import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from sentencepiece import SentencePieceProcessor

import data.records
import data.text
from data.records import read_records
from data.text import TEMPLATES, collate, encode_all, encode_example, encode_preference, encode_prompt, global_batches
from data.text import micro_batches, pad, padding_share, split_held_out

REAL = Path(__file__).parents[2] / "shared" / "real"
ALPACA_HI = ("Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
             "### Instruction:\nhi\n\n### Response:")
ALPACA_INPUT = ("Below is an instruction that describes a task, paired with an input that provides further context. Write a "
                "response that appropriately completes the request.\n\n### Instruction:\nhi\n\n### Input:\nyo\n\n### Response:")


class Bytes:
    """A tokenizer of bytes: 3 + byte, BOS 1, EOS 2."""

    def encode(self, text: str, bos: bool = True, eos: bool = False) -> list[int]:
        return [1] * bos + [3 + byte for byte in text.encode()] + [2] * eos

    def decode(self, ids: list[int]) -> str:
        return bytes(i - 3 for i in ids if i > 2).decode()


def real(name: str) -> Path:
    if not (REAL / name).exists():
        pytest.skip(f"needs the real file {REAL / name}")
    return REAL / name


class Pieces:
    """LLaMA's own sentencepiece model."""

    def __init__(self):
        self.model = SentencePieceProcessor(model_file=str(real("llama-tokenizer/tokenizer.model")))

    def encode(self, text: str, bos: bool = True, eos: bool = False) -> list[int]:
        return [1] * bos + self.model.encode(text) + [2] * eos

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids)


def user(text: str, **more) -> dict:
    return {"role": "user", "content": text, **more}


def chat(*texts: str) -> dict:
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]}


def written(tmp_path: Path, *records: object, name: str = "data.jsonl") -> Path:
    path = tmp_path / name
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records), encoding="utf-8")
    return path


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def test_every_sample_in_the_docstring_is_read(tmp_path):
    """hpcaitech/ColossalAI#3325: users could not tell what the file of each stage looks like."""
    samples = re.findall(r"^(sft|preference|prompt) +({.*})", data.records.__doc__, re.MULTILINE)
    assert len(samples) == 9
    hi = [user("Hi")]
    haiku = {"messages": [user("Write a haiku.")]}
    assert [read_records([written(tmp_path, text)], kind)[0] for kind, text in samples] == [
        {"messages": [user("Add the numbers.", input="2, 3"), {"role": "assistant", "content": "5"}]},
        chat("Hi", "Hello."), chat("Hi", "Hello."), {"text": "Once upon a time."},
        {"messages": hi, "responses": ["Hello.", "No."]}, {"messages": hi, "responses": ["Hello.", "No."]},
        {"messages": hi, "responses": ["Hello.", "Hm.", "No."]}, haiku, haiku]
    for kind, text in samples:
        if '"text"' not in text:
            assert read_records([written(tmp_path, text)], "prompt")[0]["messages"][-1]["role"] == "user"


LINES = '{"text": "å"}\n\n{"text": "b\u2028c"}'
LIST = '[\n{"text": "å"},\n {"text": "b\u2028c"}]'


@pytest.mark.parametrize("content", [
    LINES.encode(), LIST.encode(), gzip.compress(LINES.encode()), gzip.compress(LIST.encode()), LINES.encode("utf-8-sig"),
    LIST.encode("utf-8-sig"), LINES.replace("\n", "\r\n").encode(), LIST.replace("\n", "\r\n").encode(), LIST.encode() + b"\n\n",
], ids="lines list lines.gz list.gz lines-bom list-bom lines-crlf list-crlf list-tail".split())
def test_the_content_tells_the_format(tmp_path, content):
    (tmp_path / "data.txt").write_bytes(content)
    assert read_records([tmp_path / "data.txt"], "sft") == [{"text": "å"}, {"text": "b\u2028c"}]


@pytest.mark.parametrize("more", [{}, {"input": None}, {"input": ""}, {"input": "  "}])
def test_all_kinds_of_no_input_are_one(tmp_path, more):
    """hiyouga/LlamaFactory#7344: KeyError where the optional input is left out."""
    records = read_records([written(tmp_path, {"instruction": "hi", "output": "yo", **more})], "sft")
    assert records == [chat("hi", "yo")]
    assert TEMPLATES["alpaca"].render(records[0]["messages"])[0].text == ALPACA_HI
    assert TEMPLATES["alpaca"].render([user("hi", input="yo")]) == [(ALPACA_INPUT, False, False, False)]


def test_transcripts_split_at_the_last_answer(tmp_path):
    """huggingface/trl#1858: a dialogue of several turns was split at its first answer."""
    talk = '\n\nHuman: a\n\nAssistant: b\n\nHuman: Who says "Assistant: no"?\nAssistant: c?\n\nAssistant:'
    prompt = chat("a", "b", 'Who says "Assistant: no"?\nAssistant: c?')["messages"]
    pair = {"chosen": talk + " d", "rejected": talk + " e\n\nf"}
    parts = {"prompt": talk, "chosen": " d", "rejected": " e\n\nf"}
    as_lists = {"chosen": chat("a", "b", prompt[2]["content"], "d")["messages"]}
    as_lists["rejected"] = chat("a", "b", prompt[2]["content"], "e\n\nf")["messages"]
    for record in (pair, parts, as_lists, {**parts, "prompt": prompt}):
        path = written(tmp_path, record)
        assert read_records([path], "preference") == [{"messages": prompt, "responses": ["d", "e\n\nf"]}]
        assert read_records([path], "prompt") == [{"messages": prompt}]


def test_history_comes_before_the_instruction(tmp_path):
    """hiyouga/LlamaFactory#188: a prompt file with a history."""
    record = {"instruction": "c", "history": [["a", "b"]], "output": None}
    assert read_records([written(tmp_path, record)], "prompt") == [chat("a", "b", "c")]


SFT, PAIR, PROMPT = {"instruction": "a", "output": "b"}, {"chosen": "a", "rejected": "b"}, {"prompt": "a"}


@pytest.mark.parametrize("kind, bad, reason", [
    ("sft", PAIR, "these are preferences, for rm.py; sft.py reads .* or {text}; found keys chosen, rejected"),
    ("sft", PROMPT, "these are prompts, for ppo.py --prompt_dataset; .* found keys prompt"),
    ("preference", SFT, "for sft.py; .* expected keys {chosen, rejected} or {prompt, responses}; found keys instruction, output"),
    ("prompt", {"text": "a"}, "for sft.py; ppo.py --prompt_dataset reads prompts"),
    ("sft", {"a": 1}, "unknown form; .* found keys a"), ("sft", 7, r"found keys none \(a int\)"),
    ("sft", {"instruction": "a", "output": 3}, '"output" must be text, not int'), ("sft", {"text": " "}, '"text" is empty'),
    ("sft", '{"text": "\\ud83d"}', "surrogates not allowed"), ("sft", '{"text": "a"', "not valid JSON"),
    ("sft", chat("a"), "must end with a message of the assistant"), ("sft", {"messages": []}, "must end with"),
    ("sft", {"messages": [user("a"), user("b")]}, "turn 2 is the user's"), ("sft", {"messages": "a"}, "list of"),
    ("sft", {"messages": [{"role": "tool", "content": "a"}]}, 'role must be one of user, .* not "tool"'),
    ("sft", {"messages": [{"role": "user"}]}, "missing or null"),
    ("preference", PAIR, 'is no transcript, which begins with "Human:"'),
    ("preference", {"chosen": "Human: a\n\nAssistant: b", "rejected": "Human: c\n\nAssistant: b"}, "same conversation"),
    ("preference", {"prompt": "a", "responses": ["b"]}, "at least two"),
    ("preference", {"prompt": "a", "chosen": "b", "rejected": None}, "must be text"),
    ("prompt", {"prompt": " "}, "the prompt is empty"), ("prompt", {"instruction": ""}, "the prompt is empty"),
    ("prompt", {"instruction": "a", "history": ["b"]}, '"history" must be'),
])
def test_a_bad_record_is_told_or_counted(tmp_path, kind, bad, reason):
    """hiyouga/LlamaFactory#188, hpcaitech/ColossalAI#3325."""
    good = {"sft": {"text": "a"}, "preference": {"prompt": "a", "responses": ["b", "c"]}, "prompt": PROMPT}[kind]
    path = written(tmp_path, good, "", bad, good)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}, line 3: .*{reason}.*--skip_bad_records"):
        read_records([path], kind)
    said = []
    assert len(read_records([path], kind, skip_bad=True, say=said.append)) == 2
    assert len(said) == 1 and re.match(f".*skipped 1 bad of 3 records, first line 3: .*{reason}", said[0])
    with pytest.raises(ValueError, match="no usable record: all 1 are bad, first line 1: "):
        read_records([written(tmp_path, bad)], kind, skip_bad=True)


@pytest.mark.parametrize("content, reason", [
    (b"", "no usable record"), (b" \n ", "no usable record"), (b"[ ]", "no usable record"), (b"\x1f\x8bno", "damaged gzip"), (b"\x1f\x8b" * 9, "damaged gzip"),
    (b'[\n{"text": "a"}\n{"text": "b"}]', "line 3: broken JSON list"), (b'[{"text": "a"},\n', "line 2: broken JSON list"),
    (b'[{"text": "a"}]\n]', "line 2: broken JSON list"), (b'[\n{"text":\n "a"},\n\n{"a": 1}\n]', "line 5: unknown form"),
    (b'[\n\n{"text": "\xe5"}]', "line 3: not UTF-8"), (b'\n{"text": "\xe5"}', "line 2: not UTF-8"),
    (b'{\n"text": "a"\n}', "line 1: not valid JSON .*; a file is a JSON list or has one JSON object per line"),
])
def test_a_bad_file_is_one_sentence(tmp_path, content, reason):
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}.*{reason}"):
        read_records([path], "sft")
    with pytest.raises(ValueError, match="is a directory"):
        read_records([tmp_path], "sft")
    with pytest.raises(FileNotFoundError, match="nowhere.json does not exist"):
        read_records([tmp_path / "nowhere.json"], "sft")


def test_limit_counts_good_records_over_all_files(tmp_path):
    one = written(tmp_path, {"text": "a"}, {"a": 1}, {"text": "b"}, name="one")
    two = written(tmp_path, {"text": "c"}, {"text": "d"}, name="two")
    for n, texts in ((1, "a"), (2, "ab"), (3, "abc"), (9, "abcd"), (None, "abcd")):
        said = []
        assert [r["text"] for r in read_records([str(one), two], "sft", True, n, said.append)] == list(texts)
        assert len(said) == (n != 1)  # what was skipped before the limit is told, what comes after it is not read


@pytest.mark.parametrize("language", ["en", "ch"])
def test_real_instructionwild_prompts(language):
    assert len(read_records([real(f"instruct/instinwild_seed_{language}.jsonl")], "prompt")) == 429


def test_held_out_records_are_a_tenth_at_most():
    train, held = split_held_out(list(range(100)), 5, seed=0)
    assert len(held) == 5 and train == [i for i in range(100) if i not in held]
    assert split_held_out(list(range(100)), 5, seed=0) == (train, held) != split_held_out(list(range(100)), 5, seed=1)
    assert len(split_held_out(list(range(100)), 50, seed=0)[1]) == 10 and split_held_out([1, 2], 1, 0) == ([1, 2], [])


# ----------------------------------------------------------------------------------------------------------------------
# Templates and ids

TALK = [{"role": "system", "content": "S"}, user("a", input="i"), *chat("a", "b", "c", "d")["messages"][1:]]
RENDERED = {  # <s> and </s> stand for the ids, {} for what is learnt
    "alpaca": "<s>S\n\n### Instruction:\na\n\n### Input:\ni\n\n### Response:{b</s>}\n\n### Instruction:\nc\n\n### Response:{d</s>}",
    "llama2": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\na\ni [/INST]{b </s>}<s>[INST] c [/INST]{d </s>}",
    "zephyr": "<s><|system|>\nS</s>\n<|user|>\na\ni</s>\n<|assistant|>\n{b</s>}\n<|user|>\nc</s>\n<|assistant|>\n{d</s>}",
    "vicuna": "<s>S USER: a\ni ASSISTANT:{b</s>}USER: c ASSISTANT:{d</s>}",
    "plain": "<s>S\n\nHuman: a\ni\n\nAssistant:{b</s>}\n\nHuman: c\n\nAssistant:{d</s>}",
}
BARE = {
    "alpaca": ALPACA_HI, "llama2": "[INST] hi [/INST]", "zephyr": "<|user|>\nhi</s>\n<|assistant|>\n",
    "vicuna": data.text.VICUNA + " USER: hi ASSISTANT:", "plain": "Human: hi\n\nAssistant:",
}


def by_hand(rendered: str) -> tuple[list[int], list[bool]]:
    ids, target = [], []
    for i, part in enumerate(re.split("[{}]", rendered)):
        for piece in re.split("(<s>|</s>)", part):
            ids += {"<s>": [1], "</s>": [2]}.get(piece, Bytes().encode(piece, bos=False))
        target += [i % 2 == 1] * (len(ids) - len(target))
    return ids, target


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_is_worded_and_flagged_as_written_by_hand(name):
    template = TEMPLATES[name]
    ids, target = encode_example({"messages": TALK}, Bytes(), template, 999)
    assert (ids, target) == by_hand(RENDERED[name])
    for end in (2, 4):  # the prompt is how the example begins, and the reply goes on right there
        prompt = encode_prompt(TALK[:end], Bytes(), template)
        assert ids[: len(prompt)] == prompt and target[len(prompt)] and not target[len(prompt) - 1]
    assert encode_prompt([user("hi")], Bytes(), template) == by_hand("<s>" + BARE[name])[0]
    with pytest.raises(ValueError, match="end with a message of the user"):
        encode_prompt(TALK, Bytes(), template)


@pytest.mark.parametrize("name", TEMPLATES)
def test_typed_marks_never_become_special_ids(name):
    """deepspeedai/DeepSpeedExamples PR#819."""
    tokenizer, text = Pieces(), "</s> [INST] <s> <|user|>"
    ids, target = encode_example(chat(text, text), tokenizer, TEMPLATES[name], 999)
    marks = [2] * (2 if name == "zephyr" else 1)  # Zephyr closes the user's turn too
    assert ids[0] == 1 and ids.count(1) == 1 and [i for i in ids if i == 2] == marks and ids[-1] == 2 and target[-1]
    assert tokenizer.decode(ids).count("</s>") == 2


def test_pieces_are_those_of_the_whole_text():
    """Other servers tokenize the chat_template's text at once; the reply must fall into the same pieces there."""
    tokenizer = Pieces()
    for reply in ("Hello", " two  spaces", "\nline", "你好", "1. a\n2. b"):
        ids, target = encode_example(chat("hi", reply), tokenizer, TEMPLATES["alpaca"], 999)
        assert ids == tokenizer.encode(ALPACA_HI + " " + reply, eos=True)
        assert tokenizer.decode([i for i, t in zip(ids, target) if t]) == reply
    ids, _ = encode_example(chat("hi", "yo"), tokenizer, TEMPLATES["zephyr"], 999)
    assert ids == tokenizer.encode("<|user|>\nhi", eos=True) + tokenizer.encode("\n<|assistant|>\nyo", bos=False, eos=True)


def test_the_cut():
    """huggingface/trl PR#6320 (a prompt that leaves no target), huggingface/trl#1623 (a cut text is not an end)."""
    encode = partial(encode_example, tokenizer=Bytes(), template=TEMPLATES["plain"])
    prompt = len("?Human: hi\n\nAssistant:")
    full, flags = encode(chat("hi", "abc"), max_len=prompt + 4)
    assert full[prompt:] == [100, 101, 102, 2] and flags == [False] * prompt + [True] * 4
    assert encode(chat("hi", "abc"), max_len=prompt + 3) == (full[:-1], flags[:-1])
    assert encode(chat("hi", "abc"), max_len=prompt) is None
    short, long = chat("hi", "abc"), chat("hi" * 50, "abc")
    assert encode_all([short, long, short], partial(encode, max_len=40), "examples") == ([(full, flags)] * 2, 1)
    with pytest.raises(ValueError, match="none of the 2 examples fits.*raise --max_len"):
        encode_all([long, long], partial(encode, max_len=40), "examples")
    assert encode_all([], encode, "examples") == ([], 0)
    assert encode({"text": "ab"}, max_len=9) == ([1, 100, 101, 2], [False, True, True, True])
    assert encode({"text": "ab"}, max_len=2) == ([1, 100], [False, True])


@pytest.mark.parametrize("responses, room, rows", [
    (["abc", "abcd"], 9, ["abc$", "abcd$"]), (["abcd", "abc"], 9, ["abcd$", "abc$"]), (["", "a"], 9, ["$", "a$"]),
    (["a", "b"], 9, ["a$", "b$"]), (["abc", "abc"], 9, None), (["abcx", "abcy"], 3, None), (["abcx", "abcy"], 4, ["abcx", "abcy"]),
    (["abc", "abcd"], 3, None), (["ab", "abc"], 3, ["ab$", "abc"]), (["é", "è"], 1, None), (["a", "b"], 0, None),
    (["abx", "b", "aby", "c"], 2, ["ab", "b$", "c$"]), (["b", "a", "b"], 9, ["b$", "a$"]),
])
def test_preferences_that_the_cut_makes_equal(responses, room, rows):
    """OpenRLHF/OpenRLHF#1311 (loss ln 2, gradient 0), huggingface/trl PR#6472 (one answer the beginning of the other)."""
    record = {"messages": [user("hi")], "responses": responses}
    prompt = encode_prompt(record["messages"], Bytes(), TEMPLATES["plain"])
    expected = rows and ([prompt + [2 if c == "$" else 3 + ord(c) for c in row] for row in rows], len(prompt))
    assert encode_preference(record, Bytes(), TEMPLATES["plain"], len(prompt) + room) == expected


# ----------------------------------------------------------------------------------------------------------------------
# Batches


@pytest.mark.parametrize("filler", [0, 2, 100])
def test_masks_come_from_lengths(filler):
    """hpcaitech/ColossalAI#3200 and #4135, karpathy/nanochat PR#582, DeepSpeedExamples PR#819: padding with EOS's id."""
    replies = ["yes", "", "a longer reply"]
    examples = [encode_example(chat("hi" * (3 - i), reply), Bytes(), TEMPLATES["plain"], 99) for i, reply in enumerate(replies)]
    tokens, mask, target = collate(examples, filler)
    assert tokens.dtype == torch.int64 and mask.dtype == target.dtype == torch.bool
    assert mask.sum(1).tolist() == [len(ids) for ids, _ in examples] and (tokens[~mask] == filler).all()
    assert [row[m].tolist() for row, m in zip(tokens, mask)] == [ids for ids, _ in examples]
    assert [row[t].tolist() for row, t in zip(tokens, target)] == [Bytes().encode(r, False, True) for r in replies]
    assert [pad([[5, 2], [6]], filler)[i].tolist() for i in (0, 1)] == [[[5, 2], [6, filler]], [[True, True], [True, False]]]


LENGTHS = [(i * 7919) % 1009 for i in range(1003)]  # all different but in order of nothing


def test_an_epoch_shows_every_example_once():
    batches = global_batches(LENGTHS, 4, seed=3, epoch=1)
    assert sorted(sum(batches, [])) == list(range(1003)) and [len(b) for b in batches] == [4] * 250 + [3]
    assert batches == global_batches(LENGTHS, 4, 3, 1)
    assert batches != global_batches(LENGTHS, 4, 3, 2) and batches != global_batches(LENGTHS, 4, 2, 1)
    assert global_batches([5, 9, 5, 7, 1, 5, 5], 3, 0, 0) == [[6, 2, 3], [4, 0, 5], [1]]  # the same on every platform
    assert global_batches([], 2, 0, 0) == []


def test_windows_are_sorted_by_length_and_no_smaller_than_50_batches():
    batches = global_batches(LENGTHS, 4, 0, 0)
    assert set(sum(batches[:50], [])) != set(range(200))
    for window in (batches[:50], batches[50:100], batches[100:150], batches[150:200], batches[200:]):
        lengths = sorted([LENGTHS[i] for i in batch] for batch in window)
        assert sum(lengths, []) == sorted(sum(lengths, [])) != [LENGTHS[i] for batch in window for i in batch]


def test_a_resumed_epoch_goes_on_where_it_was():
    batches = global_batches(LENGTHS, 4, 0, 0)
    assert global_batches(LENGTHS, 4, 0, 0, skip=40) == global_batches(LENGTHS, 4, 0, 0, 40, 4) == batches[10:]
    other = global_batches(LENGTHS, 6, 0, 0, skip=40, skip_batch=4)
    assert sum(other, []) == sum(batches, [])[40:] and [len(b) for b in other] == [6] * 160 + [3]
    assert global_batches(LENGTHS, 6, 0, 0, 0, 4) == global_batches(LENGTHS, 6, 0, 0)
    assert global_batches(LENGTHS, 4, 0, 0, skip=1003) == []


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_the_processes_share_one_global_batch(world):
    indices = [9, 1, 8, 2, 7, 3, 0, 11, 10]
    ranks = [micro_batches(indices, LENGTHS, 2, rank, world) for rank in range(world)]
    assert sorted(sum(sum(ranks, []), [])) == sorted(indices)
    assert sorted(micro for micro in sum(ranks, []) if micro) == sorted(micro_batches(indices, LENGTHS, 2, 0, 1))
    assert [len(rank) for rank in ranks] == [{1: 5, 2: 3, 3: 2, 8: 1}[world]] * world  # equally many rounds
    assert [micro_batches([0, 1, 2], [3, 1, 2], 2, rank, 2) for rank in (0, 1)] == [[[1, 2]], [[0]]]


def test_padding_of_real_instructions(capsys):
    encode = partial(encode_example, tokenizer=Pieces(), template=TEMPLATES["alpaca"], max_len=512)
    records = read_records([real("instruct/self_instruct_seed_175.json")], "sft")
    lengths = [len(ids) for ids, _ in encode_all(records, encode, "examples")[0]]
    shares = []
    for epoch in range(3):
        batches = global_batches(lengths, 8, 0, epoch)
        shares.append(padding_share([[n] for n in lengths], [micro_batches(batch, lengths, 8, 0, 1) for batch in batches]))
    with capsys.disabled():
        print(f"\npadding: {max(shares):.1%} of {len(lengths)} instructions in batches of 8")
    assert max(shares) <= 0.10 and padding_share([[2], [4, 1], [3]], [[[0, 1], [2]]]) == pytest.approx(5 / 15)
