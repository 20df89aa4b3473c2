"""Model directories: a LLaMA's config and weights in files, read and written one tensor at a time.

    config.json or params.json  <->  fields    keyword arguments of model.LlamaConfig: dim, n_layers, ...
    files of weights            <->  tensors   our name -> Stored(shape, dtype, read); the file is read by read() alone

Two layouts are read. Hugging Face's is config.json with model.safetensors or pytorch_model.bin, whole or in shards with
an index, and generation_config.json, which may name more ids that end an answer. Meta's is params.json with
consolidated.00.pth, 01, ...: every matrix is cut into as many parts as there were GPUs. Hugging Face's layout with
safetensors is written.

Our names are Meta's: tok_embeddings, layers.0.attention.wq, output. Hugging Face's files have other names for the same
matrices, and another order of rows in two of them. Rotary embedding turns pairs of entries of a head. Meta's pairs are
neighbours, (0, 1) (2, 3) ...; Hugging Face's are half a head apart, (0, D/2) (1, D/2 + 1) ..., and so are model.py's.
The rows of wq and wk are permuted where Meta's files are read, here and nowhere else:

    row of one head in Meta's file   0  1  2  3  4  5  6  7        (D = 8; pairs are neighbours)
    row inside                       0  2  4  6  1  3  5  7        (pairs are D/2 = 4 apart)

A directory may hold several of these, an adapter, or quantized weights. What it is, all scripts ask here: weight_files
chooses what is read and names the rest, is_adapter and quantization tell who can open it.

A file may be damaged, foreign or hostile. Sizes in a config must lie in a range. Shapes are compared before a tensor is
read, and no tensor is larger than the files. An index may name files of its own directory only. Pickles are opened with
weights_only=True, which runs no code.

Letters: H heads of wq (or of wk), D head dim, C dim.
"""

import json
import math
import os
import re
import sys
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

DTYPES = {
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
}
LAYOUTS = (
    "config.json with model.safetensors, model.safetensors.index.json, pytorch_model.bin or "
    "pytorch_model.bin.index.json (Hugging Face), or params.json with consolidated.*.pth (Meta)"
)


# ---- names ----------------------------------------------------------------------------------------------------------

HF_NAMES = {
    "tok_embeddings": "embed_tokens",
    "attention": "self_attn",
    "wq": "q_proj",
    "wk": "k_proj",
    "wv": "v_proj",
    "wo": "o_proj",
    "feed_forward": "mlp",
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "output": "lm_head",
}
OUR_NAMES = {theirs: ours for ours, theirs in HF_NAMES.items()}
# Buffers in old files. They follow from the config and are not read.
DERIVED = re.compile(r"(rotary_emb\.inv_freq|rope\.freqs)$")


def hf_name(name: str) -> str:
    """Returns Hugging Face's name: layers.0.attention.wq -> model.layers.0.self_attn.q_proj."""
    theirs = ".".join(HF_NAMES.get(part, part) for part in name.split("."))
    return theirs if theirs.startswith(("lm_head", "score")) else f"model.{theirs}"


def our_name(name: str) -> str:
    """The inverse of hf_name. torch.compile puts _orig_mod before the names of what it compiled."""
    theirs = name.replace("_orig_mod.", "").removeprefix("model.")
    return ".".join(OUR_NAMES.get(part, part) for part in theirs.split("."))


def compare(found: Collection[str], wanted: Collection[str], fault: str, advice: str) -> None:
    """Raises ValueError unless both hold the same items, in any order."""
    missing = [item for item in wanted if item not in found]
    unexpected = [item for item in found if item not in wanted]
    if missing or unexpected:
        raise ValueError(f"{fault}, {len(missing)} missing{listed(missing)}, "
                         f"{len(unexpected)} unexpected{listed(unexpected)}: {advice}")


def listed(items: list[str]) -> str:
    """Returns the first five items in brackets, for a message."""
    return f" ({', '.join(items[:5] + ['...'] * (len(items) > 5))})" if items else ""


