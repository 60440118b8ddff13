// ---- sortable tables ----

/**
 * Makes a table whose headings sort it and have explanations: `columns` are [title, explanation]; `fill(cell, row, i)`
 * returns whether it filled the cell itself; `sorted(column, up)` is called when the user sorts. The `show(rows)` that
 * is returned fills the table anew, in the order last chosen.
 */
function sortableTable({ title, columns, fill, sorted }) {
  const body = make("tbody");
  let rows = [], lines = [], by = null, up = true;
  const heads = columns.map(([column, meaning], i) => {
    const button = explain(make("button", { type: "button" }, String(column).replaceAll("_", " ")), meaning);
    const head = make("th", { scope: "col", "aria-sort": "none" }, button);
    button.addEventListener("click", () => {
      sort(i, by !== i || !up);
      sorted?.(column, up);
    });
    return head;
  });
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...heads)), body);
  const box = make("div", { class: "box", tabindex: 0, role: "region", "aria-label": title }, table);
  box.classList.toggle("wide", columns.length > 12);
  box.classList.toggle("widest", columns.length > 20);

  function sort(column, ascending) {
    [by, up] = [column, ascending];
    heads.forEach((head, i) => head.setAttribute("aria-sort", i !== by ? "none" : up ? "ascending" : "descending"));
    const order = [...rows.keys()];
    if (by !== null) order.sort((a, b) => compare(rows[a][by], rows[b][by], up ? 1 : -1));
    body.replaceChildren(...order.map((index) => lines[index]));
  }

  function show(given) {
    rows = given;
    const numeric = columns.map((_, i) =>
      rows.some((row) => typeof row[i] === "number") &&
      rows.every((row) => row[i] === null || typeof row[i] === "number")
    );
    heads.forEach((head, i) => head.classList.toggle("number", numeric[i]));
    lines = rows.map((row) => {
      const line = make("tr");
      row.forEach((value, i) => {
        const cell = make("td", { class: numeric[i] ? "number" : String(value).length > 24 ? "text" : "" });
        if (!fill?.(cell, row, i)) cell.append(showCell(value));
        line.append(cell);
      });
      return line;
    });
    sort(by, up);
    return lines;
  }
  return { box, show, sortBy: (name, ascending) => sort(columns.findIndex(([each]) => each === name), ascending) };
}

const showCell = (value) => value === "" ? "" : show(value);

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

/** Returns a button that calls `save`, which saves a table or a picture. */
function saver(text, label, save) {
  const button = make("button", { type: "button", class: "save", "aria-label": label }, text);
  button.addEventListener("click", save);
  return button;
}

function addDocument(section, content) {
  if (!content) return;
  section.hidden = false;
  if (content.summary) section.append(make("p", {}, content.summary));
  if (content.words?.length) section.append(facts(content.words));
  for (const { title, columns, rows, note } of content.tables) {
    const table = sortableTable({ title: `${section.querySelector("h2, h3").textContent}: ${title}`, columns });
    const save = () => saveTable(title, columns.map(([name]) => name), rows);
    section.append(make("div", { class: "head" }, make("h3", {}, title), saver("CSV", `Save ${title} as CSV`, save)));
    table.show(rows);
    section.append(table.box);
    if (note) section.append(make("p", { class: "note" }, note));
  }
  if (content.facts.length) section.append(facts(content.facts));
}
