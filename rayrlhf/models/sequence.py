"""Where the tokens of a row are in a forward pass: on one rank, unless a backend splits rows."""

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from rayrlhf.config import RecipeError
from rayrlhf.config.resources import ResourcesConfig


class WholeSequence:
    """Every token of a row on this rank; what splits rows over ranks overrides all of it.

    S' below is the number of a row's tokens on this rank: here S.
    """

    def own(self, rows: Tensor) -> Tensor:
        """Return this rank's part (b, S') of rows (b, S)."""
        return rows

    def join(self, parts: Tensor, length: int) -> Tensor:
        """Return the rows (b, length) that the ranks have the parts (b, S') of, on all of them."""
        del length
        return parts

    def trunk(
        self, model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor | None
    ) -> Tensor:
        """Return the hidden states (b, S', d) after the last norm, of rows (b, S)."""
        output = model.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        hidden: Tensor = output.last_hidden_state
        return hidden


WHOLE = WholeSequence()


def check_splits(config: PreTrainedConfig, resources: ResourcesConfig) -> None:
    """Raise RecipeError unless attention of a model can be split as `resources` say."""
    if resources.sequence_parallel == 1:
        return
    settings = config.to_dict()
    window = settings.get("sliding_window")
    if window is not None:
        raise RecipeError(
            f"resources.sequence_parallel={resources.sequence_parallel}, but attention of the "
            f"{config.model_type} model looks back {window} tokens only (sliding_window), which is "
            "not supported: set it to 1"
        )
    heads = config.num_attention_heads
    resources.check_heads(heads, settings.get("num_key_value_heads") or heads)
