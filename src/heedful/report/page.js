"use strict";
/* Everything on the page but the text: theme, maps, the card of a head, curves and tables. */
const $ = (id) => document.getElementById(id);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const page = { ...JSON.parse($("data").textContent), head: null, drawn: new Map(), listeners: [] };

/* ---------- small things ---------- */
const ARRAYS = { f4: Float32Array, f8: Float64Array, i1: Int8Array, u1: Uint8Array, i2: Int16Array, u2: Uint16Array, i4: Int32Array, u4: Uint32Array };

function bytes(base64) {
  const text = atob(base64);
  const out = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) out[i] = text.charCodeAt(i);
  return out;
}

async function unzip(id) {
  const stream = new Blob([bytes($(id).textContent)]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

/* plotly.py writes arrays as base64: read them once, a matrix as a list of rows */
function plain(x) {
  if (x === null || typeof x !== "object") return x;
  if (x.bdata === undefined) {
    for (const name in x) x[name] = plain(x[name]);
    return x;
  }
  const flat = new ARRAYS[x.dtype](bytes(x.bdata).buffer);
  if (!x.shape) return flat;
  const [rows, columns] = String(x.shape).split(",").map(Number);
  return Array.from({ length: rows }, (_, i) => flat.subarray(i * columns, (i + 1) * columns));
}

function el(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.filter((c) => c !== null && c !== undefined));
  return made;
}

function written(value, unit) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (unit === "share") {
    const percent = value * 100, size = Math.abs(percent);
    return size > 0 && size < 0.01 ? `${percent < 0 ? "−" : ""}<0.01%` : `${percent.toFixed(size >= 9.95 || size === 0 ? 0 : size >= 0.095 ? 1 : 2).replace("-", "−")}%`;
  }
  const size = Math.abs(value);
  const digits = (size >= 1e7 || (size > 0 && size < 1e-6) ? value.toExponential(1)
    : size >= 1000 ? grouped(Math.round(value)) : String(Number(value.toPrecision(size < 0.001 ? 2 : 3)))).replace(/-/g, "−");
  return unit === "nats" || unit === "tokens" ? `${digits} ${unit}` : digits;
}

function grouped(n) { return n.toLocaleString("en"); }

function nth(n) {
  const rest = n % 100;
  return n + (rest > 10 && rest < 14 ? "th" : ["th", "st", "nd", "rd"][n % 10] || "th");
}

/* white space that would not be seen */
function visible(text) { return text.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/^ +$/, (s) => "␣".repeat(s.length)); }

function say(text) { $("say").textContent = text; }

