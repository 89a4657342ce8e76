// ---- cluster: all images of a group, and the changes to it ----

const SORTS = {
  sure: ["surest first", (list) => bySureness(list)],
  typical: ["most typical first", (list) => byCentrality(list)],
  unsure: ["least sure first", (list) => bySureness(list).reverse()],
  name: ["by file name", (list) => [...list].sort((a, b) => (images.paths[a] < images.paths[b] ? -1 : 1))],
};

function clusterPage(key) {
  const group = groupOf(key);
  if (!group) return [el("p.empty", {}, `There is no cluster ${key}. `, el("a", { href: "#" }, "All clusters"))];
  const place = el("div", {});
  const sort = el("select", { onchange: () => draw() }, ...Object.entries(SORTS).map(([value, [label]]) => el("option", { value }, label)));
  const { selection, bar } = selectionBar(group.name, () => place.firstChild?.mark?.());
  const draw = () => {
    const sorted = SORTS[sort.value][1](group.members);
    const broken = group.members.filter((i) => i in images.broken);
    place.replaceChildren(grid([...sorted, ...broken.filter((i) => !sorted.includes(i))], { side: 96, selection, caption: captionOf }));
  };
  draw();
  return [
    el("div.toolbar.heading", {}, dot(group), el("h2", {}, group.name), el("span.muted", {}, countText(group)),
      group.rejected ? el("span.badge", {}, "rejected") : null, el("span.gap", {}),
      ...changeButtons(group)),
    meters(group),
    confusedWith(group),
    el("div.toolbar", {}, el("label", {}, "Sort ", sort),
      el("span.muted", {}, "Ctrl + click or x selects images"), el("span.gap", {}),
      el("button", { onclick: () => saveCsv(group.members, `${group.name}.csv`) }, "Save as CSV")),
    bar, place, leftOut(group),
  ];
}

/** With labels, the class; otherwise the confidence. */
const captionOf = (image) => (labelOf(image) >= 0 ? className(labelOf(image)) : percent(confidence(image)));

function changeButtons(group) {
  const buttons = [el("button", { onclick: () => askName(group) }, "Rename")];
  buttons.push(el("button", { onclick: () => askMerge(group) }, "Merge"));
  if (group.merged.length) buttons.push(el("button", { onclick: () => separate(group) }, "Undo the merge"));
  if (group.part === undefined) buttons.push(el("button", { onclick: () => reject(group, !group.rejected) }, group.rejected ? "Accept" : "Reject"));
  return buttons;
}

/** The clusters that take the second place most often, with links. */
function confusedWith(group) {
  const { top } = clusterings[state.clustering];
  if (!top || top.width < 2) return null;
  const own = new Set([group.cluster, ...group.merged]);
  const seconds = groupBy(group.members, (i) => top.clusters[i * top.width + 1]);
  const list = [...seconds].filter(([k]) => !own.has(k)).sort((a, b) => b[1].length - a[1].length).slice(0, 3);
  if (!list.length) return null;
  return el("p.muted", {}, "Most often in the second place: ", ...list.flatMap(([k, members], n) => {
    const other = groupOf(k);
    return [n ? ", " : "", el("a", { href: `#cluster=${other.key}` }, other.name), ` (${percent(members.length / group.members.length)})`];
  }));
}

/** A selection with the actions on it. */
function selectionBar(name, marked = () => {}) {
  const count = el("strong", {});
  const bar = el("div.toolbar.selection", { hidden: true, role: "group", "aria-label": "Selection" }, count,
    el("button", { onclick: () => askSplit([...selection.chosen]) }, "Split off as a new cluster"),
    el("button", { onclick: () => saveCsv([...selection.chosen], "selection.csv") }, "Save as CSV"),
    el("button", { onclick: () => { selection.clear(); marked(); } }, "Clear"));
  const selection = makeSelection(() => {
    count.textContent = `${plural(selection.chosen.size, "image")} selected`;
    bar.hidden = !selection.chosen.size;
  });
  state.clearSelection = () => { selection.clear(); marked(); };
  return { selection, bar };
}

/** Links to images that the atlas does not show. */
function leftOut(group) {
  if (state.clustering !== 0 || group.part !== undefined) return null;
  const list = [group.cluster, ...group.merged].flatMap((k) => content.left_out[k] ?? []);
  const total = content.totals ? [group.cluster, ...group.merged].reduce((sum, k) => sum + content.totals[k], 0) : group.members.length;
  const hidden = total - group.members.length;
  if (hidden <= 0) return null;
  return el("details", {}, el("summary", {}, `${plural(hidden, "more image")} without a thumbnail`),
    el("ul.files", {}, ...list.map(([name, link]) => el("li", {}, el("a", { href: link, target: "_blank", rel: "noreferrer" }, name)))),
    hidden > list.length ? el("p.muted", {}, `${number(hidden - list.length)} more are in the CSV file next to this page.`) : null);
}

// ---- forms ----

const formDialog = byId("form");

/** Ask in a dialog. `action` gets the value of the field. */
function ask(title, field, button, action) {
  const form = el("form", { method: "dialog", onsubmit: () => { formDialog.close(); action(field.value); } },
    el("h2", {}, title), field,
    el("div.buttons", {}, el("button", { type: "button", onclick: () => formDialog.close() }, "Cancel"), el("button.primary", { type: "submit" }, button)));
  formDialog.replaceChildren(form);
  formDialog.showModal();
  field.focus();
  field.select?.();
}

const textField = (value) => el("input", { type: "text", value, "aria-label": "Name", maxlength: LONGEST_NAME, autocomplete: "off" });
const askName = (group) => ask(`Rename ${group.name}`, textField(group.name), "Rename", (value) => rename(group, value));
const askSplit = (selected) => ask(`Split off ${plural(selected.length, "image")}`, textField("new cluster"), "Split off", (value) => splitOff(selected, value));
function askMerge(group) {
  const others = groups().filter((each) => each.key !== group.key && (each.members.length || each.part === undefined));
  const field = el("select", { "aria-label": "Cluster", size: Math.min(others.length, 12) }, ...others.map((each) => el("option", { value: each.key }, `${each.name} (${number(each.members.length)})`)));
  ask(`Merge ${group.name} with`, field, "Merge", (key) => {
    const target = groups().find((each) => each.key === key);
    if (!target) return;
    merge(group, target);
    if (target.part === undefined) location.hash = `#cluster=${target.key}`;
  });
}
