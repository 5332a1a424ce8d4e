"""What `rayrlhf plan` says against what is: memory of every role, seconds of a PPO step, and peers.

    python tests/benchmarks/plan.py [--run runs/quickstart] [--quick]

Memory: the worker of each role of the quickstart and of SmolLM2-135M alone in a process, on batches
with the planned lengths; the peak beyond the imports. Step: the probe, then a real `rayrlhf ppo` of
the quickstart's sizes with random weights, or the metrics of a finished run of the quickstart with
`--run`. Peers: tests/planning/published.py. Run it on an idle machine: steps are of the wall clock.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from rayrlhf.config import Role, load
from rayrlhf.console import table
from rayrlhf.metrics import read_jsonl
from rayrlhf.models.scalar_head import ScalarHeadModel
from rayrlhf.planning import shapes
from rayrlhf.planning.devices import this_machine
from rayrlhf.planning.estimate import estimate
from rayrlhf.planning.needs import of_ppo
from rayrlhf.planning.probe import probe
from tests.planning.measure import peak_of, write_model
from tests.planning.published import FIGURES, predicted

ROOT = Path(__file__).parents[2]
ROLES: tuple[Role, ...] = ("actor", "critic", "reference", "reward", "rollout")
PHASES = ("rollout", "evaluate", "update", "sync")
STEPS = 8
FIRST = 2
"""Steps that warm up."""


def memory(name: str, roles: tuple[Role, ...]) -> dict[str, float]:
    """Print planned and measured peaks; return planned over measured by role."""
    path = ROOT / "configs" / f"{name}.yaml"
    needs, _ = of_ppo(load(path), this_machine().device)
    rows, ratios = [], {}
    for role in roles:
        planned, peak = needs[role].memory.total / 2**20, peak_of(path, role) / 2**20
        ratios[role] = planned / peak
        rows.append((f"{name} {role}", planned, peak, ratios[role]))
    print(table(("peak memory", "planned MiB", "measured MiB", "ratio"), rows), flush=True)
    return ratios


def run_ppo(folder: Path) -> Path:
    """Run a few PPO steps of the quickstart with random weights; return the run directory."""
    run = folder / "run"
    recipe = str(ROOT / "configs" / "quickstart.yaml")
    own = [f"run_dir={run}"]
    call = [sys.executable, "-m", "rayrlhf.cli"]
    subprocess.run([*call, "corpus", recipe, *own], cwd=ROOT, check=True)
    cfg = load(recipe)
    model, scorer = folder / "model", folder / "scorer"
    for place in (model, scorer):
        shutil.copytree(run / "tokenizer", place)
    write_model(shapes.policy(cfg), model, max_length=cfg.model.max_length)
    ScalarHeadModel.from_causal_lm(model).save_pretrained(scorer)
    off = [f"{stage}=null" for stage in ("pretrain", "sft", "reward", "dpo", "evaluate")]
    keys = [f"model.path={model}", f"ppo.rewards=[{{model: {scorer}}}]", f"ppo.steps={STEPS}"]
    subprocess.run([*call, "ppo", recipe, *own, *off, *keys], cwd=ROOT, check=True)
    return run


def step(run: Path) -> float:
    """Print planned and measured seconds of the phases of a step; return the steps' ratio."""
    recipe = load(ROOT / "configs" / "quickstart.yaml", [f"run_dir={run}"])
    planned = estimate(recipe, this_machine(), probe(recipe)).step
    assert planned is not None
    records: list[dict[str, Any]] = read_jsonl(run / "ppo" / "metrics.jsonl")[FIRST:]

    def measured(phase: str) -> float:
        return statistics.median(float(record[f"time/{phase}_s"]) for record in records)

    rows = [(phase, planned.phases[phase], measured(phase)) for phase in PHASES]
    rows.append(("step", planned.seconds, measured("step")))
    print(
        table(
            ("quickstart, seconds", "planned", "measured", "ratio"),
            [(*row, row[1] / row[2]) for row in rows],
        ),
        flush=True,
    )
    return planned.seconds / measured("step")


def peers() -> list[float]:
    """Print planned and published seconds of a step; return their ratios."""
    rows = []
    for figure in FIGURES:
        seconds = predicted(figure).seconds
        rows.append((figure.name, seconds, figure.seconds, seconds / figure.seconds))
    print(table(("published, seconds", "planned", "published", "ratio"), rows), flush=True)
    return [row[3] for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="a finished run of the quickstart")
    parser.add_argument("--quick", action="store_true", help="one role, and no step")
    args = parser.parse_args()
    figures: dict[str, float] = {}
    if not args.quick:
        with tempfile.TemporaryDirectory() as folder:
            figures["ratio_step"] = step(args.run or run_ppo(Path(folder)))
    for name in ("quickstart",) if args.quick else ("quickstart", "smollm2"):
        for role, ratio in memory(name, ("reference",) if args.quick else ROLES).items():
            figures[f"ratio_memory_{name}_{role}"] = ratio
    ratios = peers()
    figures["ratio_published_min"] = min(ratios)
    figures["ratio_published_max"] = max(ratios)
    figures["num_published"] = len(ratios)
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
