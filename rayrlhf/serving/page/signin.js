// The sign-in page.

import { $, complain, request } from "/static/common.js";

const to = new URLSearchParams(location.search).get("to");
const KNOWN = ["/rank", "/arena", "/status"];

$("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  complain("");
  try {
    const body = { name: $("name").value, secret: $("secret").value };
    const me = await request("POST", "/api/session", body);
    location.assign(KNOWN.includes(to) ? to : `/${me.modes[0]}`);
  } catch (error) {
    const wrong = error.status === 401;
    complain(wrong ? "No labeller has this name with this secret."
      : error.status ? `${error.message}.` : "The server does not answer. Try again.");
    $(wrong ? "secret" : "name").focus();
  }
});
$("name").focus();
