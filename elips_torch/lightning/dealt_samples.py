"""The places of an epoch's rows: those of one process, and none for what was dealt out twice."""

import dataclasses
import itertools
from collections.abc import Sequence, Sized
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.rank_zero import WarningCache
from torch import Tensor
from torch.utils.data import BatchSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from elips_torch.lightning.gather import Processes

_warnings = WarningCache()


@dataclasses.dataclass(frozen=True)
class _Deal:
    """How the samples of a loader are dealt out.

    The i-th of a process's ``own`` has the number ``i * count + rank``; one of ``n_samples`` or more is a
    repeat. ``sizes`` are the samples of each batch; None where batches do not keep the order of the samples.
    """

    n_samples: int
    own: int
    rank: int
    count: int
    sizes: list[int] | None

    @property
    def repeats(self) -> bool:
        """Whether the last sample of this process is one that another has too."""
        return (self.own - 1) * self.count + self.rank >= self.n_samples


def places_of(
    batches: Sequence[tuple[int, Tensor]],
    n_batches: int,
    loader: Any,
    processes: Processes,
    *,
    name: str,
    unique: bool,
) -> tuple[Tensor, int]:
    """Return the places ``(N,)`` of this process's rows, and the number of places; called by all processes.

    A `DistributedSampler` deals the samples out in turn and repeats the first ones until each process has
    equally many. Rows of the repeats get places past the end. The others lie by id where they have one,
    else by the number of their sample if there are equally many for each, else process by process.

    Args:
        batches: the number of each batch that gave rows, and the integers of these, ``(B,)`` or ``(B, R)``.
        n_batches: how many batches this process has seen.
        loader: where they come from.
        processes: who takes part.
        name: what to call the rows in a warning.
        unique: whether the integers are the ids of the rows.
    """
    deal = _deal_of(loader, processes)
    rows = sum(len(integers) for _, integers in batches)
    views, layouts = _layouts(batches, n_batches, deal)
    everyone = processes.objects((rows, views, layouts))
    if unique:
        ids = torch.cat([integers for _, integers in batches]).cpu() if batches else torch.empty(0).long()
        return _by_id(ids, _suspects(batches, views, deal), processes)
    possible = frozenset.intersection(*(each[2] for each in everyone))
    if (
        deal is not None
        and deal.sizes is not None
        and possible
        and all(each[1] == views for each in everyone)
    ):
        return _by_sample(deal, deal.sizes[:n_batches], views, woven=possible == {"woven"})
    if any(processes.objects(deal is not None and deal.repeats)):
        _warnings.warn(
            f"the data sampler repeats samples to give each process equally many, and the {name} do not tell "
            "which of their rows these are: they count twice, and the numbers differ a little from those of "
            "one process. Expected is the same number of rows for every sample of a batch"
        )
    first = sum(each[0] for each in everyone[: processes.rank])
    return torch.arange(first, first + rows), sum(each[0] for each in everyone)


def _deal_of(loader: Any, processes: Processes) -> _Deal | None:
    """Return how samples are dealt out, None where that is not known."""
    within = getattr(loader, "batch_sampler", None)
    sampler: Any = getattr(within, "sampler", None) or getattr(loader, "sampler", None)
    in_order = within is None or getattr(type(within), "__iter__", None) is BatchSampler.__iter__
    if isinstance(sampler, DistributedSampler) and sampler.num_replicas == processes.count:
        own, n_samples = sampler.num_samples, len(sampler.dataset)  # type: ignore[arg-type]
    elif processes.count == 1 and isinstance(sampler, SequentialSampler if not in_order else Sized):
        own = n_samples = len(sampler)
    else:
        return None
    sizes: list[int] | None
    if within is None:
        sizes = [1] * own
    elif in_order:
        size = within.batch_size
        sizes = [min(size, own - start) for start in range(0, own, size)]
        sizes = sizes[: own // size] if within.drop_last else sizes
    else:
        # A batch sampler of the user's may do with the order what it likes: it is asked once more.
        with isolate_rng():
            dealt = [list(batch) for batch in within]
            taken = list(itertools.chain.from_iterable(dealt))
            same = taken == list(itertools.islice(sampler, len(taken)))
        sizes = [len(batch) for batch in dealt] if same else None
    return _Deal(n_samples, own, processes.rank, processes.count, sizes)


def _layouts(
    batches: Sequence[tuple[int, Tensor]], n_batches: int, deal: _Deal | None
) -> tuple[int, frozenset[str]]:
    """Return the number of rows per sample, 0 if it varies, and how they may lie.

    "tiled" is view by view, as `torch.cat` makes it; "woven" is sample by sample, as `torch.stack` does.
    """
    sizes = None if deal is None else deal.sizes
    if sizes is None or not batches or not len(batches) == n_batches <= len(sizes):
        return 0, frozenset()
    views = len(batches[0][1]) // sizes[0]
    if not views or any(len(integers) != views * sizes[batch] for batch, integers in batches):
        return 0, frozenset()
    possible = {"tiled", "woven"}
    for _, integers in batches if views > 1 else ():
        # Views of a sample share its integers.
        by_view = integers.reshape(views, -1, *integers.shape[1:])
        by_sample = integers.reshape(-1, views, *integers.shape[1:])
        possible -= {"tiled"} if (by_view != by_view[:1]).any() else set()
        possible -= {"woven"} if (by_sample != by_sample[:, :1]).any() else set()
    return views, frozenset(possible)


def _by_sample(deal: _Deal, sizes: list[int], views: int, *, woven: bool) -> tuple[Tensor, int]:
    places = []
    for stop, size in zip(itertools.accumulate(sizes), sizes, strict=True):
        sample = torch.arange(stop - size, stop) * deal.count + deal.rank
        place = sample * views + torch.arange(views)[:, None]
        places.append((place.T if woven else place).flatten())
    return torch.cat(places), min(deal.n_samples, sum(sizes) * deal.count) * views


def _suspects(batches: Sequence[tuple[int, Tensor]], views: int, deal: _Deal | None) -> Tensor:
    """Return which rows ``(N,)`` may come from a repeated sample, which is the last of a process."""
    rows = sum(len(integers) for _, integers in batches)
    if deal is None or not deal.repeats or not rows:
        return torch.zeros(rows, dtype=torch.bool)
    last = 1 if views == 1 else len(batches[-1][1])
    return torch.arange(rows) >= (0 if deal.sizes is None else rows - last)


def _by_id(ids: Tensor, suspects: Tensor, processes: Processes) -> tuple[Tensor, int]:
    """Return places by id, and none for suspects whose id another row has."""
    sizes = processes.objects(len(ids))
    start = sum(sizes[: processes.rank])
    all_ids, all_suspects = processes.rows(ids), processes.rows(suspects)
    order = all_ids.argsort(stable=True)
    if all_suspects.any():
        # Of rows with the same id those that are no suspects come first.
        order = all_suspects.long().argsort(stable=True)
        order = order[all_ids[order].argsort(stable=True)]
        repeated = all_suspects[order]
        repeated[1:] &= all_ids[order[1:]] == all_ids[order[:-1]]
        repeated[:1] = False
        order = order[~repeated]
    total = len(order)
    places = torch.full_like(all_ids, total)
    places[order] = torch.arange(total)
    return places[start : start + len(ids)], total
