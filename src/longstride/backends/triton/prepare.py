"""What is prepared once for a pattern and shapes: launches in order, each with a tile shape and its constants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch

from longstride.backends.triton import lowering, tuning
from longstride.backends.triton.backward_kernels import backward_both, backward_kv, backward_q
from longstride.backends.triton.cell_kernel import backward_cell, forward_cell
from longstride.backends.triton.forward_kernel import forward
from longstride.backends.triton.lowering import Launch
from longstride.backends.triton.sources import BLOCKS, LANES, Source
from longstride.backends.triton.tuning import CellShape, Shape
from longstride.patterns import Pattern
from longstride.plan import plan


@dataclass
class Job:
    """One launch, ready but for its tensors: `tiles` tiles for each of `heads` heads (of keys where keys own).

    Attributes:
        settings: the kernel's compile-time constants, less `flags`; options: how it is compiled.
        compiled: what was compiled, by everything that a call can change and the compiler looks at.
    """

    kernel: Any
    spots: tuple[int, ...]
    tiles: int
    head: int
    heads: int
    readers: int
    settings: dict[str, Any]
    options: dict[str, Any]
    compiled: dict[tuple, tuple[Any, tuple]] = field(default_factory=dict)

    def _grid(self, batch: int) -> tuple[int, int, int]:
        if self.settings.get("HEADS_FIRST"):
            return self.heads, self.tiles, batch
        return self.tiles, self.heads, batch

    def compile(self, batch: int, arguments: tuple, flags: Callable[[], dict[str, Any]]) -> None:
        """Compile for these arguments, and do not launch."""
        grid = self._grid(batch)
        self.kernel.warmup(*arguments, grid=grid, **(flags() | self.settings), **self.options)

    def run(self, batch: int, key: tuple, arguments: tuple, flags: Callable[[], dict[str, Any]]) -> None:
        """Launch on tensors and numbers in the kernel's order; `flags`, which `key` determines, are the last constants.

        Triton looks at every argument of every call to find what to launch, which takes several times as long as the
        launch; here `key` finds it. It holds what the compiler specialises on: strides, alignment, flags.
        """
        grid = self._grid(batch)
        found = self.compiled.get(key)
        if found is not None:
            kernel, constants = found
            kernel[grid](*arguments, *constants)
            return
        known = flags() | self.settings
        kernel = self.kernel[grid](*arguments, **known, **self.options)
        if kernel is not None:  # the interpreter compiles nothing
            self.compiled[key] = (kernel, tuple(known[name] for name in self.kernel.arg_names[len(arguments) :]))


#: Programs along the second and the third dimension of a grid.
MOST_IN_GRID = 65535


@dataclass(frozen=True)
class Prepared:
    """The jobs of a pattern at given shapes.

    Attributes:
        lists: int32 on the device.
        filled: the forward has rows that no job writes: out is filled before. grads_filled: (grad_q, grad_kv) likewise.
        delta: some backward job makes delta; else it is to be made before.
        alone: the only backward job makes delta for itself, and leaves it nowhere.
    """

    lists: torch.Tensor
    forward: tuple[Job, ...]
    filled: bool
    backward: tuple[tuple[str, Job], ...]
    grads_filled: tuple[bool, bool]
    delta: bool
    alone: bool


@dataclass(frozen=True)
class Shapes:
    """What a preparation depends on besides the pattern."""

    q_len: int
    kv_len: int
    heads: int
    kv_heads: int
    dim: int
    v_dim: int
    dtype: torch.dtype
    device: torch.device
    tf32: bool
    varlen: bool = False


@lru_cache(maxsize=512)
def prepare_batched(
    pattern: Pattern,
    q_shape: torch.Size,
    k_shape: torch.Size,
    v_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    tf32: bool,
) -> Prepared:
    """`prepare` for a call on [batch, heads, length, dim]; one look-up, for what it is called with as it is."""
    shapes = Shapes(q_shape[2], k_shape[2], q_shape[1], k_shape[1], q_shape[3], v_dim, dtype, device, tf32)
    return prepare(pattern, shapes)


@lru_cache(maxsize=512)
def prepare(pattern: Pattern, shapes: Shapes) -> Prepared:
    """Lower the pattern's plan and choose tile shapes."""
    made = plan(pattern, shapes.q_len, shapes.kv_len, shapes.heads)
    low = lowering.lowered(made, shapes.kv_heads)
    family = tuning.family(shapes.device)
    width = max(padded(shapes.dim), padded(shapes.v_dim))
    share = shapes.heads // shapes.kv_heads

    ahead = []
    adds, filled = _order(low.queries, _q_heads, shapes.heads)
    for launch, add in zip(low.queries, adds, strict=True):
        fits = tuning.cell_shape("forward_cell", family, shapes.dtype, width, launch.cell)
        if fits is not None and 2 * shapes.q_len > shapes.kv_len:
            ahead.append(_cell_job(forward_cell, launch, shapes, fits, True, MERGE=add))
        else:
            shape = tuning.shape("forward", family, shapes.dtype, width, launch.span)
            ahead.append(_job(forward, launch, shapes, shape, True, MERGE=add))

    # Launches that write all three gradients at once: closed cells, and tiles whose two halves share what they read.
    cells: dict[int, tuple[Launch, CellShape | Shape]] = {}
    for index, launch in enumerate(low.keys):
        twin = next((x for x in low.queries if x.head == launch.head and x.parts == launch.parts), None)
        if twin is None:
            continue
        one_reader = launch.heads == len(_kv_heads(launch, share))
        cell = tuning.cell_shape("backward_cell", family, shapes.dtype, width, launch.cell)
        both = tuning.both_shape(family, shapes.dtype, width, launch.span)
        if cell is not None and (not cell.b or one_reader):
            cells[index] = (twin, cell)
        elif both is not None and one_reader and launch.owner == twin.owner == LANES and shapes.q_len == shapes.kv_len:
            cells[index] = (twin, both)
    in_cells = {id(twin) for twin, _ in cells.values()}
    q_side = sorted(low.queries, key=lambda launch: not launch.whole)
    q_adds, q_filled = _order(q_side, _q_heads, shapes.heads)
    q_add = {id(launch): add for launch, add in zip(q_side, q_adds, strict=True)}
    kv_adds, kv_filled = _order(low.keys, lambda launch: _kv_heads(launch, share), shapes.kv_heads)
    # One that stores grad_q comes before those that add to it, and must then find something to add its other two to.
    if any(kv_adds[index] and not q_add[id(twin)] for index, (twin, _) in cells.items()):
        kv_adds, kv_filled = [True] * len(low.keys), True
    needs_later: list[tuple[str, Job]] = []
    # delta is made by the first job that goes over the queries of a head, and read by the later ones.
    makes = {id(launch): not add and launch.whole for launch, add in zip(q_side, q_adds, strict=True)}
    # Pairs of halves both need it before: then it is made by a launch of its own.
    delta = not q_filled and all(isinstance(fits, CellShape) for _, fits in cells.values())
    for launch in q_side:
        if id(launch) in in_cells:
            continue
        shape = tuning.shape("backward_q", family, shapes.dtype, width, launch.span)
        job = _job(
            backward_q, launch, shapes, shape, True,
            ADD=q_add[id(launch)], MAKE_DELTA=delta and makes[id(launch)], KEEP_DELTA=True,
        )  # fmt: skip
        needs_later.append(("q", job))
    cell_jobs, kv_jobs = [], []
    for index, (launch, add) in enumerate(zip(low.keys, kv_adds, strict=True)):
        if index in cells:
            twin, fits = cells[index]
            make = delta and makes[id(twin)]
            adds = {"ADD_Q": q_add[id(twin)], "ADD_KV": add}
            if isinstance(fits, CellShape):
                job = _cell_job(backward_cell, launch, shapes, fits, False, MAKE_DELTA=make, KEEP_DELTA=True, **adds)
            else:
                job = _both_job(launch, shapes, fits, **adds)
            (cell_jobs if make else kv_jobs).append(("cell", job))
        else:
            shape = tuning.shape("backward_kv", family, shapes.dtype, width, launch.span)
            job = _job(backward_kv, launch, shapes, shape, False, ADD=add, MAKE_DELTA=False)
            kv_jobs.append(("kv", job))
    backward = _sorted_jobs(kv_filled, cell_jobs, needs_later, kv_jobs)
    alone = len(backward) == 1 and backward[0][1].settings.get("MAKE_DELTA", False)
    if alone:
        backward[0][1].settings["KEEP_DELTA"] = False
    lists = low.lists.to(shapes.device)
    return Prepared(lists, tuple(ahead), filled, backward, (q_filled, kv_filled), delta, alone)


