// The fused graph: drawn once, then panned, zoomed, searched and chosen from.

const canvas = document.getElementById("canvas");
const graph = { x: 0, y: 0, scale: 1, boxes: new Map(), chosen: null, hits: [], hit: -1 };
const world = draw("g");
const MARGIN = 40;

const launchOf = new Map(data.launches.map((launch, k) => [launch.name, { ...launch, place: k }]));
const boxOf = new Map(data.boxes.list.flatMap((b) => b.launches.map((name) => [name, b])));

function drawGraph() {
  canvas.append(world);
  drawBands();
  const at = new Map(data.boxes.list.map((b) => [b.name, b]));
  for (const arrow of data.boxes.arrows) {
    const line = draw("path", {
      class: "arrow",
      d: arrowPath(at.get(arrow.from), at.get(arrow.to), arrow.bends),
    });
    arrow.line = line;
    world.append(line);
  }
  for (const box of data.boxes.list) world.append(drawBox(box));
  drawOverview();
  const used = [
    ["region", "fused kernel"],
    ["gemm", "GEMM"],
    ["attention", "attention"],
    ["other", "PyTorch's op"],
    ["input", "input, output"],
  ];
  document
    .getElementById("legend")
    .append(
      ...used
        .filter(([kind]) => data.boxes.list.some((b) => b.kind === kind))
        .map(([kind, what]) => make("span", { class: `key ${kind}` }, what)),
    );
}

function drawBox(box) {
  const x = box.x - box.width / 2,
    y = box.y - box.height / 2;
  const element = draw(
    "g",
    {
      class: `box ${box.kind}`,
      "data-name": box.name,
      onclick: () => {
        if (!drag.moved) choose(box.name);
      },
    },
    draw("rect", { class: "face", x, y, width: box.width, height: box.height, rx: 6 }),
    draw("rect", { class: "edge", x, y: y + 5, width: 3.5, height: box.height - 10, rx: 1.5 }),
    draw("text", { x: x + 12, y: box.text ? y + 16 : y + 17 }, box.title),
    box.text ? draw("text", { class: "what", x: x + 12, y: y + 30 }, box.text) : null,
    hint(
      box.launches
        .map((n) => launchOf.get(n).module)
        .filter(Boolean)
        .join(", ") || box.title,
    ),
  );
  graph.boxes.set(box.name, { box, element, text: searchText(box) });
  return element;
}

function searchText(box) {
  const mine = new Set(box.launches);
  const ops = data.ops.filter((op) => op.launches.some((n) => mine.has(n)));
  const launches = box.launches.map((n) => launchOf.get(n));
  return [
    box.name,
    box.title,
    box.text,
    ...launches.flatMap((l) => [l.name, l.kernel, l.module]),
    ...ops.flatMap((op) => [op.name, op.op, op.module, op.place]),
  ]
    .join("\n")
    .toLowerCase();
}

// A line that leaves downwards, passes its bends upright and arrives from above.
function arrowPath(from, to, bends) {
  const points = [[from.x, from.y + from.height / 2], ...bends, [to.x, to.y - to.height / 2]];
  let path = `M${points[0][0]} ${points[0][1]}`;
  for (let k = 1; k < points.length; k++) {
    const [x0, y0] = points[k - 1],
      [x1, y1] = points[k],
      bend = (y1 - y0) * 0.45;
    path += x0 === x1 ? `L${x1} ${y1}` : `C${x0} ${y0 + bend} ${x1} ${y1 - bend} ${x1} ${y1}`;
  }
  return path;
}

