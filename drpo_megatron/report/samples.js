// The browser of samples.
const PER_PAGE = 20;
const filters = byId("filters");
const SAMPLES = RUNS.flatMap((run, index) => run.samples.items.map(item => ({ ...item, run: index })));

// What tokens can be coloured by: [key, name, the value without a colour].
const COLOURS = [
  ["ratio", "log-ratio log π − log μ", 0],
  ["weight", "weight of the loss", 1],
  ["logmu", "log μ of the rollout", 0],
].filter(([key]) => SAMPLES.some(sample => sample[key]));

// The distance from `neutral` that has the full colour: 99 % of tokens are within it.
function scaleOf(key, neutral) {
  const distances = SAMPLES.flatMap(s => (s[key] || []).filter((_, i) => s.mask[i]).map(v => Math.abs(v - neutral))).sort((a, b) => a - b);
  return distances.length ? distances[Math.floor(0.99 * (distances.length - 1))] : 0;
}
const SCALES = Object.fromEntries(COLOURS.map(([key, , neutral]) => [key, scaleOf(key, neutral)]));

function shade(key, value, neutral) {
  const share = SCALES[key] ? Math.min(1, Math.abs(value - neutral) / SCALES[key]) : 0;
  return `rgba(var(--${value >= neutral ? "high" : "low"}), ${(0.6 * share).toFixed(3)})`;
}

let page = 0;

function chosen() {
  const value = name => filters.elements[name].value;
  const bound = (name, otherwise) => (value(name) === "" ? otherwise : Number(value(name)));
  const text = value("text").toLowerCase();
  const found = SAMPLES.filter(s =>
    !hidden.has(s.run) && (value("run") === "" || s.run === Number(value("run"))) &&
    s.step >= bound("step_min", -Infinity) && s.step <= bound("step_max", Infinity) &&
    s.reward >= bound("reward_min", -Infinity) && s.reward <= bound("reward_max", Infinity) &&
    (!text || s.text.toLowerCase().includes(text) || s.prompt.toLowerCase().includes(text)));
  const order = { step: (a, b) => a.step - b.step || a.run - b.run, worst: (a, b) => a.reward - b.reward, best: (a, b) => b.reward - a.reward };
  return found.sort(order[value("order")]);
}

function tokensOf(sample, key, neutral) {
  const holder = make("div", { class: "text response" });
  sample.tokens.forEach((piece, i) => {
    const values = COLOURS.filter(([k]) => sample[k]).map(([k, name]) => `${name} ${number(sample[k][i])}`);
    const token = make("span", { title: `token ${i}: ${sample.mask[i] ? values.join(", ") : "put in, not sampled"}` }, piece);
    if (!sample.mask[i]) token.className = "inserted";
    else if (sample[key]) token.style.background = shade(key, sample[key][i], neutral);
    holder.append(token);
  });
  if (sample.length > sample.tokens.length) holder.append(make("small", {}, ` … ${sample.length - sample.tokens.length} more tokens`));
  return holder;
}

function tableOf(sample) {
  const keys = COLOURS.filter(([k]) => sample[k]);
  const head = make("tr", {}, ...["", "token", ...keys.map(([, name]) => name)].map(t => make("th", { scope: "col" }, t)));
  const rows = sample.tokens.map((piece, i) => make("tr", {}, make("td", { class: "number" }, String(i)), make("td", {}, JSON.stringify(piece)),
    ...keys.map(([k]) => make("td", { class: "number" }, sample.mask[i] ? number(sample[k][i]) : "put in"))));
  return make("div", { class: "scroll", tabindex: "0" }, make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)));
}

function article(sample, key, neutral) {
  const facts = [`advantage ${number(sample.advantage)}`, `${sample.length} tokens`, sample.finish];
  if (sample.answer !== null) facts.push(`answer ${sample.answer}`);
  if (sample.error) facts.push(`verifier: ${sample.error}`);
  const head = make("h3", {}, swatch(colour(sample.run), dash(sample.run)), `reward ${number(sample.reward)} · step ${sample.step} · ${RUNS[sample.run].name}`,
    make("small", { class: "note" }, facts.join(" · ")));
  const tokens = make("details", {}, make("summary", {}, "tokens one by one, and the text as it is"));
  tokens.ontoggle = () => { if (tokens.children.length === 1) tokens.append(make("div", { class: "text", tabindex: "0" }, sample.text), tableOf(sample)); };
  return make("article", {}, head, make("div", { class: "text prompt" }, sample.prompt), tokensOf(sample, key, neutral), tokens);
}

function showSamples() {
  const found = chosen(), pages = Math.max(1, Math.ceil(found.length / PER_PAGE));
  page = Math.max(0, Math.min(page, pages - 1));
  const key = filters.elements.colour.value, neutral = (COLOURS.find(([k]) => k === key) || [])[2];
  const part = found.slice(page * PER_PAGE, (page + 1) * PER_PAGE);
  byId("sample-list").replaceChildren(...part.map(sample => article(sample, key, neutral)));
  byId("sample-count").textContent = found.length
    ? `${found.length} of ${SAMPLES.length} samples, ${page * PER_PAGE + 1} to ${page * PER_PAGE + part.length}` : "no sample is so";
  byId("previous").disabled = page === 0;
  byId("next").disabled = page === pages - 1;
  if (key) showScale(key, neutral);
}

function showScale(key, neutral) {
  const scale = SCALES[key], bar = make("span", { class: "bar", "aria-hidden": "true" });
  const both = key !== "logmu";
  bar.style.background = `linear-gradient(to right, rgba(var(--low), .6), transparent${both ? " 50%, rgba(var(--high), .6)" : ""})`;
  const ends = both ? [number(neutral - scale), bar, number(neutral + scale)] : [number(-scale), bar, "0"];
  const parts = [...ends, "99 % of the tokens of this page are within"].map(part => (typeof part === "string" ? make("span", {}, part) : part));
  byId("scale").replaceChildren(...parts);
}

function noteOn(run) {
  const s = run.samples;
  if (!s.items.length) return `${run.name}: no rollouts were dumped.`;
  const tokens = s.without_tokenizer ? " Tokens by number: no tokenizer.json was found." : "";
  return `${run.name}: ${s.items.length} of the ${s.of_steps} samples in ${s.steps} of its ${s.total_steps} steps, the lowest and the highest reward of a step among them.${tokens}`;
}

function startSamples() {
  const without = SAMPLES.length && !COLOURS.some(([key]) => key === "ratio") ? " These rollouts hold no log-probs of the trainer: tokens are coloured by those of the rollout." : "";
  byId("sample-note").textContent = `${RUNS.map(noteOn).join(" ")} At most ${DATA.max_tokens} tokens of a response are shown one by one.${without}`;
  if (!SAMPLES.length) { filters.hidden = byId("pages").hidden = true; return; }
  filters.elements.run.append(make("option", { value: "" }, "all"), ...RUNS.map((run, i) => make("option", { value: i }, run.name)));
  filters.elements.colour.append(...COLOURS.map(([key, name]) => make("option", { value: key }, name)));
  filters.oninput = () => { page = 0; showSamples(); };
  filters.onsubmit = event => event.preventDefault();
  const turn = by => () => { page += by; showSamples(); byId("sample-count").scrollIntoView({ block: "center" }); };
  byId("previous").onclick = turn(-1);
  byId("next").onclick = turn(1);
  redraws.push(showSamples);
  showSamples();
}

startSamples();
