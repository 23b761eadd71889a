// SPDX-License-Identifier: MPL-2.0
//
// The map of a node. Every text comes from the agent, and much of it from tasks that may
// be hostile, so it is only ever set as text: nothing here makes markup of a string.
"use strict";

const interval = 2000; // milliseconds between two looks
const most = 60; // allocations that are drawn at a time
const labels = 18; // edges up to which each has its rate beside it
const $ = (id) => document.getElementById(id);

let graph = null; // the last good answer
let seen = 0; // when it came
let failing = null; // since when none comes
let paused = false;
let selected = null; // what the panel shows: {kind: "allocation"|"end"|"node", id}
let opener = null; // what had the focus before the panel
let order = ""; // of the cards, as last laid out
let hovered = null;
const cards = new Map(); // element by ID of allocation or end

// clean shows characters that would not be seen, or would turn the text around.
function clean(text) {
  return String(text).replace(/[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]/g,
    (c) => "\\u" + c.codePointAt(0).toString(16).padStart(4, "0"));
}

function el(tag, properties, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties || {})) {
    if (name === "text") element.textContent = clean(value);
    else if (name === "class") element.className = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, name === "title" || name === "aria-label" ? clean(value) : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const svg = (tag, attributes) => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
};

// rate is a rate as people say it: what is rare by the minute.
function rate(perSecond) {
  if (perSecond <= 0) return "0/s";
  if (perSecond < 0.95) return Math.max(1, Math.round(perSecond * 60)) + "/min";
  return (perSecond < 9.95 ? perSecond.toFixed(1) : Math.round(perSecond).toLocaleString("en")) + "/s";
}

const clock = (time) => new Date(time).toLocaleTimeString("en-GB");
const short = (id) => id.slice(0, 8);
const title = (a) => a.job ? (a.group ? a.job + "/" + a.group : a.job) : short(a.id);
const endTitle = (e) => e.kind === "others" ? "others" : e.kind === "loopback" ? "its own loopback" : e.name;
const kinds = {service: "service", allocation: "allocation of this node", address: "address", loopback: "inside the allocation", others: "not told apart"};

function tone(a) {
  if (a.refused > 0 || a.errors > 0 || a.state === "unprotected") return "bad";
  if (a.warnings > 0 || a.state === "managed" && !a.in_sync) return "warn";
  return a.state === "managed" ? "good" : "";
}

// chips say how an allocation stands, the worst first.
function chips(a) {
  const list = [];
  if (a.state !== "managed") list.push(el("span", {class: "chip " + (a.state === "unprotected" ? "bad" : "warn"), text: a.state}));
  if (a.errors + a.warnings > 0) {
    const count = a.errors + a.warnings;
    list.push(el("span", {class: "chip " + (a.errors ? "bad" : "warn"), text: count + (count === 1 ? " problem" : " problems")}));
  }
  if (a.state === "managed" && !a.in_sync) list.push(el("span", {class: "chip warn", text: "not in sync"}));
  if (a.mode) list.push(el("span", {class: "chip", text: a.mode}));
  if (a.guard) list.push(el("span", {class: "chip", text: "guard " + a.guard}));
  return list;
}

const row = (...parts) => el("span", {class: "row"}, ...parts);
const side = (carried) => el("span", {class: "side"}, el("span", {class: "rate", text: carried > 0 ? rate(carried) : "–"}));
const refusals = (refused) => refused > 0 ? el("span", {class: "side"}, el("span", {class: "refused-text", text: rate(refused) + " refused"})) : null;

function fill(card, look, label, ...children) {
  card.className = "card " + look;
  card.setAttribute("aria-label", clean(label));
  card.replaceChildren(...children.filter(Boolean));
}

// card is the one of an ID, which stays the same element while it is shown.
function card(kind, id) {
  if (!cards.has(id)) {
    const button = el("button", {type: "button", class: "card", "aria-pressed": "false"});
    button.addEventListener("click", () => open({kind, id}, button));
    for (const [event, is] of [["mouseenter", id], ["mouseleave", null], ["focus", id], ["blur", null]]) {
      button.addEventListener(event, () => { hovered = is; draw(); });
    }
    cards.set(id, button);
  }
  return cards.get(id);
}

