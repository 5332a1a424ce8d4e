"""Scaling laws: fit the held-out loss of a few small runs, and predict that of the next size.

    compute   L(C)    = E + A / C^alpha                       3 parameters
    size      L(N, D) = E + A / N^alpha + B / D^beta          5 parameters

N parameters that multiply, D tokens of training, C = 6 N D floating-point operations, L nats per
token. Fitted as in Chinchilla's approach 3 (arXiv:2203.15556, section 3.3 and appendix D.2): a
Huber loss of 1e-3 on the logarithms, minimised by L-BFGS from a grid of starts; the interval goes
from the 10th to the 90th percentile over bootstrap samples of the runs.

What it drops: with a handful of runs the law in compute is all that can be identified, and E is
what they tend to, not the entropy of the text. A prediction holds for a run with the same recipe,
corpus and tokenizer, and as many tokens, or tokens per parameter, as the runs have in common.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from safetensors import safe_open
from torch import Tensor

from rayrlhf.config import RecipeError
from rayrlhf.data.rows import read_manifest
from rayrlhf.metrics import read_jsonl

Form = Literal["compute", "size"]
MIN_RUNS = {"compute": 4, "size": 6}
"""One run more than the form has parameters: with as many, any curve fits and nothing is tested."""
HUBER = 1e-3
NUM_BOOTSTRAP = 100
_LOOKED_UP = ("wpe.weight",)
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight")


@dataclass(frozen=True)
class TrainedRun:
    """What a scaling law sees of a run."""

    name: str
    parameters: int
    tokens: int
    loss: float | None
    """Held-out, nats per token; None before it is trained."""
    corpus: tuple[Any, ...] = ()
    """Vocabulary and held-out rows: losses over others can't be compared."""

    @property
    def flops(self) -> float:
        """C = 6 N D (Kaplan et al., arXiv:2001.08361, section 2.1)."""
        return 6.0 * self.parameters * self.tokens


@dataclass(frozen=True)
class ScalingLaw:
    """A fitted law, and what it is over bootstrap samples of the runs."""

    form: Form
    irreducible: float
    """E, nats per token."""
    coefficients: tuple[float, ...]
    """A, or A and B."""
    exponents: tuple[float, ...]
    """alpha, or alpha and beta."""
    samples: tuple["ScalingLaw", ...] = field(default=(), repr=False)

    def predict(self, *sizes: float) -> float:
        """Return the loss at compute C, or at N parameters and D tokens."""
        terms = zip(self.coefficients, self.exponents, sizes, strict=True)
        return self.irreducible + sum(a * size**-alpha for a, alpha, size in terms)

    def interval(self, *sizes: float) -> tuple[float, float]:
        """Return the 10th and 90th percentile of the bootstrap samples' predictions."""
        return _percentiles([sample.predict(*sizes) for sample in self.samples])

    def exponent_interval(self, index: int = 0) -> tuple[float, float]:
        """Return the 10th and 90th percentile of an exponent."""
        return _percentiles([sample.exponents[index] for sample in self.samples])