def forget() -> None:
    """Prepare anew at the next call, as after a change of `tuning`."""
    prepare.cache_clear()
    prepare_batched.cache_clear()


def _sorted_jobs(kv_filled: bool, *groups: list[tuple[str, Job]]) -> tuple[tuple[str, Job], ...]:
    """Jobs that make delta before those that read it; jobs that store before those that add to what they stored."""
    jobs = [job for group in groups for job in group]

    def rank(item: tuple[str, Job]) -> tuple[bool, bool]:
        settings = item[1].settings
        adds = settings.get("ADD", settings.get("ADD_Q", False) or (settings.get("ADD_KV", False) and not kv_filled))
        return (not settings.get("MAKE_DELTA", False), adds)

    return tuple(sorted(jobs, key=rank))


def _order(
    launches: tuple[Launch, ...] | list[Launch], touched: Callable[[Launch], range], heads: int
) -> tuple[list[bool], bool]:
    """For each launch in turn whether it adds to what is there; and whether the result must be filled before.

    It must where a launch comes first that does not go over every row, and where no launch comes at all: a head
    without a pair.
    """
    seen: set[int] = set()
    adds = []
    for launch in launches:
        mine = set(touched(launch))
        if not mine <= seen and (not launch.whole or seen & mine):
            return [True] * len(launches), True
        adds.append(bool(seen & mine))
        seen |= mine
    return adds, len(seen) < heads


