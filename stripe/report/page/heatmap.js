// ---- what was recorded, image by channel, in panels side by side ----

const KINDS = { squeeze: "Before the gate: squeeze", attention: "At the gate: attention" };
const recorded = runs.map((run) => run.heatmaps); // null for a run of moments, or if the page has no room
const unpacked = runs.map(() => new Map()); // by run, then by gate: all panels of the gate
let views = []; // the panels shown: {run, gate, kind, epoch, panel, images, order, channels, axes, cursor}
let turn = 0;
const NONE =
  "No heatmap: the run was recorded as moments alone, without a row per image, or the page has no room left. The stripes and curves below " +
  "cover all images.";

/** Returns a gate's panels, epoch by epoch, and within an epoch kind by kind. */
async function panelsOf(run, gate) {
  const heat = recorded[run], of = unpacked[run];
  if (of.has(gate)) return of.get(gate);
  const stream = new Blob([bytes(heat.gates[gate].panels)]).stream().pipeThrough(new DecompressionStream("deflate"));
  const all = new Uint8Array(await new Response(stream).arrayBuffer()), width = heat.gates[gate].channels.length;
  let from = 0;
  const panels = heat.gates[gate].ranges.map(([low, high], place) => {
    const rows = imagesOf(heat, Math.floor(place / heat.kinds.length)).samples.length;
    const middle = all.subarray(from, from + width);
    const codes = all.slice(from + width, from + width * (rows + 1)).map((code, i) => code + middle[i % width]);
    from += width * (rows + 1);
    return { codes, width, rows, low, high, kind: heat.kinds[place % heat.kinds.length] };
  });
  of.set(gate, panels);
  return panels;
}

const imagesOf = (heat, epoch) => heat.images[heat.images_of[epoch]];
const valueOf = ({ codes, low, high }, place) => codes[place] ? low + (codes[place] - 1) / 254 * (high - low) : null;

/** Returns the panels to show, {run, gate, kind, epoch}, where all but the kind are indices. */
function chosenViews() {
  return runs.flatMap((_, run) => {
    const heat = recorded[run], gate = gateOf(runs[run], state.gate);
    if (!heat || gate < 0) return [];
    const now = nearest(heat.epochs, state.epoch), view = (kind, epoch) => ({ run, gate, kind, epoch });
    if (state.view === "gate") return heat.kinds.toReversed().map((kind) => view(kind, now));
    return (state.view === "epochs" ? [0, now] : [now]).map((epoch) => view("attention", epoch));
  });
}

async function drawHeatmaps() {
  const mine = ++turn, shown = chosenViews();
  let panels;
  try {
    panels = await Promise.all(shown.map(({ run, gate }) => panelsOf(run, gate)));
  } catch {
    say("This browser cannot unpack the heatmaps: use one from 2023 or later (DecompressionStream).");
    return;
  }
  if (mine !== turn) return; // a later choice is being drawn
  say(shown.length ? "" : NONE);
  const host = byId("panels");
  host.replaceChildren(...shown.map(() => make("div")));
  host.classList.toggle("one", shown.length === 1);
  views = shown.map((view, i) => {
    const heat = recorded[view.run], images = imagesOf(heat, view.epoch);
    const panel = panels[i][view.epoch * heat.kinds.length + heat.kinds.indexOf(view.kind)];
    return { ...view, panel, images, channels: heat.gates[view.gate].channels, host: host.children[i] };
  });
  for (const view of views.toReversed()) { // panels of the same images share the last panel's order of rows
    const last = views.at(-1), same = String(last.images.samples) === String(view.images.samples);
    view.order = same && last.order ? last.order : rowOrder(view);
  }
  for (const view of views) drawPanel(view, colorRange(view, views.map((each, i) => [each, panels[i]])));
  byId("heat-note").textContent = noteOf(views);
  readCell();
}

function say(text) {
  byId("no-heat").textContent = text;
  byId("no-heat").hidden = !text;
  byId("heat").hidden = text !== "";
}

function rowOrder({ panel, images }) {
  const keys = {
    recorded: () => [...images.samples.keys()],
    label: () => images.labels.map((label) => label < 0 ? Infinity : label),
    sample: () => images.samples.map((id) => BigInt(id)),
    mean: () =>
      images.samples.map((_, row) => {
        const values = Array.from({ length: panel.width }, (_, i) => valueOf(panel, row * panel.width + i));
        const finite = values.filter((value) => value !== null);
        return finite.length ? finite.reduce((a, b) => a + b, 0) / finite.length : Infinity;
      }),
  }[state.rows]();
  return [...keys.keys()].sort((a, b) => keys[a] < keys[b] ? -1 : keys[a] > keys[b] ? 1 : 0);
}

