"""What is checked: a causal language model, how it reads text, and how far it looks back."""

import codecs
import inspect
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from longstride.errors import ArgumentError, DataError, UnsupportedError

# One of these lies in every folder that a tokenizer was saved into.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)

# How many tokens show whether a model looks ahead.
PROBE_TOKENS = 8


@dataclass(frozen=True, eq=False)
class Subject:
    """A causal language model and its reading of text.

    Args:
        model: any causal language model in the Hugging Face conventions, such as a `SparseTransformerForCausalLM`.
        tokenizer: makes tokens of text; None where a token is a byte.
        context: the most tokens that a prediction may look back over; None where the model sets no bound.
    """

    model: Any
    tokenizer: Any
    context: int | None

    @property
    def unit(self) -> str:
        """What a token is called."""
        return "byte" if self.tokenizer is None else "token"

    @property
    def num_layers(self) -> int:
        return self.model.config.get_text_config().num_hidden_layers

    @property
    def num_heads(self) -> int:
        """Query heads of a layer; UnsupportedError where there are none, or layers differ in them."""
        heads = getattr(self.model.config.get_text_config(), "num_attention_heads", None)
        if not isinstance(heads, int):
            raise UnsupportedError(
                f"{type(self.model).__name__} has no number of attention heads (num_attention_heads={heads}), so that "
                "there is nothing that a pattern could be for"
            )
        return heads

    @property
    def vocab_size(self) -> int:
        return self.model.config.get_text_config().vocab_size

    def encode(self, text: bytes | np.ndarray) -> np.ndarray:
        """The tokens of a text, integers [tokens]; uint8 where they are its bytes. Nothing is put before it.

        Args:
            text: bytes, or uint8[bytes].

        Raises:
            ArgumentError: the model has no tokenizer, and knows too few tokens for bytes; or its tokenizer has tokens
                that the model does not know.
            DataError: the model has a tokenizer, and the text is not UTF-8, or not of what the tokenizer knows.
        """
        if self.tokenizer is None:
            if self.vocab_size < 256:
                raise ArgumentError(
                    f"the model knows {self.vocab_size} tokens, which are no bytes, and has no tokenizer: save its "
                    "tokenizer into its folder"
                )
            return np.frombuffer(text, dtype=np.uint8)
        try:
            # A text that was cut to a number of bytes may end inside a character.
            characters = codecs.getincrementaldecoder("utf-8")().decode(bytes(text), final=False)
        except UnicodeDecodeError as error:
            raise DataError(
                f"byte {error.start:,} of the text is not UTF-8, which the model's tokenizer reads: give plain text"
            ) from error
        # A text longer than the context is what is wanted here, and no reason to warn.
        try:
            listed = self.tokenizer(characters, add_special_tokens=False, verbose=False)["input_ids"]
        except Exception as error:  # the fast tokenizers raise nothing narrower
            raise DataError(f"the model's tokenizer cannot read the text: {_first_line(error)}") from error
        tokens = np.asarray(listed, dtype=np.int32)
        if tokens.size and tokens.max() >= self.vocab_size:
            raise ArgumentError(
                f"the tokenizer makes token {tokens.max()} of the text, and the model knows {self.vocab_size}: the "
                "tokenizer in the folder is another model's; save the model's own there"
            )
        return tokens

    def predictor(self) -> "Predictor":
        """The model as a map from the tokens of a text to logits."""
        return Predictor(self.model, () if self.tokenizer is None else _first_tokens(self.tokenizer))


