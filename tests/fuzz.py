"""Feeds damaged files, odd flags and odd HTTP requests to every reader: python tests/fuzz.py [--seed N]

    --requests 10000    to a server over real connections
    --files 2000        records, weights, configs, indices, tokenizers, adapters, checkpoints, each a valid one damaged
    --flags 1000        command lines of all scripts, a tenth of which also run

A case is drawn by the seed and its number alone, so `--only file-17` tries one again. It may be accepted, and then must
be what it says (see `check_...` below), or refused: by one sentence that names the file, as run.command prints it, or
by a status from 400 to 499 in OpenAI's form. Anything else is a fault: another exception, a crash, 20 seconds, 4 GB.
tests/test_fuzz.py runs a small part of this.
"""

import argparse
import copy
import inspect
import json
import math
import os
import random
import re
import resource
import shutil
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import lora  # noqa: E402
import model  # noqa: E402
import ppo  # noqa: E402
import quantize  # noqa: E402
import rm  # noqa: E402
import serve  # noqa: E402
import sft  # noqa: E402
import zero  # noqa: E402
from conftest import FORKS  # noqa: E402
from data import demo, records, run, text, weights  # noqa: E402
from model import Llama, LlamaConfig  # noqa: E402

SIZES = dict(dim=16, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=8, ffn_dim=24, vocab_size=1280, max_seq_len=160)
Draw = random.Random

# ---- damage ---------------------------------------------------------------------------------------------------------

DEEP = "[" * 100_000 + "]" * 100_000
ODD = [None, True, False, -1, 0, 1, 2, 7, 10**6, 2**31, 2**63, -2**63, 10**30, 0.5, -0.0, 1e-320, 1e308, math.nan,
       math.inf, "", "x", "nan", "null", "1", "a\0b", "\ud83d", "\u2028", "x" * 5000, "../x", "/etc/passwd", [], {},
       [None], [[]], [0] * 3000, ["a", 1], {"a": 1}, {"": None}]


def damage_bytes(data: bytes, draw: Draw) -> bytes:
    """One of: bits flipped, a part cut out, doubled, zeroed or replaced; another encoding; nothing left; junk."""
    at, size = draw.randrange(len(data) + 1), draw.choice([1, 2, 8, 100, 5000])
    part = data[at:at + size]
    changed = bytearray(data)
    for place in draw.choices(range(len(data)), k=draw.choice([1, 1, 4, 30])) if data else ():
        changed[min(place, draw.choice([len(data), 200]) - 1)] ^= 1 << draw.randrange(8)
    before, after = data[:at], data[at + size:]
    return draw.choice([
        bytes(changed), bytes(changed), before, after, before + after, before + part + data[at:],
        before + bytes(len(part)) + after, before + draw.randbytes(len(part)) + after, b"", b"null", data * 2,
        data.decode("latin-1").encode("utf-16"), b"\xef\xbb\xbf" + data, data + draw.randbytes(size)])


def places(value: object) -> Iterator[tuple[dict | list, object]]:
    """Every (container, key) within a JSON value."""
    for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(inner, dict | list):
            yield from places(inner)


def damage_json(value: dict | list, draw: Draw) -> str:
    """A JSON text with one to three of its values removed, doubled, exchanged, renamed or replaced by an odd one."""
    value = json.loads(json.dumps(value))
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        found = list(places(value))
        container, key = draw.choice(found) if found else ([value], 0)
        how = draw.randrange(7)
        if how == 0:
            del container[key]
        elif how == 1 and isinstance(container, list):
            container.insert(draw.randrange(len(container)), container[key])
        elif how == 1:
            container[draw.choice(["", "extra", "Messages", str(key).upper()])] = container.pop(key)
        elif how == 2:
            other, its = draw.choice(found or [([None], 0)])
            container[key] = json.loads(json.dumps(other[its]))
        else:
            container[key] = copy.deepcopy(draw.choice([*ODD, "DEEP"]))
    said = json.dumps(value).replace('"DEEP"', DEEP)
    if draw.random() < 0.1 and said.startswith("{"):    # a key twice
        key = draw.choice(re.findall(r'"(\w+)":', said) or ["a"])
        said = json.dumps({key: draw.choice(ODD)})[:-1] + ", " + said[1:]
    return said


