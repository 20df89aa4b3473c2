"""data/records.py: expected values written by hand. A test of a fault met elsewhere names the thread that told it."""

import gzip
import json
import re
from pathlib import Path

import pytest

import data.demo
import data.records
from data.records import KINDS, normalise, read_records

REAL = Path(__file__).parents[2] / "shared" / "real"


def real(name: str) -> Path:
    if not (REAL / name).exists():
        pytest.skip(f"needs the real file {REAL / name}")
    return REAL / name


def user(text: str, **more) -> dict:
    return {"role": "user", "content": text, **more}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def chat(*texts: str) -> dict:
    return {"messages": [(user, assistant)[i % 2](text) for i, text in enumerate(texts)]}


def written(tmp_path: Path, *records: object, name: str = "data.jsonl") -> Path:
    path = tmp_path / name
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records), encoding="utf-8")
    return path


# ---- forms ----------------------------------------------------------------------------------------------------------


def test_every_sample_in_the_docstring_is_read(tmp_path):
    """hpcaitech/ColossalAI#3325: users could not tell what the file of each stage looks like."""
    samples = re.findall(r"^(sft|preference|prompt) +({.*})", data.records.__doc__, re.MULTILINE)
    assert len(samples) == 11
    added = {"messages": [user("Add the numbers.", input="2, 3"), assistant("5")]}
    hi = [user("Hi")]
    haiku = {"messages": [user("Write a haiku.")]}
    found = [read_records([written(tmp_path, text)], kind)[0] for kind, text in samples]
    raw = [(record.pop("record"), record.pop("place")) for record in found if "record" in record]
    assert raw == [(json.loads(text), f"{tmp_path / 'data.jsonl'}, line 1") for kind, text in samples[-2:]]
    assert found == [
        added, added, chat("Hi", "Hello."), chat("Hi", "Hello."), chat("Hi", "Hello."), {"text": "Once upon a time."},
        {"messages": hi, "responses": ["Hello.", "No."]}, {"messages": hi, "responses": ["Hello.", "No."]},
        {"messages": hi, "responses": ["Hello.", "Hm.", "No."]}, haiku, haiku]
    for kind, text in samples:
        if '"text"' not in text:
            assert read_records([written(tmp_path, text)], "prompt")[0]["messages"][-1]["role"] == "user"


def test_every_form_has_a_sample():
    samples = re.findall(r"^(sft|preference|prompt) +({.*})", data.records.__doc__, re.MULTILINE)
    for name, kind in KINDS.items():
        shown = [set(json.loads(text)) for sample, text in samples if sample == name or name == "prompt"]
        for form in kind.forms:
            assert any(keys >= {form.question, *form.answers} for keys in shown), form


@pytest.mark.parametrize("more", [
    {}, {"input": None}, {"input": ""}, {"input": "  "}, {"context": ""}, {"system": " "}])
def test_all_kinds_of_nothing_are_one(more):
    """hiyouga/LlamaFactory#7344: KeyError where the optional input is left out."""
    assert normalise({"instruction": "hi", "output": "yo", **more}, "sft") == chat("hi", "yo")


def test_a_passage_belongs_to_the_question():
    """databrickslabs/dolly#55: as a prompt, the passage was lost."""
    asked = {"messages": [user("hi", input="yo")]}
    for key in ("input", "context"):
        assert normalise({"instruction": "hi", key: "yo"}, "prompt") == asked
        for answer in ("output", "response"):
            record = {"instruction": "hi", key: "yo", answer: "b"}
            assert normalise(record, "sft")["messages"] == [*asked["messages"], assistant("b")]
            assert normalise(record, "prompt") == asked
    assert normalise({"prompt": "hi", "context": "yo"}, "prompt") == asked
    ranking = normalise({"prompt": "hi", "input": "yo", "responses": ["a", "b"]}, "preference")
    assert ranking == asked | {"responses": ["a", "b"]}
    both = normalise({"instruction": "hi", "input": "a", "context": "b"}, "prompt")
    assert both == {"messages": [user("hi", input="a\nb")]}


