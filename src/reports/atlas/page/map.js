// ---- map: all images as points in the plane, with thumbnails, hover and lasso ----

const FADED = 0.12; // opacity of points that do not belong to the highlighted group
const priority = range(images.count).map((i) => (i * 2654435761) % 4294967296); // the order in which thumbnails take their places

let theMap = null; // the map that is shown

function mapPage(parameters) {
  const canvas = el("canvas.map", { tabindex: 0, role: "img", "aria-label": "Map on which similar images lie close together. Arrow keys move it, plus and minus zoom. The clusters page lists the same images." });
  const preview = el("div.preview", { hidden: true });
  const side = el("aside.side", { "aria-label": "Selected images" });
  const view = { scale: 1, x: 0, y: 0, width: 0, height: 0 };
  const options = { colours: "cluster", pictures: memory.get("pictures") ?? true, size: memory.get("size") ?? 36, lasso: false, only: parameters.get("cluster") };
  const { selection, bar } = selectionBar("map");
  const map = { canvas, view, options, selection, preview, outline: [], hovered: -1, owners: groupsByImageCached(state.clustering) };

  theMap = map;
  const redraw = () => { map.frame ??= requestAnimationFrame(() => { map.frame = null; drawMap(map); }); };
  map.redraw = redraw;
  const showSelection = () => {
    const list = bySureness([...selection.chosen]);
    side.replaceChildren(list.length ? grid(list, { side: 64 }) : el("p.muted", {}, "Draw a lasso around images (Lasso, or Shift + drag) to list them here."));
    state.clearSelection = () => { selection.clear(); showSelection(); redraw(); };
    redraw();
  };
  map.select = (list) => { selection.chosen.clear(); for (const i of list) selection.chosen.add(i); selection.toggle(-1, false); showSelection(); say(`${plural(list.length, "image")} selected`); };
  bar.querySelector("button:last-child").addEventListener("click", showSelection);

  const lasso = el("button", { "aria-pressed": "false", title: "Lasso (l)", onclick: () => toggleLasso() }, "Lasso");
  const toggleLasso = (on = !options.lasso) => { options.lasso = on; lasso.setAttribute("aria-pressed", on); canvas.classList.toggle("lassoing", on); };
  map.toggleLasso = toggleLasso;
  const colours = el("select", { onchange: () => { options.colours = colours.value; legend(); redraw(); } },
    ...["cluster", ...(images.labels ? ["class"] : []), "confidence"].map((name) => el("option", { value: name }, name)));
  const pictures = el("input", { type: "checkbox", checked: options.pictures, onchange: () => { options.pictures = pictures.checked; memory.set("pictures", options.pictures); redraw(); } });
  const size = el("input", { type: "range", min: 16, max: 96, value: String(options.size), "aria-label": "Size of the thumbnails", oninput: () => { options.size = Number(size.value); memory.set("size", options.size); redraw(); } });
  const legendBox = el("ul.legend", { "aria-label": "Legend" });
  const legend = () => legendBox.replaceChildren(...mapLegend(map));
  map.legend = legend;
  map.reset = () => { fit(map); redraw(); };

  listenToMap(map);
  new ResizeObserver(() => resizeMap(map, parameters)).observe(canvas);
  legend();
  showSelection();
  return [
    el("div.toolbar", {}, el("h2", {}, "Map"), el("span.muted", {}, "similar images lie close together"), el("span.gap", {}),
      el("label", {}, "Colour by ", colours), el("label", {}, pictures, " Images"), size, lasso,
      el("button", { onclick: map.reset, title: "Show all of it (0)" }, "Reset"),
      el("button", { onclick: () => savePicture(map) }, "Save as PNG")),
    el("div.map-page", {}, el("div.map-box", {}, canvas, preview, legendBox), el("div.beside", {}, bar, side)),
  ];
}

// ---- places ----

const place = (map, i) => [
  (images.points[2 * i] / 65535 - map.view.x) * map.view.scale,
  (images.points[2 * i + 1] / 65535 - map.view.y) * map.view.scale,
];

