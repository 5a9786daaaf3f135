// One request as a picture: lanes for the gateway and each worker, bars for what they did, attempts and their ends.

const COLORS = {
  queue: "--s-queue", prefill_queue: "--s-queue", decode_queue: "--s-queue", offer: "--s-queue", "first token": "--s-queue",
  route: "--s-wire", transit: "--s-wire", reply: "--s-wire", wait: "--s-wire",
  prefill: "--s-prefill", transfer: "--s-move", handoff: "--s-move",
  decode: "--s-decode", relay: "--g", worker: "--u", retry: "--s-again", resume: "--s-again", lost: "--s-again",
};
const PALE = new Set(["route", "transit", "reply", "wait", "transfer", "handoff"]);
const WORDS = {
  queue: "gateway's queue", route: "choosing workers", retry: "lost attempts", transit: "network and tokenizer", offer: "D makes room",
  prefill_queue: "P's queue", prefill: "prefill", transfer: "rest of the hand-off", decode_queue: "D's queue and first step", worker: "worker (says no more)",
  decode: "decode", resume: "going on elsewhere", reply: "reply", wait: "waiting for the first token", relay: "passing the answer on",
  handoff: "hand-off: pages arrive", lost: "lost",
};
const color = (name) => `var(${COLORS[name] || "--s-queue"})`;

function stageBar(place, stages) {
  const total = stages.reduce((sum, stage) => sum + stage.ms, 0) || 1;
  const words = stages.map((stage) => `${WORDS[stage.name] || stage.name} ${span(stage.ms)}`).join(", ");
  const stack = html("div", { class: "stack", role: "img", "aria-label": words });
  const legend = html("div", { class: "legend" });
  for (const stage of stages) {
    make(stack, "div", { title: `${WORDS[stage.name] || stage.name}: ${span(stage.ms)}`, style: { flex: `${stage.ms / total} 0 0`, background: color(stage.name) } });
    const item = make(legend, "span");
    make(item, "i", { style: { background: color(stage.name) } });
    item.append(`${WORDS[stage.name] || stage.name} `);
    make(item, "b", {}, span(stage.ms));
  }
  place.replaceChildren(stack, legend);
  return total;
}

function gantt(detail) {
  const lanes = [...new Set(["gateway", ...detail.workers, ...detail.spans.map((s) => s.lane)])];
  const left = 128, right = 16, width = 1000, row = 46, top = 26;
  const end = Math.max(detail.total, ...detail.spans.map((s) => s.end), 0.001);
  const height = top + row * lanes.length + 30;
  const x = (ms) => left + ((width - left - right) * ms) / end;
  const svg = make(SVG, "svg", { viewBox: `0 0 ${width} ${height}`, class: "gantt", role: "img" });
  make(svg, "title", {}, detail.spans.map((s) => `${s.lane}: ${WORDS[s.name] || s.name} from ${span(s.start)} to ${span(s.end)}`).join("; "));
  lanes.forEach((lane, index) => {
    if (index % 2 === 0) make(svg, "rect", { x: 0, y: top + row * index, width, height: row, rx: 6, class: "band" });
    make(svg, "text", { x: 10, y: top + row * index + row / 2 + 4, class: "lane" }, lane);
  });
  for (const tick of ticks(end)) {
    make(svg, "line", { x1: x(tick), x2: x(tick), y1: top, y2: height - 26, class: "grid" });
    make(svg, "text", { x: x(tick), y: height - 10, "text-anchor": "middle", class: "tick" }, tick ? span(tick).replace(/\.0+ /, " ") : "0");
  }
  for (const s of detail.spans) bar(svg, s, x, top + row * lanes.indexOf(s.lane), row);
  if (detail.ttft !== null) {
    make(svg, "line", { x1: x(detail.ttft), x2: x(detail.ttft), y1: top - 6, y2: height - 26, class: "first" });
    const late = x(detail.ttft) > width - 140;
    make(svg, "text", { x: x(detail.ttft) + (late ? -5 : 5), y: 15, "text-anchor": late ? "end" : "start", class: "note" }, `first token ${span(detail.ttft)}`);
  }
  cuts(svg, detail, x, top, height - 26);
  return svg;
}

/** Where attempts were lost; what is near each other shares a note. */
function cuts(svg, detail, x, top, bottom) {
  const notes = [];
  for (const one of detail.tries.filter((one) => one.lost && one.ended !== null)) {
    const at = x(one.ended), last = notes[notes.length - 1];
    make(svg, "line", { x1: at, x2: at, y1: top - 4, y2: bottom, class: "cut" });
    if (last && at - last.at < 160) last.text += `, ${one.lost}`;
    else notes.push({ at, text: one.lost });
  }
  for (const { at, text } of notes) {
    const end = at > 600;
    make(svg, "text", { x: at + (end ? -4 : 4), y: bottom - 3, "text-anchor": end ? "end" : "start", class: "cutnote" }, `✕ ${text}`);
  }
}

function bar(svg, s, x, y, row) {
  const at = x(s.start), width = Math.max(1.5, x(s.end) - at);
  const group = make(svg, "g");
  make(group, "title", {}, `${WORDS[s.name] || s.name}: ${span(s.end - s.start)}${s.attempt ? `, attempt ${s.attempt}` : ""}${s.note ? `\n${s.note}` : ""}`);
  make(group, "rect", { x: at, y: y + 9, width, height: row - 18, rx: Math.min(5, width / 2), style: { fill: color(s.name) } });
  const label = s.name.replace("_", " ");
  if (width > label.length * 6.4 + 10) {
    make(group, "text", { x: at + width / 2, y: y + row / 2 + 4, "text-anchor": "middle", class: PALE.has(s.name) ? "in dark" : "in" }, label);
  }
}

/** Round numbers from 0 to `end`, six or so */
function ticks(end) {
  const rough = end / 6, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  return Array.from({ length: Math.floor(end / step + 1e-9) + 1 }, (_, index) => index * step);
}

function spark(values, errors = []) {
  const svg = make(SVG, "svg", { viewBox: "0 0 100 38", preserveAspectRatio: "none", class: "spark", "aria-hidden": "true" });
  const top = Math.max(...values.filter((v) => v !== null), 1e-9) * 1.1;
  const step = 100 / Math.max(1, values.length - 1);
  let path = "", area = "", from = 0;
  const close = (to) => { if (path) area += `${path.slice(path.lastIndexOf("M"))} L${to} 38 L${from} 38 Z `; };
  values.forEach((value, index) => {
    const at = index * step;
    if (value === null) { if (index && values[index - 1] !== null) close(at - step); return; }
    const start = !index || values[index - 1] === null;
    if (start) from = at;
    path += `${start ? "M" : "L"}${at.toFixed(2)} ${(37 - (35 * value) / top).toFixed(2)} `;
    if (start) path += "h.01 ";
  });
  if (values.length && values[values.length - 1] !== null) close(100);
  make(svg, "path", { d: area || "M0 0", class: "area" });
  make(svg, "path", { d: path || "M0 0", class: "path" });
  errors.forEach((n, index) => { if (n) make(svg, "rect", { x: index * step - 0.7, y: 32, width: 1.4, height: 6, class: "err" }); });
  return svg;
}
