"""Every error the library raises on purpose.

Each class derives from `ElipsError` and from the built-in exception a Python user would catch.
"""


class ElipsError(Exception):
    """Base of every error that elips_torch raises on purpose."""


class ArgumentError(ElipsError, ValueError):
    """An argument has a value outside what is allowed (for example ``k < 1``)."""


class ShapeError(ArgumentError):
    """A tensor has the wrong number of dimensions or the wrong size."""


class DtypeError(ElipsError, TypeError):
    """An argument has the wrong type, or a tensor the wrong dtype."""


class DeviceError(ArgumentError):
    """A tensor lies on another device than the index or the other tensors, or there is no such device."""


class NonFiniteError(ArgumentError):
    """Rows hold NaN, infinity, or values outside the metric's domain."""


class DuplicateIdError(ArgumentError):
    """An id occurs twice, or is in the index already."""


class UnknownIdError(ElipsError, KeyError):
    """An id is not in the index."""

    def __str__(self) -> str:
        # KeyError shows the repr of its argument, which would quote the whole sentence.
        return str(self.args[0]) if self.args else ""


class MetricError(ArgumentError):
    """The metric is unknown, or its parameter does not fit."""


class FactoryError(ArgumentError):
    """A description of an index has a part that means nothing, or nothing where it stands."""


class ParameterError(ElipsError, TypeError):
    """A search parameter does not exist for this index."""


class ConversionError(ArgumentError):
    """An index has no counterpart in another library, or none in this one."""


class DamagedIndexError(ConversionError):
    """An index of another library says of itself what is not so."""


class NotFittedError(ElipsError, RuntimeError):
    """`fit` has not been called yet."""


class NotEmptyError(ElipsError, RuntimeError):
    """`fit` is called on an index that holds vectors, which what it learned before has encoded."""


class ImplementationError(ElipsError, RuntimeError):
    """No implementation, or not the requested one, can serve the call."""


class ProcessError(ElipsError, RuntimeError):
    """Another process of the run failed, so that this one cannot go on either."""


class IndexFileError(ElipsError, ValueError):
    """A file is no index, is damaged, or holds another class of index."""
