"use strict";
// Everything here is drawn from the JSON block, whose texts are strangers': they reach the page as textContent alone.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const heat = data.heatmaps;
const epochs = heat ? heat.epochs : data.epochs;
const state = { gate: 0, epoch: epochs.length - 1, kind: 0, sort: "recorded", cell: null };
const spans = heat ? heat.kinds.map(() => "gate") : [];

// ---- small parts ----

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

// ---- tables that sort ----

function sortableTable(title, columns, rows, fill) {
  const numeric = columns.map((_, i) =>
    rows.some((row) => typeof row[i] === "number") && rows.every((row) => row[i] === null || typeof row[i] === "number")
  );
  const body = make("tbody");
  rows.forEach((row, index) => {
    const line = make("tr");
    row.forEach((value, i) => {
      const cell = make("td", { class: numeric[i] ? "number" : String(value).length > 40 ? "text" : "" });
      if (!fill || !fill(cell, index, i)) cell.append(show(value));
      line.append(cell);
    });
    body.append(line);
  });
  const lines = [...body.children];
  const heads = columns.map((column, i) => {
    const button = make("button", { type: "button" }, String(column));
    const head = make("th", { scope: "col", class: numeric[i] ? "number" : "", "aria-sort": "none" }, button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const order = [...rows.keys()].sort((a, b) => compare(rows[a][i], rows[b][i], up ? 1 : -1));
      body.append(...order.map((index) => lines[index]));
    });
    return head;
  });
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...heads)), body);
  return { box: make("div", { class: "box", tabindex: 0, role: "region", "aria-label": title }, table), lines };
}

function compare(a, b, sign) {
  const [noA, noB] = [a, b].map((value) => value === null || value === "");
  if (noA || noB) return noA - noB; // missing values come last
  return sign *
    (typeof a === "number" && typeof b === "number"
      ? a - b
      : String(a).localeCompare(String(b), "en", { numeric: true }));
}

function facts(rows) {
  return make("dl", {}, ...rows.flatMap(([key, value]) => [make("dt", {}, show(key)), make("dd", {}, show(value))]));
}

function addDocument(section, content) {
  if (!content) return;
  section.hidden = false;
  if (content.facts.length) section.append(facts(content.facts));
  for (const table of content.tables) {
    if (content.tables.length > 1) section.append(make("h3", {}, table.title));
    section.append(sortableTable(table.title, table.columns, table.rows).box);
    if (table.note) section.append(make("p", { class: "note" }, table.note));
  }
}

// ---- overview ----

function overview() {
  const last = data.epochs.at(-1);
  byId("overview").textContent =
    `${data.gates.length} gates at epoch ${last}, the last of ${data.epochs.length} shown. ` +
    "Strength: the share of variance that the channel alone explains, 1 for perfect stripes, with its interval. " +
    "CV: how far the gate is from constant, the standard deviation over images by the size of the stripe. " +
    "Std: over images, mean over channels. " +
    `Settled: the first epoch after which drift stays below ${data.tolerance}.`;
  const columns = [
    "#",
    "gate",
    "channels",
    "strength",
    "interval",
    "CV",
    "std",
    "drift",
    "settled",
    "label share",
    "sample share",
    "rank",
    "flags",
  ];
  const rows = data.gates.map((gate, index) => {
    const { strength, strength_low, strength_high, cv, std, drift, label_share, sample_share, rank } = gate.last;
    return [
      index + 1,
      gate.name,
      gate.channels,
      strength,
      strength_low === null ? null : strength_high - strength_low,
      cv,
      std,
      drift,
      gate.settled,
      label_share,
      sample_share,
      rank,
      gate.flags,
    ];
  });
  const { box, lines } = sortableTable("Gates", columns, rows, (cell, index, i) => {
    if (columns[i] === "gate") {
      const button = make("button", { type: "button" }, data.gates[index].name);
      button.addEventListener("click", () => update({ gate: index }));
      cell.append(button);
    } else if (columns[i] === "interval") {
      const { strength, strength_low: low, strength_high: high } = data.gates[index].last;
      cell.append(low === null ? "–" : `${low.toFixed(3)} to ${high.toFixed(3)}`);
      if (strength !== null) cell.append(interval(strength, low, high));
    } else if (columns[i] === "flags") {
      cell.append(make("span", { class: "flag" }, data.gates[index].flags));
    } else return false;
    return true;
  });
  byId("table").append(box);
  return lines;
}