// shown is what the filter leaves of the graph.
function shown() {
  const wanted = $("filter").value.trim().toLowerCase();
  const has = (...texts) => texts.some((text) => (text || "").toLowerCase().includes(wanted));
  const ends = new Map(graph.ends.map((e) => [e.id, e]));
  const near = new Set(); // allocations that talk to an end of that name
  for (const edge of graph.edges) {
    const end = ends.get(edge.from) || ends.get(edge.to);
    if (end && has(end.name)) near.add(edge.from === end.id ? edge.to : edge.from);
  }
  let list = graph.allocations.filter((a) => !wanted || near.has(a.id) || has(title(a), a.id, a.namespace, a.state));
  const matched = list.length;
  if (matched > most) {
    const trouble = (a) => a.refused > 0 ? 2 : a.errors > 0 ? 1 : 0;
    const kept = new Set([...list].sort((a, b) => trouble(b) - trouble(a) || b.rate - a.rate).slice(0, most));
    list = list.filter((a) => kept.has(a));
  }
  const ids = new Set(list.map((a) => a.id));
  const edges = graph.edges.filter((e) => ids.has(e.from) || ids.has(e.to));
  const used = new Set(edges.flatMap((e) => [e.from, e.to]));
  return {allocations: list, matched, edges, ends: graph.ends.filter((e) => used.has(e.id))};
}

// place orders ends by where their edges lead, so that few cross; only when other cards
// come or go, so that nothing jumps under a hand.
function place(view) {
  const at = new Map(view.allocations.map((a, i) => [a.id, i]));
  const mean = new Map();
  for (const end of view.ends) {
    const rows = view.edges.filter((e) => e.from === end.id || e.to === end.id).map((e) => at.get(e.from === end.id ? e.to : e.from));
    mean.set(end.id, (end.kind === "others" ? 1e6 : 0) + rows.reduce((sum, row) => sum + row, 0) / Math.max(rows.length, 1));
  }
  view.ends.sort((a, b) => mean.get(a.id) - mean.get(b.id) || a.id.localeCompare(b.id));
  const columns = {
    from: view.ends.filter((e) => e.source).map((e) => e.id), allocations: view.allocations.map((a) => a.id), to: view.ends.filter((e) => !e.source).map((e) => e.id),
  };
  const next = JSON.stringify([Object.values(columns), $("filter").value]);
  const sets = (text) => text && JSON.stringify(JSON.parse(text)[0].map((column) => [...column].sort()));
  if (sets(next) === sets(order)) return;
  order = next;
  const focus = document.activeElement;
  for (const [column, ids] of Object.entries(columns)) {
    $(column).replaceChildren(...ids.map((id) => el("li", {}, card(column === "allocations" ? "allocation" : "end", id))));
  }
  const there = new Set(Object.values(columns).flat());
  for (const id of cards.keys()) if (!there.has(id)) cards.delete(id);
  if (focus && document.contains(focus)) focus.focus({preventScroll: true});
}