def damage(file: Path, draw: Draw) -> None:
    """Damages a file in place; JSON as often by its values as by its bytes."""
    data, how = file.read_bytes(), draw.random()
    file.unlink()
    if how < 0.03:
        file.mkdir()
    elif how < 0.05:
        file.symlink_to(file.name)
    elif how > 0.4 and file.suffix == ".json":
        file.write_bytes(damage_json(json.loads(data), draw).encode("utf-8", "surrogatepass"))
    elif how > 0.4 and file.suffix == ".jsonl":
        lines = data.splitlines()
        at = draw.randrange(len(lines))
        lines[at] = damage_json(json.loads(lines[at]), draw).encode("utf-8", "surrogatepass")
        file.write_bytes(b"\n".join(lines))
    elif how > 0.5 and file.suffix == ".safetensors":
        end = 8 + int.from_bytes(data[:8], "little")
        head = damage_json(json.loads(data[8:end]), draw).encode("utf-8", "surrogatepass")
        file.write_bytes(len(head).to_bytes(8, "little") + head + data[end:])
    elif how > 0.1:
        file.write_bytes(damage_bytes(data, draw))
    # else it is missing


# ---- files: valid ones, and what opens them -------------------------------------------------------------------------

WORDS = "a fox 🦊 and 狐狸, <|im_end|>\n"
LOOP = "--batch_size 2 --accumulation_steps 1 --max_steps 2 --save_interval 1 --eval_size 1 --max_len 60"
TRAIN = f"{LOOP} --pretrain ../hf --dataset ../records/sft.json"


def make_inputs(folder: str) -> None:
    """Writes the valid files into a folder."""
    os.chdir(folder)
    torch.set_num_threads(1)
    draw = lambda: torch.Generator().manual_seed(0)
    llama = Llama(LlamaConfig(**SIZES), generator=draw())
    for name in ("hf", "bin", "sharded", "meta", "reward", "int4", "int8"):
        llama.save_pretrained(name)
        text.Tokenizer(demo.FOLDER).save(name, "alpaca")
    tensors = dict(llama.named_parameters())
    weights.write_model("sharded", vars(llama.config), tensors, shard_bytes=40_000)
    torch.save({weights.hf_name(name): p.data for name, p in tensors.items()}, "bin/pytorch_model.bin")
    torch.save({name: p.data for name, p in tensors.items()}, "meta/consolidated.00.pth")
    weights.write_json("meta/params.json", dict(dim=16, n_layers=1, n_heads=2, vocab_size=-1, norm_eps=1e-5))
    for file in ("bin/model.safetensors", "meta/model.safetensors", "meta/config.json"):
        os.remove(file)
    rm.RewardModel(Llama(LlamaConfig(**SIZES), head=False, generator=draw()), draw()).save_pretrained("reward")
    for bits in (4, 8):
        rounded = Llama.from_pretrained("hf")
        quantize.quantize_model(rounded, quantize.Scheme("rtn", bits, 8 if bits == 4 else -1, sym=bits == 8))
        quantize.save(rounded, f"int{bits}")
    lora.attach(llama, 2)
    lora.save_adapter(llama, "adapter", str(Path("hf").resolve()))
    text.main(["train", str(demo.FOLDER / "prompts.jsonl"), "bpe", "--vocab_size", "300"])
    text.Tokenizer("bpe").save("bpe", "chatml")
    Path("bpe/chat_template.jinja").write_text(weights.read_json("bpe/tokenizer_config.json")["chat_template"])
    Path("records").mkdir()
    for name, found in RECORDS.items():
        lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in found)
        Path("records", name).write_text(lines if name.endswith("jsonl") else json.dumps(found), "utf-8")
    Path("in").mkdir()
    os.chdir("in")
    sft.main(f"{TRAIN} --save_path ../run".split())


