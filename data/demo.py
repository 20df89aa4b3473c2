"""The demo world: short stories asked for by instruction, in English and Chinese, and the rule that judges them.

    python -m data.demo            writes data/demo/ anew (the same bytes every time)

An instruction names an animal and an object: "Write a story about a fox and a kite." / “写一个关于狐狸和风筝的故事。”. A
grammar writes the answers, so nobody else's text is shipped and a rule can judge every answer. The answers are mixed as
the web is: half end sadly, many forget what was asked, some ramble, a few are in the wrong language.

What each stage sees:
    sft.jsonl.gz           instruction and ONE answer, good or bad: the model learns to write like this
    preferences.jsonl.gz   instruction and FOUR answers, ranked by gold score with human-like mistakes: the reward model
    prompts.jsonl          instructions alone: PPO, which sees only the reward model's scores
    (held out)             pairs of things that occur together in no file: how well all of it generalises

The gold score (`gold`) is the rule itself. No stage is trained on it, so it shows what real projects cannot see:
whether the reward that PPO raises is still the thing that was meant (over-optimization, Gao et al. 2022, arXiv
2210.10760).
"""

import gzip
import io
import json
import random
from itertools import chain, product
from pathlib import Path
from statistics import fmean

import sentencepiece
import torch

from data import weights
from data.measure import distinct_n
from data.text import ALPACA, chunks, encode_prompt

FOLDER = Path(__file__).parent / "demo"
OTHER = {"en": "zh", "zh": "en"}
LANGUAGES = tuple(OTHER)
SPACE = {"en": " ", "zh": ""}  # what stands between two words, and between two sentences
LONGEST = 96   # tokens of an answer; the longest story of the grammar has 88
SENTENCES = 5  # a story of more is rambling; a story of the grammar that does not ramble has 4 or 5

# ---- words and sentences --------------------------------------------------------------------------------------------

