"""LoRA in one file: train two thin matrices beside a frozen one, switch them off, merge them, and keep them in PEFT's files.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685). A fine-tuned matrix is W + dW, and
dW turns out to need little rank, so it is trained and stored as a product B A. Sizes in this file are those of W (6, 8), r = 2:

    x (..., 8) ---+------------------+
                  |                  |
              W (6, 8)           A (2, 8)    drawn at random
               frozen                |       h (..., 2), times alpha / r
                  |              B (6, 2)    zeros: training starts from the base model exactly
                  |                  |
    y (..., 6) <--+------------------+       28 numbers train instead of 48; at (11008, 4096) and r = 16 it is 0.5 %

Only A and B have gradients and optimizer state, the file to keep is megabytes, and one set of frozen weights serves as both the
policy (adapters on) and its reference model (`with disabled(model):`) in PPO.

    names = attach(model, rank=16)              then train model as usual; its other parameters are frozen
    save_adapter(model, "out/sft", base="/path/to/LLaMa-7B")
    python lora.py merge out/sft out/sft-merged [--dtype bf16]       prints what merging cost, writes an ordinary model

Where this differs from the paper:
1. All seven matrices of a block are adapted, the paper's experiments adapt wq and wv (Dettmers et al. 2023 found that it takes
   all of them to match full fine-tuning).
2. A is uniform in +-1/sqrt(in), not Gaussian: what the authors' code does, and PEFT.
3. Merging is a function that one calls, not a side effect of eval() as in the authors' code: PPO alternates train and eval at
   every step, and in bf16 W + BA - BA is not W. The original is kept, and unmerge puts it back to the bit.
4. alpha is 2 r unless given. (The paper fixes alpha at the first r tried and leaves it.)
Read besides: rsLoRA's scaling alpha / sqrt(r) (Kalajdzievski 2023). Refused: DoRA, trained biases, embeddings saved in full.
"""

import json
import math
import os
import pickle
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import run
from data.weights import DTYPES, hf_name

LINEARS = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
# PEFT options that change what the layer computes, or what the file holds, beyond a plain B A.
UNSUPPORTED = ("use_dora", "lora_bias", "use_qalora", "use_bdlora", "layer_replication", "layers_to_transform",
               "exclude_modules", "target_parameters", "trainable_token_indices", "alora_invocation_tokens", "arrow_config",
               "kasa_config", "monteclora_config")
# What adapter_config.json may hold where we read it; null is "not said".
KINDS = {"r": (int,), "lora_alpha": (int, float), "lora_dropout": (int, float), "target_modules": (str, list), "modules_to_save": (list,),
         "rank_pattern": (dict,), "alpha_pattern": (dict,), "base_model_name_or_path": (str,), "use_rslora": (bool,)}
# Initialisations that take B A out of the base matrix first, so that the file is right only on that altered base.
ALTERS_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


# ---- the layer ------------------------------------------------------------------------------------------------------

