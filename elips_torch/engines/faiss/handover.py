"""A copy of an index of faiss under labels of its users, without the rows that they removed."""

from typing import Any

import torch
from torch import Tensor

from elips_torch.core.errors import ConversionError
from elips_torch.engines.faiss.builds import FaissBuild
from elips_torch.engines.faiss.messages import reason_of
from elips_torch.engines.faiss.opaque import copied, inverted_file, list_labels
from elips_torch.engines.faiss.row_kinds import BITS, kind_of
from elips_torch.engines.faiss.transfer import to_cpu

# Whose lists alone know the number of a row; others look something up by it.
_KNOWN_BY_LABEL = (
    "IndexBinaryIVF",
    "IndexIVFFlat",
    "IndexIVFLocalSearchQuantizer",
    "IndexIVFPQ",
    "IndexIVFPQFastScan",
    "IndexIVFProductLocalSearchQuantizer",
    "IndexIVFProductResidualQuantizer",
    "IndexIVFRaBitQ",
    "IndexIVFResidualQuantizer",
    "IndexIVFScalarQuantizer",
)
# Those of them whose searches read hidden rows, too, since they take no selector.
_WITHOUT_SELECTORS = ("IndexBinaryIVF", "IndexIVFPQFastScan")


def hand_over(
    build: FaissBuild,
    index: Any,
    rows: Tensor,
    labels: Tensor,
    *,
    normalizes: bool = False,
    keeps_family: bool = False,
) -> Any:
    """Copy an index to the CPU, with some of its rows under other labels.

    Args:
        build: the faiss whose index it is.
        index: one whose labels are the numbers of its rows, on the CPU or on GPUs.
        rows: ``(N,)`` int64, different rows to hand over.
        labels: ``(N,)`` int64, under which each is found.
        normalizes: whether the copy brings queries and vectors to length 1 first.
        keeps_family: whether lists keep labels that do not ascend, too, so that there is nothing around them.

    Returns:
        An index that shares no memory with the other one. Its lists keep the labels where these ascend with
        the rows; other labels than 0 to N - 1 are in an ``IndexIDMap2`` around it elsewhere, since faiss
        puts rows of equal scores in the order of what its lists hold.

    Raises:
        ConversionError: rows are left out, and the family takes none out.
    """
    on_cpu = to_cpu(build, index)
    copy = copied(build, index) if on_cpu is index else on_cpu
    rows, order = rows.cpu().sort()
    labels = labels.cpu()[order]
    lists = _relabelled(build, copy)
    total = int(copy.ntotal)
    if len(rows) < total:
        _take_out(build, copy, rows, in_lists=lists is not None)
    numbers = torch.arange(len(labels), device="cpu")
    in_lists = lists is not None and (keeps_family or bool((labels.diff() > 0).all()))
    if lists is not None:
        label_of = torch.full((total,), -1, device="cpu")
        label_of[rows] = labels if in_lists else numbers
        lists.set_direct_map_type(build.module.DirectMap.NoMap)
        for each in list_labels(build, lists):
            each[:] = label_of[torch.as_tensor(each)].numpy()
    if normalizes:
        copy = _behind_normalization(build, copy)
    return copy if in_lists or torch.equal(labels, numbers) else _in_id_map(build, copy, labels)


def without_hidden(build: FaissBuild, index: Any, rows: Tensor) -> Any:
    """Copy an inverted file in memory whose searches cannot pass rows over, without those that are hidden.

    Args:
        build: the faiss whose index it is.
        index: one whose labels are the numbers of its rows.
        rows: ``(N,)`` int64, the rows that stay; they become rows 0 to N - 1 in the order that they have.

    Returns:
        The copy; None of another kind of index.
    """
    if _family(build, index) not in _WITHOUT_SELECTORS:
        return None
    kind = build.module.downcast_InvertedLists(inverted_file(build, index).invlists)
    if not isinstance(kind, build.module.ArrayInvertedLists | build.module.BlockInvertedLists):
        return None
    return hand_over(build, index, rows.cpu().sort().values, torch.arange(len(rows), device="cpu"))


