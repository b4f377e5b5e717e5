"""Tests that want a process of their own.

Once a second build of faiss has been loaded, as other tests do, what functions of the first return is
dressed as classes of the second: indexes inside others are no longer known for what they are.
"""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


@pytest.mark.parametrize("cases", sorted(path.name for path in FOLDER.glob("*_cases.py")))
def test_cases_pass_in_a_process_without_a_second_faiss(cases):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / cases)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=FOLDER.parents[2])
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
