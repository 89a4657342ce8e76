// ---- core: the content of the page, and helpers that all parts use ----

const content = JSON.parse(document.getElementById("content").textContent);
document.getElementById("content").remove();

/** Turn packed numbers into a typed array. */
function unpack(packed) {
  const bytes = Uint8Array.from(atob(packed.data), (c) => c.charCodeAt(0));
  const types = { u8: Uint8Array, i8: Int8Array, u16: Uint16Array, u32: Uint32Array };
  return new types[packed.type](bytes.buffer);
}

const images = {
  count: content.paths.length,
  paths: content.paths,
  links: content.links,
  neighbours: unpack(content.neighbours),
  similarities: unpack(content.similarities),
  points: unpack(content.points),
  sketch: unpack(content.sketch),
  sizes: unpack(content.sizes),
  shapes: unpack(content.shapes),
  place: unpack(content.place),
  brightness: unpack(content.brightness),
  sharpness: unpack(content.sharpness),
  duplicates: unpack(content.duplicates),
  broken: content.broken,
  labels: content.labels && unpack(content.labels), // class + 1; 0 where it is unknown
};
images.width = images.count ? images.neighbours.length / images.count : 0; // neighbours of each image
images.sketchWidth = images.sketch.length / images.count;

const clusterings = content.clusterings.map((entry) => ({
  ...entry,
  clusters: unpack(entry.clusters),
  confidences: unpack(entry.confidences),
  top: entry.top && { width: entry.top.width, clusters: unpack(entry.top.clusters), shares: unpack(entry.top.shares) },
}));

/** What is shown: the number of the clustering, and the images that the last page listed, for the keys of an open image. */
const state = { clustering: 0, listed: [] };

/** Make an element. Strings become text, never HTML. Attributes that start with "on" are listeners. */
function el(tag, attributes = {}, ...children) {
  const [name, ...classes] = tag.split(".");
  const element = document.createElement(name);
  if (classes.length) element.className = classes.join(" ");
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key in element && typeof value !== "string") element[key] = value;
    else if (value !== null && value !== false) element.setAttribute(key, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Make an SVG element. */
function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

const byId = (id) => document.getElementById(id);
const number = (value) => value.toLocaleString("en");
const plural = (count, word) => `${number(count)} ${word}${count === 1 ? "" : "s"}`;
const percent = (share) => `${(100 * share).toFixed(share >= 0.9995 || share === 0 ? 0 : 1)} %`;
const confidence = (image, clustering = clusterings[state.clustering]) => clustering.confidences[image] / 65535;
const labelOf = (image) => (images.labels && images.labels[image] ? images.labels[image] - 1 : -1);
const className = (label) => (label >= 0 ? content.classes[label] ?? `class ${label}` : "unknown");
const common = commonFolder(content.paths);
/** Path of an image without the folders that all images share. */
const shownPath = (image) => images.paths[image].slice(common);
const fileName = (image) => images.paths[image].split("/").pop();
const say = (text) => { byId("live").textContent = text; };
const range = (count) => Array.from({ length: count }, (_, i) => i);

/** Length of the folders that all paths share, with the last slash. */
function commonFolder(paths) {
  let folder = paths[0].slice(0, paths[0].lastIndexOf("/") + 1);
  for (const path of paths) while (!path.startsWith(folder)) folder = folder.slice(0, folder.slice(0, -1).lastIndexOf("/") + 1);
  return folder.length;
}

/** Return {key: list of the items with this key}. */
function groupBy(items, key) {
  const found = new Map();
  for (const item of items) {
    const k = key(item);
    if (!found.has(k)) found.set(k, []);
    found.get(k).push(item);
  }
  return found;
}

/** Colour of a cluster or class. The golden angle keeps the hues of neighbouring numbers apart. */
function colour(k) {
  if (k < 0) return "oklch(0.65 0 0)";
  const lightness = [0.66, 0.56, 0.74][Math.floor(k / 8) % 3];
  return `oklch(${lightness} 0.16 ${(k * 137.508 + 25) % 360})`;
}

/** Offer text as a file to save. */
function download(name, text, type) {
  const address = URL.createObjectURL(new Blob([text], { type }));
  const link = el("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
  say(`${name} saved`);
}

/** One line of a CSV file. */
const csvLine = (cells) => cells.map((cell) => (/[",\r\n]/.test(cell) ? `"${String(cell).replaceAll('"', '""')}"` : cell)).join(",") + "\r\n";

/** Values that outlive a reload, where the browser allows it. */
const memory = {
  get(key) {
    try { return JSON.parse(localStorage.getItem(`atlas ${key}`)); } catch { return null; }
  },
  set(key, value) {
    try { localStorage.setItem(`atlas ${key}`, JSON.stringify(value)); } catch { /* the page works without it */ }
  },
};
