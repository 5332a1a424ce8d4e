// How far the queue is, how well people agree, and how the models do.

import { $, complain, make, request, say, whoAmI } from "/static/common.js";

const me = await whoAmI();
const percent = (share) => (share === null ? "–" : `${(100 * share).toFixed(1)} %`);

function tile(value, name, more, share = null) {
  const box = make("div", "card tile");
  box.append(make("b", "", value), make("div", "", name), make("div", "note", more));
  if (share !== null) {
    const bar = make("progress");
    bar.max = 1;
    bar.value = share;
    bar.setAttribute("aria-label", name);
    box.append(bar);
  }
  return box;
}

function row(cells) {
  const line = make("tr");
  cells.forEach((cell, i) => {
    const box = make(i ? "td" : "th", "", String(cell));
    if (!i) box.scope = "row";
    line.append(box);
  });
  return line;
}

function time(seconds) {
  if (seconds === null) return "–";
  return seconds < 90 ? `${Math.round(seconds)} s` : `${(seconds / 60).toFixed(1)} min`;
}

async function renew() {
  try {
    const found = await request("GET", "/api/status");
    const { queue, agreement } = found;
    const none = agreement.items ? "all rankings are the same tie" : "no item has two rankings yet";
    const shared = `${agreement.items} item${agreement.items === 1 ? "" : "s"} ranked by several`;
    $("tiles").replaceChildren(
      tile(`${queue.done} / ${queue.wanted}`, "rankings done", `${queue.items} items`,
        queue.wanted ? queue.done / queue.wanted : 0),
      tile(agreement.alpha === null ? "–" : agreement.alpha.toFixed(3), "Krippendorff's alpha",
        agreement.alpha === null ? none : `ordinal; ${shared}`),
      tile(percent(agreement.same_order), "pairs in the same order",
        agreement.pairs ? `of ${agreement.pairs} that two people ranked, ties left out` : none),
    );
    $("people").replaceChildren(...found.labellers.map((one) =>
      row([one.name, one.ranked, one.skipped, one.votes, time(one.median_s)])));
    $("arena").hidden = !found.arena?.length;
    $("models").replaceChildren(...(found.arena ?? []).map((one) =>
      row([one.model, percent(one.win_rate), one.battles, one.wins, one.ties, one.both_bad])));
    complain("");
  } catch (error) {
    complain(error.status ? `${error.message}.` : "The server does not answer.");
  }
}

$("exports").replaceChildren(...me.modes.map((mode) => {
  const line = make("li");
  const link = make("a", "", mode === "rank" ? "Rankings" : "Votes of the arena");
  link.href = `/api/export/${mode}`;
  link.download = "";
  line.append(link);
  return line;
}));
$("renew").addEventListener("click", async () => { await renew(); say("Renewed."); });
setInterval(() => { if (!document.hidden) renew(); }, 15000);
await renew();
