/**
 * The viewer: attention of one or more samples on their pictures, words, layers and heads.
 *
 * `Samples` decodes the numbers, `Viewer` holds one state object and draws all views from it. Every
 * gesture changes the state through `Viewer.set`; the address hash holds it. Values are decoded
 * from the rows that Python computed; the only arithmetic is means over chosen rows, the factor of
 * a lift (the number of visible keys), and sums over keys inside a box.
 *
 * @typedef {{dtype: string, shape: number[], offset: number}} ArrayAbout
 * @typedef {{codes: Uint8Array, largest: Float32Array, mass: Float32Array, null: Float32Array,
 *   entropy: Float32Array, visible: Float32Array}} QueryBlock  numbers of one query
 * @typedef {{text: string, gap: string, kind: string, role: string | null, position: number,
 *   row: number | null, before: number | null, visual?: [string, number], tokens?: number}} Word
 * @typedef {{title: string, of: any[], width: number, height: number, src: string | null,
 *   reason: string}} Picture
 * @typedef {Map<number, number[] | null>} Selection  heads by layer; null for all heads
 */

const HIDDEN = 255;
const LEVELS = 254;
const DIM = 0.42; // share of the photo's light that remains; the rest is left for attention
const WARM = [255, 232, 190];
const COOL = [92, 168, 255];
const PINS = ["#1f6fb2", "#c2560c", "#0b8a6c", "#a3318f", "#7a6a00", "#5b5fc7"];
const GROUP_COLORS = {
  image: "#3f86c6", video: "#6bb8d6", patches: "#3f86c6", first: "#8a8f96", special: "#b3b7bc",
  class: "#8a8f96", register: "#b07aa1", prompt: "#e09a3e", answer: "#2f9e83",
};
const MOST_PANELS = 24;

/** @type {(tag: string, attributes?: Record<string, any>, ...children: any[]) => any} */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "class") made.className = value;
    else if (value !== null && value !== undefined && value !== false) {
      made.setAttribute(name, value === true ? "" : String(value));
    }
  }
  for (const child of children) made.append(child); // strings become text, never markup
  return made;
}

/** @param {number} value */
export function formatted(value) {
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size < 1e-4) return value.toExponential(1).replace("e-", "e−");
  return size >= 100 ? value.toFixed(0) : size >= 0.1 ? value.toPrecision(3) : value.toPrecision(2);
}

/** Numbers of one sample; those of a query are in `block(query)`. */
class SampleData {
  /**
   * @param {any} header
   * @param {Record<string, any> | null} arrays of all queries; null if blocks are fetched
   * @param {((query: number) => Promise<QueryBlock>) | null} fetchBlock
   */
  constructor(header, arrays, fetchBlock = null) {
    this.header = header;
    this.arrays = arrays;
    this.fetchBlock = fetchBlock;
    /** @type {number[]} */
    this.queue = []; // queries to fetch, the first one next
    /** @type {Set<number>} */
    this.wanted = new Set();
    this.running = 0;
    this.arrived = () => {};
    this.failed = (/** @type {Error} */ _) => {};
    /** @type {Map<number, QueryBlock>} */
    this.blocks = new Map();
    this.nKeys = header.keys.token.length;
    this.mostHeads = Math.max(...header.heads);
    this.rowOf = new Map(header.rows.map((row, i) => [row.join(","), i]));
    this.layerIndex = new Map(header.layers.map((layer, i) => [layer, i]));
    this.queryOf = new Map(header.queries.map((position, i) => [position, i]));
    this.keysOf = header.pictures.map(() => []);
    header.keys.picture.forEach((picture, key) => {
      if (picture >= 0) this.keysOf[picture].push(key);
    });
    this.visualKeys = header.keys.picture.flatMap((picture, key) => (picture >= 0 ? [key] : []));
    this.wordAt = new Map();
    for (const word of header.words) if (!word.visual) this.wordAt.set(word.position, word);
  }

  /** @param {number} query @returns {QueryBlock | undefined} */
  block(query) {
    let found = this.blocks.get(query);
    if (!found && this.arrays) {
      found = /** @type {any} */ ({});
      for (const [name, { data, shape }] of Object.entries(this.arrays)) {
        const size = shape.slice(1).reduce((a, b) => a * b, 1);
        found[name] = data.subarray(query * size, (query + 1) * size);
      }
      this.blocks.set(query, found);
    }
    if (!found && this.fetchBlock && !this.wanted.has(query)) {
      this.wanted.add(query);
      this.queue.push(query);
      this.fetchNext();
    }
    return found;
  }

  /** Fetch these queries before the others. @param {number[]} queries */
  prefer(queries) {
    if (!this.queue.length) return;
    const first = queries.filter((query) => this.queue.includes(query));
    this.queue = [...first, ...this.queue.filter((query) => !first.includes(query))];
  }

  async fetchNext() {
    if (this.running >= 2 || !this.queue.length || !this.fetchBlock) return;
    this.running++;
    await null; // all queries of one drawing are in the queue before the first is fetched
    const query = /** @type {number} */ (this.queue.shift());
    try {
      this.blocks.set(query, await this.fetchBlock(query));
      this.arrived();
    } catch (error) {
      this.queue = [];
      this.failed(/** @type {Error} */ (error));
    }
    this.running--;
    this.fetchNext();
  }

  /**
   * Mean over queries and chosen rows of each key that at least one of them may attend to.
   * @param {number[]} queries @param {Selection} selection @param {string} measure
   * @returns {Float64Array} NaN for hidden keys
   */
  values(queries, selection, measure) {
    const n = this.nKeys;
    const total = new Float64Array(n);
    const count = new Float64Array(n);
    for (const query of queries) {
      const block = this.block(query);
      if (!block) continue;
      for (const [row, weight, layer] of this.terms(selection, measure)) {
        const factor = measure === "lift" ? block.visible[layer] : 1;
        const scale = (block.largest[row] * weight * factor) / (LEVELS * LEVELS);
        const codes = block.codes;
        for (let key = 0, at = row * n; key < n; key++, at++) {
          const code = codes[at];
          if (code !== HIDDEN) {
            total[key] += code * code * scale;
            count[key] += weight;
          }
        }
      }
    }
    const factors = measure === "lift" ? this.header.keys.lift : null;
    for (let key = 0; key < n; key++) {
      total[key] = count[key] ? (total[key] / count[key]) * (factors ? factors[key] : 1) : NaN;
    }
    return total;
  }

  /** @param {Selection} selection @param {string} measure @returns {[number, number, number][]} */
  terms(selection, measure) {
    if (measure.startsWith("rollout")) {
      const which = this.header.rollout_rows[measure === "rollout" ? 0 : 1];
      return [[this.rowOf.get(which.join(",")), 1, 0]];
    }
    /** @type {[number, number, number][]} */
    const out = [];
    for (const [layer, heads] of selection) {
      const index = this.layerIndex.get(layer);
      if (index === undefined) continue;
      const all = this.header.heads[index];
      if (heads === null || heads.length === all) {
        out.push([this.rowOf.get(`${layer},${this.header.mean}`), all, index]);
        continue;
      }
      for (const head of heads) {
        const row = this.rowOf.get(`${layer},${head}`);
        if (row !== undefined) out.push([row, 1, index]);
      }
    }
    return out;
  }

  /** @param {number} layer @param {number} head */
  hasRow(layer, head) {
    return this.rowOf.has(`${layer},${head}`) || this.header.heads[this.layerIndex.get(layer)] === 1;
  }

  /**
   * Share of some groups, its null and the entropy of a head, as means over queries.
   * @param {number[]} queries @param {number} layer index @param {number} head
   * @param {number[]} groups
   */
  sums(queries, layer, head, groups) {
    const [heads, nGroups] = [this.mostHeads, this.header.groups.length];
    let [share, even, entropy, n] = [0, 0, 0, 0];
    for (const query of queries) {
      const block = this.block(query);
      if (!block) continue;
      const at = (layer * heads + head) * nGroups;
      let [mass, expected] = [0, 0];
      for (const group of groups) {
        mass += block.mass[at + group];
        expected += block.null[layer * nGroups + group];
      }
      if (Number.isNaN(mass)) continue;
      share += mass;
      even += expected;
      entropy += block.entropy[layer * heads + head];
      n++;
    }
    return n ? { share: share / n, even: even / n, entropy: entropy / n }
      : { share: NaN, even: NaN, entropy: NaN };
  }

  /** @param {number[]} queries @param {[number, number, number]} term @param {number[]} keys */
  shareOn(queries, term, keys) {
    let [total, n] = [0, 0];
    for (const query of queries) {
      const block = this.block(query);
      if (!block) continue;
      const scale = block.largest[term[0]] / (LEVELS * LEVELS);
      let [sum, seen] = [0, false];
      for (const key of keys) {
        const code = block.codes[term[0] * this.nKeys + key];
        if (code !== HIDDEN) { sum += code * code; seen = true; }
      }
      if (seen) { total += sum * scale; n++; }
    }
    return n ? total / n : NaN;
  }

  /** Keys that are sinks in one of the chosen heads. @param {Selection} selection */
  sinks(selection) {
    const found = new Set();
    for (const [layer, heads] of selection) {
      for (const [key, of] of Object.entries(this.header.sinks[layer] ?? {})) {
        if (heads === null || heads.some((head) => of.includes(head))) found.add(Number(key));
      }
    }
    return found;
  }
}

/** @param {string} text */
function bytesOf(text) {
  if ("fromBase64" in Uint8Array) return /** @type {any} */ (Uint8Array).fromBase64(text);
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes;
}

/** @param {Uint8Array} bytes */
async function unzipped(bytes) {
  const stream = new Blob([/** @type {any} */ (bytes)]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

/** @param {Record<string, ArrayAbout>} about @param {ArrayBuffer} buffer */
export function arraysOf(about, buffer) {
  const kinds = { uint8: Uint8Array, float32: Float32Array };
  /** @type {Record<string, {data: any, shape: number[]}>} */
  const out = {};
  for (const [name, { dtype, shape, offset }] of Object.entries(about)) {
    const size = shape.reduce((a, b) => a * b, 1);
    out[name] = { data: new kinds[dtype](buffer, offset, size), shape };
  }
  return out;
}

/** Colours of cells by value from 0 to 1, as css strings. @param {boolean} dark */
function cellColors(dark) {
  const stops = dark
    ? [[0.24, 0, -0.01], [0.42, -0.03, -0.08], [0.66, -0.05, -0.11], [0.95, -0.02, -0.03]]
    : [[0.965, 0, 0], [0.8, -0.03, -0.06], [0.54, -0.04, -0.12], [0.28, 0, -0.1]];
  const out = [];
  for (let i = 0; i < 256; i++) {
    const at = (i / 255) * 3;
    const from = Math.min(2, Math.floor(at));
    const [l, a, b] = stops[from].map((c, j) => c + (stops[from + 1][j] - c) * (at - from));
    out.push(`oklab(${l.toFixed(4)} ${a.toFixed(4)} ${b.toFixed(4)})`);
  }
  return out;
}

/** Red, green and blue of css colours, as bytes. @param {string[]} colors */
function levelsOf(colors) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [colors.length, 1];
  const c = /** @type {CanvasRenderingContext2D} */ (
    canvas.getContext("2d", { willReadFrequently: true }));
  colors.forEach((color, x) => { c.fillStyle = color; c.fillRect(x, 0, 1, 1); });
  return c.getImageData(0, 0, colors.length, 1).data;
}

/** @param {HTMLCanvasElement} canvas @param {number} width @param {number} height */
function sized(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  const [w, h] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== w || canvas.height !== h) { canvas.width = w; canvas.height = h; }
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  context.font = "12px system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', sans-serif";
  context.textBaseline = "middle";
  return context;
}

