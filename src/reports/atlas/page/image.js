// ---- image: one image with its neighbours and the probabilities of its clusters ----

const imageDialog = byId("image");

/** Open an image. The arrow keys move through `list`. */
function openImage(image, list = state.listed) {
  state.listed = list.includes(image) ? list : [image];
  showImage(image);
  if (!imageDialog.open) imageDialog.showModal();
  setParameter("image", image);
}

function showImage(image) {
  const step = (by) => {
    const next = state.listed[state.listed.indexOf(image) + by];
    if (next !== undefined) openImage(next, state.listed);
  };
  const at = state.listed.indexOf(image);
  const name = shownPath(image);
  const link = images.links?.[image];
  imageDialog.replaceChildren(
    el("div.top", {},
      el("h2.path", {}, name),
      el("button", { "aria-label": "Previous image", disabled: at <= 0, onclick: () => step(-1) }, "←"),
      el("button", { "aria-label": "Next image", disabled: at >= state.listed.length - 1, onclick: () => step(1) }, "→"),
      el("button", { "aria-label": "Close", onclick: () => imageDialog.close() }, "✕")),
    el("div.columns", {},
      el("div.left", {}, el("div.large", { role: "img", "aria-label": fileName(image) }, thumbnail(image, 300, true)), imageFacts(image),
        el("p.links", {},
          link ? el("a.button", { href: link, target: "_blank", rel: "noreferrer" }, "Open the file") : null,
          el("a.button", { href: `#page=map&focus=${image}`, onclick: () => imageDialog.close() }, "Show on the map"))),
      el("div.right", {}, probabilities(image, state.clustering), neighbourCells(image), otherProbabilities(image) ?? "")),
  );
  moveByArrows(imageDialog);
  imageDialog.onkeydown = (event) => {
    if (event.target.closest(".neighbours")) return; // there the arrows move between the neighbours
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  };
}

function imageFacts(image) {
  const rows = [["cluster", el("a", { href: `#cluster=${groupsByImageCached(state.clustering)[image].key}`, onclick: () => imageDialog.close() }, groupName(image))]];
  rows.push(["confidence", percent(confidence(image))]);
  if (images.labels) rows.push(["class", className(labelOf(image))]);
  if (image in images.broken) rows.push(["broken", images.broken[image]]);
  else {
    rows.push(["size", `${images.sizes[2 * image]} × ${images.sizes[2 * image + 1]} pixels`]);
    rows.push(["brightness", `${images.brightness[image]} of 255`], ["sharpness", (images.sharpness[image] / 10).toFixed(1)]);
  }
  const twins = images.duplicates[image] ? range(images.count).filter((i) => i !== image && images.duplicates[i] === images.duplicates[image]) : [];
  if (twins.length) rows.push(["near-duplicates", el("span.inline", {}, ...twins.slice(0, 6).map((i) => cell(i, { side: 36 })))]);
  return el("dl", {}, ...rows.flatMap(([key, value]) => [el("dt", {}, key), el("dd", {}, value)]));
}

/** The most likely clusters of an image as bars. */
function probabilities(image, v) {
  const { top, name, clusters } = clusterings[v];
  const bars = top
    ? range(top.width).map((t) => [top.clusters[image * top.width + t], top.shares[image * top.width + t] / 65535])
    : [[clusters[image], confidence(image, clusterings[v])]];
  return el("section.probabilities", {}, el("h3", {}, clusterings.length > 1 ? name : top ? "Probabilities" : "Confidence"),
    el("ul", {}, ...bars.map(([k, share]) => {
      const group = groupOf(k, v);
      const bar = el("span.bar-fill", {});
      bar.style.cssText = `inline-size:${100 * share}%;background:${group.colour}`;
      return el("li", {}, el("span.name", {}, group.name), el("span.bar-track", { "aria-hidden": "true" }, bar), el("span.value", {}, percent(share)));
    })));
}

/** What the other classifiers say, folded. */
function otherProbabilities(image) {
  const others = range(clusterings.length).filter((v) => v !== state.clustering);
  if (!others.length) return null;
  return el("details", { open: others.length === 1 }, el("summary", {}, plural(others.length, "other clustering")), ...others.map((v) => probabilities(image, v)));
}

function neighbourCells(image) {
  const list = range(images.width).map((j) => images.neighbours[image * images.width + j]);
  const own = groupsByImageCached(state.clustering);
  return el("section.neighbours", {}, el("h3", {}, `${list.length} nearest images`),
    el("div.grid", {}, ...list.map((i, j) => {
      const button = cell(i, { side: 76, caption: (images.similarities[image * images.width + j] / 255).toFixed(2) });
      button.style.setProperty("--ring", own[i].colour);
      button.classList.add("ringed");
      return button;
    })));
}

// A link in the dialog changes the address before the dialog has closed.
imageDialog.addEventListener("close", () => { if (parameters().has("image")) setParameter("image", null); });
imageDialog.addEventListener("click", (event) => { if (event.target === imageDialog) imageDialog.close(); });
