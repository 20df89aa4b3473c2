"""LoRA in one file: train two thin matrices beside a frozen one, switch them off, merge them, store them as PEFT does.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685). A fine-tuned matrix is W + dW,
and dW turns out to need little rank, so it is trained and stored as a product of two thin matrices:

    y = W x + alpha / r * B A x

The shapes beside the code of this file are those of W (6, 8) and r = 2:

    x (..., 8) ---+------------------+
                  |                  |
              W (6, 8)           A (2, 8)    drawn at random
               frozen                |       (..., 2)
                  |              B (6, 2)    zeros: training starts from the base model exactly
                  |                  |       times alpha / r
    y (..., 6) <--+------------------+       28 numbers train instead of 48; at (11008, 4096) and r = 16 it is 0.5 %

Only A and B have gradients and optimizer state, the file to keep is megabytes, and one set of frozen weights serves
several models: in PPO the policy (adapters on) and its reference (`with disabled(model):`), and as the base of a `twin`
the reward model and the critic too.

    names = attach(model, rank=16)              then train model as usual; its other parameters are frozen
    save_adapter(model, "out/sft", base="/path/to/LLaMa-7B")
    python lora.py merge out/sft out/sft-merged [--dtype bf16]       writes an ordinary model

Where this differs from the paper:
1. All seven matrices of a block are adapted. The paper's experiments adapt wq and wv; Dettmers et al. 2023 found that
   it takes all of them to match full fine-tuning.
2. A is uniform in +-1/sqrt(in), not Gaussian: what the authors' code does, and PEFT.
3. Merging is a function that one calls, not a side effect of eval() as in the authors' code: in bf16 W + BA - BA is not
   W, and a loop that alternates train and eval would change W each time. merge keeps the original, and unmerge puts it
   back to the bit.
4. alpha is 2 r unless given. (The paper sets alpha to the first r that was tried and does not tune it.)
Adapters with rsLoRA's scaling alpha / sqrt(r) (Kalajdzievski 2023) are read too. DoRA, trained biases and embeddings in
full are refused.
"""

import copy
import math
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import run, text, weights
from model import Llama, LlamaConfig

LINEARS = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")


# ---- the layer ------------------------------------------------------------------------------------------------------

class LoRALinear(nn.Module):
    """y = base(x) + alpha / r * B A dropout(x), for x (..., in) and y (..., out).

    base is a linear: plain, quantized, or one with a frozen adapter. Only merging reads its weight. A (r, in) and
    B (out, r) are masters in fp32, or have the dtype of the file that they come from; the product is computed in x's
    dtype. A is drawn in fp32 from `generator`, so it is the same on every process and in every dtype.
    """

    def __init__(self, base: nn.Module, rank: int, alpha: float, dropout: float = 0.0,
                 dtype: torch.dtype = torch.float32, generator: torch.Generator | None = None):
        super().__init__()
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.rank, self.alpha, self.scaling = rank, alpha, alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.enabled = True
        self.register_buffer("original", None, persistent=False)  # W while merged; a buffer follows model.to(device)
        device = next((t.device for t in (*base.parameters(), *base.buffers())), None)
        A = torch.empty(rank, self.in_features, device=generator.device if generator else "cpu")    # (2, 8)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)  # a = sqrt(5): uniform in +-1/sqrt(in)
        self.lora_A = nn.Parameter(A.to(device, dtype))                                         # (2, 8)
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=device, dtype=dtype))     # (6, 2)
        self.train(base.training)  # a new module is in train mode: in a model in eval mode its dropout would be on

    @property
    def merged(self) -> bool:
        return self.original is not None

    def forward(self, x: Tensor) -> Tensor:                                                     # (..., 8)
        y = self.base(x)                                                                        # (..., 6)
        if self.merged or not self.enabled:
            return y
        A, B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)                                 # (2, 8), (6, 2)
        h = self.scaling * F.linear(self.dropout(x), A)                                         # (..., 2)
        y += F.linear(h, B)     # in place: y, product and sum never lie side by side             (..., 6)
        return y

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """Returns W + alpha / r * B A in the dtype of W."""
        if not isinstance(self.base, nn.Linear):
            raise ValueError("an adapter cannot be merged into a quantized matrix, or into another adapter, and taken "
                             "out again: fold the first one, which gives a full-precision model, then quantize that")
        return add_product(self.base.weight, self.lora_A, self.lora_B, self.scaling).to(self.base.weight.dtype)


