// ---- matrix: how many images two partitions share ----

const MOST_LINES = 60; // rows and columns that a matrix shows

/** Count pairs: {rows, columns, counts}, where each line is {name, members, href, colour}. */
function cross(rows, columns) {
  const column = new Map(columns.flatMap((line, c) => line.members.map((i) => [i, c])));
  const cells = rows.map((line) => {
    const found = columns.map(() => []);
    for (const i of line.members) if (column.has(i)) found[column.get(i)].push(i);
    return found;
  });
  return { rows, columns, cells };
}

/** Order the columns so that large cells come near the diagonal. */
function aligned({ rows, columns, cells }) {
  const taken = new Set();
  const order = [];
  rows.forEach((_, r) => {
    const best = columns.map((_, c) => c).filter((c) => !taken.has(c)).sort((a, b) => cells[r][b].length - cells[r][a].length)[0];
    if (best !== undefined) { taken.add(best); order.push(best); }
  });
  order.push(...columns.map((_, c) => c).filter((c) => !taken.has(c)));
  return { rows, columns: order.map((c) => columns[c]), cells: cells.map((row) => order.map((c) => row[c])) };
}

/** Show counts as a table. A click on a cell lists its images. */
function matrixTable(found, { rowTitle, columnTitle }, show) {
  const { rows, columns, cells } = found;
  const header = el("tr", {}, el("th.corner", {}, el("span", {}, `${rowTitle} ↓  ${columnTitle} →`)),
    ...columns.slice(0, MOST_LINES).map((line) => el("th", { scope: "col" }, el("span.turned", {}, line.href ? el("a", { href: line.href }, line.name) : line.name))));
  const body = rows.slice(0, MOST_LINES).map((line, r) => {
    const total = Math.max(line.members.length, 1);
    return el("tr", {}, el("th", { scope: "row" }, line.href ? el("a", { href: line.href }, line.name) : line.name),
      ...cells[r].slice(0, MOST_LINES).map((list, c) => {
        const share = list.length / total;
        const button = list.length ? el("button", { title: `${line.name}, ${columns[c].name}: ${plural(list.length, "image")}`, onclick: () => show(list, `${line.name} and ${columns[c].name}`) }, number(list.length)) : "";
        const box = el("td", {}, button);
        box.style.setProperty("--share", `${(100 * share).toFixed(1)}%`);
        if (share > 0.55) box.className = "strong";
        return box;
      }));
  });
  const hidden = Math.max(rows.length, columns.length) > MOST_LINES;
  return el("div.matrix-box", {}, el("table.matrix", {}, el("thead", {}, header), el("tbody", {}, ...body)),
    hidden ? el("p.muted", {}, `The first ${MOST_LINES} of ${rows.length} rows and ${columns.length} columns.`) : null);
}

/** The groups of a clustering as lines of a matrix. */
const groupLines = (v) => groups(v).filter((group) => group.members.length)
  .map((group) => ({ name: group.name, members: group.members, colour: group.colour, href: v === state.clustering ? `#cluster=${group.key}` : null }));

/** The place below a matrix where the images of a cell appear. */
function detailBox() {
  const box = el("section.detail", { "aria-live": "polite" });
  const show = (list, title) => {
    box.replaceChildren(el("div.toolbar", {}, el("h3", {}, title), el("span.muted", {}, plural(list.length, "image")), el("span.gap", {}),
      el("button", { onclick: () => saveCsv(list, "images.csv") }, "Save as CSV")), grid(bySureness(list), { side: 88 }));
    box.scrollIntoView({ block: "nearest", behavior: "smooth" });
  };
  return { box, show };
}

function classesPage() {
  const known = range(images.count).filter((i) => labelOf(i) >= 0);
  const classes = [...groupBy(known, labelOf)].sort((a, b) => a[0] - b[0]).map(([label, members]) => ({ name: className(label), members, colour: colour(label) }));
  const { box, show } = detailBox();
  const found = aligned(cross(classes, groupLines(state.clustering)));
  const lines = groupLines(state.clustering);
  const largest = lines.reduce((sum, line) => {
    const counts = groupBy(line.members.filter((i) => labelOf(i) >= 0), labelOf);
    return sum + Math.max(0, ...[...counts.values()].map((list) => list.length));
  }, 0);
  return [
    el("div.toolbar", {}, el("h2", {}, "Classes and clusters"), el("span.muted", {}, `purity ${percent(largest / Math.max(known.length, 1))}: the share of images in the most frequent class of their cluster`)),
    matrixTable(found, { rowTitle: "class", columnTitle: "cluster" }, show), box,
  ];
}
