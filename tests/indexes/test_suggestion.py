"""What is suggested fits, is what the memory allows, and can be made."""

import copy
import pickle
import re
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elips_torch import (
    ArgumentError,
    DtypeError,
    FlatIndex,
    IVFFlatIndex,
    IVFSQIndex,
    MetricError,
    index_factory,
    suggest_index,
)
from elips_torch.evaluation.ground_truth import exact_neighbours
from elips_torch.indexes.memory_estimate import estimate_memory_bytes

MIB = 2**20


def filled(description, vectors, metric="l2"):
    quick = {"niter": 2} if "IVF" in description or "PQ" in description else {}
    with warnings.catch_warnings():
        # Few vectors to learn from are enough here.
        warnings.simplefilter("ignore", UserWarning)
        index = index_factory(vectors.shape[1], description, metric, **quick).fit(vectors)
    index.add(vectors)
    return index


@pytest.mark.parametrize(
    ("arguments", "description"),
    [
        ({"n": 5_000, "dim": 384}, "Flat"),
        ({"n": 20_000, "dim": 384}, "Flat"),
        ({"n": 20_001, "dim": 384}, "IVF512,Flat"),
        ({"n": 1_000_000, "dim": 128}, "IVF4096,Flat"),
        ({"n": 1_000_000, "dim": 128, "target_recall": 1}, "Flat"),
        ({"n": 1_000_000, "dim": 128, "memory_bytes": 10**9}, "IVF4096,Flat"),
        ({"n": 1_000_000, "dim": 128, "memory_bytes": 450 * MIB}, "IVF4096,SQfp16"),
        ({"n": 1_000_000, "dim": 128, "memory_bytes": 200 * MIB}, "IVF4096,SQ8"),
        ({"n": 1_000_000, "dim": 128, "memory_bytes": 138 * MIB, "target_recall": 0.9}, "IVF4096,SQ6"),
        ({"n": 1_000_000, "dim": 128, "memory_bytes": 108 * MIB, "target_recall": 0.5}, "OPQ64,IVF4096,PQ64"),
        (
            {"n": 1_000_000, "dim": 130, "memory_bytes": 78 * MIB, "target_recall": 0.3},
            "OPQ32_128,IVF4096,PQ32",
        ),
        ({"n": 5_000, "dim": 64, "memory_bytes": 500_000}, "SQ8"),
        ({"n": 1_000_000, "dim": 128, "memory_bytes": 300 * MIB, "metric": "l1"}, "IVF4096,SQfp16"),
        ({"n": 1, "dim": 1}, "Flat"),
    ],
)
def test_the_finest_that_fits_is_suggested(arguments, description):
    suggestion = suggest_index(**arguments)
    assert suggestion == description
    assert suggestion.memory_bytes <= arguments.get("memory_bytes", 10**12)
    assert re.fullmatch(r"[A-Z0-9].*[^.]\.", suggestion.reason)
    assert ("nprobe" in suggestion.reason) == ("IVF" in description)


def test_sizes_are_written_out():
    assert "of the 1000 MiB allowed" in suggest_index(1_000_000, 128, memory_bytes=1000 * MIB).reason


def test_a_suggestion_is_a_string_for_the_factory():
    suggestion = suggest_index(30_000, 16)
    assert isinstance(index_factory(16, suggestion), IVFFlatIndex)
    assert isinstance(index_factory(16, suggest_index(100, 16)), FlatIndex)
    assert isinstance(index_factory(16, suggest_index(30_000, 16, memory_bytes=2 * MIB)), IVFSQIndex)
    for copied in (copy.deepcopy(suggestion), pickle.loads(pickle.dumps(suggestion))):
        assert copied == suggestion
        assert (copied.memory_bytes, copied.reason) == (suggestion.memory_bytes, suggestion.reason)


