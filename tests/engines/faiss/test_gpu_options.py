import types

import faiss
import pytest
from recording_gpu_faiss import recording_build

from elips_torch.core.errors import ImplementationError, ParameterError
from elips_torch.engines.faiss.builds import load_installed
from elips_torch.engines.faiss.gpu_options import GpuOptions, cloner_options, index_config, read_options
from elips_torch.engines.faiss.gpu_resources import device_resources
from elips_torch.engines.faiss.transfer import to_gpu

KINDS = {
    "IndexFlatL2": "GpuIndexFlat",
    "IndexIVFFlat": "GpuIndexIVFFlat",
    "IndexIVFPQ": "GpuIndexIVFPQ",
    "IndexIVFScalarQuantizer": "GpuIndexIVFScalarQuantizer",
}


def stand_in(name, ntotal=5):
    return type(name, (), {"d": 8, "ntotal": ntotal})()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("space", ["device", "unified"])
def test_one_index_is_made_with_its_own_configuration(monkeypatch, name, space):
    build = recording_build(monkeypatch)
    options = GpuOptions(
        use_float16=True,
        use_float16_coarse=True,
        precomputed_tables=True,
        interleaved_layout=False,
        indices_options="cpu",
        reserve_vectors=70,
        memory_space=space,
        allow_cpu_coarse=True,
    )
    index = stand_in(name, ntotal=0)
    made = to_gpu(build, index, [1], options)
    ((resources, kind, source, config),) = build.module.copies
    assert (kind, source) == (KINDS[name], index)
    assert resources is device_resources(build, 1).resources
    assert (config.device, config.memorySpace) == (1, 2 if space == "unified" else 1)
    if name == "IndexFlatL2":
        assert config.useFloat16
        return
    assert (config.interleavedLayout, config.indicesOptions, config.allowCpuCoarseQuantizer) == (
        False,
        0,
        True,
    )
    assert config.flatConfig.useFloat16
    assert made.reserved == 70
    if name == "IndexIVFPQ":
        assert config.useFloat16LookupTables
        assert config.usePrecomputedTables


def test_no_room_is_made_where_there_are_vectors(monkeypatch):
    build = recording_build(monkeypatch)
    made = to_gpu(
        build, stand_in("IndexIVFFlat"), [0], GpuOptions(reserve_vectors=70, interleaved_layout=True)
    )
    assert not hasattr(made, "reserved")


def test_what_has_no_configuration_is_named(monkeypatch):
    build = recording_build(monkeypatch)
    with pytest.raises(
        ImplementationError, match="index is IndexPreTransform; faiss sets interleaved_layout"
    ):
        to_gpu(build, stand_in("IndexPreTransform"), [0], GpuOptions(memory_space="unified"))
    with pytest.raises(ImplementationError, match="on one GPU only"):
        to_gpu(build, stand_in("IndexFlatL2"), [0, 1], GpuOptions(memory_space="unified"))
    assert build.module.copies == []


def test_what_faiss_does_not_copy_is_told_with_its_reason(monkeypatch):
    build = recording_build(monkeypatch)

    def refuse(*arguments):
        raise RuntimeError(
            "Error in clone at a.cpp:1: Error: 'false' failed: This index type is not implemented"
        )

    build.module.index_cpu_to_gpu = refuse
    with pytest.raises(ImplementationError, match="no IndexHNSWFlat on a GPU: 'false' failed: This index"):
        to_gpu(build, stand_in("IndexHNSWFlat"))


@pytest.mark.parametrize("kind", KINDS.values())
def test_the_real_build_has_these_configurations(kind):
    build = load_installed()
    if not build.has_gpu:
        pytest.skip("needs a faiss with GPU code")
    options = GpuOptions(
        use_float16=True,
        use_float16_coarse=True,
        precomputed_tables=True,
        interleaved_layout=False,
        indices_options="32bit",
        memory_space="unified",
        allow_cpu_coarse=True,
    )
    config = index_config(build, options, kind, 3)
    assert config.device == 3
    assert faiss.memorySpaceToString(config.memorySpace) == "Unified"
    if kind == "GpuIndexFlat":
        assert config.useFloat16
        return
    assert config.indicesOptions == faiss.INDICES_32_BIT
    assert (config.interleavedLayout, config.allowCpuCoarseQuantizer) == (False, True)
    assert config.flatConfig.useFloat16
    if kind == "GpuIndexIVFPQ":
        assert config.useFloat16LookupTables
        assert config.usePrecomputedTables
    usual = index_config(build, GpuOptions(), kind, 0)
    # None leaves the layout as faiss has it.
    assert usual.interleavedLayout == getattr(faiss, f"{kind}Config")().interleavedLayout
    assert faiss.memorySpaceToString(usual.memorySpace) == "Device"


def test_every_attribute_that_is_set_exists_in_faiss():
    build = load_installed()
    if not build.has_gpu:
        pytest.skip("needs a faiss with GPU code")
    options = GpuOptions(shard=True, interleaved_layout=True)
    made = [cloner_options(build, options, several=several) for several in (False, True)]
    made += [index_config(build, options, kind, 0) for kind in KINDS.values()]
    for each in made:
        # Properties of the bindings live in classes; a name that faiss does not know would be set here.
        assert set(vars(each)) <= {"this", "thisown"}


def test_options_are_keywords_and_unknown_ones_are_named():
    assert read_options(use_float16=True, shard=True) == GpuOptions(use_float16=True, shard=True)
    with pytest.raises(
        ParameterError, match="no option 'use_fp16' of indexes on GPUs, there are use_float16, "
    ):
        read_options(use_fp16=True)


def test_cuvs_reaches_faiss_as_it_was_asked_for(monkeypatch):
    build = recording_build(monkeypatch)
    build.module.GpuIndexConfig = types.SimpleNamespace
    build.module.should_use_cuvs = lambda config: config.use_cuvs
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    build = type(build)(**{**vars(build), "compile_options": "GPU CUVS"})
    for asked, used in (("auto", True), ("require", True), ("off", False)):
        options = GpuOptions(use_cuvs=asked)
        assert cloner_options(build, options, several=False).use_cuvs is used
        assert index_config(build, options, "GpuIndexIVFPQ", 0).use_cuvs is used
        assert to_gpu(build, stand_in("IndexFlatL2"), [0], options).uses_cuvs is used
