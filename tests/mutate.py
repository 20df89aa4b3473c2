"""Would a test notice a wrong formula? Mutation testing (DeMillo, Lipton & Sayward 1978).

    python tests/mutate.py                           25 mutants of each file, drawn by seed 0
    python tests/mutate.py --list --file zero.py     all mutants of a file that there are, without running any
    python tests/mutate.py --file rm.py:90           all of one line, as after a new test

A mutant is a file with one expression changed:

    operator    a + b -> a - b    a * b -> a / b    a // b -> a % b    a & b -> a | b    a << b -> a >> b, and back
                a ** b -> a * b
    comparison  a < b -> a <= b   a > b -> a >= b   a == b -> a != b   (`in` and `is` likewise), and back
    logic       a and b -> a or b, True -> False, and back             not a -> a
    sign        -a -> a
    mask        ~a -> a           where(m, a, b) -> where(m, b, a)     x.masked_fill(m, a) -> x.masked_fill(~m, a)
    twin        max -> min, floor -> ceil, any -> all, cos -> sin, triu -> tril, add_ -> sub_ and more, and back
    index       x[1] -> x[2]      x[-1] -> x[-2]                       x[a:b] -> x[a + 1:b] and x[a:b + 1]
    axis        dim=-1 -> dim=0   dim=0 -> dim=-1                      x.transpose(1, 2) -> x.transpose(0, 2)
    factor      0 -> 1            1 -> 2                               0.5 -> 1.0

It is changed in a numeric function of a lecture or of data/text.py: one with a Tensor in its signature, or arithmetic
in its body. Left out are functions that say, read, write or refuse (by their names, NOT_NUMERIC), the HTTP side of
serve.py and what only a GPU runs (OTHERS); and in the rest messages, annotations, `raise`, `assert` and the condition
of an `if` that only raises.

Everything runs in a copy of the tree in a temporary folder. First every test runs there once, while each function
reports that it runs, in whatever process. This tells which tests cover a function. Tests that fail or skip then are
left out. The mutants are written into the copy, one at a time. A process forked from this one, which has imported torch
but nothing of ours, runs the tests that cover the function, the fastest first, until one fails, and at most --seconds
of them as the first run measured it. A test that takes much longer than in the first run notices the mutant too: it
hangs.

A mutant that is left is a hole in the tests, or it means what the original means. Only reading it tells which.
"""

import argparse
import ast
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy                # a forked process imports neither these ...
import pytest
import safetensors.torch
import sentencepiece
import torch.distributed    # ... nor this one anew

ROOT = Path(__file__).resolve().parents[1]
FILES = ["model.py", "data/text.py", "zero.py", "sft.py", "quantize.py", "rm.py", "serve.py", "lora.py", "ppo.py"]
NOT_NUMERIC = re.compile(r"(main|parse|convert|describe|warn|benchmark|(check|refuse|say|show|print|read|open)_?\w*)$")
OTHERS = {"Handler", "Server", "CopyStream", "DecodingGraph", "int8_cuda_product"}
SLOW = 120, 10      # a test hangs if it takes 120 s and 10 times what it took in the first run


# ---- what is changed ------------------------------------------------------------------------------------------------

def both_ways(*pairs: tuple) -> dict:
    return {a: b for pair in pairs for a, b in (pair, pair[::-1])}


ARITHMETIC = both_ways((ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.FloorDiv, ast.Mod), (ast.BitAnd, ast.BitOr),
                       (ast.LShift, ast.RShift)) | {ast.Pow: ast.Mult}
COMPARISON = both_ways((ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.In, ast.NotIn),
                       (ast.Is, ast.IsNot))
TWINS = both_ways(("max", "min"), ("amax", "amin"), ("argmax", "argmin"), ("floor", "ceil"), ("any", "all"),
                  ("cos", "sin"), ("triu", "tril"), ("maximum", "minimum"), ("add_", "sub_"), ("mul_", "div_"))
AXES = {"sum", "mean", "softmax", "log_softmax", "logsumexp", "cumsum", "cat", "stack", "transpose", "flip", "roll",
        "argmax", "argmin", "max", "amax", "amin", "unsqueeze", "squeeze", "gather", "scatter", "size", "split"}