@pytest.mark.parametrize("kind, record", [
    ("sft", {"instruction": "a", "output": "b"}),
    ("sft", chat("a", "b")),
    ("sft", {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}),
    ("sft", {"prompt": "a", "completion": "b"}),
    ("preference", {"prompt": "a", "chosen": "b", "rejected": "c"}),
    ("preference", {"prompt": "a", "responses": ["b", "c"]}),
    ("preference", {"chosen": "Human: a\n\nAssistant: b", "rejected": "Human: a\n\nAssistant: c"}),
    ("prompt", {"prompt": "a"}),
    ("prompt", {"prompt": "Human: a\n\nAssistant:"}),
    ("prompt", {"chosen": chat("a", "b")["messages"]}),
])
def test_a_system_text_beside_a_record_is_its_system_message(kind, record):
    """hiyouga/LlamaFactory#7592: the model was trained without it."""
    system = [{"role": "system", "content": "You are a pirate."}]
    plain = normalise(record, kind)
    expected = plain | {"messages": system + plain["messages"]}
    assert normalise(record | {"system": "You are a pirate."}, kind) == expected


def test_transcripts_split_at_the_last_answer(tmp_path):
    """huggingface/trl#1858: a dialogue of several turns was split at its first answer."""
    talk = '\n\nHuman: a\n\nAssistant: b\n\nHuman: Who says "Assistant: no"?\nAssistant: c?\n\nAssistant:'
    prompt = chat("a", "b", 'Who says "Assistant: no"?\nAssistant: c?')["messages"]
    pair = {"chosen": talk + " d", "rejected": talk + " e\n\nf"}
    parts = {"prompt": talk, "chosen": " d", "rejected": " e\n\nf"}
    as_lists = {"chosen": [*prompt, assistant("d")], "rejected": [*prompt, assistant("e\n\nf")]}
    for record in (pair, parts, as_lists, {**parts, "prompt": prompt}):
        path = written(tmp_path, record)
        assert read_records([path], "preference") == [{"messages": prompt, "responses": ["d", "e\n\nf"]}]
        found = {"messages": prompt, "record": record, "place": f"{path}, line 1"}
        assert read_records([path], "prompt") == [found]


def test_answers_may_be_messages():
    """huggingface/trl#2164: prompt and answers are lists of messages. Other data sets repeat the prompt in each."""
    asked, b, c = chat("a")["messages"], [assistant("b")], [assistant("c")]
    pair = {"messages": asked, "responses": ["b", "c"]}
    for prompt in ("a", asked):
        assert normalise({"prompt": prompt, "chosen": b, "rejected": c}, "preference") == pair
        assert normalise({"prompt": prompt, "chosen": asked + b, "rejected": asked + c}, "preference") == pair
        assert normalise({"prompt": prompt, "completion": b}, "sft") == chat("a", "b")
    with pytest.raises(ValueError, match="turn 2 is the user's"):
        normalise({"prompt": "a", "chosen": chat("x", "b")["messages"], "rejected": asked + c}, "preference")


def marked(key: str, value: object) -> dict:
    return {"messages": [user("a"), assistant("b") | {key: value}]}


SFT, PAIR, PROMPT = {"instruction": "a", "output": "b"}, {"chosen": "a", "rejected": "b"}, {"prompt": "a"}


