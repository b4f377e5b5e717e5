"""What the C++ of exact search is to know, in the words of its arguments."""

import dataclasses
from typing import Any

from torch import Tensor

from elips_torch.kernels.list_layout import ListLayout
from elips_torch.kernels.screen import CodedQueries
from elips_torch.kernels.selection import Selection

# Queries that a list must have, on average, for threads to take queries rather than lists.
_QUERIES_PER_LIST = 16


@dataclasses.dataclass(frozen=True)
class ProbedLists:
    """The lists that each query searches, instead of all rows.

    Attributes:
        layout: the rows of each list.
        probes: ``(Q, P)`` int64, the lists of each query, each once; -1 for none.
        codes_in_slots: the rows' codes lie in the order of the slots, not of the rows.
    """

    layout: ListLayout
    probes: Tensor
    codes_in_slots: bool = False

    def narrowed(self, start: int, stop: int) -> "ProbedLists":
        """Return the lists of the queries from ``start`` to ``stop``."""
        return dataclasses.replace(self, probes=self.probes[start:stop])

    @property
    def rows_per_query(self) -> float:
        """Number of rows that a query meets, about."""
        return self.probes.shape[1] * self.layout.n_rows / self.layout.nlist

    def shares_queries(self, threads: int) -> bool:
        """Whether each of so many threads finds enough queries of its own in every list."""
        return self.probes.numel() >= _QUERIES_PER_LIST * self.layout.nlist * threads


def coded_facts(queries: Tensor, coded: CodedQueries) -> dict[str, Any]:
    """Return what the code is to know of queries that are coded."""
    return {
        "queries": queries.double().contiguous(),
        "query_codes": coded.codes.contiguous(),
        "query_terms": coded.terms.contiguous(),
        "rounding": coded.rounding.contiguous(),
        "offsets": coded.offsets.contiguous(),
        "usable": coded.usable,
        "slack": float(coded.slack),
        "is_exact": int(coded.is_exact),
    }


def list_facts(lists: ProbedLists) -> dict[str, Any]:
    """Return what the code is to know of lists."""
    layout, probes = lists.layout, lists.probes.contiguous()
    return {
        "list_starts": layout.starts,
        "list_sizes": layout.sizes,
        "slots": layout.slots,
        "probes": probes,
        "n_lists": layout.nlist,
        "n_slots": layout.slots.shape[0],
        "n_probes": probes.shape[1],
        "codes_in_slots": int(lists.codes_in_slots),
    }


def selection_facts(selection: Selection, n_queries: int) -> dict[str, Any]:
    """Return what the code is to know of what queries may see."""
    facts: dict[str, Any] = {}
    if selection.exclude is not None:
        facts["exclude"] = selection.exclude.sort(1).values.contiguous()
        facts["n_excluded"] = selection.n_excluded
    if selection.mask is not None:
        facts["mask"] = selection.mask
        facts["mask_stride"] = selection.mask.stride(0)
        facts["mask_step"] = selection.mask.stride(-1)
        if selection.own_mask is not None:
            facts["mask_rows"] = selection.numbers(n_queries)
    return facts
