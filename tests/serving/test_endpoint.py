"""The endpoint over HTTP with engines that answer at once: tokens, limits, errors, A/B, votes."""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text

from rayrlhf.data.records import read_records
from rayrlhf.serving.database import Database
from rayrlhf.serving.endpoint import create_app
from rayrlhf.serving.exchange import voted_records, write
from rayrlhf.serving.frontend import Frontend
from rayrlhf.serving.store import Store
from rayrlhf.serving.votes import Votes
from tests.serving.engines import ASK, TOKEN, FakeEngine, FakeScorer, endpoint, save_model

TWO = {"a": {"path": "a", "share": 3}, "b": {"path": "b"}}


def client_of(frontend: Frontend, **options: Any) -> TestClient:
    head = {"authorization": f"Bearer {TOKEN}"}
    return TestClient(create_app(frontend, TOKEN), headers=head, **options)


def engine_of(frontend: Frontend, model: str = "a") -> FakeEngine:
    engine = frontend.engines[model][0]
    assert isinstance(engine, FakeEngine)
    return engine


@pytest.fixture
def frontend(tmp_path: Path) -> Frontend:
    limits = {"max_body_bytes": 2000, "max_tokens": 100, "max_responses": 3, "timeout_s": 0.5}
    return endpoint(tmp_path, limits={**limits, "max_concurrent": 4})


@pytest.fixture
def client(frontend: Frontend) -> Iterator[TestClient]:
    with client_of(frontend) as found:
        yield found


def refusal(answer: httpx.Response) -> tuple[int, str, str | None]:
    """Return status, code and param of an error, which has OpenAI's form."""
    assert answer.headers["content-type"] == "application/json", answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return answer.status_code, error["code"], error["param"]


@pytest.mark.parametrize("head", [None, "", "Bearer", "Bearer wrong", f"Basic {TOKEN}", TOKEN])
@pytest.mark.parametrize(
    "place",
    ["GET /v1/models", "POST /v1/chat/completions", "POST /admin/weights", "GET /metrics",
     "GET /openapi.json", "POST /v1/score", "GET /nowhere", "OPTIONS /v1/models"],
)  # fmt: skip
def test_nothing_without_the_token(frontend: Frontend, head: str | None, place: str) -> None:
    method, path = place.split()
    with TestClient(create_app(frontend, TOKEN)) as client:
        headers = {} if head is None else {"authorization": head}
        answer = client.request(method, path, headers=headers)
    assert refusal(answer) == (401, "invalid_api_key", None)
    assert not engine_of(frontend).asked


def test_healthz_is_open_and_says_when_a_model_is_down(frontend: Frontend) -> None:
    with TestClient(create_app(frontend, TOKEN)) as client:
        assert client.get("/healthz").status_code == 200
        engine_of(frontend).version = ""
        assert refusal(client.get("/healthz"))[0] == 503


def test_an_answer_names_model_and_version(client: TestClient) -> None:
    answer = client.post("/v1/chat/completions", json=ASK)
    assert answer.status_code == 200
    version = answer.json()["system_fingerprint"]
    assert answer.headers["x-rayrlhf-model"] == "a"
    assert answer.headers["x-rayrlhf-version"] == version == "a-v1-00000000"
    assert [each["id"] for each in client.get("/v1/models").json()["data"]] == ["toy", "a"]
    assert client.get("/v1/models/a").json()["object"] == "model"
    assert refusal(client.get("/v1/models/b"))[:2] == (404, "not_found")


