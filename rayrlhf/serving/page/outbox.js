// What was said and not yet acknowledged: kept in the browser's storage until the server has it.
//
// Every body carries a key, so that sending it again, from here or from another tab, counts once.

import { $, Refusal, pause, request, toSignIn } from "/static/common.js";

const PREFIX = "rayrlhf/outbox/";
const AGAIN = [408, 425, 429, 500, 502, 503, 504];

let waiting = 0;
let wake = () => {};
window.addEventListener("online", () => wake());

/** Send until the server has it; returns its answer, throws Refusal when it says no for good. */
export async function send(who, url, body, timeoutMs) {
  const entry = { who, url, body };
  localStorage.setItem(PREFIX + body.key, JSON.stringify(entry));
  return deliver(entry, timeoutMs);
}

/** Send what an earlier visit of this person left; returns why each refused one was refused. */
export async function sendLeft(who) {
  const names = Object.keys(localStorage).filter((name) => name.startsWith(PREFIX));
  const entries = names.map((name) => JSON.parse(localStorage.getItem(name)));
  const refusals = [];
  for (const entry of entries.filter((each) => each.who === who)) {
    try {
      await deliver(entry);
    } catch (error) {
      if (!(error instanceof Refusal)) throw error;
      refusals.push(error.message);
    }
  }
  return refusals;
}

async function deliver(entry, timeoutMs) {
  waiting += 1;
  try {
    for (let wait = 400; ; wait = Math.min(wait * 2, 10000)) {
      try {
        show(`Saving …`);
        const answer = await request("POST", entry.url, entry.body, timeoutMs);
        localStorage.removeItem(PREFIX + entry.body.key);
        waiting -= 1;
        show(waiting ? "Saving …" : "Saved");
        return answer;
      } catch (error) {
        if (error.status === 401) {
          toSignIn(); // the entry stays, and is sent after signing in
          await new Promise(() => {});
        }
        if (error instanceof Refusal && !AGAIN.includes(error.status)) {
          localStorage.removeItem(PREFIX + entry.body.key);
          throw error;
        }
      }
      show("Not saved yet: no connection. It is kept here and sent again.", true);
      await Promise.race([pause(wait), new Promise((done) => { wake = done; })]);
    }
  } catch (error) {
    waiting -= 1;
    show("");
    throw error;
  }
}

function show(text, off = false) {
  if ($("link").textContent === text) return;
  $("link").textContent = text;
  $("link").classList.toggle("off", off);
}
