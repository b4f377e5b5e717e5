"""Hard negatives: what an index finds near a query although it is wrong."""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from elips_torch.core.errors import ArgumentError, DtypeError, ElipsError, ShapeError
from elips_torch.core.results import SearchResult
from elips_torch.core.user_warnings import warn_user
from elips_torch.core.validation import (
    check_count,
    check_device,
    check_exclude,
    check_flag,
    check_mask,
    check_vectors,
    describe_rows,
)
from elips_torch.indexes.base import Index
from elips_torch.ops.candidate_scores import candidate_scores_op
from elips_torch.training.memory_bank import MemoryBank

# Masks, candidates and positives of the queries that are looked at together.
_BYTES_AT_ONCE = 2**26


class HardNegativeMiner:
    """Finds for each query the wrong answers that an index ranks highest.

    The settings are those of sentence-transformers' ``mine_hard_negatives``. What is known to be right
    (``positives``, and vectors with the query's label) is excluded *during* the search, so
    ``range_max`` candidates come back when that many wrong answers exist. Of these, in the order of
    the index, the miner

    1. drops those with a score above ``max_score`` or below ``min_score``, as the index gives it: of a
       distance, ``min_score`` is what keeps out the too near;
    2. drops those within a margin of the positive. With similarities s, a negative stays if
       ``s_negative + absolute_margin <= s_positive`` and if
       ``s_negative <= s_positive - relative_margin * abs(s_positive)``; 0.05 means at most 95% as similar.
       With distances d, if ``d_negative - absolute_margin >= d_positive`` and if
       ``d_negative >= (1 + relative_margin) * d_positive``. Of several positives the least similar
       counts. (sentence-transformers multiplies by ``1 - relative_margin`` also where the positive's
       similarity is below 0, and so lets more similar negatives pass there; elsewhere it is the same.);
    3. skips the first ``range_min`` of what is left, the likeliest to be right without being known to be;
    4. takes ``num_negatives``: the nearest, or any, all equally likely.

    Nothing else is left out: a query that the index holds is the nearest of its own negatives, unless it
    is among its positives, has a label, or is named by ``exclude`` or ``exclude_self``. So are copies of it
    under other ids, which only labels, ``max_score`` (of a distance ``min_score``) or a margin keep out.

    Queries are taken in parts: no matrix of all queries by all vectors of floats ever exists, and
    memory does not grow with the number of queries. The percentage margin is that of
    `NV-Retriever <https://arxiv.org/abs/2407.15831>`_.

    Args:
        num_negatives: number of negatives per query.
        range_min: number of candidates to skip.
        range_max: number of candidates to look at. Default: ``range_min + num_negatives``, or
            ``range_min + 10 * num_negatives`` where a score or a margin may drop some or some are drawn.
        max_score: largest score of a negative.
        min_score: smallest score of a negative.
        absolute_margin: least difference between the scores of positive and negative.
        relative_margin: least difference as a share of the positive's score.
        sampling_strategy: "top" takes the nearest, "random" draws.
        on_shortage: what to do where fewer than ``num_negatives`` are left: "pad" puts id -1 and the
            worst score in the empty places and warns, once for each miner; "error" raises.
        seed: of the draws. They do not depend on the device, and leave torch's global random numbers alone.
            Each call goes on where the last one ended; a pickled miner does so too. No checkpoint holds that:
            a miner that is made again begins with the first draw. To go on, keep
            ``miner.generator.get_state()``.

    Raises:
        ElipsError: an argument has a wrong type or value.

    >>> import torch
    >>> from elips_torch.indexes.flat import FlatIndex
    >>> index = FlatIndex(dim=1)
    >>> _ = index.add(torch.tensor([[0.0], [1.0], [2.0], [3.0]]))
    >>> miner = HardNegativeMiner(num_negatives=2)
    >>> miner.mine(index, torch.tensor([[0.9]]), positives=torch.tensor([[1]])).ids
    tensor([[0, 2]])
    """

    def __init__(
        self,
        num_negatives: int = 3,
        *,
        range_min: int = 0,
        range_max: int | None = None,
        max_score: float | None = None,
        min_score: float | None = None,
        absolute_margin: float | None = None,
        relative_margin: float | None = None,
        sampling_strategy: Literal["top", "random"] = "top",
        on_shortage: Literal["pad", "error"] = "pad",
        seed: int = 0,
    ) -> None:
        self.num_negatives = check_count("num_negatives", num_negatives)
        self.range_min = check_count("range_min", range_min, 0)
        _check_choice("sampling_strategy", sampling_strategy, ("top", "random"))
        _check_choice("on_shortage", on_shortage, ("pad", "error"))
        self.max_score = _check_number("max_score", max_score)
        self.min_score = _check_number("min_score", min_score)
        self.absolute_margin = _check_number("absolute_margin", absolute_margin)
        self.relative_margin = _check_number("relative_margin", relative_margin)
        filters = (max_score, min_score, absolute_margin, relative_margin)
        drops = sampling_strategy == "random" or any(each is not None for each in filters)
        default = self.range_min + (10 if drops else 1) * self.num_negatives
        self.range_max = default if range_max is None else check_count("range_max", range_max)
        if self.range_max < self.range_min + self.num_negatives:
            raise ArgumentError(
                f"range_max is {self.range_max}, expected at least range_min + num_negatives = "
                f"{self.range_min + self.num_negatives}"
            )
        self.sampling_strategy = sampling_strategy
        self.on_shortage = on_shortage
        # Always on the CPU, so that the same negatives are drawn everywhere.
        self.generator = torch.Generator().manual_seed(seed)
        self._has_warned = False

    def __getstate__(self) -> dict[str, Any]:
        # Generators cannot be pickled, their states can: a spawned process draws what this one would.
        return {**self.__dict__, "generator": self.generator.get_state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.generator = torch.Generator()
        self.generator.set_state(state["generator"])

    def __repr__(self) -> str:
        names = ("num_negatives", "range_min", "range_max", "sampling_strategy", "on_shortage")
        return f"HardNegativeMiner({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    @torch.no_grad()
    def mine(
        self,
        index: Index,
        queries: Tensor,  # (Q, D)
        positives: Tensor | None = None,  # (Q, P) or (Q,)
        *,
        query_labels: Tensor | None = None,  # (Q,)
        labels: Tensor | None = None,  # (ntotal,)
        mask: Tensor | None = None,  # (ntotal,) or (Q, ntotal)
        exclude: Tensor | None = None,  # (Q, M)
        exclude_self: bool = False,
        **search: Any,
    ) -> SearchResult:
        """Return the hard negatives of queries.

        Args:
            index: any index; what it finds is what is mined, exact or not.
            queries: ``(Q, D)``, as for `Index.search`; a gradient history is ignored.
            positives: int64 ``(Q, P)`` or ``(Q,)`` ids of right answers, padded by -1. Needed with a
                margin: then each query has one, and the index holds them.
            query_labels: int64 ``(Q,)``; vectors with the query's label are no negatives. -1 is no label.
            labels: int64 ``(ntotal,)`` label of each vector, in the order of ``index.ids``. Default:
                those of a `MemoryBank`.
            mask: bool ``(ntotal,)`` or ``(Q, ntotal)``, as for `Index.search`: True for what may be a
                negative.
            exclude: int64 ``(Q, M)`` ids to leave out that are no positives, padded by -1: for example
                the query itself.
            exclude_self: the queries are the stored vectors in the order of ``index.ids``, and none
                is to find itself.
            **search: passed on to ``index.search``.

        Returns:
            SearchResult: scores and ids ``(Q, num_negatives)``, best first; id -1 where there are fewer.

        Raises:
            UnknownIdError: a margin is set, and the index does not hold a positive.
            ArgumentError: a query has too few negatives, with ``on_shortage="error"``.
            ElipsError: an argument of wrong type, shape, dtype, device or value.
        """
        if not isinstance(index, Index):
            raise DtypeError(f"index is a {type(index).__name__}, expected an Index")
        check_vectors("queries", queries, dim=index.dim, device=index.device)
        n = len(queries)
        if positives is not None:
            positives = _as_columns("positives", positives, n, index.device)
        check_mask(mask, n, index.ntotal, index.device)
        check_exclude(exclude, n, index.device)
        if check_flag("exclude_self", exclude_self):
            exclude = _with_own(index, exclude, n)
        labels = self._check_labels(index, query_labels, labels, n)
        self._check_margins(positives)
        row_bytes = 32 * self.range_max + (index.ntotal if labels is not None else 0)
        row_bytes += 8 * index.dim * (positives.shape[1] if positives is not None else 0)
        step = max(1, _BYTES_AT_ONCE // row_bytes)
        before = self.generator.get_state()
        scores = torch.empty(n, self.num_negatives, device=index.device)
        ids = torch.empty(n, self.num_negatives, dtype=torch.int64, device=index.device)
        try:
            for start in range(0, n, step):
                part = slice(start, start + step)
                scores[part], ids[part] = self._mine_part(
                    index,
                    queries[part],
                    None if positives is None else positives[part],
                    None if query_labels is None or labels is None else (query_labels[part], labels),
                    mask[part] if mask is not None and mask.ndim == 2 else mask,
                    None if exclude is None else exclude[part],
                    search,
                )
            self._report_shortage(ids)
        except ElipsError:
            self.generator.set_state(before)
            raise
        return SearchResult(scores, ids)

    __call__ = mine

    def _mine_part(
        self,
        index: Index,
        queries: Tensor,
        positives: Tensor | None,
        labels: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        exclude: Tensor | None,
        search: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        wrong = [ids for ids in (positives, exclude) if ids is not None]
        if labels is not None:
            own, others = labels
            differs = (own[:, None] != others) | (own[:, None] < 0)
            mask = differs if mask is None else differs & mask
        scores, ids = index.search(
            queries, self.range_max, mask=mask, exclude=torch.cat(wrong, 1) if wrong else None, **search
        )
        keep = ids >= 0
        if self.max_score is not None:
            keep &= scores <= self.max_score
        if self.min_score is not None:
            keep &= scores >= self.min_score
        if positives is not None and (self.absolute_margin, self.relative_margin) != (None, None):
            keep &= self._outside_margins(index, queries, positives, scores)
        keep &= keep.cumsum(1) > self.range_min
        return self._pick(scores, ids, keep, index.higher_is_better)

    def _outside_margins(self, index: Index, queries: Tensor, positives: Tensor, scores: Tensor) -> Tensor:
        """Return bool ``(Q, K)``: which candidates are far enough from the positives."""
        held = positives >= 0
        vectors = torch.zeros(*positives.shape, index.dim, dtype=index.dtype, device=index.device)
        vectors[held] = index.reconstruct(positives[held]).to(index.dtype)
        right = candidate_scores_op(
            queries.detach(), vectors, positives, index.metric, index.p or 0.0, index.workspace_bytes
        )
        # From here on larger is nearer.
        sign = 1.0 if index.higher_is_better else -1.0
        near = sign * scores
        least = (sign * right).masked_fill(~held, torch.inf).amin(1, keepdim=True)
        keep = torch.ones_like(scores, dtype=torch.bool)
        if self.absolute_margin is not None:
            keep &= near + self.absolute_margin <= least
        if self.relative_margin is not None:
            keep &= near <= least - self.relative_margin * least.abs()
        return keep

    def _pick(self, scores: Tensor, ids: Tensor, keep: Tensor, higher: bool) -> tuple[Tensor, Tensor]:
        """Return ``num_negatives`` of the candidates to keep, best first."""
        if self.sampling_strategy == "random":
            order = torch.rand(ids.shape, generator=self.generator).to(ids.device)
        else:
            order = torch.arange(ids.shape[1], dtype=torch.float32, device=ids.device).expand(ids.shape)
        picked = order.masked_fill(~keep, torch.inf).topk(self.num_negatives, dim=1, largest=False)
        empty = picked.values.isinf()
        columns = picked.indices.masked_fill(empty, ids.shape[1]).sort(1).values
        empty = columns == ids.shape[1]
        columns = columns.clamp_max(ids.shape[1] - 1)
        worst = -math.inf if higher else math.inf
        return scores.gather(1, columns).masked_fill(empty, worst), ids.gather(1, columns).masked_fill(
            empty, -1
        )

    def _report_shortage(self, ids: Tensor) -> None:
        if self.on_shortage == "pad" and self._has_warned:
            return
        short = (ids < 0).any(1).nonzero()[:, 0]
        if not len(short):
            return
        message = (
            f"{len(short)} of {len(ids)} queries have fewer than {self.num_negatives} negatives "
            f"({describe_rows(short)}); a larger range_max or index, a smaller range_min or margin, or other "
            "bounds on the score would give more"
        )
        if self.on_shortage == "error":
            raise ArgumentError(message)
        self._has_warned = True
        warn_user(f"{message}. Their places hold id -1. This miner says so only once.")

    def _check_margins(self, positives: Tensor | None) -> None:
        margins = [name for name in ("absolute_margin", "relative_margin") if getattr(self, name) is not None]
        if not margins:
            return
        if positives is None:
            raise ArgumentError(f"{margins[0]} is set, expected positives, from whose score it is measured")
        without = (positives < 0).all(1).nonzero()[:, 0]
        if len(without):
            raise ArgumentError(
                f"positives has no id in {describe_rows(without)}, expected at least one per query, from "
                f"whose score {margins[0]} is measured"
            )

    def _check_labels(
        self, index: Index, query_labels: Tensor | None, labels: Tensor | None, n: int
    ) -> Tensor | None:
        """Return the labels of the index's vectors, None if labels play no part."""
        if query_labels is None:
            if labels is not None:
                raise ArgumentError("labels are given without query_labels, expected both or neither")
            return None
        if labels is None and isinstance(index, MemoryBank):
            labels = index.labels
        if labels is None:
            raise ArgumentError("query_labels are given without labels, expected one for each vector")
        for name, each, size in (("query_labels", query_labels, n), ("labels", labels, index.ntotal)):
            _check_ids(name, each, index.device)
            if tuple(each.shape) != (size,):
                raise ShapeError(f"{name} has shape {tuple(each.shape)}, expected ({size},)")
        return labels


def _with_own(index: Index, exclude: Tensor | None, n: int) -> Tensor:
    """Return ids to leave out ``(Q, M + 1)``, each query's own among them; parts know no rows."""
    if n != index.ntotal:
        raise ShapeError(
            f"exclude_self takes the stored vectors as queries: got {n} queries, expected {index.ntotal}; "
            "for a part of them pass exclude=ids[:, None]"
        )
    own = index.ids[:, None]
    return own if exclude is None else torch.cat([exclude, own], 1)


def _as_columns(name: str, ids: Tensor, n: int, device: torch.device) -> Tensor:
    _check_ids(name, ids, device)
    columns = ids[:, None] if ids.ndim == 1 else ids
    if columns.ndim != 2 or len(columns) != n:
        raise ShapeError(f"{name} has shape {tuple(ids.shape)}, expected ({n}, P) or ({n},)")
    return columns


def _check_ids(name: str, ids: Tensor, device: torch.device) -> None:
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise DtypeError(f"{name} is {got}, expected an int64 tensor")
    check_device(name, ids, device, "the index")


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ArgumentError(f"{name} is {value!r}, expected {' or '.join(map(repr, known))}")


def _check_number(name: str, value: float | None) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise DtypeError(f"{name} is {value!r}, expected a number or None")
    if math.isnan(value) or (name.endswith("margin") and value < 0):
        raise ArgumentError(f"{name} is {value}, expected a number{' >= 0' * name.endswith('margin')}")
    return float(value)
