"""The pages in headless Chromium, as people use them: keys, mouse, a lost connection, two at once.

RAYRLHF_SCREENSHOTS=FOLDER keeps a picture of every page.
"""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from rayrlhf.config import ArenaConfig
from rayrlhf.serving.api import create_app
from rayrlhf.serving.exchange import wanted_people
from rayrlhf.serving.store import Store, shown_order
from tests.serving.browser import Browser, Page, running
from tests.serving.people import SECRET, echo, items, section

pytestmark = pytest.mark.slow
SCRIPT = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'> & <b>"
TEXTS = (
    "Put the flour in a bowl and make a well in the middle.",
    "You can't bake bread. Nobody can.",
    "Mix 500 g of flour, 350 ml of water, 10 g of salt and 5 g of yeast. Knead for ten minutes, "
    "let it rise until it has doubled, shape it, let it rise again and bake it at 230 degrees.",
    "Bread is baked in an oven.",
    SCRIPT,
    "Bread bread bread bread bread bread bread bread bread bread bread bread.",
)


class Server(uvicorn.Server):
    """A server that runs in a thread and may be stopped and started again."""

    def __init__(self, store: Store, port: int = 0) -> None:
        models = {"sft": "a", "ppo": "b"}
        app = create_app(store, section(arena=ArenaConfig(models=models)), SECRET, echo)
        config = uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning")
        super().__init__(config)
        self._thread = threading.Thread(target=self.run, daemon=True)
        self._thread.start()
        while not self.started:
            assert self._thread.is_alive()
            time.sleep(0.01)
        self.port = int(self.servers[0].sockets[0].getsockname()[1])

    def stop(self) -> None:
        self.should_exit = True
        self._thread.join(20)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with running(tmp_path_factory.mktemp("chromium")) as found:
        yield found


@pytest.fixture
def queue(store: Store) -> Store:
    """Return a store whose first item has real texts and a script."""
    first = {"prompt": f"How do I bake bread? {SCRIPT}", "responses": list(TEXTS)}
    records = [first, *items(2)]
    store.set_items(records, wanted_people(3, section(overlap_labellers=2)))
    return store


@pytest.fixture
def server(queue: Store) -> Iterator[Server]:
    found = Server(queue)
    yield found
    found.stop()


def picture(page: Page, name: str) -> None:
    if folder := os.environ.get("RAYRLHF_SCREENSHOTS"):
        page.screenshot(Path(folder) / f"{name}.png")


def enter(page: Page, server: Server, name: str, place: str = "rank") -> None:
    """Open a page, sign in by keyboard."""
    page.goto(f"http://127.0.0.1:{server.port}/{place}")
    page.until("location.pathname === '/signin' && document.activeElement.id === 'name'")
    page.write(name)
    page.press("Tab")
    page.write(SECRET)
    page.press("Enter")
    page.until(f"location.pathname === '/{place}'")
    page.until("document.querySelector('#who').textContent !== ''")


def place_of(text: str, item: object, name: str) -> int:
    """Return where a person sees a response."""
    responses = item.responses  # type: ignore[attr-defined]
    order = shown_order(item.id, name, len(responses))  # type: ignore[attr-defined]
    return order.index(responses.index(text))


def ready(page: Page, prompt: str) -> None:
    page.until(f"document.querySelector('#prompt').textContent.startsWith({prompt!r})")
    page.until("document.activeElement.id === 'prompt'")


def said(queue: Store, name: str) -> dict[str, int]:
    """Return the rank of each text by a person's last judgement."""
    row = [row for row in queue.rankings() if row.labeller == name][-1]
    return dict(zip(row.responses, row.ranks, strict=True))


def no_errors(page: Page) -> None:
    assert page.complaints(but=lambda text: "401" in text and "/api/session" in text) == []


