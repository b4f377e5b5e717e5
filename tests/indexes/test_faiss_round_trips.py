"""Every family goes to faiss and comes back, value for value, also through files."""

import tempfile
import warnings
from pathlib import Path

import faiss
import numpy as np
import torch
from faiss_agreement import assert_agree, assert_finds_the_same, by_hand, uniform
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elips_torch import (
    ITQ,
    OPQ,
    PCA,
    Centring,
    FlatIndex,
    IVFFlatIndex,
    IVFPQIndex,
    IVFSQIndex,
    L2Normalize,
    PQIndex,
    PreTransformIndex,
    RandomRotation,
    RefineIndex,
    SQIndex,
    from_faiss,
    read_faiss,
    write_faiss,
)
from elips_torch.testing.contract import assert_same

DIM, NLIST = 16, 5
TRAINING = uniform(320, seed=9)
# Where codes are bf16, faiss 1.15 rounds queries to that.
QUERIES = uniform(9, seed=3).bfloat16().float()
QUICK = {"niter": 1, "min_points_per_centroid": 1}
METRICS = ("l2", "ip", "cosine", "l1", "linf", "lp", "canberra", "braycurtis", "jensenshannon")
QTYPES = ("int8", "int6", "int4", "fp16", "bf16")
FACTORY_QTYPES = ("SQ8", "SQ6", "SQ4", "SQfp16", "SQbf16")


def many(n):
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=n, deadline=None, suppress_health_check=slow)


@st.composite
def leaves(draw, dim, family, metrics, nprobe=None):
    """An index of a family in cheap settings, not yet trained."""
    metric = draw(st.sampled_from(metrics))
    p = {"p": 2.5} if metric == "lp" else {}
    lists = {"nprobe": nprobe or draw(st.integers(1, NLIST))}
    parts = draw(st.sampled_from((1, 2, 4))), draw(st.sampled_from((4, 8)))
    qtype, residual = draw(st.sampled_from(QTYPES)), draw(st.booleans())
    if family == "flat":
        return FlatIndex(dim, metric, **p)
    if family == "sq":
        return SQIndex(dim, qtype, metric)
    if family == "pq":
        return PQIndex(dim, *parts, metric, **QUICK)
    if family == "ivf":
        return IVFFlatIndex(dim, NLIST, metric, niter=2, **lists, **p)
    if family == "ivfsq":
        return IVFSQIndex(dim, NLIST, qtype, metric, niter=2, by_residual=residual, **lists)
    return IVFPQIndex(dim, NLIST, *parts, metric, by_residual=residual, **lists, **QUICK)


@st.composite
def transforms(draw):
    """Transforms of vectors of ``DIM`` features: one, or two after one another."""
    chains = {
        "pca": lambda: [PCA(DIM, 8, whiten=draw(st.booleans()))],
        "opq": lambda: [OPQ(DIM, 4, dim_out=8, nbits=4, niter=2)],
        "rotation": lambda: [RandomRotation(DIM, seed=draw(st.integers(0, 9)))],
        "itq": lambda: [ITQ(DIM, 8, niter=3)],
        "normalise": lambda: [L2Normalize(DIM)],
        "centred pca": lambda: [Centring(DIM), PCA(DIM, 8)],
        "pca normalised": lambda: [PCA(DIM, 8), L2Normalize(8)],
    }
    return chains[draw(st.sampled_from(sorted(chains)))]()


def filled(index, draw):
    """Train an index, and fill it under own ids or automatic ones, some of which go again."""
    with warnings.catch_warnings():
        # So few vectors make no good codes.
        warnings.simplefilter("ignore")
        index.fit(TRAINING)
    n, seed = draw(st.sampled_from((0, 1, 60))), draw(st.integers(0, 100))
    ids = torch.randperm(n, generator=torch.Generator().manual_seed(seed)) * 7 + 2
    index.add(uniform(n, seed=seed), ids=draw(st.sampled_from((None, ids))))
    if n > 1 and draw(st.booleans()):
        index.remove(index.ids[::5].clone())
    return index


FAMILIES = st.sampled_from(("flat", "sq", "pq", "ivf", "ivfsq", "ivfpq"))


@st.composite
def plain_indexes(draw):
    family = draw(FAMILIES)
    metrics = METRICS if family in ("flat", "ivf") else METRICS[:2]
    return filled(draw(leaves(DIM, family, metrics)), draw)


@st.composite
def nested_indexes(draw):
    """Transforms in front, a refinement around it or not, or only that."""
    chain = draw(st.one_of(st.just([]), transforms()))
    refined = draw(st.booleans())
    dim = chain[-1].dim_out if chain else DIM
    # A refinement asks for so many candidates that this library would read on in other lists.
    index = draw(leaves(dim, draw(FAMILIES), METRICS[:2], NLIST if refined else None))
    for transform in reversed(chain):
        index = PreTransformIndex(transform, index)
    if refined:
        dtype = draw(st.sampled_from((torch.float32, torch.float16, torch.bfloat16)))
        index = RefineIndex(index, draw(st.sampled_from((1, 2.5, 60))), dtype=dtype)
    return filled(index, draw)


def layers(index):
    while isinstance(index, PreTransformIndex | RefineIndex):
        yield index
        index = index.index
    yield index