def test_a_stream_passes_as_it_is(client: TestClient) -> None:
    answer = client.post("/v1/chat/completions", json={**ASK, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-rayrlhf-version"] == "a-v1-00000000"
    assert answer.text.endswith("data: [DONE]\n\n") and "two" in answer.text


def test_long_bodies_are_refused_with_and_without_a_length(
    client: TestClient, frontend: Frontend
) -> None:
    long = json.dumps({**ASK, "extra": "x" * 2000}).encode()
    assert refusal(client.post("/v1/completions", content=long))[:2] == (413, "request_too_large")
    pieces = (long[i : i + 100] for i in range(0, len(long), 100))
    assert refusal(client.post("/v1/completions", content=pieces))[0] == 413
    assert refusal(client.post("/v1/score", content=(long for _ in range(1))))[0] == 413
    assert not engine_of(frontend).asked


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"max_tokens": 101}, "max_tokens"),
        ({"max_completion_tokens": 101}, "max_completion_tokens"),
        ({"max_tokens": 51, "n": 2}, "max_tokens"),
        ({"n": 101}, "n"),
        ({"n": 0}, "n"),
        ({"n": "2"}, "n"),
        ({"n": True}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"stream": "yes"}, "stream"),
        ({"user": 7}, "user"),
    ],
)
def test_what_asks_for_too_much_is_refused(
    client: TestClient, body: dict[str, Any], param: str
) -> None:
    answer = client.post("/v1/chat/completions", json={**ASK, **body})
    assert refusal(answer) == (422, "invalid_value", param)


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({"prompt": "x"}, 16),
        ({"prompt": ["x"] * 10}, 10),
        ({"prompt": [1, 2, 3], "max_tokens": 100}, 100),
        ({"prompt": [[1, 2], [3]], "max_tokens": 50}, 50),
        ({"prompt": [[1, 2], [3]], "max_tokens": 51}, None),
        ({"prompt": ["x"] * 101}, None),
    ],
)
def test_tokens_of_all_prompts_count(
    client: TestClient, frontend: Frontend, body: dict[str, Any], tokens: int | None
) -> None:
    answer = client.post("/v1/completions", json={"model": "a", **body})
    assert answer.status_code == (200 if tokens else 422)
    asked = engine_of(frontend).asked
    assert [each["max_tokens"] for each in asked] == ([tokens] if tokens else [])


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 1900])
def test_a_body_that_is_no_object(client: TestClient, content: bytes) -> None:
    assert refusal(client.post("/v1/completions", content=content))[:2] == (422, "invalid_value")


def test_other_paths_and_methods(client: TestClient) -> None:
    assert refusal(client.get("/v1/nothing"))[:2] == (404, "not_found")
    assert refusal(client.get("/v1/completions"))[:2] == (405, "method_not_allowed")
    assert refusal(client.post("/v1/completions", json={**ASK, "model": "c"})) == (
        404,
        "not_found",
        "model",
    )


def test_a_late_answer_is_given_up(client: TestClient, frontend: Frontend) -> None:
    engine = engine_of(frontend)
    engine.wait_s = 60
    assert refusal(client.post("/v1/completions", json={"prompt": "x"}))[:2] == (504, "timeout")
    assert engine.was_cancelled
    late = client.post("/v1/completions", json={"prompt": "x", "stream": True})
    assert late.status_code == 200 and '"code": "timeout"' in late.text.splitlines()[-2]


def test_too_many_at_a_time(frontend: Frontend) -> None:
    engine_of(frontend).wait_s = 0.2

    async def ask_all() -> list[httpx.Response]:
        transport = httpx.ASGITransport(create_app(frontend, TOKEN))
        head = {"authorization": f"Bearer {TOKEN}"}
        async with httpx.AsyncClient(
            transport=transport, headers=head, base_url="http://x"
        ) as client:
            send = [client.post("/v1/completions", json={"prompt": "x"}) for _ in range(7)]
            answers = await asyncio.gather(*send)
            return [*answers, await client.post("/v1/completions", json={"prompt": "x"})]

    answers = asyncio.run(ask_all())
    assert Counter(answer.status_code for answer in answers) == {200: 5, 429: 3}
    assert answers[-1].status_code == 200
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refusal(refused)[1] == "rate_limit_exceeded" and refused.headers["retry-after"] == "1"


def test_a_model_that_is_down(client: TestClient, frontend: Frontend) -> None:
    engine_of(frontend).version = ""
    assert refusal(client.post("/v1/completions", json={"prompt": "x"}))[:2] == (503, "unavailable")


def test_an_engine_that_dies_in_a_stream_says_so(client: TestClient, frontend: Frontend) -> None:
    engine = engine_of(frontend)

    async def die() -> None:
        from rayrlhf.serving.refusals import Refusal

        raise Refusal(503, "the model went down while it was answering")

    engine._work = die  # type: ignore[method-assign]
    answer = client.post("/v1/completions", json={"prompt": "x", "stream": True})
    assert answer.status_code == 200 and '"code": "unavailable"' in answer.text


