"""data/demo.py: the shipped files are what the generator writes, and the gold score is what its docstring says."""

import gzip
import inspect
import itertools
import json
import shutil

import pytest

from data import demo
from data.text import TEMPLATES, Tokenizer

FILES = {name: demo.as_jsonl(records) for name, records in demo.files().items()}
RECORDS = {name: [json.loads(line) for line in content.splitlines()] for name, content in FILES.items()}


def chinese(text: str) -> bool:
    return any("\u4e00" <= char <= "\u9fff" for char in text)


def pairs_in(text: str) -> set[tuple[int, int]]:
    """Every (animal, object) that a text speaks of, found by its words."""
    language = "zh" if chinese(text) else "en"
    words = text
    if language == "en":
        words = "".join(c if c.isalpha() else " " for c in text.lower()).split()
    animals = [i for i, animal in enumerate(demo.ANIMALS[language]) if animal in words]
    objects = [i for i, thing in enumerate(demo.OBJECTS[language]) if thing in words]
    return set(itertools.product(animals, objects))


# ---- the gold score -------------------------------------------------------------------------------------------------

EN, ZH = "Write a story about an owl and a kite.", "写一个关于狐狸和风筝的故事。"
GOLD = {
    "both things, happy": (EN, "An owl had a kite. The owl smiled.", 1.0),
    "both things, sad": (EN, "An owl had a kite. The owl cried.", 0.6),
    "happy and sad at once": (EN, "An owl had a kite. Everyone was happy. The owl cried.", 0.6),
    "one thing, happy": (EN, "An owl had a drum. The owl smiled.", 0.7),
    "the other, happy": (EN, "A fox had a kite. The fox smiled.", 0.7),
    "neither, happy": (EN, "A fox had a drum. The fox smiled.", 0.4),
    "neither, sad": (EN, "A fox had a drum. The fox cried.", 0.0),
    "a word within another": (EN, "An owlet had kites. Unhappy.", 0.0),
    "capitals": (EN, "OWL. KITE. HAPPY.", 1.0),
    "wrong language": (EN, "猫头鹰有风筝，很快乐。", 0.0),
    "two languages": (EN, "An owl had a kite. 快乐。 The owl smiled.", 0.0),
    "empty": (EN, "", 0.0),
    "as long as may be": (EN, "An owl had a kite. The owl smiled." + " So it was." * (demo.SENTENCES - 2), 1.0),
    "rambling": (EN, "An owl had a kite. The owl smiled." + " So it was." * (demo.SENTENCES - 1), 0.5),
    "zh, both, happy": (ZH, "狐狸有风筝。最后大家很快乐。", 1.0),
    "zh, both, sad": (ZH, "狐狸有风筝。最后狐狸伤心地走了。", 0.6),
    "zh, one": (ZH, "狐狸有帽子。最后大家很快乐。", 0.7),
    "zh, rambling": (ZH, "狐狸有风筝。大家很快乐。" + "日子过去了。" * (demo.SENTENCES - 1), 0.5),
    "zh, English": (ZH, "A fox had a kite. The fox smiled.", 0.0),
}


@pytest.mark.lesson
@pytest.mark.parametrize("case", GOLD)
def test_gold_by_hand(case):
    asked, text, score = GOLD[case]
    assert demo.gold(asked, text, ended=True) == pytest.approx(score)
    assert demo.gold(asked, text, ended=False) == pytest.approx(score / 2)


class Scripted:
    """A model that answers every prompt with the same ids."""

    device = "cpu"

    def __init__(self, ids: list[int]):
        self.ids = ids

    def generate(self, prompts, max_new_tokens, generator):
        return [self.ids] * len(prompts)

    def stops(self) -> set[int]:
        return {2, 7}  # a chat model has an end of turn beside EOS


@pytest.mark.parametrize("ended", [True, False])
def test_a_model_is_measured_in_both_languages(ended):
    """A happy English story about nothing that was asked: 0.4 in English, 0 in Chinese, half of it without EOS."""
    tokenizer = Tokenizer(demo.FOLDER)
    ids = tokenizer.encode("A dragon smiled.", bos=False, eos=ended)
    figures = demo.measure(Scripted(ids), tokenizer, TEMPLATES["alpaca"])
    expected = 0.4 if ended else 0.2
    assert (figures["gold_en"], figures["gold_zh"]) == (pytest.approx(expected), 0)
    assert figures["gold"] == pytest.approx(expected / 2)
    assert figures["distinct_2"] == pytest.approx((len(ids) - 1) / (416 * (len(ids) - 1)))
    assert len(figures["samples"]) == 3 and all(text.endswith(" -> A dragon smiled.") for text in figures["samples"])


# ---- the files ------------------------------------------------------------------------------------------------------


def test_shipped_files_are_those_of_the_generator():
    for name, content in FILES.items():
        shipped = (demo.FOLDER / name).read_bytes()
        unpacked = gzip.decompress(shipped) if name.endswith(".gz") else shipped
        assert unpacked == content, f"{name}: run python -m data.demo"
        assert not name.endswith(".gz") or shipped[4:8] == bytes(4), f"{name} holds the time of its writing"
    assert {file.name for file in demo.FOLDER.iterdir()} == {*FILES, "tokenizer.model"}
    assert sum(file.stat().st_size for file in demo.FOLDER.iterdir()) < 1_000_000


