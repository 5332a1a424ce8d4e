"""A reward from an HTTP endpoint that is slow, late, wrong, or gone for a while."""

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

from rayrlhf.config import RecipeError, RewardSource
from rayrlhf.external import endpoints
from rayrlhf.external.endpoints import EndpointDown
from rayrlhf.rl import groups, scoring
from rayrlhf.rl.ranks import RoleSettings
from rayrlhf.rl.reward_endpoint import EndpointScorer
from rayrlhf.rl.rollout import RolloutWorker
from rayrlhf.rl.scoring import RewardWorker, as_scores
from rayrlhf.rl.waiting import share
from tests.external.scorer import Answer, Scorer, lengths, serving
from tests.rl.inline import PROMPTS, InlineHandle, SmallEngine

Make = Callable[..., RoleSettings]


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "backoff_s", lambda attempt: 0.01 * 2**attempt)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def endpoint(server: Scorer, **keys: Any) -> EndpointScorer:
    reward = RewardSource(url=server.url, **keys)
    return EndpointScorer(f"ppo.rewards.0.url={server.url}", server.url, reward)


TEXTS = [f"{i:0{i}d}" for i in range(1, 11)]


def test_requests_are_cut_bounded_and_put_together_in_order() -> None:
    def slowly(body: dict[str, Any], count: int) -> Answer:
        time.sleep(0.1 if count % 2 else 0.02)  # they come back in another order
        return lengths(body, count)

    with serving(slowly) as server:
        scorer = endpoint(server, request_size=2, max_pending=2)
        assert scorer.submit(TEXTS, TEXTS).result(timeout=20) == [len(text) for text in TEXTS]
        assert sorted(len(body["responses"]) for body in server.bodies) == [2] * 5
        assert all(body["prompts"] == body["responses"] for body in server.bodies)
        assert server.most_pending == 2


@pytest.mark.parametrize("code", [429, 500, 503])
def test_an_error_that_passes_is_asked_again(code: int) -> None:
    def first_down(body: dict[str, Any], count: int) -> Answer:
        return (code, {"detail": "busy"}) if count < 2 else lengths(body, count)

    with serving(first_down) as server:
        scorer = endpoint(server)
        assert scorer.submit(TEXTS, TEXTS).result(timeout=20) == [len(text) for text in TEXTS]
        assert len(server.bodies) == 3


def test_an_error_that_stays_ends_in_what_was_answered() -> None:
    with serving(lambda *_: (503, {"detail": "no GPU is free"})) as server:
        answer = endpoint(server, retries=2, request_size=3).submit(TEXTS, TEXTS)
        said = r"url=http://127.*answered 503 Service Unavailable.*no GPU is free.*\(asked 3 times"
        with pytest.raises(EndpointDown, match=said):
            answer.result(timeout=20)


def test_a_slow_answer_is_late_and_asked_for_again() -> None:
    def first_slow(body: dict[str, Any], count: int) -> Answer:
        time.sleep(3.0 if count == 0 else 0)
        return lengths(body, count)

    with serving(first_slow) as server:
        assert endpoint(server, timeout_s=1.5).submit(["a"], ["bb"]).result(timeout=20) == [2]
        assert len(server.bodies) == 2
        # The first one is the slow one of a new count.
        server.bodies.clear()
        late = endpoint(server, timeout_s=0.2, retries=0).submit(["a"], ["b"])
        with pytest.raises(EndpointDown, match=r"did not answer within timeout_s=0\.2 s"):
            late.result(timeout=20)


