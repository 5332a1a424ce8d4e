"""The pages and the JSON interface behind them, as a FastAPI application that needs no Ray.

    POST /api/session {name, secret}      sign in; GET: who am I; DELETE: sign out
    GET  /api/items/next                  the item to rank now, and progress
    POST /api/judgements                  a ranking as tiers, best first, or a skip
    POST /api/battles {key, prompt}       two answers; GET: the open pair
    POST /api/battles/{key}/vote          a vote; answers with the names
    GET  /api/status, /api/export/{mode}  progress and agreement; comparison records

The order in which a person sees the completions is the server's secret: requests and answers name
them by their place on the page.
"""

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, PlainTextResponse, RedirectResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt

from rayrlhf.config import ArenaConfig, LabelConfig
from rayrlhf.serving import guard
from rayrlhf.serving.arena import Ask, fight
from rayrlhf.serving.exchange import lines, ranked_records, voted_records
from rayrlhf.serving.sessions import COOKIE, COOKIE_S, Sessions
from rayrlhf.serving.status import status
from rayrlhf.serving.store import Battle, Conflict, Judgement, Store, shown_order

PAGES = Path(__file__).parent / "page"
LETTERS = "ABCDEFGHI"
Key = Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{16,64}$")]


class Body(BaseModel):
    """A request's JSON object; unknown fields are an error."""

    model_config = ConfigDict(extra="forbid")


class SignIn(Body):
    """Who wants to work."""

    name: Annotated[str, Field(max_length=100)]
    secret: Annotated[str, Field(max_length=500)]


class JudgementBody(Body):
    """A ranking, or a skip; completions are named by their place on the page, from 0."""

    key: Key
    item: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    tiers: list[list[StrictInt]] = []
    """Best first; completions of one tier are tied."""
    skip: StrictBool = False
    flags: dict[int, list[str]] = {}
    note: Annotated[str, Field(max_length=2000)] = ""
    seconds: Annotated[float, Field(ge=0, le=7 * 24 * 3600)] = 0.0


class BattleBody(Body):
    """A person's own prompt."""

    key: Key
    prompt: Annotated[str, Field(min_length=1, max_length=20_000)]


class VoteBody(Body):
    """A vote on two answers."""

    key: Key
    vote: Literal["a", "b", "tie", "bad"]


def create_app(store: Store, cfg: LabelConfig, secret: str, ask: Ask | None = None) -> FastAPI:
    """Return the application; `ask` lets a model answer, and is needed for the arena only."""
    app = FastAPI(title="rayrlhf label", docs_url=None, redoc_url=None, openapi_url=None)
    guard.install(app)
    sessions = Sessions(secret, cfg.labellers)
    modes = [mode for mode, there in (("rank", cfg.ranks), ("arena", ask is not None)) if there]

    def person(request: Request) -> str:
        name = sessions.read(request.cookies.get(COOKIE))
        if name is None:
            raise HTTPException(401, "sign in with your name and the secret")
        return name

    me = Depends(person)
    _add_pages(app, modes)
    _add_session(app, sessions, modes, me)
    if cfg.ranks:
        _add_ranking(app, store, cfg, me)
    if ask is not None and cfg.arena is not None:
        _add_arena(app, store, cfg.arena, ask, me)

    @app.get("/api/status")
    def state(name: str = me) -> dict[str, Any]:
        return {"name": name, **status(store, cfg.labellers, arena=ask is not None)}

    @app.get("/api/export/{mode}")
    def export(mode: Literal["rank", "arena"], name: str = me) -> PlainTextResponse:
        records = ranked_records(store) if mode == "rank" else voted_records(store)
        head = {"content-disposition": f'attachment; filename="{mode}.comparisons.jsonl"'}
        return PlainTextResponse(lines(records), headers=head, media_type="application/x-ndjson")

    return app


def _add_pages(app: FastAPI, modes: list[str]) -> None:
    app.mount("/static", StaticFiles(directory=PAGES), name="static")

    @app.get("/")
    def start() -> RedirectResponse:
        return RedirectResponse(f"/{modes[0]}", status_code=303)

    @app.get("/favicon.ico")
    def icon() -> FileResponse:
        return FileResponse(PAGES / "icon.svg", media_type="image/svg+xml")

    for name in ("rank", "arena", "status", "signin"):
        app.add_api_route(f"/{name}", partial(_page, name), response_class=FileResponse)


def _page(name: str) -> FileResponse:
    return FileResponse(PAGES / f"{name}.html", media_type="text/html; charset=utf-8")


