// ---- the table of gates ----

const TABLE = [
  ["#", "the order in which the network computes its gates"],
  ["gate", "the place in the network where a feature map is multiplied by attention; choose one to see it below"],
  ...(two ? [["run", "which of the two runs"]] : []),
  ...(two ? [] : [["channels", data.columns.channels]]),
  ["strength", data.columns.strength],
  ...(two ? [["against A", "strength of run B minus that of run A"]] : []),
  ["interval", `95 % confidence interval of the strength${two ? "" : "; the line to its right runs from 0 to 1"}`],
  ["CV", data.columns.cv],
  ["std", data.columns.std],
  ["drift", data.columns.drift],
  ["settled", `the first epoch after which drift stays below ${data.tolerance}; empty if there is none`],
  ["label share", data.columns.label_share],
  ["sample share", data.columns.sample_share],
  ["rank", `${data.columns.rank.split(";")[0]}; computed only at the last epoch`],
  ["flags", data.columns.flags],
];
const TITLES = TABLE.map(([title]) => title);
let shownGates = []; // the gate and run of each line of the table

function rowOf(run, name, epoch) {
  const gate = runs[run].gates[gateOf(runs[run], name)], i = nearest(runs[run].epochs, epoch);
  const at = Object.fromEntries(Object.entries(gate.curves).map(([column, values]) => [column, values[i]]));
  const last = i === runs[run].epochs.length - 1;
  const width = at.strength_low === null ? null : at.strength_high - at.strength_low;
  const first = runs[0].gates[gateOf(runs[0], name)]?.curves.strength[nearest(runs[0].epochs, epoch)] ?? null;
  const change = run === 0 || first === null || at.strength === null ? null : at.strength - first;
  return [
    ...[gates.indexOf(name) + 1, name, two ? letters[run] : gate.channels, at.strength],
    ...[...(two ? [change] : []), width, at.cv, at.std, at.drift, gate.settled],
    ...[at.label_share, at.sample_share, last ? gate.rank : null, gate.flags[i]],
  ];
}

function setUpTable() {
  const at = (name) => TITLES.indexOf(name);
  const table = sortableTable({
    title: "Table of gates",
    columns: TABLE,
    sorted: (column, up) => update({ sort: `${column} ${up ? "up" : "down"}` }),
    fill: (cell, row, i) => {
      if (i === at("gate")) {
        const button = make("button", { type: "button" }, row[i]);
        button.addEventListener("click", () => update({ gate: row[i] }));
        cell.append(button);
      } else if (i === at("interval")) {
        const run = two ? letters.indexOf(row[at("run")]) : 0;
        const { strength_low: lows, strength_high: highs } = runs[run].gates[gateOf(runs[run], row[at("gate")])].curves;
        const place = nearest(runs[run].epochs, state.epoch), low = lows[place], high = highs[place];
        cell.append(low === null ? "–" : `${low.toFixed(3)} to ${high.toFixed(3)}`);
        if (row[at("strength")] !== null && !two) cell.append(intervalMark(row[at("strength")], low, high));
      } else if (i === at("flags")) cell.append(make("span", { class: "flag" }, row[i]));
      else return false;
      return true;
    },
  });
  const names = ["run", "epoch", "gate", "channels", ...Object.keys(runs[0].gates[0].curves), "flags"];
  const everything = () =>
    runs.flatMap((run) =>
      run.gates.flatMap((gate) =>
        run.epochs.map((epoch, i) => {
          const figures = Object.values(gate.curves).map((values) => values[i]);
          return [run.name, epoch, gate.name, gate.channels, ...figures, gate.flags[i]];
        })
      )
    );
  byId("table").append(
    table.box,
    saver("CSV", "Save the table of all epochs as CSV", () => saveTable("gates", names, everything())),
  );
  return table;
}

function fillTable() {
  const chosen = gates.flatMap((name) =>
    [...runs.keys()].filter((run) => gateOf(runs[run], name) >= 0).map((run) => [name, run])
  );
  shownGates = chosen.map(([name]) => name);
  tableLines = gateTable.show(chosen.map(([name, run]) => rowOf(run, name, state.epoch)));
  const told = runs.map((run, i) => {
    const epoch = run.epochs[nearest(run.epochs, state.epoch)];
    const places = run.gates.length === 1 ? "1 gate" : `${run.gates.length} gates`;
    return `${two ? `${letters[i]}: ` : ""}${places} at epoch ${epoch}.${run.mixed ? ` ${run.mixed}` : ""}`;
  });
  byId("overview").textContent =
    `${told.join(" ")} Strength 1 means perfect stripes: every image gets the same vector. ` +
    "CV says how far from constant a gate is; folding costs more where it is high. Point at a column's heading, or " +
    "move to it with Tab, to see what it means; press it to sort.";
}