function interval(value, low, high) {
  const bar = svg("svg", { width: 64, height: 14, "aria-hidden": true });
  bar.append(svg("path", { class: "grid", d: "M4 7H60M4 3V11M60 3V11" }));
  if (low !== null) {
    bar.append(svg("path", { class: "observed", d: `M${4 + 56 * low} 7H${4 + 56 * high}`, "stroke-width": 4 }));
  }
  bar.append(svg("circle", { cx: 4 + 56 * value, cy: 7, r: 3, fill: "var(--strong)" }));
  return bar;
}

// ---- heatmap ----

const unpacked = new Map(); // by gate: the codes of all its panels

async function codesOf(gate) {
  if (!unpacked.has(gate)) {
    const stream = new Blob([bytes(heat.gates[gate].panels)]).stream().pipeThrough(new DecompressionStream("deflate"));
    const all = new Uint8Array(await new Response(stream).arrayBuffer());
    const width = heat.gates[gate].channels.length;
    let from = 0;
    unpacked.set(
      gate,
      heat.gates[gate].ranges.map((range, panel) => {
        const rows = imagesOf(Math.floor(panel / heat.kinds.length)).samples.length;
        const middle = all.subarray(from, from + width);
        const codes = all.slice(from + width, from + width * (rows + 1)).map((code, i) => code + middle[i % width]);
        from += width * (rows + 1);
        return { codes, width, rows, low: range[0], high: range[1] };
      }),
    );
  }
  return unpacked.get(gate);
}

const imagesOf = (epoch) => heat.images[heat.images_of[epoch]];
const valueOf = (panel, place) =>
  panel.codes[place] ? panel.low + (panel.codes[place] - 1) / 254 * (panel.high - panel.low) : null;

function rowOrder(panel, images) {
  const keys = {
    recorded: () => [...images.samples.keys()],
    label: () => images.labels.map((label) => label < 0 ? Infinity : label),
    sample: () => images.samples.map((id) => BigInt(id)),
    mean: () =>
      images.samples.map((_, row) => {
        const values = Array.from({ length: panel.width }, (_, i) => valueOf(panel, row * panel.width + i)).filter(
          (value) => value !== null,
        );
        return values.length ? values.reduce((a, b) => a + b, 0) / values.length : Infinity;
      }),
  }[state.sort]();
  return [...keys.keys()].sort((a, b) => keys[a] < keys[b] ? -1 : keys[a] > keys[b] ? 1 : 0);
}

function colorRange(panels, panel) {
  const span = spans[state.kind];
  if (span === "unit") return [0, 1];
  const those = span === "epoch" ? [panel] : panels.filter((_, i) => i % heat.kinds.length === state.kind);
  const finite = those.filter((each) => each.low !== null);
  return finite.length
    ? [Math.min(...finite.map((each) => each.low)), Math.max(...finite.map((each) => each.high))]
    : [0, 1];
}

let shown = null; // the panel on the canvas: {panel, order, images, channels}