def test_a_fault_of_the_server_has_the_form_too(frontend: Frontend) -> None:
    async def fail() -> None:
        raise KeyError("a fault")

    engine_of(frontend)._work = fail  # type: ignore[method-assign]
    with client_of(frontend, raise_server_exceptions=False) as client:
        answer = client.post("/v1/completions", json={"prompt": "x"})
        assert refusal(answer)[:2] == (500, "internal_error") and "a fault" not in answer.text


def test_shares_decide_and_a_user_stays(tmp_path: Path) -> None:
    frontend = endpoint(tmp_path, models=TWO)
    frontend.rng = random.Random(0)
    drawn = Counter(frontend.choose("toy", None) for _ in range(4000))
    assert drawn["a"] / 4000 == pytest.approx(0.75, abs=0.03)
    users = {name: frontend.choose(None, name) for name in map(str, range(2000))}
    assert Counter(users.values())["a"] / 2000 == pytest.approx(0.75, abs=0.04)
    assert all(frontend.choose("toy", name) == model for name, model in users.items())
    with client_of(frontend) as client:
        for model in ("a", "b"):
            answer = client.post("/v1/chat/completions", json={**ASK, "model": model})
            assert answer.headers["x-rayrlhf-model"] == model
            assert answer.json()["system_fingerprint"].startswith(f"{model}-v1")


def test_the_engine_with_least_to_do_answers(tmp_path: Path) -> None:
    frontend = endpoint(tmp_path, replicas=3)
    busy, idle, dead = frontend.engines["a"]
    busy.ongoing, dead.version = 2, ""
    assert frontend.engine("a") is idle


def test_scores(client: TestClient) -> None:
    answer = client.post("/v1/score", json={"prompt": "x", "responses": ["a", "abc"]})
    assert answer.json() == {"model": "reward", "scores": [1.0, 3.0]}
    for responses in ([], ["a"] * 4, ["x" * 1001], "text", [1]):
        body = {"prompt": "x", "responses": responses}
        assert refusal(client.post("/v1/score", json=body))[:2] == (422, "invalid_value")


def test_scores_of_answers_in_a_chat(frontend: Frontend, client: TestClient) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    answer = client.post("/v1/score", json={"prompt": turns, "responses": ["a"]})
    assert answer.json()["scores"] == [1.0]
    assert isinstance(frontend.scorer, FakeScorer)
    assert frontend.scorer.asked == [{"messages": turns}]
    for wrong in ([], [{"role": "robot", "content": "a"}], [{"role": "user"}], ["hi"]):
        body = {"prompt": wrong, "responses": ["a"]}
        assert refusal(client.post("/v1/score", json=body))[:2] == (422, "invalid_value")
    body = {"prompt": [{"role": "robot", "content": "a"}], "responses": ["a"]}
    assert "'assistant'" in client.post("/v1/score", json=body).json()["error"]["message"]


def test_scores_without_a_reward_model(frontend: Frontend) -> None:
    frontend.scorer = None
    with client_of(frontend) as client:
        body = {"prompt": "x", "responses": ["a"]}
        assert refusal(client.post("/v1/score", json=body))[0] == 404


def test_new_weights_go_live(tmp_path: Path) -> None:
    frontend = endpoint(tmp_path, replicas=2)
    new = save_model(tmp_path / "new", value=1.0)
    with client_of(frontend) as client:
        done = client.post("/admin/weights", json={"folder": str(new)}).json()
        assert done["version"] == 2 and done["fingerprint"].startswith("a-v2-")
        assert client.get("/admin/weights").json() == [done]
        answer = client.post("/v1/chat/completions", json=ASK)
        assert answer.headers["x-rayrlhf-version"] == done["fingerprint"]
        # What is live outlives the folder that it came from, and a replica finds it again.
        (new / "model.safetensors").unlink()
        live = frontend.weights.of("a")
        assert live.version == 2 and (Path(live.folder) / "model.safetensors").is_file()
        assert 'rayrlhf_serve_weights_version{model="a"} 2.0' in client.get("/metrics").text
    assert all(len(engine.loaded) == 1 for engine in frontend.engines["a"])  # type: ignore[attr-defined]


