"""Which of the retrieved ids are relevant, and at which place: the one comparison behind every metric."""

import dataclasses
import functools

import torch
from torch import Tensor

from elips_torch.core.errors import ArgumentError, DeviceError, ShapeError
from elips_torch.core.validation import describe_rows
from elips_torch.evaluation.relevant import (
    Padded,
    Pairs,
    RelevantIds,
    check_integers,
    check_retrieved,
    read_relevant,
)

# The place of what was not retrieved: behind every k.
NOWHERE = 2**31 - 1
# Up to so many relevant ids a query, each is compared with all that was retrieved; above, looked up.
_FEW = 64


@dataclasses.dataclass(frozen=True)
class Match:
    """The hits of Q queries; M is whatever holds them.

    Attributes:
        places: ``(Q, M)`` int64, the place of each hit, the first of all is 0; `NOWHERE` without a hit.
        ordinals: ``(Q, M)`` or ``(1, M)`` int64, how many hits there are up to this one.
        n_relevant: ``(Q,)`` int64, how many are relevant, found or not.
        gains: ``(Q, M)`` float64, how relevant each hit is, or None if all are equally so.
        ideal: ``(Q, I)`` float64, what could be gained at each place, descending, or None as for gains.
    """

    places: Tensor
    ordinals: Tensor
    n_relevant: Tensor
    gains: Tensor | None = None
    ideal: Tensor | None = None

    @functools.cached_property
    def first(self) -> Tensor:
        """``(Q,)`` int64, the place of the first hit, `NOWHERE` without one; M is at least 1."""
        return self.places.amin(1)


def match_ids(
    retrieved: Tensor,
    relevant: RelevantIds,
    k: int,
    *,
    lims: Tensor | None = None,
    relevance: RelevantIds | None = None,
    whole: bool = False,
) -> Match:
    """Find the relevant ids among those retrieved; a repeated id counts where it stands first.

    Args:
        retrieved: ``(Q, K)`` int64, best first, K at least k; negative where nothing was found.
        relevant: as for `read_relevant`.
        k: how many places matter.
        lims: as for `read_relevant`.
        relevance: as for `read_relevant`.
        whole: whether places matter up to the number of relevant ids, too.

    Raises:
        ElipsError: an argument of wrong type, dtype, shape, device or value.
    """
    wanted = read_relevant(relevant, lims, relevance)
    device = wanted.ids.device
    if not len(wanted.ids) and isinstance(retrieved, Tensor):
        # An empty list says nothing of a device.
        device = retrieved.device
    retrieved = check_retrieved("retrieved_ids", retrieved, len(wanted), device, k)
    retrieved = retrieved[:, : max(k, wanted.width) if whole else k].contiguous()
    if wanted.width <= _FEW:
        return _compare(retrieved, wanted if isinstance(wanted, Padded) else wanted.padded())
    return _look_up(retrieved, wanted.pairs())


def match_labels(name: str, retrieved: Tensor, labels: Tensor, n_relevant: Tensor, k: int) -> Match:
    """Find the places with the query's own label, each of which is a hit.

    Args:
        name: what the first argument is called.
        retrieved: ``(Q, K)`` int64 labels, best first, K at least k; negative where nothing was found.
        labels: ``(Q,)`` int64; negative for a query without.
        n_relevant: ``(Q,)`` int64 how many entries have the query's label, at least the hits among
            all that was retrieved; of a query without a label it is not looked at.
        k: how many places matter at least; those behind are looked at, too.

    Raises:
        ElipsError: an argument of wrong type, dtype, shape, device or value.
    """
    check_integers("labels", labels, 1)
    check_integers("relevant", n_relevant, 1)
    if n_relevant.shape != labels.shape:
        raise ShapeError(f"relevant has shape {tuple(n_relevant.shape)}, expected {tuple(labels.shape)}")
    if n_relevant.device != labels.device:
        raise DeviceError(f"relevant is on {n_relevant.device}, labels is on {labels.device}")
    retrieved = check_retrieved(name, retrieved, len(labels), labels.device, k)
    labelled = labels >= 0
    hit = (retrieved == labels[:, None]) & labelled[:, None]
    n_relevant = n_relevant.long().masked_fill(~labelled, 0)
    few = n_relevant < hit.sum(1)
    if bool(few.any()):
        negative = n_relevant < 0
        if bool(negative.any()):
            raise ArgumentError(f"relevant is below 0 in {describe_rows(negative.nonzero().flatten())}")
        raise ArgumentError(
            f"relevant is less than the number of hits in {describe_rows(few.nonzero().flatten())}, expected "
            f"the number of all entries with the query's label; is the query itself among the {name}?"
        )
    return _match(hit, n_relevant)


