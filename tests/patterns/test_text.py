"""`str` and `parse`: a pattern as text in a configuration or on a command line."""

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.strategies import ATOMS, Thirds, patterns

import longstride as ls


@settings(max_examples=200)
@given(patterns())
def test_parse_reads_what_str_writes(pattern):
    read = ls.parse(str(pattern), pattern.tables())
    assert read == pattern
    assert hash(read) == hash(pattern)
    assert str(read) == str(pattern)
    assert repr(read) == str(read)


@pytest.mark.parametrize("pattern", ATOMS, ids=str)
def test_parse_reads_every_atom(pattern):
    assert ls.parse(str(pattern), pattern.tables()) == pattern


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("Local(128) | Strided(128)", ls.Local(128) | ls.Strided(128)),
        ("Local(128)|Strided(128)", ls.Local(128) | ls.Strided(128)),
        ("  Local ( window = 128 )\n|\tStrided( stride=128, causal = False )", ls.Local(128) | ls.Strided(128, False)),
        ("Local(3) | Strided(4) & BlockLocal(8)", ls.Local(3) | (ls.Strided(4) & ls.BlockLocal(8))),
        ("(Local(3) | Strided(4)) & BlockLocal(8)", (ls.Local(3) | ls.Strided(4)) & ls.BlockLocal(8)),
        ("((Local(3)))", ls.Local(3)),
        ("Local(4, lookahead=3)", ls.Local(4, 3)),
        ("Local(lookahead=3, window=4)", ls.Local(4, 3)),
        ("Global((2, 7, 11))", ls.Global((2, 7, 11))),
        ("Global((2,))", ls.Global((2,))),
        ("Global((11, 2, 2))", ls.Global((2, 11))),
        ("per_head(Local(3), Fixed(8, 2) | Global(1))", ls.per_head(ls.Local(3), ls.Fixed(8, 2) | ls.Global(1))),
        ("per_head(Local(3)) & Causal()", ls.per_head(ls.Local(3)) & ls.Causal()),
        ("Thirds()", Thirds()),
        ("Thirds(shared=7)", Thirds(7)),
    ],
)
def test_texts_and_what_they_mean(text, pattern):
    assert ls.parse(text) == pattern


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (ls.Local(128), "Local(128)"),
        (ls.Local(4, lookahead=3), "Local(4, lookahead=3)"),
        (ls.Strided(4, causal=False), "Strided(4, causal=False)"),
        (ls.Local(3) | ls.Strided(4) & ls.Causal(), "Local(3) | Strided(4) & Causal()"),
        ((ls.Local(3) | ls.Strided(4)) & ls.Causal(), "(Local(3) | Strided(4)) & Causal()"),
        (ls.per_head(ls.Local(3), ls.Strided(4)), "per_head(Local(3), Strided(4))"),
    ],
)
def test_the_text_of_a_pattern_is_how_one_would_write_it(pattern, text):
    assert str(pattern) == text


