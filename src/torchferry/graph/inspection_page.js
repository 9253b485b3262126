"use strict";
// The graph: boxes hold boxes (numbers from 1) and nodes (-1, -2, …). Inputs, outputs of the whole and the ports at
// which a tensor enters or leaves an open box are numbered from these on, by the tensor.
const IN = 1e7, OUT = 2e7, ENTER = 3e7, LEAVE = 4e7, MANY = 9e6;
const MOST_PORTS = 12, GAP = 26, SPACE = 30, PAD = 16, HEAD = 26, LINE = 15;
const graph = JSON.parse(document.getElementById("graph").textContent);
const { nodes, values } = graph;
const boxes = graph.boxes.map(([name, path, kind, items, open]) => ({ name, path, kind, items, open, edges: new Map(),
  enter: new Map(), leave: new Map(), count: 0, layout: null }));
const parentOf = new Map();  // of every item
const maker = new Map();     // of a tensor: the item that gives it
const readers = new Map();
const whole = boxes[0];

function prepare() {
  boxes.forEach((box, at) => { for (const item of box.items) parentOf.set(item, at); });
  for (let at = boxes.length - 1; at >= 0; at--) {
    for (const item of boxes[at].items) boxes[at].count += item < 0 ? 1 : boxes[item].count;
  }
  whole.items = [...graph.inputs.map(v => IN + v), ...whole.items, ...graph.outputs.map(v => OUT + v)];
  for (const v of graph.inputs) { parentOf.set(IN + v, 0); maker.set(v, IN + v); }
  for (const v of graph.outputs) parentOf.set(OUT + v, 0);
  nodes.forEach((node, at) => { for (const v of node.outputs) maker.set(v, -1 - at); });
  nodes.forEach((node, at) => { for (const v of new Set(node.inputs)) join(v, -1 - at); });
  for (const v of graph.outputs) join(v, OUT + v);
}

function above(item) {  // the boxes around an item, the innermost first
  const found = [];
  for (let at = parentOf.get(item); at !== undefined; at = parentOf.get(at)) found.push(at);
  return found;
}

function join(v, reader) {  // an edge, in each box that it crosses or lies in
  if (v < 0) return;
  if (!readers.has(v)) readers.set(v, []);
  readers.get(v).push(reader);
  const source = maker.get(v);
  if (source === undefined) return;
  const from = above(source), to = above(reader), inTo = new Set(to);
  const meet = from.findIndex(at => inTo.has(at));
  let a = source, b = reader;
  for (const at of from.slice(0, meet)) {
    boxes[at].leave.set(v, 0);
    edge(at, a, LEAVE + v, v);
    a = at;
  }
  for (const at of to) {
    if (at === from[meet]) break;
    boxes[at].enter.set(v, 0);
    edge(at, ENTER + v, b, v);
    b = at;
  }
  if (a !== b) edge(from[meet], a, b, v);
}

function edge(at, a, b, v) {
  const key = a + ">" + b;
  const known = boxes[at].edges.get(key);
  if (known) known.values.push(v); else boxes[at].edges.set(key, { a, b, values: [v] });
}

// ---- What an item looks like.

const short = (text, most) => text.length > most ? text.slice(0, most - 1) + "…" : text;
const place = source => source.replace(/^.*[\\/](?=[^\\/]*:\d+ )/, "").replace(/ in [^ ]*: .*$/s, "");

function lines(item) {
  if (item >= IN) {
    const [name, type] = values[item % IN];
    return [(item >= OUT ? "output " : "input ") + name, type];
  }
  if (item > 0) return [boxes[item].name, `${boxes[item].count.toLocaleString("en")} nodes`];
  const node = nodes[-1 - item], first = node.outputs[0];
  const shown = [node.mark || (node.label ? `${node.label}: ${node.op}` : node.op), node.name, first === undefined ? "" : values[first][1], place(node.source)];
  return shown.filter((line, at) => at === 0 || line);
}

function size(item) {
  if (item >= ENTER) return { w: 8, h: 0 };
  if (item > 0 && item < IN && boxes[item].open) {
    const { w, h } = layout(boxes[item]);
    return { w: Math.max(w + 2 * PAD, 60 + 7 * Math.min(boxes[item].name.length, 40)), h: h + HEAD + PAD };
  }
  const shown = lines(item);
  const longest = Math.max(...shown.map((line, at) => Math.min(line.length + 2, 36) * (at ? 6 : 6.9)));
  return { w: Math.max(90, longest + 20), h: shown.length * LINE + 13 };
}

