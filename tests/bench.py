"""Every benchmark of the house: what a step takes here, beside a peer or another checkout, taking turns in one run.

    python tests/bench.py decode tiny mid --batch 1 16 [--dtype bf16]  decoding, tokens a second
    python tests/bench.py quantize mid --batch 1 16                    the same, plain, in 8 and in 4 bits
    python tests/bench.py sft tiny mid                                 an update: forward, backward, clipping, AdamW
    python tests/bench.py lora mid                                     the same with adapters of rank 8
    python tests/bench.py zero mid --strategy ddp zero2 zero2_cpu      the same on two processes
    python tests/bench.py ppo tiny                                     64 answers of 32 tokens, and 4 minibatches
    python tests/bench.py adamw                                        100 million parameters, beside torch's
      --device cuda    on a GPU; memory is then what tensors took there
      --peer VENV      beside transformers (and PEFT) of another virtual environment: decode, sft, lora, ppo
      --against TREE   beside another checkout of Octet

Weights and tokens are random: for speed they are as good as others. Each contender is a process of its own that is told
when to work, one turn each in rotation, so whatever else the machine does meets all alike. Figures are medians over the
turns after the first; a ratio above 1 says that this tree is faster, or takes less memory, than the line's contender.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
PROMPT, NEW = 32, 64                                    # decode, quantize: tokens of a prompt, and new ones
ROWS = {"tiny": 8, "small": 8, "mid": 4, "big": 1}      # sft, lora, zero: examples of an update
LENGTH = 256                                            # and their tokens
RANK = 8                                                # lora


# ---- the driver: contenders take turns ------------------------------------------------------------------------------

class Contender:
    """A worker process. It prints a JSON line when it is ready, and one after each turn that it is told to take."""

    def __init__(self, name: str, python: str, tree: Path, task: dict):
        self.name = name
        command = [python, __file__, "--worker", json.dumps(task | {"tree": str(tree)})]
        environment = os.environ | {"PYTHONPATH": str(tree)}
        if task["kind"] == "zero":
            command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 2) // 2))
        self.process = subprocess.Popen(
            command, cwd=tree, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.answer()

    def answer(self) -> dict:
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"{self.name} ended before its turn: see above")

    def turn(self) -> dict:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.answer()

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def take_turns(contenders: list[Contender], turns: int) -> list[dict]:
    """Of each contender the median rate and the peak memory over `turns` turns; one more warms up."""
    rates = [[] for _ in contenders]
    for i in range(turns + 1):
        for contender, kept in zip(contenders, rates):
            row = contender.turn()
            if i:
                kept.append(row["rate"])
            contender.peak = row["peak"]
    return [{"name": c.name, "rate": statistics.median(kept), "peak": c.peak} for c, kept in zip(contenders, rates)]


def compare(task: dict, args: argparse.Namespace) -> None:
    """One line for each contender of a task."""
    contenders = [Contender("octet", sys.executable, HERE, task)]
    if args.against:
        contenders.append(Contender(args.against.name, sys.executable, args.against.resolve(), task))
    if args.peer and task["kind"] in ("decode", "sft", "lora", "ppo"):
        contenders.append(Contender("peer", str(args.peer.resolve() / "bin" / "python"), HERE, task | {"peer": True}))
    rows = take_turns(contenders, args.turns)
    for contender in contenders:
        contender.stop()
    what = " ".join(f"{key} {value}" for key, value in task.items() if key != "kind")
    for row in rows:
        faster, smaller = rows[0]["rate"] / row["rate"], row["peak"] / rows[0]["peak"]
        print(f"{task['kind']:<9}{what:<48}{row['name']:<12}{row['rate']:>12,.1f} {args.unit:<10}"
              f"{row['peak'] / 1e9:>6.2f} GB{faster:>8.2f}x{smaller:>8.2f}x", flush=True)


# ---- the worker -----------------------------------------------------------------------------------------------------

def peak_memory(device: str) -> int:
    if device == "cuda":
        import torch
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def finished(device: str) -> float:
    """The time at which the device has done all that it was given."""
    if device == "cuda":
        import torch
        torch.cuda.synchronize()
    return time.perf_counter()


def serve_turns(turn, device: str, rank: int = 0) -> None:
    """Take a turn for every line on standard input. turn() -> units a second."""
    if rank == 0:
        print(json.dumps({"ready": True}), flush=True)
        for _ in sys.stdin:
            print(json.dumps({"rate": turn(), "peak": peak_memory(device)}), flush=True)


def torch_dtype(name: str):
    import torch
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def random_rows(rows: int, length: int, vocab: int, seed: int = 0):
    import torch
    return torch.randint(3, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def decode(task: dict) -> None:
    """Tokens a second after the first one, greedy, EOS ignored."""
    import torch
    import model as M
    model = M.random_model(M.SHAPES[task["shape"]], torch_dtype(task["dtype"]), task["device"]).eval()
    if task.get("bits"):
        quantize_to(model, task["bits"])
    prompts = random_rows(task["batch"], PROMPT, model.config.vocab_size).tolist()

    def turn() -> float:
        steps = model.generate_steps(prompts, NEW, temperature=0, eos_id=-1)
        next(steps)
        began = finished(task["device"])
        for _ in steps:
            pass
        return task["batch"] * (NEW - 1) / (finished(task["device"]) - began)
    with ExitStack() as stack, torch.inference_mode():
        stack.enter_context(ready_to_generate(model, task["batch"]))
        serve_turns(turn, task["device"])


def quantize_to(model, bits: int) -> None:
    """Round to nearest, the head too where it is not the embedding."""
    import quantize
    head = not model.config.tie_embeddings
    if bits == 8:
        quantize.quantize_model(model, quantize.Scheme("rtn", 8, -1, True, clip=False, head=head))
    else:
        quantize.quantize_model(model, quantize.Scheme("rtn", 4, 128, clip=False, head=head))


def ready_to_generate(model, batch: int):
    """What each tree does before it generates: ours packs, 34964a8 fused."""
    import quantize
    if hasattr(quantize, "packed"):
        return quantize.packed(model, keep=False)  # as serve.py does: the weights are not held twice
    model.fuse(batch)
    return ExitStack()


def processes():
    """The module that starts and stops processes: data/run.py, in 34964a8 zero.py."""
    try:
        from data import run
    except ImportError:
        import zero as run
    return run


def update(task: dict) -> None:
    """Tokens a second of training: sft, lora, zero."""
    import torch
    world = processes().start(task["device"], task.get("strategy", "ddp"))
    import lora
    import sft
    import zero
    from model import SHAPES, Llama
    dtype = torch_dtype(task["dtype"])
    model = Llama(SHAPES[task["shape"]], generator=torch.Generator().manual_seed(0)).train()
    model.to(task["device"])
    if task["kind"] == "lora":
        for p in model.parameters():
            p.data = p.data.to(dtype)
        lora.attach(model, RANK)
    optimizer = zero.ZeRO2(model.named_parameters(), dtype, strategy=task.get("strategy", "ddp"))
    rows = max(1, ROWS[task["shape"]] // world.world)
    tokens = random_rows(rows, LENGTH, model.config.vocab_size, seed=world.rank)
    target = torch.ones_like(tokens, dtype=torch.bool)
    target[:, 0] = False

    def turn() -> float:
        began = finished(task["device"])
        optimizer.backward(sft.lm_loss(model, tokens, target) / (target.sum() * world.world))
        optimizer.step(1e-4)
        return world.world * tokens.numel() / (finished(task["device"]) - began)
    if world.world == 1:
        return serve_turns(turn, task["device"])
    follow(turn, task["device"], world.rank)
    processes().stop()


def follow(turn, device: str, rank: int) -> None:
    """Several processes: rank 0 is told when to take a turn, and tells the others."""
    import torch
    go = torch.ones(1)

    def turn_of_all() -> float:
        torch.distributed.broadcast(go, 0)
        return turn()
    serve_turns(turn_of_all, device, rank)
    if rank == 0:
        torch.distributed.broadcast(torch.zeros(1), 0)
        return
    torch.distributed.broadcast(go, 0)
    while go.item():
        turn()
        torch.distributed.broadcast(go, 0)


def ppo_iteration(task: dict) -> None:
    """Answers a second: rollout, scoring and update, as metrics.jsonl of the command has them."""
    import torch
    import ppo
    import rm
    from model import SHAPES, Llama
    try:
        from data.text import Tokenizer
    except ImportError:
        from model import Tokenizer
    folder, demo = Path(tempfile.mkdtemp()), HERE / "data" / "demo"
    generator = torch.Generator().manual_seed(0)
    model = Llama(SHAPES[task["shape"]], generator=generator)
    model.save_pretrained(folder / "sft")
    trunk = Llama(SHAPES[task["shape"]], head=False, generator=generator)
    rm.RewardModel(trunk, generator).save_pretrained(folder / "rm")
    tokenizer = Tokenizer(demo)
    for name in ("sft", "rm"):
        tokenizer.save(folder / name, "plain")
    prompt = tokenizer.decode(tokenizer.encode("One day a fox and a bear walked to the lake. " * 9)[:16])  # 32 in all
    prompts = [{"prompt": f"{i} {prompt}"} for i in range(64)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)), encoding="utf-8")
    flags = ["--pretrain", folder / "sft", "--rm_path", folder / "rm", "--prompt_dataset", folder / "prompts.jsonl",
             "--save_path", folder / "out", "--num_episodes", 1, "--max_timesteps", 1, "--update_timesteps", 1,
             "--max_epochs", 1, "--experience_batch_size", 64, "--train_batch_size", 16, "--max_input_len", 48,
             "--max_seq_len", 64, "--eval_size", 1, "--target_kl", 0, "--save_interval", 0, "--lr", 1e-6,
             "--dtype", task["dtype"], "--device", task["device"]]

    def turn() -> float:
        with open(os.devnull, "w") as quiet:
            printed, sys.stdout = sys.stdout, quiet
            try:
                ppo.main([str(flag) for flag in flags])
            finally:
                sys.stdout = printed
        row = json.loads((folder / "out" / "metrics.jsonl").read_text("utf-8").splitlines()[-1])
        return 64 / (row["seconds/rollout"] + row["seconds/scoring"] + row["seconds/update"])
    serve_turns(turn, task["device"])


def adamw(task: dict) -> None:
    """Gigabytes a second of one AdamW step on 100 million fp32 parameters with a bf16 copy (30 bytes a parameter)."""
    import torch
    import zero
    n = 100_000_000
    device = task["device"]
    processes().start(device, "ddp")
    p, g, m, v = (scale * torch.randn(n, device=device) for scale in (0.02, 1e-3, 0.0, 0.0))
    low = torch.zeros(n, dtype=torch.bfloat16, device=device)
    lone = torch.nn.Parameter(p.clone())
    lone.grad = g.clone()
    reference = torch.optim.AdamW([lone], lr=1e-4, weight_decay=0.01, fused=True)
    source, copy = (torch.ones(n * 30 // 8, device=device) for _ in range(2))

    def theirs() -> None:
        reference.step()
        low.copy_(lone.detach())
    work = {"ours": lambda: zero.fused_adamw(p, g, m, v, low, 2, 1e-4, (0.9, 0.95), 1e-8, 0.01),
            "torch": theirs, "copy": lambda: copy.copy_(source)}[task["by"]]

    def turn() -> float:
        began = finished(device)
        work()
        return 30e-9 * n / (finished(device) - began)
    serve_turns(turn, device)


# ---- peers ----------------------------------------------------------------------------------------------------------

def peer_model(task: dict):
    """A LLaMA of transformers of the same shape."""
    from transformers import LlamaConfig, LlamaForCausalLM
    sizes = {"tiny": (256, 6, 8, 4, 704, 2048), "small": (512, 8, 8, 8, 1376, 32000),
             "mid": (768, 12, 12, 12, 2048, 32000), "big": (2048, 22, 32, 4, 5632, 32000)}[task["shape"]]
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
             "vocab_size")
    config = LlamaConfig(**dict(zip(names, sizes)), max_position_embeddings=2048, eos_token_id=None,
                         attn_implementation="sdpa")
    return LlamaForCausalLM(config).to(task["device"], torch_dtype(task["dtype"]))


def peer_decode(task: dict) -> None:
    import torch
    model = peer_model(task).eval()
    prompts = random_rows(task["batch"], PROMPT, model.config.vocab_size).to(task["device"])
    stamps = []

    class Stamp:
        """What generate calls after every step."""

        def put(self, value) -> None:
            stamps.append(time.perf_counter())

        def end(self) -> None:
            stamps.append(time.perf_counter())

    def turn() -> float:
        stamps.clear()
        model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=NEW, min_new_tokens=NEW,
                       do_sample=False, pad_token_id=0, streamer=Stamp())
        return task["batch"] * (NEW - 1) / (stamps[NEW] - stamps[1])  # the first put is the prompt
    with torch.inference_mode():
        serve_turns(turn, task["device"])


def peer_update(task: dict) -> None:
    import torch
    model = peer_model(task).train()
    if task["kind"] == "lora":
        from peft import LoraConfig, get_peft_model
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    tokens = random_rows(ROWS[task["shape"]], LENGTH, model.config.vocab_size).to(task["device"])

    def turn() -> float:
        began = finished(task["device"])
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return tokens.numel() / (finished(task["device"]) - began)
    serve_turns(turn, task["device"])


def peer_ppo(task: dict) -> None:
    """The iteration of ppo_iteration as a plain loop: generate, four models score, actor and critic learn.

    Its prompts are as long, and all answers go to the limit, as they nearly always do with random weights. The
    heads see response tokens only."""
    import torch
    import torch.nn.functional as F
    actor, ref, critic, reward = (peer_model(task) for _ in range(4))
    size, kind = actor.config.hidden_size, dict(device=actor.device, dtype=actor.dtype)
    heads = [torch.nn.Linear(size, 1, bias=False, **kind) for _ in range(2)]
    learning = [[*actor.parameters()], [*critic.model.parameters(), *heads[0].parameters()]]
    optimizers = [torch.optim.AdamW(parameters, lr=1e-6, fused=True) for parameters in learning]
    start, end = 32, 64
    prompts = random_rows(64, start, actor.config.vocab_size).to(task["device"])

    def logprobs(model, rows):
        h = model.model(rows, use_cache=False).last_hidden_state[:, start - 1:-1]
        logp = model.lm_head(h).float().log_softmax(-1)
        return logp.gather(2, rows[:, start:, None]).squeeze(2)

    def values(model, head, rows):
        return head(model.model(rows, use_cache=False).last_hidden_state[:, start - 1:-1]).squeeze(2)

    def turn() -> float:
        began = finished(task["device"])
        with torch.no_grad():
            rows = actor.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=end - start,
                                  min_new_tokens=end - start, do_sample=True, top_k=0, pad_token_id=0)
            parts = [(logprobs(actor, part), logprobs(ref, part), values(critic, heads[0], part),
                      values(reward, heads[1], part)) for part in rows.split(16)]
            old, ref_logp, value, score = (torch.cat(x) for x in zip(*parts))
            rewards = -0.1 * (old - ref_logp)
            rewards[:, -1] += score[:, -1]
            adv, last = torch.zeros_like(rewards), 0.0
            for t in reversed(range(end - start)):
                after = value[:, t + 1] if t + 1 < end - start else 0.0
                last = rewards[:, t] + after - value[:, t] + 0.95 * last
                adv[:, t] = last
            ret, adv = adv + value, (adv - adv.mean()) / (adv.std() + 1e-8)
        for part in torch.randperm(64).split(16):
            ratio = (logprobs(actor, rows[part]) - old[part]).exp()
            torch.max(-ratio * adv[part], -ratio.clamp(0.8, 1.2) * adv[part]).mean().backward()
            F.mse_loss(values(critic, heads[0], rows[part]), ret[part]).backward()
            for optimizer, parameters in zip(optimizers, learning):
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return 64 / (finished(task["device"]) - began)
    serve_turns(turn, task["device"])


def work(task: dict) -> None:
    """A worker's main. The folder of this script is not where modules of the measured tree lie."""
    sys.path[:] = [task["tree"], *(path for path in sys.path if Path(path or ".").resolve() != HERE / "tests")]
    kind = task["kind"]
    if task.get("peer"):
        return {"decode": peer_decode, "ppo": peer_ppo}.get(kind, peer_update)(task)
    if kind == "decode" or kind == "quantize":
        return decode(task)
    if kind == "ppo":
        return ppo_iteration(task)
    return adamw(task) if kind == "adamw" else update(task)


