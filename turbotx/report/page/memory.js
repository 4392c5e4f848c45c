// Memory: where every intermediate lies, planned in this page for any shape.

const memory = data.memory;
const roundUp = (nbytes, to) => Math.ceil(nbytes / to) * to;
const launchCount = Math.max(1, data.launches.length, ...memory.buffers.map((b) => b.end));

// What the symbolic planner does: a buffer lies on the highest top of those below it, in the
// order that is lowest at this shape. Other planners' plans were made beforehand.
function planAt(dims) {
  const values = dims === shape.dims ? shape.values : evaluate(...dims);
  const sizes = memory.buffers.map((b) => roundUp(values[b.nbytes], memory.alignment));
  const plans = memory.orders.map((o) => walk(o, sizes));
  const plan = plans.length ? plans.reduce((a, b) => (b.peak < a.peak ? b : a)) : nearest(dims);
  return {
    ...plan,
    sizes,
    live: liveBytes(memory.buffers.map((b, k) => [sizes[k], b.begin, b.end])),
  };
}

function walk({ order, below }, sizes) {
  const offsets = sizes.map(() => 0);
  for (const k of order) offsets[k] = Math.max(0, ...below[k].map((j) => offsets[j] + sizes[j]));
  return { offsets, peak: Math.max(0, ...offsets.map((o, k) => o + sizes[k])) };
}

function nearest(dims) {
  const apart = (s) => sum(s.dims.map((d, k) => Math.abs(Math.log(d / dims[k]))));
  return memory.snapshots.reduce((a, b) => (apart(b) < apart(a) ? b : a));
}

function liveBytes(lives) {
  const change = Array(launchCount + 2).fill(0);
  for (const [nbytes, begin, end] of lives) {
    change[begin] += nbytes;
    change[end] -= nbytes;
  }
  let live = 0;
  return change.map((c) => (live += c)).slice(0, launchCount);
}

// PyTorch holds a result from its op to its last reader, both included.
function pytorchPeak() {
  const change = [];
  for (const [formula, first, last] of memory.pytorch) {
    const nbytes = roundUp(number(formula), memory.rounding);
    change[first] = (change[first] ?? 0) + nbytes;
    change[last + 1] = (change[last + 1] ?? 0) - nbytes;
  }
  let live = 0,
    peak = 0;
  for (let k = 0; k < change.length; k++) {
    live += change[k] ?? 0;
    peak = Math.max(peak, live);
  }
  return peak;
}

const frame = { W: 900, H: 420, L: 74, R: 14, T: 16, B: 40 };
const hues = new Map(
  [...new Set(memory.buffers.map((b) => b.layer))].map((layer, k) => [layer, (k * 137.508) % 360]),
);
const colourOf = (layer) =>
  `light-dark(oklch(0.75 0.11 ${hues.get(layer)}), oklch(0.62 0.11 ${hues.get(layer)}))`;
let player = null;

function memoryTab(pane) {
  const chart = draw("svg", {
    class: "chart",
    id: "memory-chart",
    viewBox: `0 0 ${frame.W} ${frame.H}`,
  });
  const facts = make("p", { id: "memory-facts" });
  const last = freeDims.at(-1);
  pane.append(
    make(
      "h2",
      {},
      "Memory of intermediates",
      make("small", {}, "address over time; the sliders above choose the shape"),
    ),
    make(
      "div",
      { class: "row" },
      last
        ? make(
            "button",
            { id: "play", onclick: () => play(last) },
            player ? "◼ stop" : `▶ grow ${last.name}`,
          )
        : "",
      make(
        "label",
        {},
        make("input", { type: "checkbox", id: "scale", onchange: () => drawPlan(chart, facts) }),
        " same scale at every shape",
      ),
    ),
    facts,
    make("div", { class: "scroll" }, chart),
    make(
      "div",
      { class: "row note" },
      [...hues.keys()].map((layer) =>
        make("span", { class: "key", style: `--kind:${colourOf(layer)}` }, layer),
      ),
    ),
    note(
      "Solid: bytes alive. Dashed: their maximum, which no plan of these launches can go below. Dotted: chunks of 2 MiB.",
    ),
    note(`PyTorch's bytes are computed: ${memory.method}`),
  );
  drawPlan(chart, facts);
  return () => drawPlan(chart, facts);
}

