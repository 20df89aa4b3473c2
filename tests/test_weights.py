"""data/weights.py: six layouts are one model, what is written reads back, no damaged or foreign file gets through."""

import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from data import weights
from data.text import Tokenizer
from data.weights import Stored, read_config, read_tensors, read_json, write_file, write_json, write_model
from model import Block, Llama, LlamaConfig, rope_table

ROOT = Path(__file__).parents[1]
STORIES = ROOT.parent / "shared" / "real" / "stories260K"
DEMO = ROOT / "data" / "demo"
needs_real = pytest.mark.skipif(not STORIES.exists(), reason=f"needs the real weights in {STORIES}")
SIZES = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=44, vocab_size=64, max_seq_len=64)
UP, EMBEDDING = "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"
TOKENS = torch.arange(64)[None] * 7 % 64


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny(seed: int = 0, **sizes) -> Llama:
    """Random, with norms that are not 1."""
    model = Llama(LlamaConfig(**SIZES | sizes), generator=seeded(seed)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2.5) if p.dim() == 2 else p.add_(torch.randn(p.shape, generator=seeded(seed)), alpha=0.2)
            p.data = p.to(weights.DTYPES[model.config.dtype])
    return model


@torch.no_grad()
def logits(model: Llama, tokens: Tensor = TOKENS) -> Tensor:
    return model(tokens)[0]


def same(a: Llama, b: Llama) -> bool:
    """The same parameters, to the bit."""
    pairs = zip(a.named_parameters(), b.named_parameters(), strict=True)
    return all(n == m and torch.equal(p, q) and p.dtype == q.dtype for (n, p), (m, q) in pairs)


def saved(directory: Path, **sizes) -> Path:
    tiny(**sizes).save_pretrained(directory)
    return directory


def flip(name: str):
    """An edit of one number in the tensor of this name."""
    return lambda tensors: tensors[name].view(-1)[-1].neg_()


def rewrite(directory: Path, edit) -> Path:
    """Let `edit` change the tensors, by name, of a directory that holds one safetensors file."""
    tensors = safetensors.torch.load_file(directory / "model.safetensors")
    edit(tensors)
    safetensors.torch.save_file(tensors, directory / "model.safetensors")
    return directory


def configure(directory: Path, drop: tuple[str, ...] = (), **keys) -> Path:
    config = json.loads((directory / "config.json").read_text()) | keys
    kept = {key: value for key, value in config.items() if key not in drop}
    (directory / "config.json").write_text(json.dumps(kept))
    return directory


