"""Answers of the current policy, and what the judge of the rounds says of them, as comparisons."""

import hashlib
import time
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt
import ray
from transformers import PreTrainedTokenizerFast

from rayrlhf import console, session
from rayrlhf.config import JudgeConfig, Recipe, RecipeError, RoundsConfig, SampleConfig, judge_key
from rayrlhf.data.datasets import encode_prompt
from rayrlhf.data.records import Record, prompt_text, read_records
from rayrlhf.evaluation.judges import Answer, VaderJudge
from rayrlhf.evaluation.llm_judge import Battle, LLMJudge, settle
from rayrlhf.evaluation.panel import seated
from rayrlhf.rl.waiting import LINE_EVERY_S
from rayrlhf.rounds.accuracy import tokens_per_batch
from rayrlhf.rounds.folders import COMPARISONS, HELD_OUT, JUDGED, SAMPLES
from rayrlhf.run_dir import PeopleNeeded
from rayrlhf.serving import exchange
from rayrlhf.serving.database import Database
from rayrlhf.serving.label import FOLDER as LABEL_FOLDER
from rayrlhf.serving.sampling import sample_items
from rayrlhf.serving.store import Store, item_id

Floats = npt.NDArray[np.float64]


def sample(recipe: Recipe, round_: Recipe, policy: str) -> None:
    """Sample answers of `policy` into the round's folder, in a process that Ray gives an engine.

    Raises TimeoutError after `rounds.deadline_s`.
    """
    cfg, ppo, path = recipe.rounds, recipe.ppo, round_.path / SAMPLES
    assert cfg is not None and ppo is not None
    if path.exists():
        return
    wanted = SampleConfig(
        # The task runs in another folder. What is not there is a name of a hub.
        model=_absolute(policy) if Path(policy).exists() else policy,
        prompts=_absolute(cfg.prompts or ppo.prompts),
        num_prompts=cfg.num_prompts,
        num_responses=cfg.num_responses,
        max_response_tokens=ppo.max_response_tokens,
        temperature=ppo.temperature,
        memory_gib=ppo.rollout_memory_gib,
    )
    session.connect(recipe)
    engine = recipe.resources.rollout
    # A process for this alone: vLLM leaves its mark on the one that it was in.
    task = ray.remote(num_cpus=engine.cpus, num_gpus=engine.gpus, max_retries=1, max_calls=1)(
        sample_items
    )
    answer = task.remote(
        round_,
        wanted,
        path.absolute(),
        key="rounds",
        dtype=ppo.actor.precision,
        tensor_parallel=max(1, int(engine.gpus)),
        gpu_memory=recipe.resources.rollout_gpu_memory,
    )
    started = time.monotonic()
    while not ray.wait([answer], timeout=LINE_EVERY_S)[0]:
        seconds = time.monotonic() - started
        if seconds > cfg.deadline_s:
            ray.cancel(answer, force=True)
            raise TimeoutError(
                f"{policy} has not answered {cfg.num_prompts} prompts within rounds.deadline_s="
                f"{cfg.deadline_s:g} s: raise it, or lower rounds.num_prompts"
            )
        console.say(f"{'rounds':>9} {policy} answers {cfg.num_prompts} prompts, {seconds:.0f} s")
    try:
        ray.get(answer)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, RecipeError) else error) from None