def is_normalised(index):
    """Return whether faiss holds vectors of length 1 where the index holds others."""
    transforms = [getattr(each, "transform", None) for each in layers(index)]
    return index.metric == "cosine" or any(isinstance(each, L2Normalize) for each in transforms)


def check_round_trip(index):
    there = index.to_faiss()
    assert there.ntotal == index.ntotal
    assert there.is_trained
    # With other factors, rounding decides what is refined.
    if not isinstance(index, RefineIndex) or index.k_factor == 60:
        assert_finds_the_same(index, there, QUERIES, 5)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.faiss"
        write_faiss(index, path)
        read = faiss.read_index(str(path))
        here = read_faiss(path)
    # The file holds what went there: plain faiss finds the same, bit by bit.
    for found, wanted in zip(by_hand(read, QUERIES, 5), by_hand(there, QUERIES, 5), strict=True):
        assert torch.equal(found, wanted)
    for back in (from_faiss(there), here):
        assert sorted(back.ids.tolist()) == sorted(index.ids.tolist())
        check_same_values(index, back)


def check_same_values(index, back):
    found, wanted = back.search(QUERIES, 5), index.search(QUERIES, 5)
    if is_normalised(index):
        torch.testing.assert_close(found.scores, wanted.scores, rtol=1e-5, atol=1e-5)
        return
    assert [type(each) for each in layers(back)] == [type(each) for each in layers(index)]
    assert back.metric == index.metric
    assert back.p == index.p
    assert_same(found, wanted)
    # A file of faiss says of a rotation no more than its matrix, which is then inverted.
    torch.testing.assert_close(
        back.reconstruct(index.ids), index.reconstruct(index.ids), rtol=1e-5, atol=1e-5
    )


@many(40)
@given(index=plain_indexes())
def test_every_family_goes_there_and_comes_back(index):
    check_round_trip(index)


@many(40)
@given(index=nested_indexes())
def test_transforms_and_refinements_go_there_and_come_back(index):
    check_round_trip(index)


@st.composite
def descriptions(draw):
    """An index in faiss's grammar."""
    sq, bits = draw(st.sampled_from(FACTORY_QTYPES)), draw(st.sampled_from(("4x4np", "2x8np", "8x4np")))
    front = draw(st.sampled_from(
        ("", "PCA8,", "PCAR8,", "PCAW8,", "PCAWR8,", "OPQ4,", "OPQ4_8,", "RR8,", "ITQ8,", "L2norm,",
         "PCA8,L2norm,", "L2norm,PCA8,", "RR16,PCA8,")
    ))  # fmt: skip
    lists = draw(st.sampled_from(("", "IVF5,", "IVF5(Flat),", "IVF5(SQ8),")))
    inner = draw(st.sampled_from(("Flat", sq, f"PQ{bits}")))
    back = draw(st.sampled_from(("", "", ",RFlat", ",Refine(SQfp16)", ",Refine(SQbf16)")))
    map_ = draw(st.sampled_from(("", "IDMap,", "IDMap2,")))
    return map_ + front + lists + inner + back


@st.composite
def faiss_indexes(draw):
    """An index that faiss has made, trained and filled."""
    metric = draw(st.sampled_from((faiss.METRIC_L2, faiss.METRIC_INNER_PRODUCT)))
    made = faiss.index_factory(DIM, draw(descriptions()), metric)
    set_cheap(made)
    made.train(TRAINING.numpy())
    vectors, ids = uniform(60, seed=draw(st.integers(0, 99))).numpy(), np.arange(60)[::-1] * 3
    refined = isinstance(faiss.downcast_index(getattr(made, "index", made)), faiss.IndexRefine)
    lists = faiss.try_extract_index_ivf(made)
    if lists is not None:
        lists.nprobe = NLIST if refined else draw(st.integers(1, NLIST))
        if not isinstance(faiss.downcast_index(lists), faiss.IndexIVFFlat):
            lists.by_residual = draw(st.booleans())
    if isinstance(made, faiss.IndexIDMap) or (isinstance(made, faiss.IndexIVF) and draw(st.booleans())):
        made.add_with_ids(vectors, ids)
    else:
        made.add(vectors)
    return made


def set_cheap(index):
    """Let faiss train without iterations that make no difference here."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        for number in range(index.chain.size()):
            transform = faiss.downcast_VectorTransform(index.chain.at(number))
            if isinstance(transform, faiss.OPQMatrix):
                transform.niter = transform.niter_pq = transform.niter_pq_0 = 1
    for name in ("index", "base_index"):
        if hasattr(index, name):
            set_cheap(getattr(index, name))
    if hasattr(index, "pq"):
        index.pq.cp.niter = 1
        index.pq.cp.min_points_per_centroid = 1
    if hasattr(index, "cp"):
        index.cp.min_points_per_centroid = 1


@many(60)
@given(made=faiss_indexes())
def test_what_faiss_makes_comes_here_and_goes_back(made):
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "b.faiss")
        faiss.write_index(made, path)
        read = read_faiss(path)
    here = from_faiss(made)
    assert_same(read.search(QUERIES, 5), here.search(QUERIES, 5))
    if not any(isinstance(each, RefineIndex) for each in layers(here)):
        assert_finds_the_same(here, made, QUERIES, 5)
    assert_agree(by_hand(here.to_faiss(), QUERIES, 5), by_hand(made, QUERIES, 5))
