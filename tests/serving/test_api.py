"""The interface behind the pages: who may do what, and what happens to wrong requests."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy.exc import OperationalError

from rayrlhf.serving import sessions
from rayrlhf.serving.exchange import voted_records
from rayrlhf.serving.guard import MAX_BYTES
from rayrlhf.serving.sessions import COOKIE, Sessions, load_secret
from rayrlhf.serving.store import Store
from tests.serving.people import PEOPLE, SECRET, anonymous, section, sign_in

KEY = "0123456789abcdef"
TIERS = [[2], [0, 3], [1], [5], [4]]


def next_item(client: TestClient) -> dict[str, Any]:
    found: dict[str, Any] = client.get("/api/items/next").json()["item"]
    return found


def refused(answer: Any, status: int) -> str:
    """Return the message of an error, which has the one form."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"code", "message"}
    return str(error["message"])


def test_a_ranking_is_kept_in_the_order_of_the_file(client: TestClient, store: Store) -> None:
    item = next_item(client)
    body = {
        "key": KEY,
        "item": item["id"],
        "tiers": TIERS,
        "flags": {"4": ["violent", "hallucination"]},
        "note": "hard",
        "seconds": 12.5,
    }
    answer = client.post("/api/judgements", json=body)
    assert answer.json() == {"saved": True, "counted_before": False}
    row = store.rankings()[0]
    said = dict(zip(row.responses, row.ranks, strict=True))
    shown = item["responses"]
    assert [said[shown[k]] for k in (2, 0, 3, 1, 5, 4)] == [1, 2, 2, 3, 4, 5]
    flagged = dict(zip(row.responses, row.flags, strict=True))
    assert flagged[shown[4]] == ["hallucination", "violent"] and sum(map(len, row.flags)) == 2
    assert (row.labeller, row.note, row.seconds) == ("Ann", "hard", 12.5)
    assert [row.responses[k] for k in row.shown] == shown
    assert next_item(client)["id"] != item["id"]
    progress = client.get("/api/items/next").json()["progress"]
    assert progress == {"done": 1, "wanted": 9, "mine": 1}


