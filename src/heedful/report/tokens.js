/* The text: only what is near the screen is in the document, so that 32 thousand tokens scroll like a page. */
const FULL = 30; // times a fair share of attention: the strongest shade
const MOST = 8; // how many of those that look at a token are listed

async function openText(buffer) {
  const view = page.view, n = view.tokens.length, top = view.top, size = view.heads.length * n;
  const back = view.wide ? new Int32Array(buffer, 0, size * top) : new Int16Array(buffer, 0, size * top);
  const [logs, spread, lengths] = [0, 1, 2].map((i) => new Uint16Array(buffer, back.byteLength + 2 * i * size, size));
  const weights = new Uint8Array(buffer, back.byteLength + 6 * size, size * top);
  const opening = new Uint8Array(buffer, back.byteLength + 6 * size + size * top);
  const box = $("tokens"), select = $("view-head");
  let slot = 0, pinned = null, shown = null, cursor = 0;
  let looks = new Map(), watched = new Map(), incoming = null, heat = null;

  const received = (i, s = slot) => 10 ** ((logs[s * n + i] / 65535 - 1) * view.decades);
  const entropy = (i) => (spread[slot * n + i] / 65535) * view.widest;
  const outgoing = (i, s = slot) => {
    const found = [];
    for (let j = (s * n + i) * top; j < (s * n + i + 1) * top; j++) if (weights[j]) found.push([i - back[j], weights[j] / 255]);
    return found.sort((a, b) => b[1] - a[1]);
  };

  /* how long a token's value is, where the text's mean is 1: with it, weights say what is brought and not what is looked at */
  let long = () => 1;
  function measure() {
    let sum = 0;
    for (let i = 0; i < n; i++) sum += lengths[slot * n + i];
    long = (i) => (sum ? (lengths[slot * n + i] * n) / sum : 1);
  }
  const brought = (found) => {
    const told = found.map(([j, w]) => [j, w * long(j)]), sum = told.reduce((a, [, w]) => a + w, 0) || 1;
    return told.map(([j, w]) => [j, w / sum]).sort((a, b) => b[1] - a[1]);
  };

  /* who looks at whom, turned round: for each token the places of its lookers */
  function turn() {
    const from = new Uint32Array(n + 1), base = slot * n * top;
    for (let i = 0; i < n; i++) for (let j = base + i * top; j < base + (i + 1) * top; j++) if (weights[j]) from[i - back[j] + 1]++;
    for (let i = 0; i < n; i++) from[i + 1] += from[i];
    const next = from.slice(), query = new Uint32Array(from[n]), weight = new Uint8Array(from[n]);
    for (let i = 0; i < n; i++) {
      for (let j = base + i * top; j < base + (i + 1) * top; j++) {
        if (!weights[j]) continue;
        const place = next[i - back[j]]++;
        query[place] = i;
        weight[place] = weights[j];
      }
    }
    return (k) => {
      const found = [];
      for (let j = from[k]; j < from[k + 1]; j++) found.push([query[j], weight[j] / 255]);
      return found.sort((a, b) => b[1] - a[1]);
    };
  }

  /* what a token draws from the others, where each of them has one to give: a fair share is 1. Shaded by logarithm, since
     one sink would drown all others otherwise; a mean over those that may see it would shade the last tokens, whom few see */
  function drawn() {
    const found = new Float32Array(n), base = slot * n * top;
    for (let i = 0; i < n; i++) for (let j = base + i * top; j < base + (i + 1) * top; j++) if (back[j]) found[i - back[j]] += weights[j] / 255;
    return found;
  }
  const logged = (x) => Math.max(0, Math.min(1, Math.log(x) / Math.log(FULL)));
  const SHADES = {
    attention: ["draws attention", `how much more than its fair share of attention a token draws from the others; it is full at ${FULL} times`, () => { const got = drawn(); return (i) => logged(got[i]); }],
    value: ["brings much", `the attention that a token draws from the others times the length of its value, which is how much of it the head hands on; it is full at ${FULL} times a fair share of mean length`, () => { const got = drawn(); return (i) => logged(got[i] * long(i)); }],
    entropy: ["looks widely", "how widely a token looks, by the entropy of its attention; it is full at this text's widest look", () => { let most = 0; for (let i = 0; i < n; i++) most = Math.max(most, entropy(i)); return (i) => (most ? entropy(i) / most : 0); }],
  };

  /* ---------- chunks ---------- */
  const chunks = [];
  for (let start = 0; start < n;) {
    let end = Math.min(n, start + 120);
    while (end < n && end - start < 300) {
      if (view.tokens[end - 1].endsWith("\n") || (end - start > 220 && /^\s/.test(view.tokens[end]))) break;
      end++;
    }
    const text = view.tokens.slice(start, end);
    chunks.push({ start, end, long: text.join("").length, lines: text.filter((t) => t.includes("\n")).length, place: el("div", { class: "chunk" }), full: false });
    start = end;
  }

  function dress(span, i) {
    span.style.setProperty("--r", heat(i).toFixed(2));
    const out = looks.get(i), into = watched.get(i);
    span.className = "t" + (span.dataset.nl ? " nl" : "") + (out ? " out" : "") + (into ? " in" : "") + (i === shown ? " me" : "");
    if (out) span.style.setProperty("--o", Math.sqrt(out).toFixed(2));
    if (into) span.style.setProperty("--i", Math.sqrt(into).toFixed(2));
  }

  function fill(chunk) {
    if (chunk.full) return;
    chunk.full = true;
    const spans = document.createDocumentFragment();
    for (let i = chunk.start; i < chunk.end; i++) {
      const text = view.tokens[i], span = document.createElement("span");
      const bare = text.trim() ? text.trimStart() : text; // the space before a word is not shaded with it
      span.textContent = bare;
      span.dataset.i = i;
      if (bare.trim() === "" && text.includes("\n")) span.dataset.nl = "1";
      dress(span, i);
      spans.append(text.slice(0, text.length - bare.length), span);
    }
    chunk.place.replaceChildren(spans);
    chunk.place.style.height = "";
  }

  function empty(chunk) {
    if (!chunk.full) return;
    chunk.place.style.height = `${chunk.place.offsetHeight}px`;
    chunk.place.replaceChildren();
    chunk.full = false;
  }

  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) (entry.isIntersecting ? fill : empty)(entry.target.chunk);
  }, { root: box, rootMargin: "500px 0px" });

  function lay() {
    const wide = Math.max(20, (box.clientWidth - 48) / 7.6), line = 31; // characters in a line, pixels of a line: only a guess
    for (const chunk of chunks) {
      if (!chunk.full) chunk.place.style.height = `${(Math.ceil(chunk.long / wide) + chunk.lines) * line}px`;
    }
  }

  const chunkOf = (i) => {
    let low = 0, high = chunks.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (chunks[middle].start <= i) low = middle; else high = middle - 1;
    }
    return chunks[low];
  };
  const spanOf = (i) => { const c = chunkOf(i); return c.full ? c.place.children[i - c.start] : null; };
  const redress = () => { for (const chunk of chunks) if (chunk.full) all("span", chunk.place).forEach((span) => dress(span, Number(span.dataset.i))); };

  /* ---------- showing one token ---------- */
  const clean = (text) => text.replace(/\n/g, "↵").replace(/\t/g, "⇥"); // spaces stay: they part the words
  function context(i, before, after) {
    const line = el("span", { class: "where" });
    line.append(clean(view.tokens.slice(Math.max(0, i - before), i).join("")), el("b", {}, clean(view.tokens[i])), clean(view.tokens.slice(i + 1, i + 1 + after).join("")));
    return line;
  }
  const share = (w) => (w < 0.01 ? "<1%" : `${(w * 100).toFixed(0)}%`); // weights are kept as 255ths
  const apart = (from, to) => (from === to ? "itself" : `${grouped(Math.abs(from - to))} ${to < from ? "back" : "ahead"}`);

  function list(title, found, i, none) {
    const items = found.map(([j, w]) => el("li", {}, el("button", { type: "button", onclick: () => visit(j), title: `token ${j}, ${apart(i, j)}` },
      context(j, 3, 3), el("span", { class: "how" }, `${share(w)} · ${apart(i, j)}`))));
    return [el("h4", {}, title), items.length ? el("ol", { class: "examples" }, ...items) : el("p", { class: "note" }, none)];
  }

  function show(i) {
    if (i === shown) return;
    shown = i;
    const byValue = $("shade").value === "value";
    const out = i === null ? [] : byValue ? brought(outgoing(i)) : outgoing(i), into = i === null ? [] : incoming(i);
    looks = new Map(out);
    watched = new Map(into);
    box.classList.toggle("on", i !== null);
    redress();
    if (i === null) {
      $("token-title").textContent = "No token picked";
      $("token-body").replaceChildren(el("p", { class: "note" }, "Point at a token, tap it, or move with the arrow keys."));
      return;
    }
    $("token-title").textContent = clean(view.tokens[i]).trim() || "(white space)";
    const others = into.filter(([j]) => j !== i);
    $("token-body").replaceChildren(
      el("p", { class: "note" }, `Token ${i + 1} of ${grouped(n)}; head ${view.heads[slot]}. Gets ${written(received(i), "share")} of the attention of those that may see it.`),
      el("p", { class: "note" }, `Looks at about ${written(Math.exp(entropy(i)))} tokens at once (entropy ${written(entropy(i), "nats")}); its value is ${written(long(i))} times as long as the mean.`),
      ...list(byValue ? `What these ${out.length} bring it, by the length of their values` : "Looks at", out, i, "Nothing holds as much as half a percent of its attention."),
      ...list(others.length > MOST ? `Looked at by ${others.length} tokens, most by` : "Looked at by", others.slice(0, MOST), i, `It is among the top-${top} keys of no other token.`));
  }

  function mark(i) {
    pinned = i;
    $("unpin").hidden = i === null;
    show(i);
  }

  /* chunks above may grow when they are filled, so look again once they are */
  function visit(i, gentle = false) {
    cursor = i;
    mark(i);
    const there = (times) => {
      fill(chunkOf(i));
      const span = spanOf(i);
      const at = span.getBoundingClientRect(), frame = box.getBoundingClientRect();
      if (!gentle || at.top < frame.top + 24 || at.bottom > frame.bottom - 24) box.scrollTop += at.top - frame.top - frame.height / 2.6;
      if (times) requestAnimationFrame(() => there(times - 1));
    };
    there(3);
  }

  box.addEventListener("pointerover", (event) => {
    if (event.pointerType !== "touch" && pinned === null && event.target.dataset.i) show(Number(event.target.dataset.i));
  });
  box.addEventListener("pointerleave", () => { if (pinned === null) show(null); });
  box.addEventListener("click", (event) => {
    if (!event.target.dataset.i) return;
    cursor = Number(event.target.dataset.i);
    mark(pinned === cursor ? null : cursor);
  });
  box.addEventListener("focus", () => { if (pinned === null && box.matches(":focus-visible")) show(cursor); });
  box.addEventListener("keydown", (event) => {
    const far = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: "up", ArrowDown: "down", Home: -n, End: n, PageUp: -200, PageDown: 200 }[event.key];
    if (event.key === "Escape") mark(null);
    if (event.key === "Enter") mark(pinned === cursor ? null : cursor);
    if (far === undefined) return;
    event.preventDefault();
    const to = typeof far === "string" ? line(far === "up" ? -1 : 1) : cursor + far;
    visit(Math.max(0, Math.min(n - 1, to)), true);
  });

  /* the token nearest above or below, by where it stands on the screen */
  function line(way) {
    const here = spanOf(cursor)?.getBoundingClientRect();
    if (!here) return cursor + way;
    let best = cursor + way, least = Infinity, row = null;
    for (let i = cursor + way; i >= 0 && i < n && Math.abs(i - cursor) < 120; i += way) {
      const there = spanOf(i)?.getBoundingClientRect();
      if (!there) break;
      if (Math.abs(there.top - here.top) < 4) continue;
      row ??= there.top;
      if (Math.abs(there.top - row) > 4) break;
      if (Math.abs(there.left - here.left) < least) [best, least] = [i, Math.abs(there.left - here.left)];
    }
    return best;
  }
  $("unpin").addEventListener("click", () => { mark(null); box.focus(); });

  /* ---------- the strip over the whole text ---------- */
  function strip() {
    const many = Math.min(n, 480), z = new Float32Array(many), from = [];
    for (let b = 0; b < many; b++) {
      from.push(Math.floor((b * n) / many));
      for (let i = from[b]; i < Math.max(from[b] + 1, Math.floor(((b + 1) * n) / many)); i++) z[b] = Math.max(z[b], heat(i));
    }
    const bare = { visible: false, fixedrange: true };
    const trace = { type: "heatmap", z: [z], x: from, showscale: false, hovertemplate: "from token %{x}<extra></extra>" };
    paint($("strip"), [trace], { margin: { l: 0, r: 0, t: 0, b: 0 }, xaxis: bare, yaxis: bare, dragmode: false }).then((place) => {
      if (place.bound) return;
      place.bound = true;
      place.on("plotly_click", (event) => visit(Number(event.points[0].x)));
    });
  }

  /* ---------- heads ---------- */
  function tint() {
    const [key, what, make] = SHADES[$("shade").value];
    heat = make();
    $("shade-key").textContent = key;
    $("shade-what").textContent = what;
  }
  $("shade").addEventListener("change", () => open(slot));

  function open(s) {
    slot = s;
    select.value = String(s);
    incoming = turn();
    measure();
    tint();
    const sum = Array.from({ length: Math.min(n, 2000) }, (_, i) => outgoing(i).reduce((a, [, w]) => a + w, 0));
    const held = sum.reduce((a, b) => a + b, 0) / sum.length;
    $("view-about").textContent = `${grouped(n)} tokens. The top-${top} keys per query are kept; in this head they hold ${written(held, "share")} of its attention on average.`;
    const again = shown;
    shown = undefined;
    show(again);
    if (page.drawn.has($("strip"))) strip();
  }

  const parts = (head) => page.roles.filter((r) => r.heads.some(([h]) => h === head)).map((r) => r.name);
  view.heads.forEach((head, s) => select.append(el("option", { value: s }, [head, ...new Set(parts(head))].slice(0, 3).join(", "))));
  select.addEventListener("change", () => { open(Number(select.value)); if (maps.length) pick(view.heads[slot]); });
  page.listeners.push((head) => { const s = view.heads.indexOf(head); if (s >= 0 && s !== slot) open(s); });

  /* the strongest looks of a head that tell something: not at the text's first token, not at itself, no pair twice */
  page.examples = (head) => {
    const s = view.heads.indexOf(head);
    if (s < 0) return el("div", {}, el("h4", {}, "Examples"), el("p", { class: "note" }, `The text below holds heads ${view.heads.join(", ")}.`));
    const found = [];
    for (let i = 1; i < n; i++) for (const [k, w] of outgoing(i, s)) if (k !== 0 && k !== i && w > 0.05) found.push([i, k, w]);
    found.sort((a, b) => b[2] - a[2]);
    const pairs = new Set(), best = found.filter(([i, k]) => {
      const pair = `${view.tokens[i]}\n${view.tokens[k]}`;
      return view.tokens[i].trim() && !pairs.has(pair) && pairs.add(pair);
    }).slice(0, 5);
    const list = best.map(([i, k, w]) => el("li", {}, el("button", { type: "button", onclick: () => { open(s); $("text").scrollIntoView(); visit(i); } },
      el("span", { class: "where" }, el("b", {}, clean(view.tokens[i]).trim()), " looks at ", clean(view.tokens.slice(Math.max(0, k - 2), k).join("")), el("i", {}, clean(view.tokens[k])), clean(view.tokens.slice(k + 1, k + 3).join(""))),
      el("span", { class: "how" }, share(w)))));
    const none = "It looks at nothing but the first token and itself with more than 5% of its attention.";
    return el("div", {}, el("h4", {}, "Examples from the text"), best.length ? el("ol", { class: "examples" }, ...list) : el("p", { class: "note" }, none));
  };

  /* the whole pattern of a head on the first tokens, as the card shows it */
  page.pattern = (head) => {
    const [layer, number] = head.split(".").map(Number), side = view.opening;
    const at = (view.layers.indexOf(layer) * view.across + number) * side * side;
    if (view.layers.indexOf(layer) < 0 || number >= view.across || !side) return null;
    const share = (q, k) => (opening[at + q * side + k] / 255) ** 2;
    const canvas = el("canvas", { width: side, height: side, class: "pattern", role: "img", "aria-label": `Pattern of head ${head} on the first ${side} tokens of the text` });
    const says = el("p", { class: "note" }, `The first ${side} tokens: a row is a token that looks, a column one that is looked at.`);
    const steps = page.theme[dark() ? "dark" : "light"].layout.colorscale.sequential.map(([, c]) => [1, 3, 5].map((i) => parseInt(c.slice(i, i + 2), 16)));
    const image = new ImageData(side, side);
    for (let i = 0; i < side * side; i++) {
      const place = (opening[at + i] / 255) * (steps.length - 1), low = Math.min(steps.length - 2, Math.floor(place));
      image.data.set([...steps[low].map((c, j) => c + (steps[low + 1][j] - c) * (place - low)), 255], 4 * i);
    }
    canvas.getContext("2d").putImageData(image, 0, 0);
    const point = (event) => {
      const box = canvas.getBoundingClientRect();
      const [k, q] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height].map((x) => Math.max(0, Math.min(side - 1, Math.floor(x * side))));
      const word = (i) => `“${clean(view.tokens[i]).trim() || "␣"}”`;
      says.textContent = `${word(q)} (${q}) gives ${written(share(q, k), "share")} to ${word(k)} (${k}).`;
    };
    canvas.addEventListener("pointermove", point);
    canvas.addEventListener("pointerdown", point);
    return el("div", {}, el("h4", {}, "Its pattern in the text"), canvas, says);
  };

  for (const chunk of chunks) { chunk.place.chunk = chunk; box.append(chunk.place); }
  open(0);
  lay();
  for (const chunk of chunks) near.observe(chunk.place);
  new ResizeObserver(lay).observe(box);
  whenSeen($("strip"), strip);
}
