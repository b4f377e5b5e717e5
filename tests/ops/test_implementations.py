import pytest
import torch

from elips_torch import METRICS, FlatIndex, knn
from elips_torch.core import compilation
from elips_torch.core.dispatch import Request
from elips_torch.core.errors import ArgumentError, ImplementationError
from elips_torch.core.hardware import DeviceFacts
from elips_torch.core.metric import resolve_metric
from elips_torch.core.native import NativeLibrary
from elips_torch.kernels.search_native import LIBRARY
from elips_torch.ops.knn import IMPLEMENTATIONS
from elips_torch.reference.knn import knn as reference


def data(n_rows=3000, n_queries=20, dim=24, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    queries, database = (torch.rand(n, dim, generator=generator) for n in (n_queries, n_rows))
    return queries.to(device), database.to(device)


def request(n_queries, n_rows, dim, screen="int8", device="cpu", metric="l2"):
    kind = resolve_metric(metric)
    return Request(
        torch.device(device), torch.float32, torch.float32, n_queries, n_rows, dim, kind, 10, screen
    )


def automatic(call):
    return next(each.name for each in IMPLEMENTATIONS if not each.reasons_against(call, "auto"))


def no_native(monkeypatch):
    monkeypatch.setattr("elips_torch.ops.knn.library_reasons", lambda device: ["no C++ here"])


def test_small_searches_never_compile_and_large_ones_do(monkeypatch):
    monkeypatch.setattr(LIBRARY, "is_ready", lambda options: False)
    for large in ("native", "compiled"):
        assert automatic(request(1, 20_000, 64)) == "eager"
        assert automatic(request(100, 10_000, 64)) == "eager"
        assert automatic(request(1, 200_000, 768)) == large
        assert automatic(request(512, 80_000, 384)) == large
        without_plane = "native" if large == "native" else "eager"
        assert automatic(request(512, 80_000, 384, screen="none")) == without_plane
        no_native(monkeypatch)


def test_what_is_compiled_already_serves_small_searches(monkeypatch):
    monkeypatch.setattr(LIBRARY, "is_ready", lambda options: True)
    assert automatic(request(1, 20_000, 64)) == "native"
    for metric in ("l2", "ip", "cosine"):
        assert automatic(request(16, 20_000, 64, metric=metric, screen="none")) == "native"
        few = "eager" if metric == "cosine" else "native"
        assert automatic(request(1, 20_000, 64, metric=metric, screen="none")) == few
    assert automatic(request(1, 20_000, 64, screen="bf16")) == "eager"


def test_native_code_says_why_it_cannot_serve(monkeypatch):
    queries, database = data()
    with pytest.raises(ImplementationError, match="no screening plane in int8 or float32"):
        knn(queries, database, 5, screen="bf16", implementation="native")
    facts = DeviceFacts("cpu", "2 cores", "NEON")
    monkeypatch.setattr("elips_torch.kernels.search_native.device_facts", lambda device: facts)
    with pytest.raises(
        ImplementationError, match="C\\+\\+ code for x86-64 with AVX2 under Linux, this is NEON"
    ):
        knn(queries, database, 5, screen="int8", implementation="native")


def test_native_code_that_does_not_compile_leaves_the_search_to_torch(monkeypatch, caplog, tmp_path):
    (tmp_path / "search.cpp").write_text("this is no C++\n")
    monkeypatch.setattr("elips_torch.core.native.cache_folder", lambda: tmp_path)
    monkeypatch.setattr("elips_torch.kernels.search_native.LIBRARY", NativeLibrary(tmp_path / "search.cpp"))
    queries, database = data(n_rows=30_000, n_queries=600)
    index = FlatIndex(24)
    index.add(database)
    assert automatic(request(600, 30_000, 24)) == "native"
    expected = index.search(queries, 5, implementation="eager")
    assert torch.equal(index.search(queries, 5).ids, expected.ids)
    assert "search.cpp does not compile here" in caplog.text
    assert automatic(request(600, 30_000, 24)) != "native"
    assert "its C++ code does not compile here; see the log" in str(index.explain(queries, 5))


def test_triton_on_a_cpu_is_refused_with_every_reason():
    queries, database = data()
    with pytest.raises(ImplementationError, match="run on CUDA and ROCm, the tensors are on cpu"):
        knn(queries, database, 5, implementation="triton")
    with pytest.raises(ImplementationError, match=r"CUDA and ROCm.*float32, bfloat16 and float16"):
        knn(queries.double(), database, 5, implementation="triton")


def test_compiled_without_a_plane_is_refused():
    queries, database = data()
    with pytest.raises(ImplementationError, match="no screening plane"):
        knn(queries, database, 5, screen="none", implementation="compiled")


def test_forked_processes_and_machines_without_a_compiler_run_eager(monkeypatch):
    no_native(monkeypatch)
    call = request(512, 80_000, 384)
    monkeypatch.setitem(compilation._state, "forked", True)
    assert automatic(call) == "eager"
    monkeypatch.setitem(compilation._state, "forked", False)
    monkeypatch.setattr(compilation, "find_cpp_compiler", lambda: None)
    assert automatic(call) == "eager"
    assert any("C++ compiler" in reason for reason in compilation.compiler_reasons("cpu"))


def test_without_avx512_nothing_is_compiled(monkeypatch):
    no_native(monkeypatch)
    facts = DeviceFacts("cpu", "2 cores", "AVX2")
    monkeypatch.setattr("elips_torch.ops.knn.device_facts", lambda device: facts)
    assert automatic(request(512, 80_000, 384)) == "eager"


def test_a_compiler_that_fails_leaves_the_function_as_it_is(monkeypatch, caplog):
    from torch._dynamo.exc import BackendCompilerFailed

    def broken(function, **options):
        def twin(*args):
            raise BackendCompilerFailed(broken, RuntimeError("no linker"), None)

        return twin

    monkeypatch.setattr(torch, "compile", broken)
    double = compilation.Compiled(lambda x: 2 * x)
    for _ in range(2):
        assert double(torch.ones(3)).tolist() == [2.0] * 3
    assert caplog.text.count("runs uncompiled") == 1


@pytest.mark.parametrize("screen", ["int8", "bf16", "none"])
@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_a_screen_for_bare_tensors_changes_nothing(metric, screen):
    queries, database = data()
    expected = reference(queries, database, 7, metric)
    found = knn(queries, database, 7, metric=metric, screen=screen)
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.scores, expected.scores)


