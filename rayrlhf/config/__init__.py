"""The recipe: one YAML file, typed, frozen, checked before anything starts.

`load(path, overrides)` reads a recipe and applies `key.sub=value` overrides. Every error is a
`RecipeError`, whose text names the value, the rule and the fix; the command line turns it into
exit code 2. This package imports neither torch nor ray, so that `rayrlhf --help` stays fast.
"""

from rayrlhf.config.corpus import CorpusConfig, Edit, Filter, NearDuplicates, SourceConfig
from rayrlhf.config.cost import FewShotConfig, OveroptimisationConfig, VarietyConfig
from rayrlhf.config.dpo import DPOConfig
from rayrlhf.config.evaluate import EvaluateConfig
from rayrlhf.config.judges import JudgeConfig, api_url, judge_key
from rayrlhf.config.kl import KLConfig
from rayrlhf.config.label import ArenaConfig, LabelConfig, SampleConfig
from rayrlhf.config.model import ModelConfig, TokenizerConfig
from rayrlhf.config.ppo import PPOConfig
from rayrlhf.config.reading import load, parse
from rayrlhf.config.recipe import HEAD_SIZES, STAGES, Recipe
from rayrlhf.config.resources import ROLES, TRAINED_STAGES, ResourcesConfig, Role, RoleResources
from rayrlhf.config.reward import GoldConfig, RewardConfig
from rayrlhf.config.rewards import RewardSource, backoff_s, key_of
from rayrlhf.config.rounds import RoundsConfig
from rayrlhf.config.section import (
    Fraction,
    NonNegative,
    Positive,
    PositiveFloat,
    RecipeError,
    Section,
)
from rayrlhf.config.serve import ServeConfig, ServedModel, ServeLimits
from rayrlhf.config.training import (
    EarlyStopping,
    LoraConfig,
    LossSpikeConfig,
    PretrainConfig,
    RoleLoraConfig,
    RoleTrainingConfig,
    SFTConfig,
    StageConfig,
    TrainingConfig,
)

__all__ = [
    "HEAD_SIZES",
    "ROLES",
    "STAGES",
    "TRAINED_STAGES",
    "ArenaConfig",
    "CorpusConfig",
    "DPOConfig",
    "EarlyStopping",
    "Edit",
    "EvaluateConfig",
    "FewShotConfig",
    "Filter",
    "Fraction",
    "GoldConfig",
    "JudgeConfig",
    "KLConfig",
    "LabelConfig",
    "LoraConfig",
    "LossSpikeConfig",
    "ModelConfig",
    "NearDuplicates",
    "NonNegative",
    "OveroptimisationConfig",
    "PPOConfig",
    "Positive",
    "PositiveFloat",
    "PretrainConfig",
    "Recipe",
    "RecipeError",
    "ResourcesConfig",
    "RewardConfig",
    "RewardSource",
    "Role",
    "RoleLoraConfig",
    "RoleResources",
    "RoleTrainingConfig",
    "RoundsConfig",
    "SFTConfig",
    "SampleConfig",
    "Section",
    "ServeConfig",
    "ServeLimits",
    "ServedModel",
    "SourceConfig",
    "StageConfig",
    "TokenizerConfig",
    "TrainingConfig",
    "VarietyConfig",
    "api_url",
    "backoff_s",
    "judge_key",
    "key_of",
    "load",
    "parse",
]
