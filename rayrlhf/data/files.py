"""Which data files a recipe names, and for which stage: one list for checks and for lineage."""

from collections.abc import Iterator
from dataclasses import dataclass

from rayrlhf.config import Recipe
from rayrlhf.data.records import Kind


@dataclass(frozen=True)
class DataFile:
    """A data file, or a pattern of files, of the recipe."""

    stage: str
    key: str
    """The file's key in the stage's section."""
    path: str
    """A local path or pattern, or a `builtin:` name."""
    kind: Kind


def data_files(recipe: Recipe) -> list[DataFile]:
    """Return every data file that a stage of the recipe reads, in the order of the stages."""
    return [
        DataFile(stage, key, path, kind)
        for stage, key, path, kind in _entries(recipe)
        if path is not None
    ]


def _entries(recipe: Recipe) -> Iterator[tuple[str, str, str | None, Kind]]:
    if recipe.corpus is not None:
        for name, source in recipe.corpus.sources.items():
            yield "corpus", f"{name}.train", source.path, "document"
            yield "corpus", f"{name}.validation", source.validation, "document"
            yield "corpus", f"{name}.test", source.test, "document"
    if recipe.sft is not None:
        yield "sft", "train", recipe.sft.train, "demonstration"
        yield "sft", "validation", recipe.sft.validation, "demonstration"
    if recipe.reward is not None:
        scored = recipe.reward.demonstrations or (recipe.sft.train if recipe.sft else None)
        yield "reward", "demonstrations", scored, "demonstration"
        yield "reward", "train", recipe.reward.train, "comparison"
        yield "reward", "validation", recipe.reward.validation, "comparison"
        if recipe.reward.gold is not None:
            yield "reward", "gold.train", recipe.reward.gold.train, "comparison"
            yield "reward", "gold.validation", recipe.reward.gold.validation, "comparison"
    if recipe.dpo is not None:
        yield "dpo", "train", recipe.dpo.train, "comparison"
        yield "dpo", "validation", recipe.dpo.validation, "comparison"
    if recipe.ppo is not None:
        yield "ppo", "prompts", recipe.ppo.prompts, "prompt"
    if recipe.rounds is not None:
        yield "rounds", "prompts", recipe.rounds.prompts, "prompt"
    if recipe.evaluate is not None:
        yield "evaluate", "prompts", recipe.evaluate.prompts, "prompt"
        yield "evaluate", "comparisons", recipe.evaluate.comparisons, "comparison"