// ---- Layout of one open box: longest path, barycentres, then the nearest places that keep their distance.

function layout(box) {
  if (box.layout) return box.layout;
  const enter = ports(box.enter, ENTER), leave = ports(box.leave, LEAVE);
  const cells = [...new Set(enter.values()), ...box.items, ...new Set(leave.values())]
    .map((id, at) => ({ id, at, layer: 0, x: 0, before: [], after: [], ...size(id) }));
  const of = new Map(cells.map(cell => [cell.id, cell]));
  const links = new Map();
  for (const { a, b, values } of box.edges.values()) {
    const from = of.get(a >= ENTER ? enter.get(a % IN) : a), to = of.get(b >= LEAVE ? leave.get(b % IN) : b);
    const known = links.get(from.at + ">" + to.at);
    if (known) known.values.push(...values);
    else links.set(from.at + ">" + to.at, { from, to, values: [...values] });
  }
  const list = [...links.values()];
  const layers = layered(cells, list);
  for (let turn = 0; turn < 8; turn++) reorder(layers, turn % 2 === 0);
  for (let turn = 0; turn < 8; turn++) spread(layers, turn % 2 === 0);
  const left = Math.min(0, ...layers.flat().map(cell => cell.x - cell.w / 2));
  let y = PAD / 2;
  for (const [at, layer] of layers.entries()) {
    const height = Math.max(...layer.map(cell => cell.h));
    for (const cell of layer) {
      cell.x -= left;
      Object.assign(cell, { top: y, bottom: y + height, y: y + (height - cell.h) / 2 });
    }
    const next = layers[at + 1];
    y += height + (height && next && next.some(cell => cell.h) ? SPACE : SPACE / 3);
  }
  const w = Math.max(...layers.flat().map(cell => cell.x + cell.w / 2), 60);
  for (const [map, ids] of [[box.enter, enter], [box.leave, leave]]) {
    for (const [v, id] of ids) map.set(v, of.get(id).x);
  }
  box.layout = { w, h: y - SPACE / 3, cells: cells.filter(cell => cell.id < ENTER), links: list };
  return box.layout;
}

function ports(map, first) {  // which port each tensor takes
  return new Map([...map.keys()].map(v => [v, first + (map.size > MOST_PORTS ? MANY : v)]));
}

function layered(cells, links) {
  for (const link of links) {  // a box that is used twice may stand both before and behind another
    link.back = link.from.at > link.to.at;
    const [a, b] = link.back ? [link.to, link.from] : [link.from, link.to];
    a.after.push(b); b.before.push(a);
  }
  for (const cell of cells) for (const next of cell.after) next.layer = Math.max(next.layer, cell.layer + 1);
  for (const cell of [...cells].reverse()) {
    if (cell.id < ENTER && !cell.before.length && cell.after.length) {
      cell.layer = Math.min(...cell.after.map(next => next.layer)) - 1;
    }
  }
  const last = Math.max(...cells.map(cell => cell.layer));
  const isEnd = cell => cell.id >= LEAVE || (cell.id >= OUT && cell.id < ENTER);
  for (const cell of cells) if (isEnd(cell)) cell.layer = last;
  if (cells.some(cell => isEnd(cell)) && cells.some(cell => cell.layer === last && !isEnd(cell))) {
    for (const cell of cells) if (isEnd(cell)) cell.layer = last + 1;
  }
  const layers = Array.from({ length: Math.max(...cells.map(cell => cell.layer)) + 1 }, () => []);
  for (const cell of cells) { cell.before = []; cell.after = []; layers[cell.layer].push(cell); }
  for (const link of links) {
    const [a, b] = link.back ? [link.to, link.from] : [link.from, link.to];
    link.way = [a];
    for (let at = a.layer + 1; at < b.layer; at++) {
      const bend = { id: null, w: 6, h: 0, x: 0 , before: [], after: [] };
      layers[at].push(bend);
      link.way.push(bend);
    }
    link.way.push(b);
    const out = shift(a, link, !link.back), into = shift(b, link, link.back);
    link.way.slice(1).forEach((next, at) => {
      const previous = link.way[at];
      const bent = previous.id === null && next.id === null ? 8 : previous.id === null || next.id === null ? 2 : 1;
      previous.after.push({ cell: next, weight: bent, shift: (at === link.way.length - 2 ? into : 0) - (at ? 0 : out) });
      next.before.push({ cell: previous, weight: bent, shift: (at ? 0 : out) - (at === link.way.length - 2 ? into : 0) });
    });
  }
  const filled = layers.filter(layer => layer.length);
  filled.forEach(layer => layer.forEach((cell, at) => { cell.order = at; }));
  return filled;
}

