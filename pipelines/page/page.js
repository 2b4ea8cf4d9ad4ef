// The page of an archive: one file, no build step. Texts from outside go in as text, never as markup.
// What the address bar holds is the state: q, by, folder, shortest, longest, like, video, t.

const $ = (id) => document.getElementById(id);
const FIRST = 24, MOST = 200, LEAD_IN = 2; // answers at first and at most; seconds before a moment
let answers = [], chosen = -1, asked = 0, opened = 0, count = FIRST;
let video = null, lines = [], head = null, wanted = null;

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function clock(seconds) {
  const s = Math.max(0, Math.floor(seconds));
  const mm = String(Math.floor((s % 3600) / 60)).padStart(2, "0"), ss = String(s % 60).padStart(2, "0");
  return `${Math.floor(s / 3600)}:${mm}:${ss}`;
}

async function get(path, parameters = {}) {
  const query = new URLSearchParams(Object.entries(parameters).filter(([, v]) => v !== "" && v !== null));
  let response;
  try {
    response = await fetch(`${path}?${query}`);
  } catch {
    throw new Error("The server does not answer. Is it still running?");
  }
  const value = response.headers.get("content-type")?.includes("json") ? await response.json() : null;
  if (!response.ok) throw new Error(typeof value?.detail === "string" ? value.detail : `The server said ${response.status}.`);
  return value;
}

// --- State in the address bar ---------------------------------------------------------------------------------------

function state() { return Object.fromEntries(new URLSearchParams(location.search)); }

function keep(changes, push = false) {
  const next = { ...state(), ...changes };
  const query = new URLSearchParams(Object.entries(next).filter(([, v]) => v !== "" && v !== null && v !== undefined));
  const address = query.size ? `?${query}` : location.pathname;
  if (push) history.pushState(null, "", address); else history.replaceState(null, "", address);
}

function filters() {
  const seconds = (id) => ($(id).value === "" ? "" : String(60 * Number($(id).value)));
  const by = $("by").value === "both" ? "" : $("by").value;
  return { by, folder: $("folder").value, shortest: seconds("shortest"), longest: seconds("longest") };
}

async function restore() {
  const now = state();
  $("query").value = now.q ?? "";
  $("by").value = now.by || "both";
  $("folder").value = now.folder ?? "";
  for (const id of ["shortest", "longest"]) $(id).value = now[id] ? String(Number(now[id]) / 60) : "";
  const searching = now.like ? findAlike(now.like) : find();
  if (now.video) open(Number(now.video), Number(now.t ?? 0), false); else closeVideo(false);
  await searching;
}

// --- Searching ------------------------------------------------------------------------------------------------------

async function find() {
  const q = $("query").value.trim();
  if (!q) { show([]); await sayWhatIsThere(); return; }
  await ask(() => get("/api/search", { q, count, ...filters() }));
}

async function findAlike(like) {
  const [number, start, end] = like.split("-").map(Number);
  if (![number, start, end].every(Number.isFinite)) { say("This link is broken."); return; }
  await ask(() => get(`/api/videos/${number}/like`, { start, end, count }));
}

async function ask(fetcher) {
  const mine = ++asked;
  say("Searching …");
  try {
    const found = await fetcher();
    if (mine !== asked) return; // a later query has been sent meanwhile
    show(found.answers);
    const like = state().like ? " that look like it" : "";
    const best = found.answers.length < count ? "" : "The best ";
    say(found.answers.length ? `${best}${found.answers.length} moments${like}` : "Nothing found. Other words, or fewer filters?");
  } catch (error) {
    if (mine !== asked) return;
    show([]);
    say(error.message);
  }
}

async function sayWhatIsThere() {
  try {
    const there = await get("/api/archive");
    const words = there.words ? 'Words in "quotes" must be said so, and oni* finds every word that begins so.'
      : "Nothing said in them is known: index them with subtitles to search words, too.";
    say(`${there.videos} videos, ${there.hours} hours. Describe what you look for.\n${words}`);
  } catch (error) { say(error.message); }
}

function say(text) { $("state").textContent = text; }

// Words of the query in a line that was said: folded, and cut where English endings begin, as the index cuts them.
const SAYING_NOTHING = /^(the|and|with|for|from|that|this|then|into|onto|over|you|your|its|are|was|were|has|have)$/;

function stem(word) {
  const plain = word.normalize("NFD").replace(/\p{M}/gu, "").toLowerCase();
  return (plain.length > 4 ? plain.replace(/(ing|ed|es|s|e)$/, "") : plain.replace(/s$/, "")).replace(/(.)\1$/, "$1");
}

function askedWords() {
  const words = $("query").value.match(/[\p{L}\p{N}]{3,}/gu) ?? [];
  return new Set(words.filter((word) => !SAYING_NOTHING.test(word.toLowerCase())).map(stem));
}

function marked(element, text, words) {
  for (const part of text.split(/([\p{L}\p{N}]+)/u)) element.append(words.has(stem(part)) ? make("mark", "", part) : part);
  return element;
}

