import faiss
import pytest
import torch

from elips_torch import (
    ArgumentError,
    ConversionError,
    DeviceError,
    DtypeError,
    DuplicateIdError,
    FaissIndex,
    IndexFileError,
    ShapeError,
    add_preassigned,
    faiss_stats,
    merge_faiss_shards,
    read_faiss,
    search_preassigned,
    write_faiss,
)

DIM, NLIST = 16, 8


@pytest.fixture(scope="module")
def vectors():
    return torch.randn(600, DIM, generator=torch.Generator().manual_seed(0))


def trained(vectors, description=f"IVF{NLIST},Flat"):
    index = faiss.index_factory(DIM, description)
    index.train(vectors.numpy())
    return index


def write_shards(folder, index, vectors, own_ids=True):
    paths = []
    for number, part in enumerate(vectors.split(200)):
        shard = faiss.clone_index(index)
        if own_ids:
            shard.add_with_ids(part.numpy(), (torch.arange(len(part)) + 200 * number).numpy())
        else:
            shard.add(part.numpy())
        paths.append(folder / f"{number}.faiss")
        faiss.write_index(shard, str(paths[-1]))
    return paths


@pytest.mark.parametrize("description", [f"IVF{NLIST},Flat", f"IVF{NLIST},SQ8", f"PCA8,IVF{NLIST},Flat"])
@pytest.mark.parametrize("shift", [False, True])
def test_merged_shards_find_what_one_index_finds(tmp_path, vectors, description, shift):
    index = trained(vectors, description)
    paths = write_shards(tmp_path, index, vectors, own_ids=not shift)
    assert merge_faiss_shards(paths, tmp_path / "all.faiss", shift_ids=shift) == 600
    index.add(vectors.numpy())
    merged = faiss.read_index(str(tmp_path / "all.faiss"))
    for each in (index, merged):
        faiss.extract_index_ivf(each).nprobe = 3
    scores, ids = index.search(vectors[:20].numpy(), 5)
    found = merged.search(vectors[:20].numpy(), 5)
    assert (found[1] == ids).all()
    assert (found[0] == scores).all()
    here = read_faiss(tmp_path / "all.faiss")
    assert (here.search(vectors[:20], 5, nprobe=3).ids.numpy() == ids).mean() > 0.99


def test_shards_with_vectors_beside_their_lists_are_refused(tmp_path, vectors):
    refined = trained(vectors, f"IVF{NLIST},SQ8,RFlat")
    refined.add(vectors.numpy())
    mapped = faiss.IndexPreTransform(
        faiss.RandomRotationMatrix(DIM, DIM), faiss.IndexIDMap2(trained(vectors))
    )
    for number, index in enumerate((refined, mapped)):
        path = tmp_path / f"{number}.faiss"
        faiss.write_index(index, str(path))
        with pytest.raises(ConversionError, match="expected an inverted file"):
            merge_faiss_shards([path], tmp_path / "all.faiss")
    assert not (tmp_path / "all.faiss").exists()


@pytest.mark.parametrize("row", [-3, 5000])
def test_lists_that_contradict_an_id_map_are_refused(tmp_path, vectors, row):
    lists = trained(vectors)
    ids = torch.arange(50)
    ids[7] = row
    lists.add_with_ids(vectors[:50].numpy(), ids.numpy())
    lists.ntotal = 0
    shard = faiss.IndexIDMap2(lists)
    lists.ntotal = shard.ntotal = 50
    faiss.copy_array_to_vector(torch.arange(50).numpy() * 3, shard.id_map)
    faiss.write_index(shard, str(tmp_path / "a.faiss"))
    with pytest.raises(IndexFileError, match=r"a\.faiss' is damaged"):
        merge_faiss_shards([tmp_path / "a.faiss"], tmp_path / "all.faiss")