/** A scale of values: where a value is between -1 and 1, and its numbers. */
class Scale {
  /** @param {string} meaning @param {Iterable<number>} values @param {string} label */
  constructor(meaning, values, label) {
    this.meaning = meaning;
    this.label = label;
    this.note = "";
    const finite = Float64Array.from([...values].filter((v) => Number.isFinite(v))).sort();
    const last = finite.length ? finite[finite.length - 1] : 0;
    if (meaning === "amount") {
      const bulk = finite.length ? finite[Math.floor(0.99 * (finite.length - 1))] : 0;
      this.end = last || 1;
      if (bulk > 0 && last > 6 * bulk) {
        this.end = bulk;
        this.note = `ends at the 99th percentile; largest: ${formatted(last)}`;
      }
    } else if (meaning === "ratio") {
      const logs = finite.filter((v) => v > 0).map((v) => Math.abs(Math.log2(v)));
      this.end = Math.min(4, Math.max(0.5, ...(logs.length ? [logs.reduce((a, b) => Math.max(a, b), 0)] : [0.5])));
    } else {
      this.end = finite.reduce((most, v) => Math.max(most, Math.abs(v)), 0) || 1;
    }
  }

  /** @param {number} value @returns {number} -1 to 1 */
  at(value) {
    if (this.meaning === "amount") return Math.sqrt(Math.min(1, Math.max(0, value / this.end)));
    const of = this.meaning === "ratio" ? Math.log2(Math.max(value, 1e-30)) : value;
    return Math.max(-1, Math.min(1, of / this.end));
  }

  /** @returns {[number, string][]} place and number of each tick */
  ticks() {
    if (this.meaning === "amount") {
      return [0, 0.25, 0.5, 0.75, 1].map((t) => [t, formatted(t * t * this.end)]);
    }
    if (this.meaning === "ratio") {
      return [-1, -0.5, 0, 0.5, 1].map((t) => [t, formatted(2 ** (t * this.end))]);
    }
    return [-1, -0.5, 0, 0.5, 1].map((t) => [t, formatted(t * this.end)]);
  }
}

/** Light that is added at a place of a scale. @param {number} at -1 to 1 */
export function light(at) {
  const color = at >= 0 ? WARM : COOL;
  const size = Math.abs(at) * (1 - DIM);
  return color.map((c) => Math.round(c * size));
}