ANIMALS = {
    "en": "fox bear owl cat dog frog duck mouse rabbit horse lion goat crab swan crow turtle".split(),
    "zh": "狐狸 黑熊 猫头鹰 花猫 黄狗 青蛙 鸭子 老鼠 兔子 白马 狮子 山羊 螃蟹 天鹅 乌鸦 乌龟".split(),
}
OBJECTS = {
    "en": "kite drum hat ball boat lamp book bell cake key cup flute map shell clock mirror".split(),
    "zh": "风筝 鼓 帽子 皮球 木船 灯 书 铃铛 蛋糕 钥匙 杯子 笛子 地图 贝壳 时钟 镜子".split(),
}
# What a writer who forgets the question writes about instead; nobody ever asks for these.
FAVOURITES = {
    "en": ("dragon unicorn wizard".split(), "sword crown star".split()),
    "zh": ("飞龙 独角兽 巫师".split(), "宝剑 王冠 星星".split()),
}
# {a} is one thing asked for and {b} the other, in either order; articles are part of the filling.
INSTRUCTIONS = {
    "en": [
        "Write a story about {a} and {b}.",
        "Tell me a story with {a} and {b}.",
        "Please write a short story about {a} and {b}.",
        "I would like to hear a story about {a} and {b}.",
    ],
    "zh": [
        "写一个关于{a}和{b}的故事。",
        "请讲一个{a}和{b}的故事。",
        "给我写一个有{a}和{b}的短故事。",
        "我想听一个关于{a}和{b}的故事。",
    ],
}
PLACE = {
    "en": "river hill forest garden lake farm village sea".split(),
    "zh": "河边 山上 森林 花园 湖边 农场 村子 海边".split(),
}
KIND = {
    "en": "little brave young old shy clever kind lazy".split(),
    "zh": "可爱的 勇敢的 年轻的 年老的 害羞的 聪明的 善良的 懒惰的".split(),
}
LOOK = {
    "en": "red blue shiny golden tiny new strange heavy".split(),
    "zh": "红色的 蓝色的 闪亮的 金色的 小巧的 崭新的 奇怪的 很重的".split(),
}
TIME = {
    "en": ["One morning", "One evening", "One day", "One summer night", "One cold day"],
    "zh": ["一天早上", "一天晚上", "有一天", "一个夏夜", "一个冷天"],
}
OPENING = {
    "en": [
        "Once upon a time, {kind_a} lived by the {place}.",
        "There was once {kind_a} near the {place}.",
        "{time}, {kind_a} walked to the {place}.",
    ],
    "zh": [
        "从前，{place}住着一只{kind}{a}。",
        "很久以前，{place}有一只{kind}{a}。",
        "{time}，一只{kind}{a}来到{place}。",
    ],
}
FINDING = {
    "en": [
        "The {a} found {look_o} under a tree.",
        "{time}, the {a} saw {look_o} in the grass.",
        "A friend gave the {a} {look_o}.",
        "The {a} had always wanted {look_o}.",
    ],
    "zh": [
        "{a}在树下找到了一个{look}{o}。",
        "{time}，{a}在草地里看见一个{look}{o}。",
        "朋友送给{a}一个{look}{o}。",
        "{a}一直想要一个{look}{o}。",
    ],
}
MIDDLE = {
    "en": [
        "The {a} took the {o} home at once.",
        "But a strong wind blew the {o} away.",
        "Every day the {a} played with the {o}.",
        "The {a} wanted to show the {o} to everyone.",
        "Then it began to rain, and the {a} hid the {o}.",
        "A bird asked if it could try the {o}.",
        "The {a} slept beside the {o} that night.",
    ],
    "zh": [
        "{a}马上把{o}带回了家。",
        "可是大风把{o}吹走了。",
        "{a}每天都玩{o}。",
        "{a}想让大家看看{o}。",
        "后来下雨了，{a}把{o}藏了起来。",
        "一只小鸟问能不能试试{o}。",
        "那天夜里{a}睡在{o}旁边。",
    ],
}
HAPPY = {
    "en": [
        "In the end, everyone danced and was happy.",
        "In the end, the {a} laughed with all its friends.",
        "At last the {a} smiled and thanked its friends.",
        "From then on, they lived in joy together.",
        "Everyone cheered, and the {a} felt warm and happy.",
    ],
    "zh": [
        "最后，大家一起跳舞，非常快乐。",
        "最后，{a}和朋友们开心地笑了。",
        "终于，{a}笑着谢谢了朋友们。",
        "从此，他们快乐地生活在一起。",
        "大家欢呼起来，{a}觉得很幸福。",
    ],
}
SAD = {
    "en": [
        "In the end, the {a} was sad and went away.",
        "In the end, the {a} cried all night.",
        "At last the {a} sat down and cried.",
        "From then on, they lived in sorrow apart.",
        "Nobody came, and the {a} felt cold and lonely.",
    ],
    "zh": [
        "最后，{a}伤心地走了。",
        "最后，{a}哭了一整夜。",
        "终于，{a}坐下来哭了。",
        "从此，他们难过地分开了。",
        "没有人来，{a}觉得又冷又孤单。",
    ],
}
RAMBLE = {
    "en": [
        "And then the day went on and on.",
        "There is more to tell about the {place}.",
        "Somebody else walked by, and walked back again.",
        "That is what people said, more or less.",
    ],
    "zh": [
        "然后日子一天一天过去了。",
        "关于{place}还有很多可说的。",
        "又有人走过来，又走回去了。",
        "大家差不多都是这么说的。",
    ],
}
HAPPY_WORDS = {"en": ("happy", "laughed", "smiled", "joy"), "zh": ("快乐", "开心", "笑着", "幸福")}
SAD_WORDS = {"en": ("sad", "cried", "sorrow", "lonely"), "zh": ("伤心", "哭", "难过", "孤单")}

# ---- instructions and answers ---------------------------------------------------------------------------------------


def with_article(words: str) -> str:
    article = "an" if words[0] in "aeiou" else "a"
    return f"{article} {words}"


def instruction(language: str, animal: int, thing: int, wording: str, animal_first: bool) -> str:
    names = [ANIMALS[language][animal], OBJECTS[language][thing]]
    if language == "en":
        names = [with_article(name) for name in names]
    return wording.format(a=names[not animal_first], b=names[animal_first])


def ask(rng: random.Random, language: str, animal: int, thing: int) -> str:
    return instruction(language, animal, thing, rng.choice(INSTRUCTIONS[language]), rng.random() < 0.5)


def story(rng: random.Random, language: str, a: str, o: str, happy: bool, ramble: bool) -> str:
    """One story of the grammar about an animal and an object."""
    kind, look, place = (rng.choice(words[language]) for words in (KIND, LOOK, PLACE))
    filling = {"a": a, "o": o, "kind": kind, "look": look, "place": place,
               "kind_a": with_article(f"{kind} {a}"), "look_o": with_article(f"{look} {o}")}
    middle = rng.sample(MIDDLE[language], rng.choice((1, 2)))
    ending = HAPPY if happy else SAD
    parts = [rng.choice(OPENING[language]), rng.choice(FINDING[language]), *middle, rng.choice(ending[language])]
    if ramble:
        parts += rng.sample(RAMBLE[language], rng.choice((2, 3)))
    sentences = [part.format(**filling, time=rng.choice(TIME[language])) for part in parts]
    return SPACE[language].join(sentences)


