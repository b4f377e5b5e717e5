import importlib.util
import re

import pytest

from elips_torch.core import triton_support
from elips_torch.core.hardware import DeviceFacts
from elips_torch.core.triton_support import find_c_compiler, gpu_reasons, launcher_reasons


@pytest.fixture
def _fresh(monkeypatch):
    launcher_reasons.cache_clear()
    yield
    launcher_reasons.cache_clear()


@pytest.fixture
def programs(monkeypatch, tmp_path):
    """An empty path, and a function that puts programs on it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)

    def put(name):
        path = tmp_path / name
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
        return str(path)

    return put


def test_the_compiler_is_the_one_that_triton_would_call(programs, monkeypatch):
    assert find_c_compiler() is None
    # Triton does not look for it.
    programs("cc")
    assert find_c_compiler() is None
    clang = programs("clang")
    assert find_c_compiler() == clang
    gcc = programs("gcc")
    assert find_c_compiler() == gcc
    monkeypatch.setenv("CC", "clang")
    assert find_c_compiler() == clang
    monkeypatch.setenv("CC", "gcc -m64")
    assert find_c_compiler() is None


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_triton_agrees_about_the_compiler(programs):
    from triton.runtime import build

    find = getattr(build, "_find_compiler", None)
    if find is None:
        pytest.skip("this version of Triton has no function of its own for it")
    for name in ("clang", "gcc"):
        programs(name)
        find.cache_clear()
        assert find("c") == find_c_compiler()
    find.cache_clear()


@pytest.mark.usefixtures("_fresh")
def test_what_a_launcher_lacks_is_named(programs, monkeypatch):
    monkeypatch.setattr(triton_support, "find_spec", lambda name: object())
    monkeypatch.setattr(triton_support, "_has_python_headers", lambda: False)
    compiler, headers = launcher_reasons()
    assert "finds no gcc or clang on the path" in compiler
    assert "no Python.h" in headers
    launcher_reasons.cache_clear()
    monkeypatch.setenv("CC", "icc")
    assert "finds CC='icc', which is no program" in launcher_reasons()[0]
    launcher_reasons.cache_clear()
    monkeypatch.setattr(triton_support, "find_spec", lambda name: None)
    assert launcher_reasons() == ("Triton is not installed",)


@pytest.mark.usefixtures("_fresh")
def test_with_a_compiler_and_headers_nothing_is_missing(programs, monkeypatch):
    programs("gcc")
    monkeypatch.setattr(triton_support, "find_spec", lambda name: object())
    monkeypatch.setattr(triton_support, "_has_python_headers", lambda: True)
    assert launcher_reasons() == ()


@pytest.mark.parametrize("default", ["venv", "posix_prefix", "posix_local"])
@pytest.mark.parametrize("is_there", [True, False])
def test_headers_are_where_triton_looks_for_them(default, is_there, monkeypatch, tmp_path):
    asked = []

    def paths(scheme):
        asked.append(scheme)
        return {"include": str(tmp_path)}

    monkeypatch.setattr(triton_support.sysconfig, "get_default_scheme", lambda: default)
    monkeypatch.setattr(triton_support.sysconfig, "get_paths", paths)
    if is_there:
        (tmp_path / "Python.h").touch()
    assert triton_support._has_python_headers() == is_there
    assert asked == ["posix_prefix" if default == "posix_local" else default]


@pytest.mark.parametrize("capability", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942"])
def test_gpus_that_the_kernels_are_made_for(capability):
    assert gpu_reasons(DeviceFacts("cuda", "a GPU", capability)) == []


@pytest.mark.parametrize(
    ("capability", "reason"),
    [
        ("sm_70", r"sm_80 and newer, this GPU \(a GPU\) is sm_70"),
        ("sm_75", "sm_80 and newer"),
        ("gfx1100", r"gfx90a and gfx942, this GPU \(a GPU\) is gfx1100"),
        ("unknown", "no GPU that torch can use"),
    ],
)
def test_other_gpus_are_named(capability, reason):
    (found,) = gpu_reasons(DeviceFacts("cuda", "a GPU", capability))
    assert re.search(reason, found)