function render() {
  if (!graph) return;
  const view = shown();
  place(view);
  for (const a of view.allocations) {
    const told = title(a) + ", allocation " + short(a.id) + ", " + rate(a.rate) + (a.refused > 0 ? ", " + rate(a.refused) + " refused" : "") +
      (a.errors + a.warnings > 0 ? ", " + (a.errors + a.warnings) + " problems" : "");
    const name = el("span", {class: "name", text: title(a), title: title(a)});
    fill(card("allocation", a.id), tone(a), told, row(name, side(a.rate)), row(el("span", {class: "kind mono", text: short(a.id)}), refusals(a.refused)),
      el("span", {class: "facts"}, ...chips(a)));
  }
  const carried = new Map();
  for (const edge of view.edges) {
    for (const id of [edge.from, edge.to]) {
      const sum = carried.get(id) || {rate: 0, refused: 0};
      carried.set(id, {rate: sum.rate + edge.rate, refused: sum.refused + edge.refused});
    }
  }
  for (const end of view.ends) {
    const {rate: sum, refused} = carried.get(end.id);
    fill(card("end", end.id), "end" + (refused > 0 ? " bad" : ""), endTitle(end) + ", " + kinds[end.kind] + ", " + rate(sum) + (refused > 0 ? ", " + rate(refused) + " refused" : ""),
      row(el("span", {class: "name", text: endTitle(end), title: endTitle(end)}), side(sum)), row(el("span", {class: "kind", text: kinds[end.kind]}), refusals(refused)));
  }
  for (const [id, button] of cards) button.setAttribute("aria-pressed", String(selected !== null && selected.id === id));
  state(view);
  draw();
}

// state says what the graph does not: how the node is, what is missing, what is left out.
function state(view) {
  document.title = "Weir map" + (graph.node ? " of " + clean(graph.node) : "");
  $("node").textContent = clean(graph.node);
  const errors = graph.problems.filter((p) => p.severity === "error").length, count = graph.problems.length;
  const health = $("health");
  health.hidden = false;
  health.className = "pill" + (errors ? " bad" : count ? " warn" : "");
  health.textContent = count ? count + (count === 1 ? " problem" : " problems") : "healthy";
  const all = graph.allocations.length;
  $("count").textContent = view.matched === all ? all + (all === 1 ? " allocation" : " allocations") : view.matched + " of " + all + " allocations";
  $("when").textContent = "rates over the last " + Math.round(graph.seconds) + " s, as of " + clock(graph.time);
  const notes = [];
  if (graph.unrecorded) notes.push("Connections are not recorded, so there are no rates: " + clean(graph.unrecorded) + ".");
  if (graph.missed > 0) notes.push(graph.missed.toLocaleString("en") + " connections are in no rate: there were more than the agent has room for.");
  if (view.matched > most) notes.push("The " + most + " allocations with most trouble and traffic are drawn, of " + view.matched + ": filter for another.");
  if (all > 0 && !graph.unrecorded && graph.edges.length === 0) notes.push("No connection in the last " + Math.round(graph.seconds) + " s.");
  $("notice").textContent = notes.join(" ");
  $("notice").hidden = notes.length === 0;
  const none = view.allocations.length === 0;
  $("empty").hidden = !none;
  $("canvas").style.visibility = none ? "hidden" : "visible";
  if (none) {
    $("empty-title").textContent = all ? "Nothing matches the filter" : "No allocation of the mesh is on this node";
    $("empty-text").textContent = all ? "None of " + all + " allocations has “" + clean($("filter").value.trim()) + "” in its job, group, namespace or ID, or talks to it. Esc clears the filter."
      : "One appears here as soon as Nomad starts it. If one should be here, “weir doctor” says whether the node is ready, and “weir workloads” what the agent knows.";
  }
}

