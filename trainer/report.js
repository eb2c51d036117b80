"use strict";
// The page's only script. Corpus text reaches the document as text nodes alone, never as markup.

const $ = (id) => document.getElementById(id);
const make = (tag, attributes = {}, ...children) => {
  const found = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") for (const [event, f] of Object.entries(value)) found.addEventListener(event, f);
    else if (value !== null && value !== undefined) found.setAttribute(name, value);
  }
  found.append(...children);
  return found;
};
const short = (x) => (x === 0 ? "0" : Math.abs(x) >= 1e5 || Math.abs(x) < 1e-3 ? x.toExponential(1) : String(Number(x.toPrecision(3))));
const percent = (x) => (x === 0 ? "never" : `${short(100 * x)} %`);
const about = JSON.parse($("about").textContent);

// --- blocks: base64 of deflate (RFC 1951) of a safetensors file or of JSON ------------------------------------------

const LENGTHS = [3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 23, 27, 31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258];
const DISTANCES = [1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 33, 49, 65, 97, 129, 193, 257, 385, 513, 769, 1025, 1537, 2049, 3073, 4097, 6145,
  8193, 12289, 16385, 24577];
const lengthBits = (i) => (i < 8 || i === 28 ? 0 : (i - 4) >> 2);
const distanceBits = (i) => (i < 4 ? 0 : (i - 2) >> 1);
const ORDER = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15];

function huffman(lengths) {
  const longest = Math.max(1, ...lengths), count = new Uint16Array(17), next = new Uint16Array(17);
  const symbols = new Uint16Array(1 << longest), sizes = new Uint8Array(1 << longest);
  for (const n of lengths) if (n) count[n]++;
  for (let n = 1, code = 0; n <= longest; n++) next[n] = code = (code + count[n - 1]) << 1;
  lengths.forEach((n, symbol) => {
    if (!n) return;
    let code = next[n]++, reversed = 0;
    for (let i = 0; i < n; i++, code >>= 1) reversed = (reversed << 1) | (code & 1);
    for (let i = reversed; i < 1 << longest; i += 1 << n) { symbols[i] = symbol; sizes[i] = n; }
  });
  return { symbols, sizes, longest };
}

function inflate(source) {
  let out = new Uint8Array(source.length * 5 + 1024), size = 0, at = 0, hold = 0, have = 0;
  const need = (n) => { while (have < n) { hold |= source[at++] << have; have += 8; } };
  const bits = (n) => { need(n); const value = hold & ((1 << n) - 1); hold >>>= n; have -= n; return value; };
  const symbol = (table) => {
    need(table.longest);
    const i = hold & ((1 << table.longest) - 1), n = table.sizes[i];
    hold >>>= n; have -= n;
    return table.symbols[i];
  };
  const room = (n) => {
    if (size + n <= out.length) return;
    const larger = new Uint8Array(2 * (size + n));
    larger.set(out.subarray(0, size));
    out = larger;
  };
  const fixed = () => [[...Array(288).keys()].map((i) => (i < 144 ? 8 : i < 256 ? 9 : i < 280 ? 7 : 8)), Array(30).fill(5)];
  const dynamic = () => {
    const literals = bits(5) + 257, distances = bits(5) + 1, codes = bits(4) + 4, small = Array(19).fill(0), all = [];
    for (let i = 0; i < codes; i++) small[ORDER[i]] = bits(3);
    const table = huffman(small);
    while (all.length < literals + distances) {
      const s = symbol(table);
      if (s < 16) all.push(s);
      else {
        const [what, times] = s === 16 ? [all[all.length - 1], 3 + bits(2)] : [0, s === 17 ? 3 + bits(3) : 11 + bits(7)];
        for (let i = 0; i < times; i++) all.push(what);
      }
    }
    return [all.slice(0, literals), all.slice(literals)];
  };
  for (let last = 0; !last;) {
    last = bits(1);
    const kind = bits(2);
    if (kind === 0) {
      bits(have & 7);
      const n = bits(16); bits(16); room(n);
      for (let i = 0; i < n; i++) out[size++] = bits(8);
      continue;
    }
    const [literals, distances] = (kind === 1 ? fixed() : dynamic()).map(huffman);
    for (let s = symbol(literals); s !== 256; s = symbol(literals)) {
      if (s < 256) { room(1); out[size++] = s; continue; }
      const n = LENGTHS[s - 257] + bits(lengthBits(s - 257)), d = symbol(distances), back = DISTANCES[d] + bits(distanceBits(d));
      room(n);
      for (let i = 0; i < n; i++, size++) out[size] = out[size - back];
    }
  }
  return out.subarray(0, size);
}