def test_chosen_lists_are_read_as_far_as_the_index_says(vectors):
    index = trained(vectors)
    index.add(vectors.numpy())
    index.max_codes = 50
    index.nprobe = NLIST
    lists = index.quantizer.search(vectors[:4].numpy(), NLIST)[1]
    found = search_preassigned(index, vectors[:4], 300, torch.as_tensor(lists))[1]
    assert found.tolist() == index.search(vectors[:4].numpy(), 300)[1].tolist()
    assert int((found >= 0).sum(1).max()) < 300


def test_shards_under_id_maps_keep_their_labels(tmp_path, vectors):
    whole, empty = trained(vectors), trained(vectors)
    labels = torch.randperm(300, generator=torch.Generator().manual_seed(1)).view(3, 100) * 200
    paths = [tmp_path / f"{number}.faiss" for number in range(3)]
    for number, (path, part) in enumerate(zip(paths, vectors[:300].split(100), strict=True)):
        # Labels that ascend lie in the lists.
        ids = labels[number].sort().values if number == 1 else labels[number]
        shard = FaissIndex(faiss.clone_index(empty))
        shard.add(part, ids=ids)
        write_faiss(shard, path)
        whole.add_with_ids(part.numpy(), ids.numpy())
    assert isinstance(faiss.read_index(str(paths[0])), faiss.IndexIDMap2)
    assert merge_faiss_shards(paths, tmp_path / "all.faiss") == 300
    merged = faiss.read_index(str(tmp_path / "all.faiss"))
    assert isinstance(merged, faiss.IndexIVFFlat)
    whole.nprobe = merged.nprobe = NLIST
    found, wanted = merged.search(vectors[:50].numpy(), 5), whole.search(vectors[:50].numpy(), 5)
    assert (found[1] == wanted[1]).all()
    with pytest.raises(DuplicateIdError, match=r"0\.faiss"):
        merge_faiss_shards([paths[0], paths[0]], tmp_path / "twice.faiss")
    assert merge_faiss_shards([paths[0], paths[0]], tmp_path / "twice.faiss", shift_ids=True) == 200
    twice = read_faiss(tmp_path / "twice.faiss").ids.sort().values
    assert torch.equal(twice, torch.cat([labels[0], labels[0] + 100]).sort().values)


def test_shards_that_do_not_fit_are_refused_and_nothing_is_written(tmp_path, vectors):
    paths = write_shards(tmp_path, trained(vectors), vectors)
    flat, other = tmp_path / "flat.faiss", tmp_path / "other.faiss"
    faiss.write_index(faiss.IndexFlatL2(DIM), str(flat))
    faiss.write_index(trained(vectors[:300]), str(other))
    refined = tmp_path / "refined.faiss"
    faiss.write_index(faiss.IndexIVFPQR(faiss.IndexFlatL2(DIM), DIM, 2, 4, 4, 4, 4), str(refined))
    foreign = tmp_path / "foreign"
    foreign.write_bytes(b"nothing of the kind")
    cases = [
        ([], ArgumentError, "shards is empty"),
        (str(paths[0]), DtypeError, "shards is '.*', expected a list of files"),
        (3, DtypeError, "shards is 3, expected a list of files"),
        ([b"x"], DtypeError, "path is b'x', expected a path"),
        ([refined], ConversionError, "IndexIVFPQR, expected an inverted file whose lists are"),
        ([paths[0], flat], ConversionError, "IndexFlat.*expected an inverted file"),
        ([paths[0], other], IndexFileError, "trained otherwise"),
        ([paths[0], foreign], IndexFileError, "no index of faiss"),
        ([tmp_path / "absent"], FileNotFoundError, "absent"),
    ]
    before = set(tmp_path.iterdir())
    for shards, error, message in cases:
        with pytest.raises(error, match=message):
            merge_faiss_shards(shards, tmp_path / "all.faiss")
    with pytest.raises(ArgumentError, match="is there already"):
        merge_faiss_shards(paths, flat)
    assert set(tmp_path.iterdir()) == before