// draw puts the edges between the cards where those are now.
function draw() {
  if (!graph) return;
  const view = shown(), canvas = $("canvas"), origin = canvas.getBoundingClientRect();
  const box = (id) => {
    const at = cards.get(id).getBoundingClientRect();
    return {left: at.left - origin.left, right: at.right - origin.left, top: at.top - origin.top, height: at.height};
  };
  const edges = view.edges.filter((e) => cards.has(e.from) && cards.has(e.to)).map((e) => ({...e, a: box(e.from), b: box(e.to)}));
  // Where several leave or reach a card, they lie side by side in the order of their other ends.
  const spread = (key, own, other, to) => {
    for (const id of new Set(edges.map((e) => e[key]))) {
      const here = edges.filter((e) => e[key] === id).sort((x, y) => x[other].top - y[other].top);
      here.forEach((e, i) => { e[to] = e[own].top + e[own].height * (i + 1) / (here.length + 1); });
    }
  };
  spread("from", "a", "b", "y1");
  spread("to", "b", "a", "y2");
  const focus = hovered || (selected && cards.has(selected.id) ? selected.id : null);
  const drawn = [], texts = [];
  for (const e of edges) {
    const x1 = e.a.right, x2 = e.b.left, bend = Math.max(30, (x2 - x1) / 2);
    const near = focus === null || e.from === focus || e.to === focus;
    const way = (shift) => `M${x1} ${e.y1 + shift}C${x1 + bend} ${e.y1 + shift} ${x2 - bend} ${e.y2 + shift} ${x2} ${e.y2 + shift}`;
    const width = (carried) => (1.5 + 1.6 * Math.log10(1 + carried * 6)).toFixed(2);
    const look = (name) => [name, near ? (focus === null ? "" : "strong") : "dim"].filter(Boolean).join(" ");
    const passed = e.rate - e.refused, both = passed > 1e-9 && e.refused > 0;
    if (passed > 1e-9) drawn.push(svg("path", {d: way(both ? -2.5 : 0), "stroke-width": width(passed), class: look("")}));
    if (e.refused > 0) drawn.push(svg("path", {d: way(both ? 2.5 : 0), "stroke-width": width(e.refused), class: look("refused")}));
    if (near && (focus !== null || edges.length <= labels)) {
      const lines = [passed > 1e-9 ? [rate(e.rate), ""] : null, e.refused > 0 ? [rate(e.refused) + " refused", "refused"] : null].filter(Boolean);
      const flat = Math.abs(e.y1 - e.y2) < 24 ? -9 : 4; // beside the line where it is steep, above it where it is not
      lines.forEach(([words, name], i) => {
        const text = svg("text", {x: (x1 + x2) / 2, y: (e.y1 + e.y2) / 2 + flat + 15 * (i - (lines.length - 1) / 2), class: name});
        text.textContent = words;
        texts.push(text);
      });
    }
  }
  $("edges").replaceChildren(...drawn, ...texts);
  const touched = new Set(focus === null ? [] : edges.filter((e) => e.from === focus || e.to === focus).flatMap((e) => [e.from, e.to]).concat(focus));
  for (const [id, button] of cards) button.classList.toggle("dim", hovered !== null && !touched.has(id));
}

// --- the panel

function open(what, from) {
  opener = from || opener;
  selected = what;
  location.hash = what.kind === "allocation" ? encodeURIComponent(what.id) : "";
  const panel = $("panel");
  panel.replaceChildren();
  panel.hidden = false;
  panel.scrollTop = 0;
  panel.dataset.text = "";
  show(true);
  panel.focus({preventScroll: true});
  render();
}

function close() {
  selected = null;
  $("panel").hidden = true;
  history.replaceState(null, "", location.pathname);
  if (opener && document.contains(opener)) opener.focus({preventScroll: true});
  opener = null;
  render();
}

// show fills the panel anew, where what it shows is another one.
async function show() {
  const what = selected;
  if (!what || !graph) return;
  if (what.kind !== "allocation") {
    paint(what, what.kind === "end" ? endPanel(what.id) : nodePanel());
    return;
  }
  try {
    const answer = await fetch("allocations/" + encodeURIComponent(what.id), {signal: AbortSignal.timeout(5000)});
    if (answer.status === 404) return paint(what, ["gone", () => [head("Allocation " + short(what.id)), el("p", {class: "problem", text: "It is not on this node any more."})]]);
    if (!answer.ok) throw new Error("the agent answers " + answer.status);
    const text = await answer.text();
    paint(what, [text, () => allocationPanel(JSON.parse(text))]);
  } catch (error) {
    paint(what, [String(error), () => [head("Allocation " + short(what.id)), el("p", {class: "problem error", text: "What decides about it cannot be read: " + error.message})]]);
  }
}