def test_weights_that_cannot_go_live(
    client: TestClient, frontend: Frontend, tmp_path: Path
) -> None:
    other = save_model(tmp_path / "other", architectures=["GPT2LMHeadModel"])
    for folder in (other, tmp_path / "nowhere", tmp_path, "\0"):
        answer = client.post("/admin/weights", json={"folder": str(folder)})
        assert refusal(answer) == (422, "invalid_value", "folder"), answer.text
    body = {"folder": str(save_model(tmp_path / "new")), "model": "z"}
    assert refusal(client.post("/admin/weights", json=body))[0] == 404
    engine = engine_of(frontend)
    for error, status in ((TimeoutError(), 504), (RuntimeError("broken"), 503)):
        engine.load_error = error
        assert refusal(client.post("/admin/weights", json={**body, "model": "a"}))[0] == status
    assert frontend.weights.of("a").version == 1
    assert not list((tmp_path / "serve" / "weights").iterdir())


def test_an_engine_that_did_not_get_the_new_weights_starts_again(tmp_path: Path) -> None:
    frontend = endpoint(tmp_path, replicas=2)
    first, second = frontend.engines["a"]
    assert isinstance(first, FakeEngine) and isinstance(second, FakeEngine)
    second.load_error = TimeoutError()
    body = {"folder": str(save_model(tmp_path / "new", value=1.0))}
    with client_of(frontend) as client:
        assert refusal(client.post("/admin/weights", json=body))[0] == 504
    assert (first.restarts, second.restarts) == (0, 1)
    assert frontend.weights.of("a").version == 2


def test_an_engine_that_came_up_with_the_old_weights_gets_the_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayrlhf.serving.frontend.LOOK_EVERY_S", 0.02)
    frontend = endpoint(tmp_path, replicas=2)
    first, second = frontend.engines["a"]
    assert isinstance(first, FakeEngine) and isinstance(second, FakeEngine)
    old, record = first.version, tmp_path / "serve" / "live.json"
    with client_of(frontend) as client:
        client.post("/admin/weights", json={"folder": str(save_model(tmp_path / "new"))})
        new = first.version
        time.sleep(0.2)
        assert len(first.loaded) == len(second.loaded) == 1
        first.version = old  # as a replica has it that read what is live before the change
        until(lambda: first.version == new)
        assert (len(first.loaded), len(second.loaded)) == (2, 1)
        kept = record.read_text()
        record.write_text("{}")  # what cannot be read now is read again
        time.sleep(0.2)
        record.write_text(kept)
        assert client.get("/healthz").status_code == 200
        first.version = old
        until(lambda: first.version == new)
    assert (first.restarts, second.restarts) == (0, 0)


def until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_metrics(client: TestClient) -> None:
    client.post("/v1/chat/completions", json=ASK)
    client.post("/v1/chat/completions", content=b"{")
    client.get("/somewhere/else")
    text = client.get("/metrics").text
    count = 'rayrlhf_serve_requests_total{path="/v1/chat/completions",status='
    assert f'{count}"200"}} 1.0' in text and f'{count}"422"}} 1.0' in text
    assert 'path="other",status="404"' in text and "somewhere" not in text
    assert 'rayrlhf_serve_answers_total{model="a"} 1.0' in text


def test_votes_become_comparisons(tmp_path: Path, store: Store) -> None:
    frontend = endpoint(tmp_path, models=TWO, votes=Votes(store, max_votable=3))
    with client_of(frontend) as client:

        def ask(model: str, **changes: Any) -> str:
            body = {**ASK, "model": model, **changes}
            return str(client.post("/v1/chat/completions", json=body).json()["id"])

        def vote(names: list[str], winner: str | None, user: str | None = None) -> httpx.Response:
            body = {"completions": names, "winner": winner, "user": user}
            return client.post("/v1/votes", json=body)

        pair = [ask("a"), ask("b")]
        assert vote(pair, pair[1], "ann").json() == {"saved": True, "counted_before": False}
        assert vote(pair[::-1], pair[1], "ann").json()["counted_before"]
        assert refusal(vote(pair, pair[0], "ann"))[:2] == (409, "conflict")
        assert vote(pair, None, "x" * 200).status_code == 200
        assert refusal(vote([pair[0], pair[0]], pair[0]))[0] == 422
        assert refusal(vote(pair, "another"))[0] == 422
        other = ask("a", messages=[{"role": "user", "content": "another prompt"}])
        assert refusal(vote([pair[0], other], other))[0] == 422
        body = {**ASK, "model": "b", "stream": True}
        streamed = client.post("/v1/chat/completions", json=body).text
        name = json.loads(streamed.splitlines()[0].removeprefix("data: "))["id"]
        assert vote([pair[1], name], name).status_code == 200
        assert refusal(vote(pair, pair[0]))[0] == 404  # the oldest answer had to go
    records = voted_records(store)
    assert [record["prompt"] for record in records] == ["hello"] * 3
    first = records[0]
    assert first["labellers"] == ["ann"] and sorted(first["ranks"]) == [1, 2]
    best = first["responses"][first["ranks"].index(1)]
    assert best == "b-v1-00000000" == first["models"][first["ranks"].index(1)]
    assert records[1]["ranks"] == [1, 1]
    assert "one two" in records[2]["responses"]
    assert all(record["messages"] == ASK["messages"] for record in records)


