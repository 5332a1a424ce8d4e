"""Seconds of one reward-model step: responses packed into rows, against padded ones.

    python tests/benchmarks/packing.py [--repeats 5] [--threads 1] [--quick]

Both score the same responses, 8 comparisons of 4 to 9, with the quickstart's model, forward and
backward; the packed rows let no response see another. `utilisation` is the model's useful
floating-point work (6 x weights x tokens) over what this machine's matmul does in the same time.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForSequenceClassification

from rayrlhf.algorithms.ranking import ranking_loss
from rayrlhf.data.datasets import lay_out, number_documents, pad
from rayrlhf.data.packing import microbatches, pack_whole
from rayrlhf.models.scalar_head import ScalarHeadModel, last_scores

Texts = list[list[int]]
Scorer = Callable[[ScalarHeadModel, Texts], Tensor]

BUDGET = 1024
"""Tokens of a micro-batch."""


def responses(seed: int) -> tuple[Texts, list[int]]:
    """Return token ids as long as the human ratings' are (median 22), and their groups."""
    rng = random.Random(seed)
    texts, groups = [], []
    for group in range(8):
        for _ in range(rng.randint(4, 9)):
            length = min(90, max(5, round(rng.lognormvariate(3.1, 0.6))))
            texts.append([rng.randrange(4096) for _ in range(length)])
            groups.append(group)
    return texts, groups


def packed_scores(model: ScalarHeadModel, texts: Texts) -> Tensor:
    """Score all responses in packed rows, (N,)."""
    rows = pack_whole([len(text) for text in texts])
    batch = [[texts[i] for i in row] for row in rows]
    outputs = model(lay_out(batch, 0), number_documents(batch))  # (b, S)
    ends = [
        (number, end - 1) for number, row in enumerate(batch) for end in accumulate(map(len, row))
    ]
    found = torch.stack([outputs[place] for place in ends])  # in the order of the rows
    order = torch.tensor([i for row in rows for i in row])
    return torch.empty_like(found).index_copy(0, order, found)


def padded_scores(model: ScalarHeadModel, texts: Texts) -> Tensor:
    """Score all responses in right-padded micro-batches sorted by length, (N,)."""
    parts, order = [], []
    for group in microbatches([len(text) for text in texts], BUDGET):
        input_ids, mask = pad([texts[i] for i in group], 0)
        parts.append(last_scores(model(input_ids, mask), mask.sum(dim=1)))
        order += group
    found = torch.cat(parts)
    return torch.empty_like(found).index_copy(0, torch.tensor(order), found)


def one_padded_batch(model: ScalarHeadModel, texts: Texts) -> Tensor:
    """Score all responses in one batch padded to its longest, as trainers commonly do, (N,)."""
    input_ids, mask = pad(texts, 0)
    return last_scores(model(input_ids, mask), mask.sum(dim=1))


def step(score: Scorer, model: ScalarHeadModel, texts: Texts, groups: Tensor) -> Tensor:
    """Do forward and backward of the ranking loss; return the scores."""
    model.zero_grad()
    scores = score(model, texts)
    ranking_loss(scores, torch.arange(len(texts)), groups)[0].backward()
    return scores.detach()


def seconds(work: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    """Return the wall time of one call, and what it returned."""
    started = time.perf_counter()
    result = work(*args)
    return time.perf_counter() - started, result


def matmul_rate() -> float:
    """Return float32 floating-point operations per second of a large product."""
    a = torch.randn(1024, 1024)
    a @ a
    took, _ = seconds(lambda: [a @ a for _ in range(4)])
    return 4 * 2 * 1024**3 / took


def main() -> None:
    """Measure, print a table, and as the last line a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="once, to see that it runs")
    args = parser.parse_args()
    if args.quick:
        args.repeats = 1
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_labels=1,
        pad_token_id=0,
    )
    model = ScalarHeadModel(LlamaForSequenceClassification(config))
    weights = sum(p.numel() for name, p in model.named_parameters() if "embed_tokens" not in name)
    ways: dict[str, Scorer] = {
        "packed": packed_scores,
        "sorted": padded_scores,
        "one batch": one_padded_batch,
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    utilisation = []
    for repeat in range(-1, args.repeats):  # the first round warms up
        texts, groups = responses(repeat)
        rate = matmul_rate()
        scored = {}
        for way, score in ways.items():
            took, scored[way] = seconds(step, score, model, texts, torch.tensor(groups))
            if repeat >= 0:
                times[way].append(took)
        torch.testing.assert_close(scored["packed"], scored["sorted"], atol=1e-4, rtol=1e-4)
        if repeat >= 0:
            useful = 6 * weights * sum(map(len, texts))
            utilisation.append(useful / (times["packed"][-1] * rate))

    figures: dict[str, float] = {}
    print(f"{'way':<10} {'median ms':>10} {'packed is faster by':>20} {'spread':>13}")
    for way, all_took in times.items():
        ratios = [other / own for other, own in zip(all_took, times["packed"], strict=True)]
        low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
        name = way.replace(" ", "_")
        figures |= {f"ratio_{name}": middle, f"low_{name}": low, f"high_{name}": high}
        milliseconds = statistics.median(all_took) * 1e3
        print(f"{way:<10} {milliseconds:>10.1f} {middle:>20.2f} {low:>6.2f}-{high:.2f}")
    figures["utilisation"] = statistics.median(utilisation)
    print(f"utilisation of the packed step: {figures['utilisation']:.2f} of the matmul rate")
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
