// ---- overview: one tile per group ----

const ORDERS = {
  size: ["size", (a, b) => b.members.length - a.members.length],
  number: ["number", () => 0],
  confidence: ["confidence", (a, b) => b.facts.confidence - a.facts.confidence],
  purity: ["purity", (a, b) => (b.facts.purity ?? -1) - (a.facts.purity ?? -1)],
};

function overviewPage() {
  const all = groups().map((group) => ({ ...group, facts: facts(group) }));
  const filled = all.filter((group) => group.members.length);
  const orders = Object.entries(ORDERS).filter(([key]) => key !== "purity" || images.labels);
  const order = el("select", { onchange: () => { memory.set("order", order.value); draw(); } },
    ...orders.map(([key, [label]]) => el("option", { value: key, selected: key === (memory.get("order") ?? "number") }, label)));
  const tiles = el("div.tiles", {});
  const draw = () => tiles.replaceChildren(...[...filled].sort((ORDERS[order.value] ?? ORDERS.number)[1]).map(clusterTile));
  const empty = all.length - filled.length;
  draw();
  return [
    el("div.toolbar", {},
      el("h2", {}, plural(filled.length, "cluster")),
      empty ? el("span.muted", {}, `${number(empty)} more without images`) : null,
      el("span.gap", {}),
      el("label", {}, "Sort by ", order)),
    notesBox(), sizesChart(filled), tiles,
  ];
}

function notesBox() {
  if (!content.notes.length) return null;
  return el("ul.notes", {}, ...content.notes.map(([level, text]) => el(`li.${level}`, {}, el("strong", {}, level), " ", text)));
}

/** Sizes of all groups as the parts of one bar. */
function sizesChart(filled) {
  const counts = filled.map((group) => group.members.length);
  const label = `Sizes of the clusters, from ${number(Math.min(...counts))} to ${plural(Math.max(...counts), "image")}`;
  return el("div.sizes", { role: "img", "aria-label": label }, ...filled.map((group) => {
    const part = el("a", { href: `#cluster=${group.key}`, title: `${group.name}: ${plural(group.members.length, "image")}`, tabindex: -1 });
    part.style.cssText = `flex-grow:${group.members.length};background:${group.colour}`;
    return part;
  }));
}

function clusterTile(group) {
  const strips = el("div.strips", {});
  const tileElement = el(`article.tile${group.rejected ? ".rejected" : ""}`, { "aria-label": group.name },
    el("header", {},
      dot(group), el("h3", {}, el("a", { href: `#cluster=${group.key}` }, group.name)),
      group.rejected ? el("span.badge", {}, "rejected") : null,
      group.merged.length ? el("span.badge", {}, `+ ${group.merged.join(", ")}`) : null,
      el("span.gap", {}),
      el("span.count", {}, countText(group))),
    meters(group), strips);
  whenVisible(tileElement, () => {
    strips.append(...picks(group, 6).map(([name, list]) =>
      el("div.strip", {}, el("span.strip-name", {}, name), el("div.row", {}, ...list.map((i) => cell(i, { side: 50, list: () => list }))))));
    moveByArrows(strips);
  });
  return tileElement;
}

const dot = (group) => {
  const mark = el("span.dot", { "aria-hidden": "true" });
  mark.style.background = group.colour;
  return mark;
};

/** Number of images, of all images if the atlas shows only a part of them. */
function countText(group) {
  const total = content.totals && state.clustering === 0 && group.part === undefined
    ? [group.cluster, ...group.merged].reduce((sum, k) => sum + content.totals[k], 0) : group.members.length;
  return total > group.members.length ? `${number(group.members.length)} of ${plural(total, "image")}` : plural(total, "image");
}

function meters(group) {
  const { confidence: sure, purity, class: most } = group.facts ?? facts(group);
  const meter = (label, share, extra = "") => {
    const fill = el("span.bar-fill", {});
    fill.style.cssText = `inline-size:${100 * share}%;background:${group.colour}`;
    return el("div.meter", {}, el("span.muted", {}, label), el("span.bar-track", { "aria-hidden": "true" }, fill), el("span.value", {}, percent(share)), extra ? el("span.extra", { title: extra }, extra) : null);
  };
  return el("div.meters", {}, meter("confidence", sure), purity === undefined ? null : meter("purity", purity, className(most)));
}

/** Run an action when an element first comes near the window. Printing shows everything. */
const waiting = new Map();
const observer = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) reveal(entry.target);
}, { rootMargin: "600px" });
function reveal(element) {
  observer.unobserve(element);
  waiting.get(element)?.();
  waiting.delete(element);
}
function whenVisible(element, action) {
  waiting.set(element, action);
  observer.observe(element);
}
addEventListener("beforeprint", () => { for (const element of [...waiting.keys()]) if (element.isConnected) reveal(element); });
