"use strict";
// Draws every explorer of the page from its data (`tl_jets.views.explorers`), with Observable Plot.
for (const root of document.querySelectorAll(".explorer")) explore(root, JSON.parse(root.querySelector("script").textContent));

function explore(root, data) {
const lens = data.iterative, joint = data.joint, BARS = 14;
const NAMES = { kl: "KL from the model, nats", remainder_norm: "remainder", cosine: "cosine", centered_cosine: "centered cosine", top1_agreement: "top-1 agreement" };
const state = { order: 0, prompt: 0, layer: 0, pos: 0, effect: 0, whole: false };

function element(tag, content, attributes) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
  for (const part of content === undefined ? [] : Array.isArray(content) ? content : [content]) made.append(part);
  return made;
}
function place(tag, name, attributes) { root.append(element(tag, [], { class: name, ...attributes })); return root.lastChild; }
function token(text) { return element("bdi", text); }
function marked(words, borrowed) { return borrowed ? ["[", token(words[0]), "]"] : [token(words[0])]; }
function number(value) {
  if (value === null || value === undefined) return "n/a";
  const size = Math.abs(value);
  if (size > 1e-6 && (size < 0.005 || size >= 100000)) return value.toExponential(1);  // smaller is rounding
  return value.toFixed(size < 10 ? 2 : size < 100 ? 1 : 0);
}
function signed(value) { return (value > 0 ? "+" : "") + number(value); }
function table(head, rows) {
  const made = element("table", [], { class: "facts" });
  if (head) made.append(element("tr", head.map(text => element("th", text))));
  for (const row of rows) made.append(element("tr", row.map(part => element("td", part, typeof part === "string" ? { class: "number" } : {}))));
  return made;
}
function words(...content) { return element("span", content); }
function chart(options) { return element("figure", Plot.plot({ width: 380, style: { background: "transparent", fontSize: "11px" }, ...options })); }
function select(choices, chosen, change) {
  const made = element("select", choices.map(([value, name]) => element("option", name, { value })));
  made.value = chosen;
  made.addEventListener("change", () => change(made.value));
  return made;
}
function bars(rows) {
  const room = 0.2 * (d3.max(rows, d => Math.abs(d.value)) || 1);  // for the numbers beside the bars
  const domain = [Math.min(0, d3.min(rows, d => d.value) - room), Math.max(0, d3.max(rows, d => d.value) + room)];
  const said = (side, filter) => Plot.text(rows, { x: "value", y: "label", text: d => signed(d.value), dx: side * 4, textAnchor: side > 0 ? "start" : "end", filter, fill: "currentColor" });
  return chart({
    height: 18 * rows.length + 34, marginLeft: 92, x: { label: null, grid: true, domain }, y: { label: null },
    marks: [
      Plot.barX(rows, { x: "value", y: "label", fill: d => d.value < 0 ? "var(--below)" : "var(--above)", sort: { y: null } }),
      Plot.ruleX([0]), said(1, d => d.value >= 0), said(-1, d => d.value < 0),
    ],
  });
}

if (lens) exploreLens();
if (data.flow) drawFlow(place("section", "flow"));