/* ---------- theme ---------- */
const system = matchMedia("(prefers-color-scheme: dark)");
const dark = () => (document.documentElement.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
const accent = () => page.accent[dark() ? "dark" : "light"];

function themed() {
  $("theme").textContent = dark() ? "Light" : "Dark";
  $("theme").setAttribute("aria-label", dark() ? "Switch to light colours" : "Switch to dark colours");
  for (const redraw of page.drawn.values()) redraw();
  if (page.head) fillCard(page.head);
}

function remember(name, value) {
  try { // a page opened from disk may have no storage
    if (value === undefined) return localStorage.getItem(name);
    localStorage.setItem(name, value);
  } catch { /* the choice then lasts as long as the page */ }
  return null;
}

/* ---------- plots ---------- */
const CONFIG = { displayModeBar: false, responsive: true, showAxisDragHandles: false, doubleClick: "reset" };
const fine = matchMedia("(hover: hover)").matches; // dragging on a touch screen must scroll the page

const cut = (text) => (text.length > 18 ? `${text.slice(0, 11)}…${text.slice(-6)}` : text); // settings differ at the end; a tap and the table tell the rest

function paint(place, traces, layout, config = {}) {
  const template = page.theme[dark() ? "dark" : "light"];
  if (place.clientWidth < 480 && layout.yaxis?.ticktext) layout = { ...layout, yaxis: { ...layout.yaxis, ticktext: layout.yaxis.ticktext.map(cut) } };
  const spelled = place.clientWidth < 480 ? cut : (text) => text;
  traces = traces.map((t) => (t.mode === "markers+text" ? { ...t, text: t.customdata.map(spelled) } : t)); // all: leaveRoom places them
  if (place.clientWidth < 480 && layout.xaxis.dtick > 1) layout = { ...layout, xaxis: { ...layout.xaxis, dtick: layout.xaxis.dtick * 2 } };
  const whole = {
    ...layout, template, autosize: true, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    dragmode: layout.dragmode ?? (fine ? "zoom" : false), separators: ".,",
  };
  const drawn = Plotly.react(place, traces, whole, { ...CONFIG, ...config });
  if (traces.some((t) => t.mode === "markers+text")) {
    if (!place.leaves) place.on("plotly_afterplot", place.leaves = () => leaveRoom(place));
    drawn.then(place.leaves);
  }
  return drawn;
}

/* a name stands above its point, or else beside or below, where it covers no other; a tap and the table tell the rest */
function leaveRoom(place) {
  const box = (x) => x.getBoundingClientRect(), edge = box(place.querySelector(".nsewdrag"));
  const marks = [...place.querySelectorAll(".points .point")].map(box), kept = [];
  for (const name of place.querySelectorAll(".textpoint text")) {
    name.style.translate = "";
    const a = box(name), middle = (a.left + a.right) / 2, apart = (p) => Math.hypot((p.left + p.right) / 2 - middle, p.top - a.bottom);
    const own = marks.reduce((p, q) => apart(q) < apart(p) ? q : p);
    const level = (own.top + own.bottom - a.top - a.bottom) / 2;
    const ways = [[0, 0], [own.right + 3 - a.left, level], [own.left - 3 - a.right, level], [0, own.bottom + 1 - a.top]];
    const free = ways.find(([x, y]) => {
      const [left, right, top, bottom] = [a.left + x, a.right + x, a.top + y, a.bottom + y];
      const meets = (b) => left < b.right && b.left < right && top + 1 < b.bottom && b.top + 1 < bottom;
      return left >= edge.left && right <= edge.right && !kept.some(meets) && !marks.some((b) => b !== own && meets(b));
    });
    name.style.visibility = free ? "" : "hidden";
    if (!free) continue;
    name.style.translate = `${free[0]}px ${free[1]}px`;
    kept.push(box(name));
  }
}

/* draw when it comes into sight, and again whenever the theme or the picked head changes */
const waiting = new Set();
const sight = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) draw(entry.target);
}, { rootMargin: "300px" });

function whenSeen(place, redraw) {
  place.redraw = redraw;
  waiting.add(place);
  sight.observe(place);
}

function draw(place) {
  sight.unobserve(place);
  if (!waiting.delete(place)) return;
  page.drawn.set(place, place.redraw);
  place.redraw();
}

/* what is further down comes between other things, so that a picture of the whole page shows all of it */
const idle = window.requestIdleCallback ?? ((act) => setTimeout(act, 50));
function further() {
  const next = [...waiting].find((place) => place.isConnected && place.offsetParent);
  if (!next) return;
  draw(next);
  idle(further);
}

/* ---------- maps ---------- */
const maps = page.figures.filter((f) => f.kind === "heads");
const byKey = new Map(page.figures.map((f) => [f.key, f]));
const name = (layer, head) => `${layer}.${head}`;

/* values by head name, and each head's rank among those that have a value */
function ranked(map) {
  const z = map.plot.data[0].z;
  map.values = new Map();
  map.layers.forEach((layer, i) => z.forEach((row, h) => map.values.set(name(layer, h), row[i])));
  map.order = [...map.values].filter(([, v]) => Number.isFinite(v)).sort((a, b) => b[1] - a[1]).map(([n]) => n);
  map.rank = new Map();
  map.order.forEach((n, i) => { // equals share a rank
    const above = map.order[i - 1];
    map.rank.set(n, i && map.values.get(above) === map.values.get(n) ? map.rank.get(above) : i + 1);
  });
  map.low = map.values.get(map.order[map.order.length - 1]);
  map.high = map.values.get(map.order[0]);
}