def _family(build: FaissBuild, index: Any) -> str:
    """Return the name of the class of an index, behind what transforms its vectors."""
    while isinstance(index, build.module.IndexPreTransform):
        index = build.module.downcast_index(index.index)
    return type(index).__name__


def _relabelled(build: FaissBuild, index: Any) -> Any:
    """Return the inverted file whose lists may hold any labels, None where there is none."""
    return inverted_file(build, index) if _family(build, index) in _KNOWN_BY_LABEL else None


def _take_out(build: FaissBuild, index: Any, rows: Tensor, *, in_lists: bool) -> None:
    """Remove all rows but some; those that stay keep their numbers in lists, and move up elsewhere."""
    total = int(index.ntotal)
    is_hidden = torch.ones(total, dtype=torch.bool, device="cpu").index_fill_(0, rows, False)
    hidden = is_hidden.nonzero()[:, 0]
    lists = inverted_file(build, index)
    reason = "its rows are known by their numbers"
    if in_lists or lists is None:
        if lists is not None:
            lists.set_direct_map_type(build.module.DirectMap.NoMap)
            if _moved_up(build, index, lists, is_hidden):
                return
        try:
            index.remove_ids(hidden.numpy())
        except RuntimeError as error:
            reason = reason_of(error)
        else:
            if lists is not None:
                # Before 1.14 families of fast scan forget to count.
                lists.ntotal = index.ntotal = lists.invlists.compute_ntotal()
            if index.ntotal == len(rows):
                return
            reason = f"{index.ntotal} stay"
    raise ConversionError(
        f"{len(hidden)} of {total} rows are hidden, and faiss's {type(index).__name__} takes none out "
        f"({reason}); reset the index and add the others again"
    )


def _moved_up(build: FaissBuild, index: Any, lists: Any, is_hidden: Tensor) -> bool:
    """Remove rows from lists, where the others keep their order; of faiss's own way the last takes the place.

    Returns:
        Whether it was done; not where codes of several rows lie together.
    """
    inverted = build.module.downcast_InvertedLists(lists.invlists)
    if not isinstance(inverted, build.module.ArrayInvertedLists):
        return False
    for number in range(inverted.nlist):
        size = int(inverted.list_size(number))
        if not size:
            continue
        labels = torch.as_tensor(build.module.rev_swig_ptr(inverted.get_ids(number), size))
        keep = ~is_hidden[labels]
        kept = int(keep.sum())
        if kept < size:
            codes = build.module.rev_swig_ptr(inverted.get_codes(number), size * inverted.code_size)
            rows = torch.as_tensor(codes).view(size, -1)
            rows[:kept], labels[:kept] = rows[keep], labels[keep]
            inverted.resize(number, kept)
    total = inverted.compute_ntotal()
    while isinstance(index, build.module.IndexPreTransform):
        index.ntotal = total
        index = build.module.downcast_index(index.index)
    lists.ntotal = total
    return True


def _behind_normalization(build: FaissBuild, index: Any) -> Any:
    faiss = build.module
    first = faiss.NormalizationTransform(index.d, 2.0)
    if not isinstance(index, faiss.IndexPreTransform):
        index.this.disown()
        index = faiss.IndexPreTransform(index)
        index.own_fields = True
    first.this.disown()
    index.prepend_transform(first)
    return index


def _in_id_map(build: FaissBuild, index: Any, labels: Tensor) -> Any:
    # Faiss takes an empty index only; what the inner one holds is said right after.
    rows, index.ntotal = index.ntotal, 0
    of_bits = kind_of(build, index) is BITS
    made = (build.module.IndexBinaryIDMap2 if of_bits else build.module.IndexIDMap2)(index)
    index.ntotal = made.ntotal = rows
    index.this.disown()
    made.own_fields = True
    build.module.copy_array_to_vector(labels.numpy(), made.id_map)
    made.construct_rev_map()
    return made