@pytest.mark.parametrize("line_break", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("between", ["{}{}", "{}", "{}  {}"])
def test_the_line_breaks_of_a_transcript(line_break, between):
    """TabbyML/tabby#3279: with other line breaks the whole conversation was the user's first turn."""
    mark = between.format(line_break, line_break)
    talk = f"{mark}Human: a{mark}Assistant: b{mark}Human: c{mark}Assistant:"
    asked = chat("a", "b", "c")["messages"]
    assert normalise({"prompt": talk}, "prompt") == {"messages": asked}
    pair = {"messages": asked, "responses": ["d", "e"]}
    assert normalise({"prompt": talk, "chosen": " d", "rejected": " e"}, "preference") == pair
    assert normalise({"chosen": talk + " d", "rejected": talk + " e"}, "preference") == pair
    mixed = "Human: a\nAssistant: b\n\nHuman: c\nAssistant:"
    assert normalise({"prompt": mixed}, "prompt") == {"messages": asked}


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"weight": 1, "train": False}])
def test_a_reply_may_be_context(mark):
    """axolotl PR#1703: a reply of weight 0 was learnt."""
    talk = [user("2 + 2?", weight=0), assistant("Five.") | mark, user("No."), assistant("Four.") | {"weight": 1}]
    learnt = [user("2 + 2?"), assistant("Five.") | {"train": False}, user("No."), assistant("Four.")]
    assert normalise({"messages": talk}, "sft") == {"messages": learnt}
    renamed = [{"from": turn.pop("role"), "value": turn.pop("content")} | turn for turn in talk]
    assert normalise({"conversations": renamed}, "sft") == {"messages": learnt}


READ = {"id": 7, "source": "web", "lang": "en", "score": 0.5, "input": None, "history": [], "tools": [], "labels": {}}


@pytest.mark.parametrize("kind, record, names", [
    ("sft", SFT | READ, ""),
    ("sft", SFT | {"inputs": "c"}, "inputs"),
    ("sft", SFT | {"response": "c", "label": False}, "label response"),
    ("sft", {"text": "a", "system": "S"}, "system"),
    ("sft", chat("a", "b") | {"context": "c"}, "context"),
    ("sft", marked("reasoning_content", "c"), "reasoning_content"),
    ("sft", marked("name", "Al") | READ, ""),
    ("sft", {"messages": [user("a", value="c", **{"from": "gpt"}), assistant("b")]}, "from value"),
    ("preference", {"prompt": "a", "responses": ["b", "c"], "margin": 2}, "margin"),
    ("preference", {"prompt": "a", "chosen": [assistant("b") | {"thinking": "c"}], "rejected": "d"}, "thinking"),
    ("prompt", SFT | {"response": "c", "chosen": "d", "answer": 4}, "answer"),
])
def test_keys_that_are_not_read_are_told_once_a_file(tmp_path, kind, record, names):
    said = []
    path = written(tmp_path, record, record)
    assert len(read_records([path], kind, say=said.append)) == 2
    told = ", ".join(f"{name} in 2" for name in names.split())
    note = f"note: {path}: keys that are not read, with the number of their records: {told}"
    assert said == ([note] if names else [])


def test_the_demo_has_no_unread_keys():
    for file in data.demo.FOLDER.glob("*.jsonl*"):
        kind = {"preferences": "preference", "prompts": "prompt", "sft": "sft"}[file.name.partition(".")[0]]
        assert read_records([file], kind, say=pytest.fail)




