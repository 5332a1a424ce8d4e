"""Every rule at its limit, by hand; thresholds are those of the papers."""

import time

import pytest

from rayrlhf.data.quality import EDITS, FILTERS, Document, c4_lines, scrub_email, scrub_ip

PROSE = (
    "The court of appeals said on Monday that the city must have a plan for the river. "
    "Farmers along the bank wrote letters to the mayor, and many of them still wait for answers. "
    "A new bridge would cost more than anyone has promised, with little to show before winter. "
    "Nobody in the room seemed to be surprised by that.\n"
)


def words(count: int) -> str:
    """Return `count` words, all different."""
    return " ".join(f"word{chr(97 + i % 26)}{i}" for i in range(count))


def test_plain_prose_passes_every_filter() -> None:
    assert [name for name, drops in FILTERS.items() if drops(Document(PROSE))] == []
    for edit in EDITS.values():
        assert edit(PROSE).strip() == PROSE.strip()


@pytest.mark.parametrize(
    ("rule", "dropped", "kept"),
    [
        ("gopher_word_count", words(49), words(50)),
        ("gopher_word_count", words(100_001), words(100_000)),
        ("gopher_word_length", "at ab abc", "abc abc"),
        ("gopher_word_length", "a" * 11, "a" * 10),
        ("gopher_symbols", words(19) + " # # #", words(30) + " # # #"),
        ("gopher_symbols", words(9) + "...\u2026", words(20) + "...\u2026"),
        ("gopher_bullets", "- a\n" * 10, "- a\n" * 9 + "b"),
        ("gopher_ellipses", "a...\n" * 4 + "b\n" * 6, "a\u2026\n" * 3 + "b\n" * 7),
        ("gopher_alphabetic", "a b c 1 2", "a b c d 2"),
        ("gopher_stop_words", "the the cat", "The cat AND dog"),
        ("gopher_repeated_lines", "a\n" * 3 + "b\nc\nd", "aa\naa\nbbbb\nccccccc"),
        ("gopher_repeated_lines", "x" * 10 + "\n" + "x" * 10 + "\na\nb\nc\nd\ne", "a\nb\nc"),
        ("gopher_repeated_paragraphs", "p q\n\np q\n\nr", "p q\nr\n\np q\ns\n\nt\n\nu"),
        ("gopher_top_ngram", "big cat " * 3 + words(5), "big cat " * 2 + words(20)),
        ("gopher_repeated_ngrams", (words(9) + " ") * 2, words(40)),
        ("c4_sentences", "One. Two!", 'One. Two! "Three?"'),
        ("c4_lorem_ipsum", "Lorem Ipsum dolor", "lorem and ipsum"),
        ("c4_curly_bracket", "if (x) { y }", "if (x) y"),
    ],
)
def test_filter_drops_beyond_its_limit_only(rule: str, dropped: str, kept: str) -> None:
    assert FILTERS[rule](Document(dropped))
    assert not FILTERS[rule](Document(kept))


@pytest.mark.parametrize("rule", FILTERS)
def test_filters_take_any_text(rule: str) -> None:
    for text in ("", " ", "\n\n", "\U0001f600", "a"):
        assert FILTERS[rule](Document(text)) in (True, False)


def test_c4_keeps_sentences() -> None:
    page = (
        "Home | About | Contact\n"
        "The river rose again last night.[12]\n"
        "Please enable JavaScript to see this page.\n"
        "Read our privacy policy before you go on.\n"
        "Too short here.\n"
        "And then it went on and on...\n"
        'He said "we will all leave tomorrow"\n'
        "no end to this line of words"
    )
    assert c4_lines(page) == (
        'The river rose again last night.\nHe said "we will all leave tomorrow"'
    )


@pytest.mark.parametrize(
    ("text", "scrubbed"),
    [
        ("write to jane.doe+x@mail.example.org.", "write to <email>."),
        ("<a@b.co>, C@D.ORG", "<<email>>, <email>"),
        ("at @home, a@b, 5 @ 3", "at @home, a@b, 5 @ 3"),
    ],
)
def test_emails_are_scrubbed(text: str, scrubbed: str) -> None:
    assert scrub_email(text) == scrubbed


@pytest.mark.parametrize(
    ("text", "scrubbed"),
    [
        ("from 8.8.8.8, port 80", "from <ip>, port 80"),
        ("8.8.8.8.", "<ip>."),
        ("10.0.0.1 and 192.168.1.7 and 127.0.0.1", "10.0.0.1 and 192.168.1.7 and 127.0.0.1"),
        ("version 1.2.3.4.5, 999.1.1.1", "version 1.2.3.4.5, 999.1.1.1"),
        ("see 2606:4700:4700::1111 now", "see <ip> now"),
        ("2001:4860:4860:0:0:0:0:8888", "<ip>"),
        ("std::vector at 10:30:00, fe80::1", "std::vector at 10:30:00, fe80::1"),
    ],
)
def test_public_addresses_are_scrubbed(text: str, scrubbed: str) -> None:
    assert scrub_ip(text) == scrubbed


def test_a_long_run_of_address_characters_takes_linear_time() -> None:
    """Base64 has no @; a search that begins anew at each character would take hours."""
    run = "A1b2" * 250_000
    started = time.process_time()
    assert scrub_email(f"{run} me@example.org") == f"{run} <email>"
    assert time.process_time() - started < 5


def test_addresses_of_every_form() -> None:
    text = "Write to first.last+tag@mail.example.co.uk, or (me@x.org). Not to @me or a@b."
    assert scrub_email(text) == "Write to <email>, or (<email>). Not to @me or a@b."
