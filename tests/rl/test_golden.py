"""Golden curves of every learner on the bandit: a change of the maths says so.

After a change that is meant, write the new curves with RAYRLHF_WRITE_GOLDEN=1 and look at the
difference. The sampled tokens are part of it: they follow from the weights and the seeds.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.rl.test_learners import LEARNERS

GOLDEN = Path(__file__).parents[1] / "assets" / "golden_ppo.json"
WATCHED = (
    "reward/score_mean",
    "kl/ref_per_response",
    "policy/loss",
    "policy/approx_kl",
    "policy/entropy",
    "value/loss",
    "ptx/loss",
)


@pytest.mark.parametrize("learner", LEARNERS)
def test_curves_are_the_golden_ones(train: Callable[..., Any], corpus: Path, learner: str) -> None:
    rows = train(steps=5, kl_coef=0.05, corpus=str(corpus), **LEARNERS[learner])
    found = {name: [row[name] for row in rows] for name in WATCHED if name in rows[0]}
    curves = json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.exists() else {}
    if os.environ.get("RAYRLHF_WRITE_GOLDEN"):
        curves[learner] = found
        GOLDEN.write_text(json.dumps(curves, indent=1) + "\n", encoding="utf-8")
    assert found.keys() == curves[learner].keys()
    for name, curve in found.items():
        # Another CPU rounds differently; a change of the maths moves the third decimal.
        assert curve == pytest.approx(curves[learner][name], rel=1e-3, abs=1e-5), name
