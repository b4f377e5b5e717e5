"""The order of the tests, how hypothesis draws in all of them, and how threads wait."""

import os

from hypothesis import settings

# Read when torch and faiss are imported: where something else keeps a core busy, their threads spend most of
# the time waiting for each other, and some tests take three times as long.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# How long an example takes says nothing on a busy machine.
settings.register_profile("project", deadline=None)
settings.load_profile("project")


# They load a second build of faiss, which dresses what functions of the first return as classes of its own:
# after them nothing else may use faiss.
LAST = ("test_bench_ann.py", "test_bench_exact.py", "test_builds.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name in LAST)