def write_meta(model: Llama, directory: Path, parts: int = 1, pairs: bool = True) -> Path:
    """Meta's layout, row by row: neighbouring rows of a head are a pair, matrices are cut into `parts`."""
    c, D = model.config, model.config.head_dim
    whole = {}
    for name, p in model.named_parameters():
        whole[name] = p.detach().clone()
        if pairs and name.endswith(("wq.weight", "wk.weight")):
            for row in range(len(p)):
                head, i = divmod(row, D)
                whole[name][head * D + (2 * i if i < D // 2 else 2 * i - D + 1)] = p.detach()[row]
    directory.mkdir(parents=True)
    params = {name: getattr(c, name) for name in ("dim", "n_layers", "n_heads", "norm_eps", "max_seq_len")}
    (directory / "params.json").write_text(json.dumps(params | {"vocab_size": -1}))
    for n in range(parts):
        cut = {}
        for name, p in whole.items():
            columns = name.endswith(("wo.weight", "w2.weight", "tok_embeddings.weight"))
            cut[name] = p if p.dim() == 1 else p.chunk(parts, 1 if columns else 0)[n].clone()
        torch.save(cut | {"rope.freqs": torch.zeros(D // 2)}, directory / f"consolidated.{n:02d}.pth")
    return directory


def refusal(directory: Path) -> str:
    """The one sentence with which a directory is refused."""
    with pytest.raises((ValueError, OSError)) as error:
        Llama.from_pretrained(directory)
    said = str(error.value)
    assert type(error.value) in (ValueError, FileNotFoundError) and str(directory) in said and "\n" not in said, said
    return said


@pytest.mark.parametrize("keys, edit, is_same", [
    ({"eos_token_id": 5, "seen": 1}, None, True), ({}, flip("lm_head.weight"), True),
    ({}, flip(UP), False), ({}, lambda tensors: tensors.update({UP: tensors[UP].bfloat16()}), False),
    ({"rms_norm_eps": 0.1}, None, False), ({"rope_theta": 9.0, "rope_parameters": None}, None, False)])
def test_the_same_weights_are_those_that_compute_the_same(tmp_path, keys, edit, is_same):
    a, b = saved(tmp_path / "a"), configure(saved(tmp_path / "b"), **keys)
    if edit:
        rewrite(b, edit)
    assert weights.same(a, a) and weights.same(a, b) == is_same


# ---- names and rows -------------------------------------------------------------------------------------------------

@pytest.mark.lesson
@pytest.mark.parametrize("ours, theirs", [
    ("tok_embeddings.weight", "model.embed_tokens.weight"),
    ("norm.weight", "model.norm.weight"),
    ("output.weight", "lm_head.weight"),
    ("score.weight", "score.weight"),
    ("layers.0.attention.wq", "model.layers.0.self_attn.q_proj"),
    ("layers.3.feed_forward.w1.weight", "model.layers.3.mlp.gate_proj.weight"),
    ("layers.3.feed_forward.w2.qweight", "model.layers.3.mlp.down_proj.qweight"),
    ("layers.11.feed_forward.w3.weight", "model.layers.11.mlp.up_proj.weight"),
    ("layers.1.attention_norm.weight", "model.layers.1.input_layernorm.weight"),
    ("layers.1.ffn_norm.weight", "model.layers.1.post_attention_layernorm.weight"),
])
def test_names_there_and_back(ours, theirs):
    assert weights.hf_name(ours) == theirs and weights.our_name(theirs) == ours


@pytest.mark.lesson
def test_rows_of_one_head_as_in_the_picture():
    rows = torch.arange(8.0)[:, None].expand(8, 3)                                  # D = 8, C = 3
    assert weights.join("layers.0.attention.wq.weight", [rows], 8)[:, 0].tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert torch.equal(weights.join("layers.0.attention.wv.weight", [rows], 8), rows)


def test_parts_of_any_number_are_one_model(tmp_path):
    grouped = tiny()  # two key heads, one a part
    assert same(Llama.from_pretrained(write_meta(grouped, tmp_path / "grouped", 2)), grouped)
    for name, sizes in ("own", {}), ("tied", dict(tie_embeddings=True)):
        model, at = tiny(n_kv_heads=4, **sizes), tmp_path / name
        for parts in (1, 2, 4):
            assert same(Llama.from_pretrained(write_meta(model, at / f"{parts}", parts)), model)
        assert same(Llama.from_pretrained(write_meta(Llama.from_pretrained(at / "4"), at / "4to2", 2)), model)
        wrong = logits(Llama.from_pretrained(write_meta(model, at / "wrong", pairs=False)))
        assert (wrong - logits(model))[20].abs().max() > 1e-2  # without the other order of rows this test fails


# ---- real weights ---------------------------------------------------------------------------------------------------

@needs_real
@pytest.mark.parametrize("layout", ["hf", "hf-sharded", "hf-bin", "meta", "meta-mp2"])
def test_layouts_of_the_same_weights_are_equal(layout):
    model, first = Llama.from_pretrained(STORIES / layout), Llama.from_pretrained(STORIES / "hf")
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in first.named_parameters())
    assert torch.equal(model.output.weight, first.output.weight)  # which Meta's files have apart
    reference = np.load(STORIES / "reference.npz")
    for i in range(4):
        found = logits(model, torch.from_numpy(reference[f"ids_{i}"]).long()[None]).numpy()
        np.testing.assert_allclose(found, reference[f"logits_{i}"], atol=1e-4)


@needs_real
@pytest.mark.parametrize("layout", ["hf", "hf-sharded", "hf-bin", "meta", "meta-mp2", "llama2c"])
def test_damaged_directories_end_in_one_sentence(layout, tmp_path):
    """Each file of each layout cut, emptied, gone or renamed: a sentence, or the right text where it is not needed."""
    names = sorted(file.name for file in (STORIES / layout).iterdir())
    of_weights = [name for name in names if not name.startswith("tokenizer") and not name.endswith(".json")]
    for name, damage in itertools.product(names, ("cut", "emptied", "gone", "renamed", "of another name")):
        directory = tmp_path / f"{name} {damage}"
        directory.mkdir()
        for other in names:  # not copytree, which copies the modes of a folder that is read-only
            shutil.copyfile(STORIES / layout / other, directory / other)
        file = directory / name
        if damage in ("cut", "emptied"):
            file.write_bytes(file.read_bytes()[:file.stat().st_size // 2 if damage == "cut" else 0])
        elif damage == "gone":
            file.unlink()
        else:
            file.rename(directory / (f"{name}.old" if damage == "renamed" else f"other{file.suffix}"))
        if name == "tokenizer_config.json":
            ids = Tokenizer(directory).encode("Once")
            answer = Llama.from_pretrained(directory).generate([ids], 6, temperature=0)[0]
            assert Tokenizer(directory).decode(ids + answer) == "Once upon a time, there was"
            continue
        with pytest.raises((ValueError, OSError)) as error:
            Tokenizer(directory)
            Llama.from_pretrained(directory)
        said = str(error.value)
        assert type(error.value) in (ValueError, FileNotFoundError) and "\n" not in said
        assert (name if name == "tokenizer.model" else str(directory)) in said
        assert re.search(r"copy|get the|looked for|put the", said), said  # what to do
        if damage in ("cut", "emptied") and (name in of_weights or layout != "llama2c"):
            assert str(file) in said  # the one to copy again
        shutil.rmtree(directory)


# ---- what is written reads back -------------------------------------------------------------------------------------

@pytest.mark.parametrize("sizes", [
    {}, dict(tie_embeddings=True), dict(eos_id=(2, 7, 9)), dict(bos_id=None, eos_id=None),
    dict(rope_scaling=(8.0, 1.0, 4.0, 32)),
    dict(head_dim=6, rope_theta=5e5, rope_scaling=(2.0,), norm_eps=1e-3, bos_id=5, eos_id=7),
    dict(extra={"reward_mean": 0.5, "pad_token_id": 9}),
])
def test_saved_and_reloaded_is_before(sizes, tmp_path):
    model = tiny(**sizes)
    model.save_pretrained(tmp_path)
    again = Llama.from_pretrained(tmp_path)
    assert same(model, again) and again.config == model.config and torch.equal(logits(model), logits(again))
    assert (again.output.weight is again.tok_embeddings.weight) == model.config.tie_embeddings


def test_config_is_written_in_both_spellings():
    fields = vars(LlamaConfig(**SIZES, rope_theta=5e5, rope_scaling=(4.0,), dtype="bfloat16", eos_id=(2, 7)))
    config = weights.hf_config(fields, "LlamaForCausalLM")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5e5
    assert config["rope_scaling"]["type"] == config["rope_parameters"]["rope_type"] == "linear"
    assert config["rope_scaling"]["factor"] == config["rope_parameters"]["factor"] == 4.0
    assert config["dtype"] == config["torch_dtype"] == "bfloat16" and json.dumps(config["eos_token_id"]) == "[2, 7]"
    plain = weights.hf_config(fields | {"rope_scaling": ()}, "LlamaForCausalLM")
    assert plain["rope_scaling"] is None and plain["rope_parameters"] == {"rope_type": "default", "rope_theta": 5e5}


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_the_file_keeps_its_dtype(name, tmp_path):
    dtype, model = weights.DTYPES[name], tiny(dtype=name)
    model.save_pretrained(tmp_path / "a")
    assert Llama.from_pretrained(tmp_path / "a").norm.weight.dtype == dtype
    Llama.from_pretrained(tmp_path / "a", torch.float32).save_pretrained(tmp_path / "b")
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    configure(tmp_path / "c", drop=("dtype", "torch_dtype"))  # only the tensors tell
    for directory in (tmp_path / "a", tmp_path / "b", tmp_path / "c"):
        assert same(Llama.from_pretrained(directory), model) and read_config(directory)["dtype"] == name
    assert read_config(write_meta(model, tmp_path / "meta"))["dtype"] == name
    assert same(Llama.from_pretrained(tmp_path / "meta"), model)
    configure(tmp_path / "a", dtype="float64")  # is read, and written as float32
    assert read_config(tmp_path / "a")["dtype"] == "float32"


def test_shards_index_and_leftovers(tmp_path):
    model = tiny()
    tensors = dict(model.named_parameters())
    (tmp_path / "model-of-mine.safetensors").touch()
    for shard_bytes in (20_000, 30_000, 10**9, 1):
        write_model(tmp_path, vars(model.config), tensors, shard_bytes=shard_bytes)
        assert same(Llama.from_pretrained(tmp_path), model)
        files = {file.name for file in tmp_path.glob("model*")}
        files -= {"model-of-mine.safetensors", "model.safetensors.index.json"}
        if shard_bytes == 10**9:
            assert files == {"model.safetensors"} and not (tmp_path / "model.safetensors.index.json").exists()
            continue
        assert files == {f"model-{n + 1:05d}-of-{len(files):05d}.safetensors" for n in range(len(files))}
        assert len(files) >= 3
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(4 * p.numel() for p in tensors.values())
        assert index["weight_map"].keys() == {weights.hf_name(name) for name in tensors}
        sizes = []
        for file in sorted(files):
            held = safetensors.torch.load_file(tmp_path / file)
            assert held.keys() == {name for name, named in index["weight_map"].items() if named == file}
            sizes.append(sum(4 * p.numel() for p in held.values()))
            assert len(held) == 1 or sizes[-1] <= shard_bytes
        assert all(a + b > shard_bytes for a, b in zip(sizes, sizes[1:]))  # none is begun before the last is full
    assert (tmp_path / "model-of-mine.safetensors").exists()
    stale = tmp_path / "model-00001-of-00099.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(1)}, stale)
    assert "1 unexpected (model-00001-of-00099.safetensors): copy" in refusal(tmp_path)
    stale.unlink()
    shutil.move(tmp_path / "model-00001-of-00021.safetensors", stale)
    said = refusal(tmp_path)
    assert "1 missing (model-00001-of-00021.safetensors), 1 unexpected (model-00001-of-00099.safetensors): copy" in said


def test_stored_tensors_are_written_shard_by_shard(tmp_path):
    """From file to file, cast on the way but where the bits count; only one shard is read at a time."""
    model, alive = tiny(), []
    model.save_pretrained(tmp_path / "a")

    def watched(stored: Stored) -> Stored:
        def read() -> Tensor:
            tensor = stored.read().clone()
            alive.append(weakref.ref(tensor))
            assert sum(ref().nbytes for ref in alive if ref() is not None) <= 20_000
            return tensor
        return stored._replace(read=read)

    fields, tensors = read_config(tmp_path / "a"), read_tensors(tmp_path / "a")
    codes = torch.arange(5, dtype=torch.int32)
    given = {name: watched(stored) for name, stored in tensors.items()} | {"codes": codes}
    write_model(tmp_path / "b", fields | {"dtype": "bfloat16"}, given, more={"note": 1}, exact=["codes", "norm.weight"],
                shard_bytes=20_000)
    assert len(alive) == len(tensors) and json.loads((tmp_path / "b" / "config.json").read_text())["note"] == 1
    for name, stored in read_tensors(tmp_path / "b").items():
        before = codes if name == "codes" else tensors[name].read()
        exact = name in ("codes", "norm.weight")
        assert stored.shape == before.shape and stored.dtype == (before.dtype if exact else torch.bfloat16)
        assert torch.equal(stored.read(), before if exact else before.bfloat16())


def test_a_model_with_adapters_is_not_saved_as_plain(tmp_path):
    with pytest.raises(ValueError, match="merge and fold"):
        write_model(tmp_path, vars(tiny().config), {"norm.lora_A": torch.zeros(1)})


def test_file_modes_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        Tokenizer(DEMO).save(saved(tmp_path / "m"))
        write_file(tmp_path / "m" / "state.pt", lambda path: torch.save({}, path))
    finally:
        os.umask(before)
    assert {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "m").iterdir()} == dict.fromkeys(
        ("config.json", "generation_config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json",
         "state.pt"), 0o640)


WRITE = """
import resource, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from data.weights import write_file
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
x = torch.zeros(100_000)
file = Path(sys.argv[1])
write_file(file, b"before")
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for content in (bytes(400_000), lambda path: torch.save({"x": x}, path), lambda path: save_file({"x": x}, path)):
    try:
        write_file(file, content)
    except OSError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of a file as Unix does")
def test_a_full_disk_is_one_sentence_and_leaves_the_old_file(tmp_path):
    """torch.save fails with a RuntimeError and leaves its half file, safetensors with an error of its own."""
    file = tmp_path / "new" / "x"
    done = subprocess.run([sys.executable, "-c", WRITE, str(file)], cwd=ROOT, capture_output=True, text=True)
    said = done.stdout.splitlines()
    assert len(said) == 3 and not done.stderr, done.stderr
    assert all(line.startswith(f"{file} cannot be written: make room or name another directory (") for line in said)
    assert [*file.parent.iterdir()] == [file] and file.read_bytes() == b"before"


def test_a_file_in_the_place_of_a_directory_is_one_sentence(tmp_path):
    (tmp_path / "x").touch()
    with pytest.raises(OSError, match=r"x/y cannot be written: make room or name another directory \("):
        write_file(tmp_path / "x" / "y", b"")
    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "z", interrupt)
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_adding_to_a_file_on_a_full_disk_is_the_same_sentence():
    """The rows of metrics.jsonl are added one by one."""
    with pytest.raises(OSError, match=r"^/dev/full cannot be written: make room or name another directory \(No space"):
        weights.append_line(Path("/dev/full"), "{}")


def test_half_a_character_is_written_as_json_escapes_it(tmp_path):
    """A broken tokenizer_config.json has one, or a file name that is no UTF-8, which is a flag in summary.json."""
    value = {"狐狸": "a\ud83d", "\udcff": "🦊"}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value and '"狐狸": "a\\ud83d"' in (tmp_path / "x.json").read_text("utf-8")


def interrupt(path: Path) -> None:
    path.write_bytes(b"half")
    raise KeyboardInterrupt


# ---- memory ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("layout", ["hf", "bin", "meta"])
def test_what_is_read_is_not_the_file(layout, tmp_path):
    """A parameter that is a view of the mapped file would change under whoever reads the file next."""
    saved(tmp_path / "hf")
    write_meta(tiny(), tmp_path / "meta")
    shutil.copytree(tmp_path / "hf", tmp_path / "bin")
    tensors = safetensors.torch.load_file(tmp_path / "hf" / "model.safetensors")
    torch.save(tensors, tmp_path / "bin" / "pytorch_model.bin")
    (tmp_path / "bin" / "model.safetensors").unlink()
    tensors = read_tensors(tmp_path / layout, read_config(tmp_path / layout))
    for name, p in tiny().named_parameters():
        tensors[name].read().zero_()
        assert torch.equal(tensors[name].read(), p)


@pytest.mark.parametrize("layout", ["hf", "meta"])
def test_loading_holds_one_tensor_at_a_time(layout, tmp_path, monkeypatch):
    model, alive, read = tiny(), [], weights.read_tensors
    model.save_pretrained(tmp_path / "hf")
    write_meta(model, tmp_path / "meta", 2)

    def watched(stored: Stored) -> Stored:
        def call() -> Tensor:
            tensor = stored.read()
            assert sum(ref() is not None for ref in alive) <= 1
            alive.append(weakref.ref(tensor))
            return tensor
        return stored._replace(read=call)

    def all_watched(*args) -> dict[str, Stored]:
        return {name: watched(stored) for name, stored in read(*args).items()}
    monkeypatch.setattr("data.weights.read_tensors", all_watched)
    monkeypatch.setattr("model.read_tensors", all_watched, raising=False)
    assert same(Llama.from_pretrained(tmp_path / layout), model) and len(alive) == 21


WATCHED_LOAD = """
import os, sys, threading
import torch
from data.weights import DTYPES
from model import Llama

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon:")) * 1024

torch.cat([torch.empty(1, device="meta")])  # the first time, PyTorch imports 70 MB of Python for it
for directory, dtype in zip(sys.argv[1::2], sys.argv[2::2]):
    if os.fork() == 0:  # a process for each: what one load leaves behind would hide the peak of the next
        start, seen, done = anonymous(), [], threading.Event()
        def watch():
            while not done.wait(0.0005):
                seen.append(anonymous())
        thread = threading.Thread(target=watch)
        thread.start()
        model = Llama.from_pretrained(directory, DTYPES[dtype])
        seen.append(anonymous())  # a busy machine may not have let the other thread look
        done.set()
        thread.join()
        print(max(seen) - start, sum(p.nbytes for p in model.parameters()), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts anonymous memory in /proc")
def test_loading_holds_one_copy(tmp_path):
    """The promise is a peak of 1.15 N + 300 MB over the start, for a model of N bytes in memory. 300 MB would hide a
    second copy of one this small (160 MB), so it gets 20: the largest matrix is 4. Matrices this small come from
    malloc's heap, with its holes: each one that lives shorter than the parameters around it leaves one."""
    model = Llama(LlamaConfig(dim=512, n_layers=12, n_heads=8, n_kv_heads=8, head_dim=64, ffn_dim=1408, vocab_size=2048,
                              max_seq_len=64))
    tensors = {weights.hf_name(name): p.detach() for name, p in model.named_parameters()}
    model.save_pretrained(tmp_path / "safetensors")
    model.config.dtype = "bfloat16"
    model.save_pretrained(tmp_path / "cast")
    model.config.dtype = "float32"
    (tmp_path / "bin").mkdir()
    shutil.copyfile(tmp_path / "safetensors" / "config.json", tmp_path / "bin" / "config.json")
    torch.save(tensors, tmp_path / "bin" / "pytorch_model.bin")
    write_meta(model, tmp_path / "meta", 2)
    layouts = ("safetensors", "cast", "bin", "meta")
    try:
        words = [word for name in layouts for word in (str(tmp_path / name), "fp32")]
        out = subprocess.run([sys.executable, "-c", WATCHED_LOAD, *words], cwd=ROOT, capture_output=True, text=True,
                             check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}).stdout
    finally:
        for name in layouts:  # pytest keeps the folders of three runs
            shutil.rmtree(tmp_path / name)
    for name, line in zip(layouts, out.splitlines(), strict=True):
        peak, held = map(int, line.split())
        assert held == sum(p.nbytes for p in model.parameters()) > 140e6, name
        assert 0.9 * held < peak < 1.15 * held + 20e6, f"{name}: {peak / 1e6:.0f} MB for {held / 1e6:.0f}"


# ---- configs --------------------------------------------------------------------------------------------------------

LLAMA = dict(model_type="llama", hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
             num_attention_heads=32, vocab_size=32000, max_position_embeddings=2048, rms_norm_eps=1e-6,
             hidden_act="silu", tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0,
             torch_dtype="float16", initializer_range=0.02, use_cache=True)
LLAMA2 = LLAMA | dict(max_position_embeddings=4096, rms_norm_eps=1e-5, pretraining_tp=1, rope_scaling=None,
                      architectures=["LlamaForCausalLM"])
CODE = LLAMA2 | dict(vocab_size=32016, max_position_embeddings=16384, torch_dtype="bfloat16", num_key_value_heads=32,
                     rope_theta=1000000)
LLAMA3 = LLAMA2 | dict(vocab_size=128256, torch_dtype="bfloat16", rope_theta=500000.0, attention_bias=False,
                       attention_dropout=0.0, mlp_bias=False, bos_token_id=128000, eos_token_id=128001,
                       max_position_embeddings=131072)
SMOL = LLAMA2 | dict(vocab_size=49152, torch_dtype="bfloat16", rope_theta=100000, max_position_embeddings=8192,
                     tie_word_embeddings=True, is_llama_config=True, rope_interleaved=False, pad_token_id=2,
                     initializer_range=0.04, attention_bias=False, attention_dropout=0.0, mlp_bias=False)
MISTRAL = LLAMA2 | dict(model_type="mistral", max_position_embeddings=32768, torch_dtype="bfloat16")
PLAIN = LlamaConfig(dim=4096, n_layers=32, n_heads=32, n_kv_heads=32, head_dim=128, ffn_dim=11008, vocab_size=32000,
                    max_seq_len=2048, norm_eps=1e-6, dtype="float16")
AS_SAVED_BY_TRANSFORMERS_5 = dict(rope_theta=None, torch_dtype=None, dtype="bfloat16", rope_scaling=None,
                                  rope_parameters={"rope_theta": 1000000.0, "rope_type": "default"})


def sizes_of(dim: int, ffn: int, layers: int, heads: int, kv_heads: int | None = None) -> tuple[dict, dict]:
    """The same five numbers in Hugging Face's words and in ours."""
    theirs = dict(hidden_size=dim, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads)
    ours = dict(dim=dim, ffn_dim=ffn, n_layers=layers, n_heads=heads, n_kv_heads=kv_heads or heads)
    return theirs | ({"num_key_value_heads": kv_heads} if kv_heads else {}), ours | dict(head_dim=dim // heads)


LLAMA_7B, LLAMA2_7B = sizes_of(4096, 11008, 32, 32), sizes_of(4096, 11008, 32, 32, 32)
SECOND = dict(norm_eps=1e-5, max_seq_len=4096)
THIRD = dict(norm_eps=1e-5, max_seq_len=131072, rope_theta=5e5, dtype="bfloat16", vocab_size=128256, bos_id=128000,
             eos_id=128001)
SMALL = dict(norm_eps=1e-5, max_seq_len=8192, rope_theta=1e5, dtype="bfloat16", vocab_size=49152, tie_embeddings=True)
INSTRUCT = [128001, 128008, 128009]


def banded(factor: float) -> dict:
    return dict(rope_scaling={"factor": factor, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                              "original_max_position_embeddings": 8192, "rope_type": "llama3"})


CODER = dict(norm_eps=1e-5, max_seq_len=16384, rope_theta=1e6, dtype="bfloat16")


@pytest.mark.parametrize("base, sizes, theirs, ours", [
    pytest.param(LLAMA, LLAMA_7B, {}, {}, id="LLaMA 7B"),
    pytest.param(LLAMA, sizes_of(5120, 13824, 40, 40), {}, {}, id="LLaMA 13B"),
    pytest.param(LLAMA, sizes_of(6656, 17920, 60, 52), {}, {}, id="LLaMA 33B"),
    pytest.param(LLAMA, sizes_of(8192, 22016, 80, 64), dict(rms_norm_eps=1e-5), dict(norm_eps=1e-5), id="LLaMA 65B"),
    pytest.param(LLAMA2, LLAMA2_7B, {}, SECOND, id="Llama 2 7B"),
    pytest.param(LLAMA2, sizes_of(5120, 13824, 40, 40, 40), {}, SECOND, id="Llama 2 13B"),
    pytest.param(LLAMA2, sizes_of(8192, 28672, 80, 64, 8), {}, SECOND, id="Llama 2 70B"),
    pytest.param(CODE, LLAMA2_7B, {}, CODER | dict(vocab_size=32016), id="CodeLlama 7B"),
    pytest.param(CODE, LLAMA2_7B, AS_SAVED_BY_TRANSFORMERS_5, CODER | dict(vocab_size=32016), id="CodeLlama 7B again"),
    pytest.param(CODE, sizes_of(8192, 22016, 48, 64, 8), dict(vocab_size=32000), CODER, id="CodeLlama 34B"),
    pytest.param(LLAMA2, sizes_of(2048, 5632, 22, 32, 4),
                 dict(max_position_embeddings=2048, torch_dtype="float32", rope_theta=10000.0),
                 dict(norm_eps=1e-5, dtype="float32"), id="TinyLlama"),
    pytest.param(LLAMA, LLAMA_7B, dict(max_sequence_length=2048), {}, id="Vicuna 1.3"),
    pytest.param(LLAMA2, LLAMA2_7B, {}, SECOND, id="Vicuna 1.5"),
    pytest.param(LLAMA2, LLAMA2_7B, dict(rope_scaling={"factor": 4.0, "type": "linear"}),
                 SECOND | dict(rope_scaling=(4.0,)), id="Vicuna 1.5 16k"),
    pytest.param(LLAMA, LLAMA_7B, dict(vocab_size=32001, torch_dtype="float32"),
                 dict(vocab_size=32001, dtype="float32"), id="Alpaca"),
    pytest.param(LLAMA, sizes_of(3200, 8640, 26, 32), {}, {}, id="OpenLLaMA 3B"),
    pytest.param(MISTRAL, sizes_of(4096, 14336, 32, 32, 8), dict(sliding_window=4096, rope_theta=10000.0),
                 SECOND | dict(dtype="bfloat16"), id="Mistral 0.1"),
    pytest.param(MISTRAL, sizes_of(4096, 14336, 32, 32, 8), dict(sliding_window=None, rope_theta=1e6),
                 dict(norm_eps=1e-5, max_seq_len=32768, rope_theta=1e6, dtype="bfloat16"), id="Mistral 0.2"),
    pytest.param(LLAMA2, sizes_of(4096, 11008, 32, 32, 4),
                 dict(vocab_size=64000, rope_theta=5000000.0, torch_dtype="bfloat16"),
                 SECOND | dict(vocab_size=64000, rope_theta=5e6, dtype="bfloat16"), id="Yi 6B"),
    pytest.param(LLAMA3, sizes_of(4096, 14336, 32, 32, 8), dict(max_position_embeddings=8192),
                 THIRD | dict(max_seq_len=8192), id="Llama 3 8B"),
    pytest.param(LLAMA3, sizes_of(4096, 14336, 32, 32, 8), banded(8.0) | dict(eos_token_id=INSTRUCT),
                 THIRD | dict(rope_scaling=(8.0, 1.0, 4.0, 8192), eos_id=tuple(INSTRUCT)), id="Llama 3.1 8B Instruct"),
    pytest.param(LLAMA3, sizes_of(2048, 8192, 16, 32, 8), banded(32.0) | dict(tie_word_embeddings=True, head_dim=64),
                 THIRD | dict(rope_scaling=(32.0, 1.0, 4.0, 8192), tie_embeddings=True), id="Llama 3.2 1B"),
    pytest.param(LLAMA3, sizes_of(3072, 8192, 28, 24, 8),
                 banded(32.0) | dict(tie_word_embeddings=True, head_dim=128, eos_token_id=INSTRUCT),
                 THIRD | dict(rope_scaling=(32.0, 1.0, 4.0, 8192), tie_embeddings=True, eos_id=tuple(INSTRUCT)),
                 id="Llama 3.2 3B Instruct"),
    pytest.param(SMOL, sizes_of(576, 1536, 30, 9, 3), {"transformers.js_config": {"dtype": "q4"}}, SMALL,
                 id="SmolLM2 135M"),
    pytest.param(SMOL, sizes_of(960, 2560, 32, 15, 5), {}, SMALL, id="SmolLM2 360M"),
    pytest.param(SMOL, sizes_of(2048, 8192, 24, 32, 32), dict(rope_theta=130000), SMALL | dict(rope_theta=1.3e5),
                 id="SmolLM2 1.7B"),
])
def test_published_configs(base, sizes, theirs, ours, tmp_path, capsys):
    dropped = {key for key, value in theirs.items() if value is None and key != "sliding_window"}
    named = {key: value for key, value in (base | sizes[0] | theirs).items() if key not in dropped}
    (tmp_path / "config.json").write_text(json.dumps(named))
    assert LlamaConfig(**read_config(tmp_path)) == replace(PLAIN, **sizes[1] | ours) and not capsys.readouterr().err


FIRST = dict(multiple_of=256, norm_eps=1e-6)
THIRD_PARAMS = dict(multiple_of=1024, ffn_dim_multiplier=1.3, norm_eps=1e-5, rope_theta=500000.0, n_kv_heads=8)
THIRD_IDS = dict(n_kv_heads=8, rope_theta=5e5, bos_id=128000, eos_id=(128001, 128008, 128009))
CODE_PARAMS = dict(multiple_of=256, ffn_dim_multiplier=1.0, norm_eps=1e-5, rope_theta=1000000)


@pytest.mark.parametrize("parts, params, vocab, ffn, ours", [
    pytest.param(1, FIRST | dict(dim=4096, n_heads=32, n_layers=32), 32000, 11008, {}, id="LLaMA 7B"),
    pytest.param(2, FIRST | dict(dim=5120, n_heads=40, n_layers=40), 32000, 13824, {}, id="LLaMA 13B"),
    pytest.param(4, FIRST | dict(dim=6656, n_heads=52, n_layers=60), 32000, 17920, {}, id="LLaMA 33B"),
    pytest.param(8, FIRST | dict(dim=8192, n_heads=64, n_layers=80, norm_eps=1e-5), 32000, 22016, {}, id="LLaMA 65B"),
    pytest.param(8, dict(dim=8192, n_heads=64, n_kv_heads=8, n_layers=80, multiple_of=4096, ffn_dim_multiplier=1.3,
                         norm_eps=1e-5), 32000, 28672, dict(n_kv_heads=8), id="Llama 2 70B"),
    pytest.param(1, CODE_PARAMS | dict(dim=4096, n_heads=32, n_layers=32), 32016, 11008,
                 dict(rope_theta=1e6, max_seq_len=16384), id="CodeLlama 7B"),
    pytest.param(4, CODE_PARAMS | dict(dim=8192, n_heads=64, n_kv_heads=8, n_layers=48), 32000, 22016,
                 dict(n_kv_heads=8, rope_theta=1e6, max_seq_len=16384), id="CodeLlama 34B"),
    pytest.param(1, THIRD_PARAMS | dict(dim=4096, n_heads=32, n_layers=32), 128256, 14336,
                 THIRD_IDS | dict(max_seq_len=8192), id="Llama 3 8B"),
    pytest.param(1, THIRD_PARAMS | dict(dim=4096, n_heads=32, n_layers=32, use_scaled_rope=True, rope_scaling_factor=8),
                 128256, 14336, THIRD_IDS | dict(max_seq_len=131072, rope_scaling=(8, 1, 4, 8192)), id="Llama 3.1 8B"),
])
def test_published_params(parts, params, vocab, ffn, ours, tmp_path):
    dim, heads = params["dim"], params["n_heads"]
    D, multiple = dim // heads, params["multiple_of"]
    width = int(params.get("ffn_dim_multiplier", 1) * int(2 * 4 * dim / 3))
    assert (width + multiple - 1) // multiple * multiple == ffn  # Meta's rule, which the files need not be asked by
    rows = {"attention.wq": (heads * D, dim), "attention.wk": (params.get("n_kv_heads", heads) * D, dim),
            "feed_forward.w1": (ffn, dim)}
    shapes = {f"layers.0.{name}.weight": (height // parts, width) for name, (height, width) in rows.items()}
    shapes |= {"tok_embeddings.weight": (vocab, dim // parts), "output.weight": (vocab // parts, dim)}
    for n in range(parts):  # one number each, spread over the shape
        part = {name: torch.zeros((), dtype=torch.float16).expand(shape) for name, shape in shapes.items()}
        torch.save(part, tmp_path / f"consolidated.{n:02d}.pth")
    (tmp_path / "params.json").write_text(json.dumps(params | {"vocab_size": -1}))
    sizes = dict(dim=dim, n_heads=heads, n_kv_heads=heads, n_layers=params["n_layers"], head_dim=D, ffn_dim=ffn,
                 vocab_size=vocab, norm_eps=params["norm_eps"])
    assert LlamaConfig(**read_config(tmp_path)) == replace(PLAIN, **sizes | ours)


OLD, NEW = ("rope_theta", "rope_scaling"), ("rope_parameters",)
BANDS = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256}


@pytest.mark.parametrize("drop, keys, theta, scaling", [
    (NEW, dict(rope_theta=5e5, rope_scaling=None), 5e5, ()),
    (OLD, dict(rope_parameters={"rope_theta": 5e5, "rope_type": "default"}), 5e5, ()),
    (OLD + NEW, {}, 1e4, ()),
    (NEW, dict(rope_theta=1e4, rope_scaling={"type": "linear", "factor": 4.0}), 1e4, (4.0,)),
    (OLD, dict(rope_parameters={"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0}), 1e4, (4.0,)),
    ((), dict(rope_scaling={"rope_type": "linear", "factor": 4.0}), 1e4, (4.0,)),  # over rope_parameters' "default"
    (NEW, dict(rope_theta=5e5, rope_scaling=BANDS | {"type": "llama3"}), 5e5, (8.0, 1.0, 4.0, 256)),
    (OLD, dict(rope_parameters=BANDS | {"rope_type": "llama3", "rope_theta": 5e5}), 5e5, (8.0, 1.0, 4.0, 256)),
])
def test_spellings_of_rotary_embedding(drop, keys, theta, scaling, tmp_path):
    fields = read_config(configure(saved(tmp_path), drop, max_position_embeddings=1000, **keys))
    assert (fields["rope_theta"], fields["rope_scaling"]) == (theta, scaling)
    angle = 900 * theta ** -(np.arange(0, 8, 2) / 8)
    # Llama 3's pairs have waves of 6, 167, 4443 and 118143 tokens. The second turns 1.532 times in 256.
    angle *= {(): 1, (4.0,): 1 / 4, (8.0, 1.0, 4.0, 256): [1, 1 / 8 + 7 / 8 * 0.177402514, 1 / 8, 1 / 8]}[scaling]
    cos, sin = rope_table(LlamaConfig(**fields))
    expected = np.concatenate((np.cos(angle), np.cos(angle), -np.sin(angle), np.sin(angle)))
    np.testing.assert_allclose(np.concatenate((cos[900], sin[900])), expected, atol=1e-4)


@pytest.mark.parametrize("key, value, field", [
    ("rms_norm_eps", 0.5, "norm_eps"), ("num_key_value_heads", 4, "n_kv_heads"), ("head_dim", 16, "head_dim"),
    ("tie_word_embeddings", True, "tie_embeddings"), ("eos_token_id", [7, 8], "eos_id"),
("bos_token_id", None, "bos_id"), ("max_position_embeddings", 99, "max_seq_len"),
])
def test_each_key_has_its_field(key, value, field, tmp_path):
    before = read_config(saved(tmp_path))
    (tmp_path / "generation_config.json").unlink()
    after = tuple(value) if isinstance(value, list) else value
    assert read_config(configure(tmp_path, **{key: value})) == before | {field: after}


@pytest.mark.parametrize("config, generation, eos_id, written", [
    (2, [2, 7], (2, 7), [2, 7]), ([7, 2], 9, (7, 2, 9), [7, 2, 9]), (2, None, 2, 2), (None, 5, 5, 5), ([4], [4], 4, 4),
    (None, None, None, None), (3, 3, 3, 3),
])
def test_every_eos_of_both_files_ends_an_answer_and_is_saved(config, generation, eos_id, written, tmp_path):
    """Llama 3 Instruct's end of a turn stood in generation_config.json alone, and answers went on after it."""
    configure(saved(tmp_path / "a"), eos_token_id=config)
    (tmp_path / "a" / "generation_config.json").write_text(json.dumps({"eos_token_id": generation, "top_p": 0.9}))
    model = Llama.from_pretrained(tmp_path / "a")
    assert model.config.eos_id == eos_id
    model.save_pretrained(tmp_path / "b")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "b" / name).read_text())["eos_token_id"] == written


@pytest.mark.parametrize("eos", [["x"], [], {"a": 1}, 1.5, "2"])
def test_a_broken_generation_config_is_named(eos, tmp_path):
    (saved(tmp_path) / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    assert re.search("generation_config.json: eos_token_id is|does not describe a LLaMA", refusal(tmp_path))


def test_keys_that_are_not_known_are_named_once(tmp_path, capsys):
    directory = configure(saved(tmp_path), alibi=True, rope_parameters={"ntk_alpha": 2, "rope_theta": 1e4}, flash=False)
    assert read_config(directory) == read_config(directory)
    said = f"note: {directory / 'config.json'} has keys that are not known here, they change nothing (ntk_alpha, alibi)"
    assert capsys.readouterr().err == said + "\n"


def test_defaults_are_those_of_transformers(tmp_path):
    optional = ("head_dim", "rms_norm_eps", "num_key_value_heads", "max_position_embeddings")
    llama = configure(saved(tmp_path), optional)
    mistral = dict(model_type="mistral", num_attention_heads=8)
    for more, expected in (({}, [8, 1e-6, 4, 2048]), (mistral, [4, 1e-6, 8, 4096]),
                           (dict(sliding_window=50), [4, 1e-6, 8, 50]),
                           (dict(sliding_window=None), [4, 1e-6, 8, 131072])):
        fields = read_config(configure(llama, **more))
        assert [fields[name] for name in ("head_dim", "norm_eps", "n_kv_heads", "max_seq_len")] == expected


# ---- refusals -------------------------------------------------------------------------------------------------------

WRONG = (None, "x", [1], {"a": 1}, -1, 0, 1.5, 10**30, math.nan, True)


def is_in(value: object, harmless: tuple) -> bool:
    return any(value is other or value == other and type(value) is type(other) for other in harmless)


@pytest.mark.parametrize("key, harmless", [
    ("hidden_size", ()), ("num_hidden_layers", ()), ("num_attention_heads", ()), ("num_key_value_heads", ()),
    ("intermediate_size", ()), ("vocab_size", ()), ("max_position_embeddings", ()), ("rms_norm_eps", ()),
    ("head_dim", (None,)), ("tie_word_embeddings", ()), ("rope_theta", (None, 1.5, 10**30)),
    ("rope_parameters", (None, 0, {"a": 1})), ("rope_scaling", (None, 0, {"a": 1})), ("model_type", ()),
    ("quantization_config", (None, 0)), ("attention_bias", (None, 0)), ("mlp_bias", (None, 0)), ("hidden_act", (None,)),
    ("sliding_window", (None, 0, 10**30, math.nan)), ("bos_token_id", (None, -1, 0, 10**30)),
    ("eos_token_id", (None, [1], -1, 0, 10**30)), ("reward_mean", (-1, 0, 1.5, 10**30)),
    ("rope_parameters.rope_theta", (None, 1.5, 10**30)), ("rope_parameters.factor", (1.5,)),
    ("rope_parameters.rope_type", ()),
])
def test_config_of_wrong_types_is_refused(key, harmless, tmp_path):
    text, (outer, _, inner) = (saved(tmp_path) / "config.json").read_text(), key.partition(".")
    tokens, expected = TOKENS[:, :9], logits(tiny(), TOKENS[:, :9])
    for value in WRONG:
        (tmp_path / "config.json").write_text(text)
        drop = ("rope_parameters",) if key in ("rope_theta", "rope_scaling") else ()
        nested = {"rope_type": "linear" if inner == "factor" else "default", inner: value}
        configure(tmp_path, drop, **{outer: nested if inner else value})
        if is_in(value, harmless):
            found = logits(Llama.from_pretrained(tmp_path), tokens)
            assert torch.isfinite(found).all()
            assert key.endswith(("rope_theta", "factor")) or torch.equal(found, expected)
        else:
            refusal(tmp_path)


@pytest.mark.parametrize("key, harmless", [
    ("dim", ()), ("n_layers", ()), ("n_heads", ()), ("n_kv_heads", (None, 0)), ("head_dim", (None, 0)),
    ("norm_eps", ()), ("max_seq_len", ()), ("rope_theta", (1.5, 10**30)), ("use_scaled_rope", (None, 0)),
])
def test_params_of_wrong_types_are_refused(key, harmless, tmp_path):
    file = write_meta(tiny(), tmp_path / "m") / "params.json"
    params = json.loads(file.read_text())
    for value in WRONG:
        file.write_text(json.dumps(params | {key: value}))
        if is_in(value, harmless):
            assert key == "rope_theta" or same(Llama.from_pretrained(file.parent), tiny())
        else:
            refusal(file.parent)


@pytest.mark.parametrize("params, words", [
    ({"n_heads": 8, "n_kv_heads": 2}, r"4 missing .*wk.weight \(8, 32\).* 4 unexpected .*wk.weight \(16, 32\)"),
    ({"use_scaled_rope": True}, "not by how much: write .rope_scaling_factor.: 8 into it"),
    ({"n_layers": 3}, "9 missing .layers.2.attention"),
    ({"n_layers": 1}, "9 unexpected .layers.1.attention"),
])
def test_params_that_do_not_fit_the_parts(params, words, tmp_path):
    file = write_meta(tiny(), tmp_path / "m") / "params.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | params))
    assert re.search(words, refusal(file.parent))
    file.write_text("{}")
    assert "lacks 'dim'" in refusal(file.parent)


@pytest.mark.parametrize("name, value", [
    ("n_layers", 1001), ("dim", 2**20 + 1), ("vocab_size", 2**20 + 1), ("max_seq_len", 2**20 + 1)])
def test_sizes_beyond_any_model_are_refused_at_once(name, value):
    """A model of 10^12 layers or positions was begun, and took all time or all memory."""
    with pytest.raises(ValueError, match=f"{name} is {value}, it must be a whole number from 1 to {value - 1:,}"):
        LlamaConfig(**SIZES | {name: value})
    LlamaConfig(**SIZES | {name: value - 1})


@pytest.mark.parametrize("keys, sentence", [
    (dict(model_type="gpt2"), "model_type is 'gpt2', it must be llama or mistral"),
    (dict(model_type="gemma"), "'gemma'"), (dict(model_type="qwen2"), "'qwen2'"), (dict(model_type="Yi"), "'Yi'"),
    (dict(attention_bias=True), "attention_bias is True, .* not supported"), (dict(mlp_bias=True), "mlp_bias is True"),
    (dict(hidden_act="gelu"), "hidden_act is 'gelu', it must be silu"),
    (dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}), "lacks 'low_freq_factor'"),
    (dict(rope_scaling=BANDS | {"type": "llama3", "low_freq_factor": 4}), "low_freq_factor below high_freq_factor"),
    (dict(rope_scaling={"type": "dynamic", "factor": 2.0}), "rope_type is 'dynamic', it must be default or lin"),
    (dict(rope_scaling={"rope_type": "yarn", "factor": 2.0}), "rope_type is 'yarn'"),
    (dict(rope_parameters={"rope_type": "longrope", "rope_theta": 5e5}), "rope_type is 'longrope'"),
    (dict(rope_parameters={"rope_type": "proportional"}), "rope_type is 'proportional'"),
    (dict(rope_parameters={"partial_rotary_factor": 0.5}), "partial_rotary_factor is 0.5, it must be 1"),
    (dict(rope_interleaved=True), "rope_interleaved is T"), (dict(final_logit_softcapping=30.0), "softcapping is 30"),
    (dict(architectures=["LlamaForTokenClassification"]), "architectures is .'LlamaForToken.*must be None or .'Llama"),
    (dict(quantization_config={"quant_method": "gptq"}), "is quantized: open it with quantize"),
])
def test_other_architectures_are_refused_by_name(keys, sentence, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA2 | keys))
    assert re.search(sentence, refusal(tmp_path))


@pytest.mark.parametrize("keys, sentence", [
    (dict(hidden_size=[32], head_dim=None), "does not describe"), (dict(num_key_value_heads=3), "4 query heads cannot"),
    (dict(hidden_size=33), "33"), (dict(eos_token_id=[]), r"eos_token_id is \[\], it"),
    (dict(eos_token_id=["2"]), "eos_token_id is"), (dict(rope_scaling=[4.0]), "does not describe"),
    (dict(head_dim=7), "head_dim 7 is odd"), (dict(num_hidden_layers=3), "9 missing .model.layers.2"),
    (dict(vocab_size=None), "vocab_size is None"),
])
def test_configs_that_describe_no_llama(keys, sentence, tmp_path):
    (saved(tmp_path) / "generation_config.json").unlink()
    assert re.search(sentence, refusal(configure(tmp_path, **keys)))


def test_a_config_that_lacks_a_size(tmp_path):
    assert "config.json lacks 'vocab_size': copy" in refusal(configure(saved(tmp_path), drop=("vocab_size",)))


def test_folders_without_a_model(tmp_path):
    (tmp_path / "empty").mkdir()
    shutil.copytree(DEMO, tmp_path / "tokenizer only")
    for directory in (tmp_path / "missing", tmp_path / "empty", tmp_path / "tokenizer only"):
        said = refusal(directory)
        for word in ("config.json", "model.safetensors", "pytorch_model.bin", "consolidated.*.pth"):
            assert word in said
    (tmp_path / "empty" / "adapter_config.json").touch()
    assert "lora.py merge" in refusal(tmp_path / "empty")
    (saved(tmp_path / "m") / "model.safetensors").rename(tmp_path / "m" / "weights.safetensors")
    assert "under their usual names (weights.safetensors): looked for" in refusal(tmp_path / "m")


def test_a_reward_model_is_no_language_model(tmp_path):
    """With tied embeddings it would open as one, and babble."""
    score = rewrite(saved(tmp_path, tie_embeddings=True), lambda t: t.update({"score.weight": torch.zeros(1, 32)}))
    assert "is a reward model" in refusal(score)
    assert Llama.from_pretrained(score, head=False).output is None


def test_names_and_shapes_must_agree(tmp_path):
    inv_freq = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    fine = rewrite(saved(tmp_path / "a"), lambda t: t.update(inv_freq))
    assert same(Llama.from_pretrained(fine), tiny())
    said = refusal(rewrite(fine, lambda t: t.update({"model.layers.1.mlp.upp.weight": t.pop(UP)})))
    unexpected = "1 unexpected (model.layers.1.mlp.upp.weight (44, 32))"
    assert said.startswith(f"{fine} does not fit its config, 1 missing ({UP} (44, 32)), {unexpected}: get the config")
    said = refusal(rewrite(saved(tmp_path / "b"), lambda t: t.pop("lm_head.weight")))
    assert "1 missing (lm_head.weight (64, 32)), 0 unexpected: get" in said
    said = refusal(rewrite(saved(tmp_path / "b"), lambda t: t.update({EMBEDDING: torch.zeros(63, 32)})))
    assert f"1 missing ({EMBEDDING} (64, 32)), 1 unexpected ({EMBEDDING} (63, 32)): get" in said


def test_a_tied_head_may_be_stored_if_it_is_the_embedding(tmp_path):
    tied = rewrite(saved(tmp_path, tie_embeddings=True), lambda t: t.update({"lm_head.weight": t[EMBEDDING].clone()}))
    redundant = Llama.from_pretrained(tied)
    assert same(redundant, tiny(tie_embeddings=True)) and redundant.output.weight is redundant.tok_embeddings.weight
    assert "head that differs" in refusal(rewrite(tied, lambda t: t["lm_head.weight"].add_(1)))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool, torch.float8_e4m3fn])
def test_codes_are_not_taken_for_weights(dtype, tmp_path):
    """Integers would be read as weights a hundred times too large, and give text."""
    said = refusal(rewrite(saved(tmp_path), lambda t: t.update({UP: t[UP].to(dtype)})))
    assert f"unexpected ({UP} (44, 32) in {dtype}): get" in said and "that is not quantized" in said


def test_shapes_are_compared_before_anything_is_read(tmp_path):
    model = tiny()
    with torch.device("meta"):
        empty = Llama(model.config)
    for change in (dict(shape=(1, 1)), dict(dtype=torch.int8)):
        tensors = read_tensors(saved(tmp_path))
        tensors["norm.weight"] = tensors["norm.weight"]._replace(**change)
        unread = {name: stored._replace(read=lambda: pytest.fail("read")) for name, stored in tensors.items()}
        with pytest.raises(ValueError, match="model.norm.weight"):
            weights.fill(empty, unread, None, "cpu", tmp_path)


MAPS = [{"weight_map": value} for value in (*WRONG, {}, {UP: None}, {UP: 1})]


@pytest.mark.parametrize("content", [*WRONG, {}, *MAPS])
def test_broken_index_is_refused(content, tmp_path):
    write_model(tmp_path, vars(tiny().config), dict(tiny().named_parameters()), shard_bytes=20_000)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps(content))
    said = refusal(tmp_path)
    assert str(index) in said and "copy" in said


@pytest.mark.parametrize("name", ["../other/model.safetensors", "{other}/model.safetensors", "sub/model.safetensors"])
def test_an_index_names_no_file_of_another_directory(name, tmp_path):
    """A downloaded index could make us read, and publish with the model, any file that the user may read."""
    other = saved(tmp_path / "other")
    shutil.copytree(other, tmp_path / "m" / "sub")
    shutil.copyfile(other / "config.json", tmp_path / "m" / "config.json")
    tensors = safetensors.torch.load_file(other / "model.safetensors")
    named = dict.fromkeys(tensors, name.format(other=other))
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": named}))
    assert "to names of files beside it: copy it again" in refusal(tmp_path / "m")


@pytest.mark.parametrize("damage", ["gone", "cut", "emptied"])
def test_broken_shards_are_found_before_anything_is_built(damage, tmp_path, monkeypatch):
    write_model(tmp_path, vars(tiny().config), dict(tiny().named_parameters()), shard_bytes=50_000)
    built = []
    monkeypatch.setattr(Block, "__init__", lambda *_: built.append(1))
    shard = sorted(tmp_path.glob("model-*-of-*.safetensors"))[1]
    if damage == "gone":
        shard.unlink()
    else:
        os.truncate(shard, shard.stat().st_size // 2 if damage == "cut" else 0)
    assert shard.name in refusal(tmp_path) and not built


@pytest.mark.parametrize("content", [
    None, [], torch.zeros(1), {"model": {UP: torch.zeros(1)}}, {1: torch.zeros(1)}, {UP: 1}])
def test_pickles_must_be_named_tensors(content, tmp_path):
    (saved(tmp_path / "a") / "model.safetensors").unlink()
    meta = write_meta(tiny(n_kv_heads=4), tmp_path / "meta", 2)
    for file in (tmp_path / "a" / "pytorch_model.bin", meta / "consolidated.01.pth"):
        torch.save(content, file)
        assert f"{file} is no dictionary of named tensors: get" in refusal(file.parent)


def test_pickles_of_before_the_zip_container_are_read(tmp_path):
    """They were called cut short."""
    tensors = safetensors.torch.load_file(saved(tmp_path) / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert same(Llama.from_pretrained(tmp_path), tiny())


class Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)


def test_pickles_run_no_code(tmp_path, monkeypatch):
    (saved(tmp_path) / "model.safetensors").unlink()
    monkeypatch.chdir(tmp_path)
    torch.save({UP: Attack()}, tmp_path / "pytorch_model.bin")
    assert "pytorch_model.bin" in refusal(tmp_path) and not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("change", [lambda t: t[:1], lambda t: t.to(torch.int8)])
def test_parts_must_be_of_one_checkpoint(change, tmp_path):
    meta = write_meta(tiny(n_kv_heads=4), tmp_path / "meta", 2)
    part = torch.load(meta / "consolidated.00.pth")
    torch.save({name: change(tensor) for name, tensor in part.items()}, meta / "consolidated.01.pth")
    assert "are not parts of one checkpoint" in refusal(meta)
    torch.save({"something": torch.zeros(1)}, meta / "consolidated.01.pth")
    assert "are not parts of one checkpoint" in refusal(meta)


@pytest.mark.parametrize("gone, words", [
    ([3], r"9 missing \(tok_embeddings.weight \(48, 32\).* 9 unexpected \(tok_embeddings.weight \(64, 24\).*: get"),
    ([1, 3], "without a gap, 1 missing .consolidated.01.pth., 1 unexpected .consolidated.02.pth.: copy all"),
    ([0, 1, 2, 3], "1 missing .consolidated.00.pth., 0 unexpected: copy"),
])
def test_missing_parts(gone, words, tmp_path):
    meta = write_meta(tiny(n_kv_heads=4), tmp_path / "meta", 4)
    for n in gone:
        (meta / f"consolidated.{n:02d}.pth").unlink()
    assert re.search(words, refusal(meta))


@pytest.mark.parametrize("text, words", [
    ("{", "is not JSON"), ("[1]", "is not a JSON object"), ("[" * 100_000, "is not JSON"), ("\xff", "is not JSON"),
    ('{"x": ' + "9" * 5000 + "}", "is not JSON"),
])
def test_broken_json_names_its_file(text, words, tmp_path):
    (tmp_path / "x.json").write_text(text, "latin-1")
    with pytest.raises(ValueError, match=f"x.json {words}.*: copy it again"):
        weights.read_json(tmp_path / "x.json")


# ---- directories with more than one model ---------------------------------------------------------------------------


def add_shards(directory: Path, seed: int = 1, index: bool = True, files: bool = True) -> None:
    """Another model's shards, or their index, beside what lies in the directory."""
    write_model(directory / "other", vars(tiny(seed).config), dict(tiny(seed).named_parameters()), shard_bytes=20_000)
    kept = (["*.index.json"] if index else []) + (["model-*"] if files else [])
    for file in [file for pattern in kept for file in (directory / "other").glob(pattern)]:
        file.rename(directory / file.name)
    shutil.rmtree(directory / "other")


def add_pickle(directory: Path) -> None:
    tensors = {weights.hf_name(name): p.data for name, p in tiny(1).named_parameters()}
    torch.save(tensors, directory / "pytorch_model.bin")


@pytest.mark.parametrize("add, named", [
    (add_pickle, "(pytorch_model.bin)"),
    (add_shards, "(model-00001-of-"),
    (lambda path: add_shards(path, index=False), "(model-00001-of-"),
    (lambda path: add_shards(path, files=False), ""),
    (lambda path: write_meta(tiny(1, n_kv_heads=4), path / "m").joinpath("consolidated.00.pth").rename(
        path / "consolidated.00.pth"), "(consolidated.00.pth)"),
    (lambda path: shutil.copy(path / "model.safetensors", path / "stray.safetensors"), "(stray.safetensors)"),
    (lambda path: (path / "training_args.bin").write_bytes(b"no weights"), ""),
    (lambda path: (path / "pytorch_model.bin.index.json").write_text("{}"), ""),
])
def test_a_whole_file_is_read_and_other_files_of_weights_are_named(add, named, tmp_path, capsys):
    """As transformers reads it. A stale index beside it was refused with "copy the missing files"."""
    add(saved(tmp_path))
    assert same(Llama.from_pretrained(tmp_path), tiny())
    note = f"note: {tmp_path} has other files of weights than those that are read {named}"
    said = capsys.readouterr().err
    assert said.startswith(note) and said.count("\n") == 1 if named else said == ""


def test_a_tensor_of_two_shards_is_refused(tmp_path):
    """The later one won, without a word."""
    add_shards(configure(saved(tmp_path / "a")))
    (tmp_path / "a" / "model.safetensors").unlink()
    last = sorted((tmp_path / "a").glob("model-*.safetensors"))[-1]
    tensors = safetensors.torch.load_file(last)
    safetensors.torch.save_file(tensors | {EMBEDDING: torch.zeros(64, 32)}, last)
    assert f"{last} has {EMBEDDING}, which stands there twice or in another file too" in refusal(tmp_path / "a")


def test_names_of_torch_compile_are_read(tmp_path):
    def compiled(tensors):
        for name in list(tensors):
            tensors[name.replace("model.layers.", "model.layers._orig_mod.")] = tensors.pop(name)
    assert same(Llama.from_pretrained(rewrite(saved(tmp_path), compiled)), tiny())


def test_unexpected_tensors_have_the_names_of_their_file(tmp_path):
    """A refusal named tensors that the file did not have."""
    def under(tensors):
        tensors["module." + UP] = tensors.pop(UP)
        tensors["transformer.h.0.attn.weight"] = torch.zeros(2)
    said = refusal(rewrite(saved(tmp_path), under))
    assert f"1 missing ({UP} (44, 32)), 2 unexpected (module.{UP} (44, 32), transformer.h.0.attn.weight (2,))" in said


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_pointer_of_git_lfs_is_named(name, tmp_path):
    """The advice was to copy the file again, which gives the pointer again."""
    (saved(tmp_path) / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert f"{name} is a pointer of git-lfs, not the file itself: run `git lfs pull`" in refusal(tmp_path)


@pytest.mark.parametrize("layout", ["bin", "meta"])
def test_a_tensor_is_no_larger_than_its_file(layout, tmp_path):
    """One number of a pickle, repeated, can fill any memory, however small the file is."""
    large = dict(dim=2**14, n_heads=2**11, n_kv_heads=2**11, n_layers=1)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Llama(LlamaConfig(**SIZES | large)).named_parameters()}
    if layout == "bin":
        configure(saved(tmp_path), hidden_size=2**14, num_attention_heads=2**11, num_key_value_heads=2**11,
                  num_hidden_layers=1)
        (tmp_path / "model.safetensors").unlink()
        name, names = "pytorch_model.bin", {name: weights.hf_name(name) for name in shapes}
    else:
        name, names = "consolidated.00.pth", {name: name for name in shapes}
        params = {"dim": 2**14, "n_layers": 1, "n_heads": 2**11, "norm_eps": 1e-5, "max_seq_len": 64}
        (tmp_path / "params.json").write_text(json.dumps(params))
    torch.save({names[ours]: torch.zeros(1).expand(shape) for ours, shape in shapes.items()}, tmp_path / name)
    assert "has a tensor that is larger than its files" in refusal(tmp_path)
