"use strict";
// Browse a memory through its HTTP API. Whatever a memory says is shown as text, never as markup.

const PAGE = 100;
const LABEL = 170; // pixels beside a node of the graph
const SVG = "http://www.w3.org/2000/svg";
const $ = (selector) => document.querySelector(selector);

// Elements are made here only; strings become text nodes.
function make(tag, attributes = {}, ...children) {
  const made = tag.startsWith("svg:")
    ? document.createElementNS(SVG, tag.slice(4))
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "click") {
      made.addEventListener("click", value);
      if (tag.startsWith("svg:")) {
        made.setAttribute("role", "button");
        made.setAttribute("tabindex", "0");
        made.addEventListener("keydown", (event) => event.key === "Enter" && value());
      }
    } else {
      made.setAttribute(name, value);
    }
  }
  made.append(...children);
  return made;
}

let space = {};
let asked = 0; // a reply to an older question must not replace that to a newer one

async function api(path, fields, body) {
  const headers = {};
  if ($("#token").value) headers.Authorization = `Bearer ${$("#token").value}`;
  const options = { headers };
  if (body) {
    headers["Content-Type"] = "application/json";
    Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  }
  const query = new URLSearchParams(fields ?? {}).toString();
  const answer = await fetch(query ? `${path}?${query}` : path, options);
  const document_ = await answer.json();
  if (!answer.ok) throw new Error(document_.error?.message ?? `status ${answer.status}`);
  return document_;
}

function guarded(action) {
  return async (...given) => {
    given[0]?.preventDefault?.();
    try {
      $("#message").hidden = true;
      await action(...given);
    } catch (error) {
      $("#message").textContent = error.message;
      $("#message").hidden = false;
    }
  };
}

const day = (time) => (time ? time.slice(0, 16).replace("T", " ") : "");
const short = (text, length) => (text.length > length ? `${text.slice(0, length - 1)}…` : text);

function said(item) {
  const until = item.valid_to ? ` to ${day(item.valid_to)}` : "";
  return make("button", { click: () => show(item.id) },
    make("span", { class: "pale" },
      `${day(item.valid_from)}${until} ${item.kind} ${item.speaker ?? ""}`),
    make("div", { class: "text clip" }, item.text));
}

// Show pages one after another: `load(after)` returns {next} and has drawn what it got.
async function pages(section, load) {
  const more = $(`#${section} .more`);
  let after = 0;
  const turn = ++asked;
  const step = async () => {
    const page = await load(after, () => turn === asked);
    if (turn !== asked) return;
    after = page.next;
    more.hidden = after === null;
  };
  more.onclick = guarded(step);
  await step();
}

const views = {
  async memories() {
    const list = $("#memories .list");
    list.replaceChildren();
    await pages("memories", async (after, current) => {
      const page = await api("/memories", { ...space, limit: PAGE, after, newest: true });
      if (current()) list.append(...page.memories.map((item) => make("li", {}, said(item))));
      return page;
    });
  },

  async search() {
    const list = $("#search .list");
    const query = $("#query").value.trim();
    list.replaceChildren();
    if (!query) return;
    const turn = ++asked;
    const limit = Number($("#limit").value);
    const { hits } = await api("/search", null, { ...space, query, limit });
    if (turn !== asked) return;
    list.append(...hits.map((hit) => make("li", {}, said(hit), reasons(hit))));
    if (!hits.length) list.append(make("li", {}, "nothing was found"));
  },

  async timeline() {
    const picture = $("#timeline .picture");
    const items = [];
    const when = {};
    for (const name of ["valid", "recorded"]) {
      if ($(`#${name}`).value) when[name] = `${$(`#${name}`).value}Z`;
    }
    picture.replaceChildren();
    await pages("timeline", async (after, current) => {
      const page = await api("/as-of", { ...space, ...when, limit: PAGE, after });
      if (current()) {
        items.push(...page.memories);
        picture.replaceChildren(timeline(items));
      }
      return page;
    });
  },

  async graph() {
    const picture = $("#graph .picture");
    const items = new Map();
    const edges = [];
    picture.replaceChildren();
    await pages("graph", async (after, current) => {
      const page = await api("/graph", { ...space, limit: PAGE, after });
      if (current()) {
        for (const item of page.memories) items.set(item.id, item);
        edges.push(...page.edges);
        const known = edges.filter((edge) => items.has(edge.src) && items.has(edge.dst));
        $("#graph .note").textContent =
          `${items.size} memories, ${known.length} of ${edges.length} edges shown`;
        picture.replaceChildren(graph(items, known));
      }
      return page;
    });
  },
};

