import subprocess
import sys
from importlib.metadata import entry_points

import pytest

import elips_torch
from elips_torch.cli.main import main


def test_the_package_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "elips_torch", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"elips-torch {elips_torch.__version__}\n"


def test_exit_codes_reach_the_shell():
    done = subprocess.run(
        [sys.executable, "-m", "elips_torch", "bench", "exact", "missing.safetensors"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "elips-torch: no file at 'missing.safetensors'\n"


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--help"], "elips-torch doctor"),
        (["bench", "exact", "--help"], "elips-torch bench exact --faiss faster-faiss"),
        (["bench", "ann", "--help"], "elips-torch bench ann --own-centroids"),
        (["doctor", "--help"], "elips-torch doctor --json"),
    ],
)
def test_help_has_examples(capsys, arguments, shown):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    assert shown in text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "required: COMMAND"),
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["bench"], "required: BENCHMARK"),
        (["doctor", "--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_a_wrong_command_is_one_line(capsys, arguments, expected):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line
    assert "--help" in line


def test_a_message_in_one_line_points_at_nothing(capsys):
    arguments = ["bench", "ann", "--synthetic", "100", "4", "--index", "IVF4,Flt"]
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "part 2, 'Flt': no such part" in line
    assert "^" not in line
    assert line.count("IVF4,Flt") == 1


def test_the_console_script_is_this_function():
    scripts = entry_points(group="console_scripts", name="elips-torch")
    if not scripts:
        pytest.skip("needs an installation that knows the script")
    assert [script.load() for script in scripts] == [main]