def read_run(folder: str | Path) -> TrainedRun:
    """Return size, tokens and last held-out loss of a run directory; raises RecipeError."""
    root = Path(folder)
    lines = read_jsonl(root / "pretrain" / "metrics.jsonl")
    losses = [line["eval/loss"] for line in lines if line.get("eval/loss") is not None]
    weights = root / "pretrain" / "final" / "model.safetensors"
    if not losses or not weights.exists():
        raise RecipeError(
            f"{root}: not a run whose pretraining is done with held-out documents: run `rayrlhf "
            "pretrain` with corpus.sources.NAME.validation, or leave it out"
        )
    with safe_open(str(weights), framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    recipe = yaml.safe_load((root / "recipe.yaml").read_text(encoding="utf-8"))
    manifest = read_manifest(recipe["pretrain"]["corpus"] or root / "corpus")
    return TrainedRun(
        name=root.name,
        parameters=multiplied_parameters(shapes),
        tokens=round(sum(line["tokens"] for line in lines)),
        loss=losses[-1],
        corpus=corpus_of(manifest),
    )


def corpus_of(manifest: dict[str, Any]) -> tuple[Any, ...]:
    """Return what has to be equal of two corpora for losses to be comparable."""
    held_out = {
        split: sum(shard["rows"] for shard in entry["shards"])
        for split, entry in manifest["splits"].items()
        if split.startswith("validation-")
    }
    return (manifest["vocab_size"], manifest["row_length"], *sorted(held_out.items()))


def multiplied_parameters(shapes: Mapping[str, Sequence[int]]) -> int:
    """Return N: the parameters that a token is multiplied with.

    Embeddings that are only looked up don't count; one that is the output layer, too, does.
    """
    has_head = any(name.endswith("lm_head.weight") for name in shapes)
    skipped = _LOOKED_UP + (_EMBEDDINGS if has_head else ())
    return sum(math.prod(shape) for name, shape in shapes.items() if not name.endswith(skipped))


def fit(
    runs: Sequence[TrainedRun],
    form: Form = "compute",
    *,
    num_bootstrap: int = NUM_BOOTSTRAP,
    seed: int = 0,
) -> ScalingLaw:
    """Fit a law to trained runs; raises RecipeError where they are too few or not comparable."""
    _check(runs, form)
    logs = torch.tensor([sizes_of(run, form) for run in runs], dtype=torch.float64).log()  # (n, k)
    log_losses = torch.tensor([run.loss for run in runs], dtype=torch.float64).log()  # (n,)
    centre = logs.mean(dim=0)
    centred = logs - centre
    fits = [
        _minimise(centred, log_losses, start) for start in _starts(log_losses.exp(), len(centre))
    ]
    best = min(fits, key=lambda found: found[1])[0]
    generator = torch.Generator().manual_seed(seed)
    samples: list[ScalingLaw] = []
    while len(samples) < num_bootstrap:
        chosen = torch.randint(len(runs), (len(runs),), generator=generator)
        # Fewer different runs than parameters are met by many curves.
        if len(chosen.unique()) >= MIN_RUNS[form] - 1:
            found = _minimise(centred[chosen], log_losses[chosen], best)[0]
            samples.append(_law(form, found, centre))
    return _law(form, best, centre, tuple(samples))


def sizes_of(run: TrainedRun, form: Form) -> tuple[float, ...]:
    """Return what `ScalingLaw.predict` takes for a run."""
    return (run.flops,) if form == "compute" else (float(run.parameters), float(run.tokens))


def write_plot(
    path: Path, law: ScalingLaw, runs: Sequence[TrainedRun], following: TrainedRun | None = None
) -> None:
    """Draw runs, law and the prediction for `following` over compute, as PNG.

    The law in N and D is drawn as its values at the runs.
    """
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    everything = [*runs, following] if following is not None else list(runs)
    if law.form == "compute":
        first, last = (math.log10(bound(run.flops for run in everything)) for bound in (min, max))
        grid = [10 ** (first + (last - first) * i / 99) for i in range(100)]
        low, high = zip(*(law.interval(flops) for flops in grid), strict=True)
        axes.fill_between(grid, low, high, color="#c3cfe2", label="10th to 90th percentile")
        axes.plot(grid, [law.predict(flops) for flops in grid], color="#2f6fd6", label=formula(law))
    else:
        fitted = [law.predict(*sizes_of(run, law.form)) for run in runs]
        axes.plot([r.flops for r in runs], fitted, "x", color="#2f6fd6", label=formula(law))
    axes.plot(
        [r.flops for r in runs],
        [r.loss or math.nan for r in runs],
        "o",
        color="#1d2430",
        label="runs",
    )
    for run in everything:
        if run.loss is not None:
            axes.annotate(run.name, (run.flops, run.loss), (5, 5), textcoords="offset points")
    if following is not None:
        sizes = sizes_of(following, law.form)
        predicted, (low_end, high_end) = law.predict(*sizes), law.interval(*sizes)
        error = [[max(0.0, predicted - low_end)], [max(0.0, high_end - predicted)]]
        axes.errorbar(
            [following.flops], [predicted], error, fmt="s", color="#d9541e", label="predicted"
        )
        if following.loss is not None:
            axes.plot(
                [following.flops], [following.loss], "*", ms=12, color="#1f9d74", label="measured"
            )
    axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.set_xlabel("training compute C = 6 N D, floating-point operations")
    axes.set_ylabel("held-out loss, nats per token")
    axes.grid(color="#e4e7ec")
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)


def formula(law: ScalingLaw) -> str:
    """Return the law with its numbers, as one line."""
    names = ("C",) if law.form == "compute" else ("N", "D")
    terms = [
        f"{a:.4g} {name}^-{alpha:.3f}"
        for name, a, alpha in zip(names, law.coefficients, law.exponents, strict=True)
    ]
    return " + ".join([f"L = {law.irreducible:.3f}", *terms])