/* the map's columns as they are shown: rows[i][r] is the head in row r of layer i */
function rows(map) {
  const z = map.plot.data[0].z;
  return map.layers.map((_, i) => {
    const heads = z.map((_, h) => h);
    if ($("order").value !== "value") return heads;
    return heads.sort((a, b) => (Number.isFinite(z[b][i]) ? z[b][i] : -Infinity) - (Number.isFinite(z[a][i]) ? z[a][i] : -Infinity));
  });
}

/* places have their height before they are drawn, so that nothing jumps while one scrolls */
function mapHeight(map) {
  const heads = map.plot.data[0].z.length;
  return Math.min(900, Math.max(240, heads * (heads > 24 ? 15 : 30) + 70));
}

function gridHeight(figure) {
  const many = figure.plot.data[0].z.length;
  return Math.min(700, Math.max(190, many * (many > 40 ? 10 : 18) + 80));
}

/* lines between the heads that share a key head and the next ones */
function groups(heads) {
  const color = dark() ? "#e9e9ec" : "#1d1f26", line = { color, width: 1 }, found = [];
  if (page.group > 1) for (let y = page.group; y < heads; y += page.group) found.push({ type: "line", xref: "paper", x0: 0, x1: 1, y0: y - 0.5, y1: y - 0.5, line, opacity: 0.45 });
  return found;
}

function drawMap() {
  const map = page.map, trace = map.plot.data[0], order = rows(map);
  const cells = (pick) => trace.z.map((_, r) => map.layers.map((_, i) => pick(order[i][r], i)));
  const [layer, head] = (page.head || "").split(".").map(Number);
  const i = map.layers.indexOf(layer), r = i < 0 ? -1 : order[i].indexOf(head);
  const first = $("order").value === "value" ? 1 : 0; // ranks are counted from 1
  const box = (width, color) => ({ type: "rect", x0: i - 0.5, x1: i + 0.5, y0: r + first - 0.5, y1: r + first + 0.5, line: { color, width } });
  const ground = getComputedStyle(document.body).backgroundColor;
  const narrow = $("map").clientWidth < 480;
  const layout = {
    ...map.plot.layout, height: mapHeight(map), dragmode: false, margin: { l: 8, r: 8, t: 8, b: 8 },
    shapes: [...(first ? [] : groups(trace.z.length)), ...(r < 0 ? [] : [box(5, ground), box(2.5, accent())])],
    yaxis: { ...map.plot.layout.yaxis, title: { text: first ? "rank in the layer" : "head" }, dtick: trace.z.length > 16 ? 4 : 1 },
  };
  const bar = narrow ? { ...trace.colorbar, orientation: "h", y: 1.02, yanchor: "bottom", thickness: 6 } : trace.colorbar;
  const shown = {
    ...trace, z: cells((h, i) => trace.z[h][i]), customdata: cells((h) => h), y0: first, colorbar: bar,
    xgap: map.layers.length > 48 ? 0 : 1, ygap: map.layers.length > 48 ? 0 : 1,
  };
  paint($("map"), [shown], layout).then((place) => {
    if (place.bound) return;
    place.bound = true;
    place.on("plotly_click", (event) => pick(name(event.points[0].x, event.points[0].customdata)));
  });
}

function showMap(map) {
  page.map = map;
  for (const button of all(".thumb")) button.setAttribute("aria-pressed", String(button.dataset.map === map.key));
  $("map-title").textContent = map.title;
  $("map").style.minHeight = `${mapHeight(map)}px`;
  $("map-what").textContent = map.what;
  $("map").setAttribute("aria-label", `${map.title}: a map of layers and heads; the table holds the same numbers`);
  if (page.drawn.has($("map"))) drawMap();
  if (!$("map-table").hidden) fillTable($("map-table"), map);
}

const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function walk(event) {
  const step = STEPS[event.key];
  if (!step) return;
  event.preventDefault();
  const map = page.map, order = rows(map), [layer, head] = page.head.split(".").map(Number);
  const i = map.layers.indexOf(layer), r = i < 0 ? 0 : order[i].indexOf(head);
  const column = Math.min(map.layers.length - 1, Math.max(0, Math.max(i, 0) + step[0]));
  const row = Math.min(order[column].length - 1, Math.max(0, r + step[1]));
  pick(name(map.layers[column], order[column][row]));
}