def judge(recipe: Recipe, round_: Recipe, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write what the judge says of the samples: of those to train on, and of those held out.

    Groups without any order are left out. Raises PeopleNeeded where people have not said enough.
    """
    cfg = recipe.rounds
    assert cfg is not None
    if (round_.path / HELD_OUT).exists():
        return
    items = read_records(round_.path / SAMPLES, "item")
    if cfg.judge == "people":
        found = _of_people(round_, items)
    else:
        found = _ranked(items, _points(items, cfg, recipe, tokenizer))
    found = [{**record, "source": round_.path.name} for record in found]
    kept = [record for record in found if len(set(record["ranks"])) > 1]
    if len(kept) < 2:
        raise RecipeError(
            f"rounds: of {len(items)} prompts {len(kept)} have answers of which one is better, and "
            "a round needs two: raise rounds.num_prompts, or name another rounds.judge"
        )
    kept.sort(key=lambda record: _place(record, recipe.seed))
    num_held_out = sum(_place(record, recipe.seed) < cfg.held_out for record in kept)
    num_held_out = min(max(1, num_held_out), len(kept) - 1)
    console.say(
        f"{'rounds':>9} {len(kept)} of {len(items)} prompts have answers that differ for the "
        f"judge; {num_held_out} of them are held out"
    )
    exchange.write(round_.path / JUDGED, kept[num_held_out:])
    exchange.write(round_.path / HELD_OUT, kept[:num_held_out])


def gather(recipe: Recipe, folders: Sequence[Path]) -> int:
    """Write all comparisons so far, those of `reward.train` and of these rounds, into the last.

    Returns their number.
    """
    assert recipe.reward is not None
    path = folders[-1] / COMPARISONS
    if path.exists():
        return len(read_records(path, "comparison"))
    records = read_records(recipe.reward.train, "comparison")
    for folder in folders:
        records += read_records(folder / JUDGED, "comparison")
    exchange.write(path, records)
    return len(records)


def _place(record: Record, seed: int) -> float:
    """Return a number in [0, 1) of the prompt: one that is held out is so in every round."""
    digest = hashlib.blake2b(f"{seed}/{record['prompt']}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _absolute(place: str) -> str:
    """Return a local path, or a pattern of some, from the root on, and a URI as it is."""
    return place if ":" in place else str(Path(place).absolute())


def _of_people(round_: Recipe, items: Sequence[Record]) -> list[Record]:
    """Return what people said on the page; raises PeopleNeeded as long as items are left.

    An item is done when as many people have ranked it as should, or all have ranked or skipped it.
    """
    label = round_.label
    assert label is not None, "Recipe checks it"
    # A database on a server has what was said in other rounds, too.
    wanted: dict[str, int] = {}
    for item, people in zip(items, exchange.wanted_people(len(items), label), strict=True):
        name = item_id(item["prompt"], item["responses"])
        wanted[name] = max(people, wanted.get(name, 0))
    ranked: Counter[str] = Counter()
    seen: dict[str, set[str]] = {name: set() for name in wanted}
    folder = (round_.path / LABEL_FOLDER).absolute()
    folder.mkdir(exist_ok=True)
    database = Database(label.database, folder)
    store = Store(database, claim_s=label.claim_s)
    try:
        for row in store.rankings():
            if row.item in wanted:
                ranked[row.item] += row.ranks is not None
                seen[row.item].add(row.labeller)
        records = [
            record
            for record in exchange.ranked_records(store)
            if item_id(record["prompt"], record["responses"]) in wanted
        ]
    finally:
        database.close()
    everybody = set(label.labellers)
    done = sum(ranked[name] >= people or seen[name] >= everybody for name, people in wanted.items())
    if done < len(wanted):
        raise PeopleNeeded(
            f"{round_.name} waits for people: {done} of {len(wanted)} prompts are judged. "
            f"`rayrlhf label {round_.path / 'recipe.yaml'}` opens the page; run this command again "
            "when they are done"
        )
    return records


def _points(
    items: Sequence[Record], cfg: RoundsConfig, recipe: Recipe, tokenizer: PreTrainedTokenizerFast
) -> list[Floats]:
    """Return for each item one number per response (K,); the higher one is better."""
    answers = [
        Answer(
            item["prompt"],
            response,
            encode_prompt(item, tokenizer),
            [],
            [],
            ended=True,
            is_chat="messages" in item,
        )
        for item in items
        for response in item["responses"]
    ]
    if not isinstance(cfg.judge, JudgeConfig):
        scores = VaderJudge().score(answers)
    else:
        asked = seated(
            judge_key("rounds.judge", cfg.judge),
            cfg.judge,
            recipe.path,
            [item for item in items for _ in item["responses"]],
            tokenizer,
            tokens_per_batch(recipe),
        )
        if isinstance(asked, LLMJudge):
            return _wins(items, asked)
        scores = asked.scores({"policy": answers})["policy"]
    ends = np.cumsum([len(item["responses"]) for item in items])
    return np.split(scores, ends[:-1])


def _wins(items: Sequence[Record], judge: LLMJudge) -> list[Floats]:
    """Return for each response the pairs that it won, ties and undecided ones half."""
    pairs = [
        (number, i, j)
        for number, item in enumerate(items)
        for i, j in combinations(range(len(item["responses"])), 2)
    ]
    battles = [
        Battle(prompt_text(items[n]), items[n]["responses"][i], items[n]["responses"][j])
        for n, i, j in pairs
    ]
    won = np.nan_to_num(settle(judge.judge(battles)), nan=0.5)
    points = [np.zeros(len(item["responses"])) for item in items]
    for (n, i, j), share in zip(pairs, won, strict=True):
        points[n][i] += share
        points[n][j] += 1.0 - share
    return points


def _ranked(items: Sequence[Record], points: Sequence[Floats]) -> list[Record]:
    """Return comparison records of one rater each, as those of people on the page."""
    found = []
    for item, given in zip(items, points, strict=True):
        ranks = exchange.dense_ranks(given)
        single = (len(given) + 1 - exchange.mid_ranks(ranks))[:, None].tolist()
        found.append({**item, "ranks": ranks, "single_ratings": single})
    return found