class Mutant(NamedTuple):
    file: str
    function: str       # the outermost one, or Class.method
    kind: str
    node: ast.AST       # in the tree of the file ...
    parent: ast.AST
    new: ast.AST        # ... and what stands in its place

    @property
    def place(self) -> str:
        return f"{self.file}:{self.node.lineno}"

    def written(self, whole: ast.AST) -> str:
        """The source of what holds the node, changed."""
        Swap(self.node, self.new).visit(whole)
        source = ast.unparse(whole)
        Swap(self.new, self.node).visit(whole)
        return source

    def __str__(self) -> str:
        """The place, and the expression around the node before and after."""
        around = isinstance(self.parent, (ast.expr, ast.keyword, ast.comprehension))
        old = ast.unparse(self.parent if around else self.node)
        new = self.written(self.parent) if around else ast.unparse(self.new)
        old, new = (" ".join(source.split())[:150] for source in (old, new))
        return f"{self.place} {self.function}, {self.kind}: {old} -> {new}"


class Swap(ast.NodeTransformer):
    """Puts one node in another's place."""

    def __init__(self, old: ast.AST, new: ast.AST):
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else self.generic_visit(node)


def like(node: ast.AST, **fields) -> ast.AST:
    """A copy of the node with other fields."""
    return ast.copy_location(type(node)(**dict(ast.iter_fields(node)) | fields), node)


def number(node: ast.AST) -> int | float | None:
    """The value of a number, which may have a sign."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = number(node.operand)
        return None if value is None else -value
    return node.value if isinstance(node, ast.Constant) and type(node.value) in (int, float) else None


def is_text(node: ast.AST) -> bool:
    if isinstance(node, ast.BinOp):
        return is_text(node.left) or is_text(node.right)
    return isinstance(node, ast.JoinedStr) or isinstance(getattr(node, "value", None), str)


def name_of(call: ast.AST) -> str:
    """The name of the function or method that is called."""
    function = getattr(call, "func", None)
    return getattr(function, "attr", None) or getattr(function, "id", "")


def of_number(value: int | float, node: ast.AST, parent: ast.AST) -> tuple[str, ast.AST]:
    """What a number is changed into depends on where it stands."""
    is_method = isinstance(getattr(parent, "func", None), ast.Attribute) and name_of(parent) in AXES
    if type(value) is int and (is_method or getattr(parent, "arg", None) in ("dim", "dims")):
        return "axis", ast.Constant(0 if value else -1)
    if isinstance(parent, (ast.Subscript, ast.Slice)):
        return "index", ast.Constant(value - 1 if value < 0 else value + 1)
    return "factor", ast.Constant(value * 2 if type(value) is float and value else value + 1)


def of_call(call: ast.Call) -> Iterator[tuple[str, ast.AST]]:
    name, args = name_of(call), call.args
    if name in TWINS:
        field = "attr" if isinstance(call.func, ast.Attribute) else "id"
        yield "twin", like(call, func=like(call.func, **{field: TWINS[name]}))
    if name == "where" and len(args) == 3:
        yield "mask", like(call, args=[args[0], args[2], args[1]])
    if name in ("masked_fill", "masked_fill_"):
        yield "mask", like(call, args=[ast.UnaryOp(ast.Invert(), args[0]), *args[1:]])


def changes(node: ast.AST, parent: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """All (kind, new node) that the operators give for a node."""
    value = number(node)
    if value is not None and number(parent) is None:                # a signed number is one number
        yield of_number(value, node, parent)
    match node:
        case ast.Constant(value=bool()):
            yield "logic", ast.Constant(not node.value)
        case ast.BinOp() | ast.AugAssign() if type(node.op) in ARITHMETIC:
            if not any(map(is_text, ast.iter_child_nodes(node))):
                yield "operator", like(node, op=ARITHMETIC[type(node.op)]())
        case ast.Compare():
            for i, op in enumerate(node.ops):
                yield "comparison", like(node, ops=node.ops[:i] + [COMPARISON[type(op)]()] + node.ops[i + 1:])
        case ast.BoolOp(op=op):
            yield "logic", like(node, op=ast.Or() if isinstance(op, ast.And) else ast.And())
        case ast.UnaryOp(op=ast.USub()) if value is None:
            yield "sign", node.operand
        case ast.UnaryOp(op=ast.Invert()):
            yield "mask", node.operand
        case ast.UnaryOp(op=ast.Not()):
            yield "logic", node.operand
        case ast.Call():
            yield from of_call(node)
    if isinstance(parent, ast.Slice) and value is None:
        yield "index", ast.BinOp(node, ast.Add(), ast.Constant(1))


# ---- where it is changed --------------------------------------------------------------------------------------------

def functions(body: list[ast.stmt], inside: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """(name, function) of a module or a class. What a function has inside belongs to it."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from functions(node.body, f"{node.name}.")
        if isinstance(node, ast.FunctionDef):
            yield inside + node.name, node