/* ---------- the card of a head ---------- */
function pick(head) {
  if (!maps.length || !maps.some((map) => map.values.has(head))) return;
  page.head = head;
  for (const button of all("button.head, .cells i")) {
    if (button.dataset.head === head) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
  }
  $("card-title").textContent = `Head ${head}`;
  [$("layer").value, $("number").value] = head.split(".");
  fillCard(head);
  for (const [place, redraw] of page.drawn) if (place.id === "map" || place.dataset.plot) redraw();
  for (const listener of page.listeners) listener(head);
}

function fillCard(head) {
  const body = $("card-body");
  body.replaceChildren();
  const parts = page.roles.flatMap((role) => {
    const at = role.heads.findIndex(([n]) => n === head);
    return at < 0 ? [] : [[role, role.heads[at][1], at + 1]];
  });
  for (const [role, value, place] of parts) {
    body.append(el("p", { class: "part" }, el("b", {}, role.name), " ", el("span", {}, `${written(value, role.unit)}, ${nth(place)} of ${role.heads.length}`)));
  }
  if (!parts.length) body.append(el("p", { class: "part" }, el("span", {}, "Plays no part that a measure looked for.")));

  const pattern = page.pattern?.(head);
  if (pattern) body.append(pattern);

  const table = el("tbody");
  for (const map of maps) {
    const value = map.values.get(head), rank = map.rank.get(head);
    if (value === undefined) continue;
    const edge = rank && (rank <= Math.max(3, map.order.length * 0.02));
    table.append(el("tr", {},
      el("th", { scope: "row" }, el("button", { type: "button", onclick: () => { showMap(map); $("map-title").scrollIntoView({ block: "nearest" }); } }, map.title)),
      el("td", { class: edge ? "top" : null }, written(value, map.unit)),
      el("td", {}, rank ? nth(rank) : "–")));
  }
  const of = Math.max(...maps.map((m) => m.order.length));
  body.append(el("h4", {}, `Its numbers, and its place among ${grouped(of)} heads`), el("table", { class: "values", "data-rove": true }, table));
  roving(body);

  for (const figure of page.figures) {
    const cloud = figure.kind === "curves" && figure.plot.data.find((t) => t.meta?.heads);
    if (!cloud || !cloud.meta.heads.includes(head)) continue;
    const place = el("div", { class: "plot", style: "height:11rem" });
    body.append(el("h4", {}, figure.title), place);
    const drawIt = () => drawCurves(place, figure, true);
    for (const known of [page.drawn, waiting]) for (const old of [...known.keys()]) if (!old.isConnected) known.delete(old);
    whenSeen(place, drawIt);
  }
  const examples = page.examples?.(head);
  if (examples) body.append(examples);
}

function step(by) {
  const names = [...maps[0].values.keys()].sort((a, b) => a.split(".")[0] - b.split(".")[0] || a.split(".")[1] - b.split(".")[1]);
  pick(names[(names.indexOf(page.head) + by + names.length) % names.length]);
}

/* ---------- curves and grids ---------- */
function drawCurves(place, figure, small = false) {
  const traces = figure.plot.data.map((t) => ({ ...t }));
  const cloud = traces.find((t) => t.meta?.heads);
  const at = cloud ? cloud.meta.heads.indexOf(page.head) : -1;
  if (at >= 0) {
    const from = at * (cloud.meta.points + 1), to = from + cloud.meta.points;
    traces.push({
      type: "scatter", x: cloud.x.slice(from, to), y: cloud.y.slice(from, to), name: `head ${page.head}`,
      mode: cloud.mode, line: { color: accent(), width: 2.4 }, marker: { color: accent() },
    });
  }
  const layout = { ...figure.plot.layout, margin: { l: 8, r: 8, t: 8, b: 8 }, showlegend: !small && traces.some((t) => t.showlegend !== false && t.name) && traces.length > 1 };
  if (small) layout.dragmode = false;
  paint(place, traces, layout);
}

