// The page: asks the gateway once a second while somebody looks, and shows what it says.

const PERIOD = 1000;
const flow = new Flow(byId("flow"));
const rows = new Map();
let key = "", paused = false, timer = 0, open = "";

async function ask(path) {
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  const reply = await fetch(path, { headers, cache: "no-store" });
  if (reply.status === 401 || reply.status === 403) throw new Locked();
  if (!reply.ok) throw new Error(`${path}: ${reply.status}`);
  return reply.json();
}

class Locked extends Error {}

async function look() {
  clearTimeout(timer);
  if (paused || document.hidden) return;
  try {
    const [stats, latest] = await Promise.all([ask("stats"), ask("requests?limit=40")]);
    lock(false);
    show(stats);
    list(latest.requests);
    if (open) await detail(open);
    alive("on", `live, last ${Math.round(stats.seconds)} s`);
    document.body.dataset.ready = "yes";
  } catch (error) {
    if (error instanceof Locked) return lock(true);
    alive("off", "the gateway does not answer");
  }
  timer = setTimeout(look, PERIOD);
}

function alive(state, text) {
  byId("live").className = `live ${state}`;
  setText(byId("live-text"), text);
}

function lock(shut) {
  byId("door").hidden = !shut;
  byId("main").hidden = shut;
  if (shut) { alive("off", key ? "that key will not do" : "locked"); byId("key").focus(); }
}

function show(stats) {
  const models = [...new Set(stats.workers.map((worker) => worker.model).filter(Boolean))];
  setText(byId("model"), models.join(", "));
  flow.show(stats);
  tiles(stats);
  const total = stats.stages.length ? stageBar(byId("stages"), stats.stages) : 0;
  if (!total) byId("stages").replaceChildren(html("p", { class: "quiet" }, "Nothing has finished in the last minute."));
  setText(byId("stages-sum"), total ? `mean of a request, ${span(total)} in all` : "");
  byId("workers").replaceChildren(...stats.workers.map(card));
}

function tiles(stats) {
  const latency = (title, p, values) => {
    const [number, unit] = time(p.count ? p.p50 : null);
    return tile(title, number, unit, p.count ? `p95 ${span(p.p95)} · p99 ${span(p.p99)}` : "nothing measured", spark(values));
  };
  const { flow: counts, series } = stats;
  const trouble = [[counts.errors, "error"], [counts.retries, "retrie"], [counts.resumes, "resumption"]];
  const said = trouble.filter(([n]) => n).map(([n, word]) => plural(n, word).replace(/retrie$/, "retry")).join(" · ");
  byId("tiles").replaceChildren(
    latency("Time to first token, median", stats.ttft, series.map((p) => p.ttft)),
    latency("Between tokens, median", stats.itl, series.map((p) => p.itl)),
    latency("Whole request, median", stats.total, series.map((p) => p.total)),
    tile("Requests", rate(stats.requests_per_second), "per second", said || "no errors, no retries", spark(series.map((p) => p.requests), series.map((p) => p.errors))),
  );
}

function tile(title, number, unit, more, picture) {
  const big = html("div", { class: "big" }, number, " ", html("small", {}, unit));
  return html("div", { class: "tile" }, html("h3", {}, title), big, html("div", { class: "more" }, more), picture);
}

const STATES = { ready: "ready", down: "down", open: "resting", half_open: "on trial", draining: "leaving" };

function card(worker) {
  const { engine } = worker;
  const node = html("article", { class: `card ${worker.role}` });
  make(node, "h3", {}, html("span", {}, worker.name), html("span", { class: `pill ${worker.state}` }, STATES[worker.state] || worker.state));
  make(node, "div", { class: "url" }, `${worker.url}${worker.runtime === "baton" || worker.runtime === "auto" ? "" : ` · ${worker.runtime}`}`);
  const list = make(node, "dl");
  const figure = (value, name) => { make(list, "dd", {}, value); make(list, "dt", {}, name); };
  figure(count(worker.in_flight), "in flight");
  figure(engine ? count(engine.running) : "–", "running");
  figure(engine ? count(engine.waiting) : "–", "queued");
  figure(engine ? count(engine.handoffs) : "–", "hand-offs");
  const used = engine && engine.max_tokens ? engine.used_tokens / engine.max_tokens : 0;
  const meter = make(node, "div", { class: "meter", role: "img", "aria-label": `KV cache ${Math.round(used * 100)} % in use` });
  make(meter, "div", { style: { width: `${Math.min(100, used * 100)}%` } });
  const kv = engine ? `KV ${Math.round(used * 100)} %, ${rate(engine.throughput)} tokens/s` : "engine says nothing";
  make(node, "div", { class: "foot" }, html("span", {}, kv), html("span", {}, `${count(worker.served)} served${worker.errors ? `, ${plural(worker.errors, "error")}` : ""}`));
  if (worker.reason) make(node, "div", { class: "why" }, worker.reason);
  return node;
}