const opened = new Map();
function block(name) {
  if (!opened.has(name)) {
    const bytes = inflate(Uint8Array.from(atob($(`block-${name}`).textContent.trim()), (c) => c.charCodeAt(0)));
    opened.set(name, name.startsWith("words") ? JSON.parse(new TextDecoder().decode(bytes)) : tensors(bytes));
  }
  return opened.get(name);
}

function tensors(bytes) {
  const length = Number(new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(0, true)), found = {};
  for (const [name, { dtype, shape, data_offsets: [from, to] }] of
    Object.entries(JSON.parse(new TextDecoder().decode(bytes.subarray(8, 8 + length))))) {
    if (name === "__metadata__") continue;
    const data = bytes.slice(8 + length + from, 8 + length + to).buffer;
    found[name] = { data: new { U8: Uint8Array, I32: Int32Array, F32: Float32Array }[dtype](data), width: shape.slice(1).reduce((a, b) => a * b, 1) };
  }
  return found;
}

// --- one run --------------------------------------------------------------------------------------------------------

const state = { run: about.findIndex((r) => r.latents), sort: "index", down: false, page: 0, order: [], query: "", deep: false };
const ROWS = 25;
const run = () => about[state.run];
const table = (name, j = state.run) => block(`table${j}`)[name];
const word = (token, text = run().text) => block(`words${text}`)[token] ?? `<${token}>`;
const visible = (text) => text.replace(/\n/g, "⏎").replace(/\t/g, "⇥");
const cells = (array, i) => array.data.subarray(i * array.width, (i + 1) * array.width);
const peaks = (i) => {
  if (run().text < 0) return [];
  return [...new Set([...cells(table("peaks"), i)].filter((t) => t >= 0))].map((t) => word(t));
};

function details(i) {
  const here = run(), all = block(`latents${state.run}.${Math.floor(i / here.block)}`), found = {};
  for (const [name, array] of Object.entries(all)) found[name] = cells(array, i % here.block);
  return found;
}

function contextOf(one, c) {
  const here = run(), row = one.rows[c];
  if (row < 0) return null;
  const { tokens, documents, positions } = block(`text${here.text}`);
  let first = row, last = row;
  while (first > 0 && row - first < here.before && positions.data[first - 1] === positions.data[first] - 1) first--;
  while (last + 1 < tokens.data.length && last - row < here.after && positions.data[last + 1] === positions.data[last] + 1) last++;
  const width = here.before + 1 + here.after, strip = [];
  for (let r = first; r <= last; r++) {
    strip.push({ text: word(tokens.data[r]), value: (one.strips[c * width + r - row + here.before] / 255) * one.scales[c], peak: r === row });
  }
  return { document: documents.data[row], value: one.values[c], strip };
}

// --- the table ------------------------------------------------------------------------------------------------------

function matches(query) {
  const here = run(), text = query.trim().toLowerCase();
  if (!text) return () => true;
  const number = /^\d+$/.test(text) ? Number(text) : -1;
  const tokens = new Set();
  if (here.text >= 0) for (const [t, w] of Object.entries(block(`words${here.text}`))) if (w.toLowerCase().includes(text)) tokens.add(Number(t));
  const rows = state.deep && here.text >= 0 ? occurrences(text) : null;
  return (i) =>
    i === number || (here.labels[i] ?? "").toLowerCase().includes(text) || cells(table("peaks"), i).some((t) => tokens.has(t)) ||
    (rows !== null && around(i, rows, text, tokens));
}

function occurrences(text) {
  // How many rows up to each one take part in an occurrence of the text.
  const { tokens } = block(`text${run().text}`), starts = new Int32Array(tokens.data.length + 1), parts = [];
  tokens.data.forEach((t, r) => { parts.push(word(t).toLowerCase()); starts[r + 1] = starts[r] + parts[r].length; });
  const whole = parts.join(""), sums = new Int32Array(tokens.data.length + 1);
  let r = 0;
  for (let at = whole.indexOf(text); at >= 0; at = whole.indexOf(text, at + 1)) {
    while (starts[r + 1] <= at) r++;
    for (let q = r; q < tokens.data.length && starts[q] < at + text.length; q++) sums[q + 1] = 1;
  }
  for (let q = 0; q < tokens.data.length; q++) sums[q + 1] += sums[q];
  return sums;
}

