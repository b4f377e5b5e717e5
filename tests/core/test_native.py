"""C++ is compiled once, appears whole or not at all, and fails with a reason."""

import logging
import os
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from elips_torch.core import compilation, native
from elips_torch.core.compilation import find_cpp_compiler
from elips_torch.core.hardware import DeviceFacts, device_facts
from elips_torch.core.native import NativeLibrary, instruction_options, native_reasons, native_threads

HERE = native_reasons(device_facts("cpu"))
OPTIONS = instruction_options(device_facts("cpu"))
needs_compiler = pytest.mark.skipif(bool(HERE), reason="; ".join(HERE))
AVX512 = DeviceFacts("cpu", "2 cores", "AVX512")
CODE = """
#include "answer.h"
extern "C" int answer() { return ANSWER; }
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty folder for compiled code."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(native, "cache_folder", lambda: folder)
    return folder


def write_sources(folder: Path, code: str = CODE, answer: int = 21) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "answer.h").write_text(f"constexpr int ANSWER = {answer};\n")
    (folder / "main.cpp").write_text(code)
    # A process reads its sources once.
    native._digest.cache_clear()
    return folder / "main.cpp"


def no_compiling(*args, **kwargs):
    raise AssertionError("the compiler was called")


# What a compiled file is called.


def test_other_sources_and_options_are_another_file(tmp_path, monkeypatch):
    library = NativeLibrary(write_sources(tmp_path / "code"))
    usual = library.path(("-mavx2",))
    assert usual.name.startswith("main_")
    paths = {usual, library.path(("-mavx2", "-mfma"))}
    write_sources(tmp_path / "code", answer=22)
    paths.add(library.path(("-mavx2",)))
    write_sources(tmp_path / "code", CODE + "\n")
    paths.add(library.path(("-mavx2",)))
    (tmp_path / "code" / "more.h").write_text("\n")
    native._digest.cache_clear()
    paths.add(library.path(("-mavx2",)))
    (tmp_path / "code" / "more.h").unlink()
    write_sources(tmp_path / "code")
    monkeypatch.setattr(native, "find_cpp_compiler", lambda: "/another/g++")
    paths.add(library.path(("-mavx2",)))
    monkeypatch.setattr(native.platform, "libc_ver", lambda: ("glibc", "2.1"))
    native._digest.cache_clear()
    paths.add(library.path(("-mavx2",)))
    assert len(paths) == 7


def test_the_same_sources_are_the_same_file(tmp_path):
    library = NativeLibrary(write_sources(tmp_path / "code"))
    before = library.path(("-mavx2",))
    write_sources(tmp_path / "code")
    (tmp_path / "code" / "notes.txt").write_text("no source")
    assert library.path(("-mavx2",)) == before


def test_code_is_kept_where_torch_keeps_what_it_downloads(monkeypatch):
    monkeypatch.undo()
    assert native.cache_folder() == Path(torch.hub.get_dir()).parent / "elips_torch"


# Compiling.


@needs_compiler
def test_code_is_compiled_once(tmp_path, cache, monkeypatch, caplog):
    main = write_sources(tmp_path / "code")
    library = NativeLibrary(main)
    assert not library.is_ready(OPTIONS)
    with caplog.at_level(logging.INFO, logger="elips_torch"):
        assert library.load(OPTIONS).answer() == 21
    assert "compiling main.cpp" in caplog.text
    assert library.is_ready(OPTIONS)
    assert not library.has_failed(OPTIONS)
    assert list(cache.iterdir()) == [library.path(OPTIONS)]
    monkeypatch.setattr(subprocess, "run", no_compiling)
    assert library.load(OPTIONS) is library.load(OPTIONS)
    # As another process would find it.
    again = NativeLibrary(main)
    assert again.is_ready(OPTIONS)
    assert again.load(OPTIONS).answer() == 21


@needs_compiler
def test_changed_sources_are_compiled_anew(tmp_path):
    assert NativeLibrary(write_sources(tmp_path / "code")).load(OPTIONS).answer() == 21
    changed = NativeLibrary(write_sources(tmp_path / "code", answer=5))
    assert not changed.is_ready(OPTIONS)
    assert changed.load(OPTIONS).answer() == 5


@needs_compiler
def test_a_failure_leaves_no_file_and_is_reported_once(tmp_path, cache, monkeypatch, caplog):
    library = NativeLibrary(write_sources(tmp_path / "code", "this is no C++"))
    with caplog.at_level(logging.WARNING, logger="elips_torch"):
        assert library.load(OPTIONS) is None
        monkeypatch.setattr(subprocess, "run", no_compiling)
        assert library.load(OPTIONS) is None
    assert list(cache.iterdir()) == []
    (record,) = caplog.records
    assert "main.cpp does not compile here" in record.message
    # What the compiler said.
    assert "error" in record.message
    assert library.has_failed(OPTIONS)
    assert not library.is_ready(OPTIONS)


@needs_compiler
def test_an_interrupted_compilation_leaves_no_file(tmp_path, cache, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    library = NativeLibrary(write_sources(tmp_path / "code"))
    with monkeypatch.context() as patches:
        patches.setattr(subprocess, "run", interrupt)
        with pytest.raises(KeyboardInterrupt):
            library.load(OPTIONS)
    assert list(cache.iterdir()) == []
    # It has not failed: the next call tries again.
    assert library.load(OPTIONS).answer() == 21


@needs_compiler
def test_a_file_that_does_not_load_is_compiled_again(tmp_path, cache):
    library = NativeLibrary(write_sources(tmp_path / "code"))
    cache.mkdir()
    library.path(OPTIONS).write_bytes(b"no library")
    assert library.load(OPTIONS).answer() == 21


def test_what_does_not_load_when_compiled_again_leaves_the_work_to_torch(
    tmp_path, cache, monkeypatch, caplog
):
    def broken(command, **options):
        Path(command[-1]).write_bytes(b"no library")

    monkeypatch.setattr(subprocess, "run", broken)
    library = NativeLibrary(write_sources(tmp_path / "code"))
    assert library.load(OPTIONS or ("-mavx2",)) is None
    assert caplog.text.count("does not compile here") == 1


def test_a_folder_that_cannot_be_written_is_a_failure(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setattr(native, "cache_folder", lambda: tmp_path / "file" / "cache")
    monkeypatch.setattr(subprocess, "run", no_compiling)
    library = NativeLibrary(write_sources(tmp_path / "code"))
    assert not library.is_ready(OPTIONS)
    assert library.load(OPTIONS) is None
    assert "does not compile here" in caplog.text


PROCESS = """
import sys, time
from pathlib import Path
from elips_torch.core import native
folder, options = Path(sys.argv[1]), tuple(sys.argv[2:])
native.cache_folder = lambda: folder / "cache"
library = native.NativeLibrary(folder / "code" / "main.cpp")
assert not library.is_ready(options)
print("ready", flush=True)
sys.stdin.readline()
print(library.load(options).answer())
"""


@needs_compiler
def test_processes_that_compile_at_the_same_time_both_end_with_the_code(tmp_path, cache):
    write_sources(tmp_path / "code")
    compiler, calls = tmp_path / "slow_compiler", tmp_path / "calls"
    # Slow enough that each begins before the other has ended.
    quoted = shlex.quote(find_cpp_compiler())
    compiler.write_text(f'#!/bin/sh\necho begin >> {calls}\nsleep 1\n{quoted} "$@"\necho end >> {calls}\n')
    compiler.chmod(0o755)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(tmp_path), *OPTIONS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "CXX": str(compiler)},
        )
        for _ in range(2)
    ]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 2
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.communicate(timeout=60)[0] for process in processes] == ["21\n"] * 2
    assert calls.read_text().split() == ["begin", "begin", "end", "end"]
    assert len(list(cache.iterdir())) == 1


# Threads.


def test_threads_are_those_of_torch_and_one_after_a_fork(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert native_threads() == 7
    monkeypatch.setitem(compilation._state, "forked", True)
    assert native_threads() == 1


# Imports.


FIRST_SEARCH = """
import sys, torch
before = set(sys.modules)
from elips_torch import FlatIndex
index = FlatIndex(8)
index.add(torch.rand(100, 8))
index.search(torch.rand(2, 8), 3)
print({"torch._inductor", "torch._dynamo", "sympy"} & (set(sys.modules) - before))
"""


def test_a_small_search_imports_no_compiler():
    command = [sys.executable, "-c", FIRST_SEARCH]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "set()\n"


# What there is code for.


def test_each_instruction_set_has_the_options_of_those_below():
    sets = [
        instruction_options(facts)
        for facts in (
            DeviceFacts("cpu", "2 cores", "AVX2"),
            AVX512,
            DeviceFacts("cpu", "2 cores", "AVX512", vnni=True),
        )
    ]
    assert "-mavx2" in sets[0]
    assert sets[1][: len(sets[0])] == sets[0]
    assert sets[2][: len(sets[1])] == sets[1]
    assert sets[2][-1] == "-mavx512vnni"
    assert instruction_options(DeviceFacts("cpu", "2 cores", "DEFAULT")) == ()


@pytest.mark.parametrize(
    ("facts", "machine", "system", "found"),
    [
        (
            DeviceFacts("cpu", "2 cores", "DEFAULT"),
            "x86_64",
            "linux",
            "this is DEFAULT on x86_64 under Linux",
        ),
        (DeviceFacts("cpu", "2 cores", "NEON"), "aarch64", "linux", "this is NEON on aarch64 under Linux"),
        (AVX512, "AMD64", "win32", "this is AVX512 on AMD64 under Windows"),
        (AVX512, "x86_64", "darwin", "this is AVX512 on x86_64 under Darwin"),
    ],
)
def test_a_machine_without_code_is_named(facts, machine, system, found, monkeypatch):
    monkeypatch.setattr(native, "sys", types.SimpleNamespace(platform=system))
    names = {"linux": "Linux", "win32": "Windows", "darwin": "Darwin"}
    described = types.SimpleNamespace(machine=lambda: machine, system=lambda: names[system])
    monkeypatch.setattr(native, "platform", described)
    (reason,) = native_reasons(facts)
    assert found in reason


def test_a_missing_compiler_and_another_device_are_reasons(monkeypatch):
    monkeypatch.setattr(native, "sys", types.SimpleNamespace(platform="linux"))
    monkeypatch.setattr(native, "platform", types.SimpleNamespace(machine=lambda: "x86_64"))
    monkeypatch.setattr(native, "find_cpp_compiler", lambda: "/usr/bin/g++")
    assert native_reasons(AVX512) == []
    monkeypatch.setattr(native, "find_cpp_compiler", lambda: None)
    assert native_reasons(AVX512) == ["there is no C++ compiler to make it with; install g++"]
    (reason,) = native_reasons(DeviceFacts("cuda", "a GPU", "sm_90"))
    assert "the tensors are on cuda" in reason
