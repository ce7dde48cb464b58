"""``longstride sample``: text from a model, shown while it is drawn; of other data, files to open."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from longstride.data import PreparedData
    from longstride.models import SparseTransformerForCausalLM
    from longstride.training import RunFolder


def sample(
    run: Annotated[Path, typer.Argument(help="The output folder of `longstride train`, or a saved model's folder.")],
    prompt: Annotated[
        str, typer.Option(help="Text to continue; without it the sample starts as a new line does.")
    ] = "",
    length: Annotated[int, typer.Option(help="Bytes to add.")] = 400,
    temperature: Annotated[
        float, typer.Option(help="Below 1 safer, above 1 wilder; 0 takes the likeliest byte each time.")
    ] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest bytes only.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the fewest bytes whose probabilities sum to p.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same sample.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
) -> None:
    """Let a model write, from a prompt or from nothing.

    The text appears as it is drawn, after the prompt. When prompt and sample are longer than the model's context, the
    model goes on from the latest bytes that fit, which is slower. At the end, how fast it was and what its cache took
    go to the standard error.

    A model of images, sound, music or tables finishes windows of its test split instead: their last --length tokens are
    drawn, and the results lie in the run's folder, as after training.
    """
    from time import perf_counter

    import torch

    from longstride.cli.saved import load_model
    from longstride.data import PreparedData
    from longstride.errors import ArgumentError
    from longstride.generation import as_text, cache_for, sample_bytes
    from longstride.training import RunFolder, resolve_device

    if not 0 <= seed < 2**63:
        raise ArgumentError(f"--seed {seed}: it must be from 0 to 2^63 - 1")
    model = load_model(run, resolve_device(device))
    folder = RunFolder(run)
    data = PreparedData.open(folder.data) if folder.data.exists() else None
    if data is not None and data.decoded_as is not None:
        if prompt:
            raise ArgumentError(
                f"--prompt {prompt!r}: {run} is of {data.decoded_as.name}, and goes on from windows of its test split; "
                "leave --prompt out"
            )
        options = {"length_bytes": length, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        _finish_windows(folder, data, model, options, seed)
        return
    if model.config.vocab_size != 256:
        raise ArgumentError(
            f"the model in {run} knows {model.config.vocab_size} tokens, which are no bytes: name the folder of its "
            "training, which says what they are"
        )
    # A terminal may hand over bytes that are not UTF-8; they are bytes like any others here.
    given = prompt.encode(errors="surrogateescape")
    cache = cache_for(model, given, max(0, length))
    pieces = sample_bytes(
        model,
        given,
        length,
        generator=torch.Generator().manual_seed(seed),
        cache=cache,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
    times: list[float] = []

    def timed() -> Iterator[bytes]:
        for piece in pieces:
            times.append(perf_counter())
            yield piece

    typer.echo(prompt, nl=False)
    for text in as_text(timed()):
        typer.echo(text, nl=False)
    typer.echo()
    taken = f"the cache of keys and values took {cache.nbytes:,} bytes"
    if len(times) > 1:
        # The first byte also costs the prompt.
        taken = f"{(len(times) - 1) / (times[-1] - times[0]):,.0f} tokens/s after the first; {taken}"
    typer.echo(taken, err=True)


def _finish_windows(
    folder: "RunFolder", data: "PreparedData", model: "SparseTransformerForCausalLM", options: dict, seed: int
) -> None:
    """Write files of the run's kind of data, with the settings of the command line."""
    from longstride.cli.continuations import write_continuations

    recipe = folder.started_with()
    sample = dataclasses.replace(recipe.sample, **options)
    recipe = dataclasses.replace(recipe, sample=sample, run=dataclasses.replace(recipe.run, seed=seed))
    write_continuations(recipe, data, folder.sample_files, model, typer.echo)
    typer.echo(f"They lie in {folder.sample_files}.")