@pytest.mark.parametrize("kind, bad, reason", [
    ("sft", PAIR, "these are preferences, for rm.py; sft.py reads .* or {text}; found keys chosen, rejected"),
    ("sft", PROMPT, "these are prompts, for ppo.py --prompt_dataset; .* found keys prompt"),
    ("sft", {"instruction": "a"}, "these are prompts, for ppo.py --prompt_dataset; .* {instruction, output} or"),
    ("preference", SFT, "for sft.py; .* expected keys {prompt, responses} or .* or {chosen, rejected}; "
                        "found keys instruction, output"),
    ("prompt", {"text": "a"}, "for sft.py; ppo.py --prompt_dataset reads prompts"),
    ("sft", {"a": 1}, "unknown form; .* found keys a"),
    ("sft", 7, r"found keys none \(a int\)"),
    ("sft", {"instruction": "a", "output": 3}, '"output" must be text, not int'),
    ("sft", {"instruction": "a", "output": None}, '"output" must be text, not missing or null'),
    ("sft", SFT | {"input": 3}, '"input" must be text, not int'),
    ("sft", SFT | {"system": ["S"]}, '"system" must be text, not list'),
    ("sft", {"messages": [{"role": "system", "content": "S"}], "system": "S"}, "turn 1 is the system's"),
    ("sft", {"text": " "}, '"text" is empty'),
    ("sft", {"text": 3}, '"text" must be text, not int'),
    ("sft", '{"text": "\\ud83d"}', "surrogates not allowed"),
    ("sft", '{"text": "a"', "not valid JSON"),
    ("sft", '{"text": ' + "7" * 5000 + "}", '"text" must be text, not float'),
    ("sft", "[" * 100_000, "not valid JSON .*nested too deeply"),
    ("sft", chat("a"), "must end with a message of the assistant"),
    ("sft", {"messages": []}, "must end with"),
    ("sft", {"messages": [user("a"), user("b")]}, "turn 2 is the user's"),
    ("sft", {"messages": "a"}, '"messages" is no conversation, which is a list of'),
    ("sft", {"messages": ["a"]}, '"messages" is no conversation, which is a list of'),
    ("sft", {"messages": None}, '"messages" is no conversation, which is a list of'),
    ("sft", {"messages": [{"role": "tool", "content": "a"}]}, 'role must be one of user, .* not "tool"'),
    ("sft", {"messages": [{"role": "user"}]}, '"value" must be text, not missing or null'),
    ("preference", PAIR, '"chosen" is no conversation, .* a transcript that begins with "Human:"'),
    ("preference", {"chosen": "Human: a\n\nAssistant: b", "rejected": "Human: c\n\nAssistant: b"}, "same conversation"),
    ("preference", {"chosen": "Human: a", "rejected": "Human: a"}, "must end with a message of the assistant"),
    ("preference", {"prompt": "a", "responses": ["b"]}, "at least two"),
    ("preference", {"prompt": "a", "responses": "bc"}, "at least two"),
    ("preference", {"prompt": "a", "responses": ["b", 3]}, '"responses" must be text, not int'),
    ("preference", {"prompt": "a", "chosen": "b", "rejected": None}, "must be text"),
    ("preference", {"prompt": "Human: a\n\nAssistant: b", "chosen": "b", "rejected": "c"}, "turn 3 is the assistant's"),
    ("prompt", {"prompt": " "}, "the prompt is empty"),
    ("prompt", {"instruction": ""}, "the prompt is empty"),
    ("prompt", {"prompt": "Human: a\n\nAssistant: b"}, "must end with a message of the user"),
    ("prompt", {"prompt": "These are talks.\n\nHuman: a\n\nAssistant:"}, '"prompt" is no conversation'),
    ("prompt", {"prompt": "Human: a\nHuman: b\nAssistant:"}, "turn 2 is the user's"),
    ("preference", {"prompt": "a", "chosen": " ", "rejected": "b"}, "a response that is preferred to another one is e"),
    ("preference", {"prompt": "a", "responses": ["b", "", "c"]}, "a response that is preferred to another one is empt"),
    ("sft", marked("weight", 0.5), 'the "weight" or "train" of a message must be 0 or 1'),
    ("sft", marked("train", "no"), 'the "weight" or "train" of a message must be 0 or 1'),
    ("sft", {"messages": [user("a", weight=1), assistant("b")]}, "0 for all but replies"),
    ("sft", chat("a", "b") | {"tools": [{"name": "f"}]}, '"tools" is not read here, and the record means'),
    ("sft", marked("tool_calls", [{"name": "f"}]), '"tool_calls" is not read here, and the record'),
    ("sft", chat("a", "b") | {"images": ["a.png"]}, '"images" is not read here, and the record means'),
    ("prompt", {"instruction": "a", "history": [["b", "c"]]}, '"history" is not read here, and the record means'),
    ("sft", SFT | {"history": [["b", "c"]]}, '"history" is not read here, and the record means something else'),
])
def test_a_bad_record_is_told_or_counted(tmp_path, kind, bad, reason):
    """hiyouga/LlamaFactory#188, hpcaitech/ColossalAI#3325, stanford-crfm/helm#1381."""
    good = {"sft": {"text": "a"}, "preference": {"prompt": "a", "responses": ["b", "c"]}, "prompt": PROMPT}[kind]
    path = written(tmp_path, good, "", bad, good)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}, line 3: .*{reason}.*--skip_bad_records"):
        read_records([path], kind)
    said = []
    assert len(read_records([path], kind, skip_bad=True, say=said.append)) == 2
    assert len(said) == 1 and re.match(f".*skipped 1 bad of 3 records, first line 3: .*{reason}", said[0])
    if not isinstance(bad, str) or not bad.startswith("["):  # alone it would be a JSON list
        with pytest.raises(ValueError, match="no usable record: all 1 are bad, first line 1: "):
            read_records([written(tmp_path, bad)], kind, skip_bad=True)