@pytest.mark.parametrize("metric", ["l2", "cosine", "l1"])
@pytest.mark.parametrize(
    "description",
    [
        "Flat",
        "SQ8",
        "SQfp16",
        "PQ12x4",
        "IVF32,Flat",
        "IVF32,SQ6",
        "IVF32,PQ12x4",
        "RR,IVF32,SQ8,RFlat",
        "PCAR24,L2norm,IVF32,SQbf16,Refine(SQfp16)",
    ],
)
def test_the_estimated_memory_is_what_is_taken(description, metric):
    vectors = torch.randn(3000, 48, generator=torch.Generator().manual_seed(0))
    index = filled(description, vectors, metric)
    taken = index.memory_bytes()
    assert estimate_memory_bytes(index, 3000) == pytest.approx(taken, rel=0.01)
    assert estimate_memory_bytes(index_factory(48, description, metric), 3000) == pytest.approx(
        taken, rel=0.01
    )
    assert estimate_memory_bytes(index, 0) < 0.2 * taken


def test_the_memory_of_a_suggestion_is_what_is_taken():
    vectors = torch.randn(21_000, 16, generator=torch.Generator().manual_seed(0))
    # What screens codes is kept where the machine multiplies them fast: limits are what each takes here.
    for description in ("IVF512,Flat", "IVF512,SQfp16", "IVF512,SQ8", "IVF512,SQ6"):
        limit = estimate_memory_bytes(index_factory(16, description), 21_000)
        suggestion = suggest_index(21_000, 16, memory_bytes=limit, target_recall=0.9)
        assert str(suggestion) == description
        assert filled(suggestion, vectors).memory_bytes() == pytest.approx(limit, rel=0.05)


@given(
    n=st.integers(1, 10**9),
    dim=st.integers(1, 300),
    bytes_per_vector=st.floats(1, 5000),
    target=st.floats(0.01, 1.0),
    metric=st.sampled_from(["l2", "ip", "cosine", "canberra"]),
)
@settings(max_examples=60, deadline=None)
def test_a_suggestion_fits_or_the_error_says_what_would(n, dim, bytes_per_vector, target, metric):
    limit, complaint = max(1, int(n * bytes_per_vector)), ""
    try:
        suggestion = suggest_index(n, dim, memory_bytes=limit, target_recall=target, metric=metric)
    except ArgumentError as error:
        complaint = str(error)
    if complaint:
        needed = int(re.search(r"at least ([\d,]+)", complaint)[1].replace(",", ""))
        assert needed > limit
        suggestion = suggest_index(n, dim, memory_bytes=needed, target_recall=target, metric=metric)
        assert suggestion.memory_bytes == needed
        assert repr(str(suggestion)) in complaint
    else:
        assert suggestion.memory_bytes <= limit
    assert index_factory(dim, suggestion, metric).dim == dim


def test_the_recall_of_a_suggestion_is_reached():
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(21_000, 32, generator=generator)
    queries = torch.randn(50, 32, generator=generator)
    truth = exact_neighbours(queries, vectors, 10)
    for limit, target in ((None, 0.99), (3_500_000, 0.99), (1_800_000, 0.95)):
        suggestion = suggest_index(21_000, 32, memory_bytes=limit, target_recall=target)
        index = filled(suggestion, vectors)
        found = index.search(queries, 10, nprobe=index.nlist).ids
        hits = (found[:, :, None] == truth[:, None]).any(1).float().mean()
        assert hits >= target


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"n": 0, "dim": 4}, ArgumentError, "n is 0, expected at least 1"),
        ({"n": 4, "dim": 0}, ArgumentError, "dim is 0, expected at least 1"),
        ({"n": 4, "dim": 4, "memory_bytes": 0}, ArgumentError, "memory_bytes is 0"),
        ({"n": 4, "dim": 4, "target_recall": 0.0}, ArgumentError, "target_recall is 0.0, expected a share"),
        ({"n": 4, "dim": 4, "target_recall": 95}, ArgumentError, "target_recall is 95"),
        (
            {"n": 4, "dim": 4, "target_recall": "high"},
            DtypeError,
            "target_recall is 'high', expected a number",
        ),
        ({"n": 4, "dim": 4, "metric": "l3"}, MetricError, "metric is 'l3'"),
        (
            {"n": 1_000_000, "dim": 128, "memory_bytes": 108 * MIB},
            ArgumentError,
            r"memory_bytes is 113,246,208, expected at least [\d,]+ for 1,000,000 vectors of dim 128 and a "
            r"recall of 0.95 \('IVF4096,SQ8'\); 'OPQ64,IVF4096,PQ64' fits, for a recall of about 0.8",
        ),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        suggest_index(**arguments)
