"use strict";
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

// faces: one tab stop for each wall, arrow keys within it; a click shows the same image of every run
const dialog = document.querySelector("dialog"), large = dialog.querySelector(".large"), title = dialog.querySelector("h2");
const faces = all("button.face"), wall = all("#faces button.face");
let opened;
const visible = () => wall.filter(face => face.offsetParent);
function enlarge(face) {
  const same = faces.filter(one => one.dataset.key === face.dataset.key);
  title.textContent = face.firstElementChild.alt.slice(0, -2 - face.dataset.run.length);
  large.replaceChildren(...same.map(one => {
    const figure = document.createElement("figure"), caption = document.createElement("figcaption");
    caption.textContent = one.dataset.run;
    figure.append(one.firstElementChild.cloneNode(), caption);
    return figure;
  }));
  opened = face;
  if (!dialog.open) dialog.showModal();
}
function step(by) {
  const run = opened.dataset.run, row = faces.filter(one => one.dataset.run === run && wall.includes(one) === wall.includes(opened));
  enlarge(row[(row.indexOf(opened) + by + row.length) % row.length]);
}
faces.forEach(face => face.addEventListener("click", () => enlarge(face)));
wall.forEach((face, index) => { if (index) face.tabIndex = -1; });
document.querySelector("#faces").addEventListener("keydown", event => {
  const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: "up", ArrowDown: "down" }[event.key], here = event.target;
  if (!by || !here.matches("button.face")) return;
  event.preventDefault();
  const shown = visible(), from = here.getBoundingClientRect();
  const below = shown.filter(one => {
    const to = one.getBoundingClientRect();
    return Math.abs(to.left - from.left) < 2 && (by === "down" ? to.top > from.top : to.top < from.top);
  });
  const next = typeof by === "number" ? shown[shown.indexOf(here) + by] : by === "down" ? below[0] : below.at(-1);
  if (!next) return;
  here.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
});
all("[data-step]").forEach(button => button.addEventListener("click", () => step(+button.dataset.step)));
dialog.addEventListener("keydown", event => {
  if (event.key === "ArrowLeft" || event.key === "ArrowRight") step(event.key === "ArrowLeft" ? -1 : 1);
});
dialog.addEventListener("click", event => { if (event.target === dialog) dialog.close(); });

// charts: values at the pointer, or by arrow keys
all(".chart").forEach(chart => {
  const { x, at, rows } = JSON.parse(chart.dataset.values), plot = chart.querySelector(".plot");
  const cells = all("tbody tr", chart).map(row => all("td", row)), columns = all("thead th", chart).slice(1).map(cell => cell.textContent);
  const names = all("tbody th", chart).map(cell => cell.textContent);
  let place = +chart.dataset.start;
  function show(next) {
    place = Math.max(0, Math.min(x.length - 1, next));
    chart.querySelector(".cross").style.left = at[place] + "%";
    chart.querySelector("output").textContent = x[place];
    cells.forEach((row, i) => row.forEach((cell, j) => { cell.textContent = rows[i][j][place]; }));
    plot.setAttribute("aria-valuenow", place);
    plot.setAttribute("aria-valuetext", x[place] + ": " + names.map((name, i) => name + " " + columns.map((column, j) => column + " " + rows[i][j][place]).join(", ")).join("; "));
  }
  plot.addEventListener("pointermove", event => {
    const box = plot.getBoundingClientRect(), share = 100 * (event.clientX - box.left) / box.width;
    show(at.reduce((best, value, i) => Math.abs(value - share) < Math.abs(at[best] - share) ? i : best, 0));
  });
  plot.addEventListener("keydown", event => {
    const next = { ArrowLeft: place - 1, ArrowDown: place - 1, ArrowRight: place + 1, ArrowUp: place + 1, Home: 0, End: x.length - 1 }[event.key];
    if (next !== undefined) { event.preventDefault(); show(next); }
  });
  const parts = i => [all("g", chart)[i], all(".label", chart).find(label => label.textContent === names[i])];
  all("tbody tr", chart).forEach((row, i) => ["pointerenter", "pointerleave"].forEach(kind => row.addEventListener(kind, () => {
    chart.classList.toggle("dim", kind === "pointerenter");
    parts(i).forEach(part => part?.classList.toggle("on", kind === "pointerenter"));
  })));
  show(place);
});

// the commands
document.querySelector(".copy")?.addEventListener("click", async event => {
  const text = document.querySelector(".commands code"), status = document.querySelector("[role=status]");
  try {
    await navigator.clipboard.writeText(text.textContent);
    event.target.textContent = status.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(text);
    event.target.textContent = status.textContent = "Selected";
  }
});