function shift(cell, link, leaves) {  // from the middle of an open box to the port of a link's first tensor
  const box = cell.id > 0 && cell.id < IN ? boxes[cell.id] : null;
  if (!box || !box.open) return 0;
  return PAD + (leaves ? box.leave : box.enter).get(link.values[0]) - cell.w / 2;
}

function reorder(layers, down) {
  for (const layer of down ? layers : [...layers].reverse()) {
    for (const cell of layer) {
      const near = down ? cell.before : cell.after;
      cell.pull = near.length ? near.reduce((sum, each) => sum + each.cell.order, 0) / near.length : cell.order;
    }
    layer.sort((a, b) => a.pull - b.pull || a.order - b.order).forEach((cell, at) => { cell.order = at; });
  }
}

function spread(layers, down) {
  for (const layer of down ? layers : [...layers].reverse()) {
    let offset = 0;
    const runs = [];  // cells that touch move as one: isotonic regression
    layer.forEach((cell, at) => {
      if (at) offset += (layer[at - 1].w + cell.w) / 2 + GAP * (cell.id === null && layer[at - 1].id === null ? 0.4 : 1);
      cell.offset = offset;
      const near = [...(down ? cell.before : cell.after)];
      const weight = near.reduce((sum, each) => sum + each.weight, 0);
      const wish = weight ? near.reduce((sum, each) => sum + each.weight * (each.cell.x + each.shift), 0) / weight : cell.x;
      let run = { cells: [cell], wish: wish - offset, weight: weight || 0.01 };
      while (runs.length && runs[runs.length - 1].wish >= run.wish) {
        const last = runs.pop(), both = last.weight + run.weight;
        run = { cells: [...last.cells, ...run.cells], weight: both,
          wish: (last.wish * last.weight + run.wish * run.weight) / both };
      }
      runs.push(run);
    });
    for (const run of runs) for (const cell of run.cells) cell.x = run.wish + cell.offset;
  }
}

// ---- Drawing, of what is in view only.

const svg = document.getElementById("view"), scene = document.getElementById("scene");
const view = { x: 0, y: 0, scale: 1 };
let chosen = null, drawn = null;

function make(name, attributes, parent, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const key in attributes) made.setAttribute(key, attributes[key]);
  if (text !== undefined) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}

function redraw() {
  const { width, height } = svg.getBoundingClientRect(), margin = 0.6;
  drawn = { scale: view.scale, left: (-view.x - margin * width) / view.scale, top: (-view.y - margin * height) / view.scale,
    right: (-view.x + (1 + margin) * width) / view.scale, bottom: (-view.y + (1 + margin) * height) / view.scale };
  const fresh = document.createDocumentFragment();
  drawInside(whole, 0, 0, fresh);
  scene.replaceChildren(fresh);
  move();
}

function move() {
  scene.setAttribute("transform", `translate(${view.x} ${view.y}) scale(${view.scale})`);
  const { width, height } = svg.getBoundingClientRect();
  const isFar = !drawn || view.scale > drawn.scale * 1.4 || view.scale < drawn.scale / 1.4
    || -view.x / view.scale < drawn.left || -view.y / view.scale < drawn.top
    || (-view.x + width) / view.scale > drawn.right || (-view.y + height) / view.scale > drawn.bottom;
  if (isFar && !move.pending) move.pending = requestAnimationFrame(() => { move.pending = 0; redraw(); });
}

const isSeen = (x, y, w, h) => x < drawn.right && x + w > drawn.left && y < drawn.bottom && y + h > drawn.top;

function drawInside(box, x, y, into) {
  const { cells, links, w, h } = layout(box);
  const below = make("g", {}, into);
  for (const cell of cells) {
    const left = x + cell.x - cell.w / 2, top = y + cell.y;
    if (isSeen(left, top, cell.w, cell.h)) drawCell(cell, left, top, into);
  }
  for (const link of links) drawLink(link, x, y, below, h);
}