function show(found) {
  answers = found;
  chosen = -1;
  const words = state().like ? new Set() : askedWords();
  $("answers").replaceChildren(...found.map((answer, place) => card(answer, place, words)));
  $("found").classList.toggle("empty", !found.length);
  $("more").hidden = found.length < count || count >= MOST;
}

function card(answer, place, words) {
  const button = make("button", "answer");
  button.type = "button";
  button.addEventListener("click", () => watch(place));
  const frame = make("div", "picture"), text = make("div", "text"), name = make("div", "name", answer.video_id);
  const found = make("div", "found");
  const image = make("img");
  image.loading = place < 8 ? "eager" : "lazy";
  image.alt = "";
  image.src = `/pictures/${answer.number}?t=${((answer.start + answer.end) / 2).toFixed(1)}`;
  image.addEventListener("error", () => image.remove());
  frame.append(image, make("span", "time", `${answer.time} · ${Math.round(answer.end - answer.start)} s`));
  name.title = answer.video_id;
  found.append(...Object.keys(answer.channels).map((channel) => make("span", "channel", channel)));
  found.append(make("span", "score", answer.score.toFixed(2).replace("-0.00", "0.00")));
  found.lastChild.title = "cosine of query and picture";
  text.append(name, found);
  if (answer.said) text.append(marked(make("p", "said"), `“${answer.said}”`, words));
  if (answer.state) text.append(make("p", "gone", answer.state));
  button.append(frame, text);
  const item = make("li");
  item.append(button);
  return item;
}

function choose(place) {
  const buttons = [...document.querySelectorAll(".answer")];
  if (!buttons.length) return;
  chosen = Math.max(0, Math.min(place, buttons.length - 1));
  buttons.forEach((button, i) => button.setAttribute("aria-current", String(i === chosen)));
  buttons[chosen].focus({ preventScroll: true });
  buttons[chosen].scrollIntoView({ block: "nearest" });
}

// --- Watching -------------------------------------------------------------------------------------------------------

function watch(place) {
  choose(place);
  const answer = answers[place];
  const from = Math.max(0, answer.start - LEAD_IN);
  wanted = { start: answer.start, end: answer.end };
  keep({ video: answer.number, t: from.toFixed(1) }, true);
  open(answer.number, from, true);
}

async function open(number, time, play) {
  const mine = ++opened, player = $("video"), q = $("query").value.trim();
  const same = video?.number === number;
  document.querySelector("main").classList.add("watching");
  $("watch").hidden = false;
  if (matchMedia("(max-width: 52rem)").matches && play) $("watch").scrollIntoView();
  if (same && !$("video").hidden) { seek(time, play); drawCurve(number, q, mine); return; }
  video = { number, duration: 0 };
  lines = [];
  for (const id of ["curve", "axis", "moments", "lines"]) $(id).replaceChildren();
  $("name").textContent = "";
  $("problem").hidden = true;
  $("watch").classList.remove("unknown");
  try {
    const about = await get(`/api/videos/${number}`);
    if (mine !== opened) return;
    video = about;
    $("name").textContent = about.folder ? `${about.folder} / ${about.video_id}` : about.video_id;
    player.hidden = !about.playable;
    if (about.playable) {
      player.src = `/videos/${number}`;
      seek(time, play);
    } else { player.removeAttribute("src"); problem(about.reason); }
    await Promise.all([drawCurve(number, q, mine), writeTranscript(number, mine)]);
  } catch (error) {
    if (mine !== opened) return;
    player.hidden = true;
    $("watch").classList.add("unknown");
    problem(error.message);
  }
}

function problem(text) { $("problem").textContent = text; $("problem").hidden = false; }

function seek(time, play) {
  const player = $("video");
  const go = () => {
    player.currentTime = time;
    if (play) player.play().catch(() => {}); // a browser may want a click first; the controls are there
  };
  if (player.readyState >= 1) go(); else player.addEventListener("loadedmetadata", go, { once: true });
}

function closeVideo(clear = true) {
  opened++;
  video = null;
  const player = $("video");
  player.pause();
  player.removeAttribute("src");
  player.load();
  $("watch").hidden = true;
  document.querySelector("main").classList.remove("watching");
  if (clear) keep({ video: "", t: "" }, true);
}

