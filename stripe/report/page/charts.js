// ---- axes ----

/**
 * Makes a drawing with axes: `x` and `y` are [low, high] (y[0] is at the bottom), ticks are [[value, text], ...].
 * Returns it as `root`, with `px` and `py`, which turn values into coordinates, and the edges of the plotted area.
 */
function frame({ width, height, x, y, xlabel, ylabel, xticks, yticks, log = false, top = 8, below = 0 }) {
  const left = ylabel ? 66 : 52, right = 12, bottom = 38 + below;
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "drawing" });
  const flat = (value) => log ? Math.log10(value) : value;
  const scale = ([low, high], from, to) => (value) =>
    low !== high ? from + (value - low) / (high - low) * (to - from) : (from + to) / 2;
  const px = scale(x, left, width - right), scaleY = scale(y.map(flat), height - bottom, top);
  const py = (value) => scaleY(flat(value));
  for (const [value, text] of yticks ?? niceTicks(y, 5, log).map((value) => [value, show(value)])) {
    if (!yticks) root.append(svg("path", { class: "grid", d: `M${left} ${py(value)}H${width - right}` }));
    root.append(svg("text", { x: left - 6, y: py(value) + 4, "text-anchor": "end" }, text));
  }
  const whole = () => niceTicks(x, width < 420 ? 5 : 9).filter(Number.isInteger).map((value) => [value, value]);
  for (const [value, text] of xticks ?? whole()) {
    root.append(svg("text", { x: px(value), y: height - bottom + 16, "text-anchor": "middle" }, text));
  }
  const middle = (left + width - right) / 2;
  root.append(svg("text", { x: middle, y: height - below - 5, "text-anchor": "middle" }, xlabel));
  if (ylabel) {
    const place = `translate(12 ${(top + height - bottom) / 2}) rotate(-90)`;
    root.append(svg("text", { transform: place, "text-anchor": "middle" }, ylabel));
  }
  return { root, px, py, width, height, left, right: width - right, top, bottom: height - bottom };
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

/** Returns about `most` of the `count` places from 0 on, spaced by a round number. */
function placeTicks(count, most) {
  const step = [1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500, 1000].find((each) => (count - 1) / each < most) || count;
  return Array.from({ length: Math.ceil(count / step) }, (_, i) => i * step);
}

// ---- lines ----

function linePath(points) {
  let pen = "M";
  return points.map(([x, y]) => {
    if (y === null || !Number.isFinite(y)) {
      pen = "M";
      return "";
    }
    const step = `${pen}${x.toFixed(1)} ${y.toFixed(1)}`;
    pen = "L";
    return step;
  }).join("");
}

/** Returns a path around each stretch of points of which both bounds are known. */
function bandPaths({ xs, low, high }, { px, py }) {
  const paths = [];
  let stretch = [];
  for (let i = 0; i <= xs.length; i++) {
    if (i < xs.length && low[i] !== null && high[i] !== null) {
      stretch.push(i);
    } else if (stretch.length) {
      const there = stretch.map((k) => [px(xs[k]), py(low[k])]);
      paths.push(`${linePath([...there, ...stretch.reverse().map((k) => [px(xs[k]), py(high[k])])])}Z`);
      stretch = [];
    }
  }
  return paths;
}

/** Makes a place for a drawing, with a caption, a button that saves it and a line that shows the value pointed at. */
function chartIn(host, title, meaning) {
  const chart = { title, holder: make("div"), readout: make("output") };
  const caption = meaning ? explain(make("button", { type: "button", class: "term" }, title), meaning) : title;
  chart.save = saver("PNG", `Save ${title} as PNG`, () => {
    const root = chart.holder.querySelector("svg");
    if (root) savePicture(title, `${chart.subject ?? state.gate}: ${title}`, [root]);
  });
  host.append(make("figure", {}, make("figcaption", {}, caption, chart.save), chart.holder, chart.readout));
  return chart;
}

/**
 * Draws lines, each {name, xs, ys, stroke} and optionally low, high, chosen, dashed, points (points instead of a line),
 * dots, key (in the legend). `say(line, i)` returns the text for the point that is pointed at, or for `rest` when the
 * pointer is elsewhere; `pick(line)` is called on a click.
 */
