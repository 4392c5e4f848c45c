// Overview: what went in, what came out, and every generated kernel.

const opsOf = new Map(data.launches.map((l) => [l.name, []]));
for (const op of data.ops) for (const name of op.launches) opsOf.get(name).push(op);
const before = data.ops.filter((op) => op.moves >= 0);
const kindOf = (op) =>
  op.status === "fused"
    ? "kernel"
    : op.launches.length && op.status !== "view"
      ? launchOf.get(op.launches[0]).kind
      : op.status;
const linkTo = (launch) =>
  make("button", { class: "link", onclick: () => chooseLaunch(launch) }, launch);

function chooseLaunch(name) {
  if (boxOf.has(name)) choose(boxOf.get(name).name, true);
}

function showHeadline() {
  const kernels = Object.values(data.kernels).filter((k) => k.kind !== "gemm").length;
  const gemms = data.launches.filter((l) => l.kind === "gemm").length;
  document.getElementById("headline").textContent =
    `${count(data.ops.length, "op")} became ${count(data.launches.length, "launch", "es")} of ` +
    `${count(kernels, "generated kernel")} and ${count(gemms, "GEMM")}`;
  const { device, dtypes, versions, date } = data.provenance;
  document.getElementById("origin").textContent =
    `${dtypes} on ${device} · turbotx ${versions.turbotx}, torch ${versions.torch} · ${date} UTC`;
}

function overviewTab(pane) {
  const plan = planAt(shape.dims);
  const arena = roundUp(plan.peak, memory.chunk);
  const held = memory.weights + memory.derived + memory.packed + arena;
  const outside = (kind) => kind !== "gemm" && kind !== "attention";
  const eager = sum(before.filter((op) => outside(kindOf(op))).map((op) => number(op.moves)));
  const now = sum(data.launches.filter((l) => outside(l.kind)).map(moved));
  pane.append(
    make(
      "div",
      { class: "tiles" },
      tile(before.length, data.launches.length, "launches, by PyTorch → now"),
      tile(showNbytes(eager), showNbytes(now), "moved between GEMMs"),
      tile(showNbytes(pytorchPeak()), showNbytes(plan.peak), "held for intermediates, at most"),
      tile(null, showNbytes(held), "in all: weights, copies, one arena"),
      data.timed
        ? tile(null, showUs(data.timed.total), `a call, at ${timedShape()}`)
        : tile(null, "not measured", "a call: see below"),
      tile(null, String(sum(data.externs.map((x) => x.count))), "ops left to PyTorch"),
    ),
    make("h2", {}, "Time", make("small", {}, data.timed ? `of a call at ${timedShape()}` : "")),
    ...timeParts(),
    make("h2", {}, "Memory", make("small", {}, `at ${shownShape()}`)),
    bars(
      [
        ["weights, the model's own", memory.weights],
        ["constants made of them", memory.derived],
        ["weights packed for the processor", memory.packed],
        [`arena of one call: ${showNbytes(plan.peak)} in chunks`, arena],
      ],
      showNbytes,
    ),
    note(
      `In all ${showNbytes(held)}; each further call in flight takes an arena of its own. Inputs and outputs are the caller's.`,
    ),
    make(
      "h2",
      {},
      "Launches before and after",
      make("small", {}, "in the order they run; hover to see what became of what, click to open"),
    ),
    ...ribbons(),
    make("h2", {}, "Generated kernels", make("small", {}, `at ${shownShape()}`)),
    kernelsTable(),
  );
}

const timedShape = () => freeDims.map((d) => `${d.name} ${d.size}`).join(", ");

// bars([["name", number], ...]): a row each, as long as its share of the largest.
function bars(rows, show) {
  const largest = Math.max(...rows.map(([, value]) => value), 1e-9);
  return make(
    "div",
    { class: "bars" },
    rows.map(([name, value, kind]) =>
      make(
        "div",
        {},
        make("span", { class: "what" }, name),
        make(
          "span",
          { class: "bar" },
          make("i", { class: kind ?? "", style: `width:${(100 * value) / largest}%` }),
        ),
        make("b", {}, show(value)),
      ),
    ),
  );
}