// Why a hit was found: each term of its score as a bar.
function reasons(hit) {
  const terms = Object.entries(hit.terms).filter(([, value]) => value);
  const most = Math.max(...terms.map(([, value]) => Math.abs(value)), 1e-9);
  terms.sort(([, a], [, b]) => Math.abs(b) - Math.abs(a));
  const rows = terms.flatMap(([name, value]) => {
    const bar = make("div", { class: value < 0 ? "bar below" : "bar" });
    bar.style.width = `${(100 * Math.abs(value)) / most}%`;
    return [make("span", {}, name), bar, make("span", {}, value.toFixed(3))];
  });
  return make("div", { class: "terms" },
    make("span", {}, "score"), make("span"), make("span", {}, hit.score.toFixed(3)), ...rows);
}

// One row per memory: a bar while it held in the world, a dot where it became known.
function timeline(items) {
  const now = Date.now();
  const rows = items.map((item) => ({
    item,
    from: Date.parse(item.valid_from ?? item.recorded_at),
    to: item.valid_to ? Date.parse(item.valid_to) : Math.max(now, Date.parse(item.recorded_at)),
    known: Date.parse(item.recorded_at),
  }));
  rows.sort((a, b) => a.from - b.from || a.item.position - b.item.position);
  const times = rows.flatMap((row) => [row.from, row.to, row.known]);
  const first = times.reduce((a, b) => Math.min(a, b), now);
  const last = times.reduce((a, b) => Math.max(a, b), first + 1);
  const [left, width, height, top] = [330, 560, 18, 30];
  const x = (time) => left + (width * (time - first)) / (last - first);
  const svg = make("svg:svg", {
    width: left + width + 20, height: top + height * rows.length + 10, role: "img",
    "aria-label": "when memories held and became known",
  });
  for (let i = 0; i <= 3; i++) {
    const time = first + ((last - first) * i) / 3;
    svg.append(
      make("svg:line", { class: "axis", x1: x(time), x2: x(time), y1: 18, y2: "100%" }),
      make("svg:text", { x: x(time), y: 13, "text-anchor": i === 3 ? "end" : "middle" },
        day(new Date(time).toISOString())));
  }
  rows.forEach(({ item, from, to, known }, i) => {
    const y = top + i * height;
    svg.append(make("svg:g", { click: () => show(item.id) },
      make("svg:title", {}, `${item.text}\nheld from ${day(item.valid_from)} to ` +
        `${day(item.valid_to) || "now"}, known since ${day(item.recorded_at)}`),
      make("svg:text", { x: 6, y: y + 12 }, short(item.text, 52)),
      make("svg:rect", { class: "held", x: x(from), y: y + 4, height: 9, rx: 3,
        width: Math.max(x(to) - x(from), 2) }),
      make("svg:circle", { class: "known", cx: x(known), cy: y + 8.5, r: 4 })));
  });
  return svg;
}

// Springs along edges, repulsion between all, a pull to the middle; starts on a circle, so that the
// same graph always looks the same.
function layout(ids, edges, width, height) {
  const places = new Map(ids.map((id, i) => {
    const turn = (2 * Math.PI * i) / ids.length;
    return [id, { x: width * (0.5 + 0.4 * Math.cos(turn)), y: height * (0.5 + 0.4 * Math.sin(turn)) }];
  }));
  const nodes = [...places.values()];
  const length = Math.sqrt((width * height) / Math.max(ids.length, 1)) * 0.5;
  const steps = Math.min(200, Math.ceil(4e6 / (ids.length * ids.length + 1)));
  for (let step = 0; step < steps; step++) {
    const most = (length * (steps - step)) / steps;
    for (const node of nodes) node.dx = node.dy = 0;
    const push = (a, b, force) => {
      const [dx, dy] = [a.x - b.x || 0.01, a.y - b.y || 0.01];
      const far = Math.hypot(dx, dy);
      const by = force(far) / far;
      a.dx += dx * by; a.dy += dy * by;
      b.dx -= dx * by; b.dy -= dy * by;
    };
    for (let i = 0; i < nodes.length; i++) {
      for (let j = 0; j < i; j++) push(nodes[i], nodes[j], (far) => (length * length) / far);
    }
    for (const edge of edges) {
      if (edge.src !== edge.dst) {
        push(places.get(edge.src), places.get(edge.dst), (far) => (-far * far) / length);
      }
    }
    for (const node of nodes) {
      node.dx += (width / 2 - node.x) * 0.15;
      node.dy += (height / 2 - node.y) * 0.15;
      const far = Math.hypot(node.dx, node.dy) || 1;
      const by = Math.min(far, most) / far;
      node.x += node.dx * by;
      node.y += node.dy * by;
    }
  }
  for (const [axis, end] of [["x", width - LABEL], ["y", height - 20]]) {
    const all = nodes.map((node) => node[axis]);
    const [first, last] = [Math.min(...all), Math.max(...all)];
    for (const node of nodes) node[axis] = 20 + ((end - 20) * (node[axis] - first)) / (last - first || 1);
  }
  return places;
}

