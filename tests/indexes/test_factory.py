"""Descriptions of indexes mean what they mean to faiss."""

import faiss
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elips_torch import (
    DtypeError,
    ElipsError,
    FactoryError,
    FlatIndex,
    IVFFlatIndex,
    IVFPQIndex,
    IVFSQIndex,
    MetricError,
    ParameterError,
    PQIndex,
    PreTransformIndex,
    RefineIndex,
    SQIndex,
    index_factory,
)
from elips_torch.indexes.factory_parts import KINDS, parse

DIM = 128
QTYPES = {
    faiss.ScalarQuantizer.QT_8bit: "int8",
    faiss.ScalarQuantizer.QT_6bit: "int6",
    faiss.ScalarQuantizer.QT_4bit: "int4",
    faiss.ScalarQuantizer.QT_fp16: "fp16",
    faiss.ScalarQuantizer.QT_bf16: "bf16",
}
TRANSFORMS = {
    "PCAMatrix": "PCA",
    "OPQMatrix": "OPQ",
    "RandomRotationMatrix": "RandomRotation",
    "ITQTransform": "ITQ",
    "NormalizationTransform": "L2Normalize",
}


def faiss_structure(index):
    """Return what an index of faiss consists of, as nested tuples."""
    index = faiss.downcast_index(index)
    # By name: where a process has loaded two builds of faiss, objects may be dressed as classes of the other.
    kinds = [kind.__name__ for kind in type(index).__mro__]
    if kinds[0] in ("IndexIDMap", "IndexIDMap2"):
        return faiss_structure(index.index)
    if "IndexRefine" in kinds:
        kept = faiss.downcast_index(index.refine_index)
        dtype = "fp32" if type(kept).__name__.startswith("IndexFlat") else QTYPES[kept.sq.qtype]
        return "RefineIndex", dtype, faiss_structure(index.base_index)
    if kinds[0] == "IndexPreTransform":
        inner = faiss_structure(index.index)
        for i in reversed(range(index.chain.size())):
            step = faiss.downcast_VectorTransform(index.chain.at(i))
            kind = TRANSFORMS[type(step).__name__]
            facts = (step.M,) if kind == "OPQ" else (step.eigen_power < 0,) if kind == "PCA" else ()
            if kind == "PCA" and step.random_rotation:
                # Ours rotates in a step of its own.
                inner = "PreTransformIndex", ("RandomRotation", step.d_out, step.d_out), inner
            inner = "PreTransformIndex", (kind, step.d_in, step.d_out, *facts), inner
        return inner
    lists = ()
    if "IndexIVF" in kinds:
        lists = (index.nlist, None if kinds[0] == "IndexIVFFlat" else index.by_residual)
    if hasattr(index, "pq"):
        facts = (index.pq.M, index.pq.nbits)
    else:
        facts = (QTYPES[index.sq.qtype],) if hasattr(index, "sq") else ()
    name = type(index).__name__.removeprefix("Index").replace("ScalarQuantizer", "SQ") + "Index"
    return name, index.d, index.metric_type == faiss.METRIC_L2, *facts, *lists


