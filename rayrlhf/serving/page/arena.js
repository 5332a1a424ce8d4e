// The arena: a prompt of one's own, two answers without names, a vote, and then the names.

import { $, complain, newKey, request, say, whoAmI } from "/static/common.js";
import { ask, send, sendLeft } from "/static/outbox.js";

const me = await whoAmI();
const buttons = Array.from(document.querySelectorAll("[data-vote]"));
const SAID = { a: "You voted for A.", b: "You voted for B.", tie: "You voted for a tie.",
  bad: "You voted against both." };
const ANSWER_MS = 300000;
const DRAFT = "rayrlhf/prompt";
let battle = null;
let asked = { prompt: null, key: "" };
let busy = false;

function show(found) {
  battle = found;
  sessionStorage.removeItem(DRAFT);
  for (const side of ["a", "b"]) {
    $(`text-${side}`).textContent = found.responses[side === "a" ? 0 : 1] || "(no answer)";
    $(`name-${side}`).textContent = "";
    $(`head-${side}`).parentElement.classList.remove("won");
  }
  for (const each of buttons) {
    each.disabled = false;
    each.setAttribute("aria-pressed", "false");
  }
  $("prompt").value = found.prompt;
  $("prompt").readOnly = true;
  $("ask").hidden = $("hint").hidden = true;
  $("answers").hidden = false;
  $("after").hidden = true;
  $("answers-head").focus();
  say("Two answers are here. Vote with 1 for A, 2 for B, 3 for a tie, 4 when both are bad.");
}

function clear() {
  battle = null;
  $("prompt").value = "";
  $("prompt").readOnly = false;
  $("ask").hidden = $("hint").hidden = false;
  $("answers").hidden = true;
  $("prompt").focus();
}

async function work(action) {
  if (busy) return;
  busy = true;
  complain("");
  document.body.setAttribute("aria-busy", "true");
  try {
    await action();
  } catch (error) {
    if (error.status === undefined) throw error;
    complain(`${error.message[0].toUpperCase()}${error.message.slice(1)}.`);
  } finally {
    busy = false;
    document.body.removeAttribute("aria-busy");
    $("ask").disabled = false;
    $("ask").textContent = "Ask two models";
  }
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const prompt = $("prompt").value;
  if (battle !== null || !prompt.trim()) return;
  work(async () => {
    // The same prompt again, after an answer that was lost on its way, is the same request.
    if (asked.prompt !== prompt) asked = { prompt, key: newKey() };
    // It may have to sign in first.
    sessionStorage.setItem(DRAFT, JSON.stringify({ who: me.name, prompt }));
    $("ask").disabled = true;
    $("ask").textContent = "They are writing …";
    say("The models are writing.");
    const answer = await ask("/api/battles", asked, ANSWER_MS);
    asked = { prompt: null, key: "" };
    show(answer.battle);
  });
});

function vote(choice) {
  work(async () => {
    for (const each of buttons) {
      each.disabled = true;
      each.setAttribute("aria-pressed", String(each.dataset.vote === choice));
    }
    const body = { key: newKey(), vote: choice };
    let answer;
    try {
      answer = await send(me.name, `/api/battles/${battle.key}/vote`, body);
    } catch (error) {
      $("result").textContent = "";
      $("after").hidden = false; // go on with another prompt
      $("next").focus();
      throw error;
    }
    $("name-a").textContent = answer.models[0];
    $("name-b").textContent = answer.models[1];
    if (choice === "a" || choice === "b") {
      $(`head-${choice}`).parentElement.classList.add("won");
    }
    $("result").textContent =
      `${SAID[choice]} A was ${answer.models[0]}, B was ${answer.models[1]}.`;
    $("after").hidden = false;
    $("next").focus();
    say($("result").textContent);
  });
}

for (const each of buttons) each.addEventListener("click", () => vote(each.dataset.vote));
document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("textarea:not([readonly])");
  const choice = buttons["1234".indexOf(event.key)];
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
  else if (event.ctrlKey || event.altKey || event.metaKey || typing || battle === null) return;
  else if (event.key.length === 1 && choice && !choice.disabled) vote(choice.dataset.vote);
});
$("next").addEventListener("click", clear);

await work(async () => {
  const left = await sendLeft(me.name);
  const open = await request("GET", "/api/battles");
  if (open.battle) show(open.battle);
  else {
    const draft = JSON.parse(sessionStorage.getItem(DRAFT) ?? "null");
    $("prompt").value = draft?.who === me.name ? draft.prompt : "";
    $("prompt").focus();
  }
  if (left.length) complain(`Not counted: ${left.join("; ")}.`);
});
