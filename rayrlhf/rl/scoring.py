"""Scores of responses: the reward model as a worker."""

import torch
from torch import Tensor

from rayrlhf.data.datasets import shard
from rayrlhf.data.packing import microbatches
from rayrlhf.models.scalar_head import ScalarHeadModel, last_scores
from rayrlhf.rl.clock import timed
from rayrlhf.rl.experience import Rollout, RowReader
from rayrlhf.rl.ranks import InferenceWorker, Rows


class RewardWorker(InferenceWorker):
    """The reward model: one score per response, read at its last token."""

    def start(self) -> None:
        """Load the model with its shift."""
        self.training = self.cfg.critic
        self.model = ScalarHeadModel.from_pretrained(self.settings.model_path, dtype=self.dtype)
        self.know_flops(self.model)
        self.model.to(self.device).eval()

    @timed
    @torch.no_grad()
    def score(self, rollout: Rollout) -> Rows:
        """Return the score of each response; 0 is the mean score of the demonstrations."""
        settings, lengths = self.settings, rollout.lengths
        reader = RowReader(rollout, pad_id=settings.pad_id)
        mine = shard(range(len(rollout)), settings.rank, settings.world_size, lengths)
        groups = microbatches([lengths[i] for i in mine], self.training.tokens_per_microbatch)
        indices: list[int] = []
        rows: list[Tensor] = []
        for group in groups:
            micro = reader.tokens([mine[position] for position in group]).to(self.device)
            with self.autocast():
                scores = self.model(micro.input_ids, micro.attention_mask)  # (b, S)
            self.count(micro)
            last = last_scores(scores, micro.attention_mask.sum(dim=1))  # (b,)
            indices += micro.indices
            rows += list(last.cpu().unsqueeze(1))
        return indices, rows
