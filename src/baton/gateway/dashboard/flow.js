// The picture at the top: where requests go, and how many.

const BOXES = {
  clients: [8, 116, 108, 68], gateway: [226, 96, 176, 108], prefill: [560, 18, 190, 92], decode: [880, 130, 200, 108],
};
const WIRES = {
  ask: ["M116 150 H218", "g"],
  split: ["M402 122 C 470 122, 490 64, 552 64", "p"],
  whole: ["M402 172 C 560 172, 700 184, 872 184", "d"],
  kv: ["M750 64 C 860 64, 980 64, 980 122", "kv"],
  stream: ["M880 222 C 700 262, 520 262, 330 262 C 318 262, 314 248, 314 212", "d"],
};

class Flow {
  constructor(place) {
    const svg = make(place, "svg", { viewBox: "0 0 1096 290", role: "img", "aria-labelledby": "flow-name flow-desc" });
    make(svg, "title", { id: "flow-name" }, "Requests between gateway, prefill and decode workers");
    this.desc = make(svg, "desc", { id: "flow-desc" });
    const defs = make(svg, "defs");
    const marker = { id: "tip", viewBox: "0 0 10 10", refX: 7, refY: 5, markerWidth: 4.5, markerHeight: 4.5, orient: "auto" };
    make(make(defs, "marker", marker), "path", { d: "M0 0 L10 5 L0 10 z", class: "head" });
    this.runs = {};
    for (const [name, [d, kind]] of Object.entries(WIRES)) {
      make(svg, "path", { d, class: "wire", "marker-end": "url(#tip)" });
      this.runs[name] = make(svg, "path", { d, class: `run ${kind}` });
    }
    this.boxes = {};
    this.box(svg, "clients", "c", "Clients");
    this.box(svg, "gateway", "g", "Gateway");
    this.box(svg, "prefill", "p", "Prefill");
    this.box(svg, "decode", "d", "Decode");
    this.labels = {
      ask: this.label(svg, 171, 138), split: this.label(svg, 482, 66, "end"), whole: this.label(svg, 622, 168),
      kv: this.label(svg, 990, 80, "start"), kvmore: this.label(svg, 866, 52, "middle", "s"), stream: this.label(svg, 620, 280),
    };
  }

  box(svg, name, kind, title) {
    const [x, y, width, height] = BOXES[name];
    make(svg, "rect", { x, y, width, height, rx: 14, class: `box ${kind}` });
    const middle = { x: x + width / 2, "text-anchor": "middle" };
    make(svg, "text", { ...middle, y: y + (height > 80 ? 30 : 28), class: "t" }, title);
    this.boxes[name] = [0, 1].map((line) => make(svg, "text", { ...middle, y: y + (height > 80 ? 53 : 48) + 19 * line, class: "s" }));
    if (name === "decode" || name === "prefill") this.boxes[name].title = svg.lastChild;
  }

  label(svg, x, y, anchor = "middle", kind = "v") {
    return make(svg, "text", { x, y, "text-anchor": anchor, class: kind });
  }

  show(stats) {
    const { flow } = stats;
    const roles = Object.fromEntries(stats.roles.map((role) => [role.role, role]));
    const engines = (...of) => stats.workers.filter((worker) => of.includes(worker.role) && worker.engine).map((worker) => worker.engine);
    const sum = (list, key) => list.reduce((total, one) => total + one[key], 0);
    const moving = Math.max(...["prefill", "decode"].map((role) => sum(engines(role), "handoffs")), 0);
    const answering = { workers: roles.decode.workers + roles.regular.workers, usable: roles.decode.usable + roles.regular.usable };
    const busy = stats.requests_per_second > 0 || stats.in_flight > 0;
    this.lines("clients", [`${rate(stats.requests_per_second)} req/s`]);
    this.lines("gateway", [`${stats.in_flight} in flight`, stats.queued ? `${stats.queued} waiting for a place` : "none waiting"]);
    this.lines("prefill", [workers(roles.prefill), load(engines("prefill"), sum)]);
    this.lines("decode", [workers(answering), load(engines("decode", "regular"), sum)]);
    setText(this.labels.ask, "");
    setText(this.labels.split, `${count(flow.split)} split`);
    setText(this.labels.whole, `${count(flow.whole)} whole`);
    setText(this.labels.kv, "KV pages");
    setText(this.labels.kvmore, moving ? `${moving} moving now` : "");
    setText(this.labels.stream, `${rate(stats.output_tokens_per_second)} tokens/s back`);
    const on = { ask: busy, split: flow.split || flow.running_split, whole: flow.whole || flow.running_whole, kv: flow.split || flow.running_split, stream: busy };
    for (const [name, run] of Object.entries(this.runs)) run.classList.toggle("on", Boolean(on[name]));
    setText(this.desc, `${stats.in_flight} in flight; in the last minute ${flow.split} requests were split between prefill and decode, ${flow.whole} went whole to a decode worker.`);
  }

  lines(name, texts) {
    this.boxes[name].forEach((node, index) => setText(node, texts[index] || ""));
  }
}

const workers = (role) => (role.workers === 0 ? "no workers" : role.usable === role.workers ? plural(role.workers, "worker") : `${role.usable} of ${plural(role.workers, "worker")}`);
const load = (engines, sum) => (engines.length ? `${sum(engines, "running")} running, ${sum(engines, "waiting")} queued` : "");
