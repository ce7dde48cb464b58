"""The copying model as the subject of the checks."""

import pytest
from tests.copier import CONTEXT, copier

from longstride.checks import Subject


@pytest.fixture
def subject() -> Subject:
    return Subject(copier("Causal()"), tokenizer=None, context=CONTEXT)