async function drawCurve(number, q, mine) {
  if (!q) return;
  const { curve, moments } = await get(`/api/videos/${number}/curve`, { q });
  if (mine !== opened || !curve.length) return;
  const svg = $("curve"), space = "http://www.w3.org/2000/svg", length = curve.length;
  const low = Math.min(...curve), span = Math.max(...curve) - low || 1;
  const shape = (tag, values, className) => {
    const element = document.createElementNS(space, tag);
    for (const [name, value] of Object.entries(values)) element.setAttribute(name, value);
    element.setAttribute("class", className);
    return element;
  };
  const points = curve.map((value, i) => `${i ? "L" : "M"}${i + 0.5} ${(95 - (90 * (value - low)) / span).toFixed(2)}`);
  head = shape("line", { x1: 0, x2: 0, y1: 0, y2: 100 }, "head");
  const bands = moments.map((m) => shape("rect", { x: m.start, width: m.end - m.start, y: 0, height: 100 }, "moment"));
  svg.setAttribute("viewBox", `0 0 ${length} 100`);
  svg.replaceChildren(...bands, shape("path", { d: points.join("") }, "line"), head);
  svg.onclick = (event) => {
    const box = svg.getBoundingClientRect();
    jump(((event.clientX - box.left) / box.width) * length);
  };
  $("axis").replaceChildren(...[0, length / 2, length].map((time) => make("span", "", clock(time))));
  $("moments").replaceChildren(...moments.map((moment) => {
    const button = make("button", "", `${clock(moment.start)} – ${clock(moment.end)}`);
    button.type = "button";
    button.addEventListener("click", () => { wanted = moment; jump(Math.max(0, moment.start - LEAD_IN)); });
    return button;
  }));
}

async function writeTranscript(number, mine) {
  const spoken = (await get(`/api/videos/${number}/transcript`)).lines;
  if (mine !== opened) return;
  const words = askedWords();
  lines = spoken.map((line) => {
    const button = make("button");
    button.type = "button";
    button.append(make("time", "", clock(line.start)), marked(make("span"), line.text, words));
    button.addEventListener("click", () => jump(line.start));
    return { ...line, button };
  });
  $("spoken").hidden = !lines.length;
  $("find-line").value = "";
  $("lines").replaceChildren(...lines.map((line) => line.button));
}

function jump(time) {
  keep({ t: time.toFixed(1) });
  seek(time, true);
}

function follow() {
  const time = $("video").currentTime;
  if (head) { head.setAttribute("x1", time); head.setAttribute("x2", time); }
  let now = -1;
  for (let low = 0, high = lines.length - 1; low <= high;) {
    const middle = (low + high) >> 1;
    if (lines[middle].start <= time) { now = middle; low = middle + 1; } else high = middle - 1;
  }
  const before = document.querySelector('#lines [aria-current="true"]');
  const current = lines[now]?.button;
  if (before === current) return;
  before?.removeAttribute("aria-current");
  if (!current) return;
  current.setAttribute("aria-current", "true");
  const box = $("lines");
  if (!box.matches(":hover") && !$("find-line").value) box.scrollTop = current.offsetTop - box.clientHeight / 2;
}

// --- Events ---------------------------------------------------------------------------------------------------------

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  count = FIRST;
  keep({ q: $("query").value.trim(), ...filters(), like: "" }, true);
  find();
});
for (const id of ["by", "folder", "shortest", "longest"]) $(id).addEventListener("change", () => $("form").requestSubmit());
$("more").addEventListener("click", () => {
  count = Math.min(MOST, 2 * count);
  const like = state().like;
  if (like) findAlike(like); else find();
});
$("close").addEventListener("click", () => closeVideo());
$("like").addEventListener("click", () => {
  if (!video) return;
  const time = $("video").currentTime, inside = wanted && time >= wanted.start - LEAD_IN - 1 && time <= wanted.end + 1;
  const moment = inside ? wanted : { start: Math.max(0, time - 4), end: time + 4 };
  const like = [video.number, moment.start.toFixed(1), moment.end.toFixed(1)].join("-");
  count = FIRST;
  keep({ like }, true);
  findAlike(like);
});
$("find-line").addEventListener("input", () => {
  const words = $("find-line").value.toLocaleLowerCase();
  for (const line of lines) line.button.hidden = !line.text.toLocaleLowerCase().includes(words);
});
$("video").addEventListener("timeupdate", () => {
  follow();
  if (video && !$("video").seeking && Math.abs(Number(state().t ?? 0) - $("video").currentTime) >= 1) {
    keep({ t: $("video").currentTime.toFixed(1) });
  }
});
$("video").addEventListener("error", () => {
  if ($("video").getAttribute("src")) problem("This browser cannot play the file.");
});
addEventListener("popstate", restore);
addEventListener("keydown", (event) => {
  const typing = event.target.matches("input, select, textarea");
  if (event.key === "/" && !typing) { event.preventDefault(); $("query").focus(); $("query").select(); }
  else if (event.key === "Escape") { if (!$("watch").hidden) closeVideo(); else event.target.blur(); }
  else if (event.target.matches("select, video, #find-line, input[type=number]")) return;
  else if (event.key === "ArrowDown") { event.preventDefault(); choose(chosen + 1); }
  else if (event.key === "ArrowUp") { event.preventDefault(); if (chosen > 0) choose(chosen - 1); else $("query").focus(); }
});

async function start() {
  try {
    const there = await get("/api/archive");
    const folders = there.folders.filter(Boolean);
    $("folder").append(...folders.map((folder) => new Option(folder, folder)));
    $("folder-label").hidden = !folders.length;
    if (!there.words) { for (const option of $("by").options) option.disabled = option.value === "words"; }
  } catch { /* the state line says what is wrong once something is asked for */ }
  await restore();
}
start();
