"""What all test files share."""

import os
from pathlib import Path

import pytest
import torch

SMOLLM2 = Path(os.environ.get("OCTET_SMOLLM2") or Path(__file__).parents[2] / "smol")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Matrices as small as the tests' only wait for one another on several threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """A folder with SmolLM2-135M-Instruct in hf/ and the tokenizer of Llama 3.1 in llama3.1/."""
    if not (SMOLLM2 / "hf" / "model.safetensors").exists():
        pytest.skip(f"no SmolLM2 in {SMOLLM2}: run shared/real/smollm2/get.sh FOLDER, name FOLDER in OCTET_SMOLLM2")
    return SMOLLM2
