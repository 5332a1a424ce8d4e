// What was said and not yet acknowledged: kept in the browser's storage until the server has it.
//
// Every body carries a key, so that sending it again, from here or from another tab, counts once.

import { $, Refusal, pause, request, toSignIn } from "/static/common.js";

const PREFIX = "rayrlhf/outbox/";
const AGAIN = [408, 425, 429, 500, 502, 503, 504];
const SAVING = { busy: "Saving …", done: "Saved",
  off: "Not saved yet: no connection. It is kept here and sent again." };
const ASKING = { busy: "Asking …", done: "", off: "No connection. Asking again …" };

let waiting = 0;
let wake = () => {};
window.addEventListener("online", () => wake());

/** Send until the server has it; returns its answer, throws Refusal when it says no for good. */
export async function send(who, url, body) {
  const entry = { who, url, body };
  localStorage.setItem(PREFIX + body.key, JSON.stringify(entry));
  return deliver(entry, SAVING);
}

/** Ask until the server answers, without keeping the question; throws Refusal when it says no. */
export async function ask(url, body, timeoutMs) {
  return deliver({ url, body }, ASKING, timeoutMs);
}

/** Send what an earlier visit of this person left; returns why each refused one was refused. */
export async function sendLeft(who) {
  const names = Object.keys(localStorage).filter((name) => name.startsWith(PREFIX));
  const entries = names.map((name) => JSON.parse(localStorage.getItem(name)));
  const refusals = [];
  for (const entry of entries.filter((each) => each.who === who)) {
    try {
      await deliver(entry, SAVING);
    } catch (error) {
      if (!(error instanceof Refusal)) throw error;
      refusals.push(error.message);
    }
  }
  return refusals;
}

async function deliver(entry, how, timeoutMs) {
  waiting += 1;
  try {
    for (let wait = 400; ; wait = Math.min(wait * 2, 10000)) {
      try {
        show(how.busy);
        const answer = await request("POST", entry.url, entry.body, timeoutMs);
        localStorage.removeItem(PREFIX + entry.body.key);
        waiting -= 1;
        show(waiting ? how.busy : how.done);
        return answer;
      } catch (error) {
        if (error.status === 401) {
          toSignIn(); // what is kept is sent after signing in
          await new Promise(() => {});
        }
        if (error instanceof Refusal && !AGAIN.includes(error.status)) {
          localStorage.removeItem(PREFIX + entry.body.key);
          throw error;
        }
      }
      show(how.off, true);
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
