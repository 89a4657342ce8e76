// ---- compare: the flow of images between the clusters of two classifiers or runs ----

const MOST_RIBBONS = 200;

function comparePage(parameters) {
  const other = Number(parameters.get("with") ?? (state.clustering === 0 ? 1 : 0));
  const v = clusterings[other] && other !== state.clustering ? other : state.clustering === 0 ? 1 : 0;
  const select = el("select", { onchange: () => { location.hash = `#page=compare&with=${select.value}`; } },
    ...clusterings.map((each, n) => n !== state.clustering && el("option", { value: n, selected: n === v }, each.name)));
  const found = aligned(cross(groupLines(state.clustering), groupLines(v)));
  const { box, show } = detailBox();
  return [
    el("div.toolbar", {}, el("h2", {}, "Compare"), el("span.muted", {}, clusterings[state.clustering].name), el("label", {}, "with ", select),
      el("span.gap", {}), el("span.muted", {}, `${percent(matchedShare(found))} of the images lie in matching clusters`)),
    flow(found, show),
    matrixTable(found, { rowTitle: clusterings[state.clustering].name, columnTitle: clusterings[v].name }, show), box,
  ];
}

/** Share of the images in the cells of a greedy one-to-one matching, the largest cells first. */
function matchedShare({ cells }) {
  const all = cells.flatMap((row, r) => row.map((list, c) => [list.length, r, c])).sort((a, b) => b[0] - a[0]);
  const [rows, columns] = [new Set(), new Set()];
  let matched = 0;
  let total = 0;
  for (const [count, r, c] of all) {
    total += count;
    if (rows.has(r) || columns.has(c)) continue;
    rows.add(r);
    columns.add(c);
    matched += count;
  }
  return matched / Math.max(total, 1);
}

/** Draw ribbons between two columns of clusters. */
function flow({ rows, columns, cells }, show) {
  const gap = 6;
  const lines = Math.max(rows.length, columns.length);
  const [width, height] = [900, Math.min(Math.max(lines * 38, 240), 900)];
  const total = rows.reduce((sum, line) => sum + line.members.length, 0);
  const unit = Math.max(height - gap * (lines - 1), lines) / Math.max(total, 1);
  const [left, right] = [170, width - 170];
  const stack = (list) => {
    let y = 0;
    return list.map((line) => {
      const at = { line, y, next: y, height: line.members.length * unit };
      y += at.height + gap;
      return at;
    });
  };
  const [from, to] = [stack(rows), stack(columns)];
  const ribbons = [];
  cells.forEach((row, r) => row.forEach((list, c) => { if (list.length) ribbons.push([list, r, c]); }));
  const shown = new Set([...ribbons].sort((a, b) => b[0].length - a[0].length).slice(0, MOST_RIBBONS));
  const paths = ribbons.map((ribbon) => {
    const [list, r, c] = ribbon;
    const thick = list.length * unit;
    const [a, b] = [from[r].next + thick / 2, to[c].next + thick / 2];
    from[r].next += thick;
    to[c].next += thick;
    if (!shown.has(ribbon)) return "";
    const middle = (left + right) / 2;
    const text = `${rows[r].name} → ${columns[c].name}: ${plural(list.length, "image")}`;
    const path = svg("path", { d: `M${left + 10},${a} C${middle},${a} ${middle},${b} ${right - 10},${b}`, class: "ribbon", "stroke-width": Math.max(thick, 1), stroke: rows[r].colour, onclick: () => show(list, text) }, svg("title"));
    path.firstChild.textContent = text;
    return path;
  });
  const labels = (list, x, anchor, edge) => list.flatMap(({ line, y, height: h }) => {
    const text = svg("text", { x, y: y + h / 2, "text-anchor": anchor, "dominant-baseline": "central" });
    text.textContent = line.name.length > 24 ? `${line.name.slice(0, 23)}…` : line.name;
    return [svg("rect", { x: edge, y, width: 10, height: Math.max(h, 1), fill: line.colour, rx: 2 }), text];
  });
  return svg("svg", { class: "flow", viewBox: `0 0 ${width} ${height + 4}`, role: "img", "aria-label": "Flow of images between clusters; the table below holds the same numbers" },
    ...paths, ...labels(from, left - 10, "end", left), ...labels(to, right + 10, "start", right - 10));
}
