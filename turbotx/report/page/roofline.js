// Roofline: what each launch could reach on a device, from its bytes and operations; where the
// report has times, also what it did reach on the machine that they were taken on.

// Data sheets: memory in GB/s; dense matrix units in half precision, and float32, in TFLOP/s.
const DEVICES = [
  { name: "H100 SXM", memory: 3350, matrix: 989, vector: 67 },
  { name: "H200", memory: 4800, matrix: 989, vector: 67 },
  { name: "A100 80 GB", memory: 2039, matrix: 312, vector: 19.5 },
  { name: "L4", memory: 300, matrix: 121, vector: 30.3 },
  { name: "MI300X", memory: 5300, matrix: 1307, vector: 163.4 },
];
const hasTimes = Object.keys(data.times).length > 0;
if (hasTimes) DEVICES.unshift(measuredDevice());
let chosenDevice = 0;
const device = () => DEVICES[chosenDevice];
// Times belong to the shape that they were taken at, and to the machine that took them.
const isMeasured = () =>
  device().measured && data.dims.every((dim, k) => dim.size === shape.dims[k]);

// Roofs of the machine that took the times: the best that any launch reached there.
function measuredDevice() {
  const values = evaluate(...data.dims.map((dim) => dim.size));
  const best = (launches, amount) =>
    Math.max(1e-9, ...launches.map((l) => amount(l) / (Math.max(data.times[l.name], 1e-3) * 1e-6)));
  const kernels = data.launches.filter((l) => l.kind === "kernel"),
    products = data.launches.filter((l) => l.kind !== "kernel");
  const flops = (l) => values[l.flops];
  const vector = best(kernels, flops) / 1e12;
  return {
    name: "measured here",
    memory: best(data.launches, (l) => values[l.reads] + values[l.writes]) / 1e9,
    matrix: Math.max(vector, best(products, flops) / 1e12),
    vector,
    measured: true,
  };
}
const showPeak = (peak) => Number(peak.toPrecision(3)).toString();

// Kernels compute outside the matrix units; GEMMs and attention in them.
const peakOf = (launch) => (launch.kind === "kernel" ? device().vector : device().matrix) * 1e12;
const leastUs = (launch) =>
  1e6 * Math.max(moved(launch) / (device().memory * 1e9), number(launch.flops) / peakOf(launch));

function rooflineTab(pane) {
  const select = make(
    "select",
    {
      id: "device",
      onchange: () => {
        chosenDevice = Number(select.value);
        refresh();
      },
    },
    DEVICES.map((d, k) =>
      make(
        "option",
        { value: k, selected: k === chosenDevice ? "" : null },
        d.measured
          ? `${d.name}: up to ${showPeak(d.memory)} GB/s, ${showPeak(d.matrix * 1e3)} GFLOP/s in products, ${showPeak(d.vector * 1e3)} in kernels`
          : `${d.name}: ${d.memory} GB/s, ${d.matrix} TFLOP/s in half precision, ${d.vector} in float32`,
      ),
    ),
  );
  const total = sum(data.launches.map(leastUs));
  const bound = data.launches.filter(
    (l) => number(l.flops) / peakOf(l) <= moved(l) / (device().memory * 1e9),
  ).length;
  pane.append(
    make("div", { class: "row" }, select),
    make(
      "p",
      {},
      isMeasured()
        ? `At ${shownShape()}, the ${data.launches.length} launches took ${showUs(sum(data.launches.map((l) => data.times[l.name])))}; at the best that any of them reached here, they would take ${showUs(total)}.`
        : `At ${shownShape()}, ${bound} of ${data.launches.length} launches are bound by memory on this device, and all of them take at least ${showUs(total)}, whatever their code.`,
    ),
    make("div", { class: "scroll" }, rooflineChart()),
    note(
      `A dot stands for launches of the same bytes and operations, ${
        isMeasured()
          ? "at the speed that they were measured at."
          : "where the device allows them to be: on its roof. Caches that keep what the last launch wrote can lift them over it."
      } ${
        device().measured
          ? "The roofs are the best that any launch reached" +
            (isMeasured() ? "." : ", at another shape.")
          : "Peaks are data-sheet values."
      }`,
    ),
    make("h2", {}, isMeasured() ? "Where the time went" : "Where the time must go"),
    timeTable(),
  );
}