def test_bare_tensors_are_screened_in_blocks(monkeypatch):
    from elips_torch.kernels import knn_blocks

    queries, database = data()
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand(20, 3000, generator=generator) < 0.5
    exclude = torch.randint(-1, 3000, (20, 4), generator=generator)
    expected = reference(queries, database, 9, "l2", mask=mask, exclude=exclude)
    monkeypatch.setattr(knn_blocks, "rows_at_once", lambda *_: 700)
    found = knn(queries, database, 9, mask=mask, exclude=exclude, screen="int8")
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.scores, expected.scores)


def test_screens_that_cannot_serve_are_refused():
    queries, database = data()
    with pytest.raises(ArgumentError, match="'l1' is no product"):
        knn(queries, database, 3, metric="l1", screen="int8")
    with pytest.raises(ArgumentError, match=r"'canberra' is no product.*float64"):
        FlatIndex(8, "canberra", dtype=torch.float64, screen="bf16")
    with pytest.raises(ArgumentError, match="screen is 'int4', expected one of 'auto'"):
        FlatIndex(8, screen="int4")


@pytest.mark.parametrize("implementation", ["eager", "compiled"])
@pytest.mark.parametrize("low", [-128, 0])
def test_integers_within_int8_need_no_rescoring(low, implementation, monkeypatch):
    from elips_torch.kernels import knn_screened

    generator = torch.Generator().manual_seed(0)
    queries, database = (
        torch.randint(low, low + 256, (n, 48), generator=generator).float() for n in (9, 4000)
    )
    expected = reference(queries, database, 8, "l2")
    index = FlatIndex(48, screen="int8")
    index.add(database[:1000])
    index.add(database[1000:])
    # Nothing may look at the vectors themselves.
    monkeypatch.delattr(knn_screened, "exact_pair_scores")
    for n_queries in (1, 2, 9):
        found = index.search(queries[:n_queries], 8, implementation=implementation)
        assert torch.equal(found.ids, expected.ids[:n_queries])
        assert torch.equal(found.scores, expected.scores[:n_queries])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("n_queries", [1, 20, 300])
@pytest.mark.parametrize("metric", [metric.name for metric in METRICS])
def test_triton_gives_the_definition(metric, n_queries):
    p = 3.0 if metric == "lp" else None
    queries, database = data(n_rows=5000, n_queries=n_queries, device="cuda")
    expected = reference(queries.cpu(), database.cpu(), 9, metric, p)
    for screen in ("auto", "none"):
        found = knn(queries, database, 9, metric=metric, p=p, screen=screen, implementation="triton")
        assert torch.equal(found.ids.cpu(), expected.ids)
        assert torch.equal(found.scores.cpu(), expected.scores)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("screen", ["auto", "int8", "bf16", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_index_on_a_gpu_is_screened(dtype, screen):
    queries, database = data(n_rows=20_000, device="cuda")
    index = FlatIndex(24, "ip", dtype=dtype, screen=screen, device="cuda")
    index.add(database)
    expected = reference(queries.cpu(), database.to(dtype).cpu(), 12, "ip")
    for implementation in ("auto", "triton"):
        found = index.search(queries, 12, implementation=implementation)
        assert torch.equal(found.ids.cpu(), expected.ids)
        assert torch.equal(found.scores.cpu(), expected.scores)


def test_without_fast_int8_products_bare_tensors_go_unscreened(monkeypatch):
    monkeypatch.setattr("elips_torch.kernels.screen_choice.int8_product_is_fast", lambda device: False)
    queries, database = data(n_queries=300)
    expected = knn(queries, database, 5, screen="none")
    assert torch.equal(knn(queries, database, 5).ids, expected.ids)