class Predictor(nn.Module):
    """int64[batch, length] to ``.logits`` float[batch, length or logits_to_keep, vocabulary]: what follows each token.

    Args:
        model: a causal language model.
        start: tokens that the tokenizer puts before every text, such as one that marks its beginning; a model that
            always saw them expects them, and no prediction of theirs comes back.
    """

    def __init__(self, model: nn.Module, start: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.model = model
        self.start = start
        # A module begins in training mode, and whoever puts this one back into its mode puts the model there too.
        self.training = model.training
        self.can_keep = "logits_to_keep" in inspect.signature(model.forward).parameters

    def forward(self, input_ids: torch.Tensor, logits_to_keep: int = 0) -> SimpleNamespace:
        """Logits behind every token, or behind the last ``logits_to_keep`` alone."""
        if self.start:
            start = torch.tensor(self.start, device=input_ids.device).expand(len(input_ids), -1)
            input_ids = torch.cat((start, input_ids), dim=1)
        kept = logits_to_keep or input_ids.shape[1] - len(self.start)
        # With a large vocabulary the logits of all tokens are the largest tensor of all.
        keep = {"logits_to_keep": kept} if self.can_keep else {}
        return SimpleNamespace(logits=self.model(input_ids=input_ids, use_cache=False, **keep).logits[:, -kept:])


def load_subject(folder: Path, device: torch.device) -> Subject:
    """The model in a folder, and its tokenizer where the folder has one.

    Args:
        folder: a run, a checkpoint, or a saved causal language model of any architecture that transformers knows. No
            code that lies in it is run, and nothing is downloaded.

    Raises:
        ArgumentError: there is no model, it cannot be read, or it is no causal language model.
        CheckpointError: there are only damaged checkpoints.
    """
    from longstride.training import find_model

    found = find_model(folder)
    model = load_causal_lm(found, device)
    tokenizer = _load_tokenizer(found)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    _check_causal(model, found, context)
    if context is not None:
        context -= getattr(model.config, "memory", 0)  # a segment's tokens are what is left
    if context is not None and tokenizer is not None:
        context -= len(_first_tokens(tokenizer))
    return Subject(model, tokenizer, context)


def load_causal_lm(folder: Path, device: torch.device) -> Any:
    """The causal language model that ``save_pretrained`` wrote into a folder, in evaluation mode.

    Raises:
        ArgumentError: it cannot be read.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    # Both make themselves known to transformers: Sparse Transformers, and models that were sparsified and saved.
    import longstride.integrations.transformers
    import longstride.models  # noqa: F401

    # Reading a few small files needs no bar.
    logging.disable_progress_bar()
    try:
        # Unless told so, transformers asks whether to run the folder's code, and runs it if the answer is yes.
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return model.to(device).eval()
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ArgumentError(f"the model in {folder} cannot be read: {_first_line(error)}") from error


def _load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder; None where there is none."""
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ArgumentError(f"the tokenizer in {folder} cannot be read: {_first_line(error)}") from error


@torch.no_grad()
def _check_causal(model: Any, folder: Path, context: int | None) -> None:
    """A model that sees what it is to predict would look perfect: its figures would mean nothing."""
    length = PROBE_TOKENS if context is None else min(PROBE_TOKENS, context)
    if length < 2:
        return  # there is nothing later
    tokens = torch.arange(length, device=next(model.parameters()).device).expand(2, -1).clone()
    tokens[1, -1] += 1
    tokens %= model.config.get_text_config().vocab_size
    logits = Predictor(model)(tokens).logits[:, :-1]
    rounding = 8 * torch.finfo(logits.dtype).eps * logits.abs().max()
    if (logits[0] - logits[1]).abs().max() > rounding:
        raise ArgumentError(
            f"the model in {folder} is no causal language model: what it predicts depends on later tokens"
        )


def _first_tokens(tokenizer: Any) -> tuple[int, ...]:
    """What a tokenizer puts before every text, and not what it may put behind it."""
    # A tokenizer of few tokens may make nothing of a letter; of its own tokens there is one that it reads. Those that
    # mark something may be what it puts there.
    marks = set(tokenizer.all_special_ids)
    for text in ("a", *tokenizer.get_vocab()):
        try:
            whole, bare = (tokenizer(text, add_special_tokens=special)["input_ids"] for special in (True, False))
        except Exception:  # as above: this one knows no such letter
            continue
        for place in range(len(whole)):
            if bare and not marks & set(bare) and whole[place : place + len(bare)] == bare:
                return tuple(whole[:place])
    return ()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
