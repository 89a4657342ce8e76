// ---- sheets: thumbnails, which lie in sheets of 16 x 16 ----

const sheetElements = [...document.querySelectorAll("script.sheet")];
const sheets = sheetElements.map(() => null); // promises of bitmaps
const bitmaps = sheetElements.map(() => null);
const perSheet = content.sheets.columns ** 2;
const tile = content.sheets.tile;

/** Decode a sheet when it is first needed. */
function loadSheet(k) {
  sheets[k] ??= (async () => {
    const bytes = Uint8Array.from(atob(sheetElements[k].textContent), (c) => c.charCodeAt(0));
    sheetElements[k].remove();
    bitmaps[k] = await createImageBitmap(new Blob([bytes], { type: "image/webp" }));
    return bitmaps[k];
  })();
  return sheets[k];
}

/** Where the thumbnail of an image lies: number of the sheet, and its rectangle. */
function locate(image) {
  const place = images.place[image];
  const inside = place % perSheet;
  return {
    sheet: Math.floor(place / perSheet),
    x: (inside % content.sheets.columns) * tile,
    y: Math.floor(inside / content.sheets.columns) * tile,
    width: images.shapes[2 * image],
    height: images.shapes[2 * image + 1],
  };
}

/** Draw a thumbnail into a square of a canvas; return whether its sheet is decoded. `whole` keeps the edges of oblong images. */
function drawThumbnail(context, image, x, y, side, whole = false) {
  const at = locate(image);
  const bitmap = bitmaps[at.sheet];
  if (!bitmap) return false;
  const smooth = Math.max(at.width, at.height) >= 24; // smaller images show their pixels
  const edge = smooth ? 0.5 : 0; // half a pixel less, or smoothing would mix in the thumbnail next to it
  context.imageSmoothingEnabled = smooth;
  context.imageSmoothingQuality = "high";
  if (whole) {
    const scale = side / Math.max(at.width, at.height);
    const [w, h] = [at.width * scale, at.height * scale];
    context.drawImage(bitmap, at.x + edge, at.y + edge, at.width - 2 * edge, at.height - 2 * edge, x + (side - w) / 2, y + (side - h) / 2, w, h);
  } else {
    const part = Math.min(at.width, at.height) - 2 * edge;
    context.drawImage(bitmap, at.x + (at.width - part) / 2, at.y + (at.height - part) / 2, part, part, x, y, side, side);
  }
  return true;
}

/** Make a canvas with the thumbnail of an image, `side` CSS pixels large. */
function thumbnail(image, side, whole = false) {
  const canvas = el("canvas", { "aria-hidden": "true" });
  const pixels = Math.round(side * Math.min(window.devicePixelRatio || 1, 2));
  canvas.width = canvas.height = pixels;
  canvas.style.width = canvas.style.height = `${side}px`;
  const draw = () => drawThumbnail(canvas.getContext("2d"), image, 0, 0, pixels, whole);
  if (!draw()) loadSheet(locate(image).sheet).then(draw);
  return canvas;
}
