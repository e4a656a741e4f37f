/* The workbench in the browser: choosing, painting, sending commands. No state of the recipe lives here: every edit goes to
   the server, and what comes back is shown. Text is only ever set as textContent. */
(function () {
  "use strict";

  const PATIENCE = 300; // ms after which the page says that it is computing
  const SILENCE = 4000; // ms after which it asks whether the server is still there
  const LABELLED = 44; // up to this many tokens the axes carry them
  const ECHO = 400; // ms within which a control may report a value that we set
  const ROWS_KEPT = 512;
  const BUSY_KEYS = "input, textarea, select, [contenteditable], [role=slider], [role=radio], dialog[open]";

  const state = {
    run: null, // what the server said last
    row: 0,
    head: 0,
    query: null,
    which: "after",
    scale: "sqrt",
    value: 1, // the scale that the controls show
    hover: null, // [query, key]
  };
  const traffic = { number: 0, waiting: null, queue: [], timers: [] };
  const shown = { "scale-slider": new Map(), "scale-number": new Map() }; // values that we set, with the time
  const rows = new Map(); // exact rows by address: Float32Array, or the promise of one
  let picture = null; // the decoded pattern now shown
  let place = null; // where its cells lie on the canvas

  const byId = (id) => document.getElementById(id);
  const noUpdate = () => window.dash_clientside.no_update;
  const setProps = (id, props) => window.dash_clientside.set_props(id, props);
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const site = () => state.run.rows[state.row];
  const name = () => `${site().label} H${state.head}`;
  const key = () => state.run[state.which];
  const edit = (row, head) => state.run.recipe.find((e) => e.row === row && e.head === head);
  const clamp = (value, low, high) => Math.max(low, Math.min(high, value));
  const token = (index) => byId("strip")?.children[index]?.textContent ?? "";
  const percent = (p) => `${(100 * p).toFixed(p < 0.001 ? 3 : 1)} %`;

  /* ---- commands ---- */

  function send(command) {
    if (traffic.waiting) {
      const last = traffic.queue[traffic.queue.length - 1];
      const again = last && last.action === "scale" && command.action === "scale" && last.row === command.row && last.head === command.head;
      if (again) traffic.queue.pop();
      traffic.queue.push(command);
      return;
    }
    traffic.number += 1;
    traffic.waiting = traffic.number;
    document.body.dataset.pending = "true";
    traffic.timers = [setTimeout(() => (document.body.dataset.busy = "true"), PATIENCE), setTimeout(enquire, SILENCE)];
    setProps("command", { data: { ...command, number: traffic.number } });
  }

  function answered(number) {
    if (number !== traffic.waiting) return;
    traffic.timers.forEach(clearTimeout);
    traffic.waiting = null;
    document.body.dataset.busy = "false";
    setProps("progress", { children: "" });
    complain("");
    const next = traffic.queue.shift();
    if (next) send(next);
    else document.body.dataset.pending = "false";
    document.body.dataset.answered = String(number);
  }

  async function enquire() {
    if (!traffic.waiting) return;
    try {
      const answer = await fetch("/alive", { cache: "no-store" });
      if (answer.ok) complain("");
      else complain("The server was restarted. Open the address that the terminal printed.");
    } catch {
      complain("The server does not answer. What is shown is the last state it sent; restart `headscope app` to go on.");
    }
    if (traffic.waiting) traffic.timers.push(setTimeout(enquire, SILENCE));
  }

  function complain(message) {
    const box = byId("connection");
    if (!box) return;
    box.textContent = message;
    box.hidden = !message;
  }

  function setScale(value, source) {
    const scaled = clamp(Math.round(value * 1e4) / 1e4, 0, 2);
    showValue(scaled, source);
    send({ action: "scale", row: state.row, head: state.head, value: scaled });
  }

  /* A control that is set by us reports the value like one that is moved by hand, sometimes late: `shown` tells them apart. */
  function showValue(value, source) {
    state.value = value;
    for (const control of Object.keys(shown)) {
      if (control === source) continue;
      shown[control].set(value, performance.now());
      setProps(control, { value });
    }
  }

  function moved(control, value) {
    if (!state.run || !Number.isFinite(value) || value === state.value || value < 0 || value > 2) return;
    if (performance.now() - (shown[control].get(value) ?? -Infinity) < ECHO) setProps(control, { value: state.value });
    else setScale(value, control);
  }

  /* ---- what the server says ---- */

  function show(run) {
    if (!run) return null;
    if (!run.after) {
      answered(run.answered); // refused: everything stays, the controls go back to the recipe
      if (state.run && !traffic.waiting) showValue(edit(state.row, state.head)?.value ?? 1);
      return null;
    }
    const first = state.run === null;
    const longer = first || state.run.tokens !== run.tokens || state.run.before !== run.before;
    state.run = run;
    if (first) [state.row, state.head] = run.start;
    if (longer) {
      state.query = run.tokens - 1;
      rows.clear();
    }
    answered(run.answered);
    setProps("undo", { disabled: !run.undo });
    setProps("redo", { disabled: !run.redo });
    setProps("clear", { disabled: !run.recipe.length });
    if (first) listen();
    if (!traffic.waiting) showValue(edit(state.row, state.head)?.value ?? 1);
    axes();
    paintGrid();
    paintHead();
    document.body.dataset.run = run.after;
    return run.after;
  }

  /* ---- the grid of heads ---- */

  const widest = () => Math.max(...state.run.rows.map((r) => r.heads));

  function axes() {
    const numbers = byId("head-numbers");
    const layers = byId("layer-numbers");
    numbers.replaceChildren(...Array.from({ length: widest() }, (_, i) => label(i)));
    layers.replaceChildren(...state.run.rows.map((r) => label(r.label)));
    byId("grid").style.aspectRatio = `${widest()} / ${state.run.rows.length}`;
  }

  function label(text) {
    const element = document.createElement("span");
    element.textContent = text;
    return element;
  }

  function paintGrid() {
    const image = byId("grid-image");
    const address = `${state.run.pictures}/${key()}/grid-sqrt.png`;
    const done = () => {
      document.body.dataset.grid = "painted";
      document.body.dataset.gridRun = address.split("/")[3];
    };
    if (image.getAttribute("src") !== address) {
      document.body.dataset.grid = "loading";
      image.onload = done;
      image.onerror = () => send({ action: "show" });
      image.src = address;
    }
    marks();
  }

  function marks() {
    const across = 100 / widest();
    const down = 100 / state.run.rows.length;
    const mark = (row, head, kind) => {
      const box = document.createElement("div");
      box.className = kind;
      Object.assign(box.style, { left: `${head * across}%`, top: `${row * down}%`, width: `${across}%`, height: `${down}%` });
      return box;
    };
    byId("grid-marks").replaceChildren(
      ...state.run.recipe.map((e) => mark(e.row, e.head, "edited")),
      mark(state.row, state.head, "selected"),
    );
  }

  function choose(row, head) {
    if (!state.run) return;
    state.row = clamp(row, 0, state.run.rows.length - 1);
    state.head = clamp(head, 0, site().heads - 1);
    showValue(edit(state.row, state.head)?.value ?? 1);
    marks();
    paintHead();
  }

  /* ---- the pattern of the chosen head ---- */

  function paintHead() {
    const shared = site().heads / site().groups;
    const group = shared > 1 ? ` · shares keys and values: group ${Math.floor(state.head / shared)} of ${site().groups}` : "";
    byId("pattern-name").textContent = name();
    byId("edited-name").textContent = name();
    byId("summary-name").textContent = name();
    byId("group").textContent = `${site().kind}-attention${group}`;
    byId("chosen").textContent = `Layer ${site().label.slice(1)}, head ${state.head} is chosen. `;
    byId("grid").setAttribute("aria-label", `Grid of heads, ${state.run.rows.length} by ${widest()}; arrow keys choose one. Chosen: ${name()}`);
    byId("pattern").setAttribute("aria-label", `Attention pattern of ${name()}: ${site().queries} queries by ${site().keys} keys`);
    document.body.dataset.head = `${state.row}.${state.head}`;
    state.query = clamp(state.query, 0, site().queries - 1);
    paintPattern();
    paintTicks();
    paintQuery();
    paintSummary();
  }

  async function paintSummary() {
    const [run, row, head] = [key(), state.row, state.head];
    let found;
    try {
      found = await (await fetch(`/numbers/${run}/${row}/${head}`)).json();
    } catch {
      return;
    }
    if (run !== key() || row !== state.row || head !== state.head) return;
    const names = { itself: "on the token itself", previous: "on the token before", first: "on the first token" };
    const parts = Object.entries(names).filter(([part]) => part in found).flatMap(([part, text]) => {
      const bar = document.createElement("span");
      bar.className = "bar-fill before";
      bar.style.width = `${(62 * found[part]).toFixed(2)}%`;
      const value = label(percent(found[part]));
      value.className = "number";
      return [element("dt", [text]), element("dd", [bar, value])];
    });
    parts.push(element("dt", ["entropy"]), element("dd", [`${found.entropy.toFixed(2)} nats`]));
    byId("summary").replaceChildren(...parts);
  }

  function element(kind, children) {
    const made = document.createElement(kind);
    made.append(...children);
    return made;
  }

  async function paintPattern() {
    const wanted = `${key()}/${state.row}/${state.head}-${state.scale}`;
    document.body.dataset.wanted = wanted;
    const image = new Image();
    image.src = `${state.run.pictures}/${wanted}.png`;
    try {
      await image.decode();
    } catch {
      if (document.body.dataset.wanted === wanted) send({ action: "show" });
      return;
    }
    if (document.body.dataset.wanted !== wanted) return; // something newer was chosen meanwhile
    picture = image;
    drawPattern();
    document.body.dataset.pattern = wanted;
  }

  function drawPattern() {
    if (!picture) return;
    const canvas = byId("pattern");
    const width = byId("pattern-box").clientWidth;
    const density = window.devicePixelRatio || 1;
    const context = canvas.getContext("2d");
    const { queries, keys } = site();
    const labelled = Math.max(queries, keys) <= LABELLED && queries === state.run.tokens && keys === state.run.tokens;
    const font = `11px ${colour("--mono")}`;
    context.font = font;
    const texts = labelled ? Array.from({ length: keys }, (_, i) => shorten(token(i).trim() || token(i), 11)) : [];
    const right = labelled ? 2 : 12;
    const left = labelled ? Math.ceil(Math.max(...texts.map((t) => context.measureText(t).width))) + 10 : 34;
    const below = labelled ? left : 20;
    const across = width - left - right;
    const down = Math.round(across * clamp(queries / keys, 0.25, 1.5));
    const top = 6; // half a label sticks out above the first row
    const height = top + down + below;
    for (const sheet of [canvas, byId("pattern-over")]) {
      sheet.width = Math.round(width * density);
      sheet.height = Math.round(height * density);
      sheet.style.height = `${height}px`;
      sheet.getContext("2d").setTransform(density, 0, 0, density, 0, 0);
    }
    place = { left, top, across, down, cell: across / keys, tall: down / queries };
    context.fillStyle = hatching(context);
    context.fillRect(left, top, across, down);
    context.imageSmoothingEnabled = keys > across * density;
    context.drawImage(picture, left, top, across, down);
    context.strokeStyle = colour("--line");
    context.strokeRect(left - 0.5, top - 0.5, across + 1, down + 1);
    context.font = font;
    context.fillStyle = colour("--soft");
    context.textBaseline = "middle";
    const every = labelled ? 1 : tick(queries);
    for (let i = 0; i < queries; i += every) {
      context.textAlign = "right";
      context.fillText(labelled ? texts[i] : String(i), left - 6, top + (i + 0.5) * place.tall);
    }
    for (let i = 0; i < keys; i += labelled ? 1 : tick(keys)) {
      context.save();
      context.translate(left + (i + 0.5) * place.cell, top + down + (labelled ? 6 : 11));
      if (labelled) context.rotate(-Math.PI / 2);
      context.textAlign = labelled ? "right" : "center";
      context.fillText(labelled ? texts[i] : String(i), 0, 0);
      context.restore();
    }
    drawOver();
  }

  const shorten = (text, length) => (text.length > length ? `${text.slice(0, length - 1)}…` : text);
  const tick = (count) => 2 ** Math.max(0, Math.ceil(Math.log2(count / 10)));

  function hatching(context) {
    const tile = document.createElement("canvas");
    tile.width = tile.height = 8;
    const brush = tile.getContext("2d");
    brush.fillStyle = colour("--hatch-ground");
    brush.fillRect(0, 0, 8, 8);
    brush.strokeStyle = colour("--hatch");
    brush.lineWidth = 1;
    for (const shift of [-8, 0, 8]) {
      brush.beginPath();
      brush.moveTo(shift, 8);
      brush.lineTo(shift + 8, 0);
      brush.stroke();
    }
    return context.createPattern(tile, "repeat");
  }

  function drawOver() {
    if (!place) return;
    const canvas = byId("pattern-over");
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, canvas.width, canvas.height);
    const box = (x, y, w, h, paint, line) => {
      context.strokeStyle = paint;
      context.lineWidth = line;
      context.strokeRect(x, y, w, h);
    };
    const y = place.top + state.query * place.tall;
    const tall = Math.max(place.tall, 3);
    box(place.left - 1, y - 1, place.across + 2, tall + 2, "#ffffff", 3);
    box(place.left - 1, y - 1, place.across + 2, tall + 2, colour("--chosen"), 1.5);
    if (state.hover) {
      const [query, at] = state.hover;
      box(place.left + at * place.cell, place.top + query * place.tall, Math.max(place.cell, 3), tall, "#ffffff", 3);
      box(place.left + at * place.cell, place.top + query * place.tall, Math.max(place.cell, 3), tall, colour("--hover"), 1.5);
    }
  }

  function paintTicks() {
    const places = { linear: (p) => p, sqrt: Math.sqrt, log: (p) => (p ? Math.log10(p) / 6 + 1 : 0) };
    const ticks = { linear: [0, 0.25, 0.5, 0.75, 1], sqrt: [0, 0.01, 0.1, 0.25, 0.5, 1], log: [1e-6, 1e-4, 1e-2, 0.1, 1] };
    byId("ticks").replaceChildren(
      ...ticks[state.scale].map((p) => {
        const text = label(state.scale === "log" && p < 0.01 ? `10${p === 1e-6 ? "⁻⁶" : "⁻⁴"}` : String(p));
        text.style.left = `${100 * places[state.scale](p)}%`;
        return text;
      }),
    );
  }

  /* ---- exact rows: hover, and the chosen query ---- */

  function exactRow(query) {
    const address = `/numbers/${key()}/${state.row}/${state.head}/${query}`;
    if (!rows.has(address)) {
      const promise = fetch(address).then(async (answer) => {
        if (!answer.ok) throw new Error(await answer.text());
        return new Float32Array(await answer.arrayBuffer());
      });
      promise.catch(() => rows.delete(address));
      rows.set(address, promise);
      if (rows.size > ROWS_KEPT) rows.delete(rows.keys().next().value);
    }
    return rows.get(address);
  }

  async function paintQuery() {
    const [run, row, head, query] = [key(), state.row, state.head, state.query];
    drawOver();
    let values;
    try {
      values = await exactRow(query);
    } catch {
      return;
    }
    if (run !== key() || row !== state.row || head !== state.head || query !== state.query) return;
    shade(values);
    reveal(byId("strip"), byId("strip").children[query]);
    const line = byId("query-line");
    let [most, entropy] = [0, 0];
    values.forEach((p, i) => {
      if (p > values[most] || Number.isNaN(values[most])) most = i;
      if (p > 0) entropy -= p * Math.log(p);
    });
    line.replaceChildren(
      `Query ${query} `, chip(token(query)), ` in ${name()} looks most at ${most} `, chip(token(most)),
      ` (${percent(values[most])}) · entropy ${entropy.toFixed(2)} of at most ${Math.log(values.filter((p) => !Number.isNaN(p)).length).toFixed(2)} nats`,
    );
    document.body.dataset.query = String(query);
    document.body.dataset.shaded = `${run}/${row}/${head}/${query}`;
  }

  function chip(text) {
    const element = label(text);
    element.className = "chip";
    return element;
  }

  function shade(values) {
    const strip = byId("strip");
    Array.from(strip.children).forEach((button, i) => {
      const p = Number.isNaN(values[i]) ? 0 : (values[i] ?? 0);
      button.style.setProperty("--weight", `${(100 * Math.sqrt(p)).toFixed(1)}%`);
      button.classList.toggle("strong", p > 0.6); // dark text on it from here on
      button.classList.toggle("beyond", Number.isNaN(values[i]));
      button.classList.toggle("query", i === state.query);
      button.tabIndex = i === state.query ? 0 : -1;
      button.setAttribute("aria-pressed", String(i === state.query));
    });
  }

  /* Scrolls the strip alone, where scrollIntoView would move the page as well. */
  function reveal(strip, button) {
    if (!button) return;
    const [top, bottom] = [button.offsetTop, button.offsetTop + button.offsetHeight];
    if (top < strip.scrollTop || bottom > strip.scrollTop + strip.clientHeight) strip.scrollTop = top - strip.clientHeight / 2;
  }

  function chooseQuery(query, focus) {
    if (!state.run) return;
    state.query = clamp(query, 0, site().queries - 1);
    if (focus) byId("strip").children[state.query]?.focus();
    paintQuery();
  }

  async function hover(event) {
    if (!place || !state.run) return;
    const box = byId("pattern").getBoundingClientRect();
    const at = Math.floor((event.clientX - box.left - place.left) / place.cell);
    const query = Math.floor((event.clientY - box.top - place.top) / place.tall);
    if (at < 0 || query < 0 || at >= site().keys || query >= site().queries) return leave();
    state.hover = [query, at];
    drawOver();
    Array.from(byId("strip").children).forEach((button, i) => button.classList.toggle("hovered", i === at));
    try {
      const values = await exactRow(query);
      if (!state.hover || state.hover[0] !== query || state.hover[1] !== at) return;
      const value = Number.isNaN(values[at]) ? "masked" : exact(values[at]);
      const readout = byId("readout");
      readout.replaceChildren(`query ${query} `, chip(token(query)), ` → key ${at} `, chip(token(at)), " ", strong(value));
      Object.assign(readout.dataset, { query: String(query), key: String(at), value: String(values[at]) });
    } catch (error) {
      byId("readout").textContent = String(error.message || error);
    }
  }

  function exact(value) {
    if (value === 0) return "0";
    return value >= 1e-4 ? value.toPrecision(8) : value.toExponential(7);
  }

  function strong(text) {
    const element = document.createElement("strong");
    element.textContent = text;
    return element;
  }

  function leave() {
    if (!state.hover) return;
    state.hover = null;
    drawOver();
    Array.from(byId("strip").children).forEach((button) => button.classList.remove("hovered"));
    byId("readout").textContent = "Point at a cell to read its exact value.";
    delete byId("readout").dataset.value;
  }

  /* ---- what people do ---- */

  const actions = {
    text: () => send({ action: "text", text: byId("text").value }),
    ablate: () => setScale(0),
    reset: () => setScale(1),
    undo: () => send({ action: "undo" }),
    redo: () => send({ action: "redo" }),
    clear: () => send({ action: "clear" }),
    remove: (source) => send({ action: "remove", row: Number(source.dataset.row), head: Number(source.dataset.head) }),
    goto: (source) => choose(Number(source.dataset.row), Number(source.dataset.head)),
    help: () => byId("keys").showModal(),
    "close-help": () => byId("keys").close(),
  };

  const keys = {
    ArrowLeft: () => choose(state.row, state.head - 1),
    ArrowRight: () => choose(state.row, state.head + 1),
    ArrowUp: () => choose(state.row - 1, state.head),
    ArrowDown: () => choose(state.row + 1, state.head),
    j: () => chooseQuery(state.query + 1),
    k: () => chooseQuery(state.query - 1),
    0: () => setScale(0),
    1: () => setScale(1),
    "[": () => setScale(state.value - 0.1),
    "]": () => setScale(state.value + 0.1),
    u: () => state.run.undo && actions.undo(),
    r: () => state.run.redo && actions.redo(),
    d: () => setProps("which", { value: state.which === "after" ? "before" : "after" }),
    "?": actions.help,
  };

  function listen() {
    document.addEventListener("click", (event) => {
      const source = event.target.closest("[data-action]");
      if (source && !source.disabled) actions[source.dataset.action](source);
      const button = event.target.closest("[data-token]");
      if (button) chooseQuery(Number(button.dataset.token));
      const grid = event.target.closest("#grid");
      if (grid) {
        const box = grid.getBoundingClientRect();
        const row = Math.floor(((event.clientY - box.top) / box.height) * state.run.rows.length);
        choose(row, Math.floor(((event.clientX - box.left) / box.width) * widest()));
      }
      if (event.target.closest("#pattern-box") && state.hover) chooseQuery(state.hover[0]);
    });
    document.addEventListener("keydown", (event) => {
      if (event.target.id === "text" && event.key === "Enter" && (event.ctrlKey || event.metaKey)) return actions.text();
      if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest(BUSY_KEYS)) return;
      if (event.target.closest("#strip") && (event.key === "ArrowLeft" || event.key === "ArrowRight")) {
        event.preventDefault();
        return chooseQuery(state.query + (event.key === "ArrowLeft" ? -1 : 1), true);
      }
      if (Object.hasOwn(keys, event.key)) {
        event.preventDefault();
        keys[event.key]();
      }
    });
    byId("pattern-box").addEventListener("mousemove", hover);
    byId("pattern-box").addEventListener("mouseleave", leave);
    new ResizeObserver(drawPattern).observe(byId("pattern-box"));
    new MutationObserver(drawPattern).observe(document.documentElement, { attributeFilter: ["data-mantine-color-scheme"] });
    new MutationObserver(() => {
      drawPattern(); // its labels are the tokens
      paintQuery();
    }).observe(byId("strip"), { childList: true });
  }

  window.dash_clientside = Object.assign({}, window.dash_clientside, {
    headscope: {
      show,
      slide(value) {
        moved("scale-slider", value);
        return noUpdate();
      },
      type(value) {
        moved("scale-number", value);
        return noUpdate();
      },
      choose_run(which) {
        if (state.run && which !== state.which) {
          state.which = which;
          paintGrid();
          paintHead();
        }
        return noUpdate();
      },
      choose_scale(scale) {
        if (state.run && scale !== state.scale) {
          state.scale = scale;
          paintHead();
        }
        return noUpdate();
      },
    },
  });
})();
