"use strict";
// Shows what /state says. Names come from training jobs: all of them are put in as text, never as HTML.
const POLL_MS = 2000, PATIENCE_MS = 8000, QUIET_S = 120, TOKEN_KEY = "sidecast-token";
const SVG = "http://www.w3.org/2000/svg";
const byId = (id) => document.getElementById(id);
const plain = new Intl.NumberFormat("en"), short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
const rows = new Map();
let state = null, answeredMs = 0, timer = 0;

// --- words

function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let amount = Number(value), unit = 0;
  while (amount >= 1024 && unit < units.length - 1) { amount /= 1024; unit += 1; }
  return `${amount >= 100 || unit === 0 ? amount.toFixed(0) : amount.toFixed(1)} ${units[unit]}`;
}
function seconds(value) {
  if (value < 1) return `${(value * 1000).toFixed(0)} ms`;
  if (value < 10) return `${value.toFixed(1)} s`;
  if (value < 120) return `${value.toFixed(0)} s`;
  if (value < 7200) return `${(value / 60).toFixed(0)} min`;
  return value < 172800 ? `${(value / 3600).toFixed(0)} h` : `${(value / 86400).toFixed(0)} days`;
}
const ago = (value) => (value < 1 ? "just now" : `${seconds(Math.floor(value))} ago`);
const steps = (value) => plain.format(Number(value));
const many = (number, one) => `${plain.format(number)} ${one}${number === 1 ? "" : "s"}`;
const percent = (value) => `${(100 * value).toPrecision(2)} %`;

