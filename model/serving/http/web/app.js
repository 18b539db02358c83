// The page: asks this server, streams the answers, and tints accepted draft tokens.
// A model's text reaches the page as text nodes alone, never as HTML.
"use strict";

const $ = (id) => document.getElementById(id);
const chosen = (name) => document.querySelector(`input[name=${name}]:checked`).value;
const TITLES = { none: "plain", auto: "speculative" };
let conversation = []; // messages so far
let running = null; // aborts the requests under way

function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

function say(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

function headers() {
  const key = $("key").value.trim();
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

async function ask(path, options = {}) {
  const response = await fetch(path, { headers: headers(), ...options });
  if (response.ok) return response;
  const answer = await response.json().catch(() => ({}));
  if (response.status === 401) {
    $("more").open = true;
    $("key").focus();
  }
  const error = new Error(answer.error?.message ?? `the server answers ${response.status}`);
  error.loading = response.status === 503;
  throw error;
}

// The chunks of a stream of server-sent events.
async function* chunks(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}

// An answer on the page. Text and tokens need not end together: a possible stop string is held back.
class Panel {
  constructor(draft, before) {
    this.box = element("article", "panel");
    this.figures = element("p", "figures", "waiting");
    this.text = element("div", "text");
    if (before) this.text.append(element("span", "before", before));
    this.box.append(element("h2", "", TITLES[draft]), this.text, this.figures);
    this.written = "";
    this.waiting = []; // tokens whose text has not come yet
    this.tokens = this.accepted = this.depth = this.since = this.rate = 0;
  }

  add(text, tokens) {
    this.since ||= performance.now();
    for (const token of tokens) {
      this.depth = token.drafted ? this.depth + 1 : 0;
      this.tokens += 1;
      this.accepted += token.drafted;
      this.waiting.push({ text: token.text, tint: this.depth ? `depth${Math.min(this.depth, 4)}` : "" });
    }
    this.written += text;
    const log = $("log");
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
    for (let rest = text; rest; ) {
      const token = this.waiting[0] ?? { text: rest, tint: "" };
      let part = token.text;
      if (!rest.startsWith(part)) {
        part = rest; // the token goes on in the next chunk, or its text is shown in another form
        token.text = token.text.startsWith(rest) ? token.text.slice(rest.length) : "";
      } else this.waiting.shift();
      if (part) this.text.append(token.tint ? element("span", token.tint, part) : part);
      rest = rest.slice(part.length);
    }
    const seconds = (performance.now() - this.since) / 1000;
    if (seconds > 0.05) this.rate = this.tokens / seconds;
    this.show();
    if (atEnd) log.scrollTop = log.scrollHeight;
  }

  finish(timings) {
    if (timings?.predicted_per_second) this.rate = timings.predicted_per_second;
    this.show(timings?.acceptance_length);
  }

  // Every step emits one token of the base model's own: the others are accepted draft tokens.
  show(length = this.tokens / Math.max(1, this.tokens - this.accepted)) {
    this.figures.textContent =
      `${this.tokens} tokens, ${this.accepted} of them drafted · ${this.rate.toFixed(1)} tokens/s · ` +
      `acceptance length ${(length ?? 1).toFixed(2)}`;
  }

  async stream(path, request, signal) {
    const response = await ask(path, { method: "POST", body: JSON.stringify(request), signal });
    let timings;
    for await (const chunk of chunks(response.body)) {
      const choice = chunk.choices[0];
      timings = chunk.timings ?? timings;
      if (choice) this.add(choice.delta ? (choice.delta.content ?? "") : choice.text, choice.tokens ?? []);
    }
    this.finish(timings);
  }
}

function request(draft, prompt) {
  const chat = chosen("kind") === "chat";
  const input = chat ? { messages: [...conversation, { role: "user", content: prompt }] } : { prompt };
  const numbers = {};
  for (const name of ["temperature", "max_tokens", "seed"])
    if ($(name).value !== "") numbers[name] = Number($(name).value);
  return [chat ? "v1/chat/completions" : "v1/completions", { ...input, ...numbers, draft, stream: true, token_details: true }];
}

async function send() {
  const prompt = $("prompt").value;
  if (running || !prompt) return;
  const chat = chosen("kind") === "chat";
  const ours = conversation;
  const drafts = chosen("draft") === "compare" ? ["none", "auto"] : [chosen("draft")];
  const panels = drafts.map((draft) => new Panel(draft, chat ? "" : prompt));
  const row = element("div", "panels");
  row.append(...panels.map((panel) => panel.box));
  if (chat) $("log").append(element("p", "question", prompt));
  $("log").append(row);
  $("log").scrollTop = $("log").scrollHeight;
  running = new AbortController();
  $("stop").hidden = false;
  $("send").disabled = true;
  say(drafts.length > 1 ? "Both are generated at the same time and share every step of the model." : "");
  try {
    await Promise.all(
      panels.map(async (panel, i) => {
        await panel.stream(...request(drafts[i], prompt), running.signal);
        if (panels.length > 1 && !row.querySelector(".first")) panel.box.classList.add("first");
      }),
    );
    say(panels.length > 1 ? comparison(panels) : "done");
  } catch (error) {
    running.abort(); // the other one of a comparison
    if (error.name === "AbortError") say("stopped");
    else say(error.message, true);
  }
  const answer = panels.at(-1).written;
  if (chat && answer && conversation === ours) {
    conversation.push({ role: "user", content: prompt }, { role: "assistant", content: answer });
    $("prompt").value = "";
  }
  running = null;
  $("stop").hidden = true;
  $("send").disabled = false;
}

function comparison([plain, speculative]) {
  const same = plain.written === speculative.written ? "the same text" : "the texts differ somewhere";
  const speedup = (speculative.rate / plain.rate).toFixed(2);
  return `Speculative decoding: ${speedup} times as many tokens/s from the same steps, ${same}.`;
}

async function greet() {
  try {
    const props = await (await ask("props")).json();
    $("model").textContent = `${props.model} (${props.file_type}), ${props.n_ctx} tokens; drafts: ${props.draft}`;
    const kind = props.chat_template ? "chat" : "completion";
    document.querySelector(`input[name=kind][value=${kind}]`).checked = true;
    say("");
  } catch (error) {
    say(error.message, true);
    if (error.loading) setTimeout(greet, 2000);
  }
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", () => {
  running?.abort();
  conversation = [];
  $("log").replaceChildren();
  say("");
});
$("key").addEventListener("change", greet);
document.querySelector("input[name=kind][value=completion]").checked = true;
greet();
