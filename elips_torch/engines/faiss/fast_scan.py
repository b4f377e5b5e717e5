"""Inverted files that faiss scans fast, which lose sight of what codes their rows."""

from typing import Any

from elips_torch.engines.faiss.builds import FaissBuild

# Under these names the families keep what codes their rows.
_QUANTIZERS = ("pq", "rq", "lsq", "prq", "plsq", "rabitq")


def mend_fast_scan(build: FaissBuild, index: Any) -> Any:
    """Point an inverted file of fast scan, also inside an index, at its own quantizer, and return the index.

    Reading a file leaves none, and copying that of the original, which may be freed before the copy (faiss
    1.14 and 1.15): asked for vectors, faiss then reads memory that is not there.
    """
    faiss = build.module
    lists = faiss.try_extract_index_ivf(index) if isinstance(index, faiss.Index) else None
    if lists is None:
        return index
    lists = faiss.downcast_index(lists)
    if hasattr(lists, "fine_quantizer"):
        own = next((getattr(lists, name) for name in _QUANTIZERS if hasattr(lists, name)), None)
        if own is not None:
            lists.fine_quantizer = own
    return index
