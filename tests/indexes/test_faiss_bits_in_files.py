"""Files of indexes of bits, and of graphs, that end too early, or whose parts contradict each other."""

import faiss
import numpy as np
import pytest
import torch

from elips_torch import ConversionError, FaissIndex, IndexFileError, write_faiss
from elips_torch.core.errors import DamagedIndexError
from elips_torch.engines.faiss.builds import load_installed
from elips_torch.engines.faiss.consistency import check_consistent
from elips_torch.engines.faiss.graphs_in_bytes import check_bytes

BITS = 64
FAMILIES = ("BFlat", "BIVF4", "BIVF4_HNSW8", "BHNSW16", "BHash8", "BHash4x8")


def codes(n, seed=0):
    return torch.randint(0, 256, (n, BITS // 8), generator=torch.Generator().manual_seed(seed)).byte()


@pytest.mark.parametrize("description", FAMILIES)
def test_truncated_files_are_refused(description, tmp_path):
    index = FaissIndex.from_factory(BITS, description).fit(codes(300))
    index.add(codes(300), ids=torch.arange(300) + 5)
    path = tmp_path / "bits.faiss"
    write_faiss(index, path)
    whole = path.read_bytes()
    for length in (4, 30, 60, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(IndexFileError, match="no index of faiss or is damaged"):
            FaissIndex.read(path)
    path.write_bytes(whole)
    assert FaissIndex.read(path).ids.tolist() == index.ids.tolist()


def put_quantizer(index):
    index.quantizer = faiss.IndexBinaryFlat(BITS + 8)


# What is done to an index of a family, and what is said of it.
FAULTS = [
    ("BFlat", lambda index: setattr(index, "ntotal", 301), "the size of the codes is 2400, expected 2408"),
    ("BFlat", lambda index: setattr(index, "code_size", 9), "the size of a code is 72, expected 64"),
    ("BIVF4", put_quantizer, "the dim of the quantizer is 72, expected 64"),
    ("BIVF4", lambda index: setattr(index, "ntotal", 301), "the size of the lists is 300, expected 301"),
    ("BIVF4", lambda index: setattr(index, "nlist", 5), "the number of lists is 4, expected 5"),
    ("BIVF4", lambda index: setattr(index.invlists, "code_size", 2), "size of the lists is 2, expected 8"),
    ("BHNSW16", lambda index: index.hnsw.levels.resize(3), "the number of nodes is 3, expected 300"),
    ("BHNSW16", lambda index: setattr(index.storage, "ntotal", 299), "of the storage is 299, expected 300"),
    ("BHash8", lambda index: setattr(index, "b", BITS + 1), "hashed bits is 65, expected 64"),
    ("BHash8", lambda index: setattr(index, "nflip", 9), "flipped bits is 9, expected 8"),
    ("BHash4x8", lambda index: setattr(index, "b", 17), "hashed bits is 17, expected 16"),
    ("BHash4x8", lambda index: setattr(index, "nflip", -1), "flipped bits is -1, expected 0"),
]


@pytest.mark.parametrize("number", range(len(FAULTS)))
def test_parts_that_contradict_each_other_are_found(number):
    description, damage, message = FAULTS[number]
    build = load_installed()
    index = faiss.index_binary_factory(BITS, description)
    index.train(codes(300).numpy())
    index.add(codes(300).numpy())
    check_consistent(build, index)
    damage(index)
    with pytest.raises(ConversionError, match=f"index is damaged: .*{message}"):
        check_consistent(build, index)


@pytest.mark.parametrize(
    ("description", "damage", "message"),
    [
        (
            "LSH",
            lambda index: setattr(index, "train_thresholds", True),
            "number of thresholds is 0, expected 8",
        ),
        ("LSH", lambda index: setattr(index, "nbits", 9), "the number of bits is 9, expected 8"),
        ("LSH16r", lambda index: index.rrot.A.resize(3), "matrix of the rotation is 3, expected 128"),
        ("PCA4,Flat", lambda index: spoil_matrix(index), "matrix of transform 0 is 3, expected 32"),
    ],
)
def test_hashes_and_transforms_of_floats_that_contradict_themselves_are_found(description, damage, message):
    build = load_installed()
    index = faiss.index_factory(8, description)
    index.train(torch.randn(100, 8, generator=torch.Generator().manual_seed(0)).numpy())
    check_consistent(build, index)
    damage(index)
    with pytest.raises(DamagedIndexError, match=message):
        check_consistent(build, index)


def spoil_matrix(index):
    faiss.downcast_VectorTransform(index.chain.at(0)).A.resize(3)


def test_an_id_map_that_counts_wrong_is_refused_before_faiss_believes_it(tmp_path):
    index, path = faiss.IndexBinaryIDMap2(faiss.IndexBinaryFlat(BITS)), tmp_path / "map.faiss"
    index.add_with_ids(codes(60).numpy(), np.arange(60) + 5)
    content = faiss.serialize_index_binary(index)
    content[12:20] = np.array([2**40], "<i8").view(np.uint8)
    path.write_bytes(content.tobytes())
    with pytest.raises(IndexFileError, match="an id map is damaged: it has 1099511627776 ids for 60 rows"):
        FaissIndex.read(path)


def graph_in_bytes():
    index = faiss.IndexBinaryHNSW(BITS, 8)
    index.add(codes(60).numpy())
    return index, faiss.serialize_index_binary(index)


# Where bytes change, counted from what, and to what.
GRAPH_FAULTS = {
    "has dim 65": ("start", 4, "<i4", 65),
    "61 nodes": ("start", 12, "<i8", 61),
    "ends too early": ("start", 25, "<i8", 2**40),
    "room for less than nothing": ("room", 0, "<i4", 5),
    "has levels from 0": ("levels", 0, "<i4", 0),
    "lists of another size": ("starts", 8, "<u8", 1),
    "neighbours from -1 to 60": ("neighbours", 0, "<i4", 60),
    "entered at node 60": ("numbers", 0, "<i4", 60),
    "highest level is 7": ("numbers", 4, "<i4", 7),
    "not followed by the codes": ("storage", 4, "<i4", 72),
    "codes for another number": ("storage", 25, "<i8", 479),
}


def places_in(hnsw):
    """Return where each part of a graph starts in its bytes, behind the number of its entries."""
    sizes = {
        "probabilities": 8 * hnsw.assign_probas.size(),
        "room": 4 * hnsw.cum_nneighbor_per_level.size(),
        "levels": 4 * hnsw.levels.size(),
        "starts": 8 * hnsw.offsets.size(),
        "neighbours": 4 * faiss.vector_to_array(hnsw.neighbors).size,
    }
    places, place = {"start": 0}, 25
    for name, size in sizes.items():
        places[name], place = place + 8, place + 8 + size
    return {**places, "numbers": place, "storage": place + 20}


@pytest.mark.parametrize("message", GRAPH_FAULTS)
def test_a_damaged_graph_is_refused_before_faiss_reads_it(message, tmp_path):
    index, content = graph_in_bytes()
    check_bytes(memoryview(content))
    part, offset, dtype, value = GRAPH_FAULTS[message]
    start, spoiled = places_in(index.hnsw)[part] + offset, content.copy()
    spoiled[start : start + np.dtype(dtype).itemsize] = np.array([value], dtype).view(np.uint8)
    with pytest.raises(DamagedIndexError, match=message):
        check_bytes(memoryview(spoiled))
    path = tmp_path / "graph.faiss"
    path.write_bytes(spoiled.tobytes())
    with pytest.raises(IndexFileError, match=f"is damaged: the graph of bits.*{message}"):
        FaissIndex.read(path)
    # Checkpoints go by the same look.
    module = FaissIndex.from_factory(BITS, "BHNSW8")
    module.add(codes(60))
    state = {**module.state_dict(), "faiss": torch.from_numpy(spoiled)}
    with pytest.raises(RuntimeError, match=f"the graph of bits is damaged.*{message}"):
        module.load_state_dict(state)
    head = faiss.serialize_index_binary(faiss.IndexBinaryIDMap2(faiss.IndexBinaryHNSW(BITS, 8)))[:25].copy()
    # As many ids as there are rows, so that the graph is what is wrong.
    head[12:20] = spoiled[12:20]
    path.write_bytes(head.tobytes() + spoiled.tobytes())
    with pytest.raises(IndexFileError, match=message):
        FaissIndex.read(path)


def test_an_empty_graph_is_sound():
    check_bytes(memoryview(faiss.serialize_index_binary(faiss.IndexBinaryHNSW(BITS, 8))))
    check_bytes(memoryview(b""))


def changed(content, place, dtype, value):
    spoiled = content.copy()
    spoiled[place : place + np.dtype(dtype).itemsize] = np.array([value], dtype).view(np.uint8)
    return spoiled


def of_cagra():
    index = faiss.IndexBinaryHNSWCagra(BITS, 8)
    index.add(codes(60).numpy())
    return index, index.hnsw, 25 + 6


def floats_under_bits():
    graph = faiss.IndexHNSWFlat(BITS, 4)
    index = faiss.IndexBinaryFromFloat(graph)
    index.add(codes(60).numpy())
    index.referenced = graph
    return index, graph.hnsw, 25 + 37


def of_floats(description):
    index = faiss.index_factory(8, description)
    index.train(torch.randn(700, 8, generator=torch.Generator().manual_seed(0)).numpy())
    inside = faiss.downcast_index(index.quantizer if "IVF" in description else index)
    if not inside.ntotal:
        inside.add(torch.randn(60, 8, generator=torch.Generator().manual_seed(0)).numpy())
    return index, inside.hnsw, 37 + (37 + 16 if "IVF" in description else 0)


GRAPHS = {
    "cagra": of_cagra,
    "floats under bits": floats_under_bits,
    "HNSW8": lambda: of_floats("HNSW8"),
    "HNSW8_SQ8": lambda: of_floats("HNSW8_SQ8"),
    "IVF60_HNSW8,Flat": lambda: of_floats("IVF60_HNSW8,Flat"),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_every_graph_is_looked_through(name, tmp_path):
    index, hnsw, start = GRAPHS[name]()
    of_bits = isinstance(index, faiss.IndexBinary)
    content = faiss.serialize_index_binary(index) if of_bits else faiss.serialize_index(index)
    check_bytes(memoryview(content))
    places = {part: place - 25 + start for part, place in places_in(hnsw).items()}
    path = tmp_path / "graph.faiss"
    for part, value, message in (
        ("neighbours", 60, "neighbours from -1 to 60"),
        ("levels", 0, "levels from 0"),
        ("numbers", 60, "entered at node 60"),
        ("storage", 0, "not followed by the codes"),
    ):
        # Of the storage it is the dim that changes, behind the mark.
        spoiled = changed(content, places[part] + 4 * (part == "storage"), "<i4", value)
        path.write_bytes(spoiled.tobytes())
        with pytest.raises(IndexFileError, match=f"the graph.* is damaged: .*{message}"):
            FaissIndex.read(path)


def test_a_graph_without_levels_is_entered_anywhere():
    _, hnsw, start = of_cagra()
    content = faiss.serialize_index_binary(of_cagra()[0])
    numbers = places_in(hnsw)["numbers"] + 6
    nowhere = changed(changed(content, numbers, "<i4", -1), numbers + 4, "<i4", -1)
    with pytest.raises(DamagedIndexError, match="entered at node -1"):
        check_bytes(memoryview(nowhere))
    check_bytes(memoryview(changed(nowhere, start - 5, "<u1", 1)))


def hashes_in_bytes(n, hashed=7, n_hashes=3):
    index = faiss.IndexBinaryMultiHash(BITS, n_hashes, hashed)
    index.add(codes(n).numpy())
    return faiss.serialize_index_binary(index)


@pytest.mark.parametrize(("n", "hashed"), [(1, 1), (2, 7), (60, 7), (64, 3), (700, 15), (3000, 20)])
def test_sound_hashes_pass(n, hashed):
    check_bytes(memoryview(hashes_in_bytes(n, hashed)))
    check_bytes(memoryview(faiss.serialize_index_binary(faiss.IndexBinaryMultiHash(BITS, 3, 8))))


def test_hashes_that_lead_to_rows_that_there_are_not_are_refused(tmp_path):
    content, path = hashes_in_bytes(60), tmp_path / "hashes.faiss"
    maps = 25 + 25 + 8 + 60 * BITS // 8 + 12
    path.write_bytes(changed(content, maps + 20, "<u4", 2**32 - 1).tobytes())
    with pytest.raises(
        IndexFileError, match=r"the hash of bits is damaged: it (leads to row|ends too early)"
    ):
        FaissIndex.read(path)
    # A hash of one bit: its list, of 6 bits, is of 60 rows of 6 bits, from bit 7 on.
    same = faiss.IndexBinaryMultiHash(BITS, 1, 1)
    same.add(np.zeros((60, BITS // 8), np.uint8))
    content = faiss.serialize_index_binary(same)
    check_bytes(memoryview(content))
    for row in (1, 30, 59):
        spoiled = content.copy()
        bits = np.unpackbits(spoiled[maps + 20 :], bitorder="little")
        bits[7 + 6 * row :][:6] = 1
        spoiled[maps + 20 :] = np.packbits(bits, bitorder="little")
        with pytest.raises(DamagedIndexError, match="leads to row 63, there are 60"):
            check_bytes(memoryview(spoiled))
    for place, dtype, value, message in (
        (maps, "<i4", 57, "has 1 lists of rows in 57 bits"),
        (maps + 4, "<i8", 2**40, "ends too early"),
        (maps + 12, "<i8", 3, "ends too early"),
        (maps - 12, "<i4", 0, "hashes 0 of 64 bits"),
        (maps - 8, "<i4", 2, "ends too early"),
        (25 + 12, "<i8", 61, "is not followed by the codes"),
        (12, "<i8", -1, "-1 nodes"),
    ):
        path.write_bytes(changed(content, place, dtype, value).tobytes())
        with pytest.raises(IndexFileError, match=f"the hash of bits is damaged: it .*{message}"):
            FaissIndex.read(path)