def structure(index):
    """Return the same of one of ours."""
    name = type(index).__name__
    if isinstance(index, RefineIndex):
        dtype = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[index.dtype]
        return name, dtype, structure(index.index)
    if isinstance(index, PreTransformIndex):
        step = index.transform
        kind = type(step).__name__
        facts = (step.m,) if kind == "OPQ" else (step.whiten,) if kind == "PCA" else ()
        return name, (kind, step.dim_in, step.dim_out, *facts), structure(index.index)
    lists = ()
    if hasattr(index, "nlist"):
        lists = (index.nlist, getattr(index, "by_residual", None))
    facts = (index.m, index.nbits) if hasattr(index, "nbits") else ()
    facts = (index.qtype,) if hasattr(index, "qtype") else facts
    return name, index.dim, index.metric == "l2", *facts, *lists


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize(
    "description",
    [
        "Flat",
        "IVF1024,Flat",
        "IVF1k,Flat",
        "IVF016,Flat",
        "IVF256,SQ8",
        "IVF256,SQ6",
        "IVF256,SQ4",
        "IVF256,SQfp16",
        "IVF256,SQbf16",
        "SQ8",
        "SQ6",
        "SQ4",
        "SQfp16",
        "SQbf16",
        "PQ32",
        "PQ32x8",
        "PQ32x4",
        "PQ32np",
        "IVF1024,PQ32",
        "IVF1024,PQ16x4",
        "IVF1024,PQ16x8np",
        "PCA64,Flat",
        "PCA128,Flat",
        "PCAR64,SQ8",
        "PCAW64,Flat",
        "PCAWR64,IVF16,Flat",
        "OPQ32,PQ32",
        "OPQ32_64,IVF64,PQ32x4",
        "RR,Flat",
        "RR64,Flat",
        "RR200,Flat",
        "ITQ,Flat",
        "ITQ64,Flat",
        "L2norm,IVF16,Flat",
        "L2norm,PCA64,SQ8",
        "PCA64,L2norm,IVF16,Flat",
        "Flat,RFlat",
        "IVF1024,Flat,RFlat",
        "OPQ32,IVF1024,PQ32x4,RFlat",
        "PCA64,IVF16,PQ32,Refine(SQfp16)",
        "IVF16,PQ32,Refine(Flat)",
        "IVF16,PQ32,Refine(SQbf16)",
        "IVF16,PQ32,RFlat,RFlat",
        "IDMap,Flat",
        "IDMap2,IVF16,Flat",
        "PCA64,IDMap,Flat",
        "Flat,IDMap",
        "OPQ32,IVF16,PQ32,RFlat,IDMap2",
    ],
)
def test_a_description_means_what_it_means_to_faiss(description, metric):
    theirs = faiss.index_factory(
        DIM, description, faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    )
    assert structure(index_factory(DIM, description, metric)) == faiss_structure(theirs)


@st.composite
def descriptions(draw):
    """A valid description for vectors of dim 128, every part drawn with its numbers."""
    parts, dim = [], DIM
    for _ in range(draw(st.integers(0, 2))):
        kind = draw(st.sampled_from(["PCA", "PCAR", "PCAW", "PCAWR", "RR", "ITQ", "OPQ", "L2norm"]))
        size = dim if kind == "L2norm" else draw(st.sampled_from([s for s in (16, 32, 64, 128) if s <= dim]))
        parts.append({"L2norm": "L2norm", "OPQ": f"OPQ8_{size}"}.get(kind, f"{kind}{size}"))
        dim = size
    if draw(st.booleans()):
        parts.append(f"IVF{draw(st.integers(1, 5000))}")
    bits = draw(st.sampled_from(["", "x8", "x4"]))
    m = draw(st.sampled_from([m for m in range(1, dim + 1) if dim % m == 0]))
    parts.append(draw(st.sampled_from(["Flat", "SQ8", "SQ6", "SQ4", "SQfp16", "SQbf16", f"PQ{m}{bits}"])))
    parts += draw(st.sampled_from([[], ["RFlat"], ["Refine(SQfp16)"], ["Refine(SQbf16)"]]))
    return parts


@given(descriptions(), st.sampled_from([",", ", ", " ,", "\t,\n"]))
def test_every_combination_is_read_as_faiss_reads_it(parts, comma):
    description = comma.join(parts)
    read = parse(description)
    assert [part.text for part in read] == parts
    assert [description[part.start :][: len(part.text)] for part in read] == parts
    ours = structure(index_factory(DIM, description))
    assert ours == faiss_structure(faiss.index_factory(DIM, ",".join(parts)))


def test_every_kind_of_part_can_be_made():
    # A kind without makers says something about the others.
    words = {"transform": "{},Flat", "lists": "{},Flat", "refinement": "Flat,{}", "ids": "{},Flat"}
    for kind in KINDS:
        for example in kind.example.replace(" or ", ", ").split(", "):
            description = words.get(kind.place.value, "{}").format(example)
            assert kind in [part.kind for part in parse(description)]
            index_factory(DIM, description)


