import threading
import warnings
from collections import deque

import pytest
import torch
from torch import nn

from elips_torch import FlatIndex, ImplementationError
from elips_torch.lightning.snapshot import snapshot_of


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.map = nn.Linear(6, 4)
        self.index = FlatIndex(4)
        self.index.add(torch.randn(3, 4))

    def forward(self, x):
        return self.map(x)


def test_a_snapshot_has_its_own_weights_and_the_same_index():
    encoder = Encoder()
    x = torch.randn(2, 6)
    before = encoder(x)
    copied = snapshot_of(encoder)
    with torch.no_grad():
        encoder.map.weight.zero_()
    assert torch.equal(copied(x), before)
    assert copied.index is encoder.index


def test_tensors_on_a_graph_are_kept_detached():
    encoder = Encoder()
    out = encoder(torch.randn(2, 6))
    encoder.loss = out.mean()
    encoder.map.outputs = [out, {"again": (out * 2, deque([out * 3]))}]
    copied = snapshot_of(encoder)
    assert torch.equal(copied.loss, encoder.loss)
    assert not copied.loss.requires_grad
    assert encoder.loss.requires_grad
    first, second = copied.map.outputs
    assert torch.equal(second["again"][0], first * 2)
    assert torch.equal(second["again"][1][0], first * 3)
    encoder.loss.backward()


@pytest.mark.parametrize(
    "norm", [nn.utils.weight_norm, nn.utils.spectral_norm, nn.utils.parametrizations.weight_norm]
)
def test_normalised_layers_embed_as_they_did(norm):
    encoder = Encoder()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        encoder.map = norm(encoder.map)
    x = torch.randn(2, 6)
    encoder(x).sum().backward()
    encoder.eval()
    torch.testing.assert_close(snapshot_of(encoder)(x), encoder(x))


def test_what_cannot_be_copied_is_said():
    encoder = Encoder()
    encoder.lock = threading.Lock()
    with pytest.raises(
        ImplementationError, match=r"Encoder holds what cannot be copied .*lock.*background=False"
    ):
        snapshot_of(encoder)