@pytest.mark.parametrize(
    ("text", "position", "words"),
    [
        ("", 0, ["expected a pattern", "the end"]),
        ("Locl(3)", 0, ["unknown pattern 'Locl'", "did you mean Local?"]),
        ("Local(3) | Stride(4)", 11, ["unknown pattern 'Stride'", "did you mean Strided?"]),
        ("Zzzzzz(3)", 0, ["unknown pattern 'Zzzzzz'", "known: ", "BlockLocal", "per_head"]),
        ("Local(3) and Strided(4)", 9, ["unexpected 'and'", "| or &"]),
        ("Local(3) or Strided(4)", 9, ["unexpected 'or'", "| or &"]),
        ("Local(3) Strided(4)", 9, ["unexpected 'Strided'"]),
        ("Local(3", 7, ["expected ','", "the end"]),
        ("(Local(3)", 9, ["expected ')'", "the end"]),
        ("Local(3))", 8, ["unexpected ')'"]),
        ("Local", 5, ["expected '('", "the end"]),
        ("Local(3) |", 10, ["expected a pattern", "the end"]),
        ("| Local(3)", 0, ["expected a pattern", "'|'"]),
        ("Local(3) + Strided(4)", 9, ["unexpected '+'"]),
        ("Local(3.5)", 7, ["unexpected '.'"]),
        ("Local(3 4)", 8, ["expected ','", "'4'"]),
        ("Causal() & Local(0)", 11, ["Local(window=0)", "window must be at least 1"]),
        ("Local(-3)", 0, ["Local(window=-3)", "window must be at least 1"]),
        ("Strided(0)", 0, ["Strided(stride=0)", "stride must be at least 1"]),
        ("Local(True)", 0, ["window=True", "whole number"]),
        ("Local()", 0, ["Local", "window"]),
        ("Local(3, 0, 1)", 0, ["Local", "too many", "window"]),
        ("Local(3, width=4)", 0, ["Local", "width"]),
        ("Local(3, window=4)", 0, ["Local", "window"]),
        ("Local(window=3, window=4)", 16, ["'window' is given twice"]),
        ("Local(window=3, 4)", 16, ["positional value after a named one"]),
        ("Global((2, x))", 11, ["expected a number", "'x'"]),
        ("Global((2, -7))", 0, ["token=-7"]),
        ("per_head()", 0, ["per_head()", "at least one pattern"]),
        ("per_head(3)", 0, ["per_head(3)", "must be a pattern"]),
        ("per_head(per_head(Local(3)))", 0, ["must not be per head itself"]),
        ("BlockSparse(table_0123456789ab, 4)", 12, ["no table 'table_0123456789ab'", "tables=pattern.tables()"]),
        ("Fixed(4, 5)", 0, ["Fixed(block=4, summary=5, offset=0)", "at most block"]),
        ("Strided(3, causal=7)", 0, ["causal=7", "True or False"]),
        ("Strided(3, causal=Local(3))", 0, ["causal=Local(3)", "True or False"]),
        ("RandomBlocks(4, 2, causal=None)", 0, ["causal=None", "True or False"]),
        ("RandomBlocks(4, 2, causal=False, blocks=-1)", 0, ["blocks=-1", "at least 1"]),
    ],
)
def test_errors_name_the_place_and_the_remedy(text, position, words):
    with pytest.raises(ls.PatternError) as raised:
        ls.parse(text)
    message = str(raised.value)
    assert f"at position {position} of the pattern text" in message
    # The text itself is shown, with a caret below the place.
    lines = message.splitlines()
    assert lines[-2] == f"  {text}"
    assert lines[-1] == " " * (2 + position) + "^"
    for word in words:
        assert word in message


@pytest.mark.parametrize("text", [None, 3, b"Local(3)", ls.Local(3)])
def test_only_a_str_is_parsed(text):
    with pytest.raises(ls.PatternError, match="must be a str"):
        ls.parse(text)


def parses_or_explains(text: str) -> None:
    try:
        pattern = ls.parse(text)
    except ls.PatternError:
        return
    assert ls.parse(str(pattern)) == pattern


@settings(max_examples=300)
@given(st.text(max_size=60))
@example("__import__('os').system('true')")
@example("Local.__class__(3)")
@example("Local(3)\0")
@example("Local(١٢٨)")
@example("Pattern(3)")
@example("Union((Local(3)))")
def test_any_text_is_a_pattern_or_a_pattern_error(text):
    parses_or_explains(text)


_WORDS = ["Local", "Strided", "Global", "Fixed", "per_head", "BlockSparse", "RandomBlocks", "Causal", "table_0", "x"]
_SIGNS = ["(", ")", "()", "|", "&", ",", "=", " ", "(3)", "(3, 2)", "3", "-1", "0", "True", "None", "causal=", "and"]


@settings(max_examples=400)
@given(st.lists(st.sampled_from(_WORDS + _SIGNS), max_size=14).map("".join))
def test_any_row_of_words_is_a_pattern_or_a_pattern_error(text):
    parses_or_explains(text)


@pytest.mark.parametrize(
    "text",
    [
        "(" * 20_000 + "Local(3)" + ")" * 20_000,
        "(" * 20_000,
        "per_head(" * 20_000 + "Local(3)",
        "Local(" * 20_000,
    ],
    ids=["parentheses", "open", "per_head", "names"],
)
def test_deep_nesting_is_an_error_in_one_sentence(text):
    with pytest.raises(ls.PatternError, match="nest"):
        ls.parse(text)


def test_a_number_beyond_all_lengths_is_an_error_in_one_sentence():
    with pytest.raises(ls.PatternError, match="at position 6 of the pattern text"):
        ls.parse(f"Local({'9' * 5000})")


def test_a_long_union_is_read_at_once():
    text = " | ".join(f"Local({window})" for window in range(1, 200))
    start = time.thread_time()
    assert str(ls.parse(text)) == text
    assert time.thread_time() - start < 2.0