function list(requests) {
  const body = byId("rows"), kept = new Set();
  byId("none").hidden = requests.length > 0;
  requests.forEach((request, index) => {
    const name = `${request.id} ${request.received.toFixed(2)}`;
    kept.add(name);
    let row = rows.get(name);
    if (!row) rows.set(name, (row = makeRow(request)));
    fill(row, request);
    if (body.children[index] !== row) body.insertBefore(row, body.children[index] || null);
  });
  for (const [name, row] of rows) if (!kept.has(name)) { row.remove(); rows.delete(name); }
}

function makeRow(request) {
  const row = html("tr");
  const classes = ["", "", "", "", "", "wide", "n", "n", "n"];
  classes.forEach((kind) => make(row, "td", { class: kind }));
  make(row.children[1], "button", { type: "button", title: request.id }, request.id.length > 18 ? `${request.id.slice(0, 16)}…` : request.id);
  row.addEventListener("click", () => choose(request.id));
  return row;
}

function fill(row, request) {
  const cells = row.children;
  setText(cells[0], new Date(request.received * 1000).toLocaleTimeString());
  setText(cells[2], request.route);
  const broken = request.error && request.status < 400 && request.status > 0;
  setText(cells[3], request.status === 0 ? "running" : request.status === 499 ? "client left" : broken ? `${request.status}, broken off` : request.status);
  cells[3].className = request.status === 0 ? "wait" : request.status >= 500 || broken ? "bad" : request.status >= 400 ? "warn" : "good";
  const way = request.way.split("_")[0];
  const again = request.resumes ? `, resumed` : request.attempts > 1 ? `, ${request.attempts} attempts` : "";
  const text = way + again;
  if (cells[4].textContent !== text) cells[4].replaceChildren(...(way ? [html("span", { class: `tag ${way}`, title: request.way.replaceAll("_", " ") }, way)] : []), html("span", { class: "warn" }, again));
  setText(cells[5], request.workers.join(" → "));
  setText(cells[6], span(request.ttft));
  setText(cells[7], span(request.total));
  setText(cells[8], request.output_tokens || "");
}

async function choose(id) {
  open = id;
  history.replaceState(null, "", `#request=${encodeURIComponent(id)}`);
  await detail(id);
  if (!byId("detail").open) byId("detail").showModal();
}

async function detail(id) {
  const one = await ask(`requests/${encodeURIComponent(id)}`).catch(() => null);
  const body = byId("detail-body");
  if (one === null) { setText(byId("detail-title"), id); body.replaceChildren(html("p", { class: "quiet" }, "It is not remembered any more.")); return; }
  setText(byId("detail-title"), `${one.route} · ${one.status || "running"} · ${span(one.total)}`);
  const facts = [`id ${one.id}`, one.model && `model ${one.model}`, one.user && `user ${one.user}`, one.prompt_tokens && `about ${one.prompt_tokens} prompt tokens`, one.output_tokens && `${one.output_tokens} tokens out`, one.itl !== null && `${span(one.itl)} between tokens`];
  const p = html("p", { class: "facts" }, facts.filter(Boolean).join(" · "));
  if (one.error) make(p, "span", { class: "bad" }, one.error);
  const stages = html("div", { style: { marginTop: "12px" } });
  stageBar(stages, one.stages);
  const tries = html("ol", { class: "tries" });
  one.tries.forEach((each, index) => {
    const who = each.prefill ? `${each.prefill} → ${each.answering}` : each.answering;
    make(tries, "li", {}, html("b", {}, `${each.resumed ? "Resumption" : "Attempt"} ${index + 1}`), ` at ${span(each.sent)}: ${who}. ${each.reason}. `, each.lost ? html("span", { class: "bad" }, `lost: ${each.lost}`) : "");
  });
  body.replaceChildren(p, gantt(one), stages, tries);
}

byId("close").addEventListener("click", () => byId("detail").close());
byId("detail").addEventListener("close", () => {
  open = "";
  history.replaceState(null, "", location.pathname);
});
byId("door").addEventListener("submit", (event) => {
  event.preventDefault();
  key = byId("key").value.trim();
  byId("key").value = "";
  look();
});
byId("pause").addEventListener("click", () => {
  paused = !paused;
  byId("pause").setAttribute("aria-pressed", paused);
  setText(byId("pause"), paused ? "Go on" : "Pause");
  if (paused) alive("", "paused");
  else look();
});
document.addEventListener("visibilitychange", look);
look().then(() => {
  const [, wanted] = location.hash.split("#request=");
  if (wanted && !byId("main").hidden) choose(decodeURIComponent(wanted));
});
