// ---- groups: clusters after the user's changes, and names.json ----
//
// The changes of a clustering have the form of names.json:
// {"format": "self-classifier names", "version": 1, "model": fingerprint, "classifier": number,
//  "clusters": {"0": {"name": "cats"}, "7": {"into": 4}, "9": {"rejected": true}},
//  "split": [{"name": "kittens", "from": 0, "images": [paths]}]}

const LONGEST_NAME = 200;
const edits = clusterings.map((clustering, v) => memory.get(editsKey(v)) ?? readEdits(clustering.names));

function editsKey(v) {
  const { model, classifier } = clusterings[v];
  return `${model} ${classifier} ${images.count} ${images.paths[0]}`;
}

/** Turn the content of names.json into changes: {clusters, split}, where `images` are positions. */
function readEdits(names) {
  const position = new Map(images.paths.map((path, i) => [path, i]));
  return {
    clusters: structuredClone(names?.clusters ?? {}),
    split: (names?.split ?? []).map((part) => ({
      ...part,
      images: part.images.map((path) => position.get(path)).filter((i) => i !== undefined),
      elsewhere: part.images.filter((path) => !position.has(path)), // images that this atlas does not show
    })),
  };
}

/** Return the content of names.json for a clustering. */
function namesFile(v) {
  const { model, classifier } = clusterings[v];
  return {
    format: "self-classifier names",
    version: 1,
    model,
    classifier,
    clusters: edits[v].clusters,
    split: edits[v].split.map((part) => ({
      name: part.name,
      from: part.from,
      images: [...part.images.map((i) => images.paths[i]), ...(part.elsewhere ?? [])],
    })),
  };
}

function saveNames() {
  download("names.json", `${JSON.stringify(namesFile(state.clustering), null, 1)}\n`, "application/json");
  byId("save").classList.remove("unsaved");
}

const cached = new Map(); // {number of the clustering: its groups}

/** Return the groups of a clustering: clusters, without those that were merged into others, and the parts that were split off. */
function groups(v = state.clustering) {
  if (cached.has(v)) return cached.get(v);
  const { clusters, size } = clusterings[v];
  const { clusters: changed, split } = edits[v];
  const members = range(size).map(() => []);
  const part = new Map(split.flatMap((each, s) => each.images.map((i) => [i, s])));
  for (let i = 0; i < images.count; i++) {
    if (!part.has(i)) members[changed[clusters[i]]?.into ?? clusters[i]].push(i);
  }
  const found = [];
  for (let k = 0; k < size; k++) {
    const entry = changed[k] ?? {};
    if (entry.into !== undefined) continue;
    const merged = Object.keys(changed).filter((other) => changed[other].into === k).map(Number);
    found.push({ key: String(k), cluster: k, merged, name: entry.name ?? `cluster ${k}`, rejected: !!entry.rejected, members: members[k] });
  }
  split.forEach((each, s) => {
    found.push({ key: `s${s}`, cluster: each.from, part: s, merged: [], name: each.name, rejected: false, members: each.images });
  });
  for (const group of found) group.colour = group.part === undefined ? colour(group.cluster) : colour(size + group.part);
  cached.set(v, found);
  return found;
}

/** Return the group with a key, or the group with which this cluster was merged. */
function groupOf(key, v = state.clustering) {
  const into = edits[v].clusters[key]?.into;
  return groups(v).find((group) => group.key === String(into ?? key));
}

/** Return {image: group} of a clustering. */
function groupsByImage(v = state.clustering) {
  const found = new Array(images.count);
  for (const group of groups(v)) for (const i of group.members) found[i] = group;
  return found;
}

const groupName = (image, v = state.clustering) => {
  const group = groupsByImageCached(v)[image];
  return group.rejected ? "rejected" : group.name;
};
const byImage = new Map();
function groupsByImageCached(v) {
  if (!byImage.has(v)) byImage.set(v, groupsByImage(v));
  return byImage.get(v);
}

/** Change the clusters of the clustering that is shown, remember the change and show the page again. */
function change(action, message) {
  const v = state.clustering;
  action(edits[v]);
  for (const [key, entry] of Object.entries(edits[v].clusters)) if (!Object.keys(entry).length) delete edits[v].clusters[key];
  cached.delete(v);
  byImage.delete(v);
  memory.set(editsKey(v), edits[v]);
  byId("save").classList.add("unsaved");
  refresh();
  say(message);
}

const entryOf = (changes, cluster) => (changes.clusters[cluster] ??= {});

function rename(group, name) {
  const text = name.trim().slice(0, LONGEST_NAME);
  if (!text && group.part !== undefined) return;
  change((changes) => {
    if (group.part !== undefined) changes.split[group.part].name = text;
    else if (text && text !== `cluster ${group.cluster}`) entryOf(changes, group.cluster).name = text;
    else delete entryOf(changes, group.cluster).name;
  }, `renamed to ${text || "its number"}`);
}

/** Merge a group into another one. A part that was split off returns if it is merged with its own cluster. */
function merge(group, target) {
  change((changes) => {
    if (group.part !== undefined) return mergePart(changes, group, target);
    if (target.part !== undefined) return mergePart(changes, target, group, target.name);
    for (const k of [group.cluster, ...group.merged]) changes.clusters[k] = { into: target.cluster };
    for (const part of changes.split) if (part.from === group.cluster) part.from = target.cluster;
  }, `merged with ${target.name}`);
}

/** Merge a part that was split off: with another part, with its own cluster, or with another cluster. */
function mergePart(changes, part, target, name) {
  const from = changes.split[part.part];
  if (target.part !== undefined) {
    changes.split[target.part].images.push(...from.images);
    changes.split.splice(part.part, 1);
  } else if (target.cluster === from.from) {
    changes.split.splice(part.part, 1);
    if (name) entryOf(changes, target.cluster).name = name;
  } else {
    // A file of names cannot move single images into another cluster, so that cluster's images join the part.
    from.images.push(...target.members);
    from.name = name ?? target.name;
  }
}

function splitOff(selected, name) {
  const text = name.trim().slice(0, LONGEST_NAME);
  if (!text || !selected.length) return;
  change((changes) => {
    for (const part of changes.split) part.images = part.images.filter((i) => !selected.includes(i));
    changes.split = changes.split.filter((part) => part.images.length);
    changes.split.push({ name: text, from: groupsFirstCluster(selected), images: [...selected], elsewhere: [] });
  }, `${plural(selected.length, "image")} split off as ${text}`);
}

/** The cluster from which most of the images come. */
function groupsFirstCluster(selected) {
  const counts = groupBy(selected, (i) => clusterings[state.clustering].clusters[i]);
  return [...counts].sort((a, b) => b[1].length - a[1].length)[0][0];
}

function reject(group, rejected) {
  change((changes) => {
    if (rejected) entryOf(changes, group.cluster).rejected = true;
    else delete entryOf(changes, group.cluster).rejected;
  }, rejected ? `${group.name} rejected` : `${group.name} accepted again`);
}

function undoAll() {
  change((changes) => { changes.clusters = {}; changes.split = []; }, "all changes dropped");
}

/** Undo a merge: the clusters stand alone again. */
function separate(group) {
  change((changes) => { for (const k of group.merged) delete changes.clusters[k].into; }, `${group.name} separated`);
}