# ---- reading --------------------------------------------------------------------------------------------------------

class Stored(NamedTuple):
    """A tensor in a file. read() returns a copy: changing it does not change the mapped file."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    name: str = ""      # in the file


def read_tensors(directory: str | Path, fields: dict | None = None) -> dict[str, Stored]:
    """Returns the tensors of a model directory by our names. Meta's need fields["head_dim"] to reorder wq and wk."""
    directory = Path(directory)
    if not (directory / "config.json").exists():
        tensors = join_parts(directory, fields["head_dim"])
    else:
        tensors = join_files(directory)
    room = sum(file.stat().st_size for file in glob(directory, ANY))
    if any(math.prod(stored.shape) * stored.dtype.itemsize > room for stored in tensors.values()):
        raise ValueError(f"{directory} has a tensor that is larger than its files, a pickle that repeats one number: "
                         "get them from their maker")
    return tensors


def join_files(directory: Path) -> dict[str, Stored]:
    """Returns the tensors of all of Hugging Face's files by our names."""
    tensors = {}
    for file in weight_files(directory):
        for name, stored in open_tensors(file).items():
            if our_name(name) in tensors:
                raise ValueError(f"{file} has {name}, which stands there twice or in another file too: copy the files "
                                 "of one saving")
            tensors[our_name(name)] = stored
    return tensors


def open_tensors(file: Path) -> dict[str, Stored]:
    """Returns the tensors of one file by the names in it."""
    return {name: Stored(tuple(t.shape), t.dtype, t.clone, name) for name, t in load(file).items()}


def load(file: Path) -> dict[str, Tensor]:
    """Returns the tensors of a .safetensors file or pickle. They are mapped: the file is read where they are used.

    A pickle of before PyTorch 1.6 is read at once."""
    with file.open("rb") as start:
        refuse_pointer(start.read(100), file)
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        tensors = torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
    except Exception as error:  # the errors of zip, pickle and safetensors share no base class
        reason = str(error).partition("\n")[0][:120]
        raise ValueError(f"{file} is cut short or no file of weights: copy it again ({reason})") from None
    named = isinstance(tensors, dict) and all(isinstance(name, str) for name in tensors)
    if not named or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{file} is no dictionary of named tensors: get the file with the weights alone")
    return tensors


# What is looked for, in the order of transformers: a file of weights, or the index of several. One name is AutoGPTQ's.
FIRST = ("model.safetensors", "model.safetensors.index.json", "gptq_model-*.safetensors", "pytorch_model.bin",
         "pytorch_model.bin.index.json")
ANY = ("*.safetensors", "pytorch_model*.bin", "consolidated.*.pth")


def weight_files(directory: Path) -> list[Path]:
    """Returns the files of weights of a Hugging Face directory. A note names the files of weights beside them."""
    read = [file for name in FIRST for file in glob(directory, [name])][:1]
    if read and read[0].suffix == ".json":
        read = indexed_files(read[0])
    others = [file.name for file in model_files(directory) if file not in read]
    if not read:
        raise FileNotFoundError(f"{directory} has config.json but no weights under their usual names{listed(others)}: "
                                f"looked for {LAYOUTS}")
    if others:
        note(f"{directory} has other files of weights than those that are read{listed(others)}")
    return read


def model_files(directory: Path) -> list[Path]:
    """Returns the files of weights of any layout, but for an adapter's. A file of one without its config is in them."""
    adapter = ADAPTER_WEIGHTS if (directory / ADAPTER_CONFIG).exists() else ()
    return [file for file in glob(directory, ANY) if file.name not in adapter]


def glob(directory: Path, patterns: Iterable[str]) -> list[Path]:
    return sorted(file for pattern in patterns for file in directory.glob(pattern))


