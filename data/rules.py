"""Rewards that a program verifies: the functions of ppo.py --reward_fn FILE.py:NAME[=WEIGHT].

    def reward(prompt: str, answer: str, record: dict) -> float:
        return float(record["solution"] in answer)

prompt is the user's last message, answer has no special tokens, record is the JSON value that stands in the file, with
"ended" added: whether EOS came. The functions run in a child process, which can be ended: one that fails, or takes too
long, ends the run with a sentence that names the record.
"""

import argparse
import math
import multiprocessing
import re
import runpy
import signal
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from data import run

LONGEST_START = 60   # seconds, in which the files are read
LONGEST_CALL = 10    # seconds; a function that takes longer may never end


class Rule(NamedTuple):
    file: Path
    name: str
    weight: float

    def __str__(self) -> str:
        return f"{self.file}:{self.name}={self.weight}"


def rule(given: str) -> Rule:
    """The type of --reward_fn."""
    found = re.fullmatch(r"(.+\.py):(\w+)(?:=(.+))?", given)
    if found is None or not Path(found[1]).is_file():
        raise argparse.ArgumentTypeError(f"must be FILE.py:NAME or FILE.py:NAME=WEIGHT, with a file that there is, "
                                         f"not {given}")
    return Rule(Path(found[1]), found[2], run.number(-math.inf)(found[3] or "1"))


def answer_calls(rules: list[Rule], pipe: Connection) -> None:
    """The child process. Sends None once the functions are there, then a float for each call; or what went wrong."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)            # Ctrl-C is for the parent
    given, result = None, None
    with suppress(EOFError):                                # when the parent has ended
        while True:
            try:
                if given is None:
                    functions = [runpy.run_path(str(rule.file))[rule.name] for rule in rules]
                else:
                    number_of_rule, *rest = given
                    result = float(functions[number_of_rule](*rest))
            except Exception as error:
                result = f"raised {type(error).__name__}: {error}"
            pipe.send(result)
            given = pipe.recv()


class Rules:
    """The functions, in their child process."""

    def __init__(self, rules: list[Rule]):
        self.rules = rules
        spawn = multiprocessing.get_context("spawn")        # a fork would copy locks that threads hold
        self.pipe, end = spawn.Pipe()
        self.child = spawn.Process(target=answer_calls, args=(rules, end), daemon=True)
        self.child.start()
        end.close()
        self.result(LONGEST_START, "--reward_fn")

    def result(self, seconds: float, place: str) -> float | None:
        """What the child sends. Raises ValueError, and ends the child, if it is no number."""
        found = f"took more than {seconds} seconds"
        if self.pipe.poll(seconds):
            try:
                found = self.pipe.recv()
            except EOFError:
                found = "ended its process"
        if isinstance(found, float) and not math.isfinite(found):
            found = f"returned {found}"
        if isinstance(found, str):
            self.child.kill()
            raise ValueError(f"{place}: {found}; mend the function or leave the record out")
        return found

    def rewards(self, asked: list[dict], answers: list[str], ended: list[bool]) -> list[list[float]]:
        """What each function says of each answer. asked: the records of the prompts, as read_records gives them."""
        rewards = []
        for found, answer, whole in zip(asked, answers, ended):
            prompt, record = found["messages"][-1]["content"], found["record"] | {"ended": whole}
            row = []
            for i, rule in enumerate(self.rules):
                self.pipe.send((i, prompt, answer, record))
                row.append(self.result(LONGEST_CALL, f"{found['place']}: --reward_fn {rule}"))
            rewards.append(row)
        return rewards