def is_numeric(name: str, function: ast.FunctionDef) -> bool:
    if name.partition(".")[0] in OTHERS or NOT_NUMERIC.match(function.name):
        return False
    signature = ast.unparse(function.args) + ast.unparse(function.returns or ast.Constant(None))
    nodes = [node for statement in function.body for node, parent in expressions(statement, function)]
    return "Tensor" in signature or any(type(getattr(node, "op", None)) in ARITHMETIC for node in nodes)


def expressions(node: ast.AST, parent: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """(node, parent) of all that is not a message, a refusal or an annotation."""
    if isinstance(node, (ast.Raise, ast.Assert, ast.JoinedStr)) or NOT_NUMERIC.match(name_of(node)):
        return
    yield node, parent
    refuses = isinstance(node, ast.If) and isinstance(node.body[0], ast.Raise)
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list") or refuses and field == "test":
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from expressions(child, node)


def mutants_of(file: str, tree: ast.Module) -> list[Mutant]:
    return [Mutant(file, name, kind, node, parent, ast.copy_location(new, node))
            for name, function in functions(tree.body) if is_numeric(name, function)
            for node, parent in expressions(function, tree)
            for kind, new in changes(node, parent)]


# ---- which tests cover a function -----------------------------------------------------------------------------------

REPORT = """import os
known = set()
log = os.open({log!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def ran(name):
    if name not in known:
        known.add(name)
        os.write(log, (name + chr(10)).encode())
"""


def copy_tree(tree: Path) -> None:
    """Copies what git knows, and what it would add."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True)
    for name in listed.stdout.decode().splitlines():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)


def reporting(file: str) -> str:
    """The source of the file, where each function reports that it runs."""
    tree = ast.parse((ROOT / file).read_text("utf-8"))
    for name, function in functions(tree.body):
        place = 1 if ast.get_docstring(function) else 0
        function.body[place:place] = ast.parse(f"octet_report.ran({file + ' ' + name!r})").body
    tree.body[1:1] = ast.parse("import octet_report").body        # after the docstring
    return ast.unparse(tree)


class Coverage:
    """A pytest plugin. Of each test that passes: what it took, and which functions ran.

    The log has a line "== NAME" where a test or a fixture begins, and one for each function that runs then, here or in
    another process. What a fixture takes and runs counts for all tests that use it, not only for the first."""

    def __init__(self, log: Path, saved: Path):
        self.log, self.saved, self.now = log, saved, ""
        self.seconds, self.fixtures, self.bad = Counter(), {}, set()

    def begin(self, name: str) -> None:
        """Forgets what functools.cache keeps, or only the first test would seem to run a function that has it."""
        self.now = name
        for module in [sys.modules.get(file.removesuffix(".py").replace("/", ".")) for file in FILES]:
            for value in vars(module).values() if module else ():
                getattr(value, "cache_clear", int)()        # int() does nothing
        if "octet_report" in sys.modules:
            sys.modules["octet_report"].known.clear()
        with self.log.open("a") as log:
            log.write(f"== {name}\n")

    def pytest_collection_modifyitems(self, items: list) -> None:
        for item in items:
            used = [definitions[-1] for definitions in item._fixtureinfo.name2fixturedefs.values()]
            self.fixtures[item.nodeid] = [f"{fixture.baseid} {fixture.argname}" for fixture in used]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.begin(nodeid)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        outer, name, began = self.now, f"{fixturedef.baseid} {fixturedef.argname}", time.perf_counter()
        self.begin(name)
        try:
            return (yield)
        finally:
            took = time.perf_counter() - began
            self.seconds[name] = max(self.seconds[name], took)
            self.seconds[outer] -= took
            self.begin(outer)

    def pytest_runtest_logreport(self, report) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.outcome != "passed":
            self.bad.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        ran, now = {}, ""
        for line in self.log.read_text().splitlines():
            if line.startswith("== "):
                now = line[3:]
            ran.setdefault(now, set()).add(line)
        rows = {}
        for test in self.fixtures.keys() - self.bad:
            fixtures = {name: self.seconds[name] for name in self.fixtures[test]}
            found = set().union(*(ran.get(name, ()) for name in [test, *fixtures]))
            rows[test] = {"seconds": self.seconds[test], "fixtures": fixtures, "functions": sorted(found)}
        self.saved.write_text(json.dumps(rows))


def run_tests(tree: Path, files: Iterable[str], plugin: object, *flags: str) -> int:
    """Pytest's exit code in a forked process, which is ended with all that it has started. 0 if all tests passed."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.chdir(tree)
        for number in (1, 2):       # standard output and standard error
            os.dup2(os.open(tree.parent / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.path = [place for place in sys.path if place != str(ROOT / "tests")]
        code = pytest.main(["-p", "no:cacheprovider", "--rootdir", str(tree), "--basetemp", str(tree.parent / "tests"),
                            *flags, *files], plugins=[plugin])
        os._exit(code)
    _, status = os.waitpid(pid, 0)
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:      # it has left nothing behind
        pass
    return os.waitstatus_to_exitcode(status)


class Measured:
    """What the tests of a file cover. A folder keeps it for as long as sources and tests stay the same."""

    def __init__(self, folder: Path):
        self.tree, self.known = folder / "measured", {}
        copy_tree(self.tree)
        for file in FILES:
            (self.tree / file).write_text(reporting(file), "utf-8")
        self.kept = Path(tempfile.gettempdir()) / "octet-mutate"
        self.kept.mkdir(exist_ok=True)
        sources = sorted([*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), ROOT / "tests" / "conftest.py"])
        self.digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources))

    def tests(self, file: str) -> dict[str, dict]:
        """{test: its seconds, fixtures and functions} of those in the file that pass."""
        if file not in self.known:
            digest, stem = self.digest.copy(), Path(file).stem
            digest.update((self.tree / file).read_bytes())
            saved = self.kept / f"{stem}-{digest.hexdigest()[:16]}.json"
            if not saved.exists():
                log = self.tree.parent / f"{stem}.log"
                (self.tree / "octet_report.py").write_text(REPORT.format(log=str(log)))
                run_tests(self.tree, [file], Coverage(log, saved))
                bad = re.findall("(?:FAILED|ERROR) .*", (self.tree.parent / "output").read_text("utf-8", "replace"))
                print(f"{file}: {len(json.loads(saved.read_text()))} tests pass", *bad, sep="\n", flush=True)
            self.known[file] = json.loads(saved.read_text())
        return self.known[file]

    def covering(self, mutant: Mutant, own: bool, most: float) -> dict[str, float]:
        """The tests to run, each with its seconds, the fastest first: of the file's own, or of the others. What runs at
        import alone is covered by all of its own."""
        name = f"test_{Path(mutant.file).stem}.py"
        files = [f"tests/{path.name}" for path in self.tree.glob("tests/test_*.py") if (path.name == name) == own]
        tests = {test: row for file in sorted(files) for test, row in self.tests(file).items()}
        function = f"{mutant.file} {mutant.function}"
        found = {test: row for test, row in tests.items() if function in row["functions"]}
        return within(most, found or (tests if own else {}))


