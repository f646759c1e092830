"""The words of a job: what holds where nothing is said, and what cannot be said together."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from workers.contract import ADDED_RATE, DIGITS_RATE, RATE, JobSpec
from workers.method import HEAD_WORDS, Method


@pytest.mark.parametrize(
    ("said", "strategy"),
    [
        ({}, "hardest"),
        ({"score": "taylor"}, "hull"),
        ({"hold": "none"}, "hull"),
        ({"skip_fill": "mean", "strategy": "two_stage"}, "two_stage"),
        ({"strategy": "full"}, "full"),
    ],
)
def test_words_about_heads_mean_that_heads_are_chosen(said, strategy):
    method = Method(ratios={"full": 3, "skip": 2}, **said)
    assert method.words == {"strategy": strategy, **HEAD_WORDS, **said}
    assert method.chooses_heads == (strategy not in ("hardest", "full"))
    assert method.sorts_images == (strategy == "hardest")
    assert Method.model_validate_json(method.model_dump_json()).words == method.words


@pytest.mark.parametrize("word", HEAD_WORDS)
def test_whole_micro_batches_know_no_words_about_heads(word):
    with pytest.raises(ValidationError, match=rf"{word} speaks of heads.*'hull'"):
        Method(ratios={"full": 3, "skip": 2}, strategy="hardest", **{word: HEAD_WORDS[word]})


def test_nothing_left_out_is_nothing_to_choose():
    method = Method()
    assert not (method.chooses_heads or method.sorts_images or method.leaves_out)


def test_a_pretrained_model_gets_a_smaller_learning_rate_than_the_bundled_one():
    assert JobSpec().filled_optimiser.learning_rate == DIGITS_RATE
    for method in ({"lora": {"rank": 4}}, {"head_only": True}):
        assert JobSpec.model_validate({"method": method}).filled_optimiser.learning_rate == ADDED_RATE
    assert JobSpec(model="vit_small_patch16_224").filled_optimiser.learning_rate == RATE
    given = JobSpec(optimiser={"learning_rate": 2e-3, "clip_norm": 0})
    assert given.filled_optimiser.learning_rate == 2e-3 and given.filled_optimiser.clip_norm == 0
