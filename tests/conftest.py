"""The order of the tests."""


def pytest_collection_modifyitems(items):
    # A second build of faiss in the process dresses what functions of the first return as classes of its own:
    # what loads one comes last.
    items.sort(key=lambda item: item.path.name in ("test_builds.py", "test_contenders.py"))