def indexed_files(index: Path) -> list[Path]:
    """Returns the files that an index names. Raises ValueError if one is missing, or if there are other shards."""
    weight_map = read_json(index).get("weight_map")
    named = {str(name) for name in weight_map.values()} if isinstance(weight_map, dict) else set()
    if not named or any(name != Path(name).name for name in named):  # a path would open a file of another model
        raise ValueError(f"{index} does not map names of tensors to names of files beside it: copy it again")
    stem, suffix, *_ = index.name.split(".")
    shard = f"{stem}-*-of-*.{suffix}"
    present = [file.name for file in index.parent.iterdir() if file.name in named or file.match(shard)]
    compare(present, named, f"{index} does not fit the files beside it",
            "copy the missing files, or index and files of one saving")
    return [index.with_name(name) for name in sorted(named)]


def same(a: Path, b: Path) -> bool:
    """Do two directories hold the same weights, but for the head, and does a model compute the same with them?"""
    if a.resolve() == b.resolve():
        return True
    fields, others = read_config(a), read_config(b)
    fields |= {name: others[name] for name in ("eos_id", "dtype", "extra")}
    if fields != others or quantization(a) != quantization(b):
        return False
    mine, theirs = read_tensors(a, fields), read_tensors(b, fields)
    return all(name in theirs and torch.equal(stored.read(), theirs[name].read())
               for name, stored in mine.items() if not name.startswith("output."))


# ---- Meta's parts ---------------------------------------------------------------------------------------------------

def meta_parts(directory: Path) -> list[dict[str, Tensor]]:
    """Returns the tensors of each part. All parts have the same names, shapes and dtypes."""
    files = sorted(directory.glob("consolidated.*.pth"))
    numbered = [f"consolidated.{i:02d}.pth" for i in range(max(1, len(files)))]
    compare([file.name for file in files], numbered,
            f"{directory} lacks parts, they are numbered from 00 without a gap", "copy all of them")
    parts = [load(file) for file in files]
    kinds = [[f"{name} {tuple(t.shape)} {t.dtype}" for name, t in part.items()] for part in parts]
    for file, kind in zip(files, kinds):
        compare(kind, kinds[0], f"{file} and {files[0].name} are not parts of one checkpoint", "copy all of them again")
    return parts


def join_parts(directory: Path, head_dim: int) -> dict[str, Stored]:
    """Returns the whole tensors of Meta's parts. Each is joined when it is read."""
    tensors, parts = {}, meta_parts(directory)
    for name, first in parts[0].items():
        pieces = [part[name] for part in parts]
        shape = join(name, [piece.to("meta") for piece in pieces], head_dim).shape
        tensors[name] = Stored(tuple(shape), first.dtype, partial(join, name, pieces, head_dim))
    return tensors