def _q_heads(launch: Launch) -> range:
    return range(launch.head, launch.head + launch.heads)


def _kv_heads(launch: Launch, share: int) -> range:
    return range(launch.head // share, launch.head // share + max(1, launch.heads // share))


def padded(dim: int) -> int:
    return max(16, 1 << (dim - 1).bit_length())


def _joined(source: Source, span: int) -> Source:
    """Short windows are run in one loop: three, of a tile or two each, would each wait for their first loads."""
    return replace(source, split=source.split and span >= tuning.LONG)


def _settings(launch: Launch, shapes: Shapes) -> dict[str, Any]:
    return {
        "numbers": launch.numbers,
        "OWNER_INDEX": launch.owner_index,
        "SOURCES": ";".join(str(_joined(source, launch.span)) for source in launch.sources),
        "VARLEN": shapes.varlen,
        "DIM": shapes.dim,
        "V_DIM": shapes.v_dim,
        "DIM_PAD": padded(shapes.dim),
        "V_DIM_PAD": padded(shapes.v_dim),
        "PRECISION": "tf32" if shapes.tf32 else "ieee",
    }


def _job(kernel: Any, launch: Launch, shapes: Shapes, shape: Shape, queries_own: bool, **settings: Any) -> Job:
    length = shapes.q_len if queries_own else shapes.kv_len
    own, other, pack = shape.own, shape.other, 1
    if launch.owner == LANES and launch.step > 1:
        lanes, rows = min(launch.step, length), -(-length // launch.step)
        fit = 1 << (rows - 1).bit_length()
        pack = max(1, min(own // fit, other, 1 << (lanes - 1).bit_length()))
        own = max(16, min(own, fit * pack))
        tiles = -(-lanes // pack) * -(-rows // (own // pack))
    elif launch.owner == LANES:
        own = max(16, min(own, 1 << (length - 1).bit_length()))
        tiles = -(-length // own)
    elif launch.owner == BLOCKS:
        own = max(16, min(own, 1 << (launch.block - 1).bit_length()))
        first = (shapes.kv_len - length) // launch.block
        tiles = (-(-shapes.kv_len // launch.block) - first) * -(-launch.block // own)
    else:
        own = max(16, min(own, 1 << (launch.columns - 1).bit_length()))
        tiles = -(-launch.columns // own)
    if launch.block:
        other = max(16, min(other, 1 << (launch.block - 1).bit_length()))
    if not queries_own:
        other = tuning.beside_keys(own, other)
    share = shapes.heads // shapes.kv_heads
    heads = launch.heads if queries_own else len(_kv_heads(launch, share))
    blocks = {"BLOCK_Q": own, "BLOCK_KV": other} if queries_own else {"BLOCK_KV": own, "BLOCK_Q": other}
    return Job(
        kernel,
        launch.spots,
        tiles,
        launch.head,
        heads,
        launch.heads // heads,
        {
            **_settings(launch, shapes),
            **settings,
            **blocks,
            "OWNER": launch.owner,
            "STEP": launch.step,
            "PACK": pack,
            "STAGES": shape.stages,
            # The longest tiles of all heads, then the next: at the end, no head has long ones left to do by itself.
            "HEADS_FIRST": launch.grows and 2 * tiles <= MOST_IN_GRID,
        },
        {"num_warps": shape.warps, "maxnreg": shape.registers or None},
    )


def _both_job(launch: Launch, shapes: Shapes, shape: Shape, **settings: Any) -> Job:
    job = _job(backward_both, launch, shapes, shape, False, **settings)
    own, other = job.settings.pop("BLOCK_KV"), job.settings.pop("BLOCK_Q")
    job.settings |= {"BLOCK": own, "BLOCK_KV": other, "BLOCK_Q": other}
    job.tiles *= 2  # one program of either half
    return job


def _cell_job(kernel: Any, launch: Launch, shapes: Shapes, shape: CellShape, queries_own: bool, **settings: Any) -> Job:
    classes = launch.parts[0].kind == "Band"
    pack = 1
    if classes:
        if not shape.b:
            pack = max(1, shape.a // (1 << (launch.cell - 1).bit_length()))
        tiles = -(-min(launch.step, shapes.kv_len) // pack)
    else:
        per_tile = (shape.a + shape.b) // launch.cell * launch.cell
        tiles = -(-shapes.kv_len // per_tile)
    heads = launch.heads if queries_own else len(_kv_heads(launch, shapes.heads // shapes.kv_heads))
    source = launch.sources[0]
    band = launch.parts[0].term.band
    return Job(
        kernel,
        launch.spots,
        tiles,
        launch.head,
        heads,
        launch.heads // heads,
        {
            **_settings(launch, shapes),
            **settings,
            "OWNER_INDEX": launch.owner_index if classes else source.index + 3,
            "CLASSES": classes,
            "CAUSAL": band is not None and band.lo is not None and band.lo >= 0,
            "BLOCK_A": shape.a,
            "BLOCK_B": shape.b,
            "PACK": pack,
        },
        {"num_warps": shape.warps, "maxnreg": shape.registers or None},
    )
