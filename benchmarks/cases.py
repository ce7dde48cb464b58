"""The settings that the GPU benchmark times: S1 to S7, and the same two patterns over growing lengths."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import longstride as ls


@dataclass(frozen=True)
class Case:
    """One setting, and what is timed there.

    Attributes:
        patterns: ours, each with its peers.
        flex: those of them that FlexAttention is timed on.
        extrapolate_from: lengths at which dense attention is timed where `length` itself would take too long; the
            last one's time is scaled by the square of the lengths.
        scaling: one point of the series over lengths.
    """

    name: str
    batch: int
    heads: int
    length: int
    head_dim: int
    patterns: tuple[ls.Pattern, ...]
    flex: tuple[ls.Pattern, ...] = ()
    kv_heads: int = 0
    v_head_dim: int = 0
    causal: bool = True
    extrapolate_from: tuple[int, ...] = ()
    scaling: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "kv_heads", self.kv_heads or self.heads)
        object.__setattr__(self, "v_head_dim", self.v_head_dim or self.head_dim)

    @property
    def shape(self) -> str:
        heads = f"H{self.heads}" if self.heads == self.kv_heads else f"H{self.heads} KV{self.kv_heads}"
        dims = f"D{self.head_dim}" if self.head_dim == self.v_head_dim else f"D{self.head_dim}/{self.v_head_dim}"
        return f"B{self.batch} {heads} T{self.length} {dims}"

    @property
    def dense(self) -> ls.Pattern:
        """What dense attention allows here."""
        return ls.Causal() if self.causal else ls.Full()


@dataclass(frozen=True)
class Inputs:
    """q, k, v and the gradient of the output, [batch, heads, length, dim] each, contiguous, without gradients."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    grad_out: torch.Tensor

    @staticmethod
    def of(case: Case, device: str, dtype: torch.dtype) -> Inputs:
        generator = torch.Generator(device).manual_seed(case.length)
        q, kv = (case.batch, case.heads, case.length), (case.batch, case.kv_heads, case.length)
        shapes = ((*q, case.head_dim), (*kv, case.head_dim), (*kv, case.v_head_dim), (*q, case.v_head_dim))
        return Inputs(*(torch.randn(shape, device=device, dtype=dtype, generator=generator) for shape in shapes))


def _four(stride: int) -> tuple[ls.Pattern, ...]:
    local, strided = ls.Local(stride), ls.Strided(stride)
    return strided, local, local | strided, ls.Fixed(stride, stride // 4)


def _settings() -> tuple[Case, ...]:
    bigbird = ls.bigbird(64, window_blocks=3, global_blocks=1, random_blocks=3)
    return (
        Case("S1", 4, 8, 12288, 64, _four(128), flex=_four(128)),
        Case("S1w", 4, 8, 12288, 128, _four(128), flex=_four(128)),
        Case("S3", 1, 8, 65536, 64, _four(256), flex=_four(256)),
        Case("S2", 16, 2, 3072, 64, (ls.Strided(96),), flex=(ls.Strided(96),), v_head_dim=128),
        Case("S5", 1, 32, 32768, 128, (ls.Local(4096),), flex=(ls.Local(4096),), kv_heads=8),
        # Strided and the union touch every block of 128 x 128, so that FlexAttention would cost as much as dense.
        Case("S4", 1, 4, 1 << 20, 64, _four(1024)[:3], flex=(ls.Local(1024),), extrapolate_from=(65536, 262144)),
        Case("S6", 8, 12, 4096, 64, (bigbird,), flex=(bigbird,), causal=False),
        Case("S7", 1, 8, 65536, 64, (ls.LogSparse(),), flex=(ls.LogSparse(),)),
    )


def _lengths() -> tuple[Case, ...]:
    """Powers of two near sqrt(T) as the stride; as many tokens times heads as in S1, up to its length."""
    found = []
    for batch, heads, length, stride in (
        (96, 8, 512, 16),
        (48, 8, 1024, 32),
        (24, 8, 2048, 32),
        (12, 8, 4096, 64),
        (4, 8, 12288, 128),
        (1, 8, 65536, 256),
        (1, 4, 262144, 512),
        (1, 4, 1 << 20, 1024),
    ):
        strided, _, union, _ = _four(stride)
        flex = (union,) if length in (512, 1024, 4096, 12288) else ()
        far = (262144,) if length > 262144 else ()
        found.append(
            Case(
                f"T{length}",
                batch,
                heads,
                length,
                64,
                (strided, union),
                flex=flex,
                extrapolate_from=far,
                scaling=True,
            )
        )
    return tuple(found)


CASES: dict[str, Case] = {case.name: case for case in (*_settings(), *_lengths())}
SCALING = tuple(name for name, case in CASES.items() if case.scaling)
#: The host's time for a call, which is no case of its own.
OVERHEAD = "overhead"
#: In the order of a run: what a budget of time cuts off is at the end.
ORDER = ("S1", "S1w", "S3", OVERHEAD, "S2", "S5", *SCALING, "S4", "S6", "S7")


def chosen(text: str) -> tuple[str, ...]:
    """The names that ``--cases`` asks for, in the order of a run; ``scaling`` means every length."""
    names = set(ORDER) if text == "all" else set(text.split(","))
    if "scaling" in names:
        names = names - {"scaling"} | set(SCALING)
    if unknown := sorted(names - set(ORDER)):
        raise ValueError(f"unknown cases {', '.join(unknown)}: there are all, scaling, {', '.join(ORDER)}")
    return tuple(name for name in ORDER if name in names)
