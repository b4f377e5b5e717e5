"""The order of the tests."""


def pytest_collection_modifyitems(items):
    # A second build of faiss in the process dresses what functions of the first return as classes of its own,
    # and faiss's torch_utils replaces methods: what brings either comes after all else that uses faiss.
    items.sort(key=lambda item: item.path.parent.name == "faiss")
