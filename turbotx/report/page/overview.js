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
  document.getElementById("headline").textContent =
    `${count(data.ops.length, "op")} became ${count(data.launches.length, "launch", "es")} of ` +
    `${count(Object.keys(data.kernels).length, "generated kernel")} and ${count(data.launches.filter((l) => l.kind === "gemm").length, "GEMM")}`;
}

function overviewTab(pane) {
  const plan = planAt(shape.dims);
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
      tile(null, String(sum(data.externs.map((x) => x.count))), "ops left to PyTorch"),
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
