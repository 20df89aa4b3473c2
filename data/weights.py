"""A model directory <-> a dict of config fields and named tensors; reading JSON, writing files safely.

Layouts that are read: Hugging Face (safetensors or .bin, one file or shards with an index) and Meta (params.json with
consolidated.*.pth, any number of parts). Hugging Face's is written.

The one trap is rotary embedding: Meta's files rotate neighbouring pairs (0,1) (2,3) ..., Hugging Face's rotate the two
halves (0,D/2) (1,D/2+1) ... The rows of wq and wk are permuted where Meta files are read, nowhere else:

    row of one head in Meta's file   0  1  2  3  4  5  6  7        (D = 8; pairs are neighbours)
    row inside                       0  2  4  6  1  3  5  7        (pairs are D/2 = 4 apart)
"""

import json
import math
import os
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
          "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


HF_NAMES = {"tok_embeddings": "embed_tokens", "attention": "self_attn", "wq": "q_proj", "wk": "k_proj", "wv": "v_proj",
            "wo": "o_proj", "feed_forward": "mlp", "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj",
            "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "output": "lm_head"}


# Buffers that old files carry and that follow from the config.
DERIVED = re.compile(r"(rotary_emb\.inv_freq|rope\.freqs)$")


PATTERNS = "config.json with model.safetensors, model.safetensors.index.json, pytorch_model.bin or pytorch_model.bin.index.json " \
           "(Hugging Face), or params.json with consolidated.*.pth (Meta)"

CUT_BY_INPUT = ("wo.weight", "w2.weight", "tok_embeddings.weight")  # in Meta's parts; the others are cut along their output

FOREIGN = "octet_int8"  # the model_type of our 8-bit layout: as "llama", transformers would warn and take codes for weights


class Stored(NamedTuple):
    """A tensor in a file: its shape and dtype are known, and `read` reads it."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


def plain(tensor: Tensor | Stored) -> Tensor:
    return tensor.read() if isinstance(tensor, Stored) else tensor


def stored_slice(name: str, handle) -> Stored:
    """A tensor of a safetensors file, which is opened already."""
    part = handle.get_slice(name)
    kinds = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32, "I8": torch.int8}
    return Stored(tuple(part.get_shape()), kinds.get(part.get_dtype(), torch.uint8), lambda: handle.get_tensor(name))


def stored_meta(name: str, parts: list[dict[str, Tensor]], config: dict) -> Stored:
    """A tensor of Meta's files, whole."""
    part = parts[0][name]
    shape = list(part.shape)
    if len(shape) > 1:
        shape[1 if name.endswith(CUT_BY_INPUT) else 0] *= len(parts)
    return Stored(tuple(shape), part.dtype, lambda: join_meta(name, parts, config))


def write_json(file: Path, value: object) -> None:
    write_file(file, json.dumps(value, indent=1, ensure_ascii=False).encode())


def quantization(directory: str | Path) -> dict | None:
    """The quantization_config of a directory's config.json, as it is; None where there is none."""
    file = Path(directory) / "config.json"
    return read_json(file).get("quantization_config") or None if file.exists() else None


def hf_name(name: str) -> str:
    """Our name of a module or parameter -> Hugging Face's: layers.0.attention.wq -> model.layers.0.self_attn.q_proj."""
    for ours, theirs in HF_NAMES.items():
        name = re.sub(rf"(^|\.){re.escape(ours)}(?=\.|$)", rf"\g<1>{theirs}", name)
    return name if name.startswith(("lm_head", "score")) else f"model.{name}"


def checked(**fields) -> dict:
    return check_config({"rope_factor": 1.0, "bos_id": 1, "eos_id": 2, "extra": {}} | fields)


def check_config(fields: dict) -> dict:
    """Returns the fields of a LlamaConfig; raises ValueError with a sentence for one that no LLaMA can have."""
    for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size", "max_seq_len"):
        value, most = fields[name], 1000 if name == "n_layers" else 2**20  # building what a broken file says may never end
        if type(value) is not int or not 1 <= value <= most:  # True is an int too
            raise ValueError(f"config: {name} is {value!r}, it must be a whole number from 1 to {most:,}")
    for name, most in (("norm_eps", 1.0), ("rope_theta", 1e30), ("rope_factor", 1e30)):
        value = fields[name]
        if type(value) not in (int, float) or not 0 < value <= most:
            raise ValueError(f"config: {name} is {value!r}, it must be a number above 0 and at most {most:g}")
        fields[name] = float(value)
    if type(fields["tie_embeddings"]) is not bool:
        raise ValueError(f"config: tie_embeddings is {fields['tie_embeddings']!r}, it must be true or false")
    if type(fields["eos_id"]) in (list, tuple) and fields["eos_id"] and all(type(i) is int for i in fields["eos_id"]):
        fields["eos_id"] = tuple(fields["eos_id"])  # generation stops at any of them
    for name in ("bos_id", "eos_id"):
        if type(fields[name]) not in (int, type(None), tuple if name == "eos_id" else int):
            raise ValueError(f"config: {name} is {fields[name]!r}, it must be a whole number or null")
    mean = fields.get("extra", {}).get("reward_mean", 0.0)
    if type(mean) not in (int, float) or not abs(mean) < math.inf:
        raise ValueError(f"config: reward_mean is {mean!r}, it must be a finite number")
    if fields["n_heads"] % fields["n_kv_heads"]:
        raise ValueError(f"config: {fields['n_heads']} query heads cannot be shared out over {fields['n_kv_heads']} key/value heads")
    if fields["head_dim"] % 2:
        raise ValueError(f"config: head_dim {fields['head_dim']} is odd, rotary embedding needs pairs")
    if fields["dtype"] not in DTYPES:
        fields["dtype"] = "float32"  # float64 and the like
    return fields


def read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON ({error}): copy it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not a JSON object: copy it again")
    return content


def read_config(directory: str | Path) -> dict:
    """The config of a Hugging Face or Meta directory; for Meta's it takes a look into the weights (sizes not in params.json)."""
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is not a directory: name a weights directory, {PATTERNS}")
    if (directory / "config.json").exists():
        return config_from_hf(read_json(directory / "config.json"), directory)
    if (directory / "params.json").exists():
        return config_from_meta(read_json(directory / "params.json"), directory)
    if (directory / "adapter_config.json").exists():
        raise ValueError(f"{directory} holds an adapter, not a model: merge it first with `python lora.py merge {directory} OUT`")
    for file in directory.glob("*.bin"):
        if not file.name.startswith("pytorch_model"):
            raise ValueError(f"{file} is not a checkpoint that can be read here (llama2.c's own .bin?): get the same model as "
                             f"{PATTERNS}")
    raise FileNotFoundError(f"{directory} has neither config.json nor params.json: looked for {PATTERNS}")


def config_from_hf(c: dict, directory: Path) -> dict:
    kind = c.get("model_type")
    if kind not in ("llama", "mistral", FOREIGN):
        raise ValueError(f"{directory}: model_type {kind!r} is not a LLaMA (llama and mistral are)")
    for key, plain in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        if c.get(key) not in (None, plain):
            raise ValueError(f"{directory}: config.json has {key} = {c[key]!r}, which is not supported: a LLaMA has {plain!r}")
    # transformers 5 moved rope_theta into rope_parameters; older files have the two older keys.
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{directory}/config.json has {rope!r} as rope_parameters or rope_scaling: copy it again")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "linear"):
        raise ValueError(f"{directory}: rotary scaling {rope_type!r} is not supported (default and linear are)")
    dtype = c.get("dtype") or c.get("torch_dtype") or stored_dtype(directory)
    try:
        dim, n_heads, eos = c["hidden_size"], c["num_attention_heads"], c.get("eos_token_id", 2)
        thetas = (rope.get("rope_theta"), c.get("rope_theta"), 10000.0)
        context = c.get("max_position_embeddings", 2048)
        if c.get("sliding_window"):
            context = min(context, c["sliding_window"])  # Mistral: up to its window, sliding attention is plain attention
        # Defaults are those of transformers' LlamaConfig, which leaves out of the file what equals them.
        return checked(
            dim=dim, n_layers=c["num_hidden_layers"], n_heads=n_heads, n_kv_heads=c.get("num_key_value_heads") or n_heads,
            head_dim=c.get("head_dim") or dim // n_heads, ffn_dim=c["intermediate_size"], vocab_size=c["vocab_size"],
            max_seq_len=context, norm_eps=c.get("rms_norm_eps", 1e-6),
            rope_theta=next(theta for theta in thetas if theta is not None),
            rope_factor=rope["factor"] if rope_type == "linear" else 1.0, tie_embeddings=c.get("tie_word_embeddings", False),
            dtype=str(dtype).removeprefix("torch."),
            bos_id=c.get("bos_token_id", 1), eos_id=eos,
            extra={key: c[key] for key in ("reward_mean",) if key in c})
    except KeyError as error:
        raise ValueError(f"{directory}/config.json lacks {error}: copy it again") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:  # null where a number should be, sizes that do not fit
        raise ValueError(f"{directory}/config.json does not describe a LLaMA ({error}): copy it again") from None


def stored_dtype(directory: Path) -> str:
    """The dtype of the weights themselves, for a config.json that does not say."""
    embedding = read_tensors(directory).get("tok_embeddings.weight")
    return str(embedding.dtype) if embedding else "float32"


def config_from_meta(p: dict, directory: Path) -> dict:
    if p.get("use_scaled_rope"):
        raise ValueError(f"{directory}: params.json has use_scaled_rope, the rotary scaling of Llama 3.1, which is not supported")
    parts = meta_parts(directory)
    n, part = len(parts), parts[0]
    try:
        dim, n_layers, n_heads = p["dim"], p["n_layers"], p["n_heads"]
        wq, wk = part["layers.0.attention.wq.weight"], part["layers.0.attention.wk.weight"]
        w1, embedding = part["layers.0.feed_forward.w1.weight"], part["tok_embeddings.weight"]
        head_dim = p.get("head_dim") or dim // n_heads
        rows = n_heads * head_dim
    except KeyError as error:
        raise ValueError(f"{directory}: params.json or consolidated.00.pth lacks {error}: it is no LLaMA of Meta's") from None
    except (TypeError, ZeroDivisionError):
        raise ValueError(f"{directory}: params.json has dim {dim!r} and n_heads {n_heads!r}, which are no sizes: copy it again") from None
    if wq.shape[0] * n != rows:
        raise ValueError(f"{directory}: wq has {wq.shape[0]} rows in a part and {wq.shape[0] * n} in all ({n} consolidated.*.pth), "
                         f"by params.json it has {rows}: copy the missing parts, or the params.json that belongs to them")
    n_kv_heads = wk.shape[0] * n // head_dim
    if p.get("n_kv_heads") not in (None, n_kv_heads):  # else a wrong n_heads would go unseen: other heads, the same shapes
        raise ValueError(f"{directory}: wk has rows for {n_kv_heads} heads of {head_dim}, by params.json there are "
                         f"{p['n_kv_heads']!r}: copy it again")
    tied, eps, theta = "output.weight" not in part, p.get("norm_eps", 1e-5), p.get("rope_theta", 10000.0)
    if not all(type(value) in (int, float) for value in (eps, theta)):
        raise ValueError(f"{directory}: params.json has norm_eps {eps!r} and rope_theta {theta!r}, which are no numbers: copy it again")
    try:
        return checked(
            dim=dim, n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim,
            ffn_dim=w1.shape[0] * n, vocab_size=embedding.shape[0] if tied else part["output.weight"].shape[0] * n,
            # Meta's files do not say. LLaMA 1 has 2048, CodeLlama 16384; Llama 2, which they do not tell from LLaMA 1, has 4096:
            # write "max_seq_len": 4096 into its params.json.
            max_seq_len=p.get("max_seq_len", 16384 if theta > 1e4 else 2048),
            norm_eps=eps, rope_theta=theta, tie_embeddings=tied,
            dtype=str(wk.dtype).removeprefix("torch."))
    except ValueError as error:
        raise ValueError(f"{directory}/params.json does not describe a LLaMA ({error}): copy it again") from None


def torch_load(file: Path) -> dict[str, Tensor]:
    try:
        tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # zip, pickle and unpickling errors share no base class
        reason = str(error).partition("\n")[0][:120]
        raise ValueError(f"{file} cannot be read, it is cut short or not a checkpoint: copy it again ({reason})") from None
    if not isinstance(tensors, dict) or not all(isinstance(name, str) and isinstance(t, Tensor) for name, t in tensors.items()):
        raise ValueError(f"{file} is no dictionary of named tensors: get the file with the weights alone")
    return tensors


def meta_parts(directory: Path) -> list[dict[str, Tensor]]:
    files = sorted(directory.glob("consolidated.*.pth"))
    if not files:
        raise FileNotFoundError(f"{directory} has params.json but no consolidated.*.pth: copy the weights there")
    if [file.name for file in files] != [f"consolidated.{i:02d}.pth" for i in range(len(files))]:
        raise FileNotFoundError(f"{directory} has {', '.join(f.name for f in files)}: a part is missing or misnamed, they are "
                                "numbered from 00 without a gap: copy all of them")
    parts = [torch_load(file) for file in files]
    kinds = [{name: (tensor.shape, tensor.dtype) for name, tensor in part.items()} for part in parts]
    if any(other != kinds[0] for other in kinds):
        raise ValueError(f"{directory}: its consolidated.*.pth differ in names, shapes or dtypes, they are not parts of one "
                         "checkpoint: copy them again")
    return parts


def join_meta(name: str, parts: list[dict[str, Tensor]], config: dict) -> Tensor:
    """One tensor out of its model-parallel parts, wq and wk brought into half-rotation order."""
    tensors = [part[name] for part in parts]
    if len(parts) == 1 or tensors[0].dim() == 1:  # norms are whole in every part
        whole = tensors[0]
    else:
        by_input = name.endswith(CUT_BY_INPUT)
        whole = torch.cat(tensors, dim=1 if by_input else 0)
    if name.endswith(("wq.weight", "wk.weight")):
        D, interleaved = config["head_dim"], whole
        whole = torch.empty_like(interleaved)
        # (H*D, C) -> (H, D/2 pairs, 2, C) -> (H, 2, D/2, C) -> (H*D, C)
        whole.view(-1, 2, D // 2, whole.shape[1]).copy_(interleaved.view(-1, D // 2, 2, whole.shape[1]).transpose(1, 2))
    return whole


def read_tensors(directory: str | Path, config: dict | None = None) -> dict[str, Stored]:
    """Our name -> a function that reads that tensor. Nothing is read before it is called for, so two copies never exist.
    Meta's files need the config, to bring wq and wk into our order."""
    directory = Path(directory)
    if not (directory / "config.json").exists():
        parts = meta_parts(directory)
        return {name: stored_meta(name, parts, config) for name in parts[0] if not DERIVED.search(name)}
    tensors: dict[str, Stored] = {}
    for file in hf_files(directory):
        if file.suffix == ".safetensors":
            try:
                handle = safetensors.safe_open(file, framework="pt")
            except Exception as error:  # SafetensorError derives from Exception alone
                raise ValueError(f"{file} cannot be read, it is cut short or not safetensors: copy it again ({error})") from None
            found = {name: stored_slice(name, handle) for name in handle.keys()}
        else:
            found = {name: Stored(tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor) for name, tensor in torch_load(file).items()}
        tensors |= {our_name(name): read for name, read in found.items() if not DERIVED.search(name)}
    return tensors


def hf_files(directory: Path) -> list[Path]:
    """The weight files of a Hugging Face directory, its index checked against what is there in both directions."""
    for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin")):
        index, single = directory / f"{stem}.{ending}.index.json", directory / f"{stem}.{ending}"
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise ValueError(f"{index} does not map names of tensors to names of files: copy it again")
            named = {directory / name for name in weight_map.values()}
            missing = sorted(file.name for file in named if not file.is_file())
            unlisted = sorted(file.name for file in directory.glob(f"{stem}-*-of-*.{ending}") if file not in named)
            if missing or not named:
                instead = f", or the index that belongs to {', '.join(unlisted)}" if unlisted else ""
                raise FileNotFoundError(f"{index} names {', '.join(missing) or 'no files'}, which {directory} does not have: copy "
                                        f"the missing files{instead}")
            if unlisted:
                raise ValueError(f"{directory} has {', '.join(unlisted)}, which {index.name} does not name: index and files are "
                                 "of two different savings, copy them again")
            return sorted(named)
        if single.exists():
            return [single]
    loose = sorted(file.name for file in directory.iterdir() if file.suffix in (".safetensors", ".bin"))
    unknown = f", only {', '.join(loose)}, which no index names" if loose else ""
    raise FileNotFoundError(f"{directory} has config.json but no weights{unknown}: looked for {PATTERNS}")


def our_name(name: str) -> str:
    """Hugging Face's parameter name -> ours, the inverse of hf_name."""
    name = name.removeprefix("model.")
    for ours, theirs in HF_NAMES.items():
        name = re.sub(rf"(^|\.){theirs}(?=\.|$)", rf"\g<1>{ours}", name)
    return name


def fill(model: nn.Module, tensors: dict[str, Stored], dtype: torch.dtype | None, device, source: str | Path | None = None,
         ignore: tuple[str, ...] = ()) -> None:
    """Fill a model built on the meta device, tensor by tensor; all names and shapes must agree. Tied heads stay tied.
    `source` is the directory the tensors come from: messages name it, and the names as they are in its files."""
    shown = hf_name if source and (Path(source) / "config.json").exists() else str
    source = source or "the checkpoint"
    names = [name for name, _ in model.named_parameters()]  # a tied head appears once, as the embedding
    tied = model.config.tie_embeddings
    missing = [shown(name) for name in names if name not in tensors]
    known = {*names, *ignore, *(["output.weight"] if tied else [])}  # a tied head may be stored beside the embedding
    unexpected = [shown(name) for name in tensors if name not in known]
    if missing or unexpected:
        more = " (and more)" if max(len(missing), len(unexpected)) > 5 else ""
        raise ValueError(f"{source} does not fit its config: missing {', '.join(missing[:5]) or 'nothing'}; "
                         f"unexpected {', '.join(unexpected[:5]) or 'nothing'}{more}")
    dtype = dtype or DTYPES[model.config.dtype]
    for name in names:
        module, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        tensor, shape = tensors[name].read(), getattr(module, leaf).shape
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):  # int8 or fp8 lack their scales
            raise ValueError(f"{source}: {shown(name)} is {str(tensor.dtype).removeprefix('torch.')}, plain weights are float32, "
                             "bfloat16 or float16: get the model that is not quantized")
        if tensor.shape != shape:
            raise ValueError(f"{source}: {shown(name)} is {tuple(tensor.shape)}, by the config it should be {tuple(shape)}")
        # copy=True: parameters must not be views of the mapped file, which is read-only to us.
        setattr(module, leaf, nn.Parameter(tensor.to(device=device, dtype=dtype, copy=True)))
    if tied and getattr(model, "output", None) is not None:
        model.output.weight = model.tok_embeddings.weight
        if "output.weight" in tensors and not torch.equal(tensors["output.weight"].read(), tensors["tok_embeddings.weight"].read()):
            raise ValueError(f"{source}: config.json ties the head to the embedding, but the files have a head that differs: set "
                             "tie_word_embeddings to false")


def write_file(file: Path, content: bytes | Callable[[Path], object]) -> None:
    """Write under a temporary name and rename, so that a reader sees the old file or the new one, never a part.

    content is the bytes, or a function that writes them to the path that it is given."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + ".tmp")
    try:
        content(temporary) if callable(content) else temporary.write_bytes(content)
    except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError from torch.save
        temporary.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise OSError(f"{file} cannot be written: make room or name another directory ({reason})") from None
    os.replace(temporary, file)


def write_safetensors(tensors: dict[str, Tensor], file: Path) -> None:
    """As write_file; safetensors creates files as 0600, which would hide a model from everybody else."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + ".tmp")
    tensors = {name: t.detach().contiguous() for name, t in tensors.items()}
    try:
        safetensors.torch.save_file(tensors, temporary, metadata={"format": "pt"})
    except Exception as error:  # a full disk is a SafetensorError here, which derives from Exception alone
        temporary.unlink(missing_ok=True)
        raise OSError(f"{file} cannot be written: make room or name another directory ({error})") from None
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(temporary, 0o666 & ~umask)
    os.replace(temporary, file)


def write_model(directory: str | Path, config: dict, tensors: dict[str, Tensor | Stored], architecture: str = "LlamaForCausalLM",
                more: dict | None = None, exact: Collection[str] = (), shard_bytes: int = 5 * 10**9) -> None:
    """config.json (with `more` keys) and safetensors, our names in and Hugging Face's out, cast to config.dtype but those named in
    `exact`, in shards above 5 GB."""
    if any("lora_" in name for name in tensors):
        raise ValueError("the model still has adapters: merge and fold them, or save the adapter alone")
    directory = Path(directory)
    dtype = {hf_name(name): tensor.dtype if name in exact else DTYPES[config["dtype"]] for name, tensor in tensors.items()}
    tensors = {hf_name(name): tensor for name, tensor in tensors.items()}
    size = {name: math.prod(tensor.shape) * dtype[name].itemsize for name, tensor in tensors.items()}
    shards: list[list[str]] = [[]]
    for name in tensors:
        if shards[-1] and sum(size[other] for other in shards[-1]) + size[name] > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    n = len(shards)
    files = ["model.safetensors"] if n == 1 else [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    for file, shard in zip(files, shards):
        write_safetensors({name: plain(tensors[name]).to("cpu", dtype[name]) for name in shard}, directory / file)
    if n > 1:
        weight_map = {name: file for file, shard in zip(files, shards) for name in shard}
        index = {"metadata": {"total_size": sum(size.values())}, "weight_map": weight_map}
        files.append("model.safetensors.index.json")
        write_file(directory / files[-1], json.dumps(index, indent=1).encode())
    # Files of an earlier saving with another number of shards would be read instead of these, or beside them.
    for pattern in ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"):
        for file in directory.glob(pattern):
            if file.name not in files:
                file.unlink()
    write_file(directory / "config.json", json.dumps(hf_config(config, architecture) | (more or {}), indent=1).encode())


def hf_config(config: dict, architecture: str) -> dict:
    """config.json with both spellings of the keys that transformers 5 renamed."""
    scaling = {"rope_type": "linear", "factor": config["rope_factor"]} if config["rope_factor"] != 1.0 else {}
    return {"architectures": [architecture], "model_type": "llama", "hidden_act": "silu", "hidden_size": config["dim"],
            "intermediate_size": config["ffn_dim"], "num_hidden_layers": config["n_layers"], "num_attention_heads": config["n_heads"],
            "num_key_value_heads": config["n_kv_heads"], "head_dim": config["head_dim"], "vocab_size": config["vocab_size"],
            "max_position_embeddings": config["max_seq_len"], "rms_norm_eps": config["norm_eps"], "rope_theta": config["rope_theta"],
            "rope_parameters": {"rope_type": "default", "rope_theta": config["rope_theta"]} | scaling,
            "rope_scaling": {"type": "linear"} | scaling if scaling else None,
            "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": config["tie_embeddings"], "bos_token_id": config["bos_id"],
            "eos_token_id": config["eos_id"], "torch_dtype": config["dtype"], "dtype": config["dtype"], **config["extra"]}
