from hypothesis import given, settings
from hypothesis import strategies as st

from elips_torch.core.tiling import plan_tiles, spans

sizes = st.integers(0, 10**7)


@settings(deadline=None)
@given(
    sizes,
    sizes,
    st.integers(2**20, 2**30),
    st.integers(1, 100),
    st.integers(0, 20_000),
    st.integers(0, 20_000),
)
def test_a_tile_fits_the_workspace(n_queries, n_rows, workspace, cell, row, query):
    tiles = plan_tiles(
        n_queries, n_rows, workspace_bytes=workspace, cell_bytes=cell, row_bytes=row, query_bytes=query
    )
    assert 1 <= tiles.queries <= max(1, n_queries)
    assert 1 <= tiles.rows <= max(1, n_rows)
    assert tiles.queries * tiles.rows * cell + tiles.rows * row + tiles.queries * query <= workspace


def test_a_single_pair_larger_than_the_workspace_is_still_a_tile():
    tiles = plan_tiles(100, 100, workspace_bytes=2**20, cell_bytes=1, row_bytes=2**21, query_bytes=2**21)
    assert (tiles.queries, tiles.rows) == (1, 1)


@settings(deadline=None)
@given(st.integers(0, 5000), st.integers(1, 700))
def test_spans_cover_everything_once(total, step):
    parts = list(spans(total, step))
    assert [i for start, stop in parts for i in range(start, stop)] == list(range(total))
    assert all(0 < stop - start <= step for start, stop in parts)