async function drawHeatmap() {
  const { gate, kind, epoch } = state;
  let panels;
  try {
    panels = await codesOf(gate);
  } catch {
    byId("heat").hidden = true;
    byId("no-heat").hidden = false;
    byId("no-heat").textContent =
      "This browser cannot unpack the heatmaps: use one from 2023 or later (DecompressionStream).";
    return;
  }
  if (gate !== state.gate || kind !== state.kind || epoch !== state.epoch) return; // a later choice is being drawn
  const panel = panels[epoch * heat.kinds.length + kind];
  const images = imagesOf(epoch), order = rowOrder(panel, images), channels = heat.gates[gate].channels;
  shown = { panel, order, images, channels };
  paint(panel, order, colorRange(panels, panel));
  drawAxes();
  const name = heat.kinds[kind];
  byId("canvas").setAttribute(
    "aria-label",
    `${name} of ${data.gates[gate].name} at epoch ${
      epochs[epoch]
    }, images down, channels across; arrow keys read values`,
  );
  const step = panel.low === null ? 0 : (panel.high - panel.low) / 254 / 2;
  const all = data.gates[gate].channels;
  byId("heat-note").textContent = [
    `${panel.rows} of ${heat.all_images} images and ${
      channels.length === all ? `all ${all}` : `${channels.length} of ${all}`
    } channels, ${epochs.length} of ${heat.all_epochs} epochs`,
    `${
      panel.rows < heat.all_images || channels.length < all || epochs.length < heat.all_epochs
        ? ", evenly chosen so that the page stays small"
        : ""
    }.`,
    ` Values are kept to ± ${
      show(+step.toPrecision(2))
    } here; strengths, curves and stripes are computed from all images and channels.`,
  ].join("");
  readCell();
}

function paint(panel, order, [low, high]) {
  const canvas = byId("canvas");
  canvas.width = panel.width;
  canvas.height = panel.rows;
  canvas.style.height = `${Math.min(460, Math.max(220, 4 * panel.rows))}px`;
  const table = new Uint8ClampedArray(4 * 256).fill(255);
  table.set([191, 191, 191], 0);
  for (let code = 1; code < 256; code++) {
    const value = panel.low + (code - 1) / 254 * (panel.high - panel.low);
    const place = Math.round(255 * Math.min(1, Math.max(0, high > low ? (value - low) / (high - low) : 0)));
    table.set(colors.subarray(3 * place, 3 * place + 3), 4 * code);
  }
  const context = canvas.getContext("2d", { willReadFrequently: true }),
    image = context.createImageData(panel.width, panel.rows);
  order.forEach((row, y) => {
    for (let x = 0; x < panel.width; x++) {
      const code = panel.codes[row * panel.width + x];
      image.data.set(table.subarray(4 * code, 4 * code + 4), 4 * (y * panel.width + x));
    }
  });
  context.putImageData(image, 0, 0);
  byId("low").textContent = (panel.low < low ? "≤ " : "") + show(low);
  byId("high").textContent = (panel.high > high ? "≥ " : "") + show(high);
  byId("grey").hidden = !panel.codes.includes(0);
}

function drawAxes() {
  const { panel, order, images, channels } = shown;
  const canvas = byId("canvas"), height = canvas.clientHeight, width = canvas.clientWidth;
  const x = [svg("text", { x: width / 2, y: 34, "text-anchor": "middle" }, "channel index")];
  for (const place of ticks(panel.width, width < 500 ? 4 : 8)) {
    x.push(tick((place + 0.5) / panel.width * width, 14, channels[place], "middle", width));
  }
  byId("x-axis").replaceChildren(...x);
  const labelled = state.sort === "label";
  const y = [
    svg(
      "text",
      { transform: `translate(12 ${height / 2}) rotate(-90)`, "text-anchor": "middle" },
      labelled ? "image, by label" : "image, counted from 0",
    ),
  ];
  if (labelled) {
    let from = 0, above = -Infinity;
    order.forEach((row, at) => {
      if (at + 1 < order.length && images.labels[order[at + 1]] === images.labels[row]) return;
      const middle = (from + at + 1) / 2 / panel.rows * height, edge = (at + 1) / panel.rows * height;
      y.push(svg("path", { class: "grid", d: `M40 ${edge}H60` }));
      if (middle - above >= 13) {
        y.push(
          svg(
            "text",
            { x: "100%", dx: -6, y: middle + 4, "text-anchor": "end" },
            images.labels[row] < 0 ? "?" : images.labels[row],
          ),
        );
        above = middle;
      }
      from = at + 1;
    });
  } else {for (const place of ticks(panel.rows, 6)) {
      y.push(
        svg("text", {
          x: "100%",
          dx: -6,
          y: Math.max(10, (place + 0.5) / panel.rows * height + 4),
          "text-anchor": "end",
        }, place),
      );
    }}
  byId("y-axis").replaceChildren(...y);
}