# ---- command line ---------------------------------------------------------------------------------------------------

UNITS = {"decode": "tokens/s", "quantize": "tokens/s", "ppo": "answers/s", "adamw": "GB/s"}


def tasks_of(args: argparse.Namespace) -> list[dict]:
    if args.kind == "adamw":
        return [{"kind": "adamw", "by": by, "device": args.device} for by in ("ours", "torch", "copy")]
    tasks = []
    for shape in args.shapes:
        task = {"kind": args.kind, "shape": shape, "dtype": args.dtype, "device": args.device}
        if args.kind == "decode":
            tasks += [task | {"batch": batch} for batch in args.batch]
        elif args.kind == "quantize":
            tasks += [task | {"bits": bits, "batch": batch} for batch in args.batch for bits in (0, 8, 4)]
        elif args.kind == "zero":
            tasks += [task | {"strategy": strategy} for strategy in args.strategy]
        else:
            tasks.append(task)
    return tasks


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        return work(json.loads(sys.argv[2]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["decode", "quantize", "sft", "lora", "zero", "ppo", "adamw"])
    parser.add_argument("shapes", nargs="*", default=["tiny"], metavar="SHAPE", help="tiny, small, mid or big (tiny)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="decode, quantize: rows at once (1 16)")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="to compute in (fp32)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="to compute on (cpu)")
    strategies = ["ddp", "zero2", "zero2_cpu"]
    parser.add_argument("--strategy", nargs="+", default=strategies, help="zero: which (ddp zero2 zero2_cpu)")
    parser.add_argument("--turns", type=int, default=5, help="turns that count, after one that warms up (5)")
    parser.add_argument("--peer", type=Path, metavar="VENV", help="a virtual environment with transformers and PEFT")
    parser.add_argument("--against", type=Path, metavar="TREE", help="another checkout of Octet")
    args = parser.parse_args()
    args.unit = UNITS.get(args.kind, "tokens/s")
    print(f"{'':<9}{'':<48}{'':<12}{'rate':>12} {'':<10}{'peak':>9}{'faster':>9}{'smaller':>9}", flush=True)
    for task in tasks_of(args):
        compare(task, args)


if __name__ == "__main__":
    main()