function exploreLens() {
const n_layers = lens.labels.length, frozen = lens.linearize === "detached";
const at = (values, l) => values[l][state.order][state.prompt], sink = p => data.sinks?.[state.prompt][p];
const real = b => d3.range(data.tokens[b].length).filter(p => lens.alpha[0][0][b][p] !== null);  // no padding
const position = p => (Array.isArray(data.positions[0]) ? data.positions[state.prompt] : data.positions)[p];
const mostRank = lens.target_ranks ? d3.max(lens.target_ranks.flat(4)) : 0;
const orderName = k => frozen ? "detached" : lens.orders[k] === 0 ? "order 0 (logit lens)" : `order ${lens.orders[k]}`;

// What colors a cell: a strength in 0..1, its hue, and the words of the legend; and what is drawn by layer.
const COLORS = {
  rank: {
    name: "rank of the answer",
    legend: `bluer: the answer ranks higher, on a logarithmic scale of ${(mostRank + 1).toLocaleString("en")} tokens`,
    of: (l, p) => [1 - Math.log1p(at(lens.target_ranks, l)[p][0]) / Math.log1p(mostRank || 1), "below"],
    lines: l => [["rank", at(lens.target_ranks, l)[state.pos][0]]],
    y: { type: "symlog", reverse: true, label: "rank (0: best)", tickFormat: ",d", ticks: [0, ...[1, 10, 100, 1000, 10000, 100000].filter(n => n <= mostRank)] },
  },
  control: {
    name: "KL against its control",
    legend: "blue: closer to the model than a random vector of the same length and angle; orange: farther; full color at a factor of 8",
    of: (l, p) => {
      const ratio = Math.log2((at(lens.measures.kl, l)[p] + 1e-6) / (at(lens.control.kl, l)[p] + 1e-6)) / 3;
      return [Math.min(1, Math.abs(ratio)), ratio > 0 ? "above" : "below"];
    },
    lines: l => [["KL", at(lens.measures.kl, l)[state.pos]], ["random vector", at(lens.control.kl, l)[state.pos]]], y: { label: "nats" },
  },
  borrowed: {
    name: "borrowed share",
    legend: "oranger: more of the cell is the model's own final stream, and not the layer's (order 0 borrows nothing)",
    of: (l, p) => [at(lens.borrowed_share, l)[p] ?? 0, "above"],
    lines: l => [["share", at(lens.borrowed_share, l)[state.pos] ?? 0]], y: { label: "share", domain: [0, 1] },
  },
};
if (!lens.target_ranks) delete COLORS.rank;
state.color = Object.keys(COLORS)[0];

const about = place("p", "about"), controls = place("div", "controls"), both = place("div", "both"), legend = element("span");
const grid = element("table", [], { class: "grid", role: "grid", "aria-label": "Best token of every layer (rows) at every token (columns)" });
const box = element("div", grid, { class: "scroll" }), panel = element("section", [], { class: "panel", "aria-live": "polite" });
both.append(box, panel);
controls.append(element("label", ["order ", select(lens.orders.map((_, k) => [k, orderName(k)]), 0, k => { state.order = Number(k); redraw(); })]));
controls.lastChild.lastChild.className = "order";
controls.append(element("label", ["color ", select(Object.entries(COLORS).map(([key, color]) => [key, color.name]), state.color, key => { state.color = key; redraw(); })]));
controls.lastChild.lastChild.className = "color";
if (data.tokens.length > 1) controls.append(element("label", ["prompt ", select(data.tokens.map((_, b) => [b, b + 1]), 0, b => { state.prompt = Number(b); start(); })]));
controls.append(legend);

function drawGrid() {
  const color = COLORS[state.color], columns = real(state.prompt), head = element("tr", element("th", "layer", { scope: "col" })), body = element("tbody");
  for (const p of columns) head.append(element("th", token(data.tokens[state.prompt][p]), { scope: "col", title: `position ${position(p)}` }));
  lens.labels.forEach((label, l) => {
    const row = element("tr", element("th", label, { scope: "row" }));
    for (const p of columns) {
      const borrowed = at(lens.borrowed, l)[p], [strength, hue] = color.of(l, p);
      const cell = element("td", marked(at(lens.top_tokens, l)[p], borrowed), { role: "gridcell", tabindex: -1 });
      if (borrowed) cell.classList.add("borrowed");
      cell.classList.add(sink(p) ? "sink" : hue); cell.style.setProperty("--v", Math.max(0, strength).toFixed(3));
      cell.dataset.layer = l; cell.dataset.pos = p;
      row.append(cell);
    }
    body.append(row);
  });
  grid.replaceChildren(element("thead", head), body);
  legend.textContent = color.legend + "; [in brackets]: borrowed from the model's answer; hatched: an attention sink";
}
function choose(l, p, focus) {
  for (const old of grid.querySelectorAll('td[aria-selected="true"]')) { old.removeAttribute("aria-selected"); old.tabIndex = -1; }
  state.layer = l; state.pos = p;
  const cell = grid.querySelector(`td[data-layer="${l}"][data-pos="${p}"]`);
  cell.setAttribute("aria-selected", "true"); cell.tabIndex = 0;
  if (focus) { cell.focus(); cell.scrollIntoView({ block: "nearest", inline: "nearest" }); }
  else {  // the page does not move, the grid may
    if (cell.offsetTop < box.scrollTop || cell.offsetTop + cell.offsetHeight > box.scrollTop + box.clientHeight) box.scrollTop = cell.offsetTop - box.clientHeight / 2;
    if (cell.offsetLeft < box.scrollLeft || cell.offsetLeft + cell.offsetWidth > box.scrollLeft + box.clientWidth) box.scrollLeft = cell.offsetLeft - box.clientWidth / 2;
  }
  drawPanel();
}
function drawPanel() {
  const { layer: l, order: k, prompt: b, pos: p } = state, isFinal = lens.labels[l] === "final_post";
  const cell = values => at(values, l)[p], beside = name => isFinal ? "-" : number(cell(lens.control[name]));
  const parts = [element("h2", [`${lens.labels[l]}, ${orderName(k)}, after `, token(data.tokens[b][p]), ` (position ${position(p)})`])];
  parts.push(element("p", ["The model says ", element("b", token(data.answer[b][p])), sink(p) ? "; an attention sink, left out of averages" : ""]));
  const own = lens.orders[k] > 0;  // of order 0 everything is the layer's own
  parts.push(table(["best tokens", data.unit, ...(own ? ["own part"] : [])], cell(lens.top_tokens).map((text, i) =>
    [words(token(text)), number(cell(lens.full_values)[i]), ...(own ? [number(cell(lens.own_values)[i])] : [])])));
  parts.push(table(["", "cell", "random vector"], [
    ...Object.entries(NAMES).map(([name, said]) => [words(said), number(cell(lens.measures[name])), beside(name)]),
    ...(lens.target_ranks ? lens.targets[b][p].map((text, t) =>
      [words("rank (0: best) of ", token(text)), cell(lens.target_ranks)[t].toLocaleString("en"), words("")]) : []),
    ...(frozen ? [] : [
      [words("borrowed share"), number(cell(lens.borrowed_share)), words("")],
      [words("alpha, beta (own stream, the model's)"), number(cell(lens.alpha)), number(cell(lens.beta))],
      [words("rho (the series converges below 1)"), number(lens.rho[l][b][p]), words("")],
    ]),
  ]));
  const color = COLORS[state.color], lines = lens.labels.flatMap((_, i) => color.lines(i).map(([kind, value]) => ({ layer: i, kind, value })));
  const kinds = [...new Set(lines.map(d => d.kind))], stroke = d => d.kind === kinds[0] ? "var(--focus)" : "var(--dim)";
  const title = state.color === "rank" ? ["Rank of ", token(lens.targets[b][p][0]), " by layer, 0 is the best"] : [`${color.name} by layer`, kinds.length > 1 ? `; grey: ${kinds[1]}` : ""];
  parts.push(element("h3", title), chart({
    height: 170, marginLeft: 48, ariaLabel: `${color.name} by layer`,
    x: { label: "layer", ticks: d3.range(0, n_layers, Math.ceil(n_layers / 8)), tickFormat: i => lens.labels[i].split("_")[0] },
    y: { domain: [0, Math.max(state.color === "rank" ? 10 : 0, d3.max(lines, d => d.value))], ticks: 4, grid: true, ...color.y },
    marks: [Plot.line(lines, { x: "layer", y: "value", z: "kind", stroke }), Plot.dot(lines, { x: "layer", y: "value", fill: stroke, r: 4, filter: d => d.layer === l })],
  }));
  parts.push(...jointParts(b, p));
  const found = data.bigrams?.rows[b]?.[p] || [];
  if (found.length) {
    parts.push(element("h3", ["What ", element("span", data.bigrams.path, { class: "mono" }), " alone says after ", token(data.tokens[b][p]), ", from weights, without this prompt"]));
    parts.push(table(["token", data.bigrams.score], found.map(([text, score]) => [words(token(text)), number(score)])));
  }
  if (data.bigrams?.left_out) parts.push(element("p", `Bi-grams are left out: ${data.bigrams.left_out}`));
  panel.replaceChildren(...parts);
}
// Effects of a detached lens, else weights.
function jointParts(b, p) {
  const exact = joint.linearize === "detached", targets = joint.targets[b][p];
  const values = joint.labels.map((label, i) => ({ label, all: exact ? joint.effects[i][b][p] : [joint.weights[i][b][p]], best: joint.center_top_tokens[i][b][p] }));
  const largest = d3.sort(values, d => -Math.abs(d.all[0])).slice(0, BARS), sums = values[0].all.map((_, t) => d3.sum(values, d => d.all[t]));
  const kl = name => number(joint[name].kl[b][p]);
  const total = words(...marked(joint.top_tokens[b][p], joint.borrowed[b][p]), ` KL ${kl("measures")} (control ${kl("control")})`,
    exact ? "" : `; uniform weights ${kl("uniform")} (control ${kl("control_uniform")})`);
  const whole = element("details", [element("summary", `all ${values.length} components, with their own best tokens`), element("div", table(
    ["component", ...(exact ? targets.map(text => words("effect on ", token(text))) : ["weight"]), "its own best tokens"],
    [...values.map(d => [element("span", d.label, { class: "mono" }), ...d.all.map(exact ? signed : x => x.toFixed(3)), words(...d.best.flatMap(text => [token(text), " "]))]),
      [words("sum"), ...sums.map(exact ? signed : x => x.toFixed(3)), total]]), { class: "scroll" })], { class: "joint" });
  whole.open = state.whole;
  whole.addEventListener("toggle", () => { state.whole = whole.open; });
  return [
    element("h3", exact ? ["What components add to ", token(targets[0]), `, exactly (centered: ${data.unit}, less the mean of the vocabulary)`]
      : `Weights of components in the joint jet lens, order ${joint.order} (${joint.objective})`),
    bars(largest.map(d => ({ label: d.label, value: d.all[0] }))),
    element("p", `the ${largest.length} largest of ${values.length}; all add up to ${signed(sums[0])}`), whole,
  ];
}
function redraw() { drawGrid(); choose(state.layer, state.pos, false); }
function start() {
  const columns = real(state.prompt), wanted = state.prompt === 0 && columns.includes(data.shown) ? data.shown : columns[columns.length - 1];
  state.layer = n_layers - 1; state.pos = wanted;
  about.textContent = [data.model, `tl-jets ${data.tl_jets}`, ...(lens.center_scale === "none" ? [] : [`center_scale ${lens.center_scale}`]),
    `${n_layers} streams x ${columns.length} tokens; click a cell, or move with the arrow keys`].filter(text => text).join("; ");
  redraw();
}
grid.addEventListener("click", event => {
  const cell = event.target.closest("td");
  if (cell) choose(Number(cell.dataset.layer), Number(cell.dataset.pos), true);
});
const MOVES = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1],
  Home: [0, -Infinity], End: [0, Infinity], PageUp: [-Infinity, 0], PageDown: [Infinity, 0] };