def within(most: float, tests: dict[str, dict]) -> dict[str, float]:
    """The fastest of these tests that together take at most so many seconds; a fixture is made once."""
    seconds = {test: row["seconds"] + sum(row["fixtures"].values()) for test, row in tests.items()}
    chosen, ready = {}, set()
    for test in sorted(tests, key=seconds.get):
        fixtures = tests[test]["fixtures"]
        most -= tests[test]["seconds"] + sum(fixtures[name] for name in fixtures.keys() - ready)
        if most >= 0:
            ready |= fixtures.keys()
            chosen[test] = seconds[test]
    return chosen


# ---- is a mutant noticed? -------------------------------------------------------------------------------------------

class Chosen:
    """A pytest plugin: runs these tests in this order, and ends the process if one hangs: no one handles the alarm."""

    def __init__(self, seconds: dict[str, float]):
        self.seconds = seconds

    def pytest_sessionstart(self) -> None:
        signal.alarm(SLOW[0])       # for imports

    def pytest_collection_modifyitems(self, items: list) -> None:
        chosen = {item.nodeid: item for item in items}
        items[:] = [chosen[test] for test in self.seconds if test in chosen]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        print(f"running {nodeid}", file=sys.__stdout__, flush=True)
        signal.alarm(round(SLOW[0] + SLOW[1] * self.seconds[nodeid]))


