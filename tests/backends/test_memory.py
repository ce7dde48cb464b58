"""Memory grows with the pairs scored, never with q_len x kv_len."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import longstride

# One float32 matrix of scores would be 65536 x 65536 x 4 bytes = 17 GB.
MOST_MEGABYTES = 600

PROGRAM = """
import resource, torch, longstride as ls
length = 65_536
q, k, v = (torch.randn(1, 1, length, 16, requires_grad=True) for _ in range(3))
small = [x.detach()[:, :, :600].requires_grad_() for x in (q, k, v)]
ls.attention(*small, ls.Strided(256)).sum().backward()  # what PyTorch loads when first used is not the work's
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for text in ("Strided(256)", "Local(256) | Strided(256)", "Fixed(256, 8)", "LogSparse()", "Global(16)"):
    ls.attention(q, k, v, ls.parse(text)).square().sum().backward()
    assert all(bool(x.grad.isfinite().all()) and bool(x.grad.any()) for x in (q, k, v))
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, text)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts kilobytes on Linux only")
def test_forward_and_backward_of_65536_positions_stay_small():
    """A process of its own, so that its peak is this computation's."""
    paths = [str(Path(longstride.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 5
    for line in lines:
        megabytes, text = line.split(maxsplit=1)
        assert float(megabytes) < MOST_MEGABYTES, text