def add_product(W: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """Returns W + scaling * B A in fp32. Rounding B A to bf16 before the sum costs measurable quality."""
    return W.float() + scaling * (B.float() @ A.float())                                        # (6, 8)


# ---- attaching, switching off, merging ------------------------------------------------------------------------------

def attach(model: nn.Module, rank: int, alpha: float | None = None, dropout: float = 0.0,
           targets: tuple[str, ...] = LINEARS, generator: torch.Generator | None = None) -> list[str]:
    """Freezes model and puts an adapter on each linear whose last name part is in targets; returns their names.

    alpha None is 2 * rank. A reward head is frozen too, until rm.py unfreezes it. Raises ValueError, with the model
    untouched, where rank or targets do not fit.
    """
    present = linears(model)
    chosen = {name: module for name, module in present.items() if last(name) in targets}
    if unknown := sorted({*targets} - {last(name) for name in chosen}):
        raise ValueError(f"no linear of the model is called {', '.join(unknown)}: choose targets among "
                         f"{', '.join(sorted({last(name) for name in present}))}")
    for name, module in chosen.items():
        sides = module.out_features, module.in_features
        if not 1 <= rank <= min(sides):
            raise ValueError(f"LoRA rank {rank} does not fit {name}, which is {sides[0]} x {sides[1]}: "
                             f"choose between 1 and {min(sides)}")
    usual = 2 * rank if alpha is None else alpha
    install(model, {name: (rank, usual) for name in chosen}, dropout, torch.float32, generator)
    return list(chosen)


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """Returns the adapted matrices by name, in the model's order; empty when there are none.

    An adapter on which another one was put belongs to the base."""
    return {name: module for name, module in model.named_modules()
            if isinstance(module, LoRALinear) and last(name) != "base"}


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the model is its base; afterwards every adapter is as it was, also after an exception and when nested.

    Raises ValueError while merged, and without adapters: the reference model would be the policy, and the KL always 0.
    """
    layers = required(model)
    if any(layer.merged for layer in layers):
        raise ValueError("adapters cannot be switched off while they are merged into the base: "
                         "call unmerge(model) first")
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before):
            layer.enabled = enabled


def merge(model: nn.Module) -> None:
    """Replaces every W by W + alpha / r * B A, so that adapters cost no time; a second call does nothing.

    The originals stay in memory for unmerge. While merged, A and B have no gradient. ValueError without adapters.
    """
    for layer in required(model):
        if not layer.merged:
            weight = layer.merged_weight()
            layer.original, layer.base.weight.data = layer.base.weight.data, weight


def unmerge(model: nn.Module) -> None:
    """Puts the original weights back, to the bit; does nothing where nothing is merged. ValueError without adapters."""
    for layer in required(model):
        if layer.merged:
            layer.base.weight.data, layer.original = layer.original, None


def fold(model: nn.Module) -> None:
    """Merges for good: plain linears again, and every parameter trainable as after from_pretrained.

    A quantized base becomes a full-precision one, since its grid has no place for what an adapter adds. ValueError
    without adapters.
    """
    required(model)
    trunk = getattr(model, "trunk", model)
    if getattr(trunk, "quantized", None):
        trunk.quantized = None
        dtype = next(trunk.parameters()).dtype
        for name, module in list(model.named_modules()):
            if hasattr(module, "plain"):  # a quantized linear; plain() is an nn.Linear with its weights
                replace(model, name, module.plain(dtype))
    for name, layer in adapters(model).items():
        if not layer.merged:
            layer.base.weight.data = layer.merged_weight()
        replace(model, name, layer.base)
    model.requires_grad_(True)


def trainable_report(model: nn.Module) -> tuple[int, int]:
    """Returns the numbers of (trainable, all) parameters; tied ones count once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def twin(model: nn.Module) -> nn.Module:
    """Returns a copy that holds the very same frozen parameters and buffers: only trainable parameters are copied.

    A new adapter on either changes nothing in the other, so models on one base need its memory once."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors if not tensor.requires_grad})


# ---- inside a model -------------------------------------------------------------------------------------------------

def required(model: nn.Module) -> list[LoRALinear]:
    """Returns the adapters of a model that must have some."""
    layers = list(adapters(model).values())
    if not layers:
        raise ValueError("the model has no adapters: "
                         "call lora.attach(model, rank) or lora.load_adapter(model, path) first")
    return layers


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the linear layers by name: plain, quantized or adapted."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "in_features")}


def last(name: str) -> str:
    """Returns the last part of a module's name: layers.0.attention.wq -> wq."""
    return name.rpartition(".")[2]


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    setattr(model.get_submodule(name.rpartition(".")[0]), last(name), module)


def install(model: nn.Module, plan: dict[str, tuple[int, float]], dropout: float, dtype: torch.dtype,
            generator: torch.Generator | None) -> None:
    """Puts adapters on the linears named in plan, name -> (rank, alpha), and freezes all else."""
    if any(layer.lora_A.requires_grad for layer in adapters(model).values()):
        raise ValueError("the model already has adapters: before adding new ones fold(model) them into the base, or "
                         "freeze them")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"LoRA dropout is {dropout}, it must be at least 0 and below 1")
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name in plan:
        if owners[id(getattr(model.get_submodule(name), "weight", None))] > 1:
            raise ValueError(f"{name} shares its weight with another module, which a merge would change too: "
                             "leave it out of the targets")
    model.requires_grad_(False)
    for name, (rank, alpha) in plan.items():
        replace(model, name, LoRALinear(model.get_submodule(name), rank, alpha, dropout, dtype, generator))


