"""Weights that go straight into the engines: Ray, vLLM, a group over gloo, and who dies in it."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rayrlhf.config import RecipeError, parse
from rayrlhf.metrics import read_jsonl
from tests.rl.inline import engine_model, timeless
from tests.rl.test_ppo_ray import ROOT, make_run

SCRIPT = """
import json, sys
import ray
from rayrlhf.config import parse
from rayrlhf.rl.groups import ActorGroup, RolloutGroup
from rayrlhf.rl.ppo import train_ppo

ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
plain, broadcast = map(json.loads, sys.argv[1:])
train_ppo(parse(plain))

calls, engines = {}, []
def dies(kind, name, deaths):  # deaths: number of the call to the seat of an engine
    call = getattr(kind, name)
    calls[name] = 0
    def asked(self, *args, **keys):
        pending = call(self, *args, **keys)
        calls[name] += 1
        if kind is RolloutGroup:
            engines[:] = [self]
        if calls[name] in deaths:
            ray.kill(engines[0].seats[deaths[calls[name]]].worker)
        return pending
    setattr(kind, name, asked)

dies(ActorGroup, "update", {1: 0})             # step 1: it is noticed before the broadcast
dies(RolloutGroup, "generate", {2: 1, 5: 1})   # steps 2 and 4: its successor catches up alone
dies(RolloutGroup, "receive_weights", {4: 0})  # after step 3: all go back to that of step 2
train_ppo(parse(broadcast))
print("RESULT", json.dumps(calls))
"""


@pytest.mark.ray
@pytest.mark.slow
def test_broadcast_weights_are_those_of_the_object_store(tmp_path: Path, tiny_model: Path) -> None:
    """Bit by bit, with two engines that die before, in and after a broadcast."""
    model = engine_model(tmp_path / "model", tiny_model)
    plain, broadcast = (make_run(tmp_path / name, model) for name in ("plain", "broadcast"))
    for recipe in (plain, broadcast):
        recipe["resources"] = {"rollout": {"num_workers": 2}}
        recipe["ppo"] |= {"steps": 4, "save_every": 2}
    broadcast["ppo"]["weight_transfer"] = "broadcast"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(plain), json.dumps(broadcast)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "worker 0 died in reset_prefix_cache, its successor does it again" in done.stdout
    # It may have answered before it died: then the next call notices.
    deaths = re.findall(r"rollout worker 1 died in (generate|reset_prefix_cache), ", done.stdout)
    assert len(deaths) == 2
    assert "worker 0 died in receive_weights, all trained ranks go back" in done.stdout
    assert "back to step 2" in done.stdout
    # Versions 0, 1, 2, 3, and from the checkpoint on 2, 3, 4; steps 1, 2, 3, and again 3, 4.
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert json.loads(line.removeprefix("RESULT")) == {
        **{"update": 5, "generate": 5, "receive_weights": 7}
    }

    rows = [
        timeless(read_jsonl(tmp_path / name / "ppo" / "metrics.jsonl"))
        for name in ("plain", "broadcast")
    ]
    assert len(rows[0]) == 4 and rows[1] == rows[0]
    plainly, broadcasted = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "ppo" / "final").state_dict()
        for name in ("plain", "broadcast")
    )
    assert all(torch.equal(broadcasted[name], weight) for name, weight in plainly.items())


@pytest.mark.parametrize(
    ("ppo", "resources", "says"),
    [
        ({"max_staleness": 1}, {}, "ppo.max_staleness=1: engines get new weights one by one"),
        ({"lora": {}}, {}, "adapters, of which only what they change is sent"),
        ({}, {"layout": "colocated"}, "resources.layout=colocated: NCCL has one process per"),
        ({}, {"rollout": {"gpus": 1}}, "resources.actor.gpus=0 and resources.rollout.gpus=1"),
        (
            {},
            {"actor": {"gpus": 0.5}, "rollout": {"gpus": 0.5, "shares": "actor"}},
            "actor and rollout on one device",
        ),
    ],
)
def test_what_cannot_be_broadcast_is_refused(
    tmp_path: Path, ppo: dict[str, Any], resources: dict[str, Any], says: str
) -> None:
    tree = {
        "name": "x",
        "model": {"path": "m"},
        "tokenizer": {"path": "m"},
        "resources": resources,
        "ppo": {"prompts": "p.jsonl", "weight_transfer": "broadcast", **ppo},
    }
    with pytest.raises(RecipeError, match=says):
        parse(tree)
