"use strict";
// Small helpers. Text from outside goes into text nodes only, never into markup.

const byId = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

function make(parent, tag, attributes = {}, ...children) {
  const svg = parent === SVG || (parent && parent.namespaceURI === SVG);
  const node = svg || tag === "svg" ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "style") Object.assign(node.style, value);
    else if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.map((child) => (child instanceof Node ? child : String(child))));
  if (parent instanceof Node) parent.append(node);
  return node;
}

const html = (tag, attributes, ...children) => make(null, tag, attributes, ...children);

function setText(node, text) {
  if (node.textContent !== String(text)) node.textContent = text;
}

const few = (x) => (x >= 100 ? x.toFixed(0) : x >= 10 ? x.toFixed(1) : x.toFixed(2));

/** [number, unit] of milliseconds */
function time(ms) {
  if (ms === null || ms === undefined) return ["–", ""];
  return ms >= 1000 ? [few(ms / 1000), "s"] : [few(ms), "ms"];
}

const span = (ms) => time(ms).join(" ").trim();

function count(n) {
  if (n >= 1e6) return (n / 1e6).toFixed(1) + "M";
  return n >= 10000 ? (n / 1e3).toFixed(0) + "k" : n >= 1000 ? (n / 1e3).toFixed(1) + "k" : String(Math.round(n));
}

const rate = (x) => (x >= 100 ? count(x) : x >= 10 ? x.toFixed(1).replace(/\.0$/, "") : x.toFixed(x && x < 1 ? 2 : 1));
const plural = (n, word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;