def test_shards_that_all_count_from_0_are_refused(tmp_path, vectors):
    paths = write_shards(tmp_path, trained(vectors), vectors, own_ids=False)
    with pytest.raises(ArgumentError, match=r"0\.faiss' and '.*1\.faiss' both number.*shift_ids=True"):
        merge_faiss_shards(paths, tmp_path / "all.faiss")
    assert merge_faiss_shards(paths[:1], tmp_path / "one.faiss") == 200


def shard_under(folder, index, vectors, ids):
    shard = faiss.clone_index(index)
    shard.add_with_ids(vectors[: len(ids)].numpy(), torch.tensor(ids).numpy())
    path = folder / f"{'-'.join(map(str, ids))}.faiss"
    faiss.write_index(shard, str(path))
    return path


@pytest.mark.parametrize(
    ("labels", "shift", "message"),
    [
        ([[5, 9], [1, 2], [7, 9, 8]], False, r"the id 9 each: .*5-9\.faiss' and '.*7-9-8\.faiss'"),
        ([[1, 2], [8, 5, 8]], False, r"the id 8 more than once: '.*8-5-8\.faiss'"),
        ([[0, 15], [13, 1]], True, r"the id 15 each: .*0-15\.faiss' and '.*13-1\.faiss'"),
        ([[4, 5], [4, 5]], False, r"the id 4 each"),
    ],
)
def test_shards_with_one_id_twice_are_refused(tmp_path, vectors, labels, shift, message):
    index = trained(vectors, "IVF1,Flat")
    paths = [shard_under(tmp_path, index, vectors, ids) for ids in labels]
    before = set(tmp_path.iterdir())
    with pytest.raises(DuplicateIdError, match=message):
        merge_faiss_shards(paths, tmp_path / "all.faiss", shift_ids=shift)
    assert set(tmp_path.iterdir()) == before
    # Moved up, none of the others meet.
    if not shift and len(set(labels[-1])) == len(labels[-1]):
        assert merge_faiss_shards(paths, tmp_path / "all.faiss", shift_ids=True) == sum(map(len, labels))


def test_lists_on_disk_stay_there_where_their_labels_are_row_numbers(tmp_path, vectors):
    paths = write_shards(tmp_path, trained(vectors), vectors)
    merge_faiss_shards(paths, tmp_path / "all.faiss")
    index = FaissIndex.read(tmp_path / "all.faiss", nprobe=NLIST)
    assert isinstance(faiss.downcast_InvertedLists(index.faiss_index.invlists), faiss.OnDiskInvertedLists)
    assert index.search(vectors[:20], 1).ids[:, 0].tolist() == list(range(20))
    merge_faiss_shards(paths[1:], tmp_path / "rest.faiss")
    with pytest.raises(IndexFileError, match=r"the labels are not 0 to N - 1.*as read_faiss does"):
        FaissIndex.read(tmp_path / "rest.faiss")
    assert read_faiss(tmp_path / "rest.faiss").ids.min() == 200


def test_other_codebooks_are_noticed_and_other_parameters_are_not(tmp_path, vectors):
    index = trained(vectors, f"IVF{NLIST},PQ4x4")
    paths = write_shards(tmp_path, index, vectors)
    index.nprobe = 5
    index.set_direct_map_type(faiss.DirectMap.Hashtable)
    faiss.write_index(index, str(paths[1]))
    assert merge_faiss_shards(paths, tmp_path / "all.faiss") == 400
    assert faiss.read_index(str(tmp_path / "all.faiss")).nprobe == 1
    centroids = faiss.vector_to_array(index.pq.centroids)
    faiss.copy_array_to_vector(centroids + 1, index.pq.centroids)
    faiss.write_index(index, str(paths[2]))
    with pytest.raises(IndexFileError, match=r"2\.faiss' was trained otherwise than the first shard"):
        merge_faiss_shards(paths, tmp_path / "again.faiss")


