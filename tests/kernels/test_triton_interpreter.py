"""Runs the tests under `interpreted/`, each file in a process of its own.

Triton reads whether to interpret kernels when they are defined, so a process can either interpret
or compile them.
"""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

FILES = sorted((pathlib.Path(__file__).parent / "interpreted").glob("test_*.py"))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_kernels_are_right_in_the_interpreter(path):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