function drawGrid(place, figure) {
  paint(place, figure.plot.data, { ...figure.plot.layout, margin: { l: 8, r: 8, t: 8, b: 8 } });
}

/* ---------- tables ---------- */
function headButton(head) { return el("button", { type: "button", class: "head", "data-head": head, tabindex: -1 }, head); }

/* what a cell holds: a head, heads, a number, a number written as text, or text */
function known(x) { return maps.some((map) => map.values.has(x)); }
function parse(x) {
  if (x && x.head) return { heads: [x.head] };
  if (typeof x === "string" && /^\d+\.\d+(, \d+\.\d+)*$/.test(x) && x.split(", ").every(known)) return { heads: x.split(", ") };
  if (typeof x === "string" && /^[-−]?[\d.,]+%?$/.test(x)) return { number: parseFloat(x.replace(/,/g, "").replace("−", "-")), text: x };
  return typeof x === "number" ? { number: x } : { text: x === null || x === undefined ? null : String(x) };
}

/* columns: [title, unit]; rows: arrays of cells */
function table(columns, lines, caption) {
  lines = lines.map((line) => line.map(parse));
  const key = (x) => (x.heads ? x.heads[0].split(".").reduce((a, b) => a * 1e6 + Number(b), 0) : x.number ?? x.text);
  const numeric = columns.map((_, i) => lines.every((line) => line[i].number !== undefined || line[i].text === null));
  const body = el("tbody");
  const none = el("tr", {}, el("td", { class: "quiet", colspan: columns.length }, "None."));
  const fill = () => body.replaceChildren(...(lines.length ? [] : [none]), ...lines.map((line) => el("tr", {}, ...line.map((x, i) =>
    el("td", { class: numeric[i] ? "right" : null }, ...(x.heads ? x.heads.map(headButton) : [x.text === undefined ? written(x.number, columns[i][1]) : visible(x.text ?? "–")])))))); // "–": there is none
  const heads = columns.map(([title], i) => el("th", { scope: "col", class: numeric[i] ? "right" : null }, el("button", {
    type: "button",
    onclick: () => {
      const down = heads[i].getAttribute("aria-sort") === (numeric[i] ? "descending" : "ascending");
      const sign = down === numeric[i] ? 1 : -1;
      for (const other of heads) other.removeAttribute("aria-sort");
      heads[i].setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      lines.sort((a, b) => {
        const [p, q] = [key(a[i]), key(b[i])];
        if (p === null || q === null) return (p === null) - (q === null);
        return sign * (typeof p === "number" && typeof q === "number" ? p - q : String(p).localeCompare(String(q)));
      });
      fill();
    },
  }, title)));
  fill();
  return el("table", { "data-rove": true }, el("caption", { class: "hidden" }, caption), el("thead", {}, el("tr", {}, ...heads)), body);
}

function fillTable(place, figure) {
  const trace = figure.plot?.data[0];
  let made;
  if (figure.kind === "heads") {
    const lines = [...figure.values].map(([head, v]) => [figure.rank.get(head) ?? null, { head }, Number.isFinite(v) ? v : null]);
    lines.sort((a, b) => (a[0] ?? Infinity) - (b[0] ?? Infinity));
    made = table([["rank", ""], ["head", ""], [figure.title, figure.unit]], lines, figure.title);
  } else if (figure.kind === "grid") {
    const lines = trace.z.map((row, i) => [trace.y[i], ...Array.from(trace.customdata ? trace.customdata[i] : row, (v) => (Number.isFinite(v) ? v : null))]);
    made = table([[figure.plot.layout.yaxis.title.text, ""], ...Array.from(trace.x, (x) => [String(x), ""])], lines, figure.title);
  } else if (figure.kind === "curves") {
    const lines = figure.plot.data.filter((t) => !t.meta?.heads);
    const cloud = figure.plot.data.find((t) => t.meta?.heads);
    const at = cloud ? cloud.meta.heads.indexOf(page.head) : -1;
    if (at >= 0) {
      const from = at * (cloud.meta.points + 1);
      lines.push({ name: `head ${page.head}`, x: cloud.x.slice(from, from + cloud.meta.points), y: cloud.y.slice(from, from + cloud.meta.points) });
    }
    const places = Array.from(lines.find((t) => !t.meta?.band)?.x ?? []);
    const columns = [...lines.filter((t) => !t.meta?.band), ...lines.filter((t) => t.meta?.band)];
    const seen = columns.map((t) => new Map(Array.from(t.x, (x, i) => [x, t.y[i]])));
    const values = places.map((x) => [x, ...seen.map((at) => (Number.isFinite(at.get(x)) ? at.get(x) : null))]);
    made = table([[figure.plot.layout.xaxis.title.text, ""], ...columns.map((t) => [t.name, ""])], values, figure.title);
  } else {
    made = table(figure.columns.map((c) => [c, ""]), figure.rows, figure.title);
  }
  place.replaceChildren(made);
  roving(place);
  place.tabIndex = 0;
  place.setAttribute("role", "region");
  place.setAttribute("aria-label", `${figure.title}, as a table`);
}