function drawPlan(chart, facts) {
  const { W, H, L, R, T, B } = frame;
  const plan = planAt(shape.dims),
    bound = Math.max(0, ...plan.live),
    peak = plan.peak;
  const fixed = document.getElementById("scale").checked;
  const top = 1.05 * Math.max(fixed ? planAt(largestShape()).peak : peak, 1);
  const tick = 2 ** Math.floor(Math.log2(top / 3));
  const x = (launch) => L + ((W - L - R) * launch) / launchCount,
    y = (nbytes) => H - B - ((H - T - B) * nbytes) / top;
  facts.replaceChildren(
    `${count(memory.buffers.length, "buffer")} in `,
    make("b", {}, showNbytes(peak)),
    `: ${(peak / Math.max(bound, 1)).toFixed(4)} × the lower bound of these launches, ${showNbytes(bound)}${scratchOf(plan)}; PyTorch would hold ${showNbytes(pytorchPeak())}, ${(pytorchPeak() / Math.max(peak, 1)).toFixed(1)} × as much. `,
    memory.orders.length
      ? ""
      : `Planned by ${memory.planner} beforehand: the nearest shape is shown.`,
  );
  if (!chart.buffers) drawFrame(chart, x);
  chart.buffers.forEach((rect, k) => {
    const b = memory.buffers[k];
    fill(
      rect,
      { y: y(plan.offsets[k] + plan.sizes[k]), height: Math.max(0, y(0) - y(plan.sizes[k])) },
      [],
    );
    rect.firstChild.textContent = `${b.name} (${b.layer})\n${showNbytes(plan.sizes[k])} at ${plan.offsets[k]}\nlaunches ${b.begin} to ${b.end - 1}`;
  });
  const steps = plan.live.flatMap((v, k) => [`${x(k)},${y(v)}`, `${x(k + 1)},${y(v)}`]);
  const chunks = Math.min(400, Math.ceil(top / memory.chunk));
  chart.above.replaceChildren(
    ...Array.from({ length: chunks }, (_, k) =>
      draw("line", {
        class: "chunk",
        x1: L,
        x2: W - R,
        y1: y(Math.min(top, k * memory.chunk)),
        y2: y(Math.min(top, k * memory.chunk)),
      }),
    ),
    ...Array.from({ length: Math.floor(top / tick) + 1 }, (_, k) =>
      draw(
        "text",
        { x: L - 7, y: y(tick * k) + 4, "text-anchor": "end" },
        showNbytes(Math.round(tick * k)).replace(/\.0+ /, " "),
      ),
    ),
    draw("polyline", { class: "live", points: steps.join(" ") }),
    draw("line", { class: "bound", x1: L, x2: W - R, y1: y(bound), y2: y(bound) }),
  );
}

// What of the fullest launch is workspace that no op of the model asks for.
function scratchOf(plan) {
  const at = plan.live.indexOf(Math.max(...plan.live));
  const alive = (b) => b.begin <= at && at < b.end;
  const nbytes = sum(
    memory.scratch.filter((k) => alive(memory.buffers[k])).map((k) => plan.sizes[k]),
  );
  return nbytes ? `, of which ${showNbytes(nbytes)} are sums of split products` : "";
}

function drawFrame(chart, x) {
  const { W, H, L, R, T, B } = frame;
  for (let k = 0; k <= 5; k++) {
    const at = Math.round((launchCount * k) / 5);
    chart.append(
      draw("line", { class: "grid", x1: x(at), x2: x(at), y1: T, y2: H - B }),
      draw("text", { x: x(at), y: H - B + 16, "text-anchor": "middle" }, String(at)),
    );
  }
  chart.append(draw("text", { x: (L + W - R) / 2, y: H - 6, "text-anchor": "middle" }, "launch"));
  chart.buffers = memory.buffers.map((b) =>
    draw(
      "rect",
      {
        class: "buffer",
        x: x(b.begin),
        width: x(b.end) - x(b.begin),
        style: `fill:${colourOf(b.layer)}`,
        onclick: () => chooseLaunch(data.launches[b.begin].name),
      },
      hint(""),
    ),
  );
  chart.above = draw("g", { "pointer-events": "none" });
  chart.append(
    ...chart.buffers,
    chart.above,
    draw("rect", { class: "frame", x: L, y: T, width: W - L - R, height: H - T - B }),
  );
}

const largestShape = () =>
  data.dims.map((d, k) => {
    const leader = d.follows ? data.dims.find((o) => o.name === d.follows) : d;
    return leader === freeDims.at(-1) ? leader.end : shape.dims[k];
  });

// From 1 to the end and back to where it stood, in about six seconds.
function play(dim) {
  if (player) {
    stopPlaying();
    return;
  }
  const back = shape.dims[data.dims.indexOf(dim)];
  let at = 0;
  player = {
    back,
    dim,
    timer: setInterval(() => {
      at += 4;
      if (at > STEPS) stopPlaying();
      else setDim(dim.name, sizeAt(dim, at));
    }, 60),
  };
  document.getElementById("play").textContent = "◼ stop";
}

function stopPlaying() {
  clearInterval(player.timer);
  const { dim, back } = player;
  player = null;
  setDim(dim.name, back);
  const button = document.getElementById("play");
  if (button) button.textContent = `▶ grow ${dim.name}`;
}