// A band behind the boxes of each layer, where no two layers stand side by side.
function drawBands() {
  const layers = new Map();
  for (const box of data.boxes.list) {
    const layer = box.launches.length ? launchOf.get(box.launches[0]).layer : "";
    if (!/\d$/.test(layer)) continue;
    const range = layers.get(layer) ?? layers.set(layer, [Infinity, -Infinity]).get(layer);
    range[0] = Math.min(range[0], box.y - box.height / 2);
    range[1] = Math.max(range[1], box.y + box.height / 2);
  }
  const sorted = [...layers].sort((a, b) => a[1][0] - b[1][0]);
  if (sorted.some(([, range], k) => k && range[0] < sorted[k - 1][1][1])) return;
  for (const [layer, [top, bottom]] of sorted) {
    world.append(
      draw("rect", {
        class: "band",
        x: -MARGIN,
        y: top - 13,
        width: data.boxes.width + 2 * MARGIN,
        height: bottom - top + 26,
        rx: 10,
      }),
      draw("text", { class: "band-name", x: -MARGIN + 9, y: top + 3 }, layer),
    );
  }
}

// --- moving ---

function place() {
  world.setAttribute("transform", `translate(${graph.x} ${graph.y}) scale(${graph.scale})`);
  placeOverview();
}

function zoom(factor, x, y) {
  const scale = Math.min(4, Math.max(0.03, graph.scale * factor));
  graph.x = x - ((x - graph.x) * scale) / graph.scale;
  graph.y = y - ((y - graph.y) * scale) / graph.scale;
  graph.scale = scale;
  place();
}

// The width fits first, so that text can be read; the button shows all of the height too.
function fit(whole) {
  const { clientWidth: width, clientHeight: height } = canvas;
  const across = width / (data.boxes.width + 2 * MARGIN + 24);
  const down = (height - 110) / data.boxes.height;
  graph.scale = whole
    ? Math.min(across, down)
    : Math.min(1.15, Math.max(across, Math.min(down, 0.62)));
  graph.x = width / 2 - (graph.scale * data.boxes.width) / 2;
  graph.y = whole ? (height - graph.scale * data.boxes.height) / 2 + 8 : 62;
  place();
}

// Sideways only where the box would not be seen: the graph stays put while one steps down it.
function center(box) {
  const left = graph.x + (box.x - box.width / 2) * graph.scale,
    right = left + box.width * graph.scale;
  if (left < 0 || right > canvas.clientWidth)
    graph.x = canvas.clientWidth / 2 - box.x * graph.scale;
  graph.y = canvas.clientHeight / 2 - box.y * graph.scale;
  place();
}

const drag = { pointers: new Map(), moved: false, apart: 0 };

function listenToPointers() {
  canvas.addEventListener(
    "wheel",
    (event) => {
      event.preventDefault();
      if (
        event.ctrlKey ||
        event.metaKey ||
        event.altKey ||
        (!event.shiftKey && !isTrackpad(event))
      ) {
        zoom(
          Math.exp(-event.deltaY * (event.ctrlKey ? 0.012 : 0.0016)),
          event.offsetX,
          event.offsetY,
        );
      } else {
        graph.x -= event.deltaX;
        graph.y -= event.deltaY;
        place();
      }
    },
    { passive: false },
  );
  canvas.addEventListener("pointerdown", (event) => {
    drag.pointers.set(event.pointerId, event);
    drag.moved = false;
    drag.apart = pinch();
  });
  addEventListener("pointermove", (event) => {
    const last = drag.pointers.get(event.pointerId);
    if (!last) return;
    if (!drag.moved && Math.hypot(event.clientX - last.clientX, event.clientY - last.clientY) < 4)
      return;
    drag.moved = true;
    canvas.classList.add("moving");
    drag.pointers.set(event.pointerId, event);
    if (drag.pointers.size === 1) {
      graph.x += event.clientX - last.clientX;
      graph.y += event.clientY - last.clientY;
      place();
    } else {
      const apart = pinch(),
        bounds = canvas.getBoundingClientRect();
      if (drag.apart) zoom(apart / drag.apart, event.clientX - bounds.x, event.clientY - bounds.y);
      drag.apart = apart;
    }
  });
  for (const end of ["pointerup", "pointercancel"]) {
    addEventListener(end, (event) => {
      drag.pointers.delete(event.pointerId);
      drag.apart = 0;
      canvas.classList.remove("moving");
    });
  }
}

