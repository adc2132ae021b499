/* The images: what heads look at in a few of them. A place's light is the root of its weight over the highest of them. */
const DARKEST = 0.9; // how much of a picture goes where nothing looks

async function openImages(buffer) {
  const view = page.view, [down, across] = view.grid, first = view.before.length, cells = down * across, n = first + cells;
  const images = view.images.length, layers = view.layers.length, [tall, wide] = view.size;
  const rows = 2 * images * layers * view.across, whole = view.whole * view.heads.length * n;
  const highest = new Float32Array(buffer, 0, rows + whole);
  const bytes = new Uint8Array(buffer, 4 * (rows + whole), (rows + whole) * n);
  const pixels = new Uint8Array(buffer, 4 * (rows + whole) + (rows + whole) * n);
  const weights = (row) => Float32Array.from(bytes.subarray(row * n, (row + 1) * n), (x) => (x / 255) ** 2 * highest[row]);
  const WAYS = { class: 0, mean: 1 };
  let way = first ? "class" : "mean", head = view.heads[0], image = 0, pinned = null, token = null;

  /* one row of weights: what the class token looks at, or all tokens in the mean */
  function look(at, of) {
    const [layer, number] = of.split(".").map(Number), i = view.layers.indexOf(layer);
    if (i < 0 || number >= view.across) return null;
    return weights(((WAYS[way] * images + at) * layers + i) * view.across + number);
  }
  const from = (of) => rows + (image * view.heads.length + view.heads.indexOf(of)) * n;
  const mapped = () => image < view.whole && view.heads.includes(head);
  const looksAt = (i) => weights(from(head) + i);
  const lookedAtBy = (i) => Float32Array.from({ length: n }, (_, q) => (bytes[(from(head) + q) * n + i] / 255) ** 2 * highest[from(head) + q]);

  /* ---------- drawing ---------- */
  const originals = view.images.map((_, at) => {
    const canvas = el("canvas", { width: wide, height: tall }), shown = new ImageData(wide, tall), start = at * tall * wide * 3;
    for (let i = 0; i < tall * wide; i++) shown.data.set([pixels[start + 3 * i], pixels[start + 3 * i + 1], pixels[start + 3 * i + 2], 255], 4 * i);
    canvas.getContext("2d").putImageData(shown, 0, 0);
    return canvas;
  });

  function light(canvas, at, row, smooth) {
    const brush = canvas.getContext("2d");
    brush.imageSmoothingEnabled = true;
    brush.drawImage(originals[at], 0, 0, canvas.width, canvas.height);
    if (!row) return;
    const shade = el("canvas", { width: across, height: down }), dark = new ImageData(across, down);
    let most = 1e-9;
    for (let i = first; i < n; i++) most = Math.max(most, row[i]);
    for (let i = 0; i < cells; i++) dark.data[4 * i + 3] = 255 * DARKEST * (1 - Math.sqrt(row[first + i] / most));
    shade.getContext("2d").putImageData(dark, 0, 0);
    brush.imageSmoothingEnabled = smooth;
    brush.drawImage(shade, 0, 0, canvas.width, canvas.height);
  }

  const ratio = Math.min(2, devicePixelRatio || 1);
  const sized = (width, more) => el("canvas", { width: Math.round(width * ratio), height: Math.round((width * ratio * tall) / wide), ...more });
  const edge = Array.from({ length: cells }, (_, i) => [Math.floor(i / across), i % across]).map(([r, c]) => r === 0 || c === 0 || r === down - 1 || c === across - 1);
  const place = (i) => (i < first ? view.before[i] : `row ${Math.floor((i - first) / across)}, column ${(i - first) % across}`);
  const parts = (of) => page.roles.filter((r) => r.heads.some(([h]) => h === of)).map((r) => r.name);

  /* where a row of weights goes, by kinds of tokens */
  function shares(row) {
    const found = view.before.map((name, i) => [name, row[i]]);
    let rim = 0, middle = 0;
    for (let i = 0; i < cells; i++) if (edge[i]) rim += row[first + i]; else middle += row[first + i];
    return [...found, ["patches at the border", rim], ["patches further in", middle]];
  }

  /* ---------- the sheet: images down, heads across ---------- */
  const sheet = $("glances"), drawn = [];
  function fillSheet() {
    const top = el("tr", {}, el("th", { scope: "col" }, "image"), ...view.heads.map((of) => el("th", { scope: "col" },
      el("button", { type: "button", class: "head", "data-head": of, onclick: () => pick(of) }, of), el("small", {}, parts(of).slice(0, 1).join("")))));
    const lines = view.images.map((label, at) => el("tr", {}, el("th", { scope: "row", title: label }, sized(112, { role: "img", "aria-label": label })),
      ...view.heads.map((of) => {
        const canvas = sized(112, { role: "img", "aria-label": `what head ${of} looks at in ${label}` });
        const button = el("button", { type: "button", onclick: () => { open(at, of); pick(of); } }, canvas);
        drawn.push([canvas, at, of, button]);
        return el("td", {}, button);
      })));
    sheet.replaceChildren(el("thead", {}, top), el("tbody", {}, ...lines));
    all("tbody th canvas", sheet).forEach((canvas, at) => light(canvas, at, null));
  }
  function relight() {
    for (const [canvas, at, of] of drawn) light(canvas, at, look(at, of), true);
  }
  function marked() {
    for (const [, at, of, button] of drawn) if (at === image && of === head) button.setAttribute("aria-current", "true"); else button.removeAttribute("aria-current");
  }

  /* ---------- one image, large ---------- */
  const large = sized(480, { tabindex: 0, role: "img" }), chips = $("glance-tokens");
  $("glance-large").append(large);
  view.before.forEach((label, i) => chips.append(el("button", { type: "button", class: "plain", onclick: () => choose(pinned === i ? null : i) }, label)));
  view.images.forEach((label, at) => $("glance-image").append(el("option", { value: at }, label)));
  $("glance-image").addEventListener("change", (event) => open(Number(event.target.value), head));

  function frame(i) {
    const brush = large.getContext("2d"), [w, h] = [large.width / across, large.height / down];
    const [c, r] = [(i - first) % across, Math.floor((i - first) / across)];
    for (const [width, colour] of [[5, "#000"], [2.5, accent()]]) {
      brush.lineWidth = width * ratio;
      brush.strokeStyle = colour;
      brush.strokeRect(c * w, r * h, w, h);
    }
  }

  function show() {
    const about = $("glance-body"), turned = $("glance-way").value === "in";
    const only = token === null || !mapped();
    const row = only ? look(image, head) : turned ? lookedAtBy(token) : looksAt(token);
    light(large, image, row, false);
    if (!only && token >= first) frame(token);
    all("button", chips).forEach((chip, i) => chip.setAttribute("aria-pressed", String(!only && i === token)));
    const who = only ? (way === "class" ? view.before[0] : "all tokens, in the mean") : place(token);
    $("glance-title").textContent = `Head ${head}: ${who}`;
    large.setAttribute("aria-label", `${view.images[image]}, lit by what ${who} ${turned && !only ? "is looked at by" : "looks at"} in head ${head}`);
    about.replaceChildren();
    if (!row) return about.append(el("p", { class: "note" }, `Head ${head} does not see the image whole.`));
    const best = [...row.keys()].sort((a, b) => row[b] - row[a]).slice(0, 5);
    if (turned && !only) {
      about.append(el("p", { class: "note" }, "Gives to it, of its own attention"), listed(best.map((i) => [place(i), row[i]])));
    } else {
      about.append(el("h4", {}, "Where its attention goes"), listed(shares(row)), el("h4", {}, "Most to"), listed(best.map((i) => [place(i), row[i]])));
    }
    const rim = edge.filter(Boolean).length;
    about.append(el("p", { class: "note" }, `${rim} of ${n} places are at the border, ${percentOf(rim / n)}.`));
    if (!mapped()) about.append(el("p", { class: "note" }, `Single patches can be pointed at in heads ${view.heads.join(", ")}${view.whole < images ? ` of the first ${view.whole === 1 ? "image" : `${view.whole} images`}` : ""}.`));
    return undefined;
  }
  const percentOf = (x) => written(x, "share");
  const listed = (items) => el("table", { class: "values" }, el("tbody", {}, ...items.map(([what, x]) => el("tr", {}, el("th", { scope: "row" }, what), el("td", {}, percentOf(x))))));

  function choose(i) { pinned = i; token = i; show(); }
  function open(at, of) {
    image = at;
    head = of;
    $("glance-image").value = String(at);
    marked();
    show();
  }
  const pointed = (event) => {
    const box = large.getBoundingClientRect();
    const [c, r] = [((event.clientX - box.left) / box.width) * across, ((event.clientY - box.top) / box.height) * down].map(Math.floor);
    return first + Math.max(0, Math.min(down - 1, r)) * across + Math.max(0, Math.min(across - 1, c));
  };
  large.addEventListener("pointermove", (event) => { if (event.pointerType !== "touch" && pinned === null) { token = pointed(event); show(); } });
  large.addEventListener("pointerleave", () => { if (pinned === null) { token = null; show(); } });
  large.addEventListener("click", (event) => { const i = pointed(event); choose(pinned === i ? null : i); });
  large.addEventListener("keydown", (event) => {
    if (event.key === "Escape") choose(null);
    const step = STEPS[event.key];
    if (!step) return;
    event.preventDefault();
    const i = token !== null && token >= first ? token - first : Math.floor(down / 2) * across + Math.floor(across / 2) - step[0] - step[1] * across;
    const [c, r] = [Math.max(0, Math.min(across - 1, (i % across) + step[0])), Math.max(0, Math.min(down - 1, Math.floor(i / across) + step[1]))];
    choose(first + r * across + c);
    say(place(pinned));
  });
  $("glance-way").addEventListener("change", show);
  const ways = $("glance-whose");
  if (!first) ways.querySelector("[value=class]").remove();
  else ways.querySelector("[value=class]").textContent = `the ${view.before[0]} looks at`;
  ways.value = way;
  ways.addEventListener("change", () => { way = ways.value; relight(); show(); });

  page.listeners.push((of) => { if (of !== head) open(image, of); });
  /* the card of a head shows it on the image that is open */
  page.pattern = (of) => {
    const row = look(image, of);
    if (!row) return null;
    const canvas = sized(224, { class: "glance", role: "img", "aria-label": `what head ${of} looks at in ${view.images[image]}` });
    light(canvas, image, row, true);
    return el("div", {}, el("h4", {}, `In ${view.images[image]}`), canvas, el("p", { class: "note" }, `Lit by what ${way === "class" ? `the ${view.before[0]} looks at` : "all tokens look at, in the mean"}.`));
  };

  fillSheet();
  relight();
  open(0, head);
}