function rooflineChart() {
  const W = 820,
    H = 360,
    L = 62,
    B = 40,
    T = 14,
    R = 20;
  const points = groupLaunches();
  const x0 = Math.floor(Math.min(0, ...points.map((p) => Math.log10(p.intensity))) - 0.2),
    x1 = Math.max(4, ...points.map((p) => Math.log10(p.intensity) + 0.5)),
    y1 = Math.log10(device().matrix * 1e12) + 0.4,
    y0 = y1 - 7;
  const x = (v) => L + ((Math.log10(v) - x0) / (x1 - x0)) * (W - L - R);
  const y = (v) => H - B - ((Math.log10(v) - y0) / (y1 - y0)) * (H - B - T);
  const svg = draw("svg", { class: "chart", viewBox: `0 0 ${W} ${H}`, id: "roofline-chart" });
  for (let e = Math.ceil(x0); e <= x1; e++)
    svg.append(
      draw("line", { class: "grid", x1: x(10 ** e), x2: x(10 ** e), y1: T, y2: H - B }),
      draw("text", { x: x(10 ** e), y: H - B + 16, "text-anchor": "middle" }, String(10 ** e)),
    );
  for (let e = Math.ceil(y0); e <= y1; e++)
    svg.append(
      draw("line", { class: "grid", x1: L, x2: W - R, y1: y(10 ** e), y2: y(10 ** e) }),
      draw(
        "text",
        { x: L - 7, y: y(10 ** e) + 4, "text-anchor": "end" },
        showFlops(10 ** e).replace(".00", ""),
      ),
    );
  const bandwidth = device().memory * 1e9;
  const low = Math.max(10 ** x0, 10 ** y0 / bandwidth);
  for (const peak of [device().matrix * 1e12, device().vector * 1e12]) {
    svg.append(
      draw("path", {
        class: "roof",
        d: `M${x(low)} ${y(low * bandwidth)}L${x(peak / bandwidth)} ${y(peak)}L${W - R} ${y(peak)}`,
      }),
    );
  }
  svg.append(
    draw(
      "text",
      { x: W - R, y: y(device().matrix * 1e12) - 6, "text-anchor": "end" },
      "matrix units",
    ),
    draw("text", { x: W - R, y: y(device().vector * 1e12) + 15, "text-anchor": "end" }, "float32"),
    draw("text", { x: (W + L) / 2, y: H - 6, "text-anchor": "middle" }, "operations a byte"),
    draw("text", { x: 6, y: T + 2 }, "operations a second"),
  );
  for (const p of points) {
    svg.append(
      draw(
        "circle",
        {
          class: `dot ${p.kind}`,
          cx: x(p.intensity),
          cy: y(Math.max(10 ** y0, p.reached)),
          r: 4 + 2.2 * Math.sqrt(p.names.length),
          onclick: () => chooseLaunch(p.names[0]),
        },
        hint(
          `${p.title}\n${count(p.names.length, "launch", "es")}\n${p.intensity.toFixed(2)} operations a byte\n${isMeasured() ? "" : "at least "}${showUs(p.us)} each`,
        ),
      ),
    );
  }
  return svg;
}

function groupLaunches() {
  const groups = new Map();
  for (const l of data.launches) {
    const nbytes = moved(l),
      flops = number(l.flops),
      key = `${l.kind} ${l.kernel} ${nbytes} ${flops}`;
    const us = isMeasured() ? data.times[l.name] : leastUs(l),
      intensity = Math.max(flops / Math.max(nbytes, 1), 1e-3);
    const title = l.kernel || `${l.kind}: ${l.source}`;
    const group =
      groups.get(key) ??
      groups
        .set(key, {
          kind: l.kind,
          title,
          names: [],
          us: [],
          nbytes,
          flops,
          intensity,
        })
        .get(key);
    group.names.push(l.name);
    group.us.push(us);
  }
  return [...groups.values()].map((g) => {
    const us = sum(g.us) / g.us.length;
    return {
      ...g,
      us,
      // A launch without operations is drawn at one for 1,000 bytes, as its intensity is.
      reached: Math.max(g.flops, g.nbytes * 1e-3) / Math.max(us / 1e6, 1e-12),
    };
  });
}

function timeTable() {
  const groups = groupLaunches().sort((a, b) => b.us * b.names.length - a.us * a.names.length);
  const total = sum(groups.map((g) => g.us * g.names.length));
  return table(
    ["launch", "#times", "#moves, each", isMeasured() ? "#took, each" : "#at least, each", "#share"],
    groups
      .slice(0, 40)
      .map((g) => [
        [
          make("span", { class: `chip ${g.kind}` }, g.kind),
          make("button", { class: "link", onclick: () => chooseLaunch(g.names[0]) }, g.title),
        ],
        g.names.length,
        showNbytes(g.nbytes),
        showUs(g.us),
        `${((100 * g.us * g.names.length) / total).toFixed(1)} %`,
      ]),
  );
}
