"""What belongs to no single module: README's commands and samples are run, and the house keeps its rules."""

import json
import re
import shlex
from pathlib import Path

import pytest

import data.records
import data.run
import data.text
import ppo
import quantize
import rm
import serve
import sft

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
STAGES = {"sft.py": sft, "rm.py": rm, "ppo.py": ppo, "quantize.py": quantize, "serve.py": serve}


def commands() -> list[list[str]]:
    """Every command of README that runs one of our files: [file, flag, value, ...]."""
    found = []
    for line in "".join(BLOCKS).splitlines():
        for part in line.split("&&"):
            words = shlex.split(part, comments=True) if part.strip().startswith(("python ", "torchrun ", "pip ")) else []
            scripts = [i for i, word in enumerate(words) if (ROOT / word).is_file() and word.endswith(".py")]
            found += [words[i:] for i in scripts]
    return found


def test_readme_names_the_two_commands_that_ci_runs():
    """S24: commands that nobody runs rot."""
    assert "pip install -r requirements.txt && torchrun sft.py && torchrun rm.py && torchrun ppo.py && python quantize.py && python serve.py out/ppo --benchmark\n" in BLOCKS
    assert "pip install -r requirements.txt && pytest\n" in BLOCKS
    assert "\npip install -r requirements.txt && pytest\n" in (ROOT / ".ci" / "run").read_text()


def test_readme_commands_parse(tmp_path, monkeypatch):
    found = commands()
    assert {command[0] for command in found} >= {"sft.py", "rm.py", "ppo.py", "model.py", "lora.py", "quantize.py", "serve.py"}
    monkeypatch.chdir(tmp_path)
    for name in ("sft", "rm", "ppo"):  # what the first stages write
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / "config.json").touch()
    for script, *flags in found:
        if script in STAGES:
            STAGES[script].parse(flags)
        else:
            known = (ROOT / script).read_text("utf-8")
            for flag in (word for word in flags if word.startswith("--")):
                assert f'"{flag}"' in known, f"README: {script} has no {flag}"


def test_every_published_coati_flag_is_taken():
    """The single-GPU command of the Coati README, verbatim but for the script's name and the two paths."""
    args = sft.parse(shlex.split("--pretrain /path/to/LLaMa-7B/ --model 'llama' --strategy naive --log_interval 10 --save_path /path/to/Coati-7B --dataset /path/to/data.json "
                                 "--batch_size 1 --accimulation_steps 8 --lr 2e-5 --max_datasets_size 512 --max_epochs 1 --lora_rank 16"))
    assert (args.accumulation_steps, args.lr, args.max_datasets_size, args.max_epochs, args.lora_rank, args.batch_size) == (8, 2e-5, 512, 1, 16, 1)


def test_readme_samples_of_every_format_are_read(tmp_path):
    """S22: one sample of each file."""
    lines = [line for block in BLOCKS for line in block.splitlines() if line.startswith("{") and not line.startswith('{"id"')]  # that one is the server's answer
    kinds = set()
    for i, line in enumerate(lines):
        record, after = json.JSONDecoder().raw_decode(line)
        stage = line[after:].strip().split(":")[0].split(",")[0]
        kind = {"sft": "sft", "rm": "preference", "ppo": "prompt"}[stage]
        file = tmp_path / f"{i}.jsonl"
        file.write_text(json.dumps(record))
        assert len(data.records.read_records([file], kind)) == 1
        kinds.add(kind)
    assert kinds == {"sft", "preference", "prompt"} and len(lines) == 8


@pytest.mark.parametrize("script", ["sft.py", "rm.py", "ppo.py", "model.py"])
def test_help_explains_every_flag(script):
    lines = [line for line in (ROOT / script).read_text("utf-8").splitlines() if "parser.add_argument(" in line]
    assert lines and [line.strip() for line in lines if "help=" not in line] == []


# From the ground up; a file may import those that stand before it.
HOUSE = ["data/weights", "data/text", "data/records", "data/demo", "data/run", "model", "lora", "zero", "quantize", "sft", "rm", "ppo", "serve"]


def test_imports_go_one_way():
    """Nothing imports what stands above it."""
    for place, name in enumerate(HOUSE):
        source = (ROOT / f"{name}.py").read_text("utf-8")
        below = {other.rpartition("/")[2] for other in HOUSE[:place]}
        ours = {other.rpartition("/")[2] for other in HOUSE}
        named = set(re.findall(r"^(?:from|import) (?:data\.)?(\w+)", source, re.MULTILINE))
        for line in re.findall(r"^from data import (.*)$", source, re.MULTILINE):
            named |= set(line.split(", "))
        assert named & ours <= below, f"{name}.py imports {named & ours - below}"