function graph(items, edges) {
  // Memories without relations would only hide those that have some.
  const ids = [...new Set(edges.flatMap((edge) => [edge.src, edge.dst]))];
  if (!ids.length) return make("p", { class: "pale" }, "no edges among these memories");
  const size = Math.max(480, Math.ceil(Math.sqrt(ids.length) * 110));
  const [width, height] = [Math.ceil(size * 1.6), size];
  const places = layout(ids, edges, width, height);
  const svg = make("svg:svg", { width, height, role: "img", "aria-label": "memories and edges" },
    make("svg:defs", {}, make("svg:marker", { id: "tip", viewBox: "0 0 8 8", refX: 14, refY: 4,
      markerWidth: 7, markerHeight: 7, orient: "auto" },
      make("svg:path", { d: "M0 0 8 4 0 8z", fill: "currentColor" }))));
  for (const edge of edges) {
    const [a, b] = [places.get(edge.src), places.get(edge.dst)];
    svg.append(
      make("svg:line", { class: "edge", x1: a.x, y1: a.y, x2: b.x, y2: b.y },
        make("svg:title", {}, edge.rel)),
      make("svg:text", { x: (a.x + b.x) / 2, y: (a.y + b.y) / 2, opacity: 0.6 }, edge.rel));
  }
  for (const id of ids) {
    const { x, y } = places.get(id);
    const { text } = items.get(id);
    svg.append(make("svg:g", { click: () => show(id) },
      make("svg:title", {}, text),
      make("svg:circle", { class: "node", cx: x, cy: y, r: 7 }),
      make("svg:text", { x: x + 10, y: y + 4 }, short(text, 26))));
  }
  return svg;
}

// All that is known of one memory, and all that happened to it.
const show = guarded(async (id) => {
  const { events } = await api(`/memories/${id}/history`, space);
  const item = await api(`/memories/${id}`, space).catch(() => null);
  const facts = Object.entries(item ?? { id, state: "not current" })
    .filter(([name, value]) => name !== "text" && value !== null && value !== "" &&
      !(typeof value === "object" && !Object.keys(value).length))
    .flatMap(([name, value]) => [make("dt", {}, name),
      make("dd", {}, typeof value === "object" ? JSON.stringify(value) : String(value))]);
  const happened = events.map((event) => make("li", {},
    make("span", { class: "pale" },
      `${day(event.time)} ${event.op} by ${event.actor}${event.why ? ` (${event.why})` : ""}`),
    make("div", { class: "text" }, event.after?.text ?? "")));
  $("#detail").replaceChildren(
    make("button", { click: () => { $("#detail").hidden = true; } }, "close"),
    make("p", { class: "text" }, item?.text ?? ""),
    make("dl", {}, ...facts),
    make("h2", {}, "History"),
    make("ol", {}, ...happened));
  $("#detail").hidden = false;
});

let tab = "memories";

const refresh = guarded(async () => {
  await views[tab]();
});

function choose(name) {
  tab = name;
  for (const button of document.querySelectorAll("nav button")) {
    button.setAttribute("aria-pressed", String(button.dataset.tab === name));
  }
  for (const section of document.querySelectorAll("main section")) {
    section.hidden = section.id !== name;
  }
  return refresh();
}

// Read whose memories there are; keep the one that was chosen.
const start = guarded(async () => {
  sessionStorage.setItem("token", $("#token").value);
  const select = $("#space");
  const chosen = select.value;
  const options = [];
  for (let after = 0; after !== null;) {
    const page = await api("/spaces", { limit: 1000, after });
    for (const { memories, ...names } of page.spaces) {
      const parts = [names.tenant, names.user, names.agent, names.run];
      const label = parts.filter(Boolean).join(" / ") || "(no name)";
      options.push(make("option", { value: JSON.stringify(names) }, `${label}: ${memories}`));
    }
    after = page.next;
  }
  if (!options.length) options.push(make("option", { value: "{}" }, "(empty)"));
  select.replaceChildren(...options);
  if ([...select.options].some((option) => option.value === chosen)) select.value = chosen;
  space = JSON.parse(select.value);
  const stats = await api("/stats");
  $("#counts").textContent = `${stats.memories} memories, ${stats.edges} edges, ${stats.policy}`;
  await views[tab]();
});

$("#token").value = sessionStorage.getItem("token") ?? "";
$("#whose").addEventListener("submit", start);
$("#space").addEventListener("change", () => {
  space = JSON.parse($("#space").value);
  $("#detail").hidden = true;
  refresh();
});
$("#ask").addEventListener("submit", guarded(() => views.search()));
$("#when").addEventListener("submit", guarded(() => views.timeline()));
for (const button of document.querySelectorAll("nav button")) {
  button.addEventListener("click", () => choose(button.dataset.tab));
}
start();