def test_votes_on_chats_of_several_turns(tmp_path: Path, store: Store) -> None:
    frontend = endpoint(tmp_path, votes=Votes(store, max_votable=9))
    turns = [{"role": "system", "content": "Be kind."}, *ASK["messages"]]  # type: ignore[misc]
    with client_of(frontend) as client:

        def ask(**changes: Any) -> str:
            body = {**ASK, "messages": turns, **changes}
            return str(client.post("/v1/chat/completions", json=body).json()["id"])

        def vote(one: str, other: str) -> httpx.Response:
            return client.post("/v1/votes", json={"completions": [one, other], "winner": one})

        pair = ask(), ask()
        assert vote(*pair).status_code == 200
        for changes in (
            {"tools": [{"type": "function", "function": {"name": "f"}}]},
            {"chat_template": "{{ messages }}"},
            {"reasoning_effort": "low"},
            {"add_generation_prompt": False},
            {"messages": [*turns, {"role": "assistant", "content": "Well,"}]},
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]},
            {"messages": [{"role": "user", "content": ""}]},
        ):
            assert refusal(vote(pair[0], ask(**changes)))[0] == 404
    write(tmp_path / "votes.jsonl", voted_records(store))
    (record,) = read_records(tmp_path / "votes.jsonl", "comparison")
    assert record["messages"] == turns
    assert record["prompt"] == "system: Be kind.\n\nuser: hello"


@pytest.mark.parametrize("how", ["broken off", "echo"])
def test_what_cannot_be_voted_on(tmp_path: Path, store: Store, how: str) -> None:
    frontend = endpoint(tmp_path, votes=Votes(store, max_votable=9))
    ask = {"model": "a", "prompt": "hello"}
    with client_of(frontend) as client:

        def stream(**changes: Any) -> str:
            done = client.post("/v1/completions", json={**ask, "stream": True, **changes})
            return str(json.loads(done.text.splitlines()[0].removeprefix("data: "))["id"])

        good = stream()
        if how == "broken off":
            engine_of(frontend).stream_error = "the model fell over"
        bad = stream(echo=how == "echo")
        body = {"completions": [good, bad], "winner": good}
        assert refusal(client.post("/v1/votes", json=body))[0] == 404


def test_a_database_that_does_not_answer(tmp_path: Path, database: Database, store: Store) -> None:
    frontend = endpoint(tmp_path, votes=Votes(store, max_votable=9))
    with client_of(frontend) as client:
        ask = {"model": "a", "prompt": "hello"}
        pair = [client.post("/v1/completions", json=ask).json()["id"] for _ in range(2)]
        body = {"completions": pair, "winner": pair[0]}
        with database.writing() as connection:
            connection.execute(text("ALTER TABLE battles RENAME TO elsewhere"))
        assert refusal(client.post("/v1/votes", json=body))[0] == 503
        with database.writing() as connection:
            connection.execute(text("ALTER TABLE elsewhere RENAME TO battles"))
        assert client.post("/v1/votes", json=body).status_code == 200


def test_votes_are_off(client: TestClient) -> None:
    body = {"completions": ["a", "b"], "winner": "a"}
    assert refusal(client.post("/v1/votes", json=body))[0] == 404