def join(name: str, parts: list[Tensor], head_dim: int) -> Tensor:
    """Returns one tensor out of its parts, with the rows of wq and wk in the order of half-rotation."""
    if parts[0].dim() != 2:  # norms are whole in every part
        return parts[0].clone()
    if name.endswith(("wq.weight", "wk.weight")):
        # Each of P parts has the rows of H/P heads.
        pairs = [part.view(-1, head_dim // 2, 2, part.shape[1]) for part in parts]      # (H/P, D/2, 2, C) each
        halves = torch.cat([pair.transpose(1, 2) for pair in pairs])                    # (H, 2, D/2, C)
        return halves.flatten(0, 2)                                                     # (H*D, C)
    along_inputs = name.endswith(("wo.weight", "w2.weight", "tok_embeddings.weight"))
    return torch.cat(parts, dim=1 if along_inputs else 0)


# ---- from files into a model ----------------------------------------------------------------------------------------

def check_tensors(model: nn.Module, tensors: dict[str, Stored], source: str | Path) -> None:
    """Raises ValueError unless tensors hold each parameter of model in its shape, and no others. Of a trunk, a head may
    be there too.

    The model may lie on the meta device. Messages name `source`, and tensors as its files do.
    """
    names = hf_name if (Path(source) / "config.json").exists() else str
    wanted = {name: f"{names(name)} {tuple(p.shape)}" for name, p in model.named_parameters()}
    heads = ["output.weight", "score.weight"] if model.output is None else ["output.weight"]
    unread = {*heads} - wanted.keys()  # a tied head and the embedding are one parameter, but may be two tensors
    found = []
    for name, stored in tensors.items():
        if name not in unread and not DERIVED.search(name):
            dtype = stored.dtype
            # Integers and 8-bit floats are quantized weights without their scales.
            kind = "" if dtype.is_floating_point and dtype.itemsize > 1 else f" in {dtype}"
            shown = names(name) if name in wanted else stored.name or name
            found.append(f"{shown} {stored.shape}{kind}")
    compare(found, wanted.values(), f"{source} does not fit its config",
            "get the config and all weights of one model that is not quantized")
    if model.config.tie_embeddings and "output.weight" in tensors:
        if not torch.equal(tensors["output.weight"].read(), tensors["tok_embeddings.weight"].read()):
            raise ValueError(f"{source}: config.json ties the head to the embedding, but the files have a head that "
                             "differs: set tie_word_embeddings to false")


def fill(model: nn.Module, tensors: dict[str, Stored], dtype: torch.dtype | None, device: torch.device | str,
         source: str | Path) -> None:
    """Gives a model on the meta device its parameters. They are read one by one, so that two copies never exist.

    dtype None keeps the config's. check_tensors sees the tensors first.
    """
    check_tensors(model, tensors, source)
    dtype = dtype or DTYPES[model.config.dtype]
    filled = {name: nn.Parameter(tensors[name].read().to(device, dtype)) for name, _ in model.named_parameters()}
    model.load_state_dict(filled, strict=False, assign=True)
    if model.config.tie_embeddings and model.output is not None:
        model.output.weight = model.tok_embeddings.weight


# ---- config ---------------------------------------------------------------------------------------------------------

Rule = tuple[str, Callable[[object], bool]]     # what a value must be: in words, and as a test


def check(values: dict, rules: dict[str, Rule], source: str | Path, advice: str = "") -> None:
    """Raises ValueError for a value that breaks the rule of its name."""
    for name, (must_be, fits) in rules.items():
        if name in values and not fits(values[name]):
            raise ValueError(f"{source}: {name} is {values[name]!r}, it must be {must_be}{advice}")


def among(*values: object) -> Rule:
    return " or ".join(str(value) for value in values), lambda value: value in values


def whole(most: int) -> Rule:
    # type() and not isinstance(): True is an int too.
    return f"a whole number from 1 to {most:,}", lambda value: type(value) is int and 1 <= value <= most


def positive(most: float) -> Rule:
    return f"a number above 0 and at most {most:g}", lambda value: is_number(value) and 0 < value <= most


def is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def are_ids(value: object) -> bool:
    ids = as_tuple(value)
    return value is None or len(ids) > 0 and all(type(token) is int for token in ids)


def as_tuple(value: object) -> tuple:
    return (value,) if isinstance(value, int | None) else tuple(value)


def unite(*ids: int | Iterable[int] | None) -> int | tuple[int, ...] | None:
    """Returns all ids once, as LlamaConfig.eos_id has them."""
    once = dict.fromkeys(token for some in ids for token in as_tuple(some) if token is not None)
    return tuple(once) if len(once) > 1 else next(iter(once), None)


def is_scaling(numbers: tuple) -> bool:
    in_range = all(is_number(number) and 0 < number <= 2**31 for number in numbers)
    return in_range and (len(numbers) < 4 or numbers[1] < numbers[2])


# What a LlamaConfig may hold. Without limits, building what a broken file says might never end.
SIZE = whole(2**20)
ID = ("a whole number or null", lambda value: value is None or type(value) is int)
IDS = ("a whole number, a list of them, or null", are_ids)
RANGES = {
    "dim": SIZE,
    "n_layers": whole(1000),
    "n_heads": SIZE,
    "n_kv_heads": SIZE,
    "head_dim": SIZE,
    "ffn_dim": SIZE,
    "vocab_size": SIZE,
    "max_seq_len": SIZE,
    "norm_eps": positive(1),
    "rope_theta": positive(1e30),
    "rope_scaling": ("numbers above 0 and at most 2**31, low_freq_factor below high_freq_factor", is_scaling),
    "tie_embeddings": ("true or false", lambda value: type(value) is bool),
    "dtype": among(*DTYPES),
    "bos_id": ID,
    "pad_token_id": ID,
    "eos_id": IDS,
    "reward_mean": ("a finite number", is_number),
}


def check_config(fields: dict, source: str | Path = "config") -> None:
    """Raises ValueError where the fields of a LlamaConfig describe no LLaMA that can be built."""
    check(fields | fields["extra"], RANGES, source)
    if fields["n_heads"] % fields["n_kv_heads"]:
        raise ValueError(f"{source}: {fields['n_heads']} query heads cannot be shared out over {fields['n_kv_heads']} "
                         "key/value heads")
    if fields["head_dim"] % 2:
        raise ValueError(f"{source}: head_dim {fields['head_dim']} is odd, rotary embedding needs pairs")


def read_config(directory: str | Path) -> dict:
    """Returns the keyword arguments of LlamaConfig for a model directory, plain or quantized."""
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is not a directory: name a weights directory, {LAYOUTS}")
    file, translate = directory / "config.json", fields_from_hf
    if not file.exists():
        file, translate = directory / "params.json", fields_from_meta
    if not file.exists():
        raise no_model(directory)
    try:
        fields = translate(read_json(file), file)
        if fields["dtype"] not in DTYPES:
            fields["dtype"] = "float32"  # float64 and the like
        check_config(fields, file)
    except KeyError as error:
        raise ValueError(f"{file} lacks {error}: copy it again") from None
    # Null or a list where a number should be, zero heads, heads that do not divide Meta's matrices.
    except (TypeError, AttributeError, ZeroDivisionError, RuntimeError) as error:
        raise ValueError(f"{file} does not describe a LLaMA ({error}): copy it again") from None
    return fields


ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")


def is_adapter(directory: str | Path) -> bool:
    """Is a directory a LoRA adapter? One that names its own directory as base may lie beside that model. ValueError for
    one beside another model."""
    directory = Path(directory)
    file = directory / ADAPTER_CONFIG
    if not file.is_file() or not model_files(directory):
        return file.is_file()
    if not glob(directory, ADAPTER_WEIGHTS):
        note(f"{directory} holds a model, and an {ADAPTER_CONFIG} without weights, which changes nothing")
        return False
    base = str(read_json(file).get("base_model_name_or_path"))
    if directory.resolve() not in ((directory / base).resolve(), Path(base).resolve()):
        raise ValueError(f"{directory} holds a model, and an adapter of {base}: put the adapter into a directory of "
                         f'its own, or, if it is of this model, write "base_model_name_or_path": "." into {file}')
    return True


def no_model(directory: Path) -> Exception:
    """Returns the error for a directory with neither config.json nor params.json."""
    if (directory / ADAPTER_CONFIG).exists():
        return ValueError(f"{directory} holds an adapter: merge it first with `python lora.py merge "
                          f"{directory} OUT`, or open it with quantize.open_model, on the command line with "
                          f"`python serve.py {directory} --say TEXT`")
    for file in directory.glob("*.bin"):
        if not file.name.startswith("pytorch_model"):
            return ValueError(f"{file} is not a checkpoint that can be read here (llama2.c's own .bin?): "
                              f"get the same model as {LAYOUTS}")
    return FileNotFoundError(f"{directory} has neither config.json nor params.json: looked for {LAYOUTS}")


def quantization(directory: str | Path) -> dict | None:
    """Returns the quantization_config in config.json, unchecked; None where there is none. Older files of AutoGPTQ have
    it in quantize_config.json."""
    file, older = (Path(directory) / name for name in ("config.json", "quantize_config.json"))
    settings = read_json(file).get("quantization_config") if file.exists() else None
    if not settings and older.exists():
        return {"quant_method": "gptq"} | read_json(older)
    return settings or None


# Field of LlamaConfig: its key in config.json.
KEYS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn_dim": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "tie_embeddings": "tie_word_embeddings",
    "dtype": "torch_dtype",
    "bos_id": "bos_token_id",
    "eos_id": "eos_token_id",
}
# transformers leaves out of config.json what equals the defaults of its LlamaConfig, or of its MistralConfig.
DEFAULTS = {
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "model_type": None,
}
MISTRAL = {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}
# The kinds of rotary scaling, and the numbers of each in the order of LlamaConfig.rope_scaling.
SCALINGS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
# The model_type of quantize.py's 8-bit directories. As "llama", transformers would take their codes for weights.
FOREIGN = "octet_int8"
# Keys that change what a model computes, with the values that are computed here.
OPTIONS = {
    "model_type": among("llama", "mistral", FOREIGN),
    "architectures": among(None, ["LlamaForCausalLM"], ["LLaMAForCausalLM"], ["LlamaForSequenceClassification"],
                           ["MistralForCausalLM"], ["MistralForSequenceClassification"]),
    "attention_bias": among(False, None),
    "mlp_bias": among(False, None),
    "hidden_act": among("silu", None),
    "rope_type": among(*SCALINGS),
    "rope_interleaved": among(False, None),
    "partial_rotary_factor": among(1, None),
    "attn_logit_softcapping": among(None),
    "final_logit_softcapping": among(None),
    "eos_token_id": IDS,
}
# All keys that are known. Those of the last two lines change nothing here.
KNOWN = {
    *KEYS.values(), *OPTIONS, *SCALINGS["llama3"], "dtype", "rope_parameters", "rope_scaling", "type", "sliding_window",
    "quantization_config", "reward_mean", "pad_token_id", "num_labels", "id2label", "label2id",
    "_name_or_path", "transformers_version", "use_cache", "initializer_range", "attention_dropout", "pretraining_tp",
    "unk_token_id", "max_sequence_length", "is_llama_config", "transformers.js_config",
}


@cache
def note(sentence: str) -> None:
    """Prints a sentence about a directory, once however often it is opened."""
    print(f"note: {sentence}", file=sys.stderr)


def fields_from_hf(config: dict, file: Path) -> dict:
    """Returns the fields of a config.json, with transformers' defaults for the keys that it lacks."""
    # rope_parameters is the name since transformers 5, which takes rope_scaling where a file has both.
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    thetas = (rope.get("rope_theta"), config.get("rope_theta"), 10000.0)
    defaults = DEFAULTS | MISTRAL if config.get("model_type") == "mistral" else DEFAULTS
    config = {"rope_type": rope.get("type", "default")} | rope | defaults | config
    config["rope_theta"] = next(theta for theta in thetas if theta is not None)
    check(config, OPTIONS, file, ": others are not supported")
    unknown = [key for key, value in config.items() if value and key not in KNOWN]
    if unknown:
        note(f"{file} has keys that are not known here, they change nothing{listed(unknown)}")
    fields = {field: config[key] for field, key in KEYS.items()}
    if config.get("sliding_window"):  # up to its window, Mistral's sliding attention is plain attention
        fields["max_seq_len"] = min(fields["max_seq_len"], config["sliding_window"])
    beside = file.with_name("generation_config.json")
    generation = read_json(beside) if beside.exists() else {}
    check(generation, {"eos_token_id": IDS}, beside)
    dtype = config.get("dtype") or config["torch_dtype"] or read_tensors(file.parent)["tok_embeddings.weight"].dtype
    return fields | {
        "n_kv_heads": fields["n_heads"] if fields["n_kv_heads"] is None else fields["n_kv_heads"],
        "head_dim": fields["dim"] // fields["n_heads"] if fields["head_dim"] is None else fields["head_dim"],
        "rope_scaling": tuple(rope[key] for key in SCALINGS[config["rope_type"]]),
        "dtype": str(dtype).removeprefix("torch."),
        "eos_id": unite(fields["eos_id"], generation.get("eos_token_id")),
        # A language model's pad is not kept. It is often EOS, which a reward model trained from it must not pad with.
        "extra": {key: config[key] for key in ("reward_mean", "pad_token_id") if {key, "reward_mean"} <= config.keys()},
    }


# What a params.json does not say, by its rope_theta: the context, BOS, and EOS.
META = {
    10000.0: (2048, 1, 2),      # LLaMA 1. Llama 2 looks like it and has 4096: write "max_seq_len": 4096 into the file.
    1000000.0: (16384, 1, 2),   # CodeLlama
    500000.0: (8192, 128000, (128001, 128008, 128009)),  # Llama 3: end of text, of a message, of a turn
}


def fields_from_meta(params: dict, file: Path) -> dict:
    """Returns the fields of a params.json, with those that it lacks from the shapes of the tensors."""
    scaling = ()
    if params.get("use_scaled_rope"):
        if "rope_scaling_factor" not in params:
            raise ValueError(f"{file} has use_scaled_rope, but not by how much: write \"rope_scaling_factor\": 8 into "
                             "it for Llama 3.1, 32 for Llama 3.2")
        scaling = (params["rope_scaling_factor"], 1, 4, 8192)
    head_dim = params.get("head_dim") or params["dim"] // params["n_heads"]
    check({"head_dim": head_dim}, RANGES, file)
    tensors = join_parts(file.parent, head_dim)
    tied = "output.weight" not in tensors
    wq, wk = (tensors[f"layers.0.attention.{name}.weight"] for name in ("wq", "wk"))
    theta = params.get("rope_theta", 10000.0)
    context, bos_id, eos_id = META.get(theta, META[10000.0])
    return {
        "dim": params["dim"],
        "n_layers": params["n_layers"],
        "n_heads": params["n_heads"],
        "n_kv_heads": params.get("n_kv_heads") or params["n_heads"] * wk.shape[0] // wq.shape[0],
        "head_dim": head_dim,
        "ffn_dim": tensors["layers.0.feed_forward.w1.weight"].shape[0],
        "vocab_size": tensors["tok_embeddings.weight" if tied else "output.weight"].shape[0],
        "max_seq_len": params.get("max_seq_len", 131072 if scaling else context),
        "norm_eps": params.get("norm_eps", 1e-5),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_embeddings": tied,
        "dtype": str(wk.dtype).removeprefix("torch."),
        "bos_id": bos_id,
        "eos_id": eos_id,
        "extra": {},
    }


# ---- writing --------------------------------------------------------------------------------------------------------

def hf_config(fields: dict, architecture: str) -> dict:
    """Returns config.json with both spellings of the keys that transformers 5 renamed."""
    scaling = fields["rope_scaling"]
    rope_type = next(name for name, keys in SCALINGS.items() if len(keys) == len(scaling))
    rope = {"rope_type": rope_type, "rope_theta": fields["rope_theta"], **dict(zip(SCALINGS[rope_type], scaling))}
    # A reward model is read at the last id that differs from pad_token_id. No text of a sentencepiece tokenizer has the
    # id 0; EOS would be skipped.
    reward = {"pad_token_id": 0, "num_labels": 1, "id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    return {
        "architectures": [architecture],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        **(reward if architecture == "LlamaForSequenceClassification" else {}),
        **{key: fields[field] for field, key in KEYS.items()},
        "dtype": fields["dtype"],
        "rope_parameters": rope,
        "rope_scaling": {"type": rope_type, **rope} if scaling else None,
        **fields["extra"],
    }


def write_model(directory: str | Path, fields: dict, tensors: dict[str, Tensor | Stored],
                architecture: str = "LlamaForCausalLM", more: dict = {}, exact: Collection[str] = (),
                shard_bytes: int = 5 * 10**9) -> None:
    """Writes config.json with the keys of `more`, and the tensors under Hugging Face's names in shards of shard_bytes.

    Tensors are cast to the dtype in fields, but for those named in `exact`. One shard at a time is held in memory.
    """
    if any("lora_" in name for name in tensors):
        raise ValueError("the model still has adapters: merge and fold them, or save the adapter alone")
    directory = Path(directory)
    dtypes = {name: tensor.dtype if name in exact else DTYPES[fields["dtype"]] for name, tensor in tensors.items()}
    sizes = {name: math.prod(tensor.shape) * dtypes[name].itemsize for name, tensor in tensors.items()}
    shards, room = [], -1
    for name, size in sizes.items():
        if size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        weight_map |= {hf_name(name): file for name in shard}
        write_tensors(directory / file, {hf_name(name): in_memory(tensors[name], dtypes[name]) for name in shard})
    index = "model.safetensors.index.json"
    # Files of an earlier saving with another number of shards would be read instead of these, or beside them.
    for file in glob(directory, [index, "model.safetensors", "model-*-of-*.safetensors"]):
        if file.name not in weight_map.values():
            file.unlink()
    if len(shards) > 1:
        write_json(directory / index, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})
    config = hf_config(fields, architecture) | more
    write_json(directory / "config.json", config)
    write_json(directory / "generation_config.json", {key: config[key] for key in ("bos_token_id", "eos_token_id")})


