"""Walking through probed lists."""

import pytest
import torch

from elips_torch.indexes.inverted_lists import InvertedLists
from elips_torch.kernels.list_layout import (
    ListSelection,
    concatenated_ranges,
    list_major_tiles,
    query_major_tiles,
)
from elips_torch.kernels.selection import Selection


def made(n=200, nlist=9, n_queries=6, n_probes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    assignments = torch.randint(0, nlist - 1, (n,), generator=generator)
    probes = torch.stack([torch.randperm(nlist, generator=generator) for _ in range(n_queries)])[:, :n_probes]
    probes[0, 1] = -1
    lists = InvertedLists()
    lists.rebuild(assignments, nlist)
    probed = (assignments == probes[:, :, None]).any(1)
    return lists.layout, probes, probed


@pytest.mark.parametrize("tiling", [list_major_tiles, query_major_tiles])
@pytest.mark.parametrize("row_step", [1, 7, 1000])
def test_every_probed_row_is_visited_once(tiling, row_step):
    layout, probes, probed = made()
    visits = torch.zeros_like(probed, dtype=torch.int64)
    for tile in tiling(layout, probes, row_step):
        assert 0 < len(tile.rows) <= row_step
        assert tile.first_slot is not None or len(tile.owners) == 1
        visits[tile.owners[:, None], tile.rows] += 1
    assert torch.equal(visits, probed.long())


@pytest.mark.parametrize("tiling", [list_major_tiles, query_major_tiles])
@pytest.mark.parametrize("mask_kind", ["none", "shared", "own"])
@pytest.mark.parametrize("with_exclude", [False, True])
@pytest.mark.parametrize("chosen", [None, slice(2, 5), torch.tensor([4, 0, 3])])
def test_hidden_rows_are_those_of_the_selection(tiling, mask_kind, with_exclude, chosen):
    layout, probes, probed = made()
    generator = torch.Generator().manual_seed(1)
    mask = {
        "none": None,
        "shared": torch.rand(200, generator=generator) < 0.5,
        "own": torch.rand(6, 200, generator=generator) < 0.5,
    }[mask_kind]
    exclude = torch.randint(-1, 200, (6, 30), generator=generator) if with_exclude else None
    hidden = torch.zeros(6, 200, dtype=torch.bool)
    if mask is not None:
        hidden |= ~mask
    if exclude is not None:
        for query, rows in enumerate(exclude):
            hidden[query, rows[rows >= 0]] = True
    selection = Selection(mask, exclude)
    if chosen is not None:
        selection, probes, probed, hidden = (
            selection.for_queries(chosen),
            probes[chosen],
            probed[chosen],
            hidden[chosen],
        )
        # A part of a part is numbered right, too.
        order = torch.tensor([2, 0, 1])
        selection, probes, probed, hidden = (
            selection.for_queries(order),
            probes[order],
            probed[order],
            hidden[order],
        )
    listed = ListSelection(selection, layout)
    visible = torch.zeros_like(probed)
    for tile in tiling(layout, probes, 50):
        dropped = listed.dropped(tile, tile.owners)
        if dropped is None:
            dropped = torch.zeros(1, 1, dtype=torch.bool)
        visible[tile.owners[:, None], tile.rows] = ~dropped.expand(len(tile.owners), len(tile.rows))
    assert torch.equal(visible, probed & ~hidden)


def test_ranges_follow_each_other():
    starts, lengths = torch.tensor([10, 0, 5, 7]), torch.tensor([3, 0, 1, 2])
    assert concatenated_ranges(starts, lengths).tolist() == [10, 11, 12, 5, 7, 8]
    assert concatenated_ranges(starts[:0], lengths[:0]).tolist() == []