const tick = (x, y, text, anchor, width) =>
  svg("text", { x, y, "text-anchor": x < 12 ? "start" : x > width - 12 ? "end" : anchor }, text);

function ticks(count, most) {
  const step = [1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500, 1000].find((each) => (count - 1) / each < most) || count;
  return Array.from({ length: Math.ceil(count / step) }, (_, i) => i * step);
}

function readCell() {
  const cursor = byId("cursor"), { panel, order, images, channels } = shown;
  if (state.cell) state.cell = [Math.min(state.cell[0], panel.width - 1), Math.min(state.cell[1], panel.rows - 1)];
  cursor.hidden = !state.cell;
  if (!state.cell) {
    byId("readout").textContent = "Point at the heatmap, or focus it and press arrow keys, to read values.";
    return;
  }
  const [x, y] = state.cell, row = order[y], label = images.labels[row], value = valueOf(panel, row * panel.width + x);
  Object.assign(cursor.style, {
    left: `${100 * x / panel.width}%`,
    width: `${100 / panel.width}%`,
    top: `${100 * y / panel.rows}%`,
    height: `${100 / panel.rows}%`,
  });
  byId("readout").textContent = `sample ${images.samples[row]} · label ${label < 0 ? "unknown" : label} · channel ${
    channels[x]
  } · ${heat.kinds[state.kind]} ${value === null ? "not finite" : show(value)}`;
}

function setUpHeatmap() {
  if (!heat) {
    byId("heat").hidden = true;
    byId("no-heat").hidden = false;
    byId("no-heat").textContent = "No heatmap: this run was recorded as moments alone and holds no row per image, or the page has no room left. " +
      "Stripes and curves below are of all images.";
    return;
  }
  heat.kinds.forEach((kind, index) => {
    const box = make("input", { type: "radio", name: "kind", value: kind });
    box.checked = index === 0;
    box.addEventListener("change", () => update({ kind: index }));
    byId("kinds").append(
      make(
        "label",
        {},
        box,
        kind === "squeeze" ? " squeeze (before)" : heat.kinds.length > 1 ? " attention (after)" : " attention",
      ),
    );
  });
  byId("sort").addEventListener("change", (event) => update({ sort: event.target.value }));
  byId("span").addEventListener("change", (event) => {
    spans[state.kind] = event.target.value;
    update({});
  });
  const canvas = byId("canvas");
  const point = (event) => {
    if (!shown) return;
    const box = canvas.getBoundingClientRect();
    const place = (at, size, count) => Math.min(count - 1, Math.max(0, Math.floor(at / size * count)));
    state.cell = [
      place(event.clientX - box.left, box.width, shown.panel.width),
      place(event.clientY - box.top, box.height, shown.panel.rows),
    ];
    readCell();
  };
  canvas.addEventListener("pointermove", point);
  canvas.addEventListener("pointerdown", point);
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!step || !shown) return;
    event.preventDefault();
    const [x, y] = state.cell || [-step[0], -step[1]];
    state.cell = [Math.max(0, x + step[0]), Math.max(0, y + step[1])];
    readCell();
  });
  const ramp = byId("colorbar").getContext("2d"), image = ramp.createImageData(256, 1);
  for (let i = 0; i < 256; i++) image.data.set([...colors.subarray(3 * i, 3 * i + 3), 255], 4 * i);
  ramp.putImageData(image, 0, 0);
}

// ---- axes for lines ----