// A trackpad sends small or sideways steps, a wheel large ones.
const isTrackpad = (event) =>
  event.deltaMode === 0 && (event.deltaX !== 0 || Math.abs(event.deltaY) < 40);

function pinch() {
  const [a, b] = [...drag.pointers.values()];
  return b ? Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY) : 0;
}

// --- the overview: the whole graph small, and what of it is in sight ---

const overview = document.getElementById("overview");
const sight = draw("rect", { class: "view" });

function drawOverview() {
  const { width, height } = data.boxes;
  overview.setAttribute("viewBox", `${-MARGIN} -20 ${width + 2 * MARGIN} ${height + 40}`);
  overview.setAttribute("preserveAspectRatio", "none");
  overview.style.height = `${Math.min(260, Math.max(60, height / 8))}px`;
  for (const b of data.boxes.list) {
    overview.append(
      draw("rect", {
        class: b.kind,
        fill: "var(--kind)",
        x: b.x - b.width / 2,
        y: b.y - b.height / 2,
        width: b.width,
        height: b.height,
      }),
    );
  }
  overview.append(sight);
  const jump = (event) => {
    if (!event.buttons) return;
    const bounds = overview.getBoundingClientRect();
    const y = ((event.clientY - bounds.y) / bounds.height) * (height + 40) - 20;
    graph.y = canvas.clientHeight / 2 - y * graph.scale;
    place();
  };
  overview.addEventListener("pointerdown", jump);
  overview.addEventListener("pointermove", jump);
}

function placeOverview() {
  fill(
    sight,
    {
      x: -graph.x / graph.scale,
      y: -graph.y / graph.scale,
      width: canvas.clientWidth / graph.scale,
      height: canvas.clientHeight / graph.scale,
    },
    [],
  );
}

// --- searching and choosing ---

const searchInput = document.getElementById("search");

function search() {
  const words = searchInput.value.toLowerCase().split(/\s+/).filter(Boolean);
  canvas.classList.toggle("searching", words.length > 0);
  graph.hits = [];
  graph.hit = -1;
  for (const { box, element, text } of graph.boxes.values()) {
    const hit = words.length > 0 && words.every((w) => text.includes(w));
    element.classList.toggle("hit", hit);
    if (hit) graph.hits.push(box);
  }
  document.getElementById("found").textContent = words.length ? String(graph.hits.length) : "";
  if (graph.hits.length) center(graph.hits[0]);
}

function listenToSearch() {
  for (const event of ["input", "change"]) searchInput.addEventListener(event, search);
  searchInput.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      searchInput.value = "";
      search();
      canvas.focus();
    }
    if (event.key === "Enter" && graph.hits.length) {
      graph.hit = (graph.hit + (event.shiftKey ? -1 : 1) + graph.hits.length) % graph.hits.length;
      choose(graph.hits[graph.hit].name, true);
    }
  });
  addEventListener("keydown", (event) => {
    if (event.target.matches("input")) return;
    if (event.key === "/") {
      event.preventDefault();
      searchInput.focus();
    }
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      if (event.target !== canvas) return;
      event.preventDefault();
      step(event.key === "ArrowDown" ? 1 : -1);
    }
  });
}

// The next box in running order.
function step(by) {
  const names = data.boxes.list.filter((b) => b.launches.length).map((b) => b.name);
  const now = names.indexOf(graph.chosen);
  choose(names[Math.min(names.length - 1, Math.max(0, now + by))], true);
}

function choose(name, move = false) {
  if (graph.chosen) graph.boxes.get(graph.chosen).element.classList.remove("chosen");
  graph.chosen = name;
  const { box, element } = graph.boxes.get(name);
  element.classList.add("chosen");
  for (const arrow of data.boxes.arrows)
    arrow.line.classList.toggle("lit", arrow.from === name || arrow.to === name);
  if (move) center(box);
  history.replaceState(null, "", `#${encodeURIComponent(name)}`); // a link to this box
  openTab("selected");
  const side = document.getElementById("side"); // below the graph, where a screen is narrow
  if (side.offsetTop > innerHeight / 3) side.scrollIntoView();
}
