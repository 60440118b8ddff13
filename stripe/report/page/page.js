// ---- the choices, which the link keeps ----

const epochs = [...new Set(runs.flatMap((run) => run.heatmaps?.epochs ?? run.epochs))].sort((a, b) => a - b);
const VIEWS = {
  gate: "before and after the gate",
  ...(epochs.length > 1 ? { epochs: "first and chosen epoch" } : {}),
  ...(two ? { runs: "both runs" } : {}),
};
const ROWS = { recorded: "recorded order", label: "label", mean: "mean over channels", sample: "sample id" };
const SPANS = { gate: "all epochs, middle 99 %", panel: "this epoch, middle 99 %", unit: "0 to 1" };
const THEMES = ["system", "light", "dark"];
const USUAL = {
  gate: gates[0],
  epoch: epochs.at(-1),
  view: two ? "runs" : "gate",
  rows: "recorded",
  span: "gate",
  sort: "# up",
  theme: "system",
};
const CHOICES = {
  gate: gates,
  epoch: epochs,
  view: Object.keys(VIEWS),
  rows: Object.keys(ROWS),
  span: Object.keys(SPANS),
  sort: TITLES.flatMap((title) => [`${title} up`, `${title} down`]),
  theme: THEMES,
};
const state = { ...USUAL };

/** Returns the choices in the link, as far as they exist on this page. */
function linked() {
  const asked = new URLSearchParams(location.hash.slice(1));
  const known = Object.keys(USUAL).map((key) => [key, CHOICES[key].find((each) => String(each) === asked.get(key))]);
  return { ...USUAL, ...Object.fromEntries(known.filter(([, value]) => value !== undefined)) };
}

let linking = 0;

function keepLink() {
  clearTimeout(linking); // browsers limit the number of changes per second
  linking = setTimeout(() => {
    const changed = Object.entries(state).filter(([key, value]) => value !== USUAL[key]);
    history.replaceState(null, "", changed.length ? `#${new URLSearchParams(changed)}` : location.pathname);
  }, 150);
}

// ---- everything together ----

function update(change) {
  const filled = tableLines.length && !("epoch" in change);
  Object.assign(state, change);
  byId("gate").value = state.gate;
  byId("epoch").value = epochs.indexOf(state.epoch);
  byId("epoch").setAttribute("aria-valuetext", `epoch ${state.epoch}`);
  byId("epoch-now").textContent = state.epoch;
  for (const name of ["view", "rows", "span"]) byId(name).value = state[name];
  if (!filled) fillTable();
  if ("sort" in change) gateTable.sortBy(...sorting());
  tableLines.forEach((line, i) =>
    shownGates[i] === state.gate ? line.setAttribute("aria-current", "true") : line.removeAttribute("aria-current")
  );
  dress();
  drawHeatmaps();
  CURVES.forEach(drawCurve);
  if (trained) TRAINING_CHARTS.forEach(drawTraining);
  drawStripe(stripe);
  classCharts.forEach(drawClasses);
  drawShares(shareChart);
  keepLink();
}

function sorting() {
  const at = state.sort.lastIndexOf(" ");
  return [state.sort.slice(0, at), state.sort.endsWith(" up")];
}

function dress() {
  if (state.theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = state.theme;
  byId("theme").textContent = `Theme: ${state.theme}`;
}

function choose(name, choices) {
  const list = byId(name);
  for (const [value, text] of choices) list.append(make("option", { value }, text));
  list.addEventListener("change", () => update({ [name]: list.value }));
}

byId("run").textContent = runs.map((run, i) => `${two ? `${letters[i]}: ` : ""}${run.name}`).join("\n");
document.title = `${runs.map((run) => run.name).join(" and ")} - stripe report`;
document.querySelector("main").hidden = false;
let tableLines = [];
const gateTable = setUpTable();
const channels = (name) => runs.flatMap((run) => run.gates).find((gate) => gate.name === name).channels;
choose("gate", gates.map((name, i) => [name, `${i + 1}. ${name} (${channels(name)})`]));
choose("view", Object.entries(VIEWS));
choose("rows", Object.entries(ROWS));
choose("span", Object.entries(SPANS));
byId("epoch").max = epochs.length - 1;
byId("epoch").addEventListener("input", (event) => update({ epoch: epochs[event.target.value] }));
byId("bar").addEventListener("submit", (event) => event.preventDefault());
byId("theme").addEventListener("click", () => update({ theme: THEMES[(THEMES.indexOf(state.theme) + 1) % 3] }));
byId("save-heat").append(saver("PNG", "Save the heatmaps as PNG", () => {
  savePicture(`${state.gate}-heatmaps`, state.gate, views.map((view) => view.axes.root));
}));
if (two) byId("curves-note").append(" Solid: A, dashed: B.");
for (const curve of CURVES) curve.chart = chartIn(byId("curves"), curve.title, curve.meaning);
const trained = runs.some((run) => run.metrics);
byId("training").hidden = !trained;
const TRAINING_CHARTS = TRAINING.map(([name, title]) => ({ name, chart: chartIn(byId("training-curves"), title) }));
for (const { chart } of TRAINING_CHARTS) chart.subject = runs.map((run) => run.name).join(" and ");
const stripe = chartIn(
  byId("stripe"),
  "Observed stripe",
  "the mean attention vector over images; the band is one standard deviation over images to either side",
);
const shareChart = chartIn(
  byId("stripe"),
  "Rank curve",
  "the share of the attention's variance over images that its first k directions hold, with the 95 % interval",
);
const classCharts = [...runs.keys()].map((run) => ({
  run,
  chart: chartIn(
    byId("stripe"),
    `Excitation per class${two ? `, ${letters[run]}` : ""}`,
    "the mean attention vector over the images of each class: where the lines coincide, the gate does not tell classes apart",
  ),
}));
setUpTips();
addDocument(byId("validation"), data.validation);
addDocument(byId("fold"), data.fold);
runs.forEach((run, i) => {
  for (const section of run.about) {
    const part = make("div", {}, make("h3", {}, `${two ? `${letters[i]}: ` : ""}${section.title}`));
    addDocument(part, section);
    byId("about").append(part);
  }
});
if (data.command) {
  byId("about").append(make("div", {}, make("h3", {}, "this page"), facts([["command", data.command]])));
}
const relink = () => {
  const asked = linked();
  update(asked);
  gateTable.sortBy(...sorting());
};
relink();
globalThis.addEventListener("hashchange", relink);
let width = globalThis.innerWidth;
globalThis.addEventListener("resize", () => {
  if (width !== globalThis.innerWidth) {
    width = globalThis.innerWidth;
    update({});
  }
});