/* ---------- start ---------- */
function wire() {
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button, [data-head]");
    if (!button) return;
    const { head, map, table: tableOf, png, sort } = button.dataset;
    if (sort) sortMatrix(button);
    if (head) {
      pick(head);
      if (!button.closest(".table, #card")) $("card")?.scrollIntoView({ block: "nearest" });
    }
    if (map) {
      showMap(byKey.get(map));
      $("map-title").scrollIntoView({ block: "nearest" });
    }
    if (tableOf) {
      const place = $(tableOf === "map" ? "map-table" : `table-${tableOf}`);
      place.hidden = !place.hidden;
      button.setAttribute("aria-expanded", String(!place.hidden));
      if (!place.hidden) fillTable(place, tableOf === "map" ? page.map : byKey.get(tableOf));
    }
    if (png) {
      const place = png === "map" ? $("map") : document.querySelector(`[data-plot="${CSS.escape(png)}"]`);
      Plotly.downloadImage(place, { format: "png", scale: 3, filename: png === "map" ? page.map.key : png });
    }
  });
  $("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = dark() ? "light" : "dark";
    remember("heedful-theme", document.documentElement.dataset.theme);
    themed();
  });
  system.addEventListener("change", themed);
  if (!maps.length) return;
  $("order").addEventListener("change", drawMap);
  $("map").addEventListener("keydown", walk);
  $("before").addEventListener("click", () => step(-1));
  $("after").addEventListener("click", () => step(1));
  $("go").addEventListener("submit", (event) => event.preventDefault());
  $("go").addEventListener("change", () => {
    const wanted = name(Number($("layer").value), Number($("number").value));
    if (maps.some((m) => m.values.has(wanted))) pick(wanted);
    else { [$("layer").value, $("number").value] = page.head.split("."); say(`There is no head ${wanted}`); }
  });
}

/* many buttons that are one stop of the tab key, and go from one to the next by arrow keys */
const stops = (group) => all("button, a[href]", group);
function roving(root) {
  for (const group of all("[data-rove]", root)) stops(group).forEach((button, i) => { button.tabIndex = i ? -1 : 0; });
}

function wireRoving() {
  roving(document);
  document.addEventListener("focusin", (event) => {
    const group = event.target.closest?.("[data-rove]");
    if (group && stops(group).includes(event.target)) for (const other of stops(group)) other.tabIndex = other === event.target ? 0 : -1;
  });
  document.addEventListener("keydown", (event) => {
    const group = event.target.closest?.("[data-rove]"), items = group ? stops(group) : [], at = items.indexOf(event.target);
    const to = { ArrowLeft: at - 1, ArrowUp: at - 1, ArrowRight: at + 1, ArrowDown: at + 1, Home: 0, End: items.length - 1 }[event.key];
    if (at < 0 || to === undefined) return;
    event.preventDefault();
    items[Math.max(0, Math.min(items.length - 1, to))].focus();
  });
}