// Microseconds by kernel, where they were measured; otherwise what measures them.
function timeParts() {
  if (!data.timed) {
    const here = data.target === "cpu" ? "" : ` on a machine with ${data.target}`;
    return [
      note(`Nothing was timed for this page. This measures every launch${here}:`),
      make(
        "pre",
        {},
        `turbotx profile MODEL --shape ${freeDims
          .map((d) => `${d.name}=${d.size}`)
          .join(",")} --report report.html`,
      ),
    ];
  }
  const groups = new Map();
  for (const l of data.launches) {
    const name = l.kernel || l.name.replace(/_\d+$/, "");
    const row = groups.get(name) ?? groups.set(name, [0, 0, l.kind]).get(name);
    row[0] += data.times[l.name];
    row[1] += 1;
  }
  const rows = [...groups]
    .sort((a, b) => b[1][0] - a[1][0])
    .map(([name, [us, times, kind]]) => [`${name} × ${times}`, us, kind]);
  return [
    bars(rows.slice(0, 12), showUs),
    note(
      `Medians of ${data.timed.runs} runs; ${showUs(data.timed.between)} of ${showUs(data.timed.total)} passed between launches, and the checks of a call take ${showUs(data.timed.guards)} more.`,
    ),
  ];
}

function originTab(pane) {
  const made = data.provenance;
  const rows = [
    ["command", made.command || "a notebook"],
    ["date", `${made.date} UTC`],
    ["target", made.target],
    ["device", made.device],
    ["threads", made.threads],
    ["dtype of the weights", made.dtypes],
    ["shape", timedShape()],
    ...Object.entries(made.versions),
  ];
  const state = { ok: "good", missing: "", broken: "bad" };
  pane.append(
    make("h2", {}, "How this report was made"),
    table(
      ["", ""],
      rows.map(([name, value]) => [name, make("code", {}, String(value))]),
    ),
    make("h2", {}, "What the machine has", make("small", {}, "turbotx doctor")),
    table(
      ["", "", ""],
      made.checks.map((c) => [
        c.name,
        make("span", { class: state[c.state] }, c.state),
        [c.found, c.remedy ? make("br") : null, c.remedy ? make("small", {}, c.remedy) : null].filter(
          Boolean,
        ),
      ]),
    ),
  );
}

const tile = (was, is, what) =>
  make(
    "div",
    { class: "tile" },
    make("b", {}, was === null ? null : make("i", {}, `${was} → `), is),
    make("span", {}, what),
  );

function ribbons() {
  const above = make("div", { class: "ribbon", id: "before" }),
    below = make("div", { class: "ribbon", id: "after" });
  const light = (names) => {
    for (const ribbon of [above, below]) {
      ribbon.classList.toggle("lit", names !== null);
      for (const cell of ribbon.children)
        cell.classList.toggle(
          "lit",
          names !== null && cell.dataset.launches.split(" ").some((n) => names.includes(n)),
        );
    }
  };
  const cell = (kind, launches, text) =>
    make("div", {
      class: kind,
      title: text,
      "data-launches": launches.join(" "),
      onmouseenter: () => light(launches),
      onmouseleave: () => light(null),
      onclick: () => launches.length && chooseLaunch(launches[0]),
    });
  above.append(
    ...before.map((op) => cell(kindOf(op), op.launches, `${op.op} (${op.name}): ${op.status}`)),
  );
  below.append(...data.launches.map((l) => cell(l.kind, [l.name], l.name)));
  below.style.width = `${Math.max(4, (100 * data.launches.length) / Math.max(before.length, 1))}%`;
  return [
    note(`${before.length} launched by PyTorch, op by op`),
    above,
    note(`${data.launches.length} launched by turbotx`),
    below,
  ];
}

function kernelsTable() {
  const targets = targetNames();
  const rows = Object.entries(data.kernels).map(([name, kernel]) => {
    const launch = launchOf.get(kernel.launches[0]);
    const used = targets
      .map((t) => data.resources[name]?.[t])
      .map((r) => (r ? `${r.registers} / ${r.spills}` : ""));
    return [
      make("button", { class: "link", onclick: () => chooseLaunch(launch.name) }, name),
      kernel.launches.length,
      showNbytes(moved(launch)),
      ...used,
    ];
  });
  return table(
    ["kernel", "#launches", "#moves, each", ...targets.map((t) => `#${t}: registers / spills`)],
    rows,
  );
}

const targetNames = () => [
  ...new Set(Object.values(data.resources).flatMap((r) => Object.keys(r))),
];
