import pytest

from elips_torch.evaluation import matching


@pytest.fixture(params=["compared", "looked up"])
def matched(request, monkeypatch):
    """Both ways to match ids, whatever their number."""
    if request.param == "looked up":
        monkeypatch.setattr(matching, "_FEW", 0)
    return request.param