/* rows by a column: downwards first, then upwards; what has no value stays below */
function sortMatrix(button) {
  const head = button.parentElement, body = $("matrix").tBodies[0], at = Number(button.dataset.sort);
  const down = head.getAttribute("aria-sort") !== "descending", sign = down ? -1 : 1;
  const value = (row) => { const text = row.cells[at].dataset.value; return text === undefined ? sign * Infinity : Number(text); };
  all("#matrix thead th").forEach((th) => th.setAttribute("aria-sort", "none"));
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  [...body.rows].sort((a, b) => sign * (value(a) - value(b)) || 0).forEach((row) => body.append(row));
}

/* a role that is pointed at leaves its own heads alone in the map of roles */
function wireRoles() {
  for (const place of all("[data-role]")) {
    const only = (on) => all(".cells i").forEach((cell) => cell.classList.toggle("dim", on && !cell.dataset.roles.split(" ").includes(place.dataset.role)));
    for (const event of ["pointerenter", "focusin"]) place.addEventListener(event, () => only(true));
    for (const event of ["pointerleave", "focusout"]) place.addEventListener(event, () => only(false));
  }
  document.querySelector(".cells")?.addEventListener("keydown", (event) => {
    const [across, down] = STEPS[event.key] ?? [0, 0];
    if (!across && !down) return;
    event.preventDefault();
    const [layer, head] = page.head.split(".").map(Number);
    const next = document.querySelector(`.cells [data-head="${name(layer + across, head + down)}"]`);
    if (!next) return;
    pick(next.dataset.head);
    next.scrollIntoView({ block: "nearest", inline: "nearest" });
    say(next.title);
  });
}

/* on paper nothing is out of sight, and nothing is folded */
function unfold() {
  all("details").forEach((fold) => { fold.open = true; });
  for (const place of [...waiting]) if (place.isConnected) draw(place);
}

function drawMini(button) {
  const map = byKey.get(button.dataset.map), trace = map.plot.data[0];
  const bare = { visible: false, fixedrange: true };
  const layout = { margin: { l: 0, r: 0, t: 0, b: 0 }, xaxis: { ...bare, type: "category" }, yaxis: { ...bare, autorange: "reversed" } };
  const place = button.firstElementChild;
  whenSeen(place, () => paint(place, [{ ...trace, showscale: false, xgap: 0, ygap: 0, hoverinfo: "skip", hovertemplate: null }], layout, { staticPlot: true }));
}

async function start() {
  document.documentElement.dataset.theme = remember("heedful-theme") || document.documentElement.dataset.theme || "";
  themed();
  for (const figure of page.figures) if (figure.plot) plain(figure.plot);
  maps.forEach(ranked);
  for (const place of all("[data-listing]")) fillTable(place, byKey.get(place.dataset.listing));
  const script = document.createElement("script");
  script.textContent = new TextDecoder().decode(await unzip("engine"));
  document.head.append(script);
  $("engine").remove();
  wire();
  wireRoles();
  wireRoving();
  addEventListener("beforeprint", unfold);
  if (maps.length) {
    showMap(maps[0]);
    all(".thumb").forEach(drawMini);
    whenSeen($("map"), drawMap);
  }
  for (const place of all("[data-plot]")) {
    const figure = byKey.get(place.dataset.plot);
    if (figure.kind === "grid") place.style.height = `${gridHeight(figure)}px`;
    else if (figure.plot.layout.height) place.style.height = `${figure.plot.layout.height}px`;
    whenSeen(place, () => (figure.kind === "grid" ? drawGrid : drawCurves)(place, figure));
  }
  if (page.view) await (page.view.images ? openImages : openText)(await unzip("numbers"));
  const notable = [...all(".findings [data-head]").map((b) => b.dataset.head), ...page.roles.flatMap((role) => role.heads.map(([head]) => head))];
  const last = page.view?.images && page.view.heads.at(-1); // of the last layer, whose class token tells the image
  if (maps.length) pick(last || (notable.find((head) => page.view?.heads.includes(head)) ?? notable[0] ?? maps[0].order[0]));
  document.documentElement.dataset.ready = "";
  idle(further);
}

/* once the script of the view, which comes after this one, is known */
addEventListener("DOMContentLoaded", () => start().catch((error) => {
  console.error(error);
  document.body.append(el("p", { class: "noscript" }, "The maps could not be drawn; they need a browser from 2023 or later. The summary above is whole."));
}));
