import pytest
import torch
from torch import nn

from elips_torch import ArgumentError, DtypeError, FlatIndex, ShapeError, UnknownIdError
from elips_torch.training import RetrievalLayer


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def keys(n=12, metric="ip", **options):
    index = FlatIndex(4, metric, **options)
    index.add(rows(n, 4))
    return index


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_with_every_key_it_is_attention(metric):
    queries = rows(3, 4, seed=1).requires_grad_()
    values = nn.Parameter(rows(12, 5, seed=2))
    layer = RetrievalLayer(keys(metric=metric, learnable=True), values, k=12, temperature=0.5)
    out = layer(queries)
    dense_queries, dense_values, dense_keys = (
        x.detach().clone().requires_grad_() for x in (queries, values, layer.index.vectors)
    )
    if metric == "ip":
        logits = dense_queries @ dense_keys.T
    else:
        logits = -(dense_queries[:, None] - dense_keys).square().sum(2)
    expected = (logits / 0.5).softmax(1) @ dense_values
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(queries.grad, dense_queries.grad)
    torch.testing.assert_close(values.grad, dense_values.grad)
    torch.testing.assert_close(layer.index.vectors.grad, dense_keys.grad)


def test_only_the_nearest_take_part():
    values = nn.Parameter(rows(12, 5, seed=2))
    layer = RetrievalLayer(keys(), values, k=3)
    out = layer(rows(2, 4, seed=1))
    scores, ids = layer.index(rows(2, 4, seed=1), 3)
    torch.testing.assert_close(out, (scores.softmax(1)[:, :, None] * values[ids]).sum(1))
    out.sum().backward()
    used = values.grad.abs().sum(1) > 0
    assert sorted(used.nonzero()[:, 0].tolist()) == ids.unique().tolist()


def test_what_was_not_found_weighs_nothing():
    queries = rows(2, 4, seed=1).requires_grad_()
    values = nn.Parameter(rows(12, 5, seed=2))
    layer = RetrievalLayer(keys(), values, k=8)
    few = torch.zeros(2, 12, dtype=torch.bool)
    few[0, 3] = True
    out = layer(queries, mask=few)
    torch.testing.assert_close(out[0], values[3])
    assert out[1].tolist() == [0.0] * 5
    out.sum().backward()
    assert queries.grad.isfinite().all()
    assert values.grad.isfinite().all()
    empty = RetrievalLayer(FlatIndex(4), values, k=8)
    assert empty(queries).abs().sum() == 0


def test_classes_are_mixed_to_a_distribution():
    classes = torch.arange(12) % 3
    layer = RetrievalLayer(keys(), classes, k=6, num_classes=4)
    out = layer(rows(2, 4, seed=1))
    weights, ids = layer.attend(rows(2, 4, seed=1))
    one_hot = nn.functional.one_hot(classes, 4).float()
    torch.testing.assert_close(out, (weights[:, :, None] * one_hot[ids]).sum(1))
    torch.testing.assert_close(out.sum(1), torch.ones(2))
    assert RetrievalLayer(keys(), classes, k=6)(rows(2, 4)).shape == (2, 3)


def test_leading_axes():
    layer = RetrievalLayer(keys(), rows(12, 5), k=3)
    queries = rows(2, 3, 4, seed=1)
    out = layer(queries)
    assert out.shape == (2, 3, 5)
    torch.testing.assert_close(out[1, 2], layer(queries[1, 2]), rtol=0, atol=0)


def test_learned_values_train_and_are_saved():
    values = nn.Parameter(torch.zeros(12, 1))
    layer = RetrievalLayer(keys(), values, k=4)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    queries, wanted = rows(6, 4, seed=1), rows(6, 1, seed=3)
    losses = []
    for _ in range(60):
        loss = (layer(queries) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert "values" in layer.state_dict()
    other = RetrievalLayer(keys(), nn.Parameter(torch.zeros(12, 1)), k=4)
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(queries), layer(queries), rtol=0, atol=0)


def test_fixed_values_are_a_buffer():
    layer = RetrievalLayer(keys(), rows(12, 5), k=4).to(torch.float64)
    assert not list(layer.parameters())
    assert layer(rows(2, 4)).dtype == torch.float64


def test_it_compiles_in_one_graph():
    layer = RetrievalLayer(keys(), nn.Parameter(rows(12, 5)), k=4)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    queries = rows(3, 4, seed=1).requires_grad_()
    torch.testing.assert_close(compiled(queries), layer(queries))
    compiled(queries).sum().backward()
    assert queries.grad.abs().sum() > 0
    torch._dynamo.reset()


def test_bad_input():
    cases = [
        (lambda: RetrievalLayer(rows(12, 4), rows(12, 5)), DtypeError, "index is a Tensor"),
        (lambda: RetrievalLayer(keys(), [1, 2]), DtypeError, "values is a list"),
        (lambda: RetrievalLayer(keys(), rows(12)), ShapeError, r"values has shape \(12,\)"),
        (lambda: RetrievalLayer(keys(), torch.ones(12).bool()), DtypeError, "torch.bool"),
        (lambda: RetrievalLayer(keys(), torch.arange(12) - 1), ArgumentError, "from -1 to 10"),
        (lambda: RetrievalLayer(keys(), torch.arange(12), num_classes=5), ArgumentError, "class < 5"),
        (lambda: RetrievalLayer(keys(), rows(12, 5), num_classes=5), ArgumentError, "num_classes is 5"),
        (lambda: RetrievalLayer(keys(), rows(12, 5), temperature=-1.0), ArgumentError, "temperature is -1"),
        (lambda: RetrievalLayer(keys(), rows(4, 5))(rows(20, 4)), UnknownIdError, "ids below 4"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()