def test_six_completions_by_keyboard(browser: Browser, server: Server, queue: Store) -> None:
    page = browser.page()
    enter(page, server, "Ann")
    ready(page, "How do I bake bread?")
    picture(page, "rank-begin")
    for number in range(6):  # from the prompt on, with the arrow key
        page.press("ArrowDown")
        assert page.run("document.activeElement.dataset.k") is not None
        text = page.text(":focus .text")
        page.press({TEXTS[2]: "1", TEXTS[0]: "2", TEXTS[3]: "2"}.get(text, "9"))
        left = page.run("document.querySelectorAll('#tray .completion').length")
        assert left == 5 - number
        # The focus stays on the card, now in the ranking; go back to what is left.
        page.run("document.querySelector('#prompt').focus()")
    assert page.text("#tray-head") == "To rank"
    page.press("Enter", "Ctrl")
    ready(page, "Prompt 0")
    assert page.until("document.querySelector('#link').textContent === 'Saved'")
    ranks = said(queue, "Ann")
    assert sorted(ranks.values())[0] == 1 and len(ranks) == 6
    no_errors(page)
    assert page.run("window.hacked") is None


def test_half_steps_ties_and_flags_by_keyboard(
    browser: Browser, server: Server, queue: Store
) -> None:
    page = browser.page()
    enter(page, server, "Ann")
    ready(page, "How do I bake bread?")
    for _ in range(6):
        page.run("document.querySelector('#tray .completion').focus()")
        page.press("9")  # a new last rank each time: A to F
    tiers = (
        "Array.from(document.querySelectorAll('.tier'), (tier) => "
        "Array.from(tier.querySelectorAll('.completion'), (card) => card.dataset.k).join(''))"
        ".join(' ')"
    )
    assert page.run(tiers) == "0 1 2 3 4 5"
    page.run("document.querySelector('.completion[data-k=\"2\"]').focus()")
    page.press("ArrowUp", "Shift")
    assert page.run(tiers) == "0 12 3 4 5"
    spoken = page.until("document.querySelector('#said').textContent.includes('tied with B')")
    assert spoken
    page.press("ArrowUp", "Shift")
    assert page.run(tiers) == "0 2 1 3 4 5"
    page.press("ArrowUp", "Shift")
    page.press("ArrowUp", "Shift")
    page.press("ArrowUp", "Shift")  # further up than the top
    assert page.run(tiers) == "2 0 1 3 4 5"
    page.press("6")
    assert page.run(tiers) == "0 1 3 4 52"
    page.press("ArrowDown", "Shift")
    assert page.run(tiers) == "0 1 3 4 5 2"
    page.press("0")
    assert page.run(tiers) == "0 1 3 4 5"
    label = page.run("document.activeElement.getAttribute('aria-label')")
    assert label == "Completion C, not ranked"
    page.press("Enter", "Ctrl")  # refused: C has no rank
    assert page.until("document.querySelector('#said').textContent === 'Rank C first.'")
    page.press("2")
    page.press("f")
    assert page.run("document.activeElement.type") == "checkbox"
    page.press(" ")
    assert page.run(tiers) == "0 12 3 4 5"
    picture(page, "rank-flag")
    page.press("Enter", "Ctrl")
    ready(page, "Prompt 0")
    item = queue.rankings()[0]
    order = shown_order(item.item, "Ann", 6)
    assert [item.ranks[order[k]] for k in range(6)] == [1, 2, 2, 3, 4, 5]
    assert item.flags[order[2]] == ["instruction"] and sum(map(len, item.flags)) == 1
    no_errors(page)