/** Returns the range of a panel's colours: panels of the same kind share one unless each is to have its own. */
function colorRange(view, shown) {
  if (state.span === "unit") return [0, 1];
  const kin = shown.flatMap(([each, panels]) => each.kind === view.kind ? panels : []);
  const those = state.span === "panel" ? [view.panel] : kin.filter((panel) => panel.kind === view.kind);
  return middle(those) ?? [0, 1];
}

/** Returns the range of the middle 99 % of some panels' values, so that one channel does not take up all colours. */
function middle(panels) {
  const counts = new Map();
  for (const panel of panels) {
    const times = new Uint32Array(256);
    for (const code of panel.codes) times[code]++;
    for (let code = 1; code < 256; code++) {
      const value = panel.low + (code - 1) / 254 * (panel.high - panel.low);
      if (times[code]) counts.set(value, (counts.get(value) ?? 0) + times[code]);
    }
  }
  const values = [...counts.keys()].sort((a, b) => a - b),
    all = values.reduce((sum, value) => sum + counts.get(value), 0);
  const at = (share) => {
    let passed = 0;
    return values.find((value) => (passed += counts.get(value)) >= share * all);
  };
  return all ? [at(0.005), at(0.995)] : null;
}

function noteOf(views) {
  if (!views.length) return "";
  const { run, gate, panel, channels } = views.at(-1), heat = recorded[run], all = runs[run].gates[gate].channels;
  const some = panel.rows < heat.all_images || channels.length < all || heat.epochs.length < heat.all_epochs;
  const step = panel.low === null ? 0 : (panel.high - panel.low) / 508;
  return `Shown: ${panel.rows} of ${heat.all_images} images, ${channels.length} of ${all} channels, ` +
    `${heat.epochs.length} of ${heat.all_epochs} epochs${
      some ? ", evenly chosen so that the page stays small" : ""
    }. ` +
    `Values are kept to ± ${show(+step.toPrecision(2))} here; strengths, curves and stripes are computed from all ` +
    "images and channels.";
}

// ---- one panel ----

function titleOf({ run, gate, kind, epoch }) {
  const heat = recorded[run], number = heat.epochs[epoch], place = runs[run].epochs.indexOf(number);
  const { strength, cv } = runs[run].gates[gate].curves;
  const [s, c] = kind === "squeeze" ? heat.gates[gate].squeeze[epoch] : [strength[place], cv[place]];
  const name = `${two ? `${letters[run]} · ` : ""}${state.view === "gate" ? KINDS[kind] : kind}, epoch ${number}`;
  return [name[0].toUpperCase() + name.slice(1), `strength ${show(s)} · CV ${show(c)}`];
}

function drawPanel(view, [low, high]) {
  const { panel, host, channels } = view, width = Math.max(260, host.clientWidth), title = titleOf(view);
  const classes = state.rows === "label" ? classesOf(view) : null;
  const axes = frame({
    width,
    height: Math.min(400, Math.max(200, 4 * panel.rows)) + 122,
    x: [0, panel.width],
    y: [panel.rows, 0],
    xlabel: "channel index",
    ylabel: classes ? "image, by label" : "image",
    xticks: placeTicks(panel.width, width < 420 ? 4 : 8).map((place) => [place + 0.5, channels[place]]),
    yticks: classes ? classes.ticks : placeTicks(panel.rows, 6).map((place) => [place + 0.5, place]),
    top: 46,
    below: 34,
  });
  const { root, left, right, top, bottom } = axes;
  root.append(
    svg("text", { class: "title", x: left, y: 15 }, title[0]),
    svg("text", { x: left, y: 33 }, title[1]),
    picture(paint(view, low, high), left, top, right - left, bottom - top),
  );
  for (const edge of classes?.edges ?? []) {
    root.append(svg("path", { class: "edge", d: `M${left} ${axes.py(edge)}H${right}` }));
  }
  const bar = bottom + 50,
    ends = [(panel.low < low ? "≤ " : "") + show(low), (panel.high > high ? "≥ " : "") + show(high)];
  const grey = panel.codes.includes(0) ? "  grey: not finite" : "";
  root.append(
    svg("text", { x: left + 54, y: bar + 10, "text-anchor": "end" }, ends[0]),
    picture(RAMP, left + 60, bar, 90, 12),
    svg("text", { x: left + 156, y: bar + 10 }, ends[1] + grey),
  );
  view.axes = axes;
  view.cursor = root.appendChild(svg("rect", { class: "cursor" }));
  const named = `${title[0]}, ${title[1]}, gate ${state.gate}: images down, channels across; arrow keys read values`;
  for (const [key, value] of Object.entries({ tabindex: 0, role: "img", "aria-label": named })) {
    root.setAttribute(key, value);
  }
  root.setAttribute("aria-describedby", "readout");
  root.classList.add("cells");
  root.addEventListener("pointermove", (event) => pointAt(view, event));
  root.addEventListener("pointerdown", (event) => pointAt(view, event));
  root.addEventListener("keydown", (event) => moveBy(view, event));
  host.replaceChildren(root);
}