function put(node, text, tone) {
  if (node.textContent !== text) node.textContent = text;
  if (tone !== undefined && node.dataset.tone !== tone) node.dataset.tone = tone;
}
function make(tag, text, kind) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (kind) node.className = kind;
  return node;
}
function draw(tag, attributes, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

// --- what a run is at

function condition(run) {
  const last = run.recent_nowcasts.at(-1);
  if (run.is_paused) return ["calm", "paused", 1];
  if (run.num_joined < run.world_size) return ["warn", "joining", 1];
  if (run.idle_seconds > QUIET_S) return ["wait", `quiet ${seconds(run.idle_seconds)}`, 2];
  if (last?.failure) return ["warn", "no nowcast", 1];
  if (last?.outcome === "rolled_back") return ["warn", "undone", 0];
  return ["good", "running", 3];
}
function verdicts(run) {
  const parts = [[run.num_accepted, "accepted"], [run.num_rolled_back, "undone"], [run.num_rejected, "rejected"]];
  return parts.filter(([number]) => Number(number)).map(([number, word]) => `${steps(number)} ${word}`).join(", ") || "–";
}
function newest(run) {
  if (run.snapshot_step === undefined) return "none yet";
  const age = run.snapshot_age_seconds;
  return `step ${steps(run.snapshot_step)}` + (age === undefined ? "" : `, ${ago(age)}`);
}
const OUTCOMES = {
  "": ["calm", "published"], applied: ["calm", "applied"], accepted: ["good", "accepted"],
  rolled_back: ["bad", "undone"], rejected: ["wait", "rejected"],
};
const POLICIES = { jump: "jumps", push: "pushes", read_outs: "read-outs alone" };

function facts(run) {
  const queue = state.queues.filter((item) => item.run_id === run.run_id).map((item) => item.work);
  return [
    ["Model", `${short.format(Number(run.num_parameters))} parameters`],
    ["Policy", run.policy === "read_outs" ? POLICIES.read_outs : `${POLICIES[run.policy] ?? run.policy} of ${run.predictor || "its own motion"}`],
    ["Snapshots", `${steps(run.num_committed)} committed, ${steps(run.num_aborted)} aborted, every ${many(Number(run.snapshot_interval_steps), "step")}`],
    ["History", `${run.history_steps.length} of ${run.context_len} states, epoch ${run.epoch}` + (run.history_steps.length ? `: ${run.history_steps.map(steps).join(", ")}` : "")],
    ["Room", `up to ${bytes(run.promised_bytes)}; one run may have ${bytes(state.run_budget_bytes)}`],
    ["Nowcasts", `${steps(run.num_published)} published, ${steps(run.num_failed)} not made` + (queue.length ? `; an engine is at its ${queue.join(", ")}` : "")],
    ["Last heard of", ago(run.idle_seconds)],
    ...(run.session_id ? [["Session", run.session_id]] : []),
  ];
}
function factList(run) {
  return facts(run).map(([name, value]) => {
    const pair = make("div");
    pair.append(make("dt", name), make("dd", value));
    return pair;
  });
}
function nowcastTable(run) {
  if (!run.recent_nowcasts.length) return [];
  const table = make("table"), head = make("tr"), body = make("tbody");
  for (const name of ["From step", "Verdict", "When", "Reach", "Size", "Made in"]) head.append(make("th", name));
  for (const item of run.recent_nowcasts.toReversed()) {
    const row = make("tr");
    const [tone, word] = item.failure ? ["warn", "not made"] : OUTCOMES[item.outcome] ?? ["wait", item.outcome];
    const verdict = make("td", word);
    verdict.dataset.tone = tone;
    row.append(make("td", steps(item.base_step)), verdict, make("td", ago(item.age_seconds)));
    if (item.failure) {
      const why = make("td", item.failure, "why");
      why.colSpan = 3;
      row.append(why);
    } else {
      const reach = item.horizon_intervals ? many(item.horizon_intervals * Number(run.snapshot_interval_steps), "step") : "–";
      row.append(make("td", reach), make("td", percent(item.relative_norm)), make("td", seconds(item.nowcast_seconds)));
    }
    body.append(row);
  }
  table.append(make("thead"), body);
  table.tHead.append(head);
  const scroll = make("div", undefined, "scroll");
  scroll.append(table);
  return [make("h3", "Newest nowcasts"), scroll];
}

// --- read-outs: probe.points is a list of {step, losses}, oldest first, with a loss by read-out and of the run's own
// weights, as "raw"; absent where nobody measures

function probeLosses(run, name) {
  const points = (run.probe?.points ?? []).map((point) => ({ step: point.step, loss: point.losses?.[name] }));
  return points.filter((point) => Number.isFinite(point.loss));
}
function chart(losses, raw) {
  const [width, height, left, foot] = [280, 84, 38, 14];
  const all = [...losses, ...raw], xs = all.map((item) => Number(item.step)), ys = all.map((item) => item.loss);
  const [x0, x1, y0, y1] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const x = (step) => left + ((step - x0) / (x1 - x0 || 1)) * (width - left - 6);
  const y = (loss) => 6 + (1 - (loss - y0) / (y1 - y0 || 1)) * (height - foot - 12);
  const image = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  image.append(draw("title", {}, `Probe loss from ${y1.toPrecision(4)} to ${y0.toPrecision(4)}, steps ${x0} to ${x1}`));
  for (const loss of new Set([y0, y1])) {
    image.append(draw("line", { x1: left, x2: width, y1: y(loss), y2: y(loss) }));
    image.append(draw("text", { x: left - 5, y: y(loss) + 3, "text-anchor": "end" }, loss.toPrecision(3)));
  }
  for (const [line, kind] of [[raw, "raw"], [losses, "own"]]) {
    const points = line.map((item) => `${x(Number(item.step)).toFixed(1)},${y(item.loss).toFixed(1)}`);
    image.append(draw("polyline", { class: kind, points: points.join(" ") }));
  }
  const last = losses.at(-1);
  image.append(draw("circle", { cx: x(Number(last.step)), cy: y(last.loss), r: 3 }));
  image.append(draw("text", { x: left, y: height - 1 }, steps(x0)));
  if (x1 > x0) image.append(draw("text", { x: width, y: height - 1, "text-anchor": "end" }, steps(x1)));
  return image;
}
function readOut(run, item) {
  const figure = make("figure"), caption = make("figcaption");
  const since = Number(item.num_snapshots)
    ? `step ${steps(item.step)}; ${many(Number(item.num_snapshots), "state")} since step ${steps(item.begin_step)}`
    : "no state yet";
  caption.append(make("b", item.name), make("span", since, "muted"));
  figure.append(caption);
  const losses = probeLosses(run, item.name), raw = probeLosses(run, "raw");
  if (losses.length) {
    const own = raw.length ? `, ${raw.at(-1).loss.toPrecision(4)} of the run's own weights (grey)` : "";
    const best = run.probe.best === item.name ? "; the lowest" : "";
    caption.append(make("span", `probe loss ${losses.at(-1).loss.toPrecision(4)}${own}${best}`));
    figure.append(chart(losses, raw));
  }
  return figure;
}
function readOuts(run) {
  if (!run.read_outs.length) return [];
  const charts = make("div", undefined, "charts");
  charts.append(...run.read_outs.map((item) => readOut(run, item)));
  return [make("h3", "Read-outs"), ...(run.probe?.fault ? [make("p", `The probe: ${run.probe.fault}`, "muted")] : []), charts];
}

// --- the page

class Row {
  constructor() {
    this.node = byId("run").content.firstElementChild.cloneNode(true);
    this.details = this.node.querySelector("details");
    this.shown = {};
    this.button = this.node.querySelector(".control button");
    this.button.addEventListener("click", () => this.pause(!this.run.is_paused));
    this.details.addEventListener("toggle", () => {
      // So that one can send somebody the address of a run; what follows # no service is told.
      if (this.details.open) history.replaceState(null, "", this.address);
      this.fill();
    });
  }
  get address() { return `#${encodeURIComponent(this.run.run_id)}`; }
  part(kind) { return this.node.querySelector(`.${kind}`); }
  async pause(isPaused) {
    this.button.disabled = true;
    const headers = { "Content-Type": "application/json", "X-Sidecast-Page": "1", ...(token && { Authorization: `Bearer ${token}` }) };
    const body = JSON.stringify({ run_id: this.run.run_id, is_paused: isPaused });
    try {
      const answer = await fetch("pause", { method: "POST", headers, body, signal: AbortSignal.timeout(PATIENCE_MS) });
      this.fault = answer.ok ? "" : (await answer.json()).error;
    } catch { this.fault = "no answer; it may have been heard all the same"; }
    this.button.disabled = false;
    ask();
  }
  show(run) {
    this.run = run;
    this.part("control").hidden = !run.may_pause && !run.is_paused;
    this.button.hidden = !run.may_pause;
    put(this.button, run.is_paused ? "Resume" : "Pause");
    put(this.part("control > .muted"), this.fault || (run.is_paused
      ? "No jump or push is applied until it is resumed; training and snapshots go on."
      : "From its next vote on the run would apply no jump or push; training and snapshots would go on."));
    const [tone, word] = condition(run);
    put(this.part("state"), word, tone);
    put(this.part("id"), run.run_id);
    put(this.part("tenant"), run.tenant);
    this.part("tenant").hidden = !run.tenant;
    put(this.part("ranks"), `${run.num_joined} of ${run.world_size}`);
    put(this.part("snapshot"), newest(run));
    put(this.part("published"), steps(run.num_published));
    put(this.part("applied"), steps(run.num_applied));
    put(this.part("verdicts"), verdicts(run));
    this.fill();
  }
  // What is folded away is not kept up to date, and what has not changed stays: a selection in it, too.
  fill() {
    if (!this.details.open) return;
    for (const [kind, build] of [["facts", factList], ["nowcasts", nowcastTable], ["read-outs", readOuts]]) {
      const made = build(this.run), text = made.map((node) => node.outerHTML).join("");
      if (this.shown[kind] !== text) this.part(kind).replaceChildren(...made);
      this.shown[kind] = text;
    }
  }
}
function ordered(runs) {
  const byName = (a, b) => a.run_id.localeCompare(b.run_id, "en", { numeric: true });
  const age = (run) => run.snapshot_age_seconds ?? Infinity;
  const orders = {
    name: byName,
    fresh: (a, b) => (age(a) === age(b) ? 0 : age(a) - age(b)) || byName(a, b),
    attention: (a, b) => condition(a)[2] - condition(b)[2] || byName(a, b),
  };
  return runs.toSorted(orders[byId("order").value]);
}
function showRuns() {
  const wanted = byId("filter").value.trim().toLowerCase();
  const runs = ordered(state.sessions.filter((run) => `${run.run_id} ${run.tenant}`.toLowerCase().includes(wanted)));
  const list = byId("runs"), kept = new Set(runs.map((run) => run.run_id));
  for (const [id, row] of rows) if (!kept.has(id)) { row.node.remove(); rows.delete(id); }
  runs.forEach((run, place) => {
    const isNew = !rows.has(run.run_id);
    if (isNew) rows.set(run.run_id, new Row());
    const row = rows.get(run.run_id);
    row.show(run);
    if (isNew && location.hash === row.address) row.details.open = true;
    if (list.children[place] !== row.node) list.insertBefore(row.node, list.children[place] ?? null);
  });
  byId("empty").hidden = runs.length > 0;
  put(byId("empty"), state.sessions.length ? "No run has this in its name." : "No run is open. A training job appears here once its hook is attached.");
  document.querySelector(".columns").hidden = runs.length === 0;
}
function showService() {
  const engines = state.engines, busy = state.queues.filter((item) => item.is_busy);
  const waiting = state.queues.reduce((sum, item) => sum + item.num_waiting, 0);
  const joined = state.sessions.reduce((sum, run) => sum + run.num_joined, 0), ranks = state.sessions.reduce((sum, run) => sum + run.world_size, 0);
  put(byId("version"), `${state.service_version}, up ${seconds(state.uptime_seconds)}`);
  put(byId("runs-now"), plain.format(state.sessions.length));
  put(byId("ranks-now"), `${plain.format(joined)} of ${many(ranks, "rank")} joined`);
  put(byId("engines-now"), state.engines_fault ? "away" : "ready", state.engines_fault ? "bad" : "good");
  put(byId("engines-are"), `${many(engines.num_engines, "engine")}, ${engines.device || "cpu"}, ` + (engines.gpus ? `${engines.gpus} GPU each` : `${many(engines.threads, "thread")} each`));
  put(byId("queue-now"), waiting ? `${plain.format(waiting)} waiting` : busy.length ? "at work" : "empty");
  put(byId("queue-of"), busy.map((item) => item.work + (item.run_id ? ` of ${item.run_id}` : "")).join(", ") || "engines have nothing to do");
  const used = Number(state.history_bytes), budget = Number(state.history_budget_bytes);
  put(byId("history-now"), bytes(used));
  byId("history-bar").value = used / budget;
  put(byId("history-of"), `of ${bytes(budget)}; ${bytes(state.run_budget_bytes)} for one run`);
  byId("fault").hidden = !state.engines_fault;
  put(byId("fault"), `No nowcast can be made: ${state.engines_fault}. Training goes on without.`);
}
function pulse() {
  const late = Date.now() - answeredMs;
  const isStale = late > 3 * POLL_MS;
  document.body.classList.toggle("stale", state !== null && isStale);
  if (state !== null) put(byId("pulse"), isStale ? `no answer for ${seconds(late / 1000)}` : "live", isStale ? "bad" : "good");
}
function show() { if (state !== null) { showService(); showRuns(); } }

// --- asking

const needsToken = document.documentElement.dataset.access === "needs-token";
let token = needsToken ? sessionStorage.getItem(TOKEN_KEY) : null;

function signIn(refused) {
  state = null;
  token = null;
  sessionStorage.removeItem(TOKEN_KEY);
  byId("live").hidden = byId("sign-out").hidden = true;
  byId("sign-in").hidden = false;
  byId("refused").hidden = !refused;
  put(byId("refused"), refused);
  put(byId("version"), "");
  put(byId("pulse"), "signed out", "wait");
  byId("token").focus();
}
async function ask() {
  clearTimeout(timer);
  if (needsToken && !token) return;
  const asked = token;
  try {
    const headers = asked ? { Authorization: `Bearer ${asked}` } : {};
    const answer = await fetch("state", { headers, cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
    if (asked !== token) return;
    if (answer.status === 401) return signIn("The service does not know this token.");
    if (answer.ok) {
      state = await answer.json();
      answeredMs = Date.now();
      byId("live").hidden = false;
      byId("sign-in").hidden = true;
      byId("sign-out").hidden = !needsToken;
      show();
    }
  } catch { /* The pulse says so, and the next time may be better. */ }
  if (state === null) put(byId("pulse"), "no answer", "bad");
  pulse();
  // A page that nobody sees asks again once it is looked at.
  clearTimeout(timer);
  if (!document.hidden) timer = setTimeout(ask, POLL_MS);
}
byId("sign-in").addEventListener("submit", (event) => {
  event.preventDefault();
  const given = byId("token").value.trim();
  byId("token").value = "";
  if (!/^[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?$/.test(given)) return signIn("A token has printable ASCII characters alone.");
  token = given;
  sessionStorage.setItem(TOKEN_KEY, given);
  ask();
});
byId("sign-out").addEventListener("click", () => signIn(""));
byId("filter").addEventListener("input", show);
byId("order").addEventListener("change", show);
document.addEventListener("visibilitychange", () => { if (!document.hidden) ask(); });
setInterval(pulse, 1000);
if (needsToken && !token) signIn(""); else ask();
