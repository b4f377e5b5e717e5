"""The order of the tests, and how hypothesis draws in all of them."""

from hypothesis import settings

# How long an example takes says nothing on a busy machine.
settings.register_profile("project", deadline=None)
settings.load_profile("project")


def pytest_collection_modifyitems(items):
    # A second build of faiss in the process dresses what functions of the first return as classes of its own,
    # and faiss's torch_utils replaces methods: what brings either comes after all else that uses faiss.
    items.sort(key=lambda item: item.path.parent.name == "faiss")
