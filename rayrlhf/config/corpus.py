"""The pretraining corpus: sources, rules, mixture and packing."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rayrlhf.config.section import Fraction, Positive, PositiveFloat, Section

Filter = Literal[
    "gopher",
    "gopher_word_count",
    "gopher_word_length",
    "gopher_symbols",
    "gopher_bullets",
    "gopher_ellipses",
    "gopher_alphabetic",
    "gopher_stop_words",
    "gopher_repeated_lines",
    "gopher_repeated_paragraphs",
    "gopher_top_ngram",
    "gopher_repeated_ngrams",
    "c4",
    "c4_sentences",
    "c4_lorem_ipsum",
    "c4_curly_bracket",
]
"""Rules of data/quality.py that drop documents; `gopher` and `c4` stand for all of theirs."""
Edit = Literal["c4_lines", "scrub_email", "scrub_ip"]
"""Rules of data/quality.py that change documents."""


class SourceConfig(Section):
    """One source of the pretraining mixture."""

    path: str
    """A file, a folder or a glob of documents, local or a URI (`s3://`, `hf://`), or a `builtin:`
    name; data/inputs.py lists the formats."""
    validation: str | None = None
    """Held-out documents of the source, for the loss per source."""
    test: str | None = None
    """Documents that only `evaluate` reads."""
    epochs: PositiveFloat | None = None
    """How often each document occurs in the mixture (default 1); a fraction takes a seeded sample.
    Source: the epochs column of LLaMA's data mixture (arXiv:2302.13971, table 1)."""
    weight: PositiveFloat | None = None
    """Instead of epochs: the source's share of the mixture's tokens, relative to the others.
    Source: the sampling proportion of the same table."""
    min_chars: Annotated[int, Field(ge=0)] | None = None
    """For this source, in place of the corpus's rule; so with the next three."""
    edits: tuple[Edit, ...] | None = None
    languages: tuple[str, ...] | None = None
    filters: tuple[Filter, ...] | None = None


class NearDuplicates(Section):
    """MinHash and locality-sensitive hashing over word n-grams (Broder 1997; Lee et al.,
    arXiv:2107.06499, section 4.2). A pair shares a band with probability
    1 - (1 - J^rows_per_band)^num_bands; of those, pairs are compared exactly."""

    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.8
    """Smallest Jaccard index J of two documents' n-grams that makes one of them a duplicate."""
    ngram: Positive = 5
    num_bands: Positive = 32
    rows_per_band: Positive = 8

    @model_validator(mode="after")
    def _bands_find_pairs_at_the_threshold(self) -> Self:
        found = 1 - (1 - self.threshold**self.rows_per_band) ** self.num_bands
        if found < 0.95:
            raise ValueError(
                f"near_duplicates: {self.num_bands} bands of {self.rows_per_band} rows find only "
                f"{found:.0%} of the pairs at threshold={self.threshold}: lower rows_per_band or "
                "raise num_bands"
            )
        return self


class CorpusConfig(Section):
    """Documents to rows of token ids."""

    sources: Annotated[dict[str, SourceConfig], Field(min_length=1)]
    row_length: Positive = 128
    """T: tokens of one packed row."""
    packing: Literal["stream", "best_fit"] = "stream"
    """`stream` cuts documents at the end of a row and pads nothing; `best_fit` keeps those of up
    to T tokens whole and pads (arXiv:2404.10830)."""
    total_tokens: Positive | None = None
    """Tokens of the mixture when sources have weights; default: as many as the sources hold."""
    min_chars: Annotated[int, Field(ge=0)] = 1
    """Documents shorter than this after cleaning are dropped and counted."""
    edits: tuple[Edit, ...] = ()
    """Changes of every text, before it is looked at: C4's lines, personal data."""
    languages: tuple[str, ...] = ()
    """ISO 639 codes; documents in other languages are dropped. Empty: no identification."""
    language_score: Fraction = 0.65
    """Smallest confidence in the language (RefinedWeb, arXiv:2306.01116, section 3.1: 0.65)."""
    filters: tuple[Filter, ...] = ()
    """Rules that drop documents, counted by rule."""
    near_duplicates: NearDuplicates | None = None
    """Drop documents that are nearly those of another, in the whole corpus and its held-out texts;
    exact duplicates always go. `{}` takes the defaults."""
    decontaminate: tuple[str, ...] = ()
    """Files of evaluation sets, of any kind of record; documents that share an n-gram with them
    are dropped."""
    decontaminate_ngram: Positive = 13
    """Words (GPT-3, arXiv:2005.14165, appendix C: 13)."""
    on_error: Literal["fail", "skip"] = "fail"
    """A record or file that can't be read ends the job, or is named, counted and left out."""
    rows_per_shard: Positive = 8192

    @model_validator(mode="after")
    def _weights_or_epochs(self) -> Self:
        weighted = {name for name, source in self.sources.items() if source.weight is not None}
        for name, source in self.sources.items():
            if weighted and (source.weight is None or source.epochs is not None):
                raise ValueError(
                    f"corpus.sources: {min(weighted)} has a weight, and {name} "
                    f"{'has epochs' if source.epochs is not None else 'has none'}: give every "
                    "source a weight, or every source epochs"
                )
        if self.total_tokens is not None and not weighted:
            raise ValueError(
                f"corpus.total_tokens={self.total_tokens} needs sources with weights: give every "
                "source a weight, or take it out and set epochs"
            )
        return self
