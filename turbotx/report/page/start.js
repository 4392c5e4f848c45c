// The remaining tabs, and what happens when the page opens.

function refusedTab(pane) {
  const finished = (r) => r.launches.length && !r.kernels.length; // by a matrix product's launch
  const split = data.regions.filter((r) => r.reason && !finished(r));
  pane.append(make("h2", {}, "Left to PyTorch"));
  if (!data.externs.length)
    pane.append(make("p", { class: "good" }, "Nothing: every op has a kernel."));
  else
    pane.append(
      table(
        ["op", "#times", "why", "where"],
        data.externs.map((x) => {
          const launches = data.launches.filter((l) => l.op === x.op);
          return [
            make("code", {}, x.op),
            x.count,
            x.reason,
            launches.slice(0, 4).flatMap((l) => [linkTo(l.name), " "]),
          ];
        }),
      ),
    );
  pane.append(make("h2", {}, "Regions of more than one kernel"));
  if (!split.length)
    pane.append(
      make(
        "p",
        { class: "good" },
        "None: each run of ops between two matrix products is one kernel.",
      ),
    );
  else
    pane.append(
      table(
        ["region", "#kernels", "why"],
        groupRegions(split).map(([r, names]) => [
          names
            .slice(0, 6)
            .flatMap((n) => [
              make("button", { class: "link", onclick: () => choose(n, true) }, n),
              " ",
            ])
            .concat(names.length > 6 ? `and ${names.length - 6} more` : []),
          r.kernels.length,
          r.reason,
        ]),
      ),
    );
  pane.append(
    make(
      "h2",
      {},
      "Kernels of their own",
      make("small", {}, "why no matrix product's launch does it"),
    ),
    apartTable(),
  );
  const idle = data.ops.filter((op) => op.status === "removed" || op.status === "merged");
  pane.append(
    make(
      "h2",
      {},
      "Ops that are gone",
      make("small", {}, "because they do nothing here, or another does it too"),
    ),
  );
  pane.append(idle.length ? goneTable(idle) : make("p", {}, "None."));
}

function linksTo(names, most = 6) {
  const shown = names.slice(0, most).flatMap((name) => [linkTo(name), " "]);
  return names.length > most ? [...shown, `and ${names.length - most} more`] : shown;
}

function apartTable() {
  const groups = new Map();
  for (const l of data.launches.filter((l) => l.apart)) {
    const key = `${l.kernel} ${l.apart}`;
    (groups.get(key) ?? groups.set(key, []).get(key)).push(l);
  }
  return table(
    ["launch", "#times", "why it stayed apart"],
    [...groups.values()].map((group) => [
      linksTo(group.map((l) => l.name)),
      group.length,
      group[0].apart,
    ]),
  );
}

// One row an op and what became of it, for as many nodes as there are.
function goneTable(ops) {
  const groups = new Map();
  for (const op of ops) {
    const key = `${op.op} ${op.status}`;
    (groups.get(key) ?? groups.set(key, []).get(key)).push(op);
  }
  const launches = (group) => [...new Set(group.flatMap((op) => op.launches))];
  return table(
    ["op", "#times", "what became of it", "nodes"],
    [...groups.values()].map((group) => [
      make("code", {}, group[0].op),
      group.length,
      group[0].status === "merged"
        ? ["part of ", ...linksTo(launches(group))]
        : "removed",
      make(
        "small",
        {},
        group
          .slice(0, 8)
          .map((op) => op.name)
          .join(", ") + (group.length > 8 ? ", …" : ""),
      ),
    ]),
  );
}

// Regions of one reason and the same kernels, as of repeated layers, are one row.
function groupRegions(regions) {
  const groups = new Map();
  for (const r of regions) {
    const key = r.reason + r.kernels.length;
    (groups.get(key) ?? groups.set(key, [r, []]).get(key))[1].push(r.name);
  }
  return [...groups.values()];
}

const errorTable = (errors) =>
  table(
    ["launch", "#eager", "#turbotx", "#relative", "#allowed", ""],
    errors.map((e) => [
      [
        launchOf.has(e.name) ? linkTo(e.name) : make("code", {}, e.name),
        " ",
        make("small", {}, e.module),
      ],
      showError(e.eager),
      showError(e.turbotx),
      showError(e.relative),
      showError(e.allowed),
      make(
        "span",
        { class: e.holds ? "good" : "bad" },
        !e.holds ? "too large" : e.applies ? "holds" : "n/a",
      ),
    ]),
  );