def test_an_index_from_a_description_works():
    vectors = torch.randn(700, 32, generator=torch.Generator().manual_seed(0))
    index = index_factory(32, "OPQ8,IVF8,PQ8x4,RFlat", "cosine", nprobe=8, k_factor=10, k=3, niter=4).fit(
        vectors
    )
    index.add(vectors)
    found = index.search(vectors[:50])
    assert found.ids.shape == (50, 3)
    assert (found.ids[:, 0] == torch.arange(50)).float().mean() > 0.9
    assert index.higher_is_better


def test_options_reach_every_part_that_takes_them():
    index = index_factory(
        DIM, "PCA64,OPQ8,IVF16,PQ8,RFlat", seed=5, nprobe=3, k_factor=2.5, device="cpu", by_residual=False
    )
    pca, opq, lists = index.index.transform, index.index.index.transform, index.index.index.index
    assert (pca.seed, opq.seed, lists.seed) == (5, 5, 5)
    assert (lists.nprobe, lists.by_residual, index.k_factor) == (3, False, 2.5)
    # What is kept for refinement is said by the description.
    halves = index_factory(DIM, "IVF16,Flat,RFlat", dtype=torch.float16)
    assert (halves.dtype, halves.index.dtype) == (torch.float32, torch.float16)
    assert index_factory(DIM, "Flat,Refine(SQfp16)", dtype=torch.bfloat16).dtype == torch.float16
    assert index_factory(DIM, "Flat,RFlat").k_factor == 4
    assert index_factory(DIM, "Flat", "lp", p=3).p == 3


TRANSFORM = "transform (PCA64, PCAR64, PCAW64, PCAWR64, OPQ32 or OPQ32_64, RR64, ITQ64, L2norm)"
VECTORS = "stored vectors (Flat, SQ8, SQ6, SQ4, SQfp16, SQbf16, PQ32 or PQ32x4)"
FIRST = f"expected {TRANSFORM}; lists (IVF1024); {VECTORS}; ids (IDMap or IDMap2)"
OFFER = "FaissIndex.from_factory(dim, description) makes an index of faiss"
LAST = "expected refinement (RFlat, Refine(SQfp16), Refine(SQbf16)); ids (IDMap or IDMap2); or the end"


