"""Warnings point at the user's line."""

import warnings

import pytest
import torch

from elips_torch import IVFFlatIndex, IVFPQIndex, KMeans

VECTORS = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
CALLS = {
    "fit of lists": lambda: IVFFlatIndex(8, 16).fit(VECTORS),
    "fit of lists and parts": lambda: IVFPQIndex(8, 16, 2, 4).fit(VECTORS),
    "k-means": lambda: KMeans(16).fit(VECTORS),
}


@pytest.mark.parametrize("compiler", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_a_warning_names_the_file_that_called(call, compiler):
    if compiler:
        # Then methods that change an index run through one more wrapper.
        import torch._dynamo  # noqa: F401
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        CALLS[call]()
    assert said
    assert {each.filename for each in said} == {__file__}