def _match(hit: Tensor, n_relevant: Tensor) -> Match:
    columns = torch.arange(hit.shape[1], device=hit.device)
    return Match(columns.where(hit, NOWHERE), hit.cumsum(1), n_relevant)


def _compare(retrieved: Tensor, relevant: Padded) -> Match:
    """Match by comparing one relevant id of each query after the other."""
    ids = _without_repeats(relevant.ids)
    known = ids >= 0
    places = torch.full_like(ids, NOWHERE)
    if retrieved.shape[1]:
        for column in range(ids.shape[1]):
            # The first of several largest is the one that counts.
            found, place = (retrieved == ids[:, column, None]).view(torch.uint8).max(1)
            places[:, column] = place.where(found.bool() & known[:, column], NOWHERE)
    places, order = places.sort(dim=1)
    ordinals = torch.arange(1, ids.shape[1] + 1, device=ids.device)[None]
    if relevant.gains is None:
        return Match(places, ordinals, known.sum(1))
    gains = relevant.gains.masked_fill(~known, 0.0)
    return Match(
        places, ordinals, known.sum(1), gains.gather(1, order), gains.sort(dim=1, descending=True).values
    )


def _without_repeats(ids: Tensor) -> Tensor:
    """Return ``(Q, R)`` ids with every one that stands earlier in its row replaced by -1."""
    ordered, order = ids.sort(dim=1, stable=True)
    repeated = torch.zeros_like(ids, dtype=torch.bool)
    repeated.scatter_(1, order[:, 1:], ordered[:, 1:] == ordered[:, :-1])
    return ids.masked_fill(repeated, -1)


def _look_up(retrieved: Tensor, relevant: Pairs) -> Match:
    """Match by looking up every retrieved id among the sorted pairs of query and relevant id."""
    n, k = retrieved.shape
    if not len(relevant.ids):
        nothing = torch.zeros_like(retrieved, dtype=torch.bool)
        return _match(nothing, retrieved.new_zeros(n))
    values, codes = relevant.ids.unique(return_inverse=True)
    keys, order = (relevant.owners * len(values) + codes).sort(stable=True)
    first = torch.ones_like(keys, dtype=torch.bool)
    first[1:] = keys[1:] != keys[:-1]
    keys = keys[first]
    owners = keys // len(values)
    n_relevant = torch.bincount(owners, minlength=n)

    codes = torch.searchsorted(values, retrieved).clamp_max_(len(values) - 1)
    wanted = codes + torch.arange(n, device=codes.device)[:, None] * len(values)
    pairs = torch.searchsorted(keys, wanted).clamp_max_(len(keys) - 1)
    hit = (values[codes] == retrieved) & (keys[pairs] == wanted)
    # A pair that is found again counts at its first place only.
    columns = torch.arange(k, device=codes.device).expand(n, -1)
    earliest = keys.new_full((len(keys),), k).scatter_reduce_(0, pairs[hit], columns[hit], "amin")
    hit &= earliest[pairs] == columns
    match = _match(hit, n_relevant)
    if relevant.gains is None:
        return match
    gains = relevant.gains[order][first]
    return dataclasses.replace(
        match, gains=gains[pairs].masked_fill_(~hit, 0.0), ideal=_ideal(gains, owners, n_relevant, k)
    )


def _ideal(gains: Tensor, owners: Tensor, counts: Tensor, k: int) -> Tensor:
    """Return the k largest gains of each query, ``(Q, K)`` descending, 0 behind the last."""
    order = gains.argsort(descending=True)
    order = order[owners[order].argsort(stable=True)]
    places = torch.arange(len(gains), device=gains.device) - (counts.cumsum(0) - counts)[owners]
    kept = places < k
    ideal = gains.new_zeros(len(counts), k)
    ideal[owners[kept], places[kept]] = gains[order][kept]
    return ideal