function around(i, sums, text, tokens) {
  const one = details(i), here = run();
  for (let c = 0; c < one.rows.length; c++) {
    if (one.rows[c] < 0) continue;
    const first = Math.max(0, one.rows[c] - here.before), last = Math.min(sums.length - 2, one.rows[c] + here.after);
    if (sums[last + 1] > sums[first]) {
      // Only now: it joins the text, to see whether the whole occurrence lies in this sequence.
      if (contextOf(one, c).strip.map((token) => token.text).join("").toLowerCase().includes(text)) return true;
    }
  }
  return here.logits && one.promoted_tokens.some((t) => tokens.has(t));
}

function refresh(page = 0) {
  const here = run(), keep = matches(state.query), values = state.sort === "index" ? null : table(state.sort).data;
  state.order = [...Array(here.latents).keys()].filter(keep);
  const sign = state.down ? -1 : 1;
  state.order.sort((a, b) => sign * (values ? values[a] - values[b] : a - b) || a - b);
  state.page = Math.min(page, Math.max(0, Math.ceil(state.order.length / ROWS) - 1));
  for (const button of document.querySelectorAll("th button")) {
    const own = button.dataset.sort === state.sort;
    button.parentElement.setAttribute("aria-sort", own ? (state.down ? "descending" : "ascending") : "none");
  }
  draw();
}

function draw() {
  const here = run(), rows = state.order.slice(state.page * ROWS, (state.page + 1) * ROWS);
  $("rows").replaceChildren(...rows.map((i, n) => {
    const open = () => show(i);
    const fires = make("td", { class: "fires" });
    if (here.labels[i]) fires.append(make("b", {}, here.labels[i]), " ");
    for (const text of peaks(i)) fires.append(make("span", { class: "token" }, visible(text)), " ");
    return make("tr", { tabindex: n ? -1 : 0, "data-latent": i, on: { click: open } },
      make("td", {}, String(i)), fires, make("td", {}, percent(table("density").data[i])), make("td", {}, short(table("maximum").data[i])),
      make("td", { class: "wide" }, short(table("mean").data[i])), make("td", { class: "wide" }, String(table("documents").data[i])),
      make("td", { class: "wide" }, table("cosine").data[i].toFixed(2)));
  }));
  const pages = Math.max(1, Math.ceil(state.order.length / ROWS));
  $("count").textContent = `${state.order.length.toLocaleString("en")} of ${here.latents.toLocaleString("en")} latents`;
  $("page").textContent = `page ${state.page + 1} of ${pages}`;
  $("before").disabled = state.page === 0;
  $("after").disabled = state.page >= pages - 1;
  $("note").textContent = here.text < 0 ? "The store of this run is not here: numbers only, no texts." : "";
}

function turn(by) {
  const pages = Math.ceil(state.order.length / ROWS);
  if (state.page + by < 0 || state.page + by >= pages) return false;
  state.page += by;
  draw();
  return true;
}

function focusRow(n) {
  const rows = [...$("rows").children];
  const row = rows[Math.max(0, Math.min(rows.length - 1, n))];
  if (!row) return;
  for (const other of rows) other.tabIndex = other === row ? 0 : -1;
  row.focus();
}

function tableKey(event) {
  const row = event.target.closest("tr"), n = [...$("rows").children].indexOf(row);
  const move = {
    ArrowDown: () => (n + 1 < $("rows").children.length ? focusRow(n + 1) : turn(1) && focusRow(0)),
    ArrowUp: () => (n > 0 ? focusRow(n - 1) : turn(-1) && focusRow(ROWS)),
    PageDown: () => turn(1) && focusRow(n), PageUp: () => turn(-1) && focusRow(n),
    Home: () => focusRow(0), End: () => focusRow(ROWS), Enter: () => show(Number(row.dataset.latent)),
  }[event.key];
  if (n < 0 || !move) return;
  event.preventDefault();
  move();
}

// --- a latent -------------------------------------------------------------------------------------------------------

