"""What belongs to no single module: README's commands, samples and line ranges, and the rules of the house."""

import ast
import json
import re
import shlex
from pathlib import Path

import pytest

import ppo
import quantize
import rm
import serve
import sft
from data import records

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
STAGES = {"sft.py": sft, "rm.py": rm, "ppo.py": ppo, "quantize.py": quantize, "serve.py": serve}
# From the ground up: a file may import those that stand before it.
HOUSE = ["data/weights", "data/text", "data/records", "data/measure", "data/demo", "data/run", "data/rules",
         "model", "lora", "zero", "quantize", "sft", "rm", "ppo", "serve"]
# Files of one floor, which may not import one another.
FLOORS = [{"lora", "zero"}, {"sft", "serve"}, {"rm", "serve"}, {"ppo", "serve"}]


# ---- README ---------------------------------------------------------------------------------------------------------

def commands() -> list[list[str]]:
    """Every command of README that runs one of our files: [file, flag, value, ...]."""
    found = []
    for line in "".join(BLOCKS).splitlines():
        for part in line.split("&&"):
            started = part.strip().startswith(("python ", "torchrun ", "pip "))
            words = shlex.split(part, comments=True) if started else []
            scripts = [i for i, word in enumerate(words) if (ROOT / word).is_file() and word.endswith(".py")]
            found += [words[i:] for i in scripts]
    return found


def test_readme_names_the_two_commands_that_ci_runs():
    """Commands that nobody runs rot."""
    stages = "torchrun sft.py && torchrun rm.py && torchrun ppo.py && python quantize.py"
    assert f"pip install -r requirements.txt && {stages} && python serve.py out/ppo --benchmark\n" in BLOCKS
    assert "pip install -r requirements.txt && pytest\n" in BLOCKS
    assert "\npip install -r requirements.txt && pytest\n" in (ROOT / ".ci" / "run").read_text("utf-8")


def test_readme_commands_parse(tmp_path, monkeypatch):
    found = commands()
    assert {command[0] for command in found} >= {f"{name}.py" for name in HOUSE if "/" not in name}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(ROOT / "data")
    for name in ("sft", "rm", "ppo"):  # what the first stages write
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / "config.json").touch()
    for script, *flags in found:
        if script in STAGES:
            STAGES[script].parse(flags)
            continue
        known = (ROOT / script).read_text("utf-8")
        for flag in (word for word in flags if word.startswith("--")):
            assert f'"{flag}"' in known, f"README: {script} has no {flag}"


def test_every_published_coati_flag_is_taken():
    """The single-GPU command of the Coati README, verbatim but for the script's name and the two paths."""
    args = sft.parse(shlex.split(
        "--pretrain /path/to/LLaMa-7B/ --model 'llama' --strategy naive --log_interval 10 "
        "--save_path /path/to/Coati-7B --dataset /path/to/data.json --batch_size 1 --accimulation_steps 8 --lr 2e-5 "
        "--max_datasets_size 512 --max_epochs 1 --lora_rank 16"))
    assert (args.accumulation_steps, args.lr, args.max_datasets_size) == (8, 2e-5, 512)
    assert (args.max_epochs, args.lora_rank, args.batch_size) == (1, 16, 1)


def test_readme_samples_of_every_format_are_read(tmp_path):
    lines = [line for block in BLOCKS for line in block.splitlines()]
    samples = [line for line in lines if line.startswith("{") and not line.startswith('{"id"')]  # that is the server's
    kinds = set()
    for i, line in enumerate(samples):
        record, after = json.JSONDecoder().raw_decode(line)
        stage = line[after:].strip().split(":")[0].split(",")[0]
        kind = {"sft": "sft", "rm": "preference", "ppo": "prompt"}[stage]
        file = tmp_path / f"{i}.jsonl"
        file.write_text(json.dumps(record), encoding="utf-8")
        assert len(records.read_records([file], kind)) == 1
        kinds.add(kind)
    assert kinds == {"sft", "preference", "prompt"} and len(samples) == 8


def span(file: str, first: str, last: str) -> tuple[int, int]:
    """The lines from where the definition `first` begins to where `last` ends; a dotted name is a method."""
    places = {}
    for node in ast.parse((ROOT / file).read_text("utf-8")).body:
        named = [(getattr(node, "name", None), node)]
        named += [(f"{node.name}.{inner.name}", inner) for inner in getattr(node, "body", ()) if hasattr(inner, "name")]
        for name, found in named:
            decorators = [decorator.lineno for decorator in getattr(found, "decorator_list", ())]
            places[name] = (min([found.lineno, *decorators]), found.end_lineno)
    return places[first][0], places[last][1]


