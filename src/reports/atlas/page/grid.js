// ---- grid: many images, with a selection ----

const STEP = 300; // images that a grid shows at once; a button shows more

/** A button with the thumbnail of an image. `caption` is shown below it. */
function cell(image, { side = 88, caption = null, list = null } = {}) {
  const name = `${fileName(image)}, ${groupName(image)}, ${percent(confidence(image))}`;
  const button = el("button.cell", { "aria-label": name, title: shownPath(image), tabindex: -1, "data-image": image }, thumbnail(image, side));
  if (image in images.broken) button.classList.add("broken");
  if (caption) button.append(el("span.caption", {}, caption));
  button.addEventListener("click", (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;
    openImage(image, list?.() ?? [image]);
  });
  return button;
}

/** Let the arrow keys move between the cells of an element; only one of them is in the order of the Tab key. */
function moveByArrows(element) {
  const cells = () => [...element.querySelectorAll(".cell")];
  const enter = (target) => {
    for (const each of element.querySelectorAll('.cell[tabindex="0"]')) each.tabIndex = -1;
    target.tabIndex = 0;
  };
  element.addEventListener("focusin", (event) => event.target.classList.contains("cell") && enter(event.target));
  element.addEventListener("keydown", (event) => {
    const all = cells();
    const at = all.indexOf(document.activeElement);
    if (at < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    const columns = Math.max(all.filter((each) => each.offsetTop === all[0].offsetTop).length, 1);
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, Home: -at, End: all.length - 1 - at }[event.key];
    if (step === undefined || !all[at + step]) return;
    event.preventDefault();
    all[at + step].focus();
  });
  if (cells()[0]) cells()[0].tabIndex = 0;
}

/** A selection of images that a page shares between its parts. */
function makeSelection(changed) {
  const chosen = new Set();
  return {
    chosen,
    has: (image) => chosen.has(image),
    toggle(image, on = !chosen.has(image)) { on ? chosen.add(image) : chosen.delete(image); changed(); },
    clear() { chosen.clear(); changed(); },
  };
}

/** Show images as a grid. With a selection, Ctrl + click, Shift + click and the key x select. */
function grid(list, { side = 88, selection = null, caption = null } = {}) {
  const box = el("div.grid", { role: "group", "aria-label": plural(list.length, "image") });
  const more = el("button.more", {});
  const wrapper = el("div", {}, box, more);
  let shown = 0;
  let last = null;
  const mark = () => {
    for (const each of box.children) {
      const on = selection.has(Number(each.dataset.image));
      each.classList.toggle("selected", on);
      each.setAttribute("aria-pressed", on);
    }
  };
  const select = (image, through) => {
    const on = !selection.has(image);
    if (through && last !== null) {
      const [from, to] = [list.indexOf(last), list.indexOf(image)].sort((a, b) => a - b);
      for (const each of list.slice(from, to + 1)) selection.chosen.add(each);
      selection.toggle(image, true);
    } else selection.toggle(image, on);
    last = image;
    mark();
  };
  const add = () => {
    const next = list.slice(shown, shown + STEP);
    box.append(...next.map((i) => cell(i, { side, caption: caption?.(i), list: () => list })));
    shown += next.length;
    more.hidden = shown >= list.length;
    more.textContent = `Show ${number(Math.min(STEP, list.length - shown))} more of ${number(list.length - shown)}`;
    if (selection) mark();
  };
  more.addEventListener("click", add);
  if (selection) {
    box.addEventListener("click", (event) => {
      const target = event.target.closest(".cell");
      if (target && (event.ctrlKey || event.metaKey || event.shiftKey)) select(Number(target.dataset.image), event.shiftKey);
    });
    box.addEventListener("keydown", (event) => {
      const target = event.target.closest(".cell");
      if (target && event.key === "x") { event.stopPropagation(); select(Number(target.dataset.image), event.shiftKey); }
    });
    wrapper.mark = mark;
  }
  add();
  moveByArrows(box);
  return wrapper;
}

/** Save a list of images as CSV, in the columns that predict.py writes. */
function saveCsv(list, name) {
  const labelled = !!images.labels;
  const lines = [["path", "cluster", "name", "confidence", ...(labelled ? ["class"] : [])]];
  const { clusters } = clusterings[state.clustering];
  for (const i of list) {
    const row = [images.paths[i], clusters[i], groupName(i), confidence(i).toPrecision(4)];
    lines.push(labelled ? [...row, labelOf(i) >= 0 ? className(labelOf(i)) : ""] : row);
  }
  download(name, lines.map(csvLine).join(""), "text/csv");
}
