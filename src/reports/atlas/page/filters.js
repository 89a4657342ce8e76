// ---- filters: near-duplicates, and images that are broken, dark, bright, blurred or tiny ----

/** Each filter: title, explanation, unit of the limit, its default, and which images it finds. */
const FILTERS = {
  duplicates: { title: "Near-duplicates", about: "Images that look almost the same when reduced to 16 × 16 grey pixels, in groups.", find: () => range(images.count).filter((i) => images.duplicates[i]).sort((a, b) => images.duplicates[a] - images.duplicates[b] || a - b) },
  broken: { title: "Broken", about: "Files that cannot be decoded.", find: () => Object.keys(images.broken).map(Number) },
  dark: { title: "Dark", about: "Mean grey level, from 0 to 255, below", limit: 32, find: (limit) => measured((i) => images.brightness[i], (value) => value < limit) },
  bright: { title: "Bright", about: "Mean grey level, from 0 to 255, above", limit: 224, find: (limit) => measured((i) => -images.brightness[i], (value) => -value > limit) },
  blurred: { title: "Blurred", about: "Sharpness (standard deviation of the Laplacian at 256 pixels or less, in grey levels) below", limit: 4, find: (limit) => measured((i) => images.sharpness[i] / 10, (value) => value < limit) },
  tiny: { title: "Tiny", about: "Shorter side, in pixels, below", limit: tinyLimit(), find: (limit) => measured((i) => Math.min(images.sizes[2 * i], images.sizes[2 * i + 1]), (value) => value < limit) },
  unsure: { title: "Least sure", about: "Confidence, in percent, below", limit: 50, find: (limit) => measured((i) => 100 * confidence(i), (value) => value < limit) },
};

/** Images whose value passes, sorted by value. */
function measured(value, passes) {
  const found = range(images.count).filter((i) => !(i in images.broken)).map((i) => [i, value(i)]);
  return found.filter(([, v]) => passes(v)).sort((a, b) => a[1] - b[1] || a[0] - b[0]).map(([i]) => i);
}

/** A quarter of the median of the shorter sides, but no more than 32 pixels. */
function tinyLimit() {
  const sides = range(images.count).map((i) => Math.min(images.sizes[2 * i], images.sizes[2 * i + 1])).sort((a, b) => a - b);
  return Math.max(Math.min(Math.round(sides[sides.length >> 1] / 4), 32), 1);
}

function filtersPage(parameters) {
  const chosen = FILTERS[parameters.get("filter")] ? parameters.get("filter") : "duplicates";
  const filter = FILTERS[chosen];
  const place = el("div", {});
  const { selection, bar } = selectionBar("filter", () => place.querySelectorAll("div").forEach((each) => each.mark?.()));
  const tabs = el("div.chips", { role: "group", "aria-label": "Filters" }, ...Object.entries(FILTERS).map(([key, each]) => {
    const count = each.find(each.limit).length;
    return el("a.chip", { href: `#page=filters&filter=${key}`, "aria-current": key === chosen ? "true" : null }, each.title, " ", el("span.muted", {}, number(count)));
  }));
  const limit = filter.limit === undefined ? null : el("input", { type: "number", value: String(filter.limit), min: 0, step: "any", "aria-label": filter.about, oninput: () => draw() });
  let found = [];
  const draw = () => {
    found = filter.find(limit ? Number(limit.value) : undefined);
    place.replaceChildren(...(found.length ? filterResult(chosen, found, selection) : [el("p.empty", {}, "No such images.")]));
  };
  draw();
  return [
    el("div.toolbar", {}, el("h2", {}, "Filters")), tabs,
    el("div.toolbar", {}, el("label", {}, filter.about, " ", limit), el("span.gap", {}),
      el("button", { onclick: () => saveCsv(found, `${chosen}.csv`) }, "Save as CSV")),
    bar, place, chosen === "broken" ? skippedList() : null,
  ];
}

function filterResult(chosen, found, selection) {
  if (chosen !== "duplicates") return [grid(found, { side: 96, selection, caption: (i) => images.broken[i] ?? groupName(i) })];
  const sets = [...groupBy(found, (i) => images.duplicates[i]).values()];
  return sets.slice(0, 200).map((list) => el("div.twins", {}, grid(list, { side: 96, selection, caption: groupName })))
    .concat(sets.length > 200 ? [el("p.muted", {}, `${number(sets.length - 200)} more groups are in the CSV file.`)] : []);
}

function skippedList() {
  if (!content.skipped_count) return null;
  return el("section", {}, el("h3", {}, `${plural(content.skipped_count, "file")} skipped`),
    el("table", {}, el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "file"), el("th", { scope: "col" }, "reason"))),
      el("tbody", {}, ...content.skipped.map(([path, reason]) => el("tr", {}, el("td.path", {}, path), el("td", {}, reason))))));
}