function drawCell({ id, w, h }, x, y, into) {
  const isBox = id > 0 && id < IN, box = isBox ? boxes[id] : null;
  const kind = isBox ? `box ${box.kind}${box.open ? " open" : ""}` : id >= IN ? "end" : nodes[-1 - id].mark ? "node mark" : "node";
  const group = make("g", { class: kind + (id === chosen ? " chosen" : ""), "data-item": id }, into);
  make("rect", { x, y, width: w, height: h, rx: 5 }, group);
  if (h * view.scale < 9) return;
  if (isBox && box.open) {
    make("rect", { x, y, width: w, height: HEAD, rx: 5, class: "head" }, group);
    write(group, x + w / 2, y + 17, "− " + box.name, w);
    if (h * view.scale > 30) drawInside(box, x + PAD + (w - 2 * PAD - layout(box).w) / 2, y + HEAD, into);
  } else {
    lines(id).forEach((line, at) => write(group, x + w / 2, y + 18 + at * LINE, (isBox && !at ? "+ " : "") + line, w, at));
  }
}

function write(group, x, y, text, width, at = 0) {
  if (view.scale < 0.3) return;
  const fits = Math.max(6, Math.floor((width - 8) / (at ? 6 : 6.9)));
  const made = make("text", { x, y, class: at ? "faint" : "" }, group, short(text, fits));
  if (text.length > fits) make("title", {}, made, text);
}

function drawLink(link, x, y, into) {
  const way = link.back ? [...link.way].reverse() : link.way;
  const lowest = Math.max(...way.map(cell => cell.bottom)), highest = Math.min(...way.map(cell => cell.top));
  const xs = way.map(cell => cell.x), left = Math.min(...xs) - 400, right = Math.max(...xs) + 400;
  if (!isSeen(x + left, y + highest, right - left, lowest - highest)) return;
  const taken = new Map();  // one line for each pair of ports
  for (const v of link.values) {
    const start = end(way[0], v, true), stop = end(way[way.length - 1], v, false), key = start + ">" + stop;
    if (!taken.has(key)) taken.set(key, { start, stop, values: [] });
    taken.get(key).values.push(v);
  }
  for (const { start, stop, values: carried } of taken.values()) {
    const touches = chosen !== null && carried.some(v => maker.get(v) === chosen || (readers.get(v) || []).includes(chosen));
    const path = make("path", { d: route(way, start, stop, x, y), class: (link.back ? "back" : "") + (touches ? " lit" : "") }, into);
    make("title", {}, path, carried.slice(0, 8).map(v => `${values[v][0]}  ${values[v][1]}`).join("\n"));
  }
}

function end(cell, v, leaves) {
  const box = cell.id > 0 && cell.id < IN ? boxes[cell.id] : null;
  if (!box || !box.open) return cell.x;
  return cell.x - cell.w / 2 + PAD + (cell.w - 2 * PAD - layout(box).w) / 2 + (leaves ? box.leave : box.enter).get(v);
}

function route(way, start, stop, x, y) {
  let path = "", last = null;
  way.forEach((cell, at) => {
    const px = x + (at === 0 ? start : at === way.length - 1 ? stop : cell.x);
    const [top, bottom] = cell.top === undefined ? [0, 0] : [y + cell.top, y + cell.bottom];
    const upwards = way[way.length - 1].top < way[0].top;
    const [near, far] = upwards ? [bottom, top] : [top, bottom];
    const edgeIn = cell.id === null || cell.id >= ENTER ? near : upwards ? y + cell.y + cell.h : y + cell.y;
    const edgeOut = cell.id === null || cell.id >= ENTER ? far : upwards ? y + cell.y : y + cell.y + cell.h;
    if (last === null) path = `M${px} ${cell.id >= ENTER ? y : edgeOut}L${px} ${far}`;
    else {
      const middle = (last[1] + near) / 2;
      path += `C${last[0]} ${middle} ${px} ${middle} ${px} ${near}`;
      path += at === way.length - 1 ? `L${px} ${cell.id >= LEAVE ? far + PAD : edgeIn}` : `L${px} ${far}`;
    }
    last = [px, far];
  });
  return path;
}

// ---- Opening, finding, choosing.

function forget(item) {  // the layouts that an item's size is part of
  for (let at = item; at !== undefined; at = parentOf.get(at)) if (at >= 0 && at < IN) boxes[at].layout = null;
}

function locate(item) {  // the place of an item on the drawing; of its innermost closed box, if it has one
  const around = above(item).reverse();
  const shut = around.findIndex(at => !boxes[at].open);
  const path = shut < 0 ? [...around.slice(1), item] : around.slice(1, shut + 1);
  let x = 0, y = 0, box = whole, found = null;
  for (const at of path) {
    found = layout(box).cells.find(cell => cell.id === at);
    x += found.x - found.w / 2; y += found.y;
    if (at !== item && boxes[at].open) {
      box = boxes[at];
      x += PAD + (found.w - 2 * PAD - layout(box).w) / 2; y += HEAD;
    }
  }
  return { x, y, w: found.w, h: found.h };
}