def test_six_completions_by_mouse(browser: Browser, server: Server, queue: Store) -> None:
    page = browser.page(width=1280, height=1000)
    enter(page, server, "Bob")
    ready(page, "How do I bake bread?")
    grip = "#tray .completion[data-k='{}'] .grip"
    page.drag(grip.format(0), ".gap")
    assert page.run("document.querySelectorAll('.tier').length") == 1
    page.drag(grip.format(1), ".gap:last-child")
    page.drag(grip.format(2), ".gap")  # before all
    page.drag(grip.format(3), ".tier[data-tier='1'] .text")  # onto 0: a tie
    page.drag(grip.format(4), ".gap:last-child")
    x, y = page.middle(grip.format(5))
    page.mouse("mousePressed", x, y)
    page.mouse("mouseMoved", x + 20, y + 20)
    page.mouse("mouseMoved", *page.middle(".gap[data-gap='2']"))
    picture(page, "rank-drag")
    page.press("Escape")  # let go: nothing happens
    page.mouse("mouseReleased", *page.middle(".gap[data-gap='2']"))
    assert page.run("document.querySelectorAll('#tray .completion').length") == 1
    page.drag(grip.format(5), ".gap[data-gap='2']")
    assert page.run("document.querySelectorAll('#tray .completion').length") == 0
    page.click(".completion[data-k='1'] button[aria-label='Completion B: better']")
    picture(page, "rank-end")
    page.click("#submit")
    ready(page, "Prompt 0")
    item = queue.rankings()[0]
    order = shown_order(item.item, "Bob", 6)
    # C; A and D; F with B (half a step up); E
    assert [item.ranks[order[k]] for k in range(6)] == [2, 3, 1, 2, 4, 3]
    no_errors(page)


def test_a_skipped_item_and_the_end_of_the_queue(
    browser: Browser, server: Server, queue: Store
) -> None:
    page = browser.page(dark=True)
    enter(page, server, "Cem")
    for prompt in ("How do I bake bread?", "Prompt 0", "Prompt 1"):
        ready(page, prompt)
        page.click("#skip")
    page.until("!document.querySelector('#empty').hidden")
    picture(page, "rank-empty-dark")
    assert [row.ranks for row in queue.rankings()] == [None, None, None]
    no_errors(page)


def rank_all(page: Page) -> None:
    for _ in range(6):
        page.run("document.querySelector('#tray .completion').focus()")
        page.press("9")


def test_a_lost_connection_loses_nothing(browser: Browser, server: Server, queue: Store) -> None:
    page = browser.page()
    enter(page, server, "Ann")
    ready(page, "How do I bake bread?")
    rank_all(page)
    page.offline(True)
    page.click("#submit")
    page.until("document.querySelector('#link').textContent.startsWith('Not saved yet')")
    picture(page, "rank-offline")
    assert queue.rankings() == []
    time.sleep(1)
    assert page.run("Object.keys(localStorage).some((k) => k.includes('outbox'))")
    page.offline(False)
    ready(page, "Prompt 0")
    assert len(queue.rankings()) == 1
    # The page is closed before the server has the judgement: the next visit sends it.
    rank_all(page)
    page.offline(True)
    page.click("#submit")
    page.until("document.querySelector('#link').textContent.startsWith('Not saved yet')")
    page.call("Page.navigate", url="about:blank")
    page.offline(False)
    page.goto(f"http://127.0.0.1:{server.port}/rank")
    ready(page, "Prompt 1")
    assert len(queue.rankings()) == 2
    assert not page.run("Object.keys(localStorage).some((k) => k.includes('outbox'))")
    offline = ("ERR_INTERNET_DISCONNECTED", "401")
    assert page.complaints(but=lambda text: any(word in text for word in offline)) == []


def test_a_server_that_stops_and_an_answer_that_is_lost(
    browser: Browser, server: Server, queue: Store
) -> None:
    page = browser.page()
    enter(page, server, "Ann")
    ready(page, "How do I bake bread?")
    rank_all(page)
    server.stop()
    page.click("#submit")
    page.until("document.querySelector('#link').textContent.startsWith('Not saved yet')")
    second = Server(queue, port=server.port)
    ready(page, "Prompt 0")
    assert len(queue.rankings()) == 1
    # The judgement arrives, its acknowledgement does not: the page sends it again.
    rank_all(page)
    page.run(
        "(() => { const real = window.fetch; window.fetch = async (...a) => { "
        "const answer = await real(...a); window.fetch = real; throw new TypeError('lost'); }; })()"
    )
    page.click("#submit")
    ready(page, "Prompt 1")
    assert len(queue.rankings()) == 2
    second.stop()