class LoRALinear(nn.Module):
    """y = base(x) + alpha / r * B A dropout(x), for x (..., in) and y (..., out).

    base is any module with in_features and out_features; only merging looks at its weight, so it may be a quantized one.
    A (r, in) and B (out, r) have `dtype`, or the base weight's; the product runs in x's dtype, so fp32 masters may sit on a
    bf16 base. A is drawn in fp32 from `generator`: the same numbers on every rank, device and dtype.
    """

    def __init__(self, base: nn.Module, rank: int, alpha: float, dropout: float = 0.0, dtype: torch.dtype | None = None,
                 generator: torch.Generator | None = None):
        super().__init__()
        self.base, self.rank, self.alpha, self.scaling = base, rank, alpha, alpha / rank
        self.in_features, self.out_features = base.in_features, base.out_features
        self.dropout = nn.Dropout(dropout)
        self.enabled = True
        self.register_buffer("original", None, persistent=False)  # W while merged: a buffer, to follow model.to(device)
        weight = getattr(base, "weight", None)
        if dtype is None:
            dtype = weight.dtype if weight is not None and weight.is_floating_point() else torch.float32
        device = next((t.device for t in (*base.parameters(), *base.buffers())), None)
        A = torch.empty(rank, self.in_features, device=generator.device if generator else "cpu")
        nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)  # a = sqrt(5) makes it uniform in +-1/sqrt(in)
        self.lora_A = nn.Parameter(A.to(device, dtype))                                                         # (2, 8)
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=device, dtype=dtype))            # (6, 2)
        self.train(base.training)  # a new module is in train mode: its dropout would run inside a model that is in eval mode

    @property
    def merged(self) -> bool:
        return self.original is not None

    @staticmethod
    def join(layers: "list[LoRALinear]", rows: int) -> "LoRALinear | None":
        """For Llama.fuse: put the fast form of a quantized base in its place; there is none of several with adapters."""
        base = layers[0].base
        if len(layers) == 1 and hasattr(base, "join"):
            layers[0].base = base.join([base], rows) or base
        return layers[0] if len(layers) == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)                                                                                        # (..., 6)
        if self.merged or not self.enabled:
            return y
        h = F.linear(self.dropout(x), self.lora_A.to(x.dtype)) * self.scaling  # scaled here: r numbers, not `out`  (..., 2)
        # In place: y, product and sum side by side would leave holes in the heap of twice what a step keeps.
        return y.view(-1, y.shape[-1]).addmm_(h.view(-1, h.shape[-1]), self.lora_B.to(x.dtype).T).view_as(y)    # (..., 6)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + alpha / r * B A in the weight's dtype, summed in fp32: rounding B A to bf16 first costs measurable quality."""
        if self.merged:
            return self.base.weight.data
        weight = getattr(self.base, "weight", None)
        if weight is None or not weight.is_floating_point():
            raise ValueError("an adapter cannot be merged into a quantized matrix and taken out again: "
                             "fold it, which gives a full-precision model, then quantize that")
        return (weight.float() + self.scaling * (self.lora_B.float() @ self.lora_A.float())).to(weight.dtype)   # (6, 8)


# ---- attaching, counting, switching off ------------------------------------------------------------------------------