grid.addEventListener("keydown", event => {
  if (!(event.key in MOVES)) return;
  event.preventDefault();
  const columns = real(state.prompt), within = (value, n) => Math.min(Math.max(value, 0), n - 1), [down, right] = MOVES[event.key];
  choose(within(state.layer + down, n_layers), columns[within(columns.indexOf(state.pos) + right, columns.length)], true);
});
start();
}

// A component's layer and row in the chart of flows.
function placeOf(label) {
  const number = label.match(/(\d+)/);
  if (label === "ln_final") return { layer: null, kind: "answer" };
  const kind = /mlp|N\d/.test(label) ? "MLP" : /attn|H\d/.test(label) ? "attention" : "other";
  return { layer: number ? Number(number[1]) : 0, kind };
}
function drawFlow(section) {
  const flow = data.flow, own = flow.effects[state.effect], parts = lens ? [element("h2", "What the intervention does, and through which components")] : [];
  if (flow.effects.length > 1) {
    const choices = flow.effects.map((e, i) => [i, `position ${e.position}, ${e.target}`]);
    parts.push(element("label", ["target ", select(choices, state.effect, i => { state.effect = Number(i); drawFlow(section); })]));
  }
  const gap = `gap ${number(100 * own.gap)}% of the effect`, open = `OPEN: ${gap}; these flows explain nothing`;
  parts.push(element("p", [`${flow.measure}, target ${own.target}: ${signed(own.effect)} ${flow.unit}; `, own.closed ? gap : element("span", open, { class: "open" })]));
  const rows = flow.labels.map((label, i) => ({ label, ...placeOf(label), flow: own.flow[i], edit: own.edit[i], direct: own.direct[i] }));
  const [first, last] = d3.extent(rows, d => d.layer), kinds = ["attention", "MLP", "other"].filter(kind => rows.some(d => d.kind === kind));
  const edges = (own.edges || []).map(([writer, reader, flow]) => {
    const from = placeOf(writer), to = placeOf(reader);
    return { writer, reader, flow, x1: from.layer, y1: from.kind, x2: to.layer ?? last + 1, y2: to.kind };
  });
  const widest = d3.max(edges, d => Math.abs(d.flow)) || 1, hue = d => d.flow < 0 ? "var(--below)" : "var(--above)";
  parts.push(element("h3", "Flow through every component: from where the intervention writes (left) to the answer (right)"));
  parts.push(chart({
    width: Math.max(420, Math.min(1100, root.clientWidth - 4)), height: edges.length ? 300 : 200, marginLeft: 70,
    ariaLabel: "Flow through every component by layer",
    x: { label: "layer", domain: [first - 0.5, last + 1.5], ticks: d3.range(first, last + 1, Math.ceil((last + 1 - first) / 16)), tickFormat: "d" },
    y: { label: null, type: "point", domain: edges.length ? ["answer", ...kinds] : kinds }, r: { range: [0, 22] },
    marks: [
      Plot.arrow(edges, { x1: "x1", y1: "y1", x2: "x2", y2: "y2", bend: true, insetStart: 4, insetEnd: 6, headLength: 5, strokeOpacity: 0.6,
        stroke: hue, strokeWidth: d => 0.4 + 5 * Math.abs(d.flow) / widest, title: d => `${d.writer} to ${d.reader}: ${signed(d.flow)}` }),
      Plot.dot(rows, { x: "layer", y: "kind", r: d => Math.abs(d.flow), fill: hue, stroke: d => d.edit !== 0 ? "currentColor" : "none", strokeWidth: 1.5,
        title: d => `${d.label}: flow ${signed(d.flow)}, of it straight to the answer ${signed(d.direct)}, from the intervention here ${signed(d.edit)}` }),
    ],
  }));
  parts.push(element("p", "orange raises the target, blue lowers it; area is size; outlined: the intervention itself writes there. Components in series carry the same effect one after another." +
    (edges.length ? ` The ${edges.length} largest edges are drawn; their width is their flow.` : "")));
  const largest = d3.sort(rows, d => -Math.abs(d.flow)).slice(0, BARS);
  if (lens) parts.push(element("div", table(["component", "flow", "share", "straight to the answer", "from the intervention"],
    largest.map(d => [element("span", d.label, { class: "mono" }), signed(d.flow), `${Math.round(100 * d.flow / own.effect)}%`, signed(d.direct), signed(d.edit)])), { class: "scroll" }));
  section.replaceChildren(...parts);
}
}
