"""What kernels compute, in torch, to measure the memory of what is around them."""

import functools

import torch
from torch.utils._python_dispatch import _disable_current_modes


def allocates_only_its_result(function):
    """What a kernel allocates is its result; what its stand-in needs beside that is not counted."""

    @functools.wraps(function)
    def stand_in(*args, **kwargs):
        with _disable_current_modes():
            found = function(*args, **kwargs)
        result = torch.empty(found.shape, dtype=found.dtype)
        with _disable_current_modes():
            result.copy_(found)
        return result

    return stand_in


def groups_of(values, group, empty):
    missing = -values.shape[1] % group
    return torch.nn.functional.pad(values, (0, missing), value=empty).unflatten(1, (-1, group))


@allocates_only_its_result
def rescore(queries, database, owners, groups, group, metric, rows):
    places = groups[:, None] * group + torch.arange(group)
    if rows is not None:
        places = rows[places]
    exists = (places >= 0) & (places < len(database))
    rows = database[places.clamp(0, len(database) - 1)].double()
    return torch.where(exists, metric.score(queries[owners][:, None].double(), rows), torch.nan)


@allocates_only_its_result
def kth_largest(values, k):
    return values.topk(k, dim=1).values[:, -1]


@allocates_only_its_result
def merge_keys(keys, k):
    return keys.sort(dim=1).values[:, :k].contiguous()


# For the names in `group_search_triton`.
AFTER_SCANS = {
    "rescore_triton": rescore,
    "kth_largest_triton": kth_largest,
    "merge_keys_triton": merge_keys,
}
