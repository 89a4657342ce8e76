// ---- run: curves and configuration of the training ----

const FIRST_CURVES = ["loss", "acc", "nmi", "ari", "ami", "lr"];

function runPage() {
  const epochs = content.history;
  const keys = [...new Set(epochs.flatMap((epoch) => Object.keys(epoch)))].filter((key) => key !== "epoch" && epochs.filter((e) => key in e).length > 1);
  const known = FIRST_CURVES.filter((key) => keys.includes(key));
  const sorted = [...known, ...keys.filter((key) => !known.includes(key))];
  return [
    el("div.toolbar", {}, el("h2", {}, "Training run"), epochs.length ? el("span.muted", {}, plural(epochs.length, "epoch")) : null),
    sorted.length ? el("div.curves", {}, ...sorted.map((key) => curve(key, epochs))) : null,
    Object.keys(content.config).length ? el("section", {}, el("h3", {}, "Configuration"), configTable()) : null,
  ];
}

/** A line chart of one value over the epochs. */
function curve(key, epochs) {
  const points = epochs.map((epoch, n) => [epoch.epoch ?? n, epoch[key]]).filter(([, y]) => y !== undefined);
  const [width, height, pad, left] = [300, 150, 26, 52];
  const [xs, ys] = [points.map(([x]) => x), points.map(([, y]) => y)];
  const [low, high] = [Math.min(...ys), Math.max(...ys)];
  const [first, last] = [Math.min(...xs), Math.max(...xs)];
  const x = (value) => left + ((value - first) / Math.max(last - first, 1e-9)) * (width - left - 8);
  const y = (value) => height - pad - ((value - low) / Math.max(high - low, 1e-12)) * (height - 2 * pad);
  const line = points.map(([px, py], n) => `${n ? "L" : "M"}${x(px).toFixed(1)},${y(py).toFixed(1)}`).join("");
  const text = (tx, ty, anchor, value) => {
    const element = svg("text", { x: tx, y: ty, "text-anchor": anchor });
    element.textContent = value;
    return element;
  };
  const end = points.at(-1);
  return el("figure.curve", {}, el("figcaption", {}, key.replaceAll("_", " "), el("strong", {}, short(end[1]))),
    svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${key}: from ${short(ys[0])} to ${short(end[1])}` },
      svg("path", { d: `M${left},${height - pad}H${width - 8}M${left},${pad}H${width - 8}`, class: "axis" }),
      svg("path", { d: line, class: "line" }), svg("circle", { cx: x(end[0]), cy: y(end[1]), r: 3, class: "end" }),
      text(left - 6, pad + 4, "end", short(high)), text(left - 6, height - pad + 4, "end", short(low)), text(left, height - 8, "start", `epoch ${first}`), text(width - 8, height - 8, "end", `${last}`)));
}

const short = (value) => (Math.abs(value) >= 1e5 || (value && Math.abs(value) < 1e-3) ? value.toExponential(2) : String(Number(value.toPrecision(4))));

function configTable() {
  return el("table.config", {}, el("tbody", {}, ...Object.entries(content.config).map(([key, value]) => el("tr", {}, el("th", { scope: "row" }, key), el("td", {}, value)))));
}