function frame(host, { x, y, height, xlabel, log }) {
  const width = Math.max(240, host.clientWidth), left = 52, right = 10, top = 8, bottom = 38;
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, "aria-hidden": true });
  const flat = (value) => log ? Math.log10(value) : value;
  const reach = ([low, high], from, to) => (value) =>
    high > low ? from + (value - low) / (high - low) * (to - from) : (from + to) / 2;
  const px = reach(x, left, width - right), scaleY = reach(y.map(flat), height - bottom, top);
  const py = (value) => scaleY(flat(value));
  for (const value of niceTicks(y, 5, log)) {
    root.append(svg("path", { class: "grid", d: `M${left} ${py(value)}H${width - right}` }));
    root.append(svg("text", { x: left - 6, y: py(value) + 4, "text-anchor": "end" }, show(value)));
  }
  for (const value of niceTicks(x, width < 420 ? 5 : 9)) {
    if (Number.isInteger(value)) {
      root.append(svg("text", { x: px(value), y: height - bottom + 16, "text-anchor": "middle" }, value));
    }
  }
  root.append(svg("text", { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, xlabel));
  return { root, px, py, width, left, right, top, bottom };
}

function niceTicks([low, high], most, log) {
  if (log) {
    const first = Math.ceil(Math.log10(low) - 1e-9), last = Math.floor(Math.log10(high) + 1e-9);
    const decades = Array.from({ length: Math.max(0, last - first + 1) }, (_, i) => 10 ** (first + i));
    if (decades.length > 1) return decades;
    const finer = [-1, 0, 1].flatMap((i) => [1, 2, 5].map((digit) => +(digit * 10 ** (first + i)).toPrecision(1)));
    const inside = finer.filter((value) => value >= low && value <= high);
    if (inside.length > 1) return inside;
  }
  if (!(high > low)) return [low];
  const raw = (high - low) / most, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= raw);
  const values = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) {
    values.push(+(i * step).toPrecision(12));
  }
  return values;
}

function path(points) {
  let pen = "M";
  return points.map(([x, y]) => {
    if (x === null || y === null || !Number.isFinite(y)) {
      pen = "M";
      return "";
    }
    const step = `${pen}${x.toFixed(1)} ${y.toFixed(1)}`;
    pen = "L";
    return step;
  }).join("");
}

function bandPaths(xs, lows, highs, { px, py }) {
  const paths = [];
  let run = [];
  for (let i = 0; i <= xs.length; i++) {
    if (i < xs.length && lows[i] !== null && highs[i] !== null) {
      run.push(i);
      continue;
    }
    if (run.length) {
      paths.push(
        path([...run.map((k) => [px(xs[k]), py(lows[k])]), ...run.reverse().map((k) => [px(xs[k]), py(highs[k])])]) +
          "Z",
      );
    }
    run = [];
  }
  return paths;
}

function figure(host, title) {
  const readout = make("output"),
    holder = make("div"),
    box = make("figure", {}, make("figcaption", {}, title), holder, readout);
  host.append(box);
  return { holder, readout };
}

// ---- over epochs ----

const CURVES = [
  { name: "strength", title: "Stripe strength", range: () => [0, 1] },
  { name: "std", title: "Std over images" },
  { name: "drift", title: "Drift of the stripe, logarithmic", log: true },
];