def attach(model: nn.Module, rank: int, alpha: float | None = None, dropout: float = 0.0, targets: tuple[str, ...] = LINEARS,
           dtype: torch.dtype | None = None, generator: torch.Generator | None = None) -> list[str]:
    """Freeze every parameter of model and put an adapter on each linear whose last name part is in targets.

    alpha None is 2 * rank; dtype None is that of each base weight. Returns the names of the adapted matrices. A reward head
    is frozen with the rest: whoever trains it in full unfreezes it after this call. Raises ValueError, with the model
    untouched, for a rank below 1 or above a matrix's smaller side, a target that no linear has, or a model with adapters.
    """
    linears = _linears(model)
    present = {_last(name) for name in linears}
    if unknown := sorted(set(targets) - present):
        raise ValueError(f"no linear of the model is called {', '.join(unknown)}: "
                         f"choose targets among {', '.join(sorted(present))}")
    chosen = {name: module for name, module in linears.items() if _last(name) in targets}
    for name, module in chosen.items():
        if not 1 <= rank <= min(module.in_features, module.out_features):
            raise ValueError(f"LoRA rank {rank} does not fit {name}, which is {module.out_features} x {module.in_features}: "
                             f"choose between 1 and {min(module.in_features, module.out_features)}")
    _install(model, {name: (rank, 2 * rank if alpha is None else alpha) for name in chosen}, dropout, dtype, generator)
    return list(chosen)


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted matrices by name, in the model's order; empty when there are none."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def trainable_report(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; tied ones count once."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the model is its base; afterwards every adapter is as it was, also after an exception and when nested.

    Raises ValueError without adapters (the "reference" would be the policy itself, its KL always 0) and while merged.
    """
    layers = _require(model)
    if any(layer.merged for layer in layers):
        raise ValueError("adapters cannot be switched off while they are merged into the base: call unmerge(model) first")
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before):
            layer.enabled = enabled


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if hasattr(m, "in_features") and hasattr(m, "out_features")}


def _require(model: nn.Module) -> list[LoRALinear]:
    if not (layers := list(adapters(model).values())):
        raise ValueError("the model has no adapters: call lora.attach(model, rank) or lora.load_adapter(model, path) first")
    return layers


def _install(model: nn.Module, plan: dict[str, tuple[int, float]], dropout: float, dtype: torch.dtype | None,
             generator: torch.Generator | None) -> None:
    """Wrap the linears named in plan, name -> (rank, alpha); everything else is frozen."""
    if adapters(model):
        raise ValueError("the model already has adapters: fold(model) them into the base before adding new ones")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"LoRA dropout is {dropout}, it must be at least 0 and below 1")
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name in plan:
        if owners[id(getattr(model.get_submodule(name), "weight", None))] > 1:
            raise ValueError(f"{name} shares its weight with another module, which a merge would change too: "
                             "leave it out of the targets")
    model.requires_grad_(False)
    for name, (rank, alpha) in plan.items():
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, _last(name), LoRALinear(getattr(parent, _last(name)), rank, alpha, dropout, dtype, generator))


# ---- merging --------------------------------------------------------------------------------------------------------

def merge(model: nn.Module) -> None:
    """Put W + alpha / r * B A in the place of every W, so that adapters cost no time; a second call does nothing.

    The originals stay in memory for unmerge. Training A and B has no effect while merged. ValueError without adapters.
    """
    for layer in _require(model):
        if not layer.merged:
            weight = layer.merged_weight()
            layer.original, layer.base.weight.data = layer.base.weight.data, weight


def unmerge(model: nn.Module) -> None:
    """Put the original weights back, to the bit; does nothing where nothing is merged. ValueError without adapters."""
    for layer in _require(model):
        if layer.merged:
            layer.base.weight.data, layer.original = layer.original, None


def fold(model: nn.Module) -> None:
    """Merge for good: plain linears again, and every parameter trainable as after from_pretrained; nothing more is kept.
    A quantized base becomes a full-precision one by it, since its grids have no place for what an adapter adds.

    Raises ValueError without adapters.
    """
    _require(model)
    trunk = getattr(model, "trunk", model)
    if getattr(trunk, "quantized", None):
        trunk.quantized = None
        for name, module in list(model.named_modules()):
            if hasattr(module, "plain"):
                setattr(model.get_submodule(name.rpartition(".")[0]), _last(name), module.plain(next(trunk.parameters()).dtype))
    for name, layer in adapters(model).items():
        layer.base.weight.data = layer.merged_weight()
        setattr(model.get_submodule(name.rpartition(".")[0]), _last(name), layer.base)
    model.requires_grad_(True)


# ---- PEFT's files ---------------------------------------------------------------------------------------------------

def _hf_name(model: nn.Module, name: str) -> str:
    """Our module's name -> PEFT's, below "base_model.model."; a reward model's trunk sits where a causal model's sits."""
    return name if name == "score" else hf_name(name.removeprefix("trunk."))


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Two tensors for each adapted matrix, and a reward model's head in full, under PEFT's names; no copies."""
    state = {}
    for name, layer in adapters(model).items():
        prefix = f"base_model.model.{_hf_name(model, name)}"
        state[f"{prefix}.lora_A.weight"], state[f"{prefix}.lora_B.weight"] = layer.lora_A.detach(), layer.lora_B.detach()
    if hasattr(model, "score"):
        state["base_model.model.score.weight"] = model.score.weight.detach()
    return state