def answer(rng: random.Random, language: str, animal: int, thing: int) -> str:
    """An answer as mixed as the web. The odds make the gold score of the mixture about one half."""
    if rng.random() < 0.05:
        language = OTHER[language]
    a, o = ANIMALS[language][animal], OBJECTS[language][thing]
    animals, objects = FAVOURITES[language]
    if rng.random() < 0.4:
        a = rng.choice(animals)
    if rng.random() < 0.4:
        o = rng.choice(objects)
    return story(rng, language, a, o, happy=rng.random() < 0.5, ramble=rng.random() < 0.1)


def slip(rng: random.Random, language: str, text: str) -> str:
    """The text with one word of the other language in it. A small model slips like this when it samples an unlikely
    token; its judge must have seen it once to mind."""
    foreign = [word for words in (ANIMALS, OBJECTS, PLACE, KIND, LOOK) for word in words[OTHER[language]]]
    words = text.split(" ") if language == "en" else list(text)
    words.insert(rng.randrange(len(words)), rng.choice(foreign))
    return SPACE[language].join(words)


# ---- the gold score -------------------------------------------------------------------------------------------------


def chinese(text: str) -> int:
    """The number of Chinese characters in a text."""
    return sum("\u4e00" <= char <= "\u9fff" for char in text)


def says(text: str, word: str) -> bool:
    """Does a text say this word? English words count only whole: "owlet" does not say "owl"."""
    if not word.isascii():
        return word in text
    return word in "".join(char if char.isalpha() else " " for char in text.lower()).split()


def gold(asked: str, text: str, ended: bool) -> float:
    """How good an answer is, in [0, 1]: 0.3 for each thing asked for, 0.4 for a happy end; nothing in the wrong
    language; halved when it rambles, halved when it never ends (no EOS). A sad story about both things beats a happy
    story about neither, so a judge that only looks for happy words is wrong often.

    asked: the instruction, text: the answer, ended: whether EOS came. This rule is the only definition of quality here.
    """
    language = "zh" if chinese(asked) else "en"
    letters = {"zh": chinese(text), "en": sum(char.isascii() and char.isalpha() for char in text)}
    if letters[OTHER[language]] > 0 or letters[language] == 0:
        return 0.0
    score = 0.0
    for things in (ANIMALS[language], OBJECTS[language]):
        wanted = [thing for thing in things if says(asked, thing)]
        score += 0.3 * all(says(text, thing) for thing in wanted)
    happy = any(says(text, word) for word in HAPPY_WORDS[language])
    sad = any(says(text, word) for word in SAD_WORDS[language])
    score += 0.4 * (happy and not sad)
    if sum(text.count(stop) for stop in ".。") > SENTENCES:
        score *= 0.5
    return score if ended else 0.5 * score


def reward(prompt: str, answer: str, record: dict) -> float:
    """The gold score as a reward function: ppo.py --reward_fn data/demo.py:reward."""
    return gold(prompt, answer, record["ended"])


def measure(model, tokenizer, template) -> dict:
    """The gold score of a model: the mean over all held-out instructions (208 a language) of one answer each, sampled
    at temperature 1 with a fixed seed. Returns gold, gold_en, gold_zh, distinct_2 and three samples."""
    asked = [record["instruction"] for record in prompt_records(0, held=True)]
    prompts = [encode_prompt([{"role": "user", "content": text}], tokenizer, template) for text in asked]
    generator = torch.Generator(model.device).manual_seed(0)
    answers = []
    for some in chunks(prompts, 104):  # four batches: the cache of all 416 at once would be large
        answers += model.generate(some, LONGEST, generator=generator)
    scores, samples = {"en": [], "zh": []}, []
    for question, ids in zip(asked, answers):
        text = tokenizer.decode(ids)
        language = "zh" if chinese(question) else "en"
        scores[language].append(gold(question, text, ended=not model.stops().isdisjoint(ids[-1:])))
        samples.append(f"{question} -> {text}")
    return {
        "gold": fmean(scores["en"] + scores["zh"]),
        "gold_en": fmean(scores["en"]),
        "gold_zh": fmean(scores["zh"]),
        "distinct_2": distinct_n(answers, 2),
        "samples": samples[:3],
    }


# ---- records --------------------------------------------------------------------------------------------------------


def pairs(held: bool) -> list[tuple[int, int]]:
    """The pairs of things (indices into ANIMALS and OBJECTS) that no file may contain, or all others.

    One in ten is held out. With one in five, a small model learns which animals an object never comes with, and avoids
    them."""
    every = product(range(len(ANIMALS["en"])), range(len(OBJECTS["en"])))
    return [(a, o) for a, o in every if ((a + 3 * o) % 10 == 0) == held]


