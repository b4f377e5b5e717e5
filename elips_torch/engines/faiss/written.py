"""What faiss's files and bytes leave out of an index, or do not bring back."""

from typing import Any

from elips_torch.core.errors import ImplementationError
from elips_torch.engines.faiss.builds import FaissBuild
from elips_torch.engines.faiss.consistency import indexes_inside
from elips_torch.engines.faiss.row_kinds import downcast


def prepare_to_write(build: FaissBuild, index: Any) -> None:
    """Let an index on the CPU come back from what faiss writes of it.

    Raises:
        ImplementationError: it would come back without its vectors.
    """
    faiss = build.module
    index = downcast(build, index)
    if isinstance(index, faiss.IndexLattice) and index.ntotal:
        # A search of what comes back ends the process, before 1.15.
        raise ImplementationError("faiss's IndexLattice is not saved: its files hold no vectors")
    if not index.is_trained:
        _fill_untrained(build, index)
    for _, inner in indexes_inside(build, index):
        prepare_to_write(build, inner)


def prepare_to_train(build: FaissBuild, index: Any) -> Any:
    """Let an inverted file that was read, also inside an index, learn as a factory's does; return the index.

    Faiss writes what was learned, and not how.
    """
    faiss = build.module
    lists = faiss.try_extract_index_ivf(index) if isinstance(index, faiss.Index) else None
    if lists is not None and not lists.is_trained:
        quantizer = faiss.downcast_index(lists.quantizer)
        alone = isinstance(quantizer, faiss.MultiIndexQuantizer | faiss.ResidualCoarseQuantizer)
        learned_by_means = isinstance(quantizer, faiss.IndexFlat)
        lists.quantizer_trains_alone = 1 if alone else 0 if learned_by_means else 2
        lists.cp.spherical = lists.metric_type == faiss.METRIC_INNER_PRODUCT
    return index


def _fill_untrained(build: FaissBuild, index: Any) -> None:
    """Give zeros for what is not learned yet where faiss reads it all the same; training replaces them.

    Faiss up to 1.13 crashes at residual quantizers without codebooks, 1.15 refuses an ITQ without mean.
    """
    faiss = build.module
    if isinstance(index, faiss.IndexPreTransform):
        for number in range(index.chain.size()):
            transform = faiss.downcast_VectorTransform(index.chain.at(number))
            if isinstance(transform, faiss.ITQTransform) and not transform.mean.size():
                transform.mean.resize(transform.d_in)
    if hasattr(index, "rq"):
        _fill_codebooks(index.rq)
    elif hasattr(index, "prq"):
        _fill_codebooks(index.prq)
        for number in range(index.prq.nsplits):
            _fill_codebooks(index.prq.subquantizer(number))


def _fill_codebooks(quantizer: Any) -> None:
    if not quantizer.codebooks.size():
        quantizer.codebooks.resize(quantizer.total_codebook_size * quantizer.d)