/** Choose scale and offset so that all points are in the window. */
function fit(map) {
  const { view } = map;
  let [right, bottom] = [0, 0];
  for (let i = 0; i < images.count; i++) {
    right = Math.max(right, images.points[2 * i] / 65535);
    bottom = Math.max(bottom, images.points[2 * i + 1] / 65535);
  }
  const margin = 40;
  const legend = 50; // room at the lower edge
  view.scale = Math.min((view.width - 2 * margin) / Math.max(right, 1e-3), (view.height - 2 * margin - legend) / Math.max(bottom, 1e-3));
  view.least = view.scale / 2;
  view.x = right / 2 - view.width / 2 / view.scale;
  view.y = bottom / 2 - (view.height - legend) / 2 / view.scale;
}

function resizeMap(map, parameters) {
  const { canvas, view } = map;
  if (!canvas.clientWidth) return;
  const ratio = Math.min(window.devicePixelRatio || 1, 2);
  const first = !view.width;
  [view.width, view.height, view.ratio] = [canvas.clientWidth, canvas.clientHeight, ratio];
  [canvas.width, canvas.height] = [view.width * ratio, view.height * ratio];
  if (first) {
    fit(map);
    const focus = Number(parameters.get("focus") ?? -1);
    if (focus >= 0 && focus < images.count) focusOn(map, focus);
  }
  drawMap(map);
}

function focusOn(map, image) {
  const { view } = map;
  view.scale *= 6;
  view.x = images.points[2 * image] / 65535 - view.width / 2 / view.scale;
  view.y = images.points[2 * image + 1] / 65535 - view.height / 2 / view.scale;
  map.marked = image;
}

function zoom(map, factor, [x, y] = [map.view.width / 2, map.view.height / 2]) {
  const { view } = map;
  const scale = Math.max(Math.min(view.scale * factor, 400 * view.least), view.least);
  view.x += x / view.scale - x / scale;
  view.y += y / view.scale - y / scale;
  view.scale = scale;
  map.redraw();
}

/** The image nearest to a place in the window, or -1. */
function imageAt(map, x, y) {
  let best = -1;
  let least = (map.options.pictures ? map.options.size / 2 : 10) ** 2;
  const candidates = map.options.pictures && map.drawn ? map.drawn : range(images.count);
  for (const list of [candidates, range(images.count)]) {
    for (const i of list) {
      const [px, py] = place(map, i);
      const distance = (px - x) ** 2 + (py - y) ** 2;
      if (distance < least) [best, least] = [i, distance];
    }
    if (best >= 0) return best;
    least = 100;
  }
  return best;
}

// ---- drawing ----

/** Colour of an image on the map. */
function pointColour(map, i) {
  if (map.options.colours === "class") return colour(labelOf(i));
  if (map.options.colours === "confidence") return `oklch(${0.85 - 0.45 * confidence(i)} 0.13 ${30 + 220 * confidence(i)})`;
  return map.owners[i].colour;
}

function isLit(map, i) {
  return map.options.only === null || map.owners[i].key === map.options.only;
}

function drawMap(map) {
  const { canvas, view, options, selection } = map;
  const context = canvas.getContext("2d");
  context.setTransform(view.ratio, 0, 0, view.ratio, 0, 0);
  context.clearRect(0, 0, view.width, view.height);
  const visible = [];
  for (let i = 0; i < images.count; i++) {
    const [x, y] = place(map, i);
    if (x > -50 && y > -50 && x < view.width + 50 && y < view.height + 50) visible.push([i, x, y]);
  }
  const radius = Math.min(Math.max(Math.min(150 / Math.sqrt(images.count), 4) * Math.sqrt(view.scale / view.least / 2), 1.6), 6);
  const selecting = selection.chosen.size > 0;
  for (const [i, x, y] of visible) {
    const lit = isLit(map, i) && (!selecting || selection.has(i));
    context.globalAlpha = lit ? 0.8 : FADED;
    context.fillStyle = pointColour(map, i);
    context.beginPath();
    context.arc(x, y, radius, 0, 2 * Math.PI);
    context.fill();
  }
  context.globalAlpha = 1;
  if (options.pictures) drawThumbnails(map, context, visible);
  drawOutline(map, context);
  if (map.marked !== undefined) ring(context, place(map, map.marked), options.size / 2 + 6);
}