def test_a_dripping_answer_is_late_as_a_whole() -> None:
    class Drip(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.end_headers()
            for _ in range(200):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.05)

        def log_message(self, *_: Any) -> None:
            """Be silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Drip)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/"
    scorer = EndpointScorer("key", url, RewardSource(url=url, timeout_s=0.3, retries=0))
    begun = time.monotonic()
    with pytest.raises(EndpointDown, match="did not answer within"):
        scorer.submit(["a"], ["b"]).result(timeout=20)
    assert time.monotonic() - begun < 5  # of 10
    server.shutdown()
    server.server_close()


def test_nobody_there_is_said_before_the_run() -> None:
    with serving(lengths) as server:
        url = server.url
    scorer = EndpointScorer("ppo.rewards.0.url=u", url, RewardSource(url=url, retries=1))
    said = r"there is no answer \(ConnectionRefusedError.*asked 2 times.*when its worker starts"
    with pytest.raises(RecipeError, match=said):
        scorer.try_out()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((404, {"detail": "no such path"}), 'it answered 404 Not Found: \'{"detail": "no such'),
        ((401, {}), "set headers_env to a variable with the header"),
        ((302, {}), "set url to where it is, http://elsewhere/score"),
        ((200, b"<html>hello</html>"), "its answer is not JSON: '<html>hello</html>'"),
        ((200, {"score": [1.0]}), 'its answer has no list "scores": \'{"score": [1.0]}\''),
        ((200, [1.0]), 'its answer has no list "scores"'),
        ((200, {"scores": [1.0, 2.0]}), "it gave 2 scores for 1 responses"),
    ],
)
def test_a_wrong_answer_is_shown_and_not_asked_for_again(answer: Answer, said: str) -> None:
    with serving(lambda *_: answer) as server:
        with pytest.raises(RecipeError) as error:
            endpoint(server).try_out()
        assert said in str(error.value)
        assert str(error.value).startswith(f"ppo.rewards.0.url={server.url}")
        assert len(server.bodies) == 1


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ([1.0, float("nan")], "gave nan for response 2 of 2"),
        ([1.0, None], "gave null for response 2 of 2"),
    ],
)
def test_what_is_no_number_is_refused(scores: list[Any], said: str) -> None:
    with serving(lambda *_: (200, {"scores": scores})) as server:
        answer = endpoint(server).submit(["a", "b"], ["c", "d"])
        with pytest.raises(RecipeError, match=said):
            as_scores("key", answer.result(timeout=20), 2)


def test_headers_come_from_a_variable_and_are_shown_nowhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with serving(lengths) as server:
        monkeypatch.delenv("SCORER_HEADERS", raising=False)
        with pytest.raises(RecipeError, match="headers_env=SCORER_HEADERS is not set"):
            endpoint(server, headers_env="SCORER_HEADERS")
        monkeypatch.setenv("SCORER_HEADERS", "Bearer secret")
        with pytest.raises(RecipeError, match="not a JSON object of strings") as error:
            endpoint(server, headers_env="SCORER_HEADERS")
        assert "Bearer secret" not in str(error.value)
        monkeypatch.setenv("SCORER_HEADERS", json.dumps({"Authorization": "Bearer secret"}))
        endpoint(server, headers_env="SCORER_HEADERS").try_out()
        assert server.headers[0]["Authorization"] == "Bearer secret"


def rollout_of(own: RoleSettings) -> Any:
    worker = RolloutWorker(own)
    worker.engine = SmallEngine(own.model_path)  # type: ignore[assignment]
    return worker.generate(PROMPTS[:16], 0, step=0)


def test_the_worker_asks_once_at_its_start_and_then_for_every_response(
    settings: Make, inline_ray: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """And says who keeps it waiting."""

    def slowly(body: dict[str, Any], count: int) -> Answer:
        time.sleep(0.25 * bool(count))
        return lengths(body, count)

    monkeypatch.setattr(scoring, "LINE_EVERY_S", 0.1)
    with serving(slowly) as server:
        own = settings(rewards=[{"url": server.url, "request_size": 4, "name": "length"}])
        rollout = rollout_of(own)
        worker = RewardWorker(own)
        worker.start()
        assert [body["responses"] for body in server.bodies] == [[" good."]]
        group = groups.RewardGroup([InlineHandle(worker)], deadline_s=60)
        scores, parts = group.score(share(rollout), own.ppo.rewards).wait()
        assert len(server.bodies) == 1 + 4
    tokens = torch.tensor([float(sum(id > 1 for id in row)) for row in rollout.responses()])
    assert torch.equal(scores, tokens)
    assert parts == {"reward/length": pytest.approx(float(tokens.mean()))}
    assert f"waiting for ppo.rewards.0.url={server.url}, for" in capsys.readouterr().out


def test_what_an_endpoint_owes_has_the_default_score(
    settings: Make, inline_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    def without_third(body: dict[str, Any], count: int) -> Answer:
        return (500, {}) if count == 3 else lengths(body, count)  # 0 is the one before the run

    cut = {"request_size": 4, "max_pending": 1, "retries": 0}
    with serving(without_third) as server:
        own = settings(rewards=[{"url": server.url, "name": "length", "default_score": 0.5, **cut}])
        rollout = rollout_of(own)
        worker = RewardWorker(own)
        worker.start()
        group = groups.RewardGroup([InlineHandle(worker)], deadline_s=60)
        scores, parts = group.score(share(rollout), own.ppo.rewards).wait()
    tokens = torch.tensor([float(sum(id > 1 for id in row)) for row in rollout.responses()])
    tokens[8:12] = 0.5
    assert torch.equal(scores, tokens)
    assert parts["reward/length_missing"] == 0.25
    said = "(asked 1 times), for 4 responses: default_score=0.5 in place of their scores; the first"
    assert said in capsys.readouterr().out


def test_an_endpoint_that_goes_down_ends_the_step_with_its_name(settings: Make) -> None:
    def once(body: dict[str, Any], count: int) -> Answer:
        return lengths(body, count) if count == 0 else (500, {})

    with serving(once) as server:
        own = settings(rewards=[{"url": server.url, "retries": 1}])
        worker = RewardWorker(own)
        worker.start()
        with pytest.raises(EndpointDown, match=r"ppo\.rewards\.0\.url=.*answered 500"):
            worker.score(rollout_of(own))
