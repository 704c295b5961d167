"use strict";
// What the page shows is in the element "data"; all of it is written as text, never as HTML.

const data = JSON.parse(document.getElementById("data").textContent);
const experiments = data.experiments;
const KINDS = {
  exact: ["E", "exact: computes its map"],
  reuse: ["R", "reuse: takes an earlier layer's map"],
  lowrank: ["L", "lowrank: keys and values projected to fewer tokens"],
  span: ["S", "span: sees a neighbourhood"],
  none: ["–", "none: no attention"],
  linear: ["A", "linear: one affine map instead of the layer"],
  skip: ["×", "skip: no layer"],
};
const kindOf = (word) => KINDS[word] ?? [word[0].toUpperCase(), word]; // of a word of somebody's own
const NUM_COLOURS = 6;
const DASHES = ["", "7 3", "2 3", "10 3 2 3", "5 2 1 2 1 2", "14 4"];

// ---- elements

function filled(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}
const node = (tag, attributes = {}, ...children) => filled(document.createElement(tag), attributes, children);
const shape = (tag, attributes = {}, ...children) =>
  filled(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
const at = (id) => document.getElementById(id);

const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const short = (value) => compact.format(value);
const fixed = (digits) => (value) => value.toFixed(digits);
const clipped = (text, length) => (text.length > length ? `${text.slice(0, length - 1)}…` : text);
const counted = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;
const listed = (words) => (words.length < 2 ? words.join("") : `${words.slice(0, -1).join(", ")} and ${words.at(-1)}`);

const model = (experiment) => data.models[experiment.model];
const top1Text = (experiment) =>
  experiment.top1.toFixed(2) + (experiment.top1_sd === null ? "" : ` ± ${experiment.top1_sd.toFixed(2)}`);
const hasSeveralSets = new Set(experiments.map((experiment) => experiment.set)).size > 1;
const runsOf = (experiment) =>
  [counted(experiment.runs.length, "run"), hasSeveralSets && experiment.data, experiment.training].filter(Boolean).join(", ");

// ---- tooltips, and keys that go from mark to mark

let tipped = null; // the mark that the tooltip is about

function showTip(mark, lines) {
  tipped = mark;
  at("tip").replaceChildren(...lines.map((line) => node("div", {}, line)));
  at("tip").hidden = false;
  placeTip();
}
const hideTip = () => (at("tip").hidden = true);

function placeTip() {
  const tip = at("tip"), box = tipped.getBoundingClientRect();
  const left = box.left + box.width / 2 - tip.offsetWidth / 2;
  const above = box.top - tip.offsetHeight - 10;
  tip.style.left = `${Math.max(8, Math.min(left, document.documentElement.clientWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${above > 8 ? above : Math.min(box.bottom + 10, innerHeight - tip.offsetHeight - 8)}px`;
}
function explained(mark, lines) {
  filled(mark, { class: `mark ${mark.getAttribute("class") ?? ""}`, role: "img", "aria-label": lines.join(", ") }, []);
  for (const event of ["pointerenter", "focus"]) mark.addEventListener(event, () => showTip(mark, lines));
  for (const event of ["pointerleave", "blur"]) mark.addEventListener(event, hideTip);
  return mark;
}

// One stop for Tab per chart; arrows, Home and End go on from there. Marks are in reading order, `columns` in a row.
function reachable(marks, columns = 1) {
  marks.forEach((mark, i) => {
    mark.setAttribute("tabindex", i ? -1 : 0);
    mark.addEventListener("keydown", (event) => {
      const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns };
      const to = { Home: 0, End: marks.length - 1 }[event.key] ?? i + (steps[event.key] ?? NaN);
      if (!marks[to]) return;
      event.preventDefault();
      mark.setAttribute("tabindex", -1);
      marks[to].setAttribute("tabindex", 0);
      marks[to].focus();
    });
  });
}

// ---- figures

function table(heads, rows) {
  const isWords = (value) => value instanceof Node || (typeof value === "string" && !/^[-\d]/.test(value));
  const words = (i) => (rows.some((row) => isWords(row[i])) ? "words" : null);
  const head = node("tr", {}, ...heads.map((text, i) => node("th", { scope: "col", class: words(i) }, text)));
  const body = rows.map((row) => {
    const cells = row.slice(1).map((value, i) => node("td", { class: words(i + 1) }, value ?? "–"));
    return node("tr", {}, node("th", { scope: "row" }, node("span", { class: "clip" }, row[0])), ...cells);
  });
  return node("table", {}, node("thead", {}, head), node("tbody", {}, ...body));
}