/** Draw thumbnails where there is room. The order is fixed, so that thumbnails stay when the user zooms in, and more join them. */
function drawThumbnails(map, context, visible) {
  const { size } = map.options;
  const spacing = size + 4;
  const { selection } = map;
  const taken = new Map(); // {cell of a grid: [x, y]}; a thumbnail can only touch those in the cells around it
  const chosen = [];
  for (const [i, x, y] of [...visible].sort((a, b) => priority[a[0]] - priority[b[0]])) {
    if (!isLit(map, i) || (selection.chosen.size && !selection.has(i))) continue;
    const [column, row] = [Math.floor(x / spacing), Math.floor(y / spacing)];
    let free = true;
    for (let c = column - 1; free && c <= column + 1; c++) {
      for (let r = row - 1; free && r <= row + 1; r++) {
        const other = taken.get(c * 10007 + r);
        if (other && Math.abs(other[0] - x) < spacing && Math.abs(other[1] - y) < spacing) free = false;
      }
    }
    if (!free) continue;
    taken.set(column * 10007 + row, [x, y]);
    chosen.push([i, x, y]);
  }
  map.drawn = [];
  const missing = new Set();
  for (const [i, x, y] of chosen) {
    context.fillStyle = pointColour(map, i);
    context.beginPath();
    context.roundRect(x - size / 2 - 1.5, y - size / 2 - 1.5, size + 3, size + 3, 4);
    context.fill();
    if (drawThumbnail(context, i, x - size / 2, y - size / 2, size)) map.drawn.push(i);
    else missing.add(locate(i).sheet);
  }
  if (missing.size) Promise.all([...missing].map(loadSheet)).then(map.redraw);
}

function drawOutline(map, context) {
  if (map.outline.length < 2) return;
  const accent = getComputedStyle(document.body).getPropertyValue("--accent");
  context.beginPath();
  map.outline.forEach(([x, y], n) => (n ? context.lineTo(x, y) : context.moveTo(x, y)));
  context.closePath();
  context.strokeStyle = accent;
  context.lineWidth = 2;
  context.stroke();
  context.globalAlpha = 0.12;
  context.fillStyle = accent;
  context.fill();
  context.globalAlpha = 1;
}

function ring(context, [x, y], radius) {
  context.strokeStyle = getComputedStyle(document.body).getPropertyValue("--accent");
  context.lineWidth = 3;
  context.strokeRect(x - radius, y - radius, 2 * radius, 2 * radius);
}

/** The entries of the legend. A click on a cluster dims the others. */
function mapLegend(map) {
  const { options } = map;
  if (options.colours === "confidence") return [el("li", {}, "confidence from ", gradient(map), " to 100 %")];
  const entries = options.colours === "class"
    ? content.classes.map((name, k) => ({ name, colour: colour(k), key: null }))
    : groups().filter((group) => group.members.length);
  return entries.slice(0, 60).map((entry) => {
    const button = el("button", { "aria-pressed": entry.key !== null && options.only === entry.key, disabled: entry.key === null, onclick: () => {
      options.only = options.only === entry.key ? null : entry.key;
      map.legend();
      map.redraw();
    } }, dot(entry), entry.name);
    return el("li", {}, button);
  });
}

function gradient() {
  const box = el("span.gradient", { "aria-hidden": "true" });
  box.style.background = `linear-gradient(90deg, ${range(6).map((n) => `oklch(${0.85 - 0.09 * n} 0.13 ${30 + 44 * n})`).join(",")})`;
  return el("span", {}, "0 % ", box);
}

