const CHANGES = {
  fixed: "✗→✓", spoiled: "✓→✗", "kept right": "✓→✓", "kept wrong": "✗→✗", right: "✓", wrong: "✗",
};
const FILTERS = [
  ["all", "All", "a"], ["fixed", "Fixed", "f"], ["spoiled", "Spoiled", "s"], ["kept-right", "Kept right", "r"],
  ["kept-wrong", "Kept wrong", "w"], ["truncated", "Cut off", "t"], ["solutions", "Solutions", "o"],
];
const MODES = [["diff", "Changes"], ["likelihood", "Log-probability"], ["advantage", "Advantage"], ["ratio", "New / old"]];
const CHUNK = 100; // rows of the list that are made at a time

class Browser {
  /** Of the transcripts in `data` (see run/page/pairs.py), inside `root`. */
  constructor(data, root) {
    this.data = data;
    this.state = { show: data.items.some((item) => item.base !== undefined) ? "all" : "solutions", step: "", run: "", query: "", mode: "diff" };
    this.matches = [];
    this.at = -1;
    this.made = 0;
    this.build(root);
    this.filter();
    document.addEventListener("keydown", (event) => this.key(event));
  }

  build(root) {
    const { items, runs, total } = this.data;
    const set = (name) => (event) => this.set({ [name]: event.target.value });
    this.buttons = new Map(FILTERS.map(([name, label, key]) => [
      name,
      element("button", { type: "button", title: `key ${key}`, on: { click: () => this.set({ show: name }) } },
        `${label} ${items.filter((item) => this.shows(item, name)).length}`),
    ]));
    const steps = [...new Set(items.map((item) => item.step))].sort((a, b) => a - b);
    const choice = (name, all, values) => element("select", { "aria-label": name, on: { change: set(name) } },
      element("option", { value: "" }, all), ...values.map(([value, text]) => element("option", { value }, text)));
    this.search = element("input", {
      type: "search", placeholder: "Search (/)", "aria-label": "Search", on: { input: set("query") },
    });
    this.status = element("p", { class: "hint", role: "status" });
    this.list = element("div", {
      class: "list", role: "listbox", tabindex: "0", "aria-label": "Pairs", on: { scroll: () => this.grow() },
    });
    this.detail = element("div", { class: "detail" });
    root.append(
      element("div", { class: "filters" }, ...this.buttons.values(),
        choice("step", "Every step", steps.map((step) => [step, `Step ${step}`])),
        runs.length > 1 ? choice("run", "Every run", runs.map((name, n) => [n, name])) : null,
        this.search),
      this.status,
      element("div", { class: "panes" }, this.list, this.detail),
      element("p", { class: "hint keys" }, ...keyHelp()),
    );
    if (items.length < total) this.status.title = `${items.length} of the ${total} responses in transcripts.jsonl`;
  }

  /** Change the filters; the first of what is left is shown. */
  set(change) {
    Object.assign(this.state, change);
    if (change.mode) this.show();
    else this.filter();
  }

  shows(item, name) {
    const refines = item.base !== undefined;
    if (name === "solutions") return !refines;
    if (!refines) return false;
    if (name === "all") return true;
    if (name === "truncated") return !this.data.responses[item.response].finished;
    return slug(item.verdict) === name;
  }

  filter() {
    const { show, step, run, query } = this.state;
    const wanted = query.toLowerCase();
    this.matches = this.data.items.filter((item) =>
      this.shows(item, show) && (step === "" || item.step === Number(step)) && (run === "" || item.run === Number(run)) &&
      (wanted === "" || this.words(item).includes(wanted)));
    for (const [name, button] of this.buttons) button.setAttribute("aria-pressed", String(name === show));
    const { items, total } = this.data;
    const left = items.length < total ? ` (this page has ${items.length} of ${total} responses)` : "";
    this.status.textContent = `${this.matches.length} found${left}`;
    this.list.replaceChildren();
    this.made = 0;
    this.grow();
    this.go(0);
  }

  words(item) {
    const { responses, questions, pieces } = this.data;
    const texts = [item.response, item.base].filter((one) => one !== undefined).map((one) => textOf(responses[one], pieces));
    item.words ??= [...questions[item.question], ...texts].join("\n").toLowerCase();
    return item.words;
  }

  /** Make more rows where the list is near its end. */
  grow(least = 0) {
    const near = () => this.list.scrollTop + 2 * this.list.clientHeight > this.list.scrollHeight;
    while (this.made < this.matches.length && (this.made < least || near() || this.made === 0)) {
      const next = this.matches.slice(this.made, this.made + CHUNK).map((item, n) => this.row(item, this.made + n));
      this.list.append(...next);
      this.made += next.length;
    }
  }

  row(item, at) {
    const [problem, question] = this.data.questions[item.question];
    return element("div", { role: "option", id: `pair-${at}`, "aria-selected": "false", on: { click: () => this.go(at) } },
      element("span", {}, element("span", { class: `mark ${slug(item.verdict)}` }, CHANGES[item.verdict] ?? "–"), ` ${question}`),
      element("small", {}, `step ${item.step} · problem ${problem} · sample ${item.sample + 1} · ${item.verdict ?? "no reward"}`));
  }

  /** Show the match number `at`. */
  go(at) {
    this.list.querySelector('[aria-selected="true"]')?.setAttribute("aria-selected", "false");
    this.at = Math.max(0, Math.min(this.matches.length - 1, at));
    this.grow(this.at + 1);
    const row = this.list.children[this.at];
    this.list.setAttribute("aria-activedescendant", row ? row.id : "");
    if (row) {
      row.setAttribute("aria-selected", "true");
      const [top, height] = [row.offsetTop - this.list.offsetTop, this.list.clientHeight];
      if (top < this.list.scrollTop || top + row.offsetHeight > this.list.scrollTop + height) this.list.scrollTop = top - height / 3;
    }
    this.show();
  }