# ---- PEFT's files ---------------------------------------------------------------------------------------------------

CONFIG, (WEIGHTS, PICKLE) = weights.ADAPTER_CONFIG, weights.ADAPTER_WEIGHTS
PREFIX = "base_model.model."  # of every tensor in PEFT's files


def peft_name(name: str) -> str:
    """Returns PEFT's name of a module, without the prefix. In a reward model it is that of the causal model."""
    return weights.hf_name(name.removeprefix("trunk."))


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Returns A and B of each adapted matrix, and a reward model's head, under PEFT's names; they are not copied."""
    state = {}
    for name, layer in adapters(model).items():
        for half in ("lora_A", "lora_B"):
            state[f"{PREFIX}{peft_name(name)}.{half}.weight"] = getattr(layer, half).detach()
    if hasattr(model, "score"):
        state[f"{PREFIX}score.weight"] = model.score.weight.detach()
    return state


def save_adapter(model: nn.Module, path: str | Path, base: str, extra: dict | None = None) -> None:
    """Writes adapter_config.json and adapter_model.safetensors into the folder path, so that PEFT opens it.

    base is written as given: an absolute path, or one relative to path. extra adds keys of our own to the config, such
    as a reward model's reward_mean. Raises ValueError when the model has no adapters, rather than write an empty file.
    """
    required(model)
    layers = {peft_name(name): layer for name, layer in adapters(model).items()}
    # "r" and "lora_alpha" are the first layer's. A layer with others (read from a file) is listed in a pattern.
    first = next(iter(layers.values()))
    # q_proj means every q_proj of the model. If one of them has no adapter, all adapted layers are listed by full name.
    adapted = {last(name) for name in layers}
    bare = {last(peft_name(name)) for name, module in linears(model).items() if not isinstance(module, LoRALinear)}
    reward = hasattr(model, "score")
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if reward else "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout.p,
        "bias": "none",
        "target_modules": sorted(layers if bare & adapted else adapted),
        "modules_to_save": ["score"] if reward else None,
        "rank_pattern": {name: layer.rank for name, layer in layers.items() if layer.rank != first.rank},
        "alpha_pattern": {name: layer.alpha for name, layer in layers.items() if layer.alpha != first.alpha},
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    weights.write_tensors(Path(path) / WEIGHTS, adapter_state(model))
    # The config is written last, since a folder that has one counts as an adapter.
    weights.write_json(Path(path) / CONFIG, config | (extra or {}))


# CHECKS: what the keys of adapter_config.json may hold, unless they are null. A key of LEFT_OUT asks for more than a
# plain B A: it changes what the layer computes, or what the file holds. An init_lora_weights of ALTERS_BASE changes the
# base too, from which it takes the first B A out.
PLAIN = ", lora.py adds a plain B A: merge the adapter with PEFT's merge_and_unload and use the merged model"
ALTERS_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
LEFT_OUT = (
    "use_dora", "lora_bias", "use_qalora", "use_bdlora", "layer_replication", "layers_to_transform", "exclude_modules",
    "target_parameters", "trainable_token_indices", "alora_invocation_tokens", "arrow_config", "kasa_config",
    "monteclora_config",
)


def are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def is_expression(value: object) -> bool:
    try:
        return bool(re.compile(value))
    except (re.error, TypeError):
        return False


def is_pattern(value: object) -> bool:
    return isinstance(value, dict) and all(is_expression(key) and weights.is_number(n) for key, n in value.items())


PATTERN = ("regular expressions with numbers", is_pattern)
NUMBER = ("a finite number", weights.is_number)
CHECKS = {
    "r": weights.whole(2**20),
    "lora_alpha": NUMBER,
    "lora_dropout": ("a number from 0 to below 1", lambda value: weights.is_number(value) and 0 <= value < 1),
    "reward_mean": NUMBER,
    "pad_token_id": weights.ID,
    "target_modules": ("names or a regular expression", lambda value: are_names(value) or is_expression(value)),
    "rank_pattern": PATTERN,
    "alpha_pattern": PATTERN,
    "use_rslora": ("true or false", lambda value: type(value) is bool),
    "base_model_name_or_path": ("text", lambda value: isinstance(value, str)),
    "peft_type": (f"LORA{PLAIN}", lambda value: value == "LORA"),
    "bias": (f"none{PLAIN}", lambda value: value == "none"),
    "modules_to_save": (f"score{PLAIN}", lambda value: are_names(value) and {*value} <= {"score", "classifier"}),
    "init_lora_weights": (f"left out{PLAIN}", lambda value: not str(value).lower().startswith(ALTERS_BASE)),
    **dict.fromkeys(LEFT_OUT, (f"left out{PLAIN}", lambda value: not value)),
}


def read_adapter_config(path: str | Path) -> dict:
    """Returns adapter_config.json without its nulls. Raises ValueError where it asks for what we do not compute."""
    file = Path(path) / CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{path} has no {CONFIG}: name the folder of a LoRA adapter")
    weights.is_adapter(path)  # refuses one beside a model that is not its base
    config = {key: value for key, value in weights.read_json(file).items() if value is not None}
    needed = {"r": None, "lora_alpha": None, "target_modules": None}
    weights.check(needed | config, CHECKS, file)
    return config


def base_path(path: str | Path) -> Path:
    """Returns the folder of a model's full weights: its own, or of an adapter the base's. The name of a base is
    absolute, else relative to the adapter's folder, else to the current one."""
    if not weights.is_adapter(path):
        return Path(path)
    named = read_adapter_config(path).get("base_model_name_or_path")
    for folder in (Path(path) / named, Path(named)) if named else ():
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"{path} names its base as {named!r}, which is no folder seen from the adapter or from "
                            f"here: put the weights there or correct base_model_name_or_path in {CONFIG}")