def test_line_ranges_of_readme():
    """`file.py` 10-50: `first` to `last`; where a range is wrong, the message has the right one."""
    stated = re.findall(r"`([\w/]+\.py)` (\d+)-(\d+): `([\w.]+)` to `([\w.]+)`", README)
    wrong = []
    for file, begin, end, first, last in stated:
        right = span(file, first, last)
        if right != (int(begin), int(end)):
            wrong.append(f"`{file}` {right[0]}-{right[1]}: `{first}` to `{last}`")
    assert not wrong, "README should say\n" + "\n".join(wrong)
    assert {file for file, *_ in stated} >= {f"{name}.py" for name in HOUSE if "/" not in name}


def test_exercises_of_readme_grade_something():
    """Every `pytest -m lesson -k ...` line selects at least one test that is marked as a lesson."""
    lessons = []
    for file in sorted((ROOT / "tests").glob("test_*.py")):
        source = file.read_text("utf-8")
        lessons += re.findall(r"@pytest\.mark\.lesson\n(?:(?!def ).*\n)*def (test_\w+)", source)
    asked = re.findall(r"pytest -m lesson -k (\w+)", README)
    assert len(asked) >= 20 and [word for word in asked if not any(word in name for name in lessons)] == []


# ---- the house ------------------------------------------------------------------------------------------------------

def sources() -> list[Path]:
    return sorted([*ROOT.glob("*.py"), *(ROOT / "data").glob("*.py"), *(ROOT / "tests").glob("*.py")])


def imports(tree: ast.Module) -> list[tuple[str, ast.stmt]]:
    """(module, statement) of every import, indented ones too; `from data import run` names data.run."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(name.name, node) for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            below = [f"data.{name.name}" for name in node.names] if node.module == "data" else []
            found += [(name, node) for name in below or [node.module]]
    return found


@pytest.mark.parametrize("name", HOUSE)
def test_imports_go_down(name):
    """Nothing imports what stands above it or on its own floor, and no import hides in a function."""
    tree = ast.parse((ROOT / f"{name}.py").read_text("utf-8"))
    ours = {other.replace("/", ".") for other in HOUSE}
    same_floor = set().union(*(floor for floor in FLOORS if name in floor))
    below = {other.replace("/", ".") for other in HOUSE[:HOUSE.index(name)]} - same_floor
    named = {module for module, _ in imports(tree)}
    assert named & ours <= below, f"{name}.py imports {named & ours - below}"
    # `resource` is not there on Windows, so it is imported where it is used.
    hidden = [module for module, statement in imports(tree) if statement not in tree.body and module != "resource"]
    assert not hidden, f"{name}.py imports {hidden} inside a function"


def test_no_other_package_is_imported():
    known = {"torch", "sentencepiece", "numpy", "safetensors", "pytest"}
    for file in [path for path in sources() if path.name != "bench.py"]:  # that one has peers in their own environment
        heads = {module.partition(".")[0] for module, _ in imports(ast.parse(file.read_text("utf-8")))}
        ours = {path.stem for path in sources()} | {"data"}
        foreign = heads - known - ours - set(__import__("sys").stdlib_module_names)
        assert not foreign, f"{file.name} imports {foreign}"


def test_lines_and_functions_are_short():
    """120 columns, and 70 lines a function of what is not a test."""
    for file in sources():
        content = file.read_text("utf-8")
        wide = [i for i, line in enumerate(content.splitlines(), 1) if len(line) > 120]
        assert not wide, f"{file.name} has wide lines: {wide}"
        long = [node.name for node in ast.walk(ast.parse(content))
                if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 70]
        assert not long or file.parent.name == "tests", f"{file.name} has long functions: {long}"


@pytest.mark.parametrize("script", [f"{name}.py" for name in HOUSE if "/" not in name] + ["data/run.py"])
def test_help_explains_every_flag(script):
    """Each add_argument of a flag, also by its short name `flag`, has a help text."""
    tree = ast.parse((ROOT / script).read_text("utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    flags = [call for call in calls if ast.unparse(call.func).endswith(("add_argument", "flag"))]
    silent = [ast.unparse(flag) for flag in flags if "help" not in {keyword.arg for keyword in flag.keywords}]
    assert [call for call in silent if "--" in call] == []
