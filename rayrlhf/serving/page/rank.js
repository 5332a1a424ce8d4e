// The page on which completions are ranked: the item, its cards, keys and mouse, and submitting.

import { $, LETTERS, complain, make, newKey, request, say, whoAmI } from "/static/common.js";
import { draggable } from "/static/drag.js";
import { send, sendLeft } from "/static/outbox.js";
import { Ranking } from "/static/ranking.js";

const DRAFT = "rayrlhf/draft";
const me = await whoAmI();
let item = null;
let ranking = null;
let cards = [];
let key = "";
let seconds = 0;
let busy = false;

setInterval(() => { if (!document.hidden && !busy) seconds += 1; }, 1000);

// ---- the item

async function load() {
  const left = await sendLeft(me.name);
  const found = await patiently(() => request("GET", "/api/items/next"));
  item = found.item;
  $("progress").max = Math.max(1, found.progress.wanted);
  $("progress").value = found.progress.done;
  $("counts").textContent =
    `${found.progress.done} of ${found.progress.wanted} rankings, ${found.progress.mine} by you`;
  $("work").hidden = item === null;
  $("empty").hidden = item !== null;
  if (left.length) complain(`Not counted: ${left.join("; ")}.`);
  if (item === null) {
    say("Nothing left to rank.");
    return;
  }
  const draft = readDraft();
  key = newKey();
  seconds = 0;
  $("prompt").textContent = item.prompt;
  $("note").value = draft.note;
  ranking = new Ranking(item.responses.length, draft.tiers);
  cards = item.responses.map((text, k) => card(text, k, found.flags, draft.flags[k] ?? []));
  render();
  window.scrollTo(0, 0);
  $("prompt").tabIndex = -1;
  $("prompt").focus({ preventScroll: true });
}

/** Ask until the server answers. */
async function patiently(ask) {
  for (;;) {
    try {
      const answer = await ask();
      complain("");
      return answer;
    } catch (error) {
      if (error.status === 401) await whoAmI();
      complain("The server does not answer. Trying again …");
      await new Promise((done) => { setTimeout(done, 1500); });
    }
  }
}

function readDraft() {
  const draft = JSON.parse(localStorage.getItem(DRAFT) ?? "null");
  const mine = draft !== null && draft.who === me.name && draft.item === item.id;
  return mine ? draft : { tiers: [], flags: {}, note: "" };
}

function keepDraft() {
  const draft = { who: me.name, item: item.id, tiers: ranking.tiers, flags: flags(),
    note: $("note").value };
  localStorage.setItem(DRAFT, JSON.stringify(draft));
}

// ---- cards

function card(text, k, words, set) {
  const box = make("article", "completion");
  box.tabIndex = 0;
  box.dataset.k = k;
  const head = make("div", "head");
  const letter = make("span", "letter", LETTERS[k]);
  letter.setAttribute("aria-hidden", "true");
  const grip = make("span", "grip", "⠿");
  grip.setAttribute("aria-hidden", "true");
  const flag = button("Flag", `Flag completion ${LETTERS[k]}`, () => toggleFlags(k));
  flag.classList.add("flag");
  flag.setAttribute("aria-expanded", "false");
  const up = button("▲", "", () => change(k, () => ranking.step(k, -1)));
  const down = button("▼", `Completion ${LETTERS[k]}: worse`, () => change(k, () => ranking.step(k, 1)));
  up.classList.add("up");
  down.classList.add("down");
  head.append(letter, grip, up, down, flag);
  const body = make("p", "text", text);
  body.dir = "auto";
  box.append(head, body, flagBox(k, words, set));
  box.classList.toggle("flagged", set.length > 0);
  box.addEventListener("keydown", (event) => pressed(event, k));
  draggable(box, head, { targets: placeAt, drop: (place) => change(k, () => place.take(k)) });
  return box;
}

function button(text, label, action) {
  const made = make("button", "", text);
  made.type = "button";
  made.setAttribute("aria-label", label);
  made.title = label;
  made.addEventListener("click", action);
  return made;
}

function flagBox(k, words, set) {
  const box = make("fieldset", "flags");
  box.hidden = true;
  box.append(make("legend", "", `What is wrong with ${LETTERS[k]}?`));
  for (const [code, text] of Object.entries(words)) {
    const label = make("label");
    const input = make("input");
    input.type = "checkbox";
    input.value = code;
    input.checked = set.includes(code);
    input.addEventListener("change", () => {
      cards[k].classList.toggle("flagged", (flags()[k] ?? []).length > 0);
      keepDraft();
    });
    label.append(input, text);
    box.append(label);
  }
  return box;
}

function toggleFlags(k) {
  const box = cards[k].querySelector(".flags");
  box.hidden = !box.hidden;
  cards[k].querySelector(".flag").setAttribute("aria-expanded", String(!box.hidden));
  if (!box.hidden) box.querySelector("input").focus();
}

/** Codes per completion that has any. */
function flags() {
  const found = {};
  cards.forEach((box, k) => {
    const codes = Array.from(box.querySelectorAll("input:checked"), (input) => input.value);
    if (codes.length) found[k] = codes;
  });
  return found;
}

// ---- order