  show() {
    const item = this.matches[this.at];
    this.detail.replaceChildren(...(item ? this.parts(item) : [element("p", { class: "hint" }, "Nothing is like that.")]));
  }

  parts(item) {
    const { data, state } = this;
    const response = data.responses[item.response];
    const base = item.base === undefined ? null : data.responses[item.base];
    const [problem, question, answer] = data.questions[item.question];
    const most = extremes(base ? [base, response] : [response]);
    const info = element("output", { class: "meta" });
    const tell = (text) => { info.textContent = text; };
    const changes = base && state.mode === "diff" ? diff(textOf(base, data.pieces), textOf(response, data.pieces)) : null;
    const body = (one, leaves, mark) => {
      if (state.mode !== "diff") return tokensOf(one, data.pieces, state.mode, most, tell);
      if (!changes) return [textOf(one, data.pieces)];
      return changes.filter(([kind]) => kind !== leaves).map(([kind, text]) => (kind === "same" ? text : element(mark, {}, text)));
    };
    const side = (title, one, leaves, mark) => element("div", { class: "box" },
      element("h3", {}, title), element("p", { class: "meta" }, figuresOf(one)), element("div", { class: "text" }, ...body(one, leaves, mark)));
    const move = (by, text) => element("button", { type: "button", on: { click: () => this.go(this.at + by) } }, text);
    return [
      element("div", { class: "bar" },
        element("span", { class: `verdict ${slug(item.verdict)}` }, `${CHANGES[item.verdict] ?? "–"} ${item.verdict ?? "no reward"}`),
        element("span", { class: "meta" }, `${this.at + 1} of ${this.matches.length} · step ${item.step}` + (data.runs.length > 1 ? ` · ${data.runs[item.run]}` : "")),
        element("span", {}, move(-1, "←"), " ", move(1, "→"))),
      element("div", { class: "box" }, element("h3", {}, `Problem ${problem}`), element("div", { class: "text" }, question),
        element("p", { class: "meta" }, `gold answer: ${answer}`)),
      this.siblings(item),
      element("div", { class: "filters", role: "group", "aria-label": "Show" }, ...MODES.map(([mode, label], n) =>
        element("button", { type: "button", title: `key ${n + 1}`, "aria-pressed": String(mode === state.mode), on: { click: () => this.set({ mode }) } }, label)),
        state.mode === "diff" ? null : element("span", { class: "scale meta" }, ...scaleOf(state.mode, most))),
      element("div", { class: "side" }, base ? side("Solution", base, "new", "del") : null, side(base ? "Refinement" : "Solution", response, "gone", "ins")),
      info,
      element("details", {}, element("summary", {}, "Prompt of the " + (base ? "refinement" : "solution")), element("div", { class: "text" }, data.texts[item.prompt])),
    ];
  }

  /** The other samples of the group. */
  siblings(item) {
    const same = (other) => ["run", "step", "prompt"].every((name) => other[name] === item[name]);
    const group = this.data.items.filter(same);
    if (group.length < 2) return null;
    return element("p", { class: "samples" }, item.base === undefined ? "Solutions " : "Refinements of this solution ", ...group.map((other) =>
      element("button", { type: "button", class: slug(other.verdict), "aria-pressed": String(other === item), on: { click: () => this.open(other) } },
        `${other.sample + 1} ${(CHANGES[other.verdict] ?? "–").slice(-1)}`)));
  }

  /** Show an item, also one that the filters leave out. */
  open(item) {
    if (!this.matches.includes(item)) this.set({ show: item.base === undefined ? "solutions" : "all", query: (this.search.value = "") });
    this.go(this.matches.indexOf(item));
  }

  key(event) {
    const typing = ["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName);
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (typing) {
      if (event.key === "Escape" || event.key === "Enter") event.target.blur();
      return;
    }
    const inList = document.activeElement === this.list;
    const by = { j: 1, k: -1, ArrowRight: 1, ArrowLeft: -1, ...(inList ? { ArrowDown: 1, ArrowUp: -1 } : {}) }[event.key];
    const shown = FILTERS.find(([, , key]) => key === event.key);
    const mode = MODES[Number(event.key) - 1];
    if (by !== undefined) this.go(this.at + by);
    else if (shown) this.set({ show: shown[0] });
    else if (mode) this.set({ mode: mode[0] });
    else if (event.key === "/") this.search.focus();
    else return;
    event.preventDefault();
    const place = this.list.getBoundingClientRect();
    if (place.top < 0 || place.top > window.innerHeight) document.getElementById("pairs").scrollIntoView();
  }
}

function slug(verdict) {
  return (verdict ?? "none").replace(" ", "-");
}

function figuresOf(response) {
  const reward = response.reward === null ? "no reward" : `reward ${round(response.reward)}`;
  if (!response.logps) return reward;
  const advantage = response.advantage === null ? "" : ` · advantage ${round(response.advantage)}`;
  return `${reward}${advantage} · ${response.logps.length} tokens${response.finished ? "" : " · cut off"}`;
}

function keyHelp() {
  const keys = [["j k ← →", "next, previous"], ["/", "search"], ...FILTERS.map(([, label, key]) => [key, label.toLowerCase()]), ["1-4", "colours"]];
  return keys.flatMap(([key, what]) => [...key.split(" ").map((one) => element("kbd", {}, one)), ` ${what}  `]);
}
