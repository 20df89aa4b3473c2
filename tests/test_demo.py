"""data/demo.py: the shipped files are what the generator writes, and the gold score is what its docstring says."""

import gzip
import inspect
import itertools
import json

import pytest

from data.text import Tokenizer
from data import demo

FILES = {name: demo.as_jsonl(records) for name, records in demo.files().items()}
RECORDS = {name: [json.loads(line) for line in content.splitlines()] for name, content in FILES.items()}


def chinese(text: str) -> bool:
    return any("\u4e00" <= char <= "\u9fff" for char in text)


def pairs_in(text: str) -> set[tuple[int, int]]:
    """Every (animal, object) that a text speaks of, found by its words."""
    language = "zh" if chinese(text) else "en"
    words = text if language == "zh" else "".join(c if c.isalpha() else " " for c in text.lower()).split()
    return set(itertools.product(*([i for i, thing in enumerate(things[language]) if thing in words] for things in (demo.ANIMALS, demo.OBJECTS))))


# ---- the files ------------------------------------------------------------------------------------------------------

def test_shipped_files_are_those_of_the_generator():
    for name, content in FILES.items():
        shipped = (demo.FOLDER / name).read_bytes()
        assert (gzip.decompress(shipped) if name.endswith(".gz") else shipped) == content, f"{name}: run python -m data.demo"
        assert not name.endswith(".gz") or shipped[4:8] == bytes(4), f"{name} holds the time of its writing"
    assert {file.name for file in demo.FOLDER.iterdir()} == {*FILES, "tokenizer.model"}
    assert sum(file.stat().st_size for file in demo.FOLDER.iterdir()) < 1_000_000


def test_held_out_pairs_are_in_no_file():
    """An instruction about one, or an answer, would turn generalisation into memory."""
    held, known = set(demo.pairs(held=True)), set(demo.pairs(held=False))
    assert not held & known and len(held | known) == len(demo.ANIMALS["en"]) * len(demo.OBJECTS["en"])
    for i, things in enumerate((demo.ANIMALS, demo.OBJECTS)):
        assert {pair[i] for pair in held} == set(range(len(things["en"])))
    for name, records in RECORDS.items():
        for record in records:
            asked = record.get("instruction", record.get("prompt"))
            assert len(pairs_in(asked)) == 1 and pairs_in(asked) <= known, (name, asked)
            assert not any(held & pairs_in(text) for text in record.get("responses", [record.get("output", "")])), (name, record)
    assert set.union(*(pairs_in(r["instruction"]) for r in demo.prompt_records(0, held=True))) == held


def test_held_out_instructions_are_many_and_different():
    for language in (False, True):
        texts = [r["instruction"] for r in demo.prompt_records(0, held=True) if chinese(r["instruction"]) == language]
        assert len(texts) >= 200 and len(set(texts)) == len(texts)


def test_instruction_data_is_mixed_and_bilingual():
    """The model must have something to gain: about half of what can be had."""
    for language in (False, True):
        records = [r for r in RECORDS["sft.jsonl.gz"] if chinese(r["instruction"]) == language]
        scores = [demo.gold(r["instruction"], r["output"], ended=True) for r in records]
        assert len(records) == len(RECORDS["sft.jsonl.gz"]) / 2 and 0.4 < sum(scores) / len(scores) < 0.6 and {0, 1} <= set(scores)
        assert 0.02 < sum(chinese(r["output"]) != language for r in records) / len(records) < 0.08


def test_preferences_are_ranked_by_gold_but_for_the_noise():
    """Best first; neighbours swapped with probability `noise` leave about that share of neighbours in the wrong order."""
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


# ---- gold -----------------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("case", GOLD)
def test_gold_by_hand(case):
    asked, text, score = GOLD[case]
    assert demo.gold(asked, text, ended=True) == pytest.approx(score) and demo.gold(asked, text, ended=False) == pytest.approx(score / 2)


# ---- the tokenizer --------------------------------------------------------------------------------------------------

def test_every_thing_is_one_piece():
    """Else the same kite is other ids in question and answer, and there is nothing to copy."""
    tokenizer = Tokenizer(demo.FOLDER)
    assert (tokenizer.sp.unk_id(), tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    for things in (demo.ANIMALS, demo.OBJECTS):
        assert len(things["en"]) == len(set(things["en"])) == len(set(things["zh"])) == len(things["zh"])
        for thing in things["en"]:
            assert tokenizer.encode(thing, bos=False) == [tokenizer.sp.piece_to_id(f"▁{thing}")], thing
        for thing in things["zh"]:
            inside = [tokenizer.sp.id_to_piece(i) for i in tokenizer.encode(f"一只{thing}。", bos=False)]
            assert thing in inside, inside
    for text in (EN, ZH, "emoji 🦊 and ñ"):  # byte fallback: any text survives
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and 0 not in ids


def test_a_thing_is_the_same_piece_in_question_and_answer():
    """“小猫” was one piece in instructions and “的小”, “猫” in stories ("可爱的小猫"): copying it could not be learnt."""
    tokenizer = Tokenizer(demo.FOLDER)
    pieces = lambda text: [piece.lstrip("▁") for piece in tokenizer.sp.encode(text, out_type=str)]
    for record in demo.instruction_records(3, 1500):
        for text in (record["instruction"], record["output"]):
            chinese = any("\u4e00" <= char <= "\u9fff" for char in text)
            found = pieces(text)
            for thing in (*demo.ANIMALS["zh"], *demo.OBJECTS["zh"]) if chinese else ():
                assert found.count(thing) == text.count(thing), f"{thing} in {text}: {found}"