function stripOf(context, most) {
  const strip = make("p", { class: "strip", lang: "" });
  for (const { text, value, peak } of context.strip) {
    const share = Math.min(1, value / (most || 1));
    const token = make("span", { class: peak ? "peak" : null, title: value > 0 ? `${visible(text)}  ${short(value)}` : null }, visible(text));
    if (share > 0) token.style.backgroundColor = `rgb(var(--fire) / ${(0.12 + 0.88 * share).toFixed(3)})`;
    if (share > 0.8) token.classList.add("strong");
    strip.append(token);
    if (text.includes("\n")) strip.append(make("wbr"));
  }
  return strip;
}

function contexts(one, most) {
  const here = run(), fifths = (one.rows.length - here.strongest) / here.each, groups = [["strongest, one a document", 0, here.strongest]];
  const names = ["top fifth of its activations", "second fifth", "third fifth", "fourth fifth", "lowest fifth"];
  for (let b = 0; b < fifths; b++) groups.push([names[b], here.strongest + b * here.each, here.strongest + (b + 1) * here.each]);
  return groups.flatMap(([name, from, to]) => {
    const found = [];
    for (let c = from; c < to; c++) {
      const context = contextOf(one, c);
      if (context) found.push(make("li", {}, make("span", { class: "value" }, short(context.value),
        make("small", {}, ` doc ${context.document}`)), stripOf(context, most)));
    }
    return found.length ? [make("h3", {}, name), make("ol", { class: "contexts" }, ...found)] : [];
  });
}

function histogram(one) {
  const counts = [...one.histogram], top = one.tops[0], used = counts.findLastIndex((c) => c > 0) + 1;
  if (!used) return make("p", { class: "soft" }, "never active on the rows looked at");
  const most = Math.max(...counts), ns = "http://www.w3.org/2000/svg", svg = document.createElementNS(ns, "svg");
  svg.setAttribute("viewBox", "0 0 300 90");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", "histogram of activations");
  const add = (tag, attributes, text = "") => {
    const part = document.createElementNS(ns, tag);
    for (const [name, value] of Object.entries(attributes)) part.setAttribute(name, value);
    part.textContent = text;
    svg.append(part);
    return part;
  };
  counts.slice(0, used).forEach((count, b) => {
    const height = (70 * count) / most, width = 300 / used;
    const bar = add("rect", { class: "bar", x: b * width, y: 72 - height, width: Math.max(0.5, width - 1), height });
    const title = document.createElementNS(ns, "title");
    title.textContent = `${short((top * b) / run().bins)} to ${short((top * (b + 1)) / run().bins)}: ${count}`;
    bar.append(title);
  });
  add("text", { x: 0, y: 87 }, "0");
  add("text", { x: 300, y: 87, "text-anchor": "end" }, short((top * used) / run().bins));
  return svg;
}

function others(name, ids, values, digits) {
  const found = [...ids].map((i, n) => [i, values[n]]).filter(([i]) => i >= 0);
  if (!found.length) return [];
  return [make("section", {}, make("h3", {}, name), make("ul", { class: "others" }, ...found.map(([i, value]) =>
    make("li", {}, make("button", { on: { click: () => show(i) } }, String(i)), ` ${value.toFixed(digits)} `,
      ...peaks(i).slice(0, 3).flatMap((text) => [make("span", { class: "token" }, visible(text)), " "])))))];
}

function effects(name, ids, values) {
  const found = [...ids].map((t, n) => [t, values[n]]).filter(([, value]) => value !== 0);
  return make("section", {}, make("h3", {}, name), make("p", { class: "tokens" }, ...found.flatMap(([t, value]) =>
    [make("span", { class: "token", title: short(value) }, run().text < 0 ? String(t) : visible(word(t))), " "])));
}

