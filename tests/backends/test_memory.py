"""Memory grows with the pairs scored, never with q_len x kv_len."""

import subprocess
import sys

import pytest

# One float32 matrix of scores would be 65536 x 65536 x 4 bytes = 17 GB.
MOST_MEGABYTES = 600

PROGRAM = """
import resource, sys, torch, longstride as ls
length, pattern = 65_536, ls.parse(sys.argv[1])
q, k, v = (torch.randn(1, 1, length, 16, requires_grad=True) for _ in range(3))
small = [x.detach()[:, :, :600].requires_grad_() for x in (q, k, v)]
ls.attention(*small, pattern).sum().backward()  # what PyTorch loads when first used is not the work's
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ls.attention(q, k, v, pattern).square().sum().backward()
assert all(bool(x.grad.isfinite().all()) and bool(x.grad.any()) for x in (q, k, v))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts kilobytes on Linux only")
@pytest.mark.parametrize(
    "pattern", ["Strided(256)", "Local(256)", "Fixed(256, 8)", "Local(256) | Strided(256)", "LogSparse()", "Global(16)"]
)
def test_forward_and_backward_of_65536_positions_stay_small(pattern):
    """A process of its own, so that its peak is this computation's."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, pattern], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < MOST_MEGABYTES