function paint(what, [text, make]) {
  const panel = $("panel");
  if (selected !== what || panel.dataset.text === text) return;
  panel.dataset.text = text;
  const at = panel.scrollTop, inside = panel.contains(document.activeElement);
  panel.replaceChildren(...make());
  panel.scrollTop = at;
  if (inside) panel.focus({preventScroll: true});
}

const head = (text) => el("div", {class: "top"}, el("h2", {text}), el("button", {type: "button", class: "plain", "aria-keyshortcuts": "Escape", text: "Close", onclick: close}));

const problem = (p, subject) => el("div", {class: "problem " + p.severity}, el("b", {text: (subject && p.subject ? p.subject + ": " : "") + p.what}),
  el("p", {text: "What to do: " + p.remedy}), el("code", {class: "muted", text: p.code}));

function allocationPanel(a) {
  const facts = [...chips(a), a.task ? el("span", {class: "chip", text: "proxy: " + a.task}) : null, a.namespace ? el("span", {class: "chip", text: "namespace " + a.namespace}) : null];
  const parts = [head(title(a)), el("code", {class: "muted", text: a.id}), el("div", {class: "facts"}, ...facts)];
  if (a.problems.length) parts.push(el("h3", {text: "What is wrong"}), ...a.problems.map((p) => problem(p, false)));
  parts.push(el("h3", {text: "What decides about its connections"}));
  if (a.unknown) parts.push(el("p", {class: "muted", text: "Not known: " + a.unknown + "."}));
  if (a.settings.length) {
    parts.push(el("table", {class: "settings"}, el("tbody", {}, ...a.settings.map((s) => el("tr", {}, el("th", {scope: "row", text: s.name}), el("td", {text: s.value}), el("td", {text: s.source})))),
    ), el("p", {class: "muted"}, "One connection, rule by rule: ", el("code", {text: "weir explain " + short(a.id) + " ADDR:PORT"})));
  }
  parts.push(el("h3", {text: "Last connections"}));
  if (a.unrecorded) parts.push(el("p", {class: "muted", text: "Not recorded: " + a.unrecorded + "."}));
  else if (!a.flows.length) parts.push(el("p", {class: "muted", text: "None since the agent began to record."}));
  if (a.flows.length) {
    const arrows = {outbound: ["→", "to"], inbound: ["←", "from"], forwarded: ["⇢", "through"]};
    parts.push(el("table", {class: "flows"}, el("tbody", {}, ...a.flows.map((f) => {
      const [arrow, word] = arrows[f.direction] || ["", ""];
      return el("tr", {class: f.refused ? "refused" : ""}, el("td", {text: clock(f.time)}),
        el("td", {}, el("span", {class: "muted", text: f.task ? f.task + " " : ""}), el("span", {"aria-label": word, role: "img", text: arrow}), " ", el("span", {text: f.peer}),
          f.refused ? el("span", {class: "why", text: f.meaning}) : null),
        el("td", {title: f.meaning}, el("span", {text: f.verdict})));
    }))));
  }
  return parts;
}

function endPanel(id) {
  const end = graph.ends.find((e) => e.id === id), edges = graph.edges.filter((e) => e.from === id || e.to === id);
  if (!end) return ["gone", () => [head("No connection"), el("p", {class: "muted", text: "Nothing has talked to it in the last " + Math.round(graph.seconds) + " s."})]];
  const names = new Map(graph.allocations.map((a) => [a.id, a]));
  return [JSON.stringify([end, edges]), () => [
    head(endTitle(end)), el("p", {class: "muted", text: kinds[end.kind]}),
    end.alloc_id && names.has(end.alloc_id) ? el("p", {}, el("button", {type: "button", class: "link", text: "Open the allocation", onclick: () => open({kind: "allocation", id: end.alloc_id})})) : null,
    el("h3", {text: end.source ? "Who it talks to" : "Who talks to it"}),
    el("table", {}, el("tbody", {}, ...edges.map((edge) => {
      const a = names.get(edge.from === id ? edge.to : edge.from);
      const verdicts = Object.entries(edge.verdicts).sort((x, y) => y[1] - x[1]).map(([verdict, carried]) => verdict + " " + rate(carried)).join(", ");
      return el("tr", {}, el("td", {}, el("button", {type: "button", class: "link", text: title(a) + " " + short(a.id), onclick: () => open({kind: "allocation", id: a.id})}),
        el("span", {class: "why muted", text: verdicts})),
      el("td", {}, edge.refused > 0 ? el("span", {class: "refused-text", text: rate(edge.refused) + " refused of " + rate(edge.rate)}) : el("span", {text: rate(edge.rate)})));
    }))),
  ].filter(Boolean)];
}

