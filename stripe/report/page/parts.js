"use strict";
// Everything shown comes from the JSON block, whose texts are untrusted: they reach the page only as textContent.

const data = JSON.parse(document.getElementById("data").textContent);
const runs = data.runs;
const two = runs.length > 1;
const letters = ["A", "B"];
const gates = [...new Set(runs.flatMap((run) => run.gates.map((gate) => gate.name)))];
const gateOf = (run, name) => run.gates.findIndex((gate) => gate.name === name); // -1 if the run has no such gate
const byId = (id) => document.getElementById(id);

// ---- elements and numbers ----

function make(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children); // strings become text nodes
  return node;
}

function svg(name, attributes = {}, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function show(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number" || Number.isInteger(value)) return String(value);
  const size = Math.abs(value);
  return size < 1e-3 || size >= 1e6 ? value.toExponential(2) : String(+value.toPrecision(4));
}

const bytes = (text) => Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
const colors = bytes(data.colors);
const color = (code) => `rgb(${colors.subarray(3 * code, 3 * code + 3).join(" ")})`;

/** Returns the smallest and the largest finite number. */
function extent(values) {
  return values.filter((value) => value !== null && Number.isFinite(value)).reduce(
    ([low, high], value) => [Math.min(low, value), Math.max(high, value)],
    [Infinity, -Infinity],
  );
}

/** Returns the index of the number that is nearest to `wanted`. */
function nearest(numbers, wanted) {
  return numbers.reduce((best, each, i) => Math.abs(each - wanted) < Math.abs(numbers[best] - wanted) ? i : best, 0);
}

// ---- explanations, on hover and focus ----

/** Makes `node` show an explanation while it is pointed at or has the focus. */
function explain(node, text) {
  if (text) node.dataset.tip = text;
  return node;
}

function setUpTips() {
  const tip = byId("tip");
  let owner = null;
  const hide = () => {
    owner?.removeAttribute("aria-describedby");
    owner = null;
    tip.hidden = true;
  };
  const reveal = (event) => {
    const node = event.target.closest?.("[data-tip]");
    if (!node || node === owner) return;
    hide();
    owner = node;
    tip.textContent = node.dataset.tip;
    tip.hidden = false;
    node.setAttribute("aria-describedby", "tip");
    const at = node.getBoundingClientRect(), own = tip.getBoundingClientRect();
    const below = at.bottom + 6 + own.height <= globalThis.innerHeight;
    tip.style.left = `${Math.max(8, Math.min(at.left, document.documentElement.clientWidth - own.width - 8))}px`;
    tip.style.top = `${below ? at.bottom + 6 : Math.max(0, at.top - own.height - 6)}px`;
  };
  const leave = (event) => {
    if (owner && !owner.contains(event.relatedTarget) && owner !== document.activeElement) hide();
  };
  document.addEventListener("pointerover", reveal);
  document.addEventListener("focusin", reveal);
  document.addEventListener("pointerout", leave);
  document.addEventListener("focusout", hide);
  document.addEventListener("scroll", hide, true);
  document.addEventListener("keydown", (event) => event.key === "Escape" && hide());
}

// ---- saving ----

function saveFile(name, content) {
  const link = make("a", { href: URL.createObjectURL(content), download: name.replace(/[^\w.-]+/g, "_") });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

function saveTable(name, columns, rows) {
  const cell = (value) => /[",\n\r]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value;
  const lines = [columns, ...rows].map((row) => row.map((value) => cell(String(value ?? ""))).join(","));
  saveFile(`${name}.csv`, new Blob([lines.join("\n") + "\n"], { type: "text/csv" }));
}

const DRAWN = ["fill", "stroke", "stroke-width", "stroke-dasharray", "opacity", "font-size", "font-weight"];

/** Returns a drawing as an image, in the colours of the page's style. */
async function imageOf(root) {
  const copy = root.cloneNode(true), nodes = root.querySelectorAll("*");
  const { width, height } = root.viewBox.baseVal;
  copy.querySelectorAll("*").forEach((node, i) => {
    const style = getComputedStyle(nodes[i]);
    for (const name of DRAWN) node.setAttribute(name, style.getPropertyValue(name));
    node.removeAttribute("style");
    node.setAttribute("font-family", "system-ui, sans-serif");
    if (node.localName === "image") node.setAttribute("image-rendering", "pixelated");
  });
  copy.setAttribute("width", 2 * width);
  copy.setAttribute("height", 2 * height);
  const image = new Image();
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(new XMLSerializer().serializeToString(copy))}`;
  await image.decode();
  return image;
}

/** Saves drawings side by side, under a title, as one PNG at twice their size on the screen. */
async function savePicture(name, title, roots) {
  const images = await Promise.all(roots.map(imageOf));
  const picture = make("canvas"), context = picture.getContext("2d"), head = 56;
  picture.width = images.reduce((sum, image) => sum + image.width, 0);
  picture.height = head + Math.max(...images.map((image) => image.height));
  const style = getComputedStyle(byId("h-gates").parentElement);
  context.fillStyle = style.backgroundColor;
  context.fillRect(0, 0, picture.width, picture.height);
  context.fillStyle = style.color;
  context.font = "600 26px system-ui, sans-serif";
  context.fillText(title, 16, 36, picture.width - 32);
  let x = 0;
  for (const image of images) {
    context.drawImage(image, x, head);
    x += image.width;
  }
  picture.toBlob((blob) => saveFile(`${name}.png`, blob));
}