function scrolling(label, content) {
  return node("div", { class: "scroll", role: "region", tabindex: 0, "aria-label": label }, content);
}

// A chart with its title, drawn again as wide as its place whenever that changes, and the same numbers as a table.
function figure(title, text, draw, heads, rows, legend = null) {
  const canvas = node("div"), caption = node("figcaption", {}, node("h3", {}, title), node("p", {}, text));
  const details = node("details", {}, node("summary", {}, "As a table"), scrolling(title, table(heads, rows)));
  let drawn = 0;
  new ResizeObserver(() => {
    const width = Math.floor(canvas.clientWidth);
    if (!width || width === drawn) return;
    drawn = width;
    const svg = draw(width);
    svg.prepend(shape("title", {}, title), shape("desc", {}, text));
    filled(svg, { role: "group", "aria-label": title }, []);
    canvas.replaceChildren(svg);
  }).observe(canvas);
  return node("figure", {}, caption, canvas, legend, details);
}

function placed(from, to, start, end) {
  return (value) => start + ((value - from) / (to - from || 1)) * (end - start);
}

function ticks(from, to, count) {
  const rough = (to - from || 1) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 2.5, 5, 10].find((factor) => factor * power >= rough) ?? 10);
  const first = Math.ceil(from / step - 1e-9);
  return Array.from({ length: Math.floor(to / step + 1e-9) - first + 1 }, (_, i) => (first + i) * step);
}

function padded(values, share) {
  const low = Math.min(...values), high = Math.max(...values), pad = (high - low || Math.abs(high) || 1) * share;
  return [low - pad, high + pad];
}

