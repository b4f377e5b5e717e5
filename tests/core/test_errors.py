import inspect

import pytest

from elips_torch.core import errors
from elips_torch.core.errors import ElipsError, UnknownIdError

BUILT_IN = {
    "ArgumentError": ValueError,
    "ShapeError": ValueError,
    "DtypeError": TypeError,
    "DeviceError": ValueError,
    "NonFiniteError": ValueError,
    "DuplicateIdError": ValueError,
    "UnknownIdError": KeyError,
    "MetricError": ValueError,
    "FactoryError": ValueError,
    "ParameterError": TypeError,
    "NotFittedError": RuntimeError,
    "NotEmptyError": RuntimeError,
    "ImplementationError": RuntimeError,
    "ConversionError": ValueError,
    "DamagedIndexError": ValueError,
    "ProcessError": RuntimeError,
    "IndexFileError": ValueError,
}
CLASSES = [
    each for _, each in inspect.getmembers(errors, inspect.isclass) if each.__module__ == errors.__name__
]


@pytest.mark.parametrize("error", [each for each in CLASSES if each is not ElipsError])
def test_errors_derive_from_the_base_and_from_a_built_in(error):
    assert issubclass(error, ElipsError)
    assert issubclass(error, BUILT_IN[error.__name__])


def test_an_unknown_id_is_shown_without_quotes():
    assert str(UnknownIdError("id 7 is not in the index")) == "id 7 is not in the index"
    assert str(UnknownIdError()) == ""
    with pytest.raises(KeyError):
        raise UnknownIdError("id 7")
