// What all pages share: who is signed in, the links between pages, requests, and what is said aloud.

export const LETTERS = "ABCDEFGHI";

export const $ = (id) => document.getElementById(id);

/** An answer that says no, with its reason for the person. */
export class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Send a request; returns the answer's JSON, throws Refusal, or TypeError without a connection. */
export async function request(method, url, body, timeoutMs = 20000) {
  const options = { method, headers: {}, signal: AbortSignal.timeout(timeoutMs) };
  if (body !== undefined) {
    options.headers["content-type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  const answer = await fetch(url, options);
  let data = null;
  try {
    data = await answer.json();
  } catch {
    data = null;
  }
  // Without the form of our errors it is a proxy that speaks, such as Ray Serve's while it starts.
  if (data === null || (!answer.ok && !data.error?.message)) {
    throw new Refusal(502, "the server gives no proper answer");
  }
  if (!answer.ok) throw new Refusal(answer.status, data.error.message);
  return data;
}

/** Tell screen readers something, politely. */
export function say(text) {
  $("said").textContent = "";
  setTimeout(() => { $("said").textContent = text; }, 30);
}

/** Show what went wrong; an empty text hides it. */
export function complain(text) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
}

/** Make an element with a class and a text, which is never read as HTML. */
export function make(tag, className = "", text = "") {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text) element.textContent = text;
  return element;
}

export function newKey() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export const pause = (ms) => new Promise((done) => { setTimeout(done, ms); });

export function toSignIn() {
  location.assign(`/signin?to=${encodeURIComponent(location.pathname)}`);
}

/** Wait for the server and return {name, modes} of the person; without one, go to the sign-in page. */
export async function whoAmI() {
  for (let wait = 500; ; wait = Math.min(wait * 2, 8000)) {
    try {
      const me = await request("GET", "/api/session");
      complain("");
      showPlaces(me);
      return me;
    } catch (error) {
      if (error.status === 401) {
        toSignIn();
        await new Promise(() => {}); // the page is being left
      }
      complain("The server does not answer. Trying again …");
      await pause(wait);
    }
  }
}

const NAMES = { rank: "Rank", arena: "Arena", status: "Status" };

function showPlaces(me) {
  const links = [...me.modes, "status"].map((mode) => {
    const link = make("a", "", NAMES[mode]);
    link.href = `/${mode}`;
    if (location.pathname === link.pathname) link.setAttribute("aria-current", "page");
    return link;
  });
  $("places").replaceChildren(...links);
  const out = make("a", "", "sign out");
  out.href = "/signin";
  out.addEventListener("click", async (event) => {
    event.preventDefault();
    await request("DELETE", "/api/session");
    location.assign("/signin");
  });
  $("who").replaceChildren(`${me.name}, `, out);
}