function nodePanel() {
  return [JSON.stringify(graph.problems), () => [
    head("Node " + graph.node), el("p", {class: "muted", text: "agent " + graph.version}),
    el("h3", {text: "What is wrong"}),
    ...(graph.problems.length ? graph.problems.map((p) => problem(p, true)) : [el("p", {class: "muted", text: "Nothing that the agent knows of. “weir status” looks at the kernel as well."})]),
  ]];
}

// --- the keyboard

function move(key) {
  const columns = ["from", "allocations", "to"].map((id) => [...$(id).querySelectorAll(".card")]);
  const at = columns.findIndex((column) => column.includes(document.activeElement));
  if (at < 0) {
    (columns[1][0] || $("map")).focus();
    return;
  }
  const own = document.activeElement, row = columns[at].indexOf(own);
  if (key === "ArrowUp" || key === "ArrowDown") {
    const next = columns[at][row + (key === "ArrowUp" ? -1 : 1)];
    if (next) next.focus();
    return;
  }
  const id = [...cards].find(([, button]) => button === own)[0], step = key === "ArrowLeft" ? -1 : 1;
  const column = columns[at + step] || [];
  const linked = graph.edges.filter((e) => e.from === id || e.to === id).map((e) => cards.get(e.from === id ? e.to : e.from));
  const next = column.find((button) => linked.includes(button)) || column[0];
  if (next) next.focus();
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target === $("filter");
  if (event.key === "Escape") {
    if (typing || $("panel").hidden) {
      $("filter").value = "";
      if (typing) $("map").focus();
      render();
    } else close();
  } else if (typing) {
    return;
  } else if (event.key === "/") {
    $("filter").focus();
    $("filter").select();
  } else if (event.key === "p") {
    $("pause").click();
  } else if (event.key.startsWith("Arrow") && !$("panel").contains(document.activeElement)) {
    move(event.key);
  } else return;
  event.preventDefault();
});

$("filter").addEventListener("input", render);
$("health").addEventListener("click", () => open({kind: "node", id: ""}, $("health")));
$("pause").addEventListener("click", () => {
  paused = !paused;
  $("pause").setAttribute("aria-pressed", String(paused));
  $("pause").textContent = paused ? "Paused" : "Pause";
  if (!paused) look();
});
new ResizeObserver(draw).observe($("canvas"));

// --- the agent

let timer = 0;

async function look() {
  clearTimeout(timer);
  if (paused || document.hidden) return;
  try {
    const answer = await fetch("graph", {signal: AbortSignal.timeout(5000)});
    if (!answer.ok) throw new Error("it answers " + answer.status);
    graph = await answer.json();
    seen = Date.now();
    failing = null;
    render();
    await show();
  } catch (error) {
    failing = failing || Date.now();
    $("alert").textContent = clean("The agent does not answer since " + clock(failing) + " (" + error.message + "). " +
      (seen ? "What you see is from " + clock(seen) + "." : "Nothing is known yet.") + " See “systemctl status weir-agent”. What runs goes on without it.");
  }
  $("alert").hidden = failing === null;
  document.body.classList.toggle("stale", failing !== null);
  timer = setTimeout(look, failing === null ? interval : Math.min(10000, interval * 2));
}

document.addEventListener("visibilitychange", look);
const wanted = decodeURIComponent(location.hash.slice(1));
look().then(() => { if (wanted) open({kind: "allocation", id: wanted}); });