function intervalMark(value, low, high) {
  const bar = svg("svg", { width: 52, height: 14, "aria-hidden": true });
  bar.append(svg("path", { class: "grid", d: "M4 7H48M4 3V11M48 3V11" }));
  if (low !== null) bar.append(svg("path", { class: "reach", d: `M${4 + 44 * low} 7H${4 + 44 * high}` }));
  bar.append(svg("circle", { cx: 4 + 44 * value, cy: 7, r: 3, fill: "var(--strong)" }));
  return bar;
}

// ---- over epochs ----

const CURVES = [
  { name: "strength", title: "Stripe strength", y: () => [0, 1], meaning: data.columns.strength },
  { name: "cv", title: "CV", y: ([, high]) => [0, high], meaning: data.columns.cv },
  { name: "std", title: "Std over images", y: ([, high]) => [0, high], meaning: data.columns.std },
  { name: "drift", title: "Drift of the stripe, logarithmic", log: true, meaning: data.columns.drift },
];

/** Returns the colour of a gate, from dark for the first to light for the last, distinct from the background. */
function shade(index) {
  const depth = gates.length > 1 ? index / (gates.length - 1) : 0.5;
  return `light-dark(${color(Math.round(205 * depth))}, ${color(Math.round(95 + 160 * depth))})`;
}

function drawCurve({ name, chart, y, log }) {
  const lines = runs.flatMap((run, r) =>
    run.gates.map((gate) => {
      const chosen = gate.name === state.gate, bounds = chosen && name === "strength";
      const { strength_low: low, strength_high: high } = gate.curves;
      const stroke = shade(gates.indexOf(gate.name));
      const line = { name: gate.name, run: r, xs: run.epochs, ys: gate.curves[name], stroke, chosen, dots: chosen };
      return { ...line, dashed: r > 0, gate, ...(bounds ? { low, high } : {}) };
    })
  );
  const mine = lines.findIndex((line) => line.chosen);
  drawLines(chart, {
    lines,
    y,
    log,
    xlabel: "epoch",
    now: state.epoch,
    missing: name === "drift" ? "No drift to show: that takes two recorded epochs that differ." : undefined,
    pick: (line) => update({ gate: line.name }),
    rest: [mine, nearest(lines[mine].xs, state.epoch)],
    say: ({ name: gate, run, xs, ys, gate: { curves } }, i) => {
      const low = curves.strength_low[i], high = curves.strength_high[i];
      const between = name === "strength" && low !== null ? ` (${show(low)} to ${show(high)})` : "";
      return `${two ? `${letters[run]} · ` : ""}${gate} · epoch ${xs[i]} · ${name} ${show(ys[i])}${between}`;
    },
  });
}

// ---- training ----

const TRAINING = [["loss", "Loss"], ["accuracy", "Accuracy (%)"]];

function drawTraining({ name, chart }) {
  const lines = runs.flatMap(({ metrics }, r) =>
    ["train", "val"].filter((part) => metrics?.[`${part}_${name}`]).map((part) => ({
      name: `${two ? `${letters[r]} · ` : ""}${part === "train" ? "training" : "validation"}`,
      xs: metrics.epoch,
      ys: metrics[`${part}_${name}`],
      stroke: part === "train" ? "var(--soft)" : RUN_COLORS[r],
      chosen: part === "val",
      dashed: r > 0,
      key: true,
    }))
  );
  const say = (line, i) => `${line.name} · epoch ${line.xs[i]} · ${name} ${show(line.ys[i])}`;
  const rest = lines.length ? [lines.length - 1, nearest(lines.at(-1).xs, state.epoch)] : undefined;
  drawLines(chart, { lines, xlabel: "epoch", now: state.epoch, say, rest, missing: "metrics.csv has no such curve." });
}

// ---- the stripe, the learned vector, and the classes ----

const RUN_COLORS = ["var(--strong)", "var(--second)"];
const PALETTE = "#0173b2 #de8f05 #029e73 #d55e00 #cc78bc #ca9161 #fbafe4 #949494 #ece133 #56b4e9".split(" ");

