"""The Markdown page, the plot and the short summary of a GPU result. None of it needs a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cases import CASES, ORDER
from figures import DENSE, OURS, PEER, figures

MEASURES = ("forward", "backward")


def render(result: dict, plot_name: str = "") -> str:
    """The Markdown page: the table of figures first, then how it was measured, then every case."""
    lines = [
        f"# Attention on {result['device']}",
        "",
        f"{result['dtype']}. What the kernels are held to, and what was measured:",
        "",
        "| figure | must | aim | measured | |",
        "|---|---|---|---|---|",
    ]
    for figure in figures(result):
        measured = ", ".join(str(reading) for reading in figure.readings)
        lines.append(f"| {_cell(figure.text)} | {figure.must} | {figure.aim} | {_cell(measured)} | {figure.state} |")
    lines += ["", *_method(result)]
    if plot_name:
        lines += ["", "## Time against length", "", f"![forward and backward, time against length]({plot_name})"]
    for name in ORDER:
        rows = [row for row in result["rows"] if row["case"] == name]
        if rows:
            lines += ["", *_case(name, rows)]
    if result.get("overhead"):
        lines += ["", *_overhead(result["overhead"])]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _method(result: dict) -> Iterator[str]:
    yield (
        "Times are the device's own: medians over rounds, all rows of a case in turn in each round, in brackets the "
        "least and greatest; the L2 cache is overwritten before each call. Backward is timed by itself, on a graph "
        "built before. The floor is the time of a copy of the same bytes: forward reads q, k, v and writes o; backward "
        "reads q, k, v, o, do and writes dq, dk, dv. TFLOP/s count allowed pairs alone: 2 (qk_dim + v_dim) a pair "
        "forward, 2.5 times that backward. A star marks a row whose kernels the host did not queue in time, so that "
        "its time holds gaps. The first calls are forward and backward with all that is compiled for them, less what "
        "an earlier case had compiled. FlexAttention is compiled with its default options; its block masks are made "
        "before, and its forward is timed with gradients on."
    )
    yield ""
    yield (
        "Before any time was taken, ours was compared with the float64 reference at a small ragged length and, at the "
        "full length, with random rows recomputed in float64; peers with ours, dense kernels with recomputed rows and "
        "with one another. The column of errors has the worst of outputs and gradients, relative."
    )
    for run in result["runs"]:
        yield ""
        yield (
            f"- {', '.join(run['cases'])}: torch {run['torch']}, triton {run['triton']}, CUDA {run['cuda']}, Python "
            f"{run['python']}, commit {run['commit']}, {run['rounds']} rounds, copy {run['copy_gbps']:,.0f} GB/s; "
            f"`{run['command']}`."
        )
        for name, reason in run.get("absent", {}).items():
            yield f"  {name} is not in this run: {reason}"


def _case(name: str, rows: list[dict]) -> Iterator[str]:
    yield f"## {name}: {rows[0]['shape']}"
    yield ""
    yield (
        "| pattern | kernel | forward, ms | / floor | TFLOP/s | GB/s | backward, ms | / floor | TFLOP/s | GB/s "
        "| fwd+bwd, ms | error |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|"
    for row in sorted(rows, key=_rank):
        if "forward" not in row:
            continue
        cells = [row["pattern"], _what(row)]
        for measure in MEASURES:
            timed = row[measure]
            cells += [_ms(row, measure), f"{timed['share']:.2f}", f"{timed['tflops']:.0f}", f"{timed['gbps']:,.0f}"]
        cells += [_ms(row, "both"), f"{max(row['errors'].values()):.1e}" if row["errors"] else ""]
        yield f"| {' | '.join(_cell(cell) for cell in cells)} |"
    if any(row["kind"] == OURS and "forward" in row for row in rows):
        yield ""
        yield "| ours | backend | times best dense, fwd / bwd / both | times best peer | first call fwd / bwd, s |"
        yield "|---|---|---|---|---|"
        for row in rows:
            if row["kind"] == OURS and "forward" in row:
                cells = [row["pattern"], str(row["backend"]), _times(row, "vs_dense"), _times(row, "vs_peer")]
                firsts = (row[key] for key in ("first_call_s", "first_backward_s") if key in row)
                cells.append(" / ".join(f"{seconds:.1f}" for seconds in firsts))
                yield f"| {' | '.join(_cell(cell) for cell in cells)} |"
    notes = [f"- {_cell(row['pattern'])}, {_what(row)}: {row['reason']}" for row in rows if row.get("reason")]
    notes += [_extrapolation(row) for row in rows if row.get("extrapolated_from")]
    if notes:
        yield ""
        yield from notes


def _rank(row: dict) -> tuple[int, str, int]:
    """Dense first, then pattern by pattern, ours before its peers; otherwise in the order of the run."""
    return (row["kind"] != DENSE, row["pattern"], row["kind"] != OURS)


def _what(row: dict) -> str:
    what = f"**Longstride** ({row['backend']})" if row["kind"] == OURS else row["what"]
    return f"{what}, extrapolated" if row.get("extrapolated_from") else what


def _ms(row: dict, measure: str) -> str:
    timed = row[measure]
    star = "*" if timed["queued_late"] else ""
    return f"{_digits(timed['ms'])}{star} ({_digits(timed['low'])} to {_digits(timed['high'])})"


def _digits(ms: float) -> str:
    return f"{ms:,.0f}" if ms >= 1000 else f"{ms:.1f}" if ms >= 100 else f"{ms:.2f}" if ms >= 10 else f"{ms:.3f}"


def _times(row: dict, key: str) -> str:
    found = row.get(key, {})
    if not found:
        return "none"
    ratios = " / ".join(f"{found[m]['times']:.2f}x" if m in found else "-" for m in (*MEASURES, "both"))
    names = dict.fromkeys(found[m]["what"] for m in found)
    return f"{ratios} ({', '.join(names)})"


def _extrapolation(row: dict) -> str:
    measured = "; ".join(
        f"T = {int(length):,}: {_digits(at['forward'])} / {_digits(at['backward'])} ms"
        for length, at in row["measured"].items()
    )
    return f"- {row['what']}: scaled by the square of the length from T = {row['extrapolated_from']:,}; {measured}."


def _overhead(overhead: dict) -> Iterator[str]:
    yield "## The host's time for a call"
    yield ""
    yield (
        "Plan and launch, warm: 200 calls one after another without waiting, B1 H1 T256 D64, Strided(16); beside it "
        "dense `scaled_dot_product_attention` (flash), and an `autograd.Function` that allocates its results and does "
        "nothing else. Backward through `torch.autograd.grad`, of which the figure above takes what is ours: less what "
        "the function that does nothing takes."
    )
    yield ""
    yield "| call | microseconds | spread |"
    yield "|---|---|---|"
    for name, timed in overhead.items():
        yield f"| {name} | {timed['us']:.1f} | {timed['low']:.1f} to {timed['high']:.1f} |"


# ---- the plot -----------------------------------------------------------------------------------------------------


def series(rows: list[dict]) -> dict[str, list[tuple[int, float, bool]]]:
    """What the plot draws: by kernel, (length, microseconds a sequence and head, extrapolated), ascending."""
    found: dict[str, list[tuple[int, float, bool]]] = {}
    for name, case in CASES.items():
        if not case.scaling:
            continue
        timed = [row for row in rows if row["case"] == name and "both" in row]
        best: dict[str, dict] = {}
        for row in timed:
            label = {
                OURS: "Longstride, Local | Strided" if " | " in row["pattern"] else "Longstride, Strided",
                DENSE: "dense, the best kernel",
                PEER: "FlexAttention, Local | Strided" if row["what"] == "FlexAttention" else "",
            }[row["kind"]]
            if label and (label not in best or row["both"]["ms"] < best[label]["both"]["ms"]):
                best[label] = row
        for label, row in best.items():
            us = row["both"]["ms"] * 1e3 / (case.batch * case.heads)
            found.setdefault(label, []).append((case.length, us, bool(row.get("extrapolated_from"))))
    return found


def plot(result: dict, path: Path) -> bool:
    """A log-log PNG of forward and backward against length; False where there is nothing to draw it from."""
    lines = series(result["rows"])
    if not lines:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    styles = {
        "dense, the best kernel": ("#444444", "o"),
        "FlexAttention, Local | Strided": ("#c1570b", "s"),
        "Longstride, Local | Strided": ("#1b7837", "^"),
        "Longstride, Strided": ("#2166ac", "D"),
    }
    figure, axes = pyplot.subplots(figsize=(8, 5.2), dpi=150)
    for label, (colour, marker) in styles.items():
        points = lines.get(label, [])
        if not points:
            continue
        lengths, times, far = zip(*points, strict=True)
        measured = [index for index, extrapolated in enumerate(far) if not extrapolated]
        axes.plot(
            [lengths[i] for i in measured], [times[i] for i in measured], color=colour, marker=marker, label=label
        )
        for i in range(1, len(points)):
            if far[i]:
                ends = slice(i - 1, i + 1)
                style = {"linestyle": "--", "marker": marker, "markerfacecolor": "white", "markevery": [1]}
                axes.plot(lengths[ends], times[ends], color=colour, label=f"{label}, extrapolated", **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({length for points in lines.values() for length, _, _ in points})
    axes.set_xticks(ticks, [f"{tick // 1024 // 1024}M" if tick >= 1 << 20 else _kilo(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("length T, tokens (stride and window near the square root of T)")
    axes.set_ylabel("forward + backward, µs a sequence and head")
    axes.set_title(f"Exact attention, head dim 64, {result['dtype']}, {result['device']}", fontsize=11)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
    return True


def _kilo(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


# ---- the terminal -------------------------------------------------------------------------------------------------


def summary(result: dict) -> list[str]:
    """At most 60 lines for the end of a run: ours against the floor, the best dense kernel and the best peer."""
    lines = [
        f"{'case':8} {'ours':26} {'backend':8} {'fwd ms':>8} {'/floor':>6} {'peer':>6} {'dense':>7}"
        f" {'bwd ms':>8} {'/floor':>6} {'peer':>6} {'dense':>7}"
    ]
    for name in ORDER:
        for row in result["rows"]:
            if row["case"] != name or row["kind"] != OURS:
                continue
            head = f"{name:8} {row['pattern'][:26]:26} {row['backend'] or '-':8}"
            if "forward" not in row:
                lines.append(f"{head} {row['reason'][:70]}")
                continue
            for measure in MEASURES:
                timed = row[measure]
                versus = [row.get(key, {}).get(measure, {}).get("times") for key in ("vs_peer", "vs_dense")]
                peer, dense = (f"{times:.2f}x" if times else "-" for times in versus)
                head += f" {_digits(timed['ms']):>8} {timed['share']:6.2f} {peer:>6} {dense:>7}"
            lines.append(head)
    lines.append("")
    for figure in figures(result):
        measured = ", ".join(str(reading) for reading in figure.readings)
        lines.append(f"{figure.state.split(':')[0]:12} {figure.text[:58]:58} {measured[:90]}")
    return lines[:60]
