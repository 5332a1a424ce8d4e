"""Which rules a recipe turns on, in which order they speak, and what they leave of a text."""

from typing import Any, get_args

import pytest

from rayrlhf.config import CorpusConfig, Edit, Filter
from rayrlhf.data.cleaning import Cleaning, identify
from rayrlhf.data.quality import EDITS, FILTERS

ENGLISH = "The film is slow at first, but the ending is worth the wait for all who like her work."
GERMAN = "Der Film kommt am Anfang kaum voran, aber es lohnt sich doch f\u00fcr jeden Zuschauer."


def cleaning(source: str = "a", **section: Any) -> Cleaning:
    sources = {"a": {"path": "x"}, "b": {"path": "y", "filters": ["c4"], "min_chars": 7}}
    return Cleaning.of(CorpusConfig.model_validate({"sources": sources, **section}), source)


def test_the_recipe_names_every_rule() -> None:
    assert set(get_args(Filter)) == {*FILTERS, "gopher", "c4"}
    assert set(get_args(Edit)) == set(EDITS)


def test_a_family_stands_for_all_of_its_rules() -> None:
    families = cleaning(filters=["c4", "gopher_word_count"]).filters
    assert families == (
        "gopher_word_count",
        *(name for name in FILTERS if name.startswith("c4_")),
    )
    assert cleaning(filters=["gopher", "c4"]).filters == tuple(FILTERS)


def test_a_source_may_have_rules_of_its_own() -> None:
    own = cleaning("b", filters=["gopher"], min_chars=3, edits=["scrub_ip"])
    assert own.filters == tuple(name for name in FILTERS if name.startswith("c4_"))
    assert own.min_chars == 7
    assert own.edits == ("scrub_ip",)


def test_by_default_only_short_documents_are_dropped() -> None:
    rules = cleaning()
    assert rules.reasons == ["too_short"]
    assert rules.reason(rules.apply(" \r\n")) == "too_short"
    assert rules.reason("{lorem ipsum} me@example.com") is None
    assert rules.apply("me@example.com") == "me@example.com"


def test_the_first_rule_that_speaks_is_the_reason() -> None:
    rules = cleaning(min_chars=5, languages=["en"], filters=["c4"])
    assert rules.reasons == [
        "too_short",
        "language",
        "c4_sentences",
        "c4_lorem_ipsum",
        "c4_curly_bracket",
    ]
    assert rules.reason("{a}") == "too_short"
    assert rules.reason(GERMAN + " {") == "language"
    assert rules.reason(ENGLISH + " {") == "c4_sentences"
    assert rules.reason(f"{ENGLISH} {ENGLISH} {{ {ENGLISH}") == "c4_curly_bracket"
    assert rules.reason(f"{ENGLISH} {ENGLISH} {ENGLISH}") is None


def test_edits_come_before_filters_and_in_their_own_order() -> None:
    rules = cleaning(edits=["scrub_ip", "scrub_email"], min_chars=8)
    assert rules.edits == ("scrub_email", "scrub_ip")
    assert rules.apply("  from 93.184.216.34 by jane@example.org ") == "from <ip> by <email>"
    assert rules.reason(rules.apply("jane.doe@example.org")) == "too_short"


@pytest.mark.parametrize(
    ("text", "language"),
    [(ENGLISH, "en"), (GERMAN, "de"), (ENGLISH.replace(" ", "\n"), "en")],
)
def test_languages_are_identified(text: str, language: str) -> None:
    code, score = identify(text)
    assert code == language
    assert 0.65 <= score <= 1


def test_text_below_the_confidence_asked_for_is_dropped() -> None:
    mixed = ENGLISH[:10] + GERMAN[:10]
    score = identify(mixed)[1]
    keep = [identify(mixed)[0]]
    assert cleaning(languages=keep, language_score=score - 0.01).reason(mixed) is None
    assert cleaning(languages=keep, language_score=score + 0.01).reason(mixed) == "language"
    assert cleaning(languages=["en"], min_chars=0).reason("") == "language"