def _add_session(app: FastAPI, sessions: Sessions, modes: list[str], me: Any) -> None:
    @app.post("/api/session")
    def sign_in(body: SignIn, request: Request, response: Response) -> dict[str, Any]:
        name = sessions.sign_in(body.name, body.secret)
        if name is None:
            raise HTTPException(401, "no labeller has this name with this secret")
        response.set_cookie(
            COOKIE,
            sessions.issue(name),
            max_age=COOKIE_S,
            httponly=True,
            samesite="strict",
            # A browser says where the page is from, also behind a proxy that has the certificate.
            secure=request.headers.get("origin", str(request.url)).startswith("https:"),
        )
        return {"name": name, "modes": modes}

    @app.get("/api/session")
    def who(name: str = me) -> dict[str, Any]:
        return {"name": name, "modes": modes}

    @app.delete("/api/session")
    def sign_out(response: Response) -> dict[str, Any]:
        response.delete_cookie(COOKIE, httponly=True, samesite="strict")
        return {}


def _add_ranking(app: FastAPI, store: Store, cfg: LabelConfig, me: Any) -> None:
    @app.get("/api/items/next")
    def next_item(name: str = me) -> dict[str, Any]:
        item = store.next_item(name)
        progress = store.progress(name)
        shown = None
        if item is not None:
            order = shown_order(item.id, name, len(item.responses))
            shown = {
                "id": item.id,
                "prompt": item.prompt,
                "responses": [item.responses[k] for k in order],
            }
        return {
            "item": shown,
            "flags": cfg.flags,
            "progress": {
                "done": progress.done,
                "wanted": progress.wanted,
                "mine": progress.mine,
            },
        }

    @app.post("/api/judgements")
    def judge(body: JudgementBody, name: str = me) -> dict[str, Any]:
        item = store.item(body.item)
        order = shown_order(item.id, name, len(item.responses))
        judgement = Judgement(
            key=body.key,
            item=item.id,
            ranks=None if body.skip else _ranks(body.tiers, order),
            flags=_flags(body.flags, order, cfg.flags),
            note=body.note,
            seconds=body.seconds,
        )
        if body.skip and body.tiers:
            raise HTTPException(422, "a skipped item has no ranking: send one of the two")
        fresh = store.judge(name, judgement)
        return {"saved": True, "counted_before": not fresh}


def _ranks(tiers: list[list[int]], order: list[int]) -> list[int]:
    """Return ranks per response of the file from places on the page in tiers, best first."""
    places = [place for tier in tiers for place in tier]
    everyone = range(len(order))
    wrong = [place for place in places if place not in everyone]
    if wrong:
        raise HTTPException(422, f"the ranking names completion {wrong[0]}, which is not there")
    twice = [LETTERS[place] for place in everyone if places.count(place) > 1]
    missing = [LETTERS[place] for place in everyone if place not in places]
    faults = [f"leaves out {', '.join(missing)}"] if missing else []
    faults += [f"names {', '.join(twice)} twice"] if twice else []
    if faults:
        raise HTTPException(
            422, f"the ranking {' and '.join(faults)}: it must name every completion once"
        )
    ranks = [0] * len(order)
    for rank, tier in enumerate((tier for tier in tiers if tier), start=1):
        for place in tier:
            ranks[order[place]] = rank
    return ranks


def _flags(flags: dict[int, list[str]], order: list[int], known: dict[str, str]) -> list[list[str]]:
    """Return the sorted codes per response of the file."""
    found: list[list[str]] = [[] for _ in order]
    for place, codes in flags.items():
        unknown = sorted(set(codes) - known.keys())
        if not 0 <= place < len(order) or unknown:
            what = f"completion {place}" if not unknown else f"the flag {unknown[0][:40]}"
            raise HTTPException(422, f"flags: there is no {what.removeprefix('the ')}")
        found[order[place]] = sorted(set(codes))
    return found


def _add_arena(app: FastAPI, store: Store, cfg: ArenaConfig, ask: Ask, me: Any) -> None:
    @app.get("/api/battles")
    def open_battle(name: str = me) -> dict[str, Any]:
        battle = store.open_battle(name)
        return {"battle": None if battle is None else _anonymous(battle)}

    @app.post("/api/battles")
    async def battle(body: BattleBody, name: str = me) -> dict[str, Any]:
        known = await run_in_threadpool(store.battle, name, body.key)
        if known is None:
            try:
                fought = await fight(ask, cfg, body.key, body.prompt)
            except ValueError as error:
                raise HTTPException(422, str(error)) from None
            known = await run_in_threadpool(store.add_battle, name, fought)
        if known.prompt != body.prompt:
            raise Conflict("this key stands for another prompt")
        return {"battle": _anonymous(known)}

    @app.post("/api/battles/{key}/vote")
    def vote(key: Key, body: VoteBody, name: str = me) -> dict[str, Any]:
        decided, fresh = store.vote(name, key, body.vote, body.key)
        return {
            "saved": True,
            "counted_before": not fresh,
            "vote": decided.vote,
            "models": decided.models,
        }


def _anonymous(battle: Battle) -> dict[str, Any]:
    return {"key": battle.key, "prompt": battle.prompt, "responses": battle.responses}