// Axes, with their grid and titles; returns what places values.
function axes(svg, width, height, x, y) {
  const left = 46, top = 24, right = 10, bottom = 40;
  const px = placed(...x.range, left, width - right), py = placed(...y.range, height - bottom, top);
  for (const value of ticks(...y.range, 5)) {
    svg.append(shape("line", { class: "gridline", x1: left, x2: width - right, y1: py(value), y2: py(value) }));
    svg.append(shape("text", { x: left - 8, y: py(value) + 4, "text-anchor": "end" }, y.format(value)));
  }
  for (const value of ticks(...x.range, width < 420 ? 4 : 6)) {
    svg.append(shape("text", { x: px(value), y: height - bottom + 18, "text-anchor": "middle" }, x.format(value)));
  }
  svg.append(shape("line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }));
  svg.append(shape("text", { x: width - right, y: height - 4, "text-anchor": "end" }, x.title));
  svg.append(shape("text", { x: 2, y: 11 }, y.title));
  return { px, py, left, top, right: width - right, bottom: height - bottom };
}

const canvasOf = (width, height) => shape("svg", { width, height, viewBox: `0 0 ${width} ${height}` });
const path = (points, px, py) => "M" + points.map(([x, y]) => `${px(x).toFixed(1)} ${py(y).toFixed(1)}`).join("L");

// ---- plans

function letter(word, x, y) {
  return shape("text", { class: `letter on-${word}`, x, y }, kindOf(word)[0]);
}

// One cell a layer; an arc leads from each reuse layer to the layer whose map it takes.
function strip(layers, side = 18) {
  const farthest = Math.max(0, ...layers.map((layer, i) => (layer.anchor === null ? 0 : i - layer.anchor)));
  const top = farthest ? 5 + Math.min(14, 2.2 * farthest) : 1, middle = (i) => i * side + side / 2 + 1;
  const svg = canvasOf(layers.length * side + 2, top + side + 1);
  filled(svg, { class: "strip", role: "img", "aria-label": layers.map((layer) => layer.text).join(", ") }, []);
  layers.forEach((layer, i) => {
    svg.append(shape("rect", { class: `cell ${layer.word}`, x: i * side + 1, y: top, width: side - 2, height: side, rx: 2 }));
    svg.append(letter(layer.word, middle(i) - 1, top + side / 2 + 3.5));
    if (layer.anchor === null) return;
    const rise = top - 1 - Math.min(14, 2.2 * (i - layer.anchor)) * 1.3, from = middle(i) - 1, to = middle(layer.anchor) - 1;
    svg.append(shape("path", { class: "arc", d: `M${from} ${top - 1}C${from} ${rise} ${to} ${rise} ${to} ${top - 1}` }));
  });
  return svg;
}

function planCell(experiment) {
  const { layers, plan, name } = model(experiment);
  return node("div", { class: "plan" }, strip(layers), node("code", {}, plan ?? name));
}

function showKinds() {
  const words = new Set(experiments.flatMap((experiment) => model(experiment).layers.map((layer) => layer.word)));
  const known = Object.keys(KINDS).filter((word) => words.delete(word));
  for (const word of [...known, ...words]) {
    const swatch = strip([{ word, text: word, anchor: null }]);
    swatch.setAttribute("aria-hidden", true);
    at("kinds").append(node("li", {}, swatch, kindOf(word)[1]));
  }
}

// ---- header and table of runs

function showHeader() {
  const numRuns = experiments.reduce((sum, experiment) => sum + experiment.runs.length, 0);
  const labels = experiments.map((experiment) => experiment.label);
  at("title").textContent =
    labels.join("").length < 60 ? listed(labels) : `${counted(labels.length, "model")} compared`;
  const sets = [...new Map(experiments.map((e) => [e.set, `${e.data}, ${whole.format(e.n)} images`])).values()];
  const where = `${data.machine.device}, ${counted(data.machine.threads, "CPU thread")}`;
  const what = `${counted(labels.length, "model")}, ${counted(numRuns, "run")}, judged on ${listed(sets)}.`;
  at("lead").textContent = `${what} Built on ${data.machine.date} on ${where}.`;
  if (hasSeveralSets) {
    const text = "The runs are judged on different images: compare top-1 only between runs of the same set.";
    at("lead").after(node("p", { class: "note" }, text));
  }
}

const COLUMNS = [
  ["Model", (e) => e.label, (e) => node("span", { class: "clip" }, layersLink(e), node("small", {}, runsOf(e)))],
  ["Plan", (e) => model(e).plan ?? "", planCell],
  ["Top-1 (%)", (e) => e.top1, top1Text],
  ["MACs", (e) => model(e).macs, (e) => short(model(e).macs)],
  ["Parameters", (e) => model(e).params, (e) => short(model(e).params)],
  ["Images/s", (e) => model(e).images_per_second, (e) => speedCell(model(e))],
  ["Memory (MiB)", (e) => model(e).memory_mib, (e) => model(e).memory_mib.toFixed(1)],
].slice(0, data.speed ? 7 : 5);

function layersLink(experiment) {
  const link = node("a", { href: "#layers", title: `${experiment.label}, layer by layer` }, experiment.label);
  link.addEventListener("click", () => choose(experiments.indexOf(experiment)));
  return link;
}

function speedCell(found) {
  return node("span", {}, whole.format(found.images_per_second), " ",
    node("small", {}, `± ${(found.spread_percent / 2).toFixed(0)} %`));
}

function showRuns() {
  const rows = experiments.map((experiment) => {
    const [first, ...rest] = COLUMNS.map(([, , show]) => show(experiment));
    const cells = rest.map((cell, i) => node("td", { class: i ? null : "words" }, cell));
    return { experiment, row: node("tr", {}, node("th", { scope: "row" }, first), ...cells) };
  });
  const body = node("tbody", {}, ...rows.map(({ row }) => row));
  const heads = COLUMNS.map(([title, value], i) => {
    const button = node("button", { type: "button" }, title);
    const head = node("th", { scope: "col", "aria-sort": "none", class: i === 1 ? "words" : null }, button);
    button.addEventListener("click", () => {
      const wasDescending = head.getAttribute("aria-sort") === "descending";
      const order = wasDescending || (i < 2 && head.getAttribute("aria-sort") === "none") ? 1 : -1;
      for (const other of heads) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", order > 0 ? "ascending" : "descending");
      const compared = (a, b) => (typeof a === "string" ? a.localeCompare(b) : a - b);
      rows.sort((a, b) => order * compared(value(a.experiment), value(b.experiment)));
      body.append(...rows.map(({ row }) => row));
    });
    return head;
  });
  at("table").append(scrolling("Runs", node("table", {}, node("thead", {}, node("tr", {}, ...heads)), body)));
  at("table").append(node("p", { class: "text" }, runsText()));
}

function runsText() {
  const several = experiments.some((experiment) => experiment.top1_sd !== null);
  const spread = several ? "Top-1 is the mean over seeds ± one sample standard deviation. " : "";
  const speed = data.speed
    ? `Speed: inference in float32, batches of ${data.speed.batch_size}, the median of ${data.speed.repeats} calls that ` +
      "all models took in turns, ± half the interquartile range; memory is the peak of tensors in one such call. "
    : "Speed and memory were not measured (--no-speed). ";
  const alone = experiments.reduce((sum, experiment) => sum + experiment.num_cards_alone, 0);
  const cards = alone ? `Of ${counted(alone, "run")} only the card was given: without training curves and similarity.` : "";
  return spread + "MACs are the products that run, per image. " + speed + cards;
}

// ---- fronts

function onFront(points, better) {
  const ordered = [...points].sort((a, b) => better * (b.x - a.x) || b.y - a.y);
  let best = -Infinity;
  return ordered.filter((point) => point.y > best && ((best = point.y), true));
}

function scatter(title, axis, better, value, format) {
  const points = experiments.map((e) => ({ e, x: value(model(e)), y: e.top1, sd: e.top1_sd ?? 0 }));
  const front = onFront(points, better);
  const direction = better > 0 ? "right" : "left";
  const text = `Better is up and to the ${direction}. Front: ${listed(front.map((point) => point.e.label))}.`;
  const rows = points.map((point) => [point.e.label, format(point.x), top1Text(point.e), front.includes(point) ? "yes" : "no"]);
  const draw = (width) => drawScatter(width, points, front, axis, format);
  return figure(title, text, draw, ["Model", axis, "Top-1 (%)", "On the front"], rows);
}

function drawScatter(width, points, front, title, format) {
  const height = 290, svg = canvasOf(width, height);
  const y = { range: padded(points.flatMap(({ y, sd }) => [y - sd, y + sd]), 0.12), format: tickText, title: "top-1 (%)" };
  const x = { range: padded(points.map((point) => point.x), 0.16), format: short, title };
  const frame = axes(svg, width, height, x, y), { px, py } = frame;
  svg.append(shape("path", { class: "front", d: path(front.map(({ x, y }) => [x, y]), px, py) }));
  const marks = [...points].sort((a, b) => a.x - b.x).map((point) => {
    const [cx, cy] = [px(point.x), py(point.y)];
    const mark = shape("g", { class: front.includes(point) ? "" : "beaten" },
      shape("circle", { class: "focus-ring", cx, cy, r: 10 }),
      point.sd ? shape("line", { class: "whisker", x1: cx, x2: cx, y1: py(point.y - point.sd), y2: py(point.y + point.sd) }) : null,
      shape("circle", { cx, cy, r: 12, fill: "transparent" }), shape("circle", { class: "point", cx, cy, r: 5 }));
    svg.append(explained(mark, [point.e.label, `top-1 ${top1Text(point.e)} %`, `${title} ${format(point.x)}`]));
    return mark;
  });
  reachable(marks);
  nameThem(svg, points, front, frame);
  return svg;
}

const tickText = (value) => String(Number(value.toFixed(3)));

// Names the points where there is room beside them, those of the front first.
function nameThem(svg, points, front, { px, py, left, right, top, bottom }) {
  const taken = points.map((point) => [px(point.x) - 7, py(point.y) - 7, px(point.x) + 7, py(point.y) + 7]);
  const ordered = [...front, ...points.filter((point) => !front.includes(point))];
  for (const point of ordered) {
    const text = clipped(point.e.label, 18), wide = text.length * 6.8, [x, y] = [px(point.x), py(point.y)];
    const places = [[x + 9, y + 4], [x - 9 - wide, y + 4], [x - wide / 2, y - 11], [x - wide / 2, y + 19]];
    const free = places.map(([a, b]) => [a, b - 11, a + wide, b + 3]).find(([x1, y1, x2, y2]) =>
      x1 > left && x2 < right && y1 > top && y2 < bottom &&
      taken.every(([a, b, c, d]) => x2 < a || x1 > c || y2 < b || y1 > d));
    if (!free) continue;
    taken.push([free[0] - 6, free[1], free[2] + 6, free[3]]); // names in a row are told apart
    const label = shape("text", { class: "name", x: free[0], y: free[3] - 3, "aria-hidden": true }, text);
    svg.append(front.includes(point) ? label : shape("g", { class: "beaten" }, label));
  }
}

function showFronts() {
  const made = [scatter("Top-1 against MACs", "MACs per image", -1, (found) => found.macs, short)];
  if (data.speed) {
    made.unshift(scatter("Top-1 against speed", "images/s", 1, (found) => found.images_per_second, whole.format));
    made.push(scatter("Top-1 against memory", "peak memory (MiB)", -1, (found) => found.memory_mib, fixed(1)));
  }
  at("scatters").append(...made);
}

// ---- one model, layer by layer

function bars(title, text, layers, amounts, unit, format) {
  const rows = layers.map((layer, i) => [`${i} ${layer.text}`, format(amounts.attention[i]), format(amounts.mlp[i])]);
  const legend = node("p", { class: "legend" }, "Coloured, below: attention, or a linear layer. Grey, above: MLP.");
  const draw = (width) => drawBars(width, layers, amounts, unit, format);
  return figure(title, text, draw, ["Layer", `Attention (${unit})`, `MLP (${unit})`], rows, legend);
}

function drawBars(width, layers, amounts, unit, format) {
  const height = 270, svg = canvasOf(width, height), { attention, mlp } = amounts;
  const high = Math.max(...layers.map((_, i) => attention[i] + mlp[i])) * 1.05;
  const frame = axes(svg, width, height, { range: [0, layers.length], format: () => "", title: "layer" },
    { range: [0, high], format: tickUnit(high), title: unit });
  const { px, py } = frame, step = px(1) - px(0), thick = Math.min(40, step * 0.72), cell = Math.min(18, step * 0.9);
  const marks = layers.map((layer, i) => {
    const x = px(i + 0.5), bar = (name, from, to) => shape("rect",
      { class: name, x: x - thick / 2, width: thick, y: py(to), height: Math.max(0, py(from) - py(to)) });
    const mark = shape("g", {}, shape("rect", { fill: "transparent", x: px(i), width: step, y: frame.top, height: frame.bottom - frame.top }),
      bar(`cell ${layer.word}`, 0, attention[i]), bar("half", attention[i], attention[i] + mlp[i]),
      shape("rect", { class: "focus-ring", x: x - thick / 2 - 3, width: thick + 6, y: py(attention[i] + mlp[i]) - 3,
        height: py(0) - py(attention[i] + mlp[i]) + 6 }));
    svg.append(explained(mark, [`layer ${i}: ${layer.text}`, `attention ${format(attention[i])} ${unit}`, `MLP ${format(mlp[i])} ${unit}`]));
    svg.append(shape("rect", { class: `cell ${layer.word}`, x: x - cell / 2, y: frame.bottom + 5, width: cell, height: 15, rx: 2 }));
    if (cell > 8) svg.append(letter(layer.word, x, frame.bottom + 16));
    return mark;
  });
  reachable(marks);
  return svg;
}

const tickUnit = (high) => (value) => (high > 1000 ? short(value) : tickText(value));

// Of two layers each, how alike their maps are: 1 where one reuses the other's.
function heat(layers, found) {
  const text = `1 − mean total variation between the rows of two layers' maps, head by head, over ` +
    `${data.similarity_images} validation images${found.seed === null ? "" : `; seed ${found.seed}`}. The stronger the colour, the more alike.`;
  const heads = ["Layer", ...layers.map((_, i) => String(i))];
  const rows = found.rows.map((row, i) => [`${i} ${layers[i].text}`, ...row.map((value) => value?.toFixed(3) ?? null)]);
  return figure("Similarity of attention maps", text, (width) => drawHeat(width, layers, found.rows), heads, rows);
}

function drawHeat(width, layers, rows) {
  const edge = 24, side = Math.min(46, Math.floor((width - edge - 2) / layers.length)), size = edge + side * layers.length + 2;
  const svg = canvasOf(size, size), marks = [];
  layers.forEach((layer, i) => {
    for (const [x, y] of [[edge + side * i, 0], [0, edge + side * i]]) {
      const [w, h] = y ? [18, side - 2] : [side - 2, 18];
      svg.append(shape("rect", { class: `cell ${layer.word}`, x: x + 1, y: y + 1, width: w, height: h, rx: 2 }));
      if (side > 11) svg.append(letter(layer.word, x + 1 + w / 2, y + 1 + h / 2 + 3.5));
    }
  });
  rows.forEach((row, i) => row.forEach((value, j) => {
    const [x, y] = [edge + side * j, edge + side * i];
    const cell = shape("rect", { x: x + 0.5, y: y + 0.5, width: side - 1, height: side - 1 });
    cell.style.fill = value === null ? "var(--raised)" : `color-mix(in oklab, var(--heat) ${100 * value}%, var(--paper))`;
    const label = side >= 30 ? shape("text", { x: x + side / 2, y: y + side / 2 + 4, "text-anchor": "middle" }, value?.toFixed(2) ?? "–") : null;
    // the thresholds at which black and white stand out alike, 4.5 to 1
    if (label) label.style.fill = `light-dark(${value > 0.755 ? "#fff" : "#000"}, ${value > 0.595 ? "#000" : "#fff"})`;
    const ring = shape("rect", { class: "focus-ring", x: x + 1, y: y + 1, width: side - 2, height: side - 2 });
    const said = value === null ? "their columns are not the same keys" : `similarity ${value.toFixed(3)}`;
    marks.push(explained(shape("g", {}, cell, label, ring), [`layers ${i} and ${j}`, said, `${layers[i].text}, ${layers[j].text}`]));
  }));
  svg.append(...marks);
  reachable(marks, layers.length);
  return svg;
}

function choose(number) {
  const experiment = experiments[number], found = model(experiment), { layers } = found;
  at("chosen").value = number;
  at("chosen-plan").replaceChildren(planCell(experiment));
  const rest = (amounts, unit) => `Embedding, head and what runs between the parts, not shown: ${short(amounts.rest)} ${unit}.`;
  const made = [bars("MACs", `Products that run, per image. ${rest(found.layer_macs, "MACs")}`, layers, found.layer_macs, "MACs", short)];
  if (data.speed) {
    const text = `Operations alone, mean of ${counted(data.speed.profile_repeats, "call")} on ${data.speed.batch_size} images. ${rest(found.ms, "ms")}`;
    made.push(bars("Time", text, layers, found.ms, "ms", fixed(3)));
  }
  const { similarity } = experiment;
  made.push(similarity.rows ? heat(layers, similarity)
    : node("figure", {}, node("figcaption", {}, node("h3", {}, "Similarity of attention maps"), node("p", {}, similarity.reason))));
  at("breakdown").replaceChildren(...made);
}

function showLayers() {
  at("chosen").append(...experiments.map((experiment, i) => node("option", { value: i }, experiment.label)));
  at("chosen").addEventListener("change", () => choose(Number(at("chosen").value)));
  choose(0);
}

// ---- training

const colour = (i) => (i < NUM_COLOURS ? `var(--s${i})` : "var(--other)");
const meanLine = (curve) => curve.mean ?? curve.seeds[0].points;

function lines(title, name, digits) {
  const shown = experiments.filter((experiment) => experiment.curves?.[name])
    .map((experiment, i) => ({ label: experiment.label, curve: experiment.curves[name], i }));
  const legend = node("ul", { class: "legend" }, ...shown.slice(0, NUM_COLOURS).map(({ label, i }) => {
    const sample = shape("line", { class: "line", x1: 0, x2: 30, y1: 5, y2: 5, "stroke-dasharray": DASHES[i] });
    sample.style.stroke = colour(i);
    return node("li", {}, shape("svg", { width: 30, height: 10, "aria-hidden": true }, sample), label);
  }));
  if (shown.length > NUM_COLOURS) legend.append(node("li", {}, `grey: ${shown.length - NUM_COLOURS} more, point at them`));
  const shares = [0.25, 0.5, 0.75, 1];
  const rows = shown.map(({ label, curve }) => {
    const line = meanLine(curve);
    return [label, ...shares.map((share) => line[Math.max(0, Math.ceil(share * line.length) - 1)][1].toFixed(digits))];
  });
  const heads = ["Model", ...shares.map((share) => `at ${100 * share} %`)];
  return figure(title, "Thick: mean over seeds. Thin: each seed.", (width) => drawLines(width, shown, digits, name), heads, rows, legend);
}

function drawLines(width, shown, digits, name) {
  const height = 300, svg = canvasOf(width, height);
  const all = shown.flatMap(({ curve }) => [...curve.seeds.map((seed) => seed.points), meanLine(curve)].flat());
  const y = { range: padded(all.map((point) => point[1]), 0.04), format: tickText, title: name === "loss" ? "loss" : "top-1 (%)" };
  const x = { range: [0, Math.max(...all.map((point) => point[0]))], format: tickText, title: "epoch" };
  const { px, py } = axes(svg, width, height, x, y);
  const marks = shown.map(({ label, curve, i }) => {
    const mean = meanLine(curve), d = path(mean, px, py), [, last] = mean.at(-1);
    const thin = curve.mean ? curve.seeds.map(({ points }) => shape("path", { class: "seed", d: path(points, px, py) })) : [];
    const thick = shape("path", { class: "line", d, "stroke-dasharray": DASHES[i] ?? "" });
    for (const line of [...thin, thick]) line.style.stroke = colour(i);
    const mark = shape("g", { class: "series" }, ...thin, thick, shape("path", { class: "touch", d }));
    mark.addEventListener("pointerenter", () => mark.classList.add("near"));
    mark.addEventListener("pointerleave", () => mark.classList.remove("near"));
    return explained(mark, [label, `${y.title} ${last.toFixed(digits)} at the end`, counted(curve.seeds.length, "seed")]);
  });
  svg.append(...[...marks].reverse());
  reachable(marks);
  return svg;
}

function showTraining() {
  const known = (name) => experiments.some((experiment) => experiment.curves?.[name]);
  const made = [["Training loss", "loss", 3], ["Top-1 of the validation set", "top1", 2]].filter(([, name]) => known(name));
  at("curves").append(...made.map((what) => lines(...what)));
  at("training-text").textContent = made.length
    ? "Loss as recorded during training, with its augmentation and smoothing: comparable between models of one recipe. " +
      "Long curves are shortened by taking means."
    : "Only cards were given: the curves are in the run folders.";
}

// ---- what it was made on

function showMachine() {
  const { machine } = data;
  const facts = {
    "Measured on": machine.device, "CPU threads": machine.threads, Python: machine.python, torch: machine.torch,
    timm: machine.timm, Date: machine.date,
  };
  for (const [name, value] of Object.entries(facts)) {
    at("machine").append(node("dt", {}, name), node("dd", {}, String(value)));
  }
  const heads = ["Run", "Seed", "Top-1 (%)", "Trained on", "Ranks", "torch", "Commit", "Minutes", "Command"];
  const rows = experiments.flatMap((experiment) => experiment.runs.map(({ seed, top1, facts }) => [
    experiment.label, seed === null ? null : String(seed), top1.toFixed(2), facts.hardware?.device ?? null,
    String(facts.hardware?.num_ranks ?? "–"), facts.versions?.torch ?? null, facts.git_commit?.replace(/^(.{10})[0-9a-f]*/, "$1") ?? null,
    facts.seconds ? (facts.seconds / 60).toFixed(1) : null, facts.command ? node("code", {}, facts.command) : null,
  ]));
  at("made-table").append(scrolling("How the runs were made", table(heads, rows)),
    node("p", { class: "text" }, "This page is made again by"), scrolling("Command", node("pre", {}, data.command)));
}

// ---- light and dark

function showTheme() {
  const root = document.documentElement, button = at("theme");
  const isDark = () => (root.style.colorScheme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const named = () => (button.textContent = isDark() ? "Light" : "Dark");
  button.addEventListener("click", () => { root.style.colorScheme = isDark() ? "light" : "dark"; named(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", named);
  named();
}

addEventListener("keydown", (event) => event.key === "Escape" && hideTip());
addEventListener("scroll", () => tipped && (tipped === document.activeElement ? placeTip() : hideTip()), { passive: true });
for (const show of [showTheme, showHeader, showKinds, showRuns, showFronts, showLayers, showTraining, showMachine]) show();