def test_a_double_submit_counts_once(client: TestClient, store: Store) -> None:
    body = {"key": KEY, "item": next_item(client)["id"], "tiers": TIERS}
    assert client.post("/api/judgements", json=body).json()["counted_before"] is False
    assert client.post("/api/judgements", json=body).json()["counted_before"] is True
    replay = {**body, "key": KEY + "-again"}
    assert "judged this item already" in refused(client.post("/api/judgements", json=replay), 409)
    other = {**body, "tiers": [[0, 1, 2, 3, 4, 5]]}
    assert "another judgement" in refused(client.post("/api/judgements", json=other), 409)
    assert len(store.rankings()) == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tiers": [[2], [0, 3], [1], [5]]}, "leaves out E"),
        ({"tiers": []}, "leaves out A, B, C, D, E, F"),
        ({"tiers": [[2], [0, 3], [1], [5], [4, 2]]}, "names C twice"),
        ({"tiers": [[2], [0, 2], [1], [5], [4]]}, "leaves out D and names C twice"),
        ({"tiers": [[6], [0, 1, 2, 3, 4, 5]]}, "names completion 6"),
        ({"tiers": [["A"]]}, "tiers.0.0"),
        ({"tiers": TIERS, "skip": True}, "skipped item has no ranking"),
        ({"flags": {"0": ["rude"]}}, "no flag rude"),
        ({"flags": {"6": ["violent"]}}, "no completion 6"),
        ({"key": "short"}, "key"),
        ({"item": "x"}, "item"),
        ({"note": "x" * 2001}, "note"),
        ({"seconds": -1}, "seconds"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_wrong_judgement_is_refused(
    client: TestClient, store: Store, changes: dict[str, Any], says: str
) -> None:
    body = {"key": KEY, "item": next_item(client)["id"], "tiers": TIERS, **changes}
    assert says in refused(client.post("/api/judgements", json=body), 422)
    assert store.rankings() == []


def test_wrong_json_and_unknown_places(client: TestClient) -> None:
    refused(client.post("/api/judgements", content="{", headers={"content-type": "text/json"}), 422)
    refused(client.post("/api/judgements", json=[1]), 422)
    body = {"key": KEY, "item": "0" * 32, "tiers": TIERS}
    assert "no item" in refused(client.post("/api/judgements", json=body), 404)
    refused(client.get("/api/nothing"), 404)
    refused(client.get("/static/%2e%2e/api.py"), 404)
    refused(client.put("/api/judgements", json={}), 405)
    refused(client.get("/other"), 404)


def test_a_megabyte_is_refused(client: TestClient, store: Store) -> None:
    item = next_item(client)["id"]
    body = {"key": KEY, "item": item, "tiers": TIERS, "note": "x" * 2**20}
    assert "shorten" in refused(client.post("/api/judgements", json=body), 413)

    def pieces() -> Any:  # without a length in the head
        yield b'{"key": "'
        for _ in range(16):
            yield b"x" * 2**16

    head = {"content-type": "application/json"}
    assert "shorten" in refused(client.post("/api/battles", content=pieces(), headers=head), 413)
    assert store.rankings() == [] and MAX_BYTES < 2**20
    assert client.post("/api/judgements", json={**body, "note": ""}).status_code == 200


def test_nobody_works_without_signing_in(store: Store) -> None:
    with anonymous(store) as client:
        for method, place in (
            ("GET", "/api/session"),
            ("GET", "/api/items/next"),
            ("POST", "/api/judgements"),
            ("GET", "/api/battles"),
            ("POST", "/api/battles"),
            ("POST", f"/api/battles/{KEY}/vote"),
            ("GET", "/api/status"),
            ("GET", "/api/export/rank"),
        ):
            assert "sign in" in refused(client.request(method, place, json={}), 401)
        for body in (
            {"name": "Eve", "secret": SECRET},
            {"name": "Ann", "secret": SECRET[:-1]},
            {"name": "", "secret": ""},
            {"name": "Ann", "secret": "\u00e9"},
        ):
            assert "no labeller" in refused(client.post("/api/session", json=body), 401)
        client.cookies.set(COOKIE, "QW5u.1.00")
        refused(client.get("/api/status"), 401)


def test_a_cookie_is_out_of_reach_of_scripts_and_other_sites(store: Store) -> None:
    with anonymous(store) as client:
        answer = client.post("/api/session", json={"name": " ann ", "secret": SECRET})
        assert answer.json() == {"name": "Ann", "modes": ["rank", "arena"]}
        cookie = answer.headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite=strict" in cookie and SECRET not in cookie
        assert "Secure" not in cookie
        assert client.get("/api/session").json()["name"] == "Ann"
        head = {"origin": "https://elsewhere.example"}
        said = refused(client.delete("/api/session", headers=head), 403)
        assert "another site, https://elsewhere.example, than testserver" in said
        assert client.delete("/api/session", headers={"origin": "http://testserver"}).json() == {}
        refused(client.get("/api/session"), 401)
        body = {"name": "Ann", "secret": SECRET}
        behind_tls = client.post(
            "/api/session", json=body, headers={"origin": "https://testserver"}
        )
        assert "Secure" in behind_tls.headers["set-cookie"]


def test_cookies_of_others_and_of_old_times() -> None:
    mine, other = Sessions("a" * 20, PEOPLE), Sessions("b" * 20, PEOPLE)
    cookie = mine.issue("Ann")
    assert mine.read(cookie) == "Ann" and other.read(cookie) is None
    name, issued, signature = cookie.split(".")
    assert mine.read(f"Qm9i.{issued}.{signature}") is None
    assert mine.read(f"{name}.{int(issued) + 1}.{signature}") is None
    assert mine.read(None) is mine.read("") is mine.read("..") is mine.read("x") is None
    assert Sessions("a" * 20, ["Bob"]).read(cookie) is None  # taken off the list


def test_cookies_end(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Sessions("a" * 20, PEOPLE)
    cookie = mine.issue("Ann")
    later = time.time() + sessions.COOKIE_S + 10
    monkeypatch.setattr(time, "time", lambda: later)
    assert mine.read(cookie) is None


def test_the_secret_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(sessions.VARIABLE, raising=False)
    secret, made = load_secret(tmp_path)
    assert made and len(secret) >= 20
    assert load_secret(tmp_path) == (secret, False)
    assert (tmp_path / sessions.FILE).stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv(sessions.VARIABLE, "from the environment")
    assert load_secret(tmp_path) == ("from the environment", False)
    monkeypatch.setenv(sessions.VARIABLE, "short")
    with pytest.raises(ValueError, match="5 characters"):
        load_secret(tmp_path)


def test_the_arena_names_models_after_the_vote_only(client: TestClient, store: Store) -> None:
    assert client.get("/api/battles").json() == {"battle": None}
    answer = client.post("/api/battles", json={"key": KEY, "prompt": "Hello"})
    battle = answer.json()["battle"]
    assert set(battle) == {"key", "prompt", "responses"}
    assert client.get("/api/battles").json()["battle"] == battle
    assert client.post("/api/battles", json={"key": KEY, "prompt": "Hello"}).json() == answer.json()
    assert "another prompt" in refused(
        client.post("/api/battles", json={"key": KEY, "prompt": "Bye"}), 409
    )
    vote = {"key": "v" * 16, "vote": "b"}
    decided = client.post(f"/api/battles/{KEY}/vote", json=vote).json()
    assert decided["vote"] == "b" and decided["counted_before"] is False
    for name, response in zip(decided["models"], battle["responses"], strict=True):
        assert response.endswith(f"called {name[::-1]}")
    assert client.post(f"/api/battles/{KEY}/vote", json=vote).json()["counted_before"] is True
    replay = client.post(f"/api/battles/{KEY}/vote", json={"key": "w" * 16, "vote": "b"})
    assert "voted" in refused(replay, 409)
    refused(client.post(f"/api/battles/{KEY}/vote", json={"key": KEY, "vote": "c"}), 422)
    refused(client.post(f"/api/battles/{'x' * 16}/vote", json=vote), 404)
    assert len(store.votes()) == 1
    assert "messages" not in voted_records(store)[0]


def test_votes_on_answers_to_chats_are_comparisons_of_chats(store: Store) -> None:
    with anonymous(store, prompt_format="chat") as client:
        sign_in(client, "Ann")
        client.post("/api/battles", json={"key": KEY, "prompt": "Hello"})
        client.post(f"/api/battles/{KEY}/vote", json={"key": "v" * 16, "vote": "a"})
    (record,) = voted_records(store)
    assert record["messages"] == [{"role": "user", "content": "Hello"}]
    assert record["prompt"] == "Hello" and record["ranks"] == [1, 2]


def test_sides_and_models_are_drawn(client: TestClient, store: Store) -> None:
    for i in range(40):
        key = f"battle-number-{i:04}"
        client.post("/api/battles", json={"key": key, "prompt": "Hello"})
        client.post(f"/api/battles/{key}/vote", json={"key": key, "vote": "tie"})
    pairs = {tuple(row.models) for row in store.votes()}
    assert len(pairs) == 6 and all(left != right for left, right in pairs)


def test_a_prompt_that_a_model_cannot_take_is_kept_by_nobody(
    client: TestClient, store: Store
) -> None:
    answer = client.post("/api/battles", json={"key": KEY, "prompt": "x" * 1001})
    assert "1000 fit" in refused(answer, 422)
    refused(client.post("/api/battles", json={"key": KEY, "prompt": ""}), 422)
    gone = client.post("/api/battles", json={"key": KEY, "prompt": "silence"})
    assert "ask again" in refused(gone, 424)
    assert store.open_battle("Ann") is None


def test_status_tells_progress_agreement_and_models(client: TestClient, store: Store) -> None:
    with anonymous(store) as other:
        sign_in(other, "Bob")
        for who in (client, other):
            item = next_item(who)
            best_first = sorted(range(6), key=lambda k: str(item["responses"][k]))
            body = {"key": KEY, "item": item["id"], "tiers": [[k] for k in best_first]}
            assert who.post("/api/judgements", json=body).status_code == 200
    client.post("/api/battles", json={"key": KEY, "prompt": "Hello"})
    client.post(f"/api/battles/{KEY}/vote", json={"key": KEY, "vote": "a"})
    found = client.get("/api/status").json()
    assert found["queue"] == {"items": 3, "wanted": 9, "done": 2}
    assert found["agreement"] == {"items": 1, "alpha": 1.0, "same_order": 1.0, "pairs": 15}
    assert [(p["name"], p["ranked"], p["votes"]) for p in found["labellers"]] == [
        ("Ann", 1, 1),
        ("Bob", 1, 0),
        ("Cem", 0, 0),
    ]
    assert [row["win_rate"] for row in found["arena"]] == [1.0, 0.0]
    exported = client.get("/api/export/rank")
    assert "attachment" in exported.headers["content-disposition"]
    assert json.loads(exported.text)["labellers"] == ["Ann", "Bob"]


def test_every_answer_has_the_headers(client: TestClient) -> None:
    for place in ("/rank", "/static/style.css", "/api/status", "/api/nothing", "/"):
        head = client.get(place, follow_redirects=False).headers
        assert head["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
        assert "unsafe" not in head["content-security-policy"]
        assert head["x-content-type-options"] == "nosniff"
    assert client.get("/api/status").headers["cache-control"] == "no-store"
    assert client.get("/", follow_redirects=False).headers["location"] == "/rank"


def test_the_pages_hold_no_script_of_their_own_and_nothing_from_elsewhere(
    client: TestClient,
) -> None:
    for page in ("rank", "arena", "status", "signin"):
        text = client.get(f"/{page}").text
        assert text.startswith("<!doctype html>") and '<html lang="en">' in text
        assert "://" not in text and "<style" not in text and " on" + "click" not in text
        assert text.count("<script") == text.count('<script type="module" src="/static/')
    for file in (Path(sessions.__file__).parent / "page").iterdir():
        text = file.read_text(encoding="utf-8")
        assert "innerHTML" not in text and "eval(" not in text
        assert "https://" not in text


def test_a_database_that_does_not_answer_is_503(
    client: TestClient, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"key": KEY, "item": next_item(client)["id"], "tiers": TIERS}

    def fail(*_: object) -> bool:
        raise OperationalError("INSERT", {}, Exception("disk full"))

    with monkeypatch.context() as broken:
        broken.setattr(Store, "judge", fail)
        assert "nothing is lost" in refused(client.post("/api/judgements", json=body), 503)
    assert client.post("/api/judgements", json=body).json()["counted_before"] is False


def test_modes_follow_the_recipe(store: Store) -> None:
    with anonymous(store, items=None) as client:
        assert client.get("/", follow_redirects=False).headers["location"] == "/arena"
        sign_in(client, "Ann")
        assert client.get("/api/session").json()["modes"] == ["arena"]
        refused(client.get("/api/items/next"), 404)
    assert section().ranks