function numericsTab(pane) {
  const numerics = data.numerics;
  if (!numerics) {
    pane.append(
      note(
        "Not measured for this page. This does: ",
        make("code", {}, "turbotx compile MODEL --verify --out out"),
      ),
    );
    return;
  }
  pane.append(
    make(
      "h2",
      {},
      "Against float64",
      make("small", {}, "largest differences: PyTorch's own ops, and turbotx"),
    ),
    make(
      "p",
      { class: numerics.holds ? "good" : "bad" },
      numerics.holds
        ? "The rule holds for every launch and every output: at most 1.5 × eager's error in launches of the kind, plus 2 ulp of the largest value."
        : "The rule is broken: see below.",
    ),
    errorTable(numerics.outputs),
    make("h2", {}, "Launch by launch"),
    errorTable([...numerics.launches].sort((a, b) => a.holds - b.holds || b.relative - a.relative)),
  );
}

const TABS = [
  ["overview", "Overview", overviewTab],
  ["selected", "Selected", selectedTab],
  ["memory", "Memory", memoryTab],
  ["roofline", "Roofline", rooflineTab],
  ["refused", "Not fused", refusedTab],
  ["numerics", "Numerics", numericsTab],
  ["origin", "Made by", originTab],
];
let open = "overview",
  update = null;

function openTab(name) {
  if (player && name !== "memory") stopPlaying();
  open = name;
  for (const button of document.querySelectorAll("#tabs button"))
    fill(button, {
      "aria-selected": button.dataset.tab === name,
      tabindex: button.dataset.tab === name ? 0 : -1, // one stop for Tab; arrows move inside
    }, []);
  const pane = document.getElementById("pane");
  pane.setAttribute("aria-labelledby", `tab-${name}`);
  pane.replaceChildren();
  pane.scrollTop = 0;
  update = TABS.find(([key]) => key === name)[2](pane) ?? null;
}

// Left and right, Home and End, as in any list of tabs.
function moveByKeys(event) {
  const at = TABS.findIndex(([key]) => key === open);
  const next = {
    ArrowRight: (at + 1) % TABS.length,
    ArrowLeft: (at + TABS.length - 1) % TABS.length,
    Home: 0,
    End: TABS.length - 1,
  }[event.key];
  if (next === undefined) return;
  event.preventDefault();
  openTab(TABS[next][0]);
  document.querySelector('#tabs [aria-selected="true"]').focus();
}

// A tab that can says how it changes with the shape; others are made anew where they stand.
function refresh() {
  if (update) {
    update();
    return;
  }
  const pane = document.getElementById("pane"),
    top = pane.scrollTop;
  openTab(open);
  pane.scrollTop = top;
}

function listenToGrip() {
  const grip = document.getElementById("grip"),
    panel = document.getElementById("graph");
  grip.addEventListener("pointerdown", (event) => {
    grip.setPointerCapture(event.pointerId);
    event.preventDefault();
  });
  grip.addEventListener("pointermove", (event) => {
    if (event.buttons) {
      panel.style.width = `${event.clientX}px`;
      placeOverview();
    }
  });
}

function listenToTheme() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  document.getElementById("theme").addEventListener("click", () => {
    const now = document.documentElement.style.colorScheme || (dark.matches ? "dark" : "light");
    document.documentElement.style.colorScheme = now === "dark" ? "light" : "dark";
  });
}

shape.values = evaluate(...shape.dims);
const tabs = document.getElementById("tabs");
tabs.addEventListener("keydown", moveByKeys);
tabs.append(
  ...TABS.map(([key, title]) =>
    make(
      "button",
      {
        id: `tab-${key}`,
        "data-tab": key,
        role: "tab",
        "aria-controls": "pane",
        onclick: () => openTab(key),
      },
      title,
    ),
  ),
);
showHeadline();
makeSliders();
drawGraph();
listenToPointers();
listenToSearch();
listenToGrip();
listenToTheme();
document.getElementById("fit").addEventListener("click", () => fit(true));
addEventListener("resize", placeOverview);
shape.listeners.push(refresh);
fit(false);
openTab("overview");
const linked = decodeURIComponent(location.hash.slice(1));
if (graph.boxes.has(linked)) choose(linked, true);
else if (TABS.some(([key]) => key === linked)) openTab(linked);
document.documentElement.dataset.drawn = Math.round(performance.now());