def write_results(
    path: Path, law: ScalingLaw, runs: Sequence[TrainedRun], following: TrainedRun | None
) -> None:
    """Write law, runs and prediction as JSON."""
    tree: dict[str, Any] = {
        "form": law.form,
        "irreducible": law.irreducible,
        "coefficients": law.coefficients,
        "exponents": law.exponents,
        "runs": [_as_json(run) for run in runs],
    }
    if following is not None:
        sizes = sizes_of(following, law.form)
        tree["next"] = _as_json(following) | {
            "predicted": law.predict(*sizes),
            "interval": law.interval(*sizes),
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def _as_json(run: TrainedRun) -> dict[str, Any]:
    return {
        "name": run.name,
        "parameters": run.parameters,
        "tokens": run.tokens,
        "flops": run.flops,
        "loss": run.loss,
    }


def _check(runs: Sequence[TrainedRun], form: Form) -> None:
    untrained = [run.name for run in runs if run.loss is None]
    if untrained:
        raise RecipeError(f"{untrained[0]} has no held-out loss to fit: train it first")
    different = len({sizes_of(run, form) for run in runs})
    if different < MIN_RUNS[form]:
        raise RecipeError(
            f"{different} runs of different size, but the law in {form} has {MIN_RUNS[form] - 1} "
            f"parameters and needs {MIN_RUNS[form]} or more: train more sizes"
            + ("" if form == "compute" else ", or take --form compute")
        )
    if form == "size":
        for name, values in (
            ("parameters", {run.parameters for run in runs}),
            ("tokens", {run.tokens for run in runs}),
        ):
            if len(values) < 3:
                raise RecipeError(
                    f"the runs have {len(values)} different numbers of {name}, but the law in size "
                    "needs 3 or more of each: train others, or take --form compute"
                )
    for run in runs:
        if run.corpus != runs[0].corpus:
            raise RecipeError(
                f"{run.name} and {runs[0].name} differ in vocabulary or held-out documents, so "
                "their losses can't be compared: train both on one corpus (pretrain.corpus)"
            )


def _minimise(centred: Tensor, log_losses: Tensor, start: Tensor) -> tuple[Tensor, float]:
    """Run L-BFGS from one start; returns (1 + 2k,) parameters and the objective.

    The parameters are e, a_1.., alpha_1.., with log L = logsumexp(e, a_i - alpha_i * x_i) at the
    centred logarithms x (n, k) of the sizes.
    """
    k = centred.shape[1]
    theta = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [theta],
        max_iter=300,
        tolerance_grad=1e-10,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        terms = theta[1 : 1 + k] - theta[1 + k :] * centred  # (n, k)
        irreducible = theta[:1].expand(len(centred), 1)
        predicted = torch.logsumexp(torch.cat([irreducible, terms], dim=1), dim=1)
        scaled = (predicted - log_losses) / HUBER
        return torch.nn.functional.huber_loss(scaled, torch.zeros_like(scaled), reduction="sum")

    def closure() -> float:
        optimizer.zero_grad()
        loss = objective()
        loss.backward()
        return loss.item()

    optimizer.step(closure)
    with torch.no_grad():
        value = float(objective())
    return theta.detach(), value if math.isfinite(value) else math.inf


def _starts(losses: Tensor, k: int) -> list[Tensor]:
    """Return a grid of starts: shares of the lowest loss that are irreducible, and exponents."""
    lowest, middle = float(losses.min()), float(losses.median())
    starts = []
    for share, *alphas in product((0.2, 0.5, 0.8, 0.95), *[(0.1, 0.3, 0.7)] * k):
        rest = math.log((middle - share * lowest) / k)
        starts.append([math.log(share * lowest), *[rest] * k, *alphas])
    return [torch.tensor(start, dtype=torch.float64) for start in starts]


def _law(
    form: Form, theta: Tensor, centre: Tensor, samples: tuple[ScalingLaw, ...] = ()
) -> ScalingLaw:
    k = len(centre)
    exponents = theta[1 + k :]
    # From the centre of the runs to size 1.
    coefficients = (theta[1 : 1 + k] + exponents * centre).exp()
    return ScalingLaw(
        form,
        float(theta[0].exp()),
        tuple(coefficients.tolist()),
        tuple(exponents.tolist()),
        samples,
    )


def _percentiles(values: list[float]) -> tuple[float, float]:
    if not values:
        return math.nan, math.nan
    low, high = torch.tensor(values, dtype=torch.float64).quantile(
        torch.tensor([0.1, 0.9], dtype=torch.float64)
    )
    return float(low), float(high)