def in_memory(tensor: Tensor | Stored, dtype: torch.dtype) -> Tensor:
    """Returns the tensor as it will be written."""
    tensor = tensor.read() if isinstance(tensor, Stored) else tensor.detach()
    return tensor.to("cpu", dtype).contiguous()


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Writes a safetensors file, as transformers and PEFT read it."""
    write_file(file, partial(safetensors.torch.save_file, tensors, metadata={"format": "pt"}))


# ---- JSON, and files that are written whole --------------------------------------------------------------------------

def read_json(file: str | Path) -> dict:
    """Returns a JSON object; raises ValueError with the file's name where there is none."""
    content = Path(file).read_bytes()
    refuse_pointer(content, file)
    try:
        content = json.loads(content.decode())
    except (ValueError, RecursionError) as error:  # also for bytes that are no UTF-8, and for numbers of 5,000 digits
        raise ValueError(f"{file} is not JSON ({error}): copy it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not a JSON object: copy it again")
    return content


def refuse_pointer(content: bytes, file: Path) -> None:
    """Raises ValueError for the few lines that a clone without git-lfs has in the place of a large file."""
    if content.startswith(b"version https://git-lfs"):
        raise ValueError(f"{file} is a pointer of git-lfs, not the file itself: run `git lfs pull` where it was cloned")


