// ---- levels: classifiers of several sizes as a tree, from few clusters to many ----

/** One clustering per number of clusters, the smallest number first. Of several equally large ones, the first one is used. */
function levels() {
  const bySize = groupBy(range(clusterings.length), (v) => new Set(clusterings[v].clusters).size);
  return [...bySize].sort((a, b) => a[0] - b[0]).map(([size, list]) => ({ size, clustering: list[0] }));
}

/** Link every group of a level to the group of the level above that holds most of its images. */
function tree(chain) {
  const nodes = chain.map(({ clustering }) => groups(clustering).filter((group) => group.members.length).map((group) => ({ group, clustering, children: [], share: 1 })));
  for (let level = 1; level < nodes.length; level++) {
    const owner = new Map(nodes[level - 1].flatMap((node) => node.group.members.map((i) => [i, node])));
    for (const node of nodes[level]) {
      const shares = [...groupBy(node.group.members, (i) => owner.get(i))].sort((a, b) => b[1].length - a[1].length);
      node.share = shares[0][1].length / node.group.members.length;
      shares[0][0].children.push(node);
    }
  }
  return nodes[0];
}

function levelsPage() {
  const chain = levels();
  return [
    el("div.toolbar", {}, el("h2", {}, "Levels"), el("span.muted", {}, "every cluster below the one that holds most of its images"), el("span.gap", {}),
      el("span", {}, "Use"), ...chain.map(({ size, clustering }) => el("a.chip", { href: `#page=clusters&clustering=${clustering}`, "aria-current": clustering === state.clustering ? "true" : null }, plural(size, "cluster")))),
    el("ul.tree", {}, ...tree(chain).map(branch)),
  ];
}

function branch(node) {
  const { group, clustering, children, share } = node;
  const sure = bySureness(group.members, clustering).slice(0, 8);
  const pictures = el("span.row-of-images", {});
  const head = el("span.node", {}, dot(group), el("a", { href: `#clustering=${clustering}&cluster=${group.key}` }, group.name),
    el("span.muted", {}, `${plural(group.members.length, "image")}${share < 1 ? `, ${percent(share)} of them here` : ""}`), pictures);
  whenVisible(head, () => { pictures.append(...sure.map((i) => cell(i, { side: 44, list: () => sure }))); moveByArrows(pictures); });
  if (!children.length) return el("li", {}, head);
  const list = el("ul", {});
  const details = el("details", { ontoggle: () => { if (!list.children.length) list.append(...children.map(branch)); } },
    el("summary", {}, head, el("span.badge", {}, plural(children.length, "part"))), list);
  return el("li", {}, details);
}