def home(path: str | Path) -> Path:
    """Returns where tokenizer and template lie: the directory, or the base of an adapter that has none."""
    return Path(path) if text.has_tokenizer(path) else base_path(path)


def read_adapter(path: str | Path) -> dict[str, Tensor]:
    """Returns the adapter's tensors, names without the prefix and without the name that PEFT gives an adapter."""
    file = Path(path) / WEIGHTS
    if not file.is_file():
        file = Path(path) / PICKLE
    if not file.is_file():
        raise FileNotFoundError(f"{path} has {CONFIG} but neither {WEIGHTS} nor {PICKLE}: copy the weights too")
    tensors = {}
    for name, stored in weights.open_tensors(file).items():
        if not stored.dtype.is_floating_point:
            raise ValueError(f"{file} has {stored.dtype} in {name}, an adapter has floats: get the adapter's own file")
        cut = re.sub(r"\.(default|modules_to_save)(?=\.)", "", name.removeprefix(PREFIX))
        tensors[cut] = stored.read()
    return tensors


def targeted(targets: str | list[str], name: str) -> bool:
    """Tells whether PEFT's target_modules mean the module of this Hugging Face name."""
    if name == "score":
        return False  # modules_to_save names it
    if targets == "all-linear":
        return name != "lm_head"
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def pattern(patterns: dict, name: str, default: float) -> float:
    """Returns the value of the first key that matches the end of the name, from a dot on, as PEFT does."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def load_adapter(model: nn.Module, path: str | Path) -> dict:
    """Attaches the adapter in the folder path, ours or PEFT's, to a model that is its base; returns its config.

    A and B keep the file's dtype, so nothing is rounded before a merge. A reward model's head is read too, and frozen
    like the rest; its trunk alone skips it. Raises ValueError, with the model untouched, when names or shapes do not
    fit.
    """
    config, tensors = read_adapter_config(path), read_adapter(path)
    plan, wanted = {}, []
    for name, module in linears(model).items():
        theirs = peft_name(name)
        if targeted(config["target_modules"], theirs):
            rank = pattern(config.get("rank_pattern", {}), theirs, config["r"])
            alpha = pattern(config.get("alpha_pattern", {}), theirs, config["lora_alpha"])
            if config.get("use_rslora"):
                alpha *= math.sqrt(rank)  # alpha / r becomes rsLoRA's alpha / sqrt(r)
            plan[name] = (rank, alpha)
            wanted.append(f"{theirs}.lora_A.weight {(rank, module.in_features)}")
            wanted.append(f"{theirs}.lora_B.weight {(module.out_features, rank)}")
    if hasattr(model, "score") or model.output is None and config.get("task_type") == "SEQ_CLS":
        wanted.append(f"score.weight {(1, getattr(model, 'trunk', model).config.dim)}")
    weights.compare([f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items()], wanted,
                    f"{path} does not fit this model", f"load its base, {config.get('base_model_name_or_path')}")
    if not plan:
        raise ValueError(f"{path} targets no matrix of this model: correct target_modules in {CONFIG}")
    dtype = next(tensor.dtype for name, tensor in tensors.items() if "lora_A" in name)
    # A is drawn here and overwritten below. A generator of its own leaves the caller's random state as it was.
    install(model, plan, config.get("lora_dropout", 0.0), dtype, torch.Generator())
    for name, parameter in adapter_state(model).items():
        parameter.copy_(tensors[name.removeprefix(PREFIX)])
    return config


# ---- command line ---------------------------------------------------------------------------------------------------

def sum_of(W: weights.Stored, A: Tensor, B: Tensor, scaling: float) -> weights.Stored:
    """Returns W + scaling * B A as a Stored, so that write_model computes it in fp32 when it writes it."""
    return W._replace(dtype=torch.float32, read=lambda: add_product(W.read(), A, B, scaling))


def main(argv: list[str] | None = None) -> dict:
    parser = run.Parser("Merge a LoRA adapter into its base and write an ordinary Hugging Face model.")
    parser.add_argument("command", choices=["merge"])
    parser.add_argument("adapter", type=Path, help="folder with adapter_config.json, ours or PEFT's")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--dtype", default="auto", choices=["auto", "fp32", "bf16", "fp16"],
                        help="to write; auto is the base's")
    args = parser.parse_args(argv)

    config, base = read_adapter_config(args.adapter), base_path(args.adapter)
    if weights.is_adapter(args.out) or args.out.resolve() == base.resolve():
        raise ValueError(f"{args.out} is the base or an adapter: name a folder of its own for the merged model")
    if weights.quantization(base):
        raise ValueError(f"{base} is quantized, its grid has no place for what an adapter adds: name the original "
                         f"model as base_model_name_or_path in {args.adapter / CONFIG}, merge, and then quantize the "
                         f"result with `python quantize.py {args.out}`")
    reward = config.get("task_type") == "SEQ_CLS"
    fields = weights.read_config(base)
    tensors = weights.read_tensors(base, fields)
    with torch.device("meta"):  # a model without memory: it checks that base and adapter fit, and gives the names
        model = Llama(LlamaConfig(**fields), head=not reward)
    weights.check_tensors(model, tensors, base)
    written = {name: tensors[name] for name, _ in model.named_parameters()}
    load_adapter(model, args.adapter)
    adapter = read_adapter(args.adapter)
    for name, layer in adapters(model).items():
        A, B = (adapter[f"{peft_name(name)}.lora_{half}.weight"] for half in "AB")              # (2, 8), (6, 2)
        written[f"{name}.weight"] = sum_of(tensors[f"{name}.weight"], A, B, layer.scaling)
    if reward:
        written["score.weight"] = adapter["score.weight"]
        fields["extra"] = {key: config[key] for key in ("reward_mean", "pad_token_id") if key in config}
    if args.dtype != "auto":
        fields["dtype"] = str(weights.DTYPES[args.dtype]).removeprefix("torch.")
    weights.write_model(args.out, fields, written,
                        "LlamaForSequenceClassification" if reward else "LlamaForCausalLM")
    folder = home(args.adapter)
    with suppress(FileNotFoundError):  # a base without a tokenizer gives a model without one
        text.Tokenizer(folder).save(args.out, text.read_template(args.adapter) or text.read_template(folder))
    print(f"wrote {args.out}, {len(adapters(model))} matrices merged, in {fields['dtype']}")
    return {"matrices": len(adapters(model)), "dtype": fields["dtype"]}


if __name__ == "__main__":
    run.command(main)