/** Change the ranking, show it, keep the focus where it was, and say what it is now. */
function change(k, action) {
  if (busy) return;
  const within = cards[k].contains(document.activeElement) ? document.activeElement : cards[k];
  action();
  render();
  within.focus({ preventScroll: true });
  cards[k].scrollIntoView({ block: "nearest" });
  keepDraft();
  const left = ranking.tray.length;
  say(`Completion ${LETTERS[k]}: ${ranking.describe(k, LETTERS)}. ` +
    (left ? `${left} left to rank.` : "All are ranked."));
}

function render() {
  const tray = ranking.tray;
  $("tray").replaceChildren(...tray.map((k) => entry(k)));
  $("tray-empty").hidden = tray.length > 0;
  $("tray").style.minHeight = tray.length ? "" : "0";
  $("tray-head").textContent = tray.length ? `To rank (${tray.length})` : "To rank";
  const rows = [gap(0)];
  ranking.tiers.forEach((tier, at) => {
    const row = make("li", "tier");
    row.dataset.tier = at;
    const head = make("h3", "", String(at + 1));
    head.setAttribute("aria-label", `Rank ${at + 1}${tier.length > 1 ? ", tied" : ""}`);
    if (tier.length > 1) head.append(make("span", "note", "tie"));
    const list = make("ul", "cards");
    list.append(...tier.map((k) => entry(k)));
    row.append(head, list);
    rows.push(row, gap(at + 1));
  });
  $("tiers").replaceChildren(...rows);
  cards.forEach((box, k) => {
    box.setAttribute("aria-label", `Completion ${LETTERS[k]}, ${ranking.describe(k, LETTERS)}`);
    const up = box.querySelector(".up");
    up.textContent = tray.includes(k) ? "Rank next" : "▲";
    up.title = tray.includes(k) ? `Completion ${LETTERS[k]}: rank it next` :
      `Completion ${LETTERS[k]}: better`;
    up.setAttribute("aria-label", up.title);
  });
  $("submit").setAttribute("aria-disabled", String(tray.length > 0));
  $("left").textContent = tray.length ? `${tray.length} of ${cards.length} have no rank yet` : "";
}

function entry(k) {
  const line = make("li");
  line.append(cards[k]);
  return line;
}

function gap(at) {
  const line = make("li", "gap");
  line.dataset.gap = at;
  line.setAttribute("role", "presentation");
  return line;
}

/** The place under a point where a card can be dropped. */
function placeAt(x, y) {
  const hit = document.elementFromPoint(x, y);
  const between = hit?.closest(".gap");
  if (between) {
    const at = Number(between.dataset.gap);
    return { element: between, take: (k) => ranking.insert(k, at) };
  }
  const tier = hit?.closest(".tier");
  if (tier) {
    const rank = Number(tier.dataset.tier) + 1;
    return { element: tier, take: (k) => ranking.tie(k, rank) };
  }
  if (hit?.closest("#tray-box")) return { element: $("tray"), take: (k) => ranking.drop(k) };
  if (hit?.closest("#tiers")?.children.length === 1) {
    return { element: $("tiers").firstChild, take: (k) => ranking.insert(k, 0) };
  }
  return null;
}

// ---- keys

function pressed(event, k) {
  if (event.target !== cards[k] && event.target.tagName !== "BUTTON") return;
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  const action = keyAction(event, k);
  if (action === null) return;
  event.preventDefault();
  action();
}

function keyAction(event, k) {
  const down = event.key === "ArrowDown" ? 1 : event.key === "ArrowUp" ? -1 : 0;
  if (down && event.shiftKey) return () => change(k, () => ranking.step(k, down));
  if (down) return () => neighbour(k, down);
  if (/^[1-9]$/.test(event.key)) return () => change(k, () => ranking.tie(k, Number(event.key)));
  if (event.key === "0" || event.key === "Backspace") return () => change(k, () => ranking.drop(k));
  if (event.key === "f" || event.key === "F") return () => toggleFlags(k);
  return null;
}

/** Move the focus to the card before or after, in the order of the page. */
function neighbour(k, direction) {
  const all = Array.from(document.querySelectorAll(".completion"));
  const at = k === null ? -1 : all.indexOf(cards[k]);
  all[at + direction]?.focus();
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && item) submit(false);
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "ArrowDown") { event.preventDefault(); neighbour(null, 1); }
});

// ---- submitting

async function submit(skipped) {
  if (busy || item === null) return;
  if (!skipped && ranking.tray.length) {
    say(`Rank ${ranking.tray.map((k) => LETTERS[k]).join(", ")} first.`);
    cards[ranking.tray[0]].focus();
    return;
  }
  busy = true;
  complain("");
  document.body.setAttribute("aria-busy", "true");
  $("submit").disabled = $("skip").disabled = true;
  const body = { key, item: item.id, tiers: skipped ? [] : ranking.tiers, skip: skipped,
    flags: flags(), note: $("note").value.trim(), seconds };
  try {
    await send(me.name, "/api/judgements", body);
    say(skipped ? "Skipped." : "Saved.");
    localStorage.removeItem(DRAFT);
    await load();
  } catch (error) {
    if (error.status === undefined) throw error;
    complain(`Not counted: ${error.message}.`);
    if (error.status === 409 || error.status === 404) await load();
  } finally {
    busy = false;
    document.body.removeAttribute("aria-busy");
    $("submit").disabled = $("skip").disabled = false;
  }
}

$("submit").addEventListener("click", () => submit(false));
$("skip").addEventListener("click", () => submit(true));
$("again").addEventListener("click", load);
$("note").addEventListener("input", keepDraft);
await load();