def save_adapter(model: nn.Module, path: str | Path, base: str, extra: dict | None = None) -> None:
    """Write adapter_config.json and adapter_model.safetensors into the folder path, so that PEFT opens it.

    base is written as given: an absolute path, or one relative to path. extra adds keys of our own to the config, such as a
    reward model's reward_mean. Raises ValueError when the model has no adapters, rather than write an empty file.
    """
    _require(model)
    layers = {_hf_name(model, name): layer for name, layer in adapters(model).items()}
    # One rank and alpha for all, except where an adapter read from a file has its own.
    rank = Counter(layer.rank for layer in layers.values()).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in layers.values()).most_common(1)[0][0]
    # q_proj stands for every q_proj of the model; where one has no adapter, the others are listed in full.
    plain = {_last(name) for name, module in _linears(model).items() if not isinstance(module, LoRALinear)}
    targets = layers if plain & {_last(name) for name in adapters(model)} else {_last(name) for name in layers}
    reward = hasattr(model, "score")
    config = {
        "peft_type": "LORA", "task_type": "SEQ_CLS" if reward else "CAUSAL_LM", "base_model_name_or_path": str(base),
        "r": rank, "lora_alpha": alpha, "lora_dropout": next(iter(layers.values())).dropout.p, "bias": "none",
        "target_modules": sorted(targets), "modules_to_save": ["score"] if reward else None,
        "rank_pattern": {name: layer.rank for name, layer in layers.items() if layer.rank != rank},
        "alpha_pattern": {name: layer.alpha for name, layer in layers.items() if layer.alpha != alpha},
        "use_rslora": False, "use_dora": False, "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
    } | (extra or {})
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in adapter_state(model).items()}
    # The config last: a folder that has one is an adapter. (bytes, since safetensors' own files ignore the umask.)
    _write(path / WEIGHTS, safetensors.torch.save(tensors, {"format": "pt"}))
    _write(path / CONFIG, json.dumps(config, indent=2, ensure_ascii=False).encode())


def _write(file: Path, content: bytes) -> None:
    """Under a temporary name and renamed, so that a reader sees the old file or the new one, never a part."""
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, file)


def is_adapter(path: str | Path) -> bool:
    return (Path(path) / CONFIG).is_file()


def home(path: str | Path) -> Path:
    """Where tokenizer and template lie: in the directory, or in the base of an adapter that has none."""
    path = Path(path)
    return base_path(path) if is_adapter(path) and not (path / "tokenizer.model").exists() else path


def read_adapter_config(path: str | Path) -> dict:
    """adapter_config.json, once it is sure that we compute what it asks for; otherwise ValueError or FileNotFoundError."""
    file = Path(path) / CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{path} has no {CONFIG}: name the folder of a LoRA adapter")
    try:
        config = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}): copy it again") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} is not a JSON object: copy it again")
    patterns = [config[key] for key in ("rank_pattern", "alpha_pattern") if isinstance(config.get(key), dict)]
    broken = [key for key, kinds in KINDS.items() if config.get(key) is not None and type(config[key]) not in kinds]
    broken += [f"a pattern of {number!r}" for pattern in patterns for number in pattern.values() if type(number) not in (int, float)]
    if isinstance(config.get("lora_alpha"), float) and not math.isfinite(config["lora_alpha"]):
        broken.append("lora_alpha")
    for expression in [config.get("target_modules"), *(key for pattern in patterns for key in pattern)]:
        try:
            re.compile(expression if isinstance(expression, str) else "")
        except re.error:
            broken.append(f"{expression!r}, which is no regular expression")
    if broken:
        raise ValueError(f"{file} has a value of the wrong kind ({', '.join(broken)}): copy it again")
    if missing := [key for key in ("r", "lora_alpha", "target_modules") if config.get(key) is None]:
        raise ValueError(f"{file} does not say {', '.join(missing)}: copy it again, or name the folder of a LoRA adapter")
    wrong = [f"{key} = {config[key]!r}" for key in UNSUPPORTED if config.get(key)]
    wrong += [f"{key} = {config[key]!r}" for key, plain in (("peft_type", "LORA"), ("bias", "none"))
              if config.get(key, plain) != plain]
    wrong += [f"{name} saved in full" for name in config.get("modules_to_save") or () if name not in ("score", "classifier")]
    if str(config.get("init_lora_weights")).lower().startswith(ALTERS_BASE):
        wrong.append(f"init_lora_weights = {config['init_lora_weights']!r} (it altered the base)")
    if wrong:
        raise ValueError(f"{file} asks for what lora.py does not do, {'; '.join(wrong)}: "
                         "merge the adapter with PEFT's merge_and_unload and use the merged model")
    return config


