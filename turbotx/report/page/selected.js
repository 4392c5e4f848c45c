// Selected: a box of the graph opened: where it comes from, what it became, what it costs.

function selectedTab(pane) {
  const entry = graph.boxes.get(graph.chosen);
  if (!entry) {
    pane.append(note("Choose a box of the graph, or search; ↑ and ↓ step through the launches."));
    return;
  }
  const { box } = entry;
  const launches = box.launches.map((n) => launchOf.get(n));
  pane.append(make("h2", { id: "title" }, box.title, make("small", {}, box.text || box.kind)));
  if (!launches.length) {
    pane.append(
      note(
        box.kind === "input" || box.kind === "output"
          ? `An ${box.kind} of the model.`
          : "Nothing runs for it: it is computed once, from parameters alone.",
      ),
    );
    return;
  }
  const region = data.regions.find((r) => r.name === box.name);
  if (region?.reason)
    pane.append(
      make(
        "p",
        {},
        make("span", { class: "chip aten" }, count(region.kernels.length, "kernel")),
        region.reason,
      ),
    );
  for (const why of new Set(launches.map((l) => l.apart).filter(Boolean)))
    pane.append(make("p", {}, make("span", { class: "chip kernel" }, "its own launch"), why));
  pane.append(sourceTable(launches), costTable(launches), ...errorsOf(launches));
  const names = [...new Set(launches.map((l) => l.kernel).filter(Boolean))];
  for (const name of names) pane.append(...kernelParts(name));
  if (!names.length)
    pane.append(
      note(
        launches[0].kind === "gemm"
          ? `A matrix product ${data.target === "cpu" ? "with its weights packed once" : "of the library"}; no source is generated for it.`
          : `PyTorch runs it: ${data.externs.find((x) => x.op === launches[0].op)?.reason ?? "nothing is generated for it"}`,
      ),
    );
}

// The user's own lines, in order, and the ops that each of them became.
function sourceTable(launches) {
  const lines = new Map();
  for (const op of new Set(launches.flatMap((l) => opsOf.get(l.name)))) {
    const key = op.place || op.module;
    (lines.get(key) ?? lines.set(key, []).get(key)).push(op);
  }
  const rows = [...lines].map(([key, ops]) => {
    const place = data.places[key];
    return [
      place
        ? [
            make("code", {}, place.code || "?"),
            make("br"),
            make("small", { title: key }, place.short),
          ]
        : make("small", {}, key || "the model itself"),
      ops.map((op) =>
        make("span", { class: `chip ${kindOf(op)}`, title: `${op.name}: ${op.status}` }, op.op),
      ),
      make("small", {}, [...new Set(ops.map((op) => op.module))].join(", ")),
    ];
  });
  return table(["source", "ops", "module"], rows);
}

function costTable(launches) {
  const rows = launches.map((l) => {
    const flops = number(l.flops),
      nbytes = moved(l);
    return [
      make("code", {}, l.name),
      [
        showNbytes(number(l.reads)),
        make("br"),
        make("small", {}, make("code", {}, data.shown[l.reads])),
      ],
      [
        showNbytes(number(l.writes)),
        make("br"),
        make("small", {}, make("code", {}, data.shown[l.writes])),
      ],
      [
        showFlops(flops),
        make("br"),
        make("small", {}, `${(flops / Math.max(nbytes, 1)).toFixed(2)} a byte`),
      ],
      showUs(leastUs(l)),
      ...(hasTimes ? [showUs(data.times[l.name])] : []),
    ];
  });
  const ops = [...new Set(launches.flatMap((l) => opsOf.get(l.name)))].filter(
    (op) => op.moves >= 0,
  );
  const alone = sum(ops.map((op) => number(op.moves)));
  const summary = note(
    `PyTorch moves ${showNbytes(alone)} for the same, in ${count(ops.length, "launch", "es")}; here it is ${showNbytes(sum(launches.map(moved)))} in ${launches.length}.`,
  );
  return make(
    "div",
    {},
    make("h2", {}, "Traffic", make("small", {}, `bytes at ${shownShape()}`)),
    table(
      [
        "launch",
        "reads",
        "writes",
        "operations",
        device().measured ? "#at the best reached here" : `#at least, on ${device().name}`,
        ...(hasTimes ? ["#measured here"] : []),
      ],
      rows,
    ),
    ops.length ? summary : "",
  );
}

function errorsOf(launches) {
  const found =
    data.numerics?.launches.filter((e) => launches.some((l) => l.name === e.name)) ?? [];
  return found.length ? [make("h2", {}, "Against float64"), errorTable(found)] : [];
}

function kernelParts(name) {
  const kernel = data.kernels[name],
    used = data.resources[name] ?? {};
  const rows = Object.entries(used).map(([target, r]) => [
    target,
    r.registers,
    r.spills,
    showNbytes(r.shared_nbytes),
    r.load_bits,
    r.store_bits,
    r.instructions,
  ]);
  return [
    make("h2", {}, name, make("small", {}, count(kernel.launches.length, "launch", "es"))),
    make("pre", {}, make("code", {}, kernel.signature)),
    make(
      "div",
      { class: "pair", style: "margin-top:14px" },
      Object.entries(kernel.sources)
        .sort(([a], [b]) => (a < b ? 1 : -1)) // Triton, then C++
        .map(([language, html]) =>
          make(
            "div",
            {},
            make("h3", {}, { triton: "Triton", cpp: "C++" }[language]),
            make("pre", { class: "source" }, make("code", { html })),
          ),
        ),
    ),
    make("h2", {}, "Resources"),
    rows.length
      ? table(
          [
            "target",
            "#registers",
            "#spills",
            "#shared",
            "#load bits",
            "#store bits",
            "#instructions",
          ],
          rows,
        )
      : note("Built for no GPU yet: turbotx compile --target sm_90 does, on any machine."),
  ];
}