/** Returns where classes end in the order of the rows, and labels for those classes that have room for one. */
function classesOf({ panel, images, order }) {
  const edges = [], ticks = [];
  let from = 0, above = -Infinity;
  order.forEach((row, at) => {
    if (at + 1 < order.length && images.labels[order[at + 1]] === images.labels[row]) return;
    const middle = (from + at + 1) / 2;
    if (middle - above >= panel.rows / 25) {
      ticks.push([middle, images.labels[row] < 0 ? "?" : images.labels[row]]);
      above = middle;
    }
    if (at + 1 < order.length) edges.push(at + 1);
    from = at + 1;
  });
  return { edges, ticks };
}

const picture = (canvas, x, y, width, height) =>
  svg("image", { class: "pixels", href: canvas.toDataURL(), x, y, width, height, preserveAspectRatio: "none" });

/** Paints the cells of a panel, one pixel each. */
function paint(view, low, high) {
  const { panel, order } = view;
  const table = new Uint8ClampedArray(4 * 256).fill(255);
  table.set([191, 191, 191], 0);
  for (let code = 1; code < 256; code++) {
    const value = panel.low + (code - 1) / 254 * (panel.high - panel.low);
    const place = Math.round(255 * Math.min(1, Math.max(0, high > low ? (value - low) / (high - low) : 0)));
    table.set(colors.subarray(3 * place, 3 * place + 3), 4 * code);
  }
  view.canvas = pixelsOf(panel.width, panel.rows, (x, y) => {
    const code = panel.codes[order[y] * panel.width + x];
    return table.subarray(4 * code, 4 * code + 4);
  });
  return view.canvas;
}

function pixelsOf(width, height, colorAt) {
  const canvas = make("canvas", { width, height }), context = canvas.getContext("2d", { willReadFrequently: true });
  const image = context.createImageData(width, height);
  for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) image.data.set(colorAt(x, y), 4 * (y * width + x));
  context.putImageData(image, 0, 0);
  return canvas;
}

const RAMP = pixelsOf(256, 1, (x) => [...colors.subarray(3 * x, 3 * x + 3), 255]);

// ---- reading values ----

let cell = null; // {view, x, y}: the panel, channel and row whose value is shown

function pointAt(view, event) {
  const { axes, panel } = view, box = axes.root.getBoundingClientRect(), scale = axes.width / box.width;
  const place = (at, [from, to], count) =>
    Math.min(count - 1, Math.max(0, Math.floor((at - from) / (to - from) * count)));
  cell = {
    view: views.indexOf(view),
    x: place((event.clientX - box.left) * scale, [axes.left, axes.right], panel.width),
    y: place((event.clientY - box.top) * scale, [axes.top, axes.bottom], panel.rows),
  };
  readCell();
}

function moveBy(view, event) {
  const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (!step) return;
  event.preventDefault();
  const { x, y } = cell ?? { x: -step[0], y: -step[1] };
  cell = { view: views.indexOf(view), x: Math.max(0, x + step[0]), y: Math.max(0, y + step[1]) };
  readCell();
}

/** Marks the cell, and shows its value, in every panel that has the same image in that row. */
function readCell() {
  const lead = cell && (views[cell.view] ?? views[0]);
  if (!lead) {
    byId("readout").textContent = "Point at a heatmap, or focus it and press arrow keys, to read values.";
    return;
  }
  cell.x = Math.min(cell.x, lead.panel.width - 1);
  cell.y = Math.min(cell.y, lead.panel.rows - 1);
  const sampleIn = ({ images, order }) => images.samples[order[cell.y]];
  const sample = sampleIn(lead), label = lead.images.labels[lead.order[cell.y]];
  const texts = [`sample ${sample}`, `label ${label < 0 ? "unknown" : label}`, `channel ${lead.channels[cell.x]}`];
  for (const view of views) {
    const { axes, panel, order, cursor } = view, here = sampleIn(view) === sample && cell.x < panel.width;
    cursor.style.display = here ? "" : "none";
    if (!here) continue;
    const [x, y] = [axes.px(cell.x), axes.py(cell.y)];
    const size = { width: Math.max(3, axes.px(cell.x + 1) - x), height: Math.max(3, axes.py(cell.y + 1) - y) };
    for (const [key, value] of Object.entries({ x, y, ...size })) cursor.setAttribute(key, value);
    const value = valueOf(panel, order[cell.y] * panel.width + cell.x), epoch = recorded[view.run].epochs[view.epoch];
    const name = { gate: view.kind, epochs: `epoch ${epoch}`, runs: "" }[state.view];
    const of = `${two ? letters[view.run] : ""} ${name}`.trim();
    texts.push(`${of} ${value === null ? "not finite" : show(value)}`);
  }
  byId("readout").textContent = texts.join(" · ");
}