def base_path(path: str | Path) -> Path:
    """The folder of the adapter's base: absolute, else relative to the adapter's folder, else to the current one."""
    named = read_adapter_config(path).get("base_model_name_or_path")
    for folder in (Path(path) / named, Path(named)) if named else ():
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"{path} names its base as {named!r}, which is no folder seen from the adapter or from here: "
                            f"put the weights there or correct base_model_name_or_path in {CONFIG}")


def _targeted(targets: str | list[str], name: str) -> bool:
    """Whether PEFT's target_modules mean the module of this Hugging Face name."""
    if name == "score":
        return False  # modules_to_save has it
    if targets == "all-linear":
        return name != "lm_head"
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _pattern(patterns: dict | None, name: str, default: float) -> float:
    """PEFT's rule: the first key that is a regular expression for the end of the name, from a dot on."""
    return next((value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", name)), default)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The adapter's tensors, names cut to what follows "base_model.model." and without an adapter's own name."""
    file = path / WEIGHTS if (path / WEIGHTS).is_file() else path / PICKLE
    if not file.is_file():
        raise FileNotFoundError(f"{path} has {CONFIG} but neither {WEIGHTS} nor {PICKLE}: copy the weights too")
    try:
        if file.name == WEIGHTS:
            tensors = safetensors.torch.load_file(file)
        else:
            tensors = torch.load(file, map_location="cpu", weights_only=True)  # a pickle could run code otherwise
    except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{file} is damaged or not weights alone ({str(error).splitlines()[0]}): copy it again") from None
    if not isinstance(tensors, dict) or not all(isinstance(name, str) and isinstance(tensor, Tensor) and tensor.is_floating_point()
                                                for name, tensor in tensors.items()):
        raise ValueError(f"{file} is no dictionary of named floating-point tensors: get the adapter's own file")
    return {re.sub(r"\.(default|modules_to_save)(?=\.)", "", name.removeprefix("base_model.model.")): tensor
            for name, tensor in tensors.items()}


def load_adapter(model: nn.Module, path: str | Path, dtype: torch.dtype | None = None) -> dict:
    """Attach the adapter in the folder path, ours or PEFT's, to a model that is its base; returns its config.

    dtype of A and B; None keeps the file's, so that nothing is rounded before a merge. A reward model's head is read too,
    and frozen like the rest of the base. Raises ValueError, with the model untouched, when names or shapes do not fit.
    """
    path = Path(path)
    config, stored = read_adapter_config(path), _read_tensors(path)
    plan, shapes = {}, {}  # our name -> (rank, alpha); PEFT's tensor -> shape
    for ours, module in _linears(model).items():
        name = _hf_name(model, ours)
        if _targeted(config["target_modules"], name):
            rank = _pattern(config.get("rank_pattern"), name, config["r"])
            alpha = _pattern(config.get("alpha_pattern"), name, config["lora_alpha"])
            plan[ours] = (rank, alpha * math.sqrt(rank) if config.get("use_rslora") else alpha)  # so alpha / r is rsLoRA's
            shapes |= {f"{name}.lora_A.weight": (rank, module.in_features),
                       f"{name}.lora_B.weight": (module.out_features, rank)}
    if hasattr(model, "score"):
        shapes["score.weight"] = tuple(model.score.weight.shape)
    elif getattr(model, "output", model) is None:  # a trunk, opened without the score
        stored.pop("score.weight", None)
    reshaped = [f"{name} {tuple(stored[name].shape)} instead of {shape}" for name, shape in shapes.items()
                if name in stored and stored[name].shape != shape]
    faults = {"missing": [name for name in shapes if name not in stored],
              "unexpected": [name for name in stored if name not in shapes], "of another shape": reshaped}
    if any(faults.values()) or not plan:
        listed = [f"{len(names)} {kind} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
                  for kind, names in faults.items() if names]
        raise ValueError(f"{path} does not fit this model, {'; '.join(listed) or 'it targets no matrix'}: "
                         f"load the base that it was trained on, {config.get('base_model_name_or_path')}")
    dtype = dtype or next(t for name, t in stored.items() if "lora_A" in name).dtype
    # Its own generator: what it draws is overwritten at once, and the caller's random numbers stay what they were.
    _install(model, plan, config.get("lora_dropout") or 0.0, dtype, torch.Generator())
    for name, layer in adapters(model).items():
        layer.lora_A.data.copy_(stored[f"{_hf_name(model, name)}.lora_A.weight"])
        layer.lora_B.data.copy_(stored[f"{_hf_name(model, name)}.lora_B.weight"])
    if hasattr(model, "score"):
        model.score.weight.data.copy_(stored["score.weight"])
    return config


def read_adapter(path: str | Path) -> dict[str, Tensor]:
    return _read_tensors(Path(path))


# ---- command line ---------------------------------------------------------------------------------------------------

def main(argv: list[str] | None = None) -> dict:
    parser = run.Parser("Merge a LoRA adapter into its base and write an ordinary Hugging Face model.")
    parser.add_argument("command", choices=["merge"])
    parser.add_argument("adapter", help="folder with adapter_config.json, ours or PEFT's")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--dtype", default="auto", choices=["auto", "fp32", "bf16", "fp16"], help="to write; auto is the base's")
    args = parser.parse_args(argv)

    import quantize  # here, not above: it stands on this file
    adapter, base, out = Path(args.adapter), base_path(args.adapter), Path(args.out)
    if is_adapter(out) or out.resolve() == base.resolve():
        raise ValueError(f"{out} is the base or an adapter: name a folder of its own for the merged model")
    if read_adapter_config(adapter).get("task_type") == "SEQ_CLS":
        from rm import RewardModel
        model = RewardModel.from_pretrained(adapter)
    else:
        model = quantize.open_model(base)
        load_adapter(model, adapter)
    model.eval()
    config = getattr(model, "trunk", model).config
    if args.dtype != "auto":
        config.dtype = str(DTYPES[args.dtype]).removeprefix("torch.")
    final = DTYPES[config.dtype]

    tokens = torch.arange(min(64, config.max_seq_len))[None] % config.vocab_size  # (1, T), the fixed prompt
    real = torch.ones_like(tokens, dtype=torch.bool)
    with torch.no_grad():
        # Merge in the wider of the two dtypes and round once, at the end.
        _cast(model, torch.promote_types(next(model.parameters()).dtype, final))
        before = model(tokens, real).float()
        if adapters(model):  # a reward model may come merged
            fold(model)
        _cast(model, final)
        difference = (model(tokens, real).float() - before).abs().mean().item()
    # Measured: 0.3 to 0.6 eps of the mean logit on a trained model, 10 on a random one, whose layers amplify rounding more.
    bound = 32 * torch.finfo(final).eps * before.abs().mean().item()
    print(f"mean |logit difference| of merged and adapter {difference:.1e}, bound {bound:.1e}, 32 roundings to {config.dtype}"
          f"{': above it, --dtype fp32 keeps more' if difference > bound else ''}")
    model.save_pretrained(out)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        # The last one wins: the adapter's names the template it was trained with; Meta's stands beside the folder 7B.
        for folder in (base.parent, base, adapter):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, out / name)
    print(f"wrote {out}")
    return {"logit_difference": difference, "bound": bound, "dtype": config.dtype}


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Neither the rotary tables, which are fp32 always, nor the adapters, which are merged in fp32 as they are."""
    for name, p in model.named_parameters():
        if "lora_" not in name:
            p.data = p.data.to(dtype)


if __name__ == "__main__":
    run.command(main)
