"""The labelling page: what people rank, which models they meet in the arena, and who they are."""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from rayrlhf.config.section import Fraction, Positive, PositiveFloat, Section

LABELLER = re.compile(r"[^\W_][\w .@-]{0,39}")
"""A name: up to 40 letters, digits, spaces and `.@-_`, beginning with a letter or digit."""
FLAGS = {
    "instruction": "Fails to follow the instruction",
    "hallucination": "States something that is not true",
    "inappropriate": "Not fit for a customer assistant",
    "sexual": "Sexual content",
    "violent": "Violent content",
    "encourages_violence": "Encourages violence, abuse, terrorism or self-harm",
    "denigrates": "Denigrates a protected class",
    "harmful_advice": "Gives harmful advice",
    "opinion": "Expresses an opinion or moral judgement",
}
PromptFormat = Literal["text", "chat"]


class SampleConfig(Section):
    """Completions for people to rank, sampled from a policy."""

    model: str
    """Folder, hub name or `builtin:` name of the policy."""
    prompts: str
    """Prompts to answer: `prompt`, or `messages`."""
    num_prompts: Positive = 100
    num_responses: Annotated[int, Field(ge=2, le=9)] = 4
    """K: completions of each prompt (InstructGPT section 3.5: 4 to 9)."""
    max_response_tokens: Positive = 128
    temperature: PositiveFloat = 1.0
    memory_gib: PositiveFloat = 0.25
    """KV cache of the engine on CPU, GiB."""


class ArenaConfig(Section):
    """Two anonymous answers to a person's own prompt, side by side."""

    models: dict[str, str]
    """Name shown after the vote -> folder, hub name or `builtin:` name; two are drawn per prompt.
    Each gets what `resources.rollout` says of one engine."""
    prompt_format: PromptFormat = "text"
    """`text`: the model goes on where the prompt ends. `chat`: the prompt is the user's message, in
    the chat template of the model's tokenizer."""
    max_response_tokens: Positive = 128
    temperature: PositiveFloat = 1.0
    memory_gib: PositiveFloat = 0.25
    """KV cache of each engine on CPU, GiB."""

    @field_validator("models")
    @classmethod
    def _are_two(cls, models: dict[str, str]) -> dict[str, str]:
        if len(models) < 2:
            raise ValueError(
                f"label.arena.models has {len(models)} model(s), but two answer each prompt: name "
                "at least two, for example {sft: runs/x/sft/final, ppo: runs/x/ppo/final}"
            )
        return models


class LabelConfig(Section):
    """A web page on which people rank completions, or vote between two models."""

    labellers: tuple[str, ...]
    """Names with which people sign in; each has a judgement of their own on an item."""
    items: str | None = None
    """What to rank: records of `prompt` and `responses` (K = 2 to 9; InstructGPT has 4 to 9). Ranks
    that comparisons have are not shown."""
    sample: SampleConfig | None = None
    """Instead of `items`: sample them from a policy into label/items.jsonl, once for these
    settings."""
    arena: ArenaConfig | None = None
    """Models that people may talk to; None leaves the arena out."""
    overlap: Fraction = 0.25
    """Share of the items that several people judge, spread evenly over the file, from which the
    agreement between labellers is measured."""
    overlap_labellers: Annotated[int, Field(ge=2)] = 2
    """How many people judge each of those."""
    claim_s: PositiveFloat = 1800
    """Seconds for which an item that is on somebody's screen is kept from others."""
    flags: dict[str, str] = FLAGS
    """What can be said of a single completion: code in the data -> words on the page. The default
    are those of InstructGPT (table 3 and figure 12)."""
    database: str = ""
    """Empty: SQLite in label/judgements.sqlite. Else `postgresql://user@host/name`, whose password
    the driver takes from ~/.pgpass or PGPASSWORD on the node."""
    host: str = "127.0.0.1"
    """Address to listen on. Others than this machine reach `0.0.0.0`: put a proxy with TLS before
    it, since names and the secret travel as they are; it has to pass on the header Host."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000

    @field_validator("labellers")
    @classmethod
    def _are_names(cls, labellers: tuple[str, ...]) -> tuple[str, ...]:
        if not labellers:
            raise ValueError(
                "label.labellers is empty, so nobody could sign in: list names, [ann, bob]"
            )
        for name in labellers:
            if not LABELLER.fullmatch(name):
                raise ValueError(
                    f"label.labellers has {name!r}: a name is up to 40 letters, digits, spaces and "
                    ".@-_, and begins with a letter or digit: change it"
                )
        folded = [name.casefold() for name in labellers]
        for name in labellers:
            if folded.count(name.casefold()) > 1:
                raise ValueError(f"label.labellers names {name} twice: take one of them out")
        return labellers

    @field_validator("flags")
    @classmethod
    def _have_codes(cls, flags: dict[str, str]) -> dict[str, str]:
        for code, text in flags.items():
            if not re.fullmatch(r"[a-z][a-z0-9_]{0,31}", code) or not 0 < len(text) <= 80:
                raise ValueError(
                    f"label.flags has {code!r}: {text!r}: a code is up to 32 of a-z, 0-9 and _, "
                    "its words are 1 to 80 characters: change it"
                )
        return flags

    @field_validator("database")
    @classmethod
    def _is_known(cls, database: str) -> str:
        if not database:
            return database
        found = re.fullmatch(r"postgresql(\+psycopg)?://([^/@]*@)?[^/@]*/[^/?]+(\?.*)?", database)
        if found is None:
            raise ValueError(
                f"label.database={database}: leave it empty for SQLite in the run directory, or "
                "set it to postgresql://user@host/name"
            )
        if ":" in (found[2] or "") or "password=" in (found[3] or ""):
            raise ValueError(
                "label.database holds a password, and recipes are copied and shown: take it out, "
                "and put it into ~/.pgpass or PGPASSWORD"
            )
        return database

    @model_validator(mode="after")
    def _items_are_named_once(self) -> Self:
        if self.items is not None and self.sample is not None:
            raise ValueError(
                f"label.items={self.items} and label.sample both say what to rank: keep one"
            )
        return self

    def check_work(self, *, of_rounds: bool) -> None:
        """Raise ValueError when there is nothing to judge, or too few people for what there is.

        `of_rounds`: what the recipe's rounds sample is for these people.
        """
        if self.items is None and self.sample is None and self.arena is None and not of_rounds:
            raise ValueError(
                "label has nothing to judge: set label.items to a file of prompts with responses, "
                "label.sample to a policy, or label.arena.models to two models"
            )
        ranks = self.ranks or of_rounds
        if self.overlap > 0 and ranks and self.overlap_labellers > len(self.labellers):
            raise ValueError(
                f"label.overlap_labellers={self.overlap_labellers}, but there are only "
                f"{len(self.labellers)} labellers: name more, lower it, or set label.overlap=0"
            )

    @property
    def ranks(self) -> bool:
        """Whether there are items to rank."""
        return self.items is not None or self.sample is not None