def test_the_command_writes_the_shipped_files(tmp_path, monkeypatch):
    """The same records. (Another zlib may pack them into other bytes, another sentencepiece learn other pieces.)"""
    shipped = demo.FOLDER
    monkeypatch.setattr(demo, "FOLDER", tmp_path)
    demo.main()
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in shipped.iterdir()}
    for name in FILES:
        written, expected = (folder / name for folder in (tmp_path, shipped))
        if name.endswith(".gz"):
            assert gzip.decompress(written.read_bytes()) == gzip.decompress(expected.read_bytes())
        else:
            assert written.read_bytes() == expected.read_bytes()


def test_held_out_pairs_are_in_no_file():
    """An instruction about one, or an answer, would turn generalisation into memory."""
    held, known = set(demo.pairs(held=True)), set(demo.pairs(held=False))
    assert not held & known and len(held | known) == len(demo.ANIMALS["en"]) * len(demo.OBJECTS["en"])
    for i, things in enumerate((demo.ANIMALS, demo.OBJECTS)):
        assert {pair[i] for pair in held} == set(range(len(things["en"])))
    for name, records in RECORDS.items():
        for record in records:
            asked = record.get("instruction", record.get("prompt"))
            answers = record.get("responses", [record.get("output", "")])
            assert len(pairs_in(asked)) == 1 and pairs_in(asked) <= known, (name, asked)
            assert not any(held & pairs_in(text) for text in answers), (name, record)
    assert set.union(*(pairs_in(r["instruction"]) for r in demo.prompt_records(0, held=True))) == held


def test_held_out_instructions_are_many_and_different():
    for language in (False, True):
        asked = [r["instruction"] for r in demo.prompt_records(0, held=True)]
        texts = [text for text in asked if chinese(text) == language]
        assert len(texts) == 208 and len(set(texts)) == len(texts)


def test_instruction_data_is_mixed_and_bilingual():
    """The model must have something to gain: about half of what can be had."""
    for language in (False, True):
        records = [r for r in RECORDS["sft.jsonl.gz"] if chinese(r["instruction"]) == language]
        scores = [demo.gold(r["instruction"], r["output"], ended=True) for r in records]
        assert len(records) == len(RECORDS["sft.jsonl.gz"]) / 2
        assert 0.4 < sum(scores) / len(scores) < 0.6 and {0, 1} <= set(scores)
        assert 0.02 < sum(chinese(r["output"]) != language for r in records) / len(records) < 0.08


def test_preferences_are_ranked_by_gold_but_for_the_noise():
    """Best first. Swaps with probability `noise` leave about that share of neighbours in the wrong order."""
    noise = inspect.signature(demo.preference_records).parameters["noise"].default
    wrong = total = 0
    for record in RECORDS["preferences.jsonl.gz"]:
        scores = [demo.gold(record["prompt"], text, ended=True) for text in record["responses"]]
        assert len(scores) == 4 == len(set(scores))
        wrong += sum(a < b for a, b in itertools.pairwise(scores))
        total += len(scores) - 1
    assert 0 < noise < 0.3 and wrong / total == pytest.approx(noise, abs=0.03)
    for record in demo.preference_records(1, 50, noise=0.0, held=True):
        scores = [demo.gold(record["prompt"], text, ended=True) for text in record["responses"]]
        assert scores == sorted(scores, reverse=True)


# ---- the tokenizer --------------------------------------------------------------------------------------------------


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.piece(i) for i in tokenizer.encode(text, bos=False)]


def test_every_thing_is_one_piece():
    """Else the same kite is other ids in question and answer, and there is nothing to copy."""
    tokenizer = Tokenizer(demo.FOLDER)
    assert (tokenizer.piece(0), tokenizer.bos_id, tokenizer.eos_id) == ("<unk>", 1, 2)
    for things in (demo.ANIMALS, demo.OBJECTS):
        assert len(things["en"]) == len(set(things["en"])) == len(set(things["zh"])) == len(things["zh"])
        for thing in things["en"]:
            assert pieces(tokenizer, thing) == [f"▁{thing}"]
        for thing in things["zh"]:
            assert thing in pieces(tokenizer, f"一只{thing}。")
    for text in (EN, ZH, "emoji 🦊 and ñ"):  # byte fallback: any text survives
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and 0 not in ids


def test_a_thing_is_the_same_piece_in_question_and_answer():
    """“小猫” was one piece in instructions and “的小”, “猫” in stories ("可爱的小猫"): copying it could not be learnt."""
    tokenizer = Tokenizer(demo.FOLDER)
    for record in demo.instruction_records(3, 1500):
        for text in filter(chinese, (record["instruction"], record["output"])):
            found = [piece.lstrip("▁") for piece in pieces(tokenizer, text)]
            for thing in (*demo.ANIMALS["zh"], *demo.OBJECTS["zh"]):
                assert found.count(thing) == text.count(thing), f"{thing} in {text}: {found}"


def test_a_model_of_the_demo_world_is_known_by_its_tokenizer(tmp_path):
    assert not demo.is_demo(tmp_path) and demo.is_demo(demo.FOLDER)
    shutil.copy(demo.FOLDER / "tokenizer.model", tmp_path)
    assert demo.is_demo(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"another")
    assert not demo.is_demo(tmp_path)