function toggle(at, open = !boxes[at].open) {
  const before = locate(at);
  boxes[at].open = open;
  forget(at);
  const after = locate(at);
  view.x += (before.x + before.w / 2 - after.x - after.w / 2) * view.scale;
  view.y += (before.y - after.y) * view.scale;
  redraw();
}

function show(item) {  // open what is around an item, choose it and bring it to the middle
  for (const at of above(item)) if (!boxes[at].open) { boxes[at].open = true; forget(at); }
  choose(item);
  const { x, y, w, h } = locate(item), { width, height } = svg.getBoundingClientRect();
  view.scale = Math.min(1.2, Math.max(view.scale, 0.7));
  view.x = width / 2 - (x + w / 2) * view.scale;
  view.y = height / 2 - (y + Math.min(h, height / view.scale) / 2) * view.scale;
  redraw();
}

function fit() {
  const { w, h } = layout(whole), { width, height } = svg.getBoundingClientRect();
  view.scale = Math.min(1.2, Math.max(0.02, Math.min((width - 40) / w, (height - 40) / h)));
  const readable = Math.max(view.scale, Math.min(0.55, (width - 40) / w));  // a long chain starts at its top
  if (readable > view.scale) view.scale = readable;
  view.x = (width - w * view.scale) / 2;
  view.y = Math.max(20, (height - h * view.scale) / 2 > 0 ? (height - h * view.scale) / 2 : 20);
  redraw();
}

function zoom(factor, x, y) {
  const scale = Math.min(4, Math.max(0.01, view.scale * factor));
  view.x = x - (x - view.x) * scale / view.scale;
  view.y = y - (y - view.y) * scale / view.scale;
  view.scale = scale;
  move();
}

const panel = document.getElementById("details");

function tag(name, parent, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  parent.append(made);
  return made;
}

function go(parent, text, item, faint = "") {
  const row = tag("li", parent);
  if (item === undefined) tag("span", row, text);
  else tag("button", row, text).addEventListener("click", () => show(item));
  if (faint) tag("span", row, faint, "faint");
}

function section(title, rows) {
  if (!rows.length) return;
  tag("h2", panel, title);
  const list = tag("ul", panel);
  for (const row of rows) go(list, ...row);
}

const named = item => item >= IN ? values[item % IN][0] : item > 0 ? boxes[item].name : nodes[-1 - item].name || nodes[-1 - item].op;
const tensor = v => v < 0 ? ["(left out)"] : [values[v][0], maker.get(v), [values[v][1], values[v][2]].filter(Boolean).join(" · ")];

function choose(item) {
  chosen = item;
  panel.replaceChildren();
  if (item === null) return overview();
  tag("h1", panel, item < 0 ? nodes[-1 - item].op : named(item));
  if (item >= IN) {
    const v = item % IN;
    tag("p", panel, values[v][1]);
    section(item >= OUT ? "Computed by" : "Read by",
      (item >= OUT ? [maker.get(v)] : readers.get(v) || []).filter(each => each !== undefined).map(each => [named(each), each]));
    return undefined;
  }
  const facts = tag("dl", panel);
  const fact = (name, text) => { if (text) { tag("dt", facts, name); tag("dd", facts, text); } };
  if (item > 0) {
    const { path, kind, count, enter, leave } = boxes[item];
    fact("kind", kind); fact("module", path); fact("nodes", count.toLocaleString("en"));
    section("Goes in", [...enter.keys()].slice(0, 100).map(tensor));
    section("Comes out", [...leave.keys()].slice(0, 100).map(tensor));
    return undefined;
  }
  const node = nodes[-1 - item];
  fact("name", node.name); fact("domain", node.domain); fact("mark", node.mark); fact("module", node.module); fact("source", node.source);
  section("Inputs", node.inputs.map(tensor));
  section("Outputs", node.outputs.map(v => [values[v][0], undefined, [values[v][1], values[v][2]].filter(Boolean).join(" · ")]));
  section("Read by", [...new Set(node.outputs.flatMap(v => readers.get(v) || []))].slice(0, 100).map(each => [named(each), each]));
  section("Attributes", node.attributes.map(([name, text]) => [`${name} = ${text}`]));
  return undefined;
}

