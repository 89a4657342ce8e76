// ---- picks: the surest, most typical, most diverse and least sure images of a group ----

/** Images that can be shown, sorted by confidence, the surest first. */
function bySureness(members, v = state.clustering) {
  const values = clusterings[v].confidences;
  return members.filter((i) => !(i in images.broken)).sort((a, b) => values[b] - values[a] || a - b);
}

/** Images sorted by PageRank in the graph of neighbours inside the group, the most central first. */
function byCentrality(members) {
  const shown = members.filter((i) => !(i in images.broken));
  const place = new Map(shown.map((i, n) => [i, n]));
  const links = shown.map((i) => {
    const inside = [];
    for (let j = 0; j < images.width; j++) {
      const other = place.get(images.neighbours[i * images.width + j]);
      if (other !== undefined) inside.push(other);
    }
    return inside;
  });
  const count = shown.length;
  let rank = new Float64Array(count).fill(1 / count);
  for (let round = 0; round < 20; round++) {
    const next = new Float64Array(count).fill(0.15 / count);
    let lost = 0;
    links.forEach((inside, n) => {
      if (!inside.length) lost += rank[n];
      for (const other of inside) next[other] += (0.85 * rank[n]) / inside.length;
    });
    rank = next.map((value) => value + (0.85 * lost) / count);
  }
  return shown.map((i, n) => [i, rank[n]]).sort((a, b) => b[1] - a[1] || a[0] - b[0]).map(([i]) => i);
}

/** Images as far apart from each other as possible: each is the farthest one from those before it. The first one is central. */
function farApart(members, first, count) {
  const { sketch, sketchWidth: width } = images;
  const shown = members.filter((i) => !(i in images.broken));
  const distances = new Float64Array(shown.length).fill(Infinity);
  const chosen = [];
  let next = first;
  while (chosen.length < Math.min(count, shown.length)) {
    chosen.push(next);
    let farthest = -1;
    shown.forEach((i, n) => {
      let distance = 0;
      for (let d = 0; d < width; d++) distance += (sketch[i * width + d] - sketch[next * width + d]) ** 2;
      distances[n] = i === next ? -1 : Math.min(distances[n], distance);
      if (farthest < 0 || distances[n] > distances[farthest]) farthest = n;
    });
    if (distances[farthest] < 0) break;
    next = shown[farthest];
  }
  return chosen;
}

/** The four rows of a tile in the overview. */
function picks(group, count) {
  const sure = bySureness(group.members);
  if (!sure.length) return [];
  const typical = byCentrality(group.members);
  return [
    ["surest", sure.slice(0, count)],
    ["most typical", typical.slice(0, count)],
    ["most diverse", farApart(group.members, typical[0], count)],
    ["least sure", sure.slice(-count).reverse()],
  ];
}

/** Size, mean confidence, and with labels the most frequent class and its share. */
function facts(group, v = state.clustering) {
  const { members } = group;
  const mean = members.reduce((sum, i) => sum + confidence(i, clusterings[v]), 0) / Math.max(members.length, 1);
  const found = { images: members.length, confidence: mean };
  if (images.labels) {
    const known = members.filter((i) => labelOf(i) >= 0);
    const largest = [...groupBy(known, labelOf)].sort((a, b) => b[1].length - a[1].length)[0];
    if (largest) Object.assign(found, { class: largest[0], purity: largest[1].length / known.length });
  }
  return found;
}