function drawLines(chart, { lines, y, log, xlabel, xticks, height = 230, now, say, rest, pick, missing }) {
  const kept = lines.map((line) => ({ ...line, ys: line.ys.map((value) => log && value <= 0 ? null : value) }));
  const reach = extent(kept.flatMap((line) => [...line.ys, ...line.low ?? [], ...line.high ?? []]));
  chart.save.hidden = reach[0] > reach[1];
  if (reach[0] > reach[1]) {
    chart.holder.replaceChildren(make("p", { class: "note" }, missing ?? "No value is finite."));
    chart.readout.textContent = "";
    return;
  }
  if (reach[0] === reach[1]) {
    Object.assign(reach, log ? [reach[0] / 2, reach[0] * 2] : [reach[0] - 0.5, reach[0] + 0.5]);
  }
  const width = Math.max(240, chart.holder.clientWidth), named = keyOf(kept.filter((line) => line.key), width);
  const axes = frame({
    width,
    height: height + named.height,
    x: extent(kept.flatMap((line) => line.xs)),
    y: y?.(reach) ?? reach,
    xlabel,
    xticks,
    log,
    below: named.height,
  });
  if (now !== undefined) {
    axes.root.append(svg("path", { class: "now", d: `M${axes.px(now)} ${axes.top}V${axes.bottom}` }));
  }
  for (const line of kept.toSorted((a, b) => (a.chosen ?? 0) - (b.chosen ?? 0))) drawLine(line, axes);
  named.node.setAttribute("transform", `translate(${axes.left} ${axes.bottom + 48})`);
  axes.root.append(named.node);
  const tell = (line, i) => chart.readout.textContent = say(lines[line], i);
  const resting = () => rest ? tell(...rest) : chart.readout.textContent = "Point at the figure to read a value.";
  const pointed = (event) => {
    const box = axes.root.getBoundingClientRect();
    const x = (event.clientX - box.left) * width / box.width, at = (event.clientY - box.top) * width / box.width;
    const places = kept.map((line) => nearest(line.xs.map(axes.px), x));
    const off = kept.map(({ xs, ys }, line) =>
      ys[places[line]] === null
        ? Infinity
        : Math.abs(axes.py(ys[places[line]]) - at) + Math.abs(axes.px(xs[places[line]]) - x)
    );
    const line = nearest(off, 0);
    return [line, places[line]];
  };
  axes.root.addEventListener("pointermove", (event) => tell(...pointed(event)));
  axes.root.addEventListener("pointerleave", resting);
  if (pick) axes.root.addEventListener("click", (event) => pick(lines[pointed(event)[0]]));
  chart.holder.replaceChildren(axes.root);
  resting();
}

function drawLine(line, axes) {
  const { xs, ys, chosen, stroke } = line;
  const styled = (node, property) => {
    node.style[property] = stroke;
    axes.root.append(node);
  };
  if (line.low) { for (const d of bandPaths(line, axes)) styled(svg("path", { class: "band", d }), "fill"); }
  if (!line.points) {
    const kind = `line${chosen ? " chosen" : ""}${line.dashed ? " dashed" : ""}`;
    styled(svg("path", { class: kind, d: linePath(xs.map((x, i) => [axes.px(x), axes.py(ys[i])])) }), "stroke");
  }
  ys.forEach((value, i) => {
    const lone = (ys[i - 1] ?? null) === null && (ys[i + 1] ?? null) === null;
    if (value === null || !(lone || line.points || line.dots && ys.length <= 60)) return;
    const dot = svg("circle", { cx: axes.px(xs[i]), cy: axes.py(value), r: line.points ? 2.2 : 3.2 });
    styled(dot, "fill");
  });
}

/** Draws a legend of marks and names in rows that fit `width`; returns the drawing and its height. */
function keyOf(lines, width) {
  const node = svg("g");
  let x = 0, y = 0;
  for (const line of lines) {
    const needed = 32 + 7 * line.name.length;
    if (x && x + needed > width - 70) [x, y] = [0, y + 17];
    const mark = line.points
      ? svg("circle", { cx: x + 11, cy: y, r: 3 })
      : svg("path", { class: line.dashed ? "line chosen dashed" : "line chosen", d: `M${x} ${y}H${x + 22}` });
    mark.style[line.points ? "fill" : "stroke"] = line.stroke;
    node.append(mark, svg("text", { x: x + 27, y: y + 4 }, line.name));
    x += needed;
  }
  return { node, height: lines.length ? y + 26 : 0 };
}
