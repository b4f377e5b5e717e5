"""Whether inverted lists that faiss left on disk lie within their files: reading beyond ends the process."""

import os
from typing import Any

from elips_torch.core.errors import DamagedIndexError
from elips_torch.engines.faiss.builds import FaissBuild
from elips_torch.engines.faiss.consistency import indexes_inside
from elips_torch.engines.faiss.row_kinds import downcast

# Bytes of the id of a vector in a list.
_ID_BYTES = 8


def check_lists_on_disk(build: FaissBuild, index: Any, path: str | os.PathLike[str] = "") -> None:
    """Check that files are as long as the lists that an index maps from them.

    Faiss maps what its index says, not what there is.

    Args:
        build: the faiss whose index it is.
        index: any index, read from a file or from bytes.
        path: the file, which may hold lists itself.

    Raises:
        DamagedIndexError: a list reaches beyond the end of its file.
    """
    # A cast owns nothing: what owns the memory keeps its name.
    found = downcast(build, index)
    # Hashes of bits have something else of that name.
    has_lists = isinstance(found, build.module.IndexIVF | build.module.IndexBinaryIVF)
    if has_lists and found.invlists is not None:
        lists = build.module.downcast_InvertedLists(found.invlists)
        if isinstance(lists, build.module.OnDiskInvertedLists):
            _check(lists, lists.filename or os.fspath(path))
    for _, inner in indexes_inside(build, found):
        check_lists_on_disk(build, inner, path)


def _check(lists: Any, where: str) -> None:
    places = (lists.lists.at(number) for number in range(lists.lists.size()))
    row_bytes = int(lists.code_size) + _ID_BYTES
    # Where an empty list lies, nobody knows.
    ends = [int(place.offset) + int(place.capacity) * row_bytes for place in places if place.capacity]
    size = os.path.getsize(where)
    if ends and max(ends) > size:
        raise DamagedIndexError(
            f"its lists reach to byte {max(ends):,} of {where!r}, which has {size:,}: it ends too early"
        )