def test_a_proxys_refusal_is_not_the_servers(
    browser: Browser, server: Server, queue: Store
) -> None:
    """While Ray Serve starts, its proxy answers 404 in plain text: the judgement is kept."""
    page = browser.page()
    enter(page, server, "Ann")
    ready(page, "How do I bake bread?")
    rank_all(page)
    page.run(
        "(() => { const real = window.fetch; window.fetch = async () => { window.fetch = real; "
        "return new Response('Path not found', {status: 404}); }; })()"
    )
    page.click("#submit")
    ready(page, "Prompt 0")
    assert len(queue.rankings()) == 1
    no_errors(page)


def test_a_draft_outlives_the_page(browser: Browser, server: Server) -> None:
    page = browser.page(width=390, height=844)
    enter(page, server, "Ann")
    ready(page, "How do I bake bread?")
    picture(page, "rank-phone")
    page.run("document.querySelector('#tray .completion').focus()")
    page.press("1")
    page.click("#note")
    page.write("half done")
    page.goto(f"http://127.0.0.1:{server.port}/rank")
    ready(page, "How do I bake bread?")
    assert page.run("document.querySelectorAll('.tier').length") == 1
    assert page.run("document.querySelector('#note').value") == "half done"
    wide = page.run("document.documentElement.scrollWidth")
    assert wide <= 390  # nothing to scroll sideways on a phone
    page.run("window.scrollTo(0, 400)")
    picture(page, "rank-phone-2")
    no_errors(page)


def test_the_arena(browser: Browser, server: Server, queue: Store) -> None:
    page = browser.page()
    enter(page, server, "Bob", "arena")
    page.until("document.activeElement.id === 'prompt'")
    picture(page, "arena-begin")
    page.write(f"Tell me a story. {SCRIPT}")
    page.press("Enter", "Ctrl")
    page.until("document.activeElement.id === 'answers-head'")
    assert not page.text("#name-a") and not page.text("#name-b")
    picture(page, "arena-answers")
    page.goto(f"http://127.0.0.1:{server.port}/arena")  # the pair is still there
    page.until("document.activeElement.id === 'answers-head'")
    assert queue.votes() == []
    page.press("2")
    page.until("document.activeElement.id === 'next'")
    names = [page.text("#name-a"), page.text("#name-b")]
    assert sorted(names) == ["ppo", "sft"] and tuple(names) == tuple(queue.votes()[0].models)
    picture(page, "arena-vote")
    page.press("Enter")
    page.until("document.activeElement.id === 'prompt'")
    page.write("And another one.")
    page.click("#ask")
    page.until("document.activeElement.id === 'answers-head'")
    page.offline(True)
    page.click("[data-vote=bad]")
    page.until("document.querySelector('#link').textContent.startsWith('Not saved yet')")
    assert not page.text("#name-a")
    page.offline(False)
    page.until("document.activeElement.id === 'next'")
    assert [row.vote for row in queue.votes()] == ["b", "bad"]
    page.goto(f"http://127.0.0.1:{server.port}/arena")
    page.until("document.activeElement.id === 'prompt'")
    page.write("x" * 1001)
    page.click("#ask")
    page.until("document.querySelector('#problem').textContent.includes('1000 fit')")
    assert page.run("document.querySelector('#prompt').value.length") == 1001
    assert page.run("window.hacked") is None
    page.run(
        "document.querySelector('#prompt').value = ''; document.querySelector('#prompt').focus()"
    )
    page.write("silence")  # no model answers now
    page.click("#ask")
    page.until("document.querySelector('#problem').textContent.includes('ask again in a while')")
    page.goto(f"http://127.0.0.1:{server.port}/rank")  # which keeps nobody from ranking
    ready(page, "How do I bake bread?")
    page.goto(f"http://127.0.0.1:{server.port}/arena")
    page.until("document.querySelector('#prompt').value === 'silence'")
    known = ("ERR_INTERNET_DISCONNECTED", "401", "422", "424")
    assert page.complaints(but=lambda text: any(word in text for word in known)) == []