function drawCurve(curve) {
  const { name, log, holder, readout } = curve;
  const series = data.gates.map((gate) => gate.curves[name].map((value) => log && value <= 0 ? null : value));
  const finite = series.flat().filter((value) => value !== null);
  if (!finite.length) {
    holder.replaceChildren(
      make(
        "p",
        { class: "note" },
        name === "drift" ? "No drift: it takes two recorded epochs that differ." : "No finite value.",
      ),
    );
    readout.textContent = "";
    return;
  }
  const extent = finite.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [
    Infinity,
    -Infinity,
  ]);
  const y = curve.range
    ? curve.range()
    : log
    ? (extent[0] < extent[1] ? extent : [extent[0] / 2, extent[1] * 2])
    : [0, extent[1] || 1];
  const axes = frame(holder, { x: [data.epochs[0], data.epochs.at(-1)], y, height: 230, xlabel: "epoch", log });
  const now = axes.px(epochs[state.epoch]);
  axes.root.append(svg("path", { class: "now", d: `M${now} ${axes.top}V${230 - axes.bottom}` }));
  const order = [...series.keys()].filter((index) => index !== state.gate).concat(state.gate);
  for (const index of order) {
    const chosen = index === state.gate;
    const depth = series.length > 1 ? index / (series.length - 1) : 0.5;
    // The ranges below leave out the ends of viridis, which the background would swallow.
    const stroke = `light-dark(${color(Math.round(205 * depth))}, ${color(Math.round(95 + 160 * depth))})`;
    if (chosen && name === "strength") {
      const { strength_low, strength_high } = data.gates[index].curves;
      for (const d of bandPaths(data.epochs, strength_low, strength_high, axes)) {
        axes.root.append(svg("path", { class: "band", d }));
      }
    }
    const line = svg("path", {
      class: chosen ? "line chosen" : "line",
      d: path(series[index].map((value, i) => [axes.px(data.epochs[i]), value === null ? null : axes.py(value)])),
    });
    line.style.stroke = stroke;
    axes.root.append(line);
    series[index].forEach((value, i) => {
      const lone = value !== null && (series[index][i - 1] ?? null) === null && (series[index][i + 1] ?? null) === null;
      if (!lone && !(chosen && value !== null && series[index].length <= 60)) return;
      const dot = svg("circle", { cx: axes.px(data.epochs[i]), cy: axes.py(value), r: chosen ? 3.5 : 2.5 });
      dot.style.fill = stroke;
      axes.root.append(dot);
    });
  }
  const say = (gate, i) => {
    const found = data.gates[gate], low = found.curves.strength_low[i], high = found.curves.strength_high[i];
    const between = name === "strength" && low !== null ? ` (${show(low)} to ${show(high)})` : "";
    const value = show(found.curves[name][i]);
    readout.textContent = `${found.name} · epoch ${data.epochs[i]} · ${name} ${value}${between}`;
  };
  const rest = () => say(state.gate, Math.max(0, data.epochs.indexOf(epochs[state.epoch])));
  const nearest = (event) => {
    const box = axes.root.getBoundingClientRect(),
      x = (event.clientX - box.left) * axes.width / box.width,
      y = event.clientY - box.top;
    const away = data.epochs.map((epoch) => Math.abs(axes.px(epoch) - x)), i = away.indexOf(Math.min(...away));
    const off = series.map((values) => values[i] === null ? Infinity : Math.abs(axes.py(values[i]) - y));
    return [off.indexOf(Math.min(...off)), i];
  };
  axes.root.addEventListener("pointermove", (event) => say(...nearest(event)));
  axes.root.addEventListener("pointerleave", rest);
  axes.root.addEventListener("click", (event) => update({ gate: nearest(event)[0] }));
  holder.replaceChildren(axes.root);
  rest();
}

// ---- the stripe and what was learned ----

function setUpStripe() {
  const host = byId("stripe"),
    item = (mark, text) => {
      const icon = svg("svg");
      icon.append(mark);
      return make("span", {}, icon, text);
    };
  const key = make(
    "div",
    { class: "key" },
    item(svg("path", { class: "observed", d: "M0 5H22" }), "mean over images"),
    item(svg("rect", { class: "band", width: 22, height: 10 }), "± 1 std over images"),
  );
  if (data.validation) key.append(item(svg("circle", { class: "learned", cx: 11, cy: 5, r: 3 }), "learned vector"));
  host.append(key);
  return figure(host, "");
}

