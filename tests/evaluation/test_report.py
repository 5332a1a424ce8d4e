"""The report is one self-contained, escaped, well-formed page; figures come with a sentence."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from rayrlhf.evaluation.plots import Figure, figures
from rayrlhf.evaluation.plots.preference import win_rates
from rayrlhf.evaluation.report import render, write_report

VOID = {"meta", "img", "source", "br"}
Results = dict[str, Any]
Curves = dict[str, list[dict[str, Any]]]


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.sources += [
            value or ""
            for name, value in attrs
            if name in ("src", "srcset", "href", "action", "data", "poster")
        ]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def _parse(page: str) -> _Page:
    parser = _Page()
    parser.feed(page)
    assert not parser.open
    return parser


def test_page_is_well_formed_and_self_contained(results: Results, drawn: list[Figure]) -> None:
    page = render(results, drawn, recipe_yaml="name: toy\n")
    parsed = _parse(page)
    assert len(parsed.sources) == 2 * len(drawn)  # light and dark
    for source in parsed.sources:
        kind, _, data = source.partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")
    assert not re.search(r"https?:|url\(|@import", re.sub(r"base64,[^\"]*", "", page))
    assert {"script", "link", "iframe"}.isdisjoint(parsed.tags)
    assert "prefers-color-scheme: dark" in page and "@media print" in page


def test_text_of_models_and_data_is_escaped(results: Results) -> None:
    parsed = _parse(render({**results, "name": "<script>x</script>"}, [], recipe_yaml="a: <b>\n"))
    assert {"script", "i"}.isdisjoint(parsed.tags)
    assert "Say <i>it</i>" in parsed.text
    assert '<b>fine</b> & "good"' in parsed.text
    assert "a: <b>" in parsed.text


def test_page_says_what_the_run_was(results: Results) -> None:
    text = _parse(render(results, [], recipe_yaml="name: toy\nseed: 0\n")).text
    for word in ("toy", "Pretraining", "1.7 min", "torch 2.13.0", "seed: 0", "70%", "12.0"):
        assert word in text


def test_every_figure_is_drawn_with_a_sentence(drawn: list[Figure]) -> None:
    by_name = {figure.name: figure for figure in drawn}
    assert set(by_name) == {
        "win_rate",
        "overoptimisation",
        "ratings",
        "reward_against_kl",
        "reward_model",
        "calibration",
        "reward_errors",
        "entropy",
        "training_pretrain",
        "training_sft",
        "training_reward",
        "training_dpo",
        "ppo",
    }
    for figure in drawn:
        assert figure.light.startswith(b"\x89PNG") and figure.dark.startswith(b"\x89PNG")
        assert figure.light != figure.dark
        assert figure.caption.endswith(".")
    assert "not clearly different" in by_name["win_rate"].caption  # the interval holds 50%
    gold = by_name["overoptimisation"].caption
    assert "0.10 (95% interval 0.02 to 0.19) below its peak at n = 2." in gold
    assert "its highest: no over-optimisation up to √KL 2.0." in gold
    assert "73% on movies (one person: 83%)" in by_name["reward_model"].caption
    assert "calibration error is 3.4 points" in by_name["calibration"].caption
    assert "55% of the pairs that people rated almost alike" in by_name["reward_errors"].caption


def test_page_says_what_length_and_an_ensemble_have_to_do_with_it(results: Results) -> None:
    text = _parse(render(results, [], recipe_yaml="")).text
    for word in ("-0.17", "77.0%", "3.1%", "73.0%", "83.0%", "66.8%", "3 reward models"):
        assert word in text
    del results["reward_model"]["movies"]["ensemble"]
    assert "disagreeing third" not in _parse(render(results, [], recipe_yaml="")).text


def test_page_says_what_rlhf_costs(results: Results) -> None:
    page = render(results, [], recipe_yaml="")
    text = _parse(page).text
    for word in ("41.5", "39.0 to 44.0", "+0.125", "-0.250", "2 (peak)", "12.5%", "score +2.25"):
        assert word in text
    assert "marked: repetition" in text and "one <word> often" in text
    results |= {"overoptimisation": None}
    assert "Over-optimisation" not in _parse(render(results, [], recipe_yaml="")).text


def test_a_model_of_another_run_stands_in_the_table(results: Results) -> None:
    results["variety"]["<guest>"] = {"distinct_1": {"value": 0.987, "low": 0.9, "high": 1.0}}
    assert "<guest>–0.99" in _parse(render(results, [], recipe_yaml="")).text


def test_a_model_of_another_run_stands_in_the_figure(results: Results) -> None:
    table = {
        "win_rate": {"ppo_ptx": {"sft": 0.6, "ppo": 0.4}, "sft": {"ppo_ptx": 0.4}},
        "win_rate_interval": {"ppo_ptx": {"sft": [0.55, 0.7], "ppo": [0.3, 0.5]}, "sft": {}},
    }
    results["battles"] = {"judges": {"a judge of its own": table}}
    figure = win_rates(results)
    assert figure is not None
    said = "PPO-ptx is preferred to SFT on 60% of the prompts by a judge of its own"
    assert said in figure.caption


def test_every_table_has_a_caption_and_headers(results: Results) -> None:
    page = render(results, [], recipe_yaml="")
    tables = re.findall(r"<table>.*?</table>", page, re.DOTALL)
    assert len(tables) >= 10
    for table in tables:
        assert re.match(r"<table><caption>[^<]{10,}</caption><thead><tr><th scope=.col.>", table)
        body = table[table.index("<tbody>") :]
        assert body.count("<tr>") == body.count('<tr><th scope="row">') > 0


def test_rounds_show_what_they_added_and_what_it_was_worth(results: Results) -> None:
    def share(value: float, low: float, high: float) -> dict[str, float]:
        return {"value": value, "low": low, "high": high}

    row = {
        "round": 1,
        "num_new": 319,
        "num_comparisons": 3382,
        "num_held_out": 80,
        "num_pairs": 458,
        "pair_accuracy_before": share(0.76, 0.71, 0.8),
        "pair_accuracy": share(0.825, 0.78, 0.87),
        "pair_accuracy_gain": share(0.065, 0.027, 0.103),
    }
    gain = {"over": "ppo", "elo": 51.2, "low": 0.6, "high": 101.8}
    judges = {
        name: {**found, "rating_gains": {"round-1": gain}}
        for name, found in results["battles"]["judges"].items()
    }
    found = {"judge": "<b>ann</b>", "rounds": [row]}
    shown = {**results, "rounds": found, "battles": {**results["battles"], "judges": judges}}
    page = render(shown, [], recipe_yaml="")
    text = _parse(page).text
    for word in ("round 1", "3,382", "76.0%71.0 to 80.0", "+6.5%+2.7 to +10.3", "+51+1 to +102"):
        assert word in text
    assert "<b>ann</b>" not in page
    assert "Rounds of feedback" not in render(results, [], recipe_yaml="")


def test_battles_have_ratings_pairs_lengths_and_positions(
    results: Results, drawn: list[Figure]
) -> None:
    text = _parse(render(results, [], recipe_yaml="")).text
    for word in (
        "rating, big-llm",
        "1044990 to 1077",
        "43%31 to 54",
        "against gpt-x",
        "57%46 to 68",
        "190 were asked about in both orders; in 21% the verdict changed with the order, and 60%",
        "3 got no verdict and are left out.",
    ):
        assert word in text
    caption = next(figure.caption for figure in drawn if figure.name == "ratings")
    assert "By big-llm, gpt-x is rated highest." in caption


def test_base_and_sft_alone_make_a_report(results: Results, curves: Curves) -> None:
    for key in (
        "models",
        "win_rate_vs_sft",
        "distinct_2",
        "response_length",
        "ended_fraction",
        "entropy_nats_per_token",
        "kl_ref_per_response",
        "held_out_loss",
        "ratings",
        "entropy_intervals",
        "alignment_tax",
        "variety",
    ):
        del results[key]["ppo"], results[key]["dpo"]
    for name in ("ppo", "dpo"):
        del results["hacking"]["shares"][name]
    results |= {"few_shot": None, "overoptimisation": None}
    results["hacking"] |= {"trained": "sft", "judge": "vader", "gains": [], "marked": []}
    for table in (results["win_rate_vs_sft"], results["intervals"]["win_rate_vs_sft"]):
        for judges in table.values():
            judges.pop("reward", None)
    nothing: Results = {"reward_model": {}, "reward_model_pooled": {}}
    results |= {"judges": ["vader"], "reward_model_calibration": [], **nothing}
    for model in ("dpo", "ppo"):
        results["samples"][0]["answers"].pop(model)
    results["battles"]["models"] = ["sft"]
    drawn = figures(results, {"sft": curves["sft"]})
    assert {figure.name for figure in drawn} == {"win_rate", "entropy", "training_sft"}
    page = render(results, drawn, recipe_yaml="")
    assert "The reward model on texts" not in page
    _parse(page)


def test_one_model_alone_makes_a_report(results: Results) -> None:
    alone = {
        key: {"base": results[key]["base"]}
        for key in (
            "models",
            "distinct_2",
            "response_length",
            "ended_fraction",
            "entropy_nats_per_token",
            "kl_ref_per_response",
            "ratings",
            "entropy_intervals",
            "variety",
        )
    }
    results |= alone | {
        "reference": "base",
        "judges": ["vader"],
        "held_out_loss": {"base": {}},
        "alignment_tax": {},
        "few_shot": None,
        "overoptimisation": None,
        "rounds": None,
        "hacking": {
            **results["hacking"],
            "shares": {"base": results["hacking"]["shares"]["base"]},
            "trained": "base",
            "gains": [],
            "marked": [],
        },
        "win_rate_vs_base": {"base": {"vader": 0.5}},
        "samples": [],
        "reward_model": {},
        "reward_model_pooled": {},
        "intervals": {"win_rate_vs_base": {"base": {"vader": [0.5, 0.5]}}},
        "reward_model_calibration": [],
        "battles": {"models": ["base"], "judges": {}},
    }
    assert figures(results, {}) == []
    _parse(render(results, [], recipe_yaml=""))


def test_report_replaces_the_one_before(results: Results, tmp_path: Path) -> None:
    path = tmp_path / "runs" / "report.html"
    for name in ("first", "second"):
        assert write_report(path, {**results, "name": name}, [], recipe_yaml="") == path
    assert "second" in path.read_text(encoding="utf-8")
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_the_corpus_has_a_section_with_what_was_dropped_and_why(
    results: Results, drawn: list[Figure]
) -> None:
    text = " ".join(_parse(render(results, drawn, recipe_yaml="")).text.split())
    assert "365 rows of 128 tokens: 45,000 of documents, 1,500 ends of documents" in text
    assert "web1,2002001,0001.5045,000100.0%4.001.50" in text.replace(" ", "")
    assert "too shortweb150<b>Hi</b>" in text
    assert "7 records or files that can't be read" in text and "broken <JSON>" in text
    assert "language" not in text.partition("The corpus")[2].partition("Figures")[0]
    without = render({**results, "corpus": None}, drawn, recipe_yaml="")
    assert "The corpus" not in without