def test_a_pair_that_was_voted_on_elsewhere(browser: Browser, server: Server) -> None:
    page, other = browser.page(), browser.page()
    for each in (page, other):
        enter(each, server, "Ann", "arena")
        each.until("document.activeElement.id === 'prompt'")
    page.write("Tell me a story.")
    page.click("#ask")
    page.until("document.activeElement.id === 'answers-head'")
    other.goto(f"http://127.0.0.1:{server.port}/arena")
    other.until("document.activeElement.id === 'answers-head'")
    other.press("1")
    other.until("document.activeElement.id === 'next'")
    page.press("2")
    page.until("document.activeElement.id === 'next'")
    page.until("document.querySelector('#problem').textContent.includes('voted')")
    page.press("Enter")
    page.until("document.activeElement.id === 'prompt'")


def test_two_labellers_at_once(browser: Browser, server: Server, queue: Store) -> None:
    ann, bob = browser.page(), browser.page()
    enter(ann, server, "Ann")
    enter(bob, server, "Bob")
    for prompt in ("How do I bake bread?", "Prompt 0"):
        for page in (ann, bob):
            ready(page, prompt)
            rank_all(page)
        for page in (ann, bob):
            page.press("Enter", "Ctrl")
    for page in (ann, bob):
        ready(page, "Prompt 1")
        page.click("#places a[href='/status']")
        page.until("document.querySelectorAll('#people tr').length === 3")
        assert "4 / 6" in page.text("#tiles")
        no_errors(page)
    picture(ann, "status")
    assert len(queue.rankings()) == 4
    # A voice that is no longer welcome: the cookie of another secret.
    dark = browser.page(width=390, height=844, dark=True)
    enter(dark, server, "Cem", "status")
    dark.until("document.querySelectorAll('#people tr').length === 3")
    picture(dark, "status-phone-dark")


def test_signing_in_wrong(browser: Browser, server: Server) -> None:
    page = browser.page()
    page.goto(f"http://127.0.0.1:{server.port}/rank")
    page.until("location.pathname === '/signin' && document.activeElement.id === 'name'")
    page.write("Eve")
    page.press("Tab")
    page.write("wrong")
    page.press("Enter")
    page.until("!document.querySelector('#problem').hidden")
    picture(page, "signin")
    assert page.run("document.cookie") == ""


def test_names_roles_and_contrast(browser: Browser, server: Server) -> None:
    """Every control has a name in the tree that screen readers read; every page a main and h1."""
    page = browser.page()
    enter(page, server, "Ann")
    ready(page, "How do I bake bread?")
    for place in ("rank", "arena", "status", "signin"):
        page.goto(f"http://127.0.0.1:{server.port}/{place}")
        page.until("document.querySelector('main h1') !== null")
        if place == "rank":
            ready(page, "How do I bake bread?")
        page.call("Accessibility.enable")
        nodes = page.call("Accessibility.getFullAXTree")["nodes"]
        for node in nodes:
            role = node.get("role", {}).get("value")
            if role in ("button", "textbox", "checkbox", "link", "article", "progressbar"):
                assert node.get("name", {}).get("value"), (place, node)
        headings = [n for n in nodes if n.get("role", {}).get("value") == "heading"]
        assert headings
    page.goto(f"http://127.0.0.1:{server.port}/rank")
    ready(page, "How do I bake bread?")
    for dark in (False, True):
        value = "dark" if dark else "light"
        feature = {"name": "prefers-color-scheme", "value": value}
        page.call("Emulation.setEmulatedMedia", features=[feature])
        assert min(page.run(CONTRAST).values()) >= 4.5, (value, page.run(CONTRAST))


CONTRAST = """(() => {
  const style = getComputedStyle(document.documentElement);
  const light = (name) => {
    const hex = style.getPropertyValue(name).trim();
    return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16) / 255)
      .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
      .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  };
  const pairs = [["--text", "--card"], ["--text", "--ground"], ["--muted", "--card"],
    ["--muted", "--ground"], ["--accent", "--soft"], ["--on-accent", "--accent"],
    ["--bad", "--bad-soft"], ["--bad", "--card"], ["--muted", "--soft"]];
  return Object.fromEntries(pairs.map(([a, b]) => {
    const [x, y] = [light(a), light(b)];
    return [`${a} on ${b}`, (Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05)];
  }));
})()"""