RECORDS = {
    "sft.json": [*demo.instruction_records(5, 8), {"instruction": "Say", "context": "so", "response": "So."}],
    "sft.jsonl": [{"text": "Once."}, {"prompt": "Hi", "completion": " Hello."}, {"messages": [
        {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hm."}]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}],
    "preference.jsonl": [{"prompt": "Hi", "chosen": "Hello.", "rejected": "No."},
                         {"prompt": "Hi", "responses": ["A", "B", "C"]},
                         {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes.", "rejected": "\n\nHuman: Hi\n\nAssistant: No."}],
    "prompt.json": [{"prompt": "Write."}, {"instruction": "Write.", "input": "fox"}, {"messages": [
        {"role": "user", "content": "Hi"}]}],
}


def check_records(folder: Path, file: str) -> None:
    """Every text of a record must stand in the file, and its turns in order."""
    kind = file.partition(".")[0]
    data = (folder / file).read_bytes() if (folder / file).is_file() else b""
    for record in records.read_records([folder / file], kind, say=print):
        turns = record.get("messages", [])
        said = [turn["content"] for turn in turns] + record.get("responses", []) + [record.get("text", "")]
        plain = data.decode().encode("utf-8").decode("unicode_escape", "replace") + data.decode()
        assert all(part.strip().split("\n")[0][:20] in plain or not part.isascii() for part in said), said
        speakers = [turn["role"] for turn in turns if turn["role"] != "system"]
        assert speakers == (["user", "assistant"] * len(speakers))[:len(speakers)]
        assert kind != "sft" or "text" in record or speakers[-1] == "assistant"
        assert kind == "sft" or speakers[-1] == "user" and len(record.get("responses", "ab")) > 1


def check_model(folder: Path, file: str) -> None:
    """The config must be the file's, and the model must compute."""
    served = serve.open_served(serve.parse([str(folder)]))
    config = served.model.config
    if (folder / "config.json").is_file():
        asked = json.loads((folder / "config.json").read_text("utf-8"))
        for field, key in weights.KEYS.items():
            if asked.get(key) is not None and field not in ("dtype", "bos_id", "eos_id", "rope_theta", "max_seq_len"):
                assert getattr(config, field) == asked[key], (key, asked[key])
    assert config.bos_id == served.tokenizer.bos_id     # the tokenizer knows best
    tokens = torch.tensor([[1, 5, 9][:config.max_seq_len]])
    assert served.model(tokens).shape == (*tokens.shape, config.vocab_size)
    check_text(served.tokenizer)


def check_reward(folder: Path, file: str) -> None:
    model = rm.RewardModel.from_pretrained(folder)
    assert model(torch.tensor([[1, 5, 9]]), torch.ones(1, 3, dtype=torch.bool)).shape == (1,)


def check_tokenizer(folder: Path, file: str) -> None:
    tokenizer = text.Tokenizer(folder)
    name = text.choose_template(folder, None, "alpaca", print)
    check_text(tokenizer)
    text.answer_end(tokenizer, text.TEMPLATES[name])
    tokenizer.save(folder / "saved", name)
    again = text.Tokenizer(folder / "saved")
    assert again.encode(WORDS) == tokenizer.encode(WORDS) and text.read_template(folder / "saved") == name


def check_text(tokenizer: text.Tokenizer) -> None:
    for special in (True, False):
        ids = tokenizer.encode(WORDS, eos=True, special=special)
        assert all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids), ids
        assert isinstance(tokenizer.decode(ids), str)


def check_resume(folder: Path, file: str) -> None:
    os.chdir(folder)
    try:
        summary = sft.main(f"{TRAIN} --save_path . --resume".split())
    finally:
        os.chdir("..")
    assert summary["steps"] == 2


MODEL_FILES = ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.model"]
KINDS: list[tuple[str, list[str], Callable[[Path, str], None]]] = [
    ("records", list(RECORDS), check_records),
    ("hf", [*MODEL_FILES, "model.safetensors"], check_model),
    ("bin", ["pytorch_model.bin"], check_model),
    ("sharded", ["model.safetensors.index.json", "model-00002-of-00003.safetensors"], check_model),
    ("meta", ["params.json", "consolidated.00.pth"], check_model),
    ("int4", ["config.json", "model.safetensors"], check_model),
    ("int8", ["config.json", "model.safetensors"], check_model),
    ("adapter", ["adapter_config.json", "adapter_model.safetensors"], check_model),
    ("reward", ["config.json", "model.safetensors"], check_reward),
    ("bpe", ["tokenizer.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"], check_tokenizer),
    ("run", ["resume/step-00000002/rank-0.pt", "metrics.jsonl"], check_resume),
]


def try_file(draw: Draw, number: int) -> str:
    """Damages a file and opens its directory. Returns "accepted" or "refused"; raises what is a fault."""
    kind, files, check = KINDS[number % len(KINDS)]
    file, folder = draw.choice(files), Path(f"case-{number}")
    shutil.copytree(kind, folder)
    damage(folder / file, draw)
    try:
        return outcome(lambda: check(folder, file), folder, *Path(file).parts)
    finally:
        shutil.rmtree(folder)


def outcome(call: Callable[[], object], *names: object) -> str:
    """Calls, and checks the sentence of a refusal: one line, with one of the names in it if there are any."""
    try:
        call()
        return "accepted"
    except (ValueError, OSError, FloatingPointError) as error:
        said = run.sentence(error)
        assert said and "\n" not in said and (not names or any(str(name) in said for name in names)), said
        return "refused"


# ---- command lines --------------------------------------------------------------------------------------------------

ODD_WORDS = ["", "-", "--", "-1", "0", "1", "2", "00", "1e-320", "1e308", "1e999", "nan", "-inf", "0x10", "1_0",
             "\uff11", "1.5", "9" * 400, "auto", "none", "True", "a" * 5000, "../hf", "nowhere", "/dev/null",
             "caf\u00e9", "\udcff", "a\nb", "a b", "*"]
SCRIPTS = {
    "sft": (sft, TRAIN),
    "rm": (rm, f"{LOOP} --pretrain ../hf --dataset ../records/preference.jsonl"),
    "ppo": (ppo, "--pretrain ../hf --rm_path ../reward --prompt_dataset ../records/prompt.json --pretrain_dataset "
                 "../records/sft.json --max_input_len 60 --max_seq_len 64 --num_episodes 1 --max_timesteps 1 "
                 "--update_timesteps 1 --max_epochs 1 --experience_batch_size 2 --train_batch_size 2 --eval_size 1"),
    "quantize": (quantize, "../hf --bits 4 --method rtn --group_size 8 --text ../records/sft.json --save_path out"),
    "serve": (serve, "../hf --say Hi"),
    "model": (model, "../hf Hi --max_new_tokens 2"),
    "zero": (zero, "--plan tiny"),
    "lora": (lora, "merge ../adapter out"),
}
# More of these is only slower.
AMOUNTS = re.compile("episodes|timesteps|epochs|steps|batch_size|group_size|new_tokens|interval|best_of|len$")


def try_flags(draw: Draw, number: int) -> str:
    """Runs a script with one to three odd flags, or with a word of its command line changed."""
    script, line = SCRIPTS[[*SCRIPTS][number % len(SCRIPTS)]]
    source = "".join(map(inspect.getsource, (script, run, sft) if script in (sft, rm, ppo) else (script,)))
    known = [*re.findall(r'"--(\w+)"', source), *(row[0] for row in ppo.FLAGS if script is ppo)]
    usable = sorted({*known} - {"benchmark", "compile", "help", "trace", "sweep"})
    argv, folder = line.split(), Path(f"flags-{number}")
    for _ in range(draw.choice([0, 1, 1, 1, 2, 3])):
        name = draw.choice(usable)
        words = [word for word in ODD_WORDS if len(word) < 3 or not AMOUNTS.search(name)]
        argv += [f"--{name}", *draw.sample(words, draw.choice([0, 1, 1, 1, 1, 2]))]
    if draw.random() < 0.3:
        argv[draw.randrange(len(argv))] = draw.choice([word for word in ODD_WORDS if len(word) < 3 or word > "A"])
    folder.mkdir()
    os.chdir(folder)
    try:
        return outcome(lambda: script.main(argv))
    except SystemExit as ended:
        assert ended.code == 0, argv
        return "accepted"
    except BaseException as error:
        error.add_note(f"argv: {argv}")
        raise
    finally:
        os.chdir("..")
        shutil.rmtree(folder)


# ---- HTTP -----------------------------------------------------------------------------------------------------------

BODIES = [
    ("/v1/completions", {"prompt": "a fox", "max_tokens": 3, "temperature": 0.5, "n": 2, "stop": ["x"], "seed": 1}),
    ("/v1/completions", {"prompt": [[1, 5], [1, 9, 7]], "max_tokens": 2, "logprobs": 2, "top_p": 0.5, "user": "me"}),
    ("/v1/chat/completions", {"max_tokens": 3, "messages": [{"role": "system", "content": "Be kind."}, {
        "role": "user", "content": [{"type": "text", "text": "Hi"}]}], "logprobs": True, "top_logprobs": 2,
        "frequency_penalty": -1}),
    ("/v1/chat/completions", {"max_completion_tokens": 2, "messages": [{"role": "user", "content": "Hi"}],
                              "stream": True, "stream_options": {"include_usage": True}, "presence_penalty": 1}),
]
NUMBERS = {"temperature": (0, 2), "top_p": (0, 1), "presence_penalty": (-2, 2), "frequency_penalty": (-2, 2),
           "n": (1, 2**31), "max_tokens": (1, 2**31), "max_completion_tokens": (1, 2**31), "top_logprobs": (0, 20)}


def start_server() -> serve.Server:
    served = serve.open_served(serve.parse(["hf"]))
    args = serve.parse(["hf", "--http_port", "0", "--benchmark", "--runs", "."])    # --benchmark logs no requests
    server = serve.Server(serve.Engine(served, 4, 64), args)
    for target in (server.engine.run, server.serve_forever):
        threading.Thread(target=target, daemon=True).start()
    return server


def try_request(draw: Draw, server: serve.Server) -> str:
    """Sends one request: a body whose values are damaged, or its bytes, or the bytes of the whole request."""
    (path, body), how = draw.choice(BODIES), draw.random()
    content = damage_json(body, draw).encode("utf-8", "surrogatepass") if how < 0.8 else json.dumps(body).encode()
    content = damage_bytes(content, draw) if 0.6 < how < 0.85 else content
    # With "close" the server answers a client that has closed its sending half.
    head = (f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\n\r\n")
    if how > 0.97:
        pages = ["/", "/health", "/metrics", "/runs", "/v1/models", "/..", "/%00", "//x", "*"]
        verb, page = draw.choice(["GET", "HEAD", "PUT", "X"]), draw.choice(pages)
        head, content = f"{verb} {page} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", b""
    sent = head.encode() + content
    sent = damage_bytes(sent, draw) if how > 0.85 else sent
    with socket.create_connection(server.server_address, timeout=20) as connection:
        try:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        except ConnectionError:     # the server left first
            answer = b""
    if how > 0.85 and not (answer and b" HTTP/" in sent.partition(b"\n")[0]):  # a part of one, or HTTP/0.9
        return "refused"
    status = re.match(rb"HTTP/1\.1 (\d{3}) ", answer)
    assert status, (sent[:300], answer[:300])
    status, said = int(status[1]), answer.partition(b"\r\n\r\n")[2]
    if status < 400:
        if how < 0.85:
            check_answer(json.loads(content), said)
        return "accepted"
    assert status in range(400, 500) or status in (501, 505), (sent[:500], answer[:500])
    if how < 0.85:
        assert {*json.loads(said)["error"]} == {"message", "type", "param", "code"}, said
    return "refused"


def check_answer(body: dict, said: bytes) -> None:
    """A request that was answered asks for what there is, and has it."""
    known = {*serve.COMPLETION, *serve.CHAT}
    strange = {key: value for key, value in body.items() if key not in known and value is not None}
    assert all(value in serve.NEUTRAL.get(key, []) for key, value in strange.items()), body
    for key, (low, high) in NUMBERS.items():
        value = body.get(key)
        assert value is None or type(value) in (int, float) and low <= value <= high, body
    if body.get("stream"):
        assert said.endswith(b"data: [DONE]\n\n") and b'"error"' not in said, said
        return
    answer = json.loads(said)
    several = isinstance(body.get("prompt"), list) and not isinstance(body["prompt"][0], int)
    prompts = len(body["prompt"]) if several else 1
    assert [choice["index"] for choice in answer["choices"]] == list(range(prompts * (body.get("n") or 1))), said
    stops = body.get("stop") or []
    for choice in answer["choices"]:
        words = choice["text"] if "text" in choice else choice["message"]["content"]
        assert not any(stop in words for stop in ([stops] if isinstance(stops, str) else stops)), said
        assert choice["finish_reason"] in ("stop", "length")
    limit = body.get("max_completion_tokens") or body.get("max_tokens") or 160
    assert answer["usage"]["completion_tokens"] <= limit * len(answer["choices"])


# ---- processes that try ---------------------------------------------------------------------------------------------

GIGABYTES, SECONDS = 4, 20


def work(folder: str, what: str, seed: int, numbers: list[int], pipe: Connection) -> None:
    """Tries cases in a process of its own, and sends how each ended."""
    os.chdir(folder)
    for number in (1, 2):
        os.dup2(os.open("log", os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    resource.setrlimit(resource.RLIMIT_AS, (GIGABYTES * 2**30, -1))
    torch.set_num_threads(1)
    server = start_server() if what == "request" else None

    def end_of(number: int) -> str:
        draw = Draw(f"{seed} {what} {number}")
        try:
            return try_request(draw, server) if server else {"file": try_file, "flags": try_flags}[what](draw, number)
        except BaseException as error:
            frames = traceback.extract_tb((error.__context__ or error).__traceback__)
            ours = [frame for frame in frames if frame.filename.startswith(str(ROOT))]
            notes = " ".join(getattr(error, "__notes__", []))
            return f"{type(error).__name__}: {error} at {ours[-1].filename}:{ours[-1].lineno} {notes}"

    with ThreadPoolExecutor(4) as clients:
        for end in clients.map(end_of, numbers) if server else map(end_of, numbers):
            pipe.send(end)
    if server and "Traceback" in Path("log").read_text("utf-8", "replace"):
        pipe.send(Path("log").read_text("utf-8", "replace"))


def try_all(folder: str, what: str, seed: int, numbers: list[int]) -> Iterator[tuple[str, str]]:
    """Yields each case's name, and "accepted", "refused", or what is wrong, were it the end of its process."""
    done = 0
    while done < len(numbers):
        reader, writer = FORKS.Pipe(duplex=False)
        process = FORKS.Process(target=work, args=(folder, what, seed, numbers[done:], writer))
        process.start()
        writer.close()
        end = ""
        while done < len(numbers) and not end.startswith("ended"):
            end = f"ended by us: more than {SECONDS} seconds"
            if reader.poll(SECONDS + 10 * (what == "request")):
                try:
                    end = reader.recv()
                except EOFError:
                    process.join()
                    end = f"ended its process with {process.exitcode}"
            yield f"{what}-{numbers[done]}", end
            done += 1
        if reader.poll(5) and not end.startswith("ended"):
            with suppress(EOFError):
                yield f"{what}s", reader.recv()
        process.kill()
        process.join()


def fuzz(seed: int, cases: dict[str, list[int]]) -> tuple[Counter, dict[str, str]]:
    """Tries cases; returns how many ended how, and what is wrong with those that are faults."""
    ends, faults = Counter(), {}
    with tempfile.TemporaryDirectory() as folder:
        maker = FORKS.Process(target=make_inputs, args=(folder,))
        maker.start()
        maker.join()
        for what, numbers in cases.items():
            for name, end in try_all(folder, what, seed, numbers):
                ends[what, end if end in ("accepted", "refused") else "faults"] += 1
                if end not in ("accepted", "refused"):
                    faults[name] = end
                    print(f"{name}: {end[-1500:]}", flush=True)
    return ends, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of the cases (drawn)")
    for what, count in (("file", 2000), ("flags", 1000), ("request", 10000)):
        parser.add_argument(f"--{what.rstrip('s')}s", type=int, default=count, help="cases", dest=what)
    parser.add_argument("--only", help="one case: file-17, flags-3, request-20")
    args = parser.parse_args()
    cases = {what: list(range(getattr(args, what))) for what in ("file", "flags", "request")}
    if args.only:
        what, _, number = args.only.partition("-")
        cases = {what: [int(number)]}
    print(f"seed {args.seed}", flush=True)
    os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"   # for the processes
    began = time.monotonic()
    ends, faults = fuzz(args.seed, cases)
    print(f"\nseed {args.seed}, {time.monotonic() - began:.0f} s\nkind        tried  accepted  refused  faults")
    for what, numbers in cases.items():
        accepted, refused, wrong = (ends[what, end] for end in ("accepted", "refused", "faults"))
        print(f"{what:<10}{len(numbers):>7}{accepted:>10}{refused:>9}{wrong:>8}")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