function drawStripe({ holder, readout }) {
  const gate = data.gates[state.gate], learned = gate.learned;
  byId("stripe-note").textContent =
    `${gate.name}, epoch ${data.stripe_epoch}${
      data.validation ? " (the validation's)" : " (the last)"
    }: attention of all ${gate.channels} channels, sorted by the stripe.` +
    (data.validation && !learned ? " The validation has no vector of this gate." : "");
  const order = [...gate.mean.keys()].filter((i) => gate.mean[i] !== null).sort((a, b) => gate.mean[a] - gate.mean[b]);
  if (!order.length) {
    holder.replaceChildren(make("p", { class: "note" }, "No channel is finite."));
    readout.textContent = "";
    return;
  }
  const mean = order.map((i) => gate.mean[i]), std = order.map((i) => gate.std[i] ?? 0);
  const low = mean.map((m, i) => m - std[i]), high = mean.map((m, i) => m + std[i]);
  const dots = learned ? order.map((i) => learned[i]) : [];
  const reach = [...low, ...high, ...dots.filter((value) => value !== null)].reduce(
    ([a, b], value) => [Math.min(a, value), Math.max(b, value)],
    [Infinity, -Infinity],
  );
  const axes = frame(holder, {
    x: [0, order.length - 1],
    y: reach[0] < reach[1] ? reach : [reach[0] - 0.5, reach[1] + 0.5],
    height: 260,
    xlabel: "channel, sorted by the observed stripe",
  });
  const xs = order.map((_, i) => i);
  for (const d of bandPaths(xs, low, high, axes)) axes.root.append(svg("path", { class: "band", d }));
  axes.root.append(svg("path", { class: "observed", d: path(xs.map((i) => [axes.px(i), axes.py(mean[i])])) }));
  dots.forEach((value, i) => {
    if (value !== null) {
      axes.root.append(svg("circle", { class: "learned", cx: axes.px(i), cy: axes.py(value), r: 2.2 }));
    }
  });
  const say = (i) => {
    readout.textContent = `channel ${order[i]} · mean ${show(mean[i])} · std ${show(gate.std[order[i]])}${
      learned ? ` · learned ${show(dots[i])}` : ""
    }`;
  };
  axes.root.addEventListener("pointermove", (event) => {
    const box = axes.root.getBoundingClientRect(), x = (event.clientX - box.left) * axes.width / box.width;
    const share = (x - axes.left) / (axes.width - axes.left - axes.right);
    say(Math.min(order.length - 1, Math.max(0, Math.round(share * (order.length - 1)))));
  });
  holder.replaceChildren(axes.root);
  readout.textContent = "Point at the figure to read a channel.";
}

// ---- together ----

function setUpTheme() {
  const button = byId("theme"), themes = ["system", "light", "dark"];
  button.addEventListener("click", () => {
    const now = themes[(themes.indexOf(document.documentElement.dataset.theme || "system") + 1) % 3];
    if (now === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = now;
    button.textContent = `Theme: ${now}`;
  });
}

function update(change) {
  Object.assign(state, change);
  byId("gate").value = state.gate;
  byId("epoch").value = state.epoch;
  byId("epoch").setAttribute("aria-valuetext", `epoch ${epochs[state.epoch]}`);
  byId("epoch-now").textContent = epochs[state.epoch];
  lines.forEach((line, index) =>
    index === state.gate ? line.setAttribute("aria-current", "true") : line.removeAttribute("aria-current")
  );
  if (heat) {
    byId("span").value = spans[state.kind];
    drawHeatmap();
  }
  CURVES.forEach(drawCurve);
  drawStripe(stripe);
}

byId("run").textContent = data.run;
document.title = `${data.run} - stripe report`;
document.querySelector("main").hidden = false;
const lines = overview();
data.gates.forEach((gate, index) =>
  byId("gate").append(make("option", { value: index }, `${index + 1}. ${gate.name} (${gate.channels})`))
);
byId("gate").addEventListener("change", (event) => update({ gate: +event.target.value }));
byId("epoch").max = epochs.length - 1;
byId("epoch").addEventListener("input", (event) => update({ epoch: +event.target.value }));
byId("bar").addEventListener("submit", (event) => event.preventDefault());
CURVES.forEach((curve) => Object.assign(curve, figure(byId("curves"), curve.title)));
const stripe = setUpStripe();
setUpHeatmap();
setUpTheme();
addDocument(byId("validation"), data.validation);
addDocument(byId("fold"), data.fold);
for (const section of data.about) {
  const part = make("div", {}, make("h3", {}, section.title));
  addDocument(part, section);
  byId("about").append(part);
}
update({});
let width = globalThis.innerWidth;
globalThis.addEventListener("resize", () => {
  if (width !== globalThis.innerWidth) {
    width = globalThis.innerWidth;
    update({});
  }
});
