// ---- app: pages, address, search, keys and theme ----

const PAGES = {
  clusters: { title: "Clusters", make: overviewPage, there: true },
  map: { title: "Map", make: mapPage, there: images.count > 1 },
  filters: { title: "Filters", make: filtersPage, there: true },
  classes: { title: "Classes", make: classesPage, there: !!images.labels },
  compare: { title: "Compare", make: comparePage, there: clusterings.length > 1 },
  run: { title: "Run", make: runPage, there: content.history.length > 0 || Object.keys(content.config).length > 0 },
};
const pages = Object.keys(PAGES).filter((key) => PAGES[key].there);
const main = byId("main");

/** The parameters in the address, such as #cluster=3 or #page=map&clustering=1. */
const parameters = () => new URLSearchParams(location.hash.slice(1));

/** Change one parameter without a step in the history of the browser. */
function setParameter(key, value) {
  const all = parameters();
  if (value === null) all.delete(key);
  else all.set(key, value);
  state.address = `#${all}`;
  history.replaceState(null, "", state.address);
}

/** Show the page of the address. */
function show() {
  const all = parameters();
  const wanted = Number(all.get("clustering") ?? state.clustering);
  if (clusterings[wanted]) state.clustering = wanted;
  byId("clustering").value = state.clustering;
  const cluster = all.get("cluster");
  const page = all.get("page") ?? (location.hash === "#map" ? "map" : "clusters");
  const query = all.get("search");
  state.page = pages.includes(page) ? page : "clusters";
  state.cluster = state.page === "clusters" && !query ? cluster : null;
  state.clearSelection = null;
  let parts;
  if (query) parts = searchPage(query);
  else if (state.cluster !== null) parts = clusterPage(cluster);
  else parts = PAGES[state.page].make(all);
  main.replaceChildren(...parts.filter(Boolean));
  for (const link of byId("tabs").children) {
    if (link.dataset.page === state.page && !query) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const image = all.get("image");
  if (image !== null && Number(image) in images.paths) openImage(Number(image), [Number(image)]);
}

/** Show the page again after a change, at the same place. */
function refresh() {
  const top = scrollY;
  show();
  scrollTo(0, top);
}

function searchPage(query) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  const matches = (text) => words.every((word) => text.toLowerCase().includes(word));
  const clusters = groups().filter((group) => group.members.length && matches(group.name));
  const found = range(images.count).filter((i) => matches(images.paths[i]));
  const { selection, bar } = selectionBar("search", () => place.mark?.());
  const place = grid(found, { side: 96, selection, caption: fileName });
  return [
    el("div.toolbar", {}, el("h2", {}, `“${query}”`), el("span.muted", {}, `${plural(clusters.length, "cluster")}, ${plural(found.length, "image")}`), el("span.gap", {}),
      found.length ? el("button", { onclick: () => saveCsv(found, "search.csv") }, "Save as CSV") : null),
    clusters.length ? el("div.chips", {}, ...clusters.map((group) => el("a.chip", { href: `#cluster=${group.key}` }, dot(group), group.name))) : null,
    bar, found.length ? place : el("p.empty", {}, "No file name holds these words."),
  ];
}

// ---- theme ----

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
}

function switchTheme() {
  const dark = document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  const next = dark === "dark" ? "light" : "dark";
  setTheme(next);
  memory.set("theme", next);
  if (state.page === "map") refresh();
}

// ---- keys ----

function nextCluster(by) {
  const filled = groups().filter((group) => group.members.length);
  const at = filled.findIndex((group) => group.key === state.cluster);
  const next = filled[(at + by + filled.length) % filled.length];
  if (next) location.hash = `#cluster=${next.key}`;
}

const KEYS = {
  "/": () => byId("search").focus(),
  "?": () => byId("keys").showModal(),
  "[": () => nextCluster(-1),
  "]": () => nextCluster(1),
  s: saveNames,
  n: () => state.cluster != null && groupOf(state.cluster) && askName(groupOf(state.cluster)),
  Escape: () => state.clearSelection?.(),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  if (event.target.matches("input, select, textarea")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const page = pages[Number(event.key) - 1];
  if (page) location.hash = `#page=${page}`;
  else if (KEYS[event.key]) KEYS[event.key]();
  else return;
  event.preventDefault();
});

// ---- start ----

function start() {
  document.title = `${content.title} – atlas`;
  byId("title").textContent = content.title;
  byId("summary").textContent = plural(content.totals ? content.totals.reduce((a, b) => a + b, 0) : images.count, "image");
  byId("tabs").append(...pages.map((key) => el("a", { href: `#page=${key}`, "data-page": key }, PAGES[key].title)));
  byId("clustering").append(...clusterings.map((each, v) => el("option", { value: v }, each.name)));
  byId("choice").hidden = clusterings.length < 2;
  byId("clustering").addEventListener("change", (event) => { location.hash = `#page=${state.page}&clustering=${event.target.value}`; });
  byId("save").addEventListener("click", saveNames);
  byId("theme").addEventListener("click", switchTheme);
  byId("help").addEventListener("click", () => byId("keys").showModal());
  let timer = null;
  byId("search").addEventListener("input", (event) => {
    clearTimeout(timer);
    timer = setTimeout(() => { location.hash = event.target.value.trim() ? `#search=${encodeURIComponent(event.target.value.trim())}` : "#"; }, 200);
  });
  document.querySelector(".skip").addEventListener("click", (event) => { event.preventDefault(); main.focus(); });
  setTheme(memory.get("theme"));
  addEventListener("hashchange", () => {
    if (location.hash === state.address) return;
    state.address = location.hash;
    if (imageDialog.open) imageDialog.close();
    show();
    scrollTo(0, 0);
  });
  show();
}

start();
