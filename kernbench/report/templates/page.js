"use strict";
(() => {
  const WIDTH = 1000, SLIVER = 0.6, LANE = 18, BAR = 16, CLOSEST = 50, NAMED = 60;
  const PERFETTO = "https://ui.perfetto.dev";

  const make = (tag, attributes = {}, text = "") => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    if (text) node.textContent = text;
    return node;
  };
  const button = (text, label, act) => {
    const node = make("button", { type: "button", "aria-label": label, title: label }, text);
    node.addEventListener("click", act);
    return node;
  };
  const shape = (tag, attributes) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    return node;
  };
  const duration = (ns, digits = 3) => {
    if (ns === 0) return "0";
    const [unit, name] = [[1e9, "s"], [1e6, "ms"], [1e3, "µs"], [1, "ns"]].find(([size]) => Math.abs(ns) >= size) || [1, "ns"];
    return `${Number((ns / unit).toPrecision(digits))} ${name}`;
  };

  // As many digits as tell two times apart that lie so far from each other.
  const digits = (time, apart) => Math.min(Math.max(3, Math.ceil(Math.log10(time / apart)) + 2), 15);

  class Timeline {
    constructor(figure) {
      this.figure = figure;
      this.data = JSON.parse(figure.querySelector("script[type='application/json']").textContent);
      this.drawings = [...figure.querySelectorAll("svg.bars")];
      this.marks = figure.querySelector(".marks");
      this.ticks = figure.querySelector(".ticks");
      this.waits = this.data.tracks.flat().filter((span) => span[1] === "waits").sort((a, b) => a[2] - b[2]);
      this.wait = -1;
      this.readout = make("output", { class: "readout", "aria-live": "polite" });
      figure.append(this.readout);
      this.controls();
      this.pointers();
      figure.tabIndex = 0;
      figure.setAttribute("role", "group");
      figure.setAttribute("aria-keyshortcuts", "+ - ArrowLeft ArrowRight 0 n p");
      figure.addEventListener("keydown", (event) => this.key(event));
      this.view(0, this.data.end, true);
    }

    controls() {
      const bar = make("div", { class: "controls" });
      bar.append(
        button("+", "Zoom in", () => this.zoom(0.5)),
        button("−", "Zoom out", () => this.zoom(2)),
        button("←", "Earlier", () => this.move(-0.5)),
        button("→", "Later", () => this.move(0.5)),
        button("Whole step", "Show the whole step", () => this.view(0, this.data.end)),
      );
      if (this.waits.length) bar.append(button("Next ▼", "Go to the next place where the host waits", () => this.visit(1)));
      this.range = make("span", { class: "range" });
      bar.append(this.range, make("span", { class: "hint" }, "Drag over a part to zoom into it; keys: + − ← → 0, n and p for waits."));
      this.figure.prepend(bar);
    }

    key(event) {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const acts = {
        "+": () => this.zoom(0.5), "=": () => this.zoom(0.5), "-": () => this.zoom(2),
        ArrowLeft: () => this.move(-0.25), ArrowRight: () => this.move(0.25),
        0: () => this.view(0, this.data.end), Escape: () => this.view(0, this.data.end),
        n: () => this.visit(1), p: () => this.visit(-1),
      };
      const act = acts[event.key];
      if (!act) return;
      event.preventDefault();
      act();
    }

    zoom(factor, at = 0.5) {
      const length = this.to - this.from, centre = this.from + at * length;
      this.view(centre - at * length * factor, centre + (1 - at) * length * factor);
    }

    move(share) {
      const length = this.to - this.from;
      const from = Math.min(Math.max(this.from + share * length, 0), this.data.end - length);
      this.view(from, from + length);
    }

    visit(direction) {
      if (!this.waits.length) return;
      this.wait = (this.wait + direction + this.waits.length) % this.waits.length;
      const span = this.waits[this.wait];
      const around = Math.max(2 * span[3], this.data.end / 40);
      this.view(span[2] - around, span[2] + span[3] + around);
      this.tell(span);
    }

    view(from, to, first = false) {
      const end = this.data.end;
      const length = Math.min(Math.max(to - from, Math.min(CLOSEST, end)), end);
      this.from = Math.min(Math.max(from, 0), end - length);
      this.to = this.from + length;
      const exact = digits(this.to, this.to - this.from);
      this.range.textContent = `${duration(this.from, exact)} to ${duration(this.to, exact)}`;
      if (first) return;
      this.drawings.forEach((drawing, index) => this.draw(drawing, this.data.tracks[index]));
      this.label();
    }

    x(ns) { return (WIDTH * (ns - this.from)) / (this.to - this.from); }

    draw(drawing, spans) {
      const slivers = new Map(), nodes = [], names = [];
      for (const span of spans) {
        const [lane, look, begin, length] = span;
        if (begin > this.to || begin + length < this.from) continue;
        const left = Math.max(this.x(begin), -1), right = Math.min(this.x(begin + length), WIDTH + 1);
        if (right - left >= SLIVER) {
          const bar = shape("rect", { class: look, x: left.toFixed(2), y: lane * LANE, width: (right - left).toFixed(2), height: BAR });
          bar.span = span;
          nodes.push(bar);
          if (right - left >= NAMED) names.push(this.name(span, Math.max(left, 0), Math.min(right, WIDTH)));
          continue;
        }
        const key = `${lane} ${look}`, runs = slivers.get(key) || [], last = runs[runs.length - 1];
        const stop = left + Math.max(right - left, SLIVER / 2);
        if (last && left - last[1] < SLIVER / 2) last[1] = stop;
        else runs.push([left, stop]);
        slivers.set(key, runs);
      }
      for (const [key, runs] of slivers) {
        const [lane, look] = key.split(" ");
        const path = runs.map(([a, b]) => `M${a.toFixed(1)} ${lane * LANE}h${(b - a).toFixed(1)}v${BAR}h-${(b - a).toFixed(1)}z`);
        nodes.unshift(shape("path", { class: look, d: path.join("") }));
      }
      drawing.replaceChildren(...nodes);
      drawing.parentElement.replaceChildren(drawing, ...names);
    }

    // The drawing is stretched to its width, which text must not be, so names lie over it.
    name(span, left, right) {
      const node = make("span", { class: `name over-${span[1]}`, "aria-hidden": "true" }, this.data.names[span[4]].replace(/^void /, ""));
      node.style.left = `${(100 * left) / WIDTH}%`;
      node.style.width = `${(100 * (right - left)) / WIDTH}%`;
      node.style.top = `${span[0] * LANE}px`;
      return node;
    }

    label() {
      const percent = (ns) => `${(100 * (ns - this.from)) / (this.to - this.from)}%`;
      if (this.marks) {
        let free = -1;
        this.marks.replaceChildren(...this.waits.filter((span) => span[2] >= this.from && span[2] <= this.to).map((span) => {
          const mark = make("span", { title: this.words(span) });
          mark.style.left = percent(span[2]);
          const at = (span[2] - this.from) / (this.to - this.from);
          const room = span[5] && at > free;
          if (room) free = at + 0.022;
          mark.textContent = room ? `▼${span[5]}` : "▼";
          return mark;
        }));
      }
      const length = this.to - this.from, power = 10 ** Math.floor(Math.log10(length / 4));
      const spacing = Math.max(...[1, 2, 5].map((factor) => factor * power).filter((size) => size <= length / 4));
      const labels = [];
      for (let at = Math.ceil(this.from / spacing) * spacing; at < this.from + 0.92 * length; at += spacing) {
        const tick = make("span", {}, duration(at, digits(this.to, spacing)));
        tick.style.left = percent(at);
        labels.push(tick);
      }
      this.ticks.replaceChildren(...labels);
    }

    words(span) {
      const line = span[5] ? `${this.data.lines[span[5] - 1]}: ` : "";
      return `${line}${this.data.names[span[4]]}: ${duration(span[3])}, at ${duration(span[2])}`;
    }

    tell(span) { this.readout.textContent = this.words(span); }

    pointers() {
      let start = null;
      const brush = make("div", { class: "brush", hidden: "" });
      this.figure.append(brush);
      const at = (event) => {
        const box = this.drawings[0].getBoundingClientRect();
        return Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1);
      };
      const time = (share) => this.from + share * (this.to - this.from);
      for (const drawing of this.drawings) {
        drawing.addEventListener("pointerdown", (event) => {
          if (event.button || event.pointerType === "touch") return;
          start = at(event);
          drawing.setPointerCapture(event.pointerId);
        });
        drawing.addEventListener("pointermove", (event) => {
          const index = this.drawings.indexOf(drawing), here = time(at(event));
          if (start === null) {
            const lane = Math.floor((event.clientY - drawing.getBoundingClientRect().top) / LANE), near = (this.to - this.from) / WIDTH;
            const span = this.data.tracks[index].find((item) => item[0] === lane && item[2] - near <= here && item[2] + item[3] + near >= here);
            if (span) this.tell(span);
            return;
          }
          const box = this.drawings[0].getBoundingClientRect(), left = this.figure.getBoundingClientRect().left;
          const [a, b] = [start, at(event)].sort((one, other) => one - other);
          brush.style.left = `${box.left - left + a * box.width}px`;
          brush.style.width = `${(b - a) * box.width}px`;
          brush.hidden = false;
        });
        drawing.addEventListener("pointerup", (event) => {
          if (start === null) return;
          const [a, b] = [start, at(event)].sort((one, other) => one - other);
          start = null;
          brush.hidden = true;
          if (b - a > 0.004) this.view(time(a), time(b));
        });
        drawing.addEventListener("pointercancel", () => { start = null; brush.hidden = true; });
        drawing.addEventListener("dblclick", (event) => this.zoom(0.5, at(event)));
        drawing.addEventListener("wheel", (event) => {
          if (!event.ctrlKey) return;
          event.preventDefault();
          this.zoom(event.deltaY > 0 ? 1.25 : 0.8, at(event));
        }, { passive: false });
      }
    }
  }

  class Flame {
    constructor(figure) {
      this.frames = [...figure.querySelectorAll(".frame")];
      this.readout = make("output", { class: "readout", "aria-live": "polite" });
      const bar = make("div", { class: "controls" });
      bar.append(
        button("Whole step", "Show all frames", () => this.show(0, 100)),
        make("span", { class: "hint" }, "Choose a frame to see it in full width; choose it again for the whole step."),
      );
      figure.prepend(bar);
      figure.append(this.readout);
      this.from = 0;
      this.width = 100;
      this.places = new Map(this.frames.map((frame) => [frame, [parseFloat(frame.style.left), parseFloat(frame.style.width)]]));
      for (const frame of this.frames) {
        frame.tabIndex = 0;
        frame.setAttribute("role", "button");
        const open = () => {
          const [left, width] = this.places.get(frame);
          if (this.from === left && this.width === width) this.show(0, 100);
          else this.show(left, width);
          this.readout.textContent = frame.title;
        };
        frame.addEventListener("click", open);
        frame.addEventListener("keydown", (event) => {
          if (event.key !== "Enter" && event.key !== " ") return;
          event.preventDefault();
          open();
        });
        frame.addEventListener("focus", () => { this.readout.textContent = frame.title; });
        frame.addEventListener("pointerenter", () => { this.readout.textContent = frame.title; });
      }
    }

    show(from, width) {
      this.from = from;
      this.width = width;
      for (const frame of this.frames) {
        const [at, wide] = this.places.get(frame), left = ((at - from) * 100) / width, right = left + (wide * 100) / width;
        frame.hidden = right <= 0.001 || left >= 99.999;
        frame.style.left = `${Math.max(left, 0)}%`;
        const shown = Math.min(right, 100) - Math.max(left, 0);
        frame.style.width = `${shown}%`;
        frame.classList.toggle("narrow", shown < 4);
      }
    }
  }

  class Perfetto {
    constructor(place) {
      this.file = place.dataset.trace;
      this.beside = "beside" in place.dataset;
      this.said = make("output", { class: "hint", "aria-live": "polite" });
      const opener = button("Open in Perfetto", `Open ${this.file} in ui.perfetto.dev`, () => this.open());
      this.picker = make("input", { type: "file", accept: ".json,.gz", "aria-label": `The file ${this.file}`, hidden: "" });
      this.picker.addEventListener("change", async () => {
        if (this.picker.files.length) this.send(window.open(PERFETTO), await this.picker.files[0].arrayBuffer());
      });
      place.replaceChildren(opener, this.picker, this.said);
    }

    // A page on disk may not read the file beside it, so the reader picks it; a served page fetches it.
    async open() {
      if (!this.beside || !location.protocol.startsWith("http")) {
        this.picker.hidden = false;
        this.said.textContent = `Choose ${this.file}: it goes to ui.perfetto.dev inside this browser and is not uploaded.`;
        this.picker.click();
        return;
      }
      const other = window.open(PERFETTO);
      try {
        const answer = await fetch(encodeURI(this.file));
        if (!answer.ok) throw new Error(`${answer.status}`);
        this.send(other, await answer.arrayBuffer());
      } catch (error) {
        this.said.textContent = `${this.file} could not be read (${error.message}).`;
      }
    }

    send(other, buffer) {
      if (!other) {
        this.said.textContent = "The browser blocked the new window; allow it for this page.";
        return;
      }
      const ask = setInterval(() => other.postMessage("PING", PERFETTO), 100);
      const stop = setTimeout(() => clearInterval(ask), 60000);
      const answered = (event) => {
        if (event.source !== other || event.origin !== PERFETTO || event.data !== "PONG") return;
        clearInterval(ask);
        clearTimeout(stop);
        window.removeEventListener("message", answered);
        other.postMessage({ perfetto: { buffer, title: document.title, fileName: this.file } }, PERFETTO);
      };
      window.addEventListener("message", answered);
    }
  }

  document.querySelectorAll("figure.timeline").forEach((figure) => new Timeline(figure));
  document.querySelectorAll("figure.flame").forEach((figure) => new Flame(figure));
  document.querySelectorAll("[data-trace]").forEach((place) => new Perfetto(place));
})();
