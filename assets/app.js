// The page's own script: files, bars that light up on both sides, corrections, playing, looks, boxes. No library, no
// network. What the server is to know goes through fields that nobody sees.
(() => {
  "use strict";
  const SVG = "http://www.w3.org/2000/svg";
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const one = (selector, root = document) => root.querySelector(selector);
  const score = () => one("#score .rows");

  function tell(name, text) {
    const field = one(`#${name} textarea, #${name} input`);
    if (!field || field.value === text) return;
    field.value = text;
    field.dispatchEvent(new Event("input", { bubbles: true }));
  }

  // Files: dropped, pasted, chosen or photographed, they go into the one field that uploads.

  function hand(files) {
    const field = one("#picture input[type=file]"), [file] = files;
    if (!field || !file) return;
    const carried = new DataTransfer();
    carried.items.add(file);
    field.files = carried.files;
    field.dispatchEvent(new Event("change", { bubbles: true }));
  }

  const camera = {
    async open() {
      let stream;
      try {
        stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment", width: 1920 } });
      } catch (e) {
        one("#drop .ways span").textContent = "There is no camera, or it may not be used here.";
        return;
      }
      const box = document.createElement("dialog"), video = document.createElement("video");
      box.className = "camera";
      box.innerHTML = '<p><button type="button" class="shoot">Take the photo</button><button type="button" class="shut">Close</button></p>';
      video.srcObject = stream;
      video.autoplay = video.muted = video.playsInline = true;
      box.prepend(video);
      document.body.append(box);
      box.onclose = () => {
        for (const t of stream.getTracks()) t.stop();
        box.remove();
      };
      one(".shut", box).onclick = () => box.close();
      one(".shoot", box).onclick = () => {
        const canvas = document.createElement("canvas");
        [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
        canvas.getContext("2d").drawImage(video, 0, 0);
        canvas.toBlob((b) => b && hand([new File([b], "photo.jpg", { type: "image/jpeg" })]), "image/jpeg", 0.92);
        box.close();
      };
      box.showModal();
    },
  };

  const hasFiles = (event) => event.dataTransfer && [...event.dataTransfer.types].includes("Files");
  document.addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    one("#drop .drop")?.classList.add("over");
  });
  for (const kind of ["dragleave", "drop"]) {
    document.addEventListener(kind, (event) => {
      if (kind === "drop" || !event.relatedTarget) one("#drop .drop")?.classList.remove("over");
    });
  }
  document.addEventListener("drop", (event) => {
    if (!hasFiles(event) || event.target.closest("#reference")) return;
    event.preventDefault();
    hand(event.dataTransfer.files);
  });
  document.addEventListener("paste", (event) => {
    if (!event.clipboardData.files.length || event.target.closest("textarea, input")) return;
    hand(event.clipboardData.files);
  });

  // Pages that are ticked, as numbers in the field of pages.

  const pages = {
    text(numbers) {
      const runs = [];
      for (const n of numbers) {
        const last = runs.at(-1);
        if (last && last[1] === n - 1) last[1] = n;
        else runs.push([n, n]);
      }
      return runs.map(([a, b]) => (a === b ? `${a}` : `${a}-${b}`)).join(",");
    },
    numbers(text) {
      return text.split(",").flatMap((piece) => {
        const [a, b] = piece.split("-").map(Number);
        return Array.from({ length: (b || a) - a + 1 || 0 }, (_, i) => a + i);
      });
    },
    tick() { // the field is right: more small pictures have come
      const field = one("#pages textarea, #pages input"), boxes = all("#file .thumbs input");
      if (!field || !boxes.length) return;
      const chosen = new Set(this.numbers(field.value));
      if (field.value) for (const b of boxes) b.checked = chosen.has(Number(b.value));
    },
    take() { // the boxes are right: a person has ticked one
      const beyond = this.numbers(one("#pages textarea, #pages input").value).filter((n) => n > all("#file .thumbs input").length);
      const ticked = all("#file .thumbs input:checked").map((b) => Number(b.value));
      tell("pages", this.text([...ticked, ...beyond]));
    },
  };

  // Bars. An engraved bar is only as clickable as its ink, so each gets a sheet of glass behind it.

  function glaze(svg) {
    svg.dataset.glazed = "1";
    for (const bar of all("g.measure", svg)) {
      const staves = all(":scope > g.staff", bar).map((s) => s.getBBox()).filter((b) => b.width);
      if (!staves.length) continue;
      const x = Math.min(...staves.map((b) => b.x)), right = Math.max(...staves.map((b) => b.x + b.width));
      const y = Math.min(...staves.map((b) => b.y)), low = Math.max(...staves.map((b) => b.y + b.height));
      const glass = document.createElementNS(SVG, "rect");
      const box = { x, y: y - 90, width: right - x, height: low - y + 180 };
      for (const [k, v] of Object.entries(box)) glass.setAttribute(k, v);
      glass.classList.add("glass");
      bar.prepend(glass);
      const n = Number(bar.dataset.bar) + 1;
      if (svg.closest("#score")) {
        bar.setAttribute("tabindex", "0");
        bar.setAttribute("role", "button");
        bar.setAttribute("aria-label", `Bar ${n}${bar.classList.contains("odd") ? ", does not add up" : ""}`);
      }
    }
  }

  let lit = null; // the chosen bar

  function light(n, kind = "lit") {
    for (const e of all(`.${kind}[data-bar]`)) e.classList.remove(kind);
    if (n === null) return;
    for (const e of all(`#original [data-bar="${n}"], #score [data-bar="${n}"]`)) e.classList.add(kind);
  }

  function follow(n, from) {
    const e = one(`#score g.measure[data-bar="${n}"]`), row = e && e.closest(".system");
    if (!e) return;
    for (const side of all(`#score [data-bar="${n}"]`)) {
      const frame = side.closest(".strip, .sheet"), a = side.getBoundingClientRect(), b = frame.getBoundingClientRect();
      if (a.left < b.left || a.right > b.right) frame.scrollLeft += a.left - b.left - 40; // sideways, inside its frame
    }
    if (!from || from.closest("#original")) (row || e).scrollIntoView({ block: "nearest" });
  }

  function choose(e, keep = false) {
    const n = e.dataset.bar;
    lit = lit === n && !keep ? null : n;
    light(lit);
    if (lit !== null) {
      follow(lit, e);
      player.seek(Number(lit));
    }
    editor.row();
  }

  // Corrections. A change goes to the server, which engraves its system again; those made meanwhile wait for it.

  const KEYS = { 1: "64th", 2: "32nd", 3: "16th", 4: "eighth", 5: "quarter", 6: "half", 7: "whole" };
  const pen = {
    chosen: null, todo: [], waiting: 0, seq: 0,
    note() {
      return this.chosen && document.getElementById(this.chosen);
    },
    choose(e) {
      this.chosen = e ? e.id : null;
      this.show();
      if (!e) return;
      const bar = e.closest("g.measure");
      if (bar && bar.dataset.bar !== lit) choose(bar, true);
      e.closest(".sheet").focus({ preventScroll: true });
    },
    show() {
      for (const e of all("#score .chosen")) e.classList.remove("chosen");
      const e = this.note();
      if (e) e.classList.add("chosen");
      for (const b of all("#bench [data-do]:not([data-do=undo], [data-do=redo])")) b.disabled = !e;
      const said = e && one(":scope > title", e);
      if (e) this.say(`Chosen: ${e.classList.contains("note") ? "a note" : "a rest"}${said ? `, ${said.textContent}` : ""}.`);
    },
    say(text) {
      const place = one("#bench .says");
      if (place && place.textContent !== text) place.textContent = text;
    },
    step(by) { // along the notes of the system, as they stand in it
      const all_ = all("#score .system .note, #score .system .rest, #score .system .mRest").filter((e) => e.id);
      const at = all_.findIndex((e) => e.id === this.chosen), next = all_[at + by];
      if (at >= 0 && next) this.choose(next);
    },
    ask(what, value) {
      const e = this.note();
      if (!e && what !== "undo" && what !== "redo") return;
      this.todo.push({ note: this.waiting ? null : this.chosen, do: what, value });
      if (e) e.closest(".system").classList.add("working");
      this.say("Engraving.");
      this.send();
    },
    send() {
      if (this.waiting || !this.todo.length) return;
      this.waiting = ++this.seq;
      const todo = this.todo.splice(0).map((t, i) => ({ ...t, note: t.note ?? (i ? null : this.chosen) }));
      tell("command", JSON.stringify({ seq: this.seq, todo }));
      clearTimeout(this.timer);
      this.timer = setTimeout(() => this.done("No answer came; try again."), 20000);
    },
    done(said) {
      clearTimeout(this.timer);
      this.waiting = 0;
      if (!this.todo.length) for (const e of all("#score .working")) e.classList.remove("working");
      this.show();
      if (said) this.say(said);
      this.send();
    },
    take(patch) {
      patch.dataset.taken = "1";
      if (Number(patch.dataset.seq) !== this.waiting) return;
      const row = one(".system", patch), old = row && one(`#score .system[data-system="${row.dataset.system}"]`);
      if (old) {
        const aside = one(".strip", old).scrollLeft, held = old.contains(document.activeElement);
        old.replaceWith(row);
        one(".strip", row).scrollLeft = aside;
        if (held) one(".sheet", row).focus({ preventScroll: true });
        light(lit);
      }
      if (patch.dataset.chosen) this.chosen = patch.dataset.chosen;
      for (const what of ["undo", "redo"]) {
        const b = one(`#bench [data-do=${what}]`);
        if (b) b.disabled = !Number(patch.dataset[what]);
      }
      this.done(patch.dataset.said || (old ? "Engraved." : ""));
    },
    key(event) {
      if (!this.chosen || event.altKey || !event.target.closest || event.target.closest("input, textarea, select")) return false;
      const ctrl = event.ctrlKey || event.metaKey, k = event.key;
      const octave = event.shiftKey ? 7 : 1;
      const change = ctrl ? { z: event.shiftKey ? ["redo"] : ["undo"], Z: ["redo"], y: ["redo"] }[k]
        : { ArrowUp: ["pitch", octave], ArrowDown: ["pitch", -octave], ".": ["dot"], t: ["tie"], i: ["insert"], c: ["chord"],
          "#": ["accidental", "sharp"], b: ["accidental", "flat"], n: ["accidental", "natural"], Delete: ["delete"],
          Backspace: ["delete"] }[k] || (KEYS[k] && ["length", KEYS[k]]);
      if (change) this.ask(...change);
      else if (k === "ArrowLeft" || k === "ArrowRight") this.step(k === "ArrowRight" ? 1 : -1);
      else if (k === "Escape") this.choose(null);
      else return false;
      event.preventDefault();
      return true;
    },
    near(event, bar) { // a head is small: the nearest one within a finger's width
      let best = null, least = 16;
      for (const e of all(".note, .rest, .mRest", bar)) {
        const b = (one(".notehead", e) || e).getBoundingClientRect();
        const away = Math.hypot(event.clientX - b.x - b.width / 2, event.clientY - b.y - b.height / 2);
        if (e.id && away < least) [best, least] = [e, away];
      }
      return best;
    },
    drag(event, e) { // up and down by steps of the staff
      const space = 90 * e.getScreenCTM().a, y = event.clientY; // half a staff space, px
      let by = 0;
      const move = (to) => {
        by = Math.round((y - to.clientY) / space);
        if (by) e.setAttribute("transform", `translate(0 ${-90 * by})`);
        else e.removeAttribute("transform");
        if (by) to.preventDefault();
      };
      const end = () => {
        document.removeEventListener("pointermove", move);
        document.removeEventListener("pointerup", end);
        document.removeEventListener("pointercancel", end);
        if (!by) return;
        this.choose(e);
        this.dragged = true;
        setTimeout(() => (this.dragged = false), 0);
        this.ask("pitch", by);
      };
      document.addEventListener("pointermove", move);
      document.addEventListener("pointerup", end);
      document.addEventListener("pointercancel", end);
    },
  };

  // Texts to edit. They follow the reading, but what a person has typed is never overwritten.

  const editor = {
    shown: {}, sent: {},
    field: (name) => one(`#${name} textarea`),
    follow() {
      for (const pre of all("#texts pre")) {
        const name = pre.dataset.text, text = pre.textContent;
        if (name === "sounds") {
          const rows = score();
          if (rows && rows.dataset.sounds !== text) rows.dataset.sounds = text;
          continue;
        }
        const field = this.field(name);
        if (!field || this.shown[name] === text) continue;
        const free = field.value === (this.shown[name] ?? "") || field.value === this.sent[name] || field.value === "";
        this.note(name, !free);
        if (free) this.set(name, text);
      }
    },
    set(name, text) {
      const before = this.shown[name];
      this.shown[name] = text;
      this.sent[name] = undefined;
      tell(name, text);
      if (before !== text) this.row();
    },
    note(name, on) {
      const tab = one(`#${name}`);
      let said = one(`#${name} + .kept`);
      if (!on) return said && said.remove();
      if (said) return;
      said = document.createElement("p");
      said.className = "kept";
      said.dataset.of = name;
      said.innerHTML = 'The reading has changed; your text is kept. <button type="button">Take the new text</button>';
      tab.after(said);
    },
    take(name) {
      const pre = one(`#texts pre[data-text=${name}]`);
      if (pre) this.set(name, pre.textContent);
      this.note(name, false);
    },
    row() { // the row of the chosen bar
      const field = this.field("lmx"), bar = lit !== null && one(`#score .system [data-bar="${lit}"]`);
      if (!field) return;
      field.style.backgroundImage = "none";
      const row = bar && bar.closest(".system");
      if (!row) return;
      const blocks = field.value.split(/\n[ \t]*\n/), line = Number(row.dataset.before);
      const at = blocks.slice(0, line).reduce((n, b) => n + b.split("\n").length + 1, 0) + Number(lit) - Number(row.dataset.first);
      const style = getComputedStyle(field), high = parseFloat(style.lineHeight), top = parseFloat(style.paddingTop) + at * high;
      const n = Number(row.dataset.lines);
      field.dataset.row = at;
      field.style.background = `linear-gradient(#f5c45e55, #f5c45e55) 0 ${top}px / 100% ${high}px no-repeat local`;
      if (n && (top < field.scrollTop || top + high > field.scrollTop + field.clientHeight)) field.scrollTop = top - 2 * high;
    },
  };

  // The width of the window: the server breaks lines of music where it is narrow.

  function measure() {
    const w = document.documentElement.clientWidth;
    tell("width", w < 700 ? String(Math.max(200, 20 * Math.floor((w - 60) / 20))) : "");
  }
  addEventListener("resize", () => {
    clearTimeout(measure.timer);
    measure.timer = setTimeout(measure, 300);
  });

  // Playing. Notes are a fundamental with a few partials, struck and fading; all of it is computed here.

  const player = {
    at: 0, rate: 1, on: false, next: 0, started: 0, timer: 0, sounding: [],
    load() {
      const sheet = score(), text = sheet && sheet.dataset.sounds;
      if (text !== this.text) {
        this.stop();
        this.text = text;
        this.score = text ? JSON.parse(text) : { notes: [], bars: [] };
        this.score.notes.sort((a, b) => a[1] - b[1]);
        this.end = Math.max(0, ...this.score.notes.map((n) => n[1] + n[2]));
      }
      return this.score.notes.length > 0;
    },
    now() {
      return this.on ? this.at + (performance.now() - this.started) * this.rate : this.at;
    },
    strike(pitch, delay, length) {
      const t = this.audio.currentTime + Math.max(0, delay), tone = this.audio.createOscillator();
      const gain = this.audio.createGain(), loud = 0.16 * Math.min(1.2, Math.max(0.5, (90 - pitch) / 30 + 0.5));
      tone.setPeriodicWave(this.wave);
      tone.frequency.value = 440 * 2 ** ((pitch - 69) / 12);
      gain.gain.setValueAtTime(0, t);
      gain.gain.linearRampToValueAtTime(loud, t + 0.008);
      gain.gain.exponentialRampToValueAtTime(loud * 0.35, t + 0.008 + Math.min(0.5, length));
      gain.gain.setTargetAtTime(0, t + length, 0.06);
      tone.connect(gain).connect(this.out);
      tone.start(t);
      tone.stop(t + length + 0.5);
      tone.onended = () => this.voices.delete(tone);
      this.voices.add(tone);
    },
    play() {
      if (!this.load()) return;
      if (!this.audio) {
        this.audio = new AudioContext();
        this.out = this.audio.createDynamicsCompressor();
        this.out.connect(this.audio.destination);
        const partials = new Float32Array([0, 1, 0.45, 0.3, 0.15, 0.1, 0.06, 0.03]);
        this.wave = this.audio.createPeriodicWave(new Float32Array(partials.length), partials);
        this.voices = new Set();
      }
      this.audio.resume();
      if (this.at >= this.end) this.at = 0;
      this.next = this.score.notes.findIndex((n) => n[1] >= this.at - 1);
      if (this.next < 0) this.next = this.score.notes.length;
      this.started = performance.now();
      this.on = true;
      this.timer = setInterval(() => this.tick(), 40);
      this.tick();
      this.show();
    },
    tick() {
      const now = this.now(), ahead = now + 200 * this.rate, notes = this.score.notes;
      for (; this.next < notes.length && notes[this.next][1] < ahead; this.next++) {
        const [, start, length, pitch] = notes[this.next];
        this.strike(pitch, (start - now) / this.rate / 1000, length / this.rate / 1000);
      }
      const here = notes.filter((n) => n[1] <= now && now < n[1] + n[2]).map((n) => n[0]);
      for (const id of this.sounding.filter((i) => !here.includes(i))) this.mark(id, false);
      for (const id of here.filter((i) => !this.sounding.includes(i))) this.mark(id, true);
      this.sounding = here;
      const bar = this.score.bars.findLastIndex((t) => t <= now);
      if (bar !== this.bar) {
        this.bar = bar;
        light(bar, "playing");
        follow(bar);
      }
      if (now >= this.end) this.stop();
    },
    mark(id, on) {
      const sheet = score(), note = sheet && one(`[id="${CSS.escape(id)}"]`, sheet);
      if (note) note.classList.toggle("sounding", on);
    },
    hush() {
      clearInterval(this.timer);
      for (const tone of this.voices || []) tone.stop();
      for (const id of this.sounding) this.mark(id, false);
      this.sounding = [];
      this.bar = null;
    },
    pause() {
      this.at = this.now();
      this.on = false;
      this.hush();
      this.show();
    },
    stop() {
      this.on = false;
      this.at = 0;
      this.hush();
      light(null, "playing");
      this.show();
    },
    seek(bar) {
      if (!this.load()) return;
      const was = this.on;
      if (was) this.pause();
      this.at = this.score.bars[bar] ?? 0;
      if (was) this.play();
    },
    tempo(rate) {
      const was = this.on;
      if (was) this.pause();
      this.rate = rate;
      if (was) this.play();
    },
    show() {
      for (const b of all(".player .play")) {
        b.textContent = this.on ? "Pause" : "Play";
        b.setAttribute("aria-pressed", this.on);
      }
    },
  };

  // Looks: the patches that a token was read from, drawn over the picture.

  function gaze(n) {
    const panel = document.querySelector(".gaze");
    if (!panel) return;
    const { columns, patch, maps, tokens } = (panel.read ??= JSON.parse(panel.dataset.gaze));
    n = Math.max(0, Math.min(tokens.length - 1, n));
    panel.dataset.token = n;
    const svg = panel.querySelector("svg"), most = Math.max(...maps[n].map((m) => m[1]), 0.01);
    svg.replaceChildren(
      ...maps[n].map(([i, share]) => {
        const cell = document.createElementNS(SVG, "rect");
        const at = { x: (i % columns) * patch, y: Math.floor(i / columns) * patch, width: patch, height: patch };
        for (const [k, v] of Object.entries(at)) cell.setAttribute(k, v);
        cell.style.opacity = 0.15 + 0.6 * (share / most);
        return cell;
      }),
    );
    const [at] = maps[n].reduce((best, m) => (m[1] > best[1] ? m : best), [0, 0]); // the brightest, into view
    const shown = (((at % columns) + 0.5) * patch * svg.clientWidth) / svg.viewBox.baseVal.width;
    panel.scrollLeft = shown - panel.clientWidth / 2;
    for (const e of all("#gaze .lmx[data-token]")) e.classList.toggle("chosen", Number(e.dataset.token) === n);
    const chosen = document.querySelector("#gaze .chosen"), list = chosen && chosen.closest(".bars");
    if (list) {
      const a = chosen.getBoundingClientRect(), b = list.getBoundingClientRect();
      if (a.top < b.top || a.bottom > b.bottom) list.scrollTop += a.top - b.top - 20;
    }
    document.querySelector("#gaze .said").textContent = `Token ${n + 1} of ${tokens.length}: ${tokens[n]}`;
  }

  // Events, on the document: what they belong to comes and goes with every reading.

  document.addEventListener("click", (event) => {
    const at = (selector) => event.target.closest && event.target.closest(selector);
    if (at("#drop .choose")) return one("#picture input[type=file]").click();
    if (at("#drop .camera")) return camera.open();
    if (at("[data-example]")) return tell("example", `${at("[data-example]").dataset.example}#${Date.now()}`);
    if (at("#bench .zoom button")) return zoom(Number(at("#bench .zoom button").dataset.by));
    if (at("#bench [data-do]")) {
      const { do: what, value } = at("#bench [data-do]").dataset;
      return pen.ask(what, what === "pitch" ? Number(value) : value);
    }
    if (at(".kept button")) return editor.take(at(".kept").dataset.of);
    if (at("#apply-lmx") || at("#apply-xml")) {
      const name = at("#apply-lmx") ? "lmx" : "xml";
      editor.sent[name] = editor.field(name)?.value;
    }
    if (at(".player .play")) return player.on ? player.pause() : player.play();
    if (at(".player .halt")) return player.stop();
    const token = at("#gaze .lmx[data-token]");
    if (token) return gaze(Number(token.dataset.token));
    if (pen.dragged) return;
    const bar = at("#original polygon.bar, #score polygon.bar, #score g.measure");
    const note = at("#score .system .note, #score .system .rest, #score .system .mRest")
      || (bar && bar.matches(".system g.measure") && pen.near(event, bar));
    if (note && note.id) return pen.choose(note);
    if (bar) {
      pen.choose(null);
      return choose(bar);
    }
    if (at("#frames .add")) boxes.add();
    if (at("#frames .drop") && boxes.chosen) boxes.remove(boxes.chosen);
  });

  document.addEventListener("change", (event) => {
    if (event.target.matches("#file .thumbs input")) pages.take();
  });

  let size = 1;
  function zoom(by) {
    size = by ? Math.min(3, Math.max(0.5, size * (by > 0 ? 1.25 : 0.8))) : 1;
    one("#score").style.setProperty("--zoom", size);
    for (const e of all("#bench .zoom output")) e.textContent = `${Math.round(100 * size)} %`;
    if (lit !== null) follow(lit, one("#score"));
  }

  document.addEventListener("input", (event) => {
    if (event.target.matches(".player .tempo")) {
      player.tempo(Number(event.target.value) / 100);
      event.target.nextElementSibling.textContent = `${event.target.value} %`;
    }
  });

  document.addEventListener("keydown", (event) => {
    if (boxes.key(event) || pen.key(event)) return;
    const bar = event.target.closest && event.target.closest("#original polygon.bar, #score polygon.bar, #score g.measure");
    if (bar && (event.key === "Enter" || event.key === " ")) {
      event.preventDefault();
      choose(bar);
    } else if (event.target.closest && event.target.closest("#gaze .bars") && /^Arrow(Left|Right)$/.test(event.key)) {
      event.preventDefault();
      const panel = document.querySelector(".gaze");
      gaze(Number(panel.dataset.token ?? 0) + (event.key === "ArrowRight" ? 1 : -1));
    }
  });

  // Boxes around systems: drag, resize, delete, add. A text field that nobody sees carries them to the server as JSON.

  const boxes = {
    chosen: null,
    rects: (page) => all("rect.box", page),
    make(svg, x0, y0, x1, y1) {
      const rect = document.createElementNS(SVG, "rect");
      rect.classList.add("box");
      rect.setAttribute("tabindex", "0");
      rect.setAttribute("role", "button");
      this.place(rect, x0, y0, x1, y1);
      svg.append(rect);
      return rect;
    },
    edges(rect) {
      const [x, y, w, h] = ["x", "y", "width", "height"].map((k) => Number(rect.getAttribute(k)));
      return [x, y, x + w, y + h];
    },
    place(rect, x0, y0, x1, y1) {
      const x = Math.min(x0, x1), y = Math.min(y0, y1);
      const box = { x, y, width: Math.abs(x1 - x0), height: Math.abs(y1 - y0) };
      for (const [k, v] of Object.entries(box)) rect.setAttribute(k, Math.round(v));
    },
    open(page) {
      page.dataset.open = "1";
      const svg = page.querySelector("svg");
      for (const box of JSON.parse(page.dataset.boxes)) this.make(svg, ...box);
      this.name(page);
    },
    name(page) { // in reading order
      const sorted = this.rects(page).sort((a, b) => this.edges(a)[1] - this.edges(b)[1]);
      sorted.forEach((r, i) => r.setAttribute("aria-label", `System ${i + 1}`));
      return sorted;
    },
    choose(rect) {
      for (const e of all(".boxes .chosen, .boxes .grip")) {
        if (e.classList.contains("grip")) e.remove();
        else e.classList.remove("chosen");
      }
      this.chosen = rect;
      if (!rect) return;
      rect.classList.add("chosen");
      const svg = rect.closest("svg"), [x0, y0, x1, y1] = this.edges(rect), r = svg.viewBox.baseVal.width / 160;
      for (const [i, [x, y]] of [[x0, y0], [x1, y0], [x1, y1], [x0, y1]].entries()) {
        const grip = document.createElementNS(SVG, "circle");
        grip.classList.add("grip");
        for (const [k, v] of Object.entries({ cx: x, cy: y, r })) grip.setAttribute(k, v);
        grip.dataset.corner = i;
        svg.append(grip);
      }
    },
    tell() { // only what a person changed makes the server look at boxes at all
      const found = {};
      for (const page of all("#frames .boxes")) found[page.dataset.page] = this.name(page).map((r) => this.edges(r));
      const field = document.querySelector("#boxes textarea");
      field.value = JSON.stringify(found);
      field.dispatchEvent(new Event("input", { bubbles: true }));
    },
    remove(rect) {
      this.choose(null);
      rect.remove();
      this.tell();
    },
    at(svg, event) {
      const p = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      const { width, height } = svg.viewBox.baseVal;
      return [Math.max(0, Math.min(width, p.x)), Math.max(0, Math.min(height, p.y))];
    },
    grab(event, svg) {
      const grip = event.target.closest(".grip"), rect = grip ? this.chosen : event.target.closest("rect.box");
      const [x, y] = this.at(svg, event);
      let edges, move;
      if (grip) {
        const k = Number(grip.dataset.corner), right = k === 1 || k === 2, low = k > 1;
        edges = this.edges(rect);
        move = (dx, dy) => [edges[0] + (right ? 0 : dx), edges[1] + (low ? 0 : dy),
          edges[2] + (right ? dx : 0), edges[3] + (low ? dy : 0)];
      } else if (rect) {
        edges = this.edges(rect);
        move = (dx, dy) => [edges[0] + dx, edges[1] + dy, edges[2] + dx, edges[3] + dy];
      } else {
        move = (dx, dy) => [x, y, x + dx, y + dy];
      }
      const target = rect || this.make(svg, x, y, x, y);
      let moved = false;
      svg.setPointerCapture(event.pointerId);
      svg.onpointermove = (e) => {
        const [u, v] = this.at(svg, e);
        moved ||= Math.hypot(u - x, v - y) > 3;
        if (moved) this.place(target, ...move(u - x, v - y));
      };
      svg.onpointerup = svg.onpointercancel = () => {
        svg.onpointermove = svg.onpointerup = svg.onpointercancel = null;
        const [x0, y0, x1, y1] = this.edges(target);
        if (!rect && (x1 - x0 < 24 || y1 - y0 < 24)) { // a click on empty paper
          target.remove();
          return this.choose(null);
        }
        this.choose(target);
        target.focus({ preventScroll: true });
        if (moved) this.tell();
      };
      event.preventDefault();
    },
    key(event) {
      const rect = event.target.closest && event.target.closest(".boxes rect.box");
      if (!rect) return false;
      const step = { ArrowLeft: [-4, 0], ArrowRight: [4, 0], ArrowUp: [0, -4], ArrowDown: [0, 4] }[event.key];
      if (event.key === "Delete" || event.key === "Backspace") this.remove(rect);
      else if (step) {
        const [x0, y0, x1, y1] = this.edges(rect), [dx, dy] = step, k = event.shiftKey ? 0 : 1;
        this.place(rect, x0 + k * dx, y0 + k * dy, x1 + dx, y1 + dy);
        this.choose(rect);
        this.tell();
      } else if (event.key === "Enter" || event.key === " ") this.choose(rect);
      else return false;
      event.preventDefault();
      return true;
    },
    add() { // for those who do not draw: a box as high as the others, where there is room below
      const page = document.querySelector("#frames .boxes"), svg = page && page.querySelector("svg");
      if (!svg) return;
      const last = this.name(page).at(-1), { width, height } = svg.viewBox.baseVal;
      const [x0, y0, x1, y1] = last ? this.edges(last) : [0.1 * width, 0.1 * height, 0.9 * width, 0.2 * height];
      const dy = Math.min(y1 - y0 + 20, height - y1);
      const rect = this.make(svg, x0, y0 + Math.max(40, dy), x1, Math.min(height, y1 + Math.max(40, dy)));
      this.choose(rect);
      rect.focus();
      this.tell();
    },
  };

  document.addEventListener("pointerdown", (event) => {
    const note = event.target.closest && event.target.closest("#score .system .note");
    if (note && note.id && event.button === 0) pen.drag(event, note);
    const svg = event.target.closest && event.target.closest("#frames .boxes svg");
    if (svg) boxes.grab(event, svg);
  });
  document.addEventListener("dblclick", (event) => {
    const rect = event.target.closest && event.target.closest("#frames rect.box");
    if (rect) boxes.remove(rect);
  });

  new MutationObserver(() => {
    for (const svg of all(".sheet > svg:not([data-glazed])")) if (svg.getBoundingClientRect().width) glaze(svg);
    const sheet = score();
    if (sheet !== player.sheet) {
      player.sheet = sheet;
      if (player.on) player.stop();
      player.at = 0;
      lit = null;
      pen.choose(null);
      pen.todo = [];
      for (const b of all("#bench [data-do=undo], #bench [data-do=redo]")) b.disabled = true;
    }
    const patch = one("#patch .patch:not([data-taken])");
    if (patch) pen.take(patch);
    editor.follow();
    const thumbs = one("#file .thumbs:not([data-ticked])");
    if (thumbs && one("#pages textarea, #pages input")?.value) {
      thumbs.dataset.ticked = "1";
      pages.tick();
    }
    if (Date.now() - (measure.told || 0) > 500) { // again and again: what is told before the page is awake is lost
      measure.told = Date.now();
      measure();
    }
    const panel = document.querySelector(".gaze");
    if (panel && panel.dataset.token === undefined) gaze(0);
    for (const page of all("#frames .boxes:not([data-open])")) boxes.open(page);
  }).observe(document.body, { childList: true, subtree: true, attributes: true, attributeFilter: ["class", "style"] });
})();