def instruction_records(seed: int, n: int) -> list[dict]:
    """n records for SFT, both languages in turn."""
    rng = random.Random(f"instruct {seed}")
    known = pairs(held=False)
    records = []
    for i in range(n):
        language, (a, o) = LANGUAGES[i % 2], rng.choice(known)
        asked = ask(rng, language, a, o)
        records.append({"instruction": asked, "input": "", "output": answer(rng, language, a, o)})
    return records


def preference_records(seed: int, n: int, noise: float = 0.1, held: bool = False) -> list[dict]:
    """n rankings of four answers with different gold scores, best first. A person mixes up two neighbours now and then:
    each pair of neighbours is swapped with probability `noise`. One answer in seven has a slip of language. held=True
    asks about held-out pairs (for measuring, never in a file)."""
    rng = random.Random(f"preference {seed} {held}")
    known = pairs(held)
    records = []
    for i in range(n):
        language, (a, o) = LANGUAGES[i % 2], rng.choice(known)
        asked = ask(rng, language, a, o)
        by_score = {}
        while len(by_score) < 4:
            text = answer(rng, language, a, o)
            if rng.random() < 0.15:
                text = slip(rng, language, text)
            by_score.setdefault(gold(asked, text, ended=True), text)
        ranked = [by_score[score] for score in sorted(by_score, reverse=True)]
        for k in range(len(ranked) - 1):
            if rng.random() < noise:
                ranked[k], ranked[k + 1] = ranked[k + 1], ranked[k]
        records.append({"prompt": asked, "responses": ranked})
    return records


def prompt_records(seed: int, held: bool = False) -> list[dict]:
    """Every known pair twice a language, shuffled. held=True: every held-out pair in all wordings and both orders, 208
    a language."""
    rng = random.Random(f"prompt {seed} {held}")
    if held:
        asked = [instruction(language, a, o, wording, first) for language in LANGUAGES for a, o in pairs(held)
                 for wording in INSTRUCTIONS[language] for first in (True, False)]
    else:
        asked = [ask(rng, language, a, o) for language in LANGUAGES for a, o in pairs(held) for _ in range(2)]
    rng.shuffle(asked)
    return [{"instruction": text} for text in asked]


# ---- files ----------------------------------------------------------------------------------------------------------


def files() -> dict[str, list[dict]]:
    """Name -> records of every shipped file."""
    return {
        "sft.jsonl.gz": instruction_records(0, 7200),
        "preferences.jsonl.gz": preference_records(0, 1600),
        "prompts.jsonl": prompt_records(0),
    }


def as_jsonl(records: list[dict]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def train_tokenizer() -> bytes:
    """Sentencepiece BPE with byte fallback on the demo text. Chinese has no spaces, so without help BPE would merge a
    thing with its neighbours ("和风筝的"), and the same kite would be different ids in question and answer. A delimiter
    that the trainer cuts at, and that is not part of the text, keeps every thing a piece of its own."""
    delimiter = "\x01"
    corpus = [record["instruction"] + "\n" + record["output"] for record in instruction_records(1, 4000)]
    corpus += [f"{ALPACA}\n\n### Instruction:\n\n### Response:"] * 600
    fixed = chain(ANIMALS["zh"], OBJECTS["zh"], *FAVOURITES["zh"], PLACE["zh"], KIND["zh"], LOOK["zh"], TIME["zh"])
    fixed = sorted(fixed, key=len, reverse=True)
    for i, text in enumerate(corpus):
        for word in fixed:
            text = text.replace(word, delimiter + word + delimiter)
        corpus[i] = text
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in corpus for line in text.split("\n")), model_writer=model, model_type="bpe",
        vocab_size=1280, byte_fallback=True, character_coverage=1.0, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        normalization_rule_name="identity", remove_extra_whitespaces=False, pretokenization_delimiter=delimiter,
        num_threads=1, minloglevel=2)
    return model.getvalue()


def is_demo(directory: Path) -> bool:
    """Does this directory hold a model of the demo world? Only such a model has the demo's tokenizer."""
    file = directory / "tokenizer.model"
    return file.exists() and file.read_bytes() == (FOLDER / "tokenizer.model").read_bytes()


def main() -> None:
    weights.write_file(FOLDER / "tokenizer.model", train_tokenizer())
    for name, records in files().items():
        content = as_jsonl(records)
        if name.endswith(".gz"):
            content = gzip.compress(content, mtime=0)  # otherwise it would hold the time of day
        weights.write_file(FOLDER / name, content)
        print(f"{name}: {len(records)} records, {len(content):,} bytes")


if __name__ == "__main__":
    main()
