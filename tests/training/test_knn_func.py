import pytest
import torch
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN, InferenceModel
from torch import nn

from elips_torch import ArgumentError, DtypeError, FlatIndex, IVFFlatIndex, NotFittedError, ShapeError
from elips_torch.training import knn_func

METRICS = ("precision_at_1", "r_precision", "mean_average_precision_at_r")


def clusters(n=120, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 6
    centres = torch.randn(6, 8, generator=torch.Generator().manual_seed(9))
    return centres[labels] + torch.randn(n, 8, generator=generator), labels


@pytest.mark.parametrize("k", [None, "max_bin_count"])
@pytest.mark.parametrize("separate", [False, True])
def test_accuracy_is_that_of_its_own_search(k, separate):
    query, labels = clusters()
    reference = clusters(200, seed=1) if separate else ()
    for search in (knn_func(), knn_func(IVFFlatIndex, nlist=3, nprobe=3)):
        ours = AccuracyCalculator(include=METRICS, k=k, knn_func=search)
        theirs = AccuracyCalculator(
            include=METRICS, k=k, knn_func=CustomKNN(LpDistance(normalize_embeddings=False))
        )
        found, wanted = (each.get_accuracy(query, labels, *reference) for each in (ours, theirs))
        assert found == pytest.approx(wanted)
        assert 0.3 < found["precision_at_1"] < 1.0


def test_an_inference_model_searches_an_index(tmp_path):
    vectors, _ = clusters()
    model = InferenceModel(nn.Identity(), knn_func=knn_func(FlatIndex, metric="cosine"), data_device="cpu")
    model.train_knn(vectors[:100])
    model.add_to_knn(vectors[100:])
    distances, ids = model.get_nearest_neighbors(vectors[:7], k=3)
    assert ids[:, 0].tolist() == list(range(7))
    normal = nn.functional.normalize(vectors)
    wanted = (normal[:7] @ normal.T).topk(3)
    assert torch.equal(ids, wanted.indices)
    torch.testing.assert_close(distances, wanted.values)
    model.save_knn_func(tmp_path / "knn")
    other = InferenceModel(nn.Identity(), knn_func=knn_func(), data_device="cpu")
    other.load_knn_func(tmp_path / "knn")
    assert torch.equal(other.get_nearest_neighbors(vectors[:7], k=3)[1], ids)
    other.knn_func.reset()
    with pytest.raises(NotFittedError, match="nothing to search"):
        other.get_nearest_neighbors(vectors[:7], k=3)


def test_a_query_is_not_its_own_neighbour_among_duplicates():
    points = torch.ones(5, 2)
    _, ids = knn_func()(points, 4, points, ref_includes_query=True)
    assert [sorted(row) for row in ids.tolist()] == [[j for j in range(5) if j != i] for i in range(5)]


def test_what_makes_no_index_is_refused():
    points = torch.ones(5, 2)
    full = FlatIndex(2)
    full.add(points)
    with pytest.raises(DtypeError, match="index_type is a FlatIndex, expected a class of index such as"):
        knn_func(FlatIndex(2))
    with pytest.raises(DtypeError, match="index_type is a str, expected a class of index"):
        knn_func("Flat")
    with pytest.raises(ArgumentError, match="options has dim=2, expected none: embeddings say their dim"):
        knn_func(dim=2)
    for make, error, message in (
        (lambda **_: FlatIndex(3), ShapeError, "index_type made an index of dim 3, the vectors have dim 2"),
        (lambda **_: full, ArgumentError, "index_type made an index that holds 5 vectors, expected an empty"),
        (lambda **_: None, DtypeError, "index_type made a NoneType, expected an Index"),
    ):
        with pytest.raises(error, match=message):
            knn_func(make)(points, 1, points)
    assert len(full) == 5


def test_more_neighbours_than_there_are():
    points = torch.ones(5, 2)
    assert knn_func()(points, 5, points)[1].shape == (5, 5)
    with pytest.raises(ArgumentError, match="k is 5, expected at most the 4 references"):
        knn_func()(points, 5, points, ref_includes_query=True)
    with pytest.raises(NotFittedError, match="nothing to save"):
        knn_func().save("nowhere")
