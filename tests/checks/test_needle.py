"""Needles: a model that copies finds exactly those that its pattern reaches."""

import dataclasses

import numpy as np
import pytest
import torch

from longstride.checks import Haystack, Subject, attending, find_needles, read_schedule, shortest_length
from longstride.errors import ArgumentError, DataError
from longstride.patterns import parse

# Neither letters nor what stands around the value, so that there is one place to copy from.
TEXT = np.frombuffer(b"0123456789 .,;" * 40, dtype=np.uint8)
HAYSTACK = Haystack(lengths=(32, 64), trials=3, needle="{key}={value}!")
# What such a needle has before its value, what the value is, and what stands behind it.
BEFORE, VALUE, BEHIND = 7, 4, 1


def reached(pattern: str, length: int, depth: float) -> list[bool]:
    """For each byte of the value, whether the query that predicts it may read the place that it stands at."""
    filling = length - 2 * BEFORE - 2 * VALUE - BEHIND + 1
    first_key, first_query = round(depth * filling) + BEFORE, length - VALUE
    mask = parse(pattern).mask(length)
    return [bool(mask[first_query + step, first_key + step]) for step in range(VALUE)]


@pytest.mark.parametrize("pattern", ["Causal()", "Local(16)", "Local(8)", "Strided(8)", "Fixed(16, 4)", "Global(12)"])
def test_what_is_found_is_what_the_pattern_reaches(subject, pattern):
    with attending(subject, read_schedule(["OnlyPrevious()", pattern], subject)) as tried:
        retrieval = find_needles(tried, TEXT, HAYSTACK, batch_size=4)
    for place, length in enumerate(HAYSTACK.lengths):
        for column, depth in enumerate(HAYSTACK.depths):
            steps = reached(pattern, length, depth)
            assert retrieval.chosen[place][column] == steps[0]
            assert retrieval.written[place][column] == all(steps)
            # What is not reached is guessed; other letters of the value, where they are reached, mislead.
            probability, chance = retrieval.probability[place][column], 1 / HAYSTACK.candidates
            assert probability > 0.99 if steps[0] else probability < chance + 0.01
            if pattern == "Local(8)":
                assert probability == pytest.approx(chance, abs=1e-3)


def test_patterns_differ_in_what_they_reach():
    """The test above would say little if all found everything, or nothing."""
    found = {
        pattern: [reached(pattern, length, depth)[0] for length in (32, 64) for depth in HAYSTACK.depths]
        for pattern in ("Causal()", "Local(16)", "Local(8)", "Strided(8)")
    }
    assert all(found["Causal()"])
    assert 0 < sum(found["Local(16)"]) < 10
    assert not any(found["Local(8)"])
    assert found["Strided(8)"] != found["Local(16)"]


def test_same_seed_same_needles_and_another_seed_others(subject):
    seen = []
    subject.model.register_forward_pre_hook(
        lambda _, __, inputs: seen.append(inputs["input_ids"].clone()), with_kwargs=True
    )
    for seed in (0, 0, 1):
        find_needles(subject, TEXT, dataclasses.replace(HAYSTACK, lengths=(48,), seed=seed), batch_size=64)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    sequences = [bytes(row.tolist()) for row in seen[0]]
    assert len(set(sequences)) == len(HAYSTACK.depths) * HAYSTACK.trials
    for sequence in sequences:
        assert len(sequence) == 48
        key, value = sequence[-10:-4], sequence[sequence.index(b"=") + 1 :][:4]
        # The question is the needle's own beginning, and the value is written but for its last byte.
        assert sequence.count(key + b"=" + value[:3]) == 2
        assert sequence.count(value + b"!") == 1
        assert len(set(value)) == 4


def test_depths_of_a_trial_share_their_text(subject):
    sequences = []
    subject.model.register_forward_pre_hook(
        lambda _, __, inputs: sequences.extend(bytes(row.tolist()) for row in inputs["input_ids"]), with_kwargs=True
    )
    find_needles(subject, TEXT, dataclasses.replace(HAYSTACK, lengths=(64,), trials=1), batch_size=2)
    needle = sequences[0][:12]
    assert sequences[0].startswith(needle)
    assert {sequence.replace(needle, b"", 1) for sequence in sequences} == {sequences[0].removeprefix(needle)}
    assert [sequence.index(needle) for sequence in sequences] == [0, 10, 21, 32, 42]


def test_table_names_lengths_depths_and_chance(subject):
    lines = str(find_needles(subject, TEXT, HAYSTACK)).splitlines()
    assert lines[0].split() == ["length", "depth", "0", "depth", "0.25", "depth", "0.5", "depth", "0.75", "depth", "1"]
    assert lines[1].split() == ["32", *["1.00"] * 5]
    assert "guessing has 0.06; 1.00 of all were written" in lines[-1]


def test_shortest_length_fits_and_one_less_does_not(subject):
    shortest = shortest_length(subject, HAYSTACK)
    assert shortest == 2 * BEFORE + 2 * VALUE + BEHIND - 1
    find_needles(subject, TEXT, dataclasses.replace(HAYSTACK, lengths=(shortest,)))
    with pytest.raises(ArgumentError, match=f"--length {shortest - 1}: the needle and its question alone take"):
        find_needles(subject, TEXT, dataclasses.replace(HAYSTACK, lengths=(shortest - 1, 64)))


def test_refusals(subject):
    with pytest.raises(ArgumentError, match="--length 65: the model looks back over at most 64 bytes"):
        find_needles(subject, TEXT, dataclasses.replace(HAYSTACK, lengths=(65,)))
    with pytest.raises(DataError, match="20 bytes are too few to hide a needle in: sequences of 64 need 42 bytes"):
        find_needles(subject, TEXT[:20], HAYSTACK)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"lengths": ()}, "--length of nothing: give"),
        ({"lengths": (0,)}, "--length 0: give"),
        ({"depths": (0.5, 1.5)}, "--depth 0.5, 1.5: give numbers from 0"),
        ({"trials": 0}, "--trials 0: it must be at least 1"),
        ({"candidates": 1}, "--candidates 1: it must be from 2 to 26"),
        ({"candidates": 27}, "--candidates 27: it must be from 2 to 26"),
        ({"seed": -1}, "--seed -1: it must not be negative"),
        ({"needle": "{value} of {key}"}, "it must name {key} and then {value}, once each"),
        ({"needle": "{key} {key} {value}"}, "it must name {key} and then {value}, once each"),
        ({"needle": "nothing"}, "--needle 'nothing': it must name"),
    ],
)
def test_haystacks_that_cannot_be(values, words):
    with pytest.raises(ArgumentError) as refused:
        Haystack(**{"lengths": (64,), **values})
    assert words in str(refused.value)


def test_subject_is_told_apart_from_its_copy(subject):
    """Trying other patterns leaves the model as it was, and shares its weights."""
    with attending(subject, read_schedule(["Local(4)"], subject)) as tried:
        assert isinstance(tried, Subject)
        assert tried.model.config.patterns == ["Local(4)", "Local(4)"]
        for own, other in zip(subject.model.parameters(), tried.model.parameters(), strict=True):
            assert own.data_ptr() == other.data_ptr()
    assert subject.model.config.patterns == ["OnlyPrevious()", "Causal()"]
