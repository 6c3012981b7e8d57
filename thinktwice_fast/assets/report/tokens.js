const MOST_SURPRISE = 3; // nats: an unlikely token in full colour
const LEAST_CHANGE = 0.01; // nats: what a full colour stands for at least
const FULL_SHARE = 0.9; // of tokens that a full colour is beyond: one that changed a lot leaves the others theirs

/** How a token is coloured, by mode: [class, share of the full colour from 0 to 1]. */
const TONES = {
  likelihood: (response, at) => ["unlikely", drew(response, at) * Math.min(1, -response.logps[at] / 1000 / MOST_SURPRISE)],
  advantage: (response, at, most) => signed(response.advantage ?? 0, most.advantage),
  ratio: (response, at, most) => signed((drew(response, at) * response.changes[at]) / 1000, most.change),
};

/** 1 where the policy drew a token, 0 where a teacher wrote it: that has no probability from when it was drawn. */
function drew(response, at) {
  return response.guide?.[at] ? 0 : 1;
}

function signed(value, most) {
  return [value < 0 ? "down" : "up", Math.min(1, Math.abs(value) / most)];
}

/** What a full colour stands for, of the responses shown together. */
function extremes(responses) {
  const known = responses.filter((one) => one.logps);
  const sizes = known.flatMap((one) => one.changes.map((change, at) => (drew(one, at) * Math.abs(change)) / 1000)).sort((a, b) => a - b);
  return {
    change: Math.max(LEAST_CHANGE, sizes[Math.floor(FULL_SHARE * sizes.length)] ?? 0),
    advantage: Math.max(1e-9, ...known.map((one) => Math.abs(one.advantage ?? 0))),
  };
}

/** A response as coloured tokens; `tell` takes a text about the token that is pointed at. */
function tokensOf(response, pieces, mode, most, tell) {
  if (!response.logps) return [element("p", { class: "meta" }, "Its tokens are not in the transcripts."), textOf(response, pieces)];
  const spans = response.pieces.map((piece, at) => {
    const [tone, share] = TONES[mode](response, at, most);
    const guided = response.guide?.[at] ? " guided" : "";
    return element("span", { class: `token ${tone}${guided}`, style: `--share:${Math.round(60 * share)}%`, "data-at": at }, visible(pieces[piece]));
  });
  const point = (event) => {
    const at = event.target.dataset?.at;
    if (at === undefined) return;
    for (const other of event.currentTarget.querySelectorAll(".chosen")) other.classList.remove("chosen");
    event.target.classList.add("chosen");
    tell(about(response, pieces, Number(at)));
  };
  return [element("div", { on: { pointerover: point, click: point } }, ...spans)];
}

function visible(text) {
  return text === "" ? "▫" : text.replaceAll("\n", "↵\n");
}

function about(response, pieces, at) {
  const [old, change] = [response.logps[at] / 1000, response.changes[at] / 1000];
  const advantage = response.advantage === null ? "none" : round(response.advantage);
  const drawn = drew(response, at)
    ? `probability ${round(Math.exp(old))} (${old.toFixed(3)} nats), ratio ${Math.exp(change).toFixed(3)}`
    : "written by a teacher";
  const updated = `probability after the update ${round(Math.exp(old + change))}`;
  return `token ${at + 1} ${JSON.stringify(pieces[response.pieces[at]])}: ${drawn}, ${updated}, advantage ${advantage}`;
}

function scaleOf(mode, most) {
  const swatch = (tone, text) => element("span", { class: tone }, element("i"), text);
  if (mode === "likelihood") return [swatch("unlikely", `the less likely, the stronger; full at ${round(Math.exp(-MOST_SURPRISE))}`)];
  if (mode === "advantage") return [swatch("down", `advantage ${round(-most.advantage)}`), swatch("up", round(most.advantage))];
  const [low, high] = [-most.change, most.change].map((change) => Math.exp(change).toFixed(3));
  return [swatch("down", `new over old probability ${low} or less`), swatch("up", `${high} or more`)];
}

/** The whole text of a response, made once. */
function textOf(response, pieces) {
  response.text ??= response.pieces.map((piece) => pieces[piece]).join("");
  return response.text;
}