function show(i) {
  const here = run(), one = details(i), most = table("maximum").data[i], dialog = $("latent"), parts = [];
  state.shown = i;
  const at = state.order.indexOf(i);
  $("title").textContent = `latent ${i}`;
  $("name").textContent = here.labels[i] ?? "";
  $("facts").textContent = `active on ${percent(table("density").data[i])} of rows, in ${table("documents").data[i]} documents · ` +
    `largest ${short(most)}, mean ${short(table("mean").data[i])}`;
  $("earlier").disabled = at <= 0;
  $("later").disabled = at < 0 || at + 1 >= state.order.length;
  parts.push(make("section", {}, make("h3", {}, "activations"), histogram(one)));
  if (here.logits) {
    parts.push(effects("promotes", one.promoted_tokens, one.promoted_logits), effects("suppresses", one.suppressed_tokens, one.suppressed_logits));
  }
  parts.push(...others("nearest decoder rows (cosine)", one.neighbours, one.cosines, 2), ...others("active together (Jaccard)", one.coactive, one.jaccard, 2));
  const total = [...(one.subsets ?? [])].reduce((a, b) => a + b, 0);
  if (total) {
    const shares = here.subsets.map(([name, all], s) => [name, one.subsets[s] / total, all]).filter(([, x]) => x > 0).sort((a, b) => b[1] - a[1]);
    parts.push(make("section", {}, make("h3", {}, "corpus subsets (share of all rows)"), make("ul", { class: "subsets" }, ...shares.slice(0, 6).map(([name, share, all]) => {
      const bar = make("i", {});
      bar.style.width = `${(100 * share).toFixed(1)}%`;
      return make("li", {}, bar, make("span", {}, name), make("span", {}, `${(100 * share).toFixed(0)} % `, make("small", {}, `(${(100 * all).toFixed(0)} %)`)));
    }))));
  }
  $("side").replaceChildren(...parts);
  const texts = here.text < 0 ? [] : contexts(one, most);
  $("texts").replaceChildren(...(texts.length ? texts : [make("p", { class: "soft" }, "no contexts")]));
  history.replaceState(null, "", `#${here.digest}/${i}`);
  if (!dialog.open) dialog.showModal();
  $("body").scrollTop = 0;
}

function step(by) {
  const next = state.order[state.order.indexOf(state.shown) + by];
  if (next !== undefined) show(next);
}

function fromAddress() {
  const [, digest, index] = location.hash.match(/^#([0-9a-f]{12})\/(\d+)$/) ?? [];
  const j = about.findIndex((r) => r.digest === digest && Number(index) < r.latents);
  if (j < 0) return;
  choose(j);
  show(Number(index));
}

// --- events ---------------------------------------------------------------------------------------------------------

function choose(j) {
  state.run = j;
  $("run").value = String(j);
  refresh();
}

function start() {
  $("run").replaceChildren(...about.map((r, j) => make("option", { value: j, disabled: r.latents ? null : "" }, r.label)));
  $("run").addEventListener("change", () => choose(Number($("run").value)));
  let timer = 0;
  $("search").addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(() => { state.query = $("search").value; refresh(); }, state.deep ? 400 : 120);
  });
  $("search").addEventListener("keydown", (event) => {
    if (event.key === "Escape") { $("search").value = state.query = ""; refresh(); $("search").blur(); }
    if (event.key === "Enter" || event.key === "ArrowDown") { event.preventDefault(); clearTimeout(timer); state.query = $("search").value; refresh(); focusRow(0); }
  });
  $("deep").addEventListener("change", () => { state.deep = $("deep").checked; refresh(); });
  for (const button of document.querySelectorAll("th button")) {
    button.addEventListener("click", () => {
      const name = button.dataset.sort;
      [state.down, state.sort] = [state.sort === name ? !state.down : name !== "index", name];
      refresh();
    });
  }
  $("before").addEventListener("click", () => turn(-1));
  $("after").addEventListener("click", () => turn(1));
  $("rows").addEventListener("keydown", tableKey);
  $("earlier").addEventListener("click", () => step(-1));
  $("later").addEventListener("click", () => step(1));
  $("close").addEventListener("click", () => $("latent").close());
  $("latent").addEventListener("click", (event) => { if (event.target === $("latent")) $("latent").close(); });
  $("latent").addEventListener("close", () => {
    history.replaceState(null, "", location.pathname + location.search);
    const at = state.order.indexOf(state.shown);
    if (at >= 0) { state.page = Math.floor(at / ROWS); draw(); focusRow(at % ROWS); }
  });
  document.addEventListener("keydown", (event) => {
    const typing = event.target.matches("input, select") || event.ctrlKey || event.metaKey || event.altKey;
    if ($("latent").open) {
      if (event.key === "ArrowLeft" || event.key === "ArrowRight") step(event.key === "ArrowLeft" ? -1 : 1);
    } else if (event.key === "/" && !typing) {
      event.preventDefault();
      $("search").focus();
    }
  });
  addEventListener("hashchange", fromAddress);
  refresh();
  fromAddress();
}

if (state.run >= 0) start();