/** Returns the channels in their order along the axis: sorted by the stripe of the first run that has the gate. */
function stripeOrder() {
  const gate = runs.flatMap((run) => run.gates.filter(({ name }) => name === state.gate))[0];
  return [...gate.mean.keys()].filter((i) => gate.mean[i] !== null).sort((a, b) => gate.mean[a] - gate.mean[b]);
}

function drawStripe(chart) {
  const order = stripeOrder(), xs = [...order.keys()], take = (values) => order.map((i) => values[i] ?? null);
  const lines = runs.flatMap((run, r) => {
    const gate = run.gates[gateOf(run, state.gate)];
    if (!gate) return [];
    const bound = (sign) => order.map((i) => gate.mean[i] === null ? null : gate.mean[i] + sign * (gate.std[i] ?? 0));
    const name = `${two ? `${letters[r]}: ` : ""}mean over images ± 1 std`, stroke = RUN_COLORS[r];
    const stripe = { name, xs, ys: take(gate.mean), low: bound(-1), high: bound(1), stroke, chosen: true, key: true };
    const learned = { name: "learned vector", xs, ys: take(gate.learned ?? []), stroke: "var(--learned)" };
    return [
      { ...stripe, dashed: r > 0, gate },
      ...(gate.learned ? [{ ...learned, points: true, key: true, gate }] : []),
    ];
  });
  const of = (r) => data.validation && r === 0 ? "the validation's" : "the last";
  const epochs = runs.map((run, r) => `${two ? `${letters[r]}: ` : ""}epoch ${run.stripe_epoch} (${of(r)})`);
  const absent = data.validation && !lines.some((line) => line.points);
  byId("stripe-note").textContent = `${state.gate}, ${epochs.join(", ")}: attention of all ${order.length} channels, ` +
    `sorted by the stripe.${absent ? " The validation has no vector of this gate." : ""}`;
  const say = ({ gate }, i) => {
    const channel = order[i], learned = gate.learned ? ` · learned ${show(gate.learned[channel])}` : "";
    return `channel ${channel} · mean ${show(gate.mean[channel])} · std ${show(gate.std[channel])}${learned}`;
  };
  drawLines(chart, { lines, xticks: channelTicks(order), xlabel: SORTED, height: 260, say });
}

const SORTED = "channel, sorted by the observed stripe";
const channelTicks = (order) => placeTicks(order.length, 8).map((place) => [place, place]);

function drawClasses({ chart, run: r }) {
  const gate = runs[r].gates[gateOf(runs[r], state.gate)], order = stripeOrder(), xs = [...order.keys()];
  chart.holder.closest("figure").hidden = !gate?.classes;
  if (!gate?.classes) return;
  const { labels, codes, low, high } = gate.classes, panel = { codes: bytes(codes), low, high };
  const shown = labels.length;
  const some = shown < gate.classes.all ? ` (${shown} of ${gate.classes.all} classes are drawn)` : "";
  const lines = labels.map((label, k) => ({
    name: `class ${label}`,
    xs,
    ys: order.map((i) => valueOf(panel, k * gate.channels + i)),
    stroke: PALETTE[k],
    key: true,
  }));
  const say = (line, i) => `${line.name}${some} · channel ${order[i]} · mean ${show(line.ys[i])}`;
  drawLines(chart, { lines, xticks: channelTicks(order), xlabel: SORTED, height: 260, say });
}

function drawShares(chart) {
  const lines = runs.flatMap((run, r) => {
    const [ys, low, high] = run.gates[gateOf(run, state.gate)]?.shares ?? [];
    if (!ys) return [];
    const name = `${two ? `${letters[r]}: ` : ""}share of the first directions`;
    const line = { name, xs: ys.map((_, i) => i + 1), ys, low, high, stroke: RUN_COLORS[r], key: two };
    return [{ ...line, chosen: true, dots: true, dashed: r > 0 }];
  });
  chart.holder.closest("figure").hidden = !lines.length;
  if (!lines.length) return;
  const say = ({ name, ys, low, high }, i) =>
    `${name}, ${i + 1} · ${show(ys[i])} of the variance (${show(low[i])} to ${show(high[i])})`;
  drawLines(chart, { lines, y: () => [0, 1], xlabel: "directions, the widest first", height: 260, say });
}