def write_json(file: str | Path, value: object) -> None:
    """Writes characters as they are. Half a surrogate pair, which UTF-8 lacks, becomes its escape in JSON, \\ud83d."""
    write_file(file, json.dumps(value, indent=1, ensure_ascii=False).encode("utf-8", "backslashreplace"))


def write_file(file: str | Path, content: bytes | Callable[[Path], object]) -> None:
    """Writes a file under a temporary name and renames it, so that readers see the old file or the new one, whole.

    content is the bytes, or a function that writes them to the path that it gets:
    write_file(file, lambda path: torch.save(state, path)).
    """
    file = Path(file)
    temporary = file.with_name(file.name + ".tmp")
    try:
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(b"" if callable(content) else content)
            mode = temporary.stat().st_mode  # the mode of the umask; safetensors would make it 0600
            if callable(content):
                content(temporary)
            temporary.chmod(mode)
            os.replace(temporary, file)
    finally:
        with suppress(OSError):
            temporary.unlink()


def append_line(file: Path, line: str) -> None:
    """Adds a line to a text file. A kill or a full disk may leave a part of it."""
    with writing(file), file.open("a", encoding="utf-8") as out:
        out.write(line + "\n")


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """Inside, what the disk refuses becomes an OSError of one sentence."""
    try:
        yield
    # On a full disk torch.save raises RuntimeError, and safetensors an error that derives from Exception alone.
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise OSError(f"{file} cannot be written: make room or name another directory ({reason})") from None