function overview() {
  tag("h1", panel, document.title);
  tag("p", panel, `${nodes.length.toLocaleString("en")} nodes. A click opens a box or shows a node; drag and wheel move.`, "faint");
  section("Inputs", graph.inputs.map(v => [values[v][0], IN + v, values[v][1]]));
  section("Outputs", graph.outputs.map(v => [values[v][0], OUT + v, values[v][1]]));
  section("Marks", nodes.flatMap((node, at) => node.mark ? [[node.mark, -1 - at]] : []));
}

function search(text) {
  if (!text) return choose(null);
  const wanted = text.toLowerCase(), rows = [];
  const fits = (...texts) => texts.some(each => each.toLowerCase().includes(wanted));
  boxes.forEach((box, at) => { if (at && fits(box.name, box.path)) rows.push([box.path || box.name, at, box.kind]); });
  for (const v of graph.inputs) if (fits(values[v][0])) rows.push([values[v][0], IN + v, "input"]);
  for (const v of graph.outputs) if (fits(values[v][0])) rows.push([values[v][0], OUT + v, "output"]);
  nodes.forEach((node, at) => {
    if (fits(node.name, node.op, node.mark, ...node.outputs.map(v => values[v][0]))) rows.push([node.name || node.op, -1 - at, node.op]);
  });
  chosen = null;
  panel.replaceChildren();
  section(`${rows.length.toLocaleString("en")} found${rows.length > 100 ? ", the first 100" : ""}`, rows.slice(0, 100));
  if (!rows.length) tag("p", panel, `Nothing has '${text}' in its name.`, "faint");
  search.first = rows.length ? rows[0][1] : undefined;
  return undefined;
}

function level() {  // open every box that is to be seen and shut
  const shut = [], look = box => box.items.forEach(at => { if (at > 0 && at < IN) (boxes[at].open ? look(boxes[at]) : shut.push(at)); });
  look(whole);
  for (const at of shut) { boxes[at].open = true; forget(at); }
  fit();
}

function shutAll() {
  boxes.forEach((box, at) => { box.open = graph.boxes[at][4]; box.layout = null; });
  fit();
}

function listen() {
  let drag = null;
  svg.addEventListener("wheel", event => {
    event.preventDefault();
    const { left, top } = svg.getBoundingClientRect();
    zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0015)), event.clientX - left, event.clientY - top);
  }, { passive: false });
  svg.addEventListener("pointerdown", event => { drag = { x: event.clientX, y: event.clientY, far: false, target: event.target }; });
  addEventListener("pointermove", event => {
    if (!drag) return;
    const dx = event.clientX - drag.x, dy = event.clientY - drag.y;
    if (!drag.far && Math.hypot(dx, dy) < 4) return;
    Object.assign(drag, { far: true, x: event.clientX, y: event.clientY });
    view.x += dx; view.y += dy;
    move();
  });
  addEventListener("pointerup", () => { const ended = drag; drag = null; if (ended && !ended.far) click(ended.target); });
  addEventListener("resize", redraw);
  addEventListener("hashchange", byHash);
  const box = document.getElementById("search");
  box.addEventListener("input", () => search(box.value.trim()));
  box.addEventListener("keydown", event => {
    if (event.key === "Enter" && search.first !== undefined && box.value.trim()) show(search.first);
    if (event.key === "Escape") { box.value = ""; choose(null); redraw(); }
  });
  const middle = factor => { const { width, height } = svg.getBoundingClientRect(); zoom(factor, width / 2, height / 2); };
  const buttons = { fit, level, shut: shutAll, closer: () => middle(1.3), farther: () => middle(1 / 1.3) };
  for (const id in buttons) document.getElementById(id).addEventListener("click", buttons[id]);
}

function click(target) {
  const group = target.closest("[data-item]"), item = group ? Number(group.dataset.item) : null;
  const isBox = item > 0 && item < IN;
  if (isBox && boxes[item].open && !target.closest("text") && !target.classList.contains("head")) { choose(null); return redraw(); }
  choose(item);
  return isBox ? toggle(item) : redraw();
}

function byHash() {  // page.html#name shows the node of this name
  const wanted = decodeURIComponent(location.hash.slice(1));
  const at = wanted ? nodes.findIndex(node => node.name === wanted) : -1;
  if (at >= 0) show(-1 - at);
}

prepare();
listen();
choose(null);
fit();
byHash();
