// The shape that everything is shown at, and the byte counts that follow from it.

const data = JSON.parse(document.getElementById("data").textContent);
const evaluate = new Function(
  ...data.dims.map((d) => d.name),
  `return [${data.formulas.join(",")}]`,
);
const freeDims = data.dims.filter((d) => !d.follows);
const shape = { dims: data.dims.map((d) => d.size), values: [], listeners: [] };

// number(k): formula k at the current shape.
const number = (k) => shape.values[k];

function setDim(name, size) {
  data.dims.forEach((dim, k) => {
    if (dim.name === name || dim.follows === name) shape.dims[k] = size;
  });
  shape.values = evaluate(...shape.dims);
  shape.listeners.forEach((listener) => listener());
}

// Slider positions are logarithmic: as much room for 1 to 16 as for 64 to 1024.
const STEPS = 400;
const sizeAt = (dim, step) => Math.round(Math.exp((step / STEPS) * Math.log(dim.end)));
const stepAt = (dim, size) => Math.round((Math.log(size) / Math.log(Math.max(dim.end, 2))) * STEPS);

function makeSliders() {
  const sliders = freeDims.map((dim) => {
    const output = make("output", {}, String(dim.size));
    const slider = make("input", {
      type: "range",
      min: 0,
      max: STEPS,
      value: stepAt(dim, dim.size),
      id: `dim-${dim.name}`,
      oninput: () => setDim(dim.name, sizeAt(dim, Number(slider.value))),
    });
    shape.listeners.push(() => {
      const size = shape.dims[data.dims.indexOf(dim)];
      output.textContent = size;
      if (sizeAt(dim, Number(slider.value)) !== size) slider.value = stepAt(dim, size);
    });
    return make("label", {}, dim.name, slider, output);
  });
  document.getElementById("dims").append(...sliders);
}

const shownShape = () =>
  freeDims.map((d) => `${d.name} ${shape.dims[data.dims.indexOf(d)]}`).join(", ");

// --- making elements ---

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "html") element.innerHTML = value;
    else if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((c) => c !== null && c !== undefined));
  return element;
}

const make = (tag, attributes = {}, ...children) =>
  fill(document.createElement(tag), attributes, children);
const draw = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS(SVG, tag), attributes, children);
const note = (...children) => make("p", { class: "note" }, ...children);
const hint = (text) => draw("title", {}, text);

// table(["kernel", "#bytes"], rows): a column whose head starts with # is numbers.
function table(head, rows) {
  const number = head.map((h) => (h.startsWith("#") ? "number" : null));
  const cells = (tag, row) =>
    row.map((c, k) => make(tag, { class: number[k] }, ...(Array.isArray(c) ? c : [c])));
  const made = make(
    "table",
    {},
    make(
      "thead",
      {},
      make(
        "tr",
        {},
        cells(
          "th",
          head.map((h) => h.replace(/^#/, "")),
        ),
      ),
    ),
    make(
      "tbody",
      {},
      rows.map((row) => make("tr", {}, cells("td", row))),
    ),
  );
  return make("div", { class: "scroll" }, made); // wide ones move by themselves
}

// --- showing numbers ---

function showNbytes(nbytes) {
  if (nbytes >= 2 ** 30) return `${(nbytes / 2 ** 30).toFixed(2)} GiB`;
  if (nbytes >= 2 ** 20) return `${(nbytes / 2 ** 20).toFixed(2)} MiB`;
  return nbytes >= 1024 ? `${(nbytes / 1024).toFixed(1)} KiB` : `${nbytes} B`;
}

function showFlops(flops) {
  for (const [unit, size] of [
    ["T", 1e12],
    ["G", 1e9],
    ["M", 1e6],
    ["k", 1e3],
  ]) {
    if (flops >= size) return `${(flops / size).toFixed(2)} ${unit}`;
  }
  return String(Math.round(flops));
}

const showUs = (us) =>
  us >= 1000 ? `${(us / 1000).toFixed(2)} ms` : `${us.toFixed(us < 10 ? 2 : 1)} µs`;
const showError = (x) => (x === null ? "NaN" : x === 0 ? "0" : x.toExponential(1));
const count = (n, what, plural = "s") => `${n} ${what}${n === 1 ? "" : plural}`;
const sum = (values) => values.reduce((a, b) => a + b, 0);
const moved = (launch) => number(launch.reads) + number(launch.writes);