@pytest.mark.parametrize(
    ("description", "where", "fault"),
    [
        ("", "part 1:@0^1", f"nothing stands there; {FIRST}"),
        ("Flat,", "part 2:@5^1", f"nothing stands there; {LAST}"),
        ("PCA64, ,Flat", "part 2:@6^1", f"nothing stands there; {FIRST}"),
        ("IVF16", "part 2:@5^1", f"nothing stands there; expected {VECTORS}"),
        ("PCA64,IDMap", "part 3:@11^1", f"nothing stands there; {FIRST}"),
        ("IVF16,Falt", "part 2, 'Falt':@6^4", f"no such part; expected {VECTORS}"),
        ("IVF16, Falt ", "part 2, 'Falt':@7^4", f"no such part; expected {VECTORS}"),
        ("ivf16,Flat", "part 1, 'ivf16':@0^5", f"no such part; {FIRST}"),
        ("IVF0,Flat", "part 1, 'IVF0':@0^4", f"no such part; {FIRST}"),
        ("IVF 16,Flat", "part 1, 'IVF 16':@0^6", f"no such part; {FIRST}"),
        ("IVF16,IVF16,Flat", "part 2, 'IVF16':@6^5", f"lists cannot stand there; expected {VECTORS}"),
        ("Flat,PCA64", "part 2, 'PCA64':@5^5", f"transform cannot stand there; {LAST}"),
        ("Flat,SQ8", "part 2, 'SQ8':@5^3", f"stored vectors cannot stand there; {LAST}"),
        ("RFlat", "part 1, 'RFlat':@0^5", f"refinement cannot stand there; {FIRST}"),
        ("IVF16,IDMap,Flat", "part 2, 'IDMap':@6^5", f"ids cannot stand there; expected {VECTORS}"),
        ("IVF16,PQ16x4fs", "part 2, 'PQ16x4fs':@6^8", "faiss' fast-scan layout is not here"),
        ("IVF16,PQ16+8", "part 2, 'PQ16+8':@6^6", "RFlat refines by the originals"),
        ("IVF16_HNSW32,Flat", "part 1, 'IVF16_HNSW32':@0^12", "pass coarse="),
        ("HNSW32", "part 1, 'HNSW32':@0^6", f"no graph indexes here; {OFFER}"),
        ("IVF16,RaBitQ", "part 2, 'RaBitQ':@6^6", OFFER),
        ("IMI2x8,Flat", "part 1, 'IMI2x8':@0^6", f"faiss has it, this library does not; {OFFER}"),
        ("IVF16,SQ8_direct", "part 2, 'SQ8_direct':@6^10", "with a range for each feature"),
        ("Flat,Refine(SQ8)", "part 2, 'Refine(SQ8)':@5^11", "kept as numbers, in float32"),
        ("IVF16,PQ30", "part 2, 'PQ30':@6^4", "m is 30, which does not divide dim = 128"),
        ("PCA64,PQ128", "part 2, 'PQ128':@6^5", "m is 128, which does not divide dim = 64"),
        ("PQ16x12", "part 1, 'PQ16x12':@0^7", "nbits is 12, expected 8 or 4"),
        ("PCA64,PCA100,Flat", "part 2, 'PCA100':@6^6", "dim_out is 100, expected at most dim_in = 64"),
        ("OPQ3,Flat", "part 1, 'OPQ3':@0^4", "m is 3, expected a divisor of dim = 128"),
    ],
)
def test_a_mistake_is_pointed_at(description, where, fault):
    with pytest.raises(FactoryError) as caught:
        index_factory(DIM, description)
    assert isinstance(caught.value, ElipsError)
    assert isinstance(caught.value, ValueError)
    said, shown, marks = str(caught.value).split("\n")
    what, _, place = where.partition("@")
    start, _, length = place.partition("^")
    assert said.startswith(f"description {description!r}, {what}")
    assert fault in said
    assert shown == f"    {description}"
    assert marks == f"    {' ' * int(start)}{'^' * int(length)}"


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((0, "Flat"), {}, ElipsError, "dim is 0, expected at least 1"),
        ((16, None), {}, DtypeError, "description is None, expected a string"),
        ((16, "Flat", "l3"), {}, MetricError, "metric is 'l3', expected one of"),
        ((16, "Flat", "lp"), {}, MetricError, "p is None"),
        (
            (16, "IVF16,Flat"),
            {"nprob": 1},
            ParameterError,
            "takes the option 'nprob'; they take check_finite,",
        ),
        ((16, "IVF16,Flat"), {"nlist": 1}, ParameterError, "takes the option 'nlist'"),
        ((16, "PQ4"), {"m": 2}, ParameterError, "takes the option 'm'"),
        ((16, "Flat"), {"nprobe": 2}, ParameterError, "no part of 'Flat' takes the option 'nprobe'"),
        # The option is wrong, not the description.
        ((16, "IVF16,Flat"), {"nprobe": 0}, ElipsError, "^nprobe is 0"),
        ((16, "Flat,RFlat"), {"k_factor": 0.5}, ElipsError, "^k_factor is 0.5"),
        # The description is wrong, whatever the options.
        ((16, "IVF16,PQ3"), {"nprobe": 2}, FactoryError, "m is 3"),
    ],
)
def test_bad_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message) as caught:
        index_factory(*arguments, **options)
    assert (type(caught.value) is FactoryError) == (error is FactoryError)


def test_classes_are_those_of_the_library():
    made = [
        index_factory(16, description)
        for description in ("Flat", "SQ8", "PQ4", "IVF4,Flat", "IVF4,SQ8", "IVF4,PQ4")
    ]
    assert [type(index) for index in made] == [
        FlatIndex,
        SQIndex,
        PQIndex,
        IVFFlatIndex,
        IVFSQIndex,
        IVFPQIndex,
    ]