function savePicture(map) {
  map.canvas.toBlob((blob) => {
    const address = URL.createObjectURL(blob);
    el("a", { href: address, download: "map.png" }).click();
    setTimeout(() => URL.revokeObjectURL(address), 10000);
  });
}

// ---- mouse, touch and keys ----

function listenToMap(map) {
  const { canvas, view } = map;
  const at = (event) => [event.offsetX, event.offsetY];
  let start = null;
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    start = { at: at(event), x: view.x, y: view.y, lasso: map.options.lasso || event.shiftKey, moved: false };
    map.outline = start.lasso ? [at(event)] : [];
    hidePreview(map);
  });
  canvas.addEventListener("pointermove", (event) => {
    const [x, y] = at(event);
    if (!start) return hover(map, x, y);
    if (Math.hypot(x - start.at[0], y - start.at[1]) > 4) start.moved = true;
    if (start.lasso) map.outline.push([x, y]);
    else [view.x, view.y] = [start.x - (x - start.at[0]) / view.scale, start.y - (y - start.at[1]) / view.scale];
    map.redraw();
  });
  canvas.addEventListener("pointerup", (event) => {
    const ended = start;
    start = null;
    if (!ended) return;
    if (ended.lasso && ended.moved) {
      map.select(range(images.count).filter((i) => isLit(map, i) && isInside(map.outline, place(map, i))));
      map.toggleLasso(false);
    } else if (!ended.moved) {
      const image = imageAt(map, ...at(event));
      if (image >= 0) openImage(image, [image]);
    }
    map.outline = [];
    map.redraw();
  });
  canvas.addEventListener("pointerleave", () => hidePreview(map));
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(map, Math.exp(-Math.max(Math.min(event.deltaY, 120), -120) * 0.003), at(event));
    hidePreview(map);
  }, { passive: false });
  canvas.addEventListener("dblclick", (event) => zoom(map, 2, at(event)));
  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const moves = { ArrowLeft: [-60, 0], ArrowRight: [60, 0], ArrowUp: [0, -60], ArrowDown: [0, 60] };
    if (moves[event.key]) [view.x, view.y] = [view.x + moves[event.key][0] / view.scale, view.y + moves[event.key][1] / view.scale];
    else if (event.key === "+" || event.key === "=") zoom(map, 1.4);
    else if (event.key === "-") zoom(map, 1 / 1.4);
    else if (event.key === "0") fit(map);
    else if (event.key === "l") map.toggleLasso();
    else return;
    event.preventDefault();
    event.stopPropagation();
    map.redraw();
  });
}

/** Whether a point lies inside a polygon: an odd number of edges lie to its right. */
function isInside(polygon, [x, y]) {
  let inside = false;
  for (let n = 0, last = polygon.length - 1; n < polygon.length; last = n++) {
    const [[ax, ay], [bx, by]] = [polygon[n], polygon[last]];
    if (ay > y !== by > y && x < ((bx - ax) * (y - ay)) / (by - ay) + ax) inside = !inside;
  }
  return inside;
}

function hover(map, x, y) {
  const image = imageAt(map, x, y);
  if (image === map.hovered) return;
  map.hovered = image;
  if (image < 0) return hidePreview(map);
  const label = labelOf(image);
  map.preview.replaceChildren(thumbnail(image, 144, true),
    el("strong", {}, fileName(image)),
    el("span", {}, dot(map.owners[image]), `${groupName(image)}, ${percent(confidence(image))}`),
    label >= 0 ? el("span.muted", {}, className(label)) : "");
  map.preview.hidden = false;
  const [width, height] = [176, 230];
  map.preview.style.left = `${x + 24 + width > map.view.width ? x - width - 16 : x + 24}px`;
  map.preview.style.top = `${Math.max(Math.min(y - 20, map.view.height - height), 4)}px`;
}

function hidePreview(map) {
  map.preview.hidden = true;
  map.hovered = -1;
}
