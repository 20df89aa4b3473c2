"""What all test files share."""

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

SMOLLM2 = Path(os.environ.get("OCTET_SMOLLM2") or Path(__file__).parents[2] / "smol")
REFERENCES = Path(__file__).parents[2] / "shared" / "real" / "smollm2"


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Matrices as small as the tests' only wait for one another on several threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def ctrl_c():
    """A shell has Ctrl-C ignored by what it runs in the background, and tests raise it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """A folder with SmolLM2-135M-Instruct in hf/ and the tokenizer of Llama 3.1 in llama3.1/."""
    if not (SMOLLM2 / "hf" / "model.safetensors").exists():
        pytest.skip(f"no SmolLM2 in {SMOLLM2}: run shared/real/smollm2/get.sh FOLDER, name FOLDER in OCTET_SMOLLM2")
    if not REFERENCES.exists():
        pytest.skip(f"no {REFERENCES}: what transformers gives for SmolLM2 is compared with")
    return SMOLLM2


# ---- several processes ----------------------------------------------------------------------------------------------

# Processes are forked from one that has imported torch and the house: a process of its own takes 2 seconds for that.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["pytest", "ppo"])


class Ended(NamedTuple):
    """How a process ended."""
    code: int
    out: str
    err: str


class Group:
    """Processes that run function(*args) as if a launcher had started them, one that ends none when another fails."""

    def __init__(self, folder: Path, world: int, function: Callable, *args):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        launcher = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self.outputs = [(folder / f"{rank}.out", folder / f"{rank}.err") for rank in range(world)]
        self.processes = [FORKS.Process(target=run_in_group, args=(
            launcher | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, self.outputs[rank], function, args))
            for rank in range(world)]
        for process in self.processes:
            process.start()

    def wait(self, seconds: float = 240) -> list[Ended]:
        """Waits for the end of each. A process that takes longer is killed, and has exit code -9."""
        for process in self.processes:
            process.join(seconds)
            process.kill()
            process.join()
        return [Ended(process.exitcode, out.read_text(), err.read_text())
                for process, (out, err) in zip(self.processes, self.outputs)]


def run_in_group(launcher: dict[str, str], outputs: tuple[Path, Path], function: Callable, args: tuple) -> None:
    for number, file in enumerate(outputs, 1):  # standard output is 1, and standard error 2
        os.dup2(os.open(file, os.O_CREAT | os.O_WRONLY), number)
    os.environ |= launcher
    sys.argv = ["a_test.py"]  # the name in front of what run.command says
    torch.set_num_threads(1)
    function(*args)


@pytest.fixture(scope="session")
def start(tmp_path_factory) -> Callable[..., Group]:
    """start(world, function, *args): the function runs in `world` processes; see Group."""
    return lambda world, *call: Group(tmp_path_factory.mktemp("group"), world, *call)