@pytest.mark.parametrize(
    "description",
    [f"IVF{NLIST},Flat", f"IVF{NLIST},PQ4x4", f"PCA8,IVF{NLIST},SQ8", f"IVF{NLIST},PQ4x4fsr"],
)
def test_searching_chosen_lists(vectors, description):
    index = trained(vectors, description)
    index.add(vectors.numpy())
    ivf = faiss.extract_index_ivf(index)
    ivf.nprobe = 3
    queries = vectors[:10].numpy()
    inside = queries if ivf.d == DIM else faiss.downcast_VectorTransform(index.chain.at(0)).apply(queries)
    coarse, lists = ivf.quantizer.search(inside, 3)
    scores, ids = search_preassigned(
        index, vectors[:10].double(), 5, torch.from_numpy(lists), torch.from_numpy(coarse)
    )
    wanted = index.search(queries, 5)
    assert (ids.numpy() == wanted[1]).all()
    assert (scores.numpy() == wanted[0]).all()
    # The index has a width of its own, which is neither asked nor changed.
    ivf.nprobe = 1
    before = faiss_stats().searches
    again = search_preassigned(index, vectors[:10], 5, torch.from_numpy(lists), torch.from_numpy(coarse))
    assert torch.equal(again[1], ids)
    assert (ivf.nprobe, faiss_stats().searches) == (1, before + 1)
    none = torch.full((10, 2), -1)
    found = search_preassigned(index, vectors[:10], 5, none, torch.zeros(10, 2))
    assert (found[1] == -1).all()


def test_adding_to_chosen_lists(vectors):
    index = trained(vectors)
    lists = torch.arange(600) % NLIST
    add_preassigned(index, vectors, lists, ids=torch.arange(600) * 2)
    assert index.ntotal == 600
    assert [index.invlists.list_size(number) for number in range(NLIST)] == [75] * NLIST
    _, ids = search_preassigned(index, vectors[:40], 1, lists[:40, None])
    assert ids[:, 0].tolist() == [2 * number for number in range(40)]


def test_bad_arguments_are_refused(vectors):
    index = trained(vectors, f"IVF{NLIST},PQ4x4")
    lists = torch.zeros(600, dtype=torch.int64)
    with pytest.raises(ArgumentError, match="lists has 8 to 8, expected 0 <= list < 8"):
        add_preassigned(index, vectors, lists + NLIST)
    with pytest.raises(ShapeError, match="lists has shape"):
        add_preassigned(index, vectors, lists[:5])
    with pytest.raises(DtypeError, match=r"lists is torch.int32"):
        add_preassigned(index, vectors, lists.int())
    with pytest.raises(ConversionError, match="IndexFlat"):
        add_preassigned(faiss.IndexFlatL2(DIM), vectors, lists)
    with pytest.raises(DtypeError, match="index is of type int"):
        search_preassigned(3, vectors, 1, lists[:, None])
    with pytest.raises(ArgumentError, match="coarse_scores is missing"):
        search_preassigned(index, vectors, 1, lists[:, None])
    for scores, error, message in (
        ([0.0], DtypeError, "coarse_scores is a list, expected a torch.Tensor"),
        (torch.zeros(600, 2), ShapeError, "coarse_scores has dim 2, lists has dim 1"),
        (torch.zeros(5, 1), ShapeError, "coarse_scores has 5 rows, lists has 600"),
        (torch.zeros(600, 1, device="meta"), DeviceError, "coarse_scores is on meta"),
    ):
        with pytest.raises(error, match=message):
            search_preassigned(index, vectors, 1, lists[:, None], scores)
    with pytest.raises(ShapeError, match="lists has 9 columns, expected 1 to 8, the number of lists"):
        search_preassigned(index, vectors, 1, lists[:, None].expand(-1, 9))
    with pytest.raises(DeviceError, match="lists is on meta, the index is on cpu"):
        add_preassigned(index, vectors, lists.to("meta"))
    with pytest.raises(DtypeError, match="ids is list, expected an int64 tensor"):
        add_preassigned(index, vectors, lists, ids=[1])
    assert index.ntotal == 0
