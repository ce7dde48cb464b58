"""Sparse against dense attention on a CPU: ``python benchmarks/attention_cpu.py``."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import longstride as ls
from harness import Case, run


def case(length: int, stride: int) -> Case:
    local, strided = ls.Local(stride), ls.Strided(stride)
    return Case(1, 8, length, 64, (strided, local, local | strided, ls.Fixed(stride, 8)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "attention_cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cases = (case(1024, 32), case(4096, 64), case(16384, 128))
    run(cases, "cpu", torch.float32, 1e-5, options.rounds, options.output)


if __name__ == "__main__":
    main()
