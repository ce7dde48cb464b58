"""What every test shares: poisoned memory, Hypothesis without deadlines, matplotlib without a display."""

import os
from collections.abc import Callable, Iterator

import hypothesis
import pytest
import torch

os.environ.setdefault("MPLBACKEND", "Agg")

# The machines that run these tests are shared, so that a time limit per example says nothing about the code.
hypothesis.settings.register_profile("longstride", deadline=None, print_blob=True)
hypothesis.settings.load_profile("longstride")


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`allocate`, except that the floats it leaves uninitialised are NaN."""

    def allocate_and_poison(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point() and not torch.compiler.is_compiling():
            with torch.no_grad():
                tensor.fill_(float("nan"))
        return tensor

    return allocate_and_poison


@pytest.fixture(scope="session", autouse=True)
def uninitialised_memory_is_nan() -> Iterator[None]:
    """Code that reads what it never wrote fails its test, instead of passing when the memory happens to be zero."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (torch.Tensor, "new_empty"),
            (torch.Tensor, "new_empty_strided"),
        ):
            patch.setattr(owner, name, _poisoned(getattr(owner, name)))
        yield
