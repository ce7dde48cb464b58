"""The exceptions that callers may meet: one clear sentence each, naming the value, what is allowed, what to do."""


class LongstrideError(Exception):
    """Base of every error that Longstride raises on purpose."""


class PatternError(LongstrideError, ValueError):
    """A pattern, or its text, is not legal: ``Strided(stride=0): stride must be at least 1``."""


class ArgumentError(LongstrideError, ValueError):
    """Arguments of a call do not fit together (shapes, devices, dtypes, lengths)."""


class UnsupportedError(LongstrideError, ValueError):
    """No backend takes this request; the message lists every backend with its reason."""


class RecipeError(LongstrideError, ValueError):
    """A recipe has an unknown key or an illegal value."""


class DataError(LongstrideError, ValueError):
    """Data is missing, empty, too short or not readable."""


class CheckpointError(LongstrideError, RuntimeError):
    """A checkpoint is missing, damaged or could not be written."""