/** The page: its state, gestures and views. */
export class Viewer {
  /**
   * @param {HTMLElement} root
   * @param {any} header
   * @param {(SampleData | null)[]} samples
   * @param {((index: number) => Promise<SampleData>) | null} load
   */
  constructor(root, header, samples, load = null) {
    this.root = root;
    this.header = header;
    this.samples = samples; // null for a sample that was not loaded
    this.load = load;
    this.titles = header.titles ?? samples.map((sample) => sample.header.title);
    this.connect();
    this.hover = { word: null, cell: null, key: null };
    this.state = this.initial(samples.findIndex((sample) => sample !== null));
    this.timings = { first: 0, draw: [] };
    this.table = { which: "patches", by: "value", down: true };
    /** @type {Map<string, Promise<HTMLImageElement | null>>} */
    this.photos = new Map();
    this.loaded = new Map();
    this.theme = "auto";
    this.layer = document.createElement("canvas"); // the light of one picture
    this.lightHatch = this.hatching("rgba(255,255,255,.28)");
    this.build();
    this.restore();
    window.addEventListener("hashchange", async () => {
      if (location.hash !== this.written && (await this.ready(wantedSamples()))) this.restore();
    });
    window.addEventListener("keydown", (event) => this.key(event));
    this.observer = new ResizeObserver(() => this.schedule());
    this.observer.observe(root);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.paint());
    this.paint();
  }

  get sample() { return /** @type {SampleData} */ (this.samples[this.state.sample]); }

  /** Draw again when rows arrive. */
  connect() {
    for (const sample of this.samples) {
      if (!sample) continue;
      sample.arrived = () => this.schedule();
      sample.failed = (error) => this.report(error);
    }
  }

  /** Load samples that were not loaded. @param {number[]} indices */
  async ready(indices) {
    try {
      for (const index of indices) {
        if (this.load && this.samples[index] === null) this.samples[index] = await this.load(index);
      }
      this.connect();
      return true;
    } catch (error) {
      this.report(/** @type {Error} */ (error));
      return false;
    }
  }

  /** @param {Error} error */
  report(error) { this.open("This cannot be shown", element("p", { role: "alert" }, error.message)); }

  get dark() {
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    return this.theme === "auto" ? dark : this.theme === "dark";
  }

  /** @param {number} index */
  initial(index) {
    const { header } = this.samples[index];
    const answer = header.words.find((word) => word.role === "generated" && word.before !== null);
    const last = [...header.words].reverse().find((word) => !word.visual && word.row !== null);
    const word = answer ?? last ?? null;
    return {
      sample: index,
      compare: null,
      pins: word ? [word.position] : header.queries.slice(0, 1),
      row: answer ? "before" : "word",
      heads: new Map([[header.layers[header.layers.length - 1], null]]),
      measure: "probability",
      sinks: false,
      each: false,
      box: null,
      value: "share",
    };
  }

  /** Change the state and draw. @param {Record<string, any>} changes */
  set(changes) {
    Object.assign(this.state, changes);
    const hash = this.hash();
    this.written = hash;
    try { history.replaceState(null, "", hash); } catch { location.hash = hash; }
    this.schedule();
  }

  hash() {
    const s = this.state;
    const parts = [["sample", s.sample]];
    if (s.compare !== null) parts.push(["compare", s.compare]);
    parts.push(["pins", s.pins.join(",")], ["row", s.row], ["heads", this.selectionText(s.heads)]);
    parts.push(["measure", s.measure]);
    if (s.sinks) parts.push(["sinks", "hidden"]);
    if (s.each) parts.push(["panels", "each"]);
    if (s.box) parts.push(["box", [s.box.picture, ...s.box.edges.map((e) => +e.toFixed(2))].join(",")]);
    if (s.value !== "share") parts.push(["value", s.value]);
    return `#${parts.map(([name, value]) => `${name}=${value}`).join("&")}`;
  }

  /** @param {Selection} heads */
  selectionText(heads) {
    return [...heads].flatMap(([layer, some]) =>
      some === null ? [`${layer}`] : some.map((head) => `${layer}.${head}`)).join(",");
  }

  /** Take the state from the address; parts that do not fit the data are left out. */
  restore() {
    const given = new URLSearchParams(location.hash.slice(1));
    const index = Number(given.get("sample") ?? 0);
    const state = this.initial(this.samples[index] ? index : this.state.sample);
    const data = this.samples[state.sample];
    const numbers = (name) => (given.get(name) ?? "").split(",").filter(Boolean).map(Number);
    const compare = given.get("compare");
    if (compare !== null && this.samples[Number(compare)] && Number(compare) !== state.sample) state.compare = Number(compare);
    if (["word", "before"].includes(given.get("row") ?? "")) state.row = given.get("row");
    const pins = numbers("pins").filter((p) => data.wordAt.has(p) || data.queryOf.has(p));
    if (pins.length) state.pins = pins;
    const heads = this.parsedSelection(given.get("heads") ?? "", data);
    if (heads.size) state.heads = heads;
    if (this.measures(data).some(([name]) => name === given.get("measure"))) {
      state.measure = given.get("measure");
    }
    state.sinks = given.get("sinks") === "hidden";
    state.each = given.get("panels") === "each";
    const box = numbers("box");
    if (box.length === 5 && data.header.pictures[box[0]] && box.every(Number.isFinite)) {
      state.box = { picture: box[0], edges: box.slice(1) };
    }
    if (["share", "lift", "entropy", "box"].includes(given.get("value") ?? "")) {
      state.value = given.get("value");
    }
    if (state.value === "box" && !state.box) state.value = "share";
    this.state = state;
    this.schedule();
  }

  /** @param {string} text @param {SampleData} data @returns {Selection} */
  parsedSelection(text, data) {
    /** @type {Selection} */
    const out = new Map();
    for (const part of text.split(",").filter(Boolean)) {
      const [layer, head] = part.split(".").map(Number);
      const index = data.layerIndex.get(layer);
      if (index === undefined) continue;
      if (head === undefined) out.set(layer, null);
      else if (data.hasRow(layer, head) && out.get(layer) !== null) {
        out.set(layer, [...(out.get(layer) ?? []), head]);
      }
    }
    return out;
  }

  /** Name and label of each measure. @param {SampleData} data @returns {string[][]} */
  measures(data) {
    return [
      ["probability", "Probability"], ["lift", "Lift"],
      ...(data.header.rollout ? [["rollout", "Rollout"], ["rollout-lift", "Rollout lift"]] : []),
    ];
  }

  // ---------------------------------------------------------------- structure of the page

  build() {
    const segments = (name, label) => element("div", { class: "v-segments", role: "group", "aria-label": label, "data-name": name });
    this.parts = {
      title: element("h1"),
      samples: element("select", { "aria-label": "Sample", onchange: (e) => this.choose(Number(e.target.value)) }),
      compare: element("select", {
        onchange: async (e) => {
          const other = e.target.value === "" ? null : Number(e.target.value);
          if (other === null || (await this.ready([other]))) this.set({ compare: other });
        },
      }),
      measure: segments("measure", "Measure"),
      row: segments("row", "Row"),
      each: segments("each", "Panels"),
      sinks: element("input", { type: "checkbox", onchange: (e) => this.set({ sinks: e.target.checked }) }),
      caption: element("h2"),
      panels: element("div", { class: "v-panels" }),
      scale: element("canvas", { class: "v-scale", role: "img" }),
      pictureText: element("p", { class: "v-readout" }),
      words: element("div", { class: "v-words", role: "group", "aria-label": "Words" }),
      wordText: element("p", { class: "v-readout" }),
      profile: element("canvas", { role: "img", "aria-label": "Shares of attention by layer" }),
      legend: element("div", { class: "v-legend" }),
      value: segments("value", "Value of a head"),
      heads: element("canvas", { tabindex: 0, role: "application", "aria-label": "Layers and heads: arrow keys move, Enter selects" }),
      headScale: element("canvas", { class: "v-scale", role: "img" }),
      headText: element("p", { class: "v-readout" }),
      matrix: element("canvas", { role: "img", "aria-label": "Attention of each word to each patch" }),
      matrixText: element("p", { class: "v-readout" }),
      which: segments("which", "Table"),
      rows: element("div", { class: "v-table", tabindex: 0, role: "region", "aria-label": "Table" }),
      foot: element("p", { class: "v-foot" }),
      live: element("div", { class: "v-live", "aria-live": "polite" }),
      dialog: element("dialog"),
    };
    const p = this.parts;
    const button = (label, act, title) => element("button", { class: "v-button", onclick: act, title }, label);
    const heading = (title, ...more) => element("div", { class: "v-heading" }, element("h2", {}, title), ...more);
    this.compareLabel = element("label", {}, "compare with", p.compare);
    this.sinksLabel = element("label", { title: "Leave attention sinks out of the picture and its scale" }, p.sinks, "hide sinks");
    const section = (name, ...children) => element("section", { class: `v-section ${name}` }, ...children);
    this.root.replaceChildren(
      element("div", { class: "v-top" }, p.title, p.samples, this.compareLabel),
      element("div", { class: "v-tools" }, p.measure, p.row, p.each, this.sinksLabel,
        element("span", { class: "v-spacer" }),
        button("Copy Python", () => this.showPython(), "The call that makes this picture"),
        button("Copy PNG", () => this.copyPicture(), "The pictures with their scale"),
        button("About", () => this.about(), "Provenance, errors, keys"),
        button("◐", () => this.nextTheme(), "Dark or light")),
      element("div", { class: "v-columns" },
        section("v-pictures", element("div", { class: "v-heading" }, p.caption), p.panels, p.scale, p.pictureText),
        section("v-text", heading("Words"), p.words, p.wordText),
        section("v-layers", heading("Attention by layer"), p.profile, p.legend),
        section("v-grid", heading("Heads by layer", p.value), p.heads, p.headScale, p.headText),
        section("v-of-words", heading("Words and patches"), p.matrix, p.matrixText),
        section("v-numbers", element("div", { class: "v-heading" }, p.which,
          button("CSV", () => this.download(), "Download this table")), p.rows)),
      p.foot, p.live, p.dialog);
    this.listenToHeads();
    this.listenToMatrix();
    this.listenToProfile();
  }

  /** @param {HTMLElement} group @param {string[][]} offer @param {string} chosen @param {(name: string) => void} act */
  fill(group, offer, chosen, act) {
    const signature = JSON.stringify(offer);
    if (group.dataset.offer !== signature) {
      group.dataset.offer = signature;
      group.replaceChildren(...offer.map(([name, label]) =>
        element("button", { "data-value": name, onclick: () => act(name) }, label)));
    }
    for (const [i, [name]] of offer.entries()) {
      const made = /** @type {HTMLButtonElement} */ (group.children[i]);
      made.setAttribute("aria-pressed", String(name === chosen));
    }
  }

  /** @param {number} index */
  async choose(index) {
    if (!(await this.ready([index]))) { this.schedule(); return; }
    const old = this.state;
    const state = this.initial(index);
    const data = this.samples[index];
    const heads = this.parsedSelection(this.selectionText(old.heads), data);
    const pins = old.pins.filter((position) =>
      data.wordAt.get(position)?.text === this.sample.wordAt.get(position)?.text && data.wordAt.has(position));
    this.hover = { word: null, cell: null, key: null };
    this.set({
      ...state, value: old.value === "box" ? "share" : old.value, measure: old.measure, sinks: old.sinks, each: old.each,
      ...(heads.size ? { heads } : {}), ...(pins.length ? { pins, row: old.row } : {}),
      compare: old.compare === index ? null : old.compare,
    });
  }

  // ---------------------------------------------------------------- what is shown

  /** Query index of a pinned position. @param {SampleData} data @param {number} position */
  query(data, position) {
    const word = data.wordAt.get(position);
    if (!word) return data.queryOf.get(position) ?? null;
    return this.state.row === "before" ? word.before : word.row;
  }

  /** Positions that are shown: the hovered word, else the pinned ones. */
  positions() {
    return this.hover.word !== null ? [this.hover.word] : this.state.pins;
  }

  /** @param {SampleData} data @param {number[]} positions */
  queries(data, positions) {
    const other = data !== this.sample;
    return positions.map((position) => this.query(data, other ? this.matching(data, position) : position))
      .filter((query) => query !== null && query !== undefined);
  }

  /** Position of the same word in another sample. @param {SampleData} data @param {number} position */
  matching(data, position) {
    const word = this.sample.wordAt.get(position);
    if (!word) return position;
    if (data.wordAt.get(position)?.text === word.text) return position;
    const same = (d) => d.header.words.filter((w) => !w.visual && w.role === word.role);
    const place = same(this.sample).findIndex((w) => w.position === position);
    return same(data)[place]?.position ?? -1;
  }

  /** @returns {Selection} */
  selection() {
    const cell = this.hover.cell;
    if (!cell) return this.state.heads;
    return new Map([[cell.layer, cell.head === null ? null : [cell.head]]]);
  }

  /** Panels of pictures: values of each key, for one series and one picture. */
  series() {
    const { measure, sinks, each, compare } = this.state;
    const selection = this.selection();
    const positions = this.positions();
    const of = (data, some, title, color) => {
      const values = data.values(this.queries(data, some), selection, measure);
      const left = sinks ? data.sinks(selection) : new Set();
      return { data, values, left, title, color, meaning: this.meaning() };
    };
    if (compare !== null) {
      const other = this.samples[compare];
      const one = of(this.sample, positions, this.sample.header.title, null);
      const two = of(other, positions, other.header.title, null);
      const out = [one, two];
      if (other.nKeys === this.sample.nKeys && this.samePictures(other)) {
        const difference = two.values.map((value, key) => value - one.values[key]);
        out.push({ ...two, values: difference, title: `${two.title} − ${one.title}`, meaning: "difference" });
      }
      return out;
    }
    if (each && positions.length > 1) {
      return positions.map((position, i) =>
        of(this.sample, [position], this.wordName(position), PINS[i % PINS.length]));
    }
    return [of(this.sample, positions, "", null)];
  }

  samePictures(other) {
    const [a, b] = [this.sample.header.pictures, other.header.pictures];
    return a.length === b.length && a.every((p, i) => p.width === b[i].width && p.height === b[i].height);
  }

  meaning() { return this.state.measure.endsWith("lift") ? "ratio" : "amount"; }

  measureName() {
    return { probability: "probability", lift: "lift: probability × visible keys", rollout: "rollout",
      "rollout-lift": "rollout ÷ that of uniform attention" }[this.state.measure];
  }

  /** @param {number} position */
  wordName(position) {
    const word = this.sample.wordAt.get(position);
    if (word) return `“${word.text}”`;
    const { row, col } = this.sample.header.keys;
    return `patch in row ${row[position]}, column ${col[position]}`;
  }

  selectionName(selection = this.selection()) {
    if (this.state.measure.startsWith("rollout")) return "all layers combined";
    const cells = [...selection];
    if (cells.length > 1) {
      const all = cells.every(([, heads]) => heads === null);
      if (all) {
        const layers = cells.map(([layer]) => layer);
        const run = layers.every((layer, i) => !i || layer === layers[i - 1] + 1);
        const name = run ? `${layers[0]} to ${layers[layers.length - 1]}` : layers.length > 6 ? `${layers.length} of ${this.sample.header.layers.length}` : layers.join(", ");
        return `mean of layers ${name}`;
      }
      const n = cells.reduce((sum, [layer, heads]) => sum + (heads?.length ?? this.headsOf(layer)), 0);
      return `mean of ${n} heads in ${cells.length} layers`;
    }
    const [layer, heads] = cells[0];
    if (heads === null) {
      const n = this.headsOf(layer);
      return `layer ${layer}, ${n > 1 ? `mean of ${n} heads` : "its only head"}`;
    }
    return heads.length === 1 ? `layer ${layer}, head ${heads[0]}`
      : `layer ${layer}, mean of ${heads.length > 6 ? `${heads.length} heads` : `heads ${heads.join(", ")}`}`;
  }

  headsOf(layer) { return this.sample.header.heads[this.sample.layerIndex.get(layer)]; }

  // ---------------------------------------------------------------- drawing

  schedule() {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => { this.frame = 0; this.draw(); });
  }

  paint() {
    document.documentElement.dataset.theme = this.dark ? "dark" : "light";
    const css = getComputedStyle(document.documentElement);
    const color = (name) => css.getPropertyValue(`--${name}`).trim();
    this.colors = Object.fromEntries(["surface", "raised", "line", "ink", "soft", "accent", "mark", "hatch"].map((n) => [n, color(n)]));
    this.cells = cellColors(this.dark);
    this.levels = levelsOf([...this.cells, this.colors.hatch]);
    this.matrixSignature = "";
    this.hatch = this.hatching(this.colors.hatch);
    this.schedule();
  }

  hatching(color) {
    const tile = document.createElement("canvas");
    tile.width = tile.height = 8;
    const c = /** @type {CanvasRenderingContext2D} */ (tile.getContext("2d"));
    c.strokeStyle = color;
    c.lineWidth = 1;
    for (const from of [-8, 0, 8]) { c.beginPath(); c.moveTo(from, 8); c.lineTo(from + 8, 0); c.stroke(); }
    return c.createPattern(tile, "repeat");
  }

  draw() {
    const start = performance.now();
    this.drawTools();
    this.drawPictures();
    this.drawWords();
    this.drawProfile();
    this.drawHeads();
    this.drawMatrix();
    this.timings.first ||= performance.now();
    this.timings.draw.push(performance.now() - start);
    clearTimeout(this.later); // the slower views follow, while hovering only after a pause
    const { word, cell } = this.hover;
    this.later = setTimeout(() => { this.drawMatrix(true); this.drawTable(); }, word !== null || cell ? 120 : 0);
  }

  /** The largest error of this page, if it is known. */
  atMost() {
    const error = this.header.largest_error;
    return error === undefined ? "" : `, here at most ${formatted(error)}`;
  }

  drawTools() {
    const p = this.parts;
    const { header } = this.sample;
    const title = [header.question || header.title];
    p.title.replaceChildren(title[0]);
    if (header.answer) p.title.append(element("span", { class: "arrow" }, "→"), header.answer);
    p.title.title = [header.question, header.answer].filter(Boolean).join(" → ");
    const several = this.samples.length > 1;
    p.samples.hidden = !several;
    this.compareLabel.hidden = !several;
    if (several && p.samples.options.length !== this.samples.length) {
      p.samples.replaceChildren(...this.titles.map((title, i) => element("option", { value: i }, title)));
      p.compare.replaceChildren(element("option", { value: "" }, "nothing"),
        ...this.titles.map((title, i) => element("option", { value: i }, title)));
    }
    p.samples.value = String(this.state.sample);
    p.compare.value = this.state.compare === null ? "" : String(this.state.compare);
    this.fill(p.measure, this.measures(this.sample), this.state.measure, (measure) => this.set({ measure }));
    const predicts = header.words.some((word) => !word.visual && word.before !== null);
    p.row.hidden = !predicts;
    this.fill(p.row, [["word", "Row of the word"], ["before", "Row that predicts it"]], this.state.row, (row) => this.set({ row }));
    p.each.hidden = this.state.pins.length < 2 || this.state.compare !== null;
    this.fill(p.each, [["mean", "Mean of words"], ["each", "One picture per word"]], this.state.each ? "each" : "mean", (name) => this.set({ each: name === "each" }));
    this.sinksLabel.hidden = !Object.keys(header.sinks).length || this.state.measure.startsWith("rollout");
    p.sinks.checked = this.state.sinks;
    const rows = header.rows.filter(([, head]) => head >= 0).length;
    const all = header.heads.reduce((a, b) => a + b, 0);
    p.foot.textContent = [
      header.model,
      `${header.tower} ${header.kind === "cross" ? "cross-attention" : "self-attention"}`,
      `${header.layers.length} layers`,
      rows === all ? `all ${all} heads` : `rows of ${rows} of ${all} heads, those with the largest share on images; means and sums are of all heads`,
      `values in 8 bits: error at most ${(100 * header.relative_error).toFixed(1)}% of the largest of a row${this.atMost()}`,
      this.header.n_given > this.samples.length ? `${this.samples.length} of ${this.header.n_given} samples` : "",
    ].filter(Boolean).join(" · ");
  }

  drawPictures() {
    const p = this.parts;
    const selection = this.selectionName();
    const positions = this.positions();
    const names = positions.length > 3 ? `${positions.length} words` : positions.map((w) => this.wordName(w)).join(", ");
    const how = this.state.row === "before" && positions.some((w) => this.sample.wordAt.has(w)) ? "row that predicts " : "";
    p.caption.textContent = `${how}${names} · ${selection}`;
    this.sample.prefer(this.queries(this.sample, positions));
    const series = this.series();
    this.shownSeries = series;
    const panels = [];
    for (const one of series) {
      one.data.header.pictures.forEach((picture, i) => {
        if (one.data.keysOf[i].length || !picture.reason) panels.push({ ...one, picture, number: i });
      });
    }
    this.panels = panels.slice(0, MOST_PANELS);
    const amounts = series.filter((s) => s.meaning !== "difference");
    const shown = (some) => some.flatMap((s) => s.data.visualKeys.filter((k) => !s.left.has(k)).map((k) => s.values[k]));
    this.scale = new Scale(this.meaning(), shown(amounts), this.measureName());
    const different = series.filter((s) => s.meaning === "difference");
    this.differenceScale = different.length ? new Scale("difference", shown(different), "difference") : null;
    this.layout(this.panels);
    this.panels.forEach((panel, i) => this.drawPanel(panel, i));
    this.drawScale(p.scale, [this.scale, ...(this.differenceScale ? [this.differenceScale] : [])]);
    this.drawPictureText();
  }

  /** Make one figure per panel, of a size at which all fit. */
  layout(panels) {
    const box = this.parts.panels;
    const width = Math.floor(box.getBoundingClientRect().width) || 400;
    const signature = JSON.stringify([width, panels.map((p) => [p.data === this.sample ? 0 : 1, p.number, p.title, p.color]), devicePixelRatio, this.state.sample]);
    if (box.dataset.signature === signature) return;
    box.dataset.signature = signature;
    if (!panels.length) {
      const reasons = this.sample.header.pictures.map((p) => p.reason).filter(Boolean);
      box.replaceChildren(element("p", { class: "v-note" }, reasons[0] ?? "This sample has no picture."));
      return;
    }
    const most = Math.min(window.innerHeight * 0.62, 720);
    let best = { size: 0, columns: 1 };
    const aspect = Math.max(...panels.map((p) => p.picture.height / p.picture.width));
    for (let columns = 1; columns <= panels.length; columns++) {
      const each = (width - 12 * (columns - 1)) / columns;
      const lines = Math.ceil(panels.length / columns);
      const size = Math.min(each, most / lines / aspect);
      if (size > best.size * 1.001) best = { size, columns };
    }
    const size = Math.max(Math.min(best.size, width), Math.min(width, 110));
    this.figures = panels.map((panel) => {
      const scale = Math.min(size / panel.picture.width, (size * aspect) / panel.picture.height);
      const [w, h] = [Math.floor(panel.picture.width * scale), Math.floor(panel.picture.height * scale)];
      const base = element("canvas");
      const over = element("canvas", { class: "v-over", role: "img" });
      const stack = element("div", { class: "v-stack", style: `width:${w}px;height:${h}px` }, base, over);
      const caption = element("figcaption");
      if (panel.color) caption.append(element("i", { style: `background:${panel.color}` }));
      const several = this.sample.header.pictures.length > 1;
      const placed = panel.data.keysOf[panel.number].length;
      caption.append([panel.title, several || !panel.title ? panel.picture.title : "", placed ? "" : "its tokens have no known place"].filter(Boolean).join(" · "));
      caption.style.width = `${w}px`;
      this.listenToPicture(over, panel);
      return { base, over, stack, caption, w, h, scale, dimmed: null };
    });
    box.replaceChildren(...this.figures.map((f) => element("figure", { class: "v-panel" }, f.stack, f.caption)));
    box.style.minHeight = `${box.scrollHeight}px`;
    panels.forEach((panel, i) => this.photo(panel.picture).then((image) => {
      if (box.dataset.signature === signature) { this.figures[i].photo = image; this.drawPanel(this.panels[i], i); }
    }));
  }

  /** @param {Picture} picture @returns {Promise<HTMLImageElement | null>} */
  photo(picture) {
    if (!picture.src) return Promise.resolve(null);
    let found = this.photos.get(picture.src);
    if (!found) {
      found = new Promise((resolve) => {
        const image = new Image();
        image.onload = () => resolve(image);
        image.onerror = () => resolve(null);
        image.src = /** @type {string} */ (picture.src);
      });
      this.photos.set(picture.src, found);
    }
    return found;
  }

  /** The photo, evenly dimmed: every pixel is multiplied by DIM. */
  dimmed(figure) {
    const [w, h] = [figure.base.width, figure.base.height];
    if (figure.dimmed && figure.dimmed.width === w && figure.dimmedOf === figure.photo) return figure.dimmed;
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [w, h];
    const c = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
    if (figure.photo) {
      c.imageSmoothingEnabled = w < 4 * figure.photo.naturalWidth;
      c.imageSmoothingQuality = "high";
      c.drawImage(figure.photo, 0, 0, w, h);
      c.globalCompositeOperation = "multiply";
      const level = Math.round(255 * DIM);
      c.fillStyle = `rgb(${level},${level},${level})`;
      c.fillRect(0, 0, w, h);
    } else {
      c.fillStyle = "rgb(40,40,40)";
      c.fillRect(0, 0, w, h);
    }
    figure.dimmed = canvas;
    figure.dimmedOf = figure.photo;
    return canvas;
  }

  drawPanel(panel, i) {
    const figure = this.figures?.[i];
    if (!figure || !panel) return;
    const { base, w, h, scale } = figure;
    const c = sized(base, w, h);
    const ratio = base.width / w;
    c.setTransform(1, 0, 0, 1, 0, 0);
    c.drawImage(this.dimmed(figure), 0, 0);
    const { layer } = this;
    if (layer.width < base.width || layer.height < base.height) {
      layer.width = Math.max(layer.width, base.width);
      layer.height = Math.max(layer.height, base.height);
    }
    const l = /** @type {CanvasRenderingContext2D} */ (layer.getContext("2d"));
    l.clearRect(0, 0, layer.width, layer.height);
    const boxes = panel.data.header.keys.box;
    if (!panel.data.keysOf[panel.number].length) { // no token has a place on this picture
      c.fillStyle = this.lightHatch;
      c.fillRect(0, 0, base.width, base.height);
    }
    const of = panel.meaning === "difference" ? this.differenceScale : this.scale;
    const s = scale * ratio;
    const hidden = [];
    const crossed = [];
    for (const key of panel.data.keysOf[panel.number]) {
      const [x0, y0, x1, y1] = boxes[key].map((edge) => Math.round(edge * s));
      const value = panel.values[key];
      if (panel.left.has(key)) crossed.push([x0, y0, x1, y1]);
      else if (Number.isNaN(value)) hidden.push([x0, y0, x1, y1]);
      else {
        const [r, g, b] = light(of.at(value));
        l.fillStyle = `rgb(${r},${g},${b})`;
        l.fillRect(x0, y0, x1 - x0, y1 - y0);
      }
    }
    c.globalCompositeOperation = "lighter";
    c.drawImage(layer, 0, 0, base.width, base.height, 0, 0, base.width, base.height);
    c.globalCompositeOperation = "source-over";
    if (hidden.length) {
      c.fillStyle = this.lightHatch;
      for (const [x0, y0, x1, y1] of hidden) c.fillRect(x0, y0, x1 - x0, y1 - y0);
    }
    c.strokeStyle = "rgba(255,255,255,.8)";
    c.lineWidth = ratio;
    for (const [x0, y0, x1, y1] of crossed) {
      c.beginPath();
      c.moveTo(x0 + 2, y0 + 2); c.lineTo(x1 - 2, y1 - 2);
      c.moveTo(x1 - 2, y0 + 2); c.lineTo(x0 + 2, y1 - 2);
      c.stroke();
    }
    this.drawOver(panel, i);
  }

  /** Lines over a picture: the hovered cell and its neighbours, the box, pinned patches. */
  drawOver(panel, i) {
    const figure = this.figures[i];
    const c = sized(figure.over, figure.w, figure.h);
    const boxes = panel.data.header.keys.box;
    const s = figure.scale;
    const mine = new Set(panel.data.keysOf[panel.number]);
    const outline = (edges, color, width) => {
      const [x0, y0, x1, y1] = edges.map((e) => e * s);
      c.lineWidth = width + 2;
      c.strokeStyle = "rgba(0,0,0,.55)";
      c.strokeRect(x0, y0, x1 - x0, y1 - y0);
      c.lineWidth = width;
      c.strokeStyle = color;
      c.strokeRect(x0, y0, x1 - x0, y1 - y0);
    };
    const key = this.hover.key;
    if (key !== null && mine.has(key)) {
      const [x0, y0, x1, y1] = boxes[key];
      const reach = 2.6 * Math.max(x1 - x0, y1 - y0);
      c.lineWidth = 1;
      for (const other of mine) {
        const [a0, b0, a1, b1] = boxes[other];
        const distance = Math.hypot((a0 + a1 - x0 - x1) / 2, (b0 + b1 - y0 - y1) / 2);
        if (distance > reach) continue;
        c.strokeStyle = `rgba(255,255,255,${(0.32 * (1 - distance / reach)).toFixed(3)})`;
        c.strokeRect(a0 * s, b0 * s, (a1 - a0) * s, (b1 - b0) * s);
      }
      outline(boxes[key], "#fff", 1.5);
    }
    const box = this.dragged ?? this.state.box;
    if (box && box.picture === panel.number && panel.data === this.sample) outline(box.edges, "#ffb25e", 2);
    for (const position of this.state.pins) {
      if (!this.sample.wordAt.has(position) && mine.has(position) && panel.data === this.sample) outline(boxes[position], "#7cc4ff", 2);
    }
  }

  drawScale(canvas, scales) {
    const width = canvas.parentElement.clientWidth || 300;
    const each = Math.min(340, (width - 24 * (scales.length - 1)) / scales.length);
    const c = sized(canvas, width, 52);
    scales.forEach((scale, i) => {
      const left = i * (each + 24);
      const signed = scale.meaning !== "amount";
      c.fillStyle = this.colors.soft;
      c.textAlign = "left";
      const label = scale.meaning === "amount" ? `${scale.label} (square-root scale)` : scale.meaning === "ratio" ? `${scale.label} (log scale)` : scale.label;
      c.fillText(label, left, 8, each);
      for (let x = 0; x < each; x++) {
        const t = signed ? (2 * x) / each - 1 : x / each;
        const [r, g, b] = light(t).map((part) => Math.min(255, Math.round(128 * DIM) + part));
        c.fillStyle = `rgb(${r},${g},${b})`;
        c.fillRect(left + x, 18, 1.5, 12);
      }
      const ticks = scale.ticks().filter((_, j) => each > 230 || j % 2 === 0);
      for (const [t, text] of ticks) {
        const x = left + (signed ? (t + 1) / 2 : t) * each;
        c.fillStyle = this.colors.soft;
        c.textAlign = t === 1 ? "right" : t === (signed ? -1 : 0) ? "left" : "center";
        c.fillRect(Math.min(x, left + each - 1), 30, 1, 3);
        c.fillText(text, x, 41);
      }
    });
    canvas.setAttribute("aria-label", scales.map((s) => `${s.label}: ${s.ticks().map((t) => t[1]).join(", ")}`).join("; "));
    this.scaleNote = scales.map((s) => s.note).filter(Boolean).join("; ");
  }

  drawPictureText() {
    const p = this.parts;
    const data = this.sample;
    const { header } = data;
    const key = this.hover.key;
    const parts = [];
    if (key !== null && header.keys.picture[key] >= 0) {
      const values = this.shownSeries[0].values;
      const [x0, y0, x1, y1] = header.keys.box[key].map((e) => Math.round(e));
      const tile = header.keys.tile ? `, tile ${header.keys.tile[key]}` : "";
      const what = Number.isNaN(values[key]) ? "hidden by the mask" : `${this.state.measure} ${formatted(values[key])}`;
      parts.push(`row ${header.keys.row[key]}, column ${header.keys.col[key]}${tile} (x ${x0} to ${x1}, y ${y0} to ${y1} px): `, element("b", {}, what));
      if (data.queryOf.has(key)) parts.push(" · double-click: use as the query");
    } else if (this.state.box) {
      const share = this.boxShare();
      parts.push("box: ", element("b", {}, `${formatted(share)} of the attention`), " · heads and words are ranked by their share on it · Esc removes it");
    } else {
      parts.push("drag a box or click a patch to see which words and heads look there");
      if (this.scaleNote) parts.unshift(`${this.scaleNote} · `);
      const n = this.sample.header.pictures.length * (this.shownSeries?.length ?? 1);
      if (n > MOST_PANELS) parts.unshift(`${MOST_PANELS} of ${n} pictures · `);
    }
    p.pictureText.replaceChildren(...parts);
  }

  boxKeys() {
    const { box } = this.state;
    if (!box) return [];
    const [x0, y0, x1, y1] = box.edges;
    const boxes = this.sample.header.keys.box;
    return this.sample.keysOf[box.picture].filter((key) => {
      const [a0, b0, a1, b1] = boxes[key];
      const [x, y] = [(a0 + a1) / 2, (b0 + b1) / 2]; // a patch belongs to the box that has its centre
      return x >= x0 && x < x1 && y >= y0 && y < y1;
    });
  }

  /** Mean probability on the box over chosen heads. */
  boxShare(queries = this.queries(this.sample, this.positions())) {
    const terms = this.sample.terms(this.selection(), "probability");
    const keys = this.boxKeys();
    const weight = terms.reduce((sum, term) => sum + term[1], 0);
    return terms.reduce((sum, term) => sum + term[1] * this.sample.shareOn(queries, term, keys), 0) / weight;
  }

  /** Share of a word's attention on the pictures, or on the box, over chosen heads. */
  wordShare(query) {
    if (this.state.box) return this.boxShare([query]);
    const { header } = this.sample;
    const block = this.sample.block(query);
    if (!block) return NaN;
    const [most, groups] = [this.sample.mostHeads, header.groups.length];
    let [total, n] = [0, 0];
    for (const [layer, heads] of this.selection()) {
      const index = this.sample.layerIndex.get(layer);
      if (index === undefined) continue;
      const count = heads?.length ?? header.heads[index];
      for (let i = 0; i < count; i++) {
        const at = (index * most + (heads?.[i] ?? i)) * groups;
        let share = 0;
        for (const group of header.visual) share += block.mass[at + group];
        if (share === share) { total += share; n++; }
      }
    }
    return n ? total / n : NaN;
  }

  drawWords() {
    const p = this.parts;
    const { header } = this.sample;
    if (p.words.dataset.sample !== String(this.state.sample)) {
      p.words.dataset.sample = String(this.state.sample);
      this.wordButtons = new Map();
      const children = [];
      for (const word of header.words) {
        const lines = word.gap.split("\n");
        lines.forEach((line, i) => {
          if (i) children.push(element("br"));
          else if (line) children.push(" ");
        });
        if (word.visual) {
          children.push(element("span", { class: "v-chip" }, `${word.visual[0]} ${word.visual[1]} · ${word.tokens} tokens`));
          continue;
        }
        const made = element("button", {
          class: `v-word ${word.kind} ${word.role ?? ""}`, "data-position": word.position,
          onmouseenter: () => this.hoverWord(word.position), onmouseleave: () => this.hoverWord(null),
          onclick: (event) => this.pin(word.position, event.shiftKey || event.ctrlKey || event.metaKey),
        }, word.text.replace(/\n/g, "↵").trim() || "␣");
        if (Number.isFinite(word.probability)) {
          made.classList.add("scored");
          made.style.setProperty("--probability", `${100 * word.probability}%`);
          made.setAttribute("aria-description", `probability ${formatted(word.probability)}`);
        }
        this.wordButtons.set(word.position, made);
        children.push(made);
      }
      p.words.replaceChildren(...children);
    }
    const shares = new Map();
    for (const word of header.words) {
      if (word.visual) continue;
      const query = this.query(this.sample, word.position);
      if (query !== null && query !== undefined) shares.set(word.position, this.wordShare(query));
    }
    const most = Math.max(1e-9, ...[...shares.values()].filter(Number.isFinite));
    this.shares = shares;
    for (const [position, made] of this.wordButtons) {
      const share = shares.get(position);
      const pin = this.state.pins.indexOf(position);
      made.classList.toggle("without", share === undefined);
      made.classList.toggle("hovered", this.hover.word === position);
      made.setAttribute("aria-pressed", String(pin >= 0));
      made.disabled = share === undefined;
      made.style.setProperty("--pin", this.state.each && this.state.pins.length > 1 ? PINS[pin % PINS.length] ?? "" : "");
      made.style.borderBottomColor = share > 0 ? `color-mix(in srgb, var(--accent) ${Math.round((100 * share) / most)}%, transparent)` : "transparent";
    }
    const what = this.state.box ? "the box" : "pictures";
    const parts = [`line: share of attention on ${what}, 0 to ${formatted(most)}`];
    const position = this.hover.word ?? (this.state.pins.length === 1 ? this.state.pins[0] : null);
    if (position !== null && shares.has(position)) {
      parts.push(` · ${this.wordName(position)} `, element("b", {}, formatted(shares.get(position))));
    }
    const hovered = header.words.find((word) => !word.visual && word.position === position);
    if (Number.isFinite(hovered?.probability)) parts.push(" · probability ", element("b", {}, formatted(hovered.probability)));
    if (header.words.some((word) => Number.isFinite(word.probability))) parts.push(" · bar: probability of an answer token");
    parts.push(" · click pins, shift-click pins several, ← → step, ↑ ↓ layers");
    p.wordText.replaceChildren(...parts);
  }

  drawProfile() {
    const { header } = this.sample;
    const canvas = this.parts.profile;
    const width = canvas.parentElement.clientWidth || 300;
    const height = 150;
    const c = sized(canvas, width, height);
    const queries = this.queries(this.sample, this.positions());
    const n = header.layers.length;
    const [left, right, top, bottom] = [34, width - 36, 8, height - 22];
    const step = (right - left) / n;
    const shares = header.layers.map((_, layer) => header.groups.map((__, group) => {
      let [sum, count] = [0, 0];
      for (let head = 0; head < header.heads[layer]; head++) {
        const { share } = this.sample.sums(queries, layer, head, [group]);
        if (Number.isFinite(share)) { sum += share; count++; }
      }
      return count ? sum / count : 0;
    }));
    const entropies = header.layers.map((_, layer) => {
      let [sum, count] = [0, 0];
      for (let head = 0; head < header.heads[layer]; head++) {
        const { entropy } = this.sample.sums(queries, layer, head, [0]);
        if (Number.isFinite(entropy)) { sum += entropy; count++; }
      }
      return count ? sum / count : NaN;
    });
    this.profile = { left, step, shares, entropies };
    c.fillStyle = this.colors.soft;
    c.textAlign = "right";
    for (const tick of [0, 0.5, 1]) {
      const y = bottom - tick * (bottom - top);
      c.fillStyle = this.colors.line;
      c.fillRect(left, y, right - left, 1);
      c.fillStyle = this.colors.soft;
      c.fillText(String(tick), left - 6, y);
    }
    const gap = step > 6 ? Math.min(4, step * 0.12) : 0;
    shares.forEach((of, i) => {
      let y = bottom;
      const chosen = this.state.heads.has(header.layers[i]);
      c.globalAlpha = chosen || this.state.measure.startsWith("rollout") ? 1 : 0.62;
      of.forEach((share, group) => {
        const size = share * (bottom - top);
        c.fillStyle = this.groupColor(header.groups[group]);
        c.fillRect(left + i * step + gap / 2, y - size, step - gap, size);
        y -= size;
      });
      c.globalAlpha = 1;
      if (chosen) { c.fillStyle = this.colors.ink; c.fillRect(left + i * step + gap / 2, bottom + 1, step - gap, 2); }
    });
    const most = Math.max(...entropies.filter(Number.isFinite), 0.01);
    c.strokeStyle = this.colors.ink;
    c.lineWidth = 1.25;
    c.beginPath();
    entropies.forEach((value, i) => {
      if (Number.isFinite(value)) c.lineTo(left + (i + 0.5) * step, bottom - (value / most) * (bottom - top) * 0.96);
    });
    c.stroke();
    c.textAlign = "left";
    c.fillStyle = this.colors.soft;
    c.fillText(formatted(most * (1 / 0.96)), right + 5, top);
    c.fillText("0", right + 5, bottom);
    c.textAlign = "center";
    const every = Math.ceil(26 / step);
    header.layers.forEach((layer, i) => {
      if (i % every === 0) c.fillText(String(layer), left + (i + 0.5) * step, height - 8);
    });
    const focus = this.focusLayer();
    this.parts.legend.replaceChildren(...header.groups.map((name, group) => element("span", {},
      element("i", { style: `background:${this.groupColor(name)}` }), `${this.groupName(name)} `, element("b", {}, formatted(shares[focus][group])))),
      element("span", {}, "— entropy (nats) ", element("b", {}, formatted(entropies[focus]))),
      element("span", {}, `layer ${header.layers[focus]}, mean of its heads`));
  }

  /** Index of the layer whose numbers are shown. */
  focusLayer() {
    const layer = this.hover.cell?.layer ?? [...this.state.heads.keys()].at(-1);
    return this.sample.layerIndex.get(layer) ?? this.sample.header.layers.length - 1;
  }

  groupColor(name) { return GROUP_COLORS[name.split(" ")[0]] ?? "#8a8f96"; }

  groupName(name) {
    if (name !== "first") return name;
    const at = this.sample.header.keys.group.indexOf(this.sample.header.groups.indexOf("first"));
    return `first token ${this.sample.header.keys.token[at]}`;
  }

  /** Values of all heads: `[layer][head]`. */
  headValues() {
    const data = this.sample;
    const { header } = data;
    const queries = this.queries(data, this.positions());
    const keys = this.boxKeys();
    const value = this.state.value === "box" && !this.state.box ? "share" : this.state.value;
    return header.layers.map((layer, index) => Array.from({ length: header.heads[index] }, (_, head) => {
      if (value === "box") {
        const terms = data.terms(new Map([[layer, [head]]]), "probability");
        return terms.length ? data.shareOn(queries, terms[0], keys) : NaN;
      }
      const { share, even, entropy } = data.sums(queries, index, head, header.visual);
      return value === "share" ? share : value === "lift" ? share / even : entropy;
    }));
  }

  drawHeads() {
    const p = this.parts;
    const { header } = this.sample;
    const value = this.state.value;
    this.fill(p.value, [["share", "Share"], ["lift", "Lift"], ["entropy", "Entropy"], ...(this.state.box ? [["box", "Box"]] : [])], value, (name) => this.set({ value: name }));
    const values = this.headValues();
    this.headGrid = values;
    const width = p.heads.parentElement.clientWidth || 300;
    const [rows, columns] = [header.layers.length, this.sample.mostHeads];
    const left = 40;
    const top = 20;
    const cell = Math.max(4, Math.min(30, Math.floor((width - left - 40) / columns)));
    const high = Math.max(5, Math.min(cell, 28, Math.floor(520 / (rows + 1.4))));
    const gap = cell > 9 ? 1 : 0;
    const geometry = this.headGeometry = { left, top, cell, high, rows, columns, side: left + columns * cell + 6, under: top + rows * high + 6 };
    const height = geometry.under + high + 4;
    const c = sized(p.heads, width, height);
    const finite = values.flat().filter(Number.isFinite);
    const most = Math.max(...finite, 1e-9);
    const color = (v) => this.cells[Math.max(0, Math.min(255, Math.round((255 * v) / most)))];
    const put = (x, y, v) => {
      c.fillStyle = Number.isFinite(v) ? color(v) : this.hatch;
      c.fillRect(x, y, cell - gap, high - gap);
    };
    const mean = (some) => {
      const known = some.filter(Number.isFinite);
      return known.length ? known.reduce((a, b) => a + b, 0) / known.length : NaN;
    };
    c.textAlign = "right";
    values.forEach((of, i) => {
      const y = top + i * high;
      if (i % Math.ceil(13 / high) === 0) {
        c.fillStyle = this.state.heads.has(header.layers[i]) ? this.colors.ink : this.colors.soft;
        c.fillText(String(header.layers[i]), left - 8, y + high / 2);
      }
      of.forEach((v, head) => put(left + head * cell, y, v));
      put(geometry.side, y, mean(of));
    });
    c.textAlign = "center";
    c.fillStyle = this.colors.soft;
    const every = Math.ceil(20 / cell);
    for (let head = 0; head < columns; head++) {
      if (head % every === 0) { c.fillStyle = this.colors.soft; c.fillText(String(head), left + (head + 0.5) * cell - gap / 2, 9); }
      put(left + head * cell, geometry.under, mean(values.map((of) => of[head] ?? NaN)));
    }
    c.fillStyle = this.colors.soft;
    c.textAlign = "left";
    c.fillText("mean", geometry.side, 9);
    c.textAlign = "right";
    c.fillText("mean", left - 6, geometry.under + high / 2);
    this.outlineHeads(c);
    this.drawCellScale(p.headScale, { share: "share on images", lift: "lift of that share: 1 is uniform", entropy: "entropy (nats)", box: "share on the box" }[value], most);
    this.drawHeadText();
  }

  outlineHeads(c) {
    const g = this.headGeometry;
    const { header } = this.sample;
    const place = (layer) => g.top + this.sample.layerIndex.get(layer) * g.high;
    const line = (x, y, w, h, color, width) => { c.strokeStyle = color; c.lineWidth = width; c.strokeRect(x - 0.5, y - 0.5, w, h); };
    if (!this.state.measure.startsWith("rollout")) {
      for (const [layer, heads] of this.state.heads) {
        if (!this.sample.layerIndex.has(layer)) continue;
        if (heads === null) line(g.left, place(layer), header.heads[this.sample.layerIndex.get(layer)] * g.cell, g.high, this.colors.mark, 2);
        else for (const head of heads) line(g.left + head * g.cell, place(layer), g.cell, g.high, this.colors.mark, 2);
      }
    }
    const cell = this.hover.cell ?? (document.activeElement === this.parts.heads ? this.cursor : null);
    if (cell) {
      const n = cell.head === null ? header.heads[this.sample.layerIndex.get(cell.layer)] : 1;
      line(g.left + (cell.head ?? 0) * g.cell, place(cell.layer), n * g.cell, g.high, this.colors.ink, 1.5);
    }
    if (this.dragHeads) {
      const [a, b] = this.dragHeads;
      const [y0, y1] = [Math.min(a.index, b.index), Math.max(a.index, b.index)];
      const [x0, x1] = [Math.min(a.head, b.head), Math.max(a.head, b.head)];
      line(g.left + x0 * g.cell, g.top + y0 * g.high, (x1 - x0 + 1) * g.cell, (y1 - y0 + 1) * g.high, this.colors.mark, 2);
    }
  }

  drawCellScale(canvas, label, most) {
    const width = Math.min(340, canvas.parentElement.clientWidth - 40 || 300);
    const c = sized(canvas, width + 40, 48);
    c.fillStyle = this.colors.soft;
    c.textAlign = "left";
    c.fillText(label, 40, 8, width);
    for (let x = 0; x < width; x++) {
      c.fillStyle = this.cells[Math.round((255 * x) / width)];
      c.fillRect(40 + x, 18, 1.5, 8);
    }
    for (const t of [0, 0.5, 1]) {
      c.fillStyle = this.colors.soft;
      c.textAlign = t === 0 ? "left" : t === 1 ? "right" : "center";
      c.fillText(formatted(t * most), 40 + t * width, 36);
    }
    canvas.setAttribute("aria-label", `${label}, 0 to ${formatted(most)}`);
  }

  drawHeadText() {
    const { header } = this.sample;
    const cell = this.hover.cell ?? (document.activeElement === this.parts.heads ? this.cursor : null);
    const p = this.parts.headText;
    if (!cell) {
      p.replaceChildren("click a head, drag over several, or click a layer's or head's number · shift-click adds");
      return;
    }
    const index = this.sample.layerIndex.get(cell.layer);
    if (cell.head === null) { p.replaceChildren(`layer ${cell.layer}, mean of ${header.heads[index]} heads`); return; }
    const queries = this.queries(this.sample, this.positions());
    const { share, even, entropy } = this.sample.sums(queries, index, cell.head, header.visual);
    const parts = [`layer ${cell.layer}, head ${cell.head}: share on images `, element("b", {}, formatted(share)), `, uniform ${formatted(even)}, lift `, element("b", {}, formatted(share / even)), `, entropy ${formatted(entropy)} nats`];
    if (!this.sample.hasRow(cell.layer, cell.head)) parts.push(" · its rows are not in this page");
    p.replaceChildren(...parts);
  }

  /** @param {boolean} fresh whether to compute the values if they have changed */
  drawMatrix(fresh = false) {
    const data = this.sample;
    const { header } = data;
    const canvas = this.parts.matrix;
    const width = canvas.parentElement.clientWidth || 300;
    const words = header.words.filter((word) => !word.visual && this.shares.has(word.position));
    const keys = data.visualKeys;
    const left = 96;
    const high = Math.max(3, Math.min(20, Math.floor(360 / Math.max(1, words.length))));
    const top = 18;
    const wide = Math.max(10, width - left - 2);
    const height = top + Math.max(1, words.length) * high + 4;
    const signature = JSON.stringify([this.state.sample, this.state.row, this.selectionText(this.selection()), this.state.measure, this.state.sinks, this.dark, width, data.blocks.size, devicePixelRatio]);
    if (this.matrixSignature !== signature && (fresh || !this.matrixPicture)) {
      this.matrixSignature = signature;
      const selection = this.selection();
      const left_out = this.state.sinks ? data.sinks(selection) : new Set();
      this.matrixValues = words.map((word) => {
        const query = this.query(data, word.position);
        const values = data.values(query === null ? [] : [query], selection, this.state.measure);
        return Float64Array.from(keys, (key) => (left_out.has(key) ? NaN : values[key]));
      });
      const picture = this.matrixPicture = document.createElement("canvas");
      const columns = Math.min(keys.length, Math.max(1, Math.round(wide * devicePixelRatio)));
      picture.width = Math.max(1, columns);
      picture.height = Math.max(1, words.length);
      const c = /** @type {CanvasRenderingContext2D} */ (picture.getContext("2d"));
      const scale = this.matrixEnd = new Scale(this.meaning(), this.matrixValues.flatMap((v) => [...v]), "");
      const pixels = c.createImageData(picture.width, picture.height);
      this.matrixValues.forEach((values, y) => {
        for (let x = 0; x < columns; x++) {
          const from = Math.floor((x * keys.length) / columns);
          const to = Math.max(from + 1, Math.floor(((x + 1) * keys.length) / columns));
          let most = NaN; // of the keys of this column that are not hidden
          for (let k = from; k < to; k++) if (!(values[k] <= most) && values[k] === values[k]) most = values[k];
          const t = scale.at(most);
          const color = Number.isNaN(most) ? 256 : Math.round(255 * (scale.meaning === "ratio" ? (t + 1) / 2 : t));
          const at = 4 * (y * picture.width + x);
          for (let i = 0; i < 3; i++) pixels.data[at + i] = this.levels[4 * color + i];
          pixels.data[at + 3] = color === 256 ? 110 : 255;
        }
      });
      c.putImageData(pixels, 0, 0);
      this.pooled = keys.length > columns;
    }
    this.matrixGeometry = { left, top, high, wide, words, keys };
    const c = sized(canvas, width, height);
    c.imageSmoothingEnabled = false;
    if (keys.length) c.drawImage(this.matrixPicture, left, top, wide, words.length * high);
    c.textAlign = "right";
    const every = Math.ceil(13 / high);
    words.forEach((word, i) => {
      const pinned = this.state.pins.includes(word.position);
      if (pinned || this.hover.word === word.position) {
        c.strokeStyle = pinned ? this.colors.mark : this.colors.ink;
        c.lineWidth = 1.5;
        c.strokeRect(left - 0.5, top + i * high + 0.5, wide + 1, high - 1);
      }
      const near = words.some((w, j) => j !== i && Math.abs(j - i) < every && this.state.pins.includes(w.position));
      if (!pinned && (i % every || near)) return;
      c.fillStyle = pinned ? this.colors.ink : this.colors.soft;
      const text = word.text.trim() || "␣";
      c.fillText(text.length > 14 ? `${text.slice(0, 13)}…` : text, left - 8, top + (i + 0.5) * high, left - 10);
    });
    c.textAlign = "left";
    let labelled = -100;
    keys.forEach((key, i) => { // marks where a grid row begins
      const begins = i === 0 || header.keys.row[key] !== header.keys.row[keys[i - 1]] || header.keys.picture[key] !== header.keys.picture[keys[i - 1]];
      if (!begins) return;
      const x = left + (i / keys.length) * wide;
      c.fillStyle = this.colors.soft;
      c.fillRect(x, top - 5, 1, 4);
      if (x - labelled > 38 && header.keys.row[key] >= 0) { c.fillText(`row ${header.keys.row[key]}`, x + 2, 8); labelled = x; }
    });
    const key = this.hover.key;
    const at = key === null ? -1 : keys.indexOf(key);
    if (at >= 0) {
      c.strokeStyle = this.colors.ink;
      c.lineWidth = 1;
      c.strokeRect(left + (at / keys.length) * wide - 0.5, top - 0.5, Math.max(2, wide / keys.length), words.length * high + 1);
    }
    const ends = this.matrixEnd;
    const from = ends.meaning === "ratio" ? formatted(2 ** -ends.end) : "0";
    const parts = [`${this.measureName()}, ${from} (${this.dark ? "dark" : "light"}) to ${formatted(ends.meaning === "ratio" ? 2 ** ends.end : ends.end)}${ends.note ? `, ${ends.note}` : ""}`];
    if (this.pooled) parts.push(" · a column shows the largest of its patches");
    parts.push(" · hatched or grey: hidden by the mask");
    this.parts.matrixText.replaceChildren(...parts);
  }

  // ---------------------------------------------------------------- table

  /** Columns, those that hold text, and rows of the table. @returns {{columns: string[], text: Set<string>, rows: any[][]}} */
  tableRows() {
    const data = this.sample;
    const { header } = data;
    const which = this.table.which;
    if (which === "patches") {
      const values = this.shownSeries[0].values;
      const rows = data.visualKeys.map((key) => [header.pictures[header.keys.picture[key]].title, header.keys.row[key], header.keys.col[key], values[key], key, ...header.keys.box[key]]);
      return { columns: ["picture", "row", "col", "value", "key", "x0", "y0", "x1", "y1"], text: new Set(["picture"]), rows };
    }
    if (which === "words") {
      const rows = header.words.filter((w) => !w.visual && this.shares.has(w.position)).map((w) => [w.position, w.text, w.role ?? "", this.shares.get(w.position)]);
      return { columns: ["position", "token", "role", "value"], text: new Set(["token", "role"]), rows };
    }
    const queries = this.queries(data, this.positions());
    const rows = header.layers.flatMap((layer, i) => Array.from({ length: header.heads[i] }, (_, head) => {
      const { share, even, entropy } = data.sums(queries, i, head, header.visual);
      return [layer, head, share, even, share / even, entropy, ...(this.state.box ? [this.headGrid[i][head]] : [])];
    }));
    return { columns: ["layer", "head", "share", "uniform", "lift", "entropy", ...(this.state.box ? [this.state.value === "box" ? "box" : "shown"] : [])], text: new Set(), rows };
  }

  drawTable() {
    this.fill(this.parts.which, [["patches", "Patches"], ["words", "Words"], ["heads", "Heads"]], this.table.which, (name) => { this.table = { which: name, by: name === "heads" ? "share" : "value", down: true }; this.schedule(); });
    const { columns, text, rows } = this.tableRows();
    const by = Math.max(0, columns.indexOf(this.table.by));
    const sign = this.table.down ? -1 : 1;
    const order = [...rows.keys()].sort((a, b) => {
      const [x, y] = [rows[a][by], rows[b][by]];
      if (typeof x === "string") return sign * x.localeCompare(y);
      return (Number.isNaN(x) ? 1 : 0) - (Number.isNaN(y) ? 1 : 0) || sign * (x - y);
    });
    const shown = order.slice(0, 60);
    const alone = this.sample.header.pictures.length < 2; // the CSV has the column all the same
    const visible = [...columns.keys()].filter((j) => !(alone && columns[j] === "picture"));
    const label = (name) => (name === "value" ? (this.table.which === "words" ? (this.state.box ? "share on box" : "share on images") : this.state.measure) : name);
    const head = element("tr", {}, ...visible.map((j) => columns[j]).map((name) => element("th", { scope: "col", class: text.has(name) ? "text" : "", "aria-sort": name === columns[by] ? (this.table.down ? "descending" : "ascending") : null },
      element("button", { onclick: () => { this.table = { ...this.table, by: name, down: name === columns[by] ? !this.table.down : true }; this.schedule(); } }, label(name)))));
    const body = shown.map((i) => element("tr", { class: this.table.which === "patches" && rows[i][4] === this.hover.key ? "linked" : "" },
      ...visible.map((j) => [rows[i][j], j]).map(([cell, j]) => element("td", { class: text.has(columns[j]) ? "text" : "" }, typeof cell === "number" ? (Number.isInteger(cell) ? String(cell) : formatted(cell)) : String(cell)))));
    const note = rows.length > shown.length ? [element("p", { class: "v-note" }, `${shown.length} of ${rows.length} rows; the CSV has all`)] : [];
    const scroll = this.parts.rows.scrollTop;
    this.parts.rows.replaceChildren(element("table", {}, element("thead", {}, head), element("tbody", {}, ...body)), ...note);
    this.parts.rows.scrollTop = scroll;
  }

  csv() {
    const { columns, rows } = this.tableRows();
    const cell = (value) => {
      if (typeof value === "number") return Number.isNaN(value) ? "" : String(value);
      const safe = value.length > 1 && /^[=+\-@\t\r]/.test(value) ? `'${value}` : value;
      return /[",\n\r]/.test(safe) ? `"${safe.replace(/"/g, '""')}"` : safe;
    };
    return [columns, ...rows].map((row) => row.map(cell).join(",")).join("\n") + "\n";
  }

  download() {
    this.save(new Blob([this.csv()], { type: "text/csv" }), `${this.table.which}.csv`);
  }

  /** @param {Blob} blob @param {string} name */
  save(blob, name) {
    const link = element("a", { href: URL.createObjectURL(blob), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  // ---------------------------------------------------------------- gestures

  hoverWord(position) {
    if (position !== null && !this.shares?.has(position)) position = null;
    if (this.hover.word === position) return;
    this.hover.word = position;
    this.schedule();
  }

  pin(position, add) {
    const { pins } = this.state;
    if (add) {
      const without = pins.filter((p) => p !== position);
      this.set({ pins: without.length < pins.length ? (without.length ? without : pins) : [...pins, position] });
    } else this.set({ pins: [position] });
    this.say(this.parts.caption.textContent);
  }

  /** @param {string} text */
  say(text) { this.parts.live.textContent = text; }

  /** @param {KeyboardEvent} event */
  key(event) {
    const target = /** @type {HTMLElement} */ (event.target);
    if (["INPUT", "SELECT", "TEXTAREA"].includes(target.tagName) || this.parts.dialog.open || event.ctrlKey || event.metaKey || event.altKey) return;
    const { header } = this.sample;
    if (event.key === "Escape") { this.hover = { word: null, cell: null, key: null }; this.set({ box: null, value: this.state.value === "box" ? "share" : this.state.value }); return; }
    if (target === this.parts.heads && this.moveCursor(event)) { event.preventDefault(); return; }
    if (target === this.parts.rows && ["ArrowUp", "ArrowDown"].includes(event.key)) return;
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
      const words = header.words.filter((w) => !w.visual && this.shares.has(w.position)).map((w) => w.position);
      if (!words.length) return;
      const at = words.indexOf(this.state.pins[this.state.pins.length - 1]);
      const next = words[Math.max(0, Math.min(words.length - 1, at + (event.key === "ArrowRight" ? 1 : -1)))];
      this.hover.word = null;
      this.set({ pins: [next] });
      this.wordButtons.get(next)?.focus({ preventScroll: true });
      event.preventDefault();
    } else if (event.key === "ArrowUp" || event.key === "ArrowDown") {
      const at = this.sample.layerIndex.get([...this.state.heads.keys()].at(-1)) ?? 0;
      const next = header.layers[Math.max(0, Math.min(header.layers.length - 1, at + (event.key === "ArrowDown" ? 1 : -1)))];
      const heads = this.state.heads.size === 1 ? [...this.state.heads.values()][0] : null;
      this.set({ heads: this.parsedSelection(heads === null ? `${next}` : heads.map((h) => `${next}.${h}`).join(","), this.sample) });
      if (!this.state.heads.size) this.set({ heads: new Map([[next, null]]) });
      event.preventDefault();
    } else if (event.key === "r") this.set({ row: this.state.row === "word" ? "before" : "word" });
    else if (event.key === "m") {
      const names = this.measures(this.sample).map(([name]) => name);
      this.set({ measure: names[(names.indexOf(this.state.measure) + 1) % names.length] });
    } else if (event.key === "s") this.set({ sinks: !this.state.sinks });
    else if (event.key === "d") this.nextTheme();
  }

  moveCursor(event) {
    const { header } = this.sample;
    const first = [...this.state.heads][0];
    this.cursor ??= { layer: first[0], head: first[1]?.[0] ?? 0 };
    const index = this.sample.layerIndex.get(this.cursor.layer) ?? 0;
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (step) {
      const next = Math.max(0, Math.min(header.layers.length - 1, index + step[0]));
      this.cursor = { layer: header.layers[next], head: Math.max(0, Math.min(header.heads[next] - 1, this.cursor.head + step[1])) };
      this.schedule();
      this.say(`layer ${this.cursor.layer}, head ${this.cursor.head}: ${formatted(this.headGrid[next][this.cursor.head])}`);
      return true;
    }
    if (event.key === "Enter" || event.key === " ") { this.select([[this.cursor.layer, this.cursor.head]], event.shiftKey); return true; }
    return false;
  }

  /** Select heads; `null` for all heads of a layer. @param {(number | null)[][]} cells @param {boolean} add */
  select(cells, add) {
    /** @type {Selection} */
    const heads = add ? new Map(this.state.heads) : new Map();
    for (const [layer, head] of cells) {
      const before = heads.get(layer);
      if (head === null) heads.set(layer, null);
      else if (this.sample.hasRow(layer, head) && before !== null) {
        const some = before ?? [];
        heads.set(layer, some.includes(head) ? some : [...some, head].sort((a, b) => a - b));
      } else if (before === null && this.sample.hasRow(layer, head)) heads.set(layer, [head]);
    }
    if (heads.size) this.set({ heads: new Map([...heads].sort((a, b) => a[0] - b[0])), measure: this.state.measure.startsWith("rollout") ? "probability" : this.state.measure });
  }

  /** Cell of the matrix of heads at a pointer. */
  headAt(event, clamp = false) {
    const g = this.headGeometry;
    const { header } = this.sample;
    let index = Math.floor((event.offsetY - g.top) / g.high);
    let head = Math.floor((event.offsetX - g.left) / g.cell);
    if (clamp) { index = Math.max(0, Math.min(g.rows - 1, index)); head = Math.max(0, Math.min(g.columns - 1, head)); }
    const inRows = index >= 0 && index < g.rows;
    const side = event.offsetX < g.left || event.offsetX >= g.side;
    if (inRows && side) return { layer: header.layers[index], head: null, index };
    if (inRows && head >= 0 && head < header.heads[index]) return { layer: header.layers[index], head, index };
    if (!inRows && head >= 0 && head < g.columns) return { layer: null, head, index };
    if (!inRows && side) return { layer: null, head: null, index };
    return null;
  }

  listenToHeads() {
    const canvas = this.parts.heads;
    canvas.addEventListener("pointermove", (event) => {
      if (this.dragHeads) { this.dragHeads[1] = this.headAt(event, true) ?? this.dragHeads[1]; this.schedule(); return; }
      const cell = this.headAt(event);
      const next = cell && cell.layer !== null ? { layer: cell.layer, head: cell.head } : null;
      if (JSON.stringify(next) !== JSON.stringify(this.hover.cell)) { this.hover.cell = next; this.schedule(); }
      const without = cell && cell.layer !== null && cell.head !== null && !this.sample.hasRow(cell.layer, cell.head);
      canvas.style.cursor = without ? "not-allowed" : cell ? "pointer" : "default";
    });
    canvas.addEventListener("pointerleave", () => { this.hover.cell = null; this.schedule(); });
    canvas.addEventListener("pointerdown", (event) => {
      const cell = this.headAt(event);
      if (!cell) return;
      const { header } = this.sample;
      if (cell.layer === null && cell.head === null) this.select(header.layers.map((layer) => [layer, null]), false);
      else if (cell.layer === null) this.select(header.layers.map((layer) => [layer, cell.head]), event.shiftKey);
      else if (cell.head === null) this.select([[cell.layer, null]], event.shiftKey);
      else { this.hover.cell = null; this.dragHeads = [cell, cell]; canvas.setPointerCapture(event.pointerId); }
    });
    canvas.addEventListener("pointerup", (event) => {
      if (!this.dragHeads) return;
      const [a, b] = this.dragHeads;
      this.dragHeads = null;
      const cells = [];
      const { header } = this.sample;
      for (let i = Math.min(a.index, b.index); i <= Math.max(a.index, b.index); i++) {
        for (let head = Math.min(a.head, b.head); head <= Math.max(a.head, b.head); head++) cells.push([header.layers[i], head]);
      }
      this.cursor = { layer: b.layer ?? header.layers[b.index], head: b.head };
      this.select(cells, event.shiftKey);
      this.schedule();
    });
    canvas.addEventListener("focus", () => this.schedule());
    canvas.addEventListener("blur", () => this.schedule());
  }

  listenToMatrix() {
    const canvas = this.parts.matrix;
    const at = (event) => {
      const g = this.matrixGeometry;
      if (!g) return { word: null, key: null };
      const row = Math.floor((event.offsetY - g.top) / g.high);
      const column = Math.floor(((event.offsetX - g.left) / g.wide) * g.keys.length);
      return { word: g.words[row]?.position ?? null, key: event.offsetX >= g.left ? g.keys[column] ?? null : null };
    };
    canvas.addEventListener("pointermove", (event) => {
      const { word, key } = at(event);
      if (word !== this.hover.word || key !== this.hover.key) { Object.assign(this.hover, { word, key }); this.schedule(); }
    });
    canvas.addEventListener("pointerleave", () => { Object.assign(this.hover, { word: null, key: null }); this.schedule(); });
    canvas.addEventListener("click", (event) => { const { word } = at(event); if (word !== null) this.pin(word, event.shiftKey); });
  }

  listenToProfile() {
    const canvas = this.parts.profile;
    const at = (event) => this.sample.header.layers[Math.floor((event.offsetX - this.profile.left) / this.profile.step)];
    canvas.addEventListener("pointermove", (event) => {
      const layer = at(event);
      const next = layer === undefined ? null : { layer, head: null };
      if (JSON.stringify(next) !== JSON.stringify(this.hover.cell)) { this.hover.cell = next; this.schedule(); }
      canvas.style.cursor = next ? "pointer" : "default";
    });
    canvas.addEventListener("pointerleave", () => { this.hover.cell = null; this.schedule(); });
    canvas.addEventListener("click", (event) => { const layer = at(event); if (layer !== undefined) this.select([[layer, null]], event.shiftKey); });
  }

  listenToPicture(canvas, panel) {
    const figure = () => this.figures.find((f) => f.over === canvas);
    const point = (event) => { const s = figure().scale; return [event.offsetX / s, event.offsetY / s]; };
    const keyAt = (/** @type {number[]} */ [x, y]) => {
      const boxes = panel.data.header.keys.box;
      return panel.data.keysOf[panel.number].find((key) => { const [x0, y0, x1, y1] = boxes[key]; return x >= x0 && x < x1 && y >= y0 && y < y1; }) ?? null;
    };
    let from = null;
    const redraw = () => {
      this.panels.forEach((p, i) => this.drawOver(p, i));
      this.drawPictureText();
      this.drawMatrix();
    };
    canvas.addEventListener("pointermove", (event) => {
      const to = point(event);
      if (from) {
        const edges = [Math.min(from[0], to[0]), Math.min(from[1], to[1]), Math.max(from[0], to[0]), Math.max(from[1], to[1])];
        this.dragged = { picture: panel.number, edges };
      }
      const key = keyAt(to);
      if (key !== this.hover.key || from) { this.hover.key = key; redraw(); }
    });
    canvas.addEventListener("pointerleave", () => { if (this.hover.key !== null) { this.hover.key = null; redraw(); } });
    canvas.addEventListener("pointerdown", (event) => {
      if (panel.data !== this.sample) return;
      from = point(event);
      canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointerup", () => {
      if (!from) return;
      const start = from;
      from = null;
      const dragged = this.dragged;
      this.dragged = null;
      const small = !dragged || Math.hypot(dragged.edges[2] - dragged.edges[0], dragged.edges[3] - dragged.edges[1]) * figure().scale < 6;
      const key = keyAt(start);
      if (!small) this.set({ box: dragged, value: "box" });
      else if (key !== null) this.set({ box: { picture: panel.number, edges: [...panel.data.header.keys.box[key]] }, value: "box" });
      else this.set({ box: null, value: this.state.value === "box" ? "share" : this.state.value });
    });
    canvas.addEventListener("dblclick", (event) => {
      const key = keyAt(point(event));
      if (key !== null && panel.data.queryOf.has(key)) this.set({ pins: [key], box: null, value: "share" });
    });
  }

  nextTheme() {
    this.theme = this.dark ? "light" : "dark";
    this.paint();
  }

  // ---------------------------------------------------------------- copies

  /** Positions of the query rows that are shown. */
  shownPositions(data = this.sample) {
    return this.queries(data, this.state.pins).map((query) => data.header.queries[query]);
  }

  /** The Python that makes the picture. */
  python() {
    const { header } = this.sample;
    const { measure, heads, sinks, each, compare } = this.state;
    const rows = JSON.stringify(this.shownPositions()).replaceAll(",", ", ");
    const lines = ["import xmodal_interp as xi", "from xmodal_interp import figures", ""];
    if (/^samples?(\[\d+\])?$/.test(header.source)) lines.push(`# ${header.source} is the sample ${JSON.stringify(header.name)}`);
    const name = header.source === "sample" ? "sample" : header.source;
    if (name !== "sample") lines.push(`sample = ${name}`);
    const tower = header.tower === "vision" ? `, tower="vision"` : "";
    const picture = this.sample.header.pictures[this.state.box?.picture ?? 0];
    const image = picture && picture.of[0] === "image" ? (header.tower === "vision" ? header.image : picture.of[1]) : 0;
    const at = image ? `, image=${image}` : "";
    const second = compare === null ? null : /** @type {SampleData} */ (this.samples[compare]);
    const rowsOfSecond = second ? JSON.stringify(this.shownPositions(second)).replaceAll(",", ", ") : "";
    if (second) lines.push(`other = ${second.header.source}`);
    /** The same call for both samples. @param {(name: string, positions: string) => string[]} call */
    const both = (call) => [...call("sample", rows), ...(second ? call("other", rowsOfSecond) : [])];
    if (measure.startsWith("rollout")) {
      const value = measure === "rollout" ? "rollout" : "log2_ratio";
      lines.push(...both((name, positions) => [
        `table = xi.attention_rollout(${name}, ${positions}, baseline="uniform"${tower}${at})`,
        `figures.rollout_overlay(table, ${name}, "${value}"${at})`,
      ]));
      return lines.join("\n") + "\n";
    }
    const cells = [...heads];
    const text = (some) => (some === null ? "None" : `[${some.join(", ")}]`);
    const show = measure === "lift" ? `, show="lift"` : "";
    const hide = sinks ? `, hide="sinks"` : "";
    if (cells.length === 1 && picture && picture.of[0] === "image" && picture.of[2] === "image") {
      const [layer, some] = cells[0];
      const only = some === null ? "" : some.length === 1 ? `, ${some[0]}` : `, ${text(some)}`;
      if (second && rows === rowsOfSecond && header.title !== second.header.title) {
        const titles = `{${JSON.stringify(header.title)}: sample, ${JSON.stringify(second.header.title)}: other}`;
        const of = some === null ? "" : `, ${text(some)}`;
        lines.push(`figures.overlay_grid(${titles}, ${rows}, [${layer}]${of}, columns="sample"${show}${hide}${tower}${at})`);
      } else {
        const call = each && this.state.pins.length > 1 && !second ? "overlays" : "overlay";
        lines.push(...both((name, positions) => [`figures.${call}(${name}, ${positions}, ${layer}${only}${show}${hide}${tower}${at})`]));
      }
      return lines.join("\n") + "\n";
    }
    const chosen = `{${cells.map(([layer, some]) => `${layer}: ${text(some)}`).join(", ")}}`;
    lines.push(`values = xi.viewer.shown_values(sample, ${rows}, ${chosen}, "${measure}"${tower}${header.tower === "vision" && at ? at : ""})`);
    if (picture && picture.of[0] === "image" && header.tower === "language" && header.kind === "self") {
      lines.push(`keys = sample.where("image", image=${picture.of[1]})`, `figures.map_overlays(sample, {"attention": values[keys]}, "${measure}", meaning="${this.meaning()}"${at})`);
    } else if (picture && picture.of[0] === "video" && header.tower === "language") {
      lines.push(`keys = sample.where("video", video=${picture.of[1]})`, `sample.grid(values[keys], video=${picture.of[1]})`);
    } else lines.push("print(values)");
    return lines.join("\n") + "\n";
  }

  /** @param {string} text */
  async toClipboard(text) {
    try { await navigator.clipboard.writeText(text); return true; } catch { return false; }
  }

  async showPython() {
    const code = this.python();
    const copied = await this.toClipboard(code);
    this.open("Python", element("p", { class: "v-note" }, copied ? "Copied. This call makes the picture that is shown." : "This call makes the picture that is shown."), element("pre", {}, code));
  }

  open(title, ...children) {
    const { dialog } = this.parts;
    dialog.replaceChildren(element("h2", {}, title), ...children, element("form", { method: "dialog" }, element("button", { class: "v-button" }, "Close")));
    dialog.showModal();
  }

  about() {
    const { header } = this.sample;
    const list = (pairs) => element("dl", {}, ...pairs.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));
    this.open("About this page",
      list([["sample", header.name], ...Object.entries(header.provenance)]),
      element("p", { class: "v-note" }, `Probabilities of ${header.queries.length} query rows, in 8 bits of a square-root scale per row: error at most ${(100 * header.relative_error).toFixed(1)}% of the row's largest value${this.atMost()}. Shares, uniform shares and entropies are exact. ${this.load ? "Rows are computed by the server on this machine." : "The page requests nothing from any network."}`),
      list([["← →", "previous and next word"], ["↑ ↓", "previous and next layer"], ["m", "next measure"], ["r", "row of the word, or row that predicts it"], ["s", "hide sinks"], ["d", "dark or light"], ["Esc", "remove the box"]]));
  }

  /** The pictures with caption and scale as one canvas. */
  composed() {
    const ratio = devicePixelRatio || 1;
    const box = this.parts.panels.getBoundingClientRect();
    const figures = this.figures ?? [];
    const right = Math.max(...figures.map((f) => f.stack.getBoundingClientRect().right - box.left), 300);
    const canvas = document.createElement("canvas");
    const height = box.height + 24 + 60;
    [canvas.width, canvas.height] = [Math.round((right + 24) * ratio), Math.round((height + 24) * ratio)];
    const c = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
    c.scale(ratio, ratio);
    c.fillStyle = this.colors.surface;
    c.fillRect(0, 0, canvas.width, canvas.height);
    c.font = "600 13px system-ui, sans-serif";
    c.fillStyle = this.colors.ink;
    c.fillText(this.parts.caption.textContent, 12, 22, right);
    c.font = "12px system-ui, sans-serif";
    for (const figure of figures) {
      const place = figure.stack.getBoundingClientRect();
      const [x, y] = [place.left - box.left + 12, place.top - box.top + 34];
      c.drawImage(figure.base, x, y, figure.w, figure.h);
      c.drawImage(figure.over, x, y, figure.w, figure.h);
      c.fillStyle = this.colors.soft;
      c.fillText(figure.caption.textContent, x, y + figure.h + 14, figure.w);
    }
    const scale = this.parts.scale;
    c.drawImage(scale, 12, box.height + 40, scale.width / ratio, scale.height / ratio);
    return canvas;
  }

  async copyPicture() {
    const blob = await new Promise((resolve) => this.composed().toBlob(resolve, "image/png"));
    try {
      await navigator.clipboard.write([new ClipboardItem({ "image/png": blob })]);
      this.say("picture copied");
    } catch { this.save(blob, "attention.png"); }
  }
}

/** @param {HTMLElement} root @param {string} message */
function fail(root, message) {
  root.replaceChildren(element("div", { class: "v-error", role: "alert" }, element("h1", {}, "This page cannot be shown"), element("p", {}, message)));
}

/** Numbers of the samples that the address names. */
function wantedSamples() {
  const given = new URLSearchParams(location.hash.slice(1));
  return [given.get("sample") ?? "0", given.get("compare")].filter((each) => each !== null).map(Number);
}

/** @param {string} path */
async function fetched(path) {
  const answer = await fetch(path).catch(() => { throw new Error("The server has stopped. Start xmodal view again."); });
  if (!answer.ok) throw new Error((await answer.json()).error);
  return answer;
}

/** Show samples whose rows a local server computes when they are asked for. @param {Document} page */
export async function fromServer(page) {
  const root = /** @type {HTMLElement} */ (page.getElementById("viewer"));
  try {
    const header = JSON.parse(page.getElementById("header").textContent);
    const load = async (/** @type {number} */ sample) => {
      const of = await (await fetched(`/sample?sample=${sample}`)).json();
      return new SampleData(of, null, async (query) => {
        const buffer = await (await fetched(`/rows?sample=${sample}&query=${query}`)).arrayBuffer();
        const size = new DataView(buffer).getUint32(0, true);
        const about = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, size)));
        const arrays = arraysOf(about, buffer.slice(8 + Math.ceil(size / 8) * 8));
        return /** @type {any} */ (Object.fromEntries(Object.entries(arrays).map(([name, { data }]) => [name, data])));
      });
    };
    const samples = header.titles.map(() => null);
    const known = wantedSamples().filter((index) => index in samples);
    for (const index of known.length ? known : [0]) samples[index] = await load(index);
    /** @type {any} */ (root).viewer = new Viewer(root, header, samples, load);
  } catch (error) {
    fail(root, error instanceof Error ? error.message : String(error));
    throw error;
  }
}

/** Show the data that is inside the page. @param {Document} page */
export async function fromPage(page) {
  const root = /** @type {HTMLElement} */ (page.getElementById("viewer"));
  try {
    const header = JSON.parse(page.getElementById("header").textContent);
    const buffer = await unzipped(bytesOf(page.getElementById("blocks").textContent));
    const arrays = arraysOf(header.blocks, buffer);
    const samples = header.samples.map((of, i) => {
      const mine = Object.entries(arrays).filter(([name]) => name.startsWith(`${i}.`));
      return new SampleData(of, Object.fromEntries(mine.map(([name, array]) => [name.slice(name.indexOf(".") + 1), array])));
    });
    /** @type {any} */ (root).viewer = new Viewer(root, header, samples);
  } catch (error) {
    fail(root, `Its data is damaged: ${error instanceof Error ? error.message : error}. Save the page again.`);
    throw error;
  }
}