def test_only_the_worst_response_may_be_empty():
    worst = normalise({"prompt": "a", "chosen": "b", "rejected": " "}, "preference")
    assert worst == {"messages": [user("a")], "responses": ["b", ""]}


def test_an_empty_history_changes_nothing():
    assert normalise(SFT | {"history": []}, "sft") == chat("a", "b")


# ---- files ----------------------------------------------------------------------------------------------------------

LINES = '{"text": "å"}\n\n{"text": "b\u2028c"}'
LIST = '[\n{"text": "å"},\n {"text": "b\u2028c"}]'


@pytest.mark.parametrize("content", [
    LINES.encode(),
    LIST.encode(),
    gzip.compress(LINES.encode()),
    gzip.compress(LIST.encode()),
    LINES.encode("utf-8-sig"),
    LIST.encode("utf-8-sig"),
    LINES.replace("\n", "\r\n").encode(),
    LIST.replace("\n", "\r\n").encode(),
    LIST.encode() + b"\n\n",
], ids="lines list lines.gz list.gz lines-bom list-bom lines-crlf list-crlf list-tail".split())
def test_the_content_tells_the_format(tmp_path, content):
    (tmp_path / "data.txt").write_bytes(content)
    assert read_records([tmp_path / "data.txt"], "sft") == [{"text": "å"}, {"text": "b\u2028c"}]


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


@pytest.mark.parametrize("content, reason", [
    (b"", "no usable record"),
    (b" \n ", "no usable record"),
    (b"[ ]", "no usable record"),
    (b"\x1f\x8bno", "damaged gzip"),
    (b"\x1f\x8b" * 9, "damaged gzip"),
    (b'[\n{"text": "a"}\n{"text": "b"}]', "line 3: broken JSON list"),
    (b'[{"text": "a"},\n', "line 2: broken JSON list"),
    (b'[{"text": "a"}]\n]', "line 2: broken JSON list"),
    (b"[" * 100_000, "line 1: broken JSON list .*nested too deeply"),
    (b'[\n{"text": "a"},\n' + b"[" * 100_000, "line 3: broken JSON list .*nested too deeply"),
    (b'[{"text": "a"}] b', "line 1: broken JSON list .*text follows the list"),
    (b'[{"text": "a"}, ]', "line 1: broken JSON list"),
    (b'[, {"text": "a"}]', "line 1: broken JSON list"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a pointer of git-lfs, .*git lfs pull"),
    (b"PAR1\x15\x04", "is a Parquet file; turn it into JSON lines, .*read_parquet"),
    (b'[\n{"text":\n "a"},\n\n{"a": 1}\n]', "line 5: unknown form"),
    (b'[\n\n{"text": "\xe5"}]', "line 3: not UTF-8 at byte 11 of the line"),
    (b'\n{"text": "\xe5"}', "line 2: not UTF-8 at byte 11 of the line"),
    (b'{\n"text": "a"\n}', "line 1: not valid JSON .*; a file is a JSON list or has one JSON object per line"),
])
def test_a_bad_file_is_one_sentence(tmp_path, content, reason):
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}.*{reason}"):
        read_records([path], "sft")


def test_a_path_that_is_no_file_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="is a directory"):
        read_records([tmp_path], "sft")
    with pytest.raises(FileNotFoundError, match="nowhere.json does not exist"):
        read_records([tmp_path / "nowhere.json"], "sft")