def noticed_by(tree: Path, chosen: dict[str, float]) -> str:
    """The test that notices the mutant, which is written in the tree; empty if none does."""
    files = sorted({test.partition("::")[0] for test in chosen})
    code = run_tests(tree, files, Chosen(chosen), "-x", "--tb=no", "--show-capture=no") if chosen else 0
    if code in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
        return ""
    ran = re.findall("running (.*)", (tree.parent / "output").read_text("utf-8", "replace"))
    return (ran[-1] if ran else "import") + (", which hangs" if code < 0 else "")


def hunt(mutants: list[Mutant], trees: dict[str, ast.Module], args: argparse.Namespace) -> list[Mutant]:
    """Returns the mutants that nobody notices. The tests of other files are run for those that the own let pass."""
    with tempfile.TemporaryDirectory(prefix="octet-mutate-") as folder:
        measured, tree = Measured(Path(folder)), Path(folder) / "mutant"
        copy_tree(tree)
        for own in True, False:
            left, began = [], time.perf_counter()
            for i, mutant in enumerate(mutants, 1):
                chosen, file, whole = measured.covering(mutant, own, args.seconds), mutant.file, trees[mutant.file]
                (tree / file).write_text(mutant.written(whole), "utf-8")
                os.utime(tree / file, (i, i))       # by time and length Python tells what it has compiled before
                by = noticed_by(tree, chosen)
                (tree / file).write_text(ast.unparse(whole), "utf-8")
                if not by:
                    left.append(mutant)
                each = (time.perf_counter() - began) / i
                minutes = each * (len(mutants) - i) / 60
                result = f"noticed by {by}" if by else f"LEFT by {len(chosen)} tests"
                pace = f"{i}/{len(mutants)}, {each:.1f} s each, {minutes:.0f} min left"
                print(f"{pace} | {mutant} | {result}", flush=True)
            mutants = left
    return left


# ---- command line ---------------------------------------------------------------------------------------------------

def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--file", action="append", help="only this one, or one line of it, as in zero.py:82; may be repeated")
    flag("--per_file", type=int, default=25, help="mutants drawn of each file; 0 takes all (default 25)")
    flag("--seed", type=int, default=0, help="draws them (default 0)")
    flag("--seconds", type=float, default=60, help="of the file's own tests, and of others, for a mutant (default 60)")
    flag("--list", action="store_true", help="print the mutants, and run nothing")
    return parser.parse_args(argv)


def draw(mutants: list[Mutant], args: argparse.Namespace) -> list[Mutant]:
    """Those of one file that are asked for."""
    asked = args.file or FILES
    found = [mutant for mutant in mutants if mutant.file in asked or mutant.place in asked]
    if args.list or not 0 < args.per_file < len(found):
        return found
    return random.Random(f"{args.seed} {mutants[0].file}").sample(found, args.per_file)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    trees = {file: ast.parse((ROOT / file).read_text("utf-8")) for file in FILES}
    there = {file: mutants_of(file, trees[file]) for file in FILES}
    drawn = list(chain(*(draw(mutants, args) for mutants in there.values())))
    if args.list:
        print(*drawn, f"{len(drawn)} mutants", sep="\n")
        return 0
    left = hunt(drawn, trees, args)
    print(f"\n| file | mutants there are | drawn by seed {args.seed} | noticed | left |\n|---|---|---|---|---|")
    for name in [*FILES, "all"]:
        counts = [sum(mutant.file == name or name == "all" for mutant in some)
                  for some in (chain(*there.values()), drawn, left)]
        print(f"| {name} | {counts[0]} | {counts[1]} | {counts[1] - counts[2]} | {counts[2]} |")
    print(*left, sep="\n")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
