import importlib
import re
import sys
import types

import pytest
import torch

from elips_torch import ArgumentError
from elips_torch.engines.faiss import builds
from elips_torch.engines.faiss.brute_force import knn_faiss
from elips_torch.engines.faiss.builds import (
    faster_build,
    get_threads,
    is_installed,
    load_from,
    load_installed,
    set_threads,
    standing_as_faiss,
)

# A package that answers as faiss does, as far as loading looks at it.
SOURCE = """
import faiss
from faiss.{swig} import level
__version__ = "9.9.9"
threads = 1
def get_compile_options(): return " STAND-IN "
def omp_set_num_threads(n):
    global threads
    threads = n
def omp_get_max_threads(): return threads
me = faiss
"""


def package(folder, swig="swigfaiss_avx2"):
    (folder / "faiss").mkdir()
    (folder / "faiss" / "__init__.py").write_text(SOURCE.format(swig=swig))
    (folder / "faiss" / f"{swig}.py").write_text("level = 1\n")
    (folder / "faiss" / "late.py").write_text("import faiss\nversion = faiss.__version__\n")
    return folder


def build_with(level="generic", **members):
    module = types.SimpleNamespace(**members)
    return builds.FaissBuild(module, {}, "0", level, "", "unknown", builds.Path("nowhere"))


def test_the_installed_build_is_described():
    build = load_installed()
    assert is_installed()
    assert build.module is sys.modules["faiss"]
    assert build.version == build.module.__version__
    assert build.compile_options == build.module.get_compile_options().strip()
    assert build.level
    assert build.version in str(build)
    assert build.level in str(build)
    assert ("OpenBLAS for" in build.blas) == bool(builds._bundled_openblas(build.folder))


def test_a_missing_faiss_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert not is_installed()
    with pytest.raises(ImportError, match="pip install"):
        load_installed()


@pytest.fixture
def before_loading(monkeypatch):
    """No search has asked for faiss yet."""
    monkeypatch.setattr(builds, "_installed", {})


@pytest.mark.usefixtures("before_loading")
def test_a_folder_that_uninstalling_has_left_is_no_faiss(monkeypatch):
    left = types.SimpleNamespace(origin=None)
    monkeypatch.setattr(builds.importlib.util, "find_spec", lambda name: left)
    assert not is_installed()
    with pytest.raises(ImportError, match="pip install"):
        load_installed()


@pytest.mark.usefixtures("before_loading")
@pytest.mark.parametrize("error", [AttributeError("no attribute 'delete_X'"), SystemExit(1)])
def test_a_broken_faiss_says_how_to_mend_it(monkeypatch, error):
    def fail(name):
        raise error

    monkeypatch.setattr(builds.importlib, "import_module", fail)
    installed = [types.SimpleNamespace(name=name) for name in ("torch", "faiss-gpu-cu12", None, "faiss-cpu")]
    monkeypatch.setattr(builds, "distributions", lambda: installed)
    message = f"cannot be imported: {error}; faiss-cpu and faiss-gpu-cu12 have written into the same folder: "
    with pytest.raises(ImportError, match=re.escape(message + "pip uninstall -y faiss-cpu faiss-gpu-cu12")):
        load_installed()
    monkeypatch.setattr(builds, "distributions", lambda: installed[:2])
    with pytest.raises(ImportError, match=re.escape(f"cannot be imported: {error}") + "$"):
        load_installed()


@pytest.mark.usefixtures("before_loading")
def test_a_package_that_was_removed_in_part_is_broken(monkeypatch):
    monkeypatch.setattr(builds.importlib, "import_module", lambda name: types.ModuleType("faiss"))
    with pytest.raises(ImportError, match="cannot be imported: module 'faiss' has no attribute"):
        load_installed()


def test_another_build_loads_beside_the_installed_one(tmp_path):
    installed = load_installed()
    before = dict(sys.modules), list(sys.path)
    other = load_from(package(tmp_path))
    assert (other.version, other.level, other.compile_options) == ("9.9.9", "AVX2", "STAND-IN")
    assert other.folder == tmp_path / "faiss"
    # It saw itself under the name, and the name stands for the installed one again.
    assert other.module.me is other.module
    assert sys.modules["faiss"] is installed.module
    assert {name for name in sys.modules if name.startswith("faiss")} == {
        name for name in before[0] if name.startswith("faiss")
    }
    assert sys.path == before[1]
    assert not other.has_gpu


def test_what_a_build_imports_late_is_its_own(tmp_path):
    installed = load_installed()
    other = load_from(package(tmp_path))
    with standing_as_faiss(other):
        assert importlib.import_module("faiss.late").version == "9.9.9"
        assert sys.modules["faiss"] is other.module
    assert sys.modules["faiss"] is installed.module
    assert "faiss.late" not in sys.modules
    assert other.modules["faiss.late"].version == "9.9.9"


def test_the_installed_build_loaded_a_second_time_still_searches():
    installed = load_installed()
    again = load_from(installed.folder.parent)
    assert again.module is not installed.module
    vectors = torch.eye(8)
    for build in (installed, again, installed):
        assert knn_faiss(build, vectors, vectors, 1, "ip")[1].flatten().tolist() == list(range(8))


def test_a_folder_without_faiss(tmp_path):
    with pytest.raises(ArgumentError, match="expected a folder that holds"):
        load_from(tmp_path)
    assert str(tmp_path) not in sys.path


@pytest.mark.parametrize("line", ["raise SystemExit(1)", "raise ImportError('no such symbol')"])
def test_a_build_that_does_not_load_leaves_no_trace(tmp_path, line):
    installed = load_installed()
    package(tmp_path)
    (tmp_path / "faiss" / "__init__.py").write_text(line)
    with pytest.raises(ImportError):
        load_from(tmp_path)
    assert sys.modules["faiss"] is installed.module
    assert str(tmp_path) not in sys.path


@pytest.mark.parametrize(
    ("swig", "level"), [("swigfaiss", "generic"), ("swigfaiss_avx512", "AVX512"), ("swigfaiss_sve", "SVE")]
)
def test_the_level_is_that_of_the_module_loaded(tmp_path, swig, level):
    assert load_from(package(tmp_path, swig)).level == level


def test_a_build_that_dispatches_at_run_time_is_asked():
    config = types.SimpleNamespace(get_level_name=lambda: "AVX512")
    assert builds._level(types.SimpleNamespace(SIMDConfig=config), {"faiss.swigfaiss": None}) == "AVX512"
    config.get_level_name = lambda: "NONE"
    assert builds._level(types.SimpleNamespace(SIMDConfig=config), {"faiss.swigfaiss": None}) == "generic"


@pytest.mark.parametrize(
    ("level", "capability", "faster"),
    [
        ("generic", "AVX512", True),
        ("generic", "AVX2", True),
        ("generic", "DEFAULT", False),
        ("AVX2", "AVX2", False),
        ("AVX512", "AVX512", False),
    ],
)
def test_a_faster_build_is_named_where_there_is_one(monkeypatch, level, capability, faster):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    line = faster_build(build_with(level))
    assert (line is not None) == faster
    if faster:
        assert capability in line
        assert "pip install" in line


def test_threads_are_set_in_the_loops_and_in_the_products():
    build = load_installed()
    before = get_threads(build)
    try:
        for count in (1, 2):
            set_threads(build, count)
            assert get_threads(build) == count
            assert build.module.omp_get_max_threads() == count
            for library in builds._bundled_openblas(build.folder):
                threaded = library.openblas_get_parallel() != 0
                assert library.openblas_get_num_threads() == (count if threaded else 1)
    finally:
        set_threads(build, before)
